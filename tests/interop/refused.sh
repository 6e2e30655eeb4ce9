#!/usr/bin/env bash
# py-spiffe that is refused, by the gate and by the limits on calls: its sources live on and recover by themselves.
source "$(dirname "${BASH_SOURCE[0]}")/agent.bash"

socket="$dir/api.sock"
# Calls of streams come back once a day here, until the script has the agent reload.
cat >"$dir/tight.conf" <<'CONF'
ratelimit {
  gate {
    connection { handshake_timeout = "2m" }
    caller { connections = 8 rate = 2 burst = 20 }
  }
  caller {
    rate = 1 per = "day" burst = 5
    method "FetchJWTSVID" { rate = 1 burst = 5 }
  }
}
CONF
start_agent "$socket" "$dir/tight.conf"
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "spiffe==0.3.2"
timeout 400 "$dir/venv/bin/python" "$root/tests/interop/refused.py" "$agent" "$durward" "$dir"
