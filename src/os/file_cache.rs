//! What the kernel keeps of a file that was read.

use std::os::fd::AsFd;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// As large as what the kernel keeps in one piece may be, in bytes. A piece that is not within what is let go of, stays.
const LARGEST_PIECE: u64 = 2 << 20;

/// Has the kernel read no more of `file` than is asked for: of one that is read from its beginning on it reads megabytes ahead, as
/// the disk is set.
pub fn read_what_is_asked_for(file: impl AsFd) {
    let _taken = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
}

/// Has the kernel begin to read `file` between these offsets. Does not wait for it.
pub fn fetch(file: impl AsFd, from: u64, to: u64) {
    advise(file, from, to, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
}

/// Has the kernel let go of what it keeps of `file` between these offsets, as far as no process has it mapped and it is on
/// the disk. It is of no use to whoever read it once, and would be reckoned to the reader's cgroup.
pub fn let_go(file: impl AsFd, from: u64, to: u64) {
    advise(file, from.saturating_sub(LARGEST_PIECE), to, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

fn advise(file: impl AsFd, from: u64, to: u64, advice: PosixFadviseAdvice) {
    // A file system that does not take it is none the worse. A length of 0 would be all that follows.
    if let (Ok(from), Ok(length @ 1..)) = (i64::try_from(from), i64::try_from(to.saturating_sub(from))) {
        let _taken = posix_fadvise(file, from, length, advice);
    }
}

/// How many pages of `file` the kernel keeps, of its first `length` bytes.
#[cfg(test)]
#[expect(unsafe_code, reason = "nix has no mincore")]
pub fn kept_pages(file: &std::fs::File, length: usize) -> usize {
    use std::{os::fd::AsRawFd as _, ptr::null_mut};
    const PAGE: usize = 4096;
    // SAFETY: the kernel chooses where; nothing of ours is there.
    let mapped =
        unsafe { libc::mmap(null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(mapped, libc::MAP_FAILED);
    let mut pages = vec![0u8; length.div_ceil(PAGE)];
    // SAFETY: these are `length` bytes that are mapped, and `pages` has a byte for each page of them.
    let told = unsafe { libc::mincore(mapped, length, pages.as_mut_ptr()) };
    // SAFETY: it was mapped above, and nothing refers to it.
    let unmapped = unsafe { libc::munmap(mapped, length) };
    assert_eq!((told, unmapped), (0, 0));
    pages.iter().filter(|page| **page & 1 == 1).count()
}
