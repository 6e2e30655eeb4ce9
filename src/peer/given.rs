//! What was given on one connection lately: to tell the first time from the others.

use std::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{AcqRel, Relaxed},
};

/// So many are remembered; one that was given before the last so many counts as given for the first time.
const REMEMBERED: usize = 8;

/// Fingerprints of what was given last.
#[derive(Debug, Default)]
pub(super) struct GivenLately {
    fingerprints: [AtomicU64; REMEMBERED],
    next: AtomicUsize,
}

impl GivenLately {
    /// Remembers one. Returns whether it was not among the last. Of two that come at once with the same, one is the first.
    pub(super) fn is_first(&self, fingerprint: u64) -> bool {
        // 0 is a place that was never used.
        let fingerprint = fingerprint.max(1);
        let is_there = || self.fingerprints.iter().any(|kept| kept.load(Relaxed) == fingerprint);
        if is_there() {
            return false;
        }
        let at = self.next.fetch_add(1, Relaxed) % REMEMBERED;
        self.fingerprints.get(at).is_none_or(|place| place.swap(fingerprint, AcqRel) != fingerprint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_remembered() {
        let given = GivenLately::default();
        let last = u64::try_from(REMEMBERED).unwrap();
        assert!((0..last).all(|fingerprint| given.is_first(fingerprint + 10)));
        assert!((0..last).all(|fingerprint| !given.is_first(fingerprint + 10)));
        assert!(given.is_first(0) && !given.is_first(0) && !given.is_first(11));
        assert!(given.is_first(10), "the oldest had to go");
    }
}
