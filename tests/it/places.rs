//! The directories and files that an agent is told of, where others than its user could change them; and that ordinary
//! layouts are served.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, lchown, symlink},
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use durward::{
    api::proto::workload as pb,
    peer::{Socket, socket::BindError},
};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::{Pid, geteuid},
};

use crate::{
    hostile::{NEIGHBOUR, PATIENCE},
    support::{Process, TRUST_DOMAIN, entry, request, write_config},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_durward");

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// A bundle whose one key is the base point of its curve.
const BUNDLE: &str = r#"{"keys": [{"use": "jwt-svid", "kid": "a", "kty": "EC", "crv": "P-256",
    "x": "axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY", "y": "T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU"}]}"#;

/// Ends by itself where it must not start: bounded, since one that starts serves for ever.
fn run(program: &Path, config: &Path, set: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--signal=TERM", "20"]).arg(program).args(["run", "--config"]).arg(config);
    set(&mut command);
    command.stdin(Stdio::null()).output().unwrap()
}

fn validate(config: &Path) -> Output {
    Command::new(PROGRAM).args(["validate", "--config"]).arg(config).output().unwrap()
}

/// By another process: a child of another test's that has this file open to write would keep it from being run.
fn copy_program(to: &Path) {
    assert!(Command::new("cp").arg(PROGRAM).arg(to).status().unwrap().success());
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A configuration of its own in `at`, with everything in directories that can be told apart.
fn layout(at: &Path) -> PathBuf {
    for dir in ["etc", "etc/entries.d", "fed", "run", "log"] {
        fs::create_dir(at.join(dir)).unwrap();
        chmod(&at.join(dir), 0o755);
    }
    let here = at.display();
    let config = format!(
        "agent {{\n  trust_domain = \"{TRUST_DOMAIN}\"\n  data_dir = \"{here}/data\"\n  socket_path = \"{here}/run/api.sock\"\n  \
         log_file = \"{here}/log/agent.log\"\n  log_level = \"warn\"\n}}\n\
         plugins {{\n  WorkloadAttestor \"unix\" {{\n    plugin_data {{ }}\n  }}\n}}\nissuer \"embedded\" {{ }}\n\
         federation \"other.example\" {{\n  bundle_path = \"{here}/fed/bundle.json\"\n  bundle_format = \"spiffe\"\n}}\n"
    );
    for (name, text) in [
        ("etc/agent.conf", &*config),
        ("etc/entries.d/a.conf", &entry("/web", "")),
        ("fed/bundle.json", BUNDLE),
    ] {
        fs::write(at.join(name), text).unwrap();
        chmod(&at.join(name), 0o644);
    }
    at.join("etc/agent.conf")
}

fn layout_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    chmod(dir.path(), 0o755);
    layout(dir.path());
    dir
}

/// What of the layout somebody else could change, and how.
fn writable_places() -> Vec<(&'static str, u32)> {
    vec![
        ("etc", 0o777),
        ("etc", 0o775),
        ("etc/agent.conf", 0o666),
        ("etc/agent.conf", 0o664),
        ("etc/entries.d", 0o777),
        ("etc/entries.d", 0o1777),
        ("etc/entries.d/a.conf", 0o646),
        ("fed", 0o777),
        ("fed/bundle.json", 0o664),
        ("run", 0o777),
        ("run", 0o775),
        ("log", 0o777),
    ]
}

/// Root's agent believes nobody's directories.
fn foreign_places() -> Vec<&'static str> {
    if geteuid().is_root() {
        vec![
            "etc",
            "etc/agent.conf",
            "etc/entries.d",
            "etc/entries.d/a.conf",
            "fed",
            "fed/bundle.json",
            "run",
            "log",
        ]
    } else {
        Vec::new()
    }
}

#[test]
fn nothing_starts_where_others_can_change_what_it_reads() {
    let refused = |case: &str, dir: &Path, place: &str| {
        let config = dir.join("etc/agent.conf");
        for (what, got) in
            [("run", run(Path::new(PROGRAM), &config, |_| {})), ("validate", validate(&config))]
        {
            let said = text(&got.stderr) + &text(&got.stdout);
            let place = dir.join(place);
            assert_eq!(got.status.code(), Some(1), "{what}, {case}: {said}");
            assert!(blames(&said, &place), "{what}, {case}: {said}");
            // What a stranger owns may be his home: only what was asked for by its name is worth a command.
            let command = format!(" {}, or choose another place)", place.display());
            let copy = ["etc", "fed", "log"].iter().any(|dir| case == format!("{dir} of somebody else"));
            assert_eq!(said.contains(&command), !copy, "{what}, {case}: {said}");
            assert_eq!(said.contains("such as /etc/durward, or"), copy, "{what}, {case}: {said}");
        }
        assert!(
            !dir.join("run/api.sock").exists() && !dir.join("data").exists(),
            "{case}: something was made"
        );
    };
    for (place, mode) in writable_places() {
        let dir = layout_dir();
        chmod(&dir.path().join(place), mode);
        refused(&format!("{place} with mode {mode:04o}"), dir.path(), place);
    }
    for place in foreign_places() {
        let dir = layout_dir();
        chown(dir.path().join(place), Some(NEIGHBOUR), None).unwrap();
        refused(&format!("{place} of somebody else"), dir.path(), place);
    }
    let dir = layout_dir();
    let valid = validate(&dir.path().join("etc/agent.conf"));
    assert!(valid.status.success(), "{}", text(&valid.stderr));
}

/// Each in turn: the reload is refused, says why, and nothing has changed; put right, it is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_looks_at_every_directory_again() {
    let dir = tempfile::tempdir().unwrap();
    let config = layout(dir.path());
    let mut command = Command::new(PROGRAM);
    command.args(["run", "--config"]).arg(&config);
    let mut agent = Process::of(command, &dir.path().join("out"));
    let socket = dir.path().join("run/api.sock");
    let mut client = agent.serving_at(&socket, &dir.path().join("out")).await;
    let log = || fs::read_to_string(dir.path().join("log/agent.log")).unwrap_or_default();
    let mut refused = 0;
    for (place, open) in writable_places() {
        let path = dir.path().join(place);
        let right = mode(&path);
        chmod(&path, open);
        agent.signal(Signal::SIGHUP);
        refused += 1;
        let until = tokio::time::Instant::now() + PATIENCE;
        while log().matches("not reloaded").count() < refused {
            assert!(tokio::time::Instant::now() < until, "{place} {open:o}: {}", log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let last = log().lines().last().unwrap().to_owned();
        assert!(blames(&last, &path), "{place} {open:o}: {last}");
        chmod(&path, right);
    }
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().svids.len(), 1, "what was in force still is");
    fs::write(dir.path().join("etc/entries.d/a.conf"), [entry("/web", ""), entry("/two", "")].concat())
        .unwrap();
    agent.signal(Signal::SIGHUP);
    let next = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap();
    assert_eq!(next.unwrap().unwrap().svids.len(), 2, "put right, it is done");
}

/// What a living agent has is told as a port is that somebody has, and nobody connects to find out.
#[tokio::test(flavor = "multi_thread")]
async fn validate_tells_what_a_living_agent_holds() {
    let dir = layout_dir();
    let config = dir.path().join("etc/agent.conf");
    let warnings = || {
        let got = validate(&config);
        assert!(got.status.success(), "{}", text(&got.stderr));
        text(&got.stderr)
    };
    assert!(!warnings().contains("in use"), "{}", warnings());
    let mut command = Command::new(PROGRAM);
    command.args(["run", "--config"]).arg(&config);
    let mut agent = Process::of(command, &dir.path().join("out"));
    drop(agent.serving_at(&dir.path().join("run/api.sock"), &dir.path().join("out")).await);
    let said = warnings();
    const SYSTEMD: &str = " or by systemd, which holds its socket";
    for (key, at, or_systemd) in [
        ("data_dir", "data", ""),
        ("socket_path", "run/api.sock", SYSTEMD),
        ("admin_socket_path", "private/admin.sock", SYSTEMD),
    ] {
        let at = dir.path().join(at);
        let want =
            format!(": agent.{key}: {} is in use now, perhaps by a running agent{or_systemd}.", at.display());
        assert!(said.contains(&want), "{want}: {said}");
    }
    // Left behind, they are in nobody's way.
    agent.signal(Signal::SIGKILL);
    agent.wait();
    assert!(!warnings().contains("in use"), "{}", warnings());

    // Whoever listens there, by whatever name, is in the way of a start.
    let (socket, run) = (dir.path().join("run/api.sock"), dir.path().join("run"));
    let is_told = || {
        let said = warnings();
        assert!(!said.contains("admin.sock"), "{said}");
        said.contains(&format!("{} is in use now", socket.display()))
    };
    fs::remove_file(&socket).unwrap();
    let way = dir.path().join("way");
    symlink(&run, &way).unwrap();
    let listener = UnixListener::bind(way.join("api.sock")).unwrap();
    assert!(is_told());
    listener.set_nonblocking(true).unwrap();
    let connected = listener.accept().map(|_| ()).map_err(|error| error.kind());
    assert_eq!(connected, Err(std::io::ErrorKind::WouldBlock), "to connect could start something");
    drop(listener);
    fs::remove_file(&socket).unwrap();

    let opened = fs::File::open(&run).unwrap();
    let own_name = format!("/proc/self/fd/{}/api.sock", opened.as_raw_fd());
    let listener = UnixListener::bind(own_name).unwrap();
    assert!(is_told());
    drop(listener);
    assert!(!is_told(), "it is dead");
}

/// Who validates does it for the user whom the service manager gave `data_dir`, and is told so. An agent of root's own does
/// not start.
#[test]
fn a_configuration_is_validated_as_the_agent_would() {
    if !geteuid().is_root() {
        println!("nothing can be given to anybody: left out");
        return;
    }
    let dir = layout_dir();
    let config = dir.path().join("etc/agent.conf");
    for place in ["data", "run", "log"] {
        fs::create_dir_all(dir.path().join(place)).unwrap();
        chown(dir.path().join(place), Some(NEIGHBOUR), None).unwrap();
    }
    let got = validate(&config);
    assert!(got.status.success(), "{}", text(&got.stderr));
    assert!(
        text(&got.stderr).contains(&format!("an agent that runs as user {NEIGHBOUR}")),
        "{}",
        text(&got.stderr)
    );
    assert_eq!(run(Path::new(PROGRAM), &config, |_| {}).status.code(), Some(1));

    // Who can make directories there could have made this one himself.
    chmod(dir.path(), 0o1777);
    let got = validate(&config);
    assert_eq!(got.status.code(), Some(1), "{}", text(&got.stderr));
}

/// Files of the agent's user are his, whoever validates; and those of who validates are not the agent's.
#[test]
fn who_validates_is_not_who_is_trusted() {
    if !geteuid().is_root() {
        println!("nothing can be given to anybody: left out");
        return;
    }
    let program = tempfile::tempdir().unwrap();
    chmod(program.path(), 0o755);
    copy_program(&program.path().join("durward"));
    let by = |user: u32, config: &Path| {
        let mut command = Command::new(program.path().join("durward"));
        command.args(["validate", "--config"]).arg(config).current_dir("/");
        command.uid(user).gid(user).output().unwrap()
    };
    let all = [
        "etc",
        "etc/agent.conf",
        "etc/entries.d",
        "etc/entries.d/a.conf",
        "fed",
        "fed/bundle.json",
        "run",
        "log",
    ];
    let given = |owners: u32, data: u32| {
        let dir = layout_dir();
        fs::create_dir(dir.path().join("data")).unwrap();
        for (place, owner) in all.into_iter().map(|place| (place, owners)).chain([("data", data)]) {
            chown(dir.path().join(place), Some(owner), Some(owner)).unwrap();
        }
        dir
    };
    for (case, owners, data, user, valid) in [
        ("the agent's, by root", NEIGHBOUR, NEIGHBOUR, 0, true),
        ("the agent's, by himself", NEIGHBOUR, NEIGHBOUR, NEIGHBOUR, true),
        ("root's, by somebody", 0, 0, NEIGHBOUR, true),
        ("somebody's, by himself, the agent is root's", NEIGHBOUR, 0, NEIGHBOUR, false),
        ("somebody's, by root, the agent is root's", NEIGHBOUR, 0, 0, false),
    ] {
        let dir = given(owners, data);
        let got = by(user, &dir.path().join("etc/agent.conf"));
        assert_eq!(got.status.success(), valid, "{case}: {}", text(&got.stderr));
    }
    // Without data_dir the directory tells in which it would be made.
    let dir = given(NEIGHBOUR, 0);
    fs::remove_dir(dir.path().join("data")).unwrap();
    let config = dir.path().join("etc/agent.conf");
    let got = by(NEIGHBOUR, &config);
    assert!(!got.status.success());
    let want = format!("user {NEIGHBOUR} cannot make it in {}: permission denied", dir.path().display());
    assert!(text(&got.stderr).contains(&want), "who would run it: {want} in {}", text(&got.stderr));
    chown(dir.path(), Some(NEIGHBOUR), None).unwrap();
    let got = by(0, &config);
    assert!(got.status.success(), "{}", text(&got.stderr));
    // One that is there, and may not be written to.
    let data = dir.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o500)).unwrap();
    chown(&data, Some(NEIGHBOUR), None).unwrap();
    let got = by(NEIGHBOUR, &config);
    let want = format!("user {NEIGHBOUR} cannot make a file in {}: permission denied", data.display());
    assert!(text(&got.stderr).contains(&want), "{want} in {}", text(&got.stderr));

    // Root reads everything, the agent does not.
    for (place, mode) in [("etc/agent.conf", 0o600), ("etc", 0o700), ("etc/entries.d/a.conf", 0o640)] {
        let dir = given(NEIGHBOUR, NEIGHBOUR);
        chown(dir.path().join(place), Some(0), Some(0)).unwrap();
        chmod(&dir.path().join(place), mode);
        let got = by(0, &dir.path().join("etc/agent.conf"));
        let said = text(&got.stderr);
        assert!(!got.status.success() && said.contains("permission denied"), "{place}: {said}");
    }
}

/// Each would keep the agent from starting.
#[test]
fn validate_looks_at_every_place_that_a_start_needs() {
    type Change = fn(&Path);
    let cases: [(&str, &str, Change, &str); 24] = [
        ("all is well", "", |_| {}, ""),
        (
            "metrics in everybody's directory",
            "telemetry { Prometheus { socket_path = \"HERE/open/m.sock\" } }",
            |at| {
                fs::create_dir(at.join("open")).unwrap();
                chmod(&at.join("open"), 0o777);
            },
            "telemetry.Prometheus.socket_path",
        ),
        (
            "health in everybody's directory",
            "health_checks { socket_path = \"HERE/open/h.sock\" }",
            |at| {
                fs::create_dir(at.join("open")).unwrap();
                chmod(&at.join("open"), 0o777);
            },
            "health_checks.socket_path",
        ),
        (
            "a file at the socket of metrics",
            "telemetry { Prometheus { socket_path = \"HERE/run/m.sock\" } }",
            |at| fs::write(at.join("run/m.sock"), "").unwrap(),
            "m.sock\": is not a socket",
        ),
        (
            "the lock of the other",
            "health_checks { socket_path = \"HERE/run/api.sock.lock\" }",
            |_| {},
            "is the lock file of agent.socket_path",
        ),
        (
            "the other, by a link",
            "health_checks { socket_path = \"HERE/link/api.sock\" }",
            |at| symlink("run", at.join("link")).unwrap(),
            "is also agent.socket_path",
        ),
        ("no directory for the log", "", |at| fs::remove_dir(at.join("log")).unwrap(), "agent.log_file"),
        (
            "a directory for the lock",
            "",
            |at| fs::create_dir(at.join("run/api.sock.lock")).unwrap(),
            "api.sock.lock is not a regular file, and the socket needs it as its lock",
        ),
        (
            "a directory for the log",
            "audit { file = \"HERE/log/audit\" }",
            |at| fs::create_dir(at.join("log/audit")).unwrap(),
            "audit\": is not a file",
        ),
        (
            "a log behind a link that leads nowhere",
            "audit { file = \"HERE/log/audit\" }",
            |at| symlink("nowhere/audit", at.join("log/audit")).unwrap(),
            "cannot open",
        ),
        (
            "a socket in /proc",
            "health_checks { socket_path = \"/proc/nowhere/h.sock\" }",
            |_| {},
            " cannot make it in /proc: ",
        ),
        (
            "a socket in /sys",
            "telemetry { Prometheus { socket_path = \"/sys/m.sock\" } }",
            |_| {},
            " cannot make it in /sys: ",
        ),
        (
            "a socket of TCP",
            "health_checks { socket_path = \"tcp://127.0.0.1:80\" }",
            |_| {},
            "neither an address of TCP nor an abstract socket",
        ),
        (
            "a socket without a name",
            "health_checks { socket_path = \"HERE/run/\" }",
            |_| {},
            "must end in the name",
        ),
        (
            "an abstract socket",
            "health_checks { socket_path = \"@durward\" }",
            |_| {},
            "neither an address of TCP nor an abstract socket",
        ),
        (
            "more connections than descriptors: elsewhere there may be more",
            "ratelimit { gate { connections = 1000000 } }",
            |_| {},
            "",
        ),
        ("keys that are damaged", "", |at| keep(&at.join("data/issuer.json"), "{"), "issuer.json is damaged"),
        (
            "a directory for the keys",
            "",
            |at| fs::create_dir_all(at.join("data/issuer.json")).unwrap(),
            "/data/issuer.json is not a regular file",
        ),
        (
            "a directory for keys that are not written to their end",
            "",
            |at| fs::create_dir_all(at.join("data/issuer.json.new")).unwrap(),
            "/data/issuer.json.new is not a regular file",
        ),
        (
            "a directory for the lock of the keys",
            "",
            |at| fs::create_dir_all(at.join("data/issuer.lock")).unwrap(),
            "/data/issuer.lock is not a regular file",
        ),
        (
            "a link for the lock of the keys",
            "",
            |at| {
                keep(&at.join("data/other"), "");
                symlink("other", at.join("data/issuer.lock")).unwrap();
            },
            "/data/issuer.lock is a symbolic link, which is not followed",
        ),
        (
            "a CA that is none",
            "CA",
            |at| {
                fs::write(at.join("etc/ca.pem"), "").unwrap();
                fs::write(at.join("etc/ca.key"), "").unwrap();
                chmod(&at.join("etc/ca.key"), 0o600);
            },
            "no private key could be read from it",
        ),
        ("no CA", "CA", |_| {}, "ca_cert_path"),
        ("no key", "CA", |at| fs::write(at.join("etc/ca.pem"), "").unwrap(), "ca_key_path"),
    ];
    for (case, block, change, want) in cases {
        let dir = layout_dir();
        let config = dir.path().join("etc/agent.conf");
        configure(&config, block);
        change(dir.path());
        let got = validate(&config);
        let said = text(&got.stderr);
        assert_eq!(got.status.success(), want.is_empty(), "{case}: {said}");
        assert!(said.contains(want), "{case}: {said}");
    }
}

/// A file of the agent's, in a directory of his.
fn keep(file: &Path, text: &str) {
    let dir = file.parent().unwrap();
    fs::create_dir_all(dir).unwrap();
    chmod(dir, 0o700);
    fs::write(file, text).unwrap();
    chmod(file, 0o600);
}

/// The configuration of an agent of a SPIRE Server.
fn joined(at: &Path, agent: &str, plugins: &str) -> PathBuf {
    let (config, here) = (at.join("etc/agent.conf"), at.display().to_string());
    let text = format!(
        "agent {{\n  trust_domain = \"{TRUST_DOMAIN}\"\n  data_dir = \"HERE/data\"\n  \
         socket_path = \"HERE/run/api.sock\"\n  server_address = \"localhost\"\n  server_port = 8081\n  \
         entries_dir = \"HERE/log\"\n  {agent}\n}}\n\
         plugins {{\n  {plugins}\n  WorkloadAttestor \"unix\" {{ plugin_data {{ }} }}\n}}\n"
    );
    fs::write(&config, text.replace("HERE", &here)).unwrap();
    config
}

/// What ends the start of an agent of a SPIRE Server, or keeps it from joining for ever.
#[test]
fn validate_looks_at_what_an_agent_of_a_server_keeps() {
    type Change = fn(&Path);
    let cases: [(&str, &str, Change, &str); 17] = [
        ("all is well", "HERE/keys", |_| {}, ""),
        ("keys in /sys", "/sys/keys", |_| {}, "directory \"/sys/keys\": user 0 cannot make it in /sys: "),
        (
            "keys in /proc",
            "/proc/1/keys",
            |_| {},
            "directory \"/proc/1/keys\": user 0 cannot make it in /proc/1: ",
        ),
        (
            "keys that others read",
            "HERE/keys",
            |at| {
                keep(&at.join("keys/keys.json"), "{}");
                chmod(&at.join("keys/keys.json"), 0o644);
            },
            "keys.json has mode 0644",
        ),
        (
            "keys that are empty",
            "HERE/keys",
            |at| keep(&at.join("keys/keys.json"), ""),
            "keys.json is damaged",
        ),
        (
            "keys that are none",
            "HERE/keys",
            |at| keep(&at.join("keys/keys.json"), "?"),
            "keys.json is damaged",
        ),
        (
            "a directory for the keys",
            "HERE/keys",
            |at| {
                fs::create_dir_all(at.join("keys/keys.json")).unwrap();
            },
            "/keys/keys.json is not a regular file",
        ),
        (
            "a link for the keys",
            "HERE/keys",
            |at| {
                keep(&at.join("keys/other"), "{}");
                symlink("other", at.join("keys/keys.json")).unwrap();
            },
            "/keys/keys.json is a symbolic link",
        ),
        (
            "a directory for keys that are not written to their end",
            "HERE/keys",
            |at| {
                fs::create_dir_all(at.join("keys/keys.json.tmp")).unwrap();
            },
            "/keys/keys.json.tmp is not a regular file",
        ),
        (
            "data that others read",
            "HERE/keys",
            |at| {
                keep(&at.join("data/agent-data.json"), "{}");
                chmod(&at.join("data/agent-data.json"), 0o640);
            },
            "agent-data.json has mode 0640",
        ),
        (
            "data that is empty",
            "HERE/keys",
            |at| keep(&at.join("data/agent-data.json"), ""),
            "agent-data.json is damaged",
        ),
        (
            "data that is none",
            "HERE/keys",
            |at| keep(&at.join("data/agent-data.json"), "["),
            "agent-data.json is damaged",
        ),
        (
            "a directory for the data",
            "HERE/keys",
            |at| {
                fs::create_dir_all(at.join("data/agent-data.json")).unwrap();
            },
            "/data/agent-data.json is not a regular file",
        ),
        (
            "a directory for data that is not written to its end",
            "HERE/keys",
            |at| {
                fs::create_dir_all(at.join("data/agent-data.json.tmp")).unwrap();
            },
            "/data/agent-data.json.tmp is not a regular file",
        ),
        (
            "a directory for the lock",
            "HERE/keys",
            |at| {
                fs::create_dir_all(at.join("data/durward.lock")).unwrap();
            },
            "/data/durward.lock is not a regular file",
        ),
        (
            "what is not written to its end is no directory",
            "HERE/keys",
            |at| {
                keep(&at.join("data/agent-data.json.tmp"), "");
                keep(&at.join("keys/keys.json.tmp"), "");
            },
            "",
        ),
        ("keys beside the data", "HERE/data", |at| keep(&at.join("data/agent-data.json"), "{}"), ""),
    ];
    for (case, keys, change, want) in cases {
        let dir = layout_dir();
        let plugins = format!(
            "NodeAttestor \"join_token\" {{ plugin_data {{ }} }}\n  \
             KeyManager \"disk\" {{ plugin_data {{ directory = \"{keys}\" }} }}"
        );
        let config = joined(dir.path(), "insecure_bootstrap = true", &plugins);
        change(dir.path());
        let got = validate(&config);
        let said = text_of(&got);
        assert_eq!(got.status.success(), want.is_empty(), "{case}: {said}");
        let want = want.replace("user 0", &format!("user {}", geteuid()));
        assert!(said.contains(&want), "{case}: {said}");
    }
    let read_only = "mkdir -m 700 \"$1/keys\" && mount -t tmpfs -o ro,mode=700 none \"$1/keys\" || exit 77; \
                     exec \"$2\" validate --config \"$1/etc/agent.conf\"";
    for (keys, what) in [("HERE/keys", "a file"), ("HERE/keys/below", "it")] {
        let dir = layout_dir();
        let plugins = format!(
            "NodeAttestor \"join_token\" {{ plugin_data {{ }} }}\n  \
             KeyManager \"disk\" {{ plugin_data {{ directory = \"{keys}\" }} }}"
        );
        joined(dir.path(), "insecure_bootstrap = true", &plugins);
        let Some(got) = mounted(dir.path(), read_only) else { return };
        let said = text_of(&got);
        assert_eq!(got.status.code(), Some(1), "{keys}: {said}");
        let place = dir.path().join("keys");
        let want = format!("cannot make {what} in {}: read-only file system", place.display());
        assert!(said.contains(&want), "{keys}: {said}");
    }
}

/// A token of Kubernetes' may come yet: what is wrong with it is told.
#[test]
fn validate_tells_that_a_pod_has_no_token() {
    for (case, token, want) in [
        ("none", None, "cannot open "),
        ("empty", Some(&b""[..]), "etc/token is empty; the agent waits for it"),
        ("no text", Some(&[0xff]), "etc/token holds no token"),
        ("one", Some(b"x"), ""),
    ] {
        let dir = layout_dir();
        let plugins = "NodeAttestor \"k8s_psat\" { plugin_data { cluster = \"c\" token_path = \"HERE/etc/token\" } }\n  \
                       KeyManager \"memory\" { plugin_data { } }";
        let config = joined(dir.path(), "insecure_bootstrap = true", plugins);
        if let Some(token) = token {
            fs::write(dir.path().join("etc/token"), token).unwrap();
        }
        let got = validate(&config);
        let said = text_of(&got);
        assert!(got.status.success(), "{case}: {said}");
        let warning = ": plugins.NodeAttestor \"k8s_psat\".plugin_data.token_path: ";
        assert_eq!(said.contains(warning), !want.is_empty(), "{case}: {said}");
        assert!(said.contains(want), "{case}: {said}");
    }
}

/// A start writes its first keys, and needs no room once they are there.
#[test]
fn validate_sees_that_there_is_no_room_for_keys() {
    let validates = "\"$2\" validate --config \"$1/etc/agent.conf\"";
    let runs = "timeout --signal=TERM 20 \"$2\" run --config \"$1/etc/agent.conf\"";
    let made = format!(
        "{runs} & agent=$!; until [ -s \"$1/data/issuer.json\" ]; do kill -0 $agent || exit 1; sleep 0.05; done; \
         kill $agent; wait $agent; "
    );
    for (case, before, filled, command, want) in [
        ("full", "", "1M", validates, "agent.data_dir"),
        ("full", "", "1M", runs, "agent.data_dir"),
        ("almost full", "", "60k", validates, ""),
        ("full, and keys are there", made.as_str(), "1M", validates, ""),
    ] {
        let dir = layout_dir();
        let script = format!(
            "mkdir \"$1/data\" && mount -t tmpfs -o size=64k,mode=700 none \"$1/data\" || exit 77; {before}\
             head -c {filled} /dev/zero >\"$1/data/other\" 2>/dev/null; {command}"
        );
        let Some(got) = mounted(dir.path(), &script) else { return };
        let said = text_of(&got);
        assert_eq!(got.status.success(), want.is_empty(), "{case}: {said}");
        assert!(said.contains(want), "{case}: {said}");
        assert_eq!(said.contains("no space is left"), !want.is_empty(), "{case}: {said}");
    }
}

/// What an agent of a SPIRE Server would wait for is no error: it may have joined before.
#[test]
fn validate_tells_what_is_missing_to_join() {
    let dir = layout_dir();
    let (config, here) = (dir.path().join("etc/agent.conf"), dir.path().display());
    let bundle = dir.path().join("etc/bundle.pem");
    let text = format!(
        "agent {{\n  trust_domain = \"{TRUST_DOMAIN}\"\n  data_dir = \"{here}/data\"\n  socket_path = \"{here}/run/api.sock\"\n  \
         server_address = \"localhost\"\n  server_port = 8081\n  trust_bundle_path = \"{}\"\n  \
         join_token_file = \"{here}/etc/token\"\n  entries_dir = \"{here}/log\"\n}}\n\
         plugins {{\n  NodeAttestor \"join_token\" {{ plugin_data {{ }} }}\n  KeyManager \"memory\" {{ plugin_data {{ }} }}\n  \
         WorkloadAttestor \"unix\" {{ plugin_data {{ }} }}\n}}\n",
        bundle.display()
    );
    fs::write(&config, text).unwrap();
    let said = |what: &str| {
        let got = validate(&config);
        let said = text_of(&got);
        assert!(got.status.success(), "{what}: {said}");
        assert!(!said.contains("there is none, so nobody is served"), "its entries are the server's: {said}");
        said
    };
    let missing = said("no files");
    for key in ["agent.trust_bundle_path: cannot open", "agent.join_token_file: cannot open"] {
        assert!(missing.contains(key), "{missing}");
    }
    fs::write(&bundle, "none").unwrap();
    fs::write(dir.path().join("etc/token"), "x").unwrap();
    let token = fs::read_to_string(&config).unwrap().replace("join_token_file", "# join_token_file");
    fs::write(&config, &token).unwrap();
    let none = said("no token");
    assert!(none.contains("Warning: agent.join_token: none is set, and there is no "), "{none}");
    fs::create_dir(dir.path().join("data")).unwrap();
    fs::write(dir.path().join("data/agent-data.json"), "{}").unwrap();
    chmod(&dir.path().join("data/agent-data.json"), 0o600);
    let joined = said("joined before");
    assert!(!joined.contains("join_token"), "{joined}");
    let unread = said("no bundle");
    assert!(unread.contains("holds no PEM block") && !unread.contains("cannot open"), "{unread}");
}

/// Whether what was said names the owner of this place as wrong: of a file that is named already its name is not said again.
fn blames(said: &str, path: &Path) -> bool {
    let path = path.display();
    // In the log quotes stand behind a backslash.
    [" ", ": ", "\": ", "\\\": "]
        .iter()
        .any(|between| said.contains(&format!("{path}{between}belongs to user ")))
}

fn text_of(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| text(bytes)).concat()
}

/// Whatever is wrong with the text, the places are looked at, and all is told in the order of the lines.
#[test]
fn validate_sorts_what_is_wrong_with_text_and_places() {
    let dir = layout_dir();
    let (config, here) = (dir.path().join("etc/agent.conf"), dir.path().display());
    let text_of = |trust_domain: &str| {
        format!(
            "agent {{\n  data_dir = \"/proc/durward\"\n  trust_domain = \"{trust_domain}\"\n  log_file = \"{here}/none/log\"\n  \
             socket_path = \"{here}/run/api.sock\"\n  log_level = \"loud\"\n}}\nissuer \"embedded\" {{ }}\n"
        )
    };
    for (trust_domain, want) in [
        ("example.org", vec!["2 agent.data_dir", "4 agent.log_file", "6 agent.log_level"]),
        (
            "UPPER CASE",
            vec!["2 agent.data_dir", "3 agent.trust_domain", "4 agent.log_file", "6 agent.log_level"],
        ),
    ] {
        fs::write(&config, text_of(trust_domain)).unwrap();
        let got = Command::new(PROGRAM)
            .args(["validate", "--output", "json", "--config"])
            .arg(&config)
            .output()
            .unwrap();
        let said: serde_json::Value = serde_json::from_slice(&got.stdout).unwrap();
        let errors = said["errors"].as_array().unwrap().iter();
        let errors: Vec<String> =
            errors.map(|error| format!("{} {}", error["line"], error["key"].as_str().unwrap())).collect();
        assert_eq!(errors, want, "{said}");
    }
}

#[test]
fn validate_names_what_is_wrong_with_files_and_places_at_once() {
    let dir = layout_dir();
    let wrong = ["etc/agent.conf", "run"];
    for place in wrong {
        chmod(&dir.path().join(place), 0o777);
    }
    let got = validate(&dir.path().join("etc/agent.conf"));
    let said = text(&got.stderr);
    for place in wrong {
        assert!(blames(&said, &dir.path().join(place)), "{place}: {said}");
    }
    assert!(said.contains("/etc/agent.conf:4:3: agent.socket_path "), "where it is set: {said}");
}

/// `run` and `validate` look with the same eyes.
#[test]
fn a_start_tells_the_same_mistakes_as_validate() {
    type Change = fn(&Path);
    let no_data: Change = |dir| fs::write(dir.join("data"), "").unwrap();
    let cases: [(&str, &[&str], Change, &str); 4] = [
        ("a place", &["run"], |_| {}, ""),
        ("a place, and what a start needs", &["run"], no_data, "HEALTH"),
        ("a file", &["etc/agent.conf"], no_data, ""),
        (
            "a file, and what it says",
            &["etc/agent.conf"],
            |_| {},
            "ratelimit { caller { rate = -1 burst = 1 } }",
        ),
    ];
    for (case, open, change, block) in cases {
        let dir = layout_dir();
        let config = dir.path().join("etc/agent.conf");
        // Of a network for documentation (RFC 5737), which no node has.
        let health =
            "health_checks { listener_enabled = true bind_address = \"192.0.2.1\" bind_port = 8080 }";
        configure(&config, if block == "HEALTH" { health } else { block });
        change(dir.path());
        open.iter().for_each(|place| chmod(&dir.path().join(place), 0o777));
        let validated = validate(&config);
        let started = run(Path::new(PROGRAM), &config, |_| {});
        let list = |output: &Output| -> Vec<String> {
            let said = text(&output.stderr);
            let ours = said.lines().filter(|line| line.starts_with(dir.path().to_str().unwrap()));
            ours.map(str::to_owned).collect()
        };
        assert!(!list(&validated).is_empty(), "{case}: {}", text(&validated.stderr));
        assert_eq!(list(&started), list(&validated), "{case}");
    }
}

/// Adds a block, or a CA that is supplied, to what the layout has.
fn configure(config: &Path, block: &str) {
    let here = config.ancestors().nth(2).unwrap().display().to_string();
    let text = fs::read_to_string(config).unwrap();
    let ca = format!(
        "issuer \"embedded\" {{\n  ca_cert_path = \"{here}/etc/ca.pem\"\n  ca_key_path = \"{here}/etc/ca.key\"\n}}"
    );
    let text = match block {
        "CA" => text.replace("issuer \"embedded\" { }", &ca),
        block => text + &block.replace("HERE", &here) + "\n",
    };
    fs::write(config, text).unwrap();
}

/// A Secret with `fsGroup` has mode 0440, root, and a group of the agent's.
#[test]
fn the_agents_own_group_may_read_its_key() {
    if !geteuid().is_root() {
        println!("nothing can be given to anybody: left out");
        return;
    }
    let ours = nix::unistd::getegid().as_raw();
    for (mode, group, well) in [
        (0o600, ours, true),
        (0o400, ours, true),
        (0o440, ours, true),
        (0o640, ours, true),
        (0o440, NEIGHBOUR, false),
        (0o444, ours, false),
        (0o644, ours, false),
        (0o404, ours, false),
    ] {
        let dir = layout_dir();
        let config = dir.path().join("etc/agent.conf");
        configure(&config, "CA");
        let key = dir.path().join("etc/ca.key");
        for file in [&key, &dir.path().join("etc/ca.pem")] {
            fs::write(file, "").unwrap();
        }
        chown(&key, None, Some(group)).unwrap();
        chmod(&key, mode);
        let (valid, started) = (validate(&config), run(Path::new(PROGRAM), &config, |_| {}));
        // The key is none, which is said when it may be read.
        for said in [text(&valid.stderr), text(&started.stderr)] {
            assert_eq!(!said.contains("others can read it"), well, "{mode:o} {group}: {said}");
            assert_eq!(said.contains("no private key could be read"), well, "{mode:o} {group}: {said}");
        }
        if !well {
            assert!(text(&valid.stderr).contains(&format!("(chmod 600 {})", key.display())), "{mode:o}");
            let mount = "mount --bind \"$1/etc\" \"$1/etc\" && mount -o remount,bind,ro \"$1/etc\" || exit 77; \
                         exec \"$2\" validate --config \"$1/etc/agent.conf\"";
            if let Some(got) = mounted(dir.path(), mount) {
                let said = text(&got.stderr);
                assert!(
                    said.contains("set defaultMode: 0400") && !said.contains("chmod"),
                    "{mode:o}: {said}"
                );
            }
        }
    }
}

/// What people have: links, dots, names that start at the working directory, closed homes, the umask of a closed shop.
#[test]
fn ordinary_layouts_are_valid() {
    let dir = layout_dir();
    let config = dir.path().join("etc/agent.conf");
    let at = |name: &str| dir.path().join(name);
    symlink("etc", at("link")).unwrap();
    // A drop-in file of a package's, elsewhere.
    fs::create_dir(at("package")).unwrap();
    fs::write(at("package/b.conf"), entry("/package", "")).unwrap();
    symlink("../../package/b.conf", at("etc/entries.d/b.conf")).unwrap();
    // As a ConfigMap is mounted, but for the mode.
    fs::create_dir_all(at("cm/..2026")).unwrap();
    fs::copy(&config, at("cm/..2026/agent.conf")).unwrap();
    symlink("..2026", at("cm/..data")).unwrap();
    symlink("..data/agent.conf", at("cm/agent.conf")).unwrap();
    for (case, path) in [
        ("plain", "etc/agent.conf"),
        ("a link to the directory", "link/agent.conf"),
        ("dots", "run/../etc/./agent.conf"),
        ("dots behind a link", "link/../etc/agent.conf"),
        ("a ConfigMap", "cm/agent.conf"),
    ] {
        let got = validate(&at(path));
        assert!(got.status.success(), "{case}: {}", text(&got.stderr));
        let relative = Command::new(PROGRAM)
            .args(["validate", "--config", path])
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(relative.status.success(), "{case}: {}", text(&relative.stderr));
    }
    for (place, mode) in
        [("etc", 0o700), ("etc", 0o750), ("etc/agent.conf", 0o600), ("run", 0o711), ("run", 0o1777)]
    {
        chmod(&at(place), mode);
        let got = validate(&config);
        assert!(got.status.success(), "{place} {mode:o}: {}", text(&got.stderr));
    }
    // The working directory is on the way of a relative path.
    chmod(dir.path(), 0o777);
    let got = Command::new(PROGRAM)
        .args(["validate", "--config", "etc/agent.conf"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert_eq!(got.status.code(), Some(1), "{}", text(&got.stdout));
    chmod(dir.path(), 0o755);
}

/// Where each user has a group of his own, his umask is 002 (Debian, Fedora), and what he makes his group may write to.
#[test]
fn a_users_private_group_is_the_user() {
    if !geteuid().is_root() {
        println!("nobody else can be become: left out");
        return;
    }
    let base = tempfile::tempdir().unwrap();
    chmod(base.path(), 0o755);
    // The build directory may be closed to others.
    let program = base.path().join("durward");
    copy_program(&program);
    for (case, owner, group, gid, valid) in [
        ("private", NEIGHBOUR, NEIGHBOUR, NEIGHBOUR, true),
        ("a group of many", NEIGHBOUR, 100, 100, false),
        ("his private group, and he has another", NEIGHBOUR, NEIGHBOUR, 100, false),
        ("another group than his", NEIGHBOUR, 100, NEIGHBOUR, false),
        ("root's", 0, NEIGHBOUR, NEIGHBOUR, false),
    ] {
        let clone = base.path().join(case);
        fs::create_dir(&clone).unwrap();
        let made = layout(&clone);
        for place in
            ["", "etc", "etc/agent.conf", "etc/entries.d", "etc/entries.d/a.conf", "fed", "run", "log"]
        {
            chown(clone.join(place), Some(owner), Some(group)).unwrap();
            chmod(&clone.join(place), if place.ends_with("conf") { 0o664 } else { 0o775 });
        }
        let command = |args: &[&str], at: &Path| {
            let mut command = Command::new("timeout");
            command.args(["20"]).arg(&program).args(args).arg(at).uid(NEIGHBOUR).gid(gid);
            command.current_dir(base.path()).output().unwrap()
        };
        let got = command(&["validate", "--config"], &made);
        assert_eq!(got.status.success(), valid, "{case}: {}", text(&got.stderr));
        let got = command(&["quickstart", "--exit-after-fetch", "--dir"], &clone.join("quick"));
        assert_eq!(got.status.success(), valid, "{case}: {}", text(&got.stderr));
    }
}

/// Runs `script` in a mount namespace of its own, with the directory as $1 and the program as $2. `None` where nothing can
/// be mounted.
fn mounted(dir: &Path, script: &str) -> Option<Output> {
    if !geteuid().is_root() {
        println!("nothing can be mounted: left out");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).args([dir, Path::new(PROGRAM)]);
    let got = command.output().unwrap();
    let said = text(&got.stderr);
    if got.status.code() == Some(77) || said.contains("unshare failed") {
        println!("nothing can be mounted: left out: {said}");
        return None;
    }
    Some(got)
}

/// A ConfigMap's directory has mode 0777, and is mounted read-only. What is below it has modes that count.
#[test]
fn the_top_of_what_is_mounted_read_only_may_have_any_mode() {
    let mount = "mount --bind \"$1/etc\" \"$1/etc\" && mount -o remount,bind,ro \"$1/etc\" || exit 77; \
                 exec \"$2\" validate --config \"$1/etc/agent.conf\"";
    type Change = fn(&Path);
    type Case = (&'static str, Change, Result<(), &'static str>);
    let cases: [Case; 6] = [
        ("plain", |_| {}, Ok(())),
        ("as a Secret", |at| chmod(&at.join("etc"), 0o1777), Ok(())),
        ("a link of root's", |at| relink(at, None), Ok(())),
        (
            "a link of somebody else's",
            |at| relink(at, Some(NEIGHBOUR)),
            Err("/etc/agent.conf: belongs to user "),
        ),
        (
            "a directory in it",
            |at| chmod(&at.join("etc/entries.d"), 0o777),
            Err(
                "/etc/entries.d belongs to user 0 and has mode 0777: nobody else may write to it (it is mounted",
            ),
        ),
        (
            "a file in it",
            |at| chmod(&at.join("etc/agent.conf"), 0o666),
            Err("/etc/agent.conf: belongs to user 0"),
        ),
    ];
    for (case, change, want) in cases {
        let dir = layout_dir();
        chmod(&dir.path().join("etc"), 0o777);
        change(dir.path());
        let Some(got) = mounted(dir.path(), mount) else { return };
        let said = text(&got.stderr);
        assert_eq!(got.status.success(), want.is_ok(), "{case}: {said}");
        assert!(said.contains(want.err().unwrap_or_default()), "{case}: {said}");
        assert!(!said.contains("(chmod"), "{case}: it cannot be done: {said}");
    }
    let dir = layout_dir();
    chmod(&dir.path().join("etc"), 0o777);
    let writable = validate(&dir.path().join("etc/agent.conf"));
    assert_eq!(writable.status.code(), Some(1), "writable, it is refused");
}

/// `agent.conf` by a link, as in a ConfigMap.
fn relink(at: &Path, owner: Option<u32>) {
    fs::rename(at.join("etc/agent.conf"), at.join("etc/real")).unwrap();
    symlink("real", at.join("etc/agent.conf")).unwrap();
    lchown(at.join("etc/agent.conf"), owner, None).unwrap();
}

/// As a service manager mounts everything read-only for the agent alone (ProtectSystem=strict): others still write.
#[test]
fn what_is_read_only_for_the_agent_alone_is_no_volume() {
    let mount = "mount --bind \"$1/run\" \"$1/run\" && mount -o remount,bind,ro / || exit 77; \
                 exec timeout --signal=TERM 20 \"$2\" run --config \"$1/etc/agent.conf\"";
    for (place, mode) in
        [("etc/agent.conf", 0o666), ("etc", 0o777), ("etc/entries.d", 0o777), ("fed/bundle.json", 0o646)]
    {
        // Not below /tmp, which may be mounted apart.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        chmod(dir.path(), 0o755);
        layout(dir.path());
        chmod(&dir.path().join(place), mode);
        let Some(got) = mounted(dir.path(), mount) else { return };
        let said = text(&got.stderr);
        assert_eq!(got.status.code(), Some(1), "{place}: {said}");
        assert!(blames(&said, &dir.path().join(place)), "{place}: {said}");
    }
}

/// Who starts a program chooses the bytes of this file, which belongs to whom the program runs as.
#[test]
fn no_file_of_the_kernels_is_believed() {
    let dir = layout_dir();
    let config = dir.path().join("etc/agent.conf");
    let words = fs::read_to_string(&config).unwrap();
    let mut sleeping = Command::new("sleep").arg0(words).arg("60").spawn().unwrap();
    fs::remove_file(&config).unwrap();
    symlink(format!("/proc/{}/cmdline", sleeping.id()), &config).unwrap();
    let got = validate(&config);
    assert_eq!(got.status.code(), Some(1));
    assert!(text(&got.stderr).contains("agent.conf: is not a regular file"), "{}", text(&got.stderr));
    sleeping.kill().unwrap();
    sleeping.wait().unwrap();
}

/// Nobody answers for this one: it is refused without having been asked.
#[test]
fn a_file_system_of_somebody_elses_is_not_asked() {
    let dir = layout_dir();
    let script = format!(
        "exec 3<>/dev/fuse && mount -i -t fuse -o \
         fd=3,rootmode=40000,user_id={NEIGHBOUR},group_id={NEIGHBOUR},allow_other none \"$1/etc\" || exit 77; \
         timeout --signal=KILL 20 \"$2\" validate --config \"$1/etc/agent.conf\""
    );
    if let Some(got) = mounted(dir.path(), &script) {
        let said = text(&got.stderr);
        assert_eq!(got.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("etc is on a FUSE file system of user {NEIGHBOUR}")), "{said}");
    }
}

#[test]
fn a_socket_that_workloads_cannot_reach_is_said_before_the_start() {
    let dir = tempfile::tempdir().unwrap();
    chmod(dir.path(), 0o755);
    let config = dir.path().join("agent.conf");
    let set = |data: &str, socket: &str| {
        write_config(dir.path(), &entry("/web", ""));
        let at = dir.path().display();
        let text = fs::read_to_string(&config).unwrap();
        let text = text.replace(&format!("{at}/data"), &format!("{at}/{data}"));
        fs::write(&config, text.replace(&format!("{at}/api.sock"), &format!("{at}/{socket}"))).unwrap();
    };
    set("spire", "spire/sockets/agent.sock");
    for (what, got) in [("run", run(Path::new(PROGRAM), &config, |_| {})), ("validate", validate(&config))] {
        let said = text(&got.stderr);
        assert_eq!(got.status.code(), Some(1), "{what}: {said}");
        assert!(
            said.contains("spire/sockets/agent.sock") && said.contains("move one of them"),
            "{what}: {said}"
        );
        assert!(!dir.path().join("spire").exists(), "{what}: something was made");
    }
    // The directory of the admin socket is made for the agent's user alone, too.
    set("data", "adm/sockets/agent.sock");
    let made_before: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
    let written = fs::read_to_string(&config).unwrap();
    let admin =
        format!("agent {{\n  admin_socket_path = \"{}\"", dir.path().join("adm/admin.sock").display());
    fs::write(&config, written.replacen("agent {", &admin, 1)).unwrap();
    for (what, got) in [("run", run(Path::new(PROGRAM), &config, |_| {})), ("validate", validate(&config))] {
        let said = text(&got.stderr);
        assert_eq!(got.status.code(), Some(1), "{what}: {said}");
        assert!(said.contains("is below the directory of admin_socket_path"), "{what}: {said}");
        let made: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        assert_eq!(made, made_before, "{what}: something was made");
    }
    for (mode, code) in [(0o700, 1), (0o755, 0)] {
        fs::create_dir_all(dir.path().join("adm")).unwrap();
        chmod(&dir.path().join("adm"), mode);
        assert_eq!(validate(&config).status.code(), Some(code), "{mode:o}");
    }
    // The command line is asked too.
    set("data", "api.sock");
    let below = dir.path().join("data/api.sock");
    let got = Command::new(PROGRAM)
        .args(["validate", "--socket-path"])
        .arg(&below)
        .arg("--config")
        .arg(&config)
        .output();
    assert_eq!(got.unwrap().status.code(), Some(1));

    // A directory that an admin has closed may be meant: it is told, and no mistake.
    fs::create_dir(dir.path().join("closed")).unwrap();
    set("data", "closed/pub/api.sock");
    for (mode, group) in [(0o750, " and its group"), (0o700, "")] {
        chmod(&dir.path().join("closed"), mode);
        let got = validate(&config);
        assert!(got.status.success(), "{}", text(&got.stderr));
        let owner = fs::metadata(dir.path().join("closed")).unwrap().uid();
        let who = format!("(mode {mode:04o}) lets only user {owner}{group} reach ");
        let hint = format!("chmod o+x {} if others should", dir.path().join("closed").display());
        let said = text(&got.stderr);
        assert!(said.contains(&who) && said.contains(&hint), "{said}");
    }
}

/// A drop-in file that is none by its name is told of.
#[test]
fn validate_names_files_that_are_not_read() {
    let dir = layout_dir();
    let config = dir.path().join("etc/agent.conf");
    let drop_ins = dir.path().join("etc/entries.d");
    for name in ["web.hcl", "README", "web.conf~", ".web.conf.swp"] {
        fs::write(drop_ins.join(name), "no configuration").unwrap();
    }
    let got = validate(&config);
    let said = text(&got.stderr);
    let path = drop_ins.join("web.hcl");
    let want = format!(
        "Warning: agent.entries_dir: {} is not read: its name must end in .conf or .json.\n",
        path.display()
    );
    assert!(
        got.status.success() && said.contains(&want) && said.matches("is not read").count() == 1,
        "{said}"
    );
}

/// A process of somebody else's that turns `name` in `dir` into a link, a directory and nothing, as fast as it can.
struct Turner(Child);

impl Turner {
    fn start(dir: &Path, name: &str, target: &Path) -> Self {
        let script = "cd \"$1\" || exit 1; n=0; while [ $n -lt 100000 ]; do n=$((n + 1)); \
            ln -s \"$3\" \"$2\"; rm -f \"$2\"; mkdir \"$2\"; rmdir \"$2\"; done";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(dir).arg(name).arg(target);
        command.stdout(Stdio::null()).stderr(Stdio::null()).uid(NEIGHBOUR).gid(NEIGHBOUR).process_group(0);
        Self(command.spawn().unwrap())
    }
}

impl Drop for Turner {
    fn drop(&mut self) {
        // With the program that it runs just then.
        let _ = killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL);
        drop(self.0.wait());
    }
}

#[test]
fn no_link_makes_a_file_of_ours_everybodys() {
    if !geteuid().is_root() {
        println!("nobody else can be become: left out");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    chmod(dir.path(), 0o755);
    let (secret, private) = (dir.path().join("secret"), dir.path().join("private"));
    fs::write(&secret, "").unwrap();
    chmod(&secret, 0o600);
    fs::create_dir(&private).unwrap();
    chmod(&private, 0o700);

    // In a directory of theirs nothing is made at all.
    let theirs = dir.path().join("theirs");
    fs::create_dir(&theirs).unwrap();
    chown(&theirs, Some(NEIGHBOUR), Some(NEIGHBOUR)).unwrap();
    for name in ["api.sock.new", "api.sock.lock", "api.sock", "sub"] {
        let _turning = Turner::start(&theirs, name, &secret);
        for _ in 0..50 {
            let refused = Socket::bind(&theirs.join("api.sock"), 0o777).unwrap_err();
            assert!(matches!(refused, BindError::Directory { .. }), "{name}: {refused}");
            let refused = Socket::bind(&theirs.join("sub/api.sock"), 0o777).unwrap_err();
            assert!(matches!(refused, BindError::Directory { .. }), "{name}: {refused}");
        }
    }

    // Where everybody may make directories, one of ours is made, or theirs is refused.
    let everybodys = dir.path().join("everybodys");
    fs::create_dir(&everybodys).unwrap();
    chmod(&everybodys, 0o1777);
    let (mut served, mut refused) = (0, 0);
    let turning = Turner::start(&everybodys, "sub", &private);
    let until = std::time::Instant::now() + PATIENCE;
    while served + refused < 300 && std::time::Instant::now() < until {
        match Socket::bind(&everybodys.join("sub/api.sock"), 0o777) {
            Ok(socket) => {
                served += 1;
                let sub = fs::symlink_metadata(everybodys.join("sub")).unwrap();
                assert!(sub.is_dir() && sub.uid() == 0, "{sub:?}");
                drop(socket);
                fs::remove_dir(everybodys.join("sub")).unwrap();
            }
            Err(BindError::Directory { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    drop(turning);
    println!("served {served} times, refused {refused} times");
    assert_eq!((mode(&secret), mode(&private)), (0o600, 0o700));
    assert_eq!(fs::read_dir(&private).unwrap().count(), 0, "nothing was put where a link led");
}

/// A dead agent's socket is replaced; a link that somebody put in its place is not followed, and not removed.
#[test]
fn what_is_planted_at_the_socket_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (path, secret) = (dir.path().join("api.sock"), dir.path().join("secret"));
    fs::write(&secret, "").unwrap();
    chmod(&secret, 0o600);
    for name in ["api.sock", "api.sock.lock", "api.sock.new"] {
        symlink(&secret, dir.path().join(name)).unwrap();
        let got = Socket::bind(&path, 0o777);
        assert_eq!(got.is_ok(), name == "api.sock.new", "{name}: {got:?}");
        drop(got);
        assert!(fs::symlink_metadata(dir.path().join(name)).unwrap().is_symlink(), "{name}");
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    assert_eq!((mode(&secret), fs::read(&secret).unwrap()), (0o600, Vec::new()));
}

/// The kernel shows the path that a socket was bound under: `ss -xl` reads it, and clients' errors are about it.
#[test]
fn the_socket_has_its_own_name_and_mode_whatever_the_umask() {
    type Bind = fn(&Path, u32) -> Result<Socket, BindError>;
    let ways: [(&str, Bind); 2] =
        [("a thread's umask", Socket::bind), ("the process's umask", Socket::bind_under_umask)];
    for (case, bind) in ways {
        for want in [0o777, 0o770, 0o600] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("api.sock");
            let socket = bind(&path, want).unwrap();
            let there = fs::symlink_metadata(&path).unwrap();
            assert!(there.file_type().is_socket(), "{case}");
            assert_eq!(there.mode() & 0o7777, want, "{case}");
            let listed = fs::read_to_string("/proc/net/unix").unwrap();
            assert!(listed.contains(&format!(" {}\n", path.display())), "{case}");
            drop(UnixStream::connect(&path).unwrap());
            drop(socket);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{case}: nothing is left");
        }
    }
}

/// An agent keeps its memory to itself, whoever starts it, and serves all the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_agent_closes_itself_to_others() {
    let dir = tempfile::tempdir().unwrap();
    chmod(dir.path(), 0o755);
    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    // The build directory may be closed to others.
    let program = dir.path().join("durward");
    copy_program(&program);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    write_config(&home, &format!("telemetry {{ Prometheus {{ host = \"127.0.0.1\" port = {port} }} }}"));
    let user = if geteuid().is_root() { NEIGHBOUR } else { geteuid().as_raw() };
    for file in [&home, &home.join("agent.conf")] {
        chown(file, Some(user), None).unwrap();
    }
    let mut command = Command::new(&program);
    command.args(["run", "--config"]).arg(home.join("agent.conf")).stdin(Stdio::null());
    if geteuid().is_root() {
        command.uid(NEIGHBOUR).gid(NEIGHBOUR);
    }
    let mut agent = Process::of(command, &dir.path().join("out"));
    agent.serving_at(&home.join("api.sock"), &dir.path().join("out")).await;
    let proc = PathBuf::from(format!("/proc/{}", agent.pid()));
    let limits = fs::read_to_string(proc.join("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).collect::<Vec<_>>(), ["0", "0", "bytes"]);
    let status = fs::read_to_string(proc.join("status")).unwrap();
    assert!(status.lines().any(|line| line == "NoNewPrivs:\t1"), "{status}");
    // So the kernel shows whom it lets look: not the process's own user.
    assert_eq!(fs::metadata(proc.join("environ")).unwrap().uid(), 0);
    // It still sees itself.
    let mut metrics = TcpStream::connect(("127.0.0.1", port)).unwrap();
    metrics.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    metrics.read_to_string(&mut text).unwrap();
    for series in ["process_open_fds ", "process_resident_memory_bytes "] {
        let line =
            text.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{series}: {text}"));
        assert!(!line.ends_with(" 0"), "{line}");
    }
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success());
}
