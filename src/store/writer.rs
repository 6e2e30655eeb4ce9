//! The only writer of the store: follows the issuer's world, what attestors learn and the configuration's policy, and
//! renews the SVIDs that are streamed.
//!
//! Writers take turns (a mutex that is never held across an await), each publishes one whole snapshot, and readers
//! never wait for them. A renewal that fails is tried again soon and changes nothing meanwhile: the valid SVID is
//! served.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet, time::Instant};

use super::{
    StoreMetrics,
    settings::Policy,
    snapshot::{Snapshot, Store},
    x509_cache::X509Cache,
};
use crate::{
    attest::Attestor,
    identity::Tainted,
    issuer::{Issuer, SvidKind, World},
    os::clock::{Clock, sleep_to_beat, sleep_until},
    telemetry::{chain, trouble::Trouble},
};

/// The most SVIDs that the issuer is asked to renew in one batch: a SPIRE Server signs as many for one address in a
/// second.
const BATCH: usize = 500;

/// How many batches are under way at once.
const BATCHES_AT_ONCE: usize = 4;

/// The longest time between two looks at what is due for renewal.
const LOOK: Duration = Duration::from_secs(10);

/// The shortest time between two looks. What was renewed in between is published as one.
const PAUSE: Duration = Duration::from_millis(250);

/// Writes the store.
pub struct Writer {
    store: Arc<Store>,
    attestor: Arc<Attestor>,
    issuer: Arc<dyn Issuer>,
    world: watch::Receiver<Arc<World>>,
    clock: Clock,
    x509: Arc<X509Cache>,
    metrics: Arc<StoreMetrics>,
    /// Held while writing: the world that was published last.
    published: Mutex<Arc<World>>,
    /// What keeps SVIDs from being made ahead and renewed.
    trouble: Arc<Mutex<Trouble>>,
}

impl Writer {
    /// Builds the store from the issuer's world and this policy. `attestor` is told what the entries of each snapshot
    /// ask for.
    pub fn new(
        issuer: Arc<dyn Issuer>,
        attestor: Arc<Attestor>,
        clock: Clock,
        x509: Arc<X509Cache>,
        metrics: Arc<StoreMetrics>,
        policy: Policy,
    ) -> Self {
        let world = issuer.world();
        let first = Arc::clone(&world.borrow());
        let questions = attestor.prepare_for(&first.index);
        let store = Arc::new(Store::new(&first, questions, Arc::new(policy)));
        metrics.set_snapshot(&store.snapshot());
        Self {
            store,
            attestor,
            issuer,
            world,
            clock,
            x509,
            metrics,
            published: Mutex::new(first),
            trouble: Arc::default(),
        }
    }

    /// What requests read.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Puts `policy` in force, together with what `declare` makes the issuer publish.
    pub fn replace(&self, policy: Policy, declare: impl FnOnce()) {
        let mut published = self.turn();
        declare();
        self.publish(&mut published, Arc::new(policy));
    }

    /// Publishes what changes and renews what falls due, for ever.
    pub async fn run(self: Arc<Self>) {
        tokio::join!(self.follow(), self.renew());
    }

    async fn follow(&self) {
        let (mut world, mut news) = (self.world.clone(), self.attestor.news());
        loop {
            // The senders live as long as the issuer and the attestor, and these as long as this.
            let (lives, pause) = tokio::select! {
                changed = world.changed() => (changed.is_ok(), Duration::ZERO),
                // Attestors may learn a lot at once, as at a start: one snapshot is enough for all of it.
                learnt = news.changed() => (learnt.is_ok(), PAUSE),
            };
            if !lives {
                return;
            }
            let before = self.store.snapshot();
            self.catch_up();
            self.distrust(&before).await;
            tokio::time::sleep(pause).await;
        }
    }

    /// Publishes what is not published yet: [`Writer::replace`] may have been first, and what was learnt may be of no
    /// entry.
    fn catch_up(&self) {
        let mut published = self.turn();
        let snapshot = self.store.snapshot();
        let is_other_world = !Arc::ptr_eq(&published, &self.world.borrow());
        if is_other_world || !Arc::ptr_eq(&snapshot.questions, &self.attestor.prepare_for(&published.index)) {
            self.publish(&mut published, Arc::clone(&snapshot.policy));
        }
    }

    /// Has SVIDs renewed whose authority was tainted or taken out since `before`.
    async fn distrust(&self, before: &Snapshot) {
        let snapshot = self.store.snapshot();
        if before.tainted != snapshot.tainted {
            self.x509.distrust(&snapshot.tainted).await;
        }
        let (old, new) = (&before.bundles.own, &snapshot.bundles.own);
        if !Arc::ptr_eq(old, new) {
            let gone = old.x509_authorities.iter().filter(|der| !new.x509_authorities.contains(der));
            self.x509.distrust(&Tainted::new(gone.map(Vec::as_slice), [])).await;
        }
    }

    async fn renew(&self) {
        let mut running = JoinSet::new();
        loop {
            let due_changed = self.x509.due_changed.notified();
            while let Some(ended) = running.try_join_next() {
                if let Err(panic) = ended {
                    tracing::error!(%panic, "a renewal of x509-svids ended early");
                }
            }
            self.start_renewals(&mut running);
            if self.x509.take_replaced() {
                self.metrics.renewal.rotated();
                let mut published = self.turn();
                self.publish(&mut published, Arc::clone(&self.store.snapshot().policy));
            }
            let next = self.x509.next_due();
            self.metrics.renewal.set_due(next);
            self.metrics.set_x509_svids(self.x509.counts());
            let due = async {
                match next {
                    Some(next) => sleep_until(self.clock, next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                // Whatever is due, and not by the clock: only so is it seen that that one was set back.
                () = sleep_to_beat(LOOK) => {}
                () = due_changed => {}
            }
            // Many SVIDs may be made at once; one look is enough for all of them.
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Has the issuer renew what is due, in batches side by side. While it cannot sign, nothing is put off: it is asked
    /// again at the next look.
    fn start_renewals(&self, running: &mut JoinSet<()>) {
        let room = BATCHES_AT_ONCE.saturating_sub(running.len());
        if room == 0 || self.issuer.can_sign(SvidKind::X509).is_err() {
            return;
        }
        let snapshot = self.store.snapshot();
        let mut due = self.x509.due(room * BATCH, |id| snapshot.index.get(id).cloned());
        due.extend(self.x509.missing(room * BATCH - due.len(), &snapshot.index));
        for batch in due.chunks(BATCH) {
            let (x509, batch, trouble) = (Arc::clone(&self.x509), batch.to_vec(), Arc::clone(&self.trouble));
            running.spawn(async move {
                let done = x509.renew(&batch).await.map_err(|error| chain(&error));
                let mut trouble = trouble.lock().unwrap_or_else(PoisonError::into_inner);
                match done {
                    Ok(()) if trouble.ends() => tracing::info!("there are new x509-svids again"),
                    Ok(()) => {}
                    Err(error) if trouble.is_due(&error, Instant::now()) => tracing::warn!(
                        error,
                        "cannot get new x509-svids; those that are valid are served, trying again"
                    ),
                    Err(error) => tracing::debug!(error, "cannot get new x509-svids"),
                }
            });
        }
    }

    fn turn(&self) -> std::sync::MutexGuard<'_, Arc<World>> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, published: &mut Arc<World>, policy: Arc<Policy>) {
        *published = Arc::clone(&self.world.borrow());
        let questions = self.attestor.prepare_for(&published.index);
        self.metrics.set_snapshot(&self.store.publish(published, questions, policy));
    }
}
