//! What the kernel keeps of answers that a peer has not read: charged to the agent, and in no buffer of its own.

use std::{os::fd::AsFd, sync::Arc};

use crate::{limits::holding::Holding, os::outq::unread_by_peer};

/// So much is reckoned with each connection.
const WITH_CONNECTION: u64 = 4 * 1024;

/// What was last seen of it, held until the connection ends.
#[derive(Debug)]
pub(super) struct UnreadAnswers {
    holding: Arc<Holding>,
    held: u64,
}

impl UnreadAnswers {
    pub(super) fn new(holding: &Arc<Holding>) -> Self {
        Self { holding: Arc::clone(holding), held: 0 }
    }

    /// Looks anew. Cheap: the kernel has the number at hand.
    pub(super) fn look(&mut self, socket: &impl AsFd) {
        self.holds(unread_by_peer(socket).saturating_sub(WITH_CONNECTION));
    }

    fn holds(&mut self, bytes: u64) {
        if bytes != self.held {
            self.holding.hold(bytes);
            self.holding.release(std::mem::replace(&mut self.held, bytes));
        }
    }
}

impl Drop for UnreadAnswers {
    fn drop(&mut self) {
        self.holds(0);
    }
}
