#!/usr/bin/env bash
# java-spiffe 0.8.17: one client through a change of entries, a restart and an outage.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"
source "$(dirname "${BASH_SOURCE[0]}")/course.bash"

socket="$dir/api.sock"
start_agent "$socket"
cp "$root/tests/interop/java-spiffe/"* "$dir/"
(cd "$dir" && timeout 600 mvn --quiet --batch-mode dependency:copy-dependencies -DoutputDirectory=lib)
javac -cp "$dir/lib/*" -d "$dir/classes" "$dir/Course.java"
course java -cp "$dir/lib/*:$dir/classes" Course "$socket"
