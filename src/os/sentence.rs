//! What the system says of an error, as a part of a sentence: in lower case, and without its number, which says the same.

use std::io;

/// What rustls says when a connection ends without its own end, with an address of its documentation.
const CUT_OFF: &str = "without sending TLS close_notify";

/// The system's sentence.
pub fn said(error: &io::Error) -> String {
    let text = error.to_string();
    if text.contains(CUT_OFF) {
        return "the other end closed the connection early".to_owned();
    }
    match text.split_once(" (os error") {
        Some((sentence, _)) => sentence.to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn a_number_is_left_out() {
        for (error, want) in [
            (Errno::ENOENT.into(), "no such file or directory"),
            (io::Error::other("Not of the system"), "Not of the system"),
            (
                io::Error::other("peer closed connection without sending TLS close_notify: https://docs.rs/"),
                "the other end closed the connection early",
            ),
        ] {
            assert_eq!(said(&error), want);
        }
    }
}
