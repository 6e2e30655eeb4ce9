#!/usr/bin/env bash
# A node that the real SPIRE Server 1.15.3 knows by the SVID that another agent of the node gives it: spire-agent first, then Durward.
# And an availability_target, with SVIDs that live long enough for it.
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"

server_conf server "$port" example.org 'default_x509_svid_ttl = "73h"' \
    'NodeAttestor "x509pop" { plugin_data { mode = "spiffe" } }'
sed -i 's/ca_ttl .*/ca_ttl = "480h"/' "$dir/server/server.conf"
start_server
spire-server bundle show >"$dir/bootstrap.pem"

# The other agent, joined with a token: it gives this user an identity that the server takes for a node's.
mkdir -m 0700 "$dir/other"
agent_conf
sed "s#$dir/data#$dir/other#; s#$socket#$dir/other-api/api.sock#" "$dir/agent.conf" >"$dir/other.conf"
# other BINARY: runs it.
other=
other() {
    if [ -n "$other" ]; then
        kill "$other"
        wait "$other" || fail "the other agent ends well"
    fi
    "$1" run -config "$dir/other.conf" "${@:2}" >>"$dir/other.log" 2>&1 &
    other=$!
    started+=("$other")
}
other spire-agent -joinToken "$(spire-server token generate -spiffeID spiffe://example.org/other | sed -n 's/^Token: //p')"
spire-server entry create -parentID spiffe://example.org/other -selector "unix:uid:$(id -u)" \
    -spiffeID spiffe://example.org/spire-exchange/rack/7 >/dev/null
exchanged() { durward api fetch x509 -socketPath "$dir/other-api/api.sock" -output json | grep -q spire-exchange; }
until_true 40 exchanged

agent_conf "trust_bundle_spiffe_workload_api = \"unix://$dir/other-api/api.sock\" availability_target = \"60h\"" "" \
    "NodeAttestor \"x509pop\" { plugin_data { spiffe_endpoint_socket = \"unix://$dir/other-api/api.sock\" } }"
run_agent "$joins"
known() { spire-server agent list -output json | grep -q '"path": *"/spire/agent/x509pop/rack/7"'; }
until_true 40 known
of_node=spiffe://example.org/spire/agent/x509pop/rack/7
entry -spiffeID spiffe://example.org/web >/dev/null
until_true 20 serves web

# From one of its own kind as well, and again when the server has forgotten it.
other "$joins"
until_true 40 exchanged
spire-server agent evict -spiffeID spiffe://example.org/spire/agent/x509pop/rack/7 >/dev/null
until_true 60 known
until_true 20 serves web
kill -0 "$agent" || fail "it goes on"
# 73 hours, of which 60 are to be left.
left=$(durward api fetch x509 -output json | python3 -c '
import base64, json, subprocess, sys
svid = base64.b64decode(json.load(sys.stdin)["svids"][0]["x509_svid"])
print(subprocess.run(["openssl", "x509", "-inform", "DER", "-noout", "-checkend", str(72 * 3600)], input=svid).returncode)' | tail -n 1)
[ "$left" = 0 ] || fail "an SVID of 73 hours"
if grep -q "isn't long enough to guarantee" "$dir/agent.log"; then fail "60 hours of 73 can be guaranteed"; fi
stop_agent
sed -i 's/availability_target = "60h"/availability_target = "62h"/' "$dir/agent.conf"
run_agent "$joins"
too_short() { grep -q "isn't long enough to guarantee the availability_target" "$dir/agent.log"; }
until_true 40 too_short
stop_agent
echo "spire-x509pop: attested to the SPIRE Server $version by the SVID of another Workload API"
