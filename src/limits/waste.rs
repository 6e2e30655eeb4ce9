//! Answers that are no work to conserve: refusals, and errors that the caller made.
//!
//! One caller, its family with it, gets [`MOST`] of them in any second; where all together are given more than half of
//! [`MOST_TOGETHER`], an equal part of these, if that is less. They are counted when they are made, so what was
//! already being read when the bucket ran empty is a debt, and is paid by waiting longer.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// In a second, to one caller.
pub const MOST: u64 = 5_000;
/// In a second, to all callers: they take about a quarter of a core.
pub const MOST_TOGETHER: u64 = 20_000;
/// Of these, so many at once.
const BURST: u64 = 500;
/// Nanoseconds until one may be given again.
const EACH: u64 = 1_000_000_000 / (MOST - BURST);
/// The most that may be owed, in nanoseconds: a caller that stopped is answered again after so long.
const LONGEST: u64 = 10_000_000_000;
const SECOND: u64 = 1_000_000_000;

/// What all callers were given in a second, and to how many of them.
#[derive(Clone, Copy, Debug, Default)]
struct WasteOfAll {
    answers: u64,
    callers: u64,
}

/// What all callers are given.
#[derive(Debug, Default)]
pub(super) struct AllWaste(Mutex<Seconds>);

/// This second, and the one before it.
#[derive(Clone, Copy, Debug, Default)]
struct Seconds {
    second: u64,
    given: WasteOfAll,
    before: WasteOfAll,
}

impl AllWaste {
    /// Counts one in this second, perhaps the first of its caller's. Returns nanoseconds until that may be given another.
    fn note(&self, second: u64, is_first: bool) -> u64 {
        let mut seconds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if second > seconds.second {
            let before = if second == seconds.second + 1 { seconds.given } else { WasteOfAll::default() };
            *seconds = Seconds { second, given: WasteOfAll::default(), before };
        }
        let Seconds { given, before, .. } = &mut *seconds;
        given.answers += 1;
        given.callers += u64::from(is_first);
        if given.answers.max(before.answers) <= MOST_TOGETHER / 2 {
            return EACH;
        }
        EACH.max(given.callers.max(before.callers) * (SECOND / MOST_TOGETHER))
    }
}

/// A bucket of them, as the moment when it is full again: see [`bucket`](super::bucket).
#[derive(Debug, Default)]
pub(super) struct Waste {
    full_at: AtomicU64,
    /// The second after that of the last one.
    seen: AtomicU64,
}

impl Waste {
    /// One that is full at `full_at`.
    pub(super) fn full_at(full_at: u64) -> Self {
        Self { full_at: AtomicU64::new(full_at), seen: AtomicU64::new(0) }
    }

    /// Counts one at `now`, in nanoseconds. Returns how long there is to be no further one.
    pub(super) fn note(&self, all: &AllWaste, now: u64) -> Option<Duration> {
        let second = now / SECOND;
        let each = all.note(second, self.seen.swap(second + 1, Relaxed) != second + 1);
        let spend = |full_at: u64| (full_at.max(now) + each).min(now + LONGEST).max(full_at);
        let before = self.full_at.fetch_update(Relaxed, Relaxed, |full_at| Some(spend(full_at)));
        let (Ok(before) | Err(before)) = before;
        over(spend(before), now)
    }

    /// How long there is to be none, from `now` on.
    pub(super) fn wait(&self, now: u64) -> Option<Duration> {
        over(self.full_at.load(Relaxed), now)
    }

    /// When it is full: forgotten before, it would give tokens back.
    pub(super) fn owes_until(&self) -> u64 {
        self.full_at.load(Relaxed)
    }
}

fn over(full_at: u64, now: u64) -> Option<Duration> {
    let over = full_at.saturating_sub(now).saturating_sub(BURST * EACH);
    (over > 0).then(|| Duration::from_nanos(over))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many waste, all together get no more than they may, in equal parts; who wastes little does not wait for them.
    #[test]
    fn all_together_are_bounded_and_who_wastes_least_waits_last() {
        const CALLERS: usize = 20;
        let all = AllWaste::default();
        let (callers, little) = (<[Waste; CALLERS]>::default(), Waste::default());
        let mut given = [[0_u64; CALLERS]; 10];
        for at in 0..10_000_u64 {
            let now = at * 1_000_000;
            for (nth, caller) in callers.iter().enumerate() {
                for _ in 0..100 {
                    if caller.wait(now).is_none() {
                        let _wait = caller.note(&all, now);
                        given[usize::try_from(at / 1_000).unwrap()][nth] += 1;
                    }
                }
            }
            if at % 20 == 0 {
                assert_eq!(little.note(&all, now), None, "at {at}");
            }
        }
        for (second, given) in given.iter().enumerate().skip(1) {
            let sum: u64 = given.iter().sum();
            assert!((MOST_TOGETHER * 3 / 4..=MOST_TOGETHER).contains(&sum), "{sum} in second {second}");
            let (least, most) = (given.iter().min().unwrap(), given.iter().max().unwrap());
            assert!(most - least <= most / 10, "{least} and {most} in second {second}");
        }
    }

    /// However many connections a caller has, and however much each was reading when it was stopped.
    #[test]
    fn no_second_has_more_than_the_bound_and_debts_are_paid() {
        let (waste, all) = (Waste::default(), AllWaste::default());
        let mut given: Vec<u64> = Vec::new();
        let mut now = 0;
        while now < 20 * SECOND {
            // Reads a little more than it should each time, and keeps to what it is told otherwise.
            let mut wait = None;
            for _ in 0..37 {
                wait = waste.note(&all, now);
                given.push(now);
            }
            now += wait.map_or(1, |wait| u64::try_from(wait.as_nanos()).unwrap());
        }
        let from = given.iter().filter(|at| **at >= SECOND).count();
        let rate = u64::try_from(from).unwrap() / 19;
        assert!((4_450..=4_550).contains(&rate), "{rate}");
        let busiest = given.iter().enumerate().map(|(at, time)| {
            let end = given.partition_point(|other| *other < time + SECOND);
            end - at
        });
        assert!(busiest.max().unwrap() <= usize::try_from(MOST).unwrap() + 37);
    }

    #[test]
    fn who_errs_now_and_then_never_waits_and_a_debt_has_an_end() {
        let (waste, all) = (Waste::default(), AllWaste::default());
        for at in 0..10_000 {
            assert_eq!(waste.note(&all, at * SECOND / 1_000), None);
        }
        let now = 10 * SECOND;
        let longest = (0..1_000_000).filter_map(|_| waste.note(&all, now)).max().unwrap();
        assert!(longest <= Duration::from_nanos(LONGEST), "{longest:?}");
        assert_eq!(waste.wait(now + LONGEST), None);
        assert_eq!(Waste::full_at(waste.owes_until()).wait(now), Some(longest), "it can be kept elsewhere");
    }
}
