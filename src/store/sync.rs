//! The only writer of the store: reloads, rotation of the issuer's keys, renewal of SVIDs that are streamed.
//!
//! Writers take turns (a mutex that is never held across an await), each publishes one whole snapshot, and readers
//! never wait for them. What fails is tried again soon, said once when it begins and once when it ends, and changes
//! nothing meanwhile: the agent serves what it has.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use super::{settings::Policy, signer::Signer, snapshot::Store, x509_cache::X509Cache};
use crate::{
    identity::{Bundle, Bundles, Entry, EntryIndex, TrustDomain},
    issuer::embedded::{IssuerError, ROTATION_RETRY},
    os::clock::{Clock, sleep_until},
    telemetry::chain,
    telemetry::metrics::{Metrics, Rotated, SnapshotSizes, SvidState},
};

/// The longest time between two looks.
const LOOK: Duration = Duration::from_secs(10);

/// The shortest time between two looks.
const PAUSE: Duration = Duration::from_millis(250);

/// Writes the store.
#[derive(Debug)]
pub struct Sync {
    store: Arc<Store>,
    signer: Arc<Signer>,
    x509: Arc<X509Cache>,
    metrics: Arc<Metrics>,
    writing: Mutex<()>,
}

impl Sync {
    /// Builds the store from what the issuer and the configuration have, and the one who may change it.
    pub fn new(
        signer: Arc<Signer>,
        x509: Arc<X509Cache>,
        metrics: Arc<Metrics>,
        entries: Vec<Arc<Entry>>,
        federated: BTreeMap<TrustDomain, Arc<Bundle>>,
        policy: Policy,
    ) -> Self {
        let bundles = Bundles { own: signer.issuer().bundle(), federated };
        let index = Arc::new(EntryIndex::new(entries));
        metrics.set_snapshot(sizes(1, &index, &bundles));
        let store = Arc::new(Store::new(index, bundles, Arc::new(policy)));
        Self { store, signer, x509, metrics, writing: Mutex::new(()) }
    }

    /// What requests read.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Puts the configuration's part of the world in force.
    pub fn replace(
        &self,
        entries: Vec<Arc<Entry>>,
        federated: BTreeMap<TrustDomain, Arc<Bundle>>,
        policy: Policy,
    ) {
        let index = Arc::new(EntryIndex::new(entries));
        self.write(|now| {
            let bundles = Bundles { own: Arc::clone(&now.bundles.own), federated };
            (index, bundles, Arc::new(policy))
        });
    }

    /// Rotates and renews whatever falls due, for ever.
    pub async fn run(self: Arc<Self>) {
        let clock = self.signer.clock();
        let mut failing = false;
        loop {
            let due_changed = self.x509.due_changed.notified();
            let next = self.maintain(&mut failing).await;
            tokio::select! {
                () = sleep_until(clock, next) => {}
                // Looked at again every ten seconds whatever is due, and not by the clock: only so is it seen that
                // that one was set back, after which the issuer cannot sign until it has rotated. With nothing due,
                // a look costs microseconds.
                () = tokio::time::sleep(LOOK) => {}
                () = due_changed => {}
            }
            // Many SVIDs may be made at once; one look is enough for all of them.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Does what is due now; returns when to look again.
    async fn maintain(&self, failing: &mut bool) -> SystemTime {
        let now = self.signer.clock().now();
        let next_rotation = self.rotate(now, failing).await;
        self.metrics.set_rotation_due(Rotated::Issuer, Some(next_rotation));

        let snapshot = self.store.snapshot();
        let renewed = self.x509.renew(|id| snapshot.index.get(id).cloned()).await;
        if let Some(error) = &renewed.failed {
            tracing::warn!(%error, "could not renew x509-svids; the valid ones are served");
        }
        if renewed.replaced {
            self.metrics.rotated(Rotated::X509Svid);
            self.write(|now| (Arc::clone(&now.index), now.bundles.clone(), Arc::clone(&now.policy)));
        }
        let next_renewal = self.x509.next_due();
        self.metrics.set_rotation_due(Rotated::X509Svid, next_renewal);
        let counts = self.x509.counts();
        self.metrics.set_x509_svids(SvidState::Cached, counts.cached);
        self.metrics.set_x509_svids(SvidState::Active, counts.active);
        next_renewal.map_or(next_rotation, |at| at.min(next_rotation))
    }

    async fn rotate(&self, now: SystemTime, failing: &mut bool) -> SystemTime {
        let issuer = Arc::clone(self.signer.issuer());
        // It may write to the disk, and make an RSA key.
        let done = tokio::task::spawn_blocking(move || issuer.rotate(now)).await;
        match done {
            Ok(Ok(rotation)) => {
                if rotation.bundle_changed {
                    self.metrics.rotated(Rotated::Issuer);
                    let own = self.signer.issuer().bundle();
                    self.write(|now| {
                        let bundles = Bundles { own, federated: now.bundles.federated.clone() };
                        (Arc::clone(&now.index), bundles, Arc::clone(&now.policy))
                    });
                }
                self.say(failing, rotation.fault.as_ref());
                rotation.next
            }
            Ok(Err(error)) => {
                self.say(failing, Some(&error));
                now + ROTATION_RETRY
            }
            Err(panic) => {
                tracing::error!(%panic, "rotation of the issuer's keys ended early");
                now + ROTATION_RETRY
            }
        }
    }

    /// Says once that rotation fails, and once that it does no more.
    fn say(&self, failing: &mut bool, fault: Option<&IssuerError>) {
        match (fault, std::mem::replace(failing, fault.is_some())) {
            (Some(error), false) => {
                tracing::error!(error = chain(error), "the issuer cannot rotate its keys; it is tried again");
            }
            (None, true) => tracing::info!("the issuer rotates its keys again"),
            (Some(_), true) | (None, false) => {}
        }
    }

    fn write(&self, next: impl FnOnce(&super::Snapshot) -> (Arc<EntryIndex>, Bundles, Arc<Policy>)) {
        let _turn = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (index, bundles, policy) = next(&self.store.snapshot());
        let generation = self.store.snapshot().generation + 1;
        self.metrics.set_snapshot(sizes(generation, &index, &bundles));
        self.store.publish(index, bundles, policy);
    }

    /// The clock that all of it follows.
    pub fn clock(&self) -> Clock {
        self.signer.clock()
    }
}

fn sizes(generation: u64, index: &EntryIndex, bundles: &Bundles) -> SnapshotSizes {
    SnapshotSizes {
        generation,
        entries: index.entries().len(),
        x509_authorities: bundles.own.x509_authorities.len(),
        jwt_authorities: bundles.own.jwt_authorities.len(),
        federated_bundles: bundles.federated.len(),
    }
}
