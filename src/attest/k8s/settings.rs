//! What `WorkloadAttestor "k8s"` can be told, and what that means.

use std::{env, net::IpAddr, path::PathBuf, time::Duration};

use super::{
    client::KubernetesPlace,
    fault::KubernetesService,
    material::{KnownBy, Material, ShownAs},
};
use crate::{
    hcl::{
        absent::{NOT_HERE, Off, refuse},
        section::Section,
        settings::settings,
        tree::Place,
    },
    telemetry::chain,
};

/// Why the API server cannot be asked where nobody says where it is.
pub(super) const NO_API_SERVER: &str = "KUBERNETES_SERVICE_HOST is not set, so the API server cannot be asked for labels: set api_server_address";

/// Where the kubelet is when nothing is said.
const SECURE_PORT: u16 = 10250;
/// Where Kubernetes puts what a pod needs.
const CA_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt";
const TOKEN_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Requests that may be waited for.
const MOST_ATTEMPTS: u32 = 3600;
const LONGEST_INTERVAL: Duration = Duration::from_secs(60);
const LONGEST_RELOAD: Duration = Duration::from_secs(24 * 3600);

settings! {
    /// What spire-agent's attestor of this name can be told.
    pub struct K8sSettings in "plugins.WorkloadAttestor \"k8s\".plugin_data" {
        /// The port of this host on which the kubelet tells everybody everything. Not beside the secure one.
        "kubelet_read_only_port" kubelet_read_only_port: Option<u16> = None, integer(1..=u16::MAX), reloads;
        /// The kubelet's port; 10250 when neither is set.
        "kubelet_secure_port" kubelet_secure_port: Option<u16> = None, integer(1..=u16::MAX), reloads;
        /// Whether the kubelet is not asked: nobody has a `k8s` selector then.
        "disable_kubelet_client" disable_kubelet_client: bool = false, boolean(), reloads;
        /// How often a container that the kubelet does not list is waited for, `poll_retry_interval` each time.
        "max_poll_attempts" max_poll_attempts: u32 = 60, integer(1..=MOST_ATTEMPTS), reloads;
        /// See `max_poll_attempts`.
        "poll_retry_interval" poll_retry_interval: Duration = Duration::from_millis(500),
            duration(Duration::from_millis(1)..=LONGEST_INTERVAL), reloads;
        /// The CAs that sign the kubelet's certificate.
        "kubelet_ca_path" kubelet_ca_path: PathBuf = PathBuf::from(CA_FILE), file(), reloads;
        /// Whether the kubelet's certificate is not verified.
        "skip_kubelet_verification" skip_kubelet_verification: bool = false, boolean(), reloads;
        /// The token that the agent shows.
        "token_path" token_path: PathBuf = PathBuf::from(TOKEN_FILE), file(), reloads;
        /// The certificate that the agent shows in place of a token.
        "certificate_path" certificate_path: Option<PathBuf> = None, file(), reloads;
        /// Its key.
        "private_key_path" private_key_path: Option<PathBuf> = None, file(), reloads;
        /// Whether the agent shows nothing.
        "use_anonymous_authentication" use_anonymous_authentication: bool = false, boolean(), reloads;
        /// The variable of the environment that holds the node's name.
        "node_name_env" node_name_env: String = "MY_NODE_NAME".to_owned(), text(), reloads;
        /// The node's name, before the variable.
        "node_name" node_name: Option<String> = None, text(), reloads;
        /// How often the files are read again, at most.
        "reload_interval" reload_interval: Duration = Duration::from_secs(60),
            duration(Duration::from_secs(1)..=LONGEST_RELOAD), reloads;
        /// Whether the API server is asked for the labels of pods' namespaces.
        "enable_namespace_labels" enable_namespace_labels: bool = false, boolean(), reloads;
        /// The API server, as `HOST:PORT`; what Kubernetes tells every pod where it is not set.
        "api_server_address" api_server_address: Option<String> = None, text(), reloads;
        /// The CAs that sign its certificate.
        "api_server_ca_path" api_server_ca_path: PathBuf = PathBuf::from(CA_FILE), file(), reloads;
        /// The token that it is shown.
        "api_server_token_path" api_server_token_path: PathBuf = PathBuf::from(TOKEN_FILE), file(), reloads;
        /// Whether only pods are told, and not their containers.
        "disable_container_selectors" disable_container_selectors: bool = false, boolean(), reloads;
    }
}

/// Keys of spire-agent's that are not acted on.
const ABSENT: [(&str, Off, &str); 3] = [
    ("use_new_container_locator", Off::True, "the old way to find containers"),
    (
        "verbose_container_locator_logs",
        Off::False,
        "logging how containers are found (durward explain shows it)",
    ),
    ("sigstore", Off::Missing, "verifying the signatures of images"),
];

/// The same, in `experimental`.
const EXPERIMENTAL: [(&str, Off, &str); 1] = [("broker", Off::Missing, "the SPIFFE Broker API")];

/// The keys that say something of the kubelet.
const OF_KUBELET: [&str; 11] = [
    "kubelet_read_only_port",
    "kubelet_secure_port",
    "max_poll_attempts",
    "poll_retry_interval",
    "kubelet_ca_path",
    "skip_kubelet_verification",
    "token_path",
    "certificate_path",
    "private_key_path",
    "use_anonymous_authentication",
    "reload_interval",
];

impl K8sSettings {
    /// Reads the block, and checks what its keys say of each other.
    pub(super) fn read_block(data: &mut Section<'_>) -> Self {
        // No other attestor asks for anything that may be missing.
        data.problems().note_key("plugins.WorkloadAttestor", Some(data.place()));
        let set = |key: &'static str| data.set_at(key).map(|place| (key, place));
        let of_kubelet: Vec<(&str, Place)> = OF_KUBELET.into_iter().filter_map(set).collect();
        let settings = Self::read(data);
        let at = |key: &str| of_kubelet.iter().find(|(it, _)| *it == key).map(|(_, place)| *place);
        if settings.disable_kubelet_client {
            for (key, place) in &of_kubelet {
                data.wrong(*place, key, None, format!("disable_kubelet_client cannot be used with {key}"));
            }
        }
        if settings.kubelet_read_only_port.is_some()
            && let Some(place) = at("kubelet_secure_port")
        {
            let message = "cannot use both the read-only and secure port: leave one out";
            data.wrong(place, "kubelet_secure_port", None, message);
        }
        match (&settings.certificate_path, &settings.private_key_path) {
            (Some(_), None) => data.missing("private_key_path", "must be set beside certificate_path"),
            (None, Some(_)) => data.missing("certificate_path", "must be set beside private_key_path"),
            (None, None) | (Some(_), Some(_)) => {}
        }
        if let Some(place) = data.set_at("api_server_address")
            && let Some(address) = &settings.api_server_address
            && host_and_port(address).is_none()
        {
            let message = "must be HOST:PORT, as 10.96.0.1:443";
            data.wrong(place, "api_server_address", None, message);
        }
        refuse(data, &ABSENT);
        if let Some(mut experimental) = data.block("experimental") {
            refuse(&mut experimental, &EXPERIMENTAL);
            if experimental.has("api_server") {
                experimental.wrong_block(format_args!("a cache of the API server {NOT_HERE}; leave it out"));
                experimental.block("api_server");
            }
            experimental.finish();
        }
        settings
    }

    /// Where the kubelet is and how it is asked. `None` where it is not.
    pub(super) fn place(&self) -> Option<KubernetesPlace> {
        if self.disable_kubelet_client {
            return None;
        }
        let (service, reload_interval) = (KubernetesService::Kubelet, self.reload_interval);
        let node = self.node_name.clone().or_else(|| self.node_of_environment());
        if let Some(port) = self.kubelet_read_only_port {
            return Some(KubernetesPlace { service, name: node, port, secure: None, reload_interval });
        }
        let shown_as = match (&self.certificate_path, &self.private_key_path) {
            _ if self.use_anonymous_authentication => ShownAs::Anonymous,
            (Some(certificate), Some(key)) => {
                ShownAs::Certificate { certificate: certificate.clone(), key: key.clone() }
            }
            _ => ShownAs::Token(self.token_path.clone()),
        };
        let known_by = if self.skip_kubelet_verification {
            KnownBy::Nothing
        } else {
            KnownBy::Ca { file: self.kubelet_ca_path.clone(), named: node.is_some() }
        };
        let port = self.kubelet_secure_port.unwrap_or(SECURE_PORT);
        let secure = Some((shown_as, known_by));
        Some(KubernetesPlace { service, name: node, port, secure, reload_interval })
    }

    /// Where the API server is and how it is asked. `None` where it is not, or nobody says where.
    pub(super) fn api_server(&self) -> Option<KubernetesPlace> {
        if !self.enable_namespace_labels || self.disable_kubelet_client {
            return None;
        }
        let (host, port) = match &self.api_server_address {
            Some(address) => host_and_port(address)?,
            None => api_server_of_environment()?,
        };
        let known_by = KnownBy::Ca { file: self.api_server_ca_path.clone(), named: true };
        Some(KubernetesPlace {
            service: KubernetesService::ApiServer,
            name: Some(host),
            port,
            secure: Some((ShownAs::Token(self.api_server_token_path.clone()), known_by)),
            reload_interval: self.reload_interval,
        })
    }

    #[expect(clippy::disallowed_methods, reason = "the setting names a variable, as spire-agent's does")]
    fn node_of_environment(&self) -> Option<String> {
        env::var(&self.node_name_env).ok().filter(|name| !name.is_empty())
    }

    /// What is missing on this host for the services to be asked, each in one line. Reads the files, which blocks this thread.
    pub(super) fn missing(&self) -> Vec<String> {
        let places = [self.place(), self.api_server()].into_iter().flatten();
        let files = places.flat_map(|place| {
            let secure = place.secure.as_ref();
            let faults = secure
                .map(|(shown_as, known_by)| Material::faults(shown_as, known_by, place.service.material()));
            let text = |fault| format!("{}; {} cannot be asked without it", chain(&fault), place.service);
            faults.into_iter().flatten().map(text).collect::<Vec<_>>()
        });
        let nowhere =
            self.enable_namespace_labels && !self.disable_kubelet_client && self.api_server().is_none();
        files.chain(nowhere.then(|| NO_API_SERVER.to_owned())).collect()
    }

    /// How long a container is waited for.
    pub(super) fn patience(&self) -> Duration {
        self.poll_retry_interval.saturating_mul(self.max_poll_attempts)
    }
}

/// What Kubernetes tells every pod.
#[expect(clippy::disallowed_methods, reason = "the variables are how a pod is told")]
fn api_server_of_environment() -> Option<(String, u16)> {
    let host = env::var("KUBERNETES_SERVICE_HOST").ok().filter(|host| !host.is_empty())?;
    let port = env::var("KUBERNETES_SERVICE_PORT").ok()?.parse().ok()?;
    Some((host, port))
}

/// The parts of `HOST:PORT`; an IPv6 address stands in brackets.
fn host_and_port(text: &str) -> Option<(String, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host = bare.unwrap_or(host);
    let is_host = !host.is_empty() && (bare.is_some() || !host.contains([':', '/', '@']));
    Some((host.to_owned(), port.parse().ok().filter(|port| *port > 0)?)).filter(|_| is_host)
}

/// Whether a host that the kubelet is asked by names its node, and not an address of it alone.
pub(super) fn names_node(host: &str) -> bool {
    host.parse::<IpAddr>().is_err() && !host.eq_ignore_ascii_case("localhost")
}

/// Whether a pod of node `found` may be one of the node that was asked for. Either name may be without the other's domain.
pub(super) fn is_of_node(found: &str, asked: &str) -> bool {
    let (short, long) = if found.len() < asked.len() { (found, asked) } else { (asked, found) };
    let is_same = long.get(..short.len()).is_some_and(|start| start.eq_ignore_ascii_case(short));
    let is_whole = long.get(short.len()..).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    found.is_empty() || is_same && is_whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_of_the_node_that_was_asked_for() {
        for (found, asked, want) in [
            ("node1", "node1", true),
            ("node1", "NODE1", true),
            ("node1", "node1.example.org", true),
            ("node1.example.org", "node1", true),
            ("", "node1", true),
            ("node1", "node2", false),
            ("node1", "node", false),
            ("node1", "node11", false),
            ("node1.example.org", "node1.example.com", false),
            ("node1", "", false),
            ("n\u{f6}de", "n\u{f6}", false),
        ] {
            assert_eq!(is_of_node(found, asked), want, "{found} {asked}");
        }
        for (host, want) in [
            ("node1", true),
            ("localhost.example.org", true),
            ("localhost", false),
            ("Localhost", false),
            ("192.0.2.1", false),
            ("2001:db8::1", false),
        ] {
            assert_eq!(names_node(host), want, "{host}");
        }
    }
}
