//! Syncs: what the server has is asked for again and again, and published when it is another.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    ServerIssuer,
    calls::CallFault,
    cycle::{Cycle, Outcome, Since},
    entries::KnownEntries,
    error::ServerError,
    faults::ServerUse,
    metrics::SyncResult,
    own_svid::OwnStanding,
};
use crate::{
    identity::{Bundle, Bundles, EntryIndex, Tainted, TrustDomain},
    issuer::World,
    os::random::fraction,
    telemetry::chain,
};

/// How long a sync may take.
const SYNC_WITHIN: Duration = Duration::from_secs(30);
/// How many bundles of other trust domains are asked for at once.
const BUNDLES_AT_ONCE: usize = 10;

/// Of so many trust domains bundles are asked for at most: those that come first.
const MOST_FEDERATED: usize = 1_000;

/// What the syncs so far have brought.
#[derive(Default)]
struct Synced {
    entries: KnownEntries,
    /// The trust domains that the entries of this index federate with.
    federated: (Arc<EntryIndex>, BTreeSet<TrustDomain>),
    /// Those of which there is no bundle of use, which was said.
    missing: BTreeSet<TrustDomain>,
    failing: bool,
    /// The server has said at least once what there is.
    is_known: bool,
}

impl ServerIssuer {
    /// Follows what the server has, for ever.
    pub(super) async fn follow(&self) {
        let mut synced = Synced::default();
        let mut cycle = Cycle::new(Instant::now());
        let mut since = Since::Due;
        let mut own = self.own.as_ref().map(|own| own.standing());
        let mut outcome = Outcome::Synced;
        loop {
            cycle.begins(Instant::now(), since);
            if let Some(own) = &mut own {
                own.mark_unchanged();
            }
            let look = self.lookouts.begin();
            let began = Instant::now();
            let done = self.sync(&mut synced).await;
            if let Some(metrics) = &self.server_metrics {
                let result = if done.is_ok() { SyncResult::Ok } else { SyncResult::Error };
                metrics.synced(result, began.elapsed());
            }
            let now = if done.is_ok() { Outcome::Synced } else { Outcome::Failed };
            let before = std::mem::replace(&mut outcome, now);
            if done.is_ok() {
                self.lookouts.done(look);
            }
            if let (Some(own), Outcome::Failed, Outcome::Synced) = (&self.own, before, outcome) {
                own.server_is_back();
            }
            self.note(done.as_ref().err());
            synced.say(done.as_ref().err(), &self.world.borrow());
            let next = cycle.ended(Instant::now(), outcome, self.settings().interval, fraction());
            self.stands(&done, next.at);
            let waited_for = async {
                sleep_until(next.if_waited_for).await;
                self.lookouts.wanted().await;
            };
            since = tokio::select! {
                () = sleep_until(next.at) => Since::Due,
                // What failed with the one before may pass with another.
                () = shown_anew(&mut own), if outcome == Outcome::Failed => Since::Due,
                () = waited_for => Since::WaitedFor,
                () = self.paced_anew.notified() => Since::Due,
            };
        }
    }

    /// Notes what is wrong with the server, for people. That the agent has no SVID of its own is told as that.
    fn note(&self, fault: Option<&CallFault>) {
        match fault {
            Some(CallFault::Server(ServerError::NoSvid)) => {}
            Some(fault) => self.faults.failed(ServerUse::Sync, chain(fault)),
            None => self.faults.works(ServerUse::Sync),
        }
    }

    /// Asks for everything, and publishes what is another. What was learnt before a failure is published too.
    async fn sync(&self, synced: &mut Synced) -> Result<(), CallFault> {
        let deadline = Instant::now() + SYNC_WITHIN;
        let (entries, own) =
            tokio::join!(self.calls.entries(synced.entries.clone(), deadline), self.calls.bundle(deadline));
        let (entries, own) = (entries?, own?);
        if entries.malformed > 0 {
            if let Some(metrics) = &self.server_metrics {
                metrics.malformed(entries.malformed);
            }
            tracing::warn!(
                count = entries.malformed,
                "received malformed entries from the server, which are left out; are the versions of server and agent compatible?"
            );
        }
        synced.entries = entries.known;
        let index = Arc::clone(&synced.entries.index);
        if !Arc::ptr_eq(&synced.federated.0, &index) {
            let of_entries = index.entries().iter().flat_map(|entry| &entry.federates_with).cloned();
            let mut all: BTreeSet<TrustDomain> = of_entries.collect();
            if all.len() > MOST_FEDERATED {
                tracing::warn!(
                    count = all.len(),
                    most = MOST_FEDERATED,
                    "the entries federate with more trust domains than the agent keeps bundles of; the last ones have no bundle"
                );
                all = all.into_iter().take(MOST_FEDERATED).collect();
            }
            synced.federated = (Arc::clone(&index), all);
        }
        let (federated, done) = self.federated(synced, deadline).await;
        self.publish(index, own.bundle, federated, own.tainted).await;
        done
    }

    /// The bundles of the trust domains that the entries federate with. Where one cannot be had, the one that is known
    /// stays. What is in it others decide: one that is of no use is no reason to ask the server less often.
    async fn federated(
        &self,
        synced: &mut Synced,
        deadline: Instant,
    ) -> (BTreeMap<TrustDomain, Arc<Bundle>>, Result<(), CallFault>) {
        let before = Arc::clone(&self.world.borrow());
        let asked: Vec<TrustDomain> = synced.federated.1.iter().cloned().collect();
        let answers = stream::iter(asked).map(|trust_domain| async move {
            let answer = self.calls.federated_bundle(&trust_domain, deadline).await;
            (trust_domain, answer)
        });
        let answers: Vec<_> = answers.buffer_unordered(BUNDLES_AT_ONCE).collect().await;
        let (mut federated, mut done) = (BTreeMap::new(), Ok(()));
        let mut missing = BTreeSet::new();
        for (trust_domain, answer) in answers {
            let known = before.bundles.federated.get(&trust_domain);
            match answer {
                Ok(Some(told)) => {
                    let bundle = known.filter(|known| ***known == told.bundle).map(Arc::clone);
                    let bundle = bundle.unwrap_or_else(|| {
                        if !told.bundle.has_x509() {
                            tracing::warn!(%trust_domain, "the bundle of a trust domain has no X.509 authority: its X.509-SVIDs are not trusted");
                        }
                        Arc::new(told.bundle)
                    });
                    federated.insert(trust_domain, bundle);
                }
                Ok(None) => {
                    if !synced.missing.contains(&trust_domain) {
                        tracing::warn!(%trust_domain, "the server has no bundle of a trust domain that entries federate with");
                    }
                    missing.insert(trust_domain);
                }
                Err(error) => {
                    if let Some(known) = known {
                        federated.insert(trust_domain.clone(), Arc::clone(known));
                    }
                    if !error.is_answer() {
                        done = Err(error);
                        continue;
                    }
                    if !synced.missing.contains(&trust_domain) {
                        let error = chain(&error);
                        tracing::warn!(%trust_domain, error, "the bundle of a trust domain is not usable; the one before stays in force");
                    }
                    missing.insert(trust_domain);
                }
            }
        }
        synced.missing = missing;
        (federated, done)
    }

    /// Publishes a world, if it is another.
    async fn publish(
        &self,
        index: Arc<EntryIndex>,
        own: Bundle,
        federated: BTreeMap<TrustDomain, Arc<Bundle>>,
        tainted: Tainted,
    ) {
        let before = Arc::clone(&self.world.borrow());
        let own_is_same = *before.bundles.own == own;
        let same = own_is_same
            && Arc::ptr_eq(&before.index, &index)
            && *before.tainted == tainted
            && before.bundles.federated.len() == federated.len()
            && before.bundles.federated.values().zip(federated.values()).all(|(a, b)| Arc::ptr_eq(a, b));
        if same {
            return;
        }
        let own = if own_is_same { Arc::clone(&before.bundles.own) } else { Arc::new(own) };
        let trusted =
            (!own_is_same || *before.tainted != tainted).then(|| (Arc::clone(&own), tainted.clone()));
        let bundles = Bundles { own, federated };
        self.world.send_replace(Arc::new(World { index, bundles, tainted: Arc::new(tainted) }));
        if let Some((own, tainted)) = trusted
            && let Err(error) = self.calls.trust(&own, &tainted).await
        {
            tracing::error!(error = chain(&error), "cannot save the bundle for the next start");
        }
    }
}

/// Ends when the agent has another SVID of its own since its standing was last looked at.
async fn shown_anew(own: &mut Option<watch::Receiver<OwnStanding>>) {
    if let Some(own) = own {
        while own.changed().await.is_ok() {
            if matches!(&*own.borrow_and_update(), OwnStanding::Serving { trouble: None, .. }) {
                return;
            }
        }
    }
    pending().await
}

impl Synced {
    /// Says once that syncs fail, and once that they do no more. Why the agent has no SVID of its own is said elsewhere.
    fn say(&mut self, fault: Option<&CallFault>, world: &World) {
        if let Some(CallFault::Server(error @ ServerError::NoSvid)) = fault {
            tracing::debug!(%error, "cannot sync with the server");
            return;
        }
        let was_known = self.is_known;
        self.is_known |= fault.is_none();
        match (fault, std::mem::replace(&mut self.failing, fault.is_some())) {
            (Some(error), false) if was_known => {
                tracing::warn!(error = chain(error), "cannot sync with the server; what is known is served");
            }
            (Some(error), false) => tracing::warn!(
                error = chain(error),
                "cannot fetch the entries from the server, and nobody is served until it answers; trying again"
            ),
            (Some(error), true) => tracing::debug!(error = chain(error), "cannot sync with the server"),
            (None, true) if was_known => tracing::info!("synced with the server again"),
            (None, _) if !was_known => tracing::info!(
                entries = world.index.entries().len(),
                bundles = 1 + world.bundles.federated.len(),
                "the server has told its entries"
            ),
            (None, _) => {}
        }
    }
}
