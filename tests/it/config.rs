//! agent.conf: what is read, what is refused and with which words.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use durward::{
    config::{Config, DropIns, ExpandEnv, FileError, Input, diff},
    identity::{Entry, KeyType, TrustDomain},
    issuer::{IssuerChoice, embedded::EmbeddedSettings},
    telemetry::{HostPort, LogFormat},
};

const ROOT: &str = include_str!("../fixtures/config/root.pem");

/// Files that are not there: their texts by path.
#[derive(Default)]
struct Files(BTreeMap<PathBuf, String>);

impl Files {
    fn with(mut self, path: &str, text: &str) -> Self {
        self.0.insert(path.into(), text.to_owned());
        self
    }

    fn parse(&self, text: &str, expand_env: ExpandEnv<'_>) -> Result<Config, String> {
        Config::parse(&Input {
            path: Path::new("agent.conf"),
            text,
            base: Path::new("/base"),
            expand_env,
            given: &[],
            drop_ins: &|dir| {
                let found: DropIns = self
                    .0
                    .iter()
                    .filter(|(path, _)| path.parent() == Some(dir))
                    .map(|(path, text)| (path.clone(), Ok(text.clone())))
                    .collect();
                Ok(if found.is_empty() { None } else { Some(found) })
            },
            user_id: &|name| Ok((name == "build").then_some(1000)),
            read_file: &|path| {
                self.0.get(path).map(|text| text.clone().into_bytes()).ok_or_else(|| FileError::Read {
                    path: path.to_owned(),
                    cause: ErrorKind::NotFound.into(),
                })
            },
        })
        .map_err(|errors| errors.to_string())
    }
}

fn parse(text: &str) -> Result<Config, String> {
    Files::default().parse(text, ExpandEnv::No)
}

const LEAST: &str = "agent { trust_domain = \"example.org\" }\nissuer \"embedded\" { }\n";

/// The least configuration, and this in its `agent` block.
fn with_agent(inner: &str) -> String {
    format!("agent {{ trust_domain = \"example.org\"\n{inner}\n}}\nissuer \"embedded\" {{ }}")
}

/// What the embedded issuer is told.
fn embedded(config: &Config) -> EmbeddedSettings {
    let IssuerChoice::Embedded(settings) = config.issuer_input().choice else { panic!("embedded") };
    settings
}

#[test]
fn what_is_not_set_has_its_default() {
    let config = parse(LEAST).unwrap();
    assert_eq!(config.trust_domain.name(), "example.org");
    assert_eq!(config.agent.socket_path, Path::new("/run/durward/public/api.sock"));
    assert_eq!(config.agent.admin_socket_path, None);
    assert_eq!(config.agent.data_dir, Path::new("/var/lib/durward"));
    assert_eq!(config.log.level, tracing::Level::INFO);
    assert_eq!(config.log.format, LogFormat::Text);
    assert_eq!(
        (&config.log.file, config.log.source_location, config.policy.log_selectors.len()),
        (&None, false, 0)
    );
    assert_eq!(embedded(&config).trust_domain, config.trust_domain);
    assert_eq!(embedded(&config).data_dir, config.agent.data_dir);
    let issuer = embedded(&config).issuer;
    assert_eq!((&issuer.ca_cert_path, &issuer.ca_key_path), (&None, &None), "self-signed");
    assert_eq!(embedded(&config).issuer.ca_ttl, Duration::from_secs(86_400));
    assert_eq!(embedded(&config).issuer.ca_key_type, KeyType::EcP256);
    assert_eq!(embedded(&config).issuer.jwt_key_type, KeyType::EcP256);
    assert_eq!(config.agent.svid_key_type, KeyType::EcP256);
    assert_eq!(embedded(&config).issuer.jwt_issuer, None);
    assert_eq!(embedded(&config).issuer.default_x509_svid_ttl, Duration::from_secs(3600));
    assert_eq!(embedded(&config).issuer.default_jwt_svid_ttl, Duration::from_secs(300));
    assert!(config.entries.is_empty() && config.federated.is_empty());
    assert_eq!(config.attest, durward::attest::AttestSettings::default());
    assert!(!config.policy.allow_unauthenticated_verifiers);
    assert!(config.policy.allowed_foreign_jwt_claims.is_empty());
    assert_eq!(config.caches.availability_target, None);
    assert_eq!((config.caches.x509_svids.count(), config.caches.jwt_svids.count()), (1000, 1000));
    assert_eq!((&config.prometheus, config.health.enabled), (&None, false));
    assert_eq!(config.ratelimit.gate.connection.handshake_timeout, Duration::from_secs(10));
    assert_eq!(config.listener.drain_timeout, Duration::from_secs(5));
}

const FULL: &str = r#"
agent {
    Trust_Domain = "spiffe://example.org"        # keys in any case, as in spire-agent
    data_dir = "data"
    socket_path = "/tmp/durward/api.sock"
    entries_dir = "more"
    log_level = "WARN"
    log_format = "json"
    log_file = "agent.log"
    log_source_location = true
    log_selectors = ["unix:uid"]
    workload_x509_svid_key_type = "EC-P384"
    allow_unauthenticated_verifiers = true
    allowed_foreign_jwt_claims = ["b", "a"]
    availability_target = "24h"
    x509_svid_cache_max_size = "20"
    jwt_svid_cache_max_size = 0x10
    disable_sds_api = true
    disable_workload_api = false
    authorized_delegates = []
    profiling_enabled = false
    insecure_bootstrap = false
    rebootstrap_mode = "never"
    sds { default_svid_name = "default" }
    experimental { use_sync_authorized_entries = true require_pq_kem = false feature_flags = [] }
    listener { drain_timeout = "0s" }
}
issuer "embedded" {
    ca_ttl = "48h"
    ca_key_type = "rsa-2048"
    jwt_issuer = "https://example.org"
    ca_cert_path = "ca.pem"
    ca_key_path = "/ca.key"
    default_x509_svid_ttl = "90m"
    default_jwt_svid_ttl = "1m"
}
plugins {
    WorkloadAttestor "unix" {
        plugin_data { discover_workload_path = true workload_size_limit = -1 }
    }
    WorkloadAttestor "k8s" { enabled = false plugin_data { node_name = "x" } }
}
telemetry {
    Prometheus { host = "[::1]" port = "9988" }
}
health_checks {
    listener_enabled = true
    bind_address = "127.0.0.1"
    bind_port = "8080"
    live_path = "/l"
    ready_path = "/r"
}
federation "spiffe://other.example" { bundle_path = "other.pem" }
entry "spiffe://example.org/web" {
    selectors = ["unix:uid:1000", "unix:group:www"]
    x509_svid_ttl = "2h"
    jwt_svid_ttl = "2m"
    hint = "web"
    dns_names = ["web.example.org", "*.web.example.org"]
    federates_with = ["spiffe://other.example"]
}
entry "spiffe://example.org/web" {
    selectors = ["unix:uid:1001"]
    id = "second"
}
"#;

/// The same as [`FULL`], as JSON: blocks as objects, a repeated block as a list of objects.
const FULL_JSON: &str = r#"{
  "agent": {
    "trust_domain": "example.org", "data_dir": "data", "socket_path": "/tmp/durward/api.sock",
    "entries_dir": "more", "log_level": "warning", "log_format": "json", "log_file": "agent.log",
    "log_source_location": true, "log_selectors": ["unix:uid"], "workload_x509_svid_key_type": "ec-p384",
    "allow_unauthenticated_verifiers": true, "allowed_foreign_jwt_claims": ["a", "b"],
    "availability_target": "24h", "x509_svid_cache_max_size": 20, "jwt_svid_cache_max_size": 16,
    "listener": {"drain_timeout": "0"}
  },
  "issuer": {"embedded": {
    "ca_ttl": "48h", "ca_key_type": "rsa-2048", "jwt_issuer": "https:\/\/example.org", "ca_cert_path": "ca.pem",
    "ca_key_path": "/ca.key", "default_x509_svid_ttl": "1h30m", "default_jwt_svid_ttl": "60s"
  }},
  "plugins": {"WorkloadAttestor": [{"unix": {"plugin_data": {"discover_workload_path": true, "workload_size_limit": -1}}},
    {"k8s": {"enabled": false, "plugin_data": {"node_name": "x"}}}]},
  "telemetry": {"Prometheus": {"host": "::1", "port": 9988}},
  "health_checks": {"listener_enabled": true, "bind_address": "127.0.0.1", "bind_port": 8080, "live_path": "/l", "ready_path": "/r"},
  "federation": {"other.example": {"bundle_path": "/base/other.pem", "bundle_format": "pem"}},
  "entry": {"spiffe://example.org/web": [
    {"selectors": ["unix:group:www", "unix:uid:1000"], "x509_svid_ttl": "2h", "jwt_svid_ttl": "2m", "hint": "web",
     "dns_names": ["web.example.org", "*.web.example.org"], "federates_with": ["other.example"]},
    {"selectors": ["unix:uid:1001"], "id": "second"}
  ]}
}"#;

fn full_files() -> Files {
    Files::default()
        .with("/base/other.pem", ROOT)
        .with("/base/more/10.conf", "entry \"spiffe://example.org/db\" { selectors = [\"unix:path:/db\"] }")
        .with(
            "/base/more/20.json",
            "{\"entry\": {\"spiffe://example.org/api\": {\"selectors\": [\"unix:user:api\"]}}}",
        )
}

#[test]
fn everything_that_can_be_set_is_set() {
    let config = full_files().parse(FULL, ExpandEnv::No).unwrap();
    assert_eq!(config.agent.data_dir, Path::new("/base/data"));
    assert_eq!(embedded(&config).data_dir, config.agent.data_dir);
    assert_eq!(config.log.file.as_deref(), Some(Path::new("/base/agent.log")));
    assert_eq!(config.log.level, tracing::Level::WARN);
    assert_eq!(config.agent.svid_key_type, KeyType::EcP384);
    assert_eq!(embedded(&config).issuer.ca_key_type, KeyType::Rsa2048);
    assert_eq!(embedded(&config).issuer.jwt_key_type, KeyType::Rsa2048, "as the CA");
    let issuer = embedded(&config).issuer;
    let ca = (issuer.ca_cert_path.as_deref(), issuer.ca_key_path.as_deref());
    assert_eq!(ca, (Some(Path::new("/base/ca.pem")), Some(Path::new("/ca.key"))));
    assert_eq!(config.caches.jwt_svids.count(), 16);
    assert_eq!(config.prometheus, Some(HostPort { host: "::1".to_owned(), port: 9988 }));
    assert_eq!((config.health.enabled, config.health.port), (true, 8080));
    assert_eq!(config.listener.drain_timeout, Duration::ZERO);
    let other = TrustDomain::parse("other.example").unwrap();
    assert_eq!(config.federated[&other].x509_authorities.len(), 1);
    let entries: Vec<String> = config
        .entries
        .iter()
        .map(|e| format!("{} {}", e.created_at, e.id.as_str().split('#').next().unwrap_or_default()))
        .collect();
    assert_eq!(entries, ["0 /web", "1 second", "2 /db", "3 /api"]);
    let web = &config.entries[0];
    assert_eq!(web.x509_svid_ttl, Some(Duration::from_secs(7200)));
    assert_eq!(web.selectors.len(), 2);
    assert_eq!(web.dns_names, ["web.example.org", "*.web.example.org"]);
    assert!(web.federates_with.contains(&other));
}

#[test]
fn json_says_the_same() {
    let files = full_files();
    let hcl = files.parse(FULL, ExpandEnv::No).unwrap();
    let json = files.parse(FULL_JSON, ExpandEnv::No).unwrap();
    assert_eq!(hcl, json);
    assert!(diff(&hcl, &json).is_empty());
}

#[test]
fn null_sets_nothing() {
    let text = |plugin: &str, more: &str| {
        format!(
            r#"{{"agent": {{"trust_domain": "example.org"{more}}}, "plugins": {{"WorkloadAttestor": [{{"unix": {plugin}}}]}},
            "issuer": {{"embedded": {{}}}}, "entry": [{{"spiffe://example.org/a": {{"selectors": ["unix:uid:0"], "hint": null}}}}]}}"#
        )
    };
    let plain = Files::default().parse(&text("{}", ""), ExpandEnv::No).unwrap();
    for (case, plugin, more) in [
        ("settings of a plugin", r#"{"plugin_data": null}"#, ""),
        ("a plugin", "null", ""),
        (
            "a text, a number, a block",
            "{}",
            r#", "log_level": null, "x509_svid_cache_max_size": null, "listener": null"#,
        ),
    ] {
        assert_eq!(Files::default().parse(&text(plugin, more), ExpandEnv::No).unwrap(), plain, "{case}");
    }
    let nothing = r#"{"agent": {"trust_domain": null}, "issuer": {"embedded": {}}, "entry": {"spiffe://example.org/a": null}}"#;
    let errors = Files::default().parse(nothing, ExpandEnv::No).unwrap_err();
    for part in ["agent.trust_domain: must be", "entry \"spiffe://example.org/a\".selectors: "] {
        assert!(errors.contains(part), "{part}: {errors}");
    }
}

#[test]
fn blocks_of_one_name_are_one_block() {
    let apart = "agent { trust_domain = \"example.org\" } issuer \"embedded\" { ca_ttl = \"48h\" }
        agent { log_level = \"debug\" } issuer embedded { ca_key_type = \"ec-p384\" }";
    let config = parse(apart).unwrap();
    assert_eq!(config.log.level, tracing::Level::DEBUG);
    assert_eq!(embedded(&config).issuer.ca_ttl, Duration::from_secs(172_800));
    assert_eq!(embedded(&config).issuer.ca_key_type, KeyType::EcP384);
}

#[test]
fn variables_are_expanded_only_when_asked_for() {
    let text = "agent { trust_domain = \"${TD}\" data_dir = \"$$x\" }\nissuer \"embedded\" { }";
    let variable = |name: &str| (name == "TD").then(|| "example.org".to_owned());
    let config = Files::default().parse(text, ExpandEnv::With(&variable)).unwrap();
    assert_eq!(config.trust_domain.name(), "example.org");
    assert_eq!(config.agent.data_dir, Path::new("/base/$x"));
    let refused = parse(text).unwrap_err();
    assert!(refused.starts_with("agent.conf:1:9: agent.trust_domain \"${TD}\": "), "{refused}");
    assert!(refused.ends_with("; variables are replaced with --expand-env only"), "{refused}");
    let price = parse("agent { trust_domain = \"100$\" }\nissuer \"embedded\" { }").unwrap_err();
    assert!(!price.contains("expand"), "{price}");
    let refused =
        Files::default().parse(&text.replace("TD", "none"), ExpandEnv::With(&variable)).unwrap_err();
    assert!(!refused.contains("variables"), "{refused}");
}

#[test]
fn the_trust_domain_is_a_text_in_quotes() {
    let got = parse("agent { trust_domain = 42 }\nissuer \"embedded\" { }").unwrap_err();
    assert_eq!(got, "agent.conf:1:9: agent.trust_domain 42: must be a string, not a number");
}

/// Each mistake alone, and the whole of what is said about it.
#[test]
fn mistakes_in_agent_say_what_would_be_right() {
    for (case, inner, want) in [
        ("unknown", "log_levle = \"info\"", "2:1: agent.log_levle: unknown key: did you mean log_level?"),
        ("unknown block", "lisener { }", "2:1: agent.lisener: unknown key: did you mean listener?"),
        (
            "in a block",
            "listener { drain = \"1s\" }",
            "2:12: agent.listener.drain: unknown key; known here: drain_timeout",
        ),
        (
            "level",
            "log_level = \"loud\"",
            "2:1: agent.log_level \"loud\": must be one of panic, fatal, error, warn, info, debug, trace",
        ),
        ("wrong type", "log_level = [\"info\"]", "2:1: agent.log_level [ .. ]: must be a string, not a list"),
        (
            "quoted boolean",
            "log_source_location = \"true\"",
            "2:1: agent.log_source_location \"true\": must be true or false, without quotes, not a string",
        ),
        (
            "twice",
            "log_level = \"info\"\nLOG_LEVEL = \"debug\"",
            "3:1: agent.log_level \"debug\": set twice: first at agent.conf:2:1",
        ),
        ("format", "log_format = \"xml\"", "2:1: agent.log_format \"xml\": must be text or json"),
        ("empty path", "data_dir = \"\"", "2:1: agent.data_dir \"\": must be a path"),
        (
            "key type",
            "workload_x509_svid_key_type = \"rsa-4096\"",
            "2:1: agent.workload_x509_svid_key_type \"rsa-4096\": must be one of ec-p256, ec-p384, rsa-2048",
        ),
        (
            "days",
            "availability_target = \"1d\"",
            "2:1: agent.availability_target \"1d\": the units of a duration are h, m, s and ms: write \"24h\"",
        ),
        (
            "short target",
            "availability_target = \"23h\"",
            "2:1: agent.availability_target \"23h\": must be at least 24h",
        ),
        (
            "no duration",
            "availability_target = 24",
            "2:1: agent.availability_target 24: must be a duration such as \"1h30m\", \"10s\" or \"500ms\"",
        ),
        (
            "negative",
            "x509_svid_cache_max_size = -1",
            "2:1: agent.x509_svid_cache_max_size -1: must be a whole number from 0 to 10000000",
        ),
        (
            "no number",
            "jwt_svid_cache_max_size = \"many\"",
            "2:1: agent.jwt_svid_cache_max_size \"many\": must be a whole number from 0 to 10000000",
        ),
        (
            "fraction",
            "jwt_svid_cache_max_size = 1.5",
            "2:1: agent.jwt_svid_cache_max_size 1.5: must be a whole number from 0 to 10000000",
        ),
        (
            "long socket",
            "socket_path = \"/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789/socket\"",
            "2:1: agent.socket_path \"/01234567890123456789012345678901234567890123456789012345678901234567890123456..\": a socket's path can have at most 107 bytes, and this has 108",
        ),
        (
            "no list",
            "log_selectors = \"unix:uid\"",
            "2:1: agent.log_selectors \"unix:uid\": must be a list of strings such as [\"a\", \"b\"], not a string",
        ),
        (
            "no strings",
            "log_selectors = [true]",
            "2:18: agent.log_selectors true: must be a list of strings, and holds a boolean",
        ),
        (
            "no block",
            "listener = 1",
            "2:12: agent.listener 1: must be a block, listener { .. }, not a number",
        ),
        (
            "drain",
            "listener { drain_timeout = \"1h\" }",
            "2:12: agent.listener.drain_timeout \"1h\": must be from 0s to 5m",
        ),
        (
            "nothing served",
            "disable_workload_api = true",
            "2:1: agent.disable_workload_api true: the Workload API is the only one in this version, and nothing would be served",
        ),
        (
            "admin beside public",
            "admin_socket_path = \"/run/durward/public/a/b.sock\"",
            "2:1: agent.admin_socket_path \"/run/durward/public/a/b.sock\": cannot be in the same directory or a subdirectory as that containing the Workload API socket \"/run/durward/public/api.sock\" (by default)",
        ),
        (
            "delegates",
            "authorized_delegates = [\"spiffe://example.org/x\"]",
            "2:1: agent.authorized_delegates [ .. ]: the delegated identity API is not in this version; leave it out",
        ),
        (
            "sds",
            "sds { default_svid_name = \"x\" }",
            "2:7: agent.sds.default_svid_name \"x\": SDS is not in this version; leave it out",
        ),
        (
            "profiling",
            "profiling_enabled = true",
            "2:1: agent.profiling_enabled true: profiling is not in this version; leave it false",
        ),
        (
            "pipes",
            "experimental { named_pipe_name = \"x\" }",
            "2:16: agent.experimental.named_pipe_name \"x\": is not supported in this platform; please use socket_path instead",
        ),
        (
            "flags",
            "experimental { feature_flags = [\"wit-svid\"] }",
            "2:16: agent.experimental.feature_flags [ .. ]: any feature flag is not in this version; leave it out",
        ),
        (
            "server",
            "server_address = \"a\"",
            "2:1: agent.server_address: is for a SPIRE Server, and contradicts issuer \"embedded\" at agent.conf:4:8: take one of them out",
        ),
        (
            "no secret is shown",
            "join_token = \"s3cret\"",
            "2:1: agent.join_token: is for a SPIRE Server, and contradicts issuer \"embedded\" at agent.conf:4:8: take one of them out",
        ),
        (
            "missing directory",
            "entries_dir = \"none\"",
            "2:1: agent.entries_dir \"/base/none\": there is no such directory",
        ),
        (
            "key of another block",
            "sync_interval = \"5s\"",
            "2:1: agent.sync_interval: unknown key here: did you mean agent.experimental.sync_interval?",
        ),
        (
            "key of none",
            "foo_bar = 1",
            "2:1: agent.foo_bar: unknown key; conf/agent.conf has all that are known (man agent.conf)",
        ),
        ("syntax", "log_level =", "3:1: expected a value, found \"}\""),
    ] {
        assert_eq!(parse(&with_agent(inner)).err(), Some(format!("agent.conf:{want}")), "{case}");
    }
}

#[test]
fn mistakes_elsewhere_say_what_would_be_right() {
    for (case, more, want) in [
        ("unknown block", "entri \"x\" { }", "3:1: entri: unknown key: did you mean entry?"),
        (
            "unknown",
            "zzzzzzzz { }",
            "3:1: zzzzzzzz: unknown key; known here: agent, plugins, telemetry, health_checks, audit, issuer, ratelimit, federation, entry",
        ),
        (
            "other issuer",
            "issuer \"vault\" { }",
            "3:8: issuer \"vault\": unknown issuer: must be \"embedded\"",
        ),
        ("no name", "issuer { }", "3:1: issuer: must have a name, issuer \"name\" { .. }"),
        (
            "no block",
            "issuer { x = 1 }",
            "3:10: issuer \"x\": must have a name, issuer \"name\" { .. }, and a block as its value",
        ),
        (
            "ca_ttl",
            "issuer \"embedded\" { ca_ttl = \"59s\" }",
            "3:21: issuer \"embedded\".ca_ttl \"59s\": must be from 1m to 87600h",
        ),
        (
            "longer than the CA",
            "issuer \"embedded\" { ca_ttl = \"1h\" default_x509_svid_ttl = \"2h\" }",
            "3:35: issuer \"embedded\".default_x509_svid_ttl \"2h\": must be at most ca_ttl, which is \"1h\" (agent.conf:3:21)",
        ),
        (
            "half a CA",
            "issuer \"embedded\" { ca_key_path = \"k\" }",
            "3:21: issuer \"embedded\".ca_key_path \"/base/k\": ca_cert_path must be set too: a CA is a certificate and its key",
        ),
        (
            "attestor",
            "plugins { WorkloadAttestor \"docker\" { } }",
            "3:28: plugins.WorkloadAttestor \"docker\": this workload attestor is not in this version, only unix and k8s: leave it out, or set enabled = false",
        ),
        (
            "misspelt attestor",
            "plugins { WorkloadAttestor \"unics\" { } }",
            "3:28: plugins.WorkloadAttestor \"unics\": unknown workload attestor: did you mean unix?",
        ),
        (
            "external",
            "plugins { WorkloadAttestor \"mine\" { plugin_cmd = \"/x\" } }",
            "3:28: plugins.WorkloadAttestor \"mine\": an external plugin is not in this version; leave it out",
        ),
        (
            "external unix",
            "plugins { WorkloadAttestor \"unix\" { plugin_cmd = \"/x\" } }",
            "3:37: plugins.WorkloadAttestor \"unix\".plugin_cmd \"/x\": an external plugin is not in this version; leave it out",
        ),
        (
            "unix twice",
            "plugins { WorkloadAttestor \"unix\" { }\n WorkloadAttestor \"unix\" { } }",
            "4:19: plugins.WorkloadAttestor \"unix\": declared more than once: first at agent.conf:3:28",
        ),
        (
            "unix off",
            "plugins { WorkloadAttestor \"unix\" { enabled = false } }",
            "3:37: plugins.WorkloadAttestor \"unix\".enabled false: without an attestor nobody gets an identity",
        ),
        (
            "plugin data",
            "plugins { WorkloadAttestor \"unix\" { plugin_data { discover_path = true } } }",
            "3:51: plugins.WorkloadAttestor \"unix\".plugin_data.discover_path: unknown key; known here: discover_workload_path, workload_size_limit",
        ),
        (
            "plugin type",
            "plugins { WorkloadAtestor \"unix\" { } }",
            "3:11: plugins.WorkloadAtestor: unknown key: did you mean WorkloadAttestor?",
        ),
        (
            "node attestor",
            "plugins { NodeAttestor \"join_token\" { plugin_data { } } }",
            "3:24: plugins.NodeAttestor \"join_token\": is for a SPIRE Server, and contradicts issuer \"embedded\" at agent.conf:2:8: take one of them out",
        ),
        (
            "store",
            "plugins { SVIDStore \"aws_secretsmanager\" { } }",
            "3:21: plugins.SVIDStore \"aws_secretsmanager\": storing SVIDs is not in this version; leave it out",
        ),
        (
            "sink",
            "telemetry { Statsd = [{ address = \"x:1\" }] }",
            "3:13: telemetry.Statsd: this telemetry sink is not in this version; leave it out",
        ),
        (
            "no port",
            "telemetry { Prometheus { } }",
            "3:13: telemetry.Prometheus.port: must be configured: port = 9988",
        ),
        (
            "port",
            "telemetry { Prometheus { port = 70000 } }",
            "3:26: telemetry.Prometheus.port 70000: must be a whole number from 1 to 65535",
        ),
        (
            "label",
            "telemetry { EnableTrustDomainLabel = true }",
            "3:13: telemetry.EnableTrustDomainLabel: is for spire-agent's names of series: spire_agent_names = true",
        ),
        (
            "path",
            "health_checks { live_path = \"live\" }",
            "3:17: health_checks.live_path \"live\": must be a path that begins with /",
        ),
        (
            "same path",
            "health_checks { live_path = \"/x\" ready_path = \"/x\" }",
            "3:34: health_checks.ready_path \"/x\": live_path is the same, at agent.conf:3:17",
        ),
        (
            "same port",
            "health_checks { listener_enabled = true bind_port = 9988 } telemetry { Prometheus { port = 9988 } }",
            "3:41: health_checks.bind_port localhost:9988: is also the address of telemetry.Prometheus, at agent.conf:3:72",
        ),
        (
            "federation",
            "federation \"Other\" { bundle_path = \"x\" }",
            "3:12: federation \"Other\": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores; for example: federation \"spiffe://other.example\" { .. }\n\
             agent.conf:3:22: federation \"Other\".bundle_path \"x\": cannot read /base/x: entity not found",
        ),
        (
            "own bundle",
            "federation \"example.org\" { }",
            "3:12: federation \"example.org\": is the agent's own trust domain, whose bundle is the issuer's\n\
             agent.conf:3:12: federation \"example.org\".bundle_path: must be configured: bundle_path = \"/etc/durward/other.example.pem\"",
        ),
        (
            "bundle format",
            "federation \"o\" { bundle_path = \"b\" bundle_format = \"der\" }",
            "3:36: federation \"o\".bundle_format \"der\": must be pem or spiffe",
        ),
        (
            "bundle",
            "federation \"o\" { bundle_path = \"b\" }",
            "3:18: federation \"o\".bundle_path \"b\": bundle holds no PEM block of type CERTIFICATE",
        ),
        (
            "an audit in the log",
            "agent { log_file = \"/l\" }\naudit { file = \"/l\" }",
            "4:9: audit.file \"/l\": cannot be the file of agent.log_file: who reads one of them would find the other's lines",
        ),
        (
            "two bundles",
            "federation \"o\" { bundle_path = \"r\" }\nfederation \"spiffe://o\" { bundle_path = \"r\" }",
            "4:12: federation \"spiffe://o\": is a duplicate: the first is at agent.conf:3:12",
        ),
    ] {
        let files = Files::default().with("/base/b", "").with("/base/r", ROOT);
        let got = files.parse(&format!("{LEAST}{more}"), ExpandEnv::No).err();
        assert_eq!(got, Some(format!("agent.conf:{want}")), "{case}");
    }
}

#[test]
fn mistakes_in_entries_say_what_would_be_right() {
    let (long_hint, long_id) =
        (format!("hint = \"{}\"", "x".repeat(1025)), format!("id = \"{}\"", "x".repeat(256)));
    let many = format!("dns_names = [{}]", "\"a\",".repeat(65));
    for (case, id, inner, want) in [
        (
            "no id",
            "web",
            "",
            "1:7: entry \"web\": scheme is missing or invalid; write \"spiffe://example.org/web\"",
        ),
        (
            "a path",
            "/a/b",
            "",
            "1:7: entry \"/a/b\": scheme is missing or invalid; write \"spiffe://example.org/a/b\"",
        ),
        (
            "another scheme",
            "https://example.org/web",
            "",
            "1:7: entry \"https://example.org/web\": scheme is missing or invalid; for example: \"spiffe://example.org/web\"",
        ),
        (
            "no path",
            "spiffe://example.org",
            "",
            "1:7: entry \"spiffe://example.org\": path cannot be empty for a workload; for example: \"spiffe://example.org/web\"",
        ),
        (
            "foreign",
            "spiffe://other/web",
            "",
            "1:7: entry \"spiffe://other/web\": must be in the trust domain example.org, not in other",
        ),
        (
            "reserved",
            "spiffe://example.org/spire/agent/x",
            "",
            "1:7: entry \"spiffe://example.org/spire/agent/x\": the path /spire is kept for SPIRE's servers and agents",
        ),
        (
            "unknown",
            "",
            "ttl = \"1h\"",
            "2:1: E.ttl: unknown key; known here: selectors, x509_svid_ttl, jwt_svid_ttl, hint, dns_names, federates_with, id",
        ),
        ("zero", "", "x509_svid_ttl = \"0s\"", "2:1: E.x509_svid_ttl \"0s\": must be at least 1s"),
        (
            "negative",
            "",
            "x509_svid_ttl = \"-1h\"",
            "2:1: E.x509_svid_ttl \"-1h\": must be a duration such as \"1h30m\", \"10s\" or \"500ms\"",
        ),
        (
            "seconds",
            "",
            "x509_svid_ttl = 3600",
            "2:1: E.x509_svid_ttl 3600: must be a duration such as \"1h30m\", \"10s\" or \"500ms\"",
        ),
        (
            "too long",
            "",
            "jwt_svid_ttl = \"25h\"",
            "2:1: E.jwt_svid_ttl \"25h\": must be at most ca_ttl, which is \"24h\" (by default)",
        ),
        (
            "hint",
            "",
            &long_hint,
            "2:1: E.hint \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..\": must have at most 1024 bytes, and has 1025",
        ),
        (
            "long id",
            "",
            &long_id,
            "2:1: E.id \"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx..\": must be 1 to 255 letters, digits, dots, dashes or underscores",
        ),
        (
            "id",
            "",
            "id = \"/web\"",
            "2:1: E.id \"/web\": must be 1 to 255 letters, digits, dots, dashes or underscores",
        ),
        (
            "dns",
            "",
            "dns_names = [\"ok\", \"no_\"]",
            "2:20: E.dns_names \"no_\": a DNS name is lower-case letters, digits and dashes between dots; * can only be all of its first part",
        ),
        (
            "dns star",
            "",
            "dns_names = [\"a.*.b\"]",
            "2:14: E.dns_names \"a.*.b\": a DNS name is lower-case letters, digits and dashes between dots; * can only be all of its first part",
        ),
        (
            "dns dots",
            "",
            "dns_names = [\"a..b\"]",
            "2:14: E.dns_names \"a..b\": the parts of a DNS name have 1 to 63 characters",
        ),
        (
            "dns dash",
            "",
            "dns_names = [\"-a\"]",
            "2:14: E.dns_names \"-a\": no part of a DNS name begins or ends with a dash",
        ),
        (
            "dns twice",
            "",
            "dns_names = [\"a\", \"a\"]",
            "2:19: E.dns_names \"a\": is listed twice: remove one",
        ),
        ("many names", "", &many, "2:1: E.dns_names [ .. ]: must be at most 64 names, and are 65"),
        (
            "own",
            "",
            "federates_with = [\"example.org\"]",
            "2:19: E.federates_with \"example.org\": is the agent's own trust domain, whose bundle everybody gets",
        ),
        (
            "no bundle",
            "",
            "federates_with = [\"spiffe://o\"]",
            "2:19: E.federates_with \"spiffe://o\": has no bundle: federation \"spiffe://o\" { bundle_path = \"..\" } is missing",
        ),
        (
            "federated path",
            "",
            "federates_with = [\"spiffe://o/x\"]",
            "2:19: E.federates_with \"spiffe://o/x\": a trust domain has no path; for example: spiffe://other.example",
        ),
    ] {
        let id = if id.is_empty() { "spiffe://example.org/web" } else { id };
        let entry = format!("entry \"{id}\" {{\n{inner}\nselectors = [\"unix:uid:0\"] }}");
        let got = Files::default().with("/base/entries.d/a.conf", &entry);
        let text = LEAST.replace("agent {", "agent { entries_dir = \"entries.d\"");
        let got = got.parse(&text, ExpandEnv::No).err();
        let want = want.replace("E.", "entry \"spiffe://example.org/web\".");
        assert_eq!(got, Some(format!("/base/entries.d/a.conf:{want}")), "{case}");
    }
}

#[test]
fn selectors_that_nobody_attests_are_refused() {
    let sha = "unix:sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    for (selectors, want) in [
        (
            "\"unix:uid:0\", \"unix:user:a b:c\", \"unix:supplementary_group:x\", \"unix:gid:4294967294\"",
            None,
        ),
        ("", Some("[]: an entry without selectors matches nobody; selectors = [\"unix:uid:1000\"]")),
        ("\"unix\"", Some("\"unix\": selector must be of the form type:value, such as unix:uid:1000")),
        ("\"unix:uid\"", Some("\"unix:uid\": must have a value, as unix:uid:VALUE")),
        ("\"unix:uid:01\"", Some("\"unix:uid:01\": must be a number from 0 to 4294967294, as unix:uid:1000")),
        (
            "\"unix:uid:4294967295\"",
            Some("\"unix:uid:4294967295\": must be a number from 0 to 4294967294, as unix:uid:1000"),
        ),
        (
            "\"unix:uid:root\"",
            Some("\"unix:uid:root\": must be a number from 0 to 4294967294, as unix:uid:1000"),
        ),
        ("\"user:bob\"", Some("\"user:bob\": write \"unix:user:bob\"")),
        ("\"unix:uidd:1\"", Some("\"unix:uidd:1\": no attestor makes this selector: did you mean unix:uid?")),
        (
            "\"k8s:ns:a\"",
            Some(
                "\"k8s:ns:a\": no attestor makes this selector: add WorkloadAttestor \"k8s\" { plugin_data { } } to plugins",
            ),
        ),
        ("\"unix:uid:1\", \"unix:uid:1\"", Some("\"unix:uid:1\": is listed twice: remove one")),
        (
            "\"unix:path:/x\"",
            Some(
                "\"unix:path:/x\": unix:path needs discover_workload_path = true in plugins.WorkloadAttestor \"unix\".plugin_data",
            ),
        ),
    ] {
        let text = format!("{LEAST}entry \"spiffe://example.org/web\" {{ selectors = [{selectors}] }}");
        let got = parse(&text).err().map(|errors| errors.split_once(".selectors ").unwrap().1.to_owned());
        assert_eq!(got.as_deref(), want, "{selectors}");
    }
    let discover =
        "plugins { WorkloadAttestor \"unix\" { plugin_data { discover_workload_path = true } } }\n";
    for (selector, want) in [
        ("unix:path:/usr/bin/x", None),
        (sha, None),
        ("unix:path:x", Some("\"unix:path:x\": must be an absolute path, as unix:path:/usr/bin/web")),
        ("unix:sha256:ABC", Some("\"unix:sha256:ABC\": must be 64 lower-case hexadecimal digits")),
    ] {
        let text =
            format!("{LEAST}{discover}entry \"spiffe://example.org/web\" {{ selectors = [\"{selector}\"] }}");
        let got = parse(&text).err().map(|errors| errors.split_once(".selectors ").unwrap().1.to_owned());
        assert_eq!(got.as_deref(), want, "{selector}");
    }
}

#[test]
fn entries_are_told_apart_by_their_selectors() {
    let entry = |inner: &str| format!("entry \"spiffe://example.org/web\" {{ {inner} }}\n");
    for (case, first, second, want) in [
        (
            "other selectors",
            "selectors = [\"unix:uid:1\"]",
            "selectors = [\"unix:uid:1\", \"unix:gid:1\"]",
            None,
        ),
        (
            "the same in another order",
            "selectors = [\"unix:uid:1\", \"unix:gid:1\"] hint = \"a\"",
            "selectors = [\"unix:gid:1\", \"unix:uid:1\"] hint = \"b\"",
            Some(
                "/base/entries.d/b.conf:1:7: entry \"spiffe://example.org/web\": repeats an entry with the same selectors, which is at agent.conf:3:7: remove one of them",
            ),
        ),
        (
            "the same id",
            "selectors = [\"unix:uid:1\"] id = \"x\"",
            "selectors = [\"unix:uid:2\"] id = \"x\"",
            Some(
                "/base/entries.d/b.conf:1:7: entry \"spiffe://example.org/web\".id \"x\": another entry has this id, at agent.conf:3:7",
            ),
        ),
    ] {
        let files = Files::default().with("/base/entries.d/b.conf", &entry(second));
        let text = LEAST.replace("agent {", "agent { entries_dir = \"entries.d\"") + &entry(first);
        assert_eq!(files.parse(&text, ExpandEnv::No).err().as_deref(), want, "{case}");
    }
}

#[test]
fn what_must_be_there_is_asked_for() {
    for (case, text, want) in [
        (
            "an empty file",
            "",
            "1:1: agent: section must be configured: agent { trust_domain = \"example.org\" }\n\
             agent.conf:1:1: issuer: section must be configured, so that the agent knows who signs: issuer \"embedded\" { } for a CA on this node, or a SPIRE Server: agent { server_address = \"..\" server_port = 8081 }".to_owned(),
        ),
        (
            "an empty object",
            "{}",
            "1:1: agent: section must be configured: agent { trust_domain = \"example.org\" }\n\
             agent.conf:1:1: issuer: section must be configured, so that the agent knows who signs: issuer \"embedded\" { } for a CA on this node, or a SPIRE Server: agent { server_address = \"..\" server_port = 8081 }".to_owned(),
        ),
        (
            "no trust domain",
            "\nagent { }\nissuer \"embedded\" { }",
            "2:1: agent.trust_domain: must be configured: trust_domain = \"example.org\"".to_owned(),
        ),
        (
            "a trust domain that is none",
            "agent { trust_domain = \"Example.org\" }\nissuer \"embedded\" { }\nentry \"spiffe://x/y\" { }",
            "1:9: agent.trust_domain \"Example.org\": trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores; for example: example.org\n\
             agent.conf:3:7: entry \"spiffe://x/y\".selectors: must be configured: selectors = [\"unix:uid:1000\"]".to_owned(),
        ),
        (
            "no trust domain but a workload",
            "agent { trust_domain = \"spiffe://example.org/web\" }\nissuer \"embedded\" { }",
            "1:9: agent.trust_domain \"spiffe://example.org/web\": a trust domain has no path; for example: example.org".to_owned(),
        ),
    ] {
        assert_eq!(parse(text).err(), Some(format!("agent.conf:{want}")), "{case}");
    }
}

#[test]
fn all_mistakes_come_at_once_in_the_order_of_their_places() {
    let files = Files::default()
        .with("/base/d/1.conf", "entry = 5\nagent { }")
        .with("/base/d/2.conf", "entry \"x")
        .with("/base/d/3.json", "{\"entry\": {\"spiffe://example.org/a\": {\"selectors\": []}}}");
    let text = "zzz = 1\nagent {\n  log_level = 1\n  trust_domain = \"example.org\"\n  entries_dir = \"d\"\n  log_format = 2\n}";
    assert_eq!(
        files.parse(text, ExpandEnv::No).unwrap_err(),
        "agent.conf:1:1: issuer: section must be configured, so that the agent knows who signs: issuer \"embedded\" { } for a CA on this node, or a SPIRE Server: agent { server_address = \"..\" server_port = 8081 }
agent.conf:1:1: zzz: unknown key; known here: agent, plugins, telemetry, health_checks, audit, issuer, ratelimit, federation, entry
agent.conf:3:3: agent.log_level \"1\": must be one of panic, fatal, error, warn, info, debug, trace
agent.conf:6:3: agent.log_format \"2\": must be text or json
/base/d/1.conf:1:9: entry 5: must be a block, entry { .. }, not a number
/base/d/1.conf:2:1: agent: unknown key; known here: entry, ratelimit
/base/d/2.conf:1:7: this text is never closed: \" is missing on the same line
/base/d/3.json:1:39: entry \"spiffe://example.org/a\".selectors []: an entry without selectors matches nobody; selectors = [\"unix:uid:1000\"]"
    );
}

#[test]
fn an_entry_keeps_its_id_and_shows_its_changes() {
    let read = |inner: &str| -> Entry {
        let text = format!(
            "{LEAST}federation \"o\" {{ bundle_path = \"r\" }}\nentry \"spiffe://example.org/web\" {{ {inner} }}"
        );
        let config = Files::default().with("/base/r", ROOT).parse(&text, ExpandEnv::No).unwrap();
        config.entries[0].as_ref().clone()
    };
    let plain = read("selectors = [\"unix:uid:1\"]");
    // Written down: it must be the same in the next version too.
    assert_eq!(plain.id.as_str(), "/web#565a56c7a5aa7187");
    for (case, inner, same_id, same_revision) in [
        ("nothing", "selectors = [\"unix:uid:1\"]", true, true),
        ("selectors", "selectors = [\"unix:uid:2\"]", false, false),
        ("hint", "selectors = [\"unix:uid:1\"] hint = \"h\"", false, false),
        ("x509_svid_ttl", "selectors = [\"unix:uid:1\"] x509_svid_ttl = \"1h\"", true, false),
        ("jwt_svid_ttl", "selectors = [\"unix:uid:1\"] jwt_svid_ttl = \"1h\"", true, false),
        ("dns_names", "selectors = [\"unix:uid:1\"] dns_names = [\"a\"]", true, false),
        ("federates_with", "selectors = [\"unix:uid:1\"] federates_with = [\"o\"]", true, false),
        ("id", "selectors = [\"unix:uid:1\"] id = \"x\"", false, false),
    ] {
        let entry = read(inner);
        assert_eq!(
            (entry.id == plain.id, entry.revision == plain.revision),
            (same_id, same_revision),
            "{case}"
        );
        assert!(entry.revision >= 0, "{case}");
    }
}

#[test]
fn a_reload_changes_what_it_can_and_refuses_the_rest() {
    let files = full_files();
    let old = files.parse(FULL, ExpandEnv::No).unwrap();
    for (case, from, to, want) in [
        ("nothing", "", "", ""),
        ("log level", "\"WARN\"", "\"debug\"", "live agent.log_level"),
        ("log selectors", "[\"unix:uid\"]", "[]", "live agent.log_selectors"),
        ("verifiers", "verifiers = true", "verifiers = false", "live agent.allow_unauthenticated_verifiers"),
        ("claims", "[\"b\", \"a\"]", "[\"b\"]", "live agent.allowed_foreign_jwt_claims"),
        ("target", "availability_target = \"24h\"", "", "live agent.availability_target"),
        ("cache", "\"20\"", "30", "live agent.x509_svid_cache_max_size"),
        ("jwt cache", "0x10", "30", "live agent.jwt_svid_cache_max_size"),
        (
            "attestor",
            "limit = -1",
            "limit = 1",
            "live plugins.WorkloadAttestor \"unix\".plugin_data.workload_size_limit",
        ),
        ("lifetime", "\"90m\"", "\"80m\"", "live issuer \"embedded\".default_x509_svid_ttl"),
        (
            "jwt lifetime",
            "svid_ttl = \"1m\"",
            "svid_ttl = \"3m\"",
            "live issuer \"embedded\".default_jwt_svid_ttl",
        ),
        ("entry", "\"2h\"", "\"3h\"", "entries +0 -0 ~1"),
        ("other entry", "unix:uid:1000", "unix:uid:7", "entries +1 -1 ~0"),
        (
            "socket",
            "/tmp/durward/",
            "/tmp/",
            "restart agent.socket_path: cannot be changed from \"/tmp/durward/api.sock\" to \"/tmp/api.sock\" by a reload: restart the agent",
        ),
        (
            "log format",
            "\"json\"",
            "\"text\"",
            "restart agent.log_format: cannot be changed from json to text by a reload: restart the agent",
        ),
        (
            "ca_ttl",
            "\"48h\"",
            "\"49h\"",
            "restart issuer \"embedded\".ca_ttl: cannot be changed from 48h to 49h by a reload: restart the agent",
        ),
        (
            "ca",
            "/ca.key",
            "/cb.key",
            "restart issuer \"embedded\".ca_key_path: cannot be changed from \"/ca.key\" to \"/cb.key\" by a reload: restart the agent",
        ),
        (
            "key type",
            "EC-P384",
            "ec-p256",
            "restart agent.workload_x509_svid_key_type: cannot be changed from ec-p384 to ec-p256 by a reload: restart the agent",
        ),
        (
            "metrics",
            "\"9988\"",
            "\"9989\"",
            "restart telemetry.Prometheus: cannot be changed from ::1:9988 to ::1:9989 by a reload: restart the agent",
        ),
        (
            "health off",
            "listener_enabled = true",
            "",
            "restart health_checks: cannot be changed from on to off by a reload: restart the agent",
        ),
        (
            "health path",
            "\"/l\"",
            "\"/live\"",
            "restart health_checks.live_path: cannot be changed from \"/l\" to \"/live\" by a reload: restart the agent",
        ),
        ("drain", "\"0s\"", "\"1s\"", "live agent.listener.drain_timeout"),
    ] {
        let new =
            files.parse(&FULL.replace(from, if from.is_empty() { "" } else { to }), ExpandEnv::No).unwrap();
        let changes = diff(&old, &new);
        let mut said: Vec<String> = changes.restart.iter().map(|key| format!("restart {key}")).collect();
        said.extend(changes.live.iter().map(|key| format!("live {key}")));
        let e = changes.entries;
        if e != durward::config::EntryChanges::default() {
            said.push(format!("entries +{} -{} ~{}", e.added, e.removed, e.changed));
        }
        assert_eq!(said.join("; "), want, "{case}");
        assert_eq!(changes.is_empty(), want.is_empty(), "{case}");
    }
    let without = FULL
        .replace("federation \"spiffe://other", "federation \"spiffe://another")
        .replace("[\"spiffe://other", "[\"spiffe://another");
    let changes = diff(&old, &files.parse(&without, ExpandEnv::No).unwrap());
    assert_eq!(
        changes.federated.iter().map(TrustDomain::name).collect::<Vec<_>>(),
        ["another.example", "other.example"]
    );
}

#[test]
fn debug_shows_no_secret_and_loading_needs_no_working_files() {
    let config = full_files().parse(FULL, ExpandEnv::No).unwrap();
    let shown = format!("{config:?}");
    assert!(shown.contains("example.org") && !shown.contains("PRIVATE"), "{shown}");
}

#[test]
fn files_are_loaded_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(
        at("agent.conf"),
        format!("{LEAST}federation \"o\" {{ bundle_path = \"{}\" }}", at("o.pem").display()),
    )
    .unwrap();
    std::fs::write(at("o.pem"), ROOT).unwrap();
    std::fs::create_dir(at("entries.d")).unwrap();
    std::fs::write(
        at("entries.d/a.conf"),
        "entry \"spiffe://example.org/a\" { selectors = [\"unix:uid:1\"] }",
    )
    .unwrap();
    std::fs::write(at("entries.d/ignored.txt"), "{{{").unwrap();
    let config = Config::load(&at("agent.conf"), ExpandEnv::No).unwrap();
    assert_eq!((config.entries.len(), config.federated.len()), (1, 1));

    let asked = RefCell::new(Vec::new());
    let variable = |name: &str| {
        asked.borrow_mut().push(name.to_owned());
        None
    };
    std::fs::write(at("entries.d/a.conf"), "# $A\n").unwrap();
    Config::load(&at("agent.conf"), ExpandEnv::With(&variable)).unwrap();
    assert_eq!(asked.take(), ["A"]);

    // Of a drop-in the file is named, and not how to name the first one.
    std::os::unix::fs::symlink("nowhere", at("entries.d/b.conf")).unwrap();
    let dangling = Config::load(&at("agent.conf"), ExpandEnv::No).unwrap_err();
    let want = format!("{}: cannot read it: no such file or directory", at("entries.d/b.conf").display());
    assert_eq!(dangling.to_string(), want);

    let gone = Config::load(&at("none.conf"), ExpandEnv::No).unwrap_err();
    let path = at("none.conf").display().to_string();
    assert_eq!(
        gone.to_string(),
        format!("{path}: could not find config file {path}: please use the -config flag")
    );
    assert_eq!((gone.list().len(), gone.list()[0].line), (1, 0));
}

#[test]
fn many_mistakes_are_counted_and_not_all_listed() {
    let text = format!("{LEAST}{}", "x { }\n".repeat(1500));
    let errors = parse(&text).unwrap_err();
    assert_eq!(errors.lines().count(), 1001);
    assert!(errors.ends_with("\nand 500 more"), "{errors}");
}

proptest::proptest! {
    #[test]
    fn any_text_is_answered(text in "\\PC{0,60}") {
        let _ = parse(&text).is_ok();
        let _ = parse(&format!("{LEAST}{text}")).is_ok();
    }

    /// Any key of ours set to anything.
    #[test]
    fn any_setting_is_answered(
        path in proptest::sample::select(&["agent", "issuer \"embedded\"", "plugins", "telemetry", "entry \"spiffe://example.org/a\"", "federation \"o\"", "health_checks"][..]),
        key in proptest::sample::select(&["trust_domain", "selectors", "ca_ttl", "sds", "WorkloadAttestor", "Prometheus", "bundle_path", "bind_port", "hint"][..]),
        value in proptest::sample::select(&["1", "-1", "\"\"", "[]", "[[]]", "{}", "[{}]", "{ unix = 1 }", "true", "1e300", "\"9999999h\"", "99999999999999999999"][..]),
    ) {
        let _ = parse(&format!("{LEAST}{path} {{ {key} = {value} }}")).is_ok();
    }

    /// The same settings are the same Config, whether as HCL or as JSON.
    #[test]
    fn hcl_and_json_are_one(
        uids in proptest::collection::btree_set(0_u32..50, 1..20),
        minutes in 1_u32..1440,
        hint in "[a-z\"\\\\\u{e9}$ ]{0,8}",
        cache in 1_u32..1000,
    ) {
        let quoted = serde_json::to_string(&hint).unwrap();
        let entries: Vec<(String, String)> = uids.iter().map(|uid| {
            (format!("spiffe://example.org/u{uid}"), format!("[\"unix:uid:{uid}\"]"))
        }).collect();
        let mut hcl = format!("agent {{ trust_domain = \"example.org\"\n jwt_svid_cache_max_size = {cache} }}\nissuer \"embedded\" {{ }}\n");
        let mut json = Vec::new();
        for (id, selectors) in &entries {
            hcl.push_str(&format!("entry \"{id}\" {{\n selectors = {selectors}\n hint = {quoted}\n x509_svid_ttl = \"{minutes}m\" }}\n"));
            json.push(format!("\"{id}\":{{\"selectors\":{selectors},\"hint\":{quoted},\"x509_svid_ttl\":\"{minutes}m0s\"}}"));
        }
        let json = format!(
            "{{\"agent\":{{\"trust_domain\":\"example.org\",\"jwt_svid_cache_max_size\":\"{cache}\"}},\"issuer\":{{\"embedded\":{{}}}},\"entry\":{{{}}}}}",
            json.join(","),
        );
        proptest::prop_assert_eq!(parse(&hcl), parse(&json));
    }
}
