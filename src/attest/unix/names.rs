//! The numbers of the names that entries ask for, from the node's databases of users and groups (NSS).
//!
//! Nothing that a caller brings is looked up. The question is turned round: the names that entries ask for are looked
//! up when they are asked for, when the databases change, and now and then; whoever has such a number then has the
//! name. So a call looks up nothing, however many groups its process has, and there are no more lookups than entries
//! have names. A name's number is its first in the database: of several names of one number, each is the caller's.
//!
//! A name that is not answered may be anybody's, whose call is told to come again then: but not that of a user of the
//! node's own, and not for longer than a minute, or a directory that is away would take the identities of all.
//!
//! A lookup may ask a directory server and hang, so each is made by one of [`WORKERS`] threads that do nothing else
//! and are there from the start. Nobody waits for them but the start and a reload, and these for a moment only
//! ([`Names::wait`]). What is known of each name, and when it is looked up again: [`table`].

mod table;

use std::{
    collections::BTreeSet,
    fs::File,
    io::Read as _,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

use arc_swap::ArcSwap;
use nix::errno::Errno;

pub(super) use self::table::NameAnswer;
use self::table::{NameNews, NameTable, NameTask, NameTrouble, OwnFiles};
use crate::{
    attest::attestors::News,
    limits::pace::Pace,
    os::accounts::{AccountName, FilesStamp, GROUP, PASSWD},
};

/// Threads that look up, those that hang included. One of them is kept for names in the node's own files.
const WORKERS: usize = 3;

/// How much of a file of the database is read, in bytes, to see which names stand there.
const MAX_FILE: u64 = 8 << 20;

/// A database of users and groups.
pub(super) trait Database: Send + Sync + 'static {
    /// The number of a name, or that nobody has it. May hang.
    ///
    /// # Errors
    /// It cannot say.
    fn number(&self, name: &AccountName) -> Result<Option<u32>, Errno>;

    /// Tells one state of its files from another.
    fn stamp(&self) -> FilesStamp;

    /// What stands in its files.
    fn own_accounts(&self) -> OwnAccounts;
}

/// What stands in the node's own files of users and groups.
#[derive(Clone, Debug, Default)]
pub(in crate::attest::unix) struct OwnAccounts {
    names: BTreeSet<AccountName>,
    /// Sorted.
    users: Vec<u32>,
    /// Sorted.
    groups: Vec<u32>,
}

impl OwnAccounts {
    #[cfg(test)]
    pub(in crate::attest::unix) fn of(names: &[AccountName], users: &[u32], groups: &[u32]) -> Self {
        Self { names: names.iter().cloned().collect(), users: users.to_vec(), groups: groups.to_vec() }
    }

    /// Whether an entry asks for this name, and it stands there.
    pub(in crate::attest::unix) fn has(&self, name: &AccountName) -> bool {
        self.names.contains(name)
    }

    /// Whether this is a user of the node's own, and so nobody whom a directory server has another name for.
    pub(in crate::attest::unix) fn has_user(&self, uid: u32) -> bool {
        self.users.binary_search(&uid).is_ok()
    }

    /// The same of a group.
    pub(in crate::attest::unix) fn has_group(&self, gid: u32) -> bool {
        self.groups.binary_search(&gid).is_ok()
    }
}

/// The database of this node.
struct NodeDatabase;

impl Database for NodeDatabase {
    fn number(&self, name: &AccountName) -> Result<Option<u32>, Errno> {
        name.number()
    }

    fn stamp(&self) -> FilesStamp {
        FilesStamp::now()
    }

    fn own_accounts(&self) -> OwnAccounts {
        let mut own = OwnAccounts::default();
        for (name, number) in accounts_in(PASSWD) {
            own.names.insert(AccountName::User(name));
            own.users.extend(number);
        }
        for (name, number) in accounts_in(GROUP) {
            own.names.insert(AccountName::Group(name));
            own.groups.extend(number);
        }
        own.users.sort_unstable();
        own.groups.sort_unstable();
        own
    }
}

/// The first and the third field of each line (passwd(5), group(5)). A file that cannot be read has none: then all
/// names are looked up alike.
fn accounts_in(path: &str) -> Vec<(Arc<str>, Option<u32>)> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE).read_to_end(&mut text));
    if read.is_err() {
        return Vec::new();
    }
    let account = |line: &[u8]| {
        let mut fields = str::from_utf8(line).ok()?.split(':');
        let name = fields.next()?;
        Some((name.into(), fields.nth(1).and_then(|number| number.parse().ok())))
    };
    text.split(|byte| *byte == b'\n').filter_map(account).collect()
}

/// Looks up names for as long as it lives.
pub(super) struct Names(Arc<NamesShared>);

struct NamesShared {
    table: Mutex<NameTable<FilesStamp>>,
    /// There is more to do.
    wake: Condvar,
    /// A name was looked up for the first time.
    tried: Condvar,
    database: Box<dyn Database>,
    /// Of the names, those alone that are asked for.
    own: ArcSwap<OwnAccounts>,
    news: News,
    /// For lines about single names: a directory server may know thousands of them.
    pace: Pace,
}

impl Names {
    /// Names from the node's database; `news` is told when one of them is another's.
    pub(super) fn of_node(news: News) -> Self {
        Self::of(Box::new(NodeDatabase), news)
    }

    /// The same, from this database.
    pub(super) fn of(database: Box<dyn Database>, news: News) -> Self {
        let shared = Arc::new(NamesShared {
            table: Mutex::new(NameTable::new(Instant::now())),
            wake: Condvar::new(),
            tried: Condvar::new(),
            database,
            own: ArcSwap::default(),
            news,
            pace: Pace::default(),
        });
        for n in 1..=WORKERS {
            let worker = Arc::clone(&shared);
            let made = thread::Builder::new().name(format!("names-{n}")).spawn(move || worker.work());
            if let Err(error) = made {
                // What is not looked up is not answered: nobody loses an identity in silence.
                tracing::error!(%error, "no thread to look up the names of users and groups");
            }
        }
        Self(shared)
    }

    /// Has these names, each of which stands there once, looked up for as long as what is returned lives.
    pub(super) fn ask(&self, names: Vec<AccountName>) -> AskedNames {
        self.0.table().ask(&names, Instant::now());
        self.0.wake.notify_all();
        AskedNames { names, shared: Arc::clone(&self.0) }
    }

    /// The node's own files, as they last looked.
    pub(super) fn own(&self) -> Arc<OwnAccounts> {
        self.0.own.load_full()
    }

    /// Waits until each name was looked up once, or until `deadline`. Returns how many were not. Blocks this thread.
    pub(super) fn wait(&self, deadline: Instant) -> usize {
        let mut table = self.0.table();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if table.untried() == 0 || left.is_zero() {
                return table.untried();
            }
            table = match self.0.tried.wait_timeout(table, left) {
                Ok((table, _)) => table,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.0.table().end();
        self.0.wake.notify_all();
    }
}

/// Names that are looked up while this lives.
pub(super) struct AskedNames {
    names: Vec<AccountName>,
    shared: Arc<NamesShared>,
}

impl std::fmt::Debug for AskedNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.names).finish()
    }
}

impl AskedNames {
    /// Until when those that are not answered may yet be anybody's; `None` where all are.
    pub(super) fn doubted_until(&self) -> Option<Instant> {
        self.shared.table().doubted_until(&self.names)
    }

    /// What is known of each now. Does not wait.
    pub(super) fn answers(&self) -> impl Iterator<Item = (&AccountName, NameAnswer)> {
        let table = self.shared.table();
        let answers: Vec<NameAnswer> = self.names.iter().map(|name| table.answer(name)).collect();
        drop(table);
        self.names.iter().zip(answers)
    }
}

impl Drop for AskedNames {
    fn drop(&mut self) {
        self.shared.table().release(&self.names);
    }
}

impl NamesShared {
    fn table(&self) -> MutexGuard<'_, NameTable<FilesStamp>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a worker does, to the end.
    fn work(&self) {
        loop {
            let mut table = self.table();
            match table.next(Instant::now()) {
                NameTask::End => return,
                NameTask::Wait(None) => drop(self.wake.wait(table)),
                NameTask::Wait(Some(long)) => drop(self.wake.wait_timeout(table, long)),
                NameTask::LookUp(name, whence) => {
                    drop(table);
                    let answer = self.database.number(&name);
                    let mut table = self.table();
                    let news = table.answered(&name, whence, answer, Instant::now());
                    if news.is_other {
                        // Before anybody can see that it was answered.
                        self.news.send_modify(|count| *count += 1);
                    }
                    drop(table);
                    self.tried.notify_all();
                    self.say(&name, &news);
                }
                NameTask::LookAtFiles => {
                    drop(table);
                    let stamp = self.database.stamp();
                    let is_unread = self.table().is_unread(&stamp);
                    let names = is_unread.then(|| {
                        let mut own = self.database.own_accounts();
                        let names = self.table().asked_of(std::mem::take(&mut own.names));
                        own.names.clone_from(&names);
                        self.own.store(Arc::new(own));
                        names
                    });
                    self.table().looked(OwnFiles { stamp, names }, Instant::now());
                    self.wake.notify_all();
                }
            }
        }
    }

    fn say(&self, name: &AccountName, news: &NameNews) {
        let Some(said) = news.said else { return };
        let (kind, name) = (name.word(), name.text());
        self.pace.say(|left_out| match said {
            Some(NameTrouble::Nobody) => tracing::warn!(
                kind,
                name,
                left_out,
                "entries ask for a user or group name that does not exist on this node: they match no process"
            ),
            Some(NameTrouble::Unanswered(errno)) => tracing::warn!(
                kind,
                name,
                error = %errno,
                left_out,
                "the user database does not answer for a name that entries ask for"
            ),
            None => tracing::info!(kind, name, left_out, "the user database tells the number of this name"),
        });
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    /// More than anything here takes.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A database that answers as a function does, and says which names it was asked for.
    pub(in crate::attest::unix) struct FakeDatabase<F> {
        answer: F,
        own: OwnAccounts,
        asked: Arc<Mutex<Vec<AccountName>>>,
    }

    impl<F: Fn(&AccountName) -> Result<Option<u32>, Errno> + Send + Sync + 'static> FakeDatabase<F> {
        pub(in crate::attest::unix) fn new(answer: F) -> Self {
            Self { answer, own: OwnAccounts::default(), asked: Arc::default() }
        }
    }

    impl<F: Fn(&AccountName) -> Result<Option<u32>, Errno> + Send + Sync + 'static> Database for FakeDatabase<F> {
        fn number(&self, name: &AccountName) -> Result<Option<u32>, Errno> {
            self.asked.lock().unwrap().push(name.clone());
            (self.answer)(name)
        }

        fn stamp(&self) -> FilesStamp {
            FilesStamp::of(&[])
        }

        fn own_accounts(&self) -> OwnAccounts {
            self.own.clone()
        }
    }

    fn user(name: &str) -> AccountName {
        AccountName::User(name.into())
    }

    fn answers(asked: &AskedNames) -> Vec<NameAnswer> {
        asked.answers().map(|(_, answer)| answer).collect()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn names_are_looked_up_while_somebody_asks_for_them() {
        let database = FakeDatabase::new(|name: &AccountName| match name {
            AccountName::User(_) => Ok(Some(7)),
            AccountName::Group(_) => Ok(None),
        });
        let asked = Arc::clone(&database.asked);
        let news = News::default();
        let names = Names::of(Box::new(database), Arc::clone(&news));
        let first = names.ask(vec![user("x"), AccountName::Group("x".into())]);
        assert_eq!(names.wait(Instant::now() + PATIENCE), 0);
        assert_eq!(answers(&first), [NameAnswer::Number(7), NameAnswer::Nobody]);
        assert_eq!(*news.borrow(), 2);
        let second = names.ask(vec![user("x")]);
        drop(first);
        assert_eq!(answers(&second), [NameAnswer::Number(7)], "another asks for it too");
        assert_eq!(asked.lock().unwrap().len(), 2, "it is known");
        drop(second);
        assert_eq!(names.0.table().answer(&user("x")), NameAnswer::Unanswered, "forgotten");
    }

    #[test]
    fn a_directory_that_hangs_holds_up_no_name_of_the_node() {
        let (let_go, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let mut database = FakeDatabase::new(move |name: &AccountName| {
            if name.text().starts_with("far") {
                let gone = held.lock().unwrap().recv(); // until the test lets go of its end
                assert!(gone.is_err());
            }
            Ok(Some(7))
        });
        // Later in the order of their names than those that hang.
        database.own.names = ["near1", "near2", "near3"].map(user).into();
        let asked = Arc::clone(&database.asked);
        let names = Names::of(Box::new(database), News::default());
        let far = names.ask((0..100).map(|n| user(&format!("far{n}"))).collect());
        let near = names.ask(["near1", "near2", "near3"].map(user).into());
        let until = Instant::now() + PATIENCE;
        while answers(&near) != [NameAnswer::Number(7); 3] {
            assert!(Instant::now() < until, "{:?}", answers(&near));
            thread::yield_now();
        }
        assert_eq!(names.wait(soon()), 100, "nobody waits for the others for ever");
        assert_eq!(answers(&far), [NameAnswer::Unanswered; 100]);
        let hung = asked.lock().unwrap().iter().filter(|name| name.text().starts_with("far")).count();
        assert!(hung < WORKERS, "{hung} hang");
        drop(let_go);
        assert_eq!(names.wait(Instant::now() + PATIENCE), 0);
        assert_eq!(answers(&far), [NameAnswer::Number(7); 100], "all are answered when it answers");
    }

    #[test]
    fn the_node_knows_root() {
        let names = Names::of_node(News::default());
        let asked = names.ask(vec![user("root"), AccountName::Group("root".into()), user("no such user")]);
        assert_eq!(names.wait(Instant::now() + PATIENCE), 0);
        assert_eq!(answers(&asked), [NameAnswer::Number(0), NameAnswer::Number(0), NameAnswer::Nobody]);
        let own = NodeDatabase.own_accounts();
        assert!(own.has(&user("root")) && own.has(&AccountName::Group("root".into())), "{own:?}");
        assert!(own.has_user(0) && own.has_group(0) && !own.has_user(u32::MAX), "{own:?}");
        assert!(accounts_in("/etc/no-such-file").is_empty());
    }
}
