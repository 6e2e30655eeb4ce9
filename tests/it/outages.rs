//! What an agent makes of a SPIRE Server that fails it, and of a node that does: what it has is served, and nothing is lost.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    time::{Duration, Instant},
};

use durward::{
    agent::Running,
    api::proto::workload as pb,
    config::{Config, ExpandEnv},
    issuer::server::{OwnStanding, proto::types},
    os::clock::Clock,
};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
    sync::watch,
    time::timeout,
};
use tonic::Code;

use crate::{
    joining::{PATIENCE, directory, kept, opened, serving, settings, trouble, until, write_config},
    spire_server::{Face, FakeSpireServer, Manner, TestCa, entry},
    support::{Process, client, request},
};

/// A server that knows a token, and an agent's configuration with it.
pub(crate) async fn server_and_config(dir: &Path, more: &str) -> FakeSpireServer {
    let server = FakeSpireServer::start(Face::Right).await;
    configure(&server, dir, more);
    server
}

pub(crate) fn configure(server: &FakeSpireServer, dir: &Path, more: &str) {
    server.course().tokens.insert("once".to_owned());
    let roots =
        format!("trust_bundle_path = \"{}/roots.pem\"\n join_token = \"once\"\n {more}", dir.display());
    write_config(dir, server, &roots);
}

fn start(dir: &Path) -> Running {
    let config = Config::load(&dir.join("agent.conf"), ExpandEnv::No).unwrap();
    Running::start(config, None, Clock::SYSTEM).unwrap()
}

async fn ids(socket: &Path) -> Result<BTreeSet<String>, Code> {
    let stream = client(socket).await.fetch_x509svid(request(pb::X509svidRequest {})).await;
    let answer = stream.map_err(|status| status.code())?.into_inner().message().await;
    let answer = answer.map_err(|status| status.code())?.expect("a message");
    Ok(answer.svids.into_iter().map(|svid| svid.spiffe_id).collect())
}

/// Waits until the socket gives these.
pub(crate) async fn gives(socket: &Path, names: &[&str]) {
    let want: BTreeSet<String> = names.iter().map(|name| format!("spiffe://example.org/{name}")).collect();
    let waiting = async {
        // One that was killed leaves a socket at which nobody answers.
        while UnixStream::connect(socket).await.is_err() || ids(socket).await.as_ref() != Ok(&want) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_late| panic!("waited in vain for {want:?}"));
}

pub(crate) fn log(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("log")).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_waits_for_its_entry_and_no_longer_than_is_set() {
    let dir = directory();
    let server = server_and_config(dir.path(), "entry_wait = \"3s\"").await;
    let agent = start(dir.path());
    let socket = dir.path().join("api.sock");
    until("synced", || server.course().syncs > 0).await;
    assert_eq!(ids(&socket).await, Err(Code::PermissionDenied), "nobody's");
    let waits = tokio::spawn({
        let socket = socket.clone();
        async move { ids(&socket).await }
    });
    let before = server.course().syncs;
    until("asked for", || server.course().syncs > before).await;
    server.course().entries.push(entry("web"));
    let got = timeout(PATIENCE, waits).await.expect("in time").unwrap();
    assert_eq!(got, Ok(BTreeSet::from(["spiffe://example.org/web".to_owned()])));
    agent.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_may_not_wait_is_refused_by_what_is_known() {
    let dir = directory();
    let server = server_and_config(dir.path(), "entry_wait = \"0s\"").await;
    let agent = start(dir.path());
    let socket = dir.path().join("api.sock");
    server.course().entries.push(entry("web"));
    gives(&socket, &["web"]).await;
    server.course().entries.clear();
    until("removed", || agent.metrics().render().contains("\ndurward_entries 0")).await;
    for _ in 0..3 {
        assert_eq!(ids(&socket).await, Err(Code::PermissionDenied));
    }
    agent.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_server_has_is_followed_also_where_its_revisions_go_back() {
    let dir = directory();
    let server = server_and_config(dir.path(), "").await;
    let mut first = entry("web");
    first.revision_number = 7;
    server.course().entries = vec![first];
    let agent = start(dir.path());
    let socket = dir.path().join("api.sock");
    gives(&socket, &["web"]).await;
    // As after a restore from a backup.
    let mut older = entry("web");
    older.revision_number = 3;
    older.spiffe_id.as_mut().unwrap().path = "/older".to_owned();
    let nobody = types::Entry { spiffe_id: None, ..entry("nobody") };
    server.course().entries = vec![older, nobody];
    gives(&socket, &["older"]).await;
    server.course().entries = Vec::new();
    until("removed", || agent.metrics().render().contains("\ndurward_entries 0")).await;

    // And it is told how that went.
    let text = agent.metrics().render();
    let value = |series: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{series} in:\n{text}")).parse().unwrap()
    };
    for (series, at_least) in [
        ("durward_server_calls_total{method=\"SyncAuthorizedEntries\",code=\"OK\"}", 3.0),
        ("durward_server_malformed_entries_total", 1.0),
        ("durward_server_calls_total{method=\"AttestAgent\",code=\"OK\"}", 1.0),
        ("durward_server_calls_total{method=\"BatchNewX509SVID\",code=\"OK\"}", 2.0),
        ("durward_server_sync_duration_seconds_count{result=\"ok\"}", 3.0),
        ("durward_agent_svid_left_seconds", 60.0),
        ("durward_server_sync_age_seconds", 0.0),
    ] {
        assert!(value(series) >= at_least, "{series}: {}", value(series));
    }
    agent.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn goodbyes_of_the_server_are_seen_by_nobody() {
    let dir = directory();
    let server = FakeSpireServer::start_for(Face::Right, TestCa::new(), Duration::from_millis(700)).await;
    configure(&server, dir.path(), "");
    server.course().entries.push(entry("web"));
    let _agent = Process::spawn(dir.path());
    gives(&dir.path().join("api.sock"), &["web"]).await;
    // A start that goes well warns of nothing.
    assert!(!log(dir.path()).contains("WARN durward::agent::probe"), "{}", log(dir.path()));
    let before = server.course().syncs;
    until("ten syncs over several connections", || server.course().syncs >= before + 10).await;
    assert!(!log(dir.path()).contains("cannot sync"), "{}", log(dir.path()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_without_bounds_costs_nothing_and_changes_nothing() {
    let dir = directory();
    let server = server_and_config(dir.path(), "").await;
    server.course().entries.push(entry("web"));
    let agent = Process::spawn(dir.path());
    let socket = dir.path().join("api.sock");
    gives(&socket, &["web"]).await;
    let before = agent.memory("VmHWM");
    server.course().manner = Manner::Huge;
    until("refused", || log(dir.path()).contains("cannot sync")).await;
    gives(&socket, &["web"]).await;
    let grown = agent.memory("VmHWM").saturating_sub(before);
    assert!(grown < 20 * 1024, "{grown} KiB for an answer of 100 MiB");
    server.course().manner = Manner::Right;
    server.course().entries = vec![entry("other")];
    gives(&socket, &["other"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lasts_is_said_once_and_that_it_is_over() {
    const TROUBLE: &str = "cannot get new x509-svids";
    let dir = directory();
    let server = server_and_config(dir.path(), "").await;
    server.course().signs_nothing = true;
    server.course().entries.push(entry("web"));
    let _agent = Process::spawn(dir.path());
    until("said", || log(dir.path()).contains(TROUBLE)).await;
    let before = server.course().asked_in_vain;
    until("asked again and again", || server.course().asked_in_vain > before).await;
    server.course().signs_nothing = false;
    until("over", || log(dir.path()).contains("there are new x509-svids again")).await;
    assert_eq!(log(dir.path()).matches(TROUBLE).count(), 1, "{}", log(dir.path()));
}

/// Every call has its deadline. These take half a minute, both at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_comes_to_an_end_holds_up_nobody() {
    let one = async |manner| {
        let dir = directory();
        let server = server_and_config(dir.path(), "").await;
        server.course().entries.push(entry("web"));
        let _agent = Process::spawn(dir.path());
        let socket = dir.path().join("api.sock");
        gives(&socket, &["web"]).await;
        server.course().manner = manner;
        until("given up", || log(dir.path()).contains("cannot sync")).await;
        assert!(log(dir.path()).contains("in time"), "{manner:?}: {}", log(dir.path()));
        gives(&socket, &["web"]).await;
        server.course().manner = Manner::Right;
        server.course().entries.push(entry("other"));
        gives(&socket, &["other", "web"]).await;
    };
    tokio::join!(one(Manner::Silent), one(Manner::Endless));
}

/// What lies between the agent and its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    Good,
    /// Each piece comes late.
    Slow,
    /// What is said ends the connection.
    Cut,
    /// A byte of each piece is another.
    Garbled,
    /// Nothing comes, and nothing ends.
    Held,
}

/// Takes what comes from one end to the other, as the line is at the time.
async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut line: watch::Receiver<Line>,
) -> std::io::Result<()> {
    let mut piece = [0; 4096];
    loop {
        let len = from.read(&mut piece).await?;
        let as_it_is = *line.borrow();
        match as_it_is {
            _ if len == 0 => return to.shutdown().await,
            Line::Good => {}
            Line::Slow => tokio::time::sleep(Duration::from_millis(200)).await,
            Line::Cut => return Ok(()),
            Line::Garbled => piece[len / 2] ^= 0x55,
            Line::Held => drop(line.wait_for(|line| *line != Line::Held).await),
        }
        to.write_all(&piece[..len]).await?;
    }
}

/// A line to `server`: the address at which it begins.
pub(crate) async fn line_to(server: SocketAddr, line: watch::Receiver<Line>) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(tokio::spawn(async move {
        while let Ok((agent, _)) = listener.accept().await {
            let line = line.clone();
            drop(tokio::spawn(async move {
                let Ok(server) = TcpStream::connect(server).await else { return };
                let ((hears, says), (answers, asks)) = (agent.into_split(), server.into_split());
                // Where one way ends so does the other.
                tokio::select! {
                    _ended = carry(hears, asks, line.clone()) => {}
                    _ended = carry(answers, says, line) => {}
                }
            }));
        }
    }));
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_cuts_delays_or_garbles_takes_nothing_from_anybody() {
    let dir = directory();
    let mut server = FakeSpireServer::start(Face::Right).await;
    let line = watch::Sender::new(Line::Good);
    server.address = line_to(server.address, line.subscribe()).await;
    configure(&server, dir.path(), "");
    server.course().entries.push(entry("web"));
    let agent = start(dir.path());
    let socket = dir.path().join("api.sock");
    gives(&socket, &["web"]).await;
    let mut names = vec!["web".to_owned()];
    for bad in [Line::Slow, Line::Cut, Line::Garbled, Line::Held] {
        line.send_replace(bad);
        let want = names.iter().map(|name| format!("spiffe://example.org/{name}")).collect();
        let began = Instant::now();
        // Some syncs long.
        while began.elapsed() < Duration::from_secs(2) {
            let got = timeout(PATIENCE, ids(&socket)).await.expect("nobody waits for the server");
            assert_eq!(got.as_ref(), Ok(&want), "{bad:?}");
        }
        line.send_replace(Line::Good);
        let name = format!("after-{bad:?}");
        server.course().entries.push(entry(&name));
        names.push(name);
        gives(&socket, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
    }
    assert_eq!(server.course().attested, 1, "it is the same agent throughout");
    agent.shutdown().await;
}

/// The same name has two addresses; at one of them nobody answers, not even with a refusal.
#[tokio::test]
async fn a_dead_address_is_passed_by() {
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let port = server.address.port();
    let Ok(deaf) = std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, port)) else {
        println!("skipped: there is no ::1 here");
        return;
    };
    // Its queue is full: whoever comes then is not answered at all.
    nix::sys::socket::listen(&deaf, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let mut waiting = Vec::new();
    while let Ok(Ok(stream)) =
        timeout(Duration::from_millis(300), TcpStream::connect((Ipv6Addr::LOCALHOST, port))).await
    {
        waiting.push(stream);
        assert!(waiting.len() < 64, "the queue is never full");
    }
    let dir = directory();
    let settings = settings(dir.path(), port, &server.ca.pem, "once");
    let own = opened(settings, Clock::SYSTEM).unwrap();
    let running = tokio::spawn(std::sync::Arc::clone(&own).run());
    assert!(serving(&own).await.ends_with("/once"));
    running.abort();
}

/// A disk that has no room when the token is used up.
#[tokio::test]
async fn what_a_token_brought_is_in_use_and_written_as_soon_as_there_is_room() {
    let dir = directory();
    let data = dir.path().join("data");
    std::fs::create_dir(&data).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k,mode=0700", "none"])
        .arg(&data)
        .stderr(std::process::Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("skipped: only root can mount a small disk");
        return;
    }
    let _unmounted = Unmount(&data);
    let server = FakeSpireServer::start(Face::Right).await;
    server.course().tokens.insert("once".to_owned());
    let settings = settings(dir.path(), server.address.port(), &server.ca.pem, "once");
    // Not even room for a key: then the token is not spent.
    let filler = data.join("filler");
    let fill = |most: usize| drop(std::fs::write(&filler, vec![1; most]));
    let own = opened(settings.clone(), Clock::SYSTEM).unwrap();
    fill(1 << 20);
    let running = tokio::spawn(std::sync::Arc::clone(&own).run());
    let why = trouble(&own).await;
    assert!(why.contains("keys.json"), "{why}");
    assert!(server.course().tokens.contains("once"), "the token is not spent");
    // Room for that, and not for more: a page of keys.json.tmp is all.
    let left = |pages: usize| {
        fill(1 << 20);
        let len = usize::try_from(std::fs::metadata(&filler).unwrap().len()).unwrap();
        std::fs::File::options()
            .write(true)
            .open(&filler)
            .unwrap()
            .set_len(u64::try_from(len - pages * 4096).unwrap())
            .unwrap();
    };
    left(1);
    assert!(serving(&own).await.ends_with("/once"));
    assert_eq!(kept(dir.path()), "", "there is no room");
    let OwnStanding::Serving { trouble, .. } = own.standing().borrow().clone() else { panic!("it serves") };
    assert!(trouble.is_some_and(|why| why.contains("agent-data.json")), "it is told");
    std::fs::remove_file(&filler).unwrap();
    until("written", || kept(dir.path()).contains("\"svid\":[")).await;
    running.abort();
    drop(running.await);
    drop(own);
    let own = opened(settings, Clock::SYSTEM).unwrap();
    assert!(matches!(&*own.standing().borrow(), OwnStanding::Serving { .. }));
}

struct Unmount<'a>(&'a Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        drop(std::process::Command::new("umount").arg("-l").arg(self.0).status());
    }
}

/// Killed again and again, at moments spread over attesting, renewing and writing. Whatever was left behind, the next start
/// serves, and needs no other token: only an answer that was under way when the agent was killed is lost with it.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_cost_no_token() {
    let mut lost = 0;
    // Ten kills in each round.
    #[expect(clippy::disallowed_methods, reason = "a longer run is asked for by the environment")]
    let rounds = std::env::var("DURWARD_KILL_ROUNDS").map_or(5_u64, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let dir = directory();
        let server = server_and_config(dir.path(), "").await;
        server.course().entries.push(entry("web"));
        // Renewed within two seconds of its making, and valid for ten more.
        server.course().ttl = Duration::from_secs(12);
        for nth in 0..10_u64 {
            let mut agent = Process::spawn(dir.path());
            if nth == 9 {
                gives(&dir.path().join("api.sock"), &["web"]).await;
            }
            // From before the first byte is written to after a renewal.
            let moment = if nth < 4 { 20 * nth + 4 * (round % 10) } else { (nth * 397 + round * 131) % 1500 };
            tokio::time::sleep(Duration::from_millis(moment)).await;
            agent.signal(Signal::SIGKILL);
            agent.wait();
            let is_spent = server.course().tokens.is_empty();
            if is_spent && !kept(dir.path()).contains("\"svid\":[") {
                lost += 1;
                server.course().tokens.insert("once".to_owned());
            }
        }
        let mut agent = Process::spawn(dir.path());
        gives(&dir.path().join("api.sock"), &["web"]).await;
        assert!(server.course().attested <= 1 + lost, "{}", server.course().attested);
        agent.signal(Signal::SIGTERM);
        assert!(agent.wait().success());
    }
    println!("{} kills; {lost} answers were under way", rounds * 10);
    assert!(u64::from(lost) <= rounds, "{lost}");
}
