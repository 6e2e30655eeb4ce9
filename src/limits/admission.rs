//! The decisions about a call, before and after attestation.
//!
//! [`Limits::admit_caller`] gives an [`Admitted`], without which nobody attests; [`Limits::admit_identities`] is asked with it once
//! the identities are known. An [`Admitted`] holds the caller's tokens while the call runs, and settles when it is dropped: so a
//! call that is cancelled half-way is paid, and one that is refused is not. Nothing here waits, and a decision takes no
//! memory; a lock is held for a table look-up. Which bucket in what order: see [`super`].

use std::{
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use governor::{
    RateLimiter, clock::Clock as GovernorClock, middleware::NoOpMiddleware, nanos::Nanos,
    state::InMemoryState, state::NotKeyed,
};
use tokio::time::Instant;

use super::{
    RejectionStatus, SHORT_WAIT, Settings, SettingsError, SoftLimits,
    bucket::Quota,
    caller::{Caller, CallerKey, Families},
    counters::{Counters, KeyType, Outcome, Reason, Stage},
    method::Method,
    policy::{CallerPattern, Choice, Costs, IdPattern, Limit, Policy, Rule},
    report::{Event, Heavy, Name, Refusing, Standing},
    slots::{AttestationSlot, Full, Slots},
    table::{Hasher, Key, Place, Table},
};
use crate::{identity::SpiffeId, os::clock::Clock};

/// A call that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rate limit exceeded for /{}/{}", method.service(), method.rpc())]
pub struct Refusal {
    /// What was called.
    pub method: Method,
    /// Which stage refused.
    pub stage: Stage,
    /// What kind of key was charged.
    pub key_type: KeyType,
    /// Why.
    pub reason: Reason,
    /// When the same call would pass if nobody else took anything. [`Duration::MAX`] when waiting does not help:
    /// [`Refusal::wait`] tells.
    pub retry_after: Duration,
    /// The node sheds load: not this caller's doing.
    pub shed: bool,
    /// What the caller is told.
    pub status: RejectionStatus,
}

impl Refusal {
    /// What the caller is told, as gRPC has it.
    pub fn code(&self) -> tonic::Code {
        match self.status {
            RejectionStatus::ResourceExhausted => tonic::Code::ResourceExhausted,
            RejectionStatus::Unavailable => tonic::Code::Unavailable,
        }
    }

    /// How long to wait; `None` when a blocked caller need not come back.
    pub fn wait(&self) -> Option<Duration> {
        (self.retry_after != Duration::MAX).then_some(self.retry_after)
    }
}

/// Proof that a peer's call passed the caller stage: attestation takes nothing else. Made only here.
///
/// It holds the caller's tokens; when it is dropped they are paid, or given back if the call was refused.
#[derive(Debug)]
pub struct Admitted<P> {
    peer: P,
    charge: Charge,
    /// Until attestation is over.
    slot: Option<AttestationSlot>,
}

impl<P> Admitted<P> {
    /// The peer that was admitted.
    pub fn peer(&self) -> &P {
        &self.peer
    }

    /// What it called.
    pub fn method(&self) -> Method {
        self.charge.method
    }

    /// Says that the caller could not be attested, or has no identity: it pays [`Costs::failed_attestation`]. Not
    /// for what is no doing of the caller's.
    pub fn attestation_failed(&mut self) {
        self.charge.pays = self.charge.pays.max(self.charge.costs.failed_attestation);
        self.slot = None;
    }

    /// Says that something was signed for this call: the caller and the identity pay [`Costs::signature`] in place of
    /// [`Costs::answer`].
    pub fn signed(&mut self, id: &SpiffeId) {
        self.charge.signed(id);
    }
}

/// What a call will pay.
#[derive(Debug)]
struct Charge {
    shared: Arc<Shared>,
    method: Method,
    held: Option<Held>,
    costs: Costs,
    /// Tokens to take when the call ends.
    pays: u32,
    /// By a rule: not charged to the node either.
    exempt: bool,
    /// Which are counted when it pays.
    soft: SoftLimits,
}

/// Tokens held in a bucket of a table.
#[derive(Clone, Copy, Debug)]
struct Held {
    key: Key,
    place: Place,
    quota: Quota,
    cost: u32,
}

impl Charge {
    fn signed(&mut self, id: &SpiffeId) {
        if self.exempt {
            return;
        }
        let shared = &self.shared;
        let more = self.costs.signature - self.costs.answer;
        self.pays = self.pays.saturating_add(more);
        let plan = shared.plan.load();
        let choice = plan.identity.choose(id, self.method);
        let more = choice.rule.costs.signature - choice.rule.costs.answer;
        if let Limit::Quota(quota) = shared.limit(choice.rule)
            && more > 0
        {
            let key = shared.identity_key(id, self.method, &choice);
            let paid = shared.identities().table.charge(shared.now(), key, quota, more);
            shared.counters.count_soft_limits(self.soft, Stage::Identity, paid);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(held) = self.held {
            let shared = &self.shared;
            let paid = shared.callers().settle(held.key, held.place, held.quota, held.cost, self.pays);
            shared.counters.count_soft_limits(self.soft, Stage::Caller, paid);
        }
    }
}

/// What is decided with, made of settings and never changed: a reload puts another in its place.
#[derive(Debug)]
pub(super) struct Plan {
    caller: Policy<CallerPattern>,
    identity: Policy<IdPattern>,
    node: [Option<Node>; Method::ALL.len()],
    told: Told,
    families: Families,
    node_dry: bool,
    dry: bool,
    status: RejectionStatus,
    soft: SoftLimits,
}

impl Plan {
    /// A plan of these settings. Of the `old` one it keeps what was spent of the node's buckets.
    pub(super) fn new(settings: &Settings, old: Option<&Self>) -> Result<Self, SettingsError> {
        let caller = Policy::new(&settings.caller);
        let identity = Policy::new(&settings.identity);
        let mut quotas = [None; Method::ALL.len()];
        for (slot, method) in quotas.iter_mut().zip(Method::ALL) {
            let mut rules = settings.node.methods.iter().filter(|(of, _)| *of == method);
            *slot = rules.next().map_or(settings.node.default, |(_, quota)| *quota);
            if rules.next().is_some() {
                return Err(SettingsError::NodeMethodTwice(method.rpc()));
            }
        }
        if !(16..=1 << 24).contains(&settings.keys) {
            return Err(SettingsError::Keys(settings.keys));
        }
        let caller = caller.map_err(|source| SettingsError::Policy { stage: "caller", source })?;
        let identity = identity.map_err(|source| SettingsError::Policy { stage: "identity", source })?;
        // Last, since it empties the old buckets to see what they held: nothing may fail after it.
        let told = old.map_or_else(Told::default, |old| old.told.clone());
        let node = std::array::from_fn(|at| {
            let quota = quotas.get(at).copied().flatten()?;
            Node::new(quota, old.and_then(|old| old.node.get(at)).and_then(Option::as_ref), &told)
        });
        Ok(Self {
            caller,
            identity,
            node,
            told,
            families: settings.families.clone(),
            node_dry: settings.node.dry_run,
            dry: settings.dry_run,
            status: settings.rejection_status,
            soft: settings.soft_limits,
        })
    }
}

/// The time that `governor` goes by: the latest it was told, so that one look at the clock serves a whole decision.
#[derive(Clone, Debug, Default)]
struct Told(Arc<AtomicU64>);

impl Told {
    fn tell(&self, now: u64) {
        self.0.fetch_max(now, Ordering::Relaxed);
    }
}

impl GovernorClock for Told {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::new(self.0.load(Ordering::Relaxed))
    }
}

type NodeBucket = RateLimiter<NotKeyed, InMemoryState, Told, NoOpMiddleware<Nanos>>;

/// The bucket of a method that all share, with the quota it was made for.
#[derive(Debug)]
struct Node {
    quota: Quota,
    bucket: Arc<NodeBucket>,
}

impl Node {
    /// A bucket of `quota` from which as much is spent as from `old`.
    fn new(quota: Quota, old: Option<&Self>, clock: &Told) -> Option<Self> {
        if let Some(Self { bucket, .. }) = old.filter(|old| old.quota == quota) {
            return Some(Self { quota, bucket: Arc::clone(bucket) });
        }
        let burst = NonZeroU32::new(quota.burst())?;
        let governed = governor::Quota::with_period(quota.per_token())?.allow_burst(burst);
        let new = Self { quota, bucket: Arc::new(RateLimiter::direct_with_clock(governed, clock.clone())) };
        // governor has no way to ask what is left, nor to change a quota. The old bucket is done with: emptying it, in
        // halves, says what it held. Calls that still see it find it empty for the microseconds until the new plan is there.
        let spent = old.map_or(0, |old| {
            let mut left = 0;
            for tokens in (0..=old.quota.burst().ilog2()).rev().filter_map(|bit| NonZeroU32::new(1 << bit)) {
                if matches!(old.bucket.check_n(tokens), Ok(Ok(()))) {
                    left += tokens.get();
                }
            }
            old.quota.burst().saturating_sub(left)
        });
        if let Some(spent) = NonZeroU32::new(spent.min(quota.burst())) {
            drop(new.bucket.check_n(spent));
        }
        Some(new)
    }
}

/// The identity stage: its table, and the tokens that the call being decided holds in it. One lock for both, so that several
/// identities are charged as one.
#[derive(Debug)]
struct Identities {
    table: Table,
    /// Kept between calls for its memory alone.
    held: Vec<(Held, KeyType)>,
}

#[derive(Debug)]
struct Shared {
    plan: ArcSwap<Plan>,
    hasher: Hasher,
    callers: Mutex<Table>,
    identities: Mutex<Identities>,
    slots: Arc<Slots>,
    refusing: Mutex<Refusing>,
    counters: Counters,
    started: Instant,
    wall: Clock,
}

/// What the limits decide with. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Limits {
    shared: Arc<Shared>,
}

impl Default for Limits {
    /// The default settings, the system's clock, and counters that nobody reads.
    fn default() -> Self {
        Self::new(&Settings::default(), Clock::SYSTEM, &metrics::NoopRecorder)
            .expect("a test holds that the defaults are in order")
    }
}

/// Which share of a table the keys of one parent may fill.
const PARENT_SHARE: usize = 8;

impl Limits {
    /// Limits as the settings have them. `wall` is what schedules go by; buckets go by the runtime's monotonic clock, which
    /// tests can move.
    ///
    /// # Errors
    /// [`SettingsError`] names the first thing that cannot be meant.
    pub fn new(
        settings: &Settings,
        wall: Clock,
        recorder: &dyn metrics::Recorder,
    ) -> Result<Self, SettingsError> {
        settings.check(None)?;
        let plan = Plan::new(settings, None)?;
        let counters = Counters::new(recorder);
        let shared = Shared {
            plan: ArcSwap::from_pointee(plan),
            hasher: Hasher::default(),
            callers: Mutex::new(Table::new(settings.keys, settings.keys / PARENT_SHARE)),
            identities: Mutex::new(Identities {
                table: Table::new(settings.keys, settings.keys),
                held: Vec::with_capacity(16),
            }),
            slots: Arc::new(Slots::new(&settings.node)),
            refusing: Mutex::default(),
            counters,
            started: Instant::now(),
            wall,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Puts other settings in force. What was spent stays spent, and a call under way ends as it began.
    ///
    /// # Errors
    /// [`SettingsError`], and nothing has changed.
    pub fn reload(&self, settings: &Settings) -> Result<(), SettingsError> {
        settings.check(None)?;
        let shared = &*self.shared;
        let plan = Plan::new(settings, Some(&shared.plan.load()))?;
        shared.callers().resize(settings.keys, settings.keys / PARENT_SHARE);
        shared.identities().table.resize(settings.keys, settings.keys);
        shared.slots.reload(&settings.node);
        shared.plan.store(Arc::new(plan));
        Ok(())
    }

    /// Charges a call to its caller, before any attestation.
    ///
    /// # Errors
    /// [`Refusal`] when the caller has no tokens left, or too many calls are being attested.
    pub fn admit_caller<P: Caller>(&self, peer: P, method: Method) -> Result<Admitted<P>, Refusal> {
        let caller = peer.caller_key();
        let shared = &self.shared;
        let now = shared.now();
        let plan = shared.plan.load();
        let choice = plan.caller.choose(&caller, method);
        let limit = shared.limit(choice.rule);
        let mut charge = Charge {
            shared: Arc::clone(shared),
            method,
            held: None,
            costs: choice.rule.costs,
            pays: 0,
            exempt: limit == Limit::Exempt,
            soft: plan.soft,
        };
        let ask = Ask { plan: &plan, stage: Stage::Caller, method, dry: plan.dry || choice.rule.dry_run };
        let who = || match choice.shared {
            Some(pattern) => Name::Callers((**pattern).clone()),
            None => Name::Caller(caller),
        };
        let own_type = match (choice.shared, caller) {
            (Some(_), _) => KeyType::Shared,
            (None, CallerKey::Uid(_)) => KeyType::Uid,
            (None, CallerKey::Pod(_)) => KeyType::Pod,
        };
        // Counted as allowed once the last of this stage has let it pass; what a dry run let pass was counted already.
        let mut allowed = Some(own_type);
        match limit {
            Limit::Exempt | Limit::Unlimited => {}
            Limit::Block => {
                allowed = None;
                shared
                    .refuse(&ask, own_type, Reason::Blocked, Duration::MAX)
                    .inspect_err(|refusal| shared.note(now, refusal, &who()))?;
            }
            Limit::Quota(quota) => {
                let key = shared.caller_key(&plan, caller, method, &choice);
                let cost = choice.rule.costs.answer;
                let done = shared.callers().hold(now, key, quota, cost, || (who(), method.rpc()));
                match done {
                    Ok(place) => {
                        charge.held = Some(Held { key, place, quota, cost });
                        charge.pays = cost;
                        allowed = Some(type_at(place, own_type));
                    }
                    Err(wait) => {
                        allowed = None;
                        shared
                            .refuse(&ask, own_type, Reason::Rate, wait)
                            .inspect_err(|refusal| shared.note(now, refusal, &who()))?;
                    }
                }
            }
        }
        let refund = |charge: &mut Charge, refusal| {
            charge.pays = 0;
            Err(refusal)
        };
        // Nothing is attested for what is no Workload API.
        let attests = !charge.exempt && method != Method::Other;
        let slot = attests.then(|| shared.slots.take(plan.families.group(caller)));
        let slot = match slot.transpose() {
            Ok(slot) => slot,
            Err(full) => {
                let (stage, key_type, dry) = match full {
                    Full::Share => (Stage::Caller, own_type, ask.dry || plan.node_dry),
                    Full::Node => (Stage::Node, KeyType::Node, plan.dry || plan.node_dry),
                };
                let ask = Ask { stage, dry, ..ask };
                match shared.refuse(&ask, key_type, Reason::InFlight, SHORT_WAIT) {
                    Ok(()) => {
                        allowed = allowed.filter(|_| stage != Stage::Caller);
                        None
                    }
                    Err(refusal) => {
                        shared.note(now, &refusal, &Name::Caller(caller));
                        return refund(&mut charge, refusal);
                    }
                }
            }
        };
        if let Some(key_type) = allowed {
            shared.counters.count(Stage::Caller, Some(method), key_type, Outcome::Allowed);
        }
        // A health check is not the first thing to be shed.
        if method == Method::ValidateJwtSvid
            && !charge.exempt
            && let Err(refusal) = shared.charge_node(&plan, method, now)
        {
            return refund(&mut charge, refusal);
        }
        Ok(Admitted { peer, charge, slot })
    }

    /// Charges an admitted call to the identities it is answered with: all of them, or none. `ids` in the order in which
    /// they are served, the default identity first; bundle calls are charged to that one alone. Attestation is over
    /// then, and its slot is free.
    ///
    /// Identities that share a bucket (the same SPIFFE ID, or a mask) are charged to it once.
    ///
    /// # Errors
    /// [`Refusal`] when one of them has no tokens left; nothing was charged then, and the caller's tokens are given back.
    pub fn admit_identities<'a, P>(
        &self,
        admitted: &mut Admitted<P>,
        ids: impl IntoIterator<Item = &'a SpiffeId>,
    ) -> Result<(), Refusal> {
        admitted.slot = None;
        let charge = &mut admitted.charge;
        let method = charge.method;
        if !method.has_identity() {
            return Ok(());
        }
        let charged = if method.is_bundles() { 1 } else { usize::MAX };
        let done = self.shared.charge_identities(method, ids.into_iter().take(charged), charge.exempt);
        if done.is_err() {
            charge.pays = 0;
        }
        done
    }

    /// The heaviest callers and identities: those that were refused most, then those that were served most.
    pub fn heaviest(&self, n: usize) -> Vec<(Stage, Heavy)> {
        let callers = self.shared.callers().heaviest(n).into_iter().map(|heavy| (Stage::Caller, heavy));
        let mut all: Vec<_> = callers.collect();
        all.extend(
            self.shared.identities().table.heaviest(n).into_iter().map(|heavy| (Stage::Identity, heavy)),
        );
        all.sort_by_key(|(_, heavy)| std::cmp::Reverse(heavy.weight()));
        all.truncate(n);
        all
    }

    /// What is left to a caller for a method: tokens and burst. `None` where no bucket limits it.
    pub fn left_to_caller(&self, caller: CallerKey, method: Method) -> Option<(u32, u32)> {
        self.caller_standing(caller, method).1.tokens()
    }

    /// What is left to an identity for a method, as [`Limits::left_to_caller`].
    pub fn left_to_identity(&self, id: &SpiffeId, method: Method) -> Option<(u32, u32)> {
        self.identity_standing(id, method).1.tokens()
    }

    /// The bucket that a caller is charged to for a method, and how it stands.
    pub fn caller_standing(&self, caller: CallerKey, method: Method) -> (Name, Standing) {
        let shared = &*self.shared;
        let plan = shared.plan.load();
        let choice = plan.caller.choose(&caller, method);
        let key = shared.caller_key(&plan, caller, method, &choice);
        let name = match choice.shared {
            Some(pattern) => Name::Callers((**pattern).clone()),
            None => Name::Caller(caller),
        };
        (name, shared.caller_bucket(choice.rule, key))
    }

    /// The bucket that an identity is charged to for a method, and how it stands.
    pub fn identity_standing(&self, id: &SpiffeId, method: Method) -> (Name, Standing) {
        let shared = &*self.shared;
        let plan = shared.plan.load();
        let choice = plan.identity.choose(id, method);
        let key = shared.identity_key(id, method, &choice);
        let standing = Standing::under(shared.limit(choice.rule), |quota| {
            shared.identities().table.left(shared.now(), key, quota)
        });
        (identity_name(id, choice.shared), standing)
    }

    /// How the bucket of a name that [`Limits::heaviest`] told stands; `None` when a reload has taken it away.
    pub fn standing(&self, name: &Name, method: Method) -> Option<Standing> {
        match name {
            Name::Caller(caller) => Some(self.caller_standing(*caller, method).1),
            Name::Identity(id) | Name::Masked(id, _) => Some(self.identity_standing(id, method).1),
            Name::Callers(pattern) => {
                let shared = &*self.shared;
                let plan = shared.plan.load();
                let choice = plan.caller.of_shared(pattern, method)?;
                // The caller does not matter where the bucket is shared.
                let key = shared.caller_key(&plan, CallerKey::Uid(0), method, &choice);
                Some(shared.caller_bucket(choice.rule, key))
            }
        }
    }

    /// How many calls are being attested.
    pub fn attestations(&self) -> u32 {
        self.shared.slots.in_use()
    }

    /// What is worth a log line since this was last asked; ask about once a second. Bounded, however many are refused.
    pub fn events(&self) -> Vec<Event> {
        let now = self.shared.now();
        self.shared.refusing().drain(now)
    }

    /// Notes a refusal by the gate, so that its beginning and end are told with the others'.
    pub(super) fn note_refused_connection(&self, caller: CallerKey) {
        let now = self.shared.now();
        self.shared.refusing().note(now, Stage::Gate, &Name::Caller(caller));
    }

    /// How many callers' and identities' buckets are known. Also sets the gauges.
    pub fn keys(&self) -> (usize, usize) {
        let (callers, identities) = (self.shared.callers().len(), self.shared.identities().table.len());
        let gauges = &self.shared.counters.keys;
        for (gauge, number) in gauges.iter().skip(1).zip([callers, identities]) {
            gauge.set(u32::try_from(number).map_or(f64::MAX, f64::from));
        }
        self.shared.counters.in_flight.set(f64::from(self.shared.slots.in_use()));
        (callers, identities)
    }

    /// Forgets every full bucket: for when memory is short.
    pub fn shrink(&self) {
        let now = self.shared.now();
        self.shared.callers().forget_full(now);
        self.shared.identities().table.forget_full(now);
    }

    /// The counters, which the gate shares.
    pub(super) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Time as the buckets have it, which the gate shares.
    pub(super) fn now(&self) -> u64 {
        self.shared.now()
    }
}

/// What a refusal is made of, besides its reason.
#[derive(Clone, Copy)]
struct Ask<'a> {
    plan: &'a Plan,
    stage: Stage,
    method: Method,
    dry: bool,
}

fn type_at(place: Place, own: KeyType) -> KeyType {
    match place {
        Place::Own(_) => own,
        Place::Overflow | Place::Stray => KeyType::Overflow,
    }
}

impl Shared {
    /// Nanoseconds since the limits were made.
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX / 2)
    }

    fn callers(&self) -> MutexGuard<'_, Table> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identities(&self) -> MutexGuard<'_, Identities> {
        self.identities.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refusing(&self) -> MutexGuard<'_, Refusing> {
        self.refusing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit that holds now. Reads the time of day only for a rule that has windows.
    fn limit(&self, rule: &Rule) -> Limit {
        if rule.schedule.is_empty() {
            return rule.limit;
        }
        let since = self.wall.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        rule.schedule.at(unix).copied().unwrap_or(rule.limit)
    }

    fn caller_key(
        &self,
        plan: &Plan,
        caller: CallerKey,
        method: Method,
        choice: &Choice<'_, CallerPattern>,
    ) -> Key {
        match choice.shared {
            None => {
                let hash = self.hasher.hash((0, caller, method.index()));
                Key { hash, parent: plan.families.parent(caller) }
            }
            // The text and not its place in a list, which a reload may change. It is its own parent: nobody can make more.
            Some(pattern) => {
                let hash = self.hasher.hash((1, pattern.as_ref(), method.index()));
                Key { hash, parent: hash[1] | 1 << 63 }
            }
        }
    }

    fn caller_bucket(&self, rule: &Rule, key: Key) -> Standing {
        Standing::under(self.limit(rule), |quota| self.callers().left(self.now(), key, quota))
    }

    fn identity_key(&self, id: &SpiffeId, method: Method, choice: &Choice<'_, IdPattern>) -> Key {
        let hash = match choice.shared {
            None => self.hasher.hash((0, id, method.index())),
            Some(mask) => self.hasher.hash((1, Masked { mask, id, method })),
        };
        // Identities are the admin's to make: overflow is parted at random, in 256.
        Key { hash, parent: hash[1] >> 56 }
    }

    /// Counts a refusal, and says it: or lets the call pass when it is only a rehearsal.
    fn refuse(
        &self,
        ask: &Ask<'_>,
        key_type: KeyType,
        reason: Reason,
        retry_after: Duration,
    ) -> Result<(), Refusal> {
        let Ask { plan, stage, method, dry } = *ask;
        if dry {
            self.counters.count(stage, Some(method), key_type, Outcome::WouldRefuse(reason));
            return Ok(());
        }
        self.counters.count(stage, Some(method), key_type, Outcome::Refused(reason));
        let shed = stage == Stage::Node;
        let status = if shed { RejectionStatus::Unavailable } else { plan.status };
        Err(Refusal { method, stage, key_type, reason, retry_after, shed, status })
    }

    /// Lists a key as being refused. Load shedding lists nobody: it is nobody's doing.
    fn note(&self, now: u64, refusal: &Refusal, name: &Name) {
        if !refusal.shed {
            self.refusing().note(now, refusal.stage, name);
        }
    }

    fn charge_node(&self, plan: &Plan, method: Method, now: u64) -> Result<(), Refusal> {
        let Some(Node { bucket, .. }) = plan.node.get(method.index()).and_then(Option::as_ref) else {
            return Ok(());
        };
        plan.told.tell(now);
        match bucket.check() {
            Ok(()) => {
                self.counters.count(Stage::Node, Some(method), KeyType::Node, Outcome::Allowed);
                Ok(())
            }
            Err(not_until) => {
                let wait = not_until.wait_time_from(plan.told.now());
                let ask = Ask { plan, stage: Stage::Node, method, dry: plan.dry || plan.node_dry };
                self.refuse(&ask, KeyType::Node, Reason::Rate, wait)
            }
        }
    }

    fn charge_identities<'a>(
        &self,
        method: Method,
        ids: impl Iterator<Item = &'a SpiffeId>,
        caller_exempt: bool,
    ) -> Result<(), Refusal> {
        let plan = self.plan.load();
        let now = self.now();
        let mut guard = self.identities();
        let Identities { table, held } = &mut *guard;
        held.clear();
        // Without an identity (a verifier that need not have one) the node alone is charged.
        let (mut node_counts, mut nobody) = (false, true);
        // Of several that refuse, the one to wait for longest.
        let mut worst: Option<Worst<'_>> = None;
        for id in ids {
            nobody = false;
            let choice = plan.identity.choose(id, method);
            let own_type = if choice.shared.is_some() { KeyType::Shared } else { KeyType::SpiffeId };
            let limit = self.limit(choice.rule);
            node_counts |= limit != Limit::Exempt;
            let (reason, wait) = match limit {
                Limit::Exempt | Limit::Unlimited => {
                    self.counters.count(Stage::Identity, Some(method), own_type, Outcome::Allowed);
                    continue;
                }
                // Exempt is from every bucket; what is blocked is blocked.
                Limit::Quota(_) if caller_exempt => {
                    self.counters.count(Stage::Identity, Some(method), own_type, Outcome::Allowed);
                    continue;
                }
                Limit::Block => (Reason::Blocked, Duration::MAX),
                Limit::Quota(quota) => {
                    let key = self.identity_key(id, method, &choice);
                    if held.iter().any(|(other, ..)| other.key.hash == key.hash) {
                        continue;
                    }
                    let cost = choice.rule.costs.answer;
                    let who = || (identity_name(id, choice.shared), method.rpc());
                    match table.hold(now, key, quota, cost, who) {
                        Ok(place) => {
                            held.push((Held { key, place, quota, cost }, type_at(place, own_type)));
                            continue;
                        }
                        Err(wait) => (Reason::Rate, wait),
                    }
                }
            };
            let dry = plan.dry || choice.rule.dry_run;
            if dry {
                self.counters.count(Stage::Identity, Some(method), own_type, Outcome::WouldRefuse(reason));
            } else if worst.as_ref().is_none_or(|worst| worst.wait < wait) {
                worst = Some(Worst { wait, reason, key_type: own_type, id, mask: choice.shared });
            }
        }
        let done = match worst {
            Some(Worst { wait, reason, key_type, id, mask }) => {
                let ask = Ask { plan: &plan, stage: Stage::Identity, method, dry: false };
                self.refuse(&ask, key_type, reason, wait)
                    .inspect_err(|refusal| self.note(now, refusal, &identity_name(id, mask)))
            }
            None if (node_counts || nobody) && !caller_exempt => self.charge_node(&plan, method, now),
            None => Ok(()),
        };
        for (it, key_type) in held.drain(..) {
            let pays = if done.is_ok() { it.cost } else { 0 };
            let paid = table.settle(it.key, it.place, it.quota, it.cost, pays);
            if done.is_ok() {
                self.counters.count(Stage::Identity, Some(method), key_type, Outcome::Allowed);
                self.counters.count_soft_limits(plan.soft, Stage::Identity, paid);
            }
        }
        done
    }
}

/// An identity that refuses.
struct Worst<'a> {
    wait: Duration,
    reason: Reason,
    key_type: KeyType,
    id: &'a SpiffeId,
    mask: Option<&'a Arc<IdPattern>>,
}

fn identity_name(id: &SpiffeId, mask: Option<&Arc<IdPattern>>) -> Name {
    match mask {
        None => Name::Identity(id.clone()),
        Some(mask) => Name::Masked(id.clone(), Arc::clone(mask)),
    }
}

/// A key that is the same for all identities that share a bucket.
struct Masked<'a> {
    mask: &'a IdPattern,
    id: &'a SpiffeId,
    method: Method,
}

impl std::hash::Hash for Masked<'_> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.mask.hash(state);
        self.method.index().hash(state);
        for text in self.mask.names(self.id) {
            text.hash(state);
        }
    }
}
