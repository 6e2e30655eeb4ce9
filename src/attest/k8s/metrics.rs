//! What is counted of requests to the kubelet.

use metrics::{Counter, Gauge};

use super::{fault::KubernetesFault, pods::PodList};
use crate::telemetry::registry::{By, Label as _, Registry, labels};

labels! {
    /// What came of a request to the kubelet.
    pub(super) enum KubeletResult, "result" {
        /// A list of pods.
        Listed = "ok",
        /// Nobody is there, or the connection broke.
        Unreachable = "unreachable",
        /// It did not answer in time.
        Late = "late",
        /// It is not known by its certificate.
        Untrusted = "untrusted",
        /// It does not let the agent ask.
        Refused = "refused",
        /// It answers something else than a list that is read.
        Unusable = "unusable",
        /// The agent could not ask.
        Internal = "internal",
    }
}

impl KubernetesFault {
    fn result(&self) -> KubeletResult {
        match self {
            Self::Unreachable { .. } | Self::Broken { .. } => KubeletResult::Unreachable,
            Self::Late { .. } => KubeletResult::Late,
            Self::UnknownCa { .. } | Self::OtherName { .. } | Self::Tls { .. } => KubeletResult::Untrusted,
            Self::Unauthenticated { .. } | Self::Forbidden { .. } => KubeletResult::Refused,
            Self::Redirect { .. }
            | Self::Status { .. }
            | Self::NotJson { .. }
            | Self::Large { .. }
            | Self::Malformed { .. } => KubeletResult::Unusable,
            Self::Material(_) | Self::Internal(_) => KubeletResult::Internal,
        }
    }
}

/// The series of the kubelet.
pub(super) struct KubeletMetrics {
    requests: By<KubeletResult, Counter>,
    pods: Gauge,
}

impl KubeletMetrics {
    pub(super) fn new(make: Registry<'_>) -> Self {
        Self {
            requests: By::new(|result: KubeletResult| {
                make.counter(
                    "durward_kubelet_requests_total",
                    "Requests to the kubelet for its pods, by what came of them.",
                    &[(KubeletResult::KEY, result.text())],
                )
            }),
            pods: make.gauge("durward_kubelet_pods", "Pods in the last list of the kubelet.", &[]),
        }
    }

    /// Counts a request that ended.
    pub(super) fn count(&self, listed: Result<&PodList, &KubernetesFault>) {
        let result = listed.map_or_else(KubernetesFault::result, |pods| {
            self.pods.set(f64::from(u32::try_from(pods.len()).unwrap_or(u32::MAX)));
            KubeletResult::Listed
        });
        self.requests.with(result, |n| n.increment(1));
    }
}
