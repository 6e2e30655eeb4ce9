//! Memory at the gate that is set aside for callers that hold nothing, and who was let in on it.
//!
//! It is its owner's for [`LENT_FOR`] at least, and for good when there is memory beside it. After that the next that finds none takes
//! it from who has had it longest, who is closed.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use super::{
    caller::CallerKey,
    holding::{Holding, Notice},
    lent_places::LENT_FOR,
};

/// A connection that was let in on it.
#[derive(Debug)]
struct Lent {
    since: u64,
    caller: CallerKey,
    holding: Weak<Holding>,
}

/// All that is lent.
#[derive(Debug, Default)]
pub(super) struct LentMemory {
    /// Connections that have some.
    connections: u32,
    /// These, those that were let in first before the others, and some that have ended.
    lent: VecDeque<Lent>,
}

impl LentMemory {
    /// How many connections have some.
    pub(super) fn connections(&self) -> u32 {
        self.connections
    }

    /// One more was let in on what is set aside for `most`.
    pub(super) fn lend(&mut self, since: u64, caller: CallerKey, holding: &Arc<Holding>, most: u32) {
        holding.put_on_reserve();
        self.connections += 1;
        // Those that have ended are forgotten now and then, whoever stays before them.
        if self.lent.len() >= usize::try_from(most).unwrap_or(usize::MAX).saturating_mul(4) {
            self.lent.retain(|lent| lent.holding.upgrade().is_some_and(|holding| holding.is_on_reserve()));
        }
        self.lent.push_back(Lent { since, caller, holding: Arc::downgrade(holding) });
    }

    /// There is memory beside it: who was let in on it holds what all hold.
    pub(super) fn give_back(&mut self) {
        while let Some(Lent { holding, .. }) = self.lent.pop_front() {
            if let Some(holding) = holding.upgrade() {
                holding.take_from_reserve();
            }
        }
        self.connections = 0;
    }

    /// Takes some back from who has had it longest, if that is long enough, and closes that one. Returns whom.
    pub(super) fn take_back(&mut self, now: u64) -> Option<(CallerKey, Arc<Holding>)> {
        while let Some(Lent { since, caller, holding }) = self.lent.front() {
            let (caller, holding) = (*caller, holding.upgrade().filter(|holding| holding.is_on_reserve()));
            if holding.is_some() && now.saturating_sub(*since) < LENT_FOR {
                return None;
            }
            self.lent.pop_front();
            if let Some(holding) = holding {
                self.gone(&holding);
                holding.tell(Notice::Close);
                return Some((caller, holding));
            }
        }
        None
    }

    /// One that may have some has none any more.
    pub(super) fn gone(&mut self, holding: &Holding) {
        self.connections = self.connections.saturating_sub(u32::from(holding.take_from_reserve()));
    }
}
