//! Of which processes, whose connections have ended, somebody holds the name that the kernel made for the agent.
//!
//! The first who opens a process's pidfd pays for an inode of pidfs (Linux 6.9), and who opens another shares it: so it stays when the
//! agent has closed its own, for as long as anybody has one. The kernel says nothing of that. But it gives the pidfd of who connected as
//! long as there is the socket, and an inode that was made anew says when. So of some connections that have ended the
//! socket is kept for a moment, and asked once more: an inode as old as the agent's own is held by somebody else.
//!
//! A process has one, however often it connects, and anybody may hold it: so an inode counts once, until what was found fades.

use std::{
    collections::HashSet,
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
    sys::{
        socket::{getsockopt, sockopt},
        stat::fstat,
        statfs::fstatfs,
    },
    time::{ClockId, clock_gettime},
};

use crate::limits::CallerKey;

/// The most sockets that are kept: descriptors that no caller has. Of more connections than that some are asked after, by chance, for all.
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
    seed: ahash::RandomState,
    sample: Mutex<EndedSample>,
}

#[derive(Debug, Default)]
struct EndedSample {
    kept: Vec<Ended>,
    /// How many ended since the last look.
    ended: u64,
    /// Numbers of inodes that were found.
    counted: HashSet<u64, ahash::RandomState>,
}

impl EndedSample {
    /// Whether an inode counts: the first time that it is found.
    fn counts(&mut self, inode: Inode) -> bool {
        if self.counted.len() >= MOST_COUNTED {
            self.counted.clear();
        }
        self.counted.insert(inode.number)
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
    socket: OwnedFd,
    /// The agent's own, which may not be closed yet.
    pidfd: Weak<OwnedFd>,
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
        let (kept, ended) = {
            let mut sample = self.lock();
            (std::mem::take(&mut sample.kept), std::mem::take(&mut sample.ended))
        };
        let each = ended.div_ceil(u64::try_from(kept.len()).unwrap_or(u64::MAX).max(1));
        let (mut found, mut not_yet) = (Vec::new(), Vec::new());
        for mut one in kept {
            one.looks += 1;
            let (held, unknown) = match one.found() {
                Found::Held => (each, 0),
                Found::Unknown => (0, each),
                Found::Gone => continue,
                Found::NotYet if one.looks < LOOKS => {
                    not_yet.push(one);
                    continue;
                }
                Found::NotYet => (0, each),
            };
            if self.lock().counts(one.inode) {
                found.push(FoundNames { caller: one.caller, held, unknown });
            }
        }
        let mut sample = self.lock();
        sample.ended += u64::try_from(not_yet.len()).unwrap_or(0).saturating_mul(each);
        sample.kept.append(&mut not_yet);
        sample.kept.truncate(MOST_KEPT);
        found
    }

    /// Of so many processes what was found is forgotten, whichever they were: as many inodes may count once more.
    pub fn forget(&self, processes: u64) {
        let counted = &mut self.lock().counted;
        let forgotten: Vec<u64> =
            counted.iter().copied().take(usize::try_from(processes).unwrap_or(usize::MAX)).collect();
        for number in forgotten {
            counted.remove(&number);
        }
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
        let Self { ended, pidfd, caller } = self;
        let Some(inode) = inode_of(&pidfd) else { return };
        let one = Ended { socket, pidfd: Arc::downgrade(&pidfd), inode, caller, looks: 0 };
        let mut sample = ended.lock();
        sample.ended += 1;
        // Each of those that end has the same chance to be among those that are kept.
        let at = usize::try_from(ended.seed.hash_one(sample.ended) % sample.ended).unwrap_or(usize::MAX);
        let goes = if sample.kept.len() < MOST_KEPT {
            sample.kept.push(one);
            None
        } else {
            sample.kept.get_mut(at).map(|kept| std::mem::replace(kept, one))
        };
        drop(sample);
        drop(goes);
    }
}

impl Ended {
    fn found(&self) -> Found {
        let now = clock_gettime(ClockId::CLOCK_REALTIME).map_or(Duration::ZERO, Duration::from);
        if self.pidfd.strong_count() > 0 || now.saturating_sub(self.inode.made) < TICK {
            return Found::NotYet;
        }
        let Ok(pidfd) = getsockopt(&self.socket, sockopt::PeerPidfd) else { return Found::Unknown };
        match inode_of(&pidfd) {
            Some(inode) if inode == self.inode => Found::Held,
            _ => Found::Gone,
        }
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
    use nix::unistd::getpid;

    use super::*;
    use crate::os::pidfd::Pidfd;

    /// So many connections of this process have ended.
    fn end(ended: &Arc<EndedConnections>, connections: usize) {
        for _ in 0..connections {
            let (socket, _other) = UnixStream::pair().unwrap();
            let pidfd = Arc::new(getsockopt(&socket, sockopt::PeerPidfd).unwrap());
            let caller = CallerKey::Uid(1);
            AskedLater { ended: Arc::clone(ended), pidfd, caller }.leave(socket.into());
        }
    }

    #[test]
    fn an_inode_that_somebody_holds_counts_once_however_often_its_process_connects() {
        if !*IS_PIDFS {
            println!("this kernel has no file system of pidfds");
            return;
        }
        let held_open = Pidfd::open(getpid()).unwrap();
        let made = inode_of(&held_open.descriptor()).unwrap().made;
        let ended = Arc::new(EndedConnections::default());
        ended.ask(true);
        // Until another would have another time.
        while clock_gettime(ClockId::CLOCK_REALTIME).map_or(Duration::ZERO, Duration::from) - made < TICK {
            std::thread::yield_now();
        }
        let mut held = 0;
        for _ in 0..10 {
            end(&ended, 2 * MOST_KEPT);
            held += ended.look().iter().map(|found| found.held).sum::<u64>();
        }
        assert_eq!(held, 2, "once, for as many as each that is asked after stands for");
        ended.forget(1);
        end(&ended, 1);
        assert_eq!(ended.look().iter().map(|found| found.held).sum::<u64>(), 1, "and once more");
        ended.ask(false);
        assert!(ended.lock().counted.is_empty(), "nothing is remembered");
    }
}
