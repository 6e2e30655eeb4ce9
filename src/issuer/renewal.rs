//! When an SVID is renewed, a workload's and the agent's own: around half of its life, at a moment that is drawn once, when it was made.
//!
//! SPIRE draws anew at each check, which moves the moment early (`pkg/common/rotationutil`).

use std::time::{Duration, SystemTime};

use crate::os::random::fractions;

/// Draws when to renew an SVID that was made at `made_at`.
///
/// That is where its life begins here: `not_before` lies some seconds earlier, for verifiers whose clocks are slow, and
/// an SVID of a few seconds would be due as soon as it is made.
pub(crate) fn draw(
    made_at: SystemTime,
    not_after: SystemTime,
    availability_target: Option<Duration>,
) -> SystemTime {
    renew_at(made_at, not_after, availability_target, &mut fractions())
}

/// What is left of the life of an SVID beyond the target must be more than this, or the target is not kept.
const MIN_GRACE: Duration = Duration::from_secs(12 * 3600);

/// Whether an SVID is too short for its target, which then counts for nothing.
pub(crate) fn is_too_short(made_at: SystemTime, not_after: SystemTime, target: Option<Duration>) -> bool {
    let lifetime = not_after.duration_since(made_at).unwrap_or_default();
    target.is_some_and(|target| lifetime.saturating_sub(target) <= MIN_GRACE)
}

/// What is said of that.
pub(crate) const TOO_SHORT: &str = "lifetime isn't long enough to guarantee the availability_target, falling back to the default rotation strategy";

/// When to renew: at half of the lifetime, give or take a tenth of that half; earlier by `availability_target` when
/// that leaves at least 12 hours of rotation (SPIRE: `pkg/common/rotationutil/rotationutil.go`). `random` gives
/// numbers in 0..1.
fn renew_at(
    made_at: SystemTime,
    not_after: SystemTime,
    availability_target: Option<Duration>,
    random: &mut impl FnMut() -> f64,
) -> SystemTime {
    const MAX_JITTER: Duration = Duration::from_secs(600);
    let lifetime = not_after.duration_since(made_at).unwrap_or_default();
    let half_life = not_after - lifetime.mul_f64(0.5 * (0.9 + 0.2 * random()));
    match availability_target {
        Some(target) if !is_too_short(made_at, not_after, availability_target) => {
            let for_target = not_after - target - MAX_JITTER.mul_f64(random());
            for_target.min(half_life).max(made_at)
        }
        _ => half_life,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOUR: u64 = 3600;

    #[test]
    fn renewal_is_due_where_spire_has_it() {
        let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (case, lifetime, target, random, want) in [
            ("middle", 2 * HOUR, None, 0.5, HOUR),
            ("early edge", 2 * HOUR, None, 1.0, HOUR - HOUR / 10),
            ("late edge", 2 * HOUR, None, 0.0, HOUR + HOUR / 10),
            ("target", 48 * HOUR, Some(30 * HOUR), 0.0, 18 * HOUR),
            ("target, jitter", 48 * HOUR, Some(30 * HOUR), 0.5, 18 * HOUR - 300),
            ("half life is nearer than the target", 96 * HOUR, Some(24 * HOUR), 0.5, 48 * HOUR),
            ("too short for the target", 30 * HOUR, Some(24 * HOUR), 0.5, 15 * HOUR),
            ("exactly half", 10 * HOUR, None, 0.5, 5 * HOUR),
            ("early, of ten hours", 10 * HOUR, None, 1.0, 16_200),
            ("late, of ten hours", 10 * HOUR, None, 0.0, 19_800),
            ("half is sooner", 100 * HOUR, Some(24 * HOUR), 0.5, 50 * HOUR),
            ("ten hours beyond the target are too few", 40 * HOUR, Some(30 * HOUR), 0.5, 20 * HOUR),
            ("no lifetime", 0, None, 0.5, 0),
        ] {
            let not_after = born + Duration::from_secs(lifetime);
            let target = target.map(Duration::from_secs);
            let got = renew_at(born, not_after, target, &mut || random);
            assert_eq!(got, born + Duration::from_secs(want), "{case}");
        }
    }

    #[test]
    fn a_target_needs_twelve_hours_more() {
        for (case, hours, target, want) in [
            ("no target", 1, None, false),
            ("a minute's worth", 0, Some(24), true),
            ("shorter than the target", 12, Some(24), true),
            ("twelve hours more", 36, Some(24), true),
            ("thirteen hours more", 37, Some(24), false),
        ] {
            let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
            let target = target.map(|hours: u64| Duration::from_secs(hours * HOUR));
            assert_eq!(is_too_short(born, born + Duration::from_secs(hours * HOUR), target), want, "{case}");
        }
    }

    proptest! {
        /// Whatever is drawn, renewal lies within the validity and leaves at least 45 % of it.
        #[test]
        fn renewal_lies_within_validity(
            lifetime in 1u64..10_000_000,
            target in proptest::option::of(0u64..10_000_000),
            draws in proptest::collection::vec(0.0f64..1.0, 2),
        ) {
            let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
            let not_after = born + Duration::from_secs(lifetime);
            let mut at = 0;
            let got = renew_at(born, not_after, target.map(Duration::from_secs), &mut || { at += 1; draws[at - 1] });
            prop_assert!(got >= born);
            prop_assert!(not_after.duration_since(got).unwrap() >= Duration::from_secs(lifetime).mul_f64(0.449));
        }
    }
}
