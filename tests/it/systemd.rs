//! The agent as a service manager runs it: what it says over NOTIFY_SOCKET, and the socket it is handed.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{MetadataExt as _, PermissionsExt as _},
            net::{UnixDatagram, UnixListener},
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use durward::api::proto::workload as pb;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::{client, entry, request, write_config};

/// Longer than anything takes on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// The agent, started as systemd does; killed when dropped.
pub(crate) struct Service(pub(crate) Child);

impl Service {
    /// `handed` become descriptors 3 and up. The shell is what makes them so, and sets LISTEN_PID to what it becomes.
    pub(crate) fn start(dir: &Path, handed: Vec<OwnedFd>, environment: &[(&str, &str)]) -> Self {
        Self::start_by(&[], dir, handed, environment)
    }

    /// The same, by a command that becomes what follows its `words`.
    fn start_by(words: &[&str], dir: &Path, handed: Vec<OwnedFd>, environment: &[(&str, &str)]) -> Self {
        Self::start_with(words, &[], dir, handed, environment)
    }

    /// The same, and the agent has these flags too.
    fn start_with(
        words: &[&str],
        flags: &[&str],
        dir: &Path,
        handed: Vec<OwnedFd>,
        environment: &[(&str, &str)],
    ) -> Self {
        let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let script = match handed.len() {
            0 => "exec \"$@\"",
            1 => "LISTEN_PID=$$ exec \"$@\" 3<&0 </dev/null",
            2 => "LISTEN_PID=$$ exec \"$@\" 3<&0 4<&1 </dev/null 1>&2",
            more => panic!("{more} sockets"),
        };
        let mut command = Command::new("sh");
        command
            .args(["-c", script, "sh"])
            .args(words)
            .args([env!("CARGO_BIN_EXE_durward"), "run", "--config"])
            .arg(dir.join("agent.conf"))
            .args(flags)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if !handed.is_empty() {
            command.env("LISTEN_FDS", handed.len().to_string());
        }
        let mut handed = handed.into_iter();
        if let Some(first) = handed.next() {
            command.stdin(first);
        }
        if let Some(second) = handed.next() {
            command.stdout(second);
        }
        Self(command.spawn().unwrap())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }

    fn ends_well(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.0.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }
}

/// What systemd is told, one message after the other.
struct Manager(UnixDatagram);

impl Manager {
    fn at(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Self(socket)
    }

    /// The next message that is no heartbeat.
    fn next(&self) -> String {
        loop {
            let message = self.any();
            if message != "WATCHDOG=1" {
                return message;
            }
        }
    }

    fn any(&self) -> String {
        let mut buffer = [0; 4096];
        let len = self.0.recv(&mut buffer).expect("a message in time");
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }
}

fn configured(blocks: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), blocks);
    dir
}

async fn first_id(socket: &Path) -> String {
    let mut client = client(socket).await;
    let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    stream.into_inner().message().await.unwrap().unwrap().svids.remove(0).spiffe_id
}

#[tokio::test(flavor = "multi_thread")]
async fn the_manager_hears_of_every_step() {
    let dir = configured(&entry("/one", ""));
    let at = dir.path().join("notify");
    let manager = Manager::at(&at);
    let service = Service::start(
        dir.path(),
        Vec::new(),
        &[("NOTIFY_SOCKET", at.to_str().unwrap()), ("WATCHDOG_USEC", "400000")],
    );
    assert_eq!(manager.next(), "READY=1\nSTATUS=serving 1 entries");
    // Ready means that a client that comes now is answered.
    assert_eq!(first_id(&dir.path().join("api.sock")).await, "spiffe://example.org/one");
    assert_eq!(manager.any(), "WATCHDOG=1");
    assert_eq!(manager.any(), "WATCHDOG=1");

    // A reload that succeeds, and one that does not: both begin and end.
    write_config(dir.path(), &[entry("/one", ""), entry("/two", "")].concat());
    for (case, end) in [
        ("good", "READY=1\nSTATUS=serving 2 entries"),
        ("broken", "READY=1\nSTATUS=serving 2 entries; the last reload failed: see the log"),
    ] {
        service.signal(Signal::SIGHUP);
        let begin = manager.next();
        let time = begin.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap_or_else(|| panic!("{begin}"));
        assert!(time.parse::<u64>().is_ok(), "{case}: {begin}");
        assert_eq!(manager.next(), end, "{case}");
        fs::write(dir.path().join("agent.conf"), "agent {").unwrap();
    }

    service.signal(Signal::SIGTERM);
    assert_eq!(manager.next(), "STOPPING=1\nSTATUS=draining");
    service.ends_well();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_the_inode_of_a_socket_that_systemd_holds() {
    let dir = configured(&entry("/one", ""));
    let path = dir.path().join("api.sock");
    let held = UnixListener::bind(&path).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();
    let hand = || vec![OwnedFd::from(held.try_clone().unwrap())];

    for round in 0..2 {
        let service = Service::start(dir.path(), hand(), &[]);
        // The connection waits in the queue until the agent is up, as with systemd.
        assert_eq!(first_id(&path).await, "spiffe://example.org/one", "round {round}");
        service.signal(Signal::SIGTERM);
        service.ends_well();
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode, "round {round}");
    }
}

/// A unit that lets only root connect, and an entry for somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_unit_that_keeps_callers_out_is_no_ready_agent() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let other = "entry \"spiffe://example.org/other\" { selectors = [\"unix:uid:731008\"] }\n";
    let both = || format!("{other}{}", entry("/one", ""));
    for (mode, entries, well, told) in [
        (0o600, entry("/one", ""), true, false),
        (0o600, both(), true, true),
        (0o600, other.to_owned(), false, true),
        // Of root's group, in which it is not.
        (0o660, both(), true, true),
        (0o660, other.to_owned(), false, true),
        (0o666, both(), true, false),
    ] {
        let dir = configured(&entries);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = dir.path().join("api.sock");
        let held = UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let _service = Service::start(dir.path(), vec![OwnedFd::from(held)], &[]);
        if well {
            assert_eq!(first_id(&path).await, "spiffe://example.org/one", "{mode:o}");
        } else {
            // Root is answered, and has none.
            let mut client = client(&path).await;
            assert!(client.fetch_x509svid(request(pb::X509svidRequest {})).await.is_err(), "{mode:o}");
        }
        let run = |words: &[&str], socket: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
            let output =
                command.args(words).arg("--socket-path").arg(dir.path().join(socket)).output().unwrap();
            (output.status.success(), String::from_utf8(output.stdout).unwrap())
        };
        assert_eq!(run(&["healthcheck"], "api.sock").0, well, "{mode:o}");
        let (_, said) = run(&["status"], "data/admin.sock");
        let said: Vec<_> = said.split_whitespace().collect();
        let todo = "SocketMode=0666 in the socket unit, or choose another socket_path";
        assert_eq!(said.join(" ").contains(todo), told, "{mode:o}: {said:?}");
    }
}

#[test]
fn what_is_handed_over_wrongly_is_an_error() {
    let dir = configured(&entry("/one", ""));
    let listener = |name: &str| OwnedFd::from(UnixListener::bind(dir.path().join(name)).unwrap());
    for (case, handed, names, expect) in [
        (
            "two sockets",
            vec![listener("a.sock"), listener("b.sock")],
            "a.socket:b.socket",
            "2 sockets (a.socket, b.socket)",
        ),
        (
            "TCP",
            vec![OwnedFd::from(std::net::TcpListener::bind("127.0.0.1:0").unwrap())],
            "durward.socket",
            "durward.socket passed by the service manager is not a Unix socket",
        ),
        ("another path", vec![listener("other.sock")], "durward.socket", "socket_path"),
    ] {
        fs::write(dir.path().join("log"), "").unwrap();
        let mut service = Service::start(dir.path(), handed, &[("LISTEN_FDNAMES", names)]);
        let status = service.0.wait().unwrap();
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert!(!status.success(), "{case}: {log}");
        assert!(log.contains(expect), "{case}: {log}");
    }
}

/// Every way in which a start fails, each with who waits in the queue of the service manager's socket: nobody is left there.
#[expect(clippy::disallowed_methods, reason = "another agent is waited for")]
#[test]
fn an_agent_that_cannot_start_leaves_no_client_hanging() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let port = format!(
        "health_checks {{ listener_enabled = true bind_address = \"127.0.0.1\" bind_port = \"{port}\" }}"
    );
    let none = || -> Vec<String> { Vec::new() };
    let descriptors = |n: u32| vec!["prlimit".to_owned(), format!("--nofile={n}")];
    #[cfg(target_arch = "x86_64")]
    let refused = |number: u32| {
        let filter = crate::surroundings::refused_call(number, 1);
        vec!["python3".to_owned(), "-c".to_owned(), filter]
    };
    #[cfg(not(target_arch = "x86_64"))]
    let refused = |_number: u32| vec!["sh".to_owned(), "-c".to_owned(), "exit 77".to_owned()];
    // The numbers of prctl(2), by which a process closes itself to others, and getrandom(2).
    let (no_secrets, no_randomness) = (refused(157), refused(318));
    let mut cases = vec![
        ("a mistake in the file", "nonsense = 1", none(), "nonsense"),
        ("no file", "", none(), "could not find config file"),
        ("a CA that is not there", "", none(), "cannot read /nowhere"),
        ("a mistake in the command line", "", none(), "--nosuchflag"),
        ("data_dir is everybody's", "", none(), "data_dir"),
        ("data_dir is a file", "", none(), "data_dir"),
        ("another agent has data_dir", "", none(), "cannot open the issuer"),
        ("keys that are not to be read", "", none(), "issuer.json is not a regular file"),
        ("a port that is taken", &port, none(), "cannot listen for health checks"),
        ("a log that cannot be written", "", none(), "log_file"),
        ("another socket", "", none(), "ListenStream="),
        ("memory that others can read", "", no_secrets, "PR_SET_DUMPABLE"),
        ("no randomness", "", no_randomness, "getrandom is refused"),
    ];
    // With fewer the libraries of the program cannot be opened.
    cases.extend([5, 6, 7, 8, 10, 14, 18, 22].map(|n| ("descriptors", "", descriptors(n), "LimitNOFILE")));
    for (case, blocks, words, want) in cases {
        let dir = configured(blocks);
        let at = |name: &str| dir.path().join(name);
        let mut path = at("api.sock");
        let config = fs::read_to_string(at("agent.conf")).unwrap();
        let mut other = None;
        match case {
            "no file" => fs::remove_file(at("agent.conf")).unwrap(),
            "data_dir is everybody's" => {
                fs::create_dir(at("data")).unwrap();
                fs::set_permissions(at("data"), fs::Permissions::from_mode(0o777)).unwrap();
            }
            "data_dir is a file" => fs::write(at("data"), "").unwrap(),
            "another agent has data_dir" => {
                let theirs = config.replace("api.sock", "theirs/api.sock");
                fs::create_dir(at("theirs")).unwrap();
                fs::write(at("theirs/agent.conf"), theirs).unwrap();
                let agent = Service::start(&at("theirs"), Vec::new(), &[]);
                let began = std::time::Instant::now();
                while std::os::unix::net::UnixStream::connect(at("theirs/api.sock")).is_err() {
                    assert!(began.elapsed() < LONG, "{case}");
                    std::thread::sleep(Duration::from_millis(20));
                }
                other = Some(agent);
            }
            "keys that are not to be read" => {
                fs::create_dir(at("data")).unwrap();
                fs::set_permissions(at("data"), fs::Permissions::from_mode(0o700)).unwrap();
                fs::create_dir(at("data/issuer.json")).unwrap();
            }
            "a log that cannot be written" => {
                let log = format!("log_level = \"warn\"\n log_file = \"{}/none/log\"", dir.path().display());
                fs::write(at("agent.conf"), config.replace("log_level = \"warn\"", &log)).unwrap();
            }
            "a CA that is not there" => {
                let ca = "issuer \"embedded\" { ca_cert_path = \"/nowhere\" ca_key_path = \"/nowhere\" }";
                fs::write(at("agent.conf"), config.replace("issuer \"embedded\" { }", ca)).unwrap();
            }
            "another socket" => path = at("other.sock"),
            _ => {}
        }
        let held = UnixListener::bind(&path).unwrap();
        let mut waiting: Vec<_> =
            (0..100).map(|_| std::os::unix::net::UnixStream::connect(&path).unwrap()).collect();
        let handed = vec![OwnedFd::from(held.try_clone().unwrap())];
        let flags: &[&str] = if case.ends_with("line") { &["--nosuchflag"] } else { &[] };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut service = Service::start_with(&words, flags, dir.path(), handed, &[]);
        let status = service.0.wait().unwrap();
        let log = fs::read_to_string(at("log")).unwrap();
        if status.code() == Some(77) {
            // No filter can be set here.
            continue;
        }
        assert!(!status.success() && log.contains(want), "{case}: {words:?}: {log}");
        for client in &mut waiting {
            assert!(is_sent_away(client), "{case}: {log}");
        }
        // The socket itself is as it was: the next try serves there.
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        drop(other);
    }
}

fn is_sent_away(client: &mut std::os::unix::net::UnixStream) -> bool {
    use std::io::Read as _;
    client.set_read_timeout(Some(LONG)).unwrap();
    let read = client.read(&mut [0; 1]);
    matches!(read, Ok(0)) || read.is_err_and(|err| err.kind() != std::io::ErrorKind::WouldBlock)
}

/// Without threads there is no agent: it says so, ends, and leaves nobody waiting, however few there are.
#[test]
fn an_agent_without_threads_says_so_and_ends() {
    // A user who has no other process. Root is bound by no such limit.
    const USER: &str = "61234";
    let as_user = ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"];
    let as_user: &[&str] = if nix::unistd::geteuid().is_root() { &as_user } else { &[] };
    for threads in [1, 2, 3, 5, 8, 11, 14, 16] {
        let dir = configured("");
        let path = dir.path().join("api.sock");
        let held = UnixListener::bind(&path).unwrap();
        let mut client = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let limit = format!("--nproc={threads}");
        let words = [as_user, &["prlimit", &limit]].concat();
        let handed = vec![OwnedFd::from(held.try_clone().unwrap())];
        let mut service = Service::start_by(&words, dir.path(), handed, &[]);
        let status = service.0.wait().unwrap();
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(status.code(), Some(1), "{threads}: {log}");
        assert!(log.contains("cannot start ") && log.contains("TasksMax or ulimit -u"), "{threads}: {log}");
        assert!(!log.contains("panicked"), "{threads}: {log}");
        assert!(is_sent_away(&mut client), "{threads}: {log}");
    }
}
