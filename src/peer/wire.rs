//! What passes before HTTP/2 sees it: the frames of a peer, walked byte by byte as they arrive.
//!
//! Two jobs. gRPC C-core clients (Python, C++, Ruby, PHP) name the socket's path in `:authority`
//! (`run%2Fagent.sock`), which h2 refuses as no authority: the characters that an authority may not hold are overwritten, each with
//! one that it may, so that no length and no HPACK table changes. And frames that ask for nothing (PING, SETTINGS,
//! WINDOW_UPDATE, empty DATA, unknown ones) are held to a [`Budget`], since h2 answers them for ever.
//!
//! Nothing is trusted and nothing is judged here: what is not HTTP/2, or breaks its rules, passes as it is, and h2
//! refuses it. The state is a few dozen bytes per connection; nothing is buffered, copied or delayed. Absent: Huffman-coded
//! values and names, and names from the dynamic table (C-core sends a plain literal, or an index to one that passed
//! here before).

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

/// What a peer may send that is no request, in bytes. Each new request fills it up again, and so does time, so that
/// the pings and window updates of a stream that lives for months never reach the end of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// How much at once.
    pub burst: u32,
    /// How much comes back each second.
    pub per_second: u32,
}

impl Budget {
    /// 32 KiB at once (about 1,900 pings), and 1 KiB (60 pings) each second: an honest client sends a few frames for
    /// each message that it receives, and a ping every ten seconds.
    pub const DEFAULT: Self = Self { burst: 32 * 1024, per_second: 1024 };
}

impl Default for Budget {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// More frames without a request than the budget holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many frames without a request")]
pub struct Flood;

/// What every HTTP/2 connection begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Length of a frame's head (RFC 9113, section 4.1).
const FRAME_HEAD: u32 = 9;

/// What a frame of DATA costs beyond its head. Its payload costs nothing: flow control bounds that already, and a
/// large request must not look like a flood.
const DATA_COST: u32 = 8;

/// Walks the bytes of one connection from its start. Pure: bytes in, the same number of bytes out.
#[derive(Debug)]
pub struct Filter {
    at: At,
    /// Whether the HEADERS or CONTINUATION that is passing is the last of its header block.
    ends_block: bool,
    /// Between a HEADERS without END_HEADERS and the end of its block.
    in_block: bool,
    hpack: Hpack,
    last_stream: u32,
    budget: Budget,
    left: u32,
    filled_at: Instant,
}

/// Where in the stream of bytes.
#[derive(Debug)]
enum At {
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
}

/// Where in a header block (RFC 7541, section 6). Carries over from frame to frame.
#[derive(Clone, Copy, Debug)]
enum Hpack {
    /// A representation begins.
    Start,
    /// The further bytes of an integer.
    Integer { value: u32, shift: u32, of: Of },
    /// The length of a string begins.
    Length { of: Text },
    /// A string.
    Text { left: u32, of: Text, authority: Authority },
    /// An integer too large for anybody: h2 will refuse the block.
    Lost,
}

/// What an integer says.
#[derive(Clone, Copy, Debug)]
enum Of {
    /// Nothing that matters: an indexed field, the size of the table.
    Nothing,
    /// Where the name of a literal stands.
    NameIndex,
    /// How long a string is.
    Length { of: Text, huffman: bool },
}

/// What a string is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Text {
    /// A name; so many of its bytes are those of `:authority`, if all of them were.
    Name { like_authority: Option<u8> },
    /// The value of `:authority`.
    Authority,
    /// Another value.
    Value,
}

/// What matters of the authority's bytes that have passed.
#[derive(Clone, Copy, Debug, Default)]
struct Authority {
    begun: bool,
    in_brackets: bool,
    had_colon: bool,
}

const AUTHORITY: &[u8] = b":authority";
/// The place of `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY_INDEX: u32 = 1;

impl Filter {
    /// At the start of a connection.
    pub fn new(budget: Budget, now: Instant) -> Self {
        Self {
            at: At::Preface(0),
            ends_block: false,
            in_block: false,
            hpack: Hpack::Start,
            last_stream: 0,
            budget,
            left: budget.burst,
            filled_at: now,
        }
    }

    /// Lets the next bytes of the connection pass, and changes those of an authority that need it. `now` is asked
    /// only when the budget is spent.
    ///
    /// # Errors
    /// [`Flood`]: the connection is to be closed.
    pub fn pass(&mut self, mut bytes: &mut [u8], now: impl Fn() -> Instant) -> Result<(), Flood> {
        while let Some(next) = bytes.first().copied() {
            let available = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let used = match &mut self.at {
                At::Opaque => return Ok(()),
                At::Preface(passed) => {
                    if PREFACE.get(*passed) == Some(&next) {
                        *passed += 1;
                        if *passed == PREFACE.len() {
                            self.at = At::HEAD;
                        }
                    } else {
                        self.at = At::Opaque;
                    }
                    1
                }
                At::Head { passed, head } => {
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
                At::PadLength { rest, priority } => {
                    let (rest, priority, padding) = (*rest, *priority, u32::from(next));
                    // A pad length beyond the payload is h2's to refuse: nothing of the frame is a fragment then.
                    self.at = match rest.checked_sub(priority).and_then(|rest| rest.checked_sub(padding)) {
                        Some(fragment) => At::Skip { left: priority, fragment, padding },
                        None => At::Skip { left: rest, fragment: 0, padding: 0 },
                    };
                    self.settle();
                    1
                }
                At::Skip { left, .. } => {
                    let used = available.min(*left);
                    *left -= used;
                    self.settle();
                    used
                }
                At::Fragment { left, .. } => {
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

    /// A frame's head is complete.
    fn begin(&mut self, head: [u8; 9], now: &impl Fn() -> Instant) -> Result<(), Flood> {
        const DATA: u8 = 0;
        const HEADERS: u8 = 1;
        const CONTINUATION: u8 = 9;
        const END_HEADERS: u8 = 0x4;
        const PADDED: u8 = 0x8;
        const PRIORITY: u8 = 0x20;

        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = head;
        let length = u32::from_be_bytes([0, l0, l1, l2]);
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        match kind {
            DATA if length > 0 => self.charge(FRAME_HEAD + DATA_COST, now)?,
            // A stream begins: its number is higher than any before (RFC 9113, section 5.1.1).
            HEADERS if stream > self.last_stream => {
                self.last_stream = stream;
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
                    At::PadLength { rest: length - 1, priority }
                } else {
                    match length.checked_sub(priority) {
                        Some(fragment) => At::Skip { left: priority, fragment, padding: 0 },
                        None => At::Skip { left: length, fragment: 0, padding: 0 },
                    }
                }
            }
            CONTINUATION if self.in_block => {
                self.ends_block = flags & END_HEADERS != 0;
                self.in_block = !self.ends_block;
                At::Skip { left: 0, fragment: length, padding: 0 }
            }
            _ => At::Skip { left: length, fragment: 0, padding: 0 },
        };
        self.settle();
        Ok(())
    }

    /// Leaves a part that has nothing left for the next one.
    fn settle(&mut self) {
        loop {
            self.at = match self.at {
                At::Skip { left: 0, fragment: 0, padding: 0 } => At::HEAD,
                At::Skip { left: 0, fragment: 0, padding } => {
                    At::Skip { left: padding, fragment: 0, padding: 0 }
                }
                At::Skip { left: 0, fragment, padding } => At::Fragment { left: fragment, padding },
                At::Fragment { left: 0, padding } => At::Skip { left: padding, fragment: 0, padding: 0 },
                At::Preface(_)
                | At::Head { .. }
                | At::PadLength { .. }
                | At::Skip { .. }
                | At::Fragment { .. }
                | At::Opaque => return,
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
        self.left = self.left.checked_sub(cost).ok_or(Flood)?;
        Ok(())
    }
}

impl At {
    const HEAD: Self = Self::Head { passed: 0, head: [0; 9] };
}

impl Hpack {
    /// Takes as many bytes as can be taken at once, one at least, and says how many.
    fn step(&mut self, bytes: &mut [u8]) -> u32 {
        let Some(first) = bytes.first_mut() else { return 0 };
        let byte = *first;
        *self = match *self {
            Self::Start => match byte {
                0x80.. => Self::integer(byte, 0x7f, Of::Nothing),
                0x40..0x80 => Self::integer(byte, 0x3f, Of::NameIndex),
                0x20..0x40 => Self::integer(byte, 0x1f, Of::Nothing),
                0x00..0x20 => Self::integer(byte, 0x0f, Of::NameIndex),
            },
            Self::Integer { value, shift, of } => {
                let more = u32::from(byte & 0x7f);
                match more.checked_shl(shift).filter(|shifted| shifted >> shift == more) {
                    Some(more) if byte < 0x80 => {
                        value.checked_add(more).map_or(Self::Lost, |value| Self::after(value, of))
                    }
                    Some(more) => value.checked_add(more).map_or(Self::Lost, |value| Self::Integer {
                        value,
                        shift: shift + 7,
                        of,
                    }),
                    None => Self::Lost,
                }
            }
            Self::Length { of } => Self::integer(byte, 0x7f, Of::Length { of, huffman: byte >= 0x80 }),
            Self::Text { left, of: Text::Authority, mut authority } => {
                *first = authority.legal(byte);
                Self::text(left - 1, Text::Authority, authority)
            }
            Self::Text { left, of: Text::Name { like_authority: Some(passed) }, authority } => {
                let like_authority = (AUTHORITY.get(usize::from(passed)) == Some(&byte)).then(|| passed + 1);
                Self::text(left - 1, Text::Name { like_authority }, authority)
            }
            Self::Text { left, of, authority } => {
                let used = u32::try_from(bytes.len()).unwrap_or(u32::MAX).min(left);
                *self = Self::text(left - used, of, authority);
                return used;
            }
            Self::Lost => {
                return u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            }
        };
        1
    }

    /// The first byte of an integer: `mask` is what it has for the value (RFC 7541, section 5.1).
    fn integer(byte: u8, mask: u8, of: Of) -> Self {
        let value = u32::from(byte & mask);
        if byte & mask == mask { Self::Integer { value, shift: 0, of } } else { Self::after(value, of) }
    }

    fn after(value: u32, of: Of) -> Self {
        match of {
            Of::Nothing => Self::Start,
            Of::NameIndex => match value {
                0 => Self::Length { of: Text::Name { like_authority: Some(0) } },
                AUTHORITY_INDEX => Self::Length { of: Text::Authority },
                _ => Self::Length { of: Text::Value },
            },
            Of::Length { of, huffman: false } => Self::text(value, of, Authority::default()),
            Of::Length { of: Text::Name { .. }, huffman: true } => {
                Self::text(value, Text::Name { like_authority: None }, Authority::default())
            }
            Of::Length { of: Text::Authority | Text::Value, huffman: true } => {
                Self::text(value, Text::Value, Authority::default())
            }
        }
    }

    /// A string with so many bytes left; without any, what comes after it.
    fn text(left: u32, of: Text, authority: Authority) -> Self {
        match of {
            _ if left > 0 => Self::Text { left, of, authority },
            Text::Name { like_authority: Some(passed) } if usize::from(passed) == AUTHORITY.len() => {
                Self::Length { of: Text::Authority }
            }
            Text::Name { .. } => Self::Length { of: Text::Value },
            Text::Authority | Text::Value => Self::Start,
        }
    }
}

impl Authority {
    /// The byte itself where an authority may hold it (RFC 3986, section 3.2, as the `http` crate reads it, without
    /// user information), else `-`.
    fn legal(&mut self, byte: u8) -> u8 {
        let legal = match byte {
            b'[' => !self.begun,
            b']' => self.in_brackets,
            b':' => self.in_brackets || !std::mem::replace(&mut self.had_colon, true),
            b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b','
            | b';' | b'=' => true,
            _ => byte.is_ascii_alphanumeric(),
        };
        match byte {
            b'[' if legal => self.in_brackets = true,
            b']' => self.in_brackets = false,
            _ => {}
        }
        self.begun = true;
        if legal { byte } else { b'-' }
    }
}

fn size(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

/// How a connection ended, as far as its bytes tell. Shared with the task that serves it.
#[derive(Debug, Default)]
pub struct Ending {
    flooded: AtomicBool,
    by_peer: AtomicBool,
}

impl Ending {
    /// The budget was spent.
    pub fn flooded(&self) -> bool {
        self.flooded.load(Relaxed)
    }

    /// The peer closed its side, or the socket failed.
    pub fn by_peer(&self) -> bool {
        self.by_peer.load(Relaxed)
    }
}

/// A stream whose incoming bytes pass a [`Filter`].
#[derive(Debug)]
pub struct Wire<T> {
    stream: T,
    filter: Filter,
    ending: Arc<Ending>,
}

impl<T> Wire<T> {
    /// From the first byte of `stream` on.
    pub fn new(stream: T, budget: Budget, ending: Arc<Ending>) -> Self {
        Self { stream, filter: Filter::new(budget, Instant::now()), ending }
    }

    fn noted<R>(&self, result: io::Result<R>) -> io::Result<R> {
        if result.is_err() {
            self.ending.by_peer.store(true, Relaxed);
        }
        result
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Wire<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = ready!(Pin::new(&mut this.stream).poll_read(cx, buf));
        this.noted(result)?;
        let new = buf.filled_mut().get_mut(before..).unwrap_or_default();
        if new.is_empty() {
            this.ending.by_peer.store(true, Relaxed);
        }
        Poll::Ready(this.filter.pass(new, Instant::now).map_err(|flood| {
            this.ending.flooded.store(true, Relaxed);
            io::Error::new(io::ErrorKind::ConnectionAborted, flood)
        }))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write(cx, buf));
        Poll::Ready(this.noted(result))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, bufs));
        Poll::Ready(this.noted(result))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
