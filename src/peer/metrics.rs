//! The series of connections.

use metrics::{Counter, Gauge};

use super::{end::ConnectionEnd, sent_frames::Http2Error, stats::ConnectionStats};
use crate::{
    limits::ConnectionRefusal,
    telemetry::registry::{By, Label as _, Registry, float_u64},
};

/// The series of connections, set from what the listeners count.
pub struct ConnectionMetrics {
    open: Gauge,
    parked: Gauge,
    accepted: Counter,
    refused: By<ConnectionRefusal, Counter>,
    closed: By<ConnectionEnd, Counter>,
    errors: By<Http2Error, Counter>,
    requests: Gauge,
    accept_errors: Counter,
    accepts_paused: Counter,
    panics: Counter,
    became_full: Counter,
}

impl ConnectionMetrics {
    /// Registers every series.
    pub fn new(make: Registry<'_>) -> Self {
        Self {
            open: make.gauge("durward_connections_open", "Connections to the Workload API socket.", &[]),
            parked: make.gauge(
                "durward_connections_parked",
                "Connections that have not sent a byte yet, and hold no HTTP/2 state.",
                &[],
            ),
            accepted: make.counter(
                "durward_connections_accepted_total",
                "Connections accepted, those refused later included.",
                &[],
            ),
            refused: make.counters(
                "durward_connections_refused_total",
                "Connections that were refused, before any HTTP/2 state.",
            ),
            closed: make
                .counters("durward_connections_closed_total", "Connections that were served and have ended."),
            errors: make.counters(
                "durward_http2_errors_total",
                "Streams that were reset, and connections that were given up, with an error of HTTP/2.",
            ),
            requests: make.gauge(
                "durward_requests_open",
                "HTTP/2 requests and streams open now, of every service on the socket.",
                &[],
            ),
            accept_errors: make.counter(
                "durward_accept_errors_total",
                "Failures of accept, for example for want of file descriptors.",
                &[],
            ),
            accepts_paused: make.counter(
                "durward_accepts_paused_total",
                "How often nobody was accepted for a moment: the cgroup had no room for what the kernel keeps of closed connections.",
                &[],
            ),
            became_full: make.counter(
                "durward_connections_full_total",
                "How often a connection came to have as many streams open as it may: its client keeps further calls to itself.",
                &[],
            ),
            panics: make.counter(
                "durward_panics_total",
                "Calls that ended in a panic, each of which is a defect of the agent.",
                &[],
            ),
        }
    }

    /// Carries over what the listener of the public socket has counted; of the admin socket's connections only those
    /// that it did not take.
    pub fn set(&self, public: &ConnectionStats, admin: &ConnectionStats) {
        self.open.set(float_u64(public.open()));
        self.parked.set(float_u64(public.parked()));
        self.accepted.absolute(public.accepted());
        for why in ConnectionRefusal::VALUES {
            let count = public.refused(*why) + admin.refused(*why);
            self.refused.with(*why, |counter| counter.absolute(count));
        }
        for why in ConnectionEnd::VALUES {
            self.closed.with(*why, |counter| counter.absolute(public.closed(*why)));
        }
        for error in Http2Error::VALUES {
            self.errors.with(*error, |counter| counter.absolute(public.errors(*error)));
        }
        self.requests.set(float_u64(public.streams()));
        self.accept_errors.absolute(public.accept_errors());
        self.accepts_paused.absolute(public.accepts_paused());
        self.panics.absolute(public.request_panics());
        self.became_full.absolute(public.became_full());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        peer::stats::{OpenConnection, Parked},
        telemetry::metrics::Metrics,
    };

    #[test]
    fn carries_over_what_was_counted() {
        let metrics = Metrics::default();
        let series = ConnectionMetrics::new(metrics.registry());
        let (public, admin) = (Arc::<ConnectionStats>::default(), ConnectionStats::default());
        let open = OpenConnection::count(&public);
        let parked = Parked::count(&public);
        for _ in 0..2 {
            OpenConnection::count(&public).why = ConnectionEnd::ByPeer;
        }
        public.count_refused(ConnectionRefusal::Unidentified);
        public.count_refused(ConnectionRefusal::Memory);
        public.count_accepts_paused();
        public.count_error(Http2Error::Refused);
        admin.count_refused(ConnectionRefusal::NotOwner);
        admin.count_refused(ConnectionRefusal::AdminConnections);
        series.set(&public, &admin);
        let text = metrics.render();
        for line in [
            "durward_connections_open 1",
            "durward_connections_parked 1",
            r#"durward_connections_refused_total{reason="unidentified"} 1"#,
            r#"durward_connections_refused_total{reason="memory"} 1"#,
            r#"durward_connections_refused_total{reason="not_owner"} 1"#,
            r#"durward_connections_refused_total{reason="admin_connections"} 1"#,
            r#"durward_connections_refused_total{reason="caller_rate"} 0"#,
            r#"durward_connections_closed_total{reason="peer"} 2"#,
            r#"durward_connections_closed_total{reason="flood"} 0"#,
            r#"durward_http2_errors_total{reason="refused_stream"} 1"#,
            r#"durward_http2_errors_total{reason="protocol"} 0"#,
            "durward_accepts_paused_total 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in:\n{text}");
        }
        drop((open, parked));
    }
}
