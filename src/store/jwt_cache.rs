//! JWT-SVIDs: one per SPIFFE ID, lifetime and set of audiences.
//!
//! A token is made once however many ask for it at the same time. In the second half of its life (the moment is
//! drawn once) the first caller who asks starts the making of a fresh one in the background and is answered, as all
//! others, with the valid one; only when there is none does a caller wait for a signature. An expired token is never
//! served.
//!
//! Bound: `jwt_svid_cache_max_size` tokens. When it is reached, the identity with the most tokens gives up the one
//! it has not used for the longest: a caller that asks for ever new audiences pushes out its own tokens, and not
//! its neighbours'. A token holds its audiences, so one for very long ones is not kept ([`MOST_AUDIENCE`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest::{Context, SHA256};
use hashbrown::HashMap;
use tokio::sync::OnceCell;

use super::{
    entitlement::Charged,
    signer::Signer,
    x509_cache::{ahash_random, renew_at},
};
use crate::{
    identity::{Entry, JwtSvid, SpiffeId},
    issuer::embedded::IssuerError,
    telemetry::metrics::{CacheResult, Metrics},
};

/// Tokens for more text of audiences than this, in bytes as JSON has it, are made for each call and not kept, so that a number of
/// tokens bounds their bytes.
const MOST_AUDIENCE: usize = 1024;

/// What the audiences take in a token, before it is encoded.
fn audience_bytes(audience: &[String]) -> usize {
    let of = |byte: u8| if byte < b' ' || matches!(byte, b'"' | b'\\') { 6 } else { 1 };
    audience.iter().map(|one| 3 + one.bytes().map(of).sum::<usize>()).sum()
}

/// How long after a failed renewal in the background the next one may start.
const RETRY: Duration = Duration::from_secs(1);

/// A token, and what it took.
#[derive(Clone, Debug)]
struct Fetched {
    /// The token.
    svid: Arc<JwtSvid>,
    /// This call made a signature necessary, or waited for one.
    signed: bool,
}

type Key = [u8; 32];
type Made = Arc<OnceCell<Arc<JwtSvid>>>;

#[derive(Debug)]
struct Slot {
    owner: SpiffeId,
    token: Made,
    /// When a fresh one is made in the background; `None` until there is a token, and while a fresh one is made.
    renew_at: Option<SystemTime>,
    /// Place in the owner's order.
    place: u64,
    /// Was used since it was given that place.
    used: bool,
}

#[derive(Debug, Default)]
struct Inner {
    slots: HashMap<Key, Slot, ahash::RandomState>,
    /// The slots of an identity, oldest place first.
    owners: HashMap<SpiffeId, BTreeMap<u64, Key>, ahash::RandomState>,
    /// Who has how many; the last has the most.
    by_count: BTreeSet<(usize, SpiffeId)>,
    places: u64,
}

/// The JWT-SVIDs that were made.
#[derive(Debug)]
pub struct JwtCache {
    signer: Arc<Signer>,
    metrics: Arc<Metrics>,
    inner: Mutex<Inner>,
    max: AtomicUsize,
}

impl JwtCache {
    /// Keeps at most `max` tokens (at least one).
    pub fn new(signer: Arc<Signer>, metrics: Arc<Metrics>, max: usize) -> Self {
        Self { signer, metrics, inner: Mutex::default(), max: AtomicUsize::new(max.max(1)) }
    }

    /// Takes a new bound; tokens beyond it are forgotten at once.
    pub fn resize(&self, max: usize) {
        self.max.store(max.max(1), Ordering::Relaxed);
        self.trim(max.max(1));
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.lock().slots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all tokens: memory is short.
    pub fn clear(&self) {
        let old = std::mem::take(&mut *self.lock());
        drop(old);
    }

    /// A token for each entry of the call and `audience`, in the order of the entries; made now where there is none.
    ///
    /// # Errors
    /// What the issuer says, when there is no valid token to serve meanwhile.
    pub async fn fetch(
        self: &Arc<Self>,
        charged: &mut Charged,
        audience: &[String],
    ) -> Result<Vec<Arc<JwtSvid>>, IssuerError> {
        let Charged { entries, bill, .. } = charged;
        let mut svids = Vec::with_capacity(entries.len());
        for entry in entries.iter() {
            let Fetched { svid, signed } = self.of_entry(entry, audience).await?;
            if signed {
                bill.signed(&entry.spiffe_id);
            }
            svids.push(svid);
        }
        Ok(svids)
    }

    async fn of_entry(self: &Arc<Self>, entry: &Entry, audience: &[String]) -> Result<Fetched, IssuerError> {
        let Entry { spiffe_id: id, jwt_svid_ttl: ttl, .. } = entry;
        let ttl = *ttl;
        if audience_bytes(audience) > MOST_AUDIENCE {
            self.metrics.jwt_cache(CacheResult::Miss);
            let svid = Arc::new(self.signer.jwt(id, ttl, audience).await?);
            return Ok(Fetched { svid, signed: true });
        }
        let key = key(id, ttl, audience);
        let now = self.signer.clock().now();
        match self.find(key, id, now) {
            Found::Fresh(token) => {
                self.metrics.jwt_cache(CacheResult::Hit);
                Ok(Fetched { svid: token, signed: false })
            }
            Found::Due(token) => {
                self.metrics.jwt_cache(CacheResult::Hit);
                self.renew_in_background(key, id.clone(), ttl, audience.to_vec());
                Ok(Fetched { svid: token, signed: true })
            }
            Found::Nothing(made) => {
                self.metrics.jwt_cache(CacheResult::Miss);
                let svid = self.make(key, &made, id, ttl, audience).await?;
                Ok(Fetched { svid, signed: true })
            }
        }
    }

    fn find(&self, key: Key, owner: &SpiffeId, now: SystemTime) -> Found {
        let mut inner = self.lock();
        if let Some(slot) = inner.slots.get_mut(&key) {
            slot.used = true;
            match slot.token.get() {
                // Being made; wait for it with the others.
                None => return Found::Nothing(Arc::clone(&slot.token)),
                // `issued_at` lies in the future only when the clock was set back.
                Some(token) if now < token.expires_at && token.issued_at <= now + Duration::from_secs(60) => {
                    if slot.renew_at.is_some_and(|at| at <= now) {
                        // This caller renews it; the next ones not before this has failed, however long it takes.
                        slot.renew_at = None;
                        return Found::Due(Arc::clone(token));
                    }
                    return Found::Fresh(Arc::clone(token));
                }
                Some(_) => {
                    slot.token = Made::default();
                    slot.renew_at = None;
                    return Found::Nothing(Arc::clone(&slot.token));
                }
            }
        }
        let made = Made::default();
        inner.insert(key, owner, Arc::clone(&made));
        drop(inner);
        self.trim(self.max.load(Ordering::Relaxed));
        Found::Nothing(made)
    }

    async fn make(
        &self,
        key: Key,
        made: &Made,
        id: &SpiffeId,
        ttl: Option<Duration>,
        audience: &[String],
    ) -> Result<Arc<JwtSvid>, IssuerError> {
        let token = made
            .get_or_try_init(|| async { Ok(Arc::new(self.signer.jwt(id, ttl, audience).await?)) })
            .await
            .cloned();
        let mut inner = self.lock();
        match &token {
            Ok(token) => {
                if let Some(slot) = inner.slots.get_mut(&key)
                    && Arc::ptr_eq(&slot.token, made)
                    && slot.renew_at.is_none()
                {
                    slot.renew_at =
                        Some(renew_at(token.issued_at, token.expires_at, None, &mut ahash_random()));
                }
            }
            // Nothing was made: keep no empty slot, unless somebody else is at it.
            Err(_) => {
                if inner.slots.get(&key).is_some_and(|slot| {
                    Arc::ptr_eq(&slot.token, made)
                        && slot.token.get().is_none()
                        && Arc::strong_count(made) <= 2
                }) {
                    inner.remove(&key);
                }
            }
        }
        token
    }

    fn renew_in_background(
        self: &Arc<Self>,
        key: Key,
        id: SpiffeId,
        ttl: Option<Duration>,
        audience: Vec<String>,
    ) {
        let cache = Arc::clone(self);
        self.metrics.jwt_refreshed();
        // One at a time per key: `find` took `renew_at` away. Should this panic, the token is made again when it ends.
        tokio::spawn(async move {
            match cache.signer.jwt(&id, ttl, &audience).await {
                Ok(token) => {
                    let renew_at = renew_at(token.issued_at, token.expires_at, None, &mut ahash_random());
                    let mut inner = cache.lock();
                    if let Some(slot) = inner.slots.get_mut(&key) {
                        slot.token = Arc::new(OnceCell::new_with(Some(Arc::new(token))));
                        slot.renew_at = Some(renew_at);
                    }
                }
                Err(error) => {
                    if let Some(slot) = cache.lock().slots.get_mut(&key)
                        && slot.token.initialized()
                    {
                        slot.renew_at.get_or_insert_with(|| cache.signer.clock().now() + RETRY);
                    }
                    tracing::warn!(%error, spiffe_id = %id, "could not renew a jwt-svid; the valid one is served")
                }
            }
        });
    }

    fn trim(&self, max: usize) {
        let mut inner = self.lock();
        while inner.slots.len() > max {
            if !inner.evict() {
                break;
            }
            self.metrics.jwt_evicted();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn insert(&mut self, key: Key, owner: &SpiffeId, token: Made) {
        self.places += 1;
        let place = self.places;
        self.slots.insert(key, Slot { owner: owner.clone(), token, renew_at: None, place, used: false });
        let of_owner = self.owners.entry_ref(owner).or_default();
        let before = of_owner.len();
        of_owner.insert(place, key);
        self.by_count.remove(&(before, owner.clone()));
        self.by_count.insert((before + 1, owner.clone()));
    }

    fn remove(&mut self, key: &Key) {
        let Some(slot) = self.slots.remove(key) else { return };
        let Some(of_owner) = self.owners.get_mut(&slot.owner) else { return };
        let before = of_owner.len();
        of_owner.remove(&slot.place);
        self.by_count.remove(&(before, slot.owner.clone()));
        if of_owner.is_empty() {
            self.owners.remove(&slot.owner);
        } else {
            self.by_count.insert((before - 1, slot.owner));
        }
    }

    /// Forgets one token of the identity that has the most: the first in its order that was not used since it was
    /// placed; one that was used goes to the end instead. Ends, since going to the end clears the mark.
    fn evict(&mut self) -> bool {
        let Some(owner) = self.by_count.last().map(|(_, owner)| owner.clone()) else { return false };
        loop {
            let Some(of_owner) = self.owners.get_mut(&owner) else { return false };
            let Some((place, key)) = of_owner.first_key_value().map(|(place, key)| (*place, *key)) else {
                return false;
            };
            let Some(slot) = self.slots.get_mut(&key) else { return false };
            if !slot.used {
                self.remove(&key);
                return true;
            }
            self.places += 1;
            (slot.used, slot.place) = (false, self.places);
            of_owner.remove(&place);
            of_owner.insert(self.places, key);
        }
    }
}

enum Found {
    Fresh(Arc<JwtSvid>),
    /// Valid; the caller is the one to have it renewed.
    Due(Arc<JwtSvid>),
    /// To be made, or being made by another caller, in this cell.
    Nothing(Made),
}

/// The order of audiences carries no meaning (RFC 7519, section 4.1.3); each text is followed by a byte that no text
/// holds, so that no two lists run together.
fn key(id: &SpiffeId, ttl: Option<Duration>, audience: &[String]) -> Key {
    let mut sorted: Vec<&str> = audience.iter().map(String::as_str).collect();
    sorted.sort_unstable();
    let mut context = Context::new(&SHA256);
    let mut part = |bytes: &[u8]| {
        context.update(bytes);
        context.update(&[0xff]);
    };
    part(id.as_str().as_bytes());
    part(&ttl.map_or(0, |ttl| ttl.as_secs()).to_be_bytes());
    for audience in sorted {
        part(audience.as_bytes());
    }
    let mut key = Key::default();
    key.copy_from_slice(context.finish().as_ref());
    key
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        identity::KeyType,
        issuer::embedded::{CaSource, Embedded, Settings},
        os::clock::Clock,
    };

    fn id(n: usize) -> SpiffeId {
        SpiffeId::parse(&format!("spiffe://td/{n}")).unwrap()
    }

    fn audience(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn keys_tell_apart_what_differs() {
        let base = key(&id(1), None, &audience(&["a", "b"]));
        for (case, other, same) in [
            ("order", key(&id(1), None, &audience(&["b", "a"])), true),
            ("identity", key(&id(2), None, &audience(&["a", "b"])), false),
            ("lifetime", key(&id(1), Some(Duration::from_secs(60)), &audience(&["a", "b"])), false),
            ("run together", key(&id(1), None, &audience(&["ab"])), false),
            ("one more", key(&id(1), None, &audience(&["a", "b", ""])), false),
        ] {
            assert_eq!(base == other, same, "{case}");
        }
    }

    #[tokio::test]
    async fn one_caller_renews_however_long_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Clock::starting_at(now);
        let ttl = Duration::from_secs(300);
        let settings = Settings {
            trust_domain: id(1).trust_domain(),
            data_dir: dir.path().join("data"),
            ca: CaSource::SelfSigned,
            ca_ttl: Duration::from_secs(86400),
            ca_key_type: KeyType::EcP256,
            jwt_key_type: KeyType::EcP256,
            svid_key_type: KeyType::EcP256,
            jwt_issuer: None,
            default_x509_svid_ttl: ttl,
            default_jwt_svid_ttl: ttl,
        };
        let issuer = Arc::new(Embedded::open(settings, now).unwrap());
        let metrics = Arc::new(Metrics::new(clock));
        let ec = KeyType::EcP256;
        let signer = Arc::new(Signer::new(issuer, clock, Arc::clone(&metrics), [ec, ec], ec, [ttl, ttl]));
        let cache = JwtCache::new(signer, metrics, 10);
        let audience = audience(&["a"]);
        let key = key(&id(1), None, &audience);
        let Found::Nothing(made) = cache.find(key, &id(1), now) else { panic!("there is none yet") };
        cache.make(key, &made, &id(1), None, &audience).await.unwrap();

        let due = now + Duration::from_secs(200);
        assert!(matches!(cache.find(key, &id(1), due), Found::Due(_)));
        for later in [0, 2, 60] {
            let found = cache.find(key, &id(1), due + Duration::from_secs(later));
            assert!(matches!(found, Found::Fresh(_)), "after {later} s");
        }
        assert!(matches!(cache.find(key, &id(1), now + ttl), Found::Nothing(_)));
    }

    proptest! {
        /// Whatever is inserted, the three tables agree, the bound holds, and an identity with at most its share is
        /// never the one that gives up a token.
        #[test]
        fn eviction_takes_from_who_has_most(
            asks in proptest::collection::vec((0usize..4, 0u8..40, any::<bool>()), 1..200),
            max in 1usize..20,
        ) {
            let mut inner = Inner::default();
            for (owner, name, uses) in asks {
                let key = key(&id(owner), None, &[name.to_string()]);
                if let Some(slot) = inner.slots.get_mut(&key) {
                    slot.used = uses;
                } else {
                    inner.insert(key, &id(owner), Made::default());
                }
                while inner.slots.len() > max {
                    let most = inner.owners.values().map(BTreeMap::len).max().unwrap();
                    let before: Vec<(SpiffeId, usize)> =
                        inner.owners.iter().map(|(id, slots)| (id.clone(), slots.len())).collect();
                    prop_assert!(inner.evict());
                    for (id, had) in before {
                        if had < most {
                            prop_assert_eq!(inner.owners[&id].len(), had);
                        }
                    }
                }
                prop_assert!(inner.slots.len() <= max);
                let owned: usize = inner.owners.values().map(BTreeMap::len).sum();
                prop_assert_eq!(owned, inner.slots.len());
                let counted: BTreeSet<(usize, SpiffeId)> =
                    inner.owners.iter().map(|(id, slots)| (slots.len(), id.clone())).collect();
                prop_assert_eq!(&counted, &inner.by_count);
            }
        }
    }
}
