"""How long an agent takes to start: until it accepts, and until its first answer. Prints medians of some starts, in ms, and what
the first answer takes of the floor: of a start of the same program, in turns with these, that prints its version and ends. The aim
is 15 ms, on an idle machine.

python3 tests/bench/start.py target/release/durward [STARTS]
"""

import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

agent, starts = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20


def frame(kind, flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


HEADERS = b"\x83\x86" + b"".join(
    literal(name, value)
    for name, value in (
        (b":path", b"/SpiffeWorkloadAPI/FetchJWTSVID"),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"workload.spiffe.io", b"true"),
    )
)
CALL = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + frame(4, 0, 0, b"")
    + frame(1, 4, 1, HEADERS)
    + frame(0, 1, 1, b"\0\0\0\0\3\x0a\x01a")
)


def start(at):
    began = time.monotonic()
    process = subprocess.Popen([agent, "run", "--config", f"{at}/agent.conf"])
    try:
        while True:
            stream = socket.socket(socket.AF_UNIX)
            stream.settimeout(30)
            try:
                stream.connect(f"{at}/api.sock")
                break
            except OSError:
                assert process.poll() is None, "it ended"
                time.sleep(0.0002)
        accepted = time.monotonic()
        stream.sendall(CALL)
        answer = b""
        # The first characters of a token.
        while b"eyJ" not in answer:
            more = stream.recv(65536)
            assert more, answer
            answer += more
        return (accepted - began) * 1000, (time.monotonic() - began) * 1000
    finally:
        process.terminate()
        process.wait()


def floor():
    began = time.monotonic()
    subprocess.run([agent, "version"], stdout=subprocess.DEVNULL, check=True)
    return (time.monotonic() - began) * 1000


with tempfile.TemporaryDirectory() as at:
    with open(f"{at}/agent.conf", "w") as config:
        config.write(
            f'agent {{ trust_domain = "example.org" data_dir = "{at}/data" socket_path = "{at}/api.sock" '
            f'log_level = "error" }}\nplugins {{ WorkloadAttestor "unix" {{ plugin_data {{ }} }} }}\n'
            f'issuer "embedded" {{ }}\naudit {{ enabled = false }}\n'
            f'entry "spiffe://example.org/web" {{ selectors = ["unix:uid:{os.getuid()}"] }}\n'
        )
    start(at)
    accepts, answers, floors = zip(*((*start(at), floor()) for _ in range(starts)))
    accepts, answers, floors = map(statistics.median, (accepts, answers, floors))
    print(f"accepts after {accepts:.1f} ms, first answer after {answers:.1f} ms: {answers / floors:.1f} times the floor of {floors:.1f} ms")
