//! The admin socket of a real agent: what it tells its owner, and that it tells nobody else.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::{
        fs::{MetadataExt as _, PermissionsExt as _},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicI64, Ordering::Relaxed},
    time::Duration,
};

use durward::{
    agent::Running,
    api::proto::{
        admin::{self as pb, admin_client::AdminClient},
        workload::JwtsvidRequest,
    },
    limits::budget::PARKED,
    os::clock::Clock,
    telemetry::health::Probe,
};
use serde_json::Value;
use tempfile::TempDir;
use tonic::{Code, transport::Channel};

use crate::support::{
    Process, TRUST_DOMAIN, TestAgent, channel, copy_program, entry, load, request, write_config,
};

/// An agent with an admin socket, which cannot be in the directory of the public one.
struct Agent {
    private: TempDir,
    agent: TestAgent,
}

impl Agent {
    fn start(blocks: &str) -> Self {
        let private = tempfile::tempdir().unwrap();
        let agent = TestAgent::start(&with_admin(&private, blocks));
        Self { private, agent }
    }

    fn admin_socket(&self) -> PathBuf {
        self.private.path().join("admin/admin.sock")
    }

    async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(channel(&self.admin_socket()).await)
    }
}

fn with_admin(private: &TempDir, blocks: &str) -> String {
    let at = private.path().display();
    format!("agent {{\n  admin_socket_path = \"{at}/admin/admin.sock\"\n}}\n{blocks}")
}

fn own_pid() -> i32 {
    nix::unistd::Pid::this().as_raw()
}

fn jwt_request() -> JwtsvidRequest {
    JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_show_who_called() {
    let agent = Agent::start(&entry("/web", ""));
    let mut admin = agent.admin().await;
    let before = admin.limits(pb::LimitsRequest { top: 0 }).await.unwrap().into_inner();
    assert_eq!((before.heaviest, before.connections, before.node_connections), (vec![], vec![], 0));

    let mut client = agent.agent.client().await;
    for _ in 0..3 {
        client.fetch_jwtsvid(request(jwt_request())).await.unwrap();
    }
    let now = admin.limits(pb::LimitsRequest { top: 0 }).await.unwrap().into_inner();
    let caller = format!("uid:{}", nix::unistd::geteuid());
    let find = |stage: &str, key: &str, method: &str| {
        let same =
            |bucket: &pb::Bucket| (&*bucket.stage, &*bucket.key, &*bucket.method) == (stage, key, method);
        let found = now.heaviest.iter().find(|heavy| heavy.bucket.as_ref().is_some_and(same));
        let found = found.unwrap_or_else(|| panic!("{stage} {key} {method}: {now:?}"));
        let bucket = found.bucket.as_ref().unwrap();
        assert_eq!(bucket.limit(), pb::Limit::Tokens);
        (found.used, found.refused)
    };
    assert_eq!(find("caller", &caller, "FetchJWTSVID"), (3, 0));
    assert_eq!(find("identity", "spiffe://example.org/web", "FetchJWTSVID"), (3, 0));
    assert_eq!(find("gate", &caller, "connections"), (1, 0));
    let of: Vec<_> = now.connections.iter().map(|it| (it.caller.clone(), it.open)).collect();
    assert_eq!(of, [(caller, 1)], "the admin's own is not counted");
    assert!(now.connections[0].held > 0);
    assert_eq!((now.node_connections, now.attestations_in_flight), (1, 0));
    assert_eq!(now.keys, Some(pb::Keys { gate: 1, caller: 1, identity: 1 }));
    let memory = now.memory.unwrap();
    assert!(memory.resident.is_some_and(|bytes| bytes > 1 << 20), "{memory:?}");

    let one = admin.limits(pb::LimitsRequest { top: 1 }).await.unwrap().into_inner();
    assert_eq!(one.heaviest.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_who_signs() {
    let before = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
    let agent = Agent::start(&entry("/web", ""));
    let mut admin = agent.admin().await;
    let got = admin.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((&*got.trust_domain, got.entries, got.bundles), (TRUST_DOMAIN, 1, 1));
    assert_eq!((got.server.as_ref(), &*got.version), (None, env!("CARGO_PKG_VERSION")));
    let ca = got.ca.as_ref().expect("a CA of this node signs");
    assert!(ca.x509_from < ca.x509_until && ca.jwt_from < ca.jwt_until, "{ca:?}");
    // Certificates are valid from some seconds before; that is no age.
    assert!(ca.x509_from >= before && ca.jwt_from >= before, "{ca:?} {before}");
    assert!(got.started > 0 && got.pid > 0 && !got.kubernetes && got.limits_set.is_empty(), "{got:?}");

    let blocks = format!("{}ratelimit {{ caller {{ rate = 20 burst = 40 }} }}\n", entry("/web", ""));
    let agent = Agent::start(&blocks);
    let got = agent.admin().await.status(pb::StatusRequest {}).await.unwrap().into_inner();
    assert_eq!(got.limits_set, ["caller, each method: 20 a second, 40 at once"]);
}

/// With half of its life left, a CA signs on; that there will be no next one is told all the same.
#[tokio::test(flavor = "multi_thread")]
async fn an_issuer_that_cannot_make_its_next_keys_is_told() {
    static OFFSET: AtomicI64 = AtomicI64::new(0);
    const HOUR: i64 = 3600;
    let private = tempfile::tempdir().unwrap();
    let agent = TestAgent::with(&with_admin(&private, &entry("/web", "")), Clock::set_by(&OFFSET));
    let (mut client, socket) = (agent.client().await, private.path().join("admin/admin.sock"));
    let status = || -> (Vec<String>, Value) {
        let (out, _, _) = durward(Path::new(PROGRAM), None, &["status", "-output", "json"], &socket);
        let json: Value = serde_json::from_str(&out).unwrap();
        let wrong = json["wrong"].as_array().unwrap().iter().map(|it| it.as_str().unwrap().to_owned());
        (wrong.collect(), json["ca"].clone())
    };
    assert_eq!(status().1["last_error"], Value::Null);

    let in_the_way = agent.dir.path().join("data/issuer.json.new");
    fs::create_dir(&in_the_way).unwrap();
    // The first call for which no key is valid has it try.
    OFFSET.store(25 * HOUR, Relaxed);
    client.fetch_jwtsvid(request(jwt_request())).await.unwrap_err();
    let health = agent.running.health();
    tokio::time::timeout(Duration::from_secs(60), async {
        while health.get() != Probe::Expired {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
    assert!(health.live() && !health.ready(), "a restart would not help");
    OFFSET.store(13 * HOUR, Relaxed);
    let (wrong, ca) = status();
    let path = in_the_way.display();
    let said = format!("the issuer cannot rotate its keys: cannot write {path}: is a directory");
    assert!(wrong.iter().any(|it| it.starts_with("for ") && it.ends_with(&said)), "{wrong:?}");
    assert!(said.ends_with(ca["last_error"].as_str().unwrap()) && ca["failing_since"].is_i64(), "{ca}");

    fs::remove_dir(&in_the_way).unwrap();
    OFFSET.store(25 * HOUR, Relaxed);
    let audience = vec!["another".to_owned()];
    client.fetch_jwtsvid(request(JwtsvidRequest { audience, ..jwt_request() })).await.unwrap();
    let (wrong, ca) = status();
    assert!(!wrong.iter().any(|it| it.contains("cannot rotate")), "{wrong:?}");
    assert_eq!((&ca["last_error"], &ca["failing_since"]), (&Value::Null, &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_and_bundles_are_shown() {
    let blocks: String = (0..3)
        .map(|n| entry(&format!("/web{n}"), "dns_names = [\"web\"]\n  jwt_svid_ttl = \"90s\""))
        .collect();
    let agent = Agent::start(&blocks);
    let mut admin = agent.admin().await;
    let ask = |skip, most, id: &str| pb::EntriesRequest { skip, most, spiffe_id: id.to_owned() };
    let ids = |page: &pb::EntriesResponse| -> Vec<String> {
        page.entries.iter().map(|it| it.entry.as_ref().unwrap().spiffe_id.clone()).collect()
    };
    let page = admin.entries(ask(0, 2, "")).await.unwrap().into_inner();
    assert_eq!((ids(&page), page.more, page.total), (vec![id("/web0"), id("/web1")], true, 3));
    assert_eq!((page.entries[0].jwt_svid_ttl, page.entries[0].x509_svid_ttl), (90, 0));
    let page = admin.entries(ask(2, 2, "")).await.unwrap().into_inner();
    assert_eq!((ids(&page), page.more), (vec![id("/web2")], false));
    let page = admin.entries(ask(0, u32::MAX, &id("/web1"))).await.unwrap().into_inner();
    assert_eq!((ids(&page), page.total), (vec![id("/web1")], 1));
    let page = admin.entries(ask(u64::MAX, 0, "")).await.unwrap().into_inner();
    assert_eq!((page.entries, page.more), (vec![], false));

    let own = admin.bundle(pb::BundleRequest { trust_domain: String::new() }).await.unwrap().into_inner();
    let same = pb::BundleRequest { trust_domain: format!("spiffe://{TRUST_DOMAIN}") };
    assert_eq!(admin.bundle(same).await.unwrap().into_inner(), own);
    assert_eq!((&*own.trust_domain, own.x509_authorities.len()), (TRUST_DOMAIN, 1));
    let json: Value = serde_json::from_str(&own.spiffe_json).unwrap();
    assert_eq!((&json["spiffe_sequence"], &json["spiffe_refresh_hint"]), (&1.into(), &300.into()));
    let name = durward::identity::TrustDomain::parse(TRUST_DOMAIN).unwrap();
    let read = durward::identity::Bundle::parse_spiffe(&name, own.spiffe_json.as_bytes()).unwrap();
    assert_eq!(read.x509_authorities, own.x509_authorities);
    for (trust_domain, code) in [("other.example", Code::NotFound), ("A!", Code::InvalidArgument)] {
        let asked = pb::BundleRequest { trust_domain: trust_domain.to_owned() };
        assert_eq!(admin.bundle(asked).await.unwrap_err().code(), code, "{trust_domain}");
    }
}

fn id(path: &str) -> String {
    format!("spiffe://{TRUST_DOMAIN}{path}")
}

#[tokio::test(flavor = "multi_thread")]
async fn explain_shows_what_fits_and_what_nearly_does() {
    let uid = nix::unistd::geteuid();
    let own = format!("unix:uid:{uid}");
    let other = |path: &str, selectors: &[&str]| {
        format!("entry \"spiffe://{TRUST_DOMAIN}{path}\" {{\n  selectors = {selectors:?}\n}}\n")
    };
    let blocks = [
        entry("/web", "id = \"b\"\n  hint = \"public\""),
        entry("/old", "id = \"a\"\n  hint = \"public\""),
        other("/two-missing", &[&own, "unix:gid:4000000001", "unix:user:no-such-user"]),
        other("/one-missing", &[&own, "unix:user:no-such-user"]),
        other("/stranger", &["unix:uid:4000000001"]),
    ];
    let agent = Agent::start(&blocks.concat());
    let mut admin = agent.admin().await;
    let got = admin.explain(pb::ExplainRequest { pid: own_pid() }).await.unwrap().into_inner();

    assert_eq!((got.pid, got.uid), (own_pid(), uid.as_raw()));
    let caller = got.caller.unwrap();
    assert_eq!((caller.key, caller.cgroup_line), (format!("uid:{uid}"), String::new()));
    assert!(caller.why.starts_with("its user (Kubernetes was not found)"), "{}", caller.why);
    assert!(got.selectors.contains(&own), "{:?}", got.selectors);
    let matches: Vec<_> = got.matches.iter().map(|it| (&*it.entry_id, &*it.hint, &*it.withheld)).collect();
    assert_eq!(
        matches,
        [("a", "public", "an older entry, b, has the same hint"), ("b", "public", "")],
        "b is written first, and so it is older"
    );
    let nearest: Vec<_> = got
        .nearest
        .iter()
        .map(|near| (near.entry.as_ref().unwrap().spiffe_id.clone(), near.missing.join(" "), near.found))
        .collect();
    let id = |path: &str| format!("spiffe://{TRUST_DOMAIN}{path}");
    assert_eq!(
        nearest,
        [
            (id("/one-missing"), "unix:user:no-such-user".to_owned(), 1),
            (id("/two-missing"), "unix:gid:4000000001 unix:user:no-such-user".to_owned(), 1),
        ]
    );
    let absent: Vec<_> = got.nearest.iter().flat_map(|near| &near.absent).collect();
    let why = "unix:user:no-such-user: there is no such user on this node";
    assert_eq!(absent.iter().filter(|it| it.starts_with(why)).count(), 2, "of each: {absent:?}");
    assert_eq!(got.untold, []);
    let of = |stage: &str| got.buckets.iter().filter(|bucket| bucket.stage == stage).count();
    assert_eq!((of("gate"), of("caller"), of("identity")), (1, 10, 8));
    assert!(got.buckets.iter().all(|it| it.limit() == pb::Limit::Tokens && it.left == it.burst));

    for pid in [0, -1, i32::MAX] {
        let status = admin.explain(pb::ExplainRequest { pid }).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::NotFound, &*format!("there is no process {pid}"))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_answers_when_the_public_socket_takes_nobody() {
    let agent = Agent::start("ratelimit { gate { caller { connections = 64 } } }");
    // More than one caller may have, and silent.
    let mut open = Vec::new();
    for _ in 0..300 {
        open.push(tokio::net::UnixStream::connect(agent.agent.socket()).await.unwrap());
    }
    let mut admin = agent.admin().await;
    let caller = format!("uid:{}", nix::unistd::geteuid());
    let most = [pb::Connections { caller, open: 64, held: 64 * PARKED, others: 0 }];
    // Connections are taken one after the other, some perhaps after a question.
    let full = async {
        while admin.limits(pb::LimitsRequest { top: 1 }).await.unwrap().into_inner().connections != most {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), full).await.expect("as many as one caller may have");
    // Many of its own, one after the other: they have places for eight.
    for _ in 0..20 {
        agent.admin().await.limits(pb::LimitsRequest { top: 1 }).await.unwrap();
    }
    drop(open);
}

/// What a scrape says of connections that were not taken, at either socket.
#[tokio::test(flavor = "multi_thread")]
async fn refused_connections_are_counted_by_their_reason() {
    let agent = Agent::start("ratelimit { gate { admin = 1 caller { block = true } } }");
    let connect = async |path: &Path| tokio::net::UnixStream::connect(path).await.unwrap();
    let _blocked = connect(&agent.agent.socket()).await;
    let _admin = [connect(&agent.admin_socket()).await, connect(&agent.admin_socket()).await];
    let want = [("blocked", 1), ("admin_connections", 1), ("caller_rate", 0), ("node_connections", 0)];
    let counted = async {
        let line = |(reason, n)| format!("durward_connections_refused_total{{reason=\"{reason}\"}} {n}\n");
        let metrics = agent.agent.running.metrics();
        while !want.map(line).iter().all(|line| metrics.render().contains(line)) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), counted).await.expect("each under its reason");
}

/// Runs the command as a person does, and gives what it says: stdout, stderr, exit code.
fn durward(program: &Path, uid: Option<u32>, line: &[&str], socket: &Path) -> (String, String, Option<i32>) {
    let mut command = Command::new(program);
    command.env_clear().args(line).arg("-socketPath").arg(socket).stdin(Stdio::null());
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    // The agent that answers runs on the other threads.
    let output = tokio::task::block_in_place(|| command.output()).unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr), output.status.code())
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_durward");

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_show_it() {
    let agent = Agent::start(&entry("/web", "hint = \"front\""));
    let mut client = agent.agent.client().await;
    client.fetch_jwtsvid(request(jwt_request())).await.unwrap();
    let (program, socket) = (Path::new(PROGRAM), agent.admin_socket());
    let caller = format!("uid:{}", nix::unistd::geteuid());

    let (out, err, code) = durward(program, None, &["limits"], &socket);
    assert_eq!((&*err, code), ("", Some(0)));
    let row = out.lines().find(|line| line.starts_with("caller ")).unwrap_or_else(|| panic!("{out}"));
    // A user with a name has it behind the number.
    let words: Vec<&str> = row.split_whitespace().filter(|word| !word.starts_with('(')).collect();
    assert_eq!(words[1..5], [&*caller, "FetchJWTSVID", "1", "0"], "{out}");

    let (out, _, code) = durward(program, None, &["limits", "-top=1", "-output", "json"], &socket);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((json["heaviest"].as_array().unwrap().len(), code), (1, Some(0)));
    assert_eq!(json["node_connections"], 1);
    assert_eq!(json["more_heaviest"], true, "{json}");
    let (out, _, _) = durward(program, None, &["limits", "--top", "1"], &socket);
    assert!(out.contains("\nThere are more: durward limits --top 10\n"), "{out}");

    let pid = own_pid().to_string();
    let (out, err, code) = durward(program, None, &["explain", "-pid", &pid], &socket);
    assert_eq!((&*err, code), ("", Some(0)));
    for line in [format!("Charged as:  {caller}: "), "  spiffe://example.org/web (entry ".to_owned()] {
        assert!(out.lines().any(|it| it.starts_with(&line)), "{line} in {out}");
    }
    let (out, _, _) = durward(program, None, &["explain", "-pid", &pid, "-output", "json"], &socket);
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["matches"][0]["hint"], "front");

    // By itself it is about the process that started it.
    let (out, _, _) = durward(program, None, &["explain"], &socket);
    assert!(out.starts_with(&format!("Process:     {pid} ")), "{out}");

    let gone = i32::MAX.to_string();
    let (out, err, code) = durward(program, None, &["explain", "--pid", &gone], &socket);
    let want = format!("there is no process {gone}\n");
    assert_eq!((&*out, err, code), ("", want, Some(1)));

    let (_, err, code) = durward(program, None, &["limits"], &agent.private.path().join("none.sock"));
    assert!(err.contains("with this admin_socket_path?"), "{err}");
    assert_eq!(code, Some(4));
}

/// An agent that may not look at the executables of others does not say that their processes have no identity.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_known_of_another_users_process_is_said() {
    if !nix::unistd::geteuid().is_root() {
        // There is no other user then.
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let by_path = entry("/by-path", "").replace("]", ", \"unix:path:/nowhere\"]");
    write_config(dir.path(), &by_path);
    let program = dir.path().join("durward");
    copy_program(&program);
    let config = dir.path().join("agent.conf");
    let text = fs::read_to_string(&config).unwrap();
    let discover = text.replace("plugin_data { }", "plugin_data { discover_workload_path = true }");
    fs::write(&config, discover).unwrap();
    for path in [dir.path(), &config] {
        std::os::unix::fs::chown(path, Some(65_534), Some(65_534)).unwrap();
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    command.args(["run", "--config"]).arg(&config).uid(65_534).gid(65_534);
    let mut agent = Process::of(command, &dir.path().join("log"));
    agent.serving(dir.path()).await;

    let pid = own_pid().to_string();
    let admin = dir.path().join("data/admin.sock");
    let (out, err, code) = durward(Path::new(PROGRAM), None, &["explain", "--pid", &pid], &admin);
    assert_eq!((&*err, code), ("", Some(0)));
    let shown = out.split_whitespace().collect::<Vec<_>>().join(" ");
    for want in [
        "unix:path and unix:sha256 are not known: cannot read the executable",
        "calls are Unavailable: which entries match depends on unix:path, which is not known",
        "has 1 of its selectors, may have unix:path:/nowhere",
    ] {
        assert!(shown.contains(want), "{want} in {out}");
    }
    assert!(!shown.contains("no identity"), "{out}");
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_watched_until_ctrl_c() {
    let agent = Agent::start("");
    let mut child = Command::new(PROGRAM)
        .args(["limits", "--watch", "1", "--output", "json", "--socket-path"])
        .arg(agent.admin_socket())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let line = tokio::task::block_in_place(|| lines.next()).unwrap().unwrap();
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap()["node_connections"], 0);
    }
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(tokio::task::block_in_place(|| child.wait()).unwrap().code(), Some(0));
}

/// Nobody need ask for an admin socket, and one that cannot be made keeps no agent from serving.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_an_admin_socket_by_default() {
    for (case, public, wanted) in [
        ("beside the public directory", "sockets/public/api.sock", Some("sockets/private/admin.sock")),
        ("where many share what is beside it", "api.sock", Some("data/admin.sock")),
        ("in the way of another file", "blocked/public/api.sock", None),
        ("switched off", "off/public/api.sock", None),
    ] {
        // Directly in a directory that many share.
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        write_config(dir.path(), &entry("/web", ""));
        let path = dir.path().join("agent.conf");
        let off = if case == "switched off" { "admin_socket_enabled = false\n" } else { "" };
        let public = dir.path().join(public);
        let text = fs::read_to_string(&path).unwrap();
        let text = text.replace(&*dir.path().join("api.sock").to_string_lossy(), &public.to_string_lossy());
        fs::write(&path, text.replace("log_level = ", &format!("{off}log_level = "))).unwrap();
        if case == "in the way of another file" {
            fs::create_dir(dir.path().join("blocked")).unwrap();
            fs::write(dir.path().join("blocked/private"), "").unwrap();
        }
        let running = Running::start(load(dir.path()).unwrap(), None, Clock::SYSTEM).expect(case);
        if let Some(wanted) = wanted {
            let wanted = dir.path().join(wanted);
            let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
            assert_eq!((mode(&wanted), mode(wanted.parent().unwrap())), (0o600, 0o700), "{case}");
            let mut admin = AdminClient::new(channel(&wanted).await);
            let told = admin.status(pb::StatusRequest {}).await.unwrap().into_inner();
            assert_eq!(told.socket_path, public.to_string_lossy(), "{case}");
        } else {
            let below = [dir.path().to_owned(), dir.path().join("data"), dir.path().join("off/private")];
            assert!(below.iter().all(|dir| !dir.join("admin.sock").exists()), "{case}");
        }
        running.shutdown().await;
    }
}

/// The modes of the socket and its directory keep others out; so does the kernel's word on who connects.
#[tokio::test(flavor = "multi_thread")]
async fn another_user_is_told_nothing() {
    if !nix::unistd::geteuid().is_root() {
        // Nobody else can be become then.
        return;
    }
    let agent = Agent::start("");
    let socket = agent.admin_socket();
    let base = tempfile::tempdir().unwrap();
    let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    open(base.path());
    let program = base.path().join("durward");
    copy_program(&program);
    let nobody = Some(65_534);

    open(agent.private.path());
    let (out, err, code) = durward(&program, nobody, &["limits"], &socket);
    assert_eq!((&*out, code), ("", Some(1)), "{err}");
    assert!(
        err.contains("permission denied") && err.contains("only for root and the agent's own user"),
        "{err}"
    );

    // Were the modes open, the connection would be closed unanswered.
    open(socket.parent().unwrap());
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o777)).unwrap();
    let pid = own_pid().to_string();
    for line in [&["limits"][..], &["explain", "--pid", &pid]] {
        let (out, err, code) = durward(&program, nobody, line, &socket);
        assert_eq!(out, "", "{line:?}");
        assert!(err.contains("only for root and the agent's own user"), "{line:?}: {err}");
        assert_ne!(code, Some(0), "{line:?}");
    }
    // The owner is still answered.
    agent.admin().await.limits(pb::LimitsRequest { top: 1 }).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_its_owners_and_goes_with_the_agent() {
    let first = Agent::start("");
    let socket = first.admin_socket();
    let directory = socket.parent().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!((mode(&socket), mode(directory)), (0o600, 0o700));
    let Agent { private, agent } = first;
    agent.running.shutdown().await;
    assert!(!socket.exists());

    // The next agent is bound at the same place.
    let agent = TestAgent::start(&with_admin(&private, ""));
    let mut admin = AdminClient::new(channel(&socket).await);
    admin.limits(pb::LimitsRequest { top: 1 }).await.unwrap();
    drop(admin);
    agent.running.shutdown().await;

    // Where others may write, somebody could put another socket in its place.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &with_admin(&private, ""));
    let started = Running::start(load(dir.path()).unwrap(), None, Clock::SYSTEM);
    let error = format!("{:#}", started.unwrap_err());
    assert!(error.contains("nobody else may write to it"), "{error}");
    assert!(!socket.exists() && !dir.path().join("api.sock").exists(), "nothing is left behind");
}
