#!/usr/bin/env bash
# The tests inside the published package of the Rust `spiffe` crate, against the agent: X509Source, JwtSource and the
# Workload API client. The version is the one in Cargo.lock, so that it is fetched and checked like any dependency.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

# One of its tests has this path in it.
socket=/tmp/spire-agent/public/api.sock
if "$durward" healthcheck -socketPath "$socket" >/dev/null 2>&1; then fail "an agent serves $socket already"; fi
mkdir -p "$(dirname "$socket")"

cargo fetch --locked --manifest-path "$root/Cargo.toml" >/dev/null
package=$(cargo metadata --format-version 1 --locked --offline --manifest-path "$root/Cargo.toml" |
    python3 -c 'import json, os, sys
for p in json.load(sys.stdin)["packages"]:
    if p["name"] == "spiffe": print(os.path.dirname(p["manifest_path"]))')
[ -d "$package/tests" ] || fail "the package of spiffe has no tests: $package"
cp -r "$package" "$dir/spiffe"
echo "testing with $(basename "$package")"

start_agent "$socket"

# Its tests of signatures bring OpenSSL in source; the system's saves minutes.
export OPENSSL_NO_VENDOR=1 CARGO_PROFILE_DEV_DEBUG=0 CARGO_PROFILE_TEST_DEBUG=0
export CARGO_TARGET_DIR=${INTEROP_TARGET:-$root/target/interop}
cd "$dir/spiffe"
tests=$(timeout 1200 cargo test --locked --features x509-source,jwt-source,workload-api \
    --test workload_api_client --test x509_source --test jwt_source -- --ignored --test-threads 4 2>&1) || {
    echo "$tests"
    fail "the tests of the spiffe crate"
}
echo "$tests" | grep -E '^test result|^test .* FAILED'
ran=$(echo "$tests" | awk '/^test result: ok\./ { sum += $4 } END { print sum + 0 }')
[ "$ran" -ge 60 ] || fail "only $ran tests ran"
echo "$ran tests of the spiffe crate passed"
