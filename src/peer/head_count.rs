//! The request heads of one connection that never begin a call: HTTP/2 refuses them by itself, or their connection ends
//! before they are looked at.
//!
//! HTTP/2 tells nobody but the peer of them. But it asks for more bytes only when it has looked at all that came whole:
//! then each of those heads has begun a call, or is about to in this very poll, or never will.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::frames::Heads;

/// Why a request head began no call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unheard {
    /// It breaks the rules of HTTP/2, or is too large.
    Broken,
    /// There were as many requests on the connection as there may be.
    TooMany,
    /// Its connection has ended.
    Ended,
}

/// Counts them. Written by the task of the connection alone.
#[derive(Debug, Default)]
pub(super) struct HeadCount {
    /// Came, be it in part.
    came: AtomicU64,
    /// Came whole, and HTTP/2 has looked at them.
    looked_at: AtomicU64,
    /// Began a call.
    begun: AtomicU64,
    /// Were told with `REFUSED_STREAM` that they began none.
    too_many: AtomicU64,
    /// Of those that began none, so many were counted.
    unheard: AtomicU64,
    /// And of these so many as [`Unheard::TooMany`].
    counted_too_many: AtomicU64,
}

impl HeadCount {
    /// So many have come.
    pub(super) fn came(&self, heads: Heads) {
        self.came.store(heads.begun, Relaxed);
    }

    /// HTTP/2 asks for more, and so has looked at these.
    pub(super) fn looked_at(&self, heads: Heads) {
        self.looked_at.store(heads.whole, Relaxed);
    }

    /// One began a call.
    pub(super) fn begins(&self) {
        self.begun.fetch_add(1, Relaxed);
    }

    /// One was told that there were too many.
    pub(super) fn is_one_too_many(&self) {
        self.too_many.fetch_add(1, Relaxed);
    }

    /// Between two polls of HTTP/2: `tell` hears of each that began no call and was not told of before.
    pub(super) fn tell_unheard(&self, mut tell: impl FnMut(Unheard)) {
        for _ in 0..self.take_unheard(&self.looked_at) {
            let is_new = self.counted_too_many.load(Relaxed) < self.too_many.load(Relaxed);
            if is_new {
                self.counted_too_many.fetch_add(1, Relaxed);
            }
            tell(if is_new { Unheard::TooMany } else { Unheard::Broken });
        }
    }

    /// The same at the end of the connection, for all that came: what began no call until then ended so.
    pub(super) fn tell_rest(&self, how: Unheard, mut tell: impl FnMut(Unheard)) {
        self.tell_unheard(&mut tell);
        (0..self.take_unheard(&self.came)).for_each(|_| tell(how));
    }

    fn take_unheard(&self, of: &AtomicU64) -> u64 {
        let known = self.begun.load(Relaxed) + self.unheard.load(Relaxed);
        // HTTP/2 may not have asked for more after the last that began.
        let more = of.load(Relaxed).saturating_sub(known);
        self.unheard.fetch_add(more, Relaxed);
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_head_that_begins_no_call_is_told_of_once() {
        let count = HeadCount::default();
        let told = || {
            let mut told = Vec::new();
            count.tell_unheard(|why| told.push(why));
            told
        };
        count.came(Heads { begun: 3, whole: 2 });
        assert_eq!(told(), [], "nobody has looked at them");
        count.begins();
        assert_eq!(told(), []);
        count.looked_at(Heads { begun: 3, whole: 2 });
        assert_eq!(told(), [Unheard::Broken]);
        assert_eq!(told(), []);
        // The third begins before HTTP/2 has asked for more.
        count.begins();
        assert_eq!(told(), []);
        count.came(Heads { begun: 7, whole: 6 });
        count.looked_at(Heads { begun: 7, whole: 6 });
        count.is_one_too_many();
        count.begins();
        assert_eq!(told(), [Unheard::TooMany, Unheard::Broken]);
        let mut rest = Vec::new();
        count.tell_rest(Unheard::Ended, |why| rest.push(why));
        assert_eq!(rest, [Unheard::Ended]);
        count.tell_rest(Unheard::Ended, |why| panic!("{why:?}"));
    }
}
