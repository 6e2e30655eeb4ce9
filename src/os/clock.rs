//! Wall time, which tests can move together with tokio's.
//!
//! X.509 and JWT validity is wall time; sleeps and timeouts are monotonic. Both are read here only.

use std::time::{Duration, SystemTime};

/// Where the present comes from.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// `None` reads the system; else wall time is this epoch plus what tokio's clock says has passed.
    anchor: Option<(SystemTime, tokio::time::Instant)>,
}

impl Clock {
    /// The system's clock.
    pub const SYSTEM: Self = Self { anchor: None };

    /// A clock that starts at `epoch` and moves with tokio's, which `tokio::time::advance` moves.
    pub fn starting_at(epoch: SystemTime) -> Self {
        Self { anchor: Some((epoch, tokio::time::Instant::now())) }
    }

    /// Now.
    #[expect(clippy::disallowed_methods, reason = "the one reader of wall time")]
    pub fn now(self) -> SystemTime {
        match self.anchor {
            None => SystemTime::now(),
            Some((epoch, started)) => epoch + started.elapsed(),
        }
    }
}

/// Sleeps until the clock says `due`. Looks again at least every 10 seconds: a monotonic sleep stands still while
/// the machine is suspended, and does not see the clock being set.
pub async fn sleep_until(clock: Clock, due: SystemTime) {
    while let Ok(left) = due.duration_since(clock.now()) {
        if left.is_zero() {
            break;
        }
        tokio::time::sleep(left.min(Duration::from_secs(10))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn wakes_when_due() {
        let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = Clock::starting_at(born);
        sleep_until(clock, born + Duration::from_secs(1800)).await;
        assert_eq!(clock.now(), born + Duration::from_secs(1800));
        sleep_until(clock, born).await;
        assert_eq!(clock.now(), born + Duration::from_secs(1800), "the past is due at once");
    }
}
