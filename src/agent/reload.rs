//! A reload: all of a configuration in force at once, or nothing of it.

use super::{ANSWERS_WITHIN, Running, connection_bounds, metrics::ReloadResult, watch::Budget};
use crate::{
    config::{self, Config, EntryChanges},
    limits::GatePlan,
};

/// Where the configuration comes from, at start and at each reload: files, environment and command line.
pub type Load = Box<dyn Fn() -> anyhow::Result<Config> + Send + Sync>;

impl Running {
    /// Puts what `next` says in force, for open streams at once; all of it or nothing.
    ///
    /// # Errors
    /// `next` changes something that only a restart can change, or asks for more than the node has; nothing is
    /// changed then.
    pub fn reload(&mut self, next: Config) -> anyhow::Result<config::Changes> {
        let changes = config::diff(&self.config, &next);
        if !changes.restart.is_empty() {
            let all: Vec<String> = changes.restart.iter().map(ToString::to_string).collect();
            anyhow::bail!("{}", all.join("; "));
        }
        // Destructured without `..`: what is added must be put in force, or be known to need a restart.
        let Config {
            trust_domain: _,
            agent: _,
            log,
            policy,
            caches,
            listener: _,
            kubernetes: _,
            issuer: _,
            entries: _,
            federated: _,
            attest,
            prometheus: _,
            health: _,
            ratelimit,
        } = &next;
        let parts = &self.parts;
        let budget = Budget::of(&next, parts.means);
        let connections = connection_bounds(&next, parts.means);
        let told = next.issuer_input();
        let gate_plan = GatePlan::new(ratelimit, parts.means.nofile, budget.bytes)?;

        // From here on nothing fails. What the entries ask for is looked for before they are there.
        let _asked_until_then = parts.attestor.prepare_for(&told.index);
        parts.attestor.wait(ANSWERS_WITHIN);
        parts.limits.reload(ratelimit);
        parts.gate.reload(gate_plan);
        self.memory.send_replace(budget);
        self.connections.send_if_modified(|old| std::mem::replace(old, connections.clone()) != connections);
        parts.x509.reconfigure(caches.x509_svids.count(), caches.availability_target);
        parts.jwt.resize(caches.jwt_svids.count());
        parts.attestor.share_by(ratelimit.families.clone());
        parts.attestor.reload(attest.clone());
        parts.writer.replace(policy.clone(), || parts.issuer.reload(told));
        if let Some(lines) = &self.log {
            lines.set_level(log.level);
        }
        self.config = next;
        Ok(changes)
    }
}

/// Reads the configuration again, as a signal asked for, and says in log and metrics how it went.
pub(super) fn on_signal(
    agent: &mut Running,
    load: impl FnOnce() -> anyhow::Result<Config>,
) -> anyhow::Result<()> {
    // On this thread: the workers serve meanwhile.
    let done = tokio::task::block_in_place(load).and_then(|next| agent.reload(next));
    match done {
        Ok(changes) => {
            agent.parts.series.reloaded(ReloadResult::Ok);
            let EntryChanges { added, removed, changed } = changes.entries;
            tracing::info!(
                entries_added = added,
                entries_removed = removed,
                entries_changed = changed,
                bundles_changed = changes.federated.len(),
                settings_changed = changes.live.join(","),
                "reloaded"
            );
            Ok(())
        }
        Err(error) => {
            agent.parts.series.reloaded(ReloadResult::Error);
            tracing::error!(error = format!("{error:#}"), "not reloaded; everything stays as it was");
            Err(error)
        }
    }
}
