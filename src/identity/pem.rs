//! What readers of PEM texts pass over in silence.

const BEGIN: &[u8] = b"-----BEGIN";
const END: &[u8] = b"-----END";

pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// DER of more than 255 bytes begins like this in base64, as every certificate does; nothing that people write does.
const DER: &[u8] = b"MII";
/// Shorter than any line of a PEM block but its last.
const LINE: usize = 40;

/// A block that readers of PEM skip, as they skip any text between blocks: a certificate is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LostBlock {
    /// `-----BEGIN` stands elsewhere than at the start of its line (RFC 7468, section 2): glued to the end of the block before,
    /// or indented. The line, from 1.
    #[error("line {0}: -----BEGIN must be at the start of a line of its own, else its block is not read")]
    Misplaced(usize),
    /// A line that means to begin a block, and that readers do not take for one: a space is missing or is another character, or
    /// there is no name. The line, from 1.
    #[error(
        "line {0}: a block must begin with -----BEGIN CERTIFICATE----- (or what else it holds), with one space and five dashes at \
         either end, else it is not read"
    )]
    Malformed(usize),
    /// What is in a block stands in none: what should begin it is written in another way. The line, from 1.
    #[error(
        "line {0} is in no block: the line -----BEGIN CERTIFICATE----- must stand before it, written like this"
    )]
    Bare(usize),
    /// As some editors save a file.
    #[error("a byte order mark stands before -----BEGIN: save it without one")]
    Marked,
    /// Two bytes or four stand for each character.
    #[error("it is {0}, and PEM is read as ASCII: save it as UTF-8 without a byte order mark")]
    Wide(WideText),
    /// What a PEM block holds, without its base64.
    #[error("it is DER, and must be PEM: openssl {} -inform der -in FILE -out FILE.pem", if *is_key { "pkey" } else { "x509" })]
    Der { is_key: bool },
}

/// A text of more than one byte a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WideText {
    #[error("UTF-16")]
    Utf16,
    #[error("UTF-32")]
    Utf32,
}

impl WideText {
    /// What `text` is, by its byte order mark or the NULs beside its first character.
    #[must_use]
    pub fn of(text: &[u8]) -> Option<Self> {
        match text {
            [0xff, 0xfe, 0, 0, ..]
            | [0, 0, 0xfe, 0xff, ..]
            | [1..=u8::MAX, 0, 0, 0, ..]
            | [0, 0, 0, 1..=u8::MAX, ..] => Some(Self::Utf32),
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [1..=u8::MAX, 0, ..] | [0, 1..=u8::MAX, ..] => {
                Some(Self::Utf16)
            }
            _ => None,
        }
    }
}

/// Whether `text` is a whole DER sequence that begins with another, or with a number: a certificate, or a private key.
fn is_der(text: &[u8]) -> bool {
    const SEQUENCE: u8 = 0x30;
    const INTEGER: u8 = 2;
    let ([SEQUENCE, 0x81, _, first, ..]
    | [SEQUENCE, 0x82, _, _, first, ..]
    | [SEQUENCE, 1..=0x7f, first, ..]) = text
    else {
        return false;
    };
    matches!(*first, SEQUENCE | INTEGER)
}

/// Why no key can be read from `text`, where that is known.
pub fn unread_key(text: &[u8]) -> Option<LostBlock> {
    match check_blocks(text).err()? {
        // Said of a certificate.
        LostBlock::Bare(_) => None,
        LostBlock::Der { .. } => Some(LostBlock::Der { is_key: true }),
        lost => Some(lost),
    }
}

/// Whether this stands behind `-----BEGIN` in a line that every reader takes: a space, a label, and what ends it.
fn is_label(rest: &[u8]) -> bool {
    let label = rest.strip_prefix(b" ").and_then(|rest| rest.strip_suffix(b"-----"));
    let is_word = |label: &[u8]| {
        let graphic = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
        label.trim_ascii() == label && label.iter().all(graphic) && !label.windows(2).any(|two| two == b"--")
    };
    label.is_some_and(|label| !label.is_empty() && is_word(label) && !label.ends_with(b"-"))
}

/// The line of each block's beginning, from 1.
pub(super) fn block_lines(text: &[u8]) -> impl Iterator<Item = usize> {
    let lines = (1..).zip(text.split(|byte| *byte == b'\n'));
    lines.filter(|(_, line)| line.starts_with(BEGIN)).map(|(number, _)| number)
}

/// The first block that would be lost.
///
/// # Errors
/// [`LostBlock`].
pub fn check_blocks(text: &[u8]) -> Result<(), LostBlock> {
    if let Some(wide) = WideText::of(text) {
        return Err(LostBlock::Wide(wide));
    }
    if is_der(text) {
        return Err(LostBlock::Der { is_key: false });
    }
    if text.strip_prefix(BYTE_ORDER_MARK).is_some_and(|text| text.starts_with(BEGIN)) {
        return Err(LostBlock::Marked);
    }
    let mut within = false;
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        if line.windows(BEGIN.len()).skip(1).any(|part| part == BEGIN) {
            return Err(LostBlock::Misplaced(number));
        }
        if let Some(rest) = line.strip_prefix(BEGIN) {
            if !is_label(rest.trim_ascii_end()) {
                return Err(LostBlock::Malformed(number));
            }
            within = true;
        } else if line.starts_with(END) {
            within = false;
        } else if !within && line.trim_ascii().len() >= LINE && line.trim_ascii().starts_with(DER) {
            return Err(LostBlock::Bare(number));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_read_or_named() {
        let der = format!("MIIB{}\n", "A".repeat(60));
        let bare = |begin: &str| format!("-----BEGIN X-----\n{der}-----END X-----\n{begin}\n{der}");
        for (case, text, want) in [
            ("none", "", Ok(())),
            ("two", "-----BEGIN X-----\nAA\n-----END X-----\n-----BEGIN X-----\n", Ok(())),
            (
                "glued",
                "-----BEGIN X-----\nAA\n-----END X----------BEGIN X-----\n",
                Err(LostBlock::Misplaced(3)),
            ),
            ("a byte order mark", "\u{feff}-----BEGIN X-----\n", Err(LostBlock::Marked)),
            ("indented", "words\n\n  -----BEGIN X-----\n", Err(LostBlock::Misplaced(3))),
            ("line ends of Windows", "-----BEGIN X-----\r\n-----END X-----\r\n-----BEGIN X-----\r\n", Ok(())),
            ("more dashes", "-------BEGIN X-----\n", Err(LostBlock::Misplaced(1))),
            ("fewer dashes", &bare("----BEGIN X----"), Err(LostBlock::Bare(5))),
            ("small letters", &bare("-----begin x-----"), Err(LostBlock::Bare(5))),
            ("long dashes", &bare("\u{2013}\u{2013}\u{2013}BEGIN X"), Err(LostBlock::Bare(5))),
            ("no begin", &format!("  {der}"), Err(LostBlock::Bare(1))),
            ("no space", &bare("-----BEGINCERTIFICATE-----"), Err(LostBlock::Malformed(4))),
            ("a dash for the space", &bare("-----BEGIN-CERTIFICATE-----"), Err(LostBlock::Malformed(4))),
            ("an underscore", &bare("-----BEGIN_CERTIFICATE-----"), Err(LostBlock::Malformed(4))),
            ("a tab", &bare("-----BEGIN\tCERTIFICATE-----"), Err(LostBlock::Malformed(4))),
            ("a space that is none", &bare("-----BEGIN\u{a0}CERTIFICATE-----"), Err(LostBlock::Malformed(4))),
            ("two spaces", &bare("-----BEGIN  CERTIFICATE-----"), Err(LostBlock::Malformed(4))),
            ("no label", &bare("-----BEGIN-----"), Err(LostBlock::Malformed(4))),
            ("nothing", &bare("-----BEGIN"), Err(LostBlock::Malformed(4))),
            ("four dashes behind", &bare("-----BEGIN CERTIFICATE----"), Err(LostBlock::Malformed(4))),
            ("six", &bare("-----BEGIN CERTIFICATE------"), Err(LostBlock::Malformed(4))),
            ("words behind", &bare("-----BEGIN CERTIFICATE----- # ours"), Err(LostBlock::Malformed(4))),
            ("a space at the end", &bare("-----BEGIN RSA PRIVATE KEY----- \r"), Ok(())),
            ("well", &bare("Subject: CN=MIIB\n-----BEGIN X-----"), Ok(())),
        ] {
            assert_eq!(check_blocks(text.as_bytes()), want, "{case}");
        }
        assert_eq!(unread_key(der.as_bytes()), None);
        let wide: Vec<u8> = "-----BEGIN X-----\n".encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (case, text) in [
            ("little", wide.clone()),
            ("with a mark", [&[0xff, 0xfe], &*wide].concat()),
            ("big", wide.chunks(2).flat_map(|two| [two[1], two[0]]).collect()),
        ] {
            assert_eq!(check_blocks(&text), Err(LostBlock::Wide(WideText::Utf16)), "{case}");
            assert_eq!(unread_key(&text), Some(LostBlock::Wide(WideText::Utf16)), "{case}");
        }
        let wide: Vec<u8> = "-----BEGIN X-----\n".chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
        for (case, text) in [
            ("little", wide.clone()),
            ("with a mark", [&[0xff, 0xfe, 0, 0], &*wide].concat()),
            ("big", wide.chunks(4).flat_map(|four| four.iter().rev().copied()).collect()),
        ] {
            assert_eq!(check_blocks(&text), Err(LostBlock::Wide(WideText::Utf32)), "{case}");
        }
        for (case, text, is_der) in [
            ("a certificate", [&[0x30, 0x82, 1, 0x80, 0x30, 0x82, 1, 0x26][..], &[0xa0; 40]].concat(), true),
            ("a key", [&[0x30, 0x77, 2, 1, 1, 4, 0x20][..], &[7; 40]].concat(), true),
            ("a longer key", [&[0x30, 0x81, 0x87, 2, 1, 0][..], &[7; 40]].concat(), true),
            ("a number in a text", b"0 certificates\n".to_vec(), false),
        ] {
            let want = |is_key| is_der.then_some(LostBlock::Der { is_key });
            assert_eq!(check_blocks(&text).err(), want(false), "{case}");
            assert_eq!(unread_key(&text), want(true), "{case}");
        }
    }
}
