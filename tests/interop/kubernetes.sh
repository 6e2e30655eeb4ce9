#!/usr/bin/env bash
# A real kubelet (Kubernetes 1.34.4) with a real containerd, and pods of two tenants that run as one user: each has the
# identity of its namespace and labels.
#
# The kubelet runs alone, with static pods, which have no service account. Needs root, and Debian's containerd and runc.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

[ "$(id -u)" = 0 ] || { echo "left out: a kubelet needs root"; exit 0; }
version=1.34.4
cache=${XDG_CACHE_HOME:-$HOME/.cache}/durward/kubernetes-$version
if [ ! -x "$cache/kubelet" ]; then
    # Minutes, and gigabytes of memory: once for each version.
    mkdir -p "$cache"
    (
        cd "$root/tests/interop/kubernetes"
        flags="-s -w -X k8s.io/component-base/version.gitVersion=v$version"
        GOFLAGS=-mod=readonly GOBIN="$cache" timeout 2100 nice go install -trimpath -ldflags "$flags" \
            k8s.io/kubernetes/cmd/kubelet
    )
fi

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
secure=$(free_port)
open=$(free_port)
health=$(free_port)
# The sockets of containerd are at most 107 bytes long, and its mounts are undone below.
k=$dir/k
mkdir -p "$k"/{etc,manifests,pods,out} "$dir/public" "$dir/image/bin"

# What the kubelet sets for the whole machine.
declare -A kept
for key in vm.overcommit_memory kernel.panic kernel.panic_on_oops; do kept[$key]=$(sysctl -n "$key"); done

ctr() { command ctr -a "$k/containerd.sock" -n k8s.io "$@"; }
kubelet=
containerd=
end_cluster() {
    [ -z "$kubelet" ] || { kill "$kubelet" && wait "$kubelet" || true; }
    if [ -n "$containerd" ]; then
        local task
        for task in $(ctr task ls -q); do ctr task kill -s 9 "$task" || true; done
        sleep 1
        for task in $(ctr task ls -q); do ctr task rm -f "$task" || true; done
        kill "$containerd" && wait "$containerd" || true
    fi
    local at
    for at in $(awk '{print $5}' /proc/self/mountinfo | grep "^$dir/" | sort -r); do umount "$at" || true; done
    for key in "${!kept[@]}"; do sysctl -q -w "$key=${kept[$key]}" || true; done
} >/dev/null 2>&1
finish_all() {
    local code=$?
    if [ "$code" -ne 0 ]; then tail -n 15 "$dir"/containerd.log "$dir"/kubelet.log >&2 2>/dev/null || true; [ -z "${KEEP:-}" ] || { cp "$dir"/*.log "$KEEP"; ctr container ls >"$KEEP/containers"; ls -lR "$k/out" "$k/logs" >"$KEEP/out"; find "$k/logs" -name "*.log" -exec cat {} + >"$KEEP/pods"; }; fi
    end_cluster
    (exit "$code")
    finish
}
trap finish_all EXIT

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$k/ca.key" -out "$k/ca.pem" -days 2 \
    -subj /CN=test-ca 2>/dev/null
certificate() { # certificate NAME SUBJECT USAGE [ALTERNATIVE_NAMES]
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$k/$1.key" -out "$k/$1.csr" -subj "$2" 2>/dev/null
    openssl x509 -req -in "$k/$1.csr" -CA "$k/ca.pem" -CAkey "$k/ca.key" -CAcreateserial -days 2 -out "$k/$1.pem" \
        -extfile <(printf 'keyUsage=digitalSignature\nextendedKeyUsage=%s\n%s\n' "$3" "${4:+subjectAltName=$4}") 2>/dev/null
}
certificate kubelet /CN=node1 serverAuth IP:127.0.0.1
certificate client /O=system:masters/CN=durward clientAuth

write_containerd_conf "$k/etc/containerd.toml" "$k" "$k/state" "$k/containerd.sock" docker.io/local/pod:1
write_kubelet_conf "$k/etc/kubelet.yaml" "$k" kubelet "$k/containerd.sock" <<CONF
address: 127.0.0.1
port: $secure
readOnlyPort: $open
healthzPort: $health
podLogsDir: $k/logs
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: false}
  x509: {clientCAFile: $k/ca.pem}
authorization: {mode: AlwaysAllow}
registerNode: false
fileCheckFrequency: 1s
CONF

# An image with this durward, a shell and what they are linked to.
for program in "$durward" /bin/sh /bin/sleep /bin/mv; do
    cp -L "$program" "$dir/image/bin/"
    ldd "$program" | grep -o '/[^ ]*' | while read -r library; do cp -L --parents "$library" "$dir/image/"; done
done
python3 "$root/tests/interop/kubernetes/image.py" docker.io/local/pod:1 "$dir/image" "$dir/image.tar" /bin/sleep 100000

# pod NAME NAMESPACE [MORE]: as user 1000, asks for its SVID twice a second and writes down its IDs.
pod() {
    mkdir -p "$k/out/$1"
    chmod 0777 "$k/out/$1"
    cat >"$k/pods/$1.yaml" <<POD
apiVersion: v1
kind: Pod
metadata: {name: $1, namespace: $2, labels: {app: $1, tier: test}}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  ${3:-}
  securityContext: {runAsUser: 1000}
  containers:
  - name: main
    image: docker.io/local/pod:1
    imagePullPolicy: Never
    command: ["/bin/sh", "-c", "while :; do durward api fetch x509 -output json -timeout 20s >/out/new && mv /out/new /out/ids; sleep 0.5; done"]
    env: [{name: SPIFFE_ENDPOINT_SOCKET, value: "unix:///spiffe/api.sock"}]
    volumeMounts: [{name: spiffe, mountPath: /spiffe, readOnly: true}, {name: out, mountPath: /out}]
  volumes:
  - {name: spiffe, hostPath: {path: $dir/public, type: Directory}}
  - {name: out, hostPath: {path: $k/out/$1, type: Directory}}
POD
    mv "$k/pods/$1.yaml" "$k/manifests/"
}
ids() { grep -o 'spiffe://example.org/[a-z0-9/-]*' "$k/out/$1/ids" | sort -u; }
has_id() { [ "$(ids "$1")" = "spiffe://example.org/$2" ]; }

cat >"$dir/agent.conf" <<CONF
agent {
  trust_domain = "example.org"
  socket_path  = "$dir/public/api.sock"
  data_dir     = "$dir/data"
  admin_socket_path = "$dir/admin.sock"
  log_level    = "debug"
}
plugins {
  WorkloadAttestor "unix" { plugin_data { } }
  WorkloadAttestor "k8s" {
    plugin_data {
      kubelet_secure_port = $secure
      kubelet_ca_path     = "$k/ca.pem"
      certificate_path    = "$k/client.pem"
      private_key_path    = "$k/client.key"
    }
  }
}
issuer "embedded" { }
entry "spiffe://example.org/shop/web" { selectors = ["k8s:ns:shop", "k8s:pod-label:app:shop-web"] }
entry "spiffe://example.org/bank/web" { selectors = ["k8s:ns:bank", "k8s:pod-label:tier:test"] }
entry "spiffe://example.org/uid" { selectors = ["unix:uid:1000", "k8s:ns:none"] }
entry "spiffe://example.org/node" { selectors = ["unix:uid:0"] }
CONF
chmod 0700 "$dir"
chmod 0755 "$dir" "$dir/public"
"$durward" run -config "$dir/agent.conf" >"$dir/agent.log" 2>&1 &
started+=("$!")
until_true 20 "$durward" healthcheck -socketPath "$dir/public/api.sock"

containerd -c "$k/etc/containerd.toml" >"$dir/containerd.log" 2>&1 &
containerd=$!
until_true 30 ctr version
ctr image import "$dir/image.tar" >/dev/null
pod shop-web shop
pod bank-web bank "hostPID: true"
"$cache/kubelet" --config "$k/etc/kubelet.yaml" --root-dir "$k/kubelet" --cert-dir "$k/pki" --hostname-override node1 \
    >"$dir/kubelet.log" 2>&1 &
kubelet=$!

# Two tenants of one user, at their first try or soon after.
until_true 40 has_id shop-web shop/web
until_true 60 has_id bank-web bank/web

# A process that is put into the container, as kubectl exec does it, is in its pod; and one of the node is in none.
task=$(ctr task ls | awk '$3 == "RUNNING" {print $1}' | while read -r id; do
    ctr container info "$id" | grep -q '"io.kubernetes.container.name": "main"' &&
        ctr container info "$id" | grep -q '"io.kubernetes.pod.name": "shop-web-node1"' && echo "$id" && break
done)
[ -n "$task" ] || fail "the container of shop-web"
ctr task exec --exec-id exec1 "$task" /bin/durward api fetch x509 -output json -socketPath /spiffe/api.sock |
    grep -q 'spiffe://example.org/shop/web' || fail "kubectl exec"
"$durward" api fetch x509 -output json -socketPath "$dir/public/api.sock" | grep -o 'spiffe://example.org/[a-z/]*' |
    sort -u >"$dir/of-node"
[ "$(cat "$dir/of-node")" = spiffe://example.org/node ] || fail "a process of the node: $(cat "$dir/of-node")"

# What explain says of it is what the kubelet knows.
pid=$(ctr task ls | awk -v id="$task" '$1 == id {print $2}')
"$durward" explain -socketPath "$dir/admin.sock" -pid "$pid" >"$dir/explained" 2>&1 || fail "explain: $(cat "$dir/explained")"
for selector in k8s:ns:shop k8s:pod-name:shop-web-node1 k8s:pod-label:app:shop-web k8s:container-name:main \
    k8s:pod-image-count:1 k8s:node-name:node1; do
    grep -q "$selector" "$dir/explained" || fail "explain tells $selector: $(cat "$dir/explained")"
done
grep -o 'k8s:[^ ,"]*' "$dir/explained" | sort -u
