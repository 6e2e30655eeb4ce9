//! When the log says that the processor is short, and when that it no longer is.
//!
//! Short for a moment is nobody's business, and what comes and goes is one time. That bounds the lines to two in
//! [`A_MOMENT`] and [`OVER`], whatever callers do.

use std::time::Duration;

use tokio::time::Instant;

/// How long the processor must be short before it is said.
const A_MOMENT: Duration = Duration::from_secs(1);
/// How long it must not have been short for that to be over.
const OVER: Duration = Duration::from_secs(10);

/// What is worth a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ShortTold {
    Began,
    Ended {
        /// From the first look at which it was short to the last.
        lasted: Duration,
    },
}

/// A time in which the processor is short again and again.
#[derive(Clone, Copy, Debug)]
struct ShortTime {
    since: Instant,
    last: Instant,
    told: bool,
}

/// What was seen of the processor.
#[derive(Debug, Default)]
pub(super) struct ShortProcessor(Option<ShortTime>);

impl ShortProcessor {
    /// To be told about once a second whether it is short.
    pub(super) fn look(&mut self, short: bool, now: Instant) -> Option<ShortTold> {
        if short {
            let time = self.0.get_or_insert(ShortTime { since: now, last: now, told: false });
            time.last = now;
            let begins = !time.told && now.saturating_duration_since(time.since) >= A_MOMENT;
            time.told |= begins;
            return begins.then_some(ShortTold::Began);
        }
        let time = self.0?;
        if time.told && now.saturating_duration_since(time.last) < OVER {
            return None;
        }
        self.0 = None;
        time.told.then(|| ShortTold::Ended { lasted: time.last.saturating_duration_since(time.since) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_when_it_begins_and_when_it_has_ended() {
        let (mut it, start) = (ShortProcessor::default(), Instant::now());
        let told: Vec<(u64, ShortTold)> = (0..100)
            .filter_map(|second| {
                // A moment; then short again and again, but for a few seconds between.
                let short = second == 3 || (20..60).contains(&second) && second % 9 < 4;
                Some((second, it.look(short, start + Duration::from_secs(second))?))
            })
            .collect();
        assert_eq!(
            told,
            [(21, ShortTold::Began), (67, ShortTold::Ended { lasted: Duration::from_secs(37) })]
        );
    }
}
