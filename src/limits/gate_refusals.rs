//! What becomes of a connection that the gate refuses: it is counted, and people are shown and told who was refused what.

use std::sync::atomic::Ordering::Relaxed;

use super::{
    bucket::Quota,
    caller::CallerKey,
    counters::Decision,
    gate::{Arriving, GateState, SharedGate},
    out_of_room::OutOfRoom,
    refusal::{ChargedAs, ConnectionRefusal, Reason, Stage},
    report::{BucketName, WhatIsRefused},
    rule::Origin,
};

impl SharedGate {
    /// Notes a refusal where people see it who look.
    pub(super) fn note_refused(&self, it: &Arriving<'_>, refusal: ConnectionRefusal, state: &mut GateState) {
        // That one is noted where it arises, in a rehearsal too.
        if refusal != ConnectionRefusal::CallerConnections {
            let quota = it.rule.limit().quota().unwrap_or(Quota::NOTHING_TAKEN);
            let who = || (BucketName::Caller(it.caller), "connections");
            state.rates.note_refused_anybody(it.now, self.key(it.plan, it.caller), quota, who);
        }
        state.complain(it, refusal);
    }

    /// Counts and tells a refusal.
    pub(super) fn refused(&self, refusal: ConnectionRefusal, caller: CallerKey, now: u64) {
        self.count(refusal, caller, Decision::Refused);
        // What is for want of room is told otherwise.
        if let Some((stage, reason)) = refusal.by_stage().filter(|_| refusal.is_callers_own()) {
            let name = BucketName::Caller(caller).charged_as(charged_as(refusal, stage, caller));
            let plan = self.plan.load();
            let quota = plan.rule(&caller).limit().quota().filter(|_| reason == Reason::Rate);
            let what = WhatIsRefused { stage, name, method: None, reason, origin: Origin::Set, quota };
            self.ledger.refusing().note(now, what, &plan.families);
        }
        self.want(refusal);
    }

    /// Counts what would have been done with more processor time.
    pub(super) fn want(&self, refusal: ConnectionRefusal) {
        if refusal == ConnectionRefusal::Processor {
            self.wanting.fetch_add(1, Relaxed);
        }
    }

    /// Counts a refusal, or what would be one.
    pub(super) fn count(
        &self,
        refusal: ConnectionRefusal,
        caller: CallerKey,
        decision: fn(Reason) -> Decision,
    ) {
        let Some((stage, reason)) = refusal.by_stage() else { return };
        self.ledger.counters.count(stage, None, charged_as(refusal, stage, caller), decision(reason));
    }
}

/// As whom one is refused.
fn charged_as(refusal: ConnectionRefusal, stage: Stage, caller: CallerKey) -> ChargedAs {
    match (stage, refusal) {
        (Stage::Node, _) => ChargedAs::Node,
        (_, ConnectionRefusal::OverflowRate) => ChargedAs::Overflow,
        _ => caller.charged_as(),
    }
}

impl GateState {
    /// Keeps what is to be told of a refusal for want of room.
    fn complain(&mut self, it: &Arriving<'_>, refusal: ConnectionRefusal) {
        let (held, share) = match refusal {
            ConnectionRefusal::Memory | ConnectionRefusal::MemoryTaken => {
                (it.group_bytes, self.bytes.share())
            }
            ConnectionRefusal::Descriptors | ConnectionRefusal::NodeConnections => {
                (u64::from(it.group_open), self.connections.share())
            }
            // It is short of no place, and has no share but its rate.
            ConnectionRefusal::Processor => (u64::from(it.group_open), u64::MAX),
            ConnectionRefusal::Unidentified
            | ConnectionRefusal::Blocked
            | ConnectionRefusal::CallerConnections
            | ConnectionRefusal::CallerRate
            | ConnectionRefusal::OverflowRate
            | ConnectionRefusal::NotOwner
            | ConnectionRefusal::AdminConnections => return,
        };
        let head = it.plan.families.head(it.caller);
        self.out_of_room.note(OutOfRoom { caller: it.caller, head, refusal, held, share });
    }
}
