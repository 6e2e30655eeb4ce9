//! Whom the limits charge.

use std::{fmt, ops::RangeInclusive};

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

/// Ranges of UIDs of which each belongs to one user, who can run a process under every one of them (subuid(5)): such callers
/// are one family. Read from `/etc/subuid`; what a directory server hands out is not seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Families(Vec<RangeInclusive<u32>>);

/// Lines of a file that count.
const FAMILIES: usize = 4096;

impl Families {
    /// Parses a file of lines `user:first:count`. Other lines are passed over, as shadow's own tools do.
    pub fn parse(text: &str) -> Self {
        let range = |line: &str| {
            let mut fields = line.trim().split(':').skip(1);
            let (first, count) = (fields.next()?.parse::<u32>().ok()?, fields.next()?.parse::<u32>().ok()?);
            // A user of one UID more is no family.
            let last = first.checked_add(count.checked_sub(1).filter(|more| *more > 0)?)?;
            fields.next().is_none().then_some(first..=last)
        };
        let mut ranges: Vec<_> = text.lines().filter_map(range).take(FAMILIES).collect();
        ranges.sort_by_key(|range| *range.start());
        Self(ranges)
    }

    /// The family of a caller, by the first UID of its range. Of ranges that overlap, the one that begins last.
    pub(super) fn of(&self, caller: CallerKey) -> Option<u32> {
        let CallerKey::Uid(uid) = caller else { return None };
        let before = self.0.partition_point(|range| *range.start() <= uid);
        let range = self.0.get(before.checked_sub(1)?)?;
        range.contains(&uid).then_some(*range.start())
    }

    /// Who could bring more callers like this one into being, and shares an overflow bucket with them for it: its family. Where
    /// none is known, users above 65,535 are taken for one by 65,536; those below, and the pods, are made by the node's and
    /// the cluster's admins.
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

/// A process at the socket, as far as the limits care.
pub trait Caller {
    /// Whom to charge.
    fn caller_key(&self) -> CallerKey;
}

impl<C: Caller> Caller for std::sync::Arc<C> {
    fn caller_key(&self) -> CallerKey {
        (**self).caller_key()
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
    fn a_range_of_subordinate_uids_is_a_family() {
        let text = "a:100000:65536\n# b:1:2\nb:165536:65536\nc:5000:1\nd:x:9\ne:4294967295:9\nf:300000:10:x\n\ng:7:0\n";
        let families = Families::parse(text);
        for (uid, of) in [
            (99_999, None),
            (100_000, Some(100_000)),
            (165_535, Some(100_000)),
            (165_536, Some(165_536)),
            (231_071, Some(165_536)),
            (231_072, None),
            (5_000, None),
            (300_001, None),
            (7, None),
            (u32::MAX, None),
        ] {
            assert_eq!(families.of(CallerKey::Uid(uid)), of, "{uid}");
        }
        assert_eq!(families.of(CallerKey::Pod([1; 16])), None);
        let parent = |uid| families.parent(CallerKey::Uid(uid));
        assert_eq!(parent(100_000), parent(165_535));
        assert_ne!(parent(165_535), parent(165_536), "the next user's, though in the same 65,536");
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
