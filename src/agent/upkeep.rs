//! A running agent, and what changes it while it runs: reloads that a signal, the admin socket or a change of its files
//! asks for. One reload at a time, and one behind it for all who ask meanwhile.

use std::{io, sync::Arc};

use anyhow::Context as _;
use futures_util::future::OptionFuture;
use tokio::sync::{mpsc as requests, oneshot};

use super::{
    Running,
    config_watch::ConfigWatch,
    errands::Errands,
    reload::{self, Load, Reloaded},
};
use crate::{
    api::{admin::AskedReload, proto::admin::ReloadResponse},
    config::Config,
};

/// What has happened to an agent.
#[derive(Debug)]
pub enum Happened {
    /// A reload has ended, well or not.
    Reloaded(ReloadResponse),
    /// The agent cannot go on.
    Failed(anyhow::Error),
}

/// A reload that is under way.
type Reloading = oneshot::Receiver<anyhow::Result<Reloaded>>;

/// Whom to tell that a reload begins.
type Begins = Box<dyn Fn() + Send + Sync>;

/// Keeps an agent as its configuration says.
pub struct Upkeep {
    agent: Running,
    load: Arc<dyn Fn() -> anyhow::Result<Config> + Send + Sync>,
    errands: Errands,
    begins: Begins,
    files: ConfigWatch,
    asked: Option<requests::Receiver<AskedReload>>,
    reloads: Reloads,
}

impl std::fmt::Debug for Upkeep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upkeep").field("agent", &self.agent).finish_non_exhaustive()
    }
}

impl Upkeep {
    /// Of `agent`, whose configuration `load` reads, with a thread of its own to read it. Must be called within a runtime.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn of(agent: Running, load: Load) -> io::Result<Self> {
        Ok(Self::with(agent, load.into(), Errands::new()?, Box::new(|| ())))
    }

    /// The same, by a thread that others use too; `begins` is called as each reload begins.
    pub(super) fn with(
        mut agent: Running,
        load: Arc<dyn Fn() -> anyhow::Result<Config> + Send + Sync>,
        errands: Errands,
        begins: Begins,
    ) -> Self {
        let (files, asked) = (ConfigWatch::of(agent.config()), agent.asked.take());
        Self { agent, load, errands, begins, files, asked, reloads: Reloads::default() }
    }

    /// The agent.
    pub fn agent(&self) -> &Running {
        &self.agent
    }

    /// The agent, to be ended.
    pub fn into_agent(self) -> Running {
        self.agent
    }

    /// Asks for a reload.
    pub fn reload(&mut self) {
        self.ask(None);
    }

    /// The next that happens. Nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> Happened {
        loop {
            tokio::select! {
                Some(asking) = OptionFuture::from(self.asked.as_mut().map(requests::Receiver::recv)) => {
                    match asking {
                        Some(asking) => self.ask(Some(asking)),
                        None => self.asked = None,
                    }
                }
                () = self.files.changed(&self.errands) => {
                    tracing::info!("the configuration's files changed");
                    self.ask(None);
                }
                done = self.reloads.done() => {
                    let told = reload::finish(&mut self.agent, done);
                    if told.error.is_empty() {
                        self.files.follow(self.agent.config());
                    }
                    if self.reloads.ended(&told) {
                        self.reloads.under_way = Some(self.begin());
                    }
                    return Happened::Reloaded(told);
                }
                error = self.agent.failed() => return Happened::Failed(error),
            }
        }
    }

    /// A reload is asked for, by somebody who waits to be told of it or by nobody.
    fn ask(&mut self, asking: Option<AskedReload>) {
        if self.reloads.under_way.is_none() {
            self.reloads.under_way = Some(self.begin());
            self.reloads.asked.add(asking);
        } else {
            self.reloads.again = true;
            self.reloads.asked_again.add(asking);
        }
    }

    fn begin(&self) -> Reloading {
        (self.begins)();
        let (load, replacing) = (Arc::clone(&self.load), self.agent.replacing());
        self.errands.begin(move || replacing.with(load()?))
    }
}

/// The reload that is under way, and one behind it for all that was asked for meanwhile.
#[derive(Default)]
struct Reloads {
    under_way: Option<Reloading>,
    asked: Askers,
    again: bool,
    asked_again: Askers,
}

/// Who waits to be told how a reload ended: at most as many as there are calls on the admin socket.
#[derive(Default)]
struct Askers(Vec<AskedReload>);

impl Askers {
    fn add(&mut self, asking: Option<AskedReload>) {
        self.0.retain(|asking| !asking.is_closed());
        self.0.extend(asking);
    }
}

impl Reloads {
    /// How the one under way ended, once it has; never when there is none.
    async fn done(&mut self) -> anyhow::Result<Reloaded> {
        match &mut self.under_way {
            Some(reloading) => reloading.await.context("the reload ended early")?,
            None => std::future::pending().await,
        }
    }

    /// It ended so. Whether another is to begin.
    fn ended(&mut self, told: &ReloadResponse) -> bool {
        self.under_way = None;
        for asking in std::mem::take(&mut self.asked).0 {
            // Nobody may want to know any more.
            drop(asking.send(told.clone()));
        }
        self.asked = std::mem::take(&mut self.asked_again);
        std::mem::take(&mut self.again)
    }
}
