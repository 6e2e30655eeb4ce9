//! Those who are let in, and go in a few at a time.
//!
//! To accept a connection and to decide about it takes a few microseconds; to begin it and to answer its first call takes twenty
//! times that. Were all begun as they come, whoever comes would wait for all that came before it: of a crowd that starts
//! together, for all of it, room or no room. So a few at a time ([`MOST`]) go from here to their first answer, and families take
//! turns: who comes alone stands behind those few, and behind one of each family.
//!
//! Whoever waits has a place at the gate, which bounds how many they are. Who is silent is begun and waits elsewhere.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire},
    },
};

use tokio::sync::Notify;

/// So many have begun and were not served yet, at most.
const MOST: usize = 4;
/// Once they are no more than this, others are called: the threads that serve have something to do meanwhile.
const FEW: usize = MOST / 2;

/// Where connections wait until it is their turn.
#[derive(Debug)]
pub(super) struct Entrance<T> {
    families: HashMap<u64, VecDeque<T>, ahash::RandomState>,
    /// Of the families: whose turn is next stands first.
    turns: VecDeque<u64>,
    inside: Arc<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    number: AtomicUsize,
    few: Notify,
}

/// One that has begun and was not served yet, as long as this is there.
#[derive(Debug)]
pub(super) struct GoesIn(Arc<Inside>);

impl<T> Default for Entrance<T> {
    fn default() -> Self {
        Self { families: HashMap::default(), turns: VecDeque::new(), inside: Arc::default() }
    }
}

impl<T> Entrance<T> {
    /// One more waits, behind those of its family.
    pub(super) fn wait(&mut self, family: u64, one: T) {
        let of_family = self.families.entry(family).or_default();
        if of_family.is_empty() {
            self.turns.push_back(family);
        }
        of_family.push_back(one);
    }

    /// Takes the one whose turn it is, unless enough are inside. Families whose first may not go yet are passed over, and keep
    /// their turn.
    pub(super) fn next(&mut self, may_go: impl Fn(&T) -> bool) -> Option<(T, GoesIn)> {
        if self.is_full() {
            return None;
        }
        let first = |family: &u64| self.families.get(family).and_then(VecDeque::front);
        let at = self.turns.iter().position(|family| first(family).is_some_and(&may_go))?;
        let family = self.turns.remove(at)?;
        let of_family = self.families.get_mut(&family)?;
        let one = of_family.pop_front()?;
        if of_family.is_empty() {
            self.families.remove(&family);
        } else {
            self.turns.push_back(family);
        }
        self.inside.number.fetch_add(1, AcqRel);
        Some((one, GoesIn(Arc::clone(&self.inside))))
    }

    /// Whether somebody waits.
    pub(super) fn is_waited_at(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Whether enough are inside.
    pub(super) fn is_full(&self) -> bool {
        self.inside.number.load(Acquire) >= MOST
    }

    /// Waits until it is to be asked for the next. For one task, that has asked before until there was none.
    pub(super) async fn opens(&self) {
        self.inside.few.notified().await;
    }
}

impl Drop for GoesIn {
    fn drop(&mut self) {
        if self.0.number.fetch_sub(1, AcqRel) == FEW + 1 {
            self.0.few.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn who_comes_alone_stands_behind_one_of_each_family() {
        let mut entrance = Entrance::default();
        for nth in 0..300 {
            entrance.wait(1, nth);
            entrance.wait(2, 1000 + nth);
        }
        let mut inside: VecDeque<_> = std::iter::from_fn(|| entrance.next(|_| true)).collect();
        assert_eq!(inside.len(), MOST);
        entrance.wait(3, 9999);
        let mut ahead = 0;
        loop {
            inside.pop_front();
            let (next, goes) = entrance.next(|_| true).unwrap();
            if next == 9999 {
                break;
            }
            ahead += 1;
            inside.push_back((next, goes));
        }
        assert_eq!(ahead, 2);
    }

    #[test]
    fn who_may_not_go_yet_is_passed_over_and_keeps_its_turn() {
        let mut entrance = Entrance::default();
        for one in [10, 11, 20, 30] {
            entrance.wait(one / 10, one);
        }
        let mut next = |may_go: fn(&u64) -> bool| entrance.next(may_go).map(|(one, _)| one);
        assert_eq!(next(|one| *one > 10), Some(20));
        assert_eq!(next(|one| *one > 30), None);
        assert_eq!(next(|_| true), Some(10));
        assert_eq!([next(|_| true), next(|_| true), next(|_| true)], [Some(30), Some(11), None]);
    }

    proptest! {
        /// Whoever comes and goes: there are never more inside than may be, those of a family go in their order, and nobody is left
        /// waiting when there is a place and the task has done what it was called for.
        #[test]
        fn nobody_is_left_waiting(moves in prop::collection::vec((0..4_u64, 0..3_u8), 0..400)) {
            let mut entrance: Entrance<u32> = Entrance::default();
            let (mut inside, mut came, mut last) = (VecDeque::new(), 0, [0; 4]);
            for (family, what) in moves {
                let mut asks = what == 0;
                if asks {
                    came += 1;
                    entrance.wait(family, came * 4 + u32::try_from(family).unwrap());
                } else if what == 1 {
                    inside.pop_front();
                } else {
                    inside.pop_back();
                }
                asks |= entrance.opens().now_or_never().is_some();
                while asks && let Some((one, goes)) = entrance.next(|_| true) {
                    let last = &mut last[usize::try_from(one % 4).unwrap()];
                    prop_assert!(*last < one);
                    *last = one;
                    inside.push_back(goes);
                }
                prop_assert!(inside.len() <= MOST);
                prop_assert!(!entrance.is_waited_at() || inside.len() > FEW);
                prop_assert_eq!(entrance.families.len(), entrance.turns.len());
            }
        }
    }
}
