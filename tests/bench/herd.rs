//! Polite callers who come together: crowds after a restart, a node that boots, many streams, and a gateway that validates.
//!
//! `cargo bench --bench herd [-- SCENARIO ..]`; scenarios are `restart`, `users`, `boot`, `streams`, `second`, `validate` and
//! `busy`. In the environment: `DURWARD_HERD_MIB` is what the agent may use (default 64), `DURWARD_HERD_NICE` its priority (default -10, as
//! the unit has it), `DURWARD_BIN` another agent. `DURWARD_HERD_PEER` is the socket of another server of the Workload API, a
//! spire-agent's say, which has an entry for this user: up to 100 clients restart there too.
//!
//! Clients are processes that were started before; each has its time from its own `connect()` to its answer. Nobody tries again:
//! what is refused is counted. As root the clients are users of their own; otherwise all are this one.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench, not the agent"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "a part of what benches share is used")]

#[path = "herd/client.rs"]
mod client;
#[path = "confined.rs"]
mod confined;
#[path = "../it/frames.rs"]
mod frames;
#[path = "process.rs"]
mod process;
#[path = "raw.rs"]
mod raw;
#[path = "wire.rs"]
mod wire;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, PipeReader, PipeWriter},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use client::{Client, Come, STAYING, Saw};
use confined::{Cgroup, Confined};
use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::geteuid,
};
use process::{Part as _, READY};

/// The first of the users.
const FIRST: u32 = 740_001;
/// As many have an entry.
const USERS: u32 = 1_000;
/// How many clients restart together.
const CROWDS: [u32; 3] = [100, 500, 1_000];
/// Of these, so many where another server is compared.
const BESIDE_PEER: u32 = 100;
/// Units of a node that boots.
const UNITS: u32 = 60;
const STREAMS: u64 = 1_000;
/// Clients of another user who come when streams have filled memory.
const SECOND: u32 = 100;
/// What a gateway validates in a second.
const VALIDATIONS: u64 = 2_000;
/// Who keeps the agent busy meanwhile.
const BUSY: u32 = 4;
const NICE: i64 = -10;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// An agent with an entry for root and for each user.
struct Agent {
    confined: Confined,
    me: PathBuf,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("open to all");
        // Where it was built, other users may have no way in.
        let me = dir.path().join("herd");
        fs::copy(std::env::current_exe().expect("this program"), &me).expect("a copy");
        let at = dir.path().display();
        let mut text = format!(
            "agent {{\n  trust_domain = \"example.org\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/api.sock\"\n}}\n\
             plugins {{\n  WorkloadAttestor \"unix\" {{\n    plugin_data {{ }}\n  }}\n}}\nissuer \"embedded\" {{ }}\n"
        );
        for uid in (FIRST..FIRST + USERS).chain([geteuid().as_raw()]) {
            text.push_str(&format!(
                "entry \"spiffe://example.org/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n"
            ));
        }
        let config = dir.path().join("agent.conf");
        fs::write(&config, text).expect("written");
        let binary = std::env::var_os("DURWARD_BIN")
            .map_or_else(|| env!("CARGO_BIN_EXE_durward").into(), PathBuf::from);
        let mut command = Command::new(binary);
        command.args(["run", "--config"]).arg(config);
        let nice = std::env::var("DURWARD_HERD_NICE").map_or(NICE, |text| text.parse().expect("a priority"));
        let limit = setting("DURWARD_HERD_MIB", 64) << 20;
        Self { confined: Confined::start_nice(&command, dir, limit, nice), me }
    }
}

/// Clients who are started, and come when they are told.
struct Herd {
    children: Vec<Child>,
    says: BufReader<PipeReader>,
    gate: PipeWriter,
}

impl Herd {
    /// Starts one for each of `users` and waits until all are there.
    fn gather(me: &Path, socket: &Path, come: Come, users: impl Iterator<Item = Option<u32>>) -> Self {
        let (closed, gate) = std::io::pipe().expect("a pipe");
        let (read, write) = std::io::pipe().expect("a pipe");
        let client = Client { come, socket: socket.to_owned() };
        let children: Vec<Child> = users
            .map(|uid| {
                let mut command = client.command(me);
                if let Some(uid) = uid.filter(|_| geteuid().is_root()) {
                    command.uid(uid).gid(uid);
                }
                command.stdin(Stdio::from(closed.try_clone().expect("a descriptor")));
                command.stdout(write.try_clone().expect("a descriptor"));
                command.spawn().expect("a process")
            })
            .collect();
        drop(write);
        let mut says = BufReader::new(read);
        for _ in &children {
            let mut line = String::new();
            says.read_line(&mut line).expect("a line");
            assert_eq!(line, READY);
        }
        Self { children, says, gate }
    }

    /// Lets all of them come. What each saw, and how long all took.
    fn come(self) -> (Vec<Saw>, Duration) {
        let Self { children, says, gate } = self;
        let began = Instant::now();
        drop(gate);
        let saw =
            says.lines().map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok()).collect();
        let took = began.elapsed();
        children.into_iter().for_each(|mut child| drop(child.wait()));
        (saw, took)
    }
}

fn row(cells: &[String]) {
    println!("| {} |", cells.join(" | "));
}

/// A row of what all saw.
fn told(label: &str, saw: &[Saw], took: Duration, agent: Option<&Agent>) {
    let sum = |of: &dyn Fn(&Saw) -> u64| saw.iter().map(of).sum::<u64>();
    let mut failed: BTreeMap<&str, u64> = BTreeMap::new();
    saw.iter().flat_map(|saw| &saw.failed).for_each(|(how, count)| *failed.entry(how).or_default() += count);
    let mut micros: Vec<u64> = saw.iter().flat_map(|saw| saw.micros.iter().copied()).collect();
    micros.sort_unstable();
    let at = |percent: usize| {
        let micros = micros.get(micros.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0);
        format!("{:.1}", micros as f64 / 1000.0)
    };
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / (1 << 20) as f64);
    let resident = agent.and_then(|agent| agent.confined.status("VmHWM")).map(|kib| mib(kib << 10));
    let charged = agent.and_then(|agent| agent.confined.cgroup.as_ref().map(Cgroup::highest));
    row(&[
        label.to_owned(),
        format!("**{}/{}**", sum(&|saw| saw.answered), sum(&|saw| saw.asked)),
        failed.iter().map(|(how, count)| format!("{count} {how}")).collect::<Vec<_>>().join(", "),
        format!("{}/{}/{}", at(50), at(99), at(100)),
        format!("{:.2}", took.as_secs_f64()),
        resident.unwrap_or_else(|| "-".to_owned()),
        charged.map_or_else(
            || "-".to_owned(),
            |charged| format!("{}, {}", mib(charged.all), mib(charged.kernel)),
        ),
    ]);
}

/// So many clients of one user, or of as many, who ask once.
fn restart(label: &str, count: u32, user_of: impl Fn(u32) -> u32) {
    let agent = Agent::start();
    let users = (0..count).map(|nth| Some(user_of(nth)));
    let herd = Herd::gather(&agent.me, &agent.confined.socket(), Come::Once, users);
    let (saw, took) = herd.come();
    told(&format!("{count} clients of {label} restart"), &saw, took, Some(&agent));
}

/// A process for each unit of root, which opens a stream and calls once.
fn boot() {
    let agent = Agent::start();
    let units = (0..UNITS).map(|_| None);
    let (saw, took) = Herd::gather(&agent.me, &agent.confined.socket(), Come::Unit, units).come();
    told(&format!("{UNITS} units of root: a stream and a call each"), &saw, took, Some(&agent));
}

fn streams() {
    let agent = Agent::start();
    let one = [Some(FIRST)].into_iter();
    let (saw, took) = Herd::gather(&agent.me, &agent.confined.socket(), Come::Streams(STREAMS), one).come();
    told("1,000 streams of one user, a connection each", &saw, took, Some(&agent));
}

/// As many streams of one user as there is room for, and then a crowd of another.
fn second() {
    let agent = Agent::start();
    let socket = agent.confined.socket();
    let first = Herd::gather(&agent.me, &socket, Come::Stays(STREAMS), [Some(FIRST)].into_iter());
    let others = Herd::gather(&agent.me, &socket, Come::Once, (0..SECOND).map(|_| Some(FIRST + 1)));
    let first = std::thread::spawn(move || first.come());
    std::thread::sleep(STAYING / 2);
    let (saw, took) = others.come();
    let (stayed, all) = first.join().expect("figures");
    told("up to 1,000 streams of one user, which stay", &stayed, all, None);
    told(&format!("{SECOND} clients of another, 5 s later"), &saw, took, Some(&agent));
}

/// A gateway validates, alone or beside others who do without end.
fn validate(busy: u32) {
    let agent = Agent::start();
    let socket = agent.confined.socket();
    let others = (busy > 0).then(|| {
        let users = (1..=busy).map(|nth| Some(FIRST + nth));
        Herd::gather(&agent.me, &socket, Come::ValidatesWithoutEnd, users)
    });
    let gateway = Herd::gather(&agent.me, &socket, Come::Validates(VALIDATIONS), [Some(FIRST)].into_iter());
    let others = others.map(|herd| std::thread::spawn(move || herd.come()));
    let (saw, took) = gateway.come();
    let label = format!("a gateway validates {VALIDATIONS} a second");
    match others.map(|herd| herd.join().expect("figures").0) {
        None => told(&label, &saw, took, Some(&agent)),
        Some(others) => {
            let answered = |saw: &[Saw]| saw.iter().map(|saw| saw.answered).sum::<u64>();
            let (own, all) = (answered(&saw), answered(&saw) + answered(&others));
            let fair = (all / u64::from(busy + 1)).min(saw.iter().map(|saw| saw.asked).sum());
            let each: Vec<u64> = others.iter().map(|saw| saw.answered).collect();
            told(&format!("{label}, {busy} others without end"), &saw, took, Some(&agent));
            // While there is room nobody is held to a part: who asks for more has more.
            println!(
                "  the gateway had {own} of {all} answers, the others {each:?}; an equal part is {fair}"
            );
        }
    }
}

fn main() {
    Client::come_if_told();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the hard limit");
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let is_asked = |name: &str| asked.is_empty() || asked.iter().any(|it| it == name);
    if !geteuid().is_root() {
        println!("not root: all clients are one user");
    }
    println!("the agent has {} MiB", setting("DURWARD_HERD_MIB", 64));
    row(&[
        "who",
        "answered of",
        "refused",
        "p50/p99/last, ms",
        "all, s",
        "RSS max, MiB",
        "charged, kernel's, MiB",
    ]
    .map(str::to_owned));
    row(&[const { "---" }; 7].map(str::to_owned));
    for count in CROWDS {
        if is_asked("restart") {
            restart("one user", count, |_| FIRST);
        }
        if is_asked("users") {
            restart("as many users", count, |nth| FIRST + nth);
        }
    }
    if is_asked("boot") {
        boot();
    }
    if is_asked("streams") {
        streams();
    }
    if is_asked("second") {
        second();
    }
    if is_asked("validate") {
        validate(0);
    }
    if is_asked("busy") {
        validate(BUSY);
    }
    if let Some(peer) = std::env::var_os("DURWARD_HERD_PEER").map(PathBuf::from) {
        let me = std::env::current_exe().expect("this program");
        for count in CROWDS.into_iter().filter(|count| *count <= BESIDE_PEER) {
            let (saw, took) = Herd::gather(&me, &peer, Come::Once, (0..count).map(|_| None)).come();
            told(&format!("{count} clients of this user, at {}", peer.display()), &saw, took, None);
        }
    }
}
