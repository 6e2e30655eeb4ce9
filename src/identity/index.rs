//! The one rule that says who may have what: an entry matches when every selector that it asks for was attested.
//!
//! The index makes a look cost what the selectors at hand cost, however many entries there are. That the selectors
//! were attested is not known here: `store::authorize` asks with nothing else.

use std::sync::Arc;

use hashbrown::{HashMap, HashTable};

use super::{Entry, EntryId, Selector, Selectors, SpiffeId};

/// All entries, found by selector.
///
/// Each entry stands under one of its selectors only: the one that the fewest entries ask for. A caller that was
/// attested with n selectors looks up n lists, and meets only entries that ask for one of its rarest facts.
#[derive(Debug, Default)]
pub struct EntryIndex {
    entries: Box<[Arc<Entry>]>,
    /// Places in `entries`: those that stand under one selector next to each other, in their order.
    by_selector: Box<[u32]>,
    /// What stands under which selector, by its hash.
    groups: HashTable<EntryGroup>,
    hasher: ahash::RandomState,
}

/// Entries that stand under one selector, which is not kept again: the first of them has it.
#[derive(Clone, Copy, Debug)]
struct EntryGroup {
    /// From where in `by_selector`, and how many.
    from: u32,
    count: u32,
    /// Which selector of these entries' first.
    nth: u32,
}

impl EntryIndex {
    /// Indexes `entries`, sorted by their ID. Of two entries with the same ID the last one stays.
    pub fn new(entries: impl IntoIterator<Item = Arc<Entry>>) -> Self {
        let mut entries: Vec<Arc<Entry>> = entries.into_iter().collect();
        // Stable, so that of equal IDs the one that came last is last, and stays.
        entries.sort_by(|a, b| a.id.cmp(&b.id));
        entries.reverse();
        entries.dedup_by(|a, b| a.id == b.id);
        entries.reverse();

        let mut wanted: HashMap<&Selector, u32, ahash::RandomState> = HashMap::default();
        for selector in entries.iter().flat_map(|entry| &entry.selectors) {
            *wanted.entry(selector).or_default() += 1;
        }
        let rarest = |(at, entry): (usize, &Arc<Entry>)| {
            let (nth, _) =
                entry.selectors.iter().enumerate().min_by_key(|(_, selector)| wanted.get(selector))?;
            Some((small(at), small(nth)))
        };
        let mut placed: Vec<(u32, u32)> = entries.iter().enumerate().filter_map(rarest).collect();
        placed.sort_unstable_by_key(|(at, nth)| (selector_of(&entries, *at, *nth), *at));
        drop(wanted);

        let by_selector = placed.iter().map(|(at, _)| *at).collect();
        let mut index = Self {
            entries: entries.into(),
            by_selector,
            groups: HashTable::new(),
            hasher: ahash::RandomState::new(),
        };
        let selector = |(at, nth): (u32, u32)| selector_of(&index.entries, at, nth);
        let mut from = 0;
        let groups = placed.chunk_by(|a, b| selector(*a) == selector(*b)).filter_map(|group| {
            let group = EntryGroup { from, count: small(group.len()), nth: group.first()?.1 };
            from += group.count;
            Some(group)
        });
        let groups: Vec<EntryGroup> = groups.collect();
        let mut table = HashTable::with_capacity(groups.len());
        for group in groups {
            table.insert_unique(index.hash(index.selector(&group)), group, |it| {
                index.hash(index.selector(it))
            });
        }
        index.groups = table;
        index
    }

    /// What the entries of a group stand under.
    fn selector(&self, group: &EntryGroup) -> Option<&Selector> {
        selector_of(&self.entries, *self.by_selector.get(large(group.from))?, group.nth)
    }

    fn hash(&self, selector: Option<&Selector>) -> u64 {
        self.hasher.hash_one(selector)
    }

    /// The places of the entries that stand under a selector.
    fn under(&self, selector: &Selector) -> &[u32] {
        let group = self.groups.find(self.hash(Some(selector)), |it| self.selector(it) == Some(selector));
        let places = group.and_then(|it| self.by_selector.get(large(it.from)..large(it.from + it.count)));
        places.unwrap_or_default()
    }

    /// All entries, sorted by ID.
    pub fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    /// The entry with this ID.
    pub fn get(&self, id: &EntryId) -> Option<&Arc<Entry>> {
        let at = self.entries.binary_search_by(|entry| entry.id.cmp(id)).ok()?;
        self.entries.get(at)
    }

    /// The entries whose every selector is among `selectors`, narrowed to `wanted` when given, sorted by entry ID.
    ///
    /// Of several with the same hint the oldest stays (SPIRE: `pkg/agent/common/hintsfilter`), before narrowing, so
    /// that nobody is given by name what it is not given in full. An entry without selectors matches nobody: an empty
    /// list is a mistake, not a wildcard.
    pub fn matching(&self, selectors: &Selectors, wanted: Option<&SpiffeId>) -> Vec<&Arc<Entry>> {
        let mut at: Vec<usize> = selectors
            .iter()
            .flat_map(|selector| self.under(selector))
            .map(|at| large(*at))
            .filter(|at| self.entries.get(*at).is_some_and(|entry| entry.selectors.is_subset(selectors)))
            .collect();
        // An entry stands under one selector only, so no place comes twice.
        at.sort_unstable();
        let mut matched: Vec<&Arc<Entry>> = at.iter().filter_map(|at| self.entries.get(*at)).collect();

        let age = |entry: &Entry| (entry.created_at, entry.id.clone());
        let mut oldest: HashMap<&str, &Entry, ahash::RandomState> = HashMap::default();
        for entry in matched.iter().filter(|entry| !entry.hint.is_empty()) {
            let first = oldest.entry(&entry.hint).or_insert(entry);
            if age(entry) < age(first) {
                *first = entry;
            }
        }
        matched.retain(|entry| {
            oldest.get(&*entry.hint).is_none_or(|first| first.id == entry.id)
                && wanted.is_none_or(|id| entry.spiffe_id == *id)
        });
        matched
    }

    /// The `n` entries that match nearly: at least one of their selectors was attested, and the fewest were not. Of equal
    /// ones first those with more that were, then by entry ID. For people: looks at every entry.
    pub fn nearest(&self, attested: &Selectors, n: usize) -> Vec<Near> {
        let mut found: Vec<(usize, std::cmp::Reverse<usize>, usize)> = Vec::new();
        for (at, entry) in self.entries.iter().enumerate() {
            let missing = entry.selectors.difference(attested).count();
            let has = entry.selectors.len() - missing;
            if has > 0 && missing > 0 {
                found.push((missing, std::cmp::Reverse(has), at));
            }
        }
        found.sort_unstable();
        let entries = found.into_iter().take(n).filter_map(|(_, _, at)| self.entries.get(at));
        entries
            .map(|entry| Near {
                entry: Arc::clone(entry),
                missing: entry.selectors.difference(attested).cloned().collect(),
            })
            .collect()
    }
}

/// The selector of an entry, by the places of both.
fn selector_of(entries: &[Arc<Entry>], at: u32, nth: u32) -> Option<&Selector> {
    entries.get(large(at))?.selectors.get(large(nth))
}

/// A place, of which there are fewer than four billion.
fn small(place: usize) -> u32 {
    u32::try_from(place).unwrap_or(u32::MAX)
}

fn large(place: u32) -> usize {
    usize::try_from(place).unwrap_or(usize::MAX)
}

/// An entry that does not match, and what it misses.
#[derive(Clone, Debug)]
pub struct Near {
    pub entry: Arc<Entry>,
    /// The selectors that were not attested: one or more.
    pub missing: Vec<Selector>,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::identity::{AskedSelectors, EntryAttributes};

    fn entry(name: &str, selectors: &str, hint: &str, created_at: i64) -> Arc<Entry> {
        Arc::new(Entry {
            id: EntryId::new(name),
            spiffe_id: SpiffeId::parse(&format!("spiffe://td/{}", name.trim_end_matches(char::is_numeric)))
                .unwrap(),
            selectors: asked(selectors),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            hint: hint.into(),
            dns_names: Vec::new(),
            federates_with: BTreeSet::new(),
            created_at,
            revision: 0,
            attributes: EntryAttributes::default(),
        })
    }

    fn asked(selectors: &str) -> AskedSelectors {
        parse(selectors).into_iter().collect()
    }

    fn parse(selectors: &str) -> Selectors {
        selectors.split_whitespace().map(|s| Selector::parse(&format!("unix:{s}")).unwrap()).collect()
    }

    fn ids(found: &[&Arc<Entry>]) -> String {
        found.iter().map(|entry| entry.id.as_str()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_match_needs_every_selector() {
        let index = EntryIndex::new([
            entry("web", "uid:1000", "", 0),
            entry("db", "uid:1000 gid:7", "", 0),
            entry("unfinished", "", "", 0),
            entry("other", "uid:1001", "", 0),
        ]);
        for (case, attested, wanted, want) in [
            ("nothing attested", "", None, ""),
            ("one selector", "uid:1000", None, "web"),
            ("both selectors, sorted by entry id", "uid:1000 gid:7", None, "db web"),
            ("half of two", "gid:7", None, ""),
            ("asking narrows", "uid:1000 gid:7", Some("db"), "db"),
            ("asking never widens", "uid:1000", Some("db"), ""),
        ] {
            let wanted = wanted.map(|path| SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap());
            assert_eq!(ids(&index.matching(&parse(attested), wanted.as_ref())), want, "{case}");
        }
    }

    #[test]
    fn the_oldest_keeps_a_hint() {
        let index = EntryIndex::new([
            entry("a", "u:1", "x", 5),
            entry("b", "u:1", "x", 2),
            entry("c", "u:1", "", 1),
            entry("d", "u:1", "", 1),
            entry("e", "u:1", "x", 2),
        ]);
        assert_eq!(ids(&index.matching(&parse("u:1"), None)), "b c d");
        let lost = SpiffeId::parse("spiffe://td/a").unwrap();
        assert_eq!(ids(&index.matching(&parse("u:1"), Some(&lost))), "");
    }

    #[test]
    fn of_two_with_one_id_the_last_stays() {
        let index = EntryIndex::new([entry("a1", "u:1", "first", 0), entry("a1", "u:1", "last", 0)]);
        assert_eq!(index.entries().len(), 1);
        assert_eq!(&*index.get(&EntryId::new("a1")).unwrap().hint, "last");
    }

    #[test]
    fn the_nearest_miss_the_fewest() {
        let index = EntryIndex::new([
            entry("match", "uid:1000", "", 0),
            entry("one-of-two", "uid:1000 gid:8", "", 0),
            entry("one-of-three", "uid:1000 gid:7 path:/x", "", 0),
            entry("two-of-three", "uid:1000 gid:8 path:/x", "", 0),
            entry("stranger", "uid:1001", "", 0),
            entry("unfinished", "", "", 0),
        ]);
        let near = index.nearest(&parse("uid:1000 gid:7"), 5);
        let told: Vec<String> = near
            .iter()
            .map(|near| {
                let missing: Vec<_> = near.missing.iter().map(ToString::to_string).collect();
                format!("{} misses {}", near.entry.id, missing.join(" "))
            })
            .collect();
        assert_eq!(
            told,
            [
                "one-of-three misses unix:path:/x",
                "one-of-two misses unix:gid:8",
                "two-of-three misses unix:gid:8 unix:path:/x"
            ]
        );
        assert_eq!(index.nearest(&parse("uid:1000 gid:7"), 1).len(), 1);
        assert!(index.nearest(&parse(""), 5).is_empty());
    }

    proptest! {
        /// The index gives what looking at every entry gives.
        #[test]
        fn index_agrees_with_a_scan(
            entries in proptest::collection::vec(proptest::collection::btree_set(0u8..6, 0..4), 0..30),
            attested in proptest::collection::btree_set(0u8..6, 0..6),
        ) {
            let text = |set: &BTreeSet<u8>| set.iter().map(|n| format!("u:{n} ")).collect::<String>();
            let entries: Vec<_> =
                entries.iter().enumerate().map(|(i, set)| entry(&format!("e{i:03}"), &text(set), "", 0)).collect();
            let attested = parse(&text(&attested));
            let scan: Vec<String> = entries
                .iter()
                .filter(|e| !e.selectors.is_empty() && e.selectors.is_subset(&attested))
                .map(|e| e.id.to_string())
                .collect();
            let index = EntryIndex::new(entries);
            prop_assert_eq!(ids(&index.matching(&attested, None)), scan.join(" "));
        }
    }
}
