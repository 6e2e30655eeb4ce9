//! Refused connections that are kept a moment before they are closed, and those that wait for room meanwhile.
//!
//! Connections wait to be accepted in one queue, first come, first served: a crowd that is turned away at
//! once stands in it again before anybody else has moved up. One that was refused for want of room alone may be let in
//! when its time is over, or as soon as there is room.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::unix::net::UnixStream,
};

use tokio::time::Instant;

use super::{accepted::Accepted, bounds::ConnectionBounds, connection::ROOM_AGAIN, credentials::Arrival};
use crate::limits::{
    ConnectionRefusal,
    patience::{FOR_PLACE, FOR_ROOM},
};

/// While fewer wait, the first of each family is asked for as often as who waits at the entrance: memory comes back without a word.
const OFTEN_ASKED: usize = 64;

/// One of those that are kept.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) stream: Accepted<UnixStream>,
    pub(super) family: u64,
    /// `None` for one that is refused for good.
    pub(super) waits: Option<RoomWaiter>,
}

/// What is known of one that waits for room.
#[derive(Debug)]
pub(super) struct RoomWaiter {
    pub(super) arrival: Arrival,
    pub(super) since: Instant,
    /// Then it has waited long enough.
    pub(super) until: Instant,
    /// It was refused, and waits for room since then.
    pub(super) waited: bool,
    /// It waits for somebody else to leave.
    pub(super) for_place: bool,
    /// It was asked for as there was room, in vain: after that only when it is due.
    pub(super) asked: bool,
}

/// When one is due, with a number, as many may be at one time.
type Due = (Instant, u32);

/// Connections that were refused, by when each is closed or asked for again. Nothing is read from them, and the runtime
/// does not know them: a descriptor or two each, and a bounded number. Once they are as many as may be, one more takes the
/// place of one of the family that has the most.
#[derive(Debug, Default)]
pub(super) struct Lingering {
    kept: BTreeMap<Due, (Kept, Option<Rank>)>,
    /// Without those that have none here.
    families: HashMap<u64, BTreeSet<Due>, ahash::RandomState>,
    /// Those that are asked for when there is room: families take turns.
    turns: BTreeMap<Rank, Due>,
    /// The same, when somebody has left.
    place_turns: BTreeMap<Rank, Due>,
    descriptors: usize,
    /// How many wait for room.
    waiters: usize,
    numbered: u32,
}

/// How many of its family wait before it, and its number.
type Rank = (usize, u32);

impl RoomWaiter {
    /// One that was accepted now.
    pub(super) fn new(arrival: Arrival, now: Instant) -> Self {
        Self { arrival, since: now, until: now + FOR_ROOM, waited: false, for_place: false, asked: false }
    }

    /// It was refused for this, for want of room.
    pub(super) fn refused(&mut self, why: ConnectionRefusal) {
        self.waited = true;
        self.for_place = why == ConnectionRefusal::NodeConnections;
        if self.for_place {
            self.until = self.since + FOR_PLACE;
        }
    }
}

impl Kept {
    fn descriptors(&self) -> usize {
        let held = self.waits.as_ref().is_some_and(|waits| waits.arrival.holds_process());
        1 + usize::from(held)
    }
}

impl Lingering {
    /// Keeps one for as long as the bounds say: between half of that time and one and a half, spread evenly, so that
    /// those who came together do not come back together. Returns those whose place is needed, this one perhaps.
    pub(super) fn keep(&mut self, one: Kept, now: Instant, bounds: &ConnectionBounds) -> Vec<Kept> {
        /// 2^32 divided by the golden ratio: its multiples fall into the widest gap each time.
        const STEP: u32 = 2_654_435_769;
        let most = usize::try_from(bounds.max_lingering).unwrap_or(usize::MAX);
        let needs = one.descriptors();
        if bounds.linger.is_zero() || most < needs {
            return vec![one];
        }
        let mut gone = Vec::new();
        while self.descriptors + needs > most {
            gone.extend(self.first_of_the_most(one.family));
        }
        self.numbered = self.numbered.wrapping_add(1);
        let part = f64::from(self.numbered.wrapping_mul(STEP)) / f64::from(u32::MAX);
        let mut due = now + bounds.linger.mul_f64(0.5 + part);
        if let Some(waits) = &one.waits {
            due = due.min(waits.until);
        }
        let family = self.families.entry(one.family).or_default();
        if one.waits.is_some() && family.is_empty() && self.waiters < OFTEN_ASKED {
            due = due.min(now + ROOM_AGAIN);
        }
        let due = (due, self.numbered);
        let turn = one.waits.as_ref().map(|_| (family.len(), self.numbered));
        family.insert(due);
        if let (Some(turn), Some(waits)) = (turn, &one.waits) {
            if !waits.asked {
                self.turns.insert(turn, due);
            }
            if waits.for_place {
                self.place_turns.insert(turn, due);
            }
        }
        self.descriptors += needs;
        self.waiters += usize::from(one.waits.is_some());
        self.kept.insert(due, (one, turn));
        gone
    }

    /// When one is due next.
    pub(super) fn due(&self) -> Option<Instant> {
        self.kept.first_key_value().map(|((due, _), _)| *due)
    }

    /// Takes one whose time is over.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Kept> {
        let (due, _) = self.kept.first_key_value()?;
        let due = *due;
        if due.0 <= now { self.take(due) } else { None }
    }

    /// Whether some are to be asked for at all.
    pub(super) fn is_waited_in(&self) -> bool {
        self.waiters > 0
    }

    /// Whether some are to be asked for when there is room.
    pub(super) fn wait(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Takes the one of them whose turn it is.
    pub(super) fn take_waiting(&mut self) -> Option<Kept> {
        let (_, due) = self.turns.first_key_value()?;
        self.take(*due)
    }

    /// Takes the one that waits for somebody to leave whose turn it is.
    pub(super) fn take_waiting_for_place(&mut self) -> Option<Kept> {
        let (_, due) = self.place_turns.first_key_value()?;
        self.take(*due)
    }

    /// None waits longer than until then.
    pub(super) fn hurry(&mut self, until: Instant, now: Instant, bounds: &ConnectionBounds) {
        let all = std::mem::take(self);
        self.numbered = all.numbered;
        for (mut one, _) in all.kept.into_values() {
            one.waits.iter_mut().for_each(|waits| waits.until = waits.until.min(until));
            // They were no more before.
            drop(self.keep(one, now, bounds));
        }
    }

    /// Takes the one that is due next of the family that has the most; of `own`, where others have no more.
    fn first_of_the_most(&mut self, own: u64) -> Option<Kept> {
        let most = self.families.iter().max_by_key(|(family, dues)| (dues.len(), **family == own));
        let due = *most?.1.first()?;
        self.take(due)
    }

    fn take(&mut self, due: Due) -> Option<Kept> {
        let (one, turn) = self.kept.remove(&due)?;
        if let Some(dues) = self.families.get_mut(&one.family) {
            dues.remove(&due);
            if dues.is_empty() {
                self.families.remove(&one.family);
            }
        }
        if let Some(turn) = turn {
            self.turns.remove(&turn);
            self.place_turns.remove(&turn);
        }
        self.descriptors -= one.descriptors();
        self.waiters -= usize::from(one.waits.is_some());
        Some(one)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::peer::{accepted::Closing, credentials::OsUid};

    fn one(family: u64, until: Option<Instant>) -> Kept {
        let (stream, _other) = UnixStream::pair().unwrap();
        let arrival = Arrival::at(&stream, &OsUid).unwrap();
        let stream = Accepted::new(stream, &Closing::Plain).unwrap();
        let waits = until.map(|until| RoomWaiter { until, ..RoomWaiter::new(arrival, Instant::now()) });
        Kept { stream, family, waits }
    }

    fn at_most(most: u32) -> ConnectionBounds {
        ConnectionBounds { max_lingering: most, ..ConnectionBounds::default() }
    }

    #[test]
    fn families_take_turns() {
        let (now, mut lingering) = (Instant::now(), Lingering::default());
        for family in [7, 7, 7, 8, 7, 9] {
            assert!(lingering.keep(one(family, Some(now + FOR_ROOM)), now, &at_most(10)).is_empty());
        }
        assert!(lingering.keep(one(6, None), now, &at_most(10)).is_empty());
        let order: Vec<u64> = std::iter::from_fn(|| lingering.take_waiting()).map(|it| it.family).collect();
        assert_eq!(order, [7, 8, 9, 7, 7, 7], "and one that is refused for good has none");
        assert_eq!(lingering.kept.len(), 1);
    }

    #[test]
    fn whoever_has_the_most_makes_room() {
        let (now, mut lingering) = (Instant::now(), Lingering::default());
        let mut gone = Vec::new();
        for family in [1, 1, 1, 2, 1, 3, 3, 2] {
            gone.extend(lingering.keep(one(family, None), now, &at_most(4)).iter().map(|it| it.family));
        }
        assert_eq!(gone, [1, 1, 1, 3], "of 1, 1, 1, 2, then 1, 1, 2, 3, then 1, 2, 3, 3");
    }

    /// One that was asked for in vain as there was room is asked for again when somebody leaves, and none after the end.
    #[test]
    fn who_waits_for_a_place_has_its_turn_when_somebody_leaves() {
        let (now, mut lingering) = (Instant::now(), Lingering::default());
        let bounds = ConnectionBounds { linger: Duration::from_secs(1), ..at_most(100) };
        for (family, why) in [
            (7, ConnectionRefusal::Memory),
            (7, ConnectionRefusal::NodeConnections),
            (8, ConnectionRefusal::NodeConnections),
        ] {
            let mut one = one(family, Some(now + FOR_ROOM));
            one.waits.iter_mut().for_each(|waits| {
                waits.refused(why);
                waits.asked = true;
            });
            assert!(lingering.keep(one, now, &bounds).is_empty());
        }
        assert!(lingering.take_waiting().is_none());
        lingering.hurry(now + Duration::from_secs(1), now, &bounds);
        let order: Vec<_> = std::iter::from_fn(|| lingering.take_waiting_for_place())
            .map(|it| (it.family, it.waits.map(|waits| waits.until <= now + Duration::from_secs(1))))
            .collect();
        assert_eq!(order, [(8, Some(true)), (7, Some(true))]);
        assert!(lingering.take_due(now + FOR_ROOM).is_some() && !lingering.is_waited_in());
    }

    /// Of a crowd that waits the first alone, and of many that do none.
    #[test]
    fn the_first_of_a_family_is_asked_for_often() {
        let (now, mut lingering) = (Instant::now(), Lingering::default());
        let soon = |lingering: &mut Lingering| {
            std::iter::from_fn(|| lingering.take_due(now + ROOM_AGAIN))
                .map(|it| it.family)
                .collect::<Vec<_>>()
        };
        for family in [7, 7, 7, 8] {
            assert!(lingering.keep(one(family, Some(now + FOR_ROOM)), now, &at_most(500)).is_empty());
        }
        assert!(lingering.keep(one(9, None), now, &at_most(500)).is_empty(), "refused for good");
        assert_eq!(soon(&mut lingering), [7, 8]);
        for family in 0..200 {
            assert!(lingering.keep(one(family, Some(now + FOR_ROOM)), now, &at_most(500)).is_empty());
        }
        assert!(soon(&mut lingering).len() <= OFTEN_ASKED);
    }

    #[test]
    fn nobody_waits_longer_than_it_may() {
        let (now, mut lingering) = (Instant::now(), Lingering::default());
        let bounds = ConnectionBounds { linger: Duration::from_secs(1), ..at_most(100) };
        for _ in 0..50 {
            assert!(lingering.keep(one(1, Some(now + FOR_ROOM)), now, &bounds).is_empty());
        }
        let taken = std::iter::from_fn(|| lingering.take_due(now + FOR_ROOM)).count();
        assert_eq!((taken, lingering.due()), (50, None));
    }

    proptest! {
        /// Whatever comes and goes: no more than may be, and nothing is left behind of those that have gone.
        #[test]
        fn the_books_agree(steps in vec((0u64..4, any::<bool>(), 0u8..6), 1..60)) {
            let (mut now, mut lingering) = (Instant::now(), Lingering::default());
            let (mut came, mut went) = (0, 0);
            for (family, waits, step) in steps {
                match step {
                    4 => lingering.hurry(now + FOR_ROOM / 2, now, &at_most(8)),
                    5 => went += usize::from(lingering.take_waiting_for_place().is_some()),
                    0 => went += usize::from(lingering.take_waiting().is_some()),
                    1 => {
                        now += Duration::from_millis(60);
                        went += std::iter::from_fn(|| lingering.take_due(now)).count();
                    }
                    _ => {
                        came += 1;
                        let mut one = one(family, waits.then(|| now + FOR_ROOM));
                        if family > 1 {
                            one.waits.iter_mut().for_each(|waits| waits.for_place = true);
                        }
                        went += lingering.keep(one, now, &at_most(8)).len();
                    }
                }
                let of_families: usize = lingering.families.values().map(BTreeSet::len).sum();
                prop_assert_eq!(came - went, lingering.kept.len());
                prop_assert_eq!(of_families, lingering.kept.len());
                prop_assert!(lingering.descriptors <= 8 && lingering.turns.len() <= lingering.kept.len());
                let turns = lingering.turns.values().chain(lingering.place_turns.values());
                prop_assert!(turns.clone().all(|due| lingering.kept.contains_key(due)));
            }
            while lingering.take_due(now + FOR_ROOM).is_some() {}
            prop_assert!(lingering.families.is_empty() && lingering.turns.is_empty() && lingering.descriptors == 0);
            prop_assert!(!lingering.is_waited_in() && lingering.place_turns.is_empty());
        }
    }
}
