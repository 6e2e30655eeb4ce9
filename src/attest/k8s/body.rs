//! The body of an answer as a reader of bounded text.
//!
//! A JSON text is read with little memory only if none of its parts is large: what reads it keeps a string until its end,
//! and one byte for each bracket that is open. So it is read through this, which ends it first.

use std::io;

/// The longest string or number, in bytes: an object of Kubernetes has at most 1.5 MiB.
pub(super) const LONGEST_TOKEN: usize = 2 * 1024 * 1024;
/// Brackets that are open at once.
pub(super) const DEEPEST: usize = 100;

/// What is too large about a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyExcess {
    #[error("it is larger than {0} bytes")]
    Length(usize),
    #[error("it holds a string of more than {LONGEST_TOKEN} bytes")]
    Token,
    #[error("it is nested more than {DEEPEST} deep")]
    Depth,
}

/// Follows a JSON text, as far as its size goes. What is no JSON is for others to notice.
#[derive(Debug)]
pub(super) struct TextBounds {
    left: usize,
    most: usize,
    token: usize,
    depth: usize,
    within: TextPart,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TextPart {
    Structure,
    String,
    /// The next byte of the string is no end of it.
    Escape,
}

impl TextBounds {
    /// For a text of so many bytes at most.
    pub(super) fn new(most: usize) -> Self {
        Self { left: most, most, token: 0, depth: 0, within: TextPart::Structure }
    }

    /// Takes the next part of the text.
    ///
    /// # Errors
    /// [`BodyExcess`]: it must not be read.
    pub(super) fn take(&mut self, text: &[u8]) -> Result<(), BodyExcess> {
        self.left = self.left.checked_sub(text.len()).ok_or(BodyExcess::Length(self.most))?;
        for byte in text {
            self.token += 1;
            self.within = match (self.within, byte) {
                (TextPart::String, b'\\') => TextPart::Escape,
                (TextPart::String, b'"')
                | (TextPart::Structure, b',' | b':' | b' ' | b'\n' | b'\t' | b'\r') => {
                    self.token = 0;
                    TextPart::Structure
                }
                (TextPart::Escape | TextPart::String, _) => TextPart::String,
                (TextPart::Structure, b'"') => TextPart::String,
                (TextPart::Structure, b'[' | b'{') => {
                    (self.token, self.depth) = (0, self.depth + 1);
                    TextPart::Structure
                }
                (TextPart::Structure, b']' | b'}') => {
                    (self.token, self.depth) = (0, self.depth.saturating_sub(1));
                    TextPart::Structure
                }
                (TextPart::Structure, _) => TextPart::Structure,
            };
            if self.token > LONGEST_TOKEN {
                return Err(BodyExcess::Token);
            }
            if self.depth > DEEPEST {
                return Err(BodyExcess::Depth);
            }
        }
        Ok(())
    }
}

/// Gives the next part of a body; an empty one at its end.
pub(super) trait BodyParts {
    type Part: AsRef<[u8]>;
    type Fault;

    /// # Errors
    /// The body does not come to its end.
    fn next(&mut self) -> Result<Option<Self::Part>, Self::Fault>;
}

/// Why a body was not read to its end.
#[derive(Debug)]
pub(super) enum BodyFault<F> {
    Excess(BodyExcess),
    Parts(F),
}

/// Reads a body within bounds, and remembers why it could not.
pub(super) struct BoundedBody<B: BodyParts> {
    parts: B,
    part: Option<B::Part>,
    /// Of the part, so much was read.
    read: usize,
    bounds: TextBounds,
    pub(super) fault: Option<BodyFault<B::Fault>>,
}

impl<B: BodyParts> BoundedBody<B> {
    pub(super) fn new(parts: B, bounds: TextBounds) -> Self {
        Self { parts, part: None, read: 0, bounds, fault: None }
    }

    fn failed(&mut self, fault: BodyFault<B::Fault>) -> io::Error {
        self.fault = Some(fault);
        io::Error::other("the body ends early")
    }
}

impl<B: BodyParts> io::Read for BoundedBody<B> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let part = self.part.as_ref().map_or(&[][..], AsRef::as_ref);
            let rest = part.get(self.read..).unwrap_or_default();
            if !rest.is_empty() {
                let n = rest.len().min(buffer.len());
                let (Some(from), Some(to)) = (rest.get(..n), buffer.get_mut(..n)) else { return Ok(0) };
                to.copy_from_slice(from);
                self.read += n;
                return Ok(n);
            }
            match self.parts.next() {
                Ok(None) => return Ok(0),
                Ok(Some(part)) => {
                    if let Err(excess) = self.bounds.take(part.as_ref()) {
                        return Err(self.failed(BodyFault::Excess(excess)));
                    }
                    (self.part, self.read) = (Some(part), 0);
                }
                Err(fault) => return Err(self.failed(BodyFault::Parts(fault))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use proptest::prelude::*;

    use super::*;

    struct Given(std::vec::IntoIter<Result<Vec<u8>, &'static str>>);

    impl BodyParts for Given {
        type Part = Vec<u8>;
        type Fault = &'static str;

        fn next(&mut self) -> Result<Option<Vec<u8>>, &'static str> {
            self.0.next().transpose()
        }
    }

    fn body(parts: Vec<Result<Vec<u8>, &'static str>>, most: usize) -> BoundedBody<Given> {
        BoundedBody::new(Given(parts.into_iter()), TextBounds::new(most))
    }

    #[test]
    fn a_text_is_bounded_in_every_way() {
        let long = |n: usize| format!("\"{}\"", "x".repeat(n)).into_bytes();
        for (case, text, want) in [
            ("short", b"{\"a\": [1, 2]}".to_vec(), None),
            ("long in all", [long(90), long(90)].concat(), Some(BodyExcess::Length(150))),
            ("deep", b"[".repeat(DEEPEST + 1), Some(BodyExcess::Depth)),
            ("as deep as may be", b"[".repeat(DEEPEST), None),
            ("many, not deep", b"[]".repeat(70), None),
            ("brackets in a string", format!("\"{}\"", "[".repeat(140)).into_bytes(), None),
            ("an escaped quote is no end", format!("\"\\\"{}\"", "[".repeat(120)).into_bytes(), None),
            (
                "an escaped escape is",
                format!("\"\\\\\"{}", "[".repeat(120)).into_bytes(),
                Some(BodyExcess::Depth),
            ),
        ] {
            assert_eq!(TextBounds::new(150).take(&text).err(), want, "{case}");
        }
        let mut bounds = TextBounds::new(usize::MAX);
        assert_eq!(bounds.take(&long(LONGEST_TOKEN - 2)), Ok(()));
        assert_eq!(bounds.take(&long(LONGEST_TOKEN)), Err(BodyExcess::Token));
        assert_eq!(TextBounds::new(usize::MAX).take(&vec![b'1'; LONGEST_TOKEN + 1]), Err(BodyExcess::Token));
        assert_eq!(TextBounds::new(usize::MAX).take(&b"1,".repeat(LONGEST_TOKEN)), Ok(()), "many short ones");
    }

    #[test]
    fn a_body_that_breaks_says_so() {
        let mut broken = body(vec![Ok(b"{".to_vec()), Err("cut")], 10);
        let mut text = String::new();
        assert!(broken.read_to_string(&mut text).is_err());
        assert!(matches!(broken.fault, Some(BodyFault::Parts("cut"))));
        let mut long = body(vec![Ok(b"{}".to_vec()), Ok(b"{}".to_vec())], 3);
        assert!(long.read_to_string(&mut text).is_err());
        assert!(matches!(long.fault, Some(BodyFault::Excess(BodyExcess::Length(3)))));
    }

    proptest! {
        /// However it comes, it is read as it was sent.
        #[test]
        fn a_body_is_read_as_it_comes(parts in proptest::collection::vec(proptest::collection::vec(b'a'..=b'z', 0..50), 0..20)) {
            let mut text = Vec::new();
            let sent = parts.concat();
            // An empty part is no end.
            let parts = parts.into_iter().map(Ok).collect();
            body(parts, 1000).read_to_end(&mut text).unwrap();
            prop_assert_eq!(text, sent);
        }
    }
}
