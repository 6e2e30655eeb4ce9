//! Mounts that were found in no list, for a moment.
//!
//! To look for a mount that is in none (that of a `memfd`) takes all lists from end to end, which may be long, and its caller may
//! ask again at once. So what a family's process was told in vain holds for that family for [`GOOD_FOR`]. A mount that is made
//! under the same number meanwhile is believed that much later.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

const GOOD_FOR: Duration = Duration::from_secs(1);
/// The most that are remembered, of all families.
const MOST: usize = 256;

/// Which mount namespace it is: the numbers of its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NamespaceId(pub(super) u64, pub(super) u64);

/// A mount as a family's processes in a namespace have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SoughtMount {
    pub(super) family: u64,
    pub(super) namespace: NamespaceId,
    /// Its number.
    pub(super) mount: u64,
}

#[derive(Debug, Default)]
pub(super) struct UnlistedMounts(Mutex<Vec<(SoughtMount, Instant)>>);

impl UnlistedMounts {
    /// Whether it was in no list a moment ago.
    pub(super) fn has(&self, sought: &SoughtMount, now: Instant) -> bool {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().any(|(it, at)| it == sought && now.saturating_duration_since(*at) < GOOD_FOR)
    }

    /// It is in no list.
    pub(super) fn note(&self, sought: SoughtMount, now: Instant) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(it, at)| *it != sought && now.saturating_duration_since(*at) < GOOD_FOR);
        if known.len() >= MOST {
            known.remove(0);
        }
        known.push((sought, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_no_list_is_remembered_for_a_moment_and_for_its_family() {
        let (it, now) = (UnlistedMounts::default(), Instant::now());
        let sought = SoughtMount { family: 1, namespace: NamespaceId(4, 5), mount: 7 };
        assert!(!it.has(&sought, now));
        it.note(sought, now);
        assert!(it.has(&sought, now));
        assert!(!it.has(&sought, now + GOOD_FOR), "a moment");
        for other in [
            SoughtMount { family: 2, ..sought },
            SoughtMount { namespace: NamespaceId(4, 6), ..sought },
            SoughtMount { mount: 8, ..sought },
        ] {
            assert!(!it.has(&other, now), "{other:?}");
        }
        for mount in 0..2 * u64::try_from(MOST).unwrap() {
            it.note(SoughtMount { mount, ..sought }, now);
        }
        assert_eq!(it.0.lock().unwrap().len(), MOST);
    }
}
