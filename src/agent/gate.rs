//! How the listener asks the limits' gate, and the descriptors and memory it has to divide.

use std::{path::Path, sync::Arc};

use ::http::HeaderMap;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    api::status,
    limits::{self, ConnectionPermit, ConnectionRefusal, GatePlan, holding::Holding, room::Room},
    os::{cgroup, headroom::Headroom},
    peer::{AcceptGate, Arrival},
    telemetry::http,
};

/// The cgroups of this process, and where cgroups are mounted.
const MEMBERSHIP: &str = "/proc/self/cgroup";
const CGROUPS: &str = "/sys/fs/cgroup";

impl AcceptGate for limits::Gate {
    type Permit = ConnectionPermit;

    fn admit_connection(&self, arrival: &Arrival) -> Result<ConnectionPermit, ConnectionRefusal> {
        self.open(arrival.caller())
    }

    fn admit_or_wait(&self, arrival: &Arrival) -> Result<ConnectionPermit, ConnectionRefusal> {
        self.open_or_wait(arrival.caller())
    }

    fn room(&self) -> Option<Arc<Room>> {
        Some(Arc::clone(self.room()))
    }

    fn answer(&self, why: ConnectionRefusal) -> Option<HeaderMap> {
        status::refused_connection(why, self.rejection_status())
    }

    fn holding(permit: &ConnectionPermit) -> Arc<Holding> {
        Arc::clone(permit.holding())
    }

    fn headroom(&self) -> Option<Headroom> {
        Headroom::of(Path::new(MEMBERSHIP), Path::new(CGROUPS))
    }

    fn family(&self, arrival: &Arrival) -> u64 {
        self.family_of(arrival.caller())
    }
}

/// Says when the memory budget has no room for as many callers as should always find some.
pub(super) fn say_what_fits(plan: &GatePlan, budget: Option<u64>) {
    if let (Some(callers), Some(budget)) = (plan.fewer_fit(), budget) {
        tracing::warn!(
            budget,
            callers,
            "the memory budget is small: when it runs short, only this many callers that hold nothing are sure to be served, and \
             not 64"
        );
    }
}

/// What the machine gives this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Means {
    /// Descriptors for callers: the soft limit, once raised to the hard one, without what HTTP listeners may hold.
    pub(super) nofile: u64,
    /// The most connections of each HTTP listener.
    pub(super) http_places: usize,
    /// Bytes, as the cgroup has them.
    pub(super) cgroup: Option<u64>,
}

impl Means {
    /// Raises the soft limit of descriptors to the hard one, and divides them; there are so many HTTP listeners.
    pub(super) fn of_this_process(http_listeners: usize) -> Self {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
        let nofile = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
            Ok(()) => hard,
            Err(errno) => {
                tracing::warn!(error = %errno, soft, hard, "cannot raise the limit of open files");
                soft
            }
        };
        let http_places = http::places(nofile);
        let held = u64::try_from(http_places.saturating_mul(http_listeners)).unwrap_or(u64::MAX);
        Self {
            nofile: nofile.saturating_sub(held),
            http_places,
            cgroup: cgroup::lowest_limit(Path::new(MEMBERSHIP), Path::new(CGROUPS)),
        }
    }
}
