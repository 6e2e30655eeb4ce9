//! The words for how a connection ends.

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
        /// Memory was short, and its caller held the most.
        Evicted = "evicted",
        /// The agent drained.
        Drained = "drained",
        /// The agent drained, and the connection did not end in time.
        Aborted = "aborted",
        /// A bug of the agent's.
        Panicked = "panicked",
    }
}
