//! `validate`: everything that is wrong with a configuration, without starting anything.

use nix::unistd::geteuid;
use serde_json::{Value, json};

use super::{Failure, OutputArgs, OutputFormat, run::ConfigArgs, terminal::Terminal};
use crate::{
    hcl::{ConfigError, ConfigErrors},
    os::trusted::ClosedDir,
};

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
        (Ok(_), OutputFormat::Pretty) => Ok(terminal.print("Durward configuration file is valid.\n")?),
        (Ok(_), OutputFormat::Json) => {
            Ok(terminal.print(&format!("{}\n", json!({ "valid": true, "errors": [] })))?)
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
fn check(config: &ConfigArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let read = config.read()?;
    let user = read.agent_user();
    if user != geteuid().as_raw() {
        let data_dir = read.agent.data_dir.display();
        terminal.note(format_args!("Looked at as by an agent of user {user}, who owns {data_dir}."));
    }
    for ClosedDir { path, uid, mode } in config.places(&read, user)? {
        let (path, socket) = (path.display(), read.agent.socket_path.display());
        terminal.note(format_args!(
            "Only user {uid} and the group of {path} (mode {mode:04o}) can reach {socket}: chmod o+x {path} if others should."
        ));
    }
    Ok(())
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
