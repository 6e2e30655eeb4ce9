//! The `durward` command: parse the command line, call, exit code. Everything is in [`durward::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    durward::cli::main(std::env::args_os())
}
