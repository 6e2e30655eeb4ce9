//! The caller key of real processes in real cgroups.

use std::{
    fs, io,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use durward::{
    limits::CallerKey,
    peer::{
        OsUid, Peer,
        cgroup::{KubeletRoot, KubernetesMode, PodOrUid},
        credentials::CredentialsError,
    },
};
use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt::PeerPidfd},
    unistd::{Pid, geteuid},
};

const POD: &str = "2c48913c-b29f-11e7-9350-020968147796";
const CONTAINER: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";

/// A cgroup tree of the test's own, gone with it. Its name is no kubelet's: a real one is not disturbed.
pub(crate) struct Tree {
    hierarchy: PathBuf,
    pub(crate) name: String,
}

impl Tree {
    /// Below the first hierarchy of cgroups in which this process may make some.
    pub(crate) fn make(test: &str) -> Option<Self> {
        let name = format!("durward-{test}-{}", std::process::id());
        let hierarchies = hierarchies();
        for hierarchy in &hierarchies {
            match fs::create_dir(hierarchy.join(&name)) {
                Ok(()) => return Some(Self { hierarchy: hierarchy.clone(), name }),
                Err(e) => println!("{test}: no cgroup in {}: {e}", hierarchy.display()),
            }
        }
        println!("{test}: the part with processes in cgroups of pods was left out");
        None
    }

    /// A process in the cgroup `below` this tree.
    fn process(&self, below: &str) -> io::Result<Sleeper> {
        let sleeper = Sleeper(Command::new("sleep").arg("600").stdout(Stdio::null()).spawn()?);
        self.put(sleeper.0.id(), below)?;
        Ok(sleeper)
    }

    /// Puts a process into the cgroup `below` this tree.
    pub(crate) fn put(&self, pid: u32, below: &str) -> io::Result<()> {
        let dir = self.hierarchy.join(&self.name).join(below);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("cgroup.procs"), pid.to_string())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        remove(&self.hierarchy.join(&self.name));
    }
}

/// A cgroup goes when its children are gone; its files cannot be removed, and need not be.
fn remove(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    drop(fs::remove_dir(dir));
}

/// Where hierarchies of cgroups are mounted that a process can be moved in without further ado.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let of = |mount: &str| {
        let mut fields = mount.split(' ').skip(1);
        let (at, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
        let usable = kind == "cgroup2" || kind == "cgroup" && options.contains("name=");
        usable.then(|| PathBuf::from(at))
    };
    mounts.lines().filter_map(of).collect()
}

struct Sleeper(Child);

impl Sleeper {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.0.id()).unwrap())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn a_process_in_a_pods_cgroup_is_its_pod() {
    let Some(tree) = Tree::make("pods") else { return };
    let slice = POD.replace('-', "_");
    for (case, root, below, want) in [
        ("cgroupfs", "kubepods", format!("kubepods/burstable/pod{POD}/{CONTAINER}"), true),
        ("cgroupfs, guaranteed", "kubepods", format!("kubepods/pod{POD}/{CONTAINER}"), true),
        (
            "systemd",
            "kubepods.slice",
            format!(
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{slice}.slice/crio-{CONTAINER}.scope"
            ),
            true,
        ),
        ("beside the root", "kubepods", format!("app/kubepods/pod{POD}/{CONTAINER}"), false),
        ("like the root", "kubepods", format!("kubepods2/pod{POD}/{CONTAINER}"), false),
        ("no pod", "kubepods", "kubepods/system".to_owned(), false),
    ] {
        let root = KubeletRoot::parse(&format!("/{}/{root}", tree.name)).unwrap();
        let keys = PodOrUid::new(KubernetesMode::On, false, root);
        let sleeper = tree.process(&below).unwrap();
        let pod = keys.pod_of(sleeper.pid()).map(|pod| CallerKey::Pod(pod).to_string());
        assert_eq!(pod, want.then(|| format!("pod:{POD}")), "{case}");

        // What a mere name gains, with the roots that are there without a setting: nothing.
        let default = PodOrUid::new(KubernetesMode::On, false, KubeletRoot::default());
        assert_eq!(default.pod_of(sleeper.pid()), None, "{case}: below no kubelet's root");
    }
}

#[test]
fn a_connection_keeps_the_key_of_whoever_connected() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let user = CallerKey::Uid(geteuid().as_raw());
    for (case, mode, in_pod) in [
        ("no kubernetes", KubernetesMode::Auto, false),
        ("switched off", KubernetesMode::Off, true),
        ("this test is in no pod that this tree can tell", KubernetesMode::On, true),
    ] {
        let root = KubeletRoot::parse("/durward-no-such-root").unwrap();
        let keys = PodOrUid::new(mode, in_pod, root);
        let client = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        let (stream, _) = listener.accept().unwrap();
        assert_eq!(Peer::from_stream(&stream, &keys).unwrap().caller(), user, "{case}");
        drop(client);
    }
}

#[test]
fn a_peer_in_a_pods_cgroup_is_charged_as_its_pod() {
    let Some(tree) = Tree::make("peer") else { return };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let root = KubeletRoot::parse(&format!("/{}/kubepods", tree.name)).unwrap();
    let keys = PodOrUid::new(KubernetesMode::On, false, root);
    let cgroup = tree.hierarchy.join(&tree.name).join(format!("kubepods/pod{POD}/{CONTAINER}"));
    fs::create_dir_all(&cgroup).unwrap();

    // A shell joins the cgroup and then becomes the process that connects: it does so from within.
    let mut shell = Command::new("sh");
    shell.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(cgroup.join("cgroup.procs"));
    shell.arg(std::env::current_exe().unwrap()).args(["--exact", "attest::as_peer"]);
    let mut process = Sleeper(shell.env("DURWARD_TEST_PEER", &socket).stdout(Stdio::null()).spawn().unwrap());
    let (stream, _) = listener.accept().unwrap();
    let peer = Peer::from_stream(&stream, &keys).unwrap();
    assert_eq!(peer.caller().to_string(), format!("pod:{POD}"));

    // A process that has ended still has a cgroup as long as nobody waited for it, but whose it was is not to be believed.
    process.0.kill().unwrap();
    while !peer.process().has_exited() {
        std::thread::yield_now();
    }
    let ended = Peer::from_stream(&stream, &keys).unwrap_err();
    assert!(matches!(ended, CredentialsError::Gone { .. }), "{ended:?}");
    // Where pods are not looked for, the kernel has said whom to charge, if it can be asked for the process (Linux 6.5).
    match Peer::from_stream(&stream, &OsUid) {
        Ok(ended) => assert_eq!(ended.caller(), CallerKey::Uid(geteuid().as_raw())),
        Err(error) => {
            assert_eq!(getsockopt(&stream, PeerPidfd).err(), Some(Errno::ENOPROTOOPT));
            assert!(matches!(error, CredentialsError::Gone { .. }), "{error:?}");
        }
    }
}
