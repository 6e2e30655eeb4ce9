//! A pod: a process in a cgroup that carries a pod's UID and a container's ID, as the kubelet and the runtime make them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    frames::{FETCH_JWT, block, jwt_request},
    kubelet::{container_id, pod_uid},
    process::Part,
    raw::{Answer, Connecting, Raw, WIDE},
};

/// What its process is told, as JSON in its environment.
const PART: &str = "DURWARD_ATTEST_PART";
/// What it says when it is there.
pub(crate) const READY: &str = "ready\n";
/// How long one call may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a pod does: it connects once, and calls FetchJWTSVID again and again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pod {
    pub(crate) socket: PathBuf,
    /// How long after the others it comes.
    pub(crate) after: Duration,
    pub(crate) calls: u32,
    /// Between two calls.
    pub(crate) gap: Duration,
}

/// What it saw. One line of a pipe that many share, so it is short.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Saw {
    /// From `connect()` to the first answer.
    pub(crate) first: Option<u32>,
    /// From each later call to its answer.
    pub(crate) later: Vec<u32>,
    /// How the others ended.
    pub(crate) failed: Vec<String>,
}

impl Part for Pod {
    const TOLD: &str = "DURWARD_ATTEST_PART";
    type Saw = Saw;

    fn play(&self) -> Saw {
        let (block, body) = (block(FETCH_JWT), jwt_request("attest"));
        let (mut saw, mut open, begin) = (Saw::default(), None, Instant::now() + self.after);
        for nth in 0..self.calls {
            let due = begin + self.gap * nth;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let began = Instant::now();
            let raw = match &mut open {
                Some(raw) => raw,
                none => match Raw::open(&self.socket, Connecting::Waits, WIDE, PATIENCE) {
                    Ok(raw) => none.insert(raw),
                    Err(error) => {
                        saw.failed.push(format!("{:?}", error.kind()));
                        continue;
                    }
                },
            };
            let answer = raw.ask(&block, &body, PATIENCE);
            let micros = began.elapsed().as_micros() as u32;
            match answer {
                Answer::Message if nth == 0 => saw.first = Some(micros),
                Answer::Message => saw.later.push(micros),
                other => saw.failed.push(format!("{other:?}")),
            }
            if raw.over {
                open = None;
            }
        }
        saw
    }
}

/// The cgroup of the n-th pod's container, gone with this.
pub(crate) struct PodCgroup(PathBuf);

impl PodCgroup {
    /// Makes it in the hierarchy of version 2, or in that of a controller that anybody may be moved in.
    pub(crate) fn make(n: u32) -> Self {
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
        let below = format!("kubepods/burstable/pod{}/{}", pod_uid(n), container_id(n));
        let made = roots.into_iter().map(|root| Path::new(root).join(&below)).find(|at| {
            at.starts_with("/sys/fs/cgroup")
                && fs::create_dir_all(at).is_ok()
                && at.join("cgroup.procs").exists()
        });
        Self(made.expect("a cgroup: this needs root"))
    }

    /// Moves a process into it.
    pub(crate) fn take(&self, pid: u32) {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("moved");
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        // The container's, the pod's, and what was there for all pods where nobody else is in it.
        for at in self.0.ancestors().take(4) {
            if fs::remove_dir(at).is_err() {
                return;
            }
        }
    }
}
