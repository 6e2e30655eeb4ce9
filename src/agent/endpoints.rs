//! The HTTP endpoints of a configuration: metrics and health checks, each at a port or at a socket.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{runtime::Handle, task::JoinSet};

use crate::{
    config::Config,
    peer::{Socket, socket::BindError},
    telemetry::{
        HealthSettings,
        health::HealthState,
        http::{HeldPlaces, HttpError, HttpListener, Routes},
        metrics::Metrics,
    },
};

/// An endpoint that is asked for.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    at: EndpointPlace,
    routes: Routes,
}

#[derive(Clone, Debug)]
enum EndpointPlace {
    Port { host: String, port: u16 },
    Socket(PathBuf),
}

/// Why an endpoint is not to be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum EndpointError {
    /// At its port.
    #[error(transparent)]
    Port(#[from] HttpError),
    /// At its socket.
    #[error("cannot serve {what}")]
    Socket { what: &'static str, source: BindError },
}

impl EndpointError {
    /// Whether somebody else is there, who may be the agent that leaves its place to this one.
    pub(super) fn is_taken(&self) -> bool {
        match self {
            Self::Port(error) => error.is_taken(),
            Self::Socket { source, .. } => matches!(source, BindError::AnotherAgent { .. }),
        }
    }
}

/// Those for metrics.
pub(super) fn of_metrics(config: &Config, metrics: &Arc<Metrics>) -> Vec<Endpoint> {
    let port =
        config.prometheus.as_ref().map(|at| EndpointPlace::Port { host: at.host.clone(), port: at.port });
    let socket = config.metrics_socket.clone().map(EndpointPlace::Socket);
    let routes = || Routes::Metrics(Arc::clone(metrics));
    [port, socket].into_iter().flatten().map(|at| Endpoint { at, routes: routes() }).collect()
}

/// Those for health checks.
pub(super) fn of_health(config: &Config, state: &Arc<HealthState>) -> Vec<Endpoint> {
    let HealthSettings { enabled, host, port, live_path, ready_path, socket_path } = &config.health;
    let port = enabled.then(|| EndpointPlace::Port { host: host.clone(), port: *port });
    let socket = socket_path.clone().map(EndpointPlace::Socket);
    let routes = || Routes::Health {
        state: Arc::clone(state),
        live_path: live_path.clone(),
        ready_path: ready_path.clone(),
    };
    [port, socket].into_iter().flatten().map(|at| Endpoint { at, routes: routes() }).collect()
}

impl Endpoint {
    /// Binds it. Nobody is answered yet; it holds at most `places` connections.
    pub(super) fn bind(&self, places: usize) -> Result<HttpListener, EndpointError> {
        let routes = self.routes.clone();
        match &self.at {
            EndpointPlace::Port { host, port } => Ok(HttpListener::bind(host, *port, routes, places)?),
            EndpointPlace::Socket(path) => at_socket(path, &self.routes, places)
                .map_err(|source| EndpointError::Socket { what: routes.what(), source }),
        }
    }
}

/// At a Unix socket for the agent's user and group.
fn at_socket(path: &Path, routes: &Routes, places: usize) -> Result<HttpListener, BindError> {
    let (listener, place) = Socket::bind(path, 0o660)?.into_parts();
    Ok(HttpListener::at_socket(listener, place, routes.clone(), places))
}

/// The endpoints of an agent, as far as they could be bound.
#[derive(Debug)]
pub(super) struct HttpEndpoints {
    bound: Vec<HttpListener>,
    taken: Vec<Endpoint>,
    places: usize,
    /// What those hold that are served.
    held: Vec<HeldPlaces>,
    serving: JoinSet<()>,
}

impl HttpEndpoints {
    /// Binds these, but for those where somebody else is.
    ///
    /// # Errors
    /// [`EndpointError`], of one that is not to be had whoever leaves.
    pub(super) fn bind(asked: Vec<Endpoint>, places: usize) -> Result<Self, EndpointError> {
        let (mut bound, mut taken) = (Vec::new(), Vec::new());
        for endpoint in asked {
            match endpoint.bind(places) {
                Ok(listener) => bound.push(listener),
                Err(error) if error.is_taken() => taken.push(endpoint),
                Err(error) => return Err(error),
            }
        }
        Ok(Self { bound, taken, places, held: Vec::new(), serving: JoinSet::new() })
    }

    /// All of them, now that nobody else may be there.
    ///
    /// # Errors
    /// [`EndpointError`].
    pub(super) fn all(mut self) -> Result<Self, EndpointError> {
        for endpoint in std::mem::take(&mut self.taken) {
            self.bound.push(endpoint.bind(self.places)?);
        }
        Ok(self)
    }

    /// Serves those that are bound, on this runtime.
    pub(super) fn serve(&mut self, control: &Handle) {
        for listener in self.bound.drain(..) {
            self.held.push(listener.held());
            let serving = async move {
                // It serves for ever, or cannot begin.
                let Err(error) = listener.serve().await;
                tracing::error!(%error, "an http listener cannot be served");
            };
            self.serving.spawn_on(serving, control);
        }
    }

    /// What those hold that are served, and what serves them.
    pub(super) fn into_served(self) -> (Vec<HeldPlaces>, JoinSet<()>) {
        (self.held, self.serving)
    }
}
