//! How short something is that all callers share, bytes or connections, and what the share of one of them is.
//!
//! Nobody is refused for it while there is room. Without room, each may hold as much as fits were nobody to hold more:
//! the *level* of [`accounts`](super::accounts). Whoever holds less than the least share there is, is never asked to give
//! up anything. Pure: what is there, and what is held, are arguments.

use super::budget::{MemorySettings, Pressure};

/// What there is, and how much of it is taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shortage {
    /// When it is short, in percent.
    pub(super) steps: MemorySettings,
    /// What there is.
    pub(super) whole: u64,
    /// What is taken by other things than connections.
    pub(super) other: u64,
    /// What of it is for nobody.
    pub(super) spare: u64,
    /// What is set aside, beside that, for those who hold nothing.
    pub(super) reserved: u64,
    /// What is set aside is for nobody else, and more than there is cannot be taken: so it is with connections, not with bytes.
    pub(super) firm: bool,
    /// What a share is at least.
    pub(super) least: u64,
    /// Somebody below its share was refused for what others hold, since these were last told to go.
    pub(super) wanted: bool,
    /// Until when somebody waits for it who was.
    pub(super) wanted_until: u64,
    pressure: Pressure,
    /// What one may hold; only asked while it is short.
    share: u64,
    /// What was used then.
    looked_at: u64,
    /// From where on it is to be looked at again, by what is held.
    look_from: u64,
}

/// Shares are reckoned anew when so much of the whole, one part in so many, was taken since.
const STEP: u64 = 128;
/// What is firm begins to be short before all is taken that is not set aside, by one part of that in so many; and by the least share of
/// one more caller, but for no more than one part of what is beside that.
const FIRM_PART: u64 = 16;
const FIRM_LEAST_PART: u64 = 3;

/// How far connections are told to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Down to this, each of those above it.
    pub(super) level: u64,
    /// Down to this, all together, where not only those above their share go.
    pub(super) target: u64,
}

impl Shortage {
    /// Looks anew, where connections hold `held`. `level` is the highest that all can have, when they may have so much
    /// together.
    pub(super) fn look(&mut self, held: u64, level: impl FnOnce(u64) -> u64) {
        let used = self.used(held);
        self.pressure = self.pressure_at(used);
        self.looked_at = used;
        self.share = u64::MAX;
        if self.is_short() {
            // What is on the line is short already.
            self.share = level(self.bounds().0.saturating_sub(1)).max(self.least);
        }
        let line = self.bounds().0;
        self.look_from =
            if self.is_short() { held.saturating_add(self.whole / STEP).max(line) } else { line };
    }

    /// From where on it is to be looked at again, by what is held.
    pub(super) fn look_from(&self) -> u64 {
        self.look_from
    }

    /// Whether it was looked at too long ago, by what is held meanwhile.
    pub(super) fn is_outdated(&self, held: u64) -> bool {
        held >= self.look_from()
    }

    /// What is taken in all.
    pub(super) fn used(&self, held: u64) -> u64 {
        self.other.saturating_add(held)
    }

    pub(super) fn pressure(&self) -> Pressure {
        self.pressure
    }

    /// How short it is where so much is used. A step is left only below where it began: what comes and goes around a line
    /// would else open and shut the door all the time.
    fn pressure_at(&self, used: u64) -> Pressure {
        let reached = |step: &Pressure| {
            let (from, below) = self.lines(*step);
            let wanted = self.wanted && *step == Pressure::RefuseNew;
            used >= if self.pressure >= *step || wanted { below } else { from }
        };
        let steps = [Pressure::CloseHeaviest, Pressure::RefuseNew, Pressure::ShrinkCaches];
        steps.into_iter().find(reached).unwrap_or_default()
    }

    /// Where a step begins, and below what it ends again, by what is used. Whatever the step is in percent, those who hold more
    /// than their share are told to go once a quarter of what is set aside for others is taken, and so many that all of it is
    /// free again. A crowd of which nobody does is not closed for that: who is closed comes back, and takes more than it gave. Of what
    /// others cannot take at all, they are told so at the latest when all else is taken.
    fn lines(&self, step: Pressure) -> (u64, u64) {
        let whole = self.whole;
        let (from, below) = self.steps.lines(step, whole);
        if self.firm {
            let end = whole.saturating_sub(self.reserved);
            let one_more = self.least.min(end.saturating_sub(self.least) / FIRM_LEAST_PART);
            let part = one_more.max(end / FIRM_PART);
            return match step {
                Pressure::None | Pressure::CloseHeaviest => (from, below),
                Pressure::ShrinkCaches => (from.min(end - part), below.min(end - 2 * part)),
                // One less at least: who wants it finds it.
                Pressure::RefuseNew => (from.min(end), below.min(end.saturating_sub(part.max(1))).max(1)),
            };
        }
        // There is no room where nothing is left but what is set aside.
        let rest = whole.saturating_sub(self.spare).saturating_sub(self.reserved);
        let first = |from: u64, below: u64| (from.min(rest), from.min(rest).saturating_sub(from - below));
        if step == Pressure::ShrinkCaches {
            return first(from, below);
        }
        if step != Pressure::RefuseNew {
            return (from, below);
        }
        let (short_from, _) = self.lines(Pressure::ShrinkCaches);
        let but = |bytes| whole.saturating_sub(self.spare).saturating_sub(bytes).max(short_from);
        let (last, free) = (but(self.reserved / 4 * 3), but(self.reserved / 4 * 5));
        if last < from { (last, below.min(free)) } else { (from, below) }
    }

    /// Whether less than a quarter of what is set aside is left: then nobody is waited for who was told to come back.
    pub(super) fn is_nearly_out(&self) -> bool {
        self.left(self.looked_at.saturating_sub(self.other)) < self.reserved / 4
    }

    pub(super) fn is_short(&self) -> bool {
        self.pressure > Pressure::None
    }

    /// What one may hold. As much as it likes, while there is room.
    pub(super) fn share(&self) -> u64 {
        self.share
    }

    /// What connections hold when it begins to be short, and what they hold when it no longer is.
    pub(super) fn bounds(&self) -> (u64, u64) {
        let (from, below) = self.lines(Pressure::ShrinkCaches);
        (from.saturating_sub(self.other), below.saturating_sub(self.other))
    }

    /// What is left of what is there for anybody, where connections hold `held`.
    pub(super) fn left(&self, held: u64) -> u64 {
        self.whole.saturating_sub(self.spare).saturating_sub(self.used(held))
    }

    /// What connections hold when only those grow who have no more than their share, when only those do who have less than the
    /// least share, when only those do who begin, and when nothing is left. What is set aside begins with the second, and half
    /// of it is for the third. The first comes before it by as much: of a crowd that comes at once, those who leave take more
    /// for a moment than they hold, and who was served would be told to go for that.
    pub(super) fn last_bounds(&self) -> [u64; 4] {
        let line = |step| self.steps.lines(step, self.whole).0;
        let end = self.whole.saturating_sub(self.spare);
        let tight = end.saturating_sub(self.reserved).min(line(Pressure::RefuseNew));
        let full = end.saturating_sub(self.reserved / 2).min(line(Pressure::CloseHeaviest));
        let short_from = line(Pressure::ShrinkCaches).min(tight);
        let most = tight - (self.reserved / 2).min((tight - short_from) / 4 * 3);
        [most, tight, full, end].map(|line| line.saturating_sub(self.other))
    }

    /// Down to where those above it are cut, if it is so short that they are: not below their share, but when it runs out:
    /// the least shares of more callers than [`SHARES`](super::budget::SHARES) do not fit. Where other things hold so much that
    /// twice what all connections hold would be no relief, nobody gives up its share in vain; nor does anybody of what cannot be
    /// exceeded. `level` as in [`Shortage::look`].
    pub(super) fn cut_to(&self, level: impl FnOnce(u64) -> u64) -> Option<Cut> {
        if self.pressure < Pressure::RefuseNew {
            return None;
        }
        let (_, relieved) = self.lines(Pressure::RefuseNew);
        let relieved_to = relieved.saturating_sub(self.other);
        let level = level(relieved_to);
        let held = self.looked_at.saturating_sub(self.other);
        let in_vain = held.saturating_mul(2) < self.looked_at.saturating_sub(relieved);
        let below_share = self.pressure == Pressure::CloseHeaviest && !in_vain && !self.firm;
        let level = if below_share { level } else { level.max(self.share) };
        Some(Cut { level, target: relieved_to })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{accounts::level, budget::MemorySteps};

    fn shortage(other: u64) -> Shortage {
        Shortage { whole: 1000, other, least: 20, ..Shortage::default() }
    }

    #[test]
    fn shares_bind_without_room_alone() {
        for (case, other, holders, share, cut_to) in [
            ("room", 100, &[599][..], u64::MAX, None),
            ("one holds all", 100, &[600], 599, None),
            ("it gives way to those below it", 100, &[500, 100, 50], 449, None),
            ("further", 100, &[500, 100, 90, 80], 329, Some(430)),
            ("a crowd", 100, &[80; 10], 59, Some(70)),
            ("something else holds it", 850, &[10, 20, 5], 20, Some(20)),
            ("nobody gives up its share in vain", 960, &[40, 10, 5], 20, Some(20)),
            ("if it is a relief", 860, &[15; 8], 20, Some(0)),
            ("below the least share, if those do not fit", 100, &[19; 50], 20, Some(14)),
            ("nobody is, who fits", 100, &[19; 40], 20, Some(20)),
        ] {
            let mut it = shortage(other);
            let held: u64 = holders.iter().sum();
            it.look(held, |target| level(holders.iter().copied(), target));
            assert_eq!(it.share(), share, "{case}");
            let cut = it.cut_to(|target| level(holders.iter().copied(), target));
            assert_eq!(cut.map(|cut| cut.level), cut_to, "{case}");
        }
    }

    /// However few there are, it is short before others come to what is set aside, and who holds more than its share is told to go
    /// when they are there; nobody goes for others that is below it.
    #[test]
    fn the_steps_of_what_is_firm_come_before_what_is_set_aside() {
        for (whole, reserved, short, told, closed) in [
            (1_000, 64, (700, 650), (850, 800), (950, 900)),
            (400, 64, (280, 260), (336, 315), (380, 360)),
            (64, 32, (24, 16), (32, 24), (61, 58)),
            (20, 8, (11, 10), (12, 11), (19, 18)),
            (20, 10, (10, 10), (10, 9), (19, 18)),
            (2, 1, (1, 1), (1, 1), (2, 2)),
            (1_000, 0, (700, 650), (850, 800), (950, 900)),
        ] {
            let least = 8.min(whole / 2);
            let mut it = Shortage { whole, reserved, least, firm: true, ..Shortage::default() };
            let steps = [Pressure::ShrinkCaches, Pressure::RefuseNew, Pressure::CloseHeaviest];
            assert_eq!(steps.map(|step| it.lines(step)), [short, told, closed], "{whole}, {reserved}");
            it.look(whole, |_| 0);
            assert_eq!(
                it.cut_to(|_| 0).map(|cut| cut.level),
                Some(least),
                "{whole}, {reserved}: no share is cut"
            );
        }
    }

    /// Where others rest just below the step, one that is refused for what they hold makes them go.
    #[test]
    fn who_is_refused_below_its_share_makes_others_go() {
        let mut it = Shortage { spare: 150, reserved: 100, ..shortage(0) };
        for (case, used, wanted, want) in [
            ("all but what is set aside", 750, false, Pressure::ShrinkCaches),
            ("somebody wants it", 750, true, Pressure::RefuseNew),
            ("until it is free", 726, false, Pressure::RefuseNew),
            ("it is", 724, false, Pressure::ShrinkCaches),
            ("it is free, and wanted", 724, true, Pressure::ShrinkCaches),
        ] {
            it.wanted = wanted;
            it.look(used, |_| 0);
            assert_eq!(it.pressure(), want, "{case}");
        }
    }

    /// The step that `used` of a hundred MiB reaches, after `before`.
    fn step(before: Pressure, used: u64) -> Pressure {
        let whole = 100 << 20;
        let mut it = Shortage { whole, pressure: before, ..Shortage::default() };
        it.look(used, |_| 0);
        it.pressure()
    }

    #[test]
    fn memory_runs_short_step_by_step() {
        let mib = |n: u64| n << 20;
        for (used, want) in [
            (0, Pressure::None),
            (mib(69), Pressure::None),
            (mib(70), Pressure::ShrinkCaches),
            (mib(84), Pressure::ShrinkCaches),
            (mib(85), Pressure::RefuseNew),
            (mib(95), Pressure::CloseHeaviest),
            (u64::MAX, Pressure::CloseHeaviest),
        ] {
            assert_eq!(step(Pressure::None, used), want, "{used}");
        }
        let mut none = Shortage { whole: 0, ..Shortage::default() };
        none.look(1, |_| 0);
        assert_eq!(none.pressure(), Pressure::CloseHeaviest, "no budget at all is used up");
        assert!(
            Pressure::ShrinkCaches < Pressure::RefuseNew && Pressure::RefuseNew < Pressure::CloseHeaviest
        );
    }

    #[test]
    fn a_step_is_left_below_where_it_began() {
        use Pressure as P;
        for (before, percent, want) in [
            (P::ShrinkCaches, 69, P::ShrinkCaches),
            (P::ShrinkCaches, 65, P::ShrinkCaches),
            (P::ShrinkCaches, 64, P::None),
            (P::RefuseNew, 84, P::RefuseNew),
            (P::RefuseNew, 79, P::ShrinkCaches),
            (P::CloseHeaviest, 94, P::CloseHeaviest),
            (P::CloseHeaviest, 89, P::RefuseNew),
            (P::CloseHeaviest, 10, P::None),
            (P::None, 84, P::ShrinkCaches),
            (P::ShrinkCaches, 96, P::CloseHeaviest),
        ] {
            assert_eq!(step(before, percent << 20), want, "{before:?}, {percent}");
        }
    }

    /// Of a small budget much is set aside: who holds more than its share goes before others need all of that.
    #[test]
    fn what_is_set_aside_is_kept_free_of_those_above_their_share() {
        for (case, before, used, want) in [
            ("up to where it begins", Pressure::ShrinkCaches, 749, Pressure::ShrinkCaches),
            ("less than a quarter of it", Pressure::ShrinkCaches, 774, Pressure::ShrinkCaches),
            ("a quarter of it", Pressure::ShrinkCaches, 775, Pressure::RefuseNew),
            ("until it is free", Pressure::RefuseNew, 725, Pressure::RefuseNew),
            ("free, with a bit more", Pressure::RefuseNew, 724, Pressure::ShrinkCaches),
            ("all of it", Pressure::RefuseNew, 850, Pressure::RefuseNew),
            ("nobody is closed before that", Pressure::RefuseNew, 949, Pressure::RefuseNew),
        ] {
            let mut it = Shortage { spare: 150, reserved: 100, pressure: before, ..shortage(0) };
            it.look(used, |_| 0);
            assert_eq!(it.pressure(), want, "{case}");
        }
    }

    /// Wherever the first step is set, there is no room for others where nothing is left for them.
    #[test]
    fn room_ends_where_what_is_set_aside_begins() {
        for (percent, spare, reserved, bounds) in [
            (70, 150, 100, (700, 650)),
            (75, 150, 100, (750, 700)),
            (90, 150, 100, (750, 700)),
            (90, 0, 0, (900, 850)),
            (90, 600, 600, (0, 0)),
        ] {
            let mut it = Shortage { spare, reserved, ..shortage(0) };
            it.steps.steps = MemorySteps::new([percent, 96, 98]).unwrap();
            assert_eq!(it.bounds(), bounds, "{percent}, {spare}, {reserved}");
        }
    }

    #[test]
    fn what_is_taken_otherwise_leaves_less_to_connections() {
        assert_eq!(shortage(100).bounds(), (600, 550));
        assert_eq!(shortage(690).bounds(), (10, 0));
        assert_eq!(shortage(2000).bounds(), (0, 0));
    }

    #[test]
    fn what_is_set_aside_ends_before_what_is_for_nobody() {
        for (case, spare, reserved, last) in [
            ("nothing is set aside", 0, 0, [750, 750, 850, 900]),
            ("little", 20, 40, [730, 750, 850, 880]),
            ("more", 100, 200, [600, 600, 700, 800]),
            ("more than there is", 900, 200, [0, 0, 0, 0]),
        ] {
            let it = Shortage { spare, reserved, ..shortage(100) };
            assert_eq!(it.last_bounds(), last, "{case}");
            assert_eq!(it.left(500), 400_u64.saturating_sub(spare), "{case}");
        }
    }
}
