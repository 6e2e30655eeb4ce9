//! The entries that a SPIRE Server authorizes this node for, and how they are kept in step with it.
//!
//! Up to a page of entries comes as a whole. Of more only the revisions come, and then those entries are asked for that are
//! not known, or of another revision, a page at a time. [`EntrySync`] is that conversation without the connection: a
//! message of the server's goes in, what to do next comes out. Until it is over nothing that is known changes, and an answer
//! that makes no sense ends it.
//!
//! An entry that is malformed is left out and the others are not: it is remembered by its revision, so as not to be asked for
//! in each sync. So are those for the stores of SVIDs (`store_svid`), which no workload is ever served.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::proto::{
    entry::{EntryRevision, SyncAuthorizedEntriesRequest, SyncAuthorizedEntriesResponse},
    types::{self as pb, EntryMask},
};
use crate::identity::{
    AskedSelectors, Entry, EntryAttributes, EntryId, EntryIndex, Selector, SpiffeId, TrustDomain,
    entry::MAX_HINT_LEN,
};

/// The most entries that a node is authorized for.
const MOST_ENTRIES: usize = 1_000_000;
/// The longest ID of an entry, in bytes. SPIRE's are UUIDs, or what an admin chose, of at most 255.
const MAX_ID_LEN: usize = 1024;
/// The most selectors of an entry.
const MOST_SELECTORS: usize = 1024;
/// The longest selector, in bytes.
const MAX_SELECTOR_LEN: usize = 8 * 1024;
/// The most trust domains that an entry federates with.
const MOST_FEDERATED: usize = 1024;

/// The parts of an entry that are asked for. Lifetimes and names of certificates are the server's alone.
pub(super) const ENTRY_MASK: EntryMask = EntryMask {
    spiffe_id: true,
    parent_id: false,
    selectors: true,
    x509_svid_ttl: false,
    federates_with: true,
    admin: false,
    downstream: false,
    expires_at: false,
    dns_names: false,
    revision_number: true,
    store_svid: true,
    jwt_svid_ttl: false,
    hint: true,
    created_at: true,
    additional_attributes: true,
};

/// Which state of an entry. Another one is another entry: a server that was restored from a backup goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Revision {
    number: i64,
    created_at: i64,
}

impl Revision {
    fn of(entry: &Entry) -> Self {
        Self { number: entry.revision, created_at: entry.created_at }
    }

    /// Whether it is what the server has. One that does not tell when entries were made says 0.
    fn is(self, told: Self) -> bool {
        self.number == told.number && (told.created_at == 0 || self.created_at == told.created_at)
    }
}

/// What is known of the entries. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct KnownEntries {
    /// Those that workloads are served by.
    pub(super) index: Arc<EntryIndex>,
    /// Those that nobody is served by.
    set_aside: Arc<BTreeMap<EntryId, Revision>>,
}

impl KnownEntries {
    fn has(&self, id: &EntryId, told: Revision) -> bool {
        let known = self.index.get(id).map(|entry| Revision::of(entry));
        known.or_else(|| self.set_aside.get(id).copied()).is_some_and(|known| known.is(told))
    }
}

/// Why an answer makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum EntryFault {
    /// Entries and revisions in one message, or the one where the other was asked for.
    #[error("entries came where revisions were expected, or the reverse")]
    OutOfPlace,
    /// A message that says nothing and that another would follow.
    #[error("an empty page came before the last one")]
    EmptyPage,
    /// An entry that was not asked for, or not once more.
    #[error("an entry came that was not requested")]
    NotAskedFor,
    /// More entries than [`MOST_ENTRIES`].
    #[error("there are more than {MOST_ENTRIES} entries")]
    TooMany,
    /// The server ended the conversation before everything was said.
    #[error("the answer ended early")]
    EndedEarly,
}

/// What a sync does next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum NextStep {
    /// Waits for another message.
    Read,
    /// Sends this one, then waits for another.
    Ask(SyncAuthorizedEntriesRequest),
    /// Nothing: it is over.
    Done,
}

/// What a sync brought.
#[derive(Debug)]
pub(super) struct SyncedEntries {
    /// The same index as before where nothing changed.
    pub(super) known: KnownEntries,
    /// How many of the entries that came are malformed.
    pub(super) malformed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncPhase {
    /// Nothing was said yet.
    First,
    Revisions,
    Entries,
    Over,
}

/// One sync.
#[derive(Debug)]
pub(super) struct EntrySync {
    trust_domain: TrustDomain,
    known: KnownEntries,
    phase: SyncPhase,
    /// How many entries one request asks for: as many as revisions came in the first message.
    page: usize,
    /// What the server has, of what is known.
    kept: BTreeSet<EntryId>,
    /// What is asked for, sorted; which the server would do otherwise.
    wanted: Vec<String>,
    /// How much of it was asked for before this page, and with it.
    asked: std::ops::Range<usize>,
    /// Of this page, which came.
    came: BTreeSet<String>,
    entries: Vec<Arc<Entry>>,
    set_aside: BTreeMap<EntryId, Revision>,
    malformed: u64,
}

impl EntrySync {
    /// A sync of what is `known`, for an agent of `trust_domain`.
    pub(super) fn new(trust_domain: TrustDomain, known: KnownEntries) -> Self {
        Self {
            trust_domain,
            known,
            phase: SyncPhase::First,
            page: 0,
            kept: BTreeSet::new(),
            wanted: Vec::new(),
            asked: 0..0,
            came: BTreeSet::new(),
            entries: Vec::new(),
            set_aside: BTreeMap::new(),
            malformed: 0,
        }
    }

    /// What it begins with.
    pub(super) fn first() -> SyncAuthorizedEntriesRequest {
        SyncAuthorizedEntriesRequest { output_mask: Some(ENTRY_MASK), ids: Vec::new() }
    }

    /// Takes an answer to a request for all entries at once.
    ///
    /// # Errors
    /// [`EntryFault`]: it makes no sense.
    pub(super) fn whole(&mut self, entries: Vec<pb::Entry>) -> Result<(), EntryFault> {
        self.phase = SyncPhase::Over;
        if entries.len() > MOST_ENTRIES {
            return Err(EntryFault::TooMany);
        }
        let mut ids = BTreeSet::new();
        for entry in entries {
            // Of two by one ID, of which each would be the other, the first is one.
            if ids.insert(entry.id.clone()) {
                self.take(entry);
            } else {
                self.malformed += 1;
            }
        }
        Ok(())
    }

    /// Takes a message of the server's.
    ///
    /// # Errors
    /// [`EntryFault`]: it makes no sense.
    pub(super) fn answer(&mut self, answer: SyncAuthorizedEntriesResponse) -> Result<NextStep, EntryFault> {
        let SyncAuthorizedEntriesResponse { entry_revisions, entries, more } = answer;
        if !entry_revisions.is_empty() && !entries.is_empty() {
            return Err(EntryFault::OutOfPlace);
        }
        if entry_revisions.is_empty() && entries.is_empty() && more {
            return Err(EntryFault::EmptyPage);
        }
        match self.phase {
            SyncPhase::First if entry_revisions.is_empty() => {
                // All there is, or nothing at all.
                if more {
                    return Err(EntryFault::OutOfPlace);
                }
                self.whole(entries)?;
                Ok(NextStep::Done)
            }
            SyncPhase::First => {
                self.page = entry_revisions.len();
                self.phase = SyncPhase::Revisions;
                self.revisions(entry_revisions, more)
            }
            SyncPhase::Revisions if entries.is_empty() => self.revisions(entry_revisions, more),
            SyncPhase::Entries if entry_revisions.is_empty() => self.page(entries, more),
            SyncPhase::Revisions | SyncPhase::Entries | SyncPhase::Over => Err(EntryFault::OutOfPlace),
        }
    }

    fn revisions(&mut self, revisions: Vec<EntryRevision>, more: bool) -> Result<NextStep, EntryFault> {
        if revisions.len() + self.kept.len() + self.wanted.len() > MOST_ENTRIES {
            return Err(EntryFault::TooMany);
        }
        for EntryRevision { id, revision_number, created_at } in revisions {
            if id.is_empty() || id.len() > MAX_ID_LEN {
                self.malformed += 1;
                continue;
            }
            let told = Revision { number: revision_number, created_at };
            let known = EntryId::new(&id);
            if self.known.has(&known, told) {
                self.kept.insert(known);
            } else {
                self.wanted.push(id);
            }
        }
        if more {
            return Ok(NextStep::Read);
        }
        self.wanted.sort_unstable();
        self.wanted.dedup();
        self.phase = SyncPhase::Entries;
        Ok(self.ask())
    }

    fn page(&mut self, entries: Vec<pb::Entry>, more: bool) -> Result<NextStep, EntryFault> {
        let asked = self.wanted.get(self.asked.clone()).unwrap_or_default();
        let all_asked_for = entries
            .iter()
            .all(|entry| asked.binary_search(&entry.id).is_ok() && self.came.insert(entry.id.clone()));
        if !all_asked_for {
            return Err(EntryFault::NotAskedFor);
        }
        for entry in entries {
            self.take(entry);
        }
        Ok(if more { NextStep::Read } else { self.ask() })
    }

    /// Asks for the next page. One of this page that did not come was removed meanwhile.
    fn ask(&mut self) -> NextStep {
        let end = self.wanted.len().min(self.asked.end + self.page);
        self.asked = self.asked.end..end;
        self.came.clear();
        match self.wanted.get(self.asked.clone()) {
            Some(ids) if !ids.is_empty() => {
                NextStep::Ask(SyncAuthorizedEntriesRequest { output_mask: None, ids: ids.to_vec() })
            }
            _ => {
                self.phase = SyncPhase::Over;
                NextStep::Done
            }
        }
    }

    fn take(&mut self, entry: pb::Entry) {
        let revision = Revision { number: entry.revision_number, created_at: entry.created_at };
        let id = EntryId::new(&entry.id);
        let for_stores = entry.store_svid;
        let same = self.known.index.get(&id).filter(|known| Revision::of(known) == revision).cloned();
        match (same, parse(entry, &self.trust_domain)) {
            (_, Some(_)) if for_stores => {
                self.set_aside.insert(id, revision);
            }
            // The one that is known is kept in memory once.
            (Some(known), Some(entry)) if *known == entry => self.entries.push(known),
            (_, Some(entry)) => self.entries.push(Arc::new(entry)),
            (_, None) => {
                self.malformed += 1;
                if !id.as_str().is_empty() && id.as_str().len() <= MAX_ID_LEN {
                    self.set_aside.insert(id, revision);
                }
            }
        }
    }

    /// What it brought. Takes a while where there are many entries.
    ///
    /// # Errors
    /// [`EntryFault::EndedEarly`] where the server has not said everything.
    pub(super) fn finish(mut self) -> Result<SyncedEntries, EntryFault> {
        if self.phase != SyncPhase::Over {
            return Err(EntryFault::EndedEarly);
        }
        for id in std::mem::take(&mut self.kept) {
            if let Some(entry) = self.known.index.get(&id) {
                self.entries.push(Arc::clone(entry));
            } else if let Some(revision) = self.known.set_aside.get(&id) {
                self.set_aside.insert(id, *revision);
            }
        }
        self.entries.sort_by(|a, b| a.id.cmp(&b.id));
        let before = self.known.index.entries();
        let same = before.len() == self.entries.len()
            && before.iter().zip(&self.entries).all(|(before, now)| Arc::ptr_eq(before, now));
        let index =
            if same { Arc::clone(&self.known.index) } else { Arc::new(EntryIndex::new(self.entries)) };
        let known = KnownEntries { index, set_aside: Arc::new(self.set_aside) };
        Ok(SyncedEntries { known, malformed: self.malformed })
    }
}

/// The entry, if it is one.
fn parse(entry: pb::Entry, trust_domain: &TrustDomain) -> Option<Entry> {
    let pb::Entry { id, spiffe_id, selectors, federates_with, hint, .. } = entry;
    let spiffe_id = spiffe_id?;
    let spiffe_id = spiffe_id_of(&spiffe_id).filter(|id| id.is_member_of(trust_domain))?;
    let fits = (1..=MAX_ID_LEN).contains(&id.len())
        && (1..=MOST_SELECTORS).contains(&selectors.len())
        && federates_with.len() <= MOST_FEDERATED
        && hint.len() <= MAX_HINT_LEN;
    if !fits {
        return None;
    }
    let selectors = selectors.iter().map(selector).collect::<Option<AskedSelectors>>()?;
    let federates_with = federates_with
        .iter()
        .map(|name| TrustDomain::parse(name).ok())
        // The own bundle is everybody's.
        .filter(|other| other.as_ref() != Some(trust_domain))
        .collect::<Option<BTreeSet<TrustDomain>>>()?;
    let attributes = entry.additional_attributes.unwrap_or_default();
    Some(Entry {
        id: EntryId::new(&id),
        spiffe_id,
        selectors,
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        hint: hint.into(),
        dns_names: Vec::new(),
        federates_with,
        created_at: entry.created_at,
        revision: entry.revision_number,
        attributes: EntryAttributes {
            x509_on_demand: attributes.disable_x509_svid_prefetch,
            jwt_each_anew: attributes.jwt_svid_include_jti,
        },
    })
}

/// The ID of a workload that a message has.
pub(super) fn spiffe_id_of(id: &pb::Spiffeid) -> Option<SpiffeId> {
    let pb::Spiffeid { trust_domain, path } = id;
    SpiffeId::parse_workload(&format!("spiffe://{trust_domain}{path}")).ok()
}

fn selector(selector: &pb::Selector) -> Option<Selector> {
    let pb::Selector { r#type: kind, value } = selector;
    if kind.contains(':') || kind.len() + value.len() > MAX_SELECTOR_LEN {
        return None;
    }
    Selector::parse(&format!("{kind}:{value}")).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn td() -> TrustDomain {
        TrustDomain::parse("td").unwrap()
    }

    /// A well-formed entry of the server.
    fn served(id: &str, revision: i64) -> pb::Entry {
        pb::Entry {
            id: id.to_owned(),
            spiffe_id: Some(pb::Spiffeid { trust_domain: "td".to_owned(), path: format!("/{id}") }),
            selectors: vec![pb::Selector { r#type: "unix".to_owned(), value: format!("uid:{id}") }],
            revision_number: revision,
            created_at: 7,
            ..pb::Entry::default()
        }
    }

    /// Has the whole conversation with a server that has `entries`, and sends pages of `page`.
    fn sync(known: &KnownEntries, entries: &[pb::Entry], page: usize) -> (SyncedEntries, usize) {
        let mut sync = EntrySync::new(td(), known.clone());
        let mut asked_for = 0;
        if entries.len() <= page {
            let all = SyncAuthorizedEntriesResponse { entries: entries.to_vec(), ..Default::default() };
            assert_eq!(sync.answer(all).unwrap(), NextStep::Done);
            return (sync.finish().unwrap(), entries.len());
        }
        let mut next = NextStep::Read;
        let pages: Vec<_> = entries.chunks(page).collect();
        for (at, page) in pages.iter().enumerate() {
            assert_eq!(next, NextStep::Read);
            let revision = |entry: &pb::Entry| EntryRevision {
                id: entry.id.clone(),
                revision_number: entry.revision_number,
                created_at: entry.created_at,
            };
            let entry_revisions = page.iter().map(revision).collect();
            let more = at + 1 < pages.len();
            next = sync
                .answer(SyncAuthorizedEntriesResponse { entry_revisions, more, ..Default::default() })
                .unwrap();
        }
        while let NextStep::Ask(request) = next {
            assert!(request.ids.len() <= page && request.ids.is_sorted());
            asked_for += request.ids.len();
            let answer: Vec<_> =
                entries.iter().filter(|entry| request.ids.contains(&entry.id)).cloned().collect();
            let half = answer.len() / 2;
            if half > 0 {
                let entries = answer[..half].to_vec();
                let part = SyncAuthorizedEntriesResponse { entries, more: true, ..Default::default() };
                assert_eq!(sync.answer(part).unwrap(), NextStep::Read);
            }
            let entries = answer[half..].to_vec();
            next = sync.answer(SyncAuthorizedEntriesResponse { entries, ..Default::default() }).unwrap();
        }
        (sync.finish().unwrap(), asked_for)
    }

    proptest! {
        /// Whatever was known, what a server has is known afterwards, and only what differs was asked for.
        #[test]
        fn a_sync_ends_with_what_the_server_has(
            before in proptest::collection::btree_map(0u8..40, 0i64..3, 0..30),
            after in proptest::collection::btree_map(0u8..40, 0i64..3, 0..30),
            page in 1usize..12,
        ) {
            let entries = |all: &BTreeMap<u8, i64>| -> Vec<pb::Entry> {
                all.iter().map(|(id, revision)| served(&format!("e{id:02}"), *revision)).collect()
            };
            let (first, _) = sync(&KnownEntries::default(), &entries(&before), page);
            let (second, asked_for) = sync(&first.known, &entries(&after), page);
            let got: Vec<(String, i64)> =
                second.known.index.entries().iter().map(|it| (it.id.to_string(), it.revision)).collect();
            let want: Vec<(String, i64)> =
                after.iter().map(|(id, revision)| (format!("e{id:02}"), *revision)).collect();
            prop_assert_eq!(got, want);
            if after.len() > page {
                let changed = after.iter().filter(|(id, revision)| before.get(id) != Some(revision)).count();
                prop_assert_eq!(asked_for, changed);
            }
            if before == after {
                prop_assert!(Arc::ptr_eq(&first.known.index, &second.known.index));
            }
        }
    }

    #[test]
    fn a_malformed_entry_is_left_out_and_not_asked_for_again() {
        let many = |n: usize| vec![pb::Selector { r#type: "unix".to_owned(), value: "uid:1".to_owned() }; n];
        type Spoil = fn(&mut pb::Entry);
        let spoil: [(&str, Spoil); 9] = [
            ("no spiffe id", |e| e.spiffe_id = None),
            ("another trust domain", |e| e.spiffe_id.as_mut().unwrap().trust_domain = "other".to_owned()),
            ("no path", |e| e.spiffe_id.as_mut().unwrap().path = String::new()),
            ("no selector", |e| e.selectors.clear()),
            ("a selector without a value", |e| e.selectors[0].value.clear()),
            ("a selector without a type", |e| e.selectors[0].r#type.clear()),
            ("a colon in a type", |e| e.selectors[0].r#type = "a:b".to_owned()),
            ("a federated trust domain that is none", |e| e.federates_with = vec!["No!".to_owned()]),
            ("a hint too long", |e| e.hint = "x".repeat(MAX_HINT_LEN + 1)),
        ];
        for (case, spoil) in spoil {
            let mut entries: Vec<_> = ["a", "b", "c"].iter().map(|id| served(id, 1)).collect();
            spoil(&mut entries[1]);
            let (first, _) = sync(&KnownEntries::default(), &entries, 2);
            assert_eq!(first.malformed, 1, "{case}");
            assert_eq!(first.known.index.entries().len(), 2, "{case}");
            let (again, asked_for) = sync(&first.known, &entries, 2);
            assert_eq!((again.malformed, asked_for), (0, 0), "{case}");
            entries[1] = served("b", 2);
            let (mended, _) = sync(&again.known, &entries, 2);
            assert_eq!(mended.known.index.entries().len(), 3, "{case}");
        }
        let too_many = pb::Entry { selectors: many(MOST_SELECTORS + 1), ..served("a", 1) };
        assert_eq!(sync(&KnownEntries::default(), &[too_many], 5).0.malformed, 1);
    }

    #[test]
    fn what_is_for_the_stores_is_no_workloads() {
        let stored = pb::Entry { store_svid: true, ..served("a", 1) };
        let (synced, _) = sync(&KnownEntries::default(), &[stored, served("b", 1)], 5);
        assert_eq!(synced.malformed, 0);
        let ids: Vec<_> = synced.known.index.entries().iter().map(|entry| entry.id.to_string()).collect();
        assert_eq!(ids, ["b"]);
    }

    #[test]
    fn an_empty_list_removes_all() {
        let (first, _) = sync(&KnownEntries::default(), &[served("a", 1)], 5);
        let (second, _) = sync(&first.known, &[], 5);
        assert!(second.known.index.entries().is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        use EntryFault::*;
        let revisions = |ids: &[&str], more| SyncAuthorizedEntriesResponse {
            entry_revisions: ids
                .iter()
                .map(|id| EntryRevision { id: (*id).to_owned(), revision_number: 1, created_at: 7 })
                .collect(),
            more,
            ..Default::default()
        };
        let entries = |ids: &[&str], more| SyncAuthorizedEntriesResponse {
            entries: ids.iter().map(|id| served(id, 1)).collect(),
            more,
            ..Default::default()
        };
        let both =
            SyncAuthorizedEntriesResponse { entries: vec![served("a", 1)], ..revisions(&["a"], false) };
        let (td, known) = (td(), KnownEntries::default());
        for (case, messages, want) in [
            ("both in one", vec![both], OutOfPlace),
            ("whole, and more", vec![entries(&["a"], true)], OutOfPlace),
            ("nothing, and more", vec![entries(&[], true)], EmptyPage),
            ("entries among revisions", vec![revisions(&["a"], true), entries(&["a"], false)], OutOfPlace),
            ("revisions again", vec![revisions(&["a"], false), revisions(&["a"], false)], OutOfPlace),
            ("another entry", vec![revisions(&["a"], false), entries(&["b"], false)], NotAskedFor),
            ("twice the same", vec![revisions(&["a"], false), entries(&["a", "a"], false)], NotAskedFor),
            (
                "again the same",
                vec![revisions(&["a"], false), entries(&["a"], true), entries(&["a"], true)],
                NotAskedFor,
            ),
            ("more after the end", vec![entries(&["a"], false), entries(&["a"], false)], OutOfPlace),
            ("no more", vec![revisions(&["a"], true)], EndedEarly),
            ("nothing at all", vec![], EndedEarly),
        ] {
            let mut sync = EntrySync::new(td.clone(), known.clone());
            let refused = messages.into_iter().find_map(|message| sync.answer(message).err());
            let got = refused.map_or_else(|| sync.finish().map(|_| ()), Err);
            assert_eq!(got, Err(want), "{case}");
        }
    }

    #[test]
    fn attributes_are_read() {
        let attributes =
            pb::entry::AdditionalAttributes { disable_x509_svid_prefetch: true, jwt_svid_include_jti: true };
        let entry = pb::Entry {
            additional_attributes: Some(attributes),
            federates_with: vec!["other".to_owned(), "spiffe://third".to_owned(), "td".to_owned()],
            hint: "web".to_owned(),
            ..served("a", 3)
        };
        let entry = parse(entry, &td()).unwrap();
        assert_eq!(entry.attributes, EntryAttributes { x509_on_demand: true, jwt_each_anew: true });
        let federated: Vec<_> = entry.federates_with.iter().map(TrustDomain::name).collect();
        assert_eq!(federated, ["other", "third"]);
        assert_eq!((&*entry.hint, entry.revision, entry.created_at), ("web", 3, 7));
    }
}
