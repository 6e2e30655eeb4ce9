//! The proof that a call passed the caller stage, and what the call will pay.

use std::{sync::Arc, time::Duration};

use super::{
    ask::{Ask, HeldTokens},
    attempt::Attempt,
    caller::NthCall,
    ledger::{Ledger, LimitNow},
    method::Method,
    refusal::Stage,
    rule::{Costs, Limit},
    settings::SoftLimits,
    shares::Taker,
    slots::AttestationSlot,
    waiting::WaitOfCall,
};
use crate::identity::SpiffeId;

/// Proof that a peer's call passed the caller stage: attestation takes nothing else. Made by
/// [`Limits::admit_caller`](super::Limits::admit_caller) alone.
///
/// It holds the caller's tokens; when it is dropped they are paid, or given back if the call was refused.
#[derive(Debug)]
pub struct Admitted<P> {
    pub(super) peer: P,
    pub(super) charge: Charge,
    /// Until attestation is over.
    pub(super) slot: Option<AttestationSlot>,
}

impl<P> Admitted<P> {
    /// The peer that was admitted.
    pub fn peer(&self) -> &P {
        &self.peer
    }

    /// Says that the caller could not be attested, or has no identity: it pays [`Costs::failed_attestation`]. Not
    /// for what is no doing of the caller's.
    pub fn attestation_failed(&mut self) {
        self.charge.pays = self.charge.pays.max(self.charge.costs.failed_attestation());
        self.slot = None;
    }

    /// Its place among the attestations, which is free again when that is dropped.
    pub(crate) fn take_place(&mut self) -> Option<AttestationSlot> {
        self.slot.take()
    }

    /// For how long it may still be kept waiting, by what its caller said of that.
    pub fn patience_left(&self) -> Duration {
        self.charge.waiting.patience_left(self.charge.ledger.now())
    }

    /// Says that something was signed for this call: the caller and the identity pay [`Costs::signature`] in
    /// place of [`Costs::answer`].
    pub fn signed(&mut self, id: &SpiffeId) {
        self.charge.signed(id);
    }
}

/// What a call will pay.
#[derive(Debug)]
pub(super) struct Charge {
    pub(super) ledger: Arc<Ledger>,
    pub(super) method: Method,
    pub(super) held: Option<HeldTokens>,
    /// Whose share of what all share it takes.
    pub(super) taker: Taker,
    pub(super) costs: Costs,
    /// Tokens to take when the call ends.
    pub(super) pays: u32,
    /// By a rule: not charged to the node either.
    pub(super) exempt: bool,
    /// It passes where defaults have no tokens for it.
    pub(super) spared: bool,
    pub(super) nth: NthCall,
    /// Which are counted when it pays.
    pub(super) soft: SoftLimits,
    /// What it may wait yet.
    pub(super) waiting: WaitOfCall,
}

impl Charge {
    /// The call is refused further on, by what others share: it costs nothing, and counts as refused for the caller.
    pub(super) fn refund(&mut self) {
        self.pays = 0;
        if let Some(held) = self.held {
            self.ledger.callers().note_refused(held.key, Some(self.taker));
        }
    }

    fn signed(&mut self, id: &SpiffeId) {
        if self.exempt {
            return;
        }
        let more = |costs: Costs| costs.signature() - costs.answer();
        self.pays = self.pays.saturating_add(more(self.costs));
        let ledger = &self.ledger;
        let plan = ledger.plan();
        let choice = plan.identity.choose(id, self.method);
        let more = more(choice.rule.costs());
        let now = ledger.now();
        if let LimitNow { limit: Limit::Quota(quota), origin, since } =
            ledger.limit(choice.rule, plan.since.identity, now)
            && more > 0
        {
            let key = ledger.identity_key(id, self.method, &choice);
            let ask = Ask { key, quota, since, cost: more, taker: Some(self.taker), attempt: Attempt::Again };
            let paid = ledger.identities().table.charge(now, &ask, ledger.shortfall(origin));
            ledger.counters.count_soft_limits(self.soft, Stage::Identity, paid);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(held) = self.held {
            let ledger = &self.ledger;
            let paid = ledger.callers().settle_held(&held, self.pays);
            ledger.counters.count_soft_limits(self.soft, Stage::Caller, paid);
        }
    }
}
