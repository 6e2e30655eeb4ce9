#!/usr/bin/env bash
# The units of systemd/ under a real systemd: upgrades during polite calls lose none of them, and leave the socket where it is; and
# every setting of conf/agent.conf works under them.
#
# systemd is PID 1 of a container with this machine's /usr and nothing else of it. Needs root, and Debian's systemd and
# systemd-container.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

[ "$(id -u)" -eq 0 ] || fail "needs root"
UPGRADES=5 CALLERS=3
node=$dir/node
socket=/run/durward/public/api.sock

mkdir -p "$node"/{usr,var/lib,run,tmp,root,dev,proc,sys,opt} "$node"/etc/{systemd/system,sysusers.d,durward}
for link in /bin /sbin /lib /lib64; do
    if [ -L "$link" ]; then cp -P "$link" "$node$link"; fi
done
cp -L /etc/os-release /etc/ld.so.cache "$node/etc"
printf '%s\n' root:x:0:0:root:/root:/bin/sh build:x:1001:1001::/:/bin/sh web:x:1002:1002::/:/bin/sh >"$node/etc/passwd"
printf '%s\n' root:x:0: build:x:1001: web:x:1002: www-data:x:33:web >"$node/etc/group"
echo '127.0.0.1 localhost' >"$node/etc/hosts"
printf '%s: files\n' passwd group hosts >"$node/etc/nsswitch.conf"
: >"$node/etc/machine-id"

# Installed as a package would, but with the binary where it can be replaced.
for unit in "$root"/systemd/*.service "$root"/systemd/*.socket; do
    sed 's#/usr/bin/durward#/opt/durward#' "$unit" >"$node/etc/systemd/system/$(basename "$unit")"
done
cp "$root/systemd/sysusers.d/durward.conf" "$node/etc/sysusers.d/"
# install_agent: as package managers do, under another name first.
install_agent() { install -m 755 "$durward" "$node/opt/durward.new" && mv "$node/opt/durward.new" "$node/opt/durward"; }
install_agent
cat >"$node/etc/durward/agent.conf" <<CONF
agent {
  trust_domain = "example.org"
  data_dir     = "/var/lib/durward"
  socket_path  = "$socket"
}
plugins {
  WorkloadAttestor "unix" { plugin_data { } }
}
issuer "embedded" { }
entry "spiffe://example.org/root" { selectors = ["unix:uid:0"] }
CONF

systemd-nspawn --directory="$node" --bind-ro=/usr --machine="durward-$$" --register=no --keep-unit --private-network \
    --console=pipe --kill-signal=SIGRTMIN+3 --boot >"$dir/agent.log" 2>&1 </dev/null &
nspawn=$!
started+=("$nspawn")
# The first child of systemd-nspawn makes the container, and is another one then.
inside() {
    local leader
    leader=$(<"/proc/$nspawn/task/$nspawn/children")
    nsenter --target "${leader%% *}" --mount --uts --ipc --net --pid --cgroup "$@"
}
runs() { case $(inside systemctl is-system-running) in running | degraded) ;; *) return 1 ;; esac; }
until_true 60 runs

inside systemd-sysusers
inside chown -R root:durward /etc/durward
inside systemctl daemon-reload
# The socket alone: the first call starts the agent.
inside systemctl enable --quiet durward.socket
inside systemctl start durward.socket
export SPIFFE_ENDPOINT_SOCKET=unix://$socket
inside /opt/durward api fetch x509 >"$dir/said.txt" || fail "the first call: $(cat "$dir/said.txt")"
inside systemctl is-active --quiet durward.service || fail "the first call starts the agent"

main_pid() { inside systemctl show --property=MainPID --value durward.service; }
inode() { inside stat --format=%i "$socket"; }
first_inode=$(inode)

# Polite callers, each call on a connection of its own.
mkdir "$node/opt/calls"
for caller in $(seq "$CALLERS"); do
    inside sh -c "while [ -e /opt/calls ]; do
        if said=\$(/opt/durward api fetch jwt -audience test -timeout 30s 2>&1); then echo answered; else echo \"lost: \$said\"; fi
    done" >"$dir/calls.$caller" &
    started+=("$!")
done
calls() { cat "$dir"/calls.* | wc -l; }
goes_on() { [ "$(calls)" -ge "$1" ]; }
for upgrade in $(seq "$UPGRADES"); do
    until_true 60 goes_on $(($(calls) + 10))
    old=$(main_pid)
    install_agent
    inside systemctl restart durward.service || fail "upgrade $upgrade: $(inside journalctl -u durward --no-pager -n 20)"
    [ "$(main_pid)" != "$old" ] || fail "upgrade $upgrade: PID $old is still there"
    [ "$(inode)" = "$first_inode" ] || fail "upgrade $upgrade: another socket"
done
until_true 60 goes_on $(($(calls) + 10))
inside systemctl reload durward.service || fail "reload"
rmdir "$node/opt/calls"
wait "${started[@]:1}"
lost=$(grep -v '^answered$' "$dir"/calls.* || true)
[ -z "$lost" ] || fail "lost calls: $lost"
echo "$UPGRADES upgrades, $(calls) calls, none lost"

# Every setting of the reference, at its default or as its example has it, and what is off by default switched on. Of two that
# exclude each other it is one.
inside mkdir -p /etc/durward/entries.d
inside /opt/durward bundle show --output spiffe >"$node/etc/durward/other.example.json"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /O=example -keyout "$node/etc/durward/ca.key" \
    -out "$node/etc/durward/ca.pem" -addext keyUsage=critical,keyCertSign,cRLSign 2>/dev/null
sed -E -e '/^ *#\+ *(kubelet_read_only_port|fetch_x509_svid|socket_path = "\/run\/audit)/d' \
    -e 's/^( *)# ([A-Za-z0-9_]+ = )/\1\2/' -e 's/^( *)#\+/\1/' -e 's#"entries.d"#"/etc/durward/entries.d"#' \
    -e 's/^( *)(take_over|watch_config|log_source_location|allow_unauthenticated_verifiers|optional) = false/\1\2 = true/' \
    -e 's/^( *)(discover_workload_path|spire_agent_names|EnableTrustDomainLabel|listener_enabled) = false/\1\2 = true/' \
    -e 's/log_format = "text"/log_format = "json"/' -e 's/soft_limits = \[\]/soft_limits = [50, 90]/' \
    -e 's/log_selectors = \[\]/log_selectors = ["unix:uid"]/' "$root/conf/agent.conf" >"$node/etc/durward/agent.conf"
echo 'entry "spiffe://example.org/root" { selectors = ["unix:uid:0", "unix:path:/opt/durward"] }' >"$node/etc/durward/entries.d/root.conf"
inside chown -R durward:durward /etc/durward
chmod 600 "$node/etc/durward/ca.key"
inside systemctl stop durward.service
rm -r "$node"/var/lib/durward/*

# One of them needs what the unit does not give by itself, and nothing starts without it.
inside systemctl --no-block start durward.service
refused() { inside journalctl -u durward --no-pager -o cat | grep -q 'discover_workload_path.*needs CAP_SYS_PTRACE'; }
until_true 30 refused
mkdir -p "$node/etc/systemd/system/durward.service.d"
cp "$root/systemd/discover-workload-path.conf" "$node/etc/systemd/system/durward.service.d/"
inside systemctl daemon-reload
inside systemctl restart durward.service || fail "with every setting: $(inside journalctl -u durward --no-pager -n 20)"
said() { inside "$@" >"$dir/said.txt" 2>&1 || fail "$*: $(cat "$dir/said.txt")"; }
told() { grep -q "$1" "$dir/said.txt" || fail "not there: $1: $(cat "$dir/said.txt")"; }
said /opt/durward api fetch x509
told spiffe://example.org/root
for at in 'http://localhost/ready' 'http://localhost/live' '--unix-socket /run/durward/health.sock http://localhost/ready'; do
    # shellcheck disable=SC2086
    said curl --fail --silent --show-error $at
done
for at in 'http://localhost:9988/' '--unix-socket /run/durward/metrics.sock http://localhost/'; do
    # shellcheck disable=SC2086
    said curl --fail --silent --show-error $at
    told '^durward_calls_total{'
    told '^spire_agent_.*trust_domain="example.org"'
done
said /opt/durward status
told '^Wrong: *nothing'
said /opt/durward audit who spiffe://example.org/root /var/log/durward/audit.jsonl
told 'X.509-SVID, serial'
said head -n 1 /var/log/durward/agent.log
told '^{"timestamp"'
said systemctl reload durward.service
# A file that changes is read without being told to.
echo 'entry "spiffe://example.org/more" { selectors = ["unix:uid:0"] }' >"$node/etc/durward/entries.d/more.conf"
inside chown durward:durward /etc/durward/entries.d/more.conf
has_more() { inside /opt/durward entry show | grep -q spiffe://example.org/more; }
until_true 30 has_more
said /opt/durward validate --config /etc/durward/agent.conf
echo "and every setting of conf/agent.conf works there"
