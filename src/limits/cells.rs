//! The cells of a table of buckets, and how they are found.

use hashbrown::HashTable;

use super::{attempt::Attempt, bucket::Bucket};

/// No caller has taken from a bucket that is shared, or it is not.
pub(super) const NOBODY: u16 = 0;
/// More than one has: each has a share of it ([`shares`](super::shares)).
pub(super) const SEVERAL: u16 = u16::MAX;

/// All that a decision about a known key reads and writes: one line of the processor's cache.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Cell {
    pub(super) hash: [u64; 2],
    pub(super) parent: u64,
    pub(super) bucket: Bucket,
    pub(super) used: u32,
    pub(super) refused: u32,
    /// Used again since the hand last passed: such a bucket is forgotten a round later than one used once.
    pub(super) again: bool,
    /// Used again when there was room for one more regular: such a bucket is kept for a while, full or not.
    pub(super) regular: bool,
    /// When it was last used, in units of about a second.
    pub(super) seen: u32,
    /// A mark of the one caller that has taken from it; [`NOBODY`], or [`SEVERAL`].
    pub(super) taker: u16,
}

impl Cell {
    /// Its bucket is asked: once, however often the same one tries.
    pub(super) fn is_asked(&mut self, now: u64, attempt: Attempt) {
        let second = seconds(now);
        let before = if self.seen == second { self.bucket.asked } else { 0 };
        self.bucket.asked = before.saturating_add(attempt.is_first().into());
        self.bucket.most = self.bucket.most.max(self.bucket.asked);
        self.seen = second;
        self.again = true;
    }

    /// When it was last used, or up to a second before.
    pub(super) fn last_used(&self) -> u64 {
        u64::from(self.seen) << 30
    }

    /// The caller with this mark takes from it. Once several have, each has a share.
    pub(super) fn taken_by(&mut self, mark: u16) -> Taken {
        match self.taker {
            NOBODY => {
                self.taker = mark;
                Taken::First
            }
            SEVERAL => Taken::Several,
            known if known == mark => Taken::Again,
            _ => {
                self.taker = SEVERAL;
                Taken::Second
            }
        }
    }
}

/// By whom a bucket is taken from, now that one more call comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Nobody took before.
    First,
    /// The one who took before.
    Again,
    /// Another than the one who took before.
    Second,
    /// One of those who have shares.
    Several,
}

/// Nanoseconds in units of 2^30, which is about a second and cheaper to reckon.
pub(super) fn seconds(now: u64) -> u32 {
    u32::try_from(now >> 30).unwrap_or(u32::MAX)
}

/// Where the cell of a key is.
pub(super) fn find(index: &HashTable<u32>, cells: &[Cell], hash: [u64; 2]) -> Option<u32> {
    index.find(hash[0], |at| cell_at(cells, *at).is_some_and(|cell| cell.hash == hash)).copied()
}

/// The cell of a key that was last seen at a place.
pub(super) fn cell<'a>(
    index: &HashTable<u32>,
    cells: &'a mut [Cell],
    hash: [u64; 2],
    at: u32,
) -> Option<&'a mut Cell> {
    let is_there = cell_at(cells, at).is_some_and(|cell| cell.hash == hash);
    let at = if is_there { at } else { find(index, cells, hash)? };
    cells.get_mut(usize::try_from(at).ok()?)
}

/// The hash of the key whose cell is there.
pub(super) fn hash_at(cells: &[Cell], at: u32) -> u64 {
    cell_at(cells, at).map_or(0, |cell| cell.hash[0])
}

fn cell_at(cells: &[Cell], at: u32) -> Option<&Cell> {
    cells.get(usize::try_from(at).ok()?)
}
