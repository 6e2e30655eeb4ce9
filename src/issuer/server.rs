//! The SPIRE Server as the issuer: it decides who this node is and whom it serves, and signs; nothing of the trust
//! domain's keys is here.

mod agent_keys;
mod attestation;
mod bootstrap;
mod bundles;
mod data;
mod dial;
mod entries;
mod error;
mod files;
pub mod own_svid;
pub mod proto;
mod request;
pub mod settings;
mod tls;
mod upstream;

pub use self::{
    error::{DataFault, Denial, ServerError},
    own_svid::{OwnStanding, OwnSvid},
    settings::ServerSettings,
    upstream::LineStanding,
};
