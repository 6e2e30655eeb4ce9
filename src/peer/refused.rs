//! The words for why a connection is not let in.

use crate::telemetry::registry::labels;

labels! {
    /// Why the gate refuses a connection.
    Refused, "reason" {
        /// The caller has as many connections as it may.
        CallerConnections = "caller_connections",
        /// The caller connects more often than it may.
        CallerRate = "caller_rate",
        /// The node has as many connections as it may.
        NodeConnections = "node_connections",
        /// Memory is short.
        Memory = "memory",
        /// The admin socket, and neither the agent's user nor root.
        NotOwner = "not_owner",
    }
}

impl Refused {
    /// Whether others have no part in it: who comes back at once comes back for nothing.
    pub(super) fn is_callers_own(self) -> bool {
        match self {
            Self::CallerConnections | Self::CallerRate => true,
            Self::NodeConnections | Self::Memory | Self::NotOwner => false,
        }
    }
}
