//! Processor time that families spent on the threads that look at files.
//!
//! A family may spend [`BURST`] at once, so that who starts, or has one large file, does not wait; then one part in [`PART`] of what the
//! agent may use flows back to it. Who spent more waits its turn. What it spends is known afterwards only, so it may owe what one
//! step took on each of its threads. Pure: times are arguments.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::limits::processor::ProcessorShare;

/// What may be spent at once.
pub(super) const BURST: Duration = Duration::from_secs(1);
/// What one family gets is one part in so many of what the agent may use.
const PART: u32 = 4;
/// The most families that are told apart; the others spend together.
const MOST: usize = 1024;
/// Those others. No family has this number.
const OTHERS: u64 = u64::MAX;

#[derive(Debug, Default)]
pub(super) struct SpentTime {
    share: ProcessorShare,
    /// When all that a family spent has flowed back. One that is not here has spent nothing.
    paid_at: HashMap<u64, Instant>,
}

impl SpentTime {
    /// What the agent may use, from now on.
    pub(super) fn share_is(&mut self, share: ProcessorShare) {
        self.share = share;
    }

    /// Whether a family may spend more.
    pub(super) fn may_spend(&self, family: u64, now: Instant) -> bool {
        let at = self.paid_at.get(&self.account(family));
        at.is_none_or(|at| at.saturating_duration_since(now) < self.flows_back_in(BURST))
    }

    /// Counts what a family spent.
    pub(super) fn spend(&mut self, family: u64, spent: Duration, now: Instant) {
        if self.paid_at.len() >= MOST {
            self.paid_at.retain(|_, at| *at > now);
        }
        let (account, flows_back_in) = (self.account(family), self.flows_back_in(spent));
        let at = self.paid_at.entry(account).or_insert(now);
        *at = (*at).max(now) + flows_back_in;
    }

    fn account(&self, family: u64) -> u64 {
        let is_known = self.paid_at.len() < MOST || self.paid_at.contains_key(&family);
        if is_known { family } else { OTHERS }
    }

    /// How long it takes until so much flowed back to a family.
    fn flows_back_in(&self, spent: Duration) -> Duration {
        let millicores = u32::try_from(self.share.millicores()).unwrap_or(u32::MAX).max(1);
        spent.saturating_mul(1000 * PART) / millicores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl SpentTime {
        /// Whether anything of what a family spent is remembered.
        pub(in crate::attest::unix) fn knows(&self, family: u64) -> bool {
            self.paid_at.contains_key(&family)
        }
    }

    /// Half a core, of which an eighth of a core is a family's.
    fn spent() -> SpentTime {
        SpentTime::default()
    }

    #[test]
    fn who_spends_on_and_on_gets_its_part_and_others_wait_for_nothing() {
        let (mut it, began) = (spent(), Instant::now());
        let (tick, step) = (Duration::from_millis(1), Duration::from_millis(50));
        let mut total = Duration::ZERO;
        for n in 0..80_000 {
            let now = began + tick * n;
            if it.may_spend(1, now) {
                it.spend(1, step, now);
                total += step;
            }
            assert!(it.may_spend(2, now));
        }
        // The burst, 80 seconds of an eighth of a core, and the step that went beyond.
        assert!((Duration::from_secs(11)..=Duration::from_millis(11_050)).contains(&total), "{total:?}");
    }

    #[test]
    fn what_was_spent_flows_back_by_the_share_of_now() {
        let now = Instant::now();
        for (cores, seconds) in [(0.5, 8), (1.0, 4), (0.05, 80), (4096.0, 0)] {
            let mut it = spent();
            it.share_is(ProcessorShare::cores(cores).unwrap());
            assert!(it.may_spend(1, now));
            it.spend(1, BURST, now);
            it.spend(1, BURST, now);
            assert!(!it.may_spend(1, now), "{cores}");
            assert!(!it.may_spend(1, now + Duration::from_secs(seconds)), "{cores}");
            assert!(
                it.may_spend(1, now + Duration::from_secs(seconds) + Duration::from_millis(1)),
                "{cores}"
            );
        }
    }

    #[test]
    fn no_more_families_are_told_apart_than_fit() {
        let (mut it, now) = (spent(), Instant::now());
        let many = u64::try_from(MOST).unwrap() + 100;
        for family in 0..many {
            it.spend(family, BURST, now);
        }
        assert_eq!(it.paid_at.len(), MOST + 1);
        assert!((0..many).all(|family| !it.may_spend(family, now)), "none is forgotten");
        assert!(!it.may_spend(many, now), "who comes now is one of the others");
        let later = now + Duration::from_secs(9 * 101);
        it.spend(many, BURST, later);
        assert_eq!(it.paid_at.len(), 1, "those who have it all again are forgotten");
    }
}
