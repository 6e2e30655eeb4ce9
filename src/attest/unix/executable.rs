//! The file that a process executes, as far as the kernel's word on it can be believed.
//!
//! Where a user may mount what it likes, `/proc/PID/exe` says what the user likes, and to ask about the file may take
//! for ever. So first the kernel alone is asked, which makes nobody wait: whose the mount namespace of the process is,
//! and by the number of the executable's mount whether it is a mount of that namespace, and who serves its files
//! ([`mounts`]). The number, the path and the content are those of one open descriptor.
//!
//! Believed is a namespace that belongs to the agent's own user namespace: only root there can mount in it, or move into
//! it, so that container runtimes are believed, and users who unshare are not. That the executable is on one of its
//! mounts is asked since a file of another namespace can be executed too. FUSE is not believed anywhere: setuid
//! helpers mount it for every user. What only root mounts is believed, an overlay over FUSE included.
//!
//! To look for a mount that is in no list takes all of them from end to end, so that is remembered ([`unlisted`](super::unlisted)).
//!
//! What is not asked: whether the process still does what its executable says. Who may execute a file may also trace
//! its process or load something into it, or name the file as its own (`PR_SET_MM`).

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::LazyLock,
    time::Instant,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat, readlink},
    sys::stat::{FileStat, Mode, fstat, stat},
};
use procfs::process::Process;

use super::{
    mounts::{self, MountedOn, ServedBy},
    unlisted::{NamespaceId, SoughtMount, UnlistedMounts},
};
use crate::{
    attest::{AttestFault, Blame, ProcReadError, process::ProcDir},
    os::namespace::owning_user_namespace,
};

/// Its name in `/proc/PID`. A kernel thread has none.
pub(super) const NAME: &str = "exe";

/// Why a process's executable, or the digest of it, cannot be told.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExecutableError {
    /// The process has ended.
    #[error("the process has exited")]
    Gone,
    /// What is mounted where the process is, is not up to the node's root.
    #[error("the executable is in a mount namespace that the caller made")]
    CallersNamespace,
    /// Any user may have mounted it, and serves what it likes.
    #[error("the executable is on a FUSE file system")]
    Fuse,
    /// It is in memory, was unmounted, or is another namespace's.
    #[error("the executable is on no file system that is mounted where the caller is")]
    Unmounted,
    /// The caller keeps it from being read, or has none any more.
    #[error("cannot read the executable {}", path.display())]
    Unreadable {
        /// Where the agent sees it.
        path: PathBuf,
        source: Errno,
    },
    /// The agent may not see the executables of others.
    #[error("cannot read the executable {}: the agent has no CAP_SYS_PTRACE (systemd: discover-workload-path.conf; Kubernetes: add SYS_PTRACE)", path.display())]
    NoPrivilege {
        /// Where the agent sees it.
        path: PathBuf,
        source: Errno,
    },
    /// The node is short of something, or does not tell what it should.
    #[error("cannot look at the executable {}", path.display())]
    Node {
        /// What was read.
        path: PathBuf,
        source: Errno,
    },
    /// The executable is larger than `workload_size_limit`. The text is SPIRE's.
    #[error("SHA256 digest: workload {} exceeds size limit ({size} > {limit})", path.display())]
    TooLarge {
        /// Where the agent sees it.
        path: PathBuf,
        /// Its size in bytes, or how many were read of one that grew.
        size: u64,
        /// `workload_size_limit`.
        limit: u64,
    },
    /// The executable was replaced or written while it was looked at.
    #[error("{} changed while it was attested", path.display())]
    Changed {
        /// Where the agent sees it.
        path: PathBuf,
    },
    /// Too many executables wait to be looked at, of this caller or of all.
    #[error("too many executables wait to be read")]
    Busy,
    /// Looking at the executable took too long.
    #[error("reading the executable {} took too long", path.display())]
    Late {
        /// Where the agent sees it.
        path: PathBuf,
    },
}

impl ExecutableError {
    /// The executable at `path` cannot be read. That is its owner's doing, and that there is none the process's: its
    /// first thread has ended.
    pub(super) fn unreadable(path: PathBuf, source: Errno) -> Self {
        match source {
            Errno::ESRCH => Self::Gone,
            Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EIO => Self::Node { path, source },
            source => Self::Unreadable { path, source },
        }
    }

    /// Whose doing it is, and how it is counted.
    pub(super) fn class(&self) -> (Blame, AttestFault) {
        match self {
            Self::Gone => (Blame::Refusal, AttestFault::Gone),
            Self::CallersNamespace | Self::Fuse | Self::Unmounted => (Blame::Refusal, AttestFault::Untrusted),
            Self::Unreadable { .. } | Self::TooLarge { .. } | Self::Changed { .. } => {
                (Blame::Refusal, AttestFault::Unreadable)
            }
            Self::NoPrivilege { .. } => (Blame::Crowd, AttestFault::Unreadable),
            Self::Node { .. } => (Blame::Fault, AttestFault::Unreadable),
            Self::Busy | Self::Late { .. } => (Blame::Crowd, AttestFault::Busy),
        }
    }
}

/// Names a file's content: another content has another stamp, as far as its file system tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of the file that `stat` describes.
    pub(super) fn of(stat: &FileStat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Its size in bytes.
    pub(super) fn size(&self) -> u64 {
        u64::try_from(self.size).unwrap_or(0)
    }

    /// When its content, name or owner last changed, in seconds since 1970. Unlike the time of modification, no
    /// user can set it.
    pub(super) fn changed(&self) -> i64 {
        self.changed.0
    }
}

/// What a process executes, by the kernel's word alone. Its file system was not asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Executable {
    /// Its path as the process sees it.
    pub(super) path: OsString,
    pub(super) on: MountedOn,
    /// The number of its mount.
    mount: u64,
}

impl Executable {
    /// What the process of `dir` executes, which is of this family. Reads the text of the kernel, which may be long: not for
    /// a thread of the runtime.
    ///
    /// # Errors
    /// [`ExecutableError`].
    pub(super) fn of(dir: &ProcDir, family: u64, unlisted: &UnlistedMounts) -> Result<Self, ExecutableError> {
        let namespace = in_our_namespace(dir)?;
        let file = descriptor(dir)?;
        let mount = mount_id(file.as_fd())?;
        let sought = SoughtMount { family, namespace, mount };
        if unlisted.has(&sought, Instant::now()) {
            return Err(ExecutableError::Unmounted);
        }
        let Some(on) = mounted_on(dir, mount)? else {
            unlisted.note(sought, Instant::now());
            return Err(ExecutableError::Unmounted);
        };
        if on.served_by == ServedBy::Program {
            return Err(ExecutableError::Fuse);
        }
        let path = path_of(dir, file.as_fd())?;
        // Who has left the namespace cannot come back, unless it is root: all of this was read of one who had not.
        in_our_namespace(dir)?;
        Ok(Self { path, on, mount })
    }

    /// A descriptor of the file, if the process of `dir` still executes it under its path. It allows neither to read
    /// nor to write.
    ///
    /// # Errors
    /// [`ExecutableError`].
    fn again(&self, dir: &ProcDir) -> Result<OwnedFd, ExecutableError> {
        let file = descriptor(dir)?;
        if mount_id(file.as_fd())? != self.mount || path_of(dir, file.as_fd())? != self.path {
            return Err(ExecutableError::Changed { path: dir.path_of(NAME) });
        }
        Ok(file)
    }

    /// Whether the process of `dir` still executes it under its path. Asks the kernel alone.
    ///
    /// # Errors
    /// [`ExecutableError`].
    pub(super) fn is_of(&self, dir: &ProcDir) -> Result<(), ExecutableError> {
        self.again(dir).map(drop)
    }

    /// The stamp of its content. Asks its file system.
    ///
    /// # Errors
    /// [`ExecutableError`].
    pub(super) fn stamp(&self, dir: &ProcDir) -> Result<Stamp, ExecutableError> {
        let file = self.again(dir)?;
        let stat = fstat(&file).map_err(|errno| unreadable(dir, errno))?;
        Ok(Stamp::of(&stat))
    }

    /// Opens its content for reading, which must still be that of `stamp`. Asks its file system.
    ///
    /// # Errors
    /// [`ExecutableError`].
    pub(super) fn open(&self, dir: &ProcDir, stamp: &Stamp) -> Result<File, ExecutableError> {
        let descriptor = self.again(dir)?;
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let file = open(own_link(descriptor.as_fd(), "fd").as_str(), flags, Mode::empty());
        let file = File::from(file.map_err(|errno| unreadable(dir, errno))?);
        let opened = fstat(&file).map_err(|errno| unreadable(dir, errno))?;
        if Stamp::of(&opened) != *stamp {
            return Err(ExecutableError::Changed { path: dir.path_of(NAME) });
        }
        Ok(file)
    }
}

/// The mount namespace of the process, which belongs to the agent's own user namespace.
fn in_our_namespace(dir: &ProcDir) -> Result<NamespaceId, ExecutableError> {
    let mounts = mount_namespace(dir)?;
    let of_mounts = fstat(&mounts).map_err(|errno| node("/proc/PID/ns/mnt", errno))?;
    let owner = match owning_user_namespace(mounts) {
        Ok(owner) => owner,
        // It is neither ours nor below ours.
        Err(Errno::EPERM) => return Err(ExecutableError::CallersNamespace),
        Err(errno) => return Err(node("/proc/PID/ns/mnt", errno)),
    };
    let owner = fstat(&owner).map_err(|errno| node("/proc/PID/ns/mnt", errno))?;
    let ours = stat(OUR_USER_NAMESPACE).map_err(|errno| node(OUR_USER_NAMESPACE, errno))?;
    if (owner.st_dev, owner.st_ino) == (ours.st_dev, ours.st_ino) {
        Ok(NamespaceId(of_mounts.st_dev, of_mounts.st_ino))
    } else {
        Err(ExecutableError::CallersNamespace)
    }
}

const OUR_USER_NAMESPACE: &str = "/proc/self/ns/user";

/// The mount namespace of the process.
fn mount_namespace(dir: &ProcDir) -> Result<OwnedFd, ExecutableError> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    openat(&dir.fd, "ns/mnt", flags, Mode::empty()).map_err(|errno| untraced(dir, errno))
}

/// A descriptor of what the process executes. It is made without its file system, and allows only to ask the kernel.
fn descriptor(dir: &ProcDir) -> Result<OwnedFd, ExecutableError> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    openat(&dir.fd, NAME, flags, Mode::empty()).map_err(|errno| untraced(dir, errno))
}

/// The number of the mount that a descriptor of ours is on.
fn mount_id(file: BorrowedFd<'_>) -> Result<u64, ExecutableError> {
    const UNLIKE: Errno = Errno::EPROTO;
    let path = own_link(file, "fdinfo");
    let text = std::fs::read_to_string(&path).map_err(|error| node(&path, errno_of(&error)))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| node(&path, UNLIKE))
}

/// The path of a descriptor of ours, as its own namespace has it.
fn path_of(dir: &ProcDir, file: BorrowedFd<'_>) -> Result<OsString, ExecutableError> {
    readlink(own_link(file, "fd").as_str()).map_err(|errno| unreadable(dir, errno))
}

/// What of ours stands about a descriptor under /proc.
fn own_link(file: BorrowedFd<'_>, what: &str) -> String {
    format!("/proc/self/{what}/{}", file.as_raw_fd())
}

/// What a mount shows, if it is one of the process's namespace, or of the node's first, or of the agent's own. A process
/// is told of the mounts below its root alone, and may have left the namespace in which it executed its program.
fn mounted_on(dir: &ProcDir, mount: u64) -> Result<Option<MountedOn>, ExecutableError> {
    const MOUNTS: &str = "mountinfo";
    let find = |file| mounts::find(file, mount).map_err(|error| unreadable(dir, errno_of(&error)));
    if let Some(found) = find(dir.file(MOUNTS)?)? {
        return Ok(Some(found));
    }
    for other in ["/proc/1", "/proc/self"] {
        // What cannot be looked at is not believed.
        if let Ok(other) = ProcDir::open(other.into())
            && in_our_namespace(&other).is_ok()
            && let Ok(file) = other.file(MOUNTS)
            && let Some(found) = find(file)?
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

pub(super) fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

impl From<ProcReadError> for ExecutableError {
    fn from(error: ProcReadError) -> Self {
        match error {
            ProcReadError::Read { path, source } => node(path, errno_of(&source)),
            ProcReadError::Gone | ProcReadError::Malformed { .. } | ProcReadError::TooManyGroups => {
                Self::Gone
            }
        }
    }
}

fn node(path: impl Into<PathBuf>, source: Errno) -> ExecutableError {
    ExecutableError::Node { path: path.into(), source }
}

/// Why the kernel or the file system refuses.
fn unreadable(dir: &ProcDir, source: Errno) -> ExecutableError {
    ExecutableError::unreadable(dir.path_of(NAME), source)
}

/// The same for the links that only whoever may trace the process may follow.
fn untraced(dir: &ProcDir, source: Errno) -> ExecutableError {
    let path = dir.path_of(NAME);
    match source {
        Errno::EACCES | Errno::EPERM if *MAY_TRACE => ExecutableError::Node { path, source },
        Errno::EACCES | Errno::EPERM => ExecutableError::NoPrivilege { path, source },
        source => unreadable(dir, source),
    }
}

/// Whether the agent may follow the links of other users' processes: it has `CAP_SYS_PTRACE`.
pub(super) static MAY_TRACE: LazyLock<bool> = LazyLock::new(|| {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = Process::myself().and_then(|it| it.status());
    status.is_ok_and(|status| status.capeff >> CAP_SYS_PTRACE & 1 != 0)
});

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    impl Stamp {
        /// The stamp of another file.
        pub(in crate::attest::unix) fn with_inode(self, inode: u64) -> Self {
            Self { inode, ..self }
        }
    }

    #[test]
    fn what_the_caller_did_is_not_the_nodes_fault() {
        for (errno, want) in [
            (Errno::EACCES, (Blame::Refusal, AttestFault::Unreadable)),
            (Errno::ENOENT, (Blame::Refusal, AttestFault::Unreadable)),
            (Errno::ENAMETOOLONG, (Blame::Refusal, AttestFault::Unreadable)),
            (Errno::ESTALE, (Blame::Refusal, AttestFault::Unreadable)),
            (Errno::ESRCH, (Blame::Refusal, AttestFault::Gone)),
            (Errno::EMFILE, (Blame::Fault, AttestFault::Unreadable)),
            (Errno::EIO, (Blame::Fault, AttestFault::Unreadable)),
        ] {
            assert_eq!(ExecutableError::unreadable(PathBuf::new(), errno).class(), want, "{errno}");
        }
    }

    #[test]
    fn a_mount_that_was_in_no_list_a_moment_ago_is_not_looked_for() {
        let dir = ProcDir::open("/proc/self".into()).unwrap();
        let unlisted = UnlistedMounts::default();
        let mount = Executable::of(&dir, 1, &unlisted).unwrap().mount;
        let sought = SoughtMount { family: 1, namespace: in_our_namespace(&dir).unwrap(), mount };
        unlisted.note(sought, Instant::now() + Duration::from_secs(3600));
        let found = Executable::of(&dir, 1, &unlisted);
        assert!(matches!(found, Err(ExecutableError::Unmounted)), "{found:?}");
        Executable::of(&dir, 2, &unlisted).expect("what another family was told is nothing to it");
    }

    #[test]
    fn a_stamp_tells_contents_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let stamp = || Stamp::of(&stat(&path).unwrap());
        std::fs::write(&path, "abc").unwrap();
        let before = stamp();
        assert_eq!(before, stamp());
        std::fs::write(&path, "longer").unwrap();
        assert_ne!(before, stamp(), "another size");
        let of_size = stamp();
        std::fs::rename(&path, dir.path().join("other")).unwrap();
        std::fs::write(&path, "longer").unwrap();
        assert_ne!(of_size, stamp(), "another file");
    }
}
