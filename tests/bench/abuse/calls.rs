//! Calls on kept connections, as fast as they are answered: those that nothing charges, those that are refused, and those
//! that share a bucket.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{
    frames::{block, block_without_header, jwt_request, message},
    part::{Part, Tally},
    raw::{Came, Connecting, Raw, WIDE},
};

/// Connections of a worker, and calls that are open on each.
const CONNECTIONS: usize = 12;
const AT_ONCE: usize = 16;
const STEP: Duration = Duration::from_millis(50);
const PAUSE: Duration = Duration::from_millis(20);

/// What is wrong with the calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// No security header.
    NoHeader,
    /// A method that the service has not.
    Unknown,
    /// A body that is no message.
    BadMessage,
    /// The same, and it is long.
    LongMessage,
    /// Nothing; there are too many.
    Refused,
    /// A service that the agent has not.
    Other,
}

impl Kind {
    fn call(self) -> (Vec<u8>, Vec<u8>) {
        const BUNDLES: &str = "/SpiffeWorkloadAPI/FetchX509Bundles";
        match self {
            Self::NoHeader => (block_without_header(BUNDLES), message(&[])),
            Self::Unknown => (block("/SpiffeWorkloadAPI/X"), message(&[])),
            Self::BadMessage => (block(BUNDLES), message(&[0xff])),
            Self::LongMessage => (block(BUNDLES), message(&[0xff; 15_000])),
            Self::Refused => (block("/SpiffeWorkloadAPI/FetchJWTSVID"), jwt_request("abuse")),
            Self::Other => (block("/x/y"), message(&[])),
        }
    }
}

/// Calls of one kind.
pub(crate) fn hot(part: &Part, kind: Kind, tally: &mut Tally) {
    let (block, body) = kind.call();
    let mut held: Vec<Option<(Raw, usize)>> = (0..CONNECTIONS).map(|_| None).collect();
    while part.goes_on() {
        for place in &mut held {
            let Some((raw, open)) = place else {
                *place = Raw::open(&part.socket, Connecting::Waits, WIDE, STEP).ok().map(|raw| (raw, 0));
                continue;
            };
            while *open < AT_ONCE && raw.call(&block, &body, Duration::ZERO).is_some() {
                *open += 1;
            }
            loop {
                match raw.next(Duration::ZERO) {
                    Came::Ended { status: 0, .. } => {
                        tally.answered += 1;
                        *open = open.saturating_sub(1);
                    }
                    Came::Ended { .. } | Came::Reset { .. } => {
                        tally.refused += 1;
                        *open = open.saturating_sub(1);
                    }
                    Came::Began { .. } | Came::Data { .. } | Came::ComeBack => {}
                    Came::Closed | Came::Nothing => break,
                }
            }
            if raw.over {
                tally.closed += 1;
                *place = None;
            }
        }
        if held.iter().all(Option::is_none) {
            std::thread::sleep(PAUSE);
        }
    }
}

/// A body for ValidateJWTSVID: a token that is none.
pub(crate) fn no_token() -> Vec<u8> {
    message(b"\x0a\x01x\x12\x01y")
}

/// ValidateJWTSVID `number` times a second, on one connection.
pub(crate) fn validate(part: &Part, tally: &mut Tally) {
    paced(part, &block("/SpiffeWorkloadAPI/ValidateJWTSVID"), &no_token(), tally);
}

/// FetchJWTSVID `number` times a second, on one connection.
pub(crate) fn shared(part: &Part, tally: &mut Tally) {
    paced(part, &block("/SpiffeWorkloadAPI/FetchJWTSVID"), &jwt_request("abuse"), tally);
}

/// INVALID_ARGUMENT is what a token that is none is answered with; RESOURCE_EXHAUSTED and UNAVAILABLE are refusals.
const REFUSALS: [u8; 2] = [8, 14];

fn paced(part: &Part, block: &[u8], body: &[u8], tally: &mut Tally) {
    let gap = Duration::from_secs(1).div_f64(part.number.max(1) as f64);
    while part.goes_on() {
        let Ok(mut raw) = Raw::open(&part.socket, Connecting::Waits, WIDE, STEP) else {
            std::thread::sleep(PAUSE);
            continue;
        };
        let mut due = Instant::now() + gap.mul_f64(part.nth as f64 % 50.0 / 50.0);
        while part.goes_on() && !raw.over {
            while due <= Instant::now() && raw.call(block, body, STEP).is_some() {
                due += gap;
            }
            let until = due.max(Instant::now() + Duration::from_millis(5));
            loop {
                match raw.next(until.saturating_duration_since(Instant::now())) {
                    Came::Ended { status, .. } if REFUSALS.contains(&status) => tally.refused += 1,
                    Came::Ended { .. } => tally.answered += 1,
                    Came::Reset { .. } => tally.refused += 1,
                    Came::Began { .. } | Came::Data { .. } | Came::ComeBack => {}
                    Came::Closed | Came::Nothing => break,
                }
            }
        }
        tally.closed += u64::from(raw.over);
    }
}
