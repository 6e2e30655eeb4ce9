//! Whether the agent uses more of the processor than it may.
//!
//! A bucket of processor time: so much flows back in each second, and a burst of [`BURST`] is nothing. Once it is empty
//! there is no room, and there is none until what was used *and what was refused for it* would fit: a storm that is refused
//! costs little, and if that alone counted it would be let in again at once. Pure: times and counts are arguments.

use std::{ops::RangeInclusive, time::Duration};

/// Used beyond the share before it counts: about what a thousand clients take that all restart at once and have two cores busy.
pub const BURST: Duration = Duration::from_millis(750);
/// The most that is remembered of what was used or wanted. With half a core it takes twice as long after a storm until there is
/// room.
const MOST: Duration = Duration::from_secs(1);
/// What a call costs, before any was served and within these bounds afterwards.
const CALL: RangeInclusive<Duration> = Duration::from_micros(20)..=Duration::from_millis(10);
const CALL_AT_FIRST: Duration = Duration::from_micros(100);
/// How many calls a second there are to spare when it is first tried.
const SPARE_AT_FIRST: f64 = 20.0;
/// So many calls and connections tell what one of them costs.
const ENOUGH: u64 = 20;

/// How much of the processor the agent may use: in thousandths of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessorShare(u32);

impl ProcessorShare {
    /// In cores.
    pub const LEAST: f64 = 0.05;
    /// More than any machine has.
    pub const MOST: f64 = 4096.0;

    /// So many cores; `None` outside of these bounds.
    pub fn cores(cores: f64) -> Option<Self> {
        let fits = (Self::LEAST..=Self::MOST).contains(&cores);
        #[expect(clippy::as_conversions, clippy::cast_sign_loss, reason = "from 50 to 4,096,000")]
        fits.then(|| Self((cores * 1000.0).round() as u32))
    }

    /// In thousandths of a core.
    pub fn millicores(self) -> u64 {
        self.0.into()
    }

    /// As people write it, in cores.
    pub fn text(self) -> String {
        cores_text(self.0)
    }

    /// What flows back in so much time.
    fn of(self, elapsed: Duration) -> Duration {
        elapsed.saturating_mul(self.0) / 1000
    }
}

impl Default for ProcessorShare {
    fn default() -> Self {
        Self(500)
    }
}

/// Thousandths of a core as people write it, in cores.
pub fn cores_text(millicores: u32) -> String {
    let text = format!("{}.{:03}", millicores / 1000, millicores % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// What the agent took of the processor in about the last second, and what it waited for, ready to run: in thousandths of a core.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessorUse {
    pub ran: u32,
    pub waited: u32,
}

/// What happened between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spell {
    pub elapsed: Duration,
    /// Processor time that the process used, or waited for: ready to run, with none to be had.
    pub used: Duration,
    /// Of this, what it used.
    pub ran: Duration,
    /// Calls and connections that it served.
    pub served: u64,
    /// Those that were refused, or kept waiting, for want of it.
    pub wanting: u64,
    /// Some of these got none of what was to spare.
    pub lacked: bool,
}

/// The bucket.
#[derive(Clone, Copy, Debug)]
pub struct ProcessorTime {
    /// What was used, or wanted, beyond the share.
    over: Duration,
    call: Duration,
    short: bool,
    /// Calls a second.
    spare: f64,
    /// Of a core, about the last second.
    ran: f64,
    waited: f64,
}

impl Default for ProcessorTime {
    fn default() -> Self {
        Self { over: Duration::ZERO, call: CALL_AT_FIRST, short: false, spare: 0.0, ran: 0.0, waited: 0.0 }
    }
}

impl ProcessorTime {
    /// Counts what happened. Returns whether processor time is short.
    pub fn look(&mut self, share: ProcessorShare, spell: Spell) -> bool {
        let Spell { elapsed, used, ran, served, wanting, .. } = spell;
        let seconds = elapsed.as_secs_f64();
        for (lately, spent) in [(&mut self.ran, ran), (&mut self.waited, used.saturating_sub(ran))] {
            let now = spent.as_secs_f64() / seconds.max(f64::MIN_POSITIVE);
            *lately += (now - *lately) * seconds.min(1.0);
        }
        if served >= ENOUGH {
            let each = used / u32::try_from(served).unwrap_or(u32::MAX);
            self.call = (self.call * 3 + each.clamp(*CALL.start(), *CALL.end())) / 4;
        }
        let wanted = self.call.saturating_mul(u32::try_from(wanting).unwrap_or(u32::MAX));
        let spent = self.over.saturating_add(used).saturating_add(wanted);
        self.over = spent.saturating_sub(share.of(elapsed)).min(MOST);
        // What was over must be paid back before there is room.
        self.short = if self.short { !self.over.is_zero() } else { self.over >= BURST };
        self.spare = if self.short { self.next_spare(share, spell) } else { 0.0 };
        self.short
    }

    /// What was used, and waited for, lately.
    pub fn lately(&self) -> ProcessorUse {
        #[expect(clippy::as_conversions, clippy::cast_sign_loss, reason = "a cast saturates")]
        let [ran, waited] = [self.ran, self.waited].map(|cores| (cores * 1000.0).round() as u32);
        ProcessorUse { ran, waited }
    }

    /// While it is short: how many calls a second there is time for, beside all that is done already. Found out in steps, a
    /// step at each look, since nobody knows before what calls will take, and refusals beside them.
    pub fn spare(&self) -> f64 {
        self.spare
    }

    fn next_spare(&self, share: ProcessorShare, spell: Spell) -> f64 {
        let Spell { elapsed, used, ran, lacked, .. } = spell;
        let due = share.of(elapsed);
        let left = |of: Duration, spent: Duration| {
            1.0 - spent.as_secs_f64() / of.as_secs_f64().max(f64::MIN_POSITIVE)
        };
        // Where it does not get what it may use, those who are served wait for it.
        let left = left(due, ran).min(left(due.max(elapsed), used)).clamp(-1.0, 1.0);
        let step = 1.0 + left / 2.0;
        if left < 0.0 {
            self.spare * step
        } else if lacked {
            (self.spare + SPARE_AT_FIRST) * step
        } else {
            self.spare
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOK: Duration = Duration::from_millis(50);

    fn spell(used: u64, wanting: u64) -> Spell {
        Spell {
            elapsed: LOOK,
            used: Duration::from_micros(used),
            ran: Duration::from_micros(used),
            wanting,
            ..Spell::default()
        }
    }

    #[test]
    fn a_burst_is_nothing_and_a_storm_is_seen_as_long_as_it_lasts() {
        let (mut it, half) = (ProcessorTime::default(), ProcessorShare::default());
        // Three quarters of a second of one core, at once; and then what is allowed.
        assert!(!it.look(half, spell(750_000, 0)));
        for _ in 0..1_000 {
            assert!(!it.look(half, spell(25_000, 0)));
        }
        assert!(it.look(half, spell(75_000, 0)), "too much");
        // Refused it costs little; served it would cost a whole core.
        for _ in 0..1_000 {
            assert!(it.look(half, spell(5_000, 500)));
        }
        // It ends.
        let looks = (0..1_000).take_while(|_| it.look(half, spell(1_000, 0))).count();
        assert!((30..60).contains(&looks), "{looks}");
        assert!(!it.look(half, spell(24_000, 0)));
    }

    /// A second of looks at callers that ask for so many calls a second beside what has tokens; a call takes 100 microseconds, a
    /// refusal 5, and of what is ready to run so many times as long is waited. Returns what was served of it in the last.
    fn served_in_the_end(it: &mut ProcessorTime, share: ProcessorShare, asked: f64, waits: f64) -> f64 {
        let (mut served, per_look) = (0.0, asked / 20.0);
        for _ in 0..60 {
            served = per_look.min(it.spare() / 20.0);
            let micros = 2_000.0 + 100.0 * served + 5.0 * (per_look - served);
            let ran = Duration::from_secs_f64(micros / 1e6);
            let used = ran.mul_f64(1.0 + waits);
            it.look(share, Spell { used, ran, lacked: served < per_look, ..spell(0, 1_000) });
        }
        served * 20.0
    }

    #[test]
    fn what_is_to_spare_fits_beside_what_is_done() {
        let half = ProcessorShare::default();
        for (case, share, asked, waits, want) in [
            ("half a core", half, 20_000.0, 0.0, 3_600.0..4_300.0),
            ("a core", ProcessorShare::cores(1.0).unwrap(), 50_000.0, 0.0, 7_000.0..8_000.0),
            ("less than there is", half, 1_000.0, 0.0, 1_000.0..1_001.0),
            ("the node is busy", half, 20_000.0, 3.0, 1_000.0..1_500.0),
            ("refusals alone take it all", half, 120_000.0, 0.0, 0.0..50.0),
        ] {
            let mut it = ProcessorTime::default();
            assert_eq!(it.spare(), 0.0);
            assert!(it.look(share, spell(1_000_000, 0)), "{case}");
            let served = served_in_the_end(&mut it, share, asked, waits);
            assert!(want.contains(&served), "{case}: {served}");
            assert!((0..1_000).any(|_| !it.look(share, spell(0, 0))), "{case}: it ends");
            assert_eq!(it.spare(), 0.0, "{case}: there is room");
        }
    }

    #[test]
    fn what_is_refused_counts_at_what_calls_cost_by_then() {
        let (mut it, one) = (ProcessorTime::default(), ProcessorShare::cores(1.0).unwrap());
        for _ in 0..100 {
            // A hundred calls of 400 microseconds each.
            assert!(!it.look(one, Spell { served: 100, ..spell(40_000, 0) }));
        }
        assert!(it.look(one, spell(850_000, 0)));
        for (wanting, fits) in [(200, false), (130, false), (110, true)] {
            let mut copy = it;
            let looks = (0..1_000).take_while(|_| copy.look(one, spell(1_000, wanting))).count();
            assert_eq!(looks < 1_000, fits, "{wanting}");
        }
    }

    #[test]
    fn what_is_used_is_told_of_about_the_last_second() {
        let mut it = ProcessorTime::default();
        assert_eq!(it.lately(), ProcessorUse::default());
        let (ran, used) = (Duration::from_millis(30), Duration::from_millis(35));
        for _ in 0..200 {
            it.look(ProcessorShare::default(), Spell { ran, used, ..spell(0, 0) });
        }
        assert_eq!(it.lately(), ProcessorUse { ran: 600, waited: 100 });
        assert_eq!([600, 100, 1000, 0].map(cores_text), ["0.6", "0.1", "1", "0"]);
        for _ in 0..20 {
            it.look(ProcessorShare::default(), spell(0, 0));
        }
        assert!((150..300).contains(&it.lately().ran), "{:?}", it.lately());
    }

    #[test]
    fn shares_are_from_a_twentieth_of_a_core_on() {
        assert_eq!(ProcessorShare::cores(0.5), Some(ProcessorShare::default()));
        for (cores, fits) in [(0.0, false), (0.049, false), (0.05, true), (4096.0, true), (4097.0, false)] {
            assert_eq!(ProcessorShare::cores(cores).is_some(), fits, "{cores}");
        }
        assert!(ProcessorShare::cores(f64::NAN).is_none() && ProcessorShare::cores(-1.0).is_none());
        let most = ProcessorShare::cores(4096.0).unwrap();
        assert!(!ProcessorTime::default().look(most, Spell { elapsed: Duration::MAX, ..spell(1, u64::MAX) }));
    }
}
