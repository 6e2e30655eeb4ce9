//! Buckets for keys that have none of their own.

use std::time::Duration;

use super::bucket::{Bucket, Quota, Shortfall};

/// Buckets that keys share which have none of their own: one for each quota, since what comes back at two rates
/// cannot be reckoned in one. A quota that was not seen here before begins with a full bucket.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool(Vec<(Quota, Bucket)>);

/// Quotas of one pool: a caller's methods, and what a reload or a window changed meanwhile.
const POOL: usize = 16;
/// When to come back to a pool that has no room for another quota and cannot say when it will.
const POOL_WAIT: Duration = Duration::from_millis(100);

impl Pool {
    pub(super) fn is_full(&self, now: u64) -> bool {
        self.0.iter().all(|(_, bucket)| bucket.is_full(now))
    }

    /// Whether it has tokens of calls under way.
    pub(super) fn is_held(&self) -> bool {
        self.0.iter().any(|(_, bucket)| bucket.held > 0)
    }

    pub(super) fn get(&mut self, quota: Quota) -> Option<&mut Bucket> {
        self.0.iter_mut().find(|(of, _)| *of == quota).map(|(_, bucket)| bucket)
    }

    /// Holds tokens. Returns how many: none for a call that passes without.
    pub(super) fn hold(
        &mut self,
        now: u64,
        quota: Quota,
        cost: u32,
        short: Shortfall,
    ) -> Result<u32, Duration> {
        match self.try_hold(now, quota, cost) {
            Err(_) if short == Shortfall::Pass => Ok(0),
            held => held.map(|()| cost),
        }
    }

    fn try_hold(&mut self, now: u64, quota: Quota, cost: u32) -> Result<(), Duration> {
        if let Some(bucket) = self.get(quota) {
            return bucket.hold(now, quota, cost);
        }
        self.0.retain(|(_, bucket)| !bucket.is_full(now));
        if self.0.len() >= POOL {
            return Err(POOL_WAIT);
        }
        let mut bucket = Bucket::default();
        bucket.hold(now, quota, cost)?;
        self.0.push((quota, bucket));
        Ok(())
    }

    /// What is spent of it.
    pub(super) fn spent(&self, now: u64) -> Self {
        Self(self.0.iter().filter(|(_, bucket)| !bucket.is_full(now)).copied().collect())
    }
}
