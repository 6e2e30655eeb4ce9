//! The places that a configuration names: whether nobody but root and the agent's user can change what is there, and
//! whether workloads can reach the socket. Looked at before anything is made, and again at each reload.

use std::{
    io::{self, Read as _},
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    time::SystemTime,
};

use nix::unistd::geteuid;

use super::{
    agent::{AdminSocket, DEFAULT_DATA_DIR, DEFAULT_SOCKET_PATH},
    document::Config,
    file::said_of,
    issuer::{JoinedServer, Signer},
};
use crate::{
    attest::unix::{BLIND, may_look_at_executables},
    identity::{Bundle, bundle::MAX_LEN},
    issuer::{
        FileFault, IssuerChoice, check_data_dir, check_supplied_secret,
        embedded::{self, IssuerError, try_sources},
        server::{
            AGENT_DATA, DataFault, PopFault, check_pop, check_psat, own_svid,
            settings::{KeyManagerSettings, NodeAttestorSettings, TrustBundleFormat},
        },
    },
    os::{
        sentence::said,
        trusted::{ClosedDir, PathError, Trust, TrustedDir, parent},
    },
    peer::socket::is_taken,
    telemetry::http::can_bind,
};

const KEYS: &str = "plugins.KeyManager \"disk\".plugin_data.directory";
const CERTIFICATE: &str = "plugins.NodeAttestor \"x509pop\".plugin_data.certificate_path";
const INTERMEDIATES: &str = "plugins.NodeAttestor \"x509pop\".plugin_data.intermediates_path";
const TOKEN: &str = "plugins.NodeAttestor \"k8s_psat\".plugin_data.token_path";
const KEY: &str = "plugins.NodeAttestor \"x509pop\".plugin_data.private_key_path";

const DISCOVER: &str = "plugins.WorkloadAttestor \"unix\".plugin_data.discover_workload_path";

/// Users below this number are the system's (login.defs, SYS_UID_MAX): their agents serve others than themselves.
const FIRST_ORDINARY_USER: u32 = 1000;

/// What was found.
#[derive(Debug, Default)]
pub struct Places {
    /// What keeps the agent from starting.
    pub wrong: Vec<WrongPlace>,
    /// Directories above the socket through which others than their owner and group do not pass, which may be meant.
    pub closed: Vec<ClosedDir>,
}

/// A key whose value names a place that will not do.
#[derive(Debug)]
pub struct WrongPlace {
    /// Its full name.
    pub key: &'static str,
    pub value: PathBuf,
    /// What is wrong, and what would be right.
    pub message: String,
}

/// An address that others have, or that this process may not have: an agent that runs, perhaps this one's.
#[derive(Debug)]
pub struct TakenAddress {
    /// The full name of the key that says its port.
    pub key: &'static str,
    pub host: String,
    pub port: u16,
    pub cause: io::Error,
}

/// The user that an agent runs as, as far as can be told.
#[derive(Debug)]
pub struct AgentUser {
    pub uid: u32,
    /// What shows it: `data_dir`, or the directory above in which it would be made.
    pub owns: PathBuf,
}

impl Places {
    fn note(&mut self, key: &'static str, value: &Path, found: Result<(), impl ToString>) {
        if let Err(error) = found {
            self.wrong.push(WrongPlace { key, value: value.to_owned(), message: said_of(value, error) });
        }
    }
}

/// Whether this process is an agent of `ours` that serves all users, and cannot look at what their processes execute.
fn lacks_capability(ours: u32) -> bool {
    ours < FIRST_ORDINARY_USER && ours == geteuid().as_raw() && !may_look_at_executables()
}

impl Config {
    /// Looks at the places as an agent of user `ours` would. What is missing is not wrong. Makes nothing.
    pub fn places(&self, ours: u32) -> Places {
        let trust = Trust::of(ours);
        let mut places = Places::default();
        let data_dir = &self.agent.data_dir;
        places.note("agent.data_dir", data_dir, check_data_dir(data_dir, ours));
        let socket = &self.agent.socket_path;
        for (key, at) in self.sockets() {
            places.note(key, at, socket_place(trust.directory(parent(at)), at));
        }
        places.wrong.extend(self.sockets_in_the_way(trust));
        if let Some(admin) = &self.agent.admin_socket_path {
            let dir = trust.directory(parent(admin)).and_then(TrustedDir::for_us_alone);
            places.note("agent.admin_socket_path", admin, socket_place(dir, admin));
        }
        for (key, file) in self.log_files() {
            places.note(key, file, there(trust.to_append().route(file)));
        }
        // Whoever can put a socket there is told who was given what, and what it does not take is lost.
        if let Some(at) = self.audit.socket.as_deref().filter(|_| self.audit.enabled) {
            places.note("audit.socket_path", at, socket_place(trust.directory(parent(at)), at));
        }
        for (key, file) in self.issuer_files() {
            places.note(key, file, there(trust.open(file)));
        }
        if let Some(directory) = self.keys_directory() {
            places.note(KEYS, directory, check_data_dir(directory, ours));
        }
        if self.attest.unix.settings.discover_workload_path && lacks_capability(ours) {
            let message = "needs CAP_SYS_PTRACE, which this agent does not have: every call for which an entry asks for \
                           unix:path or unix:sha256 would fail. With systemd, install discover-workload-path.conf as a \
                           drop-in; on Kubernetes, add SYS_PTRACE to the capabilities";
            places.note(DISCOVER, Path::new("true"), Err::<(), _>(message));
        }
        let below = match &self.issuer {
            Signer::Embedded(_) => below_closed(trust, socket, data_dir, "data_dir"),
            // spire-agent puts both where it is told, and workloads of its own user get there: that it is closed is said.
            Signer::Server(_) => None,
        };
        let below = below.or_else(|| {
            let admin =
                self.agent.admin_socket_path.as_deref().filter(|_| self.agent.admin_socket_enabled)?;
            let is_left = matches!(self.issuer, Signer::Server(_)) && parent(admin).exists();
            let whose = "the directory of admin_socket_path";
            if is_left { None } else { below_closed(trust, socket, parent(admin), whose) }
        });
        match below {
            Some(message) => places.note("agent.socket_path", socket, Err::<(), _>(message)),
            None => places.closed = trust.route(parent(socket)).map(|way| way.closed).unwrap_or_default(),
        }
        places
    }

    /// What is wrong with a file for lines that cannot be opened.
    pub fn wrong_log_file(&self, file: &Path, error: &PathError) -> WrongPlace {
        let key = self.log_files().find(|(_, at)| *at == file).map_or("agent.log_file", |(key, _)| key);
        WrongPlace { key, value: file.to_owned(), message: said_of(file, error) }
    }

    /// Where an agent of a SPIRE Server keeps its key.
    fn keys_directory(&self) -> Option<&Path> {
        let Signer::Server(joined) = &self.issuer else { return None };
        match &joined.key_manager {
            KeyManagerSettings::Disk(directory) => Some(directory),
            KeyManagerSettings::Memory => None,
        }
    }

    /// The files that lines are written to, with their keys.
    fn log_files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let log = self.log.file.as_deref().map(|file| ("agent.log_file", file));
        let audit = self.audit.file.as_deref().filter(|_| self.audit.enabled);
        log.into_iter().chain(audit.map(|file| ("audit.file", file)))
    }

    /// Whether the addresses of the HTTP endpoints can be bound on this node: what can never be, and what cannot be now.
    pub fn addresses(&self) -> (Vec<WrongPlace>, Vec<TakenAddress>) {
        let health =
            (self.health.enabled).then_some(("health_checks.bind_port", &self.health.host, self.health.port));
        let metrics = self.prometheus.as_ref().map(|at| ("telemetry.Prometheus.port", &at.host, at.port));
        let (mut wrong, mut taken) = (Vec::new(), Vec::new());
        for (key, host, port) in health.into_iter().chain(metrics) {
            let Err(cause) = can_bind(host, port) else { continue };
            // What this user may not do another may, whose agent it is.
            let is_anothers = || geteuid().as_raw() != self.agent_user().uid;
            let denied = cause.kind() == io::ErrorKind::PermissionDenied;
            if cause.kind() == io::ErrorKind::AddrInUse || denied && is_anothers() {
                taken.push(TakenAddress { key, host: host.clone(), port, cause });
            } else {
                let how = if denied {
                    "; choose a port from 1024 on, or give the agent CAP_NET_BIND_SERVICE"
                } else {
                    ""
                };
                let message = format!("cannot listen at {host} port {port}: {}{how}", said(&cause));
                wrong.push(WrongPlace { key, value: port.to_string().into(), message });
            }
        }
        (wrong, taken)
    }

    /// Places that somebody has now: an agent that runs, perhaps this one's. The key of each, and where it is.
    pub fn places_in_use(&self, trust: Trust) -> Vec<(&'static str, PathBuf)> {
        let data_dir = self.agent.data_dir.as_path();
        let is_in_use = match &self.issuer {
            Signer::Embedded(_) => embedded::is_in_use(data_dir, trust),
            Signer::Server(_) => own_svid::is_in_use(data_dir, trust),
        };
        let admin = match self.agent.admin_socket() {
            Some(AdminSocket::Configured(path) | AdminSocket::ByDefault(path)) => Some(path),
            None => None,
        };
        let admin = admin.map(|at| ("agent.admin_socket_path", at));
        let sockets = self.sockets().map(|(key, at)| (key, at.to_owned())).chain(admin);
        let sockets = sockets.filter(|(_, at)| is_taken(at));
        is_in_use.then(|| ("agent.data_dir", data_dir.to_owned())).into_iter().chain(sockets).collect()
    }

    /// What a start needs at `now`, and the user of `trust` does not find, or could not make: the places of sockets, keys and
    /// lines, and a CA that can sign. An agent that runs does not need them again. Makes nothing.
    pub fn missing_places(&self, trust: Trust, now: SystemTime) -> Vec<WrongPlace> {
        let mut found = Places::default();
        let us = geteuid();
        // What this process cannot open another's agent may.
        let tells = |error: &io::Error| {
            error.kind() == io::ErrorKind::NotFound || us.is_root() || us.as_raw() == trust.user()
        };
        for (key, file) in self.log_files() {
            match trust.to_append().could_append(file) {
                Err(PathError::Open { cause, .. }) if !tells(&cause) => {}
                // Places says it.
                Err(PathError::Untrusted { .. } | PathError::Mounted { .. }) => {}
                tried => found.note(key, file, tried),
            }
        }
        let admin = self.agent.admin_socket_path.as_deref().map(|at| ("agent.admin_socket_path", at));
        let sockets = self.sockets().chain(admin).map(|(key, at)| (key, at, parent(at)));
        let data_dir = self.agent.data_dir.as_path();
        let keys = self.keys_directory().map(|dir| (KEYS, dir, dir));
        for (key, value, dir) in sockets.chain([("agent.data_dir", data_dir, data_dir)]).chain(keys) {
            if let Err(PathError::Open { path, cause }) = trust.could_make_in(dir)
                && tells(&cause)
            {
                let is_default = [DEFAULT_DATA_DIR, DEFAULT_SOCKET_PATH].map(Path::new).contains(&value);
                let by_default = if is_default {
                    format!(
                        "; this is the default: set {} to another place",
                        key.trim_start_matches("agent.")
                    )
                } else {
                    String::new()
                };
                let user = trust.user();
                let what = if path == value { "a file" } else { "it" };
                let path = path.display();
                let message =
                    format!("user {user} cannot make {what} in {path}: {}{by_default}", said(&cause));
                found.note(key, value, Err::<(), _>(message));
            }
        }
        let Signer::Embedded(issuer) = &self.issuer else {
            self.try_kept(trust, tells, &mut found);
            self.try_pop(trust, &mut found);
            return found.wrong;
        };
        if let Some(file) = &issuer.ca_cert_path
            && let Err(PathError::Open { path, cause }) = trust.open(file)
            && tells(&cause)
        {
            found.note(
                "issuer \"embedded\".ca_cert_path",
                file,
                Err::<(), _>(PathError::Open { path, cause }),
            );
        }
        if let Some(file) = &issuer.ca_key_path {
            match check_supplied_secret(file, trust) {
                Err(FileFault::Read { cause, .. }) if !tells(&cause) => {}
                // Places says it.
                Err(FileFault::Path(_) | FileFault::FileType { .. }) => {}
                checked => found.note("issuer \"embedded\".ca_key_path", file, checked),
            }
        }
        if embedded::is_new(data_dir, trust) && trust.is_full_at(data_dir) {
            let message =
                "there are no keys in it yet, and no space is left on its file system to write them";
            found.note("agent.data_dir", data_dir, Err::<(), _>(message));
        }
        if found.wrong.is_empty() {
            self.try_signer(trust, now, tells, &mut found);
        }
        found.wrong
    }

    /// Files by which an agent joins its SPIRE Server and that it could not use, with their keys: it would wait for them, unless
    /// it has joined before.
    pub fn missing_to_join(&self, trust: Trust) -> Vec<(&'static str, String)> {
        let Signer::Server(joined) = &self.issuer else { return Vec::new() };
        let join = &joined.join;
        let missing = self.issuer_files().filter_map(|(key, file)| match trust.open(file) {
            Err(error @ PathError::Open { .. }) => Some((key, error.to_string())),
            // Places says what else is wrong.
            Ok(_) | Err(_) => None,
        });
        let bundle = || {
            let mut text = Vec::new();
            let file = trust.open(join.trust_bundle_path.as_ref()?).ok()?;
            file.take(u64::try_from(MAX_LEN).unwrap_or(u64::MAX) + 1).read_to_end(&mut text).ok()?;
            let parsed = match join.trust_bundle_format {
                TrustBundleFormat::Pem => Bundle::parse_pem(&self.trust_domain, &text),
                TrustBundleFormat::Spiffe => Bundle::parse_spiffe(&self.trust_domain, &text),
            };
            Some(("agent.trust_bundle_path", parsed.err()?.to_string()))
        };
        missing.chain(bundle()).chain(self.missing_token(trust)).chain(self.missing_psat(trust)).collect()
    }

    /// Files that let whoever reads them be this node, and that every user of the node may read, with their keys.
    pub fn open_to_all(&self, trust: Trust) -> Vec<(&'static str, String)> {
        let secret = |(key, _): &(&str, &Path)| [KEY, "agent.join_token_file"].contains(key);
        let open = self.issuer_files().filter(secret).filter_map(|(key, file)| {
            let mode = trust.open(file).ok()?.metadata().ok()?.mode() & 0o7777;
            let file = file.display();
            (mode & 0o004 != 0).then(|| {
                (
                    key,
                    format!(
                        "{file} has mode {mode:04o}, and whoever reads it can be this node: chmod o-r {file}"
                    ),
                )
            })
        });
        open.collect()
    }

    /// That an agent of this process's user cannot look at what other users execute, where it is to. Of one that serves all users
    /// it is a mistake, which [`Config::places`] says.
    pub fn is_blind(&self, trust: Trust) -> Option<(&'static str, &'static str)> {
        let ours = trust.user();
        let is_ours = ours == geteuid().as_raw() && !lacks_capability(ours);
        let is_blind = self.attest.unix.settings.discover_workload_path && !may_look_at_executables();
        (is_ours && is_blind).then_some((DISCOVER, BLIND))
    }

    /// Why a node would not be known any more after a restart, where that is so.
    pub fn forgets_node(&self) -> Option<&'static str> {
        let IssuerChoice::Server(settings) = self.issuer_input().choice else { return None };
        own_svid::forgets(&settings).then_some(own_svid::FORGETS)
    }

    /// Why trust in the server is never begun anew, where that was asked for.
    pub fn cannot_begin_anew(&self) -> Option<&'static str> {
        let IssuerChoice::Server(settings) = self.issuer_input().choice else { return None };
        own_svid::is_bound(&settings).then_some(own_svid::IS_BOUND)
    }

    /// That there is neither a join token, where one is to be shown, nor an SVID that one brought.
    fn missing_token(&self, trust: Trust) -> Option<(&'static str, String)> {
        let Signer::Server(joined) = &self.issuer else { return None };
        let JoinedServer { join, node_attestor, .. } = &**joined;
        let asks = matches!(node_attestor, NodeAttestorSettings::JoinToken) && join.token().is_none();
        let data = self.agent.data_dir.join(AGENT_DATA);
        let is_new = asks && trust.open(&data).is_err_and(|error| error.is_missing());
        is_new.then(|| {
            let why = format!("none is set, and there is no {}", data.display());
            (
                "agent.join_token",
                format!("{why}: make one with spire-server token generate, and set join_token_file"),
            )
        })
    }

    /// That there is no token of Kubernetes', where one is to be shown.
    fn missing_psat(&self, trust: Trust) -> Option<(&'static str, String)> {
        let Signer::Server(joined) = &self.issuer else { return None };
        match &joined.node_attestor {
            NodeAttestorSettings::K8sPsat(psat) if joined.join.token().is_none() => {
                Some((TOKEN, check_psat(psat, trust).err()?))
            }
            _ => None,
        }
    }

    /// What is kept of an agent of a SPIRE Server, and would end its start.
    fn try_kept(&self, trust: Trust, tells: impl Fn(&io::Error) -> bool, found: &mut Places) {
        let IssuerChoice::Server(settings) = self.issuer_input().choice else { return };
        match own_svid::check_kept(&settings, trust) {
            Ok(()) => {}
            // Places says it.
            Err((_, DataFault::File(FileFault::Path(_)))) => {}
            Err((dir, DataFault::File(FileFault::FileType { path, .. }))) if path == dir => {}
            Err((_, DataFault::File(FileFault::Read { cause, .. }))) if !tells(&cause) => {}
            Err((dir, fault)) => {
                let key = if dir == settings.data_dir { "agent.data_dir" } else { KEYS };
                found.note(key, &dir, Err::<(), _>(fault));
            }
        }
    }

    /// A certificate and key that this node can never attest with.
    fn try_pop(&self, trust: Trust, found: &mut Places) {
        let Signer::Server(joined) = &self.issuer else { return };
        let NodeAttestorSettings::X509Pop(pop) = &joined.node_attestor else { return };
        let Err(fault) = check_pop(pop, trust) else { return };
        let (key, path) = match &fault {
            PopFault::Certificate { path, .. } => (CERTIFICATE, path.clone()),
            PopFault::Intermediates { path, .. } => (INTERMEDIATES, path.clone()),
            PopFault::Key { path, .. } | PopFault::Pair { key: path, .. } => (KEY, path.clone()),
        };
        found.note(key, &path, Err::<(), _>(fault));
    }

    /// What a CA or a state that is there would say at the start.
    fn try_signer(
        &self,
        trust: Trust,
        now: SystemTime,
        tells: impl Fn(&io::Error) -> bool,
        found: &mut Places,
    ) {
        let IssuerChoice::Embedded(settings) = self.issuer_input().choice else { return };
        let error = match try_sources(&settings, trust, now) {
            Ok(()) => return,
            // Places says it, or the agent itself will.
            Err(IssuerError::File(FileFault::Path(_))) => return,
            Err(IssuerError::File(FileFault::FileType { path, .. }))
                if path.parent() != Some(&settings.data_dir) =>
            {
                return;
            }
            Err(IssuerError::File(FileFault::Read { cause, .. })) if !tells(&cause) => return,
            Err(error) => error,
        };
        let key = match &error {
            IssuerError::SuppliedCa { path, .. } if settings.issuer.ca_key_path.as_ref() == Some(path) => {
                ("issuer \"embedded\".ca_key_path", path.clone())
            }
            IssuerError::SuppliedCa { path, .. } => ("issuer \"embedded\".ca_cert_path", path.clone()),
            _ => ("agent.data_dir", settings.data_dir),
        };
        found.note(key.0, &key.1, Err::<(), _>(error));
    }

    /// Files that decide who signs, and that nobody else may be able to change.
    fn issuer_files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let files = match &self.issuer {
            Signer::Embedded(issuer) => vec![
                ("issuer \"embedded\".ca_cert_path", issuer.ca_cert_path.as_deref()),
                ("issuer \"embedded\".ca_key_path", issuer.ca_key_path.as_deref()),
            ],
            Signer::Server(joined) => {
                let JoinedServer { join, node_attestor, .. } = &**joined;
                let mut files = vec![
                    ("agent.trust_bundle_path", join.trust_bundle_path.as_deref()),
                    ("agent.join_token_file", join.join_token_file.as_deref()),
                ];
                if let NodeAttestorSettings::X509Pop(pop) = node_attestor {
                    files.extend([
                        (CERTIFICATE, pop.certificate.as_deref()),
                        (KEY, pop.private_key.as_deref()),
                        (INTERMEDIATES, pop.intermediates.as_deref()),
                    ]);
                }
                files
            }
        };
        files.into_iter().filter_map(|(key, file)| Some((key, file?)))
    }

    /// The sockets that many may connect to.
    fn sockets(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let socket = self.agent.socket_path.as_path();
        let metrics = self.metrics_socket.as_deref().map(|at| ("telemetry.Prometheus.socket_path", at));
        let health = self.health.socket_path.as_deref().map(|at| ("health_checks.socket_path", at));
        [("agent.socket_path", socket)].into_iter().chain(metrics).chain(health)
    }

    /// Sockets that would stand where another one does, or its lock, by whatever links.
    fn sockets_in_the_way(&self, trust: Trust) -> Vec<WrongPlace> {
        let admin = self.agent.admin_socket_path.as_deref().map(|at| ("agent.admin_socket_path", at));
        let routed = |(key, at): (&'static str, &Path)| {
            let dir = trust.route(parent(at)).ok()?.path;
            Some((key, at.to_owned(), dir.join(at.file_name()?)))
        };
        let all: Vec<_> = self.sockets().chain(admin).filter_map(routed).collect();
        let mut wrong = Vec::new();
        for (nth, (key, value, real)) in all.iter().enumerate() {
            for (other_nth, (other, _, theirs)) in all.iter().enumerate() {
                let mut lock = theirs.clone().into_os_string();
                lock.push(".lock");
                let message = if nth > other_nth && real == theirs {
                    format!("is also {other}")
                } else if nth != other_nth && real.as_os_str() == lock {
                    format!("is the lock file of {other}: choose another name")
                } else {
                    continue;
                };
                wrong.push(WrongPlace { key, value: value.clone(), message });
            }
        }
        wrong
    }

    /// The user that an agent with this configuration runs as, as far as can be told: the one who owns `data_dir`, which
    /// service managers make for him, or the directory in which it would be made, unless others could have put it there;
    /// else the user of this process.
    pub fn agent_user(&self) -> AgentUser {
        let data_dir = &self.agent.data_dir;
        let here = || AgentUser { uid: geteuid().as_raw(), owns: data_dir.clone() };
        for dir in data_dir.ancestors() {
            let uid = match Trust::anybody().directory(dir) {
                Ok(found) => found.metadata().uid(),
                Err(error) if error.is_missing() => continue,
                Err(_) => break,
            };
            let decides = if dir == data_dir { parent(dir) } else { dir };
            let trust = Trust::of(uid);
            let alone = trust.directory(decides).and_then(TrustedDir::for_us_alone).is_ok();
            return if alone { AgentUser { uid, owns: dir.to_owned() } } else { here() };
        }
        here()
    }
}

/// That a socket can be bound there: the directory is not others', and nothing but a socket stands there.
fn socket_place(dir: Result<TrustedDir, PathError>, path: &Path) -> Result<(), String> {
    let dir = match dir {
        Ok(dir) => dir,
        Err(PathError::Open { .. }) => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    let Some(name) = path.file_name() else { return Ok(()) };
    if dir.look_at(name).is_ok_and(|found| !found.file_type().is_socket()) {
        return Err(format!("{} is not a socket: remove it, or choose another path", path.display()));
    }
    let mut lock = name.to_owned();
    lock.push(".lock");
    if dir.look_at(&lock).is_ok_and(|found| !found.is_file()) {
        let lock = path.with_file_name(&lock);
        return Err(format!(
            "{} is not a regular file, and the socket needs it as its lock: remove it, or choose another path",
            lock.display()
        ));
    }
    Ok(())
}

/// What cannot be opened is said by whoever needs it: it may be made first, or not be asked for any more.
fn there<T>(found: Result<T, PathError>) -> Result<(), PathError> {
    match found {
        Ok(_) | Err(PathError::Open { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// What is wrong with a socket that lies below `dir`, which the agent makes for its user alone, as `whose` says. A file system
/// that is mounted between the two may be reached another way.
fn below_closed(trust: Trust, socket: &Path, dir: &Path, whose: &str) -> Option<String> {
    let (way, closed) = (trust.route(parent(socket)).ok()?, trust.route(dir).ok()?);
    if !way.path.starts_with(&closed.path) {
        return None;
    }
    let (ours, mode) = match trust.directory_unchecked(dir) {
        Ok(found) => (found.metadata().uid(), way.closed.iter().find(|it| it.path == closed.path)?.mode),
        Err(error) if error.is_missing() => (trust.user(), 0o700),
        Err(_) => return None,
    };
    Some(format!(
        "is below {whose} {}, which belongs to user {ours} and has mode {mode:04o}: workloads could not reach it; move \
         one of them",
        dir.display()
    ))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_socket_below_data_dir_must_be_reachable() {
        let base = tempfile::tempdir().unwrap();
        let at = |name: &str| base.path().join(name);
        for (name, mode) in [("closed", 0o700), ("group", 0o750), ("open", 0o711)] {
            fs::create_dir_all(at(name).join("pub")).unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        std::os::unix::fs::symlink(at("closed/pub"), at("link")).unwrap();
        for (case, data_dir, socket, wrong) in [
            ("missing", "none", "none/pub/api.sock", true),
            ("missing, beside", "none", "none2/api.sock", false),
            ("the same", "closed", "closed/api.sock", true),
            ("below", "closed", "closed/pub/api.sock", true),
            ("below, not there yet", "closed", "closed/a/b/api.sock", true),
            ("by a link", "closed", "link/api.sock", true),
            ("by dots", "closed", "open/../closed/api.sock", true),
            ("by what is missing", "closed", "x/../closed/api.sock", true),
            ("by much that is missing", "closed", "x/y/./../../closed/pub/api.sock", true),
            ("all of it is missing", "none", "x/../none/pub/api.sock", true),
            ("by what is missing, to another", "closed", "x/../open/api.sock", false),
            ("by what is missing, and a link", "closed", "x/../link/api.sock", true),
            ("within what is missing", "x", "x/../y/api.sock", false),
            ("for the group", "group", "group/pub/api.sock", true),
            ("passable", "open", "open/pub/api.sock", false),
            ("above", "closed/pub", "closed/api.sock", false),
        ] {
            let said = below_closed(Trust::own(), &at(socket), &at(data_dir), "data_dir");
            assert_eq!(said.is_some(), wrong, "{case}: {said:?}");
        }
    }
}
