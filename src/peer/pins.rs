//! Of which processes, whose connections have ended, somebody holds the name that the kernel made for the agent.
//!
//! The first who opens a process's pidfd pays for an inode of pidfs (Linux 6.9), and who opens another shares it: so it stays when the
//! agent has closed its own, for as long as anybody has one. The kernel says nothing of that. But an inode that was made anew says
//! when, and the kernel gives the pidfd of who lives by its PID, and that of who connected as long as there is the socket. So each
//! process whose connection has ended is asked after a moment later: by its PID if it lives; and of those that have exited some, of
//! which the socket is kept, for all. An inode as old as the agent's own is held by somebody else.
//!
//! One that lives counts as itself, however many others call. Where the agent has another connection of it open, it may be the agent
//! that holds the inode: 1 KiB beside what is reckoned for that connection.
//!
//! A process has one, however often it connects, and anybody may hold it: so an inode counts once, until what was found fades.

use std::{
    collections::{BTreeMap, HashMap, HashSet, btree_map::Entry},
    hash::BuildHasher,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        socket::{getsockopt, sockopt},
        stat::fstat,
        statfs::fstatfs,
    },
    time::{ClockId, clock_gettime},
    unistd::Pid,
};

use crate::{
    limits::{CallerKey, names::part},
    os::pidfd::Pidfd,
};

/// The most processes that one look asks after. Of more than that some are, by chance, for all.
const MOST_NOTED: usize = 1024;
/// The most sockets that are kept: descriptors that no caller has.
pub const MOST_KEPT: usize = 16;
/// So many inodes are remembered as counted. More are forgotten together, and count once more if their processes connect again.
const MOST_COUNTED: usize = 8192;
/// What the agent itself has open yet after so many looks is not waited for.
const LOOKS: u8 = 8;
/// So long after an inode was made another has another time, on kernels that count a hundred ticks a second.
const TICK: Duration = Duration::from_millis(20);
/// The type of the file system of pidfds (`PID_FS_MAGIC` of linux/magic.h).
const PIDFS: i64 = 0x5049_4446;

/// Connections that have ended, until somebody looks.
#[derive(Debug, Default)]
pub struct EndedConnections {
    is_asked_for: AtomicBool,
    sample: Mutex<EndedSample>,
}

#[derive(Debug, Default)]
struct EndedSample {
    /// By a number that chance gives each process, another after each look: whoever has a low one is here, however often it
    /// connects, and of those with the lowest the socket is kept.
    noted: BTreeMap<u64, Ended>,
    /// The lowest number for which there was no room.
    beyond: Option<u64>,
    looks: u64,
    seed: ahash::RandomState,
    /// So many have exited, and none of which the socket was kept to stand for them.
    exited: u64,
    /// Numbers of inodes that were found.
    counted: HashSet<u64, ahash::RandomState>,
    /// The same, the first that was found first, with whose they are.
    in_turn: Vec<(u64, CallerKey)>,
}

impl EndedSample {
    /// Returns a socket that is not kept, to be closed.
    fn note(&mut self, mut one: Ended) -> Option<OwnedFd> {
        let number = self.seed.hash_one((self.looks, one.inode.number));
        if self.counted.contains(&one.inode.number) || self.beyond.is_some_and(|beyond| number >= beyond) {
            return one.socket;
        }
        let among_lowest = self.noted.keys().nth(MOST_KEPT - 1).is_none_or(|last| number < *last);
        let goes = if among_lowest { None } else { one.socket.take() };
        match self.noted.entry(number) {
            Entry::Vacant(place) => drop(place.insert(one)),
            Entry::Occupied(mut known) => {
                let socket = std::mem::replace(&mut one.socket, known.get_mut().socket.take());
                // Its inode may be another by now.
                known.insert(one);
                return socket.or(goes);
            }
        }
        if self.noted.len() > MOST_NOTED {
            self.beyond = self.noted.pop_last().map(|(number, _one)| number);
        }
        goes.or_else(|| self.noted.values_mut().nth(MOST_KEPT)?.socket.take())
    }

    /// Whether an inode counts: the first time that it is found.
    fn counts(&mut self, one: &Ended) -> bool {
        if self.counted.len() >= MOST_COUNTED {
            self.counted.clear();
            self.in_turn.clear();
        }
        let is_new = self.counted.insert(one.inode.number);
        if is_new {
            self.in_turn.push((one.inode.number, one.caller));
        }
        is_new
    }
}

/// What the kernel made for a process. No other process gets the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Inode {
    number: u64,
    made: Duration,
}

#[derive(Debug)]
struct Ended {
    /// If it is kept.
    socket: Option<OwnedFd>,
    /// The agent's own, which may not be closed yet.
    pidfd: Weak<OwnedFd>,
    pid: Pid,
    inode: Inode,
    caller: CallerKey,
    looks: u8,
}

/// Of processes of one caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundNames {
    pub caller: CallerKey,
    /// Somebody else holds the names of so many.
    pub held: u64,
    /// The same cannot be said of so many.
    pub unknown: u64,
}

/// What is known of one that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Held,
    Gone,
    /// Before 6.16 the kernel gives no pidfd of a process that was reaped.
    Unknown,
    NotYet,
}

/// How to ask after a connection once it has ended.
#[derive(Debug)]
pub(super) struct AskedLater {
    pub(super) ended: Arc<EndedConnections>,
    pub(super) pidfd: Arc<OwnedFd>,
    pub(super) pid: Pid,
    pub(super) caller: CallerKey,
}

impl EndedConnections {
    /// Connections that end from now on are asked after, or not.
    pub fn ask(&self, after: bool) {
        self.is_asked_for.store(after && *IS_PIDFS, Relaxed);
        if !after {
            *self.lock() = EndedSample::default();
        }
    }

    /// Asks after those that have ended since the last look.
    pub fn look(&self) -> Vec<FoundNames> {
        let (noted, beyond, exited_before) = {
            let mut sample = self.lock();
            sample.looks += 1;
            (std::mem::take(&mut sample.noted), sample.beyond.take(), std::mem::take(&mut sample.exited))
        };
        let (mut living, mut exited, mut not_yet) = (Vec::new(), Vec::new(), Vec::new());
        for mut one in noted.into_values() {
            one.looks += 1;
            match one.found_by_pid() {
                None => exited.push(one),
                Some(Found::NotYet) if one.looks < LOOKS => not_yet.push(one),
                Some(found) => living.push((one, found)),
            }
        }
        // As many as there are of the numbers below which all had room.
        let of_all = |noted: u64| part(u64::MAX, noted, beyond.unwrap_or(u64::MAX));
        let mut found = self.tell(living, of_all);

        let all_exited = exited_before.saturating_add(of_all(exited.len().try_into().unwrap_or(u64::MAX)));
        let asked: Vec<_> = exited.into_iter().filter_map(Ended::found_by_socket).collect();
        match u64::try_from(asked.len()).unwrap_or(u64::MAX) {
            0 => self.lock().exited = all_exited,
            sampled => found.extend(self.tell(asked, |nth| part(all_exited, nth, sampled))),
        }

        for one in not_yet {
            let goes = self.lock().note(one);
            drop(goes);
        }
        found
    }

    /// What was found of these, of which the first so many stand for so many.
    fn tell(&self, asked: Vec<(Ended, Found)>, stand_for: impl Fn(u64) -> u64) -> Vec<FoundNames> {
        let told = (0..).zip(asked).filter_map(|(nth, (one, found))| {
            let each = stand_for(nth + 1) - stand_for(nth);
            let (held, unknown) = match found {
                Found::Held => (each, 0),
                Found::Unknown | Found::NotYet => (0, each),
                Found::Gone => return None,
            };
            let counts = self.lock().counts(&one);
            counts.then_some(FoundNames { caller: one.caller, held, unknown })
        });
        told.collect()
    }

    /// Of so many processes of these families what was found is forgotten, whichever they were: as many inodes may count once more.
    /// Those that were found first are, and none of others: who lives would be found once more, with what others were found with.
    pub fn forget<S: BuildHasher>(
        &self,
        mut processes: HashMap<u64, u64, S>,
        family_of: impl Fn(CallerKey) -> u64,
    ) {
        if processes.is_empty() {
            return;
        }
        let mut sample = self.lock();
        let EndedSample { counted, in_turn, .. } = &mut *sample;
        in_turn.retain(|(number, caller)| match processes.get_mut(&family_of(*caller)) {
            Some(left) if *left > 0 => {
                *left -= 1;
                counted.remove(number);
                false
            }
            _ => true,
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, EndedSample> {
        self.sample.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AskedLater {
    /// Whether it would be.
    pub(super) fn is_wanted(&self) -> bool {
        self.ended.is_asked_for.load(Relaxed)
    }

    /// The connection of this socket has ended.
    pub(super) fn leave(self, socket: OwnedFd) {
        let Self { ended, pidfd, pid, caller } = self;
        let Some(inode) = inode_of(&pidfd) else { return };
        let (socket, pidfd) = (Some(socket), Arc::downgrade(&pidfd));
        let goes = ended.lock().note(Ended { socket, pidfd, pid, inode, caller, looks: 0 });
        drop(goes);
    }
}

impl Ended {
    /// `None` when its process has exited.
    fn found_by_pid(&self) -> Option<Found> {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).map_or(Duration::ZERO, Duration::from);
        if self.pidfd.strong_count() > 0 || now.saturating_sub(self.inode.made) < TICK {
            return Some(Found::NotYet);
        }
        match Pidfd::open(self.pid) {
            Ok(pidfd) => match inode_of(&pidfd.descriptor()) {
                // The PID is another's by now, which may be a thread.
                Some(inode) if inode.number != self.inode.number => None,
                inode => Some(self.found(inode)),
            },
            Err(Errno::ESRCH | Errno::EINVAL) => None,
            Err(_) => Some(Found::Unknown),
        }
    }

    /// `None` when there is no socket.
    fn found_by_socket(self) -> Option<(Self, Found)> {
        let found = match getsockopt(self.socket.as_ref()?, sockopt::PeerPidfd) {
            Ok(pidfd) => self.found(inode_of(&pidfd)),
            Err(_) => Found::Unknown,
        };
        Some((self, found))
    }

    fn found(&self, now: Option<Inode>) -> Found {
        if now == Some(self.inode) { Found::Held } else { Found::Gone }
    }
}

fn inode_of(pidfd: &OwnedFd) -> Option<Inode> {
    let stat = fstat(pidfd).ok()?;
    let nanoseconds = u32::try_from(stat.st_ctime_nsec).ok()?;
    let made = Duration::new(u64::try_from(stat.st_ctime).ok()?, nanoseconds);
    Some(Inode { number: stat.st_ino, made })
}

/// Whether pidfds have inodes of their own here.
static IS_PIDFS: LazyLock<bool> = LazyLock::new(|| {
    let pidfd = UnixStream::pair().ok().and_then(|(one, _other)| getsockopt(&one, sockopt::PeerPidfd).ok());
    pidfd.and_then(|pidfd| fstatfs(pidfd.as_fd()).ok()).is_some_and(|fs| fs.filesystem_type().0 == PIDFS)
});

#[cfg(test)]
mod tests {
    use std::{
        io::Read as _,
        os::unix::net::UnixListener,
        process::{Child, Command, Stdio},
    };

    use nix::unistd::getpid;

    use super::*;

    const SOCKET: &str = "DURWARD_TEST_PINS";
    const POLITE: CallerKey = CallerKey::Uid(1);
    const OTHERS: CallerKey = CallerKey::Uid(2);

    /// Nothing is asked where pidfds have no inodes of their own.
    fn asked() -> Option<Arc<EndedConnections>> {
        let ended = Arc::new(EndedConnections::default());
        ended.ask(true);
        if !*IS_PIDFS {
            println!("this kernel has no file system of pidfds");
        }
        IS_PIDFS.then_some(ended)
    }

    /// A connection, as the agent has it.
    fn connection(ended: &Arc<EndedConnections>, pid: Pid, caller: CallerKey) -> AskedLater {
        let pidfd = Pidfd::open(pid).unwrap().descriptor();
        AskedLater { ended: Arc::clone(ended), pidfd, pid, caller }
    }

    fn end(ended: &Arc<EndedConnections>, pid: Pid, caller: CallerKey) {
        let (socket, _other) = UnixStream::pair().unwrap();
        connection(ended, pid, caller).leave(socket.into());
    }

    /// Until what is made anew has another time.
    fn tick() {
        let now = || clock_gettime(ClockId::CLOCK_REALTIME).map(Duration::from).unwrap();
        let before = now();
        while now() - before <= TICK {
            std::thread::yield_now();
        }
    }

    fn held(ended: &EndedConnections) -> u64 {
        ended.look().iter().map(|found| found.held).sum()
    }

    /// This test binary again, as another process that connects.
    struct Process {
        child: Child,
        socket: UnixStream,
    }

    impl Process {
        fn start(of: usize) -> Vec<Self> {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("socket");
            let listener = UnixListener::bind(&path).unwrap();
            let start = |_nth| {
                let child = Command::new(std::env::current_exe().unwrap())
                    .args(["--exact", "peer::pins::tests::connects", "--nocapture", "--quiet"])
                    .env(SOCKET, &path)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::null())
                    .spawn()
                    .unwrap();
                Self { child, socket: listener.accept().unwrap().0 }
            };
            (0..of).map(start).collect()
        }

        fn pid(&self) -> Pid {
            Pid::from_raw(self.child.id().try_into().unwrap())
        }

        fn exit(&mut self) {
            drop(self.child.stdin.take());
            assert!(self.child.wait().unwrap().success());
        }

        /// It connects, exits, and somebody holds its pidfd or not.
        fn exits(mut self, ended: &Arc<EndedConnections>, caller: CallerKey) -> Pidfd {
            let connection = connection(ended, self.pid(), caller);
            let pidfd = Pidfd::open(self.pid()).unwrap();
            self.exit();
            connection.leave(self.socket.try_clone().unwrap().into());
            pidfd
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            self.exit();
        }
    }

    /// The other side of [`Process`]; nothing when the tests run.
    #[test]
    fn connects() {
        let Some(socket) = std::env::var_os(SOCKET) else { return };
        let _connected = UnixStream::connect(socket).unwrap();
        assert_eq!(std::io::stdin().read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn an_inode_that_somebody_holds_counts_once_however_often_its_process_connects() {
        let Some(ended) = asked() else { return };
        let _held_open = Pidfd::open(getpid()).unwrap();
        tick();
        let mut found = 0;
        for _ in 0..10 {
            (0..2 * MOST_KEPT).for_each(|_nth| end(&ended, getpid(), POLITE));
            found += held(&ended);
        }
        assert_eq!(found, 1);
        let family = |caller| u64::from(caller != POLITE);
        ended.forget(HashMap::from([(family(OTHERS), 5)]), family);
        end(&ended, getpid(), POLITE);
        assert_eq!(held(&ended), 0, "what was found of others is forgotten");
        ended.forget(HashMap::from([(family(POLITE), 1)]), family);
        end(&ended, getpid(), POLITE);
        assert_eq!(held(&ended), 1, "and once more");
        ended.ask(false);
        assert!(ended.lock().counted.is_empty(), "nothing is remembered");
    }

    #[test]
    fn a_process_that_lives_is_found_with_its_own_weight_whatever_others_do() {
        let Some(ended) = asked() else { return };
        let processes = Process::start(40);
        let pids: Vec<_> = processes.iter().map(Process::pid).collect();
        let (polite, others) = pids.split_first().unwrap();
        let _held_open = Pidfd::open(*polite).unwrap();
        for _ in 0..50 {
            others.iter().for_each(|pid| end(&ended, *pid, OTHERS));
        }
        end(&ended, *polite, POLITE);
        tick();
        assert_eq!(ended.look(), [FoundNames { caller: POLITE, held: 1, unknown: 0 }]);
    }

    #[test]
    fn a_process_is_found_once_somebody_holds_its_pidfd() {
        let Some(ended) = asked() else { return };
        let processes = Process::start(1);
        end(&ended, processes[0].pid(), POLITE);
        tick();
        assert_eq!(ended.look(), [], "nobody");
        let open = connection(&ended, processes[0].pid(), POLITE);
        let _held_open = Pidfd::open(processes[0].pid()).unwrap();
        tick();
        end(&ended, processes[0].pid(), POLITE);
        drop(open);
        assert_eq!(held(&ended), 1);
    }

    /// Before Linux 6.16 it is not known of these.
    #[test]
    fn some_that_have_exited_stand_for_all() {
        let Some(ended) = asked() else { return };
        let living = Process::start(10);
        let held_open = Process::start(40).into_iter().map(|process| process.exits(&ended, OTHERS));
        let held_open: Vec<_> = held_open.collect();
        living.iter().for_each(|process| end(&ended, process.pid(), POLITE));
        tick();
        let found = ended.look();
        assert!(found.len() <= MOST_KEPT, "{found:?}");
        assert!(found.iter().all(|found| found.caller == OTHERS), "{found:?}");
        assert_eq!(found.iter().map(|found| found.held + found.unknown).sum::<u64>(), 40, "{found:?}");

        // Where of none the socket was kept, those of later looks stand for them too.
        drop(held_open);
        let held_open: Vec<_> =
            Process::start(2).into_iter().map(|process| process.exits(&ended, OTHERS)).collect();
        ended.lock().noted.values_mut().for_each(|one| one.socket = None);
        tick();
        assert_eq!(ended.look(), []);
        let last = Process::start(1).remove(0).exits(&ended, OTHERS);
        tick();
        assert_eq!(ended.look().iter().map(|found| found.held + found.unknown).sum::<u64>(), 3);
        drop((held_open, last));

        for process in Process::start(3) {
            drop(process.exits(&ended, OTHERS));
        }
        tick();
        assert_eq!(held(&ended), 0, "nobody holds these");
    }

    #[test]
    fn what_has_no_room_is_reckoned_by_processes() {
        const ALL: u64 = 10_000;
        let ended = EndedConnections::default();
        for number in (1..=ALL).cycle().take(3 * 10_000) {
            // None of this PID: all have exited.
            let inode = Inode { number, made: Duration::ZERO };
            let (socket, pidfd) = (None, Weak::new());
            let one = Ended { socket, pidfd, pid: getpid(), inode, caller: OTHERS, looks: 0 };
            assert!(ended.lock().note(one).is_none());
        }
        assert_eq!(ended.lock().noted.len(), MOST_NOTED);
        assert_eq!(ended.look(), []);
        let exited = ended.lock().exited;
        assert!((ALL / 5 * 4..ALL / 5 * 6).contains(&exited), "{exited}");
    }
}
