//! An agent in a memory cgroup of its own, where one can be made, so that it is ended should it take more.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// How often the kernel's part is looked at where no file has its peak.
const LOOK: Duration = Duration::from_millis(20);

/// A memory cgroup of a bench's own.
pub(crate) struct Cgroup {
    at: PathBuf,
    /// The most that was the kernel's, in bytes, as far as it was looked at.
    kernel: Arc<AtomicU64>,
}

/// The most that a cgroup was charged, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Charged {
    pub(crate) all: u64,
    /// Of what the kernel keeps: sockets, descriptors, tables of pages.
    pub(crate) kernel: u64,
    /// How often the limit was met.
    pub(crate) met: u64,
}

impl Cgroup {
    /// One with `limit` bytes.
    pub(crate) fn make(limit: u64) -> Option<Self> {
        let name = format!("durward-bench-{}", std::process::id());
        let roots = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        roots.into_iter().find_map(|(root, file)| {
            let at = Path::new(root).join(&name);
            fs::create_dir(&at).ok()?;
            let made = Self { at, kernel: Arc::default() };
            fs::write(made.at.join(file), limit.to_string()).is_ok().then_some(())?;
            made.look();
            Some(made)
        })
    }

    /// Version 2 has no peak of the kernel's part.
    fn look(&self) {
        let (at, most) = (self.at.join("memory.stat"), Arc::downgrade(&self.kernel));
        if self.number("memory.kmem.max_usage_in_bytes").is_none() {
            std::thread::spawn(move || {
                while let Some(most) = most.upgrade() {
                    let text = fs::read_to_string(&at).unwrap_or_default();
                    let now = text.lines().find_map(|line| line.strip_prefix("kernel ")?.trim().parse().ok());
                    most.fetch_max(now.unwrap_or(0), Relaxed);
                    drop(most);
                    std::thread::sleep(LOOK);
                }
            });
        }
    }

    fn number(&self, name: &str) -> Option<u64> {
        fs::read_to_string(self.at.join(name)).ok()?.trim().parse().ok()
    }

    /// The most that was charged.
    pub(crate) fn highest(&self) -> Charged {
        let kernel = self.number("memory.kmem.max_usage_in_bytes");
        let all = self.number("memory.max_usage_in_bytes").or_else(|| self.number("memory.peak"));
        Charged {
            all: all.unwrap_or(0),
            kernel: kernel.unwrap_or_else(|| self.kernel.load(Relaxed)),
            met: self.number("memory.failcnt").unwrap_or(0),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.at
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..100 {
            if fs::remove_dir(&self.at).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        eprintln!("{} is left behind", self.at.display());
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
        let config = dir.path().join("agent.conf");
        let mut command = Command::new(binary);
        command.args(["run", "--config"]).arg(config);
        Self::start_nice(&command, dir, limit, 0)
    }

    /// Starts what listens at `api.sock` in `dir`, with this priority, and waits until it does.
    pub(crate) fn start_nice(started: &Command, dir: tempfile::TempDir, limit: u64, nice: i64) -> Self {
        let cgroup = Cgroup::make(limit);
        let log = fs::File::create(dir.path().join("log")).expect("a log");
        // The shell enters the cgroup and becomes the agent.
        let enter = "test -z \"$0\" || echo $$ > \"$0/cgroup.procs\"; exec \"$@\"";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", enter]).arg(cgroup.as_ref().map_or_else(|| Path::new(""), Cgroup::path));
        if nice != 0 {
            command.args(["nice", "-n", &nice.to_string()]);
        }
        command.arg(started.get_program()).args(started.get_args());
        command.envs(started.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let child = command
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
