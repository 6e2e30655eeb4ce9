//! The keys of all blocks, so that one that stands in the wrong block is told where it belongs.

use super::agent::AgentSettings;
use crate::{
    attest::{k8s::K8sSettings, unix::UnixSettings},
    issuer::{
        embedded::IssuerSettings,
        server::settings::{DiskKeySettings, JoinSettings, K8sPsatSettings, SyncSettings, X509PopSettings},
    },
    peer::{KubernetesSettings, ListenerSettings},
    store::{CacheSettings, Policy},
    telemetry::{AuditSettings, HealthSettings, LogSettings, SpireNameSettings},
};

pub(super) const KEYS: &[&[&str]] = &[
    AgentSettings::KEYS,
    LogSettings::KEYS,
    Policy::KEYS,
    CacheSettings::KEYS,
    JoinSettings::KEYS,
    SyncSettings::KEYS,
    ListenerSettings::KEYS,
    KubernetesSettings::KEYS,
    IssuerSettings::KEYS,
    AuditSettings::KEYS,
    HealthSettings::KEYS,
    SpireNameSettings::KEYS,
    UnixSettings::KEYS,
    K8sSettings::KEYS,
    X509PopSettings::KEYS,
    K8sPsatSettings::KEYS,
    DiskKeySettings::KEYS,
];
