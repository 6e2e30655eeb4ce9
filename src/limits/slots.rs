//! Attestations in flight, and whatever else there is a bounded number of: shared fairly.
//!
//! A caller may have `all / (callers that have any, it included, + 1)` of them: with one caller it is half,
//! with two a third. A quarter of all is for callers that have none: of that, each gets one. So however many
//! those who came first have, and however long their attestations take, a quarter of all slots is left for as
//! many others.
//!
//! Who may wait for one ([`Slots::wait`]) is given the next that it may have: callers take turns, and calls of one come in
//! their order. How many wait is for others to bound.
//!
//! A caller is its family here ([`Families`](super::caller::Families)): whoever can be many gets no more for it.

use std::{
    collections::VecDeque,
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use super::tally::Tally;

/// Which part of all slots is for callers that have none.
const RESERVE: u32 = 4;

/// How many attestations may run at once, and how many of one caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attestations {
    all: u32,
    per_caller: u32,
}

impl Attestations {
    /// The most there may be.
    pub const MOST: u32 = 1 << 16;

    /// `all` at once (64 if not given), of which one caller has `per_caller` (16, or all if that is less),
    /// however idle the node is.
    ///
    /// # Errors
    /// [`AttestationsError`] for more than [`Attestations::MOST`], or more of one caller than of all.
    pub fn new(all: Option<NonZeroU32>, per_caller: Option<NonZeroU32>) -> Result<Self, AttestationsError> {
        let all = all.map_or(64, NonZeroU32::get);
        let per_caller = per_caller.map_or_else(|| all.min(16), NonZeroU32::get);
        if all > Self::MOST {
            return Err(AttestationsError::TooMany(all));
        }
        if per_caller > all {
            return Err(AttestationsError::OfOneCaller { per_caller, all });
        }
        Ok(Self { all, per_caller })
    }
}

impl Default for Attestations {
    fn default() -> Self {
        Self { all: 64, per_caller: 16 }
    }
}

/// Why so many attestations cannot run at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AttestationsError {
    /// More than [`Attestations::MOST`].
    #[error("attestations {0} must be at most {most}", most = Attestations::MOST)]
    TooMany(u32),
    /// One caller would have more than there are.
    #[error("attestations_per_caller {per_caller} must be at most attestations, which is {all}")]
    OfOneCaller { per_caller: u32, all: u32 },
}

/// Who is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    /// The caller itself.
    Share,
    /// All together.
    Node,
}

#[derive(Debug)]
struct SlotsState {
    most: Attestations,
    in_use: u32,
    by_caller: Tally<u64>,
    /// Whose turn is next stands first. Of a caller that has a slot there are no more here than slots, so that they are soon
    /// looked through: one that has none is given the next.
    waiting: VecDeque<WaitingCaller>,
    /// Of the one that began to wait last.
    number: u64,
}

/// A caller with calls that wait for a slot.
#[derive(Debug)]
struct WaitingCaller {
    caller: u64,
    calls: VecDeque<Waiter>,
}

/// One that waits for a slot.
#[derive(Debug)]
struct Waiter {
    number: u64,
    given: oneshot::Sender<AttestationSlot>,
}

/// Takes a waiter out of the queue, however its waiting ends.
struct Leaving<'a> {
    slots: &'a Slots,
    caller: u64,
    number: u64,
}

/// The slots of a node.
#[derive(Debug)]
pub(crate) struct Slots {
    state: Mutex<SlotsState>,
}

/// Lets one attestation run; gives the slot back when dropped.
#[derive(Debug)]
#[must_use = "the slot is free again as soon as this is dropped"]
pub(crate) struct AttestationSlot {
    slots: Arc<Slots>,
    caller: u64,
    /// So many had its caller with this one.
    nth: u32,
}

impl AttestationSlot {
    /// How many its caller had, this one included, when it was taken.
    pub(super) fn nth(&self) -> u32 {
        self.nth
    }
}

impl SlotsState {
    /// Takes a slot for this caller. Returns how many it has then.
    fn take(&mut self, caller: u64) -> Result<u32, Full> {
        let Self { most: Attestations { all, per_caller }, in_use, by_caller, .. } = self;
        if *in_use >= *all {
            return Err(Full::Node);
        }
        let may = |has: u32, others: usize| {
            let callers = u32::try_from(others).unwrap_or(u32::MAX).saturating_add(1);
            let share = (*all / callers.saturating_add(1)).clamp(1, *per_caller);
            has < share && (has == 0 || *in_use < *all - *all / RESERVE)
        };
        let has = by_caller.add_if(caller, may).ok_or(Full::Share)?;
        *in_use += 1;
        Ok(has)
    }

    /// The first that waits and may have a slot, which is taken for it: its caller's number, and how many that has then.
    fn next(&mut self) -> Option<(u64, u32, Waiter)> {
        for at in 0..self.waiting.len() {
            let caller = self.waiting.get(at)?.caller;
            match self.take(caller) {
                Ok(nth) => {
                    let mut waiting = self.waiting.remove(at)?;
                    let next = waiting.calls.pop_front()?;
                    if !waiting.calls.is_empty() {
                        self.waiting.push_back(waiting);
                    }
                    return Some((caller, nth, next));
                }
                Err(Full::Node) => return None,
                Err(Full::Share) => {}
            }
        }
        None
    }

    /// One more waits.
    fn wait(&mut self, caller: u64, given: oneshot::Sender<AttestationSlot>) -> u64 {
        self.number += 1;
        let waiter = Waiter { number: self.number, given };
        match self.waiting.iter_mut().find(|waiting| waiting.caller == caller) {
            Some(waiting) => waiting.calls.push_back(waiter),
            None => self.waiting.push_back(WaitingCaller { caller, calls: VecDeque::from([waiter]) }),
        }
        self.number
    }

    /// One waits no more.
    fn leave(&mut self, caller: u64, number: u64) -> Option<Waiter> {
        let at = self.waiting.iter().position(|waiting| waiting.caller == caller)?;
        let calls = &mut self.waiting.get_mut(at)?.calls;
        let left = calls.iter().position(|call| call.number == number).and_then(|at| calls.remove(at));
        if calls.is_empty() {
            self.waiting.remove(at)?;
        }
        left
    }
}

impl Slots {
    /// So many slots.
    pub(crate) fn new(most: Attestations) -> Self {
        let state =
            SlotsState { most, in_use: 0, by_caller: Tally::default(), waiting: VecDeque::new(), number: 0 };
        let slots = Self { state: Mutex::new(state) };
        slots.set_most(most);
        slots
    }

    /// Changes how many there are. Those that are out stay out.
    pub(super) fn resize(self: &Arc<Self>, most: Attestations) {
        self.set_most(most);
        self.give();
    }

    fn set_most(&self, most: Attestations) {
        let mut state = self.lock();
        state.most = most;
        state.by_caller.reserve(usize::try_from(most.all).unwrap_or(0));
    }

    /// A slot, at once or not at all.
    ///
    /// # Errors
    /// [`Full`] says whose doing it is.
    pub(crate) fn take(self: &Arc<Self>, caller: u64) -> Result<AttestationSlot, Full> {
        let nth = self.lock().take(caller)?;
        Ok(self.slot(caller, nth))
    }

    /// A slot, as soon as there is one that this caller may have. Who no longer waits for it has none.
    pub(crate) async fn wait(self: &Arc<Self>, caller: u64) -> AttestationSlot {
        let (given, slot) = oneshot::channel();
        let number = {
            let mut state = self.lock();
            if let Ok(nth) = state.take(caller) {
                drop(state);
                return self.slot(caller, nth);
            }
            state.wait(caller, given)
        };
        let _leaving = Leaving { slots: self, caller, number };
        match slot.await {
            Ok(slot) => slot,
            // Nobody but this one takes a waiter out without giving it a slot.
            Err(_) => std::future::pending().await,
        }
    }

    /// Gives those who wait what they may have.
    fn give(self: &Arc<Self>) {
        loop {
            let mut state = self.lock();
            let Some((caller, nth, waiter)) = state.next() else { return };
            drop(state);
            // One that waits no longer gives it back, and so to the next.
            drop(waiter.given.send(self.slot(caller, nth)));
        }
    }

    fn slot(self: &Arc<Self>, caller: u64, nth: u32) -> AttestationSlot {
        AttestationSlot { slots: Arc::clone(self), caller, nth }
    }

    /// Which of its caller's the next slot would be that it takes.
    pub(super) fn next_of(&self, caller: u64) -> u32 {
        self.lock().by_caller.of(&caller).saturating_add(1)
    }

    /// How many are out.
    pub(super) fn in_use(&self) -> u32 {
        self.lock().in_use
    }

    fn lock(&self) -> MutexGuard<'_, SlotsState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AttestationSlot {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.in_use = state.in_use.saturating_sub(1);
        state.by_caller.take(self.caller);
        let waits = !state.waiting.is_empty();
        drop(state);
        if waits {
            self.slots.give();
        }
    }
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        let left = self.slots.lock().leave(self.caller, self.number);
        // Not within the lock.
        drop(left);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use proptest::prelude::*;

    use super::*;

    fn slots(all: u32, per_caller: u32) -> Arc<Slots> {
        Arc::new(Slots::new(Attestations { all, per_caller }))
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

    /// One that waits in a test.
    type Waits = std::pin::Pin<Box<dyn Future<Output = AttestationSlot>>>;

    proptest! {
        /// Whoever waits, leaves and gives back: there are never more than all, nobody waits who may have one, and who waits
        /// behind none of its own is not forgotten.
        #[test]
        fn a_slot_that_somebody_may_have_is_not_left(
            all in 1..20_u32,
            moves in prop::collection::vec((0..8_u64, 0..4_u8), 0..200),
        ) {
            let slots = slots(all, 4.min(all));
            let (mut held, mut waiting): (Vec<AttestationSlot>, Vec<(u64, Waits)>) = (Vec::new(), Vec::new());
            for (caller, step) in moves {
                match step {
                    0 | 1 => {
                        let slots = Arc::clone(&slots);
                        waiting.push((caller, Box::pin(async move { slots.wait(caller).await })));
                    }
                    2 => held.retain(|slot| slot.caller != caller),
                    // Some of them were given one that they did not take yet.
                    _ => waiting.retain(|(of, _)| *of != caller),
                }
                for (caller, mut waits) in std::mem::take(&mut waiting) {
                    match (&mut waits).now_or_never() {
                        Some(slot) => held.push(slot),
                        None => waiting.push((caller, waits)),
                    }
                }
                prop_assert!(slots.in_use() <= all);
                prop_assert_eq!(usize::try_from(slots.in_use()).unwrap(), held.len());
                let queued: usize = slots.lock().waiting.iter().map(|waiting| waiting.calls.len()).sum();
                prop_assert_eq!(queued, waiting.len());
                let next = slots.lock().next();
                prop_assert!(next.is_none(), "{next:?} waits for what it may have");
            }
        }

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
