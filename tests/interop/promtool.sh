#!/usr/bin/env bash
# What a running agent's Prometheus endpoint says, judged by promtool, and the health endpoints by curl.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"
command -v promtool >/dev/null || fail "promtool is not installed (Debian: prometheus)"

socket="$dir/api.sock"
read -r metrics health < <(python3 - <<'PORTS'
import socket
held = [socket.socket() for _ in range(2)]
for s in held: s.bind(("127.0.0.1", 0))
print(*(s.getsockname()[1] for s in held))
PORTS
)
cat >"$dir/telemetry.conf" <<CONF
telemetry { 
  Prometheus { 
    host = "127.0.0.1"
    port = $metrics
  } 
}
health_checks {
  listener_enabled = true
  bind_address = "127.0.0.1"
  bind_port = "$health"
}
CONF
start_agent "$socket" "$dir/telemetry.conf"
"$durward" api fetch x509 -socketPath "$socket" -silent
"$durward" api fetch jwt -socketPath "$socket" -audience them >/dev/null

page() { curl --silent --show-error --fail --max-time 10 "http://127.0.0.1:$1"; }
# What the listener counts is shown after a second at most.
counted() { page "$metrics/metrics" | grep -q '^durward_connections_accepted_total [1-9]'; }
until_true 10 counted
page "$metrics/metrics" >"$dir/metrics.txt"
said=$(promtool check metrics <"$dir/metrics.txt" 2>&1) || fail "promtool: $said"
[ -z "$said" ] || fail "promtool: $said"
for series in 'durward_calls_total{method="FetchJWTSVID",code="OK"} [1-9]' 'durward_entries 2' \
    'durward_signing_duration_seconds_count{kind="x509"} [1-9]' 'durward_connections_accepted_total [1-9]' \
    'durward_attestation_duration_seconds_count{attestor="unix"} [1-9]' 'durward_rotation_due_seconds{kind="issuer"} [1-9]'; do
    grep -q "^$series" "$dir/metrics.txt" || { cat "$dir/metrics.txt" >&2; fail "no series $series"; }
done
[ "$(page "$health/live")" = '{"agent":{}}' ] || fail "live"
[ "$(page "$health/ready")" = '{"agent":{}}' ] || fail "ready"
echo "promtool: nothing to say about $(grep -c '^# TYPE' "$dir/metrics.txt") metrics"
