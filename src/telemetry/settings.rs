//! The settings of what people see: the log, and the two endpoints.

use std::{convert::Infallible, path::PathBuf};

use tracing::Level;

use crate::hcl::settings::{Shown, settings};

/// What a log level can be called.
const LEVELS: &str = "must be one of panic, fatal, error, warn, info, debug, trace";
const URL_PATH: &str = "must be a path that begins with /";

settings! {
    /// `agent.log_*`: what is written to the log, how, and where.
    pub struct LogSettings in "agent" {
        /// The least severe lines that are written.
        "log_level" level: Level = Level::INFO, parsed(parse_level, LEVELS), reloads;
        /// How a line looks.
        "log_format" format: LogFormat = LogFormat::Text,
            parsed(LogFormat::parse, "must be text or json"), needs_restart;
        /// The file to write to, made with mode 0640 when it is missing; `None` is standard output.
        "log_file" file: Option<PathBuf> = None, absolute(), needs_restart;
        /// Whether a line names the source file and line that wrote it.
        "log_source_location" source_location: bool = false, boolean(), needs_restart;
    }
}

settings! {
    /// `audit`: where it is written who was given what.
    pub struct AuditSettings in "audit" {
        /// Whether it is written at all.
        "enabled" enabled: bool = true, boolean(), needs_restart;
        /// A file of JSON lines instead of the log, made with mode 0640 when it is missing.
        "file" file: Option<PathBuf> = None, absolute(), needs_restart;
        /// A Unix datagram socket instead of the log: each line is a datagram.
        "socket_path" socket: Option<PathBuf> = None, absolute(), needs_restart;
    }
}

settings! {
    /// `telemetry`: what is counted, by spire-agent's names too. All but the first say nothing without it.
    pub struct SpireNameSettings in "telemetry" {
        /// Whether it has those.
        "spire_agent_names" enabled: bool = false, boolean(), needs_restart;
        /// What each of these names begins with; whatever is no letter or digit in it is an underscore.
        "MetricPrefix" prefix: String = "spire_agent".to_owned(), checked(prefix), needs_restart;
        /// Whether each of them has the label `host`, the node's name.
        "EnableHostnameLabel" host_label: bool = true, boolean(), needs_restart;
        /// Whether each of them has the label `trust_domain`.
        "EnableTrustDomainLabel" trust_domain_label: bool = false, boolean(), needs_restart;
    }
}

settings! {
    /// `health_checks`: where a supervisor can ask over HTTP whether the agent is well.
    pub struct HealthSettings in "health_checks" {
        /// Whether it can over TCP.
        "listener_enabled" enabled: bool = false, boolean(), needs_restart;
        /// A name or an IP address, without brackets.
        "bind_address" host: String = "localhost".to_owned(), checked(bare_host), needs_restart;
        /// 1 to 65535.
        "bind_port" port: u16 = 80, integer(1..=u16::MAX), needs_restart;
        /// The path that says whether the agent lives.
        "live_path" live_path: String = "/live".to_owned(), parsed(url_path, URL_PATH), needs_restart;
        /// The path that says whether it serves.
        "ready_path" ready_path: String = "/ready".to_owned(), parsed(url_path, URL_PATH), needs_restart;
        /// A Unix socket where it can too, for the agent's user and group; absolute.
        "socket_path" socket_path: Option<PathBuf> = None, absolute(), needs_restart;
    }
}

impl HealthSettings {
    /// Whether it can ask anywhere.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.enabled || self.socket_path.is_some()
    }
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people; in colours on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// Parses `text` (or nothing) and `json`, in any case.
    pub fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().as_str() {
            "" | "text" => Some(Self::Text),
            "json" => Some(Self::Json),
            _ => None,
        }
    }
}

impl Shown for LogFormat {
    fn shown(&self) -> String {
        format!("{self:?}").to_ascii_lowercase()
    }
}

/// Parses a level by spire-agent's names, in any case. `panic` and `fatal` are `error` here, since this agent does
/// not log and die.
pub fn parse_level(text: &str) -> Option<Level> {
    Some(match text.to_ascii_lowercase().as_str() {
        "panic" | "fatal" | "error" => Level::ERROR,
        "warn" | "warning" => Level::WARN,
        "info" => Level::INFO,
        "debug" => Level::DEBUG,
        "trace" => Level::TRACE,
        _ => return None,
    })
}

/// A TCP address whose host may be a name: `localhost:9988`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// A name or an IP address without brackets.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

impl HostPort {
    /// `host` may be an IPv6 address in brackets.
    pub(crate) fn new(host: &str, port: u16) -> Self {
        let Ok(host) = bare_host(host);
        Self { host, port }
    }
}

impl Shown for HostPort {
    fn shown(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// The host without the brackets of an IPv6 address.
fn bare_host(host: &str) -> Result<String, Infallible> {
    Ok(host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned())
}

/// What spire-agent's names begin with.
fn prefix(text: &str) -> Result<String, Infallible> {
    Ok(if text.is_empty() { SpireNameSettings::default().prefix } else { name_part(text) })
}

/// As spire-agent writes what stands in the name of a series or in a label.
pub(super) fn name_part(text: &str) -> String {
    text.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '_' }).collect()
}

fn url_path(text: &str) -> Option<String> {
    (text.starts_with('/') && text.bytes().all(|b| b.is_ascii_graphic())).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_have_spires_names() {
        for (case, want) in [
            ("panic", Some(Level::ERROR)),
            ("fatal", Some(Level::ERROR)),
            ("ERROR", Some(Level::ERROR)),
            ("warn", Some(Level::WARN)),
            ("Warning", Some(Level::WARN)),
            ("INFO", Some(Level::INFO)),
            ("debug", Some(Level::DEBUG)),
            ("trace", Some(Level::TRACE)),
            ("", None),
            ("verbose", None),
            (" info", None),
        ] {
            assert_eq!(parse_level(case), want, "{case}");
        }
    }
}
