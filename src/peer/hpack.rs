//! Header blocks, walked byte by byte (RFC 7541), so that h2 takes the `:authority` of every gRPC client.
//!
//! Clients put what they like there: gRPC C-core the socket's path (`run%2Fagent.sock`), grpc-go what a dialer was given,
//! Envoy the name of a cluster, and h2 refuses what no URI may hold (RFC 3986, section 3.2). Nobody here reads it, so every
//! byte of it is written over with zeros, plain or Huffman-coded: no length and no HPACK table changes, but that a coded one
//! may count for more bytes than it did. Where it is empty there is nothing to write over, and h2 refuses that too: then a
//! zero is [`Lacking`], which makes the block longer, and the entry that it may become by a byte.
//!
//! Absent: names from the dynamic table. An encoder takes the name from the static table, or spells it out; what it refers to
//! whole has passed here before.

/// Where in a header block (RFC 7541, section 6). Carries over from frame to frame.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hpack {
    /// A representation begins.
    Start,
    /// The further bytes of an integer.
    Integer { value: u32, shift: u32, of: IntegerOf },
    /// The length of a string begins.
    Length { of: HpackText },
    /// A string.
    Text { left: u32, of: HpackText },
    /// An integer too large for anybody: h2 will refuse the block.
    Lost,
}

/// What an integer says.
#[derive(Clone, Copy, Debug)]
pub(super) enum IntegerOf {
    /// Nothing that matters: an indexed field, the size of the table.
    Nothing,
    /// Where the name of a literal stands.
    NameIndex,
    /// How long a string is.
    Length { of: HpackText, huffman: bool },
}

/// What a string is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HpackText {
    /// A name that is spelled out. So many of its bytes have passed, if all of them are those of `:authority` in this coding.
    Name { like_authority: Option<u8>, huffman: bool },
    /// The value of `:authority`.
    Authority,
    /// The same, Huffman-coded: so many bits are left over after its last whole code.
    CodedAuthority { padding: u8 },
    /// Another value.
    Value,
}

pub(super) const AUTHORITY: &[u8] = b":authority";
/// The same, Huffman-coded (RFC 7541, appendix B).
pub(super) const CODED_AUTHORITY: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];
/// `:authority` without a value: an indexed field (RFC 7541, section 6.1) of the static table's place 1 (appendix A).
pub(super) const EMPTY_AUTHORITY: u8 = 0x81;
/// The place of `:authority` in the static table.
const AUTHORITY_INDEX: u32 = 1;
/// Bits of the code of `0`, which are all zero.
const ZERO_BITS: u32 = 5;

/// What a header block lacks where the value of its `:authority` is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lacking {
    /// What is to follow the last byte that has passed.
    pub(super) behind: &'static [u8],
}

impl Lacking {
    /// A value, whose length has passed.
    const VALUE: Self = Self { behind: b"0" };
    /// The same, where the field has passed as a whole: a length before it.
    const LENGTH_AND_VALUE: Self = Self { behind: &[1, b'0'] };
    /// What the last byte that has passed becomes: a length of one, or a literal that nobody has to remember with the name of
    /// the static table's place 1 (RFC 7541, section 6.2.2).
    pub(super) const BECOMES: u8 = 1;
}

impl Hpack {
    /// Takes as many bytes as can be taken at once, one at least. Says how many, and what is missing behind them.
    pub(super) fn step(&mut self, bytes: &mut [u8]) -> (u32, Option<Lacking>) {
        let Some(byte) = bytes.first().copied() else { return (0, None) };
        let mut missing = None;
        *self = match *self {
            Self::Start => match byte {
                EMPTY_AUTHORITY => {
                    missing = Some(Lacking::LENGTH_AND_VALUE);
                    Self::Start
                }
                0x80.. => Self::integer(byte, 0x7f, IntegerOf::Nothing),
                0x40..0x80 => Self::integer(byte, 0x3f, IntegerOf::NameIndex),
                0x20..0x40 => Self::integer(byte, 0x1f, IntegerOf::Nothing),
                0x00..0x20 => Self::integer(byte, 0x0f, IntegerOf::NameIndex),
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
            Self::Length { of } => {
                missing = Some(Lacking::VALUE).filter(|_| of == HpackText::Authority && byte & 0x7f == 0);
                Self::integer(byte, 0x7f, IntegerOf::Length { of, huffman: byte >= 0x80 })
            }
            Self::Text { left, of: HpackText::Name { like_authority: Some(passed), huffman } } => {
                let like = if huffman { CODED_AUTHORITY } else { AUTHORITY };
                let like_authority = (like.get(usize::from(passed)) == Some(&byte)).then(|| passed + 1);
                Self::text(left - 1, HpackText::Name { like_authority, huffman })
            }
            Self::Text { left, of } => {
                let used = u32::try_from(bytes.len()).unwrap_or(u32::MAX).min(left);
                let (text, _) = bytes.split_at_mut(usize::try_from(used).unwrap_or(bytes.len()));
                match of {
                    HpackText::Authority => text.fill(b'0'),
                    HpackText::CodedAuthority { padding } => {
                        text.fill(0);
                        // Padding is of ones (RFC 7541, section 5.2).
                        if let Some(last) = text.last_mut().filter(|_| used == left) {
                            *last = (1 << padding) - 1;
                        }
                    }
                    HpackText::Name { .. } | HpackText::Value => {}
                }
                *self = Self::text(left - used, of);
                return (used, None);
            }
            Self::Lost => {
                return (u32::try_from(bytes.len()).unwrap_or(u32::MAX), None);
            }
        };
        (1, missing)
    }

    /// The first byte of an integer: `mask` is what it has for the value (RFC 7541, section 5.1).
    fn integer(byte: u8, mask: u8, of: IntegerOf) -> Self {
        let value = u32::from(byte & mask);
        if byte & mask == mask { Self::Integer { value, shift: 0, of } } else { Self::after(value, of) }
    }

    fn after(value: u32, of: IntegerOf) -> Self {
        match of {
            IntegerOf::Nothing => Self::Start,
            IntegerOf::NameIndex => match value {
                0 => Self::Length { of: HpackText::Name { like_authority: Some(0), huffman: false } },
                AUTHORITY_INDEX => Self::Length { of: HpackText::Authority },
                _ => Self::Length { of: HpackText::Value },
            },
            IntegerOf::Length { of: HpackText::Authority, huffman: true } => {
                let over = value.wrapping_mul(u8::BITS) % ZERO_BITS;
                Self::text(value, HpackText::CodedAuthority { padding: u8::try_from(over).unwrap_or(0) })
            }
            IntegerOf::Length { of: HpackText::Name { like_authority, .. }, huffman } => {
                Self::text(value, HpackText::Name { like_authority, huffman })
            }
            IntegerOf::Length { of, .. } => Self::text(value, of),
        }
    }

    /// A string with so many bytes left; without any, what comes after it.
    fn text(left: u32, of: HpackText) -> Self {
        let is_authority = |passed: u8, huffman: bool| {
            usize::from(passed) == if huffman { CODED_AUTHORITY.len() } else { AUTHORITY.len() }
        };
        match of {
            _ if left > 0 => Self::Text { left, of },
            HpackText::Name { like_authority: Some(passed), huffman } if is_authority(passed, huffman) => {
                Self::Length { of: HpackText::Authority }
            }
            HpackText::Name { .. } => Self::Length { of: HpackText::Value },
            HpackText::Authority | HpackText::CodedAuthority { .. } | HpackText::Value => Self::Start,
        }
    }
}
