"""The sources of py-spiffe, refused while they begin, while they run, and after a restart of the agent with other keys.

Other callers of the same user take all that there is, which is theirs too. The sources reach the agent through a
symbolic link, which is only there once nothing is left to take."""

import collections
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from grpc import StatusCode
from spiffe import JwtSource, SpiffeId, TrustDomain, WorkloadApiClient, X509Source
from spiffe.errors import PySpiffeError
from spiffe.workloadapi.errors import FetchJwtSvidError
from spiffe.workloadapi.workload_api_client import RetryHandler

first, durward, base = int(sys.argv[1]), sys.argv[2], sys.argv[3]
path, door, config = f"{base}/api.sock", f"{base}/door", f"{base}/agent.conf"
own, service = TrustDomain("example.org"), SpiffeId("spiffe://example.org/myservice")
SECONDS, PLACES = 100, 8
# What an HTTP/2 client says first, and a server answers if it lets it in.
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

# What each watcher is told when it is refused, which py-spiffe says to nobody. It asks this before it tries again.
refused = collections.defaultdict(list)
should_retry = RetryHandler.should_retry


def listen(handler, code):
    refused[handler].append(code)
    return should_retry(handler, code)


RetryHandler.should_retry = listen


def were_told(codes, times):
    """Whether both watchers were told one of these so many times."""
    return sum(sum(code in codes for code in told) >= times for told in list(refused.values())) == 2


def until(what, so):
    deadline = time.monotonic() + SECONDS
    while not so():
        assert time.monotonic() < deadline, f"not within {SECONDS} seconds: {what}: {dict(refused)}"
        time.sleep(0.05)


@contextlib.contextmanager
def calls_taken():
    """All calls that the watchers make are taken, and then come back one a second."""
    with WorkloadApiClient(f"unix:{path}") as client:
        for call in (client.fetch_x509_svid, client.fetch_jwt_bundles):
            with contextlib.suppress(PySpiffeError):
                while True:
                    call(timeout=SECONDS)
    yield
    with open(config) as file:
        text = file.read()
    with open(config, "w") as file:
        file.write(text.replace('per = "day"', 'per = "second"'))
    os.kill(agents[-1].pid, signal.SIGHUP)


@contextlib.contextmanager
def places_taken():
    """All places for connections are taken, and then free again."""
    taken = []

    def take():
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(path)
        try:
            stream.sendall(HELLO)
            # One that is refused is closed, or nothing is set in its SETTINGS.
            if any(stream.recv(3)):
                taken.append(stream)
        except OSError:
            pass
        return len(taken) == PLACES

    until("all places are taken", take)
    yield
    for stream in taken:
        stream.close()


def token():
    """A token, or the name of the code of the refusal."""
    try:
        assert jwt.fetch_svid({"one"}, service, timeout=SECONDS).spiffe_id == service
        return None
    except FetchJwtSvidError as error:
        [code] = [code.name for code in StatusCode if str(code) in str(error)]
        assert code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"), error
        return code


def trusted():
    """The authorities of X.509-SVIDs and the keys of tokens that the sources have. They have them at any time."""
    assert not x509.is_closed() and not jwt.is_closed()
    context = x509.get_x509_context()
    assert context.default_svid.spiffe_id == service
    authorities = context.x509_bundle_set.get_bundle_for_trust_domain(own).x509_authorities
    return authorities, set(jwt.get_bundle_for_trust_domain(own).jwt_authorities)


def ended(pid):
    """Whether a process has ended, be it that nobody has waited for it."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


agents = []


def restart():
    """Another agent in place of the one that serves, with other keys."""
    pid = agents[-1].pid if agents else first
    os.kill(pid, signal.SIGTERM)
    until("the agent has ended", lambda: ended(pid))
    shutil.rmtree(f"{base}/data")
    with open(f"{base}/agent.log", "a") as log:
        run = [durward, "run", "-config", config]
        agents.append(subprocess.Popen(run, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    until("the agent serves", lambda: os.path.exists(path))


try:
    # While they begin.
    begun = []
    beginning = [
        threading.Thread(target=lambda kind=kind: begun.append(kind(socket_path=f"unix:{door}")), daemon=True)
        for kind in (JwtSource, X509Source)
    ]
    with places_taken():
        os.symlink(path, door)
        for thread in beginning:
            thread.start()
        until("both are refused", lambda: were_told({StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE}, 1))
    for thread in beginning:
        thread.join(SECONDS)
    jwt, x509 = sorted(begun, key=lambda source: type(source).__name__)
    trusted()

    # While they run: a call says that it is refused, and a later one passes.
    until("a token", lambda: token() is None)
    until("a refusal", lambda: token() == "RESOURCE_EXHAUSTED")
    until("a token again", lambda: token() is None)

    # Of places for long enough that gRPC, which has calls fail at once for some seconds, has tried to connect again.
    # Whose connection is refused is told why, or it is closed.
    for case, taken, codes, times in (
        ("calls", calls_taken, {StatusCode.RESOURCE_EXHAUSTED}, 2),
        ("places", places_taken, {StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE}, 6),
    ):
        before = trusted()
        os.unlink(door)
        restart()
        with taken():
            refused.clear()
            os.symlink(path, door)
            until(case, lambda: trusted() == before and were_told(codes, times))
        until(case, lambda: all(now.isdisjoint(then) for now, then in zip(trusted(), before)))
        until(case, lambda: token() is None)
        print(f"{case}: refused with", [[code.name for code in codes] for codes in refused.values()])
finally:
    for agent in agents:
        agent.terminate()
        agent.wait()

print("py-spiffe: refused, and served again")
