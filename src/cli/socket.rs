//! Which socket a command talks to, and who said so.
//!
//! spire-agent's order (`cmd/spire-agent/cli/common/template.go`), then the standard's variable: `--socket-path`;
//! `--instance` put into `SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE`; `SPIRE_AGENT_PUBLIC_SOCKET`; `SPIFFE_ENDPOINT_SOCKET`;
//! our default. Nothing is guessed from what happens to exist: the first that is set is taken, and an error says
//! which one it was.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    path::{Path, PathBuf},
};

use crate::config::DEFAULT_SOCKET_PATH as DEFAULT;

const TEMPLATE: &str = "SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE";
const SPIRE: &str = "SPIRE_AGENT_PUBLIC_SOCKET";
const SPIFFE: &str = "SPIFFE_ENDPOINT_SOCKET";

/// Options of every command that talks to the agent.
#[derive(clap::Args, Clone, Debug, Default)]
pub(super) struct SocketArgs {
    /// Path of the agent's Workload API socket
    ///
    /// Without it, the first of these that is set: --instance, the environment variables
    /// SPIRE_AGENT_PUBLIC_SOCKET (a path) and SPIFFE_ENDPOINT_SOCKET (unix:///path), then
    /// /run/durward/public/api.sock.
    #[arg(long, value_name = "PATH", verbatim_doc_comment)]
    pub(super) socket_path: Option<PathBuf>,

    /// Name that stands for %i in SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE
    #[arg(long, value_name = "NAME")]
    pub(super) instance: Option<OsString>,
}

/// A socket and where its path came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentSocket {
    /// Absolute, unless the working directory is gone.
    pub(super) path: PathBuf,
    pub(super) chosen: Chosen,
}

/// Who said which socket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chosen {
    Flag,
    Instance,
    Spire,
    Spiffe,
    Default,
    /// The agent in this very process.
    Own,
    /// An admin socket.
    AdminFlag,
    /// The admin socket, where it is when nobody says otherwise.
    AdminDefault,
}

impl Chosen {
    /// Whether it is an admin socket.
    pub(super) fn is_admin(self) -> bool {
        matches!(self, Self::AdminFlag | Self::AdminDefault)
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag | Self::AdminFlag => f.write_str("given as --socket-path"),
            Self::Instance => write!(f, "made of --instance and {TEMPLATE}"),
            Self::Spire => write!(f, "taken from the environment variable {SPIRE}"),
            Self::Spiffe => write!(f, "taken from the environment variable {SPIFFE}"),
            Self::Default | Self::AdminDefault => f.write_str("the default; --socket-path chooses another"),
            Self::Own => f.write_str("the agent's own"),
        }
    }
}

/// Why no socket can be named.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SocketError {
    #[error("the environment variable {TEMPLATE} must be set when --instance is used")]
    TemplateUnset,
    #[error("the environment variable {TEMPLATE} must hold %i, which --instance replaces; got {0:?}")]
    TemplateWithoutPlace(OsString),
    #[error(
        "the environment variable {SPIFFE} must be unix:// with an absolute path, such as unix://{DEFAULT}; got {0:?}"
    )]
    NotUnixUri(OsString),
}

impl SocketArgs {
    /// Chooses the socket. `environment` answers as `std::env::var_os`.
    pub(super) fn resolve(
        &self,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<AgentSocket, SocketError> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        // spire-agent refuses a bad template even when the flag wins: a wrong --instance is never ignored.
        let from_instance = match self.instance.as_deref().filter(|name| !name.is_empty()) {
            None => None,
            Some(name) => {
                let template = set(TEMPLATE).ok_or(SocketError::TemplateUnset)?;
                Some(fill(&template, name).ok_or(SocketError::TemplateWithoutPlace(template))?)
            }
        };
        let (path, chosen) = if let Some(path) = &self.socket_path {
            (path.clone(), Chosen::Flag)
        } else if let Some(path) = from_instance {
            (path.into(), Chosen::Instance)
        } else if let Some(path) = set(SPIRE) {
            (path.into(), Chosen::Spire)
        } else if let Some(uri) = set(SPIFFE) {
            (unix_path(&uri).ok_or(SocketError::NotUnixUri(uri))?, Chosen::Spiffe)
        } else {
            (DEFAULT.into(), Chosen::Default)
        };
        Ok(AgentSocket { path: std::path::absolute(&path).unwrap_or(path), chosen })
    }
}

fn fill(template: &OsStr, name: &OsStr) -> Option<OsString> {
    let (template, name) = (template.to_str()?, name.to_str()?);
    template.contains("%i").then(|| template.replace("%i", name).into())
}

/// The path of `unix:///path` or `unix:/path`: no host, no query, no fragment, as the SPIFFE Workload Endpoint
/// standard, section 4, has it.
fn unix_path(uri: &OsStr) -> Option<PathBuf> {
    let rest = uri.to_str()?.strip_prefix("unix:")?;
    let path = rest.strip_prefix("//").unwrap_or(rest);
    let plain = path.starts_with('/') && path.len() > 1 && !path.contains(['?', '#', '\0']);
    plain.then(|| Path::new(path).to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_that_is_set_is_taken() {
        let all = [(TEMPLATE, "/t/%i.sock"), (SPIRE, "/spire.sock"), (SPIFFE, "unix:///spiffe.sock")];
        let none: [(&str, &str); 0] = [];
        type Want<'a> = Result<(&'a str, Chosen), SocketError>;
        type Case<'a> = (&'a str, Option<&'a str>, Option<&'a str>, &'a [(&'a str, &'a str)], Want<'a>);
        let cases: [Case<'_>; 16] = [
            ("nothing", None, None, &none, Ok((DEFAULT, Chosen::Default))),
            ("flag wins", Some("/f"), Some("a"), &all, Ok(("/f", Chosen::Flag))),
            ("template next", None, Some("a"), &all, Ok(("/t/a.sock", Chosen::Instance))),
            ("spire's next", None, None, &all, Ok(("/spire.sock", Chosen::Spire))),
            ("then the standard's", None, None, &[(SPIFFE, "unix:///s")], Ok(("/s", Chosen::Spiffe))),
            ("one slash is a URI too", None, None, &[(SPIFFE, "unix:/s")], Ok(("/s", Chosen::Spiffe))),
            ("empty is unset", None, None, &[(SPIRE, ""), (SPIFFE, "")], Ok((DEFAULT, Chosen::Default))),
            ("empty instance is none", None, Some(""), &none, Ok((DEFAULT, Chosen::Default))),
            ("instance, no template", None, Some("a"), &none, Err(SocketError::TemplateUnset)),
            ("even with the flag", Some("/f"), Some("a"), &none, Err(SocketError::TemplateUnset)),
            (
                "no %i",
                None,
                Some("a"),
                &[(TEMPLATE, "/t")],
                Err(SocketError::TemplateWithoutPlace("/t".into())),
            ),
            ("a path", None, None, &[(SPIFFE, "/s")], Err(SocketError::NotUnixUri("/s".into()))),
            (
                "tcp",
                None,
                None,
                &[(SPIFFE, "tcp://1.2.3.4:5")],
                Err(SocketError::NotUnixUri("tcp://1.2.3.4:5".into())),
            ),
            (
                "a host",
                None,
                None,
                &[(SPIFFE, "unix://h/s")],
                Err(SocketError::NotUnixUri("unix://h/s".into())),
            ),
            ("relative", None, None, &[(SPIFFE, "unix:s")], Err(SocketError::NotUnixUri("unix:s".into()))),
            (
                "a query",
                None,
                None,
                &[(SPIFFE, "unix:///s?x")],
                Err(SocketError::NotUnixUri("unix:///s?x".into())),
            ),
        ];
        for (case, flag, instance, environment, want) in cases {
            let args = SocketArgs { socket_path: flag.map(Into::into), instance: instance.map(Into::into) };
            let got = args.resolve(|name| {
                environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
            });
            assert_eq!(got, want.map(|(path, chosen)| AgentSocket { path: path.into(), chosen }), "{case}");
        }
    }

    #[test]
    fn a_relative_flag_is_made_absolute() {
        let args = SocketArgs { socket_path: Some("api.sock".into()), instance: None };
        assert!(args.resolve(|_| None).unwrap().path.is_absolute());
    }
}
