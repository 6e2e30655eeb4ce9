//! How the agent shows who it is to the kubelet, and knows it: a token or a certificate, and the kubelet's CA.
//!
//! Trusted: the files, which an admin named. They change while the agent runs (a pod's token does every hour), and are
//! read again before a request, once every `reload_interval`. One that cannot be read again leaves the last one in use.

use std::{
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use http::HeaderValue;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, verify_server_name,
    },
    crypto::{
        WebPkiSupportedAlgorithms, aws_lc_rs::default_provider, verify_tls12_signature,
        verify_tls13_signature,
    },
    server::ParsedCertificate,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _};
use zeroize::Zeroizing;

/// The largest token, certificate or key that is read, in bytes.
const LARGEST_SECRET: usize = 64 * 1024;
/// The largest file of CAs, in bytes.
const LARGEST_CA: usize = 1024 * 1024;

/// How the agent shows who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ShownAs {
    /// With the token of this file.
    Token(PathBuf),
    /// With the certificate and the key of these files.
    Certificate { certificate: PathBuf, key: PathBuf },
    /// Not at all.
    Anonymous,
}

/// How the kubelet is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum KnownBy {
    /// Its certificate is signed by a CA of this file; and is for the name that was asked for, if there was one.
    Ca { file: PathBuf, named: bool },
    /// Not at all: whoever answers is believed.
    Nothing,
}

/// What was read of the files.
#[derive(Clone, Debug)]
pub(super) struct Material {
    pub(super) tls: Arc<ClientConfig>,
    /// What a request shows.
    pub(super) authorization: Option<HeaderValue>,
}

/// A file, as messages name it.
#[derive(Clone, Copy, Debug)]
pub struct NamedFile {
    pub(super) what: &'static str,
    pub(super) setting: &'static str,
}

/// What the files of one service are called, and which settings name them.
pub(super) struct MaterialNames {
    pub(super) ca: NamedFile,
    pub(super) token: NamedFile,
    pub(super) certificate: NamedFile,
    pub(super) key: NamedFile,
}

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum MaterialFault {
    /// It is not there, or may not be read.
    #[error("unable to load {}: cannot read {}, which {} names", file.what, path.display(), file.setting)]
    Read { file: NamedFile, path: PathBuf, source: io::Error },
    /// It is a directory, a pipe or the like.
    #[error("unable to load {}: {} must be a regular file ({})", file.what, path.display(), file.setting)]
    Kind { file: NamedFile, path: PathBuf },
    /// It is larger than any such file.
    #[error("unable to load {}: {} is larger than {most} bytes ({})", file.what, path.display(), file.setting)]
    Large { file: NamedFile, path: PathBuf, most: usize },
    /// It does not hold what it should.
    #[error("unable to load {}: {} holds no {right} ({})", file.what, path.display(), file.setting)]
    Content { file: NamedFile, path: PathBuf, right: &'static str },
    /// The key is not that of the certificate, or of a kind that cannot sign.
    #[error("unable to load certificate: the key of {} is not that of {}: {why}", key.display(), certificate.display())]
    Pair { certificate: PathBuf, key: PathBuf, why: rustls::Error },
}

impl Material {
    /// Reads the files. Blocks this thread.
    ///
    /// # Errors
    /// [`MaterialFault`].
    pub(super) fn read(
        shown_as: &ShownAs,
        known_by: &KnownBy,
        names: &MaterialNames,
    ) -> Result<Self, MaterialFault> {
        let provider = default_provider();
        let verifier = KubeletVerifier {
            roots: match known_by {
                KnownBy::Ca { file, .. } => Some(roots(names.ca, file)?),
                KnownBy::Nothing => None,
            },
            named: matches!(known_by, KnownBy::Ca { named: true, .. }),
            algorithms: provider.signature_verification_algorithms,
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .expect("the provider has suites of these versions")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut tls = match shown_as {
            ShownAs::Certificate { certificate, key } => {
                let chain = certificates(names.certificate, certificate, LARGEST_SECRET)?;
                let text = read(names.key, key, LARGEST_SECRET)?;
                let private = PrivateKeyDer::from_pem_slice(&text).map_err(|_unsaid| {
                    MaterialFault::Content { file: names.key, path: key.clone(), right: "private key in PEM" }
                })?;
                builder.with_client_auth_cert(chain, private).map_err(|why| MaterialFault::Pair {
                    certificate: certificate.clone(),
                    key: key.clone(),
                    why,
                })?
            }
            ShownAs::Token(_) | ShownAs::Anonymous => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let authorization = match shown_as {
            ShownAs::Token(path) => Some(bearer(names.token, path)?),
            ShownAs::Certificate { .. } | ShownAs::Anonymous => None,
        };
        Ok(Self { tls: Arc::new(tls), authorization })
    }

    /// What is wrong with the files, each of them looked at. Blocks this thread.
    pub(super) fn faults(
        shown_as: &ShownAs,
        known_by: &KnownBy,
        names: &MaterialNames,
    ) -> Vec<MaterialFault> {
        let known_by_nothing = KnownBy::Nothing;
        let parts = [(&ShownAs::Anonymous, known_by), (shown_as, &known_by_nothing)];
        let faults = parts.map(|(shown_as, known_by)| Self::read(shown_as, known_by, names).err());
        faults.into_iter().flatten().collect()
    }
}

/// What a request shows with the token of a file.
fn bearer(file: NamedFile, path: &Path) -> Result<HeaderValue, MaterialFault> {
    let text = read(file, path, LARGEST_SECRET)?;
    let token = text.trim_ascii();
    let mut header = Zeroizing::new(b"Bearer ".to_vec());
    header.extend_from_slice(token);
    let wrong = || MaterialFault::Content { file, path: path.to_owned(), right: "token" };
    let made = HeaderValue::from_bytes(&header).ok().filter(|_| !token.is_empty());
    let mut header = made.ok_or_else(wrong)?;
    header.set_sensitive(true);
    Ok(header)
}

fn roots(file: NamedFile, path: &Path) -> Result<RootCertStore, MaterialFault> {
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(certificates(file, path, LARGEST_CA)?);
    if added == 0 {
        let right = "certificate of a CA";
        return Err(MaterialFault::Content { file, path: path.to_owned(), right });
    }
    Ok(roots)
}

fn certificates(
    file: NamedFile,
    path: &Path,
    most: usize,
) -> Result<Vec<CertificateDer<'static>>, MaterialFault> {
    let text = read(file, path, most)?;
    let wrong = || MaterialFault::Content { file, path: path.to_owned(), right: "certificates in PEM" };
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    all.ok().filter(|all| !all.is_empty()).ok_or_else(wrong)
}

/// Reads a regular file. A pipe keeps nobody waiting.
fn read(named: NamedFile, path: &Path, most: usize) -> Result<Zeroizing<Vec<u8>>, MaterialFault> {
    let failed = |source| MaterialFault::Read { file: named, path: path.to_owned(), source };
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(failed)?;
    let found = file.metadata().map_err(failed)?;
    if !found.is_file() {
        return Err(MaterialFault::Kind { file: named, path: path.to_owned() });
    }
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let size = usize::try_from(found.len()).unwrap_or(usize::MAX).min(most);
    let mut text = Zeroizing::new(Vec::with_capacity(size + 1));
    file.take(u64::try_from(most + 1).unwrap_or(u64::MAX)).read_to_end(&mut text).map_err(failed)?;
    if text.len() > most {
        return Err(MaterialFault::Large { file: named, path: path.to_owned(), most });
    }
    Ok(text)
}

/// Verifies the kubelet's certificate, as far as an admin wants it.
#[derive(Debug)]
struct KubeletVerifier {
    /// `None` where nothing is verified.
    roots: Option<RootCertStore>,
    /// Whether the certificate must be for the name that was asked for.
    named: bool,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for KubeletVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let leaf = ParsedCertificate::try_from(end_entity)?;
            let algorithms = self.algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&leaf, roots, intermediates, now, algorithms)?;
            if self.named {
                verify_server_name(&leaf, server_name)?;
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
