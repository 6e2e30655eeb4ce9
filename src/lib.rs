//! Durward: a per-node workload-identity agent.

pub mod agent;
pub mod api;
pub mod attest;
pub mod cli;
pub mod config;
mod error_chain;
pub mod identity;
pub mod issuer;
pub mod limits;
pub mod os;
pub mod peer;
pub mod store;
