#!/usr/bin/env bash
# The README's two services that speak mTLS, as they stand there, with the agent that quickstart starts.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

chmod 755 "$dir"
cd "$dir"
"$durward" quickstart --dir "$dir/quick" >"$dir/said" 2>&1 &
started+=("$!")
until_true 30 grep -q '^Serving' "$dir/said"
# The line that a person is told to type first.
eval "$(grep '^  \. ' "$dir/said")"

# blocks LANGUAGE: those of the README's section, each ended by a line of its own.
blocks() {
    sed -n '/^## Two services/,/^## Being/p' "$root/README.md" |
        awk -v of="\`\`\`$1" '$0 == of { inside = 1; next } /^```$/ { if (inside) print "----"; inside = 0 } inside'
}
blocks python | awk 'BEGIN { file = "server.py" } /^----$/ { file = "client.py"; next } { print >file }'
blocks sh >commands
sed '/^----$/,$d' commands >install
sed '1,/^----$/d; /^----$/d' commands >run
bash -e install
# Jobs as in a person's shell.
answer=$(bash -m run 2>"$dir/errors") || { cat "$dir/errors" >&2; fail "the commands run"; }
grep -q 'hello, I know who you are' <<<"$answer" || { cat "$dir/errors" >&2; fail "an answer, not: $answer"; }

# Who is somebody else is refused.
sed 's#/me"#/other"#' server.py >strict.py
mtls/bin/python strict.py >strict.log 2>&1 &
started+=("$!")
until_true 20 grep -q serving strict.log
if timeout 20 mtls/bin/python client.py >/dev/null 2>&1; then
    until_true 10 grep -q refused strict.log
fi
grep -q refused strict.log || { cat strict.log >&2; fail "a caller of another name is refused"; }
echo "README: mTLS between two services"
