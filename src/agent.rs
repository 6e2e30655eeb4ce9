//! Builds every part from the configuration, binds everything, says ready; reloads; drains.
//!
//! Nothing is served before everything is there: a setting that cannot be put in force keeps the agent from
//! starting. A reload reads, checks and compares before it changes anything; an error keeps all as it was.
//! The order of the end: no new connections, streams told to come back, a bounded wait, and the socket goes
//! last. Where another agent takes the place of this one, the socket stays, with who waits at it ([`handover`]).

mod candidate;
mod config_watch;
mod endpoints;
mod errands;
mod gate;
mod handover;
mod judge;
mod meter;
mod metrics;
mod panics;
mod place;
mod predecessor;
mod probe;
mod reload;
mod run;
mod runtime;
mod serving;
mod short_processor;
mod signals;
mod standby;
mod start;
mod successor;
mod surroundings;
mod upkeep;
mod verdict;
mod watch;
mod way_in;

use std::{path::Path, sync::Arc, time::Duration};

use futures_util::future::OptionFuture;
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::timeout,
};

use self::{errands::Errands, handover::LeftSockets, serving::Serving, start::Adjustable, successor::Keeper};
pub use self::{
    gate::{RoomError, room_for},
    reload::Load,
    run::{not_started, run},
    runtime::runtime,
    signals::{Signalled, Signals},
    upkeep::{Happened, Upkeep},
};
use crate::{
    api::admin::AskedReload,
    config::{AdminSocket, Config},
    issuer::{Expelled, SvidKind},
    limits::gate_plan::lingering,
    peer::ConnectionBounds,
    telemetry::{
        health::{HealthState, Probe},
        log::Log,
        metrics::Metrics,
        registry::Label as _,
    },
};

/// How long a start or a reload waits for what attestors have to ask others: the numbers of names. Who needs what is not
/// there by then is told to come again.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// How much longer than its time a drain may take, until it is taken for one that hangs.
const DRAIN_GRACE: Duration = Duration::from_millis(250);

/// How long the calls under way are waited for before the next agent has the place: what they ask of a server is asked in
/// this one's name. The rest of the drain goes on beside the next agent.
const LEAVES_AFTER: Duration = Duration::from_secs(1);

/// How long a write of the issuer's may take that is under way then.
const LETS_GO_WITHIN: Duration = Duration::from_secs(5);

/// A running agent.
pub struct Running {
    config: Arc<Config>,
    adjustable: Adjustable,
    public: Serving,
    /// The admin socket, where there is one.
    admin: Option<Serving>,
    /// Ends with the agent.
    tasks: JoinSet<()>,
    /// The HTTP listeners.
    http: JoinSet<()>,
    /// Who asks for a reload, until somebody takes care of it.
    asked: Option<mpsc::Receiver<AskedReload>>,
    /// The same: the issuer's.
    issuing: JoinSet<Expelled>,
    /// Who keeps the socket of the Workload API.
    keeper: Keeper,
}

/// What is left of an agent that leaves its place to another one.
struct Vacated {
    config: Arc<Config>,
    left: LeftSockets,
    /// The rest of the drain.
    draining: Option<JoinHandle<()>>,
    /// Whether the issuer's files are free.
    is_free: bool,
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

    /// Tells what keeps it from serving, as [`HealthState::lacks`] has it, at the moment at which it is asked.
    fn lacks(&self) -> impl Fn() -> Vec<&'static str> + Send + Sync + use<> {
        let (health, issuer) = (Arc::clone(self.health()), Arc::clone(&self.adjustable.parts.issuer));
        move || {
            // The probe looks now and then.
            if health.get() == Probe::Starting
                && SvidKind::VALUES.iter().all(|it| issuer.can_sign(*it).is_ok())
            {
                health.set(Probe::Healthy);
            }
            health.lacks()
        }
    }

    /// What it counts.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.adjustable.parts.metrics
    }

    /// Lets each reload set the level of `log`, and metrics and the status tell what it lost.
    #[must_use]
    pub fn logging(mut self, log: Log) -> Self {
        let parts = &self.adjustable.parts;
        let (lines, lost, panics) =
            (log.clone(), parts.series.log_lines_lost.clone(), parts.series.panics.clone());
        parts.metrics.before_render(move || {
            lost.absolute(lines.lines_lost());
            panics.absolute(panics::so_far());
        });
        // One process has one.
        let _first = parts.log.set(log.clone()).is_ok();
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
                Some(ended) = self.http.join_next() => if let Err(panic) = ended {
                    return anyhow::Error::new(panic).context("an http listener ended early");
                },
                Some(ended) = self.tasks.join_next() => if let Err(panic) = ended {
                    return anyhow::Error::new(panic).context("a part of the agent ended early");
                },
            }
        }
    }

    /// Drains: no new connections, streams told to come back, at most `drain_timeout`, and a quarter of a second more where no
    /// thread is there to do it.
    pub async fn shutdown(self) {
        let most = self.adjustable.connections.borrow().drain_timeout.saturating_add(DRAIN_GRACE);
        if timeout(most, self.drain()).await.is_err() {
            tracing::error!("the drain takes longer than its time: ending without waiting");
        }
    }

    async fn drain(mut self) {
        self.says_that_it_drains();
        self.public.stop();
        self.admin.iter_mut().for_each(Serving::stop);
        // Both at once: neither waits for the other's time to be over.
        let admin = OptionFuture::from(self.admin.map(Serving::drained));
        let (public, _admin) = tokio::join!(self.public.drained(), admin);
        if let Some(drained) = public {
            tracing::info!(ended = drained.ended, cut = drained.cut, "drained");
        }
        self.adjustable.parts.journal.end();
    }

    /// To probes, and to streams, which come back.
    fn says_that_it_drains(&self) {
        let parts = &self.adjustable.parts;
        parts.health.set(Probe::Draining);
        parts.writer.store().drain();
    }

    /// Leaves its place to another agent.
    ///
    /// It drains, closes its HTTP listeners, and has the issuer let go of its files when the calls under way are answered, a
    /// second from now at the latest. The admin socket goes along if the other agent has it at this path.
    async fn vacate(mut self, has_admin_at: impl Fn(&Path) -> bool, errands: &Errands) -> Vacated {
        self.says_that_it_drains();
        let (config, issuer) = (Arc::clone(&self.config), Arc::clone(&self.adjustable.parts.issuer));
        self.http.shutdown().await;
        let goes_along = match config.agent.admin_socket() {
            Some(AdminSocket::Configured(path) | AdminSocket::ByDefault(path)) => has_admin_at(&path),
            None => false,
        };
        let admin = OptionFuture::from(self.admin.as_mut().filter(|_| goes_along).map(Serving::hand_on));
        let (public, admin) = tokio::join!(self.public.hand_on(), admin);
        let left = LeftSockets { public, admin: admin.flatten() };

        let mut issuing = std::mem::take(&mut self.issuing);
        let mut draining = tokio::spawn(self.shutdown());
        let drained = timeout(LEAVES_AFTER, &mut draining).await.is_ok();
        issuing.shutdown().await;
        let lets_go = errands.begin(move || issuer.let_go());
        let is_free = timeout(LETS_GO_WITHIN, lets_go).await.is_ok_and(|done| done.is_ok());
        Vacated { config, left, draining: (!drained).then_some(draining), is_free }
    }
}

fn connection_bounds(config: &Config, means: gate::Means) -> ConnectionBounds {
    ConnectionBounds {
        max_lingering: lingering(means.nofile, means.budget(config).bytes),
        ..ConnectionBounds::new(&config.ratelimit.gate.connection, &config.listener)
    }
}
