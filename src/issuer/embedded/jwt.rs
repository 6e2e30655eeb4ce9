//! The JWT-SVID profile: header and claims as a SPIRE Server writes them, within the SPIFFE JWT-SVID standard,
//! sections 2 and 3.
//!
//! Written by hand because a signature is what a call costs: the header is encoded once per key, the key stays
//! parsed, and a token is built in one buffer of the right size, in which it is also signed.

use std::{
    io::Write as _,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, encoded_len, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use super::{
    IssuerError,
    rotation::{Term, unix},
};
use crate::{
    identity::{JwtSvid, KeyType, SpiffeId},
    issuer::keys::{self, KeyPair, SignatureForm},
};

/// Length of a key ID.
pub(super) const KID_LEN: usize = 32;

/// The longest signature: RSA with 2048 bits.
const MAX_SIGNATURE_LEN: usize = 256;

/// What others see of a JWT authority.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct JwtKey {
    /// [`KID_LEN`] letters and digits.
    pub(super) kid: String,
    /// As [`KeyPair::public_key`] gives it.
    pub(super) public_key: Vec<u8>,
}

/// The key that signs JWT-SVIDs.
pub(super) struct JwtSigner {
    /// The encoded header and the dot behind it.
    prefix: String,
    key: KeyPair,
    pub(super) term: Term,
}

impl JwtSigner {
    /// `None` when the key is not what was made.
    pub(super) fn new(authority: &JwtKey, term: Term, key_type: KeyType, pkcs8: &[u8]) -> Option<Self> {
        let key = KeyPair::from_pkcs8(key_type, SignatureForm::Jws, pkcs8)?;
        if key.public_key() != authority.public_key {
            return None;
        }
        let header = format!(r#"{{"alg":"{}","kid":"{}","typ":"JWT"}}"#, key.jws_algorithm(), authority.kid);
        let mut prefix = URL_SAFE_NO_PAD.encode(header);
        prefix.push('.');
        Some(Self { prefix, key, term })
    }

    /// Signs a JWT-SVID. It ends with the key at the latest.
    pub(super) fn sign(
        &self,
        id: &SpiffeId,
        ttl: Duration,
        audience: &[String],
        issuer: Option<&str>,
        now: SystemTime,
    ) -> Result<JwtSvid, IssuerError> {
        let lifetime = || IssuerError::Lifetime { id: id.clone(), ttl };
        let term = Term::new(now, ttl, Some(self.term.not_after)).ok_or_else(lifetime)?;
        let claims = claims(id, term, audience, issuer)?;

        let room = [claims.len(), MAX_SIGNATURE_LEN].map(|len| encoded_len(len, false).unwrap_or_default());
        let mut token = Zeroizing::new(String::with_capacity(
            self.prefix.len().saturating_add(1).saturating_add(room.iter().sum()),
        ));
        token.push_str(&self.prefix);
        URL_SAFE_NO_PAD.encode_string(&claims, &mut token);
        let signature = self.key.sign(token.as_bytes())?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(JwtSvid { spiffe_id: id.clone(), token, issued_at: term.issued_at, expires_at: term.not_after })
    }
}

/// The claims as JSON, sorted by name: `aud` (an array even if it holds one), `exp`, `iat`, `iss` if configured,
/// `sub`.
fn claims(
    id: &SpiffeId,
    term: Term,
    audience: &[String],
    issuer: Option<&str>,
) -> Result<Vec<u8>, IssuerError> {
    let text_len = |text: &str| text.len() + 3;
    let audience_len: usize = audience.iter().map(|recipient| text_len(recipient)).sum();
    let mut json = Vec::with_capacity(96 + audience_len + issuer.map_or(0, text_len) + id.as_str().len());
    json.extend_from_slice(br#"{"aud":["#);
    let mut recipients = audience.iter().filter(|recipient| !recipient.is_empty());
    write_text(&mut json, recipients.next().ok_or(IssuerError::NoAudience)?)?;
    for recipient in recipients {
        json.push(b',');
        write_text(&mut json, recipient)?;
    }
    let out_of_range = |time| IssuerError::Time { time };
    let expires = unix(term.not_after).ok_or_else(|| out_of_range(term.not_after))?;
    let issued = unix(term.issued_at).ok_or_else(|| out_of_range(term.issued_at))?;
    write!(json, r#"],"exp":{expires},"iat":{issued},"#)
        .map_err(|_unsaid| IssuerError::Crypto("write claims"))?;
    if let Some(issuer) = issuer {
        json.extend_from_slice(br#""iss":"#);
        write_text(&mut json, issuer)?;
        json.push(b',');
    }
    json.extend_from_slice(br#""sub":"#);
    write_text(&mut json, id.as_str())?;
    json.push(b'}');
    Ok(json)
}

/// A JSON string, escaped where it must be: an audience is the workload's own text.
fn write_text(json: &mut Vec<u8>, text: &str) -> Result<(), IssuerError> {
    serde_json::to_writer(json, text).map_err(|_unsaid| IssuerError::Crypto("write claims"))
}

/// A new key ID: random letters and digits.
pub(super) fn random_kid() -> Result<String, IssuerError> {
    const ALPHABET: &[u8; 62] = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    let mut kid = String::with_capacity(KID_LEN);
    while kid.len() < KID_LEN {
        for byte in keys::random::<64>()? {
            // 6 bits, and what is beyond the alphabet thrown away: every character is as likely as any other.
            if let Some(character) = ALPHABET.get(usize::from(byte & 0x3f))
                && kid.len() < KID_LEN
            {
                kid.push(char::from(*character));
            }
        }
    }
    Ok(kid)
}
