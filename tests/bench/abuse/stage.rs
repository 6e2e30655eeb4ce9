//! The run of a scenario: the agent, the abusers and the polite ones, and the row that is printed.

use std::{
    collections::BTreeMap,
    fs,
    io::{PipeWriter, Read as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};

use super::{
    confined::{Cgroup, Charged, Confined},
    now,
    part::{Part, Role, Tally},
    polite::{Manner, Seen},
    row,
    scenario::{ABUSERS, Baseline, Crowd, LIMIT, POLITE, Scenario, Workers},
    setting,
    spire::SpireServer,
};

/// How long calls have at SIGTERM (`drain_timeout`), and a second.
const DRAIN: Duration = Duration::from_secs(3);
/// How long the end of a process is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
const NICE: i64 = -10;

fn limit() -> u64 {
    setting("DURWARD_ABUSE_MIB", 24) << 20
}

fn nice() -> i64 {
    std::env::var("DURWARD_ABUSE_NICE").map_or(NICE, |text| text.parse().expect("a priority"))
}

/// What listens at the socket: the agent, or the floor.
struct Server {
    confined: Confined,
    /// A copy of this program: where it was built, other users may have no way in.
    me: PathBuf,
}

fn directory() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("open to all");
    let me = dir.path().join("abuse");
    fs::copy(std::env::current_exe().expect("this program"), &me).expect("a copy");
    (dir, me)
}

/// A SPIRE Server with the entries of all who play, and with so many more; `None` for 0.
pub(crate) fn upstream(entries: u64) -> Option<SpireServer> {
    if entries == 0 {
        return None;
    }
    let mut server = SpireServer::start();
    server.has(entries);
    for uid in [POLITE, geteuid().as_raw()].into_iter().chain(ABUSERS) {
        server.entry_of(&format!("u{uid}"), uid);
    }
    Some(server)
}

/// What the agent is told of who signs, and of its entries.
fn issuer(scenario: &Scenario, upstream: Option<&SpireServer>, at: &str) -> String {
    if let Some(server) = upstream {
        let SpireServer { port, dir, .. } = server;
        return format!(
            "agent {{ server_address = \"127.0.0.1\" server_port = {port} join_token = \"{}\" trust_bundle_path = \"{}/roots.pem\" }}\n\
             plugins {{ NodeAttestor \"join_token\" {{ }} KeyManager \"disk\" {{ plugin_data {{ directory = \"{at}/data\" }} }} }}\n",
            server.token(),
            dir.path().display(),
        );
    }
    let mut text = "issuer \"embedded\" { }\n".to_owned();
    let mut users = vec![POLITE, geteuid().as_raw()];
    // Who shares an ID has that one alone.
    if scenario.role != Role::Shared {
        users.extend(ABUSERS);
    }
    users.dedup();
    for uid in users {
        text.push_str(&format!(
            "entry \"spiffe://example.org/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n"
        ));
    }
    text
}

impl Server {
    fn agent(scenario: &Scenario, upstream: Option<&SpireServer>) -> Self {
        let (dir, me) = directory();
        let at = dir.path().display();
        let text = format!(
            "agent {{\n  trust_domain = \"example.org\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/api.sock\"\n  \
             listener {{ drain_timeout = \"2s\" }}\n}}\n\
             plugins {{\n  WorkloadAttestor \"unix\" {{\n    plugin_data {{ }}\n  }}\n}}\n{}\n{}\n",
            issuer(scenario, upstream, &at.to_string()),
            scenario.blocks
        );
        let config = dir.path().join("agent.conf");
        fs::write(&config, text).expect("written");
        let mut command = Command::new(
            std::env::var_os("DURWARD_BIN")
                .map_or_else(|| env!("CARGO_BIN_EXE_durward").into(), PathBuf::from),
        );
        command.args(["run", "--config"]).arg(config);
        Self { confined: Confined::start_nice(&command, dir, limit(), nice()), me }
    }

    fn floor() -> Self {
        let (dir, me) = directory();
        let part = Part {
            role: Role::Floor,
            socket: dir.path().join("api.sock"),
            until: Duration::MAX,
            number: 0,
            nth: 0,
        };
        Self { confined: Confined::start_nice(&part.command(&me), dir, limit(), nice()), me }
    }

    /// Processor time of all its threads.
    fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.confined.child.id())).unwrap_or_default();
        let ticks: u64 = stat
            .rsplit(')')
            .next()
            .map_or(0, |rest| rest.split(' ').skip(12).take(2).filter_map(|it| it.parse::<u64>().ok()).sum());
        Duration::from_millis(ticks * 10)
    }

    /// A process that plays `role` as `uid`, where the bench may choose.
    fn worker(&self, part: Part, uid: Option<u32>) -> Command {
        let mut command = Part { socket: self.confined.socket(), ..part }.command(&self.me);
        if let Some(uid) = uid.filter(|_| geteuid().is_root()) {
            command.uid(uid).gid(uid);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Ends it with SIGTERM. How long that took.
    fn end(&mut self) -> Option<Duration> {
        let pid = Pid::from_raw(self.confined.child.id().cast_signed());
        let began = Instant::now();
        kill(pid, Signal::SIGTERM).ok()?;
        while began.elapsed() < PATIENCE {
            if self.confined.ended().is_some() {
                return Some(began.elapsed());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }
}

/// Who plays against a server.
struct Cast<'a> {
    role: Role,
    abusers: Crowd,
    workers: Workers,
    number: u64,
    polite: &'a [Manner],
    seconds: u64,
}

/// What came of it.
struct Outcome {
    tallies: Vec<Tally>,
    polite: BTreeMap<Manner, Seen>,
    took: Duration,
    cpu: Duration,
    killed: bool,
    /// KiB.
    resident: u64,
    charged: Option<Charged>,
    ended_in: Option<Duration>,
}

/// Reads what the workers of one user have to say, until the last has ended.
fn adding_up(mut read: std::io::PipeReader) -> std::thread::JoinHandle<Tally> {
    std::thread::spawn(move || {
        let mut text = String::new();
        read.read_to_string(&mut text).expect("figures");
        let mut sum = Tally::default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).for_each(|tally| sum.add(tally));
        sum
    })
}

impl Cast<'_> {
    /// Plays to the end of the server, which is told to end while the abusers go on.
    fn play(&self, server: &mut Server) -> Outcome {
        let workers = self.workers.count();
        let users = self.abusers.users();
        // A thousand processes take a while to start; they end together.
        let starting = Duration::from_millis(workers * users.len() as u64);
        let until = now() + Duration::from_secs(self.seconds) + starting;
        let part = |role, until| Part { role, socket: PathBuf::new(), until, number: self.number, nth: 0 };
        let (began, cpu) = (Instant::now(), server.cpu());
        let polite: Vec<(Manner, Child)> = self
            .polite
            .iter()
            .map(|manner| {
                let mut command = server.worker(part(Role::Polite(*manner), until), Some(POLITE));
                (*manner, command.stdout(Stdio::piped()).spawn().expect("a process"))
            })
            .collect();
        let (mut pipes, mut children) = (Vec::new(), Vec::new());
        for (nth, uid) in users.into_iter().enumerate() {
            let (read, write) = std::io::pipe().expect("a pipe");
            // Only root may become so many others.
            let may = uid.is_some() || geteuid().is_root();
            for worker in 0..if may { workers } else { 0 } {
                let out: PipeWriter = write.try_clone().expect("a descriptor");
                let mut part = part(self.role, until + DRAIN);
                part.nth = nth as u64 * workers + worker;
                if self.role == Role::Groups {
                    part.number = u64::from(ABUSERS[nth]);
                }
                children.push(server.worker(part, uid).stdout(out).spawn().expect("a process"));
            }
            drop(write);
            pipes.push(adding_up(read));
        }
        let polite = polite.into_iter().map(|(manner, child)| (manner, seen(child))).collect();
        let (took, cpu) = (began.elapsed(), server.cpu().saturating_sub(cpu));
        let killed = server.confined.ended().is_some();
        let resident = server.confined.status("VmHWM").unwrap_or(0);
        let ended_in = if killed { None } else { server.end() };
        let charged = server.confined.cgroup.as_ref().map(Cgroup::highest);
        // For those whom no signal of the server's reaches.
        drop(fs::remove_file(server.confined.socket()));
        let tallies = pipes.into_iter().map(|pipe| pipe.join().expect("figures")).collect();
        children.into_iter().for_each(|mut child| drop(child.wait()));
        Outcome { tallies, polite, took, cpu, killed, resident, charged, ended_in }
    }
}

fn seen(child: Child) -> Seen {
    let out = child.wait_with_output().expect("its figures");
    serde_json::from_slice(&out.stdout).expect("what it saw")
}

const COLUMNS: [&str; 16] = [
    "callers",
    "processes, time",
    "answered / refused / closed / no answer",
    "RSS max, MiB",
    "charged max, of it the kernel's, MiB (times at limit)",
    "killed",
    "SIGTERM, s",
    "polite, waiting: answered/failed/unconnected",
    "p50/p99, ms",
    "at once: answered/failed/unconnected",
    "p50/p99, ms",
    "kept: answered/failed, cut",
    "p50/p99, ms",
    "streams open/cut",
    "baseline p99 and ratio",
    "CPU s: agent/abusers",
];

pub(crate) fn head() {
    match Cgroup::make(limit()) {
        Some(_) => println!("the agent is in a memory cgroup of {} MiB, nice {}", limit() >> 20, nice()),
        None => println!("no memory cgroup can be made here: nothing kills the agent"),
    }
    row(&COLUMNS.map(str::to_owned));
    row(&[const { "---" }; COLUMNS.len()].map(str::to_owned));
}

fn ms(micros: u64) -> String {
    format!("{:.1}", micros as f64 / 1000.0)
}

pub(crate) fn run(scenario: &Scenario, upstream: Option<&SpireServer>) {
    let strangers = setting("DURWARD_ABUSE_CALLERS", 20_000);
    let mut seconds = setting("DURWARD_ABUSE_SECONDS", 5);
    let mut number = scenario.number;
    if scenario.role == Role::Strangers {
        (number, seconds) = (strangers / ABUSERS.len() as u64, seconds.max(strangers / 4_000));
    }
    let Scenario { role, abusers, workers, polite, .. } = *scenario;
    let cast = Cast { role, abusers, workers, number, polite, seconds };
    let mut agent = Server::agent(scenario, upstream);
    let outcome = cast.play(&mut agent);
    let log = agent.confined.log();
    log.lines()
        .filter(|line| line.contains(" WARN ") || line.contains("ERROR") || line.contains("panicked"))
        .take(12)
        .for_each(|line| eprintln!("  {line}"));
    drop(agent);
    let mut all = Tally::default();
    outcome.tallies.iter().for_each(|tally| all.add(*tally));
    for (manner, seen) in &outcome.polite {
        seen.failures.iter().for_each(|how| eprintln!("  polite, {manner:?}: {how}"));
    }
    let base = base(scenario, upstream, &cast, &outcome, &all);
    print(scenario, &cast, &outcome, &all, base);
    if role == Role::Limited {
        exactness(&outcome.tallies);
    }
}

/// What the polite ones see without the agent, or without abuse.
fn base(
    scenario: &Scenario,
    upstream: Option<&SpireServer>,
    cast: &Cast<'_>,
    outcome: &Outcome,
    all: &Tally,
) -> String {
    if setting("DURWARD_ABUSE_BASELINE", 1) == 0 {
        return "-".to_owned();
    }
    let p99 = outcome.polite.get(&Manner::Waiting).map_or(0, |seen| seen.p99);
    let ratio = |base: u64| p99 as f64 / base.max(1) as f64;
    let role = match scenario.baseline {
        Baseline::Burn => Role::Burn,
        Baseline::ForkBurn => Role::ForkBurn,
        Baseline::Floor => {
            let polite = &[Manner::WaitingAtFloor, Manner::AtOnceAtFloor];
            let outcome_at = Cast { polite, ..*cast }.play(&mut Server::floor());
            let closed: u64 = outcome_at.tallies.iter().map(|tally| tally.closed).sum();
            let (waiting, at_once) = (&outcome_at.polite[&polite[0]], &outcome_at.polite[&polite[1]]);
            let percent = |seen: &Seen| seen.unconnected * 100 / seen.asked.max(1);
            let own = outcome.polite.get(&Manner::AtOnce).map_or(0, percent);
            let connected = outcome.polite.get(&Manner::Waiting).map_or(0, |seen| seen.connected_p99);
            return format!(
                "floor {} (**{:.2}**), connect() alone {} of {} (**{:.2}**), unconnected {} of 100 at once, here {own}; closed {closed}, killed {}",
                ms(waiting.p99),
                ratio(waiting.p99),
                ms(connected),
                ms(waiting.connected_p99),
                connected as f64 / waiting.connected_p99.max(1) as f64,
                percent(at_once),
                if outcome_at.killed { "yes" } else { "no" },
            );
        }
    };
    let workers = cast.workers.count();
    let burners = (workers * cast.abusers.users().len() as u64).min(1_200);
    let took = (outcome.took.as_micros() as u64).max(1);
    let number = all.cpu().as_micros() as u64 * 1_000_000 / took / burners;
    let burning = Cast {
        role,
        abusers: Crowd::One,
        workers: Workers::These(burners),
        number,
        polite: &[Manner::Waiting],
        ..*cast
    };
    let alone = burning.play(&mut Server::agent(scenario, upstream));
    let alone = alone.polite[&Manner::Waiting].p99;
    format!("{} (**{:.2}**)", ms(alone), ratio(alone))
}

fn print(scenario: &Scenario, cast: &Cast<'_>, outcome: &Outcome, all: &Tally, base: String) {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / (1 << 20) as f64);
    let none = Seen::default();
    let of = |manner| outcome.polite.get(&manner).unwrap_or(&none);
    let counts = |seen: &Seen| format!("**{}/{}/{}**", seen.answered, seen.failed(), seen.unconnected);
    let times = |seen: &Seen| format!("{}/{}", ms(seen.p50), ms(seen.p99));
    let (waiting, at_once, streams) = (of(Manner::Waiting), of(Manner::AtOnce), of(Manner::Streams));
    let kept = outcome.polite.get(&Manner::Validating).unwrap_or_else(|| of(Manner::Kept));
    row(&[
        scenario.label.to_owned(),
        format!(
            "{} x {}, {:.0} s",
            cast.abusers.users().len(),
            cast.workers.count(),
            outcome.took.as_secs_f64()
        ),
        format!("{} / {} / {} / {}", all.answered, all.refused, all.closed, all.silent),
        format!("**{}**", mib(outcome.resident << 10)),
        outcome.charged.map_or_else(
            || "-".to_owned(),
            |charged| format!("{}, {} ({})", mib(charged.all), mib(charged.kernel), charged.met),
        ),
        if outcome.killed { "**yes**" } else { "no" }.to_owned(),
        outcome.ended_in.map_or_else(
            || "**no**".to_owned(),
            |took| {
                let late = if took > DRAIN { " **late**" } else { "" };
                format!("{:.1}{late}", took.as_secs_f64())
            },
        ),
        counts(waiting),
        times(waiting),
        counts(at_once),
        times(at_once),
        format!("**{}/{}**, {}", kept.answered, kept.failed() + kept.unconnected, kept.cut),
        times(kept),
        format!("{}/**{}**", streams.answered, streams.cut),
        base,
        format!("{:.1}/{:.1}", outcome.cpu.as_secs_f64(), all.cpu().as_secs_f64()),
    ]);
}

fn exactness(tallies: &[Tally]) {
    for (caller, tally) in ABUSERS.iter().zip(tallies) {
        // A full bucket, and what came back meanwhile; a token was signed for the first call, which costs one more.
        let exact = LIMIT * (1.0 + tally.took.as_secs_f64()) - 1.0;
        println!(
            "  uid {caller}: {} answered of {} in {:.3} s; the bucket had {exact:.1}",
            tally.answered,
            tally.all(),
            tally.took.as_secs_f64()
        );
    }
}
