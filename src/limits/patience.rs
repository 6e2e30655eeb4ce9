//! How long a call, or a connection, may be kept waiting by the limits.
//!
//! What waits has a place ([`PLACES`], of [`KEPT_WAITING`](super::budget::KEPT_WAITING) bytes each), and an end: nothing
//! waits without bound, nor past what its caller gave it.

use std::{num::NonZeroU32, time::Duration};

use super::{attempt::Attempt, slots::Attestations};

/// How long one waits for room, at most, before it is refused for the node's sake: a call for tokens or for memory, a connection at
/// the door, and one that was let in for the memory to begin to speak. For as long others are told to go for one that is below its
/// share.
pub const FOR_ROOM: Duration = Duration::from_millis(250);
/// How long a connection waits for a place while others have all, at most: those that are lent are so for as long.
pub const FOR_PLACE: Duration = Duration::from_secs(2);
/// How long a call waits to be attested, at most.
pub const FOR_ATTESTATION: Duration = Duration::from_secs(2);
/// How many calls wait at the same time, at most; shared as attestations are.
pub const PLACES: u32 = 1024;

/// How long a call may be kept waiting. Whatever it says, no longer than [`FOR_ROOM`] and [`FOR_ATTESTATION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience(Duration);

impl Patience {
    /// It is decided at once.
    pub const NONE: Self = Self(Duration::ZERO);
    /// As long as it may be.
    pub const USUAL: Self = Self(Duration::MAX);

    /// Of a caller that waits so long for its answer. A fifth of it is left for the answer: one that comes after the
    /// caller has gone tells nobody why.
    pub fn within(timeout: Duration) -> Self {
        Self(timeout - timeout / 5)
    }

    /// Reads `grpc-timeout`; `None` as of [`timeout`].
    pub fn parse(grpc_timeout: &[u8]) -> Option<Self> {
        timeout(grpc_timeout).map(Self::within)
    }

    /// What the first try of a call is.
    pub(super) fn first(self) -> Attempt {
        if self.0.is_zero() { Attempt::Only } else { Attempt::First }
    }

    /// What is left when so much time has passed since the call came.
    pub(super) fn left(self, passed: Duration) -> Duration {
        self.0.saturating_sub(passed)
    }
}

/// Reads `grpc-timeout`: one to eight digits and a unit, `H`, `M`, `S`, `m`, `u` or `n`. `None` for any other text.
pub fn timeout(grpc_timeout: &[u8]) -> Option<Duration> {
    let (unit, digits) = grpc_timeout.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(number * 3600),
        b'M' => Duration::from_secs(number * 60),
        b'S' => Duration::from_secs(number),
        b'm' => Duration::from_millis(number),
        b'u' => Duration::from_micros(number),
        b'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

/// The places of calls that wait.
pub(super) fn places() -> Attestations {
    let places = NonZeroU32::new(PLACES);
    Attestations::new(places, places).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        for (text, want) in [
            ("1H", Some(Duration::from_secs(3600))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("3S", Some(Duration::from_secs(3))),
            ("100m", Some(Duration::from_millis(100))),
            ("00000100m", Some(Duration::from_millis(100))),
            ("7u", Some(Duration::from_micros(7))),
            ("10n", Some(Duration::from_nanos(10))),
            ("0S", Some(Duration::ZERO)),
            ("", None),
            ("m", None),
            ("100", None),
            ("100ms", None),
            ("100 m", None),
            ("-1S", None),
            ("+1S", None),
            ("1.5S", None),
            ("123456789n", None),
            ("1s", None),
            ("\u{661}S", None),
        ] {
            assert_eq!(Patience::parse(text.as_bytes()), want.map(Patience::within), "{text}");
        }
        assert_eq!(Patience::parse(&[b'1', 0xff]), None);
        assert_eq!(places(), Attestations::new(NonZeroU32::new(PLACES), NonZeroU32::new(PLACES)).unwrap());
        assert_eq!(Patience::within(Duration::ZERO).first(), Attempt::Only);
    }
}
