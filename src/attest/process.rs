//! What attestors may know of a process: who connected, and what is read in its `/proc/PID`.
//!
//! The order is the safety. What has to be read is read relative to a directory `/proc/PID` that was opened for it; the
//! process's effective user and group must be those that connected; and [`super::Attestor`] asks last whether the
//! process lives. One that does had its PID all the while.

use std::{
    fs::File,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    sys::stat::Mode,
    unistd::{Gid, Pid, Uid, read},
};
use tokio::time::Instant;

use super::{
    error::{AttestError, ProcReadError},
    status::{self, ProcStatus, StatusError},
};
use crate::{
    limits::{AttestationSlot, CallerKey},
    os::{peer_groups::ConnectedGroups, pidfd::Owner},
    peer::{Peer, PeerGone, pod::PodPlace, slot::PeerSlot},
};

/// As much of `status` as is read: the lines that count end before it with [`status::MAX_GROUPS`] groups.
const STATUS_LIMIT: usize = 16 * 1024;
/// All of it, for most processes.
const STATUS_AT_FIRST: usize = 2 * 1024;

/// What attestation needs of a process.
pub(super) trait Attestable: Sync {
    fn pid(&self) -> Pid;
    /// Its owner when it connected.
    fn owner(&self) -> Owner;
    /// Whose share of the hashing it takes.
    fn caller(&self) -> CallerKey;
    /// That it still lives, and is of the same owner.
    fn is_alive(&self) -> Result<(), AttestError>;
    /// Where its last result is kept, if anywhere.
    fn slot(&self) -> Option<&PeerSlot>;
    /// The pod that it is in, and the container.
    fn place(&self) -> Option<PodPlace>;
    /// How long it may be kept waiting for something that comes by itself.
    fn patience(&self) -> Duration {
        Duration::MAX
    }
    /// Something of it is read in `/proc`.
    fn is_read(&self) {}
    /// It waits for something that costs nothing, and needs no place among the attestations any more.
    fn stand_aside(&self) {}
    /// The supplementary groups that it had when it connected, if the kernel says.
    fn connected_with_groups(&self) -> Option<&ConnectedGroups> {
        None
    }
    /// When it was let in, where it may be believed for a moment that it is as it was then.
    fn new_since(&self) -> Option<Instant> {
        None
    }
    /// Its supplementary groups, where they were read already.
    fn groups_read(&self) -> Option<&[u32]> {
        None
    }
    /// How much is to be found out of it.
    fn extent(&self) -> Extent {
        Extent::Asked
    }
}

/// How much is found out of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// What an entry asks for that may be its own.
    Asked,
    /// All that can be: people ask.
    All,
}

impl Attestable for Peer {
    fn pid(&self) -> Pid {
        self.pid()
    }

    fn owner(&self) -> Owner {
        Owner { uid: self.uid(), gid: self.gid() }
    }

    fn caller(&self) -> CallerKey {
        self.caller()
    }

    fn is_alive(&self) -> Result<(), AttestError> {
        self.is_alive().map_err(|gone| match gone {
            PeerGone::Exited | PeerGone::Replaced { .. } => AttestError::Gone,
            PeerGone::CredentialsChanged { uid, gid } => {
                AttestError::IdentityChanged { pid: self.pid(), uid, gid }
            }
            PeerGone::OutOfNamespace => AttestError::OtherPidNamespace,
            PeerGone::Unknown { source } => AttestError::Unknown { source },
        })
    }

    fn is_read(&self) {
        self.is_read();
    }

    fn slot(&self) -> Option<&PeerSlot> {
        Some(self.slot())
    }

    fn place(&self) -> Option<PodPlace> {
        self.place()
    }

    fn connected_with_groups(&self) -> Option<&ConnectedGroups> {
        self.connected_with_groups()
    }
}

/// A peer that has a place among the attestations for as long as it needs one.
pub(super) struct PlacedPeer<'a> {
    pub(super) peer: &'a Peer,
    pub(super) held: Mutex<Option<AttestationSlot>>,
    pub(super) patience: Duration,
    /// See [`Attestable::new_since`]. What is sent on an open stream is for what the process is by then.
    pub(super) new_since: Option<Instant>,
}

impl Attestable for PlacedPeer<'_> {
    fn pid(&self) -> Pid {
        self.peer.pid()
    }

    fn owner(&self) -> Owner {
        self.peer.owner()
    }

    fn caller(&self) -> CallerKey {
        self.peer.caller()
    }

    fn is_alive(&self) -> Result<(), AttestError> {
        Attestable::is_alive(self.peer)
    }

    fn is_read(&self) {
        self.peer.is_read();
    }

    fn slot(&self) -> Option<&PeerSlot> {
        Some(self.peer.slot())
    }

    fn place(&self) -> Option<PodPlace> {
        self.peer.place()
    }

    fn connected_with_groups(&self) -> Option<&ConnectedGroups> {
        self.peer.connected_with_groups()
    }

    fn new_since(&self) -> Option<Instant> {
        self.new_since
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    fn stand_aside(&self) {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(held);
    }
}

/// A process that is of the user and group that connected.
pub(super) struct Seen<'a> {
    pub(super) process: &'a dyn Attestable,
    /// The process and whoever shares its places: what is shared by all is shared by families.
    pub(super) family: u64,
    /// Its `/proc/PID`, which who needs it opens.
    pub(super) dir: PathBuf,
    pub(super) status: ProcStatus,
    /// Of that, the supplementary groups could not be read, and none are there.
    pub(super) groups_are_hidden: bool,
}

impl<'a> Seen<'a> {
    /// How much is to be found out.
    pub(super) fn extent(&self) -> Extent {
        self.process.extent()
    }

    /// `process`, of which this was read.
    ///
    /// # Errors
    /// [`AttestError::IdentityChanged`]: it is another's by now.
    pub(super) fn of(
        process: &'a dyn Attestable,
        family: u64,
        dir: PathBuf,
        status: ProcStatus,
    ) -> Result<Self, AttestError> {
        let now = Owner { uid: Uid::from_raw(status.uid), gid: Gid::from_raw(status.gid) };
        let owner = process.owner();
        if now != owner {
            let Owner { uid, gid } = owner;
            return Err(AttestError::IdentityChanged { pid: process.pid(), uid, gid });
        }
        Ok(Self { process, family, dir, status, groups_are_hidden: false })
    }

    /// `process`, which is as it connected, with these supplementary groups.
    pub(super) fn as_connected(
        process: &'a dyn Attestable,
        family: u64,
        dir: PathBuf,
        groups: Vec<u32>,
    ) -> Self {
        let Owner { uid, gid } = process.owner();
        let status = ProcStatus { uid: uid.as_raw(), gid: gid.as_raw(), groups };
        Self { process, family, dir, status, groups_are_hidden: false }
    }

    /// `process`, which is as it connected; what supplementary groups it has cannot be read.
    pub(super) fn with_hidden_groups(process: &'a dyn Attestable, family: u64, dir: PathBuf) -> Self {
        Self { groups_are_hidden: true, ..Self::as_connected(process, family, dir, Vec::new()) }
    }

    /// The same, told apart from those who have no number in the agent's user namespace.
    ///
    /// # Errors
    /// [`AttestError::Unmapped`]: its user or group is one of these.
    pub(super) fn without(mut self, unmapped: Option<Owner>) -> Result<Self, AttestError> {
        let Some(Owner { uid, gid }) = unmapped else { return Ok(self) };
        if self.status.uid == uid.as_raw() || self.status.gid == gid.as_raw() {
            return Err(AttestError::Unmapped);
        }
        self.status.groups.retain(|group| *group != gid.as_raw());
        Ok(self)
    }
}

/// The `/proc/PID` of the process that has this PID now.
pub(super) fn dir_of(root: &Path, pid: Pid) -> PathBuf {
    root.join(pid.to_string())
}

/// An open `/proc/PID`. It stays the directory of the process that had the PID when it was opened.
pub(super) struct ProcDir {
    pub(super) fd: OwnedFd,
    path: PathBuf,
}

impl ProcDir {
    /// Opens this directory, which is that of the process that has its PID now.
    ///
    /// # Errors
    /// [`ProcReadError::Gone`] when there is none, else [`ProcReadError::Read`].
    pub(super) fn open(path: PathBuf) -> Result<Self, ProcReadError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        match open(&path, flags, Mode::empty()) {
            Ok(fd) => Ok(Self { fd, path }),
            Err(Errno::ENOENT) => Err(ProcReadError::Gone),
            Err(errno) => Err(unreadable(path, errno)),
        }
    }

    /// Opens one of its files for reading.
    ///
    /// # Errors
    /// [`ProcReadError::Gone`], [`ProcReadError::Read`].
    pub(super) fn file(&self, name: &str) -> Result<File, ProcReadError> {
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
        let fd =
            openat(&self.fd, name, flags, Mode::empty()).map_err(|errno| self.unreadable(name, errno))?;
        Ok(File::from(fd))
    }

    /// Who the process is.
    ///
    /// # Errors
    /// [`ProcReadError`].
    pub(super) fn status(&self) -> Result<ProcStatus, ProcReadError> {
        const NAME: &str = "status";
        let file = self.file(NAME)?;
        let mut buffer = vec![0; STATUS_AT_FIRST];
        let mut filled = 0;
        loop {
            // The kernel makes the whole file at the first read, and keeps what that has no place for.
            let rest = buffer.get_mut(filled..).unwrap_or_default();
            let n = read(&file, rest).map_err(|errno| self.unreadable(NAME, errno))?;
            filled += n;
            if filled == buffer.len() {
                buffer.resize(STATUS_LIMIT, 0);
            }
            match status::parse(buffer.get(..filled).unwrap_or_default()) {
                Err(StatusError::TooManyGroups) => return Err(ProcReadError::TooManyGroups),
                Err(StatusError::Missing(_)) if filled == STATUS_LIMIT => {
                    return Err(ProcReadError::TooManyGroups);
                }
                Err(StatusError::Missing(_)) if n > 0 => {}
                Err(why) => return Err(ProcReadError::Malformed { path: self.path_of(NAME), why }),
                Ok(status) => return Ok(status),
            }
        }
    }

    /// The name of the command, which is the process's own choice.
    ///
    /// # Errors
    /// [`ProcReadError`].
    pub(super) fn command(&self) -> Result<String, ProcReadError> {
        const NAME: &str = "comm";
        let file = self.file(NAME)?;
        // The kernel's limit is 16; threads of its own have longer ones.
        let mut buffer = [0; 64];
        let n = read(&file, &mut buffer).map_err(|errno| self.unreadable(NAME, errno))?;
        let name = buffer.get(..n).unwrap_or_default().trim_ascii_end();
        Ok(String::from_utf8_lossy(name).into_owned())
    }

    /// The path under which the agent reaches one of its files: for messages.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Why one of its files cannot be read. A file that every process has is not there once the process is gone.
    fn unreadable(&self, name: &str, errno: Errno) -> ProcReadError {
        match errno {
            Errno::ENOENT => ProcReadError::Gone,
            errno => unreadable(self.path_of(name), errno),
        }
    }
}

/// ESRCH for a process that went away while its directory was open.
fn unreadable(path: PathBuf, errno: Errno) -> ProcReadError {
    match errno {
        Errno::ESRCH => ProcReadError::Gone,
        errno => ProcReadError::Read { path, source: errno.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_as_far_as_its_groups_reach() {
        let dir = tempfile::tempdir().unwrap();
        for (groups, is_read) in
            [(0, true), (100, true), (180, true), (1_000, true), (1_024, true), (1_025, false)]
        {
            // As long as numbers of groups are.
            let groups: Vec<u32> = (u32::MAX - groups..u32::MAX).collect();
            let listed: String = groups.iter().map(|group| format!("{group} ")).collect();
            let text =
                format!("Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t1\t2\t3\t4\nGroups:\t{listed}\nVmPeak:\t0 kB\n");
            std::fs::write(dir.path().join("status"), &text).unwrap();
            let status = ProcDir::open(dir.path().to_owned()).unwrap().status();
            let known = status.as_ref().is_ok_and(|status| (status.uid, &status.groups) == (2, &groups));
            assert_eq!(known, is_read, "{} groups, {} bytes: {:?}", groups.len(), text.len(), status.err());
        }
    }
}
