//! The one writer of all that a command prints.
//!
//! What a command answers goes to stdout, all else (errors, advice, "still waiting") to stderr. A reader that goes
//! away (`| head`) is no error of ours: it ends the command quietly. Words that came from elsewhere (an error text
//! of the agent, a hint) are cleaned of control characters first, so that they cannot drive a person's terminal.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use super::{help::in_bold, text::folded};
use crate::os::{journal, sentence::said, terminal::size};

/// The columns of a narrow terminal, and what is printed where there is none.
pub(super) const NARROW: usize = 80;

/// Why printing stopped.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrintError {
    /// Nobody reads any more.
    #[error("stdout was closed")]
    Closed,
    /// Nothing can be written there.
    #[error("writing to stdout: {}", said(.0))]
    Write(io::Error),
}

/// Stdout and stderr.
#[derive(Debug)]
pub(super) struct Terminal {
    /// A person looks at stderr, where a line can be written over.
    interactive: bool,
    /// A waiting line stands on the terminal and must be wiped before anything else is written.
    waiting: bool,
    /// That we wait was said once.
    said: bool,
}

impl Terminal {
    pub(super) fn new() -> Self {
        Self { interactive: io::stderr().is_terminal(), waiting: false, said: false }
    }

    /// Prints to stdout, as it is.
    pub(super) fn print(&mut self, text: &str) -> Result<(), PrintError> {
        self.wipe();
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|err| match err.kind() {
            io::ErrorKind::BrokenPipe => PrintError::Closed,
            _ => PrintError::Write(err),
        })
    }

    /// Prints a page of help to stdout: with its names in bold where a person looks at it, and did not ask for none
    /// (`NO_COLOR`).
    pub(super) fn print_help(&mut self, page: &str) -> Result<(), PrintError> {
        let plain = |name: &str, value: &str| super::environment(name).is_some_and(|set| set == value);
        let no_color = super::environment("NO_COLOR").is_some_and(|set| !set.is_empty());
        if io::stdout().is_terminal() && !no_color && !plain("TERM", "dumb") {
            self.print(&in_bold(page))
        } else {
            self.print(page)
        }
    }

    /// Prints to stdout in the place of what was printed before, where a person looks at it; elsewhere after it.
    pub(super) fn redraw(&mut self, text: &str) -> Result<(), PrintError> {
        if io::stdout().is_terminal() {
            // Home, and clear to the end of the screen.
            self.print(&format!("\x1b[H\x1b[J{text}"))
        } else {
            self.print(text)
        }
    }

    /// Writes a line to stderr. If that fails there is nobody left to tell.
    pub(super) fn note(&mut self, text: impl Display) {
        self.wipe();
        drop(writeln!(io::stderr().lock(), "{text}"));
    }

    /// Writes what a person can do about an error: folded, so that it fits a narrow terminal; a line that is indented is a
    /// command to be copied, and stays whole.
    pub(super) fn advise(&mut self, advice: &str) {
        self.advise_within(advice, NARROW);
    }

    fn advise_within(&mut self, advice: &str, columns: usize) {
        for line in advice.lines() {
            if line.starts_with(' ') || line.chars().count() <= columns {
                self.note(line);
            } else {
                folded(line, columns).iter().for_each(|line| self.note(line));
            }
        }
    }

    /// Writes what is worth a look and stops nothing; the words may be others'.
    pub(super) fn warn(&mut self, warnings: &[String]) {
        for warning in warnings {
            self.advise(&format!("Warning: {}.", clean(warning)));
        }
    }

    /// The same as [`Terminal::note`] for an error: in the journal each of its lines is one, and shown by its priority.
    pub(super) fn fault(&mut self, text: impl Display) {
        if !journal::is_at(io::stderr()) {
            match size(io::stderr()) {
                Some((_, columns)) => self.advise_within(&text.to_string(), columns),
                None => self.note(text),
            }
            return;
        }
        for line in text.to_string().lines() {
            self.note(format_args!("{}{line}", journal::ERROR));
        }
    }

    /// Says that we wait for `what`: `waited` of `limit`. On a terminal one line that counts; elsewhere one line,
    /// the first time.
    pub(super) fn waiting(&mut self, what: &str, waited: Duration, limit: Option<Duration>) {
        let seconds = waited.as_secs();
        let span = match limit {
            Some(limit) => format!("{seconds} s of {} s", (limit.as_secs_f64() * 10.0).round() / 10.0),
            None => format!("{seconds} s"),
        };
        let mut err = io::stderr().lock();
        if self.interactive {
            self.waiting = true;
            drop(write!(err, "\r\x1b[Kwaiting for {what} ({span})").and_then(|()| err.flush()));
        } else if !std::mem::replace(&mut self.said, true) {
            drop(writeln!(err, "waiting for {what} ({span})"));
        }
    }

    /// Takes the waiting line away.
    pub(super) fn wipe(&mut self) {
        if std::mem::take(&mut self.waiting) {
            let mut err = io::stderr().lock();
            drop(write!(err, "\r\x1b[K").and_then(|()| err.flush()));
        }
    }
}

/// The columns that what is printed to stdout may take.
pub(super) fn width() -> usize {
    size(io::stdout()).map_or(NARROW, |(_, columns)| columns)
}

/// `text` with every control character written as an escape; tabs and line ends too.
pub(super) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_words_cannot_drive_the_terminal() {
        for (case, text, want) in [
            ("plain", "no identity issued", "no identity issued"),
            ("not ascii", "schön", "schön"),
            ("escape", "\x1b[2Jx", "\\u{1b}[2Jx"),
            ("line ends", "a\r\nb", "a\\r\\nb"),
            ("c1", "\u{9b}x", "\\u{9b}x"),
        ] {
            assert_eq!(clean(text), want, "{case}");
        }
    }
}
