//! Signals that must not end a process before it has said what it does with them.
//!
//! SIGHUP, SIGUSR1 and SIGUSR2 end a process that takes no notice of them, and they are sent as soon as there is
//! a PID to send them to. So they are held back from the first instruction on, until whoever takes them is there,
//! and then come: nothing that was asked for meanwhile is lost.

use nix::sys::signal::{SigSet, Signal};

fn held() -> SigSet {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        set.add(signal);
    }
    set
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
