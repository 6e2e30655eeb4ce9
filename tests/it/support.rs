//! An agent of a test's own, on a socket of its own, and a client for it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use durward::{
    agent::Running,
    api::proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient,
    config::{Config, ExpandEnv},
    os::clock::Clock,
};
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::{
    Request,
    transport::{Channel, Endpoint, Uri},
};

/// The trust domain of every test agent.
pub(crate) const TRUST_DOMAIN: &str = "example.org";

/// An agent in this process.
pub(crate) struct TestAgent {
    pub(crate) dir: TempDir,
    pub(crate) running: Running,
}

impl TestAgent {
    /// Starts an agent whose configuration holds `blocks` beside what every agent needs.
    pub(crate) fn start(blocks: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), blocks);
        let running = Running::start(load(dir.path()).unwrap(), None, Clock::SYSTEM).unwrap();
        Self { dir, running }
    }

    /// Writes `blocks` in place of the old ones and reloads.
    pub(crate) fn reload(&mut self, blocks: &str) -> anyhow::Result<()> {
        write_config(self.dir.path(), blocks);
        self.running.reload(load(self.dir.path())?)?;
        Ok(())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    pub(crate) async fn client(&self) -> SpiffeWorkloadApiClient<Channel> {
        client(&self.socket()).await
    }
}

/// `agent.conf` in `dir`, with everything that an agent writes kept in `dir`.
pub(crate) fn write_config(dir: &Path, blocks: &str) {
    let at = dir.display();
    let text = format!(
        "agent {{\n  trust_domain = \"{TRUST_DOMAIN}\"\n  data_dir = \"{at}/data\"\n  socket_path = \"{at}/api.sock\"\n  log_level = \"warn\"\n}}\n\
         plugins {{\n  WorkloadAttestor \"unix\" {{\n    plugin_data {{ }}\n  }}\n}}\n\
         issuer \"embedded\" {{ }}\n{blocks}\n"
    );
    std::fs::write(dir.join("agent.conf"), text).unwrap();
}

pub(crate) fn load(dir: &Path) -> anyhow::Result<Config> {
    Ok(Config::load(&dir.join("agent.conf"), ExpandEnv::No)?)
}

/// An entry for the user that runs the test.
pub(crate) fn entry(path: &str, more: &str) -> String {
    let uid = nix::unistd::geteuid();
    format!("entry \"spiffe://{TRUST_DOMAIN}{path}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n  {more}\n}}\n")
}

pub(crate) async fn channel(socket: &Path) -> Channel {
    let socket: Arc<Path> = socket.into();
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let socket = Arc::clone(&socket);
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .unwrap()
}

pub(crate) async fn client(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    SpiffeWorkloadApiClient::new(channel(socket).await)
}

/// A request with the security header.
pub(crate) fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
    request
}
