//! `validate`: everything that is wrong with a configuration, without starting anything.

use std::{io, sync::Arc, time::Duration};

use nix::unistd::geteuid;
use serde_json::{Value, json};

use super::{
    Failure, OutputArgs, OutputFormat,
    run::ConfigArgs,
    terminal::{Terminal, clean},
};
use crate::{
    agent::{self, RoomError},
    attest::Attestor,
    config::{AgentUser, Config, Signer, TakenAddress},
    hcl::{ConfigError, ConfigErrors, KeyPlace},
    identity::EntryIndex,
    limits::beyond_budget::BeyondBudget,
    os::{
        sentence::said,
        trusted::{ClosedDir, Trust},
    },
    telemetry::log,
};

/// How long the node's databases of users and groups may take for all names.
const NAMES_WITHIN: Duration = Duration::from_secs(5);

/// More warnings than this are counted, not listed.
const MOST_WARNINGS: usize = 100;

/// `validate`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ValidateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `validate`.
pub(super) fn validate(args: &ValidateArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    match (check(&args.config, terminal), args.output.output) {
        (Ok((config, trust)), OutputFormat::Pretty) => {
            for Unsettled { at, key, value, why } in unsettled(&config, trust) {
                let value = value.map(|value| format!(" {value}")).unwrap_or_default();
                terminal.note(format_args!("Warning: {}{key}{value}: {why}.", place(at.as_ref())));
            }
            let absent = absent(&config);
            for AbsentSelector { at, entry, selector, why } in absent.iter().take(MOST_WARNINGS) {
                terminal.note(format_args!(
                    "Warning: {}entry \"{}\" asks for {}: {why}.",
                    place(at.as_ref()),
                    clean(entry),
                    clean(selector)
                ));
            }
            if absent.len() > MOST_WARNINGS {
                terminal.note(format_args!("and {} more", absent.len() - MOST_WARNINGS));
            }
            Ok(terminal.print("Durward configuration file is valid.\n")?)
        }
        (Ok((config, trust)), OutputFormat::Json) => {
            let absent = absent(&config).into_iter().map(|AbsentSelector { at, entry, selector, why }| {
                located(at.as_ref(), json!({ "entry": entry, "selector": selector, "message": why }))
            });
            let unsettled = unsettled(&config, trust).into_iter();
            let unsettled = unsettled.map(|Unsettled { at, key, value, why }| {
                located(at.as_ref(), json!({ "key": key, "value": value, "message": why }))
            });
            let warnings: Vec<_> = unsettled.chain(absent).collect();
            let mut answer = json!({ "valid": true, "errors": [] });
            if let Some(answer) = answer.as_object_mut().filter(|_| !warnings.is_empty()) {
                answer.insert("warnings".to_owned(), warnings.into());
            }
            Ok(terminal.print(&format!("{answer}\n"))?)
        }
        (Err(Failure::Config(errors)), OutputFormat::Json) => {
            terminal.print(&format!("{}\n", to_json(&errors)))?;
            Err(Failure::Said)
        }
        (Err(Failure::Config(errors)), OutputFormat::Pretty) => Err(Failure::Invalid(errors)),
        (Err(other), _) => Err(other),
    }
}

/// Notes what an admin should know, and looks at everything as the agent would that this configuration is for.
fn check(config: &ConfigArgs, terminal: &mut Terminal) -> Result<(Config, Trust), Failure> {
    let us = geteuid().as_raw();
    // Only to find out for whom it is.
    let AgentUser { uid: user, owns } = match config.read_of_anybody() {
        Ok(read) => {
            let found = read.agent_user();
            // Where data_dir is yet to be made, an ordinary user's own file is for an agent of that user: no other goes by it.
            let is_ours = us != 0 && config.owner() == Some(us) && found.owns != read.agent.data_dir;
            if is_ours { AgentUser { uid: us, ..found } } else { found }
        }
        Err(_) => {
            let owner = config.owner().filter(|owner| *owner != 0);
            AgentUser { uid: owner.unwrap_or(us), owns: config.path().to_owned() }
        }
    };
    if user != us {
        terminal
            .advise(&format!("Checked for an agent that runs as user {user}, who owns {}.", owns.display()));
    }
    let trust = Trust::of(user);
    let (read, closed) = config.check(trust)?;
    if let Err(RoomError::Beyond(errors)) = agent::room_for(&read) {
        return Err(Failure::Config(errors));
    }
    for ClosedDir { path, uid, mode, .. } in closed {
        let (path, socket) = (path.display(), read.agent.socket_path.display());
        let group = if mode & 0o010 == 0 { "" } else { " and its group" };
        terminal.note(format_args!(
            "{path} (mode {mode:04o}) lets only user {uid}{group} reach {socket}: chmod o+x {path} if others should."
        ));
    }
    Ok((read, trust))
}

/// What keeps no agent from starting, or not always.
struct Unsettled {
    /// Where the key is set, or its block.
    at: Option<KeyPlace>,
    key: &'static str,
    /// Where it says more than the place.
    value: Option<String>,
    /// Why it is worth a look.
    why: String,
}

/// Where something stands, before what is said of it; nothing where it is not set.
fn place(at: Option<&KeyPlace>) -> String {
    at.map(|at| format!("{at}: ")).unwrap_or_default()
}

/// The same for programs, in the words of errors.
fn located(at: Option<&KeyPlace>, mut warning: Value) -> Value {
    if let (Some(KeyPlace { file, line, column }), Some(warning)) = (at, warning.as_object_mut()) {
        warning.insert("file".to_owned(), file.to_string_lossy().into());
        warning.insert("line".to_owned(), (*line).into());
        warning.insert("column".to_owned(), (*column).into());
    }
    warning
}

fn unsettled(config: &Config, trust: Trust) -> Vec<Unsettled> {
    let taken = config.addresses().1.into_iter().map(|TakenAddress { key, host, port, cause }| {
        let why = match cause.kind() {
            io::ErrorKind::AddrInUse => "is not free now, perhaps because the agent runs",
            _ => "is not for this user to listen at; the agent's may",
        };
        (key, format!("{host} port {port} {why}: {}", said(&cause)))
    });
    let held = config.places_in_use(trust).into_iter().map(|(key, at)| {
        let or_systemd = if key == "agent.data_dir" { "" } else { " or by systemd, which holds its socket" };
        (key, format!("{} is in use now, perhaps by a running agent{or_systemd}", at.display()))
    });
    let alone = matches!(config.issuer, Signer::Embedded(_));
    let nobody = (alone && config.entries.is_empty())
        .then(|| ("entry", "there is none, so nobody is served".to_owned()));
    let more = "an agent that is started in another way may have more";
    let room = match agent::room_for(config) {
        Ok(beyond) => beyond
            .into_iter()
            .map(|BeyondBudget { key, value, why }| {
                (key, Some(value.to_string()), format!("{why}, as this command has it: {more}"))
            })
            .collect(),
        Err(error) => {
            vec![(
                "ratelimit",
                None,
                format!("{error}: started like this command, no agent would start; {more}"),
            )]
        }
    };
    let to_join = config.missing_to_join(trust).into_iter().map(|(key, error)| {
        (key, format!("{error}; the agent waits for it, unless it has joined its server before"))
    });
    let open_to_all = config.open_to_all(trust);
    let forgets = config.forgets_node().map(|why| ("plugins.KeyManager", why.to_owned()));
    let bound = config.cannot_begin_anew().map(|why| ("agent.rebootstrap_mode", why.to_owned()));
    let missing = config.attest.missing().into_iter().map(|why| ("plugins.WorkloadAttestor", why));
    let untrusted = config.federation_gaps.iter().enumerate().map(|(nth, why)| Unsettled {
        at: config.set_at.of_block("federation", nth),
        key: "federation",
        value: None,
        why: why.clone(),
    });
    let passed_over = config.passed_over_warnings().map(|why| ("agent.entries_dir", why));
    let audit = config.audit.socket.as_deref().filter(|_| config.audit.enabled);
    let unread =
        audit.and_then(|path| log::nobody_takes(path).map(|error| (path, error))).map(|(path, error)| {
            let why = format!(
                "nobody takes the lines of the audit at {}, and they are lost until somebody does: {}",
                path.display(),
                said(&error)
            );
            ("audit.socket_path", why)
        });
    let at = |(key, value, why)| Unsettled { at: config.set_at.of(key).cloned(), key, value, why };
    let of_key = |(key, why)| at((key, None, why));
    let blind = config.is_blind(trust).map(|(key, why)| (key, why.to_owned()));
    let first = taken.chain(held).chain(nobody).chain(unread).map(of_key);
    let then = to_join.chain(open_to_all).chain(forgets).chain(bound).chain(blind).chain(missing).map(of_key);
    first
        .chain(room.into_iter().map(at))
        .chain(then)
        .chain(untrusted)
        .chain(passed_over.map(of_key))
        .collect()
}

/// A selector that an entry asks for and that no process of this node can have.
struct AbsentSelector {
    at: Option<KeyPlace>,
    entry: String,
    selector: String,
    why: String,
}

/// The names that entries ask for and that nobody has here, or that the user database does not answer for. No mistake:
/// the file may be for another node, or the user may come yet.
fn absent(config: &Config) -> Vec<AbsentSelector> {
    let attestor = Attestor::new(config.attest.clone());
    let index = Arc::new(EntryIndex::new(config.entries.clone()));
    let _asked_until_then = attestor.prepare_for(&index);
    attestor.wait(NAMES_WITHIN);
    let questions = attestor.prepare_for(&index);
    let entries = index.entries().iter();
    let all = entries.flat_map(|entry| entry.selectors.iter().map(move |selector| (entry, selector)));
    all.filter_map(|(entry, selector)| {
        let why = questions.absent(selector)?;
        // Their number is that of their block.
        let at = usize::try_from(entry.created_at).ok();
        Some(AbsentSelector {
            at: at.and_then(|nth| config.set_at.of_block("entry", nth)),
            entry: entry.spiffe_id.to_string(),
            selector: selector.to_string(),
            why,
        })
    })
    .collect()
}

fn to_json(errors: &ConfigErrors) -> Value {
    let list: Vec<_> = errors
        .list()
        .iter()
        .map(|ConfigError { file, line, column, key, value, message }| {
            json!({
                "file": file.to_string_lossy(),
                "line": line,
                "column": column,
                "key": key,
                "value": value,
                "message": message,
            })
        })
        .collect();
    json!({ "valid": false, "errors": list })
}
