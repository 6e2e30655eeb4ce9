//! Numbers by key, for as long as they are not zero.

use std::hash::Hash;

use hashbrown::{HashMap, hash_map::Entry};

/// A number for each key that has one.
#[derive(Debug)]
pub(super) struct Tally<K>(HashMap<K, u32, ahash::RandomState>);

impl<K> Default for Tally<K> {
    fn default() -> Self {
        Self(HashMap::default())
    }
}

impl<K: Copy + Eq + Hash> Tally<K> {
    pub(super) fn of(&self, key: &K) -> u32 {
        self.0.get(key).copied().unwrap_or(0)
    }

    pub(super) fn add(&mut self, key: K) {
        *self.0.entry(key).or_insert(0) += 1;
    }

    /// Adds one if it `may`: that is told what the key has, and how many others have something. Returns what it has then.
    pub(super) fn add_if(&mut self, key: K, may: impl FnOnce(u32, usize) -> bool) -> Option<u32> {
        let keys = self.0.len();
        match self.0.entry(key) {
            Entry::Occupied(mut entry) => {
                let has = entry.get_mut();
                may(*has, keys - 1).then(|| {
                    *has += 1;
                    *has
                })
            }
            Entry::Vacant(entry) => may(0, keys).then(|| *entry.insert(1)),
        }
    }

    /// Takes one away; a key with none left is forgotten.
    pub(super) fn take(&mut self, key: K) {
        if let Entry::Occupied(mut entry) = self.0.entry(key) {
            *entry.get_mut() -= 1;
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }

    /// How many keys have a number.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Makes room for so many further keys.
    pub(super) fn reserve(&mut self, keys: usize) {
        self.0.reserve(keys);
    }
}
