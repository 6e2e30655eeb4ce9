//! Giving memory back to the kernel, and how much there is.
//!
//! glibc keeps what was freed: after 5,000 connections have come and gone the process stays at their peak for
//! ever, and each such burst may add to it. `malloc_trim` gives it back. What is absent: any other allocator; the
//! ones that were measured take more at the peak.

use std::{fs::File, io::Read as _};

/// What `/proc/self/statm` has at most, in bytes: seven numbers.
const STATM: usize = 160;

/// Gives free heap memory back to the kernel; `true` when there was any to give.
///
/// Costs about 0.03 ms when there is nothing to do and 1 to 3 ms for tens of megabytes. Does nothing, and returns
/// `false`, where the C library is not glibc.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "a call of the C library without arguments that could be wrong")]
pub fn trim() -> bool {
    // SAFETY: malloc_trim takes no pointer and may be called by any thread at any time (malloc_trim(3): MT-Safe);
    // it releases only memory that no allocation owns.
    unsafe { libc::malloc_trim(0) == 1 }
}

/// Does nothing here: the C library is not glibc.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn trim() -> bool {
    false
}

/// What is in memory of this process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResidentSet {
    pub all: u64,
    /// Without the pages of files, as the program's own, which the kernel drops when it needs them and reads again.
    pub without_files: u64,
}

/// What is in memory of this process; `None` when `/proc/self/statm` does not say.
pub fn resident_set() -> Option<ResidentSet> {
    let mut line = [0; STATM];
    let read = File::open("/proc/self/statm").and_then(|mut file| file.read(&mut line)).ok()?;
    let mut pages = str::from_utf8(line.get(..read)?).ok()?.split_ascii_whitespace();
    // Size, resident, of these shared with files: proc_pid_statm(5).
    let (_size, resident, shared) = (pages.next()?, pages.next()?, pages.next()?);
    let (resident, shared): (u64, u64) = (resident.parse().ok()?, shared.parse().ok()?);
    let bytes = |pages: u64| pages * procfs::page_size();
    Some(ResidentSet { all: bytes(resident), without_files: bytes(resident.saturating_sub(shared)) })
}

/// The resident set of this process, in bytes; `None` when `/proc/self/statm` does not say.
pub fn resident() -> Option<u64> {
    Some(resident_set()?.all)
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_resident_is_told_with_and_without_files() {
        let seen = super::resident_set().unwrap();
        // This program is a file.
        assert!(0 < seen.without_files && seen.without_files < seen.all, "{seen:?}");
    }

    #[test]
    fn memory_in_use_survives_a_trim() {
        let kept: Vec<Vec<u8>> = (0..1000).map(|i| vec![u8::try_from(i % 251).unwrap(); 4096]).collect();
        let freed: Vec<Vec<u8>> = (0..1000).map(|_| vec![1; 4096]).collect();
        drop(freed);
        let _some: bool = super::trim();
        for (i, block) in kept.iter().enumerate() {
            assert!(block.iter().all(|b| usize::from(*b) == i % 251), "block {i}");
        }
    }
}
