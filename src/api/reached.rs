//! How far a request came on its way, told by those it comes by.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

use http::Extensions;

/// What a request has behind it. Goes with the request.
#[derive(Clone, Debug, Default)]
pub(super) struct Reached(Arc<ReachedPoints>);

#[derive(Debug, Default)]
struct ReachedPoints {
    /// The limits were asked about it: they charge it, or refuse it.
    limits: AtomicBool,
    /// Its end was counted, or will be.
    count: AtomicBool,
    /// There was no memory for what of it was not complete.
    lack: AtomicBool,
    /// The bytes of what was not complete on its connection, where they were too many.
    unfinished: AtomicU64,
    /// Its caller left before it was complete.
    left: AtomicBool,
}

impl Reached {
    /// How far the request came that has these extensions.
    pub(super) fn of(extensions: &Extensions) -> Option<&Self> {
        extensions.get()
    }

    /// The limits are asked.
    pub(super) fn limits(&self) {
        self.0.limits.store(true, Relaxed);
    }

    /// Its end is counted.
    pub(super) fn count(&self) {
        self.0.count.store(true, Relaxed);
    }

    /// There is no memory to read it to its end.
    pub(super) fn lacks_memory(&self) {
        self.0.lack.store(true, Relaxed);
    }

    /// Its connection has so many bytes of requests that are not complete, which are too many.
    pub(super) fn is_unfinished(&self, bytes: u64) {
        self.0.unfinished.store(bytes, Relaxed);
    }

    /// Its caller is gone, and the rest of it does not come.
    pub(super) fn is_left(&self) {
        self.0.left.store(true, Relaxed);
    }

    pub(super) fn was_left(&self) -> bool {
        self.0.left.load(Relaxed)
    }

    pub(super) fn was_unfinished(&self) -> Option<u64> {
        Some(self.0.unfinished.load(Relaxed)).filter(|bytes| *bytes > 0)
    }

    pub(super) fn has_lacked_memory(&self) -> bool {
        self.0.lack.load(Relaxed)
    }

    pub(super) fn has_limits(&self) -> bool {
        self.0.limits.load(Relaxed)
    }

    pub(super) fn has_count(&self) -> bool {
        self.0.count.load(Relaxed)
    }
}
