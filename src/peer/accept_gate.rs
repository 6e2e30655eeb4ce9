//! What the listener asks whoever knows the limits.

use std::{os::fd::BorrowedFd, sync::Arc};

use http::HeaderMap;

use super::credentials::{Arrival, Peer};
use crate::{
    limits::{CallerKey, ConnectionRefusal, attempt::Attempt, holding::Holding, room::Room},
    os::headroom::Headroom,
};

/// Decides at accept, before any HTTP/2 state exists. All of it must answer at once: it runs in the accept loop.
pub trait AcceptGate: Send + Sync + 'static {
    /// Lives as long as the connection; its drop gives the place back.
    type Permit: Send + Sync + Unpin + 'static;

    /// Whether the process of one of this user may be asked after to find out whom to charge, before it is let in: the kernel keeps
    /// something of each that is. By default it may.
    fn may_ask_after_process(&self, _user: CallerKey) -> bool {
        true
    }

    /// Lets a connection in, or not; what refuses it is counted. One that is refused for want of room
    /// ([`ConnectionRefusal::is_soft`]) waits a moment and is asked for again, up to the last time: until then that is not
    /// counted.
    ///
    /// # Errors
    /// [`ConnectionRefusal`]: it is closed, or told why and closed.
    fn admit_connection(
        &self,
        arrival: &Arrival,
        attempt: Attempt,
    ) -> Result<Self::Permit, ConnectionRefusal>;

    /// Refuses one whose process may not be asked after: whom to charge for it is not known, and it is never let in.
    fn refuse_unread(&self, _arrival: &Arrival) -> ConnectionRefusal {
        ConnectionRefusal::Memory
    }

    /// Something was read of a process to find out whom to charge for its connection. By default nobody asks.
    fn was_asked_after(&self, _arrival: &Arrival) {}

    /// One is let in that connected by this socket: its connection begins. By default nothing more is asked.
    fn begins(&self, _permit: &mut Self::Permit, _arrival: &Arrival, _socket: BorrowedFd<'_>) {}

    /// Whether there is room: those who wait are asked for again when it returns. By default they wait for their time.
    fn room(&self) -> Option<Arc<Room>> {
        None
    }

    /// One that was let in begins to speak, and there is memory for it. By default nobody counts them.
    fn has_begun(&self, _permit: &Self::Permit) {}

    /// One that was let in begins to speak, and there is no memory for it: it is refused after all, and that is counted.
    fn refuse_begun(&self, _permit: &Self::Permit, _peer: &Peer) -> ConnectionRefusal {
        ConnectionRefusal::MemoryTaken
    }

    /// What a caller of whom one was refused is told: the headers of an answer that ends with them. By default nobody is told.
    fn answer(&self, _caller: CallerKey, _why: ConnectionRefusal) -> Option<HeaderMap> {
        None
    }

    /// What one that cannot be identified is told, where nobody can. By default nobody is told.
    fn answer_unidentified(&self) -> Option<HeaderMap> {
        None
    }

    /// Where is said what the connection holds. By default nobody sums it up.
    fn holding(_permit: &Self::Permit) -> Arc<Holding> {
        Arc::default()
    }

    /// The cgroups whose memory the kernel charges for what it keeps of connections that are closed. By default none has
    /// a bound that could be met. Asked once, before anybody is accepted, and may wait.
    fn headroom(&self) -> Option<Headroom> {
        None
    }

    /// Whether the user at the other end is all that counts, which the kernel recorded when it connected: then one whose
    /// process cannot be held on to is let in too.
    fn goes_by_user(&self) -> bool {
        false
    }

    /// Of whom the connection is one: they share the threads that close what is left in a connection, the places of those
    /// who wait, and the answers. By default its user.
    fn family(&self, arrival: &Arrival) -> u64 {
        u64::from(arrival.credentials().uid.as_raw())
    }
}

/// Lets everybody in.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdmitAll;

impl AcceptGate for AdmitAll {
    type Permit = ();

    fn admit_connection(&self, _arrival: &Arrival, _attempt: Attempt) -> Result<(), ConnectionRefusal> {
        Ok(())
    }
}
