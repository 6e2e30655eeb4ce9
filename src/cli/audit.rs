//! `audit who`: which processes held an identity in a span of time, from the lines that the agent wrote.
//!
//! It reads lines of text and of JSON, of files that `gzip` compressed too, and of what is piped in. Each holder is printed as it
//! is found, so that memory does not grow with what is read. Who held an identity is who was given an SVID of it that was valid in
//! the span, also where it was given before.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, IsTerminal as _, Read as _, Seek as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Map, Value, json};
use time::{
    Date, OffsetDateTime, PrimitiveDateTime, format_description::well_known::Rfc3339,
    macros::format_description,
};

use super::{
    Failure, OutputArgs, OutputFormat,
    terminal::{Terminal, clean},
};
use crate::{
    identity::SpiffeId,
    os::sentence::said,
    store::audit::message,
    telemetry::{LINES_LOST, log::AUDIT},
};

/// The longest line that is looked at; the rest of a longer one is passed over.
const MOST_OF_A_LINE: u64 = 64 * 1024;

/// `audit who`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct AuditWhoArgs {
    /// The SPIFFE ID
    #[arg(value_name = "SPIFFE_ID", value_parser = SpiffeId::parse)]
    spiffe_id: SpiffeId,

    /// Log files or audit files, compressed by gzip or not
    ///
    /// Without any: standard input.
    #[arg(value_name = "FILE", verbatim_doc_comment)]
    files: Vec<PathBuf>,

    /// Who held it at this time or later [default: at any time]
    ///
    /// In UTC as 2026-11-24 or "2026-11-24 13:00", or with an offset as
    /// 2026-11-24T13:00:00+01:00.
    #[arg(long, value_name = "TIME", verbatim_doc_comment, value_parser = moment)]
    from: Option<OffsetDateTime>,

    /// Who held it before this time
    #[arg(long, value_name = "TIME", value_parser = moment)]
    to: Option<OffsetDateTime>,

    #[command(flatten)]
    output: OutputArgs,
}

/// Why the lines could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum AuditReadError {
    #[error("{}: {}", .0.display(), said(.1))]
    File(PathBuf, io::Error),
    #[error("{}: gzip cannot unpack it", .0.display())]
    Gzip(PathBuf),
    #[error("what is piped in: {}", said(.0))]
    Stdin(io::Error),
    #[error(
        "name the files of the log or of the audit, or pipe it in: journalctl -u durward -o cat | durward audit who .."
    )]
    NoLines,
    #[error("--from is not before --to")]
    NoSpan,
}

/// Runs `audit who`.
pub(super) fn who(args: &AuditWhoArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    if let (Some(from), Some(to)) = (args.from, args.to)
        && from >= to
    {
        return Err(AuditReadError::NoSpan.into());
    }
    let mut search = Search { args, held: 0, lost: 0, uncounted: 0, seen: 0 };
    if args.files.is_empty() {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Err(AuditReadError::NoLines.into());
        }
        search.read(&mut stdin.lock(), terminal, AuditReadError::Stdin)?;
    }
    for path in &args.files {
        search.read_file(path, terminal)?;
    }
    search.conclude(terminal)
}

struct Search<'a> {
    args: &'a AuditWhoArgs,
    /// Lines about holders.
    held: u64,
    /// Lines that the agent lost, and what it counted without an identity.
    lost: u64,
    uncounted: u64,
    /// Lines of the audit.
    seen: u64,
}

impl Search<'_> {
    fn read_file(&mut self, path: &Path, terminal: &mut Terminal) -> Result<(), Failure> {
        let wrong = |error| AuditReadError::File(path.to_owned(), error);
        let mut file = File::open(path).map_err(wrong)?;
        let mut begin = [0; 2];
        let read = file.read(&mut begin).map_err(wrong)?;
        file.rewind().map_err(wrong)?;
        if begin.get(..read) != Some(&[0x1f, 0x8b]) {
            return self.read(&mut BufReader::new(file), terminal, wrong);
        }
        let mut gzip = Unpacking::begin(file).map_err(wrong)?;
        if let Some(out) = gzip.0.stdout.take() {
            self.read(&mut BufReader::new(out), terminal, wrong)?;
        }
        let unpacked = gzip.0.wait().map_err(wrong)?;
        if unpacked.success() { Ok(()) } else { Err(AuditReadError::Gzip(path.to_owned()).into()) }
    }

    fn read(
        &mut self,
        from: &mut impl BufRead,
        terminal: &mut Terminal,
        wrong: impl Fn(io::Error) -> AuditReadError,
    ) -> Result<(), Failure> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if from.by_ref().take(MOST_OF_A_LINE).read_until(b'\n', &mut line).map_err(&wrong)? == 0 {
                return Ok(());
            }
            if !line.ends_with(b"\n") {
                from.skip_until(b'\n').map_err(&wrong)?;
            }
            if let Some(line) = AuditLine::parse(&String::from_utf8_lossy(&line)) {
                self.take(&line, terminal)?;
            }
        }
    }

    fn take(&mut self, line: &AuditLine, terminal: &mut Terminal) -> Result<(), Failure> {
        self.seen += 1;
        match line.message.as_str() {
            LINES_LOST => {
                self.lost = self.lost.saturating_add(line.number("lost").unwrap_or(0));
            }
            message::OF_FURTHER_CALLERS => {
                self.uncounted = self.uncounted.saturating_add(line.times());
            }
            message::SVID_GIVEN | message::SVIDS_GIVEN => {
                if let Some(holder) = line.holder(self.args) {
                    self.held += 1;
                    terminal.print(&match self.args.output.output {
                        OutputFormat::Pretty => holder.pretty(),
                        OutputFormat::Json => format!("{}\n", holder.json()),
                    })?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn conclude(&self, terminal: &mut Terminal) -> Result<(), Failure> {
        if self.seen == 0 {
            terminal.note("Warning: no line of the audit was found in what was read.");
        }
        if self.lost > 0 {
            terminal.note(format_args!(
                "Warning: the agent could not write {} lines, which may be about others who held it.",
                self.lost
            ));
        }
        if self.uncounted > 0 {
            terminal.note(format_args!(
                "Warning: {} answers and refusals were counted without a name, and may be of others who held it.",
                self.uncounted
            ));
        }
        if self.held == 0 && self.args.output.output == OutputFormat::Pretty {
            terminal.print("Nobody held it, by what was read.\n")?;
        }
        Ok(())
    }
}

/// gzip at work, which ends with this.
struct Unpacking(Child);

impl Unpacking {
    fn begin(file: File) -> io::Result<Self> {
        let mut gzip = Command::new("gzip");
        gzip.args(["-d", "-c"]).stdin(file).stdout(Stdio::piped()).spawn().map(Self)
    }
}

impl Drop for Unpacking {
    fn drop(&mut self) {
        // It has ended, or nobody reads what it writes any more.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// One line of the audit.
struct AuditLine {
    /// When it was written; that of lost lines has no time.
    at: Option<OffsetDateTime>,
    message: String,
    fields: Map<String, Value>,
}

impl AuditLine {
    /// A line of the audit, in either format; what comes from the journal may begin with its own time and name.
    fn parse(line: &str) -> Option<Self> {
        let line = line.trim();
        // Behind the journal's words alone: what looks like them in a line of the agent's may be what somebody wrote into a name.
        let line = if is_of_agent(line) { line } else { line.split_once("]: ")?.1 };
        if line.starts_with('{') { Self::of_json(line) } else { Self::of_text(line) }
    }

    fn of_json(line: &str) -> Option<Self> {
        let Value::Object(fields) = serde_json::from_str(line).ok()? else { return None };
        let text = |key: &str| fields.get(key).and_then(Value::as_str);
        let message = text("message")?.to_owned();
        let at = text("timestamp").and_then(|at| OffsetDateTime::parse(at, &Rfc3339).ok());
        // In its own place it has neither; a line about lost ones has a level, and no more.
        let is_audit = match (text("target"), text("level")) {
            (target, Some(_)) => target == Some(AUDIT) || at.is_none(),
            (_, None) => true,
        };
        is_audit.then_some(Self { at, message, fields })
    }

    fn of_text(line: &str) -> Option<Self> {
        let (at, rest) = line.split_once(char::is_whitespace)?;
        let at = OffsetDateTime::parse(at, &Rfc3339).ok()?;
        let (_level, rest) = rest.trim_start().split_once(' ')?;
        let mut rest = rest.trim_start().strip_prefix(AUDIT)?.strip_prefix(": ")?;
        // With log_source_location a file and line come first.
        if let Some((place, message)) = rest.split_once(": ")
            && place.starts_with("src/")
            && !place.contains(' ')
        {
            rest = message;
        }
        let begin =
            ["caller=", "kind=", "times=", "lost="].iter().filter_map(|key| rest.find(&format!(" {key}")));
        let (message, mut rest) = rest.split_at(begin.min().unwrap_or(rest.len()));
        let mut fields = Map::new();
        while let Some((key, value)) = rest.trim_start().split_once('=') {
            let text;
            (text, rest) = word(value)?;
            fields.insert(key.to_owned(), Value::String(text));
        }
        Some(Self { at: Some(at), message: message.to_owned(), fields })
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.fields.get(key).and_then(Value::as_str)
    }

    /// A number of JSON, or one in a line of text.
    fn number(&self, key: &str) -> Option<u64> {
        let value = self.fields.get(key)?;
        value.as_u64().or_else(|| value.as_str()?.parse().ok())
    }

    fn times(&self) -> u64 {
        self.number("times").unwrap_or(1)
    }

    /// Who held the identity within the span, if this line is about that.
    fn holder(&self, asked: &AuditWhoArgs) -> Option<Holder<'_>> {
        if self.text("spiffe_id")? != asked.spiffe_id.as_str() {
            return None;
        }
        let at = self.at?;
        // Those of a count were given since then.
        let since =
            self.text("since").and_then(|since| OffsetDateTime::parse(since, &Rfc3339).ok()).unwrap_or(at);
        let exp =
            self.number("exp").and_then(|exp| OffsetDateTime::from_unix_timestamp(exp.try_into().ok()?).ok());
        let until = self.text("expires").and_then(|end| OffsetDateTime::parse(end, &Rfc3339).ok()).or(exp);
        let begins = asked.to.is_none_or(|to| since < to);
        // Of one whose end nobody wrote down, it is not known that it had ended.
        let ends = asked.from.is_none_or(|from| until.is_none_or(|until| until > from));
        (begins && ends).then_some(Holder { line: self, since, at, until })
    }
}

/// Whether a line begins as the agent's do: with a brace, or with its time and level.
fn is_of_agent(line: &str) -> bool {
    let mut words = line.split_whitespace();
    line.starts_with('{')
        || words.next().is_some_and(|at| OffsetDateTime::parse(at, &Rfc3339).is_ok())
            && words.next().is_some_and(|level| level.parse::<tracing::Level>().is_ok())
}

/// A value of a line of text, and what is behind it.
fn word(text: &str) -> Option<(String, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<String>();
    if text.starts_with('"')
        && let Some(Ok(value)) = values.next()
    {
        return Some((value, text.get(values.byte_offset()..)?));
    }
    let end = text.find(' ').unwrap_or(text.len());
    Some((text.get(..end)?.to_owned(), text.get(end..)?))
}

/// Who was given an SVID.
struct Holder<'a> {
    line: &'a AuditLine,
    /// From when on, and by when at the latest, which differ for a count alone.
    since: OffsetDateTime,
    at: OffsetDateTime,
    until: Option<OffsetDateTime>,
}

impl Holder<'_> {
    fn pretty(&self) -> String {
        let text = |key: &str| self.line.text(key).map(clean);
        let until = self.until.map_or_else(|| "an unknown end".to_owned(), shown);
        let caller = text("caller").unwrap_or_default();
        let process = match (self.line.number("pid"), self.line.number("uid")) {
            (Some(pid), Some(uid)) => format!("pid {pid}, uid {uid}, "),
            _ => String::new(),
        };
        let svid = match (text("serial"), text("kid"), text("token_sha256")) {
            (Some(serial), ..) => format!("X.509-SVID, serial {serial}"),
            (_, Some(kid), token) => {
                format!("JWT-SVID, kid {kid}, token_sha256 {}", token.unwrap_or_default())
            }
            _ if text("kind").as_deref() == Some("x509") => "X.509-SVID".to_owned(),
            _ => "JWT-SVID".to_owned(),
        };
        let many = match self.line.times() {
            1 => String::new(),
            times => {
                format!("\n  {times} of them, the last by {}: more than get a line each", shown(self.at))
            }
        };
        format!("{} to {until}\n  {process}caller {caller}\n  {svid}{many}\n", shown(self.since))
    }

    fn json(&self) -> Value {
        let line = self.line;
        json!({
            "given": shown(self.since),
            "given_by": shown(self.at),
            "until": self.until.map(shown),
            "times": line.times(),
            "caller": line.text("caller"),
            "uid": line.number("uid"),
            "gid": line.number("gid"),
            "pid": line.number("pid"),
            "kind": line.text("kind"),
            "serial": line.text("serial"),
            "kid": line.text("kid"),
            "token_sha256": line.text("token_sha256"),
        })
    }
}

/// To the second, in UTC.
fn shown(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    at.format(format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z")).unwrap_or_default()
}

fn moment(text: &str) -> Result<OffsetDateTime, String> {
    let day = format_description!("[year]-[month]-[day]");
    let minute = format_description!("[year]-[month]-[day] [hour]:[minute]");
    let second = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    let day = Date::parse(text, day).map(|day| day.midnight().assume_utc());
    let exact = |form| PrimitiveDateTime::parse(text, form).map(PrimitiveDateTime::assume_utc);
    day.or_else(|_| exact(minute))
        .or_else(|_| exact(second))
        .or_else(|_| OffsetDateTime::parse(text, &Rfc3339))
        .map_err(|_unlike_any| {
            "must be a time as 2026-11-24, \"2026-11-24 13:00\" or 2026-11-24T13:00:00+01:00".to_owned()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(from: &str, to: &str) -> AuditWhoArgs {
        let time = |text: &str| (!text.is_empty()).then(|| moment(text).unwrap());
        AuditWhoArgs {
            spiffe_id: SpiffeId::parse("spiffe://td/web").unwrap(),
            files: Vec::new(),
            from: time(from),
            to: time(to),
            output: OutputArgs { output: OutputFormat::Pretty },
        }
    }

    #[test]
    fn a_holder_is_found_by_when_its_svid_was_valid() {
        let line = |at: &str| {
            format!(
                "{at}  INFO audit: svid given caller=uid:7 uid=7 gid=8 pid=9 kind=x509 spiffe_id=spiffe://td/web \
                 serial=0a expires=2026-11-24T00:30:00Z selectors=\"unix:uid:7 unix:path:/a b\""
            )
        };
        let given = "2026-11-23T23:30:00.5Z";
        for (from, to, is_found) in [
            ("", "", true),
            ("2026-11-24", "2026-11-25", true),
            ("2026-11-23", "2026-11-24", true),
            ("2026-11-22", "2026-11-23", false),
            ("2026-11-24 00:30", "", false),
            ("2026-11-24T01:29:59+01:00", "", true),
            ("", "2026-11-23 23:30", false),
        ] {
            let line = AuditLine::parse(&line(given)).unwrap();
            assert_eq!(line.holder(&asked(from, to)).is_some(), is_found, "{from} {to}");
        }
        let line = AuditLine::parse(&line(given)).unwrap();
        assert_eq!(
            line.holder(&asked("", "")).unwrap().pretty(),
            "2026-11-23T23:30:00Z to 2026-11-24T00:30:00Z\n  pid 9, uid 7, caller uid:7\n  X.509-SVID, serial 0a\n"
        );
        assert_eq!(line.text("selectors"), Some("unix:uid:7 unix:path:/a b"));
    }

    #[test]
    fn lines_of_every_form_are_read_and_others_are_not() {
        let fields = "caller=uid:7 kind=jwt spiffe_id=spiffe://td/web times=3";
        for (line, is_audit) in [
            (format!("2026-11-23T23:30:00Z  INFO audit: svids given {fields}"), true),
            (format!("2026-11-23T23:30:00Z  INFO audit: src/store/audit.rs:7: svids given {fields}"), true),
            (format!("Nov 23 23:30:00 host durward[7]: 2026-11-23T23:30:00Z  INFO audit: svids given {fields}"), true),
            (r#"{"timestamp":"2026-11-23T23:30:00Z","message":"svids given","spiffe_id":"spiffe://td/web","times":3}"#.to_owned(), true),
            (r#"{"timestamp":"2026-11-23T23:30:00Z","level":"INFO","target":"audit","message":"svids given","spiffe_id":"spiffe://td/web","times":3}"#.to_owned(), true),
            (r#"{"timestamp":"2026-11-23T23:30:00Z","level":"INFO","target":"durward","message":"svids given","times":3}"#.to_owned(), false),
            // What somebody wrote into a name is not a line of the audit.
            (format!("2026-11-23T23:30:00Z  WARN durward: refused command=\"x INFO audit: svids given {fields}\""), false),
            (format!("2026-11-23T23:30:00Z  WARN durward: refused command=\"x]: 2026-11-23T23:30:00Z  INFO audit: svids given {fields}\""), false),
            (format!("2026-11-23T23:30:00+00:00 host durward[7]: 2026-11-23T23:30:00Z  INFO audit: svids given {fields}"), true),
            ("svids given".to_owned(), false),
            (String::new(), false),
        ] {
            let parsed = AuditLine::parse(&line);
            assert_eq!(parsed.is_some(), is_audit, "{line}");
            if let Some(parsed) = parsed {
                assert_eq!((parsed.message.as_str(), parsed.times()), ("svids given", 3), "{line}");
                assert!(parsed.holder(&asked("2026-11-30", "")).is_some(), "its end is not known: {line}");
            }
        }
    }
}
