//! The start: every part is built from the configuration, every place where the agent is asked is bound, and
//! then served.

use std::{
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, channel as std_channel},
    },
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot, watch as channel},
    task::JoinSet,
    time::timeout,
};

use super::{
    ANSWERS_WITHIN, Running,
    candidate::Candidate,
    connection_bounds,
    endpoints::{self, HttpEndpoints},
    gate::{
        AuditedGate, Means, http_listeners, say_what_fits, say_what_is_passed_over, say_whom_to_distrust,
    },
    judge::{Judge, Witnesses},
    meter::{MemoryMeter, keep_time},
    metrics::{AgentMetrics, MemoryMetrics, ProcessorMetrics},
    place::{self, Inherited, Sockets},
    predecessor::Predecessor,
    probe::probe,
    runtime::no_threads,
    serving::Serving,
    surroundings::{Surroundings, keep_identifying, look_around, say_where},
    watch::Watch,
    way_in::WayIn,
};
use crate::{
    api::{
        Journal, Services,
        admin::{self, AdminService, AskedReload, OwnerGate},
        standing::{AgentStanding, FailedReload, SharedLimits},
        workload::{Parts, WorkloadApi},
    },
    attest::Attestor,
    config::Config,
    issuer::{self, Issuer, metrics::IssuerMetrics},
    limits::{self, Limits, pace::Complaints},
    os::clock::Clock,
    peer::{
        ConnectionBounds, ConnectionMetrics, ConnectionStats, Leave, Listener, OsUid, Socket,
        cgroup::PodOrUid,
    },
    store::{JwtCache, Store, StoreMetrics, Writer, X509Cache, audit::AuditTrail},
    telemetry::{
        SpireNames,
        health::{HealthState, Probe},
        http::HeldPlaces,
        log::Log,
        metrics::Metrics,
        trouble::Trouble,
    },
};

/// How many reloads may be asked for on the admin socket before the first of them is looked at.
const RELOADS_ASKED: usize = 4;

/// How long those who wait at a socket that another agent has left are kept waiting for the first word of a server: less than
/// clients wait for an answer, who hear why there is none.
const KNOWN_WITHIN: Duration = Duration::from_secs(4);

impl Running {
    /// Builds and binds everything, and serves. `handed` is the socket that a service manager keeps for the agent.
    /// Must be called within a runtime.
    ///
    /// # Errors
    /// What could not be opened, bound or made, with its cause. Nothing is left behind then but what
    /// `data_dir` holds.
    pub fn start(config: Config, handed: Option<UnixListener>, clock: Clock) -> anyhow::Result<Self> {
        let inherited = handed.map_or(Inherited::Nothing, Inherited::ByManager);
        // Nobody waits for a place that another agent keeps.
        let (_, waited_for) = std_channel();
        Ok(Self::start_apart(config, inherited, clock, &Handle::current(), &waited_for)?.0)
    }

    /// As [`Running::start`], and the HTTP endpoints are served by `control`, another runtime: they answer whatever
    /// happens to the one that serves callers. With it comes the agent whose place it has taken, if there was one. A place that
    /// another agent keeps is waited for while the sender of `waited_for` lives.
    pub(super) fn start_apart(
        config: Config,
        inherited: Inherited,
        clock: Clock,
        control: &Handle,
        waited_for: &Receiver<()>,
    ) -> anyhow::Result<(Self, Option<Predecessor>)> {
        // Clients come as soon as a socket is bound, or wait for the agent already, and are not to wait for that.
        issuer::seed().context("cannot make keys")?;
        // What may fail, or takes long, comes before an agent is asked to leave its place: from then on nobody is served.
        let mut prepared = PreparedAgent::of(&config, clock)?;
        let (registry, counted) = (prepared.metrics.registry(), &prepared.issuer_series);
        let mut candidate = Candidate {
            config: &config,
            clock,
            health: &prepared.health,
            attestor: &prepared.attestor,
            surroundings: &mut prepared.surroundings,
            endpoints: &mut prepared.endpoints,
            control,
            waited_for,
            trouble: (String::new(), Trouble::default()),
        };
        let (issuer, inherited, predecessor) = place::take(&mut candidate, inherited, || {
            issuer::choice::open(config.issuer_input(), clock, Arc::clone(counted), registry)
        })?;
        let (parts, surroundings, endpoints) = prepared.with(issuer, &config);
        let http = endpoints.all()?;
        let sockets = Sockets::of(&config, inherited)?;
        Ok((parts.serve(config, surroundings, http, sockets, control)?, predecessor))
    }
}

/// Every part of an agent. None of them runs by itself.
pub(super) struct AgentParts {
    pub(super) clock: Clock,
    pub(super) metrics: Arc<Metrics>,
    pub(super) series: AgentMetrics,
    pub(super) health: Arc<HealthState>,
    pub(super) issuer: Arc<dyn Issuer>,
    pub(super) writer: Arc<Writer>,
    pub(super) x509: Arc<X509Cache>,
    pub(super) jwt: Arc<JwtCache>,
    pub(super) attestor: Arc<Attestor>,
    pub(super) audit: Arc<AuditTrail>,
    pub(super) journal: Arc<Journal>,
    pub(super) means: Means,
    pub(super) limits_set: SharedLimits,
    pub(super) failed_reload: FailedReload,
    pub(super) log: Arc<OnceLock<Log>>,
    started: SystemTime,
    connections: Arc<ConnectionStats>,
    meter: MemoryMeter,
    pub(super) limits: Limits,
    pub(super) gate: limits::Gate,
}

/// What a reload changes of a running agent. Cheap to clone; all clones are one.
#[derive(Clone)]
pub(super) struct Adjustable {
    pub(super) parts: Arc<AgentParts>,
    /// What bounds a connection that is accepted from now on.
    pub(super) connections: channel::Sender<ConnectionBounds>,
    /// The log of the process, once it is known.
    pub(super) log: Option<Log>,
}

/// What an agent has before it has a place.
struct PreparedAgent {
    clock: Clock,
    metrics: Arc<Metrics>,
    series: AgentMetrics,
    issuer_series: Arc<IssuerMetrics>,
    store_series: Arc<StoreMetrics>,
    health: Arc<HealthState>,
    attestor: Arc<Attestor>,
    means: Means,
    limits_set: SharedLimits,
    /// What is counted of those to callers.
    connections: Arc<ConnectionStats>,
    meter: MemoryMeter,
    limits: Limits,
    gate: limits::Gate,
    surroundings: Surroundings,
    endpoints: HttpEndpoints,
    /// No agent has had its data directory.
    is_first_run: bool,
}

impl PreparedAgent {
    fn of(config: &Config, clock: Clock) -> anyhow::Result<Self> {
        let metrics = Arc::new(Metrics::default().named_as_well(spire_names(config)));
        let series = AgentMetrics::new(metrics.registry(), clock);
        let issuer_series = Arc::new(IssuerMetrics::new(metrics.registry()));
        let store_series = Arc::new(StoreMetrics::new(metrics.registry()));
        let means = Means::of_this_process(http_listeners(config));
        let fitted = means.fit(config)?;
        let health = Arc::<HealthState>::default();
        let asked = [endpoints::of_metrics(config, &metrics), endpoints::of_health(config, &health)].concat();
        let endpoints = HttpEndpoints::bind(asked, means.http_places)?;
        let index = config.issuer_input().index;
        let attestor = Arc::new(Attestor::new(config.attest.clone()).counted_by(metrics.registry()));
        attestor.share_by(config.ratelimit.families.clone(), config.ratelimit.node.cpu);
        attestor.prepare_for(&index);
        attestor.wait(ANSWERS_WITHIN);
        let limits_set = SharedLimits::default();
        let in_force = means.in_force(config, &fitted);
        say_what_fits(&in_force);
        limits_set.set(in_force);
        say_whom_to_distrust(config);
        say_what_is_passed_over(config);
        let keys = caller_keys(config);
        say_where(&keys, in_pod(), fitted.budget);
        let surroundings = look_around(&health, &attestor, in_pod() && keys.looks_for_pods());
        let limits = Limits::new(&fitted.limits, clock, metrics.registry());
        let gate = limits::Gate::new(fitted.gate, &limits);
        let connections = Arc::<ConnectionStats>::default();
        let meter = MemoryMeter::start(&gate, &connections).map_err(|error| no_threads(1, error))?;
        Ok(Self {
            clock,
            metrics,
            series,
            issuer_series,
            store_series,
            health,
            attestor,
            means,
            limits_set,
            connections,
            meter,
            limits,
            gate,
            surroundings,
            endpoints,
            is_first_run: !issuer::has_state(&config.agent.data_dir),
        })
    }

    /// Every part, with the issuer.
    fn with(self, issuer: Arc<dyn Issuer>, config: &Config) -> (AgentParts, Surroundings, HttpEndpoints) {
        let Self { clock, metrics, series, issuer_series, store_series, health, attestor, .. } = self;
        let caches = &config.caches;
        let (x509_svids, jwt_svids) = (caches.x509_svids.count(), caches.jwt_svids.count());
        let x509 = X509Cache::new(Arc::clone(&issuer), clock, x509_svids, caches.availability_target);
        let possible = config.longest_possible_svid_ttl();
        let audit = Arc::new(AuditTrail::noting_in(&config.agent.data_dir, self.is_first_run, possible));
        let x509 = Arc::new(x509.audited(Arc::clone(&audit)));
        let jwt = JwtCache::new(Arc::clone(&issuer), clock, Arc::clone(&store_series), jwt_svids)
            .audited(Arc::clone(&audit));
        let writer = Writer::new(
            Arc::clone(&issuer),
            Arc::clone(&attestor),
            clock,
            Arc::clone(&x509),
            Arc::clone(&store_series),
            config.policy.clone(),
        );
        let scraped = Arc::clone(&issuer);
        metrics.before_render(move || {
            scraped.before_scrape();
            issuer_series.rotation.refresh(clock.now());
            store_series.renewal.refresh(clock.now());
        });
        let journal = Arc::new(Journal::new(metrics.registry(), Arc::clone(&audit)));
        let parts = AgentParts {
            clock,
            metrics,
            series,
            health,
            issuer,
            writer: Arc::new(writer),
            x509,
            jwt: Arc::new(jwt),
            attestor,
            audit,
            journal,
            means: self.means,
            limits_set: self.limits_set,
            failed_reload: FailedReload::default(),
            log: Arc::default(),
            started: clock.now(),
            connections: self.connections,
            meter: self.meter,
            limits: self.limits,
            gate: self.gate,
        };
        (parts, self.surroundings, self.endpoints)
    }
}

impl AgentParts {
    /// Serves at what is bound, and starts the tasks that go on for ever.
    fn serve(
        self,
        config: Config,
        surroundings: Surroundings,
        mut http: HttpEndpoints,
        sockets: Sockets,
        control: &Handle,
    ) -> anyhow::Result<Running> {
        let Sockets { admin, public: socket, came } = sockets;
        let services = self.services()?;
        let keys = Arc::new(caller_keys(&config));
        let (connections, bounds) = channel::channel(connection_bounds(&config, self.means));
        let (stats, admin_stats) = (Arc::clone(&self.connections), Arc::<ConnectionStats>::default());
        let series = ConnectionMetrics::new(self.metrics.registry());
        let counted = (Arc::clone(&stats), Arc::clone(&admin_stats));
        self.metrics.before_render(move || series.set(&counted.0, &counted.1));
        self.tell_of_room();

        let way_in = Arc::<WayIn>::default();
        let witnesses = Witnesses {
            attestor: Arc::clone(&self.attestor),
            store: Arc::clone(self.writer.store()),
            audit: Arc::clone(&self.audit),
            way_in: Arc::clone(&way_in),
            presence: socket.presence(),
            has_server: self.issuer.server().is_some(),
        };
        let (judge, found) = Judge::begin(witnesses, Arc::clone(&self.health), surroundings.told());
        let (public, looks) = (config.agent.socket_path.clone(), keys.looks());
        let standing = self.standing(Arc::clone(&stats), public, looks, found);
        let gate = Arc::new(AuditedGate {
            gate: self.gate.clone(),
            audit: Arc::clone(&self.audit),
            health: Arc::clone(&self.health),
            way_in: Arc::clone(&way_in),
        });
        let listener = Listener { socket, bounds, gate, keys: Arc::clone(&keys), stats };
        // Before an SVID is made.
        self.audit.lifetime_is(config.longest_svid_ttl());
        let known = came.waits().then(|| Arc::clone(self.writer.store()));
        let public = Serving::begin("the workload api", |stopping| async move {
            let stopping = known_or_stopped(known, stopping).await;
            listener.serve(move |_peer| services.clone(), stopping).await
        });
        let (reloads, asked) = mpsc::channel(RELOADS_ASKED);
        let admin = admin.map(|socket| {
            let service = self.admin_service(keys, standing, reloads);
            self.serve_admin(socket, service, admin_stats)
        });
        http.serve(control);
        let (held, answering) = http.into_served();
        let mut tasks = self.tasks(held);
        tasks.spawn(surroundings.keep_looking(Arc::clone(&self.health), Arc::clone(&self.attestor)));
        tasks.spawn(judge.run());
        let mut issuing = JoinSet::new();
        issuing.spawn(Arc::clone(&self.issuer).run());
        let gate = self.gate.clone();
        tasks.spawn_on(async move { gate.follow().await }, control);
        tasks.spawn_on(keep_time(self.limits.clone(), self.gate.clone(), self.meter.clone()), control);

        self.series.loaded();
        self.health.set(Probe::Healthy);
        self.health.kept_waiting_by(None);
        let adjustable = Adjustable { parts: Arc::new(self), connections, log: None };
        let (config, asked, keeper) = (Arc::new(config), Some(asked), came.keeper());
        Ok(Running { config, adjustable, public, admin, tasks, http: answering, asked, issuing, keeper })
    }

    /// Has a scrape tell how memory stands, and whether the processor is short.
    fn tell_of_room(&self) {
        let (memory, processor) =
            (MemoryMetrics::new(self.metrics.registry()), ProcessorMetrics::new(self.metrics.registry()));
        let (gate, meter) = (self.gate.clone(), self.meter.clone());
        self.metrics.before_render(move || {
            memory.set(gate.memory(), meter.charged());
            processor.set(gate.room());
        });
    }

    fn serve_admin(&self, socket: Socket, service: AdminService, stats: Arc<ConnectionStats>) -> Serving {
        let listener = Listener {
            socket,
            bounds: channel::channel(admin::connection_bounds()).1,
            gate: Arc::new(OwnerGate::new(self.gate.clone())),
            keys: Arc::new(OsUid),
            stats,
        };
        Serving::begin("the admin api", |stopping| {
            listener.serve(move |_peer| service.clone(), told_to_leave(stopping))
        })
    }

    fn services(&self) -> anyhow::Result<Services> {
        let workload = WorkloadApi::new(Parts {
            limits: self.limits.clone(),
            attestor: Arc::clone(&self.attestor),
            store: Arc::clone(self.writer.store()),
            issuer: Arc::clone(&self.issuer),
            x509: Arc::clone(&self.x509),
            jwt: Arc::clone(&self.jwt),
            journal: Arc::clone(&self.journal),
            clock: self.clock,
        });
        Services::new(workload, Arc::clone(&self.health), self.limits.clone())
            .context("the built-in descriptors cannot be read")
    }

    fn standing(
        &self,
        connections: Arc<ConnectionStats>,
        socket_path: PathBuf,
        kubernetes: bool,
        found: channel::Receiver<Vec<String>>,
    ) -> AgentStanding {
        AgentStanding {
            store: Arc::clone(self.writer.store()),
            issuer: Arc::clone(&self.issuer),
            x509: Arc::clone(&self.x509),
            jwt: Arc::clone(&self.jwt),
            health: Arc::clone(&self.health),
            connections,
            limits: self.limits_set.clone(),
            failed_reload: self.failed_reload.clone(),
            log: Arc::clone(&self.log),
            started: self.started,
            socket_path,
            kubernetes,
            found,
        }
    }

    fn admin_service(
        &self,
        keys: Arc<PodOrUid>,
        standing: AgentStanding,
        reloads: mpsc::Sender<AskedReload>,
    ) -> AdminService {
        let meter = self.meter.clone();
        AdminService::new(admin::AdminParts {
            limits: self.limits.clone(),
            gate: self.gate.clone(),
            attestor: Arc::clone(&self.attestor),
            keys,
            store: Arc::clone(self.writer.store()),
            standing,
            reloads,
            charged: Box::new(move || meter.charged().map(|charged| (charged.used, charged.kernel))),
        })
    }

    /// What goes on for ever.
    fn tasks(&self, http: Vec<HeldPlaces>) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&self.writer).run());
        let watch = Watch {
            limits: self.limits.clone(),
            gate: self.gate.clone(),
            attestor: Arc::clone(&self.attestor),
            x509: Arc::clone(&self.x509),
            jwt: Arc::clone(&self.jwt),
            store: Arc::clone(self.writer.store()),
            journal: Arc::clone(&self.journal),
            http,
            meter: self.meter.clone(),
            complaints: Complaints::default(),
        };
        let (metrics, health) = (Arc::clone(&self.metrics), Arc::clone(&self.health));
        // One task, on one thread: they are due at the same beats, and of several that are due another thread is woken to take some.
        tasks.spawn(async move { tokio::join!(watch.run(), metrics.keep_up(), keep_identifying(health)).1 });
        tasks.spawn(probe(Arc::clone(&self.health), Arc::clone(&self.issuer)));
        tasks
    }
}

/// spire-agent's names of series, where they are wanted.
fn spire_names(config: &Config) -> Option<SpireNames> {
    let trust_domain = config.trust_domain.name();
    let wanted = config.spire_names.enabled;
    wanted.then(|| SpireNames::new(&config.spire_names, trust_domain, config.issuer.node_attestor()))
}

/// Whom callers are charged to.
fn caller_keys(config: &Config) -> PodOrUid {
    let looks = in_pod() || config.attest.k8s.enabled;
    PodOrUid::new(config.kubernetes.mode, looks, config.kubernetes.kubelet_root.clone())
}

/// Whether Kubernetes started this process: it gives every container this variable.
#[expect(clippy::disallowed_methods, reason = "the one variable that tells; read at start")]
pub(super) fn in_pod() -> bool {
    std::env::var("KUBERNETES_SERVICE_HOST").is_ok()
}

/// Until it is told to leave, or nobody is there to tell it.
async fn told_to_leave(stopping: oneshot::Receiver<Leave>) -> Leave {
    stopping.await.unwrap_or(Leave::Abandon)
}

/// Waits until it is known here whom the issuer serves, for a while, or is told to leave. What it is told, or will be.
async fn known_or_stopped(
    store: Option<Arc<Store>>,
    mut stopping: oneshot::Receiver<Leave>,
) -> impl Future<Output = Leave> + Send {
    let known = async {
        if let Some(store) = store {
            let mut snapshots = store.subscribe();
            let is_known = || !store.snapshot().bundles.own.x509_authorities.is_empty();
            let known = async { while !is_known() && snapshots.changed().await.is_ok() {} };
            let _known_or_not = timeout(KNOWN_WITHIN, known).await.is_ok();
        }
    };
    let told = tokio::select! {
        biased;
        told = &mut stopping => Some(told.unwrap_or(Leave::Abandon)),
        () = known => None,
    };
    async move {
        match told {
            Some(told) => told,
            None => told_to_leave(stopping).await,
        }
    }
}
