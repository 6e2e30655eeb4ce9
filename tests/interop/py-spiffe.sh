#!/usr/bin/env bash
# py-spiffe, which is gRPC's C core: its channels send the socket's path as :authority, as Ruby's and PHP's do.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

socket="$dir/api.sock"
start_agent "$socket"
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "spiffe==0.3.2"
timeout 120 "$dir/venv/bin/python" "$root/tests/interop/py_spiffe.py" "$agent" "$dir/agent.conf"
