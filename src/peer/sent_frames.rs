//! The frames that HTTP/2 writes, walked as they go: where one ends, and what it tells the peer went wrong.
//!
//! h2 resets streams and gives connections up by itself, and tells nobody but the peer. What is walked is this process's own.

use crate::telemetry::registry::labels;

labels! {
    /// Why a stream was reset, or a connection given up.
    Http2Error, "reason" {
        /// What came broke the rules of HTTP/2: PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR or
        /// COMPRESSION_ERROR.
        Protocol = "protocol",
        /// There were as many requests on the connection as there may be.
        Refused = "refused_stream",
        /// Too much of what h2 bounds by itself: resets, say.
        Calm = "enhance_your_calm",
        /// Any other: that nobody answers any more, say.
        Other = "other",
    }
}

/// What a frame tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) error: Http2Error,
    /// The name that HTTP/2 has for it (RFC 9113, section 7), or the status of HTTP that was sent before.
    pub(super) code: &'static str,
    /// The stream that is reset; 0 for the connection.
    pub(super) stream: u32,
}

impl Told {
    /// `None` for NO_ERROR.
    const fn of(code: u32, stream: u32) -> Option<Self> {
        let (error, code) = match code {
            0 => return None,
            1 => (Http2Error::Protocol, "PROTOCOL_ERROR"),
            2 => (Http2Error::Other, "INTERNAL_ERROR"),
            3 => (Http2Error::Protocol, "FLOW_CONTROL_ERROR"),
            5 => (Http2Error::Protocol, "STREAM_CLOSED"),
            6 => (Http2Error::Protocol, "FRAME_SIZE_ERROR"),
            7 => (Http2Error::Refused, "REFUSED_STREAM"),
            8 => (Http2Error::Other, "CANCEL"),
            9 => (Http2Error::Protocol, "COMPRESSION_ERROR"),
            11 => (Http2Error::Calm, "ENHANCE_YOUR_CALM"),
            _ => (Http2Error::Other, "another"),
        };
        Some(Self { error, code, stream })
    }
}

/// Length of a frame's head.
pub(super) const HEAD: usize = 9;
/// Of a frame as much is kept as tells why: the head of a GOAWAY, its last stream, its code.
const TELLS: usize = HEAD + 8;

/// What is said of a request that was answered with 431: by the code of its reset alone it would have broken a rule.
const TOO_LARGE: &str = "431 (the header list is too large)";
/// Of so many streams that may be so is known: h2 has looked at no more of them between an answer and its reset.
const BARE: usize = 8;

/// Where in the frames.
#[derive(Clone, Debug, Default)]
pub(super) struct SentFrames {
    frame: [u8; TELLS],
    /// So many bytes of the frame have passed.
    passed: usize,
    /// The newest streams that ended with a header block that may be a bare status of 431, and the place of the next.
    bare: [u32; BARE],
    next_bare: usize,
}

impl SentFrames {
    /// How many bytes are left of what has begun, a head or a frame; 0 between two frames.
    pub(super) fn left(&self) -> usize {
        match self.passed {
            0 => 0,
            passed if passed < HEAD => HEAD - passed,
            passed => self.whole() - passed,
        }
    }

    /// The length of the frame with its head, once that has passed.
    fn whole(&self) -> usize {
        let [high, middle, low, ..] = self.frame;
        HEAD + (usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low))
    }

    /// These pass; `told` hears what they say.
    pub(super) fn pass(&mut self, mut bytes: &[u8], mut told: impl FnMut(Told)) {
        while !bytes.is_empty() {
            let most = if self.passed < HEAD { HEAD - self.passed } else { self.whole() - self.passed };
            let (part, rest) = bytes.split_at(most.min(bytes.len()));
            for (at, byte) in self.frame.iter_mut().skip(self.passed).zip(part) {
                *at = *byte;
            }
            self.passed += part.len();
            bytes = rest;
            if self.passed >= HEAD && self.passed == self.whole() {
                self.told().into_iter().for_each(&mut told);
                self.passed = 0;
            }
        }
    }

    fn told(&mut self) -> Option<Told> {
        const HEADERS: u8 = 1;
        const END_STREAM: u8 = 1;
        const RST_STREAM: u8 = 3;
        const GOAWAY: u8 = 7;
        let [_, _, _, kind, flags, s0, s1, s2, s3, a0, a1, a2, a3, b0, b1, b2, b3] = self.frame;
        let (code, stream) = match kind {
            RST_STREAM => ([a0, a1, a2, a3], [s0, s1, s2, s3]),
            GOAWAY => ([b0, b1, b2, b3], [0; 4]),
            HEADERS if flags & END_STREAM != 0 && self.may_be_431() => {
                if let Some(place) = self.bare.get_mut(self.next_bare) {
                    *place = u32::from_be_bytes([s0, s1, s2, s3]);
                }
                self.next_bare = (self.next_bare + 1) % BARE;
                return None;
            }
            _ => return None,
        };
        let told = Told::of(u32::from_be_bytes(code), u32::from_be_bytes(stream))?;
        let is_431 =
            told.error == Http2Error::Protocol && self.bare.contains(&told.stream) && told.stream > 0;
        Some(if is_431 { Told { code: TOO_LARGE, ..told } } else { told })
    }

    /// Whether the header block is one field that may be `:status: 431`: such a literal, or a field from the table.
    fn may_be_431(&self) -> bool {
        /// A literal with the name of an entry for `:status`, its value coded by Huffman's code.
        const STATUS: std::ops::RangeInclusive<u8> = 8..=14;
        const VALUE: [u8; 4] = [0x83, 0x69, 0x90, 0xff];
        /// The first entry that h2 has put there itself.
        const DYNAMIC: u8 = 0x80 | 62;
        match self.frame.get(HEAD..self.whole()) {
            Some([DYNAMIC..=u8::MAX]) => true,
            Some([name, value @ ..]) => STATUS.contains(&(name & !0x40)) && value == VALUE,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[..], &[kind, 0, 0, 0, 0, stream], payload].concat()
    }

    #[test]
    fn what_went_wrong_is_heard_however_it_is_written() {
        let frames = [
            frame(0, 1, &[7; 300]),
            frame(3, 1, &[0, 0, 0, 1]),
            frame(3, 3, &[0, 0, 0, 0]),
            frame(6, 0, &[0, 0, 0, 1, 0, 0, 0, 1]),
            frame(4, 0, &[]),
            frame(3, 5, &[0, 0, 0, 7]),
            frame(7, 0, &[0, 0, 0, 5, 0, 0, 0, 0]),
            frame(7, 0, &[[0, 0, 0, 5, 0, 0, 0, 11].as_slice(), b"too_many_resets"].concat()),
            frame(3, 7, &[0, 0, 0, 99]),
        ]
        .concat();
        let expected =
            [(1, 1), (7, 5), (11, 0), (99, 7)].map(|(code, stream)| Told::of(code, stream).unwrap());
        for piece in [1, 2, 5, 9, 10, 64, frames.len()] {
            let (mut walked, mut heard) = (SentFrames::default(), Vec::new());
            for piece in frames.chunks(piece) {
                walked.pass(piece, |told| heard.push(told));
            }
            assert_eq!(heard, expected, "in pieces of {piece}");
            assert_eq!(walked.left(), 0);
        }
    }

    #[test]
    fn a_header_list_that_is_too_large_has_broken_no_rule() {
        let reset = |stream| frame(3, stream, &[0, 0, 0, 1]);
        let ends = |stream, block: &[u8]| {
            let mut frame = frame(1, stream, block);
            frame[4] = 5;
            frame
        };
        let literal = [0x48, 0x83, 0x69, 0x90, 0xff];
        for (case, frames, code) in [
            ("at first", [ends(1, &literal), reset(1)], TOO_LARGE),
            ("from the table", [ends(1, &[0xbe]), reset(1)], TOO_LARGE),
            ("another stream", [ends(3, &literal), reset(1)], "PROTOCOL_ERROR"),
            ("not its end", [frame(1, 1, &literal), reset(1)], "PROTOCOL_ERROR"),
            ("another status", [ends(1, &[0x48, 0x82, 0x68, 0x17]), reset(1)], "PROTOCOL_ERROR"),
            ("an answer", [ends(1, &[0x88, 0xbe, 0xbf]), reset(1)], "PROTOCOL_ERROR"),
            ("nothing", [ends(1, &[]), reset(1)], "PROTOCOL_ERROR"),
        ] {
            let (mut walked, mut heard) = (SentFrames::default(), Vec::new());
            walked.pass(&frames.concat(), |told| heard.push(told));
            assert_eq!(heard, [Told { error: Http2Error::Protocol, code, stream: 1 }], "{case}");
        }
    }

    #[test]
    fn codes_have_the_names_of_http2() {
        assert_eq!(Told::of(0, 1), None);
        for code in 1..16 {
            let Told { code: name, .. } = Told::of(code, 1).unwrap();
            assert!(name == "another" || name == format!("{:?}", h2::Reason::from(code)), "{code}: {name}");
        }
    }
}
