//! A token bucket, and what it is made of.
//!
//! A bucket is kept as the moment when it would be full again (the form that ATM's GCRA has), so that a bucket
//! that is full says so without anybody knowing its quota: that moment is past. **Only such a bucket may be
//! forgotten** ([`table`](super::table)): a fresh one equals it, so forgetting never gives tokens back.
//!
//! - The quota comes with each call. A reload changes it from one call to the next; what was spent stays spent.
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

    /// Nanoseconds from empty to full.
    pub(super) fn refill(self) -> u64 {
        self.per_token * u64::from(self.burst)
    }

    pub(super) const fn constant(per_second: u32, burst: u32) -> Self {
        #[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
        let rate = per_second as u64;
        Self { per_token: 1_000_000_000 / rate, burst }
    }
}

/// How full a bucket was before and after a call was paid, for soft limits. In nanoseconds of refill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level {
    before: u64,
    after: u64,
    refill: u64,
}

impl Level {
    /// Whether this call took the bucket from below `percent` used to it or above.
    pub fn crossed(self, percent: u8) -> bool {
        // At most 2 x 3.2e16 x 100: fits, and where a reload has shrunk a bucket that owes more, it saturates.
        let line = self.refill * u64::from(percent);
        self.before.saturating_mul(100) < line && self.after.saturating_mul(100) >= line
    }
}

/// One bucket. Full when new.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When it would be full again if nobody took more.
    full_at: u64,
    /// The price of a token that `full_at` was reckoned with; 0 in a new one.
    per_token: u64,
    /// Tokens of calls under way.
    pub(super) held: u32,
}

impl Bucket {
    /// Whether a fresh bucket would do just as well.
    pub fn is_full(&self, now: u64) -> bool {
        self.held == 0 && self.full_at <= now
    }

    /// Tokens that could be taken now, whole ones.
    pub fn left(&self, now: u64, quota: Quota) -> u32 {
        let mut copy = *self;
        let used = copy.spent(now, quota) + u64::from(copy.held) * quota.per_token;
        let left = quota.refill().saturating_sub(used) / quota.per_token;
        u32::try_from(left).unwrap_or(quota.burst)
    }

    /// Holds `cost` tokens for a call that begins.
    ///
    /// # Errors
    /// The time after which the same would succeed, if nobody takes or settles anything meanwhile.
    pub fn hold(&mut self, now: u64, quota: Quota, cost: u32) -> Result<(), Duration> {
        let refill = quota.refill();
        let before = self.spent(now, quota) + u64::from(self.held) * quota.per_token;
        let after = before + u64::from(cost) * quota.per_token;
        if after > refill {
            return Err(Duration::from_nanos(after - refill));
        }
        self.held += cost;
        Ok(())
    }

    /// Ends a call: lets go of the `held` tokens and takes `cost`. No cost is a refund; a cost above what was
    /// held is a debt, of which a bucket carries at most one burst. `quota` is the one that the call began
    /// with: another one that holds meanwhile may have let more be spent, and that stays.
    pub fn settle(&mut self, now: u64, quota: Quota, held: u32, cost: u32) -> Level {
        self.held = self.held.saturating_sub(held);
        // A reload may have changed the price since the hold; tokens are tokens.
        if self.per_token == 0 {
            self.per_token = quota.per_token;
        }
        let quota = Quota { per_token: self.per_token, burst: quota.burst };
        let refill = quota.refill();
        let before = self.full_at.saturating_sub(now);
        let after = before.max((before + u64::from(cost) * quota.per_token).min(2 * refill));
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

    /// Spends as much as another bucket of the same quota has spent, if that is more.
    pub(super) fn inherit(&mut self, now: u64, quota: Quota, other: Option<&mut Self>) {
        let Some(other) = other else { return };
        let mut other = *other;
        self.full_at = now + other.spent(now, quota).max(self.spent(now, quota));
    }

    /// What is spent now, in nanoseconds of refill. Reckons anew when the price has changed, so that the number of
    /// tokens spent stays, and no bucket owes more than one burst beyond empty.
    fn spent(&mut self, now: u64, quota: Quota) -> u64 {
        let mut spent = self.full_at.saturating_sub(now);
        if self.per_token != quota.per_token {
            if spent > 0 {
                let tokens_to_new_price = u128::from(spent) * u128::from(quota.per_token);
                let converted = tokens_to_new_price.div_ceil(u128::from(self.per_token.max(1)));
                spent = u64::try_from(converted).unwrap_or(u64::MAX);
            }
            self.per_token = quota.per_token;
        }
        spent = spent.min(2 * quota.refill());
        self.full_at = now + spent;
        spent
    }
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
