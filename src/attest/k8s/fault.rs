//! Why the kubelet or the API server could not be asked, in words that say what to do about it.

use std::{fmt, io, time::Duration};

use super::{
    body::BodyExcess,
    material::{MaterialFault, MaterialNames, NamedFile},
};

/// How long one request may take, from connecting to the last byte.
pub(super) const FETCH: Duration = Duration::from_secs(10);

/// The largest list of pods that is read, in bytes: of 500 usual pods it is some 3 MiB.
const LARGEST_LIST: usize = 32 * 1024 * 1024;
/// The largest namespace that is read, in bytes: Kubernetes keeps no object of more than 1.5 MiB.
const LARGEST_NAMESPACE: usize = 4 * 1024 * 1024;

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KubernetesService {
    Kubelet,
    ApiServer,
}

/// What is said of one, in messages.
struct ServiceWords {
    things: &'static str,
    answer: &'static str,
    permission: &'static str,
    its_ca: &'static str,
    its_name: &'static str,
    material: MaterialNames,
}

const OF_KUBELET: ServiceWords = ServiceWords {
    things: "pods",
    answer: "list of pods",
    permission: "nodes/pods (before Kubernetes 1.33 on nodes/proxy)",
    its_ca: "name the kubelet's CA in kubelet_ca_path, or set skip_kubelet_verification = true",
    its_name: "set node_name to a name that it is for, or skip_kubelet_verification = true",
    material: MaterialNames {
        ca: NamedFile { what: "kubelet CA", setting: "kubelet_ca_path" },
        token: NamedFile { what: "token", setting: "token_path" },
        certificate: NamedFile { what: "certificate", setting: "certificate_path" },
        key: NamedFile { what: "certificate", setting: "private_key_path" },
    },
};

const OF_API_SERVER: ServiceWords = ServiceWords {
    things: "namespaces",
    answer: "namespace",
    permission: "namespaces",
    its_ca: "name its CA in api_server_ca_path",
    its_name: "set api_server_address to a name that it is for",
    // It is shown a token alone.
    material: MaterialNames {
        ca: NamedFile { what: "API server CA", setting: "api_server_ca_path" },
        token: NamedFile { what: "API server token", setting: "api_server_token_path" },
        certificate: NamedFile { what: "certificate", setting: "api_server_token_path" },
        key: NamedFile { what: "certificate", setting: "api_server_token_path" },
    },
};

impl KubernetesService {
    /// In bytes.
    pub(super) fn largest_answer(self) -> usize {
        match self {
            Self::Kubelet => LARGEST_LIST,
            Self::ApiServer => LARGEST_NAMESPACE,
        }
    }

    /// What its files are called, and which settings name them.
    pub(super) fn material(self) -> &'static MaterialNames {
        &self.words().material
    }

    fn words(self) -> &'static ServiceWords {
        match self {
            Self::Kubelet => &OF_KUBELET,
            Self::ApiServer => &OF_API_SERVER,
        }
    }
}

impl fmt::Display for KubernetesService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kubelet => "the kubelet",
            Self::ApiServer => "the API server",
        })
    }
}

/// Who is asked, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAddress {
    pub(super) service: KubernetesService,
    pub(super) address: String,
}

impl fmt::Display for ServiceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.service, self.address)
    }
}

/// Why the kubelet did not say which pods there are, or the API server what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesFault {
    /// What to show it, or to know it by, cannot be read.
    #[error(transparent)]
    Material(#[from] MaterialFault),
    /// Nobody is there.
    #[error("cannot reach {who}")]
    Unreachable { who: ServiceAddress, source: io::Error },
    /// It did not answer in time.
    #[error("{who} did not answer within {} s", FETCH.as_secs())]
    Late { who: ServiceAddress },
    /// Its certificate is signed by somebody else.
    #[error(
        "{who} shows a certificate that no CA of {ca} has signed: {} ({why})", who.service.words().its_ca
    )]
    UnknownCa { who: ServiceAddress, ca: String, why: String },
    /// Its certificate is for another name.
    #[error(
        "{who} shows a certificate that is not for that name: {} ({why})", who.service.words().its_name
    )]
    OtherName { who: ServiceAddress, why: String },
    /// Another failure of TLS.
    #[error("no TLS connection with {who}")]
    Tls { who: ServiceAddress, source: io::Error },
    /// It does not know the agent.
    #[error("{who} does not accept {shown_as} (401): {right}")]
    Unauthenticated { who: ServiceAddress, shown_as: String, right: &'static str },
    /// It knows the agent, which may not ask.
    #[error(
        "{who} does not let the agent see its {} (403): allow its service account get on {}{said}",
        who.service.words().things, who.service.words().permission
    )]
    Forbidden { who: ServiceAddress, said: String },
    /// It sends the agent elsewhere, which is not followed.
    #[error("{who} answers with a redirect ({status}), which is not followed: is that its port?")]
    Redirect { who: ServiceAddress, status: u16 },
    /// Any other answer.
    #[error("unexpected status code on {} response of {}: {status}{said}", who.service.words().things, who.address)]
    Status { who: ServiceAddress, status: u16, said: String },
    /// It answers something else.
    #[error("the answer of {who} is {found:?} and no {}: is that its port?", who.service.words().answer)]
    NotJson { who: ServiceAddress, found: String },
    /// The list is larger than is read.
    #[error("the {} of {who} is not read: {excess}", who.service.words().answer)]
    Large { who: ServiceAddress, excess: BodyExcess },
    /// The connection broke.
    #[error("the connection to {who} broke")]
    Broken { who: ServiceAddress, source: hyper::Error },
    /// The list cannot be understood.
    #[error("cannot understand the {} of {who}: {why}", who.service.words().answer)]
    Malformed { who: ServiceAddress, why: String },
    /// The agent itself failed.
    #[error("the agent cannot ask: {0}")]
    Internal(&'static str),
}

impl KubernetesFault {
    /// Whether to ask again shortly may help: it does not where somebody has to change something.
    pub(super) fn passes(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Late { .. } | Self::Broken { .. } | Self::Tls { .. } => true,
            Self::Status { status, .. } => *status >= 500 || *status == 429,
            Self::Material(_)
            | Self::UnknownCa { .. }
            | Self::OtherName { .. }
            | Self::Unauthenticated { .. }
            | Self::Forbidden { .. }
            | Self::Redirect { .. }
            | Self::NotJson { .. }
            | Self::Large { .. }
            | Self::Malformed { .. }
            | Self::Internal(_) => false,
        }
    }

    /// Whether files that were read anew may help.
    pub(super) fn may_be_stale(&self) -> bool {
        matches!(
            self,
            Self::UnknownCa { .. } | Self::OtherName { .. } | Self::Unauthenticated { .. } | Self::Tls { .. }
        )
    }
}
