//! A client that nobody here wrote, and that is refused: the sources of the `spiffe` crate keep what they have, go on asking, and
//! have what is new once they are let in again, with no help from the workload. What py-spiffe does is in `tests/interop`.

use std::{
    future::Future,
    os::unix::fs::symlink,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use durward::api::proto::workload as pb;
use nix::sys::signal::Signal;
use spiffe::{
    JwtSource, JwtSourceError, TrustDomain, WorkloadApiError, X509Source, jwt_source,
    transport::{GrpcStatusCode, TransportError},
    x509_source,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
};
use tonic::transport::Channel;

use crate::{
    frames::{PREFACE, SETTINGS, frame},
    support::{Process, TRUST_DOMAIN, entry, request, write_config},
};

type Client = pb::spiffe_workload_api_client::SpiffeWorkloadApiClient<Channel>;

const PATIENCE: Duration = Duration::from_secs(60);
/// A caller's connections at once.
const PLACES: usize = 8;

/// Limits of which everybody has a little; calls of streams come back once in that time, and tokens once a second.
fn tight(per: &str) -> String {
    format!(
        "ratelimit {{\n  gate {{\n    connection {{ handshake_timeout = \"2m\" }}\n    caller {{ connections = {PLACES} rate = 2 burst = 20 }}\n  }}\n\
         caller {{\n    rate = 1 per = \"{per}\" burst = 5\n\
         method \"FetchJWTSVID\" {{ rate = 1 per = \"second\" burst = 5 }}\n  }}\n}}\n"
    )
}

/// What a source says went wrong.
#[derive(Clone, Default)]
struct Errors(Arc<Mutex<Vec<&'static str>>>);

impl Errors {
    fn count(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn forget(&self) {
        self.0.lock().unwrap().clear();
    }
}

impl x509_source::MetricsRecorder for Errors {
    fn record_update(&self) {}

    fn record_reconnect(&self) {}

    fn record_error(&self, kind: x509_source::MetricsErrorKind) {
        self.0.lock().unwrap().push(kind.as_str());
    }
}

impl jwt_source::MetricsRecorder for Errors {
    fn record_update(&self) {}

    fn record_reconnect(&self) {}

    fn record_error(&self, kind: jwt_source::MetricsErrorKind) {
        self.0.lock().unwrap().push(kind.as_str());
    }
}

/// Both sources of a workload.
struct Sources {
    x509: X509Source,
    jwt: JwtSource,
    /// Of each.
    errors: [Errors; 2],
}

impl Sources {
    /// Builds them, while nobody is let in until both have been refused.
    async fn build(endpoint: &str, taken: Vec<UnixStream>) -> Self {
        let errors = [Errors::default(), Errors::default()];
        let (least, most) = (Duration::from_millis(200), Duration::from_secs(1));
        let x509 = X509Source::builder()
            .endpoint(endpoint)
            .reconnect_backoff(least, most)
            .metrics(Arc::new(errors[0].clone()));
        let jwt = JwtSource::builder()
            .endpoint(endpoint)
            .reconnect_backoff(least, most)
            .metrics(Arc::new(errors[1].clone()));
        let both = tokio::time::timeout(PATIENCE, async { tokio::join!(x509.build(), jwt.build()) });
        let refused = async {
            until("both are refused", async || errors.iter().all(|errors| errors.count() > 0)).await;
            drop(taken);
        };
        let (both, ()) = tokio::join!(both, refused);
        let (x509, jwt) = both.unwrap();
        let (x509, jwt) = (x509.unwrap(), jwt.unwrap());
        // Said to be healthy once their tasks run.
        until("they are healthy", async || x509.is_healthy() && jwt.is_healthy()).await;
        Self { x509, jwt, errors }
    }

    /// The authority of X.509-SVIDs and the key of tokens that they trust. Both are there at any time.
    fn trust(&self) -> (Vec<u8>, String) {
        let domain = TrustDomain::new(TRUST_DOMAIN).unwrap();
        assert!(self.x509.is_healthy() && self.jwt.is_healthy());
        let svid = self.x509.svid().unwrap();
        assert_eq!(svid.spiffe_id().to_string(), format!("spiffe://{TRUST_DOMAIN}/web"));
        let x509 = self.x509.bundle_set().unwrap().get(&domain).unwrap();
        let jwt = self.jwt.bundle_set().unwrap().get(&domain).unwrap();
        let ([authority], Some(key)) = (x509.authorities(), jwt.jwt_authorities().next()) else {
            panic!("one authority and one key")
        };
        (authority.as_bytes().to_vec(), key.key_id().to_owned())
    }

    /// A token. `Err` with the code of the refusal.
    async fn token(&self) -> Result<(), GrpcStatusCode> {
        match self.jwt.fetch_jwt_svid(["them"]).await {
            Ok(svid) => {
                assert_eq!(svid.spiffe_id().to_string(), format!("spiffe://{TRUST_DOMAIN}/web"));
                Ok(())
            }
            Err(JwtSourceError::FetchJwtSvid(WorkloadApiError::Transport(TransportError::Status(
                status,
            )))) => Err(status.code()),
            // The connection was closed before there was a call.
            Err(JwtSourceError::Source(WorkloadApiError::Transport(TransportError::Connect(_)))) => {
                Err(GrpcStatusCode::Unavailable)
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

/// Looks again until it is so.
async fn until<F: Future<Output = bool>>(what: &str, mut so: impl FnMut() -> F) {
    let began = Instant::now();
    while !so().await {
        assert!(began.elapsed() < PATIENCE, "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Takes all calls that there are, of those that the sources make.
async fn take_calls(client: &mut Client) {
    while client.fetch_x509svid(request(pb::X509svidRequest {})).await.is_ok() {}
    while client.fetch_jwt_bundles(request(pb::JwtBundlesRequest {})).await.is_ok() {}
}

/// Takes all places for connections that there are, until what is returned is dropped.
async fn take_places(socket: &Path) -> Vec<UnixStream> {
    let hello = [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
    let mut taken = Vec::new();
    let began = Instant::now();
    while taken.len() < PLACES {
        assert!(began.elapsed() < PATIENCE, "{} places", taken.len());
        let mut stream = UnixStream::connect(socket).await.unwrap();
        // An agent that lets it in says what holds from now on; one that does not closes it, or has nothing to say in its
        // SETTINGS.
        let said = async {
            let mut head = [0; 9];
            let heard = stream.write_all(&hello).await.is_ok() && stream.read_exact(&mut head).await.is_ok();
            heard && head[..3] != [0; 3]
        };
        if said.await {
            taken.push(stream);
        }
    }
    taken
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_that_are_refused_recover_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let configure = |per| write_config(dir.path(), &[&entry("/web", ""), &*tight(per)].concat());
    // The sources come by another name, which is there when the test wants them to come.
    let (socket, door) = (dir.path().join("api.sock"), dir.path().join("door"));
    symlink(&socket, &door).unwrap();
    configure("day");
    let mut agent = Process::spawn(dir.path());
    drop(agent.serving(dir.path()).await);
    let sources = Sources::build(&format!("unix:{}", door.display()), take_places(&socket).await).await;
    sources.trust();

    // A call says that it is refused, and a later one passes.
    until("a token", async || sources.token().await.is_ok()).await;
    let refused = async || sources.token().await == Err(GrpcStatusCode::ResourceExhausted);
    let began = Instant::now();
    while !refused().await {
        assert!(began.elapsed() < PATIENCE, "tokens are limited");
    }
    until("a token again", async || sources.token().await.is_ok()).await;

    // Another agent comes, with other keys; somebody takes all that there is, before the sources find the way to it.
    for case in ["calls", "places"] {
        let before = sources.trust();
        std::fs::remove_file(&door).unwrap();
        agent.signal(Signal::SIGTERM);
        agent.wait();
        std::fs::remove_dir_all(dir.path().join("data")).unwrap();
        configure("day");
        agent = Process::spawn(dir.path());
        let mut client = agent.serving(dir.path()).await;
        let taken = match case {
            "calls" => {
                take_calls(&mut client).await;
                vec![]
            }
            _ => {
                drop(client);
                take_places(&socket).await
            }
        };
        sources.errors.iter().for_each(Errors::forget);
        symlink(&socket, &door).unwrap();
        until(case, async || {
            assert_eq!(sources.trust(), before, "{case}: they keep what they have");
            sources.errors.iter().all(|errors| errors.count() > 1)
        })
        .await;
        println!("{case}: {:?}", sources.errors.each_ref().map(|errors| errors.0.lock().unwrap().clone()));

        // What was spent stays so, but it comes back sooner.
        configure("second");
        agent.signal(Signal::SIGHUP);
        drop(taken);
        until(case, async || {
            let now = sources.trust();
            now.0 != before.0 && now.1 != before.1
        })
        .await;
        until(case, async || sources.token().await.is_ok()).await;
    }
}
