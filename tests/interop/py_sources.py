"""py-spiffe with forty sources in one process, which share one connection, through what the script that runs it does.

Its steps come by lines: what every source must have, and a call, by then.
"""

import sys
import time

from spiffe import JwtSource, WorkloadApiClient, X509Source

SOURCES, SECONDS = 40, 90


def serials():
    return [source.svid.leaf.serial_number for source in sources]


with WorkloadApiClient() as client:
    sources = [X509Source(timeout_in_seconds=SECONDS) for _ in range(SOURCES)]
    tokens = JwtSource(timeout_in_seconds=SECONDS)
    before = [0] * SOURCES
    for line in sys.stdin:
        step, _, want = line.strip().partition(" ")
        if step == "forget":
            # A source keeps what it has while there is no agent: the next one makes others.
            before = serials()
            continue
        late = time.monotonic() + SECONDS
        while any(old == new for old, new in zip(before, serials())):
            assert time.monotonic() < late, "not every source was told"
            time.sleep(0.1)
        while True:
            try:
                ids = {str(svid.spiffe_id).rsplit("/", 1)[1] for svid in client.fetch_jwt_svids({"a"}, timeout=SECONDS)}
                assert ids == set(want.split(",")), ids
                break
            except Exception:
                # A change takes a moment, and so does a restart.
                if time.monotonic() > late:
                    raise
                time.sleep(1)
        assert tokens.fetch_svid({step}), step
        print(f"{step}: {want}", flush=True)
    for source in [*sources, tokens]:
        source.close()
