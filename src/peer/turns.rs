//! Whose turn it is in each request of a connection.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use tokio::time::Instant;

use super::{frames::BODY_OF_ANSWER, pauses::Pauses, unsent::Unsent};
use crate::limits::{
    budget::{HEAD, HTTP2, STREAM, UPLOAD, UPLOADS, WAITING, kept, unsent},
    holding::Holding,
};

/// So many requests of a connection may be unanswered while memory is out, before it is read no more for a moment.
const FEW: usize = 4;

/// Whose turn it is in each request of a connection: the server's, to answer; the peer's, to read; or nobody's, in
/// a stream that waits for news, or a request that waits until its answer fits ([`Unsent`]). Written by the tasks of the
/// streams, read by that of the connection. What HTTP/2, the requests and their answers take is told to the connection's
/// [`Holding`] as it comes and goes.
#[derive(Debug)]
pub(super) struct Turns {
    slots: Mutex<TurnSlots>,
    /// Heads of requests that came, whether they begin one or not.
    heads: AtomicU64,
    /// Bytes of requests that were read to their end, since somebody asked.
    read_whole: AtomicU64,
    holding: Arc<Holding>,
    pauses: Arc<Pauses>,
}

#[derive(Debug, Default)]
struct TurnSlots {
    /// As many as streams were open at once, with those that h2 had reset and not forgotten: h2 keeps the memory of as many
    /// as long as the connection lasts, and so does what is held.
    slots: Vec<TurnSlot>,
    open: usize,
    /// The most streams that h2 may have had at once: those that were open, with all whose heads came in one read.
    together: usize,
    last_ended: Option<Instant>,
    /// Requests that have begun.
    begun: u64,
    /// Once the agent ends.
    peers_time: Option<PeersTime>,
    /// Bytes of requests that are not complete.
    uploads: u64,
    unsent: Unsent,
    /// Bytes of buffers that h2 keeps with parts of bodies, which nobody reads while requests wait.
    pinned: u64,
}

/// What the peer has of time as the agent ends, to send the rest of its requests and to read their answers. It has it once, and not
/// anew with each step that it takes: else it would hold up the end as long as it likes.
#[derive(Debug)]
struct PeersTime {
    left: Duration,
    /// It runs since then, as the agent has nothing to do itself.
    runs_since: Option<Instant>,
    /// A request that is not whole by then is waited for no longer.
    whole_by: Instant,
}

/// One request: free once its answer has ended and every part of it has left for the kernel.
#[derive(Debug)]
struct TurnSlot {
    /// Which request of the connection it is.
    call: u64,
    /// It may hold up the end of the agent.
    in_time: bool,
    /// Its answer has not ended.
    open: bool,
    /// The answer has nothing to send for now: a stream that waits for news.
    rests: bool,
    /// It waits until its answer fits.
    waits: bool,
    /// It waits for the rest of the request.
    awaits_rest: bool,
    /// What its answer is reckoned at, while it is being made.
    reckoned: u64,
    /// Parts of the answer that hyper or h2 holds, because the peer has no room for them.
    parts: usize,
    /// What is held for the buffer of its open body.
    kept: u64,
    /// Bytes of its request, once that was read to its end, if it is worth an answer.
    request: u64,
    /// When it last came a step on.
    moved: Instant,
    /// Of who makes the answer, while it rests or waits.
    waker: Option<Waker>,
}

impl TurnSlot {
    fn is_free(&self) -> bool {
        !self.open && self.parts == 0
    }

    /// Since when it waits, for the server or for the peer. Who waits behind others is none of these: they are.
    fn waits_since(&self) -> Option<Instant> {
        let served = self.open && !self.rests && !self.waits;
        (self.parts > 0 || served).then_some(self.moved)
    }

    /// Whether it is for the agent to do what comes next.
    fn awaits_agent(&self) -> bool {
        self.open && !self.rests && !self.waits && !self.awaits_rest && self.parts == 0
    }

    /// The buffer of its body takes so much from then on, and what it took before no longer.
    fn keep(&mut self, bytes: u64, holding: &Holding) {
        holding.hold(bytes);
        holding.release(std::mem::replace(&mut self.kept, bytes));
    }

    fn keep_waker(&mut self, waker: &Waker) {
        match &mut self.waker {
            Some(before) => before.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }
}

impl TurnSlots {
    /// The slot, if it is this request's and its answer has not ended.
    fn open_slot(&mut self, at: usize, call: u64) -> Option<&mut TurnSlot> {
        self.slots.get_mut(at).filter(|slot| slot.call == call && slot.open)
    }

    /// Has the peer's time run as long as it is to, after anything that may change that.
    fn keep_peers_time(&mut self, now: Instant) {
        let Some(time) = &mut self.peers_time else { return };
        let mut awaits_agent = false;
        for slot in &mut self.slots {
            slot.in_time &= !slot.awaits_rest || now < time.whole_by;
            awaits_agent |= slot.in_time && slot.awaits_agent();
        }
        if !awaits_agent {
            time.runs_since.get_or_insert(now);
        } else if let Some(since) = time.runs_since.take() {
            time.left = time.left.saturating_sub(now.saturating_duration_since(since));
        }
    }

    /// Of the streams that h2 may have had at once, how many are none of the slots.
    fn unseen(&self) -> usize {
        self.together.saturating_sub(self.slots.len().max(1))
    }

    /// What is held for them all, beside the first.
    fn streams(&self) -> u64 {
        let bytes = |number: usize, each: u64| u64::try_from(number).unwrap_or(u64::MAX).saturating_mul(each);
        bytes(self.slots.len().saturating_sub(1), STREAM).saturating_add(bytes(self.unseen(), HEAD))
    }

    /// Whether a body may be left unread, since its answer waits, or is not read itself.
    fn leaves_unread(&self) -> bool {
        self.slots.iter().any(|slot| slot.waits || slot.parts > 0)
    }

    /// Ends what a slot's answer is reckoned at.
    fn end_reckoned(&mut self, at: usize) {
        if let Some(slot) = self.slots.get_mut(at) {
            self.unsent.end(std::mem::take(&mut slot.reckoned));
        }
    }

    /// Who has waited longest begins, if its answer fits: the waker of the first that has to be told.
    fn begin_next(&mut self, holding: &Holding) -> Option<Waker> {
        loop {
            let Some((at, reckoned)) = self.unsent.next() else {
                if self.pinned > 0 && !self.leaves_unread() {
                    holding.release(std::mem::take(&mut self.pinned));
                }
                return None;
            };
            holding.release(WAITING);
            if let Some(slot) = self.slots.get_mut(at) {
                slot.waits = false;
                slot.reckoned = reckoned;
                slot.moved = Instant::now();
                if let Some(waker) = slot.waker.take() {
                    return Some(waker);
                }
            }
        }
    }
}

/// Why there is no room for bytes of a request that is not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// Memory is short, the caller holds more than its share of it, and the connection has so many: more than [`UPLOADS`].
    OfConnection { bytes: u64 },
    /// The node has no memory for them.
    OfNode,
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
    /// No request yet. What HTTP/2 takes, with room for one, must be held already, and is released with this.
    pub(super) fn new(holding: Arc<Holding>) -> Self {
        let pauses = Arc::new(Pauses::new(Arc::clone(&holding)));
        let (heads, read_whole) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { slots: Mutex::default(), heads, read_whole, holding, pauses }
    }

    fn with<R>(&self, f: impl FnOnce(&mut TurnSlots) -> R) -> R {
        let mut turns = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut turns);
        if turns.peers_time.is_some() {
            turns.keep_peers_time(Instant::now());
        }
        result
    }

    pub(super) fn look(&self) -> Look {
        self.with(|turns| {
            let since = turns.slots.iter().filter_map(TurnSlot::waits_since).min();
            match (since, turns.open, turns.last_ended) {
                (Some(since), ..) => Look::Busy { since },
                (None, 1.., _) => Look::Open,
                (None, 0, Some(since)) => Look::Idle { since },
                (None, 0, None) => Look::NoRequestYet,
            }
        })
    }

    /// The agent ends: what begins from now on does not hold that up, nor does the peer for longer than `patience` in all. The
    /// first request may be on its way to a connection that is new.
    pub(super) fn end_begins(&self, now: Instant, patience: Duration) {
        self.with(|turns| {
            let time = PeersTime { left: patience, runs_since: Some(now), whole_by: now + patience };
            turns.peers_time = Some(time);
            turns.keep_peers_time(now);
        });
    }

    /// Once the agent ends: when the peer has had its time, unless the agent has something to do until then.
    pub(super) fn peer_has_until(&self) -> Option<Instant> {
        self.with(|turns| turns.peers_time.as_ref().and_then(|time| Some(time.runs_since? + time.left)))
    }

    /// Whether no request has come yet, or the first is on its way. Heads that begin none are not waited for.
    pub(super) fn is_new(&self) -> bool {
        self.heads.load(Relaxed) <= 1 && self.with(|turns| turns.begun == 0)
    }

    /// So many heads came in one read. h2 makes room for all of them before the first is looked at; without memory nothing
    /// further is read for a moment.
    pub(super) fn heads(&self, came: u32) {
        self.heads.fetch_add(came.into(), Relaxed);
        if came < 2 {
            return;
        }
        let came = usize::try_from(came).unwrap_or(usize::MAX);
        self.with(|turns| {
            let before = turns.streams();
            turns.together = turns.together.max(turns.open.saturating_add(came));
            let more = turns.streams().saturating_sub(before);
            if more > 0 && !self.holding.try_hold(more) {
                self.holding.hold(more);
                self.pauses.hold_up(Instant::now());
            }
        });
    }

    /// With parts of bodies h2 keeps so many bytes of the buffers that they came in, as long as these are not read. Without
    /// memory nothing further is read for a moment.
    pub(super) fn pins(&self, bytes: u32) {
        if bytes == 0 {
            return;
        }
        let bytes = u64::from(bytes);
        self.with(|turns| {
            if turns.leaves_unread() {
                turns.pinned = turns.pinned.saturating_add(bytes);
                if !self.holding.try_hold(bytes) {
                    self.holding.hold(bytes);
                    self.pauses.hold_up(Instant::now());
                }
            }
        });
    }

    /// Changes what may make room for another answer, and has those begin that fit then.
    fn update(&self, change: impl FnOnce(&mut TurnSlots)) {
        let mut next = self.with(|turns| {
            change(turns);
            turns.begin_next(&self.holding)
        });
        // Not within the lock: whoever wakes up takes it.
        while let Some(waker) = next {
            waker.wake();
            next = self.with(|turns| turns.begin_next(&self.holding));
        }
    }

    /// The same where the slot, which is in use, may be free then.
    fn update_to_its_end(&self, at: usize, change: impl FnOnce(&mut TurnSlots)) {
        self.update(|turns| {
            change(turns);
            if turns.slots.get(at).is_some_and(TurnSlot::is_free) {
                turns.open -= 1;
                turns.last_ended = Some(Instant::now());
            }
        });
    }

    /// When the connection is read no more.
    pub(super) fn pauses(&self) -> &Arc<Pauses> {
        &self.pauses
    }

    /// Wakes the streams that wait for news.
    pub(super) fn wake_resting(&self) {
        let wakers: Vec<Waker> = self.with(|turns| {
            turns.slots.iter_mut().filter(|slot| slot.rests).filter_map(|slot| slot.waker.take()).collect()
        });
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Counts bytes of a request that is not complete: none where its head came alone, which asks for nothing.
    ///
    /// # Errors
    /// [`NoRoom`]. They came, and are given back with the request that ends for it.
    pub(super) fn upload(&self, more: u64) -> Result<(), NoRoom> {
        self.with(|turns| {
            let held = UPLOAD.saturating_mul(more);
            let fits = more == 0 || self.holding.try_hold(held);
            if !fits {
                self.holding.hold(held);
            }
            turns.uploads = turns.uploads.saturating_add(more);
            if turns.uploads > UPLOADS && self.holding.is_above_share() {
                Err(NoRoom::OfConnection { bytes: turns.uploads })
            } else {
                fits.then_some(()).ok_or(NoRoom::OfNode)
            }
        })
    }

    /// Bytes of requests that were read to their end, since this was asked last.
    pub(super) fn take_read_whole(&self) -> u64 {
        self.read_whole.swap(0, Relaxed)
    }

    /// These bytes of a request wait no longer for its rest.
    pub(super) fn end_upload(&self, counted: u64) {
        self.with(|turns| turns.uploads = turns.uploads.saturating_sub(counted));
        self.holding.release(UPLOAD.saturating_mul(counted));
    }

    /// Ready when the answer of the slot may be made; it is reckoned from then on. Else who made `waker` is woken for it.
    fn poll_begin(&self, at: usize, waker: &Waker) -> Poll<()> {
        self.with(|turns| {
            let TurnSlots { slots, unsent, .. } = turns;
            let Some(slot) = slots.get_mut(at) else { return Poll::Ready(()) };
            if slot.reckoned > 0 {
                return Poll::Ready(());
            }
            if !slot.waits {
                if let Some(reckoned) = unsent.begin() {
                    slot.reckoned = reckoned;
                    return Poll::Ready(());
                }
                unsent.wait(at);
                slot.waits = true;
                self.holding.hold(WAITING);
            }
            slot.keep_waker(waker);
            Poll::Pending
        })
    }
}

impl Default for Turns {
    fn default() -> Self {
        Self::new(Arc::default())
    }
}

impl Drop for Turns {
    fn drop(&mut self) {
        let streams = self.with(|turns| turns.streams().saturating_add(turns.pinned));
        self.holding.release(HTTP2.saturating_add(streams));
    }
}

/// The place of one request in [`Turns`], held by whoever makes its answer.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    slot: usize,
    call: u64,
    /// What is made next was reckoned, as far as is known here.
    goes: bool,
    crowded: bool,
}

impl Turn {
    /// A request has come. Its answer may be made when [`Self::poll_begin`] says so. Without memory none waits behind
    /// others: [`Self::is_crowded`].
    pub(super) fn begin(turns: &Arc<Turns>) -> Self {
        let (slot, call, goes, crowded) = turns.with(|slots| {
            slots.open += 1;
            slots.begun += 1;
            let at = slots.slots.iter().position(TurnSlot::is_free).unwrap_or(slots.slots.len());
            let reckoned = slots.unsent.begin();
            // What is about to be refused for what its caller holds is refused at once: to wait takes memory.
            let out_of_memory = turns.holding.is_out_of_memory();
            let is_new = at >= slots.slots.len();
            // h2 has made room for it by now; it is told to go, and nothing further is read, until there is some.
            let further = if slots.unseen() > 0 { STREAM - HEAD } else { STREAM };
            let no_room = is_new && !slots.slots.is_empty() && !turns.holding.try_hold(further);
            if no_room {
                turns.holding.hold(further);
                turns.pauses.hold_up(Instant::now());
            }
            let crowded = no_room || reckoned.is_none() && out_of_memory;
            let unanswered = || slots.slots.iter().filter(|slot| slot.open && !slot.rests).count();
            if out_of_memory && unanswered() >= FEW {
                turns.pauses.hold_up(Instant::now());
            } else if reckoned.is_none() && !turns.holding.has_room() {
                turns.pauses.rest(Instant::now());
            }
            let waits = reckoned.is_none() && !crowded && !turns.holding.is_above_share();
            if waits {
                slots.unsent.wait(at);
                turns.holding.hold(WAITING);
            }
            let new = TurnSlot {
                call: slots.begun,
                in_time: slots.peers_time.is_none() || slots.begun == 1,
                open: true,
                rests: false,
                waits,
                awaits_rest: false,
                reckoned: reckoned.unwrap_or(0),
                parts: 0,
                kept: 0,
                request: 0,
                moved: Instant::now(),
                waker: None,
            };
            match slots.slots.get_mut(at) {
                Some(slot) => *slot = new,
                None => slots.slots.push(new),
            }
            (at, slots.begun, !waits, crowded)
        });
        Self { turns: Arc::clone(turns), slot, call, goes, crowded }
    }

    /// Whether it is to be refused at once: its answer does not fit what the connection may leave unread, and there is no
    /// memory to wait in.
    pub(super) fn is_crowded(&self) -> bool {
        self.crowded
    }

    /// Ready when its answer may be made, or go on.
    pub(super) fn poll_begin(&mut self, cx: &Context<'_>) -> Poll<()> {
        if !self.goes {
            ready!(self.turns.poll_begin(self.slot, cx.waker()));
            self.goes = true;
        }
        Poll::Ready(())
    }

    /// What it was asked for was no work to conserve: a refusal, an error of the caller's, or nothing any more. A long request was
    /// read for it, too.
    pub(super) fn wasted(&self) {
        let request = self.turns.with(|turns| turns.open_slot(self.slot, self.call).map(|slot| slot.request));
        let answers = request.unwrap_or(0) / u64::from(BODY_OF_ANSWER);
        for _ in 0..answers.max(1) {
            self.turns.pauses.wasted(Instant::now());
        }
    }

    /// For the body of its request.
    pub(super) fn upload(&self) -> Upload {
        let Self { turns, slot, call, .. } = self;
        let turns = Arc::clone(turns);
        let (gives_way, gave_way, is_whole) = (true, false, false);
        Upload { turns, slot: *slot, call: *call, counted: 0, gives_way, gave_way, is_whole }
    }

    /// The answer has nothing to send now; it is polled by whom the context wakes. Others may be made meanwhile.
    pub(super) fn rests(&mut self, cx: &Context<'_>) {
        self.goes = false;
        self.turns.update(|turns| {
            turns.end_reckoned(self.slot);
            if let Some(slot) = turns.slots.get_mut(self.slot) {
                slot.rests = true;
                slot.keep_waker(cx.waker());
            }
        });
    }

    /// A part of the answer is handed to hyper. What comes next need not fit, once: it is the end, mostly, without which
    /// the peer may not read on.
    pub(super) fn part(&mut self, bytes: Bytes) -> Part {
        let (held, kept) = (unsent(bytes.len()), kept(bytes.len()));
        self.turns.holding.hold(held);
        let mut reckoned = false;
        self.turns.update(|turns| {
            turns.unsent.made(held);
            if let Some(slot) = turns.slots.get_mut(self.slot) {
                slot.parts += 1;
                slot.keep(0, &self.turns.holding);
                slot.rests = false;
                slot.moved = Instant::now();
                reckoned = slot.reckoned > 0;
            }
            turns.end_reckoned(self.slot);
        });
        self.goes = reckoned;
        Part { bytes, held, kept, turns: Arc::clone(&self.turns), slot: self.slot, call: self.call }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.update_to_its_end(self.slot, |turns| {
            turns.end_reckoned(self.slot);
            if let Some(slot) = turns.slots.get_mut(self.slot) {
                slot.open = false;
                slot.keep(0, &self.turns.holding);
                slot.waker = None;
                if std::mem::take(&mut slot.waits) {
                    turns.unsent.leave(self.slot);
                    self.turns.holding.release(WAITING);
                }
            }
        });
    }
}

/// The bytes of one request, as long as it is not complete. It may outlive its [`Turn`].
#[derive(Debug)]
pub(super) struct Upload {
    turns: Arc<Turns>,
    slot: usize,
    call: u64,
    /// Bytes that count for the connection.
    counted: u64,
    /// Its answer is not made before it is complete: meanwhile others are.
    gives_way: bool,
    gave_way: bool,
    is_whole: bool,
}

impl Upload {
    /// It is read by who is being answered already, and by another task perhaps.
    pub(super) fn beside_its_answer(&mut self) {
        self.gives_way = false;
    }

    /// So many bytes came in all, and more are waited for. Others begin meanwhile: they may be what the peer waits for.
    ///
    /// # Errors
    /// As [`Turns::upload`].
    pub(super) fn waits(&mut self, came: u64) -> Result<(), NoRoom> {
        let more = came.saturating_sub(self.counted);
        self.counted = came;
        if self.gives_way && !self.gave_way {
            self.turns.update(|turns| {
                if let Some(slot) = turns.open_slot(self.slot, self.call) {
                    slot.awaits_rest = true;
                    turns.end_reckoned(self.slot);
                }
            });
            self.gave_way = true;
        }
        self.turns.upload(more)
    }

    /// Ready when the body may be read on: when its answer fits once more.
    pub(super) fn poll_goes_on(&mut self, cx: &Context<'_>) -> Poll<()> {
        let goes_on = |turns: &mut TurnSlots| {
            turns.open_slot(self.slot, self.call).map(|slot| slot.awaits_rest = false).is_some()
        };
        if self.gave_way && self.turns.with(goes_on) {
            ready!(self.turns.poll_begin(self.slot, cx.waker()));
        }
        self.gave_way = false;
        Poll::Ready(())
    }

    /// The request was read to its end, of so many bytes. They were for something, but for those that no request needs.
    pub(super) fn is_read_whole(&mut self, came: u64) {
        self.ends();
        if std::mem::replace(&mut self.is_whole, true) {
            return;
        }
        let request = came.min(UPLOADS);
        self.turns.read_whole.fetch_add(request, Relaxed);
        if request >= u64::from(BODY_OF_ANSWER) {
            self.turns.with(|turns| {
                if let Some(slot) = turns.open_slot(self.slot, self.call) {
                    slot.request = request;
                }
            });
        }
    }

    /// The request is complete, or given up.
    fn ends(&mut self) {
        let counted = std::mem::take(&mut self.counted);
        if counted > 0 {
            self.turns.end_upload(counted);
        }
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        self.ends();
    }
}

/// Bytes of an answer. h2 drops them when the kernel has taken the last of them, or when their stream is gone: the
/// only sign there is that a peer without a window has not pinned them.
pub(super) struct Part {
    bytes: Bytes,
    held: u64,
    /// What its body keeps of it.
    kept: u64,
    turns: Arc<Turns>,
    slot: usize,
    call: u64,
}

impl Drop for Part {
    fn drop(&mut self) {
        self.turns.holding.release(self.held);
        self.turns.update_to_its_end(self.slot, |turns| {
            turns.unsent.sent(self.held);
            if let Some(slot) = turns.slots.get_mut(self.slot) {
                slot.parts -= 1;
                slot.moved = Instant::now();
                if slot.open && slot.call == self.call {
                    slot.keep(self.kept, &self.turns.holding);
                }
            }
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
    use std::{
        sync::atomic::{AtomicBool, Ordering::SeqCst},
        task::Wake,
    };

    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;
    use crate::limits::{CallerKey, Gate};

    /// Where there is memory a request waits for those before it; without, a few are served at a time and the rest refused.
    #[tokio::test]
    async fn nobody_waits_behind_others_without_memory() {
        const BUDGET: u64 = 64 << 20;
        let gate = Gate::of_defaults(BUDGET);
        let permit = gate.open(CallerKey::Uid(1)).unwrap();
        permit.holding().hold(HTTP2);
        let (turns, others) =
            (Arc::new(Turns::new(Arc::clone(permit.holding()))), gate.open(CallerKey::Uid(2)).unwrap());
        let crowded = |requests: &[Turn]| requests.iter().filter(|turn| turn.is_crowded()).count();
        let many = || -> Vec<Turn> { (0..20).map(|_| Turn::begin(&turns)).collect() };
        let with_memory = many();
        assert_eq!(crowded(&with_memory), 0);
        drop(with_memory);
        let before = permit.holding().bytes();
        others.holding().hold(BUDGET * 9 / 10);
        let without = many();
        let served = without.len() - crowded(&without);
        assert!((1..=16).contains(&served), "{served} are served");
        let more = permit.holding().bytes() - before;
        assert_eq!(more, 0, "none of them waits, and there were as many before");
        drop(without);
        assert!(!Turn::begin(&turns).is_crowded(), "one alone is served");
        others.holding().release(BUDGET * 9 / 10);
        assert_eq!(crowded(&many()), 0, "there is room again");
    }

    /// The first request is waited for, and not one after the other that never begins.
    #[test]
    fn heads_that_begin_no_request_make_no_connection_new() {
        for (case, reads, begins, is_new) in [
            ("nothing came", &[][..], false, true),
            ("the preface", &[0], false, true),
            ("its head, and then its body", &[1, 0, 0], false, true),
            ("it has begun", &[1], true, false),
            ("a second one, and none has begun", &[1, 1], false, false),
            ("many at once", &[3], false, false),
        ] {
            let turns = Arc::<Turns>::default();
            reads.iter().for_each(|came| turns.heads(*came));
            let _turn = begins.then(|| Turn::begin(&turns));
            assert_eq!(turns.is_new(), is_new, "{case}");
        }
    }

    /// What happens on a connection.
    #[derive(Clone, Copy, Debug)]
    enum Event {
        Begins,
        /// So many heads come in one read.
        Heads(u32),
        /// Parts of bodies come with so much before them.
        Pins(u32),
        /// The task of the request is polled.
        Polled,
        Part(usize),
        Rests,
        /// Bytes came, and more are waited for.
        Uploads(u64),
        EndsUpload,
        Ends,
        Sent,
        WakesAll,
    }

    fn events() -> impl Strategy<Value = Vec<(Event, Index)>> {
        let event = prop_oneof![
            4 => Just(Event::Begins),
            1 => (0u32..12).prop_map(Event::Heads),
            1 => (0u32..16_000).prop_map(Event::Pins),
            6 => Just(Event::Polled),
            4 => (0usize..50_000).prop_map(Event::Part),
            2 => Just(Event::Rests),
            2 => (0u64..20_000).prop_map(Event::Uploads),
            1 => Just(Event::EndsUpload),
            2 => Just(Event::Ends),
            4 => Just(Event::Sent),
            1 => Just(Event::WakesAll),
        ];
        vec((event, any::<Index>()), 0..150)
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, SeqCst);
        }
    }

    /// A request, as its task sees it.
    struct Asked {
        turn: Turn,
        upload: Upload,
        came: u64,
        woken: Arc<Woken>,
        /// It was told to wait, and is not polled before it is woken.
        sleeps: bool,
        /// What its body keeps of the part that was sent last.
        kept: u64,
    }

    impl Asked {
        fn begin(turns: &Arc<Turns>) -> Self {
            let turn = Turn::begin(turns);
            let upload = turn.upload();
            Self { turn, upload, came: 0, woken: Arc::default(), sleeps: false, kept: 0 }
        }

        /// Whether it may go on.
        fn polled(&mut self) -> bool {
            let waker = Waker::from(Arc::clone(&self.woken));
            let cx = Context::from_waker(&waker);
            let begins = self.turn.poll_begin(&cx).is_ready() && self.upload.poll_goes_on(&cx).is_ready();
            self.sleeps = !begins;
            begins
        }

        fn happens(&mut self, event: Event, parts: &mut Vec<Part>) {
            let waker = Waker::from(Arc::clone(&self.woken));
            let cx = Context::from_waker(&waker);
            match event {
                Event::Part(bytes) if self.polled() => {
                    parts.push(self.turn.part(vec![0; bytes].into()));
                    self.kept = 0;
                }
                Event::Rests if self.polled() => self.turn.rests(&cx),
                Event::Uploads(bytes) if self.polled() => {
                    self.came += bytes;
                    let _room_or_not = self.upload.waits(self.came);
                }
                Event::EndsUpload if self.polled() => self.upload.is_read_whole(self.came),
                _ => {
                    self.polled();
                }
            }
        }
    }

    /// What is there, by another account than the one of [`Turns`].
    /// `most` is how many were in use at once, up to then, and `together` how many streams h2 may have had.
    fn there(turns: &Turns, requests: &[Asked], parts: &[Part], most: &mut usize, together: usize) -> u64 {
        let mut slots: Vec<usize> = requests.iter().map(|request| request.turn.slot).collect();
        slots.extend(parts.iter().map(|part| part.slot));
        slots.sort_unstable();
        slots.dedup();
        let unsent: u64 = parts.iter().map(|part| part.held).sum();
        let uploads: u64 =
            requests.iter().map(|request| request.upload.counted * UPLOAD + request.kept).sum();
        let waiting = turns.with(|turns| turns.slots.iter().filter(|slot| slot.waits).count());
        let number = |n: usize| u64::try_from(n).unwrap();
        *most = slots.len().max(*most);
        let heads = number(together.saturating_sub((*most).max(1))) * HEAD;
        HTTP2 + number(most.saturating_sub(1)) * STREAM + heads + unsent + uploads + number(waiting) * WAITING
    }

    proptest! {
        /// Whatever happens in whatever order: what is held is the sum of what is there, with room for as many streams as there
        /// ever were at once, and in the end nothing; who is
        /// told to wait is woken when it may go on, and nobody waits for nothing.
        #[test]
        fn what_is_held_is_what_is_there(events in events(), parts_outlive in any::<bool>()) {
            let holding = Arc::<Holding>::default();
            holding.hold(HTTP2);
            let turns = Arc::new(Turns::new(Arc::clone(&holding)));
            let (mut requests, mut parts, mut most, mut together) =
                (Vec::<Asked>::new(), Vec::<Part>::new(), 0, 0);
            let mut pinned = 0;
            for (event, index) in events {
                let unread = |turns: &Turns| turns.with(|turns| turns.leaves_unread());
                match event {
                    Event::Begins => requests.push(Asked::begin(&turns)),
                    Event::Pins(bytes) => {
                        pinned += if unread(&turns) { u64::from(bytes) } else { 0 };
                        turns.pins(bytes);
                    }
                    Event::Heads(came) => {
                        turns.heads(came);
                        if came > 1 {
                            let open = turns.with(|turns| turns.open);
                            together = together.max(open + usize::try_from(came).unwrap());
                        }
                    }
                    Event::Sent if !parts.is_empty() => {
                        let part = parts.swap_remove(index.index(parts.len()));
                        if let Some(of) = requests.iter_mut().find(|it| it.turn.call == part.call) {
                            of.kept = part.kept;
                        }
                        drop(part);
                    }
                    Event::WakesAll => turns.wake_resting(),
                    Event::Ends if !requests.is_empty() => {
                        drop(requests.swap_remove(index.index(requests.len())));
                    }
                    event if !requests.is_empty() => {
                        let request = index.get_mut(&mut requests);
                        if !request.sleeps || request.woken.0.swap(false, SeqCst) {
                            request.happens(event, &mut parts);
                        }
                    }
                    _ => {}
                }
                if !unread(&turns) {
                    pinned = 0;
                }
                let there = there(&turns, &requests, &parts, &mut most, together);
                prop_assert_eq!(holding.bytes(), there + pinned);
                for Asked { turn, woken, sleeps, .. } in &requests {
                    let waits = turns.with(|turns| turns.slots[turn.slot].waits);
                    prop_assert!(!sleeps || waits || woken.0.load(SeqCst), "not woken");
                }
            }
            if parts_outlive {
                drop(requests);
                drop(parts);
            } else {
                drop(parts);
                drop(requests);
            }
            prop_assert!(turns.with(|turns| turns.slots.iter().all(TurnSlot::is_free) && turns.open == 0));
            drop(turns);
            prop_assert_eq!(holding.bytes(), 0);
        }
    }

    /// Of one that comes to nothing what it was read for counts too, up to the largest there is; and what was read to its end is
    /// told once.
    #[test]
    fn a_long_request_that_comes_to_nothing_is_as_many_answers() {
        let gate = Gate::of_defaults(64 << 20);
        let refused = |uid, bytes| {
            let permit = gate.open(CallerKey::Uid(uid)).unwrap();
            permit.holding().hold(HTTP2);
            let turns = Arc::new(Turns::new(Arc::clone(permit.holding())));
            let mut requests = 0;
            while permit.holding().waits().is_none() {
                let turn = Turn::begin(&turns);
                let mut upload = turn.upload();
                upload.is_read_whole(bytes);
                upload.is_read_whole(bytes);
                assert_eq!(turns.take_read_whole(), bytes.min(UPLOADS));
                turn.wasted();
                requests += 1;
            }
            requests
        };
        let short = refused(1, 100);
        assert!(short >= 500, "{short}");
        for (uid, bytes, answers) in [(2, 2_000, 1), (3, 16 * 1024, 8), (4, 1 << 30, 34)] {
            let long = refused(uid, bytes);
            assert!(
                (short / answers / 2..=short / answers + 1).contains(&long),
                "{bytes}: {long} of {short}"
            );
        }
    }

    /// Bodies that trickle keep nobody from an answer, and are answered in their turn.
    #[test]
    fn a_request_that_waits_for_its_rest_gives_way() {
        let turns = Arc::new(Turns::default());
        let mut requests: Vec<Asked> = (0..8).map(|_| Asked::begin(&turns)).collect();
        let begun = |requests: &mut [Asked]| requests.iter_mut().map(Asked::polled).collect::<Vec<_>>();
        assert_eq!(begun(&mut requests), [true, true, true, true, false, false, false, false]);
        for request in &mut requests[..4] {
            assert_eq!(request.upload.waits(10), Ok(()));
        }
        assert!(requests[4..].iter().all(|request| request.woken.0.load(SeqCst)));
        assert_eq!(begun(&mut requests[4..]), [true; 4]);
        assert_eq!(begun(&mut requests[..4]), [false; 4], "now the others are being answered");
        drop(requests.split_off(4));
        assert_eq!(begun(&mut requests), [true; 4]);
    }
}
