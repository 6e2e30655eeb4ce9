#!/usr/bin/env bash
# Two processes with our SVIDs speak mTLS with OpenSSL, across a rotation of the CA, without a failed handshake.
# The server keeps its SVID for longer than the client, so that each meets SVIDs of the old and of the new CA.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

socket="$dir/api.sock"
# The shortest that is allowed: half of it until the next CA is made, five sixths until it signs.
cat >"$dir/issuer.conf" <<'CONF'
issuer "embedded" {
  ca_ttl = "60s"
  default_x509_svid_ttl = "30s"
}
CONF
start_agent "$socket"
# OpenSSL refuses the path of a socket of 32 bytes and more.
cd "$dir"

# fetch NAME: svid.0.pem, svid.0.key and bundle.0.pem, as a workload that renews.
fetch() {
    mkdir -p "$dir/$1"
    timeout 10 "$durward" api fetch x509 -socketPath "$socket" -silent -write "$dir/$1" >/dev/null ||
        fail "the $1 gets its SVID"
}
signer() { openssl x509 -in "$dir/$1/svid.0.pem" -noout -ext authorityKeyIdentifier | tail -n 1 | tr -d ' '; }

server=
serve() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    rm -f "$dir/tls.sock"
    fetch server
    openssl s_server -unix tls.sock -quiet -tls1_3 -rev \
        -cert "$dir/server/svid.0.pem" -key "$dir/server/svid.0.key" -cert_chain "$dir/server/svid.0.pem" \
        -CAfile "$dir/server/bundle.0.pem" -Verify 3 -verify_return_error >"$dir/server.log" 2>&1 &
    server=$!
    started+=("$server")
    until_true 5 test -S "$dir/tls.sock"
}

# The server turns each line round, which it does only after it has verified the client.
handshake() {
    local answer
    answer=$( (echo hello; sleep 0.3) | timeout 10 openssl s_client -unix tls.sock -quiet -no_ign_eof -tls1_3 \
        -cert "$dir/client/svid.0.pem" -key "$dir/client/svid.0.key" \
        -CAfile "$dir/client/bundle.0.pem" -verify 3 -verify_return_error 2>"$dir/client.log") || true
    [ "$answer" = olleh ] || {
        cat "$dir/client.log" "$dir/server.log" >&2
        fail "handshake $count: server signed by $(signer server), client by $(signer client)"
    }
    count=$((count + 1))
    [ "$(signer server)" = "$(signer client)" ] || mixed=$((mixed + 1))
}

count=0 mixed=0
fetch client
serve
old=$(signer client)
[ "$(openssl x509 -in "$dir/client/svid.0.pem" -noout -ext subjectAltName | grep -c 'URI:spiffe://example.org/myservice')" = 1 ] ||
    fail "the SVID names the workload"
deadline=$((SECONDS + 150))
until [ "$(signer server)" != "$old" ] && [ "$(signer client)" != "$old" ]; do
    [ "$SECONDS" -lt "$deadline" ] || fail "the CA did not rotate"
    # Whichever of the two renews first after the rotation, it then meets the other's old SVID.
    if [ $((count % 10)) = 8 ] || [ "$mixed" -gt 4 ]; then serve; fi
    handshake
    fetch client
    handshake
done
for _ in 1 2 3; do
    fetch client
    handshake
done
[ "$mixed" -gt 0 ] || fail "no handshake between SVIDs of both CAs"

# What another CA signed is refused, or all of the above would prove nothing.
cp "$dir/federated.pem" "$dir/client/bundle.0.pem"
if (handshake) >/dev/null 2>&1; then fail "a server of a foreign CA is refused"; fi
echo "mTLS: $count handshakes over a CA rotation, $mixed of them between SVIDs of both CAs"
