#!/usr/bin/env bash
# The real SPIRE Server 1.15.3, and Durward in the place of its agent: attestation with a join token, entries that come,
# change and go, a server that is killed, and spire-agent and Durward in turns on one data_dir.
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"

server_conf server "$port" example.org
agent_conf

start_server

# The five commands of the README, as they stand, with its agent.conf in the working directory.
cd "$dir"
mapfile -t commands < <(sed -n '/^### With a SPIRE Server/,/^### Coming/p' "$root/README.md" |
    sed -n '/^```sh$/,/^```$/p' | grep -v '^```')
[ "${#commands[@]}" = 5 ] || fail "the README has five commands, got ${#commands[@]}: ${commands[*]}"
for command in "${commands[@]}"; do
    case $command in
    "durward run"*)
        eval "${command/#durward/$joins}" >>"$dir/agent.log" 2>&1
        agent=$!
        started+=("$agent")
        ;;
    "durward api"*) until_true 20 eval "$command" ;;
    *) eval "$command" ;;
    esac
done
serves web || fail "the README's workload"
token=$(durward api fetch jwt -audience them -output json | grep -o '"svid": *"[^"]*"' | head -n 1 | cut -d'"' -f4)
durward api validate jwt -audience them -svid "$token" >/dev/null || fail "a JWT-SVID of the server"

# Entries come, change and go.
id=$(entry -spiffeID spiffe://example.org/second)
until_true 15 serves second
spire-server entry update -entryID "$id" -parentID spiffe://example.org/node -spiffeID spiffe://example.org/changed \
    -selector "unix:uid:$(id -u)" >/dev/null
until_true 15 serves changed
until_true 15 serves_not second
spire-server entry delete -entryID "$id" >/dev/null
until_true 15 serves_not changed
serves web || fail "the other entry stays"

# Without its server it serves what it has, and with it again what is new.
kill -KILL "$server"
wait "$server" || true
serves web || fail "an SVID while the server is away"
start_server
entry -spiffeID spiffe://example.org/third >/dev/null
until_true 60 serves third

# In turns on one data_dir, with a token that was used up long ago.
[ "$(agents)" = 1 ] || fail "one agent, got $(agents)"
stop_agent
for binary in spire-agent "$joins" spire-agent "$joins"; do
    run_agent "$binary"
    until_true 20 serves web
    until_true 20 serves third
    stop_agent
done
[ "$(agents)" = 1 ] || fail "still one agent, got $(agents)"

# With an SVID on the disk and without a server, Durward is there all the same.
kill "$server"
wait "$server" || true
if [ "$(basename "$joins")" = durward ]; then
    run_agent "$joins"
    until_true 10 test -S "$socket"
    [ "$(durward api fetch x509 -timeout 2s >/dev/null 2>&1; echo $?)" != 3 ] || fail "unavailable is no denial"
    stop_agent
fi
echo "spire: attested, followed and signed for by the SPIRE Server $version, in turns with its own agent on one data_dir"
