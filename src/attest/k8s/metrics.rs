//! What is counted of requests to the kubelet and the API server.

use metrics::{Counter, Gauge};

use super::fault::KubernetesFault;
use crate::telemetry::registry::{By, Label as _, Registry, labels};

labels! {
    /// What came of a request.
    pub(super) enum RequestResult, "result" {
        /// What was asked for.
        Answered = "ok",
        /// Nobody is there, or the connection broke.
        Unreachable = "unreachable",
        /// It did not answer in time.
        Late = "late",
        /// It is not known by its certificate.
        Untrusted = "untrusted",
        /// It does not let the agent ask.
        Refused = "refused",
        /// It answers something else.
        Unusable = "unusable",
        /// The agent could not ask.
        Internal = "internal",
    }
}

impl KubernetesFault {
    fn result(&self) -> RequestResult {
        match self {
            Self::Unreachable { .. } | Self::Broken { .. } => RequestResult::Unreachable,
            Self::Late { .. } => RequestResult::Late,
            Self::UnknownCa { .. } | Self::OtherName { .. } | Self::Tls { .. } => RequestResult::Untrusted,
            Self::Unauthenticated { .. } | Self::Forbidden { .. } => RequestResult::Refused,
            Self::Redirect { .. }
            | Self::Status { .. }
            | Self::NotJson { .. }
            | Self::Large { .. }
            | Self::Malformed { .. } => RequestResult::Unusable,
            Self::Material(_) | Self::Internal(_) => RequestResult::Internal,
        }
    }
}

/// The name of a series, and what it tells.
pub(super) struct SeriesWords {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
}

/// The series of one service.
pub(super) struct RequestSeries {
    /// A counter.
    pub(super) requests: SeriesWords,
    /// A gauge: how many things there were in the last answer.
    pub(super) counted: SeriesWords,
}

/// Counts the requests to one service.
pub(super) struct RequestMetrics {
    requests: By<RequestResult, Counter>,
    counted: Gauge,
}

impl RequestMetrics {
    pub(super) fn new(make: Registry<'_>, series: &RequestSeries) -> Self {
        let RequestSeries { requests, counted } = series;
        Self {
            requests: By::new(|result: RequestResult| {
                let labels = [(RequestResult::KEY, result.text())];
                match result {
                    RequestResult::Answered => make.counter_once_used(requests.name, requests.help, &labels),
                    _ => make.counter(requests.name, requests.help, &labels),
                }
            }),
            counted: make.gauge(counted.name, counted.help, &[]),
        }
    }

    /// Counts a request that ended, with so many things in its answer.
    pub(super) fn count(&self, said: Result<usize, &KubernetesFault>) {
        let result = said.map_or_else(KubernetesFault::result, |count| {
            self.counted.set(f64::from(u32::try_from(count).unwrap_or(u32::MAX)));
            RequestResult::Answered
        });
        self.requests.with(result, |n| n.increment(1));
    }
}
