//! The agent's log: text or JSON lines to standard output or a file, at a level that can change.
//!
//! A log must never take identity away: a reader that stops reading (a full pipe, a stuck disk) stops one thread
//! of this module and no other. That thread opens the file, too, which a disk can hold up as long as a write; a named pipe is
//! opened without waiting for a reader. Lines wait in a buffer of [`MOST_WAITING`] bytes; what does not fit is dropped and
//! counted, and the count is the next line that gets through. A file is opened for appending, readable by its
//! owner and group, and opened anew when asked ([`Log::reopen`], on SIGUSR2), so that logrotate can move it away. No
//! link that others could have put there is followed to it, and opening it never waits.
//!
//! Only the agent's own lines follow the level; those of the audit are written at any. Of libraries only errors are heard: their warnings are of what a peer
//! did, and a peer could fill the log with them; their debug lines are per frame and may show what callers sent.
//! There are no filter expressions here.

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::field::Field;
use tracing::level_filters::LevelFilter;
use tracing::{Level, Metadata};
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::filter::{Targets, filter_fn};
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{Layer, Registry, reload};

use super::settings::{AuditSettings, LogFormat, LogSettings};
use super::sink::{AppendedFile, Delivered, Sink, add_unnumbered};
use crate::os::journal;
use crate::os::sentence::said;
use crate::os::trusted::{PathError, Trust};

/// The most bytes that wait for the writer: some thousand lines.
pub const MOST_WAITING: usize = 1024 * 1024;
/// A buffer that grew beyond this in a burst is given back.
const KEPT: usize = 64 * 1024;
/// The time between two lines of the log about lost lines of the audit.
const BETWEEN_REPORTS: Duration = Duration::from_secs(60);
/// How long opening the file is waited for.
const OPEN_WITHIN: Duration = Duration::from_secs(5);

/// The target of the lines that say who was given what: they may have a place of their own.
pub const AUDIT: &str = "audit";

/// Where the lines of the audit go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AuditTo {
    Nowhere,
    /// Beside the others.
    TheLog,
    ItsOwnPlace,
}

impl AuditTo {
    fn of(settings: &AuditSettings) -> Self {
        let AuditSettings { enabled, file, socket } = settings;
        match (enabled, file.is_some() || socket.is_some()) {
            (false, _) => Self::Nowhere,
            (true, false) => Self::TheLog,
            (true, true) => Self::ItsOwnPlace,
        }
    }

    fn targets(self, level: Level) -> Targets {
        let own = LevelFilter::from_level(level);
        // Whatever the level of the log is: nobody would look for an audit that a level has switched off.
        let audit = match self {
            Self::Nowhere => LevelFilter::OFF,
            Self::TheLog | Self::ItsOwnPlace => LevelFilter::INFO,
        };
        Targets::new()
            .with_default(own.min(LevelFilter::ERROR))
            .with_target("durward", own)
            .with_target(AUDIT, audit)
    }
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be opened.
    #[error("cannot open log file {}", path.display())]
    Open { path: PathBuf, source: PathError },
    /// The file could not be opened so soon: it is still tried, and the old one is in use as long.
    #[error("opening log file {} takes longer than {} seconds", .0.display(), OPEN_WITHIN.as_secs())]
    Slow(PathBuf),
    /// The writer's thread cannot be started.
    #[error("cannot start the thread that writes the log")]
    Thread(#[source] io::Error),
    /// Logging was set up before.
    #[error("the log is already set up")]
    Twice,
}

/// The log of this process: a handle to change and end it.
#[derive(Clone)]
pub struct Log {
    level: reload::Handle<Targets, Registry>,
    main: Lines,
    audit_to: AuditTo,
    /// Where the audit has a place of its own.
    audit: Option<Lines>,
}

/// Lines on their way to one place.
#[derive(Clone)]
struct Lines {
    queue: Arc<Queue>,
    place: LinePlace,
}

#[derive(Clone, PartialEq, Eq)]
enum LinePlace {
    Stdout,
    File(PathBuf),
    /// A datagram socket.
    Socket(PathBuf),
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Log").field("audit_to", &self.audit_to).finish_non_exhaustive()
    }
}

impl Log {
    /// Sets up the log of the process. A file that takes long to open is no error: lines wait for it.
    ///
    /// # Errors
    /// See [`LogError`]; nothing is set up then.
    pub fn start(settings: &LogSettings, audit: &AuditSettings) -> Result<Self, LogError> {
        let (subscriber, log) = Self::build_with(settings, audit)?;
        tracing::subscriber::set_global_default(subscriber).map_err(|_already| LogError::Twice)?;
        if let Some((lines, path)) = log.audit_socket()
            && let Some(error) = Sink::untaken(path)
        {
            lines.queue.lock().untaken = true;
            let (path, error) = (path.display(), said(&error));
            tracing::warn!(%path, error, "audit.socket_path: nobody takes the lines of the audit, and they are lost");
        }
        Ok(log)
    }

    /// What [`Log::start`] sets up, without doing so: for tests, which share a process.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn build(
        settings: &LogSettings,
    ) -> Result<(impl tracing::Subscriber + Send + Sync + use<>, Self), LogError> {
        Self::build_with(settings, &AuditSettings::default())
    }

    /// The same, with an audit that may have its own place.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn build_with(
        settings: &LogSettings,
        audit: &AuditSettings,
    ) -> Result<(impl tracing::Subscriber + Send + Sync + use<>, Self), LogError> {
        let colours = settings.file.is_none() && io::stdout().is_terminal();
        let main = settings.file.clone().map_or(LinePlace::Stdout, LinePlace::File);
        let audit_to = AuditTo::of(audit);
        let main = Lines::begin("log", main, audit_to == AuditTo::TheLog)?;
        let place = match (audit_to, &audit.file, &audit.socket) {
            (AuditTo::ItsOwnPlace, Some(file), _) => Some(LinePlace::File(file.clone())),
            (AuditTo::ItsOwnPlace, None, Some(socket)) => Some(LinePlace::Socket(socket.clone())),
            _ => None,
        };
        let own_audit = place.map(|place| Lines::begin(AUDIT, place, true)).transpose()?;
        let queue = &main.queue;
        let shown = settings.source_location;
        let journal = settings.file.is_none() && journal::is_at(io::stdout());
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(ToQueue { queue: Arc::clone(queue), journal })
            .with_file(shown)
            .with_line_number(shown)
            .log_internal_errors(false);
        let lines: Box<dyn Layer<_> + Send + Sync> = match settings.format {
            LogFormat::Text => {
                Box::new(lines.with_ansi(colours).fmt_fields(debug_fn(write_field).delimited(" ")))
            }
            LogFormat::Json => Box::new(lines.json().flatten_event(true).with_current_span(false)),
        };
        let apart = own_audit.is_some();
        let lines = lines.with_filter(filter_fn(move |line| !apart || line.target() != AUDIT));
        let audit_lines = own_audit.as_ref().map(|audit| {
            tracing_subscriber::fmt::layer()
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_level(false)
                .with_target(false)
                .with_writer(ToQueue { queue: Arc::clone(&audit.queue), journal: false })
                .log_internal_errors(false)
                .with_filter(filter_fn(|line| line.target() == AUDIT))
        });
        let (filter, level) = reload::Layer::new(audit_to.targets(settings.level));
        let subscriber = Registry::default().with(filter).with(lines).with(audit_lines);
        Ok((subscriber, Self { level, main, audit_to, audit: own_audit }))
    }

    /// Logs from this level on, from now on.
    pub fn set_level(&self, level: Level) {
        // It fails only when the subscriber is gone, and then there is nothing to set.
        self.level.reload(self.audit_to.targets(level)).unwrap_or_default();
    }

    /// Opens the files anew, for logrotate: that of the log and that of the audit. Does nothing where there is none. Blocks,
    /// for some seconds at most.
    ///
    /// # Errors
    /// [`LogError::Open`]: the old file stays in use. [`LogError::Slow`]: it does for now.
    pub fn reopen(&self) -> Result<(), LogError> {
        let audit = self.audit.as_ref().map_or(Ok(()), Lines::open);
        self.main.open().and(audit)
    }

    /// Waits until what was logged is written, or `most` has passed: for the end of the process.
    /// Blocks; returns whether all was written.
    #[must_use]
    pub fn flush(&self, most: Duration) -> bool {
        let until = Instant::now() + most;
        let audit = self.audit.as_ref().is_none_or(|audit| {
            let all = audit.queue.flush(most / 2);
            audit.queue.report();
            all
        });
        self.main.queue.flush(until.saturating_duration_since(Instant::now())) && audit
    }

    fn audit_socket(&self) -> Option<(&Lines, &Path)> {
        self.audit.as_ref().and_then(|lines| match &lines.place {
            LinePlace::Socket(path) => Some((lines, path.as_path())),
            LinePlace::Stdout | LinePlace::File(_) => None,
        })
    }

    /// Where the audit is written, in words.
    #[must_use]
    pub fn audit_place(&self) -> String {
        match (self.audit_to, self.audit.as_ref().map(|lines| &lines.place)) {
            (AuditTo::Nowhere, _) => "nowhere: it is switched off".to_owned(),
            (_, Some(LinePlace::File(path))) => path.display().to_string(),
            (_, Some(LinePlace::Socket(path))) => format!("socket {}", path.display()),
            (_, Some(LinePlace::Stdout) | None) => "the log".to_owned(),
        }
    }

    /// Where the last lines of the audit did not get to, if that is so.
    #[must_use]
    pub fn audit_untaken(&self) -> Option<String> {
        let untaken = self.audit.as_ref().is_some_and(|lines| lines.queue.lock().untaken);
        untaken.then(|| self.audit_place())
    }

    /// Lines dropped since the start.
    #[must_use]
    pub fn lines_lost(&self) -> u64 {
        let all = std::iter::once(&self.main).chain(&self.audit);
        all.map(|lines| lines.queue.lock().lost).fold(0, u64::saturating_add)
    }
}

impl Lines {
    /// Begins to write at `place`, in a thread of this name; `numbered` where the audit is written. A file that takes long to open
    /// is no error.
    fn begin(thread: &str, place: LinePlace, numbered: bool) -> Result<Self, LogError> {
        let queue = Arc::new(Queue { reports: thread == AUDIT, ..Queue::default() });
        let (writer, to) = (Arc::clone(&queue), place.clone());
        std::thread::Builder::new()
            .name(thread.to_owned())
            .spawn(move || writer.write_out(&to, numbered))
            .map_err(LogError::Thread)?;
        let lines = Self { queue, place };
        match lines.open() {
            // Callers are served meanwhile.
            Ok(()) | Err(LogError::Slow(_)) => Ok(lines),
            Err(error) => Err(error),
        }
    }

    /// Has the file opened, again perhaps.
    fn open(&self) -> Result<(), LogError> {
        match &self.place {
            LinePlace::File(path) => self.queue.open(path),
            LinePlace::Stdout | LinePlace::Socket(_) => Ok(()),
        }
    }
}

/// Why lines of the audit that are sent to the socket at `path` are lost, if nobody has bound it.
#[must_use]
pub fn nobody_takes(path: &Path) -> Option<io::Error> {
    let nobody = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
    Sink::untaken(path).filter(|error| nobody.contains(&error.kind()))
}

/// What has been logged and not yet been written.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    /// Rings at every change of the state.
    changed: Condvar,
    /// The log tells how many of the lines were lost, which are not its own.
    reports: bool,
}

#[derive(Default)]
struct QueueState {
    waiting: Vec<u8>,
    /// The writer holds lines that it has taken and not yet written.
    writing: bool,
    lost: u64,
    /// The last lines were not taken where they are written.
    untaken: bool,
    /// How many of the lost the lines themselves have already told of.
    told: u64,
    /// How many of them the log has told of, of lines that have a place of their own.
    reported: u64,
    /// The file is to be opened (again).
    open: bool,
    /// How that went, until somebody has asked.
    opened: Option<Result<(), PathError>>,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the log tell how many lines were lost that it has not told of.
    fn report(&self) {
        let mut state = self.lock();
        let lost = state.lost - state.reported;
        state.reported = state.lost;
        drop(state);
        if lost > 0 {
            tracing::warn!(lost, "audit: lines were lost, since they could not be written");
        }
    }

    fn flush(&self, most: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), most, |state| !state.waiting.is_empty() || state.writing)
            .unwrap_or_else(PoisonError::into_inner);
        state.waiting.is_empty() && !state.writing
    }

    /// Has the writer's thread open the file, and waits for it.
    fn open(&self, path: &Path) -> Result<(), LogError> {
        let mut state = self.lock();
        (state.open, state.opened) = (true, None);
        self.changed.notify_all();
        let (mut state, _) = self
            .changed
            .wait_timeout_while(state, OPEN_WITHIN, |state| state.opened.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        match state.opened.take() {
            None => Err(LogError::Slow(path.to_owned())),
            Some(opened) => opened.map_err(|source| LogError::Open { path: path.to_owned(), source }),
        }
    }

    /// Takes one line, or drops it when it does not fit. Held locks: this one, for a copy of the line.
    fn put(&self, of: &LineKind, line: &[u8]) {
        let LineKind { priority, is_of_audit } = of;
        let mut state = self.lock();
        if state.waiting.len() + priority.len() + line.len() > MOST_WAITING {
            state.lost = state.lost.saturating_add(1);
            return;
        }
        state.waiting.extend_from_slice(priority.as_bytes());
        match is_of_audit {
            true => add_unnumbered(&mut state.waiting, line),
            false => state.waiting.extend_from_slice(line),
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The writer's thread: the only one that may wait for whoever reads the log. It ends with the process.
    fn write_out(&self, to: &LinePlace, numbered: bool) {
        let begin = |sink: Sink| if numbered { sink.of_audit() } else { sink };
        let (mut sink, file) = match to {
            LinePlace::Stdout => (Some(begin(Sink::stdout())), None),
            LinePlace::File(path) => (None, Some(path.as_path())),
            LinePlace::Socket(path) => (Some(begin(Sink::socket(path.clone()))), None),
        };
        let mut taken = Vec::new();
        let mut next_report = Instant::now();
        let mut state = self.lock();
        loop {
            if std::mem::take(&mut state.open)
                && let Some(path) = file
            {
                drop(state);
                let opened = append(path).map(|file| match &mut sink {
                    Some(sink) => sink.moves_to(file),
                    None => sink = Some(begin(Sink::file(file))),
                });
                state = self.lock();
                state.opened = Some(opened);
                self.changed.notify_all();
            }
            if self.reports && state.lost > state.reported && next_report <= Instant::now() {
                drop(state);
                next_report = Instant::now() + BETWEEN_REPORTS;
                self.report();
                state = self.lock();
            }
            let Some(sink) = sink.as_mut().filter(|_| !state.waiting.is_empty()) else {
                state = match self.reports && state.lost > state.reported {
                    true => {
                        let left = next_report.saturating_duration_since(Instant::now());
                        self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                    }
                    false => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                };
                continue;
            };
            std::mem::swap(&mut taken, &mut state.waiting);
            let lost = state.lost - state.told;
            state.told = state.lost;
            state.writing = true;
            drop(state);

            let lines = u64::try_from(taken.iter().filter(|b| **b == b'\n').count()).unwrap_or(u64::MAX);
            let Delivered { lines: written, told } = sink.write(&taken, lost);
            taken.clear();
            taken.shrink_to(KEPT);

            state = self.lock();
            state.writing = false;
            state.untaken = written < lines;
            // No space, or nobody reads: what is not delivered is lost, and what was lost before is still to be told.
            state.lost = state.lost.saturating_add(lines.saturating_sub(written));
            if !told {
                state.told -= lost;
            }
            self.changed.notify_all();
        }
    }
}

/// Gives each line its own buffer, and the queue the whole line.
struct ToQueue {
    queue: Arc<Queue>,
    /// Lines begin with their priority.
    journal: bool,
}

struct Line<'a> {
    queue: &'a Queue,
    of: LineKind,
}

/// What is done with a line.
#[derive(Default)]
struct LineKind {
    /// What it begins with.
    priority: &'static str,
    is_of_audit: bool,
}

impl<'a> MakeWriter<'a> for ToQueue {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { queue: &self.queue, of: LineKind::default() }
    }

    fn make_writer_for(&'a self, of: &Metadata<'_>) -> Line<'a> {
        let priority = match *of.level() {
            _ if !self.journal => "",
            Level::ERROR => journal::ERROR,
            Level::WARN => journal::WARNING,
            Level::INFO => journal::INFORMATION,
            Level::DEBUG | Level::TRACE => journal::DEBUG,
        };
        Line { queue: &self.queue, of: LineKind { priority, is_of_audit: of.target() == AUDIT } }
    }
}

impl Write for Line<'_> {
    /// tracing-subscriber formats an event into its own buffer and writes it at once, newline included.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.queue.put(&self.of, line);
        Ok(line.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn append(path: &Path) -> Result<AppendedFile, PathError> {
    let file = Trust::own().to_append().append(path, 0o640)?;
    // An empty line more is less harm than a line of now that is a part of the last one.
    let torn = is_torn(&file).unwrap_or(true);
    Ok(AppendedFile { file, torn })
}

/// Whether the last line of a file is not whole.
fn is_torn(file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    let Some(last) = meta.len().checked_sub(1).filter(|_| meta.is_file()) else { return Ok(false) };
    // It was opened for writing alone.
    let same = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let mut byte = [0];
    same.read_exact_at(&mut byte, last)?;
    Ok(byte != *b"\n")
}

/// A field of a line of text: one word, or in quotes. What was said is not, but has no line's end nor anything that
/// drives a terminal in it.
fn write_field(to: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let text = format!("{value:?}");
    if field.name() == "message" {
        return text.chars().try_for_each(|c| {
            if c.is_control() { write!(to, "{}", c.escape_default()) } else { to.write_char(c) }
        });
    }
    // A string comes quoted, what is shown as it is does not: a caller is to be found by one word in either case.
    let inner = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let word =
        |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic() && !"\"=\\".contains(c));
    match inner {
        Some(inner) if word(inner) => write!(to, "{}={inner}", field.name()),
        Some(_) => write!(to, "{}={text}", field.name()),
        None if word(&text) => write!(to, "{}={text}", field.name()),
        None => write!(to, "{}={text:?}", field.name()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn to_file(dir: &tempfile::TempDir, format: LogFormat, level: Level) -> (LogSettings, PathBuf) {
        let path = dir.path().join("agent.log");
        let settings = LogSettings { level, format, file: Some(path.clone()), ..Default::default() };
        (settings, path)
    }

    #[test]
    fn the_level_holds_and_changes_live() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, path) = to_file(&dir, LogFormat::Text, Level::INFO);
        let (subscriber, log) = Log::build(&settings).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "durward::api", "first");
            tracing::debug!(target: "durward::api", "too fine");
            log.set_level(Level::DEBUG);
            tracing::debug!(target: "durward::api", answer = 42, "second");
            tracing::info!(target: "h2::codec", "a library's chatter");
            tracing::warn!(target: "h2::codec", "a library's worry, of what a peer did");
            tracing::error!(target: "hyper", "a library's fault");
            log.set_level(Level::ERROR);
            tracing::warn!(target: "durward", "unheard");
            tracing::warn!(target: "h2", "unheard");
            tracing::error!(target: "durward", "third");
        });
        assert!(log.flush(LONG));
        let text = fs::read_to_string(&path).unwrap();
        let said: Vec<&str> = text.lines().map(|l| l.split_once(": ").unwrap().1).collect();
        assert_eq!(said, ["first", "second answer=42", "a library's fault", "third"], "{text}");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert!(!text.contains('\x1b'), "no colours in a file");
    }

    #[test]
    fn a_field_is_one_word_or_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, path) = to_file(&dir, LogFormat::Text, Level::INFO);
        let (subscriber, log) = Log::build(&settings).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            let reason = format_args!("no identity issued");
            tracing::info!(target: "durward", %reason, key = "a b", "refused");
            let (word, path) = (format_args!("uid:1000"), Path::new("/a b"));
            tracing::info!(target: "durward", %word, ?path, n = 1, same = "uid:1000", "words");
            let (odd, empty) = (format_args!("a\"=\n\x1b[1m"), format_args!(""));
            tracing::info!(target: "durward", %odd, %empty, none = Option::<u8>::None, "{}", "two\nlines\x1b");
        });
        assert!(log.flush(LONG));
        let text = fs::read_to_string(&path).unwrap();
        let said: Vec<&str> = text.lines().map(|l| l.split_once(": ").unwrap().1).collect();
        let want = [
            r#"refused reason="no identity issued" key="a b""#,
            r#"words word=uid:1000 path="/a b" n=1 same=uid:1000"#,
            r#"two\nlines\u{1b} odd="a\"=\n\u{1b}[1m" empty="""#,
        ];
        assert_eq!(said, want, "{text}");
    }

    /// Opening a pipe waits for somebody who reads it, unless it is done with care. What is logged before there is
    /// anybody is there for whoever comes.
    #[test]
    fn a_pipe_without_a_reader_is_opened_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, path) = to_file(&dir, LogFormat::Text, Level::INFO);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        let (subscriber, log) = Log::build(&settings).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "durward", "before");
            log.reopen().unwrap();
            tracing::info!(target: "durward", "after");
        });
        let mut lines = io::BufRead::lines(io::BufReader::new(File::open(&path).unwrap()));
        for said in ["before", "after"] {
            let line = lines.next().unwrap().unwrap();
            assert!(line.ends_with(said), "{line}");
        }
    }

    #[test]
    fn json_lines_are_objects() {
        let dir = tempfile::tempdir().unwrap();
        let (mut settings, path) = to_file(&dir, LogFormat::Json, Level::INFO);
        settings.source_location = true;
        let (subscriber, log) = Log::build(&settings).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "durward", uid = 1000, "two\nlines \"quoted\"");
        });
        assert!(log.flush(LONG));
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1);
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["message"], "two\nlines \"quoted\"");
        assert_eq!(line["uid"], 1000);
        assert_eq!(line["level"], "INFO");
        assert!(line["filename"].as_str().unwrap().ends_with("log.rs"), "{line}");
        assert!(line["line_number"].is_u64() && line["timestamp"].is_string());
    }

    #[test]
    fn a_moved_file_is_made_anew_and_a_failed_reopen_keeps_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let (settings, path) = to_file(&dir, LogFormat::Text, Level::INFO);
        let (subscriber, log) = Log::build(&settings).unwrap();
        let moved = dir.path().join("agent.log.1");
        let guard = tracing::subscriber::set_default(subscriber);
        tracing::info!(target: "durward", "before");
        assert!(log.flush(LONG));
        fs::rename(&path, &moved).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(matches!(log.reopen(), Err(LogError::Open { .. })), "a directory stands there");
        tracing::info!(target: "durward", "still the old");
        assert!(log.flush(LONG));
        fs::remove_dir(&path).unwrap();
        log.reopen().unwrap();
        tracing::info!(target: "durward", "after");
        assert!(log.flush(LONG));
        drop(guard);
        assert_eq!(fs::read_to_string(&moved).unwrap().lines().count(), 2);
        assert!(fs::read_to_string(&path).unwrap().ends_with("after\n"));
    }

    /// A pipe that nobody reads takes 64 KiB; logging far more than the queue holds must neither wait nor grow.
    #[test]
    fn nobody_reading_blocks_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        // Reading and writing at once, or opening a pipe waits for the other side.
        let reader = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let settings = LogSettings { file: Some(path), ..Default::default() };
        let (subscriber, log) = Log::build(&settings).unwrap();
        let line = "x".repeat(1000);
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..3 * MOST_WAITING / 1000 {
                tracing::info!(target: "durward", "{line}");
            }
        });
        assert!(log.lines_lost() > 500, "{} lost", log.lines_lost());
        assert!(log.main.queue.lock().waiting.len() <= MOST_WAITING);
        assert!(!log.flush(Duration::from_millis(1)), "it is stuck");

        // Now somebody reads, and learns what is missing.
        let mut lines = io::BufRead::lines(io::BufReader::new(reader));
        let told = lines.find_map(|l| l.ok().filter(|l| l.contains("log lines were lost"))).unwrap();
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        assert_eq!(told["lost"].as_u64(), Some(log.lines_lost()));
        assert!(told["timestamp"].is_string(), "{told}");
    }
}
