//! The embedded issuer from outside: profiles, rotation over a clock that jumps, state on disk, and a kill at any
//! moment.

#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::string_slice,
    clippy::unwrap_used,
    reason = "what fails here fails the test; the lints exempt #[test] functions, but not what they share"
)]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use durward::{
    identity::{
        AskedSelectors, Bundle, Entry, EntryAttributes, EntryId, JwtSvid, KeyType, SpiffeId, TrustDomain,
        X509Svid, bundle::JwtPublicKey,
    },
    issuer::embedded::{EmbeddedCa, EmbeddedSettings, IssuerSettings},
};
use proptest::prelude::*;
use rustls_pki_types::{CertificateDer, UnixTime};

const HOUR: Duration = Duration::from_secs(3600);

/// 2026-01-01.
fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600)
}

/// In memory where that is possible: these tests write a lot, each time down to the disk.
fn temp_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn settings(data_dir: &Path) -> EmbeddedSettings {
    EmbeddedSettings {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        data_dir: data_dir.to_owned(),
        svid_key_type: KeyType::EcP256,
        issuer: IssuerSettings::default(),
    }
}

fn settings_with(issuer: IssuerSettings, data_dir: &Path) -> EmbeddedSettings {
    EmbeddedSettings { issuer, ..settings(data_dir) }
}

fn entry(id: &str) -> Entry {
    Entry {
        id: EntryId::new(id),
        spiffe_id: SpiffeId::parse(id).unwrap(),
        selectors: AskedSelectors::default(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        hint: "".into(),
        dns_names: Vec::new(),
        federates_with: Default::default(),
        created_at: 0,
        revision: 0,
        attributes: EntryAttributes::default(),
    }
}

fn verify_x509(svid: &X509Svid, bundle: &Bundle, now: SystemTime) -> Result<(), webpki::Error> {
    let chain: Vec<_> = svid.chain.iter().map(|der| CertificateDer::from(&**der)).collect();
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
        let settings = EmbeddedSettings {
            svid_key_type: key_type,
            issuer: IssuerSettings {
                ca_key_type: key_type,
                jwt_key_type: key_type,
                ..IssuerSettings::default()
            },
            ..settings(&dir.path().join(name))
        };
        // Once as made, once as read again.
        for case in [format!("{name}, made"), format!("{name}, read")] {
            let issuer = EmbeddedCa::open(settings.clone(), start()).unwrap();
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
    let issuer = EmbeddedCa::open(settings(dir.path()), now).unwrap();

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
        let issuer =
            IssuerSettings { jwt_issuer: jwt_issuer.map(str::to_owned), ..IssuerSettings::default() };
        let settings = settings_with(issuer, dir.path());
        let issuer = EmbeddedCa::open(settings, start()).unwrap();
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
    let dir = temp_dir();
    let issuer = EmbeddedCa::open(settings(dir.path()), start()).unwrap();
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
        ("dns", x509(&dns, start()), "DNS name \"wéb\" cannot be written in a certificate"),
        (
            "ca expired",
            x509(&entry("spiffe://example.org/x"), tomorrow),
            "the CA certificate is valid from 2025-12-31T23:59:50Z to 2026-01-02T00:00:00Z, and it is 2026-01-02T00:00:00Z now: a rotation is due",
        ),
    ] {
        assert_eq!(got, want, "{case}");
    }
}

#[test]
fn rotates_on_time() {
    let dir = temp_dir();
    let issuer = EmbeddedCa::open(settings(dir.path()), start()).unwrap();
    let first = issuer.bundle();
    let signer = |now| {
        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), now).unwrap();
        let (_, leaf) = describe(&svid.chain[0]);
        let ca = issuer
            .bundle()
            .x509_authorities
            .iter()
            .position(|ca| Some(describe(ca).1.ski) == leaf.aki)
            .unwrap();
        let token = issuer.mint_jwt(&web(), None, &db(), now).unwrap();
        verify_jwt(&token, &issuer.bundle()).unwrap();
        let old_key = verify_jwt(&token, &first).is_some();
        (ca, if old_key { "old" } else { "new" })
    };
    // Prepared at half of life, put to use at five sixths, out of the bundle a day after its end.
    for (case, hours, minutes, changed, authorities, signs, next) in [
        ("young", 1, 0, false, 1, (0, "old"), 12),
        ("just before half", 11, 59, false, 1, (0, "old"), 12),
        ("half", 12, 0, true, 2, (0, "old"), 20),
        ("just before five sixths", 19, 59, false, 2, (0, "old"), 20),
        ("five sixths", 20, 0, false, 2, (1, "new"), 24),
        ("first one expires", 24, 0, true, 3, (1, "new"), 32),
        ("third signs", 32, 0, false, 3, (2, "new"), 36),
        ("fourth prepared", 36, 0, true, 4, (2, "new"), 44),
        ("fourth signs", 44, 0, false, 4, (3, "new"), 48),
        ("first one leaves", 48, 0, true, 4, (2, "new"), 56),
    ] {
        let now = start() + hours * HOUR + Duration::from_secs(minutes * 60);
        let rotation = issuer.rotate(now).unwrap();
        assert!(rotation.fault.is_none(), "{case}");
        assert_eq!(rotation.bundle_changed, changed, "{case}");
        let bundle = issuer.bundle();
        let found = (bundle.x509_authorities.len(), bundle.jwt_authorities.len());
        assert_eq!(found, (authorities, authorities), "{case}");
        assert_eq!(signer(now), signs, "{case}");
        assert_eq!(seconds(rotation.next), seconds(start() + next * HOUR), "{case}");
        assert!(bundle.jwt_authorities.is_sorted_by_key(|authority| authority.kid.clone()), "{case}");
        let again = issuer.rotate(now).unwrap();
        assert!(!again.bundle_changed && again.next == rotation.next, "{case}: nothing is left to do");
    }
}

/// One move of a clock that nobody should have to trust.
#[derive(Clone, Debug)]
enum Step {
    /// Time passes, and the caller looks again when it was told to, or sooner.
    Pass(Duration),
    /// The clock is set forward, or the machine slept.
    Forward(Duration),
    /// The clock is set back.
    Back(Duration),
    /// The agent restarts.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let minutes = |most: u64| (1..most).prop_map(|minutes| Duration::from_secs(minutes * 60));
    let step = prop_oneof![
        6 => minutes(8 * 60).prop_map(Step::Pass),
        1 => minutes(60 * 24 * 60).prop_map(Step::Forward),
        1 => minutes(60 * 24 * 60).prop_map(Step::Back),
        1 => minutes(60).prop_map(Step::Back),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the clock does: what was ever issued and is valid at the moment verifies against the bundle of the
    /// moment, the issuer signs after each rotation, and is told to look again only later than now.
    #[test]
    fn no_clock_makes_it_lose_what_verifies(steps in steps(), ttl_hours in 1..48_u32) {
        let dir = temp_dir();
        let mut now = start();
        let issuer = IssuerSettings {
            ca_ttl: ttl_hours * HOUR,
            default_jwt_svid_ttl: 3 * HOUR,
            ..IssuerSettings::default()
        };
        let settings = settings_with(issuer, dir.path());
        let mut issuer = EmbeddedCa::open(settings.clone(), now).unwrap();
        let mut reported = issuer.bundle();
        let mut x509 = Vec::new();
        let mut jwt = Vec::new();
        for step in steps {
            match step {
                Step::Pass(by) | Step::Forward(by) => now += by,
                Step::Back(by) => now -= by,
                Step::Restart => {
                    drop(issuer);
                    issuer = EmbeddedCa::open(settings.clone(), now).unwrap();
                    reported = issuer.bundle();
                }
            }
            let rotation = issuer.rotate(now).unwrap();
            prop_assert!(rotation.fault.is_none());
            prop_assert!(rotation.next > now);
            prop_assert_eq!(rotation.bundle_changed, *issuer.bundle() != *reported);
            reported = issuer.bundle();
            x509.push(issuer.mint_x509(&entry("spiffe://example.org/web"), now).unwrap());
            jwt.push(issuer.mint_jwt(&web(), None, &db(), now).unwrap());

            for svid in x509.iter().filter(|svid| svid.not_before <= now && now < svid.not_after) {
                prop_assert_eq!(verify_x509(svid, &reported, now), Ok(()));
            }
            for svid in jwt.iter().filter(|svid| now < svid.expires_at) {
                prop_assert!(verify_jwt(svid, &reported).is_some());
            }
            // What is long expired is gone, except what signs.
            let expired = reported.jwt_authorities.iter().filter(|authority| {
                authority.not_after.unwrap() + 24 * HOUR <= now
            });
            prop_assert_eq!(expired.count(), 0);
        }
    }
}

#[test]
fn a_clock_set_often_ends_in_an_error_and_not_in_a_loss() {
    let dir = temp_dir();
    let issuer = EmbeddedCa::open(settings(dir.path()), start()).unwrap();
    let first = issuer.mint_jwt(&web(), None, &db(), start()).unwrap();
    // Each time before all that was made: nothing of it is ever expired.
    let mut faults = Vec::new();
    for day in 1..70 {
        let now = start() - 2 * day * 24 * HOUR;
        let rotation = issuer.rotate(now).unwrap();
        assert!(rotation.next > now);
        faults.extend(rotation.fault.map(|fault| (day, fault.to_string())));
    }
    let want = "64 authorities are kept already and none of them has expired: check the clock";
    assert_eq!(faults.first(), Some(&(64, want.to_owned())));
    assert_eq!(issuer.bundle().x509_authorities.len(), 64);
    let rotation = issuer.rotate(start()).unwrap();
    assert!(rotation.fault.is_none(), "once the clock is right, the first one is good again");
    assert!(verify_jwt(&first, &issuer.bundle()).is_some());
    assert!(issuer.mint_x509(&entry("spiffe://example.org/web"), start()).is_ok());
}

#[test]
fn a_month_asleep_is_mended_at_once() {
    let dir = temp_dir();
    let issuer = EmbeddedCa::open(settings(dir.path()), start()).unwrap();
    let before = issuer.bundle();
    let now = start() + 30 * 24 * HOUR;
    assert!(issuer.mint_x509(&entry("spiffe://example.org/web"), now).is_err());
    let rotation = issuer.rotate(now).unwrap();
    assert!(rotation.bundle_changed);
    let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), now).unwrap();
    assert_eq!(verify_x509(&svid, &issuer.bundle(), now), Ok(()));
    assert!(verify_x509(&svid, &before, now).is_err());
    assert_eq!(svid.not_after, now + HOUR, "the new CA is fresh");
}

/// Files of a state, for tests that tamper with it.
fn state_file(dir: &Path) -> PathBuf {
    dir.join("issuer.json")
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn state_is_the_owners_alone() {
    let outer = temp_dir();
    let dir = outer.path().join("a/data");
    drop(EmbeddedCa::open(settings(&dir), start()).unwrap());
    assert_eq!(mode(&dir), 0o700);
    // What lies above is as whoever makes directories here would make it.
    fs::create_dir(outer.path().join("usual")).unwrap();
    assert_eq!(mode(&outer.path().join("a")), mode(&outer.path().join("usual")) & 0o755);
    let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["issuer.json", "issuer.lock"]);
    assert_eq!((mode(&state_file(&dir)), mode(&dir.join("issuer.lock"))), (0o600, 0o600));

    let open = || EmbeddedCa::open(settings(&dir), start()).map(drop).map_err(|err| err.to_string());
    let dir_text = dir.display();
    for bad in [0o640, 0o604, 0o660, 0o777] {
        chmod(&state_file(&dir), bad);
        let want = format!(
            "{dir_text}/issuer.json has mode {bad:04o}, which is open to others; it must be 0600 (chmod 600 {dir_text}/issuer.json)"
        );
        assert_eq!(open(), Err(want));
    }
    chmod(&state_file(&dir), 0o600);
    for bad in [0o770, 0o702, 0o1777] {
        chmod(&dir, bad);
        let want = format!(
            "{dir_text} has mode {bad:04o}, which is open to others; it must be 0700 (chmod 700 {dir_text})"
        );
        assert_eq!(open(), Err(want));
    }
    chmod(&dir, 0o755);
    assert_eq!(open(), Ok(()), "others may look at the names");

    let link = outer.path().join("elsewhere.json");
    fs::rename(state_file(&dir), &link).unwrap();
    std::os::unix::fs::symlink(&link, state_file(&dir)).unwrap();
    let err = open().unwrap_err();
    assert!(
        err.starts_with(&format!("{dir_text}/issuer.json is a symbolic link, which is not followed")),
        "{err}"
    );
    fs::remove_file(state_file(&dir)).unwrap();
    fs::create_dir(state_file(&dir)).unwrap();
    assert_eq!(open(), Err(format!("{dir_text}/issuer.json is not a regular file")));

    let file = outer.path().join("file");
    fs::write(&file, "").unwrap();
    let err = EmbeddedCa::open(settings(&file), start()).unwrap_err().to_string();
    assert_eq!(err, format!("{} is not a directory", file.display()));
}

#[test]
fn many_threads_sign_while_one_rotates() {
    let dir = temp_dir();
    let issuer = EmbeddedCa::open(settings(dir.path()), start()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    // Both from the same moment: what signs is always in the bundle that is seen afterwards.
                    let token = issuer.mint_jwt(&web(), None, &db(), start() + 20 * HOUR).unwrap();
                    assert!(verify_jwt(&token, &issuer.bundle()).is_some());
                }
            });
        }
        issuer.rotate(start() + 12 * HOUR).unwrap();
        issuer.rotate(start() + 20 * HOUR).unwrap();
    });
    assert_eq!(issuer.bundle().jwt_authorities.len(), 2);
}

#[test]
fn two_agents_do_not_share_a_directory() {
    let dir = temp_dir();
    let first = EmbeddedCa::open(settings(dir.path()), start()).unwrap();
    let err = EmbeddedCa::open(settings(dir.path()), start()).unwrap_err().to_string();
    let lock = dir.path().join("issuer.lock");
    assert_eq!(err, format!("{} is locked: another agent uses this data_dir", lock.display()));
    drop(first);
    assert!(EmbeddedCa::open(settings(dir.path()), start()).is_ok());
}

#[test]
fn a_damaged_state_is_named_and_left_alone() {
    let dir = temp_dir();
    drop(EmbeddedCa::open(settings(dir.path()), start()).unwrap());
    let good = fs::read_to_string(state_file(dir.path())).unwrap();
    let value: serde_json::Value = serde_json::from_str(&good).unwrap();
    let key = value["x509"][0]["key"].as_str().unwrap().to_owned();
    let edited = |edit: &dyn Fn(&mut serde_json::Value)| {
        let mut value = value.clone();
        edit(&mut value);
        value.to_string()
    };
    let damaged = |how: &str| {
        format!("is damaged: {how}; restore it from a backup, or move it away to start with new keys")
    };
    for (case, text, want) in [
        ("empty", String::new(), damaged("not the JSON expected at line 1, column 0")),
        ("truncated", good[..good.len() / 2].to_owned(), "is damaged: not the JSON expected at line".to_owned()),
        ("not JSON", "hello".to_owned(), damaged("not the JSON expected at line 1, column 1")),
        ("appended", format!("{good}x"), "is damaged: not the JSON expected at line".to_owned()),
        ("later version", edited(&|v| { v["version"] = 2.into(); v["new"] = 1.into() }), "has version 2, but this agent knows only version 1".to_owned()),
        ("foreign", edited(&|v| v["trust_domain"] = "other".into()), "holds the keys of trust domain \"other\", but the agent is configured for \"example.org\": correct trust_domain, or choose another data_dir".to_owned()),
        ("unknown member", edited(&|v| v["x509"][0]["more"] = 1.into()), "is damaged: not the JSON expected at line".to_owned()),
        ("missing member", edited(&|v| drop(v["jwt"][0].as_object_mut().unwrap().remove("slot"))), "is damaged: not the JSON expected at line".to_owned()),
        ("key in a wrong place", edited(&|v| v["jwt"][0]["not_after"] = key.clone().into()), "is damaged: not the JSON expected at line".to_owned()),
        ("another key", edited(&|v| v["x509"][0]["key"] = v["jwt"][0]["key"].clone()), damaged("key of x509 authority 0 is not what was written")),
        ("no key at all", edited(&|v| v["jwt"][0]["key"] = "AAAA".into()), damaged("key of jwt authority 0 is not what was written")),
        ("certificate", edited(&|v| v["x509"][0]["public"]["certificate"] = "AAAA".into()), damaged("certificate of x509 authority 0 is not what was written")),
        ("term", edited(&|v| v["x509"][0]["not_after"] = 1.into()), damaged("not_after of x509 authority 0 is not what was written")),
        ("longer term", edited(&|v| v["x509"][0]["not_after"] = 4_000_000_000_u64.into()), damaged("public of x509 authority 0 is not what was written")),
        ("kid", edited(&|v| v["jwt"][0]["public"]["kid"] = "\"".into()), damaged("kid of jwt authority 0 is not what was written")),
        ("two current", edited(&|v| { let one = v["jwt"][0].clone(); v["jwt"].as_array_mut().unwrap().push(one) }), damaged("two jwt authorities are marked current")),
        ("too many", edited(&|v| { let mut one = v["jwt"][0].clone(); one["slot"] = "old".into(); v["jwt"] = vec![one; 65].into() }), damaged("more than 64 jwt authorities")),
    ] {
        fs::write(state_file(dir.path()), &text).unwrap();
        let err = EmbeddedCa::open(settings(dir.path()), start()).unwrap_err();
        let shown = err.to_string();
        assert!(shown.contains(&want), "{case}: {shown}");
        assert!(shown.contains("issuer.json"), "{case}: {shown}");
        assert!(!format!("{shown} {err:?}").contains(&key[..16]), "{case}: {shown}");
        assert_eq!(fs::read_to_string(state_file(dir.path())).unwrap(), text, "{case}: left as it is");
    }
    fs::write(state_file(dir.path()), &good).unwrap();
    assert!(EmbeddedCa::open(settings(dir.path()), start()).is_ok(), "the good one is good");
}

#[test]
fn debug_shows_no_secret() {
    let dir = temp_dir();
    let issuer = EmbeddedCa::open(settings(dir.path()), start()).unwrap();
    let state: serde_json::Value =
        serde_json::from_slice(&fs::read(state_file(dir.path())).unwrap()).unwrap();
    let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), start()).unwrap();
    let token = issuer.mint_jwt(&web(), None, &db(), start()).unwrap();
    let shown = format!("{issuer:?} {svid:?} {token:?} {:?}", issuer.rotate(start()).unwrap());
    for kind in ["x509", "jwt"] {
        assert!(!shown.contains(&state[kind][0]["key"].as_str().unwrap()[..16]));
    }
    assert!(!shown.contains(token.token.rsplit_once('.').unwrap().1));
    assert!(shown.contains("example.org"));
}

/// Runs one test of this binary in a process of its own, told apart by `DURWARD_TEST_DIR`.
fn child(test: &str, dir: &Path) -> Command {
    // A shell, to have the signal of the file size limit ignored: the write then fails with EFBIG.
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("DURWARD_TEST_DIR", dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    command
}

fn child_dir() -> Option<PathBuf> {
    std::env::var_os("DURWARD_TEST_DIR").map(PathBuf::from)
}

#[test]
fn a_failed_write_changes_nothing() {
    let dir = temp_dir();
    drop(EmbeddedCa::open(settings(dir.path()), start()).unwrap());
    let output = child("issuer::child_without_space", dir.path()).output().unwrap();
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && shown.contains("the child got there"), "{shown}");
}

/// Only with a limit on the size of files that is this process's own.
#[test]
fn child_without_space() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Some(dir) = child_dir() else { return };
    let issuer = EmbeddedCa::open(settings(&dir), start()).unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    let before = fs::read(state_file(&dir)).unwrap();
    let bundle = issuer.bundle();
    let due = start() + 13 * HOUR;
    let no_space = format!("cannot write {}/issuer.json.new: file too large", dir.display());

    for (case, limit) in [("nothing fits", 0), ("half of it fits", 1024)] {
        setrlimit(Resource::RLIMIT_FSIZE, limit, hard).unwrap();
        let err = issuer.rotate(due).unwrap_err();
        assert_eq!(err.to_string(), no_space, "{case}");
        assert_eq!(fs::read(state_file(&dir)).unwrap(), before, "{case}");
        assert!(!dir.join("issuer.json.new").exists(), "{case}");
        assert!(Arc::ptr_eq(&issuer.bundle(), &bundle), "{case}");
        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), due).unwrap();
        assert_eq!(verify_x509(&svid, &bundle, due), Ok(()), "{case}");
        // A due rotation that cannot be written does not keep an agent from starting; nothing to sign with does.
        let other = dir.join("other");
        let err = EmbeddedCa::open(settings(&other), start()).unwrap_err().to_string();
        assert!(err.ends_with("other/issuer.json.new: file too large"), "{case}: {err}");
    }
    drop(issuer);
    let issuer = EmbeddedCa::open(settings(&dir), due).unwrap();
    assert_eq!(*issuer.bundle(), *bundle);
    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
    assert!(issuer.rotate(due).unwrap().bundle_changed, "made up for once there is space");
    assert_eq!(issuer.bundle().x509_authorities.len(), 2);
    println!("the child got there");
}

/// Kills an agent that rotates as fast as it can, at any moment, a hundred times. What it had published must be there
/// for the next one.
#[test]
fn a_kill_at_any_moment_loses_nothing() {
    let dir = temp_dir();
    let mut now = start();
    let mut published = Vec::new();
    for round in 0..100 {
        let mut process = child("issuer::child_that_rotates", dir.path())
            .env("DURWARD_TEST_NOW", seconds(now).to_string())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut lines = lines.map(Result::unwrap).skip_while(|line| !line.starts_with("published"));
        let mut seen = vec![lines.next().expect("the child starts")];
        let mut random = [0; 2];
        aws_lc_rs::rand::fill(&mut random).unwrap();
        // Up to 2.5 ms: a write takes less.
        std::thread::park_timeout(Duration::from_micros(u64::from(random[0]) * 10));
        process.kill().unwrap();
        process.wait().unwrap();
        seen.extend(lines);

        // The kill may have cut the last one.
        for line in seen.iter().filter_map(|line| line.strip_suffix(" .")) {
            match line.split_once(' ').unwrap() {
                ("published", kids) => published = kids.split(',').map(str::to_owned).collect(),
                ("at", then) => now = SystemTime::UNIX_EPOCH + Duration::from_secs(then.parse().unwrap()),
                _ => panic!("{line}"),
            }
        }
        let issuer = EmbeddedCa::open(settings(dir.path()), now).unwrap();
        let bundle = issuer.bundle();
        let known = kids(&bundle);
        for kid in &published {
            let (_, not_after) = kid.split_once('@').unwrap();
            let expired = seconds(now) >= not_after.parse().unwrap();
            assert!(expired || known.contains(kid), "round {round}: {kid} was published, now {known:?}");
        }
        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), now).unwrap();
        assert_eq!(verify_x509(&svid, &bundle, now), Ok(()), "round {round}");
        let token = issuer.mint_jwt(&web(), None, &db(), now).unwrap();
        assert!(verify_jwt(&token, &bundle).is_some(), "round {round}");
        assert!(!dir.path().join("issuer.json.new").exists(), "round {round}");
        published = known;
    }
}

/// All authorities by name, each with the second in which it ends.
fn kids(bundle: &Bundle) -> Vec<String> {
    let x509 = bundle.x509_authorities.iter().map(|ca| {
        let (_, facts) = describe(ca);
        format!("{}@{}", facts.serial, facts.not_after)
    });
    let jwt = bundle
        .jwt_authorities
        .iter()
        .map(|authority| format!("{}@{}", authority.kid, seconds(authority.not_after.unwrap())));
    x509.chain(jwt).collect()
}

#[test]
fn child_that_rotates() {
    let Some(dir) = child_dir() else { return };
    let Some(now) = std::env::var_os("DURWARD_TEST_NOW") else { return };
    let now: u64 = now.to_str().unwrap().parse().unwrap();
    let mut now = SystemTime::UNIX_EPOCH + Duration::from_secs(now);
    let issuer = EmbeddedCa::open(settings(&dir), now).unwrap();
    loop {
        println!("published {} .", kids(&issuer.bundle()).join(","));
        now += 4 * HOUR;
        println!("at {} .", seconds(now));
        issuer.rotate(now).unwrap();
    }
}

/// A CA of an admin's, as PEM files with the modes that they should have.
struct AdminCa {
    cert: PathBuf,
    key: PathBuf,
}

impl AdminCa {
    fn source(&self) -> IssuerSettings {
        let (cert, key) = (self.cert.clone(), self.key.clone());
        IssuerSettings { ca_cert_path: Some(cert), ca_key_path: Some(key), ..IssuerSettings::default() }
    }

    fn write(dir: &Path, name: &str, certificates: &[&str], key_pem: &str) -> Self {
        let admin = Self { cert: dir.join(format!("{name}.crt")), key: dir.join(format!("{name}.key")) };
        fs::write(&admin.cert, certificates.concat()).unwrap();
        fs::write(&admin.key, key_pem).unwrap();
        chmod(&admin.key, 0o600);
        admin
    }
}

fn admin_params(name: &str, lifetime: Duration) -> rcgen::CertificateParams {
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "Admin");
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    params.not_before = (start() - HOUR).into();
    params.not_after = (start() + lifetime).into();
    params
}

type AdminRoot = rcgen::CertifiedIssuer<'static, rcgen::KeyPair>;

fn admin_root(params: rcgen::CertificateParams, algorithm: &'static rcgen::SignatureAlgorithm) -> AdminRoot {
    rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate_for(algorithm).unwrap()).unwrap()
}

fn admin_below(params: rcgen::CertificateParams, root: &AdminRoot) -> AdminRoot {
    rcgen::CertifiedIssuer::signed_by(params, rcgen::KeyPair::generate().unwrap(), root).unwrap()
}

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

#[test]
fn a_supplied_ca_signs_an_intermediate() {
    let dir = temp_dir();
    let root = admin_root(admin_params("root", YEAR), &rcgen::PKCS_ECDSA_P384_SHA384);
    let below = admin_below(admin_params("below", YEAR), &root);
    let rsa = admin_root(admin_params("rsa", YEAR), &rcgen::PKCS_RSA_SHA256);
    // As `DC=example, DC=com` is: an attribute type twice.
    let mut params = admin_params("twice", YEAR);
    params.distinguished_name.push(rcgen::DnType::CustomDnType(vec![2, 5, 4, 10]), "Department");
    let twice = admin_root(params, &rcgen::PKCS_ECDSA_P256_SHA256);
    for (case, certificates, signer, root, chain_len) in [
        ("root", &[root.pem()][..], &root, &root, 2),
        ("chain", &[below.pem(), root.pem()], &below, &root, 3),
        ("rsa", &[rsa.pem()], &rsa, &rsa, 2),
        ("twice", &[twice.pem()], &twice, &twice, 2),
    ] {
        let key = signer.key().serialize_pem();
        let texts: Vec<_> = certificates.iter().map(String::as_str).collect();
        let admin = AdminCa::write(dir.path(), case, &texts, &key);
        let settings = settings_with(admin.source(), &dir.path().join(case));
        let issuer = EmbeddedCa::open(settings.clone(), start()).unwrap();
        let bundle = issuer.bundle();
        assert_eq!(bundle.x509_authorities, [root.der().to_vec()], "{case}: the root is the bundle");

        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), start()).unwrap();
        assert_eq!(svid.chain.len(), chain_len, "{case}");
        assert_eq!(verify_x509(&svid, &bundle, start()), Ok(()), "{case}");
        let (extensions, ours) = describe(&svid.chain[1]);
        assert_eq!(
            extensions,
            "AKI\nBC true None critical\nKU Key Cert Sign, CRL Sign critical\nSAN URI:spiffe://example.org\nSKI",
            "{case}"
        );
        assert_eq!(ours.not_after, seconds(start() + 24 * HOUR), "{case}");
        let (_, signer) = x509_parser::parse_x509_certificate(signer.der()).unwrap();
        assert_eq!(ours.issuer, signer.subject().to_string(), "{case}");
        assert_eq!(ours.subject, format!("C=US, O=SPIFFE, serialNumber={}", ours.serial), "{case}");

        // The intermediate rotates; the bundle stays, but for the JWT keys; what was signed goes on verifying.
        let later = start() + 20 * HOUR;
        issuer.rotate(start() + 12 * HOUR).unwrap();
        issuer.rotate(later).unwrap();
        let other = issuer.mint_x509(&entry("spiffe://example.org/web"), later).unwrap();
        assert_ne!(other.chain[1], svid.chain[1], "{case}");
        assert_eq!(other.chain[2..], svid.chain[2..], "{case}");
        assert_eq!(issuer.bundle().x509_authorities, bundle.x509_authorities, "{case}");
        assert_eq!(verify_x509(&other, &bundle, later), Ok(()), "{case}");

        drop(issuer);
        let issuer = EmbeddedCa::open(settings, later).unwrap();
        let again = issuer.mint_x509(&entry("spiffe://example.org/web"), later).unwrap();
        assert_eq!(again.chain[1..], other.chain[1..], "{case}: kept over a restart");
    }
}

#[test]
fn nodes_below_one_root_verify_each_others_certificates_and_not_their_tokens() {
    let dir = temp_dir();
    let root = admin_root(admin_params("root", YEAR), &rcgen::PKCS_ECDSA_P256_SHA256);
    let nodes = ["one", "two"].map(|name| {
        let below = admin_below(admin_params(name, YEAR), &root);
        let admin =
            AdminCa::write(dir.path(), name, &[&below.pem(), &root.pem()], &below.key().serialize_pem());
        EmbeddedCa::open(settings_with(admin.source(), &dir.path().join(name)), start()).unwrap()
    });
    let alone = EmbeddedCa::open(settings(&dir.path().join("alone")), start()).unwrap();
    for (case, signs, verifies, is_verified) in [
        ("one and itself", &nodes[0], &nodes[0], (true, true)),
        ("one and two", &nodes[0], &nodes[1], (true, false)),
        ("two and one", &nodes[1], &nodes[0], (true, false)),
        ("one and another that has a root of its own", &nodes[0], &alone, (false, false)),
    ] {
        let svid = signs.mint_x509(&entry("spiffe://example.org/web"), start()).unwrap();
        let token = signs.mint_jwt(&web(), None, &db(), start()).unwrap();
        let bundle = verifies.bundle();
        let got = (verify_x509(&svid, &bundle, start()).is_ok(), verify_jwt(&token, &bundle).is_some());
        assert_eq!(got, is_verified, "{case}");
    }
}

#[test]
fn another_source_signs_at_once_and_the_old_root_stays_known() {
    let dir = temp_dir();
    let root = admin_root(admin_params("root", YEAR), &rcgen::PKCS_ECDSA_P256_SHA256);
    let admin = AdminCa::write(dir.path(), "ca", &[&root.pem()], &root.key().serialize_pem());
    let data = dir.path().join("data");
    let mut old = Vec::new();
    for (case, ca, roots) in [
        ("self-signed", IssuerSettings::default(), 1),
        ("supplied", admin.source(), 2),
        ("self-signed again", IssuerSettings::default(), 3),
    ] {
        let issuer = EmbeddedCa::open(settings_with(ca.clone(), &data), start()).unwrap();
        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), start()).unwrap();
        assert_eq!(svid.chain.len() > 1, ca != IssuerSettings::default(), "{case}");
        old.push(svid);
        let bundle = issuer.bundle();
        assert_eq!(bundle.x509_authorities.len(), roots, "{case}");
        for svid in &old {
            assert_eq!(verify_x509(svid, &bundle, start()), Ok(()), "{case}");
        }
    }
}

#[test]
fn a_supplied_ca_near_its_end_is_a_fault_until_renewed() {
    let dir = temp_dir();
    let key = rcgen::KeyPair::generate().unwrap();
    let pem = key.serialize_pem();
    let short = admin_params("root", 20 * HOUR).self_signed(&key).unwrap();
    let admin = AdminCa::write(dir.path(), "ca", &[&short.pem()], &pem);
    let issuer = EmbeddedCa::open(settings_with(admin.source(), &dir.path().join("data")), start()).unwrap();
    let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), start()).unwrap();
    assert_eq!(describe(&svid.chain[1]).1.not_after, seconds(start() + 20 * HOUR), "not beyond its root");

    let half = start() + 12 * HOUR;
    let rotation = issuer.rotate(half).unwrap();
    let fault = rotation.fault.unwrap().to_string();
    assert!(
        fault.ends_with(
            "its chain expires at 2026-01-01T20:00:00Z, as does the intermediate in use: supply a renewed CA"
        ),
        "{fault}"
    );
    assert_eq!(rotation.next, half + Duration::from_secs(10));
    assert!(rotation.bundle_changed, "the JWT key rotates all the same");
    assert!(issuer.mint_x509(&entry("spiffe://example.org/web"), half).is_ok());

    let long = admin_params("root", YEAR).self_signed(&key).unwrap();
    AdminCa::write(dir.path(), "ca", &[&long.pem()], &pem);
    let rotation = issuer.rotate(half + HOUR).unwrap();
    assert!(rotation.fault.is_none() && rotation.bundle_changed, "read again");
    assert_eq!(issuer.bundle().x509_authorities.len(), 2, "known before it signs");
}

/// A configuration whose CA has this extension and is valid by the clock of the system.
fn configure_below(dir: &Path, extension: rcgen::CustomExtension, blocks: &str) {
    let mut params = admin_params("root", YEAR);
    let now = durward::os::clock::Clock::SYSTEM.now();
    (params.not_before, params.not_after) = ((now - HOUR).into(), (now + YEAR).into());
    params.custom_extensions = vec![extension];
    let root = admin_root(params, &rcgen::PKCS_ECDSA_P256_SHA256);
    let admin = AdminCa::write(dir, "ca", &[&root.pem()], &root.key().serialize_pem());
    crate::support::write_config(dir, blocks);
    let config = dir.join("agent.conf");
    let (cert, key) = (admin.cert.display(), admin.key.display());
    let text = fs::read_to_string(&config).unwrap().replace(
        "issuer \"embedded\" { }",
        &format!("issuer \"embedded\" {{ ca_cert_path = \"{cert}\" ca_key_path = \"{key}\" }}"),
    );
    fs::write(&config, text).unwrap();
}

/// A chain that webpki does not follow.
#[test]
fn the_command_takes_an_svid_below_constraints_on_uris() {
    let dir = temp_dir();
    configure_below(dir.path(), uri_constraints(&["example.org"], &[]), &crate::support::entry("/web", ""));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let mut agent = crate::support::Process::spawn(dir.path());
    drop(runtime.block_on(agent.serving(dir.path())));
    let mut fetch = Command::new(env!("CARGO_BIN_EXE_durward"));
    let fetched = fetch.args(["api", "fetch", "x509", "--socket-path"]).arg(dir.path().join("api.sock"));
    let fetched = fetched.output().unwrap();
    let said = String::from_utf8([fetched.stdout, fetched.stderr].concat()).unwrap();
    assert!(fetched.status.success() && said.contains("spiffe://example.org/web"), "{said}");
}

/// An SVID that every peer refuses is no identity: the entry is wrong, before a start, at it and while the agent runs.
#[tokio::test(flavor = "multi_thread")]
async fn dns_names_that_the_ca_keeps_out_are_mistakes_of_their_entries() {
    use nix::sys::signal::Signal;

    let dir = temp_dir();
    let at = dir.path();
    let constraints = || name_constraints(DNS_NAME, &["svc.local"], &["db.svc.local"]);
    let run = |command: &str| {
        let mut line = Command::new(env!("CARGO_BIN_EXE_durward"));
        let output = line.args([command, "--config"]).arg(at.join("agent.conf")).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{command}");
        String::from_utf8(output.stderr).unwrap()
    };
    let wants = |name: &str, kind: &str| {
        format!(
            "agent.conf:15:16: entry \"spiffe://example.org/web\".dns_names \"{name}\": does not fit the name constraint {kind} of certificate 1 (O=Admin, CN=root) in ca_cert_path"
        )
    };
    for (name, kind) in [
        ("web", "permitted DNS \"svc.local\""),
        ("websvc.local", "permitted DNS \"svc.local\""),
        ("old.db.svc.local", "excluded DNS \"db.svc.local\""),
        ("*.svc.local", "excluded DNS \"db.svc.local\""),
    ] {
        let dns_names = format!("dns_names = [\"{name}\"]");
        configure_below(at, constraints(), &crate::support::entry("/web", &dns_names));
        for command in ["validate", "run"] {
            let said = run(command);
            assert!(said.contains(&wants(name, kind)), "{command} {name}: {said}");
        }
        assert!(!at.join("data").exists());
    }
    let right = "dns_names = [\"svc.local\", \"web.svc.local\"]";
    configure_below(at, constraints(), &crate::support::entry("/web", right));
    let mut agent = crate::support::Process::spawn(at);
    let mut client = agent.serving(at).await;
    let asked = crate::support::request(durward::api::proto::workload::X509svidRequest {});
    let mut stream = client.fetch_x509svid(asked).await.unwrap().into_inner();
    let given = stream.message().await.unwrap().unwrap();
    assert_eq!(given.svids[0].spiffe_id, "spiffe://example.org/web");
    let config = at.join("agent.conf");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace(right, "dns_names = [\"web\"]")).unwrap();
    agent.signal(Signal::SIGHUP);
    let log = || fs::read_to_string(at.join("log")).unwrap();
    while !log().contains("not reloaded") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(log().contains("does not fit the name constraint permitted DNS"), "{}", log());
}

/// An entry that was right under a CA of before gets no SVID that nobody takes.
#[test]
fn what_the_ca_keeps_out_is_not_signed() {
    let dir = temp_dir();
    let mut params = admin_params("root", YEAR);
    params.custom_extensions = vec![name_constraints(DNS_NAME, &["svc.local"], &[])];
    let root = admin_root(params, &rcgen::PKCS_ECDSA_P256_SHA256);
    let admin = AdminCa::write(dir.path(), "ca", &[&root.pem()], &root.key().serialize_pem());
    let issuer = EmbeddedCa::open(settings_with(admin.source(), &dir.path().join("data")), start()).unwrap();
    let named = |name: &str| Entry { dns_names: vec![name.to_owned()], ..entry("spiffe://example.org/web") };
    let svid = issuer.mint_x509(&named("web.svc.local"), start()).unwrap();
    assert_eq!(verify_x509(&svid, &issuer.bundle(), start()), Ok(()));
    let error = issuer.mint_x509(&named("web"), start()).map(drop).unwrap_err().to_string();
    let want = "DNS name \"web\" does not fit the name constraint permitted DNS \"svc.local\" of certificate 1 (O=Admin, CN=root)";
    assert_eq!(error, want);
}

/// Kinds of names in a certificate, as they are tagged (RFC 5280, section 4.2.1.6).
const DNS_NAME: u8 = 0x82;
const DIRECTORY_NAME: u8 = 0xa4;
const URI: u8 = 0x86;

fn uri_constraints(permitted: &[&str], excluded: &[&str]) -> rcgen::CustomExtension {
    name_constraints(URI, permitted, excluded)
}

fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
    [&[tag, u8::try_from(content.len()).unwrap()], content].concat()
}

/// A critical extension of name constraints (RFC 5280, section 4.2.1.10).
fn name_constraints(kind: u8, permitted: &[&str], excluded: &[&str]) -> rcgen::CustomExtension {
    let subtrees = |tag, names: &[&str]| {
        let all: Vec<u8> =
            names.iter().flat_map(|name| tagged(0x30, &tagged(kind, name.as_bytes()))).collect();
        if all.is_empty() { Vec::new() } else { tagged(tag, &all) }
    };
    let both = [subtrees(0xa0, permitted), subtrees(0xa1, excluded)].concat();
    let mut extension = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 30], tagged(0x30, &both));
    extension.set_criticality(true);
    extension
}

#[test]
fn a_supplied_ca_that_cannot_serve_is_refused_with_the_reason() {
    use rcgen::{BasicConstraints, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType};
    let dir = temp_dir();
    let alg = &rcgen::PKCS_ECDSA_P256_SHA256;
    let root = admin_root(admin_params("root", YEAR), alg);
    let root_key = root.key().serialize_pem();
    let below = admin_below(admin_params("below", YEAR), &root);
    let with = |edit: &dyn Fn(&mut rcgen::CertificateParams)| {
        let mut params = admin_params("root", YEAR);
        edit(&mut params);
        let made = admin_root(params, alg);
        (made.pem(), made.key().serialize_pem())
    };
    let impostor = admin_root(admin_params("root", YEAR), alg);

    let not_ca = with(&|params| params.is_ca = IsCa::ExplicitNoCa);
    let no_usage = with(&|params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    let no_path = with(&|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let expired = with(&|params| params.not_after = start().into());
    let early = with(&|params| params.not_before = (start() + HOUR).into());
    let foreign = with(&|params| {
        params.subject_alt_names = vec![SanType::URI("spiffe://example.com".try_into().unwrap())];
    });
    let own = with(&|params| {
        params.subject_alt_names = vec![SanType::URI("spiffe://example.org".try_into().unwrap())];
    });
    let usage =
        |usages: &[ExtendedKeyUsagePurpose]| with(&|params| params.extended_key_usages = usages.to_vec());
    let client = usage(&[ExtendedKeyUsagePurpose::ClientAuth]);
    let server = usage(&[ExtendedKeyUsagePurpose::ServerAuth]);
    let both = usage(&[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]);
    let any = usage(&[ExtendedKeyUsagePurpose::Any]);
    let unsaid = with(&|params| params.key_usages.clear());
    let unknown = with(&|params| {
        let mut extension = rcgen::CustomExtension::from_oid_content(&[1, 2, 3, 4, 5], vec![5, 0]);
        extension.set_criticality(true);
        params.custom_extensions = vec![extension];
    });
    let on_uris = |permitted: &[&str], excluded: &[&str]| {
        with(&|params| params.custom_extensions = vec![uri_constraints(permitted, excluded)])
    };
    let other = |id: u64, critical: bool, content: &[u8]| {
        with(&|params| {
            let mut extension = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, id], content.to_vec());
            extension.set_criticality(critical);
            params.custom_extensions = vec![extension];
        })
    };
    let on_directories =
        with(&|params| params.custom_extensions = vec![name_constraints(DIRECTORY_NAME, &["\x30\x00"], &[])]);
    // requireExplicitPolicy after so many further certificates.
    let policy_after = |skipped: u8| {
        let mut params = admin_params("below", YEAR);
        let content = tagged(0x30, &tagged(0x80, &[skipped]));
        params.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 36], content)];
        let made = admin_below(params, &root);
        (made.pem(), made.key().serialize_pem())
    };
    let [policy_now, policy_of_leaf, policy_too_late] = [0, 2, 3].map(policy_after);
    let policy_of_root = other(36, false, &tagged(0x30, &tagged(0x80, &[0])));
    let any_policy = other(54, true, &tagged(0x02, &[0]));
    let any_policy_of_none = other(54, false, &tagged(0x02, &[0]));
    let right = on_uris(&["other.example", "example.org"], &["a.example.org"]);
    let parent = on_uris(&[".org"], &[]);
    let elsewhere = on_uris(&["example.com"], &[]);
    let with_scheme = on_uris(&["spiffe://example.org"], &[]);
    let excluded = on_uris(&[], &["org"]);
    let limited = admin_root(
        {
            let mut params = admin_params("root", YEAR);
            params.custom_extensions = vec![uri_constraints(&["example.org"], &[])];
            params
        },
        alg,
    );
    let below_limited = admin_below(admin_params("below", YEAR), &limited);
    let ed25519 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap().serialize_pem();
    let many = vec![root.pem(); 9];
    let many: Vec<_> = many.iter().map(String::as_str).collect();

    for (case, certificates, key, want) in [
        ("own URI", &[own.0.as_str()][..], own.1.as_str(), None),
        ("for both sides", &[&both.0], &both.1, None),
        ("its URIs", &[&right.0], &right.1, None),
        ("URIs below a domain", &[&parent.0], &parent.1, None),
        (
            "URIs, by the root",
            &[&below_limited.pem(), &limited.pem()],
            &below_limited.key().serialize_pem(),
            None,
        ),
        (
            "for clients",
            &[&client.0],
            &client.1,
            Some(
                "certificate 1 (O=Admin, CN=root) is for one side of a connection alone: its extendedKeyUsage must name serverAuth and clientAuth, or be left out, for a workload is both",
            ),
        ),
        (
            "for any",
            &[&any.0],
            &any.1,
            Some(
                "certificate 1 (O=Admin, CN=root) is for one side of a connection alone: its extendedKeyUsage must name serverAuth and clientAuth, or be left out, for a workload is both",
            ),
        ),
        (
            "no usage",
            &[&unsaid.0],
            &unsaid.1,
            Some(
                "certificate 1 (O=Admin, CN=root) has no keyUsage, so verifiers refuse it: it must have keyCertSign",
            ),
        ),
        (
            "what nobody knows",
            &[&unknown.0],
            &unknown.1,
            Some(
                "certificate 1 (O=Admin, CN=root) has the critical extension 1.2.3.4.5, which verifiers do not know",
            ),
        ),
        (
            "for servers",
            &[&server.0],
            &server.1,
            Some(
                "certificate 1 (O=Admin, CN=root) is for one side of a connection alone: its extendedKeyUsage must name serverAuth and clientAuth, or be left out, for a workload is both",
            ),
        ),
        (
            "other URIs",
            &[&elsewhere.0],
            &elsewhere.1,
            Some(
                "certificate 1 (O=Admin, CN=root) has the name constraint permitted URI \"example.com\", which not every verifier lets spiffe://example.org/.. pass: permit the URI example.org, without spiffe://",
            ),
        ),
        (
            "URIs with a scheme",
            &[&with_scheme.0],
            &with_scheme.1,
            Some(
                "certificate 1 (O=Admin, CN=root) has the name constraint permitted URI \"spiffe://example.org\", which not every verifier lets spiffe://example.org/.. pass: permit the URI example.org, without spiffe://",
            ),
        ),
        (
            "its URIs excluded",
            &[&excluded.0],
            &excluded.1,
            Some(
                "certificate 1 (O=Admin, CN=root) has the name constraint excluded URI \"org\", which not every verifier lets spiffe://example.org/.. pass: permit the URI example.org, without spiffe://",
            ),
        ),
        (
            "directory names",
            &[&on_directories.0],
            &on_directories.1,
            Some(
                "which not every verifier lets spiffe://example.org/.. pass: permit the URI example.org, without spiffe://",
            ),
        ),
        (
            "an explicit policy",
            &[&policy_now.0, &root.pem()],
            &policy_now.1,
            Some(
                "certificate 1 (O=Admin, CN=below) requires an explicit policy of what is below it, and SVIDs have none: leave policyConstraints out",
            ),
        ),
        (
            "an explicit policy of SVIDs",
            &[&policy_of_leaf.0, &root.pem()],
            &policy_of_leaf.1,
            Some(
                "certificate 1 (O=Admin, CN=below) requires an explicit policy of what is below it, and SVIDs have none: leave policyConstraints out",
            ),
        ),
        ("an explicit policy of nobody", &[&policy_too_late.0, &root.pem()], &policy_too_late.1, None),
        ("an explicit policy of a root's", &[&policy_of_root.0], &policy_of_root.1, None),
        (
            "any policy, critical",
            &[&any_policy.0],
            &any_policy.1,
            Some(
                "certificate 1 (O=Admin, CN=root) has the critical extension 2.5.29.54, which verifiers do not know",
            ),
        ),
        ("any policy", &[&any_policy_of_none.0], &any_policy_of_none.1, None),
        (
            "its URIs, by a root that did not sign",
            &[&below.pem(), &limited.pem()],
            &below.key().serialize_pem(),
            Some(
                "certificate 1 (O=Admin, CN=below) was not signed by the key of O=Admin, CN=root, which issued it by its name",
            ),
        ),
        ("no certificate", &[], &root_key, Some("ca.crt: no PEM certificates could be read from it")),
        (
            "not PEM",
            &["-----BEGIN CERTIFICATE-----\nx"],
            &root_key,
            Some("ca.crt: no PEM certificates could be read from it"),
        ),
        (
            "not DER",
            &["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"],
            &root_key,
            Some("ca.crt: certificate 1 is malformed"),
        ),
        (
            "no key",
            &[&root.pem()],
            "",
            Some(
                "ca.key: no private key could be read from it: it must hold one unencrypted EC P-256, EC P-384 or RSA key in PEM",
            ),
        ),
        (
            "ed25519",
            &[&root.pem()],
            &ed25519,
            Some(
                "ca.key: no private key could be read from it: it must hold one unencrypted EC P-256, EC P-384 or RSA key in PEM",
            ),
        ),
        (
            "another key",
            &[&below.pem(), &root.pem()],
            &root_key,
            Some(
                "ca.key: the private key does not belong to its first certificate, which must be the CA that signs",
            ),
        ),
        (
            "not a CA",
            &[&not_ca.0],
            &not_ca.1,
            Some("certificate 1 (O=Admin, CN=root) is not a CA: basicConstraints must say CA:TRUE"),
        ),
        (
            "no keyCertSign",
            &[&no_usage.0],
            &no_usage.1,
            Some(
                "certificate 1 (O=Admin, CN=root) may not sign certificates: its keyUsage lacks keyCertSign",
            ),
        ),
        (
            "no CA below",
            &[&no_path.0],
            &no_path.1,
            Some(
                "certificate 1 (O=Admin, CN=root) allows 0 CAs below it, but 1 are needed: the agent makes an intermediate of its own",
            ),
        ),
        (
            "expired",
            &[&expired.0],
            &expired.1,
            Some(
                "certificate 1 (O=Admin, CN=root) is valid from 2025-12-31T23:00:00Z to 2026-01-01T00:00:00Z, and it is 2026-01-01T00:00:00Z now",
            ),
        ),
        (
            "not yet valid",
            &[&early.0],
            &early.1,
            Some(
                "certificate 1 (O=Admin, CN=root) is valid from 2026-01-01T01:00:00Z to 2027-01-01T00:00:00Z, and it is 2026-01-01T00:00:00Z now",
            ),
        ),
        (
            "foreign",
            &[&foreign.0],
            &foreign.1,
            Some(
                "certificate 1 (O=Admin, CN=root) has URI name \"spiffe://example.com\", but \"spiffe://example.org\" is configured",
            ),
        ),
        (
            "no root",
            &[&below.pem()],
            &below.key().serialize_pem(),
            Some(
                "its last certificate (O=Admin, CN=below) was issued by O=Admin, CN=root: append the chain up to the self-signed root, which becomes the bundle",
            ),
        ),
        (
            "order",
            &[&below.pem(), &own.0, &below.pem()],
            &below.key().serialize_pem(),
            Some(
                "certificate 2 was issued by O=Admin, CN=root, but is followed by O=Admin, CN=below: order them from the CA that signs up to the root",
            ),
        ),
        (
            "too long",
            &many,
            &root_key,
            Some("it holds 9 certificates, more than the 8 that a chain may have"),
        ),
        (
            "a root that did not sign",
            &[&below.pem(), &impostor.pem()],
            &below.key().serialize_pem(),
            Some("a verifier would refuse its SVIDs: InvalidSignatureForPublicKey"),
        ),
    ] {
        let admin = AdminCa::write(dir.path(), "ca", certificates, key);
        let data = dir.path().join(case);
        let opened = EmbeddedCa::open(settings_with(admin.source(), &data), start());
        let found = opened.map(drop).map_err(|err| err.to_string());
        match want {
            None => assert_eq!(found, Ok(()), "{case}"),
            Some(want) => {
                let found = found.expect_err(case);
                assert!(found.starts_with("supplied CA ") && found.ends_with(want), "{case}: {found}");
                assert!(!state_file(&data).exists(), "{case}");
            }
        }
    }

    let admin = AdminCa::write(dir.path(), "ca", &[&root.pem()], &root_key);
    // A group of the agent's own may read it, others not.
    chmod(&admin.key, 0o644);
    let data = dir.path().join("mode");
    let err = EmbeddedCa::open(settings_with(admin.source(), &data), start()).unwrap_err();
    let key = admin.key.display();
    let want = format!(
        "{key} has mode 0644, and others can read it: nobody but the agent's user, a group of his own and root may (chmod 600 {key})"
    );
    assert_eq!(err.to_string(), want);
}

#[test]
fn a_ca_without_time_to_learn_of_it_is_refused() {
    let dir = temp_dir();
    let lasting = |seconds| {
        let ca_ttl = Duration::from_secs(seconds);
        settings_with(IssuerSettings { ca_ttl, ..IssuerSettings::default() }, dir.path())
    };
    let err = EmbeddedCa::open(lasting(59), start()).unwrap_err().to_string();
    assert_eq!(err, "ca_ttl is 59 s, but must be at least 60 s");
    // The shortest one, for an hour: more authorities than are kept, and never one too few.
    let issuer = EmbeddedCa::open(lasting(60), start()).unwrap();
    let mut now = start();
    while now < start() + HOUR {
        let rotation = issuer.rotate(now).unwrap();
        assert!(rotation.fault.is_none());
        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), now).unwrap();
        assert_eq!(verify_x509(&svid, &issuer.bundle(), now), Ok(()));
        now = rotation.next;
    }
    assert_eq!(issuer.bundle().x509_authorities.len(), 64);
}

#[test]
fn a_shorter_setting_takes_effect_at_the_next_rotation() {
    let dir = temp_dir();
    drop(EmbeddedCa::open(settings(dir.path()), start()).unwrap());
    let shorter = IssuerSettings { ca_ttl: HOUR, ca_key_type: KeyType::EcP384, ..IssuerSettings::default() };
    let issuer = EmbeddedCa::open(settings_with(shorter, dir.path()), start()).unwrap();
    let mut now = start();
    let mut lives = Vec::new();
    while now < start() + 14 * HOUR {
        let rotation = issuer.rotate(now).unwrap();
        assert!(rotation.fault.is_none());
        let svid = issuer.mint_x509(&entry("spiffe://example.org/web"), now).unwrap();
        lives.push(svid.not_after.duration_since(now).unwrap() > HOUR / 6 - Duration::from_secs(1));
        now = rotation.next;
    }
    assert!(lives.iter().all(|long| *long), "never signed by a CA at its end");
}
