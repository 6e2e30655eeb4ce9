//! On what kind of file system a mount is, from the text that the kernel makes of a process's mounts.
//!
//! Trusted: `/proc/PID/mountinfo` of a process in a mount namespace that no caller made. Mount points and names of
//! devices in it may be chosen by anybody; the kernel writes their spaces and newlines as escapes, so that they can
//! neither end a field nor make a line. A line that is not as the kernel writes them is passed over: its mount is
//! then not there, and nothing is believed of it.

use std::io::{self, Read};

/// As much of a list of mounts is read as fs.mount-max (100,000 unless an admin raised it) usually takes, in bytes.
pub const MOUNTS_LIMIT: usize = 32 * 1024 * 1024;
/// How much is read at a time. Most executables are on a mount that stands in the first lines.
const CHUNK: usize = 16 * 1024;
/// A longer line is passed over: three paths of 4096 bytes, of which each may be written in four.
const LONGEST_LINE: usize = 64 * 1024;

/// In-kernel file systems on a disk or in memory of this machine. What asks about them does not wait for another
/// machine or program.
const LOCAL: [&[u8]; 14] = [
    b"ext2",
    b"ext3",
    b"ext4",
    b"xfs",
    b"btrfs",
    b"f2fs",
    b"bcachefs",
    b"tmpfs",
    b"ramfs",
    b"rootfs",
    b"squashfs",
    b"erofs",
    b"vfat",
    b"iso9660",
];

/// Who answers for the files of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServedBy {
    /// The kernel alone.
    Kernel,
    /// A program that any user may have started (FUSE): what it shows may be another thing each time.
    Program,
    /// Another machine, the host of this one, or file systems below it: what an admin mounted, and may still hang.
    Others,
}

/// The file system that a mount shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountedOn {
    pub served_by: ServedBy,
    /// Its number, as major and minor in one.
    pub device: u64,
}

/// Looks for the mount `id` in a list of mounts, and reads no further than that and at most [`MOUNTS_LIMIT`].
///
/// # Errors
/// What reading says.
pub fn find(mut mountinfo: impl Read, id: u64) -> io::Result<Option<MountedOn>> {
    let mut line = Vec::new();
    let mut too_long = false;
    let mut chunk = vec![0; CHUNK];
    let mut left = MOUNTS_LIMIT;
    while left > 0 {
        let n = match mountinfo.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        left = left.saturating_sub(n);
        for piece in chunk.get(..n).unwrap_or_default().split_inclusive(|b| *b == b'\n') {
            too_long |= line.len() + piece.len() > LONGEST_LINE;
            if too_long {
                line.clear();
            } else {
                line.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                if let Some((_, found)) = parse(&line).filter(|(it, _)| *it == id) {
                    return Ok(Some(found));
                }
                line.clear();
                too_long = false;
            }
        }
    }
    Ok(None)
}

/// The ID of the mount of a line, which ends with its newline, and what it shows.
fn parse(line: &[u8]) -> Option<(u64, MountedOn)> {
    let mut fields = line.strip_suffix(b"\n")?.split(|b| *b == b' ');
    let number = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u64>().ok();
    let id = number(fields.next()?)?;
    let _parent = number(fields.next()?)?;
    let mut device = fields.next()?.splitn(2, |b| *b == b':');
    let device = number(device.next()?)? << 32 | number(device.next()?)?;
    let (_root, _mount_point, _options) = (fields.next()?, fields.next()?, fields.next()?);
    // Then any number of fields, and a dash.
    fields.find(|field| *field == b"-")?;
    let fs_type = fields.next().filter(|name| !name.is_empty())?;
    Some((id, MountedOn { served_by: served_by(fs_type), device }))
}

/// `fs_type` with its subtype after a dot, as the kernel writes it. virtiofs is not FUSE here: the program at its other
/// end is the host's, and no user of this machine mounts it.
fn served_by(fs_type: &[u8]) -> ServedBy {
    let base = fs_type.split(|b| *b == b'.').next().unwrap_or_default();
    match base {
        b"fuse" | b"fuseblk" => ServedBy::Program,
        base if LOCAL.contains(&base) => ServedBy::Kernel,
        _ => ServedBy::Others,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NODE: &str = "\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 27 0:30 / /home/a/m\\040- rw,nosuid,nodev shared:7 - fuse.sshfs b:/c\\040-\\040ext4 rw,user_id=1000
32 27 0:31 / /home/a/n rw,nosuid,nodev shared:8 master:2 propagate_from:3 - fuse d rw
33 27 8:1 /x /mnt/win rw - fuseblk /dev/sda1 rw
34 27 0:33 / /srv rw shared:9 - nfs4 far:/srv rw
35 27 0:34 / /var/lib/containers/1/merged rw - overlay overlay rw,lowerdir=/a
36 27 0:35 / /shared rw - virtiofs host rw
37 27 0:36 / /f rw - fusectl fusectl rw
";

    #[test]
    fn a_mount_tells_who_serves_its_files() {
        use ServedBy::{Kernel, Others, Program};
        for (id, want) in [
            (27, Some((Kernel, 254 << 32))),
            (31, Some((Program, 30))),
            (32, Some((Program, 31))),
            (33, Some((Program, 8 << 32 | 1))),
            (34, Some((Others, 33))),
            (35, Some((Others, 34))),
            (36, Some((Others, 35))),
            (37, Some((Others, 36))),
            (2, None),
            (1, None),
            (7, None),
            (38, None),
        ] {
            let found = find(NODE.as_bytes(), id).unwrap();
            assert_eq!(found.map(|it| (it.served_by, it.device)), want, "{id}");
        }
    }

    #[test]
    fn a_line_that_the_kernel_does_not_write_is_passed_over() {
        for (case, text) in [
            ("empty", ""),
            ("no newline", "5 1 8:1 / / rw - ext4 d rw"),
            ("no dash", "5 1 8:1 / / rw ext4 d rw\n"),
            ("the dash comes too early", "5 1 8:1 / - rw ext4 d rw\n"),
            ("no type", "5 1 8:1 / / rw -\n"),
            ("an empty type", "5 1 8:1 / / rw -  d rw\n"),
            ("no device", "5 1 8 / / rw - ext4 d rw\n"),
            ("no parent", "5 x 8:1 / / rw - ext4 d rw\n"),
            ("a sign", "-5 1 8:1 / / rw - ext4 d rw\n"),
            ("another's number with ours before it", "55 1 8:1 / / rw - ext4 d rw\n"),
        ] {
            assert_eq!(find(text.as_bytes(), 5).unwrap(), None, "{case}");
            let after = format!("{}\n5 1 8:1 / / rw - ext4 d rw\n", text.trim_end());
            assert!(find(after.as_bytes(), 5).unwrap().is_some(), "{case}, and a good line after it");
        }
    }

    #[test]
    fn a_long_line_is_passed_over_and_a_long_list_is_read_to_its_bound() {
        let long = format!("5 1 8:1 /{} / rw - ext4 d rw\n", "x".repeat(LONGEST_LINE));
        let text = format!("{long}6 1 8:1 / / rw - ext4 d rw\n");
        assert_eq!(find(text.as_bytes(), 5).unwrap(), None);
        assert!(find(text.as_bytes(), 6).unwrap().is_some());

        assert_eq!(find(io::repeat(b'x'), 5).unwrap(), None, "it ends");
    }

    /// Gives a text in pieces of these lengths, as a file of /proc may.
    struct Pieces<'a>(&'a [u8], Vec<usize>);

    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = self.1.pop().unwrap_or(7).min(buffer.len()).min(self.0.len());
            let (piece, rest) = self.0.split_at(length);
            buffer[..length].copy_from_slice(piece);
            self.0 = rest;
            Ok(length)
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(lengths in proptest::collection::vec(1usize..200, 0..40), id in 20u64..40) {
            prop_assert_eq!(
                find(Pieces(NODE.as_bytes(), lengths), id).unwrap(),
                find(NODE.as_bytes(), id).unwrap()
            );
        }
    }
}
