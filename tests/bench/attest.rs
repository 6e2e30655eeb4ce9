//! Pods at Durward and at spire-agent, in turns: how long a call takes, and what all of them cost.
//!
//! `cargo bench --bench attest`, as root. Needs spire-server and spire-agent 1.15.3, which `tests/interop/spire.sh` leaves in the
//! user's cache. In the environment:
//!
//! | variable | what | default |
//! |---|---|---|
//! | `DURWARD_UPSTREAM_SPIRE` | where the two are | `~/.cache/durward/spire-1.15.3` |
//! | `DURWARD_ATTEST_PODS` | how many pods there are | 100 |
//! | `DURWARD_ATTEST_SECONDS` | for how long they call | 20 |
//! | `DURWARD_ATTEST_GAP` | milliseconds between two calls of a pod | 500 |
//! | `DURWARD_BIN` | another agent | this one |
//!
//! The kubelet is the bench's own: it lists as many pods as there are, of the length that real ones have, by TLS. The pods are
//! processes of the bench in cgroups that carry the UIDs and IDs that are listed. Each has one connection, on which it calls
//! FetchJWTSVID; they are of ten service accounts, each with an entry of a real SPIRE Server. Both agents have the same
//! configuration and ten seconds to get what the server has; processor time and requests are of the time of the calls alone.
//! The floor is a bare tonic server that answers the same calls with the same bytes, and asks nobody anything.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::exit,
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a bench, not the agent"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "a part of what benches share is used")]

#[path = "../it/frames.rs"]
mod frames;
#[path = "../it/kubelet.rs"]
mod kubelet;
#[path = "attest/pod.rs"]
mod pod;
mod process;
mod raw;
mod spire;
mod support;
mod wire;

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, PipeReader, PipeWriter},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use kubelet::{FakeKubelet, Reply, listed, usual_pod};
use pod::{Pod, PodCgroup, Saw};
use process::{Part as _, READY};
use spire::{Contender, SpireServer};
use support::{Server, floor_process, row};

/// As many as the pods are of.
const ACCOUNTS: u32 = 10;
/// How long an agent has before the pods come.
const SETTLED: Duration = Duration::from_secs(10);

fn setting(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn command(who: Contender, server: &SpireServer, kubelet: &FakeKubelet, dir: &Path) -> Command {
    let (at, of_server) = (dir.display(), server.dir.path().display());
    let text = format!(
        r#"agent {{
  trust_domain = "example.org" server_address = "127.0.0.1" server_port = "{}" trust_bundle_path = "{of_server}/roots.pem"
  data_dir = "{at}/data" socket_path = "{at}/api.sock" log_level = "WARN"
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{ }} }}
  KeyManager "memory" {{ plugin_data {{ }} }}
  WorkloadAttestor "k8s" {{
    plugin_data {{ kubelet_secure_port = {} kubelet_ca_path = "{}" token_path = "{}" node_name_env = "DURWARD_BENCH_NO_NODE" }}
  }}
}}
"#,
        server.port,
        kubelet.port,
        kubelet.ca.display(),
        kubelet.token.display()
    );
    std::fs::write(dir.join("agent.conf"), text).expect("written");
    let mut command = Command::new(who.binary(server));
    command.args(["run", "-config"]).arg(dir.join("agent.conf")).args(["-joinToken", &server.token()]);
    let log = std::fs::File::create(dir.join("log")).expect("a log");
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
    command
}

/// The pods, whose processes are started and call when they are told.
struct Pods {
    children: Vec<Child>,
    says: BufReader<PipeReader>,
    gate: PipeWriter,
    cgroups: Vec<PodCgroup>,
}

impl Pods {
    fn start(count: u32, socket: &Path) -> Self {
        let (closed, gate) = std::io::pipe().expect("a pipe");
        let (read, write) = std::io::pipe().expect("a pipe");
        let gap = Duration::from_millis(u64::from(setting("DURWARD_ATTEST_GAP", 500)));
        let all = Duration::from_secs(u64::from(setting("DURWARD_ATTEST_SECONDS", 20)));
        let calls = (all.as_millis() / gap.as_millis()) as u32;
        let me = std::env::current_exe().expect("this program");
        let (mut children, mut cgroups) = (Vec::new(), Vec::new());
        for n in 0..count {
            let pod = Pod { socket: socket.to_owned(), after: gap * n / count, calls, gap };
            let mut command = pod.command(&me);
            command.stdin(closed.try_clone().expect("a descriptor"));
            command.stdout(write.try_clone().expect("a descriptor"));
            let (child, cgroup) = (command.spawn().expect("a process"), PodCgroup::make(n));
            cgroup.take(child.id());
            children.push(child);
            cgroups.push(cgroup);
        }
        drop(write);
        let mut says = BufReader::new(read);
        for _ in &children {
            let mut line = String::new();
            says.read_line(&mut line).expect("a line");
            assert_eq!(line, READY);
        }
        Self { children, says, gate, cgroups }
    }

    fn call(self) -> Vec<Saw> {
        let Self { children, says, gate, cgroups } = self;
        drop(gate);
        let lines = says.lines().map_while(Result::ok);
        let saw = lines.map(|line| serde_json::from_str(&line).expect("what it saw")).collect();
        children.into_iter().for_each(|mut child| drop(child.wait()));
        drop(cgroups);
        saw
    }
}

/// What was measured of one, by what it is called, and what is aimed at beside the other.
type Figures = Vec<(&'static str, f64, &'static str)>;

fn milliseconds(mut micros: Vec<u32>, percent: usize) -> f64 {
    micros.sort_unstable();
    let at = micros.len().saturating_sub(1) * percent / 100;
    micros.get(at).map_or(f64::NAN, |micros| f64::from(*micros) / 1000.0)
}

async fn contender(kind: Contender, server: &SpireServer, kubelet: &FakeKubelet) -> Server {
    let agent = Server::start(kind.name(), |dir| command(kind, server, kubelet, dir)).await;
    tokio::time::sleep(SETTLED).await;
    agent
}

fn measured(agent: &Server, kubelet: &FakeKubelet, count: u32) -> Figures {
    let pods = Pods::start(count, &agent.socket());
    let (cpu, requests) = (agent.cpu(), kubelet.requests());
    let saw = pods.call();
    let (cpu, requests) = (agent.cpu() - cpu, kubelet.requests() - requests);
    let mut failed: BTreeMap<&str, u32> = BTreeMap::new();
    saw.iter().flat_map(|saw| &saw.failed).for_each(|how| *failed.entry(how).or_default() += 1);
    if !failed.is_empty() {
        println!("{}: {failed:?}", agent.name);
        let log = std::fs::read_to_string(agent.dir.path().join("log")).unwrap_or_default();
        log.lines().rev().take(5).for_each(|line| println!("  {line}"));
    }
    let first = || saw.iter().filter_map(|saw| saw.first).collect();
    let later = || saw.iter().flat_map(|saw| saw.later.iter().copied()).collect();
    let answered = saw.iter().map(|saw| saw.later.len() + usize::from(saw.first.is_some())).sum::<usize>();
    vec![
        ("calls answered", answered as f64, ""),
        ("calls that were not", f64::from(failed.values().sum::<u32>()), ""),
        ("requests to the kubelet", requests as f64, "0.10"),
        ("processor time, ms", cpu.as_secs_f64() * 1e3, "0.10"),
        ("first call from connect(), p50, ms", milliseconds(first(), 50), ""),
        ("the same, p99, ms", milliseconds(first(), 99), ""),
        ("repeated call, p50, ms", milliseconds(later(), 50), ""),
        ("the same, p99, ms", milliseconds(later(), 99), ""),
        ("resident, MiB", agent.resident() as f64 / 1024.0, ""),
        ("most resident, MiB", agent.memory("VmHWM") as f64 / 1024.0, ""),
    ]
}

async fn bench() {
    let count = setting("DURWARD_ATTEST_PODS", 100);
    let server = SpireServer::start();
    for account in 0..ACCOUNTS {
        server.entry_by(&format!("bench/sa{account}"), &["k8s:ns:bench", &format!("k8s:sa:sa{account}")]);
    }
    let list = listed(&(0..count).map(usual_pod).collect::<Vec<_>>());
    if let Reply::With(_, _, text) = &list {
        println!("{count} pods, whose list has {} KB", text.len() / 1000);
    }
    let kubelet = FakeKubelet::start(list);
    row(&["", "spire-agent", "durward", "ratio", "aim", "floor"].map(str::to_owned));
    row(&["---"; 6].map(str::to_owned));
    let theirs = measured(&contender(Contender::Spire, &server, &kubelet).await, &kubelet, count);
    let ours = measured(&contender(Contender::Durward, &server, &kubelet).await, &kubelet, count);
    let floor = Server::floor(&Server::agent("").await).await;
    let bare = measured(&floor, &kubelet, count);
    for (((what, theirs, _), (_, ours, aim)), (_, bare, _)) in theirs.into_iter().zip(ours).zip(bare) {
        let ratio = format!("{:.2}", ours / theirs);
        let [theirs, ours, bare] = [theirs, ours, bare].map(|figure| format!("{figure:.1}"));
        row(&[what.to_owned(), theirs, ours, ratio, aim.to_owned(), bare]);
    }
}

fn main() {
    Pod::come_if_told();
    floor_process();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(bench());
}
