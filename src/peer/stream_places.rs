//! The places for calls on one connection: when all are taken its client keeps further calls to itself, and nobody sees them.
//!
//! That is how HTTP/2 has it (`SETTINGS_MAX_CONCURRENT_STREAMS`), and ends when an earlier call does. Where all that are open
//! are streams that wait for news, it may be never.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
};

use super::{
    stats::{ConnectionStats, FullConnection},
    turns::{Look, Turns},
};

/// Those of one connection. Read by its task, and written by those of its calls too.
#[derive(Debug)]
pub(super) struct StreamPlaces {
    most: u32,
    taken: AtomicU32,
    /// One was free since this was asked last.
    was_free: AtomicBool,
}

impl StreamPlaces {
    /// So many, all free.
    pub(super) fn new(most: u32) -> Self {
        Self { most, taken: AtomicU32::new(0), was_free: AtomicBool::new(true) }
    }

    /// A call takes one as long as what is returned is kept. h2 lets no more begin than there are.
    pub(super) fn take(self: &Arc<Self>) -> StreamPlace {
        self.taken.fetch_add(1, Relaxed);
        StreamPlace(Arc::clone(self))
    }

    fn are_taken(&self) -> bool {
        self.taken.load(Relaxed) >= self.most
    }
}

/// One that is taken.
#[derive(Debug)]
pub(super) struct StreamPlace(Arc<StreamPlaces>);

impl Drop for StreamPlace {
    fn drop(&mut self) {
        self.0.was_free.store(true, Relaxed);
        self.0.taken.fetch_sub(1, Relaxed);
    }
}

/// Looks whether a connection is full: all places are taken, and by streams that wait for news.
#[derive(Debug)]
pub(super) struct FullLook {
    places: Arc<StreamPlaces>,
    stats: Arc<ConnectionStats>,
    full: Option<FullConnection>,
}

impl FullLook {
    pub(super) fn new(places: &Arc<StreamPlaces>, stats: &Arc<ConnectionStats>) -> Self {
        Self { places: Arc::clone(places), stats: Arc::clone(stats), full: None }
    }

    /// Looks. With how many calls it is full, if it has become so since the last look.
    pub(super) fn look(&mut self, turns: &Turns) -> Option<u32> {
        if !self.places.are_taken() {
            self.full = None;
            return None;
        }
        let is_known = self.full.is_some() && !self.places.was_free.load(Relaxed);
        if is_known || !matches!(turns.look(), Look::Open) {
            return None;
        }
        self.places.was_free.store(false, Relaxed);
        self.full = Some(FullConnection::count(&self.stats));
        Some(self.places.most)
    }
}
