//! A place with a peer for what another room knows of it, for a while.
//!
//! There is no map of peers anywhere: what is kept here can neither be found for another process nor outgrow the
//! open connections. What it is, and how long it is believed, is decided by the room that keeps it; an idle connection
//! forgets it when its time is over.

use std::{
    any::Any,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::Instant;

/// Holds one value of any type, or none; it is dropped with the peer, or by [`PeerSlot::forget_old`].
#[derive(Default)]
pub(crate) struct PeerSlot(Mutex<Option<(Instant, Arc<dyn Any + Send + Sync>)>>);

impl PeerSlot {
    /// The value, if there is one of this type and its time is not over.
    pub(crate) fn load<T: Any + Send + Sync>(&self, now: Instant) -> Option<Arc<T>> {
        let kept =
            self.lock().as_ref().filter(|(until, _)| now < *until).map(|(_, kept)| Arc::clone(kept))?;
        kept.downcast().ok()
    }

    /// Keeps `next` until then, in place of what was kept.
    pub(crate) fn store<T: Any + Send + Sync>(&self, until: Instant, next: T) {
        self.replace(Some((until, Arc::new(next))));
    }

    /// Drops what is kept.
    pub(crate) fn clear(&self) {
        self.replace(None);
    }

    /// Drops what is kept if its time is over.
    pub(crate) fn forget_old(&self, now: Instant) {
        if self.lock().as_ref().is_some_and(|(until, _)| *until <= now) {
            self.clear();
        }
    }

    fn replace(&self, next: Option<(Instant, Arc<dyn Any + Send + Sync>)>) {
        let old = std::mem::replace(&mut *self.lock(), next);
        drop(old); // after the lock: it may free many selectors
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Instant, Arc<dyn Any + Send + Sync>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PeerSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PeerSlot(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_is_kept_is_dropped_when_its_time_is_over() {
        let slot = PeerSlot::default();
        let until = Instant::now();
        let before = until - Duration::from_millis(1);
        let value = Arc::new(());
        slot.store(until, Arc::clone(&value));
        slot.forget_old(before);
        assert!(slot.load::<Arc<()>>(before).is_some());
        assert!(slot.load::<String>(before).is_none(), "another type");
        assert!(slot.load::<Arc<()>>(until).is_none());
        assert_eq!(Arc::strong_count(&value), 2, "still kept, though not believed");
        slot.forget_old(until);
        assert_eq!(Arc::strong_count(&value), 1);
    }
}
