//! How the agent is, for its owner: what signs, what is held, which limits are set, the entries in force and the bundles.
//!
//! Answers are bounded: entries come a page at a time. No key and no token is in one.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::SystemTime,
};

use tokio::sync::watch;
use tonic::Status;

use super::proto::admin as pb;
use crate::{
    attest::Questions,
    identity::{Bundle, Entry, Selector, TrustDomain, bundle::Edition},
    issuer::{Issuer, SvidKind},
    limits::{LimitsInForce, beyond_budget::BeyondBudget},
    peer::ConnectionStats,
    store::{JwtCache, Snapshot, Store, X509Cache},
    telemetry::{
        chain,
        health::{HealthState, Lost, Probe},
        log::Log,
        registry::Label as _,
    },
};

/// The most entries of one answer.
const MOST_ENTRIES: u32 = 500;

/// Mistakes of a failed reload that are kept, and the characters of each.
const MOST_MISTAKES: usize = 3;
const MOST_OF_A_MISTAKE: usize = 300;

/// What is set about limits; a reload changes it. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct SharedLimits(Arc<Mutex<LimitsInForce>>);

impl SharedLimits {
    /// This is in force from now on.
    pub fn set(&self, in_force: LimitsInForce) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = in_force;
    }

    fn get(&self) -> LimitsInForce {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// When and why the last reload failed, if it did. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct FailedReload(Arc<Mutex<Option<ReloadFailure>>>);

/// When a reload failed, and its first mistakes.
type ReloadFailure = (SystemTime, Vec<String>);

impl FailedReload {
    /// The last reload ended well.
    pub fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The last reload failed at this time; `why` is a mistake a line.
    pub fn set(&self, at: SystemTime, why: &str) {
        let mut lines: Vec<String> = why
            .lines()
            .take(MOST_MISTAKES)
            .map(|line| line.chars().take(MOST_OF_A_MISTAKE).collect())
            .collect();
        let more = why.lines().count().saturating_sub(lines.len());
        lines.extend((more > 0).then(|| format!("and {more} more: durward reload says all")));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((at, lines));
    }

    fn get(&self) -> Option<ReloadFailure> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Whom to ask how the agent is.
pub struct AgentStanding {
    pub store: Arc<Store>,
    /// Who signs.
    pub issuer: Arc<dyn Issuer>,
    /// The X.509-SVIDs that are kept.
    pub x509: Arc<X509Cache>,
    /// The JWT-SVIDs that are kept.
    pub jwt: Arc<JwtCache>,
    pub health: Arc<HealthState>,
    /// Of the public socket.
    pub connections: Arc<ConnectionStats>,
    pub limits: SharedLimits,
    pub failed_reload: FailedReload,
    /// The log of the process, once it is known.
    pub log: Arc<OnceLock<Log>>,
    pub started: SystemTime,
    /// Where the Workload API is served.
    pub socket_path: PathBuf,
    /// Whether callers are looked for in pods.
    pub kubernetes: bool,
    /// What was found a few seconds ago in spite of which the agent serves, in words.
    pub found: watch::Receiver<Vec<String>>,
}

impl AgentStanding {
    /// How it is; `attestors_wrong` is what keeps attestors from telling who callers are.
    pub(super) fn status(&self, attestors_wrong: Vec<String>) -> pb::StatusResponse {
        let snapshot = self.store.snapshot();
        let (due, refused) = self.x509.waited_for();
        let limits = self.limits.get();
        let (failed_at, reload_errors) = self.failed_reload.get().unzip();
        let log = self.log.get();
        let (last_error, failing_since) = self.issuer.rotation_fault().unzip();
        pb::StatusResponse {
            trust_domain: snapshot.bundles.own.trust_domain.to_string(),
            entries: count(snapshot.index.entries().len()),
            bundles: count(snapshot.bundles.federated.len() + 1),
            x509_svids: count(self.x509.counts().cached),
            x509_svids_due: count(due),
            x509_svids_refused: count(refused),
            not_ready: self.not_ready(),
            server: self.server(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            jwt_svids: count(self.jwt.len()),
            ca: self.issuer.ca().map(|ca| pb::CaStatus {
                x509_from: unix(ca.x509.0),
                x509_until: unix(ca.x509.1),
                jwt_from: unix(ca.jwt.0),
                jwt_until: unix(ca.jwt.1),
                last_error: last_error.unwrap_or_default(),
                failing_since: failing_since.map_or(0, unix),
            }),
            started: unix(self.started),
            pid: std::process::id().try_into().unwrap_or_default(),
            socket_path: self.socket_path.to_string_lossy().into_owned(),
            kubernetes: self.kubernetes,
            limits_set: limits.set,
            budget_from: limits.budget_from.to_owned(),
            millicores: limits.millicores,
            dry_run: limits.dry_run,
            limits_wrong: limits.wrong.iter().map(ToString::to_string).collect(),
            streams: self.connections.streams(),
            parked: self.connections.parked(),
            surroundings: self.found_in_spite_of(&limits.fewer_served),
            attestors_wrong,
            reload_failed: failed_at.map_or(0, unix),
            reload_errors: reload_errors.unwrap_or_default(),
            log_lines_lost: log.map_or(0, Log::lines_lost),
            audit: log.map(Log::audit_place).unwrap_or_default(),
            audit_untaken: log.is_some_and(|log| log.audit_untaken().is_some()),
            // Of a server's entries others may be for another node.
            entries_unmatched: self.issuer.server().map_or_else(|| unmatched(&snapshot), |_| Vec::new()),
        }
    }

    fn found_in_spite_of(&self, fewer_served: &[BeyondBudget]) -> Vec<String> {
        let found = self.found.borrow();
        let fewer = fewer_served.iter().map(ToString::to_string);
        found.iter().cloned().chain(fewer).chain(self.full_connections()).collect()
    }

    /// What is to be said of connections whose clients keep calls to themselves.
    fn full_connections(&self) -> Option<String> {
        let full = self.connections.full();
        (full > 0).then(|| {
            format!(
                "connections with all the streams open that they may have (ratelimit.gate.connection.streams): {full}; further \
                 calls wait in their clients"
            )
        })
    }

    fn server(&self) -> Option<pb::ServerStatus> {
        self.issuer.server().map(|server| {
            let (agent_id, ends) = server.agent.unzip();
            let (waits_for, since) = server.waits_for.unzip();
            let (last_error, failing_since) = server.last_error.unzip();
            pb::ServerStatus {
                address: server.address,
                agent_id: agent_id.map(|id| id.to_string()).unwrap_or_default(),
                agent_svid_ends: ends.map_or(0, unix),
                last_sync: server.last_sync.map_or(0, unix),
                waits_for: waits_for.unwrap_or_default(),
                waits_since: since.map_or(0, unix),
                last_error: last_error.unwrap_or_default(),
                failing_since: failing_since.map_or(0, unix),
            }
        })
    }

    fn not_ready(&self) -> String {
        let why = SvidKind::VALUES.iter().find_map(|kind| self.issuer.can_sign(*kind).err());
        match why {
            _ if self.health.get() == Probe::Draining => "the agent is about to end".to_owned(),
            Some(why) => chain(&why),
            None if self.health.ready() => String::new(),
            None if self.health.lost() != Lost::No => format!(
                "the socket {} is gone, and nobody can connect: restart the agent, or the socket unit that made it",
                self.socket_path.display()
            ),
            // The server has answered since the probe looked: callers are served.
            None if self.health.get() == Probe::Starting => {
                self.health.ungiven().map(|why| why.said).unwrap_or_default()
            }
            None => {
                let otherwise = || "callers cannot be served or told apart: see the log".to_owned();
                self.health.ungiven().map_or_else(otherwise, |why| why.said)
            }
        }
    }

    /// Who the agent is to its server, where there is one.
    pub(super) fn agent_id(&self) -> Option<String> {
        let (id, _) = self.issuer.server()?.agent?;
        Some(id.to_string())
    }

    /// Why it is not known yet which entries and bundles there are, if that is so: nothing then says who gets what.
    pub(super) fn not_known(&self) -> Option<String> {
        let server = self.issuer.server().filter(|server| server.last_sync.is_none())?;
        let why = server.waits_for.or(server.last_error).map(|(why, _)| why).unwrap_or_default();
        let colon = if why.is_empty() { "" } else { ": " };
        Some(format!(
            "{NOT_KNOWN}, since the SPIRE Server {} has not told them since the agent started{colon}{why}",
            server.address
        ))
    }

    pub(super) fn entries(&self, asked: &pb::EntriesRequest) -> Result<pb::EntriesResponse, Status> {
        if let Some(why) = self.not_known() {
            return Err(Status::unavailable(why));
        }
        let snapshot = self.store.snapshot();
        let fits = |entry: &&Arc<Entry>| {
            asked.spiffe_id.is_empty() || entry.spiffe_id.to_string() == asked.spiffe_id
        };
        let total = snapshot.index.entries().iter().filter(fits).count();
        let most = if asked.most == 0 { MOST_ENTRIES } else { asked.most.min(MOST_ENTRIES) };
        let skip = usize::try_from(asked.skip).unwrap_or(usize::MAX);
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        let page = snapshot.index.entries().iter().filter(fits).skip(skip).take(most);
        let entries: Vec<_> = page.map(|entry| detail(entry, &snapshot.questions)).collect();
        let more = skip.saturating_add(entries.len()) < total;
        Ok(pb::EntriesResponse { entries, more, total: count(total) })
    }

    pub(super) fn bundle(&self, trust_domain: &str) -> Result<pb::BundleResponse, Status> {
        let snapshot = self.store.snapshot();
        let asked = match trust_domain {
            "" => Ok(snapshot.bundles.own.trust_domain.clone()),
            name => TrustDomain::parse(name.strip_prefix("spiffe://").unwrap_or(name)),
        };
        let asked = asked.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let known = snapshot.bundles.of(&asked).cloned();
        let own = self.issuer.ca().filter(|ca| ca.bundle.trust_domain == asked);
        let (bundle, edition) = match (own, known) {
            (Some(ca), _) => (ca.bundle, Some(ca.edition)),
            (None, Some(bundle)) if !bundle.x509_authorities.is_empty() => (bundle, None),
            (None, found) => {
                if let Some(why) = self.not_known() {
                    return Err(Status::unavailable(why));
                }
                if let Some(bundle) = found {
                    return bundle_response(&bundle, None);
                }
                return Err(Status::not_found(format!("no bundle of trust domain {asked} is known")));
            }
        };
        bundle_response(&bundle, edition)
    }
}

/// How the text begins where entries and bundles are not known yet, by which the command tells it.
pub const NOT_KNOWN: &str = "entries and bundles are not known yet";

fn bundle_response(bundle: &Bundle, edition: Option<Edition>) -> Result<pb::BundleResponse, Status> {
    let spiffe_json = bundle.to_spiffe_json(edition).map_err(|error| Status::internal(chain(&error)))?;
    Ok(pb::BundleResponse {
        trust_domain: bundle.trust_domain.to_string(),
        x509_authorities: bundle.x509_authorities.clone(),
        spiffe_json,
    })
}

/// Seconds since 1970; 0 for what is before.
fn unix(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn count(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

fn detail(entry: &Entry, questions: &Questions) -> pb::EntryDetail {
    let selectors: Vec<Selector> = entry.selectors.iter().cloned().collect();
    pb::EntryDetail {
        entry: Some(entry_of(entry, String::new())),
        absent: absent(&selectors, questions),
        selectors: selectors.iter().map(ToString::to_string).collect(),
        x509_svid_ttl: entry.x509_svid_ttl.map_or(0, |ttl| ttl.as_secs()),
        jwt_svid_ttl: entry.jwt_svid_ttl.map_or(0, |ttl| ttl.as_secs()),
        dns_names: entry.dns_names.clone(),
        federates_with: entry.federates_with.iter().map(ToString::to_string).collect(),
    }
}

/// How many entries are named that no process can have.
const MOST_UNMATCHED: usize = 8;

/// The entries that no process of this node can have, each in one line with why; beyond [`MOST_UNMATCHED`] their number.
pub fn unmatched(snapshot: &Snapshot) -> Vec<String> {
    let (mut told, mut more) = (Vec::new(), 0_usize);
    for entry in snapshot.index.entries() {
        let mut absent =
            entry.selectors.iter().filter_map(|it| snapshot.questions.absent(it).map(|why| (it, why)));
        match absent.next() {
            Some((selector, why)) if told.len() < MOST_UNMATCHED => {
                told.push(format!("entry \"{}\" asks for {selector}: {why}", entry.spiffe_id));
            }
            Some(_) => more += 1,
            None => {}
        }
    }
    told.extend((more > 0).then(|| format!("and {more} more entries: durward entry show")));
    told
}

/// Those of the selectors that no process of this node can have, each with why.
pub(super) fn absent(selectors: &[Selector], questions: &Questions) -> Vec<String> {
    selectors.iter().filter_map(|it| questions.absent(it).map(|why| format!("{it}: {why}"))).collect()
}

pub(super) fn entry_of(entry: &Entry, withheld: String) -> pb::Entry {
    pb::Entry {
        spiffe_id: entry.spiffe_id.to_string(),
        entry_id: entry.id.to_string(),
        hint: entry.hint.to_string(),
        withheld,
    }
}
