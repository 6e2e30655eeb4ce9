//! How often a service of Kubernetes is asked. No I/O here, and the time is an argument.

use std::{
    collections::VecDeque,
    time::{Duration, Instant as StdInstant},
};

/// How often one service is asked.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestRhythm {
    /// Requests in a second, at most.
    pub(super) a_second: usize,
    /// The time between the end of a request and the next.
    pub(super) pause: Duration,
    /// The same after one that failed.
    pub(super) pause_after_fault: Duration,
}

/// When requests began and ended.
#[derive(Debug)]
pub(super) struct RequestPace {
    rhythm: RequestRhythm,
    /// The last ones, the oldest first; no more than may begin in a second.
    begun: VecDeque<StdInstant>,
    next_at: Option<StdInstant>,
}

impl RequestPace {
    pub(super) fn new(rhythm: RequestRhythm) -> Self {
        Self { rhythm, begun: VecDeque::with_capacity(rhythm.a_second), next_at: None }
    }

    /// A request begins.
    pub(super) fn begins(&mut self, now: StdInstant) {
        while self.begun.len() >= self.rhythm.a_second.max(1) {
            self.begun.pop_front();
        }
        self.begun.push_back(now);
    }

    /// It has ended, with an answer or without.
    pub(super) fn ended(&mut self, now: StdInstant, answered: bool) {
        let RequestRhythm { pause, pause_after_fault, .. } = self.rhythm;
        self.next_at = Some(now + if answered { pause } else { pause_after_fault });
    }

    /// For how long the next request may not begin yet.
    pub(super) fn next(&self, now: StdInstant) -> Option<Duration> {
        let full = self.begun.len() >= self.rhythm.a_second;
        let oldest = self.begun.front().filter(|_| full).map(|oldest| *oldest + Duration::from_secs(1));
        let pause = oldest.max(self.next_at)?.saturating_duration_since(now);
        (!pause.is_zero()).then_some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attest::k8s::{
        asker::ServiceQuestion as _, namespaces::NamespaceQuestion, view::PodsQuestion,
    };

    /// When each request begins if all take `took` and somebody always waits, in milliseconds.
    fn begun(rhythm: RequestRhythm, took: u64, times: usize, answered: bool) -> Vec<u64> {
        let start = StdInstant::now();
        let (mut pace, mut now, mut begun) = (RequestPace::new(rhythm), start, Vec::new());
        for _ in 0..times {
            now += pace.next(now).unwrap_or_default();
            assert_eq!(pace.next(now), None, "after what it said");
            pace.begins(now);
            begun.push(u64::try_from((now - start).as_millis()).unwrap());
            now += Duration::from_millis(took);
            pace.ended(now, answered);
        }
        begun
    }

    #[test]
    fn requests_to_the_kubelet_are_four_a_second_and_never_close_together() {
        for answered in [true, false] {
            let begun = |took, times| begun(PodsQuestion::RHYTHM, took, times, answered);
            assert_eq!(begun(0, 6), [0, 100, 200, 300, 1000, 1100]);
            assert_eq!(begun(50, 6), [0, 150, 300, 450, 1000, 1150]);
            assert_eq!(begun(400, 4), [0, 500, 1000, 1500]);
            assert_eq!(begun(10_000, 3), [0, 10_100, 20_200]);
        }
    }

    #[test]
    fn the_api_server_is_asked_seldom_where_it_fails() {
        let begun = |took, answered| begun(NamespaceQuestion::RHYTHM, took, 4, answered);
        assert_eq!(begun(0, true), [0, 50, 100, 150]);
        assert_eq!(begun(0, false), [0, 250, 500, 750]);
        assert_eq!(begun(100, false), [0, 350, 700, 1050]);
    }
}
