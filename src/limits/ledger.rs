//! What calls are decided with, and what was spent: the rules in force, the tables of buckets, the counters.
//!
//! One ledger is shared by all who charge: [`Limits`](super::Limits), the calls under way, and the gate.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, UNIX_EPOCH},
};

use arc_swap::ArcSwap;

use super::{
    ask::{BucketKey, Hasher, HeldTokens},
    attempt::Attempt,
    bucket::{Quota, Shortfall},
    caller::{CallerKey, Families, NthCall},
    caller_pattern::CallerPattern,
    counters::{Counters, Decision},
    id_pattern::IdPattern,
    method::{Method, PerMethod},
    patience,
    policy::{Choice, Layers},
    refusal::{ChargedAs, Reason, Refusal, RejectionStatus, Remainder, Stage},
    report::{BucketName, Refusing, WhatIsRefused},
    room::{Room, Short},
    rule::{Limit, Origin, Rule},
    settings::{LimitSettings, NodeQuota, SoftLimits},
    shares::{SharedBucket, Taker, TooFew},
    since_start::SinceStart,
    slots::Slots,
    spare::SpareCalls,
    table::Table,
};
use crate::{identity::SpiffeId, os::clock::Clock, telemetry::registry::Registry};

/// The keys of one parent may fill one part of a table in so many.
pub(super) const PARENT_PARTS: usize = 8;

/// What is decided with, made of settings and never changed: a reload puts another in its place.
#[derive(Debug)]
pub(super) struct CallPlan {
    pub(super) caller: Layers<CallerPattern>,
    pub(super) identity: Layers<IdPattern>,
    node: PerMethod<Option<NodeQuota>>,
    pub(super) since: RulesSince,
    pub(super) families: Families,
    pub(super) node_dry: bool,
    pub(super) dry: bool,
    status: RejectionStatus,
    pub(super) soft: SoftLimits,
}

/// Since when the rules of each stage are as they are, in nanoseconds since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RulesSince {
    pub(super) caller: u64,
    pub(super) identity: u64,
    pub(super) node: u64,
}

impl CallPlan {
    /// The plan after `before`, from `now` on.
    fn after(before: &Self, settings: &LimitSettings, now: u64) -> Self {
        let since = |is_same: bool, since: u64| if is_same { since } else { now };
        let since = RulesSince {
            caller: since(before.caller == settings.caller, before.since.caller),
            identity: since(before.identity == settings.identity, before.since.identity),
            node: since(before.node == settings.node.quotas, before.since.node),
        };
        Self { since, ..Self::new(settings) }
    }

    fn new(settings: &LimitSettings) -> Self {
        Self {
            since: RulesSince::default(),
            caller: settings.caller.clone(),
            identity: settings.identity.clone(),
            node: settings.node.quotas,
            families: settings.families.clone(),
            node_dry: settings.node.dry_run,
            dry: settings.dry_run,
            status: settings.rejection_status,
            soft: settings.soft_limits,
        }
    }
}

/// What a rule says now.
#[derive(Clone, Copy, Debug)]
pub(super) struct LimitNow {
    pub(super) limit: Limit,
    pub(super) origin: Origin,
    /// Since when it holds.
    pub(super) since: u64,
}

/// A question of a stage about a call.
#[derive(Clone, Copy)]
pub(super) struct Question<'a> {
    pub(super) plan: &'a CallPlan,
    pub(super) stage: Stage,
    pub(super) method: Method,
    /// A refusal is only counted.
    pub(super) dry: bool,
    pub(super) attempt: Attempt,
}

/// A call that may be let pass, once for all its buckets, by what is to [`spare`](super::spare).
pub(super) struct CallToSpare {
    pub(super) method: Method,
    pub(super) taker: Taker,
    pub(super) now: u64,
    pub(super) spared: bool,
    pub(super) nth: NthCall,
}

/// The identity stage: its table, and the tokens that the call being decided holds in it. One lock for both, so
/// that several identities are charged as one.
#[derive(Debug)]
pub(super) struct Identities {
    pub(super) table: Table,
    /// Kept between calls for its memory alone.
    pub(super) held: Vec<(HeldTokens, ChargedAs)>,
}

/// What there was too little of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scarcity {
    pub(super) charged_as: ChargedAs,
    pub(super) reason: Reason,
    pub(super) retry_after: Duration,
    /// What the tokens of one call take to come back.
    pub(super) each: Duration,
    pub(super) origin: Origin,
    pub(super) rest: Remainder,
    /// Of the bucket, where tokens are short.
    pub(super) quota: Option<Quota>,
}

impl Scarcity {
    /// Whether the other one is the one to tell of: no wait helps with it, or a longer one.
    pub(super) fn is_before(&self, other: &Self) -> bool {
        let rank = |lack: &Self| (lack.origin == Origin::Set, lack.retry_after);
        rank(self) < rank(other)
    }
}

#[derive(Debug)]
pub(super) struct Ledger {
    plan: ArcSwap<CallPlan>,
    hasher: Hasher,
    callers: Mutex<Table>,
    identities: Mutex<Identities>,
    /// Of each method, shared by all. Known whatever the settings say, so that what was spent stays spent.
    node: PerMethod<Mutex<SharedBucket>>,
    pub(super) slots: Arc<Slots>,
    pub(super) room: Arc<Room>,
    pub(super) spare: SpareCalls,
    /// Of calls that wait.
    pub(super) places: Arc<Slots>,
    /// Calls that found no room, since somebody asked.
    wanting: AtomicU64,
    /// For updates of streams, as many again.
    pub(super) update_slots: Arc<Slots>,
    refusing: Mutex<Refusing>,
    pub(super) counters: Counters,
    pub(super) time: SinceStart,
    wall: Clock,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ledger {
    pub(super) fn new(settings: &LimitSettings, wall: Clock, registry: Registry<'_>) -> Self {
        Self {
            plan: ArcSwap::from_pointee(CallPlan::new(settings)),
            hasher: Hasher::default(),
            callers: Mutex::new(Table::new(settings.keys, PARENT_PARTS)),
            identities: Mutex::new(Identities {
                table: Table::new(settings.keys, 1),
                held: Vec::with_capacity(16),
            }),
            node: PerMethod::default(),
            slots: Arc::new(Slots::new(settings.node.attestations)),
            room: Arc::default(),
            spare: SpareCalls::default(),
            places: Arc::new(Slots::new(patience::places())),
            wanting: AtomicU64::new(0),
            update_slots: Arc::new(Slots::new(settings.node.attestations)),
            refusing: Mutex::default(),
            counters: Counters::new(registry),
            time: SinceStart::default(),
            wall,
        }
    }

    /// Decides by other settings. Buckets stay as they are.
    pub(super) fn reload(&self, settings: &LimitSettings) {
        self.callers().resize(settings.keys, PARENT_PARTS);
        self.identities().table.resize(settings.keys, 1);
        self.slots.resize(settings.node.attestations);
        self.update_slots.resize(settings.node.attestations);
        let plan = CallPlan::after(&self.plan.load(), settings, self.now());
        self.plan.store(Arc::new(plan));
    }

    /// Nanoseconds since the limits were made.
    pub(super) fn now(&self) -> u64 {
        self.time.now()
    }

    pub(super) fn plan(&self) -> arc_swap::Guard<Arc<CallPlan>> {
        self.plan.load()
    }

    pub(super) fn callers(&self) -> MutexGuard<'_, Table> {
        lock(&self.callers)
    }

    pub(super) fn identities(&self) -> MutexGuard<'_, Identities> {
        lock(&self.identities)
    }

    /// The keys that are being refused.
    pub(super) fn refusing(&self) -> MutexGuard<'_, Refusing> {
        lock(&self.refusing)
    }

    /// The limit that holds now, where the rules are as they are since `reloaded`. Looks at the time of day only for a rule that
    /// has windows, and once.
    pub(super) fn limit(&self, rule: &Rule, reloaded: u64, now: u64) -> LimitNow {
        let usual = LimitNow { limit: rule.limit(), origin: rule.origin(), since: reloaded };
        if rule.schedule().is_empty() {
            return usual;
        }
        let wall = self.wall.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let (written, changed) = rule.schedule().look(i64::try_from(wall.as_secs()).unwrap_or(i64::MAX));
        let changed = Duration::from_secs(changed.and_then(|unix| u64::try_from(unix).ok()).unwrap_or(0));
        let ago = u64::try_from(wall.saturating_sub(changed).as_nanos()).unwrap_or(u64::MAX);
        let since = now.saturating_sub(ago).max(reloaded);
        match written {
            Some(limit) => LimitNow { limit: *limit, origin: Origin::Set, since },
            None => LimitNow { since, ..usual },
        }
    }

    /// When a call that a rule refuses now for so long would pass, with the next of its windows opened or closed. Where the limit is
    /// tighter then, that is not reckoned.
    pub(super) fn wait_by(&self, rule: &Rule, limit: Limit, wait: Duration) -> Duration {
        if rule.schedule().is_empty() {
            return wait;
        }
        let wall = self.wall.now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let next = i64::try_from(wall.as_secs()).ok().and_then(|unix| rule.schedule().next(unix));
        let Some((at, written)) = next else { return wait };
        let until = Duration::from_secs(u64::try_from(at).unwrap_or(0)).saturating_sub(wall);
        match (limit, written.copied().unwrap_or_else(|| rule.limit())) {
            _ if wait <= until => wait,
            (Limit::Block, Limit::Block) => wait,
            (Limit::Block, _) | (_, Limit::Unlimited | Limit::Exempt) => until,
            (Limit::Quota(now), Limit::Quota(then)) => until + then.faster_than(now, wait - until),
            (_, Limit::Block | Limit::Quota(_)) => wait,
        }
    }

    /// What becomes of a call for which a bucket of this origin has too few tokens. Tokens share processor time out: where
    /// memory or descriptors are short, these are what is shared out, by what each holds.
    pub(super) fn shortfall(&self, origin: Origin) -> Shortfall {
        match origin {
            Origin::Set => Shortfall::Refuse,
            Origin::ByDefault if self.room.is_short(Short::Processor) => Shortfall::PassOwn,
            Origin::ByDefault => Shortfall::Pass,
        }
    }

    /// The same of a bucket of its caller's, or of an identity's: its connection was let in for that call.
    pub(super) fn shortfall_of(&self, nth: NthCall, origin: Origin) -> Shortfall {
        match self.shortfall(origin) {
            Shortfall::PassOwn if nth == NthCall::FirstLetIn => Shortfall::Pass,
            short => short,
        }
    }

    /// Lets a call pass that a default has no tokens for, once, where there is something to [`spare`](super::spare).
    ///
    /// # Errors
    /// When there will be.
    pub(super) fn spare(&self, call: &mut CallToSpare, origin: Origin) -> Result<(), Duration> {
        let CallToSpare { method, taker, now, spared, .. } = call;
        // What is no Workload API is no work to conserve.
        if origin != Origin::ByDefault || *method == Method::Other || !self.room.lacks_processor_alone() {
            return Err(Duration::MAX);
        }
        if !*spared {
            self.spare.take(*now, *taker)?;
            *spared = true;
        }
        Ok(())
    }

    /// A call that came has to wait, or is refused: it counts if it is for want of room.
    pub(super) fn want(&self, refusal: &Refusal) {
        if refusal.origin == Origin::ByDefault && refusal.reason == Reason::Rate {
            self.wanting.fetch_add(1, Relaxed);
        }
    }

    /// What a call hears that is refused without having waited: those of its caller that wait come before it.
    pub(super) fn behind_waiting(&self, refusal: Refusal, group: u64) -> Refusal {
        if refusal.is_in_turn() { refusal.of_nth(self.places.next_of(group)) } else { refusal }
    }

    /// How many found none since this was last asked.
    pub(super) fn wanting(&self) -> u64 {
        self.wanting.swap(0, Relaxed)
    }

    /// The bucket of a caller for a method, or the one that it shares.
    pub(super) fn caller_key(
        &self,
        plan: &CallPlan,
        caller: CallerKey,
        method: Method,
        choice: &Choice<'_, CallerPattern>,
    ) -> BucketKey {
        match choice.shared {
            None => {
                let hash = self.hasher.hash((0, caller, method));
                BucketKey { hash, parent: plan.families.parent(caller) }
            }
            // The text and not its place in a list, which a reload may change. It is its own parent: nobody can
            // make more.
            Some(pattern) => {
                let hash = self.hasher.hash((1, pattern.as_ref(), method));
                BucketKey { hash, parent: hash[1] | 1 << 63 }
            }
        }
    }

    /// The bucket of an identity for a method, or the one that it shares.
    pub(super) fn identity_key(
        &self,
        id: &SpiffeId,
        method: Method,
        choice: &Choice<'_, IdPattern>,
    ) -> BucketKey {
        let hash = match choice.shared {
            None => self.hasher.hash((0, id, method)),
            Some(mask) => self.hasher.hash((1, Masked { mask, id, method })),
        };
        // Identities are the admin's to make: overflow is parted at random, in 256.
        BucketKey { hash, parent: hash[1] >> 56 }
    }

    /// Counts a refusal, and says it: or lets the call pass when it is only a rehearsal.
    pub(super) fn refuse(
        &self,
        question: &Question<'_>,
        lack: Scarcity,
        name: impl FnOnce() -> Option<BucketName>,
    ) -> Result<(), Refusal> {
        let Question { plan, stage, method, dry, attempt } = *question;
        let Scarcity { charged_as, reason, retry_after, each, origin, rest, quota } = lack;
        if dry {
            self.counters.count(stage, Some(method), charged_as, Decision::WouldRefuse(reason));
            return Ok(());
        }
        let shed = stage == Stage::Node;
        let is_ours = shed || origin == Origin::ByDefault || reason == Reason::InFlight;
        let status = if is_ours { RejectionStatus::Unavailable } else { plan.status };
        // What is to spare may come sooner than tokens.
        let spare = if origin == Origin::ByDefault { self.spare.each() } else { Duration::MAX };
        let refusal = Refusal {
            method,
            stage,
            charged_as,
            reason,
            retry_after,
            each: each.min(spare),
            shed,
            status,
            origin,
            rest,
            spiffe_id: None,
        };
        if attempt.ends(&refusal) {
            self.counters.count(stage, Some(method), charged_as, Decision::Refused(reason));
            if let Some(name) = name() {
                let what = WhatIsRefused { stage, name, method: Some(method), reason, origin, quota };
                self.refusing().note(self.now(), what, &plan.families);
            }
        }
        Err(refusal)
    }

    /// Charges a call to what all share.
    pub(super) fn charge_node(
        &self,
        plan: &CallPlan,
        call: &mut CallToSpare,
        attempt: Attempt,
    ) -> Result<(), Refusal> {
        let CallToSpare { method, taker, now, .. } = *call;
        let Some(NodeQuota { quota, origin }) = *plan.node.get(method) else { return Ok(()) };
        let take = |short| {
            let mut bucket = lock(self.node.get(method));
            bucket.come_under(now, plan.since.node, quota);
            bucket.take(now, quota, 1, taker, short)
        };
        let taken = take(self.shortfall(origin)).or_else(|lack| match self.spare(call, origin) {
            Ok(()) => take(Shortfall::Pass),
            Err(sooner) => Err(lack.or_in(sooner)),
        });
        let Err(TooFew { wait: retry_after, rest }) = taken else {
            self.counters.count(Stage::Node, Some(method), ChargedAs::Node, Decision::Allowed);
            return Ok(());
        };
        let dry = plan.dry || plan.node_dry;
        let question = Question { plan, stage: Stage::Node, method, dry, attempt };
        let lack = Scarcity {
            charged_as: ChargedAs::Node,
            reason: Reason::Rate,
            retry_after,
            each: quota.time_of(1),
            origin,
            rest,
            quota: Some(quota),
        };
        let done = self.refuse(&question, lack, || Some(BucketName::Node));
        if attempt.counts(&done) {
            lock(self.node.get(method)).note_refused(taker);
        }
        done
    }

    /// What all callers have of a method, if that is limited, and its bucket.
    pub(super) fn node(&self, method: Method) -> Option<(NodeQuota, MutexGuard<'_, SharedBucket>)> {
        let quota = *self.plan().node.get(method);
        Some((quota?, lock(self.node.get(method))))
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
        self.method.hash(state);
        for text in self.mask.names(self.id) {
            text.hash(state);
        }
    }
}
