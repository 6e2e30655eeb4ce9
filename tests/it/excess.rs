//! A SPIRE Server that says too much: what is within bounds is served, what is not changes nothing, and both are told.

use std::collections::BTreeSet;

use durward::issuer::server::proto::types;

use crate::{
    joining::{directory, until},
    outages::{gives, log, server_and_config},
    spire_server::entry,
    support::Process,
};

/// An entry whose workload is said to be of so many users.
fn asking(name: &str, selectors: usize) -> types::Entry {
    let selector =
        |n: usize| types::Selector { r#type: "unix".to_owned(), value: format!("uid:{}", 1_000_000 + n) };
    let mut entry = entry(name);
    entry.selectors.extend((1..selectors).map(selector));
    entry
}

fn federating(name: &str, others: impl IntoIterator<Item = String>) -> types::Entry {
    types::Entry { federates_with: others.into_iter().collect(), ..entry(name) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_is_too_long_is_not_given_and_holds_up_no_other() {
    let dir = directory();
    let server = server_and_config(dir.path(), "").await;
    server.course().chain = 16;
    server.course().entries = vec![entry("long"), entry("web")];
    let _agent = Process::spawn(dir.path());
    let socket = dir.path().join("api.sock");
    gives(&socket, &["long", "web"]).await;

    server.course().chain = 17;
    server.course().entries = vec![entry("longer"), entry("long"), entry("web")];
    server.course().entries[0].spiffe_id.as_mut().unwrap().path = "/long/er".to_owned();
    until("told", || log(dir.path()).contains("the chain must have 1 to 16 certificates")).await;
    server.course().entries.remove(0);
    gives(&socket, &["long", "web"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bundles_are_kept_of_a_thousand_trust_domains() {
    let dir = directory();
    let server = server_and_config(dir.path(), "").await;
    let names = |from: usize| (from..from + 600).map(|n| format!("x{n:04}.org"));
    // No entry has too many; together they have 1,201.
    server.course().entries =
        vec![federating("a", names(0).chain(["good.org".to_owned()])), federating("b", names(600))];
    let _agent = Process::spawn(dir.path());
    gives(&dir.path().join("api.sock"), &["a", "b"]).await;
    until("a thousand were asked for", || server.course().federated.len() >= 1000).await;
    let before = server.course().syncs;
    until("another sync", || server.course().syncs > before + 1).await;
    let asked = server.course().federated.clone();
    let first: BTreeSet<String> = ["good.org".to_owned()].into_iter().chain(names(0)).collect();
    assert!(asked.len() == 1000 && asked.is_superset(&first), "{}", asked.len());
    assert!(
        log(dir.path()).contains("more trust domains than the agent keeps bundles of"),
        "{}",
        log(dir.path())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_entries_with_one_id_the_first_is_one() {
    let dir = directory();
    let server = server_and_config(dir.path(), "").await;
    let second = types::Entry {
        spiffe_id: Some(types::Spiffeid {
            trust_domain: "example.org".to_owned(),
            path: "/second".to_owned(),
        }),
        ..entry("first")
    };
    server.course().entries = vec![entry("first"), second, entry("web")];
    let _agent = Process::spawn(dir.path());
    let socket = dir.path().join("api.sock");
    gives(&socket, &["first", "web"]).await;
    until("told", || log(dir.path()).contains("received malformed entries")).await;
    server.course().entries.remove(0);
    gives(&socket, &["second", "web"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_with_too_many_selectors_is_left_out_or_changes_nothing() {
    let dir = directory();
    let server = server_and_config(dir.path(), "").await;
    server.course().entries = vec![asking("many", 1025), entry("web")];
    let agent = Process::spawn(dir.path());
    let socket = dir.path().join("api.sock");
    gives(&socket, &["web"]).await;
    until("told", || log(dir.path()).contains("received malformed entries")).await;

    // An answer of more than 4 MiB is not read to its end.
    let before = agent.memory("VmHWM");
    server.course().entries = vec![asking("many", 1_000_000), entry("web"), entry("other")];
    until("refused", || log(dir.path()).contains("cannot sync")).await;
    gives(&socket, &["web"]).await;
    let grown = agent.memory("VmHWM").saturating_sub(before);
    assert!(grown < 20 * 1024, "{grown} KiB");
    server.course().entries.remove(0);
    gives(&socket, &["other", "web"]).await;
}
