//! The `run` command: an agent with its log, its runtime, its signals and its service manager.

use std::{os::unix::net::UnixListener, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::runtime::Runtime;

use super::{
    Running,
    reload::{self, Load},
    signals::{Signalled, Signals},
};
use crate::{
    config::Config,
    os::{clock::Clock, systemd::ServiceManager},
    telemetry::{chain, log::Log},
};

/// The most worker threads. Two serve some ten thousand calls a second; more would only take from the node.
const MOST_WORKERS: usize = 4;

/// The `run` command: runs until a signal ends it.
///
/// SIGTERM and SIGINT drain (a second one ends at once); SIGHUP reloads; SIGUSR2 reopens the log file, as with
/// spire-agent; SIGUSR1, with which spire-agent reloads plugins, is answered with a word in the log.
///
/// # Errors
/// Why the agent could not start, or had to end.
pub fn run(load: Load) -> anyhow::Result<()> {
    // First, while there is one thread: it changes the environment.
    let (manager, handed) = ServiceManager::from_environment()?;
    let config = load()?;
    let log = Log::start(&config.log)?;
    let runtime = runtime()?;
    let ended = runtime.block_on(serve(&config, handed, manager, &load, &log));
    // What a blocking task still does (hashing a file) is not worth waiting for.
    runtime.shutdown_timeout(Duration::from_millis(100));
    if let Err(error) = &ended {
        tracing::error!(error = format!("{error:#}"), "the agent ends");
    }
    let _all_written = log.flush(Duration::from_secs(1));
    ended
}

/// The runtime of an agent: as many workers as the machine has processors, at most four.
///
/// # Errors
/// Threads or descriptors are short.
pub fn runtime() -> anyhow::Result<Runtime> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(processors.min(MOST_WORKERS))
        .max_blocking_threads(8)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

async fn serve(
    config: &Config,
    handed: Option<UnixListener>,
    manager: ServiceManager,
    load: &Load,
    log: &Log,
) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let mut agent = Running::start(config.clone(), handed, Clock::SYSTEM)?.logging(log.clone());
    let status = |agent: &Running| format!("serving {} entries", agent.config().entries.len());
    tracing::info!(
        socket = %agent.socket_path().display(),
        trust_domain = %config.trust_domain,
        entries = config.entries.len(),
        version = env!("CARGO_PKG_VERSION"),
        "the workload api is served"
    );
    manager.ready(&status(&agent));
    let health = Arc::clone(agent.health());
    let watchdog = manager.watch(|| health.live());
    tokio::pin!(watchdog);
    loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Signalled::Stop(name) => {
                    tracing::info!(signal = name, "draining");
                    manager.stopping("draining");
                    tokio::select! {
                        () = agent.shutdown() => {}
                        () = signals.stop_again() => tracing::warn!("told twice: ending without waiting"),
                    }
                    return Ok(());
                }
                Signalled::Reload => {
                    manager.reloading();
                    let done = reload::on_signal(&mut agent, load);
                    let said = match &done {
                        Ok(()) => status(&agent),
                        Err(_) => format!("{}; the last reload failed: see the log", status(&agent)),
                    };
                    manager.reloaded(&said);
                }
                Signalled::ReopenLog => {
                    if let Err(error) = log.reopen() {
                        tracing::error!(error = chain(&error), "the log goes on in the old file");
                    }
                }
                Signalled::Nothing => tracing::info!("SIGUSR1 does nothing here; SIGHUP reloads"),
            },
            error = agent.failed() => return Err(error),
            () = &mut watchdog => {}
        }
    }
}
