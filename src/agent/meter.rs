//! What the agent uses of the node: its cgroup's memory, and processor time.
//!
//! The kernel adds up what is in a cgroup's memory when it is asked, which may take a while, so a thread of its own asks;
//! who needs the figures takes the last ones. Processor time is looked at where nothing waits for anybody.
//!
//! What can be dropped does not count as used: pages of files. What the kernel keeps of the names of callers' processes it may
//! not be able to drop, so that callers [hold](crate::limits::names) it. It does not say how much that is: it is what is left of its
//! part when all else that it may keep for this process is reckoned as its most.

use std::{
    io,
    path::Path,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, Thread},
    time::{Duration, Instant},
};

use tokio::{sync::Notify, time::sleep};

use crate::{
    limits::{
        Gate, Limits,
        names::KeptOfNames,
        processor::{ProcessorTime, ProcessorUse, Spell},
        room::Short,
    },
    os::{
        cgroup::{ChargedParts, OwnCgroup},
        clock::{processor_time, sleep_to_beat},
        membarrier::{KEPT_OF_FILE, grace_period},
        open_files::open_files,
        run_delay::RunDelay,
    },
    peer::{ConnectionStats, pins::FoundNames},
};

/// How often memory is looked at; and how often while nobody calls.
const EVERY: Duration = Duration::from_millis(250);
const SELDOM: Duration = Duration::from_secs(1);
/// For so many looks the cgroup stays the agent's own when somebody else was seen in it: a probe that an orchestrator runs.
const ALONE_FOR: u32 = 40;
/// How often processor time is looked at; and how often while nobody calls and next to none is used. The first call ends that.
const OFTEN: Duration = Duration::from_millis(50);
/// One part in so many of the time is next to none.
const A_LITTLE: u32 = 20;
/// How the names of the threads that serve callers begin: the runtime's own word.
const SERVING: &str = "tokio-rt";
/// Of a connection there are two files: its socket and its process's.
const FILES_OF_CONNECTION: u64 = 2;
/// What the kernel keeps of this process without callers at most, in bytes: its threads' stacks, its page tables, its own files.
/// Measured: 1.2 MiB.
const OF_PROCESS: u64 = 2 << 20;
/// Fewer bytes of names are not worth a wait for a grace period.
const WORTH_A_WAIT: u64 = 256 * 1024;
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
pub(super) struct MemoryMeter {
    metered: Option<Arc<MeteredCgroup>>,
    pace: Arc<LookPace>,
}

/// How often there is a look at what the agent uses.
#[derive(Debug, Default)]
struct LookPace {
    /// Nobody calls.
    quiet: AtomicBool,
    roused: Notify,
}

impl LookPace {
    fn pause(&self) -> Duration {
        if self.quiet.load(Relaxed) { SELDOM } else { EVERY }
    }
}

#[derive(Debug)]
struct MeteredCgroup {
    cgroup: OwnCgroup,
    gate: Gate,
    connections: Arc<ConnectionStats>,
    /// As they were last seen.
    alone: AtomicBool,
    files: AtomicU64,
    kernel: AtomicU64,
    thread: OnceLock<Thread>,
}

/// What there is that the kernel keeps something of.
#[derive(Clone, Copy, Debug)]
struct KernelUse {
    files: u64,
    /// Bytes that connections hold, unread answers in the kernel among them.
    held: u64,
}

impl KernelUse {
    /// What of the kernel's part is neither for these nor the process's own: names that it has looked up. No more than there is of
    /// them, whatever callers do.
    fn names(self, parts: ChargedParts) -> KeptOfNames {
        let of_files = self.files.saturating_mul(KEPT_OF_FILE);
        match parts.reclaimable {
            Some(slabs) => {
                let names = slabs.min(parts.kernel).saturating_sub(of_files);
                KeptOfNames { least: names, most: names }
            }
            None => {
                let most = parts.kernel.saturating_sub(of_files).saturating_sub(OF_PROCESS);
                KeptOfNames { least: most.saturating_sub(self.held), most }
            }
        }
    }
}

impl MeteredCgroup {
    /// Looks anew. `None` where the kernel does not say.
    fn look(&self) -> Option<ChargedParts> {
        let parts = self.cgroup.parts()?;
        self.files.store(parts.droppable, Relaxed);
        self.kernel.store(parts.kernel, Relaxed);
        Some(parts)
    }

    /// What connections hold.
    fn held(&self) -> u64 {
        let memory = self.gate.memory();
        memory.held.saturating_sub(memory.names)
    }

    /// What of the kernel's part are names.
    fn names(&self, parts: ChargedParts) -> Option<KeptOfNames> {
        let use_now = KernelUse { files: open_files()?, held: self.held() };
        let names = use_now.names(parts);
        let ended = &self.connections.ended;
        ended.ask(names.most >= WORTH_A_WAIT || self.gate.may_hold_names());
        for FoundNames { caller, held, unknown } in ended.look() {
            self.gate.found_names(caller, held, unknown);
        }
        ended.forget(self.gate.names_forgotten(), |caller| self.gate.family_of(caller));
        if names.most < WORTH_A_WAIT {
            return None;
        }
        // Of what was closed before, the kernel may keep something yet.
        let accepted = self.connections.accepted();
        grace_period();
        let parts = self.cgroup.parts()?;
        let came = self.connections.accepted().saturating_sub(accepted);
        let files = use_now.files.saturating_add(came.saturating_mul(FILES_OF_CONNECTION));
        let held = use_now.held.max(self.held());
        Some(KernelUse { files, held }.names(parts))
    }
}

impl MemoryMeter {
    /// Starts the thread, where this process has a cgroup that can be read.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start(gate: &Gate, connections: &Arc<ConnectionStats>) -> io::Result<Self> {
        let cgroup = OwnCgroup::of(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup"));
        let metered = cgroup.map(|cgroup| {
            Arc::new(MeteredCgroup {
                cgroup,
                gate: gate.clone(),
                connections: Arc::clone(connections),
                alone: AtomicBool::new(false),
                files: AtomicU64::new(0),
                kernel: AtomicU64::new(0),
                thread: OnceLock::new(),
            })
        });
        let pace = Arc::new(LookPace::default());
        if let Some(metered) = &metered {
            let (watched, pace) = (Arc::downgrade(metered), Arc::clone(&pace));
            let thread = thread::Builder::new()
                .name("memory".to_owned())
                .stack_size(STACK)
                .spawn(move || watch(&watched, &pace))?;
            drop(metered.thread.set(thread.thread().clone()));
        }
        Ok(Self { metered, pace })
    }

    /// Looks less often from now on.
    fn rest(&self) {
        self.pace.quiet.store(true, Relaxed);
    }

    /// Looks at once, and as often as ever from now on.
    fn rouse(&self) {
        if !self.pace.quiet.swap(false, Relaxed) {
            return;
        }
        self.pace.roused.notify_one();
        if let Some(thread) = self.metered.as_ref().and_then(|metered| metered.thread.get()) {
            thread.unpark();
        }
    }

    /// Waits until memory is to be looked at again: for so long, or until somebody calls where nobody did. For one at a time.
    /// Returns whether nobody did.
    pub(super) async fn next_look(&self) -> bool {
        let quiet = self.pace.quiet.load(Relaxed);
        tokio::select! {
            () = sleep_to_beat(self.pace.pause()) => {}
            () = self.pace.roused.notified() => {}
        }
        quiet
    }

    /// What is charged to the cgroup by now, if it is the agent's alone.
    pub(super) fn charged(&self) -> Option<ChargedMemory> {
        let metered = self.metered.as_ref().filter(|metered| metered.alone.load(Relaxed))?;
        let [files, kernel] = [&metered.files, &metered.kernel].map(|known| known.load(Relaxed));
        Some(ChargedMemory { used: metered.cgroup.charged()?.saturating_sub(files), kernel })
    }
}

fn watch(metered: &Weak<MeteredCgroup>, pace: &LookPace) {
    let mut others = ALONE_FOR;
    while let Some(metered) = metered.upgrade() {
        others = if metered.cgroup.is_alone() { 0 } else { others.saturating_add(1) };
        let parts = metered.look().filter(|_| others < ALONE_FOR);
        metered.alone.store(parts.is_some(), Relaxed);
        // What is charged for others says nothing about callers.
        let names = parts.and_then(|parts| metered.names(parts));
        metered.gate.names_are(names.unwrap_or_default());
        drop(metered);
        thread::park_timeout(pace.pause());
    }
}

/// Says for ever whether processor time is short, and has the meter look less often while nobody calls.
pub(super) async fn keep_time(limits: Limits, gate: Gate, meter: MemoryMeter) {
    let mut time = ProcessorTime::default();
    // Real time, whatever clock a test moves: so is what is used of it.
    let delay = RunDelay::of_threads(SERVING);
    // What it would have used counts: on a busy node it gets less, and would never know that it is behind.
    let wanted = || processor_time().saturating_add(delay.total());
    let look = || (Instant::now(), wanted(), processor_time(), limits.served());
    let mut before = look();
    let mut quiet = false;
    loop {
        if quiet {
            meter.rest();
            limits.room().set_processor_use(ProcessorUse::default());
            let used = processor_time();
            tokio::select! {
                () = sleep_to_beat(SELDOM) => {
                    if processor_time().saturating_sub(used) <= SELDOM / A_LITTLE {
                        continue;
                    }
                }
                () = limits.stirred() => {}
            }
            // How long threads waited meanwhile is nobody's: next to nothing was done.
            before = look();
        }
        meter.rouse();
        sleep(OFTEN).await;
        let now = look();
        let spell = Spell {
            elapsed: now.0.saturating_duration_since(before.0),
            used: now.1.saturating_sub(before.1),
            ran: now.2.saturating_sub(before.2),
            served: now.3.saturating_sub(before.3),
            wanting: gate.wanting().saturating_add(limits.wanting()),
            lacked: limits.lacked_spare(),
        };
        before = now;
        quiet = spell.served == 0 && spell.wanting == 0 && spell.used <= spell.elapsed / A_LITTLE;
        let short = time.look(gate.processor_share(), spell);
        quiet &= !short;
        limits.set_spare(time.spare());
        let lately = time.lately();
        limits.room().set_processor_use(lately);
        if short != limits.room().is_short(Short::Processor) {
            if short {
                limits.room().processor_is_short_by(lately);
            }
            limits.room().set(Short::Processor, short);
            tracing::debug!(short, used = ?spell.used, of = ?spell.elapsed, spell.wanting, "processor time");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const MIB: u64 = 1 << 20;

    #[test]
    fn names_are_what_nothing_else_can_be() {
        for (case, kernel, reclaimable, files, held, [least, most]) in [
            ("of the kernel's part", 10 * MIB, None, 0, 0, [8 * MIB; 2]),
            ("no more than its own", 2 * MIB, None, 0, 0, [0; 2]),
            ("what is held may be there", 10 * MIB, None, 0, 5 * MIB, [3 * MIB, 8 * MIB]),
            ("and more than that", 10 * MIB, None, 0, 50 * MIB, [0, 8 * MIB]),
            ("files are there", 10 * MIB, None, 2 * KIB, 0, [5 * MIB; 2]),
            ("and may be all", 10 * MIB, None, 20 * KIB, 0, [0; 2]),
            ("of slabs", 10 * MIB, Some(6 * MIB), 0, 20 * MIB, [6 * MIB; 2]),
            ("with files", 10 * MIB, Some(6 * MIB), 2 * KIB, 0, [3 * MIB; 2]),
            ("which may be all", 10 * MIB, Some(6 * MIB), 20 * KIB, 0, [0; 2]),
            ("more slabs than there is of the kernel", 4 * MIB, Some(6 * MIB), 0, 0, [4 * MIB; 2]),
            ("the kernel does not say", 0, None, 0, 0, [0; 2]),
        ] {
            let parts = ChargedParts { droppable: 0, kernel, reclaimable };
            assert_eq!(KernelUse { files, held }.names(parts), KeptOfNames { least, most }, "{case}");
        }
    }
}
