//! What people see: the heaviest keys, and when refusals of a key begin and end.
//!
//! Under load a log line per refusal is the attack. So a key that is refused is listed once, and leaves the
//! list when it has not been refused for [`QUIET`]; both are an [`Event`] for whoever logs. The list holds
//! [`LISTED`] keys: of more only the number of refusals is told. That bounds the lines to `2 x LISTED` per
//! `QUIET`, whoever calls and how often.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    bucket::Quota,
    caller::CallerKey,
    caller_pattern::CallerPattern,
    id_pattern::IdPattern,
    method::Method,
    refusal::{Reason, Stage},
    rule::{Limit, Origin},
    shares::Taking,
};
use crate::identity::SpiffeId;

/// How many callers a line names that take from a bucket, or go without.
const NAMED: usize = 3;

/// How many keys can be seen as being refused at a time.
pub const LISTED: usize = 64;
/// How long a key must not have been refused for its refusals to be over.
pub const QUIET: Duration = Duration::from_secs(30);

/// The key of a bucket as people know it. Never a metric label.
#[derive(Clone, PartialEq, Eq)]
pub enum BucketName {
    /// A caller.
    Caller(CallerKey),
    /// All callers that an override with a shared bucket matches.
    Callers(CallerPattern),
    /// A SPIFFE ID.
    Identity(SpiffeId),
    /// All SPIFFE IDs that share a bucket with this one by the mask.
    Masked(SpiffeId, Arc<IdPattern>),
    /// All callers of the node.
    Node,
    /// All those together that have no bucket of their own, as the table has no room.
    WithoutBucket,
}

impl fmt::Display for BucketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caller(caller) => write!(f, "{caller}"),
            Self::Callers(pattern) => write!(f, "{pattern}"),
            Self::Identity(id) => write!(f, "{id}"),
            Self::Masked(id, mask) => mask.write_masked(id, f),
            Self::Node => f.write_str("all callers"),
            Self::WithoutBucket => f.write_str("others without a bucket"),
        }
    }
}

impl fmt::Debug for BucketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A key with what it used and was refused since its bucket was last forgotten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heavy {
    pub name: BucketName,
    /// What the bucket is for: the name of an RPC, or `connections`.
    pub what: &'static str,
    /// Calls that passed.
    pub used: u32,
    /// Calls that did not, or in a dry run would not have.
    pub refused: u32,
    /// The most calls in one second, let pass or not; 65,535 stands for more. Not known of what the node shares.
    pub most: u32,
    /// Who takes from it, where several callers do; those first that were refused most.
    pub takings: Vec<Taking>,
}

impl Heavy {
    /// Those for whom a table has no room, if any were refused.
    pub(super) fn without_bucket(what: &'static str, refused: u32) -> Option<Self> {
        let name = BucketName::WithoutBucket;
        (refused > 0).then_some(Self { name, what, used: 0, refused, most: 0, takings: Vec::new() })
    }

    /// What the heaviest are sorted by.
    pub(super) fn weight(&self) -> (u32, u32) {
        (self.refused, self.used)
    }
}

/// How a bucket stands now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// So many tokens are left, of at most so many.
    Tokens {
        /// Whole tokens that could be taken now.
        left: u32,
        /// The most there can be.
        burst: u32,
        /// Whose word the limit is.
        origin: Origin,
    },
    /// No limit of its own.
    Unlimited,
    /// No limit at all, the node's neither.
    Exempt,
    /// Everything is refused.
    Blocked,
}

impl Standing {
    /// The standing under `limit`; `left` is asked for a quota, and says `None` for a bucket that is not known,
    /// which is full.
    pub(super) fn under(limit: Limit, left: impl FnOnce(Quota) -> Option<u32>) -> Self {
        match limit {
            Limit::Quota(quota) => {
                let left = left(quota).unwrap_or_else(|| quota.burst());
                Self::Tokens { left, burst: quota.burst(), origin: Origin::Set }
            }
            Limit::Unlimited => Self::Unlimited,
            Limit::Exempt => Self::Exempt,
            Limit::Block => Self::Blocked,
        }
    }

    /// The same under a limit of this origin.
    pub(super) fn of_origin(self, origin: Origin) -> Self {
        match self {
            Self::Tokens { left, burst, .. } => Self::Tokens { left, burst, origin },
            Self::Unlimited | Self::Exempt | Self::Blocked => self,
        }
    }
}

/// What is worth a log line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A key is being refused.
    RefusalStarted {
        stage: Stage,
        name: BucketName,
        /// Why the first of them was.
        reason: Reason,
        /// Of the call that was refused first.
        method: Option<Method>,
        /// Who takes from it, where several callers do.
        takings: Vec<Taking>,
    },
    /// A key has not been refused for [`QUIET`].
    RefusalEnded {
        stage: Stage,
        name: BucketName,
        /// How often it was refused.
        count: u64,
    },
    /// Refusals of keys that found the list full, since this was last said.
    RefusalsUnlisted { count: u64 },
}

/// Names those of whom `count` is highest, with it: `uid:7 400, uid:8 3`.
pub fn foremost(takings: &[Taking], count: impl Fn(&Taking) -> u32) -> String {
    let mut counted: Vec<(u32, &Taking)> = takings.iter().map(|it| (count(it), it)).collect();
    counted.retain(|(count, _)| *count > 0);
    counted.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
    let named = counted.iter().take(NAMED).map(|(count, taking)| match taking.caller {
        Some(caller) => format!("{caller} {count}"),
        None => format!("others {count}"),
    });
    named.collect::<Vec<_>>().join(", ")
}

/// The keys that are being refused now.
#[derive(Debug, Default)]
pub(super) struct Refusing {
    listed: Vec<Listed>,
    unlisted: u64,
    unlisted_told: u64,
}

#[derive(Debug)]
struct Listed {
    stage: Stage,
    name: BucketName,
    reason: Reason,
    method: Option<Method>,
    told: bool,
    count: u64,
    last: u64,
}

impl Refusing {
    /// Notes a refusal. `name` is asked only when it is listed.
    pub(super) fn note(
        &mut self,
        now: u64,
        (stage, reason): (Stage, Reason),
        method: Option<Method>,
        name: &BucketName,
    ) {
        if let Some(listed) = self.listed.iter_mut().find(|it| it.stage == stage && it.name == *name) {
            listed.count += 1;
            listed.last = now;
        } else if self.listed.len() < LISTED {
            let name = name.clone();
            self.listed.push(Listed { stage, name, reason, method, told: false, count: 1, last: now });
        } else {
            self.unlisted += 1;
        }
    }

    /// What has happened since this was last asked. Who takes is for others to say.
    pub(super) fn drain(&mut self, now: u64) -> Vec<Event> {
        let mut events = Vec::new();
        for it in self.listed.iter_mut().filter(|it| !it.told) {
            it.told = true;
            let (stage, name, reason, method) = (it.stage, it.name.clone(), it.reason, it.method);
            events.push(Event::RefusalStarted { stage, name, reason, method, takings: Vec::new() });
        }
        let quiet = u64::try_from(QUIET.as_nanos()).unwrap_or(u64::MAX);
        for it in self.listed.extract_if(.., |it| it.last.saturating_add(quiet) <= now) {
            events.push(Event::RefusalEnded { stage: it.stage, name: it.name, count: it.count });
        }
        if self.unlisted > 0 && self.unlisted_told.saturating_add(quiet) <= now {
            events.push(Event::RefusalsUnlisted { count: std::mem::take(&mut self.unlisted) });
            self.unlisted_told = now;
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn name(uid: u32) -> BucketName {
        BucketName::Caller(CallerKey::Uid(uid))
    }

    #[test]
    fn a_refused_key_is_told_of_twice() {
        let mut refusing = Refusing::default();
        let (stage, reason) = (Stage::Caller, Reason::Rate);
        for call in 0..1000 {
            refusing.note(call, (stage, reason), None, &name(1));
        }
        let started =
            Event::RefusalStarted { stage, name: name(1), reason, method: None, takings: Vec::new() };
        assert_eq!(refusing.drain(SECOND), [started]);
        refusing.note(20 * SECOND, (stage, reason), None, &name(1));
        assert_eq!(refusing.drain(49 * SECOND), [], "not quiet yet");
        assert_eq!(refusing.drain(50 * SECOND), [Event::RefusalEnded { stage, name: name(1), count: 1001 }]);
        assert_eq!(refusing.drain(100 * SECOND), []);
    }

    #[test]
    fn many_refused_keys_are_few_lines() {
        let mut refusing = Refusing::default();
        let mut lines = 0;
        // A new key is refused each millisecond, for 10 minutes; somebody logs each second.
        for ms in 0..600_000_u32 {
            refusing.note(u64::from(ms) * 1_000_000, (Stage::Caller, Reason::Rate), None, &name(ms));
            if ms % 1000 == 0 {
                lines += refusing.drain(u64::from(ms) * 1_000_000).len();
            }
        }
        let bound = (600 / 30 + 1) * (2 * LISTED + 1);
        assert!(lines <= bound, "{lines} lines, at most {bound}");
    }
}
