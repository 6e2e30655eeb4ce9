//! When the server is asked next for what has changed: every few seconds, ever less often while it fails, and soon for a
//! while when somebody waits.

use std::time::Duration;

use tokio::time::Instant;

use super::backoff;

/// The shortest time between two syncs that are made since somebody waits.
const QUICK: Duration = Duration::from_secs(1);
/// So many of these follow one another; then one more is earned with each interval that passes.
const QUICK_MOST: u32 = 10;
/// The longest time between two syncs, however often they failed.
const LONGEST: Duration = Duration::from_secs(8 * 60);
/// The same, in intervals.
const LONGEST_INTERVALS: u32 = 48;

/// How the last sync ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Synced,
    Failed,
}

/// When the next sync is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NextSync {
    /// Whatever happens.
    pub(super) at: Instant,
    /// If somebody waits.
    pub(super) if_waited_for: Instant,
}

/// The course of syncs.
#[derive(Debug)]
pub(super) struct Cycle {
    began: Instant,
    failures: u32,
    quick_left: u32,
    /// When the last one of [`Cycle::quick_left`] was earned.
    earned: Instant,
}

impl Cycle {
    /// Begins.
    pub(super) fn new(now: Instant) -> Self {
        Self { began: now, failures: 0, quick_left: QUICK_MOST, earned: now }
    }

    /// A sync begins; `quick` when it does so since somebody waits.
    pub(super) fn begins(&mut self, now: Instant, since: Since) {
        self.began = now;
        if since == Since::WaitedFor {
            self.quick_left = self.quick_left.saturating_sub(1);
        }
    }

    /// It has ended. `drawn` is a number in 0..1.
    pub(super) fn ended(
        &mut self,
        now: Instant,
        outcome: Outcome,
        interval: Duration,
        drawn: f64,
    ) -> NextSync {
        self.failures = match outcome {
            Outcome::Synced => 0,
            Outcome::Failed => self.failures.saturating_add(1),
        };
        while self.quick_left < QUICK_MOST && now.duration_since(self.earned) >= interval {
            self.earned += interval;
            self.quick_left += 1;
        }
        if self.quick_left == QUICK_MOST {
            self.earned = now;
        }
        let longest = interval.saturating_mul(LONGEST_INTERVALS).min(LONGEST).max(interval);
        let at = now + backoff::wait(interval, self.failures, longest, drawn);
        let quick = if self.quick_left > 0 { self.began + QUICK } else { self.began + interval };
        NextSync { at, if_waited_for: quick.max(now).min(at) }
    }
}

/// Why a sync begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Since {
    /// It is time.
    Due,
    /// Somebody waits.
    WaitedFor,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    fn seconds(from: Instant, to: Instant) -> f64 {
        (to - from).as_secs_f64()
    }

    #[tokio::test(start_paused = true)]
    async fn failures_put_off_the_next_and_a_success_does_not() {
        let now = Instant::now();
        let mut cycle = Cycle::new(now);
        let mut waits = Vec::new();
        for _ in 0..14 {
            waits.push(seconds(now, cycle.ended(now, Outcome::Failed, INTERVAL, 0.5).at).round());
        }
        assert_eq!(waits[..4], [8.0, 11.0, 17.0, 25.0]);
        assert_eq!(waits[12..], [240.0, 240.0], "48 intervals");
        assert_eq!(seconds(now, cycle.ended(now, Outcome::Synced, INTERVAL, 0.5).at).round(), 5.0);
        let hour = Duration::from_secs(3600);
        let mut cycle = Cycle::new(now);
        assert_eq!(seconds(now, cycle.ended(now, Outcome::Failed, hour, 0.5).at).round(), 3600.0);
        assert_eq!(seconds(now, cycle.ended(now, Outcome::Synced, INTERVAL, 0.0).at), 4.5);
    }

    #[tokio::test(start_paused = true)]
    async fn while_somebody_waits_it_is_one_a_second_for_ten_and_then_as_ever() {
        let start = Instant::now();
        let mut now = start;
        let mut cycle = Cycle::new(now);
        let mut gaps = Vec::new();
        for _ in 0..16 {
            cycle.begins(now, Since::WaitedFor);
            let next = cycle.ended(now, Outcome::Synced, INTERVAL, 1.0).if_waited_for;
            gaps.push(seconds(now, next));
            now = next;
        }
        assert!(gaps[..10].iter().all(|gap| *gap <= 1.0), "{gaps:?}");
        assert!(gaps[12..].iter().sum::<f64>() >= 3.0 * 4.0, "{gaps:?}");
    }

    proptest! {
        /// Whoever waits for ever costs the server hardly more than one sync in each interval and a burst.
        #[test]
        fn syncs_are_bounded(drawn in 0.0f64..1.0, interval in 2u64..60) {
            let interval = Duration::from_secs(interval);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let begun = runtime.block_on(async {
                let (start, mut cycle, mut count) = (Instant::now(), Cycle::new(Instant::now()), 0);
                let mut now = start;
                while now < start + interval * 100 {
                    cycle.begins(now, Since::WaitedFor);
                    now = cycle.ended(now, Outcome::Synced, interval, drawn).if_waited_for;
                    count += 1;
                }
                count
            });
            prop_assert!(begun <= 240, "{begun}");
        }
    }
}
