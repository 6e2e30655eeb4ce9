//! The door: from a bound socket to connections that were let in, and to the end of the last of them.
//!
//! For each connection, in this order: credentials and caller key, the [`AcceptGate`], and only then a hold
//! on its process and a task of its own ([`connection`](super::connection)). A refused connection has cost an
//! `accept`, a question to the kernel and a look into a table. One that its caller's own limits refuse is
//! closed a moment later ([`lingering`](super::lingering)). None is closed where what a caller left in it could keep
//! the door ([`accepted`](super::accepted)). Waiting connections are accepted in runs, so that
//! a crowd is through before the next round of anything else, and nobody else's connection stands long behind
//! it. Absent: what a request means; limits (the gate's); TLS.
//!
//! # Decisions
//! Our own accept loop and not tonic's: that one spins at the descriptor limit, waits for ever in a drain for
//! peers that are silent, has no handshake timeout, and hides settings that bound a hostile peer.

use std::{
    future::Future,
    io,
    os::{fd::AsFd, unix::net::UnixStream as StdStream},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use super::{
    accepted::{Accepted, Closing},
    allowance::Allowance,
    bounds::{ConnectionBounds, InForce},
    closing::Closers,
    connection::Connection,
    credentials::{Arrival, CredentialsError, KeyResolver, OsUid, Peer},
    drain::{Drained, drain, note_panic},
    end::Phase,
    lingering::Lingering,
    service::ConnectionService,
    socket::{BoundPath, Socket},
    stats::{ConnectionStats, OpenConnection},
    trim::HeapTrim,
};
use crate::{
    limits::{ConnectionRefusal, holding::Holding, pace::Pace},
    os::{
        accept::{Acceptor, Waiting},
        headroom::Headroom,
        membarrier::grace_period,
        passing::{self, Passing},
    },
    telemetry::registry::Label as _,
};

/// The most connections that are accepted in one run, before anything else is looked at.
const RUN: usize = 64;

/// The family that the listener itself is closed for: no user's.
const AGENT: u64 = u64::MAX - 1;

/// How long nobody is accepted, for what waits to be closed, before the log has it.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// How long the accept loop pauses when there are no descriptors left, instead of spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Decides at accept, before any HTTP/2 state exists.
pub trait AcceptGate: Send + Sync + 'static {
    /// Lives as long as the connection; its drop gives the place back.
    type Permit: Send + Unpin + 'static;

    /// Runs in the accept loop: must answer at once.
    ///
    /// # Errors
    /// [`ConnectionRefusal`]: the connection is closed and counted.
    fn admit_connection(&self, arrival: &Arrival) -> Result<Self::Permit, ConnectionRefusal>;

    /// Where is said what the connection holds. By default nobody sums it up.
    fn holding(_permit: &Self::Permit) -> Arc<Holding> {
        Arc::default()
    }

    /// The cgroups whose memory the kernel charges for what it keeps of connections that are closed. By default none has
    /// a bound that could be met. Asked once, before anybody is accepted.
    fn headroom(&self) -> Option<Headroom> {
        None
    }

    /// Of whom the connection is one: they share the threads that close what is left in a connection. By default its
    /// user. Must answer at once.
    fn family(&self, arrival: &Arrival) -> u64 {
        u64::from(arrival.credentials().uid.as_raw())
    }
}

/// Lets everybody in.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitAll;

impl AcceptGate for AdmitAll {
    type Permit = ();

    fn admit_connection(&self, _arrival: &Arrival) -> Result<(), ConnectionRefusal> {
        Ok(())
    }
}

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
    /// Accepts and serves until `shutdown` is ready, then drains: the socket is removed, parked connections
    /// are closed, the others get a GOAWAY and [`ConnectionBounds::drain_timeout`] to finish. Streams that
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
        shutdown: impl Future<Output = ()> + Send,
    ) -> io::Result<Drained> {
        let Self { socket, mut bounds, gate, keys, stats } = self;
        let (listener, path) = socket.into_parts();
        let closing = closing(&listener, path.as_ref())?;
        let allowance =
            gate.headroom().map(|it| Allowance::start(it, || grace_period().is_ok())).transpose()?;
        let listener = Acceptor::new(listener)?;
        let in_force = InForce::new(bounds.borrow_and_update().clone(), &stats);
        let mut door = Door {
            gate,
            keys,
            stats,
            services,
            in_force,
            phase: watch::Sender::default(),
            connections: JoinSet::new(),
            lingering: Lingering::default(),
            closing,
            heap: HeapTrim::default(),
            allowance,
            paused: None,
            full_since: None,
            full: Pace::default(),
        };
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                waiting = listener.ready(), if door.is_open() => rest(door.take_run(waiting?)).await,
                Some(ended) = door.connections.join_next() => door.ended(ended),
                Ok(()) = bounds.changed() => {
                    door.in_force = InForce::new(bounds.borrow_and_update().clone(), &door.stats);
                }
                () = at(door.paused) => door.paused = None,
                () = more(&mut door.allowance) => {}
                () = at(door.lingering.due()) => door.lingering.close(Instant::now()),
                () = at(door.heap.due) => door.heap.trim(door.connections.len()),
            }
        }

        // No new connection, and room for the next agent, before the wait for the old ones.
        door.leave(listener);
        drop(path);
        drop(std::mem::take(&mut door.lingering));
        door.phase.send_modify(|phase| phase.draining = true);
        Ok(drain(door.connections, door.in_force.bounds.drain_timeout).await)
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

/// What the accept loop works with.
struct Door<G, K, F> {
    gate: Arc<G>,
    keys: Arc<K>,
    stats: Arc<ConnectionStats>,
    services: F,
    in_force: InForce,
    phase: watch::Sender<Phase>,
    connections: JoinSet<()>,
    lingering: Lingering,
    closing: Closing,
    heap: HeapTrim,
    /// `None` where nothing bounds what the kernel keeps.
    allowance: Option<Allowance>,
    /// Until then nobody is accepted.
    paused: Option<Instant>,
    /// Since when so much waits to be closed that nobody is.
    full_since: Option<Instant>,
    full: Pace,
}

impl<G: AcceptGate, K: KeyResolver, S: ConnectionService, F: Fn(Arc<Peer>) -> S> Door<G, K, F> {
    /// Whether those who wait may be accepted.
    fn is_open(&self) -> bool {
        self.paused.is_none() && !self.allowance.as_ref().is_some_and(Allowance::is_spent)
    }

    /// Takes those who wait, up to [`RUN`] of them. Returns how many they were.
    fn take_run(&mut self, waiting: Waiting<'_>) -> usize {
        let now = Instant::now();
        self.lingering.close(now);
        if let Some(family) = self.closing.full_by() {
            self.stats.count_accept_error();
            if now.duration_since(*self.full_since.get_or_insert(now)) >= TOLD_AFTER {
                self.full.say(|left_out| {
                    tracing::warn!(
                        family,
                        left_out,
                        "nobody is accepted: what callers passed in takes too long to close (before Linux 6.16 nothing \
                         bars it); end the processes of the user who holds it up"
                    );
                });
            }
            self.paused = Some(now + ACCEPT_PAUSE);
            return 0;
        }
        self.full_since = None;
        let most = self.allowance.as_mut().map_or(RUN, |it| it.of(RUN, now));
        let mut run = 0;
        for accepted in waiting.take(most) {
            run += 1;
            if let Err(why) = accepted.map_err(NotTaken::from).and_then(|stream| self.take(stream, now))
                && why.count(&self.stats)
            {
                self.paused = Some(Instant::now() + ACCEPT_PAUSE);
                break;
            }
        }
        if let Some(allowance) = &mut self.allowance {
            allowance.took(run);
        }
        run
    }

    /// Lets one in, or not.
    fn take(&mut self, stream: StdStream, now: Instant) -> Result<(), NotTaken> {
        self.stats.count_accepted();
        let mut stream = Accepted::new(stream, &self.closing)?;
        let arrival = Arrival::at(&stream, &*self.keys)?;
        stream.belongs_to(|| self.gate.family(&arrival));
        let permit = match self.gate.admit_connection(&arrival) {
            Ok(permit) => permit,
            Err(why) => {
                if why.is_callers_own() {
                    self.lingering.keep(stream, now, &self.in_force.bounds);
                }
                return Err(NotTaken::Refused(why));
            }
        };
        let peer = Arc::new(arrival.let_in(&stream)?);
        let holding = G::holding(&permit);
        // Only now does the runtime hear of it.
        let stream = stream.admit(permit)?;
        let InForce { bounds, http2 } = &self.in_force;
        let connection = Connection {
            peer: Arc::clone(&peer),
            bounds: Arc::clone(bounds),
            phases: self.phase.subscribe(),
            open: OpenConnection::count(&self.stats),
            holding,
        };
        self.connections.spawn(connection.run(stream, http2.clone(), (self.services)(peer)));
        self.heap.grew_to(self.connections.len());
        Ok(())
    }

    /// Lets go of the listener; of one that others hold too, those who wait at it stay.
    fn leave(&self, listener: Acceptor) {
        let listener = listener.into_inner();
        if let Closing::Careful(closers, _) = &self.closing {
            closers.close(listener.into(), AGENT, None);
        }
    }

    fn ended(&mut self, ended: Result<(), tokio::task::JoinError>) {
        note_panic(ended);
        while let Some(ended) = self.connections.try_join_next() {
            note_panic(ended);
        }
        self.heap.fell_to(self.connections.len());
    }
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

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// Why a connection was not taken.
#[derive(Debug, thiserror::Error)]
enum NotTaken {
    /// `accept` failed.
    #[error(transparent)]
    Accept(#[from] io::Error),
    /// The kernel did not say who is there.
    #[error(transparent)]
    Unidentified(#[from] CredentialsError),
    /// The gate refused it.
    #[error("refused: {}", .0.text())]
    Refused(ConnectionRefusal),
}

impl NotTaken {
    /// Counts it. Returns whether to pause: more would fail in the same way.
    fn count(&self, stats: &ConnectionStats) -> bool {
        match self {
            Self::Refused(why) => {
                stats.count_refused(*why);
                false
            }
            Self::Unidentified(err) => {
                stats.count_refused(ConnectionRefusal::Unidentified);
                tracing::debug!(error = %err, "closed a connection");
                let out_of_descriptors = err.out_of_descriptors();
                if out_of_descriptors {
                    stats.count_accept_error();
                }
                out_of_descriptors
            }
            Self::Accept(err) => {
                stats.count_accept_error();
                // A peer that left before it was accepted is no reason to pause; nothing else passes by
                // itself at once.
                let passes = err.kind() == io::ErrorKind::ConnectionAborted;
                if !passes {
                    tracing::debug!(error = %err, "cannot accept");
                }
                !passes
            }
        }
    }
}
