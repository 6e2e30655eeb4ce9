//! What calls may have beyond their shares while of all things only processor time is short: what the agent has left of its own.
//!
//! Without room whoever has tokens passes. Where few callers ask for much, this is less than the agent may use; the rest is
//! given out too, in equal parts to all who ask for it ([`shares`](super::shares)). How many calls a second that makes,
//! [`ProcessorTime`](super::processor::ProcessorTime) finds out.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    bucket::{MAX_RATE, Per, Quota, Shortfall},
    shares::{SharedBucket, Taker},
};

/// For so long nobody needs to have asked, and it may be had at once: one part in so many of a second.
const AT_ONCE: f64 = 20.0;

/// Calls that there is processor time for, beside those that have tokens. None at first.
#[derive(Debug, Default)]
pub(super) struct SpareCalls(Mutex<SpareBucket>);

#[derive(Debug, Default)]
struct SpareBucket {
    quota: Option<Quota>,
    shared: SharedBucket,
    /// Somebody got none.
    lacked: bool,
}

impl SpareCalls {
    fn lock(&self) -> MutexGuard<'_, SpareBucket> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many a second from now on; less than one is none.
    pub(super) fn set(&self, per_second: f64) {
        let rate = per_second.min(MAX_RATE);
        #[expect(
            clippy::as_conversions,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "from 1 to 50,000"
        )]
        let burst = (rate / AT_ONCE).max(1.0) as u32;
        let quota = (rate >= 1.0).then(|| Quota::new(rate, Per::Second, burst).ok()).flatten();
        self.lock().quota = quota;
    }

    /// How long one takes to come; [`Duration::MAX`] for ever.
    pub(super) fn each(&self) -> Duration {
        self.lock().quota.map_or(Duration::MAX, |quota| quota.time_of(1))
    }

    /// How many there are a second.
    pub(super) fn per_second(&self) -> u32 {
        self.lock().quota.map_or(0, |quota| u32::try_from(quota.millis_per(1) / 1000).unwrap_or(u32::MAX))
    }

    /// Whether somebody got none since this was last asked.
    pub(super) fn lacked(&self) -> bool {
        std::mem::take(&mut self.lock().lacked)
    }

    /// Takes one.
    ///
    /// # Errors
    /// When to come back.
    pub(super) fn take(&self, now: u64, taker: Taker) -> Result<(), Duration> {
        let mut guard = self.lock();
        let SpareBucket { quota, shared, lacked } = &mut *guard;
        let taken = match *quota {
            Some(quota) => shared.take(now, quota, 1, taker, Shortfall::Refuse).map_err(|lack| lack.wait),
            None => Err(Duration::MAX),
        };
        *lacked |= taken.is_err();
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::caller::CallerKey;

    #[test]
    fn all_who_ask_have_equal_parts_whoever_asks_more_often() {
        let spare = SpareCalls::default();
        let taker = |uid: u32| Taker { caller: CallerKey::Uid(uid), group: u64::from(uid) };
        assert_eq!(spare.take(1, taker(1)), Err(Duration::MAX), "none at first");
        assert!(spare.lacked() && !spare.lacked());
        spare.set(1_000.0);
        assert_eq!(spare.per_second(), 1_000);
        let mut had = [0_u32; 5];
        // The last asks 400 times a second, the others 2,000 times.
        for tick in 0..10_000_u64 {
            for (uid, had) in (0..).zip(&mut had) {
                if uid < 4 || tick % 5 == 0 {
                    *had += u32::from(spare.take(tick * 500_000, taker(uid)).is_ok());
                }
            }
        }
        let all: u32 = had.iter().sum();
        assert!((4_900..5_100).contains(&all), "{had:?}");
        assert!(had.iter().all(|had| (850..1_150).contains(had)), "{had:?}");
        assert!(spare.lacked());
        spare.set(0.5);
        assert_eq!(spare.take(u64::MAX / 8, taker(1)), Err(Duration::MAX), "less than one is none");
    }
}
