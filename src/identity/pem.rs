//! What readers of PEM texts pass over in silence.

/// The first line, from 1, where `-----BEGIN` stands elsewhere than at its start: glued to the end of the block before, behind
/// a byte order mark, or indented. RFC 7468, section 2, has it at the start of a line; readers skip such a block as they skip
/// any text between blocks, and a certificate is lost.
pub fn misplaced_begin(text: &[u8]) -> Option<usize> {
    const BEGIN: &[u8] = b"-----BEGIN";
    let is_misplaced = |line: &[u8]| line.windows(BEGIN.len()).skip(1).any(|part| part == BEGIN);
    text.split(|byte| *byte == b'\n').position(is_misplaced).map(|before| before + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_begin_starts_its_line() {
        for (case, text, want) in [
            ("none", "", None),
            ("two", "-----BEGIN X-----\nAA\n-----END X-----\n-----BEGIN X-----\n", None),
            ("glued", "-----BEGIN X-----\nAA\n-----END X----------BEGIN X-----\n", Some(3)),
            ("a byte order mark", "\u{feff}-----BEGIN X-----\n", Some(1)),
            ("indented", "words\n\n  -----BEGIN X-----\n", Some(3)),
            ("line ends of Windows", "-----BEGIN X-----\r\n-----END X-----\r\n-----BEGIN X-----\r\n", None),
            ("more dashes", "-------BEGIN X-----\n", Some(1)),
        ] {
            assert_eq!(misplaced_begin(text.as_bytes()), want, "{case}");
        }
    }
}
