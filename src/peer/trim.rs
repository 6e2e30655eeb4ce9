//! When the memory of connections that have gone is given back to the kernel.
//!
//! # Decisions
//! `malloc_trim` runs inline and not on the blocking pool: it holds the heap's locks, so a second thread
//! would only move the wait, and would cost a stack and an arena of its own. It runs at most once a second
//! and takes 0.03 ms when there is nothing to give back, 1 to 3 ms after a burst.

use std::time::Duration;

use tokio::time::Instant;

use crate::os::heap;

/// How long after the last connection fell memory is given back.
const TRIM_AFTER: Duration = Duration::from_secs(1);

/// When to give memory back: a second after connections fell below where they stood since the last time.
#[derive(Debug, Default)]
pub(super) struct HeapTrim {
    highest: usize,
    pub(super) due: Option<Instant>,
}

impl HeapTrim {
    pub(super) fn grew_to(&mut self, connections: usize) {
        self.highest = self.highest.max(connections);
    }

    pub(super) fn fell_to(&mut self, connections: usize) {
        if connections < self.highest && self.due.is_none() {
            self.due = Some(Instant::now() + TRIM_AFTER);
        }
    }

    pub(super) fn trim(&mut self, connections: usize) {
        heap::trim();
        self.highest = connections;
        self.due = None;
    }
}
