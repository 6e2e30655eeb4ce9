//! What becomes of a connection that speaks HTTP/2: how long it may wait for what, and what it was told. No
//! I/O here, and the time is an argument.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    bounds::ConnectionBounds,
    end::ConnectionEnd,
    pauses::Pauses,
    turns::{Look, Turns},
    wire::Ending,
};
use crate::limits::holding::Notice;

/// How often a connection looks at its own clocks.
pub(super) const TICK: Duration = Duration::from_secs(10);

/// How long a connection lives before the agent watches its process: one that is opened for a single call is gone
/// by then and never pays for the watch.
const WATCH_AFTER: Duration = Duration::from_secs(1);

/// After a read that was short what is there is looked at again, heard of or not: bytes of another writer may stand behind it.
/// At once, if that was not done for so long, and so much later otherwise: a wake of its own costs a quiet connection more
/// than a system call, and a busy one has many reads between two wakes.
const READ_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// How long a connection that was told to end may take for it.
const FAREWELL: Duration = Duration::from_secs(1);

/// How often one looks, as the agent ends, whether what the agent does for it is done.
const DRAIN_TICK: Duration = Duration::from_millis(250);

/// How long one that was told to come back may take for it: what is being answered is.
const LEAVE: Duration = Duration::from_secs(3);

/// What a connection was told.
#[derive(Clone, Copy, Debug)]
enum Farewell {
    /// Nothing: it goes on.
    Unsaid,
    /// To end with the last of its requests: one that crosses it is served to its end.
    Said { why: ConnectionEnd, since: Instant },
    /// The same, since the agent ends. What the agent has to do is done as long as the drain lasts; for the peer nobody waits
    /// longer than a farewell takes in all, since others cannot connect meanwhile, nor for what it asks after it was told.
    Drains,
    /// To come back on another. At `cut_at` it is cut, whatever it has then.
    SentAway { why: ConnectionEnd, cut_at: Instant },
    /// That it is not heard any more, and to end. At `cut_at` it is cut, whatever it has then.
    Unheard { cut_at: Instant },
}

/// What is to be done with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    GoesOn,
    /// A GOAWAY, so that a client that is about to call opens another connection and repeats.
    SayFarewell,
    /// The same, and its streams are ended.
    SendAway,
    /// It is closed at once.
    Cut(ConnectionEnd),
}

/// The course of one connection.
pub(super) struct Course {
    bounds: Arc<ConnectionBounds>,
    turns: Arc<Turns>,
    pauses: Arc<Pauses>,
    handshake_by: Instant,
    /// From then on its process is watched.
    watch_at: Instant,
    /// When what is there is looked at again, heard of or not.
    read_again_at: Option<Instant>,
    /// When it was last.
    read_again: Instant,
    farewell: Farewell,
}

impl Course {
    pub(super) fn new(
        bounds: &Arc<ConnectionBounds>,
        turns: &Arc<Turns>,
        pauses: &Arc<Pauses>,
        born: Instant,
        handshake_by: Instant,
    ) -> Self {
        Self {
            bounds: Arc::clone(bounds),
            turns: Arc::clone(turns),
            pauses: Arc::clone(pauses),
            handshake_by,
            watch_at: born + WATCH_AFTER,
            read_again_at: Some(born + READ_AGAIN_AFTER),
            read_again: born,
            farewell: Farewell::Unsaid,
        }
    }

    /// Whether its process is to be watched.
    pub(super) fn watches(&self, now: Instant) -> bool {
        now >= self.watch_at
    }

    /// A read was short. Returns whether to read again at once; it is done later otherwise.
    pub(super) fn read_short(&mut self, now: Instant) -> bool {
        if now >= self.read_again + READ_AGAIN_AFTER {
            (self.read_again, self.read_again_at) = (now, None);
            return true;
        }
        self.read_again_at.get_or_insert(now + READ_AGAIN_AFTER);
        false
    }

    /// Whether it is known that a read was short.
    pub(super) fn reads_again(&self) -> bool {
        self.read_again_at.is_some()
    }

    /// Looks at what the connection waits for.
    pub(super) fn look(&mut self, now: Instant) -> Verdict {
        let look = self.turns.look();
        (self.read_again, self.read_again_at) = (now, self.read_again_at.filter(|at| now < *at));
        let enough = self.pauses.go_on(now);
        if let (Some(cut_at), Some(why)) = (self.cut_at(look), self.why())
            && now >= cut_at
        {
            return Verdict::Cut(why);
        }
        match self.farewell {
            Farewell::Unheard { .. } | Farewell::SentAway { .. } => return Verdict::GoesOn,
            Farewell::Unsaid | Farewell::Said { .. } if enough => {
                return self.send_away(ConnectionEnd::Wasteful, now);
            }
            Farewell::Unsaid | Farewell::Said { .. } | Farewell::Drains => {}
        }
        let due = match look {
            Look::NoRequestYet => (now >= self.handshake_by).then_some(ConnectionEnd::HandshakeTimeout),
            Look::Busy { since } if now >= since + self.bounds.stall_timeout => {
                return Verdict::Cut(ConnectionEnd::Stalled);
            }
            Look::Idle { since } => self
                .bounds
                .idle_timeout
                .is_some_and(|idle| now >= since + idle)
                .then_some(ConnectionEnd::Idle),
            Look::Busy { .. } | Look::Open => None,
        };
        match (due, self.farewell) {
            (Some(why), Farewell::Unsaid) => {
                self.farewell = Farewell::Said { why, since: now };
                Verdict::SayFarewell
            }
            _ => Verdict::GoesOn,
        }
    }

    /// When to look again.
    pub(super) fn next_look(&self, now: Instant) -> Instant {
        let mut next = now + TICK;
        let watch_at = Some(self.watch_at).filter(|at| *at > now);
        for at in [watch_at, self.read_again_at, self.pauses.until()].into_iter().flatten() {
            next = next.min(at);
        }
        let look = self.turns.look();
        match (look, self.bounds.idle_timeout) {
            (Look::NoRequestYet, _) if self.handshake_by > now => next = next.min(self.handshake_by),
            (Look::Idle { since }, Some(idle)) => next = next.min((since + idle).max(now + WATCH_AFTER)),
            _ => {}
        }
        match self.cut_at(look) {
            Some(cut_at) => next.min(cut_at),
            None if self.drains() => next.min(now + DRAIN_TICK),
            None => next,
        }
    }

    /// When it is cut, if nothing comes between.
    fn cut_at(&self, look: Look) -> Option<Instant> {
        match (self.farewell, look) {
            (Farewell::SentAway { cut_at, .. } | Farewell::Unheard { cut_at }, _) => Some(cut_at),
            (Farewell::Drains, _) => self.turns.peer_has_until(),
            (Farewell::Said { since, .. }, Look::NoRequestYet) => Some(since + FAREWELL),
            (Farewell::Said { since, .. }, Look::Idle { since: idle }) => Some(since.max(idle) + FAREWELL),
            (Farewell::Said { .. }, Look::Busy { .. } | Look::Open) | (Farewell::Unsaid, _) => None,
        }
    }

    /// The agent drains: it is told to end with the last of its requests.
    pub(super) fn drain(&mut self, now: Instant) -> Verdict {
        self.turns.end_begins(now, FAREWELL);
        self.farewell = Farewell::Drains;
        Verdict::SayFarewell
    }

    /// What the node has to say to it.
    pub(super) fn told(&mut self, notice: Notice, now: Instant) -> Verdict {
        match notice {
            Notice::Close => Verdict::Cut(ConnectionEnd::Evicted),
            Notice::ComeBack if self.is_unheard() || self.drains() => Verdict::GoesOn,
            Notice::ComeBack => self.send_away(ConnectionEnd::SentAway, now),
        }
    }

    /// It is told to come back on another: its streams end, and what is left after a few seconds is cut.
    fn send_away(&mut self, why: ConnectionEnd, now: Instant) -> Verdict {
        self.farewell = Farewell::SentAway { why, cut_at: now + LEAVE };
        Verdict::SendAway
    }

    /// Somebody else has written on it: its client was told so, and what it was asked before is answered for as long
    /// as a farewell takes.
    pub(super) fn unheard(&mut self, now: Instant) -> Verdict {
        self.farewell = Farewell::Unheard { cut_at: now + FAREWELL };
        Verdict::GoesOn
    }

    /// Whether it is not heard any more.
    pub(super) fn is_unheard(&self) -> bool {
        matches!(self.farewell, Farewell::Unheard { .. })
    }

    /// Whether it was told that the agent drains.
    pub(super) fn drains(&self) -> bool {
        matches!(self.farewell, Farewell::Drains)
    }

    fn why(&self) -> Option<ConnectionEnd> {
        match self.farewell {
            Farewell::Unsaid => None,
            Farewell::Said { why, .. } | Farewell::SentAway { why, .. } => Some(why),
            Farewell::Drains => Some(ConnectionEnd::Drained),
            Farewell::Unheard { .. } => Some(ConnectionEnd::AnotherWriter),
        }
    }

    /// Why it ended, when HTTP/2 is `done` with it.
    pub(super) fn ended(&self, done: Result<(), hyper::Error>, ending: &Ending) -> ConnectionEnd {
        match (done, self.why()) {
            _ if ending.flooded() => ConnectionEnd::Flood,
            _ if ending.descriptors() => ConnectionEnd::Descriptors,
            // Told to end, and it did; that the peer then closed its side first is the same.
            (Ok(()), Some(why)) => why,
            (Err(_), Some(why)) if ending.by_peer() => why,
            (Ok(()), None) => ConnectionEnd::ByPeer,
            (Err(err), _) if err.is_timeout() => ConnectionEnd::KeepAlive,
            (Err(_), _) if ending.by_peer() => ConnectionEnd::ByPeer,
            (Err(_), _) => ConnectionEnd::Protocol,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use tokio::time::{sleep, sleep_until};

    use super::*;
    use crate::peer::turns::{Part, Turn, Upload};

    fn course(turns: &Arc<Turns>, born: Instant, handshake_by: Instant) -> Course {
        Course::new(&Arc::default(), turns, turns.pauses(), born, handshake_by)
    }

    #[test]
    fn one_that_was_sent_away_is_cut_after_a_few_seconds_whatever_it_has() {
        let turns = Arc::new(Turns::default());
        let start = Instant::now();
        let mut course = course(&turns, start, start);
        let request = Turn::begin(&turns);
        assert_eq!(course.told(Notice::ComeBack, start), Verdict::SendAway);
        assert_eq!(course.look(start + WATCH_AFTER), Verdict::GoesOn);
        let cut = start + LEAVE;
        assert_eq!(course.next_look(start + WATCH_AFTER), cut);
        assert_eq!(course.look(cut - Duration::from_millis(1)), Verdict::GoesOn);
        assert_eq!(course.look(cut), Verdict::Cut(ConnectionEnd::SentAway));
        drop(request);
    }

    /// As the agent ends, what it has to do is done; what waits for the peer, or for nothing, is not waited for.
    #[test]
    fn a_drain_waits_for_the_agent_and_not_for_the_peer() {
        let start = Instant::now();
        let late = start + FAREWELL;
        for (case, begins, awaits_peer, cut) in [
            ("nothing came", false, false, true),
            ("a request that is being answered", true, false, false),
            ("one whose rest is missing", true, true, true),
        ] {
            let turns = Arc::new(Turns::default());
            let mut course = course(&turns, start, start + TICK);
            let request = begins.then(|| Turn::begin(&turns));
            let mut upload = request.as_ref().filter(|_| awaits_peer).map(Turn::upload);
            assert!(upload.as_mut().is_none_or(|upload| upload.waits(10).is_ok()), "{case}");
            let told = Instant::now();
            assert_eq!(course.drain(told), Verdict::SayFarewell, "{case}");
            assert_eq!(course.look(late - Duration::from_millis(1)), Verdict::GoesOn, "{case}");
            assert!(course.next_look(told) <= told + FAREWELL, "{case}");
            let then = if cut { Verdict::Cut(ConnectionEnd::Drained) } else { Verdict::GoesOn };
            assert_eq!(course.look(told + FAREWELL), then, "{case}");
            drop((upload, request));
        }
    }

    /// What a client begins that does not listen holds up nothing, and what it began before is done.
    #[test]
    fn a_drain_waits_for_nothing_that_begins_later() {
        #[derive(Clone, Copy)]
        enum Before {
            Nothing,
            Answered,
            AwaitsPeer,
            AwaitsAgent,
        }
        let start = Instant::now();
        for (case, before, later, cut) in [
            ("a new connection's first", Before::Nothing, 1, false),
            ("and a second", Before::Nothing, 2, false),
            ("after one that was answered", Before::Answered, 1, true),
            ("beside one whose rest is missing", Before::AwaitsPeer, 1, true),
            ("beside one that is being answered", Before::AwaitsAgent, 1, false),
            ("and others", Before::AwaitsAgent, 2, false),
        ] {
            let turns = Arc::new(Turns::default());
            let mut course = course(&turns, start, start + TICK);
            let mut request = (!matches!(before, Before::Nothing)).then(|| Turn::begin(&turns));
            let mut upload =
                request.as_ref().filter(|_| matches!(before, Before::AwaitsPeer)).map(Turn::upload);
            assert!(upload.as_mut().is_none_or(|upload| upload.waits(10).is_ok()), "{case}");
            if matches!(before, Before::Answered) {
                request = None;
            }
            let told = Instant::now();
            course.drain(told);
            let mut others: Vec<Turn> = (0..later).map(|_| Turn::begin(&turns)).collect();
            let due = told + FAREWELL;
            assert_eq!(course.next_look(told), due.min(start + READ_AGAIN_AFTER), "{case}");
            assert_eq!(course.look(due - Duration::from_millis(1)), Verdict::GoesOn, "{case}");
            let then = if cut { Verdict::Cut(ConnectionEnd::Drained) } else { Verdict::GoesOn };
            assert_eq!(course.look(due), then, "{case}");
            if !cut {
                // That one ends, and the others are still being answered, or begin and end again and again.
                drop(if request.is_some() { request.take() } else { Some(others.remove(0)) });
                let ended = Instant::now();
                others.push(Turn::begin(&turns));
                assert_eq!(course.look(ended + FAREWELL), Verdict::Cut(ConnectionEnd::Drained), "{case}");
            }
            drop((upload, request, others));
        }
    }

    /// Whatever a peer does one after the other, it has a second for all of it; what the agent does meanwhile takes none of that.
    #[tokio::test(start_paused = true)]
    async fn a_drain_waits_for_all_steps_of_a_peer_as_long_as_for_one() {
        const GAP: Duration = Duration::from_millis(300);
        #[derive(Clone, Copy)]
        enum Step {
            /// Sends the rest of a request.
            Completes,
            /// Reads answers until another may be made.
            Reads,
        }
        for (case, step, work, cut) in [
            ("it completes requests", Step::Completes, 0, 1_000),
            ("those take a while, and the third is too late", Step::Completes, 90, 1_180),
            ("the first takes long, and the second is too late", Step::Completes, 2_000, 3_000),
            ("it reads answers", Step::Reads, 0, 1_000),
            ("the next ones take a while", Step::Reads, 90, 1_270),
        ] {
            let turns = Arc::new(Turns::default());
            let start = Instant::now();
            let mut course = course(&turns, start, start + TICK);
            let mut requests: Vec<(Turn, Upload)> = (0..20)
                .map(|_| {
                    let turn = Turn::begin(&turns);
                    let upload = turn.upload();
                    (turn, upload)
                })
                .collect();
            let cx = || Context::from_waker(Waker::noop());
            let answer = |mut turn: Turn| (turn.part(vec![0; 10_000].into()), turn);
            let mut unread: Vec<(Part, Turn)> = Vec::new();
            match step {
                Step::Completes => requests.iter_mut().for_each(|(_, upload)| upload.waits(10).unwrap()),
                Step::Reads => {
                    while requests[0].0.poll_begin(&cx()).is_ready() {
                        unread.push(answer(requests.remove(0).0));
                    }
                }
            }
            course.drain(start);
            let ends = async {
                loop {
                    sleep_until(course.next_look(Instant::now())).await;
                    if let Verdict::Cut(why) = course.look(Instant::now()) {
                        return (why, start.elapsed());
                    }
                }
            };
            let steps = async {
                for (mut turn, mut upload) in requests {
                    sleep(GAP).await;
                    while turn.poll_begin(&cx()).is_pending() {
                        drop(unread.remove(0));
                    }
                    assert!(upload.poll_goes_on(&cx()).is_ready(), "{case}");
                    upload.is_read_whole(0);
                    sleep(Duration::from_millis(work)).await;
                    unread.push(answer(turn));
                }
                panic!("{case}: it was waited for");
            };
            let ended = tokio::select! {
                ended = ends => ended,
                ended = steps => ended,
            };
            assert_eq!(ended, (ConnectionEnd::Drained, Duration::from_millis(cut)), "{case}");
        }
    }

    /// Who has to go for its waste is going already, and is not told anew.
    #[test]
    fn waste_makes_no_drain_longer() {
        let turns = Arc::new(Turns::default());
        let start = Instant::now();
        let mut course = course(&turns, start, start + 10 * TICK);
        let told = start + 2 * TICK;
        turns.pauses().wasted_all_the_time(start, told);
        course.drain(told);
        assert_eq!(course.look(told), Verdict::GoesOn);
        assert!(course.drains());
        assert_eq!(course.look(told + FAREWELL), Verdict::Cut(ConnectionEnd::Drained));
    }

    #[test]
    fn what_is_there_is_looked_at_again_at_once_or_soon() {
        let turns = Arc::new(Turns::default());
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut course = course(&turns, start, at(10_000));
        // New, it is looked at anyway.
        assert!(!course.read_short(at(10)) && course.reads_again());
        assert_eq!(course.look(at(50)), Verdict::GoesOn);
        assert!(!course.reads_again());
        for (read, at_once) in [(500, true), (520, false), (1000, true), (1049, false)] {
            assert_eq!(course.read_short(at(read)), at_once, "{read}");
            assert_eq!(course.reads_again(), !at_once, "{read}");
            if !at_once {
                let next = course.next_look(at(read));
                assert!(next <= at(read) + READ_AGAIN_AFTER, "{read}");
                course.look(next);
            }
        }
    }

    #[test]
    fn a_farewell_is_said_once_and_a_request_that_crosses_it_is_served() {
        let bounds = Arc::new(ConnectionBounds::default());
        let turns = Arc::new(Turns::default());
        let start = Instant::now();
        let by = start + bounds.handshake_timeout;
        let cut = by + FAREWELL;
        for (case, crosses, then) in [
            ("silent", false, Verdict::Cut(ConnectionEnd::HandshakeTimeout)),
            ("a request crosses it", true, Verdict::GoesOn),
        ] {
            let mut course = course(&turns, start, by);
            assert_eq!(course.next_look(start), start + READ_AGAIN_AFTER, "{case}");
            assert_eq!(course.look(start + READ_AGAIN_AFTER), Verdict::GoesOn, "{case}");
            assert_eq!(course.next_look(start + READ_AGAIN_AFTER), start + WATCH_AFTER, "{case}");
            assert_eq!(course.next_look(start + WATCH_AFTER), by, "{case}");
            assert_eq!(course.look(by), Verdict::SayFarewell, "{case}");
            assert_eq!(course.next_look(by), cut, "{case}");
            assert_eq!(course.look(by), Verdict::GoesOn, "{case}");
            let request = crosses.then(|| Turn::begin(&turns));
            assert_eq!(course.look(cut), then, "{case}");
            assert_eq!(course.why(), Some(ConnectionEnd::HandshakeTimeout), "{case}");
            if crosses {
                assert_eq!(course.next_look(cut), cut + TICK, "{case}");
                drop(request);
                let over = Verdict::Cut(ConnectionEnd::HandshakeTimeout);
                assert_eq!(course.look(cut + TICK), over, "{case}, and is over");
            }
        }
    }
}
