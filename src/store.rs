//! What the agent knows, and who may change it.
//!
//! A request takes one [`Snapshot`] and ends in the world it began in. [`sync::Sync`] is the only writer: it publishes
//! a new snapshot when entries or bundles are reloaded, when the issuer rotates a key, and when an SVID that somebody
//! streams was renewed. X.509-SVIDs and JWT-SVIDs are made on demand and kept in two caches, each with a bound.
//! Nothing here knows gRPC, sockets or processes.

pub mod entitlement;
pub mod jwt_cache;
pub mod signer;
pub mod snapshot;
pub mod sync;
pub mod x509_cache;

pub use entitlement::{Charged, Entitled, NoIdentity, Purpose, authorize};
pub use jwt_cache::JwtCache;
pub use signer::Signer;
pub use snapshot::{Change, Policy, Snapshot, Store};
pub use sync::Sync;
pub use x509_cache::X509Cache;
