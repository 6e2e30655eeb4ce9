#!/usr/bin/env bash
# The real SPIRE Server 1.15.3, and Durward in the place of its agent: attestation with a join token, entries that come,
# change and go, a server that is killed, and spire-agent and Durward in turns on one data_dir.
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
mkdir "$dir/bin"
ln -s "$durward" "$dir/bin/durward"
ln -s "$cache/spire-server" "$cache/spire-agent" "$dir/bin/"
export PATH="$dir/bin:$PATH"

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
socket="$dir/public/api.sock"
export SPIFFE_ENDPOINT_SOCKET="unix://$socket" SPIRE_SERVER_PRIVATE_SOCKET="$dir/server/api.sock"
mkdir -p "$dir/server" "$dir/data"
chmod 0700 "$dir/data"
cat >"$dir/server/server.conf" <<CONF
server {
  bind_address = "127.0.0.1"
  bind_port    = "$port"
  socket_path  = "$dir/server/api.sock"
  trust_domain = "example.org"
  data_dir     = "$dir/server"
  log_level    = "DEBUG"
  ca_ttl       = "24h"
}
plugins {
  DataStore "sql" {
    plugin_data {
      database_type     = "sqlite3"
      connection_string = "$dir/server/datastore.sqlite3"
    }
  }
  KeyManager "disk" { plugin_data { keys_path = "$dir/server/keys.json" } }
  NodeAttestor "join_token" { plugin_data { } }
}
CONF
cat >"$dir/agent.conf" <<CONF
agent {
  trust_domain      = "example.org"
  server_address    = "127.0.0.1"
  server_port       = "$port"
  trust_bundle_path = "$dir/bootstrap.pem"
  data_dir          = "$dir/data"
  socket_path       = "$socket"
  log_level         = "debug"
  experimental { sync_interval = "1s" }
}
plugins {
  NodeAttestor "join_token" { plugin_data { } }
  KeyManager "disk" { plugin_data { directory = "$dir/data" } }
  WorkloadAttestor "unix" { plugin_data { } }
}
CONF

server=
start_server() {
    spire-server run -config "$dir/server/server.conf" >>"$dir/server.log" 2>&1 &
    server=$!
    started+=("$server")
    until_true 30 spire-server healthcheck
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
entry() { spire-server entry create -parentID spiffe://example.org/node -selector "unix:uid:$(id -u)" "$@" | sed -n 's/^Entry ID *: //p'; }
agents() { spire-server agent count | sed 's/[^0-9]//g'; }

start_server

# The five commands of the README, as they stand, with its agent.conf in the working directory.
cd "$dir"
mapfile -t commands < <(sed -n '/^### With a SPIRE Server/,/^### Coming/p' "$root/README.md" |
    sed -n '/^```sh$/,/^```$/p' | grep -v '^```')
[ "${#commands[@]}" = 5 ] || fail "the README has five commands, got ${#commands[@]}: ${commands[*]}"
for command in "${commands[@]}"; do
    case $command in
    "durward run"*)
        eval "${command/#durward/$joins}" >>"$dir/agent.log" 2>&1
        agent=$!
        started+=("$agent")
        ;;
    "durward api"*) until_true 20 eval "$command" ;;
    *) eval "$command" ;;
    esac
done
serves web || fail "the README's workload"
token=$(durward api fetch jwt -audience them -output json | grep -o '"svid": *"[^"]*"' | head -n 1 | cut -d'"' -f4)
durward api validate jwt -audience them -svid "$token" >/dev/null || fail "a JWT-SVID of the server"

# Entries come, change and go.
id=$(entry -spiffeID spiffe://example.org/second)
until_true 15 serves second
spire-server entry update -entryID "$id" -parentID spiffe://example.org/node -spiffeID spiffe://example.org/changed \
    -selector "unix:uid:$(id -u)" >/dev/null
until_true 15 serves changed
until_true 15 serves_not second
spire-server entry delete -entryID "$id" >/dev/null
until_true 15 serves_not changed
serves web || fail "the other entry stays"

# Without its server it serves what it has, and with it again what is new.
kill -KILL "$server"
wait "$server" || true
serves web || fail "an SVID while the server is away"
start_server
entry -spiffeID spiffe://example.org/third >/dev/null
until_true 60 serves third

# In turns on one data_dir, with a token that was used up long ago.
[ "$(agents)" = 1 ] || fail "one agent, got $(agents)"
stop_agent
for binary in spire-agent "$joins" spire-agent "$joins"; do
    run_agent "$binary"
    until_true 20 serves web
    until_true 20 serves third
    stop_agent
done
[ "$(agents)" = 1 ] || fail "still one agent, got $(agents)"

# With an SVID on the disk and without a server, Durward is there all the same.
kill "$server"
wait "$server" || true
if [ "$(basename "$joins")" = durward ]; then
    run_agent "$joins"
    until_true 10 test -S "$socket"
    [ "$(durward api fetch x509 -timeout 2s >/dev/null 2>&1; echo $?)" != 3 ] || fail "unavailable is no denial"
    stop_agent
fi
echo "spire: attested, followed and signed for by the SPIRE Server $version, in turns with its own agent on one data_dir"
