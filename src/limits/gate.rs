//! The gate at accept: who may hold how many connections, and open how many anew.
//!
//! A connection costs descriptors and memory before anything was asked for, so the first decision is made here.
//! In this order: blocked; the caller's open connections; its rate of new ones; the node's connections. Of the
//! last, a part (the reserve) is kept for callers that hold none, or one: however many one caller opens, and
//! however many callers do, there is one for the next that comes. Whoever can be many callers (a user with
//! subordinate UIDs) counts as one for that, and has a part of the node's connections at most. Admin
//! connections have places of their own.
//!
//! A decision is a table look-up: it waits for nobody, so no caller's connection stands behind another's.
//! Callers with open connections are counted in a map that cannot have more keys than there are connections,
//! and are never forgotten.

use std::{
    num::NonZeroU32,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;

use super::{
    admission::Limits,
    ask::{Ask, BucketKey, Hasher},
    budget::{self, Pressure},
    caller::{CallerKey, Families},
    counters::Decision,
    gate_settings::{GatePlaces, GateRule, GateRules},
    holding::Holding,
    ledger::{Ledger, PARENT_PARTS},
    refusal::{ChargedAs, ConnectionRefusal, Reason, Stage},
    report::{BucketName, Heavy, Standing},
    rule::Limit,
    settings::{LimitSettings, SoftLimits},
    table::{ChargedTo, Table},
    table_size::TableSize,
    tally::Tally,
};
use crate::telemetry::registry::float;

/// A socket, and the pidfd of the process behind it.
pub const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// Kept for all that is no connection: listeners, logs, files being read.
pub const OTHER_DESCRIPTORS: u64 = 64;
/// Of a memory budget, connections at their worst have one part in so many.
const MEMORY_SHARE: u64 = 2;
/// The most refused connections that linger.
const LINGERING: u64 = 2048;
/// What the kernel keeps for a connection that lingers, in bytes.
const LINGERING_BYTES: u64 = 4 * 1024;
/// Of a memory budget, they have one part in so many.
const LINGERING_SHARE: u64 = 4;

/// How many refused connections may linger in a process that may have `nofile` descriptors and `budget` bytes.
pub fn lingering(nofile: u64, budget: Option<u64>) -> u32 {
    let in_memory = budget.map_or(u64::MAX, |budget| budget / LINGERING_SHARE / LINGERING_BYTES);
    u32::try_from((nofile / 8).min(LINGERING).min(in_memory)).unwrap_or(0)
}

/// The most connections of a caller by default.
const CONNECTIONS: u32 = 64;
/// By default a caller has one part in so many of the node's connections, so that a small budget of memory is not
/// one caller's.
const SHARE: u32 = 10;
/// The fewest connections of a caller by default.
const AT_LEAST: u32 = 8;
/// A family ([`Families`]) has one part in so many of the node's connections.
const FAMILY_SHARE: u32 = 4;

/// Who holds fewer connections counts as holding none: one that calls anew for each call has left its last one,
/// and the agent may not have seen that yet.
const FEW: u32 = 2;

/// Why the machine has no room for what is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoomError {
    /// Descriptors do not suffice for the connections.
    #[error(
        "gate: {connections} connections take {needed} descriptors, and the limit is {limit} (LimitNOFILE)"
    )]
    Descriptors {
        connections: u32,
        /// What they take, with those kept for other uses.
        needed: u64,
        limit: u64,
    },
    /// The memory budget does not suffice for a connection and one in reserve.
    #[error(
        "memory: a budget of {budget} bytes is too small for {least} connections of {each} bytes at their worst: \
         it must be at least {needed} bytes, or gate.connection.streams lower",
        least = GatePlaces::LEAST
    )]
    Memory {
        /// In bytes: `memory.limit`, or the cgroup's.
        budget: u64,
        /// What a connection takes, in bytes.
        each: u64,
        /// The smallest budget that would do, in bytes.
        needed: u64,
    },
}

/// What the gate decides with: settings that this machine has room for.
#[derive(Debug)]
pub struct GatePlan {
    rules: GateRules,
    /// Connections of all callers.
    most: u32,
    reserve: u32,
    admin: u32,
    keys: TableSize,
    families: Families,
    soft: SoftLimits,
    dry: bool,
}

impl GatePlan {
    /// A plan for a process that may have `nofile` descriptors and `budget` bytes.
    ///
    /// # Errors
    /// [`NoRoomError`] when these do not suffice.
    pub fn new(settings: &LimitSettings, nofile: u64, budget: Option<u64>) -> Result<Self, NoRoomError> {
        let gate = &settings.gate;
        let linger = if gate.connection.linger.is_zero() { 0 } else { lingering(nofile, budget) };
        let other =
            OTHER_DESCRIPTORS + u64::from(linger) + DESCRIPTORS_PER_CONNECTION * u64::from(gate.admin);
        let fit = nofile.saturating_sub(other) / DESCRIPTORS_PER_CONNECTION;
        let set = gate.places.connections();
        let asked = set.unwrap_or(GatePlaces::LEAST);
        if u64::from(asked) > fit {
            let needed = other + DESCRIPTORS_PER_CONNECTION * u64::from(asked);
            return Err(NoRoomError::Descriptors { connections: asked, needed, limit: nofile });
        }
        let each = budget::connection_at_most(gate.connection.streams);
        let most = match (set, budget) {
            (Some(most), _) => most,
            (None, None) => u32::try_from(fit).unwrap_or(u32::MAX),
            (None, Some(budget)) => {
                let needed = u64::from(GatePlaces::LEAST) * each * MEMORY_SHARE;
                if budget < needed {
                    return Err(NoRoomError::Memory { budget, each, needed });
                }
                u32::try_from(fit.min(budget / MEMORY_SHARE / each)).unwrap_or(u32::MAX)
            }
        };
        Ok(Self {
            rules: gate.rules.clone(),
            most,
            reserve: gate.places.reserve_of(most),
            admin: gate.admin,
            keys: settings.keys,
            families: settings.families.clone(),
            soft: settings.soft_limits,
            dry: settings.dry_run,
        })
    }

    /// Connections at once of a caller under `rule`.
    fn connections(&self, rule: &GateRule) -> u32 {
        let by_default = || (self.most / SHARE).clamp(AT_LEAST, CONNECTIONS);
        rule.connections.map_or_else(by_default, NonZeroU32::get)
    }

    /// Connections at once of all callers of a family, whose members are under `rule`: who can be 65,536
    /// callers has no more than a part of the node for it.
    fn connections_of_family(&self, rule: &GateRule) -> u32 {
        self.connections(rule).max(self.most / FAMILY_SHARE)
    }
}

#[derive(Debug)]
struct GateState {
    rates: Table,
    open: Tally<CallerKey>,
    /// Of those callers that are of a family, by its first UID.
    families: Tally<u32>,
    total: u32,
    admin: u32,
    pressure: Pressure,
}

#[derive(Debug)]
struct SharedGate {
    plan: ArcSwap<GatePlan>,
    hasher: Hasher,
    state: Mutex<GateState>,
    ledger: Arc<Ledger>,
}

/// The gate. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Gate {
    shared: Arc<SharedGate>,
}

/// A connection that was let in; its place is free again when this is dropped.
#[derive(Debug)]
#[must_use = "the place is free again as soon as this is dropped"]
pub struct ConnectionPermit {
    shared: Arc<SharedGate>,
    /// `None` for the admin socket.
    caller: Option<CallerKey>,
    /// The family that it was counted for.
    family: Option<u32>,
    holding: Arc<Holding>,
}

/// A connection that is being decided.
#[derive(Clone, Copy)]
struct Arriving<'a> {
    plan: &'a GatePlan,
    rule: &'a GateRule,
    caller: CallerKey,
    open: u32,
    /// Those of its family, if it is of one.
    family_open: Option<u32>,
    now: u64,
}

/// A token of a caller's rate, until it is known whether all others let its connection in.
type HeldRate = (Ask, ChargedTo);

impl Gate {
    /// A gate that decides with `plan`. It counts and tells through `limits`.
    pub fn new(plan: GatePlan, limits: &Limits) -> Self {
        let state = GateState {
            rates: Table::new(plan.keys, PARENT_PARTS),
            open: Tally::default(),
            families: Tally::default(),
            total: 0,
            admin: 0,
            pressure: Pressure::None,
        };
        let shared = SharedGate {
            plan: ArcSwap::from_pointee(plan),
            hasher: Hasher::default(),
            state: Mutex::new(state),
            ledger: Arc::clone(limits.ledger()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Decides with another plan. Connections that are open stay.
    pub fn reload(&self, plan: GatePlan) {
        self.shared.state().rates.resize(plan.keys, PARENT_PARTS);
        self.shared.plan.store(Arc::new(plan));
    }

    /// Tells how short memory is: see [`Pressure`].
    pub fn set_pressure(&self, pressure: Pressure) {
        self.shared.state().pressure = pressure;
    }

    /// Lets a connection of `caller` in, or not; at once.
    ///
    /// # Errors
    /// [`ConnectionRefusal`]: close it.
    pub fn open(&self, caller: CallerKey) -> Result<ConnectionPermit, ConnectionRefusal> {
        let shared = &self.shared;
        let plan = shared.plan.load();
        let rule = plan.rules.of(&caller);
        let now = shared.ledger.now();
        let mut state = shared.state();
        let family = plan.families.of(caller);
        let family_open = family.map(|first| state.families.of(&first));
        let arriving = Arriving { plan: &plan, rule, caller, open: state.open.of(&caller), family_open, now };
        let rehearsed = match shared.decide(&arriving, &mut state) {
            Ok(rehearsed) => rehearsed,
            Err(refusal) => {
                drop(state);
                shared.count(refusal, caller, Decision::Refused);
                if refusal.is_callers_own() {
                    shared.ledger.refusing().note(now, Stage::Gate, &BucketName::Caller(caller));
                }
                return Err(refusal);
            }
        };
        let counters = &shared.ledger.counters;
        if !rehearsed {
            counters.count(Stage::Gate, None, caller.charged_as(), Decision::Allowed);
        }
        state.open.add(caller);
        if let Some(first) = family {
            state.families.add(first);
        }
        state.total += 1;
        counters.connections.set(f64::from(state.total));
        drop(state);
        Ok(ConnectionPermit {
            shared: Arc::clone(shared),
            caller: Some(caller),
            family,
            holding: Arc::default(),
        })
    }

    /// Lets a connection to the admin socket in: these have places of their own.
    ///
    /// # Errors
    /// [`ConnectionRefusal::AdminConnections`] when they are taken.
    pub fn open_admin(&self) -> Result<ConnectionPermit, ConnectionRefusal> {
        let mut state = self.shared.state();
        if state.admin >= self.shared.plan.load().admin {
            return Err(ConnectionRefusal::AdminConnections);
        }
        state.admin += 1;
        drop(state);
        Ok(ConnectionPermit {
            shared: Arc::clone(&self.shared),
            caller: None,
            family: None,
            holding: Arc::default(),
        })
    }

    /// What a caller and its family have in common, and nobody else.
    pub fn family_of(&self, caller: CallerKey) -> u64 {
        self.shared.plan.load().families.group(caller)
    }

    /// Connections of all callers.
    pub fn connections(&self) -> u32 {
        self.shared.state().total
    }

    /// The callers with the most open connections.
    pub fn heaviest(&self, n: usize) -> Vec<(CallerKey, u32)> {
        let mut all: Vec<(CallerKey, u32)> = self.shared.state().open.iter().collect();
        all.sort_by_key(|(_, open)| std::cmp::Reverse(*open));
        all.truncate(n);
        all
    }

    /// The caller with the most open connections, those of its family counted with it: whose to close first
    /// when memory is short. And how many they are.
    pub fn to_cut_off(&self) -> Option<(CallerKey, u32)> {
        let plan = self.shared.plan.load();
        let state = self.shared.state();
        let weight = |caller: CallerKey, open: u32| {
            plan.families.of(caller).map_or(open, |family| open.max(state.families.of(&family)))
        };
        let all = state.open.iter().map(|(caller, open)| (caller, weight(caller, open), open));
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
        let key = shared.key(&plan, caller);
        Standing::under(plan.rules.of(&caller).rate, |quota| {
            shared.state().rates.left(shared.ledger.now(), key, quota)
        })
    }

    /// How short memory is, as was last told.
    pub fn pressure(&self) -> Pressure {
        self.shared.state().pressure
    }

    /// How many callers' buckets are known. Also sets the gauge.
    pub fn keys(&self) -> usize {
        let keys = self.shared.state().rates.len();
        let [gauge, ..] = &self.shared.ledger.counters.keys;
        gauge.set(float(keys));
        keys
    }
}

impl SharedGate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self, plan: &GatePlan, caller: CallerKey) -> BucketKey {
        BucketKey { hash: self.hasher.hash(caller), parent: plan.families.parent(caller) }
    }

    /// Asks all questions of the module's documentation. Returns whether it passed only because it is a rehearsal.
    fn decide(&self, it: &Arriving<'_>, state: &mut GateState) -> Result<bool, ConnectionRefusal> {
        let mut rehearsed = false;
        let mut rehearse = |refusal| {
            self.count(refusal, it.caller, Decision::WouldRefuse);
            rehearsed = true;
        };
        // First what is the caller's own; then, once that lets it pass, what all share.
        let held = match self.decide_own(it, state) {
            Err(refusal) if it.plan.dry || it.rule.dry_run => {
                rehearse(refusal);
                None
            }
            decided => decided?,
        };
        let decided = match self.decide_node(it, state) {
            // A rehearsal ends where descriptors do: what cannot be taken is not taken.
            Err(refusal) if it.plan.dry && state.total < it.plan.most => {
                rehearse(refusal);
                Ok(())
            }
            decided => decided,
        };
        if let Some((ask, place)) = held {
            let paid = state.rates.settle(&ask, place, u32::from(decided.is_ok()));
            if decided.is_ok() {
                self.ledger.counters.count_soft_limits(it.plan.soft, Stage::Gate, paid);
            }
        }
        decided.map(|()| rehearsed)
    }

    /// The first three questions of the module's documentation. Holds a token of the caller's rate if they let
    /// it pass.
    fn decide_own(
        &self,
        it: &Arriving<'_>,
        state: &mut GateState,
    ) -> Result<Option<HeldRate>, ConnectionRefusal> {
        let Arriving { plan, rule, caller, open, family_open, now } = *it;
        let quota = match rule.rate {
            Limit::Block => return Err(ConnectionRefusal::Blocked),
            Limit::Exempt | Limit::Unlimited => return Ok(None),
            Limit::Quota(quota) => quota,
        };
        let key = self.key(plan, caller);
        let full = open >= plan.connections(rule);
        if full || family_open.is_some_and(|open| open >= plan.connections_of_family(rule)) {
            state.rates.note_refused(key);
            return Err(ConnectionRefusal::CallerConnections);
        }
        let ask = Ask { key, quota, cost: 1, taker: None };
        match state.rates.hold(now, &ask, || (BucketName::Caller(caller), "connections")) {
            Ok(place) => Ok(Some((ask, place))),
            Err(_wait) => Err(ConnectionRefusal::CallerRate),
        }
    }

    /// What all share: the last question.
    fn decide_node(&self, it: &Arriving<'_>, state: &GateState) -> Result<(), ConnectionRefusal> {
        let Arriving { plan, rule, open, family_open, .. } = *it;
        let exempt = rule.rate == Limit::Exempt;
        let newcomer = family_open.unwrap_or(open) < FEW || exempt;
        let short = if newcomer { Pressure::CloseHeaviest } else { Pressure::RefuseNew };
        if state.pressure >= short && !exempt {
            return Err(ConnectionRefusal::Memory);
        }
        let most = if newcomer { plan.most } else { plan.most - plan.reserve };
        if state.total >= most {
            return Err(ConnectionRefusal::NodeConnections);
        }
        Ok(())
    }

    /// Counts a refusal, or what would be one.
    fn count(&self, refusal: ConnectionRefusal, caller: CallerKey, decision: fn(Reason) -> Decision) {
        let Some((stage, reason)) = refusal.by_stage() else { return };
        let key = if stage == Stage::Node { ChargedAs::Node } else { caller.charged_as() };
        self.ledger.counters.count(stage, None, key, decision(reason));
    }
}

impl ConnectionPermit {
    /// What the connection holds, to be told by whoever serves it.
    pub fn holding(&self) -> &Arc<Holding> {
        &self.holding
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        let Some(caller) = self.caller else {
            state.admin = state.admin.saturating_sub(1);
            return;
        };
        state.total = state.total.saturating_sub(1);
        state.open.take(caller);
        if let Some(first) = self.family {
            state.families.take(first);
        }
        self.shared.ledger.counters.connections.set(f64::from(state.total));
    }
}
