# Sourced by the interop scripts: starts the agent on a directory of its own, and ends what it started.
#
# DURWARD is the binary to test (default: the debug build of this tree). INTEROP_DIR is a directory to work in that whoever made
# it removes (default: one that goes with the script).

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
durward=${DURWARD:-$root/target/debug/durward}
[ -x "$durward" ] || { echo "no $durward: run 'cargo build' first" >&2; exit 1; }

dir=${INTEROP_DIR:-$(mktemp -d)}
started=()

# Ends every process that `run_in_background` started, by its own id.
finish() {
    local code=$? pid
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
    if [ "$code" -ne 0 ] && [ -f "$dir/agent.log" ]; then
        echo "---- the agent's log, its end:" >&2
        tail -n 40 "$dir/agent.log" >&2
    fi
    [ -n "${INTEROP_DIR:-}" ] || rm -rf "$dir"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

fail() { echo "FAILED: $*" >&2; exit 1; }

# until_true SECONDS COMMAND...: tries the command until it succeeds.
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -le "$end" ] || fail "waited in vain for: $*"
        sleep 0.1
    done
}

# start_agent SOCKET [FILE...]: two entries for the current user, a federated trust domain, and the files appended.
start_agent() {
    local socket=$1
    shift
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 \
        -keyout "$dir/federated.key" -out "$dir/federated.pem" -subj "/O=federated" \
        -addext "subjectAltName=URI:spiffe://example-federated.org" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
    [ -f "$dir/issuer.conf" ] || echo 'issuer "embedded" { }' >"$dir/issuer.conf"
    {
        cat <<CONF
agent {
  trust_domain = "example.org"
  socket_path  = "$socket"
  data_dir     = "$dir/data"
  log_level    = "debug"
}
plugins {
  WorkloadAttestor "unix" { plugin_data { } }
}
federation "spiffe://example-federated.org" {
  bundle_path = "$dir/federated.pem"
}
entry "spiffe://example.org/myservice" {
  selectors      = ["unix:uid:$(id -u)"]
  hint           = "myservice"
  federates_with = ["spiffe://example-federated.org"]
}
entry "spiffe://example.org/myservice2" {
  selectors      = ["unix:uid:$(id -u)"]
  hint           = "myservice2"
  federates_with = ["spiffe://example-federated.org"]
}
CONF
        cat "$dir/issuer.conf" "$@"
    } >"$dir/agent.conf"
    "$durward" validate -config "$dir/agent.conf"
    "$durward" run -config "$dir/agent.conf" >"$dir/agent.log" 2>&1 &
    agent=$!
    started+=("$agent")
    until_true 20 "$durward" healthcheck -socketPath "$socket"
    export SPIFFE_ENDPOINT_SOCKET="unix://$socket"
}

# write_containerd_conf FILE DIRECTORY STATE SOCKET IMAGE: of a containerd for pods that keeps what it has in the directory, and
# makes of the image what holds a pod's namespaces.
write_containerd_conf() {
    cat >"$1" <<CONF
version = 2
root = "$2/root"
state = "$3"
[grpc]
  address = "$4"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$5"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$2/cni"
CONF
}

# write_kubelet_conf FILE DIRECTORY CERTIFICATE SOCKET: of a kubelet with the certificate of that name in the directory; the rest of
# it comes from the standard input.
write_kubelet_conf() {
    local rest
    rest=$(cat)
    cat >"$1" <<CONF
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://$4
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
resolvConf: ""
tlsCertFile: $2/$3.pem
tlsPrivateKeyFile: $2/$3.key
staticPodPath: $2/manifests
evictionHard: {}
imageGCHighThresholdPercent: 100
$rest
CONF
}
