//! What the kernel keeps of answers that a peer has not read: charged to the agent, and in no buffer of its own.
//!
//! It stays as long as the peer neither reads it nor closes its end, whatever becomes of this one. So a connection that is over
//! keeps its place, and what it holds is its caller's, until that is gone.

use std::{sync::Arc, time::Duration};

use tokio::{net::UnixStream, time::sleep};

use super::{accepted::Accepted, outbox::Outbox};
use crate::{
    limits::holding::{Holding, KeptBytes},
    os::outq::unread_by_peer,
};

/// So much is reckoned with each connection.
const WITH_CONNECTION: u64 = 4 * 1024;
/// How long to wait for who reads what it was sent last, and how often to look at who does not.
const SOON: Duration = Duration::from_millis(5);
const SELDOM: Duration = Duration::from_secs(1);

/// What was last seen of it, held until the connection ends.
#[derive(Debug)]
pub(super) struct UnreadAnswers(KeptBytes);

impl UnreadAnswers {
    pub(super) fn new(holding: &Arc<Holding>) -> Self {
        Self(holding.keep(0))
    }

    /// Looks anew, and returns whether there are some. Cheap: the kernel has the number at hand.
    pub(super) fn look<P: Send + 'static>(&mut self, socket: &Accepted<UnixStream, P>) -> bool {
        let unread = unread_by_peer(socket);
        self.0.set(unread.saturating_sub(WITH_CONNECTION));
        unread > 0
    }
}

/// A connection that is over, and what its peer has not read of it.
pub(super) struct LeftUnread<P: Send + 'static> {
    outbox: Arc<Outbox<P>>,
    unread: UnreadAnswers,
}

impl<P: Send + 'static> LeftUnread<P> {
    pub(super) fn new(outbox: Arc<Outbox<P>>, unread: UnreadAnswers) -> Self {
        Self { outbox, unread }
    }

    /// Ends the connection as a close does, and waits until the peer has read what it was sent, or has closed its end.
    pub(super) async fn gone(mut self) {
        let stream = self.outbox.stream();
        let mut pause = SOON;
        while self.unread.look(stream) && stream.shut().is_ok() {
            sleep(pause).await;
            pause = SELDOM.min(2 * pause);
        }
    }
}
