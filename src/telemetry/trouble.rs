//! A trouble that lasts, as the log tells it: each reason once and then now and again, and that it is over.

use std::time::Duration;

use tokio::time::Instant;

/// After how long the same reason is said once more.
const SAY_AGAIN: Duration = Duration::from_secs(600);

/// How many reasons are remembered: if more than these take turns, they are said again sooner.
const MOST_REASONS: usize = 8;

/// What was said of it.
#[derive(Debug, Default)]
pub struct Trouble {
    said: Vec<(String, Instant)>,
    goes_on: bool,
}

impl Trouble {
    /// Whether this reason is to be said now; it is said then. Reasons that take turns are not said at each turn.
    pub fn is_due(&mut self, why: &str, now: Instant) -> bool {
        self.said.retain(|(_, at)| now.saturating_duration_since(*at) < SAY_AGAIN);
        if self.said.iter().any(|(said, _)| said == why) {
            return false;
        }
        if self.said.len() == MOST_REASONS {
            self.said.remove(0);
        }
        self.said.push((why.to_owned(), now));
        self.goes_on = true;
        true
    }

    /// It is over, for now. Whether that is to be said.
    pub fn ends(&mut self) -> bool {
        std::mem::take(&mut self.goes_on)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_trouble_is_said_now_and_then() {
        let (mut trouble, start) = (Trouble::default(), Instant::now());
        for (seconds, why, want) in [
            (0, "no token", true),
            (1, "no token", false),
            (2, "no server", true),
            (3, "no token", false),
            (599, "no token", false),
            (600, "no token", true),
            (601, "no server", false),
            (602, "no server", true),
        ] {
            assert_eq!(trouble.is_due(why, start + Duration::from_secs(seconds)), want, "{seconds}");
        }
        assert!(trouble.ends() && !trouble.ends());
        let now = start + Duration::from_secs(603);
        assert!(!trouble.is_due("no server", now) && !trouble.ends(), "what comes and goes is said once");
        let reasons: Vec<String> = (0..MOST_REASONS).map(|nth| nth.to_string()).collect();
        assert!(reasons.iter().all(|why| trouble.is_due(why, now)));
        assert!(trouble.is_due("no server", now), "not without a bound");
    }
}
