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
use tokio::{
    sync::{OnceCell, watch},
    time::Instant,
};

use super::{
    audit::AuditTrail,
    audited::AuditedCaller,
    entitlement::Charged,
    metrics::{CacheResult, StoreMetrics},
};
use crate::{
    identity::{Entry, JwtSvid, SpiffeId, taint},
    issuer::{self, Issuer, MintError, World, renewal},
    limits::pace::Pace,
    os::clock::Clock,
    telemetry::{chain, registry::float},
};

/// Tokens for more text of audiences than this, in bytes as JSON has it, are made for each call and not kept, so that
/// a number of tokens bounds their bytes.
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
    svid: Arc<JwtSvid>,
    /// This call made a signature necessary, or waited for one.
    signed: bool,
}

type TokenKey = [u8; 32];
type MadeToken = Arc<OnceCell<Arc<JwtSvid>>>;

#[derive(Debug)]
struct JwtSlot {
    owner: SpiffeId,
    token: MadeToken,
    /// When a fresh one is made in the background; `None` until there is a token, and while a fresh one is made.
    renew_at: Option<SystemTime>,
    /// Place in the owner's order.
    place: u64,
    /// Was used since it was given that place.
    used: bool,
}

#[derive(Debug, Default)]
struct JwtTable {
    slots: HashMap<TokenKey, JwtSlot, ahash::RandomState>,
    /// The slots of an identity, oldest place first.
    owners: HashMap<SpiffeId, BTreeMap<u64, TokenKey>, ahash::RandomState>,
    /// Who has how many; the last has the most.
    by_count: BTreeSet<(usize, SpiffeId)>,
    places: u64,
}

/// The world as it was when the tokens were last compared with it.
#[derive(Debug)]
struct FollowedWorld {
    news: watch::Receiver<Arc<World>>,
    seen: Arc<World>,
}

/// The JWT-SVIDs that were made.
#[derive(Debug)]
pub struct JwtCache {
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    metrics: Arc<StoreMetrics>,
    audit: Arc<AuditTrail>,
    table: Mutex<JwtTable>,
    world: Mutex<FollowedWorld>,
    max: AtomicUsize,
    /// Of the lines about renewals that failed.
    failures: Pace,
}

impl JwtCache {
    /// Keeps at most `max` tokens (at least one).
    pub fn new(issuer: Arc<dyn Issuer>, clock: Clock, metrics: Arc<StoreMetrics>, max: usize) -> Self {
        let news = issuer.world();
        let seen = Arc::clone(&news.borrow());
        Self {
            issuer,
            clock,
            metrics,
            audit: Arc::default(),
            table: Mutex::default(),
            world: Mutex::new(FollowedWorld { news, seen }),
            max: AtomicUsize::new(max.max(1)),
            failures: Pace::default(),
        }
    }

    /// Tells this trail of what is made.
    #[must_use]
    pub fn audited(self, audit: Arc<AuditTrail>) -> Self {
        Self { audit, ..self }
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
        self.metrics.jwt_svids.set(0.0);
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
    ) -> Result<Vec<Arc<JwtSvid>>, MintError> {
        let whom = charged.audited();
        let fetched = charged.each(|entry| self.of_entry(entry, audience, whom)).await;
        charged.signed(fetched.iter().map(|fetched| fetched.as_ref().is_ok_and(|fetched| fetched.signed)));
        let svids = fetched.into_iter().map(|fetched| Ok(fetched?.svid));
        let svids: Vec<Arc<JwtSvid>> = svids.collect::<Result<_, MintError>>()?;
        for (entry, svid) in charged.entries().iter().zip(&svids) {
            self.audit.jwt_given(svid, entry, charged.peer().connected(), whom);
        }
        Ok(svids)
    }

    async fn of_entry(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        audience: &[String],
        whom: AuditedCaller,
    ) -> Result<Fetched, MintError> {
        if entry.attributes.jwt_each_anew || audience_bytes(audience) > MOST_AUDIENCE {
            self.metrics.jwt_cache(CacheResult::Miss);
            let svid = self.mint(entry, audience, whom, issuer::deadline()).await?;
            return Ok(Fetched { svid, signed: true });
        }
        self.follow_world();
        let key = key(&entry.spiffe_id, entry.jwt_svid_ttl, audience);
        match self.find(key, &entry.spiffe_id, self.clock.now()) {
            FoundJwt::Fresh(token) => {
                self.metrics.jwt_cache(CacheResult::Hit);
                Ok(Fetched { svid: token, signed: false })
            }
            FoundJwt::Due(token) => {
                self.metrics.jwt_cache(CacheResult::Hit);
                self.renew_in_background(key, Arc::clone(entry), audience.to_vec(), whom);
                Ok(Fetched { svid: token, signed: true })
            }
            FoundJwt::Nothing(made) => {
                self.metrics.jwt_cache(CacheResult::Miss);
                self.make(key, &made, entry, audience, whom).await
            }
        }
    }

    async fn mint(
        &self,
        entry: &Arc<Entry>,
        audience: &[String],
        whom: AuditedCaller,
        deadline: Instant,
    ) -> Result<Arc<JwtSvid>, MintError> {
        let svid = self.issuer.mint_jwt(entry, audience, whom.family, deadline).await?;
        self.audit.jwt_made(&svid, entry, whom);
        Ok(Arc::new(svid))
    }

    /// Compares the tokens with the authorities, where these have changed: one that no authority verifies any more is
    /// forgotten, and one of a tainted authority is due.
    fn follow_world(&self) {
        let mut world = self.world.lock().unwrap_or_else(PoisonError::into_inner);
        if !world.news.has_changed().unwrap_or(false) {
            return;
        }
        let next = Arc::clone(&world.news.borrow_and_update());
        let before = std::mem::replace(&mut world.seen, Arc::clone(&next));
        drop(world);
        let (own, tainted) = (&next.bundles.own, &next.tainted);
        let gone: Vec<&str> =
            before.bundles.own.jwt_authorities.iter().map(|authority| &*authority.kid).collect();
        let gone: Vec<&str> = gone.into_iter().filter(|kid| own.jwt_key(kid).is_none()).collect();
        if gone.is_empty() && *before.tainted == **tainted {
            return;
        }
        let now = self.clock.now();
        for slot in self.lock().slots.values_mut() {
            let Some(token) = slot.token.get() else { continue };
            if taint::kid(&token.token).is_some_and(|kid| gone.contains(&&*kid)) {
                (slot.token, slot.renew_at) = (MadeToken::default(), None);
            } else if tainted.signed_jwt(&token.token) && slot.renew_at.is_some() {
                slot.renew_at = Some(now);
            }
        }
    }

    fn find(&self, key: TokenKey, owner: &SpiffeId, now: SystemTime) -> FoundJwt {
        let mut table = self.lock();
        if let Some(slot) = table.slots.get_mut(&key) {
            slot.used = true;
            match slot.token.get() {
                // Being made; wait for it with the others.
                None => return FoundJwt::Nothing(Arc::clone(&slot.token)),
                // `issued_at` lies in the future only when the clock was set back.
                Some(token) if now < token.expires_at && token.issued_at <= now + Duration::from_secs(60) => {
                    if slot.renew_at.is_some_and(|at| at <= now) {
                        // This caller renews it; the next ones not before this has failed, however long it takes.
                        slot.renew_at = None;
                        return FoundJwt::Due(Arc::clone(token));
                    }
                    return FoundJwt::Fresh(Arc::clone(token));
                }
                Some(_) => {
                    slot.token = MadeToken::default();
                    slot.renew_at = None;
                    return FoundJwt::Nothing(Arc::clone(&slot.token));
                }
            }
        }
        let made = MadeToken::default();
        table.insert(key, owner, Arc::clone(&made));
        drop(table);
        self.trim(self.max.load(Ordering::Relaxed));
        FoundJwt::Nothing(made)
    }

    async fn make(
        &self,
        key: TokenKey,
        made: &MadeToken,
        entry: &Arc<Entry>,
        audience: &[String],
        whom: AuditedCaller,
    ) -> Result<Fetched, MintError> {
        let deadline = issuer::deadline();
        let mut signed = false;
        let making = made.get_or_try_init(|| {
            signed = true;
            self.mint(entry, audience, whom, deadline)
        });
        // It may wait for another call that makes the token, and does not pay for it then.
        let token = issuer::by(deadline, making).await.cloned();
        let mut table = self.lock();
        match &token {
            Ok(token) => {
                if let Some(slot) = table.slots.get_mut(&key)
                    && Arc::ptr_eq(&slot.token, made)
                    && slot.renew_at.is_none()
                {
                    slot.renew_at = Some(renewal::draw(token.issued_at, token.expires_at, None));
                }
            }
            // Nothing was made: keep no empty slot, unless somebody else is at it.
            Err(_) => {
                if table.slots.get(&key).is_some_and(|slot| {
                    Arc::ptr_eq(&slot.token, made)
                        && slot.token.get().is_none()
                        && Arc::strong_count(made) <= 2
                }) {
                    table.remove(&key);
                    self.metrics.jwt_svids.set(float(table.slots.len()));
                }
            }
        }
        token.map(|svid| Fetched { svid, signed })
    }

    fn renew_in_background(
        self: &Arc<Self>,
        key: TokenKey,
        entry: Arc<Entry>,
        audience: Vec<String>,
        whom: AuditedCaller,
    ) {
        let cache = Arc::clone(self);
        self.metrics.jwt_refreshes.increment(1);
        // One at a time per key: `find` took `renew_at` away. Should this panic, the token is made again when it ends.
        tokio::spawn(async move {
            let made = cache.mint(&entry, &audience, whom, issuer::deadline()).await;
            let mut table = cache.lock();
            let slot = table.slots.get_mut(&key);
            match (made, slot) {
                (Ok(token), Some(slot)) => {
                    slot.renew_at = Some(renewal::draw(token.issued_at, token.expires_at, None));
                    slot.token = Arc::new(OnceCell::new_with(Some(token)));
                }
                (Ok(_), None) => {}
                (Err(error), slot) => {
                    if let Some(slot) = slot.filter(|slot| slot.token.initialized()) {
                        let retry = error.retry_after().unwrap_or(RETRY);
                        slot.renew_at.get_or_insert_with(|| cache.clock.now() + retry);
                    }
                    drop(table);
                    let (error, spiffe_id) = (chain(&error), &entry.spiffe_id);
                    cache.failures.say(|left_out| {
                        tracing::warn!(
                            error,
                            %spiffe_id,
                            left_out,
                            "cannot get a new jwt-svid; the one that is valid is served, trying again"
                        );
                    });
                }
            }
        });
    }

    fn trim(&self, max: usize) {
        let mut table = self.lock();
        while table.slots.len() > max {
            if !table.evict() {
                break;
            }
            self.metrics.jwt_evictions.increment(1);
        }
        self.metrics.jwt_svids.set(float(table.slots.len()));
    }

    fn lock(&self) -> MutexGuard<'_, JwtTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl JwtTable {
    fn insert(&mut self, key: TokenKey, owner: &SpiffeId, token: MadeToken) {
        self.places += 1;
        let place = self.places;
        self.slots.insert(key, JwtSlot { owner: owner.clone(), token, renew_at: None, place, used: false });
        let of_owner = self.owners.entry_ref(owner).or_default();
        let before = of_owner.len();
        of_owner.insert(place, key);
        self.by_count.remove(&(before, owner.clone()));
        self.by_count.insert((before + 1, owner.clone()));
    }

    fn remove(&mut self, key: &TokenKey) {
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

enum FoundJwt {
    Fresh(Arc<JwtSvid>),
    /// Valid; the caller is the one to have it renewed.
    Due(Arc<JwtSvid>),
    /// To be made, or being made by another caller, in this cell.
    Nothing(MadeToken),
}

/// The order of audiences carries no meaning (RFC 7519, section 4.1.3); each text is followed by a byte that no text
/// holds, so that no two lists run together.
fn key(id: &SpiffeId, ttl: Option<Duration>, audience: &[String]) -> TokenKey {
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
    let mut key = TokenKey::default();
    key.copy_from_slice(context.finish().as_ref());
    key
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        identity::KeyType,
        issuer::{
            embedded::{EmbeddedIssuer, EmbeddedSettings, IssuerSettings},
            metrics::IssuerMetrics,
        },
        telemetry::metrics::Metrics,
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
        let settings = EmbeddedSettings {
            trust_domain: id(1).trust_domain(),
            data_dir: dir.path().join("data"),
            svid_key_type: KeyType::EcP256,
            issuer: IssuerSettings { default_jwt_svid_ttl: ttl, ..IssuerSettings::default() },
        };
        let entry = Entry::asking("unix:uid:1");
        let metrics = Metrics::default();
        let counted = Arc::new(IssuerMetrics::new(metrics.registry()));
        let issuer = Arc::new(EmbeddedIssuer::open(settings, clock, counted).unwrap());
        let cache = JwtCache::new(issuer, clock, Arc::new(StoreMetrics::new(metrics.registry())), 10);
        let audience = audience(&["a"]);
        let key = key(&entry.spiffe_id, None, &audience);
        let FoundJwt::Nothing(made) = cache.find(key, &entry.spiffe_id, now) else {
            panic!("there is none yet")
        };
        let make = || cache.make(key, &made, &entry, &audience, AuditedCaller::of_uid(7));
        let herd = futures_util::future::join_all((0..20).map(|_| make())).await;
        let signed = herd.into_iter().filter(|fetched| fetched.as_ref().unwrap().signed).count();
        assert_eq!(signed, 1, "one of all who ask meanwhile has it signed");

        let due = now + Duration::from_secs(200);
        assert!(matches!(cache.find(key, &entry.spiffe_id, due), FoundJwt::Due(_)));
        for later in [0, 2, 60] {
            let found = cache.find(key, &entry.spiffe_id, due + Duration::from_secs(later));
            assert!(matches!(found, FoundJwt::Fresh(_)), "after {later} s");
        }
        assert!(matches!(cache.find(key, &entry.spiffe_id, now + ttl), FoundJwt::Nothing(_)));
    }

    proptest! {
        /// Whatever is inserted, the three tables agree, the bound holds, and an identity with at most its share is
        /// never the one that gives up a token.
        #[test]
        fn eviction_takes_from_who_has_most(
            asks in proptest::collection::vec((0usize..4, 0u8..40, any::<bool>()), 1..200),
            max in 1usize..20,
        ) {
            let mut table = JwtTable::default();
            for (owner, name, uses) in asks {
                let key = key(&id(owner), None, &[name.to_string()]);
                if let Some(slot) = table.slots.get_mut(&key) {
                    slot.used = uses;
                } else {
                    table.insert(key, &id(owner), MadeToken::default());
                }
                while table.slots.len() > max {
                    let most = table.owners.values().map(BTreeMap::len).max().unwrap();
                    let before: Vec<(SpiffeId, usize)> =
                        table.owners.iter().map(|(id, slots)| (id.clone(), slots.len())).collect();
                    prop_assert!(table.evict());
                    for (id, had) in before {
                        if had < most {
                            prop_assert_eq!(table.owners[&id].len(), had);
                        }
                    }
                }
                prop_assert!(table.slots.len() <= max);
                let owned: usize = table.owners.values().map(BTreeMap::len).sum();
                prop_assert_eq!(owned, table.slots.len());
                let counted: BTreeSet<(usize, SpiffeId)> =
                    table.owners.iter().map(|(id, slots)| (slots.len(), id.clone())).collect();
                prop_assert_eq!(&counted, &table.by_count);
            }
        }
    }
}
