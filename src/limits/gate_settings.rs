//! What is set about connections: the rules of callers, the places of the node, and what one connection may hold.

use std::{num::NonZeroU32, ops::RangeInclusive, time::Duration};

use super::{
    bucket::Quota,
    caller::CallerKey,
    caller_pattern::CallerPattern,
    policy::{Overrides, OverridesError},
    rule::{Limit, Origin},
};

/// The most connections that a rule or the node may have: a process has fewer descriptors.
pub const MAX_CONNECTIONS: u32 = 1_000_000;

/// What one caller may.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GateRule {
    /// Connections at once, whether there is room or not. `None` by default: as many as there is room for.
    pub connections: Option<NonZeroU32>,
    /// New connections, whether there is room or not. `Exempt` frees from the number of connections too, within those of the
    /// node. `None` by default: without room [`GateRule::USUAL`].
    pub rate: Option<Limit>,
    /// Refusals by this rule are counted as `would_exceed`, and let pass.
    pub dry_run: bool,
}

impl GateRule {
    /// Whose word its rate is.
    pub fn origin(&self) -> Origin {
        if self.rate.is_some() { Origin::Set } else { Origin::ByDefault }
    }

    /// New connections of a caller while the processor is short, where nothing is set: 100 a second, 200 at once.
    pub const USUAL: Quota = Quota::constant(100, 200);

    /// The limit of new connections.
    pub(super) fn limit(&self) -> Limit {
        self.rate.unwrap_or(Limit::Quota(Self::USUAL))
    }
}

/// The rules of all callers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GateRules {
    default: GateRule,
    overrides: Overrides<CallerPattern, GateRule>,
}

impl GateRules {
    /// One rule for every caller, and others for those that match. Buckets are not shared here: each caller has
    /// its own.
    ///
    /// # Errors
    /// [`OverridesError`] by the places in the list.
    pub fn new(default: GateRule, overrides: Vec<(CallerPattern, GateRule)>) -> Result<Self, OverridesError> {
        Ok(Self { default, overrides: Overrides::of_callers(overrides)? })
    }

    /// The rule of callers that no override is for.
    pub(super) fn default_rule(&self) -> &GateRule {
        &self.default
    }

    /// How many overrides there are.
    pub(super) fn override_count(&self) -> usize {
        self.overrides.len()
    }

    /// The rule of a caller.
    pub(super) fn of(&self, caller: &CallerKey) -> &GateRule {
        self.overrides.rule_of(caller).unwrap_or(&self.default)
    }
}

/// Connections of the node, and how many of them are kept for callers that hold none, or one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatePlaces {
    connections: Option<u32>,
    reserve: u32,
}

impl GatePlaces {
    /// The fewest there may be: one to serve, and one in reserve.
    pub const LEAST: u32 = 2;
    /// Kept by default, though never more than half of all.
    pub const RESERVE: u32 = 64;

    /// `connections` in all, or as many as descriptors and memory have room for; of which `reserve` are kept,
    /// 64 by default.
    ///
    /// # Errors
    /// [`GatePlacesError`] when there are too few, or all would be kept.
    pub fn new(connections: Option<u32>, reserve: Option<u32>) -> Result<Self, GatePlacesError> {
        let reserve = reserve.unwrap_or(Self::RESERVE);
        match connections {
            Some(all) if !(Self::LEAST..=MAX_CONNECTIONS).contains(&all) => Err(GatePlacesError::Number(all)),
            Some(connections) if reserve >= connections => {
                Err(GatePlacesError::Reserve { reserve, connections })
            }
            _ => Ok(Self { connections, reserve }),
        }
    }

    /// How many in all, if that is set.
    pub(super) fn connections(self) -> Option<u32> {
        self.connections
    }

    /// How many are kept, as it is set.
    pub(super) fn reserve(self) -> u32 {
        self.reserve
    }

    /// How many of `most` are kept.
    pub(super) fn reserve_of(self, most: u32) -> u32 {
        self.reserve.min(most / 2)
    }
}

impl Default for GatePlaces {
    fn default() -> Self {
        Self { connections: None, reserve: Self::RESERVE }
    }
}

/// Why numbers of connections cannot be meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GatePlacesError {
    /// Fewer than [`GatePlaces::LEAST`], or more than [`MAX_CONNECTIONS`].
    #[error("connections {0} must be from {least} to {most}", least = GatePlaces::LEAST, most = MAX_CONNECTIONS)]
    Number(u32),
    /// All would be kept.
    #[error("reserve {reserve} must be below connections, which is {connections}")]
    Reserve {
        /// Those that are kept.
        reserve: u32,
        connections: u32,
    },
}

/// The gate's settings.
#[derive(Clone, Debug, PartialEq)]
pub struct GateSettings {
    /// Who may have how many, and open how many anew.
    pub rules: GateRules,
    /// How many there are for all.
    pub places: GatePlaces,
    /// Connections to the admin socket, in addition. Default 8.
    pub admin: u32,
    /// What each connection may hold, and for how long. Holds for connections that come after a change.
    pub connection: ConnectionSettings,
}

impl GateSettings {
    /// What [`GateSettings::admin`] may be, and is by default.
    pub const ADMIN: RangeInclusive<u32> = 1..=1024;
    pub const USUAL_ADMIN: u32 = 8;
}

impl Default for GateSettings {
    fn default() -> Self {
        Self {
            rules: GateRules::default(),
            places: GatePlaces::default(),
            admin: Self::USUAL_ADMIN,
            connection: ConnectionSettings::default(),
        }
    }
}

/// What bounds one connection. Here, as part of the settings, and done where it is served.
///
/// Each number stands for itself; the ranges are what the configuration takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionSettings {
    /// From accept to the first request. Default 10 s.
    pub handshake_timeout: Duration,
    /// How long it stays without an open request; `None` for ever. Default 10 min.
    pub idle_timeout: Option<Duration>,
    /// How long a request may wait for its answer, or an answer for its reader. Default 30 s.
    pub stall_timeout: Duration,
    /// Open requests and streams. Default 100: what they hold is bounded by bytes.
    pub streams: u32,
    /// The headers of a request, in bytes. Default 8 KiB.
    pub header_bytes: u32,
    /// How long a connection that its caller's own limits refuse is kept, untouched, before it is closed. Default
    /// 100 ms.
    pub linger: Duration,
    /// Streams that the peer reset, or that broke the rules, and that are not yet done with. Default 16.
    pub resets: u32,
}

impl ConnectionSettings {
    /// Of [`ConnectionSettings::handshake_timeout`].
    pub const HANDSHAKE_TIMEOUT: RangeInclusive<Duration> =
        Duration::from_millis(100)..=Duration::from_secs(300);
    /// Of [`ConnectionSettings::idle_timeout`].
    pub const IDLE_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(86_400);
    /// Of [`ConnectionSettings::stall_timeout`].
    pub const STALL_TIMEOUT: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);
    /// Of [`ConnectionSettings::linger`].
    pub const LINGER: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(1);
    /// Of [`ConnectionSettings::streams`] and [`ConnectionSettings::resets`].
    pub const STREAMS: RangeInclusive<u32> = 1..=1024;
    /// Of [`ConnectionSettings::header_bytes`].
    pub const HEADER_BYTES: RangeInclusive<u32> = 1024..=16_384;
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Some(Duration::from_secs(600)),
            stall_timeout: Duration::from_secs(30),
            streams: 100,
            header_bytes: 8 * 1024,
            linger: Duration::from_millis(100),
            resets: 16,
        }
    }
}
