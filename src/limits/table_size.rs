//! How many keys a table of buckets may know.

use std::ops::RangeInclusive;

/// How many keys a table may know: from 16 to 16,777,216. A key takes [`budget::KEY`](super::budget::KEY) bytes
/// once known.
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
