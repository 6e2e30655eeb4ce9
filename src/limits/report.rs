//! What people see: the heaviest keys, and when refusals of a key begin and end.
//!
//! Under load a log line per refusal is the attack. So what is refused is listed once for each bucket (of callers of one
//! [family](Families) once for all), method and reason, is told again each [`AGAIN`] while it goes on, and leaves the list when it has not been refused for
//! [`QUIET`]; each is an [`Event`] for whoever logs. The list holds [`LISTED`] of them: of more only the number of
//! refusals is told. That bounds the lines to `2 x LISTED` per `QUIET`, whoever calls and how often.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    bucket::Quota,
    caller::{CallerKey, Families},
    caller_pattern::CallerPattern,
    id_pattern::IdPattern,
    in_force::limit_text,
    method::Method,
    refusal::{ChargedAs, Reason, Stage},
    rule::{Limit, Origin},
    shares::Taking,
};
use crate::identity::SpiffeId;

/// How many callers a line names that take from a bucket, or go without.
const NAMED: usize = 3;

/// How many can be seen as being refused at a time.
pub const LISTED: usize = 64;
/// How long one must not have been refused for its refusals to be over.
pub const QUIET: Duration = Duration::from_secs(30);
/// How often refusals are told again that go on.
pub const AGAIN: Duration = Duration::from_secs(60);

/// The key of a bucket as people know it; equal for one bucket. Never a metric label.
#[derive(Clone, Eq)]
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

impl BucketName {
    /// The bucket of this key, or where there was no room for it that of those without one.
    pub(super) fn charged_as(self, charged_as: ChargedAs) -> Self {
        if charged_as == ChargedAs::Overflow { Self::WithoutBucket } else { self }
    }
}

impl PartialEq for BucketName {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Caller(a), Self::Caller(b)) => a == b,
            (Self::Callers(a), Self::Callers(b)) => a == b,
            (Self::Identity(a), Self::Identity(b)) => a == b,
            // Whichever of its SPIFFE IDs it is named by.
            (Self::Masked(id, mask), Self::Masked(of, other)) => {
                mask == other && mask.names(id).eq(other.names(of))
            }
            (Self::Node, Self::Node) | (Self::WithoutBucket, Self::WithoutBucket) => true,
            _ => false,
        }
    }
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
    pub(super) fn without_bucket(what: &'static str, (used, refused): (u32, u32)) -> Option<Self> {
        let name = BucketName::WithoutBucket;
        (refused > 0).then_some(Self { name, what, used, refused, most: 0, takings: Vec::new() })
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
        /// The limit.
        quota: Quota,
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
                Self::Tokens { left, quota, origin: Origin::Set }
            }
            Limit::Unlimited => Self::Unlimited,
            Limit::Exempt => Self::Exempt,
            Limit::Block => Self::Blocked,
        }
    }

    /// The same under a limit of this origin.
    pub(super) fn of_origin(self, origin: Origin) -> Self {
        match self {
            Self::Tokens { left, quota, .. } => Self::Tokens { left, quota, origin },
            Self::Unlimited | Self::Exempt | Self::Blocked => self,
        }
    }
}

/// What is worth a log line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It is being refused: at first, and then each [`AGAIN`].
    Refusing {
        what: WhatIsRefused,
        /// Others of the caller's family are refused as it is.
        with_family: bool,
        /// How often since this was last said.
        times: u64,
        /// Who takes from it, where several callers do.
        takings: Vec<Taking>,
    },
    /// It has not been refused for [`QUIET`].
    RefusalEnded {
        what: WhatIsRefused,
        with_family: bool,
        /// How often it was refused.
        count: u64,
    },
    /// Refusals that found the list full, since this was last said.
    RefusalsUnlisted { count: u64 },
}

/// What refusals are told apart by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WhatIsRefused {
    pub stage: Stage,
    pub name: BucketName,
    /// `None` for connections.
    pub method: Option<Method>,
    pub reason: Reason,
    /// Whose word the limit is.
    pub origin: Origin,
    /// The limit that refused last, where tokens were short: they are not told apart by it.
    pub quota: Option<Quota>,
}

impl WhatIsRefused {
    /// The limit that refused, in words.
    pub fn rate(&self) -> Option<String> {
        Some(limit_text(Limit::Quota(self.quota?)))
    }
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

/// What is being refused now.
#[derive(Debug, Default)]
pub(super) struct Refusing {
    listed: Vec<Listed>,
    unlisted: u64,
    unlisted_told: u64,
}

#[derive(Debug)]
struct Listed {
    /// Of a family, that of the one which was refused first.
    what: WhatIsRefused,
    /// Who stands for its family, where it is a caller's.
    head: Option<CallerKey>,
    with_family: bool,
    /// So many stand in a line, and when the last was.
    told: u64,
    told_at: u64,
    count: u64,
    last: u64,
}

impl Listed {
    /// Whether this is refused in the same way, of the same bucket or of one of the same family.
    fn tells_of(&self, what: &WhatIsRefused, head: Option<CallerKey>) -> bool {
        let WhatIsRefused { stage, name, method, reason, origin, quota: _ } = &self.what;
        (*stage, *method, *reason, *origin) == (what.stage, what.method, what.reason, what.origin)
            && if head.is_some() { self.head == head } else { *name == what.name }
    }
}

impl Refusing {
    /// Notes a refusal. The places of the list are shared by all, and so a family has one.
    pub(super) fn note(&mut self, now: u64, what: WhatIsRefused, families: &Families) {
        let head = match &what.name {
            BucketName::Caller(caller) => Some(families.head(*caller)),
            _ => None,
        };
        if let Some(listed) = self.listed.iter_mut().find(|it| it.tells_of(&what, head)) {
            listed.count += 1;
            listed.last = now;
            listed.what.quota = what.quota;
            listed.with_family |= listed.what.name != what.name;
        } else if self.listed.len() < LISTED {
            let with_family = false;
            self.listed.push(Listed { what, head, with_family, told: 0, told_at: now, count: 1, last: now });
        } else {
            self.unlisted += 1;
        }
    }

    /// What has happened since this was last asked. Who takes is for others to say.
    pub(super) fn drain(&mut self, now: u64) -> Vec<Event> {
        let mut events = Vec::new();
        let [quiet, again] = [QUIET, AGAIN].map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        for it in &mut self.listed {
            let times = it.count - it.told;
            if it.told == 0 || times > 0 && it.told_at.saturating_add(again) <= now {
                (it.told, it.told_at) = (it.count, now);
                let (what, with_family) = (it.what.clone(), it.with_family);
                events.push(Event::Refusing { what, with_family, times, takings: Vec::new() });
            }
        }
        for it in self.listed.extract_if(.., |it| it.last.saturating_add(quiet) <= now) {
            let Listed { what, with_family, count, .. } = it;
            events.push(Event::RefusalEnded { what, with_family, count });
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

    fn calls_of(uid: u32, method: Method) -> WhatIsRefused {
        WhatIsRefused {
            stage: Stage::Caller,
            name: BucketName::Caller(CallerKey::Uid(uid)),
            method: Some(method),
            reason: Reason::Rate,
            origin: Origin::Set,
            quota: None,
        }
    }

    fn refusing_now(what: WhatIsRefused, times: u64) -> Event {
        Event::Refusing { what, with_family: false, times, takings: Vec::new() }
    }

    #[test]
    fn what_is_refused_is_told_when_it_begins_each_minute_and_when_it_ends() {
        let (mut refusing, families) = (Refusing::default(), Families::default());
        let [jwt, x509] = [Method::FetchJwtSvid, Method::FetchX509Svid].map(|method| calls_of(1, method));
        for call in 0..1000 {
            refusing.note(call, jwt.clone(), &families);
        }
        assert_eq!(refusing.drain(SECOND), [refusing_now(jwt.clone(), 1000)]);
        refusing.note(20 * SECOND, jwt.clone(), &families);
        refusing.note(20 * SECOND, x509.clone(), &families);
        assert_eq!(refusing.drain(21 * SECOND), [refusing_now(x509.clone(), 1)], "each method has a line");
        refusing.note(48 * SECOND, jwt.clone(), &families);
        assert_eq!(refusing.drain(49 * SECOND), [], "not quiet yet");
        assert_eq!(
            refusing.drain(50 * SECOND),
            [Event::RefusalEnded { what: x509, with_family: false, count: 1 }]
        );
        assert_eq!(refusing.drain(60 * SECOND), []);
        assert_eq!(refusing.drain(61 * SECOND), [refusing_now(jwt.clone(), 2)], "it goes on");
        assert_eq!(
            refusing.drain(78 * SECOND),
            [Event::RefusalEnded { what: jwt, with_family: false, count: 1002 }]
        );
        assert_eq!(refusing.drain(200 * SECOND), []);
    }

    /// Who can be many callers leaves the list to others.
    #[test]
    fn a_family_has_one_place_in_the_list() {
        let families = Families::parse("somebody:100000:65536\n", |_| None);
        let mut refusing = Refusing::default();
        for uid in 100_007..101_000 {
            refusing.note(1, calls_of(uid, Method::FetchJwtSvid), &families);
        }
        for uid in [7, 8] {
            refusing.note(2, calls_of(uid, Method::FetchJwtSvid), &families);
        }
        let told = |event: &Event| match event {
            Event::Refusing { what, with_family, times, .. } => (what.name.to_string(), *with_family, *times),
            other => panic!("{other:?}"),
        };
        let told: Vec<_> = refusing.drain(SECOND).iter().map(told).collect();
        let alone = |uid: u32| (format!("uid:{uid}"), false, 1);
        assert_eq!(told, [("uid:100007".to_owned(), true, 993), alone(7), alone(8)]);
    }

    #[test]
    fn one_bucket_of_a_mask_is_one_whichever_of_its_identities_it_is_named_by() {
        let mask = |text| Arc::new(IdPattern::parse(text).unwrap());
        let of =
            |id, mask: &Arc<IdPattern>| BucketName::Masked(SpiffeId::parse(id).unwrap(), Arc::clone(mask));
        let (all, each) = (mask("spiffe://td/*/sa"), mask("spiffe://td/{name}/sa"));
        assert_eq!(of("spiffe://td/a/sa", &all), of("spiffe://td/b/sa", &all));
        assert_ne!(of("spiffe://td/a/sa", &each), of("spiffe://td/b/sa", &each));
        assert_ne!(of("spiffe://td/a/sa", &all), of("spiffe://td/a/sa", &each));
    }

    #[test]
    fn many_refused_keys_are_few_lines() {
        let (mut refusing, families) = (Refusing::default(), Families::default());
        let mut lines = 0;
        // A new key is refused each millisecond, for 10 minutes, and some all the time; somebody logs each second.
        for ms in 0..600_000_u32 {
            let now = u64::from(ms) * 1_000_000;
            refusing.note(now, calls_of(ms, Method::FetchJwtSvid), &families);
            refusing.note(now, calls_of(ms % 32, Method::FetchX509Svid), &families);
            if ms % 1000 == 0 {
                lines += refusing.drain(u64::from(ms) * 1_000_000).len();
            }
        }
        let bound = (600 / 30 + 1) * (2 * LISTED + 1);
        assert!(lines <= bound, "{lines} lines, at most {bound}");
    }
}
