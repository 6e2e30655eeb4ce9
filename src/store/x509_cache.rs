//! X.509-SVIDs: one per entry, made when somebody first asks, shared by all its callers and streams.
//!
//! Those that an open stream holds are renewed by [`super::Writer`] when they are due (`renewal`); the others when
//! they are next asked for. While renewal fails the old one is served until it expires, and never after. Bound:
//! `x509_svid_cache_max_size` SVIDs, beyond which only those that an open stream holds are kept, and streams have
//! bounds of their own.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use hashbrown::HashMap;
use tokio::{
    sync::{Notify, OnceCell},
    time::Instant,
};

use super::{audit::AuditTrail, audited::AuditedCaller, entitlement::Charged};
use crate::{
    identity::{Entry, EntryId, EntryIndex, SpiffeId, Tainted, X509Svid},
    issuer::{self, Issuer, MintError, renewal},
    os::clock::Clock,
    telemetry::trouble::Trouble,
};

/// How long after a failed renewal the next one may start, if the issuer does not say.
const RETRY: Duration = Duration::from_secs(5);

/// How long after an entry could not be signed for it is tried again; twice as long after each further failure, up to
/// [`MAX_ENTRY_RETRY`].
const ENTRY_RETRY: Duration = Duration::from_secs(5);
const MAX_ENTRY_RETRY: Duration = Duration::from_secs(60);
/// For how long nothing is made ahead after memory was short.
const NOT_AHEAD: Duration = Duration::from_secs(300);

/// Of the time from its making to its renewal, an SVID gives up one part in so many to be renewed with others of its caller.
const TOGETHER: u32 = 2;

/// How long a call waits for a fresh SVID while there is a valid one.
const RENEWAL_WAIT: Duration = Duration::from_secs(1);

/// An SVID and when it is due.
#[derive(Debug)]
struct HeldSvid {
    svid: Arc<X509Svid>,
    /// Of the entry it was made of.
    revision: i64,
    renew_at: SystemTime,
    /// Until when [`X509Cache::renew`] may be at it.
    renewing_until: Option<Instant>,
    /// Grows with each use: the smallest is the one that nobody has asked for the longest.
    used: u64,
}

impl HeldSvid {
    /// Whether it was made of the entry as it is. A server that was restored may have another under the same number.
    fn is_of(&self, entry: &Entry) -> bool {
        self.revision == entry.revision && self.svid.spiffe_id == entry.spiffe_id
    }
}

#[derive(Debug, Default)]
struct X509Table {
    held: HashMap<EntryId, HeldSvid, ahash::RandomState>,
    /// How many open streams hold the SVID of an entry.
    streams: HashMap<EntryId, usize, ahash::RandomState>,
    /// Who is being made: one at a time per entry as it is. After a reload nobody waits for what the entry was.
    making: HashMap<(EntryId, i64, SpiffeId), Arc<OnceCell<Served>>, ahash::RandomState>,
    /// Who is being made ahead, and until when that may take.
    ahead: HashMap<EntryId, Instant, ahash::RandomState>,
    /// Until when nothing is made ahead.
    not_ahead: Option<Instant>,
    /// Which entries, in which revision, could not be signed for.
    failed: HashMap<EntryId, FailedEntry, ahash::RandomState>,
    uses: u64,
    /// An SVID that a stream holds was replaced since [`super::Writer`] last looked.
    replaced: bool,
}

/// An entry that could not be signed for.
#[derive(Clone, Copy, Debug)]
struct FailedEntry {
    revision: i64,
    again_at: Instant,
    wait: Duration,
}

/// An entry was not signed for a moment ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the issuer did not sign for this entry a moment ago")]
struct NotSignedFor;

/// The X.509-SVIDs that were made.
#[derive(Debug)]
pub struct X509Cache {
    issuer: Arc<dyn Issuer>,
    clock: Clock,
    audit: Arc<AuditTrail>,
    table: Mutex<X509Table>,
    max: AtomicUsize,
    availability_target: Mutex<Option<Duration>>,
    /// SVIDs are too short for it.
    shortness: Mutex<Trouble>,
    /// Wakes [`super::Writer`] when a due date came nearer.
    pub(super) due_changed: Notify,
}

/// An SVID to serve, and when the next one is due.
#[derive(Clone, Debug)]
pub struct Served {
    pub svid: Arc<X509Svid>,
    /// When it is to be renewed; in the past when that has failed so far.
    pub renew_at: SystemTime,
    /// It was made for this call.
    signed: bool,
}

impl Served {
    /// When an answer made of it may be repeated without asking for it again: not before it is valid, and also where
    /// renewal fails and is put off, no longer than it is valid.
    pub fn fresh(&self) -> Range<SystemTime> {
        self.svid.not_before..self.renew_at.min(self.svid.not_after)
    }
}

/// How many SVIDs there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X509Counts {
    pub cached: usize,
    /// Those that an open stream holds.
    pub active: usize,
}

impl X509Cache {
    /// Keeps about `max` SVIDs.
    pub fn new(
        issuer: Arc<dyn Issuer>,
        clock: Clock,
        max: usize,
        availability_target: Option<Duration>,
    ) -> Self {
        Self {
            issuer,
            clock,
            audit: Arc::default(),
            table: Mutex::default(),
            max: AtomicUsize::new(max),
            availability_target: Mutex::new(availability_target),
            shortness: Mutex::default(),
            due_changed: Notify::new(),
        }
    }

    /// Tells this trail of what is made.
    #[must_use]
    pub fn audited(self, audit: Arc<AuditTrail>) -> Self {
        Self { audit, ..self }
    }

    /// Takes new settings; SVIDs that are there keep the due dates they have.
    pub fn reconfigure(&self, max: usize, availability_target: Option<Duration>) {
        self.max.store(max, Ordering::Relaxed);
        *self.availability_target.lock().unwrap_or_else(PoisonError::into_inner) = availability_target;
    }

    /// The SVID of each entry of the call, in their order: the one that is there, or a new one.
    ///
    /// # Errors
    /// What the issuer says, when there is no valid one to serve meanwhile.
    pub async fn fetch(&self, charged: &mut Charged) -> Result<Vec<Served>, MintError> {
        let whom = charged.audited();
        let served = charged.each(|entry| self.of_entry(entry, whom)).await;
        charged.signed(served.iter().map(|served| served.as_ref().is_ok_and(|served| served.signed)));
        self.lock().renew_together(charged.entries());
        served.into_iter().collect()
    }

    /// The SVIDs of the call's entries as they are, valid and perhaps due: nothing is made. `None` where one is not there.
    pub fn at_hand(&self, charged: &Charged) -> Option<Vec<Served>> {
        let now = self.clock.now();
        self.lock().renew_together(charged.entries());
        let of_entry = |entry: &Arc<Entry>| match self.find(entry, now) {
            FoundX509::Fresh(served) | FoundX509::Due(served) => Some(served),
            FoundX509::Nothing => None,
        };
        charged.entries().iter().map(of_entry).collect()
    }

    /// A stream is sent `message`, in which they are.
    pub fn are_given(&self, charged: &Charged, message: &[u8]) {
        let svids = || Some(self.at_hand(charged)?.into_iter().map(|served| served.svid).collect());
        let peer = charged.peer().connected();
        self.audit.x509_given(message, charged.entries(), svids, peer, charged.audited());
    }

    async fn of_entry(&self, entry: &Arc<Entry>, whom: AuditedCaller) -> Result<Served, MintError> {
        match self.find(entry, self.clock.now()) {
            FoundX509::Fresh(served) => Ok(served),
            FoundX509::Due(old) => {
                Ok(self.make(entry, whom, Instant::now() + RENEWAL_WAIT).await.unwrap_or(old))
            }
            FoundX509::Nothing => self.make(entry, whom, issuer::deadline()).await,
        }
    }

    /// Counts a stream that holds the SVIDs of its entries until the returned value is dropped.
    pub fn hold(self: &Arc<Self>, charged: &Charged) -> Hold {
        let ids: Vec<EntryId> = charged.entries().iter().map(|entry| entry.id.clone()).collect();
        let mut table = self.lock();
        for id in &ids {
            *table.streams.entry_ref(id).or_default() += 1;
        }
        drop(table);
        Hold { cache: Arc::clone(self), ids }
    }

    /// How many there are.
    pub fn counts(&self) -> X509Counts {
        let table = self.lock();
        X509Counts { cached: table.held.len(), active: table.streams.len() }
    }

    /// How many are to be made anew or are being made ahead, and how many entries could not be signed for as they are.
    /// Looks at each.
    pub fn waited_for(&self) -> (usize, usize) {
        let (now, table) = (self.clock.now(), self.lock());
        let due = table.held.values().filter(|held| held.renew_at <= now).count();
        let ahead = table.ahead.keys().filter(|id| !table.held.contains_key(*id)).count();
        (due + ahead, table.failed.len())
    }

    /// Forgets what no stream holds: memory is short.
    pub fn shrink(&self) {
        let mut table = self.lock();
        let X509Table { held, streams, .. } = &mut *table;
        held.retain(|id, _| streams.contains_key(id));
        held.shrink_to_fit();
        table.not_ahead = Some(Instant::now() + NOT_AHEAD);
    }

    /// When the next SVID that a stream holds is due.
    pub(super) fn next_due(&self) -> Option<SystemTime> {
        let table = self.lock();
        table.streams.keys().filter_map(|id| table.held.get(id)).map(|held| held.renew_at).min()
    }

    /// At most `most` entries whose SVID is due, to be renewed: those that a stream holds first, then those that were used
    /// last. Where SVIDs are not made ahead, what is due and held by no stream is forgotten. `current` finds an entry as it
    /// is at present.
    pub(super) fn due(
        &self,
        most: usize,
        current: impl Fn(&EntryId) -> Option<Arc<Entry>>,
    ) -> Vec<Arc<Entry>> {
        let (now, instant) = (self.clock.now(), Instant::now());
        let ahead = self.issuer.makes_ahead();
        let mut table = self.lock();
        // Of calls that went away before the end.
        table.making.retain(|_, making| Arc::strong_count(making) > 1);
        let X509Table { held, streams, .. } = &mut *table;
        // One that is not valid yet was made before the clock was set back.
        let is_due = |held: &HeldSvid| held.renew_at <= now || now < held.svid.not_before;
        let mut due = Vec::new();
        held.retain(|id, held| {
            let is_held = streams.contains_key(id);
            if ahead && !is_held && held.svid.not_after <= now {
                return false;
            }
            if !is_due(held) {
                return true;
            }
            if !is_held && !ahead {
                return false;
            }
            if held.renewing_until.is_some_and(|until| instant < until) {
                return true;
            }
            // Where the entry is gone, its streams are told by the snapshot without it.
            let Some(entry) = current(id) else { return false };
            if is_held || !entry.attributes.x509_on_demand {
                due.push((!is_held, std::cmp::Reverse(held.used), entry));
            }
            true
        });
        due.sort_unstable_by_key(|(is_idle, used, _)| (*is_idle, *used));
        due.truncate(most);
        for (_, _, entry) in &due {
            if let Some(held) = held.get_mut(&entry.id) {
                held.renewing_until = Some(issuer::deadline());
            }
        }
        due.into_iter().map(|(_, _, entry)| entry).collect()
    }

    /// At most `most` entries without an SVID as they are, to be made ahead by [`X509Cache::renew`], as long as there is
    /// room. None where the issuer makes each as soon as it is asked for.
    pub(super) fn missing(&self, most: usize, index: &EntryIndex) -> Vec<Arc<Entry>> {
        if !self.issuer.makes_ahead() {
            return Vec::new();
        }
        let (max, now) = (self.max.load(Ordering::Relaxed), Instant::now());
        let mut table = self.lock();
        if table.not_ahead.is_some_and(|until| now < until) {
            return Vec::new();
        }
        let X509Table { held, ahead, failed, .. } = &mut *table;
        ahead.retain(|_, until| now < *until);
        failed.retain(|id, _| index.get(id).is_some());
        let mut room = max.saturating_sub(held.len() + ahead.len());
        let mut missing: Vec<Arc<Entry>> = Vec::new();
        for entry in index.entries() {
            if missing.len() >= most {
                break;
            }
            let failed = failed.get(&entry.id).filter(|failed| failed.revision == entry.revision);
            if ahead.contains_key(&entry.id) || failed.is_some_and(|failed| now < failed.again_at) {
                continue;
            }
            match held.get(&entry.id) {
                Some(held) if held.is_of(entry) => {}
                // It has its room already.
                Some(_) => missing.push(Arc::clone(entry)),
                None if room == 0 || entry.attributes.x509_on_demand => {}
                None => {
                    room -= 1;
                    missing.push(Arc::clone(entry));
                }
            }
        }
        for entry in &missing {
            ahead.insert(entry.id.clone(), issuer::deadline());
        }
        missing
    }

    /// Has the SVIDs renewed that `tainted` signed. They are served until then.
    pub(super) async fn distrust(&self, tainted: &Tainted) {
        if tainted.is_empty() {
            return;
        }
        let held: Vec<(EntryId, Arc<X509Svid>)> = {
            let table = self.lock();
            table.held.iter().map(|(id, held)| (id.clone(), Arc::clone(&held.svid))).collect()
        };
        let now = self.clock.now();
        for some in held.chunks(64) {
            for (id, svid) in some.iter().filter(|(_, svid)| tainted.signed_x509(&svid.chain)) {
                if let Some(held) = self.lock().held.get_mut(id)
                    && Arc::ptr_eq(&held.svid, svid)
                {
                    held.renew_at = held.renew_at.min(now);
                }
            }
            // Others want this thread too.
            tokio::task::yield_now().await;
        }
        self.due_changed.notify_one();
    }

    /// Renews the SVIDs of `entries`. What fails is due again soon.
    ///
    /// # Errors
    /// The last failure, if there was one. It held up none of the others.
    pub(super) async fn renew(&self, entries: &[Arc<Entry>]) -> Result<(), MintError> {
        let mut made = self.issuer.mint_x509(entries, issuer::deadline()).await.into_iter();
        let mut result = Ok(());
        for entry in entries {
            match made.next().unwrap_or(Err(MintError::Late)) {
                Ok(svid) => drop(self.keep(entry, Arc::new(svid), None)),
                Err(error) => {
                    let mut table = self.lock();
                    let wait = table.failed(entry, &error).or_else(|| error.retry_after()).unwrap_or(RETRY);
                    if let Some(held) = table.held.get_mut(&entry.id) {
                        held.renew_at = self.clock.now() + wait;
                        held.renewing_until = None;
                    }
                    drop(table);
                    result = Err(error);
                }
            }
        }
        let mut table = self.lock();
        for entry in entries {
            table.ahead.remove(&entry.id);
        }
        result
    }

    /// Whether an SVID that a stream holds was replaced since this was last asked.
    pub(super) fn take_replaced(&self) -> bool {
        std::mem::take(&mut self.lock().replaced)
    }

    fn find(&self, entry: &Entry, now: SystemTime) -> FoundX509 {
        let mut table = self.lock();
        table.uses += 1;
        let uses = table.uses;
        let Some(held) = table.held.get_mut(&entry.id) else { return FoundX509::Nothing };
        held.used = uses;
        // `not_before` lies in the future only when the clock was set back.
        let valid = held.svid.not_before <= now && now < held.svid.not_after;
        let served = Served { svid: Arc::clone(&held.svid), renew_at: held.renew_at, signed: false };
        let renewing = held.renewing_until.is_some_and(|until| Instant::now() < until);
        let same = held.is_of(entry);
        // A server may be away. What it signed for the entry before it changed names the same workload.
        let same_id = self.issuer.makes_ahead() && held.svid.spiffe_id == entry.spiffe_id;
        match (valid && (same || same_id), same && (now < held.renew_at || renewing)) {
            (false, _) => FoundX509::Nothing,
            (true, true) => FoundX509::Fresh(served),
            (true, false) => FoundX509::Due(served),
        }
    }

    /// Makes the SVID of `entry`, once for all who ask meanwhile.
    async fn make(
        &self,
        entry: &Arc<Entry>,
        whom: AuditedCaller,
        deadline: Instant,
    ) -> Result<Served, MintError> {
        let key = (entry.id.clone(), entry.revision, entry.spiffe_id.clone());
        if let Some(wait) = self.lock().refused(entry) {
            return Err(MintError::Entry { retry_after: Some(wait), source: Box::new(NotSignedFor) });
        }
        let cell = Arc::clone(self.lock().making.entry(key.clone()).or_default());
        let mut signed = false;
        let making = cell.get_or_try_init(|| {
            signed = true;
            async {
                let mut made = self.issuer.mint_x509(std::slice::from_ref(entry), deadline).await;
                let svid = made.pop().unwrap_or(Err(MintError::Late))?;
                Ok(self.keep(entry, Arc::new(svid), Some(whom)))
            }
        });
        let made = issuer::by(deadline, making).await.cloned();
        // Who waited for it while another had it made does not pay for it.
        let made = made.map(|served| Served { signed, ..served });
        let mut table = self.lock();
        if let Err(error) = &made {
            // Once for all who waited for it.
            if table.refused(entry).is_none() {
                table.failed(entry, error);
            }
        }
        if table.making.get(&key).is_some_and(|current| Arc::ptr_eq(current, &cell)) {
            table.making.remove(&key);
        }
        made
    }

    /// Whether it is to be said that an SVID is too short for the availability target: now and then, whichever it is.
    fn is_shortness_due(&self) -> bool {
        let mut shortness = self.shortness.lock().unwrap_or_else(PoisonError::into_inner);
        shortness.is_due("an SVID is too short", Instant::now())
    }

    fn keep(&self, entry: &Entry, svid: Arc<X509Svid>, whom: Option<AuditedCaller>) -> Served {
        self.audit.x509_made(&svid, entry, whom);
        let target = *self.availability_target.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.clock.now();
        let renew_at = renewal::draw(now, svid.not_after, target);
        if renewal::is_too_short(now, svid.not_after, target) && self.is_shortness_due() {
            tracing::warn!(spiffe_id = %entry.spiffe_id, "X509 SVID {}", renewal::TOO_SHORT);
        }
        let max = self.max.load(Ordering::Relaxed);
        let mut table = self.lock();
        table.uses += 1;
        let used = table.uses;
        if !table.held.contains_key(&entry.id) && table.held.len() >= max {
            table.make_room();
        }
        let held = HeldSvid {
            svid: Arc::clone(&svid),
            revision: entry.revision,
            renew_at,
            renewing_until: None,
            used,
        };
        table.failed.remove(&entry.id);
        let before = table.held.insert(entry.id.clone(), held);
        table.replaced |= before.is_some() && table.streams.contains_key(&entry.id);
        drop(table);
        self.due_changed.notify_one();
        Served { svid, renew_at, signed: true }
    }

    fn lock(&self) -> MutexGuard<'_, X509Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl X509Table {
    /// Has the SVIDs of a caller renewed at the same moment, that of the first, so that its streams are sent all in one
    /// message: those that would be renewed not long after. Made together, they stay so.
    fn renew_together(&mut self, entries: &[Arc<Entry>]) {
        let [_, _, ..] = entries else { return };
        let of = |entry: &Arc<Entry>| self.held.get(&entry.id).map(|held| held.renew_at);
        let Some(first) = entries.iter().filter_map(of).min() else { return };
        for entry in entries {
            let Some(held) = self.held.get_mut(&entry.id) else { continue };
            let lasts = held.renew_at.duration_since(held.svid.not_before).unwrap_or_default();
            let later = held.renew_at.duration_since(first).unwrap_or_default();
            if later <= lasts / TOGETHER {
                held.renew_at = first;
            }
        }
    }

    /// Notes that an entry could not be signed for: when it is tried again. `None` where it is not the entry's fault.
    fn failed(&mut self, entry: &Entry, error: &MintError) -> Option<Duration> {
        let MintError::Entry { .. } = error else { return None };
        let before = self.failed.get(&entry.id).filter(|failed| failed.revision == entry.revision);
        let wait = before.map_or(ENTRY_RETRY, |failed| (failed.wait * 2).min(MAX_ENTRY_RETRY));
        let failed = FailedEntry { revision: entry.revision, again_at: Instant::now() + wait, wait };
        self.failed.insert(entry.id.clone(), failed);
        Some(wait)
    }

    /// For how long it is not tried again.
    fn refused(&self, entry: &Entry) -> Option<Duration> {
        let failed = self.failed.get(&entry.id).filter(|failed| failed.revision == entry.revision)?;
        failed.again_at.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// Forgets the tenth that nobody has asked for the longest and no stream holds, so that the search for it is paid
    /// by many.
    fn make_room(&mut self) {
        let mut idle: Vec<(u64, EntryId)> = self
            .held
            .iter()
            .filter(|(id, _)| !self.streams.contains_key(*id))
            .map(|(id, held)| (held.used, id.clone()))
            .collect();
        idle.sort_unstable();
        let room = idle.len().div_ceil(10);
        for (_, id) in idle.into_iter().take(room) {
            self.held.remove(&id);
        }
    }
}

enum FoundX509 {
    Fresh(Served),
    /// Valid, and due for renewal.
    Due(Served),
    Nothing,
}

/// A stream's hold on the SVIDs it sent.
#[derive(Debug)]
pub struct Hold {
    cache: Arc<X509Cache>,
    ids: Vec<EntryId>,
}

impl Hold {
    /// Whether it is a hold on the SVIDs of just the call's entries.
    pub fn is_of(&self, charged: &Charged) -> bool {
        self.ids.iter().eq(charged.entries().iter().map(|entry| &entry.id))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut table = self.cache.lock();
        for id in &self.ids {
            if let Some(streams) = table.streams.get_mut(id) {
                *streams -= 1;
                if *streams == 0 {
                    table.streams.remove(id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        identity::{KeyType, TrustDomain},
        issuer::{
            embedded::{EmbeddedIssuer, EmbeddedSettings, IssuerSettings},
            metrics::IssuerMetrics,
        },
        telemetry::metrics::Metrics,
    };

    fn issuer(dir: &Path) -> Arc<EmbeddedIssuer> {
        let settings = EmbeddedSettings {
            trust_domain: TrustDomain::parse("td").unwrap(),
            data_dir: dir.join("data"),
            svid_key_type: KeyType::EcP256,
            issuer: IssuerSettings::default(),
        };
        let counted = Arc::new(IssuerMetrics::new(Metrics::default().registry()));
        Arc::new(EmbeddedIssuer::open(settings, Clock::SYSTEM, counted).unwrap())
    }

    #[tokio::test]
    async fn what_calls_that_went_away_began_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let cache = X509Cache::new(issuer(dir.path()), Clock::SYSTEM, 10, None);
        let named = SpiffeId::parse("spiffe://td/web").unwrap();
        let begin =
            |id| Arc::clone(cache.lock().making.entry((EntryId::new(id), 0, named.clone())).or_default());
        let _waited_for = begin("waited for");
        drop(begin("left"));
        cache.due(1, |_| None);
        let left: Vec<String> = cache.lock().making.keys().map(|(id, _, _)| id.to_string()).collect();
        assert_eq!(left, ["waited for"]);
    }

    #[tokio::test]
    async fn of_all_who_ask_meanwhile_one_has_it_signed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = X509Cache::new(issuer(dir.path()), Clock::SYSTEM, 10, None);
        let entry = Entry::asking("unix:uid:1");
        let ask = || cache.of_entry(&entry, AuditedCaller::of_uid(1));
        let herd = futures_util::future::join_all((0..20).map(|_| ask())).await;
        assert_eq!(herd.into_iter().filter(|served| served.as_ref().unwrap().signed).count(), 1);
        assert!(!ask().await.unwrap().signed, "it is there");
    }

    #[test]
    fn an_answer_is_not_repeated_beyond_its_end() {
        let born = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (case, lifetime, renew_in, fresh_for) in
            [("renewed in time", 100, 50, 50), ("renewal put off beyond the end", 100, 104, 100)]
        {
            let svid = Arc::new(X509Svid {
                spiffe_id: SpiffeId::parse("spiffe://td/web").unwrap(),
                chain: Vec::new(),
                key: Vec::new().into(),
                not_before: born,
                not_after: born + Duration::from_secs(lifetime),
            });
            let served = Served { svid, renew_at: born + Duration::from_secs(renew_in), signed: false };
            assert_eq!(served.fresh(), born..born + Duration::from_secs(fresh_for), "{case}");
        }
    }
}
