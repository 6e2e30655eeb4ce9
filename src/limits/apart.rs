//! What becomes of the tokens of a bucket when another quota comes in force: by a window of a schedule, or by a reload.
//!
//! Tokens are tokens. What is missing of a bucket is a number of them, and another quota changes none of it:
//!
//! - Until the moment of the change they come back at the old rate, from then on at the new one, whenever the next call comes.
//! - At the change no more counts as missing than the new burst: who had spent a hundred is served by a bucket of five as one
//!   who finds it empty, and so within one refill. (Where both quotas have one rate, a debt of one burst may count too.)
//! - The rest is kept [apart](KeptApart), and counts again when the next change comes. It comes back only while the bucket in
//!   force is full, at the slower of the two rates: a fast window fills its own bucket, and not the one behind it.
//!
//! So whatever changes, and how often: nobody gets more than the largest burst and what the rates in force gave in the time,
//! nobody waits for a token longer than one refill and one token, and nothing that was not spent is lost. A change there and
//! back between two calls is none.

use std::collections::HashMap;

use super::bucket::{Bucket, LONGEST, Quota, convert};

/// Set in the price of a bucket of which tokens are kept apart: it is the price of no quota, so that each call looks.
const APART: u64 = 1 << 63;

/// What is missing of a bucket beyond what counts under the quota in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeptApart {
    /// In nanoseconds of refill, once the bucket is full.
    missing: u64,
    /// The price of a token when they were spent.
    per_token: u64,
    under: Quota,
}

impl KeptApart {
    fn price(&self) -> u64 {
        self.per_token.max(self.under.per_token)
    }
}

/// What is known of when another quota came in force.
#[derive(Clone, Copy, Debug)]
pub(super) struct QuotaChange {
    /// The one that holds now holds since then.
    pub(super) since: u64,
    /// The bucket was last asked then, or a little later.
    pub(super) asked: u64,
}

impl QuotaChange {
    /// The moment of the change, which is now where the bucket was asked since: calls that began before a reload may come after
    /// it.
    fn at(self, now: u64) -> u64 {
        if self.since < self.asked { now } else { self.since.min(now) }
    }
}

/// What is kept apart of the buckets of a table, by their keys.
#[derive(Debug, Default)]
pub(super) struct ApartByKey(HashMap<[u64; 2], KeptApart, ahash::RandomState>);

impl ApartByKey {
    /// [`Bucket::come_under`] of the bucket of a key.
    pub(super) fn bring_under(
        &mut self,
        hash: [u64; 2],
        bucket: &mut Bucket,
        now: u64,
        change: QuotaChange,
        quota: Quota,
    ) {
        // As most are.
        if bucket.is_under(now, quota) {
            return;
        }
        let mut of_key = if bucket.has_apart() { self.0.remove(&hash) } else { None };
        bucket.come_under(now, change, quota, &mut of_key);
        if let Some(kept) = of_key {
            self.0.insert(hash, kept);
        }
    }

    /// What is kept apart of the bucket of a key.
    pub(super) fn of(&self, hash: [u64; 2], bucket: &Bucket) -> Option<&KeptApart> {
        if bucket.has_apart() { self.0.get(&hash) } else { None }
    }

    /// The bucket is forgotten, and what is kept apart of it.
    pub(super) fn forget(&mut self, hash: [u64; 2], bucket: &Bucket) {
        if bucket.has_apart() {
            self.0.remove(&hash);
        }
    }

    /// Returns memory that nothing is in.
    pub(super) fn shrink(&mut self) {
        self.0.shrink_to_fit();
    }

    /// Of how many buckets something is kept apart.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Bucket {
    /// The price that it is reckoned with; 0 in a new one.
    pub(super) fn price(&self) -> u64 {
        self.per_token & !APART
    }

    /// Whether tokens of it are kept apart.
    fn has_apart(&self) -> bool {
        self.per_token & APART != 0
    }

    /// Whether it was left under a quota like this one, and nothing is to be done before the next call.
    fn is_under(&self, now: u64, quota: Quota) -> bool {
        self.per_token == quota.per_token
            && self.full_at.saturating_sub(now) <= quota.refill().saturating_mul(2)
    }

    /// Whether a fresh bucket would do just as well, with what is kept apart.
    pub(super) fn is_full_with(&self, now: u64, apart: Option<&KeptApart>) -> bool {
        self.is_full(now) && apart.is_none_or(|it| it.missing <= now.saturating_sub(self.full_at))
    }

    /// Before it is asked: brings it under the quota that holds now, with what is kept `apart` of it, if it is not.
    pub(super) fn come_under(
        &mut self,
        now: u64,
        change: QuotaChange,
        quota: Quota,
        apart: &mut Option<KeptApart>,
    ) {
        if !self.is_under(now, quota) {
            self.change_to(quota, now, change, apart);
        }
    }

    fn change_to(&mut self, quota: Quota, now: u64, change: QuotaChange, apart: &mut Option<KeptApart>) {
        let old = self.price();
        let idle = |until: u64| until.saturating_sub(self.full_at);
        let is_same = apart.is_some_and(|it| it.under == quota);
        if let Some(it) = apart
            && is_same
            && self.full_at.saturating_sub(now) <= quota.refill().saturating_mul(2)
        {
            it.missing = it.missing.saturating_sub(idle(now));
            self.full_at = self.full_at.max(now);
            if it.missing == 0 {
                *apart = None;
                self.per_token = quota.per_token;
            }
            return;
        }
        let at = if is_same { now } else { change.at(now) };
        let spent = convert(self.full_at.saturating_sub(at), old, quota.per_token);
        let (beyond, of) = match apart.take() {
            Some(it) => {
                let missing = it.missing.saturating_sub(idle(at));
                (convert(missing, it.price(), quota.per_token), it.per_token)
            }
            None => (0, old),
        };
        let missing = spent.saturating_add(beyond).min(LONGEST);
        let counts = missing.min(quota.refill());
        self.full_at = at.saturating_add(counts);
        self.per_token = quota.per_token;
        if missing > counts {
            let mut kept = KeptApart { missing: 0, per_token: of, under: quota };
            let back = now.saturating_sub(self.full_at);
            kept.missing = convert(missing - counts, quota.per_token, kept.price()).saturating_sub(back);
            self.full_at = self.full_at.max(now);
            if kept.missing > 0 {
                *apart = Some(kept);
                self.per_token |= APART;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::bucket::Per;

    const SECOND: u64 = 1_000_000_000;
    const MINUTE: u64 = 60 * SECOND;

    /// A bucket with what is kept apart, as a table has it.
    #[derive(Clone, Copy, Default)]
    struct Whole {
        bucket: Bucket,
        apart: Option<KeptApart>,
        asked: u64,
    }

    impl Whole {
        fn under(&mut self, now: u64, since: u64, quota: Quota) -> &mut Bucket {
            let change = QuotaChange { since, asked: self.asked };
            self.bucket.come_under(now, change, quota, &mut self.apart);
            self.asked = now;
            &mut self.bucket
        }

        fn left(mut self, now: u64, since: u64, quota: Quota) -> u32 {
            self.under(now, since, quota).left(now, quota)
        }

        fn is_full(&self, now: u64) -> bool {
            self.bucket.is_full_with(now, self.apart.as_ref())
        }
    }

    fn quota(rate: f64, per: Per, burst: u32) -> Quota {
        Quota::new(rate, per, burst).unwrap()
    }

    #[test]
    fn what_is_missing_counts_under_the_quota_in_force_and_no_more_than_its_burst() {
        let hourly = |burst| quota(1.0, Per::Hour, burst);
        let by_second = |rate, burst| quota(rate, Per::Second, burst);
        for (case, old, spent, new, after, left) in [
            ("an empty bucket, and full within its refill", hourly(100), 100, by_second(1.0, 5), 0, 0),
            ("one token of it", hourly(100), 100, by_second(1.0, 5), 1, 1),
            ("and no more than it holds", hourly(100), 100, by_second(1.0, 5), 60, 5),
            ("from the change on, and not from the first call on", hourly(20), 15, by_second(1.0, 20), 6, 11),
            ("faster", hourly(20), 20, by_second(10.0, 20), 3, 20),
            ("slower", by_second(10.0, 20), 20, hourly(20), 60, 0),
            ("larger", hourly(20), 20, hourly(50), 0, 30),
            ("smaller, at one rate", hourly(100), 100, hourly(5), 0, 0),
            ("a part of it", hourly(100), 30, by_second(1.0, 50), 0, 20),
        ] {
            let mut whole = Whole::default();
            whole.under(MINUTE, 0, old).take(MINUTE, old, spent).unwrap();
            let now = MINUTE + after * SECOND;
            assert_eq!(whole.left(now, MINUTE, new), left, "{case}");
        }
    }

    /// A call that began before a reload comes after it: from then on the new rate holds, and not from the reload on.
    #[test]
    fn a_change_was_not_before_the_last_call() {
        let (old, new) = (quota(1.0, Per::Hour, 20), quota(1.0, Per::Second, 20));
        for (asked, left) in [(0, 11), (4, 5)] {
            let mut whole = Whole::default();
            whole.under(MINUTE, 0, old).take(MINUTE, old, 15).unwrap();
            whole.under(MINUTE + asked * SECOND, 0, old);
            assert_eq!(whole.left(MINUTE + 6 * SECOND, MINUTE, new), left, "{asked}");
        }
    }

    #[test]
    fn a_fast_window_fills_its_own_bucket_and_not_the_one_behind_it() {
        let (base, window) = (quota(1.0, Per::Hour, 100), quota(10.0, Per::Second, 5));
        for asks in [true, false] {
            let mut whole = Whole::default();
            whole.under(MINUTE, 0, base).take(MINUTE, base, 100).unwrap();
            let mut answered = 0;
            // From its first second to its twelfth, one each.
            for second in 1..=12 {
                let now = MINUTE + second * SECOND;
                let bucket = whole.under(now, MINUTE, window);
                answered += u32::from(asks && bucket.take(now, window, 1).is_ok());
            }
            let after = MINUTE + 13 * SECOND;
            assert_eq!((answered, whole.left(after, after, base)), (if asks { 12 } else { 0 }, 5), "{asks}");
        }
    }

    /// Quotas that windows and reloads might put in force one after the other.
    fn quotas() -> impl Strategy<Value = Quota> {
        let unit = prop::sample::select(vec![Per::Second, Per::Minute, Per::Hour]);
        (1..=1000_u32, unit, 1..=200_u32)
            .prop_map(|(rate, per, burst)| Quota::new(rate.into(), per, burst).unwrap())
    }

    #[derive(Clone, Debug)]
    enum Step {
        Pass(u64),
        Take(u32),
        /// Held, and given back.
        Refund(u32),
        /// Held, and paid more for than was held.
        Overdraw(u32),
        /// Another quota comes, by a window or a reload; perhaps the one before it.
        Change(Option<Quota>),
    }

    fn steps() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..20 * SECOND).prop_map(Step::Pass),
            3 => (1..=50_u32).prop_map(Step::Take),
            1 => (1..=50_u32).prop_map(Step::Refund),
            1 => (1..=50_u32).prop_map(Step::Overdraw),
            2 => prop::option::of(quotas()).prop_map(Step::Change),
        ]
    }

    #[expect(clippy::as_conversions, reason = "a bound of a test")]
    fn tokens(time: u64, quota: Quota) -> f64 {
        time as f64 / quota.per_token as f64
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        /// Whatever comes: never more than the largest burst and what came back at the rates in force; nobody waits longer
        /// than a refill and a token; and all of it comes back.
        #[test]
        fn tokens_are_tokens(first in quotas(), steps in prop::collection::vec(steps(), 1..80)) {
            let (mut whole, mut quota, mut before, mut now, mut since) =
                (Whole::default(), first, first, MINUTE, 0);
            let (mut burst, mut back, mut given) = (first.burst(), 0.0, 0_u32);
            let mut dearest = first.per_token;
            for step in steps {
                match step {
                    Step::Pass(time) => {
                        now += time;
                        back += tokens(time, quota);
                    }
                    Step::Take(n) => {
                        let passes = whole.under(now, since, quota).take(now, quota, n).is_ok();
                        given += if passes { n } else { 0 };
                    }
                    Step::Refund(n) => {
                        let bucket = whole.under(now, since, quota);
                        let left = bucket.left(now, quota);
                        if bucket.hold(now, quota, n).is_ok() {
                            bucket.settle(now, quota, n, 0);
                        }
                        prop_assert_eq!(bucket.left(now, quota), left);
                    }
                    Step::Overdraw(n) => {
                        let bucket = whole.under(now, since, quota);
                        if bucket.hold(now, quota, 1).is_ok() {
                            bucket.settle(now, quota, 1, n);
                            given += 1;
                        }
                    }
                    Step::Change(next) => {
                        // Each change is seen by a call: those that none sees are none.
                        whole.under(now, since, quota);
                        (quota, before, since) = (next.unwrap_or(before), quota, now);
                        burst = burst.max(quota.burst());
                        dearest = dearest.max(quota.per_token);
                    }
                }
                let most = f64::from(burst) + back + 1.0;
                prop_assert!(f64::from(given) <= most, "{given} given, at most {most}");
                let wait = whole.under(now, since, quota).try_hold(now, quota, 1).err().unwrap_or_default();
                let longest = u128::from(quota.refill() + quota.per_token);
                prop_assert!(wait.as_nanos() <= longest, "{wait:?}");
            }
            let later = now + dearest * 200 * 100;
            prop_assert_eq!(whole.left(later, since, quota), quota.burst());
            prop_assert!(whole.is_full(later));
        }

        /// Changes there and back take no token and give none.
        #[test]
        fn another_quota_for_a_moment_changes_nothing(
            first in quotas(),
            taken in 0..=200_u32,
            others in prop::collection::vec(quotas(), 1..6),
        ) {
            let mut whole = Whole::default();
            let taken = taken.min(first.burst());
            whole.under(MINUTE, 0, first).take(MINUTE, first, taken).unwrap();
            for other in others {
                // Asked for, and given back.
                let bucket = whole.under(MINUTE, MINUTE, other);
                if bucket.hold(MINUTE, other, 1).is_ok() {
                    bucket.settle(MINUTE, other, 1, 0);
                }
            }
            let left = whole.left(MINUTE, MINUTE, first);
            let want = first.burst() - taken;
            prop_assert!(left <= want && left + 1 >= want, "{left} left, not {want}");
        }

        /// When the next call comes after a change makes no difference.
        #[test]
        fn a_change_is_when_it_is(
            first in quotas(),
            next in quotas(),
            taken in 0..=200_u32,
            pauses in prop::collection::vec(0..60 * SECOND, 2..8),
        ) {
            prop_assume!(first.per_token != next.per_token);
            let mut whole = Whole::default();
            whole.under(MINUTE, 0, first).take(MINUTE, first, taken.min(first.burst())).unwrap();
            let (mut asked, untouched) = (whole, whole);
            let changed = MINUTE + pauses[0];
            let mut now = changed;
            for pause in &pauses[1..] {
                asked.under(now, changed, next);
                now += pause;
            }
            let of = |whole: Whole| (whole.left(now, changed, next), whole.left(now, now, first));
            let mut untouched = untouched;
            untouched.under(now, changed, next);
            let (one, other) = (of(asked), of(untouched));
            prop_assert!(one.0.abs_diff(other.0) <= 1 && one.1.abs_diff(other.1) <= 1, "{one:?}, {other:?}");
        }
    }
}
