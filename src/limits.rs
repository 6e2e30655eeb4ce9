//! Who may call how often, and what the node as a whole can bear. No I/O, but for [`budget::limit_of_cgroup`].
//!
//! # Which bucket is charged, in what order, and why
//!
//! Narrow before wide: what only the caller has is asked first, what all share last, so that a caller over its own limit takes
//! nothing from the others. What was taken before a refusal is given back: tokens are *held* first and *settled* when the
//! call's cost is known (see [`bucket`]; [`table`] keeps them).
//!
//! | when | asks, in this order | key | settings |
//! |---|---|---|---|
//! | accept ([`gate`]) | 1 blocked? 2 its open connections, and its family's 3 its rate of new ones 4 the node's connections and memory | caller | [`GateSettings`] |
//! | before attestation ([`Limits::admit_caller`]) | 1 blocked? 2 the caller's bucket for the method 3 its share of attestations in flight, then all of them 4 for a method without identity, as 7 | caller, method | [`Settings::caller`], [`NodeSettings`] |
//! | after attestation ([`Limits::admit_identities`]) | 5 blocked? 6 the bucket of each identity: all, or none is charged 7 the node's bucket for the method | SPIFFE ID, method | [`Settings::identity`], [`NodeSettings`] |
//! | afterwards ([`Admitted`]) | what it cost: the price of an answer, of a signature, of a failed attestation; nothing if refused | as before | [`policy::Costs`] |
//!
//! The node's bucket comes last of all, after the identities' and not once per stage, as nothing can refuse after it: it never has to give
//! back. What stands between strangers and attestation node-wide is the number in flight, which a caller has a share of
//! ([`slots`]).
//!
//! Bundle calls charge the caller's default identity, the first. ValidateJWTSVID needs none: the caller stage alone; nor does what
//! is no Workload API (health, reflection), which is charged as [`Method::Other`]. Streams are charged when they open. The agent's
//! own look at its health does not go through the socket, and is charged to nobody. A caller that is exempt is charged nothing at
//! any stage; `unlimited` frees from the stage's own bucket alone.
//!
//! A *family* is a user with all the UIDs that were given to it (subuid(5)): whoever can be many callers is one where places are
//! counted that all share ([`Families`]).
//!
//! Which rule holds: [`policy`] (default < method < override; the most specific override), at a time: [`schedule`]. What an
//! answer to a refusal says: [`Refusal`]. What people see: [`report`] and [`counters`]. Memory: [`budget`].
//!
//! # Trust
//!
//! A [`CallerKey`] is the kernel's word. Nothing that a caller sends chooses a bucket, but for the method.

pub mod admission;
pub mod bucket;
pub mod budget;
pub mod caller;
pub mod counters;
pub mod gate;
pub mod method;
pub mod policy;
pub mod report;
pub mod schedule;
pub mod slots;
pub mod table;

use std::{num::NonZeroU32, time::Duration};

pub use admission::{Admitted, Limits, Refusal};
use bucket::Quota;
pub use caller::{CallerKey, Families};
pub use gate::{ConnectionSettings, Gate, GateRefusal, GateRule, GateSettings, Permit};
pub use method::Method;
use policy::{CallerPattern, IdPattern, Layers, Limit, PolicyError};

use crate::identity::TrustDomain;

/// Everything the `ratelimit` block says. All of it reloads; what was spent stays spent.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Connections.
    pub gate: GateSettings,
    /// Calls of a caller, before attestation. Default: 100 a second, 200 at once, for each method.
    pub caller: Layers<CallerPattern>,
    /// Calls for an identity, after attestation. One identity may be many callers, so the default is twice the caller's: 200 a
    /// second, 400 at once, for each method.
    pub identity: Layers<IdPattern>,
    /// What all share.
    pub node: NodeSettings,
    /// How many keys have a bucket, in the table of each stage. A key takes [`budget::KEY`] bytes once known. Default 16,384;
    /// at least 16.
    pub keys: usize,
    /// Everything is decided and counted as `would_exceed`, and nothing is refused. Default off.
    pub dry_run: bool,
    /// What a refused caller is told. Default [`RejectionStatus::ResourceExhausted`].
    pub rejection_status: RejectionStatus,
    /// When a bucket counts as nearly used up. Default: none.
    pub soft_limits: SoftLimits,
    /// How much memory the agent may use. Default: from its cgroup.
    pub memory: budget::Settings,
    /// Which callers are one user's: from the node's `/etc/subuid`, not from the block. Default: none.
    pub families: Families,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            gate: GateSettings::default(),
            caller: Layers::new(Limit::Quota(Quota::constant(100, 200))),
            identity: Layers::new(Limit::Quota(Quota::constant(200, 400))),
            node: NodeSettings::default(),
            keys: 16_384,
            dry_run: false,
            rejection_status: RejectionStatus::default(),
            soft_limits: SoftLimits::default(),
            memory: budget::Settings::default(),
            families: Families::default(),
        }
    }
}

impl Settings {
    /// Whether these can be put in force, without doing it. With the agent's trust domain given, patterns of another one
    /// are errors: they would match nothing.
    ///
    /// # Errors
    /// [`SettingsError`] names the first thing that cannot be meant.
    pub fn check(&self, trust_domain: Option<&TrustDomain>) -> Result<(), SettingsError> {
        admission::Plan::new(self, None)?;
        gate::Rules::new(&self.gate)?;
        self.memory.check()?;
        let foreign = |ours: &&TrustDomain| {
            let patterns = self.identity.overrides.iter().map(|it| &it.pattern);
            patterns.filter(|pattern| pattern.trust_domain() != *ours).map(ToString::to_string).next()
        };
        match trust_domain.and_then(|ours| foreign(&ours).zip(Some(ours))) {
            Some((pattern, ours)) => {
                Err(PolicyError::Foreign { pattern: pattern.into(), trust_domain: ours.clone() }.into())
            }
            None => Ok(()),
        }
    }
}

/// What all callers of the node share. Refusals by it are load shedding, always [`RejectionStatus::Unavailable`].
#[derive(Clone, Debug, PartialEq)]
pub struct NodeSettings {
    /// Calls that passed all else, for each method; `None` for no limit. Default: 5,000 a second, 10,000 at once.
    pub default: Option<Quota>,
    /// For a method.
    pub methods: Vec<(Method, Option<Quota>)>,
    /// Refusals by these buckets are counted as `would_exceed`, and let pass.
    pub dry_run: bool,
    /// Calls being attested at once. Default 64.
    pub attestations: NonZeroU32,
    /// Of which one caller may have so many, however idle the node is. Default 16.
    pub attestations_per_caller: NonZeroU32,
}

impl Default for NodeSettings {
    fn default() -> Self {
        const fn number(n: u32) -> NonZeroU32 {
            NonZeroU32::MIN.saturating_add(n - 1)
        }
        Self {
            default: Some(Quota::constant(5_000, 10_000)),
            methods: Vec::new(),
            dry_run: false,
            attestations: number(64),
            attestations_per_caller: number(16),
        }
    }
}

/// What a refused caller is told. Load shedding says `Unavailable` whatever is set here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RejectionStatus {
    /// `RESOURCE_EXHAUSTED`: this caller asked too much.
    #[default]
    ResourceExhausted,
    /// `UNAVAILABLE`, for clients that retry nothing else.
    Unavailable,
}

/// Steps in percent of a bucket, at which going over one is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoftLimits([bool; Self::STEPS.len()]);

impl SoftLimits {
    /// The steps there are. A closed set, since they label a metric.
    pub const STEPS: [u8; 8] = [50, 60, 70, 75, 80, 90, 95, 100];

    /// These steps.
    ///
    /// # Errors
    /// [`SettingsError::Step`] for one that is not in [`SoftLimits::STEPS`].
    pub fn new(steps: &[u8]) -> Result<Self, SettingsError> {
        match steps.iter().find(|step| !Self::STEPS.contains(step)) {
            Some(step) => Err(SettingsError::Step(*step)),
            None => Ok(Self(Self::STEPS.map(|step| steps.contains(&step)))),
        }
    }

    /// The steps that are set, with their place in [`SoftLimits::STEPS`].
    fn steps(self) -> impl Iterator<Item = (usize, u8)> {
        Self::STEPS
            .into_iter()
            .zip(self.0)
            .enumerate()
            .filter(|(_, (_, set))| *set)
            .map(|(at, (step, _))| (at, step))
    }
}

/// Why settings cannot be put in force.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SettingsError {
    /// A rule or an override.
    #[error("{stage}: {source}")]
    Policy {
        /// `gate`, `caller` or `identity`.
        stage: &'static str,
        /// Why.
        source: PolicyError,
    },
    /// An override of another trust domain.
    #[error("identity: {0}")]
    Foreign(#[from] PolicyError),
    /// Two node buckets for one method.
    #[error("node: {0} has two rules")]
    NodeMethodTwice(&'static str),
    /// Fewer than 16 keys, or more than 16,777,216.
    #[error("keys {0} must be from 16 to 16777216")]
    Keys(usize),
    /// Not a step.
    #[error("soft limit {0} must be one of 50, 60, 70, 75, 80, 90, 95, 100 (percent)")]
    Step(u8),
    /// Descriptors do not suffice for the connections.
    #[error(
        "gate: {connections} connections take {needed} descriptors, and the limit is {limit} (LimitNOFILE)"
    )]
    Descriptors {
        /// Asked for.
        connections: u32,
        /// What they take, with those kept for other uses.
        needed: u64,
        /// RLIMIT_NOFILE.
        limit: u64,
    },
    /// The numbers of the gate contradict each other.
    #[error("gate: {what} {value} must be {bound}")]
    Gate {
        /// Which.
        what: &'static str,
        /// What was set.
        value: u64,
        /// What would be right.
        bound: &'static str,
    },
    /// The numbers of the memory budget contradict each other.
    #[error("memory: {what} must be {bound}")]
    Memory {
        /// Which.
        what: &'static str,
        /// What would be right.
        bound: &'static str,
    },
}

/// What a refusal that no waiting is known for says: attestations take milliseconds.
const SHORT_WAIT: Duration = Duration::from_millis(100);
