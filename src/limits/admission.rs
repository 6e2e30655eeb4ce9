//! The decisions about a call, before and after attestation.
//!
//! [`Limits::admit_caller`] gives an [`Admitted`], without which nobody attests; [`Limits::admit_identities`]
//! is asked with it once the identities are known. An [`Admitted`] holds the caller's tokens while the call
//! runs, and settles when it is dropped: so a call that is cancelled half-way is paid, and one that is refused
//! is not. Nothing here waits, and a decision takes no memory; a lock is held for a table look-up. Which bucket
//! in what order: see [`super`].

use std::{sync::Arc, time::Duration};

use super::{
    admitted::{Admitted, Charge},
    ask::Ask,
    caller::{Caller, CallerKey},
    caller_pattern::CallerPattern,
    counters::Decision,
    id_pattern::IdPattern,
    ledger::{CallPlan, HeldTokens, Identities, Ledger, Question},
    method::Method,
    policy::Choice,
    refusal::{ChargedAs, Reason, Refusal, Stage},
    report::BucketName,
    room::Room,
    rule::Limit,
    settings::LimitSettings,
    shares::Taker,
    slots::{AttestationSlot, Full},
    table::ChargedTo,
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
    _slot: AttestationSlot,
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

    /// Charges a call to its caller, before any attestation.
    ///
    /// # Errors
    /// [`Refusal`] when the caller has no tokens left, or too many calls are being attested.
    pub fn admit_caller<P: Caller>(&self, peer: P, method: Method) -> Result<Admitted<P>, Refusal> {
        let caller = peer.caller_key();
        let ledger = &self.ledger;
        let now = ledger.now();
        let plan = ledger.plan();
        let choice = plan.caller.choose(&caller, method);
        let limit = ledger.limit(choice.rule);
        let dry = plan.dry || choice.rule.dry_run;
        let call = CallerCall {
            question: Question { plan: &plan, stage: Stage::Caller, method, dry },
            taker: Taker { caller, group: plan.families.group(caller) },
            choice,
            now,
        };
        let (held, mut allowed) = ledger.charge_caller(&call, limit)?;
        let mut charge = Charge {
            ledger: Arc::clone(ledger),
            method,
            held,
            costs: choice.rule.costs(),
            taker: call.taker,
            pays: held.map_or(0, |held| held.ask.cost),
            exempt: limit == Limit::Exempt,
            soft: plan.soft,
        };
        // Nothing is attested for what is no Workload API.
        let attests = !charge.exempt && method != Method::Other;
        let slot = if attests { ledger.take_slot(&call, &mut allowed) } else { Ok(None) };
        let slot = slot.inspect_err(|_| charge.refund())?;
        if let Some(charged_as) = allowed {
            ledger.counters.count(Stage::Caller, Some(method), charged_as, Decision::Allowed);
        }
        // A health check is not the first thing to be shed.
        if method == Method::ValidateJwtSvid && !charge.exempt {
            ledger.charge_node(&plan, method, charge.taker, now).inspect_err(|_| charge.refund())?;
        }
        Ok(Admitted { peer, charge, slot })
    }

    /// A place for an attestation before an update of an open stream of `caller`, at once or not at all. There are as
    /// many as for calls and they are shared in the same way, but they are others: whatever streams wait for, calls are
    /// attested. It costs no tokens, and is no refusal: the update is only later.
    pub fn place_for_update(&self, caller: CallerKey) -> Option<UpdatePlace> {
        let family = self.ledger.plan().families.group(caller);
        let slot = self.ledger.update_slots.take(family).ok()?;
        Some(UpdatePlace { _slot: slot })
    }

    /// Charges an admitted call to the identities it is answered with: all of them, or none. `ids` in the order
    /// in which they are served, the default identity first; bundle calls are charged to that one alone.
    /// Attestation is over then, and its slot is free.
    ///
    /// Identities that share a bucket (the same SPIFFE ID, or a mask) are charged to it once.
    ///
    /// # Errors
    /// [`Refusal`] when one of them has no tokens left; nothing was charged then, and the caller's tokens are
    /// given back.
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
        let plan = self.ledger.plan();
        let (taker, caller_exempt) = (charge.taker, charge.exempt);
        let call = IdentityCall { plan: &plan, method, taker, caller_exempt, now: self.ledger.now() };
        self.ledger.charge_identities(&call, ids.into_iter().take(charged)).inspect_err(|_| charge.refund())
    }
}

/// A call at the caller stage.
struct CallerCall<'a> {
    question: Question<'a>,
    taker: Taker,
    choice: Choice<'a, CallerPattern>,
    now: u64,
}

impl CallerCall<'_> {
    fn charged_as(&self) -> ChargedAs {
        if self.choice.shared.is_some() { ChargedAs::Shared } else { self.taker.caller.charged_as() }
    }

    fn name(&self) -> BucketName {
        caller_name(self.taker.caller, &self.choice)
    }
}

/// A call at the identity stage.
struct IdentityCall<'a> {
    plan: &'a CallPlan,
    method: Method,
    taker: Taker,
    caller_exempt: bool,
    now: u64,
}

/// An identity that refuses.
struct RefusingId<'a> {
    wait: Duration,
    reason: Reason,
    charged_as: ChargedAs,
    id: &'a SpiffeId,
    choice: Choice<'a, IdPattern>,
}

/// As whom the one is charged whose own bucket is this, or would be.
fn charged_as(place: ChargedTo, own: ChargedAs) -> ChargedAs {
    match place {
        ChargedTo::Own(_) => own,
        ChargedTo::Overflow | ChargedTo::Stray => ChargedAs::Overflow,
    }
}

pub(super) fn caller_name(caller: CallerKey, choice: &Choice<'_, CallerPattern>) -> BucketName {
    match choice.shared {
        Some(pattern) => BucketName::Callers((**pattern).clone()),
        None => BucketName::Caller(caller),
    }
}

pub(super) fn identity_name(id: &SpiffeId, choice: &Choice<'_, IdPattern>) -> BucketName {
    match choice.shared {
        Some(mask) => BucketName::Masked(id.clone(), Arc::clone(mask)),
        None => BucketName::Identity(id.clone()),
    }
}

impl Ledger {
    /// The caller's own bucket. Returns the tokens it holds, and as whom the call counts as allowed once the
    /// last of this stage has let it pass; what a dry run let pass is counted here.
    fn charge_caller(
        &self,
        call: &CallerCall<'_>,
        limit: Limit,
    ) -> Result<(Option<HeldTokens>, Option<ChargedAs>), Refusal> {
        let Question { plan, method, .. } = call.question;
        let own = call.charged_as();
        let (reason, wait) = match limit {
            Limit::Exempt | Limit::Unlimited => return Ok((None, Some(own))),
            Limit::Block => (Reason::Blocked, Duration::MAX),
            Limit::Quota(quota) => {
                let key = self.caller_key(plan, call.taker.caller, method, &call.choice);
                let cost = call.choice.rule.costs().answer();
                let taker = call.choice.shared.map(|_| call.taker);
                let ask = Ask { key, quota, cost, taker };
                match self.callers().hold(call.now, &ask, || (call.name(), method.rpc())) {
                    Ok(place) => {
                        let held = HeldTokens { ask, place };
                        return Ok((Some(held), Some(charged_as(place, own))));
                    }
                    Err(wait) => (Reason::Rate, wait),
                }
            }
        };
        self.refuse(&call.question, own, reason, wait)
            .inspect_err(|refusal| self.note(call.now, refusal, &call.name()))?;
        Ok((None, None))
    }

    /// A place among the attestations in flight. Where a dry run of the caller's rule lets it pass without one,
    /// it does not count as allowed.
    fn take_slot(
        &self,
        call: &CallerCall<'_>,
        allowed: &mut Option<ChargedAs>,
    ) -> Result<Option<AttestationSlot>, Refusal> {
        let question = call.question;
        let plan = question.plan;
        let (stage, charged_as, dry) = match self.slots.take(call.taker.group) {
            Ok(slot) => return Ok(Some(slot)),
            Err(Full::Share) => (Stage::Caller, call.charged_as(), question.dry || plan.node_dry),
            Err(Full::Node) => (Stage::Node, ChargedAs::Node, plan.dry || plan.node_dry),
        };
        self.refuse(&Question { stage, dry, ..question }, charged_as, Reason::InFlight, SHORT_WAIT)
            .inspect_err(|refusal| self.note(call.now, refusal, &BucketName::Caller(call.taker.caller)))?;
        if stage == Stage::Caller {
            *allowed = None;
        }
        Ok(None)
    }

    /// The buckets of the identities, and the node's: all of them, or none.
    fn charge_identities<'a: 'p, 'p>(
        &self,
        call: &IdentityCall<'p>,
        ids: impl Iterator<Item = &'a SpiffeId>,
    ) -> Result<(), Refusal> {
        let IdentityCall { plan, method, taker, caller_exempt, now } = *call;
        let mut guard = self.identities();
        let identities = &mut *guard;
        identities.held.clear();
        // Without an identity (a verifier that need not have one) the node alone is charged.
        let (mut node_counts, mut nobody) = (false, true);
        // Of several that refuse, the one to wait for longest.
        let mut longest: Option<RefusingId<'_>> = None;
        for id in ids {
            nobody = false;
            let choice = plan.identity.choose(id, method);
            let limit = self.limit(choice.rule);
            node_counts |= limit != Limit::Exempt;
            let Some(refusing) = self.charge_identity(call, identities, id, choice, limit) else { continue };
            if plan.dry || choice.rule.dry_run {
                let decision = Decision::WouldRefuse(refusing.reason);
                self.counters.count(Stage::Identity, Some(method), refusing.charged_as, decision);
            } else if longest.as_ref().is_none_or(|longest| longest.wait < refusing.wait) {
                longest = Some(refusing);
            }
        }
        let done = match longest {
            Some(RefusingId { wait, reason, charged_as, id, choice }) => {
                let question = Question { plan, stage: Stage::Identity, method, dry: false };
                self.refuse(&question, charged_as, reason, wait)
                    .inspect_err(|refusal| self.note(now, refusal, &identity_name(id, &choice)))
            }
            None if (node_counts || nobody) && !caller_exempt => self.charge_node(plan, method, taker, now),
            None => Ok(()),
        };
        self.settle_identities(call, identities, done.is_ok());
        done
    }

    /// One identity's bucket: holds its tokens, or says why it refuses.
    fn charge_identity<'a>(
        &self,
        call: &IdentityCall<'a>,
        identities: &mut Identities,
        id: &'a SpiffeId,
        choice: Choice<'a, IdPattern>,
        limit: Limit,
    ) -> Option<RefusingId<'a>> {
        let IdentityCall { method, taker, caller_exempt, now, .. } = *call;
        let own = if choice.shared.is_some() { ChargedAs::Shared } else { ChargedAs::SpiffeId };
        let refusing = |reason, wait| Some(RefusingId { wait, reason, charged_as: own, id, choice });
        let quota = match limit {
            // Exempt is from every bucket; what is blocked is blocked.
            Limit::Quota(quota) if !caller_exempt => quota,
            Limit::Exempt | Limit::Unlimited | Limit::Quota(_) => {
                self.counters.count(Stage::Identity, Some(method), own, Decision::Allowed);
                return None;
            }
            Limit::Block => return refusing(Reason::Blocked, Duration::MAX),
        };
        let key = self.identity_key(id, method, &choice);
        let Identities { table, held } = identities;
        if held.iter().any(|(other, _)| other.ask.key.hash == key.hash) {
            return None;
        }
        let cost = choice.rule.costs().answer();
        let ask = Ask { key, quota, cost, taker: Some(taker) };
        match table.hold(now, &ask, || (identity_name(id, &choice), method.rpc())) {
            Ok(place) => {
                held.push((HeldTokens { ask, place }, charged_as(place, own)));
                None
            }
            Err(wait) => refusing(Reason::Rate, wait),
        }
    }

    /// Pays what is held, or gives it back.
    fn settle_identities(&self, call: &IdentityCall<'_>, identities: &mut Identities, passed: bool) {
        let Identities { table, held } = identities;
        for (it, charged_as) in held.drain(..) {
            let paid = table.settle(&it.ask, it.place, if passed { it.ask.cost } else { 0 });
            if passed {
                self.counters.count(Stage::Identity, Some(call.method), charged_as, Decision::Allowed);
                self.counters.count_soft_limits(call.plan.soft, Stage::Identity, paid);
            }
        }
    }
}
