//! TLS with the server, which is known by its SPIFFE ID and not by its host name.
//!
//! A server's certificate names `spiffe://<trust domain>/spire/server` alone, is no CA's, and is signed by an authority of the
//! trust domain. X25519MLKEM768 is offered first, and its share sent with the first message: what a Go server picks
//! anyway is agreed on without asking again.

use std::{error::Error, fmt, sync::Arc, time::SystemTime};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms,
        aws_lc_rs::{default_provider, kx_group, sign::any_supported_type},
        verify_tls12_signature, verify_tls13_signature,
    },
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, TrustAnchor, UnixTime,
};
use webpki::{
    ALL_VERIFICATION_ALGS, EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter,
    anchor_from_trusted_cert,
};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName};

use crate::{
    identity::{SpiffeId, TrustDomain},
    issuer::keys::KeyPair,
    os::clock::Clock,
};

/// What follows the trust domain in the ID of every SPIRE Server.
const SERVER_PATH: &str = "/spire/server";

/// The most certificates that a server may show.
const LONGEST_CHAIN: usize = 16;

/// Why a certificate is not that of the trust domain's server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ServerIdFault {
    /// Not X.509, or too many of them.
    #[error("its certificate is malformed")]
    Malformed,
    /// Another ID, none, or several.
    #[error("its certificate names {found}, but must name {want} only")]
    Id { found: String, want: String },
    /// A certificate that signs others.
    #[error("its certificate is that of a CA")]
    Ca,
    /// An authority signed it that is not in the bundle. This is what a new set of authorities looks like too, and
    /// a server of somebody else's.
    #[error("its certificate is signed by an unknown authority")]
    UnknownAuthority,
    /// It, or what signed it, has expired.
    #[error("its certificate has expired; is this node's clock right?")]
    Expired,
    /// The same, at the other end.
    #[error("its certificate is not valid yet; is this node's clock right?")]
    NotYetValid,
    /// A rule of X.509.
    #[error("its certificate does not verify: {0}")]
    Chain(String),
}

/// What a server is believed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ServerTrust {
    /// The authorities of the trust domain, DER.
    Roots(Arc<[Vec<u8>]>),
    /// Nothing but what it says of itself: whoever answers is believed.
    Anyone,
}

/// What every handshake with the server has in common.
#[derive(Clone, Debug)]
pub(super) struct TlsPlan {
    pub(super) trust_domain: TrustDomain,
    /// Whether only post-quantum key exchange is used.
    pub(super) key_exchange: KeyExchange,
    pub(super) clock: Clock,
}

/// Which key exchange a server may pick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyExchange {
    /// Any that rustls has, post-quantum first.
    Any,
    /// A post-quantum one, with TLS 1.3.
    PostQuantum,
}

impl TlsPlan {
    /// The configuration of handshakes with a server that is believed by `trust`, and shown `identity`.
    pub(super) fn client(
        &self,
        trust: ServerTrust,
        identity: Option<&Arc<CertifiedKey>>,
    ) -> Arc<ClientConfig> {
        let mut provider = default_provider();
        provider.kx_groups = match self.key_exchange {
            KeyExchange::Any => {
                vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1]
            }
            KeyExchange::PostQuantum => vec![kx_group::X25519MLKEM768, kx_group::SECP256R1MLKEM768],
        };
        let verifier = Verifier {
            want: format!("spiffe://{}{SERVER_PATH}", self.trust_domain.name()),
            trust,
            algorithms: provider.signature_verification_algorithms,
            clock: self.clock,
        };
        let builder =
            self.versions(provider).dangerous().with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match identity {
            Some(key) => {
                builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(CertifiedKey::clone(key))))
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Each handshake is verified with the authorities of its time.
        config.resumption = Resumption::disabled();
        Arc::new(config)
    }

    fn versions(
        &self,
        provider: CryptoProvider,
    ) -> rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier> {
        let builder = ClientConfig::builder_with_provider(Arc::new(provider));
        let built = match self.key_exchange {
            KeyExchange::Any => builder.with_safe_default_protocol_versions(),
            KeyExchange::PostQuantum => builder.with_protocol_versions(&[&TLS13]),
        };
        built.expect("the provider has suites of these versions")
    }
}

/// A chain (DER, the leaf first) with its key, as TLS shows it. `None` when the key cannot sign.
pub(super) fn certified(chain: &[Vec<u8>], key: &KeyPair) -> Option<Arc<CertifiedKey>> {
    let pkcs8 = key.pkcs8().ok()?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8.as_slice()));
    let chain = chain.iter().map(|der| CertificateDer::from(der.clone())).collect();
    Some(Arc::new(CertifiedKey::new(chain, any_supported_type(&key).ok()?)))
}

/// The fault that a failed handshake tells of, if the server's certificate was at fault.
pub(super) fn fault_of(error: &rustls::Error) -> Option<&ServerIdFault> {
    let rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(error))) = error else {
        return None;
    };
    let error: &(dyn Error + 'static) = error.as_ref();
    error.downcast_ref()
}

struct Verifier {
    want: String,
    trust: ServerTrust,
    algorithms: WebPkiSupportedAlgorithms,
    clock: Clock,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("want", &self.want).finish_non_exhaustive()
    }
}

impl Verifier {
    fn check(&self, leaf: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), ServerIdFault> {
        if rest.len() >= LONGEST_CHAIN {
            return Err(ServerIdFault::Malformed);
        }
        let Ok(([], parsed)) = x509_parser::parse_x509_certificate(leaf) else {
            return Err(ServerIdFault::Malformed);
        };
        check_id(&parsed, &self.want)?;
        if signs_others(&parsed) {
            return Err(ServerIdFault::Ca);
        }
        match &self.trust {
            ServerTrust::Anyone => Ok(()),
            ServerTrust::Roots(roots) => verify_chain(leaf, rest, roots, self.clock.now()),
        }
    }
}

fn check_id(leaf: &X509Certificate<'_>, want: &str) -> Result<(), ServerIdFault> {
    let names = leaf.subject_alternative_name().map_err(|_unsaid| ServerIdFault::Malformed)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    let found = match uris.as_slice() {
        [only] if *only == want => return Ok(()),
        [] => "no spiffe id".to_owned(),
        // Shown only where it is an ID: anybody chose the text.
        [only] => SpiffeId::parse(only).map_or_else(|_unsaid| "no spiffe id".to_owned(), |id| id.to_string()),
        several => format!("{} ids", several.len()),
    };
    Err(ServerIdFault::Id { found, want: want.to_owned() })
}

fn signs_others(leaf: &X509Certificate<'_>) -> bool {
    let usage = leaf.key_usage().ok().flatten();
    leaf.is_ca() || usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign())
}

/// Verifies a chain to one of `roots`, for whatever it is to be used.
pub(super) fn verify_chain(
    leaf: &CertificateDer<'_>,
    rest: &[CertificateDer<'_>],
    roots: &[Vec<u8>],
    now: SystemTime,
) -> Result<(), ServerIdFault> {
    let roots: Vec<CertificateDer<'_>> =
        roots.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let anchors: Vec<TrustAnchor<'_>> =
        roots.iter().filter_map(|root| anchor_from_trusted_cert(root).ok()).collect();
    let leaf = EndEntityCert::try_from(leaf).map_err(|_unsaid| ServerIdFault::Malformed)?;
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(since_1970);
    leaf.verify_for_usage(ALL_VERIFICATION_ALGS, &anchors, rest, now, AnyUse, None, None).map(drop).map_err(
        |error| match error {
            webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey => {
                ServerIdFault::UnknownAuthority
            }
            webpki::Error::CertExpired { .. } => ServerIdFault::Expired,
            webpki::Error::CertNotValidYet { .. } => ServerIdFault::NotYetValid,
            error => ServerIdFault::Chain(error.to_string()),
        },
    )
}

/// Certificates of a SPIRE Server are for both ends of a connection; what their usage says beside is not looked at, as in
/// spire-agent.
struct AnyUse;

impl ExtendedKeyUsageValidator for AnyUse {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(leaf, rest).map(|()| ServerCertVerified::assertion()).map_err(|fault| {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(fault))))
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, leaf, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The SPIFFE ID that a certificate (DER) names, if it names one alone.
pub(super) fn id_of(leaf: &[u8]) -> Option<SpiffeId> {
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let names = leaf.subject_alternative_name().ok()??;
    let mut uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    let only = uris.next().filter(|_| uris.next().is_none())?;
    SpiffeId::parse(only).ok()
}
