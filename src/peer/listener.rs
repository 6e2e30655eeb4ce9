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
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::{body::Incoming, rt::Executor, server::conn::http2, service::Service};
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

use super::{
    credentials::{KeyResolver, OsUid, Peer},
    socket::Socket,
    wire::{Budget, Ending, Wire},
};
use crate::{limits::CallerKey, os::heap};

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

/// How long a connection that was told to end may take for it.
const FAREWELL: Duration = Duration::from_secs(1);

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
    /// The socket is the owner's, and the peer is another user.
    NotOwner,
}

impl Refused {
    /// Every reason.
    pub const ALL: [Self; 5] =
        [Self::CallerConnections, Self::CallerRate, Self::NodeConnections, Self::Memory, Self::NotOwner];

    /// The metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::CallerConnections => "caller_connections",
            Self::CallerRate => "caller_rate",
            Self::NodeConnections => "node_connections",
            Self::Memory => "memory",
            Self::NotOwner => "not_owner",
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
    /// Memory was short, and its caller the heaviest.
    Evicted,
    /// The agent drains.
    Drained,
    /// The agent drains, and this one did not end in time.
    Aborted,
    /// A bug of ours.
    Panicked,
}

impl Closed {
    /// Every reason.
    pub const ALL: [Self; 12] = [
        Self::ByPeer,
        Self::PeerExited,
        Self::HandshakeTimeout,
        Self::Idle,
        Self::Stalled,
        Self::KeepAlive,
        Self::Flood,
        Self::Protocol,
        Self::Evicted,
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
            Self::Evicted => "evicted",
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
    /// Whose connections end at once while it is named here: memory is short, and it has the most.
    pub evicted: watch::Receiver<Option<CallerKey>>,
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
            evicted: watch::channel(None).1,
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
        let Self { socket, settings, gate, keys, stats, mut evicted } = self;
        let (listener, place) = socket.into_parts();
        listener.set_nonblocking(true)?;
        let listener = UnixListener::from_std(listener)?;
        let http2 = settings.http2(&stats);
        let settings = Arc::new(settings);
        let (phase, phases) = watch::channel(Phase::default());
        let mut connections = JoinSet::new();
        let mut paused: Option<Instant> = None;
        let mut heap = Heap::default();
        let mut shutdown = std::pin::pin!(shutdown);

        loop {
            tokio::select! {
                () = &mut shutdown => break,
                accepted = listener.accept(), if paused.is_none() => {
                    let stream = match accepted {
                        Ok((stream, _nameless)) => stream,
                        Err(err) => {
                            stats.accept_errors.fetch_add(1, Relaxed);
                            // A peer that left before it was accepted is no reason to pause; nothing else passes by
                            // itself at once.
                            if err.kind() != io::ErrorKind::ConnectionAborted {
                                tracing::debug!(error = %err, "cannot accept");
                                paused = Some(Instant::now() + ACCEPT_PAUSE);
                            }
                            continue;
                        }
                    };
                    stats.accepted.fetch_add(1, Relaxed);
                    let peer = match Peer::from_stream(&stream, &*keys) {
                        Ok(peer) => Arc::new(peer),
                        Err(err) => {
                            stats.unidentified.fetch_add(1, Relaxed);
                            tracing::debug!(error = %err, "closed a connection");
                            if err.out_of_descriptors() {
                                stats.accept_errors.fetch_add(1, Relaxed);
                                paused = Some(Instant::now() + ACCEPT_PAUSE);
                            }
                            continue;
                        }
                    };
                    let permit = match gate.admit_connection(&peer) {
                        Ok(permit) => permit,
                        Err(why) => {
                            stats.count_refused(why);
                            continue;
                        }
                    };
                    let connection = Connection {
                        peer: Arc::clone(&peer),
                        settings: Arc::clone(&settings),
                        phases: phases.clone(),
                        open: Open::new(Arc::clone(&stats)),
                        permit,
                    };
                    connections.spawn(connection.run(stream, http2.clone(), services(peer)));
                    heap.grew_to(connections.len());
                }
                Some(ended) = connections.join_next() => {
                    note_panic(ended);
                    heap.fell_to(connections.len());
                }
                // An error means that nobody is left who would name one.
                Ok(()) = evicted.changed() => {
                    let caller = *evicted.borrow_and_update();
                    phase.send_modify(|phase| phase.evicted = caller);
                }
                () = at(paused) => paused = None,
                () = at(heap.due) => heap.trim(connections.len()),
            }
        }

        // No new connection, and room for the next agent, before the wait for the old ones.
        drop(listener);
        drop(place);
        let open = connections.len();
        phase.send_modify(|phase| phase.draining = true);
        let over = Instant::now() + settings.drain_timeout;
        let mut ended = 0;
        while !connections.is_empty() {
            tokio::select! {
                Some(one) = connections.join_next() => {
                    note_panic(one);
                    ended += 1;
                }
                () = sleep_until(over) => break,
            }
        }
        let cut = connections.len();
        connections.shutdown().await;
        tracing::debug!(open, ended, cut, "drained");
        Ok(Drained { ended, cut })
    }
}

/// A panic of a connection's own task; it is counted where the task unwinds.
fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(err) = ended
        && err.is_panic()
    {
        tracing::error!(error = %err, "a connection's task panicked");
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// When to give memory back: a second after connections fell below where they stood since the last time.
#[derive(Debug, Default)]
struct Heap {
    highest: usize,
    due: Option<Instant>,
}

impl Heap {
    fn grew_to(&mut self, connections: usize) {
        self.highest = self.highest.max(connections);
    }

    fn fell_to(&mut self, connections: usize) {
        if connections < self.highest && self.due.is_none() {
            self.due = Some(Instant::now() + TRIM_AFTER);
        }
    }

    fn trim(&mut self, connections: usize) {
        heap::trim();
        self.highest = connections;
        self.due = None;
    }
}

impl Settings {
    fn http2(&self, stats: &Arc<Stats>) -> http2::Builder<Spawner> {
        let mut http2 = http2::Builder::new(Spawner { stats: Arc::clone(stats) });
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(self.max_concurrent_streams)
            .initial_stream_window_size(self.initial_stream_window)
            .initial_connection_window_size(self.initial_connection_window)
            .max_frame_size(self.max_frame_size)
            .max_header_list_size(self.max_header_list_size)
            .max_send_buf_size(self.max_send_buffer)
            .header_table_size(self.header_table_size)
            .max_local_error_reset_streams(self.max_local_error_resets)
            .max_pending_accept_reset_streams(self.max_pending_resets)
            .keep_alive_interval(self.keep_alive_interval)
            .keep_alive_timeout(self.keep_alive_timeout)
            .auto_date_header(false);
        http2
    }
}

/// What all connections are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Phase {
    draining: bool,
    /// The connections of this caller end at once.
    evicted: Option<CallerKey>,
}

impl Phase {
    /// Why a connection of `caller` has to end, if it has to.
    fn ends(&self, caller: CallerKey) -> Option<Closed> {
        if self.evicted == Some(caller) {
            Some(Closed::Evicted)
        } else {
            self.draining.then_some(Closed::Drained)
        }
    }
}

/// What the task of a connection holds beside its stream.
struct Connection<P> {
    peer: Arc<Peer>,
    settings: Arc<Settings>,
    phases: watch::Receiver<Phase>,
    open: Open,
    permit: P,
}

/// Counts a connection as open, and why it ended: by default that its task was cut.
struct Open {
    stats: Arc<Stats>,
    why: Closed,
}

impl Open {
    fn new(stats: Arc<Stats>) -> Self {
        stats.open.fetch_add(1, Relaxed);
        Self { stats, why: Closed::Aborted }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.stats.open.fetch_sub(1, Relaxed);
        self.stats.count_closed(if std::thread::panicking() { Closed::Panicked } else { self.why });
    }
}

/// Counts a connection as parked.
struct Parked<'a>(&'a Stats);

impl<'a> Parked<'a> {
    fn new(stats: &'a Stats) -> Self {
        stats.parked.fetch_add(1, Relaxed);
        Self(stats)
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.parked.fetch_sub(1, Relaxed);
    }
}

impl<P: Send> Connection<P> {
    async fn run<S>(mut self, stream: UnixStream, http2: http2::Builder<Spawner>, service: S)
    where
        S: Service<http::Request<Incoming>, Response = http::Response<tonic::body::Body>, Error = Infallible>
            + Send
            + 'static,
        S::Future: Unpin + Send + 'static,
    {
        let handshake_by = Instant::now() + self.settings.handshake_timeout;
        self.open.why = match self.park(&stream, handshake_by).await {
            // Boxed only now: a parked connection must not carry the room for HTTP/2 in its task.
            Ok(()) => Box::pin(self.serve(stream, handshake_by, http2, service)).await,
            Err(why) => why,
        };
        drop(self.permit);
    }

    /// Waits for the first byte, and leaves it where it is.
    async fn park(&mut self, stream: &UnixStream, by: Instant) -> Result<(), Closed> {
        // Most clients have sent their first bytes by now: neither a timer nor a place in epoll is used then.
        match first_byte(stream) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            first => return first.map_err(|_closed| Closed::ByPeer),
        }
        let _parked = Parked::new(&self.open.stats);
        let caller = self.peer.caller();
        let arrives = async {
            loop {
                stream.readable().await?;
                // `readable` alone is true once right after accept, without a byte.
                match stream.try_io(Interest::READABLE, || first_byte(stream)) {
                    Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                    first => return first,
                }
            }
        };
        tokio::select! {
            first = arrives => first.map_err(|_closed: io::Error| Closed::ByPeer),
            () = sleep_until(by) => Err(Closed::HandshakeTimeout),
            why = told(&mut self.phases, caller) => Err(why),
        }
    }

    async fn serve<S>(
        &mut self,
        stream: UnixStream,
        handshake_by: Instant,
        http2: http2::Builder<Spawner>,
        service: S,
    ) -> Closed
    where
        S: Service<http::Request<Incoming>, Response = http::Response<tonic::body::Body>, Error = Infallible>
            + Send
            + 'static,
        S::Future: Unpin + Send + 'static,
    {
        let Self { peer, settings, phases, .. } = self;
        let caller = peer.caller();
        // Bounds what the kernel keeps for a peer that does not read. Without it only that bound is lost.
        if let Err(errno) = setsockopt(&stream, sockopt::SndBuf, &settings.send_buffer) {
            tracing::debug!(error = %errno, "cannot set SO_SNDBUF");
        }
        let ending = Arc::new(Ending::default());
        let turns = Arc::new(Turns::default());
        let wire = Wire::new(stream, settings.budget, Arc::clone(&ending));
        let service = Watched { service, peer: Arc::clone(peer), turns: Arc::clone(&turns) };
        let mut http2 = std::pin::pin!(http2.serve_connection(TokioIo::new(wire), service));

        let born = Instant::now();
        let mut look = std::pin::pin!(sleep_until((born + WATCH_AFTER).min(handshake_by)));
        let mut watched = false;
        // Once told to end: why, and when it is cut here. A drain cuts what is left by itself.
        let mut ends: Option<(Closed, Option<Instant>)> = None;
        loop {
            tokio::select! {
                biased;
                done = http2.as_mut() => {
                    return match (done, ends) {
                        _ if ending.flooded() => Closed::Flood,
                        // Told to end, and it did; that the peer then closed its side first is the same.
                        (Ok(()), Some((why, _))) => why,
                        (Err(_), Some((why, _))) if ending.by_peer() => why,
                        (Ok(()), None) => Closed::ByPeer,
                        (Err(err), _) if err.is_timeout() => Closed::KeepAlive,
                        (Err(_), _) if ending.by_peer() => Closed::ByPeer,
                        (Err(_), _) => Closed::Protocol,
                    };
                }
                why = told(phases, caller), if !matches!(ends, Some((Closed::Drained, _))) => {
                    if why == Closed::Evicted {
                        return why;
                    }
                    http2.as_mut().graceful_shutdown();
                    ends = Some((why, None));
                }
                () = peer.exited(), if watched => return Closed::PeerExited,
                () = look.as_mut() => {
                    let now = Instant::now();
                    watched = true;
                    if let Some((why, Some(by))) = ends && now >= by {
                        return why;
                    }
                    let tell = match turns.look() {
                        Look::NoRequestYet if now >= handshake_by => Some(Closed::HandshakeTimeout),
                        Look::Busy { since } if now >= since + settings.stall_timeout => return Closed::Stalled,
                        Look::Idle { since } => {
                            settings.idle_timeout.filter(|idle| now >= since + *idle).map(|_| Closed::Idle)
                        }
                        Look::NoRequestYet | Look::Busy { .. } | Look::Open => None,
                    };
                    if let (Some(why), None) = (tell, ends) {
                        // A GOAWAY, so that a client that is about to call opens another connection and repeats.
                        http2.as_mut().graceful_shutdown();
                        ends = Some((why, Some(now + FAREWELL)));
                    }
                    let mut next = now + TICK;
                    if let Look::NoRequestYet = turns.look() && handshake_by > now {
                        next = next.min(handshake_by);
                    }
                    if let Look::Idle { since } = turns.look() && let Some(idle) = settings.idle_timeout {
                        next = next.min((since + idle).max(now + WATCH_AFTER));
                    }
                    if let Some((_, Some(by))) = ends {
                        next = next.min(by);
                    }
                    look.as_mut().reset(next);
                }
            }
        }
    }
}

/// Waits until connections of `caller` are told to end, and says why.
async fn told(phases: &mut watch::Receiver<Phase>, caller: CallerKey) -> Closed {
    match phases.wait_for(|phase| phase.ends(caller).is_some()).await {
        Ok(phase) => phase.ends(caller).unwrap_or(Closed::Drained),
        // The listener is gone.
        Err(_) => Closed::Drained,
    }
}

/// Whether a byte is there; it stays. `Err` of kind `WouldBlock` when not yet, `UnexpectedEof` when never.
fn first_byte(stream: &UnixStream) -> io::Result<()> {
    match recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(_) => Ok(()),
        Err(Errno::EINTR) => Err(io::ErrorKind::WouldBlock.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Runs the streams of all connections. They end when their connection does: h2 then tells each that it was reset.
#[derive(Clone, Debug)]
struct Spawner {
    stats: Arc<Stats>,
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Spawner {
    fn execute(&self, stream: F) {
        let counted = Stream::new(Arc::clone(&self.stats));
        tokio::spawn(async move {
            stream.await;
            drop(counted);
        });
    }
}

/// Counts a stream as open, and a panic in it.
struct Stream {
    stats: Arc<Stats>,
}

impl Stream {
    fn new(stats: Arc<Stats>) -> Self {
        stats.streams.fetch_add(1, Relaxed);
        Self { stats }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stats.streams.fetch_sub(1, Relaxed);
        if std::thread::panicking() {
            self.stats.request_panics.fetch_add(1, Relaxed);
        }
    }
}

/// Whose turn it is in each request of a connection: the server's, to answer; the peer's, to read; or nobody's, in
/// a stream that waits for news. Written by the tasks of the streams, read by that of the connection.
#[derive(Debug, Default)]
struct Turns {
    inner: Mutex<TurnsInner>,
}

#[derive(Debug, Default)]
struct TurnsInner {
    /// Bounded by [`Settings::max_concurrent_streams`] and what h2 has reset but not forgotten.
    slots: Vec<Slot>,
    open: usize,
    last_ended: Option<Instant>,
}

/// One request: free once its answer has ended and every part of it has left for the kernel.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Its answer has not ended.
    open: bool,
    /// The answer has nothing to send for now: a stream that waits for news.
    rests: bool,
    /// Parts of the answer that hyper or h2 holds, because the peer has no room for them.
    parts: usize,
    /// When it last came a step on.
    moved: Instant,
}

impl Slot {
    fn is_free(self) -> bool {
        !self.open && self.parts == 0
    }

    /// Since when it waits, for the server or for the peer.
    fn waits_since(self) -> Option<Instant> {
        (self.parts > 0 || self.open && !self.rests).then_some(self.moved)
    }
}

/// What the connection's task wants to know.
#[derive(Clone, Copy, Debug)]
enum Look {
    NoRequestYet,
    /// Something waits since then.
    Busy {
        since: Instant,
    },
    /// Streams are open, and none waits.
    Open,
    Idle {
        since: Instant,
    },
}

impl Turns {
    fn with<R>(&self, f: impl FnOnce(&mut TurnsInner) -> R) -> R {
        f(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn look(&self) -> Look {
        self.with(|turns| {
            let waits_since = turns.slots.iter().filter_map(|slot| slot.waits_since()).min();
            match (waits_since, turns.open, turns.last_ended) {
                (Some(since), ..) => Look::Busy { since },
                (None, 1.., _) => Look::Open,
                (None, 0, Some(since)) => Look::Idle { since },
                (None, 0, None) => Look::NoRequestYet,
            }
        })
    }
}

/// The place of one request in [`Turns`], held by whoever makes its answer.
#[derive(Debug)]
struct Turn {
    turns: Arc<Turns>,
    slot: usize,
}

impl Turn {
    fn begin(turns: &Arc<Turns>) -> Self {
        let new = Slot { open: true, rests: false, parts: 0, moved: Instant::now() };
        let slot = turns.with(|turns| {
            turns.open += 1;
            if let Some((free, slot)) = turns.slots.iter_mut().enumerate().find(|(_, slot)| slot.is_free()) {
                *slot = new;
                free
            } else {
                turns.slots.push(new);
                turns.slots.len() - 1
            }
        });
        Self { turns: Arc::clone(turns), slot }
    }

    /// The answer has nothing to send now.
    fn rests(&self) {
        self.turns.update(self.slot, |slot| slot.rests = true);
    }

    /// A part of the answer is handed to hyper.
    fn part(&self, bytes: Bytes) -> Part {
        let now = Instant::now();
        self.turns.update(self.slot, |slot| {
            slot.parts += 1;
            slot.rests = false;
            slot.moved = now;
        });
        Part { bytes, turns: Arc::clone(&self.turns), slot: self.slot }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.update(self.slot, |slot| slot.open = false);
    }
}

impl Turns {
    /// Changes a slot that is in use.
    fn update(&self, at: usize, change: impl FnOnce(&mut Slot)) {
        self.with(|turns| {
            if let Some(slot) = turns.slots.get_mut(at) {
                change(slot);
                if slot.is_free() {
                    turns.open -= 1;
                    turns.last_ended = Some(Instant::now());
                }
            }
        });
    }
}

/// Bytes of an answer. h2 drops them when the kernel has taken the last of them, or when their stream is gone: the
/// only sign there is that a peer without a window has not pinned them.
struct Part {
    bytes: Bytes,
    turns: Arc<Turns>,
    slot: usize,
}

impl Drop for Part {
    fn drop(&mut self) {
        let now = Instant::now();
        self.turns.update(self.slot, |slot| {
            slot.parts -= 1;
            slot.moved = now;
        });
    }
}

impl Buf for Part {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, n: usize) {
        self.bytes.advance(n);
    }
}

/// The service of a connection: gives each request its peer, and keeps its [`Turn`].
struct Watched<S> {
    service: S,
    peer: Arc<Peer>,
    turns: Arc<Turns>,
}

impl<S> Service<http::Request<Incoming>> for Watched<S>
where
    S: Service<http::Request<Incoming>, Response = http::Response<tonic::body::Body>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = http::Response<Answer>;
    type Error = Infallible;
    type Future = Answering<S::Future>;

    fn call(&self, mut request: http::Request<Incoming>) -> Self::Future {
        request.extensions_mut().insert(Arc::clone(&self.peer));
        let turn = Turn::begin(&self.turns);
        Answering { answer: self.service.call(request), turn: Some(turn) }
    }
}

struct Answering<F> {
    answer: F,
    turn: Option<Turn>,
}

impl<F> Future for Answering<F>
where
    F: Future<Output = Result<http::Response<tonic::body::Body>, Infallible>> + Unpin,
{
    type Output = Result<http::Response<Answer>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        let Ok(response) = ready!(Pin::new(&mut this.answer).poll(cx));
        // Nothing more comes after the answer.
        let Some(turn) = this.turn.take() else { return Poll::Pending };
        Poll::Ready(Ok(response.map(|body| Answer { body, turn })))
    }
}

/// The body of an answer: it is the peer's turn while a part of it is on its way, and nobody's when it has none yet.
struct Answer {
    body: tonic::body::Body,
    turn: Turn,
}

impl HttpBody for Answer {
    type Data = Part;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Part>, tonic::Status>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.body).poll_frame(cx) {
            Poll::Ready(frame) => {
                Poll::Ready(frame.map(|frame| Ok(frame?.map_data(|bytes| this.turn.part(bytes)))))
            }
            Poll::Pending => {
                this.turn.rests();
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
