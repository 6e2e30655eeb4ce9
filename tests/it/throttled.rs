//! An agent that gets next to nothing of the processor, and no more than its calls need: callers are answered, or told that it is the
//! node which is short, and nobody waits for longer than it asked to.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use durward::api::proto::workload as pb;
use nix::unistd::Pid;
use tonic::Code;

use crate::support::{Process, client, entry, request, write_config};

/// How long a caller waits at most, and longer than the agent says anything in.
const DEADLINE: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(60);

/// How many call at once.
const CALLS: u32 = 8;
/// A throttle's period, and what it leaves of one for other things than calls, in microseconds: a twentieth of a processor. With
/// nothing to do an unoptimised build takes a seventieth on a quiet machine, and a release a five-hundredth.
const PERIOD: u32 = 100_000;
const BESIDE: u32 = 5_000;

/// A cgroup whose processes may use a small part of a processor; gone when dropped.
struct Throttle {
    at: PathBuf,
    quota: &'static str,
    period: &'static str,
}

impl Throttle {
    /// `None` where none can be made.
    fn make() -> Option<Self> {
        let name = format!("durward-throttled-{}", std::process::id());
        let roots =
            [("/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", ""), ("/sys/fs/cgroup", "cpu.max", " 100000")];
        roots.into_iter().find_map(|(root, quota, period)| {
            let at = Path::new(root).join(&name);
            fs::create_dir(&at).ok()?;
            let made = Self { at, quota, period };
            made.allow(&BESIDE.to_string()).then_some(made)
        })
    }

    fn allow(&self, microseconds: &str) -> bool {
        fs::write(self.at.join(self.quota), format!("{microseconds}{}", self.period)).is_ok()
    }

    /// What of each period does so many seconds of work in half of what callers wait, beside what is done without any.
    fn part_for(work: f64) -> u32 {
        let part = 2.0 * work / DEADLINE.as_secs_f64();
        #[expect(
            clippy::as_conversions,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "it saturates"
        )]
        let part = (part * f64::from(PERIOD)) as u32;
        part.saturating_add(BESIDE)
    }
}

impl Drop for Throttle {
    #[expect(clippy::disallowed_methods, reason = "the kernel takes a moment, and a drop cannot await")]
    fn drop(&mut self) {
        let began = Instant::now();
        while fs::remove_dir(&self.at).is_err() && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What comes of a call on a connection of its own.
async fn call(socket: &Path) -> Result<(), Code> {
    let mut asked = request(pb::JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() });
    asked.set_timeout(DEADLINE);
    let called = async { client(socket).await.fetch_jwtsvid(asked).await };
    let answer = tokio::time::timeout(PATIENCE, called).await.expect("it does not hang");
    answer.map(drop).map_err(|status| status.code())
}

/// Seconds of a processor that a process has used.
fn used(pid: Pid) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let nanoseconds = tasks.map(|task| {
        let spent = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap_or_default();
        spent.split(' ').next().and_then(|spent| spent.parse().ok()).unwrap_or(0.0)
    });
    nanoseconds.sum::<f64>() / 1e9
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_processor_callers_are_answered_or_told_so() {
    let Some(throttle) = Throttle::make() else {
        println!("skipped: no cgroup with a quota of the processor can be made here");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/web", ""));
    let mut agent = Process::spawn(dir.path());
    drop(agent.serving(dir.path()).await);
    let socket = dir.path().join("api.sock");
    assert_eq!(call(&socket).await, Ok(()));
    // A build without optimisation needs many times what a release needs: what is tried is not how fast it is.
    let before = used(agent.pid());
    for _ in 0..CALLS {
        assert_eq!(call(&socket).await, Ok(()));
    }
    let part = Throttle::part_for(used(agent.pid()) - before);
    assert!(throttle.allow(&part.to_string()), "{part}");
    fs::write(throttle.at.join("cgroup.procs"), agent.pid().to_string()).unwrap();
    let calls: Vec<_> = (0..CALLS)
        .map(|_| {
            let socket = socket.clone();
            tokio::spawn(async move { call(&socket).await })
        })
        .collect();
    for called in calls {
        let told = called.await.unwrap();
        assert!(matches!(told, Ok(()) | Err(Code::Unavailable)), "{told:?}");
    }
    assert!(throttle.allow("-1") || throttle.allow("max"));
    assert_eq!(call(&socket).await, Ok(()), "as soon as there is a processor");
    assert!(!agent.has_ended());
    drop(agent);
}
