//! The blocks `telemetry`, `health_checks` and `audit`: what is there for people's tools.

use std::path::{Path, PathBuf};

use super::agent::{AgentSettings, fits_a_socket};
use crate::{
    hcl::{
        absent::{self, Off},
        section::{At, Section},
        settings::Shown as _,
        tree::{Place, quoted},
    },
    telemetry::{AuditSettings, HealthSettings, HostPort, LogSettings, SpireNameSettings},
};

const SINK: &str = "this telemetry sink";
const CHOICE: &str = "choosing metrics";

const TELEMETRY: [(&str, Off, &str); 8] = [
    ("DogStatsd", Off::Missing, SINK),
    ("Statsd", Off::Missing, SINK),
    ("M3", Off::Missing, SINK),
    ("InMem", Off::Missing, SINK),
    ("AllowedPrefixes", Off::Empty, CHOICE),
    ("BlockedPrefixes", Off::Empty, CHOICE),
    ("AllowedLabels", Off::Empty, CHOICE),
    ("BlockedLabels", Off::Empty, CHOICE),
];

/// Where metrics are, if anywhere.
#[derive(Default)]
struct MetricsPlaces {
    tcp: Option<At<HostPort>>,
    socket: Option<At<PathBuf>>,
    names: SpireNameSettings,
}

/// What both blocks say.
#[derive(Debug, Default)]
pub(super) struct Endpoints {
    pub(super) prometheus: Option<HostPort>,
    pub(super) metrics_socket: Option<PathBuf>,
    pub(super) spire_names: SpireNameSettings,
    pub(super) health: HealthSettings,
}

/// Reads `telemetry`.
fn telemetry(root: &mut Section<'_>) -> Option<MetricsPlaces> {
    let mut s = root.block("telemetry")?;
    let names = spire_names(&mut s);
    s.problems().note_key("telemetry.Prometheus", s.set_at("Prometheus"));
    let places = s.block("Prometheus").map(|mut block| {
        let host = block.string("host").map_or("localhost", |at| at.value);
        let port = block.integer("port", 1..=u16::MAX);
        let socket = block.absolute_that("socket_path", fits_a_socket);
        if port.is_none() && !block.has("socket_path") {
            block.missing("port", "must be configured: port = 9988");
        }
        absent::refuse(&mut block, &[("tls", Off::Missing, "TLS for metrics")]);
        let place = block.place();
        block.finish();
        let tcp = port.map(|port| At { value: HostPort::new(host, port.value), place });
        MetricsPlaces { tcp, socket, ..MetricsPlaces::default() }
    });
    absent::refuse(&mut s, &TELEMETRY);
    s.finish();
    Some(MetricsPlaces { names, ..places.unwrap_or_default() })
}

/// Reads what is said of spire-agent's names.
fn spire_names(s: &mut Section<'_>) -> SpireNameSettings {
    let names = SpireNameSettings::read(s);
    let of_names = [
        ("MetricPrefix", names.prefix != SpireNameSettings::default().prefix),
        ("EnableTrustDomainLabel", names.trust_domain_label),
    ];
    for (key, asks) in of_names {
        if let (false, true, Some(place)) = (names.enabled, asks, s.set_at(key)) {
            s.wrong(place, key, None, "is for spire-agent's names of series: spire_agent_names = true");
        }
    }
    names
}

/// Reads `audit`.
pub(super) fn audit(root: &mut Section<'_>, agent: &AgentSettings, log: &LogSettings) -> AuditSettings {
    let Some(mut s) = root.block("audit") else { return AuditSettings::default() };
    let audit = AuditSettings::read(&mut s);
    if audit.file.is_some() && audit.socket.is_some() {
        s.wrong_block("file and socket_path are two places for one audit: leave one of them out");
    }
    if let Some(place) = s.set_at("file").filter(|_| audit.file.is_some() && audit.file == log.file) {
        let value = audit.file.as_ref().map(|file| quoted(&file.to_string_lossy()));
        s.wrong(
            place,
            "file",
            value,
            "cannot be the file of agent.log_file: who reads one of them would find the other's lines",
        );
    }
    if let (Some(path), Some(place)) = (&audit.socket, s.set_at("socket_path")) {
        match fits_a_socket(path) {
            Ok(()) => apart(&s, "socket_path", place, path, &own_sockets(agent)),
            Err(message) => s.wrong(place, "socket_path", Some(quoted(&path.to_string_lossy())), message),
        }
    }
    s.finish();
    audit
}

/// Reads both. No two sockets can be at one address, those of the block `agent` included.
pub(super) fn read(root: &mut Section<'_>, agent: &AgentSettings) -> Endpoints {
    let MetricsPlaces { tcp, socket, names } = telemetry(root).unwrap_or_default();
    if let Some(At { value, place }) = &socket {
        apart(root, "telemetry.Prometheus.socket_path", *place, value, &own_sockets(agent));
    }
    let health = root.block("health_checks").map(|s| health_checks(s, agent, tcp.as_ref(), socket.as_ref()));
    Endpoints {
        prometheus: tcp.map(|at| at.value),
        metrics_socket: socket.map(|at| at.value),
        spire_names: names,
        health: health.unwrap_or_default(),
    }
}

fn health_checks(
    mut s: Section<'_>,
    agent: &AgentSettings,
    metrics: Option<&At<HostPort>>,
    metrics_socket: Option<&At<PathBuf>>,
) -> HealthSettings {
    let health = HealthSettings::read(&mut s);
    if health.live_path == health.ready_path {
        let place = s.set_at("ready_path").unwrap_or_else(|| s.place());
        let live = s.problems().show(s.set_at("live_path").unwrap_or_else(|| s.place()));
        let message = format!("live_path is the same, at {live}");
        s.wrong(place, "ready_path", Some(quoted(&health.ready_path)), message);
    }
    if let Some(At { value, place }) = metrics
        && health.enabled
        && *value == HostPort::new(&health.host, health.port)
    {
        let message =
            format!("is also the address of telemetry.Prometheus, at {}", s.problems().show(*place));
        let here = s.set_at("bind_port").unwrap_or_else(|| s.place());
        s.wrong(here, "bind_port", Some(value.shown()), message);
    }
    if let (Some(path), Some(place)) = (&health.socket_path, s.set_at("socket_path")) {
        let mut others = own_sockets(agent);
        others.extend(metrics_socket.map(|at| ("telemetry.Prometheus.socket_path", at.value.as_path())));
        match fits_a_socket(path) {
            Ok(()) => apart(&s, "socket_path", place, path, &others),
            Err(message) => s.wrong(place, "socket_path", Some(quoted(&path.to_string_lossy())), message),
        }
    }
    s.finish();
    health
}

fn own_sockets(agent: &AgentSettings) -> Vec<(&'static str, &Path)> {
    let admin = agent.admin_socket_path.as_deref().map(|path| ("agent.admin_socket_path", path));
    [("agent.socket_path", agent.socket_path.as_path())].into_iter().chain(admin).collect()
}

/// Reports a socket that is at the path of another one.
fn apart(s: &Section<'_>, key: &str, place: Place, path: &Path, others: &[(&str, &Path)]) {
    if let Some((other, _)) = others.iter().find(|(_, at)| *at == path) {
        s.wrong(place, key, Some(quoted(&path.to_string_lossy())), format!("is also {other}"));
    }
}
