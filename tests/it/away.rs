//! What an agent of a SPIRE Server serves while the server is gone, and what it never does: give what was not meant, or take the
//! data of another trust domain.

use std::{
    fs::Permissions,
    io::{Read as _, Write as _},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    process::Command,
    time::Duration,
};

use durward::{
    api::proto::workload as pb,
    identity::TrustDomain,
    issuer::server::{DataFault, proto::types},
    os::clock::Clock,
};
use tokio::{sync::watch, time::timeout};
use tonic::Code;
use x509_parser::public_key::PublicKey;

use crate::{
    joining::{PATIENCE, directory, kept, opened, serving, settings, until},
    outages::{Line, configure, gives, line_to, log, server_and_config},
    spire_server::{Face, FakeSpireServer, TestCa, entry},
    support::{Process, client, request},
};

const DURWARD: &str = env!("CARGO_BIN_EXE_durward");

/// A token for this audience.
async fn token(socket: &Path, audience: &str) -> Result<String, Code> {
    let asked = pb::JwtsvidRequest { audience: vec![audience.to_owned()], spiffe_id: String::new() };
    let answer = client(socket).await.fetch_jwtsvid(request(asked)).await;
    Ok(answer.map_err(|status| status.code())?.into_inner().svids.remove(0).svid)
}

/// Whether a probe finds it well.
fn is_well(dir: &Path, path: &str) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(dir.join("health.sock"))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().unwrap().starts_with("HTTP/1.1 200")
}

/// What this command says on the admin socket.
fn told(dir: &Path, words: &[&str]) -> serde_json::Value {
    let mut command = Command::new(DURWARD);
    command.args(words).args(["-output", "json", "-socketPath"]).arg(dir.join("admin.sock"));
    let said = tokio::task::block_in_place(|| command.output()).unwrap();
    serde_json::from_slice(&said.stdout).unwrap_or_default()
}

/// What `durward status` says of the server.
fn of_server(dir: &Path) -> serde_json::Value {
    told(dir, &["status"])["server"].take()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_server_an_agent_serves_what_it_has_and_says_how_it_is() {
    let (dir, admin) = (directory(), directory());
    let (at, admin) = (dir.path(), admin.path());
    let socket = format!("admin_socket_path = \"{}/admin.sock\"", admin.display());
    let server = server_and_config(at, &socket).await;
    let probes = format!("health_checks {{ socket_path = \"{}/health.sock\" }}\n", at.display());
    let text = std::fs::read_to_string(at.join("agent.conf")).unwrap();
    std::fs::write(at.join("agent.conf"), text + &probes).unwrap();
    server.course().entries = vec![entry("web")];
    let mut agent = Process::spawn(at);
    let socket = at.join("api.sock");
    drop(agent.serving(at).await);
    gives(&socket, &["web"]).await;
    let known = token(&socket, "known").await.unwrap();
    let stream = client(&socket).await.fetch_x509svid(request(pb::X509svidRequest {})).await;
    let mut stream = stream.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1);
    assert_eq!(of_server(admin)["last_error"], serde_json::Value::Null);
    let explained = told(admin, &["explain", "-pid", &std::process::id().to_string()]);
    assert_eq!(explained["matches"][0]["entry_id"], "web", "{explained}");

    // A server that is reached, and answers with errors.
    server.course().bundles_fail = u32::MAX;
    until("it says so", || of_server(admin)["last_error"].is_string()).await;
    let status = told(admin, &["status"]);
    let why = status["server"]["last_error"].as_str().unwrap();
    assert!(why.starts_with("cannot sync with the server: ") && status["server"]["failing_since"].is_i64());
    assert!(status["wrong"].to_string().contains(why), "{status}");
    server.course().bundles_fail = 0;
    until("it is over", || of_server(admin)["last_error"].is_null()).await;

    drop(server);
    until("it says so", || of_server(admin)["last_error"].is_string()).await;
    assert!(is_well(at, "/live"));
    gives(&socket, &["web"]).await;
    assert_eq!(token(&socket, "known").await, Ok(known), "it is valid still");
    // Nothing is served instead of what cannot be had, and nobody is kept waiting for ever.
    let new = timeout(PATIENCE, token(&socket, "new")).await.expect("in time");
    assert_eq!(new, Err(Code::Unavailable));
    let nothing = timeout(Duration::from_millis(1), stream.message()).await;
    assert!(nothing.is_err(), "a stream stays, and is told nothing: {nothing:?}");
    drop(agent);

    // With its own SVID on the disk the next one is there all the same. It knows nobody yet, and denies nobody.
    let mut agent = Process::spawn(at);
    agent.serving(at).await;
    until("it says what it waits for", || of_server(admin)["last_error"].is_string()).await;
    assert!(of_server(admin)["agent_id"].is_string(), "{}", of_server(admin));
    assert_eq!(token(&socket, "known").await, Err(Code::Unavailable));
    // No command takes what is not known yet for what there is not.
    let pid = std::process::id().to_string();
    for words in [vec!["entry", "show"], vec!["bundle", "show"], vec!["explain", "--pid", &pid]] {
        let mut command = Command::new(DURWARD);
        command.args(&words).arg("--socket-path").arg(admin.join("admin.sock"));
        let said = tokio::task::block_in_place(|| command.output()).unwrap();
        let [out, err] = [said.stdout, said.stderr].map(|text| String::from_utf8(text).unwrap());
        let all = out.split_whitespace().chain(err.split_whitespace()).collect::<Vec<_>>().join(" ");
        let why = "entries and bundles are not known yet, since the SPIRE Server";
        assert!(all.contains(why) && !all.contains("has no identity"), "{words:?}: {all}");
        assert_eq!(said.status.code(), Some(4), "{words:?}: {all}");
    }
    assert!(is_well(at, "/live"));
    assert!(!agent.has_ended());
}

/// An outage that is longer than the agent's SVID is valid, after which its token is used up.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_svid_has_ended_says_so_and_serves_what_it_has() {
    let (dir, admin) = (directory(), directory());
    let (at, admin) = (dir.path(), admin.path());
    let mut server = FakeSpireServer::start(Face::Right).await;
    let line = watch::Sender::new(Line::Good);
    server.address = line_to(server.address, line.subscribe()).await;
    configure(&server, at, &format!("admin_socket_path = \"{}/admin.sock\"", admin.display()));
    server.course().entries = vec![entry("web")];
    server.course().ttl = Duration::from_secs(14);
    let _agent = Process::spawn(at);
    let socket = at.join("api.sock");
    gives(&socket, &["web"]).await;
    assert!(log(at).contains("the server has told its entries entries=1 bundles=1"), "{}", log(at));
    line.send_replace(Line::Cut);
    until("it has ended", || log(at).contains("no valid SVID of its own any more")).await;
    gives(&socket, &["web"]).await;
    let told = of_server(admin);
    assert!(told["agent_id"].is_string() && told["waits_for"].is_string(), "{told}");
    assert!(told["agent_svid_ends"].as_i64().unwrap() <= told["waits_since"].as_i64().unwrap() + 1, "{told}");
    assert_eq!(token(&socket, "new").await, Err(Code::Unavailable));
    line.send_replace(Line::Good);
    until("it needs a token", || log(at).contains("already been used")).await;
    gives(&socket, &["web"]).await;
    assert!(!log(at).contains("nobody is served"), "somebody is: {}", log(at));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_is_served_as_it_asks_to_be() {
    let dir = directory();
    let server = server_and_config(dir.path(), "workload_x509_svid_key_type = \"rsa-2048\"").await;
    let stored = types::Entry { store_svid: true, ..entry("stored") };
    let anew = types::entry::AdditionalAttributes { jwt_svid_include_jti: true, ..Default::default() };
    server.course().entries = vec![entry("web"), stored];
    let _agent = Process::spawn(dir.path());
    let socket = dir.path().join("api.sock");
    gives(&socket, &["web"]).await;

    let svids = client(&socket).await.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let svid = svids.into_inner().message().await.unwrap().unwrap().svids.remove(0);
    let (_, leaf) = x509_parser::parse_x509_certificate(&svid.x509_svid).unwrap();
    assert!(matches!(leaf.public_key().parsed().unwrap(), PublicKey::RSA(key) if key.key_size() == 2048));

    for times in [1, 1] {
        token(&socket, "them").await.unwrap();
        assert_eq!(server.course().signed, times, "one that is kept");
    }
    server.course().entries =
        vec![types::Entry { additional_attributes: Some(anew), revision_number: 2, ..entry("anew") }];
    gives(&socket, &["anew"]).await;
    for times in [2, 3] {
        token(&socket, "them").await.unwrap();
        assert_eq!(server.course().signed, times, "each is one of its own");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spire_agents_command_line_joins_a_server() {
    let dir = directory();
    let (server, at) = (FakeSpireServer::start(Face::Right).await, dir.path());
    server.course().tokens.insert("once".to_owned());
    server.course().entries = vec![entry("web")];
    std::fs::write(at.join("roots.pem"), &server.ca.pem).unwrap();
    std::fs::write(
        at.join("agent.conf"),
        "plugins {\n NodeAttestor \"join_token\" { }\n KeyManager \"memory\" { }\n WorkloadAttestor \"unix\" { }\n}\n",
    )
    .unwrap();
    let mut command = Command::new(DURWARD);
    command.args(["run", "-config"]).arg(at.join("agent.conf"));
    command.args(["-serverAddress", "localhost", "-serverPort", &server.address.port().to_string()]);
    command.args([
        "-trustDomain",
        "example.org",
        "-joinToken",
        "once",
        "-disableSDSAPI",
        "-logLevel",
        "INFO",
    ]);
    command.arg("-trustBundle").arg(at.join("roots.pem"));
    command.arg("-dataDir").arg(at.join("data")).arg("-socketPath").arg(at.join("api.sock"));
    let _agent = Process::of(command, &at.join("log"));
    gives(&at.join("api.sock"), &["web"]).await;

    // Its KeyManager keeps nothing for the next start, which is told by both.
    let mut command = Command::new(DURWARD);
    command
        .args(["validate", "-config"])
        .arg(at.join("agent.conf"))
        .arg("-trustBundle")
        .arg(at.join("roots.pem"));
    command.args([
        "-serverAddress",
        "a",
        "-serverPort",
        "1",
        "-trustDomain",
        "example.org",
        "-joinToken",
        "x",
    ]);
    let validated = tokio::task::block_in_place(|| command.output()).unwrap();
    let validated = String::from_utf8(validated.stderr).unwrap();
    for said in [log(at), validated] {
        assert_eq!(said.matches("after a restart this node needs another token").count(), 1, "{said}");
    }
}

#[tokio::test]
async fn the_data_of_another_trust_domain_is_left_as_it_is() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let dir = directory();
    let settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
    let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
    let running = tokio::spawn(std::sync::Arc::clone(&own).run());
    serving(&own).await;
    running.abort();
    drop((running.await, own));

    let before = kept(dir.path());
    let trust_domain = TrustDomain::parse("other.org").unwrap();
    let refused = opened(durward::issuer::server::ServerSettings { trust_domain, ..settings }, Clock::SYSTEM);
    let Err(error @ DataFault::TrustDomain { .. }) = refused else { panic!("{refused:?}") };
    let said = error.to_string();
    assert!(["agent-data.json", "example.org", "other.org"].iter().all(|word| said.contains(word)), "{said}");
    assert_eq!(kept(dir.path()), before);
}

#[test]
fn validate_warns_of_what_a_node_would_learn_too_late() {
    let dir = directory();
    let at = dir.path().display();
    for (file, mode) in [("roots.pem", 0o644), ("token", 0o644), ("node.key", 0o644), ("closed.key", 0o640)] {
        let path = dir.path().join(file);
        std::fs::write(&path, if file == "roots.pem" { TestCa::new().pem.clone() } else { "x".to_owned() })
            .unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
    }
    let pop = |key: &str| {
        format!(
            "NodeAttestor \"x509pop\" {{ plugin_data {{ private_key_path = \"{at}/{key}\" certificate_path = \"{at}/none.pem\" \
             intermediates_path = \"{at}/more.pem\" }} }}"
        )
    };
    let token = "NodeAttestor \"join_token\" { }".to_owned();
    for (agent, attestor, wanted, unwanted) in [
        (
            format!("join_token_file = \"{at}/token\" rebootstrap_mode = \"auto\""),
            token,
            vec!["token has mode 0644", "agent.rebootstrap_mode: \"auto\" does nothing here"],
            "more.pem",
        ),
        (
            "rebootstrap_mode = \"auto\"".to_owned(),
            pop("node.key"),
            vec!["node.key has mode 0644", "none.pem", "more.pem"],
            "does nothing here",
        ),
        ("rebootstrap_mode = \"always\"".to_owned(), pop("closed.key"), vec!["more.pem"], "has mode"),
    ] {
        let text = format!(
            "agent {{ trust_domain = \"example.org\" server_address = \"a\" server_port = 1 data_dir = \"{at}/data\"\n\
             socket_path = \"{at}/api.sock\" trust_bundle_path = \"{at}/roots.pem\" {agent} }}\n\
             plugins {{ {attestor} KeyManager \"memory\" {{ }} WorkloadAttestor \"unix\" {{ }} }}"
        );
        std::fs::write(dir.path().join("agent.conf"), text).unwrap();
        let mut command = Command::new(DURWARD);
        let said = command.args(["validate", "-config"]).arg(dir.path().join("agent.conf")).output().unwrap();
        let said = String::from_utf8(said.stderr).unwrap();
        let words = said.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            wanted.iter().all(|want| words.contains(want)) && !words.contains(unwanted),
            "{agent}: {said}"
        );
    }
}
