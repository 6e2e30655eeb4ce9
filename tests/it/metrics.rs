//! What a scrape looks like: the rules of Prometheus' exposition format and naming, checked over every series.
//!
//! `promtool` says the same and more; CI asks it about a running agent. This holds without it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use durward::api::proto::workload::X509BundlesRequest;

use crate::support::{Process, TRUST_DOMAIN, TestAgent, entry, request};

/// What a running agent tells.
fn scraped() -> String {
    TestAgent::start(&entry("/web", "")).running.metrics().render()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_series_is_described_and_well_named() {
    let text = scraped();
    let mut help = BTreeSet::new();
    let mut kinds = BTreeMap::new();
    let mut families = BTreeSet::new();
    for line in text.lines().filter(|l| !l.is_empty()) {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, text) = rest.split_once(' ').expect("a name and a text");
            assert!(text.ends_with('.') && text.len() > 10, "help of {name}: {text}");
            assert!(help.insert(name), "{name} is described once");
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a name and a type");
            assert!(kinds.insert(name, kind).is_none(), "{name} has one type");
        } else {
            let name = line.split(['{', ' ']).next().expect("a name");
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|end| name.strip_suffix(end).filter(|base| kinds.get(base) == Some(&"histogram")))
                .unwrap_or(name);
            families.insert(family);
        }
    }
    assert!(families.len() > 40, "{families:?}");
    assert_eq!(families, help, "each has a help text");
    for (name, kind) in kinds {
        assert!(families.contains(name), "{name} is described but not there");
        assert!(name.starts_with("durward_") || name.starts_with("process_"), "{name}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
        assert!(["counter", "gauge", "histogram"].contains(&kind), "{name} is a {kind}");
        for scaled in ["_ms", "_milliseconds", "_us", "_kb", "_mb", "_minutes", "_percent"] {
            assert!(!name.ends_with(scaled), "{name} is not in base units");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn labels_come_from_closed_sets() {
    let text = scraped();
    let mut labels = BTreeSet::new();
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        if let Some((_, rest)) = line.split_once('{') {
            let (inside, _) = rest.rsplit_once('}').expect("closed braces");
            labels.extend(inside.split("\",").filter_map(|pair| Some(pair.split_once('=')?.0)));
        }
    }
    let known = [
        "attestor", "code", "key_type", "kind", "le", "method", "reason", "result", "stage", "state", "step",
        "version",
    ]
    .into_iter()
    .collect();
    assert_eq!(labels, known, "a new label must be a closed set of words that no caller chose");
}

/// The series that an agent of this configuration tells of over its socket, before anybody has called.
async fn idle(agent: &str, plugins: &str, rest: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let text = format!(
        "agent {{\n  trust_domain = \"{TRUST_DOMAIN}\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/api.sock\"\n  {agent}\n}}\n\
         plugins {{\n{plugins}\n}}\ntelemetry {{\n  Prometheus {{ socket_path = \"{at}/metrics.sock\" }}\n}}\n{rest}\n"
    );
    fs::write(dir.path().join("agent.conf"), text).unwrap();
    let mut agent = Process::spawn(dir.path());
    agent.serving(dir.path()).await;
    let mut stream = UnixStream::connect(dir.path().join("metrics.sock")).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    let (_, body) = said.split_once("\r\n\r\n").unwrap();
    body.lines().filter(|line| line.contains(' ') && !line.starts_with('#')).map(str::to_owned).collect()
}

/// What Prometheus keeps of each node of a large cluster, however it finds out who calls and whoever signs.
#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_idle_agent_has_few_series() {
    const EMBEDDED: &str = "issuer \"embedded\" { }";
    const UNIX: &str = "WorkloadAttestor \"unix\" { plugin_data { discover_workload_path = true } }\n";
    const K8S: &str = "WorkloadAttestor \"k8s\" { plugin_data { skip_kubelet_verification = true } }\n";
    const LABELS: &str = "WorkloadAttestor \"k8s\" { plugin_data { skip_kubelet_verification = true enable_namespace_labels = true api_server_address = \"127.0.0.1:1\" } }\n";
    const JOINS: &str = "server_address = \"127.0.0.1\"\n  server_port = 1\n  insecure_bootstrap = true\n  join_token = \"none\"";
    const NODE: &str =
        "NodeAttestor \"join_token\" { plugin_data { } }\nKeyManager \"memory\" { plugin_data { } }\n";
    for (case, agent, plugins, rest) in [
        ("unix", "", UNIX, EMBEDDED),
        ("k8s", "", K8S, EMBEDDED),
        ("k8s with labels of namespaces", "", LABELS, EMBEDDED),
        ("both", "", &*[UNIX, LABELS].concat(), EMBEDDED),
        ("unix, with a server", JOINS, &*[UNIX, NODE].concat(), ""),
        ("k8s, with a server", JOINS, &*[K8S, NODE].concat(), ""),
    ] {
        let series = idle(agent, plugins, rest).await;
        assert!((80..=150).contains(&series.len()), "{case}: {} {series:#?}", series.len());
        let there = |series_begin: &str| {
            series.iter().any(|line| line.starts_with(series_begin) && line.ends_with(" 0"))
        };
        for (attestor, is_on) in
            [("unix", plugins.contains("\"unix\"")), ("k8s", plugins.contains("\"k8s\""))]
        {
            let of_it = format!("durward_attestation_failures_total{{attestor=\"{attestor}\",");
            assert_eq!(there(&of_it), is_on, "{case}: {attestor} {series:#?}");
        }
        assert_eq!(there("durward_kubelet_requests_total"), plugins.contains("\"k8s\""), "{case}");
        let unavailable = "durward_server_calls_total{method=\"BatchNewX509SVID\",code=\"Unavailable\"}";
        assert_eq!(there(unavailable), rest.is_empty(), "{case}: {series:#?}");
    }
}

/// The same of an agent in this process; what tells of refusals and errors is there with 0.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_agent_has_few_series_and_its_refusals_from_the_start() {
    let agent = TestAgent::start(&entry("/web", ""));
    let text = String::from_utf8(agent.running.metrics().latest().to_vec()).unwrap();
    let series: Vec<&str> = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    assert!(series.len() <= 150, "{}: {series:#?}", series.len());
    let zero = |name: &str, labels: &[&str]| {
        series.iter().any(|line| {
            line.starts_with(&format!("{name}{{"))
                && line.ends_with(" 0")
                && labels.iter().all(|it| line.contains(it))
        })
    };
    for method in ["FetchX509SVID", "FetchJWTSVID", "ValidateJWTSVID", "FetchX509Bundles", "FetchJWTBundles"]
    {
        for code in ["PermissionDenied", "ResourceExhausted", "Unavailable", "Internal"] {
            if (method, code) == ("ValidateJWTSVID", "PermissionDenied") {
                // It takes no identity.
                continue;
            }
            let labels = [&*format!("method=\"{method}\""), &*format!("code=\"{code}\"")];
            assert!(zero("durward_calls_total", &labels), "{labels:?} {series:#?}");
        }
    }
    for (stage, reason) in [
        ("gate", "connections"),
        ("gate", "rate"),
        ("gate", "blocked"),
        ("caller", "rate"),
        ("caller", "in_flight"),
        ("caller", "blocked"),
        ("identity", "rate"),
        ("identity", "blocked"),
        ("node", "rate"),
        ("node", "in_flight"),
        ("node", "memory"),
        ("node", "connections"),
    ] {
        let labels = [&*format!("stage=\"{stage}\""), &*format!("reason=\"{reason}\"")];
        assert!(zero("durward_rate_limit_exceeded_total", &labels), "{labels:?} {series:#?}");
    }
    for name in [
        "durward_connections_refused_total",
        "durward_attestation_failures_total",
        "durward_signing_failures_total",
        "durward_reloads_total",
    ] {
        assert!(zero(name, &[]), "{name} {series:#?}");
    }

    // What was used is there, whole.
    let mut client = agent.client().await;
    client.fetch_x509_bundles(request(X509BundlesRequest {})).await.unwrap();
    let text = agent.running.metrics().render();
    assert!(text.contains("durward_rate_limit_allowed_total{method=\"FetchX509Bundles\""), "{text}");
}
