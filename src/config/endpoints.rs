//! The blocks `telemetry` and `health_checks`: the two endpoints for people's tools.

use crate::{
    hcl::{
        absent::{self, Off},
        section::{At, Section},
        settings::Shown as _,
        tree::quoted,
    },
    telemetry::{HealthSettings, HostPort},
};

const SINK: &str = "this telemetry sink";
const CHOICE: &str = "choosing metrics";

const TELEMETRY: [(&str, Off, &str); 11] = [
    ("DogStatsd", Off::Missing, SINK),
    ("Statsd", Off::Missing, SINK),
    ("M3", Off::Missing, SINK),
    ("InMem", Off::Missing, SINK),
    ("MetricPrefix", Off::Text(""), "choosing the prefix of metrics"),
    ("EnableTrustDomainLabel", Off::False, "labelling metrics with the trust domain"),
    ("EnableHostnameLabel", Off::False, "labelling metrics with the host name"),
    ("AllowedPrefixes", Off::Empty, CHOICE),
    ("BlockedPrefixes", Off::Empty, CHOICE),
    ("AllowedLabels", Off::Empty, CHOICE),
    ("BlockedLabels", Off::Empty, CHOICE),
];

/// Reads `telemetry`: where metrics are, if anywhere.
fn telemetry(root: &mut Section<'_>) -> Option<At<HostPort>> {
    let mut s = root.block("telemetry")?;
    let prometheus = s.block("Prometheus").and_then(|mut block| {
        let host = block.string("host").map_or("localhost", |at| at.value);
        let port = block.integer("port", 1..=u16::MAX);
        if port.is_none() {
            block.missing("port", "must be configured: port = 9988");
        }
        absent::refuse(&mut block, &[("tls", Off::Missing, "TLS for metrics")]);
        let place = block.place();
        block.finish();
        Some(At { value: HostPort::new(host, port?.value), place })
    });
    absent::refuse(&mut s, &TELEMETRY);
    s.finish();
    prometheus
}

/// Reads both. They cannot be at one address.
pub(super) fn read(root: &mut Section<'_>) -> (Option<HostPort>, HealthSettings) {
    let prometheus = telemetry(root);
    let Some(mut s) = root.block("health_checks") else {
        return (prometheus.map(|at| at.value), HealthSettings::default());
    };
    let health = HealthSettings::read(&mut s);
    if health.live_path == health.ready_path {
        let place = s.set_at("ready_path").unwrap_or_else(|| s.place());
        let live = s.problems().show(s.set_at("live_path").unwrap_or_else(|| s.place()));
        let message = format!("live_path is the same, at {live}");
        s.wrong(place, "ready_path", Some(quoted(&health.ready_path)), message);
    }
    if let Some(At { value, place }) = &prometheus
        && health.enabled
        && *value == HostPort::new(&health.host, health.port)
    {
        let message =
            format!("is also the address of telemetry.Prometheus, at {}", s.problems().show(*place));
        let here = s.set_at("bind_port").unwrap_or_else(|| s.place());
        s.wrong(here, "bind_port", Some(value.shown()), message);
    }
    s.finish();
    (prometheus.map(|at| at.value), health)
}
