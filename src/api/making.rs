//! What an answer takes while it is made, before it can be told from its length.
//!
//! The SVIDs of a thousand identities are a megabyte, and ten calls for it at once are more than a small agent has: each
//! finds room for what it is about to make, or comes to nothing.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{answers::federated, status::RequestError};
use crate::{
    identity::{Bundle, Entry},
    limits::{
        holding::{AnswerInTheMaking, Holding},
        patience::FOR_ROOM,
    },
    peer::Peer,
    store::Snapshot,
};

/// So large is every answer reckoned while it is made, whatever it is.
pub(super) const SMALL: usize = 16 * 1024;
/// An X.509-SVID with its key and what names it, and a JWT-SVID without its audience, in bytes.
const X509_SVID: usize = 900;
const JWT_SVID: usize = 512;
/// The message and its encoded form. The copy that gRPC makes of that counts as unsent.
const COPIES: usize = 2;

/// How often one that found no room for its answer asks again.
const AGAIN: Duration = Duration::from_millis(10);

/// Room for an answer of so many bytes that is about to be made, to be kept until it is. Nothing where it is a small one. Waits
/// a moment where there is none: answers are made in little time.
///
/// # Errors
/// [`RequestError::NoMemory`] when memory stays about to run out, the caller holds the least share there is, and other large
/// answers of its own are being made.
pub(super) async fn room_for(answer: usize, peer: &Peer) -> Result<Option<AnswerInTheMaking>, RequestError> {
    match peer.holding().filter(|_| answer > SMALL) {
        Some(holding) => room_in(holding, answer).await.map(Some),
        None => Ok(None),
    }
}

async fn room_in(holding: &Arc<Holding>, answer: usize) -> Result<AnswerInTheMaking, RequestError> {
    let bytes = u64::try_from(answer.saturating_mul(COPIES)).unwrap_or(u64::MAX);
    let until = Instant::now() + FOR_ROOM;
    loop {
        match holding.try_make(bytes) {
            None if Instant::now() >= until => return Err(RequestError::NoMemory),
            None => sleep(AGAIN).await,
            Some(made) => return Ok(made),
        }
    }
}

/// About what FetchX509SVID's answer takes.
pub(super) fn x509_svids_len(snapshot: &Snapshot, entries: &[Arc<Entry>]) -> usize {
    let each = X509_SVID + authorities_len(&snapshot.bundles.own);
    entries.len().saturating_mul(each).saturating_add(federated_len(snapshot, entries, authorities_len))
}

/// About what FetchX509Bundles' answer takes, and FetchJWTBundles'.
pub(super) fn bundles_len(snapshot: &Snapshot, entries: &[Arc<Entry>]) -> usize {
    let larger = |bundle: &Bundle| authorities_len(bundle).max(bundle.jwt_authorities.len() * JWT_SVID);
    larger(&snapshot.bundles.own).saturating_add(federated_len(snapshot, entries, larger))
}

/// About what FetchJWTSVID's answer takes.
pub(super) fn jwt_svids_len(entries: &[Arc<Entry>], audience: &[String]) -> usize {
    let audience: usize = audience.iter().map(|it| it.len() + 3).sum();
    entries.len().saturating_mul(JWT_SVID.saturating_add(audience.saturating_mul(2)))
}

fn authorities_len(bundle: &Bundle) -> usize {
    bundle.x509_authorities.iter().map(Vec::len).sum()
}

fn federated_len(snapshot: &Snapshot, entries: &[Arc<Entry>], len: impl Fn(&Bundle) -> usize) -> usize {
    let known = federated(entries).into_iter().filter_map(|td| snapshot.bundles.federated.get(td));
    known.map(|bundle| len(bundle)).sum()
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::limits::{CallerKey, Gate};

    /// One call alone on its connection, for whose answer there is no memory, hears that, and not that others are in its way.
    #[tokio::test(start_paused = true)]
    async fn who_finds_no_memory_for_its_answer_hears_so() {
        const MIB: u64 = 1 << 20;
        const LARGE: usize = 314 * 1024;
        let gate = Gate::of_defaults(64 * MIB);
        let [asks, hog] = [1, 2].map(|uid| gate.open(CallerKey::Uid(uid)).unwrap());
        hog.holding().hold(61 * MIB);
        let refused = room_in(asks.holding(), LARGE).await.unwrap_err();
        assert!(matches!(refused, RequestError::NoMemory), "{refused}");
        let told = tonic::Status::from(refused);
        assert_eq!(told.code(), tonic::Code::Unavailable);
        assert!(
            told.message().contains("none for an answer as large") && !told.message().contains("other calls")
        );
        assert!(told.metadata().contains_key(crate::peer::PUSHBACK));
        let waits = room_in(asks.holding(), LARGE);
        let (made, ()) = tokio::join!(timeout(FOR_ROOM, waits), async {
            sleep(FOR_ROOM / 2).await;
            hog.holding().release(61 * MIB);
        });
        assert!(made.unwrap().is_ok(), "as soon as there is some");
    }
}
