# Sourced by the interop scripts that need a whole Kubernetes: one node of version 1.34.4, etcd, the API server, controllers and
# scheduler, containerd and a kubelet, and an image of this durward.
#
# The script runs again in namespaces of its own for processes, mounts and network, where it has what a node has to itself: its
# ports, /run, /var/lib and /var/log. With its end everything that was started in it ends.
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"

k8s_version=1.34.4
k8s_cache=${XDG_CACHE_HOME:-$HOME/.cache}/durward/kubernetes-$k8s_version
node_ip=192.0.2.10
service_ip=10.96.0.1
image=docker.io/library/durward:0.1.0

# Minutes, and gigabytes of memory: once for each version.
build_kubernetes() {
    local name flags="-s -w -X k8s.io/component-base/version.gitVersion=v$k8s_version"
    mkdir -p "$k8s_cache"
    for name in kubelet kube-apiserver kube-controller-manager kube-scheduler kubectl; do
        [ -x "$k8s_cache/$name" ] || (
            cd "$root/tests/interop/kubernetes"
            GOFLAGS=-mod=readonly GOBIN="$k8s_cache" timeout 1500 nice go install -trimpath -ldflags "$flags" \
                "k8s.io/kubernetes/cmd/$name"
        )
    done
}

# What a kubelet sets for the whole machine.
machine_keys=(vm.overcommit_memory kernel.panic kernel.panic_on_oops)

# run_in_namespaces SCRIPT: this script again, and then nothing of it is left.
run_in_namespaces() {
    local key code=0 had_cgroups=
    declare -A kept
    for key in "${machine_keys[@]}"; do kept[$key]=$(sysctl -n "$key"); done
    compgen -G '/sys/fs/cgroup/*/kubepods' >/dev/null && had_cgroups=yes
    INTEROP_DIR=$dir unshare --mount --propagation private --net --pid --fork --kill-child --mount-proc bash "$1" || code=$?
    for key in "${!kept[@]}"; do sysctl -q -w "$key=${kept[$key]}" || true; done
    # The cgroups of the pods, whose processes are gone.
    [ -n "$had_cgroups" ] || find /sys/fs/cgroup/*/kubepods -depth -type d -exec rmdir {} + 2>/dev/null || true
    if [ "$code" -ne 0 ]; then
        [ -z "${KEEP:-}" ] || cp "$dir"/*.log "$dir"/*.txt "$KEEP" 2>/dev/null || true
    fi
    exit "$code"
}

if [ -z "${INTEROP_DIR:-}" ]; then
    [ "$(id -u)" = 0 ] || { echo "left out: a kubelet needs root"; exit 0; }
    build_kubernetes
    run_in_namespaces "$0"
fi

# ---- within the namespaces ------------------------------------------------------------------------------------------
k=$dir/k
export PATH="$k8s_cache:$PATH" KUBECONFIG=$k/admin.kubeconfig

started_at=$SECONDS
note() { printf '   %3d s  %s\n' "$((SECONDS - started_at))" "$*"; }

tell_cluster() {
    local code=$?
    [ "$code" = 0 ] || {
        echo "---- what the cluster says:"
        kubectl get pods -A -o wide
        kubectl get events -A --sort-by=.lastTimestamp | tail -n 15
        kubectl -n durward logs ds/durward --tail=400 | grep -v " audit: " | tail -n 25
        tail -n 5 "$dir/kubelet.log"
    } >&2 2>/dev/null || true
    exit "$code"
}
trap tell_cluster EXIT

# certificate NAME SUBJECT [ALTERNATIVE_NAMES]
certificate() {
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$k/$1.key" -out "$k/$1.csr" -subj "$2" 2>/dev/null
    openssl x509 -req -in "$k/$1.csr" -CA "$k/ca.pem" -CAkey "$k/ca.key" -CAcreateserial -days 2 -out "$k/$1.pem" -extfile <(
        printf 'keyUsage=digitalSignature\nextendedKeyUsage=clientAuth,serverAuth\n%s\n' "${3:+subjectAltName=$3}"
    ) 2>/dev/null
}

# kubeconfig NAME: of who has the certificate of that name.
kubeconfig() {
    cat >"$k/$1.kubeconfig" <<CONF
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:443", certificate-authority: $k/ca.pem}}]
users: [{name: u, user: {client-certificate: $k/$1.pem, client-key: $k/$1.key}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
CONF
}

make_certificates() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$k/ca.key" -out "$k/ca.pem" -days 2 \
        -subj /CN=kubernetes 2>/dev/null
    certificate apiserver /CN=kube-apiserver "DNS:kubernetes.default.svc,IP:127.0.0.1,IP:$service_ip"
    certificate node1 /O=system:nodes/CN=system:node:node1 "DNS:node1,IP:127.0.0.1,IP:$node_ip"
    certificate admin /O=system:masters/CN=admin
    certificate controllers /CN=system:kube-controller-manager
    certificate scheduler /CN=system:kube-scheduler
    openssl ecparam -name prime256v1 -genkey -noout -out "$k/sa.key"
    openssl ec -in "$k/sa.key" -pubout -out "$k/sa.pub" 2>/dev/null
    local name
    for name in node1 admin controllers scheduler; do kubeconfig "$name"; done
}

write_node_settings() {
    local socket=/run/containerd/containerd.sock
    write_containerd_conf "$k/containerd.toml" "$k" /run/containerd "$socket" local/pause:1
    cat >"$k/cni/10-pods.conflist" <<CONF
{"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipam":
 {"type": "host-local", "ranges": [[{"subnet": "198.51.100.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
CONF
    write_kubelet_conf "$k/kubelet.yaml" "$k" node1 "$socket" <<CONF
address: 0.0.0.0
port: 10250
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $k/ca.pem}
authorization: {mode: Webhook}
syncFrequency: 5s
CONF
}

# An image with this durward where the Dockerfile puts it and with the command that it gives, a shell, what is in
# `more_programs`, and what they need.
more_programs=()
make_image() {
    local program command programs=(/bin/sh /bin/sleep /bin/cat /bin/mv "${more_programs[@]}")
    mkdir -p "$k"/rootfs/{usr/bin,bin,tmp}
    strip -o "$k/rootfs/usr/bin/durward" "$durward"
    for program in "${programs[@]}"; do cp -L "$program" "$k/rootfs/bin/"; done
    for program in "$durward" "${programs[@]}"; do
        ldd "$program" | grep -o '/[^ ]*' | while read -r library; do cp -L --parents "$library" "$k/rootfs/"; done
    done
    mapfile -t command < <(sed -nE 's/^(ENTRYPOINT|CMD) //p' "$root/packaging/Dockerfile" |
        python3 -c 'import json, sys; [print(word) for line in sys.stdin for word in json.loads(line)]')
    python3 "$root/tests/interop/kubernetes/image.py" "$image" "$k/rootfs" "$k/image.tar" "${command[@]}"
    mkdir -p "$k/pause/bin" && cp -r "$k"/rootfs/{bin,lib*} "$k/pause/"
    python3 "$root/tests/interop/kubernetes/image.py" docker.io/local/pause:1 "$k/pause" "$k/pause.tar" /bin/sleep 100000
}

ctr() { command ctr -a /run/containerd/containerd.sock -n k8s.io "$@"; }

# start_process NAME COMMAND...: with its log in $dir/NAME.log
start_process() {
    local name=$1
    shift
    "$@" >"$dir/$name.log" 2>&1 &
}

start_control_plane() {
    start_process etcd etcd --data-dir "$k/etcd" --unsafe-no-fsync --listen-client-urls http://127.0.0.1:2379 \
        --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
    start_process apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --secure-port=443 \
        --advertise-address=$node_ip --endpoint-reconciler-type=none --service-cluster-ip-range=10.96.0.0/24 \
        --client-ca-file="$k/ca.pem" --tls-cert-file="$k/apiserver.pem" --tls-private-key-file="$k/apiserver.key" \
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$k/sa.pub" \
        --service-account-signing-key-file="$k/sa.key" --kubelet-client-certificate="$k/admin.pem" \
        --kubelet-client-key="$k/admin.key" --kubelet-certificate-authority="$k/ca.pem" \
        --kubelet-preferred-address-types=InternalIP --authorization-mode=Node,RBAC --allow-privileged=true
    until_true 120 kubectl get --raw /readyz
    note "the API server is ready"
    start_process controllers kube-controller-manager --kubeconfig "$k/controllers.kubeconfig" --leader-elect=false \
        --service-account-private-key-file="$k/sa.key" --root-ca-file="$k/ca.pem" --use-service-account-credentials=true \
        --bind-address=127.0.0.1
    start_process scheduler kube-scheduler --kubeconfig "$k/scheduler.kubeconfig" --leader-elect=false \
        --authentication-kubeconfig "$k/scheduler.kubeconfig" --bind-address=127.0.0.1
}

start_node() {
    start_process containerd containerd -c "$k/containerd.toml"
    until_true 30 ctr version
    ctr image import "$k/image.tar" >/dev/null
    ctr image import "$k/pause.tar" >/dev/null
    start_process kubelet kubelet --config "$k/kubelet.yaml" --hostname-override node1 --node-ip $node_ip \
        --kubeconfig "$k/node1.kubeconfig"
    until_true 90 kubectl wait --for=condition=Ready node/node1 --timeout=1s
    note "the node is ready"
}

# The cluster, up and ready.
start_cluster() {
    mkdir -p "$k"/{cni,manifests}
    chmod 0755 "$dir" "$k"
    mount --make-rshared /
    local at
    for at in /run /var/lib /var/log; do mount -t tmpfs -o mode=0755 tmpfs "$at"; done
    ip link set lo up
    ip addr add $node_ip/32 dev lo
    ip addr add $service_ip/32 dev lo
    make_certificates
    write_node_settings
    make_image
    start_control_plane
    start_node
}

# The agents of the manifest, and what comes of them.
agent_is() { [ "$(kubectl -n durward get pods -l app=durward -o jsonpath="{.items[*].status.containerStatuses[*].$1}")" = "$2" ]; }

# roll_out [SECONDS]: waits until the agents are those of the DaemonSet as it stands.
roll_out() { kubectl -n durward rollout status daemonset/durward --timeout="${1:-90}s" >/dev/null; }
