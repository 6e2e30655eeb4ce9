#!/usr/bin/env bash
# A storm in pods: four pods of many workers, all of one user, call FetchJWTSVID on a new connection each as fast as they can,
# and two polite pods, one of the same user and one of another, call twenty times a second meanwhile. A table of what these saw,
# alone, in the storm, and beside as many processes that use as much of the processors without calling, with the agent of the
# manifest in as much memory as it is given.
#
# STORM_SECONDS is for how long (default 60), STORM_WORKERS and STORM_MIB how many workers a pod has and how much memory the agent
# (default: 100 and 300, 24 and 64). Needs what kubernetes-cluster.sh needs, and `cargo build --bench abuse`, whose callers these are.
source "$(dirname "${BASH_SOURCE[0]}")/../cluster.bash"

callers=$(find "$root/target/debug/deps" -maxdepth 1 -name 'abuse-*' -perm -u+x -type f -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d' ' -f2)
[ -n "$callers" ] || fail "run 'cargo build --bench abuse' first"
strip -o "$dir/callers" "$callers"
more_programs=("$dir/callers")
seconds=${STORM_SECONDS:-60}
start_cluster
manifests=$root/packaging/kubernetes
kubectl apply -f "$manifests/daemonset.yaml" >/dev/null
conf=$(kubectl -n durward get configmap durward -o jsonpath='{.data.agent\.conf}')
entries=$(for of in storm same other; do
    echo "entry \"spiffe://example.org/$of\" { selectors = [\"k8s:ns:storm\", \"k8s:pod-label:of:$of\"] }"
done)
kubectl -n durward create configmap durward --from-literal=agent.conf="$conf"$'\n'"$entries" --dry-run=client -o yaml | kubectl replace -f - >/dev/null

# pod NAME OF USER
pod() {
    kubectl apply -f - >/dev/null <<POD
apiVersion: v1
kind: Pod
metadata: {name: $1, namespace: storm, labels: {of: $2}}
spec:
  terminationGracePeriodSeconds: 0
  securityContext: {runAsUser: $3}
  containers:
  - name: main
    image: durward:0.1.0
    command: ["/bin/sleep", "100000"]
    volumeMounts: [{name: spiffe, mountPath: /spiffe, readOnly: true}]
  volumes: [{name: spiffe, hostPath: {path: /run/durward/public, type: Directory}}]
POD
}
roll_out
kubectl create namespace storm >/dev/null
until_true 30 kubectl -n storm get serviceaccount default
for nth in 1 2 3 4; do pod "storm-$nth" storm 1000; done
pod same same 1000
pod other other 2000
kubectl -n storm wait --for=condition=Ready pod --all --timeout=90s >/dev/null

# part ROLE [NUMBER]: what the callers are told, as JSON.
part() { printf '{"role":%s,"socket":"/spiffe/api.sock","until":{"secs":%d,"nanos":0},"number":%d,"nth":0}' "$1" "$until" "${2:-0}"; }
# polite FILE: both polite pods, to the end; what each saw stands in FILE.same and FILE.other.
polite() {
    local of pids=()
    for of in same other; do
        kubectl -n storm exec "$of" -- /bin/sh -c "DURWARD_ABUSE_PART='$(part '{"Polite":"Waiting"}')' callers" >"$dir/$1.$of" 2>&1 &
        pids+=("$!")
    done
    wait "${pids[@]}"
}
stormers=()
storm() { # storm WORKERS ROLE [NUMBER]
    local nth
    stormers=()
    for nth in 1 2 3 4; do
        kubectl -n storm exec "storm-$nth" -- /bin/sh -c "i=0; while [ \$i -lt $1 ]; do
            DURWARD_ABUSE_PART='$(part "$2" "${3:-0}")' callers >/dev/null 2>&1 & i=\$((i+1)); done; wait" >/dev/null 2>&1 &
        stormers+=("$!")
    done
}
charged() { # of the agent's pod, at most, in MiB
    local uid
    uid=$(kubectl -n durward get pods -l app=durward -o jsonpath='{.items[0].metadata.uid}')
    cat /sys/fs/cgroup/memory/kubepods/burstable/pod"$uid"/memory.max_usage_in_bytes 2>/dev/null | awk '{printf "%.1f", $1 / 1048576}'
}
used() { # by the four pods, in microseconds of processor time
    local nth of
    for nth in 1 2 3 4; do
        of=$(kubectl -n storm get pod "storm-$nth" -o jsonpath='{.metadata.uid}')
        cat /sys/fs/cgroup/cpuacct/kubepods/besteffort/pod"$of"/cpuacct.usage
    done | awk '{sum += $1} END {printf "%d", sum / 1000}'
}
unhealthy() { kubectl -n durward get events | grep -ci unhealthy || true; }
# row FIGURES..: of both polite pods.
row() {
    python3 - "$dir" "$@" <<'ROW'
import json, sys
at, workers, mib, restarts, unhealthy, charged = sys.argv[1:]
bad = restarts.strip() != "0" or unhealthy != "0"
for of, user in (("same", "the same user"), ("other", "another user")):
    quiet, seen, beside = (json.loads(open(f"{at}/{name}.{of}").read().splitlines()[-1]) for name in ("quiet", "storm", "beside"))
    ratio, of_beside = (seen["p99"] / max(it["p99"], 1) for it in (quiet, beside))
    bad = bad or seen["answered"] != seen["asked"]
    print(f"| 4 of {workers} | {mib} | {user} | {seen['answered']} of {seen['asked']} | {quiet['p50']/1e3:.1f} / {quiet['p99']/1e3:.1f} "
          f"| {seen['p50']/1e3:.1f} / {seen['p99']/1e3:.1f} | {ratio:.2f} | {beside['p50']/1e3:.1f} / {beside['p99']/1e3:.1f} | {of_beside:.2f} | {charged} | {restarts} | {unhealthy} | {'; '.join(seen['failures'])}")
sys.exit(bad)
ROW
}
bad=
echo '| workers | MiB | polite pod of | answered | quiet p50 / p99, ms | storm p50 / p99, ms | ratio | beside as busy processes, ms | ratio | charged, MiB | restarts | failed probes |'
echo '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |'
for mib in ${STORM_MIB:-24 64}; do
    kubectl -n durward patch daemonset durward -p '{"spec": {"template": {"spec": {"containers": [{"name": "durward", "resources":
      {"requests": {"cpu": "100m", "memory": "16Mi"}, "limits": {"memory": "'"$mib"'Mi"}}}]}}}}' >/dev/null
    roll_out
    until_true 60 kubectl -n storm exec same -- durward api fetch x509 -socketPath /spiffe/api.sock
    for workers in ${STORM_WORKERS:-100 300}; do
        until=$(($(date +%s) + seconds / 2))
        polite quiet
        until=$(($(date +%s) + seconds + 5))
        before=$(unhealthy) had=$(used)
        storm "$workers" '"Storm"'
        sleep 3
        polite storm
        wait "${stormers[@]}" || true
        busy=$((($(used) - had) / (seconds + 5) / (4 * workers)))
        sleep 5
        until=$(($(date +%s) + seconds / 2 + 5))
        storm "$workers" '"Burn"' "$busy"
        sleep 3
        polite beside
        wait "${stormers[@]}" || true
        sleep 2
        row "$workers" "$mib" "$(kubectl -n durward get pods -l app=durward -o jsonpath='{.items[*].status.containerStatuses[*].restartCount}')" \
            "$(($(unhealthy) - before))" "$(charged)" || bad=yes
        kubectl -n durward exec daemonset/durward -- durward limits >"$dir/limits-$mib-$workers.txt" 2>&1 || true
        kubectl -n durward logs daemonset/durward --tail=40 2>/dev/null | grep -v ' audit: ' >"$dir/said-$mib-$workers.txt" || true
    done
done
[ -z "${KEEP:-}" ] || cp "$dir"/limits-* "$dir"/said-* "$KEEP"
[ -z "$bad" ] || fail "a polite call was lost, the agent was restarted, or a probe failed"
