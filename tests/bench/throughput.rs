//! Answers per second: FetchJWTSVID from the cache, and the first message of FetchX509SVID, on kept connections and with a
//! new one per call, against the floor. Agent and floor take turns, so that a noisy machine is noisy for both.
//!
//! `cargo bench --bench throughput [-- jwt|x509|kept|new|awake ..]`. `DURWARD_BIN` is another agent, and `DURWARD_BESIDE` one that takes
//! its turns too: an older one, say. With `awake` the processors never halt: a program of idle priority spins on each, by
//! `chrt` of util-linux. In a virtual machine a processor takes many times longer to come back than a call takes, and which of
//! two programs it sleeps in more often is chance.

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
    num::NonZero,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use nix::unistd::getppid;
use support::{Child, Client, JWT, NO_LIMITS, Server, X509, floor_process, jwt_request, median, row};

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

/// A call, its path, and what it is called in an argument.
const CALLS: [(&str, &str, &str); 2] =
    [(JWT, "FetchJWTSVID, cached", "jwt"), (X509, "FetchX509SVID, first message", "x509")];
const KINDS: [(Connections, &str, &str, &[usize]); 2] =
    [(Connections::Kept, "kept", "0.85", &[1, 16, 64]), (Connections::NewEach, "new", "0.80", &[1, 8])];

/// One after the other, so that a noisy machine is noisy for all: calls per second, and microseconds of each.
async fn in_turns(
    servers: &[&Server],
    path: &'static str,
    in_flight: usize,
    connections: Connections,
) -> Vec<Vec<(f64, f64)>> {
    let mut all = vec![Vec::new(); servers.len()];
    for _ in 0..ROUNDS {
        for (server, rounds) in servers.iter().zip(&mut all) {
            rounds.push(measure(server, path, in_flight, connections).await);
        }
    }
    all
}

/// Set for those who keep a processor awake: the process that they do it for.
const AWAKE_FOR: &str = "DURWARD_BENCH_AWAKE_FOR";

/// One for each processor. They end with this process, however it ends.
fn keep_awake() -> Vec<Child> {
    let one = |_| {
        let spinning = Command::new("chrt")
            .args(["--idle", "0"])
            .arg(std::env::current_exe().expect("this program"))
            .env(AWAKE_FOR, std::process::id().to_string())
            .stdin(Stdio::null())
            .spawn();
        Child(spinning.expect("chrt, of util-linux"))
    };
    (0..std::thread::available_parallelism().map_or(1, NonZero::get)).map(one).collect()
}

/// The process of one of them ends here; any other goes on.
fn spin_if_told() {
    let Ok(told) = std::env::var(AWAKE_FOR) else { return };
    while getppid().to_string() == told {
        let looked = Instant::now();
        while looked.elapsed() < ROUND {}
    }
    std::process::exit(0);
}

/// The median of the ratios of rounds that came one after the other.
fn ratio(ours: &[(f64, f64)], theirs: &[(f64, f64)]) -> String {
    let ratios = ours.iter().zip(theirs).map(|((ours, _), (theirs, _))| ours / theirs).collect();
    format!("**{:.2}**", median(ratios))
}

fn main() {
    floor_process();
    spin_if_told();
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_asked = |names: [&str; 2]| {
        let of = |all: &[&str]| !asked.iter().any(|it| all.contains(&it.as_str()));
        names
            .iter()
            .zip([["jwt", "x509"], ["kept", "new"]])
            .all(|(name, all)| of(&all) || asked.iter().any(|it| it == name))
    };
    let _awake = asked.iter().any(|it| it == "awake").then(keep_awake);
    let beside = std::env::var_os("DURWARD_BESIDE").map(PathBuf::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let agent = Server::agent("").await;
        let floor = Server::floor(&agent).await;
        let other = match &beside {
            Some(binary) => Some(Server::program(binary, "", NO_LIMITS).await),
            None => None,
        };
        let servers: Vec<&Server> =
            [Some(&agent), Some(&floor), other.as_ref()].into_iter().flatten().collect();
        let mut head = vec![
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
        if other.is_some() {
            head.extend(["other /s", "ratio", "other CPU us"]);
        }
        let cells = |cells: &[&str]| cells.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
        row(&cells(&head));
        row(&vec!["---".to_owned(); head.len()]);
        for (path, name, call) in CALLS {
            for (connections, kind, target, flights) in KINDS {
                for in_flight in flights.iter().filter(|_| is_asked([call, kind])) {
                    let seen = in_turns(&servers, path, *in_flight, connections).await;
                    let rate = |at: usize| format!("{:.0}", median(seen[at].iter().map(|it| it.0).collect()));
                    let cpu = |at: usize| format!("{:.1}", median(seen[at].iter().map(|it| it.1).collect()));
                    let mut line = cells(&[name, kind, &in_flight.to_string(), &rate(0), &rate(1)]);
                    line.extend([ratio(&seen[0], &seen[1]), cpu(0), cpu(1), target.to_owned()]);
                    if seen.len() > 2 {
                        line.extend([rate(2), ratio(&seen[0], &seen[2]), cpu(2)]);
                    }
                    row(&line);
                }
            }
        }
    });
}
