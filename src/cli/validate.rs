//! `validate`: everything that is wrong with a configuration, without starting anything.

use serde_json::{Value, json};

use super::{Failure, OutputArgs, OutputFormat, run::ConfigArgs, terminal::Terminal};
use crate::hcl::{ConfigError, ConfigErrors};

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
    match (args.config.load(), args.output.output) {
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
