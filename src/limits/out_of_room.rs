//! Who was refused for want of room, as it is told.

use std::collections::HashMap;

use super::{caller::CallerKey, refusal::ConnectionRefusal};

/// The most callers, families as one, and reasons that are told between two looks.
const MOST: usize = 256;

/// A caller that was refused for want of room, or several of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRoom {
    /// The one that was refused first.
    pub caller: CallerKey,
    /// Who stands for all its family ([`Families`](super::Families)).
    pub head: CallerKey,
    pub refusal: ConnectionRefusal,
    /// Bytes that it held when it was last refused where these are short, or else connections: those of its family with it.
    pub held: u64,
    /// What its share was; [`u64::MAX`] for none.
    pub share: u64,
}

/// Those since somebody last looked.
#[derive(Debug, Default)]
pub(super) struct AllOutOfRoom(HashMap<(CallerKey, ConnectionRefusal), OutOfRoom, ahash::RandomState>);

impl AllOutOfRoom {
    /// Keeps one, if there is room for it; of one that is known, what it holds now.
    pub(super) fn note(&mut self, one: OutOfRoom) {
        let key = (one.head, one.refusal);
        if let Some(known) = self.0.get_mut(&key) {
            (known.held, known.share) = (one.held, one.share);
        } else if self.0.len() < MOST {
            self.0.insert(key, one);
        }
    }

    /// Takes them all.
    pub(super) fn take(&mut self) -> Vec<OutOfRoom> {
        self.0.drain().map(|(_, one)| one).collect()
    }
}
