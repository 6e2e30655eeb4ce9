//! A GOAWAY that is put between the frames which HTTP/2 writes.
//!
//! Once nothing more is read from a connection, its client has to learn which of its calls were heard, so that it
//! repeats the others on another connection by itself (RFC 9113, section 6.8). h2 cannot say that: its farewell
//! names no stream, and it corrects it only after an answer that nobody would read.

use super::sent_frames::{HEAD, SentFrames, Told};

/// Length of a GOAWAY without debug data.
const GOAWAY: usize = HEAD + 8;

/// The frames that are written, and what is put between them.
#[derive(Clone, Debug, Default)]
pub(super) struct LastWord {
    frames: SentFrames,
    /// What is to be said, and how much of it was.
    word: Option<([u8; GOAWAY], usize)>,
}

/// Whose bytes are written next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NextBytes<'a> {
    /// HTTP/2's, so many at most.
    Theirs(usize),
    /// These.
    Ours(&'a [u8]),
}

impl LastWord {
    /// Says that the calls up to this stream were heard, as soon as a frame that has begun is at its end.
    pub(super) fn say(&mut self, last_stream: u32) {
        let mut word = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        if let Some(at) = word.get_mut(HEAD..HEAD + 4) {
            at.copy_from_slice(&last_stream.to_be_bytes());
        }
        self.word = Some((word, 0));
    }

    /// What is to be written next.
    pub(super) fn next(&self) -> NextBytes<'_> {
        let Some((word, said)) = &self.word else { return NextBytes::Theirs(usize::MAX) };
        match self.frames.left() {
            0 => NextBytes::Ours(word.get(*said..).unwrap_or_default()),
            left => NextBytes::Theirs(left),
        }
    }

    /// So many bytes of the word were written.
    pub(super) fn said(&mut self, bytes: usize) {
        if let Some((_, said)) = &mut self.word {
            *said += bytes;
            if *said >= GOAWAY {
                self.word = None;
            }
        }
    }

    /// HTTP/2 has written these; `told` hears what they say went wrong.
    pub(super) fn passed(&mut self, bytes: &[u8], told: impl FnMut(Told)) {
        self.frames.pass(bytes, told);
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    fn frame(payload: &[u8]) -> Vec<u8> {
        let [_, length @ ..] = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[..], &[0, 0, 0, 0, 0, 1], payload].concat()
    }

    const WORD: [u8; GOAWAY] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 0, 0];

    proptest! {
        /// Whatever is written in whatever pieces: the word stands between two frames, whole, where it was said or
        /// soon after, and nothing else is changed.
        #[test]
        fn the_word_stands_between_two_frames(
            payloads in vec(vec(any::<u8>(), 0..300), 0..6),
            said_at in any::<Index>(),
            pieces in vec(1usize..40, 1..20),
        ) {
            let frames: Vec<Vec<u8>> = payloads.iter().map(|payload| frame(payload)).collect();
            let theirs = frames.concat();
            let said_at = said_at.index(theirs.len() + 1);
            let mut word = LastWord::default();
            let (mut out, mut written, mut saying) = (Vec::new(), 0, false);
            for piece in pieces.iter().cycle() {
                if written >= said_at && !saying {
                    word.say(0x103);
                    saying = true;
                }
                match word.next() {
                    NextBytes::Ours(bytes) => {
                        let taken = bytes.len().min(*piece);
                        out.extend_from_slice(&bytes[..taken]);
                        word.said(taken);
                    }
                    NextBytes::Theirs(most) if written < theirs.len() => {
                        let until = if saying { theirs.len() } else { said_at };
                        let taken = most.min(*piece).min(until - written);
                        let bytes = &theirs[written..written + taken];
                        word.passed(bytes, |told| panic!("{told:?}"));
                        out.extend_from_slice(bytes);
                        written += taken;
                    }
                    NextBytes::Theirs(_) => break,
                }
            }
            let mut ends = vec![0];
            ends.extend(frames.iter().scan(0, |end, frame| {
                *end += frame.len();
                Some(*end)
            }));
            let at = *ends.iter().find(|end| **end >= said_at).unwrap();
            let expected = [&theirs[..at], &WORD, &theirs[at..]].concat();
            prop_assert_eq!(out, expected);
        }
    }
}
