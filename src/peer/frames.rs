//! The frames of a peer, walked byte by byte as they arrive, before HTTP/2 sees them.
//!
//! Frames that ask for nothing (PING, SETTINGS, WINDOW_UPDATE, empty DATA, unknown ones) are held to a
//! [`FrameBudget`], since h2 answers them for ever. Header blocks are handed to [`hpack`](super::hpack),
//! which writes over `:authority`.
//!
//! Nothing is trusted and nothing is judged: what is not HTTP/2, or breaks its rules, passes as it is, and h2 refuses
//! it. The state is a few dozen bytes per connection; nothing is buffered, copied or delayed.

use tokio::time::Instant;

use super::hpack::Hpack;

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

/// Length of a frame's head (RFC 9113, section 4.1).
const FRAME_HEAD: u32 = 9;

/// What a frame of DATA costs beyond its head. Its payload costs nothing: flow control bounds that already, and a
/// large request must not look like a flood.
const DATA_COST: u32 = 8;

/// Walks the bytes of one connection from its start. Pure: bytes in, the same number of bytes out.
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
    hpack: Hpack,
    last_stream: u32,
    /// The stream whose request ends with the frame that is passing, or with its header block.
    ends: Option<u32>,
    /// The highest stream whose request has passed to its end.
    last_whole: u32,
    /// Streams that began since somebody asked.
    began: u32,
    budget: FrameBudget,
    left: u32,
    filled_at: Instant,
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
            hpack: Hpack::Start,
            last_stream: 0,
            ends: None,
            last_whole: 0,
            began: 0,
            budget,
            left: budget.burst,
            filled_at: now,
        }
    }

    /// Lets the next bytes of the connection pass, and writes over those of an authority. `now` is asked
    /// only when the budget is spent.
    ///
    /// # Errors
    /// [`Flood`]: the connection is to be closed.
    pub fn pass(&mut self, mut bytes: &mut [u8], now: impl Fn() -> Instant) -> Result<(), Flood> {
        while let Some(next) = bytes.first().copied() {
            let available = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let used = match &mut self.at {
                Position::Opaque => return Ok(()),
                Position::Flooded => return Err(Flood),
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
                Position::Head { passed, head } => {
                    if let Some(byte) = head.get_mut(*passed) {
                        *byte = next;
                    }
                    *passed += 1;
                    if *passed == head.len() {
                        let head = *head;
                        self.begin(head, &now)?;
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
                    let most = available.min(*left);
                    let used = self.hpack.step(bytes.get_mut(..size(most)).unwrap_or_default());
                    *left -= used;
                    self.settle();
                    used
                }
            };
            bytes = bytes.split_at_mut_checked(size(used)).map(|(_, rest)| rest).unwrap_or_default();
        }
        Ok(())
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

    /// Bytes that HTTP/2 keeps until more have passed: of a frame, and of a header block, that are not complete.
    pub fn unfinished(&self) -> u32 {
        let block = if self.in_block { self.block } else { 0 };
        let frame = match self.at {
            Position::PadLength { .. } | Position::Skip { .. } | Position::Fragment { .. } => self.length,
            Position::Preface(_) | Position::Head { .. } | Position::Opaque | Position::Flooded => 0,
        };
        block.saturating_add(frame)
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

    /// A frame's head is complete.
    fn begin(&mut self, head: [u8; 9], now: &impl Fn() -> Instant) -> Result<(), Flood> {
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
        self.length = length;
        self.block = if self.in_block { self.block.saturating_add(length) } else { length };
        if matches!(kind, DATA | HEADERS) && flags & END_STREAM != 0 {
            self.ends = Some(stream);
        }
        match kind {
            DATA if length > 0 => self.charge(FRAME_HEAD + DATA_COST, now)?,
            // A stream begins: its number is higher than any before (RFC 9113, section 5.1.1).
            HEADERS if stream > self.last_stream => {
                self.last_stream = stream;
                self.began = self.began.saturating_add(1);
                self.left = self.budget.burst;
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
        Ok(())
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

    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;
    use crate::peer::hpack::{AUTHORITY, CODED_AUTHORITY, EMPTY_AUTHORITY, EMPTY_HEADER};

    const RICH: FrameBudget = FrameBudget { burst: u32::MAX, per_second: 0 };

    /// All of `bytes` through a filter, cut at the given places.
    fn through(bytes: &[u8], budget: FrameBudget, cuts: &[usize]) -> (Vec<u8>, Result<(), Flood>) {
        let now = Instant::now();
        let mut filter = Filter::new(budget, now);
        let mut out = bytes.to_vec();
        let mut rest = out.as_mut_slice();
        let mut at = 0;
        let mut cuts: Vec<usize> = cuts.iter().copied().filter(|cut| *cut <= bytes.len()).collect();
        cuts.sort_unstable();
        cuts.push(bytes.len());
        for cut in cuts {
            let (now_part, later) = rest.split_at_mut(cut - at);
            if let Err(flood) = filter.pass(now_part, || now) {
                return (out, Err(flood));
            }
            (rest, at) = (later, cut);
        }
        (out, Ok(()))
    }

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let [_, l0, l1, l2] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[l0, l1, l2, kind, flags, 0, 0, 0, stream], payload].concat()
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

    /// An integer after the bits that come before it (RFC 7541, section 5.1).
    fn integer(bits: u8, mask: u8, value: usize) -> Vec<u8> {
        let mask_len = usize::from(mask);
        if value < mask_len {
            return vec![bits | u8::try_from(value).unwrap()];
        }
        let mut bytes = vec![bits | mask];
        let mut left = value - mask_len;
        while left >= 128 {
            bytes.push(u8::try_from(left % 128).unwrap() | 0x80);
            left /= 128;
        }
        bytes.push(u8::try_from(left).unwrap());
        bytes
    }

    fn string(huffman: bool, text: &[u8]) -> Vec<u8> {
        [integer(if huffman { 0x80 } else { 0 }, 0x7f, text.len()), text.to_vec()].concat()
    }

    /// So many bytes of Huffman-coded zeros: codes of five zeros, and ones behind the last (RFC 7541, section 5.2).
    fn coded_zeros(bytes: usize) -> Vec<u8> {
        let mut coded = vec![0; bytes];
        if let Some(last) = coded.last_mut() {
            *last = (1 << (bytes * 8 % 5)) - 1;
        }
        coded
    }

    fn by_name(bits: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
        [vec![bits], string(false, name), string(false, value)].concat()
    }

    fn by_index(bits: u8, mask: u8, index: usize, value: &[u8]) -> Vec<u8> {
        [integer(bits, mask, index), string(false, value)].concat()
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        [PREFACE, &frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]), &frames.concat()].concat()
    }

    /// Checks the whole, each cut in two, and byte by byte.
    fn check(case: &str, bytes: &[u8], expect: &[u8]) {
        assert_eq!(through(bytes, RICH, &[]), (expect.to_vec(), Ok(())), "{case}");
        for cut in 0..bytes.len() {
            assert_eq!(through(bytes, RICH, &[cut]).0, expect, "{case}, cut at {cut}");
        }
        let all: Vec<usize> = (0..bytes.len()).collect();
        assert_eq!(through(bytes, RICH, &all).0, expect, "{case}, byte by byte");
    }

    #[test]
    fn a_request_is_whole_with_the_last_of_its_bytes() {
        let headers = by_index(0x40, 0x3f, 4, b"/x");
        let frames = [
            ("without a body", 1, frame(1, 5, 1, &headers)),
            ("its head", 1, frame(1, 4, 3, &headers)),
            ("a part of its body", 1, frame(0, 0, 3, b"part")),
            ("another one", 5, frame(1, 5, 5, &headers)),
            ("the rest of its body", 5, frame(0, 1, 3, b"rest")),
            ("half of a head", 5, frame(1, 1, 7, &headers)),
            ("a frame in between", 5, frame(9, 0, 7, b"")),
            ("the other half", 7, frame(9, 4, 7, &headers)),
            ("an empty end", 7, frame(1, 4, 9, &headers)),
            ("of it", 9, frame(0, 1, 9, b"")),
            ("a ping", 9, frame(6, 1, 0, &[0; 8])),
        ];
        let now = Instant::now();
        let mut filter = Filter::new(RICH, now);
        let mut begun = connection(&[]);
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
    fn overwrites_every_authority() {
        let c_core = b"tmp%2Fx.sock".as_slice();
        let legal = b"000000000000".as_slice();
        let coded = |value: &[u8]| [integer(0x40, 0x3f, 1), string(true, value)].concat();
        let coded_name = |value: Vec<u8>| [vec![0x40], string(true, CODED_AUTHORITY), value].concat();
        let long = [b"a%".repeat(200), b"0".repeat(400)];
        for (case, block, expect) in [
            (
                "literal name, as C-core sends",
                by_name(0x40, b":authority", c_core),
                by_name(0x40, b":authority", legal),
            ),
            (
                "literal name, not indexed",
                by_name(0x00, b":authority", c_core),
                by_name(0x00, b":authority", legal),
            ),
            (
                "literal name, never indexed",
                by_name(0x10, b":authority", c_core),
                by_name(0x10, b":authority", legal),
            ),
            ("indexed name", by_index(0x40, 0x3f, 1, c_core), by_index(0x40, 0x3f, 1, legal)),
            ("indexed name, not indexed", by_index(0x00, 0x0f, 1, c_core), by_index(0x00, 0x0f, 1, legal)),
            ("indexed name, never indexed", by_index(0x10, 0x0f, 1, c_core), by_index(0x10, 0x0f, 1, legal)),
            ("a bare path", by_index(0x40, 0x3f, 1, b"/run/x y"), by_index(0x40, 0x3f, 1, b"00000000")),
            ("a long value", by_index(0x40, 0x3f, 1, &long[0]), by_index(0x40, 0x3f, 1, &long[1])),
            ("a name that is one", by_index(0x40, 0x3f, 1, b"localhost:80"), by_index(0x40, 0x3f, 1, legal)),
            ("none", vec![0x83, EMPTY_AUTHORITY], vec![0x83, EMPTY_HEADER]),
            ("a coded value", coded(b"\x60\xd5\x48"), coded(&coded_zeros(3))),
            ("a long one", coded(&[0xff; 300]), coded(&coded_zeros(300))),
            ("a coded name", coded_name(string(false, c_core)), coded_name(string(false, legal))),
            ("both coded", coded_name(string(true, b"\x60\xd5")), coded_name(string(true, &coded_zeros(2)))),
            (
                "after fields of every kind",
                [
                    integer(0x20, 0x1f, 4096),
                    vec![0x83, 0x86],
                    integer(0x80, 0x7f, 300),
                    by_index(0x40, 0x3f, 4, b"/SpiffeWorkloadAPI/%"),
                    by_index(0x00, 0x0f, 64, b"a/b"),
                    by_name(0x40, b"", b""),
                    by_name(0x40, b":authorit/", b"a/b"),
                    by_name(0x40, b":authority2", b"a/b"),
                    by_name(0x40, b":authori", b"a/b"),
                    by_index(0x40, 0x3f, 1, b""),
                    by_name(0x40, b":authority", c_core),
                    by_name(0x40, b"te", b"trailers/%"),
                ]
                .concat(),
                [
                    integer(0x20, 0x1f, 4096),
                    vec![0x83, 0x86],
                    integer(0x80, 0x7f, 300),
                    by_index(0x40, 0x3f, 4, b"/SpiffeWorkloadAPI/%"),
                    by_index(0x00, 0x0f, 64, b"a/b"),
                    by_name(0x40, b"", b""),
                    by_name(0x40, b":authorit/", b"a/b"),
                    by_name(0x40, b":authority2", b"a/b"),
                    by_name(0x40, b":authori", b"a/b"),
                    by_index(0x40, 0x3f, 1, b""),
                    by_name(0x40, b":authority", legal),
                    by_name(0x40, b"te", b"trailers/%"),
                ]
                .concat(),
            ),
        ] {
            check(case, &connection(&[frame(1, 4, 1, &block)]), &connection(&[frame(1, 4, 1, &expect)]));
            // In the second request of a connection, after a body that looks like a header block.
            let body = frame(0, 1, 1, &by_name(0x40, b":authority", c_core));
            check(
                case,
                &connection(&[frame(1, 4, 1, &[0x83]), body.clone(), frame(1, 4, 3, &block)]),
                &connection(&[frame(1, 4, 1, &[0x83]), body, frame(1, 4, 3, &expect)]),
            );
            // Padded, with a priority, over three frames.
            let split = |block: &[u8]| {
                let (a, rest) = block.split_at(block.len() / 3);
                let (b, c) = rest.split_at(rest.len() / 2);
                let first = [&[4, 0, 0, 0, 0, 16], a, b"////"].concat();
                connection(&[
                    frame(1, 0x28, 1, &first),
                    frame(9, 0, 1, b),
                    frame(9, 0, 1, &[]),
                    frame(9, 4, 1, c),
                ])
            };
            check(case, &split(&block), &split(&expect));
        }
    }

    #[test]
    fn leaves_the_rest_alone() {
        for (case, bytes) in [
            ("no preface", b"GET / HTTP/1.1\r\nhost: a%2Fb\r\n\r\n".to_vec()),
            ("half a preface", [PREFACE.split_at(10).0, b"/%/%/%"].concat()),
            ("a coded name that is longer", {
                let name = [CODED_AUTHORITY, &[0x1f]].concat();
                connection(&[frame(
                    1,
                    4,
                    1,
                    &[vec![0x40], string(true, &name), string(false, b"/%")].concat(),
                )])
            }),
            (
                "a coded value of another name",
                connection(&[frame(1, 4, 1, &[integer(0x40, 0x3f, 4), string(true, b"%/%/")].concat())]),
            ),
            (
                "an integer beyond 32 bits",
                connection(&[frame(1, 4, 1, &[&[0x41], &[0xff; 9][..], b"%/%"].concat())]),
            ),
            (
                "a length beyond the frame",
                connection(&[frame(1, 4, 1, &[0x41, 0x30]), frame(0, 0, 1, b"%/")]),
            ),
            ("padding beyond the frame", connection(&[frame(1, 0x0c, 1, &[200, 0x41, 1, b'%'])])),
            ("a priority cut short", connection(&[frame(1, 0x24, 1, &[0x41, 1, b'%'])])),
            ("CONTINUATION out of place", connection(&[frame(9, 4, 1, &by_index(0x40, 0x3f, 1, b"%"))])),
            (
                "an empty block",
                connection(&[frame(1, 4, 1, &[]), frame(1, 0x0c, 3, &[]), frame(0, 0, 1, b"%")]),
            ),
        ] {
            check(case, &bytes, &bytes);
        }
    }

    #[test]
    fn frames_without_a_request_are_bounded() {
        let budget = FrameBudget { burst: 1000, per_second: 100 };
        let ping = frame(6, 0, 0, &[0; 8]);
        let start = Instant::now();
        let fresh = || {
            let mut filter = Filter::new(budget, start);
            filter.pass(&mut connection(&[]), || start).unwrap();
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
            let result = (0..=1000 / 9).try_for_each(|_| filter.pass(&mut flood.clone(), || start));
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
                filter.pass(&mut steady, || now),
                Ok(()),
                "a stream that lives for long, second {second}"
            );
        }
        let mut filter = fresh();
        filter.pass(&mut frame(1, 4, 1, &[0x83]), || start).unwrap();
        let mut large = frame(0, 0, 1, &[0; 16384]).repeat(50);
        assert_eq!(filter.pass(&mut large, || start), Ok(()), "a large request");
    }

    /// A field as it is sent, and as it must arrive.
    fn field() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let value = vec(any::<u8>(), 0..300);
        let literal = prop_oneof![Just((0x40, 0x3f)), Just((0x00, 0x0f)), Just((0x10, 0x0f))];
        let same = |bytes: Vec<u8>| (bytes.clone(), bytes);
        prop_oneof![
            (0usize..5000).prop_map(move |i| {
                let sent = integer(0x80, 0x7f, i);
                (sent.clone(), if i == 1 { vec![EMPTY_HEADER] } else { sent })
            }),
            (0usize..5000).prop_map(move |n| same(integer(0x20, 0x1f, n))),
            (literal.clone(), 2usize..5000, value.clone(), any::<bool>()).prop_map(
                move |((bits, mask), i, v, h)| { same([integer(bits, mask, i), string(h, &v)].concat()) }
            ),
            (literal.clone(), vec(any::<u8>(), 0..20), value.clone(), any::<bool>(), any::<bool>())
                .prop_filter("another name", |(_, name, ..)| name != AUTHORITY && name != CODED_AUTHORITY)
                .prop_map(move |((bits, _), name, v, h1, h2)| {
                    same([vec![bits], string(h1, &name), string(h2, &v)].concat())
                }),
            (literal, value, 0..3, any::<bool>()).prop_map(|((bits, mask), v, named, coded)| {
                let name = match named {
                    0 => integer(bits, mask, 1),
                    1 => [vec![bits], string(false, AUTHORITY)].concat(),
                    _ => [vec![bits], string(true, CODED_AUTHORITY)].concat(),
                };
                let arrives = if coded { coded_zeros(v.len()) } else { vec![b'0'; v.len()] };
                ([&name[..], &string(coded, &v)].concat(), [name, string(coded, &arrives)].concat())
            }),
        ]
    }

    /// The frames of a request: its block cut into frames, with padding and priority, and a body.
    fn request() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let layout = (vec(any::<Index>(), 0..4), any::<Option<u8>>(), any::<bool>(), vec(any::<u8>(), 0..50));
        (vec(field(), 0..8), layout).prop_map(|(fields, (cuts, padding, priority, body))| {
            let (sent, arrives): (Vec<_>, Vec<_>) = fields.into_iter().unzip();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(sent.concat().len() + 1)).collect();
            cuts.sort_unstable();
            let frames = |block: &[u8]| {
                let mut frames = Vec::new();
                let mut from = 0;
                let ends = cuts.iter().copied().chain([block.len()]);
                for (i, end) in ends.enumerate() {
                    let last = if i == cuts.len() { 4 } else { 0 };
                    let part = &block[from..end];
                    from = end;
                    if i > 0 {
                        frames.push(frame(9, last, 1, part));
                        continue;
                    }
                    let mut payload = Vec::new();
                    let mut flags = last;
                    if let Some(padding) = padding {
                        flags |= 8;
                        payload.push(padding);
                    }
                    if priority {
                        flags |= 0x20;
                        payload.extend_from_slice(b"/%/%/");
                    }
                    payload.extend_from_slice(part);
                    payload.resize(payload.len() + usize::from(padding.unwrap_or(0)), b'%');
                    frames.push(frame(1, flags, 1, &payload));
                }
                frames.push(frame(0, 0, 1, &body));
                frames.concat()
            };
            (frames(&sent.concat()), frames(&arrives.concat()))
        })
    }

    proptest! {
        #[test]
        fn only_the_bytes_of_authorities_change(
            requests in vec(request(), 0..4),
            cuts in vec(any::<Index>(), 0..10),
        ) {
            let (sent, arrives): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
            let (sent, arrives) = (connection(&sent), connection(&arrives));
            let cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(sent.len())).collect();
            prop_assert_eq!(through(&sent, RICH, &cuts), (arrives, Ok(())));
        }

        #[test]
        fn anything_passes_whole_and_alike_however_it_is_cut(
            noise in vec(any::<u8>(), 0..600),
            frames in vec((0u8..12, any::<u8>(), 0u8..5, vec(any::<u8>(), 0..80)), 0..12),
            preface in any::<bool>(),
            cuts in vec(any::<Index>(), 0..10),
            burst in 0u32..400,
        ) {
            let frames: Vec<Vec<u8>> = frames.iter().map(|(k, f, s, p)| frame(*k, *f, *s, p)).collect();
            let bytes = [if preface { connection(&frames) } else { frames.concat() }, noise].concat();
            let cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            for budget in [RICH, FrameBudget { burst, per_second: 0 }] {
                let (whole, result) = through(&bytes, budget, &[]);
                prop_assert_eq!(whole.len(), bytes.len());
                for (before, after) in bytes.iter().zip(&whole) {
                    let written = matches!(*after, b'0' | 0 | 1 | 3 | 7 | 15) || (*before, *after) == (EMPTY_AUTHORITY, EMPTY_HEADER);
                    prop_assert!(before == after || written);
                }
                prop_assert_eq!(through(&bytes, budget, &cuts), (whole, result));
            }
        }
    }
}
