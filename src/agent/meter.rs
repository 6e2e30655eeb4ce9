//! What the agent uses of the node: its cgroup's memory, and processor time.
//!
//! The kernel adds up a cgroup's memory when it is asked, which may take a while, so a thread of its own asks; who needs
//! the figures takes the last ones. Processor time is looked at where nothing waits for anybody.

use std::{
    io,
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::time::MissedTickBehavior;

use crate::{
    limits::{
        Gate, Limits,
        processor::{ProcessorTime, Spell},
        room::Short,
    },
    os::{
        cgroup::{ChargedMemory, OwnCgroup},
        clock::processor_time,
    },
};

/// How often memory is looked at.
const EVERY: Duration = Duration::from_millis(250);
/// For so many looks the cgroup stays the agent's own when somebody else was seen in it: a probe that an orchestrator runs.
const ALONE_FOR: u32 = 40;
/// How often processor time is looked at.
const OFTEN: Duration = Duration::from_millis(50);
/// What the thread may need of a stack, in bytes.
const STACK: usize = 64 * 1024;

/// Nothing is known.
const UNKNOWN: u64 = u64::MAX;

/// The memory of the agent's own cgroup, as it was last seen. Cheap to clone; its thread ends soon after the last one.
#[derive(Clone, Debug)]
pub(super) struct MemoryMeter(Arc<LastSeen>);

#[derive(Debug)]
struct LastSeen {
    used: AtomicU64,
    kernel: AtomicU64,
}

impl MemoryMeter {
    /// Starts the thread, where this process has a cgroup that can be read.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start() -> io::Result<Self> {
        let meter = Self(Arc::new(LastSeen { used: AtomicU64::new(UNKNOWN), kernel: AtomicU64::new(0) }));
        if let Some(cgroup) = OwnCgroup::of(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup")) {
            let seen = Arc::downgrade(&meter.0);
            thread::Builder::new()
                .name("memory".to_owned())
                .stack_size(STACK)
                .spawn(move || watch(&cgroup, &seen))?;
        }
        Ok(meter)
    }

    /// What is charged to the cgroup, if it is the agent's alone.
    pub(super) fn charged(&self) -> Option<ChargedMemory> {
        let used = self.0.used.load(Relaxed);
        let kernel = self.0.kernel.load(Relaxed);
        (used != UNKNOWN).then_some(ChargedMemory { used, kernel })
    }
}

fn watch(cgroup: &OwnCgroup, seen: &Weak<LastSeen>) {
    let mut others = ALONE_FOR;
    while let Some(seen) = seen.upgrade() {
        others = if cgroup.is_alone() { 0 } else { others.saturating_add(1) };
        let charged = cgroup.charged().filter(|_| others < ALONE_FOR);
        let ChargedMemory { used, kernel } = charged.unwrap_or(ChargedMemory { used: UNKNOWN, kernel: 0 });
        seen.kernel.store(kernel, Relaxed);
        seen.used.store(used, Relaxed);
        drop(seen);
        thread::park_timeout(EVERY);
    }
}

/// Says for ever whether processor time is short.
pub(super) async fn keep_time(limits: Limits, gate: Gate) {
    let mut every = tokio::time::interval(OFTEN);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut time = ProcessorTime::default();
    // Real time, whatever clock a test moves: so is what is used of it.
    let mut before = (Instant::now(), processor_time(), limits.served());
    loop {
        every.tick().await;
        let now = (Instant::now(), processor_time(), limits.served());
        let spell = Spell {
            elapsed: now.0.saturating_duration_since(before.0),
            used: now.1.saturating_sub(before.1),
            served: now.2.saturating_sub(before.2),
            wanting: gate.wanting().saturating_add(limits.wanting()),
        };
        before = now;
        let short = time.look(gate.processor_share(), spell);
        if short != limits.room().is_short(Short::Processor) {
            limits.room().set(Short::Processor, short);
            tracing::debug!(short, used = ?spell.used, of = ?spell.elapsed, spell.wanting, "processor time");
        }
    }
}
