//! What the store counts: what a snapshot holds, and what the caches of SVIDs do.

use metrics::{Counter, Gauge};

use super::{snapshot::Snapshot, x509_cache::X509Counts};
use crate::{
    issuer::metrics::{Rotated, RotationMetrics, SvidKind},
    telemetry::registry::{By, Registry, float, float_u64, labels},
};

labels! {
    /// What the JWT-SVID cache answered.
    CacheResult, "result" {
        /// From memory.
        Hit = "hit",
        /// It had to be signed.
        Miss = "miss",
    }
}
labels! {
    /// How an X.509-SVID stands in the store.
    SvidState, "state" {
        /// Ready to be served.
        Cached = "cached",
        /// Being sent to at least one open stream.
        Active = "active",
    }
}

/// The series of the store.
#[derive(Debug)]
pub struct StoreMetrics {
    x509_svids: By<SvidState, Gauge>,
    pub(super) jwt_svids: Gauge,
    jwt_cache: By<CacheResult, Counter>,
    pub(super) jwt_refreshes: Counter,
    pub(super) jwt_evictions: Counter,
    entries: Gauge,
    authorities: By<SvidKind, Gauge>,
    federated_bundles: Gauge,
    generation: Gauge,
    /// Renewals of X.509-SVIDs that open streams hold.
    pub renewal: RotationMetrics,
}

impl StoreMetrics {
    /// Registers them.
    pub fn new(registry: Registry<'_>) -> Self {
        Self {
            x509_svids: registry
                .gauges("durward_x509_svids", "X.509-SVIDs held, and those that open streams use."),
            jwt_svids: registry.gauge("durward_jwt_svids", "JWT-SVIDs held in the cache.", &[]),
            jwt_cache: registry
                .counters_once_used("durward_jwt_cache_requests_total", "JWT-SVIDs asked of the cache."),
            jwt_refreshes: registry.counter_once_used(
                "durward_jwt_cache_refreshes_total",
                "JWT-SVIDs replaced in the background while the old one was served.",
                &[],
            ),
            jwt_evictions: registry.counter_once_used(
                "durward_jwt_cache_evictions_total",
                "JWT-SVIDs dropped before their time because the cache was full.",
                &[],
            ),
            entries: registry.gauge("durward_entries", "Registration entries in force.", &[]),
            authorities: registry.gauges(
                "durward_bundle_authorities",
                "Authorities in the bundle of the agent's own trust domain.",
            ),
            federated_bundles: registry.gauge(
                "durward_federated_bundles",
                "Bundles of other trust domains held.",
                &[],
            ),
            generation: registry.gauge(
                "durward_snapshot_generation",
                "Goes up each time that entries, SVIDs or bundles change.",
                &[],
            ),
            renewal: RotationMetrics::new(registry, Rotated::X509Svid),
        }
    }

    /// The JWT-SVID cache was asked.
    pub(super) fn jwt_cache(&self, result: CacheResult) {
        self.jwt_cache.with(result, |c| c.increment(1));
    }

    /// How many X.509-SVIDs there are.
    pub(super) fn set_x509_svids(&self, counts: X509Counts) {
        self.x509_svids.with(SvidState::Cached, |g| g.set(float(counts.cached)));
        self.x509_svids.with(SvidState::Active, |g| g.set(float(counts.active)));
    }

    /// What the newest snapshot holds.
    pub(super) fn set_snapshot(&self, snapshot: &Snapshot) {
        let bundles = &snapshot.bundles;
        self.generation.set(float_u64(snapshot.generation));
        self.entries.set(float(snapshot.index.entries().len()));
        self.authorities.with(SvidKind::X509, |g| g.set(float(bundles.own.x509_authorities.len())));
        self.authorities.with(SvidKind::Jwt, |g| g.set(float(bundles.own.jwt_authorities.len())));
        self.federated_bundles.set(float(bundles.federated.len()));
    }
}
