//! How often this process may do what it does once for all: write a line in the log that calls can cause, ask a
//! server.
//!
//! governor's limiter fits where there is one of it and nobody asks what is left; what is kept by key, lent and
//! given back is a [`Bucket`](super::bucket::Bucket).

use std::{
    num::{NonZeroU32, NonZeroU64},
    sync::atomic::{AtomicU64, Ordering},
};

use governor::{
    RateLimiter,
    clock::{Clock, DefaultClock},
    middleware::NoOpMiddleware,
    state::{InMemoryState, NotKeyed},
};

/// How many lines of one kind there are in a minute, and at once.
const LINES_A_MINUTE: u32 = 60;

/// Paces what happens at one place. The default is for a line in the log: 60 a minute.
#[derive(Debug)]
pub struct Pace<C: Clock = DefaultClock> {
    limiter: RateLimiter<NotKeyed, InMemoryState, C, NoOpMiddleware<C::Instant>>,
    left_out: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        let lines = NonZeroU32::new(LINES_A_MINUTE).unwrap_or(NonZeroU32::MIN);
        Self::by_clock(lines, DefaultClock::default())
    }
}

impl<C: Clock> Pace<C> {
    fn by_clock(times: NonZeroU32, clock: C) -> Self {
        let limiter = RateLimiter::direct_with_clock(governor::Quota::per_minute(times), clock);
        Self { limiter, left_out: AtomicU64::new(0) }
    }

    /// Has `line` say what happened, unless it is too soon; it is told how often it was too soon since the last line.
    pub fn say(&self, line: impl FnOnce(Option<NonZeroU64>)) {
        if self.limiter.check().is_ok() {
            line(NonZeroU64::new(self.left_out.swap(0, Ordering::Relaxed)));
        } else {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
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
        let mut lines = Vec::new();
        let mut flood = |times| (0..times).for_each(|_| pace.say(|left_out| lines.push(left_out)));
        flood(1000);
        clock.advance(Duration::from_secs(9));
        flood(1);
        clock.advance(Duration::from_secs(1));
        flood(2);
        // 994 of the flood, and one before its time.
        assert_eq!(lines, [[None; 6].as_slice(), &[NonZeroU64::new(995)]].concat());
    }
}
