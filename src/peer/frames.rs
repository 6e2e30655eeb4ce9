//! The frames of a peer, walked byte by byte as they arrive, before HTTP/2 sees them.
//!
//! Frames that ask for nothing (PING, SETTINGS, WINDOW_UPDATE, empty DATA, unknown ones) are held to a
//! [`FrameBudget`], since h2 answers them for ever; those beyond what a request brings along count as
//! [waste](crate::limits::waste). Fields behind the body of a request are nobody's in gRPC, and h2 would keep them until
//! somebody asks: it is made to reset their stream. Header blocks are handed to [`hpack`](super::hpack),
//! which writes over `:authority`. Where a block lacks something, its frame becomes longer, if its head has not gone on yet:
//! [`passage`](super::passage) keeps that back.
//!
//! Nothing is trusted and nothing is judged: what is not HTTP/2, or breaks its rules, passes as it is, and h2 refuses
//! it. The state is a few dozen bytes per connection; nothing is buffered or copied here.

use tokio::time::Instant;

use super::hpack::{Hpack, Lacking};

/// What a peer may send that is no request, in bytes. Each new request fills it up again, and so does time, so that
/// the pings and window updates of a stream that lives for months never reach the end of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameBudget {
    /// How much at once.
    pub burst: u32,
    /// How much comes back each second.
    pub per_second: u32,
}

impl FrameBudget {
    /// 32 KiB at once (about 1,900 pings), and 1 KiB (60 pings) each second: an honest client sends a few frames for
    /// each message that it receives, and a ping every ten seconds.
    pub const DEFAULT: Self = Self { burst: 32 * 1024, per_second: 1024 };
}

impl Default for FrameBudget {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// More frames without a request than the budget holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many frames without a request")]
pub struct Flood;

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PREFACE_LENGTH: u32 = 24;

/// Length of a frame's head (RFC 9113, section 4.1).
const FRAME_HEAD: u32 = 9;

/// What a frame of DATA costs beyond its head. Its payload costs nothing, as long as it may be a request's: a large one must not
/// look like a flood.
const DATA_COST: u32 = 8;

/// How much of a frame may have passed, its head included, where something is put into it: `:authority` is one of the first
/// four fields, and nobody calls a method with a longer name.
pub(super) const MAY_GROW: u32 = 256;

/// How many bytes of a kind are for something. What is beyond is [waste](crate::limits::waste): it counts as answers that were no
/// work to conserve.
#[derive(Clone, Copy, Debug)]
struct UsefulBytes {
    /// So many may come before the first request, so many more with each, and so many are kept for later ones at most.
    at_first: u32,
    with_request: u32,
    at_most: u32,
    /// So many beyond that are one answer: a multiple of [`PARTS`].
    to_an_answer: u32,
}

/// So many bytes of bodies that come to nothing are as much work as an answer: a read brings no more.
pub(super) const BODY_OF_ANSWER: u32 = 2 * 1024;

/// What is beyond is counted in so many parts of an answer.
const PARTS: u32 = 128;

impl UsefulBytes {
    /// Frames that are no request: SETTINGS, a PING or two, WINDOW_UPDATEs. Of those beyond some eight are an answer.
    const BESIDE: Self = Self { at_first: 1024, with_request: 256, at_most: 1024, to_an_answer: 128 };
    /// A request's head: ten fields as clients of gRPC write them. h2 walks the fields of one that is malformed to its end, and
    /// one byte can be a field.
    const HEAD: Self = Self { at_first: 0, with_request: 512, at_most: 512, to_an_answer: 128 };
    /// Bodies: as many as the largest has, before the first. Those of a request that is read to its end come back
    /// ([`Filter::read_whole`]). h2 throws away what comes for one that was answered or reset, and gives its window back: that
    /// does not bound it.
    const BODY: Self =
        Self { at_first: 68 * 1024, with_request: 0, at_most: 256 * 1024, to_an_answer: BODY_OF_ANSWER };

    /// What is `left` with another request.
    fn filled(self, left: u32) -> u32 {
        self.with(left, self.with_request)
    }

    /// What is `left` with so many more.
    fn with(self, left: u32, more: u32) -> u32 {
        left.saturating_add(more).min(self.at_most)
    }

    /// Takes so many bytes of what is `left`. Returns what is beyond it, in parts of an answer.
    fn spend(self, left: &mut u32, bytes: u32) -> u32 {
        let beyond = bytes.saturating_sub(*left);
        *left = left.saturating_sub(bytes);
        beyond / (self.to_an_answer / PARTS)
    }
}

/// What comes before a DATA, back to the one before it, is in the same buffer of h2's; more of it than this is told.
const WORTH_TELLING: u32 = 512;
/// The largest buffer of h2's, and so the most that a DATA keeps of what came before it.
const BUFFER: u32 = 16 * 1024;

/// A longer frame than this is not for every peer to take (RFC 9113, section 4.2), so none is made.
const LONGEST_FRAME: u32 = 16 * 1024;

/// What has passed of the bytes that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Walked {
    /// So many of them.
    pub(super) bytes: usize,
    /// How the frame that is passing changes before the others pass.
    pub(super) change: Option<FrameChange>,
}

/// How a frame changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FrameChange {
    /// So many bytes of it have passed, its head included.
    pub(super) so_far: usize,
    /// The first five bytes of its head are then these: its length, its type, its flags.
    pub(super) head: [u8; 5],
    /// These follow what has passed of it.
    pub(super) behind: &'static [u8],
}

/// Request heads of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heads {
    /// So many have begun.
    pub(super) begun: u64,
    /// And so many have come whole.
    pub(super) whole: u64,
}

/// Walks the bytes of one connection from its start. Pure: bytes in, the same number of bytes out, and what to put between
/// them.
#[derive(Clone, Debug)]
pub struct Filter {
    at: Position,
    /// Whether the HEADERS or CONTINUATION that is passing is the last of its header block.
    ends_block: bool,
    /// Between a HEADERS without END_HEADERS and the end of its block.
    in_block: bool,
    /// Bytes of that block so far, and of the frame that is passing.
    block: u32,
    length: u32,
    /// Type and flags of that frame.
    kind: [u8; 2],
    /// So many bytes of it have passed, its head included.
    so_far: u32,
    hpack: Hpack,
    last_stream: u32,
    /// The stream whose request ends with the frame that is passing, or with its header block.
    ends: Option<u32>,
    /// The highest stream whose request has passed to its end.
    last_whole: u32,
    /// Streams that began since somebody asked.
    began: u32,
    /// All that began.
    heads: u64,
    /// The newest of them was not whole when the last frame began.
    in_head: bool,
    budget: FrameBudget,
    left: u32,
    filled_at: Instant,
    /// What is left of [`UsefulBytes`] beside requests, and of bodies; and what came beyond it, in parts of an answer.
    beside: u32,
    bodies: u32,
    wasted: u32,
    /// Bytes since the last DATA; the stream of that, and how much came for this stream alone; and of what came before a DATA,
    /// what nobody was told of.
    since_data: u32,
    run: DataRun,
    pinned: u32,
}

/// DATA of one stream, with none of another between.
#[derive(Clone, Copy, Debug, Default)]
struct DataRun {
    stream: u32,
    bytes: u32,
}

/// Where in the stream of bytes.
#[derive(Clone, Copy, Debug)]
enum Position {
    /// So many bytes of the preface have passed.
    Preface(usize),
    /// So many bytes of a frame's head have passed.
    Head { passed: usize, head: [u8; 9] },
    /// The length of the padding comes next.
    PadLength { rest: u32, priority: u32 },
    /// Bytes that do not matter, and then a part of a header block with padding behind it.
    Skip { left: u32, fragment: u32, padding: u32 },
    /// A part of a header block.
    Fragment { left: u32, padding: u32 },
    /// Not HTTP/2: everything passes.
    Opaque,
    /// The budget was spent: nothing passes any more.
    Flooded,
}

impl Filter {
    /// At the start of a connection.
    pub fn new(budget: FrameBudget, now: Instant) -> Self {
        Self {
            at: Position::Preface(0),
            ends_block: false,
            in_block: false,
            block: 0,
            length: 0,
            kind: [0; 2],
            so_far: 0,
            hpack: Hpack::Start,
            last_stream: 0,
            ends: None,
            last_whole: 0,
            began: 0,
            heads: 0,
            in_head: false,
            budget,
            left: budget.burst,
            filled_at: now,
            beside: UsefulBytes::BESIDE.at_first,
            bodies: UsefulBytes::BODY.at_first,
            wasted: 0,
            since_data: 0,
            run: DataRun::default(),
            pinned: 0,
        }
    }

    /// Lets the next bytes of the connection pass, up to where a frame changes, and writes over those of an authority. `now` is
    /// asked only when the budget is spent.
    ///
    /// # Errors
    /// [`Flood`]: the connection is to be closed.
    pub(super) fn pass(&mut self, bytes: &mut [u8], now: impl Fn() -> Instant) -> Result<Walked, Flood> {
        let all = bytes.len();
        let mut bytes = bytes;
        while let Some(next) = bytes.first().copied() {
            let available = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let mut change = None;
            let used = match &mut self.at {
                Position::Opaque => break,
                Position::Flooded => return Err(Flood),
                Position::Preface(0) if bytes.starts_with(PREFACE) => {
                    self.at = Position::HEAD;
                    PREFACE_LENGTH
                }
                Position::Preface(passed) => {
                    if PREFACE.get(*passed) == Some(&next) {
                        *passed += 1;
                        if *passed == PREFACE.len() {
                            self.at = Position::HEAD;
                        }
                    } else {
                        self.at = Position::Opaque;
                    }
                    1
                }
                Position::Head { passed: 0, .. } if available >= FRAME_HEAD => {
                    change = self.begin(bytes.first_chunk().copied().unwrap_or_default(), &now)?;
                    FRAME_HEAD
                }
                Position::Head { passed, head } => {
                    if let Some(byte) = head.get_mut(*passed) {
                        *byte = next;
                    }
                    *passed += 1;
                    if *passed == head.len() {
                        let head = *head;
                        change = self.begin(head, &now)?;
                    }
                    1
                }
                Position::PadLength { rest, priority } => {
                    let (rest, priority, padding) = (*rest, *priority, u32::from(next));
                    // A pad length beyond the payload is h2's to refuse: nothing of the frame is a fragment then.
                    self.at = match rest.checked_sub(priority).and_then(|rest| rest.checked_sub(padding)) {
                        Some(fragment) => Position::Skip { left: priority, fragment, padding },
                        None => Position::Skip { left: rest, fragment: 0, padding: 0 },
                    };
                    self.settle();
                    1
                }
                Position::Skip { left, .. } => {
                    let used = available.min(*left);
                    *left -= used;
                    self.settle();
                    used
                }
                Position::Fragment { left, .. } => {
                    let fragment = bytes.get_mut(..size(available.min(*left))).unwrap_or_default();
                    let (used, missing) = self.hpack.step(fragment);
                    *left -= used;
                    change = missing.and_then(|missing| self.grow(used, missing));
                    if let Some(byte) = fragment.first_mut().filter(|_| change.is_some()) {
                        *byte = Lacking::BECOMES;
                    }
                    self.settle();
                    used
                }
            };
            self.so_far = match self.at {
                Position::Preface(_) | Position::Head { passed: 0, .. } => 0,
                _ => self.so_far.saturating_add(used),
            };
            bytes = bytes.split_at_mut_checked(size(used)).map(|(_, rest)| rest).unwrap_or_default();
            if change.is_some() {
                return Ok(Walked { bytes: all - bytes.len(), change });
            }
        }
        Ok(Walked { bytes: all, change: None })
    }

    /// How many of the last bytes that have passed are those of a frame that may still grow.
    pub(super) fn may_grow(&self) -> usize {
        let so_far = match self.at {
            // What kind it is of is not known before the length has passed.
            Position::Head { .. } | Position::PadLength { .. } | Position::Fragment { .. } => self.so_far,
            Position::Skip { fragment, .. } if fragment > 0 => self.so_far,
            Position::Preface(_) | Position::Skip { .. } | Position::Opaque | Position::Flooded => 0,
        };
        if so_far <= MAY_GROW { size(so_far) } else { 0 }
    }

    /// Something is missing in the frame, behind these bytes.
    fn grow(&mut self, bytes: u32, missing: Lacking) -> Option<FrameChange> {
        let more = u32::try_from(missing.behind.len()).ok()?;
        let so_far = self.so_far.saturating_add(bytes);
        let length = self.length.saturating_add(more);
        if so_far > MAY_GROW || length > LONGEST_FRAME {
            return None;
        }
        self.length = length;
        self.so_far = self.so_far.saturating_add(more);
        Some(FrameChange { so_far: size(so_far), head: self.head(), behind: missing.behind })
    }

    /// The first bytes of the head of the frame that is passing.
    fn head(&self) -> [u8; 5] {
        let ([_, l0, l1, l2], [kind, flags]) = (self.length.to_be_bytes(), self.kind);
        [l0, l1, l2, kind, flags]
    }

    /// How many answers that were no work to conserve came as frames since this was asked last.
    pub(super) fn take_wasted(&mut self) -> u32 {
        let wasted = self.wasted / PARTS;
        self.wasted %= PARTS;
        wasted
    }

    /// So many bytes of bodies were those of requests that were read to their end: they were for something.
    pub(super) fn read_whole(&mut self, bytes: u64) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.bodies = UsefulBytes::BODY.with(self.bodies, bytes);
    }

    /// Bytes that are kept with those of bodies, as long as these are not read, since this was asked last.
    pub(super) fn take_pinned(&mut self) -> u32 {
        std::mem::take(&mut self.pinned)
    }

    /// The highest stream whose request has passed to its end; 0 for none.
    pub fn last_whole(&mut self) -> u32 {
        self.note_whole();
        self.last_whole
    }

    /// How many streams began since this was asked last.
    pub fn take_began(&mut self) -> u32 {
        std::mem::take(&mut self.began)
    }

    /// The heads of requests so far.
    pub(super) fn heads(&self) -> Heads {
        let is_whole = !self.in_block && matches!(self.at, Position::Head { .. });
        let open = u64::from(self.in_head && !is_whole);
        Heads { begun: self.heads, whole: self.heads.saturating_sub(open) }
    }

    /// Bytes that HTTP/2 keeps until more have passed: of a frame, and of a header block, that are not complete.
    pub fn unfinished(&self) -> u32 {
        let block = if self.in_block { self.block } else { 0 };
        let frame = match self.at {
            Position::PadLength { .. } | Position::Skip { .. } | Position::Fragment { .. } => self.length,
            Position::Preface(_) | Position::Head { .. } | Position::Opaque | Position::Flooded => 0,
        };
        block.saturating_add(frame)
    }

    /// How many of the bytes that come next are whole frames that begin nothing: answers to PING and SETTINGS, PINGs, windows, and
    /// ends of streams. They take no memory, and some give it back.
    pub(super) fn begins_nothing(&self, bytes: &[u8]) -> usize {
        const RST_STREAM: u8 = 3;
        const SETTINGS: u8 = 4;
        const PING: u8 = 6;
        const WINDOW_UPDATE: u8 = 8;
        const ACK: u8 = 0x1;
        if self.in_block || !matches!(self.at, Position::Head { passed: 0, .. }) {
            return 0;
        }
        let mut rest = bytes;
        while let Some((head, payload)) = rest.split_first_chunk::<9>() {
            let [0, 0, length, kind, flags, ..] = *head else { break };
            let is_one = match kind {
                PING => length == 8,
                WINDOW_UPDATE | RST_STREAM => length == 4,
                SETTINGS => length == 0 && flags == ACK,
                _ => false,
            };
            match payload.get(usize::from(length)..) {
                Some(behind) if is_one => rest = behind,
                _ => break,
            }
        }
        bytes.len() - rest.len()
    }

    /// At a frame's head: the one before it is complete.
    fn note_whole(&mut self) {
        if !self.in_block
            && matches!(self.at, Position::Head { .. })
            && let Some(stream) = self.ends.take()
        {
            self.last_whole = self.last_whole.max(stream);
        }
    }

    /// A frame's head is complete. Says how it becomes one that h2 refuses, if it has to.
    fn begin(&mut self, head: [u8; 9], now: &impl Fn() -> Instant) -> Result<Option<FrameChange>, Flood> {
        const DATA: u8 = 0;
        const HEADERS: u8 = 1;
        const CONTINUATION: u8 = 9;
        const END_STREAM: u8 = 0x1;
        const END_HEADERS: u8 = 0x4;
        const PADDED: u8 = 0x8;
        const PRIORITY: u8 = 0x20;

        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = head;
        let length = u32::from_be_bytes([0, l0, l1, l2]);
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        self.note_whole();
        self.in_head &= self.in_block;
        (self.length, self.kind) = (length, [kind, flags]);
        self.block = if self.in_block { self.block.saturating_add(length) } else { length };
        if matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
            self.ends = Some(stream);
        }
        match kind {
            DATA => {
                let mut before = std::mem::take(&mut self.since_data);
                if before <= WORTH_TELLING {
                    before = 0;
                }
                // A body that nobody reads any more is thrown away and its window given back: that does not bound it.
                if self.run.stream != stream {
                    before = before.saturating_add(std::mem::take(&mut self.run).bytes);
                    self.run.stream = stream;
                }
                self.run.bytes = self.run.bytes.saturating_add(length);
                self.pinned = self.pinned.saturating_add(before.min(BUFFER));
            }
            _ => self.since_data = self.since_data.saturating_add(FRAME_HEAD).saturating_add(length),
        }
        // Fields behind the body: HTTP/2 allows them (RFC 9113, section 8.1), and no client of gRPC sends any. Without
        // END_STREAM they are malformed, and h2 resets the stream. A block without fields is an end like any other.
        let is_trailers = kind == HEADERS && (1..=self.last_stream).contains(&stream);
        let is_empty = length == 0 && flags & END_HEADERS != 0;
        let refused = is_trailers && !is_empty && flags & END_STREAM != 0;
        match kind {
            DATA if length > 0 => {
                let wasted = UsefulBytes::BODY.spend(&mut self.bodies, length);
                self.wasted = self.wasted.saturating_add(wasted);
                self.charge(FRAME_HEAD + DATA_COST, now)?;
            }
            // A stream begins: its number is higher than any before (RFC 9113, section 5.1.1).
            HEADERS if stream > self.last_stream => {
                self.last_stream = stream;
                self.began = self.began.saturating_add(1);
                self.heads = self.heads.saturating_add(1);
                self.in_head = true;
                self.left = self.budget.burst;
                self.beside = UsefulBytes::BESIDE.filled(self.beside);
                // Nothing of it is kept for the next one.
                let mut of_head = UsefulBytes::HEAD.filled(0);
                self.wasted = self.wasted.saturating_add(UsefulBytes::HEAD.spend(&mut of_head, length));
            }
            _ => self.charge(FRAME_HEAD.saturating_add(length), now)?,
        }

        self.at = match kind {
            HEADERS => {
                self.hpack = Hpack::Start;
                self.ends_block = flags & END_HEADERS != 0;
                self.in_block = !self.ends_block;
                let priority = if flags & PRIORITY == 0 { 0 } else { 5 };
                if flags & PADDED != 0 && length > 0 {
                    Position::PadLength { rest: length - 1, priority }
                } else {
                    match length.checked_sub(priority) {
                        Some(fragment) => Position::Skip { left: priority, fragment, padding: 0 },
                        None => Position::Skip { left: length, fragment: 0, padding: 0 },
                    }
                }
            }
            CONTINUATION if self.in_block => {
                self.ends_block = flags & END_HEADERS != 0;
                self.in_block = !self.ends_block;
                Position::Skip { left: 0, fragment: length, padding: 0 }
            }
            _ => Position::Skip { left: length, fragment: 0, padding: 0 },
        };
        self.settle();
        Ok(refused.then(|| {
            self.kind = [kind, flags & !END_STREAM];
            FrameChange { so_far: size(FRAME_HEAD), head: self.head(), behind: &[] }
        }))
    }

    /// Leaves a part that has nothing left for the next one.
    fn settle(&mut self) {
        loop {
            self.at = match self.at {
                Position::Skip { left: 0, fragment: 0, padding: 0 } => Position::HEAD,
                Position::Skip { left: 0, fragment: 0, padding } => {
                    Position::Skip { left: padding, fragment: 0, padding: 0 }
                }
                Position::Skip { left: 0, fragment, padding } => {
                    Position::Fragment { left: fragment, padding }
                }
                Position::Fragment { left: 0, padding } => {
                    Position::Skip { left: padding, fragment: 0, padding: 0 }
                }
                Position::Preface(_)
                | Position::Head { .. }
                | Position::PadLength { .. }
                | Position::Skip { .. }
                | Position::Fragment { .. }
                | Position::Opaque
                | Position::Flooded => return,
            };
        }
    }

    fn charge(&mut self, cost: u32, now: &impl Fn() -> Instant) -> Result<(), Flood> {
        self.wasted = self.wasted.saturating_add(UsefulBytes::BESIDE.spend(&mut self.beside, cost));
        if cost > self.left {
            let now = now();
            let since = now.saturating_duration_since(self.filled_at).as_millis();
            let back = since.saturating_mul(u128::from(self.budget.per_second)) / 1000;
            let back = u32::try_from(back).unwrap_or(u32::MAX);
            if back > 0 {
                self.left = self.left.saturating_add(back).min(self.budget.burst);
                self.filled_at = now;
            }
        }
        match self.left.checked_sub(cost) {
            Some(left) => self.left = left,
            None => {
                self.at = Position::Flooded;
                return Err(Flood);
            }
        }
        Ok(())
    }
}

impl Position {
    const HEAD: Self = Self::Head { passed: 0, head: [0; 9] };
}

fn size(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const RICH: FrameBudget = FrameBudget { burst: u32::MAX, per_second: 0 };

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let [_, l0, l1, l2] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[l0, l1, l2, kind, flags, 0, 0, 0, stream], payload].concat()
    }

    /// Whole ones alone, and none behind a frame or a block that is not complete.
    #[test]
    fn what_begins_nothing_is_told_from_the_rest() {
        let now = Instant::now();
        let pong = frame(6, 1, 0, &[0; 8]);
        let window = frame(8, 0, 1, &[0, 0, 1, 0]);
        let all = [pong.clone(), window, frame(4, 1, 0, &[]), frame(3, 0, 1, &[0, 0, 0, 8])].concat();
        let request = frame(1, 4, 3, &[0x83]);
        for (case, passed, next, want) in [
            ("nothing", &[][..], vec![], 0),
            ("all kinds", &[], all.clone(), all.len()),
            ("up to a request", &[], [&all[..], &request].concat(), all.len()),
            ("a request", &[], [&request[..], &all].concat(), 0),
            ("a part of one", &[], all[..all.len() - 1].to_vec(), all.len() - 13),
            ("a part of a head", &[], pong[..8].to_vec(), 0),
            ("a body", &[], frame(0, 0, 1, &[0; 8]), 0),
            ("settings that change something", &[], frame(4, 0, 0, &[0; 6]), 0),
            ("of another length", &[], frame(6, 1, 0, &[0; 9]), 0),
            ("within a frame", &request[..9], pong.clone(), 0),
            ("within a block", &frame(1, 0, 3, &[0x83]), pong.clone(), 0),
            ("behind a whole one", &request, pong.clone(), pong.len()),
        ] {
            let mut filter = Filter::new(FrameBudget::DEFAULT, now);
            let mut before = [PREFACE, passed].concat();
            filter.pass(&mut before, || now).unwrap();
            assert_eq!(filter.begins_nothing(&next), want, "{case}");
        }
    }

    /// What is not complete is what HTTP/2 keeps.
    #[test]
    fn what_is_unfinished_is_told() {
        let now = Instant::now();
        let mut filter = Filter::new(RICH, now);
        let mut pass = |bytes: &[u8]| {
            filter.pass(&mut bytes.to_vec(), || now).unwrap();
            filter.unfinished()
        };
        let headers = frame(1, 0, 1, &[0x82; 100]);
        assert_eq!(pass(&[PREFACE, &frame(4, 0, 0, &[])].concat()), 0);
        assert_eq!(pass(&headers[..9 + 60]), 100 + 100, "a part of a frame, which begins a block");
        assert_eq!(pass(&headers[9 + 60..]), 100);
        assert_eq!(pass(&frame(9, 0, 1, &[0x82; 50])), 150);
        assert_eq!(pass(&frame(9, 0x4, 1, &[0x82; 50])), 0, "the block is complete");
        assert_eq!(pass(&frame(0, 0, 1, &[7; 70])[..20]), 70);
        assert_eq!(pass(&[7; 59]), 0);
    }

    /// Its beginning.
    fn connection() -> Vec<u8> {
        [PREFACE, &frame(4, 0, 0, &[0, 3, 0, 0, 0, 100])].concat()
    }

    #[test]
    fn a_request_is_whole_with_the_last_of_its_bytes() {
        let headers = b"\x44\x02/x";
        let frames = [
            ("without a body", 1, frame(1, 5, 1, headers)),
            ("its head", 1, frame(1, 4, 3, headers)),
            ("a part of its body", 1, frame(0, 0, 3, b"part")),
            ("another one", 5, frame(1, 5, 5, headers)),
            ("the rest of its body", 5, frame(0, 1, 3, b"rest")),
            ("half of a head", 5, frame(1, 1, 7, headers)),
            ("a frame in between", 5, frame(9, 0, 7, b"")),
            ("the other half", 7, frame(9, 4, 7, headers)),
            ("an empty end", 7, frame(1, 4, 9, headers)),
            ("of it", 9, frame(0, 1, 9, b"")),
            ("a ping", 9, frame(6, 1, 0, &[0; 8])),
        ];
        let now = Instant::now();
        let mut filter = Filter::new(RICH, now);
        let mut begun = connection();
        filter.pass(&mut begun, || now).unwrap();
        let mut whole = 0;
        for (case, then, mut frame) in frames {
            for byte in &mut frame {
                assert_eq!(filter.last_whole(), whole, "{case}");
                filter.pass(std::slice::from_mut(byte), || now).unwrap();
            }
            whole = then;
            assert_eq!(filter.last_whole(), whole, "{case}");
        }
    }

    #[test]
    fn a_head_is_whole_with_the_last_byte_of_its_block() {
        let block = [0x82; 20];
        let frames = [
            ("a head", (1, 1), frame(1, 4, 1, &block)),
            ("its body", (1, 1), frame(0, 1, 1, b"body")),
            ("a part of one", (2, 1), frame(1, 0, 3, &block)),
            ("the rest of it", (2, 2), frame(9, 4, 3, &block)),
            ("trailers", (2, 2), frame(1, 5, 3, &block)),
            ("a padded one", (3, 3), frame(1, 0xd, 5, &[&[5], &block[..]].concat())),
            ("an empty one", (4, 4), frame(1, 4, 7, &[])),
        ];
        let now = Instant::now();
        let mut filter = Filter::new(RICH, now);
        filter.pass(&mut connection(), || now).unwrap();
        for (case, (begun, whole), frame) in frames {
            let before = filter.heads();
            for byte in &frame {
                assert_eq!(filter.heads().whole, before.whole, "{case}");
                filter.pass(&mut [*byte], || now).unwrap();
            }
            assert_eq!(filter.heads(), Heads { begun, whole }, "{case}");
        }
    }

    /// What a client sends beside its requests is none; what comes in their shadow is, however many requests come.
    #[test]
    fn frames_beyond_what_requests_bring_along_are_waste() {
        let now = Instant::now();
        let request = |nth: u8| [frame(1, 4, nth, &[0x83]), frame(0, 1, nth, &[0; 5])].concat();
        let (ping, update, settings) =
            (frame(6, 1, 0, &[0; 8]), frame(8, 0, 0, &[0, 0, 1, 0]), frame(4, 0, 0, &[0, 4, 0, 1, 0, 0]));
        for (case, beside, want) in [
            ("nothing", Vec::new(), 0),
            ("what grpc-go sends", [&ping[..], &ping, &update, &update, &settings].concat(), 0),
            ("many SETTINGS", settings.repeat(400), 100 * 400 * 15 / 128),
            ("many pings", ping.repeat(400), 100 * 400 * 17 / 128),
            ("unknown frames", frame(29, 0, 0, &[0; 7600]).repeat(4), 100 * 4 * 7609 / 128),
        ] {
            let mut filter = Filter::new(FrameBudget::DEFAULT, now);
            filter.pass(&mut connection(), || now).unwrap();
            let mut wasted = 0;
            for nth in 0..100 {
                filter.pass(&mut [request(2 * nth + 1), beside.clone()].concat(), || now).unwrap();
                wasted += filter.take_wasted();
            }
            let allowed = (1024 + 100 * 256) / 128;
            assert!((want - want.min(allowed)..=want).contains(&wasted), "{case}: {wasted} of {want}");
        }
    }

    /// h2 walks it to its end, whatever is wrong with it.
    #[test]
    fn a_head_that_is_longer_than_usual_is_waste() {
        let now = Instant::now();
        for (length, of_each) in [(100, 0), (512, 0), (1_024, 4), (16_384, 124)] {
            let mut filter = Filter::new(FrameBudget::DEFAULT, now);
            filter.pass(&mut connection(), || now).unwrap();
            let mut wasted = 0;
            for nth in 0..100 {
                filter.pass(&mut frame(1, 5, 2 * nth + 1, &vec![0x82; length]), || now).unwrap();
                wasted += filter.take_wasted();
            }
            assert_eq!(wasted, 100 * of_each, "{length}");
        }
    }

    /// What comes for requests that were answered or reset is thrown away, and asked for again and again.
    #[test]
    fn bodies_of_requests_that_are_not_read_to_their_end_are_waste() {
        const MANY: u32 = 100;
        let now = Instant::now();
        // Of each round so many requests are read to their end.
        for (case, rounds, heads, parts, length, whole) in [
            ("a body of the largest size", 1, 1, 4, 16 * 1024, 0),
            ("tokens, one after the other", MANY, 1, 1, 2 * 1024, 1),
            ("long ones, one after the other", MANY, 1, 1, 16 * 1024, 1),
            ("of the largest size", MANY, 1, 4, 16 * 1024, 1),
            ("as many at once as the window lets through", MANY / 4, 4, 4, 16 * 1024, 4),
            ("what comes for none", 1, 1, 104, 16 * 1024, 0),
            ("short ones, reset", MANY, 1, 1, 2_000, 0),
            ("long ones, reset", MANY, 1, 1, 16 * 1024, 0),
            ("one in two", MANY / 2, 2, 2, 8 * 1024, 1),
        ] {
            let mut filter = Filter::new(FrameBudget::DEFAULT, now);
            filter.pass(&mut connection(), || now).unwrap();
            let (mut wasted, mut stream) = (0, 1);
            for _ in 0..rounds {
                for _ in 0..heads {
                    filter.pass(&mut frame(1, 4, stream, &[0x83]), || now).unwrap();
                    stream += 2;
                }
                for _ in 0..parts {
                    filter.pass(&mut frame(0, 0, stream - 2, &vec![0; size(length)]), || now).unwrap();
                    wasted += filter.take_wasted();
                }
                filter.read_whole(u64::from(whole * length * parts / heads));
            }
            let in_vain = rounds * (heads - whole) * (length * parts / heads);
            let want = in_vain.saturating_sub(68 * 1024) / BODY_OF_ANSWER;
            // Heads of frames count too.
            let of_frames = if want > 0 { rounds * parts * (FRAME_HEAD + DATA_COST) / 128 } else { 0 };
            assert!((want..=want + of_frames + 1).contains(&wasted), "{case}: {wasted} of {want}");
        }
    }

    /// h2 keeps the whole buffer for a part of a body that nobody reads.
    #[test]
    fn what_comes_before_data_is_kept_with_it() {
        let now = Instant::now();
        let (head, data) = (|length| frame(1, 4, 1, &vec![0x86; length]), frame(0, 0, 1, &[0; 257]));
        for (case, frames, pinned) in [
            ("an ordinary call", [head(300), data.clone(), data.clone()].concat(), 0),
            ("a long head", [head(5_000), data.clone(), data.clone()].concat(), 5_009),
            ("no body", [head(5_000), head(5_000)].concat(), 0),
            (
                "frames that nobody knows",
                [frame(29, 0, 0, &[0; 7_600]), data.clone()].concat().repeat(3),
                3 * 7_609,
            ),
            ("more than a buffer", [head(9_000), head(9_000), data].concat(), 16 * 1024),
            ("a body of one stream", vec![frame(0, 0, 1, &[0; 8_000]); 3].concat(), 0),
            (
                "a large body of another stream between the parts of one",
                [frame(0, 0, 1, &[0]), frame(0, 0, 3, &[0; 4_000]), frame(0, 0, 3, &[0; 4_000])]
                    .concat()
                    .repeat(3),
                4 + 2 * 8_000,
            ),
            ("small ones", [frame(0, 0, 1, &[0]), frame(0, 0, 3, &[0; 400])].concat().repeat(3), 4 + 2 * 400),
        ] {
            let mut filter = Filter::new(RICH, now);
            // SETTINGS are before the first.
            filter.pass(&mut [PREFACE, &frame(0, 0, 1, &[0])].concat(), || now).unwrap();
            filter.pass(&mut frames.clone(), || now).unwrap();
            assert_eq!(filter.take_pinned(), pinned, "{case}");
            assert_eq!(filter.take_pinned(), 0, "{case}: told once");
        }
    }

    #[test]
    fn frames_without_a_request_are_bounded() {
        let budget = FrameBudget { burst: 1000, per_second: 100 };
        let ping = frame(6, 0, 0, &[0; 8]);
        let start = Instant::now();
        let fresh = || {
            let mut filter = Filter::new(budget, start);
            filter.pass(&mut connection(), || start).unwrap();
            filter
        };
        let pings_at = |filter: &mut Filter, at: Duration| {
            let mut passed = 0;
            loop {
                let mut next = filter.clone();
                if next.pass(&mut ping.clone(), || start + at).is_err() {
                    assert_eq!(next.pass(&mut [0], || start + at), Err(Flood), "closed for ever");
                    break;
                }
                *filter = next;
                passed += 1;
            }
            passed
        };
        for (case, flood) in [
            ("PING", ping.clone()),
            ("PING with ACK", frame(6, 1, 0, &[0; 8])),
            ("SETTINGS", frame(4, 0, 0, &[])),
            ("SETTINGS with ACK", frame(4, 1, 0, &[])),
            ("WINDOW_UPDATE", frame(8, 0, 0, &[0, 0, 0, 1])),
            ("PRIORITY", frame(2, 0, 1, &[0; 5])),
            ("RST_STREAM", frame(3, 0, 1, &[0; 4])),
            ("empty DATA", frame(0, 0, 1, &[])),
            ("DATA of one byte", frame(0, 0, 1, &[0])),
            ("an unknown frame", frame(200, 0, 1, &[0; 100])),
            ("CONTINUATION", frame(9, 0, 1, &[0; 10])),
            ("trailers", frame(1, 4, 1, &[0x83])),
        ] {
            let mut filter = fresh();
            filter.pass(&mut frame(1, 4, 1, &[0x83]), || start).unwrap();
            let result = (0..=1000 / 9).try_for_each(|_| filter.pass(&mut flood.clone(), || start).map(drop));
            assert_eq!(result, Err(Flood), "{case}");
        }

        let mut filter = fresh();
        assert_eq!(pings_at(&mut filter, Duration::ZERO), 57, "(1000 - 15) / 17");
        assert_eq!(
            pings_at(&mut filter, Duration::from_millis(100)),
            1,
            "10 bytes more make up 17 with those left"
        );
        filter.pass(&mut frame(1, 4, 1, &[0x83]), || start).unwrap();
        assert_eq!(pings_at(&mut filter, Duration::from_millis(100)), 58, "a new request fills it up");

        let mut filter = fresh();
        filter.pass(&mut frame(1, 4, 1, &[0x83]), || start).unwrap();
        for second in 0..10_000 {
            let now = start + Duration::from_secs(second);
            let mut steady = [ping.clone(), frame(8, 0, 0, &[0; 4]), frame(8, 0, 1, &[0; 4])].concat();
            assert_eq!(
                filter.pass(&mut steady, || now).map(drop),
                Ok(()),
                "a stream that lives for long, second {second}"
            );
        }
        let mut filter = fresh();
        filter.pass(&mut frame(1, 4, 1, &[0x83]), || start).unwrap();
        let mut large = frame(0, 0, 1, &[0; 16384]).repeat(50);
        assert_eq!(filter.pass(&mut large, || start).map(drop), Ok(()), "a large request");
    }
}
