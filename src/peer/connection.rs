//! The life of one connection that was let in: parked until its first byte, then HTTP/2, to its end.
//!
//! A silent connection is parked without any HTTP/2 state. Not trusted: that a peer sends, reads, finishes or
//! leaves. Every wait has an end: the handshake (up to the first complete request), a request without an
//! answer, an answer that is not read, a connection without a request, a dead process, the drain. What is left unread of a
//! connection that is over is the kernel's until its peer has done with it, and so is held as long. What a
//! connection may hold is bounded by [`ConnectionBounds`].

use std::{
    future::{Future as _, poll_fn},
    io,
    os::fd::{AsFd, AsRawFd as _},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv, setsockopt, sockopt},
};
use tokio::{
    io::Interest,
    net::UnixStream,
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use super::{
    accept_gate::AcceptGate,
    accepted::Accepted,
    bounds::ConnectionBounds,
    course::{Course, Verdict},
    credentials::Peer,
    end::{ConnectionEnd, Phase, drains},
    entrance::GoesIn,
    head_count::{HeadCount, Unheard},
    outbox::Outbox,
    pauses::Pauses,
    reply::{ReplyPlaces, answer_begun},
    service::{ConnectionService, WatchedService},
    stats::{OpenConnection, Parked},
    stream_places::{FullLook, StreamPlaces},
    streams::ConnectionStreams,
    task_waker::{ROUNDS, TaskWaker},
    turns::Turns,
    unread::{LeftUnread, UnreadAnswers},
    wire::{Ending, Wire, WireShared},
};
use crate::{
    limits::{
        budget::HTTP2,
        holding::{Holding, Notice},
        pace::Complaints,
        patience::FOR_ROOM,
    },
    telemetry::{chain, registry::Label as _},
};

/// How often one that begins to speak asks whether there is room for it.
pub(super) const ROOM_AGAIN: Duration = Duration::from_millis(25);

/// How often one that is over, and was told to close for its memory, asks whether its descriptor is in want.
const DESCRIPTOR_AGAIN: Duration = Duration::from_secs(1);

/// How long one that was accepted when the drain began, and has not spoken, may still begin to: who has just connected is
/// about to, and would take a close for a failure.
const LAST_WORD_WITHIN: Duration = Duration::from_millis(200);

/// What was refused on connections, by how they ended. Callers could cause it.
static REFUSED: LazyLock<Complaints<&str>> = LazyLock::new(Complaints::default);

/// What the task of a connection holds beside its stream.
pub(super) struct Connection<G> {
    pub(super) peer: Arc<Peer>,
    pub(super) bounds: Arc<ConnectionBounds>,
    pub(super) phases: watch::Receiver<Phase>,
    pub(super) open: OpenConnection,
    pub(super) holding: Arc<Holding>,
    /// When it was let in.
    pub(super) since: Instant,
    /// Until it has been served, or waits.
    pub(super) goes_in: Option<GoesIn>,
    /// Who refuses it where it finds no memory.
    pub(super) gate: Arc<G>,
    pub(super) replies: Arc<ReplyPlaces>,
    pub(super) family: u64,
}

impl<G: AcceptGate> Connection<G> {
    /// Serves it to its end, and counts why it ended. Its place at the gate goes with the stream.
    pub(super) async fn run(
        mut self,
        stream: Accepted<UnixStream, G::Permit>,
        service: impl ConnectionService,
    ) {
        let handshake_by = Instant::now() + self.bounds.handshake_timeout;
        let begins = match self.park(stream.socket(), handshake_by).await {
            Ok(()) => self.finds_room().await,
            Err(why) => Err(Unserved::Ended(why)),
        };
        match begins {
            Ok(()) => stream.place().into_iter().for_each(|place| self.gate.has_begun(place)),
            Err(Unserved::Ended(why)) => {
                self.open.why = why;
                return;
            }
            Err(Unserved::NoMemory) => {
                drop(service);
                return Box::pin(self.turn_away(stream)).await;
            }
        }
        // Boxed only now: a parked connection must not carry the room for HTTP/2 in its task.
        let (why, unread) = Box::pin(self.serve(stream, handshake_by, service)).await;
        self.open.why = why;
        if why == ConnectionEnd::Wasteful {
            tell_wasteful(&self.peer);
        }
        // It has ended, whatever is left of it.
        drop(self.open);
        tokio::select! {
            () = unread.gone() => {}
            () = drains(&mut self.phases) => {}
            () = gives_its_descriptor(&self.holding) => {}
        }
    }

    /// Takes what HTTP/2 needs; waits for it a moment where memory is about to run out. The gate let it in for what a silent
    /// connection takes, when there was room: a thousand of those may all begin to speak at once. With what those hold who leave
    /// others of them are served, as long as these are still there: of a caller above its share not all wait equally long.
    async fn finds_room(&mut self) -> Result<(), Unserved> {
        // Its turn to go came before its turn to begin: it hears why in the same way.
        if self.holding.notice().is_some() {
            self.goes_in = None;
            return Err(Unserved::NoMemory);
        }
        if self.holding.try_begin(HTTP2) {
            return Ok(());
        }
        let until = match &self.goes_in {
            // It spoke at once, and has waited where it came in.
            Some(_) => self.since + FOR_ROOM,
            None if self.holding.is_above_share() => Instant::now() + apart(FOR_ROOM),
            None => Instant::now() + FOR_ROOM,
        };
        self.goes_in = None;
        while Instant::now() < until {
            tokio::select! {
                () = sleep(ROOM_AGAIN) => {}
                () = drains(&mut self.phases) => return Err(Unserved::Ended(ConnectionEnd::Drained)),
                _told = self.holding.told(None) => return Err(Unserved::NoMemory),
            }
            if self.holding.try_begin(HTTP2) {
                return Ok(());
            }
        }
        Err(Unserved::NoMemory)
    }

    /// Refuses it after all, as the gate does: the first few are told why, and the crowd is closed.
    async fn turn_away(self, stream: Accepted<UnixStream, G::Permit>) {
        let Self { peer, gate, replies, family, open, holding, mut phases, .. } = self;
        let Some(place) = stream.place() else { return };
        let why = gate.refuse_begun(place, &peer);
        open.refuse(why);
        let told = replies
            .take(family, Instant::now())
            .and_then(|reply| Some((reply, gate.answer(peer.caller(), why)?)));
        // What it held is for others from now on.
        let stream = stream.give_up_place();
        drop((peer, holding));
        if let Some((reply, headers)) = told {
            tokio::select! {
                () = answer_begun(stream, &headers, reply) => {}
                () = drains(&mut phases) => {}
            }
        }
    }

    /// Waits for the first byte, and leaves it where it is.
    async fn park(&mut self, stream: &UnixStream, by: Instant) -> Result<(), ConnectionEnd> {
        // Most clients have sent their first bytes by now: neither a timer nor a place in epoll is used then.
        match first_byte(stream) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            first => return first.map_err(|_closed| ConnectionEnd::ByPeer),
        }
        self.goes_in = None;
        let _parked = Parked::count(&self.open.stats);
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
        let farewell = async {
            drains(&mut self.phases).await;
            sleep(LAST_WORD_WITHIN).await;
        };
        tokio::select! {
            first = arrives => first.map_err(|_closed: io::Error| ConnectionEnd::ByPeer),
            () = sleep_until(by) => Err(ConnectionEnd::HandshakeTimeout),
            () = farewell => Err(ConnectionEnd::Drained),
            notice = self.holding.told(None) => Err(gone_for(notice)),
        }
    }

    async fn serve(
        &mut self,
        stream: Accepted<UnixStream, G::Permit>,
        handshake_by: Instant,
        service: impl ConnectionService,
    ) -> (ConnectionEnd, LeftUnread<G::Permit>) {
        let Self { peer, bounds, phases, holding, open, goes_in, .. } = self;
        bound_send_buffer(&stream, bounds);
        let ending = Arc::new(Ending::default());
        ending.read_at_once();
        let turns = Arc::new(Turns::new(Arc::clone(holding)));
        let (pauses, heads) = (turns.pauses(), Arc::<HeadCount>::default());
        let places = Arc::new(StreamPlaces::new(bounds.max_concurrent_streams));
        let service = Arc::new(service);
        let shared = WireShared {
            ending: Arc::clone(&ending),
            turns: Arc::clone(&turns),
            holding: Arc::clone(holding),
            stats: Arc::clone(&open.stats),
            heads: Arc::clone(&heads),
        };
        let outbox = Arc::new(Outbox::new(stream));
        let wire = Wire::new(Arc::clone(&outbox), Arc::clone(peer), bounds.budget, shared);
        let born = Instant::now();
        let mut course = Course::new(bounds, &turns, pauses, born, handshake_by);
        let watched_service = WatchedService {
            service: Arc::clone(&service),
            peer: Arc::clone(peer),
            turns: Arc::clone(&turns),
            heads: Arc::clone(&heads),
            places: Arc::clone(&places),
        };
        let unheard = UnheardHeads { heads, service: &*service, peer, pauses };
        let mut full = FullLook::new(&places, &open.stats);
        let mut streams = ConnectionStreams::default();
        let http2 = bounds.http2(streams.executor(&open.stats));
        let mut http2 = std::pin::pin!(http2.serve_connection(TokioIo::new(wire), watched_service));
        let mut look = std::pin::pin!(sleep_until(course.next_look(born)));
        let waker = TaskWaker::new();
        let mut unread = UnreadAnswers::new(holding);
        let (mut watched, mut pause_known, mut heard) = (false, false, None);
        let why = loop {
            // Whatever the connection's own task is woken for (an answer, bytes) is seen behind it.
            let verdict = tokio::select! {
                biased;
                done = poll_fn(|cx| {
                    // Without room others wait for this one; it is new until its first request.
                    let rounds = if holding.has_room() || turns.is_new() { ROUNDS } else { 1 };
                    let done = waker.poll(cx, rounds, |cx| {
                        ending.read_on();
                        let done = http2.as_mut().poll(cx);
                        streams.run(cx);
                        done
                    });
                    unheard.tell();
                    let sent = outbox.poll_empty(cx);
                    if outbox.take_wrote() {
                        unread.look(outbox.stream());
                    }
                    if let Some(streams) = full.look(&turns) {
                        service.full(peer, streams);
                    }
                    drop(goes_in.take());
                    // Nobody is there to read.
                    let deserted = done.is_pending() && matches!(sent, Poll::Ready(Err(_)));
                    if deserted { Poll::Ready(Ok(())) } else { done }
                }) => {
                    let why = noted(&course, done, &ending, peer);
                    if why == ConnectionEnd::Protocol {
                        unheard.tell_rest(Unheard::Broken);
                    }
                    break why;
                }
                () = drains(phases), if !course.drains() && !course.is_unheard() => course.drain(Instant::now()),
                notice = holding.told(heard), if heard < Some(Notice::Close) => {
                    heard = Some(notice);
                    course.told(notice, Instant::now())
                }
                () = peer.exited(), if watched => break ConnectionEnd::PeerExited,
                () = so(|| ending.another_writer()), if !course.is_unheard() => course.unheard(Instant::now()),
                () = so(|| ending.read_short()), if !course.reads_again() => {
                    if course.read_short(Instant::now()) {
                        ending.read_again();
                    }
                    Verdict::GoesOn
                }
                () = so(|| pauses.paused()), if !pause_known => {
                    pause_known = true;
                    Verdict::GoesOn
                }
                () = look.as_mut() => {
                    let now = Instant::now();
                    unread.look(outbox.stream());
                    ending.read_again();
                    if let Some(streams) = full.look(&turns) {
                        service.full(peer, streams);
                    }
                    peer.slot().forget_old(now);
                    watched |= course.watches(now);
                    let verdict = course.look(now);
                    pause_known = pauses.paused();
                    verdict
                }
            };
            match verdict {
                Verdict::GoesOn => {}
                Verdict::SayFarewell => http2.as_mut().graceful_shutdown(),
                Verdict::SendAway => {
                    http2.as_mut().graceful_shutdown();
                    peer.send_away();
                    turns.wake_resting();
                }
                Verdict::Cut(why) => break why,
            }
            look.as_mut().reset(course.next_look(Instant::now()));
        };
        (why, LeftUnread::new(outbox, unread))
    }
}

/// Why a connection comes to no HTTP/2.
enum Unserved {
    Ended(ConnectionEnd),
    /// For all the time that one may wait for it.
    NoMemory,
}

/// Tells the service of the heads of a connection that begin no call, the last of them at its end.
struct UnheardHeads<'a, S: ConnectionService> {
    heads: Arc<HeadCount>,
    service: &'a S,
    peer: &'a Peer,
    pauses: &'a Pauses,
}

impl<S: ConnectionService> UnheardHeads<'_, S> {
    /// To be called between two polls of HTTP/2. What was done for them was done for nothing.
    fn tell(&self) {
        self.heads.tell_unheard(|why| self.tell_one(why));
    }

    /// The same at the end.
    fn tell_rest(&self, how: Unheard) {
        self.heads.tell_rest(how, |why| self.tell_one(why));
    }

    fn tell_one(&self, why: Unheard) {
        self.pauses.wasted(Instant::now());
        self.service.unheard(self.peer, why);
    }
}

impl<S: ConnectionService> Drop for UnheardHeads<'_, S> {
    fn drop(&mut self) {
        self.tell_rest(Unheard::Ended);
    }
}

/// Why it ended. What the wire refuses is its client's doing, who is told no more than that: seen at debug.
fn noted(course: &Course, done: Result<(), hyper::Error>, ending: &Ending, peer: &Peer) -> ConnectionEnd {
    let error =
        done.as_ref().err().filter(|_| tracing::enabled!(tracing::Level::DEBUG)).map(|error| chain(error));
    let why = course.ended(done, ending);
    if tracing::enabled!(tracing::Level::DEBUG)
        && matches!(why, ConnectionEnd::Protocol | ConnectionEnd::Flood | ConnectionEnd::Descriptors)
    {
        let (pid, uid, reason) = (peer.pid(), peer.uid(), why.text());
        REFUSED.say(
            peer.caller(),
            reason,
            |times| tracing::debug!(%pid, %uid, reason, error, times, "refused what came on a connection"),
        );
    }
    why
}

/// Says whose connection it was that had to go for what came to nothing.
fn tell_wasteful(peer: &Peer) {
    let (caller, pid, reason) = (peer.caller(), peer.pid(), ConnectionEnd::Wasteful.text());
    REFUSED.say(caller, reason, |times| {
        tracing::warn!(
            %caller,
            %pid,
            reason,
            times,
            "closed a connection: for ten seconds it brought more that came to nothing (refusals, mistakes, resets) than is read"
        );
    });
}

/// Waits until a connection that is over is to be closed for its descriptor. Of memory a close gives none back, and nobody would
/// know any more whose it is: one that was told for that stays, and goes when memory is there and descriptors are short.
async fn gives_its_descriptor(holding: &Holding) {
    holding.told(Some(Notice::ComeBack)).await;
    let for_memory = holding.is_above_share();
    while holding.is_above_share() || for_memory && !holding.is_short_of_descriptors() {
        sleep(DESCRIPTOR_AGAIN).await;
    }
}

/// How one ends that is told this before it is served.
fn gone_for(notice: Notice) -> ConnectionEnd {
    match notice {
        Notice::ComeBack => ConnectionEnd::SentAway,
        Notice::Close => ConnectionEnd::Evicted,
    }
}

/// Between half of so long and all of it, spread evenly over those who ask.
fn apart(longest: Duration) -> Duration {
    /// 2^32 divided by the golden ratio: its multiples fall into the widest gap each time.
    const STEP: u32 = 2_654_435_769;
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let part = f64::from(ASKED.fetch_add(STEP, Relaxed)) / f64::from(u32::MAX);
    longest.mul_f64(0.5 + part / 2.0)
}

/// Waits until it is so; to be polled when that changes.
async fn so(is_it: impl Fn() -> bool) {
    poll_fn(|_| if is_it() { Poll::Ready(()) } else { Poll::Pending }).await;
}

/// Bounds what the kernel keeps for a peer that does not read. Without it only that bound is lost.
fn bound_send_buffer(stream: &impl AsFd, bounds: &ConnectionBounds) {
    if let Err(errno) = setsockopt(stream, sockopt::SndBuf, &bounds.send_buffer) {
        tracing::debug!(error = %errno, "cannot set SO_SNDBUF");
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

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::advance;

    use super::*;
    use crate::limits::{CallerKey, Gate, room::Short};

    #[tokio::test(start_paused = true)]
    async fn one_that_is_over_goes_for_its_descriptor_and_not_for_its_memory() {
        const MIB: u64 = 1 << 20;
        let gate = Gate::of_defaults(64 * MIB);
        let one = gate.open(CallerKey::Uid(1)).unwrap();
        let mut gives = Box::pin(gives_its_descriptor(one.holding()));
        assert_eq!((&mut gives).now_or_never(), None, "nobody told it");
        one.holding().hold(60 * MIB);
        gate.look(None, 0);
        one.holding().tell(Notice::Close);
        for case in ["memory is short", "it is there, and so are descriptors"] {
            advance(10 * DESCRIPTOR_AGAIN).await;
            assert_eq!((&mut gives).now_or_never(), None, "{case}");
            if one.holding().bytes() > 50 * MIB {
                one.holding().release(50 * MIB);
                gate.look(None, 0);
            }
        }
        let others = || (2..).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok());
        let _others: Vec<_> = others().take_while(|_| !gate.room().is_short(Short::Descriptors)).collect();
        advance(2 * DESCRIPTOR_AGAIN).await;
        assert_eq!((&mut gives).now_or_never(), Some(()), "descriptors are short");

        let two = gate.open(CallerKey::Uid(1)).unwrap();
        two.holding().tell(Notice::Close);
        assert_eq!(
            gives_its_descriptor(two.holding()).now_or_never(),
            Some(()),
            "memory was there all along"
        );
    }
}
