//! Shell completions and man pages, made of the same definition as the command line itself.

use std::{fmt::Write as _, io, path::PathBuf};

use clap_complete::Shell;

use super::{
    Failure,
    files::{Batch, Readers},
    reference::{self, escaped},
    terminal::Terminal,
};

/// `completions`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct CompletionsArgs {
    /// The shell: bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL", hide_possible_values = true, value_parser = shell)]
    shell: Shell,
}

/// Names those that there are: another name is that of a shell too, and not a mistake for one of these.
fn shell(name: &str) -> Result<Shell, String> {
    name.parse()
        .map_err(|_unknown| "there are completions of bash, elvish, fish, powershell and zsh".to_owned())
}

/// `man`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ManArgs {
    /// Write all pages into this directory, instead of printing the first
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Runs `completions`.
pub(super) fn completions(args: &CompletionsArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    Ok(terminal.print(&script(args.shell))?)
}

fn script(shell: Shell) -> String {
    let mut out = Vec::new();
    let mut command = super::command();
    clap_complete::generate(shell, &mut command, "durward", &mut out);
    let mut script = String::from_utf8_lossy(&out).into_owned();
    if shell == Shell::Fish {
        // clap_complete's fish goes two commands deep; `api fetch jwt` is three.
        for first in command.get_subcommands() {
            for second in first.get_subcommands() {
                for third in second.get_subcommands() {
                    fish_flags(&mut script, [first, second, third]);
                }
            }
        }
    }
    script
}

fn fish_flags(script: &mut String, path: [&clap::Command; 3]) {
    let [first, second, third] = path.map(clap::Command::get_name);
    for arg in path.into_iter().last().into_iter().flat_map(clap::Command::get_arguments) {
        let Some(long) = arg.get_long() else { continue };
        let about = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let about = about.replace('\\', r"\\").replace('\'', r"\'");
        let value = if arg.get_action().takes_values() { " -r" } else { "" };
        // Writing to a String does not fail.
        let _ = writeln!(
            script,
            "complete -c durward -n \"__fish_durward_using_subcommand {first}; and __fish_seen_subcommand_from \
             {second}; and __fish_seen_subcommand_from {third}\" -l {long} -d '{about}'{value}"
        );
    }
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
            all.push((reference::PAGE.to_owned(), reference::page().into_bytes()));
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
    let below = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let has_commands = command.get_subcommands().next().is_some();
    // clap_mangen has one section for what stands below the options, EXTRA.
    let man = clap_mangen::Man::new(command.after_help(None::<&str>)).manual("Durward");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if has_commands {
        man.render_subcommands_section(&mut text)?;
    }
    text.extend_from_slice(sections(&below).as_bytes());
    Ok((man.get_filename(), text))
}

/// What stands below the options as sections of their own: a headline ends with a colon, and its lines are indented.
fn sections(below: &str) -> String {
    let mut out = String::new();
    for part in below.split("\n\n") {
        let (head, lines) = part.split_once('\n').unwrap_or((part, ""));
        match head.strip_suffix(':') {
            Some(head) => {
                let name = if head == "Exit codes" { "EXIT STATUS" } else { &head.to_uppercase() };
                // Writing to a String does not fail.
                let _ = writeln!(out, ".SH \"{name}\"\n.nf");
                for line in lines.lines() {
                    let _ = writeln!(out, "{}", escaped(line.strip_prefix("  ").unwrap_or(line)));
                }
                out.push_str(".fi\n");
            }
            None if part.is_empty() => {}
            None => {
                out.push_str(".SH NOTES\n");
                for line in part.lines() {
                    let _ = writeln!(out, "{}", escaped(line));
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every flag that can be typed, with the command it belongs to; hidden ones are hidden here too.
    fn flags(command: &clap::Command) -> Vec<(String, String)> {
        let own = command
            .get_arguments()
            .filter(|arg| !arg.is_hide_set())
            .filter_map(|arg| Some((command.get_display_name()?.to_owned(), arg.get_long()?.to_owned())));
        own.chain(command.get_subcommands().flat_map(flags)).collect()
    }

    #[test]
    fn every_flag_is_in_the_manual_and_in_the_completions() {
        let mut command = crate::cli::command();
        command.build();
        let mut manual = Vec::new();
        pages(command.clone(), &mut manual).unwrap();
        let flags = flags(&command);
        assert!(flags.len() > 40, "{flags:?}");
        for (owner, flag) in &flags {
            let (_, page) = manual.iter().find(|(name, _)| *name == format!("{owner}.1")).expect(owner);
            let escaped = format!(r"\-\-{}", flag.replace('-', r"\-"));
            assert!(String::from_utf8_lossy(page).contains(&escaped), "{owner}: {flag}");
        }
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
            let out = script(shell);
            for (_, flag) in &flags {
                let typed = if shell == Shell::Fish { format!("-l {flag}") } else { format!("--{flag}") };
                assert!(out.contains(&typed), "{shell}: {flag}");
            }
        }
    }
}
