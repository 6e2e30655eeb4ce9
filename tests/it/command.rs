//! The command beside a real agent: where it finds one, what it does when it is refused, and how it has one reload.

#![expect(clippy::disallowed_methods, reason = "its agents are processes, in threads that may sleep")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use crate::{
    frames::{PREFACE, SETTINGS, frame},
    hostile::PATIENCE,
    support::{Process, TRUST_DOMAIN, copy_program, entry, write_config},
};

/// An agent with an admin socket, as a process of its own.
struct Agent {
    dir: tempfile::TempDir,
    private: tempfile::TempDir,
    process: Process,
}

impl Agent {
    fn start(blocks: &str) -> Self {
        let (dir, private) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let agent = Self { process: Self::spawn(&dir, &private, blocks), dir, private };
        let began = Instant::now();
        while UnixStream::connect(agent.socket()).is_err() {
            assert!(began.elapsed() < PATIENCE, "{}", agent.log());
            thread::sleep(Duration::from_millis(20));
        }
        agent
    }

    fn spawn(dir: &tempfile::TempDir, private: &tempfile::TempDir, blocks: &str) -> Process {
        let admin = private.path().join("admin/admin.sock");
        let admin = format!("agent {{\n  admin_socket_path = \"{}\"\n}}\n", admin.display());
        talkative(dir.path(), &[&admin, blocks].concat());
        Process::spawn(dir.path())
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn admin(&self) -> PathBuf {
        self.private.path().join("admin/admin.sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn configure(&self, blocks: &str) {
        let admin = format!("agent {{\n  admin_socket_path = \"{}\"\n}}\n", self.admin().display());
        talkative(self.dir.path(), &[&admin, blocks].concat());
    }

    fn config(&self) -> String {
        fs::read_to_string(self.dir.path().join("agent.conf")).unwrap()
    }

    fn reload(&self, more: &[&str]) -> Output {
        let socket = self.admin();
        durward(
            &[&["reload", "--timeout", "60s", "--socket-path", socket.to_str().unwrap()], more].concat(),
            &[],
        )
    }
}

/// The configuration of an agent that says what it does.
fn talkative(dir: &Path, blocks: &str) {
    write_config(dir, blocks);
    let path = dir.join("agent.conf");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("log_level = \"warn\"", "log_level = \"info\"")).unwrap();
}

fn durward(words: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_durward"))
        .args(words)
        .env_remove("SPIFFE_ENDPOINT_SOCKET")
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_reload_ends_with_what_came_of_it() {
    let agent = Agent::start(&entry("/one", "id = \"one\""));
    agent.configure(&[entry("/one", "id = \"one\"\n  hint = \"x\""), entry("/two", "")].concat());
    let (code, out, err) = said(&agent.reload(&[]));
    assert_eq!((code, &*err), (Some(0), ""), "{out}");
    assert_eq!(out, "Reloaded: entries 1 added, 0 removed, 1 changed; bundles 0 changed.\n");
    let (code, out, err) = said(&agent.reload(&[]));
    assert_eq!((code, &*out, &*err), (Some(0), "Reloaded: nothing changed.\n", ""));

    let mistakes = "entry \"spiffe://other.org/x\" {\n  selectors = [\"unix:uid:0\"]\n}\nagent {\n  log_levle = \"info\"\n}\n";
    agent.configure(mistakes);
    let (code, out, err) = said(&agent.reload(&[]));
    assert_eq!((code, &*out), (Some(1), ""), "{err}");
    assert!(err.starts_with("not reloaded, the old configuration stays in force:\n"), "{err}");
    assert!(err.contains("log_levle") && err.contains("other.org"), "all of them: {err}");
    let status = || {
        let socket = agent.admin();
        said(&durward(&["status", "--socket-path", socket.to_str().unwrap()], &[])).1
    };
    assert!(status().contains("Wrong:        the last reload failed "), "{}", status());
    assert!(status().contains("log_levle"), "and why: {}", status());

    // A signal and a command at the same time: each is answered.
    agent.configure(&entry("/one", ""));
    agent.process.signal(Signal::SIGHUP);
    let all: Vec<Output> = thread::scope(|scope| {
        let asked: Vec<_> = (0..4).map(|_| scope.spawn(|| agent.reload(&[]))).collect();
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(all.iter().all(|output| output.status.success()), "{all:?}");
    assert!(status().contains("Wrong:        nothing"), "{}", status());

    // What nobody can have is in force, and said: each of some, and how many more.
    let ghost = |n: u32| {
        entry(&format!("/{n}"), "").replacen("unix:uid:", &format!("unix:user:no-such-user-{n}-"), 1)
    };
    agent.configure(&(0..10).map(ghost).collect::<String>());
    let (code, _, err) = said(&agent.reload(&[]));
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!((code, err.matches("Warning: entry \"spiffe://").count()), (Some(0), 8), "{err}");
    assert!(words(&err).ends_with("Warning: and 2 more entries: durward entry show."), "{err}");
    let shown = words(&status());
    assert!(shown.contains("entry \"spiffe://example.org/0\" asks for unix:user:no-such-user-0-"), "{shown}");
}

#[test]
fn what_needs_a_restart_is_told_by_the_command() {
    let agent = Agent::start(&entry("/one", ""));
    let before = agent.config();
    let own = format!("trust_domain = \"{TRUST_DOMAIN}\"");
    fs::write(agent.dir.path().join("agent.conf"), before.replace(&own, "trust_domain = \"other\"")).unwrap();
    let (code, _, err) = said(&agent.reload(&[]));
    let want = format!(
        "agent.trust_domain \"other\": cannot be changed from {TRUST_DOMAIN} to other by a reload: restart the agent\n"
    );
    assert!(code == Some(1) && err.ends_with(&want), "{err}");
    assert!(!err.contains("entry"), "the entries are right: {err}");
    fs::write(agent.dir.path().join("agent.conf"), before).unwrap();
    let health = format!("health_checks {{ socket_path = \"{}/h.sock\" }}", agent.dir.path().display());
    agent.configure(&[&entry("/one", ""), &*health].concat());
    let (code, _, err) = said(&agent.reload(&[]));
    assert_eq!(code, Some(1));
    assert!(err.contains("health_checks"), "{err}");

    // Each with where it is set.
    let text = agent.config().replace("  socket_path", "  log_format = \"json\"\n  socket_path");
    fs::write(agent.dir.path().join("agent.conf"), &text).unwrap();
    let line = text.lines().position(|line| line.contains("log_format")).unwrap() + 1;
    let (code, _, err) = said(&agent.reload(&[]));
    assert_eq!(code, Some(1));
    let want =
        format!("agent.conf:{line}:3: agent.log_format: cannot be changed from text to json by a reload");
    assert!(err.contains(&want), "{want} in {err}");
}

#[test]
fn a_file_that_was_named_and_is_not_there_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nofile.conf");
    for command in ["validate", "run"] {
        let (code, _, err) = said(&durward(&[command, "--config", path.to_str().unwrap()], &[]));
        assert_eq!(code, Some(1));
        let want = format!("{}: could not find config file\n", path.display());
        assert!(err.ends_with(&want) && !err.contains("flag"), "{command}: {err}");
    }
}

/// A misspelt issuer hides neither what is wrong in its block nor what is wrong with places.
#[test]
fn a_wrong_issuer_hides_no_other_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let (path, at) = (dir.path().join("agent.conf"), dir.path().display());
    let text = format!(
        "agent {{\n  trust_domain = \"example.org\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/data/api.sock\"\n}}\n\
         plugins {{ WorkloadAttestor \"unix\" {{ plugin_data {{ }} }} }}\nissuer \"embeded\" {{\n  ca_ttl = \"59s\"\n}}\n"
    );
    fs::write(&path, text).unwrap();
    for command in ["validate", "run"] {
        let (code, _, err) = said(&durward(&[command, "--config", path.to_str().unwrap()], &[]));
        let mistakes = [
            "agent.conf:4:3: agent.socket_path ",
            "agent.conf:7:8: issuer \"embeded\": unknown issuer: must be \"embedded\"",
            "agent.conf:8:3: issuer \"embeded\".ca_ttl \"59s\": must be from 1m to 87600h",
        ];
        assert_eq!(code, Some(1), "{command}: {err}");
        for mistake in mistakes {
            assert!(err.contains(mistake), "{command}: {mistake} in {err}");
        }
    }
}

/// With where it is set, and with every other mistake, whoever asks.
#[test]
fn a_file_for_lines_that_cannot_be_opened_is_named_once_and_where_it_is_set() {
    let dir = tempfile::tempdir().unwrap();
    let (path, at) = (dir.path().join("agent.conf"), dir.path().display());
    let missing = "cannot open it: no such file or directory";
    let log = |file: &str| format!("log_file = \"{at}{file}\"");
    let log_missing = format!("agent.conf:4:3: agent.log_file \"{at}/none/log\": {missing}");
    let audit = format!("audit {{ file = \"{at}/nowhere/audit\" }}\n");
    let audit_missing = format!("audit.file \"{at}/nowhere/audit\": {missing}");
    for (case, line, blocks, mistakes) in [
        (
            "a directory",
            &*log(""),
            "",
            &[&*format!("agent.conf:4:3: agent.log_file \"{at}\": is not a file")][..],
        ),
        ("the log alone", &*log("/none/log"), "", &[&*log_missing]),
        ("the audit alone", "", &*audit, &[&*audit_missing]),
        ("both", &*log("/none/log"), &*audit, &[&*log_missing, &*audit_missing]),
        (
            "beside mistakes of other kinds",
            &*format!("{} log_levle = \"info\"", log("/none/log")),
            &*format!(
                "{audit}health_checks {{ listener_enabled = true bind_address = \"192.0.2.1\" bind_port = 8080 }}"
            ),
            &[
                "agent.log_levle: unknown key",
                &*log_missing,
                &*audit_missing,
                "health_checks.bind_port \"8080\": cannot listen",
            ],
        ),
        (
            "not where the key itself is wrong",
            "log_file = [1]",
            &*audit,
            &["agent.conf:4:3: agent.log_file [ .. ]: must be", &*audit_missing],
        ),
    ] {
        talkative(dir.path(), blocks);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("  socket_path", &format!("  {line}\n  socket_path"))).unwrap();
        for command in ["validate", "run"] {
            let (code, _, err) = said(&durward(&[command, "--config", path.to_str().unwrap()], &[]));
            let listed = err.lines().filter(|line| line.contains("agent.conf:")).count();
            assert_eq!((code, listed), (Some(1), mistakes.len()), "{case}, {command}: {err}");
            for mistake in mistakes {
                assert!(err.contains(mistake), "{case}, {command}: {mistake} in {err}");
            }
        }
    }
}

/// An ordinary user may not listen at port 80, where health checks are by default, and hears so with the rest.
#[test]
fn a_port_that_the_agents_user_may_not_have_is_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    talkative(
        dir.path(),
        "health_checks {\n  listener_enabled = true\n  bind_address = \"127.0.0.1\"\n}\nlog { }\n",
    );
    let config = dir.path().join("agent.conf");
    let program = dir.path().join("durward");
    copy_program(&program);
    let is_root = nix::unistd::geteuid().is_root();
    let ordinary = if is_root { 65_534 } else { nix::unistd::geteuid().as_raw() };
    if is_root {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for path in [dir.path(), &config] {
            std::os::unix::fs::chown(path, Some(ordinary), Some(ordinary)).unwrap();
        }
    }
    let first_free: u16 =
        fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap().trim().parse().unwrap();
    if first_free <= 80 {
        // Here everybody may.
        return;
    }
    for command in ["validate", "run"] {
        let mut asked = Command::new(&program);
        asked.args([command, "--config"]).arg(&config);
        if is_root {
            std::os::unix::process::CommandExt::uid(&mut asked, ordinary);
            std::os::unix::process::CommandExt::gid(&mut asked, ordinary);
        }
        let (code, _, err) = said(&asked.output().unwrap());
        let want = "health_checks.bind_port \"80\": cannot listen at 127.0.0.1 port 80: permission denied; choose a port from 1024 \
                    on, or give the agent CAP_NET_BIND_SERVICE";
        assert!(code == Some(1) && err.contains(want), "{command}: {err}");
        assert!(err.contains("agent.conf:17:1: log: unknown"), "with the rest, {command}: {err}");
    }
}

#[test]
fn without_an_admin_socket_a_reload_is_a_signal_where_that_is_asked_for() {
    let agent = Agent::start(&entry("/one", ""));
    let nowhere = agent.dir.path().join("no.sock");
    let nowhere = ["reload", "--socket-path", nowhere.to_str().unwrap()];
    assert_eq!(durward(&nowhere, &[]).status.code(), Some(4));

    let pid = agent.process.pid().to_string();
    let (code, out, err) = said(&durward(&[&nowhere[..], &["--or-signal", &pid]].concat(), &[]));
    assert_eq!((code, &*err), (Some(0), ""));
    assert!(out.contains("SIGHUP"), "{out}");
    let began = Instant::now();
    while !agent.log().contains("reloaded") {
        assert!(began.elapsed() < PATIENCE, "{}", agent.log());
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!agent.log().contains("settings_changed"), "none has: {}", agent.log());
    let (code, _, err) = said(&durward(&[&nowhere[..], &["--or-signal", "-1"]].concat(), &[]));
    assert_eq!(code, Some(1), "no other process is meant: {err}");
}

/// Who has another identity than the one asked for, and who is blocked, is not told what does not help.
#[test]
fn advice_is_of_what_was_refused() {
    let uid = nix::unistd::geteuid();
    let blocked = format!("ratelimit {{ caller {{ override \"uid:{uid}\" {{ block = true }} }} }}\n");
    for (blocks, words, code, say, not) in [
        (
            String::new(),
            &["--spiffe-id", "spiffe://example.org/web"][..],
            3,
            "No registration entry for spiffe://example.org/web matches this process",
            "unix:uid",
        ),
        (
            blocked,
            &[],
            1,
            "The agent's configuration blocks this, and waiting does not help.",
            "durward limits",
        ),
    ] {
        let agent = Agent::start(&(entry("/one", "") + &blocks));
        let socket = agent.socket();
        let fetch = ["api", "fetch", "jwt", "--audience", "a", "--socket-path", socket.to_str().unwrap()];
        let (got, _, err) = said(&durward(&[&fetch[..], words].concat(), &[]));
        let err = err.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(got, Some(code), "{err}");
        assert!(err.contains(say) && err.contains("durward explain --pid") && !err.contains(not), "{err}");
    }
}

#[test]
fn an_address_is_taken_as_libraries_take_it() {
    let agent = Agent::start(&entry("/one", ""));
    let uri = format!("unix://{}", agent.socket().display());
    let fetch = ["api", "fetch", "jwt", "--audience", "a"];
    let flag = durward(&[&fetch[..], &["--socket-path", &uri]].concat(), &[]);
    assert!(flag.status.success(), "{flag:?}");

    // What a proxy offers: the agent itself listens at no port.
    let (listener, socket) = (TcpListener::bind("127.0.0.1:0").unwrap(), agent.socket());
    let tcp = format!("tcp://{}", listener.local_addr().unwrap());
    thread::spawn(move || {
        for client in listener.incoming().take(2) {
            proxy(client.unwrap(), &socket);
        }
    });
    for (words, environment) in [
        (&[&fetch[..], &["--socket-path", &tcp]].concat()[..], &[][..]),
        (&fetch[..], &[("SPIFFE_ENDPOINT_SOCKET", &*tcp)]),
    ] {
        let output = durward(words, environment);
        assert!(output.status.success(), "{output:?}");
    }
    let (code, _, err) = said(&durward(&fetch, &[("SPIFFE_ENDPOINT_SOCKET", "tcp://localhost:1")]));
    assert_eq!(code, Some(1));
    assert!(err.contains("tcp:// with an IP address and a port"), "{err}");
    let (code, _, err) = said(&durward(&fetch, &[("SPIFFE_ENDPOINT_SOCKET", "tcp://127.0.0.1:1")]));
    assert_eq!(code, Some(4), "{err}");
    assert!(err.contains("no agent answers at tcp://127.0.0.1:1"), "{err}");
}

/// Carries bytes both ways until one side ends.
fn proxy(client: std::net::TcpStream, socket: &Path) {
    let agent = UnixStream::connect(socket).unwrap();
    let (mut from, mut to) = (client.try_clone().unwrap(), agent.try_clone().unwrap());
    thread::spawn(move || {
        let _ended = std::io::copy(&mut from, &mut to).is_ok();
        drop(to.shutdown(std::net::Shutdown::Write));
    });
    let (mut agent, mut client) = (agent, client);
    let mut buffer = [0; 4096];
    while let Ok(more @ 1..) = agent.read(&mut buffer) {
        if client.write_all(&buffer[..more]).is_err() {
            return;
        }
    }
}

/// Who is told to come back soon does, and says why it waits; who would have to wait too long hears which limit it is.
#[test]
fn the_command_comes_back_when_it_is_told_to() {
    let limit = |per: &str| {
        format!(
            "ratelimit {{ caller {{ method \"FetchJWTSVID\" {{ rate = 1 per = \"{per}\" burst = 5 }} }} }}\n{}",
            entry("/one", "")
        )
    };
    let agent = Agent::start(&limit("second"));
    let socket = agent.socket();
    let fetch = || {
        durward(&["api", "fetch", "jwt", "--audience", "a", "--socket-path", socket.to_str().unwrap()], &[])
    };
    let fetched: Vec<_> = (0..8).map(|_| said(&fetch())).collect();
    assert!(fetched.iter().all(|(code, _, _)| *code == Some(0)), "{fetched:?}");
    let waited = fetched.iter().filter(|(_, _, err)| err.contains("rate limit exceeded")).count();
    assert!(waited > 0, "{fetched:?}");
    assert!(
        fetched.iter().all(|(_, _, err)| err.is_empty() || err.contains("trying again in")),
        "{fetched:?}"
    );

    agent.configure(&limit("hour"));
    assert!(agent.reload(&[]).status.success());
    let began = Instant::now();
    let (code, _, err) = loop {
        let told = said(&fetch());
        if told.0 != Some(0) {
            break told;
        }
        assert!(began.elapsed() < PATIENCE, "there were five tokens at most");
    };
    assert_eq!(code, Some(1));
    assert!(err.contains("ResourceExhausted") && err.contains("try again in"), "{err}");
}

/// One place for this user, which somebody else has half of the time: the command comes back until it is let in, and an agent
/// that is up is never called unhealthy. Where the place is never free the command says whom to ask.
#[test]
fn a_door_that_is_shut_for_a_moment_is_tried_again() {
    let limits = "ratelimit { gate { caller { connections = 1 } } }\n";
    let agent = Agent::start(&[limits, &entry("/one", "")].concat());
    let socket = agent.socket();
    let run =
        |words: &[&str]| said(&durward(&[words, &["--socket-path", socket.to_str().unwrap()]].concat(), &[]));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let held = hold(&socket);
                thread::sleep(Duration::from_millis(60));
                drop(held);
                thread::sleep(Duration::from_millis(60));
            }
        });
        let healthy: Vec<_> = (0..25).map(|_| run(&["healthcheck", "--verbose"])).collect();
        let fetched: Vec<_> = (0..5)
            .map(|_| {
                run(&["api", "fetch", "jwt", "--audience", "a", "--output", "token", "--timeout", "60s"])
            })
            .collect();
        over.store(true, Ordering::Relaxed);
        other.join().unwrap();
        assert!(healthy.iter().all(|(code, ..)| *code == Some(0)), "{healthy:#?}");
        assert!(
            fetched.iter().all(|(code, out, _)| *code == Some(0) && out.starts_with("ey")),
            "{fetched:#?}"
        );
    });

    let began = Instant::now();
    let _held = loop {
        let held = hold(&socket);
        if let Some(held) = held {
            break held;
        }
        assert!(began.elapsed() < PATIENCE, "the place is free at last");
    };
    for _ in 0..4 {
        let (code, _, err) = run(&["api", "fetch", "jwt", "--audience", "a", "--timeout", "300ms"]);
        let known = ["code = ResourceExhausted", "code = Unavailable desc = the agent at"];
        assert!(code == Some(1) && known.iter().any(|known| err.contains(known)), "{code:?} {err}");
        assert!(err.contains("durward limits"), "{err}");
        let (code, out, err) = run(&["healthcheck"]);
        assert!(code == Some(0) && out.contains("refuses this user"), "{code:?} {out} {err}");
    }
}

/// A connection that the agent lets in, if it does: it has read its SETTINGS, which hold something.
fn hold(socket: &Path) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).ok()?;
    let mut head = [0; 9];
    stream.read_exact(&mut head).ok()?;
    (head[..3] != [0; 3]).then_some(stream)
}

/// The admin socket has few places: whoever finds none says so, and waits for one.
#[test]
fn the_places_of_the_admin_socket_are_waited_for() {
    let agent = Agent::start(&entry("/one", ""));
    let admin = agent.admin();
    let show = |timeout: &str| {
        let words = ["entry", "show", "--timeout", timeout, "--socket-path", admin.to_str().unwrap()];
        said(&durward(&words, &[]))
    };
    let held: Vec<_> = (0..9).filter_map(|_| hold(&admin)).collect();
    assert_eq!(held.len(), 8, "as many as there are");
    let (code, out, err) = show("300ms");
    assert_eq!((code, &*out), (Some(1), ""));
    assert!(err.contains("places of the admin socket were taken"), "{err}");

    let all: Vec<_> = thread::scope(|scope| {
        let asked: Vec<_> = (0..12).map(|_| scope.spawn(|| show("60s"))).collect();
        drop(held);
        asked.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(all.iter().all(|(code, out, _)| *code == Some(0) && out.starts_with("1 entry")), "{all:#?}");
}

/// Who has no identity is told what to ask, as it is to be typed for the process that started the command.
#[test]
fn without_an_identity_the_command_says_what_to_ask() {
    let dir = tempfile::tempdir().unwrap();
    let other = entry("/other", "").replace("]", ", \"unix:gid:4000000001\"]");
    write_config(dir.path(), &other);
    let path = dir.path().join("agent.conf");
    let (old, socket) = (dir.path().join("api.sock"), dir.path().join("run/public/api.sock"));
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace(old.to_str().unwrap(), socket.to_str().unwrap())).unwrap();
    let _agent = Process::spawn(dir.path());
    let began = Instant::now();
    while UnixStream::connect(&socket).is_err() {
        assert!(began.elapsed() < PATIENCE, "it serves");
        thread::sleep(Duration::from_millis(20));
    }
    let (code, _, err) = said(&durward(
        &["api", "fetch", "jwt", "--audience", "a", "--socket-path", socket.to_str().unwrap()],
        &[],
    ));
    assert_eq!(code, Some(3), "{err}");
    let admin = dir.path().join("run/private/admin.sock");
    let want =
        format!("\n  durward explain --pid {} --socket-path {}\n", std::process::id(), admin.display());
    assert!(err.contains(&want), "{want} in {err}");
    let words = want.trim().split(' ').skip(1).collect::<Vec<_>>();
    let (code, out, err) = said(&durward(&words, &[]));
    assert_eq!((code, &*err), (Some(0), ""));
    assert!(out.contains("spiffe://example.org/other"), "{out}");
}

/// Where the output is the journal's each line begins with how severe it is; elsewhere none does.
#[test]
fn the_journal_is_told_how_severe_a_line_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let blocks = entry("/one", "");
    talkative(dir.path(), &blocks);
    fs::write(&path, "").unwrap();
    let stat = fs::metadata(&path).unwrap();
    let run = |stream: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
        command.arg("run").arg("--config").arg(dir.path().join("agent.conf")).env("JOURNAL_STREAM", stream);
        Process::of(command, &path)
    };
    let journal = format!("{}:{}", stat.dev(), stat.ino());
    for (case, stream, prefixed) in [("the journal", &*journal, true), ("redirected", "1:1", false)] {
        fs::write(&path, "").unwrap();
        let mut agent = run(stream);
        let began = Instant::now();
        let there = |text: &str| fs::read_to_string(&path).unwrap().contains(text);
        while !there("the workload api is served") {
            assert!(began.elapsed() < PATIENCE, "{case}");
            thread::sleep(Duration::from_millis(20));
        }
        fs::write(dir.path().join("agent.conf"), "agent {").unwrap();
        agent.signal(Signal::SIGHUP);
        while !there("not reloaded") {
            assert!(began.elapsed() < PATIENCE, "{case}");
            thread::sleep(Duration::from_millis(20));
        }
        agent.signal(Signal::SIGTERM);
        agent.wait();
        let log = fs::read_to_string(&path).unwrap();
        for line in log.lines() {
            let want = match line.split_whitespace().find(|word| word.chars().all(|c| c.is_ascii_uppercase()))
            {
                _ if !prefixed => "2",
                Some("ERROR") => "<3>2",
                Some("WARN") => "<4>2",
                Some("INFO") => "<6>2",
                other => panic!("{case}: {other:?} in {line}"),
            };
            assert!(line.starts_with(want), "{case}: {line}");
        }
        assert!(log.contains("ERROR") && log.contains("INFO"), "{case}: {log}");

        // One that does not start says so as an error too: `durward validate` and others, as their users expect.
        fs::write(&path, "").unwrap();
        assert!(!run(stream).wait().success());
        let log = fs::read_to_string(&path).unwrap();
        assert!(log.lines().all(|line| line.starts_with("<3>") == prefixed), "{case}: {log}");
        talkative(dir.path(), &blocks);
    }
}

/// A ConfigMap is swapped as the kubelet does it; nobody sends a signal.
#[test]
fn a_configuration_that_changes_is_reloaded_where_that_is_wanted() {
    let agent = Agent::start(&["agent {\n  watch_config = true\n}\n", &entry("/one", "")].concat());
    let path = agent.dir.path().join("agent.conf");
    let text = fs::read_to_string(&path).unwrap();
    let swap = |name: &str, text: &str| {
        let new = agent.dir.path().join(name);
        fs::write(&new, text).unwrap();
        fs::rename(&new, &path).unwrap();
    };
    let wait = |line: &str, times: usize| {
        let began = Instant::now();
        while agent.log().matches(line).count() < times {
            assert!(began.elapsed() < PATIENCE, "{line}: {}", agent.log());
            thread::sleep(Duration::from_millis(100));
        }
    };
    swap("a", &[&text, &*entry("/two", "")].concat());
    wait("entries_added=1", 1);
    // A mistake is told once, and what puts it right is taken.
    swap("b", "agent {");
    wait("not reloaded", 1);
    thread::sleep(Duration::from_secs(5));
    assert_eq!(agent.log().matches("not reloaded").count(), 1, "{}", agent.log());
    swap("c", &text);
    wait("entries_removed=1", 1);
    let drop_ins = agent.dir.path().join("entries.d");
    fs::create_dir(&drop_ins).unwrap();
    fs::write(drop_ins.join("a.conf"), entry("/three", "")).unwrap();
    wait("entries_added=1", 2);
    // Somebody who never has done with writing holds no change up for ever.
    let (before, began) = (agent.log().matches("reloaded").count(), Instant::now());
    for nth in 0.. {
        if agent.log().matches("reloaded").count() > before {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{}", agent.log());
        fs::write(drop_ins.join(format!("n{nth}.conf")), entry(&format!("/n{nth}"), "")).unwrap();
        thread::sleep(Duration::from_millis(300));
    }
}

/// What drop-in files said is given up by whoever takes them away one by one, and not because a volume or what a link leads to is
/// missing for a moment.
#[test]
fn a_directory_of_drop_in_files_that_is_gone_takes_no_entry_away() {
    let agent = Agent::start(&entry("/one", ""));
    let at = |name: &str| agent.dir.path().join(name);
    let entries = || {
        let socket = agent.admin();
        let (_, shown, _) =
            said(&durward(&["entry", "show", "--socket-path", socket.to_str().unwrap()], &[]));
        shown.matches("spiffe://example.org/").count()
    };
    let reloads = |case: &str, wrong: Option<&str>, left: usize| {
        let (code, out, err) = said(&agent.reload(&[]));
        assert_eq!(code == Some(0), wrong.is_none(), "{case}: {out}{err}");
        let told = err.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(wrong.is_none_or(|wrong| told.contains(wrong)), "{case}: {told}");
        assert_eq!(entries(), left, "{case}");
    };
    let validates = || durward(&["validate", "--config", at("agent.conf").to_str().unwrap()], &[]);
    reloads("there never was one", None, 1);
    fs::create_dir(at("real")).unwrap();
    std::os::unix::fs::symlink(at("real"), at("entries.d")).unwrap();
    reloads("it is empty", None, 1);
    fs::remove_file(at("entries.d")).unwrap();
    reloads("an empty one is gone", None, 1);
    std::os::unix::fs::symlink(at("real"), at("entries.d")).unwrap();
    fs::write(at("real/two.conf"), entry("/two", "")).unwrap();
    reloads("it has a file", None, 2);
    fs::rename(at("real"), at("aside")).unwrap();
    let dangling = "entries.d is a link to what is not there";
    reloads("its link leads nowhere", Some(dangling), 2);
    let (code, _, err) = said(&validates());
    assert!(code == Some(1) && err.replace('\n', " ").contains("is a link to what is not there"), "{err}");
    fs::remove_file(at("entries.d")).unwrap();
    reloads("it is gone", Some("is gone, and held 1 drop-in file at the last load"), 2);
    assert!(validates().status.success(), "a start would do without");
    fs::create_dir(at("entries.d")).unwrap();
    reloads("it was made again, empty", None, 1);
}
