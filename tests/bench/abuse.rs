//! Callers that abuse the agent, and polite ones beside them: what the agent needs, whether it lives, and what the polite ones
//! notice.
//!
//! `cargo bench --bench abuse [-- SCENARIO ..]`. In the environment:
//!
//! | variable | what | default |
//! |---|---|---|
//! | `DURWARD_ABUSE_SECONDS` | how long a scenario lasts; the target says 60 and more | 5 |
//! | `DURWARD_ABUSE_WORKERS` | processes of each abuser where the crowd is the abuse | 300 |
//! | `DURWARD_ABUSE_CALLERS` | distinct callers one after the other; the target says 1,000,000 | 20,000 |
//! | `DURWARD_ABUSE_KEYS` | the same on the tables alone | 1,000,000 |
//! | `DURWARD_ABUSE_MIB` | what the agent may use, as a memory cgroup | 24 |
//! | `DURWARD_ABUSE_NICE` | the agent's priority; 0 is that of all others | -10, as the unit has it |
//! | `DURWARD_ABUSE_BASELINE` | 0 leaves the baseline out | 1 |
//! | `DURWARD_ABUSE_ENTRIES` | with a real SPIRE Server that has so many entries; 0 is the embedded issuer | 0 |
//! | `DURWARD_BIN` | another agent | this one |
//!
//! As root each caller is a user of its own and the agent runs in a cgroup; otherwise all callers are one user, so that the
//! polite one is refused with the others, and the bench says so.
//!
//! The polite user has four processes: one connects anew for each call and waits for it, one connects without waiting, one calls
//! on a connection that it keeps, each 20 times a second; and one has seven streams on as many connections. The baseline is
//! the p99 of the first while as many processes burn as much processor time as the abusers did, without calling: spinning, or
//! where the abusers fork, forking. For who connects and closes, the floor is a loop that accepts and closes, in the same run.
//! Each worker is this program again, told its part in the environment.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::exit,
    clippy::as_conversions,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench, not the agent"
)]
#![allow(dead_code, clippy::allow_attributes, reason = "a part of what benches share is used")]

#[path = "abuse/calls.rs"]
mod calls;
#[path = "abuse/close.rs"]
mod close;
#[path = "confined.rs"]
mod confined;
#[path = "../it/frames.rs"]
mod frames;
#[path = "abuse/part.rs"]
mod part;
#[path = "abuse/pins.rs"]
mod pins;
#[path = "abuse/polite.rs"]
mod polite;
#[path = "raw.rs"]
mod raw;
#[path = "abuse/scenario.rs"]
mod scenario;
#[path = "spire.rs"]
mod spire;
#[path = "abuse/stage.rs"]
mod stage;
#[path = "abuse/storm.rs"]
mod storm;
#[path = "abuse/tables.rs"]
mod tables;
#[path = "abuse/unread.rs"]
mod unread;
#[path = "wire.rs"]
mod wire;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::{
    sys::resource::{Resource, getrlimit, setrlimit},
    unistd::geteuid,
};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// Since 1970.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970")
}

fn row(cells: &[String]) {
    println!("| {} |", cells.join(" | "));
}

fn main() {
    part::Part::play_if_told();
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a limit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("the hard limit");
    let asked: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    if !geteuid().is_root() {
        println!("not root: all callers are one user, so the polite one shares the abusers' fate");
    }
    let is_asked = |name: &str| asked.is_empty() || asked.iter().any(|it| it == name);
    let upstream = stage::upstream(setting("DURWARD_ABUSE_ENTRIES", 0));
    stage::head();
    for scenario in scenario::ALL.iter().filter(|it| is_asked(it.name)) {
        // Entries that a scenario brings are not a server's.
        if upstream.is_none() || !scenario.blocks.contains("entry \"") {
            stage::run(scenario, upstream.as_ref());
        }
    }
    if is_asked("table") {
        tables::table(setting("DURWARD_ABUSE_KEYS", 1_000_000));
    }
}
