//! What a refusal costs the agent, beside a served call: calls and connections per second, processor time and memory.
//!
//! `cargo bench --bench refusal`
//!
//! There are two ways to refuse a connection at accept: to close it, or to wait for the first request and answer it with a
//! fixed gRPC status. The agent closes all but two of a user in two seconds, here at once: by default it does so a moment later, so that a client can be refused some
//! ten times a second, which says nothing of what one refusal costs. The other way is here as a prototype ([`answer`]), in a process of its own with the
//! agent's own gate, so that both can be compared in one run; all take turns.

#![allow(
    clippy::allow_attributes,
    clippy::as_conversions,
    clippy::disallowed_methods,
    clippy::exit,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::panic,
    dead_code,
    reason = "a bench, not the agent; it uses a part of support and of frames"
)]

#[path = "../it/frames.rs"]
mod frames;
mod support;

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use durward::{
    limits::{Gate, GatePlan, GateRule, GateRules, GateSettings, LimitSettings, Limits, rule::Limit},
    peer::{Arrival, OsUid},
    telemetry::registry::Registry,
};
use frames::{Called, END_HEADERS, END_STREAM, FETCH_JWT, HEADERS, PREFACE, SETTINGS, call, frame, literal};
use support::{Server, floor_process, median, row};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};

const ROUND: Duration = Duration::from_secs(1);
const ROUNDS: usize = 7;
/// Clients that call one after the other, each in a thread of its own.
const CLIENTS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(5);
/// Set for the prototype's process: its directory.
const ANSWER: &str = "DURWARD_BENCH_ANSWER";
/// Connections that the prototype answers at a time; it closes what is more.
const ANSWERED: u32 = 128;

/// The prototype's process ends here; any other goes on.
fn answering_process() {
    let Some(dir) = std::env::var_os(ANSWER).map(PathBuf::from) else { return };
    let settings = LimitSettings {
        gate: GateSettings {
            rules: GateRules::new(GateRule { rate: Some(Limit::Block), ..GateRule::default() }, vec![])
                .expect("one rule"),
            ..GateSettings::default()
        },
        ..LimitSettings::default()
    };
    let registry = Registry::new(&metrics::NoopRecorder);
    let limits = Limits::new(&settings, durward::os::clock::Clock::SYSTEM, registry);
    let gate = Gate::new(GatePlan::new(&settings, 20_000, 1 << 30).expect("a plan"), &limits);
    durward::agent::runtime().expect("a runtime").block_on(async {
        let listener = UnixListener::bind(dir.join("api.sock")).expect("a socket");
        let open = Arc::new(AtomicU32::new(0));
        loop {
            let (stream, _) = listener.accept().await.expect("a connection");
            let arrival = Arrival::at(&stream, &OsUid).expect("credentials");
            assert!(gate.open(arrival.caller()).is_err(), "nobody is let in");
            if open.fetch_add(1, Relaxed) >= ANSWERED {
                open.fetch_sub(1, Relaxed);
                continue;
            }
            let open = Arc::clone(&open);
            tokio::spawn(async move {
                drop(tokio::time::timeout(Duration::from_secs(1), answer(stream)).await);
                open.fetch_sub(1, Relaxed);
            });
        }
    });
    std::process::exit(0);
}

/// Answers the first request with a status: SETTINGS first, or some clients wait for it until their deadline; then whatever
/// comes before the first HEADERS, for its stream; then the fixed answer and GOAWAY.
async fn answer(mut stream: UnixStream) -> Option<()> {
    const GOAWAY: u8 = 7;
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.ok()?;
    let mut got = Vec::with_capacity(512);
    let asked = loop {
        if stream.read_buf(&mut got).await.ok()? == 0 || got.len() > 16 * 1024 {
            return None;
        }
        let mut rest = got.get(PREFACE.len()..).unwrap_or_default();
        let mut asked = None;
        while let Some((head, more)) = rest.split_first_chunk::<9>() {
            let [a, b, c, kind, _, id @ ..] = *head;
            if kind == HEADERS {
                asked = Some(u32::from_be_bytes(id));
                break;
            }
            let length = u32::from_be_bytes([0, a, b, c]) as usize;
            let Some(next) = more.get(length..) else { break };
            rest = next;
        }
        if let Some(asked) = asked {
            break asked;
        }
    };
    // 0x88 is `:status: 200` (RFC 7541, appendix A).
    let headers = [
        vec![0x88],
        literal("content-type", "application/grpc"),
        literal("grpc-status", "8"),
        literal("grpc-message", "rate limit exceeded"),
        literal("grpc-retry-pushback-ms", "1000"),
    ];
    let headers = frame(HEADERS, END_HEADERS | END_STREAM, asked, &headers.concat());
    let goaway = frame(GOAWAY, 0, 0, &[&asked.to_be_bytes()[..], &[0; 4]].concat());
    stream.write_all(&[headers, goaway].concat()).await.ok()?;
    stream.shutdown().await.ok()
}

/// What a round of calls gave.
struct Round {
    per_second: f64,
    /// Of the server, for each, in microseconds.
    cpu: f64,
}

/// Calls on new connections, one after the other in each thread, that must all end as `want`.
fn new_connections(server: &Server, want: Called) -> Round {
    let body = frames::jwt_request("a");
    let (cpu, started) = (server.cpu(), Instant::now());
    let calls: u32 = std::thread::scope(|scope| {
        let one = || {
            let mut calls = 0_u32;
            while started.elapsed() < ROUND {
                let called = call(&server.socket(), FETCH_JWT, &body, PATIENCE);
                // Of those that are closed, the first are told why.
                let told = want == Called::Closed && called == Called::Refused;
                assert!(told || called == want, "{}: {called:?}", server.name);
                calls += 1;
            }
            calls
        };
        let threads: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|it| it.join().expect("a client")).sum()
    });
    round(server, cpu, started, calls)
}

/// Calls on one connection, 16 at a time, that must all end with this status.
async fn kept_connection(server: &Server, want: tonic::Code) -> Round {
    use durward::api::proto::workload::{self as pb, spiffe_workload_api_client::SpiffeWorkloadApiClient};
    let socket: Arc<Path> = server.socket().into();
    let channel = tonic::transport::Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: tonic::transport::Uri| {
            let socket = Arc::clone(&socket);
            async move { UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        }))
        .await
        .expect("a channel");
    let (cpu, started) = (server.cpu(), Instant::now());
    let workers: Vec<_> = (0..16)
        .map(|_| {
            let mut client = SpiffeWorkloadApiClient::new(channel.clone());
            tokio::spawn(async move {
                let mut calls = 0_u32;
                while started.elapsed() < ROUND {
                    let message = pb::JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() };
                    let mut request = tonic::Request::new(message);
                    request.metadata_mut().insert("workload.spiffe.io", "true".parse().expect("ascii"));
                    let code =
                        client.fetch_jwtsvid(request).await.map_or_else(|it| it.code(), |_| tonic::Code::Ok);
                    assert_eq!(code, want);
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
    round(server, cpu, started, calls)
}

fn round(server: &Server, cpu: Duration, started: Instant, calls: u32) -> Round {
    let took = started.elapsed().as_secs_f64();
    let cpu = (server.cpu() - cpu).as_secs_f64();
    Round { per_second: f64::from(calls) / took, cpu: cpu * 1e6 / f64::from(calls) }
}

/// The agent with this in place of the benches' `ratelimit`.
async fn agent(name: &'static str, ratelimit: &str) -> Server {
    let mut server = Server::agent_with("", ratelimit).await;
    server.name = name;
    server
}

fn main() {
    floor_process();
    answering_process();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let once = "rate = 1 per = \"day\" burst = 5";
    let open = "gate {\n caller { unlimited = true }\n }";
    let (served, gated, limited, answering) = runtime.block_on(async {
        (
            agent("served", &format!("{open} caller {{ unlimited = true }} identity {{ unlimited = true }} node {{ unlimited = true }}")).await,
            agent("refused at the gate", &format!("gate {{\n connection {{ linger = \"0\" }}\n caller {{ {once} }}\n }}")).await,
            agent("refused before attestation", &format!("{open} caller {{ {once} }}")).await,
            Server::start("refused with an answer", |dir| {
                let mut command = Command::new(std::env::current_exe().expect("this program"));
                command.env(ANSWER, dir).stdin(Stdio::null()).stdout(Stdio::null());
                command
            })
            .await,
        )
    });
    // What is left in the buckets.
    for (server, refused) in [(&gated, Called::Closed), (&limited, Called::Refused)] {
        while call(&server.socket(), FETCH_JWT, &frames::jwt_request("a"), PATIENCE) != refused {}
    }

    let head = ["what", "how", "per second", "of served", "CPU us each", "of served", "RSS at most, MiB"];
    row(&head.map(str::to_owned));
    row(&head.map(|_| "---".to_owned()));
    let cases = [
        (&served, "new connection each", "served"),
        (&gated, "new connection each", "refused at accept: closed (the agent's way)"),
        (&answering, "new connection each", "refused at accept: fixed answer (prototype)"),
        (&limited, "new connection each", "refused before attestation"),
        (&served, "kept connection", "served"),
        (&limited, "kept connection", "refused before attestation"),
    ];
    let mut all: Vec<Vec<Round>> = cases.iter().map(|_| Vec::new()).collect();
    for _ in 0..ROUNDS {
        for ((server, how, what), rounds) in cases.iter().zip(&mut all) {
            let is_served = *what == "served";
            rounds.push(if *how == "kept connection" {
                let code = if is_served { tonic::Code::Ok } else { tonic::Code::ResourceExhausted };
                runtime.block_on(kept_connection(server, code))
            } else {
                let want = match *what {
                    "served" => Called::Answered,
                    what if what.contains("closed") => Called::Closed,
                    _ => Called::Refused,
                };
                new_connections(server, want)
            });
        }
    }
    let mut served = (0.0, 0.0);
    for ((server, how, what), rounds) in cases.iter().zip(&all) {
        let rate = median(rounds.iter().map(|it| it.per_second).collect());
        let cpu = median(rounds.iter().map(|it| it.cpu).collect());
        if *what == "served" {
            served = (rate, cpu);
        }
        row(&[
            (*what).to_owned(),
            (*how).to_owned(),
            format!("{rate:.0}"),
            format!("{:.2}", rate / served.0),
            format!("{cpu:.1}"),
            format!("{:.2}", cpu / served.1),
            format!("{:.1}", server.memory("VmHWM") as f64 / 1024.0),
        ]);
    }
}
