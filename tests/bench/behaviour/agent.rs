//! The agent under test: a process of its own, in a memory cgroup where one can be made.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    PATIENCE,
    confined::{Cgroup, Charged, Confined},
    now,
    oracle::{CONFIGURATIONS, EVERYTHING, Entry, PROGRAMS, configuration},
};

/// How long calls have at SIGTERM (`drain_timeout`), and a second.
const DRAIN: Duration = Duration::from_secs(3);

/// What an agent says in its metrics.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Holds {
    /// As its budget reckons them.
    pub(crate) bytes: f64,
    pub(crate) connections: f64,
    pub(crate) requests: f64,
}

pub(crate) struct Agent {
    pub(crate) confined: Confined,
    /// What it may use, in bytes.
    limit: u64,
    health_port: u16,
    configuration: u8,
    /// When each part of the configuration was last in force.
    since_taken: Vec<(u8, u64)>,
    /// Bytes of the log that were looked at.
    seen: usize,
}

impl Agent {
    /// Starts `binary`, with `limit` bytes of memory.
    pub(crate) fn start(binary: &Path, limit: u64) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("open to all");
        for program in PROGRAMS {
            let own = std::env::current_exe().expect("this program");
            fs::copy(own, dir.path().join(program)).expect("a copy");
        }
        let free = TcpListener::bind(("127.0.0.1", 0)).and_then(|it| it.local_addr()).expect("a port");
        let health_port = free.port();
        fs::write(dir.path().join("agent.conf"), configuration(dir.path(), EVERYTHING, health_port))
            .expect("written");
        let confined = Confined::start(binary, dir, limit);
        Self { confined, limit, health_port, configuration: EVERYTHING, since_taken: Vec::new(), seen: 0 }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.confined.dir.path()
    }

    /// Open descriptors and threads.
    pub(crate) fn holds(&self) -> (u64, u64) {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count);
        (u64::try_from(descriptors).expect("64 bits"), self.confined.status("Threads").unwrap_or(0))
    }

    /// What each of its threads does, and how many wait at its socket.
    pub(crate) fn threads(&self) -> String {
        let mut told = String::new();
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        for task in tasks.map(|it| it.path()) {
            let read = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default().trim().to_owned();
            told += &format!("\n    thread {}: {} at {}", task.display(), read("comm"), read("wchan"));
            told += &format!(" in {}", read("syscall").split(' ').next().unwrap_or_default());
        }
        let sockets = std::process::Command::new("ss").arg("-xlH").output();
        let sockets = sockets.map(|it| String::from_utf8_lossy(&it.stdout).into_owned()).unwrap_or_default();
        let own = self.dir().display().to_string();
        sockets.lines().filter(|line| line.contains(&own)).for_each(|line| told += &format!("\n    {line}"));
        told
    }

    /// What is wrong with it, seen from outside.
    pub(crate) fn ails(&mut self) -> Option<String> {
        if let Some(status) = self.confined.ended() {
            return Some(format!("the agent ended: {status}"));
        }
        let resident = self.confined.status("VmRSS").unwrap_or(0) * 1024;
        if resident > self.limit {
            return Some(format!("{resident} bytes resident, {} allowed", self.limit));
        }
        let log = self.confined.log();
        let new = log.get(self.seen..).unwrap_or_default();
        self.seen = log.len();
        let bad = new.lines().find(|line| line.contains("ERROR") || line.contains("panicked"));
        bad.map(|line| format!("the log says: {line}"))
    }

    /// What it says that it holds. `None` where it does not say.
    pub(crate) fn says_it_holds(&self) -> Option<Holds> {
        let mut stream = UnixStream::connect(self.dir().join("metrics.sock")).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let of = |series: &str| {
            let number = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
            // As the text has it, large ones too.
            number.trim().parse::<f64>().ok()
        };
        Some(Holds {
            bytes: of("durward_memory_accounted_bytes")?,
            connections: of("durward_connections_open")?,
            requests: of("durward_requests_open")?,
        })
    }

    /// Whether it says that it holds more than it may.
    pub(crate) fn holds_too_much(&self) -> Option<String> {
        let holds = self.says_it_holds()?;
        let limit = f64::from(u32::try_from(self.limit).ok()?);
        (holds.bytes > limit).then(|| format!("{holds:?}, {} bytes allowed", self.limit))
    }

    /// Whether `/live` answers.
    pub(crate) fn is_live(&self) -> bool {
        let ask = || {
            let mut stream = TcpStream::connect(("127.0.0.1", self.health_port))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer)
        };
        ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    /// Reloads with another configuration, and waits until it is in force. `false` where that is not said.
    pub(crate) fn reload(&mut self, next: u8) -> bool {
        let done = || self.confined.log().matches(" reloaded").count();
        let (before, began) = (done(), Instant::now());
        let config = configuration(self.dir(), next, self.health_port);
        fs::write(self.dir().join("agent.conf"), config).expect("written");
        kill(self.pid(), Signal::SIGHUP).expect("a signal");
        while done() == before {
            if began.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.since_taken.retain(|(parts, _)| *parts != self.configuration);
        self.since_taken.push((self.configuration, now()));
        self.configuration = next;
        true
    }

    /// When an entry was last there: this moment, for one that is.
    pub(crate) fn in_force(&self, name: &str) -> Option<u64> {
        let entry = Entry::named(name)?;
        if entry.is_in(self.configuration) {
            return Some(now());
        }
        self.since_taken.iter().rev().find(|(parts, _)| entry.is_in(*parts)).map(|(_, until)| *until)
    }

    pub(crate) fn other_configuration(&self, by: usize) -> u8 {
        let by = u8::try_from(1 + by % (CONFIGURATIONS - 1)).expect("few");
        self.configuration ^ by
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.confined.child.id().cast_signed())
    }

    /// Ends it with SIGTERM. What is wrong with how it ended, and what it took at most.
    pub(crate) fn end(mut self) -> (Option<String>, String) {
        let log = self.confined.log();
        let warnings = log.lines().filter(|line| line.contains("WARN")).count();
        let Charged { all, kernel, met } =
            self.confined.cgroup.as_ref().map(Cgroup::highest).unwrap_or_default();
        let said = format!(
            "{} KiB resident at most, {} KiB charged, {} of them the kernel's, at the limit {met} times; {} lines in \
             the log, {warnings} warnings",
            self.confined.status("VmHWM").unwrap_or(0),
            all / 1024,
            kernel / 1024,
            log.lines().count(),
        );
        let began = Instant::now();
        kill(self.pid(), Signal::SIGTERM).expect("a signal");
        let patience = if cfg!(debug_assertions) { PATIENCE } else { DRAIN };
        loop {
            match self.confined.ended() {
                Some(status) if status.success() => return (None, said),
                Some(status) => return (Some(format!("the agent ended with {status}")), said),
                None if began.elapsed() > patience => {
                    return (Some(format!("SIGTERM is not obeyed within {patience:?}")), said);
                }
                None => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}
