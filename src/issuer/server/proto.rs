//! What `proto/spire` compiles to, a module for each package, checked in so that a build needs no protoc; a test compares it with
//! `proto/`. Messages and clients alone: the agent serves none of it.

#[expect(clippy::allow_attributes_without_reason, unused_qualifications, reason = "generated")]
#[rustfmt::skip]
pub mod agent;

#[expect(clippy::allow_attributes_without_reason, unused_qualifications, reason = "generated")]
#[rustfmt::skip]
pub mod bundle;

#[expect(clippy::allow_attributes_without_reason, unused_qualifications, reason = "generated")]
#[rustfmt::skip]
pub mod entry;

#[expect(clippy::allow_attributes_without_reason, unused_qualifications, reason = "generated")]
#[rustfmt::skip]
pub mod svid;

#[rustfmt::skip]
pub mod types;
