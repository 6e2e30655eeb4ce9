//! What people see of a running agent: metrics, the log, and the endpoints that probes ask.
//!
//! Nothing here is secret and nothing may wait: a caller's bytes reach a line or a label only through a closed set.

mod chain;
pub mod health;
pub mod http;
pub mod log;
pub mod metrics;
mod process;
pub mod registry;
mod settings;

pub(crate) use chain::chain;
pub use settings::{HealthSettings, HostPort, LogFormat, LogSettings, parse_level};
