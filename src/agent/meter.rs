//! What the agent uses of the node: its cgroup's memory, and processor time.
//!
//! The kernel adds up what is in a cgroup's memory when it is asked, which may take a while, so a thread of its own asks;
//! who needs the figures takes the last ones. Processor time is looked at where nothing waits for anybody.

use std::{
    io,
    path::Path,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
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
        cgroup::{ChargedParts, OwnCgroup},
        clock::processor_time,
        run_delay::RunDelay,
    },
};

/// How often memory is looked at.
const EVERY: Duration = Duration::from_millis(250);
/// For so many looks the cgroup stays the agent's own when somebody else was seen in it: a probe that an orchestrator runs.
const ALONE_FOR: u32 = 40;
/// How often processor time is looked at.
const OFTEN: Duration = Duration::from_millis(50);
/// How the names of the threads that serve callers begin: the runtime's own word.
const SERVING: &str = "tokio-rt";
/// What the thread may need of a stack, in bytes.
const STACK: usize = 64 * 1024;

/// What is charged to a cgroup, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ChargedMemory {
    /// Without what the kernel can drop.
    pub(super) used: u64,
    /// Of this, the kernel's part.
    pub(super) kernel: u64,
}

/// The memory of the agent's own cgroup. Cheap to clone; its thread ends soon after the last one.
#[derive(Clone, Debug)]
pub(super) struct MemoryMeter(Option<Arc<MeteredCgroup>>);

#[derive(Debug)]
struct MeteredCgroup {
    cgroup: OwnCgroup,
    /// As they were last seen.
    alone: AtomicBool,
    droppable: AtomicU64,
    kernel: AtomicU64,
}

impl MemoryMeter {
    /// Starts the thread, where this process has a cgroup that can be read.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start() -> io::Result<Self> {
        let cgroup = OwnCgroup::of(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
        let metered = cgroup.map(|cgroup| {
            Arc::new(MeteredCgroup {
                cgroup,
                alone: AtomicBool::new(false),
                droppable: AtomicU64::new(0),
                kernel: AtomicU64::new(0),
            })
        });
        if let Some(metered) = &metered {
            let metered = Arc::downgrade(metered);
            thread::Builder::new()
                .name("memory".to_owned())
                .stack_size(STACK)
                .spawn(move || watch(&metered))?;
        }
        Ok(Self(metered))
    }

    /// What is charged to the cgroup by now, if it is the agent's alone.
    pub(super) fn charged(&self) -> Option<ChargedMemory> {
        let metered = self.0.as_ref().filter(|metered| metered.alone.load(Relaxed))?;
        let used = metered.cgroup.charged()?.saturating_sub(metered.droppable.load(Relaxed));
        Some(ChargedMemory { used, kernel: metered.kernel.load(Relaxed) })
    }
}

fn watch(metered: &Weak<MeteredCgroup>) {
    let mut others = ALONE_FOR;
    while let Some(metered) = metered.upgrade() {
        others = if metered.cgroup.is_alone() { 0 } else { others.saturating_add(1) };
        let parts = metered.cgroup.parts();
        let ChargedParts { droppable, kernel } = parts.unwrap_or_default();
        metered.droppable.store(droppable, Relaxed);
        metered.kernel.store(kernel, Relaxed);
        metered.alone.store(parts.is_some() && others < ALONE_FOR, Relaxed);
        drop(metered);
        thread::park_timeout(EVERY);
    }
}

/// Says for ever whether processor time is short.
pub(super) async fn keep_time(limits: Limits, gate: Gate) {
    let mut every = tokio::time::interval(OFTEN);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut time = ProcessorTime::default();
    // Real time, whatever clock a test moves: so is what is used of it.
    let delay = RunDelay::of_threads(SERVING);
    // What it would have used counts: on a busy node it gets less, and would never know that it is behind.
    let wanted = || processor_time().saturating_add(delay.total());
    let mut before = (Instant::now(), wanted(), limits.served());
    loop {
        every.tick().await;
        let now = (Instant::now(), wanted(), limits.served());
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
