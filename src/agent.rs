//! Builds every part from the configuration, binds everything, says ready; reloads; drains.
//!
//! Nothing is served before everything is there: a setting that cannot be put in force keeps the agent from
//! starting. A reload reads, checks and compares before it changes anything; an error keeps all as it was.
//! The order of the end: no new connections, streams told to come back, a bounded wait, and the socket goes
//! last.

mod config_watch;
mod errands;
mod gate;
mod meter;
mod metrics;
mod panics;
mod probe;
mod reload;
mod run;
mod serving;
mod signals;
mod start;
mod surroundings;
mod upkeep;
mod watch;

use std::{path::Path, sync::Arc, time::Duration};

use futures_util::future::OptionFuture;
use tokio::{
    sync::{mpsc, watch as channel},
    task::JoinSet,
    time::timeout,
};

pub use self::{
    gate::room_for,
    reload::Load,
    run::{run, runtime},
    signals::{Signalled, Signals},
    upkeep::{Happened, Upkeep},
};
use self::{serving::Serving, start::Adjustable};
use crate::{
    api::admin::AskedReload,
    config::Config,
    issuer::Expelled,
    limits::gate_plan::lingering,
    peer::ConnectionBounds,
    telemetry::{
        health::{HealthState, Probe},
        log::Log,
        metrics::Metrics,
    },
};

/// How long a start or a reload waits for what attestors have to ask others: the numbers of names. Who needs what is not
/// there by then is told to come again.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// How much longer than its time a drain may take, until it is taken for one that hangs.
const DRAIN_GRACE: Duration = Duration::from_millis(500);

/// A running agent.
pub struct Running {
    config: Arc<Config>,
    adjustable: Adjustable,
    /// `true` begins the drain.
    stop: channel::Sender<bool>,
    public: Serving,
    /// The admin socket, where there is one.
    admin: Option<Serving>,
    /// Ends with the agent.
    tasks: JoinSet<()>,
    /// Who asks for a reload, until somebody takes care of it.
    asked: Option<mpsc::Receiver<AskedReload>>,
    /// The same: the issuer's.
    issuing: JoinSet<Expelled>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Running {
    /// Where the Workload API is served.
    pub fn socket_path(&self) -> &Path {
        &self.config.agent.socket_path
    }

    /// What is in force.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Whether the agent can serve.
    pub fn health(&self) -> &Arc<HealthState> {
        &self.adjustable.parts.health
    }

    /// What it counts.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.adjustable.parts.metrics
    }

    /// Lets each reload set the level of `log`, and metrics tell what it lost.
    #[must_use]
    pub fn logging(mut self, log: Log) -> Self {
        let parts = &self.adjustable.parts;
        let (lines, lost, panics) =
            (log.clone(), parts.series.log_lines_lost.clone(), parts.series.panics.clone());
        parts.metrics.before_render(move || {
            lost.absolute(lines.lines_lost());
            panics.absolute(panics::so_far());
        });
        self.adjustable.log = Some(log);
        self
    }

    /// Ends when serving has ended by itself, or a task that goes on for ever has: faults. Without the one that
    /// rotates, say, the agent would look well until everything has expired. [`Expelled`] is the issuer's word.
    pub async fn failed(&mut self) -> anyhow::Error {
        loop {
            tokio::select! {
                error = self.public.failed() => return error,
                Some(error) = OptionFuture::from(self.admin.as_mut().map(Serving::failed)) => return error,
                Some(ended) = self.issuing.join_next() => return match ended {
                    Ok(expelled) => expelled.into(),
                    Err(panic) => anyhow::Error::new(panic).context("the issuer ended early"),
                },
                // One that ended well is no fault, and the others are still to be watched.
                Some(ended) = self.tasks.join_next() => if let Err(panic) = ended {
                    return anyhow::Error::new(panic).context("a part of the agent ended early");
                },
            }
        }
    }

    /// Drains: no new connections, streams told to come back, at most `drain_timeout`, and half a second more where no
    /// thread is there to do it.
    pub async fn shutdown(self) {
        let most = self.adjustable.connections.borrow().drain_timeout.saturating_add(DRAIN_GRACE);
        if timeout(most, self.drain()).await.is_err() {
            tracing::error!("the drain takes longer than its time: ending without waiting");
        }
    }

    async fn drain(self) {
        let parts = &self.adjustable.parts;
        parts.health.set(Probe::Draining);
        parts.writer.store().drain();
        self.stop.send_replace(true);
        // Both at once: neither waits for the other's time to be over.
        let admin = OptionFuture::from(self.admin.map(Serving::drained));
        let (public, _admin) = tokio::join!(self.public.drained(), admin);
        if let Some(drained) = public {
            tracing::info!(ended = drained.ended, cut = drained.cut, "drained");
        }
        self.adjustable.parts.journal.end();
    }
}

fn connection_bounds(config: &Config, means: gate::Means) -> ConnectionBounds {
    let budget = config.ratelimit.memory.budget(means.cgroup);
    ConnectionBounds {
        max_lingering: lingering(means.nofile, budget),
        ..ConnectionBounds::new(&config.ratelimit.gate.connection, &config.listener)
    }
}
