//! Signals that must not end a process before it has said what it does with them.
//!
//! SIGHUP, SIGUSR1 and SIGUSR2 end a process that takes no notice of them, and they are sent as soon as there is
//! a PID to send them to. So they are held back from the first instruction of this program on, before `main`, until whoever
//! takes them is there, and then come: nothing that was asked for meanwhile is lost. What is left are the two milliseconds or
//! so in which the kernel and the dynamic linker prepare the process: only its parent could hold them back then.
//!
//! SIGXFSZ is ignored: a file that may grow no more (`ulimit -f`) is an error like a full disk.

use nix::sys::signal::{SigHandler, SigSet, Signal, signal};

fn held() -> SigSet {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        set.add(signal);
    }
    set
}

/// What is called before `main`, by the C library, in every program that this crate is linked into.
#[used]
// SAFETY: the C library calls the functions in `.init_array` once each, on the only thread there is, after it is ready
// itself; a `pthread_sigmask` and a few instructions, without memory of the heap or a lock, are all that this one does. The
// section holds pointers to such functions, and this static is one, without padding.
#[expect(unsafe_code, reason = "the section is named by an attribute")]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    hold();
    let _valid_arguments = ignore_limits_of_files().is_ok();
}

/// Has `write(2)` beyond `ulimit -f` fail with `EFBIG` instead of ending the process.
#[expect(unsafe_code, reason = "nix takes every handler to be a function")]
fn ignore_limits_of_files() -> nix::Result<SigHandler> {
    // SAFETY: no function is installed that could be called in the middle of anything.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }
}

/// Holds them back from this thread, and from those that it starts.
pub fn hold() {
    // It fails for want of a valid argument only.
    held().thread_block().unwrap_or_default();
}

/// Lets them come to this thread: those that were sent meanwhile, at once.
pub fn release() {
    held().thread_unblock().unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This thread was started by one that ran `main`, and nobody has said a word about signals in between.
    #[test]
    fn they_are_held_back_before_main() {
        let now = SigSet::thread_get_mask().unwrap();
        assert!(held().iter().all(|signal| now.contains(signal)), "{now:?}");
    }
}
