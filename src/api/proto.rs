//! What `proto/` compiles to, checked in so that a build needs no protoc; a test compares it with `proto/`.
//!
//! The messages and the client are made as they stand. The server is made apart, because it sends some messages as
//! bytes that were encoded once for many callers ([`super::encoded`]).

#[expect(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::as_conversions,
    clippy::clone_on_ref_ptr,
    unused_qualifications,
    reason = "generated"
)]
#[rustfmt::skip]
pub mod admin;

#[expect(clippy::allow_attributes_without_reason, unused_qualifications, reason = "generated")]
#[rustfmt::skip]
pub mod workload;

#[expect(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::as_conversions,
    clippy::clone_on_ref_ptr,
    unused_qualifications,
    reason = "generated"
)]
#[rustfmt::skip]
pub mod workload_server;

/// The encoded descriptor of `proto/workload.proto`, for reflection.
pub const WORKLOAD_FDS: &[u8] = include_bytes!("proto/workload.fds");
