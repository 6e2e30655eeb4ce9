//! Who may call how often, and what the node as a whole can bear. No I/O.
//!
//! # Which bucket is charged, in what order, and why
//!
//! Narrow before wide: what only the caller has is asked first, what all share last, so that a caller over its
//! own limit takes nothing from the others. What was taken before a refusal is given back: tokens are *held*
//! first and *settled* when the call's cost is known (see [`bucket`]; [`table`] keeps them).
//!
//! 1. **At accept** ([`gate`], set by [`GateSettings`]), of the caller: is it blocked? its open connections, its family's,
//!    and its rate of new ones, where they are set; then the node's places, and what the caller and its family hold
//!    ([`holding`]) of what is short.
//! 2. **Before attestation** ([`Limits::admit`], set by [`LimitSettings::caller`] and [`NodeSettings`]), of the
//!    caller and the method: is it blocked? the caller's bucket for the method; while memory is short, what it holds; its
//!    share of the attestations in flight, then all of them; for a method without identity, the node's bucket.
//! 3. **After attestation** ([`Limits::admit_for`], set by [`LimitSettings::identity`] and [`NodeSettings`]), of
//!    each SPIFFE ID and the method: is it blocked? its bucket, where all are charged or none; then the node's bucket.
//! 4. **Afterwards** ([`Admitted`], set by [`rule::Costs`]): the price of an answer, of a signature or of a failed
//!    attestation is paid; nothing, if the call was refused.
//!
//! The node's bucket comes last of all, after the identities' and not once per stage, as nothing can refuse
//! after it: it never has to give back. What stands between strangers and attestation node-wide is the number
//! in flight, which a caller has a share of ([`slots`]).
//!
//! A limit is an admin's word or holds by default ([`rule::Origin`]). The first refuses at once, exact to the bucket. The
//! second binds where there is no [`room`], each by what is short: what is held ([`holding`]) by memory and descriptors, tokens
//! by processor time. While there is some, all pass, charged as far as there are tokens. Without it whoever has tokens in its
//! bucket, or in its share of one, passes, and so does the first call of a connection that was let in ([`caller::NthCall`]), as
//! far as its caller's and its identities' buckets go; where nothing else is short, as many more as there is time left for
//! ([`spare`]). The others wait ([`patience`]) and are refused for the node's sake. A place
//! among the attestations is waited for whoever set their number.
//!
//! A bucket that several callers share (an identity's, a mask's, the node's) is shared fairly: half of it is kept for
//! those who took less than the limit divided by the callers ([`shares`]). A refusal by it counts for the caller too.
//!
//! Bundle calls charge the caller's default identity, the first. ValidateJWTSVID needs none: the caller stage
//! alone; nor does what is no Workload API (health, reflection), which is charged as [`Method::Other`], and so is what ends
//! before it comes to anything that could be admitted ([`Limits::charge_late`]). Streams
//! are charged when they open. The agent's own look at its health does not go through the socket, and is
//! charged to nobody. A caller that is exempt is charged nothing at any stage; `unlimited` frees from the
//! stage's own bucket alone.
//!
//! A *family* is a user with all the UIDs that were given to it (subuid(5)): whoever can be many callers is one
//! where places are counted that all share ([`Families`]).
//!
//! Which rule holds: [`policy`] (default < method < override; the most specific override), at a time:
//! [`schedule`]. Why something is refused: [`refusal`]. What people see: [`report`], [`counters`] and
//! [`standings`]. Memory: [`budget`].
//!
//! # Trust
//!
//! A [`CallerKey`] is the kernel's word. Nothing that a caller sends chooses a bucket, but for the method.

mod accounts;
mod admission;
mod admitted;
mod apart;
mod ask;
pub mod attempt;
pub mod beyond_budget;
pub mod bucket;
pub mod budget;
pub mod caller;
pub mod caller_pattern;
mod cells;
mod counters;
pub mod gate;
pub mod gate_plan;
mod gate_refusals;
pub mod gate_settings;
pub mod gate_standings;
pub mod holding;
pub mod id_pattern;
mod identity_stage;
mod in_force;
mod ledger;
mod lent_memory;
mod lent_places;
pub mod method;
pub mod names;
pub mod out_of_room;
pub mod pace;
mod parents;
pub mod patience;
pub mod pattern;
pub mod policy;
mod pool;
pub mod processor;
pub mod refusal;
pub mod report;
pub mod room;
pub mod rule;
pub mod schedule;
pub mod settings;
pub mod shares;
mod shortage;
mod since_start;
mod slots;
mod spare;
mod standings;
mod table;
mod table_size;
mod tally;
mod waiting;
pub mod waste;

pub use accounts::ToldToGo;
pub use admission::{Limits, UpdatePlace};
pub use admitted::Admitted;
pub use caller::{CallerKey, Families, WhoHolds};
pub use gate::{ConnectionPermit, Gate};
pub use gate_plan::GatePlan;
pub use gate_settings::{ConnectionSettings, GatePlaces, GateRule, GateRules, GateSettings};
pub use in_force::LimitsInForce;
pub use method::Method;
pub use patience::Patience;
pub use refusal::{ConnectionRefusal, Refusal, RejectionStatus};
pub use settings::{LimitSettings, NodeQuota, NodeSettings, SoftLimits};
pub(crate) use slots::{AttestationSlot, Slots};
pub use slots::{Attestations, AttestationsError};
pub use table_size::{TableSize, TableSizeError};
