//! Numbers that spread work over time. Nothing secret may depend on them. And whether there is what secrets are made of.

use std::hash::{BuildHasher as _, Hasher as _};

use nix::errno::Errno;

/// Asks for the kernel's randomness, of which keys are made, as a library does that ends the process where it is refused. That it
/// has none yet, or does not know this system call, is no refusal.
///
/// # Errors
/// A seccomp filter or a security module refuses it.
#[expect(unsafe_code, reason = "nix has no getrandom(2)")]
pub fn may_be_asked_for() -> Result<(), Errno> {
    let mut byte = 0_u8;
    // SAFETY: the kernel writes at most one byte, to a variable of ours.
    let asked = unsafe { libc::getrandom((&raw mut byte).cast(), 1, libc::GRND_NONBLOCK) };
    match Errno::result(asked) {
        Ok(_) | Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// A series of numbers in 0..1, another one each time.
pub fn fractions() -> impl FnMut() -> f64 {
    let state = ahash::RandomState::new();
    let mut at = 0_u64;
    move || {
        at += 1;
        let mut hasher = state.build_hasher();
        hasher.write_u64(at);
        // 32 bits are plenty, and convert without loss.
        let bits = u32::try_from(hasher.finish() >> 32).unwrap_or(u32::MAX);
        f64::from(bits) / (f64::from(u32::MAX) + 1.0)
    }
}

/// One such number.
pub fn fraction() -> f64 {
    fractions()()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_may_be_asked() {
        assert_eq!(may_be_asked_for(), Ok(()));
    }

    #[test]
    fn random_numbers_are_in_range() {
        for _ in 0..8 {
            let mut next = fractions();
            for _ in 0..100 {
                assert!((0.0..1.0).contains(&next()));
            }
        }
    }
}
