//! Go's way to write durations, times and gRPC codes, which spire-agent's output has and scripts read.

use std::{fmt, path::Path, str::FromStr, time::Duration};

use time::{OffsetDateTime, macros::format_description};
use tonic::Code;

use crate::hcl::parse_duration;

/// A duration as Go reads and writes it: `300ms`, `1m30s`, `1.5h`. The crates for durations write other forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GoDuration(pub(super) Duration);

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a duration: write a number with a unit, such as 5s, 1m30s or 500ms")]
pub(super) struct NoDuration(String);

impl FromStr for GoDuration {
    type Err = NoDuration;

    fn from_str(text: &str) -> Result<Self, NoDuration> {
        parse_duration(text).map(Self).ok_or_else(|| NoDuration(text.to_owned()))
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        if nanos == 0 {
            return f.write_str("0s");
        }
        for (unit, scale) in [("ns", 1_u128), ("µs", 1_000), ("ms", 1_000_000)] {
            if nanos < scale * 1000 {
                return write!(f, "{}{unit}", decimal(nanos, scale));
            }
        }
        let seconds = self.0.as_secs();
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        write!(f, "{}s", decimal(nanos % 60_000_000_000, 1_000_000_000))
    }
}

/// `value / scale` with all its digits and no trailing zero.
fn decimal(value: u128, scale: u128) -> String {
    let places = usize::try_from(scale.ilog10()).unwrap_or_default();
    let text = format!("{}.{:0places$}", value / scale, value % scale);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A time as Go's `%v` writes one in UTC: `2026-01-01 00:00:00 +0000 UTC`.
pub(super) fn go_time(at: OffsetDateTime) -> String {
    let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] +0000 UTC");
    at.to_offset(time::UtcOffset::UTC).format(form).unwrap_or_default()
}

/// The name of a code as grpc-go writes it.
pub(super) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "Canceled",
        Code::Unknown => "Unknown",
        Code::InvalidArgument => "InvalidArgument",
        Code::DeadlineExceeded => "DeadlineExceeded",
        Code::NotFound => "NotFound",
        Code::AlreadyExists => "AlreadyExists",
        Code::PermissionDenied => "PermissionDenied",
        Code::ResourceExhausted => "ResourceExhausted",
        Code::FailedPrecondition => "FailedPrecondition",
        Code::Aborted => "Aborted",
        Code::OutOfRange => "OutOfRange",
        Code::Unimplemented => "Unimplemented",
        Code::Internal => "Internal",
        Code::Unavailable => "Unavailable",
        Code::DataLoss => "DataLoss",
        Code::Unauthenticated => "Unauthenticated",
    }
}

/// `text` in lines of at most `width` characters, broken between words where there are any.
pub(super) fn folded(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// `text` as one word of a POSIX shell; too little for a crate (shlex).
pub(super) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// `path` as one word of a POSIX shell, by `~` where it is below the home directory.
pub(super) fn shell_path(path: &Path, home: Option<&Path>) -> String {
    let below = home.filter(|home| home.parent().is_some()).and_then(|home| path.strip_prefix(home).ok());
    match below {
        Some(rest) if rest != Path::new("") => format!("~/{}", shell_word(&rest.to_string_lossy())),
        _ => shell_word(&path.to_string_lossy()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, want) in [
            ("5s", Some("5s")),
            ("0", Some("0s")),
            ("0s", Some("0s")),
            ("90s", Some("1m30s")),
            ("1h", Some("1h0m0s")),
            ("1.5h", Some("1h30m0s")),
            (".5s", Some("500ms")),
            ("12345us", Some("12.345ms")),
            ("12345µs", Some("12.345ms")),
            ("1h1m1.001s", Some("1h1m1.001s")),
            ("999ns", Some("999ns")),
            ("", None),
            ("5", None),
            ("s", None),
            (".s", None),
            ("-5s", None),
            ("5 s", None),
            ("5d", None),
            ("1..5s", None),
            ("99999999999h", None),
        ] {
            let got = text.parse::<GoDuration>().ok().map(|d| d.to_string());
            assert_eq!(got.as_deref(), want, "{text:?}");
        }
    }

    #[test]
    fn times_are_gos() {
        let at = OffsetDateTime::from_unix_timestamp(1_767_225_600).unwrap();
        assert_eq!(go_time(at), "2026-01-01 00:00:00 +0000 UTC");
    }

    #[test]
    fn words_survive_the_shell() {
        for (text, want) in [
            ("/run/durward/api.sock", "/run/durward/api.sock"),
            ("/a b", "'/a b'"),
            ("/it's", r"'/it'\''s'"),
            ("$HOME", "'$HOME'"),
            ("", "''"),
        ] {
            assert_eq!(shell_word(text), want);
        }
    }

    #[test]
    fn what_is_below_the_home_directory_is_named_by_it() {
        let home = Path::new("/home/ann");
        for (path, home, want) in [
            ("/home/ann/a/b", Some(home), "~/a/b"),
            ("/home/ann/a b", Some(home), "~/'a b'"),
            ("/home/anna/b", Some(home), "/home/anna/b"),
            ("/home/ann", Some(home), "/home/ann"),
            ("/var/lib", Some(Path::new("/")), "/var/lib"),
            ("/a b", None, "'/a b'"),
        ] {
            assert_eq!(shell_path(Path::new(path), home), want, "{path}");
        }
    }

    proptest! {
        #[test]
        fn durations_round_trip(nanos in 0..=i64::MAX.unsigned_abs()) {
            let duration = GoDuration(Duration::from_nanos(nanos));
            prop_assert_eq!(duration.to_string().parse::<GoDuration>().unwrap(), duration);
        }
    }
}
