//! The command as a person and a script meet it: real processes, against a Workload API that says what each case needs.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use durward::api::{
    encoded::Encoded,
    proto::{
        workload as pb,
        workload_server::spiffe_workload_api_server::{SpiffeWorkloadApi, SpiffeWorkloadApiServer},
    },
};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use serde_json::{Value, json};
use tokio_stream::{Stream, StreamExt as _, wrappers::UnixListenerStream};
use tonic::{Code, Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::support::copy_program;

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fake agent answers. An empty list of messages is a stream that stays silent.
#[derive(Default)]
struct Answers {
    x509: Vec<Result<pb::X509svidResponse, Status>>,
    jwt: Option<Result<pb::JwtsvidResponse, Status>>,
    jwt_bundles: Option<Result<pb::JwtBundlesResponse, Status>>,
    valid: Option<Result<pb::ValidateJwtsvidResponse, Status>>,
    health: Health,
}

/// What the health service says.
#[derive(Clone, Copy, Default)]
enum Health {
    #[default]
    Serving,
    NotServing,
}

struct Fake {
    answers: Answers,
    /// What was asked, as text.
    asked: Mutex<tokio::sync::mpsc::Sender<String>>,
}

impl Fake {
    fn ask<T: std::fmt::Debug>(&self, request: &Request<T>) -> Result<(), Status> {
        let header: Vec<_> = request.metadata().get_all("workload.spiffe.io").iter().collect();
        if header != ["true"] {
            return Err(Status::invalid_argument("security header missing from request"));
        }
        let text = format!("{:?}", request.get_ref());
        self.asked.lock().unwrap().try_send(text).map_err(|err| Status::internal(err.to_string()))
    }
}

fn messages<T: prost::Message>(list: &[Result<T, Status>]) -> Messages<Encoded> {
    let list: Vec<_> = list.iter().map(|m| m.as_ref().map(Encoded::new).map_err(Clone::clone)).collect();
    Box::pin(tokio_stream::iter(list).chain(tokio_stream::pending()))
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Fake {
    type FetchX509SVIDStream = Messages<Encoded>;
    type FetchX509BundlesStream = Messages<Encoded>;
    type FetchJWTBundlesStream = Messages<Encoded>;
    type FetchWITSVIDStream = Messages<pb::WitsvidResponse>;
    type FetchWITBundlesStream = Messages<pb::WitBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        request: Request<pb::X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        self.ask(&request)?;
        Ok(Response::new(messages(&self.answers.x509)))
    }

    async fn fetch_jwtsvid(
        &self,
        request: Request<pb::JwtsvidRequest>,
    ) -> Result<Response<pb::JwtsvidResponse>, Status> {
        self.ask(&request)?;
        self.answers.jwt.clone().expect("the case has one").map(Response::new)
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<pb::JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        self.ask(&request)?;
        Ok(Response::new(messages(self.answers.jwt_bundles.as_slice())))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<pb::ValidateJwtsvidRequest>,
    ) -> Result<Response<pb::ValidateJwtsvidResponse>, Status> {
        self.ask(&request)?;
        self.answers.valid.clone().expect("the case has one").map(Response::new)
    }

    async fn fetch_x509_bundles(
        &self,
        _: Request<pb::X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Err(Status::unimplemented("no command asks"))
    }

    async fn fetch_witsvid(
        &self,
        _: Request<pb::WitsvidRequest>,
    ) -> Result<Response<Self::FetchWITSVIDStream>, Status> {
        Err(Status::unimplemented("no command asks"))
    }

    async fn fetch_wit_bundles(
        &self,
        _: Request<pb::WitBundlesRequest>,
    ) -> Result<Response<Self::FetchWITBundlesStream>, Status> {
        Err(Status::unimplemented("no command asks"))
    }
}

/// An agent that answers what it was told to, on a socket of its own. Ends when dropped.
struct Agent {
    dir: tempfile::TempDir,
    asked: tokio::sync::mpsc::Receiver<String>,
    _runtime: tokio::runtime::Runtime,
}

impl Agent {
    fn saying(answers: Answers) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (sender, asked) = tokio::sync::mpsc::channel(16);
        let guard = runtime.enter();
        let listener = tokio::net::UnixListener::bind(dir.path().join("api.sock")).unwrap();
        let health = match answers.health {
            Health::Serving => ServingStatus::Serving,
            Health::NotServing => ServingStatus::NotServing,
        };
        let fake = SpiffeWorkloadApiServer::new(Fake { answers, asked: Mutex::new(sender) });
        runtime.spawn(async move {
            let (reporter, service) = tonic_health::server::health_reporter();
            reporter.set_service_status("", health).await;
            tonic::transport::Server::builder()
                .add_service(fake)
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .unwrap();
        });
        drop(guard);
        Self { dir, asked, _runtime: runtime }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    /// Runs `durward` with `line`, and this agent's socket.
    fn run(&self, line: &[&str]) -> Output {
        durward(line).arg("-socketPath").arg(self.socket()).output().unwrap()
    }

    fn asked(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.asked.try_recv().ok()).collect()
    }
}

fn durward(line: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
    command.env_clear().args(line).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// A trust domain that can sign.
struct Ca {
    name: &'static str,
    key: KeyPair,
    params: CertificateParams,
    der: Vec<u8>,
}

const FROM: i64 = 1_767_225_600;

impl Ca {
    fn new(name: &'static str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(format!("spiffe://{name}").try_into().unwrap())];
        params.not_before = at(FROM);
        params.not_after = at(FROM + 40_000 * 86_400);
        let key = KeyPair::generate().unwrap();
        let der = params.self_signed(&key).unwrap().der().to_vec();
        Self { name, key, params, der }
    }

    /// An SVID for `path`; `change` makes it one that should be refused.
    fn svid(&self, path: &str, change: impl FnOnce(&mut CertificateParams)) -> pb::X509svid {
        let id = format!("spiffe://{}{path}", self.name);
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(id.clone().try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = at(FROM);
        params.not_after = at(FROM + 36_500 * 86_400);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key)).unwrap();
        pb::X509svid {
            spiffe_id: id,
            x509_svid: leaf.der().to_vec(),
            x509_svid_key: key.serialize_der(),
            bundle: self.der.clone(),
            hint: String::new(),
        }
    }
}

fn at(seconds: i64) -> time::OffsetDateTime {
    time::OffsetDateTime::from_unix_timestamp(seconds).unwrap()
}

fn x509(svids: Vec<pb::X509svid>) -> Answers {
    Answers { x509: vec![Ok(pb::X509svidResponse { svids, ..Default::default() })], ..Default::default() }
}

/// The output without the time it took, which differs each time.
fn without_time(out: &str) -> String {
    let (first, rest) = out.split_once('\n').unwrap();
    let (what, took) = first.split_once(" after ").unwrap();
    assert!(took.ends_with('s') && took.starts_with(|c: char| c.is_ascii_digit()), "{took}");
    format!("{what}\n{rest}")
}

#[test]
fn x509_svids_are_shown_as_spire_agent_shows_them() {
    let (own, foreign) = (Ca::new("example.org"), Ca::new("other.test"));
    let mut first = own.svid("/foo", |_| {});
    first.hint = "external\x1b[2J".to_owned();
    let response = pb::X509svidResponse {
        svids: vec![first, own.svid("/bar", |_| {})],
        crl: vec![],
        federated_bundles: BTreeMap::from([("spiffe://other.test".to_owned(), foreign.der.clone())]),
    };
    let agent = Agent::saying(Answers { x509: vec![Ok(response.clone())], ..Default::default() });

    let times = |until: &str| (String::from("2026-01-01 00:00:00 +0000 UTC"), until.to_owned());
    let (from, leaf_until) = times("2125-12-08 00:00:00 +0000 UTC");
    let ca_until = "2135-07-09 00:00:00 +0000 UTC";
    let block = |id: &str, hint: &str| {
        format!(
            "\nSPIFFE ID:\t\t{id}\n{hint}SVID Valid After:\t{from}\nSVID Valid Until:\t{leaf_until}\n\
             SVID Key Type:\t\tec-p256\nCA #1 Valid After:\t{from}\nCA #1 Valid Until:\t{ca_until}\n\
             [spiffe://other.test] CA #1 Valid After:\t{from}\n[spiffe://other.test] CA #1 Valid Until:\t{ca_until}\n"
        )
    };
    let want = format!(
        "Received 2 svids\n{}{}\n",
        block("spiffe://example.org/foo", "Hint:\t\t\texternal\\u{1b}[2J\n"),
        block("spiffe://example.org/bar", "")
    );
    for line in [["api", "fetch"].as_slice(), &["api", "fetch", "x509"]] {
        let got = agent.run(line);
        assert_eq!(text(&got.stderr), "", "{line:?}");
        assert_eq!(without_time(text(&got.stdout)), want, "{line:?}");
        assert!(got.status.success(), "{line:?}");
    }
    let silent = agent.run(&["api", "fetch", "x509", "-silent"]);
    assert!(silent.status.success() && silent.stdout.is_empty() && silent.stderr.is_empty());

    let got = agent.run(&["api", "fetch", "x509", "-output", "json"]);
    let out = text(&got.stdout);
    assert_eq!(out.lines().count(), 1);
    assert!(
        out.starts_with(r#"{"crl":[],"federated_bundles":{"spiffe://other.test":""#),
        "keys are sorted: {out}"
    );
    let entry = |svid: &pb::X509svid| {
        json!({
            "bundle": STANDARD.encode(&svid.bundle),
            "hint": svid.hint,
            "spiffe_id": svid.spiffe_id,
            "x509_svid": STANDARD.encode(&svid.x509_svid),
            "x509_svid_key": STANDARD.encode(&svid.x509_svid_key),
        })
    };
    let want = json!({
        "crl": [],
        "federated_bundles": { "spiffe://other.test": STANDARD.encode(&foreign.der) },
        "svids": response.svids.iter().map(entry).collect::<Vec<_>>(),
    });
    assert_eq!(serde_json::from_str::<Value>(out).unwrap(), want);
}

#[test]
fn what_does_not_verify_is_not_shown() {
    let (own, foreign) = (Ca::new("example.org"), Ca::new("other.test"));
    let with = |change: fn(&mut CertificateParams)| own.svid("/foo", change);
    let other_bundle = pb::X509svid { bundle: foreign.der, ..with(|_| {}) };
    let other_key =
        pb::X509svid { x509_svid_key: KeyPair::generate().unwrap().serialize_der(), ..with(|_| {}) };
    let other_id = pb::X509svid { spiffe_id: "spiffe://example.org/root".to_owned(), ..with(|_| {}) };
    let uri = |text: &str| SanType::URI(text.to_owned().try_into().unwrap());
    let two_uris = own.svid("/foo", |p| p.subject_alt_names.push(uri("spiffe://example.org/b")));
    let cases: [(&str, Vec<pb::X509svid>, &str); 11] = [
        ("no svids", vec![], "workload response contains no svids\n"),
        (
            "another bundle",
            vec![other_bundle],
            "\"spiffe://example.org/foo\" SVID failed verification against bundle: ",
        ),
        ("another key", vec![other_key], "the private key does not belong to the certificate\n"),
        ("another ID", vec![other_id], "leaf certificate names \"spiffe://example.org/foo\"\n"),
        ("two URIs", vec![two_uris], "must hold exactly one URI\n"),
        ("no URI", vec![with(|p| p.subject_alt_names.clear())], "must hold exactly one URI\n"),
        ("a CA", vec![with(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained))], "must not be a CA\n"),
        (
            "may sign certificates",
            vec![with(|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign))],
            "must not be allowed to sign certificates or revocation lists\n",
        ),
        ("expired", vec![with(|p| p.not_after = at(FROM + 1))], "SVID failed verification against bundle: "),
        (
            "the second one",
            vec![with(|_| {}), pb::X509svid { bundle: vec![], ..with(|_| {}) }],
            "failed to parse svid entry 1 for spiffe id \"spiffe://example.org/foo\": failed to parse trust bundle: no certificates found\n",
        ),
        (
            "cut short",
            vec![{
                let mut svid = with(|_| {});
                svid.x509_svid.pop();
                svid
            }],
            "certificate #0 is malformed\n",
        ),
    ];
    for (case, svids, want) in cases {
        let agent = Agent::saying(x509(svids));
        let dir = tempfile::tempdir().unwrap();
        for output in ["pretty", "json"] {
            let line = ["api", "fetch", "x509", "-output", output, "-write", dir.path().to_str().unwrap()];
            let got = agent.run(&line);
            assert!(text(&got.stderr).contains(want), "{case}: {}", text(&got.stderr));
            assert_eq!(got.stdout, b"", "{case}");
            assert_eq!(got.status.code(), Some(1), "{case}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{case}: nothing is written");
    }
}

#[test]
fn files_have_their_modes_under_any_umask() {
    let (own, foreign) = (Ca::new("example.org"), Ca::new("other.test"));
    let response = pb::X509svidResponse {
        svids: vec![own.svid("/foo", |_| {}), own.svid("/bar", |_| {})],
        federated_bundles: BTreeMap::from([("spiffe://other.test".to_owned(), foreign.der)]),
        ..Default::default()
    };
    let agent = Agent::saying(Answers { x509: vec![Ok(response)], ..Default::default() });
    let names: [(&str, u32, &str, &str); 8] = [
        ("svid.0.pem", 0o644, "SVID #0", "-----BEGIN CERTIFICATE-----\n"),
        ("svid.0.key", 0o600, "key #0", "-----BEGIN PRIVATE KEY-----\n"),
        ("bundle.0.pem", 0o644, "bundle #0", "-----BEGIN CERTIFICATE-----\n"),
        (
            "federated_bundle.0.0.pem",
            0o644,
            "federated bundle #0 for trust domain spiffe://other.test",
            "-----BEGIN CERTIFICATE-----\n",
        ),
        ("svid.1.pem", 0o644, "SVID #1", "-----BEGIN CERTIFICATE-----\n"),
        ("svid.1.key", 0o600, "key #1", "-----BEGIN PRIVATE KEY-----\n"),
        ("bundle.1.pem", 0o644, "bundle #1", "-----BEGIN CERTIFICATE-----\n"),
        (
            "federated_bundle.1.0.pem",
            0o644,
            "federated bundle #0 for trust domain spiffe://other.test",
            "-----BEGIN CERTIFICATE-----\n",
        ),
    ];
    for umask in ["0", "077", "0777"] {
        let dir = tempfile::tempdir().unwrap();
        // A key that others could read, from an earlier life.
        fs::write(dir.path().join("svid.0.key"), "old").unwrap();
        fs::set_permissions(dir.path().join("svid.0.key"), fs::Permissions::from_mode(0o666)).unwrap();
        let got = Command::new("/bin/sh")
            .args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")])
            .arg(env!("CARGO_BIN_EXE_durward"))
            .args(["api", "fetch", "x509", "-silent", "-write"])
            .arg(dir.path())
            .arg("-socketPath")
            .arg(agent.socket())
            .output()
            .unwrap();
        assert_eq!(text(&got.stderr), "", "umask {umask}");
        let want: String = names
            .iter()
            .map(|(name, _, what, _)| {
                format!("Writing {what} to file {}.\n", dir.path().join(name).display())
            })
            .collect();
        assert_eq!(text(&got.stdout), want, "umask {umask}");
        for (name, mode, _, begin) in names {
            let path = dir.path().join(name);
            assert_eq!(
                fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
                mode,
                "{name}, umask {umask}"
            );
            let pem = fs::read_to_string(&path).unwrap();
            assert!(pem.starts_with(begin) && pem.ends_with("-----\n"), "{name}: {pem}");
            assert!(pem.lines().all(|line| line.len() <= 64), "{name}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), names.len(), "no litter, umask {umask}");
        rustls_pki_types::pem::PemObject::from_pem_file(dir.path().join("svid.0.key"))
            .map(|_: rustls_pki_types::PrivateKeyDer<'_>| ())
            .unwrap();
    }
}

#[test]
fn a_directory_to_write_to_must_be_one() {
    let mut agent = Agent::saying(x509(vec![Ca::new("example.org").svid("/foo", |_| {})]));
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    for (case, path, want) in [
        ("missing", dir.path().join("missing"), "/missing: mkdir -p /"),
        ("a file", dir.path().join("file"), "/file is not a directory\n"),
    ] {
        let got = agent.run(&["api", "fetch", "x509", "-write", path.to_str().unwrap()]);
        let stderr = text(&got.stderr);
        assert!(stderr.contains(want), "{case}: {stderr}");
        assert_eq!(got.status.code(), Some(1), "{case}");
        assert_eq!(agent.asked(), [""; 0], "{case}: nothing was fetched");
    }
}

#[test]
fn jwt_svids_are_shown_as_spire_agent_shows_them() {
    let svid = |path: &str, token: &str, hint: &str| pb::Jwtsvid {
        spiffe_id: format!("spiffe://a.test/{path}"),
        svid: token.to_owned(),
        hint: hint.to_owned(),
    };
    let mut agent = Agent::saying(Answers {
        jwt: Some(Ok(pb::JwtsvidResponse {
            svids: vec![svid("1", "tok.en.1", "external"), svid("2", "tok.en.2", "")],
        })),
        jwt_bundles: Some(Ok(pb::JwtBundlesResponse {
            bundles: [("spiffe://b.test", "{\n    \"keys\": []\n}"), ("spiffe://a.test", "{}")]
                .map(|(id, jwks)| (id.to_owned(), jwks.as_bytes().to_vec()))
                .into(),
        })),
        ..Default::default()
    });
    let got = agent.run(&["api", "fetch", "jwt", "-audience", "foo,bar", "-spiffeID", "spiffe://a.test/1"]);
    assert_eq!(
        (text(&got.stdout), text(&got.stderr), got.status.code()),
        (
            "token(spiffe://a.test/1):\n\ttok.en.1\nhint(spiffe://a.test/1):\n\texternal\n\
             token(spiffe://a.test/2):\n\ttok.en.2\n\
             bundle(spiffe://a.test):\n\t{}\nbundle(spiffe://b.test):\n\t{\n    \"keys\": []\n}\n",
            "",
            Some(0)
        )
    );
    assert_eq!(
        agent.asked(),
        [
            r#"JwtsvidRequest { audience: ["foo", "bar"], spiffe_id: "spiffe://a.test/1" }"#,
            "JwtBundlesRequest",
        ]
    );
    for flag in ["-output", "-format"] {
        let got = agent.run(&["api", "fetch", "jwt", "-audience", "foo", flag, "json"]);
        assert_eq!(
            text(&got.stdout),
            concat!(
                r#"[{"svids":[{"hint":"external","spiffe_id":"spiffe://a.test/1","svid":"tok.en.1"},"#,
                r#"{"hint":"","spiffe_id":"spiffe://a.test/2","svid":"tok.en.2"}]},"#,
                r#"{"bundles":{"spiffe://a.test":"e30=","spiffe://b.test":"ewogICAgImtleXMiOiBbXQp9"}}]"#,
                "\n"
            ),
            "{flag}"
        );
    }
}

#[test]
fn tokens_are_validated_as_spire_agent_does() {
    use prost_types::{Struct, value::Kind};
    let value = |kind| prost_types::Value { kind: Some(kind) };
    let claims = Struct {
        fields: [
            ("exp".to_owned(), value(Kind::NumberValue(1_767_225_600.0))),
            ("gone".to_owned(), value(Kind::NullValue(0))),
            ("sub".to_owned(), value(Kind::StringValue("spiffe://a.test/1".to_owned()))),
        ]
        .into(),
    };
    let valid =
        pb::ValidateJwtsvidResponse { spiffe_id: "spiffe://a.test/1".to_owned(), claims: Some(claims) };
    let invalid = Status::invalid_argument("token has expired");
    let down = Status::unavailable("starting");
    let line = ["api", "validate", "jwt", "-audience", "foo", "-svid", "a.b.c"];
    let json = [line.as_slice(), &["-output", "json"]].concat();
    let pretty = "SVID is valid.\nSPIFFE ID : spiffe://a.test/1\n\
                  Claims    : {\"exp\":1767225600,\"gone\":null,\"sub\":\"spiffe://a.test/1\"}\n";
    let in_json = "{\"claims\":{\"exp\":1767225600,\"sub\":\"spiffe://a.test/1\"},\"spiffe_id\":\"spiffe://a.test/1\"}\n";
    for (case, line, answer, stdout, stderr, code) in [
        ("valid", line.as_slice(), Ok(valid.clone()), pretty, "", 0),
        ("valid, json", &json, Ok(valid), in_json, "", 0),
        ("invalid", &line, Err(invalid), "", "SVID is not valid: token has expired\n", 1),
        (
            "no answer",
            &line,
            Err(down),
            "",
            "unable to validate JWT SVID: rpc error: code = Unavailable desc = starting\n",
            1,
        ),
    ] {
        let mut agent = Agent::saying(Answers { valid: Some(answer), ..Default::default() });
        let got = agent.run(line);
        assert_eq!(text(&got.stdout), stdout, "{case}");
        assert!(text(&got.stderr).starts_with(stderr), "{case}: {}", text(&got.stderr));
        assert_eq!(got.status.code(), Some(code), "{case}");
        assert!(!text(&got.stderr).contains("a.b.c"), "{case}: no token in an error");
        assert_eq!(agent.asked(), [r#"ValidateJwtsvidRequest { audience: "foo", svid: "a.b.c" }"#], "{case}");
    }
}

#[test]
fn errors_of_the_agent_say_what_to_do() {
    let details = ErrorDetails::with_retry_info(Some(Duration::from_millis(15_000)));
    let limited = Status::with_error_details(Code::ResourceExhausted, "too many calls", details);
    for (case, status, want, advice, code) in [
        (
            "no identity",
            Status::permission_denied("no identity issued"),
            "rpc error: code = PermissionDenied desc = no identity issued\n",
            "unix:uid:",
            3,
        ),
        (
            "limited",
            limited,
            "rpc error: code = ResourceExhausted desc = too many calls\n",
            "try again in 15s",
            1,
        ),
        (
            "the server away",
            Status::with_error_details(
                Code::Unavailable,
                "could not fetch X.509-SVID",
                ErrorDetails::with_retry_info(Some(Duration::from_micros(10_987_654))),
            ),
            "rpc error: code = Unavailable desc = could not fetch X.509-SVID\n",
            "The agent asks to try again in 11s. Why:\n  durward status\n",
            1,
        ),
        (
            "about to end",
            Status::unavailable("the agent is shutting down; connect again"),
            "rpc error: code = Unavailable desc = the agent is shutting down; connect again\n",
            "is about to end or to restart: try again",
            1,
        ),
        (
            "down",
            Status::unavailable("starting"),
            "rpc error: code = Unavailable desc = starting\n",
            "its log",
            1,
        ),
        (
            "odd words",
            Status::unknown("a\x1b[2J\nb"),
            "rpc error: code = Unknown desc = a\\u{1b}[2J\\nb\n",
            "",
            1,
        ),
        ("cancelled", Status::cancelled("x"), "rpc error: code = Canceled desc = x\n", "", 1),
    ] {
        let agent = Agent::saying(Answers { x509: vec![Err(status.clone())], ..Default::default() });
        let got = agent.run(&["api", "fetch", "x509"]);
        let stderr = text(&got.stderr);
        let rest = stderr.strip_prefix(want).unwrap_or_else(|| panic!("{case}: {stderr}"));
        assert!(rest.contains(advice), "{case}: {rest}");
        assert_eq!((text(&got.stdout), got.status.code()), ("", Some(code)), "{case}");
    }
}

#[test]
fn a_socket_that_does_not_answer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    drop(std::os::unix::net::UnixListener::bind(path("dead")).unwrap());
    fs::write(path("file"), "").unwrap();
    let (missing, dead, file, long) = (path("missing"), path("dead"), path("file"), path(&"x".repeat(120)));
    let directory = dir.path().to_str().unwrap().to_owned();
    let uri = format!("unix://{missing}");
    let template = path("%i");
    let none: [(&str, &str); 0] = [];
    type Case<'a> = (&'a str, &'a [&'a str], &'a [(&'a str, &'a str)], &'a str, &'a str);
    // A port that nobody has any more.
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let address = format!("tcp://127.0.0.1:{port}");
    let cases: [Case<'_>; 9] = [
        ("an address", &["--socket-path", &address], &none, "connection refused", "Nothing listens there"),
        (
            "missing",
            &["--socket-path", &missing],
            &none,
            "missing: no such file or directory",
            "given as --socket-path",
        ),
        ("dead", &["-socketPath", &dead], &none, "dead: connection refused", "start it again"),
        (
            "a file",
            &["-socketPath", &file],
            &none,
            "file: connection refused",
            "file is a file, not a socket.",
        ),
        (
            "a directory",
            &["-socketPath", &directory],
            &none,
            "connection refused",
            &format!("--socket-path.\n{directory} is a directory, not a socket.\n"),
        ),
        ("too long", &["-socketPath", &long], &none, "path must be shorter", "at most 107 bytes"),
        (
            "spire's",
            &[],
            &[("SPIRE_AGENT_PUBLIC_SOCKET", &missing)],
            "missing: no such",
            "SPIRE_AGENT_PUBLIC_SOCKET",
        ),
        (
            "the standard's",
            &[],
            &[("SPIFFE_ENDPOINT_SOCKET", &uri)],
            "missing: no such",
            "SPIFFE_ENDPOINT_SOCKET",
        ),
        (
            "an instance",
            &["-instance", "missing"],
            &[("SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE", &template)],
            "missing: no such",
            "--instance",
        ),
    ];
    for (case, line, environment, want, chosen) in cases {
        let got = durward(&["api", "fetch"]).args(line).envs(environment.iter().copied()).output().unwrap();
        let stderr = text(&got.stderr);
        assert!(
            stderr.starts_with("rpc error: code = Unavailable desc = no agent answers at "),
            "{case}: {stderr}"
        );
        assert!(stderr.contains(want) && stderr.contains(chosen), "{case}: {stderr}");
        assert_eq!(got.status.code(), Some(4), "{case}");
    }
}

#[test]
fn a_silent_agent_is_not_waited_for_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    // Never accepts: the kernel takes the connection all the same.
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let silent = Agent::saying(Answers::default());
    for (case, socket) in [("before the first byte", path.clone()), ("after the call", silent.socket())] {
        let got =
            durward(&["api", "fetch", "-timeout", "200ms", "-socketPath"]).arg(&socket).output().unwrap();
        let stderr = text(&got.stderr);
        assert!(
            stderr.starts_with("rpc error: code = DeadlineExceeded desc = context deadline exceeded\n"),
            "{case}: {stderr}"
        );
        assert_eq!(got.status.code(), Some(1), "{case}");

        let got =
            durward(&["api", "fetch", "-timeout", "1500ms", "-socketPath"]).arg(&socket).output().unwrap();
        let waiting = format!("waiting for the agent at {} (", socket.display());
        assert!(text(&got.stderr).starts_with(&waiting), "{case}: {}", text(&got.stderr));
    }
    let got = durward(&["healthcheck", "-timeout", "200ms", "-socketPath"]).arg(&path).output().unwrap();
    assert_eq!(
        (text(&got.stderr), got.status.code()),
        ("Agent is unhealthy: unable to determine health\n", Some(1))
    );
}

#[test]
fn health_is_told_as_spire_agent_tells_it() {
    let serving = Agent::saying(Answers::default());
    let not = Agent::saying(Answers { health: Health::NotServing, ..Default::default() });
    let verbose = ["healthcheck", "-verbose"];
    for (case, agent, line, stdout, stderr, code) in [
        ("serving", &serving, ["healthcheck"].as_slice(), "Agent is healthy.\n", "", 0),
        ("shallow", &serving, &["healthcheck", "-shallow"], "Agent is healthy.\n", "", 0),
        ("verbose", &serving, &verbose, "Checking agent health...\nAgent is healthy.\n", "", 0),
        (
            "not serving",
            &not,
            &["healthcheck"],
            "",
            "Agent is unhealthy: agent returned status \"NOT_SERVING\"\n`durward status` tells its user and root why.\n",
            1,
        ),
    ] {
        let got = agent.run(line);
        assert_eq!((text(&got.stdout), text(&got.stderr)), (stdout, stderr), "{case}");
        assert_eq!(got.status.code(), Some(code), "{case}");
    }
    let missing = serving.dir.path().join("missing");
    let got = durward(&["healthcheck", "-socketPath"]).arg(&missing).output().unwrap();
    let want = format!(
        "no agent answers at {}: no such file or directory\nThe path is given as --socket-path.\nIs the agent running, with \
         this socket_path?\nAgent is unhealthy: unable to determine health\n",
        missing.display()
    );
    assert_eq!((text(&got.stderr), got.status.code()), (&*want, Some(4)));
    let got = durward(&["healthcheck", "-verbose", "-socketPath"]).arg(missing).output().unwrap();
    let stderr = text(&got.stderr);
    assert!(stderr.starts_with("Failed to check health: rpc error: code = Unavailable desc = "), "{stderr}");
    assert!(stderr.ends_with("Agent is unhealthy: unable to determine health\n"), "{stderr}");
    assert_eq!(got.status.code(), Some(4));
}

/// Nobody at the default path: whoever has tried quickstart is told how to find its agent.
#[test]
fn the_agent_of_quickstart_is_called_to_mind_where_there_was_one() {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("durward");
    copy_program(&program);
    let env = dir.path().join("durward-quickstart/env");
    let path = dir.path().join("other.sock");
    for (case, is_there, flag, is_told) in [
        ("never tried", false, None, false),
        ("tried", true, None, true),
        ("tried, and another is named", true, Some(&path), false),
    ] {
        if is_there {
            fs::create_dir_all(env.parent().unwrap()).unwrap();
            fs::write(&env, "").unwrap();
        }
        for words in [&["status"][..], &["api", "fetch", "jwt", "--audience", "a"]] {
            let mut command = Command::new(&program);
            command.env_clear().env("XDG_STATE_HOME", dir.path()).args(words).stdin(Stdio::null());
            command.args(flag.iter().flat_map(|path| [Path::new("--socket-path"), path]));
            if nix::unistd::geteuid().is_root() {
                // Whose directory is another.
                command.uid(65_534).gid(65_534);
            }
            let got = command.output().unwrap();
            let (stderr, way) = (text(&got.stderr), format!("\n  . {}\n", env.display()));
            assert!(stderr.contains("no agent answers at "), "{case}: {stderr}");
            assert_eq!(stderr.ends_with(&way), is_told, "{case}: {stderr}");
            assert_eq!(got.status.code(), Some(4), "{case}");
        }
    }
}

#[test]
fn every_update_is_printed_as_it_comes() {
    let ca = Ca::new("example.org");
    let message = |paths: &[&str]| {
        let svids = paths.iter().map(|path| ca.svid(path, |_| {})).collect();
        Ok(pb::X509svidResponse { svids, ..Default::default() })
    };
    let agent =
        Agent::saying(Answers { x509: vec![message(&["/a"]), message(&["/a", "/b"])], ..Default::default() });
    let mut child = Kill(
        durward(&["api", "watch", "-socketPath"])
            .arg(agent.socket())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let lines = BufReader::new(child.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut seen = Vec::new();
    for line in lines {
        let head =
            line.split_once(" after ").or_else(|| line.split_once(" (in ")).map_or(&*line, |(head, _)| head);
        if head.starts_with("Received") || head.starts_with("SPIFFE ID") || head.starts_with("Next") {
            seen.push(head.to_owned());
        }
        if seen.len() == 7 {
            break;
        }
    }
    let next = "Next update expected around 2075-12-20 00:00:00 +0000 UTC";
    let (a, b) = ("SPIFFE ID:\t\tspiffe://example.org/a", "SPIFFE ID:\t\tspiffe://example.org/b");
    assert_eq!(seen, ["Received 1 svid", a, next, "Received 2 svids", a, b, next]);
    // When the agent is gone, what to do is said beside it.
    drop(agent);
    let lines = BufReader::new(child.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    let said: Vec<_> = lines.take_while(|line| !line.starts_with("trying again in ")).collect();
    assert!(said[0].starts_with("rpc error: code = Unavailable desc = ") && said.len() > 1, "{said:?}");
}

/// Ends the process with the test.
struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_command_line_that_contradicts_the_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let audit = dir.path().join("audit").display().to_string();
    crate::support::write_config(dir.path(), &format!("audit {{ file = \"{audit}\" }}\n"));
    let config = dir.path().join("agent.conf").display().to_string();
    for (flag, value, want) in [
        ("--socket-path", "unix:///x", "--socket-path must be a path"),
        ("--socket-path", "file://x", "--socket-path must be a path"),
        ("--log-file", &audit, "--log-file cannot be the audit's file"),
        ("--trust-domain", "example.com", "contradicts the configuration file"),
        ("-logLevel=info", "-disableWorkloadAPI", "the Workload API is the only one in this version"),
    ] {
        let got = durward(&["validate", "--config", &config, flag, value]).output().unwrap();
        assert_eq!(got.status.code(), Some(1), "{flag} {value}");
        assert!(text(&got.stderr).contains(want), "{flag} {value}: {}", text(&got.stderr));
    }
}

#[test]
fn a_wrong_command_line_is_refused_with_one() {
    for (case, line, want) in [
        ("nothing", [""; 0].as_slice(), "Usage: durward <COMMAND>"),
        ("unknown command", &["frobnicate"], "unrecognized subcommand 'frobnicate'"),
        ("half a command", &["api"], "Usage: durward api <COMMAND>"),
        ("unknown flag", &["api", "fetch", "-scoketPath", "/x"], "unexpected argument '--scoketPath'"),
        ("flag of another command", &["healthcheck", "-audience", "x"], "unexpected argument '--audience'"),
        ("no value", &["api", "fetch", "-socketPath"], "a value is required for '--socket-path <PATH>'"),
        ("no duration", &["api", "fetch", "-timeout", "5"], "\"5\" is not a duration"),
        ("no format", &["api", "fetch", "-output", "xml"], "[possible values: pretty, json]"),
        ("flag before the word", &["api", "fetch", "-silent", "jwt"], "cannot be used with"),
        ("no audience", &["api", "fetch", "jwt"], "audience must be specified"),
        ("no audience to check", &["api", "validate", "jwt", "-svid", "x"], "audience must be specified"),
        ("no token to check", &["api", "validate", "jwt", "-audience", "x"], "svid must be specified"),
        (
            "no template",
            &["api", "fetch", "-instance", "a"],
            "SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE must be set",
        ),
        (
            "a file without its flag",
            &["validate", "x.conf"],
            "tip: the configuration file is named with a flag: --config x.conf",
        ),
        ("the same to run", &["run", "x.conf"], "--config x.conf"),
        ("none of the heaviest", &["limits", "--top", "0"], "must be a number from 1 to 1000"),
        ("every no seconds", &["limits", "--watch", "x"], "must be a number from 1 to 3600"),
        ("no process", &["explain", "-pid", "abc"], "a process ID is a number above 0"),
        ("process 0", &["reload", "--or-signal", "0"], "a process ID is a number above 0"),
        ("no SPIFFE ID", &["entry", "show", "--spiffe-id", "foo"], "scheme is missing or invalid"),
        ("no level", &["run", "-logLevel", "loud"], "must be error, warn, info, debug or trace"),
        ("no trust domain", &["run", "-trustDomain", "Example.org"], "limited to lowercase letters"),
    ] {
        let got = durward(line).output().unwrap();
        let stderr = text(&got.stderr);
        assert!(stderr.contains(want), "{case}: {stderr}");
        // What is a page of help already needs no other one.
        let more = stderr.matches("For more information, try '--help'.").count();
        assert_eq!(more, usize::from(stderr.contains("error: ")), "{case}: {stderr}");
        assert_eq!((text(&got.stdout), got.status.code()), ("", Some(1)), "{case}");
    }
    for (command, uri) in
        [("api", "tcp://localhost:1"), ("api", "/a/b/api.sock"), ("status", "/a/b/api.sock")]
    {
        let line = if command == "api" { vec!["api", "fetch"] } else { vec![command] };
        let got = durward(&line).env("SPIFFE_ENDPOINT_SOCKET", uri).output().unwrap();
        assert!(text(&got.stderr).contains("must be unix://"), "{command} {uri}: {}", text(&got.stderr));
        assert_eq!(got.status.code(), Some(1), "{command} {uri}");
    }
}

#[test]
fn there_is_one_page_of_help() {
    for words in [&[][..], &["limits"], &["api", "fetch"], &["api", "fetch", "x509"], &["bundle", "show"]] {
        let [short, long] =
            ["-h", "--help"].map(|flag| durward(&[words, &[flag]].concat()).output().unwrap());
        assert_eq!(text(&short.stdout), text(&long.stdout), "{words:?}");
        assert!(short.status.success() && text(&long.stdout).contains("\n  -h, --help"), "{words:?}");
    }
}

#[test]
fn help_and_version_are_answers() {
    for (case, line, want) in [
        ("version", ["--version"].as_slice(), concat!("durward ", env!("CARGO_PKG_VERSION"), "\n")),
        ("the command", &["version"], concat!("durward ", env!("CARGO_PKG_VERSION"), "\n")),
        ("Go's version", &["-version"], concat!("durward ", env!("CARGO_PKG_VERSION"), "\n")),
        ("help", &["-help"], "Exit codes:\n  0  done\n  1  an error"),
        ("help of a command", &["api", "fetch", "jwt", "-h"], "--spiffe-id <ID>"),
    ] {
        let got = durward(line).output().unwrap();
        assert!(text(&got.stdout).contains(want), "{case}: {}", text(&got.stdout));
        assert_eq!((text(&got.stderr), got.status.code()), ("", Some(0)), "{case}");
    }
}

#[test]
fn a_reader_that_goes_away_ends_the_command_quietly() {
    let ca = Ca::new("example.org");
    let agent = Agent::saying(x509(vec![ca.svid("/a", |_| {})]));
    for line in [["man"].as_slice(), &["completions", "bash"], &["--help"], &["api", "watch"]] {
        let mut command = durward(line);
        if line == ["api", "watch"] {
            command.arg("-socketPath").arg(agent.socket());
        }
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let got = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        assert_eq!((text(&got.stderr), got.status.code()), ("", Some(0)), "{line:?}");
    }
}

#[test]
fn the_manual_has_a_page_for_every_command() {
    let dir = tempfile::tempdir().unwrap();
    let got = durward(&["man"]).arg(dir.path()).output().unwrap();
    assert_eq!((text(&got.stdout), text(&got.stderr), got.status.code()), ("", "", Some(0)));
    let mut names: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "agent.conf.5",
            "durward-api-fetch-jwt.1",
            "durward-api-fetch-x509.1",
            "durward-api-fetch.1",
            "durward-api-validate-jwt.1",
            "durward-api-validate.1",
            "durward-api-watch.1",
            "durward-api.1",
            "durward-audit-who.1",
            "durward-audit.1",
            "durward-bundle-show.1",
            "durward-bundle.1",
            "durward-completions.1",
            "durward-entry-show.1",
            "durward-entry.1",
            "durward-explain.1",
            "durward-healthcheck.1",
            "durward-limits.1",
            "durward-man.1",
            "durward-quickstart.1",
            "durward-reload.1",
            "durward-run.1",
            "durward-status.1",
            "durward-validate.1",
            "durward-version.1",
            "durward.1",
        ]
    );
    let main = fs::read_to_string(dir.path().join("durward.1")).unwrap();
    let sections: Vec<&str> = main.lines().filter(|line| line.starts_with(".SH")).collect();
    let want = [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH OPTIONS", ".SH SUBCOMMANDS"];
    assert_eq!(sections, [&want[..], &[".SH \"EXAMPLES\"", ".SH \"EXIT STATUS\"", ".SH NOTES"]].concat());
    assert_eq!(text(&durward(&["man"]).output().unwrap().stdout), main);
}

/// Lets everybody pass a directory.
fn passable(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A directory below which a quickstart may write, and what it printed.
fn quickstart(dir: &Path, line: &[&str]) -> Output {
    durward(&["quickstart", "--exit-after-fetch", "--dir"]).arg(dir).args(line).output().unwrap()
}

#[test]
fn quickstart_gives_an_identity_and_keeps_what_is_there() {
    let base = tempfile::tempdir().unwrap();
    passable(base.path());
    let dir = base.path().join("new/quick start");
    let got = quickstart(&dir, &["--trust-domain", "td.test"]);
    let out = text(&got.stdout);
    assert_eq!((text(&got.stderr), got.status.code()), ("", Some(0)), "{out}");
    for want in [
        "wrote agent.conf",
        "wrote entries.d/me.conf",
        "X.509-SVID, verified",
        "SPIFFE ID    spiffe://td.test/me\n",
        "Key type     ec-p256\n",
        "Key type     ec-p256 (ES256)\n",
        " (CA, in the bundle)\n",
        "JWT-SVID for \"durward-quickstart\", validated by the agent",
        "wrote entries.d/nobody.conf",
        "  wrote env ",
        "/new/quick start/env'\nand then, for example:\n",
        "  durward api fetch jwt --audience my-service\n",
        "\nIt ends now: start it again without --exit-after-fetch, and then enter\nin another terminal:\n",
    ] {
        assert!(out.contains(want), "{want}: {out}");
    }
    for secret in ["PRIVATE KEY", "eyJ"] {
        assert!(!out.contains(secret), "{secret}");
    }
    for (name, mode) in [
        ("", 0o755),
        ("agent.conf", 0o600),
        ("env", 0o600),
        ("entries.d", 0o700),
        ("entries.d/me.conf", 0o600),
        ("data", 0o700),
    ] {
        assert_eq!(fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o7777, mode, "{name}");
    }

    // An edited file stays, and counts.
    let entry = dir.join("entries.d/me.conf");
    let edited = fs::read_to_string(&entry).unwrap().replace("/me\"", "/edited\"");
    fs::write(&entry, &edited).unwrap();
    let got = quickstart(&dir, &[]);
    let out = text(&got.stdout);
    assert_eq!((text(&got.stderr), got.status.code()), ("", Some(0)), "{out}");
    for want in ["kept  agent.conf", "kept  entries.d/me.conf", "kept  env", "spiffe://td.test/edited\n"] {
        assert!(out.contains(want), "{want}: {out}");
    }
    assert_eq!(fs::read_to_string(&entry).unwrap(), edited);

    // An entry that nobody can have is named, and stops nothing.
    let ghost = "entry \"spiffe://td.test/web\" { selectors = [\"unix:user:no-such-user\"] }";
    fs::write(dir.join("entries.d/web.conf"), ghost).unwrap();
    let got = quickstart(&dir, &[]);
    let warned = text(&got.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
    let want = "Warning: entry \"spiffe://td.test/web\" asks for unix:user:no-such-user: there is no such user on this node";
    assert!(warned.starts_with(want) && got.status.success(), "{warned}");
    // So is a file that is not read for its name.
    fs::rename(dir.join("entries.d/web.conf"), dir.join("entries.d/web.hcl")).unwrap();
    let got = quickstart(&dir, &[]);
    let warned = text(&got.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
    let want = "entries.d/web.hcl is not read: its name must end in .conf or .json.";
    assert!(warned.ends_with(want) && got.status.success(), "{warned}");
    fs::remove_file(dir.join("entries.d/web.hcl")).unwrap();

    // What would be ignored is refused, and nothing is made of what cannot start.
    fs::remove_file(dir.join("env")).unwrap();
    let got = quickstart(&dir, &["--trust-domain", "other.test"]);
    assert!(!text(&got.stdout).contains(" env") && !dir.join("env").exists(), "{}", text(&got.stdout));
    assert!(text(&got.stderr).starts_with("--trust-domain other.test contradicts "), "{}", text(&got.stderr));
    assert_eq!(got.status.code(), Some(1));
    fs::write(&entry, "entry {").unwrap();
    let got = quickstart(&dir, &[]);
    assert!(text(&got.stderr).contains("entries.d/me.conf:1:"), "{}", text(&got.stderr));
    assert_eq!(got.status.code(), Some(1));
}

#[test]
fn quickstart_serves_until_it_is_told_to_end() {
    let base = tempfile::tempdir().unwrap();
    passable(base.path());
    let dir = base.path().join("quick start");
    for (signal, name) in [(nix::sys::signal::SIGINT, "Ctrl-C"), (nix::sys::signal::SIGTERM, "SIGTERM")] {
        let mut child = durward(&["quickstart", "--dir"])
            .arg(&dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let shown: Vec<_> = lines.take_while(|line| !line.starts_with("Serving. ")).collect();
        let starting = |word: &str| -> Vec<String> {
            shown.iter().filter(|line| line.trim_start().starts_with(word)).cloned().collect()
        };
        let found = starting(". ");
        assert_eq!(found.len(), 1, "{shown:?}");
        let commands = starting("durward ");
        assert_eq!(commands.len(), 6, "{shown:?}");
        let endless = |line: &str| line.contains(" api watch ") || line.contains(" limits --watch ");
        for command in commands.into_iter().filter(|line| !endless(line)) {
            let script = format!("{}\n{command}", found[0]);
            let got = Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
            assert!(got.status.success(), "{command}: {}", text(&got.stderr));
        }
        let wide = shown
            .iter()
            .filter(|line| line.chars().count() > 80 && !line.contains(&*base.path().to_string_lossy()));
        assert_eq!(wide.collect::<Vec<_>>(), Vec::<&String>::new(), "no line is wider than a terminal");
        // The program of a test may lie where no other account can run it; a start of another needs root.
        if nix::unistd::geteuid().is_root() {
            assert!(shown.iter().any(|line| line.ends_with("spiffe://example.org/nobody")), "{shown:?}");
        }

        let limits = shown.iter().find(|line| line.contains(" limits --watch ")).unwrap();
        let reload = format!("{}\n{}", found[0], limits.replace(" limits --watch ", " reload "));
        let got = Command::new("/bin/sh").args(["-c", &reload]).output().unwrap();
        assert!(got.status.success(), "{reload}: {}", text(&got.stderr));

        // What it says of one more account is so.
        let at = shown.iter().position(|line| line.starts_with("  echo 'entry ")).unwrap();
        let in_force = "for i in $(seq 600); do durward entry show | grep -q example.org/web && exit 0; sleep 0.1; done; exit 1";
        let more = format!("{}\n{}\n{in_force}", found[0], shown[at..=at + 1].join("\n"));
        let got = Command::new("/bin/sh").args(["-c", &more]).output().unwrap();
        assert!(got.status.success(), "{more}: {}", text(&got.stderr));

        let second = durward(&["quickstart", "--dir"]).arg(&dir).output().unwrap();
        let there = format!("an agent (process {}) serves at ", child.id());
        assert!(text(&second.stderr).starts_with(&there), "{}", text(&second.stderr));
        assert_eq!(second.status.code(), Some(1));

        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
        let ended = child.wait_with_output().unwrap();
        assert_eq!((text(&ended.stderr), ended.status.code()), ("\nEnding.\n", Some(0)), "{name}");
    }
}

/// Where others cannot pass the directory its sockets are in `/tmp`, and nothing of them stays there.
#[test]
fn quickstart_leaves_nothing_in_tmp() {
    let base = tempfile::tempdir().unwrap();
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let dir = base.path().join("closed");
    for what in ["wrote", "kept "] {
        let got = quickstart(&dir, &[]);
        let out = text(&got.stdout);
        assert_eq!((text(&got.stderr), got.status.code()), ("", Some(0)), "{out}");
        assert!(out.contains(&format!("{what} agent.conf")), "{out}");
        let socket = out.lines().find_map(|line| line.strip_prefix("  socket ")).unwrap();
        let (made, _) = socket.split_once("/public/").unwrap();
        assert!(made.starts_with("/tmp/durward-"), "{socket}");
        assert!(!Path::new(made).exists(), "{made}");
    }
    // What somebody put there stays.
    let config = fs::read_to_string(dir.join("agent.conf")).unwrap();
    let (_, rest) = config.split_once("socket_path = \"").unwrap();
    let (made, _) = rest.split_once("/public/").unwrap();
    let made = Path::new(made);
    fs::create_dir(made).unwrap();
    fs::write(made.join("mine"), "").unwrap();
    assert!(quickstart(&dir, &[]).status.success());
    assert_eq!(fs::read_dir(made).unwrap().count(), 1);
    fs::remove_dir_all(made).unwrap();
}

/// As an ordinary user too, when the test may become one.
#[test]
fn quickstart_needs_no_root() {
    if !nix::unistd::geteuid().is_root() {
        // Then every other test here has shown it.
        return;
    }
    let nobody = 65_534;
    let base = tempfile::tempdir().unwrap();
    fs::set_permissions(base.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = base.path().join("durward");
    copy_program(&program);
    let home = base.path().join("home");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(nobody), Some(nobody)).unwrap();
    let as_nobody = |line: &[&str]| {
        let mut command = Command::new(&program);
        command.env_clear().env("HOME", &home).uid(nobody).gid(nobody).args(line).stdin(Stdio::null());
        command.output().unwrap()
    };
    let got = as_nobody(&["quickstart", "--exit-after-fetch"]);
    let out = text(&got.stdout);
    assert_eq!((text(&got.stderr), got.status.code()), ("", Some(0)), "{out}");
    let dir = home.join(".local/state/durward-quickstart");
    assert!(out.starts_with(&format!("Setting up in {}\n", dir.display())), "{out}");
    assert!(out.contains("this user (user ID 65534) is /me"), "{out}");
    assert!(!out.contains("another account, which"), "it is that account: {out}");
    let got = Command::new(&program)
        .env_clear()
        .env("HOME", "/nonexistent")
        .uid(nobody)
        .gid(nobody)
        .arg("quickstart")
        .output()
        .unwrap();
    let stderr = text(&got.stderr);
    assert!(stderr.starts_with("cannot make directory /nonexistent: "), "{stderr}");
    assert!(stderr.ends_with("; choose another directory with --dir\n"), "{stderr}");
    let closed = base.path().join("closed");
    drop(std::os::unix::net::UnixListener::bind(&closed).unwrap());
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o600)).unwrap();
    for (line, want) in [
        (&["api", "fetch"][..], "rpc error: code = Unavailable desc = cannot connect to "),
        (&["status"], "cannot connect to "),
    ] {
        let got = as_nobody(&[line, &["--socket-path", closed.to_str().unwrap()]].concat());
        let want = format!("{want}{}: permission denied\n", closed.display());
        assert!(text(&got.stderr).starts_with(&want), "{}", text(&got.stderr));
        assert_eq!(got.status.code(), Some(1), "somebody may be there");
    }
    // Somebody else's directory decides nothing here.
    let got = quickstart(&dir, &[]);
    assert!(
        text(&got.stderr).contains("belongs to user ID 65534, this is user ID 0"),
        "{}",
        text(&got.stderr)
    );
    assert_eq!(got.status.code(), Some(1));
}

#[test]
fn the_agent_runs_as_the_command_line_says() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.conf");
    fs::write(&config, AGENT_CONF).unwrap();
    let socket = dir.path().join("other.sock");
    let mut child = durward(&["run", "-expandEnv", "-logFormat", "json", "-config"])
        .arg(&config)
        .arg("-socketPath")
        .arg(&socket)
        .arg("-dataDir")
        .arg(dir.path().join("data"))
        .env("NAME", "web")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let serving = lines.find(|line| line.contains("the workload api is served")).unwrap_or_default();
    assert!(serving.starts_with('{') && serving.contains("other.sock"), "{serving}");
    let run = |line: &[&str]| durward(line).arg("-socketPath").arg(&socket).output().unwrap();
    assert_eq!(text(&run(&["healthcheck"]).stdout), "Agent is healthy.\n");
    // Its only entry is for nobody here.
    let got = run(&["api", "fetch"]);
    assert!(text(&got.stderr).starts_with("rpc error: code = PermissionDenied desc = no identity issued\n"));
    assert_eq!(got.status.code(), Some(3));
    let got = run(&["api", "validate", "jwt", "-audience", "a", "-svid", "no.token"]);
    assert!(
        text(&got.stderr).starts_with("SVID is not valid: unable to parse JWT token"),
        "{}",
        text(&got.stderr)
    );
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::SIGTERM).unwrap();
    // Read to the end, or the agent would meet a closed pipe.
    lines.for_each(drop);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

const AGENT_CONF: &str = r#"
agent {
    trust_domain = "example.org"
}
issuer "embedded" {}
plugins {
    WorkloadAttestor "unix" {
        plugin_data {}
    }
}
entry "spiffe://example.org/${NAME}" {
    selectors = ["unix:uid:4294967294"]
}
"#;

#[test]
fn a_configuration_is_checked_without_starting() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.conf");
    let path = config.to_str().unwrap();
    let valid = "Durward configuration file is valid.\n";
    // The default may be there, of an agent that this node has.
    let here = format!("trust_domain = \"example.org\" data_dir = \"{}/data\"", dir.path().display());
    let good = AGENT_CONF.replace("${NAME}", "web").replacen("trust_domain = \"example.org\"", &here, 1);
    let bad = good.replace("trust_domain", "trust_domian");
    let nameless = good.replace("uid:4294967294", "user:no-such-user");
    let (no_entry, _) = good.split_once("entry ").unwrap();
    let no_entry = no_entry.to_owned();
    let held = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = held.local_addr().unwrap().port();
    let taken = format!("{good}\ntelemetry {{ Prometheus {{ host = \"127.0.0.1\" port = {port} }} }}\n");
    // Of a network for documentation (RFC 5737), which no node has.
    let elsewhere = format!(
        "{good}\nhealth_checks {{ listener_enabled = true bind_address = \"192.0.2.1\" bind_port = 8080 }}\n"
    );
    let tokenless = good.replacen(
        "plugins {",
        "plugins {\n  WorkloadAttestor \"k8s\" { plugin_data { token_path = \"/nowhere/token\" skip_kubelet_verification = true } }",
        1,
    );
    for (case, written, line, stdout, stderr, code) in [
        ("valid", &good, [""; 0].as_slice(), valid, "", 0),
        ("json", &good, &["-output", "json"], "{\"errors\":[],\"valid\":true}\n", "", 0),
        ("the same trust domain", &good, &["-trustDomain", "example.org"], valid, "", 0),
        (
            "another trust domain",
            &good,
            &["-trustDomain", "td.test"],
            "",
            "--trust-domain td.test contradicts the configuration file, whose trust_domain is example.org\n",
            1,
        ),
        (
            "a user whom this node does not have",
            &nameless,
            &[],
            valid,
            &format!(
                "Warning: {path}:11:7: entry \"spiffe://example.org/web\" asks for unix:user:no-such-user: there is no such user on \
                 this node: add it, correct the name, or ask for its number, as unix:uid:1000.\n"
            ),
            0,
        ),
        (
            "nobody to serve",
            &no_entry,
            &[],
            valid,
            "Warning: entry: there is none, so nobody is served.\n",
            0,
        ),
        (
            "a kubelet that cannot be asked",
            &tokenless,
            &[],
            valid,
            &format!(
                "Warning: {path}:7:28: plugins.WorkloadAttestor: unable to load token: cannot read /nowhere/token, which token_path \
                 names: no such file or directory; the kubelet cannot be asked without it.\n"
            ),
            0,
        ),
        (
            "a port that somebody has",
            &taken,
            &[],
            valid,
            &format!(
                "Warning: {path}:15:13: telemetry.Prometheus.port: 127.0.0.1 port {port} is not free now"
            ),
            0,
        ),
        ("an address of another node", &elsewhere, &[], "", "Durward configuration file is invalid:\n", 1),
        ("misspelt", &bad, &[], "", "Durward configuration file is invalid:\n", 1),
    ] {
        fs::write(&config, written).unwrap();
        let got = durward(&["validate", "-config", path]).args(line).output().unwrap();
        assert_eq!((text(&got.stdout), got.status.code()), (stdout, Some(code)), "{case}");
        let said = text(&got.stderr);
        assert!(if stderr.is_empty() { said.is_empty() } else { said.starts_with(stderr) }, "{case}: {said}");
    }
    let got = durward(&["validate", "-config", path, "-output", "json"]).output().unwrap();
    let said: Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!((said["valid"].clone(), got.status.code()), (json!(false), Some(1)));
    let misspelt =
        said["errors"].as_array().unwrap().iter().find(|error| error["key"] == "agent.trust_domian");
    let misspelt = misspelt.unwrap_or_else(|| panic!("{said}"));
    assert_eq!((misspelt["file"].clone(), misspelt["line"].clone()), (json!(path), json!(3)));
    fs::write(&config, &nameless).unwrap();
    let got = durward(&["validate", "-config", path, "-output", "json"]).output().unwrap();
    let said: Value = serde_json::from_slice(&got.stdout).unwrap();
    assert_eq!((said["valid"].clone(), got.status.code()), (json!(true), Some(0)));
    let warning = &said["warnings"][0];
    assert_eq!(warning["selector"], "unix:user:no-such-user", "{said}");
    assert_eq!((&warning["file"], &warning["line"]), (&json!(path), &json!(11)), "{said}");
    let got = durward(&["validate", "-config", "/nowhere/agent.conf"]).output().unwrap();
    assert!(text(&got.stderr).contains("/nowhere/agent.conf"), "{}", text(&got.stderr));
    assert_eq!(got.status.code(), Some(1));
}
