//! The SPIRE Server as the issuer: it decides who this node is and whom it serves, and signs; nothing of the trust
//! domain's keys is here.

mod bundles;
mod dial;
mod entries;
mod error;
pub mod proto;
mod request;
pub mod settings;
mod tls;
mod upstream;

pub use self::{
    error::{DataFault, Denial, ServerError},
    settings::ServerSettings,
};
