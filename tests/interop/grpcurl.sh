#!/usr/bin/env bash
# grpcurl, which knows nothing of the Workload API but what reflection tells it; and an earlier one, which asks by the reflection of
# that time and puts the socket's path into :authority.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

tools=${INTEROP_TARGET:-$root/target/interop}/bin
if [ ! -x "$tools/grpcurl" ]; then
    GOBIN=$tools timeout 600 go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3
fi
if [ ! -x "$tools/grpcurl-1.8/grpcurl" ]; then
    GOBIN=$tools/grpcurl-1.8 timeout 600 go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.8.7
fi

socket="$dir/api.sock"
start_agent "$socket"
target=unix://$socket
call() { timeout 20 "$tools/grpcurl" -plaintext "$@"; }
header=(-H "workload.spiffe.io: true")

# As the README has it, for each of the two.
written() { grep -o "\`grpcurl -plaintext $1/run/durward/public/api.sock list\`" "$root/README.md" | tr -d '\`'; }
# form TOOL WHAT: runs it here.
form() {
    local words
    words=$(written "$2") || fail "the README has no grpcurl with $2"
    read -ra words <<<"${words//\/run\/durward\/public\/api.sock/$socket}"
    timeout 20 "$1" "${words[@]:1}"
}
services=$(form "$tools/grpcurl-1.8/grpcurl" '-unix ')
grep -qx SpiffeWorkloadAPI <<<"$services" || fail "the README's command for version 1.8, got: $services"
services=$(form "$tools/grpcurl" 'unix://')
for service in SpiffeWorkloadAPI grpc.health.v1.Health; do
    grep -qx "$service" <<<"$services" || fail "reflection lists $service, got: $services"
done
call "$target" describe SpiffeWorkloadAPI | grep -q 'rpc FetchJWTSVID' || fail "reflection describes the API"
call "$target" grpc.health.v1.Health/Check | grep -q SERVING || fail "health"

jwt=$(call "${header[@]}" -d '{"audience":["them"]}' "$target" SpiffeWorkloadAPI/FetchJWTSVID)
grep -q '"spiffeId": "spiffe://example.org/myservice"' <<<"$jwt" || fail "a JWT-SVID"
token=$(sed -n 's/.*"svid": "\(.*\)".*/\1/p' <<<"$jwt" | head -n 1)
call "${header[@]}" -d "{\"audience\":\"them\",\"svid\":\"$token\"}" "$target" SpiffeWorkloadAPI/ValidateJWTSVID |
    grep -q '"spiffeId": "spiffe://example.org/myservice' || fail "its validation"

# A stream sends at once and goes on; the deadline ends it.
x509=$(call -max-time 2 "${header[@]}" "$target" SpiffeWorkloadAPI/FetchX509SVID 2>"$dir/stream.err" || true)
grep -q '"hint": "myservice2"' <<<"$x509" || fail "X.509-SVIDs: $(cat "$dir/stream.err")"
grep -q 'DeadlineExceeded' "$dir/stream.err" || fail "the stream goes on: $(cat "$dir/stream.err")"

# refused CODE ARGUMENTS...
refused() {
    local code=$1 said
    shift
    if said=$(call "$@" 2>&1); then fail "refused with $code: $*"; fi
    grep -q "Code: $code" <<<"$said" || fail "$code expected, got: $said"
}
refused InvalidArgument -d '{"audience":["them"]}' "$target" SpiffeWorkloadAPI/FetchJWTSVID
refused InvalidArgument "${header[@]}" -d '{}' "$target" SpiffeWorkloadAPI/FetchJWTSVID
refused InvalidArgument "${header[@]}" -d '{"audience":["them"],"spiffeId":"nobody"}' "$target" SpiffeWorkloadAPI/FetchJWTSVID
refused PermissionDenied "${header[@]}" -d '{"audience":["them"],"spiffeId":"spiffe://example.org/other"}' "$target" \
    SpiffeWorkloadAPI/FetchJWTSVID

earlier() {
    timeout 20 "$tools/grpcurl-1.8/grpcurl" -plaintext -unix "${header[@]}" -d '{"audience":["them"]}' "$@" "$socket" \
        SpiffeWorkloadAPI/FetchJWTSVID | grep -q '"spiffeId": "spiffe://example.org/myservice"'
}
earlier || fail "a JWT-SVID for version 1.8"
earlier -authority 'outbound|8080||x' || fail "a JWT-SVID for version 1.8, by another authority"
kill "$agent"
wait "$agent" || true
"$durward" run -config "$dir/agent.conf" >>"$dir/agent.log" 2>&1 &
started+=("$!")
until_true 20 "$durward" healthcheck -socketPath "$socket"
earlier || fail "a JWT-SVID for version 1.8 after a restart"
echo "grpcurl, present and 1.8: listed, described and called by reflection"
