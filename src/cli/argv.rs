//! One spelling of every flag, before clap sees the command line.
//!
//! spire-agent takes Go's flags: `-socketPath X`, `-socketPath=X`, `--socketPath X`, and the value may begin with a
//! dash. Scripts written for it must work unchanged, and ours read `--socket-path`. [`normalise`] knows each flag by
//! the one table [`FLAGS`] and writes all forms as `--kebab-case` or `--kebab-case=value`; a flag it does not know
//! goes on with two dashes, so that the error names it whole and not its first letter. Values are never looked into.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
};

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Whether a flag is followed by a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    /// `--flag value` or `--flag=value`.
    Value,
    /// `--flag`; Go's `-flag=true` and `-flag=false` too.
    Nothing,
    /// `--flag` or `--flag=value`; a word after it is its value when clap takes it for one.
    Maybe,
}

/// Every flag: our spelling, spire-agent's, and what follows it. A name means the same thing for all commands.
pub(super) const FLAGS: [(&str, &str, Takes); 43] = [
    ("allow-unauthenticated-verifiers", "allowUnauthenticatedVerifiers", Takes::Nothing),
    ("audience", "audience", Takes::Value),
    ("config", "config", Takes::Value),
    ("data-dir", "dataDir", Takes::Value),
    ("dir", "dir", Takes::Value),
    ("disable-sds-api", "disableSDSAPI", Takes::Nothing),
    ("disable-workload-api", "disableWorkloadAPI", Takes::Nothing),
    ("exit-after-fetch", "exitAfterFetch", Takes::Nothing),
    ("expand-env", "expandEnv", Takes::Nothing),
    ("from", "from", Takes::Value),
    ("help", "help", Takes::Nothing),
    ("insecure-bootstrap", "insecureBootstrap", Takes::Nothing),
    ("instance", "instance", Takes::Value),
    ("join-token", "joinToken", Takes::Value),
    ("join-token-file", "joinTokenFile", Takes::Value),
    ("log-file", "logFile", Takes::Value),
    ("log-format", "logFormat", Takes::Value),
    ("log-level", "logLevel", Takes::Value),
    ("log-source-location", "logSourceLocation", Takes::Nothing),
    ("or-signal", "orSignal", Takes::Value),
    ("output", "output", Takes::Value),
    // spire-agent's older name of -output.
    ("output", "format", Takes::Value),
    ("pid", "pid", Takes::Value),
    ("rebootstrap-delay", "rebootstrapDelay", Takes::Value),
    ("rebootstrap-mode", "rebootstrapMode", Takes::Value),
    ("server-address", "serverAddress", Takes::Value),
    ("server-port", "serverPort", Takes::Value),
    ("shallow", "shallow", Takes::Nothing),
    ("silent", "silent", Takes::Nothing),
    ("socket-path", "socketPath", Takes::Value),
    ("spiffe-id", "spiffeID", Takes::Value),
    ("svid", "svid", Takes::Value),
    ("timeout", "timeout", Takes::Value),
    ("to", "to", Takes::Value),
    ("top", "top", Takes::Value),
    ("trust-bundle", "trustBundle", Takes::Value),
    ("trust-bundle-format", "trustBundleFormat", Takes::Value),
    ("trust-bundle-url", "trustBundleUrl", Takes::Value),
    ("trust-domain", "trustDomain", Takes::Value),
    ("verbose", "verbose", Takes::Nothing),
    ("version", "version", Takes::Nothing),
    ("watch", "watch", Takes::Maybe),
    ("write", "write", Takes::Value),
];

/// Rewrites every flag to our spelling. What stands after a lone `--` stays as it is.
pub(super) fn normalise(args: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut args = args.into_iter();
    let mut out: Vec<OsString> = args.next().into_iter().collect();
    while let Some(arg) = args.next() {
        if arg == "--" {
            out.push(arg);
            out.extend(args);
            break;
        }
        let Some(flag) = Flag::split(&arg) else {
            out.push(arg);
            continue;
        };
        match (flag.known(), flag.value) {
            (Some((name, Takes::Value | Takes::Maybe)), Some(value)) => out.push(joined(name, value)),
            // Go takes the next word whatever it looks like; joined with `=`, clap does too.
            (Some((name, Takes::Value)), None) => match args.next() {
                Some(value) => out.push(joined(name, &value)),
                None => out.push(format!("--{name}").into()),
            },
            (Some((name, Takes::Maybe)), None) => out.push(format!("--{name}").into()),
            (Some((name, Takes::Nothing)), value) => match value.map(go_bool) {
                None | Some(Some(true)) => out.push(format!("--{name}").into()),
                Some(Some(false)) => {}
                Some(None) => out.push(joined(name, value.unwrap_or_default())),
            },
            (None, _) => out.push(flag.with_two_dashes()),
        }
    }
    out
}

/// The same error; where it is of a file that stands behind `run` or `validate` without its flag, with the flag.
pub(super) fn with_tip(mut error: clap::Error, words: &[OsString]) -> clap::Error {
    let of_config = words.get(1).is_some_and(|word| word == "run" || word == "validate");
    let word = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if of_config && error.kind() == ErrorKind::UnknownArgument => word,
        _ => return error,
    };
    if !word.starts_with('-') {
        let tip = format!("the configuration file is named with a flag: --config {word}").into();
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
    }
    error
}

/// The number of a process, as a person writes it.
pub(super) fn process_id(text: &str) -> Result<i32, &'static str> {
    text.parse().ok().filter(|pid| *pid > 0).ok_or("a process ID is a number above 0")
}

/// A number from 1 to `MOST`.
pub(super) fn number_up_to<const MOST: u32>(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (1..=MOST).contains(number));
    number.ok_or_else(|| format!("must be a number from 1 to {MOST}"))
}

/// An argument that begins with a dash, taken apart.
struct Flag<'a> {
    /// Without dashes and value.
    name: &'a [u8],
    value: Option<&'a OsStr>,
    /// All after the dashes.
    whole: &'a [u8],
}

impl<'a> Flag<'a> {
    /// `None` for a word, for `-` and for one letter after one dash (`-h`, `-V`), which are clap's.
    fn split(arg: &'a OsStr) -> Option<Self> {
        let bytes = arg.as_bytes();
        let whole = match bytes.strip_prefix(b"--") {
            Some(rest) => rest,
            None => bytes.strip_prefix(b"-").filter(|rest| rest.len() > 1)?,
        };
        let (name, value) = match whole.iter().position(|b| *b == b'=') {
            Some(at) => {
                let (name, rest) = whole.split_at(at);
                (name, rest.split_first().map(|(_, value)| OsStr::from_bytes(value)))
            }
            None => (whole, None),
        };
        Some(Self { name, value, whole })
    }

    fn known(&self) -> Option<(&'static str, Takes)> {
        FLAGS
            .iter()
            .find(|(ours, spires, _)| self.name == ours.as_bytes() || self.name == spires.as_bytes())
            .map(|(ours, _, takes)| (*ours, *takes))
    }

    fn with_two_dashes(&self) -> OsString {
        OsString::from_vec([b"--", self.whole].concat())
    }
}

fn joined(name: &str, value: &OsStr) -> OsString {
    let mut out = OsString::from(format!("--{name}="));
    out.push(value);
    out
}

/// What Go's `strconv.ParseBool` takes.
fn go_bool(text: &OsStr) -> Option<bool> {
    match text.to_str()? {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Some(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    fn normalised(line: &[&str]) -> Vec<String> {
        let args = std::iter::once("durward").chain(line.iter().copied()).map(OsString::from);
        normalise(args).into_iter().skip(1).map(|arg| arg.into_string().unwrap()).collect()
    }

    #[test]
    fn every_spelling_becomes_ours() {
        let cases: [(&str, &[&str], &[&str]); 24] = [
            ("nothing", &[], &[]),
            ("Go, next word", &["-socketPath", "/a"], &["--socket-path=/a"]),
            ("Go, equals", &["-socketPath=/a"], &["--socket-path=/a"]),
            ("Go, two dashes", &["--socketPath", "/a"], &["--socket-path=/a"]),
            ("Go, two dashes, equals", &["--socketPath=/a"], &["--socket-path=/a"]),
            ("ours", &["--socket-path", "/a"], &["--socket-path=/a"]),
            ("ours, one dash", &["-socket-path=/a"], &["--socket-path=/a"]),
            ("value with a dash", &["-audience", "-x"], &["--audience=-x"]),
            ("value that is a flag", &["-audience", "-silent"], &["--audience=-silent"]),
            ("value with equals", &["-svid=a=b=="], &["--svid=a=b=="]),
            ("empty value", &["-write="], &["--write="]),
            ("value is missing", &["-write"], &["--write"]),
            ("switch", &["-silent", "x"], &["--silent", "x"]),
            ("switch, true", &["-silent=true"], &["--silent"]),
            ("switch, false", &["-silent=F", "x"], &["x"]),
            ("switch, neither", &["-silent=maybe"], &["--silent=maybe"]),
            ("older name", &["-format", "json"], &["--output=json"]),
            ("unknown, one dash", &["-sokcetPath", "/a"], &["--sokcetPath", "/a"]),
            ("one letter", &["-h", "-V", "-"], &["-h", "-V", "-"]),
            ("perhaps a value, none", &["-watch", "-output", "json"], &["--watch", "--output=json"]),
            ("perhaps a value, next word", &["-watch", "2"], &["--watch", "2"]),
            ("perhaps a value, equals", &["-watch=2"], &["--watch=2"]),
            ("words", &["api", "fetch", "jwt", "-spiffeID", "i"], &["api", "fetch", "jwt", "--spiffe-id=i"]),
            ("after two dashes", &["-silent", "--", "-silent"], &["--silent", "--", "-silent"]),
        ];
        for (case, line, want) in cases {
            assert_eq!(normalised(line), want, "{case}");
        }
    }

    #[test]
    fn values_need_not_be_text() {
        let path = OsString::from_vec(b"/tmp/\xff".to_vec());
        let got = normalise(["durward".into(), "-write".into(), path]);
        assert_eq!(got.get(1).unwrap().as_bytes(), b"--write=/tmp/\xff");
    }

    /// The table and clap's commands name the same flags, and agree on which take a value.
    #[test]
    fn the_table_is_complete() {
        fn collect(command: &clap::Command, into: &mut BTreeMap<String, Takes>) {
            for arg in command.get_arguments() {
                let Some(long) = arg.get_long() else { continue };
                let needs_none = arg.get_num_args().is_some_and(|range| range.min_values() == 0);
                let takes = match (arg.get_action().takes_values(), needs_none) {
                    (false, _) => Takes::Nothing,
                    (true, true) => Takes::Maybe,
                    (true, false) => Takes::Value,
                };
                assert_eq!(*into.entry(long.to_owned()).or_insert(takes), takes, "{long}: one meaning");
            }
            command.get_subcommands().for_each(|sub| collect(sub, into));
        }
        let mut command = crate::cli::command();
        command.build();
        let mut in_clap = BTreeMap::new();
        collect(&command, &mut in_clap);
        let in_table: BTreeMap<String, Takes> =
            FLAGS.iter().map(|(ours, _, takes)| ((*ours).to_owned(), *takes)).collect();
        assert_eq!(in_clap, in_table);
        let go: BTreeSet<&str> = FLAGS.iter().map(|(_, go, _)| *go).collect();
        assert_eq!(go.len(), FLAGS.len(), "no spelling of spire-agent's stands twice");
    }

    proptest! {
        #[test]
        fn twice_is_as_once(line in prop::collection::vec("-{0,2}(silent|socketPath|write|h|x|)(=[a-z-]{0,3})?", 0..6)) {
            let once = normalise(std::iter::once("durward".to_owned()).chain(line).map(OsString::from));
            prop_assert_eq!(normalise(once.clone()), once);
        }
    }
}
