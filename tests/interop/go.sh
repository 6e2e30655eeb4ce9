#!/usr/bin/env bash
# Clients in Go: grpc-go, however it is dialled, and go-spiffe (present, first version, and a beta of the second), through a change
# of entries, a restart and an outage.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"
source "$(dirname "${BASH_SOURCE[0]}")/course.bash"

socket="$dir/api.sock"
start_agent "$socket"
cd "$root/tests/interop/go"
timeout 900 go build -mod=readonly -o "$dir/" . ./first ./course
timeout 900 go build -mod=readonly -modfile=beta.mod -o "$dir/" ./beta
timeout 120 "$dir/interop" "$socket"
course "$dir/course" "$socket"
course "$dir/first" "$socket"
course "$dir/beta" "$socket"
