//! Streams whose process becomes something else while they are open: an update is for what it is by then.
//!
//! The processes are this test binary, started again as [`as_holder`]. It connects with a socket that the test holds as
//! well: so the test reads what the process is sent, whatever becomes of it. Nobody but the process writes.

use std::{
    fmt, fs,
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::{
            fs::PermissionsExt as _,
            net::{UnixListener, UnixStream},
            process::CommandExt as _,
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use durward::{agent::Running, api::proto::workload as pb, os::clock::Clock};
use nix::{
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
    unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid},
};
use prost::Message as _;

use crate::{
    frames::{
        DATA, END_STREAM, HEADERS, PREFACE, RST_STREAM, SETTINGS, call_frames, frame, message, settings,
    },
    hostile::{Agent, NEIGHBOUR, PATIENCE},
    support::{TRUST_DOMAIN, TestAgent, load, write_config},
};

const AGENT: &str = "DURWARD_TEST_HOLDER_AGENT";
const ORDERS: &str = "DURWARD_TEST_HOLDER_ORDERS";
/// How many groups the process has, if it is to be [`USER`].
const GROUPS: &str = "DURWARD_TEST_HOLDER_GROUPS";

/// Numbers of users and groups that nobody has.
const USER: u32 = 3_913_001;
const OTHER: u32 = 3_913_002;
const FIRST_GROUP: u32 = 3_914_000;

const X509_SVID: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const X509_BUNDLES: &str = "/SpiffeWorkloadAPI/FetchX509Bundles";
const JWT_BUNDLES: &str = "/SpiffeWorkloadAPI/FetchJWTBundles";

/// Not a test, but the process at the other end when [`Holder`] started it: its standard input is a socket that is not
/// connected yet.
#[test]
#[expect(clippy::disallowed_methods, reason = "how a test process is told that it is one")]
fn as_holder() {
    let Ok(orders) = std::env::var(ORDERS) else { return };
    if let Ok(groups) = std::env::var(GROUPS) {
        let groups: Vec<Gid> =
            (0..groups.parse().unwrap()).map(|nth| Gid::from_raw(FIRST_GROUP + nth)).collect();
        setgroups(&groups).unwrap();
        setresgid(USER.into(), USER.into(), USER.into()).unwrap();
        become_user(USER);
    }
    let agent = UnixAddr::new(std::env::var(AGENT).unwrap().as_str()).unwrap();
    connect(std::io::stdin().as_raw_fd(), &agent).unwrap();
    let mut connection = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    connection.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).unwrap();
    let mut control = UnixStream::connect(orders).unwrap();
    for order in BufReader::new(control.try_clone().unwrap()).lines() {
        let order = order.unwrap();
        match order.split_once(' ').unwrap() {
            ("open", call) => {
                let (number, path) = call.split_once(' ').unwrap();
                let call = call_frames(number.parse().unwrap(), path, &message(&[]));
                connection.write_all(&call).unwrap();
            }
            ("window", size) => connection.write_all(&settings(4, size.parse().unwrap())).unwrap(),
            ("user", uid) => become_user(uid.parse().unwrap()),
            ("group", gid) => {
                let user = geteuid();
                become_user(0);
                let gid = Gid::from_raw(gid.parse().unwrap());
                setresgid(gid, gid, gid).unwrap();
                become_user(user.as_raw());
            }
            ("groups", _none) => {
                let user = geteuid();
                become_user(0);
                setgroups(&[]).unwrap();
                become_user(user.as_raw());
            }
            ("saved", uid) => setresuid(geteuid(), geteuid(), Uid::from_raw(uid.parse().unwrap())).unwrap(),
            ("execute", path) => {
                control.write_all(b".").unwrap();
                loop {
                    let err = Command::new(path).arg("600").exec();
                    // A process that another test starts just now may hold the copy open for a moment.
                    assert_eq!(err.kind(), ErrorKind::ExecutableFileBusy, "{err}");
                }
            }
            (other, _) => panic!("no such order: {other}"),
        }
        control.write_all(b".").unwrap();
    }
}

/// By way of root, which stays the saved one.
fn become_user(uid: u32) {
    let (uid, root) = (Uid::from_raw(uid), Uid::from_raw(0));
    if !geteuid().is_root() {
        setresuid(root, root, root).unwrap();
    }
    setresuid(uid, uid, root).unwrap();
}

/// Who a process is.
#[derive(Clone, Copy)]
enum As {
    Us,
    /// [`USER`], with so many groups.
    User(u32),
}

/// A process that connected, and what it is sent.
struct Holder {
    child: Child,
    control: UnixStream,
    connection: UnixStream,
    got: Vec<u8>,
}

/// What an open stream is sent.
#[derive(PartialEq, Eq)]
enum Sent {
    /// A message.
    Message(Vec<u8>),
    /// Its end.
    End,
    /// Nothing in the time that was given.
    Nothing,
}

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Message(bytes) => write!(f, "a message of {} bytes", bytes.len()),
            Self::End => f.write_str("the end"),
            Self::Nothing => f.write_str("nothing"),
        }
    }
}

impl Holder {
    /// Has it connect to the agent at `agent`.
    fn start(agent: &Path, who: As) -> Self {
        let meeting = tempfile::tempdir().unwrap();
        let path = meeting.path().join("orders");
        let listener = UnixListener::bind(&path).unwrap();
        // Whoever it is.
        for (of, mode) in
            [(agent.parent().unwrap(), 0o755), (agent, 0o777), (meeting.path(), 0o755), (&path, 0o777)]
        {
            fs::set_permissions(of, fs::Permissions::from_mode(mode)).unwrap();
        }
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "streams::as_holder"]).env(AGENT, agent).env(ORDERS, &path);
        if let As::User(groups) = who {
            command.env(GROUPS, groups.to_string());
        }
        let child = command.stdin(socket.try_clone().unwrap()).stdout(Stdio::null()).spawn().unwrap();
        let (control, _) = listener.accept().unwrap();
        Self { child, control, connection: UnixStream::from(socket), got: Vec::new() }
    }

    /// Has it do something, and waits until it is done.
    fn order(&mut self, order: &str) {
        writeln!(self.control, "{order}").unwrap();
        self.control.read_exact(&mut [0]).unwrap();
    }

    /// Has it open a stream, and reads its first message.
    fn open(&mut self, path: &str) -> Vec<u8> {
        self.order(&format!("open 1 {path}"));
        match self.next(PATIENCE) {
            Sent::Message(first) => first,
            other => panic!("{path}: {other:?}"),
        }
    }

    /// Has it execute another program, and waits until it does.
    fn execute(&mut self, program: &Path) {
        self.order(&format!("execute {}", program.display()));
        // For a moment there is none, as a thread other than the first executes.
        while fs::read_link(format!("/proc/{}/exe", self.child.id())).ok().as_deref() != Some(program) {
            assert!(self.child.try_wait().unwrap().is_none(), "{} was not executed", program.display());
            std::thread::yield_now();
        }
    }

    /// What it is sent next on the stream that it opened.
    fn next(&mut self, within: Duration) -> Sent {
        self.connection.set_read_timeout(Some(within)).unwrap();
        let mut buffer = [0; 8192];
        loop {
            while let Some((kind, flags, payload)) = self.frame() {
                match kind {
                    // Messages here are shorter than a frame, and each is sent by itself.
                    DATA if payload.len() >= 5 => return Sent::Message(payload[5..].to_vec()),
                    RST_STREAM => return Sent::End,
                    HEADERS if flags & END_STREAM != 0 => return Sent::End,
                    _ => {}
                }
            }
            match self.connection.read(&mut buffer) {
                Ok(0) => return Sent::End,
                Ok(more) => self.got.extend_from_slice(&buffer[..more]),
                Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Sent::Nothing;
                }
                Err(err) => panic!("{err}"),
            }
        }
    }

    /// The next whole frame that is not the connection's own.
    fn frame(&mut self) -> Option<(u8, u8, Vec<u8>)> {
        loop {
            let ([a, b, c, kind, flags, stream @ ..], rest) = self.got.split_first_chunk::<9>()?;
            let length = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap();
            let of_stream = u32::from_be_bytes(*stream) != 0;
            let found = (*kind, *flags, rest.get(..length)?.to_vec());
            self.got.drain(..9 + length);
            if of_stream {
                return Some(found);
            }
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The paths of the SPIFFE IDs in a message, in their order.
fn ids(message: &[u8]) -> Vec<String> {
    let svids = pb::X509svidResponse::decode(message).unwrap().svids;
    let own = format!("spiffe://{TRUST_DOMAIN}/");
    svids.into_iter().map(|svid| svid.spiffe_id.strip_prefix(&own).unwrap().to_owned()).collect()
}

fn entry(id: &str, selector: &str, more: &str) -> String {
    format!(
        "entry \"spiffe://{TRUST_DOMAIN}/{id}\" {{\n  selectors = [\"unix:{selector}\"]\n  id = \"{id}\"\n  {more}\n}}\n"
    )
}

/// Whether a test may make processes of other users; says so if not.
fn may_be_others(test: &str) -> bool {
    let root = geteuid().is_root();
    if !root {
        println!("{test} was left out, as it needs root");
    }
    root
}

/// The message of a stream that is sent one.
fn some(sent: Sent) -> Vec<u8> {
    match sent {
        Sent::Message(message) => message,
        other => panic!("{other:?} and no message"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_became_somebody_else_is_sent_nothing_more() {
    if !may_be_others("a_process_that_became_somebody_else_is_sent_nothing_more") {
        return;
    }
    let entries = [
        entry("user", &format!("uid:{USER}"), ""),
        entry("other", &format!("uid:{OTHER}"), ""),
        entry("root", "uid:0", ""),
        entry("group", &format!("gid:{OTHER}"), ""),
    ]
    .concat();
    let more = entry("more", &format!("uid:{USER}"), "");
    for (case, path, order, ends) in [
        ("SVIDs, another user", X509_SVID, &format!("user {OTHER}"), true),
        ("SVIDs, root", X509_SVID, &"user 0".to_owned(), true),
        ("SVIDs, another group", X509_SVID, &format!("group {OTHER}"), true),
        ("X.509 bundles, another user", X509_BUNDLES, &format!("user {OTHER}"), true),
        ("JWT bundles, another user", JWT_BUNDLES, &format!("user {OTHER}"), true),
        ("another saved user alone", X509_SVID, &format!("saved {USER}"), false),
    ] {
        let mut agent = TestAgent::start(&entries);
        let mut changing = Holder::start(&agent.socket(), As::User(0));
        let mut staying = Holder::start(&agent.socket(), As::User(0));
        changing.open(path);
        assert_eq!(ids(&staying.open(X509_SVID)), ["user"], "{case}");
        changing.order(order);
        agent.reload(&[entries.as_str(), &more].concat()).unwrap();
        // The neighbour has its update, and has it once.
        assert_eq!(ids(&some(staying.next(PATIENCE))), ["more", "user"], "{case}");
        match changing.next(PATIENCE) {
            Sent::End => assert!(ends, "{case}"),
            Sent::Message(message) => {
                assert!(!ends, "{case}: a message of {} bytes", message.len());
                assert_eq!(ids(&message), ["more", "user"], "{case}");
            }
            Sent::Nothing => panic!("{case}: neither updated nor ended"),
        }
        if ends {
            let metrics = agent.running.metrics().render();
            let method = path.rsplit_once('/').unwrap().1;
            let ended = format!("durward_calls_total{{method=\"{method}\",code=\"Unavailable\"}} 1");
            assert!(metrics.lines().any(|line| line == ended), "{case}: {ended}");
        }
        agent.reload(&entries).unwrap();
        assert_eq!(ids(&some(staying.next(PATIENCE))), ["user"], "{case}");
    }
}

/// Streams whose peer takes no more of them, more than make an update at the same time.
#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_keeps_nobody_from_an_update() {
    let own = geteuid();
    let entries = entry("own", &format!("uid:{own}"), "");
    let mut agent = TestAgent::start(&entries);
    let mut deaf = [Holder::start(&agent.socket(), As::Us), Holder::start(&agent.socket(), As::Us)];
    for (process, reads_the_first) in deaf.iter_mut().zip([false, true]) {
        process.order(if reads_the_first { "window 65535" } else { "window 0" });
        for number in 0..16 {
            process.order(&format!("open {} {X509_SVID}", 1 + 2 * number));
            if reads_the_first {
                some(process.next(PATIENCE));
            }
        }
        process.order("window 0");
    }
    let mut reading = Holder::start(&agent.socket(), As::Us);
    assert_eq!(ids(&reading.open(X509_SVID)), ["own"]);
    for more in ["a", "b", "c"] {
        let more = entry(more, &format!("uid:{own}"), "");
        agent.reload(&[entries.as_str(), &more].concat()).unwrap();
        assert_eq!(ids(&some(reading.next(PATIENCE))).len(), 2);
    }
}

/// Nothing but time passes: the SVID is renewed.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_key_is_not_for_who_dropped_its_privileges() {
    if !may_be_others("a_renewed_key_is_not_for_who_dropped_its_privileges") {
        return;
    }
    let short = "x509_svid_ttl = \"4s\"";
    let agent = TestAgent::start(
        &[entry("root", "uid:0", short), entry("user", &format!("uid:{USER}"), short)].concat(),
    );
    let mut dropping = Holder::start(&agent.socket(), As::Us);
    let mut staying = Holder::start(&agent.socket(), As::Us);
    let firsts = [dropping.open(X509_SVID), staying.open(X509_SVID)];
    assert_eq!(ids(&firsts[0]), ["root"]);
    dropping.order(&format!("user {USER}"));
    assert_eq!(dropping.next(PATIENCE), Sent::End);
    let mut seen = firsts[1].clone();
    for _ in 0..2 {
        let next = some(staying.next(PATIENCE));
        assert_eq!(ids(&next), ["root"]);
        assert_ne!(next, seen, "a message for each renewal, and no more");
        seen = next;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_executes_another_program_has_its_entries() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two, three] = ["one", "two", "three"].map(|name| {
        let path = dir.path().join(name);
        fs::copy("/bin/sleep", &path).unwrap();
        path
    });
    let of = |path: &Path, name: &str| entry(name, &format!("path:{}", path.display()), "");
    let ours = std::env::current_exe().unwrap().canonicalize().unwrap();
    let entries = [of(&ours, "ours"), of(&one, "one"), of(&two, "two")].concat();
    let configure = |more: &str| {
        write_config(dir.path(), &[&entries, more].concat());
        let file = dir.path().join("agent.conf");
        let text = fs::read_to_string(&file).unwrap();
        let discovering = "plugin_data { discover_workload_path = true workload_size_limit = -1 }";
        fs::write(&file, text.replace("plugin_data { }", discovering)).unwrap();
        load(dir.path()).unwrap()
    };
    let mut agent = Running::start(configure(""), None, Clock::SYSTEM).unwrap();
    let socket = dir.path().join("api.sock");

    for (nth, (program, has)) in [(&one, Some("one")), (&two, Some("two")), (&three, None)].iter().enumerate()
    {
        let mut process = Holder::start(&socket, As::Us);
        assert_eq!(ids(&process.open(X509_SVID)), ["ours"], "{has:?}");
        process.execute(program);
        agent.reload(configure(&entry(&format!("stranger{nth}"), "uid:4242", ""))).unwrap();
        match has {
            Some(id) => assert_eq!(ids(&some(process.next(PATIENCE))), [*id]),
            None => assert_eq!(process.next(PATIENCE), Sent::End),
        }
    }
    let metrics = agent.metrics().render();
    let ended = r#"durward_calls_total{method="FetchX509SVID",code="PermissionDenied"} 1"#;
    assert!(metrics.lines().any(|line| line == ended), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dropped_its_groups_has_fewer_entries() {
    if !may_be_others("a_process_that_dropped_its_groups_has_fewer_entries") {
        return;
    }
    let group = format!("supplementary_gid:{FIRST_GROUP}");
    let entries = [entry("group", &group, ""), entry("user", &format!("uid:{USER}"), "")].concat();
    let mut agent = TestAgent::start(&entries);
    let mut process = Holder::start(&agent.socket(), As::User(1));
    assert_eq!(ids(&process.open(X509_SVID)), ["group", "user"]);
    process.order("groups none");
    // A reload drops what was attested before, so that it need not be a second old.
    agent.reload(&[entries.as_str(), &entry("stranger", "uid:4242", "")].concat()).unwrap();
    assert_eq!(ids(&some(process.next(PATIENCE))), ["user"]);
}

/// What was attested of a process is not kept for its streams.
#[test]
fn a_stream_of_a_process_with_many_groups_takes_no_more_than_another() {
    /// In KiB: what the allocator keeps, and nothing like the groups of a hundred streams.
    const MORE: u64 = 2 * 1024;
    if !may_be_others("a_stream_of_a_process_with_many_groups_takes_no_more_than_another") {
        return;
    }
    let entries = [entry("user", &format!("uid:{USER}"), ""), entry("root", "uid:0", "")].concat();
    let agent = Agent::with("", &[entries, entry("neighbour", &format!("uid:{NEIGHBOUR}"), "")].concat());
    let mut most = Vec::new();
    for groups in [0, 1000] {
        let open = agent.bear(|| {
            let mut open = Vec::new();
            for _ in 0..8 {
                let mut process = Holder::start(&agent.socket(), As::User(groups));
                for stream in 0..16 {
                    let path = [X509_SVID, X509_BUNDLES, JWT_BUNDLES][stream % 3];
                    process.order(&format!("open {} {path}", 1 + 2 * stream));
                    some(process.next(PATIENCE));
                }
                open.push(process);
            }
            open
        });
        assert_eq!(open.len(), 8);
        most.push(agent.most_memory());
    }
    println!("{most:?} KiB at most");
    assert!(most[1] <= most[0] + MORE, "{most:?} KiB");
    agent.well("streams of many groups");
}
