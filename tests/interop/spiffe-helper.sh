#!/usr/bin/env bash
# spiffe-helper, which puts SVIDs into files: through a renewal, a change of entries, a restart and an outage.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"
source "$(dirname "${BASH_SOURCE[0]}")/course.bash"

socket="$dir/api.sock" files="$dir/files"
(cd "$root/tests/interop/spiffe-helper" &&
    timeout 900 go build -mod=readonly -o "$dir/spiffe-helper" github.com/spiffe/spiffe-helper/cmd/spiffe-helper)
# Whose SVID lasts half a minute, so that it is renewed after a quarter.
entry() {
    echo "entry \"spiffe://example.org/$1\" {"
    echo "  selectors = [\"unix:uid:$(id -u)\"]"
    echo '  hint = "files"'
    echo '  x509_svid_ttl = "30s"'
    echo '}'
}
entry one >"$dir/entry.conf"
start_agent "$socket" "$dir/entry.conf"

mkdir "$files"
cat >"$dir/helper.conf" <<CONF
agent_address = "$socket"
cert_dir = "$files"
svid_file_name = "svid.pem"
svid_key_file_name = "svid.key"
svid_bundle_file_name = "bundle.pem"
jwt_svids = [{jwt_audience = "them", jwt_svid_file_name = "token"}]
jwt_bundle_file_name = "keys.json"
hint = "files"
CONF
"$dir/spiffe-helper" -config "$dir/helper.conf" >"$dir/helper.log" 2>&1 &
started+=($!)

serial() { openssl x509 -in "$files/svid.pem" -noout -serial 2>/dev/null || true; }
# Whether the files are those of this identity, fit each other, and are not the ones of this serial number.
files_are() {
    [ "$(serial)" != "$2" ] &&
        openssl x509 -in "$files/svid.pem" -noout -ext subjectAltName | grep -q "URI:spiffe://example.org/$1\$" &&
        openssl verify -partial_chain -CAfile "$files/bundle.pem" -untrusted "$files/svid.pem" "$files/svid.pem" &&
        cmp <(openssl x509 -in "$files/svid.pem" -noout -pubkey) <(openssl pkey -in "$files/svid.key" -pubout)
}
# step_files NAME IDENTITY SERIAL
step_files() {
    local began=$SECONDS
    until files_are "$2" "$3" >/dev/null 2>&1; do
        [ $((SECONDS - began)) -lt 90 ] || { tail -n 20 "$dir/helper.log" >&2; fail "$1: no files of $2"; }
        sleep 0.2
    done
    echo "-- $1 after $((SECONDS - began)) s"
}

step_files start one none
until_true 20 test -s "$files/token"
"$durward" api validate jwt -audience them -svid "$(cat "$files/token")" -socketPath "$socket" | grep -q 'SVID is valid'
grep -q "\"example.org\":" "$files/keys.json" || fail "the JWT bundle: $(cat "$files/keys.json")"

step_files renewal one "$(serial)"
cp "$dir/agent.conf" "$dir/before.conf"
sed -i 's#example.org/one"#example.org/other"#' "$dir/agent.conf"
kill -HUP "$agent"
step_files change other none
cp "$dir/before.conf" "$dir/agent.conf"
kill -HUP "$agent"
step_files back one none
before=$(serial)
restart_after 0
step_files restart one "$before"
before=$(serial)
restart_after "$OUTAGE"
step_files outage one "$before"
echo "spiffe-helper: files, through a renewal, a change, a restart and an outage of $OUTAGE s"
