//! How the listener asks the limits' gate, and the descriptors and memory it has to divide.

use std::{os::fd::BorrowedFd, path::Path, sync::Arc, time::Instant};

use ::http::HeaderMap;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::way_in::{Came, WayIn};
use crate::{
    api::status,
    config::Config,
    hcl::{ConfigError, ConfigErrors, KeyPlace},
    limits::{
        self, CallerKey, ConnectionPermit, ConnectionRefusal, GatePlan, LimitSettings, LimitsInForce,
        attempt::Attempt,
        beyond_budget::BeyondBudget,
        budget::{BudgetFrom, MemoryBounds, MemoryBudget, MemorySettings},
        gate_plan::NoRoomError,
        holding::Holding,
        room::Room,
    },
    os::{cgroup, headroom::Headroom, machine, peer_groups::peer_groups},
    peer::{AcceptGate, Arrival, Peer, credentials::Credentials},
    store::{audit::AuditTrail, audited::AuditedProcess},
    telemetry::{health::HealthState, http},
};

/// The cgroups of this process, and where cgroups are mounted.
const MEMBERSHIP: &str = "/proc/self/cgroup";
const CGROUPS: &str = "/sys/fs/cgroup";
/// What the machine has of memory.
const MEMINFO: &str = "/proc/meminfo";

/// The limits' gate, whose refusals are audited.
#[derive(Debug)]
pub(super) struct AuditedGate {
    pub(super) gate: limits::Gate,
    pub(super) audit: Arc<AuditTrail>,
    pub(super) health: Arc<HealthState>,
    pub(super) way_in: Arc<WayIn>,
}

/// A place at the gate.
#[derive(Debug)]
pub(super) struct PlaceAtGate {
    permit: ConnectionPermit,
    _came: Option<Came>,
}

impl From<ConnectionPermit> for PlaceAtGate {
    fn from(permit: ConnectionPermit) -> Self {
        Self { permit, _came: None }
    }
}

impl AuditedGate {
    fn refused(&self, arrival: &Arrival, why: ConnectionRefusal) {
        self.audit.not_let_in(AuditedProcess::arrived(arrival), why);
    }
}

impl AcceptGate for AuditedGate {
    type Permit = PlaceAtGate;

    fn may_ask_after_process(&self, user: CallerKey) -> bool {
        self.gate.may_show_processes(user)
    }

    fn refuse_unread(&self, arrival: &Arrival) -> ConnectionRefusal {
        let why = self.gate.refuse_unread(arrival.caller());
        self.refused(arrival, why);
        why
    }

    fn was_asked_after(&self, arrival: &Arrival) {
        let Credentials { uid, pid, .. } = arrival.credentials();
        self.gate.was_asked_after(CallerKey::Uid(uid.as_raw()), arrival.caller(), pid.as_raw());
    }

    fn admit_connection(
        &self,
        arrival: &Arrival,
        attempt: Attempt,
    ) -> Result<PlaceAtGate, ConnectionRefusal> {
        self.gate.open_on(arrival.caller(), attempt).map(PlaceAtGate::from).inspect_err(|why| {
            if attempt.is_last() || !why.is_soft() {
                self.refused(arrival, *why);
            }
        })
    }

    fn begins(&self, place: &mut PlaceAtGate, arrival: &Arrival, socket: BorrowedFd<'_>) {
        let Credentials { uid, gid, .. } = arrival.credentials();
        if arrival.is_shown() {
            self.gate.asked_after_is_let_in(CallerKey::Uid(uid.as_raw()));
        }
        let groups = || {
            let mut groups = peer_groups(&socket)?;
            groups.push(gid.as_raw());
            Some(groups)
        };
        place._came = self.way_in.came(uid.as_raw(), groups, Instant::now());
    }

    fn room(&self) -> Option<Arc<Room>> {
        Some(Arc::clone(self.gate.room()))
    }

    fn has_begun(&self, place: &PlaceAtGate) {
        self.gate.has_begun(&place.permit);
    }

    fn refuse_begun(&self, place: &PlaceAtGate, peer: &Peer) -> ConnectionRefusal {
        let why = self.gate.refuse_begun(&place.permit);
        self.audit.not_let_in(AuditedProcess::from(peer), why);
        why
    }

    fn answer(&self, caller: CallerKey, why: ConnectionRefusal) -> Option<HeaderMap> {
        let wait = self.gate.wait(caller, why);
        status::refused_connection(why, wait, self.gate.rejection_status(), self.gate.places())
    }

    fn answer_unidentified(&self) -> Option<HeaderMap> {
        // One caller alone who cannot be identified has ended, mostly: nobody is there to be told.
        self.health.identifies_nobody().then(status::unidentified)
    }

    fn holding(place: &PlaceAtGate) -> Arc<Holding> {
        Arc::clone(place.permit.holding())
    }

    fn headroom(&self) -> Option<Headroom> {
        Headroom::of(Path::new(MEMBERSHIP), Path::new(CGROUPS))
    }

    fn family(&self, arrival: &Arrival) -> u64 {
        self.gate.family_of(arrival.caller())
    }
}

/// Says when memory or descriptors suffice for fewer callers than should always find some, and what is set and cannot be had.
pub(super) fn say_what_fits(in_force: &LimitsInForce) {
    for why in in_force.wrong.iter().chain(&in_force.fewer_served) {
        tracing::warn!("{why}");
    }
}

/// Says which of the trust domains that are federated with are trusted in part only.
pub(super) fn say_whom_to_distrust(config: &Config) {
    for why in &config.federation_gaps {
        tracing::warn!("{why}");
    }
}

/// Says which files beside the configuration are not read.
pub(super) fn say_what_is_passed_over(config: &Config) {
    for why in config.passed_over_warnings() {
        tracing::warn!("{why}");
    }
}

/// Whether an agent that has what this process has could hold what is set. Returns what of it gives way, and what there is little
/// of.
///
/// # Errors
/// [`RoomError`].
pub fn room_for(config: &Config) -> Result<Vec<BeyondBudget>, RoomError> {
    let means = Means::of_this_process(http_listeners(config));
    let fitted = means.fit(config)?;
    let LimitsInForce { wrong, fewer_served, .. } = means.in_force(config, &fitted);
    Ok([wrong, fewer_served].concat())
}

/// Why the machine has no room for what is set.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RoomError {
    /// Descriptors do not suffice.
    #[error("{0} (LimitNOFILE, or ulimit -n)")]
    Descriptors(NoRoomError),
    /// Nor do they beside what HTTP listeners may hold of this limit.
    #[error("{why}: LimitNOFILE, or ulimit -n, is {open_files}, less what the http endpoints may hold")]
    DescriptorsLeft { why: NoRoomError, open_files: u64 },
    /// The memory budget does not.
    #[error(transparent)]
    Memory(NoRoomError),
    /// Nor for what somebody set.
    #[error(transparent)]
    Beyond(ConfigErrors),
}

/// How many HTTP listeners `config` asks for.
pub(super) fn http_listeners(config: &Config) -> usize {
    [
        config.prometheus.is_some(),
        config.metrics_socket.is_some(),
        config.health.enabled,
        config.health.socket_path.is_some(),
    ]
    .into_iter()
    .filter(|asked| *asked)
    .count()
}

/// Where a key is set.
fn set_at(config: &Config) -> impl Fn(&'static str) -> Option<String> {
    |key| config.set_at.of_key(key).map(ToString::to_string)
}

/// What fits of what is set.
#[derive(Debug)]
pub(super) struct Fitted {
    pub(super) budget: MemoryBudget,
    pub(super) limits: LimitSettings,
    pub(super) gate: GatePlan,
}

/// What the machine gives this process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Means {
    /// The limit of open files, once raised.
    open_files: u64,
    /// Descriptors for callers: the soft limit, once raised to the hard one, without what HTTP listeners may hold.
    pub(super) nofile: u64,
    /// The most connections of each HTTP listener.
    pub(super) http_places: usize,
    memory: MemoryBounds,
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
        let memory = MemoryBounds {
            cgroup: cgroup::lowest_limit(Path::new(MEMBERSHIP), Path::new(CGROUPS)),
            machine: machine::memory(Path::new(MEMINFO)),
        };
        let http_places = http::places(nofile, MemorySettings::default().budget(memory).bytes);
        let held = u64::try_from(http_places.saturating_mul(http_listeners)).unwrap_or(u64::MAX);
        Self { open_files: nofile, nofile: nofile.saturating_sub(held), http_places, memory }
    }

    /// How much memory the agent may use.
    pub(super) fn budget(self, config: &Config) -> MemoryBudget {
        config.ratelimit.memory.budget(self.memory)
    }

    /// What is set about limits, in words, and what is `fitted` of it.
    pub(super) fn in_force(self, config: &Config, fitted: &Fitted) -> LimitsInForce {
        let mut in_force = config.ratelimit.in_force(self.memory, set_at(config));
        in_force.note_fewer_served(&fitted.gate);
        let MemoryBudget { bytes, from } = fitted.budget;
        let whose = match from {
            // It was an error.
            BudgetFrom::Set => return in_force,
            BudgetFrom::Cgroup => "the memory limit of the cgroup",
            BudgetFrom::Machine => "the budget, a part of the machine's memory,",
        };
        // A cache gives way when memory is short, and whoever comes from spire-agent may have set one of any size.
        let of_caches = config.caches.beyond(bytes, whose, set_at(config)).into_iter();
        in_force.wrong.extend(of_caches.map(|BeyondBudget { key, value, why }| {
            let why = format!("{why} (it is emptied whenever memory is short)");
            BeyondBudget { key, value, why }
        }));
        in_force
    }

    /// What fits of what is set.
    ///
    /// # Errors
    /// [`RoomError`].
    pub(super) fn fit(self, config: &Config) -> Result<Fitted, RoomError> {
        let budget = self.budget(config);
        if let Some(errors) = self.beyond(config, budget) {
            return Err(RoomError::Beyond(errors));
        }
        let limits = config.ratelimit.within(budget.bytes);
        let gate = GatePlan::new(&limits, self.nofile, budget.bytes).map_err(|why| match why {
            NoRoomError::Descriptors { limit, .. } if limit == self.open_files => RoomError::Descriptors(why),
            NoRoomError::Descriptors { .. } => {
                RoomError::DescriptorsLeft { why, open_files: self.open_files }
            }
            NoRoomError::Memory { .. } => RoomError::Memory(why),
        })?;
        Ok(Fitted { budget, limits, gate })
    }

    /// What is set that the limit of the cgroup can never give, each with its place. Beyond a budget that is set nothing is read;
    /// that it is beyond one that nobody chose is [said](LimitsInForce::wrong), and no error: what fits counts.
    fn beyond(self, config: &Config, budget: MemoryBudget) -> Option<ConfigErrors> {
        if budget.from != BudgetFrom::Cgroup {
            return None;
        }
        let whose = "the memory limit of the cgroup";
        let beyond = config.ratelimit.beyond(budget.bytes, whose, set_at(config));
        let errors = beyond.into_iter().filter_map(|BeyondBudget { key, value, why }| {
            let KeyPlace { file, line, column } = config.set_at.of_key(key)?.clone();
            Some(ConfigError {
                file,
                line,
                column,
                key: key.to_owned(),
                value: Some(value.to_string()),
                message: why,
            })
        });
        let errors: Vec<_> = errors.collect();
        (!errors.is_empty()).then(|| ConfigErrors::new(errors, 0))
    }
}
