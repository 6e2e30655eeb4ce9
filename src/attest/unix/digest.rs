//! SHA-256 of executables, each content hashed once.
//!
//! An executable is its owner's, so everything here is bounded against one who rewrites it for every call, or has one of
//! a size that nobody can read: files are read on the [`FileThreads`] in steps of [`STEP`], in which families take
//! turns, a size is checked before and while reading, and a file that nobody waits for is let go. Callers of the
//! same file share one hash.
//!
//! What is read here is wanted once, so the kernel is told to keep none of it: the pages of large files would be reckoned
//! to the agent's cgroup, up to its limit.
//!
//! A digest is kept by the file's [`Stamp`], of which no user can set the time of change. File systems count that
//! time in steps of milliseconds, so a file that changed in the last [`SETTLED`] may change again under the same
//! stamp: its digest is answered and not kept. A file that changes while it is read has no digest. Of a file system
//! that a user wrote byte by byte and had mounted, a stamp says nothing: mounting such is for root to allow.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{Context, SHA256};
use nix::sys::stat::fstat;
use tokio::sync::watch;

use super::{
    executable::{self, Executable, ExecutableError, Stamp},
    threads::{FileTask, FileThreads, GivenUp, PATIENCE, TaskKind, TaskPlace, TaskStep},
};
use crate::{
    attest::process::ProcDir,
    os::{clock::Clock, file_cache},
};

/// Digests kept.
const CAPACITY: usize = 256;
/// How long a file is read before it is another's turn.
const STEP: Duration = Duration::from_millis(50);
/// How often a file is begun for one who waits.
const TRIES: usize = 3;
/// After so many bytes the kernel lets go of what was read.
const LET_GO_EVERY: u64 = 1024 * 1024;
/// So far ahead it reads: not as far as the disk is set to, which may be more than the cgroup has.
const AHEAD: u64 = 2 * LET_GO_EVERY;
/// How much is read at a time.
const CHUNK: usize = 64 * 1024;
/// How long a file must have been unchanged for its digest to be kept, in seconds.
const SETTLED: i64 = 2;

/// The digest in lower-case hexadecimal.
pub(super) type Hex = Arc<str>;

type DigestResult = Result<Hex, ExecutableError>;

/// A file to hash.
#[derive(Clone, Debug)]
pub(super) struct Hashed {
    pub(super) executable: Executable,
    pub(super) stamp: Stamp,
    /// The directory of a process that executes it.
    pub(super) process: PathBuf,
    /// The most that is hashed, in bytes.
    pub(super) limit: u64,
    /// Whose share of the threads and of what is kept it takes.
    pub(super) family: u64,
}

/// The digests that are known and being made. Cheap to clone, all clones are one.
#[derive(Clone, Default)]
pub(super) struct Digests(Arc<Mutex<DigestTable>>);

#[derive(Default)]
struct DigestTable {
    known: HashMap<Stamp, KnownDigest>,
    uses: u64,
    /// Being made. As many as there are tasks on the threads.
    made: HashMap<(Stamp, u64), Making>,
}

struct KnownDigest {
    hex: Hex,
    /// Whose room it takes.
    family: u64,
    /// The number of its last use.
    used: u64,
}

/// A digest that is being made.
struct Making {
    /// Has receivers as long as somebody waits.
    done: Arc<watch::Sender<Option<DigestResult>>>,
    given_up: GivenUp,
    /// The directory of the process by way of which the file is opened.
    whose: PathBuf,
}

/// The same, for one who waits.
struct Joined {
    done: watch::Receiver<Option<DigestResult>>,
    given_up: GivenUp,
    whose: PathBuf,
}

impl Hashed {
    /// Where the agent sees it: for messages.
    fn path(&self) -> PathBuf {
        self.process.join(executable::NAME)
    }
}

impl Digests {
    /// The digest of a file's content, if it is known.
    pub(super) fn known(&self, stamp: &Stamp) -> Option<Hex> {
        let mut table = self.table();
        table.uses += 1;
        let uses = table.uses;
        let known = table.known.get_mut(stamp)?;
        known.used = uses;
        Some(Arc::clone(&known.hex))
    }

    /// Hashes a file, or waits for the one who does.
    ///
    /// # Errors
    /// [`ExecutableError`]; [`ExecutableError::Busy`] at once.
    pub(super) async fn make(&self, threads: &FileThreads, file: Hashed) -> DigestResult {
        let until = Instant::now() + PATIENCE;
        for _ in 0..TRIES {
            let Joined { mut done, given_up, whose } = self.join(threads, &file)?;
            let answered = async {
                let outcome = done.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
                outcome.ok().flatten()
            };
            match given_up.or(answered).await.flatten() {
                // It was looked for by way of another process, which may have ended.
                Some(Err(_)) if whose != file.process => {}
                Some(outcome) => return outcome,
                // Late, unless it was let go of just when this one joined.
                None if Instant::now() >= until => break,
                None => {}
            }
        }
        Err(ExecutableError::Late { path: file.path() })
    }

    fn join(&self, threads: &FileThreads, file: &Hashed) -> Result<Joined, ExecutableError> {
        let key = (file.stamp, file.limit);
        let mut table = self.table();
        if let Some(making) = table.made.get(&key) {
            let Making { done, given_up, whose } = making;
            let (done, given_up, whose) = (done.subscribe(), given_up.clone(), whose.clone());
            return Ok(Joined { done, given_up, whose });
        }
        let (done, receiver) = watch::channel(None);
        let done = Arc::new(done);
        let device = Some(file.executable.on.device);
        let place = TaskPlace { kind: TaskKind::Content, family: file.family, device };
        let ticket = threads.take(place).map_err(|_busy| ExecutableError::Busy)?;
        let given_up = ticket.given_up();
        let whose = file.process.clone();
        let making = Making { done: Arc::clone(&done), given_up: given_up.clone(), whose: whose.clone() };
        table.made.insert(key, making);
        drop(table);
        let task = HashTask { digests: self.clone(), file: file.clone(), done, open: None };
        threads.begin(ticket, Box::new(task));
        Ok(Joined { done: receiver, given_up, whose })
    }

    fn table(&self) -> MutexGuard<'_, DigestTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DigestTable {
    /// Keeps a digest. When there are too many, one makes room that is of the family with the most: the one that was
    /// not used for longest. So one user's files never take the place of another's who has fewer.
    fn keep(&mut self, stamp: Stamp, hex: Hex, family: u64) {
        self.uses += 1;
        self.known.insert(stamp, KnownDigest { hex, family, used: self.uses });
        if self.known.len() <= CAPACITY {
            return;
        }
        let mut of_family: HashMap<u64, usize> = HashMap::new();
        for known in self.known.values() {
            *of_family.entry(known.family).or_default() += 1;
        }
        let most = of_family.values().max().copied();
        let heavy = self.known.iter().filter(|(_, it)| of_family.get(&it.family).copied() == most);
        let unused = heavy.min_by_key(|(_, it)| it.used).map(|(stamp, _)| *stamp);
        if let Some(unused) = unused {
            self.known.remove(&unused);
        }
    }
}

/// A file that is being hashed. However that ends, it is no longer among those that are being made.
struct HashTask {
    digests: Digests,
    file: Hashed,
    done: Arc<watch::Sender<Option<DigestResult>>>,
    /// From the first step on.
    open: Option<OpenFile>,
}

struct OpenFile {
    file: File,
    context: Context,
    read: u64,
    /// So far the kernel has let go of it.
    let_go: u64,
}

impl OpenFile {
    fn new(file: File, size: u64) -> Self {
        file_cache::read_what_is_asked_for(&file);
        // What is kept of it may have marks of who read it before, at which the kernel reads ahead all the same.
        file_cache::let_go(&file, 0, size);
        file_cache::fetch(&file, 0, AHEAD);
        Self { file, context: Context::new(&SHA256), read: 0, let_go: 0 }
    }

    /// Has the kernel keep what comes next, and no more.
    fn move_on(&mut self) {
        file_cache::fetch(&self.file, self.let_go.saturating_add(AHEAD), self.read.saturating_add(AHEAD));
        file_cache::let_go(&self.file, self.let_go, self.read);
        self.let_go = self.read;
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        file_cache::let_go(&self.file, self.let_go, self.read.saturating_add(AHEAD));
    }
}

impl FileTask for HashTask {
    fn left(&self) -> u64 {
        self.file.stamp.size().saturating_sub(self.open.as_ref().map_or(0, |open| open.read))
    }

    fn is_wanted(&self) -> bool {
        !self.done.is_closed()
    }

    fn is_begun(&self) -> bool {
        self.open.is_some()
    }

    fn step(&mut self) -> TaskStep {
        let outcome = match self.read_on() {
            Ok(None) => return TaskStep::Again,
            Ok(Some(hex)) => Ok(hex),
            Err(error) => Err(error),
        };
        if let Ok(hex) = &outcome
            && settled(&self.file.stamp)
        {
            self.digests.table().keep(self.file.stamp, Arc::clone(hex), self.file.family);
        }
        // First it is let go of: who comes from here on begins anew.
        self.leave();
        self.done.send_replace(Some(outcome));
        TaskStep::Done
    }
}

impl HashTask {
    /// It is no longer among those that are being made.
    fn leave(&self) {
        let key = (self.file.stamp, self.file.limit);
        let mut table = self.digests.table();
        if table.made.get(&key).is_some_and(|making| Arc::ptr_eq(&making.done, &self.done)) {
            table.made.remove(&key);
        }
    }

    /// Reads for a [`STEP`]; the digest, when that was all.
    fn read_on(&mut self) -> Result<Option<Hex>, ExecutableError> {
        let Self { file: wanted, open, .. } = self;
        let path = wanted.path();
        if open.is_none() {
            let dir = ProcDir::open(wanted.process.clone())?;
            let file = wanted.executable.open(&dir, &wanted.stamp)?;
            *open = Some(OpenFile::new(file, wanted.stamp.size()));
        }
        let Some(open) = open else { return Ok(None) };
        let failed = |errno| ExecutableError::unreadable(path.clone(), errno);
        let began = Instant::now();
        let mut buffer = vec![0; CHUNK];
        while began.elapsed() < STEP {
            let n = match open.file.read(&mut buffer) {
                Ok(0) => {
                    let after = fstat(&open.file).map_err(failed)?;
                    if Stamp::of(&after) != wanted.stamp {
                        return Err(ExecutableError::Changed { path });
                    }
                    return Ok(Some(hex(open.context.clone().finish().as_ref())));
                }
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(failed(executable::errno_of(&e))),
            };
            open.read = open.read.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
            if open.read > wanted.limit {
                return Err(ExecutableError::TooLarge { path, size: open.read, limit: wanted.limit });
            }
            open.context.update(buffer.get(..n).unwrap_or_default());
            if open.read.saturating_sub(open.let_go) >= LET_GO_EVERY {
                open.move_on();
            }
        }
        Ok(None)
    }
}

impl Drop for HashTask {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Whether a file last changed so long ago that a change now would show in its stamp.
fn settled(stamp: &Stamp) -> bool {
    let now = Clock::SYSTEM.now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    i64::try_from(now).is_ok_and(|now| stamp.changed() < now.saturating_sub(SETTLED))
}

fn hex(bytes: &[u8]) -> Hex {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
    bytes.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::PermissionsExt as _,
        path::Path,
        process::{Child, Command},
    };

    use aws_lc_rs::digest::digest;
    use nix::sys::stat::stat;

    use super::{super::unlisted::UnlistedMounts, *};

    /// A process that executes a file.
    struct Sleeper(Child);

    impl Sleeper {
        fn start(program: &Path) -> Self {
            loop {
                // A process that another test starts just now may hold the copy open for a moment.
                match Command::new(program).arg("600").spawn() {
                    Ok(child) => return Self(child),
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::ExecutableFileBusy, "{e}"),
                }
            }
        }

        fn file(&self, limit: u64) -> Hashed {
            let process = PathBuf::from(format!("/proc/{}", self.0.id()));
            let dir = ProcDir::open(process.clone()).unwrap();
            let executable = Executable::of(&dir, 1, &UnlistedMounts::default()).unwrap();
            let stamp = executable.stamp(&dir).unwrap();
            Hashed { executable, stamp, process, limit, family: 1 }
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            drop(self.0.kill());
            drop(self.0.wait());
        }
    }

    fn copy(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("program");
        fs::copy("/bin/sleep", &path).unwrap();
        path
    }

    #[tokio::test]
    async fn digests_are_sha256_of_what_settled() {
        let (digests, threads) = (Digests::default(), FileThreads::default());
        let dir = tempfile::tempdir().unwrap();
        let want = hex(digest(&SHA256, &fs::read("/bin/sleep").unwrap()).as_ref());

        let process = Sleeper::start(&copy(&dir));
        let fresh = process.file(u64::MAX);
        assert_eq!(digests.make(&threads, fresh.clone()).await.unwrap(), want);
        assert!(digests.known(&fresh.stamp).is_none(), "written a moment ago");

        let old = Sleeper::start(Path::new("/bin/sleep"));
        let file = old.file(u64::MAX);
        assert!(settled(&file.stamp), "it was installed a while ago");
        assert_eq!(digests.make(&threads, file.clone()).await.unwrap(), want);
        assert_eq!(digests.known(&file.stamp), Some(want));
        assert!(digests.table().made.is_empty());
    }

    #[tokio::test]
    async fn a_file_that_is_not_as_it_was_has_no_digest() {
        let (digests, threads) = (Digests::default(), FileThreads::default());
        let dir = tempfile::tempdir().unwrap();
        let program = copy(&dir);
        let process = Sleeper::start(&program);
        let size = fs::metadata(&program).unwrap().len();

        let grown = digests.make(&threads, process.file(size - 1)).await;
        assert!(
            matches!(grown, Err(ExecutableError::TooLarge { size: read, limit, .. }) if read > limit),
            "it grew after it was looked at: {grown:?}"
        );
        let before = process.file(size);
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let changed = digests.make(&threads, before.clone()).await;
        assert!(matches!(changed, Err(ExecutableError::Changed { .. })), "{changed:?}");
        drop(process);
        let gone = digests.make(&threads, before).await;
        assert!(matches!(gone, Err(ExecutableError::Gone)), "{gone:?}");
    }

    /// Pages that the agent brings in are its own, up to the limit of its memory.
    #[tokio::test]
    async fn the_kernel_keeps_nothing_of_what_was_hashed() {
        const LENGTH: usize = 24 << 20;
        let (digests, threads) = (Digests::default(), FileThreads::default());
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let program = copy(&dir);
        let file = fs::OpenOptions::new().read(true).write(true).open(&program).unwrap();
        // A program may have anything behind it.
        std::os::unix::fs::FileExt::write_all_at(&file, &[7], u64::try_from(LENGTH - 1).unwrap()).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let content = fs::read(&program).unwrap();
        let file = File::open(&program).unwrap();
        let before = file_cache::kept_pages(&file, LENGTH);
        assert!(before > LENGTH / 4096 / 2, "of what is on a disk the kernel keeps what was read: {before}");
        let process = Sleeper::start(&program);
        let digest_of_it = digests.make(&threads, process.file(u64::MAX)).await.unwrap();
        assert_eq!(digest_of_it, hex(digest(&SHA256, &content).as_ref()));
        let after = file_cache::kept_pages(&file, LENGTH);
        assert!(after < before / 8, "{after} of {before} pages");
    }

    #[tokio::test]
    async fn callers_of_one_file_share_one_hash() {
        let (digests, threads) = (Digests::default(), FileThreads::default());
        let process = Sleeper::start(Path::new("/bin/sleep"));
        let file = process.file(u64::MAX);
        let waiting: Vec<_> = (0..1000).map(|_| digests.join(&threads, &file)).collect();
        assert!(waiting.iter().all(Result::is_ok), "they take one place together");
        for mut joined in waiting.into_iter().flatten() {
            assert!(joined.done.wait_for(Option::is_some).await.unwrap().clone().unwrap().is_ok());
        }
    }

    #[tokio::test]
    async fn who_shares_a_hash_is_none_the_worse_when_the_other_ends() {
        let (digests, threads) = (Digests::default(), FileThreads::default());
        let (first, second) =
            (Sleeper::start(Path::new("/bin/sleep")), Sleeper::start(Path::new("/bin/sleep")));
        let (of_first, of_second) = (first.file(u64::MAX), second.file(u64::MAX));
        assert_eq!(of_first.stamp, of_second.stamp);
        drop(first);
        let (gone, made) = tokio::join!(digests.make(&threads, of_first), digests.make(&threads, of_second));
        assert!(matches!(gone, Err(ExecutableError::Gone)), "{gone:?}");
        made.unwrap();
    }

    #[test]
    fn one_family_does_not_wash_out_what_another_has() {
        let some = Stamp::of(&stat("/bin/sleep").unwrap());
        let stamp = |n: usize| some.with_inode(u64::try_from(n).unwrap());
        let mut table = DigestTable::default();
        table.keep(stamp(0), "a".into(), 1);
        for n in 1..3 * CAPACITY {
            table.keep(stamp(n), "b".into(), 2);
        }
        assert_eq!(table.known.len(), CAPACITY);
        assert!(table.known.contains_key(&stamp(0)), "the only one of its family");
        assert!(!table.known.contains_key(&stamp(1)), "the oldest of the family with the most");

        // Of one's own the one that was not used for longest goes.
        let digests = Digests(Arc::new(Mutex::new(table)));
        let oldest = 2 * CAPACITY + 1;
        assert!(digests.known(&stamp(oldest)).is_some());
        digests.table().keep(stamp(3 * CAPACITY), "b".into(), 2);
        assert!(digests.known(&stamp(oldest)).is_some(), "just used");
        assert!(digests.known(&stamp(oldest + 1)).is_none(), "the next oldest");
    }
}
