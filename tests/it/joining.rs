//! An agent that joins a SPIRE Server: its own SVID, what is kept of it on the disk, and servers that are none.

use std::{os::unix::fs::PermissionsExt as _, path::Path, process::Command, sync::Arc, time::Duration};

use durward::{
    identity::{Bundle, TrustDomain},
    issuer::{
        FileFault,
        server::{
            DataFault, Denial, OwnStanding, OwnSvid, ServerMetrics, ServerSettings,
            settings::{
                JoinSettings, KeyManagerSettings, NodeAttestorSettings, SyncSettings, X509PopSettings,
            },
        },
    },
    os::clock::Clock,
    telemetry::metrics::Metrics,
};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::timeout,
};

use crate::{
    spire_server::{Face, FakeSpireServer, Given},
    support::Process,
};

const DURWARD: &str = env!("CARGO_BIN_EXE_durward");

/// Far more than any of this takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn settings(dir: &Path, port: u16, bundle: &str, token: &str) -> ServerSettings {
    let roots = dir.join("roots.pem");
    std::fs::write(&roots, bundle).unwrap();
    ServerSettings {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        data_dir: dir.join("data"),
        svid_key_type: Default::default(),
        availability_target: None,
        prefetch: 0,
        join: JoinSettings {
            address: "localhost".to_owned(),
            port,
            join_token: token.to_owned().into(),
            trust_bundle_path: Some(roots),
            ..JoinSettings::default()
        },
        sync: SyncSettings::default(),
        node_attestor: NodeAttestorSettings::JoinToken,
        key_manager: KeyManagerSettings::Disk(dir.join("data")),
    }
}

pub(crate) fn opened(settings: ServerSettings, clock: Clock) -> Result<Arc<OwnSvid>, DataFault> {
    OwnSvid::open(settings, clock, Arc::new(ServerMetrics::new(Metrics::default().registry())))
}

/// A directory that nobody else may write to on the way.
pub(crate) fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub(crate) async fn serving(own: &Arc<OwnSvid>) -> String {
    let mut standing = own.standing();
    let found = timeout(PATIENCE, standing.wait_for(|it| matches!(it, OwnStanding::Serving { .. }))).await;
    match &*found.expect("in time").unwrap() {
        OwnStanding::Serving { id, .. } => id.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Why there is no SVID, once a reason was found.
pub(crate) async fn trouble(own: &Arc<OwnSvid>) -> String {
    let mut standing = own.standing();
    let told = |it: &OwnStanding| matches!(it, OwnStanding::Waiting { why, .. } if why != "node attestation is under way");
    match &*timeout(PATIENCE, standing.wait_for(told)).await.expect("in time").unwrap() {
        OwnStanding::Waiting { why, .. } => why.clone(),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn kept(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("data/agent-data.json")).unwrap_or_default()
}

/// Whether an SVID or a bundle is kept; that it was tried may be.
pub(crate) fn has_kept(dir: &Path) -> bool {
    let kept = kept(dir);
    ["\"svid\":[", "\"bundle\":["].iter().any(|list| kept.contains(list))
}

#[tokio::test]
async fn a_token_is_used_once_and_what_it_brought_is_kept() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let dir = directory();
    let settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
    let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    assert_eq!(serving(&own).await, "spiffe://example.org/spire/agent/join_token/once");
    let made = std::fs::metadata(dir.path().join("data")).unwrap();
    assert_eq!(made.permissions().mode() & 0o7777, 0o700, "it was missing");
    assert!(matches!(
        opened(settings.clone(), Clock::SYSTEM),
        Err(DataFault::File(FileFault::Locked { .. }))
    ));
    running.abort();
    drop(running.await);

    // One that has let go of the directory leaves it to the next, and writes nothing there any more.
    own.let_go();
    let next = opened(settings.clone(), Clock::SYSTEM).unwrap();
    let before = kept(dir.path());
    let other = Bundle {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        x509_authorities: vec![vec![1]],
        jwt_authorities: Vec::new(),
    };
    own.learn(&other).await.unwrap_err();
    assert_eq!(kept(dir.path()), before);
    drop((own, next));

    // Without the server: it stands there at once.
    drop(server);
    let own = opened(settings, Clock::SYSTEM).unwrap();
    assert!(matches!(&*own.standing().borrow(), OwnStanding::Serving { .. }));
}

#[tokio::test]
async fn a_token_that_is_used_up_says_what_to_do() {
    let server = FakeSpireServer::start(Face::Right).await;
    let dir = directory();
    let own = opened(settings(dir.path(), server.address.port(), &server.ca.pem, "old"), Clock::SYSTEM);
    let own = own.unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    let why = trouble(&own).await;
    assert!(why.contains("already been used") && why.contains("spire-server token generate"), "{why}");
    assert!(!running.is_finished());
    assert!(!has_kept(dir.path()));
}

#[tokio::test]
async fn a_token_that_is_missing_is_asked_for() {
    let server = FakeSpireServer::start(Face::Right).await;
    let dir = directory();
    let own = opened(settings(dir.path(), server.address.port(), &server.ca.pem, ""), Clock::SYSTEM);
    let own = own.unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    let want = "a join token is needed (spire-server token generate, then -joinToken)";
    assert_eq!(trouble(&own).await, want);
    running.abort();
}

#[tokio::test]
async fn a_server_that_is_not_the_server_gets_no_token() {
    for (face, want) in [
        (Face::OtherId, "spiffe://example.org/somebody/else"),
        (Face::OtherCa, "signed by an unknown authority"),
        (Face::NoAlpn, "does not offer HTTP/2"),
        (Face::Says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak HTTP/2 as a SPIRE Server does"),
        (Face::Says(&[0; 64]), "does not speak HTTP/2 as a SPIRE Server does"),
        (Face::Says(b"220"), "closed the connection right after the handshake"),
        (Face::Web, "does not speak gRPC (HTTP status 200)"),
    ] {
        let server = FakeSpireServer::start(face).await;
        server.course().tokens.insert("secret".to_owned());
        let dir = directory();
        let settings = settings(dir.path(), server.address.port(), &server.ca.pem, "secret");
        let own = opened(settings, Clock::SYSTEM).unwrap();
        let running = tokio::spawn(Arc::clone(&own).run());
        let why = trouble(&own).await;
        assert!(why.contains(want), "{face:?}: {why}");
        assert!(why.contains(&server.address.port().to_string()), "{face:?}: {why}");
        // Each time the same, so that it is said once.
        let mut standing = own.standing();
        timeout(PATIENCE, standing.changed()).await.expect("in time").unwrap();
        assert_eq!(trouble(&own).await, why, "{face:?}");
        assert_eq!(server.course().attested, 0, "{face:?}");
        assert!(!has_kept(dir.path()), "{face:?}");
        running.abort();
    }
}

#[tokio::test]
async fn only_post_quantum_key_exchange_is_used_where_that_is_asked_for() {
    for (face, required, served) in [
        (Face::Classical, false, true),
        (Face::Classical, true, false),
        (Face::Nist, true, true),
        (Face::Nist, false, false),
        (Face::Right, true, true),
    ] {
        let server = FakeSpireServer::start(face).await;
        server.course().tokens.insert("once".to_owned());
        let dir = directory();
        let mut settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
        settings.sync.require_pq_kem = required;
        let own = opened(settings, Clock::SYSTEM).unwrap();
        let running = tokio::spawn(Arc::clone(&own).run());
        if served {
            assert!(serving(&own).await.ends_with("/once"), "{face:?}");
        } else {
            let why = trouble(&own).await;
            assert_eq!(why.contains("require_pq_kem"), required, "{face:?}: {why}");
            assert_eq!(server.course().attested, 0, "{face:?}");
        }
        running.abort();
    }
}

#[tokio::test]
async fn what_is_no_tls_is_told_so() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let answering = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            drop(stream.read(&mut [0; 16]).await);
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n<html></html>").await);
        }
    });
    let dir = directory();
    let pem = crate::spire_server::TestCa::new().pem.clone();
    let own = opened(settings(dir.path(), port, &pem, "token"), Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    let why = trouble(&own).await;
    assert!(why.contains("does not speak TLS"), "{why}");
    running.abort();
    answering.abort();
}

#[tokio::test]
async fn an_svid_that_was_not_asked_for_is_not_kept() {
    for (given, want) in [
        (Given::OtherKey, "for another key"),
        (Given::OtherTrustDomain, "not the ID of an agent of this trust domain"),
        (Given::NoAgent, "not the ID of an agent of this trust domain"),
        (Given::Expired, "has expired"),
        (Given::OtherCa, "unknown authority"),
    ] {
        let server = FakeSpireServer::start(Face::Right).await;
        server.course().tokens.insert("once".to_owned());
        server.course().given = given;
        let dir = directory();
        let settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
        let own = opened(settings, Clock::SYSTEM).unwrap();
        let running = tokio::spawn(Arc::clone(&own).run());
        let why = trouble(&own).await;
        assert!(why.contains(want), "{given:?}: {why}");
        assert!(!has_kept(dir.path()), "{given:?}");
        running.abort();
    }
}

#[tokio::test]
async fn it_is_renewed_and_what_is_renewed_is_kept() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    server.course().ttl = Duration::from_secs(14);
    let dir = directory();
    let settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
    let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    assert!(serving(&own).await.ends_with("/once"));
    server.course().ttl = Duration::from_secs(3600);
    let mut standing = own.standing();
    let renewed =
        |it: &OwnStanding| matches!(it, OwnStanding::Serving { id, .. } if id.path().ends_with("/renewed"));
    drop(timeout(PATIENCE, standing.wait_for(renewed)).await.expect("in time").unwrap());
    running.abort();
    drop(running.await);
    drop((own, standing));
    let own = opened(settings, Clock::SYSTEM).unwrap();
    assert!(serving(&own).await.ends_with("/renewed"));
}

#[tokio::test]
async fn a_banned_agent_ends_and_says_so() {
    const BANNED: i32 = 4;
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let dir = directory();
    let mut settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
    let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    serving(&own).await;
    server.course().denial = Some(BANNED);
    own.renew_at_once();
    let expelled = timeout(PATIENCE, running).await.expect("in time").unwrap();
    let evict = "spire-server agent evict -spiffeID spiffe://example.org/spire/agent/join_token/once";
    assert!(expelled.reason.contains("banned") && expelled.reason.contains(evict), "{expelled}");
    assert!(matches!(&*own.standing().borrow(), OwnStanding::Lost(Denial::Banned)));
    assert!(kept(dir.path()).contains("\"svid\":null"));

    // Whoever starts it again, and it waits for a token, is told the same: with the token that is used up, and without one.
    drop(own);
    for token in ["once", ""] {
        settings.join.join_token = token.to_owned().into();
        let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
        let running = tokio::spawn(Arc::clone(&own).run());
        let why = trouble(&own).await;
        assert!(why.contains("is banned at the server") && why.contains(evict), "{token:?}: {why}");
        running.abort();
        drop(running.await);
    }
    server.course().tokens.insert("other".to_owned());
    server.course().denial = None;
    settings.join.join_token = "other".to_owned().into();
    let own = opened(settings, Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    serving(&own).await;
    assert!(!kept(dir.path()).contains("banned"), "it is over");
    running.abort();
}

/// An agent of this server as a process.
pub(crate) fn write_config(dir: &Path, server: &FakeSpireServer, more: &str) {
    std::fs::write(dir.join("roots.pem"), &server.ca.pem).unwrap();
    let (at, port) = (dir.display(), server.address.port());
    let text = format!(
        "agent {{\n trust_domain = \"example.org\"\n server_address = \"localhost\"\n server_port = {port}\n\
         data_dir = \"{at}/data\"\n socket_path = \"{at}/api.sock\"\n log_level = \"info\"\n\
         experimental {{ sync_interval = \"500ms\" }}\n{more}\n}}\n\
         plugins {{\n NodeAttestor \"join_token\" {{ }}\n KeyManager \"disk\" {{ plugin_data {{ directory = \"{at}/data\" }} }}\n\
         WorkloadAttestor \"unix\" {{ }}\n}}\n"
    );
    std::fs::write(dir.join("agent.conf"), text).unwrap();
}

/// Waits until `is_so`, which `what` says.
pub(crate) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_late| panic!("waited in vain: {what}"));
}

#[tokio::test]
async fn an_evicted_agent_ends_with_an_exit_status_of_its_own() {
    const NOT_ATTESTED: i32 = 2;
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let dir = directory();
    let more = format!("trust_bundle_path = \"{}/roots.pem\"\n join_token = \"once\"", dir.path().display());
    write_config(dir.path(), &server, &more);
    let mut agent = Process::spawn(dir.path());
    until("attested", || kept(dir.path()).contains("\"svid\":[")).await;
    // One denial is no proof.
    server.course().denial = Some(NOT_ATTESTED);
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    until("asked once more", || log().contains("asking once more")).await;
    assert!(kept(dir.path()).contains("\"svid\":["), "nothing is deleted before it is certain");
    let told = "the agent has its SVID spiffe_id=spiffe://example.org/spire/agent/join_token/once ";
    assert_eq!(log().matches(told).count(), 1, "{}", log());
    until("the end", || agent.has_ended()).await;
    assert_eq!(agent.wait().code(), Some(5), "{}", log());
    assert!(log().contains("spire-server token generate"), "{}", log());
    assert!(kept(dir.path()).contains("\"svid\":null"));
    assert!(!dir.path().join("api.sock").exists());
}

#[tokio::test]
async fn a_banned_node_is_not_attested_for_ever() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().banned = true;
    let dir = directory();
    let own = opened(settings(dir.path(), server.address.port(), &server.ca.pem, "old"), Clock::SYSTEM);
    let expelled = timeout(PATIENCE, own.unwrap().run()).await.expect("in time");
    assert!(expelled.reason.contains("spire-server agent evict"), "{expelled}");
}

#[tokio::test]
async fn another_token_is_tried_as_soon_as_it_is_there() {
    let server = FakeSpireServer::start(Face::Right).await;
    let dir = directory();
    let mut settings = settings(dir.path(), server.address.port(), &server.ca.pem, "old");
    let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    trouble(&own).await;
    server.course().tokens.insert("other".to_owned());
    settings.join.join_token = "other".to_owned().into();
    own.reconfigure(&settings);
    assert_eq!(serving(&own).await, "spiffe://example.org/spire/agent/join_token/other");
    running.abort();
}

#[tokio::test]
async fn a_token_given_to_whoever_answers_is_not_lost_with_the_bundle() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    server.course().bundles_fail = 1;
    let dir = directory();
    let mut settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
    (settings.join.trust_bundle_path, settings.join.insecure_bootstrap) = (None, true);
    let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
    let running = tokio::spawn(Arc::clone(&own).run());
    let why = trouble(&own).await;
    assert!(why.contains("GetBundle"), "{why}");
    // Killed in between.
    running.abort();
    drop(running.await);
    drop(own);
    assert!(kept(dir.path()).contains("\"svid\":[") && kept(dir.path()).contains("\"bundle\":null"));
    let own = opened(settings, Clock::SYSTEM).unwrap();
    assert!(matches!(&*own.standing().borrow(), OwnStanding::Waiting { .. }), "nobody vouches for it yet");
    let running = tokio::spawn(Arc::clone(&own).run());
    assert_eq!(serving(&own).await, "spiffe://example.org/spire/agent/join_token/once");
    assert!(kept(dir.path()).contains("\"bundle\":["));
    running.abort();
}

/// What a join token brought cannot be had again: a start that finds it damaged changes nothing, and nor does the next.
#[tokio::test]
async fn damage_costs_nothing_that_a_backup_could_bring_back() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let dir = directory();
    let more = format!("trust_bundle_path = \"{}/roots.pem\"\n join_token = \"once\"", dir.path().display());
    write_config(dir.path(), &server, &more);
    let data = |name: &str| dir.path().join("data").join(name);
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    let agent = Process::spawn(dir.path());
    until("attested", || kept(dir.path()).contains("\"svid\":[")).await;
    drop(agent);
    for name in ["agent-data.json", "keys.json"] {
        let whole = std::fs::read(data(name)).unwrap();
        let other = data(if name == "keys.json" { "agent-data.json" } else { "keys.json" });
        let beside = std::fs::read(&other).unwrap();
        std::fs::write(data(name), &whole[..whole.len() / 2]).unwrap();
        for start in 0..3 {
            let config = dir.path().join("agent.conf");
            let validated = Command::new(DURWARD).args(["validate", "-config"]).arg(config).output().unwrap();
            let wrong = String::from_utf8(validated.stderr).unwrap();
            assert_eq!(validated.status.code(), Some(1), "{name}, start {start}: {wrong}");
            assert!(
                wrong.contains(name) && wrong.contains("from a backup"),
                "{name}, start {start}: {wrong}"
            );
            std::fs::write(dir.path().join("log"), "").unwrap();
            assert_eq!(Process::spawn(dir.path()).wait().code(), Some(1), "{name}, start {start}: {}", log());
            let kept = data(&format!("{name}.damaged"));
            assert!(
                log().contains(&format!("move {} away", kept.display())),
                "{name}, start {start}: {}",
                log()
            );
            assert_eq!(std::fs::read(&kept).unwrap(), whole[..whole.len() / 2], "{name}, start {start}");
            assert!(!data(name).exists(), "{name}, start {start}");
            assert_eq!(std::fs::read(&other).unwrap(), beside, "{name}, start {start}");
        }
        std::fs::write(data(name), &whole).unwrap();
        std::fs::set_permissions(data(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(dir.path().join("log"), "").unwrap();
        let agent = Process::spawn(dir.path());
        until("it is there again", || log().contains("the agent has its SVID")).await;
        drop(agent);
    }
    assert_eq!(server.course().attested, 1);
}

/// A node that can attest anew needs nobody for it.
#[tokio::test]
async fn damage_does_not_stop_a_node_that_attests_anew() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().reattestable = true;
    let dir = directory();
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["node".to_owned()]).unwrap().self_signed(&key).unwrap();
    let (at_key, at_certificate) = (dir.path().join("node.key"), dir.path().join("node.pem"));
    std::fs::write(&at_key, key.serialize_pem()).unwrap();
    std::fs::write(&at_certificate, certificate.pem()).unwrap();
    let mut settings = settings(dir.path(), server.address.port(), &server.ca.pem, "");
    settings.node_attestor = NodeAttestorSettings::X509Pop(X509PopSettings {
        private_key: Some(at_key),
        certificate: Some(at_certificate),
        ..X509PopSettings::default()
    });
    for (nth, damaged) in ["", "agent-data.json", "keys.json"].into_iter().enumerate() {
        let at = dir.path().join("data").join(damaged);
        if !damaged.is_empty() {
            std::fs::write(&at, "{").unwrap();
        }
        let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
        let running = tokio::spawn(Arc::clone(&own).run());
        assert_eq!(serving(&own).await, "spiffe://example.org/spire/agent/join_token/x509pop", "{damaged}");
        until("attested anew", || usize::try_from(server.course().attested).unwrap() == nth + 1).await;
        running.abort();
        drop(running.await);
        if !damaged.is_empty() {
            let aside = at.with_file_name(format!("{damaged}.damaged"));
            assert_eq!(std::fs::read_to_string(aside).unwrap(), "{", "{damaged}");
        }
    }

    // A node that was never here before is banned by a name that it can tell.
    server.course().banned = true;
    settings.data_dir = dir.path().join("other");
    settings.key_manager = KeyManagerSettings::Memory;
    let expelled = timeout(PATIENCE, opened(settings, Clock::SYSTEM).unwrap().run()).await.expect("in time");
    let evict = "spire-server agent evict -spiffeID spiffe://example.org/spire/agent/x509pop/";
    assert!(expelled.reason.contains(evict), "{expelled}");
}

/// As the README has it: the token is on the command line, and another one comes by a reload.
#[tokio::test]
async fn a_token_that_the_file_is_given_comes_before_that_of_the_command_line() {
    let server = FakeSpireServer::start(Face::Right).await;
    let dir = directory();
    let roots = format!("trust_bundle_path = \"{}/roots.pem\"", dir.path().display());
    let with = |token: &str| write_config(dir.path(), &server, &format!("{roots}\n {token}"));
    with("");
    let mut command = Command::new(DURWARD);
    command.arg("run").arg("-config").arg(dir.path().join("agent.conf")).args(["-joinToken", "mistyped"]);
    let agent = Process::of(command, &dir.path().join("log"));
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    until("refused", || log().contains("already been used")).await;
    server.course().tokens = ["mistyped", "other"].map(str::to_owned).into();
    with("join_token = \"other\"");
    agent.signal(Signal::SIGHUP);
    until("attested", || log().contains("spire/agent/join_token/other")).await;
    assert!(log().contains("agent.join_token") && server.course().tokens.contains("mistyped"), "{}", log());
}

/// What a start would wait for without end is a mistake.
#[tokio::test]
async fn a_certificate_and_a_key_that_do_not_fit_are_mistakes() {
    let server = FakeSpireServer::start(Face::Right).await;
    let dir = directory();
    write_config(dir.path(), &server, "insecure_bootstrap = true");
    let text = std::fs::read_to_string(dir.path().join("agent.conf")).unwrap();
    let pair = || {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["node".to_owned()]).unwrap();
        (key.serialize_pem(), certificate.self_signed(&key).unwrap().pem())
    };
    let ((key, certificate), (other, _)) = (pair(), pair());
    let at = |name: &str| dir.path().join(name);
    for (case, key, certificate, want) in [
        ("right", &key, &certificate, None),
        ("another key", &other, &certificate, Some("private_key_path")),
        ("swapped", &certificate, &key, Some("certificate_path")),
        ("an empty key", &String::new(), &certificate, Some("private_key_path")),
        ("an empty certificate", &key, &String::new(), Some("certificate_path")),
    ] {
        std::fs::write(at("node.key"), key).unwrap();
        std::fs::set_permissions(at("node.key"), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(at("node.pem"), certificate).unwrap();
        let (key, certificate) = (at("node.key"), at("node.pem"));
        let pop = format!(
            "NodeAttestor \"x509pop\" {{ plugin_data {{ private_key_path = \"{}\" certificate_path = \"{}\" }} }}",
            key.display(),
            certificate.display()
        );
        std::fs::write(at("agent.conf"), text.replace("NodeAttestor \"join_token\" { }", &pop)).unwrap();
        let got = Command::new(DURWARD).args(["validate", "-config"]).arg(at("agent.conf")).output().unwrap();
        let said = String::from_utf8(got.stderr).unwrap();
        assert_eq!(got.status.code(), Some(i32::from(want.is_some())), "{case}: {said}");
        assert!(want.is_none_or(|want| said.contains(want)), "{case}: {said}");
    }
}

#[tokio::test]
async fn what_is_not_used_of_the_disk_is_told_with_its_reason() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let dir = directory();
    let roots = format!("trust_bundle_path = \"{}/roots.pem\"", dir.path().display());
    write_config(dir.path(), &server, &format!("{roots}\n join_token = \"once\""));
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    let agent = Process::spawn(dir.path());
    until("attested", || kept(dir.path()).contains("\"svid\":[")).await;
    drop(agent);
    let data = |name: &str| dir.path().join("data").join(name);
    std::fs::rename(data("keys.json"), data("other")).unwrap();
    let agent = Process::spawn(dir.path());
    until("told", || log().contains("reason=\"its key is missing\"")).await;
    drop(agent);
    std::os::unix::fs::symlink("other", data("keys.json")).unwrap_or_else(|_there| {
        std::fs::remove_file(data("keys.json")).unwrap();
        std::os::unix::fs::symlink("other", data("keys.json")).unwrap();
    });
    assert_eq!(Process::spawn(dir.path()).wait().code(), Some(1), "{}", log());
    assert!(log().contains("keys.json is a symbolic link, which is not followed"), "{}", log());
}
