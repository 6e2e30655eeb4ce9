//! Attestations in flight: a bounded number, shared fairly, and nobody waits in a queue.
//!
//! A caller may have `all / (callers that have any, it included, + 1)` of them: with one caller it is half, with two a third.
//! A quarter of all is for callers that have none: of that, each gets one. So however many those who came first have, and
//! however long their attestations take, a quarter of all slots is left for as many others.
//!
//! A caller is its family here ([`Families`](super::caller::Families)): whoever can be many gets no more for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::{HashMap, hash_map::Entry};

use super::NodeSettings;

/// Which part of all slots is for callers that have none.
const RESERVE: u32 = 4;

/// Who is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Full {
    /// The caller itself.
    Share,
    /// All together.
    Node,
}

#[derive(Debug)]
struct State {
    all: u32,
    per_caller: u32,
    in_use: u32,
    by_caller: HashMap<u64, u32, ahash::RandomState>,
}

/// The slots of a node.
#[derive(Debug)]
pub struct Slots {
    state: Mutex<State>,
}

/// Lets one attestation run; gives the slot back when dropped.
#[derive(Debug)]
#[must_use = "the slot is free again as soon as this is dropped"]
pub struct AttestationSlot {
    slots: Arc<Slots>,
    caller: u64,
}

impl Slots {
    /// Slots as the settings have them.
    pub fn new(settings: &NodeSettings) -> Self {
        let slots = Self {
            state: Mutex::new(State { all: 0, per_caller: 0, in_use: 0, by_caller: HashMap::default() }),
        };
        slots.reload(settings);
        slots
    }

    /// Changes how many there are. Those that are out stay out.
    pub fn reload(&self, settings: &NodeSettings) {
        let mut state = self.lock();
        state.all = settings.attestations.get();
        state.per_caller = settings.attestations_per_caller.get();
        let room = usize::try_from(state.all.min(1 << 16)).unwrap_or(0);
        state.by_caller.reserve(room);
    }

    /// A slot, at once or not at all.
    ///
    /// # Errors
    /// [`Full`] says whose doing it is.
    pub fn take(self: &Arc<Self>, caller: u64) -> Result<AttestationSlot, Full> {
        let mut state = self.lock();
        if state.in_use >= state.all {
            return Err(Full::Node);
        }
        let State { all, per_caller, in_use, by_caller } = &mut *state;
        let callers = u32::try_from(by_caller.len()).unwrap_or(u32::MAX);
        let entry = by_caller.entry(caller);
        let (has, callers) = match &entry {
            Entry::Occupied(entry) => (*entry.get(), callers),
            Entry::Vacant(_) => (0, callers.saturating_add(1)),
        };
        let share = (*all / callers.saturating_add(1)).clamp(1, *per_caller);
        if has >= share || has > 0 && *in_use >= *all - *all / RESERVE {
            return Err(Full::Share);
        }
        *entry.or_insert(0) += 1;
        *in_use += 1;
        drop(state);
        Ok(AttestationSlot { slots: Arc::clone(self), caller })
    }

    /// How many are out.
    pub fn in_use(&self) -> u32 {
        self.lock().in_use
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AttestationSlot {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.in_use = state.in_use.saturating_sub(1);
        if let Entry::Occupied(mut entry) = state.by_caller.entry(self.caller) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use proptest::prelude::*;

    use super::*;

    fn slots(all: u32, per_caller: u32) -> Arc<Slots> {
        let settings = NodeSettings {
            attestations: NonZeroU32::new(all).unwrap(),
            attestations_per_caller: NonZeroU32::new(per_caller).unwrap(),
            ..NodeSettings::default()
        };
        Arc::new(Slots::new(&settings))
    }

    #[test]
    fn one_caller_has_half_and_a_quarter_is_for_those_who_have_none() {
        let slots = slots(12, 12);
        let mut held = Vec::new();
        let mut take_all = |caller| {
            let mut n = 0;
            loop {
                match slots.take(caller) {
                    Ok(slot) => held.push(slot),
                    Err(full) => return (n, full),
                }
                n += 1;
            }
        };
        assert_eq!(take_all(1), (6, Full::Share));
        assert_eq!(take_all(2), (3, Full::Share), "the last quarter is not for who has some");
        assert_eq!(take_all(1), (0, Full::Share));
        for caller in 3..6 {
            assert_eq!(take_all(caller).0, 1, "{caller} has none");
        }
        assert_eq!(take_all(6), (0, Full::Node));
        held.clear();
        assert_eq!(slots.in_use(), 0);
    }

    proptest! {
        #[test]
        fn whoever_has_none_gets_one(
            all in 1..40_u32,
            moves in prop::collection::vec((0..30_u64, any::<bool>()), 0..200),
        ) {
            let slots = slots(all, 16);
            let mut held: Vec<AttestationSlot> = Vec::new();
            for (caller, back) in moves {
                if back {
                    held.retain(|slot| slot.caller != caller);
                } else if let Ok(slot) = slots.take(caller) {
                    held.push(slot);
                }
                prop_assert!(slots.in_use() <= all);
                prop_assert_eq!(usize::try_from(slots.in_use()).unwrap(), held.len());
            }
            // Only as many callers as the quarter has slots, with one each, can be in the way of a newcomer.
            let callers = u32::try_from(slots.lock().by_caller.len()).unwrap();
            let newcomer = slots.take(1000);
            if callers < all / RESERVE {
                prop_assert!(newcomer.is_ok(), "{callers} callers, {} of {all}", slots.in_use());
            }
        }
    }
}
