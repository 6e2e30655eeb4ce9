//! What all connections of a listener are told.

use tokio::sync::watch;

use super::end::ConnectionEnd;
use crate::limits::CallerKey;

/// What all connections are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Phase {
    pub(super) draining: bool,
    /// The connections of this caller end at once.
    pub(super) evicted: Option<CallerKey>,
}

impl Phase {
    /// Why a connection of `caller` has to end, if it has to.
    fn ends(&self, caller: CallerKey) -> Option<ConnectionEnd> {
        if self.evicted == Some(caller) {
            Some(ConnectionEnd::Evicted)
        } else {
            self.draining.then_some(ConnectionEnd::Drained)
        }
    }
}

/// Waits until connections of `caller` are told to end, and says why.
pub(super) async fn told(phases: &mut watch::Receiver<Phase>, caller: CallerKey) -> ConnectionEnd {
    match phases.wait_for(|phase| phase.ends(caller).is_some()).await {
        Ok(phase) => phase.ends(caller).unwrap_or(ConnectionEnd::Drained),
        // The listener is gone.
        Err(_) => ConnectionEnd::Drained,
    }
}
