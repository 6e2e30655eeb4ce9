//! The runtime that serves callers, with all its threads, or none.
//!
//! Where threads are short, the runtime does not say so: it panics, or waits for ever for those it has begun. So plain threads are
//! begun first, as many as it needs, and it is made on a thread of its own, which is given up when it takes too long.

use std::{
    hint::black_box,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use anyhow::anyhow;
use nix::sys::resource::{Resource, getrlimit};
use tokio::runtime::{Builder, Runtime};

/// The most worker threads. Two serve some ten thousand calls a second; more would only take from the node.
const MOST_WORKERS: usize = 4;
/// Threads for what computes long or may block: RSA keys, files of the issuer.
const BLOCKING_THREADS: usize = 8;
/// Threads that a start takes beside those: for the log, for memory, and for the names of users and groups. Without the last
/// nobody would be told by a name.
const OTHER_THREADS: usize = 6;
/// How long all threads take to be there, at most.
const THREADS_WITHIN: Duration = Duration::from_secs(2);
/// Why a thread does not come into being, as far as that can be told: its stack is memory.
const SHORT: &str =
    "threads are short (pids.max, TasksMax or ulimit -u), or memory for them (ulimit -d or -v)";
/// After so many tasks a worker asks the kernel who can be served; by default it does after 61, and whoever comes anew, or calls on
/// a connection that was at rest, waits for all of those first.
const LOOKS_EVERY: u32 = 8;
/// A thread that is there stays: when it is needed again there may be none to be had.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// The runtime that serves callers: as many workers as the machine has processors, at most four, and the threads for
/// what takes long. All of them are there when this returns, and stay.
///
/// # Errors
/// Threads or descriptors are short. It takes two seconds at most to find that out.
pub fn runtime() -> anyhow::Result<Runtime> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_WORKERS);
    let needed = workers + BLOCKING_THREADS;
    // One more makes the runtime.
    let at_once = needed + OTHER_THREADS + 1;
    try_threads(at_once).map_err(|error| no_threads(at_once, error))?;
    let (give, made) = mpsc::sync_channel(1);
    let make = move || {
        // Its panic is a shortage that has come up since.
        let made = catch_unwind(AssertUnwindSafe(|| make(workers)));
        drop(give.send(made.unwrap_or_else(|_panic| Err(too_few()))));
    };
    let make = std::thread::Builder::new().name("runtime".to_owned()).spawn(make);
    make.map_err(|error| no_threads(needed, error))?;
    match made.recv_timeout(2 * THREADS_WITHIN) {
        Ok(made) => made,
        // It hangs, and ends with the process.
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
            Err(anyhow!("cannot start the runtime: its {needed} threads did not start"))
        }
    }
}

/// What is said when `needed` threads cannot be had.
pub(super) fn no_threads(needed: usize, error: io::Error) -> anyhow::Error {
    let threads = if needed == 1 { "a thread".to_owned() } else { format!("{needed} threads") };
    anyhow!("cannot start {threads}: {error}: {SHORT}")
}

/// What is said when a runtime cannot be made.
pub(super) fn no_runtime(error: io::Error) -> anyhow::Error {
    let why = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((limit, _)) if error.raw_os_error() == Some(libc::EMFILE) => {
            format!(": LimitNOFILE (ulimit -n) is {limit}")
        }
        _ => String::new(),
    };
    anyhow!("cannot start the runtime: {error}{why}")
}

/// Memory that a thread takes which does nothing: its stack (2 MiB, as the standard library and the runtime have it), and another for
/// signals.
const OF_THREAD: usize = (2 << 20) + (64 << 10);

/// Has `needed` threads at once, and ends them. Their stacks are as large as those of the runtime: where it has a thread too few it
/// panics, and what is printed then takes memory, without which it waits for ever.
fn try_threads(needed: usize) -> io::Result<()> {
    // A thread that comes into being, and finds no memory for its signals then, panics before it can be asked.
    let mut stacks = Vec::<u8>::new();
    if stacks.try_reserve_exact(needed.saturating_mul(OF_THREAD)).is_err() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    drop(black_box(stacks));
    let (leave, left) = mpsc::channel::<()>();
    let left = Arc::new(Mutex::new(left));
    let begin = |_| {
        let left = Arc::clone(&left);
        // Nothing is ever sent: each waits for the end of the sender.
        let wait = move || drop(left.lock().map(|left| left.recv()));
        std::thread::Builder::new().spawn(wait)
    };
    let begun: Vec<_> = (0..needed).map(begin).collect();
    drop(leave);
    let begun: io::Result<Vec<_>> = begun.into_iter().collect();
    for thread in begun? {
        // It cannot panic.
        drop(thread.join());
    }
    Ok(())
}

fn too_few() -> anyhow::Error {
    anyhow!("cannot start the runtime: {SHORT}")
}

fn make(workers: usize) -> anyhow::Result<Runtime> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_keep_alive(FOR_EVER)
        .event_interval(LOOKS_EVERY)
        .enable_all()
        .build()
        .map_err(no_runtime)?;
    match catch_unwind(AssertUnwindSafe(|| begin_blocking_threads(&runtime))) {
        Ok(Ok(())) => Ok(runtime),
        Ok(Err(_late)) => {
            runtime.shutdown_background();
            Err(too_few())
        }
        Err(_panic) => {
            runtime.shutdown_background();
            Err(too_few())
        }
    }
}

/// A thread comes into being for a task that finds no other: so each waits until all are there.
fn begin_blocking_threads(runtime: &Runtime) -> Result<(), RecvTimeoutError> {
    let until = Instant::now() + THREADS_WITHIN;
    let (arrive, arrived) = mpsc::channel();
    let (_leave, left) = mpsc::channel::<()>();
    let left = Arc::new(Mutex::new(left));
    for _ in 0..BLOCKING_THREADS {
        let (arrive, left) = (arrive.clone(), Arc::clone(&left));
        drop(runtime.spawn_blocking(move || {
            let _told = arrive.send(()).is_ok();
            // Nothing is ever sent: it waits for the end of the sender.
            let _all_there = left.lock().map(|left| left.recv());
        }));
    }
    for _ in 0..BLOCKING_THREADS {
        arrived.recv_timeout(until.saturating_duration_since(Instant::now()))?;
    }
    Ok(())
}
