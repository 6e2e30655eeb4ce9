#!/usr/bin/env bash
# spire-agent 1.15.3 and Durward in turns at one SPIRE Server, asked for the same: what Durward tells by spire-agent's names,
# spire-agent tells too, with the same labels and of the same type.
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"

server_conf server "$port" example.org
start_server
spire-server bundle show >"$dir/bootstrap.pem"
agent_conf
metrics=$(free_port)
cp "$dir/agent.conf" "$dir/plain.conf"
first_token() { [ -s "$dir/data/agent-data.json" ] || echo "-joinToken $(spire-server token generate -spiffeID spiffe://example.org/node | sed -n 's/^Token: //p')"; }

# scrape BINARY [LINES OF telemetry]
scrape() {
    cat "$dir/plain.conf" - >"$dir/agent.conf" <<CONF
telemetry {
  Prometheus { host = "127.0.0.1" port = $metrics }
  EnableTrustDomainLabel = true
  ${2:-}
}
CONF
    # shellcheck disable=SC2046
    run_agent "$1" $(first_token)
    until_true 20 serves web
    durward api fetch jwt -audience a >/dev/null
    durward api watch >/dev/null 2>&1 &
    local watch=$!
    started+=("$watch")
    counted() { curl -sf "http://127.0.0.1:$metrics/" | grep -q '^spire_agent_workload_api_connections{[^}]*} 1$'; }
    until_true 20 counted
    curl -sf "http://127.0.0.1:$metrics/" | grep '^spire_agent_\|^# TYPE spire_agent_' >"$dir/$(basename "$1").text"
    kill "$watch"
    stop_agent
}

entry -spiffeID spiffe://example.org/web >/dev/null
scrape spire-agent
scrape "$joins" "spire_agent_names = true"
python3 - "$dir/spire-agent.text" "$dir/$(basename "$joins").text" <<'PYTHON'
import re, sys

def read(path):
    types, labels = {}, {}
    for line in open(path):
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            types[name] = kind
        else:
            name, inside = re.match(r'([a-z0-9_]+)(?:\{(.*)\})? ', line).groups()
            keys = {pair.split("=")[0] for pair in (inside or "").split(",")}
            labels.setdefault(name, set()).update(keys - {"quantile"})
    return types, labels

(theirs, their_labels), (ours, our_labels) = map(read, sys.argv[1:])
# What this agent did in its turn and spire-agent did not, or the other way round: of a node that is known by then.
wrong = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
unknown = sorted(set(ours) - set(theirs))
more = {name: keys - their_labels[name] for name, keys in our_labels.items() if name in their_labels and keys - their_labels[name]}
assert not wrong and not unknown and not more, (wrong, unknown, more)
assert len(ours) >= 15, ours
print("spire-metrics: %d of the %d series that spire-agent has, by its names" % (len(ours), len(theirs)))
PYTHON
