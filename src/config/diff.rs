//! What a reload would change, and what it may not.
//!
//! A reload with any change in [`Changes::restart`] must change nothing at all: half of a file in force is what nobody
//! wrote.

use std::{collections::HashMap, fmt, path::PathBuf, sync::Arc, time::Duration};

use super::{Config, Health, HostPort, Log};
use crate::hcl::{show_duration, tree::quoted};
use crate::{
    attest,
    identity::{Entry, EntryId, KeyType, TrustDomain},
    issuer::embedded::{CaSource, EmbeddedSettings},
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

/// A key that was changed, but is only read at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestartOnly {
    /// `agent.socket_path`.
    pub key: &'static str,
    /// Its value now.
    pub old: String,
    /// Its value in the file.
    pub new: String,
}

impl fmt::Display for RestartOnly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, old, new } = self;
        write!(f, "{key}: is {old} and cannot become {new} by a reload: restart to change it")
    }
}

impl Changes {
    /// Whether the two were the same.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The values are compared as they are shown, so `show` must tell any two apart.
    fn restart<T: ?Sized>(&mut self, key: &'static str, old: &T, new: &T, show: fn(&T) -> String) {
        let (old, new) = (show(old), show(new));
        if old != new {
            self.restart.push(RestartOnly { key, old, new });
        }
    }

    fn live<T: PartialEq>(&mut self, key: &'static str, old: &T, new: &T) {
        if old != new {
            self.live.push(key);
        }
    }
}

/// What changes from `old` to `new`.
// Destructured without `..`: a new field must say whether it reloads.
pub fn diff(old: &Config, new: &Config) -> Changes {
    let Config {
        trust_domain,
        socket_path,
        admin_socket_path,
        data_dir,
        log,
        issuer,
        entries,
        federated,
        unix,
        allow_unauthenticated_verifiers,
        allowed_foreign_jwt_claims,
        availability_target,
        x509_svid_cache_max_size,
        jwt_svid_cache_max_size,
        prometheus,
        health,
        drain_timeout,
        ratelimit,
        kubernetes,
    } = old;
    let mut c = Changes::default();
    c.restart("agent.trust_domain", trust_domain, &new.trust_domain, TrustDomain::to_string);
    c.restart("agent.socket_path", socket_path, &new.socket_path, path);
    c.restart("agent.admin_socket_path", admin_socket_path, &new.admin_socket_path, maybe_path);
    c.restart("agent.data_dir", data_dir, &new.data_dir, path);
    diff_log(&mut c, log, &new.log);
    diff_issuer(&mut c, issuer, &new.issuer);
    diff_unix(&mut c, *unix, new.unix);
    c.live(
        "agent.allow_unauthenticated_verifiers",
        allow_unauthenticated_verifiers,
        &new.allow_unauthenticated_verifiers,
    );
    c.live("agent.allowed_foreign_jwt_claims", allowed_foreign_jwt_claims, &new.allowed_foreign_jwt_claims);
    c.live("agent.availability_target", availability_target, &new.availability_target);
    c.live("agent.x509_svid_cache_max_size", x509_svid_cache_max_size, &new.x509_svid_cache_max_size);
    c.live("agent.jwt_svid_cache_max_size", jwt_svid_cache_max_size, &new.jwt_svid_cache_max_size);
    c.restart("telemetry.Prometheus", prometheus, &new.prometheus, |at| {
        at.as_ref().map_or_else(none, address)
    });
    diff_health(&mut c, health.as_ref(), new.health.as_ref());
    c.live("agent.listener.drain_timeout", drain_timeout, &new.drain_timeout);

    c.live("ratelimit", ratelimit, &new.ratelimit);
    c.restart("agent.kubernetes", kubernetes, &new.kubernetes, |it| format!("{it:?}"));

    c.entries = diff_entries(entries, &new.entries);
    let mut touched: Vec<TrustDomain> = federated.keys().chain(new.federated.keys()).cloned().collect();
    touched.sort();
    touched.dedup();
    touched.retain(|name| federated.get(name) != new.federated.get(name));
    c.federated = touched;
    c
}

fn none() -> String {
    "not set".to_owned()
}

fn path(path: &PathBuf) -> String {
    format!("{path:?}")
}

fn maybe_path(at: &Option<PathBuf>) -> String {
    at.as_ref().map_or_else(none, path)
}

fn duration(duration: &Duration) -> String {
    show_duration(*duration)
}

fn key_type(key_type: &KeyType) -> String {
    key_type.name().to_owned()
}

fn address(HostPort { host, port }: &HostPort) -> String {
    format!("{host}:{port}")
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

fn diff_log(c: &mut Changes, old: &Log, new: &Log) {
    let Log { level, format, file, source_location, selectors } = old;
    c.live("agent.log_level", level, &new.level);
    c.restart("agent.log_format", format, &new.format, |format| format!("{format:?}").to_ascii_lowercase());
    c.restart("agent.log_file", file, &new.file, maybe_path);
    c.restart("agent.log_source_location", source_location, &new.source_location, bool::to_string);
    c.live("agent.log_selectors", selectors, &new.selectors);
}

fn diff_unix(c: &mut Changes, old: attest::unix::Settings, new: attest::unix::Settings) {
    let attest::unix::Settings { discover_workload_path, workload_size_limit } = old;
    c.live(
        "plugins.WorkloadAttestor \"unix\".plugin_data.discover_workload_path",
        &discover_workload_path,
        &new.discover_workload_path,
    );
    c.live(
        "plugins.WorkloadAttestor \"unix\".plugin_data.workload_size_limit",
        &workload_size_limit,
        &new.workload_size_limit,
    );
}

fn diff_issuer(c: &mut Changes, old: &EmbeddedSettings, new: &EmbeddedSettings) {
    let EmbeddedSettings {
        trust_domain: _, // agent.trust_domain, compared above
        data_dir: _,     // agent.data_dir, likewise
        ca,
        ca_ttl,
        ca_key_type,
        jwt_key_type,
        svid_key_type,
        jwt_issuer,
        default_x509_svid_ttl,
        default_jwt_svid_ttl,
    } = old;
    let paths = |ca: &CaSource| match ca {
        CaSource::SelfSigned => None,
        CaSource::Supplied { cert, key } => Some((cert.clone(), key.clone())),
    };
    let ((cert, key), (new_cert, new_key)) = (paths(ca).unzip(), paths(&new.ca).unzip());
    c.restart("issuer \"embedded\".ca_cert_path", &cert, &new_cert, maybe_path);
    c.restart("issuer \"embedded\".ca_key_path", &key, &new_key, maybe_path);
    c.restart("issuer \"embedded\".ca_ttl", &ca_ttl.get(), &new.ca_ttl.get(), duration);
    c.restart("issuer \"embedded\".ca_key_type", ca_key_type, &new.ca_key_type, key_type);
    c.restart("issuer \"embedded\".jwt_key_type", jwt_key_type, &new.jwt_key_type, key_type);
    c.restart("agent.workload_x509_svid_key_type", svid_key_type, &new.svid_key_type, key_type);
    c.restart("issuer \"embedded\".jwt_issuer", jwt_issuer, &new.jwt_issuer, |name| {
        name.as_deref().map_or_else(none, quoted)
    });
    c.live("issuer \"embedded\".default_x509_svid_ttl", default_x509_svid_ttl, &new.default_x509_svid_ttl);
    c.live("issuer \"embedded\".default_jwt_svid_ttl", default_jwt_svid_ttl, &new.default_jwt_svid_ttl);
}

fn diff_health(c: &mut Changes, old: Option<&Health>, new: Option<&Health>) {
    let (Some(old), Some(new)) = (old, new) else {
        let is_on = |health: &Option<&Health>| if health.is_some() { "on" } else { "off" }.to_owned();
        c.restart("health_checks", &old, &new, is_on);
        return;
    };
    let Health { bind, live_path, ready_path } = old;
    c.restart("health_checks.bind_address", bind, &new.bind, address);
    c.restart("health_checks.live_path", live_path, &new.live_path, |path| quoted(path));
    c.restart("health_checks.ready_path", ready_path, &new.ready_path, |path| quoted(path));
}
