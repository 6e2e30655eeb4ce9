//! What the agent knows, and who may change it.
//!
//! A request takes one [`Snapshot`] and ends in the world it began in. [`Writer`] is the only writer: it publishes a
//! new snapshot when the issuer's entries or bundles change, when the configuration does, and when an SVID that
//! somebody streams was renewed. X.509-SVIDs and JWT-SVIDs are made on demand and kept in two caches, each with a bound.
//! Nothing here knows gRPC, sockets or processes.

pub mod audit;
pub mod audit_notes;
pub mod audited;
pub mod entitlement;
pub mod jwt_cache;
pub mod metrics;
mod settings;
pub mod snapshot;
pub mod writer;
pub mod x509_cache;

pub use entitlement::{Charged, Entitled, NoIdentity, NotEntitled, Purpose, Unentitled, authorize};
pub use jwt_cache::JwtCache;
pub use metrics::StoreMetrics;
pub use settings::{CacheSettings, CacheSize, Policy};
pub use snapshot::{Change, Snapshot, Store};
pub use writer::Writer;
pub use x509_cache::X509Cache;
