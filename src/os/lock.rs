//! Locks on files, taken by one process at a time.

use std::{
    fs::{File, TryLockError},
    thread,
    time::Duration,
};

/// How often a lock is tried for, and the pause between: half a second.
const TRIES: u32 = 25;
const PAUSE: Duration = Duration::from_millis(20);

/// Takes the lock on `file`, or finds that somebody keeps it. Whoever has just let go may have started a
/// process that shares the lock for the moment until it runs its program: that is waited for. Blocks for half
/// a second at most, and only then.
///
/// # Errors
/// `WouldBlock` when somebody keeps it; else what the system says.
pub fn take(file: &File) -> Result<(), TryLockError> {
    for _ in 1..TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {}
            taken => return taken,
        }
        #[expect(clippy::disallowed_methods, reason = "at start, before anything is served")]
        thread::sleep(PAUSE);
    }
    file.try_lock()
}
