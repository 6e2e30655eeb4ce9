//! When the agent's own SVID is renewed, and how long to wait after a failure.

use std::time::{Duration, SystemTime};

use crate::issuer::keys::random;

/// With an availability target, an SVID lives so much longer than that at least, or the target is not met.
const TARGET_MARGIN: Duration = Duration::from_secs(12 * 3600);

/// The longest pause. Each is half as long again as the one before.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// Two numbers from 0 to 1, drawn once for an SVID, so that those of a fleet are not renewed at once.
pub(super) struct Draw(f64, f64);

pub(super) fn draw() -> Draw {
    let unit = || f64::from(u32::from_ne_bytes(random().unwrap_or_default())) / f64::from(u32::MAX);
    Draw(unit(), unit())
}

/// When an SVID is renewed: at half of its life, give or take a tenth of that; or when the target is about to be missed.
pub(super) fn due(
    not_before: SystemTime,
    not_after: SystemTime,
    target: Option<Duration>,
    draw: &Draw,
) -> SystemTime {
    let life = not_after.duration_since(not_before).unwrap_or_default();
    let half = not_after - life.mul_f64((0.9 + 0.2 * draw.0) / 2.0);
    match target {
        Some(target) if life.checked_sub(target).is_some_and(|left| left > TARGET_MARGIN) => {
            half.min(not_after - (target + Duration::from_secs(600).mul_f64(draw.1)))
        }
        _ => half,
    }
}

/// Pauses that grow.
pub(super) struct Pause(Option<Duration>);

impl Pause {
    pub(super) fn new() -> Self {
        Self(None)
    }

    pub(super) fn next(&mut self, first: Duration) -> Duration {
        let base = self.0.map_or(first, |last| last.mul_f64(1.5)).min(LONGEST_PAUSE);
        self.0 = Some(base);
        base.mul_f64(0.9 + 0.2 * draw().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_at_half_of_life_or_before_the_target() {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        let epoch = SystemTime::UNIX_EPOCH;
        for (case, life, target, draw, want) in [
            ("half", 10, None, Draw(0.5, 0.5), hours(5)),
            ("early", 10, None, Draw(1.0, 0.0), Duration::from_secs(16_200)),
            ("late", 10, None, Draw(0.0, 0.0), Duration::from_secs(19_800)),
            ("target", 48, Some(hours(30)), Draw(0.5, 0.0), hours(18)),
            ("half is sooner", 100, Some(hours(24)), Draw(0.5, 0.0), hours(50)),
            ("too short for the target", 40, Some(hours(30)), Draw(0.5, 0.0), hours(20)),
        ] {
            let due = due(epoch, epoch + hours(life), target, &draw).duration_since(epoch).unwrap();
            assert!(due.abs_diff(want) < Duration::from_secs(1), "{case}: {due:?}");
        }
    }
}
