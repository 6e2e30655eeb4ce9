//! Shell completions and man pages, made of the same definition as the command line itself.

use std::{io, path::PathBuf};

use clap_complete::Shell;

use super::{
    Failure,
    files::{Batch, Readers},
    terminal::Terminal,
};

/// `completions`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// `man`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ManArgs {
    /// Write the page of every command into this directory; without it, the main page is printed
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Runs `completions`.
pub(super) fn completions(args: &CompletionsArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let mut out = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "durward", &mut out);
    Ok(terminal.print(&String::from_utf8_lossy(&out))?)
}

/// Runs `man`.
pub(super) fn man(args: &ManArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let mut command = super::command();
    command.build();
    match &args.dir {
        None => Ok(terminal.print(&String::from_utf8_lossy(&page(command).map_err(Failure::Man)?.1))?),
        Some(dir) => {
            let mut batch = Batch::open(dir)?;
            let mut all = Vec::new();
            pages(command, &mut all).map_err(Failure::Man)?;
            for (name, text) in &all {
                batch.stage(name, text, Readers::Everybody)?;
            }
            Ok(batch.commit()?)
        }
    }
}

fn pages(command: clap::Command, into: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        pages(sub.clone(), into)?;
    }
    into.push(page(command)?);
    Ok(())
}

fn page(command: clap::Command) -> io::Result<(String, Vec<u8>)> {
    // "durward api fetch" has its page as durward-api-fetch(1): clap builds these names.
    let man = clap_mangen::Man::new(command).manual("Durward");
    let mut text = Vec::new();
    man.render(&mut text)?;
    Ok((man.get_filename(), text))
}
