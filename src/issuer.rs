//! Who signs: the embedded CA, or a SPIRE Server.

pub mod embedded;
