//! What the embedded issuer is told.

use std::{path::PathBuf, time::Duration};

use super::IssuerError;
use crate::identity::{KeyType, TrustDomain};

/// The shortest lifetime of a CA: below it, rotation would hardly leave time to learn of a new one.
pub const MIN_CA_TTL: Duration = Duration::from_secs(60);

/// What the embedded issuer is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedSettings {
    /// For whom it signs.
    pub trust_domain: TrustDomain,
    /// Where its keys and state lie; made with mode 0700 when missing.
    pub data_dir: PathBuf,
    /// Where its CA comes from.
    pub ca: CaSource,
    /// Lifetime of a CA certificate and of a JWT key it makes.
    pub ca_ttl: AuthorityTtl,
    /// Key type of the CA. Default `ec-p256`.
    pub ca_key_type: KeyType,
    /// Key type of the JWT keys. Default: as the CA.
    pub jwt_key_type: KeyType,
    /// Key type of the X.509-SVIDs (`workload_x509_svid_key_type`). Default `ec-p256`.
    pub svid_key_type: KeyType,
    /// `iss` of JWT-SVIDs, if any.
    pub jwt_issuer: Option<String>,
    /// Lifetime of an X.509-SVID whose entry says none. Default 1 h.
    pub default_x509_svid_ttl: Duration,
    /// Lifetime of a JWT-SVID whose entry says none. Default 5 min.
    pub default_jwt_svid_ttl: Duration,
}

/// Where the CA comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CaSource {
    /// Made here, self-signed, rotated.
    SelfSigned,
    /// An upstream CA certificate and key of the admin's, both PEM files: it signs an intermediate that is made
    /// here and rotated; the supplied root is what the bundle holds.
    Supplied {
        /// The CA certificate; further certificates in the file are its chain up to the root.
        cert: PathBuf,
        /// Its private key; its mode may not let others read it.
        key: PathBuf,
    },
}

/// Lifetime of a CA certificate and of a JWT key (`ca_ttl`): at least [`MIN_CA_TTL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuthorityTtl(Duration);

impl AuthorityTtl {
    /// A day.
    pub const DEFAULT: Self = Self(Duration::from_secs(24 * 60 * 60));

    /// Takes `ttl`.
    ///
    /// # Errors
    /// [`IssuerError::CaTtl`]: it is too short.
    pub fn new(ttl: Duration) -> Result<Self, IssuerError> {
        if ttl < MIN_CA_TTL { Err(IssuerError::CaTtl { found: ttl }) } else { Ok(Self(ttl)) }
    }

    /// As a duration.
    pub fn get(self) -> Duration {
        self.0
    }
}
