# Sourced by interop scripts: what every client has to come through.
#
# The client is told the steps by lines, "STEP ID,ID", and answers each with a line when it has those identities. With
# "forget" it is to forget those it has, so that the next line tells of new ones.

# Seconds for which no agent is there.
OUTAGE=${OUTAGE:-30}

own=myservice,myservice2

# course COMMAND...: runs the client and has the agent change, restart and be away meanwhile.
course() {
    rm -f "$dir/steps"
    mkfifo "$dir/steps"
    timeout 300 "$@" <"$dir/steps" >"$dir/told" 2>"$dir/said" &
    local client=$!
    started+=("$client")
    exec 9>"$dir/steps"
    step start "$own"

    cp "$dir/agent.conf" "$dir/before.conf"
    echo "entry \"spiffe://example.org/added\" { selectors = [\"unix:uid:$(id -u)\"] }" >>"$dir/agent.conf"
    kill -HUP "$agent"
    step given "added,$own"
    cp "$dir/before.conf" "$dir/agent.conf"
    kill -HUP "$agent"
    step taken "$own"

    echo forget >&9
    restart_after 0
    step restart "$own"
    echo forget >&9
    restart_after "$OUTAGE"
    step outage "$own"

    exec 9>&-
    wait "$client" || { cat "$dir/said" >&2; fail "the client ended with an error"; }
    cat "$dir/told"
}

# step NAME IDS: tells the client, and waits for its answer.
step() {
    echo "$1 $2" >&9
    local began=$SECONDS
    until grep -q "^$1: $2\$" "$dir/told"; do
        [ $((SECONDS - began)) -lt 120 ] || { cat "$dir/said" >&2; fail "$1: not told of $2"; }
        sleep 0.1
    done
    echo "-- $1 after $((SECONDS - began)) s"
}

# restart_after SECONDS: ends the agent and starts another one later.
restart_after() {
    kill "$agent"
    wait "$agent" || true
    sleep "$1"
    "$durward" run -config "$dir/agent.conf" >>"$dir/agent.log" 2>&1 9>&- &
    agent=$!
    started+=("$agent")
}
