//! Nodes on which an agent cannot tell callers apart. As an ordinary user none of them can be made: nothing is tested then.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::{
        fs::{PermissionsExt as _, chown},
        net::UnixStream,
        process::CommandExt as _,
    },
    path::Path,
    process::Command,
};

use durward::{api::proto::workload as pb, os::pidfd::Pidfd};
use nix::unistd::{Pid, geteuid};

use crate::{
    kubelet::{FakeKubelet, Reply, listed, pod},
    support::{Process, entry, request, write_config},
};

/// How long anything may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// A user of no other test.
const USER: u32 = 731_006;

fn prepare(dir: &Path, blocks: &str) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let health = format!("health_checks {{ socket_path = \"{}\" }}\n", dir.join("health.sock").display());
    write_config(dir, &format!("{health}{blocks}"));
}

/// Has the agent in `dir` find out what processes execute.
fn discover_paths(dir: &Path) {
    let config = fs::read_to_string(dir.join("agent.conf")).unwrap();
    let discovers = config.replace("plugin_data { }", "plugin_data { discover_workload_path = true }");
    fs::write(dir.join("agent.conf"), discovers).unwrap();
}

/// What the agent in `dir` says of its readiness, once it has started.
async fn ready(dir: &Path) -> String {
    loop {
        let answer = ask(dir);
        if !answer.contains("\"agent\":null") {
            return answer;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

fn ask(dir: &Path) -> String {
    let mut stream = UnixStream::connect(dir.join("health.sock")).unwrap();
    stream.write_all(b"GET /ready HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// The log of the agent in `dir`, once this stands there: it is written by a thread of its own.
async fn logged(dir: &Path, want: &str) -> String {
    let log = || fs::read_to_string(dir.join("log")).unwrap();
    let written = async {
        while !log().contains(want) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, written).await.unwrap_or_else(|_late| panic!("{want}: {}", log()));
    log()
}

/// What `durward api fetch jwt` says to another user.
fn fetch_as(user: u32, dir: &Path) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
    command.args(["api", "fetch", "jwt", "--audience", "a", "--socket-path"]).arg(dir.join("api.sock"));
    said(command.uid(user).gid(user))
}

/// The same, of a process that is in these supplementary groups.
fn fetch_in_groups(user: u32, groups: impl IntoIterator<Item = u32>, dir: &Path) -> String {
    let groups: Vec<_> = groups.into_iter().map(|group| group.to_string()).collect();
    let user = user.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &user, "--groups", &groups.join(",")]);
    command.args([env!("CARGO_BIN_EXE_durward"), "api", "fetch", "jwt", "--audience", "a", "--socket-path"]);
    said(command.arg(dir.join("api.sock")))
}

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_number_is_not_taken_for_nobody() {
    let can = Command::new("unshare").args(["--user", "--map-root-user", "true"]).status();
    if !geteuid().is_root() || !can.is_ok_and(|status| status.success()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let nobody = "entry \"spiffe://example.org/nobody\" { selectors = [\"unix:uid:65534\"] }\n";
    prepare(dir.path(), &format!("{nobody}{}", entry("/web", "")));
    let mut agent = Process::spawn_by(&["unshare", "--user", "--map-root-user"], dir.path());
    let mut client = agent.serving(dir.path()).await;
    let fetched = client.fetch_jwtsvid(request(pb::JwtsvidRequest {
        audience: vec!["a".to_owned()],
        spiffe_id: String::new(),
    }));
    assert_eq!(fetched.await.unwrap().into_inner().svids[0].spiffe_id, "spiffe://example.org/web");
    for user in [USER, 65_534] {
        let said = fetch_as(user, dir.path());
        let unavailable =
            said.contains("Unavailable") && said.contains("has no number for the caller's user");
        assert!(unavailable && !said.contains("/nobody"), "{user}: {said}");
    }
    assert!(ready(dir.path()).await.starts_with("HTTP/1.1 200"), "who has a number is served");
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    let told =
        log.lines().filter(|line| line.contains("the agent runs in a user namespace that does not")).count();
    assert_eq!(told, 1, "once: {log}");
    // It is no fault: the status has a word of its own for it.
    let mut status = Command::new(env!("CARGO_BIN_EXE_durward"));
    let status =
        status.args(["status", "--socket-path"]).arg(dir.path().join("data/admin.sock")).output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("Found:        the agent runs in a user namespace"), "{status}");
    assert!(status.contains("Wrong:        nothing\n"), "{status}");
    assert!(
        status.lines().count() <= 23 && status.lines().all(|line| line.chars().count() <= 80),
        "{status}"
    );
}

/// Where nobody whom an entry asks for has a number, nobody can be served.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_entries_ask_for_those_without_a_number_is_not_ready() {
    let can = Command::new("unshare").args(["--user", "--map-root-user", "true"]).status();
    if !geteuid().is_root() || !can.is_ok_and(|status| status.success()) {
        return;
    }
    let of = |selector: &str| {
        let id = selector.replace([':', '/'], "-");
        format!("entry \"spiffe://example.org/{id}\" {{ selectors = [\"{selector}\"] }}\n")
    };
    let why = ", which has no number in the user namespace of the agent";
    let unbelieved = "so that what is executed is not believed";
    for (case, entries, well, told) in [
        ("one who has none", of("unix:uid:731006"), false, why),
        ("and one who has", of("unix:uid:731006") + &of("unix:uid:0"), true, why),
        ("one who has one", of("unix:uid:0"), true, ""),
        ("nobody, whom all appear as who have none", of("unix:uid:65534"), false, why),
        ("a group that has none", of("unix:gid:731006"), false, why),
        ("a group that has one", of("unix:gid:0"), true, ""),
        ("an executable, where the mounts are others'", of("unix:path:/bin/web"), false, unbelieved),
    ] {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), &entries);
        discover_paths(dir.path());
        let mut agent = Process::spawn_by(&["unshare", "--user", "--map-root-user"], dir.path());
        drop(agent.serving(dir.path()).await);
        let answer = ready(dir.path()).await;
        assert_eq!(answer.starts_with("HTTP/1.1 200"), well, "{case}: {answer}");
        let said = status(&dir.path().join("data/admin.sock"));
        for it in [why, unbelieved] {
            assert_eq!(said.contains(it), it == told, "{case}: {said}");
        }
        if !well {
            assert!(answer.contains("the agent's user namespace"), "{case}: {answer}");
        }
    }
}

/// An agent that is not root's and is started by these words, where `mounts` has changed `/proc` for it alone; `None` where nobody
/// may do that.
fn of_user_behind(
    entries: &str,
    by: &[&str],
    mounts: impl FnOnce(&Path) -> String,
) -> Option<(tempfile::TempDir, Process)> {
    let hide = ["unshare", "--mount", "--propagation", "private", "sh", "-c"];
    let can = [by, &hide, &["mount -t proc -o hidepid=2 proc /proc"]].concat();
    let can = Command::new(can[0]).args(&can[1..]).status();
    if !geteuid().is_root() || !can.is_ok_and(|status| status.success()) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path(), entries);
    chown(dir.path(), Some(USER), Some(USER)).unwrap();
    let mounts = mounts(dir.path());
    let run = format!("set -e\n{mounts}\nexec setpriv --reuid={USER} --regid={USER} --clear-groups \"$@\"");
    let words = [by, &hide, &[run.as_str(), "sh"]].concat();
    let agent = Process::spawn_by(&words, dir.path());
    Some((dir, agent))
}

/// An entry for this user that asks for more.
fn of(user: u32, more: &[&str]) -> String {
    let more: String = more.iter().map(|selector| format!(", \"{selector}\"")).collect();
    format!("entry \"spiffe://example.org/of{user}\" {{ selectors = [\"unix:uid:{user}\"{more}] }}\n")
}

/// What says that no other user is served, and that only some of them are not.
const HIDDEN: &str = "processes of other users are hidden (hidepid)";
const GROUPS_HIDDEN: &str = "supplementary groups of other users' processes are hidden (hidepid)";

/// As before Linux 6.13: no pidfd says whose a process is.
#[cfg(target_arch = "x86_64")]
fn no_owner() -> String {
    const ENOTTY: u32 = 25;
    let info = libc::PIDFD_GET_INFO;
    by_filter(&format!("load(0), same(16, 3), load(24), same({info}, 1), answer({ENOTTY})"))
}

/// Whose a process is, or which it is, is read in what is hidden there.
#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn hidden_processes_are_no_healthy_node_on_an_older_kernel() {
    const ENOPROTOOPT: u32 = 92;
    let no_peer_pidfd = format!("load(0), same(55, 3), load(32), same(77, 1), answer({ENOPROTOOPT})");
    for (filter, option) in [(no_owner(), 2), (by_filter(&no_peer_pidfd), 1)] {
        let by = ["python3", "-c", &filter, "/usr/bin/env"];
        let hide = |_: &Path| format!("mount -t proc -o hidepid={option} proc /proc");
        for (case, entries, is_ready) in [
            ("another's", of(USER + 1, &[]), false),
            ("another's, by a further group", of(USER + 1, &["unix:supplementary_gid:9"]), false),
            ("the agent's own", of(USER, &[]), true),
            ("both", of(USER, &[]) + &of(USER + 1, &[]), true),
        ] {
            let case = format!("{case}, hidepid={option}");
            let Some((dir, mut agent)) = of_user_behind(&entries, &by, hide) else { return };
            // It is this test's user, too, whose connections are closed there.
            let began = std::time::Instant::now();
            while UnixStream::connect(dir.path().join("health.sock")).is_err() {
                assert!(began.elapsed() < PATIENCE && !agent.has_ended(), "{case}");
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            let answer = ready(dir.path()).await;
            assert_eq!(answer.starts_with("HTTP/1.1 200"), is_ready, "{case}: {answer}");
            assert_eq!(answer.contains(HIDDEN), !is_ready, "{case}: {answer}");
            assert_eq!(healthcheck_as(USER, dir.path()), i32::from(!is_ready), "{case}");
            let log = logged(dir.path(), "so no other user is served").await;
            assert_eq!(log.contains("nobody can be served"), !is_ready, "{case}: {log}");
            for user in [USER, USER + 1] {
                let (said, id) = (fetch_as(user, dir.path()), format!("spiffe://example.org/of{user}"));
                let is_served = user == USER && entries.contains(&id);
                assert_eq!(said.contains(&id), is_served, "{case}, {user}: {said}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hidden_processes_are_served_by_what_the_kernel_tells_without_proc() {
    let mut nodes: Vec<(Vec<String>, u32)> = Vec::new();
    if Pidfd::open(Pid::this()).unwrap().owner() != Ok(None) {
        nodes.extend([(Vec::new(), 1), (Vec::new(), 2)]);
    }
    // The directory's owner shows.
    #[cfg(target_arch = "x86_64")]
    nodes.push((["python3", "-c", &no_owner(), "/usr/bin/env"].map(str::to_owned).to_vec(), 1));
    let (group, other) = ("unix:supplementary_gid:9", "unix:supplementary_gid:8");
    for (by, option) in nodes {
        let by: Vec<&str> = by.iter().map(String::as_str).collect();
        let hide = |_: &Path| format!("mount -t proc -o hidepid={option} proc /proc");
        // With who is served at once, and after the first second.
        for (case, entries, is_ready, at_first, later) in [
            ("another's", of(USER + 1, &[]), true, true, true),
            ("another's, by a further group", of(USER + 1, &[group]), false, true, false),
            ("beside it", of(USER + 1, &[]) + &of(USER + 2, &[group]), true, true, true),
            ("beside the agent's own", of(USER, &[other]) + &of(USER + 1, &[group]), true, true, false),
        ] {
            let case = format!("{case}, hidepid={option}, by {} words", by.len());
            let Some((dir, mut agent)) = of_user_behind(&entries, &by, hide) else { return };
            drop(agent.serving(dir.path()).await);
            let answer = ready(dir.path()).await;
            assert_eq!(answer.starts_with("HTTP/1.1 200"), is_ready, "{case}: {answer}");
            assert_eq!(answer.contains(GROUPS_HIDDEN), !is_ready, "{case}: {answer}");
            assert_eq!(healthcheck_as(USER + 1, dir.path()), i32::from(!is_ready), "{case}");
            // Of so many groups the kernel does not tell at first either which they are.
            let (few, many) = (vec![9], (9..109).collect::<Vec<_>>());
            for (groups, is_served) in [(few, at_first), (many, later)] {
                let said = fetch_in_groups(USER + 1, groups, dir.path());
                assert_eq!(said.contains("spiffe://example.org/of731007"), is_served, "{case}: {said}");
                assert_eq!(said.contains("workload attestation failed"), !is_served, "{case}: {said}");
            }
            let log = logged(dir.path(), "processes of other users are hidden").await;
            assert_eq!(log.contains("nobody can be served"), !is_ready, "{case}: {log}");
            assert!(!log.contains("no other user is served"), "{case}: {log}");
            if entries.contains(group) {
                logged(dir.path(), &format!("asks for {group}, but what supplementary groups")).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_are_hidden_later_are_noticed() {
    let mounts = |dir: &Path| {
        // /proc is mounted in another way as soon as a file says so.
        let later = |option: &str| {
            let asked = dir.join(option).display().to_string();
            format!("while ! test -e {asked}; do sleep 0.1; done; mount -o remount,hidepid={option} /proc\n")
        };
        format!("mount -t proc proc /proc\n{{ {}{} }} &", later("2"), later("0"))
    };
    // Whatever the kernel tells, nobody has this for long.
    let entry = of(0, &["unix:supplementary_gid:9"]);
    let Some((dir, mut agent)) = of_user_behind(&entry, &[], mounts) else { return };
    drop(agent.serving(dir.path()).await);
    assert!(ready(dir.path()).await.starts_with("HTTP/1.1 200"));
    for (option, want) in [("2", "are hidden (hidepid)"), ("0", "HTTP/1.1 200")] {
        fs::write(dir.path().join(option), "").unwrap();
        until(dir.path(), want).await;
    }
    let log = logged(dir.path(), "can be served again").await;
    for want in ["processes of other users are hidden (", "are not hidden any more", "can be served again"] {
        assert_eq!(log.lines().filter(|line| line.contains(want)).count(), 1, "once: {want}: {log}");
    }
}

/// Waits until the agent says so of its readiness.
async fn until(dir: &Path, want: &str) {
    let asked = async {
        while !ask(dir).contains(want) {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_late| panic!("{want}: {}", ask(dir)));
}

/// In the PID namespace of its own container, no caller of another has a number.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_in_a_pod_without_the_nodes_processes_is_not_ready() {
    let words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let can = Command::new(words[0]).args(&words[1..]).arg("true").status();
    if !geteuid().is_root() || !can.is_ok_and(|status| status.success()) {
        return;
    }
    let in_pod = [&["env", "KUBERNETES_SERVICE_HOST=192.0.2.1"][..], &words].concat();
    let kubelet = FakeKubelet::start(listed(&[pod(1)]));
    let k8s = format!(
        "WorkloadAttestor \"k8s\" {{\n plugin_data {{ kubelet_secure_port = {} kubelet_ca_path = \"{}\" token_path = \"{}\" \
         node_name_env = \"DURWARD_TEST_NO_SUCH_VARIABLE\" }} }}\n",
        kubelet.port,
        kubelet.ca.display(),
        kubelet.token.display()
    );
    let of_pod = "entry \"spiffe://example.org/pod\" { selectors = [\"k8s:ns:ns1\"] }\n";
    // Nothing speaks against its callers being in the same container, until one was not.
    let of_user = entry("/web", "");
    let both = format!("{of_pod}{of_user}");
    for (case, prefix, entries, want, told) in [
        ("in a pod", in_pod.clone(), of_pod, false, true),
        ("in a pod, with a user's entry", in_pod.clone(), &of_user, true, true),
        ("in a pod, with both", in_pod.clone(), &both, true, true),
        ("in another container, with its callers", words.to_vec(), &of_user, true, false),
        ("in a pod, with hostPID", vec!["env", "KUBERNETES_SERVICE_HOST=192.0.2.1"], &of_user, true, false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), entries);
        let config = fs::read_to_string(dir.path().join("agent.conf")).unwrap();
        let config = config.replace("plugins {", &format!("plugins {{\n{k8s}"));
        fs::write(dir.path().join("agent.conf"), config).unwrap();
        let mut agent = Process::spawn_by(&prefix, dir.path());
        drop(agent.serving(dir.path()).await);
        until(dir.path(), if want { "HTTP/1.1 200" } else { "callers in other pods" }).await;
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log.contains("its pod needs hostPID: true"), told, "{case}: {log}");
        assert_eq!(log.contains("nobody can be served"), !want, "{case}: {log}");
        if want && prefix.ends_with(&words) {
            let said = fetch_as(geteuid().as_raw(), dir.path());
            assert!(said.contains("another PID namespace"), "{case}: {said}");
            until(dir.path(), "callers are in another PID namespace").await;
            logged(dir.path(), "nobody can be served").await;
        }
    }
}

/// There, a PID is another process in `/proc`; this test's own, say, which the agent's is not.

#[tokio::test(flavor = "multi_thread")]
async fn with_the_proc_of_another_pid_namespace_nobody_is_served() {
    let inner =
        ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private", "sh", "-c"];
    let can = Command::new(inner[0]).args(&inner[1..]).arg("mount -t proc proc /proc").status();
    if !geteuid().is_root() || !can.is_ok_and(|status| status.success()) {
        return;
    }
    // Not the first process, which no signal ends.
    let here = "\"$@\" & exec 3>&1; wait";
    for (case, run, want) in [
        ("another's", here.to_owned(), Some("/proc is of another PID namespace")),
        ("none", format!("umount -l /proc; {here}"), Some("there is no /proc")),
        ("its own", format!("mount -t proc proc /proc; {here}"), None),
    ] {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), &entry("/web", ""));
        let mut words = inner.to_vec();
        words.extend([run.as_str(), "sh"]);
        let mut agent = Process::spawn_by(&words, dir.path());
        drop(agent.serving(dir.path()).await);
        let answer = ready(dir.path()).await;
        let inner = "callers outside of it cannot be identified";
        // What is said last.
        let log = logged(dir.path(), if case == "none" { "there is no /proc" } else { inner }).await;
        assert_eq!(answer.starts_with("HTTP/1.1 200"), want.is_none(), "{case}: {answer}");
        for said in ["/proc is of another PID namespace", "there is no /proc", "are hidden"] {
            assert_eq!(log.contains(said), want == Some(said), "{case}: {said}: {log}");
        }
        assert_eq!(log.matches(inner).count(), usize::from(case != "none"), "{log}");
        // This test is outside of it.
        let said = fetch_as(0, dir.path());
        assert!(!said.contains("spiffe://example.org/web"), "{case}: {said}");
        let mut healthcheck = Command::new(env!("CARGO_BIN_EXE_durward"));
        let checked = healthcheck.args(["healthcheck", "--socket-path"]).arg(dir.path().join("api.sock"));
        assert_eq!(checked.output().unwrap().status.code(), Some(1), "{case}");
    }
}

/// Runs a command under a filter of system calls: an expression for its program, by which `load` takes a word of the call, `same`
/// passes over so many steps where that is another, and `answer` refuses the call with an errno.
#[cfg(target_arch = "x86_64")]
fn by_filter(program: &str) -> String {
    format!(
        "
import ctypes, os, struct, sys
step = lambda code, yes, no, value: struct.pack('HBBI', code, yes, no, value)
answer = lambda errno: step(0x06, 0, 0, 0x00050000 | errno)
load, same = lambda at: step(0x20, 0, 0, at), lambda value, no: step(0x15, 0, no, value)
program = b''.join([{program}, step(0x06, 0, 0, 0x7fff0000)])
class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
if libc.prctl(22, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0):
    sys.exit(77)
os.execv(sys.argv[1], sys.argv[1:])
"
    )
}

/// Before Linux 6.4 only /proc/self/auxv has some of what a program is told when it starts.
#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn an_older_kernel_without_proc_has_an_agent_that_says_so() {
    const PR_GET_AUXV: u32 = 0x4155_5856;
    const EINVAL: u32 = 22;
    let filter = format!("load(0), same(157, 3), load(16), same({PR_GET_AUXV}, 1), answer({EINVAL})");
    let filter = by_filter(&filter);
    let bare =
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "umount -l /proc; exec \"$@\"", "sh"];
    let words = [&bare[..], &["python3", "-c", &filter]].concat();
    let can = Command::new(words[0]).args(&words[1..]).arg("/bin/true").status();
    if !can.is_ok_and(|status| status.success()) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path(), &entry("/web", ""));
    let mut agent = Process::spawn_by(&words, dir.path());
    drop(agent.serving(dir.path()).await);
    logged(dir.path(), "there is no /proc").await;
}

/// The same, where it is given no pidfd: these are the errors of a socket's other end, and by number.
#[cfg(target_arch = "x86_64")]
fn no_pidfd(by_socket: u32, by_number: u32) -> String {
    by_filter(&format!(
        "load(0), same(55, 3), load(32), same(77, 3), answer({by_socket}), same(434, 1), answer({by_number})"
    ))
}

/// Nobody is served there, and no client, probe or admin is told otherwise: whose the admin socket's other end is, the kernel
/// says all the same.
#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_without_pidfds_has_no_healthy_agent_and_keeps_no_admin_out() {
    /// ENOPROTOOPT and ENOSYS, as before Linux 5.3; EMFILE, for ever.
    const ERRORS: [(&str, u32, u32); 2] = [("none are known", 92, 38), ("none are left", 24, 24)];
    for (case, by_socket, by_number) in ERRORS {
        let filter = no_pidfd(by_socket, by_number);
        let filter = ["python3", "-c", &filter];
        let can = Command::new(filter[0]).args(&filter[1..]).arg("/bin/true").status();
        if !can.is_ok_and(|status| status.success()) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), &entry("/web", ""));
        let mut agent = Process::spawn_by(&filter, dir.path());
        let log = || fs::read_to_string(dir.path().join("log")).unwrap();
        let began = std::time::Instant::now();
        while UnixStream::connect(dir.path().join("health.sock")).is_err()
            || !ask(dir.path()).contains("cannot be told apart")
        {
            assert!(began.elapsed() < PATIENCE && !agent.has_ended(), "{case}: {}", log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert!(ask(dir.path()).starts_with("HTTP/1.1 500"), "{case}");
        let log = logged(dir.path(), "the kernel gives no pidfd").await;
        assert_eq!(log.matches("the kernel gives no pidfd").count(), 1, "{case}: once: {log}");
        let command = |words: &[&str], socket: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
            let output = command.args(words).arg("--socket-path").arg(dir.path().join(socket)).output();
            let output = output.unwrap();
            let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
            (output.status.code(), said.concat())
        };
        let (code, said) = command(&["status"], "data/admin.sock");
        assert_eq!(code, Some(0), "{case}: {said}");
        let fetch = ["api", "fetch", "jwt", "--audience", "a", "--timeout", "10s"];
        let (code, said) = command(&fetch, "api.sock");
        assert!(
            code != Some(0) && said.contains("code = Unavailable desc = the agent cannot identify"),
            "{said}"
        );
        // More than are told why: the others cannot take it for a limit either.
        for _ in 0..6 {
            let (code, said) = command(&["healthcheck", "--verbose"], "api.sock");
            assert!(code == Some(1) && said.contains("Agent is unhealthy"), "{case}: {said}");
        }
    }
}

/// Runs a command to which the kernel refuses the system call of this `number`, with this `errno`.
#[cfg(target_arch = "x86_64")]
pub(crate) fn refused_call(number: u32, errno: u32) -> String {
    by_filter(&format!("load(0), same({number}, 1), answer({errno})"))
}

/// Whatever a filter or a security module keeps from the agent, without which no caller is served, is found before anybody calls.
#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_refuses_what_serves_callers_has_no_healthy_agent() {
    const EPERM: u32 = 1;
    const EACCES: u32 = 13;
    const ENOSYS: u32 = 38;
    for (call, number, errno) in [
        ("recvmsg", 47, EPERM),
        ("recvmsg", 47, EACCES),
        ("recvmsg", 47, ENOSYS),
        // Nor are probes answered then.
        ("accept4", 288, EPERM),
    ] {
        let case = format!("{call}, {errno}");
        let filter = refused_call(number, errno);
        let filter = ["python3", "-c", &filter];
        let can = Command::new(filter[0]).args(&filter[1..]).arg("/bin/true").status();
        if !can.is_ok_and(|status| status.success()) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), &entry("/web", ""));
        let mut agent = Process::spawn_by(&filter, dir.path());
        let log = || fs::read_to_string(dir.path().join("log")).unwrap();
        let want = format!("the system call {call} is refused");
        let began = std::time::Instant::now();
        while !log().contains(&want) {
            assert!(began.elapsed() < PATIENCE && !agent.has_ended(), "{case}: {}", log());
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        if call == "accept4" {
            continue;
        }
        let answer = ready(dir.path()).await;
        assert!(
            answer.starts_with("HTTP/1.1 500") && answer.contains("cannot be served"),
            "{case}: {answer}"
        );
        let mut healthcheck = Command::new(env!("CARGO_BIN_EXE_durward"));
        healthcheck
            .args(["healthcheck", "--timeout", "5s", "--socket-path"])
            .arg(dir.path().join("api.sock"));
        assert_eq!(healthcheck.output().unwrap().status.code(), Some(1), "{case}");
        let said = fetch_as(geteuid().as_raw(), dir.path());
        assert!(!said.contains("spiffe://example.org/web"), "{case}: {said}");
        assert_eq!(log().matches(&want).count(), 1, "{case}: once: {}", log());
    }
}

/// Runs a command whose getrandom(2) waits, as on a node that has just been switched on, until `go` is there. `waits` is there
/// as soon as it does.
#[cfg(target_arch = "x86_64")]
const NO_RANDOMNESS: &str = "
import ctypes, fcntl, os, socket, struct, sys, time
here, libc = sys.argv[1], ctypes.CDLL(None, use_errno=True)
ours, theirs = socket.socketpair()
if os.fork() == 0:
    libc.prctl(1, 9, 0, 0, 0)
    _, (listener,), _, _ = socket.recv_fds(theirs, 1, 1)
    while True:
        call = bytearray(80)
        fcntl.ioctl(listener, 0xc0502100, call)
        open(here + '/waits', 'w').close()
        while not os.path.exists(here + '/go'):
            time.sleep(0.01)
        (call,) = struct.unpack_from('Q', call)
        fcntl.ioctl(listener, 0xc0182101, bytearray(struct.pack('QqiI', call, 0, 0, 1)))
step = lambda code, yes, no, value: struct.pack('HBBI', code, yes, no, value)
load, same = lambda at: step(0x20, 0, 0, at), lambda value, no: step(0x15, 0, no, value)
program = b''.join([load(0), same(318, 3), load(32), same(0, 1), step(6, 0, 0, 0x7fc00000), step(6, 0, 0, 0x7fff0000)])
class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_char_p)]
libc.prctl(38, 1, 0, 0, 0)
listener = libc.syscall(317, 1, 8, ctypes.byref(Program(len(program) // 8, program)))
if listener < 0:
    sys.exit(77)
socket.send_fds(ours, [b'x'], [listener])
os.close(listener)
os.execv(sys.argv[2], sys.argv[2:])
";

#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn without_randomness_a_start_waits_and_can_be_ended() {
    let try_out = tempfile::tempdir().unwrap();
    let here = try_out.path().to_str().unwrap();
    let can = Command::new("python3").args(["-c", NO_RANDOMNESS, here, "/bin/true"]).status();
    if !can.is_ok_and(|status| status.success()) {
        return;
    }
    for comes in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), &entry("/web", ""));
        let mut agent =
            Process::spawn_by(&["python3", "-c", NO_RANDOMNESS, dir.path().to_str().unwrap()], dir.path());
        let began = std::time::Instant::now();
        while !dir.path().join("waits").exists() {
            assert!(began.elapsed() < PATIENCE && !agent.has_ended(), "it asks for random numbers");
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        assert!(!dir.path().join("api.sock").exists(), "nobody connects and waits in vain");
        if comes {
            fs::write(dir.path().join("go"), "").unwrap();
            drop(agent.serving(dir.path()).await);
        } else {
            agent.signal(nix::sys::signal::Signal::SIGTERM);
            assert!(agent.wait().success(), "it ends before there is any");
        }
    }
}

/// What `durward status` says, asked at this socket.
fn status(admin: &Path) -> String {
    let mut status = Command::new(env!("CARGO_BIN_EXE_durward"));
    let status = status.args(["status", "--socket-path"]).arg(admin).output().unwrap();
    let text = String::from_utf8(status.stdout).unwrap();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The socket is there, and a mode keeps those from it whom entries ask for; or only others.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_shut_while_the_agent_runs_is_no_ready_agent() {
    if !geteuid().is_root() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let (above, dir) = (base.path().join("above"), base.path().join("above/dir"));
    fs::create_dir_all(&dir).unwrap();
    let chmod = |at: &Path, mode| fs::set_permissions(at, fs::Permissions::from_mode(mode)).unwrap();
    let of =
        |uid: u32| format!("entry \"spiffe://example.org/of{uid}\" {{ selectors = [\"unix:uid:{uid}\"] }}\n");
    prepare(&dir, &of(USER));
    let (socket, admin) = (dir.join("api.sock"), above.join("private/admin.sock"));
    for at in [base.path(), &above, &dir] {
        chmod(at, 0o755);
    }
    let mut agent = Process::spawn_by(&[], &dir);
    drop(agent.serving(&dir).await);
    assert!(ready(&dir).await.starts_with("HTTP/1.1 200"));
    let open = fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
    for (at, shut, right) in [
        (&socket, 0o600, open),
        (&socket, 0o660, open),
        (&dir, 0o700, 0o755),
        (&above, 0o700, 0o755),
        (&above, 0o750, 0o755),
    ] {
        chmod(at, shut);
        until(&dir, "shut to other users").await;
        assert_eq!(healthcheck(&dir), 1, "{shut:o}");
        let said = status(&admin);
        assert!(said.contains("not ready: entry \"spiffe://example.org/of731006\" asks for"), "{said}");
        let line = format!("any more: {} has mode {shut:04o}", at.display());
        let log = logged(&dir, &line).await;
        assert_eq!(log.matches(&line).count(), 1, "{line}: {log}");
        chmod(at, right);
        until(&dir, "HTTP/1.1 200").await;
    }
    // Root gets in, and so does the owner.
    let config = fs::read_to_string(dir.join("agent.conf")).unwrap();
    fs::write(dir.join("agent.conf"), config + &of(0)).unwrap();
    agent.signal(nix::sys::signal::Signal::SIGHUP);
    until_status(&admin, "Entries: 2").await;
    for mode in [0o700, 0o750] {
        chmod(&dir, mode);
        let found = format!("Found: {} has mode {mode:04o}, so ", dir.display());
        until_status(&admin, &found).await;
        until_status(&admin, "but no such process can reach the socket").await;
        assert!(ask(&dir).starts_with("HTTP/1.1 200"), "{mode:o}");
    }
    // What is right by now is not told any more.
    chmod(&dir, 0o755);
    let began = std::time::Instant::now();
    while status(&admin).contains("has mode 0750") {
        assert!(began.elapsed() < PATIENCE, "it is still told");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

/// Every entry asks for a pod, and the kubelet says nothing to anybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_that_refuses_the_agent_makes_no_ready_agent_where_all_entries_need_it() {
    const OF_POD: &str = "entry \"spiffe://example.org/pod\" { selectors = [\"k8s:ns:ns1\"] }\n";
    let of_user = entry("/user", "");
    let both = format!("{OF_POD}{of_user}");
    let (forbidden, at_ease) = (Reply::With(403, "", "no".into()), listed(&[pod(1)]));
    let gone = |kubelet: &FakeKubelet| kubelet.other_ca.with_file_name("gone.crt");
    let ca = |kubelet: &FakeKubelet| kubelet.ca.clone();
    let other_ca = |kubelet: &FakeKubelet| kubelet.other_ca.clone();
    let (refused, no_ca) = ("allow its service account get on nodes/pods", "unable to load kubelet CA");
    type Ca = fn(&FakeKubelet) -> std::path::PathBuf;
    let (ca, gone, other_ca): (Ca, Ca, Ca) = (ca, gone, other_ca);
    for (case, entries, reply, ca, more, wrong, is_ready) in [
        ("it answers", OF_POD, &at_ease, ca, "", "", true),
        ("it refuses", OF_POD, &forbidden, ca, "", refused, false),
        ("it cannot be asked", OF_POD, &at_ease, gone, "", no_ca, false),
        ("it is another", OF_POD, &at_ease, other_ca, "", "name the kubelet's CA", false),
        ("one entry needs no pod", &both, &forbidden, ca, "", refused, true),
        ("no entry needs a pod", &of_user, &forbidden, ca, "", "", true),
        ("no entry at all", "", &forbidden, ca, "", "", true),
        ("it may fail", OF_POD, &forbidden, ca, "optional = true", refused, true),
    ] {
        let kubelet = FakeKubelet::start(reply.clone());
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("dir");
        fs::create_dir(&dir).unwrap();
        prepare(&dir, entries);
        let written = fs::read_to_string(dir.join("agent.conf")).unwrap();
        let with_ca = |ca: &Path| {
            let k8s = format!(
                "WorkloadAttestor \"k8s\" {{\n {more}\n plugin_data {{ kubelet_secure_port = {} kubelet_ca_path = \"{}\" \
                 token_path = \"{}\" node_name_env = \"DURWARD_TEST_NO_SUCH_VARIABLE\" }} }}\n",
                kubelet.port,
                ca.display(),
                kubelet.token.display()
            );
            written.replace("plugins {", &format!("plugins {{\n{k8s}"))
        };
        fs::write(dir.join("agent.conf"), with_ca(&ca(&kubelet))).unwrap();
        let began = std::time::Instant::now();
        let mut agent = Process::spawn(&dir);
        drop(agent.serving(&dir).await);
        let (admin, healthy) = (base.path().join("private/admin.sock"), if is_ready { 0 } else { 1 });
        until(&dir, if is_ready { "HTTP/1.1 200" } else { "HTTP/1.1 500" }).await;
        let said = until_status(&admin, wrong).await;
        let why = "not ready: entry \"spiffe://example.org/pod\" asks for k8s:ns:ns1: the kubelet does not";
        if is_ready {
            assert!(!said.contains("not ready:"), "{case}: {said}");
        } else {
            until_status(&admin, why).await;
        }
        let answer = ask(&dir);
        assert_eq!(answer.starts_with("HTTP/1.1 200"), is_ready, "{case}: {answer}");
        assert_eq!(healthcheck(&dir), healthy, "{case}");
        if is_ready {
            // Once, where an entry asks for it; what failed is tried again.
            let at_most = began.elapsed().as_secs() / 10 + 1;
            let requests = u64::try_from(kubelet.requests()).unwrap();
            let range = if entries.contains("k8s:") { 1..=at_most } else { 0..=0 };
            assert!(range.contains(&requests), "{case}: {requests}");
            continue;
        }
        let log = logged(&dir, "nobody can be served: entry").await;
        assert_eq!(log.matches("nobody can be served").count(), 1, "{case}: once: {log}");
        assert!(log.contains(wrong), "{case}: {log}");
        if case == "it refuses" {
            // Nobody asks, and it is put right.
            kubelet.says(at_ease.clone());
            until(&dir, "HTTP/1.1 200").await;
            let at_most = began.elapsed().as_secs() / 10 + 1;
            let requests = u64::try_from(kubelet.requests()).unwrap();
            assert!((2..=at_most).contains(&requests), "{requests}");
        } else {
            // So is this, or another entry needs no pod: the next reload is enough.
            let right = if case == "it is another" {
                with_ca(&ca(&kubelet)) + &of_user
            } else {
                with_ca(&kubelet.ca)
            };
            fs::write(dir.join("agent.conf"), right).unwrap();
            agent.signal(nix::sys::signal::Signal::SIGHUP);
            until(&dir, "HTTP/1.1 200").await;
        }
        assert_eq!(healthcheck(&dir), 0, "{case}");
        logged(&dir, "those whom entries ask for can be served again").await;
    }
}

/// What `durward status` says at this socket, once this stands there.
async fn until_status(admin: &Path, want: &str) -> String {
    let said = async {
        loop {
            let said = status(admin);
            if said.contains(want) && said.contains("Wrong:") {
                return said;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, said).await.unwrap_or_else(|_late| panic!("{want}: {}", status(admin)))
}

/// What `durward healthcheck` ends with.
fn healthcheck(dir: &Path) -> i32 {
    let mut healthcheck = Command::new(env!("CARGO_BIN_EXE_durward"));
    let checked = healthcheck.args(["healthcheck", "--socket-path"]).arg(dir.join("api.sock")).output();
    checked.unwrap().status.code().unwrap()
}

/// The same, to another user.
fn healthcheck_as(user: u32, dir: &Path) -> i32 {
    let mut healthcheck = Command::new(env!("CARGO_BIN_EXE_durward"));
    healthcheck.args(["healthcheck", "--socket-path"]).arg(dir.join("api.sock"));
    healthcheck.uid(user).gid(user).output().unwrap().status.code().unwrap()
}

/// A mode of 0700 with an ACL by which user 731006 gets through.
const ACL: u32 = 0o1_000_700;
const LET_IN: &str = "
import os, struct, sys
of = lambda tag, bits, user: struct.pack('<HHI', tag, bits, user)
all = [of(1, 7, 0xffffffff), of(2, 1, 731006), of(4, 0, 0xffffffff), of(16, 1, 0xffffffff), of(32, 0, 0xffffffff)]
os.setxattr(sys.argv[1], 'system.posix_acl_access', struct.pack('<I', 2) + b''.join(all))
";

/// A directory above the socket that only its owner can enter is meant, where no entry asks for anybody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_whose_callers_are_kept_out_from_the_start_is_no_ready_agent() {
    if !geteuid().is_root() {
        return;
    }
    // Whether those whom entries ask for are kept out: of no entry, of some, of all.
    let (none, some, all) = (0, 1, 2);
    let nobody_in = nix::unistd::User::from_name("nobody").unwrap().unwrap().gid.as_raw();
    for (case, owner, group, mode, entries, want) in [
        ("root's own", 0, 0, 0o700, vec!["unix:uid:0"], none),
        ("root's own, by name", 0, 0, 0o700, vec!["unix:user:root unix:gid:0"], none),
        ("whatever executes this", 0, 0, 0o700, vec!["unix:path:/bin/web"], none),
        ("another's", 0, 0, 0o700, vec!["unix:uid:731006"], all),
        ("two others'", 0, 0, 0o700, vec!["unix:uid:731006", "unix:uid:731007"], all),
        ("another's beside root's", 0, 0, 0o700, vec!["unix:uid:731006", "unix:uid:0"], some),
        ("another's, by name", 0, 0, 0o700, vec!["unix:user:nobody"], all),
        ("another's, of a group", 0, 0, 0o700, vec!["unix:uid:731006 unix:gid:0"], all),
        ("a group's, which may be root's", 0, 0, 0o700, vec!["unix:gid:731006"], none),
        ("a further group's", 0, 0, 0o700, vec!["unix:supplementary_gid:731006"], none),
        ("another's, not in the group that passes", 0, 0, 0o750, vec!["unix:uid:731006"], all),
        ("another's, with that group", 0, 0, 0o750, vec!["unix:uid:731006 unix:gid:0"], none),
        ("a member's", 0, nobody_in, 0o750, vec!["unix:user:nobody"], none),
        ("another's, past an ordinary user's group", USER, USER, 0o710, vec!["unix:uid:731007"], all),
        ("another's, who pass", 0, 0, 0o701, vec!["unix:uid:731006"], none),
        ("another's, perhaps by an ACL", 0, 0, ACL, vec!["unix:uid:731006"], none),
        ("nobody's, who does not exist", 0, 0, 0o755, vec!["unix:user:no-such-user"], all),
        ("another's beside nobody's", 0, 0, 0o700, vec!["unix:uid:731006", "unix:user:no-such-user"], all),
        ("an ordinary user's own", USER, USER, 0o700, vec!["unix:uid:731006"], none),
        ("another's than an ordinary user's", USER, USER, 0o700, vec!["unix:uid:731007"], all),
    ] {
        let base = tempfile::tempdir().unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (shut, dir) = (base.path().join("shut"), base.path().join("shut/dir"));
        fs::create_dir_all(&dir).unwrap();
        let entry = |(nth, selectors): (usize, &&str)| {
            let asked: Vec<_> = selectors.split(' ').map(|selector| format!("\"{selector}\"")).collect();
            format!("entry \"spiffe://example.org/web{nth}\" {{ selectors = [{}] }}\n", asked.join(", "))
        };
        prepare(&dir, &entries.iter().enumerate().map(entry).collect::<String>());
        discover_paths(&dir);
        for at in [&shut, &dir, &dir.join("agent.conf")] {
            chown(at, Some(owner), Some(owner)).unwrap();
        }
        chown(&shut, Some(owner), Some(group)).unwrap();
        fs::set_permissions(&shut, fs::Permissions::from_mode(mode & 0o777)).unwrap();
        if mode == ACL && !Command::new("python3").args(["-c", LET_IN]).arg(&shut).status().unwrap().success()
        {
            continue;
        }
        let number = owner.to_string();
        let become_owner = ["setpriv", "--reuid", &number, "--regid", &number, "--clear-groups"];
        let mut agent = Process::spawn_by(if owner == 0 { &[] } else { &become_owner }, &dir);
        drop(agent.serving(&dir).await);
        let answer = ready(&dir).await;
        assert_eq!(answer.starts_with("HTTP/1.1 200"), want != all, "{case}: {answer}");
        let mut healthcheck = Command::new(env!("CARGO_BIN_EXE_durward"));
        let checked = healthcheck.args(["healthcheck", "--socket-path"]).arg(dir.join("api.sock")).output();
        assert_eq!(checked.unwrap().status.code(), Some(i32::from(want == all)), "{case}");
        if want == none {
            let log = fs::read_to_string(dir.join("log")).unwrap();
            assert!(!log.contains("can reach the socket"), "{case}: {log}");
            continue;
        }
        if !entries[0].contains("731") && mode == 0o755 {
            assert!(answer.contains("users or groups do not exist"), "{case}: {answer}");
            continue;
        }
        let log = logged(&dir, "but no such process can reach the socket").await;
        assert_eq!(log.matches("can reach the socket").count(), 1, "{case}: once: {log}");
        let said = status(&shut.join("private/admin.sock"));
        let todo = format!("chmod o+x {}, or choose another socket_path", shut.display());
        let why = "entry \"spiffe://example.org/web0\" asks for";
        let told = said.contains(&format!("not ready: {why}"));
        assert_eq!(told, want == all, "{case}: {said}");
        assert!(said.contains(why) && said.contains(&todo) && log.contains(&todo), "{case}: {said}");
    }
}

/// Mended while the agent runs; or there is another way, which shows when somebody comes by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_way_to_the_socket_that_opens_makes_a_ready_agent() {
    if !geteuid().is_root() {
        return;
    }
    for (mends, from_the_start) in [(true, true), (false, true), (false, false)] {
        let base = tempfile::tempdir().unwrap();
        let (shut, dir) = (base.path().join("shut"), base.path().join("shut/dir"));
        fs::create_dir_all(&dir).unwrap();
        let chmod = |at: &Path, mode| fs::set_permissions(at, fs::Permissions::from_mode(mode)).unwrap();
        chmod(base.path(), 0o755);
        prepare(
            &dir,
            &format!("entry \"spiffe://example.org/web\" {{ selectors = [\"unix:uid:{USER}\"] }}\n"),
        );
        let config = dir.join("agent.conf");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("log_level = \"warn\"", "log_level = \"info\"")).unwrap();
        chmod(&shut, if from_the_start { 0o700 } else { 0o755 });
        let mut agent = Process::spawn_by(&[], &dir);
        drop(agent.serving(&dir).await);
        if !from_the_start {
            chmod(&shut, 0o700);
        }
        until(&dir, "shut to other users").await;
        if mends {
            chmod(&shut, 0o711);
        } else {
            // As from a container into which the directory is mounted.
            let way_in = base.path().join("way-in");
            fs::create_dir(&way_in).unwrap();
            let run = "mount --bind \"$1\" \"$2\" && exec setpriv --reuid \"$3\" --regid \"$3\" --clear-groups \"$4\" \
                       api fetch jwt --audience a --socket-path \"$2/api.sock\"";
            let fetch = || {
                let mut fetch = Command::new("unshare");
                fetch.args(["--mount", "--propagation", "private", "sh", "-c", run, "sh"]);
                fetch.args([&dir, &way_in]).args([&USER.to_string(), env!("CARGO_BIN_EXE_durward")]);
                fetch.output().unwrap()
            };
            let fetched = fetch();
            if String::from_utf8_lossy(&fetched.stderr).contains("unshare failed") {
                return;
            }
            let said = String::from_utf8_lossy(&fetched.stdout).into_owned();
            assert!(said.contains("spiffe://example.org/web"), "{fetched:?}");
            // Who comes within a second after it was seen that it is shut may have come before.
            let began = std::time::Instant::now();
            while !from_the_start && !ask(&dir).starts_with("HTTP/1.1 200") {
                assert!(began.elapsed() < PATIENCE, "{}", ask(&dir));
                fetch();
            }
        }
        until(&dir, "HTTP/1.1 200").await;
        logged(&dir, "those whom entries ask for can be served again").await;
        if !mends {
            // It is there whatever becomes of the modes.
            chmod(&shut, 0o755);
            let admin = shut.join("private/admin.sock");
            let began = std::time::Instant::now();
            while status(&admin).contains("has mode 0700") {
                assert!(began.elapsed() < PATIENCE, "it is still told");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
            chmod(&shut, 0o700);
            until_status(&admin, "has mode 0700").await;
            assert!(ask(&dir).starts_with("HTTP/1.1 200"));
        }
    }
}

/// Whoever came while it was open for a moment, between two looks, shows no other way.
#[tokio::test(flavor = "multi_thread")]
async fn a_way_that_was_open_for_a_moment_is_no_other_way() {
    if !geteuid().is_root() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let (shut, dir) = (base.path().join("shut"), base.path().join("shut/dir"));
    fs::create_dir_all(&dir).unwrap();
    let chmod = |at: &Path, mode| fs::set_permissions(at, fs::Permissions::from_mode(mode)).unwrap();
    chmod(base.path(), 0o755);
    prepare(&dir, &format!("entry \"spiffe://example.org/web\" {{ selectors = [\"unix:uid:{USER}\"] }}\n"));
    chmod(&shut, 0o700);
    let mut agent = Process::spawn_by(&[], &dir);
    drop(agent.serving(&dir).await);
    until(&dir, "shut to other users").await;
    chmod(&shut, 0o755);
    let fetched = fetch_as(USER, &dir);
    chmod(&shut, 0o700);
    assert!(fetched.contains("spiffe://example.org/web"), "{fetched}");
    // The next look finds the socket gone, and the one after it there.
    let (at, aside) = (dir.join("api.sock"), dir.join("aside"));
    fs::rename(&at, &aside).unwrap();
    until(&dir, "the socket of the workload api is gone").await;
    fs::rename(&aside, &at).unwrap();
    until(&dir, "shut to other users").await;
}

/// Whoever came by a group that the user database does not put it in shows a way for its own user.
#[tokio::test(flavor = "multi_thread")]
async fn who_comes_by_a_group_comes_for_its_user_alone() {
    if !geteuid().is_root() {
        return;
    }
    let (group, other) = (USER + 7, USER + 1);
    let base = tempfile::tempdir().unwrap();
    let (shut, dir) = (base.path().join("shut"), base.path().join("shut/dir"));
    fs::create_dir_all(&dir).unwrap();
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let entry =
        |uid| format!("entry \"spiffe://example.org/of{uid}\" {{ selectors = [\"unix:uid:{uid}\"] }}\n");
    prepare(&dir, &(entry(USER) + &entry(other)));
    chown(&shut, Some(0), Some(group)).unwrap();
    fs::set_permissions(&shut, fs::Permissions::from_mode(0o750)).unwrap();
    let mut agent = Process::spawn_by(&[], &dir);
    drop(agent.serving(&dir).await);
    until(&dir, "shut to other users").await;
    let mut fetch = Command::new("setpriv");
    fetch.args(["--reuid", &USER.to_string(), "--regid", &USER.to_string(), "--groups", &group.to_string()]);
    fetch.args([env!("CARGO_BIN_EXE_durward"), "api", "fetch", "jwt", "--audience", "a", "--socket-path"]);
    let fetched = fetch.arg(dir.join("api.sock")).output().unwrap();
    assert!(String::from_utf8_lossy(&fetched.stdout).contains(&format!("of{USER}")), "{fetched:?}");
    until(&dir, "HTTP/1.1 200").await;
    let said = status(&shut.join("private/admin.sock"));
    assert!(said.contains(&format!("asks for unix:uid:{other}, but no such process can reach")), "{said}");
    assert!(!said.contains(&format!("asks for unix:uid:{USER}, but")), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_nobody_finds_is_no_ready_agent() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path(), &entry("/web", ""));
    let mut agent = Process::spawn_by(&[], dir.path());
    drop(agent.serving(dir.path()).await);
    assert!(ready(dir.path()).await.starts_with("HTTP/1.1 200"));
    let (at, aside) = (dir.path().join("api.sock"), dir.path().join("aside"));
    let until = async |want: &str| until(dir.path(), want).await;
    fs::rename(&at, &aside).unwrap();
    until("the socket of the workload api is gone").await;
    // Another one at its place is not this agent's.
    drop(std::os::unix::net::UnixListener::bind(&at).unwrap());
    fs::rename(&aside, &at).unwrap();
    until("HTTP/1.1 200").await;
    fs::remove_file(&at).unwrap();
    until("HTTP/1.1 500").await;
    let want = format!("not ready: the socket {} is gone", at.display());
    let said = status(&dir.path().join("data/admin.sock"));
    assert!(said.contains(&want), "{said}");
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    for (want, times) in [("restart the agent", 2), ("is at its path again", 1)] {
        assert_eq!(log.lines().filter(|line| line.contains(want)).count(), times, "{want}: {log}");
    }
}

/// As with PrivateTmp: the node does not find it, but its clients may be where the agent is.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_the_node_does_not_find_is_told() {
    let inner = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c"];
    let can = Command::new(inner[0]).args(&inner[1..]).arg("mount -t tmpfs t /mnt").status();
    if !geteuid().is_root() || !can.is_ok_and(|status| status.success()) {
        return;
    }
    for (case, mounts, told) in [("hidden", "mount -t tmpfs -o mode=755 t", true), ("found", "true", false)] {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path(), &entry("/web", ""));
        let (config, hidden) = (dir.path().join("agent.conf"), dir.path().join("hidden"));
        fs::create_dir(&hidden).unwrap();
        let text = fs::read_to_string(&config).unwrap();
        let socket = format!("{}/api.sock", dir.path().display());
        fs::write(&config, text.replace(&socket, &format!("{}/api.sock", hidden.display()))).unwrap();
        // The first process stays outside.
        let run = format!(
            "unshare --mount --propagation private sh -c '{mounts} {}; exec \"$@\"' sh \"$@\" & exec 3>&1; wait",
            hidden.display()
        );
        let mut words = inner.to_vec();
        words.extend([run.as_str(), "sh"]);
        let agent = Process::spawn_by(&words, dir.path());
        let began = std::time::Instant::now();
        while UnixStream::connect(dir.path().join("health.sock")).is_err() {
            assert!(began.elapsed() < PATIENCE, "{case}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert!(ready(dir.path()).await.starts_with("HTTP/1.1 200"), "{case}");
        let why = "the node's first process does not find the socket at";
        let log = if told {
            logged(dir.path(), why).await
        } else {
            fs::read_to_string(dir.path().join("log")).unwrap()
        };
        assert_eq!(log.matches(why).count(), usize::from(told), "{case}: {log}");
        drop(agent);
    }
}
