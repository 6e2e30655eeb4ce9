//! A panic is a defect, wherever it happens: counted, and said in the log.

use std::{
    panic::{Location, PanicHookInfo},
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use crate::limits::pace::Pace;

static SO_FAR: AtomicU64 = AtomicU64::new(0);
/// Calls could cause them.
static PACE: LazyLock<Pace> = LazyLock::new(Pace::default);

/// Has the log tell of each panic of this process from now on, as soon as there is a log.
pub(super) fn tell() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        SO_FAR.fetch_add(1, Relaxed);
        if tracing::dispatcher::has_been_set() {
            PACE.say(|left_out| say(panic, left_out))
        } else {
            before(panic)
        }
    }));
}

/// How many there have been.
pub(super) fn so_far() -> u64 {
    SO_FAR.load(Relaxed)
}

fn say(panic: &PanicHookInfo<'_>, left_out: Option<std::num::NonZeroU64>) {
    let at = panic.location().map(Location::to_string);
    let thread = std::thread::current();
    // A text that was put together then may hold what a caller sent, or a secret.
    let text = panic.payload().downcast_ref::<&'static str>().copied();
    tracing::error!(at, thread = thread.name(), text, left_out, "a defect of the agent: a thread panicked");
}
