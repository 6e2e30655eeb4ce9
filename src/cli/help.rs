//! What stands below the options in the help of a command: examples, and on the first page the exit codes.

use clap::{Arg, ArgAction, Command};

/// On the first page.
const FIRST: &str = "\
Examples:
  durward quickstart            # an agent and an identity in a minute
  durward run --config /etc/durward/agent.conf
  durward api fetch x509 --write /run/web/tls
  durward explain --pid 4242    # why does this process get no identity?

Exit codes:
  0  done
  1  an error, a refused command line, or an agent that is not healthy
  3  api: the agent has no identity for this process (PermissionDenied)
  4  no agent answers at the socket, or it has not heard from its server yet
  5  run: the SPIRE Server has expelled this agent; see its log
  6  audit who: somebody may be missing from the answer, and it says why

status, explain, limits, entry, bundle and reload use the admin socket, which is
for root and the agent's own user. Flags may also be spelled as spire-agent's:
-socketPath PATH.";

/// Of the commands, by their words.
const EXAMPLES: [(&str, &str); 15] = [
    (
        "run",
        "durward run --config /etc/durward/agent.conf\ndurward run --config agent.conf --join-token-file token",
    ),
    ("quickstart", "durward quickstart\ndurward quickstart --dir /tmp/try --trust-domain test.example"),
    ("api fetch x509", "durward api fetch x509\ndurward api fetch x509 --write /run/web/tls"),
    (
        "api fetch jwt",
        "durward api fetch jwt --audience db\n\
         TOKEN=$(durward api fetch jwt --audience db --output token)",
    ),
    ("api validate jwt", "durward api validate jwt --audience db --svid \"$TOKEN\""),
    ("api watch", "durward api watch --socket-path /run/durward/public/api.sock"),
    ("healthcheck", "durward healthcheck --timeout 2s"),
    ("status", "durward status\ndurward status --output json"),
    ("explain", "durward explain\ndurward explain --pid $(pidof -s nginx)"),
    ("limits", "durward limits --watch\ndurward limits --top 100 --output json"),
    ("entry show", "durward entry show\ndurward entry show --spiffe-id spiffe://example.org/web"),
    ("bundle show", "durward bundle show >bundle.pem\ndurward bundle show --output spiffe >bundle.json"),
    (
        "audit who",
        "durward audit who spiffe://example.org/web --from 2026-11-24 --to 2026-11-25 \\\n    \
         /var/log/durward/audit.jsonl*\n\
         journalctl -u durward -o cat | durward audit who spiffe://example.org/web",
    ),
    ("reload", "durward reload"),
    ("validate", "durward validate --config /etc/durward/agent.conf"),
];

/// Gives `command` and those below it their examples.
pub(super) fn with_examples(command: Command) -> Command {
    below(command.after_help(FIRST), "")
}

fn below(command: Command, path: &str) -> Command {
    let names: Vec<_> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = names.into_iter().fold(command, |command, name| {
        let path = format!("{path} {name}");
        command.mut_subcommand(name, |sub| below(sub, path.trim_start()))
    });
    // One page of help, which fits a terminal: the short one, each option on one line, does not.
    let help = Arg::new("help").short('h').long("help").help("Print help").action(ArgAction::HelpLong);
    let command = command.disable_help_subcommand(true).disable_help_flag(true).arg(help);
    match EXAMPLES.iter().find(|(of, _)| *of == path) {
        Some((_, lines)) => {
            let lines: Vec<_> = lines.lines().map(|line| format!("  {line}")).collect();
            command.after_help(format!("Examples:\n{}", lines.join("\n")))
        }
        None => command,
    }
}

/// The text of a page with its headings, commands and flags in bold.
pub(super) fn in_bold(page: &str) -> String {
    let mut out = String::with_capacity(page.len() * 2);
    for line in page.split_inclusive('\n') {
        let text = line.trim_end();
        let indent = text.len() - text.trim_start().len();
        // A heading, or the word before the usage.
        let heading = (indent == 0)
            .then(|| text.find(':'))
            .flatten()
            .filter(|at| *at + 1 == text.len() || text.starts_with("Usage:"))
            .filter(|_| text.starts_with(char::is_uppercase));
        // A flag or a command ends where two spaces follow, or its value begins.
        let name = (2..=6).contains(&indent).then(|| text.get(indent..)).flatten().map(|rest| {
            let end = rest.find("  ").unwrap_or(rest.len());
            let end = if rest.starts_with('-') {
                rest.find([' ', '[']).map_or(end, |at| {
                    // `-h, --help` is one name.
                    if rest.get(..at).is_some_and(|first| first.ends_with(',')) { end } else { at.min(end) }
                })
            } else {
                end
            };
            (indent, indent + end, rest)
        });
        let bold = match (heading, name) {
            (Some(at), _) => Some((0, at + 1)),
            (None, Some((from, to, rest))) if rest.starts_with('-') || to < text.len() => Some((from, to)),
            _ => None,
        };
        match bold.and_then(|(from, to)| Some((line.get(..from)?, line.get(from..to)?, line.get(to..)?))) {
            Some((before, name, after)) => {
                out.push_str(before);
                out.push_str("\x1b[1m");
                out.push_str(name);
                out.push_str("\x1b[0m");
                out.push_str(after);
            }
            None => out.push_str(line),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_is_of_a_command_and_every_command_has_one() {
        fn leaves(command: &Command, path: &str, into: &mut Vec<String>) {
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                if sub.get_subcommands().next().is_none() {
                    into.push(path.trim_start().to_owned());
                }
                leaves(sub, &path, into);
            }
        }
        let mut all = Vec::new();
        leaves(&crate::cli::command(), "", &mut all);
        for (of, _) in EXAMPLES {
            assert!(all.iter().any(|path| path == of), "{of}: {all:?}");
        }
        let without: Vec<_> = all.iter().filter(|path| !EXAMPLES.iter().any(|(of, _)| of == path)).collect();
        assert_eq!(without, ["completions", "man", "version"]);
    }

    #[test]
    fn every_page_fits_a_terminal() {
        fn wide(command: &mut Command, path: &str, into: &mut Vec<String>) {
            let page = command.render_long_help().to_string();
            let long = page.lines().filter(|line| line.chars().count() > 80);
            into.extend(long.map(|line| format!("{path}: {line}")));
            for sub in command.get_subcommands_mut() {
                let path = format!("{path} {}", sub.get_name());
                wide(sub, &path, into);
            }
        }
        let mut all = crate::cli::command();
        all.build();
        let mut found = Vec::new();
        wide(&mut all, "durward", &mut found);
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn headings_and_names_are_bold() {
        let page = "Print\n\nUsage: durward x [OPTIONS]\n\nOptions:\n      --top <N>  How many\n  -h, --help     Help\n  x  done\n";
        let want = "Print\n\n\x1b[1mUsage:\x1b[0m durward x [OPTIONS]\n\n\x1b[1mOptions:\x1b[0m\n      \x1b[1m--top\x1b[0m <N>  \
                    How many\n  \x1b[1m-h, --help\x1b[0m     Help\n  \x1b[1mx\x1b[0m  done\n";
        assert_eq!(in_bold(page), want);
    }
}
