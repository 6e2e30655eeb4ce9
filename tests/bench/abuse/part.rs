//! What a worker's process is told, and what it has to say at its end.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike as _,
};
use serde::{Deserialize, Serialize};

use super::{calls, close, frames::Called, now, pins, polite, storm, unread};

/// What it begins with, as JSON in its environment.
pub(crate) const PART: &str = "DURWARD_ABUSE_PART";
/// How long a call may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a worker is to do. As each is used, so it is explained where it is played.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Role {
    /// Spins, until it has used its share of the processors; `number` is millionths of one.
    Burn,
    /// The same, by making processes.
    ForkBurn,
    Storm,
    Fork,
    Pin,
    Pinned,
    Once,
    Nothing,
    Idle,
    SlowRead,
    Strangers,
    Limited,
    BigJwt,
    Groups,
    ConnectAndClose,
    ConnectAndCloseAtOnce,
    Floor,
    Hot(calls::Kind),
    Validate,
    Shared,
    Polite(polite::Manner),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) role: Role,
    pub(crate) socket: PathBuf,
    /// Since 1970.
    pub(crate) until: Duration,
    /// What the role makes of it.
    pub(crate) number: u64,
    /// The place among those with this role.
    pub(crate) nth: u64,
}

impl Part {
    /// A worker's process ends here; any other goes on.
    pub(crate) fn play_if_told() {
        let Ok(part) = std::env::var(PART) else { return };
        let part: Self = serde_json::from_str(&part).expect("a part");
        let mut tally = Tally::default();
        let began = Instant::now();
        match part.role {
            Role::Polite(manner) => polite::play(&part, manner),
            Role::Floor => close::accept_and_close(&part.socket),
            Role::Once => std::process::exit(storm::once(&part) as i32),
            Role::Nothing => std::process::exit(0),
            Role::Burn | Role::ForkBurn => part.burn(),
            Role::Storm => storm::storm(&part, &mut tally),
            Role::Fork => storm::fork(&part, &mut tally),
            Role::Pin => pins::pin(&part, &mut tally),
            Role::Pinned => pins::pinned(&part),
            Role::Idle => storm::idle(&part, &mut tally),
            Role::SlowRead => storm::slow_read(&part, &mut tally),
            Role::Strangers => storm::strangers(&part, &mut tally),
            Role::Limited => storm::limited(&part, &mut tally),
            Role::BigJwt => unread::big_jwt(&part, &mut tally),
            Role::Groups => unread::groups(&part, &mut tally),
            Role::ConnectAndClose | Role::ConnectAndCloseAtOnce => {
                close::connect_and_close(&part, &mut tally)
            }
            Role::Hot(kind) => calls::hot(&part, kind, &mut tally),
            Role::Validate => calls::validate(&part, &mut tally),
            Role::Shared => calls::shared(&part, &mut tally),
        }
        (tally.cpu, tally.took) = (cpu(), began.elapsed());
        println!("{}", serde_json::to_string(&tally).expect("JSON"));
        std::process::exit(0);
    }

    /// Whether there is time left, and an agent.
    pub(crate) fn goes_on(&self) -> bool {
        now() < self.until && self.socket.exists()
    }

    /// This program again.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env(PART, serde_json::to_string(self).expect("JSON"));
        command
    }

    /// Work without calling, as greedily as there is work: until it has used its share, and again as soon as it has not.
    fn burn(&self) {
        let me = std::env::current_exe().expect("this program");
        let nothing = Self { role: Role::Nothing, ..self.clone() };
        let share = self.number.max(1) as f64 / 1e6;
        let started = (Instant::now(), cpu());
        while now() < self.until {
            let due = (cpu() - started.1).div_f64(share);
            let ahead = due.saturating_sub(started.0.elapsed());
            if !ahead.is_zero() {
                std::thread::sleep(ahead.min(self.until.saturating_sub(now())));
            } else if self.role == Role::Burn {
                let spun = cpu() + Duration::from_micros(200);
                while cpu() < spun {}
            } else {
                nothing.command(&me).status().expect("a process");
            }
        }
    }
}

/// What a worker did. One line of a pipe.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    pub(crate) answered: u64,
    pub(crate) refused: u64,
    pub(crate) closed: u64,
    pub(crate) silent: u64,
    cpu: Duration,
    /// From its first call to the end of its last.
    pub(crate) took: Duration,
}

impl Tally {
    pub(crate) fn count(&mut self, called: Called) {
        match called {
            Called::Answered => self.answered += 1,
            Called::Refused => self.refused += 1,
            Called::Closed => self.closed += 1,
            Called::Silent => self.silent += 1,
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.refused += other.refused;
        self.closed += other.closed;
        self.silent += other.silent;
        self.cpu += other.cpu;
        self.took = self.took.max(other.took);
    }

    /// Processor time.
    pub(crate) fn cpu(&self) -> Duration {
        self.cpu
    }

    pub(crate) fn all(&self) -> u64 {
        self.answered + self.refused + self.closed + self.silent
    }
}

/// Processor time of this process and those that it made.
fn cpu() -> Duration {
    let of = |who| {
        let usage = getrusage(who).expect("what was used");
        Duration::from_micros((usage.user_time() + usage.system_time()).num_microseconds() as u64)
    };
    of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN)
}
