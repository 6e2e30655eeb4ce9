//! Every request head is charged and counted once, whatever becomes of it.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream as StdStream,
    time::{Duration, Instant},
};

use bytes::Bytes;
use durward::api::proto::workload::{JwtsvidRequest, ValidateJwtsvidRequest, X509svidRequest};
use h2::client::SendRequest;
use http::Request;
use tokio::net::UnixStream;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    frames::{
        CONTINUATION, Called, DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, RST_STREAM, SETTINGS,
        answer_on, block, frame, literal,
    },
    support::{TestAgent, channel, entry, request},
};

/// For what should be done in moments, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

const JWT: &str = "/SpiffeWorkloadAPI/FetchJWTSVID";
const X509: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const VALIDATE: &str = "/SpiffeWorkloadAPI/ValidateJWTSVID";
const HEALTH: &str = "/grpc.health.v1.Health/Check";
const REFLECTION_V1ALPHA: &str = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
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
    /// It was the end, and no client of HTTP/2 would send such a head.
    ByHand,
}

/// A kind of request: its path, headers, what comes after, and as what it is counted. And whether it costs a token of
/// `Other`: what the limits were asked about as another method does not.
type Kind = (&'static str, &'static str, &'static [(&'static str, &'static str)], Then, &'static str, bool);

const SHOWN: &[(&str, &str)] = &[("workload.spiffe.io", "true")];
const AUDIENCE: &[u8] = &[0, 0, 0, 0, 3, 0x0a, 1, b'a'];
const NONE: &[u8] = &[0, 0, 0, 0, 0];
/// As long as no value that anybody reads.
const LONG: &str = concat!(
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"
);

/// Of a header list that is larger than the agent takes: more than 16 KiB.
const HUGE: &str = match str::from_utf8(&[b'x'; 17 * 1024]) {
    Ok(text) => text,
    Err(_) => "",
};

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
    (
        "a message that is too long",
        JWT,
        SHOWN,
        Then::Body(&[0, 0, 1, 0, 1]),
        "FetchJWTSVID ResourceExhausted",
        true,
    ),
    ("a name that is too long", HEALTH, &[], Then::Body(&[0, 0, 0, 4, 1]), "Other ResourceExhausted", true),
    (
        "an encoding that nobody knows",
        JWT,
        &[("workload.spiffe.io", "true"), ("grpc-encoding", LONG)],
        Then::Body(AUDIENCE),
        "FetchJWTSVID Unimplemented",
        true,
    ),
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
    ("reset", JWT, SHOWN, Then::Reset, "FetchJWTSVID Canceled", true),
    ("reset in its body", JWT, SHOWN, Then::Part, "FetchJWTSVID Canceled", true),
    ("health", HEALTH, &[], Then::Body(NONE), "Other OK", true),
    ("health of a service", HEALTH, &[], Then::Body(AUDIENCE), "Other InvalidArgument", true),
    ("no health", "/grpc.health.v1.Health/X", &[], Then::End, "Other Unimplemented", true),
    ("reflection", REFLECTION, &[], Then::Body(&[0, 0, 0, 0, 2, 0x3a, 0]), "Other OK", true),
    (
        "reflection as it was",
        REFLECTION_V1ALPHA,
        &[],
        Then::Body(&[0, 0, 0, 0, 2, 0x3a, 0]),
        "Other OK",
        true,
    ),
    ("two authorities", JWT, &[(":authority", "again")], Then::ByHand, "Other Internal", true),
    ("a name in upper case", JWT, &[("A", "b")], Then::ByHand, "Other Internal", true),
    ("a header list that is too large", JWT, &[("x", HUGE)], Then::ByHand, "Other Internal", true),
    ("no question", REFLECTION, &[], Then::Body(&[0, 0, 0, 0, 1, 0xff]), "Other OK", true),
];

/// A connection that lasts as long as the test.
async fn http2(agent: &TestAgent) -> SendRequest<Bytes> {
    let stream = UnixStream::connect(agent.socket()).await.unwrap();
    let (http2, connection) = h2::client::handshake(stream).await.unwrap();
    let _connection = tokio::spawn(connection);
    http2
}

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
        Then::End | Then::ByHand => {}
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

/// Sends so many heads on one connection, which is to be kept.
fn send_by_hand(agent: &TestAgent, times: u32, path: &str, headers: &[(&str, &str)]) -> StdStream {
    let mut stream = StdStream::connect(agent.socket()).unwrap();
    let fields: Vec<u8> = headers.iter().flat_map(|(name, value)| literal(name, value)).collect();
    let list = [block(path), fields].concat();
    let mut sent = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    for nth in 0..times {
        let mut parts = list.chunks(16 * 1024).peekable();
        let (mut kind, mut flags) = (HEADERS, END_STREAM);
        while let Some(part) = parts.next() {
            let last = if parts.peek().is_none() { END_HEADERS } else { 0 };
            sent.extend(frame(kind, flags | last, 2 * nth + 1, part));
            (kind, flags) = (CONTINUATION, 0);
        }
    }
    stream.write_all(&sent).unwrap();
    stream
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
        let by_hand = matches!(then, Then::ByHand).then(|| send_by_hand(&agent, EACH, path, headers));
        for _ in 0..if by_hand.is_some() { 0 } else { EACH } {
            send(&mut http2, path, headers, *then).await.unwrap_or_else(|error| panic!("{case}: {error}"));
        }
        let began = Instant::now();
        let is_it = |series: &[(String, u64)]| {
            series.iter().all(|(series, _)| want == series)
                && series.iter().map(|(_, number)| number).sum::<u64>() == u64::from(EACH)
        };
        while !is_it(&counted(&agent)) {
            assert!(began.elapsed() < PATIENCE, "{case}: {:?}", counted(&agent));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop((http2, by_hand));
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

/// A head that begins no call is its caller's all the same: where there are as many as may be open, where the connection ends
/// by it, and where the client leaves.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_begins_no_call_is_counted_once() {
    let head = |number: u32, block: &[u8]| frame(HEADERS, END_HEADERS, number, block);
    let waits = |number: u32| head(number, &block(JWT));
    // Nothing is there to write over, and where its frame began has been passed on.
    let late = [literal(":method", "POST"), literal(":path", &"/x".repeat(150)), literal(":authority", "")];
    for (case, frames, leaves, want) in [
        (
            "more than may be open",
            [waits(1), waits(3), waits(5), waits(7)].concat(),
            false,
            ("Other Unavailable", 2),
        ),
        // An index of HPACK that there is not.
        ("its connection ends by it", head(1, &[0xff, 0x80, 0x7f]), false, ("Other Internal", 1)),
        (
            "an empty authority behind 256 bytes of its frame",
            head(1, &late.concat()),
            false,
            ("Other Internal", 1),
        ),
        ("in part", frame(HEADERS, 0, 1, &block("/x/y")), true, ("Other Canceled", 1)),
    ] {
        let streams = "ratelimit { gate { connection { streams = 2 } } }";
        let agent = TestAgent::start(&format!("{streams}\n{}", entry("/own", "")));
        let mut stream = StdStream::connect(agent.socket()).unwrap();
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[]), &frames].concat()).unwrap();
        if leaves {
            // What came with its SETTINGS was read when these are acknowledged.
            let (mut got, mut byte) = (Vec::new(), [0]);
            while !got.ends_with(&frame(SETTINGS, 1, 0, &[])) {
                stream.read_exact(&mut byte).unwrap();
                got.extend(byte);
            }
        }
        let stream = Some(stream).filter(|_| !leaves);
        let began = Instant::now();
        let want = [(want.0.to_owned(), want.1)];
        while counted(&agent) != want {
            assert!(began.elapsed() < PATIENCE, "{case}: {:?}", counted(&agent));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        drop(stream);
    }
}

/// They end their own stream: the others of the connection go on. An end without fields is one like any other.
#[tokio::test(flavor = "multi_thread")]
async fn fields_behind_a_body_end_no_other_call() {
    let agent = TestAgent::start(&entry("/own", ""));
    let (part, rest) = AUDIENCE.split_at(5);
    let begun = |number: u32| {
        [frame(HEADERS, END_HEADERS, number, &block(JWT)), frame(DATA, 0, number, part)].concat()
    };
    let end = |number: u32, fields: &[u8]| frame(HEADERS, END_HEADERS | END_STREAM, number, fields);
    let mut stream = StdStream::connect(agent.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let first = [PREFACE, &frame(SETTINGS, 0, 0, &[]), &begun(1), &begun(3), &end(3, &literal("a", "b"))];
    stream.write_all(&first.concat()).unwrap();
    let ended = tokio::task::spawn_blocking(move || {
        // PROTOCOL_ERROR.
        let reset = frame(RST_STREAM, 0, 3, &1_u32.to_be_bytes());
        let (mut got, mut byte) = (Vec::new(), [0]);
        while !got.ends_with(&reset) {
            stream.read_exact(&mut byte).unwrap();
            got.extend(byte);
        }
        stream.write_all(&[frame(DATA, 0, 1, rest), end(1, &[])].concat()).unwrap();
        answer_on(1, &mut stream)
    });
    assert_eq!(ended.await.unwrap(), Called::Answered);
    let all: u64 = counted(&agent).iter().map(|(_, number)| number).sum();
    assert_eq!(all, 2, "{:?}", counted(&agent));
}

/// CONNECT asks for a stream of bytes. That is none of ours, and holds nobody up.
#[tokio::test(flavor = "multi_thread")]
async fn a_connect_is_no_call() {
    let agent = TestAgent::start(&entry("/own", ""));
    let mut http2 = http2(&agent).await;
    for nth in 0..20 {
        let uri =
            if nth % 2 == 0 { "localhost:443" } else { "http://localhost/SpiffeWorkloadAPI/FetchJWTSVID" };
        let request =
            Request::builder().method("CONNECT").uri(uri).header("content-type", "application/grpc");
        http2 = http2.ready().await.unwrap();
        let (answer, _body) = http2.send_request(request.body(()).unwrap(), false).unwrap();
        // An answer or a reset, as HTTP/2 sees fit.
        drop(tokio::time::timeout(PATIENCE, answer).await.expect("an answer"));
    }
    send(&mut http2, JWT, SHOWN, Then::Body(AUDIENCE)).await.unwrap();
    assert!(counted(&agent).contains(&("FetchJWTSVID OK".to_owned(), 1)), "{:?}", counted(&agent));
}

/// What is asked beyond the tokens there are is owed, a burst of it at most; another caller's bucket is its own.
#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_could_refuse_is_owed() {
    let agent = TestAgent::start("ratelimit { caller { method \"Other\" { rate = 50 burst = 50 } } }");
    let mut http2 = http2(&agent).await;
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

/// What grpc-go's server says to a request that is none of gRPC's, and each is counted and charged.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_grpc_is_told_so() {
    const BURST: u32 = 100;
    let agent = TestAgent::start(&format!(
        "ratelimit {{ caller {{ method \"Other\" {{ rate = 1 per = \"hour\" burst = {BURST} }} }} }}\n{}",
        entry("/own", "")
    ));
    let mut http2 = http2(&agent).await;
    let mut wrong = 0;
    for (method, content_type, http, grpc, text) in [
        ("POST", Some("application/grpc"), 200, "0", ""),
        ("POST", Some("application/grpc+proto"), 200, "0", ""),
        ("POST", Some("application/grpc;charset=utf-8"), 200, "0", ""),
        ("POST", None, 415, "3", "invalid gRPC request content-type \"\""),
        (
            "POST",
            Some("application/json"),
            415,
            "3",
            "invalid gRPC request content-type \"application/json\"",
        ),
        (
            "POST",
            Some("application/grpc-web"),
            415,
            "3",
            "invalid gRPC request content-type \"application/grpc-web\"",
        ),
        (
            "POST",
            Some("application/grpcx"),
            415,
            "3",
            "invalid gRPC request content-type \"application/grpcx\"",
        ),
        ("GET", None, 415, "3", "invalid gRPC request content-type \"\""),
        (
            "GET",
            Some("application/grpc"),
            405,
            "13",
            "Received a HEADERS frame with :method \"GET\" which should be POST",
        ),
        (
            "PUT",
            Some("application/grpc"),
            405,
            "13",
            "Received a HEADERS frame with :method \"PUT\" which should be POST",
        ),
    ] {
        for path in [JWT, HEALTH] {
            let case = format!("{method} {content_type:?} {path}");
            let mut request = Request::builder().method(method).uri(format!("http://localhost{path}"));
            if let Some(content_type) = content_type {
                request = request.header("content-type", content_type);
            }
            let request = request.header("workload.spiffe.io", "true").body(()).unwrap();
            http2 = http2.ready().await.unwrap();
            let (answer, mut body) = http2.send_request(request, false).unwrap();
            let sent = if path == JWT { AUDIENCE } else { NONE };
            drop(body.send_data(Bytes::from_static(sent), true));
            let answer = answer.await.unwrap();
            assert_eq!(answer.status(), http, "{case}");
            let (head, mut body) = answer.into_parts();
            while let Some(data) = body.data().await {
                data.unwrap();
            }
            let trailers = body.trailers().await.unwrap().unwrap_or(head.headers);
            assert_eq!(trailers["grpc-status"], grpc, "{case}");
            let said = trailers.get("grpc-message").map_or("", |said| said.to_str().unwrap());
            let said = said.replace("%20", " ").replace("%22", "\"");
            assert_eq!(said, text, "{case}");
            wrong += u32::from(http != 200);
        }
    }
    let all: u64 = counted(&agent).iter().map(|(_, number)| number).sum();
    assert_eq!(all, 20);
    let mut health = HealthClient::new(channel(&agent.socket()).await);
    let mut passed = 0;
    while health.check(HealthCheckRequest::default()).await.is_ok() {
        passed += 1;
    }
    // Those that were answered as they were asked: three of health.
    assert_eq!(passed, BURST - wrong - 3);
}

/// A panic in a call, of a handler as of whatever it uses, is that call's own.
#[tokio::test(flavor = "multi_thread")]
async fn a_defect_ends_its_call_as_internal_and_the_connection_serves_on() {
    use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
    // There is no such time: whoever asks for it panics.
    static OFFSET: AtomicI64 = AtomicI64::new(0);
    let agent = TestAgent::with(&entry("/own", ""), durward::os::clock::Clock::set_by(&OFFSET));
    let mut client = agent.client().await;
    let ask = || request(JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() });
    client.fetch_jwtsvid(ask()).await.unwrap();
    OFFSET.store(i64::MAX, Relaxed);
    let jwt = client.fetch_jwtsvid(ask()).await.unwrap_err();
    let x509 = client.fetch_x509svid(request(X509svidRequest {})).await.map(drop).unwrap_err();
    OFFSET.store(0, Relaxed);
    for status in [jwt, x509] {
        assert_eq!(status.code(), tonic::Code::Internal, "{status:?}");
    }
    client.fetch_jwtsvid(ask()).await.unwrap();
    let mut internal: Vec<_> =
        counted(&agent).into_iter().filter(|(series, _)| series.ends_with("Internal")).collect();
    internal.sort();
    assert_eq!(internal, [("FetchJWTSVID Internal".to_owned(), 1), ("FetchX509SVID Internal".to_owned(), 1)]);
    assert_eq!(
        agent.running.metrics().render().matches("durward_connections_open 1").count(),
        1,
        "the same one"
    );
}

/// A stream whose client gives it a time ends then, with the code for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_ends_with_its_time() {
    let agent = TestAgent::start(&entry("/own", ""));
    let mut http2 = http2(&agent).await;
    let request = Request::post(format!("http://localhost{X509}"))
        .header("content-type", "application/grpc")
        .header("workload.spiffe.io", "true")
        .header("grpc-timeout", "500m")
        .body(())
        .unwrap();
    http2 = http2.ready().await.unwrap();
    let (answer, mut body) = http2.send_request(request, false).unwrap();
    body.send_data(Bytes::from_static(NONE), true).unwrap();
    let mut answer = answer.await.unwrap().into_body();
    let mut bytes = 0;
    while let Some(data) = answer.data().await {
        bytes += data.unwrap().len();
    }
    assert!(bytes > 0, "its first message came");
    assert_eq!(answer.trailers().await.unwrap().unwrap()["grpc-status"], "4");
    assert_eq!(counted(&agent), [("FetchX509SVID DeadlineExceeded".to_owned(), 1)]);
}

/// A token that the agent itself made for the longest audience validates; a request of the largest size is read, and one
/// of a byte more is refused with grpc-go's code.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_agent_makes_it_takes() {
    let agent = TestAgent::start(&entry("/own", ""));
    let mut client = agent.client().await;
    let own = "a".repeat(16_000);
    let ask = request(JwtsvidRequest { audience: vec![own.clone()], spiffe_id: String::new() });
    let made = client.fetch_jwtsvid(ask).await.unwrap().into_inner();
    let svid = made.svids[0].svid.clone();
    assert!(svid.len() > 16 * 1024);
    let ask = request(ValidateJwtsvidRequest { audience: own, svid: svid.clone() });
    let valid = client.validate_jwtsvid(ask).await.unwrap().into_inner();
    assert_eq!(valid.spiffe_id, "spiffe://example.org/own");

    for (more, want) in [(0, tonic::Code::InvalidArgument), (1, tonic::Code::ResourceExhausted)] {
        // A field's key and its length, twice.
        let filled = 64 * 1024 - (1 + 3) - (1 + 1 + 1) + more;
        let ask = ValidateJwtsvidRequest { audience: "a".to_owned(), svid: "x".repeat(filled) };
        assert_eq!(prost::Message::encoded_len(&ask), 64 * 1024 + more);
        let status = client.validate_jwtsvid(request(ask)).await.unwrap_err();
        assert_eq!(status.code(), want, "{more}: {status:?}");
    }
}
