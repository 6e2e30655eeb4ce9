//! The one map of errors to gRPC codes.
//!
//! The texts are spire-agent's where it has one for the same mistake (`pkg/agent/endpoints/workload/handler.go`):
//! people grep for them. A caller learns what happened to its request, not what the agent knows: causes on our side
//! go to the log.

use std::time::Duration;

use http::HeaderMap;
use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    attest::AttestError,
    identity::{audience::AudienceError, jwt::JwtError, spiffe_id::SpiffeIdError},
    issuer::MintError,
    limits::{ConnectionRefusal, Refusal, RejectionStatus, budget::UPLOADS},
    peer::{BodyError, PUSHBACK, Unheard},
    store::{NoIdentity, NotEntitled},
    telemetry::registry::Label as _,
};

/// Why a Workload API call got no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The metadata `workload.spiffe.io: true` is not there exactly once (SPIFFE Workload Endpoint, section 6).
    #[error("security header missing from request")]
    NoSecurityHeader,
    /// No audience was given, or one that no token can have.
    #[error(transparent)]
    BadAudience(#[from] AudienceError),
    /// No token was given to validate.
    #[error("svid must be specified")]
    NoSvid,
    /// The SPIFFE ID asked for is none.
    #[error("invalid requested SPIFFE ID: {0}")]
    BadSpiffeId(SpiffeIdError),
    /// The token does not validate.
    #[error(transparent)]
    BadToken(#[from] JwtError),
    /// The caller has no identity, or not the one it asked for.
    #[error(transparent)]
    NoIdentity(#[from] NoIdentity),
    /// It is not known whether the caller has one: the issuer could not be asked.
    #[error("the server has not yet said whether the caller has an identity")]
    NotKnown,
    /// The limits refused the call.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The caller runs where the agent cannot see it.
    #[error(
        "the agent cannot see the calling process: it is in another PID namespace; run the agent in the host's PID namespace (hostPID: true in its pod, --pid=host in its container)"
    )]
    OtherPidNamespace,
    /// The caller is nobody that the agent can name.
    #[error(
        "workload attestation failed: the agent runs in a user namespace that has no number for the caller's user or group; run the agent outside of it, or map them"
    )]
    Unmapped,
    /// The agent cannot look at the caller.
    #[error(
        "workload attestation failed: the agent's /proc is not that of its own PID namespace; its log says what to do"
    )]
    ProcOfOthers,
    /// The caller could not be attested.
    #[error("workload attestation failed{}", reconnect(.0))]
    Attestation(#[source] AttestError),
    /// No JWT-SVID could be made.
    #[error("could not fetch JWT-SVID{}", refused_for(.0))]
    JwtSvid(MintError),
    /// No X.509-SVID could be made.
    #[error("could not fetch X.509-SVID{}", refused_for(.0))]
    X509Svid(MintError),
    /// The agent stops.
    #[error("the agent is shutting down; connect again")]
    Draining,
    /// The connection was told to end: the node is short of something, and its caller holds more than its share.
    #[error("the agent is short of room, and the caller holds more than its share of it; connect again")]
    SentAway,
    /// The node is short of memory, and the call would have to wait in it behind others of its connection.
    #[error("the agent is short of memory, and other calls of this connection have not ended")]
    Crowded,
    /// Memory is about to run out, and there is none to make the answer in.
    #[error("the agent is short of memory, and has none for an answer as large as this one; try again")]
    NoMemory,
    /// Memory is out, and there is none for a request that is not complete.
    #[error("the agent is short of memory, and has none for the rest of this request; try again")]
    NoMemoryToRead,
    /// Memory is short, its caller holds more than its share, and so many bytes of requests on its connection are not complete.
    #[error(
        "the agent is short of memory, and the caller holds its share of it: {bytes} bytes of requests on this connection are not \
         complete, and {UPLOADS} may be; try again"
    )]
    Unfinished { bytes: u64 },
    /// The WIT-SVID profile is not there yet.
    #[error("fetching WIT-SVIDs is not implemented")]
    NoWitSvids,
    /// As [`RequestError::NoWitSvids`].
    #[error("fetching WIT bundles is not implemented")]
    NoWitBundles,
    /// The connection carries no peer: a mistake of ours.
    #[error("the connection has no peer")]
    NoPeer,
}

/// The reason, where the request is at fault. What the issuer has to say of itself is for the log.
fn refused_for(error: &MintError) -> String {
    match error {
        MintError::Request { reason, .. } => format!(": {reason}"),
        MintError::Issuer { .. } | MintError::Entry { .. } | MintError::Late => String::new(),
    }
}

/// What the caller can do about it, where it can.
fn reconnect(error: &AttestError) -> &'static str {
    match error {
        AttestError::IdentityChanged { .. } => {
            ": the process changed its user or group after it connected: it must connect again"
        }
        AttestError::Gone
        | AttestError::Unknown { .. }
        | AttestError::OtherPidNamespace
        | AttestError::Unmapped
        | AttestError::ProcOfOthers
        | AttestError::Crowded
        | AttestError::ManyGroups
        | AttestError::Status(_)
        | AttestError::Attestor(_) => "",
    }
}

impl From<NotEntitled> for RequestError {
    fn from(error: NotEntitled) -> Self {
        match error {
            NotEntitled::NotAttested(error) => error.into(),
            NotEntitled::NoIdentity(error) => error.into(),
            NotEntitled::NotKnown => Self::NotKnown,
        }
    }
}

impl From<AttestError> for RequestError {
    fn from(error: AttestError) -> Self {
        match error {
            AttestError::OtherPidNamespace => Self::OtherPidNamespace,
            AttestError::Unmapped => Self::Unmapped,
            AttestError::ProcOfOthers => Self::ProcOfOthers,
            error => Self::Attestation(error),
        }
    }
}

impl RequestError {
    /// Why, in a word of a closed set: for the audit.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoSecurityHeader => "no_security_header",
            Self::BadAudience(_) => "bad_audience",
            Self::NoSvid => "no_token",
            Self::BadSpiffeId(_) => "bad_spiffe_id",
            Self::BadToken(_) => "bad_token",
            Self::NoIdentity(_) => "no_identity",
            Self::NotKnown => "not_known",
            Self::Refused(refusal) => refusal.reason.text(),
            Self::OtherPidNamespace | Self::Unmapped | Self::ProcOfOthers | Self::Attestation(_) => {
                "not_attested"
            }
            Self::JwtSvid(_) | Self::X509Svid(_) => "not_signed",
            Self::Draining => "draining",
            Self::SentAway => "sent_away",
            Self::Crowded => "crowded",
            Self::NoMemory | Self::NoMemoryToRead => "no_memory",
            Self::Unfinished { .. } => "unfinished",
            Self::NoWitSvids | Self::NoWitBundles => "not_implemented",
            Self::NoPeer => "no_peer",
        }
    }

    /// The code. No wildcard arm: a new error must choose.
    pub fn code(&self) -> Code {
        match self {
            Self::NoSecurityHeader
            | Self::BadAudience(_)
            | Self::NoSvid
            | Self::BadSpiffeId(_)
            | Self::BadToken(_) => Code::InvalidArgument,
            Self::NoIdentity(_) => Code::PermissionDenied,
            Self::Refused(refusal) => match refusal.status {
                RejectionStatus::ResourceExhausted => Code::ResourceExhausted,
                RejectionStatus::Unavailable => Code::Unavailable,
            },
            Self::OtherPidNamespace => Code::FailedPrecondition,
            Self::NotKnown
            | Self::Unmapped
            | Self::ProcOfOthers
            | Self::Attestation(_)
            | Self::JwtSvid(_)
            | Self::X509Svid(_)
            | Self::Draining
            | Self::SentAway
            | Self::Crowded
            | Self::NoMemory
            | Self::NoMemoryToRead
            | Self::Unfinished { .. } => Code::Unavailable,
            Self::NoWitSvids | Self::NoWitBundles => Code::Unimplemented,
            Self::NoPeer => Code::Internal,
        }
    }
}

impl From<Unheard> for Code {
    /// As what a client takes the reset of such a request.
    fn from(why: Unheard) -> Self {
        match why {
            Unheard::Broken => Self::Internal,
            Unheard::TooMany => Self::Unavailable,
            Unheard::Ended => Self::Cancelled,
        }
    }
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        match &error {
            RequestError::Refused(refusal) => refused(error.code(), &error.to_string(), refusal.wait()),
            RequestError::Crowded
            | RequestError::NoMemory
            | RequestError::NoMemoryToRead
            | RequestError::NotKnown => refused(error.code(), &error.to_string(), Some(COME_BACK)),
            RequestError::Unfinished { .. } => refused(error.code(), &error.to_string(), Some(REST_COMES)),
            RequestError::JwtSvid(cause) | RequestError::X509Svid(cause) if cause.retry_after().is_some() => {
                refused(error.code(), &error.to_string(), cause.retry_after())
            }
            _ => Self::new(error.code(), error.to_string()),
        }
    }
}

/// When to come back after a connection was refused, where it is not known: when others leave, or how many of a crowd wait for
/// the same room. It waited for a moment already, and clients pause for a second anyway.
const COME_BACK: Duration = Duration::from_secs(1);

/// What the first call on a refused connection is told: the headers of an answer that ends with them. `None` where nobody is
/// there to be told. Limits that an admin set are told with `limits`; `wait` is when one may come back, if that is known; `places`
/// are what each connection takes one of.
pub fn refused_connection(
    why: ConnectionRefusal,
    wait: Option<Duration>,
    limits: RejectionStatus,
    places: &str,
) -> Option<HeaderMap> {
    use ConnectionRefusal as R;
    let limit = match limits {
        RejectionStatus::ResourceExhausted => Code::ResourceExhausted,
        RejectionStatus::Unavailable => Code::Unavailable,
    };
    let short_of_places = format!("the agent is short of {places}, and this caller has its share of them");
    let (code, text) = match why {
        R::Unidentified | R::NotOwner | R::AdminConnections => return None,
        R::Blocked => (limit, "rate limit exceeded: ratelimit.gate blocks this caller"),
        R::CallerConnections => {
            (limit, "rate limit exceeded: this caller has as many connections as ratelimit.gate allows")
        }
        R::CallerRate => {
            (limit, "rate limit exceeded: this caller connects more often than ratelimit.gate allows")
        }
        R::OverflowRate => (
            limit,
            "rate limit exceeded: the callers without a bucket of their own (ratelimit.keys) connect more often than ratelimit.gate \
             allows",
        ),
        R::NodeConnections => (Code::Unavailable, "the agent has reached its limit of connections"),
        R::Descriptors => (Code::Unavailable, short_of_places.as_str()),
        R::Memory => {
            (Code::Unavailable, "the agent is short of memory, and this caller holds its share of it")
        }
        R::MemoryTaken => (
            Code::Unavailable,
            "the agent is out of memory: others hold it, and take what is set aside for callers that hold little",
        ),
        R::Processor => (
            Code::Unavailable,
            "the agent is short of processor time, and this caller connects more often than its share of it allows",
        ),
    };
    let wait = (why != R::Blocked).then_some(wait.unwrap_or(COME_BACK));
    Some(refused(code, text, wait).into_http::<()>().into_parts().0.headers)
}

/// What the first call is told where the agent can identify nobody: no wait would help.
pub fn unidentified() -> HeaderMap {
    let text = "the agent cannot identify its callers on this node, and serves nobody: see its log";
    Status::unavailable(text).into_http::<()>().into_parts().0.headers
}

impl From<BodyError> for Status {
    fn from(error: BodyError) -> Self {
        match error {
            BodyError::TooLong => refused(Code::ResourceExhausted, &error.to_string(), None),
            BodyError::Unfinished { bytes } => RequestError::Unfinished { bytes }.into(),
            BodyError::NoMemory => RequestError::NoMemoryToRead.into(),
            // It was reset, or its connection ended.
            BodyError::Broken => Self::cancelled(error.to_string()),
        }
    }
}

/// When to come back after too many bytes of unfinished requests: what their client has begun to send is there by then.
const REST_COMES: Duration = Duration::from_millis(100);

/// A refusal tells when to come back, twice: as `google.rpc.RetryInfo` for those who read details, and as the
/// [`PUSHBACK`] trailer (a negative one means: do not). Rounded up, so that whoever comes back then passes.
fn refused(code: Code, text: &str, wait: Option<Duration>) -> Status {
    let mut status = match wait {
        Some(wait) => Status::with_error_details(code, text, ErrorDetails::with_retry_info(Some(wait))),
        None => Status::new(code, text),
    };
    let pushback =
        wait.map_or(-1, |wait| i64::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(i64::MAX));
    status.metadata_mut().insert(PUSHBACK, MetadataValue::from(pushback));
    status
}
