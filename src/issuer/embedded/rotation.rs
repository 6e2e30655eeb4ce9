//! When an authority is prepared, put to use, retired and forgotten: rules over records and a given present, with
//! no I/O.
//!
//! The times are SPIRE's (`pkg/server/ca/rotator`): the next authority is prepared at half of the current one's
//! life and put to use at five sixths of it, so that verifiers know it for a third of a life before it signs. X.509
//! CAs and JWT keys rotate by the same rules, independently.
//!
//! The clock is not trusted. A machine may sleep for a month, or start in 1970 or 2036 and be set right later. Hence:
//! what a record says is judged afresh at each look; an authority that is not valid at the moment never signs, but
//! is kept; and a record outlives its place in the bundle, so that a clock that ran ahead for a moment takes nothing
//! out of the bundle for good. Records are bounded by [`MAX_RECORDS`].

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use zeroize::Zeroizing;

use super::IssuerError;
use crate::identity::KeyType;

/// How long before its making a certificate is valid, for verifiers whose clock is behind (SPIRE:
/// `pkg/server/credtemplate`).
pub(super) const BACKDATE: Duration = Duration::from_secs(10);

/// How long an expired authority stays in the bundle (SPIRE: `pkg/server/ca/manager`).
pub(super) const KEEP_EXPIRED: Duration = Duration::from_secs(24 * 60 * 60);

/// The most records of a kind. At any moment three are unexpired, unless the clock jumps; of lifetimes under half an
/// hour, not all that expired within a day are kept.
pub(super) const MAX_RECORDS: usize = 64;

const MAX_PREPARE_LEAD: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const MAX_ACTIVATE_LEAD: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// How long a next authority that was prepared late (the agent was down) is known before it signs: the default
/// refresh hint of SPIFFE bundles.
const MIN_PUBLISHED: Duration = Duration::from_secs(5 * 60);

/// From when to when an authority is good, in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Term {
    /// When it was made.
    pub(super) issued_at: SystemTime,
    /// [`BACKDATE`] before that.
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

impl Term {
    /// The term of what is made `now` for `lifetime`, at most until `cap`. `None` when that cannot be told in
    /// seconds since 1970, or is empty.
    pub(super) fn new(now: SystemTime, lifetime: Duration, cap: Option<SystemTime>) -> Option<Self> {
        let issued_at = from_unix(unix(now)?)?;
        let not_before = issued_at.checked_sub(BACKDATE)?;
        unix(not_before)?;
        let wanted = issued_at.checked_add(Duration::from_secs(lifetime.as_secs()));
        let not_after = match (wanted, cap) {
            (Some(wanted), Some(cap)) => wanted.min(cap),
            (Some(end), None) | (None, Some(end)) => end,
            (None, None) => return None,
        };
        (not_after > now).then_some(Self { issued_at, not_before, not_after })
    }

    pub(super) fn holds(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    fn lead(&self, share: u32, most: Duration) -> SystemTime {
        let life = self.not_after.duration_since(self.issued_at).unwrap_or_default();
        self.not_after.checked_sub((life / share).min(most)).unwrap_or(self.issued_at)
    }

    /// When the next authority is due to be prepared.
    fn prepare_at(&self) -> SystemTime {
        self.lead(2, MAX_PREPARE_LEAD)
    }

    /// When the next authority is due to sign, if it was prepared in time.
    fn activate_at(&self) -> SystemTime {
        self.lead(6, MAX_ACTIVATE_LEAD)
    }

    /// When `next` is due to sign in place of `self`: not before others had time to learn of it, yet before
    /// `self` ends, and before half of its own life is gone (it may be the shorter one, if the setting was changed).
    fn hand_over_at(&self, next: &Self) -> SystemTime {
        let left = self.not_after.duration_since(next.issued_at).unwrap_or_default();
        let published = next.issued_at.checked_add(MIN_PUBLISHED.min(left / 2)).unwrap_or(next.issued_at);
        self.activate_at().max(published).min(next.prepare_at())
    }

    /// When it leaves the bundle.
    fn forget_at(&self) -> Option<SystemTime> {
        self.not_after.checked_add(KEEP_EXPIRED)
    }

    fn is_forgotten(&self, now: SystemTime) -> bool {
        self.forget_at().is_some_and(|at| at <= now)
    }
}

/// What an authority is for at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum AuthoritySlot {
    /// Signs.
    Current,
    /// Is in the bundle and will sign.
    Next,
    /// Is in the bundle until it is long expired.
    Old,
}

/// An authority: its term, its key, and what others see of it.
pub(super) struct Record<T> {
    pub(super) slot: AuthoritySlot,
    pub(super) term: Term,
    pub(super) key_type: KeyType,
    /// PKCS#8. Gone once it has been handed over from, or is long expired.
    pub(super) key: Option<Arc<Zeroizing<Vec<u8>>>>,
    pub(super) public: Arc<T>,
}

impl<T> Clone for Record<T> {
    fn clone(&self) -> Self {
        Self {
            slot: self.slot,
            term: self.term,
            key_type: self.key_type,
            key: self.key.clone(),
            public: Arc::clone(&self.public),
        }
    }
}

impl<T> Record<T> {
    /// Whether it can sign.
    pub(super) fn is_usable(&self, now: SystemTime) -> bool {
        self.key.is_some() && self.term.holds(now)
    }

    /// Whether it belongs into the bundle: until a day after its end, and as long as it signs or will sign.
    pub(super) fn is_published(&self, now: SystemTime) -> bool {
        self.slot != AuthoritySlot::Old || !self.term.is_forgotten(now)
    }
}

/// What [`advance`] did.
pub(super) struct Advanced {
    pub(super) changed: bool,
    /// What it could not do; the rest is done.
    pub(super) fault: Option<IssuerError>,
}

/// Does to `records` all that is due. `make` makes an authority, which must outlive the given time, if any.
pub(super) fn advance<T>(
    records: &mut Vec<Record<T>>,
    now: SystemTime,
    mut make: impl FnMut(Option<SystemTime>) -> Result<Record<T>, IssuerError>,
) -> Advanced {
    let mut changed = retire(records, now);

    // The current one cannot sign: there is none yet, the agent was down for long, or the clock was set.
    if !find(records, AuthoritySlot::Current).is_some_and(|(_, current)| current.is_usable(now)) {
        let stand_in = match stand_in(records, now) {
            Some(at) => at,
            None => match room(records, now).and_then(|()| make(None)) {
                Ok(record) => {
                    records.push(record);
                    records.len() - 1
                }
                Err(fault) => return Advanced { changed, fault: Some(fault) },
            },
        };
        // Its key stays: if the clock is set once more, it may be the valid one again.
        if let Some((at, _)) = find(records, AuthoritySlot::Current) {
            set(records, at, AuthoritySlot::Old);
        }
        set(records, stand_in, AuthoritySlot::Current);
        changed = true;
    }

    if let (Some((old, current)), Some((new, next))) =
        (find(records, AuthoritySlot::Current), find(records, AuthoritySlot::Next))
        && next.is_usable(now)
        && current.term.hand_over_at(&next.term) <= now
    {
        set(records, old, AuthoritySlot::Old);
        if let Some(record) = records.get_mut(old) {
            record.key = None;
        }
        set(records, new, AuthoritySlot::Current);
        changed = true;
    }

    if let (Some((_, current)), None) =
        (find(records, AuthoritySlot::Current), find(records, AuthoritySlot::Next))
        && current.term.prepare_at() <= now
    {
        let outlive = current.term.not_after;
        match room(records, now).and_then(|()| make(Some(outlive))) {
            Ok(record) => records.push(Record { slot: AuthoritySlot::Next, ..record }),
            Err(fault) => return Advanced { changed, fault: Some(fault) },
        }
        changed = true;
    }
    Advanced { changed, fault: None }
}

/// Lets go of what will not sign any more; tells whether there was any.
fn retire<T>(records: &mut [Record<T>], now: SystemTime) -> bool {
    let mut changed = false;
    for record in records {
        if record.slot == AuthoritySlot::Next && record.term.not_after <= now {
            record.slot = AuthoritySlot::Old;
            changed = true;
        }
        if record.slot == AuthoritySlot::Old && record.key.is_some() && record.term.is_forgotten(now) {
            record.key = None;
            changed = true;
        }
    }
    changed
}

/// When [`advance`] or the bundle has something new to say, at the earliest; always after `now`.
pub(super) fn next_due<T>(records: &[Record<T>], now: SystemTime) -> Option<SystemTime> {
    let current = find(records, AuthoritySlot::Current).map(|(_, record)| record.term);
    let next = find(records, AuthoritySlot::Next).map(|(_, record)| record.term);
    let hand_over = match (current, next) {
        (Some(current), Some(next)) => Some(current.hand_over_at(&next)),
        (Some(current), None) => Some(current.prepare_at()),
        (None, _) => None,
    };
    let of_all = records.iter().flat_map(|record| {
        [Some(record.term.not_before), Some(record.term.not_after), record.term.forget_at()]
    });
    of_all.chain([hand_over]).flatten().filter(|due| *due > now).min()
}

/// Which other authority can sign when the current one cannot: the next one, else one that had to stand back when
/// the clock was set and has most of its life before it.
fn stand_in<T>(records: &[Record<T>], now: SystemTime) -> Option<usize> {
    let usable = || records.iter().enumerate().filter(|(_, record)| record.is_usable(now));
    let next = usable().find(|(_, record)| record.slot == AuthoritySlot::Next);
    let old = || {
        usable()
            .filter(|(_, record)| record.slot == AuthoritySlot::Old && now < record.term.activate_at())
            .max_by_key(|(_, record)| record.term.not_after)
    };
    next.or_else(old).map(|(at, _)| at)
}

/// Makes room for one more, by dropping what is expired, the oldest first.
fn room<T>(records: &mut Vec<Record<T>>, now: SystemTime) -> Result<(), IssuerError> {
    while records.len() >= MAX_RECORDS {
        let oldest = records
            .iter()
            .enumerate()
            .filter(|(_, record)| record.slot == AuthoritySlot::Old && record.term.not_after <= now)
            .min_by_key(|(_, record)| record.term.not_after);
        match oldest {
            Some((at, _)) => drop(records.remove(at)),
            None => return Err(IssuerError::TooManyAuthorities(MAX_RECORDS)),
        }
    }
    Ok(())
}

pub(super) fn find<T>(records: &[Record<T>], slot: AuthoritySlot) -> Option<(usize, &Record<T>)> {
    records.iter().enumerate().find(|(_, record)| record.slot == slot)
}

fn set<T>(records: &mut [Record<T>], at: usize, slot: AuthoritySlot) {
    if let Some(record) = records.get_mut(at) {
        record.slot = slot;
    }
}

/// Whole seconds since 1970. `None` before that.
pub(super) fn unix(time: SystemTime) -> Option<u64> {
    time.duration_since(SystemTime::UNIX_EPOCH).ok().map(|since| since.as_secs())
}

/// The inverse of [`unix`].
pub(super) fn from_unix(seconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}
