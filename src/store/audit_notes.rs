//! What the audit of a run of the agent has to know of earlier ones: the name of the last, and how long what they made may be
//! valid. It is kept in `data_dir`, on the disk before an SVID is made by it, so that it is there however a run ends.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use crate::{
    issuer::{FileDir, FileFault},
    telemetry::{AUDIT_RUN, chain},
};

const NOTES: &str = "audit-runs.json";
/// What stands for the run before the first one of a directory.
pub const FIRST_RUN: &str = "none";
/// A run before this one of which nothing is known.
const UNKNOWN: &str = "unknown";
/// More than any lifetime that can be set, in seconds.
const MOST_TTL: u64 = 100 * 366 * 24 * 3600;
/// What the name ends in while it is not written to its end.
const UNFINISHED: &str = ".new";

/// The notes, and where they are kept.
#[derive(Debug, Default)]
pub(super) struct AuditNotes {
    dir: Option<FileDir>,
    noted: Noted,
    /// The last write failed.
    is_unwritten: bool,
}

/// Times are whole seconds, since 1970.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Noted {
    run: String,
    /// For how long SVIDs are valid that are made now, at most; 0 where a server decides that.
    ttl: u64,
    /// The same of all that may be valid still: it was more than now.
    longest_ttl: u64,
    /// Until when that is so.
    until: Option<u64>,
}

/// Why there are no notes.
#[derive(Debug, thiserror::Error)]
enum NotesError {
    #[error(transparent)]
    File(#[from] FileFault),
    #[error("cannot read {NOTES} in data_dir")]
    Damaged(#[from] serde_json::Error),
    #[error("{NOTES} in data_dir has a lifetime of more than a hundred years")]
    Absurd,
}

impl AuditNotes {
    /// Those in this directory, which no agent has had before if it `is_new`. Without them the audit goes on: that is a warning,
    /// and an earlier run may have made what is valid for as long as is `possible`.
    pub(super) fn open(data_dir: &Path, is_new: bool, possible: Option<Duration>, now: SystemTime) -> Self {
        let unknown = || {
            let mut noted = Noted { run: UNKNOWN.to_owned(), ..Noted::default() };
            noted.put_in_force(possible.map_or(0, |ttl| ttl.as_secs()), seconds(now));
            noted
        };
        let dir = match FileDir::open(data_dir, UNFINISHED) {
            Ok(dir) => dir,
            Err(error) => {
                warn_of(&error.into());
                return Self { noted: unknown(), ..Self::default() };
            }
        };
        let noted = match read(&dir) {
            Ok(Some(noted)) => noted,
            Ok(None) if is_new => Noted { run: FIRST_RUN.to_owned(), ..Noted::default() },
            Ok(None) => unknown(),
            Err(error) => {
                warn_of(&error);
                unknown()
            }
        };
        Self { dir: Some(dir), noted, is_unwritten: false }
    }

    /// The run before this one, while none of this one is noted.
    pub(super) fn run_before(&self) -> Option<String> {
        let run = &self.noted.run;
        (!run.is_empty() && *run != *AUDIT_RUN).then(|| run.clone())
    }

    /// From now on SVIDs are valid for as long as `longest`.
    pub(super) fn lifetime_is(&mut self, longest: Option<Duration>, now: SystemTime) {
        let was = self.noted.clone();
        self.noted.run.clone_from(&AUDIT_RUN);
        self.noted.put_in_force(longest.map_or(0, |ttl| ttl.as_secs()), seconds(now));
        if self.noted != was {
            self.write();
        }
    }

    /// Writes what could not be written.
    pub(super) fn write_again(&mut self) {
        if self.is_unwritten {
            self.write();
        }
    }

    fn write(&mut self) {
        let Some(dir) = &self.dir else { return };
        let was_unwritten = self.is_unwritten;
        let written = write(dir, &self.noted);
        match &written {
            Ok(()) if was_unwritten => tracing::info!("audit: {NOTES} is written again"),
            Err(error) if !was_unwritten => warn_of(error),
            Ok(()) | Err(_) => {}
        }
        self.is_unwritten = written.is_err();
    }

    /// For how many seconds any SVID may be valid that is valid still; 0 where that is not known.
    pub(super) fn longest_ttl_at(&mut self, now: SystemTime) -> u64 {
        self.noted.forget_what_ended(seconds(now));
        self.noted.longest_ttl
    }
}

impl Noted {
    fn forget_what_ended(&mut self, now: u64) {
        if self.until.is_some_and(|until| until <= now) {
            (self.longest_ttl, self.until) = (self.ttl, None);
        }
    }

    /// What was made by a longer one is valid for as long as that from now, at most.
    fn put_in_force(&mut self, ttl: u64, now: u64) {
        self.forget_what_ended(now);
        if ttl >= self.longest_ttl {
            (self.longest_ttl, self.until) = (ttl, None);
        } else if ttl < self.ttl {
            self.until = self.until.max(Some(now.saturating_add(self.ttl)));
        }
        self.ttl = ttl;
    }
}

fn read(dir: &FileDir) -> Result<Option<Noted>, NotesError> {
    let Some(text) = dir.read(NOTES)? else { return Ok(None) };
    let noted: Noted = serde_json::from_slice(&text)?;
    if noted.ttl.max(noted.longest_ttl) > MOST_TTL {
        return Err(NotesError::Absurd);
    }
    Ok(Some(noted))
}

fn write(dir: &FileDir, noted: &Noted) -> Result<(), NotesError> {
    Ok(dir.write(NOTES, &serde_json::to_vec(noted)?)?)
}

fn warn_of(error: &NotesError) {
    let error = chain(error);
    tracing::warn!(
        error,
        "audit: cannot keep {NOTES} in data_dir: later searches of the audit may miss this run or the one before"
    );
}

fn seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whenever an SVID is valid that was made by any of the settings, what is said is no less than its lifetime; and when all have
    /// ended, it is what is in force.
    #[test]
    fn the_longest_is_said_until_all_that_was_made_by_it_has_ended() {
        // Each setting is the second from which on it is in force, and how long SVIDs are valid by it.
        for (case, settings, told) in [
            ("one", vec![(0, 10)], vec![(0, 10), (99, 10)]),
            ("it grows", vec![(0, 10), (5, 20)], vec![(4, 10), (5, 20), (99, 20)]),
            ("it shrinks", vec![(0, 10), (5, 1)], vec![(5, 10), (14, 10), (15, 1)]),
            ("twice", vec![(0, 10), (5, 4), (12, 1)], vec![(15, 10), (16, 1)]),
            ("and grows a little", vec![(0, 10), (5, 1), (6, 3)], vec![(14, 10), (15, 3)]),
            ("and grows, and shrinks", vec![(0, 10), (5, 1), (6, 9), (14, 1)], vec![(22, 10), (23, 1)]),
            ("a server decides from then on", vec![(0, 10), (5, 0)], vec![(14, 10), (15, 0)]),
        ] {
            for (at, want) in told {
                let mut noted = Noted::default();
                for (from, ttl) in settings.iter().filter(|(from, _)| *from <= at) {
                    noted.put_in_force(*ttl, *from);
                }
                noted.forget_what_ended(at);
                assert_eq!(noted.longest_ttl, want, "{case} at {at}");
            }
        }
    }
}
