//! The pages of the program's own file that this process has in its memory.
//!
//! The kernel maps 64 KiB around each place of a file that is used, and unmaps none as long as there is memory. So an agent would keep
//! all its life what only its start needs: half of what it has resident.
//!
//! What is absent: libraries. One may be loaded, or unloaded, by the C library at any time, to look a name up, and what stands at its
//! addresses may be another's between a look and what is done about it. The program stays where it is.

use std::ptr::{NonNull, from_ref, with_exposed_provenance_mut};

use nix::sys::mman::{MmapAdvise, madvise};
use procfs::process::{MMPermissions, MemoryMap, Process};

/// A constant of the program.
static LANDMARK: u8 = 0;

/// Lets go of code and constants. What is used again comes back from the kernel's cache of files, 64 KiB at a time, and the disk
/// is read only where that cache was short. Returns how many bytes there were: none where `/proc` does not tell.
///
/// Takes a millisecond, and the next call some tenths of one more than others.
pub fn let_go() -> u64 {
    let maps = Process::myself().and_then(|process| process.smaps());
    let maps = maps.map(|maps| maps.0).unwrap_or_default();
    let landmark = from_ref(&LANDMARK).addr();
    let is_at =
        |map: &&MemoryMap| (map.address.0..map.address.1).contains(&u64::try_from(landmark).unwrap_or(0));
    let Some(program) = maps.iter().find(is_at) else { return 0 };
    let of_program =
        |map: &&MemoryMap| (map.dev, map.inode) == (program.dev, program.inode) && map.inode != 0;
    maps.iter().filter(of_program).filter(|map| is_of_file_alone(map)).filter_map(unmap).sum()
}

/// Whether all pages of this mapping are those of its file, and will be. A page that was written to is a copy of its own, as
/// where the loader put addresses into constants before they became read-only, and would be lost.
fn is_of_file_alone(map: &MemoryMap) -> bool {
    let none = |what: &str| map.extension.map.get(what) == Some(&0);
    map.perms.contains(MMPermissions::PRIVATE)
        && !map.perms.contains(MMPermissions::WRITE)
        && none("Anonymous")
        && none("Swap")
}

#[expect(unsafe_code, reason = "memory by its address")]
fn unmap(map: &MemoryMap) -> Option<u64> {
    let (begin, end) = map.address;
    let length = usize::try_from(end.checked_sub(begin)?).ok()?;
    let begin = NonNull::new(with_exposed_provenance_mut(usize::try_from(begin).ok()?))?;
    // SAFETY: the mapping is private, of the program's file, not writable, and without a page that is not the file's: whoever reads
    // there, meanwhile or later, reads what was there before. Nothing unmaps the program, or makes it writable.
    unsafe { madvise(begin, length, MmapAdvise::MADV_DONTNEED) }.ok()?;
    map.extension.map.get("Rss").copied()
}

#[cfg(test)]
mod tests {
    use std::{fs::File, num::NonZeroUsize};

    use nix::sys::mman::{MapFlags, ProtFlags, mmap, mprotect};

    use super::*;

    const SIZE: usize = 64 * 4096;

    /// A further mapping of the program's file.
    #[expect(unsafe_code, reason = "memory by its address")]
    fn mapped() -> NonNull<u8> {
        let (file, size) = (File::open("/proc/self/exe").unwrap(), NonZeroUsize::new(SIZE).unwrap());
        let both = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, which stays as long as the test's process.
        unsafe { mmap(None, size, both, MapFlags::MAP_PRIVATE, file, 0) }.unwrap().cast()
    }

    #[expect(unsafe_code, reason = "memory by its address")]
    fn made_read_only(at: NonNull<u8>) -> &'static [u8] {
        // SAFETY: a mapping of this size of the test's own, which nobody writes to from here on.
        unsafe {
            mprotect(at.cast(), SIZE, ProtFlags::PROT_READ).unwrap();
            std::slice::from_raw_parts(at.as_ptr(), SIZE)
        }
    }

    fn resident(of: &[u8]) -> u64 {
        let begin = u64::try_from(of.as_ptr().addr()).unwrap();
        let maps = Process::myself().unwrap().smaps().unwrap();
        maps.0.iter().find(|map| map.address.0 == begin).unwrap().extension.map["Rss"]
    }

    #[test]
    fn what_is_the_file_s_alone_leaves_and_what_was_written_stays() {
        let (constants, relocated) = (mapped(), mapped());
        #[expect(unsafe_code, reason = "memory by its address")]
        // SAFETY: the mapping is this test's, and writable still.
        unsafe {
            relocated.write(b'!');
        }
        let (constants, relocated) = (made_read_only(constants), made_read_only(relocated));
        let before = constants.to_vec();
        let whole = u64::try_from(SIZE).unwrap();
        assert_eq!(resident(constants), whole);

        assert!(let_go() >= whole);
        assert_eq!(resident(constants), 0);
        assert!(constants == before, "it is there again");
        assert_eq!(
            (relocated[0], &relocated[1..4]),
            (b'!', &b"ELF"[..]),
            "what was written is not the file's"
        );
    }
}
