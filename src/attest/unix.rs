//! The `unix` attestor: what `/proc/PID` tells of a process, read so that it cannot be another's.
//!
//! Trusted: the lines of `status` and the links that the kernel writes. Not trusted: the process's name, its
//! executable's path and content, and that a PID still means what it meant. The order is the safety: open the
//! directory `/proc/PID` once, read everything relative to it, and ask the pidfd last; a process that lives then had
//! its PID all the while. The effective user and group must be those that connected.
//!
//! The path is the one the process sees in its own mount namespace, as SPIRE's is: whoever may make containers may
//! choose it. The digest is of the file that the kernel executes, whatever its path says.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, open, openat, readlinkat},
    sys::stat::{Mode, fstat, fstatat},
    unistd::{Pid, read},
};

use super::{
    AttestError,
    names::Id,
    status::{self, Status, StatusError},
};
use crate::{
    identity::selector::{Selector, Selectors},
    peer::attested::{Executable, Stamp},
};

/// The selectors' type.
const KIND: &str = "unix";
/// As much of `status` as is read: the lines that count end before it with [`status::MAX_GROUPS`] groups.
const STATUS_LIMIT: usize = 16 * 1024;

/// Its settings, with SPIRE's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// `discover_workload_path`: whether `unix:path` and `unix:sha256` are found out. Default false.
    pub discover_workload_path: bool,
    /// `workload_size_limit`: the largest executable to hash, in bytes; 0 for any, negative never to hash.
    pub workload_size_limit: i64,
}

impl Settings {
    /// Whether executables are hashed, and up to which size.
    pub(super) fn hashing(self) -> Option<Limit> {
        match (self.discover_workload_path, self.workload_size_limit) {
            (false, _) | (true, ..0) => None,
            (true, 0) => Some(Limit(None)),
            (true, bytes @ 1..) => Some(Limit(u64::try_from(bytes).ok())),
        }
    }
}

/// The size up to which executables are hashed, in bytes; `None` for any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limit(pub(super) Option<u64>);

/// An open `/proc/PID`. It stays the directory of the process that had the PID when it was opened.
pub(super) struct ProcDir {
    fd: OwnedFd,
    path: PathBuf,
}

impl ProcDir {
    /// Opens the directory of the process that has this PID now.
    ///
    /// # Errors
    /// [`AttestError::Gone`] when there is none, else [`AttestError::Read`].
    pub(super) fn open(root: &Path, pid: Pid) -> Result<Self, AttestError> {
        let path = root.join(pid.to_string());
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, path }),
            Err(errno) => Err(unreadable(path, errno)),
        }
    }

    /// Who the process is.
    ///
    /// # Errors
    /// [`AttestError::Gone`], [`AttestError::Read`], [`AttestError::Malformed`], [`AttestError::TooManyGroups`].
    pub(super) fn status(&self) -> Result<Status, AttestError> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let file = openat(&self.fd, "status", flags, Mode::empty())
            .map_err(|errno| self.unreadable("status", errno))?;
        let mut buffer = [0; STATUS_LIMIT];
        let mut filled = 0;
        loop {
            // The kernel makes the whole file for one read; a second is for file systems that do not.
            let rest = buffer.get_mut(filled..).unwrap_or_default();
            let n = read(&file, rest).map_err(|errno| self.unreadable("status", errno))?;
            filled += n;
            match status::parse(buffer.get(..filled).unwrap_or_default()) {
                Err(StatusError::Missing(_)) if filled == STATUS_LIMIT => {
                    return Err(self.not_understood(StatusError::TooManyGroups));
                }
                Err(StatusError::Missing(_)) if n > 0 => {}
                answer => return answer.map_err(|err| self.not_understood(err)),
            }
        }
    }

    /// What the process executes.
    ///
    /// # Errors
    /// [`AttestError::Gone`], or [`AttestError::Read`]: a kernel thread has none, and only root and the user's own
    /// processes may look.
    pub(super) fn executable(&self) -> Result<Executable, AttestError> {
        let stamp = self.executable_stamp()?;
        let path = readlinkat(&self.fd, "exe").map_err(|errno| self.unreadable("exe", errno))?;
        Ok(Executable { stamp, path })
    }

    /// Which content the process executes.
    ///
    /// # Errors
    /// As [`Self::executable`].
    pub(super) fn executable_stamp(&self) -> Result<Stamp, AttestError> {
        let stat =
            fstatat(&self.fd, "exe", AtFlags::empty()).map_err(|errno| self.unreadable("exe", errno))?;
        Ok(Stamp::of(&stat))
    }

    /// The executable, open for reading, which must still be the one with this stamp.
    ///
    /// # Errors
    /// As [`Self::executable`], and [`AttestError::Changed`].
    pub(super) fn open_executable(&self, stamp: &Stamp) -> Result<File, AttestError> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let fd =
            openat(&self.fd, "exe", flags, Mode::empty()).map_err(|errno| self.unreadable("exe", errno))?;
        let opened = fstat(&fd).map_err(|errno| self.unreadable("exe", errno))?;
        if Stamp::of(&opened) != *stamp {
            return Err(AttestError::Changed { path: self.executable_path() });
        }
        Ok(File::from(fd))
    }

    /// The name under which the agent reaches the executable: for messages.
    pub(super) fn executable_path(&self) -> PathBuf {
        self.path.join("exe")
    }

    fn unreadable(&self, name: &str, errno: Errno) -> AttestError {
        unreadable(self.path.join(name), errno)
    }

    fn not_understood(&self, err: StatusError) -> AttestError {
        let path = self.path.join("status");
        match err {
            StatusError::TooManyGroups => AttestError::TooManyGroups { limit: status::MAX_GROUPS },
            StatusError::Missing(_) | StatusError::Twice(_) | StatusError::Malformed(_) => {
                AttestError::Malformed { path, why: err.to_string() }
            }
        }
    }
}

/// ENOENT for a `/proc/PID` that is not there, ESRCH for one that went away while it was open.
fn unreadable(path: PathBuf, errno: Errno) -> AttestError {
    match errno {
        Errno::ESRCH => AttestError::Gone,
        Errno::ENOENT if path.file_name().is_some_and(|name| name != "exe") => AttestError::Gone,
        _ => AttestError::Read { path, source: io::Error::from(errno) },
    }
}

/// Whether a selector can only be found with a name from the user database.
pub fn needs_name(selector: &Selector) -> bool {
    let what = selector.value().split(':').next().unwrap_or_default();
    selector.kind() == KIND && matches!(what, "user" | "group" | "supplementary_group")
}

/// Whose names the selectors of a process need, in the order that [`selectors`] takes them.
pub(super) fn ids(status: &Status) -> Vec<Id> {
    let of_process = [Id::User(status.uid), Id::Group(status.gid)];
    of_process.into_iter().chain(status.groups.iter().map(|gid| Id::Group(*gid))).collect()
}

/// The selectors of a process; `names` are those of [`ids`].
pub(super) fn selectors(
    status: &Status,
    names: Vec<Option<Arc<str>>>,
    executable: Option<&Executable>,
    sha256: Option<&str>,
) -> Selectors {
    let mut found = Selectors::new();
    let mut names = names.into_iter();
    let mut add = |what: &str, value: &str| {
        found.insert(Selector::new(KIND, format!("{what}:{value}")));
    };
    let mut both = |what: &str, number: u32, named: &str| {
        add(what, &number.to_string());
        if let Some(name) = names.next().flatten() {
            add(named, &name);
        }
    };
    both("uid", status.uid, "user");
    both("gid", status.gid, "group");
    for gid in &status.groups {
        both("supplementary_gid", *gid, "supplementary_group");
    }
    // An entry cannot name a path that is no UTF-8: without the selector nothing is lost, and a path with characters
    // replaced would be another file's.
    if let Some(path) = executable.and_then(|executable| executable.path.to_str()) {
        add("path", path);
    }
    if let Some(sha256) = sha256 {
        add("sha256", sha256);
    }
    found
}
