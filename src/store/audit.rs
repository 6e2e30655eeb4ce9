//! Who was given what: one event for each SVID that is made, one for the first time that a connection is given it, and
//! the counts of everything else.
//!
//! An event is a line of the target [`AUDIT`]. It holds what is known of a caller anyway, and
//! never a key or a token: of a token, the first 16 hex digits of its SHA-256.
//!
//! What is given again, and what is refused, is counted by caller, outcome and identity; a line of its own carries
//! the exact count as `times`. So are the events of a user who brings about more than [`MOST_LINES`] of them at once and one a
//! second, with the latest time until which any of these SVIDs is valid: an auditor misses no holder. A line about one process
//! never counts what another did. There are twice [`TOLD_APART`] counts at a time; what comes beyond them is one count for all.
//!
//! Each line has a number, and names the run of the agent that it is of (where it is written), and the first names the run before:
//! whoever reads them sees where some are missing. The first says for how long SVIDs may be valid that were made up to then, in
//! earlier runs too, and so does one an hour and after a change: an auditor learns how far to look back.

use std::{
    collections::{HashMap, hash_map::Entry as MapEntry},
    num::NonZeroU64,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest::{SHA256, digest};
use memchr::memmem;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::Instant;
use tracing::field::display;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{
    audit_notes::AuditNotes,
    audited::{AuditedCaller, AuditedProcess},
};
use crate::{
    identity::{Entry, JwtSvid, SpiffeId, X509Svid, taint},
    limits::{CallerKey, ConnectionRefusal},
    os::clock::Clock,
    peer::Peer,
    telemetry::{log::AUDIT, registry::Label as _},
};

/// What a line is about, in the words that it begins with. Whoever reads the audit knows them from here.
pub mod message {
    pub const SVID_MADE: &str = "svid made";
    pub const SVID_GIVEN: &str = "svid given";
    /// A count, of the process that was given it before.
    pub const SVID_GIVEN_AGAIN: &str = "svid given again";
    /// Counts, of those beyond the lines that a user may have.
    pub const SVIDS_MADE: &str = "svids made";
    pub const SVIDS_GIVEN: &str = "svids given";
    pub const CALL_REFUSED: &str = "call refused";
    pub const CALLS_REFUSED: &str = "calls refused";
    pub const CONNECTION_REFUSED: &str = "connection refused";
    pub const CONNECTIONS_REFUSED: &str = "connections refused";
    /// The count of all for whom there is none of their own.
    pub const OF_FURTHER_CALLERS: &str = "answers and refusals of further callers";
    /// For how long SVIDs may be valid: the first line of a run, and later ones.
    pub const AUDIT_BEGINS: &str = "audit begins";
    pub const AUDIT_GOES_ON: &str = "audit goes on";
    /// The last line of a run that was not killed.
    pub const AUDIT_ENDS: &str = "audit ends";

    /// All of them.
    pub const ALL: [&str; 13] = [
        SVID_MADE,
        SVID_GIVEN,
        SVID_GIVEN_AGAIN,
        SVIDS_MADE,
        SVIDS_GIVEN,
        CALL_REFUSED,
        CALLS_REFUSED,
        CONNECTION_REFUSED,
        CONNECTIONS_REFUSED,
        OF_FURTHER_CALLERS,
        AUDIT_BEGINS,
        AUDIT_GOES_ON,
        AUDIT_ENDS,
    ];
}

/// Events of one user with a line each, at once; one a second comes back.
const MOST_LINES: u32 = 300;
/// Users with a number of lines of their own. The others share one.
const USERS: usize = 256;
/// Counts that are told apart, of what was made and given; and as many of refusals, of which whoever has many users brings
/// about as many kinds as it likes.
const TOLD_APART: usize = 512;
/// The time between two lines that carry one count.
const A_WHILE: Duration = Duration::from_secs(60);
/// The time between two lines that say for how long SVIDs may be valid: whoever reads an hour of lines has one.
const SAID_AGAIN: Duration = Duration::from_secs(50 * 60);
/// Selectors of an entry that stand in a line.
const MOST_SELECTORS: usize = 8;

/// What kind of SVID it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum AuditedSvid {
    X509,
    Jwt,
}

impl AuditedSvid {
    fn text(self) -> &'static str {
        match self {
            Self::X509 => "x509",
            Self::Jwt => "jwt",
        }
    }
}

/// What is counted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum AuditOutcome {
    /// Beyond the lines that its user may have, as the next.
    Made(AuditedSvid, SpiffeId),
    Given(AuditedSvid, SpiffeId),
    GivenAgain(AuditedSvid, SpiffeId),
    Refused(&'static str, &'static str, Option<SpiffeId>),
    NotLetIn(ConnectionRefusal),
}

/// How often something happened.
#[derive(Debug)]
struct AuditCount {
    /// Since the last line about it.
    untold: u64,
    /// When that was.
    told_at: Option<Instant>,
    /// When the first of the untold was; by the clock that dates the lines, too.
    first: Instant,
    since: SystemTime,
    /// The process that all of the untold are about, if it is one.
    by: Option<AuditedProcess>,
    /// Until when any of the SVIDs is valid that the untold are about.
    until: Option<SystemTime>,
}

impl AuditCount {
    fn new(now: Instant) -> Self {
        let since = Clock::SYSTEM.now();
        Self { untold: 0, told_at: None, first: now, since, by: None, until: None }
    }

    fn count(&mut self, by: AuditedProcess, until: Option<SystemTime>, now: Instant) {
        if self.untold == 0 {
            (self.first, self.since, self.by, self.until) = (now, Clock::SYSTEM.now(), Some(by), until);
        }
        self.by = self.by.filter(|same| *same == by);
        self.until = self.until.max(until);
        self.untold = self.untold.saturating_add(1);
    }

    /// Since when something waits to be told.
    fn waits_since(&self) -> Instant {
        self.told_at.unwrap_or(self.first)
    }
}

/// Lines that a user may still have.
#[derive(Clone, Copy, Debug)]
struct AuditLines {
    left: u32,
    at: Instant,
}

impl AuditLines {
    fn new(now: Instant) -> Self {
        Self { left: MOST_LINES, at: now }
    }

    fn refill(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.at).as_secs();
        if seconds > 0 {
            let back = u32::try_from(seconds).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(back).min(MOST_LINES);
            self.at += Duration::from_secs(seconds);
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let is_left = self.left > 0;
        self.left = self.left.saturating_sub(1);
        is_left
    }
}

type AuditCounts = HashMap<(CallerKey, AuditOutcome), AuditCount, ahash::RandomState>;

#[derive(Debug)]
struct AuditTable {
    /// Of what was made and given.
    svids: AuditCounts,
    refusals: AuditCounts,
    /// What happened to those for whom there was no count of their own, and when that was last told.
    others: AuditCount,
    users: HashMap<u64, AuditLines, ahash::RandomState>,
    other_users: AuditLines,
}

impl AuditTable {
    /// Whether an event has a line: its user may have one more. Else it is counted.
    fn has_line(
        &mut self,
        whom: &AuditedCaller,
        outcome: AuditOutcome,
        until: SystemTime,
        now: Instant,
    ) -> bool {
        let has = self.user(whom.family, now).take(now);
        if !has {
            self.count(whom.process, outcome, Some(until), now);
        }
        has
    }

    fn user(&mut self, family: u64, now: Instant) -> &mut AuditLines {
        if !self.users.contains_key(&family) && self.users.len() >= USERS {
            self.users.retain(|_, lines| {
                lines.refill(now);
                lines.left < MOST_LINES
            });
            if self.users.len() >= USERS {
                return &mut self.other_users;
            }
        }
        self.users.entry(family).or_insert_with(|| AuditLines::new(now))
    }

    /// It happened, and is told later. Its count, unless that is the one of all others.
    fn count(
        &mut self,
        by: AuditedProcess,
        outcome: AuditOutcome,
        until: Option<SystemTime>,
        now: Instant,
    ) -> Option<&mut AuditCount> {
        let counts = match outcome {
            AuditOutcome::Made(..) | AuditOutcome::Given(..) | AuditOutcome::GivenAgain(..) => {
                &mut self.svids
            }
            AuditOutcome::Refused(..) | AuditOutcome::NotLetIn(..) => &mut self.refusals,
        };
        let is_full = counts.len() >= TOLD_APART;
        match counts.entry((by.caller, outcome)) {
            MapEntry::Vacant(_) if is_full => {
                self.others.count(by, until, now);
                None
            }
            its_own => {
                let count = its_own.or_insert_with(|| AuditCount::new(now));
                count.count(by, until, now);
                Some(count)
            }
        }
    }

    /// It happened. Told now if it has not been for a while: how often it did since then.
    fn count_or_tell(
        &mut self,
        by: AuditedProcess,
        outcome: AuditOutcome,
        now: Instant,
    ) -> Option<NonZeroU64> {
        let count = self.count(by, outcome, None, now)?;
        if count.told_at.is_some_and(|told| now.saturating_duration_since(told) < A_WHILE) {
            return None;
        }
        count.told_at = Some(now);
        NonZeroU64::new(std::mem::take(&mut count.untold))
    }
}

/// Writes the events, and counts.
#[derive(Debug)]
pub struct AuditTrail {
    table: Mutex<AuditTable>,
    fingerprints: ahash::RandomState,
    /// Somebody was given an SVID.
    has_given: AtomicBool,
    notes: Mutex<AuditNotes>,
    said: Mutex<Option<SaidLifetime>>,
}

/// For how many seconds SVIDs may be valid, as it was said last; 0 where it is not known.
#[derive(Clone, Copy, Debug)]
struct SaidLifetime {
    longest_ttl: u64,
    at: Instant,
}

impl Default for AuditTrail {
    fn default() -> Self {
        let now = Instant::now();
        let table = AuditTable {
            svids: HashMap::default(),
            refusals: HashMap::default(),
            others: AuditCount::new(now),
            users: HashMap::default(),
            other_users: AuditLines::new(now),
        };
        Self {
            table: Mutex::new(table),
            fingerprints: ahash::RandomState::new(),
            has_given: AtomicBool::new(false),
            notes: Mutex::default(),
            said: Mutex::default(),
        }
    }
}

/// So much of the end of a part is looked for: to get ready to look for all of it takes longer than to look through a message.
const END: usize = 16;

/// Looks for parts of a message, most of which are there one behind the other: what is found costs no more than the way to it.
struct HeldInOrder<'a> {
    message: &'a [u8],
    /// Behind the last that was found.
    from: usize,
}

impl HeldInOrder<'_> {
    fn holds(&mut self, part: &[u8]) -> bool {
        // Of keys and certificates it is random, so that none overlaps another.
        let end = part.last_chunk::<END>().map_or(part, <[u8; END]>::as_slice);
        let ends = memmem::Finder::new(end);
        let behind = |from: usize| {
            let rest = self.message.get(from..).unwrap_or_default();
            let mut found = ends.find_iter(rest).map(|at| at + end.len());
            let to = found.find(|to| rest.get(..*to).is_some_and(|before| before.ends_with(part)))?;
            Some(from + to)
        };
        let found = behind(self.from).or_else(|| behind(0));
        self.from = found.unwrap_or(self.from);
        found.is_some()
    }
}

impl AuditTrail {
    /// One that knows from `data_dir` of earlier runs, if it is not new, and leaves its notes there to the next. The directory must
    /// be this agent's by now. SVIDs may be `possible` that are valid for so long, where earlier runs say nothing; `None` where a
    /// server decides that.
    pub fn noting_in(data_dir: &Path, is_new: bool, possible: Option<Duration>) -> Self {
        let notes = AuditNotes::open(data_dir, is_new, possible, Clock::SYSTEM.now());
        Self { notes: Mutex::new(notes), ..Self::default() }
    }

    /// Writes the notes to the disk if they could not be written, and blocks on it. To be called now and then.
    pub fn note_again(&self) {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).write_again();
    }

    fn lock(&self) -> MutexGuard<'_, AuditTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody reads these lines: else nothing is worth a call's time.
    fn is_read() -> bool {
        tracing::enabled!(target: AUDIT, tracing::Level::INFO)
    }

    /// Whether anybody was given an SVID yet.
    pub fn has_given(&self) -> bool {
        self.has_given.load(Relaxed)
    }

    fn note_given(&self) {
        // Written once: a write with each answer would take the line of memory from the other threads each time.
        if !self.has_given() {
            self.has_given.store(true, Relaxed);
        }
    }

    /// Whether `given` is given on this connection for the first time.
    fn is_first(&self, peer: &Peer, given: &[u8]) -> bool {
        peer.is_first_given(self.fingerprints.hash_one(given))
    }

    /// SVIDs may be valid for as long as this from now on; it is not known of those that a server signs. Blocks on the disk.
    pub fn lifetime_is(&self, longest: Option<Duration>) {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = notes.run_before();
        let at = Clock::SYSTEM.now();
        notes.lifetime_is(longest, at);
        self.say_lifetime(notes.longest_ttl_at(at), before.as_deref(), Instant::now());
    }

    fn say_lifetime_again(&self, now: Instant) {
        // Whoever has them waits for the disk, and says it then.
        if let Ok(mut notes) = self.notes.try_lock()
            && self.said.lock().unwrap_or_else(PoisonError::into_inner).is_some()
        {
            self.say_lifetime(notes.longest_ttl_at(Clock::SYSTEM.now()), None, now);
        }
    }

    /// Says for how long SVIDs may be valid, where it has changed or was not said for a while.
    fn say_lifetime(&self, longest_ttl: u64, before: Option<&str>, now: Instant) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let what = match *said {
            None => message::AUDIT_BEGINS,
            Some(last)
                if last.longest_ttl != longest_ttl
                    || now.saturating_duration_since(last.at) >= SAID_AGAIN =>
            {
                message::AUDIT_GOES_ON
            }
            Some(_) => return,
        };
        *said = Some(SaidLifetime { longest_ttl, at: now });
        let longest_ttl = Some(longest_ttl).filter(|seconds| *seconds > 0);
        tracing::info!(target: AUDIT, longest_ttl, before, "{what}");
    }

    /// The longest of what was made up to now and may be valid still, if that is known.
    fn longest_ttl(&self) -> Option<u64> {
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        Some(notes.longest_ttl_at(Clock::SYSTEM.now())).filter(|seconds| *seconds > 0)
    }

    /// An X.509-SVID was made: for a call, or ahead of one.
    pub(super) fn x509_made(&self, svid: &X509Svid, entry: &Entry, whom: Option<AuditedCaller>) {
        let has_line = whom.as_ref().is_none_or(|whom| {
            let outcome = AuditOutcome::Made(AuditedSvid::X509, svid.spiffe_id.clone());
            self.lock().has_line(whom, outcome, svid.not_after, Instant::now())
        });
        if has_line {
            Self::write_x509(message::SVID_MADE, svid, entry, whom);
        }
    }

    /// A JWT-SVID was made, for a call or to renew what one was given.
    pub(super) fn jwt_made(&self, svid: &JwtSvid, entry: &Entry, whom: AuditedCaller) {
        let outcome = AuditOutcome::Made(AuditedSvid::Jwt, svid.spiffe_id.clone());
        if self.lock().has_line(&whom, outcome, svid.expires_at, Instant::now()) {
            Self::write_jwt(message::SVID_MADE, svid, entry, whom);
        }
    }

    /// A call is answered with this token.
    pub(super) fn jwt_given(&self, svid: &JwtSvid, entry: &Entry, peer: &Peer, whom: AuditedCaller) {
        self.note_given();
        if !Self::is_read() {
            return;
        }
        let (id, now) = (svid.spiffe_id.clone(), Instant::now());
        if !self.is_first(peer, svid.token.as_bytes()) {
            let again = AuditOutcome::GivenAgain(AuditedSvid::Jwt, id);
            self.lock().count(whom.process, again, Some(svid.expires_at), now);
            return;
        }
        let given = AuditOutcome::Given(AuditedSvid::Jwt, id);
        if self.lock().has_line(&whom, given, svid.expires_at, now) {
            Self::write_jwt(message::SVID_GIVEN, svid, entry, whom);
        }
    }

    /// A stream is sent `message`, which holds the X.509-SVIDs of these entries. `svids` are those at hand: one that was
    /// renewed meanwhile is not in the message.
    pub(super) fn x509_given(
        &self,
        message: &[u8],
        entries: &[Arc<Entry>],
        svids: impl FnOnce() -> Option<Vec<Arc<X509Svid>>>,
        peer: &Peer,
        whom: AuditedCaller,
    ) {
        self.note_given();
        if !Self::is_read() {
            return;
        }
        let now = Instant::now();
        if !self.is_first(peer, message) {
            // One that was renewed meanwhile is valid no shorter than what was given.
            let svids = svids().unwrap_or_default();
            let mut table = self.lock();
            for (at, entry) in entries.iter().enumerate() {
                let again = AuditOutcome::GivenAgain(AuditedSvid::X509, entry.spiffe_id.clone());
                table.count(whom.process, again, svids.get(at).map(|svid| svid.not_after), now);
            }
            return;
        }
        let svids = svids().unwrap_or_default();
        let mut held = HeldInOrder { message, from: 0 };
        for (at, entry) in entries.iter().enumerate() {
            let given = AuditOutcome::Given(AuditedSvid::X509, entry.spiffe_id.clone());
            match svids.get(at) {
                Some(svid) if svid.chain.first().is_some_and(|leaf| held.holds(leaf)) => {
                    if self.lock().has_line(&whom, given, svid.not_after, now) {
                        Self::write_x509(message::SVID_GIVEN, svid, entry, Some(whom));
                    }
                }
                // Renewed meanwhile: what it was given is valid no longer than this one.
                renewed => {
                    let until = renewed.map(|svid| svid.not_after);
                    self.lock().count(whom.process, given, until, now);
                }
            }
        }
    }

    /// A call of this method ended without an answer, for this reason; `spiffe_id` where it was for the bucket of one.
    pub fn refused(
        &self,
        by: AuditedProcess,
        method: &'static str,
        reason: &'static str,
        spiffe_id: Option<&SpiffeId>,
    ) {
        let outcome = AuditOutcome::Refused(method, reason, spiffe_id.cloned());
        let AuditedProcess { caller, uid, gid, pid } = by;
        if let Some(times) = self.lock().count_or_tell(by, outcome, Instant::now()) {
            let spiffe_id = spiffe_id.map(SpiffeId::as_str);
            tracing::info!(
                target: AUDIT, %caller, uid, gid, pid, method, reason, spiffe_id, times = more(times), "{}",
                message::CALL_REFUSED
            );
        }
    }

    /// A connection was refused at the gate.
    pub fn not_let_in(&self, by: AuditedProcess, why: ConnectionRefusal) {
        if !Self::is_read() {
            return;
        }
        let AuditedProcess { caller, uid, gid, pid } = by;
        let outcome = AuditOutcome::NotLetIn(why);
        if let Some(times) = self.lock().count_or_tell(by, outcome, Instant::now()) {
            let (reason, times) = (why.text(), more(times));
            tracing::info!(target: AUDIT, %caller, uid, gid, pid, reason, times, "{}", message::CONNECTION_REFUSED);
        }
    }

    /// Tells what was counted and has not been told for a while. To be called now and then.
    pub fn settle(&self) {
        let now = Instant::now();
        self.tell(now, |count| now.saturating_duration_since(count.waits_since()) >= A_WHILE);
        self.say_lifetime_again(now);
    }

    /// Tells all that was counted: the agent ends.
    pub fn end(&self) {
        self.tell(Instant::now(), |_| true);
        tracing::info!(target: AUDIT, longest_ttl = self.longest_ttl(), "{}", message::AUDIT_ENDS);
    }

    fn tell(&self, now: Instant, is_due: impl Fn(&AuditCount) -> bool) {
        let mut due = Vec::new();
        let mut table = self.lock();
        let mut keep = |(caller, outcome): &(CallerKey, AuditOutcome), count: &mut AuditCount| {
            if !is_due(count) {
                return true;
            }
            let Some(times) = NonZeroU64::new(std::mem::take(&mut count.untold)) else { return false };
            let told = CountTold { times, by: count.by, until: count.until, since: count.since };
            due.push((*caller, outcome.clone(), told));
            count.told_at = Some(now);
            true
        };
        table.svids.retain(&mut keep);
        table.refusals.retain(keep);
        let others = if is_due(&table.others) { std::mem::take(&mut table.others.untold) } else { 0 };
        if others > 0 {
            table.others.told_at = Some(now);
        }
        drop(table);
        for (caller, outcome, told) in due {
            let times = told.times;
            match outcome {
                AuditOutcome::Made(kind, id) => {
                    Self::write_count(message::SVIDS_MADE, caller, kind, &id, told)
                }
                AuditOutcome::Given(kind, id) => {
                    Self::write_count(message::SVIDS_GIVEN, caller, kind, &id, told)
                }
                AuditOutcome::GivenAgain(kind, id) => {
                    Self::write_count(message::SVID_GIVEN_AGAIN, caller, kind, &id, told);
                }
                AuditOutcome::Refused(method, reason, id) => {
                    let spiffe_id = id.as_ref().map(SpiffeId::as_str);
                    tracing::info!(
                        target: AUDIT, %caller, method, reason, spiffe_id, times, "{}", message::CALLS_REFUSED
                    );
                }
                AuditOutcome::NotLetIn(why) => {
                    let reason = why.text();
                    tracing::info!(target: AUDIT, %caller, reason, times, "{}", message::CONNECTIONS_REFUSED);
                }
            }
        }
        if others > 0 {
            tracing::info!(target: AUDIT, times = others, "{}", message::OF_FURTHER_CALLERS);
        }
    }

    fn write_count(what: &'static str, caller: CallerKey, kind: AuditedSvid, id: &SpiffeId, told: CountTold) {
        let CountTold { times, by, until, since } = told;
        let (kind, spiffe_id) = (kind.text(), id.as_str());
        let (uid, gid, pid) = (by.map(|by| by.uid), by.map(|by| by.gid), by.map(|by| by.pid));
        let since = exact_moment(since);
        let expires = until.and_then(moment);
        tracing::info!(
            target: AUDIT, %caller, uid, gid, pid, kind, spiffe_id, times, since, expires, "{what}"
        );
    }

    fn write_x509(what: &'static str, svid: &X509Svid, entry: &Entry, whom: Option<AuditedCaller>) {
        let leaf = svid.chain.first().and_then(|der| X509Certificate::from_der(der).ok());
        let serial = leaf.map(|(_, leaf)| hex(leaf.raw_serial()));
        let by = whom.map(|whom| whom.process);
        let caller = by.map(|by| display(by.caller));
        let (uid, gid, pid) = (by.map(|by| by.uid), by.map(|by| by.gid), by.map(|by| by.pid));
        tracing::info!(
            target: AUDIT,
            caller,
            uid,
            gid,
            pid,
            kind = AuditedSvid::X509.text(),
            spiffe_id = svid.spiffe_id.as_str(),
            serial,
            expires = moment(svid.not_after),
            selectors = selectors(entry),
            "{what}"
        );
    }

    fn write_jwt(what: &'static str, svid: &JwtSvid, entry: &Entry, whom: AuditedCaller) {
        let sha256 = digest(&SHA256, svid.token.as_bytes());
        let AuditedProcess { caller, uid, gid, pid } = whom.process;
        tracing::info!(
            target: AUDIT,
            %caller,
            uid,
            gid,
            pid,
            kind = AuditedSvid::Jwt.text(),
            spiffe_id = svid.spiffe_id.as_str(),
            kid = taint::kid(&svid.token),
            iat = seconds(svid.issued_at),
            exp = seconds(svid.expires_at),
            token_sha256 = hex(sha256.as_ref().get(..8).unwrap_or_default()),
            selectors = selectors(entry),
            "{what}"
        );
    }
}

/// A count that is told.
struct CountTold {
    times: NonZeroU64,
    by: Option<AuditedProcess>,
    until: Option<SystemTime>,
    /// When the first of them was.
    since: SystemTime,
}

/// How often, where it is more than this once.
fn more(times: NonZeroU64) -> Option<u64> {
    Some(times.get()).filter(|times| *times > 1)
}

fn selectors(entry: &Entry) -> String {
    let texts: Vec<String> = entry.selectors.iter().take(MOST_SELECTORS).map(ToString::to_string).collect();
    texts.join(" ")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// As exactly as the time of a line.
fn exact_moment(at: SystemTime) -> Option<String> {
    let at = OffsetDateTime::from(at);
    at.replace_nanosecond(at.microsecond() * 1000).ok()?.format(&Rfc3339).ok()
}

fn moment(at: SystemTime) -> Option<String> {
    OffsetDateTime::from(at).replace_nanosecond(0).ok()?.format(&Rfc3339).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(path: &str) -> AuditOutcome {
        AuditOutcome::Given(AuditedSvid::Jwt, SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap())
    }

    /// Whatever a user does, its lines are few, and no answer is missing from the counts.
    #[tokio::test(start_paused = true)]
    async fn lines_are_bounded_and_counts_exact() {
        let trail = AuditTrail::default();
        let until = |n: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(n);
        let mut lines = 0;
        for _ in 0..20 {
            for n in 0..1_000 {
                let (whom, outcome) = (AuditedCaller::of_uid(7), given(&format!("{}", n % 3)));
                lines += u64::from(trail.lock().has_line(&whom, outcome, until(n), Instant::now()));
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(lines, 300 + 19);
        let rest: u64 = trail.lock().svids.values().map(|count| count.untold).sum();
        assert_eq!(lines + rest, 20_000);
        let ends: Vec<_> = trail.lock().svids.values().filter_map(|count| count.until).collect();
        assert_eq!(ends.into_iter().max(), Some(until(999)), "the latest end is kept");
        let other = AuditedCaller::of_uid(8);
        assert!(trail.lock().has_line(&other, given("0"), until(1), Instant::now()), "others have theirs");
    }

    /// A count is told a minute after its first, however steadily it goes on, and names the process if there was one alone.
    #[tokio::test(start_paused = true)]
    async fn a_steady_count_is_told_in_time_and_of_whom() {
        let trail = AuditTrail::default();
        let (one, other) =
            (AuditedCaller::of_uid(7).process, AuditedProcess { pid: 2, ..AuditedCaller::of_uid(7).process });
        for second in 0..61 {
            trail.lock().count(one, given("0"), None, Instant::now());
            trail.lock().count(if second < 60 { one } else { other }, given("1"), None, Instant::now());
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let by = |path: &str| {
            trail.lock().svids.get(&(one.caller, given(path))).map(|count| count.by.map(|by| by.pid))
        };
        assert_eq!((by("0"), by("1")), (Some(Some(1)), Some(None)));
        trail.settle();
        assert!(trail.lock().svids.values().all(|count| count.untold == 0), "all is told");
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_a_line_a_minute() {
        let trail = AuditTrail::default();
        let mut lines = Vec::new();
        for second in 0..130 {
            for _ in 0..10 {
                let outcome = AuditOutcome::Refused("FetchJWTSVID", "rate", None);
                let told =
                    trail.lock().count_or_tell(AuditedCaller::of_uid(7).process, outcome, Instant::now());
                lines.extend(told.map(|times| (second, times.get())));
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(lines, [(0, 1), (60, 600), (120, 600)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_crowd_is_counted_as_one_where_there_is_no_more_room() {
        let trail = AuditTrail::default();
        let mut told = 0;
        for uid in 0..10_000 {
            let outcome = AuditOutcome::Refused("FetchJWTSVID", "rate", None);
            let times =
                trail.lock().count_or_tell(AuditedCaller::of_uid(uid).process, outcome, Instant::now());
            told += times.map_or(0, NonZeroU64::get);
        }
        assert_eq!(trail.lock().refusals.len(), TOLD_APART);
        assert_eq!(told + trail.lock().others.untold, 10_000);
        // What somebody else is given stands apart all the same.
        let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
        let process = AuditedCaller::of_uid(7).process;
        trail.lock().count(process, AuditOutcome::GivenAgain(AuditedSvid::Jwt, id), None, Instant::now());
        assert_eq!(trail.lock().svids.len(), 1);
        assert_eq!(told + trail.lock().others.untold, 10_000);
        tokio::time::advance(A_WHILE).await;
        trail.settle();
        assert_eq!(trail.lock().others.untold, 0);
        tokio::time::advance(A_WHILE).await;
        trail.settle();
        assert_eq!(trail.lock().refusals.len(), 0, "what is over is forgotten");
        assert_eq!(trail.lock().svids.len(), 0, "what is over is forgotten");
    }
}
