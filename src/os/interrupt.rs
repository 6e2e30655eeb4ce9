//! Ends system calls of a thread that take too long, by a signal that does nothing else.
//!
//! What the kernel waits for by request of whoever made a file or a socket (SO_LINGER, a server that does not
//! answer) ends with a signal, in most cases. The signal is SIGURG: ignored by default, and used by nothing here.

use std::{sync::Once, time::Duration};

use nix::{errno::Errno, unistd::gettid};

/// A timer that interrupts the thread that made it. It does not leave that thread.
#[derive(Debug)]
pub struct Interrupts(libc::timer_t);

impl Interrupts {
    /// For the calling thread.
    ///
    /// # Errors
    /// What the kernel says: no timer is left (`RLIMIT_SIGPENDING`).
    #[expect(unsafe_code, reason = "nix has no such timer for each C library")]
    pub fn of_this_thread() -> Result<Self, Errno> {
        static HANDLED: Once = Once::new();
        let mut handled = Ok(());
        HANDLED.call_once(|| handled = handle());
        handled?;
        // SAFETY: a structure of integers and pointers, for which all zeros is a valid value.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = libc::SIGURG;
        event.sigev_notify_thread_id = gettid().as_raw();
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both point to structures of ours that outlive the call; the kernel keeps a copy of the first, and writes
        // the timer's name to the second.
        let answer = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        Errno::result(answer).map(|_zero| Self(timer))
    }

    /// Runs `call`, in which from `first` on, and every `again` after that, what waits in the kernel is interrupted.
    pub fn during<R>(&self, first: Duration, again: Duration, call: impl FnOnce() -> R) -> R {
        self.set(first, again);
        let done = call();
        self.set(Duration::ZERO, Duration::ZERO);
        done
    }

    #[expect(unsafe_code, reason = "nix has no such timer for each C library")]
    fn set(&self, first: Duration, again: Duration) {
        let value = libc::itimerspec { it_value: timespec(first), it_interval: timespec(again) };
        // SAFETY: the timer exists as long as this does; `value` outlives the call, and the old value is not asked for.
        // It cannot fail: the times are valid.
        let _zero = unsafe { libc::timer_settime(self.0, 0, &raw const value, std::ptr::null_mut()) };
    }
}

impl Drop for Interrupts {
    #[expect(unsafe_code, reason = "nix has no such timer for each C library")]
    fn drop(&mut self) {
        // SAFETY: the timer was made by this, and nobody names it afterwards.
        let _zero = unsafe { libc::timer_delete(self.0) };
    }
}

fn timespec(time: Duration) -> libc::timespec {
    libc::timespec {
        // Its type is another for each C library.
        tv_sec: time.as_secs().try_into().unwrap_or_else(|_too_long| i32::MAX.into()),
        tv_nsec: time.subsec_nanos().into(),
    }
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Without SA_RESTART: what the signal comes upon ends.
#[expect(unsafe_code, reason = "a handler of signals")]
fn handle() -> Result<(), Errno> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any point of any thread.
    unsafe { sigaction(Signal::SIGURG, &action) }.map(drop)
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read as _},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn what_waits_is_interrupted_again_and_again() {
        let interrupts = Interrupts::of_this_thread().unwrap();
        let (silent, _other) = UnixStream::pair().unwrap();
        let soon = Duration::from_millis(5);
        let ended = interrupts.during(soon, soon, || [&silent; 3].map(read));
        assert_eq!(ended, [Err(ErrorKind::Interrupted); 3]);
    }

    fn read(mut stream: &UnixStream) -> Result<usize, ErrorKind> {
        stream.read(&mut [0]).map_err(|error| error.kind())
    }
}
