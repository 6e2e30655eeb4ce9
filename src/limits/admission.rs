//! The decisions about a call, before and after attestation.
//!
//! [`Limits::admit`] gives an [`Admitted`], without which nobody attests; [`Limits::admit_for`] is asked with it once the identities are known. An [`Admitted`] holds the caller's tokens while the call
//! runs, and settles when it is dropped: so a call that is cancelled half-way is paid, and one that is refused
//! is not. A decision takes no memory, and a lock is held for a table look-up. What a short wait may help with waits for
//! it ([`waiting`](super::waiting)). Which bucket in what order: see [`super`].

use std::{sync::Arc, time::Duration};

use super::{
    admitted::{Admitted, Charge},
    ask::Ask,
    attempt::Attempt,
    bucket::Quota,
    caller::{Caller, CallerKey, NthCall},
    caller_pattern::CallerPattern,
    counters::Decision,
    identity_stage::IdentityCall,
    ledger::{CallPlan, CallToSpare, Ledger, LimitNow, Question, Scarcity},
    method::Method,
    patience::{FOR_ROOM, Patience},
    policy::Choice,
    refusal::{ChargedAs, Reason, Refusal, Remainder, Stage},
    report::BucketName,
    room::Room,
    rule::{Limit, Origin},
    settings::LimitSettings,
    shares::{Taker, TooFew},
    slots::{AttestationSlot, Full},
    waiting::WaitOfCall,
};
use crate::{identity::SpiffeId, os::clock::Clock, telemetry::registry::Registry};

/// What a refusal that no waiting is known for says: attestations take milliseconds.
const SHORT_WAIT: Duration = Duration::from_millis(100);

/// What the limits decide with. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Limits {
    ledger: Arc<Ledger>,
}

impl Default for Limits {
    /// The default settings, the system's clock, and counters that nobody reads.
    fn default() -> Self {
        Self::new(&LimitSettings::default(), Clock::SYSTEM, Registry::new(&metrics::NoopRecorder))
    }
}

/// A place among the attestations that updates of streams wait for; free again when it is dropped.
#[derive(Debug)]
#[must_use = "the place is free again as soon as this is dropped"]
pub struct UpdatePlace {
    slot: AttestationSlot,
}

impl UpdatePlace {
    /// The place as those of calls are.
    pub(crate) fn into_slot(self) -> AttestationSlot {
        self.slot
    }
}

impl Limits {
    /// Limits as the settings have them. `wall` is what schedules go by; buckets go by the runtime's monotonic
    /// clock, which tests can move.
    pub fn new(settings: &LimitSettings, wall: Clock, registry: Registry<'_>) -> Self {
        Self { ledger: Arc::new(Ledger::new(settings, wall, registry)) }
    }

    /// Puts other settings in force. What was spent stays spent, and a call under way ends as it began.
    pub fn reload(&self, settings: &LimitSettings) {
        self.ledger.reload(settings);
    }

    pub(super) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Whether there is room, for who finds out and who asks.
    pub fn room(&self) -> &Arc<Room> {
        &self.ledger.room
    }

    /// How many calls found no room, and were kept waiting or refused for it, since this was last asked.
    pub fn wanting(&self) -> u64 {
        self.ledger.wanting()
    }

    /// Whether a call was refused, or kept waiting, for which there was nothing to spare, since this was last asked.
    pub fn lacked_spare(&self) -> bool {
        self.ledger.spare.lacked()
    }

    /// How many calls a second may pass now beside those that have tokens; 0 where something else is short too, or nothing is.
    pub fn spare_calls(&self) -> u32 {
        if self.ledger.room.lacks_processor_alone() { self.ledger.spare.per_second() } else { 0 }
    }

    /// How many calls a second may pass from now on beside those that have tokens, while processor time alone is short.
    pub fn set_spare(&self, per_second: f64) {
        self.ledger.spare.set(per_second);
    }

    /// Charges a call to its caller, before any attestation, and takes a place among the attestations. Where that is
    /// worth a wait, the call waits as long as it may ([`patience`](super::patience)); else it is decided at once, and
    /// nothing is allocated for it.
    ///
    /// # Errors
    /// [`Refusal`] when the caller has no tokens left, or too many calls are being attested.
    pub async fn admit<P: Caller>(
        &self,
        peer: P,
        method: Method,
        patience: Patience,
    ) -> Result<Admitted<P>, Refusal> {
        let mut entering = Entering::new(&self.ledger, peer, method, patience);
        match entering.begin() {
            // Boxed, as few calls wait.
            Err(refusal) if !patience.first().ends(&refusal) => Box::pin(entering.wait(refusal)).await?,
            done => done?,
        }
        Ok(entering.admitted())
    }

    /// [`Limits::admit`] without any wait.
    ///
    /// # Errors
    /// As [`Limits::admit`].
    pub fn admit_caller<P: Caller>(&self, peer: P, method: Method) -> Result<Admitted<P>, Refusal> {
        let mut entering = Entering::new(&self.ledger, peer, method, Patience::NONE);
        entering.begin()?;
        Ok(entering.admitted())
    }

    /// Charges a caller for a request that ended before it came to anything that could be admitted: a token of
    /// [`Method::Other`], which its bucket owes where it has none.
    pub fn charge_late(&self, caller: CallerKey) {
        let (ledger, method) = (&self.ledger, Method::Other);
        let plan = ledger.plan();
        let choice = plan.caller.choose(&caller, method);
        let now = ledger.now();
        let LimitNow { limit: Limit::Quota(quota), origin, since } =
            ledger.limit(choice.rule, plan.since.caller, now)
        else {
            return;
        };
        let cost = choice.rule.costs().answer();
        let taker = choice.shared.map(|_| Taker { caller, group: plan.families.group(caller) });
        let key = ledger.caller_key(&plan, caller, method, &choice);
        let ask = Ask { key, quota, since, cost, taker, attempt: Attempt::Only };
        let name = || (caller_name(caller, &choice), method.rpc());
        let paid = ledger.callers().charge_late(now, &ask, ledger.shortfall(origin), name);
        ledger.counters.count_soft_limits(plan.soft, Stage::Caller, paid);
    }

    /// Counts a call of `caller` that was refused before it could be admitted, as there was no memory for it.
    pub fn note_out_of_memory(&self, caller: CallerKey, method: Method) {
        let ledger = &self.ledger;
        let plan = ledger.plan();
        let question =
            Question { plan: &plan, stage: Stage::Node, method, dry: false, attempt: Attempt::Only };
        drop(ledger.refuse_for_memory(&question, caller));
        self.note_refused(caller, method);
    }

    /// Counts for people that a call of `caller` was refused before it could be admitted.
    pub fn note_refused(&self, caller: CallerKey, method: Method) {
        let ledger = &self.ledger;
        let plan = ledger.plan();
        let choice = plan.caller.choose(&caller, method);
        let key = ledger.caller_key(&plan, caller, method, &choice);
        let limit = ledger.limit(choice.rule, plan.since.caller, ledger.now()).limit;
        let quota = limit.quota().unwrap_or(Quota::NOTHING_TAKEN);
        let who = || (caller_name(caller, &choice), method.rpc());
        ledger.callers().note_refused_anybody(ledger.now(), key, quota, who);
    }

    /// A place for an attestation before an update of an open stream of `caller`, at once or not at all. There are as
    /// many as for calls and they are shared in the same way, but they are others: whatever streams wait for, calls are
    /// attested. It costs no tokens, and is no refusal: the update is only later.
    pub fn place_for_update(&self, caller: CallerKey) -> Option<UpdatePlace> {
        let family = self.ledger.plan().families.group(caller);
        let slot = self.ledger.update_slots.take(family).ok()?;
        Some(UpdatePlace { slot })
    }

    /// A place for a call of `caller` that waits for an entry, at once or not at all: one of those of calls that wait.
    pub fn place_to_wait(&self, caller: CallerKey) -> Option<UpdatePlace> {
        let slot = self.ledger.places.take(self.family_of(caller)).ok()?;
        Some(UpdatePlace { slot })
    }

    /// Whose share of what there is a bounded number of a caller takes.
    pub fn family_of(&self, caller: CallerKey) -> u64 {
        self.ledger.plan().families.group(caller)
    }

    /// Charges an admitted call to the identities it is answered with: all of them, or none. `ids` in the order
    /// in which they are served, the default identity first; bundle calls are charged to that one alone.
    /// Attestation is over then, and its slot is free. Waits where that is worth it, as [`Limits::admit`] does.
    ///
    /// Identities that share a bucket (the same SPIFFE ID, or a mask) are charged to it once.
    ///
    /// # Errors
    /// [`Refusal`] when one of them has no tokens left; nothing was charged then, and the caller's tokens are
    /// given back.
    pub async fn admit_for<'a, P>(
        &self,
        admitted: &mut Admitted<P>,
        ids: impl IntoIterator<Item = &'a SpiffeId> + Clone,
    ) -> Result<(), Refusal> {
        admitted.slot = None;
        let charge = &mut admitted.charge;
        let attempt = charge.waiting.patience.first();
        let Err(refusal) = self.charge_all(charge, ids.clone(), attempt) else { return Ok(()) };
        self.ledger.want(&refusal);
        if attempt.ends(&refusal) {
            return Err(self.ledger.behind_waiting(refusal, charge.taker.group));
        }
        Box::pin(self.wait_for_all(charge, ids, refusal)).await
    }

    /// [`Limits::admit_for`] without any wait.
    ///
    /// # Errors
    /// As [`Limits::admit_for`].
    pub fn admit_identities<'a, P>(
        &self,
        admitted: &mut Admitted<P>,
        ids: impl IntoIterator<Item = &'a SpiffeId>,
    ) -> Result<(), Refusal> {
        admitted.slot = None;
        self.charge_all(&mut admitted.charge, ids, Attempt::Only)
    }

    async fn wait_for_all<'a>(
        &self,
        charge: &mut Charge,
        ids: impl IntoIterator<Item = &'a SpiffeId> + Clone,
        mut refusal: Refusal,
    ) -> Result<(), Refusal> {
        let Ok(place) = self.ledger.places.take(charge.taker.group) else {
            let done = self.charge_all(charge, ids, Attempt::Last);
            return done.map_err(|refusal| self.ledger.behind_waiting(refusal, charge.taker.group));
        };
        loop {
            let attempt = charge.waiting.for_tokens(&self.ledger, &refusal, place.nth()).await;
            match self.charge_all(charge, ids.clone(), attempt) {
                Err(next) if !attempt.ends(&next) => refusal = next,
                done => return done.map_err(|refusal| refusal.of_nth(place.nth())),
            }
        }
    }

    fn charge_all<'a>(
        &self,
        charge: &mut Charge,
        ids: impl IntoIterator<Item = &'a SpiffeId>,
        attempt: Attempt,
    ) -> Result<(), Refusal> {
        let method = charge.method;
        if !method.has_identity() {
            return Ok(());
        }
        let charged = if method.is_bundles() { 1 } else { usize::MAX };
        let plan = self.ledger.plan();
        let Charge { taker, exempt: caller_exempt, spared, nth, .. } = *charge;
        let now = self.ledger.now();
        let mut call = CallToSpare { method, taker, now, spared, nth };
        let of = IdentityCall { plan: &plan, caller_exempt, attempt };
        let charged = self.ledger.charge_identities(&of, &mut call, ids.into_iter().take(charged));
        charge.spared = call.spared;
        charged.inspect_err(|refusal| {
            if attempt.ends(refusal) {
                charge.refund();
            }
        })
    }
}

/// A call at the caller stage.
#[derive(Clone, Copy)]
struct CallerCall {
    taker: Taker,
    method: Method,
    waiting: WaitOfCall,
    nth: NthCall,
}

/// A call on its way through the caller stage. It can stop and go on, and gives back what it holds when it is dropped.
struct Entering<'a, P> {
    ledger: &'a Arc<Ledger>,
    peer: P,
    call: CallerCall,
    passed: Option<Passed>,
    slot: Option<AttestationSlot>,
}

/// What is known of a call that the caller's own bucket let pass.
struct Passed {
    charge: Charge,
    /// What kind of key it was charged to.
    own: ChargedAs,
    /// The caller's rule is a rehearsal.
    dry: bool,
    /// As whom it counts as allowed when it has passed the stage. A dry run that let it pass was counted.
    allowed: Option<ChargedAs>,
    needs_slot: bool,
}

impl<'a, P: Caller> Entering<'a, P> {
    /// One that begins now.
    fn new(ledger: &'a Arc<Ledger>, peer: P, method: Method, patience: Patience) -> Self {
        let (caller, nth) = (peer.caller_key(), peer.begins_call());
        // Its family is found with the plan that it is decided by.
        let taker = Taker { caller, group: 0 };
        let waiting = WaitOfCall::new(ledger.now(), patience);
        Self { ledger, peer, call: CallerCall { taker, method, waiting, nth }, passed: None, slot: None }
    }

    /// Goes as far as it comes at once.
    fn begin(&mut self) -> Result<(), Refusal> {
        let ledger = self.ledger;
        let (plan, waiting) = (ledger.plan(), self.call.waiting);
        let group = plan.families.group(self.call.taker.caller);
        self.call.taker.group = group;
        let attempt = waiting.patience.first();
        self.go_on(&plan, waiting.arrived, attempt).map_err(|refusal| {
            ledger.want(&refusal);
            if attempt.ends(&refusal) { ledger.behind_waiting(refusal, group) } else { refusal }
        })
    }

    /// It went to the end.
    fn admitted(self) -> Admitted<P> {
        let Passed { charge, .. } = self.passed.expect("who went to the end has passed");
        Admitted { peer: self.peer, charge, slot: self.slot }
    }

    /// Goes on from where it had to stop, as far as it comes.
    fn go_on(&mut self, plan: &CallPlan, now: u64, attempt: Attempt) -> Result<(), Refusal> {
        let passed = match &mut self.passed {
            Some(passed) => passed,
            none => none.insert(self.ledger.charge_caller(plan, &self.call, now, attempt)?),
        };
        let above_share = self.call.nth == NthCall::Further && self.peer.is_above_share();
        let done = if above_share { self.ledger.refuse_bytes(plan, passed, attempt) } else { Ok(()) }
            .and_then(|()| self.ledger.beyond_its_own(plan, passed, &mut self.slot, now, attempt));
        done.inspect_err(|refusal| {
            if attempt.ends(refusal) {
                passed.charge.refund();
            }
        })
    }

    /// Waits for what it was refused for, and goes on, until it is through or may wait no longer.
    async fn wait(&mut self, mut refusal: Refusal) -> Result<(), Refusal> {
        let ledger = self.ledger;
        let group = self.call.taker.group;
        let Ok(place) = ledger.places.take(group) else {
            let done = self.go_on(&ledger.plan(), ledger.now(), Attempt::Last);
            return done.map_err(|refusal| ledger.behind_waiting(refusal, group));
        };
        loop {
            let attempt = if refusal.reason == Reason::InFlight {
                self.slot = self.call.waiting.for_attestation(ledger, group).await;
                if self.slot.is_some() { Attempt::Again } else { Attempt::Last }
            } else {
                // Whoever waits for tokens keeps nobody from being attested.
                self.slot = None;
                self.call.waiting.for_tokens(ledger, &refusal, place.nth()).await
            };
            match self.go_on(&ledger.plan(), ledger.now(), attempt) {
                Err(next) if !attempt.ends(&next) => refusal = next,
                done => return done.map_err(|refusal| refusal.of_nth(place.nth())),
            }
        }
    }
}

pub(super) fn caller_name(caller: CallerKey, choice: &Choice<'_, CallerPattern>) -> BucketName {
    match choice.shared {
        Some(pattern) => BucketName::Callers((**pattern).clone()),
        None => BucketName::Caller(caller),
    }
}

impl Ledger {
    /// The caller's own bucket. What a dry run let pass is counted here.
    fn charge_caller(
        self: &Arc<Self>,
        plan: &CallPlan,
        call: &CallerCall,
        now: u64,
        attempt: Attempt,
    ) -> Result<Passed, Refusal> {
        let CallerCall { taker, method, waiting, nth } = *call;
        let caller = taker.caller;
        let mut call = CallToSpare { method, taker, now, spared: false, nth };
        let choice = plan.caller.choose(&caller, method);
        let LimitNow { limit, origin, since } = self.limit(choice.rule, plan.since.caller, now);
        let dry = plan.dry || choice.rule.dry_run;
        let own = if choice.shared.is_some() { ChargedAs::Shared } else { caller.charged_as() };
        let costs = choice.rule.costs();
        let shares = choice.shared.map(|_| taker);
        let key = || self.caller_key(plan, caller, method, &choice);
        let (mut held, mut allowed) = (None, Some(own));
        let quota = limit.quota();
        let each = quota.map_or(Duration::ZERO, |quota| quota.time_of(costs.answer()));
        let lacking = |reason, TooFew { wait: retry_after, rest }| Scarcity {
            charged_as: own,
            reason,
            retry_after,
            each,
            origin,
            rest,
            quota,
        };
        let lack = match limit {
            Limit::Exempt | Limit::Unlimited => None,
            Limit::Block => Some((key(), lacking(Reason::Blocked, Duration::MAX.into()))),
            Limit::Quota(quota) => {
                let key = key();
                let ask = Ask { key, quota, since, cost: costs.answer(), taker: shares, attempt };
                let short = self.shortfall_of(nth, origin);
                let mut callers = self.callers();
                match callers.hold_by(
                    now,
                    &ask,
                    short,
                    || self.spare(&mut call, origin),
                    || (caller_name(caller, &choice), method.rpc()),
                ) {
                    Ok(tokens) => {
                        allowed = Some(tokens.place.charged_as(own));
                        held = Some(tokens);
                        None
                    }
                    Err(lack) => {
                        // One that is refused has no bucket where the table has no room for it.
                        let charged_as = if callers.knows(key) { own } else { ChargedAs::Overflow };
                        Some((key, Scarcity { charged_as, ..lacking(Reason::Rate, lack) }))
                    }
                }
            }
        };
        if let Some((key, lack)) = lack {
            let lack = Scarcity { retry_after: self.wait_by(choice.rule, limit, lack.retry_after), ..lack };
            let question = Question { plan, stage: Stage::Caller, method, dry, attempt };
            let name = || Some(caller_name(caller, &choice).charged_as(lack.charged_as));
            let done = self.refuse(&question, lack, name);
            if attempt.counts(&done) {
                match limit {
                    // It takes no tokens, and has no bucket but this.
                    Limit::Block => {
                        let who = || (caller_name(caller, &choice), method.rpc());
                        self.callers().note_refused_anybody(now, key, Quota::NOTHING_TAKEN, who);
                    }
                    _ => self.callers().note_refused(key, shares),
                }
            }
            done?;
            allowed = None;
        }
        let exempt = limit == Limit::Exempt;
        let charge = Charge {
            ledger: Arc::clone(self),
            method,
            held,
            costs,
            taker,
            pays: if held.is_some() { costs.answer() } else { 0 },
            exempt,
            spared: call.spared,
            nth,
            soft: plan.soft,
            waiting,
        };
        // Nothing is attested for what is no Workload API.
        Ok(Passed { charge, own, dry, allowed, needs_slot: !exempt && method != Method::Other })
    }

    /// Refuses a call of a caller that holds more than its share while memory is short.
    fn refuse_bytes(&self, plan: &CallPlan, passed: &Passed, attempt: Attempt) -> Result<(), Refusal> {
        let Charge { method, taker, exempt, .. } = passed.charge;
        if exempt {
            return Ok(());
        }
        let dry = plan.dry || plan.node_dry;
        self.refuse_for_memory(&Question { plan, stage: Stage::Node, method, dry, attempt }, taker.caller)
    }

    /// The same of any call that finds no memory.
    fn refuse_for_memory(&self, question: &Question<'_>, caller: CallerKey) -> Result<(), Refusal> {
        let lack = Scarcity {
            charged_as: ChargedAs::Node,
            reason: Reason::Memory,
            retry_after: FOR_ROOM,
            each: Duration::ZERO,
            origin: Origin::ByDefault,
            rest: Remainder::Nothing,
            quota: None,
        };
        // What it holds it holds with its family.
        self.refuse(question, lack, || Some(BucketName::Caller(question.plan.families.head(caller))))
    }

    /// A place among the attestations in flight, and for a method without identity the node's bucket.
    fn beyond_its_own(
        &self,
        plan: &CallPlan,
        passed: &mut Passed,
        slot: &mut Option<AttestationSlot>,
        now: u64,
        attempt: Attempt,
    ) -> Result<(), Refusal> {
        if passed.needs_slot && slot.is_none() {
            *slot = self.take_slot(plan, passed, attempt)?;
        }
        let Passed { charge: Charge { method, taker, exempt, spared, nth, .. }, .. } = *passed;
        if let Some(charged_as) = passed.allowed.take() {
            self.counters.count(Stage::Caller, Some(method), charged_as, Decision::Allowed);
        }
        // A health check is not the first thing to be shed.
        if method == Method::ValidateJwtSvid && !exempt {
            let mut call = CallToSpare { method, taker, now, spared, nth };
            self.charge_node(plan, &mut call, attempt)?;
            passed.charge.spared = call.spared;
        }
        Ok(())
    }

    /// A place among the attestations in flight. Where a dry run of the caller's rule lets it pass without one,
    /// it does not count as allowed.
    fn take_slot(
        &self,
        plan: &CallPlan,
        passed: &mut Passed,
        attempt: Attempt,
    ) -> Result<Option<AttestationSlot>, Refusal> {
        let Taker { caller, group } = passed.charge.taker;
        let (stage, charged_as, dry) = match self.slots.take(group) {
            Ok(slot) => return Ok(Some(slot)),
            Err(Full::Share) => (Stage::Caller, passed.own, passed.dry || plan.node_dry),
            Err(Full::Node) => (Stage::Node, ChargedAs::Node, plan.dry || plan.node_dry),
        };
        let question = Question { plan, stage, method: passed.charge.method, dry, attempt };
        // How many run at once is an admin's word or not: who finds no place waits for one all the same.
        let lack = Scarcity {
            charged_as,
            reason: Reason::InFlight,
            retry_after: SHORT_WAIT,
            each: Duration::ZERO,
            origin: Origin::ByDefault,
            rest: Remainder::Nothing,
            quota: None,
        };
        // That all are busy is nobody's doing.
        self.refuse(&question, lack, || (stage == Stage::Caller).then_some(BucketName::Caller(caller)))?;
        passed.needs_slot = false;
        if stage == Stage::Caller {
            passed.allowed = None;
        }
        Ok(None)
    }
}
