//! The `run` command: an agent with its log, its runtimes, its signals and its service manager.
//!
//! Two runtimes. Callers are served by one of several threads. What an agent is controlled by (signals, the
//! watchdog, the HTTP endpoints) is on another, on the main thread, where nothing waits for anybody: whatever blocks
//! all threads of the first, the second goes on, says that the agent does not live, and ends it when it is told to.
//! What may wait is an errand ([`errands`](super::errands)).
//!
//! An agent that was asked to hand over ends when the next one serves, or stays beside it in a pod, and takes up service
//! again when that one ends before its time ([`handover`](super::handover)).

use std::{
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, mpsc},
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::oneshot::{self, error::TryRecvError},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};

use super::{
    Running, Vacated,
    errands::Errands,
    handover::LeftSockets,
    panics,
    place::Inherited,
    predecessor::{Predecessor, Predecessors},
    probe::feel_pulse,
    reload::Load,
    runtime::{no_runtime, no_threads, runtime},
    signals::{Signalled, Signals},
    standby::{Returning, TriesAgain, answer_probes},
    start::in_pod,
    successor::{self, Arrived, Successor, SuccessorError, Successors},
    upkeep::{Happened, Upkeep},
};
use crate::{
    config::{Config, Signer, WrongPlace},
    issuer::{self, Expelled},
    os::{clock::Clock, program, random, systemd::ServiceManager},
    peer::{Socket, socket::Reach},
    telemetry::{
        chain,
        log::{Log, LogError},
    },
};

/// How many clients are turned away when the agent cannot start: more than the largest queue of a socket holds.
const MOST_TURNED_AWAY: usize = 16 * 1024;

/// So many pairs of descriptors a start needs before anything else is read.
const STARTS_WITH: usize = 8;

/// How long threads that serve may take to end. What one still does (hashing a file) is not worth waiting for.
const THREADS_END_WITHIN: Duration = Duration::from_millis(100);
/// How long the last lines of the log are waited for.
const LOG_ENDS_WITHIN: Duration = Duration::from_millis(300);

/// How long after its start an agent has done what only a start does.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// How often what was seldom needed of the program is let go of after that: what a reload takes, say.
const AGAIN_AFTER: Duration = Duration::from_secs(3600);

/// How long an agent that was told to end goes on taking its place, to leave it in order, or leaving it to the next one.
const LEFT_WITHIN: Duration = Duration::from_secs(5);

/// The `run` command: runs until a signal ends it.
///
/// SIGTERM and SIGINT drain (a second one ends at once); SIGHUP reloads; SIGUSR2 reopens the log file, as with
/// spire-agent; SIGUSR1, with which spire-agent reloads plugins, is answered with a word in the log.
///
/// # Errors
/// Why the agent could not start, or had to end.
pub fn run(load: Load) -> anyhow::Result<()> {
    // While there is one thread: it changes the environment.
    let (manager, handed) = ServiceManager::from_environment()?;
    panics::tell();
    // Whatever the start fails by, who waits at the socket is told: for that there must be a descriptor left.
    let made = means().inspect_err(|error| tell_not_started(&manager, handed.as_ref(), error));
    let (control, mut signals, errands, serving) = made?;
    let queue = match handed.as_ref().map(UnixListener::try_clone).transpose() {
        Ok(queue) => queue,
        Err(error) => {
            let error = no_runtime(error);
            tell_not_started(&manager, handed.as_ref(), &error);
            return Err(error);
        }
    };
    // Meanwhile the configuration is read.
    drop(serving.spawn_blocking(issuer::seed));
    let mut log = None;
    let ended = control.block_on(async {
        let control =
            Control { manager: Arc::new(manager), errands, load: load.into(), serving: serving.handle() };
        match control.start(&mut signals, handed, &mut log).await {
            Ok(Some((started, log))) => {
                drop(queue);
                control.attend(started, &mut signals, log).await
            }
            Ok(None) => Ok(()),
            Err(error) => {
                tell_not_started(&control.manager, queue.as_ref(), &error);
                Err(error)
            }
        }
    });
    serving.shutdown_timeout(THREADS_END_WITHIN);
    if let Some(log) = log {
        if let Err(error) = &ended {
            tracing::error!(error = chain(error.as_ref()), "the agent ends");
        }
        let _all_written = log.flush(LOG_ENDS_WITHIN);
    }
    ended
}

/// What an agent runs by: the runtime that controls it, with its signals, and what serves and waits for it.
fn means() -> anyhow::Result<(Runtime, Signals, Errands, Runtime)> {
    random::may_be_asked_for().context("cannot make keys: the system call getrandom is refused")?;
    // To take signals takes some, and would panic without.
    let pairs: Result<Vec<_>, _> = (0..STARTS_WITH).map(|_| UnixStream::pair()).collect();
    drop(pairs.map_err(no_runtime)?);
    let control = Builder::new_current_thread().enable_all().build().map_err(no_runtime)?;
    let signals = control.block_on(async { Signals::new() })?;
    let errands = Errands::new().map_err(|error| no_threads(1, error))?;
    Ok((control, signals, errands, runtime()?))
}

/// Tells whoever waits for an agent that it could not start.
fn tell_not_started(manager: &ServiceManager, queue: Option<&UnixListener>, error: &anyhow::Error) {
    manager.stopping(&chain(error.as_ref()));
    queue.into_iter().for_each(turn_away);
}

/// The same for one that never was: the command line was wrong. What was handed over is closed. Must be called while there is
/// one thread.
pub fn not_started(why: &str) {
    // What else is wrong is for a start to say.
    let Ok((manager, queue)) = ServiceManager::from_environment() else { return };
    manager.stopping(why);
    queue.iter().for_each(turn_away);
}

/// Closes what waits in the queue of a socket that an agent cannot serve which could not start: the service manager holds the
/// socket, and these clients would wait for an answer. To them it is `Unavailable`, and they come again.
fn turn_away(queue: &UnixListener) {
    let _turned_away = (0..MOST_TURNED_AWAY).take_while(|_| queue.accept().is_ok()).count();
}

/// What is said of a start that panicked.
const PANICKED: &str = "the start ended early";

/// An agent that serves.
struct Started {
    agent: Running,
    /// The one whose place it has taken.
    predecessor: Option<Predecessor>,
    /// Where it is asked to hand over.
    asked_at: Option<Socket>,
}

/// Why there is no log; where a file of it is set, if it is that.
fn told(config: &Config, error: LogError) -> anyhow::Error {
    let LogError::Open { path, source } = &error else { return error.into() };
    let WrongPlace { key, value, message } = config.wrong_log_file(path, source);
    let place = config.set_at.of(key).map(|place| format!("{place}: ")).unwrap_or_default();
    anyhow::anyhow!("{place}{key} {value:?}: {message}")
}

/// What an agent is controlled with, on the main thread.
struct Control<'a> {
    manager: Arc<ServiceManager>,
    errands: Errands,
    load: Arc<dyn Fn() -> anyhow::Result<Config> + Send + Sync>,
    serving: &'a Handle,
}

impl Control<'_> {
    /// Starts the agent; `None` when a signal said to end before it was there. `known` is the log, as soon as there is
    /// one.
    async fn start(
        &self,
        signals: &mut Signals,
        handed: Option<UnixListener>,
        known: &mut Option<Log>,
    ) -> anyhow::Result<Option<(Started, Log)>> {
        let load = Arc::clone(&self.load);
        let loading = self.errands.begin(move || -> anyhow::Result<_> {
            let config = load()?;
            let log = Log::start(&config.log, &config.audit).map_err(|error| told(&config, error))?;
            Ok((config, log))
        });
        let (config, log) = tokio::select! {
            _ = signals.stop() => return Ok(None),
            loaded = loading => loaded.context(PANICKED)??,
        };
        *known = Some(log.clone());
        let inherited = handed.map_or(Inherited::Nothing, Inherited::ByManager);
        let (waits, waited_for) = mpsc::channel();
        let mut starting = Box::pin(self.begin(config, inherited, &log, waited_for));
        tokio::select! {
            _ = signals.stop() => {
                drop(waits);
                // It may have been left the place already, and have accepted callers.
                if let Ok(Ok(Started { agent, predecessor, .. })) = timeout(LEFT_WITHIN, starting).await {
                    self.end(agent, &mut predecessor.into(), signals).await;
                }
                Ok(None)
            }
            started = &mut starting => Ok(Some((started?, log.clone()))),
        }
    }

    /// Starts an agent, and has it listen for the next one. `waited_for` is as in [`Running::start_apart`].
    async fn begin(
        &self,
        config: Config,
        inherited: Inherited,
        log: &Log,
        waited_for: mpsc::Receiver<()>,
    ) -> anyhow::Result<Started> {
        let (serving, control) = (self.serving.clone(), Handle::current());
        let starting = self.errands.begin(move || -> anyhow::Result<_> {
            let _within = serving.enter();
            let (agent, predecessor) =
                Running::start_apart(config, inherited, Clock::SYSTEM, &control, &waited_for)?;
            let asked_at = successor::bind(agent.config());
            Ok((agent, predecessor, asked_at))
        });
        let (agent, predecessor, asked_at) = starting.await.context(PANICKED)??;
        Ok(Started { agent: agent.logging(log.clone()), predecessor, asked_at })
    }

    /// Looks after a running agent until a signal ends it, or another agent serves in its place.
    async fn attend(&self, started: Started, signals: &mut Signals, log: Log) -> anyhow::Result<()> {
        let mut started = started;
        // Their connections are open as long as this process lives.
        let mut before = Predecessors::default();
        loop {
            let agent = &started.agent;
            let config = agent.config();
            tracing::info!(
                socket = %agent.socket_path().display(),
                trust_domain = %config.trust_domain,
                // Those of a server are not known yet.
                entries = matches!(config.issuer, Signer::Embedded(_)).then_some(config.entries.len()),
                version = env!("CARGO_PKG_VERSION"),
                "the workload api is served"
            );
            self.manager.ready(&status(agent));
            if let Some(mut predecessor) = started.predecessor.take() {
                predecessor.told_that_this_serves();
                tracing::info!(pid = predecessor.pid(), "another agent has handed over");
                before.add(predecessor);
            }
            let Some((left, successor)) = self.look_after(started, &mut before, signals, &log).await? else {
                return Ok(());
            };
            let mut well = JoinSet::new();
            let manager = Arc::clone(&self.manager);
            well.spawn(async move { manager.watch(|| true).await });
            let Some(again) = self.hand_over(left, successor, &mut before, signals, &log).await? else {
                return Ok(());
            };
            started = again;
        }
    }

    /// Looks after an agent until it has ended, or left its place to another one.
    async fn look_after(
        &self,
        started: Started,
        before: &mut Predecessors,
        signals: &mut Signals,
        log: &Log,
    ) -> anyhow::Result<Option<(Vacated, Successor)>> {
        let Started { agent, asked_at, .. } = started;
        let mut watching = JoinSet::new();
        let (manager, health) = (Arc::clone(&self.manager), Arc::clone(agent.health()));
        watching.spawn(feel_pulse(Arc::clone(&health), self.serving.clone()));
        watching.spawn(async move { manager.watch(|| health.live()).await });
        let errands = self.errands.clone();
        watching.spawn(async move {
            sleep(SETTLED_AFTER).await;
            loop {
                let let_go = errands.begin(program::let_go).await;
                tracing::debug!(bytes = let_go.ok(), "gave memory back that the program seldom needs");
                sleep(AGAIN_AFTER).await;
            }
        });

        let manager = Arc::clone(&self.manager);
        let begins = Box::new(move || manager.reloading());
        let mut successors = Successors::listen(asked_at, agent.config(), agent.keeper, agent.lacks());
        let mut upkeep = Upkeep::with(agent, Arc::clone(&self.load), self.errands.clone(), begins);
        let mut reopening = Vec::new();
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signalled::Stop(signal) => {
                        tracing::info!(signal, "draining");
                        // The one that comes back listens there itself.
                        drop(successors);
                        self.end(upkeep.into_agent(), before, signals).await;
                        return Ok(None);
                    }
                    Signalled::Reload => upkeep.reload(),
                    Signalled::ReopenLog => self.reopen(log.clone(), &mut reopening),
                    Signalled::Nothing => tracing::info!("SIGUSR1 does nothing here; SIGHUP reloads"),
                },
                arrived = successors.next() => match arrived {
                    Arrived::Next(successor) => {
                        tracing::info!(pid = successor.pid(), "handing over to another agent");
                        let left = self.leave(upkeep.into_agent(), &successor, before, signals).await;
                        return Ok(left.map(|left| (left, successor)));
                    }
                    Arrived::StandsBy(one) => {
                        tracing::info!(pid = one.pid(), "another agent stands by");
                        before.add(one);
                    }
                },
                happened = upkeep.next() => match happened {
                    Happened::Reloaded(told) => {
                        let failed = if told.error.is_empty() { "" } else { "; the last reload failed: see the log" };
                        self.manager.reloaded(&format!("{}{failed}", status(upkeep.agent())));
                    }
                    Happened::Failed(error) => {
                        // Callers are told to come back: what they have is valid still.
                        if error.is::<Expelled>() {
                            tracing::warn!("draining: the server has expelled this agent");
                            drop(successors);
                            self.end(upkeep.into_agent(), before, signals).await;
                        }
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Leaves the place to `successor`. An agent that is told to end meanwhile hands over still, if that is quickly
    /// done, and ends: `None`.
    async fn leave(
        &self,
        agent: Running,
        successor: &Successor,
        before: &mut Predecessors,
        signals: &mut Signals,
    ) -> Option<Vacated> {
        let leaving = agent.vacate(|admin| successor.serves_admin_at(admin), &self.errands);
        let mut leaving = Box::pin(leaving);
        tokio::select! {
            left = &mut leaving => return Some(left),
            signal = signals.stop() => tracing::info!(signal, "ending"),
        }
        let left = timeout(LEFT_WITHIN, leaving).await.ok()?;
        let passed = if left.is_free { successor.pass(&left.left) } else { Err(SuccessorError::NotFree) };
        if let Err(error) = passed {
            tracing::warn!(pid = successor.pid(), error = chain(&error), "not handed over");
            remove_unless(left.left, before).await;
        }
        None
    }

    /// Ends, and leaves the place to an agent that had it before, if one comes back.
    async fn end(&self, agent: Running, before: &mut Predecessors, signals: &mut Signals) {
        self.manager.stopping("draining");
        let back = before.that_come_back().await;
        let ending = async {
            if back.is_empty() {
                agent.shutdown().await;
                return;
            }
            let has_admin_at = |admin: &Path| back.iter().any(|one| one.keeps_admin_at(admin));
            let left = agent.vacate(has_admin_at, &self.errands).await;
            for one in &back {
                tracing::info!(pid = one.pid(), "the agent that stands by serves again");
                one.give_back();
            }
            if let Some(draining) = left.draining {
                drop(draining.await);
            }
        };
        tokio::select! {
            () = Box::pin(ending) => {}
            _ = signals.stop() => tracing::warn!("a second signal came: ending without waiting"),
        }
    }

    /// Passes on what an agent has left, and waits until the next one serves. The agent that serves in this process after
    /// that, if one does: the next one ended before its time.
    async fn hand_over(
        &self,
        left: Vacated,
        mut successor: Successor,
        before: &mut Predecessors,
        signals: &mut Signals,
        log: &Log,
    ) -> anyhow::Result<Option<Started>> {
        let pid = successor.pid();
        let passed = if left.is_free { successor.pass(&left.left) } else { Err(SuccessorError::NotFree) };
        let serves = match passed {
            Ok(()) => tokio::select! {
                _ = signals.stop() => {
                    let Vacated { left, draining, .. } = left;
                    drained(draining, signals).await;
                    if successor.has_ended().await {
                        remove_unless(left, before).await;
                    }
                    return Ok(None);
                }
                serves = successor.serves() => serves,
            },
            Err(error) => {
                successor.refuse(&error);
                Err(error)
            }
        };
        match serves {
            Ok(()) => {
                tracing::info!(pid, "handed over");
                self.manager.stopping(&format!("handed over to PID {pid}"));
                if !in_pod() {
                    // It hears that nobody stands by.
                    successor.close().await;
                    drained(left.draining, signals).await;
                    return Ok(None);
                }
                if !self.stand_by(&left, &mut successor, signals, log).await {
                    drained(left.draining, signals).await;
                    return Ok(None);
                }
                tracing::warn!(pid, "the agent that serves in the place of this one has ended: coming back");
            }
            Err(error) => {
                tracing::warn!(
                    pid,
                    error = chain(&error),
                    "not handed over: the next agent does not serve; coming back"
                );
                successor.close().await;
            }
        }
        self.come_back(left, before, signals, log).await
    }

    /// Stays beside the agent that serves. Returns whether that one has ended; else this one was told to.
    async fn stand_by(
        &self,
        left: &Vacated,
        successor: &mut Successor,
        signals: &mut Signals,
        log: &Log,
    ) -> bool {
        successor.told_of_standing_by();
        let _answering = answer_probes(&left.config, successor.pid());
        let mut reopening = Vec::new();
        loop {
            tokio::select! {
                () = successor.ended() => return true,
                signal = signals.next() => match signal {
                    Signalled::Stop(_) => return false,
                    Signalled::ReopenLog => self.reopen(log.clone(), &mut reopening),
                    Signalled::Reload | Signalled::Nothing => {
                        tracing::info!(pid = successor.pid(), "another agent serves in the place of this one");
                    }
                },
            }
        }
    }

    /// Serves again, with what was left. The other agent may be ending still, so it is tried for a while.
    async fn come_back(
        &self,
        vacated: Vacated,
        before: &mut Predecessors,
        signals: &mut Signals,
        log: &Log,
    ) -> anyhow::Result<Option<Started>> {
        let Vacated { config, left, .. } = vacated;
        let mut returning = Returning::default();
        loop {
            let inherited = Inherited::Left(left.try_clone().context("cannot take up service again")?);
            // It asks nobody.
            let mut beginning =
                Box::pin(self.begin(Config::clone(&config), inherited, log, mpsc::channel().1));
            let begun = tokio::select! {
                _ = signals.stop() => {
                    if let Ok(Ok(Started { agent, .. })) = timeout(LEFT_WITHIN, beginning).await {
                        self.end(agent, before, signals).await;
                    }
                    return Ok(None);
                }
                begun = &mut beginning => begun,
            };
            let error = match begun {
                Ok(started) => return Ok(Some(started)),
                Err(error) => error,
            };
            tokio::select! {
                _ = signals.stop() => return Ok(None),
                tries = returning.after(error, &config) => match tries.context("cannot take up service again")? {
                    TriesAgain::Yes => {}
                    TriesAgain::No => return Ok(None),
                },
            }
        }
    }

    /// Opens the log anew, unless that is about to be done anyway: at most once while it is being done.
    fn reopen(&self, log: Log, under_way: &mut Vec<oneshot::Receiver<()>>) {
        under_way.retain_mut(|done| done.try_recv() == Err(TryRecvError::Empty));
        if under_way.len() < 2 {
            under_way.push(self.errands.begin(move || {
                if let Err(error) = log.reopen() {
                    tracing::error!(error = chain(&error), "the log stays in the old file");
                }
            }));
        }
    }
}

/// Waits for the rest of the drain of an agent that has left its place.
async fn drained(draining: Option<JoinHandle<()>>, signals: &mut Signals) {
    let Some(draining) = draining else { return };
    tokio::select! {
        _ended = draining => {}
        _ = signals.stop() => tracing::warn!("a second signal came: ending without waiting"),
    }
}

/// Removes the sockets that an agent has left which ends, where nobody has them by now, and nobody comes back for them.
async fn remove_unless(left: LeftSockets, before: &mut Predecessors) {
    if !before.that_come_back().await.is_empty() {
        return;
    }
    let LeftSockets { public, admin } = left;
    for (socket, reach) in [(public, Reach::Everybody), (admin, Reach::OwnUser)] {
        // Whoever serves there has it locked.
        if let Some(Ok(socket)) = socket.map(|socket| Socket::move_into(socket, reach))
            && let (_, Some(place)) = socket.into_parts()
        {
            place.remove();
        }
    }
}

fn status(agent: &Running) -> String {
    format!("serving {} entries", agent.config().entries.len())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{config::ExpandEnv, telemetry::health::Probe};

    /// An agent, all of whose threads that serve callers are blocked: what it is controlled by goes on, and says so.
    #[test]
    fn an_agent_whose_threads_are_blocked_is_not_live_and_ends_when_told() {
        let dir = tempfile::tempdir().unwrap();
        let (at, path) = (dir.path().display(), dir.path().join("agent.conf"));
        let text = format!(
            "agent {{ trust_domain = \"example.org\" data_dir = \"{at}/data\" socket_path = \"{at}/api.sock\"\n\
             listener {{ drain_timeout = \"0s\" }} }}\nissuer \"embedded\" {{ }}\n\
             health_checks {{ socket_path = \"{at}/health.sock\" }}\n"
        );
        std::fs::write(&path, text).unwrap();
        let config = Config::load(&path, ExpandEnv::No).unwrap();

        let serving = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let control = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        let blocked = Arc::new(Mutex::new(()));
        let held = blocked.lock().unwrap();
        control.block_on(async {
            let here = Handle::current();
            let within = serving.enter();
            let (_, waited_for) = mpsc::channel();
            let (agent, _) =
                Running::start_apart(config, Inherited::Nothing, Clock::SYSTEM, &here, &waited_for).unwrap();
            drop(within);
            let (tell, told) = mpsc::channel();
            for _ in 0..2 {
                let (blocked, tell) = (Arc::clone(&blocked), tell.clone());
                drop(serving.spawn(async move {
                    tell.send(()).unwrap();
                    drop(blocked.lock());
                }));
            }
            told.recv().unwrap();
            told.recv().unwrap();
            let health = Arc::clone(agent.health());
            let feeling = tokio::spawn(feel_pulse(Arc::clone(&health), serving.handle().clone()));
            assert_eq!((health.get(), health.live()), (Probe::Healthy, true));
            let socket = dir.path().join("health.sock");
            let asked = async {
                loop {
                    if ask(&socket).await.starts_with("HTTP/1.1 500") {
                        break;
                    }
                    sleep(Duration::from_millis(100)).await;
                }
            };
            timeout(Duration::from_secs(60), asked).await.expect("/live says so");
            agent.shutdown().await;
            feeling.abort();
        });
        serving.shutdown_background();
        drop(held);
    }

    async fn ask(socket: &Path) -> String {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = tokio::net::UnixStream::connect(socket).await.unwrap();
        stream.write_all(b"GET /live HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}
