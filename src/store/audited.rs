//! Whom the lines of the audit are about.

use crate::{
    limits::CallerKey,
    peer::{Arrival, Peer, credentials::Credentials},
};

/// Who a line is about. All of it was known when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditedProcess {
    /// Whom it is charged as.
    pub caller: CallerKey,
    pub uid: u32,
    pub gid: u32,
    /// 0 when it is in a PID namespace that the agent cannot see into.
    pub pid: i32,
}

impl AuditedProcess {
    /// The process at the other end of `arrival`.
    pub fn arrived(arrival: &Arrival) -> Self {
        let Credentials { pid, uid, gid } = arrival.credentials();
        Self { caller: arrival.caller(), uid: uid.as_raw(), gid: gid.as_raw(), pid: pid.as_raw() }
    }
}

impl From<&Peer> for AuditedProcess {
    fn from(peer: &Peer) -> Self {
        let (uid, gid) = (peer.uid().as_raw(), peer.gid().as_raw());
        Self { caller: peer.caller(), uid, gid, pid: peer.pid().as_raw() }
    }
}

/// Whom a line is about that has its share of them.
#[derive(Clone, Copy, Debug)]
pub struct AuditedCaller {
    pub(super) process: AuditedProcess,
    /// Whose lines it takes, and whose share of the issuer.
    pub(super) family: u64,
}

impl AuditedCaller {
    /// The process that connected, of this family.
    pub(super) fn new(peer: &Peer, family: u64) -> Self {
        Self { process: AuditedProcess::from(peer), family }
    }

    /// A process of this user. For tests.
    #[cfg(test)]
    pub(super) fn of_uid(uid: u32) -> Self {
        let process = AuditedProcess { caller: CallerKey::Uid(uid), uid, gid: uid, pid: 1 };
        Self { process, family: u64::from(uid) }
    }
}
