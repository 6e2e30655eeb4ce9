//! A reload: all of a configuration in force at once, or nothing of it.

use std::sync::Arc;

use super::{
    ANSWERS_WITHIN, Running, connection_bounds,
    gate::{say_what_fits, say_what_is_passed_over, say_whom_to_distrust},
    metrics::ReloadResult,
    start::Adjustable,
};
use crate::{
    api::{proto::admin::ReloadResponse, standing::unmatched},
    config::{self, Changes, Config, EntryChanges},
    telemetry::chain,
};

/// Where the configuration comes from, at start and at each reload: files, environment and command line.
pub type Load = Box<dyn Fn() -> anyhow::Result<Config> + Send + Sync>;

/// A configuration that is about to be replaced. May be sent to another thread for it: that takes a moment where there
/// are many entries.
pub(super) struct Replacing {
    adjustable: Adjustable,
    old: Arc<Config>,
}

impl Replacing {
    /// Puts `next` in force, as [`Replacing::by`].
    ///
    /// # Errors
    /// As [`Running::reload`].
    pub(super) fn with(&self, next: Config) -> anyhow::Result<Reloaded> {
        let changes = self.by(&next)?;
        let unmatched = unmatched(&self.adjustable.parts.writer.store().snapshot());
        Ok(Reloaded { next, changes, unmatched })
    }

    /// Puts `next` in force; all of it or nothing.
    ///
    /// # Errors
    /// As [`Running::reload`].
    pub(super) fn by(&self, next: &Config) -> anyhow::Result<Changes> {
        self.old.drop_ins.check_still_there(&next.drop_ins).map_err(anyhow::Error::msg)?;
        let changes = config::diff(&self.old, next);
        if !changes.restart.is_empty() {
            let all = changes.restart.iter().map(|changed| match next.set_at.of(changed.key) {
                Some(place) => format!("{place}: {changed}"),
                None => changed.to_string(),
            });
            anyhow::bail!("{}", all.collect::<Vec<_>>().join("\n"));
        }
        // Destructured without `..`: what is added must be put in force, or be known to need a restart.
        let Config {
            trust_domain: _,
            agent: _,
            log,
            audit: _,
            policy,
            caches,
            listener: _,
            kubernetes: _,
            issuer: _,
            entries: _,
            federated: _,
            federation_gaps: _,
            passed_over: _,
            drop_ins: _,
            attest,
            prometheus: _,
            metrics_socket: _,
            spire_names: _,
            health: _,
            ratelimit,
            sources: _,
            set_at: _,
        } = next;
        let Adjustable { parts, connections, log: lines } = &self.adjustable;
        let bounds = connection_bounds(next, parts.means);
        let told = next.issuer_input();
        let fitted = parts.means.fit(next)?;
        let in_force = parts.means.in_force(next, &fitted);

        say_what_fits(&in_force);
        say_whom_to_distrust(next);
        say_what_is_passed_over(next);
        // From here on nothing fails. What the entries ask for is looked for before they are there.
        let _asked_until_then = parts.attestor.prepare_for(&told.index);
        parts.attestor.wait(ANSWERS_WITHIN);
        parts.limits.reload(&fitted.limits);
        parts.limits_set.set(in_force);
        parts.gate.reload(fitted.gate);
        connections.send_if_modified(|old| std::mem::replace(old, bounds.clone()) != bounds);
        parts.x509.reconfigure(caches.x509_svids.count(), caches.availability_target);
        parts.jwt.resize(caches.jwt_svids.count());
        parts.attestor.share_by(ratelimit.families.clone(), ratelimit.node.cpu);
        parts.audit.lifetime_is(next.longest_svid_ttl());
        parts.writer.replace(policy.clone(), || {
            // In one snapshot with the entries that are found by these.
            parts.attestor.reload(attest.clone());
            parts.issuer.reload(told);
        });
        if let Some(lines) = lines {
            lines.set_level(log.level);
        }
        Ok(changes)
    }
}

/// A reload that went well.
pub(super) struct Reloaded {
    pub(super) next: Config,
    pub(super) changes: Changes,
    /// Entries that no process of this node can have, in words.
    pub(super) unmatched: Vec<String>,
}

impl Running {
    /// Entries that no process of this node can have, each in one line with why.
    pub fn unmatched_entries(&self) -> Vec<String> {
        unmatched(&self.adjustable.parts.writer.store().snapshot())
    }

    /// Puts what `next` says in force, for open streams at once; all of it or nothing.
    ///
    /// # Errors
    /// `next` changes something that only a restart can change, or asks for more than the node has; nothing is
    /// changed then.
    pub fn reload(&mut self, next: Config) -> anyhow::Result<Changes> {
        let changes = self.replacing().by(&next)?;
        self.config = Arc::new(next);
        Ok(changes)
    }

    /// What is in force now, to be replaced.
    pub(super) fn replacing(&self) -> Replacing {
        Replacing { adjustable: self.adjustable.clone(), old: Arc::clone(&self.config) }
    }
}

/// Takes note of the end of a reload that was asked for, says in log and metrics how it went, and returns what those are told
/// who asked.
pub(super) fn finish(agent: &mut Running, done: anyhow::Result<Reloaded>) -> ReloadResponse {
    let parts = &agent.adjustable.parts;
    let series = &parts.series;
    match done {
        Ok(Reloaded { next, changes, unmatched: warnings }) => {
            series.reloaded(ReloadResult::Ok);
            parts.failed_reload.clear();
            agent.config = Arc::new(next);
            let EntryChanges { added, removed, changed } = changes.entries;
            let bundles = changes.federated.len();
            tracing::info!(
                entries_added = added,
                entries_removed = removed,
                entries_changed = changed,
                bundles_changed = bundles,
                settings_changed = Some(changes.live.join(",")).filter(|keys| !keys.is_empty()),
                "reloaded"
            );
            let number = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
            ReloadResponse {
                error: String::new(),
                entries_added: number(added),
                entries_removed: number(removed),
                entries_changed: number(changed),
                bundles_changed: number(bundles),
                settings_changed: changes.live.iter().map(ToString::to_string).collect(),
                warnings,
            }
        }
        Err(error) => {
            series.reloaded(ReloadResult::Error);
            let error = chain(error.as_ref());
            parts.failed_reload.set(parts.clock.now(), &error);
            tracing::error!(error, "not reloaded; the old configuration stays in force");
            ReloadResponse { error, ..ReloadResponse::default() }
        }
    }
}
