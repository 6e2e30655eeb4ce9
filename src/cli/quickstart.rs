//! `quickstart`: from nothing to an identity, for a person who sees Durward for the first time.
//!
//! Writes a configuration and an entry for the current user into a directory (`layout`), starts the agent in this
//! process, and then does what a workload does: calls the socket, verifies what comes back, and shows it. Absent on
//! purpose: anything that needs root, systemd or a network.

mod layout;

use std::{
    ffi::OsString,
    fmt::Write as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use futures_util::future::OptionFuture;
use jsonwebtoken::Algorithm;
use nix::unistd::geteuid;
use time::OffsetDateTime;
use tokio::{net::UnixStream, sync::mpsc};

use super::{
    Failure,
    client::Client,
    jwt::from_struct,
    run::wrong_places,
    socket::{AgentAddress, AgentSocket, Chosen},
    svid::X509Answer,
    terminal::{Terminal, clean},
    text::{GoDuration, go_time},
};
use crate::{
    agent::{self, Running, Signalled, Signals},
    api::proto::workload as pb,
    config::{Config, ExpandEnv},
    identity::TrustDomain,
    os::{clock::Clock, secrecy},
    telemetry::log::Log,
};
use layout::{Layout, NAME, SOCKET};

pub(super) use layout::LayoutError;

/// How long the agent, which is this process, may take to answer.
const LIMIT: Duration = Duration::from_secs(30);

/// `quickstart`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct QuickstartArgs {
    /// Where configuration, keys and socket go
    ///
    /// Made when missing; what is there is kept. Without it: /var/lib/durward-quickstart for root,
    /// else $XDG_STATE_HOME/durward-quickstart or ~/.local/state/durward-quickstart.
    #[arg(long, value_name = "DIR", verbatim_doc_comment)]
    dir: Option<PathBuf>,

    /// The trust domain of a new configuration [default: example.org]
    #[arg(long, value_name = "NAME", value_parser = TrustDomain::parse)]
    trust_domain: Option<TrustDomain>,

    /// End once the identities are shown, instead of serving until Ctrl-C
    #[arg(long)]
    exit_after_fetch: bool,
}

/// Why there is nothing to see.
#[derive(Debug, thiserror::Error)]
pub(super) enum QuickstartError {
    #[error("--trust-domain {asked} contradicts {}, where it is {configured}: change it there, or choose another --dir", path.display())]
    TrustDomain { asked: TrustDomain, configured: TrustDomain, path: PathBuf },
    #[error("an agent serves at {} already: end it, or choose another directory with --dir", .0.display())]
    Running(PathBuf),
    #[error("the agent issued no JWT-SVID")]
    NoToken,
}

/// Runs `quickstart`.
pub(super) fn run(args: &QuickstartArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    // Before there is a key to be seen.
    secrecy::keep().map_err(|error| Failure::Agent(error.into()))?;
    let dir = layout::dir(args.dir.as_deref())?;
    terminal.print(&format!("Setting up in {}\n", dir.display()))?;
    let layout = Layout::prepare(&dir, args.trust_domain.as_ref())?;
    for (path, fresh, what) in &layout.files {
        let done = if *fresh { "wrote" } else { "kept " };
        terminal.print(&format!("  {done} {path:<20} {what}\n"))?;
    }
    let config = Config::load(&layout.config, ExpandEnv::No)?;
    if let Some(asked) = args.trust_domain.clone().filter(|asked| *asked != config.trust_domain) {
        let (configured, path) = (config.trust_domain, layout.config);
        return Err(QuickstartError::TrustDomain { asked, configured, path }.into());
    }
    let wrong = config.places(geteuid().as_raw()).wrong;
    if !wrong.is_empty() {
        return Err(wrong_places(&layout.config, wrong).into());
    }
    let runtime = agent::runtime().map_err(Failure::Agent)?;
    let log = Log::start(&config.log, &config.audit).map_err(|error| Failure::Agent(error.into()))?;
    let result = runtime.block_on(serve(args, &layout, config, terminal));
    runtime.shutdown_timeout(Duration::from_millis(100));
    // What is not written by then is not worth waiting for.
    let _all_written = log.flush(Duration::from_secs(1));
    result
}

async fn serve(
    args: &QuickstartArgs,
    paths: &Layout,
    config: Config,
    terminal: &mut Terminal,
) -> Result<(), Failure> {
    let mut signals = Signals::new().map_err(Failure::Agent)?;
    if UnixStream::connect(&config.agent.socket_path).await.is_ok() {
        return Err(QuickstartError::Running(config.agent.socket_path).into());
    }
    let mut agent = Running::start(config, None, Clock::SYSTEM).map_err(Failure::Agent)?;
    let shown = tokio::select! {
        shown = show(agent.config(), terminal) => shown.map(|()| !args.exit_after_fetch),
        _ = signals.stop() => Ok(false),
    };
    let result = match shown {
        Ok(true) => attend(&mut agent, paths, &mut signals, terminal).await,
        Ok(false) => Ok(()),
        Err(failure) => Err(failure),
    };
    agent.shutdown().await;
    result
}

/// Goes on serving until a signal ends it. SIGHUP reloads, as the files that were written say.
async fn attend(
    agent: &mut Running,
    paths: &Layout,
    signals: &mut Signals,
    terminal: &mut Terminal,
) -> Result<(), Failure> {
    terminal.print("\nServing. Ctrl-C ends it; run again, and all of it is still there.\n")?;
    let mut asked = agent.reloads_asked();
    loop {
        let mut asking = None;
        let signal = tokio::select! {
            signal = signals.next() => signal,
            Some(Some(who)) = OptionFuture::from(asked.as_mut().map(mpsc::Receiver::recv)) => {
                asking = Some(who);
                Signalled::Reload
            }
            fault = agent.failed() => return Err(Failure::Agent(fault)),
        };
        match signal {
            Signalled::Stop(_) => {
                terminal.note("\nEnding.");
                return Ok(());
            }
            Signalled::Reload => {
                let loaded = Config::load(&paths.config, ExpandEnv::No).map_err(anyhow::Error::new);
                let told = agent.reload_and_tell(loaded);
                let said = match told.error.as_str() {
                    "" => "Read again.\n".to_owned(),
                    error => format!("Not read again, all stays as it was: {error}\n"),
                };
                let shown = terminal.print(&said);
                match asking {
                    // Who asked may be gone.
                    Some(who) => drop(who.send(told)),
                    // This fails, and this ends, when the signal said that the terminal is gone.
                    None => shown?,
                }
            }
            Signalled::ReopenLog | Signalled::Nothing => {}
        }
    }
}

/// Fetches, checks and shows what a workload of this user gets.
async fn show(config: &Config, terminal: &mut Terminal) -> Result<(), Failure> {
    let path = &config.agent.socket_path;
    terminal.print(&format!("  serve {SOCKET:<20} {}\n", path.display()))?;
    let socket = AgentSocket { at: AgentAddress::Unix(path.to_owned()), chosen: Chosen::Own };
    let client = Client::connect(&socket, Some(LIMIT)).await?;
    let now = Clock::SYSTEM.now();
    let answer = X509Answer::verify(client.fetch_x509_svid(terminal).await?, now)?;
    terminal.print(&x509_text(&answer, now))?;

    let audience = NAME.to_owned();
    let tokens = client.fetch_jwt_svid(terminal, std::slice::from_ref(&audience), "").await?;
    let token = tokens.svids.first().ok_or(QuickstartError::NoToken)?;
    let valid =
        client.validate_jwt_svid(terminal, &audience, &token.svid).await.map_err(Failure::Validate)?;
    terminal.print(&jwt_text(&token.svid, valid, now))?;
    Ok(terminal.print(&next_steps(path, config.agent.admin_socket_path.as_deref()))?)
}

fn x509_text(answer: &X509Answer, now: SystemTime) -> String {
    let mut out = String::new();
    for svid in &answer.svids {
        out.push_str("\nX.509-SVID, verified with the trust bundle that came with it\n");
        row(&mut out, "SPIFFE ID", svid.spiffe_id.as_str());
        row(&mut out, "Key type", &svid.leaf.key_type);
        row(&mut out, "Valid until", &until(svid.leaf.not_after, now));
        let chain = std::iter::once((&svid.leaf, "leaf"))
            .chain(svid.intermediates.iter().map(|cert| (cert, "intermediate")))
            .chain(svid.bundle.iter().map(|cert| (cert, "CA, in the bundle")));
        for (at, (cert, what)) in chain.enumerate() {
            let name = if at == 0 { "Chain" } else { "" };
            row(
                &mut out,
                name,
                &format!("{} ({what}, until {})", clean(&cert.subject), go_time(cert.not_after)),
            );
        }
    }
    out
}

fn jwt_text(token: &str, valid: pb::ValidateJwtsvidResponse, now: SystemTime) -> String {
    let mut out = format!("\nJWT-SVID for \"{NAME}\", validated by the agent (ValidateJWTSVID)\n");
    row(&mut out, "SPIFFE ID", &clean(&valid.spiffe_id));
    row(&mut out, "Key type", &token_key_type(token));
    let claims = valid.claims.map(from_struct).unwrap_or_default();
    let expiry = claims
        .get("exp")
        .and_then(serde_json::Value::as_i64)
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    if let Some(expiry) = expiry {
        row(&mut out, "Valid until", &until(expiry, now));
    }
    out
}

/// By the `alg` of the token's header (RFC 7515, section 4.1.1).
fn token_key_type(token: &str) -> String {
    match jsonwebtoken::decode_header(token).map(|header| header.alg) {
        Ok(Algorithm::ES256) => "ec-p256 (ES256)".to_owned(),
        Ok(Algorithm::ES384) => "ec-p384 (ES384)".to_owned(),
        Ok(Algorithm::RS256) => "rsa (RS256)".to_owned(),
        Ok(other) => format!("{other:?}"),
        Err(_) => "unknown".to_owned(),
    }
}

fn row(out: &mut String, name: &str, value: &str) {
    // Writing to a String does not fail.
    let _ = writeln!(out, "  {name:<12} {value}");
}

fn until(at: OffsetDateTime, now: SystemTime) -> String {
    let left = Duration::try_from(at - OffsetDateTime::from(now)).unwrap_or_default();
    format!("{} (in {})", go_time(at), GoDuration(Duration::from_secs(left.as_secs())))
}

/// Commands to paste into another terminal.
fn next_steps(socket: &Path, admin: Option<&Path>) -> String {
    let durward = shell_word(&program());
    let path = shell_word(&socket.to_string_lossy());
    let uri = shell_word(&format!("unix://{}", socket.display()));
    let admin = admin.map(|path| {
        let path = shell_word(&path.to_string_lossy());
        format!("{durward} limits --watch --socket-path {path}\n  {durward} explain --socket-path {path} --pid $$\n  ")
    });
    let admin = admin.unwrap_or_default();
    format!(
        "\nIn another terminal, as this user:\n  \
         {durward} api fetch x509 --socket-path {path}\n  \
         {durward} api fetch jwt --audience my-service --socket-path {path}\n  \
         {durward} api watch --socket-path {path}\n  \
         {admin}{durward} healthcheck --socket-path {path}\n\
         Any SPIFFE client finds the agent by\n  \
         export SPIFFE_ENDPOINT_SOCKET={uri}\n"
    )
}

/// What to type to run this program again: its name when the shell finds it, else where it lies.
fn program() -> String {
    let typed = std::env::args_os().next().unwrap_or_else(|| OsString::from("durward"));
    let path = if Path::new(&typed).components().count() > 1 {
        std::env::current_exe().map_or(typed, PathBuf::into_os_string)
    } else {
        typed
    };
    path.to_string_lossy().into_owned()
}

/// `text` as one word of a POSIX shell; too little for a crate (shlex).
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        for (text, want) in [
            ("/run/durward/api.sock", "/run/durward/api.sock"),
            ("/a b", "'/a b'"),
            ("/it's", r"'/it'\''s'"),
            ("$HOME", "'$HOME'"),
            ("", "''"),
        ] {
            assert_eq!(shell_word(text), want);
        }
    }
}
