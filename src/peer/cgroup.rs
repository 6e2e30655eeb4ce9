//! Which pod a process is in: the caller key on Kubernetes.
//!
//! Trusted: `/proc/PID/cgroup`, which the kernel writes. Not trusted: the names in it. Whoever is given a part of
//! the cgroup tree (every user of systemd has one) makes cgroups in it and calls them what he likes, so a name counts
//! for nothing and its place for all: a pod is believed only directly below the kubelet's root, where only the
//! kubelet writes. `mountinfo` is never read: a process can forge it.
//!
//! A path is read from the left and its first pod is the answer; what stands below a pod is the pod's own affair.
//! Lines that name no pod are passed over (hybrid hosts have one of the container runtime, SPIRE's data show); two
//! pods, a line that is not the kernel's, a file longer than [`LIMIT`] or not there: no pod, and the OS UID is the
//! key.
//!
//! | path | pod | why |
//! |---|---|---|
//! | `/kubepods/[QOS/]podU/..` | U | cgroupfs driver; QOS is `burstable` or `besteffort` |
//! | `/kubepods/kubepods/[QOS/]podU/..` | U | Docker Desktop |
//! | `/kubepods.slice/[kubepods-QOS.slice/]kubepods[-QOS]-podU.slice/..` | U | systemd driver; the names must agree |
//! | the same below `/kubelet` or `/kubelet.slice` (`kubelet-kubepods..`) | U | kubelet with `--cgroup-root`, kind |
//! | `/kubepods[-QOS]-podU.slice:cri-containerd:C` | U | kubelet with systemd, containerd with cgroupfs |
//! | `/system.slice/containerd.service/` before that | U | the same; also Docker, k3s and RKE2 |
//! | `/docker/C`, `/system.slice/docker-C.scope`, `/machine.slice/libpod-C.scope`, up to four, before all that | U | kind, k3d, minikube: the containers that the agent is in itself |
//! | the same of any other container | none | Podman lets a container that runs systemd make cgroups in its own, whoever is in it |
//! | `/../` before all that | U | seen from a cgroup namespace beside or below |
//! | `/../../[QOS/]podU/..`, `/../../kubepods[-QOS]-podU.slice/..` | U | the agent is a pod itself: above it stands only the kubelet |
//! | `/../C`, `/../../C`, `/` | none | the agent's own pod, or nothing to see |
//! | `/user.slice/..`, `/lxc/..`, any other beginning | none | may be given to a user |
//! | `/docker/C/..` without a kubelet's root | none | a container, no pod |
//!
//! The container is what stands right below the pod: `C`, or `RUNTIME-C.scope` with `RUNTIME` one of `cri-containerd`,
//! `crio` and `docker`. Lines that name the pod and no container are passed over; two containers, and it is none.
//!
//! U is 32 hexadecimal digits, with `-` or with `_` or (static pods) with nothing between 8-4-4-4-12 of them, and C
//! 64. Where a container that is no pod may write its cgroups (one of LXC) and stands under one of those names, or the
//! kubelet runs in a container and the agent does not, set `kubelet_cgroup_root`: then that root alone counts.

use std::{
    fmt,
    iter::successors,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::{Pid, Uid, read},
};

use super::{
    credentials::{Credentials, KeyResolver, PlaceUnread},
    pod::{ContainerId, PodPlace, PodUid},
};
use crate::limits::caller::CallerKey;

/// A longer `/proc/PID/cgroup` is not believed. A real one has at most 15 lines of about 200 bytes.
pub const LIMIT: usize = 16 * 1024;
/// Containers around a kubelet that are looked through.
const NESTING: usize = 4;
/// Units in which a container runtime has made pods' cgroups below its own, as systemd and it did not agree. None of
/// them is any user's.
const RUNTIME_UNITS: [&[u8]; 6] = [
    b"containerd.service",
    b"docker.service",
    b"k3s.service",
    b"k3s-agent.service",
    b"rke2-server.service",
    b"rke2-agent.service",
];
/// What stands before the ID in the name of a container's scope. What a runtime puts there of its own, as
/// `crio-conmon-C.scope`, is no container.
const SCOPES: [&[u8]; 3] = [b"cri-containerd-", b"crio-", b"docker-"];

/// Where the kubelet keeps its pods: the setting `kubelet_cgroup_root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeletRoot {
    roots: Vec<Root>,
    /// What may stand before a root; `None` where an admin named it.
    around: Option<Vec<Box<[u8]>>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Root {
    segments: Vec<Box<[u8]>>,
    /// What the names of its slices begin with; `None` for the cgroupfs driver.
    stem: Option<Box<[u8]>>,
}

/// Why a text is no root.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KubeletRootError {
    /// It is no path from the top.
    #[error(
        "kubelet_cgroup_root must be an absolute path below / without empty, . and .. parts, not {got:?}"
    )]
    NotAbsolute { got: String },
    /// Users make cgroups there.
    #[error("kubelet_cgroup_root cannot be in /user.slice, where every user makes cgroups, but is {got:?}")]
    UserSlice { got: String },
}

impl Default for KubeletRoot {
    /// The roots of the kubelet's own defaults and of kind.
    fn default() -> Self {
        let roots = [
            "kubepods/kubepods",
            "kubepods",
            "kubepods.slice",
            "kubelet/kubepods",
            "kubelet.slice/kubelet-kubepods.slice",
        ];
        Self { roots: roots.map(Root::new).to_vec(), around: Some(Vec::new()) }
    }
}

impl KubeletRoot {
    /// One root that an admin names: the cgroup that holds the pods' or their QoS classes', for example
    /// `/kubepods.slice`. Nothing else counts then.
    ///
    /// # Errors
    /// [`KubeletRootError`].
    pub fn parse(text: &str) -> Result<Self, KubeletRootError> {
        let got = || text.to_owned();
        let path = text.strip_prefix('/').ok_or_else(|| KubeletRootError::NotAbsolute { got: got() })?;
        if path.split('/').any(|segment| matches!(segment, "" | "." | "..")) || path.contains(['\n', '\0']) {
            return Err(KubeletRootError::NotAbsolute { got: got() });
        }
        if path.split('/').any(|segment| segment == "user.slice") {
            return Err(KubeletRootError::UserSlice { got: got() });
        }
        Ok(Self { roots: vec![Root::new(path)], around: None })
    }

    /// Where the kubelet may run in a container: those of known runtimes that the agent is in itself, by its own
    /// `/proc/self/cgroup`. A root that an admin named stays as it is.
    #[must_use]
    pub fn seen_from(mut self, own: &[u8]) -> Self {
        if let Some(around) = &mut self.around {
            let paths = own.split(|b| *b == b'\n').filter_map(|line| line.splitn(3, |b| *b == b':').nth(2));
            for path in paths.filter_map(|path| path.strip_prefix(b"/")) {
                let containers =
                    successors(within_container(Rest(Some(path))), |rest| within_container(*rest));
                for before in containers.take(NESTING).map(|rest| rest.before(path)) {
                    if !around.iter().any(|known| **known == *before) {
                        around.push(before.into());
                    }
                }
            }
        }
        self
    }
}

impl fmt::Display for KubeletRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, root) in self.roots.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { ", " })?;
            for segment in &root.segments {
                write!(f, "/{}", String::from_utf8_lossy(segment))?;
            }
        }
        Ok(())
    }
}

/// A pod, and the line that names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundPod<'a> {
    pub place: PodPlace,
    /// The first line that names it, as it stands in the file: for people.
    pub line: &'a [u8],
}

/// The pod that the content of a `/proc/PID/cgroup` names beyond doubt.
pub fn pod_uid(text: &[u8], root: &KubeletRoot) -> Option<PodUid> {
    find(text, root).map(|found| found.place.pod)
}

/// [`pod_uid`], and where it stands.
pub fn find<'a>(text: &'a [u8], root: &KubeletRoot) -> Option<FoundPod<'a>> {
    let text = text.strip_suffix(b"\n").unwrap_or(text);
    let mut found: Option<FoundPod<'a>> = None;
    let mut containers = None;
    let mut last = None;
    for line in text.split(|b| *b == b'\n') {
        // hierarchy ID : controllers : path, which may hold colons itself.
        let mut fields = line.splitn(3, |b| *b == b':');
        let (id, _controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        if id.is_empty() || !id.iter().all(u8::is_ascii_digit) {
            return None;
        }
        // Most files of v1 say the same path a dozen times.
        if last.replace(path) == Some(path) {
            continue;
        }
        let Some(place) = place_of_path(path.strip_prefix(b"/")?, root) else { continue };
        match &found {
            None => found = Some(FoundPod { place, line }),
            Some(first) if first.place.pod == place.pod => {}
            Some(_) => return None,
        }
        containers = match (containers, place.container) {
            (known, None) => known,
            (None, Some(id)) => Some(Some(id)),
            (Some(known), Some(id)) => Some(known.filter(|known| *known == id)),
        };
    }
    found.map(|FoundPod { place, line }| FoundPod {
        place: PodPlace { container: containers.flatten(), ..place },
        line,
    })
}

/// The rest of a path. Cheap to copy: rules try it one after the other.
#[derive(Clone, Copy)]
struct Rest<'a>(Option<&'a [u8]>);

impl<'a> Rest<'a> {
    /// Takes the first segment off.
    fn next(&mut self) -> Option<&'a [u8]> {
        let text = self.0?;
        let mut halves = text.splitn(2, |b| *b == b'/');
        let first = halves.next();
        self.0 = halves.next();
        first
    }

    /// What of `path` stands before this rest of it.
    fn before(self, path: &'a [u8]) -> &'a [u8] {
        // And the slash between.
        let left = self.0.map_or(0, |rest| rest.len() + 1);
        path.get(..path.len().saturating_sub(left)).unwrap_or(path)
    }

    /// What follows `segments`, if the path begins with them.
    fn after(mut self, segments: &[Box<[u8]>]) -> Option<Self> {
        segments.iter().all(|segment| self.next() == Some(segment)).then_some(self)
    }
}

/// `path` has lost its first slash.
fn place_of_path(path: &[u8], root: &KubeletRoot) -> Option<PodPlace> {
    let mut rest = Rest(Some(path));
    let mut ups = 0;
    loop {
        let mut ahead = rest;
        if ahead.next() != Some(b"..") {
            break;
        }
        rest = ahead;
        ups += 1;
    }
    // Whoever could make up what stands after a `..` owns a cgroup that the agent's lies in, and so the agent.
    from_top(rest, path, root).or_else(|| if ups >= 2 { within_root(rest, root) } else { None })
}

/// A path that begins at the top of the tree, or of a container that the agent is in.
fn from_top(mut rest: Rest<'_>, path: &[u8], root: &KubeletRoot) -> Option<PodPlace> {
    for _ in 0..=NESTING {
        let pod = root.roots.iter().find_map(|root| root.pod_below(rest.after(&root.segments)?));
        if let Some(pod) = pod.or_else(|| mixed_drivers(rest, root)) {
            return Some(pod);
        }
        rest = within_container(rest)?;
        let before = rest.before(path);
        root.around.iter().flatten().find(|around| ***around == *before)?;
    }
    None
}

/// A path from a cgroup of the kubelet, as an agent that is a pod itself sees other pods.
fn within_root(rest: Rest<'_>, root: &KubeletRoot) -> Option<PodPlace> {
    root.roots.iter().find_map(|root| {
        let ends = (1..=root.segments.len()).filter_map(|from| root.segments.get(from..));
        let mut below = ends.filter_map(|segments| rest.after(segments));
        below.find_map(|rest| root.pod_below(rest)).or_else(|| root.pod_of_class(rest))
    })
}

/// `kubepods[-QOS]-podU.slice:cri-containerd:C`, at the top or in the unit of a container runtime.
fn mixed_drivers(mut rest: Rest<'_>, root: &KubeletRoot) -> Option<PodPlace> {
    let mut first = rest.next()?;
    if first == b"system.slice" {
        let unit = rest.next()?;
        first = RUNTIME_UNITS.contains(&unit).then(|| rest.next())??;
    }
    let mut parts = first.split(|b| *b == b':');
    let (slice, runtime, container) = (parts.next()?, parts.next()?, parts.next()?);
    if runtime != b"cri-containerd" || !is_container_id(container) || parts.next().is_some() {
        return None;
    }
    let pod = root.roots.iter().find_map(|root| root.pod_slice_of_any_class(slice))?;
    Some(PodPlace { pod, container: ContainerId::parse(container) })
}

/// What follows a container in which a kubelet may run.
fn within_container(mut rest: Rest<'_>) -> Option<Rest<'_>> {
    let (parent, name) = (rest.next()?, rest.next()?);
    let id = match parent {
        b"docker" => name,
        b"system.slice" => name.strip_prefix(b"docker-")?.strip_suffix(b".scope")?,
        b"machine.slice" => name.strip_prefix(b"libpod-")?.strip_suffix(b".scope")?,
        b"libpod_parent" => name.strip_prefix(b"libpod-")?,
        _ => return None,
    };
    if !is_container_id(id) {
        return None;
    }
    // Podman puts a container that runs systemd one deeper.
    let mut deeper = rest;
    Some(if parent == b"machine.slice" && deeper.next() == Some(b"container") { deeper } else { rest })
}

/// The kubelet's classes of service that have a cgroup of their own; pods of the third stand beside them.
const CLASSES: [&[u8]; 2] = [b"burstable", b"besteffort"];

impl Root {
    /// `path` has no first slash.
    fn new(path: &str) -> Self {
        let segments: Vec<Box<[u8]>> = path.split('/').map(|segment| segment.as_bytes().into()).collect();
        let stem = segments.last().and_then(|last| last.strip_suffix(b".slice")).map(Box::from);
        Self { segments, stem }
    }

    /// The pod of a path that begins below this root.
    fn pod_below(&self, mut rest: Rest<'_>) -> Option<PodPlace> {
        let first = rest.next()?;
        let pod = match &self.stem {
            None if CLASSES.contains(&first) => uid_after_pod(rest.next()?),
            None => uid_after_pod(first),
            Some(stem) => {
                let class = CLASSES.into_iter().find(|class| {
                    slice_name(first, stem).and_then(|name| name.strip_prefix(b"-")) == Some(*class)
                });
                match class {
                    Some(class) => pod_slice(rest.next()?, stem, Some(class)),
                    None => pod_slice(first, stem, None),
                }
            }
        }?;
        Some(PodPlace { pod, container: container_below(rest) })
    }

    /// The pod of a path that begins in one of this root's classes, where the class is in the pod's name.
    fn pod_of_class(&self, mut rest: Rest<'_>) -> Option<PodPlace> {
        let pod = self.pod_slice_of_any_class(rest.next()?)?;
        Some(PodPlace { pod, container: container_below(rest) })
    }

    fn pod_slice_of_any_class(&self, slice: &[u8]) -> Option<PodUid> {
        let stem = self.stem.as_deref()?;
        let classes = [None, Some(CLASSES[0]), Some(CLASSES[1])];
        classes.into_iter().find_map(|class| pod_slice(slice, stem, class))
    }
}

/// What follows `stem` in the name of a slice.
fn slice_name<'a>(segment: &'a [u8], stem: &[u8]) -> Option<&'a [u8]> {
    segment.strip_suffix(b".slice")?.strip_prefix(stem)
}

/// `STEM[-CLASS]-podU.slice`.
fn pod_slice(segment: &[u8], stem: &[u8], class: Option<&[u8]>) -> Option<PodUid> {
    let mut name = slice_name(segment, stem)?;
    if let Some(class) = class {
        name = name.strip_prefix(b"-")?.strip_prefix(class)?;
    }
    uid_after_pod(name.strip_prefix(b"-")?)
}

/// `podU`, and nothing after it.
fn uid_after_pod(segment: &[u8]) -> Option<PodUid> {
    let text = segment.strip_prefix(b"pod")?;
    let separator = match (text.len(), text.get(8)?) {
        (36, separator @ (b'-' | b'_')) => Some(*separator),
        // The kubelet makes the UIDs of static pods from a hash.
        (32, _) => None,
        _ => return None,
    };
    let mut digits = text.iter();
    let mut uid = [0; 16];
    for (at, byte) in uid.iter_mut().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10)
            && let Some(separator) = separator
            && *digits.next()? != separator
        {
            return None;
        }
        let mut nibble =
            || char::from(*digits.next()?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        *byte = nibble()? << 4 | nibble()?;
    }
    Some(uid)
}

/// The container that a path names right below its pod.
fn container_below(mut rest: Rest<'_>) -> Option<ContainerId> {
    let segment = rest.next()?;
    ContainerId::parse(segment).or_else(|| {
        let scope = segment.strip_suffix(b".scope")?;
        SCOPES.iter().find_map(|runtime| ContainerId::parse(scope.strip_prefix(*runtime)?))
    })
}

fn is_container_id(text: &[u8]) -> bool {
    ContainerId::parse(text).is_some()
}

/// When pods are looked for: the setting `kubernetes`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KubernetesMode {
    /// When the agent itself was started by Kubernetes (`KUBERNETES_SERVICE_HOST` is set).
    #[default]
    Auto,
    /// Always: for an agent that Kubernetes did not start, on a node of Kubernetes.
    On,
    /// Never.
    Off,
}

/// Charges the pod on Kubernetes, else the user. Where there is no Kubernetes it opens no file.
#[derive(Clone, Debug)]
pub struct PodOrUid {
    /// `None` where pods are not looked for.
    kubelet: Option<KubeletRoot>,
    proc_root: PathBuf,
}

impl PodOrUid {
    /// `in_pod` is whether the environment holds `KUBERNETES_SERVICE_HOST`.
    pub fn new(mode: KubernetesMode, in_pod: bool, root: KubeletRoot) -> Self {
        Self::reading("/proc", mode, in_pod, root)
    }

    /// Whether pods are looked for.
    pub fn looks(&self) -> bool {
        self.kubelet.is_some()
    }

    /// As [`Self::new`], with another proc file system than `/proc`.
    pub fn reading(
        proc_root: impl Into<PathBuf>,
        mode: KubernetesMode,
        in_pod: bool,
        root: KubeletRoot,
    ) -> Self {
        let look = match mode {
            KubernetesMode::Auto => in_pod,
            KubernetesMode::On => true,
            KubernetesMode::Off => false,
        };
        let proc_root = proc_root.into();
        let seen = || {
            let mut buffer = [0; LIMIT];
            let own = read_cgroup(&proc_root.join("self"), &mut buffer);
            root.seen_from(own.unwrap_or_default())
        };
        Self { kubelet: look.then(seen), proc_root }
    }

    /// Whether pods are looked for.
    pub fn looks_for_pods(&self) -> bool {
        self.kubelet.is_some()
    }

    /// The pod of the process that has this PID now, if it is in one: whoever asks must know that it lives.
    pub fn pod_of(&self, pid: Pid) -> Option<PodUid> {
        self.place_of(pid).ok().flatten().map(|place| place.pod)
    }

    fn of(&self, pid: Pid) -> PathBuf {
        self.proc_root.join(pid.to_string())
    }

    fn place_of(&self, pid: Pid) -> Result<Option<PodPlace>, PlaceUnread> {
        let Some(root) = &self.kubelet else { return Ok(None) };
        let mut buffer = [0; LIMIT];
        let text = read_cgroup(&self.of(pid), &mut buffer).ok_or(PlaceUnread)?;
        Ok(find(text, root).map(|found| found.place))
    }
}

/// Why a caller key is what it is: for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// A line of `/proc/PID/cgroup` names a pod.
    Pod { place: PodPlace, line: String },
    /// Pods are not looked for.
    NotKubernetes,
    /// No line names a pod beyond doubt.
    NoPod,
    /// `/proc/PID/cgroup` is not there, or too long.
    Unreadable,
}

impl KeySource {
    /// The pod, where there is one.
    pub fn place(&self) -> Option<PodPlace> {
        match self {
            Self::Pod { place, .. } => Some(*place),
            Self::NotKubernetes | Self::NoPod | Self::Unreadable => None,
        }
    }
}

impl PodOrUid {
    /// The key of a process of this user, and why it is that. As [`Self::pod_of`]: whoever asks must know
    /// that it lives.
    pub fn explain(&self, pid: Pid, user: Uid) -> (CallerKey, KeySource) {
        let uid = CallerKey::Uid(user.as_raw());
        let Some(root) = &self.kubelet else { return (uid, KeySource::NotKubernetes) };
        let mut buffer = [0; LIMIT];
        match read_cgroup(&self.of(pid), &mut buffer) {
            None => (uid, KeySource::Unreadable),
            Some(text) => match find(text, root) {
                None => (uid, KeySource::NoPod),
                Some(FoundPod { place, line }) => {
                    let line = String::from_utf8_lossy(line).into_owned();
                    (CallerKey::Pod(place.pod), KeySource::Pod { place, line })
                }
            },
        }
    }
}

impl KeyResolver for PodOrUid {
    fn key_of_user(&self, credentials: &Credentials) -> Option<CallerKey> {
        let visible = credentials.pid.as_raw() > 0;
        (!visible || !self.looks_for_pods()).then(|| CallerKey::Uid(credentials.uid.as_raw()))
    }

    fn place_of_process(&self, credentials: &Credentials) -> Result<Option<PodPlace>, PlaceUnread> {
        self.place_of(credentials.pid)
    }
}

/// The whole of `/proc/PID/cgroup`, or nothing when it is longer than the buffer or cannot be read.
fn read_cgroup<'a>(process: &Path, buffer: &'a mut [u8; LIMIT]) -> Option<&'a [u8]> {
    let file = open(&process.join("cgroup"), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    // The kernel makes the whole text for one read.
    let n = read(&file, buffer).ok()?;
    if n < LIMIT { buffer.get(..n) } else { None }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::{prelude::*, sample::select};

    use super::*;

    const U: &str = "2c48913c-b29f-11e7-9350-020968147796";
    const U_: &str = "2c48913c_b29f_11e7_9350_020968147796";
    const UID: PodUid =
        [0x2c, 0x48, 0x91, 0x3c, 0xb2, 0x9f, 0x11, 0xe7, 0x93, 0x50, 0x02, 0x09, 0x68, 0x14, 0x77, 0x96];
    const OTHER: &str = "11111111-2222-3333-4444-555555555555";
    const C: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
    const D: &str = "93529524695bb00d91c1f6dba692ea8d3550c3b94fb2463af7bc9ec82f992d26";

    /// The shorthand of the tables: `{u}` the pod, `{u_}` with underscores, `{o}` another pod, `{c}` a container,
    /// `{d}` another.
    fn written(text: &str) -> String {
        let o_ = OTHER.replace('-', "_");
        text.replace("{u}", U)
            .replace("{u_}", U_)
            .replace("{o}", OTHER)
            .replace("{o_}", &o_)
            .replace("{c}", C)
            .replace("{d}", D)
    }

    fn of(text: &str, root: &KubeletRoot) -> Option<PodUid> {
        pod_uid(written(text).as_bytes(), root)
    }

    /// As an agent sees it that is in the same containers, and in no pod.
    fn beside(text: &str) -> KubeletRoot {
        KubeletRoot::default().seen_from(written(text).as_bytes())
    }

    #[test]
    fn the_container_stands_right_below_its_pod() {
        let c = ContainerId::parse(C.as_bytes());
        assert_eq!(c.unwrap().to_string(), C);
        let pods = "/kubepods.slice/kubepods-pod{u_}.slice";
        for (case, text, want) in [
            ("cgroupfs", "0::/kubepods/burstable/pod{u}/{c}".to_owned(), c),
            ("containerd", format!("0::{pods}/cri-containerd-{{c}}.scope"), c),
            ("cri-o", format!("0::{pods}/crio-{{c}}.scope"), c),
            ("docker", format!("0::{pods}/docker-{{c}}.scope"), c),
            ("below the container", format!("0::{pods}/crio-{{c}}.scope/container/app.service"), c),
            ("made by the container itself", "0::/kubepods/pod{u}/{c}/kubepods/pod{o}/{d}".to_owned(), c),
            ("colons", "0::/kubepods-pod{u_}.slice:cri-containerd:{c}".to_owned(), c),
            ("a static pod", "0::/kubepods/pod2c48913cb29f11e79350020968147796/{c}".to_owned(), c),
            ("from a namespace", "0::/../../pod{u}/{c}".to_owned(), c),
            ("kind", "0::/docker/{d}/kubepods/pod{u}/{c}".to_owned(), c),
            (
                "every controller",
                "9:cpu:/kubepods/pod{u}/{c}\n8:pids:/kubepods/pod{u}/{c}\n0::/".to_owned(),
                c,
            ),
            ("named in one line", "9:cpu:/kubepods/pod{u}\n8:pids:/kubepods/pod{u}/{c}".to_owned(), c),
            ("two containers", "9:cpu:/kubepods/pod{u}/{c}\n8:pids:/kubepods/pod{u}/{d}".to_owned(), None),
            (
                "two, and the first again",
                "9:cpu:/kubepods/pod{u}/{c}\n8:pids:/kubepods/pod{u}/{d}\n7:net:/kubepods/pod{u}/{c}"
                    .to_owned(),
                None,
            ),
            ("cri-o's monitor", format!("0::{pods}/crio-conmon-{{c}}.scope"), None),
            ("kata's shim", "0::/kubepods/pod{u}/kata_{c}".to_owned(), None),
            ("the pod itself", "0::/kubepods/pod{u}".to_owned(), None),
            ("too short", "0::/kubepods/pod{u}/abc".to_owned(), None),
            ("a name of its own", "0::/kubepods/pod{u}/x-{c}.scope".to_owned(), None),
            ("deeper", "0::/kubepods/pod{u}/app/{c}".to_owned(), None),
        ] {
            let place = find(written(&text).as_bytes(), &beside(&text)).map(|found| found.place);
            assert_eq!(place, Some(PodPlace { pod: UID, container: want }), "{case}");
        }
    }

    #[test]
    fn every_shape_of_the_field() {
        let (pod, none) = (Some(UID), None);
        for (case, path, want) in [
            // cgroupfs driver
            ("guaranteed", "/kubepods/pod{u}/{c}", pod),
            ("burstable", "/kubepods/burstable/pod{u}/{c}", pod),
            ("besteffort", "/kubepods/besteffort/pod{u}/{c}", pod),
            ("underscores", "/kubepods/pod{u_}/{c}", pod),
            ("upper case", "/kubepods/pod2C48913C-B29F-11E7-9350-020968147796/{c}", pod),
            ("a static pod's UID", "/kubepods/burstable/pod2c48913cb29f11e79350020968147796/{c}", pod),
            ("the pod itself", "/kubepods/pod{u}", pod),
            ("kata", "/kubepods/burstable/pod{u}/kata_{c}", pod),
            ("below the container", "/kubepods/pod{u}/{c}/system.slice/app.service", pod),
            ("docker desktop", "/kubepods/kubepods/besteffort/pod{u}/{c}", pod),
            ("--cgroup-root", "/kubelet/kubepods/burstable/pod{u}/{c}", pod),
            // systemd driver
            (
                "docker",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{u_}.slice/docker-{c}.scope",
                pod,
            ),
            (
                "with dashes",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{u}.slice/docker-{c}.scope",
                pod,
            ),
            (
                "cri-o",
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{u_}.slice/crio-{c}.scope",
                pod,
            ),
            ("cri-o's monitor", "/kubepods.slice/kubepods-pod{u_}.slice/crio-conmon-{c}.scope", pod),
            ("containerd", "/kubepods.slice/kubepods-pod{u_}.slice/cri-containerd-{c}.scope", pod),
            (
                "containerd with --cgroup-root",
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                 kubelet-kubepods-burstable-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            (
                "guaranteed with --cgroup-root",
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            // drivers that do not agree
            ("colons", "/kubepods-besteffort-pod{u_}.slice:cri-containerd:{c}", pod),
            ("colons, guaranteed", "/kubepods-pod{u_}.slice:cri-containerd:{c}", pod),
            (
                "colons in containerd's unit",
                "/system.slice/containerd.service/kubepods-burstable-pod{u_}.slice:cri-containerd:{c}",
                pod,
            ),
            (
                "colons in k3s",
                "/system.slice/k3s.service/kubepods-burstable-pod{u_}.slice:cri-containerd:{c}",
                pod,
            ),
            (
                "colons in a container",
                "/docker/{d}/system.slice/containerd.service/kubepods-pod{u_}.slice:cri-containerd:{c}",
                pod,
            ),
            // a kubelet in a container
            ("kind", "/docker/{d}/kubepods/besteffort/pod{u}/{c}", pod),
            ("kind with --cgroup-root", "/docker/{d}/kubelet/kubepods/burstable/pod{u}/{c}", pod),
            (
                "kind, cgroup v2",
                "/system.slice/docker-{d}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
                 kubelet-kubepods-burstable-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            ("minikube on podman", "/machine.slice/libpod-{d}.scope/kubepods/burstable/pod{u}/{c}", pod),
            (
                "kind on podman",
                "/machine.slice/libpod-{d}.scope/container/kubelet.slice/kubelet-kubepods.slice/\
                 kubelet-kubepods-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            ("podman with cgroupfs", "/libpod_parent/libpod-{d}/kubepods/pod{u}/{c}", pod),
            ("docker in docker", "/docker/{d}/docker/{c}/kubepods/pod{u}/{c}", pod),
            ("kind in a pod: the outer pod", "/kubepods/pod{u}/{d}/docker/{c}/kubepods/pod{o}/{c}", pod),
            // private cgroup namespaces
            (
                "the host's root from a service",
                "/../../kubepods.slice/kubepods-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            ("another class", "/../../../burstable/pod{u}/{c}", pod),
            ("the same class", "/../../pod{u}/{c}", pod),
            (
                "another class, systemd",
                "/../../../kubepods-besteffort.slice/kubepods-besteffort-pod{u_}.slice/crio-{c}.scope",
                pod,
            ),
            (
                "the same class, systemd",
                "/../../kubepods-burstable-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            ("guaranteed, systemd", "/../../../kubepods-pod{u_}.slice/cri-containerd-{c}.scope", pod),
            (
                "with --cgroup-root",
                "/../../kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            (
                "from beside the root",
                "/../../kubelet-kubepods.slice/kubelet-kubepods-pod{u_}.slice/cri-containerd-{c}.scope",
                pod,
            ),
            ("from beside the root, cgroupfs", "/../../kubepods/burstable/pod{u}/{c}", pod),
            ("another container of the agent's pod", "/../{c}", none),
            ("the same, systemd", "/../cri-containerd-{c}.scope", none),
            ("kubeedge", "/../crio-{c}.scope", none),
            ("the agent's own", "/", none),
            ("one up is the agent's pod: no place for pods", "/../pod{u}/{c}", none),
            // no pods
            ("a user", "/user.slice/user-1000.slice/user@1000.service/app.slice/sh.scope", none),
            ("a service", "/system.slice/sshd.service", none),
            ("init", "/init.scope", none),
            ("docker without kubernetes", "/docker/{c}", none),
            ("docker, systemd", "/system.slice/docker-{c}.scope", none),
            ("podman", "/machine.slice/libpod-{c}.scope/container", none),
            ("the kubelet", "/system.slice/kubelet.service", none),
            ("containerd", "/system.slice/containerd.service", none),
            ("no pod", "/kubepods/{c}", none),
            ("a class alone", "/kubepods/burstable", none),
            ("the root alone", "/kubepods.slice", none),
            // invented
            ("a user's kubepods", "/user.slice/user-1000.slice/user@1000.service/kubepods/pod{u}/{c}", none),
            (
                "a user's slices",
                "/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod{u_}.slice/crio-{c}.scope",
                none,
            ),
            (
                "a user's colons",
                "/user.slice/user-1000.slice/user@1000.service/kubepods-pod{u_}.slice:cri-containerd:{c}",
                none,
            ),
            (
                "a user's docker",
                "/user.slice/user-1000.slice/user@1000.service/docker/{d}/kubepods/pod{u}/{c}",
                none,
            ),
            (
                "rootless podman",
                "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{d}.scope/kubepods/pod{u}/{c}",
                none,
            ),
            (
                "from a namespace",
                "/../../../../user.slice/user-1000.slice/user@1000.service/kubepods/pod{u}/{c}",
                none,
            ),
            ("a delegated service", "/system.slice/app.service/kubepods/pod{u}/{c}", none),
            (
                "a delegated service's colons",
                "/system.slice/app.service/kubepods-pod{u_}.slice:cri-containerd:{c}",
                none,
            ),
            (
                "a delegated service's docker",
                "/system.slice/app.service/docker-{d}.scope/kubepods/pod{u}/{c}",
                none,
            ),
            ("a unit called like a container", "/system.slice/docker-{u}.scope/kubepods/pod{u}/{c}", none),
            ("lxc", "/lxc.payload.web/kubepods/pod{u}/{c}", none),
            ("old lxc", "/lxc/web/kubepods/pod{u}/{c}", none),
            ("nspawn", "/machine.slice/machine-web.scope/kubepods/pod{u}/{c}", none),
            ("no root", "/something/pod{u}/{c}", none),
            ("no root at all", "/pod{u}/{c}", none),
            ("a class at the top", "/burstable/pod{u}/{c}", none),
            ("a slice at the top", "/kubepods-pod{u_}.slice/crio-{c}.scope", none),
            (
                "a container below a container below a container below a container below a container",
                "/docker/{c}/docker/{c}/docker/{c}/docker/{c}/docker/{c}/kubepods/pod{u}/{c}",
                none,
            ),
            ("one below the root", "/kubepods/x/pod{u}/{c}", none),
            ("two classes", "/kubepods/burstable/besteffort/pod{u}/{c}", none),
            ("no such class", "/kubepods/guaranteed/pod{u}/{c}", none),
            (
                "a class that the pod denies",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod{u_}.slice/crio-{c}.scope",
                none,
            ),
            (
                "a class that the pod does not name",
                "/kubepods.slice/kubepods-burstable.slice/kubepods-pod{u_}.slice/crio-{c}.scope",
                none,
            ),
            (
                "a class that is not there",
                "/kubepods.slice/kubepods-burstable-pod{u_}.slice/crio-{c}.scope",
                none,
            ),
            ("another root's slice", "/kubepods.slice/kubelet-kubepods-pod{u_}.slice/crio-{c}.scope", none),
            ("another driver's pod", "/kubepods.slice/pod{u}/{c}", none),
            ("another driver's slice", "/kubepods/kubepods-pod{u_}.slice/crio-{c}.scope", none),
            ("almost the root", "/kubepodsx/pod{u}/{c}", none),
            ("upper root", "/Kubepods/pod{u}/{c}", none),
            ("an empty segment", "//kubepods/pod{u}/{c}", none),
            ("an empty segment within", "/kubepods//pod{u}/{c}", none),
            ("ups within", "/kubepods/../kubepods/pod{u}/{c}", none),
            ("a dot", "/./kubepods/pod{u}/{c}", none),
            ("other colons", "/kubepods-pod{u_}.slice:evil:{c}", none),
            ("colons without a container", "/kubepods-pod{u_}.slice:cri-containerd:x", none),
            ("more colons", "/kubepods-pod{u_}.slice:cri-containerd:{c}:{c}", none),
            // UIDs that are none
            ("mixed", "/kubepods/pod2c48913c-b29f_11e7-9350-020968147796/{c}", none),
            ("short", "/kubepods/pod2c48913c-b29f-11e7-9350-02096814779/{c}", none),
            ("long", "/kubepods/pod{u}0/{c}", none),
            ("no hexadecimal", "/kubepods/pod2c48913g-b29f-11e7-9350-020968147796/{c}", none),
            ("a sign", "/kubepods/pod+c48913c-b29f-11e7-9350-020968147796/{c}", none),
            ("shifted", "/kubepods/pod2c48913-cb29f-11e7-9350-020968147796/{c}", none),
            ("another word", "/kubepods/Pod{u}/{c}", none),
            ("something before", "/kubepods/xpod{u}/{c}", none),
            ("a removed cgroup", "/kubepods/pod{u} (deleted)", none),
        ] {
            for (version, before) in [("v1", "9:name=systemd:"), ("v1, two", "4:cpu,cpuacct:"), ("v2", "0::")]
            {
                let line = format!("{before}{path}\n");
                assert_eq!(of(&line, &beside(&line)), want, "{case} ({version}): {line}");
            }
        }
    }

    #[test]
    fn lines_agree_or_there_is_no_pod() {
        let (pod, none) = (Some(UID), None);
        for (case, text, want) in [
            ("nothing", "", none),
            ("no newline at the end", "0::/kubepods/pod{u}/{c}", pod),
            ("two that agree", "2:cpu:/kubepods/pod{u}/{c}\n1:name=systemd:/kubepods/pod{u}/{c}\n", pod),
            (
                "two containers of one pod",
                "2:cpu:/kubepods/pod{u}/{c}\n1:name=systemd:/kubepods/pod{u}/{d}\n",
                pod,
            ),
            (
                "two spellings",
                "2:cpu:/kubepods/pod{u}/{c}\n0::/kubepods.slice/kubepods-pod{u_}.slice/crio-{c}.scope\n",
                pod,
            ),
            ("two pods", "2:cpu:/kubepods/pod{u}/{c}\n1:name=systemd:/kubepods/pod{o}/{c}\n", none),
            ("hybrid: v2 says nothing", "2:cpu:/kubepods/pod{u}/{c}\n0::/\n", pod),
            (
                "hybrid: v2 says the runtime",
                "2:cpu:/kubepods/pod{u}/{c}\n0::/system.slice/containerd.service\n",
                pod,
            ),
            (
                "hybrid in kind",
                "1:cpuset:/docker/{d}/kubepods/pod{u}/{c}\n0::/docker/{d}/system.slice/containerd.service\n",
                pod,
            ),
            (
                "hybrid: v1 says nothing",
                "3:cpu:/\n0::/kubepods.slice/kubepods-pod{u_}.slice/crio-{c}.scope\n",
                pod,
            ),
            ("a user's and a pod's", "2:cpu:/user.slice\n1:name=systemd:/kubepods/pod{u}/{c}\n", pod),
            (
                "a user's invented and a pod's",
                "2:cpu:/user.slice/kubepods/pod{o}/{c}\n0::/kubepods/pod{u}/{c}\n",
                pod,
            ),
            ("an empty line", "0::/kubepods/pod{u}/{c}\n\n", none),
            ("no colons", "/kubepods/pod{u}/{c}\n", none),
            ("one colon", "0:/kubepods/pod{u}/{c}\n", none),
            ("no hierarchy", "::/kubepods/pod{u}/{c}\n", none),
            ("no number", "x::/kubepods/pod{u}/{c}\n", none),
            ("no path from the top", "0::kubepods/pod{u}/{c}\n", none),
            ("trouble after an answer", "0::/kubepods/pod{u}/{c}\ntrouble\n", none),
        ] {
            assert_eq!(of(text, &beside(text)), want, "{case}");
        }
    }

    #[test]
    fn a_container_is_believed_by_who_is_in_it() {
        let (pod, none) = (Some(UID), None);
        let kind = "/docker/{d}/kubelet/kubepods/burstable/pod{u}/{c}";
        let podman = "/machine.slice/libpod-{d}.scope/container/kubepods/pod{u}/{c}";
        let nested = "/docker/{d}/docker/{c}/kubepods/pod{u}/{c}";
        for (case, own, path, want) in [
            ("a pod of kind", "0::/docker/{d}/kubelet/kubepods/burstable/pod{o}/{c}", kind, pod),
            ("a service of the node", "0::/docker/{d}/system.slice/durward.service", kind, pod),
            ("the node's first process", "0::/docker/{d}", kind, pod),
            ("one line of many", "3:cpu:/\n2:cpuset:/docker/{d}/init.scope\n0::/\n", kind, pod),
            ("a service of the host", "0::/system.slice/durward.service", kind, none),
            ("a pod of the host", "0::/kubepods/pod{o}/{c}", kind, none),
            ("another container", "0::/docker/{c}/kubepods/pod{o}/{c}", kind, none),
            ("the top of a namespace", "0::/", kind, none),
            ("nothing can be read", "", kind, none),
            (
                "a container of Podman's",
                "0::/machine.slice/libpod-{d}.scope/container/init.scope",
                podman,
                pod,
            ),
            ("beside it", "0::/system.slice/durward.service", podman, none),
            ("the inner of two", "0::/docker/{d}/docker/{c}/init.scope", nested, pod),
            ("the outer of two", "0::/docker/{d}/init.scope", nested, none),
            ("a namespace between", "0::/docker/{d}/init.scope", "/../docker/{d}/kubepods/pod{u}/{c}", none),
        ] {
            let line = format!("0::{path}\n");
            assert_eq!(of(&line, &beside(own)), want, "{case}: {line}");
            let named = KubeletRoot::parse("/kubepods").unwrap().seen_from(written(own).as_bytes());
            assert_eq!(of(&line, &named), none, "{case}, with a root that was named");
        }
    }

    #[test]
    fn an_admin_names_the_root() {
        let (pod, none) = (Some(UID), None);
        for (root, path, want) in [
            ("/kubepods", "/kubepods/burstable/pod{u}/{c}", pod),
            ("/kubepods", "/docker/{d}/kubepods/burstable/pod{u}/{c}", none),
            ("/kubepods", "/kubelet/kubepods/burstable/pod{u}/{c}", none),
            ("/kubepods", "/kubepods.slice/kubepods-pod{u_}.slice/crio-{c}.scope", none),
            ("/lxc.payload.node/kubepods", "/lxc.payload.node/kubepods/pod{u}/{c}", pod),
            ("/lxc.payload.node/kubepods", "/lxc.payload.web/kubepods/pod{u}/{c}", none),
            ("/lxc.payload.node/kubepods", "/../../kubepods/pod{u}/{c}", pod),
            (
                "/a.slice/a-pods.slice",
                "/a.slice/a-pods.slice/a-pods-burstable.slice/a-pods-burstable-pod{u_}.slice/x",
                pod,
            ),
            ("/a.slice/a-pods.slice", "/a-pods-burstable-pod{u_}.slice:cri-containerd:{c}", pod),
            ("/a.slice/a-pods.slice", "/kubepods-burstable-pod{u_}.slice:cri-containerd:{c}", none),
        ] {
            let root = KubeletRoot::parse(root).unwrap();
            assert_eq!(of(&format!("0::{path}\n"), &root), want, "{root}: {path}");
        }
        for (text, want) in [
            ("", "must be an absolute path below / without empty, . and .. parts, not \"\""),
            ("/", "must be an absolute path below / without empty, . and .. parts, not \"/\""),
            ("kubepods", "must be an absolute path below / without empty, . and .. parts, not \"kubepods\""),
            (
                "/kubepods/",
                "must be an absolute path below / without empty, . and .. parts, not \"/kubepods/\"",
            ),
            ("/a/../b", "must be an absolute path below / without empty, . and .. parts, not \"/a/../b\""),
            (
                "/user.slice/kubepods",
                "cannot be in /user.slice, where every user makes cgroups, but is \"/user.slice/kubepods\"",
            ),
        ] {
            let err = KubeletRoot::parse(text).unwrap_err();
            assert_eq!(err.to_string(), format!("kubelet_cgroup_root {want}"));
        }
    }

    #[test]
    fn the_line_is_told_to_people() {
        let text = written("3:cpu:/\n2:cpuset:/kubepods/pod{u}/{c}\n0::/kubepods/pod{u}/{c}\n");
        let found = find(text.as_bytes(), &KubeletRoot::default()).unwrap();
        assert_eq!(found.line, written("2:cpuset:/kubepods/pod{u}/{c}").as_bytes());
        assert_eq!(CallerKey::Pod(found.place.pod).to_string(), format!("pod:{U}"));
    }

    #[test]
    fn modes_decide_whether_a_file_is_opened() {
        use KubernetesMode::{Auto, Off, On};
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("7")).unwrap();
        fs::write(dir.path().join("7/cgroup"), written("0::/kubepods/pod{u}/{c}\n")).unwrap();
        // Opening this one for reading would wait for ever: nobody writes.
        fs::create_dir(dir.path().join("8")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("8/cgroup"), Mode::S_IRWXU).unwrap();
        for (mode, in_pod, looks) in [
            (Auto, true, true),
            (Auto, false, false),
            (On, false, true),
            (On, true, true),
            (Off, true, false),
        ] {
            let keys = PodOrUid::reading(dir.path(), mode, in_pod, KubeletRoot::default());
            assert_eq!(keys.looks_for_pods(), looks, "{mode:?} {in_pod}");
            assert_eq!(keys.pod_of(Pid::from_raw(7)), looks.then_some(UID), "{mode:?} {in_pod}");
            assert_eq!(keys.pod_of(Pid::from_raw(9)), None, "no such process");
            if !looks {
                assert_eq!(keys.pod_of(Pid::from_raw(8)), None, "{mode:?} {in_pod}: opened nothing");
            }
        }
    }

    #[test]
    fn a_file_that_is_too_long_names_no_pod() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("7")).unwrap();
        let keys = PodOrUid::reading(dir.path(), KubernetesMode::On, false, KubeletRoot::default());
        let pod = written("0::/kubepods/pod{u}/");
        for (length, want) in [(LIMIT - 1, Some(UID)), (LIMIT, None), (LIMIT + 1, None)] {
            fs::write(dir.path().join("7/cgroup"), format!("{pod:x<length$}")).unwrap();
            assert_eq!(keys.pod_of(Pid::from_raw(7)), want, "{length}");
        }
    }

    #[test]
    fn whole_files_of_the_field() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cgroup");
        let mut seen = 0;
        for file in fs::read_dir(dir).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let want = match path.extension().and_then(|ext| ext.to_str()) {
                Some("pod") => Some(UID),
                Some("none") => None,
                other => panic!("{name}: ends in {other:?}, which says no result"),
            };
            let text = fs::read(&path).unwrap();
            assert_eq!(pod_uid(&text, &KubeletRoot::default().seen_from(&text)), want, "{name}");
            seen += 1;
        }
        assert!(seen >= 10, "only {seen} files");
    }

    /// Segments that somebody who wants to look like a pod would use, in any order.
    fn convincing() -> impl Strategy<Value = String> {
        let known = select(vec![
            "kubepods",
            "kubepods.slice",
            "kubelet",
            "kubelet.slice",
            "kubelet-kubepods.slice",
            "burstable",
            "besteffort",
            "kubepods-burstable.slice",
            "kubelet-kubepods-burstable.slice",
            "pod{u}",
            "pod{u_}",
            "kubepods-pod{u_}.slice",
            "kubepods-burstable-pod{u_}.slice",
            "kubelet-kubepods-pod{u_}.slice",
            "kubepods-pod{u_}.slice:cri-containerd:{c}",
            "docker",
            "{c}",
            "docker-{c}.scope",
            "libpod-{c}.scope",
            "container",
            "system.slice",
            "containerd.service",
            "machine.slice",
            "user.slice",
            "pod{o}",
            "kubepods-pod{o_}.slice",
        ]);
        prop_oneof![8 => known.prop_map(written), 1 => "[a-z0-9._:@ -]{1,20}"]
    }

    fn path(segments: &[String]) -> String {
        segments.iter().map(|segment| format!("/{segment}")).collect()
    }

    /// Where a user, or a service that runs as one, may have been given a cgroup; none is a kubelet's or a runtime's.
    fn delegated() -> impl Strategy<Value = String> {
        let tops = vec![
            "/user.slice",
            "/user.slice/user-1000.slice/user@1000.service",
            "/system.slice/app.service",
            "/system.slice/system-app.slice/app@1.service",
            "/machine.slice/machine-web.scope",
            "/lxc.payload.web",
            "/lxc/web",
            "/init.scope",
            "/app",
        ];
        select(tops).prop_map(str::to_owned)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_path_that_a_user_invents_names_a_pod(
            ups in 0usize..5,
            top in delegated(),
            invented in proptest::collection::vec(convincing(), 0..8),
        ) {
            let line = format!("0::{}{top}{}\n", "/..".repeat(ups), path(&invented));
            prop_assert_eq!(of(&line, &beside("0::/docker/{c}/system.slice/agent.service")), None, "{}", line);
        }

        #[test]
        fn what_a_user_makes_adds_nothing(
            before in proptest::collection::vec(convincing(), 0..6),
            after in proptest::collection::vec(convincing(), 0..6),
        ) {
            let root = beside("0::/docker/{c}/system.slice/agent.service");
            let delegated = format!("0::{}/user.slice", path(&before));
            let invented = format!("{delegated}{}", path(&after));
            prop_assert_eq!(of(&invented, &root), of(&delegated, &root), "{}", invented);
        }

        #[test]
        fn a_pod_cannot_become_another(
            shape in select(vec![
                "/kubepods/pod{u}",
                "/kubepods/burstable/pod{u}",
                "/kubepods.slice/kubepods-pod{u_}.slice",
                "/docker/{d}/kubelet/kubepods/pod{u}",
                "/../../pod{u}",
                "/../../kubepods-burstable-pod{u_}.slice",
                "/kubepods-pod{u_}.slice:cri-containerd:{d}",
            ]),
            invented in proptest::collection::vec(convincing(), 0..8),
        ) {
            let line = format!("0::{shape}{}", path(&invented));
            prop_assert_eq!(of(&line, &beside(&format!("0::{shape}"))), Some(UID), "{}", line);
        }

        #[test]
        fn two_answers_are_none(uids: [PodUid; 2]) {
            let [a, b] = uids.map(|uid| CallerKey::Pod(uid).to_string().replace("pod:", "/kubepods/pod"));
            let text = format!("2:cpu:{a}/{C}\n1:cpuset:{b}/{C}\n");
            let want = (uids[0] == uids[1]).then_some(uids[0]);
            prop_assert_eq!(of(&text, &KubeletRoot::default()), want);
            let alone = format!("0::{a}/{C}\n");
            prop_assert_eq!(of(&alone, &KubeletRoot::default()), Some(uids[0]));
        }

        #[test]
        fn any_bytes_are_survived(text: Vec<u8>, lines in proptest::collection::vec("[0-9]{0,2}:[a-z]{0,3}:[ -~]{0,60}", 0..4)) {
            let root = KubeletRoot::default();
            prop_assert_eq!(pod_uid(&text, &root).is_some(), find(&text, &root).is_some());
            prop_assert_eq!(of(&lines.join("\n"), &root), None);
        }
    }
}
