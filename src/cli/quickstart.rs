//! `quickstart`: from nothing to an identity, for a person who sees Durward for the first time.
//!
//! Writes a configuration and an entry for the current user into a directory (`layout`), starts the agent in this
//! process, and then does what a workload does: calls the socket, verifies what comes back, and shows it. Absent on
//! purpose: anything that needs root, systemd or a network.

mod layout;

use std::{
    fmt::Write as _,
    fs,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use jsonwebtoken::Algorithm;
use nix::unistd::geteuid;
use time::OffsetDateTime;
use tokio::net::UnixStream;

use super::{
    Failure,
    admin::shorten,
    call_error::has_sudo,
    client::Client,
    environment,
    jwt::from_struct,
    reload,
    run::wrong_places,
    socket::{AgentAddress, AgentSocket, Chosen},
    svid::X509Answer,
    terminal::{Terminal, clean, width},
    text::{GoDuration, folded, go_time, shell_path},
};
use crate::{
    agent::{self, Happened, Running, Signalled, Signals, Upkeep},
    api::proto::workload as pb,
    config::{Config, ExpandEnv},
    identity::{Entry, TrustDomain},
    os::{clock::Clock, secrecy},
    telemetry::log::Log,
};
use layout::{ENV, Layout, NAME, NOBODY};

pub(super) use layout::LayoutError;

/// How long the agent, which is this process, may take to answer.
const LIMIT: Duration = Duration::from_secs(30);

/// The widest that a certificate's subject is shown, in characters.
const SUBJECT: usize = 42;

/// `quickstart`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct QuickstartArgs {
    /// Where configuration, keys and socket go
    ///
    /// Made if missing; files that are there are kept. By default it is
    /// /var/lib/durward-quickstart for root, else
    /// $XDG_STATE_HOME/durward-quickstart or
    /// ~/.local/state/durward-quickstart.
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
    #[error("an agent{} serves at {} already: end it, or choose another directory with --dir", of_process(*.1), .0.display())]
    Running(PathBuf, Option<i32>),
    #[error("the agent issued no JWT-SVID")]
    NoToken,
}

/// Whoever has bound a socket, where the kernel says it.
fn of_process(pid: Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

/// Runs `quickstart`.
pub(super) fn run(args: &QuickstartArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    // Before there is a key to be seen.
    secrecy::keep().map_err(|error| Failure::Agent(error.into()))?;
    let dir = layout::dir(args.dir.as_deref())?;
    terminal.print(&format!("Setting up in {}\n", dir.display()))?;
    let layout = Layout::prepare(&dir, args.trust_domain.as_ref())?;
    let result = start(args, &layout, terminal);
    layout.leave();
    result
}

fn start(args: &QuickstartArgs, layout: &Layout, terminal: &mut Terminal) -> Result<(), Failure> {
    for (path, fresh, what) in &layout.files {
        terminal.print(&file_text(path, *fresh, what))?;
    }
    let config = Config::load(&layout.config, ExpandEnv::No)?;
    if layout.files.iter().any(|(_, fresh, _)| !fresh) {
        terminal.print(&entries_text(&config.entries))?;
    }
    if let Some(asked) = args.trust_domain.clone().filter(|asked| *asked != config.trust_domain) {
        let (configured, path) = (config.trust_domain, layout.config.clone());
        return Err(QuickstartError::TrustDomain { asked, configured, path }.into());
    }
    let wrong = config.places(geteuid().as_raw()).wrong;
    if !wrong.is_empty() {
        return Err(wrong_places(&layout.config, &config.set_at, wrong).into());
    }
    let runtime = agent::runtime().map_err(Failure::Agent)?;
    let log = Log::start(&config.log, &config.audit).map_err(|error| Failure::Agent(error.into()))?;
    let result = runtime.block_on(serve(args, layout, config, &log, terminal));
    runtime.shutdown_timeout(Duration::from_millis(100));
    // What is not written by then is not worth waiting for.
    let _all_written = log.flush(Duration::from_secs(1));
    result
}

/// What became of a file.
fn file_text(path: &str, fresh: bool, what: &str) -> String {
    if fresh { format!("  wrote {path:<21} {what}\n") } else { format!("  kept  {path}\n") }
}

async fn serve(
    args: &QuickstartArgs,
    paths: &Layout,
    config: Config,
    log: &Log,
    terminal: &mut Terminal,
) -> Result<(), Failure> {
    let mut signals = Signals::new().map_err(Failure::Agent)?;
    if let Ok(there) = UnixStream::connect(&config.agent.socket_path).await {
        let process = there.peer_cred().ok().and_then(|by| by.pid()).filter(|pid| *pid > 0);
        return Err(QuickstartError::Running(config.agent.socket_path, process).into());
    }
    let agent = Running::start(config, None, Clock::SYSTEM).map_err(Failure::Agent)?.logging(log.clone());
    let path = paths.config.clone();
    let load = Box::new(move || Ok(Config::load(&path, ExpandEnv::No)?));
    let mut upkeep = Upkeep::of(agent, load).map_err(|error| Failure::Agent(error.into()))?;
    let env_is_new = paths.write_env(&program(), &upkeep.agent().config().agent.socket_path);
    let env_is_new = match env_is_new {
        Ok(is_new) => is_new,
        Err(error) => {
            upkeep.into_agent().shutdown().await;
            return Err(error.into());
        }
    };
    terminal.print(&file_text(ENV, env_is_new, "how another terminal finds the agent"))?;
    terminal.warn(&upkeep.agent().config().passed_over_warnings().collect::<Vec<_>>());
    terminal.warn(&upkeep.agent().unmatched_entries());
    let shown = tokio::select! {
        shown = show(args, upkeep.agent().config(), paths, terminal) => shown.map(|()| !args.exit_after_fetch),
        _ = signals.stop() => Ok(false),
    };
    let result = match shown {
        Ok(true) => attend(&mut upkeep, &mut signals, terminal).await,
        Ok(false) => Ok(()),
        Err(failure) => Err(failure),
    };
    tokio::select! {
        () = upkeep.into_agent().shutdown() => {}
        // Told twice.
        _ = signals.stop() => {}
    }
    result
}

/// Goes on serving until a signal ends it, or the terminal is gone. The files are read again when they change, and on SIGHUP.
async fn attend(upkeep: &mut Upkeep, signals: &mut Signals, terminal: &mut Terminal) -> Result<(), Failure> {
    terminal.print("\nServing. Ctrl-C ends it. Start it again, and everything is still there.\n")?;
    let mut hung_up = false;
    loop {
        let happened = tokio::select! {
            signal = signals.next() => match signal {
                Signalled::Stop(_) => {
                    terminal.note("\nEnding.");
                    return Ok(());
                }
                Signalled::Reload => {
                    hung_up = true;
                    upkeep.reload();
                    continue;
                }
                Signalled::ReopenLog | Signalled::Nothing => continue,
            },
            happened = upkeep.next() => happened,
        };
        let told = match happened {
            Happened::Reloaded(told) => told,
            Happened::Failed(fault) => return Err(Failure::Agent(fault)),
        };
        let text = if told.error.is_empty() {
            reload::describe(&told)
        } else {
            let mistakes = told.error.lines().flat_map(|line| folded(&clean(line), width()));
            let mistakes: String = mistakes.map(|line| line + "\n").collect();
            format!("Not reloaded, the old configuration stays in force:\n{mistakes}")
        };
        // SIGHUP came because the terminal was closed; without one, somebody else asked, and nobody has to read this.
        if terminal.print(&text).is_err() && hung_up {
            return Ok(());
        }
        terminal.warn(&told.warnings);
        hung_up = false;
    }
}

/// Fetches, checks and shows what a workload of this user gets, and one of another.
async fn show(
    args: &QuickstartArgs,
    config: &Config,
    layout: &Layout,
    terminal: &mut Terminal,
) -> Result<(), Failure> {
    let path = &config.agent.socket_path;
    terminal.print(&format!("  socket {}\n", path.display()))?;
    let socket = AgentSocket { at: AgentAddress::Unix(path.to_owned()), chosen: Chosen::Own };
    let client = Client::new(&socket, Some(LIMIT));
    let now = Clock::SYSTEM.now();
    let answer = X509Answer::verify(client.fetch_x509_svid(terminal).await?, now)?;
    terminal.print(&x509_text(&answer, now))?;

    let audience = NAME.to_owned();
    let tokens = client.fetch_jwt_svid(terminal, std::slice::from_ref(&audience), "").await?;
    let token = tokens.svids.first().ok_or(QuickstartError::NoToken)?;
    let valid =
        client.validate_jwt_svid(terminal, &audience, &token.svid).await.map_err(Failure::Validate)?;
    terminal.print(&jwt_text(&token.svid, valid, now))?;
    if knows_nobody(config) && geteuid().is_root() {
        let path = path.clone();
        let told = tokio::task::spawn_blocking(move || as_nobody(&path)).await;
        terminal.print(&told.unwrap_or_default())?;
    }
    let others_pass = config.places(geteuid().as_raw()).closed.is_empty();
    let before = if args.exit_after_fetch { START_AGAIN } else { "To go on, enter " };
    Ok(terminal.print(&format!("\n{before}{}", next_steps(layout, config, others_pass)))?)
}

/// What the commands need that are shown, where the agent is about to end.
const START_AGAIN: &str = "It ends now: start it again without --exit-after-fetch, and then enter\n";

/// How many entries of a configuration that was there are shown.
const MOST_ENTRIES: usize = 8;

/// Who is whom, as the files say that were there.
fn entries_text(entries: &[Arc<Entry>]) -> String {
    let mut out = String::new();
    for entry in entries.iter().take(MOST_ENTRIES) {
        let selectors: Vec<String> = entry.selectors.iter().map(|it| clean(&it.to_string())).collect();
        // Writing to a String does not fail.
        let _ = writeln!(out, "  entry {}", shorten(entry.spiffe_id.as_str(), ENTRY_WIDTH));
        let _ = writeln!(out, "        {}", shorten(&selectors.join(", "), ENTRY_WIDTH));
    }
    match entries.len().saturating_sub(MOST_ENTRIES) {
        0 => {}
        more => {
            let _ = writeln!(out, "  and {more} more: durward entry show");
        }
    }
    out
}

/// The width of what stands behind the names of rows.
const ENTRY_WIDTH: usize = 70;

/// Whether the account nobody has an entry.
fn knows_nobody(config: &Config) -> bool {
    let nobody = [format!("unix:uid:{NOBODY}"), "unix:user:nobody".to_owned()];
    config.entries.iter().any(|entry| {
        let selectors: Vec<String> = entry.selectors.iter().map(ToString::to_string).collect();
        matches!(&*selectors, [one] if nobody.contains(one))
    })
}

/// What the account `nobody` is given: this program, run by it, asks as any other would.
fn as_nobody(socket: &Path) -> String {
    let mut command = Command::new("/proc/self/exe");
    command.args(["api", "fetch", "x509", "--timeout", "5s", "--socket-path"]).arg(socket);
    let got = command.env_clear().current_dir("/").uid(NOBODY).gid(NOBODY).stdin(Stdio::null()).output();
    let mut out = "\nAnother account, another identity: X.509-SVID of \"nobody\"\n".to_owned();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match got {
        Ok(got) if got.status.success() => {
            let said = text(&got.stdout);
            for id in said.lines().filter_map(|line| line.strip_prefix("SPIFFE ID:")) {
                row(&mut out, "SPIFFE ID", &clean(id.trim()));
            }
        }
        Ok(got) => row(&mut out, "Not fetched", &clean(text(&got.stderr).lines().next().unwrap_or_default())),
        Err(error) => row(&mut out, "Not asked", &error.to_string()),
    }
    out
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
            row(&mut out, name, &format!("{} ({what})", shorten(&clean(&cert.subject), SUBJECT)));
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
fn next_steps(layout: &Layout, config: &Config, others_pass: bool) -> String {
    let home = environment("HOME").map(PathBuf::from);
    let typed = |path: &Path| shell_path(path, home.as_deref());
    let mut out = format!(
        "in another terminal:\n  \
         . {}\n\
         and then, for example:\n  \
         durward api fetch x509           # your certificate\n  \
         durward api fetch jwt --audience my-service\n  \
         durward explain                  # who this shell is taken for, and why\n  \
         durward status                   # how the agent is\n  \
         durward limits --watch           # who calls; q ends it\n  \
         durward api watch                # each update as it comes\n",
        typed(&layout.dir.join(ENV))
    );
    if knows_nobody(config) && geteuid().as_raw() != NOBODY {
        let by = Administrator::of(geteuid().is_root(), environment("PATH").unwrap_or_default());
        out.push_str(&as_another_account(others_pass, by, &layout.dir.join(ENV)));
    }
    let entry = typed(&layout.entries.join("web.conf"));
    let trust_domain = config.trust_domain.name();
    let between = if trust_domain.len() > "example.org".len() { "\n    " } else { " " };
    // Writing to a String does not fail.
    let _ = write!(
        out,
        "\nTo give one more account an identity, write an entry. It is in force within\n\
         seconds, also for programs that are connected:\n  \
         echo 'entry \"spiffe://{trust_domain}/web\" {{{between}selectors = [\"unix:user:daemon\"] }}' \\\n      >{entry}\n",
    );
    out
}

/// How somebody becomes another account.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Administrator {
    Root,
    /// A user who has sudo.
    Sudo,
    /// A user of a machine without it.
    Elsewhere,
}

impl Administrator {
    fn of(is_root: bool, path: std::ffi::OsString) -> Self {
        match is_root {
            true => Self::Root,
            false if has_sudo(&path) => Self::Sudo,
            false => Self::Elsewhere,
        }
    }
}

/// How another account asks, which may have to be given the program first. Root's shell has another home, and has not read `env`.
fn as_another_account(others_pass: bool, by: Administrator, env: &Path) -> String {
    const PROGRAM: &str = "\"$(command -v durward)\"";
    if !others_pass {
        return "Other accounts cannot reach this socket: the directories above it are closed to\n\
                them. To try it with another account, use a directory that is open to all:\n  \
                durward quickstart --dir /tmp/durward-$USER\n"
            .to_owned();
    }
    let mut out = match by {
        Administrator::Root | Administrator::Sudo => {
            "or, as another account, which gets another identity:\n".to_owned()
        }
        Administrator::Elsewhere => format!(
            "or, in a root shell, as another account, which gets another identity:\n  . {}\n",
            shell_path(env, None)
        ),
    };
    let sudo = if by == Administrator::Sudo { "sudo " } else { "" };
    let file = std::env::current_exe().unwrap_or_else(|_unknown| program());
    let name = if others_may_run(&file) {
        PROGRAM
    } else {
        // Writing to a String does not fail.
        let _ = writeln!(out, "  {sudo}install {PROGRAM} /usr/bin/");
        "/usr/bin/durward"
    };
    let run = if by == Administrator::Sudo { "sudo -u nobody" } else { "runuser -u nobody --" };
    // Writing to a String does not fail.
    let _ =
        write!(out, "  {run} {name} \\\n      api fetch x509 --socket-path \"$SPIFFE_ENDPOINT_SOCKET\"\n");
    out
}

/// Whether every account may run the program that is there.
fn others_may_run(program: &Path) -> bool {
    program.ancestors().all(|path| fs::metadata(path).is_ok_and(|found| found.mode() & 0o001 != 0))
}

/// This program: a name that the shell of any user finds, or where it lies.
fn program() -> PathBuf {
    const OF_ALL_SHELLS: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/bin"];
    let name = PathBuf::from("durward");
    let is_known = |file: &Path| OF_ALL_SHELLS.iter().any(|dir| file == Path::new(dir).join(&name));
    std::env::current_exe().ok().filter(|file| !is_known(file)).unwrap_or(name)
}

/// How a shell finds the agent of a quickstart without `--dir`, if there was one.
pub(super) fn way_to_it() -> Option<String> {
    let env = layout::dir(None).ok()?.join(ENV);
    let home = environment("HOME").map(PathBuf::from);
    let told = || format!(". {}", shell_path(&env, home.as_deref()));
    env.is_file()
        .then(|| format!("A shell finds the agent of `durward quickstart` after this:\n  {}", told()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sudo_is_named_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("sudo"), "").unwrap();
        for (is_root, path, said, not_said) in [
            (true, dir.path(), "runuser -u nobody", "sudo"),
            (false, dir.path(), "sudo -u nobody", "  . "),
            (false, Path::new("/nowhere"), "in a root shell, as", "sudo"),
            (false, Path::new("/nowhere"), "  . '/home/a user/env'\n", "sudo"),
        ] {
            let by = Administrator::of(is_root, path.into());
            let text = as_another_account(true, by, Path::new("/home/a user/env"));
            assert!(text.contains(said) && !text.contains(not_said), "{text}");
            assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        }
    }
}
