//! A place with a peer for what another room knows of it.
//!
//! There is no map of peers anywhere: what is kept here can neither be found for another process nor outgrow the
//! open connections. What it is, and how long it is believed, is decided by the room that keeps it.

use std::{
    any::Any,
    sync::{Arc, Mutex, PoisonError},
};

/// Holds one value of any type, or none; it is dropped with the peer.
#[derive(Debug, Default)]
pub(crate) struct PeerSlot(Mutex<Option<Arc<dyn Any + Send + Sync>>>);

impl PeerSlot {
    /// The value, if there is one of this type.
    pub(crate) fn load<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        kept.downcast().ok()
    }

    /// Replaces the value; `None` drops it.
    pub(crate) fn store<T: Any + Send + Sync>(&self, next: Option<T>) {
        let next = next.map(|next| -> Arc<dyn Any + Send + Sync> { Arc::new(next) });
        let old = {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *kept, next)
        };
        drop(old); // after the lock: it may free a thousand selectors
    }
}
