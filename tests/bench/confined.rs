//! An agent in a memory cgroup of its own, where one can be made, so that it is ended should it take more.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A memory cgroup of a bench's own.
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// One with `limit` bytes.
    pub(crate) fn make(limit: u64) -> Option<Self> {
        let name = format!("durward-bench-{}", std::process::id());
        let roots = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        roots.into_iter().find_map(|(root, file)| {
            let at = Path::new(root).join(&name);
            fs::create_dir(&at).ok()?;
            let made = Self(at);
            fs::write(made.0.join(file), limit.to_string()).is_ok().then_some(made)
        })
    }

    /// The most that was charged, in bytes, and how often the limit was met.
    pub(crate) fn highest(&self) -> (u64, u64) {
        let number = |names: &[&str]| {
            names.iter().find_map(|name| fs::read_to_string(self.0.join(name)).ok()?.trim().parse().ok())
        };
        (
            number(&["memory.max_usage_in_bytes", "memory.peak"]).unwrap_or(0),
            number(&["memory.failcnt"]).unwrap_or(0),
        )
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

/// An agent's process, killed when dropped.
pub(crate) struct Confined {
    pub(crate) child: Child,
    /// Gone after the process.
    pub(crate) cgroup: Option<Cgroup>,
    /// With `agent.conf`, `api.sock`, and what it says in `log`.
    pub(crate) dir: tempfile::TempDir,
}

impl Drop for Confined {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Confined {
    /// Starts `binary` with what is in `dir`, and waits until it serves.
    pub(crate) fn start(binary: &Path, dir: tempfile::TempDir, limit: u64) -> Self {
        let cgroup = Cgroup::make(limit);
        let log = fs::File::create(dir.path().join("log")).expect("a log");
        // The shell enters the cgroup and becomes the agent.
        let enter = "test -z \"$0\" || echo $$ > \"$0/cgroup.procs\"; exec \"$@\"";
        let child = Command::new("/bin/sh")
            .args(["-c", enter])
            .arg(cgroup.as_ref().map_or_else(|| Path::new(""), |cgroup| &cgroup.0))
            .arg(binary)
            .args(["run", "--config"])
            .arg(dir.path().join("agent.conf"))
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .spawn()
            .expect("the agent");
        let mut agent = Self { child, cgroup, dir };
        let started = Instant::now();
        while UnixStream::connect(agent.socket()).is_err() {
            let up = agent.ended().is_none() && started.elapsed() < Duration::from_secs(60);
            assert!(up, "it did not start: {}", agent.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.path().join("log")).unwrap_or_default()).into_owned()
    }

    pub(crate) fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("a state")
    }

    /// A number in its status: KiB, where it is of memory.
    pub(crate) fn status(&self, line: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|it| it.strip_prefix(line))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse().ok()
    }
}
