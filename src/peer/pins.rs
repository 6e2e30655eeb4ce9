//! Of which processes, whose connections have ended, somebody holds the name that the kernel made for the agent.
//!
//! The first who opens a process's pidfd pays for an inode of pidfs (Linux 6.9), and who opens another shares it: so it stays when the
//! agent has closed its own, for as long as anybody has one. The kernel says nothing of that. But it gives the pidfd of who connected as
//! long as there is the socket, and an inode that was made anew says when. So of some connections that have ended the
//! socket is kept for a moment, and asked once more: an inode as old as the agent's own is held by somebody else.

use std::{
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
}

#[derive(Debug)]
struct Ended {
    socket: OwnedFd,
    /// The agent's own, which may not be closed yet.
    pidfd: Weak<OwnedFd>,
    made: Duration,
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
        let EndedSample { kept, ended } = std::mem::take(&mut *self.lock());
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
            found.push(FoundNames { caller: one.caller, held, unknown });
        }
        let mut sample = self.lock();
        sample.ended += u64::try_from(not_yet.len()).unwrap_or(0).saturating_mul(each);
        sample.kept.append(&mut not_yet);
        sample.kept.truncate(MOST_KEPT);
        found
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
        let Some(made) = made(&pidfd) else { return };
        let one = Ended { socket, pidfd: Arc::downgrade(&pidfd), made, caller, looks: 0 };
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
        if self.pidfd.strong_count() > 0 || now.saturating_sub(self.made) < TICK {
            return Found::NotYet;
        }
        let Ok(pidfd) = getsockopt(&self.socket, sockopt::PeerPidfd) else { return Found::Unknown };
        match made(&pidfd) {
            Some(made) if made == self.made => Found::Held,
            _ => Found::Gone,
        }
    }
}

/// When the inode of a pidfd was made.
fn made(pidfd: &OwnedFd) -> Option<Duration> {
    let stat = fstat(pidfd).ok()?;
    let nanoseconds = u32::try_from(stat.st_ctime_nsec).ok()?;
    Some(Duration::new(u64::try_from(stat.st_ctime).ok()?, nanoseconds))
}

/// Whether pidfds have inodes of their own here.
static IS_PIDFS: LazyLock<bool> = LazyLock::new(|| {
    let pidfd = UnixStream::pair().ok().and_then(|(one, _other)| getsockopt(&one, sockopt::PeerPidfd).ok());
    pidfd.and_then(|pidfd| fstatfs(pidfd.as_fd()).ok()).is_some_and(|fs| fs.filesystem_type().0 == PIDFS)
});
