//! Answers that are kept: each is believed for a while, and a table holds so many at most.
//!
//! All that attestation remembers is kept so. What is about one connection is a [`Kept`] in the slot of its peer; what
//! is about something that many connections share (a user's name) is in a [`KeptAnswers`].

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

use tokio::time::Instant;

/// An answer, and until when it is believed.
#[derive(Debug)]
pub(super) struct Kept<V> {
    answer: V,
    until: Instant,
}

impl<V> Kept<V> {
    /// An answer that is believed until then.
    pub(super) fn until(until: Instant, answer: V) -> Self {
        Self { answer, until }
    }

    /// The answer, if it is still believed.
    pub(super) fn believed(&self, now: Instant) -> Option<&V> {
        (now < self.until).then_some(&self.answer)
    }

    /// The answer, however old it is.
    pub(super) fn last(&self) -> &V {
        &self.answer
    }
}

/// A table of answers. When it is full, the one that was not asked for longest makes room.
#[derive(Debug)]
pub(super) struct KeptAnswers<K, V> {
    capacity: usize,
    /// Each with the number of its last use.
    answers: HashMap<K, (Kept<V>, u64)>,
    /// The keys in the order of their last use.
    by_use: BTreeMap<u64, K>,
    uses: u64,
}

impl<K: Copy + Eq + Hash, V> KeptAnswers<K, V> {
    /// A table of at most `capacity` answers.
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, answers: HashMap::new(), by_use: BTreeMap::new(), uses: 0 }
    }

    /// What is kept under `key`, believed or not.
    pub(super) fn find(&mut self, key: K) -> Option<&Kept<V>> {
        let (kept, used) = self.answers.get_mut(&key)?;
        self.by_use.remove(used);
        self.uses += 1;
        *used = self.uses;
        self.by_use.insert(self.uses, key);
        Some(kept)
    }

    /// Keeps an answer in place of the one before.
    pub(super) fn keep(&mut self, key: K, kept: Kept<V>) {
        self.uses += 1;
        if let Some((_, used)) = self.answers.insert(key, (kept, self.uses)) {
            self.by_use.remove(&used);
        }
        self.by_use.insert(self.uses, key);
        if self.answers.len() > self.capacity
            && let Some((_, unused)) = self.by_use.pop_first()
        {
            self.answers.remove(&unused);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.answers.len(), self.by_use.len());
        self.answers.len()
    }
}
