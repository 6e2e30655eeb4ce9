//! The agent under test: a process of its own, in a memory cgroup where one can be made.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{
    PATIENCE, now,
    oracle::{CONFIGURATIONS, Entry, PROGRAMS, configuration},
};

/// How long calls have at SIGTERM (`drain_timeout`), and a second.
const DRAIN: Duration = Duration::from_secs(3);

/// A memory cgroup of the fuzzer's own.
struct Cgroup(PathBuf);

impl Cgroup {
    fn make(limit: u64) -> Option<Self> {
        let name = format!("durward-behaviour-{}", std::process::id());
        let roots = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        roots.into_iter().find_map(|(root, file)| {
            let at = Path::new(root).join(&name);
            fs::create_dir(&at).ok()?;
            let made = Self(at);
            fs::write(made.0.join(file), limit.to_string()).is_ok().then_some(made)
        })
    }

    /// The most that was charged, in bytes.
    fn highest(&self) -> Option<u64> {
        let names = ["memory.max_usage_in_bytes", "memory.peak"];
        names.iter().find_map(|name| fs::read_to_string(self.0.join(name)).ok()?.trim().parse().ok())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} is left behind", self.0.display());
    }
}

pub(crate) struct Agent {
    child: Child,
    cgroup: Option<Cgroup>,
    pub(crate) dir: tempfile::TempDir,
    /// What it may use, in bytes.
    limit: u64,
    health_port: u16,
    configuration: u8,
    /// When each part of the configuration was last in force.
    since_taken: Vec<(u8, u64)>,
    /// Bytes of the log that were looked at.
    seen: usize,
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
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
        let config = dir.path().join("agent.conf");
        fs::write(&config, configuration(dir.path(), 0, free.port())).expect("written");
        let cgroup = Cgroup::make(limit);
        let log = fs::File::create(dir.path().join("log")).expect("a log");
        // The shell enters the cgroup and becomes the agent.
        let enter = "test -z \"$0\" || echo $$ > \"$0/cgroup.procs\"; exec \"$@\"";
        let child = Command::new("/bin/sh")
            .args(["-c", enter])
            .arg(cgroup.as_ref().map_or_else(|| Path::new(""), |cgroup| &cgroup.0))
            .arg(binary)
            .args(["run", "--config"])
            .arg(config)
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("the agent");
        let health_port = free.port();
        let mut agent = Self {
            child,
            cgroup,
            dir,
            limit,
            health_port,
            configuration: 0,
            since_taken: Vec::new(),
            seen: 0,
        };
        let started = Instant::now();
        while UnixStream::connect(agent.dir.path().join("api.sock")).is_err() {
            let up = agent.ended().is_none() && started.elapsed() < Duration::from_secs(60);
            assert!(up, "it did not start: {}", agent.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.path().join("log")).unwrap_or_default()).into_owned()
    }

    pub(crate) fn ended(&mut self) -> Option<String> {
        self.child.try_wait().expect("a state").map(|status| format!("the agent ended: {status}"))
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.child.id()))
    }

    /// A line of its status: KiB, or a number.
    fn status(&self, line: &str) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap_or_default();
        let line = status.lines().find_map(|it| it.strip_prefix(line)).unwrap_or_default();
        line.trim_start_matches(':').split_whitespace().next().and_then(|it| it.parse().ok()).unwrap_or(0)
    }

    /// Open descriptors and threads.
    pub(crate) fn holds(&self) -> (u64, u64) {
        let descriptors = fs::read_dir(self.proc("fd")).map_or(0, Iterator::count);
        (u64::try_from(descriptors).expect("64 bits"), self.status("Threads"))
    }

    /// What is wrong with it, seen from outside.
    pub(crate) fn ails(&mut self) -> Option<String> {
        if let Some(ended) = self.ended() {
            return Some(ended);
        }
        let resident = self.status("VmRSS") * 1024;
        if resident > self.limit {
            return Some(format!("{resident} bytes resident, {} allowed", self.limit));
        }
        let log = self.log();
        let new = log.get(self.seen..).unwrap_or_default();
        self.seen = log.len();
        let bad = new.lines().find(|line| line.contains("ERROR") || line.contains("panicked"));
        bad.map(|line| format!("the log says: {line}"))
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
        let done = || self.log().matches(" reloaded").count();
        let (before, began) = (done(), Instant::now());
        let config = configuration(self.dir.path(), next, self.health_port);
        fs::write(self.dir.path().join("agent.conf"), config).expect("written");
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
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Ends it with SIGTERM. What is wrong with how it ended, and what it took at most.
    pub(crate) fn end(mut self) -> (Option<String>, String) {
        let log = self.log();
        let warnings = log.lines().filter(|line| line.contains("WARN")).count();
        let charged = self.cgroup.as_ref().and_then(Cgroup::highest).map_or(0, |bytes| bytes / 1024);
        let said = format!(
            "{} KiB resident at most, {charged} KiB charged; {} lines in the log, {warnings} warnings",
            self.status("VmHWM"),
            log.lines().count(),
        );
        let began = Instant::now();
        kill(self.pid(), Signal::SIGTERM).expect("a signal");
        let patience = if cfg!(debug_assertions) { PATIENCE } else { DRAIN };
        loop {
            match self.child.try_wait().expect("a state") {
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
