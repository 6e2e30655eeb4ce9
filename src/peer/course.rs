//! What becomes of a connection that speaks HTTP/2: how long it may wait for what, and what it was told. No
//! I/O here, and the time is an argument.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    bounds::ConnectionBounds,
    end::ConnectionEnd,
    turns::{Look, Turns},
    wire::Ending,
};

/// How often a connection looks at its own clocks.
pub(super) const TICK: Duration = Duration::from_secs(10);

/// How long a connection lives before the agent watches its process: one that is opened for a single call is gone
/// by then and never pays for the watch.
pub(super) const WATCH_AFTER: Duration = Duration::from_secs(1);

/// How long after a read that was short what is there is looked at again, heard of or not: bytes of another writer may
/// stand behind it.
pub(super) const READ_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// How long a connection that was told to end may take for it.
const FAREWELL: Duration = Duration::from_secs(1);

/// How long one that was told to come back may take for it: what is being answered is.
const LEAVE: Duration = Duration::from_secs(3);

/// What a connection was told.
#[derive(Clone, Copy, Debug)]
enum Farewell {
    /// Nothing: it goes on.
    Unsaid,
    /// To end. At `cut_at` it is cut, if it has no request then.
    Said { why: ConnectionEnd, cut_at: Instant },
    /// To end with the last of its requests. It is not cut here: a drain cuts what is left of it.
    Final { why: ConnectionEnd },
    /// To come back on another. At `cut_at` it is cut, whatever it has then.
    SentAway { cut_at: Instant },
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
    /// It is closed at once.
    Cut(ConnectionEnd),
}

/// The course of one connection.
pub(super) struct Course {
    bounds: Arc<ConnectionBounds>,
    turns: Arc<Turns>,
    handshake_by: Instant,
    farewell: Farewell,
}

impl Course {
    pub(super) fn new(bounds: &Arc<ConnectionBounds>, turns: &Arc<Turns>, handshake_by: Instant) -> Self {
        Self {
            bounds: Arc::clone(bounds),
            turns: Arc::clone(turns),
            handshake_by,
            farewell: Farewell::Unsaid,
        }
    }

    /// When to look for the first time.
    pub(super) fn first_look(&self, born: Instant) -> Instant {
        (born + READ_AGAIN_AFTER).min(self.handshake_by)
    }

    /// Looks at what the connection waits for.
    pub(super) fn look(&mut self, now: Instant) -> Verdict {
        let look = self.turns.look();
        if let Farewell::Unheard { cut_at } | Farewell::SentAway { cut_at } = self.farewell {
            return match self.told() {
                Some(why) if now >= cut_at => Verdict::Cut(why),
                _ => Verdict::GoesOn,
            };
        }
        if let Farewell::Said { why, cut_at } = self.farewell
            && now >= cut_at
        {
            match look {
                Look::Idle { .. } | Look::NoRequestYet => return Verdict::Cut(why),
                // A request crossed the farewell: it is served to its end, and the connection ends with it.
                Look::Busy { .. } | Look::Open => self.farewell = Farewell::Final { why },
            }
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
                self.farewell = Farewell::Said { why, cut_at: now + FAREWELL };
                Verdict::SayFarewell
            }
            _ => Verdict::GoesOn,
        }
    }

    /// When to look again.
    pub(super) fn next_look(&self, now: Instant) -> Instant {
        let mut next = now + TICK;
        match (self.turns.look(), self.bounds.idle_timeout) {
            (Look::NoRequestYet, _) if self.handshake_by > now => next = next.min(self.handshake_by),
            (Look::Idle { since }, Some(idle)) => next = next.min((since + idle).max(now + WATCH_AFTER)),
            _ => {}
        }
        match self.farewell {
            Farewell::Said { cut_at, .. } | Farewell::SentAway { cut_at } | Farewell::Unheard { cut_at } => {
                next.min(cut_at)
            }
            Farewell::Unsaid | Farewell::Final { .. } => next,
        }
    }

    /// The connection is told to end with the last of its requests.
    pub(super) fn finish(&mut self, why: ConnectionEnd) {
        self.farewell = Farewell::Final { why };
    }

    /// Its process is not whom it connected as: it is told to end, and soon cut if it has no request then.
    pub(super) fn outdated(&mut self, now: Instant) {
        self.farewell = Farewell::Said { why: ConnectionEnd::AnotherWriter, cut_at: now + FAREWELL };
    }

    /// It is told to come back on another: its streams end, and what is left after a few seconds is cut.
    pub(super) fn send_away(&mut self, now: Instant) {
        self.farewell = Farewell::SentAway { cut_at: now + LEAVE };
    }

    /// Somebody else has written on it: its client was told so, and what it was asked before is answered for as long
    /// as a farewell takes.
    pub(super) fn unheard(&mut self, now: Instant) {
        self.farewell = Farewell::Unheard { cut_at: now + FAREWELL };
    }

    /// Whether it is not heard any more.
    pub(super) fn is_unheard(&self) -> bool {
        matches!(self.farewell, Farewell::Unheard { .. })
    }

    /// Whether it was told to end.
    pub(super) fn is_ending(&self) -> bool {
        self.told().is_some()
    }

    /// Whether it was told that the agent drains.
    pub(super) fn drains(&self) -> bool {
        self.told() == Some(ConnectionEnd::Drained)
    }

    fn told(&self) -> Option<ConnectionEnd> {
        match self.farewell {
            Farewell::Unsaid => None,
            Farewell::Said { why, .. } | Farewell::Final { why } => Some(why),
            Farewell::SentAway { .. } => Some(ConnectionEnd::SentAway),
            Farewell::Unheard { .. } => Some(ConnectionEnd::AnotherWriter),
        }
    }

    /// Why it ended, when HTTP/2 is `done` with it.
    pub(super) fn ended(&self, done: Result<(), hyper::Error>, ending: &Ending) -> ConnectionEnd {
        match (done, self.told()) {
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
    use super::*;
    use crate::peer::turns::Turn;

    #[test]
    fn one_that_was_sent_away_is_cut_after_a_few_seconds_whatever_it_has() {
        let turns = Arc::new(Turns::default());
        let start = Instant::now();
        let mut course = Course::new(&Arc::default(), &turns, start);
        let request = Turn::begin(&turns);
        course.send_away(start);
        let cut = start + LEAVE;
        assert_eq!(course.next_look(start), cut);
        assert_eq!(course.look(cut - Duration::from_millis(1)), Verdict::GoesOn);
        assert_eq!(course.look(cut), Verdict::Cut(ConnectionEnd::SentAway));
        drop(request);
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
            let mut course = Course::new(&bounds, &turns, by);
            assert_eq!(course.look(start), Verdict::GoesOn, "{case}");
            assert_eq!(course.next_look(start), by, "{case}");
            assert_eq!(course.look(by), Verdict::SayFarewell, "{case}");
            assert_eq!(course.next_look(by), cut, "{case}");
            assert_eq!(course.look(by), Verdict::GoesOn, "{case}");
            let request = crosses.then(|| Turn::begin(&turns));
            assert_eq!(course.look(cut), then, "{case}");
            assert_eq!(course.told(), Some(ConnectionEnd::HandshakeTimeout), "{case}");
            if crosses {
                assert_eq!(course.next_look(cut), cut + TICK, "{case}");
            }
            drop(request);
        }
    }
}
