//! Durward and spire-agent at one real SPIRE Server, in turns: memory, start, new entries, processor time.
//!
//! `cargo bench --bench upstream`. Needs spire-server and spire-agent 1.15.3, which `tests/interop/spire.sh` leaves in the user's
//! cache, and python3. In the environment:
//!
//! | variable | what | default |
//! |---|---|---|
//! | `DURWARD_UPSTREAM_SPIRE` | where the two are | `~/.cache/durward/spire-1.15.3` |
//! | `DURWARD_UPSTREAM_ENTRIES` | how many entries there are, one number after the other | `1,10000,100000` |
//! | `DURWARD_UPSTREAM_ROUNDS` | how often starts and entries are timed | 5 |
//! | `DURWARD_UPSTREAM_QUIET` | seconds in which nothing happens | 60 |
//! | `DURWARD_UPSTREAM_AUTHORITY` | set: a CA above the server's, so that each SVID has an intermediate | |
//! | `DURWARD_BIN` | another agent | this one |
//!
//! Both have the same configuration, keep their own data from turn to turn, and are asked for their metrics. The server looks at
//! its datastore each second (`cache_reload_interval`), where it would every five. Up to 10,000 SVIDs are made ahead, and where
//! there are more entries, 1,000.
//!
//! "Restart" is from the start of the process to the first SVID, with the agent's own SVID on the disk. "New entry" is from the
//! end of `spire-server entry create` to the SVID of a workload that had none and waits: in its call where the agent keeps it
//! waiting, and else with another call every 20 ms.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::exit,
    clippy::as_conversions,
    reason = "a bench, not the agent"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "a part of what benches share is used")]

mod spire;
mod support;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use durward::api::proto::workload::{X509svidRequest, spiffe_workload_api_client::SpiffeWorkloadApiClient};
use hyper_util::rt::TokioIo;
use spire::{Contender, SpireServer, free_port};
use support::{Server, median, row};
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};

/// How long anything is waited for.
const PATIENCE: Duration = Duration::from_secs(180);

/// Between two entries that are waited for.
const REST: Duration = Duration::from_secs(30);

/// More entries than this have no SVID made ahead, but for [`MADE`].
const MOST_MADE: u64 = 10_000;
const MADE: u64 = 1_000;

fn setting(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn number(name: &str, default: &str) -> u64 {
    setting(name, default).parse().expect("a number")
}

/// An agent between two of its turns.
struct Turns {
    of: Contender,
    data: tempfile::TempDir,
    token: String,
}

impl Turns {
    fn new(of: Contender, server: &SpireServer) -> Self {
        Self { of, data: tempfile::tempdir().expect("a directory"), token: server.token() }
    }

    fn command(&self, server: &SpireServer, dir: &Path, metrics: u16, made: u64) -> Command {
        let (at, data, of_server) = (dir.display(), self.data.path().display(), server.dir.path().display());
        let text = format!(
            r#"agent {{
  trust_domain = "example.org" server_address = "127.0.0.1" server_port = "{}" trust_bundle_path = "{of_server}/roots.pem"
  data_dir = "{data}" socket_path = "{at}/api.sock" log_level = "WARN" x509_svid_cache_max_size = {made}
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{ }} }}
  KeyManager "disk" {{ plugin_data {{ directory = "{data}" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{ }} }}
}}
telemetry {{ Prometheus {{ host = "127.0.0.1" port = {metrics} }} EnableHostnameLabel = false }}
"#,
            server.port
        );
        std::fs::write(dir.join("agent.conf"), text).expect("written");
        let mut command = Command::new(self.of.binary(server));
        command
            .args(["run", "-config"])
            .arg(dir.join("agent.conf"))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if !self.data.path().join("agent-data.json").exists() {
            command.args(["-joinToken", &self.token]);
        }
        command.stderr(Stdio::null());
        command
    }

    async fn turn(&self, server: &SpireServer, made: u64) -> Turn {
        let (metrics, began) = (free_port(), Instant::now());
        let agent = Server::start(self.of.name(), |dir| self.command(server, dir, metrics, made)).await;
        Turn { agent, metrics, began }
    }
}

/// An agent that runs.
struct Turn {
    agent: Server,
    metrics: u16,
    began: Instant,
}

impl Turn {
    /// How many X.509-SVIDs it has.
    fn made(&self) -> u64 {
        let scrape = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(("127.0.0.1", self.metrics))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        let text = scrape().unwrap_or_default();
        let names = ["spire_agent_lru_cache_svid_map_size", "durward_x509_svids{state=\"cached\"}"];
        let line = text.lines().find(|line| names.iter().any(|name| line.starts_with(name)));
        let count = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        count.map_or(0, |count| count as u64)
    }

    async fn until_made(&self, count: u64) -> Duration {
        while self.made() < count {
            assert!(self.began.elapsed() < PATIENCE, "{} of {count} made", self.made());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        self.began.elapsed()
    }

    /// The first SVID of a workload of this user, however often it has to ask.
    async fn first_svid(&self) {
        let began = Instant::now();
        while !self.has_svid().await {
            assert!(began.elapsed() < PATIENCE, "no SVID");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn has_svid(&self) -> bool {
        let socket: Arc<Path> = self.agent.socket().into();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = Arc::clone(&socket);
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let Ok(channel) = endpoint.connect_with_connector(connector).await else { return false };
        let mut request = tonic::Request::new(X509svidRequest {});
        request.metadata_mut().insert("workload.spiffe.io", "true".parse().expect("a value"));
        let Ok(stream) = SpiffeWorkloadApiClient::new(channel).fetch_x509svid(request).await else {
            return false;
        };
        stream.into_inner().message().await.is_ok_and(|message| message.is_some())
    }
}

/// What was measured of one, by what it is called.
type Figures = Vec<(String, f64)>;

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// Memory and a quiet while, with so many entries.
async fn at_rest(contender: &Turns, server: &SpireServer, entries: u64) -> Figures {
    let made = if entries > MOST_MADE { MADE } else { entries.max(1) };
    let turn = contender.turn(server, made).await;
    turn.first_svid().await;
    let all = turn.until_made(made).await;
    // What only the making of them took is given back, or is not.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let quiet = Duration::from_secs(number("DURWARD_UPSTREAM_QUIET", "60"));
    let before = turn.agent.cpu();
    tokio::time::sleep(quiet).await;
    let burnt = (turn.agent.cpu() - before).as_secs_f64() * 60.0 / quiet.as_secs_f64();
    let what = |what: &str| format!("{entries} entries, {made} made: {what}");
    vec![
        (what("resident, MiB"), mib(turn.agent.resident())),
        (what("most resident, MiB"), mib(turn.agent.memory("VmHWM"))),
        (what("start to all made, s"), all.as_secs_f64()),
        (what("processor time of a quiet minute, ms"), burnt * 1e3),
    ]
}

async fn restart(contender: &Turns, server: &SpireServer) -> f64 {
    let turn = contender.turn(server, 1).await;
    turn.first_svid().await;
    turn.began.elapsed().as_secs_f64() * 1e3
}

/// Entries that are made while a workload waits for one.
async fn new_entries(contender: &Turns, server: &SpireServer, rounds: u64) -> Figures {
    let turn = contender.turn(server, 1).await;
    let mut took = Vec::new();
    for round in 0..rounds {
        // The last one is gone by then, and nobody has waited for a while.
        tokio::time::sleep(REST).await;
        let waits = async {
            turn.first_svid().await;
            Instant::now()
        };
        let makes = async {
            // It waits by then. Not at the same moment of a second each time.
            tokio::time::sleep(Duration::from_millis(1500 + 130 * round)).await;
            let id = tokio::task::block_in_place(|| server.entry(&format!("new-{round}")));
            (id, Instant::now())
        };
        let (there, (id, created)) = tokio::join!(waits, makes);
        took.push(there.saturating_duration_since(created).as_secs_f64() * 1e3);
        server.delete(&id);
    }
    let most = took.iter().copied().fold(0.0, f64::max);
    vec![
        ("new entry to SVID, median, ms".to_owned(), median(took)),
        ("new entry to SVID, longest, ms".to_owned(), most),
    ]
}

fn compare(spire: &Figures, durward: &Figures) {
    for ((what, theirs), (_, ours)) in spire.iter().zip(durward) {
        row(&[what.clone(), format!("{theirs:.1}"), format!("{ours:.1}"), format!("{:.2}", ours / theirs)]);
    }
}

async fn bench() {
    let rounds = number("DURWARD_UPSTREAM_ROUNDS", "5");
    let mut server = SpireServer::start();
    let (spire, durward) = (Turns::new(Contender::Spire, &server), Turns::new(Contender::Durward, &server));
    row(&["", "spire-agent", "durward", "ratio"].map(str::to_owned));
    row(&["---"; 4].map(str::to_owned));
    let own = server.entry("bench");
    let mut restarts = [Vec::new(), Vec::new()];
    // The first start of each attests.
    for round in 0..=rounds {
        for (contender, took) in [&spire, &durward].into_iter().zip(&mut restarts) {
            let restarted = restart(contender, &server).await;
            if round > 0 {
                took.push(restarted);
            }
        }
    }
    let [theirs, ours] = restarts.map(|took| vec![("restart to SVID, median, ms".to_owned(), median(took))]);
    compare(&theirs, &ours);
    server.delete(&own);
    compare(&new_entries(&spire, &server, rounds).await, &new_entries(&durward, &server, rounds).await);
    server.entry("bench");
    for count in setting("DURWARD_UPSTREAM_ENTRIES", "1,10000,100000").split(',') {
        let count: u64 = count.trim().parse().expect("a number");
        // One is the bench's own.
        server.has(count.saturating_sub(1).max(1));
        compare(&at_rest(&spire, &server, count).await, &at_rest(&durward, &server, count).await);
    }
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(bench());
}
