//! The Workload API over a real socket.

use std::{collections::BTreeMap, time::Duration};

use durward::api::proto::workload as pb;
use tonic::{Code, Request, Status, Streaming};

use crate::support::{TRUST_DOMAIN, TestAgent, entry, request};

fn jwt_request(audience: &[&str], spiffe_id: &str) -> pb::JwtsvidRequest {
    pb::JwtsvidRequest {
        audience: audience.iter().map(|a| (*a).to_owned()).collect(),
        spiffe_id: spiffe_id.to_owned(),
    }
}

fn said(status: &Status) -> (Code, &str) {
    (status.code(), status.message())
}

/// The next message, if one comes within the time that any change takes to arrive.
async fn next<T>(stream: &mut Streaming<T>) -> Option<Result<T, Status>> {
    match tokio::time::timeout(Duration::from_secs(10), stream.message()).await.expect("a message or the end")
    {
        Ok(message) => message.map(Ok),
        Err(status) => Some(Err(status)),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_security_header_is_there_once_and_says_true() {
    let agent = TestAgent::start(&entry("/web", ""));
    let mut client = agent.client().await;
    for (case, values, ok) in [
        ("missing", &[][..], false),
        ("once", &["true"][..], true),
        ("doubled", &["true", "true"][..], false),
        ("other value", &["false"][..], false),
        ("capital", &["True"][..], false),
        ("empty", &[""][..], false),
    ] {
        let mut request = Request::new(jwt_request(&["a"], ""));
        for value in values {
            request.metadata_mut().append("workload.spiffe.io", value.parse().unwrap());
        }
        let got = client.fetch_jwtsvid(request).await;
        match got {
            Ok(_) => assert!(ok, "{case}"),
            Err(status) => {
                assert_eq!(
                    (ok, said(&status)),
                    (false, (Code::InvalidArgument, "security header missing from request")),
                    "{case}"
                );
            }
        }
    }
    let status = client.fetch_x509svid(Request::new(pb::X509svidRequest {})).await.unwrap_err();
    assert_eq!(said(&status), (Code::InvalidArgument, "security header missing from request"));
}

#[tokio::test(flavor = "multi_thread")]
async fn jwt_svids_are_refused_with_spires_words() {
    let agent = TestAgent::start(&entry("/web", ""));
    let mut client = agent.client().await;
    let many: Vec<String> = (0..1000).map(|n| format!("a{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let quotes = "\"".repeat(9000);
    for (case, audience, id, want) in [
        ("plain", &["a"][..], "", Ok(1)),
        ("thousand audiences", &many[..], "", Ok(1)),
        ("by name", &["a"][..], "spiffe://example.org/web", Ok(1)),
        (
            "control characters",
            &["a", "b\u{1}"][..],
            "",
            Err((Code::InvalidArgument, "audience must have no control characters, and has '\\u{1}'")),
        ),
        (
            "quotes",
            &[quotes.as_str()][..],
            "",
            Err((Code::InvalidArgument, "audience has 18004 bytes as JSON, and can have at most 16384")),
        ),
        ("no audience", &[][..], "", Err((Code::InvalidArgument, "audience must be specified"))),
        ("empty audience", &[""][..], "", Err((Code::InvalidArgument, "audience must be specified"))),
        (
            "bad id",
            &["a"][..],
            "example.org/web",
            Err((Code::InvalidArgument, "invalid requested SPIFFE ID: scheme is missing or invalid")),
        ),
        (
            "not its own",
            &["a"][..],
            "spiffe://example.org/db",
            Err((Code::PermissionDenied, "no identity issued")),
        ),
    ] {
        let got = client.fetch_jwtsvid(request(jwt_request(audience, id))).await;
        let got = got.map(|response| response.into_inner().svids.len());
        assert_eq!(got.as_ref().copied().map_err(said), want, "{case}");
    }
    let too_long = "a".repeat(64 * 1024);
    let status = client.fetch_jwtsvid(request(jwt_request(&[&too_long], ""))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_validates_until_its_audience_or_a_byte_is_another() {
    let agent = TestAgent::start(&entry("/web", "hint = \"front\""));
    let mut client = agent.client().await;
    let answer = client.fetch_jwtsvid(request(jwt_request(&["a", "b"], ""))).await.unwrap().into_inner();
    let svid = answer.svids.first().unwrap().clone();
    assert_eq!((svid.spiffe_id.as_str(), svid.hint.as_str()), ("spiffe://example.org/web", "front"));

    let mut validate = async |audience: &str, svid: &str| {
        let message = pb::ValidateJwtsvidRequest { audience: audience.to_owned(), svid: svid.to_owned() };
        client.validate_jwtsvid(request(message)).await.map(tonic::Response::into_inner)
    };
    let valid = validate("b", &svid.svid).await.unwrap();
    assert_eq!(valid.spiffe_id, "spiffe://example.org/web");
    let claims: BTreeMap<_, _> = valid.claims.unwrap().fields.into_iter().collect();
    assert_eq!(claims.keys().map(String::as_str).collect::<Vec<_>>(), ["aud", "exp", "iat", "sub"]);

    let mut forged = svid.svid.clone().into_bytes();
    let middle = forged.len() - 10;
    forged[middle] = if forged[middle] == b'A' { b'B' } else { b'A' };
    let forged = String::from_utf8(forged).unwrap();
    for (case, audience, token, want) in [
        ("no audience", "", svid.svid.as_str(), "audience must be specified"),
        ("no token", "a", "", "svid must be specified"),
        ("forged", "a", forged.as_str(), "go-jose/go-jose: error in cryptographic primitive"),
    ] {
        let status = validate(audience, token).await.unwrap_err();
        assert_eq!(said(&status), (Code::InvalidArgument, want), "{case}");
    }
    let status = validate("c", &svid.svid).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("expected audience in"), "{status}");
    let status = validate("a", &"a".repeat(1024 * 1024)).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn identities_come_in_a_stable_order_with_unique_hints() {
    let blocks = [
        entry("/b", "hint = \"x\"\n  id = \"2\""),
        entry("/a", "hint = \"x\"\n  id = \"3\""),
        entry("/c", "id = \"1\""),
    ]
    .concat();
    let agent = TestAgent::start(&blocks);
    let mut client = agent.client().await;
    let want = [("spiffe://example.org/c", ""), ("spiffe://example.org/b", "x")];

    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    let message = next(&mut stream).await.unwrap().unwrap();
    let got: Vec<_> = message.svids.iter().map(|s| (s.spiffe_id.as_str(), s.hint.as_str())).collect();
    assert_eq!(got, want);

    let answer = client.fetch_jwtsvid(request(jwt_request(&["a"], ""))).await.unwrap().into_inner();
    let got: Vec<_> = answer.svids.iter().map(|s| (s.spiffe_id.as_str(), s.hint.as_str())).collect();
    assert_eq!(got, want);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_follow_what_changes_for_them_and_nothing_else() {
    let mut agent = TestAgent::start(&entry("/web", ""));
    let mut client = agent.client().await;
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    let first = next(&mut stream).await.unwrap().unwrap();
    let ids = |m: &pb::X509svidResponse| m.svids.iter().map(|s| s.spiffe_id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&first), ["spiffe://example.org/web"]);

    // What concerns others, or nobody, is not sent: the next message is that of the change after it.
    agent.reload(&entry("/web", "")).unwrap();
    let stranger = "entry \"spiffe://example.org/other\" {\n  selectors = [\"unix:uid:4242\"]\n}\n";
    agent.reload(&[entry("/web", "").as_str(), stranger].concat()).unwrap();
    agent.reload(&[entry("/web", ""), entry("/web2", "")].concat()).unwrap();
    let second = next(&mut stream).await.unwrap().unwrap();
    let mut got = ids(&second);
    got.sort();
    assert_eq!(got, ["spiffe://example.org/web", "spiffe://example.org/web2"]);
    let kept =
        |m: &pb::X509svidResponse| m.svids.iter().find(|s| s.spiffe_id.ends_with("/web")).unwrap().clone();
    assert_eq!(kept(&first), kept(&second), "an SVID that did not change is the same");

    // A broken file changes nothing.
    assert!(agent.reload("entry \"spiffe://other.org/x\" { selectors = [\"unix:uid:1\"] }").is_err());
    let third =
        client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner().message().await;
    assert_eq!(ids(&third.unwrap().unwrap()).len(), 2);

    agent.reload(stranger).unwrap();
    let status = next(&mut stream).await.unwrap().unwrap_err();
    assert_eq!(said(&status), (Code::PermissionDenied, "no identity issued"));
}

#[tokio::test(flavor = "multi_thread")]
async fn bundles_are_for_identities_unless_the_admin_says_otherwise() {
    let stranger = "entry \"spiffe://example.org/other\" {\n  selectors = [\"unix:uid:4242\"]\n}\n";
    let mut agent = TestAgent::start(stranger);
    let mut client = agent.client().await;
    let status = match client.fetch_x509_bundles(request(pb::X509BundlesRequest {})).await {
        Ok(stream) => stream.into_inner().message().await.unwrap_err(),
        Err(status) => status,
    };
    assert_eq!(said(&status), (Code::PermissionDenied, "no identity issued"));

    agent.reload(&entry("/web", "")).unwrap();
    let own = format!("spiffe://{TRUST_DOMAIN}");
    let mut x509 = client.fetch_x509_bundles(request(pb::X509BundlesRequest {})).await.unwrap().into_inner();
    let message = next(&mut x509).await.unwrap().unwrap();
    assert_eq!(message.bundles.keys().collect::<Vec<_>>(), [&own]);
    assert!(!message.bundles[&own].is_empty());
    let mut jwt = client.fetch_jwt_bundles(request(pb::JwtBundlesRequest {})).await.unwrap().into_inner();
    let message = next(&mut jwt).await.unwrap().unwrap();
    let jwks: serde_json::Value = serde_json::from_slice(&message.bundles[&own]).unwrap();
    assert!(!jwks["keys"].as_array().unwrap().is_empty());
}

/// A bundle that is empty in an answer has clients refuse all of it: a domain is named where it has what is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn a_domain_without_authorities_of_a_kind_takes_none_from_anybody() {
    let files = tempfile::tempdir().unwrap();
    let other = TestAgent::start(&entry("/web", ""));
    let mut client = other.client().await;
    let svids = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let der = next(&mut svids.into_inner()).await.unwrap().unwrap().svids[0].bundle.clone();
    let jwks = client.fetch_jwt_bundles(request(pb::JwtBundlesRequest {})).await.unwrap();
    let jwks = next(&mut jwks.into_inner()).await.unwrap().unwrap().bundles.into_values().next().unwrap();
    let mut jwks: serde_json::Value = serde_json::from_slice(&jwks).unwrap();
    for key in jwks["keys"].as_array_mut().unwrap() {
        key["use"] = "jwt-svid".into();
    }
    let x5c = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &der);
    let x509 = serde_json::json!({ "keys": [
        { "use": "x509-svid", "kty": "EC", "x5c": [x5c] },
        { "use": "sig", "kty": "EC" },
        { "use": "jwt-svid", "kty": "oct" },
        { "use": "wit-svid", "kty": "EC" },
        { "kty": "EC" },
    ] });
    let mut blocks = entry("/web", "federates_with = [\"jwt.example\", \"x509.example\"]");
    for (name, bundle) in [("jwt", jwks), ("x509", x509)] {
        let path = files.path().join(name);
        std::fs::write(&path, bundle.to_string()).unwrap();
        let path = path.display();
        blocks.push_str(&format!(
            "federation \"{name}.example\" {{ bundle_path = \"{path}\" bundle_format = \"spiffe\" }}\n"
        ));
    }
    let agent = TestAgent::start(&blocks);
    let mut client = agent.client().await;
    let own = format!("spiffe://{TRUST_DOMAIN}");
    let (jwt, x509) = ("spiffe://jwt.example".to_owned(), "spiffe://x509.example".to_owned());

    let svids = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let message = next(&mut svids.into_inner()).await.unwrap().unwrap();
    assert_eq!(message.federated_bundles.keys().collect::<Vec<_>>(), [&x509]);
    let bundles = client.fetch_x509_bundles(request(pb::X509BundlesRequest {})).await.unwrap();
    let message = next(&mut bundles.into_inner()).await.unwrap().unwrap();
    assert_eq!(message.bundles.keys().collect::<Vec<_>>(), [&own, &x509]);
    let bundles = client.fetch_jwt_bundles(request(pb::JwtBundlesRequest {})).await.unwrap();
    let message = next(&mut bundles.into_inner()).await.unwrap().unwrap();
    assert_eq!(message.bundles.keys().collect::<Vec<_>>(), [&own, &jwt]);

    // What is lacking is said before the start.
    let config = agent.dir.path().join("agent.conf");
    let told = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
        .args(["validate", "--config", config.to_str().unwrap()])
        .output()
        .unwrap();
    let said = String::from_utf8(told.stderr).unwrap();
    for want in [
        "bundle has no X.509 authority: X.509-SVIDs of jwt.example are not trusted.",
        "bundle has no JWT authority: JWT-SVIDs of x509.example are not trusted; keys[1] is not used, since its \"use\" is not \
         x509-svid or jwt-svid, and neither are 2 more.",
    ] {
        assert!(said.contains(&format!(": federation: {want}")), "{want}: {said}");
    }
    let places = said.lines().filter(|line| line.contains(": federation: "));
    let mut places: Vec<_> = places.filter_map(|line| line.split(": federation: ").next()).collect();
    places.dedup();
    assert_eq!(places.len(), 2, "each has its block: {said}");
    assert!(places.iter().all(|at| at.starts_with(&format!("Warning: {}:", config.display()))), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wit_svids_are_not_there_yet() {
    let agent = TestAgent::start(&entry("/web", ""));
    let mut client = agent.client().await;
    let svid = client.fetch_witsvid(request(pb::WitsvidRequest::default())).await.unwrap_err();
    assert_eq!(said(&svid), (Code::Unimplemented, "fetching WIT-SVIDs is not implemented"));
    let bundles = client.fetch_wit_bundles(request(pb::WitBundlesRequest {})).await.unwrap_err();
    assert_eq!(said(&bundles), (Code::Unimplemented, "fetching WIT bundles is not implemented"));
    let bare = client.fetch_witsvid(Request::new(pb::WitsvidRequest::default())).await.unwrap_err();
    assert_eq!(bare.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_tells_streams_to_come_back() {
    let agent = TestAgent::start(&entry("/web", ""));
    let mut client = agent.client().await;
    let socket = agent.socket();
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    next(&mut stream).await.unwrap().unwrap();
    let TestAgent { running, dir: _dir } = agent;
    running.shutdown().await;
    let status = next(&mut stream).await.unwrap().unwrap_err();
    assert_eq!(said(&status), (Code::Unavailable, "the agent is shutting down; connect again"));
    assert!(!socket.exists(), "the socket is gone");
}

/// The services that reflection of this version names: both have types of their own.
macro_rules! reflected {
    ($version:ident, $channel:expr) => {{
        use tonic_reflection::pb::$version::{
            ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
            server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
        };
        let ask = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut reflection = ServerReflectionClient::new($channel.clone());
        let answers = reflection.server_reflection_info(tokio_stream::once(ask)).await.unwrap();
        let answer = answers.into_inner().message().await.unwrap().unwrap();
        let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
            panic!("a list of services")
        };
        list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_answer_without_the_header() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    let agent = TestAgent::start("");
    let channel = crate::support::channel(&agent.socket()).await;
    let mut health = HealthClient::new(channel.clone());
    let serving = health.check(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(serving.status, 1, "SERVING");
    let status = health.check(HealthCheckRequest { service: "x".to_owned() }).await.unwrap_err();
    assert_eq!(said(&status), (Code::InvalidArgument, "per-service health is not supported"));

    // As older clients ask, grpcurl 1.8 among them, and as newer ones do.
    for (version, names) in [("v1alpha", reflected!(v1alpha, channel)), ("v1", reflected!(v1, channel))] {
        for want in ["SpiffeWorkloadAPI", "grpc.health.v1.Health"] {
            assert!(names.iter().any(|name| name == want), "{version}: {want} in {names:?}");
        }
    }
}
