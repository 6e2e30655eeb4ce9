//! JWT-SVIDs that have to be signed: FetchJWTSVID with an audience never seen before, against bare ES256 signatures on the same
//! processors (as many threads as the agent has workers, each signing in a loop).
//!
//! `cargo bench --bench mint`

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

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use support::{Client, JWT, Server, floor_process, jwt_request, median, row};

const ROUND: Duration = Duration::from_secs(1);
const ROUNDS: usize = 7;
const IN_FLIGHT: usize = 32;

async fn minted(server: &Server, round: usize) -> (f64, f64) {
    let mut clients = Vec::new();
    for _ in 0..IN_FLIGHT / 16 {
        clients.push(Client::connect(&server.socket()).await);
    }
    let (cpu, started) = (server.cpu(), Instant::now());
    let workers: Vec<_> = (0..IN_FLIGHT)
        .map(|n| {
            let mut client = clients[n % clients.len()].clone();
            tokio::spawn(async move {
                let mut calls = 0_u32;
                while started.elapsed() < ROUND {
                    client.call(JWT, &jwt_request(&format!("{round}/{n}/{calls}"))).await;
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
    let per_second = f64::from(calls) / started.elapsed().as_secs_f64();
    (per_second, f64::from(calls) / (server.cpu() - cpu).as_secs_f64())
}

/// Signatures per second of processor time, and per second on `threads` threads.
fn bare(threads: usize) -> (f64, f64) {
    let workers: Vec<_> = (0..threads)
        .map(|_| {
            std::thread::spawn(|| {
                let random = SystemRandom::new();
                let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).expect("a key");
                let message = [7; 220];
                let cpu = || {
                    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("its own time");
                    text.split(' ').next().and_then(|n| n.parse::<f64>().ok()).expect("a number") / 1e9
                };
                let (started, before) = (Instant::now(), cpu());
                let mut count = 0_u32;
                while started.elapsed() < ROUND {
                    std::hint::black_box(key.sign(&random, &message).expect("a signature"));
                    count += 1;
                }
                (f64::from(count) / started.elapsed().as_secs_f64(), f64::from(count) / (cpu() - before))
            })
        })
        .collect();
    let rates: Vec<(f64, f64)> = workers.into_iter().map(|worker| worker.join().expect("a thread")).collect();
    let sum = |part: fn(&(f64, f64)) -> f64| rates.iter().map(part).sum::<f64>();
    (sum(|(wall, _)| *wall), sum(|(_, cpu)| *cpu) / f64::from(u32::try_from(threads).expect("few")))
}

fn main() {
    floor_process();
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let agent = Server::agent("").await;
        let (mut wall, mut cpu, mut bare_wall, mut bare_cpu) = (vec![], vec![], vec![], vec![]);
        for round in 0..ROUNDS {
            let (a, a_cpu) = minted(&agent, round).await;
            let (b, b_cpu) = bare(threads);
            wall.push(a);
            cpu.push(a_cpu);
            bare_wall.push(b);
            bare_cpu.push(b_cpu);
        }
        let (cpu, bare_cpu) = (median(cpu), median(bare_cpu));
        let head = ["", "JWT-SVIDs", "bare ES256", "ratio", "target"];
        row(&head.map(str::to_owned));
        row(&head.map(|_| "---".to_owned()));
        row(&[
            "per second of the server's processor time".to_owned(),
            format!("{cpu:.0}"),
            format!("{bare_cpu:.0}"),
            format!("**{:.2}**", cpu / bare_cpu),
            "0.60".to_owned(),
        ]);
        let (wall, bare_wall) = (median(wall), median(bare_wall));
        row(&[
            format!("per second, the client on the same {threads} processors"),
            format!("{wall:.0}"),
            format!("{bare_wall:.0}"),
            format!("{:.2}", wall / bare_wall),
            "-".to_owned(),
        ]);
    });
}
