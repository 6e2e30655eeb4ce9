//! The gRPC services.

pub mod codec;
pub mod encoded;
pub mod proto;
