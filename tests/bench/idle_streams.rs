//! What an idle FetchX509SVID stream costs, one per connection, against the floor's; and how long it takes until all of them
//! have a new SVID.
//!
//! `cargo bench --bench idle_streams`

#![allow(
    clippy::allow_attributes,
    clippy::as_conversions,
    clippy::disallowed_methods,
    clippy::exit,
    clippy::indexing_slicing,
    dead_code,
    reason = "a bench, not the agent; each uses a part of support"
)]

mod support;

use std::time::{Duration, Instant};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::{Signal, kill},
};
use support::{Client, NO_LIMITS, Server, X509, floor_process, row, write_config};
use tokio::task::JoinSet;

async fn open(server: &Server, count: usize) -> Vec<h2::RecvStream> {
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        let mut body = Client::connect(&server.socket()).await.open(X509, b"").await;
        let data = body.data().await.expect("a message").expect("data");
        body.flow_control().release_capacity(data.len()).expect("as much as was read");
        streams.push(body);
    }
    streams
}

fn main() {
    floor_process();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the hard limit");
    // The agent has two descriptors for each connection, and some for other uses.
    let most = usize::try_from(hard).expect("64 bits").saturating_sub(300) / 2;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let agent = Server::agent("").await;
        let floor = Server::floor(&agent).await;
        let head = [
            "streams",
            "durward KiB each",
            "floor KiB each",
            "ratio",
            "target",
            "all have the new SVID after",
            "target",
        ];
        row(&head.map(str::to_owned));
        row(&head.map(|_| "---".to_owned()));
        for count in [1_000, 10_000.min(most)] {
            let mut each = Vec::new();
            let mut pushed = Duration::ZERO;
            for server in [&agent, &floor] {
                let before = server.resident();
                let streams = open(server, count).await;
                each.push((server.resident() - before) as f64 / count as f64);
                if server.name == "durward" {
                    pushed = push(server, streams).await;
                }
                // The memory of one round is given back before the next.
                tokio::time::sleep(Duration::from_secs(4)).await;
            }
            row(&[
                count.to_string(),
                format!("{:.1}", each[0]),
                format!("{:.1}", each[1]),
                format!("**{:.2}**", each[0] / each[1]),
                "1.30".to_owned(),
                format!("**{:.0} ms**", pushed.as_secs_f64() * 1e3),
                "1000 ms".to_owned(),
            ]);
        }
    });
}

/// Changes the entry, so that a new SVID is made, and waits until every stream has it.
async fn push(agent: &Server, streams: Vec<h2::RecvStream>) -> Duration {
    let mut waiting = JoinSet::new();
    for mut body in streams {
        waiting.spawn(async move {
            body.data().await.expect("a message").expect("data");
            Instant::now()
        });
    }
    static ROUND: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let round = ROUND.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let uid = nix::unistd::geteuid();
    let more =
        format!("entry \"spiffe://example.org/more{round}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}");
    write_config(agent.dir.path(), &more, NO_LIMITS);
    let told = Instant::now();
    kill(nix::unistd::Pid::from_raw(agent.pid().cast_signed()), Signal::SIGHUP).expect("a signal");
    let (mut first, mut last) = (None::<Instant>, told);
    while let Some(got) = waiting.join_next().await {
        let got = got.expect("a task");
        first = Some(first.map_or(got, |first| first.min(got)));
        last = last.max(got);
    }
    last - told
}
