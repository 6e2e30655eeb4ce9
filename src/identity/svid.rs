//! SVIDs: what a workload is handed. The private key is zeroised on drop and has no `Debug`.

use std::{fmt, sync::Arc, time::SystemTime};

use zeroize::Zeroizing;

use super::SpiffeId;
use crate::hcl::settings::Shown;

/// The algorithm of a key pair. The names are SPIRE's (`workload_x509_svid_key_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KeyType {
    /// ECDSA on P-256; signs ES256.
    #[default]
    EcP256,
    /// ECDSA on P-384; signs ES384.
    EcP384,
    /// RSA with 2048 bits; signs RS256. A new key takes about a tenth of a second of one core.
    Rsa2048,
}

impl KeyType {
    /// What a text must be for [`KeyType::parse`].
    pub(crate) const NAMES: &str = "must be one of ec-p256, ec-p384, rsa-2048";

    /// Parses `ec-p256`, `ec-p384` or `rsa-2048`, in any case as SPIRE does.
    pub fn parse(text: &str) -> Option<Self> {
        [Self::EcP256, Self::EcP384, Self::Rsa2048].into_iter().find(|k| k.name().eq_ignore_ascii_case(text))
    }

    /// `ec-p256`, `ec-p384` or `rsa-2048`.
    pub fn name(self) -> &'static str {
        match self {
            Self::EcP256 => "ec-p256",
            Self::EcP384 => "ec-p384",
            Self::Rsa2048 => "rsa-2048",
        }
    }
}

impl Shown for KeyType {
    fn shown(&self) -> String {
        self.name().to_owned()
    }
}

/// An X.509-SVID with its private key.
pub struct X509Svid {
    pub spiffe_id: SpiffeId,
    /// DER certificates: the leaf, then intermediates, which many SVIDs share; never the root.
    pub chain: Vec<Arc<[u8]>>,
    /// The private key, PKCS#8 DER.
    pub key: Zeroizing<Vec<u8>>,
    /// Start of validity (ten seconds before it was made).
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
}

impl fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509Svid")
            .field("spiffe_id", &self.spiffe_id)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// A JWT-SVID. The token is a bearer's: zeroised on drop, never printed.
pub struct JwtSvid {
    pub spiffe_id: SpiffeId,
    /// JWS compact serialization.
    pub token: Zeroizing<String>,
    /// `iat`.
    pub issued_at: SystemTime,
    /// `exp`.
    pub expires_at: SystemTime,
}

impl fmt::Debug for JwtSvid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtSvid")
            .field("spiffe_id", &self.spiffe_id)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}
