//! How much memory the agent may use, and what it does as that runs out.
//!
//! The budget is the cgroup's limit, or what is set, or else a part of the machine's memory: there always is one. What is used (the resident set, which others read) becomes
//! one of four steps by a pure function; whoever asks it acts: caches shrink first, then connections stop
//! growing, then the heaviest caller loses its own. Established streams of others are never cut. The figures
//! for what things cost are for accounts and for the number of connections that fit; they were measured, and
//! are rounded up.
//!
//! Where memory is held by something else than connections (a hundred thousand entries, say), nobody's are cut:
//! that would take identity away and give nothing back.

use std::ops::RangeInclusive;

/// A connection that was let in and has sent nothing: its task, its place in tables, and what the kernel keeps for its
/// socket, its file and its process's.
pub const PARKED: u64 = 6 * 1024;
/// HTTP/2, with the first stream (h2's fixed buffers, for the most part).
pub const HTTP2: u64 = 27 * 1024;
/// Each further stream that was open at the same time, from then on to the end of the connection: most of it h2 keeps for the
/// next one.
pub const STREAM: u64 = 6 * 1024;
/// A stream whose head came in one read with others, and that may have ended before it was one of those [`STREAM`] counts: what
/// h2 keeps for as many as there were at once, to the end of the connection.
pub const HEAD: u64 = 700;
/// Bytes of requests that are not complete, of all streams of a connection whose caller holds more than its share while memory is
/// short: one message of the largest size, and some beside it. More, and what is being sent is refused. All others may have what
/// there is room for.
pub const UPLOADS: u64 = 68 * 1024;
/// What each byte of a request that is not complete takes: it is a slice of the buffer that it came in, or is in one that grows
/// by doubling.
pub const UPLOAD: u64 = 3;

/// What the kernel keeps for a refused connection that lingers.
pub const LINGERING: u64 = 4 * 1024;
/// How many refused connections are answered at a time.
pub const REPLIES: usize = 16;
/// What one of these takes: its task, a buffer, the answer, and what the kernel keeps.
pub const REPLY: u64 = 12 * 1024;
/// All of them.
#[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
pub const REPLIES_AT_MOST: u64 = REPLIES as u64 * REPLY;
/// A connection to the admin socket: HTTP/2, and an answer of ordinary length.
pub const ADMIN_CONNECTION: u64 = PARKED + HTTP2 + 7 * 1024;
/// Of a budget, these have one part in so many, at most.
pub const ADMIN_SHARE: u64 = 8;
/// A caller that held nothing, with one connection and one call.
pub const NEWCOMER: u64 = PARKED + HTTP2 + 7 * 1024;
/// Of a budget, newcomers have one part in so many set aside, at most.
pub const RESERVED_SHARE: u64 = 8;
/// Of a budget so much is for nobody: what the kernel keeps for a moment of connections that have gone, and what is let in between
/// two looks at the cgroup. Measured with thousands of connections a second.
pub const SPARE: u64 = 3 << 20;
/// The same of a small budget: one part in so many.
const SPARE_PART: u64 = 8;

/// What of a budget is for nobody.
pub const fn spare(budget: u64) -> u64 {
    let part = budget / SPARE_PART;
    if part < SPARE { part } else { SPARE }
}

/// Without room a caller's share is one part in so many of the budget, at least.
pub const SHARES: u64 = 64;
/// The process itself, before anybody connects.
pub const PROCESS: u64 = 4 << 20;
/// What h2 keeps beside each part of an answer.
const PART: u64 = 512;

/// What a part of an answer takes, of so many bytes, until the kernel has all of it: beside itself the room that encoding
/// left behind it.
#[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
pub const fn unsent(part: usize) -> u64 {
    let bytes = part as u64;
    bytes + bytes / 2 + PART
}

/// What a body keeps of such a part when the kernel has it, for as long as it is open and makes no other: tonic's buffer. What is
/// small is reckoned with the stream.
#[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
pub const fn kept(part: usize) -> u64 {
    (part as u64).saturating_sub(2 * 1024)
}

/// Bytes of answers, as [`unsent`] reckons them, that a connection may leave unread. While there are as many no further
/// answer is made; one that is larger is made alone.
pub const UNSENT: u64 = 64 * 1024;
/// Bytes that HTTP/2 has written and the kernel has no room for yet.
pub const OUTBOX: usize = 8 * 1024;
/// What an answer is reckoned at before it is made, when none was made on the connection before: so many of them are
/// under way together that they fill [`UNSENT`].
pub const ANSWER_AT_FIRST: u64 = 16 * 1024;
/// The least that it is reckoned at, when those before it were small. When they were larger it is as much as they were.
pub const ANSWER_AT_LEAST: u64 = 4 * 1024;
/// A request that waits until its answer fits, beside what each stream takes: its body is not read, and may be a slice of
/// a buffer that nothing else is in.
pub const WAITING: u64 = 10 * 1024;

/// A call that waits for tokens or to be attested, beside its stream: its message, and its task's part. There are
/// [`PLACES`](super::patience::PLACES) of them.
pub const KEPT_WAITING: u64 = 4 * 1024;

/// A connection with so many streams that wait for news.
pub const fn connection_with(streams: u32) -> u64 {
    #[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
    let further = streams.saturating_sub(1) as u64;
    PARKED + HTTP2 + further * STREAM
}

/// A frame that is not complete, and a header block, of the largest size that HTTP/2 keeps.
pub const UNFINISHED: u64 = 32 * 1024;

/// A connection at its worst without room: so many streams open, [`UPLOADS`] of requests that never end, answers of [`UNSENT`] that
/// nobody reads, and as many requests as there are streams that wait for room for theirs. Beside these there are the answers
/// under way when the first of them turned out large: four, or [`UNSENT`] / [`ANSWER_AT_LEAST`] behind small ones.
pub const fn connection_at_most(streams: u32) -> u64 {
    #[expect(clippy::as_conversions, reason = "widening; `From` is not const")]
    let (waiting, outbox) = (streams as u64 * WAITING, OUTBOX as u64);
    connection_with(streams) + waiting + UPLOADS * UPLOAD + UNSENT + outbox
}
/// A known key in the table of a stage, with its share of the index and its parent.
pub const KEY: u64 = 224;
/// A cached JWT-SVID with its key, for audiences of ordinary length; for the longest that are kept it is twice
/// that.
pub const CACHED_JWT_SVID: u64 = 2 * 1024;
/// A cached X.509-SVID with its key, encoded once.
pub const CACHED_X509_SVID: u64 = 4 * 1024;

/// How far memory must fall below the beginning of a step for the step to end, in percent of the budget.
const SLACK: u8 = 5;
/// Where there is no limit, neither set nor of a cgroup, the budget is one part in so many of the machine's memory. The machine
/// is there for its workloads, so what they make the agent hold must stay the smaller part of it; and a quarter is what a
/// hundred thousand entries with their SVIDs need (136 MiB, below the 70 percent from which on memory is short) on a machine
/// of 1 GiB. Nothing takes it before it is held.
const MACHINE_PART: u64 = 4;
/// The same of a machine that has little, in bytes, or does not say: room for the fewest connections there may be, with every
/// number of streams that may be set.
pub(super) const MACHINE_LEAST: u64 = 72 << 20;

/// What bounds the memory of this process, whatever is set. In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryBounds {
    /// The lowest limit of its cgroup and those above it, if there is one.
    pub cgroup: Option<u64>,
    /// What the machine has, if it says.
    pub machine: Option<u64>,
}

/// How much memory the agent may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryBudget {
    pub bytes: u64,
    pub from: BudgetFrom,
}

/// Where a budget comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetFrom {
    /// An admin.
    Set,
    Cgroup,
    /// Nobody set one.
    Machine,
}

impl BudgetFrom {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Set => "ratelimit.memory.limit",
            Self::Cgroup => "the memory limit of its cgroup",
            Self::Machine => "a part of the machine's memory",
        }
    }
}

/// Where the budget comes from. Default: [`MemoryLimit::AUTO`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryLimit(Option<u64>);

impl MemoryLimit {
    /// The lowest limit of the agent's cgroup and those above it; where there is none, a part of the machine's memory.
    pub const AUTO: Self = Self(None);
    /// What may be set, in bytes.
    pub const RANGE: RangeInclusive<u64> = 8 << 20..=1 << 40;

    /// So many bytes; `None` outside of [`MemoryLimit::RANGE`].
    pub fn bytes(bytes: u64) -> Option<Self> {
        Self::RANGE.contains(&bytes).then_some(Self(Some(bytes)))
    }

    /// In bytes, if it is set.
    pub fn in_bytes(self) -> Option<u64> {
        self.0
    }
}

/// When memory is short, in percent of the budget used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySteps([u8; 3]);

impl MemorySteps {
    /// What a step may be.
    pub const RANGE: RangeInclusive<u8> = 1..=100;

    /// From where on caches shrink, connections do not grow, and the heaviest caller's are closed: 70, 85 and
    /// 95 by default.
    ///
    /// # Errors
    /// [`MemoryStepsError`] for a step outside of [`MemorySteps::RANGE`], or not above the one before it.
    pub fn new(percents: [u8; 3]) -> Result<Self, MemoryStepsError> {
        if let Some(percent) = percents.into_iter().find(|percent| !Self::RANGE.contains(percent)) {
            return Err(MemoryStepsError::Range(percent));
        }
        match percents.windows(2).position(|pair| !pair.is_sorted_by(|a, b| a < b)) {
            Some(before) => Err(MemoryStepsError::Falling { step: before + 1 }),
            None => Ok(Self(percents)),
        }
    }

    /// The steps, in percent.
    pub fn percents(self) -> [u8; 3] {
        self.0
    }
}

impl Default for MemorySteps {
    fn default() -> Self {
        Self([70, 85, 95])
    }
}

/// Why percents make no steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryStepsError {
    /// Outside of [`MemorySteps::RANGE`].
    #[error(
        "step {0} must be from {least} to {most} percent",
        least = MemorySteps::RANGE.start(),
        most = MemorySteps::RANGE.end()
    )]
    Range(u8),
    /// The step at this place, counted from 0, is not above the one before it.
    #[error("step {step} must be above the one before it")]
    Falling { step: usize },
}

/// How much memory the agent may use, and when it is short of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemorySettings {
    pub limit: MemoryLimit,
    /// When it is short.
    pub steps: MemorySteps,
}

impl MemorySettings {
    /// The budget. Of what is set and the cgroup's limit the lower one counts, since the kernel ends who passes that.
    pub fn budget(&self, bounds: MemoryBounds) -> MemoryBudget {
        let (bytes, from) = match (self.limit.0, bounds.cgroup) {
            (Some(set), cgroup) if cgroup.is_none_or(|cgroup| set <= cgroup) => (set, BudgetFrom::Set),
            (_, Some(cgroup)) => (cgroup, BudgetFrom::Cgroup),
            (_, None) => {
                let part = bounds.machine.map_or(0, |machine| machine / MACHINE_PART);
                (part.max(MACHINE_LEAST), BudgetFrom::Machine)
            }
        };
        MemoryBudget { bytes, from }
    }

    /// What is set, if that is more than the cgroup's limit.
    pub fn above(&self, bounds: MemoryBounds) -> Option<u64> {
        self.limit.0.filter(|set| bounds.cgroup.is_some_and(|cgroup| *set > cgroup))
    }

    /// Where a step begins, and below what it ends again, of `whole`.
    pub(super) fn lines(&self, step: Pressure, whole: u64) -> (u64, u64) {
        let percent = match (step, self.steps.percents()) {
            (Pressure::None, _) => 0,
            (Pressure::ShrinkCaches, [first, ..]) => first,
            (Pressure::RefuseNew, [_, second, _]) => second,
            (Pressure::CloseHeaviest, [.., last]) => last,
        };
        let line = |percent: u8| {
            let bytes = (u128::from(whole) * u128::from(percent)).div_ceil(100);
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        (line(percent), line(percent.saturating_sub(SLACK)))
    }
}

/// How short memory is, or descriptors. Each step does what those before it do, too. From the first on there is no room,
/// and who holds its share gets no more; one that holds nothing is let in at each step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pressure {
    /// It is not.
    #[default]
    None,
    /// Forget what can be made again: cached SVIDs that nobody holds, full buckets ([`super::Limits::shrink`]).
    ShrinkCaches,
    /// The newest connections of callers that hold more than their share are told to come back ([`super::Gate::shed`]).
    RefuseNew,
    /// They are closed.
    CloseHeaviest,
}

/// What is there that takes memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accounted {
    /// Bytes that connections hold, as they are told ([`holding`](super::holding)).
    pub held: u64,
    /// Keys in all tables.
    pub keys: u64,
    /// Cached JWT-SVIDs.
    pub jwt_svids: u64,
    /// Cached X.509-SVIDs.
    pub x509_svids: u64,
    /// Bytes that attestors keep.
    pub attestors: u64,
    /// Bytes that connections of the HTTP listeners take.
    pub http: u64,
}

impl Accounted {
    /// What that takes, in bytes, as this module reckons it.
    pub fn bytes(&self) -> u64 {
        let Self { held, keys, jwt_svids, x509_svids, attestors, http } = *self;
        let in_bytes = [held, attestors, http, PROCESS].into_iter().fold(0, u64::saturating_add);
        [(keys, KEY), (jwt_svids, CACHED_JWT_SVID), (x509_svids, CACHED_X509_SVID)]
            .into_iter()
            .fold(in_bytes, |sum: u64, (number, each)| sum.saturating_add(number.saturating_mul(each)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_contradict_are_errors() {
        for (case, percents, fits) in [
            ("usual", [70, 85, 95], true),
            ("falling", [70, 60, 95], false),
            ("equal", [70, 70, 95], false),
            ("falling at the end", [70, 85, 80], false),
            ("over 100", [70, 85, 101], false),
            ("zero", [0, 85, 95], false),
        ] {
            assert_eq!(MemorySteps::new(percents).is_ok(), fits, "{case}");
        }
        assert_eq!(MemorySteps::new([70, 85, 95]), Ok(MemorySteps::default()));
        assert_eq!(MemoryLimit::bytes(1), None, "small");
    }

    #[test]
    fn there_always_is_a_budget() {
        use BudgetFrom as F;
        let auto = MemorySettings::default();
        let set = MemorySettings { limit: MemoryLimit::bytes(24 << 20).unwrap(), ..auto };
        let (mib, gib) = (|n: u64| Some(n << 20), 1 << 30);
        for (case, settings, cgroup, machine, want, above) in [
            ("set", set, None, Some(gib), (24 << 20, F::Set), None),
            ("set, below the cgroup's", set, Some(gib), Some(gib), (24 << 20, F::Set), None),
            ("set, as the cgroup's", set, mib(24), None, (24 << 20, F::Set), None),
            ("set above the cgroup's", set, mib(8), Some(gib), (8 << 20, F::Cgroup), mib(24)),
            ("a cgroup's", auto, Some(1), Some(gib), (1, F::Cgroup), None),
            ("nobody's", auto, None, Some(8 * gib), (2 * gib, F::Machine), None),
            ("on a small machine", auto, None, mib(128), (72 << 20, F::Machine), None),
            ("a machine that does not say", auto, None, None, (72 << 20, F::Machine), None),
        ] {
            let bounds = MemoryBounds { cgroup, machine };
            let MemoryBudget { bytes, from } = settings.budget(bounds);
            assert_eq!(((bytes, from), settings.above(bounds)), (want, above), "{case}");
        }
        let entries = 136 << 20;
        let machine = MemoryBounds { machine: Some(gib), ..MemoryBounds::default() };
        let short_from = auto.lines(Pressure::ShrinkCaches, auto.budget(machine).bytes).0;
        assert!(entries + 4 * PROCESS < short_from, "{short_from}");
    }

    #[test]
    fn accounts_add_up() {
        let some = Accounted { held: 2, keys: 3, jwt_svids: 1, x509_svids: 1, attestors: 5, http: 7 };
        assert_eq!(some.bytes(), 2 + 5 + 7 + PROCESS + 3 * KEY + CACHED_JWT_SVID + CACHED_X509_SVID);
        assert_eq!(Accounted { held: u64::MAX, keys: 1, ..Accounted::default() }.bytes(), u64::MAX);
    }
}
