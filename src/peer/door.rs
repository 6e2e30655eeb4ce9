//! What happens at the door: who is taken, who waits, who is turned away.

use std::{
    io,
    os::{fd::AsFd as _, unix::net::UnixStream as StdStream},
    sync::Arc,
    time::Duration,
};

use tokio::{sync::watch, task::JoinSet, time::Instant};

use super::{
    accept_gate::AcceptGate,
    accepted::{Accepted, Closing},
    allowance::Allowance,
    bounds::ConnectionBounds,
    connection::{Connection, ROOM_AGAIN},
    credentials::{Arrival, CredentialsError, KeyResolver, Peer, peer_pidfd_is_of_the_peer},
    drain::note_panic,
    end::{ConnectionEnd, Phase},
    entrance::{Entrance, GoesIn},
    lingering::{Kept, Lingering, RoomWaiter},
    reply::{Replies, dismiss},
    service::ConnectionService,
    stats::{ConnectionStats, OpenConnection},
    trim::HeapTrim,
};
use crate::{
    limits::{
        ConnectionRefusal, attempt::Attempt, budget::HTTP2, holding::Holding, pace::Pace, patience::FOR_ROOM,
    },
    os::accept::{Acceptor, Waiting},
    telemetry::registry::Label as _,
};

/// The most connections that are accepted in one run, or asked for again, before anything else is looked at.
pub(super) const RUN: usize = 64;

/// So many are accepted at most before it is looked, at once, whether they are still there.
const BATCH: usize = 8;

/// The family that the listener itself is closed for: no user's.
const AGENT: u64 = u64::MAX - 1;
/// The family of those who cannot be identified.
const UNIDENTIFIED: u64 = u64::MAX - 2;

/// How long nobody is accepted, for what waits to be closed, before the log has it.
const TOLD_AFTER: Duration = Duration::from_secs(1);

/// How long the accept loop pauses when there are no descriptors left, instead of spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// One that was let in.
pub(super) struct AtEntrance<P: Send + 'static> {
    arrival: Arrival,
    family: u64,
    stream: Accepted<StdStream>,
    permit: P,
    since: Instant,
}

impl<P: Send + 'static> AtEntrance<P> {
    /// Whether it may go in: there is memory for it, or it has waited long enough for some and is refused. Until then it is kept
    /// where it takes least.
    fn may_go_in(&self, holding: &Holding, now: Instant) -> bool {
        let waited = now.saturating_duration_since(self.since);
        holding.could_begin(HTTP2) || holding.notice().is_some() || waited >= FOR_ROOM
    }
}

/// What the accept loop works with.
pub(super) struct Door<G: AcceptGate, K, F> {
    pub(super) gate: Arc<G>,
    pub(super) keys: Arc<K>,
    pub(super) stats: Arc<ConnectionStats>,
    pub(super) services: F,
    pub(super) bounds: Arc<ConnectionBounds>,
    pub(super) phase: watch::Sender<Phase>,
    pub(super) connections: JoinSet<()>,
    pub(super) lingering: Lingering,
    pub(super) entrance: Entrance<AtEntrance<G::Permit>>,
    /// When those at the entrance that found no memory are looked at again.
    pub(super) asks_again: Option<Instant>,
    pub(super) replies: Replies,
    pub(super) closing: Closing,
    pub(super) heap: HeapTrim,
    /// `None` where nothing bounds what the kernel keeps.
    pub(super) allowance: Option<Allowance>,
    /// Until then nobody is accepted.
    pub(super) paused: Option<Instant>,
    /// When nobody waits any more.
    pub(super) ends: Option<Instant>,
    /// Since when so much waits to be closed that nobody is.
    pub(super) full_since: Option<Instant>,
    pub(super) full: Pace,
}

impl<G: AcceptGate, K: KeyResolver, S: ConnectionService, F: Fn(Arc<Peer>) -> S> Door<G, K, F> {
    /// Whether those who wait may be accepted.
    pub(super) fn is_open(&self) -> bool {
        self.paused.is_none() && !self.allowance.as_ref().is_some_and(Allowance::is_spent)
    }

    /// Takes those who wait, up to [`RUN`] of them. Returns how many they were.
    pub(super) fn take_run(&mut self, waiting: Waiting<'_>) -> usize {
        let now = Instant::now();
        self.take_due(now);
        if let Some(family) = self.closing.full_by() {
            self.stats.count_accept_error();
            if now.duration_since(*self.full_since.get_or_insert(now)) >= TOLD_AFTER {
                self.full.say(|left_out| {
                    tracing::warn!(
                        family,
                        left_out,
                        "no connection is accepted: the descriptors that callers passed in take too long to close (before Linux 6.16 nothing \
                         bars it); end the processes of the user who holds it up"
                    );
                });
            }
            self.paused = Some(now + ACCEPT_PAUSE);
            return 0;
        }
        self.full_since = None;
        let most = self.allowance.as_mut().map_or(RUN, |it| it.of(RUN, now));
        if most == 0 {
            self.stats.count_accepts_paused();
        }
        let (mut run, mut waiting, mut came) = (0, waiting.take(most), Vec::with_capacity(BATCH));
        // The first alone: where there are no descriptors for it, no others are taken out of their queue.
        let mut batch = 1;
        while batch > 0 {
            for accepted in waiting.by_ref().take(batch) {
                run += 1;
                let accepted = accepted.and_then(|stream| {
                    self.stats.count_accepted();
                    Accepted::new(stream, &self.closing)
                });
                match accepted {
                    Ok(stream) => came.push(stream),
                    Err(error) => {
                        if self.pauses_for(Err(error.into())) {
                            break;
                        }
                    }
                }
            }
            let were_more = came.len() == batch;
            self.take_batch(&mut came, now);
            batch = if were_more && self.paused.is_none() { BATCH.min(2 * batch) } else { 0 };
        }
        if let Some(allowance) = &mut self.allowance {
            allowance.took(run);
        }
        run
    }

    /// Closes those whose time is over, or asks for them again, up to [`RUN`] of them. Returns how many they were.
    pub(super) fn take_due(&mut self, now: Instant) -> usize {
        let mut run = 0;
        while run < RUN
            && let Some(due) = self.lingering.take_due(now)
        {
            run += 1;
            self.ask_again(due, now);
        }
        run
    }

    /// Asks again for those who wait: there is room. Up to [`RUN`] of them; returns how many they were.
    pub(super) fn take_waiting(&mut self) -> usize {
        let now = Instant::now();
        let mut run = 0;
        while run < RUN
            && let Some(mut waiting) = self.lingering.take_waiting()
        {
            run += 1;
            // Once each: room that goes again before its turn comes would have this go on for ever.
            waiting.waits.iter_mut().for_each(|waits| waits.asked = true);
            self.ask_again(waiting, now);
        }
        run
    }

    /// Asks for one that waits. One that does not is closed.
    fn ask_again(&mut self, kept: Kept, now: Instant) {
        let Kept { stream, family, waits } = kept;
        if let Some(waits) = waits {
            if stream.is_deserted() {
                return self.count_left();
            }
            let taken = self.decide(stream, Some(family), waits, now);
            self.pauses_for(taken);
        }
    }

    /// Counts one that was not taken. Returns whether nobody is accepted for a while: more would fail in the same way.
    fn pauses_for(&mut self, taken: Result<(), NotTaken>) -> bool {
        let pauses = taken.is_err_and(|why| why.count(&self.stats));
        if pauses {
            self.paused = Some(Instant::now() + ACCEPT_PAUSE);
        }
        pauses
    }

    /// Takes those who have come. Who has closed again by now is through soonest, and nobody stands behind it for long.
    fn take_batch(&mut self, came: &mut Vec<Accepted<StdStream>>, now: Instant) {
        if came.is_empty() {
            return;
        }
        let left = Accepted::deserted(came);
        for (stream, left) in came.drain(..).zip(left) {
            if left {
                self.count_left();
            } else {
                let taken = self.take(stream, now);
                self.pauses_for(taken);
            }
        }
    }

    /// Lets one in that has come, or not.
    fn take(&mut self, mut stream: Accepted<StdStream>, now: Instant) -> Result<(), NotTaken> {
        let may_ask = |user| self.gate.may_ask_after_process(user);
        let arrival = match Arrival::asking(&stream, &*self.keys, may_ask) {
            Ok(arrival) => arrival,
            Err(error) => return Err(self.not_identified(stream, error, now)),
        };
        stream.belongs_to(|| self.gate.family(&arrival));
        if arrival.is_shown() {
            self.gate.was_asked_after(&arrival);
        }
        if arrival.is_unknown() {
            let (why, family) = (self.gate.refuse_unread(&arrival), self.gate.family(&arrival));
            self.turn_away(stream, family, &arrival, why, now);
            return Err(NotTaken::Refused(why));
        }
        self.decide(stream, None, RoomWaiter::new(arrival, now), now)
    }

    /// Its peer has closed it already.
    fn count_left(&self) {
        OpenConnection::count(&self.stats).why = ConnectionEnd::ByPeer;
    }

    /// Lets one in, has it wait, or turns it away.
    fn decide(
        &mut self,
        stream: Accepted<StdStream>,
        family: Option<u64>,
        mut waits: RoomWaiter,
        now: Instant,
    ) -> Result<(), NotTaken> {
        let family = family.unwrap_or_else(|| self.gate.family(&waits.arrival));
        let bounds = &self.bounds;
        let waited_out = self.ends.map_or(waits.until, |ends| waits.until.min(ends));
        let may_wait = now < waited_out && bounds.max_lingering > 0 && !bounds.linger.is_zero();
        let attempt = match (waits.waited, may_wait) {
            (false, true) => Attempt::First,
            (false, false) => Attempt::Only,
            (true, true) => Attempt::Again,
            (true, false) => Attempt::Last,
        };
        let why = match self.gate.admit_connection(&waits.arrival, attempt) {
            Ok(permit) => return self.let_in(waits.arrival, stream, permit, family, now),
            Err(why) => why,
        };
        if may_wait && why.is_soft() {
            waits.arrival.let_go();
            waits.refused(why);
            waits.until = self.ends.map_or(waits.until, |ends| waits.until.min(ends));
            self.keep(Kept { stream, family, waits: Some(waits) }, now);
            return Ok(());
        }
        self.turn_away(stream, family, &waits.arrival, why, now);
        Err(NotTaken::Refused(why))
    }

    /// Tells one why, or closes it, soon or at once.
    fn turn_away(
        &mut self,
        stream: Accepted<StdStream>,
        family: u64,
        arrival: &Arrival,
        why: ConnectionRefusal,
        now: Instant,
    ) {
        if stream.is_deserted() {
            return;
        }
        if let Some(place) = self.replies.places.take(family, now)
            && let Some(headers) = self.gate.answer(arrival.caller(), why)
        {
            self.replies.begin(stream, &headers, place);
        } else if why.is_callers_own() {
            self.keep(Kept { stream, family, waits: None }, now);
        }
    }

    /// Tells one that cannot be identified, where nobody can: else it looks like one that a limit refuses.
    fn not_identified(
        &mut self,
        stream: Accepted<StdStream>,
        error: CredentialsError,
        now: Instant,
    ) -> NotTaken {
        if !stream.is_deserted()
            && let Some(headers) = self.gate.answer_unidentified()
        {
            match self.replies.places.take(UNIDENTIFIED, now) {
                Some(place) => self.replies.begin(stream, &headers, place),
                None => dismiss(&stream),
            }
        }
        NotTaken::Unidentified(error)
    }

    /// Keeps one for a moment. Whose place it takes is asked for once more, and then closed.
    fn keep(&mut self, one: Kept, now: Instant) {
        for Kept { stream, waits, family } in self.lingering.keep(one, now, &self.bounds) {
            let Some(RoomWaiter { arrival, .. }) = waits else { continue };
            let taken = match self.gate.admit_connection(&arrival, Attempt::Last) {
                Ok(permit) => self.let_in(arrival, stream, permit, family, now),
                Err(why) => Err(NotTaken::Refused(why)),
            };
            self.pauses_for(taken);
        }
    }

    /// One has a place at the gate. It goes in when it is its turn.
    fn let_in(
        &mut self,
        mut arrival: Arrival,
        stream: Accepted<StdStream>,
        permit: G::Permit,
        family: u64,
        now: Instant,
    ) -> Result<(), NotTaken> {
        if !peer_pidfd_is_of_the_peer()
            && let Err(error) = arrival.hold(&stream)
            && !self.gate.goes_by_user()
        {
            return Err(self.not_identified(stream, error, now));
        }
        self.entrance.wait(family, AtEntrance { arrival, family, stream, permit, since: now });
        self.have_next_go_in(now);
        Ok(())
    }

    /// Begins those whose turn it is.
    pub(super) fn have_next_go_in(&mut self, now: Instant) {
        let may_go = |one: &AtEntrance<G::Permit>| one.may_go_in(&G::holding(&one.permit), now);
        while let Some((next, goes_in)) = self.entrance.next(may_go) {
            let begun = self.begin(next, goes_in, now);
            self.pauses_for(begun);
        }
        // Memory comes back without a word.
        let held_up = self.entrance.is_waited_at() && !self.entrance.is_full();
        self.asks_again = held_up.then(|| now + ROOM_AGAIN);
    }

    fn begin(&mut self, one: AtEntrance<G::Permit>, goes_in: GoesIn, now: Instant) -> Result<(), NotTaken> {
        let AtEntrance { arrival, family, mut stream, mut permit, since } = one;
        if since != now && stream.is_deserted() {
            self.count_left();
            return Ok(());
        }
        self.gate.begins(&mut permit, &arrival, stream.as_fd());
        let by_user = self.gate.goes_by_user();
        let peer = if by_user { Ok(arrival.let_in_by_user(&stream)) } else { arrival.let_in(&stream) };
        let peer = match peer {
            Ok(peer) => Arc::new(peer),
            Err(error) => return Err(self.not_identified(stream, error, now)),
        };
        let holding = G::holding(&permit);
        peer.holds(&holding);
        if let Some(after) = peer.asked_later(&self.stats.ended) {
            stream.ask_later(after);
        }
        // Only now does the runtime hear of it.
        let stream = stream.admit(permit)?;
        let connection = Connection {
            peer: Arc::clone(&peer),
            bounds: Arc::clone(&self.bounds),
            phases: self.phase.subscribe(),
            open: OpenConnection::count(&self.stats),
            holding,
            since,
            goes_in: Some(goes_in),
            gate: Arc::clone(&self.gate),
            replies: Arc::clone(&self.replies.places),
            family,
        };
        self.connections.spawn(connection.run(stream, (self.services)(peer)));
        self.heap.grew_to(self.connections.len());
        Ok(())
    }

    /// Lets go of the listener; of one that others hold too, those who wait at it stay.
    pub(super) fn leave(&self, listener: Acceptor) {
        let listener = listener.into_inner();
        if let Closing::Careful(closers, _) = &self.closing {
            closers.close(listener.into(), AGENT, None);
        }
    }

    /// One has ended. Whoever waits for its place is asked for before others come.
    pub(super) fn ended(&mut self, ended: Result<(), tokio::task::JoinError>) {
        note_panic(ended);
        let mut places = 1;
        while let Some(ended) = self.connections.try_join_next() {
            note_panic(ended);
            places += 1;
        }
        self.heap.fell_to(self.connections.len());
        let now = Instant::now();
        for _ in 0..places.min(RUN) {
            let Some(waiting) = self.lingering.take_waiting_for_place() else { break };
            self.ask_again(waiting, now);
        }
    }

    /// No more are accepted. Those that wait do so for a moment yet.
    pub(super) fn is_told_to_end(&mut self, now: Instant) {
        let ends = now + FOR_ROOM;
        self.ends = Some(ends);
        self.lingering.hurry(ends, now, &self.bounds);
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
    Unidentified(CredentialsError),
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
