//! Who is charged for a key that a table of buckets has no room for: its *parent*, whoever can make keys like it.
//!
//! No stranger pays for it. A parent has one bucket for each quota for all its keys that have none of their own (its overflow),
//! and may own so many cells of the table. It is known while it owns one, or its overflow is not full. Where there is no room for
//! another parent either, there are buckets of last resort, which are the *strays'*: what was spent there, a parent that is made
//! after that has spent, since it may have been its keys that did.

use std::time::Duration;

use hashbrown::HashTable;

use super::{
    ask::ChargedTo,
    bucket::{Bucket, Quota, Shortfall},
    pool::Pool,
};

/// How often, at most, all parents are looked through, in nanoseconds per 16,384 of them.
const PAUSE: u64 = 10_000_000;

#[derive(Debug)]
struct Parent {
    id: u64,
    /// Cells of the table.
    owned: usize,
    overflow: Pool,
}

/// The parents of the keys of a table.
#[derive(Debug, Default)]
pub(super) struct Parents {
    /// So many are known at most, and so many cells one may own.
    most: usize,
    may_own: usize,
    known: HashTable<Parent>,
    stray: Pool,
    seed: ahash::RandomState,
    looked: u64,
}

impl Parents {
    /// What one of them takes, in bytes, beside what its overflow holds.
    #[cfg(test)]
    pub(super) const EACH: usize = size_of::<Parent>() + 1;

    /// Changes the bounds.
    pub(super) fn resize(&mut self, most: usize, may_own: usize) {
        (self.most, self.may_own) = (most, may_own);
    }

    /// How many are known.
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// How many cells one owns.
    #[cfg(test)]
    pub(super) fn owned(&self, id: u64) -> usize {
        self.find(id).map_or(0, |parent| parent.owned)
    }

    /// Whether one may own another cell. Not while its overflow holds tokens of calls under way: one of these calls may be of the
    /// same key, and what it will take is not known yet.
    pub(super) fn may_own_more(&self, id: u64) -> bool {
        let known = self.find(id).map(|parent| (parent.owned, parent.overflow.is_held()));
        let (owned, is_held) = known.unwrap_or_default();
        owned < self.may_own && !is_held && !self.stray.is_held()
    }

    /// One more cell of the table is of this parent. Returns whether there is room for it.
    pub(super) fn own_one_more(&mut self, now: u64, id: u64) -> bool {
        self.make(now, id);
        let Some(parent) = self.find_mut(id) else { return false };
        parent.owned += 1;
        true
    }

    /// One cell of this parent was forgotten.
    pub(super) fn own_one_less(&mut self, now: u64, id: u64) {
        let hash = self.seed.hash_one(id);
        let Ok(mut entry) = self.known.find_entry(hash, |parent| parent.id == id) else { return };
        let parent = entry.get_mut();
        parent.owned = parent.owned.saturating_sub(1);
        if parent.owned == 0 && parent.overflow.is_full(now) {
            entry.remove();
        }
    }

    /// Holds tokens for a key of this parent that has no cell. Returns where, and how many.
    pub(super) fn hold(
        &mut self,
        now: u64,
        id: u64,
        quota: Quota,
        cost: u32,
        short: Shortfall,
    ) -> Result<(ChargedTo, u32), Duration> {
        self.make(now, id);
        match self.find_mut(id) {
            Some(parent) => Ok((ChargedTo::Overflow, parent.overflow.hold(now, quota, cost, short)?)),
            None => self.hold_stray(now, quota, cost, short),
        }
    }

    /// The same, where there is no room for the parent.
    pub(super) fn hold_stray(
        &mut self,
        now: u64,
        quota: Quota,
        cost: u32,
        short: Shortfall,
    ) -> Result<(ChargedTo, u32), Duration> {
        Ok((ChargedTo::Stray, self.stray.hold(now, quota, cost, short)?))
    }

    /// The bucket that holds tokens of a key without a cell.
    pub(super) fn bucket(&mut self, id: u64, place: ChargedTo, quota: Quota) -> Option<&mut Bucket> {
        match place {
            ChargedTo::Own(_) => None,
            ChargedTo::Overflow => self.find_mut(id)?.overflow.get(quota),
            ChargedTo::Stray => self.stray.get(quota),
        }
    }

    /// Has the bucket of a key that gets a cell spend what the key may have spent without.
    pub(super) fn bequeath(&mut self, now: u64, id: u64, quota: Quota, bucket: &mut Bucket) {
        for place in [ChargedTo::Stray, ChargedTo::Overflow] {
            bucket.inherit(now, quota, self.bucket(id, place, quota));
        }
    }

    /// Forgets those that own nothing and owe nothing, and returns memory.
    pub(super) fn shrink(&mut self, now: u64) {
        self.forget_full(now);
        let seed = &self.seed;
        self.known.shrink_to_fit(|parent| seed.hash_one(parent.id));
    }

    fn forget_full(&mut self, now: u64) {
        self.known.retain(|parent| parent.owned > 0 || !parent.overflow.is_full(now));
    }

    fn find(&self, id: u64) -> Option<&Parent> {
        self.known.find(self.seed.hash_one(id), |parent| parent.id == id)
    }

    fn find_mut(&mut self, id: u64) -> Option<&mut Parent> {
        self.known.find_mut(self.seed.hash_one(id), |parent| parent.id == id)
    }

    /// Makes the record of a parent if there is none, unless there are as many as there may be.
    fn make(&mut self, now: u64, id: u64) {
        if self.find(id).is_some() || self.stray.is_held() {
            return;
        }
        if self.len() >= self.most {
            let scale = u64::try_from(self.most / 16_384).unwrap_or(1).max(1);
            if now < self.looked + PAUSE * scale {
                return;
            }
            self.looked = now;
            self.forget_full(now);
            if self.len() >= self.most {
                return;
            }
        }
        // What its keys were charged to while it had no record is spent. It may have been any of the stray buckets.
        let overflow = self.stray.spent(now);
        let seed = &self.seed;
        let parent = Parent { id, owned: 0, overflow };
        self.known.insert_unique(seed.hash_one(id), parent, |parent| seed.hash_one(parent.id));
    }
}
