//! Every request head is charged and counted once, whatever becomes of it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::net::UnixStream;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::support::{TestAgent, channel, entry};

/// For what should be done in moments, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

const JWT: &str = "/SpiffeWorkloadAPI/FetchJWTSVID";
const X509: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const VALIDATE: &str = "/SpiffeWorkloadAPI/ValidateJWTSVID";
const HEALTH: &str = "/grpc.health.v1.Health/Check";
const REFLECTION: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// How a request goes on after its head.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// With this body.
    Body(&'static [u8]),
    /// Without one.
    End,
    /// It is reset at once.
    Reset,
    /// It is reset when a part of its body has come.
    Part,
}

/// A kind of request: its path, headers, what comes after, and as what it is counted. And whether it costs a token of
/// `Other`: what the limits were asked about as another method does not.
type Kind = (&'static str, &'static str, &'static [(&'static str, &'static str)], Then, &'static str, bool);

const SHOWN: &[(&str, &str)] = &[("workload.spiffe.io", "true")];
const AUDIENCE: &[u8] = &[0, 0, 0, 0, 3, 0x0a, 1, b'a'];
const NONE: &[u8] = &[0, 0, 0, 0, 0];

const KINDS: &[Kind] = &[
    ("a call", JWT, SHOWN, Then::Body(AUDIENCE), "FetchJWTSVID OK", false),
    ("an audience that is missing", JWT, SHOWN, Then::Body(NONE), "FetchJWTSVID InvalidArgument", false),
    ("a token that is none", VALIDATE, SHOWN, Then::Body(AUDIENCE), "ValidateJWTSVID InvalidArgument", false),
    ("no security header", JWT, &[], Then::Body(AUDIENCE), "FetchJWTSVID InvalidArgument", true),
    ("a stream without it", X509, &[], Then::Body(NONE), "FetchX509SVID InvalidArgument", true),
    (
        "two of it",
        JWT,
        &[("workload.spiffe.io", "true"), ("workload.spiffe.io", "true")],
        Then::Body(AUDIENCE),
        "FetchJWTSVID InvalidArgument",
        true,
    ),
    ("an unknown method", "/SpiffeWorkloadAPI/X", SHOWN, Then::End, "Other Unimplemented", true),
    ("an unknown service", "/x/y", SHOWN, Then::End, "Other Unimplemented", true),
    ("no method", "/", SHOWN, Then::End, "Other Unimplemented", true),
    ("a method and more", "/SpiffeWorkloadAPI/FetchJWTSVID/x", SHOWN, Then::End, "Other Unimplemented", true),
    ("a method of another service", "/x/FetchJWTSVID", SHOWN, Then::End, "Other Unimplemented", true),
    ("no message", JWT, SHOWN, Then::Body(&[0, 0, 0, 0, 1, 0xff]), "FetchJWTSVID Internal", true),
    ("no body", JWT, SHOWN, Then::End, "FetchJWTSVID Internal", true),
    ("a part of a message", JWT, SHOWN, Then::Body(&[0, 0, 0, 0, 9, 0x0a]), "FetchJWTSVID Internal", true),
    ("a message that is too long", JWT, SHOWN, Then::Body(&[0, 0, 1, 0, 0]), "FetchJWTSVID OutOfRange", true),
    ("a flag that is none", JWT, SHOWN, Then::Body(&[9, 0, 0, 0, 0]), "FetchJWTSVID Internal", true),
    (
        "compressed",
        JWT,
        &[("workload.spiffe.io", "true"), ("grpc-encoding", "gzip")],
        Then::Body(&[1, 0, 0, 0, 1, 0]),
        "FetchJWTSVID Unimplemented",
        true,
    ),
    (
        "no message of a stream",
        X509,
        SHOWN,
        Then::Body(&[0, 0, 0, 0, 1, 0xff]),
        "FetchX509SVID Internal",
        true,
    ),
    ("reset", JWT, SHOWN, Then::Reset, "FetchJWTSVID Canceled|FetchJWTSVID Internal", true),
    ("reset in its body", JWT, SHOWN, Then::Part, "FetchJWTSVID Canceled|FetchJWTSVID Internal", true),
    ("health", HEALTH, &[], Then::Body(NONE), "Other OK", true),
    ("health of a service", HEALTH, &[], Then::Body(AUDIENCE), "Other InvalidArgument", true),
    ("no health", "/grpc.health.v1.Health/X", &[], Then::End, "Other Unimplemented", true),
    ("reflection", REFLECTION, &[], Then::Body(&[0, 0, 0, 0, 2, 0x3a, 0]), "Other OK", true),
    ("no question", REFLECTION, &[], Then::Body(&[0, 0, 0, 0, 1, 0xff]), "Other OK", true),
];

/// Sends a request of this kind, and reads its answer to the end.
async fn send(
    http2: &mut SendRequest<Bytes>,
    path: &str,
    headers: &[(&str, &str)],
    then: Then,
) -> Result<(), h2::Error> {
    let mut request = Request::post(format!("http://localhost{path}")).header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.header("content-type", "application/grpc").body(()).unwrap();
    *http2 = http2.clone().ready().await?;
    let (answer, mut body) = http2.send_request(request, matches!(then, Then::End))?;
    match then {
        // Some are answered by their head alone, and are over by now.
        Then::Body(bytes) => drop(body.send_data(Bytes::from_static(bytes), true)),
        Then::End => {}
        Then::Reset => {
            body.send_reset(h2::Reason::CANCEL);
            return Ok(());
        }
        Then::Part => {
            body.send_data(Bytes::from_static(&[0, 0, 0, 0, 9]), false)?;
            // Long enough for some of them to be there.
            tokio::time::sleep(Duration::from_millis(5)).await;
            body.send_reset(h2::Reason::CANCEL);
            return Ok(());
        }
    }
    let mut answer = answer.await?.into_body();
    while let Some(data) = answer.data().await {
        let length = data?.len();
        answer.flow_control().release_capacity(length)?;
    }
    answer.trailers().await.map(drop)
}

/// Every series of calls that is not zero: `method code` and its number.
fn counted(agent: &TestAgent) -> Vec<(String, u64)> {
    let text = agent.running.metrics().render();
    let lines = text.lines().filter_map(|line| line.strip_prefix("durward_calls_total{method=\""));
    let series = lines.filter_map(|line| {
        let (method, rest) = line.split_once('"')?;
        let (code, number) = rest.strip_prefix(",code=\"")?.split_once("\"} ")?;
        Some((format!("{method} {code}"), number.parse().unwrap()))
    });
    series.filter(|(_, number)| *number > 0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_is_counted_once_and_charged() {
    const EACH: u32 = 7;
    const BURST: u32 = 100;
    for (case, path, headers, then, want, costs) in KINDS {
        let other = format!(
            "ratelimit {{ caller {{ method \"Other\" {{ rate = 1 per = \"hour\" burst = {BURST} }} }} }}\n{}",
            entry("/own", "")
        );
        let agent = TestAgent::start(&other);
        let stream = UnixStream::connect(agent.socket()).await.unwrap();
        let (mut http2, connection) = h2::client::handshake(stream).await.unwrap();
        let connection = tokio::spawn(connection);
        for _ in 0..EACH {
            send(&mut http2, path, headers, *then).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        }
        let began = Instant::now();
        // What is reset at once may look like a body that ended.
        let is_it = |series: &[(String, u64)]| {
            series.iter().all(|(series, _)| want.split('|').any(|want| want == series))
                && series.iter().map(|(_, number)| number).sum::<u64>() == u64::from(EACH)
        };
        while !is_it(&counted(&agent)) {
            assert!(began.elapsed() < PATIENCE, "{case}: {:?}", counted(&agent));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(http2);
        connection.abort();

        // What is left for others.
        let mut health = HealthClient::new(channel(&agent.socket()).await);
        let mut passed = 0;
        while health.check(HealthCheckRequest::default()).await.is_ok() {
            passed += 1;
            assert!(passed <= BURST, "{case}");
        }
        assert_eq!(passed, if *costs { BURST - EACH } else { BURST }, "{case}");
        let all: u64 = counted(&agent).iter().map(|(_, number)| number).sum();
        assert_eq!(all, u64::from(EACH + passed + 1), "{case}: {:?}", counted(&agent));
    }
}

/// What is asked beyond the tokens there are is owed, a burst of it at most; another caller's bucket is its own.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_could_refuse_is_owed() {
    let agent = TestAgent::start("ratelimit { caller { method \"Other\" { rate = 50 burst = 50 } } }");
    let stream = UnixStream::connect(agent.socket()).await.unwrap();
    let (mut http2, connection) = h2::client::handshake(stream).await.unwrap();
    let _connection = tokio::spawn(connection);
    for _ in 0..500 {
        send(&mut http2, JWT, &[], Then::Body(AUDIENCE)).await.unwrap();
    }
    let mut health = HealthClient::new(channel(&agent.socket()).await);
    let status = health.check(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
    let began = Instant::now();
    while let Err(status) = health.check(HealthCheckRequest::default()).await {
        assert!(began.elapsed() < PATIENCE, "{status:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
