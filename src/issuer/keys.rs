//! Key pairs: made, parsed from PKCS#8, kept parsed, and signed with.
//!
//! A key is parsed once and used for its whole life: parsing costs more than an ES256 signature does. Private
//! bytes live in aws-lc (which wipes them when freed) and in [`Zeroizing`] buffers; nothing here has a `Debug` that
//! shows them.

use std::fmt;

use aws_lc_rs::{
    encoding::AsDer as _,
    rand::{self, SystemRandom},
    rsa::KeySize,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING,
        ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair as _, RSA_PKCS1_SHA256,
        RsaKeyPair,
    },
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use rustls_pki_types::PrivateKeyDer;
use x509_parser::prelude::FromDer as _;
use zeroize::Zeroizing;

use crate::identity::{KeyType, bundle::JwtPublicKey};

/// The cryptographic library refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {0}")]
pub struct KeyFault(&'static str);

impl KeyFault {
    /// What could not be done, after "cannot".
    pub(super) fn new(what: &'static str) -> Self {
        Self(what)
    }
}

/// The form of an ECDSA signature, which a parsed key is bound to. RSA knows only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignatureForm {
    /// A DER sequence, as certificates have it.
    Certificate,
    /// The two integers side by side, as JWS has it (RFC 7518, section 3.4).
    Jws,
}

/// A key pair, ready to sign.
pub(super) enum KeyPair {
    EcP256(EcdsaKeyPair),
    EcP384(EcdsaKeyPair),
    /// 2048 bits when made here; a supplied CA's may be longer.
    Rsa(RsaKeyPair),
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyPair").field("key_type", &self.key_type().name()).finish_non_exhaustive()
    }
}

impl KeyPair {
    /// Makes a key. RSA takes about a tenth of a second of one core.
    pub(super) fn generate(key_type: KeyType, form: SignatureForm) -> Result<Self, KeyFault> {
        let failed = |_| KeyFault("make a key");
        Ok(match key_type {
            KeyType::EcP256 => Self::EcP256(EcdsaKeyPair::generate(p256(form)).map_err(failed)?),
            KeyType::EcP384 => Self::EcP384(EcdsaKeyPair::generate(p384(form)).map_err(failed)?),
            KeyType::Rsa2048 => Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).map_err(failed)?),
        })
    }

    /// Parses what [`KeyPair::pkcs8`] gave. `None` when it is no such key.
    pub(super) fn from_pkcs8(key_type: KeyType, form: SignatureForm, pkcs8: &[u8]) -> Option<Self> {
        Some(match key_type {
            KeyType::EcP256 => Self::EcP256(EcdsaKeyPair::from_pkcs8(p256(form), pkcs8).ok()?),
            KeyType::EcP384 => Self::EcP384(EcdsaKeyPair::from_pkcs8(p384(form), pkcs8).ok()?),
            KeyType::Rsa2048 => Self::Rsa(RsaKeyPair::from_pkcs8(pkcs8).ok()?),
        })
    }

    /// Parses an admin's CA key: PKCS#8, SEC 1 or PKCS#1; P-256, P-384 or RSA. `None` when it is none of these.
    pub(super) fn from_foreign(der: &PrivateKeyDer<'_>) -> Option<Self> {
        let bytes = der.secret_der();
        let rsa = || match der {
            PrivateKeyDer::Pkcs1(_) => RsaKeyPair::from_der(bytes).ok(),
            _ => RsaKeyPair::from_pkcs8(bytes).ok(),
        };
        let ec = |algorithm| EcdsaKeyPair::from_private_key_der(algorithm, bytes).ok();
        ec(&ECDSA_P256_SHA256_ASN1_SIGNING)
            .map(Self::EcP256)
            .or_else(|| ec(&ECDSA_P384_SHA384_ASN1_SIGNING).map(Self::EcP384))
            .or_else(|| rsa().map(Self::Rsa))
    }

    /// The private key as PKCS#8 DER.
    pub(super) fn pkcs8(&self) -> Result<Zeroizing<Vec<u8>>, KeyFault> {
        let failed = |_| KeyFault("encode a key");
        match self {
            Self::EcP256(pair) | Self::EcP384(pair) => {
                Ok(Zeroizing::new(pair.to_pkcs8v1().map_err(failed)?.as_ref().to_vec()))
            }
            Self::Rsa(pair) => Ok(Zeroizing::new(pair.as_der().map_err(failed)?.as_ref().to_vec())),
        }
    }

    pub(super) fn key_type(&self) -> KeyType {
        match self {
            Self::EcP256(_) => KeyType::EcP256,
            Self::EcP384(_) => KeyType::EcP384,
            Self::Rsa(_) => KeyType::Rsa2048,
        }
    }

    /// The contents of the `subjectPublicKey` bit string: a point, or an `RSAPublicKey`.
    pub(super) fn public_key(&self) -> &[u8] {
        match self {
            Self::EcP256(pair) | Self::EcP384(pair) => pair.public_key().as_ref(),
            Self::Rsa(pair) => pair.public_key().as_ref(),
        }
    }

    /// Signs: SHA-256 for P-256 and RSA (PKCS#1 v1.5), SHA-384 for P-384.
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyFault> {
        let failed = |_| KeyFault("sign");
        let random = SystemRandom::new();
        match self {
            Self::EcP256(pair) | Self::EcP384(pair) => {
                Ok(pair.sign(&random, message).map_err(failed)?.as_ref().to_vec())
            }
            Self::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).map_err(failed)?;
                Ok(signature)
            }
        }
    }

    /// `alg` of a JWS signed with it.
    pub(super) fn jws_algorithm(&self) -> &'static str {
        match self {
            Self::EcP256(_) => "ES256",
            Self::EcP384(_) => "ES384",
            Self::Rsa(_) => "RS256",
        }
    }
}

/// The members of the JWK of a public key as [`KeyPair::public_key`] gives it. `None` when it is no such key.
pub(super) fn jwk(key_type: KeyType, public_key: &[u8]) -> Option<JwtPublicKey> {
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes).into_boxed_str();
    let ec = |crv: &str, size: usize| {
        let (x, y) = public_key.strip_prefix(&[4])?.split_at_checked(size)?;
        (y.len() == size).then(|| JwtPublicKey::Ec { crv: crv.into(), x: text(x), y: text(y) })
    };
    match key_type {
        KeyType::EcP256 => ec("P-256", 32),
        KeyType::EcP384 => ec("P-384", 48),
        KeyType::Rsa2048 => {
            let (_, key) = x509_parser::public_key::RSAPublicKey::from_der(public_key).ok()?;
            let unpadded = |bytes: &[u8]| {
                let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
                bytes.get(zeros..).map(text)
            };
            Some(JwtPublicKey::Rsa { n: unpadded(key.modulus)?, e: unpadded(key.exponent)? })
        }
    }
}

impl rcgen::PublicKeyData for KeyPair {
    fn der_bytes(&self) -> &[u8] {
        self.public_key()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match self {
            Self::EcP256(_) => &rcgen::PKCS_ECDSA_P256_SHA256,
            Self::EcP384(_) => &rcgen::PKCS_ECDSA_P384_SHA384,
            Self::Rsa(_) => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

impl rcgen::SigningKey for KeyPair {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        Self::sign(self, message).map_err(|_unsaid| rcgen::Error::RemoteKeyError)
    }
}

/// Has the library gather its first randomness, once for the process.
///
/// # Decisions
/// AWS-LC would take its seeds from the jitter of the processor, and the first takes 25 ms of one: more than all the rest of a
/// start. Builds of this folder leave that out (`AWS_LC_SYS_NO_JITTER_ENTROPY` in `.cargo/config.toml`). Each thread's generator is then
/// seeded by getrandom(2), which waits until the kernel's generator is, with as many bytes of RDRAND or RNDR beside it where the
/// processor has them; and again after 4,096 draws, and after a fork. That is sound: it is the kernel's word that Go's, and so
/// spire-agent's, keys are made of; the jitter is among what the kernel's generator is seeded with; and who can foretell
/// that generator has the kernel, and with it every key in this process.
///
/// Two things are lost. Without RDRAND there is no second source, for a kernel whose own is broken. And RDRAND would go into
/// every draw, so that two copies of a virtual machine that were made while the agent ran draw different keys. As it is, they draw
/// the same for a while; the SVIDs and keys that the agent had by then they share in any case. So an agent is to be started
/// in the copy, which the README says.
///
/// A variable holds for builds in this folder, and not for those of `cargo install`: there the jitter is one of two sources, a
/// start takes 25 ms more, and all else is the same. So it is asked for off the threads that serve, while the configuration is
/// read, before there is a socket.
///
/// # Errors
/// It has none to give.
pub fn seed() -> Result<(), KeyFault> {
    random::<1>().map(drop)
}

/// `N` random bytes.
pub(super) fn random<const N: usize>() -> Result<[u8; N], KeyFault> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_unsaid| KeyFault("read random bytes"))?;
    Ok(bytes)
}

fn p256(form: SignatureForm) -> &'static EcdsaSigningAlgorithm {
    match form {
        SignatureForm::Certificate => &ECDSA_P256_SHA256_ASN1_SIGNING,
        SignatureForm::Jws => &ECDSA_P256_SHA256_FIXED_SIGNING,
    }
}

fn p384(form: SignatureForm) -> &'static EcdsaSigningAlgorithm {
    match form {
        SignatureForm::Certificate => &ECDSA_P384_SHA384_ASN1_SIGNING,
        SignatureForm::Jws => &ECDSA_P384_SHA384_FIXED_SIGNING,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn builds_of_this_folder_take_no_jitter() {
        // What it says does not depend on FIPS, but for its name.
        assert!(aws_lc_rs::try_fips_cpu_jitter_entropy().is_err(), "see .cargo/config.toml");
    }
}
