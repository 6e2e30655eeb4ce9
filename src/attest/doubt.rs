//! Which entries are in doubt when something about a process could not be told.
//!
//! A selector that could not be told is neither there nor missing. Whoever would get an entry if it were there may be
//! its owner, so the call fails; everybody else goes on. The search costs what the selectors at hand cost, however
//! many entries there are, and nothing where everything could be told.

use std::{collections::HashMap, fmt, sync::Arc};

use ahash::RandomState;

use crate::identity::{Entry, selector::Selector, selector::Selectors};

/// More kinds than this are not told apart by one mask.
const MAX_KINDS: usize = 64;

/// A kind of selectors that may stay untold, such as `unix:path`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SelectorKind {
    pub(super) attestor: &'static str,
    /// The first word of the value.
    pub(super) word: &'static str,
}

impl fmt::Display for SelectorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.attestor, self.word)
    }
}

/// The entries that ask for something that may stay untold, by everything else that they ask for.
///
/// An entry stands under its rarest selector; should all of that kind be untold, under the rarest of the other kinds;
/// and so on. Each place is marked with the kinds that have to be untold for the entry to be looked for there, so a
/// search meets an entry once, by the rarest of its selectors that could be told.
#[derive(Debug, Default)]
pub(super) struct Doubts {
    entries: Vec<Arc<Entry>>,
    /// Bit n of a mask is the n-th kind.
    kinds: Vec<SelectorKind>,
    /// The hash of a selector, a mask, and the place of an entry in `entries`; sorted.
    places: Vec<(u64, u64, usize)>,
    /// Every mask in `places`.
    masks: Vec<u64>,
    /// For each mask of kinds that are all that some entry asks for, the first such entry.
    bare: Vec<(u64, usize)>,
    hasher: RandomState,
}

impl Doubts {
    /// Finds the entries that ask for a selector of which `kind_of` gives the kind.
    pub(super) fn of(entries: &[Arc<Entry>], kind_of: impl Fn(&Selector) -> Option<SelectorKind>) -> Self {
        let asks = |entry: &&Arc<Entry>| entry.selectors.iter().any(|selector| kind_of(selector).is_some());
        let mut doubts = Self { entries: entries.iter().filter(asks).cloned().collect(), ..Self::default() };
        let mut wanted: HashMap<&Selector, usize, RandomState> = HashMap::default();
        for selector in doubts.entries.iter().flat_map(|entry| &entry.selectors) {
            *wanted.entry(selector).or_default() += 1;
        }
        for (at, entry) in doubts.entries.iter().enumerate() {
            let mut by_rarity: Vec<&Selector> = entry.selectors.iter().collect();
            by_rarity.sort_by_key(|selector| wanted.get(selector));
            let mut mask = 0;
            let mut is_bare = true;
            for selector in by_rarity {
                let bit = kind_of(selector).map_or(0, |kind| bit(&mut doubts.kinds, kind));
                if bit & mask != 0 {
                    continue;
                }
                doubts.places.push((doubts.hasher.hash_one(selector), mask, at));
                mask |= bit;
                if bit == 0 {
                    is_bare = false;
                    break;
                }
            }
            if is_bare && !doubts.bare.iter().any(|(it, _)| *it == mask) {
                doubts.bare.push((mask, at));
            }
        }
        drop(wanted);
        doubts.places.sort_unstable();
        doubts.masks = doubts.places.iter().map(|(_, mask, _)| *mask).collect();
        doubts.masks.sort_unstable();
        doubts.masks.dedup();
        doubts
    }

    /// The kind that is missing of an entry which a process with the selectors `found` may have: one that asks for
    /// nothing but those and some of the kinds that are `untold`, of which `found` holds none. The first of its kinds,
    /// in the order of `untold`.
    pub(super) fn first(
        &self,
        found: &Selectors,
        untold: &[SelectorKind],
        kind_of: impl Fn(&Selector) -> Option<SelectorKind>,
    ) -> Option<SelectorKind> {
        self.first_of(found, untold, untold.len(), kind_of)
    }

    /// Whether there is an entry that a process with the selectors `found` may have, and that asks for a selector of one of
    /// these kinds of an attestor's own. What the other attestors find is not known yet, and may be anything.
    pub(super) fn asks_of(
        &self,
        found: &Selectors,
        own: &[SelectorKind],
        kind_of: impl Fn(&Selector) -> Option<SelectorKind>,
    ) -> bool {
        let is_other = |kind: &&SelectorKind| own.iter().all(|it| it.attestor != kind.attestor);
        let untold: Vec<SelectorKind> =
            own.iter().chain(self.kinds.iter().filter(is_other)).copied().collect();
        self.first_of(found, &untold, own.len(), kind_of).is_some()
    }

    /// As [`Doubts::first`], of entries that miss one of the first `wanted` kinds alone.
    fn first_of(
        &self,
        found: &Selectors,
        untold: &[SelectorKind],
        wanted: usize,
        kind_of: impl Fn(&Selector) -> Option<SelectorKind>,
    ) -> Option<SelectorKind> {
        let told = |mask: u64| {
            let kinds = self.kinds.iter().enumerate();
            kinds.into_iter().any(|(n, kind)| mask >> n & 1 != 0 && !untold.contains(kind))
        };
        // Where the entry could be this process's, what is missing of it.
        let missing = |at: usize| {
            let entry = self.entries.get(at)?;
            let mut missing: Option<usize> = None;
            for selector in entry.selectors.iter().filter(|selector| !found.contains(selector)) {
                let kind = kind_of(selector)?;
                let place = untold.iter().position(|it| *it == kind)?;
                missing = Some(missing.map_or(place, |first| first.min(place)));
            }
            untold.get(missing.filter(|place| *place < wanted)?).copied()
        };
        let bare = self.bare.iter().filter(|(mask, _)| !told(*mask));
        if let Some(kind) = bare.map(|(_, at)| *at).find_map(missing) {
            return Some(kind);
        }
        let masks: Vec<u64> = self.masks.iter().copied().filter(|mask| !told(*mask)).collect();
        found.iter().find_map(|selector| {
            let hash = self.hasher.hash_one(selector);
            masks.iter().find_map(|mask| {
                let from = self.places.partition_point(|(h, m, _)| (*h, *m) < (hash, *mask));
                let here = self.places.iter().skip(from).take_while(|(h, m, _)| (*h, *m) == (hash, *mask));
                here.map(|(_, _, at)| *at).find_map(missing)
            })
        })
    }
}

/// The bit that stands for `kind`.
fn bit(kinds: &mut Vec<SelectorKind>, kind: SelectorKind) -> u64 {
    let n = kinds.iter().position(|it| *it == kind).unwrap_or_else(|| {
        kinds.push(kind);
        kinds.len() - 1
    });
    debug_assert!(n < MAX_KINDS, "kinds are words of this program");
    1 << (n % MAX_KINDS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const KINDS: [&str; 3] = ["p", "q", "r"];

    /// `p:`, `q:` and `r:` may stay untold, `a:` and all else not.
    fn kind_of(selector: &Selector) -> Option<SelectorKind> {
        let word = selector.value().split(':').next()?;
        let word = KINDS.into_iter().find(|it| *it == word)?;
        Some(SelectorKind { attestor: "t", word })
    }

    fn kinds(words: &str) -> Vec<SelectorKind> {
        let known = |word: &str| KINDS.into_iter().find(|it| *it == word).unwrap();
        words.split_whitespace().map(|word| SelectorKind { attestor: "t", word: known(word) }).collect()
    }

    fn selectors(text: &str) -> Selectors {
        text.split_whitespace().map(|s| Selector::parse(&format!("t:{s}")).unwrap()).collect()
    }

    fn entry(text: &str) -> Arc<Entry> {
        let typed: Vec<String> = text.split_whitespace().map(|it| format!("t:{it}")).collect();
        Entry::asking(&typed.join(" "))
    }

    #[test]
    fn an_entry_is_in_doubt_when_all_that_was_told_fits() {
        for (case, entries, found, untold, want) in [
            ("nothing asks", "a:1", "a:1", "p", None),
            ("it is all that is missing", "a:1 p:1", "a:1", "p", Some("p")),
            ("something else is missing too", "a:1 a:2 p:1", "a:1", "p", None),
            ("another's", "a:2 p:1", "a:1", "p", None),
            ("it asks for nothing else", "p:1", "a:1", "p", Some("p")),
            ("nothing at all was told", "p:1", "", "p", Some("p")),
            ("it matches without it", "a:1", "a:1", "p q", None),
            ("another kind was told, and is another", "a:1 q:2", "a:1 q:1", "p", None),
            ("another kind was told, and fits", "q:1 p:1", "a:1 q:1", "p", Some("p")),
            ("both are untold: the first of them", "a:1 q:1 p:1", "a:1", "p q", Some("p")),
            ("both are untold, in the other order", "a:1 q:1 p:1", "a:1", "q p", Some("q")),
            ("two of one kind", "a:1 p:1 p:2", "a:1", "p", Some("p")),
            ("the second entry", "a:2 p:1 / a:1 q:1 / a:1 p:2", "a:1", "p", Some("p")),
            ("an entry of nothing matches nobody", "", "a:1", "p", None),
        ] {
            let entries: Vec<_> = entries.split('/').map(entry).collect();
            let doubts = Doubts::of(&entries, kind_of);
            let got = doubts.first(&selectors(found), &kinds(untold), kind_of);
            assert_eq!(got.map(|kind| kind.word), want, "{case}");
        }
    }

    #[test]
    fn many_entries_for_one_user_are_met_by_what_tells_them_apart() {
        let mut entries: Vec<_> = (0..1000).map(|n| entry(&format!("a:0 p:{n} q:{n}"))).collect();
        entries.extend((0..1000).map(|n| entry(&format!("p:{n} q:{n}"))));
        let doubts = Doubts::of(&entries, kind_of);
        let met = std::cell::Cell::new(0);
        let counting = |selector: &Selector| {
            met.set(met.get() + 1);
            kind_of(selector)
        };
        assert_eq!(doubts.first(&selectors("a:0 p:none"), &kinds("q"), counting), None);
        assert_eq!(met.get(), 0, "the path was told, and no entry asks for it");
        assert!(doubts.first(&selectors("a:0 p:7"), &kinds("q"), counting).is_some());
        assert!(met.get() < 10, "{}", met.get());
    }

    proptest! {
        /// The index finds what looking at every entry finds.
        #[test]
        fn agrees_with_a_scan(
            entries in proptest::collection::vec(
                proptest::collection::btree_set((0usize..5, 0u8..3), 0..5), 0..20),
            found in proptest::collection::btree_set((0usize..5, 0u8..3), 0..8),
            untold in proptest::collection::btree_set(0usize..3, 0..3),
        ) {
            let words = ["p", "q", "r", "a", "b"];
            let text = |set: &BTreeSet<(usize, u8)>| {
                set.iter().map(|(word, n)| format!("{}:{n} ", words[*word])).collect::<String>()
            };
            // What is untold was not found.
            let found: BTreeSet<_> = found.into_iter().filter(|(word, _)| !untold.contains(word)).collect();
            let found = selectors(&text(&found));
            let untold: Vec<_> = untold.iter().map(|n| SelectorKind { attestor: "t", word: KINDS[*n] }).collect();
            let entries: Vec<_> = entries.iter().map(|set| entry(&text(set))).collect();
            let open = |s: &&Selector| kind_of(s).is_some_and(|kind| untold.contains(&kind));
            let in_doubt = |e: &&Arc<Entry>| {
                let missing: Vec<_> = e.selectors.difference(&found).collect();
                !missing.is_empty() && missing.iter().all(open)
            };
            let scan = entries.iter().any(|e| in_doubt(&e));
            let got = Doubts::of(&entries, kind_of).first(&found, &untold, kind_of);
            prop_assert_eq!(got.is_some(), scan);
            prop_assert!(got.is_none_or(|kind| untold.contains(&kind)));
        }
    }
}
