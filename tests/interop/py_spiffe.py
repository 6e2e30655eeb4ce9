"""Fetches, watches and validates with py-spiffe, across a reload of the agent."""

import os
import signal
import sys
import threading

from spiffe import JwtSource, JwtSvid, SpiffeId, TrustDomain, WorkloadApiClient, X509Source
from spiffe.workloadapi.errors import ValidateJwtSvidError

agent, config = int(sys.argv[1]), sys.argv[2]
own, federated = TrustDomain("example.org"), TrustDomain("example-federated.org")
first, second = SpiffeId("spiffe://example.org/myservice"), SpiffeId("spiffe://example.org/myservice2")
SECONDS = 20


def reload():
    os.kill(agent, signal.SIGHUP)


with WorkloadApiClient() as client:
    svids = client.fetch_x509_svids(timeout=SECONDS)
    assert {svid.spiffe_id for svid in svids} == {first, second}, svids
    assert client.fetch_x509_svid(timeout=SECONDS).spiffe_id in (first, second)

    context = client.fetch_x509_context(timeout=SECONDS)
    bundle = context.x509_bundle_set.get_bundle_for_trust_domain(own)
    assert len(bundle.x509_authorities) == 1, bundle
    root = next(iter(bundle.x509_authorities))
    for svid in svids:
        svid.leaf.verify_directly_issued_by(root)
    assert client.fetch_x509_bundles(timeout=SECONDS).get_bundle_for_trust_domain(own)

    audience = {"one", "two"}
    for wanted in (first, second):
        svid = client.fetch_jwt_svid(audience, wanted, timeout=SECONDS)
        assert svid.spiffe_id == wanted and svid.audience == audience, svid
        checked = client.validate_jwt_svid(svid.token, "two", timeout=SECONDS)
        assert checked.spiffe_id == wanted
        # The same again without the agent: the signature with the key of the bundle.
        keys = client.fetch_jwt_bundles(timeout=SECONDS).get_bundle_for_trust_domain(own)
        assert JwtSvid.parse_and_validate(svid.token, keys, {"one"}).spiffe_id == wanted
    assert len(client.fetch_jwt_svids({"one"}, timeout=SECONDS)) == 2
    for token, why in ((svid.token[:-4] + "AAAA", "another signature"), ("a.b.c", "no token")):
        try:
            client.validate_jwt_svid(token, "two", timeout=SECONDS)
        except ValidateJwtSvidError:
            pass
        else:
            raise AssertionError(f"validated {why}")

    # A stream stays over a reload, and tells what changed.
    updates, changed, errors = [], threading.Condition(), []

    def on_update(update):
        with changed:
            updates.append(update)
            changed.notify_all()

    watching = client.stream_x509_contexts(on_update, errors.append)
    with changed:
        assert changed.wait_for(lambda: len(updates) == 1, SECONDS), errors
    with open(config, "a") as more:
        print(
            f'entry "spiffe://example.org/added" {{ selectors = ["unix:uid:{os.getuid()}"] }}',
            file=more,
        )
    reload()
    with changed:
        assert changed.wait_for(lambda: len(updates) == 2, SECONDS), errors
    now = {svid.spiffe_id for svid in updates[-1].x509_svids}
    assert now == {first, second, SpiffeId("spiffe://example.org/added")}, now
    watching.cancel()
    assert not errors, errors

with X509Source(timeout_in_seconds=SECONDS) as source:
    assert source.svid.spiffe_id in (first, second, SpiffeId("spiffe://example.org/added"))
    assert source.get_bundle_for_trust_domain(federated), "the federated bundle"
with JwtSource(timeout_in_seconds=SECONDS) as source:
    assert source.fetch_svid({"one"}, first).spiffe_id == first
    assert source.get_bundle_for_trust_domain(own)

print("py-spiffe: fetched, watched and validated")
