//! 100,000 registration entries: the start, a reload, and whether finding a caller's own takes longer than with one.
//!
//! `cargo bench --bench entries`

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

use std::{
    fmt::Write as _,
    hint::black_box,
    time::{Duration, Instant},
};

use durward::{
    config::{Config, ExpandEnv},
    identity::{EntryIndex, Selector, Selectors},
};
use support::{Client, JWT, NO_LIMITS, Server, floor_process, jwt_request, row, write_config};

fn entries(count: usize) -> String {
    let mut text = String::new();
    for n in 0..count {
        writeln!(
            text,
            "entry \"spiffe://example.org/ns/{}/sa/{n}\" {{\n  selectors = [\"unix:uid:{}\", \"unix:gid:{}\"]\n}}",
            n % 500,
            100_000 + n,
            n % 100
        )
        .expect("written");
    }
    text
}

/// From the start of the process to the first answer.
async fn start(blocks: &str) -> (Duration, u64) {
    let began = Instant::now();
    let agent = Server::agent(blocks).await;
    Client::connect(&agent.socket()).await.call(JWT, &jwt_request("a")).await;
    let took = began.elapsed();
    tokio::time::sleep(Duration::from_secs(2)).await;
    (took, agent.resident())
}

fn main() {
    floor_process();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let head = [
            "entries",
            "start to first answer, ms",
            "resident, MiB",
            "read and check, ms",
            "index, ms",
            "find a caller's, ns",
        ];
        row(&head.map(str::to_owned));
        row(&head.map(|_| "---".to_owned()));
        for count in [1, 1_000, 100_000] {
            let blocks = entries(count);
            let (started, resident) = start(&blocks).await;

            let dir = tempfile::tempdir().expect("a directory");
            write_config(dir.path(), &blocks, NO_LIMITS);
            let began = Instant::now();
            let config = Config::load(&dir.path().join("agent.conf"), ExpandEnv::No).expect("a good file");
            let loaded = began.elapsed();
            let began = Instant::now();
            let index = EntryIndex::new(config.entries);
            let indexed = began.elapsed();

            let attested: Selectors =
                ["unix:uid:100000", "unix:gid:0", "unix:user:someone", "unix:group:some"]
                    .iter()
                    .map(|text| Selector::parse(text).expect("a selector"))
                    .collect();
            let (began, looks) = (Instant::now(), 200_000_u32);
            for _ in 0..looks {
                assert!(!black_box(index.matching(black_box(&attested), None)).is_empty(), "its own entry");
            }
            let found = began.elapsed().as_nanos() / u128::from(looks);
            row(&[
                count.to_string(),
                format!("{:.0}", started.as_secs_f64() * 1e3),
                format!("{:.1}", resident as f64 / 1024.0),
                format!("{:.1}", loaded.as_secs_f64() * 1e3),
                format!("{:.1}", indexed.as_secs_f64() * 1e3),
                found.to_string(),
            ]);
        }
    });
}
