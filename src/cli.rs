//! The `durward` command: what a person types, and what they read.
//!
//! A client of the agent like any other (`api`, `healthcheck` speak to spire-agent as well), a checker of its
//! configuration, and the way to start it. Flags are taken in spire-agent's spelling and in ours (`argv`); output
//! for scripts is spire-agent's where the meaning is the same, so that scripts need not care which agent they meet.
//!
//! What comes from an agent is verified before it is shown (`svid`), and its words cannot drive a terminal
//! (`terminal`). A private key is printed in JSON alone and a token by `api fetch jwt` alone. Only this folder and
//! `os` read the environment. Absent on purpose: deciding anything the agent decides; there is no second rule here.

mod admin;
mod argv;
mod client;
mod explain;
mod files;
mod healthcheck;
mod jwt;
mod limits;
mod manual;
mod quickstart;
mod reload;
mod run;
mod socket;
mod status;
mod svid;
mod terminal;
mod text;
mod validate;
mod x509;

use std::{ffi::OsString, io, process::ExitCode};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use tonic::Code;

pub use run::{CliOverrides, OverrideError, ServerOverrides};

use crate::{hcl::ConfigErrors, issuer::Expelled, os::signals};
use terminal::{PrintError, Terminal};

/// Exit codes, in the help of every command.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  an error, a refused command line or an unhealthy agent
  3  api: the agent has no identity for this process (PermissionDenied)
  4  api, limits, explain, status, reload: no agent answers at the socket
  5  run: the SPIRE Server does not take this agent any more (banned, evicted): see its log for what to do there

Flags may also be spelled as spire-agent's: -socketPath PATH, -socketPath=PATH, --socketPath PATH.";

/// A per-node workload-identity agent: the SPIFFE Workload API on a Unix socket
#[derive(Parser, Debug)]
#[command(
    name = "durward",
    version,
    after_help = EXIT_CODES,
    subcommand_required = true,
    arg_required_else_help = false,
    disable_help_subcommand = true,
    args_override_self = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the agent
    Run(run::RunArgs),
    /// Set up an agent for this user, start it and fetch an identity from it
    Quickstart(quickstart::QuickstartArgs),
    /// Call the Workload API as a workload does
    #[command(subcommand)]
    Api(Api),
    /// Ask the agent whether it serves
    Healthcheck(healthcheck::HealthArgs),
    /// Show who calls most and is refused most, for the agent's owner
    Limits(limits::LimitsArgs),
    /// Show who a process is taken for and what it is given, for the agent's owner
    Explain(explain::ExplainArgs),
    /// Show who signs and what is waited for, for the agent's owner
    Status(status::StatusArgs),
    /// Have the agent read its configuration again, and tell what came of it, for the agent's owner
    Reload(reload::ReloadArgs),
    /// Check a configuration file without starting the agent
    Validate(validate::ValidateArgs),
    /// Print the completions of a shell
    Completions(manual::CompletionsArgs),
    /// Print the manual, or write the page of every command
    Man(manual::ManArgs),
}

#[derive(Subcommand, Debug)]
enum Api {
    /// Fetch identities: X.509-SVIDs unless told otherwise
    #[command(args_conflicts_with_subcommands = true)]
    Fetch {
        #[command(subcommand)]
        what: Option<Fetch>,
        #[command(flatten)]
        x509: x509::FetchX509Args,
    },
    /// Validate a token
    #[command(subcommand)]
    Validate(Validate),
    /// Print the X.509-SVIDs now and after every change
    Watch(x509::WatchArgs),
}

#[derive(Subcommand, Debug)]
enum Fetch {
    /// Fetch X.509-SVIDs
    X509(x509::FetchX509Args),
    /// Fetch JWT-SVIDs and print the tokens
    Jwt(jwt::FetchJwtArgs),
}

#[derive(Subcommand, Debug)]
enum Validate {
    /// Validate a JWT-SVID
    Jwt(jwt::ValidateJwtArgs),
}

/// `--output`.
#[derive(clap::Args, Clone, Copy, Debug)]
struct OutputArgs {
    /// For people or for programs
    #[arg(long, value_name = "FORMAT", default_value = "pretty")]
    output: OutputFormat,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum OutputFormat {
    Pretty,
    Json,
}

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0} must be specified")]
    Missing(&'static str),
    #[error(transparent)]
    Socket(#[from] socket::SocketError),
    #[error(transparent)]
    Call(#[from] client::CallError),
    #[error(transparent)]
    Answer(#[from] svid::AnswerError),
    #[error(transparent)]
    File(#[from] files::BatchError),
    #[error("SVID is not valid: {0}")]
    NotValid(String),
    #[error("unable to validate JWT SVID: {0}")]
    Validate(client::CallError),
    #[error(transparent)]
    Unhealthy(#[from] healthcheck::Unhealthy),
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    #[error("Durward configuration file is invalid:\n{0}")]
    Invalid(ConfigErrors),
    #[error(transparent)]
    Override(#[from] OverrideError),
    #[error(transparent)]
    Reload(#[from] reload::ReloadError),
    #[error(transparent)]
    Quickstart(#[from] quickstart::QuickstartError),
    #[error(transparent)]
    Layout(#[from] quickstart::LayoutError),
    /// With all its causes: whoever starts an agent needs them.
    #[error("{0:#}")]
    Agent(anyhow::Error),
    #[error("starting the runtime: {0}")]
    Runtime(io::Error),
    #[error("making the manual: {0}")]
    Man(io::Error),
    #[error(transparent)]
    Print(#[from] PrintError),
    /// All is said already; only the exit code is left.
    #[error("")]
    Said,
}

impl Failure {
    /// What a person can do about it, where that is known.
    fn advice(&self) -> Option<String> {
        match self {
            Self::Call(err) | Self::Validate(err) => err.advice(),
            _ => None,
        }
    }

    /// As [`EXIT_CODES`] says. spire-agent's is 1 throughout: a script that asks for zero or not need not change.
    fn exit_code(&self) -> u8 {
        match self {
            // `| head` has read all it wanted.
            Self::Print(PrintError::Closed) => 0,
            Self::Call(client::CallError::Connect { .. })
            | Self::Validate(client::CallError::Connect { .. }) => 4,
            Self::Call(err) | Self::Validate(err) if err.code() == Code::PermissionDenied => 3,
            Self::Agent(err) if err.is::<Expelled>() => 5,
            _ => 1,
        }
    }

    fn report(&self, terminal: &mut Terminal) {
        if matches!(self, Self::Said | Self::Print(PrintError::Closed)) {
            return;
        }
        terminal.fault(self);
        if let Some(advice) = self.advice() {
            terminal.note(advice);
        }
    }
}

/// Runs the command that `args` (the program's name first) says, and gives the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // First of all: an agent is sent them as soon as it has a PID.
    signals::hold();
    let mut terminal = Terminal::new();
    let parsed = command()
        .try_get_matches_from(argv::normalise(args))
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let result = match parsed {
        Ok(cli) => dispatch(cli.command, &mut terminal),
        // --help and --version
        Err(err) if !err.use_stderr() => terminal.print(&err.render().to_string()).map_err(Failure::from),
        Err(err) => {
            terminal.fault(err.render().to_string().trim_end());
            Err(Failure::Said)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report(&mut terminal);
            failure.exit_code().into()
        }
    }
}

/// The definition of the command line, for parsing, help, completions and man pages.
fn command() -> clap::Command {
    /// Every command's help tells the exit codes.
    fn with_exit_codes(command: clap::Command) -> clap::Command {
        let names: Vec<_> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
        names
            .into_iter()
            .fold(command, |command, name| command.mut_subcommand(name, with_exit_codes))
            .after_help(EXIT_CODES)
            .disable_help_subcommand(true)
    }
    with_exit_codes(Cli::command())
}

fn dispatch(command: Command, terminal: &mut Terminal) -> Result<(), Failure> {
    // Agents take them when they can; any other command ends by them.
    if !matches!(command, Command::Run(_) | Command::Quickstart(_)) {
        signals::release();
    }
    match command {
        Command::Run(args) => run::run(&args),
        Command::Quickstart(args) => quickstart::run(&args, terminal),
        Command::Validate(args) => validate::validate(&args, terminal),
        Command::Completions(args) => manual::completions(&args, terminal),
        Command::Man(args) => manual::man(&args, terminal),
        Command::Healthcheck(args) => client_runtime()?.block_on(healthcheck::check(&args, terminal)),
        Command::Limits(args) => client_runtime()?.block_on(limits::limits(&args, terminal)),
        Command::Status(args) => client_runtime()?.block_on(status::status(&args, terminal)),
        Command::Reload(args) => client_runtime()?.block_on(reload::reload(&args, terminal)),
        Command::Explain(args) => client_runtime()?.block_on(explain::explain(&args, terminal)),
        Command::Api(api) => client_runtime()?.block_on(async {
            match api {
                Api::Fetch { what: None, x509 } | Api::Fetch { what: Some(Fetch::X509(x509)), .. } => {
                    x509::fetch(&x509, terminal).await
                }
                Api::Fetch { what: Some(Fetch::Jwt(args)), .. } => jwt::fetch(&args, terminal).await,
                Api::Validate(Validate::Jwt(args)) => jwt::validate(&args, terminal).await,
                Api::Watch(args) => x509::watch(&args, terminal).await,
            }
        }),
    }
}

/// One thread is enough to make one call.
fn client_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::Runtime)
}

/// The environment, which only a command may read: the library takes arguments.
fn environment(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}
