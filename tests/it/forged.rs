//! Callers that would be taken for others, against the whole agent: by the name of a cgroup, and by a connection that somebody
//! else opened.

#![expect(clippy::disallowed_methods, reason = "its callers are threads and processes, which may sleep")]

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{net::UnixStream, process::CommandExt as _},
    },
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use durward::api::proto::admin::{self as pb, admin_client::AdminClient};
use nix::{
    sys::signal::kill,
    unistd::{Pid, geteuid},
};
use tempfile::TempDir;

use crate::{
    cgroup::Tree,
    frames::{Called, FETCH_JWT, PREFACE, SETTINGS, answer, answer_on, call_frames, jwt_request, message},
    hostile::{Agent, NEIGHBOUR, PATIENCE},
    support::{TRUST_DOMAIN, channel},
};

/// The user who makes cgroups.
const FORGER: u32 = 65_533;

/// What is below a tree that somebody may make cgroups in, and looks like a pod's. `{u}` is the pod's UID, `{u_}` the same as
/// systemd has it, `{c}` a container's ID, `{tree}` the name of the tree.
const INVENTED: [&str; 12] = [
    "user.slice/user-1000.slice/user@1000.service/kubepods/pod{u}/{c}",
    "user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod{u_}.slice/cri-containerd-{c}.scope",
    "user.slice/{tree}/kubepods/burstable/pod{u}/{c}",
    "app/kubepods/besteffort/pod{u}/{c}",
    "kubepods2/pod{u}/{c}",
    "kubepods /pod{u}/{c}",
    "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{u_}.slice/crio-{c}.scope",
    "docker/{c}/kubepods/pod{u}/{c}",
    "system.slice/docker-{c}.scope/kubelet/kubepods/pod{u}/{c}",
    "kubepods-pod{u_}.slice:cri-containerd:{c}",
    "system.slice/containerd.service/kubepods-pod{u_}.slice:cri-containerd:{c}",
    "0::/{tree}/kubepods/pod{u}/{c}",
];

/// The cgroup of the pod that has this number, as `shape` has it, and its UID.
fn cgroup(shape: &str, tree: &Tree, number: usize) -> (String, String) {
    let uid = format!("{number:08x}-b29f-11e7-9350-020968147796");
    let name = shape
        .replace("{u}", &uid)
        .replace("{u_}", &uid.replace('-', "_"))
        .replace("{c}", &"9b".repeat(32))
        .replace("{tree}", &tree.name);
    (name, uid)
}

/// An agent on Kubernetes that says whom it charges. None of its buckets fills up again while the test runs, and so none is
/// forgotten.
struct Charging {
    agent: Agent,
    private: TempDir,
}

impl Charging {
    fn start(kubernetes: &str) -> Self {
        let private = tempfile::tempdir().unwrap();
        let mut blocks = format!(
            "agent {{\n  kubernetes {{\n    mode = \"on\"\n{kubernetes}\n  }}\n  admin_socket_path = \"{}/admin/sock\"\n}}\n\
             ratelimit {{\n  gate {{\n    caller {{ rate = 1 per = \"day\" burst = 300 }}\n  }}\n\
             caller {{ rate = 1 per = \"day\" burst = 300 }}\n}}\n",
            private.path().display()
        );
        for uid in [geteuid().as_raw(), FORGER, NEIGHBOUR] {
            blocks.push_str(&format!(
                "entry \"spiffe://{TRUST_DOMAIN}/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n"
            ));
        }
        Self { agent: Agent::with("", &blocks), private }
    }

    /// The callers that the gate charged for connections, and those that the caller stage charged for FetchJWTSVID; how often
    /// each was.
    fn charged(&self) -> [Vec<(String, u32)>; 2] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = runtime.block_on(async {
            let mut admin = AdminClient::new(channel(&self.private.path().join("admin/sock")).await);
            admin.limits(pb::LimitsRequest { top: 1000 }).await.unwrap().into_inner()
        });
        let keys = answer.keys.unwrap();
        [("gate", keys.gate, "connections"), ("caller", keys.caller, "FetchJWTSVID")].map(
            |(stage, keys, what)| {
                let of_stage = answer.heaviest.iter().filter_map(|heavy| {
                    let bucket = heavy.bucket.as_ref().unwrap();
                    assert_eq!(heavy.refused, 0, "{bucket:?}");
                    (bucket.stage == stage).then_some((bucket, heavy.used))
                });
                let all: Vec<_> = of_stage.collect();
                assert_eq!(u64::try_from(all.len()).unwrap(), keys, "{stage}: all are listed: {all:?}");
                let of_method = all.into_iter().filter(|(bucket, _)| bucket.method == what);
                let mut charged: Vec<_> =
                    of_method.map(|(bucket, used)| (bucket.key.clone(), used)).collect();
                charged.sort();
                charged
            },
        )
    }

    /// A call of a process in the cgroup `below` the tree. It is put there before it connects, as [`FORGER`] where the tests
    /// run as root.
    fn call_from(&self, tree: &Tree, below: &str) -> Output {
        let command = self.agent.command();
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "read -r _ && exec \"$@\"", "sh"])
            .arg(command.get_program())
            .args(command.get_args());
        shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir("/");
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if geteuid().is_root() {
            shell.uid(FORGER).gid(FORGER);
        }
        let mut caller = shell.spawn().unwrap();
        tree.put(caller.id(), below).unwrap_or_else(|error| panic!("{below}: {error}"));
        caller.stdin.take().unwrap().write_all(b"\n").unwrap();
        caller.wait_with_output().unwrap()
    }

    /// The same, of many processes: all are served.
    fn calls_from(&self, tree: &Tree, cgroups: &[String]) {
        thread::scope(|scope| {
            for part in cgroups.chunks(cgroups.len().div_ceil(4)) {
                scope.spawn(move || {
                    for below in part {
                        let out = self.call_from(tree, below);
                        assert!(out.status.success(), "{below}: {}", String::from_utf8_lossy(&out.stderr));
                    }
                });
            }
        });
    }
}

/// A hundred processes in a hundred cgroups with names that look like pods' are their user, and one caller. Processes where
/// only the kubelet can put them are their pods, if it is known that it does.
#[test]
fn a_forged_cgroup_name_makes_nobody_a_pod() {
    let Some(tree) = Tree::make("forged") else { return };
    let forged: Vec<String> =
        (0..100).map(|nth| cgroup(INVENTED[nth % INVENTED.len()], &tree, nth).0).collect();
    let shapes = ["kubepods/pod{u}/{c}", "kubepods/burstable/pod{u}/{c}", "kubepods/besteffort/pod{u}"];
    let (real, pods): (Vec<String>, Vec<String>) =
        shapes.iter().zip(1000..).map(|(shape, nth)| cgroup(shape, &tree, nth)).unzip();
    let pods: Vec<(String, u32)> = pods.iter().map(|uid| (format!("pod:{uid}"), 1)).collect();
    let root = format!("    kubelet_cgroup_root = \"/{}/kubepods\"", tree.name);

    for (case, kubernetes, known) in
        [("the roots that are there without a setting", "", false), ("a root that was set", &*root, true)]
    {
        let charging = Charging::start(kubernetes);
        let agent = &charging.agent;
        agent.bear(|| charging.calls_from(&tree, &forged));
        agent.well(case);
        let after_forged = charging.charged();
        for charged in &after_forged {
            let keys: Vec<&str> = charged.iter().map(|(key, _)| &**key).collect();
            if geteuid().is_root() {
                assert_eq!(keys, ["uid:0", "uid:65533", "uid:65534"], "{case}");
                assert_eq!(charged[1].1, 100, "{case}: {charged:?}");
            } else {
                assert_eq!(keys, [format!("uid:{}", geteuid())], "{case}");
            }
        }

        charging.calls_from(&tree, &real);
        for (charged, before) in charging.charged().into_iter().zip(after_forged) {
            let new: Vec<_> = charged.iter().filter(|(key, _)| key.starts_with("pod:")).cloned().collect();
            assert_eq!(new, if known { pods.clone() } else { vec![] }, "{case}");
            let sum = |charged: &[(String, u32)]| charged.iter().map(|(_, used)| used).sum::<u32>();
            assert_eq!(sum(&charged), sum(&before) + 3, "{case}: {charged:?}");
        }
    }
}

// ---- connections of others ----------------------------------------------------------------------

const PART: &str = "DURWARD_TEST_HEIR_PART";
const SOCKET: &str = "DURWARD_TEST_HEIR_SOCKET";
const PARENT: &str = "DURWARD_TEST_HEIR_PARENT";

/// What a connection begins with.
const HELLO: [&[u8]; 2] = [PREFACE, &[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]];

/// This test binary again, as a process that plays a part.
fn play(part: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "forged::part", "--nocapture", "--quiet"]).env(PART, part);
    command
}

/// The other side of [`play`]; nothing when the tests run.
#[test]
fn part() {
    let Some(part) = std::env::var_os(PART) else { return };
    match part.to_str().unwrap() {
        "heir" => heir(),
        testator => testator_of(testator),
    }
}

/// Connects, does what `kind` says, leaves the connection to a child, and exits.
fn testator_of(kind: &str) {
    let mut stream = UnixStream::connect(std::env::var_os(SOCKET).unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    match kind {
        "silent" => {}
        "served" => {
            stream
                .write_all(&[HELLO.concat(), call_frames(1, FETCH_JWT, &jwt_request("testator"))].concat())
                .unwrap();
            assert_eq!(answer(&mut stream), Called::Answered);
        }
        "streaming" => {
            let open = call_frames(1, "/SpiffeWorkloadAPI/FetchX509SVID", &message(&[]));
            stream.write_all(&[HELLO.concat(), open].concat()).unwrap();
            let mut got = Vec::new();
            while !got.windows(9).any(|window| window == b"spiffe://") {
                let mut buffer = [0; 4096];
                let read = stream.read(&mut buffer).unwrap();
                assert_ne!(read, 0);
                got.extend_from_slice(&buffer[..read]);
            }
        }
        other => panic!("no such part: {other}"),
    }
    let mut heir = play("heir");
    heir.env("DURWARD_TEST_HEIR_KIND", kind).env(PARENT, std::process::id().to_string());
    heir.stdin(OwnedFd::from(stream)).stdout(Stdio::piped());
    // What it says at its end is for the test.
    heir.stderr(std::io::stdout().as_fd().try_clone_to_owned().unwrap());
    let mut heir = heir.spawn().unwrap();
    // It has called, and the testator may die.
    let said = BufReader::new(heir.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(said.take_while(|line| line != "called").count() < 10);
    drop(heir);
}

/// Calls over the connection that it was left: once while the testator lives, and once after its death.
fn heir() {
    let var = |name: &str| std::env::var_os(name).unwrap().into_string().unwrap();
    let kind = var("DURWARD_TEST_HEIR_KIND");
    let testator = Pid::from_raw(var(PARENT).parse().unwrap());
    let mut stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    let call = |number: u32, stream: &mut UnixStream| {
        let hello = if number == 1 { HELLO.concat() } else { vec![] };
        let call = call_frames(number, FETCH_JWT, &jwt_request("heir"));
        match stream.write_all(&[hello, call].concat()) {
            Ok(()) => answer_on(number, stream),
            Err(_) => Called::Closed,
        }
    };
    // The testator used the first stream, or none.
    let (mut number, mut alive) = (1, None);
    if kind != "silent" {
        alive = Some(call(3, &mut stream));
        number = 5;
    }
    println!("\ncalled");
    // Until nobody has its number any more: it has ended, and the test has waited for it.
    while kill(testator, None).is_ok() {
        thread::yield_now();
    }
    // Waits for what never comes, so for the end of the connection.
    let dead = [call(number, &mut stream), answer_on(u32::MAX, &mut stream)];
    let mut to_test = std::io::stderr().lock();
    writeln!(to_test, "heir: {alive:?} {dead:?}").unwrap();
}

/// Processes that connect, die, and leave the connection to a child: it is not served for them while they live, nor
/// afterwards, and nothing of it stays.
#[test]
fn whoever_is_left_a_connection_gets_nothing_of_it() {
    // So many of each kind are played at once, a few times: within what one caller may hold.
    const AT_ONCE: usize = 16;
    const TIMES: usize = 2;
    // All are one caller, whose limits are not what this is about.
    let enough = "caller { rate = 100 burst = 2000 }\n  identity { rate = 100 burst = 2000 }\n  node { attestations_per_caller = 64 }\n";
    let uid = |uid| {
        format!("entry \"spiffe://{TRUST_DOMAIN}/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n")
    };
    let blocks = [uid(geteuid().as_raw()), uid(NEIGHBOUR), format!("ratelimit {{\n  {enough}}}\n")].concat();
    let agent = Agent::with("", &blocks);
    let before = agent.descriptors();
    let socket = agent.socket();
    let bequeath = |kind: &str| {
        let mut testator =
            play(kind).env(SOCKET, &socket).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = testator.stdout.take().unwrap();
        testator.wait().unwrap();
        let mut text = String::new();
        said.read_to_string(&mut text).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("heir: "));
        line.unwrap_or_else(|| panic!("{kind}: {text}")).to_owned()
    };
    let bear = |kind: &str, alive: &str| {
        for _ in 0..TIMES {
            let said = bequeath(kind);
            // Refused first, or closed at once if it was seen in time.
            let dead = ["[Refused, Closed]", "[Closed, Closed]"].map(|dead| format!("{alive} {dead}"));
            assert!(dead.contains(&said), "{kind}: {said}");
        }
    };
    agent.bear(|| {
        thread::scope(|scope| {
            let unheard = "Some(Closed)";
            for (kind, alive) in [("silent", "None"), ("served", unheard), ("streaming", unheard)] {
                let bear = &bear;
                for _ in 0..AT_ONCE {
                    scope.spawn(move || bear(kind, alive));
                }
            }
        });
    });
    agent.well("connections that were left to others");
    let began = Instant::now();
    while agent.descriptors() > before + 4 {
        assert!(began.elapsed() < PATIENCE, "{} descriptors, {before} before", agent.descriptors());
        thread::sleep(Duration::from_millis(50));
    }
}
