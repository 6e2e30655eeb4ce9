//! A token bucket, and what it is made of.
//!
//! A bucket is kept as the moment when it would be full again (the form that ATM's GCRA has), so that a bucket
//! that is full says so without anybody knowing its quota: that moment is past. **Only such a bucket may be
//! forgotten** ([`table`](super::table)): a fresh one equals it, so forgetting never gives tokens back.
//!
//! - The quota comes with each call. A window or a reload changes it; what was spent stays spent ([`apart`](super::apart)).
//! - A call first *holds* tokens, and *settles* when it is known what it cost: nothing (it was refused further
//!   on), the price of an answer, or more than was held, which is then a debt of at most one burst. Until then
//!   nothing has moved, so a refund restores exactly what was.

use std::{num::NonZeroU32, time::Duration};

/// The highest rate, in tokens per second. Above it a bucket is no protection; say `unlimited`.
pub const MAX_RATE: f64 = 1_000_000.0;
/// The largest burst, in tokens.
pub const MAX_BURST: u32 = 1_000_000;
/// The longest that an empty bucket may take to fill, in days. It keeps all sums of this module far from overflow.
pub const MAX_REFILL_DAYS: u32 = 366;
const DAY: f64 = 86_400e9;
/// The most that a bucket may owe, in nanoseconds of refill: about 146 years. Reached only by what was spent at more than
/// a hundred times the price of now.
pub(super) const LONGEST: u64 = u64::MAX / 4;

/// The unit of a rate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Per {
    /// Per second.
    #[default]
    Second,
    /// Per 60 seconds.
    Minute,
    /// Per 3,600 seconds.
    Hour,
    /// Per 86,400 seconds.
    Day,
}

impl Per {
    /// Parses `second`, `minute`, `hour` or `day`.
    ///
    /// # Errors
    /// [`QuotaError::Unit`] for any other text.
    pub fn parse(text: &str) -> Result<Self, QuotaError> {
        match text {
            "second" => Ok(Self::Second),
            "minute" => Ok(Self::Minute),
            "hour" => Ok(Self::Hour),
            "day" => Ok(Self::Day),
            _ => Err(QuotaError::Unit(text.into())),
        }
    }

    fn seconds(self) -> f64 {
        match self {
            Self::Second => 1.0,
            Self::Minute => 60.0,
            Self::Hour => 3_600.0,
            Self::Day => 86_400.0,
        }
    }
}

/// Why numbers make no quota.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuotaError {
    /// Zero, negative, NaN or infinite, or more than [`MAX_RATE`].
    #[error(
        "rate {0} must be above 0 and at most {most} per second (use \"block\" for none, \"unlimited\" for no limit)",
        most = MAX_RATE
    )]
    Rate(f64),
    /// Zero, or more than [`MAX_BURST`].
    #[error("burst {0} must be from 1 to {most}", most = MAX_BURST)]
    Burst(u32),
    /// An empty bucket would need more than [`MAX_REFILL_DAYS`].
    #[error(
        "burst {burst} at this rate takes {days} days to come back; it must be at most {most}",
        most = MAX_REFILL_DAYS
    )]
    Refill {
        burst: u32,
        /// How long it takes.
        days: u64,
    },
    /// Not a unit.
    #[error("unit \"{0}\" must be second, minute, hour or day")]
    Unit(Box<str>),
}

/// How many tokens a bucket holds and how fast they come back. No part is zero, so that it always admits in the
/// end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// Nanoseconds until one token is back.
    pub(super) per_token: u64,
    burst: u32,
}

impl Quota {
    /// Of a bucket that nothing is taken from: it is there for what is counted with it.
    pub(super) const NOTHING_TAKEN: Self = Self::constant(1, 1);

    /// `rate` tokens per `per`, at most `burst` at once. Fractions of a token per unit are fine: 0.5 per minute.
    ///
    /// # Errors
    /// [`QuotaError`] when a number is outside its bounds.
    pub fn new(rate: f64, per: Per, burst: u32) -> Result<Self, QuotaError> {
        let per_second = rate / per.seconds();
        // Written so that NaN fails too.
        if !(per_second > 0.0 && per_second <= MAX_RATE) {
            return Err(QuotaError::Rate(rate));
        }
        if burst == 0 || burst > MAX_BURST {
            return Err(QuotaError::Burst(burst));
        }
        // Rounded up: never more than was asked for.
        let price = (1e9 / per_second).ceil();
        let refill = price * f64::from(burst);
        if refill > f64::from(MAX_REFILL_DAYS) * DAY {
            #[expect(clippy::as_conversions, reason = "saturates, which is what an error message may do")]
            let days = (refill / DAY).ceil() as u64;
            return Err(QuotaError::Refill { burst, days });
        }
        #[expect(clippy::as_conversions, reason = "1e3 ..= 3.2e16 was checked above, and it has no fraction")]
        let per_token = price as u64;
        Ok(Self { per_token, burst })
    }

    /// `rate` tokens a second, `burst` at once; for the defaults, and for spire-agent's keys, where both are
    /// one number.
    ///
    /// # Errors
    /// [`QuotaError`] when a number is above its bound.
    pub fn per_second(rate: NonZeroU32, burst: NonZeroU32) -> Result<Self, QuotaError> {
        Self::new(f64::from(rate.get()), Per::Second, burst.get())
    }

    /// The most tokens at once.
    pub fn burst(self) -> u32 {
        self.burst
    }

    /// Thousandths of a token that come back in so many seconds.
    pub(super) fn millis_per(self, seconds: u64) -> u64 {
        let nanos = u128::from(seconds) * 1_000_000_000_000;
        let per_token = u128::from(self.per_token.max(1));
        u64::try_from((nanos + per_token / 2) / per_token).unwrap_or(u64::MAX)
    }

    /// Nanoseconds from empty to full.
    pub(super) fn refill(self) -> u64 {
        // Only a bucket whose calls began at another price is asked for more than a quota may be.
        self.per_token.saturating_mul(u64::from(self.burst))
    }

    /// How long so many tokens take to come back.
    pub(super) fn time_of(self, tokens: u32) -> Duration {
        Duration::from_nanos(price(tokens, self))
    }

    /// How long it takes for as many tokens as `other` makes in so long; no longer than that.
    pub(super) fn faster_than(self, other: Self, wait: Duration) -> Duration {
        let (price, of_other) = (u128::from(self.per_token), u128::from(other.per_token.max(1)));
        let nanos = (wait.as_nanos() * price).div_ceil(of_other);
        u64::try_from(nanos).map_or(wait, |nanos| wait.min(Duration::from_nanos(nanos)))
    }

    pub(super) const fn constant(per_second: u32, burst: u32) -> Self {
        #[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
        let rate = per_second as u64;
        Self { per_token: 1_000_000_000 / rate, burst }
    }
}

/// What becomes of a call for which a bucket has too few tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shortfall {
    /// It is told when to come back.
    Refuse,
    /// It passes while its caller's share of the bucket has tokens, where callers have shares; else it is told so.
    PassOwn,
    /// It passes, and takes what there is: the bucket is empty then, and owes nothing.
    Pass,
}

/// How full a bucket was before and after a call was paid, for soft limits. In nanoseconds of refill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    before: u64,
    after: u64,
    refill: u64,
}

impl Level {
    /// Whether less than `percent` of the bucket is used now.
    pub fn is_below(self, percent: u8) -> bool {
        self.after.saturating_mul(100) < self.refill.saturating_mul(u64::from(percent))
    }

    /// Whether this call took the bucket from below `percent` used to it or above.
    pub fn crossed(self, percent: u8) -> bool {
        // At most 2 x 3.2e16 x 100: fits, and where a reload has shrunk a bucket that owes more, it saturates.
        let line = self.refill.saturating_mul(u64::from(percent));
        self.before.saturating_mul(100) < line && self.after.saturating_mul(100) >= line
    }
}

/// One bucket. Full when new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When it would be full again if nobody took more.
    pub(super) full_at: u64,
    /// The price of a token that `full_at` was reckoned with, and a [mark](super::apart); 0 in a new one.
    pub(super) per_token: u64,
    /// Tokens of calls under way.
    pub(super) held: u32,
    /// How often it was asked in the second in which it was asked last, and the most there was in one: for people, counted
    /// by whoever keeps it.
    pub(super) asked: u16,
    pub(super) most: u16,
}

impl Bucket {
    /// Whether a fresh bucket would do just as well.
    pub fn is_full(&self, now: u64) -> bool {
        self.held == 0 && self.full_at <= now
    }

    /// Tokens that could be taken now, whole ones.
    pub fn left(&self, now: u64, quota: Quota) -> u32 {
        u32::try_from(self.unspent(now, quota) / quota.per_token).unwrap_or(quota.burst)
    }

    /// What could be taken now, in nanoseconds of refill.
    pub(super) fn unspent(&self, now: u64, quota: Quota) -> u64 {
        let mut copy = *self;
        let used = copy.spent(now, quota).saturating_add(price(copy.held, quota));
        quota.refill().saturating_sub(used)
    }

    /// Holds `cost` tokens for a call that begins.
    ///
    /// # Errors
    /// The time after which the same would succeed, if nobody takes or settles anything meanwhile.
    pub fn hold(&mut self, now: u64, quota: Quota, cost: u32) -> Result<(), Duration> {
        self.hold_leaving(now, quota, cost, 0)
    }

    /// [`Bucket::hold`] that holds nothing: whether it would succeed.
    pub(super) fn try_hold(&mut self, now: u64, quota: Quota, cost: u32) -> Result<(), Duration> {
        self.hold(now, quota, cost)?;
        self.held -= cost;
        Ok(())
    }

    /// [`Bucket::hold`] where so many tokens must be left.
    pub(super) fn hold_leaving(
        &mut self,
        now: u64,
        quota: Quota,
        cost: u32,
        leaves: u32,
    ) -> Result<(), Duration> {
        let refill = quota.refill().saturating_sub(price(leaves, quota));
        let before = self.spent(now, quota).saturating_add(price(self.held, quota));
        let after = before.saturating_add(price(cost, quota));
        if after > refill {
            return Err(Duration::from_nanos(after - refill));
        }
        self.held += cost;
        Ok(())
    }

    /// Holds as many of these tokens as there are beside those that must be left, which may be none. Returns how many.
    pub(super) fn hold_some(&mut self, now: u64, quota: Quota, cost: u32, leaves: u32) -> u32 {
        let some = cost.min(self.left(now, quota).saturating_sub(leaves));
        self.held += some;
        some
    }

    /// Ends a call: lets go of the `held` tokens and takes `cost`. No cost is a refund; a cost above what was
    /// held is a debt, of which a bucket carries at most one burst. `quota` is the one that the call began
    /// with: another one that holds meanwhile may have let more be spent, and that stays.
    pub fn settle(&mut self, now: u64, quota: Quota, held: u32, cost: u32) -> Level {
        self.settle_by(now, quota, held, cost, Shortfall::Refuse)
    }

    /// [`Bucket::settle`] of a call that began like this: one that passed without tokens leaves no debt.
    pub(super) fn settle_by(
        &mut self,
        now: u64,
        quota: Quota,
        held: u32,
        cost: u32,
        short: Shortfall,
    ) -> Level {
        self.held = self.held.saturating_sub(held);
        // A reload may have changed the price since the hold; tokens are tokens.
        if self.per_token == 0 {
            self.per_token = quota.per_token;
        }
        let quota = Quota { per_token: self.price(), burst: quota.burst };
        let refill = quota.refill();
        let before = self.full_at.saturating_sub(now);
        let most = match short {
            Shortfall::Refuse | Shortfall::PassOwn => refill.saturating_mul(2).min(LONGEST),
            Shortfall::Pass => refill.saturating_sub(price(self.held, quota)),
        };
        let after = before.max(before.saturating_add(price(cost, quota)).min(most));
        self.full_at = now + after;
        Level { before, after, refill }
    }

    /// Takes `cost` tokens of a call that is over at once.
    ///
    /// # Errors
    /// As [`Bucket::hold`].
    pub fn take(&mut self, now: u64, quota: Quota, cost: u32) -> Result<(), Duration> {
        self.hold(now, quota, cost)?;
        self.settle(now, quota, cost, cost);
        Ok(())
    }

    /// A token that was taken comes back, if its price is what it was.
    pub(super) fn give_back_one(&mut self, now: u64, quota: Quota) {
        if self.price() == quota.per_token {
            self.full_at = self.full_at.saturating_sub(quota.per_token).max(now.min(self.full_at));
        }
    }

    /// Spends as much as another bucket of the same quota has spent, if that is more.
    pub(super) fn inherit(&mut self, now: u64, quota: Quota, other: Option<&mut Self>) {
        let Some(other) = other else { return };
        let mut other = *other;
        self.full_at = now + other.spent(now, quota).max(self.spent(now, quota));
    }

    /// Spends so much, in nanoseconds of refill, if that is more than is spent already.
    pub(super) fn spend(&mut self, now: u64, quota: Quota, spent: u64) {
        self.full_at = now + spent.max(self.spent(now, quota));
    }

    /// What is spent now, in nanoseconds of refill. Reckons anew when the price has changed, so that the number of
    /// tokens spent stays: also where a window or a reload makes the bucket smaller than that for a while.
    pub(super) fn spent(&mut self, now: u64, quota: Quota) -> u64 {
        let mut spent = self.full_at.saturating_sub(now);
        if self.price() != quota.per_token {
            spent = convert(spent, self.price(), quota.per_token);
            self.per_token = quota.per_token;
        }
        self.full_at = now + spent;
        spent
    }
}

/// Nanoseconds of refill at one price as those at another, for the same tokens.
pub(super) fn convert(spent: u64, from: u64, to: u64) -> u64 {
    if spent == 0 || from == to {
        return spent;
    }
    let converted = (u128::from(spent) * u128::from(to)).div_ceil(u128::from(from.max(1)));
    u64::try_from(converted).unwrap_or(LONGEST).min(LONGEST)
}

/// What so many tokens cost, in nanoseconds of refill. Tokens that are held may be of a larger quota than this one.
pub(super) fn price(tokens: u32, quota: Quota) -> u64 {
    u64::from(tokens).saturating_mul(quota.per_token)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn quota(rate: f64, burst: u32) -> Quota {
        Quota::new(rate, Per::Second, burst).unwrap()
    }

    #[test]
    fn numbers_become_a_quota_or_an_error() {
        use QuotaError as E;
        let price = |rate, per, burst| Quota::new(rate, per, burst).map(|quota| quota.per_token);
        for (case, rate, per, burst, want) in [
            ("plain", 100.0, Per::Second, 200, Ok(10_000_000)),
            ("fraction", 0.5, Per::Second, 3, Ok(2_000_000_000)),
            ("minute", 0.5, Per::Minute, 3, Ok(120_000_000_000)),
            ("day", 1.0, Per::Day, 1, Ok(86_400_000_000_000)),
            ("rounded up", 3.0, Per::Second, 1, Ok(333_333_334)),
            ("most", 1e6, Per::Second, MAX_BURST, Ok(1_000)),
            ("most by the hour", 3.6e9, Per::Hour, 1, Ok(1_000)),
            ("too fast", 1e6 + 1.0, Per::Second, 1, Err(E::Rate(1e6 + 1.0))),
            ("zero", 0.0, Per::Second, 1, Err(E::Rate(0.0))),
            ("negative", -1.0, Per::Second, 1, Err(E::Rate(-1.0))),
            ("infinite", f64::INFINITY, Per::Second, 1, Err(E::Rate(f64::INFINITY))),
            ("no burst", 1.0, Per::Second, 0, Err(E::Burst(0))),
            ("huge burst", 1.0, Per::Second, MAX_BURST + 1, Err(E::Burst(MAX_BURST + 1))),
            ("a year", 1.0, Per::Day, 366, Ok(86_400_000_000_000)),
            ("over a year", 1.0, Per::Day, 367, Err(E::Refill { burst: 367, days: 367 })),
            ("never", f64::MIN_POSITIVE, Per::Day, 1, Err(E::Refill { burst: 1, days: u64::MAX })),
        ] {
            assert_eq!(price(rate, per, burst), want, "{case}");
        }
        assert!(matches!(price(f64::NAN, Per::Second, 1), Err(E::Rate(_))), "not a number");
        assert_eq!(Per::parse("minutes"), Err(E::Unit("minutes".into())));
        assert_eq!(Per::parse("hour"), Ok(Per::Hour));
    }

    #[test]
    fn a_reload_keeps_the_tokens_spent() {
        for (case, old, spent, new, left) in [
            ("faster", quota(1.0, 10), 10, quota(100.0, 100), 90),
            ("slower", quota(100.0, 100), 95, quota(1.0, 100), 5),
            ("smaller burst", quota(1.0, 100), 100, quota(1.0, 10), 0),
            ("larger burst", quota(1.0, 10), 4, quota(1.0, 20), 16),
            ("the same", quota(1.0, 10), 4, quota(1.0, 10), 6),
        ] {
            let mut bucket = Bucket::default();
            bucket.take(SECOND, old, spent).unwrap();
            assert_eq!(bucket.left(SECOND, new), left, "{case}");
            assert!(bucket.hold(SECOND, new, left + 1).is_err(), "{case}");
            assert!(left == 0 || bucket.hold(SECOND, new, left).is_ok(), "{case}");
        }
    }

    #[test]
    fn a_quota_that_costs_far_more_overflows_nothing() {
        let (cheap, dear) = (quota(1e6, MAX_BURST), Quota::new(1.0, Per::Day, 366).unwrap());
        let mut bucket = Bucket::default();
        bucket.hold(SECOND, cheap, MAX_BURST / 2).unwrap();
        assert_eq!(bucket.left(SECOND, dear), 0);
        bucket.hold(SECOND, dear, 1).unwrap_err();
        bucket.settle(SECOND, cheap, MAX_BURST / 2, MAX_BURST / 2);
        bucket.hold(SECOND, dear, 1).unwrap_err();
        assert_eq!(bucket.left(SECOND, dear), 0);
    }

    #[test]
    fn a_debt_is_one_burst_at_most() {
        let quota = quota(1.0, 10);
        let mut bucket = Bucket::default();
        bucket.settle(SECOND, quota, 0, 0);
        bucket.hold(SECOND, quota, 1).unwrap();
        bucket.settle(SECOND, quota, 1, 1_000_000);
        assert_eq!(bucket.hold(SECOND, quota, 1), Err(Duration::from_secs(11)));
    }

    /// A call that began under a small quota and ends under a large one gives nothing back of what was spent
    /// meanwhile.
    #[test]
    fn a_call_that_ends_after_a_reload_forgives_nothing() {
        let (small, large) = (quota(1.0, 10), quota(1.0, 1000));
        let mut bucket = Bucket::default();
        bucket.hold(SECOND, small, 1).unwrap();
        bucket.hold(SECOND, large, 900).unwrap();
        bucket.settle(SECOND, large, 900, 900);
        bucket.settle(SECOND, small, 1, 1);
        assert_eq!(bucket.left(SECOND, large), 100);
    }
}
