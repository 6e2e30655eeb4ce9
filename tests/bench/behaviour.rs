//! A fuzzer of behaviour: random callers, which are real processes of several users, against a real agent, and a polite one
//! beside them. After each step nobody has got what is not theirs, the neighbour was answered, and the agent is well.
//!
//! `cargo bench --bench behaviour` runs for `DURWARD_BEHAVIOUR_SECONDS` (default 60); `cargo test` runs a few hundred steps of
//! one seed. The seed is printed, and `DURWARD_BEHAVIOUR_SEED` replays what callers are told, which is all that can be:
//! `DURWARD_BEHAVIOUR_STEPS` bounds the steps, `DURWARD_BEHAVIOUR_WITHOUT` names kinds of actions that nobody takes (`Pass Exec`),
//! `DURWARD_BIN` is another agent, and `DURWARD_BEHAVIOUR_MIB` what it may use.
//! As root each caller is one user or another and the agent is in a memory cgroup. Otherwise all of them are one user, who has
//! one entry; then the agent's health is looked at, and nobody is told from anybody.
//!
//! A finding is printed with what its caller did last, and the exit status is 1.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench, not the agent"
)]

#[path = "behaviour/action.rs"]
mod action;
#[path = "behaviour/agent.rs"]
mod agent;
#[path = "behaviour/caller.rs"]
mod caller;
#[path = "behaviour/calls.rs"]
mod calls;
#[path = "confined.rs"]
mod confined;
#[path = "behaviour/connection.rs"]
mod connection;
#[allow(dead_code, clippy::allow_attributes, reason = "a part of it is used")]
#[path = "../it/frames.rs"]
mod frames;
#[path = "behaviour/oracle.rs"]
mod oracle;
#[path = "behaviour/run.rs"]
mod run;
#[path = "wire.rs"]
mod wire;

use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How long anything may take that must happen. Callers' sockets linger longer.
const PATIENCE: Duration = Duration::from_secs(15);

/// The steps, and the seed, of the run that is a test.
const TEST: (u64, u64) = (300, 1);

/// Milliseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("64 bits")
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn main() {
    caller::Caller::run_if_told();
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    if filter.is_some_and(|filter| !"behaviour".contains(&filter)) {
        return;
    }
    let seed = if is_bench { now() } else { TEST.1 };
    let seed = setting("DURWARD_BEHAVIOUR_SEED").unwrap_or(seed);
    let steps = if is_bench { u64::MAX } else { TEST.0 };
    let steps = setting("DURWARD_BEHAVIOUR_STEPS").unwrap_or(steps);
    let time =
        Duration::from_secs(setting("DURWARD_BEHAVIOUR_SECONDS").unwrap_or(if is_bench { 60 } else { 600 }));
    let mib = setting("DURWARD_BEHAVIOUR_MIB").unwrap_or(if cfg!(debug_assertions) { 96 } else { 24 });
    let binary =
        std::env::var_os("DURWARD_BIN").map_or_else(|| env!("CARGO_BIN_EXE_durward").into(), PathBuf::from);
    println!("behaviour: seed {seed}, {} with {mib} MiB", binary.display());
    let without = std::env::var("DURWARD_BEHAVIOUR_WITHOUT").unwrap_or_default();
    let without = without.split_whitespace().map(str::to_owned).collect();
    let run = run::Run::start(agent::Agent::start(&binary, mib << 20), seed, without);
    let outcome = run.go(steps, time);
    if outcome.findings > 0 {
        println!("DURWARD_BEHAVIOUR_SEED={seed} DURWARD_BEHAVIOUR_STEPS={} replays it", outcome.steps);
        std::process::exit(1);
    }
}
