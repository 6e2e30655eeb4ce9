//! A process that its owner asks about by PID, without a connection: what `durward explain` looks at.
//!
//! The selectors found here are for display. No [`Admitted`](crate::limits::Admitted) comes of it, nobody is charged
//! or counted, and nothing is kept. The order is the attestor's: the pidfd first, then everything under `/proc`, and
//! at the end the pidfd again, so that what was read is of the process that had the PID at the start.
//!
//! Read with [`ProcDir`] as calls are, and not with the `procfs` crate: that one does not read the `status` of a
//! process whose name is no UTF-8, and the name is the process's own choice.

use std::{io, sync::Arc};

use nix::{
    errno::Errno,
    unistd::{Gid, Pid, Uid},
};
use tokio::time::Instant;

use super::{
    AttestError, Attestor, AttestorError, AttestorSaid, Questions, Subject, doubted,
    process::{Attestable, Extent, ProcDir, dir_of},
};
use crate::{
    limits::CallerKey,
    os::pidfd::{Owner, Pidfd},
    peer::{pod::PodPlace, slot::PeerSlot},
};

/// A process held by its pidfd.
#[derive(Debug)]
pub struct Inspected {
    pid: Pid,
    pidfd: Pidfd,
    owner: Owner,
    groups: Vec<u32>,
    place: Option<PodPlace>,
    command: String,
}

/// Why a process cannot be inspected.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// No process has this PID, or it ended while it was looked at.
    #[error("there is no process {0}")]
    NoProcess(i32),
    /// The kernel gives no pidfd: it is a thread, or descriptors are short.
    #[error("process {pid} cannot be opened (a thread is not a process)")]
    Pidfd { pid: i32, source: io::Error },
    /// What attestation would say to it as well.
    #[error("process {pid} cannot be attested")]
    Attest { pid: i32, source: AttestError },
}

impl InspectError {
    fn attest(pid: Pid, source: AttestError) -> Self {
        match source {
            AttestError::Gone => Self::NoProcess(pid.as_raw()),
            source => Self::Attest { pid: pid.as_raw(), source },
        }
    }
}

/// What would be attested of a process.
#[derive(Debug)]
pub struct Description {
    pub subject: Subject,
    /// What could not be told.
    pub untold: Vec<UntoldKind>,
    /// What each attestor came to.
    pub said: Vec<AttestorSaid>,
}

/// A kind of selectors of which it could not be told whether a process has them.
#[derive(Debug)]
pub struct UntoldKind {
    /// As `unix:path`.
    pub kind: String,
    pub why: AttestorError,
    /// Whether its calls fail for it.
    pub decides: bool,
}

impl Inspected {
    /// Its PID.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its effective user.
    pub fn uid(&self) -> Uid {
        self.owner.uid
    }

    /// Its effective group.
    pub fn gid(&self) -> Gid {
        self.owner.gid
    }

    /// The name of its command, which is its own choice.
    pub fn command(&self) -> &str {
        &self.command
    }

    /// The same process, which is in this pod. Looked up by whoever knows where the kubelet keeps pods.
    #[must_use]
    pub fn within(self, place: Option<PodPlace>) -> Self {
        Self { place, ..self }
    }
}

impl Attestable for Inspected {
    fn pid(&self) -> Pid {
        self.pid
    }

    fn owner(&self) -> Owner {
        self.owner
    }

    fn caller(&self) -> CallerKey {
        CallerKey::Uid(self.owner.uid.as_raw())
    }

    fn is_alive(&self) -> Result<(), AttestError> {
        match self.pidfd.poll_exited() {
            Ok(false) => Ok(()),
            Ok(true) => Err(AttestError::Gone),
            Err(errno) => Err(AttestError::Unknown { source: errno.into() }),
        }
    }

    fn groups_read(&self) -> Option<&[u32]> {
        Some(&self.groups)
    }

    fn extent(&self) -> Extent {
        Extent::All
    }

    /// Each inspection is one of its own.
    fn slot(&self) -> Option<&PeerSlot> {
        None
    }

    fn place(&self) -> Option<PodPlace> {
        self.place
    }
}

impl Attestor {
    /// The process that has this PID now. What else is read about it counts only if [`Attestor::describe`] succeeds
    /// afterwards.
    ///
    /// # Errors
    /// [`InspectError`].
    pub async fn inspect(&self, pid: i32) -> Result<Inspected, InspectError> {
        let no_process = InspectError::NoProcess(pid);
        if pid <= 0 {
            return Err(no_process);
        }
        let raw = pid;
        let pid = Pid::from_raw(pid);
        let pidfd = match Pidfd::open(pid) {
            Ok(pidfd) => pidfd,
            Err(Errno::ESRCH) => return Err(no_process),
            Err(errno) => return Err(InspectError::Pidfd { pid: raw, source: errno.into() }),
        };
        let failed = |source| InspectError::attest(pid, source);
        let dir = dir_of(&self.proc_root, pid);
        let read = || ProcDir::open(dir).and_then(|dir| Ok((dir.status()?, dir.command()?)));
        let (status, command) = self.long_reads.read_for_people(read).await.map_err(failed)?;
        let owner = Owner { uid: Uid::from_raw(status.uid), gid: Gid::from_raw(status.gid) };
        let found = Inspected { pid, pidfd, owner, groups: status.groups, place: None, command };
        found.is_alive().map_err(failed)?;
        Ok(found)
    }

    /// What would be attested of the process as a caller: **for display only**, since no call was admitted. Asks last
    /// whether it still lives.
    ///
    /// # Errors
    /// [`InspectError`].
    pub async fn describe(
        &self,
        process: &Inspected,
        questions: &Questions,
    ) -> Result<Description, InspectError> {
        let attested = self.attest_anew(questions, process, Instant::now()).await;
        let attested = attested.map_err(|source| InspectError::attest(process.pid, source))?;
        let decides = doubted(&attested, questions);
        let said = attested.said;
        let untold = attested.untold.into_iter().enumerate();
        let untold = untold.map(|(at, (kind, why))| UntoldKind {
            kind: kind.to_string(),
            why,
            decides: decides == Some(at),
        });
        let subject = Subject(Arc::new(attested.selectors));
        Ok(Description { untold: untold.collect(), subject, said })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        os::unix::{ffi::OsStrExt as _, fs::symlink},
        process::Command,
    };

    use super::*;
    use crate::attest::AttestSettings;

    #[tokio::test]
    async fn a_living_process_has_its_selectors_and_a_dead_one_none() {
        let attestor = Attestor::new(AttestSettings::default());
        // Its name, which stands in the first line that is read, is no UTF-8.
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join(OsStr::from_bytes(b"\xff"));
        symlink("/bin/sleep", &program).unwrap();
        let mut child = Command::new(program).arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // The kernel gives it that name a moment after spawn has returned.
        let mut found = attestor.inspect(pid).await.unwrap();
        for _ in 0..100_000 {
            if found.command() == "\u{fffd}" {
                break;
            }
            found = attestor.inspect(pid).await.unwrap();
        }
        assert_eq!(found.command(), "\u{fffd}", "it has its name");
        assert_eq!((found.uid(), found.gid()), (nix::unistd::geteuid(), nix::unistd::getegid()));
        let subject = attestor.describe(&found, &Questions::default()).await.unwrap().subject;
        let uid = format!("unix:uid:{}", found.uid());
        assert!(subject.iter().any(|selector| selector.to_string() == uid), "{subject:?}");

        child.kill().unwrap();
        child.wait().unwrap();
        let gone = attestor.describe(&found, &Questions::default()).await.unwrap_err();
        assert!(matches!(gone, InspectError::NoProcess(it) if it == pid), "{gone}");
        for nobody in [pid, 0, -1, i32::MAX] {
            let err = attestor.inspect(nobody).await.unwrap_err();
            assert_eq!(err.to_string(), format!("there is no process {nobody}"));
        }
    }
}
