//! Pages of the program's own file that only its start needed.
//!
//! They stay in memory after it, since nothing asks for their room: two thirds of what is resident of an agent at rest. Given
//! back they are not gone: the kernel still has them, and takes their room before anybody else's when it needs some. What is
//! used again costs a fault of about a microsecond for 16 pages.

use procfs::process::{MMPermissions, MMapPath, MemoryMap, Process};

/// Gives back the pages of the program's file, as far as they are as they are in the file. The kernel looks at each mapping of the
/// process, which takes about a millisecond. Does nothing where the kernel does not tell.
#[expect(unsafe_code, reason = "a range of addresses is made to a pointer")]
pub fn give_back() {
    let Ok((file, maps)) = Process::myself().and_then(|own| Ok((own.exe()?, own.smaps()?))) else { return };
    for map in
        maps.into_iter().filter(|map| map.pathname == MMapPath::Path(file.clone()) && is_as_in_file(map))
    {
        let (from, end) = map.address;
        if let (Ok(from), Ok(length)) = (usize::try_from(from), usize::try_from(end - from)) {
            let from = std::ptr::with_exposed_provenance_mut(from);
            // SAFETY: the range is a mapping of the program's own file, which is never unmapped while it runs. It is private and
            // cannot be written to, and no page of it is a copy that was changed: what is read after this call, by any thread, is
            // read from the file again and is the same. What the call answers does not matter.
            unsafe { libc::madvise(from, length, libc::MADV_DONTNEED) };
        }
    }
}

/// Whether what stands there is what the file has: nothing can be written to it, and nothing was (relocations are).
fn is_as_in_file(map: &MemoryMap) -> bool {
    let is = |key| map.extension.map.get(key) == Some(&0);
    map.perms.contains(MMPermissions::READ | MMPermissions::PRIVATE)
        && !map.perms.contains(MMPermissions::WRITE)
        && is("Anonymous")
        && is("Swap")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::heap::resident_set;

    #[test]
    fn what_is_given_back_is_read_again() {
        let before = resident_set().unwrap();
        give_back();
        let after = resident_set().unwrap();
        assert!(after.all < before.all, "{before:?} {after:?}");
        // Code, constants, and what was relocated.
        let words: Vec<String> = ["a", "b"].iter().map(|word| format!("{word}{}", word.len())).collect();
        assert_eq!(words, ["a1", "b1"]);
        let relocated: [&dyn std::fmt::Debug; 2] = [&1, &"x"];
        assert_eq!(format!("{relocated:?}"), "[1, \"x\"]");
    }

    #[test]
    fn what_was_changed_stays() {
        let map = |perms: &str, anonymous| {
            let mut map = MemoryMap {
                address: (0, 4096),
                perms: perms.parse().unwrap(),
                offset: 0,
                dev: (0, 0),
                inode: 1,
                pathname: MMapPath::Path("/x".into()),
                extension: procfs::process::MMapExtension::default(),
            };
            map.extension.map.insert("Anonymous".to_owned(), anonymous);
            map.extension.map.insert("Swap".to_owned(), 0);
            map
        };
        for (case, perms, anonymous, want) in [
            ("code", "r-xp", 0, true),
            ("constants", "r--p", 0, true),
            ("relocated", "r--p", 4096, false),
            ("variables", "rw-p", 0, false),
            ("shared", "r--s", 0, false),
        ] {
            assert_eq!(is_as_in_file(&map(perms, anonymous)), want, "{case}");
        }
        let mut untold = map("r-xp", 0);
        untold.extension.map.clear();
        assert!(!is_as_in_file(&untold));
    }
}
