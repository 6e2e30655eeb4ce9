//! An agent of a test's own, on a socket of its own, and a client for it.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use durward::{
    agent::Running,
    api::proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient,
    config::{Config, ExpandEnv},
    limits::processor::ProcessorShare,
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
        Self::with(blocks, Clock::SYSTEM)
    }

    /// The same, by this clock.
    pub(crate) fn with(blocks: &str, clock: Clock) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), blocks);
        let running = Running::start(load_unhurried(dir.path()).unwrap(), None, clock).unwrap();
        Self { dir, running }
    }

    /// Writes `blocks` in place of the old ones and reloads.
    pub(crate) fn reload(&mut self, blocks: &str) -> anyhow::Result<()> {
        write_config(self.dir.path(), blocks);
        self.running.reload(load_unhurried(self.dir.path())?)?;
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

/// The same, for an agent in this process: what all tests in it use together says nothing about the agent.
fn load_unhurried(dir: &Path) -> anyhow::Result<Config> {
    let mut config = load(dir)?;
    config.ratelimit.node.cpu = ProcessorShare::cores(ProcessorShare::MOST).unwrap();
    Ok(config)
}

/// An entry for the user that runs the test.
pub(crate) fn entry(path: &str, more: &str) -> String {
    let uid = nix::unistd::geteuid();
    format!("entry \"spiffe://{TRUST_DOMAIN}{path}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n  {more}\n}}\n")
}

/// Connects to a socket, whatever the address.
fn connector(
    socket: &Path,
) -> impl tower::Service<Uri, Response = TokioIo<UnixStream>, Error = std::io::Error, Future: Send> + Send + 'static
{
    let socket: Arc<Path> = socket.into();
    tower::service_fn(move |_: Uri| {
        let socket = Arc::clone(&socket);
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    })
}

pub(crate) async fn channel(socket: &Path) -> Channel {
    Endpoint::from_static("http://localhost").connect_with_connector(connector(socket)).await.unwrap()
}

/// A client whose connection may be refused: its first call says so.
pub(crate) fn refusable_client(socket: &Path) -> SpiffeWorkloadApiClient<Channel> {
    let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector(socket));
    SpiffeWorkloadApiClient::new(channel)
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

/// Puts this program at `to`, where others may run it: the build directory may be closed to them. By a process of its own, since
/// what a test itself has open to write is open in children of other tests too, and is not to be executed then.
pub(crate) fn copy_program(to: &Path) {
    let copied =
        std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_durward")).arg(to).status().unwrap();
    assert!(copied.success());
}

/// Makes a library of this source in C that stands in front of the C library's (`LD_PRELOAD`).
pub(crate) fn make_library(library: &Path, source: &Path) {
    let mut compiler = std::process::Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-o"]).args([library, source]).arg("-ldl");
    assert!(compiler.status().expect("the C compiler that a build needs").success());
}

/// The agent as a process of its own, killed when dropped.
pub(crate) struct Process(std::process::Child);

impl Process {
    /// Starts `durward run` with the configuration in `dir`; what it says goes to `log` in there.
    pub(crate) fn spawn(dir: &Path) -> Self {
        Self::spawn_by(&[], dir)
    }

    /// The same, started by another command, whose words these are.
    pub(crate) fn spawn_by(words: &[&str], dir: &Path) -> Self {
        let words = [words, &[env!("CARGO_BIN_EXE_durward"), "run"]].concat();
        let mut command = std::process::Command::new(words[0]);
        command.args(&words[1..]).arg("--config").arg(dir.join("agent.conf"));
        Self::of(command, &dir.join("log"))
    }

    /// Starts this command; what it says goes to `log`.
    pub(crate) fn of(mut command: std::process::Command, log: &Path) -> Self {
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let child = command
            // Set in every container of Kubernetes, where these tests may run too.
            .env_remove("KUBERNETES_SERVICE_HOST")
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self(child)
    }

    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.0.id().cast_signed())
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).unwrap();
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// Waits for the end.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.0.wait().unwrap()
    }

    /// Waits until the agent answers at the socket in `dir`, or panics with what it said.
    pub(crate) async fn serving(&mut self, dir: &Path) -> SpiffeWorkloadApiClient<Channel> {
        self.serving_at(&dir.join("api.sock"), &dir.join("log")).await
    }

    /// The same, with a socket and a log elsewhere.
    pub(crate) async fn serving_at(&mut self, socket: &Path, log: &Path) -> SpiffeWorkloadApiClient<Channel> {
        for _ in 0..600 {
            if let Some(status) = self.0.try_wait().unwrap() {
                panic!("{status}: {}", std::fs::read_to_string(log).unwrap());
            }
            if UnixStream::connect(socket).await.is_ok() {
                return client(socket).await;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("no agent: {}", std::fs::read_to_string(log).unwrap());
    }

    /// A field of `/proc/PID/status` in KiB, such as `VmRSS`.
    pub(crate) fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
