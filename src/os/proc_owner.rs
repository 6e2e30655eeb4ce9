//! Whose a process is as `/proc/PID/status` tells it: for kernels whose pidfds do not say (before Linux 6.13).
//!
//! Not by the owner of `/proc/PID`: that is root for a process that may not be dumped, such as a daemon that started as
//! root and became somebody else. A PID is whoever has the number now: what is read here counts only if a pidfd says
//! afterwards that the process lives.

use std::{fs::File, io, str};

use nix::unistd::{Gid, Pid, Uid, read};

use super::pidfd::Owner;

/// As much of the file as is read: the lines of the IDs end before it, with the longest name that a process can have.
const MOST: usize = 1024;

/// The effective user and group of the process that has this PID now.
///
/// # Errors
/// There is none, or it cannot be seen; of kind [`io::ErrorKind::InvalidData`] when the file is not as the kernel
/// writes it.
pub fn owner(pid: Pid) -> io::Result<Owner> {
    let file = File::open(format!("/proc/{pid}/status"))?;
    let mut buffer = [0; MOST];
    // The kernel makes the whole file for one read.
    let filled = read(&file, &mut buffer)?;
    let text = buffer.get(..filled).unwrap_or_default();
    owner_of(text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no lines of its IDs"))
}

/// The kernel escapes newlines in the name, which is the process's own choice, so that it cannot make a line.
fn owner_of(status: &[u8]) -> Option<Owner> {
    let of = |name: &[u8]| effective(status.split(|b| *b == b'\n').find_map(|line| line.strip_prefix(name))?);
    Some(Owner { uid: Uid::from_raw(of(b"Uid:")?), gid: Gid::from_raw(of(b"Gid:")?) })
}

/// The second of exactly four numbers, each after one tab: real, effective, saved, file system.
pub fn effective(ids: &[u8]) -> Option<u32> {
    let mut fields = ids.split(|b| *b == b'\t');
    if fields.next() != Some(b"") {
        return None;
    }
    let mut four = [0; 4];
    for slot in &mut four {
        *slot = number(fields.next()?)?;
    }
    let [_, effective, ..] = four;
    fields.next().is_none().then_some(effective)
}

/// Digits alone: `u32`'s own parser would take a sign.
pub fn number(field: &[u8]) -> Option<u32> {
    if !field.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use nix::unistd::{getegid, geteuid};

    use super::*;

    #[test]
    fn our_own_process_is_ours() {
        assert_eq!(owner(Pid::this()).unwrap(), Owner { uid: geteuid(), gid: getegid() });
        assert_eq!(owner(Pid::from_raw(i32::MAX)).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn the_owner_is_the_effective_one() {
        let lines = "Name:\ta\\nUid:\\t0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t64\n";
        for (case, text, want) in [
            ("as the kernel writes it", lines.to_owned(), Some((2, 6))),
            ("cut before the group", lines.split_once("Gid").unwrap().0.to_owned(), None),
            ("cut within the group", lines.split_once("\t7").unwrap().0.to_owned(), None),
            ("three users", lines.replace("\t4\n", "\n"), None),
            ("no number", lines.replace("\t2\t", "\tx\t"), None),
            ("nothing", String::new(), None),
        ] {
            let owner = owner_of(text.as_bytes());
            assert_eq!(owner.map(|owner| (owner.uid.as_raw(), owner.gid.as_raw())), want, "{case}");
        }
    }
}
