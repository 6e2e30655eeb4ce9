//! Two sources of the spiffe crate's that speak mTLS with each other twice a second, and a watch, until they are told to end
//! (SIGTERM).
//!
//! `cargo run --example rust_quarter SOCKET AWAY`
//!
//! Nothing that comes may have expired when it comes, no handshake may fail, and an SVID may only be out of date while there is a
//! file AWAY.

#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::exit,
    reason = "a client of the agent, not the agent"
)]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use spiffe::{X509Source, X509Svid};
use spiffe_rustls::{authorizer, mtls_client, mtls_server};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls::pki_types::ServerName};

/// How long a handshake may take.
const WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Seen {
    updates: AtomicU64,
    expired: AtomicU64,
}

fn ends(svid: &X509Svid) -> SystemTime {
    let (_, leaf) = x509_parser::parse_x509_certificate(svid.leaf().as_bytes()).expect("a certificate");
    let seconds = u64::try_from(leaf.validity().not_after.timestamp()).expect("after 1970");
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
    format!("{}", since.as_secs())
}

async fn source(socket: &str) -> X509Source {
    X509Source::builder().endpoint(format!("unix:{socket}")).build().await.unwrap_or_else(|error| {
        println!("FAILED: {error}");
        std::process::exit(1);
    })
}

/// Looks at each update of the source.
async fn watch(source: X509Source, seen: Arc<Seen>) {
    let mut updated = source.updated();
    while updated.changed().await.is_ok() {
        seen.updates.fetch_add(1, Relaxed);
        if let Some(svid) = source.try_svid().filter(|svid| ends(svid) <= SystemTime::now()) {
            seen.expired.fetch_add(1, Relaxed);
            println!("{}: came when it had expired: {}", now(), svid.spiffe_id());
        }
    }
}

fn is_fresh(source: &X509Source) -> bool {
    // A handshake takes a moment.
    source.svid().is_ok_and(|svid| SystemTime::now() + Duration::from_secs(2) < ends(&svid))
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor) {
    while let Ok((stream, _)) = listener.accept().await {
        let acceptor = acceptor.clone();
        drop(tokio::spawn(async move {
            // The client sees what goes wrong.
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            if stream.write_all(b"x").await.is_ok() {
                drop(stream.shutdown().await);
            }
        }));
    }
}

async fn handshake(port: u16, connector: &TlsConnector) -> std::io::Result<()> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    let mut stream = connector.connect(name, stream).await?;
    // The server has verified the client when it answers.
    stream.read_exact(&mut [0]).await.map(drop)
}

#[tokio::main]
async fn main() {
    let mut words = std::env::args().skip(1);
    let (socket, away) = (words.next().expect("SOCKET"), words.next().expect("AWAY"));
    let mut told = signal(SignalKind::terminate()).expect("a signal");
    let (server, client) = (source(&socket).await, source(&socket).await);
    let seen = Arc::<Seen>::default();
    drop(tokio::spawn(watch(source(&socket).await, Arc::clone(&seen))));
    let acceptor = mtls_server(server.clone()).authorize(authorizer::any()).build().expect("a configuration");
    let connector =
        mtls_client(client.clone()).authorize(authorizer::any()).build().expect("a configuration");
    let connector = TlsConnector::from(Arc::new(connector));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("its address").port();
    drop(tokio::spawn(serve(listener, TlsAcceptor::from(Arc::new(acceptor)))));
    println!("up");
    let (mut handshakes, mut failed, mut stale, mut stale_with_server) = (0_u64, 0_u64, 0_u64, 0_u64);
    loop {
        if is_fresh(&server) && is_fresh(&client) {
            handshakes += 1;
            let went = timeout(WITHIN, handshake(port, &connector)).await;
            if let Err(error) = went.unwrap_or_else(|late| Err(late.into())) {
                failed += 1;
                println!("{}: handshake: {error}", now());
            }
        } else {
            stale += 1;
            if !Path::new(&away).exists() {
                stale_with_server += 1;
                println!("{}: out of date", now());
            }
        }
        tokio::select! {
            () = sleep(Duration::from_millis(500)) => {}
            _ = told.recv() => break,
        }
    }
    let (updates, expired) = (seen.updates.load(Relaxed), seen.expired.load(Relaxed));
    println!(
        "spiffe (Rust): {updates} updates, {expired} expired, {handshakes} handshakes, {failed} failed, \
         {stale} times out of date, {stale_with_server} of them with a server"
    );
    if expired + failed + stale_with_server > 0 || handshakes < 100 || updates < 10 {
        std::process::exit(1);
    }
}
