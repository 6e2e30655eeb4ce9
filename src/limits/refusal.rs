//! Why a connection or a call is refused, in the words that metrics, logs, the admin socket and callers are told.
//!
//! Each reason is named once, where it arises; whoever tells of it takes the label from here.

use std::{borrow::Cow, time::Duration};

use super::{method::Method, rule::Origin};
use crate::{identity::SpiffeId, telemetry::registry::labels};

labels! {
    /// Where on its way a connection or a call was decided.
    Stage, "stage" {
        /// At accept.
        Gate = "gate",
        /// Before attestation.
        Caller = "caller",
        /// After attestation.
        Identity = "identity",
        /// By what all share: connections, attestations in flight, the bucket of a method.
        Node = "node",
    }
}
labels! {
    /// What kind of key was charged.
    ChargedAs, "key_type" {
        /// A user.
        Uid = "uid",
        /// A pod.
        Pod = "pod",
        /// A SPIFFE ID.
        SpiffeId = "spiffe_id",
        /// A bucket that an override shares out: one of many callers or identities.
        Shared = "shared",
        /// There was no room for a bucket of its own: that of its parent.
        Overflow = "overflow",
        /// All callers of the node together.
        Node = "node",
    }
}
labels! {
    /// Why a stage refused.
    Reason, "reason" {
        /// The bucket has too few tokens: of calls, or at the gate of new connections.
        Rate = "rate",
        /// The settings say `block`.
        Blocked = "blocked",
        /// As many connections are open as may be.
        Connections = "connections",
        /// As many attestations are under way as may be.
        InFlight = "in_flight",
        /// Memory is short.
        Memory = "memory",
    }
}
labels! {
    /// Why a connection was not taken.
    ConnectionRefusal, "reason" {
        /// The kernel did not say who connected.
        Unidentified = "unidentified",
        /// The settings block the caller.
        Blocked = "blocked",
        /// The caller, or its family, has as many connections as were set.
        CallerConnections = "caller_connections",
        /// The caller connects more often than was set.
        CallerRate = "caller_rate",
        /// The callers that have no bucket of their own, as there is no room for one, connect more often than was set.
        OverflowRate = "overflow_rate",
        /// The node has as many connections as it may, but for those in reserve.
        NodeConnections = "node_connections",
        /// Descriptors are short, or connections, where their number is set; and the caller, or its family, has its share of them.
        Descriptors = "descriptors",
        /// Memory is short, and the caller, or its family, holds its share of it.
        Memory = "memory",
        /// The caller, or its family, holds less than its share of memory; but others hold the rest, and what is set aside for
        /// callers that hold next to nothing is taken too.
        MemoryTaken = "memory_taken",
        /// The agent has used the processor time that it may, and the caller connects more often than it may then.
        Processor = "processor",
        /// The socket is the admin's, and the peer is neither the agent's user nor root.
        NotOwner = "not_owner",
        /// The admin socket has as many connections as it may.
        AdminConnections = "admin_connections",
    }
}

impl ConnectionRefusal {
    /// Whether it is by limits that are the caller's own: who comes back at once comes back for nothing.
    pub fn is_callers_own(self) -> bool {
        self.by_stage().is_some() && !self.is_soft()
    }

    /// Whether it is for want of room: nobody set it, and it may pass by itself.
    pub fn is_soft(self) -> bool {
        match self {
            Self::NodeConnections
            | Self::Descriptors
            | Self::Memory
            | Self::MemoryTaken
            | Self::Processor => true,
            Self::Blocked | Self::CallerConnections | Self::CallerRate | Self::OverflowRate => false,
            Self::Unidentified | Self::NotOwner | Self::AdminConnections => false,
        }
    }

    /// What the rate limits' own series say of it: by which stage, and why. `None` where no stage was asked.
    pub(super) fn by_stage(self) -> Option<(Stage, Reason)> {
        match self {
            Self::Blocked => Some((Stage::Gate, Reason::Blocked)),
            Self::CallerConnections => Some((Stage::Gate, Reason::Connections)),
            // The rate is the caller's own, whoever set it.
            Self::CallerRate | Self::OverflowRate | Self::Processor => Some((Stage::Gate, Reason::Rate)),
            Self::NodeConnections | Self::Descriptors => Some((Stage::Node, Reason::Connections)),
            Self::Memory | Self::MemoryTaken => Some((Stage::Node, Reason::Memory)),
            Self::Unidentified | Self::NotOwner | Self::AdminConnections => None,
        }
    }
}

/// The shortest wait that is told of a limit by default: nobody comes back sooner.
pub(super) const SHORTEST_TURN: Duration = Duration::from_millis(1);
/// The longest that a call is told to wait for those of its caller before it: room may return at any time.
pub const LONGEST_TURN: Duration = Duration::from_secs(2);

/// What a refused caller is told. Load shedding says `Unavailable` whatever is set here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RejectionStatus {
    /// `RESOURCE_EXHAUSTED`: this caller asked too much.
    #[default]
    ResourceExhausted,
    /// `UNAVAILABLE`, for clients that retry nothing else.
    Unavailable,
}

/// What is left of a bucket that has too few tokens for a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Remainder {
    /// Less than the call costs.
    #[default]
    Nothing,
    /// Enough for the call, but kept for others that share the bucket.
    KeptForOthers,
}

/// A call that was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rate limit exceeded for {}: {}{}{}", self.what(), self.short_of(), self.but(), self.because())]
pub struct Refusal {
    pub method: Method,
    /// Which stage refused.
    pub stage: Stage,
    /// What kind of key was charged.
    pub charged_as: ChargedAs,
    pub reason: Reason,
    /// When the same call would pass if nobody else took anything; of a limit by default, behind the calls of its caller that
    /// wait. [`Duration::MAX`] when waiting does not help: [`Refusal::wait`] tells.
    pub retry_after: Duration,
    /// What the tokens of one such call take to come back.
    pub each: Duration,
    /// The node sheds load: not this caller's doing.
    pub shed: bool,
    /// What the caller is told.
    pub status: RejectionStatus,
    /// Whose word the limit is.
    pub origin: Origin,
    /// What its bucket has, where tokens were short.
    pub rest: Remainder,
    /// Whose bucket refused, at the identity stage.
    pub spiffe_id: Option<SpiffeId>,
}

impl Refusal {
    /// What was refused.
    fn what(&self) -> String {
        match self.method {
            Method::Other => "calls outside of the Workload API and SDS, health checks among them".to_owned(),
            method => format!("/{}/{}", method.service(), method.rpc()),
        }
    }

    /// What there was too little of, and whose.
    fn short_of(&self) -> Cow<'static, str> {
        let text = match (self.reason, self.stage, self.charged_as) {
            (Reason::Blocked, Stage::Identity, _) => return format!("{} is blocked", self.identity()).into(),
            (Reason::Blocked, ..) => "the caller is blocked",
            (Reason::Memory, ..) => "the caller holds its share of memory",
            (Reason::InFlight, Stage::Node, _) => "too many callers are being attested",
            (Reason::InFlight, ..) => "too many calls of the caller are being attested",
            (_, Stage::Node, _) => "all callers of the node together have no tokens left",
            (_, Stage::Identity, ChargedAs::Shared) => {
                return format!("the bucket that {} shares has no tokens left", self.identity()).into();
            }
            (_, Stage::Identity, _) => return format!("{} has no tokens left", self.identity()).into(),
            (_, _, ChargedAs::Pod) => "the caller's pod has no tokens left",
            (_, _, ChargedAs::Shared) => "the callers that share its bucket have no tokens left",
            (_, _, ChargedAs::Overflow) => "the callers without a bucket of their own have no tokens left",
            (_, _, ChargedAs::Uid | ChargedAs::SpiffeId | ChargedAs::Node) => {
                "the caller's user has no tokens left"
            }
        };
        text.into()
    }

    /// What it has all the same.
    fn but(&self) -> &'static str {
        match self.rest {
            Remainder::Nothing => "",
            Remainder::KeptForOthers => ", but those kept for callers that took less",
        }
    }

    /// The identity whose bucket refused.
    fn identity(&self) -> String {
        self.spiffe_id.as_ref().map_or_else(|| "its SPIFFE ID".to_owned(), SpiffeId::to_string)
    }

    /// Why a limit refuses that nobody set.
    fn because(&self) -> &'static str {
        match (self.origin, self.reason) {
            // Nothing else makes a default refuse a call.
            (Origin::ByDefault, Reason::Rate) => ", and the agent is short of processor time",
            (Origin::ByDefault, Reason::Memory) => ", and the agent is short of it",
            _ => "",
        }
    }

    /// Whether the same call may pass after a short wait, and is kept waiting for it: what is refused by an admin's word,
    /// or for ever, is not.
    pub(super) fn may_wait(&self) -> bool {
        match self.reason {
            Reason::Rate => self.origin == Origin::ByDefault,
            // What its connection holds of memory it holds whether it waits or not: answers that others have not read yet.
            Reason::InFlight | Reason::Memory => true,
            Reason::Blocked | Reason::Connections => false,
        }
    }

    /// Whether calls of one caller pass one after the other: what an admin set tells the bucket's wait, whoever waits.
    pub(super) fn is_in_turn(&self) -> bool {
        self.reason == Reason::Rate && self.origin == Origin::ByDefault
    }

    /// When it is the turn of a call that waits as the `nth` of its caller.
    pub(super) fn turn(&self, nth: u32) -> Duration {
        let before =
            if self.is_in_turn() { self.each.saturating_mul(nth.saturating_sub(1)) } else { Duration::ZERO };
        self.retry_after.saturating_add(before).max(SHORTEST_TURN)
    }

    /// The same refusal of a call that was, or would be, the `nth` of its caller to wait, and is told to come back.
    pub(super) fn of_nth(self, nth: u32) -> Self {
        if !self.is_in_turn() {
            return self;
        }
        let retry_after = self.turn(nth).min(LONGEST_TURN.max(self.retry_after));
        Self { retry_after, ..self }
    }

    /// How long to wait; `None` when a blocked caller need not come back.
    pub fn wait(&self) -> Option<Duration> {
        (self.retry_after != Duration::MAX).then_some(self.retry_after)
    }
}
