//! How the gate stands, for those who look: the log, the admin socket, metrics, and who measures.

use std::{num::NonZeroU32, sync::atomic::Ordering::Relaxed};

use super::{
    budget::Pressure,
    caller::{CallerKey, WhoHolds},
    gate::Gate,
    in_force::limit_text,
    out_of_room::OutOfRoom,
    processor::ProcessorShare,
    report::{BucketName, Heavy, Standing},
    rule::Limit,
    shortage::Shortage,
};
use crate::telemetry::registry::float;

/// What a caller holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldByCaller {
    /// Its connections, and the bytes that they hold; where it has no family, what is left of earlier ones with them.
    pub own: (u32, u64),
    /// The same of its family, if it has one.
    pub family: Option<(u32, u64)>,
    /// How many connections somebody let it have.
    pub most: Option<u32>,
}

/// What each caller, with its family, may hold: of bytes and of connections, where these are short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharesNow {
    pub bytes: Option<u64>,
    pub connections: Option<u64>,
}

/// How memory stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStanding {
    pub budget: u64,
    /// Bytes that callers hold.
    pub held: u64,
    /// Of these, those that the kernel keeps of the [names](super::names) of their processes.
    pub names: u64,
    /// Bytes that are used in all.
    pub used: u64,
    pub pressure: Pressure,
}

impl Gate {
    /// Connections of all callers.
    pub fn connections(&self) -> u32 {
        self.shared.state().total
    }

    /// Who holds most, a family as one: their connections, and bytes.
    pub fn heaviest(&self, n: usize) -> Vec<(WhoHolds, u32, u64)> {
        self.shared.state().accounts.heaviest(n)
    }

    /// Who stands for a caller and its family.
    pub fn head(&self, caller: CallerKey) -> CallerKey {
        self.shared.plan.load().families.head(caller)
    }

    /// The callers of a caller's family that have connections; the caller where none has.
    pub fn holder(&self, caller: CallerKey) -> WhoHolds {
        let group = self.family_of(caller);
        self.shared.state().accounts.holder(group).unwrap_or(WhoHolds { caller, others: 0 })
    }

    /// How many connections of all callers there may be.
    pub fn most_connections(&self) -> u32 {
        self.shared.plan.load().most
    }

    /// What a caller holds.
    pub fn held_by(&self, caller: CallerKey) -> HeldByCaller {
        let plan = self.shared.plan.load();
        let rule = plan.rule(&caller);
        let most = rule.connections.filter(|_| matches!(rule.limit(), Limit::Quota(_) | Limit::Unlimited));
        let state = self.shared.state();
        let of_group = state.accounts.of_group(plan.families.group(caller));
        let of_group = (of_group.open, of_group.bytes);
        let (own, family) = match plan.families.of(caller) {
            Some(_) => (state.accounts.of_caller(&caller), Some(of_group)),
            None => (of_group, None),
        };
        HeldByCaller { own, family, most: most.map(NonZeroU32::get) }
    }

    /// What each may hold, where that is short.
    pub fn shares(&self) -> SharesNow {
        let state = self.shared.state();
        let of = |it: &Shortage| it.is_short().then(|| it.share()).filter(|share| *share < u64::MAX);
        SharesNow { bytes: of(&state.bytes), connections: of(&state.connections) }
    }

    /// What there is a number of for connections: connections, where somebody set it, or descriptors.
    pub fn places(&self) -> &'static str {
        self.shared.plan.load().places_text()
    }

    /// The same, if they are short, or gone but for those that are kept for callers without one.
    pub fn lacks_places(&self) -> Option<&'static str> {
        let plan = self.shared.plan.load();
        let state = self.shared.state();
        let lacks = state.connections.is_short() || state.total >= plan.for_anybody();
        lacks.then(|| plan.places_text())
    }

    /// The callers that were refused and let in most.
    pub fn report(&self, n: usize) -> Vec<Heavy> {
        let state = self.shared.state();
        let mut all = state.rates.heaviest(n);
        all.extend(Heavy::without_bucket("connections", state.rates.unknown()));
        all
    }

    /// Callers that were refused for want of room since this was last asked; a bounded number of them.
    pub fn out_of_room(&self) -> Vec<OutOfRoom> {
        self.shared.state().out_of_room.take()
    }

    /// How many connections were refused for want of processor time since this was last asked.
    pub fn wanting(&self) -> u64 {
        self.shared.wanting.swap(0, Relaxed)
    }

    /// Whether what is the caller's own refuses none of its connections, and counts those that it would.
    pub fn is_dry_run(&self, caller: CallerKey) -> bool {
        let plan = self.shared.plan.load();
        plan.dry || plan.rule(&caller).dry_run
    }

    /// How often a caller may connect anew, in words.
    pub fn rate_of(&self, caller: CallerKey) -> String {
        limit_text(self.shared.plan.load().rule(&caller).limit())
    }

    /// How much of the processor the agent may use.
    pub fn processor_share(&self) -> ProcessorShare {
        self.shared.plan.load().cpu
    }

    /// The bucket that new connections of a caller are charged to, and how it stands.
    pub fn standing(&self, caller: CallerKey) -> (BucketName, Standing) {
        let shared = &*self.shared;
        let plan = shared.plan.load();
        let key = shared.key(&plan, caller);
        let rule = plan.rule(&caller);
        let now = shared.ledger.now();
        let left = |quota| shared.state().rates.left(now, key, quota, now);
        let standing = Standing::under(rule.limit(), left).of_origin(rule.origin());
        let in_overflow = match rule.limit() {
            Limit::Quota(quota) => shared.state().rates.is_in_overflow(now, key, quota),
            Limit::Exempt | Limit::Unlimited | Limit::Block => false,
        };
        (if in_overflow { BucketName::WithoutBucket } else { BucketName::Caller(caller) }, standing)
    }

    /// How many connections of a caller were refused, whatever for, since its bucket became known.
    pub fn refused(&self, caller: CallerKey) -> u32 {
        let shared = &*self.shared;
        let key = shared.key(&shared.plan.load(), caller);
        shared.state().rates.refused(key)
    }

    /// How memory stands.
    pub fn memory(&self) -> MemoryStanding {
        let state = self.shared.state();
        let held = self.shared.node.bytes();
        let Shortage { whole, .. } = state.bytes;
        let names = state.accounts.names_held();
        MemoryStanding {
            budget: whole,
            held,
            names,
            used: state.bytes.used(held),
            pressure: state.bytes.pressure(),
        }
    }

    /// How many callers' buckets are known. Also sets the gauge.
    pub fn keys(&self) -> usize {
        let keys = self.shared.state().rates.len();
        let [gauge, ..] = &self.shared.ledger.counters.keys;
        gauge.set(float(keys));
        keys
    }
}
