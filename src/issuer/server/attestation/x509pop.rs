//! A certificate that this node had before, and proof that its key is here too.

use aws_lc_rs::{
    rand::SystemRandom,
    rsa::KeyPair as RsaKeyPair,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, RSA_PSS_SHA256},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use futures_util::future::BoxFuture;
use rustls_pki_types::{PrivateKeyDer, pem::PemObject as _};
use serde::{Deserialize, Serialize};
use x509_parser::pem::Pem;
use zeroize::Zeroizing;

use super::{NodeAttestor, NodeEvidence, Prover, read};
use crate::{
    identity::pem::misplaced_begin,
    issuer::{keys::random, server::settings::X509PopSettings},
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
    Ecdsa(EcdsaKeyPair),
}

impl PopAttestor {
    pub(super) fn new(settings: X509PopSettings) -> Self {
        Self(settings)
    }

    async fn read_files(&self) -> Result<NodeEvidence, String> {
        let needed = |path: &Option<std::path::PathBuf>, name| {
            path.clone().ok_or_else(|| format!("{name} is required"))
        };
        let certificate = needed(&self.0.certificate, "certificate_path")?;
        let key_path = needed(&self.0.private_key, "private_key_path")?;
        let mut chain = certificates(&read(&certificate).await?)
            .map_err(|fault| format!("{}: {fault}", certificate.display()))?;
        if let Some(path) = &self.0.intermediates {
            let more =
                certificates(&read(path).await?).map_err(|fault| format!("{}: {fault}", path.display()))?;
            chain.extend(more);
        }
        if chain.len() > MOST_CERTIFICATES {
            return Err(format!(
                "{} certificates are more than the {MOST_CERTIFICATES} that are sent",
                chain.len()
            ));
        }
        let key = key(&read(&key_path).await?).map_err(|fault| format!("{}: {fault}", key_path.display()))?;
        if !chain.first().is_some_and(|leaf| is_of(&key, leaf)) {
            let (key, leaf) = (key_path.display(), certificate.display());
            return Err(format!("the key in {key} is not that of the first certificate in {leaf}"));
        }
        let payload = PopPayload { certificates: chain.iter().map(|der| STANDARD.encode(der)).collect() };
        let payload = serde_json::to_vec(&payload).map_err(|error| error.to_string())?;
        Ok(NodeEvidence { payload: Zeroizing::new(payload), prover: Some(Box::new(key)) })
    }
}

impl NodeAttestor for PopAttestor {
    fn name(&self) -> &'static str {
        "x509pop"
    }

    fn evidence(&self) -> BoxFuture<'_, Result<NodeEvidence, String>> {
        Box::pin(async {
            match &self.0.workload_api {
                None => self.read_files().await,
                Some(_) => {
                    Err("spiffe_endpoint_socket is not supported yet: use certificate_path".to_owned())
                }
            }
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
            Self::Ecdsa(_) => challenge.ecdsa_signature,
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
            Self::Ecdsa(key) => {
                let signature = key.sign(&random, &message).map_err(failed)?;
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
    if let Some(line) = misplaced_begin(text) {
        return Err(format!("line {line}: -----BEGIN must be at the start of a line of its own"));
    }
    let blocks: Result<Vec<Pem>, _> = Pem::iter_from_buffer(text).collect();
    let blocks = blocks.map_err(|_unsaid| "it is not PEM".to_owned())?;
    let chain: Vec<_> =
        blocks.into_iter().filter(|block| block.label == "CERTIFICATE").map(|block| block.contents).collect();
    if chain.is_empty() { Err("it holds no certificate".to_owned()) } else { Ok(chain) }
}

fn key(text: &[u8]) -> Result<PopKey, &'static str> {
    let der = PrivateKeyDer::from_pem_slice(text).map_err(|_unsaid| "it holds no unencrypted private key")?;
    let bytes = der.secret_der();
    let rsa = || match &der {
        PrivateKeyDer::Pkcs1(_) => RsaKeyPair::from_der(bytes).ok(),
        _ => RsaKeyPair::from_pkcs8(bytes).ok(),
    };
    EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_FIXED_SIGNING, bytes)
        .ok()
        .map(PopKey::Ecdsa)
        .or_else(|| rsa().map(PopKey::Rsa))
        .ok_or("its key must be RSA (2048 bits or more) or EC P-256")
}

fn is_of(key: &PopKey, leaf: &[u8]) -> bool {
    use aws_lc_rs::signature::KeyPair as _;
    let Ok((_, leaf)) = x509_parser::parse_x509_certificate(leaf) else { return false };
    let public = leaf.public_key().subject_public_key.data.as_ref();
    match key {
        PopKey::Rsa(key) => key.public_key().as_ref() == public,
        PopKey::Ecdsa(key) => key.public_key().as_ref() == public,
    }
}
