//! Answers that are no work to conserve: refusals, and errors that the caller made.
//!
//! One caller, its family with it, gets [`MOST`] of them in any second. They are counted when they are made, so what was
//! already being read when the bucket ran empty is a debt, and is paid by waiting longer.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// In a second, to one caller.
pub const MOST: u64 = 5_000;
/// Of these, so many at once.
const BURST: u64 = 500;
/// Nanoseconds until one may be given again.
const EACH: u64 = 1_000_000_000 / (MOST - BURST);
/// The most that may be owed, in nanoseconds: a caller that stopped is answered again after so long.
const LONGEST: u64 = 10_000_000_000;

/// A bucket of them, as the moment when it is full again: see [`bucket`](super::bucket).
#[derive(Debug, Default)]
pub(super) struct Waste(AtomicU64);

impl Waste {
    /// One that is full at `full_at`.
    pub(super) fn full_at(full_at: u64) -> Self {
        Self(AtomicU64::new(full_at))
    }

    /// Counts one at `now`, in nanoseconds. Returns how long there is to be no further one.
    pub(super) fn note(&self, now: u64) -> Option<Duration> {
        let spend = |full_at: u64| (full_at.max(now) + EACH).min(now + LONGEST).max(full_at);
        let before = self.0.fetch_update(Relaxed, Relaxed, |full_at| Some(spend(full_at)));
        let (Ok(before) | Err(before)) = before;
        over(spend(before), now)
    }

    /// How long there is to be none, from `now` on.
    pub(super) fn wait(&self, now: u64) -> Option<Duration> {
        over(self.0.load(Relaxed), now)
    }

    /// When it is full: forgotten before, it would give tokens back.
    pub(super) fn owes_until(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

fn over(full_at: u64, now: u64) -> Option<Duration> {
    let over = full_at.saturating_sub(now).saturating_sub(BURST * EACH);
    (over > 0).then(|| Duration::from_nanos(over))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    /// However many connections a caller has, and however much each was reading when it was stopped.
    #[test]
    fn no_second_has_more_than_the_bound_and_debts_are_paid() {
        let waste = Waste::default();
        let mut given: Vec<u64> = Vec::new();
        let mut now = 0;
        while now < 20 * SECOND {
            // Reads a little more than it should each time, and keeps to what it is told otherwise.
            let mut wait = None;
            for _ in 0..37 {
                wait = waste.note(now);
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
        let waste = Waste::default();
        for at in 0..10_000 {
            assert_eq!(waste.note(at * SECOND / 1_000), None);
        }
        let now = 10 * SECOND;
        let longest = (0..1_000_000).filter_map(|_| waste.note(now)).max().unwrap();
        assert!(longest <= Duration::from_nanos(LONGEST), "{longest:?}");
        assert_eq!(waste.wait(now + LONGEST), None);
        assert_eq!(Waste::full_at(waste.owes_until()).wait(now), Some(longest), "it can be kept elsewhere");
    }
}
