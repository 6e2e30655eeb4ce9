//! From the server's name to an HTTP/2 connection: looked up, all of its addresses tried, TLS, `h2`, and its first frame.
//!
//! The next address is tried a quarter of a second after the one before, or as soon as it has failed, and the first that
//! is through is taken: a dead one costs no more than that. Each dial begins at another address, so that all servers
//! have their share. A lookup that hangs is not begun anew: whoever comes waits for the same one, and meanwhile the
//! addresses of the last one do.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{AlertDescription, ClientConfig};
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpStream, lookup_host},
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::body::Body;

use super::{
    first_frame::{FirstFrame, FirstFrameFault},
    tls::{ServerIdFault, fault_of},
};
use crate::os::sentence::said;

/// The longest that a name is looked up for.
const LONGEST_LOOKUP: Duration = Duration::from_secs(5);

/// The longest that one address may take from SYN to the server's settings.
const LONGEST_TRY: Duration = Duration::from_secs(10);

/// After which the next address is tried beside.
const STAGGER: Duration = Duration::from_millis(250);

/// How many addresses of a name are used.
const MOST_ADDRESSES: usize = 32;

/// For how long what was sent may stay unacknowledged before a connection is given up: a server's node that is gone says
/// nothing.
const UNACKNOWLEDGED: Duration = Duration::from_secs(10);

/// The largest block of headers of an answer, in bytes.
const MAX_HEADERS: u32 = 64 * 1024;

/// What a server may have sent that was not read: of one call, and of all.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Why there is no connection.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum DialError {
    /// The name has no address, or was not answered.
    #[error("{host} cannot be looked up: {}", said(cause))]
    Lookup { host: String, cause: Arc<io::Error> },
    /// The lookup hangs.
    #[error("{0} cannot be looked up: no answer from the resolver")]
    LookupLate(String),
    /// It has no addresses.
    #[error("{0} has no address")]
    NoAddress(String),
    /// TCP.
    #[error("{address}: {}", said(cause))]
    Connect { address: SocketAddr, cause: Arc<io::Error> },
    /// TLS did not come about.
    #[error("{0}: {1}")]
    Tls(SocketAddr, TlsFault),
    /// HTTP/2 did not come about.
    #[error("{0}: {1}")]
    Http2(SocketAddr, Http2Fault),
    /// No answer from this address.
    #[error("{0}: it does not answer")]
    Late(SocketAddr),
}

/// What is wrong after a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Http2Fault {
    /// What it says is not HTTP/2.
    #[error("the server does not speak HTTP/2 as a SPIRE Server does: is this port a SPIRE Server's?")]
    Foreign,
    /// It says nothing.
    #[error(
        "the server closed the connection right after the handshake, before a word of HTTP/2: is this port a SPIRE Server's?"
    )]
    Closed,
}

/// What is wrong with a handshake.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum TlsFault {
    /// It is not the server that is meant.
    #[error("this is not the trust domain's server: {0}")]
    NotTheServer(ServerIdFault),
    /// No `h2`: what tonic makes of that is "operation was canceled".
    #[error(
        "the server does not offer HTTP/2 (`h2` in ALPN): is this port a SPIRE Server's, and no proxy before it ends TLS?"
    )]
    NoHttp2,
    /// What it says is not TLS.
    #[error("the server does not speak TLS: is this port a SPIRE Server's?")]
    NotTls,
    /// No key exchange in common.
    #[error(
        "the server has no key exchange that is allowed here (require_pq_kem: TLS 1.3 with X25519MLKEM768 or secp256r1MLKEM768)"
    )]
    KeyExchange,
    /// It closed the connection.
    #[error("the server closed the connection in the handshake")]
    Closed,
    /// It refuses.
    #[error("the server refuses the handshake: {0:?}")]
    Alert(AlertDescription),
    /// The rest.
    #[error("the handshake fails: {0}")]
    Other(Arc<io::Error>),
}

impl DialError {
    /// Whether what answers is signed by an authority that is not known.
    pub(super) fn is_unknown_authority(&self) -> bool {
        matches!(self, Self::Tls(_, TlsFault::NotTheServer(ServerIdFault::UnknownAuthority)))
    }

    /// How much it tells: of several, the one from nearest to the server is shown.
    fn depth(&self) -> u8 {
        match self {
            Self::Lookup { .. } | Self::LookupLate(_) | Self::NoAddress(_) => 0,
            Self::Late(_) => 1,
            Self::Connect { .. } => 2,
            Self::Http2(..) => 3,
            Self::Tls(_, TlsFault::NotTheServer(_)) => 5,
            Self::Tls(..) => 4,
        }
    }
}

/// A server by its name.
pub(super) struct Dialer {
    host: String,
    port: u16,
    name: ServerName<'static>,
    /// Where the next dial begins.
    turn: AtomicUsize,
    lookups: Mutex<Lookups>,
}

type LookupResult = Result<Vec<SocketAddr>, DialError>;

#[derive(Default)]
struct Lookups {
    running: Option<watch::Receiver<Option<LookupResult>>>,
    last: Vec<SocketAddr>,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dialer").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

/// A connection, and where it leads.
#[derive(Clone)]
pub(super) struct Dialed {
    pub(super) sender: SendRequest<Body>,
    pub(super) address: SocketAddr,
}

impl Dialer {
    /// `host` is a name or an address, without a port.
    pub(super) fn new(host: &str, port: u16) -> Self {
        let mut first = [0; 2];
        // A fleet that starts together begins at different servers.
        let first = aws_lc_rs::rand::fill(&mut first).map(|()| first).unwrap_or_default();
        // What is no name is sent none: nothing is verified by it.
        let nameless = || ServerName::IpAddress(IpAddr::from([0, 0, 0, 0]).into());
        Self {
            host: host.to_owned(),
            port,
            name: ServerName::try_from(host.to_owned()).unwrap_or_else(|_unsaid| nameless()),
            turn: AtomicUsize::new(usize::from(u16::from_ne_bytes(first))),
            lookups: Mutex::default(),
        }
    }

    /// As people write it: `host:port`.
    pub(super) fn server(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    /// A connection to any address of the server.
    ///
    /// # Errors
    /// What the address said that came nearest to one.
    pub(super) async fn dial(&self, tls: &Arc<ClientConfig>) -> Result<Dialed, DialError> {
        let mut addresses = self.addresses().await?;
        let count = addresses.len().max(1);
        addresses.rotate_left(self.turn.fetch_add(1, Ordering::Relaxed) % count);
        addresses.truncate(MOST_ADDRESSES);
        let mut left = addresses.into_iter();
        let mut tries = JoinSet::new();
        let mut failed: Option<DialError> = None;
        loop {
            if let Some(address) = left.next() {
                let (tls, name) = (Arc::clone(tls), self.name.clone());
                tries.spawn(async move {
                    timeout(LONGEST_TRY, connect(address, tls, name))
                        .await
                        .unwrap_or(Err(DialError::Late(address)))
                });
            } else if tries.is_empty() {
                return Err(failed.unwrap_or_else(|| DialError::NoAddress(self.host.clone())));
            }
            let more = left.len() > 0;
            tokio::select! {
                Some(ended) = tries.join_next() => match ended {
                    Ok(Ok(dialed)) => return Ok(dialed),
                    Ok(Err(error)) => {
                        if failed.as_ref().is_none_or(|before| before.depth() <= error.depth()) {
                            failed = Some(error);
                        }
                    }
                    // A panic of one try is none of the others'.
                    Err(_) => {}
                },
                () = sleep(STAGGER), if more => {}
            }
        }
    }

    async fn addresses(&self) -> LookupResult {
        if let Ok(address) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, self.port)]);
        }
        let mut running = self.lookup();
        let answered = timeout(LONGEST_LOOKUP, running.wait_for(Option::is_some)).await;
        let found = match answered {
            Ok(Ok(found)) => found.clone().unwrap_or_else(|| Err(DialError::NoAddress(self.host.clone()))),
            // Its sender is gone with the task.
            Ok(Err(_)) => Err(DialError::NoAddress(self.host.clone())),
            Err(_late) => Err(DialError::LookupLate(self.host.clone())),
        };
        let mut lookups = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        match found {
            Ok(found) if !found.is_empty() => {
                lookups.last.clone_from(&found);
                Ok(found)
            }
            failed if lookups.last.is_empty() => failed,
            // A name server that is away does not part the agent from its server.
            _ => Ok(lookups.last.clone()),
        }
    }

    /// The lookup that runs, or a new one: one thread at most waits for the resolver.
    fn lookup(&self) -> watch::Receiver<Option<LookupResult>> {
        let mut lookups = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) =
            lookups.running.as_ref().filter(|it| it.borrow().is_none() && it.has_changed().is_ok())
        {
            return running.clone();
        }
        let (sender, receiver) = watch::channel(None);
        let (host, port) = (self.host.clone(), self.port);
        drop(tokio::spawn(async move {
            let found = lookup_host((host.as_str(), port)).await;
            let found = found.map(|found| found.take(MOST_ADDRESSES).collect());
            let found =
                found.map_err(|cause| DialError::Lookup { host: host.clone(), cause: Arc::new(cause) });
            sender.send_replace(Some(found));
        }));
        lookups.running = Some(receiver.clone());
        receiver
    }
}

async fn connect(
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<Dialed, DialError> {
    let refused = |cause| DialError::Connect { address, cause: Arc::new(cause) };
    let stream = TcpStream::connect(address).await.map_err(refused)?;
    stream.set_nodelay(true).map_err(refused)?;
    let milliseconds = u32::try_from(UNACKNOWLEDGED.as_millis()).unwrap_or(u32::MAX);
    setsockopt(&stream, sockopt::TcpUserTimeout, &milliseconds).map_err(|errno| refused(errno.into()))?;
    setsockopt(&stream, sockopt::KeepAlive, &true).map_err(|errno| refused(errno.into()))?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &5).map_err(|errno| refused(errno.into()))?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &2).map_err(|errno| refused(errno.into()))?;

    let post_quantum_alone = tls.crypto_provider().kx_groups.len() == 2;
    let stream = TlsConnector::from(tls)
        .connect(name, stream)
        .await
        .map_err(|cause| DialError::Tls(address, fault(cause, post_quantum_alone)))?;
    if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
        return Err(DialError::Tls(address, TlsFault::NoHttp2));
    }
    let sender = speak(stream).await.map_err(|found| match found {
        FirstFrameFault::Foreign => DialError::Http2(address, Http2Fault::Foreign),
        // With TLS 1.3 a server refuses what it is shown after the handshake.
        FirstFrameFault::Ended(cause) => match fault(cause, post_quantum_alone) {
            TlsFault::Closed => DialError::Http2(address, Http2Fault::Closed),
            fault => DialError::Tls(address, fault),
        },
    })?;
    Ok(Dialed { sender, address })
}

/// Ends when the server has begun to speak HTTP/2 too.
async fn speak(stream: TlsStream<TcpStream>) -> Result<SendRequest<Body>, FirstFrameFault> {
    let closed = || FirstFrameFault::Ended(io::ErrorKind::UnexpectedEof.into());
    let (stream, first) = FirstFrame::of(stream);
    let (sender, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(MAX_HEADERS)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_unsaid| closed())?;
    // Ends with the last sender, or with the connection.
    drop(tokio::spawn(connection));
    first.await.unwrap_or_else(|_gone| Err(closed()))?;
    Ok(sender)
}

fn fault(cause: io::Error, post_quantum_alone: bool) -> TlsFault {
    let inner = cause.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if let Some(fault) = inner.and_then(fault_of) {
        return TlsFault::NotTheServer(fault.clone());
    }
    match inner {
        Some(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)) => TlsFault::NoHttp2,
        Some(rustls::Error::AlertReceived(
            AlertDescription::HandshakeFailure
            | AlertDescription::ProtocolVersion
            | AlertDescription::InsufficientSecurity,
        )) if post_quantum_alone => TlsFault::KeyExchange,
        Some(rustls::Error::PeerIncompatible(_)) if post_quantum_alone => TlsFault::KeyExchange,
        Some(rustls::Error::AlertReceived(alert)) => TlsFault::Alert(*alert),
        Some(rustls::Error::InvalidMessage(_)) => TlsFault::NotTls,
        None if matches!(
            cause.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        ) =>
        {
            TlsFault::Closed
        }
        _ => TlsFault::Other(Arc::new(cause)),
    }
}
