//! The socket side: from a bound path to a served HTTP/2 connection that knows who is at its other end.
//!
//! Trusted: the kernel's word on a peer (`SO_PEERCRED`, `SO_PEERPIDFD`), given once at accept. Not trusted: every
//! byte a peer sends, how fast it sends and reads, and how long it stays. The order is fixed: accept, credentials,
//! caller key, gate, first byte, HTTP/2; a connection that is refused has cost no HTTP/2 state, and one that stays
//! silent costs about 1.5 KiB. Absent: any decision about identities, and any knowledge of gRPC.

pub mod cgroup;
mod connection;
pub mod credentials;
pub mod listener;
mod settings;
pub(crate) mod slot;
pub mod socket;
pub mod wire;

pub use connection::RequestBody;
pub use credentials::{Arrival, KeyResolver, OsUid, Peer, PeerGone};
pub use listener::{AdmitAll, Gate, Listener, Settings, Stats};
pub use settings::{KubernetesSettings, ListenerSettings};
pub use socket::{BindError, Socket};
