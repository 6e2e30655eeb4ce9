//! What callers do, and how chance chooses it: by the seed alone, never by what came of it, so that a run can be replayed.

use serde::{Deserialize, Serialize};

use super::{
    connection::Connection,
    oracle::{GROUPS, PROGRAMS, USERS},
};

/// Calls of all kinds: see [`call`](super::calls::call).
const METHODS: usize = 17;

/// SplitMix64.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end.max(1)).expect("64 bits")).expect("64 bits")
    }

    pub(crate) fn one_in(&mut self, of: usize) -> bool {
        self.below(of) == 0
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// Where a process keeps its way back to root.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum WayBack {
    /// In its saved UID.
    Saved,
    /// In its real UID, as a setuid program that root started.
    Real,
    Lost,
}

/// Who a process is to become.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Guise {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// Groups beside these, that no entry asks for.
    pub(crate) more_groups: u32,
    pub(crate) way_back: WayBack,
}

impl Guise {
    pub(crate) fn choose(chance: &mut Chance) -> Self {
        let uid = chance.of(&USERS);
        let gid = if chance.one_in(2) { chance.of(&GROUPS) } else { uid };
        let groups = (0..chance.below(3)).map(|_| chance.of(&GROUPS)).collect();
        let more_groups = if chance.one_in(6) { 900 } else { 0 };
        let way_back = chance.of(&[WayBack::Saved, WayBack::Saved, WayBack::Real, WayBack::Lost]);
        Self { uid, gid, groups, more_groups, way_back }
    }
}

/// What is passed to the agent.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Passed {
    /// A TCP socket whose close blocks.
    Lingering,
    Pipe,
    File,
    /// The connection that it is passed on.
    Itself,
    /// A socket in whose queue another one waits.
    Nested,
}

impl Passed {
    const ALL: [Self; 5] = [Self::Lingering, Self::Pipe, Self::File, Self::Itself, Self::Nested];
}

/// Bytes that are no call.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Noise {
    Ping,
    Settings,
    Reset,
    HalfFrame,
    Rubbish(u64),
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Leave {
    Exit,
    Killed,
}

/// One step of a caller. `at` chooses one of its connections, whatever it has.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Action {
    Open {
        deaf: bool,
    },
    /// The first bytes of it alone, where it is cut.
    Call {
        at: usize,
        method: usize,
        cut: Option<usize>,
    },
    /// As many calls on one connection, nothing of which is read before all are written.
    Burst {
        at: usize,
        method: usize,
        times: usize,
    },
    /// As many users, of whom each validates a token that is none on a connection of its own, and leaves.
    Users {
        first: u32,
        users: u32,
    },
    /// What was left of a call.
    Finish {
        at: usize,
    },
    Noise {
        at: usize,
        noise: Noise,
    },
    Stall {
        at: usize,
    },
    Listen {
        at: usize,
    },
    Pass {
        at: usize,
        what: Passed,
        times: usize,
    },
    Become(Guise),
    /// Starts a process that inherits all connections and goes on with one. Its control socket comes with it.
    Fork {
        at: usize,
        guise: Guise,
    },
    Exec {
        program: usize,
    },
    /// Hands a connection to another caller.
    Give {
        at: usize,
        to: usize,
    },
    Take(Box<Connection>),
    Threads {
        at: usize,
    },
    Shut {
        at: usize,
        how: usize,
    },
    Close {
        at: usize,
    },
    /// Connections that are closed at once.
    Storm {
        times: usize,
        what: Option<Passed>,
    },
    Leave(Leave),
    /// A call on a connection of its own, to the end: what a polite caller does.
    Ask,
}

impl Action {
    /// One for a caller, of `callers`.
    pub(crate) fn choose(chance: &mut Chance, callers: usize) -> Self {
        let at = chance.below(16);
        match chance.below(100) {
            0..14 => Self::Open { deaf: chance.one_in(5) },
            14..32 => {
                let cut = chance.one_in(6).then(|| chance.below(300));
                Self::Call { at, method: chance.below(METHODS), cut }
            }
            32..37 => Self::Burst { at, method: chance.below(METHODS), times: 1 + chance.below(60) },
            37 => {
                let first = u32::try_from(chance.below(1_000)).expect("few");
                Self::Users { first, users: 1 + u32::try_from(chance.below(40)).expect("few") }
            }
            38..44 => Self::Finish { at },
            44..51 => {
                let rubbish = Noise::Rubbish(chance.next());
                let all = [
                    Noise::Ping,
                    Noise::Ping,
                    Noise::Settings,
                    Noise::Reset,
                    Noise::Reset,
                    Noise::HalfFrame,
                    rubbish,
                ];
                Self::Noise { at, noise: chance.of(&all) }
            }
            51..54 => Self::Stall { at },
            54..57 => Self::Listen { at },
            57..63 => Self::Pass { at, what: chance.of(&Passed::ALL), times: 1 + chance.below(4) },
            63..71 => Self::Become(Guise::choose(chance)),
            71..77 => Self::Fork { at, guise: Guise::choose(chance) },
            77..81 => Self::Exec { program: chance.below(PROGRAMS.len()) },
            81..86 => Self::Give { at, to: chance.below(callers) },
            86..89 => Self::Threads { at },
            89..91 => Self::Shut { at, how: chance.below(3) },
            91..94 => Self::Close { at },
            94 => Self::Storm { times: 1 + chance.below(30), what: None },
            95 => Self::Storm { times: 100 + chance.below(300), what: None },
            96..98 => Self::Storm { times: 1 + chance.below(4), what: Some(chance.of(&Passed::ALL)) },
            _ => Self::Leave(chance.of(&[Leave::Exit, Leave::Killed])),
        }
    }
}
