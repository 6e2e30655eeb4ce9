//! What the agent tells its owner, on the admin socket: the limits as they stand, and who a process is taken for.
//!
//! The listener lets in the agent's own user and root alone ([`OwnerGate`]), so nobody is attested, charged or asked
//! for the security header here. Nothing is changed by a call, no key or token is in an answer, and an answer is
//! bounded by [`MOST`] and by the entries that match. It shares nothing with the public socket but the runtime: its
//! listener and its places are its own, so that it answers while the public one is flooded.

use std::{convert::Infallible, sync::Arc, time::Duration};

use http::{Request, Response};
use nix::unistd::{Uid, geteuid};
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, body::Body};
use tower_service::Service as _;

use super::{
    guard::{GuardedAnswer, TimeLeft},
    proto::admin::{
        self as pb,
        admin_server::{Admin, AdminServer},
    },
    reached::Reached,
    services::{answered, ends, grpc_body},
    standing::{AgentStanding, absent, entry_of},
};
use crate::{
    attest::{
        Attestor, AttestorSaid, Subject,
        inspect::{Description, InspectError, UntoldKind},
    },
    identity::Entry,
    limits::{
        self, CallerKey, ConnectionPermit, ConnectionRefusal, Limits, Method, WhoHolds,
        attempt::Attempt,
        budget::Pressure,
        gate_standings::{HeldByCaller, MemoryStanding, SharesNow},
        refusal::Stage,
        report::{BucketName, Heavy, Standing},
        room::Short,
        rule::Origin,
        shares::Taking,
    },
    os::heap,
    peer::{
        AcceptGate, Arrival, ConnectionBounds, ConnectionService, RequestBody,
        cgroup::{KeySource, PodOrUid},
    },
    store::{Snapshot, Store},
    telemetry::{chain, registry::Label as _},
};

/// How many of the heaviest are told when nobody says how many.
const TOP: u32 = 10;
/// The most of the heaviest that are told.
pub const MOST: u32 = 1000;
/// What there may be no room of beside connections.
const SHORTAGES: [Short; 2] = [Short::Memory, Short::Processor];
/// How many are told of those who take from a bucket, and as many of those who go without.
const FOREMOST: usize = 8;
/// How many of the entries that nearly match are told.
const NEAREST: usize = 5;

/// The largest request, in bytes: each holds a few numbers, or one name.
const MAX_REQUEST: usize = 4096;

/// Lets the agent's own user and root connect, by the kernel's word, to places that are kept for them.
#[derive(Clone, Debug)]
pub struct OwnerGate {
    gate: limits::Gate,
    uid: Uid,
}

impl OwnerGate {
    /// The user that this process runs as, with the places of `gate`.
    pub fn new(gate: limits::Gate) -> Self {
        Self { gate, uid: geteuid() }
    }
}

impl AcceptGate for OwnerGate {
    type Permit = ConnectionPermit;

    fn admit_connection(
        &self,
        arrival: &Arrival,
        _attempt: Attempt,
    ) -> Result<ConnectionPermit, ConnectionRefusal> {
        let uid = arrival.credentials().uid;
        if uid != self.uid && !uid.is_root() {
            return Err(ConnectionRefusal::NotOwner);
        }
        self.gate.open_admin()
    }

    /// An admin reaches an agent too that cannot tell callers apart: what it lacks is among what is asked for here.
    fn goes_by_user(&self) -> bool {
        true
    }

    fn family(&self, arrival: &Arrival) -> u64 {
        self.gate.family_of(arrival.caller())
    }
}

/// What bounds an admin connection: few are open, and each asks for little.
pub fn connection_bounds() -> ConnectionBounds {
    ConnectionBounds {
        handshake_timeout: Duration::from_secs(2),
        idle_timeout: Some(Duration::from_secs(60)),
        drain_timeout: Duration::from_secs(1),
        max_concurrent_streams: 4,
        max_header_list_size: 4 * 1024,
        ..ConnectionBounds::default()
    }
}

/// What the answers are made of.
pub struct AdminParts {
    /// The buckets of callers and identities.
    pub limits: Limits,
    pub gate: limits::Gate,
    /// Who a process is.
    pub attestor: Arc<Attestor>,
    /// Whom a process is charged as.
    pub keys: Arc<PodOrUid>,
    pub store: Arc<Store>,
    /// How the agent is.
    pub standing: AgentStanding,
    /// Where a reload is asked for.
    pub reloads: mpsc::Sender<AskedReload>,
    /// What is charged to the agent's cgroup, if it is alone in one, and the kernel's part of it, in bytes.
    pub charged: Box<dyn Fn() -> Option<(u64, u64)> + Send + Sync>,
}

/// Somebody who asked for a reload, and is to be told what comes of it.
pub type AskedReload = oneshot::Sender<pb::ReloadResponse>;

/// The one service of the admin socket. Cheap to clone.
#[derive(Clone)]
pub struct AdminService(AdminServer<AdminParts>);

impl AdminService {
    /// Answers with these parts.
    pub fn new(parts: AdminParts) -> Self {
        Self(AdminServer::new(parts).max_decoding_message_size(MAX_REQUEST))
    }
}

impl ConnectionService for AdminService {
    type Body = Body;
}

impl hyper::service::Service<Request<RequestBody>> for AdminService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = GuardedAnswer;

    fn call(&self, request: Request<RequestBody>) -> GuardedAnswer {
        let left = TimeLeft::until(ends(&request));
        let answer = if request.uri().path().starts_with("/durward.admin.v1.Admin/") {
            self.0.clone().call(request.map(|body| grpc_body(body, MAX_REQUEST, Reached::default())))
        } else {
            answered(Status::unimplemented("this is the admin socket: it serves durward.admin.v1.Admin"))
        };
        GuardedAnswer::new(answer, false, left)
    }
}

#[tonic::async_trait]
impl Admin for AdminParts {
    async fn limits(
        &self,
        request: tonic::Request<pb::LimitsRequest>,
    ) -> Result<tonic::Response<pb::LimitsResponse>, Status> {
        let top = match request.into_inner().top {
            0 => TOP,
            top => top.min(MOST),
        };
        Ok(tonic::Response::new(self.limits_now(usize::try_from(top).unwrap_or(usize::MAX))))
    }

    async fn status(
        &self,
        _request: tonic::Request<pb::StatusRequest>,
    ) -> Result<tonic::Response<pb::StatusResponse>, Status> {
        Ok(tonic::Response::new(self.standing.status(self.attestor.troubles())))
    }

    async fn entries(
        &self,
        request: tonic::Request<pb::EntriesRequest>,
    ) -> Result<tonic::Response<pb::EntriesResponse>, Status> {
        self.standing.entries(&request.into_inner()).map(tonic::Response::new)
    }

    async fn bundle(
        &self,
        request: tonic::Request<pb::BundleRequest>,
    ) -> Result<tonic::Response<pb::BundleResponse>, Status> {
        self.standing.bundle(&request.into_inner().trust_domain).map(tonic::Response::new)
    }

    async fn reload(
        &self,
        _request: tonic::Request<pb::ReloadRequest>,
    ) -> Result<tonic::Response<pb::ReloadResponse>, Status> {
        self.reloaded().await.map(tonic::Response::new)
    }

    async fn explain(
        &self,
        request: tonic::Request<pb::ExplainRequest>,
    ) -> Result<tonic::Response<pb::ExplainResponse>, Status> {
        self.explained(request.into_inner().pid).await.map(tonic::Response::new).map_err(|err| match &err {
            InspectError::NoProcess(_) => Status::not_found(err.to_string()),
            InspectError::Pidfd { .. } | InspectError::Attest { .. } => {
                Status::failed_precondition(chain(&err))
            }
        })
    }
}

impl AdminParts {
    async fn reloaded(&self) -> Result<pb::ReloadResponse, Status> {
        let (asking, told) = oneshot::channel();
        self.reloads.try_send(asking).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                Status::unavailable("other reloads have not ended; try again")
            }
            mpsc::error::TrySendError::Closed(_) => Status::unavailable("the agent is about to end"),
        })?;
        told.await.map_err(|_gone| Status::unavailable("the agent ended before it had reloaded"))
    }

    fn limits_now(&self, top: usize) -> pb::LimitsResponse {
        // One more shows whether there are more.
        let mut heaviest = self.limits.heaviest(top + 1);
        heaviest.extend(self.gate.report(top + 1).into_iter().map(|heavy| (Stage::Gate, heavy)));
        heaviest.sort_by_key(|(_, heavy)| std::cmp::Reverse((heavy.refused, heavy.used)));
        let mut connections = self.gate.heaviest(top + 1);
        let (more_heaviest, more_connections) = (heaviest.len() > top, connections.len() > top);
        heaviest.truncate(top);
        connections.truncate(top);
        let (shares, lately) = (self.gate.shares(), self.limits.room().processor_use());
        let (callers, identities) = self.limits.keys();
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        pb::LimitsResponse {
            heaviest: heaviest.into_iter().map(|(stage, heavy)| self.heavy(stage, &heavy)).collect(),
            connections: connections
                .into_iter()
                .map(|(holder, open, held)| connections_of(holder, (open, held)))
                .collect(),
            node_connections: self.gate.connections(),
            attestations_in_flight: self.limits.attestations(),
            memory: Some(self.memory()),
            short_of: self.short_of(),
            calls_waiting: self.limits.waiting(),
            spare_calls: self.limits.spare_calls(),
            most_connections: self.gate.most_connections(),
            share: shares.bytes,
            share_of_connections: shares.connections,
            used_millicores: lately.ran,
            waited_millicores: lately.waited,
            millicores: self.gate.processor_share().millicores(),
            more_heaviest,
            more_connections,
            keys: Some(pb::Keys {
                gate: count(self.gate.keys()),
                caller: count(callers),
                identity: count(identities),
            }),
        }
    }

    /// Of what there is no room.
    fn short_of(&self) -> Vec<String> {
        let is_short = |short: &Short| self.limits.room().is_short(*short);
        let mut all: Vec<&str> = SHORTAGES.into_iter().filter(is_short).map(Short::text).collect();
        // Memory first, and the processor last.
        let at = all.len().min(usize::from(all.first() == Some(&Short::Memory.text())));
        if let Some(places) = self.gate.lacks_places() {
            all.insert(at, places);
        }
        all.into_iter().map(str::to_owned).collect()
    }

    /// What a caller holds, and what is short.
    fn holding(&self, caller: CallerKey) -> pb::Holding {
        let HeldByCaller { own, family, most } = self.gate.held_by(caller);
        let SharesNow { bytes, connections } = self.gate.shares();
        let heaviest = self.gate.heaviest(1).into_iter().next();
        pb::Holding {
            caller: Some(connections_of(WhoHolds { caller, others: 0 }, own)),
            family: family.map(|held| connections_of(self.gate.holder(caller), held)),
            most,
            short_of: self.short_of(),
            share: bytes,
            share_of_connections: connections,
            node_connections: self.gate.connections(),
            most_connections: self.gate.most_connections(),
            heaviest: heaviest.map(|(holder, open, held)| connections_of(holder, (open, held))),
            refused: self.gate.refused(caller),
        }
    }

    fn memory(&self) -> pb::Memory {
        let MemoryStanding { budget, held, used, pressure: now, .. } = self.gate.memory();
        let (cgroup, kernel) = (self.charged)().unzip();
        let pressure = pressure(now).to_owned();
        pb::Memory { pressure, budget, resident: heap::resident(), used, held, cgroup, kernel }
    }

    fn heavy(&self, stage: Stage, heavy: &Heavy) -> pb::Heavy {
        let (standing, dry_run) = match (&heavy.name, stage) {
            (BucketName::Caller(caller), Stage::Gate) => {
                (Some(self.gate.standing(*caller).1), self.gate.is_dry_run(*caller))
            }
            (name, _) => {
                let method = Method::ALL.into_iter().find(|method| method.rpc() == heavy.what);
                (
                    method.and_then(|method| self.limits.standing(name, method)),
                    method.is_some_and(|method| self.limits.is_dry_run(name, method)),
                )
            }
        };
        let bucket = bucket(stage, &heavy.name, heavy.what, standing);
        let mut bucket = pb::Bucket { dry_run, ..bucket };
        if heavy.name == BucketName::WithoutBucket {
            bucket.limit = pb::Limit::Several.into();
        }
        pb::Heavy {
            bucket: Some(bucket),
            used: heavy.used,
            refused: heavy.refused,
            takings: takings(heavy.takings.clone()),
            most_in_a_second: heavy.most,
        }
    }

    async fn explained(&self, pid: i32) -> Result<pb::ExplainResponse, InspectError> {
        let process = self.attestor.inspect(pid).await?;
        // Before the attestor, which asks last whether the process still lives.
        let (caller, source) = self.keys.explain(process.pid(), process.uid());
        let process = process.within(source.place());
        let snapshot = self.store.snapshot();
        let Description { subject, untold, said } =
            self.attestor.describe(&process, &snapshot.questions).await?;
        let matches = matches(&snapshot, &subject);
        let near = snapshot.index.nearest(&subject, NEAREST);
        let (uid, gid) = (process.uid().as_raw(), process.gid().as_raw());
        let command = process.command().to_owned();
        Ok(pb::ExplainResponse {
            pid,
            uid,
            gid,
            caller: Some(why(caller, source)),
            selectors: subject.iter().map(ToString::to_string).collect(),
            buckets: self.buckets(caller, &matches),
            matches: matches.into_iter().map(|(entry, withheld)| entry_of(&entry, withheld)).collect(),
            nearest: near
                .into_iter()
                .map(|near| pb::Near {
                    missing: near.missing.iter().map(ToString::to_string).collect(),
                    absent: absent(&near.missing, &snapshot.questions),
                    found: u32::try_from(near.entry.selectors.len() - near.missing.len()).unwrap_or(u32::MAX),
                    entry: Some(entry_of(&near.entry, String::new())),
                })
                .collect(),
            untold: untold
                .into_iter()
                .map(|UntoldKind { kind, why, decides }| pb::Untold { kind, why: chain(&why), decides })
                .collect(),
            attestors: said.into_iter().map(said_of).collect(),
            command,
            not_known: self.standing.not_known().unwrap_or_default(),
            agent_id: self.standing.agent_id().unwrap_or_default(),
            holding: Some(self.holding(caller)),
        })
    }

    /// The buckets of a caller and of what it is served.
    fn buckets(&self, caller: CallerKey, matches: &[(Arc<Entry>, String)]) -> Vec<pb::Bucket> {
        let (name, standing) = self.gate.standing(caller);
        let of_gate = bucket(Stage::Gate, &name, "connections", Some(standing));
        let mut all = vec![pb::Bucket { dry_run: self.gate.is_dry_run(caller), ..of_gate }];
        let mut of_caller: Vec<_> =
            Method::ALL.map(|method| (method, self.limits.caller_standing(caller, method))).into();
        // Those that it shares with others come last.
        of_caller.sort_by_key(|(_, (name, _))| *name == BucketName::WithoutBucket);
        all.extend(
            of_caller
                .into_iter()
                .map(|(method, (name, standing))| self.bucket_of(Stage::Caller, &name, method, standing)),
        );
        let mut told: Vec<(String, &'static str)> = Vec::new();
        for (entry, _) in matches.iter().filter(|(_, withheld)| withheld.is_empty()) {
            for method in Method::ALL.into_iter().filter(|method| method.has_identity()) {
                let (name, standing) = self.limits.identity_standing(&entry.spiffe_id, method);
                // Entries of one SPIFFE ID, or of one mask, have one bucket.
                let key = (name.to_string(), method.rpc());
                if !told.contains(&key) {
                    told.push(key);
                    all.push(self.bucket_of(Stage::Identity, &name, method, standing));
                }
            }
        }
        for method in Method::ALL {
            if let Some((name, standing)) = self.limits.node_standing(method) {
                all.push(self.bucket_of(Stage::Node, &name, method, standing));
            }
        }
        all
    }

    /// A bucket, and who takes from it.
    fn bucket_of(&self, stage: Stage, name: &BucketName, method: Method, standing: Standing) -> pb::Bucket {
        let takings = takings(self.limits.takings(name, method));
        let dry_run = self.limits.is_dry_run(name, method);
        pb::Bucket { takings, dry_run, ..bucket(stage, name, method.rpc(), Some(standing)) }
    }
}

/// The entries that match, each with why it is not served if it is not.
fn matches(snapshot: &Snapshot, subject: &Subject) -> Vec<(Arc<Entry>, String)> {
    let served = snapshot.index.matching(subject, None);
    let withheld = |entry: &Arc<Entry>| match served.iter().find(|it| it.hint == entry.hint) {
        _ if served.iter().any(|it| it.id == entry.id) => String::new(),
        Some(first) => format!("an older entry, {}, has the same hint", first.id),
        None => String::new(),
    };
    let all = snapshot.index.entries().iter();
    let matching = all.filter(|entry| !entry.selectors.is_empty() && entry.selectors.is_subset(subject));
    matching.map(|entry| (Arc::clone(entry), withheld(entry))).collect()
}

fn said_of(said: AttestorSaid) -> pb::Said {
    let AttestorSaid { attestor, selectors, took, age } = said;
    let whole = |number: u128| u64::try_from(number).unwrap_or(u64::MAX);
    pb::Said {
        attestor: attestor.text().to_owned(),
        selectors: u32::try_from(selectors).unwrap_or(u32::MAX),
        took_microseconds: whole(took.as_micros()),
        age_milliseconds: age.map(|age| whole(age.as_millis())),
    }
}

fn connections_of(WhoHolds { caller, others }: WhoHolds, (open, held): (u32, u64)) -> pb::Connections {
    pb::Connections { caller: caller.to_string(), open, held, others }
}

fn why(key: CallerKey, source: KeySource) -> pb::Caller {
    let (why, cgroup_line) = match source {
        KeySource::Pod { line, .. } => ("its cgroup is a pod's", line),
        KeySource::NotKubernetes => ("its user (Kubernetes was not found)", String::new()),
        KeySource::NoPod => ("its user (its cgroup may not be a pod's)", String::new()),
        KeySource::Unreadable => ("its user (its cgroup cannot be read)", String::new()),
    };
    pb::Caller { key: key.to_string(), why: why.to_owned(), cgroup_line }
}

/// Those who were refused most, and of the others those who take most.
fn takings(mut all: Vec<Taking>) -> Vec<pb::Taking> {
    if let Some(others) = all.get_mut(FOREMOST..) {
        others.sort_by_key(|taking| std::cmp::Reverse(taking.used));
    }
    all.iter().take(2 * FOREMOST).map(taking).collect()
}

fn taking(taking: &Taking) -> pb::Taking {
    let caller = taking.caller.map(|caller| caller.to_string()).unwrap_or_default();
    pb::Taking { caller, used: taking.used, refused: taking.refused }
}

fn bucket(stage: Stage, name: &BucketName, method: &str, standing: Option<Standing>) -> pb::Bucket {
    let by_default = matches!(standing, Some(Standing::Tokens { origin: Origin::ByDefault, .. }));
    let (limit, left, burst) = match standing {
        None => (pb::Limit::Unknown, 0, 0),
        Some(Standing::Tokens { left, quota, origin: _ }) => (pb::Limit::Tokens, left, quota.burst()),
        Some(Standing::Unlimited) => (pb::Limit::Unlimited, 0, 0),
        Some(Standing::Exempt) => (pb::Limit::Exempt, 0, 0),
        Some(Standing::Blocked) => (pb::Limit::Blocked, 0, 0),
    };
    pb::Bucket {
        stage: stage.text().to_owned(),
        key: name.to_string(),
        method: method.to_owned(),
        limit: limit.into(),
        left,
        burst,
        by_default,
        takings: Vec::new(),
        dry_run: false,
    }
}

fn pressure(pressure: Pressure) -> &'static str {
    match pressure {
        Pressure::None => "none",
        Pressure::ShrinkCaches => "shrink_caches",
        Pressure::RefuseNew => "refuse_new",
        Pressure::CloseHeaviest => "close_heaviest",
    }
}
