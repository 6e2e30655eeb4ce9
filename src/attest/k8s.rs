//! The `k8s` attestor: a process's pod and container, as the kubelet of the node lists them.
//!
//! Trusted: the place that the kernel says the process is in, where only the kubelet and the container runtime put
//! anybody ([`cgroup`](crate::peer::cgroup)); it was read once, when the process connected, and is whom its calls are
//! charged to. And what the kubelet says, once its certificate was verified. Not trusted: that it answers, soon or briefly.
//!
//! A process that is in no pod has no such selector, and the kubelet is not asked for it; nor is it where no entry asks for
//! one. Where one does, it is asked once ahead of all callers, so that a kubelet that says nothing is known. What cannot be told stays untold: a call is `Unavailable` for it where an entry may be its caller's, and never
//! answered with less.
//!
//! # Decisions
//! SPIRE asks the kubelet twice a second while anybody calls. Here one answer serves all callers for ten seconds, as what is
//! listed of a container that runs is what it was made with; only a container that is not listed yet has the kubelet asked
//! anew ([`asker`]). SPIRE does not find ephemeral containers (`kubectl debug`); they are containers of their pod here.

mod asker;
mod body;
mod client;
mod fault;
mod material;
mod metrics;
mod namespaces;
pub mod pods;
mod rhythm;
mod settings;
mod view;

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use ahash::RandomState;
use tokio::time::Instant;

use self::{
    asker::{Asker, Unfound},
    namespaces::{ListedNamespace, NamespaceQuestion},
    pods::{FoundContainer, PodContainer, PodExcess, PodOwner},
    settings::{NO_API_SERVER, is_of_node, names_node},
    view::{PodView, PodsQuestion},
};
pub use self::{
    body::BodyExcess,
    fault::{KubernetesFault, KubernetesService, ServiceAddress},
    material::{MaterialFault, NamedFile},
    pods::AmbiguousPlace,
    settings::K8sSettings,
};
use super::{
    AttestFault, Blame, Questions,
    attestors::{Findings, News, Outage, Untold, WorkloadAttestor, no_such_kind},
    process::{Extent, Seen},
};
use crate::{
    hcl::section::Section,
    identity::{
        Entry,
        selector::{Selector, Selectors},
    },
    limits::CallerKey,
    peer::pod::{ContainerId, PodPlace, PodUid},
    telemetry::registry::Registry,
};

/// Its name, which is the type of its selectors.
const NAME: &str = "k8s";

/// What its selectors are of, in the order that messages name them.
const KINDS: [&str; 15] = [
    "ns",
    NS_LABEL,
    "sa",
    "pod-label",
    "pod-name",
    "pod-uid",
    "pod-owner",
    "pod-owner-uid",
    "pod-image",
    "pod-image-count",
    "pod-init-image",
    "pod-init-image-count",
    "container-name",
    "container-image",
    "node-name",
];

/// The one that the API server tells.
const NS_LABEL: &str = "ns-label";

/// Kinds of spire-agent's that are not attested.
const ABSENT_KINDS: [&str; 9] = [
    "image-signature",
    "image-attestations",
    "image-signature-subject",
    "image-signature-issuer",
    "image-signature-value",
    "image-signature-log-id",
    "image-signature-log-index",
    "image-signature-integrated-time",
    "image-signature-signed-entry-timestamp",
];

/// How long people are kept waiting for a container that is not listed.
const PATIENCE_OF_PEOPLE: Duration = Duration::from_secs(2);

/// Why it could not find out who a process is.
#[derive(Clone, Debug, thiserror::Error)]
pub enum K8sError {
    /// The kubelet or the API server could not be asked.
    #[error(transparent)]
    Kubelet(Arc<KubernetesFault>),
    /// The settings say that it is not asked.
    #[error("kubelet client is disabled (disable_kubelet_client), so callers in pods cannot be identified")]
    NoClient,
    /// Nobody says where the API server is.
    #[error("{NO_API_SERVER}")]
    NoApiServer,
    /// It has not answered.
    #[error("the API server has not said which labels namespace {namespace:?} has for {:.1} s", waited.as_secs_f32())]
    SilentApiServer { namespace: Box<str>, waited: Duration },
    /// The namespace is like none that Kubernetes lets be made.
    #[error("namespace {namespace:?} has {excess}, so its labels are not known")]
    LargeNamespace { namespace: Box<str>, excess: PodExcess },
    /// The kubelet has not answered.
    #[error("the kubelet has not said which pods there are for {:.1} s", waited.as_secs_f32())]
    Silent { waited: Duration },
    /// The same, and what is known of that already.
    #[error("{0}")]
    Away(String),
    /// It does not list the container.
    #[error("the kubelet does not list container {container} of {pod} (waited for {:.1} s)", waited.as_secs_f32())]
    Unlisted { container: ContainerId, pod: CallerKey, waited: Duration },
    /// The list does not say whose the container is.
    #[error("{0}, so its owner is not known")]
    Ambiguous(AmbiguousPlace),
    /// The pod is one of another node's.
    #[error(
        "the kubelet that was asked for node {asked:?} lists {pod} for node {found:?}: set node_name to this node's"
    )]
    OtherNode { pod: CallerKey, found: String, asked: Arc<str> },
    /// The pods are those of two nodes, and nobody says which is this one.
    #[error(
        "the kubelet lists {pod} for node {found:?} and another pod for {other:?}: set node_name to this node's"
    )]
    TwoNodes { pod: CallerKey, found: String, other: String },
    /// The pod is like none that Kubernetes lets be made.
    #[error("{pod} has {excess}, so its selectors are not known")]
    Excess { pod: CallerKey, excess: String },
    /// As many callers wait for the kubelet as may at once, of this pod or of all.
    #[error("too many callers wait already until the kubelet lists their containers")]
    Crowded,
}

impl K8sError {
    /// Whose doing it is, and how it is counted.
    pub(super) fn class(&self) -> (Blame, AttestFault) {
        match self {
            Self::Kubelet(_)
            | Self::Silent { .. }
            | Self::Away(_)
            | Self::NoClient
            | Self::NoApiServer
            | Self::SilentApiServer { .. }
            | Self::LargeNamespace { .. }
            | Self::Excess { .. } => (Blame::Fault, AttestFault::Unreadable),
            Self::Unlisted { .. } => (Blame::Fault, AttestFault::Unlisted),
            Self::Ambiguous(_) | Self::OtherNode { .. } | Self::TwoNodes { .. } => {
                (Blame::Fault, AttestFault::Untrusted)
            }
            Self::Crowded => (Blame::Crowd, AttestFault::Busy),
        }
    }
}

/// What entries ask it for.
#[derive(Debug, Default)]
pub struct K8sQuestions {
    /// Whether any asks for anything.
    asks: bool,
    /// For each entry that asks for a label of a namespace, what else it asks for of this attestor, by the first of that.
    by_namespace: HashMap<Option<Selector>, Vec<Box<[Selector]>>, RandomState>,
}

impl K8sQuestions {
    /// Adds what an entry asks for.
    fn add(&mut self, entry: &Entry) {
        let mine = entry.selectors.iter().filter(|selector| selector.kind() == NAME);
        let is_label = |selector: &&Selector| selector.value().split(':').next() == Some(NS_LABEL);
        let (labels, others): (Vec<_>, Vec<_>) = mine.partition(is_label);
        self.asks |= !labels.is_empty() || !others.is_empty();
        if !labels.is_empty() {
            let mut others = others.into_iter().cloned();
            self.by_namespace.entry(others.next()).or_default().push(others.collect());
        }
    }

    /// Whether an entry may be a process's by the labels of its namespace, if this was found of its pod.
    fn ask_for_namespace(&self, found: &Selectors) -> bool {
        let keys = std::iter::once(None).chain(found.iter().cloned().map(Some));
        let mut asked = keys.filter_map(|key| self.by_namespace.get(&key)).flatten();
        !self.by_namespace.is_empty() && asked.any(|rest| rest.iter().all(|it| found.contains(it)))
    }
}

/// What it keeps between attestations.
#[derive(Default)]
pub(super) struct K8sAttestor {
    pods: Asker<PodsQuestion>,
    namespaces: Asker<NamespaceQuestion>,
    /// It attests.
    begun: AtomicBool,
}

/// What was found of a pod.
struct PodFindings {
    selectors: Selectors,
    namespace: Box<str>,
    /// When the kubelet was asked for it.
    asked: Instant,
}

impl WorkloadAttestor for K8sAttestor {
    const NAME: &'static str = NAME;
    const BY_DEFAULT: bool = false;
    type Settings = K8sSettings;
    type Error = K8sError;
    type Questions = K8sQuestions;

    fn new(_news: &News) -> Self {
        Self::default()
    }

    fn counted_by(&self, registry: Registry<'_>) {
        // Where no pod is looked for, its series would be of no use.
        if self.begun.load(Relaxed) {
            self.pods.counted_by(registry);
            self.namespaces.counted_by(registry);
        }
    }

    fn kept(&self) -> usize {
        self.pods.kept() + self.namespaces.kept()
    }

    fn missing(settings: &K8sSettings) -> Vec<String> {
        settings.missing()
    }

    fn troubles(&self) -> Vec<String> {
        [self.pods.trouble(), self.namespaces.trouble()].into_iter().flatten().collect()
    }

    fn ask_ahead(&self, questions: &K8sQuestions, tries: &News) {
        self.pods.ask_ahead(questions.asks.then_some(()), tries);
    }

    fn outage(&self, settings: &K8sSettings) -> Option<Outage> {
        if settings.disable_kubelet_client {
            return Some(Outage::Failing(K8sError::NoClient.to_string()));
        }
        self.pods.outage()
    }

    fn read(data: &mut Section<'_>) -> K8sSettings {
        K8sSettings::read_block(data)
    }

    fn check(value: &str, settings: &K8sSettings) -> Result<(), String> {
        let (kind, of) = value.split_once(':').unwrap_or((value, ""));
        if ABSENT_KINDS.contains(&kind) {
            return Err(format!("no attestor makes this selector: k8s:{kind} is not in this version"));
        }
        if !KINDS.contains(&kind) {
            return Err(no_such_kind(NAME, kind, &KINDS));
        }
        let parts = of.split(':').count();
        match kind {
            _ if of.is_empty() => Err(format!("must have a value, as k8s:{kind}:VALUE")),
            "pod-label" | NS_LABEL if parts < 2 => {
                Err(format!("must be a key and a value, as k8s:{kind}:app:web"))
            }
            NS_LABEL if !settings.enable_namespace_labels => {
                Err("k8s:ns-label needs enable_namespace_labels = true".to_owned())
            }
            "pod-owner" | "pod-owner-uid" if parts < 2 => {
                Err(format!("must be a kind and what it is, as k8s:{kind}:ReplicaSet:web-5d4f"))
            }
            "pod-image-count" | "pod-init-image-count" if !is_count(of) => {
                Err(format!("must be a number, as k8s:{kind}:2"))
            }
            "ns" | "sa" if of.contains(['/', ':']) => {
                Err(format!("must be one name, as k8s:ns:shop and k8s:sa:web, not {of:?}"))
            }
            "container-name" | "container-image" if settings.disable_container_selectors => {
                Err(format!("k8s:{kind} is not available with disable_container_selectors = true"))
            }
            _ if settings.disable_kubelet_client => {
                Err("no k8s selector is available with disable_kubelet_client = true".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn begin(&self, settings: &K8sSettings) {
        self.begun.store(true, Relaxed);
        if let Some(place) = settings.place() {
            self.pods.begin(place);
        }
        if let Some(place) = settings.api_server() {
            self.namespaces.begin(place);
        }
    }

    fn prepare_for(&self, entries: &[Arc<Entry>]) -> K8sQuestions {
        let mut questions = K8sQuestions::default();
        entries.iter().for_each(|entry| questions.add(entry));
        questions
    }

    fn absent(_questions: &K8sQuestions, _value: &str) -> Option<String> {
        None
    }

    fn untellable(_questions: &K8sQuestions, value: &str) -> Option<&'static str> {
        let word = value.split(':').next()?;
        KINDS.into_iter().find(|kind| *kind == word)
    }

    async fn attest(
        &self,
        settings: &K8sSettings,
        questions: &Questions,
        seen: &Seen<'_>,
    ) -> Result<Findings<K8sError>, K8sError> {
        let mut findings =
            Findings { selectors: Selectors::new(), evidence: None, untold: Vec::new(), age: None };
        let Some(PodPlace { pod, container: Some(container) }) = seen.process.place() else {
            return Ok(findings);
        };
        if seen.extent() == Extent::Asked && !questions.k8s.asks {
            return Ok(findings);
        }
        let began = Instant::now();
        match self.look(settings, seen, pod, container).await {
            Ok(PodFindings { selectors, namespace, asked }) => {
                // Whoever needs no label waits for none.
                let asks = seen.extent() == Extent::All || questions.k8s.ask_for_namespace(&selectors);
                findings.selectors = selectors;
                findings.age = Some(asked.elapsed());
                if settings.enable_namespace_labels && asks {
                    match self.look_at_namespace(settings, seen, pod, namespace, began).await {
                        Ok(mut labels) => findings.selectors.append(&mut labels),
                        Err(why) => findings.untold.push(Untold { word: NS_LABEL, why }),
                    }
                }
            }
            Err(why) => {
                let words = KINDS.into_iter();
                // Without the setting nobody has one.
                let words = words.filter(|word| *word != NS_LABEL || settings.enable_namespace_labels);
                findings.untold = words.map(|word| Untold { word, why: why.clone() }).collect();
            }
        }
        Ok(findings)
    }
}

fn is_count(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|number| number.to_string() == text)
}

impl K8sAttestor {
    /// How long the process may be kept waiting.
    fn patience(settings: &K8sSettings, seen: &Seen<'_>) -> Duration {
        match seen.extent() {
            Extent::All => settings.patience().min(PATIENCE_OF_PEOPLE),
            Extent::Asked => settings.patience().min(seen.process.patience()),
        }
    }

    /// The selectors of the namespace that a process of this pod is in, which waits since `began`.
    async fn look_at_namespace(
        &self,
        settings: &K8sSettings,
        seen: &Seen<'_>,
        pod: PodUid,
        namespace: Box<str>,
        began: Instant,
    ) -> Result<Selectors, K8sError> {
        if settings.api_server().is_none() {
            return Err(K8sError::NoApiServer);
        }
        let patience = Self::patience(settings, seen).saturating_sub(began.elapsed());
        let aside = || seen.process.stand_aside();
        let name: Arc<str> = Arc::from(&*namespace);
        let look = |found: &Arc<ListedNamespace>, _| Ok::<_, Infallible>(Some(Arc::clone(found)));
        let found = self.namespaces.find(&name, share_of(pod), patience, aside, look).await;
        let found = found.map_err(|why| match why {
            Ok(Unfound::Crowded) => K8sError::Crowded,
            Ok(Unfound::Fault(fault)) => K8sError::Kubelet(fault),
            Ok(Unfound::Silent | Unfound::NotInIt) => {
                K8sError::SilentApiServer { namespace: namespace.clone(), waited: began.elapsed() }
            }
            Err(never) => match never {},
        })?;
        if let Some(excess) = found.excess {
            return Err(K8sError::LargeNamespace { namespace, excess });
        }
        let label =
            |(key, value): &(Box<str>, Box<str>)| Selector::new(NAME, format!("{NS_LABEL}:{key}:{value}"));
        Ok(found.labels.iter().map(label).collect())
    }

    /// The process, which is in this container of this pod.
    async fn look(
        &self,
        settings: &K8sSettings,
        seen: &Seen<'_>,
        pod: PodUid,
        container: ContainerId,
    ) -> Result<PodFindings, K8sError> {
        if settings.disable_kubelet_client {
            return Err(K8sError::NoClient);
        }
        let patience = Self::patience(settings, seen);
        let began = Instant::now();
        let look = |view: &PodView, asked: Instant| {
            let found = view.pods.find(pod, container).map_err(K8sError::Ambiguous)?;
            let found = found.filter(|it| it.is_listed() || settings.disable_container_selectors);
            found
                .map(|found| {
                    let selectors = selectors(found, view, settings)?;
                    Ok(PodFindings { selectors, namespace: found.pod.namespace.clone(), asked })
                })
                .transpose()
        };
        let found = self.pods.find(&(), share_of(pod), patience, || seen.process.stand_aside(), look).await;
        found.map_err(|why| match why {
            Err(error) => error,
            Ok(Unfound::Crowded) => K8sError::Crowded,
            Ok(Unfound::Fault(fault)) => K8sError::Kubelet(fault),
            Ok(Unfound::Silent) => {
                // Who asks about a process waits for less than the kubelet is given.
                let known = self.pods.trouble().filter(|_| seen.extent() == Extent::All);
                known.map_or(K8sError::Silent { waited: began.elapsed() }, K8sError::Away)
            }
            Ok(Unfound::NotInIt) => {
                K8sError::Unlisted { container, pod: CallerKey::Pod(pod), waited: began.elapsed() }
            }
        })
    }
}

/// Whose share of the places it takes: each pod's own, as an admin made it.
fn share_of(pod: PodUid) -> u64 {
    let number = u128::from_be_bytes(pod);
    u64::try_from((number >> 64) ^ (number & u128::from(u64::MAX))).unwrap_or_default()
}

/// What is attested of a container, or of its pod alone.
fn selectors(
    found: FoundContainer<'_>,
    view: &PodView,
    settings: &K8sSettings,
) -> Result<Selectors, K8sError> {
    let FoundContainer { pod, container } = found;
    match view.node.as_ref().filter(|asked| names_node(asked)) {
        Some(asked) if !is_of_node(&pod.node, asked) => {
            let (pod, found) = (pod.key(), pod.node.to_string());
            return Err(K8sError::OtherNode { pod, found, asked: Arc::clone(asked) });
        }
        Some(_) => {}
        None => {
            if let Some(other) = view.pods.of_another_node(pod) {
                let [found, other] = [&pod.node, &other.node].map(ToString::to_string);
                return Err(K8sError::TwoNodes { pod: pod.key(), found, other });
            }
        }
    }
    if let Some(excess) = pod.excess() {
        return Err(K8sError::Excess { pod: pod.key(), excess: excess.to_string() });
    }
    let mut all = Selectors::new();
    let mut add = |value: String| {
        all.insert(Selector::new(NAME, value));
    };
    add(format!("ns:{}", pod.namespace));
    add(format!("sa:{}", pod.service_account));
    add(format!("node-name:{}", pod.node));
    add(format!("pod-uid:{}", pod.uid));
    add(format!("pod-name:{}", pod.name));
    add(format!("pod-image-count:{}", pod.containers.len()));
    add(format!("pod-init-image-count:{}", pod.init_containers.len()));
    for (word, containers) in [("pod-image", &pod.containers), ("pod-init-image", &pod.init_containers)] {
        for PodContainer { image, image_id, .. } in containers {
            add(format!("{word}:{image}"));
            add(format!("{word}:{image_id}"));
        }
    }
    for (key, value) in &pod.labels {
        add(format!("pod-label:{key}:{value}"));
    }
    for PodOwner { kind, name, uid } in &pod.owners {
        add(format!("pod-owner:{kind}:{name}"));
        add(format!("pod-owner-uid:{kind}:{uid}"));
    }
    if let Some(container) = container.filter(|_| !settings.disable_container_selectors) {
        add(format!("container-name:{}", container.name));
        add(format!("container-image:{}", container.image));
        add(format!("container-image:{}", container.image_id));
    }
    Ok(all)
}
