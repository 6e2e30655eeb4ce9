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
mod audit;
mod bundle;
mod call_error;
mod client;
mod entry;
mod explain;
mod files;
mod healthcheck;
mod help;
mod jwt;
mod limits;
mod manual;
mod quickstart;
mod reference;
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

use crate::{
    agent,
    hcl::ConfigErrors,
    issuer::Expelled,
    os::{sentence::said, signals},
    telemetry::chain,
};
use terminal::{PrintError, Terminal};

/// Gives each process on this machine a certificate with its name (SPIFFE)
///
/// The agent gives a process its identity at a Unix socket (the SPIFFE Workload
/// API): a certificate (X.509-SVID) or a signed token (JWT-SVID) with a name such
/// as spiffe://example.org/web. Entries say which process gets which name.
#[derive(Parser, Debug)]
#[command(
    name = "durward",
    version,
    subcommand_required = true,
    arg_required_else_help = false,
    disable_help_subcommand = true,
    args_override_self = true,
    verbatim_doc_comment
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the agent
    Run(run::RunArgs),
    /// Set up an agent for this user, start it and fetch an identity
    Quickstart(quickstart::QuickstartArgs),
    /// Call the Workload API as a workload does
    #[command(subcommand)]
    Api(Api),
    /// Check whether the agent is serving
    Healthcheck(healthcheck::HealthArgs),
    /// Show the agent's state: who signs, what it holds, what is wrong
    Status(status::StatusArgs),
    /// Show which identities a process gets, and why it gets no others
    Explain(explain::ExplainArgs),
    /// Show who calls and who is refused most often
    ///
    /// USED counts calls that passed; at the stage "gate", connections. REFUSED
    /// counts only what a limit refused: a call that failed for another reason, such
    /// as no identity, is not in it. MOST/S is the most that came in one second. LEFT
    /// is how many tokens are left, and how many there are when none is used.
    #[command(verbatim_doc_comment)]
    Limits(limits::LimitsArgs),
    /// Show the entries: who gets which identity
    #[command(subcommand)]
    Entry(EntryCommand),
    /// Show trust bundles: the CA certificates to verify others with
    #[command(subcommand)]
    Bundle(BundleCommand),
    /// Search the audit log: who was given what
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Read the configuration again, and show what changed or is wrong
    Reload(reload::ReloadArgs),
    /// Check a configuration file without starting the agent
    Validate(validate::ValidateArgs),
    /// Print completions for a shell
    Completions(manual::CompletionsArgs),
    /// Print the manual, or write every page of it into a directory
    Man(manual::ManArgs),
    /// Print the version
    Version,
}

#[derive(Subcommand, Debug)]
enum EntryCommand {
    /// Show the entries in force
    Show(entry::EntryArgs),
}

#[derive(Subcommand, Debug)]
enum BundleCommand {
    /// Show the bundle of this trust domain or of a federated one
    Show(bundle::BundleArgs),
}

#[derive(Subcommand, Debug)]
enum AuditCommand {
    /// Show who held an identity in a span of time
    ///
    /// Reads the lines of the audit, from the agent's log or from a file of their
    /// own. Shows each process that was given an SVID that was valid in the span,
    /// even if it was given earlier. All times are UTC.
    #[command(verbatim_doc_comment)]
    Who(audit::AuditWhoArgs),
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
    /// Output format
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
    Call(#[from] call_error::CallError),
    #[error(transparent)]
    Answer(#[from] svid::AnswerError),
    #[error(transparent)]
    File(#[from] files::BatchError),
    #[error("SVID is not valid: {0}")]
    NotValid(String),
    #[error("unable to validate JWT SVID: {0}")]
    Validate(call_error::CallError),
    #[error(transparent)]
    Unhealthy(#[from] healthcheck::Unhealthy),
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    #[error("Durward configuration file is invalid:\n{0}")]
    Invalid(ConfigErrors),
    #[error(transparent)]
    Override(#[from] OverrideError),
    #[error(transparent)]
    Audit(#[from] audit::AuditReadError),
    #[error(transparent)]
    Reload(#[from] reload::ReloadError),
    #[error(transparent)]
    Quickstart(#[from] quickstart::QuickstartError),
    #[error(transparent)]
    Layout(#[from] quickstart::LayoutError),
    /// With all its causes: whoever starts an agent needs them.
    #[error("{}", chain(.0.as_ref()))]
    Agent(anyhow::Error),
    #[error("starting the runtime: {}", said(.0))]
    Runtime(io::Error),
    #[error("making the manual: {}", said(.0))]
    Man(io::Error),
    #[error(transparent)]
    Print(#[from] PrintError),
    /// The agent does not know yet what it was asked for, which is said already.
    #[error("")]
    NotKnown,
    /// Who held an identity may not all be known, which is said already.
    #[error("")]
    MayLack,
    /// All is said already; only the exit code is left.
    #[error("")]
    Said,
}

impl Failure {
    /// What a person can do about it, where that is known.
    fn advice(&self) -> Option<String> {
        match self {
            Self::Call(err) | Self::Validate(err) => {
                let quickstart = err.is_nobody_at_the_default().then(quickstart::way_to_it).flatten();
                let advice = err.advice().into_iter().chain(quickstart).collect::<Vec<_>>();
                (!advice.is_empty()).then(|| advice.join("\n"))
            }
            Self::Unhealthy(healthcheck::Unhealthy::Status(_)) => {
                Some("`durward status` tells its user and root why.".to_owned())
            }
            _ => None,
        }
    }

    /// As the help says (`help`). spire-agent's is 1 throughout: a script that asks for zero or not need not change.
    fn exit_code(&self) -> u8 {
        match self {
            // `| head` has read all it wanted.
            Self::Print(PrintError::Closed) => 0,
            Self::Call(err) | Self::Validate(err) if err.is_absent() => 4,
            Self::Call(err) if err.is_not_known() => 4,
            Self::Unhealthy(healthcheck::Unhealthy::Absent) | Self::NotKnown => 4,
            Self::Call(err) | Self::Validate(err) if err.code() == Code::PermissionDenied => 3,
            Self::Agent(err) if err.is::<Expelled>() => 5,
            Self::MayLack => 6,
            _ => 1,
        }
    }

    fn report(&self, terminal: &mut Terminal) {
        if matches!(self, Self::Said | Self::MayLack | Self::NotKnown | Self::Print(PrintError::Closed)) {
            return;
        }
        terminal.fault(self);
        if let Some(advice) = self.advice() {
            terminal.advise(&advice);
        }
    }
}

/// Runs the command that `args` (the program's name first) says, and gives the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    // As before `main`, for who calls this from a program of his own.
    signals::hold();
    let mut terminal = Terminal::new();
    let words = argv::normalise(args);
    let parsed = command()
        .try_get_matches_from(&words)
        .and_then(|matches| Cli::from_arg_matches(&matches))
        .map_err(|error| argv::with_tip(error, &words));
    let result = match parsed {
        Ok(cli) => dispatch(cli.command, &mut terminal),
        // --help and --version
        Err(err) if !err.use_stderr() => {
            terminal.print_help(&err.render().to_string()).map_err(Failure::from)
        }
        Err(err) => {
            let message = err.render().to_string();
            terminal.fault(message.trim_end());
            if words.get(1).is_some_and(|word| word == "run") {
                agent::not_started(message.lines().next().unwrap_or_default());
            }
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
    help::with_examples(Cli::command())
}

fn dispatch(command: Command, terminal: &mut Terminal) -> Result<(), Failure> {
    // Agents take them when they can; any other command ends by them.
    if !matches!(command, Command::Run(_) | Command::Quickstart(_)) {
        signals::release();
    }
    match command {
        Command::Run(args) => run::run(&args),
        Command::Quickstart(args) => quickstart::run(&args, terminal),
        Command::Audit(AuditCommand::Who(args)) => audit::who(&args, terminal),
        Command::Validate(args) => validate::validate(&args, terminal),
        Command::Completions(args) => manual::completions(&args, terminal),
        Command::Man(args) => manual::man(&args, terminal),
        Command::Healthcheck(args) => client_runtime()?.block_on(healthcheck::check(&args, terminal)),
        Command::Limits(args) => client_runtime()?.block_on(limits::limits(&args, terminal)),
        Command::Status(args) => client_runtime()?.block_on(status::status(&args, terminal)),
        Command::Reload(args) => client_runtime()?.block_on(reload::reload(&args, terminal)),
        Command::Explain(args) => client_runtime()?.block_on(explain::explain(&args, terminal)),
        Command::Entry(EntryCommand::Show(args)) => client_runtime()?.block_on(entry::show(&args, terminal)),
        Command::Bundle(BundleCommand::Show(args)) => {
            client_runtime()?.block_on(bundle::show(&args, terminal))
        }
        Command::Version => Ok(terminal.print(concat!("durward ", env!("CARGO_PKG_VERSION"), "\n"))?),
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
