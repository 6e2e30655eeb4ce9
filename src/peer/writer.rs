//! Whether the bytes of a connection come from who opened it.
//!
//! A socket can be handed over, and a child inherits it: `SO_PEERCRED` goes on naming who called `connect()`. So the
//! writer of every byte is compared. Its process must be that one. Its user and group are the real ones, where
//! `SO_PEERCRED` has the effective ones, and the two differ in every setuid program: they are compared with those of
//! the first bytes. Threads are one process. A privileged writer can name another process or user, of its own
//! namespaces: what does not match ends the connection, and what matches proves nothing more.
//!
//! Absent: who reads. Whoever was handed the socket can read what is sent on it, and no kernel shows that.

use std::sync::{Arc, LazyLock};

use nix::unistd::{Gid, Uid};

use super::credentials::{Peer, PeerGone};
use crate::{limits::pace::Complaints, os::receive::WrittenBy};

/// Whose connections others wrote on. Callers could cause it.
static WRITERS: LazyLock<Complaints<()>> = LazyLock::new(Complaints::default);

/// The one process that may write on a connection.
#[derive(Debug)]
pub(super) struct SoleWriter {
    peer: Arc<Peer>,
    /// The real user and group of the first bytes.
    first: Option<(Uid, Gid)>,
}

impl SoleWriter {
    pub(super) fn new(peer: Arc<Peer>) -> Self {
        Self { peer, first: None }
    }

    /// Who it is.
    pub(super) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Whether its process was seen as another user or group than it connected as.
    pub(super) fn has_changed(&self) -> bool {
        self.peer.has_changed()
    }

    /// Whether it wrote these bytes, as the user and group it was from the first byte on.
    pub(super) fn wrote(&mut self, by: Option<WrittenBy>) -> bool {
        let Some(WrittenBy { pid, uid, gid }) = by else { return false };
        let same = pid == self.peer.pid()
            && match self.first {
                Some(first) => first == (uid, gid),
                None => self.begins_as((uid, gid)),
            };
        if !same {
            WRITERS.say(self.peer.caller(), (), |times| {
                tracing::debug!(
                    connected_pid = %self.peer.pid(),
                    connected_uid = %self.peer.uid(),
                    connected_gid = %self.peer.gid(),
                    first = ?self.first,
                    %pid, %uid, %gid,
                    times,
                    "another process wrote on a connection, or its own with another user or group"
                )
            });
        }
        same
    }

    /// The first bytes. Who is not whom `connect()` was called as may run a setuid program, or may have become
    /// somebody else before it said a word.
    fn begins_as(&mut self, ids: (Uid, Gid)) -> bool {
        self.first = Some(ids);
        ids == (self.peer.uid(), self.peer.gid())
            || !matches!(self.peer.is_alive(), Err(PeerGone::CredentialsChanged { .. }))
    }
}
