//! From an attested call to what it may be given: the entries that match, and proof that they were charged.
//!
//! The states of a call are types, each made in one place. [`authorize`] alone makes an [`Entitled`], of nothing but
//! an [`Attested`]; [`Entitled::charge`] alone makes a [`Charged`]; and the caches of SVIDs take nothing but a
//! [`Charged`]. So no SVID is made for a caller that was not admitted, attested, entitled and charged, in this order.
//! That of an open stream lives on, and takes other entries only from another attestation of the same process
//! ([`Charged::follow`]). What was attested is not kept: a process may have thousands of selectors.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{
    task::yield_now,
    time::{Instant, timeout_at},
};

use super::{
    Snapshot,
    audited::AuditedCaller,
    snapshot::{Change, Store},
};
use crate::{
    attest::{AttestError, Attested, AttestedPeer, Attestor, Subject},
    identity::{Entry, Selector, SpiffeId},
    issuer::Issuer,
    limits::{Admitted, CallerKey, Limits, Refusal, pace::Complaints},
    peer::Peer,
};

/// No entry matches, or none has the SPIFFE ID that was asked for. The text is spire-agent's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no identity issued")]
pub struct NoIdentity;

/// Whose calls came to no entry. Callers could cause it.
static REFUSED: LazyLock<Complaints<()>> = LazyLock::new(Complaints::default);

/// What a call wants entries for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be given their SVIDs.
    Svids,
    /// To be given bundles. Where `allow_unauthenticated_verifiers` says so, this takes no entry.
    Bundles,
}

/// A call with the entries that match. Nothing is made for them yet.
#[derive(Debug)]
pub struct Entitled {
    admitted: Admitted<Arc<Peer>>,
    peer: AttestedPeer,
    purpose: Purpose,
    grant: Grant,
}

/// What a snapshot entitles a caller to.
#[derive(Debug)]
struct Grant {
    entries: Vec<Arc<Entry>>,
    /// Of the snapshot.
    entitled_since: u64,
}

/// A call of an attested caller that no entry matches so far. It counts as a failed attestation, whatever comes of it.
#[derive(Debug)]
pub struct Unentitled {
    admitted: Admitted<Arc<Peer>>,
    peer: AttestedPeer,
    purpose: Purpose,
    wanted: Option<SpiffeId>,
    /// Of the snapshot that was looked at.
    entitled_since: u64,
    is_known: bool,
}

/// A call whose entries were charged: the only key to an SVID.
///
/// It holds the caller's tokens until [`Charged::pay`] or until it is dropped, whichever is first.
#[derive(Debug)]
pub struct Charged {
    peer: AttestedPeer,
    purpose: Purpose,
    grant: Grant,
    /// Whose share of the issuer it takes.
    family: u64,
    /// Until it has paid.
    admitted: Option<Admitted<Arc<Peer>>>,
}

/// Finds the entries of an attested caller in `snapshot`, narrowed to `wanted` when given. In the order of
/// [`EntryIndex::matching`](crate::identity::EntryIndex::matching): the default identity comes first.
///
/// # Errors
/// [`Unentitled`], for which the caller pays as for a failed attestation: it may wait for an entry.
pub fn authorize(
    snapshot: &Snapshot,
    attested: Attested,
    purpose: Purpose,
    wanted: Option<&SpiffeId>,
) -> Result<Entitled, Box<Unentitled>> {
    let peer = attested.peer();
    let (mut admitted, subject) = attested.into_parts();
    match Grant::of(snapshot, &subject, purpose, wanted, peer.connected().caller()) {
        Ok(grant) => Ok(Entitled { admitted, peer, purpose, grant }),
        Err(NoIdentity) => {
            admitted.attestation_failed();
            Err(Box::new(Unentitled {
                admitted,
                peer,
                purpose,
                wanted: wanted.cloned(),
                entitled_since: snapshot.entitled_since,
                is_known: snapshot.is_known(),
            }))
        }
    }
}

/// So many entries are begun with at once: to sign for them takes a thread about a millisecond.
const AT_A_TIME: usize = 64;

/// The least that it takes to ask the issuer anew. Where no caller is to wait for as long, what is known is the answer.
const SHORTEST_LOOK: Duration = Duration::from_secs(2);

impl Unentitled {
    /// Waits for an entry that matches, where the issuer may come to know of one: as long as the issuer says, not beyond
    /// what the caller gave the call, and if there is a place for it among those that wait. The process is attested for
    /// each snapshot anew: other entries ask other questions.
    ///
    /// # Errors
    /// [`NotEntitled`]: there is none, or it could not be found out.
    pub async fn wait(
        mut self: Box<Self>,
        issuer: &dyn Issuer,
        attestor: &Attestor,
        limits: &Limits,
        store: &Store,
    ) -> Result<Entitled, NotEntitled> {
        let none = if self.is_known { NotEntitled::NoIdentity(NoIdentity) } else { NotEntitled::NotKnown };
        let mut changes = store.subscribe();
        let Some(lookout) = issuer.look_out() else { return Err(none) };
        let Some(_place) = limits.place_to_wait(self.peer.connected().caller()) else { return Err(none) };
        let until = Instant::now() + lookout.patience().min(self.admitted.patience_left());
        loop {
            let snapshot = store.snapshot();
            if snapshot.entitled_since > self.entitled_since {
                self.entitled_since = snapshot.entitled_since;
                let subject = attestor.attest_again(&self.peer, &snapshot.questions, limits).await?;
                let (wanted, caller) = (self.wanted.as_ref(), self.peer.connected().caller());
                if let Ok(grant) = Grant::of(&snapshot, &subject, self.purpose, wanted, caller) {
                    let Self { admitted, peer, purpose, .. } = *self;
                    return Ok(Entitled { admitted, peer, purpose, grant });
                }
            }
            // The sender lives as long as the store.
            let waited = timeout_at(until, changes.changed()).await;
            if waited.is_err() || *changes.borrow_and_update() == Change::Draining {
                break;
            }
        }
        let is_asked = lookout.has_looked() || lookout.patience() < SHORTEST_LOOK;
        let is_answered = is_asked && store.snapshot().is_known();
        Err(if is_answered { NotEntitled::NoIdentity(NoIdentity) } else { NotEntitled::NotKnown })
    }
}

impl Entitled {
    /// Charges the call to the identities of its entries: to all of them, or to none. Waits as [`Limits::admit`] does.
    ///
    /// # Errors
    /// [`Refusal`]; the caller's own tokens are given back then.
    pub async fn charge(mut self, limits: &Limits) -> Result<Charged, Refusal> {
        let ids = self.grant.entries.iter().map(|entry| &entry.spiffe_id);
        limits.admit_for(&mut self.admitted, ids).await?;
        let Self { admitted, peer, purpose, grant } = self;
        let family = limits.family_of(peer.connected().caller());
        Ok(Charged { peer, purpose, grant, family, admitted: Some(admitted) })
    }
}

impl Charged {
    /// The caller.
    pub fn peer(&self) -> &AttestedPeer {
        &self.peer
    }

    /// What `of` gives for each entry, in their order, side by side; [`AT_A_TIME`] are begun with, and then others have their turn.
    /// Most calls have one entry: for these no list of futures is made.
    pub(super) async fn each<'a, F: Future>(&'a self, of: impl Fn(&'a Arc<Entry>) -> F) -> Vec<F::Output> {
        match self.grant.entries.as_slice() {
            [entry] => vec![of(entry).await],
            entries => {
                let in_turn = |(nth, entry)| {
                    let of_entry = of(entry);
                    async move {
                        for _ in 0..nth / AT_A_TIME {
                            yield_now().await;
                        }
                        of_entry.await
                    }
                };
                join_all(entries.iter().enumerate().map(in_turn)).await
            }
        }
    }

    /// The entries, the default identity first. Empty only for [`Purpose::Bundles`].
    pub fn entries(&self) -> &[Arc<Entry>] {
        &self.grant.entries
    }

    /// Who is given what is made for it.
    pub(super) fn audited(&self) -> AuditedCaller {
        AuditedCaller::new(self.peer.connected(), self.family)
    }

    /// Ends the charge. A stream does so with its first message: it is charged when it opens, and not for its updates.
    pub fn pay(&mut self) {
        self.admitted = None;
    }

    /// Says for each entry whether something was signed for it, which costs more.
    pub(super) fn signed(&mut self, which: impl Iterator<Item = bool>) {
        let Some(admitted) = &mut self.admitted else { return };
        for (entry, _) in self.grant.entries.iter().zip(which).filter(|(_, signed)| *signed) {
            admitted.signed(&entry.spiffe_id);
        }
    }

    /// Whether the entries are those that `snapshot` has for the process if it is what it was when they were found.
    pub fn is_of(&self, snapshot: &Snapshot) -> bool {
        self.grant.entitled_since == snapshot.entitled_since
    }

    /// Attests the process of an open stream anew, and takes the entries that match what it is now in the newest
    /// snapshot, which is returned. A failure leaves those that were there.
    ///
    /// # Errors
    /// [`NotEntitled`]: nothing may be sent to it now.
    pub async fn follow(
        &mut self,
        attestor: &Attestor,
        limits: &Limits,
        store: &Store,
    ) -> Result<Arc<Snapshot>, NotEntitled> {
        let snapshot = store.snapshot();
        let subject = attestor.attest_again(&self.peer, &snapshot.questions, limits).await?;
        let caller = self.peer.connected().caller();
        self.grant = Grant::of(&snapshot, &subject, self.purpose, None, caller)?;
        Ok(snapshot)
    }
}

/// Why an open stream may not be sent anything now.
#[derive(Debug, thiserror::Error)]
pub enum NotEntitled {
    /// It cannot be told what its process is.
    #[error(transparent)]
    NotAttested(#[from] AttestError),
    /// No entry matches, or none does any more.
    #[error(transparent)]
    NoIdentity(#[from] NoIdentity),
    /// The issuer could not be asked whether one does.
    #[error("the agent has not heard yet from its server whether there is an identity")]
    NotKnown,
}

impl Grant {
    fn of(
        snapshot: &Snapshot,
        subject: &Subject,
        purpose: Purpose,
        wanted: Option<&SpiffeId>,
        caller: CallerKey,
    ) -> Result<Self, NoIdentity> {
        let entries = snapshot.index.matching(subject, wanted).into_iter().map(Arc::clone).collect();
        let grant = Self { entries, entitled_since: snapshot.entitled_since };
        let verifies = purpose == Purpose::Bundles && snapshot.policy.allow_unauthenticated_verifiers;
        if snapshot.is_known() && (!grant.entries.is_empty() || verifies) {
            return Ok(grant);
        }
        log_no_identity(snapshot, subject, caller);
        Err(NoIdentity)
    }
}

fn log_no_identity(snapshot: &Snapshot, subject: &Subject, caller: CallerKey) {
    if tracing::enabled!(tracing::Level::DEBUG) {
        // Selectors tell much about a workload: those only that the admin chose.
        let chosen = |selector: &&Selector| {
            snapshot
                .policy
                .log_selectors
                .iter()
                .any(|prefix| selector.to_string().starts_with(prefix.as_str()))
        };
        REFUSED.say(caller, (), |times| {
            let selectors: Vec<&Selector> = subject.iter().filter(chosen).collect();
            tracing::debug!(%caller, ?selectors, times, "no identity issued");
        });
    }
}
