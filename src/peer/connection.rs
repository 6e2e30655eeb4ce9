//! The life of one connection that was let in: parked until its first byte, then HTTP/2, to its end.
//!
//! A silent connection is parked without any HTTP/2 state. Not trusted: that a peer sends, reads, finishes or
//! leaves. Every wait has an end: the handshake (up to the first complete request), a request without an
//! answer, an answer that is not read, a connection without a request, a dead process, the drain. What a
//! connection may hold is bounded by [`ConnectionBounds`].

use std::{
    future::poll_fn,
    io,
    os::fd::{AsFd, AsRawFd as _},
    sync::Arc,
    task::Poll,
};

use hyper::server::conn::http2;
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
    accepted::Accepted,
    bounds::{ConnectionBounds, Spawner},
    course::{Course, READ_AGAIN_AFTER, Verdict, WATCH_AFTER},
    credentials::Peer,
    end::{ConnectionEnd, Phase, drains},
    service::{ConnectionService, WatchedService},
    stats::{OpenConnection, Parked},
    turns::Turns,
    wire::{Ending, Wire},
};
use crate::limits::holding::{Holding, Notice};

/// What the task of a connection holds beside its stream.
pub(super) struct Connection {
    pub(super) peer: Arc<Peer>,
    pub(super) bounds: Arc<ConnectionBounds>,
    pub(super) phases: watch::Receiver<Phase>,
    pub(super) open: OpenConnection,
    pub(super) holding: Arc<Holding>,
}

impl Connection {
    /// Serves it to its end, and counts why it ended. Its place at the gate goes with the stream.
    pub(super) async fn run<P: Send + Unpin + 'static>(
        mut self,
        stream: Accepted<UnixStream, P>,
        http2: http2::Builder<Spawner>,
        service: impl ConnectionService,
    ) {
        let handshake_by = Instant::now() + self.bounds.handshake_timeout;
        self.open.why = match self.park(stream.socket(), handshake_by).await {
            // Boxed only now: a parked connection must not carry the room for HTTP/2 in its task.
            Ok(()) => Box::pin(self.serve(stream, handshake_by, http2, service)).await,
            Err(why) => why,
        };
    }

    /// Waits for the first byte, and leaves it where it is.
    async fn park(&mut self, stream: &UnixStream, by: Instant) -> Result<(), ConnectionEnd> {
        // Most clients have sent their first bytes by now: neither a timer nor a place in epoll is used then.
        match first_byte(stream) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
            first => return first.map_err(|_closed| ConnectionEnd::ByPeer),
        }
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
        tokio::select! {
            first = arrives => first.map_err(|_closed: io::Error| ConnectionEnd::ByPeer),
            () = sleep_until(by) => Err(ConnectionEnd::HandshakeTimeout),
            () = drains(&mut self.phases) => Err(ConnectionEnd::Drained),
            notice = self.holding.told(None) => Err(match notice {
                Notice::ComeBack => ConnectionEnd::SentAway,
                Notice::Close => ConnectionEnd::Evicted,
            }),
        }
    }

    async fn serve<P: Send + Unpin + 'static>(
        &mut self,
        stream: Accepted<UnixStream, P>,
        handshake_by: Instant,
        http2: http2::Builder<Spawner>,
        service: impl ConnectionService,
    ) -> ConnectionEnd {
        let Self { peer, bounds, phases, holding, .. } = self;
        bound_send_buffer(&stream, bounds);
        let ending = Arc::new(Ending::default());
        let turns = Arc::new(Turns::new(Arc::clone(holding)));
        let wire = Wire::new(stream, Arc::clone(peer), bounds.budget, Arc::clone(&ending));
        let mut course = Course::new(bounds, &turns, handshake_by);
        let service = WatchedService { service, peer: Arc::clone(peer), turns: Arc::clone(&turns) };
        let mut http2 = std::pin::pin!(http2.serve_connection(TokioIo::new(wire), service));
        let born = Instant::now();
        let mut look = std::pin::pin!(sleep_until(course.first_look(born)));
        let (watch_at, mut watched, mut looks_soon, mut heard) = (born + WATCH_AFTER, false, true, None);
        loop {
            tokio::select! {
                biased;
                done = http2.as_mut() => return course.ended(done, &ending),
                () = drains(phases), if !course.drains() && !course.is_unheard() => {
                    http2.as_mut().graceful_shutdown();
                    course.finish(ConnectionEnd::Drained);
                }
                notice = holding.told(heard), if heard < Some(Notice::Close) => {
                    if notice == Notice::Close {
                        return ConnectionEnd::Evicted;
                    }
                    heard = Some(notice);
                    if !course.is_unheard() && !course.drains() {
                        http2.as_mut().graceful_shutdown();
                        peer.send_away();
                        turns.wake_resting();
                        let now = Instant::now();
                        course.send_away(now);
                        look.as_mut().reset(course.next_look(now));
                    }
                }
                () = peer.exited(), if watched => return ConnectionEnd::PeerExited,
                // Effective ids alone: the next call would be refused as this one was. Polled after the connection, which
                // is woken for the answer that said so.
                () = changed(peer), if !course.is_ending() => {
                    http2.as_mut().graceful_shutdown();
                    let now = Instant::now();
                    course.outdated(now);
                    look.as_mut().reset(course.next_look(now));
                }
                () = ending.another_writer(), if !course.is_unheard() => {
                    let now = Instant::now();
                    course.unheard(now);
                    look.as_mut().reset(course.next_look(now));
                }
                () = ending.read_short(), if !looks_soon => {
                    looks_soon = true;
                    let soon = Instant::now() + READ_AGAIN_AFTER;
                    if soon < look.deadline() {
                        look.as_mut().reset(soon);
                    }
                }
                () = look.as_mut() => {
                    looks_soon = false;
                    ending.read_again();
                    let now = Instant::now();
                    peer.slot().forget_old(now);
                    match course.look(now) {
                        Verdict::GoesOn => {}
                        Verdict::SayFarewell => http2.as_mut().graceful_shutdown(),
                        Verdict::Cut(why) => return why,
                    }
                    watched |= now >= watch_at;
                    let next = course.next_look(now);
                    look.as_mut().reset(if watched { next } else { next.min(watch_at) });
                }
            }
        }
    }
}

/// Waits until the peer was found to be another user or group than it connected as.
async fn changed(peer: &Peer) {
    poll_fn(|_| if peer.has_changed() { Poll::Ready(()) } else { Poll::Pending }).await;
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
