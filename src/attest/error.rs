//! Why a process could not be attested, whose doing that is, and how it is counted.

use std::{io, path::PathBuf};

use nix::unistd::{Gid, Pid, Uid};

use super::{
    AttestorError, AttestorName,
    status::{MAX_GROUPS, StatusError},
};
use crate::telemetry::registry::labels;

/// Why a peer could not be attested. None of these means that it has no identity.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The process has ended: whoever holds its socket now is another.
    #[error("the process that opened the connection has exited")]
    Gone,
    /// The process is another user's or group's than it was when it connected.
    #[error(
        "process {pid} changed its user or group after it connected as {uid}:{gid}: it must connect again"
    )]
    IdentityChanged {
        pid: Pid,
        /// Its effective user when it connected.
        uid: Uid,
        /// Its effective group then.
        gid: Gid,
    },
    /// The kernel does not say whether the process lives.
    #[error("cannot tell whether the process that opened the connection lives")]
    Unknown { source: io::Error },
    /// The process cannot be seen.
    #[error(
        "the caller is in another PID namespace, so the agent cannot see its process: run the agent in the host's \
         PID namespace (in Kubernetes: hostPID: true), or in the caller's"
    )]
    OtherPidNamespace,
    /// `/proc` does not show the processes that connect.
    #[error("the agent's /proc is not that of its own PID namespace: see the log")]
    ProcOfOthers,
    /// The process's user or group has no number where the agent runs: it would be taken for somebody else.
    #[error(
        "the agent's user namespace has no number for the caller's user or group, which could be anybody: run the agent \
         outside of it, or map them (in a rootless container: on the host)"
    )]
    Unmapped,
    /// As many processes are being attested as may at once, of this caller or of all.
    #[error("too many processes wait to be attested")]
    Crowded,
    /// A process of the caller's has more groups than are attested, which makes its processes slow to read.
    #[error(
        "processes of the caller have so many supplementary groups that they are read one after the other"
    )]
    ManyGroups,
    /// Who the process is could not be read.
    #[error(transparent)]
    Status(ProcReadError),
    /// One attestor could not find out what it should.
    #[error(transparent)]
    Attestor(#[from] AttestorError),
}

/// Whose doing a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The caller's own: it is charged more for it, and the log has it at `info`, or at `debug` when it has ended.
    Refusal,
    /// Nobody's who calls: others are in the way, the work is only large, or the log had it when the agent started. It is
    /// logged at `debug`.
    Crowd,
    /// Ours or the node's: an admin should know.
    Fault,
}

labels! {
    /// Why a peer could not be attested.
    AttestFault, "reason" {
        /// The process ended, or its PID is another process by now.
        Gone = "gone",
        /// The process is another user's or group's than it was when it connected.
        Changed = "changed",
        /// The process lives in a PID namespace that this agent cannot see into, or its user has no number in that of the
        /// agent.
        Namespace = "namespace",
        /// Something under `/proc` could not be read or understood.
        Unreadable = "unreadable",
        /// What the process executes is where its user mounts what it likes.
        Untrusted = "untrusted",
        /// The kubelet does not list its container.
        Unlisted = "unlisted",
        /// It took too long, or too many others were being attested.
        Busy = "busy",
    }
}

impl AttestError {
    /// Whose doing it is.
    pub fn blame(&self) -> Blame {
        self.class().0
    }

    /// The label that it is counted under.
    pub fn fault(&self) -> AttestFault {
        self.class().1
    }

    /// Whether its caller is charged more for it, and it is no work to conserve.
    pub(super) fn is_paid_for(&self) -> bool {
        self.blame() == Blame::Refusal || matches!(self, Self::ManyGroups)
    }

    /// Whether it is counted for this attestor: its own failure is, and what keeps every attestor from its work.
    pub(super) fn concerns(&self, attestor: AttestorName) -> bool {
        match self {
            Self::Attestor(error) => error.attestor() == attestor,
            _ => true,
        }
    }

    fn class(&self) -> (Blame, AttestFault) {
        match self {
            Self::Gone => (Blame::Refusal, AttestFault::Gone),
            Self::IdentityChanged { .. } => (Blame::Refusal, AttestFault::Changed),
            Self::Unknown { .. } => (Blame::Fault, AttestFault::Gone),
            Self::Crowded | Self::ManyGroups => (Blame::Crowd, AttestFault::Busy),
            Self::OtherPidNamespace => (Blame::Fault, AttestFault::Namespace),
            // The log had it at the start.
            Self::Unmapped | Self::ProcOfOthers => (Blame::Crowd, AttestFault::Namespace),
            Self::Status(error) => error.class(),
            Self::Attestor(error) => error.class(),
        }
    }
}

/// Something under `/proc/PID` that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ProcReadError {
    /// No process has this PID.
    #[error("the process has exited")]
    Gone,
    /// The kernel refuses, or the file is not there.
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The file is not as the kernel writes it.
    #[error("cannot understand {}: {why}", path.display())]
    Malformed {
        path: PathBuf,
        /// What is wrong with it.
        why: StatusError,
    },
    /// The process has more supplementary groups than are attested.
    #[error("the caller has more than {} supplementary groups", MAX_GROUPS)]
    TooManyGroups,
}

impl ProcReadError {
    /// Whose doing it is, and how it is counted.
    pub(super) fn class(&self) -> (Blame, AttestFault) {
        match self {
            Self::Gone => (Blame::Refusal, AttestFault::Gone),
            Self::TooManyGroups => (Blame::Refusal, AttestFault::Unreadable),
            Self::Read { .. } | Self::Malformed { .. } => (Blame::Fault, AttestFault::Unreadable),
        }
    }
}

impl From<ProcReadError> for AttestError {
    fn from(error: ProcReadError) -> Self {
        match error {
            ProcReadError::Gone => Self::Gone,
            error => Self::Status(error),
        }
    }
}
