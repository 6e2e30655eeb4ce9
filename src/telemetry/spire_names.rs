//! spire-agent's own names for what is counted here, so that dashboards and alerts go on that know those.
//!
//! They are made of the text of the agent's own series, and nothing is counted twice. What spire-agent counts and this agent
//! does not is left out: a 0 would be a lie. As in spire-agent, a series with `status` and a timer are there once they have counted
//! something, timers are in milliseconds, and every series has the labels `host` and `trust_domain` that were asked for. Timers have
//! `_sum` and `_count`, no quantiles.

use std::{collections::BTreeMap, fmt::Write as _};

use tokio::time::Instant;

use super::{
    registry::float_u64,
    settings::{SpireNameSettings, name_part},
};

/// The most that is read of the node's name, in bytes, as the kernel has it.
const LONGEST_HOST: usize = 64;

/// Methods, with spire-agent's names of them.
const CALLS: [(&str, &str); 7] = [
    ("FetchX509SVID", "fetch_x509svid"),
    ("FetchX509Bundles", "fetch_x509_bundles"),
    ("FetchJWTSVID", "fetch_jwtsvid"),
    ("FetchJWTBundles", "fetch_jwt_bundles"),
    ("ValidateJWTSVID", "validate_jwtsvid"),
    ("FetchWITSVID", "fetch_witsvid"),
    ("FetchWITBundles", "fetch_wit_bundles"),
];

/// A label and its value.
type LabelPair<'a> = (&'a str, &'a str);

/// Gauges that have the same value as one of this agent's, which has at most this one label.
const GAUGES: [(&str, &str, Option<LabelPair<'static>>); 5] = [
    ("sync_entries_total", "durward_entries", None),
    ("lru_cache_record_map_size", "durward_entries", None),
    ("lru_cache_svid_map_size", "durward_x509_svids", Some(("state", "cached"))),
    ("jwt_svid_cache_size", "durward_jwt_svids", None),
    ("workload_api_connections", "durward_streams_open", None),
];

/// Calls to the server, by what spire-agent counts them as. The first has the label `attestor`.
const SERVER_CALLS: [(&str, &str); 3] = [
    ("node_attestor_new_svid", "AttestAgent"),
    ("agent_svid_rotate", "RenewAgent"),
    ("manager_sync_fetch_svids_updates", "BatchNewX509SVID"),
];

/// Writes spire-agent's series.
#[derive(Debug)]
pub struct SpireNames {
    prefix: String,
    /// The labels that every series has.
    always: Vec<(&'static str, String)>,
    trust_domain: String,
    node_attestor: Option<&'static str>,
    started: Instant,
}

/// A line of this agent's text.
struct Sample<'a> {
    series: &'a str,
    labels: Vec<LabelPair<'a>>,
    value: f64,
}

impl<'a> Sample<'a> {
    fn read(line: &'a str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let (series, labels) = series.split_once('{').unwrap_or((series, ""));
        let of_label = |pair: &'a str| {
            let (key, value) = pair.split_once('=')?;
            Some((key, value.trim_matches('"')))
        };
        // No value of these has a comma in it: they are of closed sets.
        let labels = labels.trim_end_matches('}').split(',').filter_map(of_label).collect();
        let value = value.parse().ok().filter(|value: &f64| value.is_finite())?;
        Some(Self { series, labels, value })
    }

    fn label(&self, key: &str) -> Option<&'a str> {
        self.labels.iter().find(|(found, _)| *found == key).map(|(_, value)| *value)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SeriesType {
    Counter,
    Gauge,
    Summary,
}

/// What was made so far: by name, its type, and by its line's name and labels the value.
struct Made<'n> {
    names: &'n SpireNames,
    series: BTreeMap<String, (SeriesType, BTreeMap<String, f64>)>,
}

impl Made<'_> {
    /// Adds `value` to a series; `suffix` is what its line's name ends in.
    fn add(
        &mut self,
        series_type: SeriesType,
        (name, suffix): (&str, &str),
        labels: &[LabelPair<'_>],
        value: f64,
    ) {
        let name = format!("{}_{name}", self.names.prefix);
        let mut line = format!("{name}{suffix}");
        let always = self.names.always.iter().map(|(key, value)| (*key, value.as_str()));
        let mut all: Vec<_> = labels.iter().copied().chain(always).collect();
        all.sort_unstable();
        for (at, (key, value)) in all.into_iter().enumerate() {
            let open = if at == 0 { '{' } else { ',' };
            // Writing to a String cannot fail.
            write!(line, "{open}{key}=\"{value}\"").unwrap_or_default();
        }
        if line.contains('{') {
            line.push('}');
        }
        let (_, lines) = self.series.entry(name).or_insert((series_type, BTreeMap::new()));
        *lines.entry(line).or_default() += value;
    }

    /// What is counted by how it ended is there once it has.
    fn count(&mut self, name: &str, labels: &[LabelPair<'_>], value: f64) {
        if value > 0.0 {
            self.add(SeriesType::Counter, (name, ""), labels, value);
        }
    }

    /// A part of a histogram, in seconds, is one of a timer; the buckets are not.
    fn time(&mut self, name: &str, labels: &[LabelPair<'_>], part: &str, value: f64) {
        let value = match part {
            "_sum" if value > 0.0 => value * 1000.0,
            "_count" if value > 0.0 => value,
            _ => return,
        };
        self.add(SeriesType::Summary, (&format!("{name}_elapsed_time"), part), labels, value);
    }
}

impl SpireNames {
    /// Of an agent of this trust domain, which its server knows by this node attestor; `None` where there is no server.
    pub fn new(
        settings: &SpireNameSettings,
        trust_domain: &str,
        node_attestor: Option<&'static str>,
    ) -> Self {
        let mut always = Vec::new();
        if settings.host_label {
            always.push(("host", host()));
        }
        if settings.trust_domain_label {
            always.push(("trust_domain", name_part(trust_domain)));
        }
        Self {
            prefix: settings.prefix.clone(),
            always,
            trust_domain: name_part(trust_domain),
            node_attestor,
            started: Instant::now(),
        }
    }

    /// Adds spire-agent's series to a text of this agent's.
    pub(super) fn write(&self, text: &mut String) {
        let mut made = Made { names: self, series: BTreeMap::new() };
        let version = name_part(env!("CARGO_PKG_VERSION"));
        let labels = [("version", version.as_str()), ("trust_domain_id", self.trust_domain.as_str())];
        made.add(SeriesType::Gauge, ("started", ""), &labels, 1.0);
        let uptime = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        made.add(SeriesType::Gauge, ("uptime_in_ms", ""), &[], float_u64(uptime));
        for sample in text.lines().filter_map(Sample::read) {
            calls(&mut made, &sample);
            attestations(&mut made, &sample);
            server(&mut made, &sample);
            gauges(&mut made, &sample);
        }
        for (name, (series_type, lines)) in made.series {
            let series_type = match series_type {
                SeriesType::Counter => "counter",
                SeriesType::Gauge => "gauge",
                SeriesType::Summary => "summary",
            };
            writeln!(text, "# TYPE {name} {series_type}").unwrap_or_default();
            for (line, value) in lines {
                writeln!(text, "{line} {value}").unwrap_or_default();
            }
            text.push('\n');
        }
    }
}

/// The Workload API.
fn calls(made: &mut Made<'_>, sample: &Sample<'_>) {
    let Some(method) = sample.label("method") else { return };
    let Some((_, name)) = CALLS.iter().find(|(ours, _)| *ours == method) else { return };
    let rpc = format!("rpc_workload_api_{name}");
    match sample.series {
        "durward_calls_total" => {
            made.count(&rpc, &[("status", sample.label("code").unwrap_or_default())], sample.value);
            made.add(SeriesType::Counter, ("workload_api_connection", ""), &[], sample.value);
        }
        "durward_streams_open" => {
            made.add(SeriesType::Counter, ("workload_api_connection", ""), &[], sample.value);
        }
        "durward_rate_limit_exceeded_total" => {
            let method = format!("_SpiffeWorkloadAPI_{method}");
            made.count("workload_api_rate_limit_exceeded", &[("method", &method)], sample.value);
        }
        series => {
            if let Some(part) = series.strip_prefix("durward_call_duration_seconds") {
                made.time(&rpc, &[], part, sample.value);
            }
        }
    }
}

/// Workload attestation, by attestor.
fn attestations(made: &mut Made<'_>, sample: &Sample<'_>) {
    const NAME: &str = "workload_api_workload_attestor";
    let Some(attestor) = sample.label("attestor") else { return };
    let label = ("attestor", attestor);
    if sample.series == "durward_attestation_failures_total" {
        made.count(NAME, &[label, ("status", "Internal")], sample.value);
    } else if let Some(part) = sample.series.strip_prefix("durward_attestation_duration_seconds") {
        made.time(NAME, &[label], part, sample.value);
        if part == "_count" {
            made.count(NAME, &[label, ("status", "OK")], sample.value);
        }
    }
}

/// The SPIRE Server.
fn server(made: &mut Made<'_>, sample: &Sample<'_>) {
    if sample.series == "durward_server_calls_total" {
        let called = SERVER_CALLS.iter().find(|(_, method)| sample.label("method") == Some(method));
        let Some((name, method)) = called else { return };
        let mut labels = vec![("status", sample.label("code").unwrap_or_default())];
        if *method == "AttestAgent" {
            labels.extend(made.names.node_attestor.map(|attestor| ("attestor", attestor)));
        }
        made.count(name, &labels, sample.value);
    } else if let Some(part) = sample.series.strip_prefix("durward_server_sync_duration_seconds") {
        const NAME: &str = "manager_sync_fetch_entries_updates";
        let status = if sample.label("result") == Some("ok") { "OK" } else { "Unavailable" };
        made.time(NAME, &[("status", status)], part, sample.value);
        if part == "_count" {
            made.count(NAME, &[("status", status)], sample.value);
        }
    } else if sample.series == "durward_agent_svid_left_seconds" {
        let has_one = if sample.value > 0.0 { 1.0 } else { 0.0 };
        made.add(SeriesType::Gauge, ("bootstrapped", ""), &[], has_one);
    }
}

/// What there is.
fn gauges(made: &mut Made<'_>, sample: &Sample<'_>) {
    for (name, ours, label) in GAUGES {
        if sample.series == ours && label.is_none_or(|(key, value)| sample.label(key) == Some(value)) {
            made.add(SeriesType::Gauge, (name, ""), &[], sample.value);
        }
    }
    // Its own is one of them, once it is known.
    let bundles = match (sample.series, sample.label("kind")) {
        ("durward_federated_bundles", _) => sample.value,
        ("durward_bundle_authorities", Some("x509")) if sample.value > 0.0 => 1.0,
        _ => return,
    };
    made.add(SeriesType::Gauge, ("sync_bundles_total", ""), &[], bundles);
}

/// The node's name, as the value of a label.
fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let fits = |letter: &char| letter.is_ascii_graphic() && !matches!(letter, '"' | '\\');
    name.chars().filter(fits).take(LONGEST_HOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_has_spire_agents_name_too() {
        let settings = SpireNameSettings { host_label: false, ..SpireNameSettings::default() };
        let own = r#"
# TYPE durward_calls_total counter
durward_calls_total{method="FetchX509SVID",code="OK"} 3
durward_calls_total{method="FetchX509SVID",code="Canceled"} 0
durward_calls_total{method="FetchJWTSVID",code="PermissionDenied"} 2
durward_calls_total{method="Other",code="OK"} 9
durward_call_duration_seconds_bucket{method="FetchJWTSVID",le="0.5"} 2
durward_call_duration_seconds_sum{method="FetchJWTSVID"} 0.25
durward_call_duration_seconds_count{method="FetchJWTSVID"} 2
durward_streams_open{method="FetchX509SVID"} 4
durward_rate_limit_exceeded_total{method="FetchJWTSVID",stage="caller",key_type="uid",reason="rate"} 5
durward_rate_limit_exceeded_total{method="FetchJWTSVID",stage="identity",key_type="spiffe_id",reason="rate"} 1
durward_attestation_duration_seconds_count{attestor="unix"} 7
durward_attestation_failures_total{attestor="unix",reason="gone"} 1
durward_server_calls_total{method="AttestAgent",code="OK"} 1
durward_server_calls_total{method="RenewAgent",code="PermissionDenied"} 1
durward_server_sync_duration_seconds_sum{result="error"} 2
durward_server_sync_duration_seconds_count{result="error"} 1
durward_server_sync_duration_seconds_count{result="ok"} 0
durward_agent_svid_left_seconds NaN
durward_entries 12
durward_x509_svids{state="cached"} 11
durward_x509_svids{state="active"} 10
durward_bundle_authorities{kind="x509"} 2
durward_federated_bundles 1
"#;
        let mut text = own.to_owned();
        SpireNames::new(&settings, "example.org", Some("x509pop")).write(&mut text);
        for line in [
            r#"spire_agent_rpc_workload_api_fetch_x509svid{status="OK"} 3"#,
            r#"spire_agent_rpc_workload_api_fetch_jwtsvid{status="PermissionDenied"} 2"#,
            "spire_agent_rpc_workload_api_fetch_jwtsvid_elapsed_time_sum 250",
            "spire_agent_rpc_workload_api_fetch_jwtsvid_elapsed_time_count 2",
            "# TYPE spire_agent_rpc_workload_api_fetch_jwtsvid_elapsed_time summary",
            "spire_agent_workload_api_connection 9",
            "spire_agent_workload_api_connections 4",
            r#"spire_agent_workload_api_rate_limit_exceeded{method="_SpiffeWorkloadAPI_FetchJWTSVID"} 6"#,
            r#"spire_agent_workload_api_workload_attestor{attestor="unix",status="OK"} 7"#,
            r#"spire_agent_workload_api_workload_attestor{attestor="unix",status="Internal"} 1"#,
            r#"spire_agent_node_attestor_new_svid{attestor="x509pop",status="OK"} 1"#,
            r#"spire_agent_agent_svid_rotate{status="PermissionDenied"} 1"#,
            r#"spire_agent_manager_sync_fetch_entries_updates{status="Unavailable"} 1"#,
            r#"spire_agent_manager_sync_fetch_entries_updates_elapsed_time_sum{status="Unavailable"} 2000"#,
            "spire_agent_sync_entries_total 12",
            "spire_agent_lru_cache_svid_map_size 11",
            "spire_agent_sync_bundles_total 2",
        ] {
            assert!(text.lines().any(|got| got == line), "{line} in:\n{text}");
        }
        assert!(text.starts_with(own), "its own stay");
        for nothing in ["status=\"Canceled\"", "bootstrapped", "_bucket{status"] {
            assert!(!text.contains(&format!("spire_agent{nothing}")), "{nothing} in:\n{text}");
        }
        assert!(!text.contains("fetch_x509svid{status=\"Canceled\"}"), "nothing of what has not been");
    }

    #[test]
    fn labels_that_every_series_has_are_asked_for() {
        let settings =
            SpireNameSettings { prefix: "mine".to_owned(), trust_domain_label: true, ..Default::default() };
        let mut text = "durward_entries 1\n".to_owned();
        SpireNames::new(&settings, "example.org", None).write(&mut text);
        let host = host();
        let want = format!("mine_sync_entries_total{{host=\"{host}\",trust_domain=\"example_org\"}} 1");
        assert!(text.lines().any(|got| got == want), "{want} in:\n{text}");
        assert!(text.contains("trust_domain_id=\"example_org\""), "{text}");
    }
}
