//! The socket side: from a bound path to a served HTTP/2 connection that knows who is at its other end.
//!
//! Trusted: the kernel's word on a peer (`SO_PEERCRED`, `SO_PEERPIDFD`), given once at accept, and on the writer of each
//! byte (`SCM_CREDENTIALS`). Not trusted: every byte a peer sends, what it passes with them, how fast it sends and reads,
//! and how long it stays. The order is fixed: accept, credentials, caller key, gate, first byte, HTTP/2; a connection that
//! is refused has cost no HTTP/2 state, and one that stays silent costs about 1.5 KiB. Absent: any decision about
//! identities, and what a request means, gRPC's words included, but for the status of an answer.

mod accept_gate;
mod accepted;
mod allowance;
mod bounds;
pub mod cgroup;
mod closing;
mod connection;
mod course;
pub mod credentials;
mod door;
mod drain;
mod end;
mod entrance;
pub mod frames;
mod given;
mod head_count;
mod hpack;
mod last_word;
mod lingering;
mod listener;
mod metrics;
mod outbox;
pub mod passage;
mod pauses;
pub mod pins;
pub mod pod;
mod reply;
mod request;
mod sent_frames;
mod service;
mod settings;
pub(crate) mod slot;
pub mod socket;
mod stats;
mod stream_places;
mod streams;
mod task_waker;
mod trim;
mod turns;
mod unread;
mod unsent;
pub mod way;
mod wire;
mod writer;

pub use accept_gate::{AcceptGate, AdmitAll};
pub use bounds::ConnectionBounds;
pub use credentials::{Arrival, KeyResolver, OsUid, Peer, PeerGone, PlaceUnread};
pub use drain::Drained;
pub use end::ConnectionEnd;
pub use head_count::Unheard;
pub use listener::{Leave, Listener};
pub use metrics::ConnectionMetrics;
pub use request::{BodyError, RequestBody};
pub use sent_frames::Http2Error;
pub use service::{ConnectionService, Crowded, PUSHBACK};
pub use settings::{KubernetesSettings, ListenerSettings};
pub use socket::{BindError, Socket};
pub use stats::ConnectionStats;
