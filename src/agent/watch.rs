//! What the agent does every quarter of a second: looks how much memory it uses and acts on it, and says in
//! the log who is being refused.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use super::gate::Means;
use crate::{
    api::Journal,
    config::Config,
    limits::{
        self, CallerKey, Limits,
        budget::{self, Accounted, Pressure},
        report::Event,
    },
    os::heap,
    store::{JwtCache, X509Cache},
    telemetry::registry::Label as _,
};

const EVERY: Duration = Duration::from_millis(250);

/// Caches that were emptied are emptied again after so many looks, or when memory is shorter than then, and
/// not at each look: what is made anew costs its caller a signature.
const TICKS_PER_SHRINK: u32 = 40;

/// Log lines about refusals and the gauges are worth a look this often.
const TICKS_PER_REPORT: u32 = 4;

/// What is looked after.
pub(super) struct Watch {
    pub(super) limits: Limits,
    pub(super) gate: limits::Gate,
    pub(super) memory: watch::Receiver<Budget>,
    pub(super) evicted: watch::Sender<Option<CallerKey>>,
    pub(super) x509: Arc<X509Cache>,
    pub(super) jwt: Arc<JwtCache>,
    pub(super) journal: Arc<Journal>,
}

/// The memory budget in force.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    pub(super) settings: budget::MemorySettings,
    /// Bytes; `None` for no budget.
    pub(super) bytes: Option<u64>,
}

impl Budget {
    /// What `config` says, of what the machine gives.
    pub(super) fn of(config: &Config, means: Means) -> Self {
        let settings = config.ratelimit.memory;
        Self { settings, bytes: settings.budget(means.cgroup) }
    }
}

impl Watch {
    /// Looks for ever.
    pub(super) async fn run(self) {
        let mut every = tokio::time::interval(EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut pressure = Pressure::None;
        let mut tick = 0_u32;
        // When, and how short memory was.
        let mut emptied: Option<(u32, Pressure)> = None;
        loop {
            every.tick().await;
            let emptied_at = emptied.map_or(Pressure::None, |(at, then)| {
                if tick.wrapping_sub(at) < TICKS_PER_SHRINK { then } else { Pressure::None }
            });
            if self.relieve(&mut pressure, emptied_at) {
                emptied = Some((tick, pressure));
            }
            tick = tick.wrapping_add(1);
            if tick.is_multiple_of(TICKS_PER_REPORT) {
                self.report();
            }
        }
    }

    /// Does what the budget asks for. Each step does what those before it do; caches are emptied when memory
    /// is shorter than `emptied_at`. Returns whether they were.
    fn relieve(&self, pressure: &mut Pressure, emptied_at: Pressure) -> bool {
        let Budget { settings, bytes } = *self.memory.borrow();
        // Without a budget there is nothing to look for.
        let look = |before| match bytes.and_then(|budget| Some((budget, heap::resident()?))) {
            Some((budget, used)) => settings.next(before, used, budget),
            None => Pressure::None,
        };
        let before = *pressure;
        let mut now = look(before);
        let empty = now > emptied_at;
        if empty {
            self.jwt.clear();
            self.x509.shrink();
            self.limits.shrink();
        }
        if now >= Pressure::ShrinkCaches {
            heap::trim();
            // What shrinking gave back counts.
            now = look(before).max(Pressure::ShrinkCaches);
        }
        self.gate.set_pressure(now);
        let heavy = |caller: &(CallerKey, u32)| bytes.is_none_or(|budget| budget::is_heavy(caller.1, budget));
        let heaviest = match now {
            Pressure::CloseHeaviest => self.gate.to_cut_off().filter(heavy).map(|(caller, _)| caller),
            Pressure::None | Pressure::ShrinkCaches | Pressure::RefuseNew => None,
        };
        self.evicted.send_if_modified(|evicted| std::mem::replace(evicted, heaviest) != heaviest);
        if now != *pressure {
            let caller = heaviest.map(|caller| caller.to_string()).unwrap_or_default();
            match now {
                Pressure::None => tracing::info!("memory is within the budget again"),
                Pressure::ShrinkCaches => tracing::info!("memory runs short: caches are emptied"),
                Pressure::RefuseNew => {
                    tracing::warn!("memory runs short: callers get no further connections")
                }
                Pressure::CloseHeaviest if heaviest.is_none() => {
                    tracing::warn!(
                        "memory runs out: nobody gets a connection, and no caller holds enough to be cut off"
                    )
                }
                Pressure::CloseHeaviest => {
                    tracing::warn!(caller, "memory runs out: the heaviest caller is cut off")
                }
            }
            *pressure = now;
        }
        empty
    }

    fn report(&self) {
        self.journal.settle();
        for event in self.limits.events() {
            match event {
                Event::RefusalStarted { stage, name } => {
                    tracing::warn!(stage = stage.text(), key = %name, "is being refused");
                }
                Event::RefusalEnded { stage, name, count } => {
                    tracing::info!(stage = stage.text(), key = %name, count, "is refused no more");
                }
                Event::RefusalsUnlisted { count } => {
                    tracing::warn!(count, "refusals of further keys, which are not listed one by one");
                }
            }
        }
        let (callers, identities) = self.limits.keys();
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        self.limits.account(Accounted {
            connections: u64::from(self.gate.connections()),
            keys: count(callers + identities + self.gate.keys()),
            jwt_svids: count(self.jwt.len()),
            x509_svids: count(self.x509.counts().cached),
        });
    }
}
