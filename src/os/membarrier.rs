//! Waits until the kernel has let go of what it keeps of closed files for a while.
//!
//! What remains of a closed socket is freed only after a grace period of RCU: once each processor has passed a point at
//! which nobody can still look at it. That takes some ten milliseconds, or hundreds where processors are busy.

use nix::errno::Errno;

/// `MEMBARRIER_CMD_GLOBAL` of `linux/membarrier.h`.
const GLOBAL: libc::c_int = 1;

/// Waits for a whole grace period: what was closed before this was called is free, or about to be. Blocks for as long as
/// that takes.
///
/// # Errors
/// The kernel does not tell: EINVAL where it runs with `nohz_full`, ENOSYS or EPERM where the call is not there or barred.
#[expect(unsafe_code, reason = "nix has no membarrier")]
pub fn grace_period() -> Result<(), Errno> {
    // SAFETY: the call takes three integers, and touches no memory of ours.
    let answer = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    Errno::result(answer).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grace_period_ends_or_cannot_be_waited_for() {
        let answer = grace_period();
        let known = [Err(Errno::EINVAL), Err(Errno::ENOSYS), Err(Errno::EPERM)];
        assert!(answer.is_ok() || known.contains(&answer), "{answer:?}");
    }
}
