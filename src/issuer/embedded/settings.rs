//! What the embedded issuer is told.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    hcl::settings::settings,
    identity::{KeyType, TrustDomain},
};

/// The shortest lifetime of a CA: below it, rotation would hardly leave time to learn of a new one.
pub const MIN_CA_TTL: Duration = Duration::from_secs(60);

/// The longest lifetime of a CA, ten years: beyond it lies a mistake.
const MAX_CA_TTL: Duration = Duration::from_secs(87_600 * 3600);

/// The shortest lifetime of an SVID.
pub const MIN_SVID_TTL: Duration = Duration::from_secs(1);

const HOUR: Duration = Duration::from_secs(3600);

settings! {
    /// `issuer "embedded"`: a CA on this node, for this node alone.
    pub struct IssuerSettings in "issuer \"embedded\"" {
        /// The lifetime of a CA certificate and of a JWT key that it makes.
        "ca_ttl" ca_ttl: Duration = 24 * HOUR, duration(MIN_CA_TTL..=MAX_CA_TTL), needs_restart;
        /// The type of the CA's key.
        "ca_key_type" ca_key_type: KeyType = KeyType::EcP256,
            parsed(KeyType::parse, KeyType::NAMES), needs_restart;
        /// The type of the keys that sign JWT-SVIDs.
        "jwt_key_type" jwt_key_type: KeyType = ca_key_type,
            parsed(KeyType::parse, KeyType::NAMES), needs_restart;
        /// The `iss` claim of JWT-SVIDs, if any.
        "jwt_issuer" jwt_issuer: Option<String> = None, text(), needs_restart;
        /// The certificate, PEM, of an admin's CA, with the chain up to the root behind it: it signs an intermediate
        /// that is made here and rotated, and its root is what the bundle holds. Set together with its key; without
        /// both, the CA is made here and self-signed.
        "ca_cert_path" ca_cert_path: Option<PathBuf> = None, absolute(), needs_restart;
        /// Its private key, PEM, which nobody else may read.
        "ca_key_path" ca_key_path: Option<PathBuf> = None, absolute(), needs_restart;
        /// The lifetime of an X.509-SVID whose entry says none; at most `ca_ttl`.
        "default_x509_svid_ttl" default_x509_svid_ttl: Duration = HOUR.min(ca_ttl),
            duration(MIN_SVID_TTL..=Duration::MAX), reloads;
        /// The lifetime of a JWT-SVID whose entry says none; at most `ca_ttl`.
        "default_jwt_svid_ttl" default_jwt_svid_ttl: Duration = Duration::from_secs(300).min(ca_ttl),
            duration(MIN_SVID_TTL..=Duration::MAX), reloads;
    }
}

/// Everything the embedded issuer is told: its own block, and what it needs of others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedSettings {
    /// For whom it signs.
    pub trust_domain: TrustDomain,
    /// Where its keys and state lie; made with mode 0700 when missing.
    pub data_dir: PathBuf,
    /// Key type of the X.509-SVIDs.
    pub svid_key_type: KeyType,
    pub issuer: IssuerSettings,
}

impl IssuerSettings {
    /// The certificate and the key of the admin's CA; `None` when the CA is self-signed.
    pub(super) fn supplied_ca(&self) -> Option<(&Path, &Path)> {
        self.ca_cert_path.as_deref().zip(self.ca_key_path.as_deref())
    }
}
