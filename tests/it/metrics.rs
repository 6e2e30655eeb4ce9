//! What a scrape looks like: the rules of Prometheus' exposition format and naming, checked over every series.
//!
//! `promtool` says the same and more; CI asks it about a running agent. This holds without it.

use std::collections::{BTreeMap, BTreeSet};

use durward::api::proto::workload::X509BundlesRequest;

use crate::support::{TestAgent, entry, request};

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

/// What Prometheus keeps of each node of a large cluster, before anybody has called.
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
