//! The stream of a connection as HTTP/2 reads it: what arrives is of one writer, and comes by a [`Passage`].
//!
//! Bytes of another process, or of the same under another user, never reach HTTP/2. From then on nothing is read, and
//! the client is told by a GOAWAY which of its calls were heard; those are answered. An effective user alone does not show in
//! the bytes: that it is another is found by the call that comes then. What comes with a descriptor
//! ends the connection at once.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use nix::sys::socket::{MsgFlags, recv};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    time::Instant,
};

use super::{
    credentials::Peer,
    frames::FrameBudget,
    head_count::HeadCount,
    last_word::{LastWord, NextBytes},
    outbox::Outbox,
    passage::Passage,
    sent_frames::{Http2Error, Told},
    stats::ConnectionStats,
    turns::Turns,
    writer::SoleWriter,
};
use crate::{
    limits::{
        budget::HEAD,
        holding::{Holding, KeptBytes},
        pace::Complaints,
        patience::FOR_ROOM,
    },
    os::receive::{Received, receive},
};

/// By the codes of HTTP/2. Callers could cause them.
static ERRORS: LazyLock<Complaints<&str>> = LazyLock::new(Complaints::default);

/// Fewer bytes that are not complete are in what HTTP/2 takes in any case.
const WORTH_TELLING: u32 = 2 * 1024;

/// The most bytes that are read at once: some ten requests, which are served before more of them are taken out of the
/// kernel's hands.
const AT_ONCE: usize = 2 * 1024;
/// The same where room on the node is about to run out: then all others wait for those few, and HTTP/2 keeps the memory of as
/// many as came at once.
const AT_ONCE_WITHOUT_ROOM: usize = 512;
/// What so few bytes make HTTP/2 hold, if they are heads of the shortest kind.
const HEADS_WITHOUT_ROOM: u64 = 8 * HEAD;

/// How much of what waits is looked at for frames that begin nothing: some seven of them.
const BEGINS_NOTHING: usize = 128;

/// How a connection ended, as far as its bytes tell. Shared with the task that serves it.
#[derive(Debug, Default)]
pub(super) struct Ending {
    flooded: AtomicBool,
    by_peer: AtomicBool,
    descriptors: AtomicBool,
    another_writer: AtomicBool,
    /// A read did not fill its buffer.
    read_short: AtomicBool,
    read_again: AtomicBool,
    /// The last read filled its buffer.
    read_full: AtomicBool,
}

impl Ending {
    /// The budget was spent.
    pub(super) fn flooded(&self) -> bool {
        self.flooded.load(Relaxed)
    }

    /// The peer closed its side, or the socket failed.
    pub(super) fn by_peer(&self) -> bool {
        self.by_peer.load(Relaxed)
    }

    /// A descriptor was passed in.
    pub(super) fn descriptors(&self) -> bool {
        self.descriptors.load(Relaxed)
    }

    /// Somebody else has written, or who writes is somebody else by now.
    pub(super) fn another_writer(&self) -> bool {
        self.another_writer.load(Relaxed)
    }

    /// A read has been short. That tells that nothing more is there, and so saves another one, but for bytes of another
    /// writer, which the kernel keeps apart: [`Self::read_again`] has to be called some time later.
    pub(super) fn read_short(&self) -> bool {
        self.read_short.load(Relaxed)
    }

    /// Lets the next read take more. Until then nothing is read once a read was a full one: what it brought is served first.
    pub(super) fn read_on(&self) {
        self.read_full.store(false, Relaxed);
    }

    /// Lets the first read look at what is there, before the runtime has heard of it.
    pub(super) fn read_at_once(&self) {
        self.read_again.store(true, Relaxed);
    }

    /// If a read has been short since the last time: lets the next one look at what is there, whether something was
    /// heard of or not.
    pub(super) fn read_again(&self) {
        if self.read_short.swap(false, Relaxed) {
            self.read_again.store(true, Relaxed);
        }
    }
}

/// What the wire shares with the task that serves it.
#[derive(Debug)]
pub(super) struct WireShared {
    pub(super) ending: Arc<Ending>,
    pub(super) turns: Arc<Turns>,
    pub(super) holding: Arc<Holding>,
    pub(super) stats: Arc<ConnectionStats>,
    pub(super) heads: Arc<HeadCount>,
}

/// A stream whose incoming bytes come by a [`Passage`].
#[derive(Debug)]
pub(super) struct Wire<P: Send + 'static> {
    outbox: Arc<Outbox<P>>,
    writer: SoleWriter,
    passage: Passage,
    last_word: LastWord,
    ending: Arc<Ending>,
    turns: Arc<Turns>,
    holding: Arc<Holding>,
    stats: Arc<ConnectionStats>,
    heads: Arc<HeadCount>,
    /// Frames and header blocks that are not complete.
    unfinished: KeptBytes,
    /// Since when nothing is read for want of memory.
    unread_since: Option<Instant>,
}

impl<P: Send + 'static> Wire<P> {
    /// From the first byte of a stream on, which `peer` opened. What is written goes to `outbox`, which its holder empties.
    pub(super) fn new(
        outbox: Arc<Outbox<P>>,
        peer: Arc<Peer>,
        budget: FrameBudget,
        shared: WireShared,
    ) -> Self {
        let WireShared { ending, turns, holding, stats, heads } = shared;
        let (writer, passage) = (SoleWriter::new(peer), Passage::new(budget, Instant::now()));
        let (last_word, unfinished) = (LastWord::default(), holding.keep(0));
        let unread_since = None;
        Self {
            outbox,
            writer,
            passage,
            last_word,
            ending,
            turns,
            holding,
            stats,
            heads,
            unfinished,
            unread_since,
        }
    }

    fn noted<R>(&self, result: io::Result<R>) -> io::Result<R> {
        if result.is_err() {
            self.ending.by_peer.store(true, Relaxed);
        }
        result
    }

    /// Receives up to `most` bytes behind what fills `buf`: one system call, where no descriptor can come.
    fn poll_receive(
        &self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        most: usize,
    ) -> Poll<io::Result<Received>> {
        let stream = self.outbox.stream();
        let (socket, care) = (stream.socket(), stream.care());
        if self.ending.read_again.swap(false, Relaxed) {
            match receive(stream.as_fd(), buf, most, care) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                received => {
                    // There is more, of which the runtime may not have heard.
                    if matches!(received, Ok(Received::Bytes { len, .. }) if len == most) {
                        self.ending.read_at_once();
                    }
                    return Poll::Ready(received);
                }
            }
        }
        loop {
            ready!(socket.poll_read_ready(cx))?;
            let mut received = None;
            let tried = socket.try_io(Interest::READABLE, || {
                let got = receive(stream.as_fd(), buf, most, care)?;
                let short = matches!(got, Received::Bytes { len, .. } if 0 < len && len < most);
                received = Some(got);
                if short {
                    self.ending.read_short.store(true, Relaxed);
                    // Tells the runtime that nothing more is there.
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            match (received, tried) {
                (Some(received), _) => return Poll::Ready(Ok(received)),
                (None, Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Poll::Ready(Err(error));
                }
                (None, _) => {}
            }
        }
    }

    /// Waits for bytes, and leaves them where they are. Ready with how many of them are whole frames that begin nothing.
    fn poll_what_begins_nothing(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let stream = self.outbox.stream();
        let (socket, mut bytes) = (stream.socket(), [0; BEGINS_NOTHING]);
        loop {
            ready!(socket.poll_read_ready(cx))?;
            let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
            let seen = || Ok(recv(stream.as_fd().as_raw_fd(), &mut bytes, flags)?);
            match socket.try_io(Interest::READABLE, seen) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                seen => {
                    let seen = seen?;
                    let seen = bytes.get(..seen).unwrap_or_default();
                    return Poll::Ready(Ok(self.passage.filter().begins_nothing(seen)));
                }
            }
        }
    }

    /// Reads up to `most` bytes behind what fills `buf`, and lets them pass. Ready with whether the peer wrote some.
    fn poll_some(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        most: usize,
    ) -> Poll<io::Result<bool>> {
        let received = ready!(self.poll_receive(cx, buf, most));
        let Received::Bytes { len, writer } = self.noted(received)? else {
            self.ending.descriptors.store(true, Relaxed);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, PassedIn)));
        };
        if len == 0 {
            self.ending.by_peer.store(true, Relaxed);
            return Poll::Ready(Ok(false));
        }
        if !self.writer.wrote(writer) {
            self.end_with(cx);
            return Poll::Ready(Ok(false));
        }
        self.ending.read_full.store(len == most, Relaxed);
        let from = buf.filled().len();
        buf.advance(len);
        self.passage.filter().read_whole(self.turns.take_read_whole());
        let passed = self.passage.pass(buf, from, Instant::now).map_err(|flood| {
            self.ending.flooded.store(true, Relaxed);
            io::Error::new(io::ErrorKind::ConnectionAborted, flood)
        });
        self.tell_unfinished();
        let filter = self.passage.filter();
        self.heads.came(filter.heads());
        let began = filter.take_began();
        self.turns.heads(began);
        self.turns.pins(filter.take_pinned());
        for _ in 0..filter.take_wasted() {
            self.turns.pauses().wasted(Instant::now());
        }
        Poll::Ready(passed.map(|()| true))
    }

    /// Tells what HTTP/2 keeps of what came, if it is worth it: an ordinary read ends where a frame does.
    fn tell_unfinished(&mut self) {
        let now =
            Some(self.passage.filter().unfinished()).filter(|bytes| *bytes >= WORTH_TELLING).unwrap_or(0);
        self.unfinished.set(now.into());
    }

    /// Nothing more is read: these bytes were not the peer's.
    fn end_with(&mut self, cx: &mut Context<'_>) {
        self.ending.another_writer.store(true, Relaxed);
        self.last_word.say(self.passage.filter().last_whole());
        // What cannot be written now is written before whatever HTTP/2 writes next.
        drop(self.poll_last_word(cx));
    }

    /// Reads nothing more once its process was seen as another user or group. Its newest call, which is refused for that, is
    /// said not to have been heard, so that its client makes it again on another connection by itself.
    fn leave_changed(&mut self) {
        if self.writer.has_changed() && !self.ending.another_writer.swap(true, Relaxed) {
            // The streams of a client have odd numbers.
            self.last_word.say(self.passage.filter().last_whole().saturating_sub(2));
        }
    }

    /// Writes what is to be said, if this is the place for it. Ready with how many bytes of HTTP/2 may follow.
    fn poll_last_word(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            match self.last_word.next() {
                NextBytes::Theirs(most) => return Poll::Ready(Ok(most)),
                NextBytes::Ours(bytes) => {
                    let said = ready!(self.outbox.poll_take(cx, &[io::IoSlice::new(bytes)]));
                    self.last_word.said(self.noted(said)?);
                }
            }
        }
    }
}

impl<P: Send + Unpin + 'static> AsyncRead for Wire<P> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.leave_changed();
        if this.passage.waits() {
            // It was heard, whatever came since.
            this.passage.take(buf);
            return Poll::Ready(Ok(()));
        }
        this.heads.looked_at(this.passage.filter().heads());
        let before = buf.filled().len();
        // Nothing more would be the end of the stream: where all that came is kept back, the rest of it is read.
        while buf.filled().len() == before {
            if this.ending.another_writer.load(Relaxed) {
                drop(this.poll_last_word(cx));
                return Poll::Pending;
            }
            if this.turns.pauses().paused() {
                // The connection's task polls again when the pause is over.
                return Poll::Pending;
            }
            if this.ending.read_full.load(Relaxed) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let plenty = this.holding.has_plenty();
            let mut most = if plenty { AT_ONCE } else { AT_ONCE_WITHOUT_ROOM };
            if !plenty && !this.turns.is_new() {
                // What it asks further waits in the kernel where there is no memory for it. Its first request is let in.
                if this.holding.try_hold(HEADS_WITHOUT_ROOM) {
                    this.holding.release(HEADS_WITHOUT_ROOM);
                    this.unread_since = None;
                } else {
                    // Who has closed it gives back what it holds: were that waited for too, nobody would ever.
                    if this.outbox.stream().is_deserted() {
                        return Poll::Ready(Ok(()));
                    }
                    let now = Instant::now();
                    let since = *this.unread_since.get_or_insert(now);
                    // Whoever holds next to nothing is read in the end: what it asks is answered, or refused and told why.
                    if now < since + FOR_ROOM || !this.holding.begins() {
                        // Who answers a PING is there: unheard, it would be cut off for a memory that others want.
                        most = ready!(this.poll_what_begins_nothing(cx))?;
                        if most == 0 {
                            this.turns.pauses().rest(now);
                            return Poll::Pending;
                        }
                    } else {
                        this.unread_since = None;
                    }
                }
            }
            let most = buf.remaining().min(most);
            if !ready!(this.poll_some(cx, buf, most))? {
                return if this.ending.another_writer.load(Relaxed) {
                    Poll::Pending
                } else {
                    Poll::Ready(Ok(()))
                };
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// Counts what the peer is told went wrong, and says it at debug: nobody else hears of it.
fn note(told: Told, stats: &ConnectionStats, heads: &HeadCount, peer: &Peer) {
    let Told { error, code, stream } = told;
    stats.count_error(error);
    if error == Http2Error::Refused && stream > 0 {
        heads.is_one_too_many();
    }
    if tracing::enabled!(tracing::Level::DEBUG) {
        let (pid, uid) = (peer.pid(), peer.uid());
        ERRORS.say(peer.caller(), code, |times| tracing::debug!(%pid, %uid, stream, code, times, "a stream or connection ends with an error of http/2"));
    }
}

/// Descriptors came with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a descriptor was passed in")]
struct PassedIn;

impl<P: Send + Unpin + 'static> AsyncWrite for Wire<P> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        // Before a refusal for that is written.
        this.leave_changed();
        let most = ready!(this.poll_last_word(cx))?;
        let first = bufs.iter().find(|buf| !buf.is_empty()).and_then(|buf| buf.get(..most.min(buf.len())));
        let first = [io::IoSlice::new(first.unwrap_or_default())];
        let bufs = if most < usize::MAX { &first } else { bufs };
        let result = ready!(this.outbox.poll_take(cx, bufs));
        if let Ok(mut left) = result {
            for buf in bufs {
                let part = buf.get(..left.min(buf.len())).unwrap_or_default();
                this.last_word.passed(part, |told| note(told, &this.stats, &this.heads, this.writer.peer()));
                left -= part.len();
            }
        }
        Poll::Ready(this.noted(result))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Whoever holds the outbox empties it.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let emptied = ready!(this.outbox.poll_empty(cx));
        this.noted(emptied)?;
        Poll::Ready(this.outbox.stream().shut_for_writing())
    }
}
