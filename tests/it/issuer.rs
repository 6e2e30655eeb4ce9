//! The embedded issuer from outside: profiles, rotation over a clock that jumps, state on disk, and a kill at any
//! moment.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use durward::{
    identity::{
        Bundle, Entry, EntryId, JwtSvid, KeyType, Selectors, SpiffeId, TrustDomain, X509Svid,
        bundle::JwtPublicKey,
    },
    issuer::embedded::{CaSource, Embedded, Settings},
};
use rustls_pki_types::{CertificateDer, UnixTime};

const HOUR: Duration = Duration::from_secs(3600);

/// 2026-01-01.
fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
}

fn settings(data_dir: &Path) -> Settings {
    Settings {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        data_dir: data_dir.to_owned(),
        ca: CaSource::SelfSigned,
        ca_ttl: 24 * HOUR,
        ca_key_type: KeyType::EcP256,
        jwt_key_type: KeyType::EcP256,
        svid_key_type: KeyType::EcP256,
        jwt_issuer: None,
        default_x509_svid_ttl: HOUR,
        default_jwt_svid_ttl: Duration::from_secs(300),
    }
}

fn entry(id: &str) -> Entry {
    Entry {
        id: EntryId::new(id),
        spiffe_id: SpiffeId::parse(id).unwrap(),
        selectors: Selectors::default(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        hint: "".into(),
        dns_names: Vec::new(),
        federates_with: Default::default(),
        created_at: 0,
        revision: 0,
    }
}

fn verify_x509(svid: &X509Svid, bundle: &Bundle, now: SystemTime) -> Result<(), webpki::Error> {
    let chain: Vec<_> = svid.chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let roots: Vec<_> =
        bundle.x509_authorities.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let anchors: Vec<_> = roots.iter().map(|root| webpki::anchor_from_trusted_cert(root).unwrap()).collect();
    let time = UnixTime::since_unix_epoch(now.duration_since(SystemTime::UNIX_EPOCH).unwrap());
    for usage in [webpki::KeyUsage::client_auth(), webpki::KeyUsage::server_auth()] {
        webpki::EndEntityCert::try_from(&chain[0])?.verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &anchors,
            &chain[1..],
            time,
            usage,
            None,
            None,
        )?;
    }
    Ok(())
}

/// Verifies the signature with the key in the bundle that the header names; returns header and claims.
fn verify_jwt(svid: &JwtSvid, bundle: &Bundle) -> Option<(String, String)> {
    let (signed, signature) = svid.token.rsplit_once('.')?;
    let (header, claims) = signed.split_once('.')?;
    let text = |part: &str| String::from_utf8(URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap();
    let (header, claims) = (text(header), text(claims));
    let kid = serde_json::from_str::<serde_json::Value>(&header).unwrap()["kid"].as_str()?.to_owned();
    let authority = bundle.jwt_authorities.iter().find(|authority| *authority.kid == *kid)?;
    let key = match &authority.key {
        JwtPublicKey::Ec { x, y, .. } => jsonwebtoken::DecodingKey::from_ec_components(x, y),
        JwtPublicKey::Rsa { n, e } => jsonwebtoken::DecodingKey::from_rsa_components(n, e),
    }
    .unwrap();
    let algorithm = jsonwebtoken::decode_header(&*svid.token).unwrap().alg;
    jsonwebtoken::crypto::verify(signature, signed.as_bytes(), &key, algorithm)
        .unwrap()
        .then_some((header, claims))
}

#[test]
fn signs_what_its_bundle_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let now = start();
    for (case, key_type) in
        [("ec-p256", KeyType::EcP256), ("ec-p384", KeyType::EcP384), ("rsa-2048", KeyType::Rsa2048)]
    {
        let settings = Settings {
            ca_key_type: key_type,
            jwt_key_type: key_type,
            svid_key_type: key_type,
            ..settings(&dir.path().join(case))
        };
        let issuer = Embedded::open(settings, now).unwrap();
        let bundle = issuer.bundle();
        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), now).unwrap();
        verify_x509(&svid, &bundle, now).unwrap();
        let id = SpiffeId::parse("spiffe://example.org/web").unwrap();
        let token = issuer.mint_jwt(&id, None, &["db".to_owned()], now).unwrap();
        let (header, claims) = verify_jwt(&token, &bundle).unwrap();
        assert!(header.contains("JWT") && claims.contains("db"), "{case}");
    }
}
