//! A whole agent whose clock is set while it runs: forward and back, by an hour and by a day. What was spent stays spent, windows
//! follow the clock, nothing is served beyond its end, and whoever behaves is served.
//!
//! Only the wall clock is set. What the agent reckons in time that has passed (buckets, timeouts) goes by another one.

use std::{
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicI64, Ordering::Relaxed},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use durward::{api::proto::workload as pb, os::clock::Clock};
use nix::unistd::geteuid;
use prost_types::value::Kind;
use serde_json::Value;
use tonic::{Code, Status, Streaming, transport::Channel};

use crate::{
    frames::{Called, FETCH_JWT, call, jwt_request},
    hostile::{NEIGHBOUR, wait_of},
    support::{TRUST_DOMAIN, TestAgent, request},
};

type Client = pb::spiffe_workload_api_client::SpiffeWorkloadApiClient<Channel>;

const HOUR: u64 = 3600;
/// Eight o'clock in the morning, UTC.
const MORNING: u64 = 1_800_000_000;
/// How long it may take until the issuer sees that its keys are not valid at the new time, and has others: it looks every ten
/// seconds.
const REPAIR: Duration = Duration::from_secs(15);

static OFFSET: AtomicI64 = AtomicI64::new(0);

fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// What the agent's clock says.
fn now() -> u64 {
    unix(Clock::set_by(&OFFSET).now())
}

/// Sets the agent's clock.
fn set(seconds: u64) {
    let [to, from] = [seconds, unix(Clock::SYSTEM.now())].map(u64::cast_signed);
    OFFSET.store(to - from, Relaxed);
}

/// When an X.509-SVID ends.
fn end_of(response: &pb::X509svidResponse) -> u64 {
    use x509_parser::prelude::*;
    let [svid] = &response.svids[..] else { panic!("{} SVIDs", response.svids.len()) };
    let (_, leaf) = X509Certificate::from_der(&svid.x509_svid).unwrap();
    leaf.validity().not_after.timestamp().try_into().unwrap()
}

/// An X.509-SVID, now. `Err` where the agent cannot sign.
async fn x509(client: &mut Client) -> Result<(), Status> {
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await?.into_inner();
    let end = end_of(&stream.message().await?.unwrap());
    assert!(end > now(), "served {} s after its end", now() - end);
    Ok(())
}

/// Reads what a stream sends until that is valid, as the workload behind it would.
async fn follow(case: &str, stream: &mut Streaming<pb::X509svidResponse>, holds: &mut u64) {
    while *holds <= now() {
        let next = tokio::time::timeout(REPAIR, stream.message()).await;
        let next = next.unwrap_or_else(|_| panic!("{case}: what the stream holds has ended"));
        *holds = end_of(&next.unwrap().unwrap());
    }
}

fn jwt() -> tonic::Request<pb::JwtsvidRequest> {
    request(pb::JwtsvidRequest { audience: vec!["own".to_owned()], spiffe_id: String::new() })
}

/// What one more call is answered, of those that are charged to a bucket of the caller, of its identity, and of the node.
async fn asked(client: &mut Client) -> [Result<(), Status>; 3] {
    [
        client.fetch_jwtsvid(jwt()).await.map(drop),
        client.fetch_jwt_bundles(request(pb::JwtBundlesRequest {})).await.map(drop),
        client.fetch_x509_bundles(request(pb::X509BundlesRequest {})).await.map(drop),
    ]
}

/// One more connection.
async fn connected(socket: &Path) -> Called {
    let socket = socket.to_owned();
    let call = move || call(&socket, FETCH_JWT, &jwt_request("own"), REPAIR);
    tokio::task::spawn_blocking(call).await.unwrap()
}

/// Holds that the buckets are empty, the gate's too. Returns how long the refused are told to wait.
async fn spent(case: &str, client: &mut Client, socket: &Path) -> [Duration; 3] {
    // The first few are told, as a call is that a bucket of its own refuses.
    let connections = [connected(socket).await, connected(socket).await, connected(socket).await];
    let is_refused = |called: &Called| matches!(called, Called::Refused | Called::Closed);
    assert!(connections.iter().all(is_refused), "{case}: the gate: {connections:?}");
    let expected = [Code::ResourceExhausted, Code::ResourceExhausted, Code::Unavailable];
    let mut expected = expected.into_iter();
    asked(client).await.map(|answer| {
        let status = answer.unwrap_err();
        assert_eq!(Some(status.code()), expected.next(), "{case}: {status:?}");
        assert!(status.message().starts_with("rate limit exceeded"), "{case}: {status:?}");
        wait_of(&status)
    })
}

/// A token for the neighbour, where there may be one: it is valid by the agent's clock, and signed with a key of the bundle.
/// `Err` where the agent cannot sign.
async fn neighbour(case: &str, client: &mut Client, socket: &Path) -> Result<(), String> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
    command
        .args([
            "api",
            "fetch",
            "jwt",
            "-audience",
            "them",
            "-output",
            "json",
            "-timeout",
            "20s",
            "-socketPath",
        ])
        .arg(socket)
        .current_dir("/")
        .stdin(Stdio::null())
        .uid(NEIGHBOUR)
        .gid(NEIGHBOUR);
    let out = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    if !out.status.success() {
        return Err(String::from_utf8(out.stderr).unwrap());
    }
    let said: Value = serde_json::from_slice(&out.stdout).unwrap();
    let svid = said[0]["svids"][0]["svid"].as_str().unwrap().to_owned();
    let message = pb::ValidateJwtsvidRequest { audience: "them".to_owned(), svid };
    let valid = client.validate_jwtsvid(request(message)).await.unwrap().into_inner();
    assert_eq!(valid.spiffe_id, format!("spiffe://{TRUST_DOMAIN}/u{NEIGHBOUR}"), "{case}");
    let Some(Kind::NumberValue(end)) = valid.claims.unwrap().fields["exp"].kind else { panic!("{case}") };
    assert!(end > f64::from(u32::try_from(now()).unwrap()), "{case}: served after its end");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_set_gives_no_tokens_and_refuses_nobody() {
    set(MORNING + 600);
    let mut blocks = String::from(
        "ratelimit {\n  gate {\n    caller { rate = 1 per = \"day\" burst = 60 }\n  }\n\
         caller {\n    method \"FetchJWTSVID\" { rate = 1 per = \"day\" burst = 90 }\n\
         method \"FetchWITSVID\" {\n      rate = 1000 burst = 1000\n\
         schedule \"noon\" { start { hour = 12 } stop { hour = 13 } block = true }\n    }\n  }\n\
         identity {\n    method \"FetchJWTBundles\" { rate = 1 per = \"day\" burst = 90 }\n  }\n\
         node {\n    method \"FetchX509Bundles\" { rate = 1 per = \"day\" burst = 90 }\n  }\n}\n",
    );
    for uid in [geteuid().as_raw(), NEIGHBOUR] {
        blocks.push_str(&format!(
            "entry \"spiffe://{TRUST_DOMAIN}/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n  x509_svid_ttl = \"30m\"\n}}\n"
        ));
    }
    let agent = TestAgent::with(&blocks, Clock::set_by(&OFFSET));
    std::fs::set_permissions(agent.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let socket = agent.socket();
    let mut client = agent.client().await;
    let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let (mut stream, mut holds) = (stream.into_inner(), 0);
    follow("at the start", &mut stream, &mut holds).await;
    neighbour("at the start", &mut client, &socket).await.unwrap();

    // All that is there is spent.
    while asked(&mut client).await.iter().any(Result::is_ok) {}
    while connected(&socket).await != Called::Closed {}
    let (waits, since) = (spent("at the start", &mut client, &socket).await, Instant::now());

    // The clock is set to a time at which the window is open or not. The issuer's keys are valid but for the last two.
    let noon = MORNING + 4 * HOUR + 600;
    for (case, at, window) in [
        ("four hours on", noon, true),
        ("an hour on", noon + HOUR, false),
        ("an hour back", noon, true),
        ("another", noon - HOUR, false),
        ("a day on", noon + 23 * HOUR, false),
        ("a day back", noon - HOUR, false),
    ] {
        set(at);
        let told = spent(case, &mut client, &socket).await;
        for (then, now) in waits.iter().zip(told) {
            let passed = since.elapsed();
            assert!(
                now <= *then && now + passed + Duration::from_secs(1) >= *then,
                "{case}: {then:?} {now:?}"
            );
        }
        let wit = client.fetch_witsvid(request(pb::WitsvidRequest::default())).await.unwrap_err().code();
        assert_eq!(wit, if window { Code::ResourceExhausted } else { Code::Unimplemented }, "{case}");

        // Refused is nobody, and where the issuer has to make new keys first the first call waits for them.
        let began = Instant::now();
        x509(&mut client).await.unwrap_or_else(|status| panic!("{case}: {status:?}"));
        neighbour(case, &mut client, &socket).await.unwrap_or_else(|said| panic!("{case}: {said}"));
        follow(case, &mut stream, &mut holds).await;
        println!("{case}: after {:?}", began.elapsed());
    }

    // And once more on, with nobody who asks: what a stream holds has ended, and it is sent another.
    set(noon + 48 * HOUR);
    assert!(holds <= now());
    follow("a stream alone", &mut stream, &mut holds).await;
    agent.running.shutdown().await;
    // There is one clock that can be set, so one comes after the other.
    after_the_clock_was_set_back_what_is_served_has_begun().await;
}

/// What was made before the clock was set back begins in the future: neither is its answer, encoded before, found again, nor does
/// an open stream keep it.
async fn after_the_clock_was_set_back_what_is_served_has_begun() {
    fn begin_of(response: &pb::X509svidResponse) -> u64 {
        use x509_parser::prelude::*;
        let (_, leaf) = X509Certificate::from_der(&response.svids[0].x509_svid).unwrap();
        leaf.validity().not_before.timestamp().try_into().unwrap()
    }
    set(MORNING);
    let uid = geteuid();
    let agent = TestAgent::with(
        &format!(
            "entry \"spiffe://{TRUST_DOMAIN}/u\" {{\n  selectors = [\"unix:uid:{uid}\"]\n  x509_svid_ttl = \"30m\"\n}}\n"
        ),
        Clock::set_by(&OFFSET),
    );
    let mut client = agent.client().await;
    x509(&mut client).await.unwrap();
    // The CA was made four hours ago and stays valid; the SVID is new.
    set(MORNING + 4 * HOUR);
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    while let Ok(message) = tokio::time::timeout(Duration::from_secs(12), stream.message()).await {
        assert!(begin_of(&message.unwrap().unwrap()) <= now());
    }
    set(MORNING + 3 * HOUR);
    let update = tokio::time::timeout(Duration::from_secs(30), stream.message()).await;
    let update = update.expect("an update of the open stream").unwrap().unwrap();
    assert!(begin_of(&update) <= now(), "the stream has what has begun");
    let mut other = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    let served = other.message().await.unwrap().unwrap();
    assert!(begin_of(&served) <= now(), "served {} s before its beginning", begin_of(&served) - now());
}
