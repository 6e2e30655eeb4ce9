#!/usr/bin/env bash
# Two real SPIRE Servers 1.15.3 on one PostgreSQL behind one name: each of them is killed in turn, and a workload is served for
# what there was and for what is made meanwhile, by whichever lives.

# A name with two addresses, in a hosts file that this script alone sees.
if [ "${1:-}" != within ]; then
    [ "$(id -u)" = 0 ] || { echo "spire-two-servers: left out, since a hosts file of its own takes root"; exit 0; }
    exec unshare --mount --propagation private bash "$0" within
fi
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"
printf '127.0.0.1 localhost\n127.0.0.2 spire.test\n127.0.0.3 spire.test\n' >"$dir/hosts"
mount --bind "$dir/hosts" /etc/hosts

postgres=$(compgen -G '/usr/lib/postgresql/*/bin' | tail -n 1)
[ -n "$postgres" ] || fail "no PostgreSQL: install postgresql first"
mkdir "$dir/postgres"
chmod 0755 "$dir"
chown postgres "$dir/postgres"
as_postgres() { (cd "$dir/postgres" && setpriv --reuid postgres --regid postgres --clear-groups "$@"); }
as_postgres "$postgres/initdb" -D "$dir/postgres/data" -A trust -U postgres --no-sync >/dev/null
as_postgres "$postgres/postgres" -D "$dir/postgres/data" -c listen_addresses= -c "unix_socket_directories=$dir/postgres" \
    -c fsync=off >"$dir/postgres.log" 2>&1 &
started+=("$!")
until_true 30 "$postgres/psql" -h "$dir/postgres" -U postgres -qc 'create database spire'

datastore="database_type = \"postgres\" connection_string = \"host=$dir/postgres user=postgres dbname=spire sslmode=disable\""
address=127.0.0.2
server_conf first "$port" example.org
address=127.0.0.3
server_conf second "$port" example.org
start_server first
first=$server
start_server second
second=$server
# Each has an authority of its own, in the bundle of both.
export SPIRE_SERVER_PRIVATE_SOCKET="$dir/first/api.sock"
both_are_known() { [ "$(spire-server bundle show | grep -c BEGIN)" = 2 ]; }
until_true 30 both_are_known
spire-server bundle show >"$dir/bootstrap.pem"

server_name=spire.test
agent_conf
run_agent "$joins" -joinToken "$(spire-server token generate -spiffeID spiffe://example.org/node | sed -n 's/^Token: //p')"
entry -spiffeID spiffe://example.org/web >/dev/null
until_true 20 serves web
durward api watch >"$dir/watched" 2>&1 &
watch=$!
started+=("$watch")

# goes_on NAME SOCKET: without the other one, a workload is served for what it had and for what is made at this one.
goes_on() {
    serves web || fail "what it had, without the $1 server"
    SPIRE_SERVER_PRIVATE_SOCKET="$2" entry -spiffeID "spiffe://example.org/without-$1" >/dev/null
    until_true 20 serves "without-$1"
    durward api fetch jwt -audience "without-$1" >/dev/null || fail "a token without the $1 server"
}
for turn in 1 2; do
    kill -KILL "$first"
    wait "$first" || true
    goes_on "first-$turn" "$dir/second/api.sock"
    start_server first
    first=$server
    kill -KILL "$second"
    wait "$second" || true
    goes_on "second-$turn" "$dir/first/api.sock"
    start_server second
    second=$server
done
kill -0 "$watch" || fail "the stream lived through it: $(cat "$dir/watched")"
[ "$(agents)" = 1 ] || fail "one agent, got $(agents)"
stop_agent
echo "spire-two-servers: served through the end of each of two SPIRE Servers $version on one datastore"
