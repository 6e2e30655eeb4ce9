//! How an agent leaves its place to the next one: what the two say to each other.
//!
//! The running agent listens at `handover.sock` in `data_dir`, where only its user and root can connect; the kernel says
//! who did. The next one, prepared as far as it can be, sends one line of JSON with what it is going to serve, and with
//! what would keep it from that. It is answered with a line that says why not, or with the listening sockets (`SCM_RIGHTS`), once
//! the issuer's files are free.
//! It says `serving` when it does. The one that has left closes the connection, and ends; or says `standing by`, and can come
//! back when the connection ends, which the next one keeps open for as long as it lives. No call is lost meanwhile: who
//! connects waits in the queue of the socket, which never goes away.
//!
//! One that stands by outlives the next one, perhaps, and finds yet another agent serving. It says to that one that it stands
//! by, with a line as the one that asks for the place, so that it is told when the place is free, as its predecessor would be.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt as _, net::UnixStream};

use crate::{
    config::{AdminSocket, Config},
    peer::socket::VacantSocket,
};

/// The name of the socket in `data_dir`.
const NAME: &str = "handover.sock";
/// What these agents speak.
pub(super) const VERSION: u32 = 1;
/// The longest line of either side, in bytes.
pub(super) const MOST_LINE: usize = 4096;
/// What the next agent says at last.
pub(super) const SERVING: &[u8] = b"serving\n";
/// What the one that has left says after that, if it stays to come back.
pub(super) const STANDS_BY: &[u8] = b"standing by\n";

/// Where an agent that keeps its state in `data_dir` is asked to hand over.
pub(super) fn socket_in(data_dir: &Path) -> PathBuf {
    data_dir.join(NAME)
}

/// What the next agent is going to serve, or one that stands by would.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct HandoverRequest {
    pub(super) version: u32,
    pub(super) trust_domain: String,
    pub(super) socket_path: PathBuf,
    pub(super) admin_socket_path: Option<PathBuf>,
    /// It asks for nothing but to know when the place is free.
    #[serde(default)]
    pub(super) stands_by: bool,
    /// What would keep it from serving; empty where nothing would. An agent that serves, or lacks less, keeps its place.
    #[serde(default)]
    pub(super) lacks: Vec<String>,
}

impl HandoverRequest {
    /// Asks for the place of an agent of this configuration.
    pub(super) fn for_place(config: &Config) -> Self {
        let admin = config.agent.admin_socket();
        Self {
            version: VERSION,
            trust_domain: config.trust_domain.name().to_owned(),
            socket_path: config.agent.socket_path.clone(),
            admin_socket_path: admin
                .map(|(AdminSocket::Configured(path) | AdminSocket::ByDefault(path))| path),
            stands_by: false,
            lacks: Vec::new(),
        }
    }

    /// The request as it is sent.
    pub(super) fn line(&self) -> io::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}

/// What it is told.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum HandoverAnswer {
    /// Nothing has changed. The text says why.
    Refused(String),
    /// The same, since the next one would serve nobody: it may come again. Only said to one that said what it lacks.
    Kept(String),
    /// These sockets come along, in this order, and the issuer's files are free.
    Passed(Vec<PassedSocket>),
}

/// A socket whose descriptor comes along.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct PassedSocket {
    pub(super) path: PathBuf,
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// The sockets that one agent leaves to another.
#[derive(Debug, Default)]
pub(super) struct LeftSockets {
    pub(super) public: Option<VacantSocket>,
    pub(super) admin: Option<VacantSocket>,
}

impl LeftSockets {
    /// The same sockets once more.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        let again = |socket: &Option<VacantSocket>| socket.as_ref().map(VacantSocket::try_clone).transpose();
        Ok(Self { public: again(&self.public)?, admin: again(&self.admin)? })
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &VacantSocket> {
        [&self.public, &self.admin].into_iter().flatten()
    }
}

/// A line, with its end.
pub(super) async fn line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        if line.len() >= MOST_LINE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut byte).await?;
        line.extend(byte);
    }
    Ok(line)
}
