//! How many keys a table of buckets may know.

use std::ops::RangeInclusive;

use super::budget::KEY;

/// The tables: of the gate, of callers and of identities.
const TABLES: u64 = 3;
/// Of a memory budget their keys have one part in so many, at most.
const MEMORY_SHARE: u64 = 2;

/// How many keys a table may know: from 16 to 16,777,216. A key takes [`KEY`] bytes once known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSize(u32);

impl TableSize {
    /// The bounds.
    pub const RANGE: RangeInclusive<u32> = 16..=1 << 24;

    /// So many keys.
    ///
    /// # Errors
    /// [`TableSizeError`] outside of [`TableSize::RANGE`].
    pub fn new(keys: u32) -> Result<Self, TableSizeError> {
        if Self::RANGE.contains(&keys) { Ok(Self(keys)) } else { Err(TableSizeError(keys)) }
    }

    /// How many fit a memory budget of so many bytes: known, they take no more than half of it.
    pub fn most_within(budget: u64) -> u32 {
        let fit = budget / MEMORY_SHARE / (TABLES * KEY);
        u32::try_from(fit).unwrap_or(u32::MAX).clamp(*Self::RANGE.start(), *Self::RANGE.end())
    }

    /// What so many keys take in all tables once they are known.
    pub(super) fn bytes(keys: u32) -> u64 {
        u64::from(keys) * TABLES * KEY
    }

    /// The same, or as many as fit the budget.
    pub(super) fn within(self, budget: u64) -> Self {
        Self(self.0.min(Self::most_within(budget)))
    }

    /// As it is set.
    pub(super) fn number(self) -> u32 {
        self.0
    }

    /// The number of keys.
    pub(super) fn keys(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

impl Default for TableSize {
    fn default() -> Self {
        Self(16_384)
    }
}

/// A table that would be too small, or too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("keys {0} must be from {least} to {most}", least = TableSize::RANGE.start(), most = TableSize::RANGE.end())]
pub struct TableSizeError(u32);
