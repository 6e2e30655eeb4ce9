//! How a connection ends: the words for it, and what all connections of a listener are told.

use tokio::sync::watch;

use crate::telemetry::registry::labels;

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
        /// It asked for nothing but refusals and errors for too long: it was told to connect again.
        Wasteful = "wasteful",
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
}

/// Waits until all connections are told to end.
pub(super) async fn drains(phases: &mut watch::Receiver<Phase>) {
    // Without a phase the listener is gone.
    let _draining_or_gone = phases.wait_for(|phase| phase.draining).await.is_ok();
}
