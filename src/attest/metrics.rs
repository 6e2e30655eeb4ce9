//! What is counted of attestations.

use metrics::{Counter, Histogram};

use super::{AttestError, AttestFault, AttestorName, attestors::Attestation};
use crate::telemetry::registry::{By, Label as _, Registry};

/// The series of attestation.
pub(super) struct AttestMetrics {
    seconds: By<AttestorName, Histogram>,
    failures: By<AttestorName, By<AttestFault, Counter>>,
}

impl AttestMetrics {
    pub(super) fn new(make: Registry<'_>) -> Self {
        Self {
            seconds: make
                .histograms("durward_attestation_duration_seconds", "Time to learn a peer's selectors."),
            failures: By::new(|attestor: AttestorName| {
                By::new(|reason: AttestFault| {
                    make.counter(
                        "durward_attestation_failures_total",
                        "Peers that could not be attested.",
                        &[(AttestorName::KEY, attestor.text()), (AttestFault::KEY, reason.text())],
                    )
                })
            }),
        }
    }

    /// Counts an attestation that ended. A kept result that is used once more is none.
    pub(super) fn count(&self, attested: &Result<Attestation, AttestError>) {
        match attested {
            Ok(attestation) => {
                for (attestor, took) in &attestation.took {
                    self.seconds.with(*attestor, |seconds| seconds.record(*took));
                }
            }
            Err(error) => {
                for attestor in AttestorName::VALUES.iter().filter(|attestor| error.concerns(**attestor)) {
                    self.failures.with(*attestor, |by| by.with(error.fault(), |n| n.increment(1)));
                }
            }
        }
    }
}
