//! A reload is all or nothing, whatever it fails at.

use std::time::Duration;

use durward::{
    api::proto::workload as pb,
    config::Config,
    telemetry::{LogSettings, log::Log},
};
use tracing::{Dispatch, Level, dispatcher::with_default};

use crate::support::{TestAgent, entry, load, request, write_config};

/// What a reload is to bring, besides what makes it fail: a finer log, other times, another entry.
fn wanted(agent: &TestAgent, more: &str) -> Config {
    write_config(agent.dir.path(), &[&entry("/web", ""), &entry("/web2", ""), more].concat());
    let mut next = load(agent.dir.path()).unwrap();
    next.log.level = Level::DEBUG;
    next.listener.drain_timeout += Duration::from_secs(1);
    next
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_fails_changes_nothing() {
    let mut agent = TestAgent::start(&entry("/web", ""));
    let path = agent.dir.path().join("agent.log");
    let (subscriber, log) =
        Log::build(&LogSettings { level: Level::INFO, file: Some(path.clone()), ..LogSettings::default() })
            .unwrap();
    let dispatch = Dispatch::new(subscriber);
    agent.running = agent.running.logging(log.clone());
    let before = agent.running.config().clone();
    let elsewhere = agent.dir.path().join("elsewhere");
    for (case, more, data_dir) in [
        ("what needs a restart", "", elsewhere),
        (
            "more than the node has",
            "ratelimit { gate { connections = 1000000 } }",
            before.agent.data_dir.clone(),
        ),
    ] {
        let mut next = wanted(&agent, more);
        next.agent.data_dir = data_dir;
        agent.running.reload(next).expect_err(case);
        assert_eq!(*agent.running.config(), before, "{case}");
        assert_eq!(served(&agent).await, 1, "{case}");
    }
    with_default(&dispatch, || tracing::debug!(target: "durward", "too fine"));
    let next = wanted(&agent, "");
    agent.running.reload(next.clone()).unwrap();
    assert_eq!(*agent.running.config(), next);
    assert_eq!(served(&agent).await, 2);
    with_default(&dispatch, || tracing::debug!(target: "durward", "as fine as wanted"));
    assert!(log.flush(Duration::from_secs(60)));
    let lines = std::fs::read_to_string(path).unwrap();
    assert!(lines.contains("as fine as wanted") && !lines.contains("too fine"), "{lines}");
}

/// How many X.509-SVIDs this process gets.
async fn served(agent: &TestAgent) -> usize {
    let mut client = agent.client().await;
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    stream.message().await.unwrap().unwrap().svids.len()
}
