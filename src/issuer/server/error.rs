//! What can go wrong between the agent and its server, and what an admin does about it.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use prost::Message as _;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};

use super::{
    dial::DialError,
    proto::types::{PermissionDeniedDetails, permission_denied_details::Reason},
};
use crate::{issuer::FileFault, os::sentence::said};

/// The most that is kept of what a server says, in bytes.
const LONGEST_MESSAGE: usize = 512;

/// Why something that needs the server did not come about. Holds no key and no token.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ServerError {
    /// No connection.
    #[error("cannot reach the server {server}: {}", after(server, cause))]
    NotReached { server: String, cause: Arc<dyn std::error::Error + Send + Sync> },
    /// What answers there is signed by an authority that is not known: the server began anew with others, or it is
    /// somebody else's.
    #[error("cannot reach the server {server}: {}; {counts}", after(server, cause))]
    UnknownAuthority {
        server: String,
        cause: Arc<dyn std::error::Error + Send + Sync>,
        /// Which authorities count, and what an admin can do about that.
        counts: &'static str,
    },
    /// The connection was lost when the call had been sent.
    #[error("the connection to the server was lost before it had answered: {0}")]
    Lost(String),
    /// An answer, and not one of gRPC.
    #[error(
        "what answers as the server {server} does not speak gRPC (HTTP status {status}): is this port a SPIRE Server's, and no \
         proxy before it?"
    )]
    NotGrpc { server: String, status: u16 },
    /// No answer in time.
    #[error("the server did not answer in time")]
    Late,
    /// The agent has no SVID to show.
    #[error("this agent has no valid SVID of its own")]
    NoSvid,
    /// The server does not take this agent for one of its own.
    #[error("{0}")]
    Denied(Denial),
    /// The server refuses to attest this node.
    #[error("node attestation by {attestor} is refused: {message} ({code:?}){remedy}")]
    Refused { attestor: &'static str, code: Code, message: String, remedy: &'static str },
    /// The server answers with an error.
    #[error("the server answers {call} with {code:?}: {message}")]
    Answered { call: &'static str, code: Code, message: String },
    /// The answer makes no sense; nothing of it is used.
    #[error("the server's answer to {call} is invalid: {fault}")]
    Senseless { call: &'static str, fault: String },
    /// Nothing is there that this node could attest with.
    #[error("a join token is needed (spire-server token generate, then -joinToken)")]
    NoToken,
    /// What this node attests with is not there, or cannot be used.
    #[error("{attestor}: {fault}")]
    Evidence { attestor: &'static str, fault: String },
    /// What the server is to be known by cannot be had.
    #[error("cannot get the trust bundle from {place}: {fault}")]
    TrustSource { place: String, fault: String },
    /// The disk.
    #[error("{0}")]
    Disk(Arc<DataFault>),
}

/// Why the server does not take this agent for one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Denial {
    #[error("the server says that this agent's SVID has expired")]
    Expired,
    #[error("the server does not know this agent: it was evicted, or the server's database is another")]
    NotAttested,
    #[error("the server says that another copy of this agent has renewed its SVID: was its data_dir copied?")]
    NotActive,
    #[error("this agent is banned at the server")]
    Banned,
    #[error("the server requires this agent to attest again")]
    MustReattest,
}

/// By what name the server knows this agent, as far as that can be told here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AgentName {
    /// The server gave it.
    Given(String),
    /// The server gives it unless it has a template of its own for these names.
    ByDefault(String),
    Unknown,
}

/// How it is deleted at the server.
impl fmt::Display for AgentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const EVICT: &str = "spire-server agent evict -spiffeID";
        match self {
            Self::Given(id) => write!(f, "{EVICT} {id}"),
            Self::ByDefault(id) => {
                write!(f, "{EVICT} {id}, or its ID in spire-server agent list with an agent_path_template")
            }
            Self::Unknown => write!(f, "{EVICT} <its ID, see spire-server agent list>"),
        }
    }
}

/// What is wrong with what is kept on the disk.
#[derive(Debug, thiserror::Error)]
pub enum DataFault {
    #[error(transparent)]
    File(#[from] FileFault),
    /// It was left where it is.
    #[error("{} is damaged: {damage}; put a copy from a backup in its place", path.display())]
    Damaged { path: PathBuf, damage: &'static str },
    /// It was put aside.
    #[error("{} is damaged: {damage}; it is kept as {}: {}", path.display(), kept.display(), instead_of(kept))]
    PutAside { path: PathBuf, damage: &'static str, kept: PathBuf },
    /// It was put aside before, and nothing is in its place.
    #[error("{} was damaged, and is kept as {}: {}", path.display(), kept.display(), instead_of(kept))]
    NotReplaced { path: PathBuf, kept: PathBuf },
    /// It cannot be put aside.
    #[error("{} is damaged: {damage}; move it away, and the others beside it that end in .damaged", path.display())]
    DamagedOften { path: PathBuf, damage: &'static str },
    /// rebootstrap_mode demands it.
    #[error(
        "{}: with the SVID in it this node cannot attest again, and rebootstrap_mode \"always\" demands that: set it to \"auto\" or \"never\"",
        path.display()
    )]
    NotReattestable { path: PathBuf },
    #[error("{} is of trust domain {found:?}, but the agent is configured for {want:?}: correct trust_domain, or choose another data_dir", path.display())]
    TrustDomain { path: PathBuf, found: String, want: String },
}

impl ServerError {
    /// A dial that failed. `counts` is said of a server with another authority.
    pub(super) fn dialed(server: String, error: DialError, counts: &'static str) -> Self {
        if error.is_unknown_authority() {
            Self::UnknownAuthority { server, cause: Arc::new(error), counts }
        } else {
            Self::NotReached { server, cause: Arc::new(error) }
        }
    }

    /// A connection that ended under a call.
    pub(super) fn lost(error: &hyper::Error) -> Self {
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let cause = match cause.downcast_ref::<io::Error>() {
            Some(cause) => said(cause),
            // hyper says that an operation was canceled, whoever did so.
            None if error.is_canceled() || error.is_closed() => "it was closed".to_owned(),
            None => said(&io::Error::other(cause.to_string())),
        };
        Self::Lost(cause)
    }

    /// What `call` was answered with. Errors of the connection, which tonic hands on within a status, stay what they are.
    pub fn of(call: &'static str, status: &Status) -> Self {
        let mut source = std::error::Error::source(status);
        while let Some(error) = source {
            if let Some(error) = error.downcast_ref::<Self>() {
                return error.clone();
            }
            if let Some(error) = error.downcast_ref() {
                return Self::lost(error);
            }
            source = error.source();
        }
        if let Some(denial) = Denial::of(status) {
            return Self::Denied(denial);
        }
        Self::Answered { call, code: status.code(), message: shown(status.message()) }
    }
}

impl Denial {
    /// What an admin does at the server about an agent, of this name, so that it is taken again.
    pub(super) fn remedy(self, agent: &AgentName, with_token: bool) -> String {
        let token = "make a token (spire-server token generate) and start it with that (-joinToken)";
        match (self, with_token) {
            (Self::Banned, true) => format!("to have it back, delete it there ({agent}), then {token}"),
            (Self::Banned, false) => {
                format!("to have it back, delete it there ({agent}), then start it again")
            }
            (_, true) => format!("to have it back, {token}"),
            (_, false) => "start it again: it attests anew".to_owned(),
        }
    }

    /// The reason that a PermissionDenied has in its details.
    pub(super) fn of(status: &Status) -> Option<Self> {
        if status.code() != Code::PermissionDenied {
            return None;
        }
        let told = tonic_types::pb::Status::decode(status.details()).ok()?;
        let detail = told
            .details
            .iter()
            .find(|it| it.type_url.ends_with("/spire.api.types.PermissionDeniedDetails"))?;
        let detail = PermissionDeniedDetails::decode(detail.value.as_slice()).ok()?;
        match detail.reason() {
            Reason::Unknown => None,
            Reason::AgentExpired => Some(Self::Expired),
            Reason::AgentNotAttested => Some(Self::NotAttested),
            Reason::AgentNotActive => Some(Self::NotActive),
            Reason::AgentBanned => Some(Self::Banned),
            Reason::AgentMustReattest => Some(Self::MustReattest),
        }
    }
}

/// What an admin does about a file that is kept as `kept`, and that only a join token can replace.
fn instead_of(kept: &Path) -> String {
    format!(
        "put a copy of it from a backup in its place; if there is none, move {} away, and start with a new join token \
         (spire-server token generate, then -joinToken)",
        kept.display()
    )
}

/// The cause, without the server's address where that is how the server is called.
fn after(server: &str, cause: &dyn std::error::Error) -> String {
    let text = cause.to_string();
    let address = text.strip_prefix(server).and_then(|rest| rest.strip_prefix(": "));
    address.map(str::to_owned).unwrap_or(text)
}

/// What a server says, as it may stand in a log: not without end, and on one line.
pub(super) fn shown(message: &str) -> String {
    let mut room = LONGEST_MESSAGE;
    let fits = |letter: &char| {
        let fits = room >= letter.len_utf8();
        room = room.saturating_sub(letter.len_utf8());
        fits
    };
    message.chars().take_while(fits).filter(|letter| !letter.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_server_is_named_once() {
        let refused = |server: &str| {
            let cause = Arc::new(io::Error::from_raw_os_error(111));
            let error = DialError::Connect { address: "127.0.0.1:8081".parse().unwrap(), cause };
            ServerError::dialed(server.to_owned(), error, "").to_string()
        };
        let want = "cannot reach the server 127.0.0.1:8081: connection refused";
        assert_eq!(refused("127.0.0.1:8081"), want);
        let want = "cannot reach the server spire:8081: 127.0.0.1:8081: connection refused";
        assert_eq!(refused("spire:8081"), want);
    }
}
