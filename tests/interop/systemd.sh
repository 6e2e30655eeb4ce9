#!/usr/bin/env bash
# The units of systemd/ under a real systemd: upgrades during polite calls lose none of them, and leave the socket where it is.
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
echo 'root:x:0:0:root:/root:/bin/sh' >"$node/etc/passwd"
echo 'root:x:0:' >"$node/etc/group"
printf '%s: files\n' passwd group >"$node/etc/nsswitch.conf"
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
