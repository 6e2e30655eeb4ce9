//! The limits' own time.

use tokio::time::Instant;

/// Counts from when the limits were made.
#[derive(Clone, Copy, Debug)]
pub(super) struct SinceStart(Instant);

impl Default for SinceStart {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl SinceStart {
    /// Nanoseconds since then.
    pub(super) fn now(self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX / 2)
    }
}
