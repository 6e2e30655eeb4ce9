# Sourced by the interop scripts that need a SPIRE Server: the real ones of 1.15.3, and an agent that joins one.
#
# JOINS is who joins, the binary of an agent (default: durward); what is asked of it is the same.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

version=1.15.3
cache=${XDG_CACHE_HOME:-$HOME/.cache}/durward/spire-$version
if [ ! -x "$cache/spire-server" ] || [ ! -x "$cache/spire-agent" ]; then
    # Minutes, and gigabytes of memory: once for each version.
    mkdir -p "$cache"
    (
        cd "$root/tests/interop/spire"
        for name in spire-agent spire-server; do
            GOFLAGS=-mod=readonly GOBIN="$cache" timeout 1400 nice go install -trimpath -ldflags '-s -w' \
                "github.com/spiffe/spire/cmd/$name"
        done
    )
fi
joins=${JOINS:-$durward}
mkdir -p "$dir/bin"
ln -sf "$durward" "$dir/bin/durward"
ln -sf "$cache/spire-server" "$cache/spire-agent" "$dir/bin/"
export PATH="$dir/bin:$PATH"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# server_conf NAME PORT TRUST_DOMAIN [LINES OF server] [PLUGINS]: at $address (127.0.0.1), with the plugin_data of $datastore
# (sqlite3 in its own directory)
server_conf() {
    local of_its_own="database_type = \"sqlite3\" connection_string = \"$dir/$1/datastore.sqlite3\""
    mkdir -p "$dir/$1"
    cat >"$dir/$1/server.conf" <<CONF
server {
  bind_address = "${address:-127.0.0.1}"
  bind_port    = "$2"
  socket_path  = "$dir/$1/api.sock"
  trust_domain = "$3"
  data_dir     = "$dir/$1"
  log_level    = "DEBUG"
  ca_ttl       = "24h"
  ${4:-}
}
plugins {
  DataStore "sql" {
    plugin_data { ${datastore:-$of_its_own} }
  }
  KeyManager "disk" { plugin_data { keys_path = "$dir/$1/keys.json" } }
  NodeAttestor "join_token" { plugin_data { } }
  ${5:-}
}
CONF
}

# agent_conf [LINES OF agent] [LINES OF experimental] [NODE ATTESTOR]: of the server at $port of $server_name (127.0.0.1), in
# $dir/agent.conf
agent_conf() {
    local trust="trust_bundle_path = \"$dir/bootstrap.pem\"" attestor='NodeAttestor "join_token" { plugin_data { } }'
    cat >"$dir/agent.conf" <<CONF
agent {
  trust_domain      = "example.org"
  server_address    = "${server_name:-127.0.0.1}"
  server_port       = "$port"
  data_dir          = "$dir/data"
  socket_path       = "$socket"
  log_level         = "debug"
  ${1:-$trust}
  experimental {
    sync_interval = "1s"
    ${2:-}
  }
}
plugins {
  ${3:-$attestor}
  KeyManager "disk" { plugin_data { directory = "$dir/data" } }
  WorkloadAttestor "unix" { plugin_data { } }
}
CONF
}

port=$(free_port)
socket="$dir/public/api.sock"
export SPIFFE_ENDPOINT_SOCKET="unix://$socket" SPIRE_SERVER_PRIVATE_SOCKET="$dir/server/api.sock"
mkdir -p "$dir/data"
chmod 0700 "$dir/data"

server=
# start_server [NAME]
start_server() {
    spire-server run -config "$dir/${1:-server}/server.conf" >>"$dir/${1:-server}.log" 2>&1 &
    server=$!
    started+=("$server")
    until_true 30 spire-server healthcheck -socketPath "$dir/${1:-server}/api.sock"
}

agent=
# run_agent BINARY [FLAGS...]
run_agent() {
    local binary=$1
    shift
    "$binary" run -config "$dir/agent.conf" "$@" >>"$dir/agent.log" 2>&1 &
    agent=$!
    started+=("$agent")
}
stop_agent() {
    kill "$agent"
    wait "$agent" || fail "$(basename "$joins") ends well"
    agent=
}

ids() { durward api fetch x509 -output json -timeout 5s | grep -o 'spiffe://example.org/[a-z0-9-]*' | sort -u; }
serves() { ids | grep -qx "spiffe://example.org/$1"; }
serves_not() { ! serves "$1"; }
entry() { spire-server entry create -parentID "${of_node:-spiffe://example.org/node}" -selector "unix:uid:$(id -u)" "$@" | sed -n 's/^Entry ID *: //p'; }
agents() { spire-server agent count | sed 's/[^0-9]//g'; }
