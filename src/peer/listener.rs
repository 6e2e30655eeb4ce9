//! The door: from a bound socket to connections that were let in, and to the end of the last of them.
//!
//! For each connection, in this order: credentials and caller key, the [`AcceptGate`], and only then a hold
//! on its process and a task of its own ([`door`](super::door)). A refused connection has cost an
//! `accept`, a question to the kernel and a look into a table. One that is refused for want of room is asked for again a
//! moment later, and one that its caller's own limits refuse is closed then ([`lingering`](super::lingering)); the first few
//! are told why ([`reply`](super::reply)), and so are those that find no memory when they begin to speak. None is closed where what a caller left in it could keep
//! the door ([`accepted`](super::accepted)). Waiting connections are accepted in runs, so that
//! a crowd is through before the next round of anything else, and nobody else's connection stands long behind
//! it. Absent: what a request means; limits (the gate's); TLS.
//!
//! # Decisions
//! Our own accept loop and not tonic's: that one spins at the descriptor limit, waits for ever in a drain for
//! peers that are silent, has no handshake timeout, and hides settings that bound a hostile peer.

use std::{future::Future, io, os::fd::AsFd, sync::Arc};

use tokio::{
    sync::{oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    accept_gate::{AcceptGate, AdmitAll},
    accepted::Closing,
    allowance::Allowance,
    bounds::ConnectionBounds,
    closing::Closers,
    credentials::{KeyResolver, OsUid, Peer},
    door::{Door, RUN},
    drain::{Drained, drain},
    entrance::Entrance,
    lingering::Lingering,
    reply::Replies,
    service::ConnectionService,
    socket::{BoundPath, Socket, VacantSocket},
    stats::ConnectionStats,
    trim::HeapTrim,
};
use crate::{
    limits::{pace::Pace, room::Room},
    os::{
        accept::Acceptor,
        membarrier::grace_period,
        passing::{self, Passing},
    },
};

/// Everything that [`Listener::serve`] needs but the services.
#[derive(Debug)]
pub struct Listener<G = AdmitAll, K = OsUid> {
    pub socket: Socket,
    /// What bounds a connection. A change counts for those that come after it.
    pub bounds: watch::Receiver<ConnectionBounds>,
    pub gate: Arc<G>,
    /// Whom a connection is charged to.
    pub keys: Arc<K>,
    pub stats: Arc<ConnectionStats>,
}

/// What becomes of the socket when its listener ends.
#[derive(Debug)]
pub enum Leave {
    /// It is removed, unless systemd made it.
    Remove,
    /// Nobody is left to say: it is removed if it was bound here, and left to the agent that had it before.
    Abandon,
    /// It goes on listening, and is for whoever waits at the other end; one that systemd made is not passed on.
    HandOn(oneshot::Sender<VacantSocket>),
}

impl From<()> for Leave {
    fn from((): ()) -> Self {
        Self::Remove
    }
}

impl Listener {
    /// A listener that lets everybody in, and charges users.
    pub fn new(socket: Socket, bounds: ConnectionBounds) -> Self {
        Self {
            socket,
            bounds: watch::channel(bounds).1,
            gate: Arc::new(AdmitAll),
            keys: Arc::new(OsUid),
            stats: Arc::default(),
        }
    }
}

impl<G: AcceptGate, K: KeyResolver + 'static> Listener<G, K> {
    /// Accepts and serves until `shutdown` is ready, then drains: the socket is removed or handed on, parked connections
    /// are closed, the others get a GOAWAY and have [`ConnectionBounds::drain_timeout`] since then to finish. Streams that
    /// the server never ends by itself should be ended by whoever serves them when `shutdown` becomes ready,
    /// or they are cut.
    ///
    /// `services` makes the service of a connection. Each request carries its `Arc<Peer>` in its extensions too.
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the socket cannot be registered with the runtime.
    pub async fn serve<S: ConnectionService>(
        self,
        services: impl Fn(Arc<Peer>) -> S,
        shutdown: impl Future<Output: Into<Leave>> + Send,
    ) -> io::Result<Drained> {
        let Self { socket, mut bounds, gate, keys, stats } = self;
        let (listener, path) = socket.into_parts();
        let closing = closing(&listener, path.as_ref())?;
        let allowance = gate.headroom().map(|it| Allowance::start(it, grace_period)).transpose()?;
        let listener = Acceptor::new(listener)?;
        let room = gate.room();
        let in_force = Arc::new(bounds.borrow_and_update().clone());
        let mut door = Door {
            gate,
            keys,
            stats,
            services,
            bounds: in_force,
            phase: watch::Sender::default(),
            connections: JoinSet::new(),
            lingering: Lingering::default(),
            entrance: Entrance::default(),
            asks_again: None,
            replies: Replies::default(),
            closing,
            heap: HeapTrim::default(),
            allowance,
            paused: None,
            ends: None,
            full_since: None,
            full: Pace::default(),
        };
        let mut shutdown = std::pin::pin!(shutdown);
        let (mut told, mut told_at) = (None, Instant::now());
        // Who was accepted and waits for room is decided about before the end, and who was let in goes in.
        while told.is_none() || door.lingering.is_waited_in() || door.entrance.is_waited_at() {
            tokio::select! {
                leave = &mut shutdown, if told.is_none() => {
                    (told, told_at) = (Some(leave.into()), Instant::now());
                    door.is_told_to_end(told_at);
                }
                waiting = listener.ready(), if told.is_none() && door.is_open() => rest(door.take_run(waiting?)).await,
                () = door.entrance.opens() => door.have_next_go_in(Instant::now()),
                () = at(door.asks_again) => door.have_next_go_in(Instant::now()),
                Some(ended) = door.connections.join_next() => door.ended(ended),
                Ok(()) = bounds.changed() => {
                    door.bounds = Arc::new(bounds.borrow_and_update().clone());
                }
                () = at(door.paused) => door.paused = None,
                () = more(&mut door.allowance) => {}
                () = at(door.lingering.due()) => rest(door.take_due(Instant::now())).await,
                () = returns(room.as_deref()), if door.lingering.wait() => rest(door.take_waiting()).await,
                () = at(door.heap.due) => door.heap.trim(door.connections.len()),
            }
        }

        // No new connection, and room for the next agent, before the wait for the old ones.
        match told {
            Some(Leave::HandOn(next)) => hand_on(next, listener, path, &door),
            Some(Leave::Remove) => {
                door.leave(listener);
                path.into_iter().for_each(BoundPath::remove);
            }
            Some(Leave::Abandon) | None => {
                door.leave(listener);
                drop(path);
            }
        }
        drop(std::mem::take(&mut door.lingering));
        drop(std::mem::take(&mut door.replies));
        door.phase.send_modify(|phase| phase.draining = true);
        Ok(drain(door.connections, told_at + door.bounds.drain_timeout).await)
    }
}

/// Leaves the socket to whoever waits for it, or to itself where nobody does any more.
fn hand_on<G: AcceptGate, K: KeyResolver, S: ConnectionService, F: Fn(Arc<Peer>) -> S>(
    next: oneshot::Sender<VacantSocket>,
    listener: Acceptor,
    path: Option<BoundPath>,
    door: &Door<G, K, F>,
) {
    match path {
        Some(path) => drop(next.send(path.vacate(listener.into_inner()))),
        None => door.leave(listener),
    }
}

/// How the connections of this listener are closed. One that was handed over may have been connected to before anything
/// was barred.
fn closing(listener: &impl AsFd, made: Option<&BoundPath>) -> io::Result<Closing> {
    let passing = match (Passing::of(listener), made) {
        (Passing::Barred, Some(_)) => return Ok(Closing::Plain),
        (passing, Some(_)) => {
            // Tests make it as older kernels do.
            if passing == Passing::Possible { Passing::Always } else { passing }
        }
        (_, None) => passing::prepare(listener)?,
    };
    Ok(Closing::Careful(Arc::new(Closers::start()?), passing))
}

/// A socket at which somebody always waits would never let the accept loop's task rest: then nothing else in
/// it ever comes about, since the runtime gives a task that does not rest no other event, nor do those tasks
/// that share its thread. So it rests after a whole run, and now and then after others.
async fn rest(run: usize) {
    if run == RUN {
        tokio::task::yield_now().await;
    } else {
        tokio::task::consume_budget().await;
    }
}

/// Waits until more may be accepted, where none may.
async fn more(allowance: &mut Option<Allowance>) {
    match allowance {
        Some(allowance) => allowance.more().await,
        None => std::future::pending().await,
    }
}

async fn returns(room: Option<&Room>) {
    match room {
        Some(room) => room.returns().await,
        None => std::future::pending().await,
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}
