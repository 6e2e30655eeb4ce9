//! Callers that abuse the agent, and a polite one beside them: what the agent needs, whether it lives, and what the polite one
//! notices.
//!
//! `cargo bench --bench abuse [-- SCENARIO ..]`; the environment makes it larger: `DURWARD_ABUSE_SECONDS` (default 5, the target
//! says 60 and more), `DURWARD_ABUSE_WORKERS` (processes of each caller, default 300), `DURWARD_ABUSE_CALLERS` (distinct
//! callers one after the other, default 20,000, the target says 1,000,000; `DURWARD_ABUSE_KEYS`, the same on the tables alone). As root each caller is a user of its own and the
//! agent runs in a memory cgroup of 24 MiB, which ends with the bench; otherwise all callers are one user, so that the polite
//! one is refused with the others, and the table says so.
//!
//! The baseline is the polite caller's p99 while as many processes burn as much processor time as the abusers did, without
//! calling: spinning, or where the abusers fork, forking. Each worker is this program again, told its part in the environment.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::exit,
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench, not the agent"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "a part of frames is used")]

#[path = "confined.rs"]
mod confined;
#[path = "../it/frames.rs"]
mod frames;

use std::{
    fs,
    io::{PipeWriter, Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use confined::{Cgroup, Confined};
use durward::limits::{CallerKey, Gate, GatePlan, LimitSettings, Limits, Method, caller::Caller};
use frames::{Called, FETCH_JWT, PREFACE, call, call_frames, jwt_request, settings};
use nix::{
    sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit},
    sys::time::TimeValLike as _,
    unistd::{Uid, geteuid, seteuid},
};

const PART: &str = "DURWARD_ABUSE_PART";
const SOCKET: &str = "DURWARD_ABUSE_SOCKET";
const UNTIL: &str = "DURWARD_ABUSE_UNTIL";
const NUMBER: &str = "DURWARD_ABUSE_NUMBER";

/// Users of the callers, when the bench may choose: far from any that a node has.
const ABUSERS: [u32; 4] = [710_001, 710_002, 710_003, 710_004];
const POLITE: u32 = 720_001;
/// The first of the distinct callers.
const STRANGERS: u32 = 100_000_000;

const POLITE_RATE: u32 = 20;
const CGROUP_LIMIT: u64 = 24 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// What abusers do.
#[derive(Clone, Copy, PartialEq)]
enum Abuse {
    /// FetchJWTSVID, a new connection for each, no pause.
    Storm,
    /// The same with a new process for each.
    Fork,
    /// Connections opened, until so many are or no descriptor is left, and left alone.
    Idle,
    /// Calls on each stream that a connection may have, and nothing is ever read.
    SlowRead,
    /// As many users as are asked for, each with one call.
    Strangers,
    /// 50 calls a second on one connection, limit 10.
    Limited,
}

impl Abuse {
    const ALL: [(&str, Self, &str); 6] = [
        ("storm", Self::Storm, "a new connection per call"),
        ("fork", Self::Fork, "a new process per call"),
        ("idle", Self::Idle, "10,000 idle connections"),
        ("slow", Self::SlowRead, "slow readers"),
        ("strangers", Self::Strangers, "distinct callers one after the other"),
        ("limited", Self::Limited, "50 calls/s each, limit 10"),
    ];

    /// Processes of one caller.
    fn workers(self) -> u64 {
        match self {
            Self::Storm | Self::Fork | Self::SlowRead => setting("DURWARD_ABUSE_WORKERS", 300),
            Self::Idle | Self::Limited | Self::Strangers => 1,
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970")
}

/// What a worker did. One line of a pipe.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    answered: u64,
    refused: u64,
    closed: u64,
    silent: u64,
    cpu: Duration,
    /// From its first call to the end of its last.
    took: Duration,
}

impl Tally {
    fn count(&mut self, called: Called) {
        match called {
            Called::Answered => self.answered += 1,
            Called::Refused => self.refused += 1,
            Called::Closed => self.closed += 1,
            Called::Silent => self.silent += 1,
        }
    }

    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.refused += other.refused;
        self.closed += other.closed;
        self.silent += other.silent;
        self.cpu += other.cpu;
        self.took = self.took.max(other.took);
    }

    fn parse(line: &str) -> Option<Self> {
        let mut numbers = line.split(' ').map(str::parse::<u64>);
        let mut next = || numbers.next()?.ok();
        Some(Self {
            answered: next()?,
            refused: next()?,
            closed: next()?,
            silent: next()?,
            cpu: Duration::from_micros(next()?),
            took: Duration::from_micros(next()?),
        })
    }
}

fn cpu() -> Duration {
    let of = |who| {
        let usage = getrusage(who).expect("what was used");
        Duration::from_micros((usage.user_time() + usage.system_time()).num_microseconds() as u64)
    };
    of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN)
}

/// A worker's process ends here; any other goes on.
fn worker() {
    let Ok(part) = std::env::var(PART) else { return };
    let socket = PathBuf::from(std::env::var_os(SOCKET).expect("a socket"));
    let until = Duration::from_millis(setting(UNTIL, 0));
    let number = setting(NUMBER, 0);
    let request = jwt_request("abuse");
    let mut tally = Tally::default();
    let began = Instant::now();
    match part.as_str() {
        "once" => {
            let called = call(&socket, FETCH_JWT, &request, PATIENCE);
            std::process::exit(called as i32);
        }
        "polite" => {
            let mut latencies = Vec::new();
            let gap = Duration::from_secs(1) / POLITE_RATE;
            let mut due = Instant::now();
            while now() < until {
                let began = Instant::now();
                tally.count(call(&socket, FETCH_JWT, &request, PATIENCE));
                latencies.push(began.elapsed().as_micros() as u64);
                due += gap;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            latencies.sort_unstable();
            let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100];
            if tally.answered < latencies.len() as u64 {
                eprintln!("the polite caller: {tally:?}");
            }
            println!("{} {} {} {}", tally.answered, latencies.len(), at(50), at(99));
            std::process::exit(0);
        }
        // Work without calling, as greedily as there is work: until it has used its share of the processors, `number`
        // millionths of one, and again as soon as it has not.
        "burn" | "fork-burn" => {
            let me = std::env::current_exe().expect("this program");
            let share = number.max(1) as f64 / 1e6;
            let started = (Instant::now(), cpu());
            while now() < until {
                let due = (cpu() - started.1).div_f64(share);
                let ahead = due.saturating_sub(started.0.elapsed());
                if !ahead.is_zero() {
                    std::thread::sleep(ahead.min(until.saturating_sub(now())));
                } else if part == "burn" {
                    let spun = cpu() + Duration::from_micros(200);
                    while cpu() < spun {}
                } else {
                    Command::new(&me).env(PART, "nothing").status().expect("a process");
                }
            }
        }
        "storm" => {
            while now() < until {
                tally.count(call(&socket, FETCH_JWT, &request, PATIENCE));
            }
        }
        "nothing" => std::process::exit(0),
        "fork" => {
            let me = std::env::current_exe().expect("this program");
            while now() < until {
                let ended = Command::new(&me).env(PART, "once").status().expect("a process");
                tally.count(match ended.code() {
                    Some(0) => Called::Answered,
                    Some(1) => Called::Refused,
                    Some(2) => Called::Closed,
                    _ => Called::Silent,
                });
            }
        }
        "idle" => {
            let mut open = Vec::new();
            while open.len() < number as usize {
                let Ok(stream) = UnixStream::connect(&socket) else { break };
                open.push(stream);
            }
            std::thread::sleep(until.saturating_sub(now()));
            for mut stream in open {
                stream.set_nonblocking(true).expect("a flag");
                match stream.read(&mut [0]) {
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tally.silent += 1,
                    Ok(_) | Err(_) => tally.closed += 1,
                }
            }
        }
        "slow" => {
            let mut begun = [PREFACE.to_vec(), settings(4, 0)].concat();
            for nth in 0..16 {
                begun.extend(call_frames(1 + 2 * nth, FETCH_JWT, &request));
            }
            while now() < until {
                let Ok(mut stream) = UnixStream::connect(&socket) else { break };
                // The window is zero, and nothing is taken from the socket.
                let sent = stream.write_all(&begun).is_ok();
                while sent && now() < until && still_open(&stream) {
                    std::thread::sleep(Duration::from_millis(50));
                }
                if sent && still_open(&stream) { tally.silent += 1 } else { tally.closed += 1 }
            }
        }
        "strangers" => {
            let first = STRANGERS + setting(START, 0) as u32;
            for nth in 0..number as u32 {
                seteuid(Uid::from_raw(first + nth)).expect("another user");
                tally.count(call(&socket, FETCH_JWT, &request, PATIENCE));
                seteuid(Uid::from_raw(0)).expect("root again");
                if now() >= until {
                    break;
                }
            }
        }
        "limited" => {
            // One connection after the other, so that the gate has no part in it.
            let mut due = Instant::now();
            while now() < until {
                tally.count(call(&socket, FETCH_JWT, &request, PATIENCE));
                due += Duration::from_millis(20);
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        }
        other => panic!("no part {other}"),
    }
    println!(
        "{} {} {} {} {} {}",
        tally.answered,
        tally.refused,
        tally.closed,
        tally.silent,
        cpu().as_micros(),
        began.elapsed().as_micros()
    );
    std::process::exit(0);
}

const START: &str = "DURWARD_ABUSE_START";

fn still_open(stream: &UnixStream) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready == 0)
}

/// The agent, with nothing in it yet.
struct Agent {
    confined: Confined,
    me: PathBuf,
}

impl Agent {
    fn start(blocks: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("open to all");
        // Where it was built, other users may have no way in.
        let me = dir.path().join("abuse");
        fs::copy(std::env::current_exe().expect("this program"), &me).expect("a copy");
        let at = dir.path().display();
        let mut text = format!(
            "agent {{\n  trust_domain = \"example.org\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/api.sock\"\n}}\n\
             plugins {{\n  WorkloadAttestor \"unix\" {{\n    plugin_data {{ }}\n  }}\n}}\nissuer \"embedded\" {{ }}\n{blocks}\n"
        );
        let mut users = ABUSERS.to_vec();
        users.extend([POLITE, geteuid().as_raw()]);
        for uid in users {
            text.push_str(&format!(
                "entry \"spiffe://example.org/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n"
            ));
        }
        fs::write(dir.path().join("agent.conf"), text).expect("written");
        let confined = Confined::start(Path::new(env!("CARGO_BIN_EXE_durward")), dir, CGROUP_LIMIT);
        Self { confined, me }
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

    /// A process that plays `part` as `uid`, where the bench may choose.
    fn worker(&self, part: &str, uid: Option<u32>, until: Duration) -> Command {
        let mut command = Command::new(&self.me);
        command.env(PART, part).env(SOCKET, self.confined.socket()).env(UNTIL, until.as_millis().to_string());
        if let Some(uid) = uid.filter(|_| geteuid().is_root()) {
            command.uid(uid).gid(uid);
        }
        command.stdin(Stdio::null());
        command
    }
}

/// What the polite caller saw.
struct Polite {
    answered: u64,
    asked: u64,
    /// Microseconds.
    p50: u64,
    p99: u64,
}

impl Polite {
    fn start(agent: &Agent, until: Duration) -> Child {
        agent.worker("polite", Some(POLITE), until).stdout(Stdio::piped()).spawn().expect("a process")
    }

    fn end(child: Child) -> Self {
        let out = child.wait_with_output().expect("its figures");
        let text = String::from_utf8_lossy(&out.stdout);
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|it| it.parse().ok()).collect();
        let [answered, asked, p50, p99] = numbers[..] else { panic!("it said {text:?}") };
        Self { answered, asked, p50, p99 }
    }
}

/// Starts the workers, waits for all of them, and adds up.
fn crowd(agent: &Agent, part: &str, workers: u64, number: u64, seconds: u64) -> (Vec<Tally>, Polite) {
    let root = geteuid().is_root();
    let start = now();
    // A thousand processes take a while to start; they end together.
    let until = start + Duration::from_secs(seconds) + Duration::from_millis(workers * 4);
    let mut pipes = Vec::new();
    let mut children = Vec::new();
    let polite = Polite::start(agent, until);
    for (nth, uid) in ABUSERS.into_iter().enumerate() {
        let (mut read, write) = std::io::pipe().expect("a pipe");
        for _ in 0..workers {
            let out: PipeWriter = write.try_clone().expect("a descriptor");
            // Only root may become so many others.
            let uid = (part != "strangers").then_some(uid);
            let mut command = agent.worker(part, uid, until);
            command.env(NUMBER, number.to_string()).env(START, (number * nth as u64).to_string());
            if part == "strangers" && !root {
                continue;
            }
            children.push(command.stdout(out).spawn().expect("a process"));
        }
        drop(write);
        pipes.push(std::thread::spawn(move || {
            let mut text = String::new();
            read.read_to_string(&mut text).expect("figures");
            let mut sum = Tally::default();
            text.lines().filter_map(Tally::parse).for_each(|tally| sum.add(tally));
            sum
        }));
    }
    let tallies = pipes.into_iter().map(|pipe| pipe.join().expect("figures")).collect();
    for mut child in children {
        drop(child.wait());
    }
    (tallies, Polite::end(polite))
}

fn row(cells: &[String]) {
    println!("| {} |", cells.join(" | "));
}

fn scenario(name: &str, abuse: Abuse, label: &str) {
    let seconds = setting("DURWARD_ABUSE_SECONDS", 5);
    let workers = abuse.workers();
    let strangers = setting("DURWARD_ABUSE_CALLERS", 20_000);
    let (number, seconds) = match abuse {
        Abuse::Idle => (2_500, seconds),
        Abuse::Strangers => (strangers / ABUSERS.len() as u64, seconds.max(strangers / 4_000)),
        _ => (0, seconds),
    };
    let blocks = match abuse {
        Abuse::Limited => LIMITED,
        _ => "",
    };
    let mut agent = Agent::start(blocks);
    let quiet = agent.confined.status("VmRSS").unwrap_or(0);
    let began = Instant::now();
    let cpu = agent.cpu();
    let (tallies, polite) = crowd(&agent, name, workers, number, seconds);
    let took = began.elapsed();
    let agent_cpu = agent.cpu() - cpu;
    let killed = agent.confined.ended().is_some();
    let highest = agent.confined.status("VmHWM").unwrap_or(0);
    let charged = agent.confined.cgroup.as_ref().map(Cgroup::highest);
    let mut all = Tally::default();
    tallies.iter().for_each(|tally| all.add(*tally));

    // The same processor time, by as many, without calling.
    let agent = if killed { Agent::start(blocks) } else { agent };
    let burners = workers * ABUSERS.len() as u64;
    let took_micros = (took.as_micros() as u64).max(1);
    let part = if abuse == Abuse::Fork { "fork-burn" } else { "burn" };
    let number = all.cpu.as_micros() as u64 * 1_000_000 / took_micros / burners;
    let (burnt, alone) = crowd(&agent, part, workers, number, seconds);
    let mut burnt_cpu = Duration::ZERO;
    burnt.iter().for_each(|tally| burnt_cpu += tally.cpu);

    for line in
        agent.confined.log().lines().filter(|line| line.contains(" WARN ") || line.contains("ERROR")).take(12)
    {
        eprintln!("  {line}");
    }
    let mib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
    let ms = |micros: u64| format!("{:.1}", micros as f64 / 1000.0);
    row(&[
        label.to_owned(),
        format!("4 x {workers}, {:.0} s", took.as_secs_f64()),
        all.answered.to_string(),
        all.refused.to_string(),
        all.closed.to_string(),
        all.silent.to_string(),
        mib(quiet),
        format!("**{}**", mib(highest)),
        charged.map_or_else(|| "-".to_owned(), |(most, met)| format!("{} ({met})", mib(most / 1024))),
        if killed { "**yes**" } else { "no" }.to_owned(),
        format!("**{}/{}**", polite.answered, polite.asked),
        format!("{}/{}", ms(polite.p50), ms(polite.p99)),
        format!("{}/{}", ms(alone.p50), ms(alone.p99)),
        format!("**{:.2}**", polite.p99 as f64 / alone.p99.max(1) as f64),
        format!("{:.1}/{:.1}/{:.1}", agent_cpu.as_secs_f64(), all.cpu.as_secs_f64(), burnt_cpu.as_secs_f64()),
    ]);
    if abuse == Abuse::Limited {
        for (caller, tally) in ABUSERS.iter().zip(&tallies) {
            // A full bucket, and what came back meanwhile; a token was signed for the first call, which costs one more.
            let exact = LIMIT * (1.0 + tally.took.as_secs_f64()) - 1.0;
            println!(
                "  uid {caller}: {} answered of {} in {:.3} s; the bucket had {exact:.1}",
                tally.answered,
                tally.answered + tally.refused + tally.closed + tally.silent,
                tally.took.as_secs_f64()
            );
        }
    }
}

/// A caller that is a key and no more.
struct Key(CallerKey);

impl Caller for Key {
    fn caller_key(&self) -> CallerKey {
        self.0
    }
}

/// The tables of the gate and of the caller stage, and so many callers one after the other, while a polite one asks twenty times a
/// second.
fn table(callers: u64) {
    let limits = Limits::default();
    let plan = GatePlan::new(&LimitSettings::default(), 20_000, None).expect("a plan");
    let gate = Gate::new(plan, &limits);
    let resident = || {
        let text = fs::read_to_string("/proc/self/statm").expect("its memory");
        text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("pages") * 4
    };
    let call = |uid| {
        let Ok(_permit) = gate.open(CallerKey::Uid(uid)) else { return false };
        limits.admit_caller(Key(CallerKey::Uid(uid)), Method::FetchJwtSvid).is_ok()
    };
    let (mut admitted, mut polite, mut asked) = (0_u64, 0_u64, 0_u64);
    // It called before the flood began, as who is known has.
    assert!(call(1_000) && call(1_000));
    let (began, before) = (Instant::now(), resident());
    let mut most = before;
    let mut due = began;
    for nth in 0..callers {
        // Spread over all the users there can be, as pods would be.
        admitted += u64::from(call((nth as u32).wrapping_mul(2_654_435_761) | 1 << 16));
        if Instant::now() >= due {
            due += Duration::from_secs(1) / POLITE_RATE;
            asked += 1;
            polite += u64::from(call(1_000));
            most = most.max(resident());
        }
    }
    println!(
        "\n{callers} distinct callers on the tables alone: {admitted} admitted in {:.2} s, {:.1} MiB more at most, the polite \
         caller {polite}/{asked}",
        began.elapsed().as_secs_f64(),
        (most - before) as f64 / 1024.0
    );
}

const LIMIT: f64 = 10.0;

/// 10 calls a second for each caller; connections are no matter here.
const LIMITED: &str = "ratelimit {\n  caller {\n    override \"uid:710001-710004\" {\n      rate = 10\n      burst = 10\n    }\n  }\n}\n";

fn main() {
    worker();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the hard limit");
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if !geteuid().is_root() {
        println!("not root: all callers are one user, so the polite one shares the abusers' fate");
    }
    match Cgroup::make(CGROUP_LIMIT) {
        Some(_) => println!("the agent is in a memory cgroup of {} MiB", CGROUP_LIMIT >> 20),
        None => println!("no memory cgroup can be made here: nothing kills the agent"),
    }
    row(&[
        "callers",
        "processes, time",
        "answered",
        "refused",
        "closed",
        "no answer",
        "RSS before, MiB",
        "RSS max (16)",
        "charged max (times at limit)",
        "killed",
        "polite answered/asked",
        "polite p50/p99, ms",
        "baseline p50/p99, ms",
        "p99 ratio (3)",
        "CPU s: agent/abusers/baseline",
    ]
    .map(str::to_owned));
    row(&[const { "---" }; 15].map(str::to_owned));
    for (name, abuse, label) in Abuse::ALL {
        if asked.is_empty() || asked.iter().any(|it| it == name) {
            scenario(name, abuse, label);
        }
    }
    if asked.is_empty() || asked.iter().any(|it| it == "table") {
        table(setting("DURWARD_ABUSE_KEYS", 1_000_000));
    }
}
