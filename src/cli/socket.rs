//! Which socket a command talks to, and who said so.
//!
//! spire-agent's order (`cmd/spire-agent/cli/common/template.go`), then the standard's variable: `--socket-path`;
//! `--instance` put into `SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE`; `SPIRE_AGENT_PUBLIC_SOCKET`; `SPIFFE_ENDPOINT_SOCKET`;
//! our default. Nothing is guessed from what happens to exist: the first that is set is taken, and an error says
//! which one it was.

use std::{
    ffi::{OsStr, OsString},
    fmt, fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::geteuid;

use crate::config::{DEFAULT_SOCKET_PATH as DEFAULT, admin_socket_for};

/// The admin socket of an agent with the default `socket_path`.
pub(super) const ADMIN_DEFAULT: &str = "/run/durward/private/admin.sock";
const ADMIN: &str = "DURWARD_ADMIN_SOCKET";

const TEMPLATE: &str = "SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE";
const SPIRE: &str = "SPIRE_AGENT_PUBLIC_SOCKET";
const SPIFFE: &str = "SPIFFE_ENDPOINT_SOCKET";

/// Options of every command that talks to the agent.
#[derive(clap::Args, Clone, Debug, Default)]
pub(super) struct SocketArgs {
    /// Path of the Workload API socket, or unix:///path, or tcp://IP:port
    ///
    /// Without it, the first of these that is set: --instance, the
    /// environment variables SPIRE_AGENT_PUBLIC_SOCKET (a path) and
    /// SPIFFE_ENDPOINT_SOCKET (unix:///path or tcp://IP:port), then
    /// /run/durward/public/api.sock.
    #[arg(long, value_name = "PATH", verbatim_doc_comment)]
    pub(super) socket_path: Option<PathBuf>,

    /// Name that stands for %i in SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE
    #[arg(long, value_name = "NAME")]
    pub(super) instance: Option<OsString>,
}

/// Where an agent is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AgentAddress {
    /// A path, absolute unless the working directory is gone.
    Unix(PathBuf),
    /// A port of a proxy's, say: no agent listens there itself.
    Tcp(SocketAddr),
}

impl AgentAddress {
    /// What a person or a program wrote: a path, or an address as the SPIFFE Workload Endpoint standard has it.
    ///
    /// # Errors
    /// It begins as such an address and is none.
    pub(super) fn parse(text: &OsStr) -> Result<Self, SocketError> {
        if has_scheme(text) { Self::parse_uri(text) } else { Ok(Self::at(Path::new(text))) }
    }

    /// The same, where a path alone is not taken.
    fn parse_uri(text: &OsStr) -> Result<Self, SocketError> {
        let path = unix_path(text).map(|path| Self::at(&path));
        path.or_else(|| tcp_address(text).map(Self::Tcp)).ok_or_else(|| SocketError::NotUri(text.to_owned()))
    }

    fn at(path: &Path) -> Self {
        Self::Unix(std::path::absolute(path).unwrap_or_else(|_err| path.to_owned()))
    }
}

/// Whether this is an address of some kind, and not a path that a person would write.
pub(super) fn has_scheme(text: &OsStr) -> bool {
    let Some((scheme, rest)) = text.to_str().and_then(|text| text.split_once(':')) else { return false };
    let is_scheme = !scheme.is_empty()
        && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte));
    let is_known = ["unix", "unix-abstract", "tcp"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    is_scheme && (is_known || rest.starts_with("//"))
}

impl fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// A socket and where its address came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentSocket {
    pub(super) at: AgentAddress,
    pub(super) chosen: Chosen,
}

impl AgentSocket {
    /// Whether it is an admin socket that belongs to another user than this one, who is not root.
    pub(super) fn is_not_ours(&self) -> bool {
        let AgentAddress::Unix(path) = &self.at else { return false };
        let owner = || fs::symlink_metadata(path).is_ok_and(|socket| socket.uid() == geteuid().as_raw());
        self.chosen.is_admin() && !geteuid().is_root() && !owner()
    }
}

/// The admin socket beside the public one at `public`, and whether it is the one that a command takes by itself.
pub(super) fn admin_beside(public: &Path) -> Option<(PathBuf, bool)> {
    let admin = admin_socket_for(public)?;
    let is_default = admin == Path::new(ADMIN_DEFAULT);
    Some((admin, is_default))
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
    /// The same, from the environment.
    AdminEnvironment,
    /// The admin socket that belongs to the public one of this variable.
    AdminBeside(&'static str),
    /// The admin socket, where it is when nobody says otherwise.
    AdminDefault,
}

impl Chosen {
    /// Whether it is an admin socket.
    pub(super) fn is_admin(self) -> bool {
        matches!(self, Self::AdminFlag | Self::AdminEnvironment | Self::AdminBeside(_) | Self::AdminDefault)
    }
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag | Self::AdminFlag => f.write_str("given as --socket-path"),
            Self::Instance => write!(f, "made of --instance and {TEMPLATE}"),
            Self::Spire => write!(f, "taken from the environment variable {SPIRE}"),
            Self::Spiffe => write!(f, "taken from the environment variable {SPIFFE}"),
            Self::AdminEnvironment => write!(f, "taken from the environment variable {ADMIN}"),
            Self::AdminBeside(variable) => {
                write!(
                    f,
                    "that of the admin socket which belongs to the public socket in the environment variable {variable}"
                )
            }
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
        "the address of an agent must be unix:// with an absolute path, such as unix://{DEFAULT}, or tcp:// with an IP address \
         and a port, such as tcp://127.0.0.1:8081; got {0:?}"
    )]
    NotUri(OsString),
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
        let (at, chosen) = if let Some(path) = &self.socket_path {
            (AgentAddress::parse(path.as_os_str())?, Chosen::Flag)
        } else if let Some(path) = from_instance {
            (AgentAddress::parse(&path)?, Chosen::Instance)
        } else if let Some(path) = set(SPIRE) {
            (AgentAddress::parse(&path)?, Chosen::Spire)
        } else if let Some(uri) = set(SPIFFE) {
            (AgentAddress::parse_uri(&uri)?, Chosen::Spiffe)
        } else {
            (AgentAddress::at(Path::new(DEFAULT)), Chosen::Default)
        };
        Ok(AgentSocket { at, chosen })
    }
}

/// Chooses the admin socket: the flag; `DURWARD_ADMIN_SOCKET`; the one that belongs to the public socket of
/// `SPIRE_AGENT_PUBLIC_SOCKET` or `SPIFFE_ENDPOINT_SOCKET`; the default.
pub(super) fn resolve_admin(
    flag: Option<&Path>,
    environment: impl Fn(&str) -> Option<OsString>,
) -> Result<AgentSocket, SocketError> {
    let set = |name: &str| environment(name).filter(|value| !value.is_empty());
    let public = || match (set(SPIRE), set(SPIFFE)) {
        (Some(path), _) => AgentAddress::parse(&path).map(|at| Some((at, SPIRE))),
        (None, Some(uri)) => AgentAddress::parse_uri(&uri).map(|at| Some((at, SPIFFE))),
        (None, None) => Ok(None),
    };
    let (at, chosen) = if let Some(path) = flag {
        (AgentAddress::parse(path.as_os_str())?, Chosen::AdminFlag)
    } else if let Some(path) = set(ADMIN) {
        (AgentAddress::parse(&path)?, Chosen::AdminEnvironment)
    } else if let Some((AgentAddress::Unix(public), name)) = public()?
        && let Some(admin) = admin_socket_for(&public)
    {
        (AgentAddress::Unix(admin), Chosen::AdminBeside(name))
    } else {
        (AgentAddress::at(Path::new(ADMIN_DEFAULT)), Chosen::AdminDefault)
    };
    Ok(AgentSocket { at, chosen })
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

/// The address of `tcp://IP:port`: no name, no path, no query, no fragment, as go-spiffe takes it.
fn tcp_address(uri: &OsStr) -> Option<SocketAddr> {
    let address: SocketAddr = uri.to_str()?.strip_prefix("tcp://")?.parse().ok()?;
    let scoped = matches!(address, SocketAddr::V6(address) if address.scope_id() != 0);
    (address.port() != 0 && !scoped && address.ip() != IpAddr::from([0, 0, 0, 0])).then_some(address)
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
        let cases: [Case<'_>; 28] = [
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
            ("a path", None, None, &[(SPIFFE, "/s")], Err(SocketError::NotUri("/s".into()))),
            ("tcp", None, None, &[(SPIFFE, "tcp://1.2.3.4:5")], Ok(("tcp://1.2.3.4:5", Chosen::Spiffe))),
            ("tcp, six", None, None, &[(SPIFFE, "tcp://[::1]:5")], Ok(("tcp://[::1]:5", Chosen::Spiffe))),
            (
                "tcp, a name",
                None,
                None,
                &[(SPIFFE, "tcp://localhost:5")],
                Err(SocketError::NotUri("tcp://localhost:5".into())),
            ),
            (
                "tcp, no port",
                None,
                None,
                &[(SPIFFE, "tcp://1.2.3.4")],
                Err(SocketError::NotUri("tcp://1.2.3.4".into())),
            ),
            (
                "tcp, a path",
                None,
                None,
                &[(SPIFFE, "tcp://1.2.3.4:5/x")],
                Err(SocketError::NotUri("tcp://1.2.3.4:5/x".into())),
            ),
            ("a flag with an address", Some("unix:///f"), None, &all, Ok(("/f", Chosen::Flag))),
            ("of the other kind", Some("tcp://1.2.3.4:5"), None, &all, Ok(("tcp://1.2.3.4:5", Chosen::Flag))),
            ("a bad one", Some("unix://f"), None, &all, Err(SocketError::NotUri("unix://f".into()))),
            ("spire's with an address", None, None, &[(SPIRE, "unix:///s")], Ok(("/s", Chosen::Spire))),
            ("capitals", Some("UNIX:///f"), None, &all, Err(SocketError::NotUri("UNIX:///f".into()))),
            ("a file", Some("file:///f"), None, &all, Err(SocketError::NotUri("file:///f".into()))),
            ("http", Some("http://h/f"), None, &all, Err(SocketError::NotUri("http://h/f".into()))),
            (
                "no path",
                Some("unix-abstract:f"),
                None,
                &all,
                Err(SocketError::NotUri("unix-abstract:f".into())),
            ),
            ("a host", None, None, &[(SPIFFE, "unix://h/s")], Err(SocketError::NotUri("unix://h/s".into()))),
            ("relative", None, None, &[(SPIFFE, "unix:s")], Err(SocketError::NotUri("unix:s".into()))),
            (
                "a query",
                None,
                None,
                &[(SPIFFE, "unix:///s?x")],
                Err(SocketError::NotUri("unix:///s?x".into())),
            ),
        ];
        for (case, flag, instance, environment, want) in cases {
            let args = SocketArgs { socket_path: flag.map(Into::into), instance: instance.map(Into::into) };
            let got = args.resolve(|name| {
                environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
            });
            let got = got.map(|socket| (socket.at.to_string(), socket.chosen));
            assert_eq!(got, want.map(|(at, chosen)| (at.to_owned(), chosen)), "{case}");
        }
    }

    #[test]
    fn the_admin_socket_is_said_or_beside_the_public_one() {
        type Want<'a> = Result<(&'a str, Chosen), SocketError>;
        type Case<'a> = (&'a str, Option<&'a str>, &'a [(&'a str, &'a str)], Want<'a>);
        let spiffe = (SPIFFE, "unix:///a/public/api.sock");
        let beside = |name| Ok(("/a/private/admin.sock", Chosen::AdminBeside(name)));
        let default = || Ok((ADMIN_DEFAULT, Chosen::AdminDefault));
        let cases: [Case<'_>; 11] = [
            ("nothing", None, &[], default()),
            ("flag wins", Some("/f"), &[(ADMIN, "/e")], Ok(("/f", Chosen::AdminFlag))),
            ("environment", None, &[(ADMIN, "/e"), spiffe], Ok(("/e", Chosen::AdminEnvironment))),
            ("beside", None, &[spiffe], beside(SPIFFE)),
            ("beside spire's", None, &[(SPIRE, "/a/public/api.sock"), spiffe], beside(SPIRE)),
            ("where many share", None, &[(SPIFFE, "unix:///tmp/a.sock")], default()),
            ("no path", None, &[(SPIFFE, "tcp://1.2.3.4:5")], default()),
            ("a path", None, &[(SPIFFE, "/a/b/s")], Err(SocketError::NotUri("/a/b/s".into()))),
            ("relative", None, &[(SPIFFE, "unix:s")], Err(SocketError::NotUri("unix:s".into()))),
            ("not asked for", Some("/f"), &[(SPIFFE, "/a/b/s")], Ok(("/f", Chosen::AdminFlag))),
            ("spire's is taken first", None, &[(SPIRE, "/a/public/api.sock"), (SPIFFE, "/s")], beside(SPIRE)),
        ];
        for (case, flag, environment, want) in cases {
            let got = resolve_admin(flag.map(Path::new), |name| {
                environment.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
            });
            let got = got.map(|socket| (socket.at.to_string(), socket.chosen));
            assert_eq!(got, want.map(|(at, chosen)| (at.to_owned(), chosen)), "{case}");
        }
        assert_eq!(admin_socket_for(Path::new(DEFAULT)), Some(PathBuf::from(ADMIN_DEFAULT)));
    }

    #[test]
    fn a_relative_flag_is_made_absolute() {
        let args = SocketArgs { socket_path: Some("api.sock".into()), instance: None };
        let AgentAddress::Unix(path) = args.resolve(|_| None).unwrap().at else { panic!("it is a path") };
        assert!(path.is_absolute());
    }
}
