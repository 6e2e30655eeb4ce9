//! What workloads of an agent of a SPIRE Server can take from each other: its signatures, and its time.

use std::{
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use durward::api::proto::workload as pb;
use nix::unistd::geteuid;

use crate::{
    hostile::NEIGHBOUR,
    joining::{directory, write_config},
    spire_server::{Face, FakeSpireServer, entry, entry_of},
    support::{Process, client, request},
};

/// The most tokens a second, and how many more at a moment: what the agent has places for.
const A_SECOND: u32 = 427;
const AT_ONCE: u32 = 64;

async fn joined(dir: &Path) -> (FakeSpireServer, Process) {
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    server.course().entries = vec![entry("web"), entry_of("neighbour", NEIGHBOUR)];
    let roots = format!("trust_bundle_path = \"{}/roots.pem\"\n join_token = \"once\"", dir.display());
    write_config(dir, &server, &roots);
    (server, Process::spawn(dir))
}

/// Asks for a new audience in every call, so many at a time, for ever.
async fn asks_without_end(socket: PathBuf, at_once: usize, name: usize) {
    let client = client(&socket).await;
    let asking = (0..at_once).map(|nth| {
        let mut client = client.clone();
        async move {
            for number in 0.. {
                let audience = vec![format!("{name}-{nth}-{number}")];
                let asked = pb::JwtsvidRequest { audience, spiffe_id: String::new() };
                if client.fetch_jwtsvid(request(asked)).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
    });
    futures_util::future::join_all(asking).await;
}

/// A token for an audience that nobody has asked for, of the neighbour where the test may be that.
fn asks_once(socket: &Path, audience: &str) -> (bool, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
    command
        .args(["api", "fetch", "jwt", "-audience", audience, "-timeout", "30s"])
        .env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", socket.display()))
        .current_dir("/")
        .stdin(Stdio::null());
    if geteuid().is_root() {
        command.uid(NEIGHBOUR).gid(NEIGHBOUR);
    }
    let out = command.output().unwrap();
    (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_a_new_audience_each_time_leaves_others_their_share_and_the_server_its_peace() {
    let dir = directory();
    let (server, mut agent) = joined(dir.path()).await;
    drop(agent.serving(dir.path()).await);
    let socket = dir.path().join("api.sock");
    let first = asks_once(&socket, "first");
    assert!(first.0 || !geteuid().is_root(), "{first:?}");
    let (began, before) = (Instant::now(), server.course().signed);
    let greedy: Vec<_> =
        (0..4).map(|name| tokio::spawn(asks_without_end(socket.clone(), 60, name))).collect();
    while server.course().signed < before + 100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    if geteuid().is_root() {
        for nth in 0..10 {
            let socket = socket.clone();
            let polite = move || asks_once(&socket, &format!("polite-{nth}"));
            let (is_served, said) = tokio::task::spawn_blocking(polite).await.unwrap();
            assert!(is_served, "{nth}: {said}");
        }
    } else {
        println!("left out: another user, which only root can be");
    }
    greedy.iter().for_each(tokio::task::JoinHandle::abort);
    let seconds = u32::try_from(began.elapsed().as_secs()).unwrap() + 1;
    let course = server.course();
    println!("{} tokens in {seconds} s, {} at once", course.signed - before, course.most_signing);
    assert!(
        course.signed - before <= A_SECOND * seconds + AT_ONCE,
        "{} in {seconds} s",
        course.signed - before
    );
    assert!(course.most_signing <= AT_ONCE, "{}", course.most_signing);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_trust_domain_says_of_itself_holds_up_nobody() {
    let dir = directory();
    let (server, mut agent) = joined(dir.path()).await;
    let mut federated = entry("federated");
    federated.federates_with = ["good.org", "huge.org", "large.org", "none.org"].map(str::to_owned).to_vec();
    server.course().entries = vec![federated];
    let mut client = agent.serving(dir.path()).await;
    let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let answer = stream.into_inner().message().await.unwrap().unwrap();
    let with: Vec<&String> = answer.federated_bundles.keys().collect();
    assert_eq!(with, ["spiffe://good.org"]);
    // The server is asked as often as before, each half second, and not ever less often.
    let before = server.course().syncs;
    let began = Instant::now();
    while server.course().syncs < before + 20 {
        assert!(began.elapsed() < crate::joining::PATIENCE, "{} syncs", server.course().syncs - before);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    for trust_domain in ["huge.org", "large.org", "none.org"] {
        let told =
            log.lines().filter(|line| line.contains("trust_domain") && line.contains(trust_domain)).count();
        assert_eq!(told, 1, "{trust_domain} in {log}");
    }
}
