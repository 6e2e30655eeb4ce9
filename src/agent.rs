//! Builds every part from the configuration, binds everything, says ready; reloads; drains.
//!
//! Nothing is served before everything is there: a setting that cannot be put in force keeps the agent from starting.
//! A reload reads, checks and compares before it changes anything; an error keeps all as it was. The order of the end:
//! no new connections, streams told to come back, a bounded wait, and the socket goes last.

mod gate;
mod reload;
mod watch;

use std::{
    convert::Infallible, future::Future, os::unix::net::UnixListener, path::Path, pin::Pin, sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use hyper::{Request, Response};
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch as channel,
    task::{JoinHandle, JoinSet},
};

use crate::{
    api::{
        Services,
        admin::{self, AdminService},
        workload::{Parts, WorkloadApi},
    },
    attest::Attestor,
    config::Config,
    identity::EntryIndex,
    issuer::{Issuer, SvidKind, embedded::EmbeddedIssuer, metrics::IssuerMetrics},
    limits::{self, GatePlan, Limits},
    os::{clock::Clock, systemd::ServiceManager},
    peer::{self, Listener, OsUid, RequestBody, Socket, Stats, cgroup::PodOrUid},
    store::{JwtCache, StoreMetrics, Writer, X509Cache},
    telemetry::chain,
    telemetry::{
        HealthSettings,
        http::{HealthState, HttpListener, Probe, Routes},
        log::Log,
        metrics::Metrics,
        registry::{Label as _, Registry},
    },
};

/// How often the agent asks itself whether it could serve.
const PROBE: Duration = Duration::from_secs(5);

/// The most worker threads. Two serve some ten thousand calls a second; more would only take from the node.
const MOST_WORKERS: usize = 4;

/// Where the configuration comes from, at start and at each reload: files, environment and command line.
pub type Load = Box<dyn Fn() -> anyhow::Result<Config> + Send + Sync>;

/// A running agent.
pub struct Running {
    config: Config,
    issuer: Arc<EmbeddedIssuer>,
    writer: Arc<Writer>,
    x509: Arc<X509Cache>,
    jwt: Arc<JwtCache>,
    attestor: Arc<Attestor>,
    limits: Limits,
    gate: limits::Gate,
    memory: channel::Sender<watch::Budget>,
    /// What bounds a connection that is accepted from now on.
    connections: channel::Sender<peer::Settings>,
    means: gate::Means,
    metrics: Arc<Metrics>,
    /// The log of the process, once it is known.
    log: Option<Log>,
    health: Arc<HealthState>,
    /// `true` begins the drain.
    stop: channel::Sender<bool>,
    serving: JoinHandle<std::io::Result<peer::listener::Drained>>,
    /// The admin socket, where there is one.
    admin: Option<JoinHandle<std::io::Result<peer::listener::Drained>>>,
    /// Ends with the agent.
    tasks: JoinSet<()>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Running {
    /// Builds and binds everything, and serves. `handed` is the socket that a service manager keeps for the agent.
    ///
    /// # Errors
    /// What could not be opened, bound or made, with its cause. Nothing is left behind then but what `data_dir` holds.
    pub fn start(config: Config, handed: Option<UnixListener>, clock: Clock) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::new(clock));
        let health = Arc::new(HealthState::new());

        let issuer_metrics = Arc::new(IssuerMetrics::new(metrics.registry()));
        let store_metrics = Arc::new(StoreMetrics::new(metrics.registry()));
        let embedded = EmbeddedIssuer::open(config.embedded_issuer(), clock, Arc::clone(&issuer_metrics));
        let embedded = Arc::new(embedded.context("cannot open the embedded issuer")?);
        embedded.declare(Arc::new(EntryIndex::new(config.entries.clone())), config.federated.clone());
        let issuer: Arc<dyn Issuer> = Arc::<EmbeddedIssuer>::clone(&embedded);
        let x509 = Arc::new(X509Cache::new(
            Arc::clone(&issuer),
            clock,
            config.caches.x509_svids.count(),
            config.caches.availability_target,
        ));
        let jwt = Arc::new(JwtCache::new(
            Arc::clone(&issuer),
            clock,
            Arc::clone(&store_metrics),
            config.caches.jwt_svids.count(),
        ));
        let writer = Arc::new(Writer::new(
            Arc::clone(&issuer),
            clock,
            Arc::clone(&x509),
            Arc::clone(&store_metrics),
            config.policy.clone(),
        ));
        metrics.before_render(move |_| {
            issuer_metrics.rotation.refresh(clock.now());
            store_metrics.renewal.refresh(clock.now());
        });
        let attestor = Arc::new(Attestor::new(config.attest.clone()).counted_by(metrics.registry()));
        attestor.prepare_for(&config.entries);

        let means = gate::Means::of_this_process();
        let budget = config.ratelimit.memory.budget(means.cgroup);
        let gate_plan = GatePlan::new(&config.ratelimit, means.nofile, budget)?;
        let limits = Limits::new(&config.ratelimit, clock, Registry::new(metrics.recorder()));
        let gate = limits::Gate::new(gate_plan, &limits);

        let mut http = Vec::new();
        if let Some(at) = &config.prometheus {
            http.push(HttpListener::bind(&at.host, at.port, Routes::Metrics(Arc::clone(&metrics)))?);
        }
        if config.health.enabled {
            let HealthSettings { enabled: _, host, port, live_path, ready_path } = config.health.clone();
            let routes = Routes::Health { state: Arc::clone(&health), live_path, ready_path };
            http.push(HttpListener::bind(&host, port, routes)?);
        }
        let admin_socket = config.agent.admin_socket_path.as_deref().map(Socket::bind_private).transpose();
        let admin_socket = admin_socket.context("cannot serve the admin api")?;
        // Last, since clients come as soon as it is there.
        let socket = match handed {
            Some(listener) => {
                let socket = Socket::adopt(listener).context("cannot serve the workload api")?;
                // Else everybody who reads the configuration would look for it in the wrong place.
                let at = socket.path().unwrap_or_default();
                anyhow::ensure!(
                    at == config.agent.socket_path,
                    "the service manager passed a socket at {}, but socket_path is {}: \
                     make ListenStream= in the socket unit the same",
                    at.display(),
                    config.agent.socket_path.display()
                );
                Ok(socket)
            }
            None => Socket::bind(&config.agent.socket_path, 0o777),
        }
        .context("cannot serve the workload api")?;

        let services = Services::new(
            WorkloadApi::new(Parts {
                limits: limits.clone(),
                attestor: Arc::clone(&attestor),
                store: Arc::clone(writer.store()),
                x509: Arc::clone(&x509),
                jwt: Arc::clone(&jwt),
                metrics: Arc::clone(&metrics),
                clock,
            }),
            Arc::clone(&health),
            limits.clone(),
        )
        .context("the built-in descriptors cannot be read")?;
        let (stop, stopping) = channel::channel(false);
        let (connections, settings) = channel::channel(connection_settings(&config, means));
        let stats = Arc::new(Stats::default());
        let (evicted, evictions) = channel::channel(None);
        let keys = PodOrUid::new(config.kubernetes.mode, in_pod(), config.kubernetes.kubelet_root.clone());
        let keys = Arc::new(keys);
        let admin_stats = Arc::new(Stats::default());
        let listener = Listener {
            socket,
            settings,
            gate: Arc::new(gate::AtAccept(gate.clone())),
            keys: Arc::clone(&keys),
            stats: Arc::clone(&stats),
            evicted: evictions,
        };
        let serving = tokio::spawn(
            listener.serve(move |_peer| Connection(services.clone()), stopped(stopping.clone())),
        );

        let mut tasks = JoinSet::new();
        for listener in http {
            tasks.spawn(async move {
                // It serves for ever, or cannot begin.
                let Err(error) = listener.serve().await;
                tracing::error!(%error, "an http listener cannot be served");
            });
        }
        tasks.spawn(Arc::clone(&issuer).run());
        tasks.spawn(Arc::clone(&writer).run());
        let kept_up = Arc::clone(&metrics);
        tasks.spawn(async move { kept_up.keep_up().await });
        let (memory, budgets) =
            channel::channel(watch::Budget { settings: config.ratelimit.memory, bytes: budget });
        let watch = watch::Watch {
            limits: limits.clone(),
            gate: gate.clone(),
            memory: budgets,
            evicted,
            x509: Arc::clone(&x509),
            jwt: Arc::clone(&jwt),
            stats,
            admin_stats: Arc::clone(&admin_stats),
            metrics: Arc::clone(&metrics),
        };
        let admin = admin_socket.map(|socket| {
            let budget = memory.subscribe();
            let service = AdminService::new(admin::Parts {
                limits: limits.clone(),
                gate: gate.clone(),
                attestor: Arc::clone(&attestor),
                keys,
                store: Arc::clone(writer.store()),
                budget: Box::new(move || budget.borrow().bytes),
            });
            let listener = Listener {
                socket,
                settings: channel::channel(admin::settings()).1,
                gate: Arc::new(admin::Owner::new(gate.clone())),
                keys: Arc::new(OsUid),
                stats: admin_stats,
                evicted: channel::channel(None).1,
            };
            tokio::spawn(listener.serve(move |_peer| service.clone(), stopped(stopping)))
        });
        tasks.spawn(watch.run());
        tasks.spawn(probe(Arc::clone(&health), issuer));

        metrics.loaded();
        health.set(Probe::Healthy);
        Ok(Self {
            config,
            issuer: embedded,
            writer,
            x509,
            jwt,
            attestor,
            limits,
            gate,
            memory,
            connections,
            means,
            metrics,
            log: None,
            health,
            stop,
            serving,
            admin,
            tasks,
        })
    }

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
        &self.health
    }

    /// What it counts.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Lets each reload set the level of `log`, and metrics tell what it lost.
    #[must_use]
    pub fn logging(mut self, log: Log) -> Self {
        let lines = log.clone();
        self.metrics.before_render(move |metrics| metrics.set_log_lines_lost(lines.lines_lost()));
        self.log = Some(log);
        self
    }

    /// Ends when serving has ended by itself, or a task that goes on for ever has: faults. Without the one that
    /// rotates, say, the agent would look well until everything has expired.
    pub async fn failed(&mut self) -> anyhow::Error {
        loop {
            tokio::select! {
                ended = &mut self.serving => return match ended {
                    Ok(Ok(_)) => anyhow::anyhow!("serving ended without having been told to"),
                    Ok(Err(error)) => anyhow::Error::new(error).context("cannot serve the workload api"),
                    Err(panic) => anyhow::Error::new(panic).context("serving ended early"),
                },
                ended = admin_ended(&mut self.admin) => return match ended {
                    Ok(Ok(_)) => anyhow::anyhow!("serving the admin api ended without having been told to"),
                    Ok(Err(error)) => anyhow::Error::new(error).context("cannot serve the admin api"),
                    Err(panic) => anyhow::Error::new(panic).context("serving the admin api ended early"),
                },
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
        self.writer.store().drain();
        self.stop.send_replace(true);
        let admin = async {
            match self.admin {
                Some(serving) => serving.await.map(|drained| drained.is_ok()),
                None => Ok(true),
            }
        };
        // Both at once: neither waits for the other's time to be over.
        let (public, admin) = tokio::join!(self.serving, admin);
        match public {
            Ok(Ok(drained)) => {
                tracing::info!(ended = drained.ended, cut = drained.cut, "drained");
            }
            Ok(Err(error)) => tracing::warn!(%error, "the drain ended early"),
            Err(error) => tracing::warn!(%error, "the drain ended early"),
        }
        if !matches!(admin, Ok(true)) {
            tracing::warn!("the admin socket ended early");
        }
    }
}

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
    let log = start_log(&config)?;
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
                Told::Stop(name) => {
                    tracing::info!(signal = name, "draining");
                    manager.stopping("draining");
                    tokio::select! {
                        () = agent.shutdown() => {}
                        () = signals.stop_again() => tracing::warn!("told twice: ending without waiting"),
                    }
                    return Ok(());
                }
                Told::Reload => {
                    manager.reloading();
                    let done = reload::on_signal(&mut agent, load);
                    let said = match &done {
                        Ok(()) => status(&agent),
                        Err(_) => format!("{}; the last reload failed: see the log", status(&agent)),
                    };
                    manager.reloaded(&said);
                }
                Told::ReopenLog => {
                    if let Err(error) = log.reopen() {
                        tracing::error!(error = chain(&error), "the log goes on in the old file");
                    }
                }
                Told::Nothing => tracing::info!("SIGUSR1 does nothing here; SIGHUP reloads"),
            },
            error = agent.failed() => return Err(error),
            () = &mut watchdog => {}
        }
    }
}

/// Asks every few seconds whether the issuer could sign SVIDs of each kind.
async fn probe(health: Arc<HealthState>, issuer: Arc<dyn Issuer>) {
    let mut every = tokio::time::interval(PROBE);
    loop {
        every.tick().await;
        match SvidKind::VALUES.iter().try_for_each(|kind| issuer.can_sign(*kind)) {
            _ if health.get() == Probe::Draining => return,
            Ok(()) => health.set(Probe::Healthy),
            Err(error) => {
                if health.get() != Probe::Unavailable {
                    tracing::error!(error = chain(&error), "the agent cannot sign");
                }
                health.set(Probe::Unavailable);
            }
        }
    }
}

/// Whether Kubernetes started this process: it gives every container this variable.
#[expect(clippy::disallowed_methods, reason = "the one variable that tells; read at start")]
fn in_pod() -> bool {
    std::env::var("KUBERNETES_SERVICE_HOST").is_ok()
}

/// Waits for the end of the admin socket; for ever where there is none.
async fn admin_ended(
    admin: &mut Option<JoinHandle<std::io::Result<peer::listener::Drained>>>,
) -> Result<std::io::Result<peer::listener::Drained>, tokio::task::JoinError> {
    match admin {
        Some(serving) => serving.await,
        None => std::future::pending().await,
    }
}

async fn stopped(mut stopping: channel::Receiver<bool>) {
    // An error means that the sender is gone, and the agent with it.
    let _told_or_gone = stopping.wait_for(|stop| *stop).await.is_ok();
}

fn connection_settings(config: &Config, means: gate::Means) -> peer::Settings {
    let budget = config.ratelimit.memory.budget(means.cgroup);
    peer::Settings {
        max_lingering: limits::gate::lingering(means.nofile, budget),
        ..peer::Settings::new(&config.ratelimit.gate.connection, config.listener.drain_timeout)
    }
}

/// Sets up the log as `config` says. Once in the life of a process.
///
/// # Errors
/// The log file cannot be opened.
pub fn start_log(config: &Config) -> anyhow::Result<Log> {
    Ok(Log::start(&config.log)?)
}

/// One connection's service.
struct Connection(Services);

impl hyper::service::Service<Request<RequestBody>> for Connection {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<RequestBody>) -> Self::Future {
        self.0.answer(request)
    }
}

/// What a signal tells.
enum Told {
    Stop(&'static str),
    Reload,
    ReopenLog,
    Nothing,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user1: Signal,
    user2: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let on = |kind| signal(kind).context("cannot take signals");
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hangup: on(SignalKind::hangup())?,
            user1: on(SignalKind::user_defined1())?,
            user2: on(SignalKind::user_defined2())?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Told::Stop("SIGINT"),
            _ = self.hangup.recv() => Told::Reload,
            _ = self.user1.recv() => Told::Nothing,
            _ = self.user2.recv() => Told::ReopenLog,
        }
    }

    async fn stop_again(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
