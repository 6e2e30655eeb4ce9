//! Whose turn it is in each request of a connection.

use std::{
    sync::{Arc, Mutex, PoisonError},
    task::Waker,
};

use bytes::{Buf, Bytes};
use tokio::time::Instant;

use crate::limits::{
    budget::{HTTP2, STREAM, UPLOAD, UPLOADS, unsent},
    holding::Holding,
};

/// Whose turn it is in each request of a connection: the server's, to answer; the peer's, to read; or nobody's, in
/// a stream that waits for news. Written by the tasks of the streams, read by that of the connection. What HTTP/2, the
/// requests and their answers take is told to the connection's [`Holding`] as it comes and goes.
#[derive(Debug)]
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
#[derive(Debug)]
struct TurnSlot {
    /// Its answer has not ended.
    open: bool,
    /// The answer has nothing to send for now: a stream that waits for news.
    rests: bool,
    /// Parts of the answer that hyper or h2 holds, because the peer has no room for them.
    parts: usize,
    /// When it last came a step on.
    moved: Instant,
    /// Of who makes the answer, while it rests.
    waker: Option<Waker>,
}

impl TurnSlot {
    fn is_free(&self) -> bool {
        !self.open && self.parts == 0
    }

    /// Since when it waits, for the server or for the peer.
    fn waits_since(&self) -> Option<Instant> {
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
    /// No request yet: what HTTP/2 takes, with room for one, is held.
    pub(super) fn new(holding: Arc<Holding>) -> Self {
        holding.hold(HTTP2);
        Self { slots: Mutex::default(), holding }
    }

    fn with<R>(&self, f: impl FnOnce(&mut TurnSlots) -> R) -> R {
        f(&mut self.slots.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn look(&self) -> Look {
        self.with(|turns| {
            let waits_since = turns.slots.iter().filter_map(TurnSlot::waits_since).min();
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
                    if turns.open > 0 {
                        self.holding.release(STREAM);
                    }
                }
            }
        });
    }

    /// Wakes the streams that wait for news.
    pub(super) fn wake_resting(&self) {
        let wakers: Vec<Waker> = self.with(|turns| {
            turns.slots.iter_mut().filter(|slot| slot.rests).filter_map(|slot| slot.waker.take()).collect()
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Counts bytes of a request that is not complete. Returns whether there is room for them.
    pub(super) fn upload(&self, more: u64) -> bool {
        self.with(|turns| {
            turns.uploads = turns.uploads.saturating_add(more);
            self.holding.hold(UPLOAD.saturating_mul(more));
            turns.uploads <= UPLOADS
        })
    }

    /// These bytes of a request wait no longer for its rest.
    pub(super) fn end_upload(&self, counted: u64) {
        self.with(|turns| turns.uploads = turns.uploads.saturating_sub(counted));
        self.holding.release(UPLOAD.saturating_mul(counted));
    }
}

impl Default for Turns {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        self.holding.release(HTTP2);
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
        let new = TurnSlot { open: true, rests: false, parts: 0, moved: Instant::now(), waker: None };
        let slot = turns.with(|slots| {
            if slots.open > 0 {
                turns.holding.hold(STREAM);
            }
            slots.open += 1;
            if let Some((free, slot)) = slots.slots.iter_mut().enumerate().find(|(_, slot)| slot.is_free()) {
                *slot = new;
                free
            } else {
                slots.slots.push(new);
                slots.slots.len() - 1
            }
        });
        Self { turns: Arc::clone(turns), slot }
    }

    /// The answer has nothing to send now; it is polled by whom `waker` wakes.
    pub(super) fn rests(&self, waker: &Waker) {
        self.turns.update(self.slot, |slot| {
            slot.rests = true;
            match &mut slot.waker {
                Some(before) => before.clone_from(waker),
                none => *none = Some(waker.clone()),
            }
        });
    }

    /// A part of the answer is handed to hyper.
    pub(super) fn part(&self, bytes: Bytes) -> Part {
        let now = Instant::now();
        let held = unsent(bytes.len());
        self.turns.holding.hold(held);
        self.turns.update(self.slot, |slot| {
            slot.parts += 1;
            slot.rests = false;
            slot.moved = now;
        });
        Part { bytes, held, turns: Arc::clone(&self.turns), slot: self.slot }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.update(self.slot, |slot| {
            slot.open = false;
            slot.waker = None;
        });
    }
}

/// Bytes of an answer. h2 drops them when the kernel has taken the last of them, or when their stream is gone: the
/// only sign there is that a peer without a window has not pinned them.
pub(super) struct Part {
    bytes: Bytes,
    held: u64,
    turns: Arc<Turns>,
    slot: usize,
}

impl Drop for Part {
    fn drop(&mut self) {
        let now = Instant::now();
        self.turns.holding.release(self.held);
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

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    /// What happens on a connection.
    #[derive(Clone, Debug)]
    enum Event {
        Begins,
        Part(Index, usize),
        Rests(Index),
        Uploads(Index, u64),
        EndsUpload(Index),
        Ends(Index),
        Sent(Index),
    }

    fn events() -> impl Strategy<Value = Vec<Event>> {
        let index = any::<Index>;
        let event = prop_oneof![
            Just(Event::Begins),
            (index(), 0usize..50_000).prop_map(|(at, bytes)| Event::Part(at, bytes)),
            index().prop_map(Event::Rests),
            (index(), 0u64..20_000).prop_map(|(at, bytes)| Event::Uploads(at, bytes)),
            index().prop_map(Event::EndsUpload),
            index().prop_map(Event::Ends),
            index().prop_map(Event::Sent),
        ];
        vec(event, 0..80)
    }

    proptest! {
        /// Whatever happens in whatever order: what is held is the sum of what is there, and in the end nothing.
        #[test]
        fn what_is_held_is_what_is_there(events in events(), parts_outlive in any::<bool>()) {
            let holding = Arc::<Holding>::default();
            let turns = Arc::new(Turns::new(Arc::clone(&holding)));
            let mut requests: Vec<(Turn, u64, usize)> = Vec::new();
            let mut parts: Vec<Part> = Vec::new();
            for event in events {
                let at = |index: &Index| (!requests.is_empty()).then(|| index.index(requests.len()));
                match event {
                    Event::Begins => {
                        let turn = Turn::begin(&turns);
                        let slot = turn.slot;
                        requests.push((turn, 0, slot));
                    }
                    Event::Part(index, bytes) => if let Some(at) = at(&index) {
                        parts.push(requests[at].0.part(vec![0; bytes].into()));
                    },
                    Event::Rests(index) => if let Some(at) = at(&index) {
                        requests[at].0.rests(Waker::noop());
                    },
                    Event::Uploads(index, bytes) => if let Some(at) = at(&index) {
                        turns.upload(bytes);
                        requests[at].1 += bytes;
                    },
                    Event::EndsUpload(index) => if let Some(at) = at(&index) {
                        turns.end_upload(std::mem::take(&mut requests[at].1));
                    },
                    Event::Ends(index) => if let Some(at) = at(&index) {
                        let (turn, uploaded, _) = requests.swap_remove(at);
                        drop(turn);
                        turns.end_upload(uploaded);
                    },
                    Event::Sent(index) => if !parts.is_empty() {
                        let at = index.index(parts.len());
                        parts.swap_remove(at);
                    },
                }
                let mut slots: Vec<usize> = requests.iter().map(|(.., slot)| *slot).collect();
                slots.extend(parts.iter().map(|part| part.slot));
                slots.sort_unstable();
                slots.dedup();
                let streams = u64::try_from(slots.len().saturating_sub(1)).unwrap() * STREAM;
                let unsent: u64 = parts.iter().map(|part| part.held).sum();
                let uploads: u64 = requests.iter().map(|(_, uploaded, _)| uploaded * UPLOAD).sum();
                prop_assert_eq!(holding.bytes(), HTTP2 + streams + unsent + uploads);
            }
            for (_, uploaded, _) in &requests {
                turns.end_upload(*uploaded);
            }
            drop(turns);
            if parts_outlive {
                drop(requests);
                drop(parts);
            } else {
                drop(parts);
                drop(requests);
            }
            prop_assert_eq!(holding.bytes(), 0);
        }
    }
}
