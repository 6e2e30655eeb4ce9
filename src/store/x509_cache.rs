//! X.509-SVIDs: one per entry, made when somebody first asks, shared by all its callers and streams.
//!
//! An SVID is renewed around half of its life, at a moment drawn once when it was made (SPIRE draws anew at each
//! check, which moves the moment early: `pkg/common/rotationutil`). Those that an open stream holds are renewed by
//! [`super::Sync`]; the others when they are next asked for. While renewal fails the old one is served until it
//! expires, and never after. Bound: `x509_svid_cache_max_size` SVIDs, beyond which only those that an open stream
//! holds are kept, and streams have bounds of their own.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use hashbrown::HashMap;
use tokio::sync::{Notify, OnceCell};

use super::{entitlement::Charged, signer::Signer};
use crate::{
    identity::{Entry, EntryId, X509Svid},
    issuer::embedded::IssuerError,
};

/// The longest wait before a failed renewal is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// An SVID and when it is due.
#[derive(Debug)]
struct Held {
    svid: Arc<X509Svid>,
    /// Of the entry it was made of.
    revision: i64,
    renew_at: SystemTime,
    /// Grows with each use: the smallest is the one that nobody has asked for the longest.
    used: u64,
}

#[derive(Debug, Default)]
struct Inner {
    held: HashMap<EntryId, Held, ahash::RandomState>,
    /// How many open streams hold the SVID of an entry.
    streams: HashMap<EntryId, usize, ahash::RandomState>,
    /// Who is being made: one at a time per entry as it is. After a reload nobody waits for what the entry was.
    making: HashMap<(EntryId, i64), Arc<OnceCell<Served>>, ahash::RandomState>,
    uses: u64,
    /// An SVID that a stream holds was replaced since [`super::Sync`] last looked.
    replaced: bool,
}

/// The X.509-SVIDs that were made.
#[derive(Debug)]
pub struct X509Cache {
    signer: Arc<Signer>,
    inner: Mutex<Inner>,
    max: AtomicUsize,
    availability_target: Mutex<Option<Duration>>,
    /// Wakes [`super::Sync`] when a due date came nearer.
    pub(super) due_changed: Notify,
}

/// An SVID to serve, and when the next one is due.
#[derive(Clone, Debug)]
pub struct Served {
    /// The SVID.
    pub svid: Arc<X509Svid>,
    /// When it is to be renewed; in the past when that has failed so far.
    pub renew_at: SystemTime,
    /// It was made for this call.
    signed: bool,
}

impl Served {
    /// When an answer made of it may be repeated without asking for it again: not before it is valid, and also where renewal
    /// fails and is put off, no longer than it is valid.
    pub fn fresh(&self) -> Range<SystemTime> {
        self.svid.not_before..self.renew_at.min(self.svid.not_after)
    }
}

/// How many SVIDs there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X509Counts {
    /// All.
    pub cached: usize,
    /// Those that an open stream holds.
    pub active: usize,
}

impl X509Cache {
    /// Keeps about `max` SVIDs.
    pub fn new(signer: Arc<Signer>, max: usize, availability_target: Option<Duration>) -> Self {
        Self {
            signer,
            inner: Mutex::default(),
            max: AtomicUsize::new(max),
            availability_target: Mutex::new(availability_target),
            due_changed: Notify::new(),
        }
    }

    /// Takes new settings; SVIDs that are there keep the due dates they have.
    pub fn reconfigure(&self, max: usize, availability_target: Option<Duration>) {
        self.max.store(max, Ordering::Relaxed);
        *self.availability_target.lock().unwrap_or_else(PoisonError::into_inner) = availability_target;
    }

    /// The SVID of each entry of the call, in their order: the one that is there, or a new one.
    ///
    /// # Errors
    /// What the issuer says, when there is no valid one to serve meanwhile.
    pub async fn fetch(&self, charged: &mut Charged) -> Result<Vec<Served>, IssuerError> {
        let Charged { entries, bill, .. } = charged;
        let mut svids = Vec::with_capacity(entries.len());
        for entry in entries.iter() {
            let served = self.of_entry(entry).await?;
            if served.signed {
                bill.signed(&entry.spiffe_id);
            }
            svids.push(served);
        }
        Ok(svids)
    }

    async fn of_entry(&self, entry: &Arc<Entry>) -> Result<Served, IssuerError> {
        let now = self.signer.clock().now();
        match self.find(entry, now) {
            Found::Fresh(served) => Ok(served),
            Found::Due(old) => Ok(self.make(entry).await.unwrap_or(old)),
            Found::Nothing => self.make(entry).await,
        }
    }

    /// Counts a stream that holds the SVIDs of its entries until the returned value is dropped.
    pub fn hold(self: &Arc<Self>, charged: &Charged) -> Hold {
        let ids: Vec<EntryId> = charged.entries().iter().map(|entry| entry.id.clone()).collect();
        let mut inner = self.lock();
        for id in &ids {
            *inner.streams.entry_ref(id).or_default() += 1;
        }
        drop(inner);
        Hold { cache: Arc::clone(self), ids }
    }

    /// How many there are.
    pub fn counts(&self) -> X509Counts {
        let inner = self.lock();
        X509Counts { cached: inner.held.len(), active: inner.streams.len() }
    }

    /// Forgets what no stream holds: memory is short.
    pub fn shrink(&self) {
        let mut inner = self.lock();
        let Inner { held, streams, .. } = &mut *inner;
        held.retain(|id, _| streams.contains_key(id));
        held.shrink_to_fit();
    }

    /// When the next SVID that a stream holds is due.
    pub(super) fn next_due(&self) -> Option<SystemTime> {
        let inner = self.lock();
        inner.streams.keys().filter_map(|id| inner.held.get(id)).map(|held| held.renew_at).min()
    }

    /// Renews what is due and held by a stream, and forgets what is due and held by none. `current` finds an entry as
    /// it is now.
    pub(super) async fn renew(&self, current: impl Fn(&EntryId) -> Option<Arc<Entry>>) -> Renewed {
        let now = self.signer.clock().now();
        let due: Vec<EntryId> = {
            let mut inner = self.lock();
            let Inner { held, streams, .. } = &mut *inner;
            // One that is not valid yet was made before the clock was set back.
            let due = |held: &Held| held.renew_at <= now || now < held.svid.not_before;
            held.retain(|id, held| !due(held) || streams.contains_key(id));
            held.iter().filter(|(_, held)| due(held)).map(|(id, _)| id.clone()).collect()
        };
        let mut renewed = Renewed::default();
        for id in due {
            match current(&id) {
                // The entry is gone; its streams are told by the snapshot without it.
                None => drop(self.lock().held.remove(&id)),
                Some(entry) => match self.make(&entry).await {
                    Ok(_) => {}
                    Err(error) => {
                        if let Some(held) = self.lock().held.get_mut(&id) {
                            held.renew_at = now + RETRY;
                        }
                        renewed.failed = Some(error);
                    }
                },
            }
        }
        renewed.replaced = std::mem::take(&mut self.lock().replaced);
        renewed
    }

    fn find(&self, entry: &Entry, now: SystemTime) -> Found {
        let mut inner = self.lock();
        inner.uses += 1;
        let uses = inner.uses;
        let Some(held) = inner.held.get_mut(&entry.id) else { return Found::Nothing };
        held.used = uses;
        // `not_before` lies in the future only when the clock was set back.
        let valid = held.svid.not_before <= now && now < held.svid.not_after;
        let served = Served { svid: Arc::clone(&held.svid), renew_at: held.renew_at, signed: false };
        match (held.revision == entry.revision && valid, now < held.renew_at) {
            (false, _) => Found::Nothing,
            (true, true) => Found::Fresh(served),
            (true, false) => Found::Due(served),
        }
    }

    /// Makes the SVID of `entry`, once for all who ask meanwhile.
    async fn make(&self, entry: &Arc<Entry>) -> Result<Served, IssuerError> {
        let key = (entry.id.clone(), entry.revision);
        let cell = Arc::clone(self.lock().making.entry(key.clone()).or_default());
        let made = cell
            .get_or_try_init(|| async {
                let svid = Arc::new(self.signer.x509(Arc::clone(entry)).await?);
                Ok(self.keep(entry, svid))
            })
            .await
            .cloned();
        let mut inner = self.lock();
        if inner.making.get(&key).is_some_and(|current| Arc::ptr_eq(current, &cell)) {
            inner.making.remove(&key);
        }
        made
    }

    fn keep(&self, entry: &Entry, svid: Arc<X509Svid>) -> Served {
        let target = *self.availability_target.lock().unwrap_or_else(PoisonError::into_inner);
        let renew_at = renew_at(svid.not_before, svid.not_after, target, &mut ahash_random());
        let max = self.max.load(Ordering::Relaxed);
        let mut inner = self.lock();
        inner.uses += 1;
        let used = inner.uses;
        if !inner.held.contains_key(&entry.id) && inner.held.len() >= max {
            inner.make_room();
        }
        let held = Held { svid: Arc::clone(&svid), revision: entry.revision, renew_at, used };
        let before = inner.held.insert(entry.id.clone(), held);
        inner.replaced |= before.is_some() && inner.streams.contains_key(&entry.id);
        drop(inner);
        self.due_changed.notify_one();
        Served { svid, renew_at, signed: true }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Forgets the tenth that nobody has asked for the longest and no stream holds, so that the search for it is paid
    /// by many.
    fn make_room(&mut self) {
        let mut idle: Vec<(u64, EntryId)> = self
            .held
            .iter()
            .filter(|(id, _)| !self.streams.contains_key(*id))
            .map(|(id, held)| (held.used, id.clone()))
            .collect();
        idle.sort_unstable();
        let room = idle.len().div_ceil(10);
        for (_, id) in idle.into_iter().take(room) {
            self.held.remove(&id);
        }
    }
}

enum Found {
    Fresh(Served),
    /// Valid, and due for renewal.
    Due(Served),
    Nothing,
}

/// What [`X509Cache::renew`] did.
#[derive(Debug, Default)]
pub(super) struct Renewed {
    /// An SVID that a stream holds was replaced, here or by a call that asked for it.
    pub(super) replaced: bool,
    /// The last failure, if there was one; it is tried again within [`RETRY`].
    pub(super) failed: Option<IssuerError>,
}

/// A stream's hold on the SVIDs it sent.
#[derive(Debug)]
pub struct Hold {
    cache: Arc<X509Cache>,
    ids: Vec<EntryId>,
}

impl Hold {
    /// Whether it is a hold on the SVIDs of just the call's entries.
    pub fn is_of(&self, charged: &Charged) -> bool {
        self.ids.iter().eq(charged.entries().iter().map(|entry| &entry.id))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut inner = self.cache.lock();
        for id in &self.ids {
            if let Some(streams) = inner.streams.get_mut(id) {
                *streams -= 1;
                if *streams == 0 {
                    inner.streams.remove(id);
                }
            }
        }
    }
}

/// When to renew: at half of the lifetime, give or take a tenth of that half; earlier by `availability_target` when
/// that leaves at least 12 hours of rotation (SPIRE: `pkg/common/rotationutil/rotationutil.go`). `random` gives
/// numbers in 0..1.
pub(super) fn renew_at(
    not_before: SystemTime,
    not_after: SystemTime,
    availability_target: Option<Duration>,
    random: &mut impl FnMut() -> f64,
) -> SystemTime {
    const MIN_GRACE: Duration = Duration::from_secs(12 * 3600);
    const MAX_JITTER: Duration = Duration::from_secs(600);
    let lifetime = not_after.duration_since(not_before).unwrap_or_default();
    let half_life = not_after - lifetime.mul_f64(0.5 * (0.9 + 0.2 * random()));
    match availability_target {
        Some(target) if lifetime.checked_sub(target).is_some_and(|grace| grace > MIN_GRACE) => {
            let for_target = not_after - target - MAX_JITTER.mul_f64(random());
            for_target.min(half_life).max(not_before)
        }
        _ => half_life,
    }
}

/// Numbers in 0..1 that spread work over time; nothing secret depends on them.
pub(super) fn ahash_random() -> impl FnMut() -> f64 {
    use std::hash::{BuildHasher as _, Hasher as _};
    let state = ahash::RandomState::new();
    let mut at = 0_u64;
    move || {
        at += 1;
        let mut hasher = state.build_hasher();
        hasher.write_u64(at);
        // 32 bits are plenty, and convert without loss.
        let bits = u32::try_from(hasher.finish() >> 32).unwrap_or(u32::MAX);
        f64::from(bits) / (f64::from(u32::MAX) + 1.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3600;

    #[test]
    fn renewal_is_due_where_spire_has_it() {
        let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (case, lifetime, target, random, want) in [
            ("middle", 2 * HOUR, None, 0.5, HOUR),
            ("early edge", 2 * HOUR, None, 1.0, HOUR - HOUR / 10),
            ("late edge", 2 * HOUR, None, 0.0, HOUR + HOUR / 10),
            ("target", 48 * HOUR, Some(30 * HOUR), 0.0, 18 * HOUR),
            ("target, jitter", 48 * HOUR, Some(30 * HOUR), 0.5, 18 * HOUR - 300),
            ("half life is nearer than the target", 96 * HOUR, Some(24 * HOUR), 0.5, 48 * HOUR),
            ("too short for the target", 30 * HOUR, Some(24 * HOUR), 0.5, 15 * HOUR),
            ("no lifetime", 0, None, 0.5, 0),
        ] {
            let not_after = born + Duration::from_secs(lifetime);
            let target = target.map(Duration::from_secs);
            let got = renew_at(born, not_after, target, &mut || random);
            assert_eq!(got, born + Duration::from_secs(want), "{case}");
        }
    }

    #[test]
    fn an_answer_is_not_repeated_beyond_its_end() {
        let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (case, lifetime, renew_in, fresh_for) in
            [("renewed in time", 100, 50, 50), ("renewal put off beyond the end", 100, 104, 100)]
        {
            let svid = Arc::new(X509Svid {
                spiffe_id: crate::identity::SpiffeId::parse("spiffe://td/web").unwrap(),
                chain: Vec::new(),
                key: Vec::new().into(),
                not_before: born,
                not_after: born + Duration::from_secs(lifetime),
            });
            let served = Served { svid, renew_at: born + Duration::from_secs(renew_in), signed: false };
            assert_eq!(served.fresh(), born..born + Duration::from_secs(fresh_for), "{case}");
        }
    }

    proptest! {
        /// Whatever is drawn, renewal lies within the validity and leaves at least 45 % of it.
        #[test]
        fn renewal_lies_within_validity(
            lifetime in 1u64..10_000_000,
            target in proptest::option::of(0u64..10_000_000),
            draws in proptest::collection::vec(0.0f64..1.0, 2),
        ) {
            let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
            let not_after = born + Duration::from_secs(lifetime);
            let mut at = 0;
            let got = renew_at(born, not_after, target.map(Duration::from_secs), &mut || { at += 1; draws[at - 1] });
            prop_assert!(got >= born);
            prop_assert!(not_after.duration_since(got).unwrap() >= Duration::from_secs(lifetime).mul_f64(0.449));
        }

        #[test]
        fn random_numbers_are_in_range(_n in 0..8) {
            let mut random = ahash_random();
            for _ in 0..100 {
                prop_assert!((0.0..1.0).contains(&random()));
            }
        }
    }
}
