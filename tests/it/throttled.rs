//! An agent that gets next to nothing of the processor: callers are answered, or told that it is the node which is short, and nobody
//! waits for longer than it asked to.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use durward::api::proto::workload as pb;
use tonic::Code;

use crate::support::{Process, client, entry, request, write_config};

/// How long a caller waits at most, and longer than the agent says anything in.
const DEADLINE: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(60);

/// A cgroup whose processes may use a hundredth of a processor; gone when dropped.
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
            made.allow("1000").then_some(made)
        })
    }

    fn allow(&self, microseconds: &str) -> bool {
        fs::write(self.at.join(self.quota), format!("{microseconds}{}", self.period)).is_ok()
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
    fs::write(throttle.at.join("cgroup.procs"), agent.pid().to_string()).unwrap();
    let calls: Vec<_> = (0..8)
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
