//! The state as it lies on disk: one JSON file with both kinds of authority, so that a write is all or nothing.
//!
//! Read strictly: what this version would not have written is damage, and is never overwritten. Keys are decoded
//! from the wiped buffer of the file and encoded into another; no copy of them stays behind.

use std::{borrow::Cow, fmt, io, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    Damage, IssuerError,
    jwt::{JwtKey, JwtSigner, KID_LEN},
    rotation::{AuthoritySlot, MAX_RECORDS, Record, Term, find, from_unix, unix},
    x509::{X509Authority, X509Signer},
};
use crate::{
    identity::{KeyType, TrustDomain},
    issuer::keys,
};

/// What is written into the file, and the only one that is read.
const VERSION: u64 = 1;

/// All authorities of the issuer.
#[derive(Clone, Default)]
pub(super) struct Authorities {
    /// In the order in which they were made.
    pub(super) x509: Vec<Record<X509Authority>>,
    /// In the order in which they were made.
    pub(super) jwt: Vec<Record<JwtKey>>,
    /// Which bundle was published last.
    pub(super) published: Published,
}

/// A bundle that was published, for those who federate with this trust domain: the number grows with each change of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Published {
    pub(super) sequence: u64,
    /// Of what was in it, SHA-256 as hexadecimal digits.
    pub(super) digest: String,
}

impl Authorities {
    /// Reads what [`Authorities::to_json`] wrote for `trust_domain` to the file at `path`.
    pub(super) fn parse(text: &[u8], path: &Path, trust_domain: &TrustDomain) -> Result<Self, IssuerError> {
        let path = || path.to_owned();
        let damaged = |damage| IssuerError::Damaged { path: path(), damage };
        // Only where: the text of a JSON error may quote a key.
        let not_json =
            |err: serde_json::Error| damaged(Damage::Json { line: err.line(), column: err.column() });
        // First what every later version will have too, so that it is named and not called damaged.
        let head: Head = serde_json::from_slice(text).map_err(not_json)?;
        if head.version != VERSION {
            return Err(IssuerError::Version { path: path(), found: head.version, known: VERSION });
        }
        if head.trust_domain != trust_domain.name() {
            let (found, want) = (head.trust_domain, trust_domain.clone());
            return Err(IssuerError::TrustDomain { path: path(), found, want });
        }
        let file: StateFile<'_> = serde_json::from_slice(text).map_err(not_json)?;
        Ok(Self {
            x509: read_all("x509", &file.x509).map_err(damaged)?,
            jwt: read_all("jwt", &file.jwt).map_err(damaged)?,
            published: file.published,
        })
    }

    /// The state as text, in a buffer that is wiped.
    pub(super) fn to_json(&self, trust_domain: &TrustDomain) -> Result<Zeroizing<Vec<u8>>, IssuerError> {
        let file = StateFile {
            version: VERSION,
            trust_domain: trust_domain.name().to_owned(),
            x509: write_all(&self.x509)?,
            jwt: write_all(&self.jwt)?,
            published: self.published.clone(),
        };
        // Once into nothing, to learn the size: a buffer that grows leaves copies of keys behind.
        let failed = |_| IssuerError::Crypto("encode the state");
        let mut size = Size(0);
        serde_json::to_writer_pretty(&mut size, &file).map_err(failed)?;
        let mut text = Zeroizing::new(Vec::with_capacity(size.0));
        serde_json::to_writer_pretty(&mut *text, &file).map_err(failed)?;
        Ok(text)
    }
}

#[derive(Deserialize)]
struct Head {
    version: u64,
    trust_domain: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile<'a> {
    version: u64,
    trust_domain: String,
    #[serde(borrow)]
    x509: Vec<AuthorityFile<'a, X509AuthorityFile>>,
    #[serde(borrow)]
    jwt: Vec<AuthorityFile<'a, JwtKeyFile>>,
    #[serde(default)]
    published: Published,
}

/// Times are whole seconds since 1970; bytes are base64.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AuthorityFile<'a, P> {
    slot: AuthoritySlot,
    issued_at: u64,
    not_before: u64,
    not_after: u64,
    key_type: String,
    public: P,
    /// PKCS#8.
    #[serde(borrow)]
    key: Option<SecretText<'a>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct X509AuthorityFile {
    certificate: String,
    above: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct JwtKeyFile {
    kid: String,
    public_key: String,
}

/// Borrowed from the file when read (a base64 text has nothing to unescape), wiped when owned.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct SecretText<'a>(#[serde(borrow)] Cow<'a, str>);

impl Drop for SecretText<'_> {
    fn drop(&mut self) {
        if let Cow::Owned(text) = &mut self.0 {
            text.zeroize();
        }
    }
}

/// What differs between the kinds of authority.
trait PublicPart: Sized {
    type Form;

    fn to_file(&self) -> Self::Form;

    /// The name of the first member that is wrong is the error.
    fn from_file(file: &Self::Form) -> Result<Self, &'static str>;

    /// Whether the key is this authority's, and, where it says so itself, the term too.
    fn owns(&self, term: Term, key_type: KeyType, key: &[u8]) -> bool;

    /// Whether it agrees with the term and key type written beside it.
    fn agrees(&self, term: Term, key_type: KeyType) -> bool;
}

impl PublicPart for X509Authority {
    type Form = X509AuthorityFile;

    fn to_file(&self) -> X509AuthorityFile {
        X509AuthorityFile {
            certificate: STANDARD.encode(&self.certificate),
            above: self.above.iter().map(|certificate| STANDARD.encode(certificate)).collect(),
        }
    }

    fn from_file(file: &X509AuthorityFile) -> Result<Self, &'static str> {
        let certificate = |text: &String| {
            STANDARD
                .decode(text)
                .ok()
                .filter(|der| x509_parser::parse_x509_certificate(der).is_ok_and(|(rest, _)| rest.is_empty()))
        };
        Ok(Self {
            certificate: certificate(&file.certificate).ok_or("certificate")?,
            above: file.above.iter().map(certificate).collect::<Option<_>>().ok_or("above")?,
        })
    }

    fn owns(&self, term: Term, key_type: KeyType, key: &[u8]) -> bool {
        X509Signer::new(self, term, key_type, key).is_some()
    }

    fn agrees(&self, term: Term, _: KeyType) -> bool {
        let ends = |time| unix(time).and_then(|seconds| i64::try_from(seconds).ok());
        x509_parser::parse_x509_certificate(&self.certificate).is_ok_and(|(_, certificate)| {
            let validity = certificate.validity();
            ends(term.not_before) == Some(validity.not_before.timestamp())
                && ends(term.not_after) == Some(validity.not_after.timestamp())
        })
    }
}

impl PublicPart for JwtKey {
    type Form = JwtKeyFile;

    fn to_file(&self) -> JwtKeyFile {
        JwtKeyFile { kid: self.kid.clone(), public_key: STANDARD.encode(&self.public_key) }
    }

    fn from_file(file: &JwtKeyFile) -> Result<Self, &'static str> {
        let kid_is_ours = file.kid.len() == KID_LEN && file.kid.bytes().all(|b| b.is_ascii_alphanumeric());
        if !kid_is_ours {
            return Err("kid");
        }
        let public_key = STANDARD.decode(&file.public_key).map_err(|_unsaid| "public_key")?;
        Ok(Self { kid: file.kid.clone(), public_key })
    }

    fn owns(&self, term: Term, key_type: KeyType, key: &[u8]) -> bool {
        JwtSigner::new(self, term, key_type, key).is_some()
    }

    fn agrees(&self, _: Term, key_type: KeyType) -> bool {
        keys::jwk(key_type, &self.public_key).is_some()
    }
}

fn write_all<T: PublicPart>(
    records: &[Record<T>],
) -> Result<Vec<AuthorityFile<'static, T::Form>>, IssuerError> {
    let seconds = |time| unix(time).ok_or(IssuerError::Time { time });
    records
        .iter()
        .map(|record| {
            Ok(AuthorityFile {
                slot: record.slot,
                issued_at: seconds(record.term.issued_at)?,
                not_before: seconds(record.term.not_before)?,
                not_after: seconds(record.term.not_after)?,
                key_type: record.key_type.name().to_owned(),
                public: record.public.to_file(),
                // One allocation of the right size, so nothing is left behind by growing.
                key: record.key.as_ref().map(|key| SecretText(STANDARD.encode(&***key).into())),
            })
        })
        .collect()
}

fn read_all<T: PublicPart>(
    kind: &'static str,
    files: &[AuthorityFile<'_, T::Form>],
) -> Result<Vec<Record<T>>, Damage> {
    if files.len() > MAX_RECORDS {
        return Err(Damage::TooMany { kind, most: MAX_RECORDS });
    }
    let records = files
        .iter()
        .enumerate()
        .map(|(index, file)| read(file).map_err(|member| Damage::Member { kind, index, member }))
        .collect::<Result<Vec<_>, _>>()?;
    for (slot, name) in [(AuthoritySlot::Current, "current"), (AuthoritySlot::Next, "next")] {
        if let Some((at, _)) = find(&records, slot)
            && records.iter().skip(at + 1).any(|record| record.slot == slot)
        {
            return Err(Damage::Slots { kind, slot: name });
        }
    }
    Ok(records)
}

fn read<T: PublicPart>(file: &AuthorityFile<'_, T::Form>) -> Result<Record<T>, &'static str> {
    let term = Term {
        issued_at: from_unix(file.issued_at).ok_or("issued_at")?,
        not_before: from_unix(file.not_before).ok_or("not_before")?,
        not_after: from_unix(file.not_after).ok_or("not_after")?,
    };
    if !(term.not_before <= term.issued_at && term.issued_at < term.not_after) {
        return Err("not_after");
    }
    let key_type = KeyType::parse(&file.key_type).ok_or("key_type")?;
    let public = T::from_file(&file.public)?;
    if !public.agrees(term, key_type) {
        return Err("public");
    }
    let key = match &file.key {
        None => None,
        Some(text) => {
            let key = Zeroizing::new(STANDARD.decode(text.0.as_bytes()).map_err(|_unsaid| "key")?);
            if !public.owns(term, key_type, &key) {
                return Err("key");
            }
            Some(Arc::new(key))
        }
    };
    Ok(Record { slot: file.slot, term, key_type, key, public: Arc::new(public) })
}

/// Counts what is written into it.
struct Size(usize);

impl io::Write for Size {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.saturating_add(bytes.len());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorities")
            .field("x509", &self.x509.len())
            .field("jwt", &self.jwt.len())
            .finish_non_exhaustive()
    }
}
