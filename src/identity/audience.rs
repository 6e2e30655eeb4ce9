//! What a workload may ask for as the audience of a JWT-SVID.

/// The most bytes that `aud` may have as the claims of the token write it: a JSON array of all that is asked for.
pub const MAX_LEN: usize = 16 * 1024;

/// The most audiences of one token. Each takes 24 bytes of memory and an allocation beside its text, while its call waits
/// to be attested.
pub const MAX_NUMBER: usize = 1024;

/// Why a list of audiences is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AudienceError {
    /// None is given, or empty texts alone. The text is spire-agent's.
    #[error("audience must be specified")]
    Missing,
    /// No verifier is called so, and JSON writes each in six bytes.
    #[error("audience must have no control characters, and has {:?}", .0)]
    Control(char),
    /// More than [`MAX_NUMBER`], empty texts with them.
    #[error("audience has {0} texts, and can have at most {MAX_NUMBER}")]
    TooMany(usize),
    /// More than [`MAX_LEN`].
    #[error("audience has {0} bytes as JSON, and can have at most {MAX_LEN}")]
    TooLong(usize),
}

/// Checks what is asked for. Empty texts beside others are left out of a token, and pass.
///
/// # Errors
/// [`AudienceError`].
pub fn check(audience: &[String]) -> Result<(), AudienceError> {
    if audience.iter().all(String::is_empty) {
        return Err(AudienceError::Missing);
    }
    if audience.len() > MAX_NUMBER {
        return Err(AudienceError::TooMany(audience.len()));
    }
    if let Some(control) = audience.iter().flat_map(|text| text.chars()).find(|c| c.is_control()) {
        return Err(AudienceError::Control(control));
    }
    let len = 1 + audience.iter().map(|text| json_len(text) + 1).sum::<usize>();
    if len > MAX_LEN {
        return Err(AudienceError::TooLong(len));
    }
    Ok(())
}

/// The length of a text without control characters as a JSON string.
fn json_len(text: &str) -> usize {
    2 + text.len() + text.bytes().filter(|byte| matches!(byte, b'"' | b'\\')).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audiences_are_short_and_written_as_they_are() {
        let long = |n| "x".repeat(n);
        for (case, audience, want) in [
            ("none", vec![], Err(AudienceError::Missing)),
            ("empty texts", vec![String::new(), String::new()], Err(AudienceError::Missing)),
            ("one", vec!["spiffe://td/db".to_owned()], Ok(())),
            ("any language", vec!["datenbank-ü \u{1f980}".to_owned()], Ok(())),
            ("line break", vec!["a\nb".to_owned()], Err(AudienceError::Control('\n'))),
            (
                "the last of many",
                vec!["a".to_owned(), "\u{1}".to_owned()],
                Err(AudienceError::Control('\u{1}')),
            ),
            ("delete", vec!["\u{7f}".to_owned()], Err(AudienceError::Control('\u{7f}'))),
            ("the longest", vec![long(MAX_LEN - 4)], Ok(())),
            ("one byte more", vec![long(MAX_LEN - 3)], Err(AudienceError::TooLong(MAX_LEN + 1))),
            (
                "quotes are written in two",
                vec!["\"".repeat(MAX_LEN / 2)],
                Err(AudienceError::TooLong(MAX_LEN + 4)),
            ),
            ("as many as there may be", vec![long(12); MAX_NUMBER], Ok(())),
            ("a byte more in each", vec![long(13); MAX_NUMBER], Err(AudienceError::TooLong(16 * 1024 + 1))),
            ("one more", vec![long(1); MAX_NUMBER + 1], Err(AudienceError::TooMany(MAX_NUMBER + 1))),
            ("many that are empty", vec![String::new(); 4096], Err(AudienceError::Missing)),
        ] {
            assert_eq!(check(&audience), want, "{case}");
            if want.is_ok() {
                assert_eq!(
                    json_len(&audience[0]),
                    serde_json::to_string(&audience[0]).unwrap().len(),
                    "{case}"
                );
            }
        }
    }
}
