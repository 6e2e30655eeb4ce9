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

fn web() -> SpiffeId {
    SpiffeId::parse("spiffe://example.org/web").unwrap()
}

fn db() -> [String; 1] {
    ["spiffe://example.org/db".to_owned()]
}

#[test]
fn signs_what_its_bundle_verifies() {
    let dir = tempfile::tempdir().unwrap();
    for (name, key_type, alg) in [
        ("ec-p256", KeyType::EcP256, "ES256"),
        ("ec-p384", KeyType::EcP384, "ES384"),
        ("rsa-2048", KeyType::Rsa2048, "RS256"),
    ] {
        let settings = Settings {
            ca_key_type: key_type,
            jwt_key_type: key_type,
            svid_key_type: key_type,
            ..settings(&dir.path().join(name))
        };
        // Once as made, once as read again.
        for case in [format!("{name}, made"), format!("{name}, read")] {
            let issuer = Embedded::open(settings.clone(), start()).unwrap();
            let bundle = issuer.bundle();
            assert_eq!((bundle.x509_authorities.len(), bundle.jwt_authorities.len()), (1, 1), "{case}");
            let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), start()).unwrap();
            assert_eq!(verify_x509(&svid, &bundle, start()), Ok(()), "{case}");
            assert!(owns(&svid, key_type), "{case}: the key is the certificate's");
            let token = issuer.mint_jwt(&web(), None, &db(), start()).unwrap();
            let (header, _) = verify_jwt(&token, &bundle).expect(&case);
            let kid = &bundle.jwt_authorities[0].kid;
            assert_eq!(header, format!(r#"{{"alg":"{alg}","kid":"{kid}","typ":"JWT"}}"#), "{case}");
            assert!(kid.len() == 32 && kid.bytes().all(|byte| byte.is_ascii_alphanumeric()), "{case}: {kid}");
        }
    }
}

fn owns(svid: &X509Svid, key_type: KeyType) -> bool {
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _,
        RsaKeyPair,
    };
    let (_, leaf) = x509_parser::parse_x509_certificate(&svid.chain[0]).unwrap();
    let public = &leaf.public_key().subject_public_key.data;
    match key_type {
        KeyType::EcP256 => {
            let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &svid.key).unwrap();
            key.public_key().as_ref() == &**public
        }
        KeyType::EcP384 => {
            let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_ASN1_SIGNING, &svid.key).unwrap();
            key.public_key().as_ref() == &**public
        }
        KeyType::Rsa2048 => RsaKeyPair::from_pkcs8(&svid.key).unwrap().public_key().as_ref() == &**public,
    }
}

/// A certificate as text, one member per line, so that a profile can be read in one look.
fn describe(der: &[u8]) -> (String, X509Facts) {
    use x509_parser::extensions::{GeneralName, ParsedExtension as E};
    let (rest, certificate) = x509_parser::parse_x509_certificate(der).unwrap();
    assert!(rest.is_empty());
    let mut lines = Vec::new();
    let mut facts = X509Facts {
        serial: certificate.serial.to_string(),
        subject: certificate.subject().to_string(),
        issuer: certificate.issuer().to_string(),
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
        ski: Vec::new(),
        aki: None,
        public_key: certificate.public_key().subject_public_key.data.to_vec(),
        serial_len: certificate.raw_serial().len(),
    };
    for extension in certificate.extensions() {
        let critical = if extension.critical { " critical" } else { "" };
        let text = match extension.parsed_extension() {
            E::KeyUsage(usage) => format!("KU {usage}"),
            E::ExtendedKeyUsage(usage) => {
                assert!(usage.server_auth && usage.client_auth && usage.other.is_empty() && !usage.any);
                "EKU serverAuth clientAuth".to_owned()
            }
            E::BasicConstraints(constraints) => {
                format!("BC {} {:?}", constraints.ca, constraints.path_len_constraint)
            }
            E::SubjectAlternativeName(names) => {
                let names: Vec<_> = names
                    .general_names
                    .iter()
                    .map(|name| match name {
                        GeneralName::URI(text) => format!("URI:{text}"),
                        GeneralName::DNSName(text) => format!("DNS:{text}"),
                        other => panic!("{other}"),
                    })
                    .collect();
                format!("SAN {}", names.join(" "))
            }
            E::SubjectKeyIdentifier(id) => {
                facts.ski = id.0.to_vec();
                "SKI".to_owned()
            }
            E::AuthorityKeyIdentifier(id) => {
                assert!(id.authority_cert_issuer.is_none() && id.authority_cert_serial.is_none());
                facts.aki = id.key_identifier.as_ref().map(|id| id.0.to_vec());
                "AKI".to_owned()
            }
            other => panic!("unexpected extension {other:?}"),
        };
        lines.push(format!("{text}{critical}"));
    }
    lines.sort();
    (lines.join("\n"), facts)
}

struct X509Facts {
    serial: String,
    subject: String,
    issuer: String,
    not_before: i64,
    not_after: i64,
    ski: Vec<u8>,
    aki: Option<Vec<u8>>,
    public_key: Vec<u8>,
    serial_len: usize,
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

fn sha1(bytes: &[u8]) -> Vec<u8> {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, bytes).as_ref().to_vec()
}

#[test]
fn certificates_have_the_profile_of_a_spire_server() {
    let dir = tempfile::tempdir().unwrap();
    // Half a second: certificates know only whole ones.
    let now = start() + Duration::from_millis(500);
    let issuer = Embedded::open(settings(dir.path()), now).unwrap();

    let (extensions, ca) = describe(&issuer.bundle().x509_authorities[0]);
    assert_eq!(
        extensions,
        "BC true None critical\nKU Key Cert Sign, CRL Sign critical\nSAN URI:spiffe://example.org\nSKI"
    );
    assert_eq!(ca.subject, format!("C=US, O=SPIFFE, serialNumber={}", ca.serial));
    assert_eq!(ca.issuer, ca.subject);
    assert_eq!(ca.not_before, seconds(start()) - 10);
    assert_eq!(ca.not_after, seconds(start()) + 24 * 3600);
    assert_eq!(ca.ski, sha1(&ca.public_key));

    let mut entry = entry("spiffe://example.org/ns/prod/web");
    for (case, dns_names, ttl, san, subject, lifetime) in [
        ("plain", &[][..], None, "", "C=US, O=SPIRE", 3600),
        ("dns", &["web.prod", "*.web"], None, " DNS:web.prod DNS:*.web", "C=US, O=SPIRE, CN=web.prod", 3600),
        ("wildcard first", &["*.web"], None, " DNS:*.web", "C=US, O=SPIRE, CN=*.web", 3600),
        ("own ttl", &[], Some(60), "", "C=US, O=SPIRE", 60),
        ("longer than the CA", &[], Some(90_000), "", "C=US, O=SPIRE", 86_400),
        ("for ever", &[], Some(u64::MAX), "", "C=US, O=SPIRE", 86_400),
    ] {
        entry.dns_names = dns_names.iter().map(|name| (*name).to_owned()).collect();
        entry.x509_svid_ttl = ttl.map(Duration::from_secs);
        let svid = issuer.mint_x509(&entry, now).unwrap();
        assert_eq!(svid.chain.len(), 1, "{case}: the root is not part of the chain");
        let (extensions, leaf) = describe(&svid.chain[0]);
        assert_eq!(
            extensions,
            format!(
                "AKI\nBC false None critical\nEKU serverAuth clientAuth\n\
                 KU Digital Signature, Key Encipherment, Key Agreement critical\n\
                 SAN URI:spiffe://example.org/ns/prod/web{san}\nSKI"
            ),
            "{case}"
        );
        assert_eq!(leaf.subject, subject, "{case}");
        assert_eq!(leaf.issuer, ca.subject, "{case}");
        assert_eq!(leaf.aki.as_ref(), Some(&ca.ski), "{case}");
        assert_eq!(leaf.ski, sha1(&leaf.public_key), "{case}");
        assert_eq!(leaf.not_before, seconds(start()) - 10, "{case}");
        assert_eq!(leaf.not_after, seconds(start()) + lifetime, "{case}");
        assert_eq!(seconds(svid.not_before), leaf.not_before, "{case}");
        assert_eq!(seconds(svid.not_after), leaf.not_after, "{case}");
        assert!(leaf.serial_len <= 17 && leaf.serial != ca.serial, "{case}");
        assert_eq!(verify_x509(&svid, &issuer.bundle(), now), Ok(()), "{case}");
    }
}

#[test]
fn tokens_have_the_profile_of_a_spire_server() {
    let dir = tempfile::tempdir().unwrap();
    let now = start() + Duration::from_millis(999);
    let text = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    for (case, jwt_issuer, audience, ttl, want) in [
        (
            "one",
            None,
            text(&["a"]),
            None,
            r#"{"aud":["a"],"exp":1767225900,"iat":1767225600,"sub":"spiffe://example.org/web"}"#,
        ),
        (
            "in order, empty dropped",
            None,
            text(&["", "b", "", "a", "b"]),
            None,
            r#"{"aud":["b","a","b"],"exp":1767225900,"iat":1767225600,"sub":"spiffe://example.org/web"}"#,
        ),
        (
            "escaped",
            None,
            text(&["\"\\\n\u{1}é/"]),
            None,
            "{\"aud\":[\"\\\"\\\\\\n\\u0001é/\"],\"exp\":1767225900,\"iat\":1767225600,\"sub\":\"spiffe://example.org/web\"}",
        ),
        (
            "issuer",
            Some("https://x"),
            text(&["a"]),
            Some(60),
            r#"{"aud":["a"],"exp":1767225660,"iat":1767225600,"iss":"https://x","sub":"spiffe://example.org/web"}"#,
        ),
        (
            "longer than the key",
            None,
            text(&["a"]),
            Some(100_000),
            r#"{"aud":["a"],"exp":1767312000,"iat":1767225600,"sub":"spiffe://example.org/web"}"#,
        ),
    ] {
        let settings = Settings { jwt_issuer: jwt_issuer.map(str::to_owned), ..settings(dir.path()) };
        let issuer = Embedded::open(settings, start()).unwrap();
        let svid = issuer.mint_jwt(&web(), ttl.map(Duration::from_secs), &audience, now).unwrap();
        let (_, claims) = verify_jwt(&svid, &issuer.bundle()).expect(case);
        assert_eq!(claims, want, "{case}");
        let parsed: serde_json::Value = serde_json::from_str(&claims).unwrap();
        assert_eq!(parsed["exp"], seconds(svid.expires_at), "{case}");
        assert_eq!(parsed["iat"], seconds(svid.issued_at), "{case}");
    }
}

#[test]
fn refuses_what_it_may_not_sign() {
    let dir = tempfile::tempdir().unwrap();
    let issuer = Embedded::open(settings(dir.path()), start()).unwrap();
    let jwt = |id: &str, ttl, audience: &[&str], now| {
        let audience: Vec<_> = audience.iter().map(|text| (*text).to_owned()).collect();
        issuer.mint_jwt(&SpiffeId::parse(id).unwrap(), ttl, &audience, now).unwrap_err().to_string()
    };
    let zero = Some(Duration::ZERO);
    let tomorrow = start() + 24 * HOUR;
    for (case, got, want) in [
        (
            "foreign",
            jwt("spiffe://example.com/x", None, &["a"], start()),
            "spiffe://example.com/x is not in trust domain example.org",
        ),
        (
            "no path",
            jwt("spiffe://example.org", None, &["a"], start()),
            "spiffe://example.org has no path, so it names no workload",
        ),
        (
            "no audience",
            jwt("spiffe://example.org/x", None, &[], start()),
            "audience must name at least one recipient",
        ),
        (
            "empty audience",
            jwt("spiffe://example.org/x", None, &["", ""], start()),
            "audience must name at least one recipient",
        ),
        (
            "no time",
            jwt("spiffe://example.org/x", zero, &["a"], start()),
            "an SVID for spiffe://example.org/x with a lifetime of 0 s would be expired at once",
        ),
        (
            "key expired",
            jwt("spiffe://example.org/x", None, &["a"], tomorrow),
            "the JWT key is valid from 2025-12-31T23:59:50Z to 2026-01-02T00:00:00Z, and it is 2026-01-02T00:00:00Z now: a rotation is due",
        ),
        (
            "clock set back",
            jwt("spiffe://example.org/x", None, &["a"], start() - HOUR),
            "the JWT key is valid from 2025-12-31T23:59:50Z to 2026-01-02T00:00:00Z, and it is 2025-12-31T23:00:00Z now: a rotation is due",
        ),
    ] {
        assert_eq!(got, want, "{case}");
    }
    let x509 = |entry: &Entry, now| issuer.mint_x509(entry, now).unwrap_err().to_string();
    let dns = Entry { dns_names: vec!["wéb".to_owned()], ..entry("spiffe://example.org/x") };
    for (case, got, want) in [
        (
            "foreign",
            x509(&entry("spiffe://example.com/x"), start()),
            "spiffe://example.com/x is not in trust domain example.org",
        ),
        (
            "no path",
            x509(&entry("spiffe://example.org"), start()),
            "spiffe://example.org has no path, so it names no workload",
        ),
        ("dns", x509(&dns, start()), "DNS name \"wéb\" cannot stand in a certificate"),
        (
            "ca expired",
            x509(&entry("spiffe://example.org/x"), tomorrow),
            "the CA certificate is valid from 2025-12-31T23:59:50Z to 2026-01-02T00:00:00Z, and it is 2026-01-02T00:00:00Z now: a rotation is due",
        ),
    ] {
        assert_eq!(got, want, "{case}");
    }
}
