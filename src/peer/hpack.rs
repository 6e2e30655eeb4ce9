//! Header blocks, walked byte by byte (RFC 7541), so that h2 takes the `:authority` of every gRPC client.
//!
//! Clients on gRPC C-core (Python, C++, Ruby, PHP) name the socket's path there (`run%2Fagent.sock`), which
//! h2 refuses. The characters that an authority may not hold are overwritten, each with one that it may hold,
//! so that no length and no HPACK table changes. Absent: Huffman-coded values and names, and names from the
//! dynamic table. C-core sends a plain literal, or an index to one that passed here before.

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
    Text { left: u32, of: HpackText, authority: Authority },
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
    /// A name; so many of its bytes are those of `:authority`, if all of them were.
    Name { like_authority: Option<u8> },
    /// The value of `:authority`.
    Authority,
    /// Another value.
    Value,
}

/// What matters of the authority's bytes that have passed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Authority {
    begun: bool,
    in_brackets: bool,
    had_colon: bool,
}

pub(super) const AUTHORITY: &[u8] = b":authority";
/// The place of `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY_INDEX: u32 = 1;

impl Hpack {
    /// Takes as many bytes as can be taken at once, one at least, and says how many.
    pub(super) fn step(&mut self, bytes: &mut [u8]) -> u32 {
        let Some(first) = bytes.first_mut() else { return 0 };
        let byte = *first;
        *self = match *self {
            Self::Start => match byte {
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
            Self::Length { of } => Self::integer(byte, 0x7f, IntegerOf::Length { of, huffman: byte >= 0x80 }),
            Self::Text { left, of: HpackText::Authority, mut authority } => {
                *first = authority.legal(byte);
                Self::text(left - 1, HpackText::Authority, authority)
            }
            Self::Text { left, of: HpackText::Name { like_authority: Some(passed) }, authority } => {
                let like_authority = (AUTHORITY.get(usize::from(passed)) == Some(&byte)).then(|| passed + 1);
                Self::text(left - 1, HpackText::Name { like_authority }, authority)
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
    fn integer(byte: u8, mask: u8, of: IntegerOf) -> Self {
        let value = u32::from(byte & mask);
        if byte & mask == mask { Self::Integer { value, shift: 0, of } } else { Self::after(value, of) }
    }

    fn after(value: u32, of: IntegerOf) -> Self {
        match of {
            IntegerOf::Nothing => Self::Start,
            IntegerOf::NameIndex => match value {
                0 => Self::Length { of: HpackText::Name { like_authority: Some(0) } },
                AUTHORITY_INDEX => Self::Length { of: HpackText::Authority },
                _ => Self::Length { of: HpackText::Value },
            },
            IntegerOf::Length { of, huffman: false } => Self::text(value, of, Authority::default()),
            IntegerOf::Length { of: HpackText::Name { .. }, huffman: true } => {
                Self::text(value, HpackText::Name { like_authority: None }, Authority::default())
            }
            IntegerOf::Length { of: HpackText::Authority | HpackText::Value, huffman: true } => {
                Self::text(value, HpackText::Value, Authority::default())
            }
        }
    }

    /// A string with so many bytes left; without any, what comes after it.
    fn text(left: u32, of: HpackText, authority: Authority) -> Self {
        match of {
            _ if left > 0 => Self::Text { left, of, authority },
            HpackText::Name { like_authority: Some(passed) } if usize::from(passed) == AUTHORITY.len() => {
                Self::Length { of: HpackText::Authority }
            }
            HpackText::Name { .. } => Self::Length { of: HpackText::Value },
            HpackText::Authority | HpackText::Value => Self::Start,
        }
    }
}

impl Authority {
    /// The byte itself where an authority may hold it (RFC 3986, section 3.2, as the `http` crate reads it, without
    /// user information), else `-`.
    pub(super) fn legal(&mut self, byte: u8) -> u8 {
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
