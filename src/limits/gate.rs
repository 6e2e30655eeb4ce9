//! The gate at accept: who may hold how many connections, and open how many anew.
//!
//! A connection costs descriptors and memory before anything was asked for, so the first decision is made here. In this
//! order: blocked; the caller's open connections; its rate of new ones; the node's connections. Of the last, a part
//! (`reserve`) is kept for callers that hold none, or one: however many one caller opens, and however many callers do, there is
//! one for the next that comes. Whoever can be many callers (a user with subordinate UIDs) counts as one for that, and has a
//! part of the node's connections at most. Admin connections have places of their own. What one connection may hold, once it was let in,
//! is in the settings here ([`ConnectionSettings`]) and done where it is served.
//!
//! A decision is a table look-up: it waits for nobody, so no caller's connection stands behind another's. Callers with open
//! connections are counted in a map that cannot have more keys than there are connections, and are never forgotten.

use std::{
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use hashbrown::{HashMap, hash_map::Entry};

use super::{
    Limits, Settings, SettingsError, SoftLimits,
    bucket::Quota,
    budget::{self, Pressure},
    caller::{CallerKey, Families},
    counters::{KeyType, Outcome, Reason, Stage},
    policy::{self, CallerPattern, Limit, Override, Pattern, Share},
    report::{Heavy, Name, Standing},
    table::{Hasher, Key, Place, Table},
};

/// A socket, and the pidfd of the process behind it.
pub const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// Kept for all that is no connection: listeners, logs, files being read.
pub const OTHER_DESCRIPTORS: u64 = 64;
/// The most refused connections that linger,
const LINGERING: u64 = 2048;
/// and what the kernel keeps for each, in bytes: of a memory budget they have a quarter.
const LINGERING_BYTES: u64 = 4 * 1024;

/// How many refused connections may linger in a process that may have `nofile` descriptors and `budget` bytes.
pub fn lingering(nofile: u64, budget: Option<u64>) -> u32 {
    let in_memory = budget.map_or(u64::MAX, |budget| budget / 4 / LINGERING_BYTES);
    u32::try_from((nofile / 8).min(LINGERING).min(in_memory)).unwrap_or(0)
}

/// The connections of a caller, by default: so many,
const CONNECTIONS: u32 = 64;
/// and no more than this part of the node's, so that a small budget of memory is not one caller's:
const SHARE: u32 = 10;
/// but at least so many.
const AT_LEAST: u32 = 8;
/// The part of the node's connections that a family may hold ([`Families`]).
const FAMILY_SHARE: u32 = 4;

/// Who holds fewer connections counts as holding none: one that calls anew for each call has left its last one, and the agent may
/// not have seen that yet.
const FEW: u32 = 2;

/// What one caller may.
#[derive(Clone, Debug, PartialEq)]
pub struct GateRule {
    /// Connections at once. Default: a tenth of the node's, from 8 to 64.
    pub connections: Option<NonZeroU32>,
    /// New connections. `Exempt` and `Unlimited` free from the number of connections too, within those of the node. Default: 100 a
    /// second, 200 at once.
    pub rate: Limit,
    /// Refusals by this rule are counted as `would_exceed`, and let pass.
    pub dry_run: bool,
}

impl Default for GateRule {
    fn default() -> Self {
        Self { connections: None, rate: Limit::Quota(Quota::constant(100, 200)), dry_run: false }
    }
}

/// The gate's settings.
#[derive(Clone, Debug, PartialEq)]
pub struct GateSettings {
    /// For every caller.
    pub default: GateRule,
    /// For callers that match. The methods of an override are not looked at; buckets cannot be shared here.
    pub overrides: Vec<Override<CallerPattern, GateRule>>,
    /// Connections of the node. Default: what RLIMIT_NOFILE has room for at [`DESCRIPTORS_PER_CONNECTION`] each, and half of
    /// the memory budget at [`budget::connection_at_most`] each; the lower of both.
    pub connections: Option<NonZeroU32>,
    /// Of which so many are kept for callers that hold none, or one. Default 64; at most half of the connections count.
    pub reserve: u32,
    /// Connections to the admin socket, in addition. Default 8.
    pub admin: u32,
    /// What each connection may hold, and for how long. Holds for connections that come after a change.
    pub connection: ConnectionSettings,
}

/// What bounds one connection. Here, as part of the settings, and done where it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionSettings {
    /// From accept to the first request; 100 ms to 5 min. Default 10 s.
    pub handshake_timeout: Duration,
    /// How long it stays without an open request; `None` for ever, else 1 s to 24 h. Default 10 min.
    pub idle_timeout: Option<Duration>,
    /// How long a request may wait for its answer, or an answer for its reader; 1 s to 1 h. Default 30 s.
    pub stall_timeout: Duration,
    /// Open requests and streams; 1 to 1,024. Default 16.
    pub streams: u32,
    /// The headers of a request, in bytes; 1 KiB to 16 KiB. Default 8 KiB.
    pub header_bytes: u32,
    /// How long a connection that its caller's own limits refuse is kept, untouched, before it is closed; at most 1 s. Default
    /// 100 ms.
    pub linger: Duration,
    /// Streams that the peer reset, or that broke the rules, and that are not yet done with; 1 to 1,024. Default 16.
    pub resets: u32,
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Some(Duration::from_secs(600)),
            stall_timeout: Duration::from_secs(30),
            streams: 16,
            header_bytes: 8 * 1024,
            linger: Duration::from_millis(100),
            resets: 16,
        }
    }
}

impl Default for GateSettings {
    fn default() -> Self {
        Self {
            default: GateRule::default(),
            overrides: Vec::new(),
            connections: None,
            reserve: 64,
            admin: 8,
            connection: ConnectionSettings::default(),
        }
    }
}

/// Why a connection is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("connection refused by the {} limits: {}", stage.label(), reason.label())]
pub struct GateRefusal {
    /// [`Stage::Gate`] for the caller's own limits, [`Stage::Node`] for what all share.
    pub stage: Stage,
    /// Why.
    pub reason: Reason,
    /// When a connection would pass, as far as that depends on time; else zero.
    pub retry_after: Duration,
}

/// The settings, checked.
#[derive(Debug)]
pub(super) struct Rules {
    default: GateRule,
    overrides: Vec<Override<Arc<CallerPattern>, GateRule>>,
}

impl Rules {
    pub(super) fn new(settings: &GateSettings) -> Result<Self, SettingsError> {
        let policy = |source| SettingsError::Policy { stage: "gate", source };
        if settings.overrides.iter().any(|it| it.share == Share::Together) {
            return Err(SettingsError::Gate { what: "share", value: 1, bound: "absent: it is for calls" });
        }
        if let Some(connections) = settings.connections
            && settings.reserve >= connections.get()
        {
            let value = u64::from(settings.reserve);
            return Err(SettingsError::Gate { what: "reserve", value, bound: "below connections" });
        }
        let overrides = policy::arrange(&settings.overrides).map_err(policy)?;
        Ok(Self { default: settings.default.clone(), overrides })
    }

    fn of(&self, caller: &CallerKey) -> &GateRule {
        let found = self.overrides.iter().find(|it| it.pattern.matches(caller));
        found.and_then(|it| it.rule.as_ref()).unwrap_or(&self.default)
    }
}

/// What the gate decides with.
#[derive(Debug)]
struct Plan {
    rules: Rules,
    /// Connections of all callers.
    most: u32,
    reserve: u32,
    admin: u32,
    families: Families,
    soft: SoftLimits,
    dry: bool,
}

impl Plan {
    fn new(settings: &Settings, nofile: u64, budget: Option<u64>) -> Result<Self, SettingsError> {
        let gate = &settings.gate;
        let rules = Rules::new(gate)?;
        let linger = if gate.connection.linger.is_zero() { 0 } else { lingering(nofile, budget) };
        let other =
            OTHER_DESCRIPTORS + u64::from(linger) + DESCRIPTORS_PER_CONNECTION * u64::from(gate.admin);
        let fit = nofile.saturating_sub(other) / DESCRIPTORS_PER_CONNECTION;
        let most = match gate.connections {
            Some(most) if u64::from(most.get()) > fit => {
                let connections = most.get();
                let needed = other + DESCRIPTORS_PER_CONNECTION * u64::from(connections);
                return Err(SettingsError::Descriptors { connections, needed, limit: nofile });
            }
            Some(most) => most.get(),
            None => {
                let in_memory = budget.map_or(u64::MAX, |budget| {
                    budget / 2 / budget::connection_at_most(gate.connection.streams)
                });
                u32::try_from(fit.min(in_memory)).unwrap_or(u32::MAX)
            }
        };
        if most < 2 {
            return Err(SettingsError::Descriptors { connections: 2, needed: other + 4, limit: nofile });
        }
        let reserve = gate.reserve.min(most / 2);
        let families = settings.families.clone();
        let (soft, dry) = (settings.soft_limits, settings.dry_run);
        Ok(Self { rules, most, reserve, admin: gate.admin, families, soft, dry })
    }

    /// Connections at once of a caller under `rule`.
    fn connections(&self, rule: &GateRule) -> u32 {
        let by_default = || (self.most / SHARE).clamp(AT_LEAST, CONNECTIONS);
        rule.connections.map_or_else(by_default, NonZeroU32::get)
    }

    /// Connections at once of all callers of a family, whose members are under `rule`: who can be 65,536 callers has no more
    /// than a part of the node for it.
    fn connections_of_family(&self, rule: &GateRule) -> u32 {
        self.connections(rule).max(self.most / FAMILY_SHARE)
    }
}

#[derive(Debug)]
struct State {
    rates: Table,
    open: HashMap<CallerKey, u32, ahash::RandomState>,
    /// Of those callers that are of a family, by its first UID.
    families: HashMap<u32, u32, ahash::RandomState>,
    total: u32,
    admin: u32,
}

#[derive(Debug)]
struct Shared {
    plan: ArcSwap<Plan>,
    hasher: Hasher,
    state: Mutex<State>,
    pressure: AtomicU8,
    limits: Limits,
}

/// The gate. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Gate {
    shared: Arc<Shared>,
}

/// A connection that was let in; its place is free again when this is dropped.
#[derive(Debug)]
#[must_use = "the place is free again as soon as this is dropped"]
pub struct Permit {
    shared: Arc<Shared>,
    /// `None` for the admin socket.
    caller: Option<CallerKey>,
    /// The family that it was counted for.
    family: Option<u32>,
}

/// Connections that are open.
#[derive(Clone, Copy)]
struct Has {
    /// Of the caller.
    caller: u32,
    /// Of its family, if it is of one: which, and how many.
    family: Option<(u32, u32)>,
}

impl Gate {
    /// A gate as the settings have it, for a process that may have `nofile` descriptors and `budget` bytes. It counts
    /// and tells through `limits`.
    ///
    /// # Errors
    /// [`SettingsError`] for settings that contradict each other or the descriptors.
    pub fn new(
        settings: &Settings,
        nofile: u64,
        budget: Option<u64>,
        limits: &Limits,
    ) -> Result<Self, SettingsError> {
        let plan = Plan::new(settings, nofile, budget)?;
        let state = State {
            rates: Table::new(settings.keys, settings.keys / 8),
            open: HashMap::default(),
            families: HashMap::default(),
            total: 0,
            admin: 0,
        };
        let shared = Shared {
            plan: ArcSwap::from_pointee(plan),
            hasher: Hasher::default(),
            state: Mutex::new(state),
            pressure: AtomicU8::new(0),
            limits: limits.clone(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Whether these settings could be put in force, without doing it.
    ///
    /// # Errors
    /// As [`Gate::new`].
    pub fn check(settings: &Settings, nofile: u64, budget: Option<u64>) -> Result<(), SettingsError> {
        Plan::new(settings, nofile, budget).map(drop)
    }

    /// Puts other settings in force. Connections that are open stay.
    ///
    /// # Errors
    /// As [`Gate::new`], and nothing has changed.
    pub fn reload(&self, settings: &Settings, nofile: u64, budget: Option<u64>) -> Result<(), SettingsError> {
        let plan = Plan::new(settings, nofile, budget)?;
        self.shared.state().rates.resize(settings.keys, settings.keys / 8);
        self.shared.plan.store(Arc::new(plan));
        Ok(())
    }

    /// Tells how short memory is: see [`Pressure`].
    pub fn set_pressure(&self, pressure: Pressure) {
        self.shared.pressure.store(pressure.rank(), Ordering::Relaxed);
    }

    /// Lets a connection of `caller` in, or not; at once.
    ///
    /// # Errors
    /// [`GateRefusal`]: close it.
    pub fn open(&self, caller: CallerKey) -> Result<Permit, GateRefusal> {
        let shared = &self.shared;
        let plan = shared.plan.load();
        let rule = plan.rules.of(&caller);
        let key_type = match caller {
            CallerKey::Uid(_) => KeyType::Uid,
            CallerKey::Pod(_) => KeyType::Pod,
        };
        let now = shared.limits.now();
        let counters = shared.limits.counters();
        let mut state = shared.state();
        let has = Has {
            caller: state.open.get(&caller).copied().unwrap_or(0),
            family: plan
                .families
                .of(caller)
                .map(|first| (first, state.families.get(&first).copied().unwrap_or(0))),
        };
        let mut rehearsed = false;
        // First what is the caller's own; then, once that lets it pass, what all share.
        let own = shared.decide_own(&plan, rule, &mut state, caller, has, now);
        let (held, own) = match own {
            Ok(held) => (held, Ok(())),
            Err(refusal) if plan.dry || rule.dry_run => {
                counters.count(refusal.stage, None, key_type, Outcome::WouldRefuse(refusal.reason));
                rehearsed = true;
                (None, Ok(()))
            }
            Err(refusal) => (None, Err(refusal)),
        };
        let node = own.and_then(|()| shared.decide_node(&plan, state.total, has, rule.rate == Limit::Exempt));
        let decided = match node {
            // A rehearsal ends where descriptors do: what cannot be taken is not taken.
            Err(refusal) if refusal.stage == Stage::Node && plan.dry && state.total < plan.most => {
                counters.count(Stage::Node, None, KeyType::Node, Outcome::WouldRefuse(refusal.reason));
                rehearsed = true;
                Ok(())
            }
            decided => decided,
        };
        if let Some((key, place, quota)) = held {
            let paid = state.rates.settle(key, place, quota, 1, u32::from(decided.is_ok()));
            if decided.is_ok() {
                counters.count_soft_limits(plan.soft, Stage::Gate, paid);
            }
        }
        if let Err(refusal) = decided {
            drop(state);
            let key_type = if refusal.stage == Stage::Node { KeyType::Node } else { key_type };
            counters.count(refusal.stage, None, key_type, Outcome::Refused(refusal.reason));
            if refusal.stage == Stage::Gate {
                shared.limits.note_refused_connection(caller);
            }
            return Err(refusal);
        }
        if !rehearsed {
            counters.count(Stage::Gate, None, key_type, Outcome::Allowed);
        }
        *state.open.entry(caller).or_insert(0) += 1;
        let family = has.family.map(|(first, _)| first);
        if let Some(first) = family {
            *state.families.entry(first).or_insert(0) += 1;
        }
        state.total += 1;
        counters.connections.set(f64::from(state.total));
        drop(state);
        Ok(Permit { shared: Arc::clone(shared), caller: Some(caller), family })
    }

    /// Lets a connection to the admin socket in: these have places of their own.
    ///
    /// # Errors
    /// [`GateRefusal`] when they are taken.
    pub fn open_admin(&self) -> Result<Permit, GateRefusal> {
        let mut state = self.shared.state();
        if state.admin >= self.shared.plan.load().admin {
            return Err(refused(Stage::Node, Reason::Connections, Duration::ZERO));
        }
        state.admin += 1;
        drop(state);
        Ok(Permit { shared: Arc::clone(&self.shared), caller: None, family: None })
    }

    /// Connections of all callers.
    pub fn connections(&self) -> u32 {
        self.shared.state().total
    }

    /// The callers with the most open connections.
    pub fn heaviest(&self, n: usize) -> Vec<(CallerKey, u32)> {
        let mut all: Vec<(CallerKey, u32)> =
            self.shared.state().open.iter().map(|(key, n)| (*key, *n)).collect();
        all.sort_by_key(|(_, open)| std::cmp::Reverse(*open));
        all.truncate(n);
        all
    }

    /// The caller with the most open connections, those of its family counted with it: whose to close first when memory is
    /// short. And how many they are.
    pub fn to_cut_off(&self) -> Option<(CallerKey, u32)> {
        let plan = self.shared.plan.load();
        let state = self.shared.state();
        let weight = |caller: CallerKey, open: u32| {
            plan.families
                .of(caller)
                .and_then(|family| state.families.get(&family))
                .map_or(open, |all| open.max(*all))
        };
        let all = state.open.iter().map(|(caller, open)| (*caller, weight(*caller, *open), *open));
        all.max_by_key(|(_, weight, open)| (*weight, *open)).map(|(caller, weight, _)| (caller, weight))
    }

    /// The callers that were refused and let in most.
    pub fn report(&self, n: usize) -> Vec<Heavy> {
        self.shared.state().rates.heaviest(n)
    }

    /// How the rate of new connections of a caller stands.
    pub fn standing(&self, caller: CallerKey) -> Standing {
        let shared = &*self.shared;
        let plan = shared.plan.load();
        let key = Key { hash: shared.hasher.hash(caller), parent: plan.families.parent(caller) };
        let now = shared.limits.now();
        Standing::under(plan.rules.of(&caller).rate, |quota| shared.state().rates.left(now, key, quota))
    }

    /// How short memory is, as was last told.
    pub fn pressure(&self) -> Pressure {
        Pressure::of_rank(self.shared.pressure.load(Ordering::Relaxed))
    }

    /// How many callers' buckets are known. Also sets the gauge.
    pub fn keys(&self) -> usize {
        let keys = self.shared.state().rates.len();
        let [gauge, ..] = &self.shared.limits.counters().keys;
        gauge.set(u32::try_from(keys).map_or(f64::MAX, f64::from));
        keys
    }
}

fn refused(stage: Stage, reason: Reason, retry_after: Duration) -> GateRefusal {
    GateRefusal { stage, reason, retry_after }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first three questions of the module's documentation. Holds a token of the caller's rate if they let it pass.
    fn decide_own(
        &self,
        plan: &Plan,
        rule: &GateRule,
        state: &mut State,
        caller: CallerKey,
        has: Has,
        now: u64,
    ) -> Result<Option<(Key, Place, Quota)>, GateRefusal> {
        let key = Key { hash: self.hasher.hash(caller), parent: plan.families.parent(caller) };
        let quota = match rule.rate {
            Limit::Block => return Err(refused(Stage::Gate, Reason::Blocked, Duration::ZERO)),
            Limit::Exempt | Limit::Unlimited => return Ok(None),
            Limit::Quota(quota) => quota,
        };
        let full = has.caller >= plan.connections(rule);
        if full || has.family.is_some_and(|(_, family)| family >= plan.connections_of_family(rule)) {
            state.rates.note_refused(key);
            return Err(refused(Stage::Gate, Reason::Connections, Duration::ZERO));
        }
        let who = || (Name::Caller(caller), "connections");
        let held = state.rates.hold(now, key, quota, 1, who);
        held.map(|place| Some((key, place, quota))).map_err(|wait| refused(Stage::Gate, Reason::Rate, wait))
    }

    /// What all share: the last question.
    fn decide_node(&self, plan: &Plan, total: u32, has: Has, exempt: bool) -> Result<(), GateRefusal> {
        let newcomer = has.family.map_or(has.caller, |(_, family)| family) < FEW || exempt;
        let pressure = self.pressure.load(Ordering::Relaxed);
        let short = if newcomer { Pressure::CloseHeaviest } else { Pressure::RefuseNew };
        if pressure >= short.rank() && !exempt {
            return Err(refused(Stage::Node, Reason::Memory, Duration::ZERO));
        }
        let most = if newcomer { plan.most } else { plan.most - plan.reserve };
        if total >= most {
            return Err(refused(Stage::Node, Reason::Connections, Duration::ZERO));
        }
        Ok(())
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let Some(caller) = self.caller else {
            state.admin = state.admin.saturating_sub(1);
            return;
        };
        state.total = state.total.saturating_sub(1);
        if let Entry::Occupied(mut entry) = state.open.entry(caller) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        if let Some(Entry::Occupied(mut entry)) = self.family.map(|first| state.families.entry(first)) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
        self.shared.limits.counters().connections.set(f64::from(state.total));
    }
}
