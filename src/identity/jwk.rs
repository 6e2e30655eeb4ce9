//! JSON Web Keys (RFC 7517, RFC 7518): the public keys of a bundle as they are read and written.
//!
//! A key that is read is sound: its point is on its curve, its RSA modulus has a usable size. Members are written in
//! go-jose's order, since the answers of spire-agent have it.

use std::borrow::Cow;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, EcdsaVerificationAlgorithm,
    ParsedPublicKey,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Serialize, Serializer, ser::SerializeMap as _};
use serde_json::{Map, Value};
use x509_parser::{prelude::FromDer as _, public_key::PublicKey, x509::SubjectPublicKeyInfo};

use super::json::Quoted;

/// Why a public key or a JWK is refused.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A member that must be there, and is not.
    #[error("\"{0}\" is missing")]
    Missing(&'static str),
    /// A member of another JSON type.
    #[error("\"{0}\" must be a non-empty string")]
    NotText(&'static str),
    /// Not base64 (`x5c`), or not base64url without padding (the others).
    #[error("\"{0}\" is not base64: {1}")]
    Base64(&'static str, base64::DecodeError),
    /// A curve that no JWT-SVID algorithm uses.
    #[error("\"crv\" is {}, but must be P-256, P-384 or P-521", Quoted(.0))]
    Curve(String),
    /// A coordinate that is not as long as its curve asks for (RFC 7518, section 6.2.1.2).
    #[error("\"{name}\" has {got} bytes, but a coordinate of {curve} has {want}")]
    Coordinate {
        /// `x` or `y`.
        name: &'static str,
        /// Its length, in bytes.
        got: usize,
        curve: &'static str,
        /// What its length must be, in bytes.
        want: usize,
    },
    /// Coordinates of no point of the curve.
    #[error("\"x\" and \"y\" are not a point on {0}")]
    NotOnCurve(&'static str),
    /// A modulus that is too short to be safe or too long to be quick.
    #[error("RSA modulus has {0} bits, but must have 2048 to 8192 and be odd")]
    Modulus(usize),
    /// An exponent that no sound key has.
    #[error("RSA exponent must be odd, at least 3 and less than 2^33")]
    Exponent,
    /// A public key that a JWK cannot hold.
    #[error("public key must be RSA, or EC on P-256, P-384 or P-521")]
    Unsupported,
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

/// A curve of RFC 7518, section 6.2.1.1.
#[derive(Clone, Copy)]
struct Curve {
    name: &'static str,
    /// Bytes of a coordinate.
    len: usize,
    /// Its object identifier in a certificate.
    oid: &'static str,
    verification: &'static EcdsaVerificationAlgorithm,
}

const CURVES: [Curve; 3] = [
    Curve { name: "P-256", len: 32, oid: "1.2.840.10045.3.1.7", verification: &ECDSA_P256_SHA256_FIXED },
    Curve { name: "P-384", len: 48, oid: "1.3.132.0.34", verification: &ECDSA_P384_SHA384_FIXED },
    Curve { name: "P-521", len: 66, oid: "1.3.132.0.35", verification: &ECDSA_P521_SHA512_FIXED },
];

impl JwtPublicKey {
    /// Reads a public key in DER: a SubjectPublicKeyInfo, as a certificate or a `PUBLIC KEY` PEM block holds it.
    ///
    /// # Errors
    /// [`KeyError`] when it is none of the keys that JWT-SVIDs are signed with.
    pub fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        let Ok(([], spki)) = SubjectPublicKeyInfo::from_der(der) else { return Err(KeyError::Unsupported) };
        Self::of_spki(&spki)
    }

    pub(super) fn of_spki(spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, KeyError> {
        match spki.parsed() {
            Ok(PublicKey::EC(point)) => {
                let oid = spki.algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok());
                let oid = oid.map(|oid| oid.to_id_string());
                let curve = CURVES.iter().find(|curve| Some(curve.oid) == oid.as_deref());
                let curve = curve.ok_or(KeyError::Unsupported)?;
                let Some((4, coordinates)) = point.data().split_first() else {
                    return Err(KeyError::Unsupported);
                };
                let (x, y) = coordinates.split_at_checked(curve.len).ok_or(KeyError::Unsupported)?;
                Self::ec(curve, x, y)
            }
            Ok(PublicKey::RSA(key)) => Self::rsa(key.modulus, key.exponent),
            _ => Err(KeyError::Unsupported),
        }
    }

    fn ec(curve: &Curve, x: &[u8], y: &[u8]) -> Result<Self, KeyError> {
        for (name, coordinate) in [("x", x), ("y", y)] {
            if coordinate.len() != curve.len {
                return Err(KeyError::Coordinate {
                    name,
                    got: coordinate.len(),
                    curve: curve.name,
                    want: curve.len,
                });
            }
        }
        let point = [&[4], x, y].concat();
        if ParsedPublicKey::new(curve.verification, &point).is_err() {
            return Err(KeyError::NotOnCurve(curve.name));
        }
        Ok(Self::Ec {
            crv: curve.name.into(),
            x: URL_SAFE_NO_PAD.encode(x).into(),
            y: URL_SAFE_NO_PAD.encode(y).into(),
        })
    }

    fn rsa(n: &[u8], e: &[u8]) -> Result<Self, KeyError> {
        let (n, e) = (without_leading_zeros(n), without_leading_zeros(e));
        let unused = n.first().map_or(0, |first| first.leading_zeros());
        let bits = n.len() * 8 - usize::try_from(unused).unwrap_or_default();
        let odd = |bytes: &[u8]| bytes.last().is_some_and(|last| last % 2 == 1);
        if !(2048..=8192).contains(&bits) || !odd(n) {
            return Err(KeyError::Modulus(bits));
        }
        let exponent = e.iter().take(9).fold(0_u128, |value, byte| value << 8 | u128::from(*byte));
        if !odd(e) || !(3..1 << 33).contains(&exponent) {
            return Err(KeyError::Exponent);
        }
        Ok(Self::Rsa { n: URL_SAFE_NO_PAD.encode(n).into(), e: URL_SAFE_NO_PAD.encode(e).into() })
    }

    /// Reads the members of a JWK; `None` when its `kty` is unknown (SPIFFE Trust Domain and Bundle, section 4.2.1).
    pub(super) fn of_jwk(jwk: &Map<String, Value>) -> Result<Option<Self>, KeyError> {
        let decoded = |name: &'static str| {
            let value = URL_SAFE_NO_PAD.decode(text(jwk, name)?);
            value.map_err(|reason| KeyError::Base64(name, reason))
        };
        match text(jwk, "kty")? {
            "EC" => {
                let crv = text(jwk, "crv")?;
                let curve = CURVES.iter().find(|curve| curve.name == crv);
                let curve = curve.ok_or_else(|| KeyError::Curve(crv.to_owned()))?;
                Self::ec(curve, &decoded("x")?, &decoded("y")?).map(Some)
            }
            "RSA" => Self::rsa(&decoded("n")?, &decoded("e")?).map(Some),
            _ => Ok(None),
        }
    }
}

fn without_leading_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    number.get(zeros..).unwrap_or_default()
}

/// The member `name` of a JWK, which must be a text with characters.
pub(super) fn text<'a>(jwk: &'a Map<String, Value>, name: &'static str) -> Result<&'a str, KeyError> {
    match jwk.get(name) {
        None => Err(KeyError::Missing(name)),
        Some(Value::String(text)) if !text.is_empty() => Ok(text),
        Some(_) => Err(KeyError::NotText(name)),
    }
}

/// A JWK to be written.
pub(super) struct Jwk<'a> {
    /// `use`.
    pub(super) key_use: Option<&'static str>,
    pub(super) kid: Option<&'a str>,
    pub(super) key: Cow<'a, JwtPublicKey>,
    /// The certificate of the key, base64.
    pub(super) x5c: Option<String>,
}

impl Serialize for Jwk<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (kty, members) = match &*self.key {
            JwtPublicKey::Ec { crv, x, y } => ("EC", [Some(("crv", crv)), Some(("x", x)), Some(("y", y))]),
            JwtPublicKey::Rsa { n, e } => ("RSA", [Some(("n", n)), Some(("e", e)), None]),
        };
        let own = [("use", self.key_use), ("kty", Some(kty)), ("kid", self.kid)];
        let mut map = serializer.serialize_map(None)?;
        for (name, value) in own.into_iter().filter_map(|(name, value)| Some((name, value?))) {
            map.serialize_entry(name, value)?;
        }
        for (name, value) in members.into_iter().flatten() {
            map.serialize_entry(name, value)?;
        }
        if let Some(x5c) = &self.x5c {
            map.serialize_entry("x5c", &[x5c])?;
        }
        map.end()
    }
}
