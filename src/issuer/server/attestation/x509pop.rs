//! A certificate that this node had before, and proof that its key is here too.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use aws_lc_rs::{
    digest::{Digest, SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA384, digest},
    error::Unspecified,
    rand::SystemRandom,
    rsa::KeyPair as RsaKeyPair,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA256_FIXED_SIGNING,
        EcdsaKeyPair, RSA_PSS_SHA256, Signature,
    },
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::future::BoxFuture;
use rustls_pki_types::{PrivateKeyDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use x509_parser::pem::Pem;
use zeroize::Zeroizing;

use super::{MAX_FILE_LEN, NodeAttestor, NodeEvidence, Prover, ServerError, SlowReads};
use crate::{
    identity::pem::{check_blocks, unread_key},
    issuer::{
        keys::random,
        server::{other_agent, settings::X509PopSettings},
    },
    os::trusted::Trust,
};

const NONCE_LEN: usize = 32;

/// The most certificates that are sent.
const MOST_CERTIFICATES: usize = 16;

/// Attests with a certificate and its key.
#[derive(Debug)]
pub(super) struct PopAttestor(X509PopSettings);

#[derive(Serialize)]
struct PopPayload {
    certificates: Vec<String>,
}

#[derive(Deserialize)]
struct PopChallenge {
    rsa_signature: Option<PopNonce>,
    ecdsa_signature: Option<PopNonce>,
}

#[derive(Deserialize)]
struct PopNonce {
    nonce: String,
}

#[derive(Serialize)]
struct PopResponse {
    rsa_signature: Option<RsaProof>,
    ecdsa_signature: Option<EcdsaProof>,
}

#[derive(Serialize)]
struct RsaProof {
    nonce: String,
    signature: String,
}

#[derive(Serialize)]
struct EcdsaProof {
    nonce: String,
    r: String,
    s: String,
}

enum PopKey {
    Rsa(RsaKeyPair),
    /// P-256 or P-521.
    Ecdsa(EcdsaKeyPair),
    EcdsaP384(EcdsaKeyPair),
}

impl PopAttestor {
    pub(super) fn new(settings: X509PopSettings) -> Self {
        Self(settings)
    }

    async fn read_files(&self, files: &SlowReads) -> Result<NodeEvidence, String> {
        let needed = |path: &Option<PathBuf>, name| path.clone().ok_or_else(|| format!("{name} is required"));
        let read = async |path: &Path| files.file(path, MAX_FILE_LEN).await;
        let certificate = needed(&self.0.certificate, "certificate_path")?;
        let key_path = needed(&self.0.private_key, "private_key_path")?;
        let chain = read(&certificate).await?;
        let intermediates = match &self.0.intermediates {
            Some(path) => Some((path.as_path(), read(path).await?)),
            None => None,
        };
        let intermediates = intermediates.as_ref().map(|(path, text)| (*path, text.as_slice()));
        let key = read(&key_path).await?;
        of_files((&certificate, &chain), intermediates, (&key_path, &key)).map_err(|fault| fault.to_string())
    }

    async fn ask_agent(socket: &Path) -> Result<NodeEvidence, String> {
        let of = |fault| format!("the Workload API at {}: {fault}", socket.display());
        let taken = other_agent::svid(socket).await.map_err(of)?;
        let der = PrivateKeyDer::try_from(taken.key.as_slice())
            .map_err(|_unsaid| of("its key is not a private key".to_owned()))?;
        evidence(&taken.chain, &der).map_err(of)
    }
}

/// The text of a file, and where it is.
type PopFile<'a> = (&'a Path, &'a [u8]);

/// What is wrong with one of the files.
#[derive(Debug, thiserror::Error)]
pub enum PopFault {
    #[error("{}: {fault}", path.display())]
    Certificate { path: PathBuf, fault: String },
    #[error("{}: {fault}", path.display())]
    Intermediates { path: PathBuf, fault: String },
    #[error("{}: {fault}", path.display())]
    Key { path: PathBuf, fault: String },
    #[error("{} and {}: {fault}", key.display(), certificate.display())]
    Pair { key: PathBuf, certificate: PathBuf, fault: String },
}

/// What this node attests with, of these files.
fn of_files(
    certificate: PopFile<'_>,
    intermediates: Option<PopFile<'_>>,
    key: PopFile<'_>,
) -> Result<NodeEvidence, PopFault> {
    let path = |file: PopFile<'_>| file.0.to_owned();
    let mut chain = certificates(certificate.1)
        .map_err(|fault| PopFault::Certificate { path: path(certificate), fault })?;
    if let Some(file) = intermediates {
        let more =
            certificates(file.1).map_err(|fault| PopFault::Intermediates { path: path(file), fault })?;
        chain.extend(more);
    }
    let der = PrivateKeyDer::from_pem_slice(key.1).map_err(|_unsaid| {
        let fault = unread_key(key.1)
            .map_or_else(|| "it holds no unencrypted private key".to_owned(), |lost| lost.to_string());
        PopFault::Key { path: path(key), fault }
    })?;
    let pair = |fault| PopFault::Pair { key: path(key), certificate: path(certificate), fault };
    evidence(&chain, &der).map_err(pair)
}

/// Looks at the files of these settings as an agent of the user of `trust` would. What cannot be read is not wrong here: it may
/// come.
///
/// # Errors
/// What this node could not attest with, however often it tries.
pub fn check_pop(settings: &X509PopSettings, trust: Trust) -> Result<(), PopFault> {
    let read = |path: &Option<PathBuf>| {
        let path = path.clone()?;
        let mut text = Zeroizing::new(Vec::new());
        trust.open(&path).ok()?.take(MAX_FILE_LEN).read_to_end(&mut text).ok()?;
        Some((path, text))
    };
    let X509PopSettings { private_key, certificate, intermediates, workload_api } = settings;
    let (Some(certificate), Some(key), None) = (read(certificate), read(private_key), workload_api) else {
        return Ok(());
    };
    let more = read(intermediates);
    if intermediates.is_some() && more.is_none() {
        return Ok(());
    }
    let more = more.as_ref().map(|(path, text)| (path.as_path(), text.as_slice()));
    of_files((&certificate.0, &certificate.1), more, (&key.0, &key.1)).map(drop)
}

/// What shows that this node has the key of the first of these certificates, DER.
fn evidence(chain: &[Vec<u8>], key: &PrivateKeyDer<'_>) -> Result<NodeEvidence, String> {
    if chain.len() > MOST_CERTIFICATES {
        let count = chain.len();
        return Err(format!("{count} certificates are more than the {MOST_CERTIFICATES} that are sent"));
    }
    let key = PopKey::of(key).ok_or("the key must be RSA (2048 bits or more) or EC P-256, P-384 or P-521")?;
    if !chain.first().is_some_and(|leaf| key.is_of(leaf)) {
        return Err("the key is not that of the first certificate".to_owned());
    }
    let payload = PopPayload { certificates: chain.iter().map(|der| STANDARD.encode(der)).collect() };
    let payload = serde_json::to_vec(&payload).map_err(|error| error.to_string())?;
    let fingerprint = chain.first().map(|leaf| digest(&SHA1_FOR_LEGACY_USE_ONLY, leaf));
    let agent_path = fingerprint.map(|found| {
        let hex: String = found.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("/spire/agent/x509pop/{hex}")
    });
    Ok(NodeEvidence { payload: Zeroizing::new(payload), prover: Some(Box::new(key)), agent_path })
}

impl PopKey {
    fn of(der: &PrivateKeyDer<'_>) -> Option<Self> {
        let bytes = der.secret_der();
        let rsa = || match der {
            PrivateKeyDer::Pkcs1(_) => RsaKeyPair::from_der(bytes).ok(),
            _ => RsaKeyPair::from_pkcs8(bytes).ok(),
        };
        let ec = |algorithm| EcdsaKeyPair::from_private_key_der(algorithm, bytes).ok();
        ec(&ECDSA_P256_SHA256_FIXED_SIGNING)
            .or_else(|| ec(&ECDSA_P521_SHA256_FIXED_SIGNING))
            .map(Self::Ecdsa)
            .or_else(|| ec(&ECDSA_P384_SHA384_FIXED_SIGNING).map(Self::EcdsaP384))
            .or_else(|| rsa().map(Self::Rsa))
    }

    fn is_of(&self, leaf: &[u8]) -> bool {
        use aws_lc_rs::signature::KeyPair as _;
        let Ok((_, leaf)) = x509_parser::parse_x509_certificate(leaf) else { return false };
        let public = leaf.public_key().subject_public_key.data.as_ref();
        match self {
            Self::Rsa(key) => key.public_key().as_ref() == public,
            Self::Ecdsa(key) | Self::EcdsaP384(key) => key.public_key().as_ref() == public,
        }
    }
}

/// Signs the SHA-256 of a message, as the server verifies whatever the curve. The library has no such algorithm of P-384;
/// but what is signed is a number, and with zeros before it the digest is the same number as a SHA-384.
fn sign_p384(key: &EcdsaKeyPair, message: &[u8]) -> Result<Signature, Unspecified> {
    let mut padded = [0; 48];
    let (_, number) = padded.split_at_mut(16);
    number.copy_from_slice(digest(&SHA256, message).as_ref());
    key.sign_digest(&Digest::import_less_safe(&padded, &SHA384)?)
}

impl NodeAttestor for PopAttestor {
    fn name(&self) -> &'static str {
        "x509pop"
    }

    fn evidence<'a>(&'a self, files: &'a SlowReads) -> BoxFuture<'a, Result<NodeEvidence, ServerError>> {
        Box::pin(async move {
            let evidence = match &self.0.workload_api {
                None => self.read_files(files).await,
                Some(socket) => Self::ask_agent(socket).await,
            };
            evidence.map_err(|fault| self.fault(fault))
        })
    }
}

impl Prover for PopKey {
    fn answer(&self, challenge: &[u8]) -> Result<Vec<u8>, String> {
        let challenge: PopChallenge =
            serde_json::from_slice(challenge).map_err(|_unsaid| "the challenge is not one of x509pop's")?;
        let nonce: [u8; NONCE_LEN] = random().map_err(|error| error.to_string())?;
        let asked = match self {
            Self::Rsa(_) => challenge.rsa_signature,
            Self::Ecdsa(_) | Self::EcdsaP384(_) => challenge.ecdsa_signature,
        };
        let asked = asked.ok_or("the challenge is for a key of another kind")?;
        let asked = STANDARD.decode(asked.nonce).ok().filter(|nonce| nonce.len() == NONCE_LEN);
        // A nonce of another length could make what is signed mean something else.
        let mut message = asked.ok_or("the challenge's nonce must have 32 bytes")?;
        message.extend_from_slice(&nonce);
        let nonce = STANDARD.encode(nonce);
        let failed = |_| "cannot sign".to_owned();
        let random = SystemRandom::new();
        let response = match self {
            Self::Rsa(key) => {
                let mut signature = vec![0; key.public_modulus_len()];
                key.sign(&RSA_PSS_SHA256, &random, &message, &mut signature).map_err(failed)?;
                let proof = RsaProof { nonce, signature: STANDARD.encode(signature) };
                PopResponse { rsa_signature: Some(proof), ecdsa_signature: None }
            }
            Self::Ecdsa(key) | Self::EcdsaP384(key) => {
                let signature = match self {
                    Self::EcdsaP384(_) => sign_p384(key, &message),
                    _ => key.sign(&random, &message),
                };
                let signature = signature.map_err(failed)?;
                let (r, s) = signature.as_ref().split_at(signature.as_ref().len() / 2);
                let proof = EcdsaProof { nonce, r: minimal(r), s: minimal(s) };
                PopResponse { rsa_signature: None, ecdsa_signature: Some(proof) }
            }
        };
        serde_json::to_vec(&response).map_err(|error| error.to_string())
    }
}

/// Base64 of a number without leading zeros.
fn minimal(number: &[u8]) -> String {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    STANDARD.encode(number.get(zeros..).unwrap_or_default())
}

fn certificates(text: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    check_blocks(text).map_err(|lost| lost.to_string())?;
    let blocks: Result<Vec<Pem>, _> = Pem::iter_from_buffer(text).collect();
    let blocks = blocks.map_err(|_unsaid| "it is not PEM".to_owned())?;
    let chain: Vec<_> =
        blocks.into_iter().filter(|block| block.label == "CERTIFICATE").map(|block| block.contents).collect();
    if chain.is_empty() { Err("it holds no certificate".to_owned()) } else { Ok(chain) }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P521_SHA256_ASN1, KeyPair as _,
        UnparsedPublicKey,
    };

    use super::*;

    /// DER of a length and a value.
    fn tagged(tag: u8, value: &[u8]) -> Vec<u8> {
        let len = u8::try_from(value.len()).unwrap();
        let head = if len < 128 { vec![tag, len] } else { vec![tag, 0x81, len] };
        [head, value.to_vec()].concat()
    }

    /// As a server verifies it: the signature over SHA-256 of both nonces, whatever the curve.
    #[test]
    fn a_challenge_is_answered_with_a_key_of_each_curve() {
        for (curve, signing, verifying) in [
            ("p-256", &ECDSA_P256_SHA256_FIXED_SIGNING, &ECDSA_P256_SHA256_ASN1),
            ("p-384", &ECDSA_P384_SHA384_FIXED_SIGNING, &ECDSA_P384_SHA256_ASN1),
            ("p-521", &ECDSA_P521_SHA256_FIXED_SIGNING, &ECDSA_P521_SHA256_ASN1),
        ] {
            let pair = EcdsaKeyPair::generate(signing).unwrap();
            let pkcs8 = pair.to_pkcs8v1().unwrap();
            let key = PopKey::of(&PrivateKeyDer::try_from(pkcs8.as_ref()).unwrap()).unwrap();
            let asked = STANDARD.encode([7; NONCE_LEN]);
            let challenge = format!(r#"{{"rsa_signature":null,"ecdsa_signature":{{"nonce":"{asked}"}}}}"#);
            let answer = key.answer(challenge.as_bytes()).unwrap();
            let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
            let bytes =
                |name: &str| STANDARD.decode(answer["ecdsa_signature"][name].as_str().unwrap()).unwrap();
            let number = |name: &str| {
                let bytes = bytes(name);
                let sign = if bytes[0] >= 128 { vec![0] } else { vec![] };
                tagged(2, &[sign, bytes].concat())
            };
            let signature = tagged(0x30, &[number("r"), number("s")].concat());
            let message = [vec![7; NONCE_LEN], bytes("nonce")].concat();
            let public = UnparsedPublicKey::new(verifying, pair.public_key().as_ref().to_vec());
            assert!(public.verify(&message, &signature).is_ok(), "{curve}");
            let short = challenge.replace(&asked, &STANDARD.encode([7; NONCE_LEN - 1]));
            assert!(key.answer(short.as_bytes()).is_err(), "{curve}: a nonce of another length");
        }
    }
}
