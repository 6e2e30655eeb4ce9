//! What has come of a connection and is on its way to HTTP/2, through the [`Filter`].
//!
//! Nearly all of it passes where it stands. A frame may have to grow: h2 refuses an `:authority` without a value, and there is no
//! byte of one that could be written over. A frame's length stands at its beginning, which is therefore kept back until it is
//! known, at most 256 bytes of a frame. HTTP/2 could do nothing with a part of it. Where `:authority` comes later than
//! that, or the frame would become too long, h2 refuses the request. With the length the flags are kept back, of
//! which fields behind a body lose one.

use std::mem;

use tokio::{io::ReadBuf, time::Instant};

use super::frames::{Filter, Flood, FrameBudget};

/// The way of one connection's bytes.
#[derive(Clone, Debug)]
pub struct Passage {
    filter: Filter,
    /// What has passed and found no room, and then the beginning of a frame that may still grow.
    kept: Vec<u8>,
    /// How much of that has passed.
    passed: usize,
}

impl Passage {
    /// At the start of a connection.
    pub fn new(budget: FrameBudget, now: Instant) -> Self {
        Self { filter: Filter::new(budget, now), kept: Vec::new(), passed: 0 }
    }

    /// What looks at it.
    pub(super) fn filter(&mut self) -> &mut Filter {
        &mut self.filter
    }

    /// Whether something has passed that is still to be taken, before more comes.
    pub fn waits(&self) -> bool {
        self.passed > 0
    }

    /// Takes what has passed and found no room, as far as there is some.
    pub fn take(&mut self, buf: &mut ReadBuf<'_>) {
        let fits = self.passed.min(buf.remaining());
        buf.put_slice(self.kept.get(..fits).unwrap_or_default());
        drop(self.kept.drain(..fits));
        self.passed -= fits;
        if self.passed == 0 {
            // A connection at rest keeps no room for what has gone.
            self.kept.shrink_to_fit();
        }
    }

    /// Lets pass what came: all in `buf` from `from` on. What stands there then is for HTTP/2; it may be nothing.
    ///
    /// # Errors
    /// [`Flood`]: the connection is to be closed.
    pub fn pass(
        &mut self,
        buf: &mut ReadBuf<'_>,
        from: usize,
        now: impl Fn() -> Instant,
    ) -> Result<(), Flood> {
        let mut came = buf.filled_mut().get_mut(from..).unwrap_or_default();
        let mut passed = self.filter.pass(came, &now)?;
        if self.kept.is_empty() && passed.change.is_none() {
            let goes_on = came.len().saturating_sub(self.filter.may_grow());
            self.kept.extend_from_slice(came.get(goes_on..).unwrap_or_default());
            buf.set_filled(from + goes_on);
            return Ok(());
        }
        let mut whole = mem::take(&mut self.kept);
        loop {
            let (done, rest) = came.split_at_mut(passed.bytes);
            whole.extend_from_slice(done);
            came = rest;
            let Some(change) = passed.change else { break };
            let at = whole.len().checked_sub(change.so_far);
            if let Some(head) = at.and_then(|at| whole.get_mut(at..at + change.head.len())) {
                head.copy_from_slice(&change.head);
            }
            whole.extend_from_slice(change.behind);
            passed = self.filter.pass(came, &now)?;
        }
        buf.set_filled(from);
        self.passed = whole.len().saturating_sub(self.filter.may_grow());
        self.kept = whole;
        self.take(buf);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;
    use crate::peer::{
        frames::{MAY_GROW, PREFACE},
        hpack::{AUTHORITY, CODED_AUTHORITY, EMPTY_AUTHORITY},
    };

    const RICH: FrameBudget = FrameBudget { burst: u32::MAX, per_second: 0 };

    /// What HTTP/2 sees of `bytes` when they come in pieces, cut at these places, and it has so much room each time.
    fn through(bytes: &[u8], room: usize, cuts: &[usize]) -> Vec<u8> {
        let now = Instant::now();
        let mut passage = Passage::new(RICH, now);
        let mut ends: Vec<usize> = cuts.iter().copied().filter(|cut| *cut < bytes.len()).collect();
        ends.sort_unstable();
        ends.push(bytes.len());
        let (mut out, mut at) = (Vec::new(), 0);
        for end in ends {
            while at < end || passage.waits() {
                let mut space = vec![0; room];
                let mut buf = ReadBuf::new(&mut space);
                if passage.waits() {
                    passage.take(&mut buf);
                    assert!(!buf.filled().is_empty(), "nothing is the end");
                } else {
                    let next = end.min(at + room);
                    buf.put_slice(&bytes[at..next]);
                    at = next;
                    passage.pass(&mut buf, 0, || now).unwrap();
                }
                out.extend_from_slice(buf.filled());
                assert!(passage.waits() || passage.kept.capacity() <= usize::try_from(MAY_GROW).unwrap());
            }
        }
        out
    }

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let [_, l0, l1, l2] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[l0, l1, l2, kind, flags, 0, 0, 0, stream], payload].concat()
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

    /// A connection, on which each HEADERS begins a stream.
    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut frames = frames.concat();
        let (mut at, mut stream) = (0, 1_u32);
        while let Some([l0, l1, l2, kind, _, number @ ..]) = frames.get_mut(at..at + 9) {
            if *kind == 1 {
                number.copy_from_slice(&stream.to_be_bytes());
                stream += 2;
            }
            at += 9 + usize::try_from(u32::from_be_bytes([0, *l0, *l1, *l2])).unwrap();
        }
        [PREFACE, &frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]), &frames].concat()
    }

    /// Their END_STREAM alone goes, from which h2 knows them for malformed.
    #[test]
    fn fields_behind_a_body_lose_their_end() {
        let begun = [PREFACE, &frame(1, 4, 1, &[0x83]), &frame(0, 0, 1, b"body")].concat();
        for (case, sent, flags) in [
            ("some", frame(1, 5, 1, &[0x86, 0x83]), 4),
            ("padded", frame(1, 0xd, 1, &[1, 0x86, 0]), 0xc),
            ("with a priority", frame(1, 0x25, 1, &[0, 0, 0, 0, 9, 0x86]), 0x24),
            ("in two frames", [frame(1, 1, 1, &[0x86]), frame(9, 4, 1, &[0x83])].concat(), 0),
            ("empty, and more", [frame(1, 1, 1, &[]), frame(9, 4, 1, &[0x83])].concat(), 0),
            ("none", frame(1, 5, 1, &[]), 5),
            ("malformed anyway", frame(1, 4, 1, &[0x86]), 4),
            ("a request", frame(1, 5, 3, &[0x86]), 5),
            ("of nobody", frame(1, 5, 0, &[0x86]), 5),
        ] {
            let mut seen = sent.clone();
            seen[4] = flags;
            let after = frame(6, 0, 0, &[7; 8]);
            let (sent, seen) = ([&begun[..], &sent, &after].concat(), [&begun[..], &seen, &after].concat());
            check(case, &sent, &seen);
        }
    }

    /// A byte of a header block as it is sent, and what HTTP/2 sees in its place.
    type Sent = (u8, Vec<u8>);

    fn same(bytes: Vec<u8>) -> Vec<Sent> {
        over(bytes.clone(), bytes)
    }

    fn over(sent: Vec<u8>, seen: Vec<u8>) -> Vec<Sent> {
        assert_eq!(sent.len(), seen.len());
        sent.into_iter().zip(seen.into_iter().map(|byte| vec![byte])).collect()
    }

    /// Of a field without a value: the last byte gives way to these.
    fn grown(field: Vec<u8>, by: &[u8]) -> Vec<Sent> {
        let mut sent = same(field);
        sent.last_mut().unwrap().1 = by.to_vec();
        sent
    }

    /// What is before a part of a header block in its frame, and behind it.
    #[derive(Clone, Copy, Debug)]
    struct Around {
        padding: Option<u8>,
        priority: bool,
    }

    /// A part of a block in its frame, as it is sent and as it is seen.
    fn part(kind: u8, flags: u8, around: Around, block: &[Sent]) -> (Vec<u8>, Vec<u8>) {
        let mut flags = flags;
        let mut before = Vec::new();
        if let Some(padding) = around.padding {
            flags |= 8;
            before.push(padding);
        }
        if around.priority {
            flags |= 0x20;
            before.extend_from_slice(b"/%/%/");
        }
        let (mut sent, mut seen) = (before.clone(), before);
        for (byte, becomes) in block {
            sent.push(*byte);
            // Its head is of nine bytes.
            if becomes.len() > 1 && 9 + seen.len() + 1 > usize::try_from(MAY_GROW).unwrap() {
                seen.push(*byte);
            } else {
                seen.extend_from_slice(becomes);
            }
        }
        let behind = vec![b'%'; usize::from(around.padding.unwrap_or(0))];
        let [sent, seen] =
            [sent, seen].map(|payload| frame(kind, flags, 1, &[payload, behind.clone()].concat()));
        (sent, seen)
    }

    /// A block that is cut into frames at these places, the first of them with something around it.
    fn in_frames(cuts: &[usize], around: Around, block: &[Sent]) -> (Vec<u8>, Vec<u8>) {
        let mut ends: Vec<usize> = cuts.to_vec();
        ends.sort_unstable();
        ends.push(block.len());
        let (mut sent, mut seen, mut from) = (Vec::new(), Vec::new(), 0);
        for (i, end) in ends.iter().enumerate() {
            let (kind, around) = if i == 0 { (1, around) } else { (9, PLAIN) };
            let flags = if i == cuts.len() { 4 } else { 0 };
            let both = part(kind, flags, around, &block[from..*end]);
            sent.extend(both.0);
            seen.extend(both.1);
            from = *end;
        }
        (sent, seen)
    }

    const PLAIN: Around = Around { padding: None, priority: false };

    /// Checks the whole, each cut in two, and byte by byte, with much room and with little.
    fn check(case: &str, bytes: &[u8], expect: &[u8]) {
        assert_eq!(through(bytes, 9000, &[]), expect, "{case}");
        for cut in 0..bytes.len() {
            assert_eq!(through(bytes, 9000, &[cut]), expect, "{case}, cut at {cut}");
        }
        let all: Vec<usize> = (0..bytes.len()).collect();
        assert_eq!(through(bytes, 9000, &all), expect, "{case}, byte by byte");
        for room in [1, 2, 7] {
            assert_eq!(through(bytes, room, &[]), expect, "{case}, with room for {room}");
        }
    }

    /// Every field but those of `:authority`.
    fn others() -> Vec<Sent> {
        let fields = [
            integer(0x20, 0x1f, 4096),
            vec![0x83, 0x86],
            integer(0x80, 0x7f, 300),
            by_index(0x40, 0x3f, 4, b"/SpiffeWorkloadAPI/%"),
            by_index(0x40, 0x3f, 4, b""),
            by_index(0x00, 0x0f, 64, b"a/b"),
            by_name(0x40, b"", b""),
            by_name(0x40, b":authorit/", b"a/b"),
            by_name(0x40, b":authority2", b"a/b"),
            by_name(0x40, b":authority2", b""),
            by_name(0x40, b":authori", b"a/b"),
            by_name(0x40, b"te", b"trailers/%"),
        ];
        same(fields.concat())
    }

    #[test]
    fn every_authority_is_one_that_no_uri_refuses() {
        let c_core = b"tmp%2Fx.sock".as_slice();
        let legal = b"000000000000".as_slice();
        let coded = |value: &[u8]| [integer(0x40, 0x3f, 1), string(true, value)].concat();
        let coded_name = |value: Vec<u8>| [vec![0x40], string(true, CODED_AUTHORITY), value].concat();
        let long = [b"a%".repeat(200), b"0".repeat(400)];
        let indexed = |bits: u8, mask: u8, value: &[u8]| by_index(bits, mask, 1, value);
        let named = |bits: u8, value: &[u8]| by_name(bits, AUTHORITY, value);
        for (case, field) in [
            ("literal name, as C-core sends", over(named(0x40, c_core), named(0x40, legal))),
            ("literal name, not indexed", over(named(0x00, c_core), named(0x00, legal))),
            ("literal name, never indexed", over(named(0x10, c_core), named(0x10, legal))),
            ("indexed name", over(indexed(0x40, 0x3f, c_core), indexed(0x40, 0x3f, legal))),
            ("indexed name, not indexed", over(indexed(0x00, 0x0f, c_core), indexed(0x00, 0x0f, legal))),
            ("indexed name, never indexed", over(indexed(0x10, 0x0f, c_core), indexed(0x10, 0x0f, legal))),
            ("a bare path", over(indexed(0x40, 0x3f, b"/run/x y"), indexed(0x40, 0x3f, b"00000000"))),
            ("a long value", over(indexed(0x40, 0x3f, &long[0]), indexed(0x40, 0x3f, &long[1]))),
            ("a name that is one", over(indexed(0x40, 0x3f, b"localhost:80"), indexed(0x40, 0x3f, legal))),
            ("a coded value", over(coded(b"\x60\xd5\x48"), coded(&coded_zeros(3)))),
            ("a long one", over(coded(&[0xff; 300]), coded(&coded_zeros(300)))),
            ("a coded name", over(coded_name(string(false, c_core)), coded_name(string(false, legal)))),
            (
                "both coded",
                over(coded_name(string(true, b"\x60\xd5")), coded_name(string(true, &coded_zeros(2)))),
            ),
            ("empty, indexed", grown(vec![EMPTY_AUTHORITY], &[1, 1, b'0'])),
            ("empty, indexed name", grown(indexed(0x40, 0x3f, b""), &[1, b'0'])),
            ("empty, indexed name, not indexed", grown(indexed(0x00, 0x0f, b""), &[1, b'0'])),
            ("empty, indexed name, never indexed", grown(indexed(0x10, 0x0f, b""), &[1, b'0'])),
            ("empty, literal name", grown(named(0x00, b""), &[1, b'0'])),
            ("empty, a coded name", grown(coded_name(string(false, b"")), &[1, b'0'])),
            ("empty and coded", grown(coded(b""), &[1, b'0'])),
            ("empty, both coded", grown(coded_name(string(true, b"")), &[1, b'0'])),
        ] {
            for (place, block) in [
                ("alone", field.clone()),
                ("first", [field.clone(), others()].concat()),
                ("last", [others(), field.clone()].concat()),
                ("twice", [same(vec![0x83]), field.clone(), field.clone(), same(vec![0x86])].concat()),
            ] {
                let case = format!("{case}, {place}");
                let (sent, seen) = in_frames(&[], PLAIN, &block);
                check(&case, &connection(slice::from_ref(&sent)), &connection(slice::from_ref(&seen)));
                // In the second request of a connection, after a body that looks like a header block.
                let between = [frame(0, 1, 1, &named(0x40, c_core)), frame(1, 4, 1, &[0x83])];
                let second = |request: Vec<u8>| connection(&[&between[..], &[request]].concat());
                let seconds = (second(sent), second(seen));
                assert_eq!(through(&seconds.0, 9000, &[]), seconds.1, "{case}");
                // Padded, with a priority, over three frames and an empty one.
                let cuts = [block.len() / 3, block.len() / 2, block.len() / 2];
                let (sent, seen) = in_frames(&cuts, Around { padding: Some(4), priority: true }, &block);
                check(&case, &connection(&[sent]), &connection(&[seen]));
            }
        }
    }

    /// What comes late in its frame, or would make it longer than any peer has to take, passes as it is.
    #[test]
    fn a_frame_grows_near_its_beginning_and_within_its_bound() {
        let late = |filling: usize| [vec![0x86; filling], by_index(0x00, 0x0f, 1, b"")].concat();
        for (case, filling, behind, grows) in [
            ("at the last place", 256 - 9 - 2, 0, true),
            ("behind it", 256 - 9 - 1, 0, false),
            ("in a frame with room for one more byte", 0, 16_384 - 2 - 1, true),
            ("in a full one", 0, 16_384 - 2, false),
        ] {
            let (block, behind) = (late(filling), vec![0x86; behind]);
            let sent = connection(&[frame(1, 4, 1, &[&block[..], &behind].concat())]);
            let seen = if grows {
                let block = [&block[..block.len() - 1], &[1, b'0'], &behind].concat();
                connection(&[frame(1, 4, 1, &block)])
            } else {
                sent.clone()
            };
            assert!(through(&sent, 9000, &[]) == seen, "{case}");
            let all: Vec<usize> = (0..sent.len()).collect();
            assert!(through(&sent, 9000, &all) == seen, "{case}, byte by byte");
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
    fn a_part_of_a_frame_is_kept_back_until_nothing_can_change_in_it() {
        let now = Instant::now();
        let head = |kind: u8, length: u8| vec![0, 0, length, kind, 0, 0, 0, 0, 1];
        for (case, bytes, kept) in [
            ("a part of the preface", PREFACE[..10].to_vec(), 0),
            ("the preface", PREFACE.to_vec(), 0),
            ("a whole frame", connection(&[]), 0),
            ("a part of a head", connection(&[vec![0, 0, 8, 0]]), 4),
            ("a part of DATA", connection(&[head(0, 100), vec![0; 10]]), 0),
            ("the head of HEADERS", connection(&[head(1, 100)]), 9),
            ("a part of a block", connection(&[head(1, 100), vec![0x86; 50]]), 59),
            ("a long one", connection(&[head(1, 255), vec![0x86; 250]]), 0),
        ] {
            let mut passage = Passage::new(RICH, now);
            let mut space = vec![0; 9000];
            let mut buf = ReadBuf::new(&mut space);
            buf.put_slice(&bytes);
            passage.pass(&mut buf, 0, || now).unwrap();
            assert_eq!(bytes.len() - buf.filled().len(), kept, "{case}");
        }
    }

    /// A field.
    fn field() -> impl Strategy<Value = Vec<Sent>> {
        let value = vec(any::<u8>(), 0..300);
        let literal = prop_oneof![Just((0x40, 0x3f)), Just((0x00, 0x0f)), Just((0x10, 0x0f))];
        prop_oneof![
            (0usize..5000).prop_map(move |i| {
                let sent = integer(0x80, 0x7f, i);
                if i == 1 { grown(sent, &[1, 1, b'0']) } else { same(sent) }
            }),
            Just(grown(vec![EMPTY_AUTHORITY], &[1, 1, b'0'])),
            (0usize..5000).prop_map(move |n| same(integer(0x20, 0x1f, n))),
            (literal.clone(), 2usize..5000, value.clone(), any::<bool>()).prop_map(
                move |((bits, mask), i, v, h)| { same([integer(bits, mask, i), string(h, &v)].concat()) }
            ),
            (literal.clone(), vec(any::<u8>(), 0..20), value.clone(), any::<bool>(), any::<bool>())
                .prop_filter("another name", |(_, name, ..)| name != AUTHORITY && name != CODED_AUTHORITY)
                .prop_map(move |((bits, _), name, v, h1, h2)| {
                    same([vec![bits], string(h1, &name), string(h2, &v)].concat())
                }),
            (literal, prop_oneof![value, Just(Vec::new())], 0..3, any::<bool>()).prop_map(
                |((bits, mask), v, named, coded)| {
                    let name = match named {
                        0 => integer(bits, mask, 1),
                        1 => [vec![bits], string(false, AUTHORITY)].concat(),
                        _ => [vec![bits], string(true, CODED_AUTHORITY)].concat(),
                    };
                    let sent = [&name[..], &string(coded, &v)].concat();
                    let seen = if coded { coded_zeros(v.len()) } else { vec![b'0'; v.len()] };
                    let seen = [name, string(coded, &seen)].concat();
                    if v.is_empty() { grown(sent, &[1, b'0']) } else { over(sent, seen) }
                }
            ),
        ]
    }

    /// The frames of a request: its block cut into frames, with padding and priority, and a body.
    fn request() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let around =
            (any::<Option<u8>>(), any::<bool>()).prop_map(|(padding, priority)| Around { padding, priority });
        let layout = (vec(any::<Index>(), 0..4), around, vec(any::<u8>(), 0..50));
        (vec(field(), 0..8), layout).prop_map(|(fields, (cuts, around, body))| {
            let block = fields.concat();
            let cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(block.len() + 1)).collect();
            let (sent, seen) = in_frames(&cuts, around, &block);
            let body = frame(0, 0, 1, &body);
            ([sent, body.clone()].concat(), [seen, body].concat())
        })
    }

    proptest! {
        #[test]
        fn only_the_bytes_of_authorities_change(
            requests in vec(request(), 0..4),
            cuts in vec(any::<Index>(), 0..10),
            room in 1usize..3000,
        ) {
            let (sent, seen): (Vec<_>, Vec<_>) = requests.into_iter().unzip();
            let (sent, seen) = (connection(&sent), connection(&seen));
            let cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(sent.len())).collect();
            prop_assert_eq!(through(&sent, room, &cuts), seen);
        }
    }
}
