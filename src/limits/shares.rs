//! Who takes how much of a bucket that several callers share: an identity's, a mask's, the node's.
//!
//! First come, first served would give a shared bucket to whoever shouts. So half of it is kept for those who took less
//! than their fair share, which is the limit divided by the callers that asked of late: each has a share of its own
//! beside the bucket, a bucket of that size. A call passes while its caller's share has tokens, or while more than half of
//! the bucket is left. It is the one bucket that is paid from, so that no more passes than its limit; and a
//! caller that is alone has all of it.
//!
//! [`MOST_TAKERS`] have a share each, the rest one together; a family is one taker
//! ([`Families`](super::caller::Families)).

use std::{collections::HashMap, time::Duration};

use super::{
    bucket::{Bucket, Quota, Shortfall},
    caller::CallerKey,
};

/// Callers with a share of their own in one bucket.
const MOST_TAKERS: usize = 16;
/// Buckets whose callers are told apart. More are first come, first served.
const MOST_SHARED: usize = 1024;
/// How long a caller counts after it asked, in nanoseconds: as long as the bucket takes to fill, within these bounds.
const ACTIVE: std::ops::RangeInclusive<u64> = 10_000_000_000..=60_000_000_000;

/// Who takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taker {
    pub(super) caller: CallerKey,
    /// The caller with its family.
    pub(super) group: u64,
}

/// What one taker did in a bucket, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taking {
    /// The caller that asked last; `None` for all those together that have no share of their own.
    pub caller: Option<CallerKey>,
    /// Calls that passed.
    pub used: u32,
    /// Calls that did not.
    pub refused: u32,
}

#[derive(Debug)]
struct TakerShare {
    /// `None` where those stand together that have none.
    group: Option<u64>,
    own: Bucket,
    asked: u64,
    taking: Taking,
}

/// The shares of one bucket.
#[derive(Debug, Default)]
pub(super) struct Shares(Vec<TakerShare>);

/// How a call stands to its bucket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claim {
    at: usize,
    /// Tokens that it must leave in the bucket.
    pub(super) leaves: u32,
    /// Whether a full bucket has enough for that.
    can_leave: bool,
    /// How long the bucket takes for these.
    leaves_take: Duration,
    /// When its share would have the tokens.
    wait: Duration,
}

impl Claim {
    /// Whether the call passes all the same where the bucket has too few tokens.
    pub(super) fn passes(&self, short: Shortfall) -> bool {
        match short {
            Shortfall::Refuse => false,
            Shortfall::PassOwn => self.wait.is_zero(),
            Shortfall::Pass => true,
        }
    }
}

impl Shares {
    /// Looks how many tokens a call of `taker` must leave, and takes note that it asked.
    pub(super) fn claim(&mut self, now: u64, quota: Quota, cost: u32, taker: Taker) -> Claim {
        let active = quota.refill().clamp(*ACTIVE.start(), *ACTIVE.end());
        let is_active = |share: &TakerShare| now.saturating_sub(share.asked) < active || share.own.held > 0;
        let at = self.place(taker, is_active);
        if let Some(share) = self.0.get_mut(at) {
            share.asked = now;
            share.taking.caller = share.group.map(|_| taker.caller);
        }
        let takers = self.0.iter().filter(|share| is_active(share)).count();
        let share = quota.part(u32::try_from(takers).unwrap_or(u32::MAX), cost);
        let wait = self.0.get_mut(at).and_then(|it| it.own.try_hold(now, share, cost).err());
        let kept = quota.burst().div_ceil(2);
        let leaves = if takers > 1 && wait.is_some() { kept } else { 0 };
        let leaves_take = Duration::from_nanos(u64::from(leaves).saturating_mul(quota.per_token));
        let can_leave = cost.saturating_add(leaves) <= quota.burst();
        Claim { at, leaves, can_leave, leaves_take, wait: wait.unwrap_or_default() }
    }

    /// The claim has passed: its tokens are held.
    pub(super) fn passed(&mut self, claim: Claim, cost: u32) {
        if let Some(share) = self.0.get_mut(claim.at) {
            share.own.held = share.own.held.saturating_add(cost);
            share.taking.used = share.taking.used.saturating_add(1);
        }
    }

    /// The bucket has refused it. Returns when to come back: when the bucket has enough and to spare, or when it has
    /// enough and the share too.
    pub(super) fn refused(&mut self, claim: Claim, wait: Duration) -> Duration {
        if let Some(share) = self.0.get_mut(claim.at) {
            share.taking.refused = share.taking.refused.saturating_add(1);
        }
        let with_share = claim.wait.max(wait.saturating_sub(claim.leaves_take));
        if claim.can_leave { wait.min(with_share) } else { with_share }
    }

    /// A call that held tokens ends, and takes `cost`.
    pub(super) fn settle(
        &mut self,
        now: u64,
        quota: Quota,
        taker: Taker,
        held: u32,
        cost: u32,
        short: Shortfall,
    ) {
        let group = Some(taker.group);
        let known = self.0.iter().position(|it| it.group == group);
        let takers = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        let at = known.or_else(|| self.0.iter().position(|it| it.group.is_none()));
        if let Some(share) = at.and_then(|at| self.0.get_mut(at)) {
            share.own.settle_by(now, quota.part(takers, cost), held, cost, short);
            share.taking.used = share.taking.used.saturating_sub(u32::from(held > 0 && cost == 0));
        }
    }

    /// Who takes, those first that were refused most.
    pub(super) fn takings(&self) -> Vec<Taking> {
        let mut takings: Vec<_> = self.0.iter().map(|share| share.taking).collect();
        takings.sort_by_key(|it| std::cmp::Reverse((it.refused, it.used)));
        takings
    }

    /// Where the share of `taker` is; makes one, in the place of one whose taker has not asked for long, if it must.
    fn place(&mut self, taker: Taker, is_active: impl Fn(&TakerShare) -> bool) -> usize {
        let group = Some(taker.group);
        if let Some(at) = self.0.iter().position(|share| share.group == group) {
            return at;
        }
        let fresh = |group: Option<u64>| TakerShare {
            group,
            own: Bucket::default(),
            asked: 0,
            taking: Taking { caller: None, used: 0, refused: 0 },
        };
        if let Some(at) = self.0.iter().position(|share| share.group.is_some() && !is_active(share)) {
            if let Some(share) = self.0.get_mut(at) {
                *share = fresh(group);
            }
            return at;
        }
        let own = self.0.len() < MOST_TAKERS;
        match self.0.iter().position(|share| share.group.is_none()) {
            Some(at) if !own => at,
            _ => {
                self.0.push(fresh(if own { group } else { None }));
                self.0.len() - 1
            }
        }
    }
}

/// The shares of the buckets of a table, by their keys.
#[derive(Debug, Default)]
pub(super) struct SharedBuckets(HashMap<[u64; 2], Shares, ahash::RandomState>);

impl SharedBuckets {
    /// The shares of a bucket that several take from; `None` where there are too many such buckets.
    pub(super) fn of(&mut self, hash: [u64; 2]) -> Option<&mut Shares> {
        if self.0.len() >= MOST_SHARED && !self.0.contains_key(&hash) {
            return None;
        }
        Some(self.0.entry(hash).or_default())
    }

    /// The shares of a bucket, where it has some.
    pub(super) fn known(&self, hash: [u64; 2]) -> Option<&Shares> {
        self.0.get(&hash)
    }

    /// The bucket is full again, and forgotten.
    pub(super) fn forget(&mut self, hash: [u64; 2]) {
        self.0.remove(&hash);
    }
}

/// A bucket of no table, with its shares.
#[derive(Debug, Default)]
pub(super) struct SharedBucket {
    bucket: Bucket,
    shares: Shares,
}

impl SharedBucket {
    /// Tokens that are left.
    pub(super) fn left(&self, now: u64, quota: Quota) -> u32 {
        self.bucket.left(now, quota)
    }

    /// Who takes, those first that were refused most.
    pub(super) fn takings(&self) -> Vec<Taking> {
        self.shares.takings()
    }

    /// Takes `cost` tokens of a call that is over at once.
    ///
    /// # Errors
    /// When to come back.
    pub(super) fn take(
        &mut self,
        now: u64,
        quota: Quota,
        cost: u32,
        taker: Taker,
        short: Shortfall,
    ) -> Result<(), Duration> {
        let claim = self.shares.claim(now, quota, cost, taker);
        let held = match self.bucket.hold_leaving(now, quota, cost, claim.leaves) {
            Ok(()) => cost,
            Err(_) if claim.passes(short) => self.bucket.hold_some(now, quota, cost, claim.leaves),
            Err(wait) => return Err(self.shares.refused(claim, wait)),
        };
        self.bucket.settle(now, quota, held, held);
        self.shares.passed(claim, cost);
        self.shares.settle(now, quota, taker, cost, cost, short);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::bucket::Per;

    const SECOND: u64 = 1_000_000_000;

    fn taker(uid: u32) -> Taker {
        Taker { caller: CallerKey::Uid(uid), group: u64::from(uid) }
    }

    fn quota(rate: f64, burst: u32) -> Quota {
        Quota::new(rate, Per::Second, burst).unwrap()
    }

    /// How many calls of each pass: caller `n` asks every `periods[n]` ms, for a minute.
    fn passed(bucket: &mut SharedBucket, quota: Quota, periods: &[u64]) -> Vec<(u64, u64)> {
        let mut counts = vec![(0, 0); periods.len()];
        for ms in 0..60_000 {
            for (uid, (period, count)) in (0..).zip(periods.iter().zip(&mut counts)) {
                if ms % period == 0 {
                    count.0 += 1;
                    count.1 += u64::from(
                        bucket.take(SECOND + ms * 1_000_000, quota, 1, taker(uid), Shortfall::Refuse).is_ok(),
                    );
                }
            }
        }
        counts
    }

    #[test]
    fn whoever_takes_less_than_its_share_is_served_beside_those_who_shout() {
        for (case, quota, periods, polite) in [
            ("four that shout and one that does not", quota(200.0, 400), &[1, 1, 1, 1, 50][..], &[4][..]),
            ("three polite ones", quota(100.0, 100), &[1, 50, 50, 100], &[1, 2, 3]),
        ] {
            let counts = passed(&mut SharedBucket::default(), quota, periods);
            for at in polite {
                assert_eq!(counts[*at].1, counts[*at].0, "{case}: {counts:?}");
            }
            let all: u64 = counts.iter().map(|count| count.1).sum();
            let most = u64::from(quota.burst()) + 60_000_000_000 / quota.per_token + 1;
            assert!(all <= most, "{case}: {all} of {most}");
            // What the polite leave is not lost.
            assert!(
                all + u64::from(quota.burst()) >= most * 9 / 10 || quota.burst() == 1,
                "{case}: {all} of {most}"
            );
        }
    }

    /// A bucket of one token has nothing to keep: there it is half of all that each gets who asks.
    #[test]
    fn a_bucket_of_one_token_is_shared_too() {
        let counts = passed(&mut SharedBucket::default(), quota(10.0, 1), &[1, 7]);
        assert!(counts.iter().all(|count| count.1 >= 200), "{counts:?}");
    }

    #[test]
    fn those_who_shout_share_alike() {
        let counts = passed(&mut SharedBucket::default(), quota(100.0, 100), &[1, 2, 1, 5]);
        let of: Vec<u64> = counts.iter().map(|count| count.1).collect();
        let (least, most) = (of.iter().min().unwrap(), of.iter().max().unwrap());
        assert!(least * 2 > *most, "{counts:?}");
    }

    #[test]
    fn who_is_alone_has_all_of_it() {
        let mut bucket = SharedBucket::default();
        let quota = quota(1.0, 100);
        for _ in 0..100 {
            bucket.take(SECOND, quota, 1, taker(1), Shortfall::Refuse).unwrap();
        }
        assert_eq!(bucket.take(SECOND, quota, 1, taker(1), Shortfall::Refuse), Err(Duration::from_secs(1)));
        assert_eq!(
            bucket.shares.takings(),
            [Taking { caller: Some(CallerKey::Uid(1)), used: 100, refused: 1 }]
        );
    }

    #[test]
    fn a_crowd_has_a_bound_and_the_rest_of_it_a_share_together() {
        let mut bucket = SharedBucket::default();
        for uid in 0..1000 {
            // Refused or not.
            let _passed: bool =
                bucket.take(SECOND, quota(1.0, 100), 1, taker(uid), Shortfall::Refuse).is_ok();
        }
        assert_eq!(bucket.shares.0.len(), MOST_TAKERS + 1);
        // When they have gone, others have their places.
        bucket.take(SECOND + 200 * SECOND, quota(1.0, 100), 1, taker(5000), Shortfall::Refuse).unwrap();
        assert!(bucket.shares.takings().iter().any(|it| it.caller == Some(CallerKey::Uid(5000))));
    }

    proptest! {
        /// Whoever asks, how, and however much it costs: no more passes than the bucket gives, and the wait is true.
        #[test]
        fn no_more_passes_than_one_bucket_gives(
            burst in 1..50_u32,
            rate in 1..100_u32,
            calls in prop::collection::vec((0..40_u32, 1..6_u32, 0..SECOND), 1..300),
        ) {
            let quota = quota(f64::from(rate), burst);
            let mut bucket = SharedBucket::default();
            let (mut now, mut given) = (SECOND, 0_u64);
            for (uid, cost, later) in calls {
                now += later;
                match bucket.take(now, quota, cost, taker(uid), Shortfall::Refuse) {
                    Ok(()) => given += u64::from(cost),
                    Err(wait) if cost <= burst => {
                        let then = now + u64::try_from(wait.as_nanos()).unwrap();
                        // Nobody else comes: then it passes.
                        now = then;
                        prop_assert!(bucket.take(now, quota, cost, taker(uid), Shortfall::Refuse).is_ok());
                        given += u64::from(cost);
                    }
                    Err(_) => {}
                }
                let most = u64::from(burst) + (now - SECOND) / quota.per_token + 1;
                prop_assert!(given <= most, "{given} of {most}");
            }
        }
    }
}
