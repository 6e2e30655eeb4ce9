//! Bundles: the public keys with which the members of a trust domain are verified.
//!
//! A bundle is text from elsewhere: a PEM file, or a JWK set as the SPIFFE Trust Domain and Bundle standard has it,
//! put on disk by an admin and often made by a stranger. What parses holds only CA certificates that are
//! certificates and keys that are keys (points on their curve, RSA of a usable size); a bundle with one bad key is
//! refused as a whole, and the error names the key. Nothing here says whether a certificate is still valid: whoever
//! verifies a chain does.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Serialize;
use serde_json::{Map, Value};
use x509_parser::{certificate::X509Certificate, pem::Pem};

pub use super::jwk::{JwtPublicKey, KeyError};
use super::{
    TrustDomain,
    json::{self, Quoted},
    jwk::{Jwk, text},
    pem::{BYTE_ORDER_MARK, LostBlock, WideText, block_lines, check_blocks},
};

/// The longest bundle that is parsed, in bytes.
pub const MAX_LEN: usize = 1 << 20;

/// The most keys (or certificates) of a bundle.
pub const MAX_KEYS: usize = 1000;

/// The most JSON values of a bundle: what [`MAX_KEYS`] keys have, with twice the members that any key has.
const MAX_VALUES: usize = 32 * MAX_KEYS;

/// Why a text is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// More than [`MAX_LEN`] bytes.
    #[error("bundle has {0} bytes, but can have at most {MAX_LEN}")]
    TooLong(usize),
    /// More than [`MAX_KEYS`] keys.
    #[error("bundle has more than {MAX_KEYS} keys")]
    TooManyKeys,
    /// A PEM text without a certificate.
    #[error("bundle holds no PEM block of type CERTIFICATE")]
    NoCertificate,
    /// A PEM block that readers pass over.
    #[error(transparent)]
    LostBlock(#[from] LostBlock),
    /// A PEM block that is no authority.
    #[error("line {line}: {reason}")]
    PemBlock {
        /// Where it begins, from 1.
        line: usize,
        reason: AuthorityError,
    },
    /// Not JSON, or JSON that names a member of an object twice.
    #[error("bundle is not valid JSON: {0}")]
    Json(serde_json::Error),
    /// JSON of two bytes a character, or four.
    #[error("bundle is {0}, and JSON is read as UTF-8: save it as UTF-8 without a byte order mark")]
    Wide(WideText),
    /// JSON as some editors save it.
    #[error("a byte order mark stands before the bundle: save it without one")]
    Marked,
    /// No `keys`, or not an array.
    #[error("bundle must be a JSON object with an array \"keys\"")]
    NoKeys,
    /// No key of `keys` is an authority: so many were passed over.
    #[error(
        "bundle trusts nobody: none of its {0} keys has a \"use\" of x509-svid or jwt-svid and a \"kty\" of EC or RSA"
    )]
    NoAuthority(usize),
    /// A key that is no authority.
    #[error("keys[{at}]: {reason}")]
    Key {
        /// Its index, from zero.
        at: usize,
        reason: AuthorityError,
    },
    /// A certificate of the bundle cannot be shown as a JWK.
    #[error("certificate {at}: {reason}")]
    Certificate {
        /// Its index, from zero.
        at: usize,
        reason: AuthorityError,
    },
}

/// Keys of a JWK set that no SVID is verified with: their `use` or `kty` is none that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PassedOver {
    /// The index of the first, and which member of it that is.
    first: Option<(usize, &'static str)>,
    more: usize,
}

impl PassedOver {
    fn note(&mut self, at: usize, member: &'static str) {
        match self.first {
            None => self.first = Some((at, member)),
            Some(_) => self.more += 1,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.first.is_none()
    }
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((at, member)) = self.first else { return Ok(()) };
        let right = match member {
            "use" => "x509-svid or jwt-svid",
            _ => "EC or RSA",
        };
        write!(f, "keys[{at}] is not used, since its {member:?} is not {right}")?;
        match self.more {
            0 => Ok(()),
            more => write!(f, ", and neither are {more} more"),
        }
    }
}

/// What is wrong with one key or certificate of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Not a PEM block: no end, a broken header, or not base64.
    #[error("not a PEM block: {0}")]
    Pem(x509_parser::error::PEMError),
    /// A PEM block of another type.
    #[error("type is {}, but a bundle holds blocks of type CERTIFICATE only", Quoted(.0))]
    PemType(String),
    /// Not one DER certificate.
    #[error("not a DER certificate")]
    NotCertificate,
    /// A certificate that says it is not a CA's, or does not say that it is.
    #[error("not a CA certificate: basic constraints must say CA")]
    NotCa,
    /// A key that is published with what signs for it.
    #[error(
        "\"d\" is a private key, which no bundle may hold: make a new key, since others have read this one"
    )]
    Private,
    /// The key is no JSON object.
    #[error("must be a JSON object")]
    NotObject,
    /// `x5c` with none or several certificates.
    #[error("\"x5c\" must be an array with exactly one certificate, but has {0}")]
    X5cLen(usize),
    /// `x5c` is no array.
    #[error("\"x5c\" must be an array with exactly one certificate")]
    X5cType,
    /// A `use` or `kty` that is almost one that is known: the key would be passed over.
    #[error("\"{name}\" is {}, but must be {want}, written like this", Quoted(.got))]
    Misspelt {
        /// Its member.
        name: &'static str,
        got: String,
        want: &'static str,
    },
    /// Two different keys under one name.
    #[error("another key has the same \"kid\" {}", Quoted(.0))]
    DuplicateKid(String),
    /// The public key or its JWK.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// A public key that signs JWT-SVIDs, as its JWK has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtAuthority {
    /// Key ID; unique within its trust domain.
    pub kid: Box<str>,
    pub key: JwtPublicKey,
    /// When it stops to be valid, if that is known (never for a key read from a JWK set).
    pub not_after: Option<SystemTime>,
}

/// Which bundle of several of one trust domain it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edition {
    /// Grows with each change.
    pub sequence: u64,
    /// How often others should look for the next one.
    pub refresh_hint: Duration,
}

/// What verifies the members of one trust domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    pub trust_domain: TrustDomain,
    /// CA certificates, DER, in the issuer's order.
    pub x509_authorities: Vec<Vec<u8>>,
    /// JWT keys, sorted by `kid`.
    pub jwt_authorities: Vec<JwtAuthority>,
}

impl Bundle {
    /// Parses a file of PEM certificates: the X.509 authorities of `trust_domain`. The same certificate twice counts
    /// once; text between the blocks is left alone.
    ///
    /// # Errors
    /// [`BundleError`] when there is no certificate, one is not a CA's, or the file holds blocks of another type
    /// (a private key next to its certificate, say).
    pub fn parse_pem(trust_domain: &TrustDomain, pem: &[u8]) -> Result<Self, BundleError> {
        check_len(pem)?;
        check_blocks(pem)?;
        let mut x509_authorities = Vec::new();
        for (at, block) in Pem::iter_from_buffer(pem).enumerate() {
            let wrong = |reason| {
                let line = block_lines(pem).nth(at).unwrap_or_default();
                BundleError::PemBlock { line, reason }
            };
            if at >= MAX_KEYS {
                return Err(BundleError::TooManyKeys);
            }
            let block = block.map_err(|reason| wrong(AuthorityError::Pem(reason)))?;
            if block.label != "CERTIFICATE" {
                return Err(wrong(AuthorityError::PemType(block.label)));
            }
            check_ca(&block.contents).map_err(wrong)?;
            if !x509_authorities.contains(&block.contents) {
                x509_authorities.push(block.contents);
            }
        }
        if x509_authorities.is_empty() {
            return Err(BundleError::NoCertificate);
        }
        Ok(Self { trust_domain: trust_domain.clone(), x509_authorities, jwt_authorities: Vec::new() })
    }

    /// As [`Bundle::parse_spiffe_telling`], where nobody would hear of what is passed over.
    ///
    /// # Errors
    /// As [`Bundle::parse_spiffe_telling`].
    pub fn parse_spiffe(trust_domain: &TrustDomain, json: &[u8]) -> Result<Self, BundleError> {
        Ok(Self::parse_spiffe_telling(trust_domain, json)?.0)
    }

    /// Parses a SPIFFE bundle: a JWK set with `use` (SPIFFE Trust Domain and Bundle, section 4).
    ///
    /// Keys of an unknown `use` or `kty`, or without `use`, are passed over, as the standard has it. A set that is left empty
    /// trusts nobody, which the standard allows; for a file it is an error, since it is never what was meant. An `x509-svid` key is what its one certificate says; its other
    /// members are not looked at. `spiffe_sequence` and `spiffe_refresh_hint` are not needed for a file.
    ///
    /// # Errors
    /// [`BundleError`] with the index of the first key that is wrong, and why. X509-SVID, section 6.2, would pass
    /// over an `x509-svid` key without a certificate; as SPIRE does, this refuses it: an authority that is left out
    /// silently is found when a neighbour is not trusted.
    pub fn parse_spiffe_telling(
        trust_domain: &TrustDomain,
        json: &[u8],
    ) -> Result<(Self, PassedOver), BundleError> {
        check_len(json)?;
        if let Some(wide) = WideText::of(json) {
            return Err(BundleError::Wide(wide));
        }
        if json.starts_with(BYTE_ORDER_MARK) {
            return Err(BundleError::Marked);
        }
        let document = json::parse(json, MAX_VALUES).map_err(BundleError::Json)?;
        let keys = document.get("keys").and_then(Value::as_array).ok_or(BundleError::NoKeys)?;
        if keys.len() > MAX_KEYS {
            return Err(BundleError::TooManyKeys);
        }
        let mut x509_authorities = Vec::new();
        let mut jwt_keys = BTreeMap::new();
        let mut passed_over = PassedOver::default();
        for (at, jwk) in keys.iter().enumerate() {
            let wrong = |reason| BundleError::Key { at, reason };
            let jwk = jwk.as_object().ok_or_else(|| wrong(AuthorityError::NotObject))?;
            if jwk.contains_key("d") {
                return Err(wrong(AuthorityError::Private));
            }
            check_spelling(jwk, "use", &["x509-svid", "jwt-svid"]).map_err(wrong)?;
            match jwk.get("use").and_then(Value::as_str) {
                Some("x509-svid") => {
                    let Some(der) = certificate(jwk).map_err(wrong)? else {
                        passed_over.note(at, "kty");
                        continue;
                    };
                    if !x509_authorities.contains(&der) {
                        x509_authorities.push(der);
                    }
                }
                Some("jwt-svid") => {
                    let Some((kid, key)) = jwt_key(jwk).map_err(wrong)? else {
                        passed_over.note(at, "kty");
                        continue;
                    };
                    if *jwt_keys.entry(kid).or_insert_with(|| key.clone()) != key {
                        return Err(wrong(AuthorityError::DuplicateKid(kid.to_owned())));
                    }
                }
                // A use of the standard's, and not of this agent's.
                Some("wit-svid") => {}
                _ => passed_over.note(at, "use"),
            }
        }
        if x509_authorities.is_empty() && jwt_keys.is_empty() {
            return Err(BundleError::NoAuthority(keys.len()));
        }
        let authority = |(kid, key): (&str, _)| JwtAuthority { kid: kid.into(), key, not_after: None };
        let bundle = Self {
            trust_domain: trust_domain.clone(),
            x509_authorities,
            jwt_authorities: jwt_keys.into_iter().map(authority).collect(),
        };
        Ok((bundle, passed_over))
    }

    /// The bundle of these authorities: CA certificates in DER, of which the same twice counts once, and JWT keys.
    ///
    /// # Errors
    /// [`BundleError`] with the index of the first certificate that is none, or not a CA's, or of the first key whose name
    /// another one has.
    pub fn of_authorities(
        trust_domain: &TrustDomain,
        certificates: impl IntoIterator<Item = Vec<u8>>,
        keys: impl IntoIterator<Item = JwtAuthority>,
    ) -> Result<Self, BundleError> {
        let mut x509_authorities = Vec::new();
        for (at, der) in certificates.into_iter().enumerate() {
            if at >= MAX_KEYS {
                return Err(BundleError::TooManyKeys);
            }
            check_ca(&der).map_err(|reason| BundleError::Certificate { at, reason })?;
            if !x509_authorities.contains(&der) {
                x509_authorities.push(der);
            }
        }
        let mut jwt_authorities: BTreeMap<Box<str>, JwtAuthority> = BTreeMap::new();
        for (at, authority) in keys.into_iter().enumerate() {
            if at >= MAX_KEYS {
                return Err(BundleError::TooManyKeys);
            }
            let before = jwt_authorities.insert(authority.kid.clone(), authority.clone());
            if before.is_some_and(|before| before.key != authority.key) {
                let reason = AuthorityError::DuplicateKid(authority.kid.into());
                return Err(BundleError::Key { at, reason });
            }
        }
        let jwt_authorities = jwt_authorities.into_values().collect();
        Ok(Self { trust_domain: trust_domain.clone(), x509_authorities, jwt_authorities })
    }

    /// Whether an X.509-SVID of a member can be verified.
    pub fn has_x509(&self) -> bool {
        !self.x509_authorities.is_empty()
    }

    /// The X.509 authorities, DER, one after the other: what the Workload API calls a bundle.
    pub fn x509_der(&self) -> Vec<u8> {
        self.x509_authorities.concat()
    }

    /// The JWT key of this name.
    pub fn jwt_key(&self, kid: &str) -> Option<&JwtPublicKey> {
        self.jwt_authorities.iter().find(|authority| *authority.kid == *kid).map(|authority| &authority.key)
    }

    /// The JWT keys as a JWK set, in the form that spire-agent's FetchJWTBundles has, but sorted by `kid`: neither
    /// `use` nor `alg`, an indent of four spaces, `"keys": []` when there is none.
    pub fn jwks(&self) -> String {
        pretty(&JwkSet { spiffe_sequence: None, spiffe_refresh_hint: None, keys: self.jwt_jwks(None) })
    }

    /// The whole bundle as the SPIFFE Trust Domain and Bundle standard has it, for other trust domains to federate
    /// with: certificates in the issuer's order, then JWT keys sorted by `kid`; and what is known of `edition`.
    ///
    /// # Errors
    /// [`BundleError::Certificate`] when an authority is no certificate of an EC or RSA key.
    pub fn to_spiffe_json(&self, edition: Option<Edition>) -> Result<String, BundleError> {
        let mut keys = Vec::with_capacity(self.x509_authorities.len() + self.jwt_authorities.len());
        for (at, der) in self.x509_authorities.iter().enumerate() {
            let key = public_key(der).map_err(|reason| BundleError::Certificate { at, reason })?;
            let (key, x5c) = (Cow::Owned(key), Some(STANDARD.encode(der)));
            keys.push(Jwk { key_use: Some("x509-svid"), kid: None, key, x5c });
        }
        keys.extend(self.jwt_jwks(Some("jwt-svid")));
        Ok(pretty(&JwkSet {
            spiffe_sequence: edition.map(|it| it.sequence),
            spiffe_refresh_hint: edition.map(|it| it.refresh_hint.as_secs()),
            keys,
        }))
    }

    fn jwt_jwks(&self, key_use: Option<&'static str>) -> Vec<Jwk<'_>> {
        let mut sorted: Vec<&JwtAuthority> = self.jwt_authorities.iter().collect();
        sorted.sort_by(|a, b| a.kid.cmp(&b.kid));
        sorted
            .into_iter()
            .map(|it| Jwk { key_use, kid: Some(&it.kid), key: Cow::Borrowed(&it.key), x5c: None })
            .collect()
    }
}

fn check_len(bundle: &[u8]) -> Result<(), BundleError> {
    if bundle.len() > MAX_LEN { Err(BundleError::TooLong(bundle.len())) } else { Ok(()) }
}

/// The one certificate that `der` is.
fn parse_certificate(der: &[u8]) -> Result<X509Certificate<'_>, AuthorityError> {
    match x509_parser::parse_x509_certificate(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(AuthorityError::NotCertificate),
    }
}

/// Checks that `der` is one certificate, and a CA's (X509-SVID, section 4.1).
fn check_ca(der: &[u8]) -> Result<(), AuthorityError> {
    if parse_certificate(der)?.is_ca() { Ok(()) } else { Err(AuthorityError::NotCa) }
}

fn public_key(der: &[u8]) -> Result<JwtPublicKey, AuthorityError> {
    Ok(JwtPublicKey::of_spki(parse_certificate(der)?.public_key())?)
}

/// Checks that the member `name` does not differ from one of `known` in case, or in spaces around it, alone: nobody means a
/// key to be passed over for that.
fn check_spelling(
    jwk: &Map<String, Value>,
    name: &'static str,
    known: &[&'static str],
) -> Result<(), AuthorityError> {
    let Some(got) = jwk.get(name).and_then(Value::as_str) else { return Ok(()) };
    match known.iter().find(|want| got != **want && got.trim().eq_ignore_ascii_case(want)) {
        Some(want) => Err(AuthorityError::Misspelt { name, got: got.to_owned(), want }),
        None => Ok(()),
    }
}

/// `kid` and key of a `jwt-svid` key; `None` when its `kty` is unknown.
fn jwt_key(jwk: &Map<String, Value>) -> Result<Option<(&str, JwtPublicKey)>, AuthorityError> {
    check_spelling(jwk, "kty", &["EC", "RSA"])?;
    let Some(key) = JwtPublicKey::of_jwk(jwk)? else { return Ok(None) };
    Ok(Some((text(jwk, "kid")?, key)))
}

/// The certificate of an `x509-svid` key; `None` when its `kty` is unknown. OKP is known here: an Ed25519 authority
/// is passed on to workloads, which may know how to use it.
fn certificate(jwk: &Map<String, Value>) -> Result<Option<Vec<u8>>, AuthorityError> {
    check_spelling(jwk, "kty", &["EC", "RSA", "OKP"])?;
    if !matches!(text(jwk, "kty")?, "EC" | "RSA" | "OKP") {
        return Ok(None);
    }
    let x5c = jwk.get("x5c").ok_or(KeyError::Missing("x5c"))?.as_array().ok_or(AuthorityError::X5cType)?;
    let [x5c] = x5c.as_slice() else { return Err(AuthorityError::X5cLen(x5c.len())) };
    let x5c = x5c.as_str().ok_or(KeyError::NotText("x5c"))?;
    let der = STANDARD.decode(x5c).map_err(|reason| KeyError::Base64("x5c", reason))?;
    check_ca(&der)?;
    Ok(Some(der))
}

#[derive(Serialize)]
struct JwkSet<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_sequence: Option<u64>,
    /// In seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    spiffe_refresh_hint: Option<u64>,
    keys: Vec<Jwk<'a>>,
}

fn pretty(set: &JwkSet<'_>) -> String {
    let mut text = Vec::new();
    let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    set.serialize(&mut serde_json::Serializer::with_formatter(&mut text, indent))
        .expect("a Vec takes any text");
    String::from_utf8(text).expect("serde_json writes UTF-8")
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

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        encoding::AsDer as _,
        rsa,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
    };
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use proptest::prelude::*;
    use rcgen::PublicKeyData as _;
    use serde_json::json;

    use super::*;

    fn td() -> TrustDomain {
        TrustDomain::parse("example.org").unwrap()
    }

    fn ca_with(key: &rcgen::KeyPair, is_ca: rcgen::IsCa) -> rcgen::Certificate {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = is_ca;
        params.self_signed(key).unwrap()
    }

    fn ca() -> rcgen::Certificate {
        let key = rcgen::KeyPair::generate().unwrap();
        ca_with(&key, rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained))
    }

    fn ec_spki() -> Vec<u8> {
        let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
        key.public_key().as_der().unwrap().as_ref().to_vec()
    }

    fn jwk(key_use: &str, kid: Option<&str>, key: &JwtPublicKey) -> Value {
        let mut jwk =
            serde_json::to_value(Jwk { key_use: None, kid, key: Cow::Borrowed(key), x5c: None }).unwrap();
        jwk["use"] = json!(key_use);
        jwk
    }

    fn with(mut jwk: Value, member: &str, value: Value) -> Value {
        jwk[member] = value;
        jwk
    }

    fn without(mut jwk: Value, member: &str) -> Value {
        jwk.as_object_mut().unwrap().remove(member);
        jwk
    }

    #[test]
    fn parse_pem_takes_ca_certificates_only() {
        let key = rcgen::KeyPair::generate().unwrap();
        let (one, two) = (ca(), ca());
        let leaf = ca_with(&key, rcgen::IsCa::ExplicitNoCa).pem();
        let (pem1, pem2) = (one.pem(), two.pem());
        let header = "-----BEGIN CERTIFICATE-----\n";
        let wrong = "line 11: not a PEM block";
        for (case, text, want) in [
            ("one", pem1.clone(), Ok(1)),
            ("two with words between", format!("# root\n{pem1}old:\n{pem2}"), Ok(2)),
            ("the same twice", format!("{pem1}{pem1}"), Ok(1)),
            ("line ends of Windows", pem1.replace('\n', "\r\n"), Ok(1)),
            ("glued to the last", format!("{}{pem2}", pem1.trim_end()), Err("line 10: -----BEGIN must be")),
            (
                "a byte order mark",
                format!("\u{feff}{pem1}"),
                Err("a byte order mark stands before -----BEGIN"),
            ),
            ("empty", String::new(), Err("no PEM block")),
            ("words", "no certificates here".into(), Err("no PEM block")),
            ("leaf", format!("{pem1}{leaf}"), Err("line 11: not a CA certificate")),
            (
                "private key",
                format!("{pem1}{}", key.serialize_pem()),
                Err("line 11: type is \"PRIVATE KEY\""),
            ),
            ("not base64", format!("{pem1}{header}*\n-----END CERTIFICATE-----\n"), Err(wrong)),
            ("cut", format!("{pem1}{header}"), Err(wrong)),
            (
                "not DER",
                format!("{pem1}{header}AAAA\n-----END CERTIFICATE-----\n"),
                Err("not a DER certificate"),
            ),
            (
                "too long",
                "x".repeat(MAX_LEN + 1),
                Err("bundle has 1048577 bytes, but can have at most 1048576"),
            ),
        ] {
            match (Bundle::parse_pem(&td(), text.as_bytes()), want) {
                (Ok(bundle), Ok(number)) => {
                    let all = [one.der().to_vec(), two.der().to_vec()];
                    assert_eq!(bundle.x509_authorities, all[..number], "{case}");
                    assert_eq!(bundle.x509_der(), all[..number].concat(), "{case}");
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{case}: {error}"),
                (got, want) => panic!("{case}: {got:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn parse_spiffe_names_the_key_that_is_wrong() {
        let ca = ca();
        let x5c = STANDARD.encode(ca.der());
        let leaf = ca_with(&rcgen::KeyPair::generate().unwrap(), rcgen::IsCa::ExplicitNoCa);
        let ca_jwk = json!({"use": "x509-svid", "kty": "EC", "x5c": [x5c]});
        let key = JwtPublicKey::from_spki(&ec_spki()).unwrap();
        let other = JwtPublicKey::from_spki(&ec_spki()).unwrap();
        let jwt = || jwk("jwt-svid", Some("k1"), &key);
        let rsa = |n: &[u8], e: &[u8]| {
            let (n, e) = (URL_SAFE_NO_PAD.encode(n), URL_SAFE_NO_PAD.encode(e));
            json!({"use": "jwt-svid", "kid": "r", "kty": "RSA", "n": n, "e": e})
        };
        let (f3, ok) = ([1, 0, 1], [0xff; 256]);
        for (case, second, want) in [
            ("jwt key", jwt(), Ok((1, 1))),
            ("the same certificate again", ca_jwk.clone(), Ok((1, 0))),
            ("rsa key", rsa(&ok, &f3), Ok((1, 1))),
            ("rsa key, leading zero", rsa(&[&[0], &ok[..]].concat(), &[0, 1, 0, 1]), Ok((1, 1))),
            ("unknown members", with(jwt(), "alg", json!(5)), Ok((1, 1))),
            ("unknown use", with(jwt(), "use", json!("wit-svid")), Ok((1, 0))),
            (
                "use in another case",
                with(ca_jwk.clone(), "use", json!("X509-SVID")),
                Err("\"use\" is \"X509-SVID\", but must be x509-svid, written like this"),
            ),
            ("use with a space", with(jwt(), "use", json!("jwt-svid ")), Err("but must be jwt-svid")),
            (
                "kty in another case",
                with(jwt(), "kty", json!("ec")),
                Err("\"kty\" is \"ec\", but must be EC"),
            ),
            (
                "kty of a certificate in another case",
                with(ca_jwk.clone(), "kty", json!("ec")),
                Err("\"kty\" is \"ec\", but must be EC"),
            ),
            ("no use", without(jwt(), "use"), Ok((1, 0))),
            ("use of another type", with(jwt(), "use", json!(1)), Ok((1, 0))),
            ("unknown kty", json!({"use": "jwt-svid", "kid": "o", "kty": "OKP", "x": 7}), Ok((1, 0))),
            ("unknown kty of a certificate", json!({"use": "x509-svid", "kty": "AKP"}), Ok((1, 0))),
            ("no kid", without(jwt(), "kid"), Err("\"kid\" is missing")),
            ("empty kid", with(jwt(), "kid", json!("")), Err("\"kid\" must be a non-empty string")),
            ("kid of another type", with(jwt(), "kid", json!(7)), Err("\"kid\" must be a non-empty string")),
            ("no kty", without(jwt(), "kty"), Err("\"kty\" is missing")),
            ("no x", without(jwt(), "x"), Err("\"x\" is missing")),
            (
                "unknown crv",
                with(jwt(), "crv", json!("secp256k1")),
                Err("\"crv\" is \"secp256k1\", but must be"),
            ),
            (
                "other crv",
                with(jwt(), "crv", json!("P-384")),
                Err("\"x\" has 32 bytes, but a coordinate of P-384 has 48"),
            ),
            ("padded x", with(jwt(), "x", json!(format!("{}=", "A".repeat(43)))), Err("\"x\" is not base64")),
            ("not on the curve", with(jwt(), "y", json!("A".repeat(43))), Err("not a point on P-256")),
            ("short modulus", rsa(&[0xff; 128], &f3), Err("RSA modulus has 1024 bits")),
            ("long modulus", rsa(&[0xff; 1025], &f3), Err("RSA modulus has 8200 bits")),
            (
                "even modulus",
                rsa(&[0xfe; 256], &f3),
                Err("RSA modulus has 2048 bits, but must have 2048 to 8192 and be odd"),
            ),
            ("modulus zero", rsa(&[0; 256], &f3), Err("RSA modulus has 0 bits")),
            ("exponent 1", rsa(&ok, &[1]), Err("RSA exponent")),
            ("even exponent", rsa(&ok, &[2]), Err("RSA exponent")),
            ("huge exponent", rsa(&ok, &[0xff; 300]), Err("RSA exponent")),
            ("no x5c", without(ca_jwk.clone(), "x5c"), Err("\"x5c\" is missing")),
            (
                "empty x5c",
                with(ca_jwk.clone(), "x5c", json!([])),
                Err("\"x5c\" must be an array with exactly one certificate, but has 0"),
            ),
            ("two in x5c", with(ca_jwk.clone(), "x5c", json!([x5c, x5c])), Err("but has 2")),
            ("x5c text", with(ca_jwk.clone(), "x5c", json!(x5c)), Err("\"x5c\" must be an array")),
            (
                "x5c number",
                with(ca_jwk.clone(), "x5c", json!([1])),
                Err("\"x5c\" must be a non-empty string"),
            ),
            ("x5c not base64", with(ca_jwk.clone(), "x5c", json!(["*"])), Err("\"x5c\" is not base64")),
            ("x5c not DER", with(ca_jwk.clone(), "x5c", json!(["AAAA"])), Err("not a DER certificate")),
            (
                "x5c leaf",
                with(ca_jwk.clone(), "x5c", json!([STANDARD.encode(leaf.der())])),
                Err("not a CA certificate"),
            ),
            ("private", with(jwt(), "d", json!("AAAA")), Err("\"d\" is a private key")),
            ("private, and not used", json!({"d": "AAAA"}), Err("\"d\" is a private key")),
            ("no object", json!("key"), Err("must be a JSON object")),
        ] {
            let text = json!({"keys": [ca_jwk, second], "spiffe_sequence": 1}).to_string();
            match (Bundle::parse_spiffe(&td(), text.as_bytes()), want) {
                (Ok(bundle), Ok((x509, jwt))) => {
                    assert_eq!(
                        (bundle.x509_authorities.len(), bundle.jwt_authorities.len()),
                        (x509, jwt),
                        "{case}"
                    );
                    assert_eq!(bundle.trust_domain, td(), "{case}");
                }
                (Err(error), Err(part)) => {
                    let error = error.to_string();
                    assert!(error.starts_with("keys[1]: ") && error.contains(part), "{case}: {error}");
                }
                (got, want) => panic!("{case}: {got:?}, not {want:?}"),
            }
        }

        let same_kid = json!({"keys": [jwt(), jwt(), jwk("jwt-svid", Some("k1"), &other)]}).to_string();
        let error = Bundle::parse_spiffe(&td(), same_kid.as_bytes()).unwrap_err().to_string();
        assert_eq!(error, "keys[2]: another key has the same \"kid\" \"k1\"");
        let same = json!({"keys": [jwt(), jwt()]}).to_string();
        assert_eq!(Bundle::parse_spiffe(&td(), same.as_bytes()).unwrap().jwt_key("k1"), Some(&key));
    }

    #[test]
    fn parse_spiffe_bounds_and_checks_the_document() {
        let many = |number| format!("{{\"keys\":[{}]}}", vec!["{}"; number].join(","));
        for (case, text, want) in [
            ("none", r#"{"keys":[]}"#.to_owned(), "none of its 0 keys has a \"use\""),
            ("as many as can be", many(MAX_KEYS), "none of its 1000 keys has a \"use\""),
            ("one more", many(MAX_KEYS + 1), "bundle has more than 1000 keys"),
            ("no keys", "{}".into(), "an array \"keys\""),
            ("keys of another type", r#"{"keys":{}}"#.into(), "an array \"keys\""),
            ("no object", "[]".into(), "an array \"keys\""),
            ("keys twice", r#"{"keys":[],"keys":[]}"#.into(), "duplicate key \"keys\""),
            ("kid twice", r#"{"keys":[{"kid":"a","kid":"b"}]}"#.into(), "duplicate key \"kid\""),
            ("not JSON", "-----BEGIN CERTIFICATE-----".into(), "bundle is not valid JSON"),
            ("empty", String::new(), "bundle is not valid JSON"),
            ("too long", " ".repeat(MAX_LEN + 1), "bundle has 1048577 bytes"),
        ] {
            let error = Bundle::parse_spiffe(&td(), text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{case}: {error}");
        }
    }

    #[test]
    fn a_json_text_of_an_editor_that_saves_otherwise_is_named_as_that() {
        let wide: Vec<u8> = "{\"keys\": []}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for text in [[&[0xff, 0xfe], &*wide].concat(), wide] {
            assert!(matches!(Bundle::parse_spiffe(&td(), &text), Err(BundleError::Wide(WideText::Utf16))));
        }
        let marked = Bundle::parse_spiffe(&td(), "\u{feff}{\"keys\": []}".as_bytes());
        assert!(matches!(marked, Err(BundleError::Marked)));
    }

    #[test]
    fn jwks_is_what_spire_agent_sends() {
        let authority = |kid: &str, key| JwtAuthority { kid: kid.into(), key, not_after: None };
        let ec = JwtPublicKey::Ec { crv: "P-256".into(), x: "xx".into(), y: "yy".into() };
        let rsa = JwtPublicKey::Rsa { n: "nn".into(), e: "AQAB".into() };
        let bundle = Bundle {
            trust_domain: td(),
            x509_authorities: vec![vec![1]],
            jwt_authorities: vec![authority("b", rsa), authority("a", ec)],
        };
        let want = concat!(
            "{\n    \"keys\": [\n        {\n            \"kty\": \"EC\",\n            \"kid\": \"a\",\n",
            "            \"crv\": \"P-256\",\n            \"x\": \"xx\",\n            \"y\": \"yy\"\n        },\n",
            "        {\n            \"kty\": \"RSA\",\n            \"kid\": \"b\",\n            \"n\": \"nn\",\n",
            "            \"e\": \"AQAB\"\n        }\n    ]\n}"
        );
        assert_eq!(bundle.jwks(), want);
        let empty = Bundle { jwt_authorities: Vec::new(), ..bundle };
        assert_eq!(empty.jwks(), "{\n    \"keys\": []\n}");
        let error = empty.to_spiffe_json(None).unwrap_err().to_string();
        assert_eq!(error, "certificate 0: not a DER certificate");
    }

    #[test]
    fn a_bundle_survives_the_way_through_json() {
        let rsa_key = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
        let rsa_spki: Vec<u8> = rsa_key.public_key().as_der().unwrap().as_ref().to_vec();
        let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let is_ca = || rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = |kid: &str, spki: &[u8]| JwtAuthority {
            kid: kid.into(),
            key: JwtPublicKey::from_spki(spki).unwrap(),
            not_after: None,
        };
        let bundle = Bundle {
            trust_domain: td(),
            x509_authorities: vec![ca().der().to_vec(), ca_with(&p384, is_ca()).der().to_vec()],
            jwt_authorities: vec![authority("a<b", &ec_spki()), authority("r", &rsa_spki)],
        };
        let json = bundle.to_spiffe_json(None).unwrap();
        assert!(
            json.starts_with("{\n    \"keys\": [\n        {\n            \"use\": \"x509-svid\",\n"),
            "{json}"
        );
        assert_eq!(Bundle::parse_spiffe(&td(), json.as_bytes()).unwrap(), bundle);
        let x5c = serde_json::from_str::<Value>(&json).unwrap()["keys"][0]["x5c"][0].clone();
        assert_eq!(x5c, json!(STANDARD.encode(&bundle.x509_authorities[0])));

        let without_use = Bundle::parse_spiffe(&td(), bundle.jwks().as_bytes());
        assert!(matches!(without_use, Err(BundleError::NoAuthority(2))), "{without_use:?}");
    }

    #[test]
    fn from_spki_takes_keys_that_sign_jwt_svids() {
        let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().subject_public_key_info();
        let spki = ec_spki();
        for (case, der) in [
            ("Ed25519", ed25519),
            ("empty", Vec::new()),
            ("cut", spki[..spki.len() - 1].to_vec()),
            ("followed by more", [&spki[..], &[0]].concat()),
        ] {
            let error = JwtPublicKey::from_spki(&der).unwrap_err().to_string();
            assert_eq!(error, "public key must be RSA, or EC on P-256, P-384 or P-521", "{case}");
        }
        assert!(
            matches!(JwtPublicKey::from_spki(&spki), Ok(JwtPublicKey::Ec { crv, .. }) if &*crv == "P-256")
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..256), at in 0_usize..2000) {
            let td = td();
            let _ = Bundle::parse_pem(&td, &bytes).is_ok();
            let _ = Bundle::parse_spiffe(&td, &bytes).is_ok();
            let _ = JwtPublicKey::from_spki(&bytes).is_ok();
            let mut pem = PEM.to_vec();
            let at = at % pem.len();
            pem.splice(at..at, bytes);
            let _ = Bundle::parse_pem(&td, &pem).is_ok();
        }
    }

    const PEM: &[u8] = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
}
