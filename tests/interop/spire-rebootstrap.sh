#!/usr/bin/env bash
# A real SPIRE Server 1.15.3 that begins anew with other roots: a node that may trust anew, and can attest again, serves what it
# has until its source of trust has the new roots, and then what the new server says. Its key is on P-521.
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"

attested() { [ "$(agents)" = 1 ]; }
register() {
    spire-server entry create -node -spiffeID spiffe://example.org/node -selector x509pop:subject:cn:node >/dev/null
    entry -spiffeID "spiffe://example.org/$1" >/dev/null
}

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-521 -nodes -days 2 -keyout "$dir/node.key" -out "$dir/node.pem" \
    -subj /CN=node -addext keyUsage=digitalSignature 2>/dev/null
server_conf server "$port" example.org "" "NodeAttestor \"x509pop\" { plugin_data { ca_bundle_path = \"$dir/node.pem\" } }"
start_server
spire-server bundle show >"$dir/bootstrap.pem"
agent_conf "trust_bundle_path = \"$dir/bootstrap.pem\"
  rebootstrap_mode = \"auto\"
  rebootstrap_delay = \"3s\"" "" "NodeAttestor \"x509pop\" { plugin_data {
    private_key_path = \"$dir/node.key\"
    certificate_path = \"$dir/node.pem\"
  } }"
run_agent "$joins"
until_true 20 attested
register old
until_true 20 serves old

kill "$server"
wait "$server" || true
rm -rf "${dir:?}/server"/{datastore.sqlite3*,keys.json,journal.pem}
start_server
register fresh
unknown() { grep -q "signed by an unknown authority" "$dir/agent.log"; }
until_true 20 unknown
serves old || fail "what it has is served while the server is not believed"
spire-server bundle show >"$dir/bootstrap.pem.new"
mv "$dir/bootstrap.pem.new" "$dir/bootstrap.pem"
until_true 60 serves fresh
serves_not old || fail "what the server does not know is not served"
grep -q "trust in the server is begun anew.* old_roots=.* new_roots=" "$dir/agent.log" || fail "it says that trust is begun anew"
stop_agent
echo "spire-rebootstrap: another authority of the SPIRE Server $version was believed when its source of trust had it"
