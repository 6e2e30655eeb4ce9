//! Who signs: the embedded CA, or a SPIRE Server.
//!
//! An issuer is told whom to sign for; that the caller may have the SVID was decided before, by `identity::authorize`.
//! Nothing above this module sees a CA key.

pub mod embedded;
mod settings;

pub use settings::IssuerSettings;
