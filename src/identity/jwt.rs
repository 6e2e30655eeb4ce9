//! JWT-SVIDs of others: parsing and validation.
//!
//! A token is text from a stranger. At most [`MAX_LEN`] bytes of it are looked at, and only the compact form: what
//! base64url, JSON or JWS would let two readers see differently (padding, stray bits, white space, a member named
//! twice, `crit`) is refused before jsonwebtoken reads it and verifies its signature. The key comes from the bundle of
//! the trust domain that `sub` names and from nowhere else; what the header says of keys (`jwk`, `x5c`, `jku`) is not
//! used. Until the signature is verified, the claims are used for nothing but to find that key.
//!
//! Order and texts are spire-agent's (`pkg/common/jwtsvid/validate.go`, go-jose), since people search for them. As
//! there, `kid` is needed though JWT-SVID, section 2.2, calls it optional, and the time checks have [`LEEWAY`]. Other than
//! there, `typ` is looked at (section 2.3): an access token or a WIT-SVID of the same keys is no JWT-SVID. What a text
//! repeats of the token is cut short.
//!
//! # Decisions
//! The rules on claims are ours: jsonwebtoken reads the clock itself, checks in another order, and takes a token
//! without `aud`. ES512, which it does not know, is verified by aws-lc-rs.

use std::{
    collections::HashSet,
    fmt::Write as _,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::signature::{ECDSA_P521_SHA512_FIXED, UnparsedPublicKey};
use base64::{DecodeError, Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, errors::ErrorKind};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::{
    Bundle, SpiffeId, TrustDomain,
    json::{self, Quoted},
    jwk::JwtPublicKey,
    spiffe_id::SpiffeIdError,
};

/// The longest token that is looked at, in bytes. A JWT-SVID with a 2048-byte SPIFFE ID, an RSA-4096 signature and
/// a hundred audiences has a tenth of it.
pub const MAX_LEN: usize = 64 * 1024;

/// How far the clocks of issuer and validator may be apart (go-jose's default).
pub const LEEWAY: Duration = Duration::from_secs(60);

/// The most JSON values of a header or of claims: they are parsed before anything is verified, so they must be cheap.
const MAX_VALUES: usize = 2048;

/// How many of a token's audiences an error repeats.
const AUDIENCES_SHOWN: usize = 4;

/// A JWT-SVID that was found valid.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// `sub`.
    pub spiffe_id: SpiffeId,
    /// All claims as the token has them, `sub` included.
    pub claims: Map<String, Value>,
}

/// Why a token is not valid. All are the caller's doing.
#[derive(Debug, thiserror::Error)]
pub enum JwtError {
    /// More than [`MAX_LEN`] bytes: not looked at.
    #[error("unable to parse JWT token: token has {0} bytes, but can have at most {MAX_LEN}")]
    TooLong(usize),
    /// Not a JWS in compact form, or not signed with an algorithm of JWT-SVID, section 2.1.
    #[error("unable to parse JWT token: {0}")]
    Parse(ParseError),
    /// The header names no key.
    #[error("token header missing key id")]
    NoKeyId,
    /// The payload is no JSON, or names a claim twice.
    #[error("token claims are not valid JSON: {0}")]
    ClaimsJson(serde_json::Error),
    /// The payload is JSON, but no object.
    #[error("token claims must be a JSON object")]
    ClaimsNotObject,
    /// A registered claim that must be a string, and is not.
    #[error("token claim \"{0}\" must be a string")]
    ClaimNotText(&'static str),
    /// `exp`, `nbf` or `iat` is no number.
    #[error("go-jose/go-jose/jwt: expected number value to unmarshal NumericDate")]
    ClaimNotDate,
    /// `aud` is neither a text nor an array of texts.
    #[error("go-jose/go-jose/jwt: expected string or array value to unmarshal to Audience")]
    ClaimNotAudience,
    /// No `sub`, or an empty one.
    #[error("token missing subject claim")]
    NoSubject,
    /// No `exp`.
    #[error("token missing exp claim")]
    NoExpiry,
    /// `sub` is no SPIFFE ID. The text has its mistake from SPIRE.
    #[error("token has in invalid subject claim: {0}")]
    Subject(SpiffeIdError),
    /// No bundle of this trust domain is known.
    #[error("no keys found for trust domain {:?}", .0.name())]
    NoBundle(TrustDomain),
    /// The bundle has no key of this name.
    #[error("public key {} not found in trust domain {:?}", Quoted(kid), trust_domain.name())]
    NoKey {
        /// `kid` of the token.
        kid: String,
        /// Of `sub`.
        trust_domain: TrustDomain,
    },
    /// `typ` is neither `JWT` nor `JOSE` (JWT-SVID, section 2.3).
    #[error("token header type is {}, but must be JWT or JOSE", Quoted(.0))]
    Type(String),
    /// The header asks for an extension to be understood (RFC 7515, section 4.1.11); none is.
    #[error("go-jose/go-jose: unsupported critical header")]
    Critical,
    /// The signature is not of this key, or the key is not of this algorithm.
    #[error("go-jose/go-jose: error in cryptographic primitive")]
    Signature,
    /// `aud` does not hold the audience.
    #[error("expected audience in [{}] (audience={got})", Quoted(want))]
    Audience {
        /// What the caller asked for.
        want: String,
        /// What the token has, as text.
        got: String,
    },
    /// `nbf` has not come.
    #[error("go-jose/go-jose/jwt: validation failed, token not valid yet (nbf)")]
    NotYetValid,
    /// `exp` has passed.
    #[error("token has expired")]
    Expired,
    /// `iat` has not come.
    #[error("go-jose/go-jose/jwt: validation field, token issued in the future (iat)")]
    IssuedInTheFuture,
}

/// Why a text is no JWS that may be looked at further.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// No characters.
    #[error("go-jose/go-jose: empty input")]
    Empty,
    /// Not three parts: a JSON serialization, an encrypted token, or no token.
    #[error("go-jose/go-jose: compact JWS format must have three parts")]
    Parts,
    /// A part is not base64url without padding, or its last character has bits that mean nothing.
    #[error("illegal base64 data at input byte {0}")]
    Base64(usize),
    /// The header is not JSON, names a member twice, or has one of another type than RFC 7515 asks for.
    #[error("header is not valid JSON: {0}")]
    HeaderJson(Arc<serde_json::Error>),
    /// The header is JSON, but no object.
    #[error("header must be a JSON object")]
    HeaderNotObject,
    /// `alg` is no text.
    #[error("failed to unmarshal algorithm: must be a string")]
    AlgorithmNotText,
    /// `kid` is no text.
    #[error("failed to unmarshal key ID: must be a string")]
    KeyIdNotText,
    /// `none`, an HMAC, or anything else that JWT-SVID does not allow.
    #[error("unexpected signature algorithm {}; expected [\"{}\"]", Quoted(.0), ALGORITHMS.join("\" \""))]
    Algorithm(String),
}

/// JWT-SVID, section 2.1, in SPIRE's order.
const ALGORITHMS: [&str; 9] =
    ["ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"];

/// Validates `token` for `audience` at the time `now`.
///
/// `bundle_of` is asked once, for the trust domain of `sub`; `None` says that its members are not trusted. An empty
/// `audience` is the caller's to refuse: here it is one that a token may hold.
///
/// # Errors
/// [`JwtError`] with the first rule that the token breaks, in spire-agent's order.
pub fn validate<'a>(
    token: &str,
    audience: &str,
    bundle_of: impl Fn(&TrustDomain) -> Option<&'a Bundle>,
    now: SystemTime,
) -> Result<Validated, JwtError> {
    if token.len() > MAX_LEN {
        return Err(JwtError::TooLong(token.len()));
    }
    let mut jws = Jws::parse(token).map_err(JwtError::Parse)?;
    if jws.kid.is_empty() {
        return Err(JwtError::NoKeyId);
    }
    if let Some(typ) = jws.typ.take().filter(|typ| !matches!(typ.as_str(), "JWT" | "JOSE")) {
        return Err(JwtError::Type(typ));
    }

    let Value::Object(claims) = json::parse(&jws.payload, MAX_VALUES).map_err(JwtError::ClaimsJson)? else {
        return Err(JwtError::ClaimsNotObject);
    };
    let registered = Registered::of(&claims)?;
    let subject = registered.sub.filter(|sub| !sub.is_empty()).ok_or(JwtError::NoSubject)?;
    let expires_at = registered.exp.ok_or(JwtError::NoExpiry)?;
    let spiffe_id = SpiffeId::parse(subject).map_err(JwtError::Subject)?;

    let trust_domain = spiffe_id.trust_domain();
    let Some(bundle) = bundle_of(&trust_domain) else { return Err(JwtError::NoBundle(trust_domain)) };
    let Some(key) = bundle.jwt_key(&jws.kid) else {
        return Err(JwtError::NoKey { kid: jws.kid, trust_domain });
    };
    if jws.critical {
        return Err(JwtError::Critical);
    }
    verify_signature(token, &jws, key)?;

    if !registered.aud.contains(&audience) {
        return Err(JwtError::Audience { want: audience.to_owned(), got: shown(&registered.aud) });
    }
    // In nanoseconds since 1970, which no date and no leeway can overflow.
    let now = nanos(now);
    let leeway = i128::try_from(LEEWAY.as_nanos()).unwrap_or_default();
    if registered.nbf.is_some_and(|not_before| now + leeway < not_before) {
        return Err(JwtError::NotYetValid);
    }
    if now - leeway > expires_at {
        return Err(JwtError::Expired);
    }
    if registered.iat.is_some_and(|issued_at| now + leeway < issued_at) {
        return Err(JwtError::IssuedInTheFuture);
    }
    Ok(Validated { spiffe_id, claims })
}

/// Takes all claims away but `sub`, `exp`, `aud` and those in `allowed` (`allowed_foreign_jwt_claims`): what a
/// workload learns from a token of a foreign trust domain.
pub fn restrict_foreign(claims: &mut Map<String, Value>, allowed: &[String]) {
    claims.retain(|claim, _| matches!(claim.as_str(), "sub" | "exp" | "aud") || allowed.contains(claim));
}

/// A JWS in compact form (RFC 7515, section 7.1), with nothing verified.
struct Jws<'a> {
    /// What the signature is over.
    signed: &'a str,
    /// One of [`ALGORITHMS`].
    alg: &'static str,
    kid: String,
    typ: Option<String>,
    critical: bool,
    payload: Vec<u8>,
    signature: Vec<u8>,
}

impl<'a> Jws<'a> {
    fn parse(token: &'a str) -> Result<Self, ParseError> {
        if token.is_empty() {
            return Err(ParseError::Empty);
        }
        let (signed, signature) = token.rsplit_once('.').ok_or(ParseError::Parts)?;
        let (header, payload) = signed.split_once('.').ok_or(ParseError::Parts)?;
        if payload.contains('.') {
            return Err(ParseError::Parts);
        }
        let header = decode(header)?;
        let payload = decode(payload)?;
        let signature = decode(signature)?;

        // An empty header is one without an algorithm.
        let header = if header.is_empty() { Value::Object(Map::new()) } else { parse_header(&header)? };
        let header = header.as_object().ok_or(ParseError::HeaderNotObject)?;
        let member = |name| match header.get(name) {
            None | Some(Value::Null) => Some(""),
            Some(value) => value.as_str(),
        };
        let kid = member("kid").ok_or(ParseError::KeyIdNotText)?.to_owned();
        let alg = member("alg").ok_or(ParseError::AlgorithmNotText)?;
        let allowed = ALGORITHMS.into_iter().find(|name| *name == alg);
        let alg = allowed.ok_or_else(|| ParseError::Algorithm(alg.to_owned()))?;
        let typ = header.get("typ").and_then(Value::as_str).map(str::to_owned);
        let critical = header.get("crit").is_some_and(|crit| !crit.is_null());
        Ok(Self { signed, alg, kid, typ, critical, payload, signature })
    }
}

fn decode(part: &str) -> Result<Vec<u8>, ParseError> {
    let place = |error| match error {
        DecodeError::InvalidByte(at, _) | DecodeError::InvalidLastSymbol(at, _) => at,
        DecodeError::InvalidLength(_) | DecodeError::InvalidPadding => part.len(),
    };
    URL_SAFE_NO_PAD.decode(part).map_err(|error| ParseError::Base64(place(error)))
}

fn parse_header(header: &[u8]) -> Result<Value, ParseError> {
    json::parse(header, MAX_VALUES).map_err(|error| ParseError::HeaderJson(Arc::new(error)))
}

/// Verifies that `token` was signed with the private key of `key`. A key of another kind or curve than the algorithm
/// asks for has signed nothing.
fn verify_signature(token: &str, jws: &Jws<'_>, key: &JwtPublicKey) -> Result<(), JwtError> {
    let Ok(algorithm) = jws.alg.parse::<Algorithm>() else { return verify_es512(jws, key) };
    let wrong = |error: jsonwebtoken::errors::Error| match error.into_kind() {
        // Of the header: the claims were parsed before.
        ErrorKind::Json(error) => JwtError::Parse(ParseError::HeaderJson(error)),
        _ => JwtError::Signature,
    };
    let key = match key {
        JwtPublicKey::Ec { x, y, .. } => DecodingKey::from_ec_components(x, y),
        JwtPublicKey::Rsa { n, e } => DecodingKey::from_rsa_components(n, e),
    };
    // The signature alone: the rules on claims are those of `validate`, by its clock.
    let validation = Validation {
        required_spec_claims: HashSet::new(),
        validate_exp: false,
        validate_aud: false,
        ..Validation::new(algorithm)
    };
    jsonwebtoken::decode::<IgnoredAny>(token, &key.map_err(wrong)?, &validation).map_err(wrong)?;
    Ok(())
}

fn verify_es512(jws: &Jws<'_>, key: &JwtPublicKey) -> Result<(), JwtError> {
    let JwtPublicKey::Ec { x, y, .. } = key else { return Err(JwtError::Signature) };
    let decoded = |coordinate: &str| URL_SAFE_NO_PAD.decode(coordinate).unwrap_or_default();
    let point = [&[4], decoded(x).as_slice(), decoded(y).as_slice()].concat();
    UnparsedPublicKey::new(&ECDSA_P521_SHA512_FIXED, point)
        .verify(jws.signed.as_bytes(), &jws.signature)
        .map_err(|_unspecified| JwtError::Signature)
}

/// The claims that decide. A `null` is a claim that is not there.
struct Registered<'a> {
    sub: Option<&'a str>,
    aud: Vec<&'a str>,
    /// This and the two below: nanoseconds since 1970.
    exp: Option<i128>,
    nbf: Option<i128>,
    iat: Option<i128>,
}

impl<'a> Registered<'a> {
    fn of(claims: &'a Map<String, Value>) -> Result<Self, JwtError> {
        let text = |name| match claims.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(JwtError::ClaimNotText(name)),
        };
        let date = |name| match claims.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Number(number)) => Ok(Some(i128::from(seconds(number)) * 1_000_000_000)),
            Some(_) => Err(JwtError::ClaimNotDate),
        };
        // They decide nothing, but spire-agent refuses a token in which they are no texts.
        text("iss")?;
        text("jti")?;
        let aud = match claims.get("aud") {
            None => Vec::new(),
            Some(Value::String(one)) => vec![one.as_str()],
            Some(Value::Array(several)) => {
                let texts: Option<_> = several.iter().map(Value::as_str).collect();
                texts.ok_or(JwtError::ClaimNotAudience)?
            }
            Some(Value::Null | Value::Bool(_) | Value::Number(_) | Value::Object(_)) => {
                return Err(JwtError::ClaimNotAudience);
            }
        };
        Ok(Self { sub: text("sub")?, aud, exp: date("exp")?, nbf: date("nbf")?, iat: date("iat")? })
    }
}

/// A NumericDate in whole seconds: a fraction is cut off, and what is out of range is as far away as can be.
fn seconds(date: &serde_json::Number) -> i64 {
    #[expect(
        clippy::as_conversions,
        reason = "cuts fractions and saturates, as the doc says; NaN cannot be JSON"
    )]
    date.as_i64().unwrap_or_else(|| date.as_f64().unwrap_or_default() as i64)
}

/// Nanoseconds since 1970; before it they are negative.
fn nanos(time: SystemTime) -> i128 {
    let nanos = |duration: Duration| i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => nanos(after),
        Err(before) => -nanos(before.duration()),
    }
}

/// A list of texts as Go shows it, cut short.
fn shown(texts: &[&str]) -> String {
    let mut shown = String::from("[");
    for (at, text) in texts.iter().take(AUDIENCES_SHOWN).enumerate() {
        let space = if at == 0 { "" } else { " " };
        write!(shown, "{space}{}", Quoted(text)).expect("a String takes any text");
    }
    shown.push_str(if texts.len() > AUDIENCES_SHOWN { " ...]" } else { "]" });
    shown
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use aws_lc_rs::{
        encoding::AsDer as _,
        rand::SystemRandom,
        rsa::KeySize,
        signature::{
            ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING,
            ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, KeyPair as _,
            RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384,
            RSA_PSS_SHA512, RsaKeyPair,
        },
    };
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::identity::bundle::JwtAuthority;

    /// When the tests take place, in seconds since 1970.
    const NOW: u64 = 1_700_000_000;

    enum Private {
        Ec(EcdsaKeyPair),
        Rsa(RsaKeyPair),
    }

    struct World {
        ec256: Private,
        ec384: Private,
        ec521: Private,
        rsa: Private,
        own: Bundle,
        foreign: Bundle,
    }

    static WORLD: LazyLock<World> = LazyLock::new(|| {
        let ec = |alg: &'static EcdsaSigningAlgorithm| Private::Ec(EcdsaKeyPair::generate(alg).unwrap());
        let ec256 = ec(&ECDSA_P256_SHA256_FIXED_SIGNING);
        let ec384 = ec(&ECDSA_P384_SHA384_FIXED_SIGNING);
        let ec521 = ec(&ECDSA_P521_SHA512_FIXED_SIGNING);
        let rsa = Private::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap());
        let foreign_key = ec(&ECDSA_P256_SHA256_FIXED_SIGNING);
        let bundle = |td: &str, keys: &[(&str, &Private)]| Bundle {
            trust_domain: TrustDomain::parse(td).unwrap(),
            x509_authorities: Vec::new(),
            jwt_authorities: keys
                .iter()
                .map(|(kid, key)| JwtAuthority { kid: (*kid).into(), key: key.public(), not_after: None })
                .collect(),
        };
        let keys = [("ec256", &ec256), ("ec384", &ec384), ("ec521", &ec521), ("rsa", &rsa)];
        let own = bundle("example.org", &keys);
        let foreign = bundle("other.org", &[("ec256", &foreign_key)]);
        World { ec256, ec384, ec521, rsa, own, foreign }
    });

    impl Private {
        fn public(&self) -> JwtPublicKey {
            let spki = match self {
                Self::Ec(key) => key.public_key().as_der().unwrap(),
                Self::Rsa(key) => key.public_key().as_der().unwrap(),
            };
            JwtPublicKey::from_spki(spki.as_ref()).unwrap()
        }

        fn sign(&self, alg: &str, message: &[u8]) -> Vec<u8> {
            let random = SystemRandom::new();
            match self {
                Self::Ec(key) => key.sign(&random, message).unwrap().as_ref().to_vec(),
                Self::Rsa(key) => {
                    let padding = match alg {
                        "RS384" => &RSA_PKCS1_SHA384,
                        "RS512" => &RSA_PKCS1_SHA512,
                        "PS256" => &RSA_PSS_SHA256,
                        "PS384" => &RSA_PSS_SHA384,
                        "PS512" => &RSA_PSS_SHA512,
                        _ => &RSA_PKCS1_SHA256,
                    };
                    let mut signature = vec![0; key.public_modulus_len()];
                    key.sign(padding, &random, message, &mut signature).unwrap();
                    signature
                }
            }
        }
    }

    /// A token of these texts, whatever they are.
    fn token_of(key: &Private, header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let alg = header.split('"').nth(3).unwrap_or_default();
        let signature = key.sign(alg, signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn es256(claims: &str) -> String {
        token_of(&WORLD.ec256, r#"{"alg":"ES256","kid":"ec256","typ":"JWT"}"#, claims)
    }

    fn good_claims() -> Value {
        json!({"sub": "spiffe://example.org/web", "aud": ["api", "db"], "exp": NOW + 300, "iat": NOW})
    }

    fn good_with(claim: &str, value: Value) -> String {
        let mut claims = good_claims();
        claims[claim] = value;
        claims.to_string()
    }

    fn good_without(claim: &str) -> String {
        let mut claims = good_claims();
        claims.as_object_mut().unwrap().remove(claim);
        claims.to_string()
    }

    fn validate_at(token: &str, audience: &str, now: u64) -> Result<Validated, JwtError> {
        let world = &*WORLD;
        let bundle_of =
            |td: &TrustDomain| [&world.own, &world.foreign].into_iter().find(|b| b.trust_domain == *td);
        validate(token, audience, bundle_of, UNIX_EPOCH + Duration::from_secs(now))
    }

    /// Without the place in the JSON, which is serde_json's.
    fn outcome(token: &str) -> Result<(), String> {
        let text = |error: JwtError| error.to_string().split(" at line ").next().unwrap().to_owned();
        validate_at(token, "api", NOW).map(|_| ()).map_err(text)
    }

    #[test]
    fn every_algorithm_of_the_standard_validates_with_its_key_alone() {
        let world = &*WORLD;
        let keys =
            [("ec256", &world.ec256), ("ec384", &world.ec384), ("ec521", &world.ec521), ("rsa", &world.rsa)];
        let claims = good_claims();
        for alg in ALGORITHMS {
            let fitting = match alg {
                "ES256" => "ec256",
                "ES384" => "ec384",
                "ES512" => "ec521",
                _ => "rsa",
            };
            for (kid, key) in keys {
                let token =
                    token_of(key, &format!(r#"{{"alg":"{alg}","kid":"{kid}"}}"#), &claims.to_string());
                let want = if kid == fitting { Ok(()) } else { Err(JwtError::Signature.to_string()) };
                assert_eq!(outcome(&token), want, "{alg} with {kid}");
            }
        }
        let valid = validate_at(&es256(&claims.to_string()), "db", NOW).unwrap();
        assert_eq!(valid.spiffe_id.as_str(), "spiffe://example.org/web");
        assert_eq!(Value::Object(valid.claims), claims);
    }

    #[test]
    fn signatures_of_the_standard_verify() {
        // RFC 7515, appendices A.3 and A.4.
        for (case, key, alg, signed, signature) in [
            (
                "A.3",
                (
                    "P-256",
                    "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
                    "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
                ),
                "ES256",
                concat!(
                    "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0",
                    "dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
                ),
                "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
            ),
            (
                "A.4",
                (
                    "P-521",
                    concat!(
                        "AekpBQ8ST8a8VcfVOTNl353vSrDCLLJXmPk06wTjxrrjcBpXp5EOnYG_NjFZ6OvLFV1j",
                        "SfS9tsz4qUxcWceqwQGk"
                    ),
                    concat!(
                        "ADSmRA43Z1DSNx_RvcLI87cdL07l6jQyyBXMoxVg_l2Th-x3S1WDhjDly79ajL4Kkd0A",
                        "ZMaZmh9ubmf63e3kyMj2"
                    ),
                ),
                "ES512",
                "eyJhbGciOiJFUzUxMiJ9.UGF5bG9hZA",
                concat!(
                    "AdwMgeerwtHoh-l192l60hp9wAHZFVJbLfD_UxMi70cwnZOYaRI1bKPWROc-mZZqwqT2SI-KGDKB34XO0aw_",
                    "7XdtAG8GaSwFKdCAPZgoXD2YBJZCPEX3xKpRwcdOO8KpEHwJjyqOgzDO7iKvU8vcnwNrmxYbSW9ERBXukOXo",
                    "lLzeO_Jn"
                ),
            ),
        ] {
            let key = JwtPublicKey::Ec { crv: key.0.into(), x: key.1.into(), y: key.2.into() };
            // The payload of A.4 is no JSON, which is an error of its own once the signature is right.
            let is_signed = |token: &str| {
                let jws = Jws::parse(token).unwrap();
                assert_eq!(jws.alg, alg, "{case}");
                !matches!(verify_signature(token, &jws, &key), Err(JwtError::Signature))
            };
            assert!(is_signed(&format!("{signed}.{signature}")), "{case}");
            let (header, _) = signed.split_once('.').unwrap();
            assert!(!is_signed(&format!("{header}.e30.{signature}")), "{case}, another message");
        }
    }

    #[test]
    fn a_text_that_is_no_jws_is_refused_as_spire_does() {
        let good = es256(&good_claims().to_string());
        let (signed, signature) = good.rsplit_once('.').unwrap();
        let (header, claims) = signed.split_once('.').unwrap();
        let with_header = |text: &str| format!("{}.{claims}.{signature}", URL_SAFE_NO_PAD.encode(text));
        let bytes_as_header = format!("{}.{claims}.{signature}", URL_SAFE_NO_PAD.encode([b'"', 0xff, b'"']));
        let algorithms = r#"["ES256" "ES384" "ES512" "RS256" "RS384" "RS512" "PS256" "PS384" "PS512"]"#;
        let unexpected =
            |alg: &str| format!("unexpected signature algorithm \"{alg}\"; expected {algorithms}");
        let parts = "go-jose/go-jose: compact JWS format must have three parts".to_owned();
        let json = |at: &str| format!("header is not valid JSON: {at}");
        for (case, token, want) in [
            ("empty", String::new(), "go-jose/go-jose: empty input".into()),
            ("one part", "abc".into(), parts.clone()),
            ("two parts", format!("{header}.{claims}"), parts.clone()),
            ("four parts", format!("{good}.x"), parts.clone()),
            ("five parts, as an encrypted token has", "a.b.c.d.e".into(), parts.clone()),
            ("dots", "..".into(), unexpected("")),
            ("JSON serialization", format!("{{\"payload\":\"{claims}\"}}"), parts),
            ("header not base64", format!("*{good}"), "illegal base64 data at input byte 0".into()),
            (
                "header padded",
                format!("{header}=.{claims}.{signature}"),
                "illegal base64 data at input byte 56".into(),
            ),
            (
                "claims in base64 with +",
                format!("{header}.ab+d.{signature}"),
                "illegal base64 data at input byte 2".into(),
            ),
            ("white space", format!("{good}\n"), "illegal base64 data at input byte 86".into()),
            ("white space before", format!(" {good}"), "illegal base64 data at input byte 0".into()),
            (
                "stray bits",
                format!("{signed}.{}", signature.get(..85).unwrap().to_owned() + "B"),
                "illegal base64 data at input byte 85".into(),
            ),
            ("header no JSON", with_header("alg"), json("expected value")),
            ("header no UTF-8", bytes_as_header, json("invalid unicode code point")),
            ("header no object", with_header("[]"), "header must be a JSON object".into()),
            (
                "alg twice",
                with_header(r#"{"alg":"none","kid":"ec256","alg":"ES256"}"#),
                json("duplicate key \"alg\" in object"),
            ),
            ("no alg", with_header(r#"{"kid":"ec256"}"#), unexpected("")),
            ("alg null", with_header(r#"{"alg":null}"#), unexpected("")),
            (
                "alg number",
                with_header(r#"{"alg":1}"#),
                "failed to unmarshal algorithm: must be a string".into(),
            ),
            ("none", with_header(r#"{"alg":"none"}"#), unexpected("none")),
            ("none in another case", with_header(r#"{"alg":"nOnE"}"#), unexpected("nOnE")),
            ("HMAC", with_header(r#"{"alg":"HS256","kid":"ec256"}"#), unexpected("HS256")),
            ("EdDSA", with_header(r#"{"alg":"EdDSA","kid":"ec256"}"#), unexpected("EdDSA")),
            ("lower case", with_header(r#"{"alg":"es256","kid":"ec256"}"#), unexpected("es256")),
            ("Alg is no alg", with_header(r#"{"Alg":"ES256","kid":"ec256"}"#), unexpected("")),
            (
                "kid number",
                with_header(r#"{"alg":"ES256","kid":1}"#),
                "failed to unmarshal key ID: must be a string".into(),
            ),
            ("too long", "x".repeat(1 << 20), "token has 1048576 bytes, but can have at most 65536".into()),
        ] {
            assert_eq!(outcome(&token), Err(format!("unable to parse JWT token: {want}")), "{case}");
        }
        let long = with_header(&format!(r#"{{"alg":"{}"}}"#, "x".repeat(10_000)));
        assert!(outcome(&long).unwrap_err().len() < 400, "what an error repeats is cut short");
    }

    #[test]
    fn header_and_key_are_checked_as_spire_does() {
        let claims = good_claims().to_string();
        let ec = |header: &str| token_of(&WORLD.ec256, header, &claims);
        let with_sub = |sub: &str| es256(&good_with("sub", json!(sub)));
        let signed_by_other = token_of(
            &Private::Ec(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap()),
            r#"{"alg":"ES256","kid":"ec256"}"#,
            &claims,
        );
        let good = es256(&claims);
        let (signed, _) = good.rsplit_once('.').unwrap();
        let crypto = "go-jose/go-jose: error in cryptographic primitive";
        let critical = "go-jose/go-jose: unsupported critical header";
        for (case, token, want) in [
            ("as it should be", good.clone(), Ok(())),
            ("unknown header", ec(r#"{"alg":"ES256","kid":"ec256","jku":"https://x","typ":"JOSE"}"#), Ok(())),
            (
                "an access token",
                ec(r#"{"alg":"ES256","kid":"ec256","typ":"at+jwt"}"#),
                Err(r#"token header type is "at+jwt", but must be JWT or JOSE"#),
            ),
            (
                "a WIT-SVID",
                ec(r#"{"alg":"ES256","kid":"ec256","typ":"wit+jwt"}"#),
                Err(r#"token header type is "wit+jwt", but must be JWT or JOSE"#),
            ),
            (
                "typ empty",
                ec(r#"{"alg":"ES256","kid":"ec256","typ":""}"#),
                Err(r#"token header type is "", but must be JWT or JOSE"#),
            ),
            ("typ null", ec(r#"{"alg":"ES256","kid":"ec256","typ":null}"#), Ok(())),
            (
                "typ number",
                ec(r#"{"alg":"ES256","kid":"ec256","typ":1}"#),
                Err(
                    "unable to parse JWT token: header is not valid JSON: invalid type: integer `1`, expected a string",
                ),
            ),
            ("no kid", ec(r#"{"alg":"ES256"}"#), Err("token header missing key id")),
            ("empty kid", ec(r#"{"alg":"ES256","kid":""}"#), Err("token header missing key id")),
            ("null kid", ec(r#"{"alg":"ES256","kid":null}"#), Err("token header missing key id")),
            (
                "unknown kid",
                ec(r#"{"alg":"ES256","kid":"gone"}"#),
                Err(r#"public key "gone" not found in trust domain "example.org""#),
            ),
            ("unknown trust domain", with_sub("spiffe://td"), Err(r#"no keys found for trust domain "td""#)),
            ("our key, foreign subject", with_sub("spiffe://other.org/web"), Err(crypto)),
            ("signed by another key of that name", signed_by_other, Err(crypto)),
            ("no signature", format!("{signed}."), Err(crypto)),
            ("short signature", format!("{signed}.AAAA"), Err(crypto)),
            ("zero signature", format!("{signed}.{}", "A".repeat(86)), Err(crypto)),
            ("crit", ec(r#"{"alg":"ES256","kid":"ec256","crit":["exp"]}"#), Err(critical)),
            ("crit b64", ec(r#"{"alg":"ES256","kid":"ec256","crit":["b64"],"b64":false}"#), Err(critical)),
            ("crit empty", ec(r#"{"alg":"ES256","kid":"ec256","crit":[]}"#), Err(critical)),
        ] {
            assert_eq!(outcome(&token), want.map_err(str::to_owned), "{case}");
        }
    }

    #[test]
    fn claims_are_checked_as_spire_does() {
        let aud = |value| good_with("aud", value);
        let not_text = |claim| format!("token claim \"{claim}\" must be a string");
        let not_date = "go-jose/go-jose/jwt: expected number value to unmarshal NumericDate".to_owned();
        let not_aud =
            "go-jose/go-jose/jwt: expected string or array value to unmarshal to Audience".to_owned();
        let audience = |got: &str| format!("expected audience in [\"api\"] (audience={got})");
        let subject = |why: &str| format!("token has in invalid subject claim: {why}");
        let expired = || "token has expired".to_owned();
        let not_yet = || "go-jose/go-jose/jwt: validation failed, token not valid yet (nbf)".to_owned();
        let future = || "go-jose/go-jose/jwt: validation field, token issued in the future (iat)".to_owned();
        let deep = format!(r#"{{"a":{}1{}}}"#, "[".repeat(5000), "]".repeat(5000));
        let exp_text =
            |text: &str| good_with("exp", json!(7)).replace("\"exp\":7", &format!("\"exp\":{text}"));
        for (case, claims, want) in [
            ("as they should be", good_claims().to_string(), Ok(())),
            ("aud text", aud(json!("api")), Ok(())),
            ("other claims", good_with("x", json!({"a": [1.5, null, u64::MAX]})), Ok(())),
            (
                "no JSON",
                "{".into(),
                Err("token claims are not valid JSON: EOF while parsing an object".into()),
            ),
            (
                "empty",
                String::new(),
                Err("token claims are not valid JSON: EOF while parsing a value".into()),
            ),
            ("no object", "7".into(), Err("token claims must be a JSON object".into())),
            ("too deep", deep, Err("token claims are not valid JSON: recursion limit exceeded".into())),
            (
                "sub twice",
                r#"{"sub":"spiffe://a/b","sub":"spiffe://example.org/web"}"#.into(),
                Err("token claims are not valid JSON: duplicate key \"sub\" in object".into()),
            ),
            ("no sub", good_without("sub"), Err("token missing subject claim".into())),
            ("empty sub", good_with("sub", json!("")), Err("token missing subject claim".into())),
            ("sub number", good_with("sub", json!(1)), Err(not_text("sub"))),
            ("sub no ID", good_with("sub", json!("web")), Err(subject("scheme is missing or invalid"))),
            (
                "sub with a slash",
                good_with("sub", json!("spiffe://example.org/")),
                Err(subject("path cannot have a trailing slash")),
            ),
            ("iss number", good_with("iss", json!(1)), Err(not_text("iss"))),
            ("jti list", good_with("jti", json!([])), Err(not_text("jti"))),
            ("no exp", good_without("exp"), Err("token missing exp claim".into())),
            ("exp null", good_with("exp", json!(null)), Err("token missing exp claim".into())),
            ("no sub and no exp", "{}".into(), Err("token missing subject claim".into())),
            ("exp text", good_with("exp", json!("1800000000")), Err(not_date.clone())),
            ("nbf list", good_with("nbf", json!([1])), Err(not_date)),
            ("exp float", exp_text("1800000000.5"), Ok(())),
            ("exp with an exponent", exp_text("18e8"), Ok(())),
            ("exp far away", exp_text("1e300"), Ok(())),
            ("exp above 64 bits", exp_text("99999999999999999999"), Ok(())),
            ("exp negative", exp_text("-1"), Err(expired())),
            ("exp far back", exp_text("-1e300"), Err(expired())),
            ("exp zero", exp_text("0"), Err(expired())),
            ("exp minus zero", exp_text("-0.0"), Err(expired())),
            (
                "exp out of range",
                exp_text("1e400"),
                Err("token claims are not valid JSON: number out of range".into()),
            ),
            ("exp in the leeway", good_with("exp", json!(NOW - 60)), Ok(())),
            ("exp out of the leeway", good_with("exp", json!(NOW - 61)), Err(expired())),
            ("nbf in the leeway", good_with("nbf", json!(NOW + 60)), Ok(())),
            ("nbf out of the leeway", good_with("nbf", json!(NOW + 61)), Err(not_yet())),
            ("nbf far away", good_with("nbf", json!(1e300)), Err(not_yet())),
            ("iat in the leeway", good_with("iat", json!(NOW + 60)), Ok(())),
            ("iat out of the leeway", good_with("iat", json!(NOW + 61)), Err(future())),
            ("iat null", good_with("iat", json!(null)), Ok(())),
            ("no aud", good_without("aud"), Err(audience("[]"))),
            ("aud empty", aud(json!([])), Err(audience("[]"))),
            ("aud null", aud(json!(null)), Err(not_aud.clone())),
            ("aud number", aud(json!(1)), Err(not_aud.clone())),
            ("aud of numbers", aud(json!(["api", 1])), Err(not_aud)),
            ("aud of others", aud(json!(["a\nb", "Api"])), Err(audience(r#"["a\nb" "Api"]"#))),
            ("aud that begins so", aud(json!("api2")), Err(audience(r#"["api2"]"#))),
            ("aud of many", aud(json!(["a", "b", "c", "d", "e"])), Err(audience(r#"["a" "b" "c" "d" ...]"#))),
            (
                "aud before exp",
                json!({"sub": "spiffe://example.org/web", "exp": 1}).to_string(),
                Err(audience("[]")),
            ),
            (
                "nbf before exp",
                json!({"sub": "spiffe://example.org/web", "exp": 1, "nbf": NOW + 99, "aud": "api"})
                    .to_string(),
                Err(not_yet()),
            ),
        ] {
            assert_eq!(outcome(&es256(&claims)), want, "{case}");
        }
    }

    #[test]
    fn time_is_the_argument() {
        let token = es256(&good_claims().to_string());
        let at = |time: SystemTime| {
            validate(&token, "api", |_| Some(&WORLD.own), time).map(|_| ()).map_err(|error| error.to_string())
        };
        let exp = UNIX_EPOCH + Duration::from_secs(NOW + 300);
        for (case, time, want) in [
            ("to the nanosecond", exp + LEEWAY, Ok(())),
            ("one later", exp + LEEWAY + Duration::from_nanos(1), Err("token has expired")),
            (
                "before 1970",
                UNIX_EPOCH - Duration::from_secs(9),
                Err("go-jose/go-jose/jwt: validation field, token issued in the future (iat)"),
            ),
        ] {
            assert_eq!(at(time), want.map_err(str::to_owned), "{case}");
        }
    }

    #[test]
    fn foreign_claims_are_taken_away() {
        let claims =
            json!({"sub": "s", "exp": 1, "aud": ["a"], "iat": 1, "iss": "i", "role": "r", "Sub": "x"});
        for (case, allowed, want) in [
            ("none allowed", &[][..], json!({"sub": "s", "exp": 1, "aud": ["a"]})),
            ("one allowed", &["role"], json!({"sub": "s", "exp": 1, "aud": ["a"], "role": "r"})),
            ("one that is not there", &["email"], json!({"sub": "s", "exp": 1, "aud": ["a"]})),
        ] {
            let mut claims = claims.as_object().unwrap().clone();
            let allowed: Vec<String> = allowed.iter().map(|claim| (*claim).to_owned()).collect();
            restrict_foreign(&mut claims, &allowed);
            assert_eq!(Value::Object(claims), want, "{case}");
        }
    }

    /// One change of a text: at this place, so many characters out, these in.
    fn change() -> impl Strategy<Value = (usize, usize, String)> {
        (any::<usize>(), 0..4_usize, "[A-Za-z0-9_.=+/ \\n\"{}-]{0,4}")
    }

    proptest! {
        #[test]
        fn a_changed_token_never_validates(
            rsa in any::<bool>(),
            changes in prop::collection::vec(change(), 1..4),
        ) {
            let claims = good_claims().to_string();
            let token = if rsa {
                token_of(&WORLD.rsa, r#"{"alg":"RS256","kid":"rsa"}"#, &claims)
            } else {
                es256(&claims)
            };
            let mut changed = token.clone();
            for (at, out, with) in changes {
                let at = at % (changed.len() + 1);
                changed.replace_range(at..(at + out).min(changed.len()), &with);
            }
            prop_assert_eq!(outcome(&changed).is_ok(), changed == token, "{}", changed);
        }

        #[test]
        fn any_text_is_refused(text in "\\PC{0,64}(\\.\\PC{0,64}){0,3}") {
            prop_assert!(outcome(&text).is_err());
        }

        #[test]
        fn any_claims_that_are_signed_are_answered(claims in "\\PC{0,64}", exp in any::<f64>(), more in "[0-9eE.+-]{0,24}") {
            prop_assert!(outcome(&es256(&claims)).is_err());
            let with_exp = |exp: &str| {
                es256(&good_with("exp", json!(7)).replace("\"exp\":7", &format!("\"exp\":{exp}")))
            };
            if exp.is_finite() {
                let valid = exp.trunc() >= 1_699_999_940.0;
                prop_assert_eq!(outcome(&with_exp(&format!("{exp:e}"))).is_ok(), valid);
            }
            let _ = outcome(&with_exp(&more)).is_ok();
        }
    }
}
