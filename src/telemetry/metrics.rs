//! What operators count: every series is registered at start, and the request path only touches handles it holds.
//!
//! Each room registers its own. Names are `durward_*` in base units (seconds, bytes), counters end in
//! `_total`. Labels come from closed enums ([`registry`](super::registry)): nothing that a caller or an entry
//! chose (SPIFFE ID, UID, PID, selector, trust domain) can become one, so the number of series is fixed when
//! the agent starts.
//!
//! There is no global recorder: the agent has one [`Metrics`] and a test has its own. The exporter keeps every
//! sample of a histogram (16 bytes) until somebody drains it, so [`Metrics::upkeep`] must run, scraped or not.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use metrics::{Counter, Gauge, Histogram, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::{
    process::ProcessSeries,
    registry::{By, Label, Registry, float, float_u64, labels, unix_time},
};
use crate::os::clock::Clock;

/// Upper bounds in seconds. From a cached answer (tens of microseconds) to an RSA key made on a busy node.
const BUCKETS: [f64; 15] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// How often samples are drained. At 50,000 calls per second this is 0.8 MB of samples at most.
const UPKEEP: Duration = Duration::from_secs(1);

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
labels! {
    /// Who attests.
    AttestorName, "attestor" {
        /// Users, groups and executables.
        Unix = "unix",
    }
}
labels! {
    /// Why a peer could not be attested.
    AttestFault, "reason" {
        /// The process ended, or its PID is another process by now.
        Gone = "gone",
        /// The process lives in a PID namespace that this agent cannot see into.
        Namespace = "namespace",
        /// Something under `/proc` could not be read or understood.
        Unreadable = "unreadable",
        /// It took too long, or too many others were being attested.
        Busy = "busy",
    }
}
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

/// Every series of the agent. Shared by `Arc`; all methods are cheap and never block, but for [`Metrics::render`].
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    clock: Clock,
    process: ProcessSeries,
    /// Written by whoever rotates; turned into "seconds left" when rendered, so that it is never stale.
    due: Mutex<[Option<SystemTime>; 2]>,
    rotation_due: By<Rotated, Gauge>,
    rotations: By<Rotated, Counter>,
    attestation_seconds: By<AttestorName, Histogram>,
    attestation_failures: By<AttestorName, By<AttestFault, Counter>>,
    signing_seconds: By<SvidKind, Histogram>,
    signing_failures: By<SvidKind, Counter>,
    x509_svids: By<SvidState, Gauge>,
    jwt_svids: Gauge,
    jwt_cache: By<CacheResult, Counter>,
    jwt_refreshes: Counter,
    jwt_evictions: Counter,
    entries: Gauge,
    authorities: By<SvidKind, Gauge>,
    federated_bundles: Gauge,
    generation: Gauge,
    /// Each sets what is counted elsewhere.
    ask: Mutex<Vec<Box<dyn Fn() + Send>>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Registers every series. Made once per agent; tests make as many as they like.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        let recorder = PrometheusBuilder::new()
            .set_buckets(&BUCKETS)
            .expect("the list of buckets is not empty")
            .build_recorder();
        let make = Registry::new(&recorder);
        let rotation_due = make.gauges(
            "durward_rotation_due_seconds",
            "Seconds until the next rotation; negative when overdue, NaN when none is planned.",
        );
        Self {
            clock,
            process: ProcessSeries::read(),
            due: Mutex::new([None; 2]),
            rotation_due,
            rotations: make.counters("durward_rotations_total", "Rotations done."),
            attestation_seconds: make
                .histograms("durward_attestation_duration_seconds", "Time to learn a peer's selectors."),
            attestation_failures: By::new(|attestor: AttestorName| {
                By::new(|reason: AttestFault| {
                    make.counter(
                        "durward_attestation_failures_total",
                        "Peers that could not be attested.",
                        &[(AttestorName::KEY, attestor.text()), (AttestFault::KEY, reason.text())],
                    )
                })
            }),
            signing_seconds: make.histograms(
                "durward_signing_duration_seconds",
                "Time to make and sign one SVID, its key included.",
            ),
            signing_failures: make
                .counters("durward_signing_failures_total", "SVIDs that could not be signed."),
            x509_svids: make
                .gauges("durward_x509_svids", "X.509-SVIDs held, and those that open streams use."),
            jwt_svids: make.gauge("durward_jwt_svids", "JWT-SVIDs held in the cache.", &[]),
            jwt_cache: make.counters("durward_jwt_cache_requests_total", "JWT-SVIDs asked of the cache."),
            jwt_refreshes: make.counter(
                "durward_jwt_cache_refreshes_total",
                "JWT-SVIDs replaced in the background while the old one was served.",
                &[],
            ),
            jwt_evictions: make.counter(
                "durward_jwt_cache_evictions_total",
                "JWT-SVIDs dropped before their time because the cache was full.",
                &[],
            ),
            entries: make.gauge("durward_entries", "Registration entries in force.", &[]),
            authorities: make.gauges(
                "durward_bundle_authorities",
                "Authorities in the bundle of the agent's own trust domain.",
            ),
            federated_bundles: make.gauge(
                "durward_federated_bundles",
                "Bundles of other trust domains held.",
                &[],
            ),
            generation: make.gauge(
                "durward_snapshot_generation",
                "Goes up each time that entries, SVIDs or bundles change.",
                &[],
            ),
            ask: Mutex::default(),
            handle: recorder.handle(),
            recorder,
        }
    }

    /// A peer's selectors were learnt.
    pub fn attested(&self, attestor: AttestorName, took: Duration) {
        self.attestation_seconds.with(attestor, |h| h.record(took));
    }

    /// A peer could not be attested.
    pub fn attestation_failed(&self, attestor: AttestorName, reason: AttestFault) {
        self.attestation_failures.with(attestor, |by| by.with(reason, |c| c.increment(1)));
    }

    /// An SVID was signed.
    pub fn signed(&self, kind: SvidKind, took: Duration) {
        self.signing_seconds.with(kind, |h| h.record(took));
    }

    /// An SVID could not be signed.
    pub fn signing_failed(&self, kind: SvidKind) {
        self.signing_failures.with(kind, |c| c.increment(1));
    }

    /// How many X.509-SVIDs are in this state.
    pub fn set_x509_svids(&self, state: SvidState, count: usize) {
        self.x509_svids.with(state, |g| g.set(float(count)));
    }

    /// How many JWT-SVIDs the cache holds.
    pub fn set_jwt_svids(&self, count: usize) {
        self.jwt_svids.set(float(count));
    }

    /// The JWT-SVID cache was asked.
    pub fn jwt_cache(&self, result: CacheResult) {
        self.jwt_cache.with(result, |c| c.increment(1));
    }

    /// A JWT-SVID was replaced in the background.
    pub fn jwt_refreshed(&self) {
        self.jwt_refreshes.increment(1);
    }

    /// A JWT-SVID was dropped to make room.
    pub fn jwt_evicted(&self) {
        self.jwt_evictions.increment(1);
    }

    /// The next rotation of this kind is due then; `None` when none is planned.
    pub fn set_rotation_due(&self, kind: Rotated, due: Option<SystemTime>) {
        let mut all = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = all.get_mut(kind.at()) {
            *slot = due;
        }
    }

    /// A rotation was done.
    pub fn rotated(&self, kind: Rotated) {
        self.rotations.with(kind, |c| c.increment(1));
    }

    /// What the newest snapshot holds.
    pub fn set_snapshot(&self, snapshot: SnapshotSizes) {
        let SnapshotSizes { generation, entries, x509_authorities, jwt_authorities, federated_bundles } =
            snapshot;
        self.generation.set(float_u64(generation));
        self.entries.set(float(entries));
        self.authorities.with(SvidKind::X509, |g| g.set(float(x509_authorities)));
        self.authorities.with(SvidKind::Jwt, |g| g.set(float(jwt_authorities)));
        self.federated_bundles.set(float(federated_bundles));
    }

    /// Where others register series of their own.
    pub fn recorder(&self) -> &dyn Recorder {
        &self.recorder
    }

    /// Where a room registers its series.
    pub fn registry(&self) -> Registry<'_> {
        Registry::new(&self.recorder)
    }

    /// Calls `ask` before each rendering, to set what is counted elsewhere. It must not block, nor call this.
    pub fn before_render(&self, ask: impl Fn() + Send + 'static) {
        self.ask.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(ask));
    }

    /// Moves the samples of the histograms into their buckets. To be called every second; see the module's top.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// Runs [`Metrics::upkeep`] every second, for ever.
    pub async fn keep_up(&self) {
        let mut every = tokio::time::interval(UPKEEP);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            every.tick().await;
            self.upkeep();
        }
    }

    /// Everything in Prometheus' text format (version 0.0.4). Reads `/proc/self`; takes about a millisecond.
    #[must_use]
    pub fn render(&self) -> String {
        for ask in self.ask.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            ask();
        }
        let now = self.clock.now();
        let due = *self.due.lock().unwrap_or_else(PoisonError::into_inner);
        for (kind, due) in Rotated::VALUES.iter().zip(due) {
            let left = due.map_or(f64::NAN, |due| unix_time(due) - unix_time(now));
            self.rotation_due.with(*kind, |g| g.set(left));
        }
        let mut text = self.handle.render();
        self.process.write(&mut text);
        text
    }
}

/// What [`Metrics::set_snapshot`] tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct SnapshotSizes {
    /// The snapshot's generation.
    pub generation: u64,
    /// Registration entries.
    pub entries: usize,
    /// X.509 authorities of the own trust domain.
    pub x509_authorities: usize,
    /// JWT authorities of the own trust domain.
    pub jwt_authorities: usize,
    /// Bundles of other trust domains.
    pub federated_bundles: usize,
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::UNIX_EPOCH};

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// `name{labels}` -> value.
    fn samples(text: &str) -> BTreeMap<&str, f64> {
        text.lines()
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
            .map(|l| {
                let (key, value) = l.rsplit_once(' ').unwrap();
                (key, value.parse().unwrap())
            })
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn counts_what_it_is_told() {
        let metrics = Metrics::new(Clock::starting_at(at(1_000_000)));
        metrics.attested(AttestorName::Unix, Duration::from_millis(2));
        metrics.attestation_failed(AttestorName::Unix, AttestFault::Gone);
        metrics.signed(SvidKind::Jwt, Duration::from_micros(40));
        metrics.signing_failed(SvidKind::X509);
        metrics.set_x509_svids(SvidState::Active, 3);
        metrics.jwt_cache(CacheResult::Hit);
        metrics.set_rotation_due(Rotated::Issuer, Some(at(1_000_060)));
        metrics.rotated(Rotated::Issuer);
        metrics.set_snapshot(SnapshotSizes {
            generation: 7,
            entries: 2,
            x509_authorities: 1,
            ..Default::default()
        });

        let text = metrics.render();
        let got = samples(&text);
        for (series, want) in [
            (r#"durward_attestation_duration_seconds_sum{attestor="unix"}"#, 0.002),
            (r#"durward_attestation_failures_total{attestor="unix",reason="gone"}"#, 1.0),
            (r#"durward_signing_duration_seconds_count{kind="jwt"}"#, 1.0),
            (r#"durward_signing_failures_total{kind="x509"}"#, 1.0),
            (r#"durward_x509_svids{state="active"}"#, 3.0),
            (r#"durward_jwt_cache_requests_total{result="hit"}"#, 1.0),
            (r#"durward_rotation_due_seconds{kind="issuer"}"#, 60.0),
            (r#"durward_rotations_total{kind="issuer"}"#, 1.0),
            ("durward_entries", 2.0),
            ("durward_snapshot_generation", 7.0),
            (r#"durward_bundle_authorities{kind="x509"}"#, 1.0),
        ] {
            assert_eq!(got.get(series).copied(), Some(want), "{series} in:\n{text}");
        }
        assert!(got[r#"durward_rotation_due_seconds{kind="x509_svid"}"#].is_nan(), "none is planned");
        metrics.set_rotation_due(Rotated::X509Svid, Some(at(999_990)));
        let counter = metrics.registry().counter("durward_elsewhere_total", "Counted elsewhere.", &[]);
        metrics.before_render(move || counter.absolute(3));
        let text = metrics.render();
        let got = samples(&text);
        assert_eq!(got[r#"durward_rotation_due_seconds{kind="x509_svid"}"#], -10.0, "overdue");
        assert_eq!(got["durward_elsewhere_total"], 3.0);
    }

    #[test]
    fn tells_of_its_process() {
        let text = Metrics::new(Clock::SYSTEM).render();
        let got = samples(&text);
        let started = got["process_start_time_seconds"];
        assert!(started > 1.6e9 && started <= unix_time(Clock::SYSTEM.now()) + 1.0, "started at {started}");
        assert!(got["process_resident_memory_bytes"] > 1e6);
        assert!(got["process_open_fds"] >= 3.0 && got["process_open_fds"] <= got["process_max_fds"]);
        assert!(got["process_cpu_seconds_total"] >= 0.0);
    }
}
