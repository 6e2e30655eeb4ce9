#!/usr/bin/env bash
# A quarter of an hour at the real SPIRE Server 1.15.3 with SVIDs of 30 seconds and a CA of 3 minutes: spire-agent, then Durward on
# the same data_dir, then two minutes without a server, and some more with it. What go-spiffe, py-spiffe and the spiffe crate are
# given has never expired, no handshake fails, and nobody's SVID is out of date but while there is no server to renew it.
#
# PART is how many seconds each of the parts with a server lasts (default: 180), and AWAY the one without (120).
source "$(dirname "${BASH_SOURCE[0]}")/../spire.bash"

part=${PART:-180}
away=${AWAY:-120}
(cd "$root/tests/interop/go" && timeout 900 go build -mod=readonly -o "$dir/quarter-bin" ./quarter)
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "spiffe==0.3.2"
(cd "$root" && timeout 1200 cargo build --quiet --locked --example rust_quarter)
rust_client=${CARGO_TARGET_DIR:-$root/target}/debug/examples/rust_quarter
(
    cd "$dir"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout root.key -out root.pem -subj /CN=root 2>/dev/null
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout node.key -subj /CN=node 2>/dev/null |
        openssl x509 -req -CA root.pem -CAkey root.key -CAcreateserial -days 2 -out node.pem \
            -extfile <(printf 'keyUsage=critical,digitalSignature\n') 2>/dev/null
)
server_conf server "$port" example.org 'default_x509_svid_ttl = "30s" agent_ttl = "30s"' \
    "NodeAttestor \"x509pop\" { plugin_data { ca_bundle_path = \"$dir/root.pem\" } }"
sed -i 's/ca_ttl .*/ca_ttl = "3m"/' "$dir/server/server.conf"
start_server
spire-server bundle show >"$dir/bootstrap.pem"
# The server's authorities may be others by the time that it is back.
agent_conf "trust_bundle_path = \"$dir/bootstrap.pem\" rebootstrap_mode = \"auto\" rebootstrap_delay = \"5s\"" "" \
    "NodeAttestor \"x509pop\" { plugin_data { private_key_path = \"$dir/node.key\" certificate_path = \"$dir/node.pem\" } }"
spire-server entry create -node -spiffeID spiffe://example.org/node -selector x509pop:subject:cn:node >/dev/null
entry -spiffeID spiffe://example.org/web >/dev/null

run_agent spire-agent
until_true 60 serves web
"$dir/quarter-bin" "$socket" "$dir/away" >"$dir/go.seen" 2>&1 &
go=$!
"$dir/venv/bin/python" "$root/tests/interop/py_quarter.py" >"$dir/py.seen" 2>&1 &
python=$!
"$rust_client" "$socket" "$dir/away" >"$dir/rust.seen" 2>&1 &
rust=$!
started+=("$go" "$python" "$rust")
up() { grep -qx up "$dir/go.seen" && grep -qx up "$dir/rust.seen"; }
until_true 100 up

# go_on SECONDS: none of the three ends meanwhile.
go_on() {
    local until=$((SECONDS + $1))
    while [ "$SECONDS" -lt "$until" ]; do
        kill -0 "$go" && kill -0 "$python" && kill -0 "$rust" ||
            fail "a client ended: $(cat "$dir"/{go,py,rust}.seen)"
        sleep 1
    done
}
echo "$(date +%T) spire-agent"
go_on "$part"
echo "$(date +%T) Durward in its place"
stop_agent
run_agent "$joins"
go_on "$part"
go_on "$part"
echo "$(date +%T) no server"
touch "$dir/away"
kill "$server"
wait "$server" || true
go_on "$away"
start_server
spire-server bundle show >"$dir/bootstrap.pem"
echo "$(date +%T) a server"
until_true 60 serves web
echo "$(date +%T) served again"
# Clients ask again after up to half a minute.
sleep 35
rm "$dir/away"
go_on "$part"
kill "$go" "$python" "$rust"
wait "$go" || fail "go-spiffe: $(cat "$dir/go.seen")"
wait "$python" || fail "py-spiffe: $(cat "$dir/py.seen")"
wait "$rust" || fail "the spiffe crate: $(cat "$dir/rust.seen")"
tail -n 1 "$dir"/{go,py,rust}.seen
stop_agent
echo "spire-quarter: spire-agent and Durward in turns, with and without the SPIRE Server $version"
