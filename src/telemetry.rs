//! What people see of a running agent: metrics, the log, and the endpoints that probes ask.
//!
//! Nothing here is secret and nothing may wait: a caller's bytes reach a line or a label only through a closed set.

pub mod health;
pub mod http;
pub mod log;
pub mod metrics;
mod process;
pub mod registry;
mod settings;
mod sink;
mod spire_names;
pub mod trouble;

pub use self::{
    settings::{
        AuditSettings, HealthSettings, HostPort, LogFormat, LogSettings, SpireNameSettings, parse_level,
    },
    spire_names::SpireNames,
};

use crate::os::sentence::said;

/// The error's text, then that of each cause, with `: ` between.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.downcast_ref().map_or_else(|| error.to_string(), said);
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.downcast_ref().map_or_else(|| cause.to_string(), said));
        source = cause.source();
    }
    text
}
