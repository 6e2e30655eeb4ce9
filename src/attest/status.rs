//! The lines of `/proc/PID/status` that say who a process is: a pure function over bytes.
//!
//! The name in the file is the process's own choice and the only text in it that is. The kernel escapes newlines and
//! backslashes there (`fs/proc/array.c`), so a name cannot make a line; all the same, a line that appears twice is
//! an error here and not a choice. Everything else in the file is skipped unread.

use std::str;

use memchr::memchr_iter;

/// More supplementary groups than this are not attested: the kernel allows 65536, and with a user namespace an
/// ordinary user can have them, each of them two selectors.
pub const MAX_GROUPS: usize = 1024;

/// Who a process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcStatus {
    /// The effective user ID.
    pub uid: u32,
    /// The effective group ID.
    pub gid: u32,
    /// The supplementary group IDs, in the kernel's order.
    pub groups: Vec<u32>,
}

/// Why a text is no status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatusError {
    /// It ends before all lines that are needed: there may be more to read.
    #[error("it ends before its {0} line")]
    Missing(&'static str),
    /// A line stands there twice.
    #[error("it has two {0} lines")]
    Twice(&'static str),
    /// A line is not what the kernel writes.
    #[error("its {0} line is not decimal numbers as the kernel writes them")]
    Malformed(&'static str),
    /// The process has more supplementary groups than are attested.
    #[error("it lists more than {MAX_GROUPS} supplementary groups")]
    TooManyGroups,
}

/// Reads the `Uid:`, `Gid:` and `Groups:` lines. A last line without its newline is not looked at.
///
/// # Errors
/// [`StatusError`]; [`StatusError::Missing`] where reading on may help.
pub fn parse(text: &[u8]) -> Result<ProcStatus, StatusError> {
    let (mut uid, mut gid, mut groups) = (None, None, None);
    let mut begin = 0;
    for end in memchr_iter(b'\n', text) {
        let line = text.get(begin..end).unwrap_or_default();
        begin = end + 1;
        if let Some(ids) = line.strip_prefix(b"Uid:") {
            once(&mut uid, "Uid", effective(ids, "Uid")?)?;
        } else if let Some(ids) = line.strip_prefix(b"Gid:") {
            once(&mut gid, "Gid", effective(ids, "Gid")?)?;
        } else if let Some(ids) = line.strip_prefix(b"Groups:") {
            once(&mut groups, "Groups", list(ids)?)?;
        }
    }
    Ok(ProcStatus {
        uid: uid.ok_or(StatusError::Missing("Uid"))?,
        gid: gid.ok_or(StatusError::Missing("Gid"))?,
        groups: groups.ok_or(StatusError::Missing("Groups"))?,
    })
}

fn once<T>(slot: &mut Option<T>, line: &'static str, value: T) -> Result<(), StatusError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(StatusError::Twice(line)),
    }
}

/// The second of exactly four numbers, each after one tab: real, effective, saved, file system.
fn effective(ids: &[u8], line: &'static str) -> Result<u32, StatusError> {
    let mut fields = ids.split(|b| *b == b'\t');
    let malformed = StatusError::Malformed(line);
    if fields.next() != Some(b"") {
        return Err(malformed);
    }
    let mut four = [0; 4];
    for slot in &mut four {
        *slot = fields.next().and_then(number).ok_or(malformed)?;
    }
    match fields.next() {
        None => Ok(four[1]),
        Some(_) => Err(malformed),
    }
}

/// A tab, then numbers with a space after each; one space alone when there are none (older kernels: nothing).
fn list(ids: &[u8]) -> Result<Vec<u32>, StatusError> {
    let malformed = StatusError::Malformed("Groups");
    let ids = ids.strip_prefix(b"\t").ok_or(malformed)?;
    let ids = ids.strip_suffix(b" ").unwrap_or(ids);
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let mut groups = Vec::new();
    for field in ids.split(|b| *b == b' ') {
        if groups.len() == MAX_GROUPS {
            return Err(StatusError::TooManyGroups);
        }
        groups.push(number(field).ok_or(malformed)?);
    }
    Ok(groups)
}

/// Digits alone: `u32`'s own parser would take a sign.
fn number(field: &[u8]) -> Option<u32> {
    if !field.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REAL: &str = "Name:\tbash\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7\nPid:\t7\nPPid:\t1\nTracerPid:\t0\n\
                        Uid:\t1000\t1001\t1002\t1003\nGid:\t100\t101\t102\t103\nFDSize:\t64\nGroups:\t4 24 100 \n\
                        NStgid:\t7\nVmPeak:\t    2928 kB\n";

    #[test]
    fn parse_takes_effective_ids_and_groups() {
        let before = |what| REAL.split_once(what).unwrap().0.to_owned();
        let is = |uid, gid, groups: &[u32]| Ok(ProcStatus { uid, gid, groups: groups.to_vec() });
        for (case, text, want) in [
            ("a real one", REAL.to_owned(), is(1001, 101, &[4, 24, 100])),
            ("no groups, 6.x", REAL.replace("\t4 24 100 ", "\t "), is(1001, 101, &[])),
            ("no groups, older", REAL.replace("\t4 24 100 ", "\t"), is(1001, 101, &[])),
            ("no space at the end", REAL.replace("100 \n", "100\n"), is(1001, 101, &[4, 24, 100])),
            ("largest", REAL.replace("\t1001\t", "\t4294967295\t"), is(u32::MAX, 101, &[4, 24, 100])),
            (
                "a name that would be a line, escaped as the kernel does",
                REAL.replace("bash", "a\\nUid:\\t0\\t0\\t0\\t0"),
                is(1001, 101, &[4, 24, 100]),
            ),
            ("a name of the word", REAL.replace("bash", "Uid:"), is(1001, 101, &[4, 24, 100])),
            ("a name not in UTF-8's reach", REAL.replace("bash", "\u{fffd}"), is(1001, 101, &[4, 24, 100])),
            ("nothing", String::new(), Err(StatusError::Missing("Uid"))),
            ("cut in Uid", before("1001"), Err(StatusError::Missing("Uid"))),
            ("cut in a group's number", before("24 100"), Err(StatusError::Missing("Groups"))),
            ("no gid", REAL.replace("Gid:", "Gib:"), Err(StatusError::Missing("Gid"))),
            ("two uids", REAL.to_owned() + "Uid:\t0\t0\t0\t0\n", Err(StatusError::Twice("Uid"))),
            ("two gids", REAL.to_owned() + "Gid:\t0\t0\t0\t0\n", Err(StatusError::Twice("Gid"))),
            ("two groups", REAL.to_owned() + "Groups:\t0 \n", Err(StatusError::Twice("Groups"))),
            ("three uids", REAL.replace("\t1003", ""), Err(StatusError::Malformed("Uid"))),
            ("five uids", REAL.replace("\t1003", "\t1003\t0"), Err(StatusError::Malformed("Uid"))),
            ("a sign", REAL.replace("\t1001\t", "\t+1001\t"), Err(StatusError::Malformed("Uid"))),
            ("negative", REAL.replace("\t101\t", "\t-1\t"), Err(StatusError::Malformed("Gid"))),
            ("too large", REAL.replace("\t101\t", "\t4294967296\t"), Err(StatusError::Malformed("Gid"))),
            ("empty number", REAL.replace("\t1001\t", "\t\t"), Err(StatusError::Malformed("Uid"))),
            ("spaces for tabs", REAL.replace("Uid:\t", "Uid: "), Err(StatusError::Malformed("Uid"))),
            ("two spaces", REAL.replace("4 24", "4  24"), Err(StatusError::Malformed("Groups"))),
            ("hexadecimal", REAL.replace("4 24", "4 0x24"), Err(StatusError::Malformed("Groups"))),
        ] {
            assert_eq!(parse(text.as_bytes()), want, "{case}");
        }
    }

    #[test]
    fn groups_have_a_bound() {
        let with = |n: usize| REAL.replace("4 24 100 ", &"7 ".repeat(n));
        assert_eq!(parse(with(MAX_GROUPS).as_bytes()).unwrap().groups.len(), MAX_GROUPS);
        assert_eq!(parse(with(MAX_GROUPS + 1).as_bytes()), Err(StatusError::TooManyGroups));
    }

    /// As `proc_task_name` writes it: everything may stand in a name but a newline and a backslash, which are escaped.
    fn escaped(name: &[u8]) -> Vec<u8> {
        name.iter()
            .flat_map(|b| match b {
                b'\n' => b"\\n".to_vec(),
                b'\\' => b"\\\\".to_vec(),
                other => vec![*other],
            })
            .collect()
    }

    proptest! {
        #[test]
        fn no_name_changes_the_answer(name in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut text = b"Name:\t".to_vec();
            text.extend(escaped(&name));
            text.extend(REAL.strip_prefix("Name:\tbash").unwrap().bytes());
            prop_assert_eq!(parse(&text), parse(REAL.as_bytes()));
        }

        #[test]
        fn what_is_written_is_read(uids: [u32; 4], gids: [u32; 4], groups in proptest::collection::vec(any::<u32>(), 0..40)) {
            let four = |ids: [u32; 4]| ids.map(|id| format!("\t{id}")).concat();
            let list: String = groups.iter().map(|id| format!("{id} ")).collect();
            let text = format!("Name:\tx\nUid:{}\nGid:{}\nGroups:\t{list}\n", four(uids), four(gids));
            prop_assert_eq!(parse(text.as_bytes()), Ok(ProcStatus { uid: uids[1], gid: gids[1], groups }));
        }

        #[test]
        fn a_cut_text_is_never_another_answer(at in 0..REAL.len()) {
            match parse(&REAL.as_bytes()[..at]) {
                Ok(status) => prop_assert_eq!(Ok(status), parse(REAL.as_bytes())),
                Err(e) => prop_assert!(matches!(e, StatusError::Missing(_)), "{}", e),
            }
        }

        #[test]
        fn any_bytes_are_survived(text: Vec<u8>) {
            drop(parse(&text));
        }
    }
}
