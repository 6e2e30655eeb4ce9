//! The SPIRE Server as the issuer: it decides who this node is and whom it serves, and signs; nothing of the trust
//! domain's keys is here.

mod bundles;
mod entries;
pub mod proto;
mod request;
