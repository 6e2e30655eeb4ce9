//! What a listener counts, and the guards that count what is open.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{end::ConnectionEnd, pins::EndedConnections, sent_frames::Http2Error};
use crate::{limits::ConnectionRefusal, telemetry::registry::By};

/// What a listener has counted. Read at any time, from any thread.
#[derive(Debug, Default)]
pub struct ConnectionStats {
    /// Those that have ended, of which it is found out what the kernel keeps.
    pub ended: Arc<EndedConnections>,
    accepted: AtomicU64,
    open: AtomicU64,
    parked: AtomicU64,
    streams: AtomicU64,
    accept_errors: AtomicU64,
    accepts_paused: AtomicU64,
    request_panics: AtomicU64,
    full: AtomicU64,
    became_full: AtomicU64,
    refused: By<ConnectionRefusal, AtomicU64>,
    closed: By<ConnectionEnd, AtomicU64>,
    errors: By<Http2Error, AtomicU64>,
}

impl ConnectionStats {
    /// Connections accepted since the start, refused ones included.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Relaxed)
    }

    /// Connections open now, parked ones included.
    pub fn open(&self) -> u64 {
        self.open.load(Relaxed)
    }

    /// Connections open now whose peer has not sent a byte.
    pub fn parked(&self) -> u64 {
        self.parked.load(Relaxed)
    }

    /// Requests and streams open now.
    pub fn streams(&self) -> u64 {
        self.streams.load(Relaxed)
    }

    /// `accept()` calls that failed, most of all for want of descriptors.
    pub fn accept_errors(&self) -> u64 {
        self.accept_errors.load(Relaxed)
    }

    /// How often nobody was accepted for a moment, as there was no room for what the kernel keeps of closed connections.
    pub fn accepts_paused(&self) -> u64 {
        self.accepts_paused.load(Relaxed)
    }

    /// Requests that ended in a panic: bugs of the agent's.
    pub fn request_panics(&self) -> u64 {
        self.request_panics.load(Relaxed)
    }

    /// Connections open now that have as many streams open as they may.
    pub fn full(&self) -> u64 {
        self.full.load(Relaxed)
    }

    /// How often a connection came to have as many.
    pub fn became_full(&self) -> u64 {
        self.became_full.load(Relaxed)
    }

    /// Connections that were refused, before any HTTP/2 state.
    pub fn refused(&self, why: ConnectionRefusal) -> u64 {
        self.refused.with(why, |n| n.load(Relaxed))
    }

    /// Connections that have ended.
    pub fn closed(&self, why: ConnectionEnd) -> u64 {
        self.closed.with(why, |n| n.load(Relaxed))
    }

    /// Streams that were reset, and connections that were given up, for an error.
    pub fn errors(&self, error: Http2Error) -> u64 {
        self.errors.with(error, |n| n.load(Relaxed))
    }

    pub(super) fn count_error(&self, error: Http2Error) {
        self.errors.with(error, |n| n.fetch_add(1, Relaxed));
    }

    pub(super) fn count_accepted(&self) {
        self.accepted.fetch_add(1, Relaxed);
    }

    pub(super) fn count_accept_error(&self) {
        self.accept_errors.fetch_add(1, Relaxed);
    }

    pub(super) fn count_accepts_paused(&self) {
        self.accepts_paused.fetch_add(1, Relaxed);
    }

    pub(super) fn count_refused(&self, why: ConnectionRefusal) {
        self.refused.with(why, |n| n.fetch_add(1, Relaxed));
    }
}

/// Counts a connection as open, and why it ended: by default that its task was cut.
pub(super) struct OpenConnection {
    pub(super) stats: Arc<ConnectionStats>,
    pub(super) why: ConnectionEnd,
    refused: Option<ConnectionRefusal>,
}

impl OpenConnection {
    pub(super) fn count(stats: &Arc<ConnectionStats>) -> Self {
        stats.open.fetch_add(1, Relaxed);
        Self { stats: Arc::clone(stats), why: ConnectionEnd::Aborted, refused: None }
    }

    /// It is refused after all, and counts as those that never were open.
    pub(super) fn refuse(mut self, why: ConnectionRefusal) {
        self.refused = Some(why);
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.stats.open.fetch_sub(1, Relaxed);
        if let Some(why) = self.refused {
            return self.stats.count_refused(why);
        }
        let why = if std::thread::panicking() { ConnectionEnd::Panicked } else { self.why };
        self.stats.closed.with(why, |n| n.fetch_add(1, Relaxed));
    }
}

/// Counts a connection as parked.
pub(super) struct Parked<'a>(&'a ConnectionStats);

impl<'a> Parked<'a> {
    pub(super) fn count(stats: &'a ConnectionStats) -> Self {
        stats.parked.fetch_add(1, Relaxed);
        Self(stats)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.parked.fetch_sub(1, Relaxed);
    }
}

/// Counts a connection as full.
#[derive(Debug)]
pub(super) struct FullConnection(Arc<ConnectionStats>);

impl FullConnection {
    pub(super) fn count(stats: &Arc<ConnectionStats>) -> Self {
        stats.full.fetch_add(1, Relaxed);
        stats.became_full.fetch_add(1, Relaxed);
        Self(Arc::clone(stats))
    }
}

impl Drop for FullConnection {
    fn drop(&mut self) {
        self.0.full.fetch_sub(1, Relaxed);
    }
}

/// Counts a request or stream as open, and a panic in it.
pub(super) struct OpenStream(Arc<ConnectionStats>);

impl OpenStream {
    pub(super) fn count(stats: &Arc<ConnectionStats>) -> Self {
        stats.streams.fetch_add(1, Relaxed);
        Self(Arc::clone(stats))
    }

    pub(super) fn has_panicked(&self) {
        self.0.request_panics.fetch_add(1, Relaxed);
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Relaxed);
    }
}
