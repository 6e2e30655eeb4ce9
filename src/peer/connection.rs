//! The life of one connection that was let in: parked until its first byte, then HTTP/2, to its end.
//!
//! A silent connection is parked without any HTTP/2 state. Not trusted: that a peer sends, reads, finishes or leaves. Every
//! wait has an end: the handshake (up to the first complete request), a request without an answer, an answer that is not
//! read, a connection without a request, a dead process, the drain. What a connection may hold is bounded by [`Settings`].

use std::{
    convert::Infallible,
    future::Future,
    io,
    os::fd::AsRawFd as _,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering::Relaxed},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::{body::Incoming, rt::Executor, server::conn::http2, service::Service};
use hyper_util::rt::TokioIo;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, setsockopt, sockopt},
};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    credentials::Peer,
    listener::{Bounds, Closed, Settings, Stats},
    wire::{Ending, Wire},
};
use crate::limits::{CallerKey, budget::UPLOADS};

/// How often a connection looks at its own clocks.
pub(super) const TICK: Duration = Duration::from_secs(10);

/// How long a connection lives before the agent watches its process: one that is opened for a single call is gone
/// by then and never pays for the watch.
const WATCH_AFTER: Duration = Duration::from_secs(1);

/// How long a connection that was told to end may take for it.
const FAREWELL: Duration = Duration::from_secs(1);

/// What all connections are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Phase {
    pub(super) draining: bool,
    /// The connections of this caller end at once.
    pub(super) evicted: Option<CallerKey>,
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
pub(super) struct Connection<P> {
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
    /// A connection that counts as open from now on.
    pub(super) fn new(
        bounds: &Bounds,
        phases: &watch::Receiver<Phase>,
        stats: &Arc<Stats>,
        peer: Arc<Peer>,
        permit: P,
    ) -> Self {
        let settings = Arc::clone(&bounds.settings);
        Self { peer, settings, phases: phases.clone(), open: Open::new(Arc::clone(stats)), permit }
    }

    /// Serves it to its end, and counts why it ended.
    pub(super) async fn run<S>(mut self, stream: UnixStream, http2: http2::Builder<Spawner>, service: S)
    where
        S: Service<
                http::Request<RequestBody>,
                Response = http::Response<tonic::body::Body>,
                Error = Infallible,
            > + Send
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
        S: Service<
                http::Request<RequestBody>,
                Response = http::Response<tonic::body::Body>,
                Error = Infallible,
            > + Send
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
                        match turns.look() {
                            Look::Idle { .. } | Look::NoRequestYet => return why,
                            // A request crossed the farewell: it is served to its end, and the connection ends with it.
                            Look::Busy { .. } | Look::Open => ends = Some((why, None)),
                        }
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
pub(super) struct Spawner {
    pub(super) stats: Arc<Stats>,
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
    /// Bytes of requests that are not complete.
    uploads: u64,
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
    S: Service<http::Request<RequestBody>, Response = http::Response<tonic::body::Body>, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = http::Response<Answer>;
    type Error = Infallible;
    type Future = Answering<S::Future>;

    fn call(&self, request: http::Request<Incoming>) -> Self::Future {
        let turns = Arc::clone(&self.turns);
        let mut request =
            request.map(|body| RequestBody { body, turns, came: 0, most: u64::MAX, counted: 0 });
        request.extensions_mut().insert(Arc::clone(&self.peer));
        let turn = Turn::begin(&self.turns);
        Answering { answer: self.service.call(request), turn: Some(turn) }
    }
}

/// The body of a request. As long as it is not complete, its bytes count against what its connection may send without ending
/// a request ([`UPLOADS`]): what is half-read is kept by somebody, and has been charged to nobody yet.
#[derive(Debug)]
pub struct RequestBody {
    body: Incoming,
    turns: Arc<Turns>,
    /// Bytes that came.
    came: u64,
    /// Bytes that may come.
    most: u64,
    /// Bytes that count for the connection.
    counted: u64,
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        let this = self.get_mut();
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
            // What came so far waits for its rest.
            return if this.count() { Poll::Pending } else { Poll::Ready(Some(Err(too_much()))) };
        };
        let Some(frame) = frame else { return Poll::Ready(None) };
        let frame = frame.map_err(|err| tonic::Status::from_error(err.into()))?;
        let more = frame.data_ref().map_or(0, Bytes::len);
        this.came = this.came.saturating_add(u64::try_from(more).unwrap_or(u64::MAX));
        if this.came > this.most {
            return Poll::Ready(Some(Err(too_much())));
        }
        if this.body.is_end_stream() {
            this.uncount();
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A client that waits until its other requests have ended finds room.
fn too_much() -> tonic::Status {
    let mut status =
        tonic::Status::resource_exhausted("too many bytes of requests that are not complete: end them first");
    status
        .metadata_mut()
        .insert("grpc-retry-pushback-ms", tonic::metadata::MetadataValue::from_static("100"));
    status
}

impl RequestBody {
    /// The same, of which no more than so many bytes may come in all: for requests without an end.
    pub fn at_most(mut self, bytes: u64) -> Self {
        self.most = bytes;
        self
    }

    /// Counts what came. Returns whether there is room for it.
    fn count(&mut self) -> bool {
        let more = self.came.saturating_sub(self.counted);
        self.counted = self.came;
        self.turns.with(|turns| {
            turns.uploads = turns.uploads.saturating_add(more);
            turns.uploads <= UPLOADS
        })
    }

    fn uncount(&mut self) {
        let counted = std::mem::take(&mut self.counted);
        if counted > 0 {
            self.turns.with(|turns| turns.uploads = turns.uploads.saturating_sub(counted));
        }
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        self.uncount();
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
