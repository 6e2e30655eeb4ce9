#!/usr/bin/env bash
# grpc-js, Node's gRPC: one channel through a change of entries, a restart and an outage.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"
source "$(dirname "${BASH_SOURCE[0]}")/course.bash"

socket="$dir/api.sock"
start_agent "$socket"
cp "$root/tests/interop/grpc-js/"* "$dir/"
(cd "$dir" && npm install --silent --no-audit --no-fund --no-package-lock)
course node "$dir/main.js" "$root/proto/workload.proto" "$socket"
