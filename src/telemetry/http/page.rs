//! One request and its answer, as far as HTTP/1 is needed for that: of a head its first line is read, and the
//! answer ends the connection.
//!
//! A head stays in the kernel's buffer until all of it is there, so whoever sends a part of one costs no
//! memory of the agent's. What is told apart is what a probe or a scraper can get wrong; the other fields of a
//! head are nobody's concern here.

use bytes::Bytes;
use http::StatusCode;
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};

use crate::os::clock::Clock;

/// The longest head that is read, in bytes: more than any scraper sends, a bearer token of Kubernetes' included. As
/// much as that the kernel keeps for each that is not complete.
pub(super) const MOST_HEAD: usize = 4 * 1024;
/// The most fields of a head.
const MOST_FIELDS: usize = 32;

pub(super) const TEXT: &str = "text/plain; charset=utf-8";

/// RFC 9110, section 5.6.7.
const DATE: &[BorrowedFormatItem<'_>] =
    format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AskedPage<'a> {
    pub(super) method: &'a str,
    /// Without the query.
    pub(super) path: &'a str,
}

/// What stands at the beginning of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestHead<'a> {
    /// The rest is still to come.
    Begun,
    Complete(AskedPage<'a>),
    /// No HTTP/1.
    Malformed,
    TooLarge,
}

impl<'a> RequestHead<'a> {
    /// Reads `bytes`, the first of a connection, [`MOST_HEAD`] of them at most.
    pub(super) fn read(bytes: &'a [u8]) -> Self {
        if bytes.first().is_some_and(|first| !first.is_ascii_uppercase()) {
            return Self::Malformed;
        }
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
        let Some(first) = lines.next().and_then(line) else { return Self::unended(bytes) };
        let mut fields = 0;
        loop {
            match lines.next().and_then(line) {
                None => return Self::unended(bytes),
                Some(b"") => break,
                Some(_) => fields += 1,
            }
        }
        if fields > MOST_FIELDS {
            return Self::TooLarge;
        }
        asked(first).map_or(Self::Malformed, Self::Complete)
    }

    fn unended(bytes: &[u8]) -> Self {
        if bytes.len() < MOST_HEAD { Self::Begun } else { Self::TooLarge }
    }
}

/// A line without its end; `None` when the end is not there.
fn line(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_suffix(b"\n")?;
    Some(line.strip_suffix(b"\r").unwrap_or(line))
}

fn asked(line: &[u8]) -> Option<AskedPage<'_>> {
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let whole = words.next().is_none() && method.bytes().all(|byte| byte.is_ascii_uppercase());
    if !whole || !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
        return None;
    }
    // In full, as to a proxy, or from its path on.
    let path = match target.split_once("://") {
        Some((_scheme, rest)) if !target.starts_with('/') => {
            rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("/")
        }
        _ => target,
    };
    let path = path.split('?').next().unwrap_or_default();
    (path.starts_with('/') || path == "*").then_some(AskedPage { method, path })
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) status: StatusCode,
    pub(super) content_type: &'static str,
    /// Further fields of the head, each with its line's end.
    pub(super) more: &'static str,
    pub(super) body: Bytes,
}

impl Page {
    pub(super) fn new(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, more: "", body: body.into() }
    }

    /// The answer to what is no request that can be answered.
    pub(super) fn refusal(status: StatusCode) -> Self {
        Self::new(status, TEXT, Bytes::new())
    }

    /// What is sent before the body.
    pub(super) fn head(&self) -> String {
        let Self { status, content_type, more, body } = self;
        let reason = status.canonical_reason().unwrap_or_default();
        // A year of five digits is the only date that cannot be written.
        let date = OffsetDateTime::from(Clock::SYSTEM.now()).format(DATE).unwrap_or_default();
        format!(
            "HTTP/1.1 {} {reason}\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n{more}\
             connection: close\r\ndate: {date}\r\n\r\n",
            status.as_str(),
            body.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn get(path: &str) -> RequestHead<'_> {
        RequestHead::Complete(AskedPage { method: "GET", path })
    }

    #[test]
    fn a_head_is_read_as_far_as_it_matters() {
        let fields = |n: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(n));
        for (case, bytes, want) in [
            ("a probe's", "GET /live HTTP/1.1\r\nHost: a\r\n\r\n", get("/live")),
            ("no fields", "GET /live HTTP/1.0\r\n\r\n", get("/live")),
            ("typed by hand", "GET /live HTTP/1.1\n\n", get("/live")),
            ("a query", "GET /live?x=/y HTTP/1.1\r\n\r\n", get("/live")),
            ("in full", "GET http://a:80/live?x HTTP/1.1\r\n\r\n", get("/live")),
            ("in full, no path", "GET http://a HTTP/1.1\r\n\r\n", get("/")),
            ("a URL in the path", "GET /a://b HTTP/1.1\r\n\r\n", get("/a://b")),
            ("a body follows", "GET / HTTP/1.1\r\n\r\nGET /x HTTP/1.1\r\n\r\n", get("/")),
            ("as many fields as may be", &fields(MOST_FIELDS), get("/")),
            ("one more", &fields(MOST_FIELDS + 1), RequestHead::TooLarge),
            ("nothing", "", RequestHead::Begun),
            ("half a line", "GET /live HTT", RequestHead::Begun),
            ("no end", "GET /live HTTP/1.1\r\nHost: a\r\n", RequestHead::Begun),
            ("half an end", "GET /live HTTP/1.1\r\nHost: a\r\n\r", RequestHead::Begun),
            ("TLS", "\x16\x03\x01\x02\x00", RequestHead::Malformed),
            ("an empty line first", "\r\nGET / HTTP/1.1\r\n\r\n", RequestHead::Malformed),
            ("another protocol", "PRI * HTTP/2.0\r\n\r\n", RequestHead::Malformed),
            ("no version", "GET /\r\n\r\n", RequestHead::Malformed),
            ("a word too much", "GET / x HTTP/1.1\r\n\r\n", RequestHead::Malformed),
            ("no path", "GET live HTTP/1.1\r\n\r\n", RequestHead::Malformed),
            ("small letters", "Get / HTTP/1.1\r\n\r\n", RequestHead::Malformed),
        ] {
            assert_eq!(RequestHead::read(bytes.as_bytes()), want, "{case}");
        }
        assert_eq!(RequestHead::read(&[b'A'; MOST_HEAD - 1]), RequestHead::Begun);
        assert_eq!(RequestHead::read(&[b'A'; MOST_HEAD]), RequestHead::TooLarge);
        assert_eq!(RequestHead::read(b"GET /\xff HTTP/1.1\r\n\r\n"), RequestHead::Malformed);
    }

    proptest! {
        /// Whatever comes, and however it is cut, the answer does not change once there is one.
        #[test]
        fn what_is_settled_stays_so(bytes in proptest::collection::vec(any::<u8>(), 0..300), head in "[A-Z]{1,4} /[a-z]{0,4} HTTP/1.[01]\r\n(a: b\r\n){0,3}\r\n") {
            for bytes in [bytes.clone(), [head.as_bytes(), &bytes].concat()] {
                let whole = RequestHead::read(&bytes);
                for cut in 0..bytes.len() {
                    let part = RequestHead::read(&bytes[..cut]);
                    prop_assert!(part == RequestHead::Begun || part == whole, "{cut}: {part:?}, {whole:?}");
                }
            }
        }
    }
}
