//! How the listener asks the limits' gate, and the descriptors and memory it has to divide.

use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    limits::{self, ConnectionPermit, ConnectionRefusal, budget},
    peer::{AcceptGate, Arrival},
};

impl AcceptGate for limits::Gate {
    type Permit = ConnectionPermit;

    fn admit_connection(&self, arrival: &Arrival) -> Result<ConnectionPermit, ConnectionRefusal> {
        self.open(arrival.caller())
    }

    fn family(&self, arrival: &Arrival) -> u64 {
        self.family_of(arrival.caller())
    }
}

/// What the machine gives this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Means {
    /// Descriptors: the soft limit, once raised to the hard one.
    pub(super) nofile: u64,
    /// Bytes, as the cgroup has them.
    pub(super) cgroup: Option<u64>,
}

impl Means {
    /// Raises the soft limit of descriptors to the hard one, and looks at both.
    pub(super) fn of_this_process() -> Self {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
        let nofile = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => hard,
            Err(errno) => {
                tracing::warn!(error = %errno, soft, hard, "cannot raise the limit of open files");
                soft
            }
        };
        Self {
            nofile,
            cgroup: budget::limit_of_cgroup(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup")),
        }
    }
}
