//! The scenarios: who abuses, how, and who stands beside them.

use super::{calls::Kind, part::Role, polite::Manner, setting};

/// Users of the callers, when the bench may choose: far from any that a node has.
pub(crate) const ABUSERS: [u32; 4] = [710_001, 710_002, 710_003, 710_004];
pub(crate) const POLITE: u32 = 720_001;
/// Users who validate.
const VALIDATING: u32 = 730_001;

/// The polite user's processes, but where a scenario is about others.
const EACH: &[Manner] = &[Manner::Waiting, Manner::AtOnce, Manner::Kept, Manner::Streams];

/// What the processor time of the abusers is burnt with in the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Baseline {
    Burn,
    ForkBurn,
    /// None: the floor says what there is to be had.
    Floor,
}

/// Callers who abuse, and polite ones beside them.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) label: &'static str,
    pub(crate) role: Role,
    /// Users.
    pub(crate) abusers: Crowd,
    /// Processes of each.
    pub(crate) workers: Workers,
    /// What the role makes of it.
    pub(crate) number: u64,
    pub(crate) polite: &'static [Manner],
    pub(crate) baseline: Baseline,
    /// In the agent's configuration.
    pub(crate) blocks: &'static str,
}

/// Whose processes the abusers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crowd {
    /// [`ABUSERS`].
    Four,
    /// The first of them.
    One,
    /// So many users, with an entry for none.
    Many(u32),
    /// They begin as root, and become others.
    Root,
}

impl Crowd {
    pub(crate) fn users(self) -> Vec<Option<u32>> {
        match self {
            Self::Four => ABUSERS.map(Some).to_vec(),
            Self::One => vec![Some(ABUSERS[0])],
            Self::Many(many) => (VALIDATING..VALIDATING + many).map(Some).collect(),
            Self::Root => vec![None; ABUSERS.len()],
        }
    }
}

/// How many processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workers {
    These(u64),
    /// `DURWARD_ABUSE_WORKERS`.
    Set,
}

impl Workers {
    pub(crate) fn count(self) -> u64 {
        match self {
            Self::These(count) => count,
            Self::Set => setting("DURWARD_ABUSE_WORKERS", 300),
        }
    }
}

const PLAIN: Scenario = Scenario {
    name: "",
    label: "",
    role: Role::Nothing,
    abusers: Crowd::Four,
    workers: Workers::These(1),
    number: 0,
    polite: EACH,
    baseline: Baseline::Burn,
    blocks: "",
};

pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "storm",
        label: "a connection per call",
        role: Role::Storm,
        workers: Workers::Set,
        ..PLAIN
    },
    Scenario {
        name: "fork",
        label: "a process per call",
        role: Role::Fork,
        workers: Workers::Set,
        baseline: Baseline::ForkBurn,
        ..PLAIN
    },
    Scenario {
        name: "pins",
        label: "processes that have ended, held by pidfds",
        role: Role::Pin,
        abusers: Crowd::One,
        workers: Workers::These(4),
        baseline: Baseline::ForkBurn,
        ..PLAIN
    },
    Scenario { name: "idle", label: "10,000 idle connections", role: Role::Idle, number: 2_500, ..PLAIN },
    Scenario { name: "slow", label: "slow readers", role: Role::SlowRead, workers: Workers::Set, ..PLAIN },
    Scenario {
        name: "strangers",
        label: "distinct callers one after the other",
        role: Role::Strangers,
        abusers: Crowd::Root,
        ..PLAIN
    },
    Scenario {
        name: "limited",
        label: "50 calls/s each, limit 10",
        role: Role::Limited,
        blocks: LIMITED,
        ..PLAIN
    },
    Scenario { name: "bigjwt", label: "long answers that nobody reads", role: Role::BigJwt, ..PLAIN },
    Scenario {
        name: "groups",
        label: "streams with 1,000 groups",
        role: Role::Groups,
        abusers: Crowd::Root,
        ..PLAIN
    },
    Scenario {
        name: "close",
        label: "connect and close, waiting",
        role: Role::ConnectAndClose,
        abusers: Crowd::One,
        workers: Workers::These(4),
        baseline: Baseline::Floor,
        ..PLAIN
    },
    Scenario {
        name: "close-at-once",
        label: "connect and close, 32 processes that spin",
        role: Role::ConnectAndCloseAtOnce,
        abusers: Crowd::One,
        workers: Workers::These(32),
        baseline: Baseline::Floor,
        ..PLAIN
    },
    Scenario { name: "nohdr", label: "calls without the header", role: Role::Hot(Kind::NoHeader), ..PLAIN },
    Scenario { name: "unknown", label: "unknown methods", role: Role::Hot(Kind::Unknown), ..PLAIN },
    Scenario {
        name: "badpb",
        label: "bodies that are no message",
        role: Role::Hot(Kind::BadMessage),
        ..PLAIN
    },
    Scenario {
        name: "longpb",
        label: "long bodies that are no message",
        role: Role::Hot(Kind::LongMessage),
        ..PLAIN
    },
    Scenario { name: "refused", label: "calls above the limit", role: Role::Hot(Kind::Refused), ..PLAIN },
    Scenario { name: "other", label: "unknown services", role: Role::Hot(Kind::Other), ..PLAIN },
    Scenario {
        name: "val",
        label: "120 users validate 100 tokens/s each",
        role: Role::Validate,
        abusers: Crowd::Many(120),
        number: 100,
        polite: &[Manner::Waiting, Manner::Validating, Manner::Streams],
        ..PLAIN
    },
    Scenario {
        name: "shared",
        label: "one SPIFFE ID, 500 calls/s each",
        role: Role::Shared,
        number: 500,
        blocks: SHARED,
        ..PLAIN
    },
];

/// Calls a second, and at once, of who is limited.
pub(crate) const LIMIT: f64 = 10.0;

/// [`LIMIT`] for each caller; connections are no matter here.
const LIMITED: &str = "ratelimit {\n  caller {\n    override \"uid:710001-710004\" {\n      rate = 10\n      burst = 10\n    }\n  }\n}\n";

/// All have the SPIFFE ID of the polite one, and may call more often than it may.
const SHARED: &str = "ratelimit {\n  caller {\n    override \"uid:710001-710004\" { unlimited = true }\n  }\n}\n\
    entry \"spiffe://example.org/u720001\" { selectors = [\"unix:uid:710001\"] }\n\
    entry \"spiffe://example.org/u720001\" { selectors = [\"unix:uid:710002\"] }\n\
    entry \"spiffe://example.org/u720001\" { selectors = [\"unix:uid:710003\"] }\n\
    entry \"spiffe://example.org/u720001\" { selectors = [\"unix:uid:710004\"] }\n";
