//! Patterns of callers: users, ranges of users, pods.

use std::{cmp::Ordering, fmt, ops::RangeInclusive};

use super::{
    caller::CallerKey,
    pattern::{NoAnswer, Pattern, PatternError},
};

/// Callers. From the one that says most to the one that says least: `uid:1000` (also written `user:build`) and
/// `pod:UID`; `uid:1000-1999`, the shorter range before the longer; `uid:*` and `pod:*`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CallerPattern {
    /// One UID, or one pod.
    One(CallerKey),
    /// A range of UIDs, of two or more and not of all.
    Uids(RangeInclusive<u32>),
    /// Every UID: all callers that are no pod.
    AnyUid,
    /// Every pod.
    AnyPod,
}

impl CallerPattern {
    /// Parses one of the forms. `user` resolves the name of a user of this node to its UID.
    ///
    /// # Errors
    /// [`PatternError`] when the text has another form or means nobody.
    pub fn parse(
        text: &str,
        user: impl FnOnce(&str) -> Result<Option<u32>, NoAnswer>,
    ) -> Result<Self, PatternError> {
        let none = || PatternError::Caller(text.into());
        let (kind, value) = text.split_once(':').ok_or_else(none)?;
        // Digits alone: `parse` would take a plus sign.
        let number = |digits: &str| {
            let plain = digits.bytes().all(|b| b.is_ascii_digit());
            digits.parse::<u32>().ok().filter(|_| plain).ok_or_else(none)
        };
        match (kind, value) {
            ("uid", "*") => Ok(Self::AnyUid),
            ("pod", "*") => Ok(Self::AnyPod),
            ("uid", value) => match value.split_once('-') {
                None => match number(value)? {
                    u32::MAX => Err(PatternError::Nobody(text.into())),
                    uid => Ok(Self::One(CallerKey::Uid(uid))),
                },
                Some((from, to)) => match (number(from)?, number(to)?) {
                    (to, from) if to > from => Err(PatternError::Falling { text: text.into(), from, to }),
                    (0, u32::MAX) => Err(PatternError::Range(text.into())),
                    (from, to) if from == to => Ok(Self::One(CallerKey::Uid(from))),
                    (from, to) => Ok(Self::Uids(from..=to)),
                },
            },
            ("user", name) => match user(name) {
                Ok(Some(uid)) => Ok(Self::One(CallerKey::Uid(uid))),
                Ok(None) => Err(PatternError::User(name.into())),
                Err(NoAnswer) => Err(PatternError::UserUnknown(name.into())),
            },
            ("pod", uid) => CallerKey::parse_pod(uid).map(Self::One).ok_or_else(none),
            _ => Err(none()),
        }
    }

    /// How many it matches; the fewer, the more it says.
    fn width(&self) -> u64 {
        match self {
            Self::One(_) => 1,
            Self::Uids(range) => 1 + u64::from(range.end() - range.start()),
            Self::AnyUid | Self::AnyPod => u64::MAX,
        }
    }

    fn uids(&self) -> Option<(u32, u32)> {
        match self {
            Self::One(CallerKey::Uid(uid)) => Some((*uid, *uid)),
            Self::Uids(range) => Some((*range.start(), *range.end())),
            Self::AnyUid => Some((0, u32::MAX)),
            Self::One(CallerKey::Pod(_)) | Self::AnyPod => None,
        }
    }
}

impl Pattern for CallerPattern {
    type Subject = CallerKey;

    fn matches(&self, key: &CallerKey) -> bool {
        match (self, key) {
            (Self::One(one), key) => one == key,
            (Self::Uids(range), CallerKey::Uid(uid)) => range.contains(uid),
            (Self::AnyUid, CallerKey::Uid(_)) | (Self::AnyPod, CallerKey::Pod(_)) => true,
            (Self::Uids(_) | Self::AnyUid, CallerKey::Pod(_)) | (Self::AnyPod, CallerKey::Uid(_)) => false,
        }
    }

    fn meets(&self, other: &Self) -> bool {
        match (self.uids(), other.uids()) {
            (Some((from, to)), Some((other_from, other_to))) => from <= other_to && other_from <= to,
            (None, None) => self == other || *self == Self::AnyPod || *other == Self::AnyPod,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    fn compare(&self, other: &Self) -> Ordering {
        self.width().cmp(&other.width())
    }
}

impl fmt::Display for CallerPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(key) => write!(f, "{key}"),
            Self::Uids(range) => write!(f, "uid:{}-{}", range.start(), range.end()),
            Self::AnyUid => f.write_str("uid:*"),
            Self::AnyPod => f.write_str("pod:*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: &str = "0f9c2a4e-8d31-4b7a-9c55-01e2d3f4a5b6";

    #[test]
    fn callers_are_written_in_six_ways() {
        let parse = |text: &str| {
            CallerPattern::parse(text, |name| {
                if name == "away" { Err(NoAnswer) } else { Ok((name == "build").then_some(1001)) }
            })
        };
        let pod = format!("pod:{POD}");
        for (case, text, want) in [
            ("uid", "uid:1000", Ok("uid:1000")),
            ("range", "uid:1000-1999", Ok("uid:1000-1999")),
            ("range of one", "uid:7-7", Ok("uid:7")),
            ("any uid", "uid:*", Ok("uid:*")),
            ("user", "user:build", Ok("uid:1001")),
            ("pod", &*pod, Ok(&*pod)),
            ("any pod", "pod:*", Ok("pod:*")),
            ("root", "uid:0", Ok("uid:0")),
            ("highest", "uid:4294967294", Ok("uid:4294967294")),
            ("user not answered", "user:away", Err(PatternError::UserUnknown("away".into()))),
            ("no user", "uid:4294967295", Err(PatternError::Nobody("uid:4294967295".into()))),
            ("too high", "uid:4294967296", Err(PatternError::Caller("uid:4294967296".into()))),
            ("negative", "uid:-1", Err(PatternError::Caller("uid:-1".into()))),
            ("plus", "uid:+1", Err(PatternError::Caller("uid:+1".into()))),
            ("empty", "uid:", Err(PatternError::Caller("uid:".into()))),
            (
                "falling range",
                "uid:5-4",
                Err(PatternError::Falling { text: "uid:5-4".into(), from: 4, to: 5 }),
            ),
            ("all", "uid:0-4294967295", Err(PatternError::Range("uid:0-4294967295".into()))),
            ("nobody", "user:nobody-here", Err(PatternError::User("nobody-here".into()))),
            ("other", "gid:5", Err(PatternError::Caller("gid:5".into()))),
            ("bare", "1000", Err(PatternError::Caller("1000".into()))),
            ("half a pod", "pod:0f9c", Err(PatternError::Caller("pod:0f9c".into()))),
        ] {
            assert_eq!(parse(text).map(|it| it.to_string()), want.map(str::to_owned), "{case}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,40}") {
            let _ = CallerPattern::parse(&text, |_| Ok(None)).is_ok();
        }
    }
}
