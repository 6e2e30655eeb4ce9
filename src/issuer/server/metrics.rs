//! What an agent of a SPIRE Server counts: syncs, and calls to the server.

use std::time::{Duration, SystemTime};

use metrics::{Counter, Gauge, Histogram};
use tonic::Code;

use crate::telemetry::registry::{By, GRPC_CODES, Label as _, Registry, labels, unix_time};

labels! {
    /// What the server is asked.
    ServerCall, "method" {
        AttestAgent = "AttestAgent",
        RenewAgent = "RenewAgent",
        PostStatus = "PostStatus",
        GetBundle = "GetBundle",
        GetFederatedBundle = "GetFederatedBundle",
        SyncAuthorizedEntries = "SyncAuthorizedEntries",
        GetAuthorizedEntries = "GetAuthorizedEntries",
        BatchNewX509Svid = "BatchNewX509SVID",
        NewJwtSvid = "NewJWTSVID",
    }
}
labels! {
    /// How a sync ended.
    SyncResult, "result" {
        /// Everything is as the server says.
        Ok = "ok",
        /// Something could not be asked for, or made no sense.
        Error = "error",
    }
}

/// The refusals and errors that are there from the start, with 0.
const REFUSALS_AND_ERRORS: [(ServerCall, &str); 6] = [
    (ServerCall::AttestAgent, "PermissionDenied"),
    (ServerCall::AttestAgent, "Unavailable"),
    (ServerCall::SyncAuthorizedEntries, "PermissionDenied"),
    (ServerCall::SyncAuthorizedEntries, "Unavailable"),
    (ServerCall::BatchNewX509Svid, "Unavailable"),
    (ServerCall::NewJwtSvid, "Unavailable"),
];

/// The series of an agent of a SPIRE Server.
#[derive(Debug)]
pub struct ServerMetrics {
    calls: By<ServerCall, Box<[Counter]>>,
    syncs: By<SyncResult, Histogram>,
    malformed: Counter,
    sync_age: Gauge,
    svid_left: Gauge,
}

impl ServerMetrics {
    /// Registers them.
    pub fn new(registry: Registry<'_>) -> Self {
        let counter = |call: ServerCall, code| {
            let name = "durward_server_calls_total";
            let help = "Calls to the SPIRE Server, by gRPC code; one that did not reach it is Unavailable.";
            let labels = [(ServerCall::KEY, call.text()), ("code", code)];
            if REFUSALS_AND_ERRORS.contains(&(call, code)) {
                registry.counter(name, help, &labels)
            } else {
                registry.counter_once_used(name, help, &labels)
            }
        };
        let nothing_yet = |gauge: Gauge| {
            gauge.set(f64::NAN);
            gauge
        };
        Self {
            calls: By::new(|call| GRPC_CODES.iter().map(|code| counter(call, code)).collect()),
            syncs: registry.histograms(
                "durward_server_sync_duration_seconds",
                "Time that a synchronisation with the SPIRE Server took.",
            ),
            malformed: registry.counter_once_used(
                "durward_server_malformed_entries_total",
                "Entries from the SPIRE Server that are malformed and left out; each counts once for each revision.",
                &[],
            ),
            sync_age: nothing_yet(registry.gauge(
                "durward_server_sync_age_seconds",
                "Seconds since a synchronisation last passed; NaN before the first.",
                &[],
            )),
            svid_left: nothing_yet(registry.gauge(
                "durward_agent_svid_left_seconds",
                "Seconds until the agent's own SVID ends; NaN while it has none.",
                &[],
            )),
        }
    }

    /// A call ended.
    pub(super) fn called(&self, call: ServerCall, code: Code) {
        let Ok(at) = usize::try_from(i32::from(code)) else { return };
        self.calls.with(call, |codes| {
            if let Some(counter) = codes.get(at) {
                counter.increment(1);
            }
        });
    }

    /// A sync ended.
    pub(super) fn synced(&self, result: SyncResult, took: Duration) {
        self.syncs.with(result, |histogram| histogram.record(took));
    }

    /// So many entries were malformed.
    pub(super) fn malformed(&self, count: u64) {
        self.malformed.increment(count);
    }

    /// Sets what grows and shrinks with time, before it is read.
    pub(super) fn refresh(&self, now: SystemTime, synced: Option<SystemTime>, ends: Option<SystemTime>) {
        let now = unix_time(now);
        self.sync_age.set(synced.map_or(f64::NAN, |at| (now - unix_time(at)).max(0.0)));
        self.svid_left.set(ends.map_or(f64::NAN, |at| unix_time(at) - now));
    }
}
