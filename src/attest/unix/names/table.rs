//! What is known of the names that entries ask for, and what is to be looked up next. Pure: it is told the time.
//!
//! A name that is there is looked up again after [`REFRESH`]; one that is not, and one that the database says nothing
//! of, after [`FIRST_RETRY`], then twice as long each time up to [`REFRESH`]; all of them when the database's files
//! change. What was known last holds while the database fails. That a name is gone is believed when it was said twice:
//! an editor may be in the middle of the file.
//!
//! Names that stand in the node's own files are answered without a directory server. One worker is kept for these, so
//! that a server which hangs holds up nobody of this node.

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use ahash::RandomState;
use nix::errno::Errno;

use super::WORKERS;
use crate::os::accounts::AccountName;

/// How long a name's number is believed.
pub(super) const REFRESH: Duration = Duration::from_secs(60);
/// When a name that is not there, or not answered, is looked up again for the first time.
pub(super) const FIRST_RETRY: Duration = Duration::from_secs(5);
/// When it is asked again whether a name is gone.
pub(super) const CONFIRM: Duration = Duration::from_secs(2);
/// How long a name that was never answered makes calls wait for it. A directory that is away for longer takes the
/// identities that need it, and no others.
pub(super) const DOUBT: Duration = Duration::from_secs(60);
/// How often the database's files are looked at.
pub(super) const LOOK: Duration = Duration::from_secs(5);

/// What is known of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::attest::unix) enum NameAnswer {
    /// Its number.
    Number(u32),
    /// Nobody on this node has the name.
    Nobody,
    /// The database never said.
    Unanswered,
}

/// What a worker is to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NameTask {
    /// Look up this name, and tell the table with [`NameTable::answered`].
    LookUp(AccountName, Whence),
    /// Look at the files, and tell the table with [`NameTable::looked`].
    LookAtFiles,
    /// Nothing so long, or until somebody asks for more.
    Wait(Option<Duration>),
    /// Nobody asks for anything any more.
    End,
}

/// Where a name's answer is expected to come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whence {
    /// It stands in the node's own files.
    Files,
    /// Perhaps from a server.
    Elsewhere,
}

/// What is worth a line in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NameTrouble {
    /// Nobody on this node has the name.
    Nobody,
    /// The database does not say.
    Unanswered(Errno),
}

/// What an answer changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct NameNews {
    /// Whether other numbers, or other names that are not answered, hold from here on.
    pub(super) is_other: bool,
    /// Where trouble began, changed or ended: what there is.
    pub(super) said: Option<Option<NameTrouble>>,
}

/// The names of the node's own files, and how these looked.
#[derive(Debug, Default)]
pub(super) struct OwnFiles<S> {
    pub(super) stamp: S,
    /// `None` where the files are those of last time.
    pub(super) names: Option<BTreeSet<AccountName>>,
}

#[derive(Debug)]
struct NameRecord {
    askers: usize,
    /// When it was first asked for.
    since: Instant,
    answer: NameAnswer,
    whence: Whence,
    /// Whether it was looked up at all.
    tried: bool,
    /// How often in a row there was no number.
    failures: u32,
    /// When it is to be looked up; `None` while it is.
    due: Option<Instant>,
    /// The files changed while it was looked up.
    stale: bool,
    /// It was said once that it is gone.
    gone: bool,
    said: Option<NameTrouble>,
}

/// The names that entries ask for. `S` tells one state of the database's files from another.
#[derive(Debug)]
pub(super) struct NameTable<S> {
    names: HashMap<AccountName, NameRecord, RandomState>,
    /// Of names in the node's own files, and of others: when each is due.
    due: [BTreeSet<(Instant, AccountName)>; 2],
    /// How many workers look up names of others.
    elsewhere: usize,
    /// Names that were never looked up.
    untried: usize,
    stamp: Option<S>,
    /// When the files are looked at next; `None` while they are.
    next_look: Option<Instant>,
    /// There are names whose place in the files is not known.
    unplaced: bool,
    ended: bool,
}

impl<S: PartialEq> NameTable<S> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            names: HashMap::default(),
            due: Default::default(),
            elsewhere: 0,
            untried: 0,
            stamp: None,
            next_look: Some(now),
            unplaced: false,
            ended: false,
        }
    }

    /// Somebody asks for these, each once.
    pub(super) fn ask<'a>(&mut self, names: impl IntoIterator<Item = &'a AccountName>, now: Instant) {
        for name in names {
            if let Some(record) = self.names.get_mut(name) {
                record.askers += 1;
                continue;
            }
            let record = NameRecord {
                askers: 1,
                since: now,
                answer: NameAnswer::Unanswered,
                whence: Whence::Elsewhere,
                tried: false,
                failures: 0,
                due: None,
                stale: false,
                gone: false,
                said: None,
            };
            self.names.insert(name.clone(), record);
            self.untried += 1;
            self.unplaced = true;
            self.next_look = self.next_look.map(|_| now);
            self.schedule(name, now);
        }
    }

    /// Somebody asks for these no more.
    pub(super) fn release<'a>(&mut self, names: impl IntoIterator<Item = &'a AccountName>) {
        for name in names {
            let Some(record) = self.names.get_mut(name) else { continue };
            record.askers -= 1;
            if record.askers == 0 {
                self.unschedule(name);
                let tried = self.names.remove(name).is_none_or(|record| record.tried);
                self.untried -= usize::from(!tried);
            }
        }
    }

    /// What is known of this name.
    pub(super) fn answer(&self, name: &AccountName) -> NameAnswer {
        self.names.get(name).map_or(NameAnswer::Unanswered, |record| record.answer)
    }

    /// Until when those of these names that are not answered may yet be anybody's: [`DOUBT`] after the last of them was
    /// first asked for.
    pub(super) fn doubted_until<'a>(
        &self,
        names: impl IntoIterator<Item = &'a AccountName>,
    ) -> Option<Instant> {
        let records = names.into_iter().filter_map(|name| self.names.get(name));
        let unanswered = records.filter(|record| record.answer == NameAnswer::Unanswered);
        unanswered.map(|record| record.since + DOUBT).max()
    }

    /// Those of these names that somebody asks for.
    pub(super) fn asked_of(&self, mut names: BTreeSet<AccountName>) -> BTreeSet<AccountName> {
        names.retain(|name| self.names.contains_key(name));
        names
    }

    /// How many names were never looked up, or are for the first time.
    pub(super) fn untried(&self) -> usize {
        self.untried
    }

    /// Has every worker end.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    /// What the worker who asks is to do.
    pub(super) fn next(&mut self, now: Instant) -> NameTask {
        if self.ended {
            return NameTask::End;
        }
        if self.names.is_empty() {
            return NameTask::Wait(None);
        }
        if self.next_look.is_some_and(|at| at <= now) {
            self.next_look = None;
            return NameTask::LookAtFiles;
        }
        let first = |whence: Whence| self.due.get(usize::from(whence == Whence::Elsewhere))?.first();
        let elsewhere = first(Whence::Elsewhere).filter(|_| self.elsewhere < WORKERS - 1);
        let next = [(Whence::Files, first(Whence::Files)), (Whence::Elsewhere, elsewhere)];
        let due = next.iter().find_map(|(whence, first)| {
            first.filter(|(at, _)| *at <= now).map(|(_, name)| (*whence, name.clone()))
        });
        if let Some((whence, name)) = due {
            self.unschedule(&name);
            self.elsewhere += usize::from(whence == Whence::Elsewhere);
            return NameTask::LookUp(name, whence);
        }
        let then = next.iter().filter_map(|(_, first)| first.map(|(at, _)| *at)).chain(self.next_look).min();
        NameTask::Wait(then.map(|at| at.saturating_duration_since(now)))
    }

    /// Takes what a lookup gave.
    pub(super) fn answered(
        &mut self,
        name: &AccountName,
        whence: Whence,
        answer: Result<Option<u32>, Errno>,
        now: Instant,
    ) -> NameNews {
        self.elsewhere -= usize::from(whence == Whence::Elsewhere);
        let Some(record) = self.names.get_mut(name) else { return NameNews::default() };
        let before = record.answer;
        let mut trouble = None;
        let mut wait = REFRESH;
        match (answer, before) {
            (Ok(Some(number)), _) => {
                record.answer = NameAnswer::Number(number);
                (record.failures, record.gone) = (0, false);
            }
            (Ok(None), NameAnswer::Number(_)) if !record.gone => {
                record.gone = true;
                trouble = record.said;
                wait = CONFIRM;
            }
            (Ok(None), _) => {
                record.answer = NameAnswer::Nobody;
                record.gone = false;
                trouble = Some(NameTrouble::Nobody);
                wait = retry(&mut record.failures);
            }
            (Err(errno), _) => {
                trouble = Some(NameTrouble::Unanswered(errno));
                wait = retry(&mut record.failures);
            }
        }
        let news =
            NameNews { is_other: record.answer != before, said: (trouble != record.said).then_some(trouble) };
        record.said = trouble;
        self.untried -= usize::from(!std::mem::replace(&mut record.tried, true));
        let wait = if std::mem::take(&mut record.stale) { Duration::ZERO } else { wait };
        // Another lookup of it may have been first: it was let go, and asked for again.
        self.unschedule(name);
        self.schedule(name, now + wait);
        news
    }

    /// Whether the files must be read, which look like this now.
    pub(super) fn is_unread(&self, stamp: &S) -> bool {
        self.unplaced || self.stamp.as_ref() != Some(stamp)
    }

    /// Takes how the files look. If other than last time, every name is looked up anew.
    pub(super) fn looked(&mut self, files: OwnFiles<S>, now: Instant) {
        self.next_look = Some(now + LOOK);
        let is_other = self.stamp.as_ref().is_some_and(|stamp| *stamp != files.stamp);
        self.stamp = Some(files.stamp);
        let Some(own) = files.names else {
            // Somebody asked for more meanwhile.
            if self.unplaced {
                self.next_look = Some(now);
            }
            return;
        };
        self.unplaced = false;
        let names: Vec<AccountName> = self.names.keys().cloned().collect();
        for name in names {
            let due = self.unschedule(&name);
            let Some(record) = self.names.get_mut(&name) else { continue };
            record.whence = if own.contains(&name) { Whence::Files } else { Whence::Elsewhere };
            if is_other {
                record.failures = 0;
                record.stale = due.is_none();
            }
            if let Some(due) = due {
                self.schedule(&name, if is_other { now } else { due });
            }
        }
    }

    fn schedule(&mut self, name: &AccountName, at: Instant) {
        let Some(record) = self.names.get_mut(name) else { return };
        record.due = Some(at);
        if let Some(due) = self.due.get_mut(usize::from(record.whence == Whence::Elsewhere)) {
            due.insert((at, name.clone()));
        }
    }

    fn unschedule(&mut self, name: &AccountName) -> Option<Instant> {
        let record = self.names.get_mut(name)?;
        let at = record.due.take()?;
        if let Some(due) = self.due.get_mut(usize::from(record.whence == Whence::Elsewhere)) {
            due.remove(&(at, name.clone()));
        }
        Some(at)
    }
}

/// When to ask again, the so many-th time in a row.
fn retry(failures: &mut u32) -> Duration {
    let wait = FIRST_RETRY.saturating_mul(1_u32.checked_shl(*failures).unwrap_or(u32::MAX));
    *failures = failures.saturating_add(1);
    wait.min(REFRESH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str) -> AccountName {
        AccountName::User(name.into())
    }

    /// A table, and a moment that is moved on.
    struct Fixture {
        table: NameTable<u32>,
        now: Instant,
    }

    impl Fixture {
        fn new(names: &[&str]) -> Self {
            let now = Instant::now();
            let mut it = Self { table: NameTable::new(now), now };
            it.ask(names);
            it
        }

        fn ask(&mut self, names: &[&str]) {
            let names: Vec<_> = names.iter().map(|name| user(name)).collect();
            self.table.ask(&names, self.now);
        }

        /// The files are as they were, and hold these names.
        fn look(&mut self, stamp: u32, own: &[&str]) {
            assert_eq!(self.table.next(self.now), NameTask::LookAtFiles);
            let names = self.table.is_unread(&stamp).then(|| own.iter().map(|name| user(name)).collect());
            self.table.looked(OwnFiles { stamp, names }, self.now);
        }

        /// Lets time pass until the next lookup, with nothing to be seen of the files, and answers it. Returns how long
        /// that took.
        fn lookup(&mut self, answer: Result<Option<u32>, Errno>) -> (Duration, NameNews) {
            let before = self.now;
            loop {
                match self.table.next(self.now) {
                    NameTask::LookUp(name, whence) => {
                        let news = self.table.answered(&name, whence, answer, self.now);
                        return (self.now - before, news);
                    }
                    NameTask::LookAtFiles => {
                        self.table.looked(OwnFiles { stamp: 0, names: None }, self.now);
                    }
                    NameTask::Wait(Some(long)) => self.now += long,
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[test]
    fn what_is_known_holds_and_is_asked_again() {
        let mut it = Fixture::new(&["web"]);
        it.look(0, &[]);
        let seconds = Duration::from_secs;
        let nobody = Some(Some(NameTrouble::Nobody));
        let failed = Some(Some(NameTrouble::Unanswered(Errno::EIO)));
        for (case, answer, after, is_other, said, known) in [
            ("at once", Err(Errno::EIO), 0, false, failed, NameAnswer::Unanswered),
            ("with back-off", Err(Errno::EIO), 5, false, None, NameAnswer::Unanswered),
            ("twice as long", Ok(None), 10, true, nobody, NameAnswer::Nobody),
            ("twice as long", Ok(None), 20, false, None, NameAnswer::Nobody),
            ("twice as long", Ok(None), 40, false, None, NameAnswer::Nobody),
            ("not longer than a minute", Ok(Some(7)), 60, true, Some(None), NameAnswer::Number(7)),
            ("a minute later", Ok(Some(7)), 60, false, None, NameAnswer::Number(7)),
            ("another number", Ok(Some(8)), 60, true, None, NameAnswer::Number(8)),
            ("it fails: the last holds", Err(Errno::EIO), 60, false, failed, NameAnswer::Number(8)),
            ("gone once, while it fails", Ok(None), 5, false, None, NameAnswer::Number(8)),
            ("there again", Ok(Some(8)), 2, false, Some(None), NameAnswer::Number(8)),
            ("gone once", Ok(None), 60, false, None, NameAnswer::Number(8)),
            ("gone twice", Ok(None), 2, true, nobody, NameAnswer::Nobody),
            ("the back-off began anew", Ok(None), 5, false, None, NameAnswer::Nobody),
        ] {
            let (took, news) = it.lookup(answer);
            assert_eq!(took, seconds(after), "{case}");
            assert_eq!(news, NameNews { is_other, said }, "{case}");
            assert_eq!(it.table.answer(&user("web")), known, "{case}");
        }
    }

    #[test]
    fn all_is_asked_again_when_the_files_change() {
        let mut it = Fixture::new(&["web"]);
        it.look(0, &[]);
        it.lookup(Ok(None));
        it.now += LOOK;
        it.look(1, &["web"]);
        let NameTask::LookUp(name, Whence::Files) = it.table.next(it.now) else { panic!("{:?}", it.table) };
        // They change once more while it is looked up.
        it.now += LOOK;
        it.look(2, &["web"]);
        it.table.answered(&name, Whence::Files, Ok(Some(7)), it.now);
        assert_eq!(it.lookup(Ok(Some(8))).0, Duration::ZERO, "what was found may be of the old files");
        assert_eq!(it.lookup(Ok(Some(8))).0, REFRESH);
    }

    #[test]
    fn one_worker_is_kept_for_the_names_of_the_node() {
        let mut it = Fixture::new(&["a", "b", "c", "own"]);
        it.look(0, &["own"]);
        let next = |it: &mut Fixture| it.table.next(it.now);
        assert_eq!(next(&mut it), NameTask::LookUp(user("own"), Whence::Files), "these first");
        assert_eq!(next(&mut it), NameTask::LookUp(user("a"), Whence::Elsewhere));
        assert_eq!(next(&mut it), NameTask::LookUp(user("b"), Whence::Elsewhere));
        assert_eq!(next(&mut it), NameTask::Wait(Some(LOOK)), "two hang, and the third waits for the node's");
        it.table.answered(&user("own"), Whence::Files, Ok(Some(1)), it.now);
        it.now += REFRESH;
        it.look(0, &[]);
        assert_eq!(next(&mut it), NameTask::LookUp(user("own"), Whence::Files));
        it.table.answered(&user("a"), Whence::Elsewhere, Ok(Some(1)), it.now);
        assert_eq!(next(&mut it), NameTask::LookUp(user("c"), Whence::Elsewhere));
        assert_eq!(it.table.untried(), 2, "b and c");
    }

    #[test]
    fn what_nobody_asks_for_is_forgotten() {
        let mut it = Fixture::new(&["a", "b"]);
        it.look(0, &[]);
        it.ask(&["b"]);
        let NameTask::LookUp(a, whence) = it.table.next(it.now) else { panic!("{:?}", it.table) };
        it.table.release(&[user("a"), user("b")]);
        assert_eq!(it.table.untried(), 1, "b is still asked for");
        let news = it.table.answered(&a, whence, Ok(Some(1)), it.now);
        assert_eq!(news, NameNews::default(), "nobody waits for a any more");
        it.table.release(&[user("b")]);
        assert_eq!((it.table.untried(), it.table.elsewhere), (0, 0));
        assert_eq!(it.table.next(it.now), NameTask::Wait(None));
        assert!(it.table.due.iter().all(BTreeSet::is_empty), "{:?}", it.table);
        it.table.end();
        assert_eq!(it.table.next(it.now), NameTask::End);
    }
}
