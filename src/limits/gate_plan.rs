//! What the gate decides with: its settings, and what this machine has room for.

use super::{
    budget::{self, MemorySettings},
    caller::{CallerKey, Families},
    gate_settings::{GatePlaces, GateRule, GateRules, GateSettings},
    processor::ProcessorShare,
    refusal::RejectionStatus,
    settings::{LimitSettings, SoftLimits},
    table_size::TableSize,
};

/// A socket, and the pidfd of the process behind it.
pub const DESCRIPTORS_PER_CONNECTION: u64 = 2;
/// Kept for all that is no connection: listeners, logs, files being read, refused connections that are answered, those that have ended
/// and are asked after.
pub const OTHER_DESCRIPTORS: u64 = 80;
/// The most refused connections that linger.
const LINGERING: u64 = 2048;
/// Of a memory budget, they have one part in so many, with those that are answered.
const LINGERING_SHARE: u64 = 4;
/// Whoever has fewer connections holds a few: it is not told to go for those that hold less.
const LEAST_SHARE: u64 = 16;
/// Beside those that are kept for callers that hold no connection, or one, one in so many as these is kept for those with a few.
const FEW_SHARE: u32 = 4;
/// A family ([`Families`]) whose members have a number that is set has that, or one part in so many of the node's.
const FAMILY_SHARE: u32 = 4;

/// How many refused connections may linger in a process that may have `nofile` descriptors and `budget` bytes.
pub fn lingering(nofile: u64, budget: u64) -> u32 {
    let in_memory = (budget / LINGERING_SHARE).saturating_sub(budget::REPLIES_AT_MOST) / budget::LINGERING;
    u32::try_from((nofile / 8).min(LINGERING).min(in_memory)).unwrap_or(0)
}

/// Why the machine has no room for what is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoomError {
    /// Descriptors do not suffice for the connections.
    #[error("gate: {connections} connections take {needed} descriptors, and there are {limit}")]
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

/// Of a memory budget, connections at their worst have one part in so many.
const MEMORY_SHARE: u64 = 2;

/// For how many callers that hold nothing memory can be set aside.
pub(super) fn newcomers_within(budget: u64) -> u32 {
    u32::try_from(budget / budget::RESERVED_SHARE / budget::NEWCOMER).unwrap_or(u32::MAX)
}

/// The smallest memory budget for connections with so many streams: it has room for the fewest that there may be.
pub(super) const fn fewest_take(streams: u32) -> u64 {
    #[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
    let least = GatePlaces::LEAST as u64;
    least * budget::connection_at_most(streams) * MEMORY_SHARE
}

/// Settings that this machine has room for.
#[derive(Debug)]
pub struct GatePlan {
    pub(super) rules: GateRules,
    /// Connections of all callers.
    pub(super) most: u32,
    pub(super) reserve: u32,
    /// Somebody set how many connections there are; else it is by descriptors.
    pub(super) most_is_set: bool,
    /// As many as should be kept, were there connections enough.
    pub(super) asked_reserve: u32,
    pub(super) admin: u32,
    /// Bytes.
    pub(super) budget: u64,
    pub(super) memory: MemorySettings,
    /// Of the processor.
    pub(super) cpu: ProcessorShare,
    pub(super) keys: TableSize,
    pub(super) families: Families,
    pub(super) soft: SoftLimits,
    pub(super) dry: bool,
    pub(super) status: RejectionStatus,
}

impl GatePlan {
    /// A plan for a process that may have `nofile` descriptors and `budget` bytes, which the settings are
    /// [within](LimitSettings::within).
    ///
    /// # Errors
    /// [`NoRoomError`] when these do not suffice.
    pub fn new(settings: &LimitSettings, nofile: u64, budget: u64) -> Result<Self, NoRoomError> {
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
        let needed = fewest_take(gate.connection.streams);
        if budget < needed {
            return Err(NoRoomError::Memory { budget, each, needed });
        }
        let most = set.unwrap_or_else(|| u32::try_from(fit).unwrap_or(u32::MAX));
        Ok(Self {
            rules: gate.rules.clone(),
            most,
            reserve: gate.places.reserve_of(most),
            most_is_set: set.is_some(),
            asked_reserve: gate.places.reserve(),
            admin: gate.admin,
            budget,
            memory: settings.memory,
            cpu: settings.node.cpu,
            keys: settings.keys,
            families: settings.families.clone(),
            soft: settings.soft_limits,
            dry: settings.dry_run,
            status: settings.rejection_status,
        })
    }

    /// Connections at once of all callers of a family, whose members may have `each`: who can be 65,536 callers has no
    /// more than a part of the node for it.
    pub(super) fn connections_of_family(&self, each: u32) -> u32 {
        each.max(self.most / FAMILY_SHARE)
    }

    /// What there is a number of for connections, in a word.
    pub(super) fn places_text(&self) -> &'static str {
        if self.most_is_set { "connections" } else { "descriptors" }
    }

    /// Connections that are kept for callers with a few.
    pub(super) fn kept_for_few(&self) -> u32 {
        self.reserve / FEW_SHARE
    }

    /// Connections that anybody may have.
    pub(super) fn for_anybody(&self) -> u32 {
        self.most.saturating_sub(self.reserve + self.kept_for_few())
    }

    /// How many callers that hold nothing are sure to be served, whatever the others hold: descriptors and memory are
    /// set aside for them.
    pub(super) fn reserved(&self) -> u32 {
        self.reserve.min(newcomers_within(self.budget))
    }

    /// How many such callers there are, where the budget has room for fewer than there should be.
    pub(super) fn fewer_fit(&self) -> Option<u32> {
        Some(self.reserved()).filter(|fit| *fit < self.reserve.min(GatePlaces::RESERVE))
    }

    /// How many there are, where the process has descriptors for fewer connections than that takes.
    pub(super) fn fewer_have_descriptors(&self) -> Option<u32> {
        let fewer = !self.most_is_set && self.reserve < self.asked_reserve.min(GatePlaces::RESERVE);
        fewer.then_some(self.reserve)
    }

    /// Bytes that are set aside for them.
    pub(super) fn reserved_bytes(&self) -> u64 {
        u64::from(self.reserved()) * budget::NEWCOMER
    }

    /// Bytes that are set aside for admin connections: of those beyond the usual ones, which what is for nobody has room for.
    pub(super) fn admin_bytes(&self) -> u64 {
        u64::from(self.admin.saturating_sub(GateSettings::USUAL_ADMIN)) * budget::ADMIN_CONNECTION
    }

    /// What a share is at least, of connections.
    pub(super) fn least_connections(&self) -> u64 {
        LEAST_SHARE.min(u64::from(self.most) / 2)
    }

    /// The rule of a caller.
    pub(super) fn rule(&self, caller: &CallerKey) -> &GateRule {
        self.rules.of(caller)
    }
}
