//! The tries of one call or connection, of which it is counted once.

use super::refusal::Refusal;

/// Which try of a call or a connection is decided. One that is refused for want of room may try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The first, and there is no other.
    Only,
    /// The first. Nothing of a refusal is counted yet.
    First,
    /// One after it. The same.
    Again,
    /// The last of several.
    Last,
}

impl Attempt {
    /// Whether it was not decided before.
    pub(super) fn is_first(self) -> bool {
        matches!(self, Self::Only | Self::First)
    }

    /// Whether it is not decided once more.
    pub fn is_last(self) -> bool {
        matches!(self, Self::Only | Self::Last)
    }

    /// Whether nothing comes after this refusal of a call.
    pub(super) fn ends(self, refusal: &Refusal) -> bool {
        self.is_last() || !refusal.may_wait()
    }

    /// Whether what lacked tokens counts as refused for people: nothing comes after it, or it passed as a dry run alone.
    pub(super) fn counts(self, done: &Result<(), Refusal>) -> bool {
        done.as_ref().err().is_none_or(|refusal| self.ends(refusal))
    }
}
