//! Durward: a per-node workload-identity agent.

pub mod api;
pub mod attest;
pub mod cli;
pub mod config;
pub mod identity;
pub mod issuer;
pub mod limits;
pub mod os;
pub mod peer;
pub mod store;
