//! How long to wait after a failure.

use std::time::Duration;

use crate::os::random::fraction;

/// The longest pause. Each is half as long again as the one before.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// Pauses that grow.
pub(super) struct Pause(Option<Duration>);

impl Pause {
    pub(super) fn new() -> Self {
        Self(None)
    }

    pub(super) fn next(&mut self, first: Duration) -> Duration {
        let base = self.0.map_or(first, |last| last.mul_f64(1.5)).min(LONGEST_PAUSE);
        self.0 = Some(base);
        base.mul_f64(0.9 + 0.2 * fraction())
    }
}
