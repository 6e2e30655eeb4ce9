//! Who was refused for want of room, as it is told.

use super::{caller::CallerKey, refusal::ConnectionRefusal};

/// A caller that was refused for want of room, or several of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRoom {
    /// The one that was refused first.
    pub caller: CallerKey,
    /// Who stands for all its family ([`Families`](super::Families)).
    pub head: CallerKey,
    pub refusal: ConnectionRefusal,
    /// Bytes that it held when it was last refused, or connections where these are short: those of its family with it.
    pub held: u64,
    /// What its share was.
    pub share: u64,
}
