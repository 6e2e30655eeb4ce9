//! What callers hold, and who gives way when it is too much: an agent as a process of its own, in a memory cgroup where one
//! can be made.

#![expect(clippy::disallowed_methods, reason = "its clients are threads and processes, which may sleep")]

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use durward::limits::budget::{HTTP2, PARKED, STREAM};
use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::Signal,
    },
    unistd::geteuid,
};

use crate::{
    frames::{Called, FETCH_JWT, PREFACE, SETTINGS, call, call_frames, frame, jwt_request, message},
    hostile::{NEIGHBOUR, PATIENCE},
    support::{Process, write_config},
};

/// A stream that waits for news.
const WATCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

/// A memory cgroup of a test's own, without a limit.
struct TestCgroup(PathBuf);

impl TestCgroup {
    /// `None` where none can be made: for an ordinary user, or where the kernel has them elsewhere.
    fn make(name: &str) -> Option<Self> {
        let name = format!("durward-{name}-{}", std::process::id());
        let roots =
            [("/sys/fs/cgroup/memory", "memory.usage_in_bytes"), ("/sys/fs/cgroup", "memory.current")];
        roots.into_iter().find_map(|(root, file)| {
            let at = Path::new(root).join(&name);
            fs::create_dir(&at).ok()?;
            let made = Self(at);
            made.0.join(file).exists().then_some(made)
        })
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let began = Instant::now();
        while fs::remove_dir(&self.0).is_err() && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// An agent with its metrics at a socket.
struct Weighed {
    process: Process,
    dir: tempfile::TempDir,
    /// Gone after the process.
    cgroup: Option<TestCgroup>,
}

impl Weighed {
    fn start(name: &str, ratelimit: &str) -> Self {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        write_config(dir.path(), &blocks(dir.path(), ratelimit));
        let cgroup = TestCgroup::make(name);
        let mut process = match &cgroup {
            None => Process::spawn(dir.path()),
            // The shell enters the cgroup and becomes the agent.
            Some(TestCgroup(at)) => {
                let enter = "echo $$ > \"$0/cgroup.procs\"; exec \"$@\"";
                Process::spawn_by(&["/bin/sh", "-c", enter, at.to_str().unwrap()], dir.path())
            }
        };
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            process.serving(dir.path()).await;
        });
        Self { process, dir, cgroup }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// What a scrape says of memory.
    fn memory(&self, of: &str) -> u64 {
        let mut stream = UnixStream::connect(self.dir.path().join("metrics.sock")).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let series = format!("durward_memory_bytes{{of=\"{of}\"}} ");
        let line = answer.lines().find_map(|line| line.strip_prefix(&series)).unwrap();
        line.parse().unwrap()
    }

    /// Waits until what it says of memory is so.
    fn wait_for(&self, of: &str, right: impl Fn(u64) -> bool) -> u64 {
        let began = Instant::now();
        loop {
            let bytes = self.memory(of);
            if right(bytes) {
                return bytes;
            }
            assert!(began.elapsed() < PATIENCE, "{of} is {bytes}\n{}", self.log());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// What it uses by now, in bytes: what is charged to its cgroup, or its resident set.
    fn measured(&self) -> u64 {
        // The last look of the agent's was before what is measured.
        thread::sleep(Duration::from_millis(600));
        match self.cgroup {
            Some(_) => self.memory("cgroup"),
            None => self.process.memory("VmRSS") << 10,
        }
    }

    /// Connections with HTTP/2 and no request yet.
    fn connections(&self, number: usize) -> Vec<UnixStream> {
        (0..number).map(|_| UnixStream::connect(self.socket()).unwrap()).collect()
    }
}

impl Drop for Weighed {
    fn drop(&mut self) {
        if !self.process.has_ended() {
            self.process.signal(Signal::SIGKILL);
        }
        self.process.wait();
    }
}

fn blocks(dir: &Path, ratelimit: &str) -> String {
    let own = geteuid();
    let metrics = dir.join("metrics.sock");
    let entry =
        |uid| format!("entry \"spiffe://example.org/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n");
    format!(
        "telemetry {{ Prometheus {{ socket_path = \"{}\" }} }}\nratelimit {{ {ratelimit} }}\n{}{}",
        metrics.display(),
        entry(own.as_raw()),
        entry(NEIGHBOUR)
    )
}

/// Opens so many further streams on a connection that has `open` of them, and reads what comes first.
fn watch(stream: &mut UnixStream, open: u32, more: u32) -> std::io::Result<()> {
    if open == 0 {
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat())?;
    }
    for nth in open..open + more {
        stream.write_all(&call_frames(1 + 2 * nth, WATCH, &message(&[])))?;
    }
    Ok(())
}

/// Reads what there is. Returns whether a GOAWAY was in it, or the end.
fn drain(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut all = Vec::new();
    let ended = stream.read_to_end(&mut all).is_ok();
    stream.set_nonblocking(false).unwrap();
    // A frame with error code 0, of eight bytes.
    ended || all.windows(9).any(|head| head == [0, 0, 8, 7, 0, 0, 0, 0, 0])
}

/// The arithmetic of the budget, held against what is measured: nothing takes more than it is reckoned at, nor less than
/// a third of it.
#[test]
fn what_connections_take_is_what_they_are_reckoned_at() {
    let agent = Weighed::start(
        "reckoned",
        "caller { unlimited = true } identity { unlimited = true } node { unlimited = true cpu = 4096 } \
         memory { limit = \"1GiB\" } gate { connection { handshake_timeout = \"5m\" } }",
    );
    // What comes with the first call ever is no connection's.
    assert_eq!(call(&agent.socket(), FETCH_JWT, &jwt_request("first"), PATIENCE), Called::Answered);
    agent.wait_for("held", |held| held == 0);
    let before = agent.measured();
    let hold = |case: &str, reckoned: u64| {
        agent.wait_for("held", |held| held == reckoned);
        let now = agent.measured();
        let (took, of) = (now.saturating_sub(before), reckoned);
        println!("{case}: {} KiB measured, {} reckoned", took >> 10, of >> 10);
        assert!(took <= of && took >= of / 3, "{case}: {took} bytes measured, {of} reckoned");
    };
    let mut parked = agent.connections(600);
    hold("parked", 600 * PARKED);
    for stream in &mut parked[..300] {
        watch(stream, 0, 1).unwrap();
    }
    let read = |streams: &mut [UnixStream]| {
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(1) {
            streams.iter_mut().for_each(|stream| drop(drain(stream)));
            thread::sleep(Duration::from_millis(20));
        }
    };
    read(&mut parked[..300]);
    hold("with a stream", 600 * PARKED + 300 * HTTP2);
    for stream in &mut parked[..50] {
        watch(stream, 1, 30).unwrap();
        drain(stream);
    }
    read(&mut parked[..50]);
    hold("with many", 600 * PARKED + 300 * HTTP2 + 50 * 30 * STREAM);
    drop(parked);
    agent.wait_for("held", |held| held == 0);
}
