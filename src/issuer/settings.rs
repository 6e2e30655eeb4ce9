//! The settings of the issuer.

use std::{path::PathBuf, time::Duration};

use super::embedded::{self, CaSource, MAX_CA_TTL, MIN_CA_TTL, MIN_SVID_TTL};
use crate::{
    hcl::settings::settings,
    identity::{KeyType, TrustDomain},
};

const HOUR: Duration = Duration::from_secs(3600);

settings! {
    /// `issuer "embedded"`: a CA on this node, for this node alone.
    pub struct IssuerSettings in "issuer \"embedded\"" {
        /// The lifetime of a CA certificate and of a JWT key.
        "ca_ttl" ca_ttl: Duration = 24 * HOUR, duration(MIN_CA_TTL..=MAX_CA_TTL), needs_restart;
        /// The type of the CA's key.
        "ca_key_type" ca_key_type: KeyType = KeyType::EcP256, parsed(KeyType::parse, KeyType::NAMES), needs_restart;
        /// The type of the keys that sign JWT-SVIDs.
        "jwt_key_type" jwt_key_type: KeyType = ca_key_type, parsed(KeyType::parse, KeyType::NAMES), needs_restart;
        /// The `iss` claim of JWT-SVIDs.
        "jwt_issuer" jwt_issuer: Option<String> = None, text(), needs_restart;
        /// The certificate of an admin's CA, PEM, with its chain; set together with `ca_key_path`.
        "ca_cert_path" ca_cert_path: Option<PathBuf> = None, absolute(), needs_restart;
        /// Its key.
        "ca_key_path" ca_key_path: Option<PathBuf> = None, absolute(), needs_restart;
        /// The lifetime of an X.509-SVID whose entry says none; at most `ca_ttl`.
        "default_x509_svid_ttl" default_x509_svid_ttl: Duration = HOUR.min(ca_ttl),
            duration(MIN_SVID_TTL..=Duration::MAX), reloads;
        /// The lifetime of a JWT-SVID whose entry says none; at most `ca_ttl`.
        "default_jwt_svid_ttl" default_jwt_svid_ttl: Duration = Duration::from_secs(300).min(ca_ttl),
            duration(MIN_SVID_TTL..=Duration::MAX), reloads;
    }
}

impl IssuerSettings {
    /// What the embedded issuer is told, with what stands in other blocks.
    pub fn embedded(
        &self,
        trust_domain: TrustDomain,
        data_dir: PathBuf,
        svid_key_type: KeyType,
    ) -> embedded::Settings {
        let ca = match (&self.ca_cert_path, &self.ca_key_path) {
            (Some(cert), Some(key)) => CaSource::Supplied { cert: cert.clone(), key: key.clone() },
            (None, _) | (_, None) => CaSource::SelfSigned,
        };
        embedded::Settings {
            trust_domain,
            data_dir,
            ca,
            ca_ttl: self.ca_ttl,
            ca_key_type: self.ca_key_type,
            jwt_key_type: self.jwt_key_type,
            svid_key_type,
            jwt_issuer: self.jwt_issuer.clone(),
            default_x509_svid_ttl: self.default_x509_svid_ttl,
            default_jwt_svid_ttl: self.default_jwt_svid_ttl,
        }
    }
}
