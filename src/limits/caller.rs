//! Whom the limits charge.

use std::{collections::BTreeMap, fmt, ops::RangeInclusive};

use super::refusal::ChargedAs;

/// Whom a call is charged to: the pod on Kubernetes, else the user. Resolved once per connection, at accept.
/// Never the PID: every retry of a forking caller has a new one.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallerKey {
    /// The UID of a pod, as the kubelet's cgroup path names it.
    Pod([u8; 16]),
    /// The effective UID of the process when it connected.
    Uid(u32),
}

impl fmt::Display for CallerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(b) => {
                f.write_str("pod:")?;
                for (at, byte) in b.iter().enumerate() {
                    if matches!(at, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
            Self::Uid(uid) => write!(f, "uid:{uid}"),
        }
    }
}

impl fmt::Debug for CallerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl CallerKey {
    /// What kind of key it is, in counts.
    pub(super) fn charged_as(self) -> ChargedAs {
        match self {
            Self::Uid(_) => ChargedAs::Uid,
            Self::Pod(_) => ChargedAs::Pod,
        }
    }

    /// Parses the UID of a pod as Kubernetes writes it, with dashes; also with underscores, or with neither.
    pub fn parse_pod(text: &str) -> Option<Self> {
        let mut uid = [0; 16];
        let mut digits = text.bytes().filter(|b| !matches!(b, b'-' | b'_'));
        let mut digit = || char::from(digits.next()?).to_digit(16).and_then(|d| u8::try_from(d).ok());
        for byte in &mut uid {
            *byte = digit()? << 4 | digit()?;
        }
        (digit().is_none() && matches!(text.len(), 32 | 36)).then_some(Self::Pod(uid))
    }
}

/// Users with the UIDs that were given to them (subuid(5)): each can run a process under every one of its own,
/// and is one family. Read from `/etc/subuid`; what a directory server hands out is not seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Families(Vec<UidsOfFamily>);

/// UIDs of a family, which goes by the first of all its UIDs that stand in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct UidsOfFamily {
    uids: RangeInclusive<u32>,
    family: u32,
}

/// Lines of a file that count: a caller may be looked for in all of them.
const FAMILIES: usize = 1024;

impl Families {
    /// Parses a file of lines `user:first:count`; `uid` knows a user's UID, which is of its family too, unless
    /// it is root's. Other lines are passed over, as shadow's own tools do.
    pub fn parse(text: &str, uid: impl Fn(&str) -> Option<u32>) -> Self {
        let range = |line: &str| -> Option<(String, RangeInclusive<u32>)> {
            let mut fields = line.trim().split(':');
            let owner = fields.next().filter(|owner| !owner.is_empty() && !owner.starts_with('#'))?;
            let (first, count) = (fields.next()?.parse::<u32>().ok()?, fields.next()?.parse::<u32>().ok()?);
            let last = first.checked_add(count.checked_sub(1)?)?;
            fields.next().is_none().then(|| (owner.to_owned(), first..=last))
        };
        let mut owners: BTreeMap<String, Vec<RangeInclusive<u32>>> = BTreeMap::new();
        for (owner, uids) in text.lines().filter_map(range).take(FAMILIES) {
            owners.entry(owner).or_default().push(uids);
        }
        let mut members = Vec::new();
        for (owner, ranges) in owners {
            let Some(family) = ranges.iter().map(|uids| *uids.start()).min() else { continue };
            let own = owner.parse().ok().or_else(|| uid(&owner)).filter(|uid| *uid != 0);
            let all = own.map(|uid| uid..=uid).into_iter().chain(ranges);
            members.extend(all.map(|uids| UidsOfFamily { uids, family }));
        }
        // Of ranges that overlap the smaller says more.
        members.sort_by_key(|member| member.uids.end() - member.uids.start());
        Self(members)
    }

    /// The family of a caller.
    pub(super) fn of(&self, caller: CallerKey) -> Option<u32> {
        let CallerKey::Uid(uid) = caller else { return None };
        self.0.iter().find(|member| member.uids.contains(&uid)).map(|member| member.family)
    }

    /// What a caller and its family have in common, and nobody else.
    pub(crate) fn group(&self, caller: CallerKey) -> u64 {
        match (self.of(caller), caller) {
            (None, CallerKey::Uid(uid)) => u64::from(uid),
            (Some(_), _) | (None, CallerKey::Pod(_)) => self.parent(caller),
        }
    }

    /// The caller that stands for a caller and its family, where what they share is told of: the first of the family's UIDs, or
    /// itself.
    pub(crate) fn head(&self, caller: CallerKey) -> CallerKey {
        self.of(caller).map_or(caller, CallerKey::Uid)
    }

    /// Who could bring more callers like this one into being, and shares an overflow bucket with them for it:
    /// its family. Where none is known, users above 65,535 are taken for one by 65,536; those below, and the
    /// pods, are made by the node's and the cluster's admins.
    pub(super) fn parent(&self, caller: CallerKey) -> u64 {
        match (self.of(caller), caller) {
            (Some(first), _) => 1 << 33 | u64::from(first),
            (None, CallerKey::Uid(uid)) if uid < 1 << 16 => u64::from(uid),
            (None, CallerKey::Uid(uid)) => 1 << 32 | u64::from(uid >> 16),
            // Half of it is enough: pod UIDs are random, and two that meet share an overflow bucket, no more.
            (None, CallerKey::Pod([a, b, c, d, e, f, g, h, ..])) => {
                1 << 63 | u64::from_be_bytes([a, b, c, d, e, f, g, h])
            }
        }
    }
}

/// Who has connections, as people are told where a family counts as one: a caller, and how many others of its family have some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WhoHolds {
    pub caller: CallerKey,
    pub others: u32,
}

impl fmt::Display for WhoHolds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.caller)?;
        match self.others {
            0 => Ok(()),
            1 => f.write_str(" and 1 other of its range"),
            others => write!(f, " and {others} others of its range"),
        }
    }
}

/// A process at the socket, as far as the limits care.
pub trait Caller {
    /// Whom to charge.
    fn caller_key(&self) -> CallerKey;

    /// Whether memory is short, and its caller holds more than its share of it. By default nobody sums that up.
    fn is_above_share(&self) -> bool {
        false
    }

    /// A call of it begins: how that stands to its connection. By default nobody counts them.
    fn begins_call(&self) -> NthCall {
        NthCall::Further
    }
}

/// How a call stands to its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NthCall {
    /// The first that is made on it: what that takes is held already, and is for nothing if it is refused.
    First,
    /// The same, and by default no limit refuses it: the connection came while there was processor time for it, or paid for it
    /// at the gate.
    FirstLetIn,
    /// Another one.
    Further,
}

impl<C: Caller> Caller for std::sync::Arc<C> {
    fn caller_key(&self) -> CallerKey {
        (**self).caller_key()
    }

    fn is_above_share(&self) -> bool {
        (**self).is_above_share()
    }

    fn begins_call(&self) -> NthCall {
        (**self).begins_call()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_written_in_three_ways() {
        let uid = "0f9c2a4e-8d31-4b7a-9c55-01e2d3f4a5b6";
        let bare: String = uid.chars().filter(|c| *c != '-').collect();
        for (case, text, parses) in [
            ("dashes", uid, true),
            ("underscores", &*uid.replace('-', "_"), true),
            ("bare", &*bare, true),
            ("short", uid.trim_start_matches('0'), false),
            ("long", &*format!("{uid}0"), false),
            ("not hex", &*uid.replace('f', "g"), false),
            ("empty", "", false),
            ("only dashes", &*"-".repeat(36), false),
            ("not ascii", "\u{e9}9c2a4e-8d31-4b7a-9c55-01e2d3f4a5b6", false),
        ] {
            let got = CallerKey::parse_pod(text);
            assert_eq!(got.map(|key| key.to_string()), parses.then(|| format!("pod:{uid}")), "{case}");
        }
    }

    #[test]
    fn a_user_and_its_subordinate_uids_are_a_family() {
        let text = "a:100000:65536\n# b:1:2\nb:165536:65536\nd:x:9\ne:4294967295:9\nf:300000:10:x\n\ng:7:0\n\
                    a:900000:10\nroot:1000000:1000000000\nh:1165536:65536\n1007:800000:5\n";
        let families = Families::parse(text, |name| match name {
            "a" => Some(1001),
            "root" => Some(0),
            _ => None,
        });
        for (uid, of) in [
            (99_999, None),
            (100_000, Some(100_000)),
            (165_535, Some(100_000)),
            (1001, Some(100_000)),
            (900_009, Some(100_000)),
            (165_536, Some(165_536)),
            (231_071, Some(165_536)),
            (231_072, None),
            (300_001, None),
            (7, None),
            (0, None),
            (1_000_000, Some(1_000_000)),
            (1_165_536, Some(1_165_536)),
            (1_231_072, Some(1_000_000)),
            (1007, Some(800_000)),
            (u32::MAX, None),
        ] {
            assert_eq!(families.of(CallerKey::Uid(uid)), of, "{uid}");
        }
        assert_eq!(families.of(CallerKey::Pod([1; 16])), None);
        let parent = |uid| families.parent(CallerKey::Uid(uid));
        assert_eq!(parent(100_000), parent(165_535));
        assert_ne!(parent(165_535), parent(165_536), "the next user's, though in the same 65,536");
        let head = |uid| families.head(CallerKey::Uid(uid));
        assert_eq!((head(1001), head(100_007)), (CallerKey::Uid(100_000), CallerKey::Uid(100_000)));
        assert_eq!(head(7), CallerKey::Uid(7));
        let group = |uid| families.group(CallerKey::Uid(uid));
        assert_eq!(group(100_000), families.group(head(1001)));
        assert_eq!(group(100_000), group(1001));
        assert_ne!(group(2_000_000_000), group(2_000_000_001), "no family: everybody is one");
    }

    #[test]
    fn users_far_up_have_a_parent_by_65536() {
        let parent = |uid| Families::default().parent(CallerKey::Uid(uid));
        assert_eq!(parent(0x2_0000), parent(0x2_ffff));
        assert_ne!(parent(0x2_0000), parent(0x3_0000));
        assert_ne!(parent(1000), parent(1001));
        assert_ne!(parent(2), parent(0x2_0000), "a user is not the range with its number");
    }
}
