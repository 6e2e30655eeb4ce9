//! How a connection ends: the words for it, and what all connections of a listener are told.

use tokio::sync::watch;

use crate::{limits::CallerKey, telemetry::registry::labels};

labels! {
    /// Why a connection ended.
    ConnectionEnd, "reason" {
        /// The peer closed it, or the socket failed.
        ByPeer = "peer",
        /// The process that opened it has exited.
        PeerExited = "peer_exited",
        /// No complete request came in time.
        HandshakeTimeout = "handshake_timeout",
        /// No request came for too long.
        Idle = "idle",
        /// A request without an answer, or an answer that was not read, for too long.
        Stalled = "stalled",
        /// Pings were not answered.
        KeepAlive = "keep_alive",
        /// Frames without a request, beyond the budget.
        Flood = "flood",
        /// What arrived was not HTTP/2, or broke its rules.
        Protocol = "protocol",
        /// A descriptor was passed in.
        Descriptors = "descriptors",
        /// Another process wrote on it, or its own with another user or group.
        AnotherWriter = "another_writer",
        /// The node was short of something, and its caller held more than its share: it was told to connect again.
        SentAway = "sent_away",
        /// Memory ran out, and its caller held the most.
        Evicted = "evicted",
        /// The agent drained.
        Drained = "drained",
        /// The agent drained, and the connection did not end in time.
        Aborted = "aborted",
        /// A bug of the agent's.
        Panicked = "panicked",
    }
}

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
    let told = phases.wait_for(|phase| phase.ends(caller).is_some()).await;
    // Without a phase the listener is gone.
    told.ok().and_then(|phase| phase.ends(caller)).unwrap_or(ConnectionEnd::Drained)
}
