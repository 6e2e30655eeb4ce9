"""Watches with py-spiffe until it is told to end (SIGTERM): nothing that comes may have expired when it comes."""

import datetime
import signal
import sys
import threading
import time

from spiffe import WorkloadApiClient

updates, expired, ended = [], [], threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())


def on_update(context):
    now = datetime.datetime.now(datetime.timezone.utc)
    updates.append(now)
    for svid in context.x509_svids:
        if svid.leaf.not_valid_after_utc <= now:
            expired.append((now, svid.spiffe_id))


with WorkloadApiClient() as client:
    watching = None
    failed = threading.Event()
    while not ended.is_set():
        # A stream ends with the agent that served it.
        failed.clear()
        watching = client.stream_x509_contexts(on_update, lambda _error: failed.set())
        while not ended.wait(0.2) and not failed.is_set():
            pass
        watching.cancel()
        time.sleep(0.5)

print(f"py-spiffe: {len(updates)} updates, {len(expired)} expired", flush=True)
sys.exit(1 if expired or len(updates) < 10 else 0)
