//! SHA-256 of executables, each content hashed once.
//!
//! An executable is its owner's, so everything here is bounded against one who rewrites it for every call: two
//! hashes at a time and one per caller, [`QUEUE`] waiting and [`SHARE`] of one caller, and fast refusal beyond that; a
//! size checked before and while reading, a [`DEADLINE`], and an end as soon as nobody waits for the answer. Callers
//! of the same file share one hash.
//!
//! A digest is kept by the file's [`Stamp`], of which no user can set the time of change. File systems count that
//! time in steps of milliseconds, so a file that changed in the last [`SETTLED`] may change again under the same
//! stamp: its digest is answered and not kept. A file that changes while it is read has no digest.

use std::{
    fs::File,
    io::{self, Read},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{Context, SHA256};
use nix::sys::stat::fstat;
use tokio::sync::watch;

use super::executable::Stamp;
use crate::{
    attest::kept::{Kept, KeptAnswers},
    limits::CallerKey,
    os::clock::Clock,
};

/// Hashes at a time.
const RUNNING: usize = 2;
/// Files waiting to be hashed.
const QUEUE: usize = 16;
/// Files of one caller, waiting or being hashed.
const SHARE: usize = 4;
/// Digests kept.
const CAPACITY: usize = 256;
/// How long one file may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long a file must have been unchanged for its digest to be kept.
const SETTLED: i64 = 2;

/// The digest in lower-case hexadecimal.
pub(super) type Hex = Arc<str>;

/// Why there is no digest.
#[derive(Clone, Debug)]
pub(super) enum DigestError {
    /// Too many files are waiting, of this user or of all.
    Busy,
    /// The file is larger than allowed.
    TooLarge {
        /// Its size, or how much of it was read until that was clear.
        size: u64,
    },
    /// The file changed meanwhile.
    Changed,
    /// It took longer than [`DEADLINE`].
    Late,
    /// It could not be read.
    Read(Arc<io::Error>),
}

type DigestResult = Result<Hex, DigestError>;

/// The digests that are known and being made. Cheap to clone, all clones are one.
#[derive(Clone)]
pub(super) struct Digests(Arc<Mutex<HashQueue>>);

impl Default for Digests {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(HashQueue { known: KeptAnswers::new(CAPACITY), jobs: Vec::new() })))
    }
}

struct HashQueue {
    known: KeptAnswers<Stamp, Hex>,
    /// Waiting and running, oldest first; never more than `QUEUE + RUNNING`.
    jobs: Vec<HashJob>,
}

struct HashJob {
    stamp: Stamp,
    limit: u64,
    owner: CallerKey,
    /// The open file until the job runs; then `None`.
    file: Option<File>,
    /// Has receivers as long as somebody waits.
    done: Arc<watch::Sender<Option<DigestResult>>>,
}

impl Digests {
    /// The digest of a file's content, if it is known.
    pub(super) fn known(&self, stamp: &Stamp) -> Option<Hex> {
        self.queue().known.find(*stamp).map(|kept| Arc::clone(kept.last()))
    }

    /// Hashes `file`, which was just opened and has this stamp, or waits for the one who does. `limit` is in bytes;
    /// `owner` is the caller whose share is taken.
    ///
    /// # Errors
    /// [`DigestError`], [`DigestError::Busy`] at once.
    pub(super) async fn make(&self, stamp: Stamp, file: File, limit: u64, owner: CallerKey) -> DigestResult {
        let mut done = self.join(stamp, file, limit, owner)?;
        // The sender goes only when its job has ended without an answer, in a panic.
        let outcome = done.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
        outcome.ok().flatten().unwrap_or(Err(DigestError::Late))
    }

    fn join(
        &self,
        stamp: Stamp,
        file: File,
        limit: u64,
        owner: CallerKey,
    ) -> Result<watch::Receiver<Option<DigestResult>>, DigestError> {
        let mut queue = self.queue();
        if let Some(job) = queue.jobs.iter().find(|job| job.stamp == stamp && job.limit == limit) {
            return Ok(job.done.subscribe());
        }
        queue.jobs.retain(|job| job.file.is_none() || !job.done.is_closed());
        let of_owner = queue.jobs.iter().filter(|job| job.owner == owner).count();
        if queue.jobs.len() >= QUEUE + RUNNING || of_owner >= SHARE {
            return Err(DigestError::Busy);
        }
        let (done, receiver) = watch::channel(None);
        queue.jobs.push(HashJob { stamp, limit, owner, file: Some(file), done: Arc::new(done) });
        self.start(&mut queue);
        Ok(receiver)
    }

    /// Starts what may run: the oldest first, but one of a user at a time, so that one with huge files leaves a
    /// worker to the others.
    fn start(&self, queue: &mut HashQueue) {
        queue.jobs.retain(|job| job.file.is_none() || !job.done.is_closed());
        loop {
            let busy: Vec<CallerKey> =
                queue.jobs.iter().filter(|job| job.file.is_none()).map(|job| job.owner).collect();
            if busy.len() >= RUNNING {
                return;
            }
            let next = queue.jobs.iter_mut().find(|job| job.file.is_some() && !busy.contains(&job.owner));
            let Some((job, file)) = next.and_then(|job| job.file.take().map(|file| (job, file))) else {
                return;
            };
            let turn = HashTurn { digests: self.clone(), stamp: job.stamp, done: Arc::clone(&job.done) };
            let limit = job.limit;
            tokio::task::spawn_blocking(move || {
                let outcome = hash(file, &turn.stamp, limit, || turn.done.is_closed());
                turn.finish(outcome);
            });
        }
    }

    fn queue(&self) -> MutexGuard<'_, HashQueue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job that runs. However it ends, its place is given to the next.
struct HashTurn {
    digests: Digests,
    stamp: Stamp,
    done: Arc<watch::Sender<Option<DigestResult>>>,
}

impl HashTurn {
    fn finish(self, outcome: DigestResult) {
        if let Ok(hex) = &outcome
            && settled(&self.stamp)
        {
            self.digests.queue().known.keep(self.stamp, Kept::for_good(Arc::clone(hex)));
        }
        self.done.send_replace(Some(outcome));
    }
}

impl Drop for HashTurn {
    fn drop(&mut self) {
        let mut queue = self.digests.queue();
        queue.jobs.retain(|job| !Arc::ptr_eq(&job.done, &self.done));
        self.digests.start(&mut queue);
    }
}

/// Whether a file last changed so long ago that a change now would show in its stamp.
fn settled(stamp: &Stamp) -> bool {
    let now = Clock::SYSTEM.now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    i64::try_from(now).is_ok_and(|now| stamp.changed() < now.saturating_sub(SETTLED))
}

/// Reads and hashes all of `file`. Runs on a blocking thread; the one reader of `file`.
fn hash(mut file: File, stamp: &Stamp, limit: u64, abandoned: impl Fn() -> bool) -> DigestResult {
    let read = |e| DigestError::Read(Arc::new(e));
    let started = Instant::now();
    let mut context = Context::new(&SHA256);
    let mut buffer = vec![0; 64 * 1024];
    let mut size = 0u64;
    loop {
        let n = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(read(e)),
        };
        let chunk = buffer.get(..n).unwrap_or_default();
        size = size.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
        if size > limit {
            return Err(DigestError::TooLarge { size });
        }
        if started.elapsed() > DEADLINE || abandoned() {
            return Err(DigestError::Late);
        }
        context.update(chunk);
    }
    let after = fstat(&file).map_err(|errno| read(errno.into()))?;
    if Stamp::of(&after) != *stamp {
        return Err(DigestError::Changed);
    }
    Ok(hex(context.finish().as_ref()))
}

fn hex(bytes: &[u8]) -> Hex {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
    bytes.iter().flat_map(|b| [digit(b >> 4), digit(b & 15)]).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::{Seek, Write},
        path::Path,
        time::SystemTime,
    };

    use nix::{
        sys::stat::{Mode, stat},
        unistd::mkfifo,
    };

    use super::*;

    fn uid(uid: u32) -> CallerKey {
        CallerKey::Uid(uid)
    }

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    fn opened(path: &Path) -> (Stamp, File) {
        (Stamp::of(&stat(path).unwrap()), File::open(path).unwrap())
    }

    #[tokio::test]
    async fn digests_are_sha256() {
        let dir = tempfile::tempdir().unwrap();
        for (case, content, limit, want) in [
            ("empty", &b""[..], u64::MAX, Ok(EMPTY)),
            ("short", b"abc", u64::MAX, Ok(ABC)),
            ("as large as allowed", b"abc", 3, Ok(ABC)),
            ("grew after it was looked at", b"abc", 2, Err(3)),
        ] {
            let path = dir.path().join("file");
            fs::write(&path, content).unwrap();
            let (stamp, file) = opened(&path);
            match (Digests::default().make(stamp, file, limit, uid(0)).await, want) {
                (Ok(hex), Ok(want)) => assert_eq!(&*hex, want, "{case}"),
                (Err(DigestError::TooLarge { size }), Err(want)) => assert_eq!(size, want, "{case}"),
                (other, _) => panic!("{case}: {other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_file_that_changes_has_no_digest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "abc").unwrap();
        let (stamp, file) = opened(&path);
        fs::write(&path, "abcd").unwrap();
        let outcome = Digests::default().make(stamp, file, u64::MAX, uid(0)).await;
        assert!(matches!(outcome, Err(DigestError::Changed)), "{outcome:?}");
    }

    #[tokio::test]
    async fn only_what_has_settled_is_kept() {
        let digests = Digests::default();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "abc").unwrap();
        // A user may set the time of modification, but not the time of change.
        File::options().write(true).open(&path).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let (fresh, file) = opened(&path);
        digests.make(fresh, file, u64::MAX, uid(0)).await.unwrap();
        assert!(digests.known(&fresh).is_none(), "written a moment ago");

        let (old, file) = opened(Path::new("/bin/sh"));
        assert!(settled(&old), "the shell was installed a while ago");
        let made = digests.make(old, file, u64::MAX, uid(0)).await.unwrap();
        assert_eq!(digests.known(&old), Some(made));
    }

    #[test]
    fn the_digest_unused_for_longest_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let digests = Digests::default();
        let stamps: Vec<_> = (0..=CAPACITY)
            .map(|n| {
                let path = dir.path().join(n.to_string());
                fs::write(&path, "").unwrap();
                opened(&path).0
            })
            .collect();
        for stamp in &stamps[..CAPACITY] {
            digests.queue().known.keep(*stamp, Kept::for_good(EMPTY.into()));
        }
        assert!(digests.known(&stamps[0]).is_some(), "used again");
        digests.queue().known.keep(stamps[CAPACITY], Kept::for_good(EMPTY.into()));
        assert_eq!(digests.queue().known.len(), CAPACITY);
        assert!(digests.known(&stamps[0]).is_some(), "just used");
        assert!(digests.known(&stamps[1]).is_none(), "the oldest use");
        assert!(digests.known(&stamps[CAPACITY]).is_some(), "the newest");
    }

    /// Files whose reading waits for the test: pipes, held open for writing.
    struct Slow {
        dir: tempfile::TempDir,
        held: Vec<File>,
    }

    impl Slow {
        fn new() -> Self {
            Self { dir: tempfile::tempdir().unwrap(), held: Vec::new() }
        }

        fn file(&mut self) -> (Stamp, File) {
            let path = self.dir.path().join(self.held.len().to_string());
            mkfifo(&path, Mode::S_IRWXU).unwrap();
            let both = File::options().read(true).write(true).open(&path).unwrap();
            let reader = File::open(&path).unwrap();
            self.held.push(both);
            (Stamp::of(&fstat(&reader).unwrap()), reader)
        }
    }

    async fn until(mut is: impl FnMut() -> bool) {
        while !is() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn one_user_cannot_take_all_places() {
        let digests = Digests::default();
        let mut slow = Slow::new();
        let mut waiting = Vec::new();
        let mut ask = |slow: &mut Slow, owner| {
            let (stamp, file) = slow.file();
            let joined = digests.join(stamp, file, u64::MAX, uid(owner));
            let busy = matches!(joined, Err(DigestError::Busy));
            waiting.extend(joined.ok().map(|receiver| (owner, stamp, receiver)));
            !busy
        };
        for n in 0..SHARE + 2 {
            assert_eq!(ask(&mut slow, 1000), n < SHARE, "file {n} of one user");
        }
        let running = || digests.queue().jobs.iter().filter(|job| job.file.is_none()).count();
        assert_eq!(running(), 1, "one at a time for one user");
        assert!(ask(&mut slow, 1001));
        assert_eq!(running(), 2, "the other worker is for others");
        for owner in 2000..2000 + u32::try_from(QUEUE + RUNNING - SHARE - 1).unwrap() {
            assert!(ask(&mut slow, owner), "{owner}");
        }
        assert!(!ask(&mut slow, 3000), "full for everybody, at once");
        assert_eq!(running(), 2);

        // Two who want the same file wait for one hash.
        let (_, stamp, _) = waiting[0];
        let (_, other) = slow.file();
        assert!(digests.join(stamp, other, u64::MAX, uid(9)).is_ok(), "joins although the queue is full");

        // Whoever waits no longer frees the place, whether his file was being read or not.
        slow.held.clear(); // all readers see the end of their file
        for (owner, _, mut receiver) in waiting {
            let outcome = receiver.wait_for(Option::is_some).await.unwrap().clone().unwrap();
            assert!(matches!(&outcome, Ok(hex) if &**hex == EMPTY), "{owner}: {outcome:?}");
        }
        until(|| digests.queue().jobs.is_empty()).await;
    }

    #[tokio::test]
    async fn what_nobody_waits_for_is_not_hashed() {
        let digests = Digests::default();
        let mut slow = Slow::new();
        for n in 0..3 * SHARE {
            let (stamp, file) = slow.file();
            // The first runs and cannot be interrupted; the others give their places back when nobody waits.
            let joined = digests.join(stamp, file, u64::MAX, uid(1000));
            assert!(joined.is_ok(), "file {n}");
        }
        let mut first = &slow.held[0];
        first.write_all(b"abc").unwrap(); // its reader wakes, and sees that it is alone
        until(|| digests.queue().jobs.is_empty()).await;
    }

    #[tokio::test]
    async fn a_stamp_tells_contents_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = File::create(&path).unwrap();
        file.write_all(b"abc").unwrap();
        let before = opened(&path).0;
        assert_eq!(before, opened(&path).0);
        file.rewind().unwrap();
        file.write_all(b"longer").unwrap();
        assert_ne!(before, opened(&path).0, "another size");
        let other = dir.path().join("other");
        fs::write(&other, "longer").unwrap();
        assert_ne!(opened(&path).0, opened(&other).0, "another file");
    }
}
