//! The numbers of the lines that were read: where some of a run are missing, a file is, or lines of it.

use std::collections::{BTreeMap, BTreeSet};

use time::OffsetDateTime;

use super::{holders::shown, line::AuditLine};
use crate::{
    cli::terminal::clean,
    store::{audit::message, audit_notes::FIRST_RUN},
};

/// Stretches that are told apart. Whole files are a few for each run.
const MOST_STRETCHES: usize = 100_000;
/// How many places are told one by one.
const MOST_TOLD: usize = 10;

/// Numbers without a gap, and when the lines that have the first and the last of them were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    last: u64,
    begins: OffsetDateTime,
    ends: OffsetDateTime,
}

/// What was read of a run.
#[derive(Debug, Default)]
struct RunRead {
    /// By the first number of each.
    stretches: BTreeMap<u64, Stretch>,
    /// The number of the last line that says that it ends.
    end: Option<u64>,
}

impl RunRead {
    fn has_ended(&self) -> bool {
        let last = self.stretches.values().next_back().map(|stretch| stretch.last);
        self.end.is_some() && self.end == last
    }
}

/// A run that was read, and when the first line of it was written and the last.
#[derive(Clone, Copy, Debug)]
struct RunSpan<'a> {
    name: &'a str,
    read: &'a RunRead,
    begins: OffsetDateTime,
    ends: OffsetDateTime,
}

/// When something was written that was not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct UnreadTime {
    /// `None` before the first line that was read.
    after: Option<OffsetDateTime>,
    before: OffsetDateTime,
}

impl UnreadTime {
    fn told(self) -> String {
        match self {
            Self { after: Some(after), before } => {
                format!("written between {} and {}", shown(after), shown(before))
            }
            Self { after: None, before } => format!("written before {}", shown(before)),
        }
    }
}

/// The numbers that were read, by run.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    read: BTreeMap<String, RunRead>,
    stretches: usize,
    is_scattered: bool,
    /// Runs that another one names as the run before it, and when that began.
    followed: BTreeMap<String, OffsetDateTime>,
    /// Runs before which there was none.
    first_runs: BTreeSet<String>,
    /// Whether lines without a number were read.
    has_unnumbered: bool,
}

impl Numbers {
    pub(super) fn read(&mut self, line: &AuditLine) {
        let (Some(at), Some(run), Some(seq)) = (line.at, line.text("run"), line.number("seq")) else {
            self.has_unnumbered = true;
            return;
        };
        if self.stretches + self.followed.len() + self.first_runs.len() >= MOST_STRETCHES {
            self.is_scattered = true;
            return;
        }
        match line.text("before") {
            Some(FIRST_RUN) => drop(self.first_runs.insert(run.to_owned())),
            Some(before) => {
                let begun = self.followed.entry(before.to_owned()).or_insert(at);
                *begun = at.max(*begun);
            }
            None => {}
        }
        let of_run = self.read.entry(run.to_owned()).or_default();
        if line.message == message::AUDIT_ENDS {
            of_run.end = of_run.end.max(Some(seq));
        }
        let of_run = &mut of_run.stretches;
        let before = of_run.range(..=seq).next_back().map(|(first, stretch)| (*first, *stretch));
        let next =
            seq.checked_add(1).and_then(|next| of_run.get(&next).copied().map(|stretch| (next, stretch)));
        let (first, begins) = match before {
            Some((_, stretch)) if stretch.last >= seq => return,
            Some((first, stretch)) if stretch.last.checked_add(1) == Some(seq) => (first, stretch.begins),
            _ => {
                self.stretches += 1;
                (seq, at)
            }
        };
        let (last, ends) = next.map_or((seq, at), |(_, stretch)| (stretch.last, stretch.ends));
        if let Some((joined, _)) = next {
            of_run.remove(&joined);
            self.stretches -= 1;
        }
        of_run.insert(first, Stretch { last, begins, ends });
    }

    /// Whether each run of which lines were read has ended, as it says or as another has begun behind it: it gives nobody anything
    /// any more.
    pub(super) fn all_have_ended(&self) -> bool {
        let has_ended =
            |(name, run): (&String, &RunRead)| run.has_ended() || self.followed.contains_key(name);
        self.is_known() && self.read.iter().all(has_ended)
    }

    /// Whether `begin`, the first line of all, is the first that an agent wrote which nobody had run before.
    pub(super) fn begin_with_a_first_run(&self, begin: OffsetDateTime) -> bool {
        let begins = |run: &RunRead| run.stretches.get(&1).is_some_and(|stretch| stretch.begins == begin);
        self.is_known() && self.first_runs.iter().any(|run| self.read.get(run).is_some_and(begins))
    }

    fn is_known(&self) -> bool {
        !self.read.is_empty() && !self.is_scattered && !self.has_unnumbered
    }

    /// Where numbers are missing that may be about the time from `from` to `to`, in words. Of what is before `begin`, the first
    /// line of all, it is known without them that it was not read, unless any time is meant.
    pub(super) fn gaps(
        &self,
        begin: OffsetDateTime,
        from: Option<OffsetDateTime>,
        to: Option<OffsetDateTime>,
    ) -> Vec<String> {
        let concerns = |unread: &UnreadTime| {
            from.is_none_or(|from| unread.before > from && unread.before > begin)
                && to.is_none_or(|to| unread.after.is_none_or(|after| after < to))
        };
        let runs = self.runs();
        let mut told = Vec::new();
        for (mut places, more) in [
            (missing_lines(&runs), "places where lines are missing"),
            (self.missing_runs(&runs), "runs of which no line was read"),
            (cut_off(&runs), "runs that have no end"),
        ] {
            places.retain(|(unread, _)| concerns(unread));
            places.sort_by_key(|(unread, _)| unread.before);
            let left_out = places.len().saturating_sub(MOST_TOLD);
            told.extend(places.into_iter().take(MOST_TOLD).map(|(_, words)| words));
            if left_out > 0 {
                told.push(format!("there are {left_out} more {more}"));
            }
        }
        if self.is_scattered {
            told.push(
                "the numbers of the lines have so many gaps that not all are known: lines are missing"
                    .to_owned(),
            );
        }
        told
    }

    fn runs(&self) -> Vec<RunSpan<'_>> {
        let spans = self.read.iter().filter_map(|(name, read)| {
            let begins = read.stretches.values().map(|stretch| stretch.begins).min()?;
            let ends = read.stretches.values().map(|stretch| stretch.ends).max()?;
            Some(RunSpan { name, read, begins, ends })
        });
        spans.collect()
    }

    /// Runs that another one names as the run before it, and of which no line was read.
    fn missing_runs(&self, runs: &[RunSpan<'_>]) -> Vec<(UnreadTime, String)> {
        let ends = ends(runs);
        let missing = self.followed.iter().filter(|(run, _)| !self.read.contains_key(*run));
        let told = missing.map(|(run, before)| {
            let unread = UnreadTime { after: last_before(&ends, *before), before: *before };
            let (run, written) = (clean(run), unread.told());
            (
                unread,
                format!("no line of run {run} was read: those {written} may be about others who held it"),
            )
        });
        told.collect()
    }
}

/// When the stretches of all runs end, by time.
fn ends(runs: &[RunSpan<'_>]) -> Vec<OffsetDateTime> {
    let mut ends: Vec<_> =
        runs.iter().flat_map(|run| run.read.stretches.values().map(|stretch| stretch.ends)).collect();
    ends.sort_unstable();
    ends
}

fn last_before(times: &[OffsetDateTime], at: OffsetDateTime) -> Option<OffsetDateTime> {
    times.get(..times.partition_point(|time| *time < at)).and_then(<[_]>::last).copied()
}

/// Numbers that nobody has.
fn missing_lines(runs: &[RunSpan<'_>]) -> Vec<(UnreadTime, String)> {
    let ends = ends(runs);
    let mut missing = Vec::new();
    for run in runs {
        // A run begins after what is there of the one before it; before the first of all nothing is known anyway.
        let (mut after, mut last) = (last_before(&ends, run.begins), 0_u64);
        for (first, stretch) in &run.read.stretches {
            let (begin, end) = (last.saturating_add(1), first.saturating_sub(1));
            if begin <= end {
                let unread = UnreadTime { after, before: stretch.begins };
                let (name, written) = (clean(run.name), unread.told());
                let lines = match begin == end {
                    true => format!("line {begin} of run {name} is"),
                    false => format!("lines {begin} to {end} of run {name} are"),
                };
                missing.push((
                    unread,
                    format!("{lines} missing, {written}: they may be about others who held it"),
                ));
            }
            (after, last) = (Some(stretch.ends), stretch.last);
        }
    }
    missing
}

/// Runs whose end is not there, though another run came behind them.
fn cut_off(runs: &[RunSpan<'_>]) -> Vec<(UnreadTime, String)> {
    let mut begins: Vec<_> = runs.iter().map(|run| run.begins).collect();
    begins.sort_unstable();
    let cut = runs.iter().filter(|run| !run.read.has_ended()).filter_map(|run| {
        let before = *begins.get(begins.partition_point(|begins| *begins <= run.ends))?;
        let unread = UnreadTime { after: Some(run.ends), before };
        let (name, written) = (clean(run.name), unread.told());
        Some((
            unread,
            format!("run {name} has no end: it was killed, or its last lines, {written}, are missing"),
        ))
    });
    cut.collect()
}

#[cfg(test)]
mod tests {
    use time::{Duration, macros::datetime};

    use super::*;
    use crate::telemetry::LINES_LOST;

    const BEGIN: OffsetDateTime = datetime!(2026-11-23 10:00:00 UTC);

    fn line(run: &str, seq: u64, minute: i64) -> AuditLine {
        let at = shown(BEGIN + Duration::minutes(minute));
        let text = format!(
            "{at}  INFO audit: svid given caller=uid:7 kind=jwt spiffe_id=spiffe://td/web run={run} seq={seq}"
        );
        AuditLine::parse(&text).unwrap()
    }

    #[test]
    fn missing_numbers_are_told_where_they_matter() {
        let told = |lines: &str, after: &str, before: &str| {
            format!(
                "{lines} missing, written between 2026-11-23T{after}:00Z and 2026-11-23T{before}:00Z: they may be about others who held it"
            )
        };
        let five = || told("lines 3 to 7 of run a are", "10:02", "10:08");
        let first = "lines 1 to 2 of run a are missing, written before 2026-11-23T10:03:00Z: they may be about others who held it";
        // Each line is its run, its number and the minute in which it was written.
        for (case, lines, span, want) in [
            ("whole", vec![("a", 1, 1), ("a", 2, 2), ("a", 3, 3)], (None, None), vec![]),
            ("in another order", vec![("a", 3, 3), ("a", 1, 1), ("a", 2, 2)], (None, None), vec![]),
            ("twice", vec![("a", 1, 1), ("a", 2, 2), ("a", 1, 1), ("a", 2, 2)], (None, None), vec![]),
            (
                "two runs at once",
                vec![("a", 1, 1), ("b", 1, 1), ("a", 2, 2), ("b", 2, 2)],
                (None, None),
                vec![],
            ),
            ("a middle", vec![("a", 1, 1), ("a", 2, 2), ("a", 8, 8)], (None, None), vec![five()]),
            (
                "one",
                vec![("a", 1, 1), ("a", 3, 3)],
                (None, None),
                vec![told("line 2 of run a is", "10:01", "10:03")],
            ),
            (
                "a middle, of later files first",
                vec![("a", 8, 8), ("a", 2, 2), ("a", 1, 1)],
                (None, None),
                vec![five()],
            ),
            (
                "a middle that may matter",
                vec![("a", 1, 1), ("a", 2, 2), ("a", 8, 8)],
                (Some(7), Some(9)),
                vec![five()],
            ),
            ("a middle of before", vec![("a", 1, 1), ("a", 2, 2), ("a", 8, 8)], (Some(8), Some(9)), vec![]),
            ("a middle of after", vec![("a", 1, 1), ("a", 2, 2), ("a", 8, 8)], (Some(0), Some(2)), vec![]),
            ("the beginning", vec![("a", 3, 3)], (None, None), vec![first.to_owned()]),
            ("the beginning, of before", vec![("a", 3, 3)], (Some(3), None), vec![]),
            ("the beginning, which the first line tells", vec![("a", 3, 3)], (Some(1), None), vec![]),
            (
                "the beginning of another run",
                vec![("a", 1, 1), ("b", 3, 5), ("a", 2, 2)],
                (None, None),
                vec![
                    told("lines 1 to 2 of run b are", "10:02", "10:05"),
                    "run a has no end: it was killed, or its last lines, written between 2026-11-23T10:02:00Z and \
                     2026-11-23T10:05:00Z, are missing"
                        .to_owned(),
                ],
            ),
        ] {
            let mut numbers = Numbers::default();
            let begin = lines.iter().map(|(_, _, minute)| *minute).min().unwrap();
            for (run, seq, minute) in lines {
                numbers.read(&line(run, seq, minute));
            }
            let at = |minute: Option<i64>| minute.map(|minute| BEGIN + Duration::minutes(minute));
            assert_eq!(
                numbers.gaps(BEGIN + Duration::minutes(begin), at(span.0), at(span.1)),
                want,
                "{case}"
            );
        }
    }

    #[test]
    fn a_run_without_an_end_is_told_where_another_follows() {
        for (case, ends, lines, span, is_told) in [
            ("the last run", false, vec![("a", 1, 1), ("a", 2, 2)], (None, None), false),
            ("another follows", false, vec![("a", 1, 1), ("a", 2, 2), ("b", 1, 5)], (None, None), true),
            ("before it", false, vec![("a", 1, 1), ("a", 2, 2), ("b", 1, 5)], (None, Some(2)), false),
            ("after it", false, vec![("a", 1, 1), ("a", 2, 2), ("b", 1, 5)], (Some(5), None), false),
            ("within", false, vec![("a", 1, 1), ("a", 2, 2), ("b", 1, 5)], (Some(3), Some(4)), true),
            ("it has an end", true, vec![("a", 1, 1), ("a", 2, 2), ("b", 1, 5)], (None, None), false),
            ("two at once", false, vec![("a", 1, 1), ("b", 1, 2), ("a", 2, 3)], (None, None), false),
        ] {
            let mut numbers = Numbers::default();
            for (run, seq, minute) in lines {
                let mut line = line(run, seq, minute);
                if ends && (run, seq) == ("a", 2) {
                    line.message = message::AUDIT_ENDS.to_owned();
                }
                numbers.read(&line);
            }
            let at = |minute: Option<i64>| minute.map(|minute| BEGIN + Duration::minutes(minute));
            let told = numbers.gaps(BEGIN, at(span.0), at(span.1));
            assert_eq!(
                told.iter().any(|told| told.starts_with("run a has no end")),
                is_told,
                "{case}: {told:?}"
            );
            assert_eq!(told.len(), usize::from(is_told), "{case}: {told:?}");
        }
    }

    /// The line about lost ones has a number, and what is missing beside it is told.
    #[test]
    fn what_was_lost_has_no_number() {
        for (case, numbers, is_told) in
            [("nothing is missing", [1, 2, 3], false), ("a line is", [1, 2, 4], true)]
        {
            let mut read = Numbers::default();
            for seq in numbers {
                let mut line = line("a", seq, 1);
                if seq == 2 {
                    line.message = LINES_LOST.to_owned();
                }
                read.read(&line);
            }
            assert_eq!(!read.gaps(BEGIN, None, None).is_empty(), is_told, "{case}");
        }
    }

    /// A run that another one names is missed when no line of it was read, where that matters.
    #[test]
    fn a_run_of_which_nothing_is_left_is_told_where_it_matters() {
        let told = |written: &str| {
            format!("no line of run b was read: those written {written} may be about others who held it")
        };
        let between = told("between 2026-11-23T10:02:00Z and 2026-11-23T10:05:00Z");
        let (a, b) = (vec![("a", 1, 1), ("a", 2, 2)], vec![("b", 1, 3), ("b", 2, 4)]);
        for (case, earlier, span, want) in [
            ("it is there", [a.clone(), b].concat(), (None, None), None),
            ("it is gone", a.clone(), (None, None), Some(&between)),
            ("within", a.clone(), (Some(3), Some(4)), Some(&between)),
            ("before it", a.clone(), (None, Some(2)), None),
            ("after it", a.clone(), (Some(5), None), None),
            ("all before is gone", vec![], (None, None), Some(&told("before 2026-11-23T10:05:00Z"))),
            ("all before is gone, which the first line tells", vec![], (Some(1), None), None),
        ] {
            let mut numbers = Numbers::default();
            for (run, seq, minute) in &earlier {
                let mut line = line(run, *seq, *minute);
                if *seq == 2 {
                    line.message = message::AUDIT_ENDS.to_owned();
                }
                numbers.read(&line);
            }
            let mut begins = line("c", 1, 5);
            begins.set("before", "b");
            numbers.read(&begins);
            let at = |minute: Option<i64>| minute.map(|minute| BEGIN + Duration::minutes(minute));
            let begin = if earlier.is_empty() { 5 } else { 1 };
            let told = numbers.gaps(BEGIN + Duration::minutes(begin), at(span.0), at(span.1));
            assert_eq!(told.iter().collect::<Vec<_>>(), want.into_iter().collect::<Vec<_>>(), "{case}");
        }
    }

    /// However the numbers lie, what is kept is bounded, and it is said that not all is known.
    #[test]
    fn scattered_numbers_are_bounded() {
        let mut numbers = Numbers::default();
        let mut line = line("a", 1, 1);
        for seq in 0..MOST_STRETCHES + 5 {
            line.set("seq", seq * 2);
            numbers.read(&line);
        }
        assert_eq!(numbers.read.values().map(|run| run.stretches.len()).sum::<usize>(), MOST_STRETCHES);
        let told = numbers.gaps(BEGIN, None, None);
        assert_eq!(told.len(), MOST_TOLD + 2);
        assert!(told.last().unwrap().starts_with("the numbers of the lines have so many gaps"), "{told:?}");
    }
}
