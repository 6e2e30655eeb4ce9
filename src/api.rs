//! The gRPC services on the public socket, and [`admin`] on the owner's.
//!
//! One function per RPC reads top to bottom in the order of the way of a call; no decision hides in a layer. The
//! caller is whoever the connection's [`Peer`](crate::peer::Peer) is, never what a request says. [`status`] is the
//! one place where an error becomes a gRPC code and a sentence. Private keys pass through as encoded bytes and are
//! never logged.

pub mod admin;
mod answers;
pub mod call;
pub mod claims;
pub mod codec;
pub mod encoded;
mod guard;
mod heads;
pub mod health;
mod journal;
mod making;
mod messages;
mod metrics;
pub mod proto;
mod reached;
pub mod services;
pub mod standing;
pub mod status;
pub mod updates;
pub mod workload;

pub use journal::Journal;
pub use services::Services;
