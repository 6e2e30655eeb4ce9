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
    /// Two bytes stand for each character.
    #[error("it is UTF-16, and PEM is read as ASCII: save it as UTF-8 without a byte order mark")]
    Wide,
}

/// Whether `text` is UTF-16: it begins with a byte order mark, or has a NUL beside its first character.
pub(super) fn is_wide(text: &[u8]) -> bool {
    match text {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => true,
        [first, second, ..] => (*first == 0) != (*second == 0),
        _ => false,
    }
}

/// Why no key can be read from `text`, where that is known.
pub fn unread_key(text: &[u8]) -> Option<LostBlock> {
    // One that stands in no block is said to be a certificate.
    check_blocks(text).err().filter(|lost| !matches!(lost, LostBlock::Bare(_)))
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
    if is_wide(text) {
        return Err(LostBlock::Wide);
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
            assert_eq!(check_blocks(&text), Err(LostBlock::Wide), "{case}");
            assert_eq!(unread_key(&text), Some(LostBlock::Wide), "{case}");
        }
    }
}
