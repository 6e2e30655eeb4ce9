//! What a decision of the limits costs: nanoseconds and allocations, with 100,000 keys known; and what it costs to find out whom to
//! charge for a connection.
//!
//! `cargo bench --bench admission` prints the table, `-- WORD..` those rows that have one of these words. Times are CPU time of the thread, the lowest and the median of several
//! rounds over keys in random order, so that most look-ups miss the caches of the processor, as they do between calls that do
//! real work. The SPIFFE IDs were read just before, as in a call that was just authorized.

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::as_conversions,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench prints its table, and may stop at what it did not expect"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    hint::black_box,
    os::unix::net::{UnixListener, UnixStream},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use durward::{
    identity::SpiffeId,
    limits::{
        CallerKey, Gate, GatePlan, GateRule, GateRules, GateSettings, LimitSettings, Limits, Method,
        NodeQuota, TableSize,
        bucket::{Per, Quota},
        caller::Caller,
        method::PerMethod,
        policy::Layers,
        rule::{Costs, Limit, Rule},
        schedule::Schedule,
    },
    os::clock::Clock,
    peer::{
        Arrival,
        cgroup::{KubeletRoot, KubernetesMode, PodOrUid},
    },
    telemetry::registry::Registry,
};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed on to the system's allocator as it came; the counter is no memory of anybody's.
#[expect(unsafe_code, reason = "an allocator cannot be written without; in this bench alone")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is ours.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is ours.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const KEYS: u32 = 100_000;
const ROUNDS: usize = 9;
const METHOD: Method = Method::FetchJwtSvid;

#[derive(Clone, Copy)]
struct Uid(u32);

impl Caller for Uid {
    fn caller_key(&self) -> CallerKey {
        CallerKey::Pod((u128::from(self.0) << 96 | u128::from(self.0)).to_be_bytes())
    }
}

/// A fixed disorder: the same in each run.
fn order(n: u32) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n).collect();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for at in (1..order.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(at, (state >> 33) as usize % (at + 1));
    }
    order
}

fn identities(n: u32) -> Vec<SpiffeId> {
    let id = |at| format!("spiffe://example.org/ns/production/sa/service-{at:06}");
    (0..n).map(|at| SpiffeId::parse(&id(at)).unwrap()).collect()
}

/// Prints the lowest and the median of the rounds, per decision, and the allocations of all of them.
fn measure(case: &str, decisions: &[u32], decide: impl FnMut(u32)) {
    measure_after(|_| (), case, decisions, decide);
}

/// As [`measure`], with something done before each few decisions that is not measured.
fn measure_after(mut prepare: impl FnMut(u32), case: &str, decisions: &[u32], mut decide: impl FnMut(u32)) {
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench").peekable();
    if words.peek().is_some() && !words.any(|word| case.contains(&word)) {
        return;
    }
    // The bucket of the node fills with a million tokens a second, and a round takes more.
    std::thread::sleep(Duration::from_secs(1));
    let mut nanos = [0.0; ROUNDS];
    let looks = 10_000;
    let started = cpu_nanos();
    (0..looks).for_each(|_| {
        black_box(cpu_nanos());
    });
    let clock = (cpu_nanos() - started) / f64::from(looks);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for round in &mut nanos {
        // So that it stays full enough, however fast the machine is.
        std::thread::sleep(Duration::from_millis(200));
        for few in decisions.chunks(50) {
            few.iter().for_each(|at| prepare(*at));
            let started = cpu_nanos();
            few.iter().for_each(|at| decide(*at));
            *round += (cpu_nanos() - started - clock) / decisions.len() as f64;
        }
    }
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    nanos.sort_by(f64::total_cmp);
    let all = (ROUNDS * decisions.len()) as f64;
    let (lowest, median) = (nanos[0], nanos[ROUNDS / 2]);
    println!("| {case:<58} | {lowest:>7.1} | {median:>7.1} | {:>11.3} |", allocations as f64 / all);
}

/// CPU time of this thread: on a machine that does other things too, the only time that tells of this program.
fn cpu_nanos() -> f64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    time.tv_sec() as f64 * 1e9 + time.tv_nsec() as f64
}

fn main() {
    // Large enough for the whole bench, and so slow that no bucket is full again and forgotten meanwhile.
    let large = Limit::Quota(Quota::new(3.0, Per::Minute, 1_000_000).unwrap());
    let rule = |limit| Rule::new(limit, Costs::OF_CALLERS, Schedule::default()).unwrap();
    let mut settings = LimitSettings {
        caller: Layers::new(rule(large)),
        identity: Layers::new(rule(large)),
        keys: TableSize::new(131_072).unwrap(),
        gate: GateSettings {
            rules: GateRules::new(GateRule { rate: Some(large), ..GateRule::default() }, vec![]).unwrap(),
            ..GateSettings::default()
        },
        ..LimitSettings::default()
    };
    settings.node.quotas =
        PerMethod::all(Some(NodeQuota::set(Quota::new(1e6, Per::Second, 1_000_000).unwrap())));

    let identities = identities(KEYS);
    let all = order(KEYS);
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    println!("| {:<58} | {:>7} | {:>7} | {:>11} |", "decision", "ns", "median", "allocations");
    println!("|{:-<60}|{:-<8}:|{:-<8}:|{:-<12}:|", "", "", "", "");
    let ids = |at: u32| [&identities[at as usize]];
    let read = |at: u32| {
        black_box(identities[at as usize].as_str().bytes().map(u64::from).sum::<u64>());
    };
    measure("(a look at the runtime's clock)", &all, |_| {
        black_box(tokio::time::Instant::now());
    });
    for (counted, recorder) in
        [("counted", &recorder as &dyn metrics::Recorder), ("uncounted", &metrics::NoopRecorder)]
    {
        let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(recorder));
        for at in 0..KEYS {
            let mut admitted = limits.admit_caller(Uid(at), METHOD).unwrap();
            limits.admit_identities(&mut admitted, ids(at)).unwrap();
        }
        assert_eq!(limits.keys(), (KEYS as usize, KEYS as usize));
        let both = |at: u32| {
            let mut admitted = limits.admit_caller(Uid(at), METHOD).unwrap();
            black_box(limits.admit_identities(&mut admitted, ids(at))).unwrap();
        };
        let case = |keys: &str| format!("both stages, 100,000 keys known, {keys}, {counted}");
        measure_after(read, &case("all in turn"), &all, both);
        let some: Vec<u32> = all.iter().map(|at| at % 1_000 * 100).collect();
        measure_after(read, &case("1,000 active"), &some, both);
        measure(&format!("caller stage alone, 100,000 keys, {counted}"), &all, |at| {
            drop(black_box(limits.admit_caller(Uid(at), METHOD)).unwrap());
        });
        let one = vec![7; 100_000];
        measure(&case("one active"), &one, both);
    }

    let mut strict = settings.clone();
    strict.caller = Layers::new(rule(Limit::Quota(Quota::new(1.0, Per::Day, 5).unwrap())));
    strict.keys = TableSize::default();
    let limits = Limits::new(&strict, Clock::SYSTEM, Registry::new(&recorder));
    for _ in 0..6 {
        drop(limits.admit_caller(Uid(7), METHOD));
    }
    measure("refused by the caller's bucket", &vec![7; 100_000], |at| {
        assert!(black_box(limits.admit_caller(Uid(at), METHOD)).is_err());
    });
    let mut next = 1_000;
    measure("a new key each time, table of 16,384 full of debtors", &vec![0; 100_000], |_| {
        next += 1;
        drop(black_box(limits.admit_caller(Uid(next), METHOD)));
    });

    // A connection of this process to itself: accepted once, and looked at as if anew each time.
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let _client = UnixStream::connect(dir.path().join("s")).unwrap();
    let (stream, _) = listener.accept().unwrap();
    for (case, mode) in
        [("elsewhere", KubernetesMode::Off), ("on Kubernetes: pidfd, /proc/PID/cgroup", KubernetesMode::On)]
    {
        let keys = PodOrUid::new(mode, false, KubeletRoot::default());
        measure(&format!("caller key at accept, {case}"), &vec![0; 20_000], |_| {
            drop(black_box(Arrival::at(&stream, &keys)).unwrap());
        });
    }

    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, 1 << 30).unwrap(), &limits);
    for at in &all {
        drop(gate.open(Uid(*at).caller_key()));
    }
    measure("gate: let in and closed again, 100,000 callers known", &all, |at| {
        drop(black_box(gate.open(Uid(at).caller_key())).unwrap());
    });
}
