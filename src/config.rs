//! `agent.conf`: from text to a [`Config`] that is checked in full.
//!
//! The form is spire-agent's (HCL, or the same as JSON), with Durward's own blocks beside it: `issuer`, `entry`,
//! `federation`. Whoever may write these files decides who is who on this node, so files that others than root and the
//! agent's user could change or replace are refused. What is read here is text by an admin: it may be wrong in any way,
//! never panics, and every mistake is reported at once with its place. Nothing is left out silently: an unknown key, and
//! a key of spire-agent that this version does not act on, are errors. A field of [`Config`] is final: no default is left to
//! be applied elsewhere.
//!
//! Where a key is declared: with `settings!`, in `settings.rs` of the room that acts on it (`telemetry`, `store`, `peer`,
//! `issuer::embedded`) or in the attestor's file; the agent's own in `agent`. `ratelimit` and `entries` read their blocks
//! key by key. A file here reads a block: it takes the keys, and checks what several keys say together.
//!
//! Absent on purpose: command line flags (`cli`), the environment (a function gives it), opening sockets.

mod absent;
mod agent;
mod diff;
mod document;
mod endpoints;
mod entries;
mod federation;
mod file;
mod input;
mod issuer;
mod keys;
mod places;
mod plugin_files;
mod ratelimit;
mod server;
mod sources;
mod trust_domain;
mod users;

pub use agent::{AdminSocket, AgentSettings, DEFAULT_DATA_DIR, DEFAULT_SOCKET_PATH, admin_socket_for};
pub use diff::{Changes, EntryChanges, diff};
pub use document::{Config, DropInDir, Flawed};
pub use file::{DropIns, FileError};
pub use input::{ExpandEnv, Given, Input};
pub use issuer::{JoinedServer, Signer};
pub use places::{AgentUser, Places, TakenAddress, WrongPlace};
pub use sources::Sources;
