//! The gRPC services.

pub mod claims;
pub mod codec;
pub mod encoded;
pub mod proto;
