//! Why an agent gave no answer, in the words of grpc-go, which people grep for; and what a person can do about it.

use std::{
    error::Error,
    fs, io,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
    time::Duration,
};

use nix::unistd::{Uid, getegid, geteuid, getppid};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{
    socket::{ADMIN_DEFAULT, AgentAddress, AgentSocket, Chosen, admin_beside},
    terminal::clean,
    text::{GoDuration, code_name, shell_word},
};
use crate::{api::standing::NOT_KNOWN, os::sentence::said, peer::socket::MAX_PATH_LEN};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nobody answers at the socket.
    #[error("{}", told(socket, Code::Unavailable, &unreached(socket, cause)))]
    Connect { socket: AgentSocket, cause: io::Error },
    /// Somebody took the connection, and ended it without an answer.
    #[error(
        "{}", told(socket, Code::Unavailable, &format!("the agent at {} closed the connection", socket.at))
    )]
    Closed { socket: AgentSocket, cause: Box<dyn Error + Send + Sync> },
    /// The agent answered with an error, or gave no answer in time.
    #[error("{}", told(socket, status.code(), &clean(status.message())))]
    Status {
        socket: AgentSocket,
        status: Box<Status>,
        /// The only identity that was asked for, if it was one.
        asked: Option<String>,
    },
}

impl CallError {
    /// What `status` says of a call to `socket`. What an agent sent has no source; what has one was made on this side, where
    /// the connection ended.
    pub(super) fn of(socket: &AgentSocket, status: Status) -> Self {
        let (socket, status) = (socket.clone(), Box::new(status));
        match status.code() {
            Code::Unknown | Code::Cancelled | Code::Unavailable if status.source().is_some() => {
                Self::Closed { socket, cause: status }
            }
            _ => Self::Status { socket, status, asked: None },
        }
    }

    /// The same of a call that asked for this SPIFFE ID alone, unless that is empty.
    pub(super) fn asking_for(mut self, spiffe_id: &str) -> Self {
        if let Self::Status { asked, .. } = &mut self {
            *asked = Some(spiffe_id.to_owned()).filter(|id| !id.is_empty());
        }
        self
    }

    /// Whether a limit blocks the caller, which no wait changes.
    pub(super) fn is_blocked(&self) -> bool {
        matches!(self, Self::Status { status, .. } if is_of_a_block(status))
    }

    pub(super) fn code(&self) -> Code {
        match self {
            Self::Connect { .. } | Self::Closed { .. } => Code::Unavailable,
            Self::Status { status, .. } => status.code(),
        }
    }

    /// Whether there is no agent at the socket.
    pub(super) fn is_absent(&self) -> bool {
        matches!(self, Self::Connect { cause, .. } if cause.kind() != io::ErrorKind::PermissionDenied)
    }

    /// Whether there is no agent at the socket that is asked when nobody says which.
    pub(super) fn is_nobody_at_the_default(&self) -> bool {
        let is_default =
            |socket: &AgentSocket| matches!(socket.chosen, Chosen::Default | Chosen::AdminDefault);
        self.is_absent() && matches!(self, Self::Connect { socket, .. } if is_default(socket))
    }

    /// Whether the agent has not heard from its server yet what it was asked for.
    pub(super) fn is_not_known(&self) -> bool {
        matches!(self, Self::Status { status, .. } if is_not_known(status))
    }

    /// Whether there was no connection.
    pub(super) fn is_unreached(&self) -> bool {
        matches!(self, Self::Connect { .. })
    }

    /// Whether the call was given up, on this side or the other.
    pub(super) fn is_cancelled(&self) -> bool {
        match self {
            Self::Connect { .. } => false,
            Self::Closed { .. } => true,
            Self::Status { status, .. } => status.code() == Code::Cancelled,
        }
    }

    /// When the agent says to come back, if it does.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Connect { .. } | Self::Closed { .. } => None,
            Self::Status { status, .. } => retry_delay(status),
        }
    }

    /// What a person can do about it, if that is known.
    pub(super) fn advice(&self) -> Option<String> {
        match self {
            Self::Connect { socket, cause } => Some(connect_advice(socket, cause)),
            Self::Closed { socket, .. } => Some(closed_advice(socket)),
            Self::Status { socket, status, asked } => status_advice(socket, status, asked.as_deref()),
        }
    }
}

/// In grpc-go's words where spire-agent has them too, which is not so at the admin socket.
fn told(socket: &AgentSocket, code: Code, text: &str) -> String {
    if socket.chosen.is_admin() && !text.is_empty() {
        text.to_owned()
    } else {
        format!("rpc error: code = {} desc = {text}", code_name(code))
    }
}

/// Why there is no connection.
pub(super) fn unreached(socket: &AgentSocket, cause: &io::Error) -> String {
    let (at, cause, kind) = (&socket.at, said(cause), cause.kind());
    match kind {
        io::ErrorKind::PermissionDenied => format!("cannot connect to {at}: {cause}"),
        _ => format!("no agent answers at {at}: {cause}"),
    }
}

fn owners_alone(socket: &AgentSocket) -> String {
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    format!(
        "The admin socket is only for root and the agent's own user:\n  {}",
        typed_by_root(words, socket, &asked_of(), &of_root())
    )
}

/// This command, whose words are these, as it is to be typed by an administrator: with what sudo would change, which is the
/// environment and the process that started it.
fn typed_by_root(mut words: Vec<String>, socket: &AgentSocket, shell: &str, program: &str) -> String {
    let has = |words: &[String], names: &[&str]| {
        words.iter().any(|word| {
            let name = word.trim_start_matches('-').split('=').next().unwrap_or_default();
            word.starts_with('-') && names.contains(&name)
        })
    };
    if words.first().is_some_and(|word| word == "explain") && !has(&words, &["pid"]) {
        words.extend(["--pid".to_owned(), shell.to_owned()]);
    }
    if let AgentAddress::Unix(path) = &socket.at
        && path != Path::new(ADMIN_DEFAULT)
        && !has(&words, &["socket-path", "socketPath"])
    {
        words.extend(["--socket-path".to_owned(), path.to_string_lossy().into_owned()]);
    }
    let words: Vec<String> = words.iter().map(|word| typed(word)).collect();
    clean(&as_root(&format!("{program} {}", words.join(" "))))
}

fn connect_advice(socket: &AgentSocket, cause: &io::Error) -> String {
    let chosen = match socket.at {
        AgentAddress::Unix(_) => format!("The path is {}.", socket.chosen),
        AgentAddress::Tcp(_) => return format!("The address is {}.\n{}", socket.chosen, tcp_advice(cause)),
    };
    if let Some(wrong) = no_socket(socket) {
        return format!("{chosen}\n{wrong}");
    }
    let also = match cause.kind() {
        io::ErrorKind::NotFound if socket.chosen.is_admin() => {
            "Is the agent running, with this admin_socket_path?"
        }
        io::ErrorKind::PermissionDenied if socket.chosen.is_admin() => &owners_alone(socket),
        io::ErrorKind::NotFound => "Is the agent running, with this socket_path?",
        io::ErrorKind::ConnectionRefused => "The agent that made this socket is gone: start it again.",
        io::ErrorKind::PermissionDenied => {
            "This user may not open it: see the modes of the socket and of what is above it."
        }
        io::ErrorKind::InvalidInput => {
            return format!("{chosen}\nThe path of a socket holds at most {MAX_PATH_LEN} bytes.");
        }
        io::ErrorKind::WouldBlock => "The agent's queue of new connections is full: it is busy, or hangs.",
        _ => "Is it the socket of an agent?",
    };
    format!("{chosen}\n{also}")
}

/// The same at an address, where no agent listens itself.
fn tcp_advice(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::ConnectionRefused => {
            "Nothing listens there: whatever passes it on to an agent's socket is not running."
        }
        _ => "An agent is reached there through a proxy: is it running, and may this host reach it?",
    }
}

/// What else stands at the path.
fn no_socket(socket: &AgentSocket) -> Option<String> {
    let AgentAddress::Unix(path) = &socket.at else { return None };
    let found = fs::metadata(path).ok()?;
    let what = if found.is_dir() {
        "a directory"
    } else if found.file_type().is_socket() {
        return None;
    } else {
        "a file"
    };
    Some(format!("{} is {what}, not a socket.", path.display()))
}

fn closed_advice(socket: &AgentSocket) -> String {
    if socket.is_not_ours() {
        owners_alone(socket)
    } else if socket.chosen.is_admin() {
        "All places of the admin socket were taken: try again, or wait longer with --timeout.".to_owned()
    } else {
        format!(
            "The agent has ended, or this caller is over a limit. Whom it refuses:\n{}",
            asking(socket, "limits")
        )
    }
}

fn status_advice(socket: &AgentSocket, status: &Status, asked: Option<&str>) -> Option<String> {
    let at = &socket.at;
    let retry = retry_delay(status).map(in_tenths);
    match status.code() {
        _ if is_of_a_block(status) => Some(format!(
            "The agent's configuration blocks this, and waiting does not help. Which limit it is:\n{}",
            asking(socket, &format!("explain --pid {}", asked_of())),
        )),
        Code::PermissionDenied if asked.is_some() => Some(format!(
            "No registration entry for {} matches this process (user ID {}, group ID {}).\n\
             One for another SPIFFE ID may: leave out --spiffe-id to see. Why:\n{}",
            clean(asked.unwrap_or_default()),
            geteuid(),
            getegid(),
            asking(socket, &format!("explain --pid {}", asked_of())),
        )),
        Code::PermissionDenied => Some(format!(
            "No registration entry matches this process (user ID {uid}, group ID {}).\n\
             An entry is needed whose selectors all fit, for example \"unix:uid:{uid}\".\n\
             Which entries nearly match:\n{}",
            getegid(),
            asking(socket, &format!("explain --pid {}", asked_of())),
            uid = geteuid(),
        )),
        Code::ResourceExhausted => Some(format!(
            "This caller is over its limit: try again {}. Which limit it is:\n{}",
            retry.map_or_else(|| "later".to_owned(), |delay| format!("in {delay}")),
            asking(socket, "limits"),
        )),
        Code::DeadlineExceeded => {
            Some(format!("The agent at {at} gave no answer in time; --timeout waits longer."))
        }
        Code::Unavailable if is_not_known(status) => None,
        Code::Unavailable => Some(match retry {
            Some(delay) if is_of_the_issuer(status) => {
                format!("The agent asks to try again in {delay}. Why:\n{}", asking(socket, "status"))
            }
            Some(delay) => format!(
                "The agent asks to try again in {delay}. What it is short of:\n{}",
                asking(socket, "limits")
            ),
            None if is_of_the_issuer(status) => {
                format!("Nobody could sign it for the agent. Why:\n{}", asking(socket, "status"))
            }
            None if is_of_the_end(status) => {
                format!("The agent at {at} is about to end or to restart: try again in a moment.")
            }
            None => format!(
                "The agent at {at} cannot answer now: look at its log, try again, or ask:\n{}",
                asking(socket, &format!("explain --pid {}", asked_of()))
            ),
        }),
        Code::Unimplemented if socket.chosen.is_admin() => {
            Some(format!("{at} does not serve this call: is it the agent's admin socket?"))
        }
        Code::Unimplemented => {
            Some(format!("Whatever listens at {at} does not serve this call: is it the agent?"))
        }
        _ => None,
    }
}

/// A word as a shell is to read it; [`SHELL`] as it is.
fn typed(word: &str) -> String {
    if word == SHELL { word.to_owned() } else { shell_word(word) }
}

/// A command for root, with sudo where there is one.
fn as_root(command: &str) -> String {
    let path = super::environment("PATH").unwrap_or_default();
    if has_sudo(&path) { format!("sudo {command}") } else { format!("{command}    # as root") }
}

/// Whether one of the directories of `path` has sudo.
pub(super) fn has_sudo(path: &std::ffi::OsStr) -> bool {
    std::env::split_paths(path).any(|dir| dir.join("sudo").is_file())
}

/// What an agent says where a limit blocks: a call of a caller or of a SPIFFE ID, and a connection.
const BLOCKED: &str = " is blocked";
const BLOCKED_AT_GATE: &str = "ratelimit.gate blocks this caller";

/// Whether nobody could be asked who signs: no limit refused the call.
fn is_of_the_issuer(status: &Status) -> bool {
    let message = status.message();
    ["could not fetch ", "the server has not yet said"].iter().any(|begin| message.starts_with(begin))
}

/// Whether a limit blocks the caller or its SPIFFE ID.
fn is_of_a_block(status: &Status) -> bool {
    let message = status.message();
    [BLOCKED, BLOCKED_AT_GATE].iter().any(|said| message.contains(said))
}

/// Whether it is an answer of the admin socket that nothing is known yet.
fn is_not_known(status: &Status) -> bool {
    status.code() == Code::Unavailable && status.message().starts_with(NOT_KNOWN)
}

/// Whether the agent is about to end.
fn is_of_the_end(status: &Status) -> bool {
    ["the agent is shutting down", "the agent ended the stream"]
        .iter()
        .any(|begin| status.message().starts_with(begin))
}

/// A wait as a person is told it, in tenths of a second.
pub(super) fn in_tenths(wait: Duration) -> GoDuration {
    let tenths = wait.as_micros().div_ceil(100_000);
    GoDuration(Duration::from_millis(u64::try_from(tenths).unwrap_or(u64::MAX).saturating_mul(100)))
}

/// What the agent says about when to come back (`google.rpc.RetryInfo`).
fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay.filter(|delay| !delay.is_zero())
}

/// The process that stands for this one, which is gone when somebody asks: the one that started it, where that is of the same
/// user.
fn asked_of() -> String {
    let shell = getppid();
    let same = fs::metadata(format!("/proc/{shell}")).is_ok_and(|it| it.uid() == geteuid().as_raw());
    if shell.as_raw() > 0 && same { shell.to_string() } else { SHELL.to_owned() }
}

/// The shell into which it is pasted.
const SHELL: &str = "$$";

/// Where sudo looks for a program, on every distribution.
const PATH_OF_ROOT: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// This program as root calls it: by its path, where sudo would not find it.
fn of_root() -> String {
    match std::env::current_exe() {
        Ok(file) if !file.parent().is_some_and(|dir| PATH_OF_ROOT.iter().any(|of| dir == Path::new(of))) => {
            shell_word(&file.to_string_lossy())
        }
        _ => "durward".to_owned(),
    }
}

/// The command that asks the admin socket of the agent at the public one of `socket`, on a line of its own, as it is to be
/// typed: for the agent's own user without sudo.
fn asking(socket: &AgentSocket, words: &str) -> String {
    let elsewhere = || format!("  durward {words}    # on the agent's node");
    let AgentAddress::Unix(public) = &socket.at else { return elsewhere() };
    let Some((admin, is_default)) = admin_beside(public) else { return format!("  durward {words}") };
    let owner = admin.parent().and_then(|dir| fs::metadata(dir).ok()).map(|dir| Uid::from_raw(dir.uid()));
    let is_ours = geteuid().is_root() || owner == Some(geteuid());
    let told = |rest: &str| {
        let command =
            if is_ours { format!("durward {rest}") } else { as_root(&format!("{} {rest}", of_root())) };
        clean(&format!("  {command}"))
    };
    match owner {
        // The directory of a socket that was mounted here, or an agent whose admin socket is elsewhere.
        None => elsewhere(),
        Some(_) if is_default => told(words),
        Some(_) => {
            let admin = shell_word(&admin.to_string_lossy());
            told(&format!("{words} --socket-path {admin}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_told_in_tenths() {
        for (wait, want) in [(10_987_654, "11s"), (1_234_567, "1.3s"), (60_000_000, "1m0s"), (7, "100ms")] {
            assert_eq!(in_tenths(Duration::from_micros(wait)).to_string(), want);
        }
    }

    #[test]
    fn a_command_for_root_is_whole() {
        for (words, path, want) in [
            ("status", ADMIN_DEFAULT, "sudo durward status"),
            ("status", "/x y/admin.sock", "sudo durward status --socket-path '/x y/admin.sock'"),
            ("explain", ADMIN_DEFAULT, "sudo durward explain --pid 7"),
            ("explain --pid=9", ADMIN_DEFAULT, "sudo durward explain --pid=9"),
            ("explain -socketPath /a --pid 9", "/a", "sudo durward explain -socketPath /a --pid 9"),
            ("limits --top 3", "/a", "sudo durward limits --top 3 --socket-path /a"),
        ] {
            let socket = AgentSocket { at: AgentAddress::Unix(path.into()), chosen: Chosen::AdminDefault };
            let words = words.split(' ').map(str::to_owned).collect();
            let told = typed_by_root(words, &socket, "7", "durward");
            let bare = want.strip_prefix("sudo ").unwrap();
            assert!(told == want || told == format!("{bare}    # as root"), "{told}");
        }
        assert_eq!([typed(SHELL), typed("a b")], ["$$", "'a b'"]);
    }

    /// Where nobody could sign, the agent can be asked why, whether or not it says when to come back.
    #[test]
    fn what_keeps_an_svid_from_being_signed_is_in_status() {
        let socket = AgentSocket { at: AgentAddress::Unix("/nowhere/api.sock".into()), chosen: Chosen::Own };
        for (text, command) in [
            ("could not fetch JWT-SVID: the server does not answer", "durward status"),
            ("the server has not yet said which entries there are", "durward status"),
            ("workload attestation failed", "durward explain --pid "),
        ] {
            let advice = status_advice(&socket, &Status::unavailable(text), None).unwrap();
            assert!(advice.contains(command), "{text}: {advice}");
        }
    }

    #[test]
    fn sudo_is_found_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        for is_there in [false, true] {
            if is_there {
                fs::write(dir.path().join("sudo"), "").unwrap();
            }
            assert_eq!(has_sudo(dir.path().as_os_str()), is_there);
        }
    }
}
