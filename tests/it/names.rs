//! Names of users and groups, at the surface of an agent whose databases of them are the test's (`accounts.c`).

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use durward::api::proto::workload as pb;
use nix::{
    sys::signal::Signal,
    unistd::{Gid, Uid, User, getegid, geteuid, setgroups, setresgid, setresuid},
};
use tempfile::TempDir;
use tonic::Code;

use crate::support::{Process, TRUST_DOMAIN, TestAgent, client, entry, make_library, request, write_config};

/// More than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// The socket that [`as_member`] calls.
const SOCKET: &str = "DURWARD_TEST_MEMBER";

/// The user whom [`as_member`] is: no node has it.
const MEMBER: u32 = 3_912_021;

/// Not a test, but a process of a thousand groups that nobody has, when a test started it.
#[test]
#[expect(clippy::disallowed_methods, reason = "how a test process is told that it is one")]
#[expect(clippy::exit, reason = "it is a process of its own")]
fn as_member() {
    let Ok(socket) = std::env::var(SOCKET) else { return };
    let groups: Vec<Gid> = (0..1000).map(|n| Gid::from_raw(3_913_000 + n)).collect();
    setgroups(&groups).unwrap();
    let (uid, gid) = (Uid::from_raw(MEMBER), Gid::from_raw(MEMBER));
    setresgid(gid, gid, gid).unwrap();
    setresuid(uid, uid, uid).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for _ in 0..4 {
            assert_eq!(served(Path::new(&socket)).await, Ok(vec!["/member".to_owned()]));
        }
    });
    std::process::exit(0);
}

/// The paths of the SPIFFE IDs that this process gets, or the code of the refusal.
async fn served(socket: &Path) -> Result<Vec<String>, Code> {
    let stream = client(socket).await.fetch_x509svid(request(pb::X509svidRequest {})).await;
    let mut stream = stream.map_err(|status| status.code())?.into_inner();
    Ok(paths(stream.message().await.unwrap().unwrap()))
}

fn paths(message: pb::X509svidResponse) -> Vec<String> {
    let id = format!("spiffe://{TRUST_DOMAIN}");
    let mut paths: Vec<_> =
        message.svids.iter().map(|svid| svid.spiffe_id.strip_prefix(&id).unwrap().to_owned()).collect();
    paths.sort();
    paths
}

fn named(path: &str, selectors: &str) -> String {
    format!("entry \"spiffe://{TRUST_DOMAIN}{path}\" {{\n  selectors = [{selectors}]\n}}\n")
}

/// An agent with databases of its own.
struct NamedAgent {
    dir: TempDir,
    agent: Process,
}

impl NamedAgent {
    async fn start(blocks: &str, hangs: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let library = dir.path().join("accounts.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/accounts.c");
        make_library(&library, &source);
        if hangs {
            fs::write(dir.path().join("hang"), "").unwrap();
        }
        write_config(dir.path(), blocks);
        // The end of a trouble is no warning.
        let config = dir.path().join("agent.conf");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("log_level = \"warn\"", "log_level = \"info\"")).unwrap();
        let preload = format!("LD_PRELOAD={}", library.display());
        let accounts = format!("DURWARD_TEST_ACCOUNTS={}", dir.path().display());
        let mut agent = Process::spawn_by(&["env", &preload, &accounts], dir.path());
        agent.serving(dir.path()).await;
        Self { dir, agent }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn calls(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("calls")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until a user that only the directory server knows is told this. Where tests cannot be that user, nobody asks.
    async fn far_is_served(&self, what: &str) {
        if !geteuid().is_root() {
            return;
        }
        let ask = || {
            let out = Command::new(env!("CARGO_BIN_EXE_durward"))
                .args(["api", "fetch", "x509", "--socket-path"])
                .arg(self.path("api.sock"))
                .current_dir("/")
                .uid(MEMBER)
                .gid(MEMBER)
                .output()
                .unwrap();
            String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned()
        };
        self.until(async || ask().contains(what), what).await;
    }

    async fn served(&self) -> Result<Vec<String>, Code> {
        served(&self.path("api.sock")).await
    }

    /// Waits until this process gets these.
    async fn serves(&self, want: Result<&[&str], Code>) {
        let want = want.map(|paths| paths.iter().map(|&path| path.to_owned()).collect());
        self.until(async || self.served().await == want, "served").await;
    }

    /// Waits until the log says this.
    async fn says(&self, text: &str) {
        let log = async || fs::read_to_string(self.path("log")).unwrap().contains(text);
        self.until(log, text).await;
    }

    async fn until(&self, is: impl AsyncFn() -> bool, what: &str) {
        let wait = async {
            while !is().await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            panic!("{what}: {:?}, {}", self.served().await, fs::read_to_string(self.path("log")).unwrap());
        }
    }

    fn reload(&self, blocks: &str) {
        write_config(self.dir.path(), blocks);
        self.agent.signal(Signal::SIGHUP);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_by_name_is_served_at_the_first_call() {
    let Some(own) = User::from_uid(geteuid()).unwrap() else {
        println!("an_entry_by_name_is_served_at_the_first_call: left out, as our user has no name");
        return;
    };
    let by_name = named("/named", &format!("\"unix:user:{}\"", own.name));
    let mut agent = TestAgent::start(&by_name);
    assert_eq!(served(&agent.socket()).await, Ok(vec!["/named".to_owned()]));
    let other = named("/other", &format!("\"unix:uid:{}\", \"unix:user:{}\"", geteuid(), own.name));
    agent.reload(&[by_name, other].concat()).unwrap();
    assert_eq!(served(&agent.socket()).await, Ok(vec!["/named".to_owned(), "/other".to_owned()]));
    agent.reload(&named("/other", "\"unix:user:no-such-user\"")).unwrap();
    assert_eq!(served(&agent.socket()).await, Err(Code::PermissionDenied), "that there is none is an answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_caller_brings_is_looked_up() {
    if !geteuid().is_root() {
        println!("nothing_that_a_caller_brings_is_looked_up: left out, as it needs root");
        return;
    }
    let member = named("/member", &format!("\"unix:uid:{MEMBER}\", \"unix:supplementary_gid:3913999\""));
    let names = named("/other", "\"unix:user:durward-newcomer\", \"unix:supplementary_group:nobodys\"");
    let agent = NamedAgent::start(&[member, names].concat(), false).await;
    fs::set_permissions(agent.dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for _ in 0..3 {
        let done = Command::new("/proc/self/exe")
            .args(["--exact", "names::as_member"])
            .env(SOCKET, agent.path("api.sock"))
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(done.success());
    }
    let calls = agent.calls();
    let wrong: Vec<_> =
        calls.iter().filter(|it| !it.ends_with(" durward-newcomer") && !it.ends_with(" nobodys")).collect();
    // Whose subordinate UIDs are whose is asked by the configuration.
    let of_file = |it: &&&String| !it.starts_with("getpwnam_r ");
    assert_eq!(wrong.iter().filter(of_file).collect::<Vec<_>>(), [&&""; 0], "{calls:?}");
    assert!(calls.iter().any(|it| it == "getpwnam_r durward-newcomer"), "{calls:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_added_reaches_open_streams() {
    let blocks = [entry("/plain", ""), named("/named", "\"unix:user:durward-newcomer\"")].concat();
    let agent = NamedAgent::start(&blocks, false).await;
    agent.says("entries ask for a user or group name that does not exist").await;
    let mut client = client(&agent.path("api.sock")).await;
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    assert_eq!(paths(stream.message().await.unwrap().unwrap()), ["/plain"]);

    fs::write(agent.path("users"), format!("durward-newcomer {}\n", geteuid())).unwrap();
    let next = tokio::time::timeout(PATIENCE, stream.message()).await.unwrap();
    assert_eq!(paths(next.unwrap().unwrap()), ["/named", "/plain"]);
    agent.says("the user database tells the number of this name").await;
    let log = fs::read_to_string(agent.path("log")).unwrap();
    let lines = log.lines().filter(|line| line.contains("name=durward-newcomer")).count();
    assert_eq!(lines, 2, "one when it begins, and one when it ends: {log}");
}

/// The reason is what the call returns: errno may be anything.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_fails_is_told_with_its_reason() {
    let others = format!("\"unix:user:broken\", \"unix:gid:{}\"", getegid().as_raw() + 1);
    let blocks = [entry("/plain", ""), named("/others", &others)].concat();
    let agent = NamedAgent::start(&blocks, false).await;
    agent.says("does not answer for a name that entries ask for").await;
    agent.says("kind=user name=broken error=\"EIO: I/O error\"").await;
    assert_eq!(agent.served().await, Ok(vec!["/plain".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs_holds_up_whom_it_may_concern_and_nobody_else() {
    // Of a group that this process is not in.
    let others = format!("\"unix:user:slow1\", \"unix:gid:{}\"", getegid().as_raw() + 1);
    let far = named("/far", &format!("\"unix:uid:{MEMBER}\""));
    let blocks = [entry("/plain", ""), named("/others", &others), far.clone()].concat();
    let mut agent = NamedAgent::start(&blocks, true).await;
    assert_eq!(agent.served().await, Ok(vec!["/plain".to_owned()]), "it asks for nothing that hangs");
    agent.far_is_served("spiffe://example.org/far").await;
    agent.says("the user database does not answer").await;

    // May be of whoever is no user of the node's own: no smaller set of identities in its place.
    let ours = named("/ours", "\"unix:user:slow2\"");
    agent.reload(&[blocks.clone(), ours.clone()].concat());
    agent.far_is_served("Unavailable").await;
    agent.serves(Ok(&["/plain"])).await;

    // A reload that needs an answer says that there is none, and changes nothing.
    let limit = "ratelimit { caller { override \"user:slow3\" { unlimited = true } } }\n";
    agent.reload(&[&blocks, limit].concat());
    agent.says("the user database of this node does not say who the user \\\"slow3\\\" is").await;
    agent.far_is_served("Unavailable").await;

    fs::write(agent.path("users"), format!("slow1 1\nslow2 {}\nslow3 3\n", geteuid())).unwrap();
    fs::remove_file(agent.path("hang")).unwrap();
    agent.serves(Ok(&["/ours", "/plain"])).await;
    agent.far_is_served("spiffe://example.org/far").await;
    agent.reload(&[&blocks, limit].concat());
    agent.serves(Ok(&["/plain"])).await;

    // It hangs again: what was known holds, and the agent ends when it is told to.
    agent.reload(&[blocks, ours].concat());
    agent.serves(Ok(&["/ours", "/plain"])).await;
    fs::write(agent.path("hang"), "").unwrap();
    agent.reload(&[entry("/plain", ""), far, named("/others", "\"unix:user:slow4\"")].concat());
    agent.serves(Ok(&["/plain"])).await;
    agent.far_is_served("Unavailable").await;
    agent.agent.signal(Signal::SIGTERM);
    assert!(agent.agent.wait().success());
}
