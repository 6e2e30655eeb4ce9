//! The door: from a bound socket to connections that were let in, and to the end of the last of them.
//!
//! For each connection, in this order: credentials and caller key, the [`Gate`], and only then a hold on its process and a
//! task of its own ([`connection`](super::connection)). A refused connection has cost an `accept`, a question to the kernel and
//! a look into a table. One that its caller's own limits refuse is closed a tenth of a second later: connections wait to be
//! accepted in one queue, first come, first served, and a crowd that is turned away at once stands in it again before anybody
//! else has moved up. Waiting connections are accepted in runs, so that a crowd is through
//! before the next round of anything else, and nobody else's connection stands long behind it. Absent: what a request
//! means; limits (the gate's); TLS.
//!
//! # Decisions
//! Our own accept loop and not tonic's: that one spins at the descriptor limit, waits for ever in a drain for
//! peers that are silent, has no handshake timeout, and hides settings that bound a hostile peer.
//!
//! `malloc_trim` runs inline and not on the blocking pool: it holds the heap's locks, so a second thread would only
//! move the wait, and would cost a stack and an arena of its own. It runs at most once a second and takes 0.03 ms when
//! there is nothing to give back, 1 to 3 ms after a burst.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    io,
    os::unix::net::UnixStream as StdStream,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper::{server::conn::http2, service::Service};
use hyper_util::rt::TokioTimer;
use tokio::{
    net::UnixStream,
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    connection::{Connection, Phase, RequestBody, Spawner},
    credentials::{Arrival, CredentialsError, KeyResolver, OsUid, Peer},
    socket::Socket,
    wire::Budget,
};
use crate::{
    limits::{CallerKey, ConnectionRefusal, ConnectionSettings},
    os::{accept::Acceptor, heap},
    telemetry::registry::Label as _,
};

/// What bounds a connection: what the configuration says ([`ConnectionSettings`]), and beside it what was measured to bound a
/// hostile peer's memory without slowing an honest one.
///
/// hyper does not expose h2's `max_concurrent_reset_streams`, `reset_stream_duration` and `data_frame_budget`:
/// those keep h2's defaults (50 streams, 30 s, and its own bound on empty DATA frames).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// From accept to the first complete request. A silent peer is closed then.
    pub handshake_timeout: Duration,
    /// How long a connection without an open request stays; `None` for ever.
    pub idle_timeout: Option<Duration>,
    /// How long a request may wait for the head of its answer, or an answer for a peer that does not read. Then the
    /// connection is closed. Looked at every [`TICK`](super::connection::TICK), so it may take
    /// that much longer.
    pub stall_timeout: Duration,
    /// How long a drain waits for open requests.
    pub drain_timeout: Duration,
    /// How long a connection that its caller's own limits refuse is kept before it is closed.
    pub linger: Duration,
    /// How many of these there may be; one more, and the one that is due next is closed. Default 64.
    pub max_lingering: u32,
    /// Open requests per connection; a client queues the rest.
    pub max_concurrent_streams: u32,
    /// Bytes of one request that a peer may send before they are read. Default 16 KiB.
    pub initial_stream_window: u32,
    /// The same for a connection. Default 65,535: HTTP/2's own, which saves a WINDOW_UPDATE per connection.
    pub initial_connection_window: u32,
    /// Largest frame that a peer may send. Default 16 KiB, the smallest that HTTP/2 allows.
    pub max_frame_size: u32,
    /// Largest header list of a request, in bytes as HTTP/2 counts them.
    pub max_header_list_size: u32,
    /// Bytes of answers that wait in HTTP/2 for each stream. Default 8 KiB.
    pub max_send_buffer: usize,
    /// The peer's table of headers already sent. Default 0: it would be kept for every connection.
    pub header_table_size: u32,
    /// Streams that h2 reset for an error of the peer's before it gives up on the connection.
    pub max_local_error_resets: usize,
    /// Streams that the peer reset before they were looked at.
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
        Self::new(&ConnectionSettings::default(), Duration::from_secs(5))
    }
}

impl Settings {
    /// What the configuration says, with what it does not: those were measured, and fit each other.
    pub fn new(connection: &ConnectionSettings, drain_timeout: Duration) -> Self {
        let ConnectionSettings {
            handshake_timeout,
            idle_timeout,
            stall_timeout,
            streams,
            header_bytes,
            linger,
            resets,
        } = *connection;
        let resets = usize::try_from(resets).unwrap_or(usize::MAX);
        Self {
            handshake_timeout,
            idle_timeout,
            stall_timeout,
            drain_timeout,
            linger,
            max_lingering: 64,
            max_concurrent_streams: streams,
            initial_stream_window: 16 * 1024,
            initial_connection_window: 65_535,
            max_frame_size: 16 * 1024,
            max_header_list_size: header_bytes,
            max_send_buffer: 8 * 1024,
            header_table_size: 0,
            max_local_error_resets: resets,
            max_pending_resets: resets,
            keep_alive_interval: Duration::from_secs(30),
            keep_alive_timeout: Duration::from_secs(10),
            send_buffer: 8 * 1024,
            budget: Budget::DEFAULT,
        }
    }
}

/// The most connections that are accepted in one run, before anything else is looked at.
const RUN: usize = 64;

/// How long the accept loop pauses when there are no descriptors left, instead of spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// How long after the last connection fell memory is given back.
const TRIM_AFTER: Duration = Duration::from_secs(1);

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
    /// [`ConnectionRefusal`]: the connection is closed and counted.
    fn admit_connection(&self, arrival: &Arrival) -> Result<Self::Permit, ConnectionRefusal>;
}

/// Lets everybody in.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitAll;

impl Gate for AdmitAll {
    type Permit = ();

    fn admit_connection(&self, _arrival: &Arrival) -> Result<(), ConnectionRefusal> {
        Ok(())
    }
}

/// What the listener has counted. Read at any time, from any thread.
#[derive(Debug, Default)]
pub struct Stats {
    accepted: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) parked: AtomicU64,
    pub(super) streams: AtomicU64,
    accept_errors: AtomicU64,
    pub(super) request_panics: AtomicU64,
    refused: [AtomicU64; ConnectionRefusal::VALUES.len()],
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

    /// Requests that ended in a panic: bugs of ours.
    pub fn request_panics(&self) -> u64 {
        self.request_panics.load(Relaxed)
    }

    /// Connections that were closed at accept.
    pub fn refused(&self, why: ConnectionRefusal) -> u64 {
        self.refused.get(why.at()).map_or(0, |n| n.load(Relaxed))
    }

    /// Connections that have ended.
    pub fn closed(&self, why: Closed) -> u64 {
        Closed::ALL.iter().zip(&self.closed).find(|(w, _)| **w == why).map_or(0, |(_, n)| n.load(Relaxed))
    }

    fn count_refused(&self, why: ConnectionRefusal) {
        if let Some(n) = self.refused.get(why.at()) {
            n.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn count_closed(&self, why: Closed) {
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
    /// What bounds a connection. A change counts for those that come after it.
    pub settings: watch::Receiver<Settings>,
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
            settings: watch::channel(settings).1,
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
        S: Service<
                http::Request<RequestBody>,
                Response = http::Response<tonic::body::Body>,
                Error = Infallible,
            > + Send
            + 'static,
        S::Future: Unpin + Send + 'static,
    {
        let Self { socket, mut settings, gate, keys, stats, mut evicted } = self;
        let (listener, place) = socket.into_parts();
        let listener = Acceptor::new(listener)?;
        let mut bounds = Bounds::new(settings.borrow_and_update().clone(), &stats);
        let (phase, phases) = watch::channel(Phase::default());
        let mut connections = JoinSet::new();
        let mut paused: Option<Instant> = None;
        let mut heap = Heap::default();
        let mut lingering = Lingering::default();
        let mut shutdown = std::pin::pin!(shutdown);

        loop {
            tokio::select! {
                () = &mut shutdown => break,
                waiting = listener.ready(), if paused.is_none() => {
                    let now = Instant::now();
                    lingering.close(now);
                    let mut run = 0;
                    for accepted in waiting?.take(RUN) {
                        run += 1;
                        let taken = accepted.map_err(NotTaken::from).and_then(|stream| {
                            stats.accepted.fetch_add(1, Relaxed);
                            let arrival = Arrival::at(&stream, &*keys)?;
                            let permit = match gate.admit_connection(&arrival) {
                                Ok(permit) => permit,
                                Err(why) => {
                                    if why.is_callers_own() {
                                        lingering.keep(stream, now, &bounds.settings);
                                    }
                                    return Err(why.into());
                                }
                            };
                            let peer = arrival.let_in(&stream)?;
                            stream.set_nonblocking(true)?;
                            // Only now does the runtime hear of it.
                            Ok((UnixStream::from_std(stream)?, permit, Arc::new(peer)))
                        });
                        match taken {
                            Ok((stream, permit, peer)) => {
                                let connection =
                                    Connection::new(&bounds, &phases, &stats, Arc::clone(&peer), permit);
                                connections.spawn(connection.run(stream, bounds.http2.clone(), services(peer)));
                                heap.grew_to(connections.len());
                            }
                            Err(why) => if stats.count_not_taken(&why) {
                                paused = Some(Instant::now() + ACCEPT_PAUSE);
                                break;
                            }
                        }
                    }
                    // A socket at which somebody always waits would never let this task rest: then nothing else here ever
                    // comes about, since the runtime gives a task that does not rest no other event, nor do those tasks
                    // that share its thread. So it rests after a whole run, and now and then after others.
                    if run == RUN {
                        tokio::task::yield_now().await;
                    } else {
                        tokio::task::consume_budget().await;
                    }
                }
                Some(ended) = connections.join_next() => {
                    note_panic(ended);
                    while let Some(ended) = connections.try_join_next() {
                        note_panic(ended);
                    }
                    heap.fell_to(connections.len());
                }
                // An error means that nobody is left who would name one.
                Ok(()) = evicted.changed() => {
                    let caller = *evicted.borrow_and_update();
                    phase.send_modify(|phase| phase.evicted = caller);
                }
                Ok(()) = settings.changed() => {
                    bounds = Bounds::new(settings.borrow_and_update().clone(), &stats);
                }
                () = at(paused) => paused = None,
                () = at(lingering.due()) => lingering.close(Instant::now()),
                () = at(heap.due) => heap.trim(connections.len()),
            }
        }

        // No new connection, and room for the next agent, before the wait for the old ones.
        drop(listener);
        drop(place);
        drop(lingering);
        let open = connections.len();
        phase.send_modify(|phase| phase.draining = true);
        let over = Instant::now() + bounds.settings.drain_timeout;
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

/// Why a connection was not taken.
#[derive(Debug)]
enum NotTaken {
    /// `accept` failed.
    Accept(io::Error),
    /// The kernel did not say who is there.
    Unidentified(CredentialsError),
    /// The gate refused it.
    Refused(ConnectionRefusal),
}

impl From<io::Error> for NotTaken {
    fn from(err: io::Error) -> Self {
        Self::Accept(err)
    }
}

impl From<CredentialsError> for NotTaken {
    fn from(err: CredentialsError) -> Self {
        Self::Unidentified(err)
    }
}

impl From<ConnectionRefusal> for NotTaken {
    fn from(why: ConnectionRefusal) -> Self {
        Self::Refused(why)
    }
}

impl Stats {
    /// Counts a connection that was not taken. Returns whether to pause: more would fail in the same way.
    fn count_not_taken(&self, why: &NotTaken) -> bool {
        match why {
            NotTaken::Refused(why) => {
                self.count_refused(*why);
                false
            }
            NotTaken::Unidentified(err) => {
                self.count_refused(ConnectionRefusal::Unidentified);
                tracing::debug!(error = %err, "closed a connection");
                let out_of_descriptors = err.out_of_descriptors();
                if out_of_descriptors {
                    self.accept_errors.fetch_add(1, Relaxed);
                }
                out_of_descriptors
            }
            NotTaken::Accept(err) => {
                self.accept_errors.fetch_add(1, Relaxed);
                // A peer that left before it was accepted is no reason to pause; nothing else passes by itself at once.
                let passes = err.kind() == io::ErrorKind::ConnectionAborted;
                if !passes {
                    tracing::debug!(error = %err, "cannot accept");
                }
                !passes
            }
        }
    }
}

/// What bounds the connections that are accepted now.
pub(super) struct Bounds {
    pub(super) settings: Arc<Settings>,
    http2: http2::Builder<Spawner>,
}

impl Bounds {
    fn new(settings: Settings, stats: &Arc<Stats>) -> Self {
        Self { http2: settings.http2(stats), settings: Arc::new(settings) }
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

/// Connections that were refused, by when each is closed. Nothing is read from them, and the runtime does not know them: a
/// descriptor each, and a bounded number.
#[derive(Debug, Default)]
struct Lingering {
    /// With a number, as many may be due at one time.
    held: BTreeMap<(Instant, u32), StdStream>,
    numbered: u32,
}

impl Lingering {
    /// Keeps one for as long as the settings say, or for as long as there is room: between half of that time and one and a half,
    /// spread evenly, so that those who came together do not come back together.
    fn keep(&mut self, stream: StdStream, now: Instant, settings: &Settings) {
        /// 2^32 divided by the golden ratio: its multiples fall into the widest gap each time.
        const STEP: u32 = 2_654_435_769;
        let most = usize::try_from(settings.max_lingering).unwrap_or(usize::MAX);
        if settings.linger.is_zero() || most == 0 {
            return;
        }
        while self.held.len() >= most {
            self.held.pop_first();
        }
        self.numbered = self.numbered.wrapping_add(1);
        let part = f64::from(self.numbered.wrapping_mul(STEP)) / f64::from(u32::MAX);
        let due = now + settings.linger.mul_f64(0.5 + part);
        self.held.insert((due, self.numbered), stream);
    }

    fn due(&self) -> Option<Instant> {
        self.held.first_key_value().map(|((due, _), _)| *due)
    }

    fn close(&mut self, now: Instant) {
        while self.due().is_some_and(|due| due <= now) {
            self.held.pop_first();
        }
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
