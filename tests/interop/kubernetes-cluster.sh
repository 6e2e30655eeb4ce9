#!/usr/bin/env bash
# A whole Kubernetes (1.34.4) with the agent as the manifest has it: the commands of the README, and pods of every kind, each with the
# identity of its namespace and service account, or none.
#
# JOB_PODS is how many pods of a Job ask once each, quiet and in a storm (default: 12). Needs root, and Debian's etcd-server,
# containerd, runc and containernetworking-plugins.
source "$(dirname "${BASH_SOURCE[0]}")/cluster.bash"

start_cluster
manifests=$root/packaging/kubernetes

# The commands of the README, as they stand, where the repository is the working directory.
cd "$root"
mapfile -t commands < <(sed -n '/^### On Kubernetes/,/^##* [^O]/p' README.md | sed -n '/^```sh$/,/^```$/p' | grep -v '^```')
[ "${#commands[@]}" -ge 5 ] || fail "the README has the commands: ${commands[*]}"
for command in "${commands[@]}"; do eval "$command" >"$dir/said.txt" 2>&1 || fail "$command: $(cat "$dir/said.txt")"; done
grep -q 'spiffe://example.org/ns/shop/sa/web' "$dir/said.txt" || fail "the README's workload: $(cat "$dir/said.txt")"
note "the README's commands give an identity"
kubectl -n durward logs daemonset/durward >"$dir/said.txt"
for line in 'found: the agent runs in a pod' 'budget=268435456' 'the memory limit of its cgroup'; do
    grep -q "$line" "$dir/said.txt" || fail "the log says at the start: $line"
done
# The same, with the CSI driver in place of hostPath as the comment in it has it.
sed -e '/hostPath: {path/d' -e '/^ *- name: spiffe$/d' -e 's/^\( *\)# \(- name: spiffe\|  csi:\)/\1\2/' "$manifests/workload.yaml" >"$dir/csi.yaml"
grep -q '^ *csi: {driver' "$dir/csi.yaml" || fail "the CSI driver in workload.yaml: $(cat "$dir/csi.yaml")"
kubectl apply -f "$root/tests/interop/kubernetes/podmonitor.yaml" >/dev/null
kubectl wait --for=condition=Established crd/podmonitors.monitoring.coreos.com --timeout=30s >/dev/null
for file in "$manifests"/{daemonset,workload,network-policy,monitoring}.yaml "$dir/csi.yaml"; do
    until_true 10 kubectl apply --dry-run=server --validate=strict -f "$file"
done

# What pods are told by, from a ConfigMap that changes. No entry is for pods by their user, and all run as the same.
entries=$(
    for of in bank/web bank/ledger jobs/short; do
        printf 'entry "spiffe://example.org/ns/%s/sa/%s" { selectors = ["k8s:ns:%s", "k8s:sa:%s"] }\n' \
            "${of%/*}" "${of#*/}" "${of%/*}" "${of#*/}"
    done
    echo 'entry "spiffe://example.org/label/blue" { selectors = ["k8s:ns:labels", "k8s:pod-label:colour:blue"] }'
    for container in prepare main helper; do
        echo "entry \"spiffe://example.org/container/$container\" { selectors = [\"k8s:ns:parts\", \"k8s:container-name:$container\"] }"
    done
)
conf=$(kubectl -n durward get configmap durward -o jsonpath='{.data.agent\.conf}')
# change_conf TEXT: the ConfigMap's file.
change_conf() { kubectl -n durward create configmap durward --from-literal=agent.conf="$1" --dry-run=client -o yaml | kubectl replace -f - >/dev/null; }
entries+=$'\nentry "spiffe://example.org/team/gold" { selectors = ["k8s:ns-label:team:gold", "k8s:sa:web"] }'
kubectl create clusterrole durward-namespaces --verb=get --resource=namespaces >/dev/null
kubectl create clusterrolebinding durward-namespaces --clusterrole=durward-namespaces --serviceaccount=durward:durward >/dev/null
change_conf "$(sed 's/^ *plugin_data {/&\n enable_namespace_labels = true/' <<<"$conf")"$'\n'"$entries"

# pod NAME NAMESPACE SERVICE_ACCOUNT [MORE OF spec] [LABELS]: asks again and again, and prints what it is.
pod() {
    kubectl create namespace "$2" >/dev/null 2>&1 || true
    kubectl -n "$2" create serviceaccount "$3" >/dev/null 2>&1 || true
    kubectl apply -f - >/dev/null <<POD
apiVersion: v1
kind: Pod
metadata: {name: $1, namespace: $2, labels: {app: $1, ${5:-}}}
spec:
  serviceAccountName: $3
  terminationGracePeriodSeconds: 0
  securityContext: {runAsUser: 1000}
  ${4:-}
  containers:
  - name: main
    image: durward:0.1.0
    command: ["/bin/sh", "-c", "while :; do durward api fetch x509 -output json -timeout 20s; sleep 0.5; done"]
    env: &env [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///spiffe/api.sock"}]
    volumeMounts: &mounts [{name: spiffe, mountPath: /spiffe, readOnly: true}]
  volumes: [{name: spiffe, hostPath: {path: /run/durward/public, type: Directory}}]
POD
}
ids_of() { kubectl -n "$1" logs "$2" --tail=60 "${@:3}" | grep -o 'spiffe://example.org/[a-z0-9/-]*' | sort -u; }
is() { [ "$(ids_of "$2" "$3" "${@:4}")" = "spiffe://example.org/$1" ]; }

# Two tenants of one user; two service accounts of one tenant; labels; the node's PIDs and network.
pod web bank web
pod ledger bank ledger
pod blue labels plain "" "colour: blue"
pod red labels plain "" "colour: red"
pod both bank web "hostPID: true
  hostNetwork: true"
until_true 90 is ns/bank/sa/web bank web
note "a change of the ConfigMap is in force, and a pod has its identity"
until_true 60 is ns/bank/sa/ledger bank ledger
until_true 60 is label/blue labels blue
until_true 60 is ns/bank/sa/web bank both
# An init container asks before the others.
asks='image: "durward:0.1.0", env: [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///spiffe/api.sock"}], volumeMounts: [{name: spiffe, mountPath: /spiffe}]'
pod parts parts plain "initContainers: [{name: prepare, $asks, command: [durward, api, fetch, x509, -output, json, -timeout, 20s]}]"
until_true 60 is container/prepare parts parts -c prepare
until_true 60 is container/main parts parts -c main
is ns/shop/sa/web shop deployment/web || fail "shop's web: $(ids_of shop deployment/web)"
until_true 30 kubectl -n labels wait --for=condition=Ready pod/red --timeout=1s
kubectl -n labels exec red -- durward api fetch x509 >"$dir/said.txt" 2>&1 && fail "a red pod has an identity: $(cat "$dir/said.txt")"
grep -qi 'no identity issued' "$dir/said.txt" || fail "a red pod is denied: $(cat "$dir/said.txt")"
note "pods of each kind have the identity that is theirs, and one has none"

# By a label of the namespace, which comes later: the API server is asked again.
kubectl create namespace gold >/dev/null
pod web gold web
until_true 60 kubectl -n gold wait --for=condition=Ready pod/web --timeout=1s
[ -z "$(ids_of gold web)" ] || fail "no label, no identity: $(ids_of gold web)"
kubectl label namespace gold team=gold >/dev/null
until_true 60 is team/gold gold web
note "and by the label of a namespace"

# What is put into a running pod: kubectl exec, and an ephemeral container, which has a name of its own.
[[ $(kubectl -n bank exec ledger -- durward api fetch x509) == *spiffe://example.org/ns/bank/sa/ledger* ]] || fail "kubectl exec"
echo '{"env": [{"name": "SPIFFE_ENDPOINT_SOCKET", "value": "unix:///spiffe/api.sock"}],
  "volumeMounts": [{"name": "spiffe", "mountPath": "/spiffe"}]}' >"$dir/custom.json"
kubectl -n parts debug parts --image=durward:0.1.0 --container=helper --profile=general --custom="$dir/custom.json" -- \
    durward api fetch x509 -output json -timeout 20s >/dev/null 2>&1
until_true 60 is container/helper parts parts -c helper
note "kubectl exec and kubectl debug are in their pod"

# Pods that live for a moment: each is served at its first try.
job() { # job NAME
    kubectl create namespace jobs >/dev/null 2>&1 || true
    kubectl -n jobs create serviceaccount short >/dev/null 2>&1 || true
    kubectl apply -f - >/dev/null <<JOB
apiVersion: batch/v1
kind: Job
metadata: {name: $1, namespace: jobs}
spec:
  completions: ${JOB_PODS:-12}
  parallelism: 10
  backoffLimit: 0
  template:
    spec:
      serviceAccountName: short
      restartPolicy: Never
      containers:
      - name: once
        image: durward:0.1.0
        command: [durward, api, fetch, x509, -timeout, 30s]
        env: [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///spiffe/api.sock"}]
        volumeMounts: [{name: spiffe, mountPath: /spiffe}]
      volumes: [{name: spiffe, hostPath: {path: /run/durward/public, type: Directory}}]
JOB
    kubectl -n jobs wait --for=condition=complete "job/$1" --timeout=180s >/dev/null ||
        fail "each pod of a Job is served: $(kubectl -n jobs get pods; kubectl -n jobs logs -l "job-name=$1" --tail=3)"
}
job quiet
note "${JOB_PODS:-12} pods of a Job are each served at their first try"

# The same while a pod of nobody asks as fast as it can, in 4 loops.
pod storm storm plain
kubectl -n storm wait --for=condition=Ready pod/storm --timeout=60s >/dev/null
loop='while :; do durward api fetch x509; done >/dev/null 2>&1'
start_process storm kubectl -n storm exec storm -- /bin/sh -c "($loop) & ($loop) & ($loop) & $loop"
job stormy
[ "$(ids_of storm storm)" = "" ] || fail "the storm has an identity: $(ids_of storm storm)"
kubectl -n storm delete pod storm --wait=false >/dev/null
note "and as many in a storm"

# The kubelet was asked seldom, and no probe has failed.
asked=$(kubectl get --raw /api/v1/nodes/node1/proxy/metrics |
    awk '/^kubelet_http_requests_total/ && /path="pods"/ {n += $2} END {print n + 0}')
[ "$asked" -gt 0 ] && [ "$asked" -le $((4 * SECONDS)) ] || fail "requests to the kubelet: $asked in $SECONDS s"
agent_is restartCount 0 || fail "the agent was restarted"
agent_is ready true || fail "the agent is ready"
kubectl -n durward get events | grep -i unhealthy && fail "a probe failed"
note "the kubelet was asked $asked times, and no probe of the agent failed"

# update_loses_no_call OF: the next agent takes the place of the one that runs (maxSurge), while a pod calls and calls.
update_loses_no_call() {
    local calls=$dir/polite-$1.txt polite before
    more_than() { [ "$(grep -c ^answered "$calls")" -gt "$1" ]; }
    # shellcheck disable=SC2016
    kubectl -n bank exec ledger -- /bin/sh -c 'n=0; while [ $n -lt 2000 ]; do n=$((n + 1))
        said=$(durward api fetch jwt -audience a -timeout 20s 2>&1) && echo answered || echo "lost: $said"; done' >"$calls" 2>&1 &
    polite=$!
    until_true 60 more_than 10
    before=$(kubectl -n durward get pods -o name)
    kubectl -n durward rollout restart daemonset/durward >/dev/null
    kubectl -n durward rollout status daemonset/durward --timeout=120s >/dev/null ||
        fail "an update with maxSurge ends: $(kubectl -n durward get pods; kubectl -n durward logs -l app=durward --tail=20)"
    kubectl -n durward wait --for=delete "$before" --timeout=60s >/dev/null || fail "the one that has handed over ends"
    until_true 60 more_than "$(($(grep -c ^answered "$calls") + 10))"
    kill "$polite" && wait "$polite" 2>/dev/null || true
    [ "$(grep -vc ^answered "$calls")" = 0 ] || fail "an update loses no call ($1): $(grep -v ^answered "$calls" | head -n 3)"
    kubectl -n durward logs daemonset/durward >"$dir/said.txt" 2>/dev/null
    grep -q 'another agent has handed over' "$dir/said.txt" || fail "handed over ($1): $(cat "$dir/said.txt")"
    note "$(grep -c ^answered "$calls") calls during an update with maxSurge ($1), and none is lost"
}

# Another agent takes the place of this one: whoever has mounted the directory finds it, and who watches is told again.
update_loses_no_call embedded
served_again() { [[ $(kubectl -n bank exec ledger -- durward api fetch x509) == *spiffe://example.org/ns/bank/sa/ledger* ]]; }
until_true 30 served_again
kubectl -n shop get pods -o jsonpath='{.items[*].status.containerStatuses[*].restartCount}' | grep -qx 0 ||
    fail "the watching workload lives on"
note "an update of the agent is found by those who mount its directory"

# Who may do what: an agent beside the others, with the token of a service account of its own. get on nodes/pods is enough, and
# where there is nothing, the status says what is missing.
# beside NAME [RESOURCE [PLUGIN_DATA [ENTRY]]]: started, whether ready or not.
beside() {
    local plugin_data=${3:-"node_name = \"$node_ip\" kubelet_ca_path = \"$k/ca.pem\" token_path = \"$dir/$1/token\""}
    kubectl -n durward create serviceaccount "$1" >/dev/null
    if [ -n "${2:-}" ]; then
        kubectl create clusterrole "$1" --verb=get --resource="$2" >/dev/null
        kubectl create clusterrolebinding "$1" --clusterrole="$1" --serviceaccount="durward:$1" >/dev/null
    fi
    mkdir -p "$dir/$1"
    kubectl -n durward create token "$1" >"$dir/$1/token"
    cat >"$dir/$1/agent.conf" <<CONF
agent { trust_domain = "example.org" socket_path = "$dir/$1/api.sock" admin_socket_path = "$dir/$1-private/admin.sock" data_dir = "$dir/$1/data" }
plugins {
  WorkloadAttestor "k8s" { plugin_data { $plugin_data } }
}
issuer "embedded" { }
entry "spiffe://example.org/any" { selectors = ["k8s:ns:bank"] }
${4:-}
CONF
    mkdir -m 0700 "$dir/$1-private"
    start_process "$1-agent" "$durward" run -config "$dir/$1/agent.conf"
    until_true 20 "$durward" status -socketPath "$dir/$1-private/admin.sock"
}
ready_beside() { "$durward" healthcheck -socketPath "$dir/$1/api.sock"; }
# container_of NAMESPACE POD CONTAINER: its ID in the runtime.
container_of() {
    kubectl -n "$1" get pod "$2" -o jsonpath="{.status.containerStatuses[?(@.name=='$3')].containerID}" | sed 's#.*//##'
}
pid_of() { ctr task ls | awk -v id="$(container_of "$@")" '$1 == id {print $2}'; }
beside pods-alone nodes/pods
until_true 20 ready_beside pods-alone
beside nothing
# Before anybody has called.
refused_at_start() { [[ $("$durward" status -socketPath "$dir/nothing-private/admin.sock") == *'not ready: entry "spiffe://example.org/any" asks for k8s:ns:bank'* ]]; }
until_true 20 refused_at_start
ready_beside nothing >/dev/null 2>&1 && fail "an agent that can tell no pod is not ready"
"$durward" explain -socketPath "$dir/pods-alone-private/admin.sock" -pid "$(pid_of bank ledger main)" >"$dir/said.txt" 2>&1 || true
grep -q k8s:sa:ledger "$dir/said.txt" || fail "nodes/pods is enough: $(cat "$dir/said.txt" "$dir/pods-alone-agent.log")"
"$durward" explain -socketPath "$dir/nothing-private/admin.sock" -pid "$(pid_of bank ledger main)" >"$dir/said.txt" 2>&1 || true
"$durward" status -socketPath "$dir/nothing-private/admin.sock" >>"$dir/said.txt"
# Its lines are folded.
tr -s ' \n' ' ' <"$dir/said.txt" | grep -q 'Wrong:.*(403): allow its service account get on nodes/pods (before' ||
    fail "the status: $(cat "$dir/said.txt")"
note "get on nodes/pods is enough, and without it the status says so, and nothing is ready"

# The keys that nothing else here sets: what each does to what is known of a pod.
explained() { "$durward" explain -socketPath "$dir/$1-private/admin.sock" -pid "$(pid_of "$2" "$3" main)" >"$dir/said.txt" 2>&1 || true; }
by_token="node_name = \"$node_ip\" token_path = \"$dir/unverified/token\""
NODE_IP=$node_ip beside every-key nodes/pods,namespaces "node_name_env = \"NODE_IP\" kubelet_secure_port = 10250
    kubelet_ca_path = \"$k/ca.pem\" token_path = \"$dir/every-key/token\" reload_interval = \"1s\" max_poll_attempts = 20
    poll_retry_interval = \"100ms\" disable_container_selectors = true enable_namespace_labels = true
    api_server_address = \"$service_ip:443\" api_server_ca_path = \"$k/ca.pem\" api_server_token_path = \"$dir/every-key/token\"" \
    'entry "spiffe://example.org/team/gold" { selectors = ["k8s:ns-label:team:gold"] }'
explained every-key gold web
grep -q k8s:ns-label:team:gold "$dir/said.txt" || fail "with every key: $(cat "$dir/said.txt" "$dir/every-key-agent.log")"
grep -q k8s:container-name "$dir/said.txt" && fail "no containers: $(cat "$dir/said.txt")"
beside unverified nodes/pods "$by_token skip_kubelet_verification = true"
explained unverified bank ledger
grep -q k8s:sa:ledger "$dir/said.txt" || fail "a kubelet that is not verified: $(cat "$dir/said.txt")"
beside anonymous nodes/pods "$by_token kubelet_ca_path = \"$k/ca.pem\" use_anonymous_authentication = true"
explained anonymous bank ledger
grep -q '401' "$dir/said.txt" || fail "without a token: $(cat "$dir/said.txt")"
sed 's/plugin_data { .* true/plugin_data { disable_kubelet_client = true/' "$dir/unverified/agent.conf" >"$dir/without-kubelet.conf"
"$durward" validate -config "$dir/without-kubelet.conf" >"$dir/said.txt" 2>&1 && fail "an entry for pods without the kubelet is valid"
grep -q 'no k8s selector is available' "$dir/said.txt" || fail "without the kubelet: $(cat "$dir/said.txt")"
note "each key of the attestor does what it says"

# The selectors of spire-agent, for the same containers.
mkdir -p "$dir/peer"
psat="NodeAttestor \"k8s_psat\" { plugin_data { clusters = { lab = {
  service_account_allow_list = [\"durward:durward\"], kube_config_file = \"$KUBECONFIG\" } } } }"
server_conf server "$port" example.org "" "$psat"
sed -i 's/bind_address .*/bind_address = "0.0.0.0"/' "$dir/server/server.conf"
start_server
spire-server bundle show >"$dir/bootstrap.pem"
cat >"$dir/peer.conf" <<CONF
agent {
  trust_domain      = "example.org"
  server_address    = "127.0.0.1"
  server_port       = "$port"
  trust_bundle_path = "$dir/bootstrap.pem"
  data_dir          = "$dir/peer"
  socket_path       = "/run/durward/public/peer.sock"
  log_level         = "debug"
  join_token        = "$(spire-server token generate -spiffeID spiffe://example.org/node | sed -n 's/^Token: //p')"
}
plugins {
  NodeAttestor "join_token" { plugin_data { } }
  KeyManager "memory" { plugin_data { } }
  WorkloadAttestor "k8s" {
    plugin_data { enable_namespace_labels = true, kubelet_ca_path = "$k/ca.pem", certificate_path = "$k/admin.pem", private_key_path = "$k/admin.key" }
  }
}
CONF
# What it asks the API server with is where a pod has it.
mkdir -p /run/secrets/kubernetes.io/serviceaccount
cp "$k/ca.pem" /run/secrets/kubernetes.io/serviceaccount/ca.crt
kubectl -n durward create token durward >/run/secrets/kubernetes.io/serviceaccount/token
KUBERNETES_SERVICE_HOST=$service_ip KUBERNETES_SERVICE_PORT=443 start_process peer spire-agent run -config "$dir/peer.conf"
until_true 30 test -S /run/durward/public/peer.sock
for of in bank/web bank/ledger bank/both labels/blue parts/parts; do
    namespace=${of%/*} name=${of#*/}
    kubectl -n "$namespace" exec "$name" -c main -- durward api fetch x509 -socketPath /spiffe/peer.sock >/dev/null 2>&1 || true
    uid=$(kubectl -n "$namespace" get pod "$name" -o jsonpath='{.metadata.uid}')
    grep 'attested to have selectors' "$dir/peer.log" | grep "pod-uid:$uid" | tail -n 1 |
        grep -o 'value:\\"[^\\]*' | sed 's/.*"/k8s:/' | sort -u >"$dir/theirs.txt"
    kubectl -n durward exec daemonset/durward -- durward explain -pid "$(pid_of "$namespace" "$name" main)" -output json |
        python3 -c 'import json, sys; print(*json.load(sys.stdin)["selectors"], sep="\n")' | grep ^k8s: | sort -u >"$dir/ours.txt"
    [ -s "$dir/theirs.txt" ] || fail "spire-agent's selectors: $(tail -n 3 "$dir/peer.log")"
    diff "$dir/theirs.txt" "$dir/ours.txt" >"$dir/differ.txt" || fail "selectors of $of: $(cat "$dir/differ.txt")"
done
note "$(wc -l <"$dir/ours.txt") selectors of a pod are the same, line by line, as spire-agent's $version"

# With a SPIRE Server that asks the cluster who its agents are.
spire-server entry create -node -parentID spiffe://example.org/spire/server -spiffeID spiffe://example.org/cluster \
    -selector k8s_psat:cluster:lab >/dev/null
spire-server entry create -parentID spiffe://example.org/cluster -spiffeID spiffe://example.org/of-server/ledger \
    -selector k8s:ns:bank -selector k8s:sa:ledger >/dev/null
kubectl -n durward create configmap bundle --from-file="$dir/bootstrap.pem" >/dev/null
change_conf "agent {
  trust_domain = \"example.org\"
  server_address = \"$node_ip\"
  server_port = \"$port\"
  trust_bundle_path = \"/bundle/bootstrap.pem\"
  take_over = true
}
plugins {
  NodeAttestor \"k8s_psat\" { plugin_data { cluster = \"lab\" } }
  KeyManager \"memory\" { plugin_data { } }
  WorkloadAttestor \"k8s\" { plugin_data { } }
}
$(sed -n '/^health_checks/,/^}/p' <<<"$conf")"
kubectl -n durward patch daemonset durward --patch-file "$manifests/join-server.yaml" >/dev/null
roll_out
until_true 60 is of-server/ledger bank ledger
[[ $(spire-server agent list) == *spiffe://example.org/spire/agent/k8s_psat/lab/* ]] || fail "k8s_psat: $(spire-server agent list)"
note "and the same manifest joins a SPIRE Server by k8s_psat"

update_loses_no_call server
