//! Bundles: the public keys with which the members of a trust domain are verified.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use super::TrustDomain;

/// A public key that signs JWT-SVIDs, as its JWK has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtAuthority {
    /// Key ID; unique within its trust domain.
    pub kid: Box<str>,
    /// The key.
    pub key: JwtPublicKey,
    /// When it stops to be valid, if that is known (never for a key read from a JWK set).
    pub not_after: Option<SystemTime>,
}

/// The members of a JWK (RFC 7518, section 6), each base64url without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JwtPublicKey {
    /// `kty` EC; `crv` is `P-256`, `P-384` or `P-521`; coordinates are padded to the size of the curve.
    Ec {
        /// `crv`.
        crv: Box<str>,
        /// `x`.
        x: Box<str>,
        /// `y`.
        y: Box<str>,
    },
    /// `kty` RSA.
    Rsa {
        /// `n`.
        n: Box<str>,
        /// `e`.
        e: Box<str>,
    },
}

/// What verifies the members of one trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    /// Whose it is.
    pub trust_domain: TrustDomain,
    /// CA certificates, DER, in the issuer's order.
    pub x509_authorities: Vec<Vec<u8>>,
    /// JWT keys, sorted by `kid`.
    pub jwt_authorities: Vec<JwtAuthority>,
}

/// The bundles that the agent knows: its own trust domain's, and federated ones.
#[derive(Clone, Debug)]
pub struct Bundles {
    /// Of the agent's own trust domain.
    pub own: Arc<Bundle>,
    /// Of foreign trust domains. Never holds the own one.
    pub federated: BTreeMap<TrustDomain, Arc<Bundle>>,
}

impl Bundles {
    /// The bundle of `trust_domain`, own or federated, if it is known.
    pub fn of(&self, trust_domain: &TrustDomain) -> Option<&Arc<Bundle>> {
        if self.own.trust_domain == *trust_domain {
            Some(&self.own)
        } else {
            self.federated.get(trust_domain)
        }
    }
}
