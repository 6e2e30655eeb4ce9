//! Places at the gate that are kept for callers that hold little, and who has them for how long.
//!
//! Three parts, so that none waits for what the other takes: for those that hold nothing, for those with one connection, and
//! for those with a few. A place is its owner's for [`LENT_FOR`] at least, and for good when there are others beside what is
//! kept. After that it goes to the next that finds none in its part; of those with a few, only from one that holds more. That one
//! is let in at once, while the other is being closed.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use super::{caller::CallerKey, holding::Holding, patience::FOR_PLACE};

/// What is set aside is lent for so many nanoseconds, if another needs it then.
pub(super) const LENT_FOR: u64 = FOR_PLACE.as_secs() * 1_000_000_000;
/// So many at most have lost their place and are not gone yet. Each has its descriptors still, beside those that there are
/// places for.
const MOST_LEAVING: u32 = 16;

/// For whom a part is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeptFor {
    Nothing,
    One,
    Few,
}

impl KeptFor {
    const ALL: [Self; 3] = [Self::Nothing, Self::One, Self::Few];

    /// What a connection with a place of this part is marked with.
    fn mark(self) -> u8 {
        match self {
            Self::Nothing => 1,
            Self::One => 2,
            Self::Few => 3,
        }
    }
}

/// What a connection is marked with that has lost its place.
const LEAVING: u8 = 4;

/// A place that is to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vacancy {
    /// Beside what is kept.
    Beside,
    /// A free one of this part.
    Free(KeptFor),
    /// The one that is lent at this place of its line.
    Lent(KeptFor, usize),
}

/// A connection that was let in on a place of a part.
#[derive(Clone, Debug)]
pub(super) struct LentPlace {
    pub(super) since: u64,
    pub(super) caller: CallerKey,
    pub(super) group: u64,
    pub(super) holding: Weak<Holding>,
}

#[derive(Debug, Default)]
struct LentLine {
    most: u32,
    lent: u32,
    /// These, those that were let in first before the others, and some that are no longer here.
    places: VecDeque<LentPlace>,
}

/// All places that are kept.
#[derive(Debug, Default)]
pub(super) struct LentPlaces {
    lines: [LentLine; 3],
    leaving: u32,
}

impl LentPlaces {
    /// So many are kept for those that hold nothing or one, half for each, and so many for those with a few.
    pub(super) fn keep(&mut self, reserve: u32, few: u32) {
        for (line, most) in self.lines.iter_mut().zip([reserve - reserve / 2, reserve / 2, few]) {
            line.most = most;
        }
    }

    /// How many have lost their place and are not gone yet.
    pub(super) fn leaving(&self) -> u32 {
        self.leaving
    }

    fn line(&self, part: KeptFor) -> &LentLine {
        let [nothing, one, few] = &self.lines;
        match part {
            KeptFor::Nothing => nothing,
            KeptFor::One => one,
            KeptFor::Few => few,
        }
    }

    fn line_mut(&mut self, part: KeptFor) -> &mut LentLine {
        let [nothing, one, few] = &mut self.lines;
        match part {
            KeptFor::Nothing => nothing,
            KeptFor::One => one,
            KeptFor::Few => few,
        }
    }

    /// Where so many places are taken in all, and there are `most` beside what is kept: who has had a lent one longest has one of
    /// those, if one is free.
    pub(super) fn settle(&mut self, taken: u32, most: u32) {
        loop {
            let lent: u32 = self.lines.iter().map(|line| line.lent).sum();
            if lent == 0 || taken.saturating_sub(lent) >= most {
                return;
            }
            self.forget_gone();
            let first = KeptFor::ALL
                .into_iter()
                .filter_map(|part| Some((self.line(part).places.front()?.since, part)));
            let Some((_, part)) = first.min_by_key(|(since, _)| *since) else { return };
            let line = self.line_mut(part);
            let holding = line.places.pop_front().and_then(|place| place.holding.upgrade());
            line.lent = line.lent.saturating_sub(1);
            if let Some(holding) = holding {
                holding.mark_place(0);
            }
        }
    }

    /// Those at the head of each line are here.
    fn forget_gone(&mut self) {
        for part in KeptFor::ALL {
            let line = self.line_mut(part);
            while line.places.front().is_some_and(|place| !place.is_of(part)) {
                line.places.pop_front();
            }
        }
    }

    /// A place for one of `group`, for whom `part` is. Another group gives up one that it has had for long enough if it `may_lose` it.
    pub(super) fn vacancy(
        &self,
        part: KeptFor,
        now: u64,
        group: u64,
        may_lose: impl Fn(u64) -> bool,
    ) -> Option<Vacancy> {
        let own: &[KeptFor] =
            if part == KeptFor::Nothing { &[KeptFor::Nothing, KeptFor::One] } else { &[part] };
        let free = own.iter().find(|part| self.line(**part).lent < self.line(**part).most);
        if let Some(part) = free {
            return Some(Vacancy::Free(*part));
        }
        if self.leaving >= MOST_LEAVING {
            return None;
        }
        let mut all = own
            .iter()
            .flat_map(|part| self.line(*part).places.iter().enumerate().zip(std::iter::repeat(*part)));
        let found = all.find(|((_, place), part)| {
            now.saturating_sub(place.since) >= LENT_FOR
                && place.goes_if_told(*part)
                && place.group != group
                && may_lose(place.group)
        });
        found.map(|((at, _), part)| Vacancy::Lent(part, at))
    }

    /// Takes the one that is lent back, which is to be closed.
    pub(super) fn take_back(&mut self, part: KeptFor, at: usize) -> Option<LentPlace> {
        let line = self.line_mut(part);
        let place = line.places.remove(at)?;
        line.lent = line.lent.saturating_sub(1);
        if let Some(holding) = place.holding.upgrade() {
            holding.mark_place(LEAVING);
            self.leaving += 1;
        }
        Some(place)
    }

    /// One was let in on a place of this part.
    pub(super) fn lend(&mut self, part: KeptFor, place: LentPlace) {
        let line = self.line_mut(part);
        if let Some(holding) = place.holding.upgrade() {
            holding.mark_place(part.mark());
            line.lent += 1;
        }
        // Those that have ended are forgotten now and then, whoever stays before them.
        if line.places.len() >= usize::try_from(line.most).unwrap_or(usize::MAX).saturating_mul(4) {
            line.places.retain(|place| place.is_of(part));
        }
        line.places.push_back(place);
    }

    /// One is gone, wherever it had its place.
    pub(super) fn gone(&mut self, holding: &Arc<Holding>) {
        let mark = holding.mark_place(0);
        if mark == LEAVING {
            self.leaving = self.leaving.saturating_sub(1);
        }
        for part in KeptFor::ALL {
            if part.mark() == mark {
                let line = self.line_mut(part);
                line.lent = line.lent.saturating_sub(1);
            }
        }
    }
}

impl LentPlace {
    /// Whether it is still lent, and is not one that stays for what it holds of memory, told or not: that would keep a descriptor
    /// of those that are leaving.
    fn goes_if_told(&self, part: KeptFor) -> bool {
        self.is_of(part) && self.holding.upgrade().is_some_and(|holding| !holding.is_above_share())
    }

    /// Whether it is still lent, of this part.
    fn is_of(&self, part: KeptFor) -> bool {
        self.holding.upgrade().is_some_and(|holding| holding.place_mark() == part.mark())
    }
}
