//! How the gate stands, for those who look: the log, the admin socket, metrics, and who measures.

use std::sync::atomic::Ordering::Relaxed;

use super::{
    budget::Pressure,
    caller::CallerKey,
    gate::Gate,
    out_of_room::OutOfRoom,
    processor::ProcessorShare,
    report::{Heavy, Standing},
    shortage::Shortage,
};
use crate::telemetry::registry::float;

/// How memory stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryStanding {
    /// `None` for no bound.
    pub budget: Option<u64>,
    /// Bytes that connections hold.
    pub held: u64,
    /// Bytes that are used in all.
    pub used: u64,
    pub pressure: Pressure,
}

impl Gate {
    /// Connections of all callers.
    pub fn connections(&self) -> u32 {
        self.shared.state().total
    }

    /// The callers that hold most: their connections, and bytes.
    pub fn heaviest(&self, n: usize) -> Vec<(CallerKey, u32, u64)> {
        self.shared.state().accounts.heaviest(n)
    }

    /// The callers that were refused and let in most.
    pub fn report(&self, n: usize) -> Vec<Heavy> {
        self.shared.state().rates.heaviest(n)
    }

    /// Callers that were refused for want of room since this was last asked; a bounded number of them.
    pub fn out_of_room(&self) -> Vec<OutOfRoom> {
        let mut state = self.shared.state();
        state.complaints.drain().map(|(_, complaint)| complaint).collect()
    }

    /// How many connections were refused for want of processor time since this was last asked.
    pub fn wanting(&self) -> u64 {
        self.shared.wanting.swap(0, Relaxed)
    }

    /// How much of the processor the agent may use.
    pub fn processor_share(&self) -> ProcessorShare {
        self.shared.plan.load().cpu
    }

    /// How the rate of new connections of a caller stands.
    pub fn standing(&self, caller: CallerKey) -> Standing {
        let shared = &*self.shared;
        let plan = shared.plan.load();
        let key = shared.key(&plan, caller);
        let rule = plan.rule(&caller);
        let now = shared.ledger.now();
        let left = |quota| shared.state().rates.left(now, key, quota, now);
        Standing::under(rule.limit(), left).of_origin(rule.origin())
    }

    /// How memory stands.
    pub fn memory(&self) -> MemoryStanding {
        let state = self.shared.state();
        let held = self.shared.node.bytes();
        let Shortage { whole, .. } = state.bytes;
        MemoryStanding { budget: whole, held, used: state.bytes.used(held), pressure: state.bytes.pressure() }
    }

    /// How many callers' buckets are known. Also sets the gauge.
    pub fn keys(&self) -> usize {
        let keys = self.shared.state().rates.len();
        let [gauge, ..] = &self.shared.ledger.counters.keys;
        gauge.set(float(keys));
        keys
    }
}
