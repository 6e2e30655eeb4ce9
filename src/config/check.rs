//! `agent`, `plugins`, `telemetry`, `health_checks` and `issuer`: from blocks to settings.
//!
//! spire-agent's keys that this version does not act on are taken here one by one, and refused as soon as they ask for
//! something: a setting that silently does nothing is worse than one that is refused. Their off value, which is how
//! people write "not used", passes.

use std::{collections::BTreeSet, ops::RangeInclusive, path::PathBuf, time::Duration};

use tracing::Level;

use super::{
    Config, DEFAULT_DATA_DIR, DEFAULT_SOCKET_PATH, Health, HostPort, Input, Kubernetes, Log, LogFormat,
    entries, ratelimit,
};
use crate::{
    attest,
    hcl::{
        ConfigErrors, reader,
        section::{At, Labelled, Problems, Section, nearest},
        tree::{Node, Place, quoted},
    },
    identity::{KeyType, SpiffeId, TrustDomain},
    issuer::embedded::{AuthorityTtl, CaSource, EmbeddedSettings, MIN_CA_TTL},
    peer::cgroup::{KubeletRoot, KubernetesMode},
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const NOT_HERE: &str = "is not in this version";

/// The longest path of a Unix socket, in bytes (`sun_path` of `unix(7)`, less the closing zero).
const MAX_SOCKET_PATH: usize = 107;

/// Reads and checks everything.
pub(super) fn check(input: &Input<'_>, problems: &Problems) -> Option<Config> {
    let file = problems.add_file(input.path);
    let main = read_text(problems, file, input, input.text)?;
    let mut root = Section::root(problems, file, &main);

    let server = &mut Server::default();
    let agent = match root.block("agent") {
        Some(block) => Some(Agent::read(block, input, server)),
        None => {
            root.missing("agent", "section must be configured: agent { trust_domain = \"example.org\" }");
            None
        }
    };
    let trust_domain = agent.as_ref().and_then(|agent| agent.trust_domain.clone());
    let unix = root.block("plugins").map_or_else(Unix::default, |block| Unix::read(block, server));
    let prometheus = root.block("telemetry").and_then(telemetry);
    let health = root.block("health_checks").and_then(health_checks);
    let issuer = Issuer::read(&mut root, input, server);
    let mut limits = root.block("ratelimit");

    let own = trust_domain.as_ref().map(|at| &at.value);
    let (federated, declared) = entries::federation(&mut root, input, own);
    let rules = entries::Rules {
        trust_domain: own,
        federated: &declared,
        ca_ttl: issuer.ca_ttl,
        discover_workload_path: unix.settings.discover_workload_path,
    };
    let mut list = entries::Entries::new(rules, problems);
    list.read(root.labelled("entry"));
    root.finish();
    let drop_ins = drop_ins(input, problems, agent.as_ref().and_then(|agent| agent.entries_dir.as_ref()));
    for (file, tree) in &drop_ins {
        let mut root = Section::root(problems, *file, tree);
        list.read(root.labelled("entry"));
        match (&mut limits, root.block("ratelimit")) {
            (Some(limits), Some(more)) => limits.merge(more),
            (None, more) => limits = more,
            (Some(_), None) => {}
        }
        root.finish();
    }
    let entries = list.finish();
    let spire_keys = agent.as_ref().map(|agent| agent.spire_limits.clone()).unwrap_or_default();
    let no_pods = agent.as_ref().is_some_and(|agent| agent.kubernetes.mode == KubernetesMode::Off);
    let context = ratelimit::Context { problems, trust_domain: own, user_id: input.user_id, no_pods };
    let limits = context.settings(limits, spire_keys);

    if let (Some(prometheus), Some(health)) = (&prometheus, &health)
        && prometheus.value == health.value.bind
    {
        let message =
            format!("is also the address of telemetry.Prometheus, at {}", problems.show(prometheus.place));
        let HostPort { host, port } = &prometheus.value;
        problems.add(health.place, "health_checks.bind_port", Some(format!("{host}:{port}")), message);
    }

    let agent = agent?;
    let trust_domain = trust_domain?.value;
    Some(Config {
        issuer: EmbeddedSettings {
            trust_domain: trust_domain.clone(),
            data_dir: agent.data_dir.clone(),
            ca: issuer.ca,
            ca_ttl: AuthorityTtl::new(issuer.ca_ttl.value).expect("it was held against the same bound"),
            ca_key_type: issuer.ca_key_type,
            jwt_key_type: issuer.jwt_key_type,
            svid_key_type: agent.svid_key_type,
            jwt_issuer: issuer.jwt_issuer,
            default_x509_svid_ttl: issuer.default_x509_svid_ttl,
            default_jwt_svid_ttl: issuer.default_jwt_svid_ttl,
        },
        trust_domain,
        socket_path: agent.socket_path,
        admin_socket_path: agent.admin_socket_path,
        data_dir: agent.data_dir,
        log: agent.log,
        entries,
        federated,
        unix: unix.settings,
        allow_unauthenticated_verifiers: agent.allow_unauthenticated_verifiers,
        allowed_foreign_jwt_claims: agent.allowed_foreign_jwt_claims,
        availability_target: agent.availability_target,
        x509_svid_cache_max_size: agent.x509_svid_cache_max_size,
        jwt_svid_cache_max_size: agent.jwt_svid_cache_max_size,
        prometheus: prometheus.map(|at| at.value),
        health: health.map(|at| at.value),
        drain_timeout: agent.drain_timeout,
        ratelimit: limits,
        kubernetes: agent.kubernetes,
    })
}

/// One file's text as a tree; what cannot be read is reported.
fn read_text(problems: &Problems, file: u32, input: &Input<'_>, text: &str) -> Option<Node> {
    match reader::read(file, &input.expand_env.apply(text)) {
        Ok(tree) => Some(tree),
        Err(err) => {
            problems.add(err.place, "", None, err.message);
            None
        }
    }
}

/// The trees of the drop-in files, each with its number.
fn drop_ins(input: &Input<'_>, problems: &Problems, dir: Option<&At<PathBuf>>) -> Vec<(u32, Node)> {
    let beside = input.path.with_file_name("entries.d");
    let place = dir.map(|dir| dir.place).unwrap_or_default();
    let found = match (input.drop_ins)(dir.map_or(&beside, |dir| &dir.value)) {
        Ok(found) => found,
        Err(err) => {
            problems.add(place, "agent.entries_dir", None, err);
            return Vec::new();
        }
    };
    if let (None, Some(dir)) = (&found, dir) {
        problems.add(
            place,
            "agent.entries_dir",
            Some(quoted(&dir.value.to_string_lossy())),
            "there is no such directory",
        );
    }
    let mut trees = Vec::new();
    for (path, text) in found.into_iter().flatten() {
        let file = problems.add_file(&path);
        match text {
            Ok(text) => trees.extend(read_text(problems, file, input, &text).map(|tree| (file, tree))),
            Err(err) => problems.add(Place { file, line: 0, column: 0 }, "", None, err),
        }
    }
    trees
}

/// Refuses a boolean that asks for what is not there.
fn must_be_off(section: &mut Section<'_>, key: &'static str, what: &str) {
    if let Some(At { value: true, place }) = section.boolean(key) {
        section.wrong(place, key, Some("true".to_owned()), format!("{what} {NOT_HERE}; leave it false"));
    }
}

/// Refuses a text other than `off` (empty is always off).
fn must_be_text(section: &mut Section<'_>, key: &'static str, off: &str, what: &str) {
    if let Some(text) = section.string(key)
        && !text.value.is_empty()
        && text.value != off
    {
        section.wrong(text.place, key, Some(quoted(text.value)), format!("{what} {NOT_HERE}; leave it out"));
    }
}

/// Refuses a list that holds anything.
fn must_be_empty(section: &mut Section<'_>, key: &'static str, what: &str) {
    if let Some(list) = section.strings(key)
        && !list.value.is_empty()
    {
        section.wrong(list.place, key, Some("[ .. ]".to_owned()), format!("{what} {NOT_HERE}; leave it out"));
    }
}

/// Refuses a block that is there.
fn must_be_absent(section: &mut Section<'_>, key: &'static str, what: &str) {
    if let Some(block) = section.block(key) {
        section.wrong(block.place(), key, None, format!("{what} {NOT_HERE}; leave it out"));
    }
}

/// A path, made absolute from the working directory as spire-agent does.
fn path(section: &mut Section<'_>, key: &'static str, input: &Input<'_>) -> Option<At<PathBuf>> {
    let good = |text: &str| !text.is_empty() && !text.contains('\0');
    section
        .parsed(key, |text| Some(text).filter(|text| good(text)), "must be a path")
        .map(|at| at.map(|text| input.base.join(text)))
}

fn socket_path(section: &mut Section<'_>, key: &'static str, input: &Input<'_>) -> Option<At<PathBuf>> {
    let at = path(section, key, input)?;
    let length = at.value.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        let message =
            format!("a socket's path can have at most {MAX_SOCKET_PATH} bytes, and this has {length}");
        section.wrong(at.place, key, Some(quoted(&at.value.to_string_lossy())), message);
        return None;
    }
    Some(at)
}

fn key_type(section: &mut Section<'_>, key: &'static str) -> Option<KeyType> {
    section.parsed(key, KeyType::parse, "must be one of ec-p256, ec-p384, rsa-2048").map(|at| at.value)
}

fn seconds(least: u64, most: u64) -> RangeInclusive<Duration> {
    Duration::from_secs(least)..=Duration::from_secs(most)
}

/// What was set that only means something with a SPIRE Server behind the agent.
#[derive(Default)]
struct Server(Vec<(Place, String)>);

impl Server {
    fn text(&mut self, section: &mut Section<'_>, key: &'static str, off: &str) {
        // Never shown: some of these are secrets.
        if let Some(text) = section.string(key)
            && !text.value.is_empty()
            && text.value != off
        {
            self.0.push((text.place, section.path(key)));
        }
    }

    fn integer(&mut self, section: &mut Section<'_>, key: &'static str) {
        if let Some(number) = section.integer(key, 0..=i64::from(u16::MAX))
            && number.value != 0
        {
            self.0.push((number.place, section.path(key)));
        }
    }

    fn boolean(&mut self, section: &mut Section<'_>, key: &'static str) {
        if let Some(At { value: true, place }) = section.boolean(key) {
            self.0.push((place, section.path(key)));
        }
    }
}

/// `agent`, checked.
struct Agent {
    trust_domain: Option<At<TrustDomain>>,
    data_dir: PathBuf,
    socket_path: PathBuf,
    admin_socket_path: Option<PathBuf>,
    entries_dir: Option<At<PathBuf>>,
    log: Log,
    svid_key_type: KeyType,
    allow_unauthenticated_verifiers: bool,
    allowed_foreign_jwt_claims: BTreeSet<String>,
    availability_target: Option<Duration>,
    x509_svid_cache_max_size: usize,
    jwt_svid_cache_max_size: usize,
    drain_timeout: Duration,
    kubernetes: Kubernetes,
    spire_limits: Vec<ratelimit::SpireKey>,
}

impl Agent {
    fn read(mut agent: Section<'_>, input: &Input<'_>, server: &mut Server) -> Self {
        let s = &mut agent;
        let trust_domain = trust_domain(s);
        let data_dir = path(s, "data_dir", input).map(|at| at.value);
        let (socket_path, admin_socket_path) = sockets(s, input);
        let drain_timeout = listener(s);
        let log = log(s, input);
        let allow_unauthenticated_verifiers = s.boolean("allow_unauthenticated_verifiers");
        let claims = s.strings("allowed_foreign_jwt_claims");
        let mut read = Self {
            trust_domain,
            data_dir: data_dir.unwrap_or_else(|| PathBuf::from(DEFAULT_DATA_DIR)),
            socket_path,
            admin_socket_path,
            entries_dir: path(s, "entries_dir", input),
            log,
            svid_key_type: key_type(s, "workload_x509_svid_key_type").unwrap_or_default(),
            allow_unauthenticated_verifiers: allow_unauthenticated_verifiers.is_some_and(|at| at.value),
            allowed_foreign_jwt_claims: claims
                .map(|list| list.value.into_iter().map(|claim| claim.value.to_owned()).collect())
                .unwrap_or_default(),
            availability_target: s
                .duration("availability_target", 24 * HOUR..=Duration::MAX)
                .map(|at| at.value),
            x509_svid_cache_max_size: cache_size(s, "x509_svid_cache_max_size"),
            jwt_svid_cache_max_size: cache_size(s, "jwt_svid_cache_max_size"),
            drain_timeout,
            kubernetes: kubernetes(s),
            spire_limits: Vec::new(),
        };
        for key in
            ["server_address", "join_token", "join_token_file", "trust_bundle_path", "trust_bundle_url"]
        {
            server.text(s, key, "");
        }
        server.integer(s, "server_port");
        server.text(s, "trust_bundle_unix_socket", "");
        server.text(s, "trust_bundle_spiffe_workload_api", "");
        server.text(s, "trust_bundle_format", "pem");
        server.boolean(s, "insecure_bootstrap");
        server.text(s, "rebootstrap_mode", "never");
        server.text(s, "rebootstrap_delay", "10m");
        not_there(s);
        read.spire_limits = experimental(s, server);
        agent.finish();
        read
    }
}

fn trust_domain(s: &mut Section<'_>) -> Option<At<TrustDomain>> {
    let key = "trust_domain";
    let Some(text) = s.string(key) else {
        s.missing(key, "must be configured: trust_domain = \"example.org\"");
        return None;
    };
    match parse_trust_domain(text.value) {
        Ok(value) => Some(At { value, place: text.place }),
        Err(err) => {
            s.wrong(text.place, key, Some(quoted(text.value)), format!("{err}; right is, say, example.org"));
            None
        }
    }
}

/// `example.org` or `spiffe://example.org`. go-spiffe takes a path along; that is a workload's name in a wrong place.
pub(super) fn parse_trust_domain(text: &str) -> Result<TrustDomain, String> {
    if text.contains(":/") && SpiffeId::parse(text).is_ok_and(|id| !id.path().is_empty()) {
        return Err("a trust domain has no path".to_owned());
    }
    TrustDomain::parse(text).map_err(|err| err.to_string())
}

fn sockets(s: &mut Section<'_>, input: &Input<'_>) -> (PathBuf, Option<PathBuf>) {
    let public = socket_path(s, "socket_path", input);
    let admin = socket_path(s, "admin_socket_path", input);
    let whence = public.as_ref().map_or_else(|| "by default".to_owned(), |at| s.problems().show(at.place));
    let public = public.map_or_else(|| DEFAULT_SOCKET_PATH.into(), |at| at.value);
    if let Some(admin) = &admin {
        let value = Some(quoted(&admin.value.to_string_lossy()));
        if public.parent().is_some_and(|dir| admin.value.starts_with(dir)) {
            let message = format!(
                "cannot be in the same directory or a subdirectory as that containing the Workload API socket {} ({whence})",
                quoted(&public.to_string_lossy()),
            );
            s.wrong(admin.place, "admin_socket_path", value, message);
        }
    }
    if let Some(At { value: true, place }) = s.boolean("disable_workload_api") {
        let message = "the Workload API is the only one in this version, and nothing would be served";
        s.wrong(place, "disable_workload_api", Some("true".to_owned()), message);
    }
    // Off is what SDS is, whichever way it is written.
    s.boolean("disable_sds_api");
    (public, admin.map(|at| at.value))
}

fn listener(s: &mut Section<'_>) -> Duration {
    let mut drain = None;
    if let Some(mut block) = s.block("listener") {
        drain = block.duration("drain_timeout", seconds(0, 300));
        block.finish();
    }
    drain.map_or(Duration::from_secs(5), |at| at.value)
}

fn log(s: &mut Section<'_>, input: &Input<'_>) -> Log {
    let level = |text: &str| {
        let levels = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
        match text.to_ascii_lowercase().as_str() {
            "panic" | "fatal" => Some(Level::ERROR),
            "warning" => Some(Level::WARN),
            text => levels.into_iter().find(|level| level.as_str().eq_ignore_ascii_case(text)),
        }
    };
    let format = |text: &str| match text.to_ascii_lowercase().as_str() {
        "" | "text" => Some(LogFormat::Text),
        "json" => Some(LogFormat::Json),
        _ => None,
    };
    let level = s.parsed("log_level", level, "must be one of panic, fatal, error, warn, info, debug, trace");
    let format = s.parsed("log_format", format, "must be text or json");
    let file = path(s, "log_file", input);
    let source_location = s.boolean("log_source_location");
    let selectors = s.strings("log_selectors");
    let selectors = selectors.map(|list| list.value.into_iter().map(|text| text.value.to_owned()).collect());
    Log {
        level: level.map_or(Level::INFO, |at| at.value),
        format: format.map_or_else(LogFormat::default, |at| at.value),
        file: file.map(|at| at.value),
        source_location: source_location.is_some_and(|at| at.value),
        selectors: selectors.unwrap_or_default(),
    }
}

/// 0 is the default, as in spire-agent.
fn cache_size(s: &mut Section<'_>, key: &'static str) -> usize {
    let size = s.integer(key, 0..=10_000_000).and_then(|at| usize::try_from(at.value).ok());
    size.filter(|size| *size > 0).unwrap_or(1000)
}

/// What spire-agent can do and this version cannot.
fn not_there(s: &mut Section<'_>) {
    if let Some(mut sds) = s.block("sds") {
        must_be_text(&mut sds, "default_svid_name", "default", "SDS");
        must_be_text(&mut sds, "default_bundle_name", "ROOTCA", "SDS");
        must_be_text(&mut sds, "default_all_bundles_name", "ALL", "SDS");
        must_be_off(&mut sds, "disable_spiffe_cert_validation", "SDS");
        sds.finish();
    }
    must_be_empty(s, "authorized_delegates", "the delegated identity API");
    must_be_off(s, "profiling_enabled", "profiling");
    // These three say nothing unless profiling is enabled.
    s.integer("profiling_port", 0..=65535);
    s.integer("profiling_freq", 0..=i64::MAX);
    s.strings("profiling_names");
}

fn experimental(s: &mut Section<'_>, server: &mut Server) -> Vec<ratelimit::SpireKey> {
    let Some(mut block) = s.block("experimental") else { return Vec::new() };
    let x = &mut block;
    server.text(x, "sync_interval", "5s");
    if let Some(At { value: false, place }) = x.boolean("use_sync_authorized_entries") {
        server.0.push((place, x.path("use_sync_authorized_entries")));
    }
    must_be_text(x, "jwt_svid_cache_hit_timeout", "30s", "a time to wait before a cached JWT-SVID is served");
    must_be_off(x, "require_pq_kem", "post-quantum TLS");
    for key in ["named_pipe_name", "admin_named_pipe_name"] {
        if let Some(name) = x.string(key)
            && !name.value.is_empty()
        {
            let message = "is not supported in this platform; please use socket_path instead";
            x.wrong(name.place, key, Some(quoted(name.value)), message);
        }
    }
    must_be_empty(x, "feature_flags", "any feature flag");
    must_be_absent(x, "broker", "the broker API");
    let limits = x.block("ratelimit").map(|mut block| {
        let keys = ratelimit::spire_keys(&mut block);
        block.finish();
        keys
    });
    block.finish();
    limits.unwrap_or_default()
}

fn kubernetes(s: &mut Section<'_>) -> Kubernetes {
    let mut read = Kubernetes::default();
    let Some(mut block) = s.block("kubernetes") else { return read };
    let mode = |text: &str| match text {
        "auto" => Some(KubernetesMode::Auto),
        "on" => Some(KubernetesMode::On),
        "off" => Some(KubernetesMode::Off),
        _ => None,
    };
    if let Some(mode) = block.parsed("mode", mode, "must be auto, on or off") {
        read.mode = mode.value;
    }
    if let Some(root) = block.string("kubelet_cgroup_root") {
        match KubeletRoot::parse(root.value) {
            Ok(parsed) => read.kubelet_root = parsed,
            Err(err) => block.wrong(root.place, "kubelet_cgroup_root", Some(quoted(root.value)), err),
        }
    }
    block.finish();
    read
}

/// `plugins`, as far as it is there: the unix attestor.
#[derive(Default)]
struct Unix {
    settings: attest::unix::Settings,
}

impl Unix {
    fn read(mut plugins: Section<'_>, server: &mut Server) -> Self {
        let mut unix = None;
        for plugin in plugins.labelled("WorkloadAttestor") {
            match plugin.label {
                "unix" => match &unix {
                    None => unix = Some((plugin.place, Self::plugin(plugin.section))),
                    Some((first, _)) => declared_twice(plugin, *first),
                },
                _ => workload_attestor(plugin),
            }
        }
        for key in ["NodeAttestor", "KeyManager"] {
            for Labelled { place, section, .. } in plugins.labelled(key) {
                server.0.push((place, section.name()));
                section.ignore();
            }
        }
        for Labelled { place, mut section, .. } in plugins.labelled("SVIDStore") {
            if is_enabled(&mut section) {
                section.problems().add(
                    place,
                    &section.name(),
                    None,
                    format!("storing SVIDs {NOT_HERE}; leave it out"),
                );
            }
            section.ignore();
        }
        plugins.finish();
        unix.map_or_else(Self::default, |(_, settings)| Self { settings })
    }

    fn plugin(mut plugin: Section<'_>) -> attest::unix::Settings {
        let mut settings = attest::unix::Settings::default();
        if let Some(mut data) = plugin.block("plugin_data") {
            if let Some(at) = data.boolean("discover_workload_path") {
                settings.discover_workload_path = at.value;
            }
            if let Some(at) = data.integer("workload_size_limit", i64::MIN..=i64::MAX) {
                settings.workload_size_limit = at.value;
            }
            data.finish();
        }
        must_be_text(&mut plugin, "plugin_data_file", "", "reading plugin_data from another file");
        must_be_text(&mut plugin, "plugin_cmd", "", "an external plugin");
        must_be_empty(&mut plugin, "plugin_args", "an external plugin");
        must_be_text(&mut plugin, "plugin_checksum", "", "an external plugin");
        if let Some(At { value: false, place }) = plugin.boolean("enabled") {
            let message =
                "unix is the only workload attestor in this version: without it nobody gets an identity";
            plugin.wrong(place, "enabled", Some("false".to_owned()), message);
        }
        plugin.finish();
        settings
    }
}

fn is_enabled(plugin: &mut Section<'_>) -> bool {
    plugin.boolean("enabled").is_none_or(|at| at.value)
}

fn declared_twice(plugin: Labelled<'_>, first: Place) {
    let Labelled { place, section, .. } = plugin;
    let message = format!("declared more than once: first at {}", section.problems().show(first));
    section.problems().add(place, &section.name(), None, message);
    section.ignore();
}

/// Any attestor but `unix`.
fn workload_attestor(plugin: Labelled<'_>) {
    let Labelled { label, place, mut section } = plugin;
    let known = ["docker", "k8s", "slurm", "systemd", "windows"];
    if is_enabled(&mut section) {
        let what = if section.has("plugin_cmd") {
            format!("an external plugin {NOT_HERE}; leave it out")
        } else if known.contains(&label) {
            format!("this workload attestor {NOT_HERE}, unix is; leave it out, or set enabled = false")
        } else {
            match nearest(label, known.into_iter().chain(["unix"])) {
                Some(near) => format!("unknown workload attestor: did you mean {near}?"),
                None => "unknown workload attestor; known is unix".to_owned(),
            }
        };
        section.problems().add(place, &section.name(), None, what);
    }
    section.ignore();
}

fn telemetry(mut telemetry: Section<'_>) -> Option<At<HostPort>> {
    let s = &mut telemetry;
    let prometheus = s.block("Prometheus").and_then(|mut block| {
        let host = block.string("host");
        let port = block.integer("port", 1..=65535);
        if port.is_none() {
            block.missing("port", "must be configured: port = 9988");
        }
        must_be_absent(&mut block, "tls", "TLS for metrics");
        let host = host.map_or("localhost", |at| at.value);
        let place = block.place();
        block.finish();
        let port = u16::try_from(port?.value).ok()?;
        Some(At { value: HostPort { host: bare_host(host), port }, place })
    });
    for key in ["DogStatsd", "Statsd", "M3", "InMem"] {
        must_be_absent(s, key, "this telemetry sink");
    }
    must_be_text(s, "MetricPrefix", "", "choosing the prefix of metrics");
    must_be_off(s, "EnableTrustDomainLabel", "labelling metrics with the trust domain");
    must_be_off(s, "EnableHostnameLabel", "labelling metrics with the host name");
    for key in ["AllowedPrefixes", "BlockedPrefixes", "AllowedLabels", "BlockedLabels"] {
        must_be_empty(s, key, "choosing metrics");
    }
    telemetry.finish();
    prometheus
}

/// The host without the brackets of an IPv6 address.
fn bare_host(host: &str) -> String {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned()
}

fn health_checks(mut block: Section<'_>) -> Option<At<Health>> {
    let s = &mut block;
    let enabled = s.boolean("listener_enabled").is_some_and(|at| at.value);
    let host = s.string("bind_address").map_or("localhost", |at| at.value);
    let port = s.integer("bind_port", 1..=65535);
    let is_path = |text: &str| text.starts_with('/') && text.bytes().all(|b| b.is_ascii_graphic());
    let url_path = |s: &mut Section<'_>, key, default: &str| {
        let found =
            s.parsed(key, |text| is_path(text).then(|| text.to_owned()), "must be a path that begins with /");
        found.unwrap_or_else(|| At { value: default.to_owned(), place: s.place() })
    };
    let live = url_path(s, "live_path", "/live");
    let ready = url_path(s, "ready_path", "/ready");
    if live.value == ready.value {
        let message = format!("live_path is the same, at {}", s.problems().show(live.place));
        s.wrong(ready.place, "ready_path", Some(quoted(&ready.value)), message);
    }
    let place = port.map_or_else(|| s.place(), |at| at.place);
    block.finish();
    let port = port.map_or(80, |at| u16::try_from(at.value).unwrap_or_default());
    let bind = HostPort { host: bare_host(host), port };
    let health = Health { bind, live_path: live.value, ready_path: ready.value };
    enabled.then_some(At { value: health, place })
}

/// `issuer "embedded"`, checked.
struct Issuer {
    ca: CaSource,
    /// And where it is set, if it is.
    ca_ttl: entries::CaTtl,
    ca_key_type: KeyType,
    jwt_key_type: KeyType,
    jwt_issuer: Option<String>,
    default_x509_svid_ttl: Duration,
    default_jwt_svid_ttl: Duration,
}

impl Issuer {
    fn read(root: &mut Section<'_>, input: &Input<'_>, server: &mut Server) -> Self {
        let mut embedded: Option<Section<'_>> = None;
        let mut other = false;
        for Labelled { label, place, section } in root.labelled("issuer") {
            if label != "embedded" {
                other = true;
                let message = match label {
                    "spire" | "server" | "spire-server" | "spire_server" => {
                        format!("the SPIRE Server issuer {NOT_HERE}: issuer \"embedded\" {{ }} is")
                    }
                    _ => "unknown issuer: must be \"embedded\"".to_owned(),
                };
                section.problems().add(place, &section.name(), None, message);
                section.ignore();
            } else if let Some(first) = &mut embedded {
                first.merge(section);
            } else {
                embedded = Some(section);
            }
        }
        for (place, key) in &server.0 {
            let message = embedded.as_ref().map_or_else(
                || format!("the SPIRE Server issuer {NOT_HERE}: take this out and write issuer \"embedded\" {{ }}"),
                |embedded| {
                    let place = root.problems().show(embedded.place());
                    format!("is for a SPIRE Server, and contradicts issuer \"embedded\" at {place}: take one of them out")
                },
            );
            root.problems().add(*place, key, None, message);
        }
        if embedded.is_none() && server.0.is_empty() && !other {
            root.missing("issuer", "who signs must be said: issuer \"embedded\" { }");
        }
        Self::embedded(embedded, input)
    }

    fn embedded(block: Option<Section<'_>>, input: &Input<'_>) -> Self {
        let mut ca = CaSource::SelfSigned;
        let (mut ca_ttl, mut x509_ttl, mut jwt_ttl) = (None, None, None);
        let (mut ca_key_type, mut jwt_key_type, mut jwt_issuer) = (None, None, None);
        if let Some(mut block) = block {
            let s = &mut block;
            // Ten years: beyond that lies a mistake.
            ca_ttl = s.duration("ca_ttl", MIN_CA_TTL..=87_600 * HOUR);
            ca_key_type = key_type(s, "ca_key_type");
            jwt_key_type = key_type(s, "jwt_key_type");
            jwt_issuer = s.string("jwt_issuer").map(|at| at.value.to_owned()).filter(|text| !text.is_empty());
            ca = ca_source(s, input);
            x509_ttl = s.duration("default_x509_svid_ttl", SECOND..=Duration::MAX);
            jwt_ttl = s.duration("default_jwt_svid_ttl", SECOND..=Duration::MAX);
            let ttl = entries::CaTtl::of(ca_ttl);
            ttl.check(s, "default_x509_svid_ttl", x509_ttl);
            ttl.check(s, "default_jwt_svid_ttl", jwt_ttl);
            block.finish();
        }
        let ca_ttl = entries::CaTtl::of(ca_ttl);
        let ca_key_type = ca_key_type.unwrap_or_default();
        let ttl = |at: Option<At<Duration>>, default: Duration| {
            at.map_or_else(|| default.min(ca_ttl.value), |at| at.value)
        };
        Self {
            ca,
            ca_ttl,
            ca_key_type,
            jwt_key_type: jwt_key_type.unwrap_or(ca_key_type),
            jwt_issuer,
            default_x509_svid_ttl: ttl(x509_ttl, HOUR),
            default_jwt_svid_ttl: ttl(jwt_ttl, Duration::from_secs(300)),
        }
    }
}

fn ca_source(s: &mut Section<'_>, input: &Input<'_>) -> CaSource {
    let cert = path(s, "ca_cert_path", input);
    let key = path(s, "ca_key_path", input);
    match (cert, key) {
        (Some(cert), Some(key)) => return CaSource::Supplied { cert: cert.value, key: key.value },
        (Some(cert), None) => alone(s, cert, "ca_cert_path", "ca_key_path"),
        (None, Some(key)) => alone(s, key, "ca_key_path", "ca_cert_path"),
        (None, None) => {}
    }
    CaSource::SelfSigned
}

fn alone(s: &Section<'_>, set: At<PathBuf>, key: &str, other: &str) {
    if !s.has(other) {
        let value = Some(quoted(&set.value.to_string_lossy()));
        s.wrong(set.place, key, value, format!("{other} must be set too: a CA is a certificate and its key"));
    }
}

/// Says whether there was nothing wrong.
pub(super) fn checked(input: &Input<'_>) -> Result<Config, ConfigErrors> {
    let problems = Problems::new();
    let config = check(input, &problems);
    problems.into_result(config)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, path::Path};

    use super::*;
    use crate::config::{ExpandEnv, FileError, diff};

    const REFERENCE: &str = include_str!("../../conf/agent.conf");
    const BUNDLE: &str = "{\"keys\": []}";

    fn parse(text: &str, problems: &Problems) -> Config {
        let input = Input {
            path: Path::new("agent.conf"),
            text,
            base: Path::new("/"),
            expand_env: ExpandEnv::No,
            drop_ins: &|_| Ok(Some(Vec::new())),
            user_id: &|name| (name == "build").then_some(1000),
            read_bundle: &|path| match path.to_str() {
                Some("/etc/durward/other.example.json") => Ok(BUNDLE.into()),
                _ => Err(FileError::Missing(path.to_owned())),
            },
        };
        let config = check(&input, problems);
        let result = std::mem::take(&mut *problems.wrongs()).into_iter().map(|p| p.message);
        assert_eq!(result.collect::<Vec<_>>(), [""; 0], "{text}");
        config.unwrap()
    }

    fn defaults() -> Config {
        let text = "agent { trust_domain = \"example.org\" } issuer \"embedded\" { }";
        parse(text, &Problems::new())
    }

    /// Runs of lines for which `take` gives a text, each with the comment above it, as (comment, lines to change).
    fn runs(take: fn(&str) -> Option<String>) -> Vec<(String, BTreeMap<usize, String>)> {
        let mut runs: Vec<(String, BTreeMap<usize, String>)> = Vec::new();
        let (mut comment, mut open) = (String::new(), false);
        for (at, line) in REFERENCE.lines().enumerate() {
            match take(line) {
                Some(text) if open => drop(runs.last_mut().unwrap().1.insert(at, text)),
                Some(text) => {
                    runs.push((comment.clone(), BTreeMap::from([(at, text)])));
                    open = true;
                }
                None => {
                    open = false;
                    if line.trim().is_empty() {
                        comment.clear();
                    } else {
                        comment.push_str(line);
                    }
                }
            }
        }
        runs
    }

    fn changed(lines: &BTreeMap<usize, String>) -> String {
        let line =
            |(at, line): (usize, &str)| lines.get(&at).cloned().unwrap_or_else(|| line.to_owned()) + "\n";
        REFERENCE.lines().enumerate().map(line).collect()
    }

    #[test]
    fn the_reference_is_the_defaults() {
        assert_eq!(parse(REFERENCE, &Problems::new()), defaults());
        let shown = runs(|line| {
            let setting = line.trim_start().strip_prefix("# ")?;
            let (key, _) = setting.split_once(" = ")?;
            key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_').then(|| setting.to_owned())
        });
        assert!(shown.len() > 20, "{shown:?}");
        for (_, lines) in &shown {
            for (at, setting) in lines {
                let alone = BTreeMap::from([(*at, setting.clone())]);
                assert_eq!(parse(&changed(&alone), &Problems::new()), defaults(), "{setting}");
            }
        }
    }

    #[test]
    fn the_examples_are_no_defaults_and_reload_as_they_say() {
        let examples = runs(|line| Some(line.trim_start().strip_prefix("#+ ")?.to_owned()));
        assert!(examples.len() >= 7, "{examples:?}");
        for (comment, lines) in &examples {
            let changes = diff(&defaults(), &parse(&changed(lines), &Problems::new()));
            assert!(!changes.is_empty(), "{lines:?}");
            let reloads = comment.contains("Reloads");
            assert!(reloads != comment.contains("Restart to change."), "{comment}");
            assert_eq!(changes.restart.is_empty(), reloads, "{comment}");
        }
    }

    #[test]
    fn every_key_is_in_the_reference() {
        let problems = Problems::new();
        let text = format!(
            "{REFERENCE} agent {{ sds {{ }} experimental {{ }} }} telemetry {{ Prometheus {{ port = 1 }} }}
            plugins {{ SVIDStore \"x\" {{ enabled = false }} }}
            entry \"spiffe://example.org/a\" {{ selectors = [\"unix:uid:1\"] }}
            ratelimit {{ caller {{ override \"uid:7\" {{ share = true rate = 1 burst = 9 costs {{ answer = 1 }}
                method \"FetchJWTSVID\" {{ schedule \"s\" {{ start {{ hour = 1 }} stop {{ hour = 2 }} block = true }} }} }} }}
                gate {{ override \"uid:7\" {{ connections = 1 }} }}
                node {{ method \"FetchJWTSVID\" {{ unlimited = true }} }} }}
            federation \"o\" {{ bundle_path = \"/etc/durward/other.example.json\" bundle_format = \"spiffe\" }}"
        );
        parse(&text, &problems);
        let keys = problems.keys.borrow();
        assert!(keys.contains("agent.trust_domain") && keys.contains("entry.selectors"), "{keys:?}");
        let words: BTreeSet<&str> =
            REFERENCE.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).collect();
        let missing: Vec<&String> =
            keys.iter().filter(|key| !words.contains(key.rsplit('.').next().unwrap_or_default())).collect();
        assert_eq!(missing, [""; 0]);
    }
}
