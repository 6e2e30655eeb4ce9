//! What is counted of calls, and what the log says of them.
//!
//! Our faults are logged with their cause; what a caller did wrong is counted, and seen at debug only. Each kind of
//! line has its pace: a crowd of calls that fail cannot flood the log.

use std::sync::Arc;

use tokio::time::Instant;
use tonic::{Code, Response, Status};

use super::{metrics::ApiMetrics, status::RequestError};
use crate::{
    attest::{AttestError, Blame},
    limits::{Method, pace::Pace},
    telemetry::{
        chain,
        registry::{Open, Registry},
    },
};

/// Counts and logs calls.
pub struct Journal {
    metrics: ApiMetrics,
    not_attested: Pace,
    no_svid: Pace,
    no_update: Pace,
    no_peer: Pace,
    must_reconnect: Pace,
}

impl Journal {
    /// Registers the series of calls.
    pub fn new(registry: Registry<'_>) -> Self {
        Self {
            metrics: ApiMetrics::new(registry),
            not_attested: Pace::default(),
            no_svid: Pace::default(),
            no_update: Pace::default(),
            no_peer: Pace::default(),
            must_reconnect: Pace::default(),
        }
    }

    /// A call was answered as a whole.
    pub(super) fn whole<T>(
        &self,
        method: Method,
        started: Instant,
        done: Result<T, RequestError>,
    ) -> Result<Response<T>, Status> {
        if done.is_ok() {
            self.metrics.call_ended(method, Code::Ok);
        }
        self.first(method, started, done)
    }

    /// A call had its first answer. The end of a stream that was opened is counted by [`OpenCall`].
    pub(super) fn first<T>(
        &self,
        method: Method,
        started: Instant,
        done: Result<T, RequestError>,
    ) -> Result<Response<T>, Status> {
        self.metrics.call_answered(method, started.elapsed());
        done.map(Response::new).map_err(|error| {
            self.metrics.call_ended(method, error.code());
            self.refused(method, &error);
            error.into()
        })
    }

    fn refused(&self, method: Method, error: &RequestError) {
        let method = method.rpc();
        match error {
            RequestError::Attestation(cause) if cause.blame() == Blame::Fault => {
                self.not_attested.say(|left_out| {
                    tracing::warn!(method, error = chain(cause), left_out, "workload attestation failed");
                });
            }
            RequestError::JwtSvid(cause) | RequestError::X509Svid(cause) => self.no_svid.say(|left_out| {
                tracing::warn!(method, error = chain(cause), left_out, "could not make an SVID");
            }),
            RequestError::NoPeer => self.no_peer.say(|left_out| {
                tracing::error!(method, left_out, "a call came without its peer");
            }),
            RequestError::Attestation(cause @ AttestError::IdentityChanged { .. }) => {
                self.must_reconnect.say(|left_out| {
                    tracing::info!(method, error = chain(cause), left_out, "workload attestation failed");
                });
            }
            RequestError::Attestation(cause) => {
                tracing::debug!(method, error = chain(cause), "workload attestation failed");
            }
            other => tracing::debug!(method, reason = %other, "refused"),
        }
    }

    /// A call is open while the answer is kept.
    pub(super) fn opened(self: &Arc<Self>, method: Method) -> OpenCall {
        OpenCall { journal: Arc::clone(self), method, _open: self.metrics.stream_opened(method) }
    }
}

/// A stream that is open.
pub(super) struct OpenCall {
    journal: Arc<Journal>,
    method: Method,
    _open: Open,
}

impl OpenCall {
    /// Its next message cannot be made at present.
    pub(super) fn is_behind(&self, error: &RequestError) {
        const TEXT: &str = "a stream keeps what it sent; it is tried again";
        let cause = match error {
            RequestError::Attestation(cause) if cause.blame() == Blame::Crowd => {
                tracing::debug!(error = chain(cause), "{TEXT}");
                return;
            }
            RequestError::Attestation(cause) => chain(cause),
            RequestError::X509Svid(cause) => chain(cause),
            other => chain(other),
        };
        self.journal.no_update.say(|left_out| tracing::warn!(error = cause, left_out, "{TEXT}"));
    }

    /// It ends by this error, as far as the agent is concerned.
    pub(super) fn is_refused(&self, error: &RequestError) {
        self.journal.refused(self.method, error);
    }

    /// It ended with this code: [`Code::Ok`] when the client went away.
    pub(super) fn ended(&self, code: Code) {
        self.journal.metrics.call_ended(self.method, code);
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;
    use crate::{
        issuer::MintError,
        telemetry::{LogSettings, log::Log, metrics::Metrics},
    };

    #[test]
    fn a_crowd_of_calls_that_fail_is_a_few_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.log");
        let (subscriber, log) =
            Log::build(&LogSettings { file: Some(path.clone()), ..Default::default() }).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let journal = Journal::new(Metrics::default().registry());
            let late = || Err::<(), _>(RequestError::X509Svid(MintError::Late));
            for _ in 0..1000 {
                journal.whole(Method::FetchX509Svid, Instant::now(), late()).unwrap_err();
            }
            // Another kind of line has a pace of its own.
            let no_peer = Err::<(), _>(RequestError::NoPeer);
            journal.whole(Method::FetchX509Svid, Instant::now(), no_peer).unwrap_err();
            let flooded = Instant::now();
            while flooded.elapsed() < Duration::from_millis(1100) {
                std::thread::yield_now();
            }
            journal.whole(Method::FetchX509Svid, Instant::now(), late()).unwrap_err();
        });
        assert!(log.flush(Duration::from_secs(60)));
        let text = fs::read_to_string(&path).unwrap();
        let svids: Vec<&str> = text.lines().filter(|line| line.contains("could not make an SVID")).collect();
        // One more may pass for each second that this takes.
        assert!((61..100).contains(&svids.len()), "{}", svids.len());
        assert!(svids.last().unwrap().contains("left_out=9"), "{svids:#?}");
        assert!(!svids[0].contains("left_out"), "{svids:#?}");
        assert!(text.contains("a call came without its peer"));
    }
}
