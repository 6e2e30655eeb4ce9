//! One agent takes the place of another, as two processes: no call is lost, whatever becomes of the next one.

#![expect(clippy::disallowed_methods, reason = "its clients are threads, which may sleep")]

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use durward::api::proto::workload as pb;
use nix::{
    sys::signal::Signal,
    unistd::{setresgid, setresuid},
};

use crate::{
    frames::{Called, FETCH_JWT, call, jwt_request},
    hostile::PATIENCE,
    joining,
    kubelet::{FakeKubelet, Reply, listed, pod},
    spire_server::{self, Face, FakeSpireServer},
    support::{Process, client, entry, request, write_config},
    systemd::Service,
};

const NOBODY: u32 = 65534;
const TAKES_OVER: &str = "agent { take_over = true }\n";

fn configured(more: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    // What all tests use together says nothing about the agent.
    let unhurried = "ratelimit { node { cpu = 100 } }\n";
    write_config(dir.path(), &format!("{}{TAKES_OVER}{unhurried}{more}", entry("/one", "")));
    let path = dir.path().join("agent.conf");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(path, text.replace("log_level = \"warn\"", "log_level = \"info\"")).unwrap();
    dir
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("api.sock")
}

fn handover_socket(dir: &Path) -> PathBuf {
    dir.join("data/handover.sock")
}

fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

fn log(dir: &Path) -> String {
    let text = fs::read_to_string(dir.join("log")).unwrap();
    // Each call is audited.
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains(" audit: ")).collect();
    lines[lines.len().saturating_sub(100)..].join("\n")
}

fn until(case: &str, dir: &Path, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < PATIENCE, "{case}: {}", log(dir));
        thread::sleep(Duration::from_millis(10));
    }
}

fn answered(dir: &Path) -> Called {
    call(&socket(dir), FETCH_JWT, &jwt_request("a"), PATIENCE)
}

/// An agent in a pod, by what its kubelet sets.
fn in_pod(dir: &Path, words: &[&str]) -> Process {
    Process::spawn_by(&[words, &["env", "KUBERNETES_SERVICE_HOST=10.96.0.1"]].concat(), dir)
}

/// An agent in a pod that has taken the place of the one that runs.
fn next_in_pod(dir: &Path) -> Process {
    let asked_at = || {
        let found = fs::symlink_metadata(handover_socket(dir)).ok()?;
        Some((found.ino(), found.ctime(), found.ctime_nsec()))
    };
    until("one listens for the next one", dir, || asked_at().is_some());
    let before = asked_at();
    let next = in_pod(dir, &[]);
    until("the next one serves", dir, || asked_at().is_some_and(|now| Some(now) != before));
    next
}

/// A directory with an agent that serves, and listens for the next one.
struct Place {
    agent: Process,
    dir: tempfile::TempDir,
}

impl Place {
    async fn taken() -> Self {
        Self::taken_by(configured(""), Process::spawn).await
    }

    async fn taken_in_pod() -> Self {
        Self::taken_by(configured(""), |dir| in_pod(dir, &[])).await
    }

    async fn taken_by(dir: tempfile::TempDir, start: impl FnOnce(&Path) -> Process) -> Self {
        let mut agent = start(dir.path());
        drop(agent.serving(dir.path()).await);
        let place = Self { agent, dir };
        place.listens();
        place
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Waits until somebody listens for the next agent.
    fn listens(&self) {
        let dir = self.path();
        until("one listens for the next one", dir, || UnixStream::connect(handover_socket(dir)).is_ok());
    }

    /// Has everything as the next agent would, which never serves.
    fn passed(&self) -> UnixStream {
        self.listens();
        let (stream, line) = ask(self.path(), &asking(self.path(), 1, "example.org", "api.sock"));
        assert!(line.contains("passed"), "{line}: {}", log(self.path()));
        stream
    }
}

/// Holds what the next agent would hold.
fn hold_issuer(dir: &Path) -> fs::File {
    let held = fs::File::options().write(true).open(dir.join("data/issuer.lock")).unwrap();
    held.try_lock().unwrap();
    held
}

/// Clients that call one call after the other, each on a connection of its own.
struct Polite {
    stop: Arc<AtomicBool>,
    calls: Arc<AtomicUsize>,
    failed: Arc<Mutex<Vec<Called>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Polite {
    fn begin(dir: &Path) -> Self {
        let (stop, calls, failed) =
            (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<_>>>::default());
        let threads = (0..3).map(|_| {
            let (stop, calls, failed) = (Arc::clone(&stop), Arc::clone(&calls), Arc::clone(&failed));
            let dir = dir.to_owned();
            thread::spawn(move || {
                while !stop.load(SeqCst) {
                    match answered(&dir) {
                        Called::Answered => drop(calls.fetch_add(1, SeqCst)),
                        other => failed.lock().unwrap().push(other),
                    }
                    thread::sleep(Duration::from_millis(1));
                }
            })
        });
        let threads = threads.collect();
        Self { stop, calls, failed, threads }
    }

    /// Waits until some more calls were answered.
    fn go_on(&self, case: &str, dir: &Path) {
        let from = self.calls.load(SeqCst);
        until(case, dir, || self.calls.load(SeqCst) > from + 20);
    }

    /// Those that failed.
    fn end(self) -> Vec<Called> {
        self.stop.store(true, SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        Arc::into_inner(self.failed).unwrap().into_inner().unwrap()
    }
}

/// Watches, and comes back whenever it is told to; returns how often it was told its identity.
async fn watch(dir: PathBuf, stop: Arc<AtomicBool>, told: Arc<AtomicUsize>) {
    while !stop.load(SeqCst) {
        let mut client = client(&socket(&dir)).await;
        let stream = match client.fetch_x509svid(request(pb::X509svidRequest {})).await {
            Ok(stream) => stream,
            Err(status) => {
                assert_ne!(status.code(), tonic::Code::PermissionDenied, "{status}");
                continue;
            }
        };
        let mut stream = stream.into_inner();
        while let Ok(Some(message)) = stream.message().await {
            assert_eq!(message.svids[0].spiffe_id, "spiffe://example.org/one");
            told.fetch_add(1, SeqCst);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn five_handovers_lose_no_call() {
    let Place { dir, agent: mut old } = Place::taken().await;
    let dir = dir.path();
    let (public, admin) = (inode(&socket(dir)), inode(&dir.join("data/admin.sock")));
    let polite = Polite::begin(dir);
    let (stop, told) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default());
    let watching = tokio::spawn(watch(dir.to_owned(), Arc::clone(&stop), Arc::clone(&told)));
    for handover in 1..=5 {
        let case = format!("handover {handover}");
        polite.go_on(&case, dir);
        until(&case, dir, || told.load(SeqCst) >= handover);
        let new = Process::spawn(dir);
        until(&case, dir, || old.has_ended());
        assert!(old.wait().success(), "{case}: {}", log(dir));
        old = new;
        assert!(!old.has_ended(), "{case}: {}", log(dir));
        assert_eq!((inode(&socket(dir)), inode(&dir.join("data/admin.sock"))), (public, admin), "{case}");
    }
    polite.go_on("at the end", dir);
    until("the stream is at the last one", dir, || told.load(SeqCst) >= 6);
    assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));
    stop.store(true, SeqCst);
    old.signal(Signal::SIGTERM);
    assert!(old.wait().success());
    watching.abort();
    assert!(!socket(dir).exists() && !handover_socket(dir).exists(), "the last one removes its sockets");
}

/// The next agent is killed at any moment: before it asks, while it waits, with the sockets in its hands, and when it serves.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_in_a_pod_comes_back_when_the_next_one_is_killed() {
    let Place { dir, agent: mut old } = Place::taken_in_pod().await;
    let dir = dir.path();
    let public = inode(&socket(dir));
    let polite = Polite::begin(dir);
    for pause in (0..24).map(|n| Duration::from_millis(20 * n)) {
        let new = Process::spawn(dir);
        thread::sleep(pause);
        new.signal(Signal::SIGKILL);
        drop(new);
        polite.go_on(&format!("killed after {pause:?}"), dir);
        until("it listens for the next one", dir, || handover_socket(dir).exists());
        assert!(!old.has_ended(), "killed after {pause:?}: {}", log(dir));
        assert_eq!(inode(&socket(dir)), public, "killed after {pause:?}");
    }
    let failed = polite.end();
    assert!(
        failed.iter().all(|call| *call == Called::Closed),
        "those that were at the one that was killed: {failed:?}"
    );
    old.signal(Signal::SIGTERM);
    assert!(old.wait().success());
    assert!(!socket(dir).exists(), "it removes its socket");
}

/// What the health checks at this port answer: whether well, and the text.
fn asked(port: u16, path: &str) -> Option<(bool, String)> {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some((answer.starts_with("HTTP/1.1 200"), answer))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_in_a_pod_stays_beside_the_next_one_alive_and_not_ready() {
    if !Command::new("unshare").args(["-n", "true"]).output().is_ok_and(|done| done.status.success()) {
        println!("no other network to be had: needs root");
        return;
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let dir = configured(&format!(
        "health_checks {{ listener_enabled = true bind_address = \"0.0.0.0\" bind_port = \"{port}\" }}\n"
    ));
    let dir = dir.path();
    let mut old = in_pod(dir, &[]);
    drop(old.serving(dir).await);
    until("it is ready", dir, || asked(port, "/ready").is_some_and(|(well, _)| well));
    // As in a pod of its own, with the same port.
    let new = in_pod(dir, &["unshare", "-n"]);
    let words = format!("handed over to PID {}", new.pid());
    until("it stands by", dir, || asked(port, "/ready").is_some_and(|(_, text)| text.contains(&words)));
    assert!(!asked(port, "/ready").unwrap().0);
    assert!(asked(port, "/live").unwrap().0);
    assert_eq!(answered(dir), Called::Answered);

    drop(new);
    until("it is back", dir, || asked(port, "/ready").is_some_and(|(well, _)| well));
    assert_eq!(answered(dir), Called::Answered);

    let mut new = in_pod(dir, &["unshare", "-n"]);
    until("it stands by", dir, || asked(port, "/ready").is_some_and(|(well, _)| !well));
    old.signal(Signal::SIGTERM);
    assert!(old.wait().success());
    assert_eq!(answered(dir), Called::Answered, "the socket is left where it is");
    assert!(!new.has_ended());
}

#[tokio::test]
async fn a_second_agent_by_mistake_is_told_of_the_key() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_config(dir, &entry("/one", ""));
    let mut old = Process::spawn(dir);
    drop(old.serving(dir).await);
    assert_eq!(Process::spawn(dir).wait().code(), Some(1));
    let said = log(dir);
    for part in ["another agent uses this data_dir", "take_over = true"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(answered(dir), Called::Answered);
    assert!(!old.has_ended());
}

#[tokio::test]
async fn an_agent_that_cannot_be_asked_is_ended_first() {
    let dir = configured("");
    let dir = dir.path();
    fs::create_dir(dir.join("data")).unwrap();
    fs::set_permissions(dir.join("data"), fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink(dir.join("nowhere.sock"), handover_socket(dir)).unwrap();
    let mut old = Process::spawn(dir);
    drop(old.serving(dir).await);
    until("it says so", dir, || log(dir).contains("cannot be asked to hand over"));
    assert_eq!(Process::spawn(dir).wait().code(), Some(1));
    let said = log(dir);
    assert!(
        said.contains("it does not hand over (an older version?)") && said.contains("maxUnavailable: 1"),
        "{said}"
    );
    assert_eq!(answered(dir), Called::Answered);
    assert!(!old.has_ended());
}

#[tokio::test]
async fn a_socket_of_the_service_manager_stays_its_own() {
    let dir = configured("");
    let dir = dir.path();
    let listener = UnixListener::bind(socket(dir)).unwrap();
    let mut old = Service::start(dir, vec![listener.into()], &[]);
    until("it serves", dir, || answered(dir) == Called::Answered && handover_socket(dir).exists());
    assert_eq!(Process::spawn(dir).wait().code(), Some(1));
    assert!(log(dir).contains("its socket is the service manager's"), "{}", log(dir));
    assert_eq!(answered(dir), Called::Answered);
    assert!(old.0.try_wait().unwrap().is_none());
}

/// A restart needs no other agent there: who connects meanwhile waits at the socket.
#[test]
fn restarts_of_an_agent_whose_socket_is_held_lose_no_call() {
    let dir = configured("");
    let dir = dir.path();
    let held = UnixListener::bind(socket(dir)).unwrap();
    let start = || Service::start(dir, vec![held.try_clone().unwrap().into()], &[]);
    let mut service = start();
    let polite = Polite::begin(dir);
    for restart in 0..5 {
        polite.go_on(&format!("restart {restart}"), dir);
        service.signal(Signal::SIGTERM);
        assert!(service.0.wait().unwrap().success(), "{}", log(dir));
        service = start();
    }
    polite.go_on("at the end", dir);
    assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));
}

/// A request, as the next agent of this directory would send it.
fn asking(dir: &Path, version: u32, trust_domain: &str, name: &str) -> String {
    let path = dir.join(name);
    format!(
        "{{\"version\":{version},\"trust_domain\":\"{trust_domain}\",\"socket_path\":\"{}\",\"admin_socket_path\":null}}\n",
        path.display()
    )
}

/// Sends this, and returns the first line of the answer.
fn ask(dir: &Path, sent: &str) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(handover_socket(dir)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may have heard enough.
    drop(stream.write_all(sent.as_bytes()));
    let mut line = String::new();
    drop(BufReader::new(stream.try_clone().unwrap()).read_line(&mut line));
    (stream, line)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_something_else_changes_nothing() {
    let mut place = Place::taken().await;
    let dir = &place.dir.path().to_owned();
    assert_eq!(fs::metadata(handover_socket(dir)).unwrap().mode() & 0o777, 0o600);
    let polite = Polite::begin(dir);
    for (case, sent, said) in [
        (
            "another version",
            asking(dir, 9, "example.org", "api.sock"),
            "knows version 1 of the handover, and not 9",
        ),
        (
            "another trust domain",
            asking(dir, 1, "other.org", "api.sock"),
            "serves trust domain example.org, and not other.org",
        ),
        ("another socket", asking(dir, 1, "example.org", "b.sock"), "and not at"),
        ("no request", "hello\n".to_owned(), "the request is not understood"),
        ("not text", "\u{0}\u{1}\n".to_owned(), "the request is not understood"),
        ("too long", format!("{}\n", "x".repeat(100_000)), ""),
        ("nothing", String::new(), ""),
    ] {
        if sent.is_empty() {
            drop(UnixStream::connect(handover_socket(dir)).unwrap());
            continue;
        }
        let (_stream, line) = ask(dir, &sent);
        assert!(line.contains(said), "{case}: {line}");
    }
    for _ in 0..1000 {
        drop(ask(dir, "{}\n"));
    }
    polite.go_on("after a thousand", dir);

    // A hostile next one: it takes all and hands nothing on.
    for _ in 0..3 {
        drop(place.passed());
        polite.go_on("it has come back", dir);
    }
    assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));

    // One that never says a word keeps the agent from nothing but serving: it ends when it is told to.
    let _silent = place.passed();
    place.agent.signal(Signal::SIGTERM);
    assert!(place.agent.wait().success());
}

#[tokio::test]
async fn another_user_gets_nothing_even_where_the_directory_is_open() {
    if !nix::unistd::geteuid().is_root() {
        println!("there is no other user to be: needs root");
        return;
    }
    let Place { dir, mut agent } = Place::taken().await;
    let dir = dir.path();
    for (path, mode) in [(dir.to_owned(), 0o755), (dir.join("data"), 0o755), (handover_socket(dir), 0o777)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let said = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "handover::another_user", "--nocapture"])
        .env("DURWARD_TEST_HANDOVER", handover_socket(dir))
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    assert_eq!(answered(dir), Called::Answered);
    assert!(log(dir).contains("another user asks the agent to hand over: refused"), "{}", log(dir));
    assert!(!agent.has_ended());
}

/// The other side of the test above; nothing when the tests run.
#[test]
fn another_user() {
    let Some(socket) = std::env::var_os("DURWARD_TEST_HANDOVER") else { return };
    setresgid(NOBODY.into(), NOBODY.into(), NOBODY.into()).unwrap();
    setresuid(NOBODY.into(), NOBODY.into(), NOBODY.into()).unwrap();
    let mut said = Vec::new();
    UnixStream::connect(socket).unwrap().read_to_end(&mut said).unwrap();
    assert_eq!(String::from_utf8_lossy(&said), "");
}

/// The socket that was passed is not the one at the path any more: it is bound anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_gone_is_bound_anew() {
    let Place { dir, agent: mut old } = Place::taken().await;
    let dir = dir.path();
    fs::remove_file(socket(dir)).unwrap();
    let mut new = Process::spawn(dir);
    until("the old one ends", dir, || old.has_ended());
    assert!(old.wait().success());
    assert_eq!(answered(dir), Called::Answered, "{}", log(dir));
    assert!(log(dir).contains("binding the socket anew"), "{}", log(dir));
    assert!(!new.has_ended());
}

/// A next one that took everything and hangs: the old one waits for as long as that lasts, and so does who calls.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_waits_for_its_place_while_the_next_one_hangs() {
    let mut place = Place::taken().await;
    let stream = place.passed();
    let held = hold_issuer(place.path());
    drop(stream);
    let dir = place.path();
    until("it cannot come back", dir, || log(dir).contains("cannot take up service again yet"));
    let waiting = {
        let dir = dir.to_owned();
        thread::spawn(move || answered(&dir))
    };
    drop(held);
    assert_eq!(waiting.join().unwrap(), Called::Answered, "{}", log(dir));
    assert!(!place.agent.has_ended());

    // It hears that it is to end.
    let stream = place.passed();
    let _held = hold_issuer(place.path());
    drop(stream);
    place.agent.signal(Signal::SIGTERM);
    assert!(place.agent.wait().success());
}

/// The next one serves later than the first waits for it: the first ends, since nobody needs it any more.
#[tokio::test]
async fn an_agent_that_finds_another_one_serving_ends() {
    let mut place = Place::taken().await;
    let stream = place.passed();
    let _held = hold_issuer(place.path());
    let _next = UnixListener::bind(handover_socket(place.path())).unwrap();
    drop(stream);
    assert!(place.agent.wait().success(), "{}", log(place.path()));
    assert!(log(place.path()).contains("yet another agent serves: ending"), "{}", log(place.path()));
    assert!(socket(place.path()).exists(), "the socket is the other one's");
}

/// Told to end while it leaves its place, it leaves it.
#[tokio::test]
async fn an_agent_that_is_ended_while_it_hands_over_hands_over() {
    let mut place = Place::taken().await;
    let dir = place.dir.path().to_owned();
    // Somebody who never ends its request, so that the drain takes a while.
    let mut slow = UnixStream::connect(socket(&dir)).unwrap();
    slow.write_all(b"PRI * HTTP/2.0\r\n").unwrap();
    let mut stream = UnixStream::connect(handover_socket(&dir)).unwrap();
    stream.write_all(asking(&dir, 1, "example.org", "api.sock").as_bytes()).unwrap();
    until("it leaves", &dir, || log(&dir).contains("handing over to another agent"));
    place.agent.signal(Signal::SIGTERM);
    let mut line = String::new();
    BufReader::new(&mut stream).read_line(&mut line).unwrap();
    assert!(line.contains("passed"), "{line}: {}", log(&dir));
    assert!(place.agent.wait().success(), "{}", log(&dir));
    assert!(socket(&dir).exists(), "it is the next one's");
}

/// However many say nothing, the next one is heard.
#[tokio::test]
async fn those_who_say_nothing_keep_nobody_waiting() {
    let Place { dir, agent: mut old } = Place::taken().await;
    let dir = dir.path();
    // One after the other, they would take longer than any test waits.
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(handover_socket(dir)).unwrap()).collect();
    let mut new = Process::spawn(dir);
    until("the old one ends", dir, || old.has_ended());
    assert_eq!(answered(dir), Called::Answered, "{}", log(dir));
    assert!(!new.has_ended());
    drop(silent);
}

/// What cannot be had whoever leaves is known before anybody is asked to leave.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_serve_asks_nobody_to_leave() {
    let mut place = Place::taken().await;
    let dir = place.dir.path().to_owned();
    for (case, words, more, said) in [
        (
            "an address of another machine",
            &[][..],
            "health_checks { listener_enabled = true bind_address = \"192.0.2.1\" bind_port = \"18080\" }\n",
            "cannot listen at 192.0.2.1 port 18080",
        ),
        (
            "more than the node has",
            &["prlimit", "--nofile=4096"],
            "ratelimit { gate { connections = 1000000 } }\n",
            "gate: 1000000 connections take",
        ),
    ] {
        fs::write(dir.join("log"), "").unwrap();
        write_config(&dir, &[&entry("/one", ""), TAKES_OVER, more].concat());
        assert_eq!(Process::spawn_by(words, &dir).wait().code(), Some(1), "{case}");
        let log = log(&dir);
        assert!(log.contains(said) && !log.contains("handing over"), "{case}: {log}");
        assert!(!place.agent.has_ended(), "{case}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_in_pods_the_first_stands_by_when_the_second_ends() {
    let Place { dir, agent: mut first } = Place::taken_in_pod().await;
    let dir = dir.path();
    let public = inode(&socket(dir));
    let polite = Polite::begin(dir);
    for turn in 0..2 {
        let second = next_in_pod(dir);
        let mut third = next_in_pod(dir);
        fs::write(dir.join("log"), "").unwrap();
        drop(second);
        until("the third hears of the first", dir, || log(dir).contains("another agent stands by"));
        polite.go_on("the third serves", dir);
        if turn == 0 {
            // Told to end, it leaves the place to the first.
            third.signal(Signal::SIGTERM);
            assert!(third.wait().success(), "{}", log(dir));
            polite.go_on("the first serves", dir);
            assert_eq!(inode(&socket(dir)), public, "{}", log(dir));
        } else {
            assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));
            drop(third);
            break;
        }
    }
    until("the first is back", dir, || answered(dir) == Called::Answered);
    assert!(!first.has_ended());
}

/// Told to end at any moment of its start, an agent leaves the place as it would later.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_in_a_pod_that_is_ended_as_it_starts_costs_no_call() {
    let Place { dir, agent: mut old } = Place::taken_in_pod().await;
    let dir = dir.path();
    let (public, admin) = (inode(&socket(dir)), inode(&dir.join("data/admin.sock")));
    let polite = Polite::begin(dir);
    for pause in (0..24).map(|n| Duration::from_millis(20 * n)) {
        let case = format!("ended after {pause:?}");
        let mut new = in_pod(dir, &[]);
        thread::sleep(pause);
        new.signal(Signal::SIGTERM);
        new.wait();
        polite.go_on(&case, dir);
        until("it listens for the next one", dir, || handover_socket(dir).exists());
        assert!(!old.has_ended(), "{case}: {}", log(dir));
        assert_eq!((inode(&socket(dir)), inode(&dir.join("data/admin.sock"))), (public, admin), "{case}");
    }
    assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));
}

/// Whoever runs ends while it is asked: the next one finds nobody, and serves.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_while_it_is_asked_is_followed() {
    let dir = configured("");
    let dir = dir.path();
    fs::create_dir(dir.join("data")).unwrap();
    fs::set_permissions(dir.join("data"), fs::Permissions::from_mode(0o700)).unwrap();
    let ends = UnixListener::bind(handover_socket(dir)).unwrap();
    let ending = thread::spawn(move || {
        // One before it has read, and one after.
        drop(ends.accept().unwrap());
        let (mut stream, _) = ends.accept().unwrap();
        stream.read_exact(&mut [0]).unwrap();
    });
    let mut new = Process::spawn(dir);
    drop(new.serving(dir).await);
    ending.join().unwrap();
    assert_eq!(answered(dir), Called::Answered);
}

#[tokio::test(flavor = "multi_thread")]
async fn three_that_start_at_once_take_over_one_after_the_other() {
    let Place { dir, agent: mut old } = Place::taken().await;
    let dir = dir.path();
    let polite = Polite::begin(dir);
    let mut next: Vec<_> = (0..3).map(|_| Process::spawn(dir)).collect();
    until("one is left", dir, || {
        let ended = next.iter_mut().filter_map(|one| one.has_ended().then_some(())).count();
        old.has_ended() && ended == 2
    });
    polite.go_on("the last one serves", dir);
    assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));
    for one in &mut next {
        if one.has_ended() {
            assert!(one.wait().success(), "{}", log(dir));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_ended_leaves_its_place_to_the_one_that_stands_by() {
    let Place { dir, agent: mut old } = Place::taken_in_pod().await;
    let dir = dir.path();
    let (public, admin) = (inode(&socket(dir)), inode(&dir.join("data/admin.sock")));
    let polite = Polite::begin(dir);
    for turn in 0..3 {
        let mut new = next_in_pod(dir);
        // Somebody who never ends its request.
        let mut slow = UnixStream::connect(socket(dir)).unwrap();
        slow.write_all(b"PRI * HTTP/2.0\r\n").unwrap();
        for _ in 0..3 {
            polite.go_on("the new one serves", dir);
        }
        new.signal(Signal::SIGTERM);
        polite.go_on("the old one serves", dir);
        assert!(new.wait().success(), "{turn}: {}", log(dir));
        assert!(!old.has_ended());
        assert_eq!((inode(&socket(dir)), inode(&dir.join("data/admin.sock"))), (public, admin), "{turn}");
    }
    assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));
}

/// The configuration of the next agent of this directory: its entries are these.
fn next_config(dir: &Path, entries: &str, more: &str) {
    let unhurried = "ratelimit { node { cpu = 100 } }\n";
    write_config(dir, &format!("{entries}{TAKES_OVER}{unhurried}{more}"));
}

const OF_NOBODY: &str = "entry \"spiffe://example.org/none\" { selectors = [\"unix:user:no-such-user\"] }\n";
const SERVES_ON: &str = "this agent could serve nobody, so the one that runs serves on; trying again";

/// Health checks at a free port.
fn health_checks() -> (u16, String) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    (
        port,
        format!(
            "health_checks {{ listener_enabled = true bind_address = \"127.0.0.1\" bind_port = \"{port}\" }}\n"
        ),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_serves_is_not_ended_for_one_that_could_serve_nobody() {
    let mut place = Place::taken().await;
    let dir = place.dir.path().to_owned();
    let polite = Polite::begin(&dir);
    let in_pod_alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let can_be_alone =
        Command::new("unshare").args(&in_pod_alone[1..]).arg("true").status().is_ok_and(|it| it.success());
    let in_pod_alone = [&["env", "KUBERNETES_SERVICE_HOST=192.0.2.1"][..], &in_pod_alone].concat();
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let refusing = FakeKubelet::start(Reply::With(403, "", "Forbidden".to_owned()));
    let of_pod = "entry \"spiffe://example.org/pod\" { selectors = [\"k8s:ns:ns1\"] }\n";
    for (case, words, entries, kubelet, said) in [
        ("entries of nobody", &[][..], OF_NOBODY, &kubelet, "there is no such user on this node"),
        ("no permission", &[], of_pod, &refusing, "allow its service account get on nodes/pods"),
        ("no hostPID", &in_pod_alone, of_pod, &kubelet, "its pod needs hostPID: true"),
    ] {
        if !words.is_empty() && !can_be_alone {
            println!("no PID namespace to be had: needs root");
            continue;
        }
        let (port, checks) = health_checks();
        next_config(&dir, entries, &checks);
        let text = fs::read_to_string(dir.join("agent.conf")).unwrap();
        fs::write(
            dir.join("agent.conf"),
            text.replace("plugins {", &format!("plugins {{\n{}", kubelet.block())),
        )
        .unwrap();
        fs::write(dir.join("log"), "").unwrap();
        let mut next = Process::spawn_by(words, &dir);
        until(case, &dir, || log(&dir).contains(SERVES_ON));
        assert!(log(&dir).contains(said), "{case}: {}", log(&dir));
        let not_ready =
            || asked(port, "/ready").is_some_and(|(well, text)| !well && text.contains("serves on"));
        until(case, &dir, not_ready);
        assert!(asked(port, "/live").unwrap().0, "{case}");
        // It tries again, and says it once.
        thread::sleep(Duration::from_secs(5));
        assert_eq!(log(&dir).matches(SERVES_ON).count(), 1, "{case}: {}", log(&dir));
        assert_eq!(
            log(&dir).matches("could serve nobody: not handed over").count(),
            1,
            "{case}: {}",
            log(&dir)
        );
        assert!(!log(&dir).contains("handing over to another agent"), "{case}: {}", log(&dir));
        polite.go_on(case, &dir);
        assert!(!place.agent.has_ended() && !next.has_ended(), "{case}");
        if words.is_empty() {
            next.signal(Signal::SIGTERM);
            assert!(next.wait().success(), "{case}: {}", log(&dir));
        }
    }
    assert_eq!(polite.end(), [], "no call is lost: {}", log(&dir));

    // Where nobody serves any more, it serves as it can.
    next_config(&dir, OF_NOBODY, "");
    fs::write(dir.join("log"), "").unwrap();
    let mut next = Process::spawn(&dir);
    until("it is kept waiting", &dir, || log(&dir).contains(SERVES_ON));
    place.agent.signal(Signal::SIGTERM);
    assert!(place.agent.wait().success());
    drop(next.serving(&dir).await);
    assert_eq!(answered(&dir), Called::Refused, "{}", log(&dir));
}

/// Who cannot serve either does not keep the place, but from one that lacks more.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_serves_nobody_leaves_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    next_config(dir, OF_NOBODY, "");
    let mut old = Process::spawn(dir);
    drop(old.serving(dir).await);
    until("it listens for the next one", dir, || UnixStream::connect(handover_socket(dir)).is_ok());
    let (_stream, line) = {
        let more = asking(dir, 1, "example.org", "api.sock");
        let lacks = "null,\"lacks\":[\"users or groups do not exist\",\"something else\"]}";
        ask(dir, &more.replace("null}", lacks))
    };
    assert!(line.contains("kept") && line.contains("users or groups do not exist"), "{line}");
    assert!(!old.has_ended());

    let mut next = Process::spawn(dir);
    until("it leaves", dir, || old.has_ended());
    assert!(old.wait().success(), "{}", log(dir));
    assert!(!next.has_ended());
    until("the next one listens", dir, || UnixStream::connect(handover_socket(dir)).is_ok());

    next_config(dir, &entry("/one", ""), "");
    let _well = Process::spawn(dir);
    until("it leaves", dir, || next.has_ended());
    until("it is well again", dir, || answered(dir) == Called::Answered);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_a_server_hands_over_to_none_that_does_not_reach_it() {
    let server = FakeSpireServer::start(Face::Right).await;
    // Its SVIDs are an hour old when it gives them: those of an hour are renewed at once.
    server.course().ttl = Duration::from_secs(24 * 3600);
    server.course().tokens.insert("once".to_owned());
    server.course().entries.push(spire_server::entry("one"));
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let dir = dir.path();
    let more = format!(
        "take_over = true\n trust_bundle_path = \"{}/roots.pem\"\n join_token = \"once\"",
        dir.display()
    );
    joining::write_config(dir, &server, &more);
    let right = fs::read_to_string(dir.join("agent.conf")).unwrap() + "ratelimit { node { cpu = 100 } }\n";
    fs::write(dir.join("agent.conf"), &right).unwrap();
    let mut old = Process::spawn(dir);
    until("it serves", dir, || answered(dir) == Called::Answered);
    until("it listens for the next one", dir, || UnixStream::connect(handover_socket(dir)).is_ok());
    let kept = || fs::read(dir.join("data/agent-data.json")).unwrap();
    let before = kept();

    // Nobody listens there.
    let nobodys = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let port = format!("server_port = {}", server.address.port());
    fs::write(dir.join("agent.conf"), right.replace(&port, &format!("server_port = {nobodys}"))).unwrap();
    let polite = Polite::begin(dir);
    let mut wrong = Process::spawn(dir);
    until("it is kept waiting", dir, || log(dir).contains(SERVES_ON));
    assert!(log(dir).contains(&format!("cannot reach the server localhost:{nobodys}")), "{}", log(dir));
    polite.go_on("the old one serves on", dir);
    wrong.signal(Signal::SIGTERM);
    assert!(wrong.wait().success(), "{}", log(dir));
    assert!(!old.has_ended());

    // The right one, which does not say what there is.
    fs::write(dir.join("agent.conf"), &right).unwrap();
    fs::write(dir.join("log"), "").unwrap();
    server.course().bundles_fail = u32::MAX;
    let mut next = Process::spawn(dir);
    until("it is kept waiting", dir, || log(dir).contains(SERVES_ON));
    polite.go_on("the old one serves on", dir);
    assert!(!old.has_ended() && !next.has_ended(), "{}", log(dir));
    assert!(kept() == before, "nothing is written: {}", log(dir));

    // As soon as it does, the next one takes over.
    server.course().bundles_fail = 0;
    until("it takes over", dir, || old.has_ended());
    assert!(old.wait().success());
    polite.go_on("the new one serves", dir);
    assert_eq!(polite.end(), [], "no call is lost: {}", log(dir));
    let attested = server.course().attested;
    assert_eq!(attested, 1, "with the SVID on the disk");
}
