#!/usr/bin/env bash
# py-spiffe with forty sources in one process: gRPC's C core has one connection for them all.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"
source "$(dirname "${BASH_SOURCE[0]}")/course.bash"

socket="$dir/api.sock"
start_agent "$socket"
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "spiffe==0.3.2"
course "$dir/venv/bin/python" "$root/tests/interop/py_sources.py"
