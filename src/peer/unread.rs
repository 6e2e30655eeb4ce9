//! What the kernel keeps of answers that a peer has not read: charged to the agent, and in no buffer of its own.

use std::{os::fd::AsFd, sync::Arc};

use crate::{
    limits::holding::{Holding, KeptBytes},
    os::outq::unread_by_peer,
};

/// So much is reckoned with each connection.
const WITH_CONNECTION: u64 = 4 * 1024;

/// What was last seen of it, held until the connection ends.
#[derive(Debug)]
pub(super) struct UnreadAnswers(KeptBytes);

impl UnreadAnswers {
    pub(super) fn new(holding: &Arc<Holding>) -> Self {
        Self(holding.keep(0))
    }

    /// Looks anew. Cheap: the kernel has the number at hand.
    pub(super) fn look(&mut self, socket: &impl AsFd) {
        self.0.set(unread_by_peer(socket).saturating_sub(WITH_CONNECTION));
    }
}
