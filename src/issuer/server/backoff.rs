//! How long to wait before the next try: half as long again after each failure, and not at the same moment as the agents of all
//! other nodes.

use std::time::Duration;

/// By how much each failure puts off the next try.
const GROWTH: f64 = 1.5;
/// Which part of the time is drawn.
const JITTER: f64 = 0.1;
/// Failures beyond this put off nothing more.
const MOST_FAILURES: u32 = 64;

/// The wait after so many failures in a row: `first` where there was none, and `longest` at most, a tenth more or less. `drawn`
/// is a number in 0..1.
pub(super) fn wait(first: Duration, failures: u32, longest: Duration, drawn: f64) -> Duration {
    let exponent = i32::try_from(failures.min(MOST_FAILURES)).unwrap_or(0);
    let base = (first.as_secs_f64() * GROWTH.powi(exponent)).min(longest.as_secs_f64());
    Duration::from_secs_f64(base * (1.0 - JITTER + 2.0 * JITTER * drawn))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_puts_off_the_next_try_up_to_a_bound_and_a_tenth_is_drawn() {
        const SECOND: Duration = Duration::from_secs(1);
        for (case, failures, drawn, milliseconds) in [
            ("none", 0, 0.5, 1000),
            ("one", 1, 0.5, 1500),
            ("two", 2, 0.5, 2250),
            ("the least that is drawn", 2, 0.0, 2025),
            ("nearly the most", 2, 1.0, 2475),
            ("bounded", 10, 0.5, 30_000),
            ("bounded, the least", u32::MAX, 0.0, 27_000),
        ] {
            let waits = wait(SECOND, failures, 30 * SECOND, drawn);
            assert_eq!((waits.as_secs_f64() * 1000.0).round(), f64::from(milliseconds), "{case}");
        }
    }
}
