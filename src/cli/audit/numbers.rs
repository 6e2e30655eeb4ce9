//! The numbers of the lines that were read: where some of a run are missing, a file is, or lines of it.

use std::collections::{BTreeMap, BTreeSet};

use time::OffsetDateTime;

use super::{holders::shown, line::AuditLine};
use crate::{cli::terminal::clean, store::audit::message};

/// Stretches that are told apart. Whole files are a few for each run.
const MOST_STRETCHES: usize = 100_000;
/// How many places are told one by one.
const MOST_TOLD: usize = 10;
/// Lines that several threads write are in the order of their numbers but for this many.
const OUT_OF_ORDER: u64 = 64;

/// Numbers without a gap, and when the lines that have the first and the last of them were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    last: u64,
    begins: OffsetDateTime,
    ends: OffsetDateTime,
}

/// Numbers that nobody has, and between which times they were given.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MissingLines<'a> {
    run: &'a str,
    first: u64,
    last: u64,
    /// `None` before the first line that was read.
    after: Option<OffsetDateTime>,
    before: OffsetDateTime,
}

/// The numbers that were read, by run and the first of each stretch.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    read: BTreeMap<String, BTreeMap<u64, Stretch>>,
    stretches: usize,
    is_scattered: bool,
    /// Lines that the agent lost before it wrote the one with this number: they have been told.
    lost: BTreeMap<(String, u64), u64>,
    lost_before_next: u64,
    /// Runs whose last line was read.
    ended: BTreeSet<String>,
}

impl Numbers {
    /// The agent lost so many lines before the next.
    pub(super) fn lose(&mut self, lines: u64) {
        self.lost_before_next = self.lost_before_next.saturating_add(lines);
    }

    /// What another file begins with is not about this one.
    pub(super) fn end_file(&mut self) {
        self.lost_before_next = 0;
    }

    pub(super) fn read(&mut self, line: &AuditLine) {
        let (Some(at), Some(run), Some(seq)) = (line.at, line.text("run"), line.number("seq")) else {
            return;
        };
        let lost = std::mem::take(&mut self.lost_before_next);
        if lost > 0 && self.lost.len() < MOST_STRETCHES {
            self.lost.insert((run.to_owned(), seq), lost);
        }
        if self.stretches >= MOST_STRETCHES {
            self.is_scattered = true;
            return;
        }
        if line.message == message::AUDIT_ENDS {
            self.ended.insert(run.to_owned());
        }
        if !self.read.contains_key(run) {
            self.read.insert(run.to_owned(), BTreeMap::new());
        }
        let Some(of_run) = self.read.get_mut(run) else { return };
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

    /// Where numbers are missing that may be about the time from `from` to `to`, in words. Of what is before `begin`, the first
    /// line of all, it is known without them that it was not read, unless any time is meant.
    pub(super) fn gaps(
        &self,
        begin: OffsetDateTime,
        from: Option<OffsetDateTime>,
        to: Option<OffsetDateTime>,
    ) -> Vec<String> {
        let concerns = |missing: &MissingLines<'_>| {
            from.is_none_or(|from| missing.before > from && missing.before > begin)
                && to.is_none_or(|to| missing.after.is_none_or(|after| after < to))
        };
        let mut missing: Vec<MissingLines<'_>> = self.missing();
        missing.retain(|missing| concerns(missing) && !self.is_told(missing));
        missing.sort_by_key(|missing| missing.before);
        let mut told: Vec<String> = missing.iter().take(MOST_TOLD).map(MissingLines::told).collect();
        let mut cut = self.cut_off();
        cut.retain(|(_, after, before)| {
            from.is_none_or(|from| *before > from) && to.is_none_or(|to| *after < to)
        });
        told.extend(cut.iter().take(MOST_TOLD).map(|(run, after, before)| {
            format!(
                "run {} has no end: it was killed, or its last lines, written between {} and {}, are missing",
                clean(run),
                shown(*after),
                shown(*before)
            )
        }));
        if let Some(more) = cut.len().checked_sub(MOST_TOLD).filter(|more| *more > 0) {
            told.push(format!("{more} more runs have no end"));
        }
        if let Some(more) = missing.len().checked_sub(MOST_TOLD).filter(|more| *more > 0) {
            told.push(format!("lines are missing in {more} more places"));
        }
        if self.is_scattered {
            told.push(
                "the numbers of the lines have so many gaps that not all are known: lines are missing"
                    .to_owned(),
            );
        }
        told
    }

    /// Runs whose end is not there, though another run came behind them: between which times it was.
    fn cut_off(&self) -> Vec<(&str, OffsetDateTime, OffsetDateTime)> {
        let spans: Vec<_> = self
            .read
            .iter()
            .filter_map(|(run, stretches)| {
                let begins = stretches.values().map(|stretch| stretch.begins).min()?;
                let ends = stretches.values().map(|stretch| stretch.ends).max()?;
                Some((run.as_str(), begins, ends))
            })
            .collect();
        let mut begins: Vec<_> = spans.iter().map(|(_, begins, _)| *begins).collect();
        begins.sort_unstable();
        let cut = spans.iter().filter(|(run, ..)| !self.ended.contains(*run)).filter_map(|(run, _, ends)| {
            let next = begins.get(begins.partition_point(|begins| begins <= ends))?;
            Some((*run, *ends, *next))
        });
        cut.collect()
    }

    fn missing(&self) -> Vec<MissingLines<'_>> {
        let mut missing = Vec::new();
        for (run, stretches) in &self.read {
            let begin = stretches.values().map(|stretch| stretch.begins).min();
            // A run begins after what is there of the one before it; before the first of all nothing is known anyway.
            let before_run = self.read.iter().filter(|(other, _)| *other != run);
            let earlier =
                before_run.flat_map(|(_, stretches)| stretches.values().map(|stretch| stretch.ends));
            let mut after = earlier.filter(|at| begin.is_some_and(|begin| *at < begin)).max();
            let mut last = 0_u64;
            for (first, stretch) in stretches {
                if *first > last.saturating_add(1) {
                    let (begin, end) = (last.saturating_add(1), first.saturating_sub(1));
                    missing.push(MissingLines {
                        run,
                        first: begin,
                        last: end,
                        after,
                        before: stretch.begins,
                    });
                }
                (after, last) = (Some(stretch.ends), stretch.last);
            }
        }
        missing
    }

    /// Whether the agent has said that it lost as many lines there.
    fn is_told(&self, missing: &MissingLines<'_>) -> bool {
        let near = missing.first..=missing.last.saturating_add(OUT_OF_ORDER);
        let range = (missing.run.to_owned(), *near.start())..=(missing.run.to_owned(), *near.end());
        let lost = self.lost.range(range).fold(0_u64, |sum, (_, lost)| sum.saturating_add(*lost));
        lost > missing.last.saturating_sub(missing.first)
    }
}

impl MissingLines<'_> {
    fn told(&self) -> String {
        let Self { run, first, last, after, before } = self;
        let run = clean(run);
        let lines = match (first == last, after) {
            (true, _) => format!("line {first} of run {run} is missing"),
            (false, _) => format!("lines {first} to {last} of run {run} are missing"),
        };
        let when = match after {
            Some(after) => format!("written between {} and {}", shown(*after), shown(*before)),
            None => format!("written before {}", shown(*before)),
        };
        format!("{lines}, {when}: they may be about others who held it")
    }
}

#[cfg(test)]
mod tests {
    use time::{Duration, macros::datetime};

    use super::*;

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

    /// What the agent has said that it lost is not told again; what is missing beside that is.
    #[test]
    fn lost_lines_are_told_once() {
        for (case, lost, before, is_told) in [
            ("as many", 5, 8, false),
            ("more, of other lines", 9, 8, false),
            ("fewer", 4, 8, true),
            ("elsewhere", 5, 2, true),
            ("told a line later", 5, 9, false),
        ] {
            let mut numbers = Numbers::default();
            for seq in [1, 2, 8, 9] {
                if seq == before {
                    numbers.lose(lost);
                }
                numbers.read(&line("a", seq, 1));
            }
            assert_eq!(!numbers.gaps(BEGIN, None, None).is_empty(), is_told, "{case}");
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
        assert_eq!(numbers.read.values().map(BTreeMap::len).sum::<usize>(), MOST_STRETCHES);
        let told = numbers.gaps(BEGIN, None, None);
        assert_eq!(told.len(), MOST_TOLD + 2);
        assert!(told.last().unwrap().starts_with("the numbers of the lines have so many gaps"), "{told:?}");
    }
}
