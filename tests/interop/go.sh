#!/usr/bin/env bash
# Clients in Go: grpc-go, however it is dialled, and go-spiffe, present and first version.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

socket="$dir/api.sock"
start_agent "$socket"
cd "$root/tests/interop/go"
timeout 900 go build -mod=readonly -o "$dir/" . ./first
timeout 120 "$dir/interop" "$socket"
timeout 60 "$dir/first" "$socket"
