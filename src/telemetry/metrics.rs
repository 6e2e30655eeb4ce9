//! What operators count: every series is registered at start, and the request path only touches handles it holds.
//!
//! Names are `durward_*` in base units (seconds, bytes), counters end in `_total`. Labels come from the closed
//! enums of this file: nothing that a caller or an entry chose (SPIFFE ID, UID, PID, selector, trust domain) can
//! become one, so the number of series is fixed when the agent starts.
//!
//! There is no global recorder: the agent has one [`Metrics`] and a test has its own. The exporter keeps every
//! sample of a histogram (16 bytes) until somebody drains it, so [`Metrics::upkeep`] must run, scraped or not.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use metrics::{Counter, Gauge, Histogram, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tonic::Code;

use super::{
    process::Process,
    registry::{By, Label, Open, Registry, float_u64, labels},
};
use crate::{
    limits::{ConnectionRefusal, Method},
    os::clock::Clock,
};

/// Upper bounds in seconds. From a cached answer (tens of microseconds) to an RSA key made on a busy node.
const BUCKETS: [f64; 15] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// How often samples are drained. At 50,000 calls per second this is 0.8 MB of samples at most.
const UPKEEP: Duration = Duration::from_secs(1);

labels! {
    /// How a connection ended.
    ConnectionEnd, "reason" {
        /// The peer closed it.
        Peer = "peer",
        /// The process behind it exited.
        PeerExited = "peer_exited",
        /// No complete request came in time.
        HandshakeTimeout = "handshake_timeout",
        /// No request came for too long.
        Idle = "idle",
        /// A request or an answer made no progress.
        Stalled = "stalled",
        /// Pings were not answered.
        KeepAlive = "keep_alive",
        /// Frames without a request.
        Flood = "flood",
        /// Not HTTP/2.
        Protocol = "protocol",
        /// The agent drained.
        Drained = "drained",
        /// The agent drained, and it did not end in time.
        Aborted = "aborted",
        /// Memory was short, and its caller the heaviest.
        Evicted = "evicted",
        /// A bug of the agent's.
        Panicked = "panicked",
    }
}
labels! {
    /// How a reload ended.
    ReloadResult, "result" {
        /// The new configuration is in force.
        Ok = "ok",
        /// The old one stays.
        Error = "error",
    }
}

/// The names of gRPC's codes as grpc-go writes them, in the order of their numbers.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Every series of the agent. Shared by `Arc`; all methods are cheap and never block, but for [`Metrics::render`].
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    clock: Clock,
    process: Process,
    calls: By<Method, Box<[Counter]>>,
    call_seconds: By<Method, Histogram>,
    streams_open: By<Method, Gauge>,
    connections_open: Gauge,
    connections_parked: Gauge,
    connections_accepted: Counter,
    connections_refused: By<ConnectionRefusal, Counter>,
    connections_closed: By<ConnectionEnd, Counter>,
    requests_open: Gauge,
    accept_errors: Counter,
    panics: Counter,
    reloads: By<ReloadResult, Counter>,
    reload_ok: Gauge,
    reload_time: Gauge,
    log_lines_lost: Counter,
    ask: Mutex<Vec<Ask>>,
}

/// Sets what is counted elsewhere.
type Ask = Box<dyn Fn(&Metrics) + Send>;

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
        make.gauge(
            "durward_build_info",
            "Always 1; the label tells the version that runs.",
            &[("version", env!("CARGO_PKG_VERSION"))],
        )
        .set(1.0);
        Self {
            clock,
            process: Process::read(),
            calls: By::new(|method: Method| {
                CODES
                    .iter()
                    .map(|code| {
                        make.counter(
                            "durward_calls_total",
                            "Workload API calls that ended, by gRPC code; a stream counts when it ends.",
                            &[(Method::KEY, method.text()), ("code", code)],
                        )
                    })
                    .collect()
            }),
            call_seconds: make.histograms(
                "durward_call_duration_seconds",
                "Time from a call's arrival to its answer, or to the first message of a stream.",
            ),
            streams_open: make.gauges("durward_streams_open", "Calls that are being served now."),
            connections_open: make.gauge(
                "durward_connections_open",
                "Connections to the Workload API socket.",
                &[],
            ),
            connections_parked: make.gauge(
                "durward_connections_parked",
                "Connections that have not sent a byte yet, and hold no HTTP/2 state.",
                &[],
            ),
            connections_accepted: make.counter(
                "durward_connections_accepted_total",
                "Connections accepted, those refused later included.",
                &[],
            ),
            connections_refused: make.counters(
                "durward_connections_refused_total",
                "Connections closed at accept, before any HTTP/2 state.",
            ),
            connections_closed: make
                .counters("durward_connections_closed_total", "Connections that were served and have ended."),
            requests_open: make.gauge(
                "durward_requests_open",
                "HTTP/2 requests and streams open now, of every service on the socket.",
                &[],
            ),
            accept_errors: make.counter(
                "durward_accept_errors_total",
                "Failures of accept, for example for want of file descriptors.",
                &[],
            ),
            panics: make.counter(
                "durward_panics_total",
                "Calls that ended in a panic, each of which is a defect of the agent.",
                &[],
            ),
            reloads: make.counters("durward_reloads_total", "Reloads of the configuration."),
            reload_ok: make.gauge(
                "durward_last_reload_successful",
                "1 when the last reload was taken, or none was asked for; 0 when it was refused.",
                &[],
            ),
            reload_time: make.gauge(
                "durward_last_reload_timestamp_seconds",
                "When the configuration in force was loaded, as a Unix time.",
                &[],
            ),
            log_lines_lost: make.counter(
                "durward_log_lines_lost_total",
                "Log lines dropped because nobody took them from the agent in time.",
                &[],
            ),
            ask: Mutex::default(),
            handle: recorder.handle(),
            recorder,
        }
    }

    /// A Workload API call was answered, or a stream's first message (or its refusal) was.
    pub fn call_answered(&self, method: Method, took: Duration) {
        self.call_seconds.with(method, |h| h.record(took));
    }

    /// A Workload API call or stream ended.
    pub fn call_ended(&self, method: Method, code: Code) {
        let Ok(at) = usize::try_from(i32::from(code)) else { return };
        self.calls.with(method, |codes| {
            if let Some(counter) = codes.get(at) {
                counter.increment(1);
            }
        });
    }

    /// A call or stream is open while the answer is kept.
    pub fn stream_opened(&self, method: Method) -> Open {
        self.streams_open.with(method, Open::count)
    }

    /// What the listener has counted since the start, and has open now.
    pub fn set_connections(&self, counts: &ConnectionCounts) {
        let ConnectionCounts { accepted, open, parked, requests, accept_errors, panics, refused, closed } =
            counts;
        self.connections_accepted.absolute(*accepted);
        self.connections_open.set(float_u64(*open));
        self.connections_parked.set(float_u64(*parked));
        self.requests_open.set(float_u64(*requests));
        self.accept_errors.absolute(*accept_errors);
        self.panics.absolute(*panics);
        for (reason, count) in refused {
            self.connections_refused.with(*reason, |c| c.absolute(*count));
        }
        for (reason, count) in closed {
            self.connections_closed.with(*reason, |c| c.absolute(*count));
        }
    }

    /// The configuration was loaded at start.
    pub fn loaded(&self) {
        self.reload_ok.set(1.0);
        self.reload_time.set(unix(self.clock.now()));
    }

    /// A reload ended.
    pub fn reloaded(&self, result: ReloadResult) {
        self.reloads.with(result, |c| c.increment(1));
        match result {
            ReloadResult::Ok => self.loaded(),
            ReloadResult::Error => self.reload_ok.set(0.0),
        }
    }

    /// Log lines lost since the start.
    pub fn set_log_lines_lost(&self, total: u64) {
        self.log_lines_lost.absolute(total);
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
    pub fn before_render(&self, ask: impl Fn(&Self) + Send + 'static) {
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
            ask(self);
        }
        let mut text = self.handle.render();
        self.process.write(&mut text);
        text
    }
}

/// What [`Metrics::set_connections`] tells.
#[derive(Clone, Debug, Default)]
pub struct ConnectionCounts {
    /// Accepted since the start, refused ones included.
    pub accepted: u64,
    /// Open now.
    pub open: u64,
    /// Open now, without a byte from the peer.
    pub parked: u64,
    /// Requests and streams open now.
    pub requests: u64,
    /// Calls of `accept` that failed.
    pub accept_errors: u64,
    /// Requests that ended in a panic.
    pub panics: u64,
    /// Not taken, by reason.
    pub refused: Vec<(ConnectionRefusal, u64)>,
    /// Ended, by reason.
    pub closed: Vec<(ConnectionEnd, u64)>,
}

fn unix(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

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
        metrics.call_ended(Method::FetchJwtSvid, Code::Ok);
        metrics.call_ended(Method::FetchJwtSvid, Code::PermissionDenied);
        metrics.call_answered(Method::FetchJwtSvid, Duration::from_micros(300));
        metrics.set_connections(&ConnectionCounts {
            open: 1,
            refused: vec![(ConnectionRefusal::Unidentified, 1)],
            closed: vec![(ConnectionEnd::Flood, 2)],
            ..ConnectionCounts::default()
        });
        metrics.reloaded(ReloadResult::Error);
        let stream = metrics.stream_opened(Method::FetchX509Svid);

        let text = metrics.render();
        let got = samples(&text);
        for (series, want) in [
            (r#"durward_calls_total{method="FetchJWTSVID",code="OK"}"#, 1.0),
            (r#"durward_calls_total{method="FetchJWTSVID",code="PermissionDenied"}"#, 1.0),
            (r#"durward_calls_total{method="FetchX509SVID",code="OK"}"#, 0.0),
            (r#"durward_call_duration_seconds_bucket{method="FetchJWTSVID",le="0.00025"}"#, 0.0),
            (r#"durward_call_duration_seconds_bucket{method="FetchJWTSVID",le="0.0005"}"#, 1.0),
            (r#"durward_call_duration_seconds_count{method="FetchX509SVID"}"#, 0.0),
            (r#"durward_connections_refused_total{reason="unidentified"}"#, 1.0),
            (r#"durward_connections_closed_total{reason="flood"}"#, 2.0),
            ("durward_connections_open", 1.0),
            (r#"durward_streams_open{method="FetchX509SVID"}"#, 1.0),
            (r#"durward_reloads_total{result="error"}"#, 1.0),
            ("durward_last_reload_successful", 0.0),
        ] {
            assert_eq!(got.get(series).copied(), Some(want), "{series} in:\n{text}");
        }
        drop(stream);
        metrics.before_render(|metrics| metrics.set_log_lines_lost(3));
        let text = metrics.render();
        let got = samples(&text);
        assert_eq!(got[r#"durward_streams_open{method="FetchX509SVID"}"#], 0.0);
        assert_eq!(got["durward_log_lines_lost_total"], 3.0);
    }

    #[test]
    fn tells_of_its_process() {
        let text = Metrics::new(Clock::SYSTEM).render();
        let got = samples(&text);
        let started = got["process_start_time_seconds"];
        assert!(started > 1.6e9 && started <= unix(Clock::SYSTEM.now()) + 1.0, "started at {started}");
        assert!(got["process_resident_memory_bytes"] > 1e6);
        assert!(got["process_open_fds"] >= 3.0 && got["process_open_fds"] <= got["process_max_fds"]);
        assert!(got["process_cpu_seconds_total"] >= 0.0);
    }

    #[test]
    fn the_series_are_the_same_however_much_happens() {
        let metrics = Metrics::new(Clock::SYSTEM);
        let keys = |text: &str| samples(text).keys().map(|k| (*k).to_owned()).collect::<BTreeSet<_>>();
        let before = keys(&metrics.render());
        for method in Method::ALL {
            for code in 0..20 {
                metrics.call_ended(method, Code::from_i32(code));
            }
            metrics.call_answered(method, Duration::from_secs(1));
            drop(metrics.stream_opened(method));
        }
        assert_eq!(before, keys(&metrics.render()));
        for name in before {
            let (base, _) = name.split_once('{').unwrap_or((&name, ""));
            assert!(base.starts_with("durward_") || base.starts_with("process_"), "{name}");
        }
    }
}
