//! What a reload would change, and what it may not.
//!
//! A reload with any change in [`Changes::restart`] must change nothing at all: half of a file in force is what nobody
//! wrote.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::document::Config;
use crate::{
    hcl::{
        RestartOnly,
        settings::{KeyChanges, Shown},
    },
    identity::{Bundle, Entry, EntryId, TrustDomain},
    telemetry::HealthSettings,
};

/// The difference between two configurations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// What only a restart changes. When there is any, the reload is refused and everything stays as it was.
    pub restart: Vec<RestartOnly>,
    /// Keys whose change takes effect at once, as `agent.log_level`; entries and bundles are counted below.
    pub live: Vec<&'static str>,
    /// Of the registration entries.
    pub entries: EntryChanges,
    /// Trust domains whose federated bundle came, went or changed.
    pub federated: Vec<TrustDomain>,
}

/// How many entries differ. The same entry at another place in the files is no difference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EntryChanges {
    /// New IDs.
    pub added: usize,
    /// IDs that are gone.
    pub removed: usize,
    /// Same ID, other revision.
    pub changed: usize,
}

impl Changes {
    /// Whether the two were the same.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What changes from `old` to `new`.
// Destructured without `..`: what is added must be compared.
pub fn diff(old: &Config, new: &Config) -> Changes {
    let Config {
        trust_domain,
        agent,
        log,
        audit,
        policy,
        caches,
        listener,
        kubernetes,
        issuer,
        entries,
        federated,
        attest,
        prometheus,
        metrics_socket,
        spire_names,
        health,
        ratelimit,
        federation_gaps: _,
        passed_over: _,
        drop_ins: _,
        sources: _,
        set_at: _,
    } = old;
    let mut keys = KeyChanges::default();
    keys.needs_restart("agent.trust_domain", trust_domain, &new.trust_domain);
    agent.compare(&new.agent, &mut keys);
    log.compare(&new.log, &mut keys);
    audit.compare(&new.audit, &mut keys);
    policy.compare(&new.policy, &mut keys);
    caches.compare(&new.caches, &mut keys);
    listener.compare(&new.listener, &mut keys);
    kubernetes.compare(&new.kubernetes, &mut keys);
    issuer.compare(&new.issuer, &mut keys);
    attest.compare(&new.attest, &mut keys);
    keys.needs_restart("telemetry.Prometheus", prometheus, &new.prometheus);
    keys.needs_restart("telemetry.Prometheus.socket_path", metrics_socket, &new.metrics_socket);
    spire_names.compare(&new.spire_names, &mut keys);
    diff_health(&mut keys, health, &new.health);
    keys.reloads("ratelimit", ratelimit, &new.ratelimit);
    let KeyChanges { restart, live } = keys;
    let entries = diff_entries(entries, &new.entries);
    Changes { restart, live, entries, federated: diff_bundles(federated, &new.federated) }
}

impl Shown for TrustDomain {
    fn shown(&self) -> String {
        self.to_string()
    }
}

fn diff_bundles(
    old: &BTreeMap<TrustDomain, Arc<Bundle>>,
    new: &BTreeMap<TrustDomain, Arc<Bundle>>,
) -> Vec<TrustDomain> {
    let names: BTreeSet<&TrustDomain> = old.keys().chain(new.keys()).collect();
    names.into_iter().filter(|name| old.get(name) != new.get(name)).cloned().collect()
}

fn diff_entries(old: &[Arc<Entry>], new: &[Arc<Entry>]) -> EntryChanges {
    let mut before: HashMap<&EntryId, i64> = old.iter().map(|entry| (&entry.id, entry.revision)).collect();
    let mut changes = EntryChanges::default();
    for entry in new {
        match before.remove(&entry.id) {
            None => changes.added += 1,
            Some(revision) if revision != entry.revision => changes.changed += 1,
            Some(_) => {}
        }
    }
    changes.removed = before.len();
    changes
}

/// Whether the endpoint is there is told as one; of one that is not, nothing is compared.
fn diff_health(keys: &mut KeyChanges, old: &HealthSettings, new: &HealthSettings) {
    if old.is_served() && new.is_served() {
        old.compare(new, keys);
    } else if old.is_served() != new.is_served() {
        let is = |health: &HealthSettings| if health.is_served() { "on" } else { "off" }.to_owned();
        keys.restart.push(RestartOnly { key: "health_checks", old: is(old), new: is(new) });
    }
}
