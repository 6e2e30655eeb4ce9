//! Two processes with our SVIDs speak mTLS, through a library that nobody here wrote, while the CA behind them is
//! replaced. Libraries look at the system's clock, so this is the one test that lets time pass: the CA lives a minute.
//!
//! While the library turns an update into keys (microseconds; milliseconds on a busy machine) it refuses handshakes by
//! itself, and says so (`spiffe_rustls::Error::PendingRevision`). Such a handshake is tried again.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use spiffe::X509Source;
use spiffe_rustls::{authorizer, mtls_client, mtls_server};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls};

use crate::support::{Process, entry, write_config};

/// Set for the process that serves: the socket of its agent.
const SERVER: &str = "DURWARD_TEST_MTLS_SERVER";
const ID: &str = "spiffe://example.org/web";
/// What the process that serves adds where it has none.
const NO_SVID: &str = ", without an SVID";

/// Not a test when it is run as one of many: the body of the serving process.
#[tokio::test(flavor = "multi_thread")]
async fn server_process() {
    #[expect(clippy::disallowed_methods, reason = "how the parent process tells it what to do")]
    let Ok(endpoint) = std::env::var(SERVER) else { return };
    let source = X509Source::builder().endpoint(endpoint).build().await.unwrap();
    let config = mtls_server(source.clone()).authorize(authorizer::exact([ID]).unwrap()).build().unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("port {}", listener.local_addr().unwrap().port());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (acceptor, source) = (acceptor.clone(), source.clone());
        tokio::spawn(async move {
            let echo = async {
                let mut stream = acceptor.accept(stream).await?;
                let mut byte = [0];
                stream.read_exact(&mut byte).await?;
                stream.write_all(&byte).await?;
                stream.shutdown().await
            };
            let done = echo.await;
            println!("{done:?}{}", if source.svid().is_ok() { "" } else { NO_SVID });
        });
    }
}

/// Whether a side refused since the library was replacing its keys: its verifier says so, or offers no scheme of signatures, and it
/// presents no certificate. Not for want of an SVID, of which each side that fails says whether it has one.
fn keys_are_replaced(error: &str) -> bool {
    [
        "PendingRevision",
        "no server certificate chain resolved",
        "NoCertificatesPresented",
        "NoSignatureSchemes",
    ]
    .iter()
    .any(|sign| error.contains(sign))
}

#[tokio::test(flavor = "multi_thread")]
async fn no_handshake_fails_while_the_ca_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/web", "x509_svid_ttl = \"20s\""));
    let path = dir.path().join("agent.conf");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("issuer \"embedded\" { }", "issuer \"embedded\" {\n  ca_ttl = \"60s\"\n}"),
    )
    .unwrap();
    let mut agent = Process::spawn(dir.path());
    agent.serving(dir.path()).await;
    let endpoint = format!("unix:{}", dir.path().join("api.sock").display());

    let mut server = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mtls::server_process", "--nocapture"])
        .env(SERVER, &endpoint)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // What the test harness says of its own begins with "test", and the first line with it.
    let mut said = BufReader::new(server.stdout.take().unwrap()).lines();
    let port: u16 =
        said.find_map(|line| line.unwrap().rsplit_once("port ").map(|(_, n)| n.parse().unwrap())).unwrap();

    let source = X509Source::builder().endpoint(&endpoint).build().await.unwrap();
    let config = mtls_client(source.clone()).authorize(authorizer::exact([ID]).unwrap()).build().unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();

    // Until both sides have used SVIDs of a second CA, and its predecessor has expired: 70 seconds at most.
    let (mut theirs, mut ours, mut handshakes, mut again) = (BTreeSet::new(), BTreeSet::new(), 0, 0);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(70) {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let attempt = async {
            let mut stream = connector.connect(name.clone(), stream).await?;
            stream.write_all(b"x").await?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await?;
            Ok::<_, std::io::Error>((answer, authority(&stream.get_ref().1.peer_certificates().unwrap()[0])))
        };
        let (here, there) = (
            attempt.await,
            said.by_ref().map(Result::unwrap).find(|line| !line.starts_with("test ")).unwrap(),
        );
        match here {
            Ok((answer, authority)) => {
                assert_eq!((answer.as_slice(), there.as_str()), (b"x".as_slice(), "Ok(())"));
                theirs.insert(authority);
                ours.insert(self::authority(source.svid().unwrap().leaf().as_bytes()));
                handshakes += 1;
            }
            Err(error) => {
                let here = format!("{error:?}");
                assert!(source.svid().is_ok() && !there.contains(NO_SVID), "here {here}, there {there}");
                assert!(keys_are_replaced(&here) || keys_are_replaced(&there), "here {here}, there {there}");
                again += 1;
            }
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    server.kill().unwrap();
    server.wait().unwrap();
    println!(
        "{handshakes} handshakes, {again} tried again, server SVIDs of {} CAs, client SVIDs of {}",
        theirs.len(),
        ours.len()
    );
    assert!(again * 10 < handshakes, "{again} of {handshakes} handshakes were tried again");
    assert!(theirs.len() >= 2 && ours.len() >= 2, "the CA was replaced: {theirs:?} {ours:?}");
}

/// The key identifier of the CA that signed `der`.
fn authority(der: &[u8]) -> Vec<u8> {
    use x509_parser::prelude::*;
    let (_, certificate) = X509Certificate::from_der(der).unwrap();
    certificate
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(id) => id.key_identifier.as_ref().map(|id| id.0.to_vec()),
            _ => None,
        })
        .unwrap()
}
