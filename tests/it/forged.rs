//! Callers that would be taken for others by the name of a cgroup, against the whole agent.

use std::{
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::{Command, Output, Stdio},
    thread,
};

use durward::api::proto::admin::{self as pb, admin_client::AdminClient};
use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::{
    cgroup::Tree,
    hostile::{Agent, NEIGHBOUR},
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
