//! Builds every part from the configuration, binds everything, says ready; reloads; drains.
//!
//! Nothing is served before everything is there: a setting that cannot be put in force keeps the agent from
//! starting. A reload reads, checks and compares before it changes anything; an error keeps all as it was.
//! The order of the end: no new connections, streams told to come back, a bounded wait, and the socket goes
//! last.

mod gate;
mod metrics;
mod probe;
mod run;
mod serving;
mod signals;
mod start;
mod watch;

use std::{path::Path, sync::Arc};

use futures_util::future::OptionFuture;
use tokio::{sync::watch as channel, task::JoinSet};

pub use self::run::{Load, run, runtime, start_log};
use self::{metrics::AgentMetrics, serving::Serving};
use crate::{
    attest::{self, Attestor},
    config::{self, Config},
    limits::{self, Limits},
    peer::ConnectionBounds,
    store::{JwtCache, Policy, Signer, Sync, X509Cache},
    telemetry::{
        health::{HealthState, Probe},
        log::Log,
        metrics::Metrics,
    },
};

/// A running agent.
pub struct Running {
    config: Config,
    signer: Arc<Signer>,
    sync: Arc<Sync>,
    x509: Arc<X509Cache>,
    jwt: Arc<JwtCache>,
    attestor: Arc<Attestor>,
    limits: Limits,
    gate: limits::Gate,
    memory: channel::Sender<watch::Budget>,
    /// What bounds a connection that is accepted from now on.
    connections: channel::Sender<ConnectionBounds>,
    means: gate::Means,
    metrics: Arc<Metrics>,
    series: Arc<AgentMetrics>,
    health: Arc<HealthState>,
    /// `true` begins the drain.
    stop: channel::Sender<bool>,
    public: Serving,
    /// The admin socket, where there is one.
    admin: Option<Serving>,
    /// Ends with the agent.
    tasks: JoinSet<()>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Running {
    /// Where the Workload API is served.
    pub fn socket_path(&self) -> &Path {
        &self.config.socket_path
    }

    /// What is in force.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the agent can serve.
    pub fn health(&self) -> &Arc<HealthState> {
        &self.health
    }

    /// What it counts.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Tells of the lines that `log` loses.
    fn count_lost_lines(&self, log: &Log) {
        let (log, counter) = (log.clone(), self.series.log_lines_lost.clone());
        self.metrics.before_render(move || counter.absolute(log.lines_lost()));
    }

    /// Puts what `next` says in force, for open streams at once; all of it or nothing.
    ///
    /// # Errors
    /// `next` changes something that only a restart can change; nothing is changed then.
    pub fn reload(&mut self, next: Config) -> anyhow::Result<config::Changes> {
        let changes = config::diff(&self.config, &next);
        if !changes.restart.is_empty() {
            let all: Vec<String> = changes.restart.iter().map(ToString::to_string).collect();
            anyhow::bail!("{}", all.join("; "));
        }
        let budget = next.ratelimit.memory.budget(self.means.cgroup);
        // What may still refuse is asked before anything changes.
        limits::Gate::check(&next.ratelimit, self.means.nofile, budget)?;
        self.limits.reload(&next.ratelimit)?;
        self.gate.reload(&next.ratelimit, self.means.nofile, budget)?;
        self.memory.send_replace(watch::Budget { settings: next.ratelimit.memory, bytes: budget });
        let connections = connection_bounds(&next, self.means);
        self.connections.send_if_modified(|old| std::mem::replace(old, connections.clone()) != connections);
        self.x509.reconfigure(next.x509_svid_cache_max_size, next.availability_target);
        self.jwt.resize(next.jwt_svid_cache_max_size);
        self.signer.reconfigure(next.issuer.default_x509_svid_ttl, next.issuer.default_jwt_svid_ttl);
        self.attestor.names_count(names_count(&next));
        self.attestor.reload(next.unix);
        self.sync.replace(next.entries.clone(), next.federated.clone(), policy(&next));
        self.config = next;
        Ok(changes)
    }

    /// Ends when serving has ended by itself, or a task that goes on for ever has: faults. Without the one that
    /// rotates, say, the agent would look well until everything has expired.
    pub async fn failed(&mut self) -> anyhow::Error {
        loop {
            tokio::select! {
                error = self.public.failed() => return error,
                Some(error) = OptionFuture::from(self.admin.as_mut().map(Serving::failed)) => return error,
                // One that ended well is no fault, and the others are still to be watched.
                Some(ended) = self.tasks.join_next() => if let Err(panic) = ended {
                    return anyhow::Error::new(panic).context("a part of the agent ended early");
                },
            }
        }
    }

    /// Drains: no new connections, streams told to come back, at most `drain_timeout`.
    pub async fn shutdown(self) {
        self.health.set(Probe::Draining);
        self.sync.store().drain();
        self.stop.send_replace(true);
        // Both at once: neither waits for the other's time to be over.
        let admin = OptionFuture::from(self.admin.map(Serving::drained));
        let (public, _admin) = tokio::join!(self.public.drained(), admin);
        if let Some(drained) = public {
            tracing::info!(ended = drained.ended, cut = drained.cut, "drained");
        }
    }
}

fn names_count(config: &Config) -> bool {
    config.entries.iter().flat_map(|entry| &entry.selectors).any(attest::unix::needs_name)
}

fn connection_bounds(config: &Config, means: gate::Means) -> ConnectionBounds {
    let budget = config.ratelimit.memory.budget(means.cgroup);
    ConnectionBounds {
        max_lingering: limits::gate::lingering(means.nofile, budget),
        ..ConnectionBounds::new(&config.ratelimit.gate.connection, config.drain_timeout)
    }
}

fn policy(config: &Config) -> Policy {
    Policy {
        allow_unauthenticated_verifiers: config.allow_unauthenticated_verifiers,
        allowed_foreign_jwt_claims: config.allowed_foreign_jwt_claims.iter().cloned().collect(),
        log_selectors: config.log.selectors.clone(),
    }
}
