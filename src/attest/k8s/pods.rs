//! The node's pods, as the kubelet lists them.
//!
//! Not trusted: the length of anything. The text is read as it comes and never kept; what is not asked for is passed
//! over. A pod with something larger than any of Kubernetes' own rules allow stays in the list, so that its callers hear
//! why they are nobody, and the others do not suffer.

use std::{fmt, io, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::{
    limits::CallerKey,
    peer::pod::{ContainerId, PodUid},
};

/// Pods of one list. A node has 110 by default, and some hundreds at most.
pub const MOST_PODS: usize = 2048;
/// A longer name, label or image makes a pod one that cannot be told, in bytes. Kubernetes allows 317 for a label's key.
pub(super) const LONGEST: usize = 1024;
/// Owners, or containers of a kind, of one pod.
const MOST_OF_POD: usize = 256;
/// Labels of one.
pub(super) const MOST_LABELS: usize = 1024;
/// What is kept of one pod, in bytes. Of a usual one it is a kilobyte.
const LARGEST_POD: usize = 128 * 1024;
/// What is kept of all pods, in bytes. Of 500 usual ones it is half a megabyte.
pub(super) const MOST_KEPT: usize = 8 * 1024 * 1024;

/// The pods of a node.
#[derive(Debug, Default)]
pub struct PodList {
    pods: Vec<ListedPod>,
    /// In bytes.
    size: usize,
}

/// A pod, as far as selectors are made of it.
#[derive(Debug)]
pub struct ListedPod {
    id: PodUid,
    pub(super) uid: Box<str>,
    pub(super) name: Box<str>,
    pub(super) namespace: Box<str>,
    pub(super) service_account: Box<str>,
    pub(super) node: Box<str>,
    pub(super) labels: Box<[(Box<str>, Box<str>)]>,
    pub(super) owners: Box<[PodOwner]>,
    pub(super) containers: Box<[PodContainer]>,
    pub(super) init_containers: Box<[PodContainer]>,
    ephemeral_containers: Box<[PodContainer]>,
    /// What is larger than it may be.
    excess: Option<PodExcess>,
}

/// Who made a pod.
#[derive(Debug)]
pub struct PodOwner {
    pub(super) kind: Box<str>,
    pub(super) name: Box<str>,
    pub(super) uid: Box<str>,
}

/// A container, by its status.
#[derive(Debug)]
pub struct PodContainer {
    /// `None` for one that does not run yet.
    id: Option<ContainerId>,
    pub(super) name: Box<str>,
    pub(super) image: Box<str>,
    pub(super) image_id: Box<str>,
}

/// A pod, and the container of it that was looked for, if it is listed.
#[derive(Clone, Copy, Debug)]
pub struct FoundContainer<'a> {
    pub(super) pod: &'a ListedPod,
    pub(super) container: Option<&'a PodContainer>,
}

impl FoundContainer<'_> {
    /// Whether the container is listed, and not its pod alone.
    pub fn is_listed(&self) -> bool {
        self.container.is_some()
    }
}

/// What is larger than it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodExcess {
    /// A name, label or image.
    Text,
    /// Labels.
    Labels,
    /// Owners or containers.
    Number,
    /// All of it.
    Pod,
    /// All of all pods, of which this one has most.
    List,
}

impl fmt::Display for PodExcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text => write!(f, "a name, label or image of more than {LONGEST} bytes"),
            Self::Labels => write!(f, "more than {MOST_LABELS} labels"),
            Self::Number => write!(f, "more than {MOST_OF_POD} owners or containers"),
            Self::Pod => write!(f, "names, labels and images of more than {LARGEST_POD} bytes"),
            Self::List => write!(
                f,
                "more names, labels and images than others, and those of all pods are more than {MOST_KEPT} bytes"
            ),
        }
    }
}

/// Why a place in the list is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmbiguousPlace {
    /// The kubelet lists the container in two pods, or twice in one.
    #[error("the kubelet lists container {0} twice")]
    Container(ContainerId),
    /// The kubelet lists the pod twice.
    #[error("the kubelet lists two pods of UID {0}")]
    Pod(CallerKey),
    /// The kubelet lists the container in another pod than the kernel has it in.
    #[error("the kubelet lists container {container} in another pod than {pod}, where its cgroup is")]
    OtherPod { container: ContainerId, pod: CallerKey },
}

impl PodList {
    /// Reads a list as it comes.
    ///
    /// # Errors
    /// It is not one, or larger than is read; or it could not be read.
    pub fn read(reader: impl io::Read) -> Result<Self, serde_json::Error> {
        let mut json = serde_json::Deserializer::from_reader(reader);
        let RawList { kind, items } = RawList::deserialize(&mut json)?;
        json.end()?;
        if kind != "PodList" {
            return Err(serde_json::Error::custom("it is no PodList"));
        }
        Ok(items.unwrap_or_default())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pods.len()
    }

    /// Its size in memory, in bytes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }

    /// Lets go of the largest, until as much is kept as may be: whoever makes pods on a node must not keep the others from
    /// being told. Returns whether that was enough.
    fn make_room(&mut self) -> bool {
        let mut by_size: Vec<(usize, &mut ListedPod)> =
            self.pods.iter_mut().filter(|pod| pod.excess.is_none()).map(|pod| (pod.size(), pod)).collect();
        by_size.sort_unstable_by_key(|(size, _)| *size);
        // Well below, so that it is not done for each pod that follows.
        while self.size > MOST_KEPT / 4 * 3
            && let Some((size, largest)) = by_size.pop()
        {
            largest.shed(PodExcess::List);
            self.size -= size.saturating_sub(largest.size());
        }
        self.size <= MOST_KEPT
    }

    /// A pod of another node than this one is of, if there is one.
    pub(super) fn of_another_node(&self, pod: &ListedPod) -> Option<&ListedPod> {
        self.pods.iter().find(|other| !other.node.is_empty() && !other.node.eq_ignore_ascii_case(&pod.node))
    }

    /// The pod of `place`, and its container if it is listed. `None` when the pod is not.
    ///
    /// # Errors
    /// [`AmbiguousPlace`]: it could be another's.
    pub fn find(&self, pod: PodUid, id: ContainerId) -> Result<Option<FoundContainer<'_>>, AmbiguousPlace> {
        let mut found: Option<FoundContainer<'_>> = None;
        let mut elsewhere = false;
        let mut twice = false;
        for listed in &self.pods {
            let mut here = listed.all_containers().filter(|container| container.id == Some(id));
            let container = here.next();
            twice |= here.next().is_some();
            if listed.id != pod {
                elsewhere |= container.is_some();
            } else if found.replace(FoundContainer { pod: listed, container }).is_some() {
                return Err(AmbiguousPlace::Pod(CallerKey::Pod(pod)));
            }
        }
        let is_here = found.is_some_and(|found| found.container.is_some());
        if twice || elsewhere && is_here {
            return Err(AmbiguousPlace::Container(id));
        }
        if elsewhere {
            return Err(AmbiguousPlace::OtherPod { container: id, pod: CallerKey::Pod(pod) });
        }
        Ok(found)
    }
}

impl ListedPod {
    /// As whom its callers are charged.
    pub(super) fn key(&self) -> CallerKey {
        CallerKey::Pod(self.id)
    }

    /// What of it is larger than it may be: nothing can be told of its callers then.
    pub fn excess(&self) -> Option<PodExcess> {
        self.excess
    }

    /// Lets go of what is too large: of its callers nothing is told but that. Where its containers are stays known, so that
    /// nobody else is taken for them.
    fn shed(&mut self, excess: PodExcess) {
        self.excess = Some(excess);
        (self.labels, self.owners) = Default::default();
        let kinds = [&mut self.containers, &mut self.init_containers, &mut self.ephemeral_containers];
        for container in kinds.into_iter().flatten() {
            (container.name, container.image, container.image_id) = Default::default();
        }
    }

    fn all_containers(&self) -> impl Iterator<Item = &PodContainer> {
        self.containers.iter().chain(&self.init_containers).chain(&self.ephemeral_containers)
    }

    /// Its size in memory, in bytes.
    fn size(&self) -> usize {
        let texts = [&self.uid, &self.name, &self.namespace, &self.service_account, &self.node];
        let labels = self.labels.iter().flat_map(|(key, value)| [key, value]);
        let owners = self.owners.iter().flat_map(|owner| [&owner.kind, &owner.name, &owner.uid]);
        let containers = self.all_containers().flat_map(|it| [&it.name, &it.image, &it.image_id]);
        let texts = texts.into_iter().chain(labels).chain(owners).chain(containers);
        let parts = size_of_val(&*self.labels) + size_of_val(&*self.owners);
        let containers = self.all_containers().count() * size_of::<PodContainer>();
        size_of::<Self>() + parts + containers + texts.map(|text| text.len()).sum::<usize>()
    }
}

// ---- as it is written ------------------------------------------------------------------------------------------

/// A text that is short enough; `None` for one that is not.
pub(super) struct ShortText(Option<Box<str>>);

impl Default for ShortText {
    fn default() -> Self {
        Self(Some("".into()))
    }
}

impl<'de> Deserialize<'de> for ShortText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsText;

        impl Visitor<'_> for AsText {
            type Value = ShortText;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ShortText, E> {
                Ok(ShortText((text.len() <= LONGEST).then(|| text.into())))
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<ShortText, E> {
                Ok(ShortText::default())
            }
        }

        deserializer.deserialize_any(AsText)
    }
}

/// As many things of a pod as are looked at, and whether there are more.
struct Several<T> {
    all: Vec<T>,
    more: bool,
}

impl<T> Default for Several<T> {
    fn default() -> Self {
        Self { all: Vec::new(), more: false }
    }
}

struct AsSeveral<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for AsSeveral<T> {
    type Value = Several<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Several<T>, E> {
        Ok(Several::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Several<T>, A::Error> {
        let mut several = Several::default();
        while several.all.len() < MOST_OF_POD {
            match list.next_element()? {
                Some(item) => several.all.push(item),
                None => return Ok(several),
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {
            several.more = true;
        }
        Ok(several)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Several<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AsSeveral(PhantomData))
    }
}

/// Labels: pairs of texts.
#[derive(Default)]
pub(super) struct RawLabels(Several<(ShortText, ShortText)>);

impl<'de> Deserialize<'de> for RawLabels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsLabels;

        impl<'de> Visitor<'de> for AsLabels {
            type Value = RawLabels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_unit<E: serde::de::Error>(self) -> Result<RawLabels, E> {
                Ok(RawLabels::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawLabels, A::Error> {
                let mut labels = RawLabels::default();
                while labels.0.all.len() < MOST_LABELS {
                    match map.next_entry()? {
                        Some(label) => labels.0.all.push(label),
                        None => return Ok(labels),
                    }
                }
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    labels.0.more = true;
                }
                Ok(labels)
            }
        }

        deserializer.deserialize_any(AsLabels)
    }
}

#[derive(Deserialize)]
struct RawList {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    items: Option<PodList>,
}

impl<'de> Deserialize<'de> for PodList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AsPods;

        impl<'de> Visitor<'de> for AsPods {
            type Value = PodList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of pods")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<PodList, A::Error> {
                let mut pods = PodList::default();
                while let Some(raw) = list.next_element::<RawPod>()? {
                    let Some(pod) = raw.pod() else { continue };
                    if pods.pods.len() >= MOST_PODS {
                        return Err(A::Error::custom(format!("it has more than {MOST_PODS} pods")));
                    }
                    pods.size += pod.size();
                    pods.pods.push(pod);
                    if pods.size > MOST_KEPT && !pods.make_room() {
                        let message = format!("its names, labels and images are more than {MOST_KEPT} bytes");
                        return Err(A::Error::custom(message));
                    }
                }
                pods.pods.shrink_to_fit();
                Ok(pods)
            }
        }

        deserializer.deserialize_seq(AsPods)
    }
}

#[derive(Deserialize)]
struct RawPod {
    #[serde(default)]
    metadata: RawMetadata,
    #[serde(default)]
    spec: RawSpec,
    #[serde(default)]
    status: RawStatus,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawMetadata {
    name: ShortText,
    namespace: ShortText,
    uid: ShortText,
    labels: RawLabels,
    owner_references: Several<RawOwner>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawSpec {
    service_account_name: ShortText,
    node_name: ShortText,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawStatus {
    container_statuses: Several<RawContainer>,
    init_container_statuses: Several<RawContainer>,
    ephemeral_container_statuses: Several<RawContainer>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawOwner {
    kind: ShortText,
    name: ShortText,
    uid: ShortText,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct RawContainer {
    name: ShortText,
    image: ShortText,
    #[serde(rename = "imageID")]
    image_id: ShortText,
    #[serde(rename = "containerID")]
    container_id: ShortText,
}

/// Takes texts and lists, and notes what is too large.
#[derive(Default)]
pub(super) struct Excess(pub(super) Option<PodExcess>);

impl Excess {
    /// A text; an absent one is empty.
    pub(super) fn text(&mut self, text: ShortText) -> Box<str> {
        text.0.unwrap_or_else(|| {
            self.0 = Some(PodExcess::Text);
            "".into()
        })
    }

    fn all<T, U>(
        &mut self,
        several: Several<T>,
        excess: PodExcess,
        mut take: impl FnMut(&mut Self, T) -> U,
    ) -> Box<[U]> {
        if several.more {
            self.0 = Some(excess);
        }
        several.all.into_iter().map(|item| take(self, item)).collect()
    }

    /// Labels, with their texts.
    pub(super) fn labels(&mut self, labels: RawLabels) -> Box<[(Box<str>, Box<str>)]> {
        self.all(labels.0, PodExcess::Labels, |excess, (key, value)| (excess.text(key), excess.text(value)))
    }

    fn containers(&mut self, containers: Several<RawContainer>) -> Box<[PodContainer]> {
        self.all(containers, PodExcess::Number, |excess, raw| {
            // As `containerd://ID`.
            let id = excess.text(raw.container_id);
            let id = id.split_once("://").map_or(&*id, |(_runtime, id)| id);
            PodContainer {
                id: ContainerId::parse(id.as_bytes()),
                name: excess.text(raw.name),
                image: excess.text(raw.image),
                image_id: excess.text(raw.image_id),
            }
        })
    }
}

impl RawPod {
    /// `None` where it has no UID that a cgroup could name.
    fn pod(self) -> Option<ListedPod> {
        let Self { metadata, spec, status } = self;
        let mut excess = Excess::default();
        let uid = excess.text(metadata.uid);
        let Some(CallerKey::Pod(id)) = CallerKey::parse_pod(&uid) else { return None };
        let mut pod = ListedPod {
            id,
            uid,
            name: excess.text(metadata.name),
            namespace: excess.text(metadata.namespace),
            service_account: excess.text(spec.service_account_name),
            node: excess.text(spec.node_name),
            labels: excess.labels(metadata.labels),
            owners: excess.all(metadata.owner_references, PodExcess::Number, |excess, raw| PodOwner {
                kind: excess.text(raw.kind),
                name: excess.text(raw.name),
                uid: excess.text(raw.uid),
            }),
            containers: excess.containers(status.container_statuses),
            init_containers: excess.containers(status.init_container_statuses),
            ephemeral_containers: excess.containers(status.ephemeral_container_statuses),
            excess: None,
        };
        if let Some(excess) = excess.0.or_else(|| (pod.size() > LARGEST_POD).then_some(PodExcess::Pod)) {
            pod.shed(excess);
        }
        Some(pod)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const U: &str = "2c48913c-b29f-11e7-9350-020968147796";
    const V: &str = "11111111-2222-3333-4444-555555555555";
    const C: &str = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961";
    const D: &str = "93529524695bb00d91c1f6dba692ea8d3550c3b94fb2463af7bc9ec82f992d26";

    fn uid(text: &str) -> PodUid {
        let Some(CallerKey::Pod(uid)) = CallerKey::parse_pod(text) else { panic!("{text}") };
        uid
    }

    fn id(text: &str) -> ContainerId {
        ContainerId::parse(text.as_bytes()).unwrap()
    }

    /// A pod as the kubelet writes it, with one container.
    fn pod(uid: &str, container: &str) -> Value {
        json!({
            "metadata": {"name": "web-1", "namespace": "shop", "uid": uid, "labels": {"app": "web"},
                "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "o", "controller": true}],
                "annotations": {"kubernetes.io/config.source": "api"}},
            "spec": {"serviceAccountName": "default", "nodeName": "node1", "containers": [{"name": "c", "env": [{"name": "A", "value": "[{\"\\"}]}]},
            "status": {"phase": "Running", "containerStatuses": [{"name": "c", "containerID": format!("containerd://{container}"),
                "image": "registry/web:1", "imageID": "registry/web@sha256:1", "ready": true}]}
        })
    }

    fn list(pods: &[Value]) -> String {
        json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods}).to_string()
    }

    fn read(text: &str) -> Result<PodList, String> {
        PodList::read(text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_pod_is_read_as_far_as_it_is_asked_for() {
        let mut all = pod(U, C);
        all["status"]["initContainerStatuses"] =
            json!([{"name": "i", "containerID": format!("cri-o://{D}")}]);
        all["status"]["ephemeralContainerStatuses"] =
            json!([{"name": "e", "containerID": format!("docker://{}", "0".repeat(64))}]);
        let pods = read(&list(&[all, pod(V, &"1".repeat(64))])).unwrap();
        assert_eq!(pods.len(), 2);
        for (container, name) in [(C, "c"), (D, "i"), (&*"0".repeat(64), "e")] {
            let found = pods.find(uid(U), id(container)).unwrap().unwrap();
            assert_eq!(&*found.container.unwrap().name, name);
            assert_eq!((&*found.pod.namespace, &*found.pod.service_account), ("shop", "default"));
            assert_eq!((&*found.pod.name, &*found.pod.uid, &*found.pod.node), ("web-1", U, "node1"));
            assert_eq!(*found.pod.labels, [("app".into(), "web".into())]);
            assert_eq!((&*found.pod.owners[0].kind, &*found.pod.owners[0].name), ("ReplicaSet", "web"));
            assert_eq!(found.pod.excess(), None);
        }
        assert!(
            pods.find(uid(V), id(&"2".repeat(64))).unwrap().unwrap().container.is_none(),
            "not listed yet"
        );
        assert!(
            pods.find(uid("00000000-0000-0000-0000-000000000000"), id(&"2".repeat(64))).unwrap().is_none()
        );
    }

    #[test]
    fn a_static_pod_has_the_hash_of_its_configuration() {
        let pods = read(&list(&[pod(&U.replace('-', ""), C)])).unwrap();
        assert!(pods.find(uid(U), id(C)).unwrap().is_some());
    }

    #[test]
    fn what_could_be_anothers_is_nobodys() {
        let mut twice = pod(U, C);
        twice["status"]["initContainerStatuses"] = twice["status"]["containerStatuses"].clone();
        for (case, pods, want) in [
            ("two pods of one container", vec![pod(U, C), pod(V, C)], AmbiguousPlace::Container(id(C))),
            ("one container twice", vec![twice], AmbiguousPlace::Container(id(C))),
            ("two pods of one UID", vec![pod(U, C), pod(U, D)], AmbiguousPlace::Pod(CallerKey::Pod(uid(U)))),
            (
                "another pod's",
                vec![pod(U, D), pod(V, C)],
                AmbiguousPlace::OtherPod { container: id(C), pod: CallerKey::Pod(uid(U)) },
            ),
            (
                "another pod's, and ours is not listed",
                vec![pod(V, C)],
                AmbiguousPlace::OtherPod { container: id(C), pod: CallerKey::Pod(uid(U)) },
            ),
        ] {
            let pods = read(&list(&pods)).unwrap();
            assert_eq!(pods.find(uid(U), id(C)).map(|found| found.is_some()), Err(want), "{case}");
        }
    }

    #[test]
    fn a_pod_that_is_too_large_is_told_and_the_others_are_read() {
        let huge = "x".repeat(1024 * 1024);
        let many: serde_json::Map<String, Value> =
            (0..=MOST_LABELS).map(|n| (n.to_string(), json!(""))).collect();
        let full: serde_json::Map<String, Value> =
            (0..MOST_LABELS).map(|n| (n.to_string(), json!(""))).collect();
        let heavy: serde_json::Map<String, Value> =
            (0..MOST_LABELS).map(|n| (format!("{n:0>100}"), json!("x".repeat(63)))).collect();
        let owners = vec![json!({"kind": "Job", "name": "job", "uid": "uid"}); MOST_OF_POD + 1];
        let changed = |at: &str, to: Value| {
            let mut changed = pod(U, C);
            *changed.pointer_mut(at).unwrap() = to;
            changed
        };
        for (case, pod_, want) in [
            ("a label", changed("/metadata/labels", json!({"app": huge})), Some(PodExcess::Text)),
            ("a label's key", changed("/metadata/labels", json!({&huge: ""})), Some(PodExcess::Text)),
            ("an image", changed("/status/containerStatuses/0/image", json!(huge)), Some(PodExcess::Text)),
            ("a name", changed("/metadata/name", json!("x".repeat(LONGEST + 1))), Some(PodExcess::Text)),
            ("as long as may be", changed("/metadata/name", json!("x".repeat(LONGEST))), None),
            ("labels", changed("/metadata/labels", json!(many)), Some(PodExcess::Labels)),
            ("owners", changed("/metadata/ownerReferences", json!(owners)), Some(PodExcess::Number)),
            ("all of it", changed("/metadata/labels", json!(heavy)), Some(PodExcess::Pod)),
            ("as many as may be", changed("/metadata/labels", json!(full)), None),
            ("an annotation", changed("/metadata/annotations", json!({"a": huge})), None),
            ("nulls", changed("/metadata/labels", Value::Null), None),
        ] {
            let pods = read(&list(&[pod_, pod(V, D)])).unwrap();
            let found = pods.find(uid(U), id(C)).unwrap().unwrap();
            assert_eq!(found.pod.excess(), want, "{case}");
            assert_eq!(
                pods.find(uid(V), id(D)).unwrap().unwrap().pod.excess(),
                None,
                "{case}: the other one"
            );
        }
    }

    #[test]
    fn what_is_no_list_is_an_error() {
        let many: Vec<Value> =
            (0..=MOST_PODS).map(|n| pod(&format!("00000000-0000-0000-0000-{n:012}"), D)).collect();
        for (case, text, want) in [
            ("nothing", String::new(), "EOF"),
            ("HTML", "<html>".to_owned(), "expected value"),
            ("another kind", json!({"kind": "Status", "items": []}).to_string(), "it is no PodList"),
            ("an empty object", "{}".to_owned(), "it is no PodList"),
            ("cut", list(&[pod(U, C)]).chars().take(200).collect(), "EOF"),
            ("more after it", format!("{}{{}}", list(&[])), "trailing"),
            ("a list of numbers", r#"{"kind":"PodList","items":[1]}"#.to_owned(), "invalid type"),
            ("no list", r#"{"kind":"PodList","items":{}}"#.to_owned(), "invalid type"),
            ("too many pods", list(&many), "more than 2048 pods"),
        ] {
            let got = read(&text).unwrap_err();
            assert!(got.contains(want), "{case}: {got}");
        }
        for text in [r#"{"kind":"PodList","items":null}"#, r#"{"kind":"PodList"}"#] {
            assert_eq!(read(text).unwrap().len(), 0, "{text}");
        }
        let nobody = r#"{"kind":"PodList","items":[{},{"metadata":{"uid":"own"}}]}"#;
        assert!(read(nobody).is_ok_and(|pods| pods.is_empty()), "pods that no cgroup could name");
    }

    #[test]
    fn the_pods_of_a_usual_node_are_small() {
        for (pods, most) in [(250, 1024 * 1024), (500, 4 * 1024 * 1024)] {
            let usual = |n: usize| {
                let mut usual = pod(&format!("00000000-0000-0000-0000-{n:012}"), &format!("{n:064}"));
                usual["metadata"]["labels"] = (0..8)
                    .map(|n| (format!("app.kubernetes.io/label-{n}"), json!("a value of some length")))
                    .collect::<serde_json::Map<_, _>>()
                    .into();
                usual["metadata"]["annotations"] = json!({"last-applied": "x".repeat(4096)});
                let status = usual["status"]["containerStatuses"][0].clone();
                usual["status"]["initContainerStatuses"] = json!([status]);
                usual["status"]["initContainerStatuses"][0]["containerID"] = json!("");
                usual
            };
            let text = list(&(0..pods).map(usual).collect::<Vec<_>>());
            let read = read(&text).unwrap();
            assert_eq!(read.len(), pods);
            assert!(read.size() < most, "{pods} pods of {} bytes take {}", text.len(), read.size());
        }
    }

    /// A pod of a size between a quarter and all of what one may have.
    fn large(n: usize, labels: usize) -> Value {
        let labels: serde_json::Map<String, Value> =
            (0..labels).map(|n| (format!("{n:0>1024}"), json!("v".repeat(LONGEST)))).collect();
        let mut large = pod(&format!("00000000-0000-0000-0000-{n:012}"), &format!("{n:064}"));
        large["metadata"]["labels"] = json!(labels);
        large
    }

    #[test]
    fn large_pods_keep_no_other_from_being_told() {
        // One pod's user has others made that are as large as they may be.
        let mut pods: Vec<Value> = (0..80).map(|n| large(n, 60)).collect();
        pods.insert(20, pod(U, C));
        pods.extend((80..100).map(|n| large(n, 20)));
        pods.push(pod(V, D));
        let read = read(&list(&pods)).unwrap();
        assert_eq!(read.len(), pods.len());
        assert!(read.size() <= MOST_KEPT, "{}", read.size());
        let kept: usize = read.pods.iter().map(ListedPod::size).sum();
        assert_eq!(read.size(), kept);
        for (pod_, container) in [(U, C), (V, D)] {
            assert_eq!(read.find(uid(pod_), id(container)).unwrap().unwrap().pod.excess(), None, "{pod_}");
        }
        let of = |n: usize| {
            let pod = uid(&format!("00000000-0000-0000-0000-{n:012}"));
            read.find(pod, id(&format!("{n:064}"))).unwrap().unwrap()
        };
        let shed = |n: &usize| of(*n).pod.excess() == Some(PodExcess::List);
        assert!((0..80).any(|n| shed(&n)), "the largest are let go of");
        assert_eq!((80..100).find(shed), None, "and no others");
        assert!((0..100).all(|n| of(n).is_listed()), "whose a container is stays known");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let full = |n: usize| {
            let mut full = pod(&format!("00000000-0000-0000-0000-{n:012}"), D);
            let one = full["status"]["containerStatuses"][0].clone();
            let all: Vec<Value> = (0..MOST_OF_POD).map(|_| one.clone()).collect();
            full["status"] = json!({"containerStatuses": all, "initContainerStatuses": all});
            full
        };
        let got = read(&list(&(0..500).map(full).collect::<Vec<_>>())).unwrap_err();
        assert!(got.contains("more than 8388608 bytes"), "{got}");
    }

    proptest! {
        /// Whatever the kubelet sends, it is a list or an error.
        #[test]
        fn no_text_is_a_panic(text in "[\\[\\]{}\",:a-z0-9 \\\\]{0,200}") {
            drop(read(&text));
            drop(read(&format!(r#"{{"kind":"PodList","items":[{{"metadata":{text}}}]}}"#)));
        }

        /// A container is found in the pod that lists it, and in no other.
        #[test]
        fn every_container_is_found_in_its_own_pod(
            pods in proptest::collection::btree_map(0..1000_u32, 0..1000_u32, 1..20),
            asked in (0..1000_u32, 0..1000_u32),
        ) {
            let named = |n: u32| format!("00000000-0000-0000-0000-{n:012}");
            let contained = |n: u32| format!("{n:064}");
            let all: Vec<Value> = pods.iter().map(|(pod_, container)| pod(&named(*pod_), &contained(*container))).collect();
            let listed = read(&list(&all)).unwrap();
            let times = |container: u32| pods.values().filter(|it| **it == container).count();
            for (pod_, container) in &pods {
                let found = listed.find(uid(&named(*pod_)), id(&contained(*container)));
                prop_assert_eq!(found.is_ok(), times(*container) == 1);
            }
            let found = listed.find(uid(&named(asked.0)), id(&contained(asked.1)));
            let is_there = found.is_ok_and(|found| found.is_some_and(|found| found.container.is_some()));
            prop_assert_eq!(is_there, pods.get(&asked.0) == Some(&asked.1) && times(asked.1) == 1);
        }
    }
}
