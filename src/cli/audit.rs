//! `audit who`: which processes held an identity in a span of time, from the lines that the agent wrote.
//!
//! It reads lines of text and of JSON, of files that `gzip` compressed too, and of what is piped in. Who held an identity is who
//! was given an SVID of it that was valid in the span, also where it was given before. An answer says which time was read, and
//! whether somebody may be missing.

mod holders;
mod line;
mod numbers;

use std::{
    fs::File,
    io::{self, BufRead, BufReader, IsTerminal as _, Read as _, Seek as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use time::{
    Date, Duration, OffsetDateTime, PrimitiveDateTime, format_description::well_known::Rfc3339,
    macros::format_description,
};

use super::{
    Failure, OutputArgs, OutputFormat,
    terminal::{Terminal, clean},
    text::GoDuration,
};
use crate::{identity::SpiffeId, os::sentence::said, store::audit::message, telemetry::LINES_LOST};
use holders::{Holders, shown};
use line::AuditLine;
use numbers::Numbers;

/// The longest line that is looked at; the rest of a longer one is passed over.
const MOST_OF_A_LINE: u64 = 64 * 1024;
/// Places where lines were lost that are told apart.
const MOST_LOST: usize = 10_000;
/// How long an X.509-SVID is valid by default, of a SPIRE Server too. In each such time the agent says what it is.
const LEAST_LIFE: Duration = Duration::hours(1);

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
    /// In UTC as 2026-11-24, 2026-11-24T13:00 or "2026-11-24 13:00:30", or
    /// with an offset as 2026-11-24T13:00:00+01:00.
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
    let mut search = Search::new(args);
    if args.files.is_empty() {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Err(AuditReadError::NoLines.into());
        }
        search.read(&mut stdin.lock(), "what is piped in", terminal, AuditReadError::Stdin)?;
    }
    for path in &args.files {
        search.read_file(path, terminal)?;
    }
    search.conclude(terminal)
}

/// For how long SVIDs may be valid, by the lines that were read.
#[derive(Default)]
struct LongestLife {
    /// Of those that are in the lines.
    seen: Duration,
    /// What the agent says: of all that were valid still when it said so, also where a shorter time had been set by then. It
    /// says it in each hour of a run.
    said: Option<Duration>,
}

impl LongestLife {
    fn see(&mut self, line: &AuditLine) {
        let life = line.at.zip(line.until()).map(|(at, until)| until - at);
        self.seen = self.seen.max(life.unwrap_or_default());
        let said = line.number("longest_ttl").and_then(|seconds| seconds.try_into().ok());
        self.said = self.said.max(said.map(Duration::seconds));
    }

    /// What has to be assumed. What ended before it was said for the first time is not in what is said, and neither is what another agent does.
    fn get(&self) -> Duration {
        self.seen.max(self.said.unwrap_or_default()).max(LEAST_LIFE)
    }

    fn told(&self) -> String {
        let life = self.get();
        let valid = GoDuration(std::time::Duration::from_secs(life.whole_seconds().unsigned_abs()));
        if self.said.is_none() && self.seen < life {
            format!("no line says for how long they may be valid, and up to {valid} is assumed")
        } else if self.seen.max(self.said.unwrap_or_default()) < life {
            format!("{valid} before is looked at in any case")
        } else {
            format!("they are valid for up to {valid}")
        }
    }
}

struct Search<'a> {
    args: &'a AuditWhoArgs,
    holders: Holders,
    /// Holders that are printed, and whether others were before they were all known.
    held: usize,
    in_parts: bool,
    /// Lines that the agent lost, and what it counted without an identity.
    lost: Vec<LostLines>,
    uncounted: u64,
    /// Lines of the audit.
    seen: u64,
    /// The times of the first of them and of the last.
    span: Option<(OffsetDateTime, OffsetDateTime)>,
    life: LongestLife,
    numbers: Numbers,
    /// What is wrong with files that were read, in words.
    torn: Vec<String>,
    /// When the line that was read last was written, and the run that it is of.
    before: (Option<OffsetDateTime>, Option<String>),
}

/// Lines that the agent could not write.
#[derive(Clone, Copy, Debug)]
struct LostLines {
    lost: u64,
    /// Between the lines that were.
    after: Option<OffsetDateTime>,
    before: Option<OffsetDateTime>,
}

impl<'a> Search<'a> {
    fn new(args: &'a AuditWhoArgs) -> Self {
        Self {
            args,
            holders: Holders::default(),
            held: 0,
            in_parts: false,
            lost: Vec::new(),
            uncounted: 0,
            seen: 0,
            span: None,
            life: LongestLife::default(),
            numbers: Numbers::default(),
            torn: Vec::new(),
            before: (None, None),
        }
    }

    fn read_file(&mut self, path: &Path, terminal: &mut Terminal) -> Result<(), Failure> {
        let wrong = |error| AuditReadError::File(path.to_owned(), error);
        let name = clean(&path.display().to_string());
        let mut file = File::open(path).map_err(wrong)?;
        let mut begin = [0; 2];
        let read = file.read(&mut begin).map_err(wrong)?;
        file.rewind().map_err(wrong)?;
        if begin.get(..read) != Some(&[0x1f, 0x8b]) {
            return self.read(&mut BufReader::new(file), &name, terminal, wrong);
        }
        let mut gzip = Unpacking::begin(file).map_err(wrong)?;
        if let Some(out) = gzip.0.stdout.take() {
            self.read(&mut BufReader::new(out), &name, terminal, wrong)?;
        }
        let unpacked = gzip.0.wait().map_err(wrong)?;
        if !unpacked.success() {
            self.torn
                .push(format!("{name}: gzip could not unpack all of it, and who is in the rest is missing"));
        }
        Ok(())
    }

    fn read(
        &mut self,
        from: &mut impl BufRead,
        name: &str,
        terminal: &mut Terminal,
        wrong: impl Fn(io::Error) -> AuditReadError,
    ) -> Result<(), Failure> {
        let (mut line, mut has_any, mut is_empty) = (Vec::new(), false, true);
        self.before = (None, None);
        loop {
            line.clear();
            if from.by_ref().take(MOST_OF_A_LINE).read_until(b'\n', &mut line).map_err(&wrong)? == 0 {
                if !has_any && !is_empty {
                    self.torn.push(format!("no line of the audit is in {name}"));
                }
                return Ok(());
            }
            is_empty = false;
            let text = String::from_utf8_lossy(&line);
            if !line.ends_with(b"\n") {
                let goes_on = from.skip_until(b'\n').map_err(&wrong)? > 0;
                // What of text is cut off cannot be told.
                let is_whole = match text.starts_with('{') {
                    true => AuditLine::parse(&text).is_some(),
                    false => !text.contains(" audit: "),
                };
                if !goes_on && !is_whole {
                    self.torn
                        .push(format!("the last line of {name} is cut off, and what it told is missing"));
                    continue;
                }
            }
            if let Some(line) = AuditLine::parse(&text) {
                has_any = true;
                self.take(&line, terminal)?;
                self.before = (line.at.or(self.before.0), line.text("run").map(str::to_owned));
            }
        }
    }

    fn take(&mut self, line: &AuditLine, terminal: &mut Terminal) -> Result<(), Failure> {
        if self.holders.has_read(line) {
            return Ok(());
        }
        self.seen += 1;
        if let Some(at) = line.at {
            let (first, last) = self.span.unwrap_or((at, at));
            self.span = Some((first.min(at), last.max(at)));
        }
        self.life.see(line);
        self.numbers.read(line);
        match line.message.as_str() {
            LINES_LOST => {
                let lost = line.number("lost").unwrap_or(0);
                let (before, run) = &self.before;
                let after = before.filter(|_| run.as_deref() == line.text("run"));
                let is_full = self.lost.len() >= MOST_LOST;
                match self.lost.last_mut().filter(|_| is_full) {
                    Some(last) => {
                        last.lost = last.lost.saturating_add(lost);
                        (last.after, last.before) = (None, None);
                    }
                    None => self.lost.push(LostLines { lost, after, before: line.at }),
                }
            }
            message::OF_FURTHER_CALLERS => {
                self.uncounted = self.uncounted.saturating_add(line.times());
            }
            message::SVID_GIVEN | message::SVIDS_GIVEN | message::SVID_GIVEN_AGAIN
                if line.text("spiffe_id") == Some(self.args.spiffe_id.as_str()) =>
            {
                self.holders.take(line, self.args.from, self.args.to);
                if self.holders.is_full() {
                    self.in_parts = true;
                    self.print_holders(terminal)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn print_holders(&mut self, terminal: &mut Terminal) -> Result<(), Failure> {
        for holder in self.holders.drain() {
            self.held += 1;
            terminal.print(&match self.args.output.output {
                OutputFormat::Pretty => holder.pretty(),
                OutputFormat::Json => format!("{}\n", holder.json()),
            })?;
        }
        Ok(())
    }

    fn conclude(mut self, terminal: &mut Terminal) -> Result<(), Failure> {
        self.print_holders(terminal)?;
        let gaps = self.gaps();
        if self.in_parts {
            terminal.advise("Warning: there are so many holders that they are sorted in parts.");
        }
        let (from, to) = self.span.unzip();
        let has_ended = self.numbers.all_have_ended();
        match self.args.output.output {
            OutputFormat::Pretty => {
                if self.held == 0 {
                    terminal.print("Nobody held it, by what was read.\n")?;
                }
                if let Some((from, to)) = self.span {
                    let (seen, from, to) = (self.seen, shown(from), shown(to));
                    terminal.print(&format!("{seen} lines of the audit were read: {from} to {to}.\n"))?;
                }
                if has_ended && self.goes_beyond_the_last() {
                    terminal
                        .print("The agent ended then; if one was started later, read its lines too.\n")?;
                }
            }
            OutputFormat::Json => {
                let read = json!({ "lines": self.seen, "from": from.map(shown), "to": to.map(shown), "ended": has_ended });
                let conclusion: Value = json!({ "read": read, "warnings": gaps });
                terminal.print(&format!("{conclusion}\n"))?;
            }
        }
        for gap in &gaps {
            terminal.advise(&format!("Warning: {gap}."));
        }
        if gaps.is_empty() { Ok(()) } else { Err(Failure::MayLack) }
    }

    /// Whether a time is asked for that is after the last line.
    fn goes_beyond_the_last(&self) -> bool {
        let Some((_, last)) = self.span else { return false };
        self.args.to.is_some_and(|to| to > last) || self.args.from.is_some_and(|from| from > last)
    }

    /// Why somebody who held it may not have been found.
    fn gaps(&self) -> Vec<String> {
        if self.seen == 0 {
            return vec!["no line of the audit was found in what was read".to_owned()];
        }
        let mut gaps = Vec::new();
        let earliest = PrimitiveDateTime::MIN.assume_utc();
        let from = self.args.from.map(|from| from.checked_sub(self.life.get()).unwrap_or(earliest));
        if let Some((first, last)) = self.span {
            let is_all = self.numbers.begin_with_a_first_run(first);
            if let Some(from) = from.filter(|from| !is_all && *from < first) {
                gaps.push(format!(
                    "no line is of {} to {}: SVIDs that were given then may be missing ({})",
                    shown(from),
                    shown(first),
                    self.life.told(),
                ));
            }
            if let Some(to) = self.args.to.filter(|to| !is_all && from.is_none() && *to < first) {
                gaps.push(format!(
                    "no line is of a time before {}: SVIDs that were given before {} are missing",
                    shown(first),
                    shown(to)
                ));
            }
            let can_go_on = !self.numbers.all_have_ended();
            let since = self.args.from.filter(|from| self.args.to.is_none() && *from > last);
            if let Some(from) = since.filter(|_| can_go_on) {
                gaps.push(format!(
                    "no line is of {} or later: SVIDs that were given then are missing (the last is of {})",
                    shown(from),
                    shown(last)
                ));
            }
            if let Some(to) = self.args.to.filter(|to| can_go_on && *to > last) {
                gaps.push(format!(
                    "no line is of {} to {}: SVIDs that were given then may be missing",
                    shown(last),
                    shown(to)
                ));
            }
            gaps.extend(self.numbers.gaps(first, from, self.args.to));
        }
        gaps.extend(self.torn.iter().cloned());
        let concerns = |of: &&LostLines| {
            from.is_none_or(|from| of.before.is_none_or(|before| from < before))
                && self.args.to.is_none_or(|to| of.after.is_none_or(|after| after < to))
        };
        let lost = self.lost.iter().filter(concerns).fold(0_u64, |sum, of| sum.saturating_add(of.lost));
        if lost > 0 {
            gaps.push(format!(
                "the agent could not write {lost} lines, which may be about others who held it"
            ));
        }
        if self.uncounted > 0 {
            gaps.push(format!(
                "{} answers and refusals were counted without a name, and may be of others who held it",
                self.uncounted
            ));
        }
        gaps
    }
}

/// gzip at work, which ends with this.
struct Unpacking(Child);

impl Unpacking {
    fn begin(file: File) -> io::Result<Self> {
        let mut gzip = Command::new("gzip");
        gzip.args(["-d", "-c"]).stdin(file).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().map(Self)
    }
}

impl Drop for Unpacking {
    fn drop(&mut self) {
        // It has ended, or nobody reads what it writes any more.
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// A time in UTC, to the day, the minute or the second, or one with an offset.
fn moment(text: &str) -> Result<OffsetDateTime, String> {
    // RFC 3339 has seconds.
    let to_the_minute =
        text.get(..16).zip(text.get(16..)).map(|(minute, offset)| format!("{minute}:00{offset}"));
    let words = text.replacen('T', " ", 1);
    let day = format_description!("[year]-[month]-[day]");
    let minute = format_description!("[year]-[month]-[day] [hour]:[minute]");
    let second = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    let day = Date::parse(text, day).map(|day| day.midnight().assume_utc());
    let exact = |form| PrimitiveDateTime::parse(&words, form).map(PrimitiveDateTime::assume_utc);
    day.or_else(|_| exact(minute))
        .or_else(|_| exact(second))
        .or_else(|_| OffsetDateTime::parse(text, &Rfc3339))
        .or_else(|_| OffsetDateTime::parse(&to_the_minute.unwrap_or_default(), &Rfc3339))
        .map_err(|_unlike_any| {
            "must be a time in UTC as 2026-11-24, 2026-11-24T13:00 or \"2026-11-24 13:00:30\", or one with an offset as \
             2026-11-24T13:00:00+01:00"
                .to_owned()
        })
}
