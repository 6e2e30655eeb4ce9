#!/usr/bin/env bash
# What an admin does at the real SPIRE Server 1.15.3, and what becomes of an agent: evicted, banned, known by a certificate
# whose key is on P-384 and whose CA is an intermediate, more entries than fit into one answer, both ways to ask for them, and
# an authority that is prepared, taken into use, tainted and revoked while a stream watches.
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"

# ends_with STATUS: the agent does.
ends_with() {
    local status=0
    wait "$agent" || status=$?
    agent=
    [ "$status" = "$1" ] || fail "the agent ends with $1, got $status"
}
token() { spire-server token generate -spiffeID spiffe://example.org/node | sed -n 's/^Token: //p'; }
agent_ids() { spire-server agent list -output json | grep -o '"path": *"/spire/agent/[^"]*"' | cut -d'"' -f4; }
attested() { [ "$(agents)" = 1 ]; }

# The node's certificate: root, intermediate, leaf on P-384.
(
    cd "$dir"
    ec() { openssl genpkey -algorithm EC -pkeyopt "ec_paramgen_curve:$1" -out "$2" 2>/dev/null; }
    ec P-256 root.key && ec P-256 middle.key && ec P-384 node.key
    openssl req -x509 -new -key root.key -days 2 -subj /CN=root -out root.pem
    openssl req -new -key middle.key -subj /CN=middle |
        openssl x509 -req -CA root.pem -CAkey root.key -CAcreateserial -days 2 -out middle.pem \
            -extfile <(printf 'basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign\n') 2>/dev/null
    openssl req -new -key node.key -subj /CN=node |
        openssl x509 -req -CA middle.pem -CAkey middle.key -CAcreateserial -days 2 -out node.pem \
            -extfile <(printf 'keyUsage=critical,digitalSignature\n') 2>/dev/null
)
server_conf server "$port" example.org "" "NodeAttestor \"x509pop\" { plugin_data { ca_bundle_path = \"$dir/root.pem\" } }"
start_server
spire-server bundle show >"$dir/bootstrap.pem"

# Evicted, it cannot attest again with a token that is used up; with another it can.
agent_conf
run_agent "$joins" -joinToken "$(token)"
entry -spiffeID spiffe://example.org/web >/dev/null
until_true 20 serves web
spire-server agent evict -spiffeID "spiffe://example.org$(agent_ids)" >/dev/null
ends_with 5
grep -q "spire-server token generate" "$dir/agent.log" || fail "it says what to do"
run_agent "$joins" -joinToken "$(token)"
until_true 20 serves web

# Banned.
spire-server agent ban -spiffeID "spiffe://example.org$(agent_ids)" >/dev/null
ends_with 5
grep -q "spire-server agent evict -spiffeID spiffe://example.org$(agent_ids)" "$dir/agent.log" || fail "it says what to do when banned"
spire-server agent evict -spiffeID "spiffe://example.org$(agent_ids)" >/dev/null

# Known by its certificate.
rm -rf "${dir:?}/data"/*
agent_conf "" "" "NodeAttestor \"x509pop\" { plugin_data {
    private_key_path = \"$dir/node.key\"
    certificate_path = \"$dir/node.pem\"
    intermediates_path = \"$dir/middle.pem\"
  } }"
run_agent "$joins"
until_true 20 attested
parent=$(agent_ids)
spire-server entry create -node -spiffeID spiffe://example.org/node -selector "x509pop:subject:cn:node" >/dev/null
until_true 20 serves web
# Evicted, it attests again by itself, and what it serves goes on.
spire-server agent evict -spiffeID "spiffe://example.org$parent" >/dev/null
until_true 30 attested
until_true 20 serves web
kill -0 "$agent" || fail "it goes on"

# More entries than fit into one answer, by revisions and all at once.
python3 - "$dir/many.json" "$(id -u)" <<'PYTHON'
import json, sys
entries = [{
    "parent_id": "spiffe://example.org/node", "spiffe_id": f"spiffe://example.org/many-{n}",
    "selectors": [{"type": "unix", "value": "uid:4000000000"}],
} for n in range(1200)]
json.dump({"entries": entries}, open(sys.argv[1], "w"))
PYTHON
spire-server entry create -data "$dir/many.json" >/dev/null
entry -spiffeID spiffe://example.org/last >/dev/null
until_true 30 serves last
stop_agent
sed -i 's/sync_interval = "1s"/sync_interval = "1s"\n    use_sync_authorized_entries = false/' "$dir/agent.conf"
run_agent "$joins"
until_true 30 serves last
id=$(entry -spiffeID spiffe://example.org/later)
until_true 30 serves later
spire-server entry delete -entryID "$id" >/dev/null
until_true 30 serves_not later

# The server's authority is replaced, and the old one tainted and revoked, while a stream watches.
durward api watch >"$dir/watched" 2>&1 &
watch=$!
started+=("$watch")
authority() { spire-server localauthority x509 "$@" -output json | grep -o '"authority_id": *"[^"]*"' | head -n 1 | cut -d'"' -f4; }
old=$(spire-server localauthority x509 show -output json | python3 -c 'import json, sys; print(json.load(sys.stdin)["active"]["authority_id"])')
new=$(authority prepare)
spire-server localauthority x509 activate -authorityID "$new" >/dev/null
spire-server localauthority x509 taint -authorityID "$old" >/dev/null
# The subject key of what signed is the authority's ID.
signed_by() {
    mkdir -p "$dir/fetched"
    durward api fetch x509 -silent -write "$dir/fetched" >/dev/null 2>&1 &&
        [ "$(openssl x509 -in "$dir/fetched/svid.0.pem" -noout -ext authorityKeyIdentifier | tail -n 1 | tr -d ' :' | tr 'A-F' 'a-f')" = "$1" ]
}
until_true 60 signed_by "$new"
spire-server localauthority x509 revoke -authorityID "$old" >/dev/null
bundle_is_one() { [ "$(durward api fetch x509 -silent -write "$dir/fetched" >/dev/null 2>&1; grep -c BEGIN "$dir/fetched/bundle.0.pem")" = 1 ]; }
until_true 60 bundle_is_one
serves web || fail "it serves with the new authority alone"
kill -0 "$watch" || fail "the stream lived through it: $(cat "$dir/watched")"
entry -spiffeID spiffe://example.org/after >/dev/null
until_true 30 serves after

# Banned, it ends, and so does another try to attest, until it is evicted.
spire-server agent ban -spiffeID "spiffe://example.org$parent" >/dev/null
ends_with 5
run_agent "$joins"
ends_with 5
spire-server agent evict -spiffeID "spiffe://example.org$parent" >/dev/null
run_agent "$joins"
until_true 30 serves web
stop_agent
echo "spire-admin: evicted, banned, tainted and revoked by the SPIRE Server $version"
