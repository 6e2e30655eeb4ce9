//! How often this process may do what it does once for all: say a line in the log that calls can cause, ask a server.
//!
//! governor's limiter fits where there is one of it and nobody asks what is left; what is kept by key, lent and given back
//! is a [`Bucket`](super::bucket::Bucket).

use std::{
    num::NonZeroU32,
    sync::atomic::{AtomicU64, Ordering},
};

use governor::{
    RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};

/// Paces what happens at one place.
#[derive(Debug)]
pub struct Pace<C: Clock = DefaultClock> {
    limiter: RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<C::Instant>>,
    left_out: AtomicU64,
}

impl Pace {
    /// So often a minute, and as often at once.
    pub fn per_minute(times: NonZeroU32) -> Self {
        Self::by_clock(times, DefaultClock::default())
    }
}

impl<C: Clock> Pace<C> {
    fn by_clock(times: NonZeroU32, clock: C) -> Self {
        let limiter = RateLimiter::direct_with_clock(governor::Quota::per_minute(times), clock);
        Self { limiter, left_out: AtomicU64::new(0) }
    }

    /// Asks for one. Returns how many got none since the last that got one, or `None` when this gets none.
    pub fn line(&self) -> Option<u64> {
        if self.limiter.check().is_ok() {
            return Some(self.left_out.swap(0, Ordering::Relaxed));
        }
        self.left_out.fetch_add(1, Ordering::Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use governor::clock::FakeRelativeClock;

    use super::*;

    #[test]
    fn a_flood_is_a_few_lines_that_tell_its_size() {
        let clock = FakeRelativeClock::default();
        let pace = Pace::by_clock(NonZeroU32::new(6).unwrap(), clock.clone());
        let lines: Vec<u64> = (0..1000).filter_map(|_| pace.line()).collect();
        assert_eq!(lines, [0; 6]);
        clock.advance(Duration::from_secs(9));
        assert_eq!(pace.line(), None);
        clock.advance(Duration::from_secs(1));
        assert_eq!(pace.line(), Some(995), "994 of the flood, and one before its time");
        assert_eq!(pace.line(), None);
    }
}
