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
    sink::{AUDIT_RUN, LINES_LOST},
    spire_names::SpireNames,
};

use nix::errno::Errno;

use crate::os::sentence::said;

/// The error's text, then that of each cause, with `: ` between.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = link(error);
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&link(cause));
        source = cause.source();
    }
    text
}

/// One error's own text; the system's as a part of a sentence.
fn link(error: &(dyn std::error::Error + 'static)) -> String {
    let of_system = error.downcast_ref::<Errno>().map(|errno| said(&(*errno).into()));
    of_system.or_else(|| error.downcast_ref().map(said)).unwrap_or_else(|| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_says_is_a_part_of_the_sentence() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read it")]
        struct Unread<E: std::error::Error + 'static>(#[source] E);

        let want = "cannot read it: permission denied";
        assert_eq!(chain(&Unread(Errno::EACCES)), want);
        assert_eq!(chain(&Unread(std::io::Error::from(Errno::EACCES))), want);
    }
}
