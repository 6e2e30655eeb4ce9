//! Configurations of an agent that joins a SPIRE Server: read as spire-agent's are, with its texts.

use std::{path::Path, time::Duration};

use durward::{
    config::{Config, ExpandEnv, Given, Input, diff},
    issuer::{
        IssuerChoice,
        server::{
            ServerSettings,
            settings::{
                KeyManagerSettings, NodeAttestorSettings, RebootstrapMode, TokenSource, TrustBundleFormat,
                TrustSource,
            },
        },
    },
};

fn parse_with(text: &str, given: &[Given]) -> Result<Config, String> {
    Config::parse(&Input {
        path: Path::new("agent.conf"),
        text,
        base: Path::new("/base"),
        expand_env: ExpandEnv::No,
        given,
        drop_ins: &|_| Ok(None),
        user_id: &|_| Ok(None),
        read_file: &|_| Ok(Vec::new()),
    })
    .map_err(|errors| errors.to_string())
}

fn parse(text: &str) -> Result<Config, String> {
    parse_with(text, &[])
}

const PLUGINS: &str = "plugins {
    NodeAttestor \"join_token\" { plugin_data { } }
    KeyManager \"memory\" { plugin_data { } }
    WorkloadAttestor \"unix\" { plugin_data { } }
}";

/// A file with this in its block `agent`, beside what is always needed.
fn joined(agent: &str) -> String {
    format!(
        "agent {{ trust_domain = \"example.org\" server_address = \"spire\" server_port = \"8081\"\n{agent}\n}}\n{PLUGINS}"
    )
}

/// The same with these plugins, believing whoever answers.
fn with_plugins(plugins: &str) -> String {
    format!(
        "agent {{ trust_domain = \"example.org\" server_address = \"spire\" server_port = 8081 insecure_bootstrap = true }}
        plugins {{ {plugins} }}"
    )
}

fn server(text: &str) -> ServerSettings {
    match parse(text).unwrap().issuer_input().choice {
        IssuerChoice::Server(settings) => *settings,
        IssuerChoice::Embedded(_) => panic!("a server is joined: {text}"),
    }
}

#[test]
fn a_file_with_a_server_and_no_issuer_joins_it() {
    let settings =
        server(&joined("trust_bundle_path = \"conf/root.crt\" join_token = \"TOKEN\" data_dir = \"./data\""));
    assert_eq!((settings.join.address.as_str(), settings.join.port), ("spire", 8081));
    assert_eq!(settings.data_dir, Path::new("/base/./data"));
    let path = Path::new("/base/conf/root.crt");
    assert_eq!(settings.join.trust_source(), TrustSource::File { path, format: TrustBundleFormat::Pem });
    assert!(matches!(settings.join.token(), Some(TokenSource::Given(token)) if token.secret() == "TOKEN"));
    assert_eq!(settings.join.rebootstrap_mode, RebootstrapMode::Never);
    assert_eq!(settings.join.rebootstrap_delay, Duration::from_secs(600));
    assert_eq!(settings.sync.sync_interval, Duration::from_secs(5));
    assert!(settings.sync.use_sync_authorized_entries && !settings.sync.require_pq_kem);
    assert_eq!(settings.node_attestor, NodeAttestorSettings::JoinToken);
    assert_eq!(settings.key_manager, KeyManagerSettings::Memory);
    assert_eq!(settings.prefetch, 1000);

    let json = r#"{"agent": {"trust_domain": "spiffe://example.org", "server_address": "127.0.0.1", "server_port": 8081,
        "insecure_bootstrap": true, "availability_target": "24h", "experimental": {"sync_interval": "1s"}},
        "plugins": {"NodeAttestor": [{"k8s_psat": {"plugin_data": {"cluster": "c"}}}],
            "KeyManager": [{"disk": {"plugin_data": {"directory": "keys"}}}]}}"#;
    let settings = server(json);
    assert_eq!(settings.availability_target, Some(Duration::from_secs(86_400)));
    assert_eq!(settings.sync.sync_interval, Duration::from_secs(1));
    assert_eq!(settings.key_manager, KeyManagerSettings::Disk("/base/keys".into()));
    let NodeAttestorSettings::K8sPsat(psat) = settings.node_attestor else { panic!("k8s_psat") };
    assert_eq!(
        (psat.cluster.as_str(), psat.token.to_str().unwrap()),
        ("c", "/var/run/secrets/tokens/spire-agent")
    );
}

#[test]
fn spire_agents_own_file_is_taken_as_it_is() {
    let settings = server(include_str!("../fixtures/config/spire-agent.conf"));
    assert_eq!(settings.node_attestor, NodeAttestorSettings::JoinToken);
    assert!(matches!(settings.key_manager, KeyManagerSettings::Disk(_)));
    assert!(matches!(settings.join.trust_source(), TrustSource::File { .. }));
}

#[test]
fn every_source_of_trust_is_taken() {
    let pem = TrustBundleFormat::Pem;
    for (agent, want) in [
        ("insecure_bootstrap = true", TrustSource::Insecure),
        (
            "trust_bundle_url = \"https://a/b\"",
            TrustSource::Url { url: "https://a/b", socket: None, format: pem },
        ),
        (
            "trust_bundle_url = \"http://a/b?x=1\" trust_bundle_unix_socket = \"/s\" trust_bundle_format = \"spiffe\"",
            TrustSource::Url {
                url: "http://a/b?x=1",
                socket: Some(Path::new("/s")),
                format: TrustBundleFormat::Spiffe,
            },
        ),
        ("trust_bundle_spiffe_workload_api = \"unix:///s\"", TrustSource::WorkloadApi(Path::new("/s"))),
    ] {
        assert_eq!(server(&joined(agent)).join.trust_source(), want, "{agent}");
    }
}

#[test]
fn what_is_wrong_is_said_with_the_texts_of_spire_agent() {
    let source = "trust_bundle_path, trust_bundle_url, or trust_bundle_spiffe_workload_api must be configured unless insecure_bootstrap is set";
    let cases: &[(&str, &str)] = &[
        ("", source),
        (
            "insecure_bootstrap = true trust_bundle_path = \"a\"",
            "only one of insecure_bootstrap or trust_bundle_path can be specified, not both",
        ),
        (
            "insecure_bootstrap = true trust_bundle_url = \"https://a\"",
            "only one of insecure_bootstrap or trust_bundle_url can be specified, not both",
        ),
        (
            "insecure_bootstrap = true trust_bundle_path = \"a\" trust_bundle_url = \"https://a\"",
            "only one of insecure_bootstrap, trust_bundle_url, or trust_bundle_path can be specified, not the three options",
        ),
        (
            "trust_bundle_path = \"a\" trust_bundle_url = \"https://a\"",
            "only one of trust_bundle_url or trust_bundle_path can be specified, not both",
        ),
        (
            "trust_bundle_path = \"a\" trust_bundle_spiffe_workload_api = \"unix:///s\"",
            "only one of trust_bundle_path or trust_bundle_spiffe_workload_api can be specified, not both",
        ),
        (
            "trust_bundle_spiffe_workload_api = \"tcp://1.2.3.4:5\"",
            "is not a valid SPIFFE Workload API endpoint address",
        ),
        ("trust_bundle_url = \"http://a\"", "trust bundle URL must start with https://"),
        ("trust_bundle_url = \"a b\"", "unable to parse trust bundle URL"),
        (
            "trust_bundle_url = \"https://a\" trust_bundle_unix_socket = \"/s\"",
            "trust bundle URL must start with http:// when used with trust bundle unix socket",
        ),
        (
            "trust_bundle_url = \"http://a?spire-x=1\" trust_bundle_unix_socket = \"/s\"",
            "trust_bundle_url query params can not start with spire-",
        ),
        (
            "trust_bundle_path = \"a\" trust_bundle_unix_socket = \"/s\"",
            "if trust_bundle_unix_socket is specified, so must be trust_bundle_url",
        ),
        (
            "insecure_bootstrap = true trust_bundle_format = \"der\"",
            "invalid value for trust_bundle_format, expected \"pem\" or \"spiffe\"",
        ),
        (
            "insecure_bootstrap = true rebootstrap_mode = \"auto\"",
            "insecure_bootstrap option can not be used with rebootstrapping",
        ),
        (
            "trust_bundle_path = \"a\" rebootstrap_mode = \"always\"",
            "agent.rebootstrap_mode: \"always\" needs a node that can attest again, and with a join token it cannot",
        ),
        ("trust_bundle_path = \"a\" rebootstrap_mode = \"perhaps\"", "unknown rebootstrap mode specified"),
        (
            "insecure_bootstrap = true join_token = \"geheim\" join_token_file = \"f\"",
            "only one of join_token or join_token_file can be specified, not both",
        ),
        (
            "insecure_bootstrap = true experimental { jwt_svid_cache_hit_timeout = \"4s\" }",
            "must be from 5s to 30s",
        ),
        ("insecure_bootstrap = true experimental { sync_interval = \"0s\" }", "must be from 500ms to 24h"),
        ("insecure_bootstrap = true server_prt = 1", "unknown key: did you mean server_port?"),
    ];
    for (agent, want) in cases {
        let said = parse(&joined(agent)).unwrap_err();
        assert!(said.contains(want), "{agent}: {said}");
        assert_eq!(said.lines().count(), 1, "{agent}: {said}");
        assert!(!said.contains("geheim"), "{said}");
    }
}

#[test]
fn plugins_are_counted_and_refused_by_name() {
    let cases: &[(&str, &str)] = &[
        (
            "KeyManager \"memory\" { }",
            "plugin type \"NodeAttestor\" constraint not satisfied: expected exactly 1 but got 0",
        ),
        (
            "NodeAttestor \"join_token\" { }",
            "plugin type \"KeyManager\" constraint not satisfied: expected exactly 1 but got 0",
        ),
        (
            "NodeAttestor \"join_token\" { } NodeAttestor \"k8s_psat\" { plugin_data { cluster = \"c\" } } KeyManager \"memory\" { }",
            "expected exactly 1 but got 2",
        ),
        ("NodeAttestor \"join_token\" { } KeyManager \"disk\" { }", "directory must be configured"),
        ("NodeAttestor \"k8s_psat\" { } KeyManager \"memory\" { }", "missing required cluster block"),
        (
            "NodeAttestor \"x509pop\" { plugin_data { private_key_path = \"k\" } } KeyManager \"memory\" { }",
            "needs certificate_path",
        ),
        (
            "NodeAttestor \"sshpop\" { plugin_data { } } KeyManager \"memory\" { }",
            "plugins.NodeAttestor \"sshpop\": this node attestor is not in this version",
        ),
        (
            "NodeAttestor \"tpm_devid\" { } KeyManager \"memory\" { }",
            "this node attestor is not in this version",
        ),
        ("NodeAttestor \"x509pp\" { } KeyManager \"memory\" { }", "did you mean x509pop?"),
        (
            "NodeAttestor \"mine\" { plugin_cmd = \"/p\" } KeyManager \"memory\" { }",
            "an external plugin is not in this version",
        ),
        (
            "NodeAttestor \"join_token\" { plugin_data { a = 1 } } KeyManager \"memory\" { }",
            "unknown key; no key is known here",
        ),
        (
            "NodeAttestor \"join_token\" { } KeyManager \"memory\" { } SVIDStore \"disk\" { plugin_cmd = \"/p\" }",
            "storing SVIDs is not in this version",
        ),
    ];
    for (plugins, want) in cases {
        let said = parse(&with_plugins(plugins)).unwrap_err();
        assert!(said.contains(want), "{plugins}: {said}");
        assert_eq!(said.lines().count(), 1, "{plugins}: {said}");
    }
    let off = "NodeAttestor \"sshpop\" { enabled = false } NodeAttestor \"x509pop\" { plugin_data { spiffe_endpoint_socket = \"unix:///s\" } }
        KeyManager \"disk\" { enabled = false } KeyManager \"memory\" { }";
    let NodeAttestorSettings::X509Pop(pop) = server(&with_plugins(off)).node_attestor else {
        panic!("x509pop")
    };
    assert_eq!(pop.workload_api.as_deref(), Some(Path::new("/s")));
}

#[test]
fn both_ways_and_neither_are_errors() {
    let server = "agent { trust_domain = \"example.org\" server_address = \"s\" server_port = 1 insecure_bootstrap = true }";
    let cases: &[(String, &[&str])] = &[
        ("agent { trust_domain = \"example.org\" }".to_owned(), &["server_address = \"..\"", "issuer \"embedded\""]),
        (format!("{server} {PLUGINS} issuer \"embedded\" {{ }}"), &["agent.server_address", "contradicts issuer \"embedded\"", "NodeAttestor"]),
        (format!("agent {{ trust_domain = \"example.org\" }} {PLUGINS}"), &["agent.server_address: must be configured", "server_port"]),
        ("agent { trust_domain = \"example.org\" server_address = \"s\" server_port = 1 insecure_bootstrap = true }".to_owned(), &["plugins: section must be configured"]),
        (format!("{server} {PLUGINS} issuer \"server\" {{ }}"), &["joined without this block"]),
        (
            format!("{server} {PLUGINS} entry \"spiffe://example.org/a\" {{ selectors = [\"unix:uid:1\"] }}"),
            &["entries come from the SPIRE Server"],
        ),
        (
            format!("{server} {PLUGINS} federation \"other.example\" {{ bundle_path = \"a\" }}"),
            &["bundles of other trust domains come from the SPIRE Server"],
        ),
    ];
    for (text, wants) in cases {
        let said = parse(text).unwrap_err();
        for want in *wants {
            assert!(said.contains(want), "{text}: {want}: {said}");
        }
    }
}

#[test]
fn the_command_line_comes_before_the_file() {
    let bare = format!("agent {{ server_port = 1 }} {PLUGINS}");
    let given = [
        Given::text("server_address", "cli.example"),
        Given::text("server_port", "8081"),
        Given::text("join_token", "TOKEN"),
        Given::yes("insecure_bootstrap"),
        Given::trust_domain("example.org"),
    ];
    let config = parse_with(&bare, &given).unwrap();
    let IssuerChoice::Server(settings) = config.issuer_input().choice else { panic!("a server is joined") };
    assert_eq!((settings.join.address.as_str(), settings.join.port), ("cli.example", 8081));
    assert!(settings.join.insecure_bootstrap && settings.join.token().is_some());
    assert_eq!(settings.trust_domain.name(), "example.org");

    let said = parse_with(&bare, &[Given::text("server_port", "http")]).unwrap_err();
    assert!(said.contains("command line: agent.server_port \"http\": must be a whole number"), "{said}");
    let own = joined("insecure_bootstrap = true");
    let other = [Given::trust_domain("other.example")];
    let config = parse_with(&own, &other).unwrap();
    assert_eq!(config.trust_domain.name(), "other.example", "as with spire-agent");
    let embedded = "agent { trust_domain = \"example.org\" } issuer \"embedded\" { }";
    let config = parse_with(embedded, &other).unwrap();
    assert_eq!(config.trust_domain.name(), "example.org", "its CA is for this one");
    let said = parse_with(&own, &[Given::yes("disable_workload_api")]).unwrap_err();
    assert!(
        said.contains("agent.disable_workload_api") && said.contains("nothing would be served"),
        "{said}"
    );
}

#[test]
fn what_reloads_and_what_needs_a_restart() {
    let old = parse(&joined("trust_bundle_path = \"a\" join_token = \"geheim\"")).unwrap();
    let change = |agent: &str| diff(&old, &parse(&joined(agent)).unwrap());
    let live = change(
        "trust_bundle_path = \"a\" entry_wait = \"1s\" availability_target = \"24h\" experimental { sync_interval = \"1s\" }",
    );
    assert!(live.restart.is_empty(), "{live:?}");
    let keys = [
        "agent.availability_target",
        "agent.entry_wait",
        "agent.experimental.sync_interval",
        "agent.join_token",
    ];
    for key in keys {
        assert!(live.live.contains(&key), "{key}: {live:?}");
    }
    let restart = change("trust_bundle_path = \"b\" rebootstrap_mode = \"auto\"");
    assert_eq!(restart.restart.len(), 2, "{restart:?}");
    let embedded = parse("agent { trust_domain = \"example.org\" } issuer \"embedded\" { }").unwrap();
    let said: Vec<String> = diff(&old, &embedded).restart.iter().map(ToString::to_string).collect();
    assert!(said.iter().any(|said| said.contains("the SPIRE Server at spire")), "{said:?}");
    assert!(!format!("{said:?}{old:?}").contains("geheim"));
}
