//! What issuers count: signatures, and rotations of what signs.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use metrics::{Counter, Gauge, Histogram};

use crate::telemetry::registry::{By, Label as _, Registry, labels, unix_time};

labels! {
    /// What kind of SVID.
    SvidKind, "kind" {
        /// An X.509-SVID.
        X509 = "x509",
        /// A JWT-SVID.
        Jwt = "jwt",
    }
}
labels! {
    /// What is replaced before it expires.
    Rotated, "kind" {
        /// The issuer's CA and JWT key: the next one made, taken into use or dropped.
        Issuer = "issuer",
        /// X.509-SVIDs of entries; the gauge tells of the next one due.
        X509Svid = "x509_svid",
    }
}

/// The series of an issuer.
#[derive(Debug)]
pub struct IssuerMetrics {
    signing_seconds: By<SvidKind, Histogram>,
    signing_failures: By<SvidKind, Counter>,
    rotation_failures: Counter,
    /// Of the keys that sign.
    pub rotation: RotationMetrics,
}

impl IssuerMetrics {
    /// Registers them.
    pub fn new(registry: Registry<'_>) -> Self {
        Self {
            signing_seconds: registry.histograms(
                "durward_signing_duration_seconds",
                "Time to make and sign one SVID, its key included.",
            ),
            signing_failures: registry
                .counters("durward_signing_failures_total", "SVIDs that could not be signed."),
            rotation_failures: registry.counter_once_used(
                "durward_rotation_failures_total",
                "Rotations that failed, and were tried again.",
                &[(Rotated::KEY, Rotated::Issuer.text())],
            ),
            rotation: RotationMetrics::new(registry, Rotated::Issuer),
        }
    }

    /// An SVID was signed.
    pub(super) fn signed(&self, kind: SvidKind, took: Duration) {
        self.signing_seconds.with(kind, |h| h.record(took));
    }

    /// An SVID could not be signed.
    pub(super) fn signing_failed(&self, kind: SvidKind) {
        self.signing_failures.with(kind, |c| c.increment(1));
    }

    /// The next keys could not be made, or taken into use.
    pub(super) fn rotation_failed(&self) {
        self.rotation_failures.increment(1);
    }
}

/// The series of what is replaced before it expires.
#[derive(Debug)]
pub struct RotationMetrics {
    done: Counter,
    seconds_left: Gauge,
    /// Written by whoever rotates; turned into seconds that are left when metrics are read.
    due: Mutex<Option<SystemTime>>,
}

impl RotationMetrics {
    /// Registers those of `kind`.
    pub fn new(registry: Registry<'_>, kind: Rotated) -> Self {
        let labels = &[(Rotated::KEY, kind.text())];
        Self {
            done: registry.counter_once_used("durward_rotations_total", "Rotations done.", labels),
            seconds_left: registry.gauge(
                "durward_rotation_due_seconds",
                "Seconds until the next rotation; negative when overdue, NaN when none is planned.",
                labels,
            ),
            due: Mutex::default(),
        }
    }

    /// A rotation was done.
    pub fn rotated(&self) {
        self.done.increment(1);
    }

    /// The next rotation is due then; `None` when none is planned.
    pub fn set_due(&self, due: Option<SystemTime>) {
        *self.due.lock().unwrap_or_else(PoisonError::into_inner) = due;
    }

    /// Sets the gauge, before it is read, to what is left at `now`.
    pub fn refresh(&self, now: SystemTime) {
        let due = *self.due.lock().unwrap_or_else(PoisonError::into_inner);
        self.seconds_left.set(due.map_or(f64::NAN, |due| unix_time(due) - unix_time(now)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn counts_signatures_and_rotations() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let all = Metrics::default();
        let issuer = IssuerMetrics::new(all.registry());
        let svids = RotationMetrics::new(all.registry(), Rotated::X509Svid);
        issuer.signed(SvidKind::Jwt, Duration::from_micros(40));
        issuer.signing_failed(SvidKind::X509);
        issuer.rotation.rotated();
        issuer.rotation_failed();
        issuer.rotation.set_due(Some(at(1_000_060)));
        issuer.rotation.refresh(at(1_000_000));
        svids.refresh(at(1_000_000));
        let text = all.render();
        for line in [
            r#"durward_signing_duration_seconds_count{kind="jwt"} 1"#,
            r#"durward_signing_duration_seconds_count{kind="x509"} 0"#,
            r#"durward_signing_failures_total{kind="x509"} 1"#,
            r#"durward_rotation_failures_total{kind="issuer"} 1"#,
            r#"durward_rotations_total{kind="issuer"} 1"#,
            r#"durward_rotations_total{kind="x509_svid"} 0"#,
            r#"durward_rotation_due_seconds{kind="issuer"} 60"#,
            r#"durward_rotation_due_seconds{kind="x509_svid"} NaN"#,
        ] {
            assert!(text.lines().any(|got| got == line), "{line} in:\n{text}");
        }
        svids.set_due(Some(at(999_990)));
        svids.refresh(at(1_000_000));
        assert!(all.render().contains(r#"durward_rotation_due_seconds{kind="x509_svid"} -10"#), "overdue");
    }
}
