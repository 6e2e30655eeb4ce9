//! Whom the limits charge.

use std::fmt;

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

    /// Who could bring more callers like this one into being, and shares an overflow bucket with them for it.
    ///
    /// A user of a user namespace owns a range of 65,536 UIDs (subuid(5)) and can run a process under each; the users
    /// below 65,536 and the pods are made by the node's and the cluster's admins.
    pub(super) fn parent(self) -> u64 {
        match self {
            Self::Uid(uid) if uid < 1 << 16 => u64::from(uid),
            Self::Uid(uid) => 1 << 32 | u64::from(uid >> 16),
            // Half of it is enough: pod UIDs are random, and two that meet share an overflow bucket, no more.
            Self::Pod([a, b, c, d, e, f, g, h, ..]) => 1 << 63 | u64::from_be_bytes([a, b, c, d, e, f, g, h]),
        }
    }
}

/// A process at the socket, as far as the limits care.
pub trait Caller {
    /// Whom to charge.
    fn caller_key(&self) -> CallerKey;

    /// Whether it is the agent itself, asking for its own health: such calls are exempt from everything.
    fn is_agent(&self) -> bool {
        false
    }
}

impl<C: Caller> Caller for std::sync::Arc<C> {
    fn caller_key(&self) -> CallerKey {
        (**self).caller_key()
    }

    fn is_agent(&self) -> bool {
        (**self).is_agent()
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
    fn a_range_of_subordinate_uids_has_one_parent() {
        let parent = |uid| CallerKey::Uid(uid).parent();
        assert_eq!(parent(0x2_0000), parent(0x2_ffff));
        assert_ne!(parent(0x2_0000), parent(0x3_0000));
        assert_ne!(parent(1000), parent(1001));
        assert_ne!(parent(2), parent(0x2_0000), "a user is not the range with its number");
    }
}
