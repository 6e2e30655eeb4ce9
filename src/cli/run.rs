//! `run`: from the command line to the agent.

use std::{
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use tracing::Level;

use super::{Failure, socket::has_scheme};
use crate::{
    agent,
    config::{Config, DEFAULT_SOCKET_PATH, ExpandEnv, Flawed, Given, Places, Signer, WrongPlace},
    hcl::{ConfigError, ConfigErrors, KeyPlace, KeyPlaces},
    identity::TrustDomain,
    issuer::server::settings::JoinToken,
    os::{
        clock::Clock,
        secrecy,
        trusted::{ClosedDir, Trust},
    },
    peer::socket::MAX_PATH_LEN,
    telemetry::{LogFormat, chain, parse_level},
};

/// Where the configuration is unless the command line says otherwise (spire-agent: `conf/agent/agent.conf`).
pub(super) const DEFAULT_CONFIG: &str = "/etc/durward/agent.conf";

/// `run`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct RunArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

/// Which configuration, and what the command line changes in it: for `run` and `validate`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ConfigArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = DEFAULT_CONFIG)]
    config: PathBuf,

    /// Replace $VAR and ${VAR} in the file by the environment's values
    #[arg(long)]
    expand_env: bool,

    #[command(flatten)]
    overrides: CliOverrides,
}

/// What the command line says in place of the configuration file. It wins on every reload too.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct CliOverrides {
    /// Serve the Workload API at this path, whatever socket_path says
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Keep keys and state in this directory, whatever data_dir says
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,

    /// The trust domain; with issuer "embedded" the one in the file
    #[arg(long, value_name = "NAME", value_parser = TrustDomain::parse)]
    pub trust_domain: Option<TrustDomain>,

    /// Log this level and above: error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", value_parser = log_level)]
    pub log_level: Option<Level>,

    /// Log as text or json
    #[arg(long, value_name = "FORMAT", value_parser = log_format)]
    pub log_format: Option<LogFormat>,

    /// Log to this file
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,

    /// Add the place in the source code to each log line
    #[arg(long)]
    pub log_source_location: bool,

    /// Give bundles to callers without an identity too
    #[arg(long)]
    pub allow_unauthenticated_verifiers: bool,

    /// Accepted for compatibility with spire-agent: there is no SDS API yet
    #[arg(long)]
    pub disable_sds_api: bool,

    /// Refused: the Workload API is the only one in this version
    #[arg(long)]
    pub disable_workload_api: bool,

    #[command(flatten)]
    pub server: ServerOverrides,
}

/// What the command line says of a SPIRE Server, in place of the keys of `agent` of the same names.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerOverrides {
    /// The host name or IP address of the SPIRE Server
    #[arg(long, value_name = "HOST")]
    pub server_address: Option<String>,

    /// The port of the SPIRE Server
    #[arg(long, value_name = "PORT")]
    pub server_port: Option<String>,

    /// The join token that the SPIRE Server generated for this node
    ///
    /// Other users can see it in the list of processes: a file is safer.
    ///
    /// A token that the configuration is given later comes before it.
    #[arg(long, value_name = "TOKEN", value_parser = join_token)]
    pub join_token: Option<JoinToken>,

    /// A file that holds the join token
    #[arg(long, value_name = "FILE")]
    pub join_token_file: Option<String>,

    /// CA certificates that verify the SPIRE Server on first contact
    #[arg(long, value_name = "FILE")]
    pub trust_bundle: Option<String>,

    /// URL to fetch these CA certificates from instead
    #[arg(long, value_name = "URL")]
    pub trust_bundle_url: Option<String>,

    /// The format of these CA certificates: pem or spiffe
    #[arg(long, value_name = "FORMAT")]
    pub trust_bundle_format: Option<String>,

    /// Trust the first SPIRE Server that answers, whoever it is
    #[arg(long)]
    pub insecure_bootstrap: bool,

    /// Whether to bootstrap again when the SPIRE Server has unknown roots
    ///
    /// never, auto or always
    #[arg(long, value_name = "MODE")]
    pub rebootstrap_mode: Option<String>,

    /// How long they must have been unknown before that
    #[arg(long, value_name = "DURATION")]
    pub rebootstrap_delay: Option<String>,
}

impl CliOverrides {
    /// The keys that are checked together with those of the file, and replace them there. The trust domain does not where the
    /// file names one for a CA: another one is an error.
    fn keys(&self) -> Vec<Given> {
        let ServerOverrides {
            server_address,
            server_port,
            join_token,
            join_token_file,
            trust_bundle,
            trust_bundle_url,
            trust_bundle_format,
            insecure_bootstrap,
            rebootstrap_mode,
            rebootstrap_delay,
        } = &self.server;
        let texts = [
            ("server_address", server_address.as_deref()),
            ("server_port", server_port.as_deref()),
            ("join_token", join_token.as_ref().map(JoinToken::secret)),
            ("join_token_file", join_token_file.as_deref()),
            ("trust_bundle_path", trust_bundle.as_deref()),
            ("trust_bundle_url", trust_bundle_url.as_deref()),
            ("trust_bundle_format", trust_bundle_format.as_deref()),
            ("rebootstrap_mode", rebootstrap_mode.as_deref()),
            ("rebootstrap_delay", rebootstrap_delay.as_deref()),
        ];
        // As with spire-agent, an empty text says nothing.
        let texts =
            texts.into_iter().filter_map(|(key, text)| Some((key, text.filter(|text| !text.is_empty())?)));
        let mut keys: Vec<Given> = texts.map(|(key, text)| Given::text(key, text)).collect();
        keys.extend(insecure_bootstrap.then(|| Given::yes("insecure_bootstrap")));
        keys.extend(self.trust_domain.as_ref().map(|name| Given::trust_domain(name.name())));
        keys.extend(self.disable_workload_api.then(|| Given::yes("disable_workload_api")));
        keys
    }
}

fn join_token(text: &str) -> Result<JoinToken, std::convert::Infallible> {
    Ok(JoinToken::from(text.to_owned()))
}

/// Why the command line does not fit the configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OverrideError {
    /// The entries and the CA belong to the file's trust domain: another name would make none of them valid.
    #[error("--trust-domain {asked} contradicts the configuration file, whose trust_domain is {configured}")]
    TrustDomain {
        /// On the command line.
        asked: TrustDomain,
        configured: TrustDomain,
    },
    /// The kernel takes no longer one.
    #[error("--socket-path must have at most {MAX_PATH_LEN} bytes when made absolute; got {}: {}", .0.as_os_str().len(), .0.display())]
    SocketPath(PathBuf),
    /// Where an agent serves is no address of a client's.
    #[error("--socket-path must be a path, such as {DEFAULT_SOCKET_PATH}, and not an address; got {0:?}")]
    SocketAddress(PathBuf),
    /// An audit that others' lines are in, which a person or a program has to tell apart.
    #[error("--log-file cannot be the audit's file: {}", .0.display())]
    LogIsAudit(PathBuf),
    /// The file forbids it too.
    #[error(
        "--socket-path {} cannot be in the same directory as the admin socket {} or in one above it",
        .public.display(), .admin.display()
    )]
    BesideAdmin {
        /// On the command line.
        public: PathBuf,
        admin: PathBuf,
    },
}

impl CliOverrides {
    /// Puts what the command line says in place of what `config` says.
    ///
    /// # Errors
    /// When the two contradict each other: `config` may then be changed in part and must not be used.
    pub fn apply(&self, config: &mut Config) -> Result<(), OverrideError> {
        let Self {
            socket_path,
            data_dir,
            trust_domain,
            log_level,
            log_format,
            log_file,
            log_source_location,
            allow_unauthenticated_verifiers,
            disable_sds_api: _,
            // Among the file's keys by then.
            disable_workload_api: _,
            server: _,
        } = self;
        if let Some(asked) = trust_domain.as_ref().filter(|asked| **asked != config.trust_domain) {
            return Err(OverrideError::TrustDomain {
                asked: asked.clone(),
                configured: config.trust_domain.clone(),
            });
        }
        if let Some(path) = socket_path {
            if has_scheme(path.as_os_str()) {
                return Err(OverrideError::SocketAddress(path.clone()));
            }
            let path = absolute(path);
            if path.as_os_str().len() > MAX_PATH_LEN {
                return Err(OverrideError::SocketPath(path));
            }
            config.agent.socket_path.clone_from(&path);
            config.set_at.forget("agent.socket_path");
            if let Some(admin) = config.agent.admin_socket_beside() {
                return Err(OverrideError::BesideAdmin { public: path, admin: admin.to_owned() });
            }
        }
        if let Some(dir) = data_dir {
            config.agent.data_dir = absolute(dir);
            config.set_at.forget("agent.data_dir");
        }
        if let Some(level) = log_level {
            config.log.level = *level;
        }
        if let Some(format) = log_format {
            config.log.format = *format;
        }
        if let Some(file) = log_file {
            let file = absolute(file);
            if config.audit.file.as_ref() == Some(&file) {
                return Err(OverrideError::LogIsAudit(file));
            }
            config.log.file = Some(file);
            config.set_at.forget("agent.log_file");
        }
        config.log.source_location |= log_source_location;
        config.policy.allow_unauthenticated_verifiers |= allow_unauthenticated_verifiers;
        Ok(())
    }
}

/// A working directory that is gone leaves a path as it is: using it will say so.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_err| path.to_owned())
}

impl ConfigArgs {
    /// Reads and checks the configuration, and the places that it names for an agent of this process's user, which is one of
    /// the trust domain `running` already, if there is one.
    fn load(&self, running: Option<&TrustDomain>, socket: SocketOf) -> Result<Config, Failure> {
        let given: Vec<_> = self.overrides.keys().into_iter().chain(running.map(Given::running)).collect();
        let looks = if running.is_some() { Looks::Again } else { Looks::BeforeStart(socket) };
        self.look(Trust::own(), &given, looks).map(|(config, _closed)| config)
    }

    /// [`ConfigArgs::load`], where the command line names a join token: one that the file names since the start, `at_start`, comes
    /// before it, since the one of the command line cannot be changed any more.
    fn load_with_token(
        &self,
        at_start: &OnceLock<FileToken>,
        running: Option<&TrustDomain>,
        socket: SocketOf,
    ) -> Result<Config, Failure> {
        let ServerOverrides { join_token, join_token_file, .. } = &self.overrides.server;
        if join_token.is_none() && join_token_file.is_none() {
            return self.load(running, socket);
        }
        let mut without = self.clone();
        (without.overrides.server.join_token, without.overrides.server.join_token_file) = (None, None);
        let of_file = without.load(running, socket);
        let named = of_file.as_ref().map(FileToken::of).unwrap_or_default();
        if named != *at_start.get_or_init(|| named.clone()) && named != FileToken::default() {
            return of_file;
        }
        self.load(running, socket)
    }

    /// Reads and checks all of it as `load` would for an agent of this user, whatever this process can start.
    pub(super) fn check(&self, trust: Trust) -> Result<(Config, Vec<ClosedDir>), Failure> {
        self.look(trust, &self.overrides.keys(), Looks::Everywhere)
    }

    /// Reads and checks the configuration from files of anybody, and not the places that it names.
    pub(super) fn read_of_anybody(&self) -> Result<Config, Failure> {
        self.read_given(Trust::anybody(), &self.overrides.keys())
    }

    pub(super) fn path(&self) -> &Path {
        &self.config
    }

    /// The user whose file it is; `None` where it cannot be told.
    pub(super) fn owner(&self) -> Option<u32> {
        // Not by its name alone: a file system of somebody else's need not answer.
        let file = Trust::anybody().open(&self.config).ok()?;
        file.metadata().ok().map(|found| found.uid())
    }

    /// Reads and checks the configuration, and the places that it names: every mistake at once, as far as it can be read.
    fn look(&self, trust: Trust, given: &[Given], looks: Looks) -> Result<(Config, Vec<ClosedDir>), Failure> {
        let errors = match self.read_as(trust, given) {
            Ok(config) => {
                let Places { mut wrong, closed } = config.places(trust.user());
                wrong.extend(looks.further(&config, trust, &wrong));
                if wrong.is_empty() {
                    return Ok((config, closed));
                }
                return Err(wrong_places(&self.config, &config.set_at, wrong).into());
            }
            Err(Unread::Flawed(flawed)) => flawed.errors,
            Err(Unread::Contradicted(error)) => return Err(error.into()),
        };
        // Files that nobody may go by are read all the same, for what else is wrong.
        let (config, errors) = match self.read_as(Trust::anybody(), given) {
            Ok(config) => (Some(Box::new(config)), errors),
            Err(Unread::Flawed(Flawed { errors: others, rest })) => (rest, errors.and(others)),
            Err(Unread::Contradicted(_)) => (None, errors),
        };
        let Some(config) = config else { return Err(errors.into()) };
        let mut wrong = config.places(trust.user()).wrong;
        let looks = if let Looks::Again = looks { looks } else { Looks::Everywhere };
        wrong.extend(looks.further(&config, trust, &wrong));
        // Where the key itself is wrong, what stands in its place nobody wrote.
        wrong.retain(|place| errors.list().iter().all(|error| error.key != place.key));
        Err(errors.and(wrong_places(&self.config, &config.set_at, wrong)).into())
    }

    fn read_given(&self, trust: Trust, given: &[Given]) -> Result<Config, Failure> {
        self.read_as(trust, given).map_err(|unread| match unread {
            Unread::Flawed(flawed) => Failure::Config(flawed.errors),
            Unread::Contradicted(error) => error.into(),
        })
    }

    fn read_as(&self, trust: Trust, given: &[Given]) -> Result<Config, Unread> {
        let variable = |name: &str| super::environment(name).and_then(|value| value.into_string().ok());
        let expand = if self.expand_env { ExpandEnv::With(&variable) } else { ExpandEnv::No };
        match Config::load_as(trust, &self.config, expand, given) {
            Ok(mut config) => {
                self.overrides.apply(&mut config).map_err(Unread::Contradicted)?;
                Ok(config)
            }
            Err(mut flawed) => {
                // Who named a file need not be told how to.
                let none = flawed.errors.list().iter().any(|error| error.message.starts_with(NO_FILE));
                if none && self.config != Path::new(DEFAULT_CONFIG) {
                    flawed.errors = ConfigErrors::new(vec![of_file(&self.config, NO_FILE.to_owned())], 0);
                }
                if let Some(mut rest) = flawed.rest.take() {
                    flawed.rest = self.overrides.apply(&mut rest).is_ok().then_some(rest);
                }
                Err(Unread::Flawed(flawed))
            }
        }
    }
}

/// Why there is no configuration.
enum Unread {
    Flawed(Flawed),
    /// The command line does not fit it.
    Contradicted(OverrideError),
}

/// The join token that a configuration names: itself, or where it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct FileToken(JoinToken, Option<PathBuf>);

impl FileToken {
    fn of(config: &Config) -> Self {
        match &config.issuer {
            Signer::Server(joined) => {
                Self(joined.join.join_token.clone(), joined.join.join_token_file.clone())
            }
            Signer::Embedded(_) => Self::default(),
        }
    }
}

/// Where mistakes are looked for beside the places that must be nobody else's.
#[derive(Clone, Copy)]
enum Looks {
    /// In what a start needs, too.
    Everywhere,
    /// The same, but for what a start may do without.
    BeforeStart(SocketOf),
    /// Nowhere: an agent that runs has what its start needed.
    Again,
}

/// Who makes the socket of the Workload API.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SocketOf {
    Agent,
    ServiceManager,
}

impl Looks {
    fn further(self, config: &Config, trust: Trust, wrong: &[WrongPlace]) -> Vec<WrongPlace> {
        let missing = || {
            let missing = config.missing_places(trust, Clock::SYSTEM.now());
            missing.into_iter().chain(config.addresses().0)
        };
        match self {
            Self::Again => Vec::new(),
            Self::Everywhere => missing().collect(),
            // Once it cannot start, all of it is told.
            Self::BeforeStart(_) if !wrong.is_empty() => missing().collect(),
            Self::BeforeStart(socket) => {
                // A server's agent serves without a place to write.
                let needs = |place: &WrongPlace| match place.key {
                    "agent.socket_path" => socket == SocketOf::Agent,
                    "agent.data_dir" => matches!(config.issuer, Signer::Embedded(_)),
                    "agent.log_file"
                    | "audit.file"
                    | "health_checks.bind_port"
                    | "telemetry.Prometheus.port" => true,
                    _ => false,
                };
                let missing: Vec<_> = missing().collect();
                if missing.iter().any(needs) { missing } else { Vec::new() }
            }
        }
    }
}

/// How the error begins that there is no configuration file.
const NO_FILE: &str = "could not find config file";

/// An error of a file as a whole.
fn of_file(file: &Path, message: String) -> ConfigError {
    ConfigError { file: file.to_owned(), line: 0, column: 0, key: String::new(), value: None, message }
}

/// As errors of the configuration file, where their keys are set in it.
pub(super) fn wrong_places(file: &Path, set_at: &KeyPlaces, wrong: Vec<WrongPlace>) -> ConfigErrors {
    let error = |WrongPlace { key, value, message }| {
        let whole = of_file(file, message);
        let at = match set_at.of(key).cloned() {
            Some(KeyPlace { file, line, column }) => ConfigError { file, line, column, ..whole },
            None => whole,
        };
        ConfigError { key: key.to_owned(), value: Some(format!("{:?}", value.to_string_lossy())), ..at }
    };
    let mut list: Vec<_> = wrong.into_iter().map(error).collect();
    list.sort_by_key(|error| (error.line, error.column));
    ConfigErrors::new(list, 0)
}

fn log_level(text: &str) -> Result<Level, &'static str> {
    parse_level(text).ok_or("must be error, warn, info, debug or trace")
}

fn log_format(text: &str) -> Result<LogFormat, &'static str> {
    LogFormat::parse(text).ok_or("must be text or json")
}

/// Runs the agent until it is told to stop. The command line wins on every reload too, but for a join token.
pub(super) fn run(args: &RunArgs) -> Result<(), Failure> {
    // Before there is a key to be seen.
    secrecy::keep().map_err(|error| {
        agent::not_started(&chain(&error));
        Failure::Agent(error.into())
    })?;
    let config = args.config.clone();
    // Gone from the environment once the agent has taken it.
    let handed = super::environment("LISTEN_FDS").is_some();
    let socket = if handed { SocketOf::ServiceManager } else { SocketOf::Agent };
    let (running, token) = (OnceLock::new(), OnceLock::new());
    let load = move || {
        let config = config.load_with_token(&token, running.get(), socket)?;
        let _first = running.get_or_init(|| config.trust_domain.clone());
        Ok(config)
    };
    agent::run(Box::new(load)).map_err(Failure::Agent)
}
