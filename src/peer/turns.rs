//! Whose turn it is in each request of a connection.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, Bytes};
use tokio::time::Instant;

use crate::limits::{budget::UPLOADS, holding::Holding};

/// Whose turn it is in each request of a connection: the server's, to answer; the peer's, to read; or nobody's, in
/// a stream that waits for news. Written by the tasks of the streams, read by that of the connection.
#[derive(Debug, Default)]
pub(super) struct Turns {
    slots: Mutex<TurnSlots>,
    holding: Arc<Holding>,
}

#[derive(Debug, Default)]
struct TurnSlots {
    /// As many as streams may be open at once, and those that h2 has reset but not forgotten.
    slots: Vec<TurnSlot>,
    open: usize,
    last_ended: Option<Instant>,
    /// Bytes of requests that are not complete.
    uploads: u64,
}

/// One request: free once its answer has ended and every part of it has left for the kernel.
#[derive(Clone, Copy, Debug)]
struct TurnSlot {
    /// Its answer has not ended.
    open: bool,
    /// The answer has nothing to send for now: a stream that waits for news.
    rests: bool,
    /// Parts of the answer that hyper or h2 holds, because the peer has no room for them.
    parts: usize,
    /// When it last came a step on.
    moved: Instant,
}

impl TurnSlot {
    fn is_free(self) -> bool {
        !self.open && self.parts == 0
    }

    /// Since when it waits, for the server or for the peer.
    fn waits_since(self) -> Option<Instant> {
        (self.parts > 0 || self.open && !self.rests).then_some(self.moved)
    }
}

/// What the connection's task wants to know.
#[derive(Clone, Copy, Debug)]
pub(super) enum Look {
    NoRequestYet,
    /// Something waits since then.
    Busy {
        since: Instant,
    },
    /// Streams are open, and none waits.
    Open,
    Idle {
        since: Instant,
    },
}

impl Turns {
    /// Nothing yet; what is held is told to `holding`.
    pub(super) fn new(holding: Arc<Holding>) -> Self {
        Self { slots: Mutex::default(), holding }
    }

    fn with<R>(&self, f: impl FnOnce(&mut TurnSlots) -> R) -> R {
        f(&mut self.slots.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn look(&self) -> Look {
        self.with(|turns| {
            let waits_since = turns.slots.iter().filter_map(|slot| slot.waits_since()).min();
            match (waits_since, turns.open, turns.last_ended) {
                (Some(since), ..) => Look::Busy { since },
                (None, 1.., _) => Look::Open,
                (None, 0, Some(since)) => Look::Idle { since },
                (None, 0, None) => Look::NoRequestYet,
            }
        })
    }

    /// Changes a slot that is in use.
    fn update(&self, at: usize, change: impl FnOnce(&mut TurnSlot)) {
        self.with(|turns| {
            if let Some(slot) = turns.slots.get_mut(at) {
                change(slot);
                if slot.is_free() {
                    turns.open -= 1;
                    turns.last_ended = Some(Instant::now());
                }
            }
        });
    }

    /// Counts bytes of a request that is not complete. Returns whether there is room for them.
    pub(super) fn upload(&self, more: u64) -> bool {
        self.with(|turns| {
            turns.uploads = turns.uploads.saturating_add(more);
            self.holding.hold(more);
            turns.uploads <= UPLOADS
        })
    }

    /// These bytes of a request wait no longer for its rest.
    pub(super) fn end_upload(&self, counted: u64) {
        self.with(|turns| turns.uploads = turns.uploads.saturating_sub(counted));
        self.holding.release(counted);
    }
}

/// The place of one request in [`Turns`], held by whoever makes its answer.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    slot: usize,
}

impl Turn {
    pub(super) fn begin(turns: &Arc<Turns>) -> Self {
        let new = TurnSlot { open: true, rests: false, parts: 0, moved: Instant::now() };
        let slot = turns.with(|turns| {
            turns.open += 1;
            if let Some((free, slot)) = turns.slots.iter_mut().enumerate().find(|(_, slot)| slot.is_free()) {
                *slot = new;
                free
            } else {
                turns.slots.push(new);
                turns.slots.len() - 1
            }
        });
        Self { turns: Arc::clone(turns), slot }
    }

    /// The answer has nothing to send now.
    pub(super) fn rests(&self) {
        self.turns.update(self.slot, |slot| slot.rests = true);
    }

    /// A part of the answer is handed to hyper.
    pub(super) fn part(&self, bytes: Bytes) -> Part {
        let now = Instant::now();
        self.turns.update(self.slot, |slot| {
            slot.parts += 1;
            slot.rests = false;
            slot.moved = now;
        });
        Part { bytes, turns: Arc::clone(&self.turns), slot: self.slot }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.update(self.slot, |slot| slot.open = false);
    }
}

/// Bytes of an answer. h2 drops them when the kernel has taken the last of them, or when their stream is gone: the
/// only sign there is that a peer without a window has not pinned them.
pub(super) struct Part {
    bytes: Bytes,
    turns: Arc<Turns>,
    slot: usize,
}

impl Drop for Part {
    fn drop(&mut self) {
        let now = Instant::now();
        self.turns.update(self.slot, |slot| {
            slot.parts -= 1;
            slot.moved = now;
        });
    }
}

impl Buf for Part {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, n: usize) {
        self.bytes.advance(n);
    }
}
