//! What an agent is controlled by and watched with: signals at any moment, the log, and the HTTP endpoints. None of it
//! waits for a caller, a reader or a disk.

#![expect(clippy::disallowed_methods, reason = "it waits for processes, in threads that may sleep")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};

use crate::{
    frames::{END_HEADERS, HEADERS, PREFACE, RST_STREAM, SETTINGS, frame},
    hostile::PATIENCE,
    support::{Process, entry, request, write_config},
};

/// Until `there` is, or the test fails.
fn wait_for(what: &str, mut there: impl FnMut() -> bool) {
    let began = Instant::now();
    while !there() {
        assert!(began.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A port that is free, or was a moment ago.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

const ASK: &[u8] = b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n";

/// The whole answer to a request; empty where there is none.
fn answer(mut stream: impl std::io::Read + std::io::Write) -> String {
    let mut answer = String::new();
    if stream.write_all(ASK).is_ok() {
        drop(stream.read_to_string(&mut answer));
    }
    answer
}

fn probe(port: u16) -> String {
    let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) else { return String::new() };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    answer(stream)
}

/// Waits for the end of an agent that was told to end, which does not depend on anything else.
fn ends(agent: &mut Process) {
    agent.signal(Signal::SIGTERM);
    wait_for("it ends", || agent.has_ended());
}

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join("log")).unwrap()
}

/// One user holds a thousand connections, silent, or with a request that is not whole, and opens others in their
/// place all the time. Each probe is answered, and none is thrown out for who came after it.
#[test]
fn a_thousand_connections_of_one_user_keep_no_probe_from_its_answer() {
    const HELD: usize = 1_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // The agent gives each listener an eighth of what it may have.
    let held = HELD.min(usize::try_from(hard / 8 / 2).unwrap_or(usize::MAX));
    let dir = tempfile::tempdir().unwrap();
    let (health, metrics) = (port(), port());
    let blocks = format!(
        "health_checks {{\n listener_enabled = true\n bind_address = \"127.0.0.1\"\n bind_port = {health}\n}}\n\
         telemetry {{\n Prometheus {{\n host = \"127.0.0.1\"\n port = {metrics}\n }}\n}}\n"
    );
    write_config(dir.path(), &blocks);
    let _agent = Process::spawn(dir.path());
    wait_for("it is live", || probe(health).starts_with("HTTP/1.1 200"));
    for (case, port, begun) in [
        ("silent", health, &b""[..]),
        ("half a request", health, &ASK[..20]),
        ("a request without its end", metrics, &ASK[..ASK.len() - 1]),
    ] {
        let mut open = Vec::with_capacity(held);
        for _ in 0..held {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.write_all(begun).unwrap();
            open.push(stream);
        }
        for nth in 0..50 {
            let probe = TcpStream::connect(("127.0.0.1", port)).unwrap();
            probe.set_read_timeout(Some(PATIENCE)).unwrap();
            for _ in 0..32 {
                drop(open.remove(0));
                open.push(TcpStream::connect(("127.0.0.1", port)).unwrap());
            }
            let said = answer(probe);
            assert!(said.starts_with("HTTP/1.1 200"), "{case}, probe {nth}: {said}");
        }
    }
}

#[test]
fn unix_sockets_answer_the_agents_user_and_group() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().display();
    let blocks = format!(
        "health_checks {{ socket_path = \"{at}/ops/health.sock\" }}\n\
         telemetry {{ Prometheus {{ socket_path = \"{at}/ops/metrics.sock\" }} }}\n"
    );
    write_config(dir.path(), &blocks);
    let mut agent = Process::spawn(dir.path());
    for (name, says) in [("health.sock", "{\"agent\":{}}\n"), ("metrics.sock", "durward_build_info")] {
        let path = dir.path().join("ops").join(name);
        let ask = || UnixStream::connect(&path).map(answer).unwrap_or_default();
        wait_for(name, || ask().contains(says));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660, "{name}");
    }
    ends(&mut agent);
    assert!(!dir.path().join("ops/health.sock").exists(), "they go with the agent");
}

/// As soon as there is a PID, somebody sends it signals.
#[tokio::test(flavor = "multi_thread")]
async fn signals_in_the_first_moments_end_no_agent() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/one", ""));
    let config = dir.path().join("agent.conf");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("log_level = \"warn\"", "log_level = \"info\"")).unwrap();
    for _ in 0..40 {
        let mut agent = Process::spawn(dir.path());
        // Not while it is still another program, or the dynamic linker runs: its own first instructions.
        wait_for("SIGHUP does not end it", || {
            let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap_or_default();
            ["SigBlk:", "SigCgt:"].iter().any(|field| {
                let set = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or("0");
                u64::from_str_radix(set.trim(), 16).unwrap() & 1 == 1
            })
        });
        for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
            agent.signal(signal);
        }
        agent.serving(dir.path()).await;
        ends(&mut agent);
    }
    let log = log(dir.path());
    for said in ["SIGUSR1 does nothing here", "reloaded"] {
        assert!(log.contains(said), "what was sent early is answered later: {log}");
    }
}

/// A process that is killed when dropped.
struct Killed(Child);

impl Killed {
    fn signal(&self, signal: Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.id().cast_signed()), signal).unwrap();
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn quickstart_reads_its_files_again_on_sighup() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (said, place) = (dir.path().join("said"), dir.path().join("at"));
    let out = fs::File::create(&said).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
    command.args(["quickstart", "--dir"]).arg(&place);
    let warned = out.try_clone().unwrap();
    command.env_remove("KUBERNETES_SERVICE_HOST").stdin(Stdio::null()).stdout(out).stderr(warned);
    let mut agent = Killed(command.spawn().unwrap());
    let says = |text: &str| fs::read_to_string(&said).unwrap().contains(text);
    wait_for("it serves", || says("Serving."));
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGHUP] {
        agent.signal(signal);
    }
    wait_for("it reads its files", || says("Reloaded: nothing changed."));
    // What changes is read without being told, and a mistake is named.
    fs::write(place.join("entries.d/web.conf"), entry("/web", "")).unwrap();
    wait_for("it reads the new entry", || says("Reloaded: entries 1 added"));
    // Nor would anybody look into the log for an entry that nobody can have.
    let ghost = entry("/web", "").replace("unix:uid:", "unix:user:no-such-user-");
    assert!(ghost.contains("no-such-user"), "{ghost}");
    fs::write(place.join("entries.d/web.conf"), ghost).unwrap();
    wait_for("it warns of the user", || says("Warning: entry") && says("unix:user:no-such-user-"));
    fs::write(place.join("entries.d/web.conf"), "entry {").unwrap();
    wait_for("it names the mistake", || says("entries.d/web.conf:1:"));
    agent.signal(Signal::SIGTERM);
    assert!(agent.0.wait().unwrap().success());
}

/// A pipe without a reader takes the place of the log, at the start or later; nothing waits for one.
#[tokio::test(flavor = "multi_thread")]
async fn a_pipe_that_nobody_reads_is_a_log_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/one", ""));
    let path = dir.path().join("agent.log");
    let config = dir.path().join("agent.conf");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace(
        "log_level = \"warn\"",
        &format!("log_level = \"info\"\n log_file = \"{}\"", path.display()),
    );
    fs::write(&config, text).unwrap();
    let pipe = || nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    for case in ["from the start", "later"] {
        if case == "from the start" {
            pipe();
        }
        let mut agent = Process::spawn(dir.path());
        agent.serving(dir.path()).await;
        if case == "later" {
            fs::remove_file(&path).unwrap();
            pipe();
        }
        agent.signal(Signal::SIGUSR2);
        agent.signal(Signal::SIGHUP);
        agent.serving(dir.path()).await;
        ends(&mut agent);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
    }
}

/// A user database in which everybody has UID 7, and which answers nobody as long as a file is there.
struct SlowUsers {
    dir: tempfile::TempDir,
    /// Of the health checks.
    port: u16,
}

impl SlowUsers {
    /// `None` where there is no C compiler.
    fn build() -> Option<Self> {
        const SOURCE: &str = "#include <fcntl.h>\n#include <pwd.h>\n#include <stdlib.h>\n#include <unistd.h>\n\
            int getpwnam_r(const char *n, struct passwd *p, char *b, size_t l, struct passwd **r) {\n\
            close(open(getenv(\"ASKED\"), O_CREAT | O_WRONLY, 0600));\n\
            while (!access(getenv(\"HELD\"), F_OK)) usleep(10000);\n\
            *b = 0; p->pw_name = p->pw_passwd = p->pw_gecos = p->pw_dir = p->pw_shell = b;\n\
            p->pw_uid = p->pw_gid = 7; *r = p; return 0; }\n";
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("slow.c");
        fs::write(&source, SOURCE).unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).args([&dir.path().join("slow.so"), &source]);
        let built = compiler.status().is_ok_and(|status| status.success());
        if !built {
            println!("there is no C compiler: not tried");
        }
        built.then(|| Self { dir, port: port() })
    }

    /// An agent with this database.
    fn agent(&self) -> Killed {
        let at = |name: &str| self.dir.path().join(name);
        let log = fs::File::options().create(true).append(true).open(at("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
        command.args(["run", "--config"]).arg(at("agent.conf")).env_remove("KUBERNETES_SERVICE_HOST");
        command.env("LD_PRELOAD", at("slow.so")).env("HELD", at("held")).env("ASKED", at("asked"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        Killed(command.spawn().unwrap())
    }

    fn hold(&self) {
        fs::write(self.dir.path().join("held"), "").unwrap();
    }

    fn release(&self) {
        fs::remove_file(self.dir.path().join("held")).unwrap();
    }

    /// Waits until it is asked, and does not answer.
    fn asked(&self) {
        wait_for("the database is asked", || self.dir.path().join("asked").exists());
    }

    /// Writes a configuration in which `who`, a caller, has limits of its own.
    fn configure(&self, who: &str) {
        let blocks = format!(
            "health_checks {{ listener_enabled = true bind_address = \"127.0.0.1\" bind_port = {} }}\n\
             ratelimit {{ caller {{ override \"{who}\" {{ rate = 10 burst = 20 }} }} }}\n",
            self.port
        );
        write_config(self.dir.path(), &blocks);
    }

    fn live(&self) -> bool {
        probe(self.port).starts_with("HTTP/1.1 200")
    }
}

#[test]
fn a_start_that_waits_takes_signals() {
    let Some(users) = SlowUsers::build() else { return };
    users.configure("user:root");
    users.hold();
    let mut agent = users.agent();
    users.asked();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        agent.signal(signal);
    }
    agent.signal(Signal::SIGTERM);
    wait_for("it ends", || agent.0.try_wait().unwrap().is_some());
    assert!(agent.0.wait().unwrap().success(), "it was told to");

    // And one that is not told to end starts as soon as it can.
    fs::remove_file(users.dir.path().join("asked")).unwrap();
    let agent = users.agent();
    users.asked();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2] {
        agent.signal(signal);
    }
    users.release();
    wait_for("it is live", || users.live());
}

#[test]
fn a_reload_that_waits_keeps_no_signal_waiting() {
    let Some(users) = SlowUsers::build() else { return };
    // Numbers are not looked up.
    users.configure("uid:7");
    let mut agent = users.agent();
    wait_for("it is live", || users.live());
    users.hold();
    users.configure("user:root");
    agent.signal(Signal::SIGHUP);
    users.asked();
    for _ in 0..20 {
        agent.signal(Signal::SIGHUP);
        agent.signal(Signal::SIGUSR1);
        assert!(users.live());
    }
    agent.signal(Signal::SIGTERM);
    wait_for("it ends", || agent.0.try_wait().unwrap().is_some());
}

/// When a thread is needed, there may be none to be had: so they are there from the start, and no work makes more.
#[tokio::test(flavor = "multi_thread")]
async fn no_thread_comes_into_being_after_the_start() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/one", ""));
    let config = dir.path().join("agent.conf");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("agent {", "agent {\n workload_x509_svid_key_type = \"rsa-2048\""))
        .unwrap();
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    let threads = || fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap().count();
    let before = threads();
    let message = durward::api::proto::workload::X509svidRequest {};
    let stream = client.fetch_x509svid(request(message)).await.unwrap();
    assert!(stream.into_inner().message().await.unwrap().is_some(), "an RSA key is made");
    for signal in [Signal::SIGHUP, Signal::SIGUSR2] {
        agent.signal(signal);
    }
    // Longer than an idle thread would be kept.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(threads(), before);
}

/// A client that resets its calls is closed for it, and h2 has a warning about that each time.
#[test]
fn resets_do_not_fill_the_log() {
    /// POST, http and `/` of HPACK's static table: as many calls in one read as there can be.
    const SHORTEST: [u8; 3] = [0x83, 0x86, 0x84];
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/one", ""));
    let mut agent = Process::spawn(dir.path());
    let socket = dir.path().join("api.sock");
    wait_for("it serves", || UnixStream::connect(&socket).is_ok());
    for _ in 0..30 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut sent = stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).is_ok();
        for nth in 0..2_000 {
            let reset = frame(RST_STREAM, 0, 1 + 2 * nth, &8_u32.to_be_bytes());
            let call = frame(HEADERS, END_HEADERS, 1 + 2 * nth, &SHORTEST);
            sent = sent && stream.write_all(&[call, reset].concat()).is_ok();
        }
        // Closed by now, or soon.
        drop(stream.read_to_end(&mut Vec::new()));
    }
    ends(&mut agent);
    let log = log(dir.path());
    assert!(!log.contains("h2::") && !log.contains("hyper"), "{log}");
    assert!(log.lines().count() < 5, "{log}");
}
