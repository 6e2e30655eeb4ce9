//! Where lines end up: standard output, a file, or whoever has bound a datagram socket. It knows exactly how many got there.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
};

use nix::errno::Errno;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::os::clock::Clock;

/// What the line says that tells how many were lost before it.
pub const LINES_LOST: &str = "log lines were lost";

/// A place for lines.
pub(super) struct Sink {
    to: SinkPlace,
    /// The last line there is not whole.
    torn: bool,
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
        Self { to: SinkPlace::Stdout, torn: false }
    }

    pub(super) fn file(file: File) -> Self {
        Self { to: SinkPlace::File(file), torn: false }
    }

    pub(super) fn socket(path: PathBuf) -> Self {
        Self { to: SinkPlace::Socket(path), torn: false }
    }

    /// Why nobody takes what is sent to the socket at `path`, if that is so.
    pub(super) fn untaken(path: &Path) -> Option<io::Error> {
        UnixDatagram::unbound().and_then(|socket| socket.connect(path)).err()
    }

    /// Writes `lines`, each with its end, after a line that tells how many were lost before.
    pub(super) fn write(&mut self, lines: &[u8], lost: u64) -> Delivered {
        match &mut self.to {
            SinkPlace::Stdout => write_lines(&mut io::stdout().lock(), &mut self.torn, lines, lost),
            SinkPlace::File(file) => write_lines(file, &mut self.torn, lines, lost),
            SinkPlace::Socket(path) => {
                let socket = UnixDatagram::unbound().and_then(|socket| {
                    socket.connect(path)?;
                    Ok(socket)
                });
                match socket {
                    Ok(socket) => send_lines(&socket, lines, lost),
                    Err(_nobody_has_bound_it) => Delivered { lines: 0, told: lost == 0 },
                }
            }
        }
    }
}

fn write_lines(to: &mut impl Write, torn: &mut bool, lines: &[u8], lost: u64) -> Delivered {
    if lost > 0 {
        let told = write_whole(to, torn, &[lost_lines(lost).as_bytes(), b"\n"].concat()) == 1;
        if !told {
            return Delivered { lines: 0, told };
        }
    }
    Delivered { lines: write_whole(to, torn, lines), told: true }
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

/// Sends each line as a datagram. One that is too long for that is lost; when nobody takes any, so is the rest.
fn send_lines(socket: &UnixDatagram, lines: &[u8], lost: u64) -> Delivered {
    if lost > 0 && socket.send(lost_lines(lost).as_bytes()).is_err() {
        return Delivered { lines: 0, told: false };
    }
    let mut sent = 0;
    for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        match socket.send(line) {
            Ok(_) => sent += 1,
            Err(err) if err.raw_os_error().map(Errno::from_raw) == Some(Errno::EMSGSIZE) => {}
            Err(_gone) => break,
        }
    }
    Delivered { lines: sent, told: true }
}

fn count(lines: &[u8]) -> u64 {
    u64::try_from(lines.iter().filter(|byte| **byte == b'\n').count()).unwrap_or(u64::MAX)
}

/// Valid in both formats: text to people, an object to a parser.
fn lost_lines(lost: u64) -> String {
    let now = OffsetDateTime::from(Clock::SYSTEM.now());
    // To the microsecond, as other lines.
    let now = now.replace_nanosecond(now.microsecond() * 1000).unwrap_or(now);
    let now = now.format(&Rfc3339).unwrap_or_default();
    format!("{{\"timestamp\":\"{now}\",\"level\":\"WARN\",\"message\":\"{LINES_LOST}\",\"lost\":{lost}}}")
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

    #[test]
    fn a_full_disk_holds_what_it_holds() {
        let (mut disk, mut torn) = (Disk { held: Vec::new(), room: 7 }, false);
        // One, and half of the second.
        let got = write_lines(&mut disk, &mut torn, b"one\ntwo...\nthree\n", 0);
        assert_eq!(got, Delivered { lines: 1, told: true });
        assert_eq!(write_lines(&mut disk, &mut torn, b"four\n", 2), Delivered { lines: 0, told: false });
        disk.room = 1000;
        assert_eq!(write_lines(&mut disk, &mut torn, b"five\n", 3), Delivered { lines: 1, told: true });
        let text = String::from_utf8(disk.held).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[..2] == ["one", "two"] && lines[2].contains("\"lost\":3}") && lines[3..] == ["five"],
            "{text}"
        );
    }

    #[test]
    fn of_datagrams_those_are_counted_that_were_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.sock");
        let mut sink = Sink::socket(path.clone());
        assert_eq!(sink.write(b"one\ntwo\n", 0), Delivered { lines: 0, told: true });
        let reader = UnixDatagram::bind(&path).unwrap();
        let long = "x".repeat(1 << 20);
        let lines = format!("three\n{long}\nfour\n");
        assert_eq!(sink.write(lines.as_bytes(), 2), Delivered { lines: 2, told: true });
        let mut taken = Vec::new();
        for _ in 0..3 {
            let mut datagram = [0; 200];
            let len = reader.recv(&mut datagram).unwrap();
            taken.push(String::from_utf8(datagram[..len].to_vec()).unwrap());
        }
        assert!(taken[0].contains("\"lost\":2}") && taken[1..] == ["three", "four"], "{taken:?}");
        drop(reader);
        assert_eq!(sink.write(b"five\n", 1), Delivered { lines: 0, told: false });
    }
}
