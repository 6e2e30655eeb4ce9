//! Answers per second: FetchJWTSVID from the cache, and the first message of FetchX509SVID, on kept connections and with a
//! new one per call, against the floor. Agent and floor take turns, so that a noisy machine is noisy for both.
//!
//! `cargo bench --bench throughput`. `DURWARD_BIN` is another agent.

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

use support::{Client, JWT, Server, X509, floor_process, jwt_request, median, row};

const ROUND: Duration = Duration::from_secs(1);
const ROUNDS: usize = 7;

#[derive(Clone, Copy)]
enum Connections {
    Kept,
    NewEach,
}

/// Calls per second, and processor time of the server per call in microseconds.
async fn measure(
    server: &Server,
    path: &'static str,
    in_flight: usize,
    connections: Connections,
) -> (f64, f64) {
    let mut clients = Vec::new();
    // A connection carries at most 16 calls at once.
    for _ in 0..in_flight.div_ceil(16) {
        clients.push(Client::connect(&server.socket()).await);
    }
    let message = if path == JWT { jwt_request("a") } else { bytes::Bytes::new() };
    let (cpu, started) = (server.cpu(), Instant::now());
    let workers: Vec<_> = (0..in_flight)
        .map(|n| {
            let mut client = clients[n % clients.len()].clone();
            let (socket, message) = (server.socket(), message.clone());
            tokio::spawn(async move {
                let mut calls = 0_u32;
                while started.elapsed() < ROUND {
                    if let Connections::NewEach = connections {
                        client = Client::connect(&socket).await;
                    }
                    if path == JWT {
                        client.call(path, &message).await;
                    } else {
                        client.first_message(path, &message).await;
                    }
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    let mut calls = 0;
    for worker in workers {
        calls += worker.await.expect("a worker");
    }
    let took = started.elapsed().as_secs_f64();
    let cpu = (server.cpu() - cpu).as_secs_f64();
    (f64::from(calls) / took, cpu * 1e6 / f64::from(calls))
}

fn main() {
    floor_process();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let agent = Server::agent("").await;
        let floor = Server::floor(&agent).await;
        let head = [
            "call",
            "connections",
            "in flight",
            "durward /s",
            "floor /s",
            "ratio",
            "CPU us",
            "floor CPU us",
            "target",
        ];
        row(&head.map(str::to_owned));
        row(&head.map(|_| "---".to_owned()));
        let cases = [(JWT, "FetchJWTSVID, cached"), (X509, "FetchX509SVID, first message")];
        for (path, name) in cases {
            for (connections, kind, target, flights) in [
                (Connections::Kept, "kept", "0.85", &[1, 16, 64][..]),
                (Connections::NewEach, "new", "0.80", &[1, 8][..]),
            ] {
                for in_flight in flights {
                    let (mut ours, mut theirs, mut ratios, mut cpu, mut floor_cpu) =
                        (vec![], vec![], vec![], vec![], vec![]);
                    for _ in 0..ROUNDS {
                        let (a, a_cpu) = measure(&agent, path, *in_flight, connections).await;
                        let (b, b_cpu) = measure(&floor, path, *in_flight, connections).await;
                        ours.push(a);
                        theirs.push(b);
                        ratios.push(a / b);
                        cpu.push(a_cpu);
                        floor_cpu.push(b_cpu);
                    }
                    row(&[
                        name.to_owned(),
                        kind.to_owned(),
                        in_flight.to_string(),
                        format!("{:.0}", median(ours)),
                        format!("{:.0}", median(theirs)),
                        format!("**{:.2}**", median(ratios)),
                        format!("{:.1}", median(cpu)),
                        format!("{:.1}", median(floor_cpu)),
                        target.to_owned(),
                    ]);
                }
            }
        }
    });
}
