//! The settings of the socket's side that are no limits: the others are `ratelimit.gate`.

use std::time::Duration;

use super::cgroup::{KubeletRoot, KubernetesMode};
use crate::hcl::settings::{Shown, settings};

/// A service manager waits for 90 s by default, and kills then.
const MAX_DRAIN_TIMEOUT: Duration = Duration::from_secs(300);

settings! {
    /// `agent.listener`.
    pub struct ListenerSettings in "agent.listener" {
        /// How long calls in flight may go on after SIGTERM; at most 5 min.
        "drain_timeout" drain_timeout: Duration = Duration::from_secs(5),
            duration(Duration::ZERO..=MAX_DRAIN_TIMEOUT), reloads;
    }
}

settings! {
    /// `agent.kubernetes`: how the pod of a caller is found.
    pub struct KubernetesSettings in "agent.kubernetes" {
        /// When pods are looked for.
        "mode" mode: KubernetesMode = KubernetesMode::Auto,
            parsed(KubernetesMode::parse, "must be auto, on or off"), needs_restart;
        /// The cgroup in which the kubelet keeps pods; by default those where it puts them by itself.
        "kubelet_cgroup_root" kubelet_root: KubeletRoot = KubeletRoot::default(),
            checked(KubeletRoot::parse), needs_restart;
    }
}

impl KubernetesMode {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "on" => Some(Self::On),
            "off" => Some(Self::Off),
            _ => None,
        }
    }
}

impl Shown for KubernetesMode {
    fn shown(&self) -> String {
        format!("{self:?}").to_ascii_lowercase()
    }
}

impl Shown for KubeletRoot {
    fn shown(&self) -> String {
        self.to_string()
    }
}
