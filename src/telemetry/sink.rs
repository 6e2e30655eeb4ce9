//! Where lines end up: standard output, a file, or whoever has bound a datagram socket. It knows exactly how many got there.
//!
//! Lines of the audit have their run and number from here, where they are written: what is not there has no number, and a number
//! that is missing there is a line that somebody took away.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use nix::errno::Errno;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::os::clock::Clock;

/// What the line says that tells how many were lost before it.
pub const LINES_LOST: &str = "log lines were lost";

/// The run of the agent that the lines of the audit are of: a name for this process.
pub static AUDIT_RUN: LazyLock<String> = LazyLock::new(|| {
    let random = ahash::RandomState::new().hash_one(Clock::SYSTEM.now());
    format!("{:08x}", random >> 32)
});

/// Where its number belongs in a line of the audit. No line has this character otherwise: whatever is logged is escaped.
const NUMBER_HERE: u8 = 0x1e;
/// Lines that are numbered at a time are about as many bytes.
const AT_A_TIME: usize = 64 * 1024;

/// Adds a line of the audit, of text or JSON, that waits for its number.
pub(super) fn add_unnumbered(to: &mut Vec<u8>, line: &[u8]) {
    let end = line.strip_suffix(b"\n").map(|line| line.strip_suffix(b"}").unwrap_or(line));
    let (fields, end) = line.split_at(end.unwrap_or(line).len());
    to.extend_from_slice(fields);
    to.push(NUMBER_HERE);
    to.extend_from_slice(end);
}

/// A place for lines.
pub(super) struct Sink {
    to: SinkPlace,
    /// The last line there is not whole.
    torn: bool,
    /// Lines of the audit that are there, where it is written there.
    numbered: Option<u64>,
}

enum SinkPlace {
    Stdout,
    File(File),
    Socket(PathBuf),
}

/// What got there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Delivered {
    /// Lines that are there as a whole.
    pub(super) lines: u64,
    /// Whether it was told there how many were lost before, if any were.
    pub(super) told: bool,
}

impl Sink {
    pub(super) fn stdout() -> Self {
        Self { to: SinkPlace::Stdout, torn: false, numbered: None }
    }

    pub(super) fn file(file: AppendedFile) -> Self {
        let AppendedFile { file, torn } = file;
        Self { to: SinkPlace::File(file), torn, numbered: None }
    }

    pub(super) fn socket(path: PathBuf) -> Self {
        Self { to: SinkPlace::Socket(path), torn: false, numbered: None }
    }

    /// The same place, where the audit is written.
    pub(super) fn of_audit(self) -> Self {
        Self { numbered: Some(0), ..self }
    }

    /// From now on the place is this file.
    pub(super) fn moves_to(&mut self, file: AppendedFile) {
        let AppendedFile { file, torn } = file;
        (self.to, self.torn) = (SinkPlace::File(file), torn);
    }

    /// Why nobody takes what is sent to the socket at `path`, if that is so.
    pub(super) fn untaken(path: &Path) -> Option<io::Error> {
        UnixDatagram::unbound().and_then(|socket| socket.connect(path)).err()
    }

    /// Writes `lines`, each with its end, after a line that tells how many were lost before.
    pub(super) fn write(&mut self, lines: &[u8], lost: u64) -> Delivered {
        if lost > 0 && self.deliver(&lost_lines(lost, self.numbered.is_some())) == 0 {
            return Delivered { lines: 0, told: false };
        }
        let (mut rest, mut there) = (lines, 0);
        while !rest.is_empty() {
            let most = rest.get(AT_A_TIME..).unwrap_or_default();
            let end = most.iter().position(|byte| *byte == b'\n').map_or(rest.len(), |at| AT_A_TIME + at + 1);
            let (part, behind) = rest.split_at(end);
            let delivered = self.deliver(part);
            there += delivered;
            // No line gets there between one that is lost and the one that tells so. Of datagrams a single one may be too long.
            let is_whole = delivered == count(part) || matches!(self.to, SinkPlace::Socket(_));
            rest = if is_whole { behind } else { &[] };
        }
        Delivered { lines: there, told: true }
    }

    /// Writes lines with their numbers: how many are there as a whole.
    fn deliver(&mut self, lines: &[u8]) -> u64 {
        let before = self.numbered.unwrap_or(0);
        let (there, of_audit) = match &mut self.to {
            SinkPlace::Stdout => write_lines(&mut io::stdout().lock(), &mut self.torn, lines, before),
            SinkPlace::File(file) => write_lines(file, &mut self.torn, lines, before),
            SinkPlace::Socket(path) => {
                let socket = UnixDatagram::unbound().and_then(|socket| {
                    socket.connect(path)?;
                    Ok(socket)
                });
                match socket {
                    Ok(socket) => send_lines(&socket, lines, before),
                    Err(_nobody_has_bound_it) => (0, 0),
                }
            }
        };
        self.numbered = self.numbered.map(|numbered| numbered + of_audit);
        there
    }
}

/// A file to append to.
pub(super) struct AppendedFile {
    pub(super) file: File,
    /// Whether its last line is not whole: the disk was full, or the machine went down.
    pub(super) torn: bool,
}

/// Adds a line to `text`; one of the audit with this number. Whether it is one.
fn add_numbered(text: &mut Vec<u8>, line: &[u8], number: u64) -> bool {
    let Some(at) = line.iter().position(|byte| *byte == NUMBER_HERE) else {
        text.extend_from_slice(line);
        return false;
    };
    let (fields, end) = (line.get(..at).unwrap_or_default(), line.get(at + 1..).unwrap_or_default());
    let run = AUDIT_RUN.as_str();
    let told = match end.starts_with(b"}") {
        true => format!(",\"run\":\"{run}\",\"seq\":{number}"),
        false => format!(" run={run} seq={number}"),
    };
    text.extend([fields, told.as_bytes(), end].concat());
    true
}

/// Writes the lines behind this number of the audit: how many are there, and how many of them are of the audit.
fn write_lines(to: &mut impl Write, torn: &mut bool, lines: &[u8], before: u64) -> (u64, u64) {
    let (mut text, mut number, mut of_audit) = (Vec::new(), before, Vec::new());
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        number += u64::from(add_numbered(&mut text, line, number + 1));
        of_audit.push(number - before);
    }
    let there = write_whole(to, torn, &text);
    let last = usize::try_from(there).ok().and_then(|there| of_audit.get(there.checked_sub(1)?));
    (there, last.copied().unwrap_or(0))
}

/// Writes as much as it can: how many whole lines.
fn write_whole(to: &mut impl Write, torn: &mut bool, lines: &[u8]) -> u64 {
    if *torn {
        // The piece of a line that is there stays by itself.
        if to.write_all(b"\n").is_err() {
            return 0;
        }
        *torn = false;
    }
    let mut written = 0;
    while let Some(rest) = lines.get(written..).filter(|rest| !rest.is_empty()) {
        match to.write(rest) {
            Ok(0) => break,
            Ok(more) => written += more,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(_no_space_or_nobody_reads) => break,
        }
    }
    // What the standard output holds back it writes with the next.
    let flushed = to.flush().is_ok();
    let there = lines.get(..written).unwrap_or_default();
    *torn = there.last().is_some_and(|last| *last != b'\n');
    if flushed { count(there) } else { 0 }
}

/// Sends each line as a datagram, as [`write_lines`]. One that is too long for that is lost; when nobody takes any, so is the rest.
fn send_lines(socket: &UnixDatagram, lines: &[u8], before: u64) -> (u64, u64) {
    let (mut sent, mut of_audit, mut text) = (0, 0, Vec::new());
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        text.clear();
        let is_of_audit = add_numbered(&mut text, line, before + of_audit + 1);
        match socket.send(&text) {
            Ok(_) => (sent, of_audit) = (sent + 1, of_audit + u64::from(is_of_audit)),
            Err(err) if err.raw_os_error().map(Errno::from_raw) == Some(Errno::EMSGSIZE) => {}
            Err(_gone) => break,
        }
    }
    (sent, of_audit)
}

fn count(lines: &[u8]) -> u64 {
    u64::try_from(lines.iter().filter(|byte| **byte == b'\n').count()).unwrap_or(u64::MAX)
}

/// Valid in both formats: text to people, an object to a parser. Where it is one of the audit, it waits for its number.
fn lost_lines(lost: u64, is_of_audit: bool) -> Vec<u8> {
    let now = OffsetDateTime::from(Clock::SYSTEM.now());
    // To the microsecond, as other lines.
    let now = now.replace_nanosecond(now.microsecond() * 1000).unwrap_or(now);
    let now = now.format(&Rfc3339).unwrap_or_default();
    let line = format!(
        "{{\"timestamp\":\"{now}\",\"level\":\"WARN\",\"message\":\"{LINES_LOST}\",\"lost\":{lost}}}\n"
    );
    if !is_of_audit {
        return line.into_bytes();
    }
    let mut unnumbered = Vec::new();
    add_unnumbered(&mut unnumbered, line.as_bytes());
    unnumbered
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with so much room.
    struct Disk {
        held: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let fits = bytes.len().min(self.room - self.held.len());
            if fits == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.held.extend_from_slice(&bytes[..fits]);
            Ok(fits)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is there of the lines, and how many of them the numbers behind `before` are of.
    fn write(disk: &mut Disk, torn: &mut bool, lines: &str, before: u64) -> (u64, u64) {
        let mut unnumbered = Vec::new();
        for line in lines.split_inclusive('\n') {
            match line.starts_with("audit") || line.starts_with('{') {
                true => add_unnumbered(&mut unnumbered, line.as_bytes()),
                false => unnumbered.extend_from_slice(line.as_bytes()),
            }
        }
        write_lines(disk, torn, &unnumbered, before)
    }

    #[test]
    fn a_full_disk_holds_what_it_holds_and_numbers_what_is_there() {
        let run = AUDIT_RUN.as_str();
        let (mut disk, mut torn) = (Disk { held: Vec::new(), room: 40 }, false);
        // Two, and half of the third.
        assert_eq!(write(&mut disk, &mut torn, "one\naudit\naudit\nfour\n", 0), (2, 1));
        assert_eq!(write(&mut disk, &mut torn, "five\n", 1), (0, 0));
        disk.room = 1000;
        assert_eq!(write(&mut disk, &mut torn, "audit\nsix\n{\"a\":1}\n", 1), (3, 2));
        let text = String::from_utf8(disk.held).unwrap();
        let told = |seq: u64| format!("audit run={run} seq={seq}");
        let want = [
            "one".to_owned(),
            told(1),
            told(2).chars().take(11).collect(),
            told(2),
            "six".to_owned(),
            format!("{{\"a\":1,\"run\":\"{run}\",\"seq\":3}}"),
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), want);
    }

    #[test]
    fn of_datagrams_those_are_counted_that_were_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.sock");
        let mut sink = Sink::socket(path.clone()).of_audit();
        let marked = |lines: &[&str]| {
            let mut unnumbered = Vec::new();
            lines.iter().for_each(|line| add_unnumbered(&mut unnumbered, line.as_bytes()));
            unnumbered
        };
        assert_eq!(sink.write(&marked(&["one\n", "two\n"]), 0), Delivered { lines: 0, told: true });
        let reader = UnixDatagram::bind(&path).unwrap();
        let long = "x".repeat(1 << 20);
        let lines = marked(&["three\n", &format!("{long}\n"), "four\n"]);
        assert_eq!(sink.write(&lines, 2), Delivered { lines: 2, told: true });
        let mut taken = Vec::new();
        for _ in 0..3 {
            let mut datagram = [0; 200];
            let len = reader.recv(&mut datagram).unwrap();
            taken.push(String::from_utf8(datagram[..len].to_vec()).unwrap());
        }
        let run = AUDIT_RUN.as_str();
        assert!(taken[0].contains(&format!("\"lost\":2,\"run\":\"{run}\",\"seq\":1}}")), "{taken:?}");
        assert_eq!(taken[1..], [format!("three run={run} seq=2"), format!("four run={run} seq=3")]);
        drop(reader);
        assert_eq!(sink.write(b"five\n", 1), Delivered { lines: 0, told: false });
    }
}
