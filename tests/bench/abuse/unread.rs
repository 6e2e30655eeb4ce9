//! What the agent keeps for who does not read, or has much to be kept: answers, and streams of a process in a thousand groups.

use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid, setgroups, setresuid};

use super::{
    frames::{block, message},
    part::{Part, Tally},
    raw::{Came, Connecting, Raw, WIDE},
    wire::jwt_request_of,
};

/// Connections of one worker, and calls on each.
const CONNECTIONS: usize = 5;
const STREAMS: usize = 16;
/// Of a long audience, in bytes.
const AUDIENCE: usize = 12_000;
/// Groups of a process.
const GROUPS: u32 = 1_000;
/// How long a step may take.
const STEP: Duration = Duration::from_millis(50);
/// How long one waits whose call was refused, or who got no connection.
const PAUSE: Duration = Duration::from_millis(20);

/// A connection, and how many calls are open on it.
struct Held {
    raw: Raw,
    open: usize,
}

/// Opens and fills connections for as long as there is an agent. `window` is of each stream.
fn hold(part: &Part, path: &str, body: &[u8], window: u32, tally: &mut Tally) {
    let block = block(path);
    let mut held: Vec<Option<Held>> = (0..CONNECTIONS).map(|_| None).collect();
    while part.goes_on() {
        for place in &mut held {
            let Some(Held { raw, open }) = place else {
                *place = Raw::open(&part.socket, Connecting::Waits, window, STEP)
                    .ok()
                    .map(|raw| Held { raw, open: 0 });
                continue;
            };
            if *open < STREAMS && raw.call(&block, body, STEP).is_some() {
                *open += 1;
            }
            let until = Instant::now() + Duration::from_millis(2);
            loop {
                match raw.next(until.saturating_duration_since(Instant::now())) {
                    Came::Began { .. } => tally.answered += 1,
                    Came::Ended { .. } | Came::Reset { .. } => {
                        tally.refused += 1;
                        *open = open.saturating_sub(1);
                        std::thread::sleep(PAUSE);
                    }
                    Came::Data { .. } | Came::ComeBack => {}
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
    tally.silent += held.iter().flatten().count() as u64;
}

/// FetchJWTSVID for one long audience, with a window of one byte for the answer. For some it is of control characters, of
/// which a byte would be eight of a token.
pub(crate) fn big_jwt(part: &Part, tally: &mut Tally) {
    let letter = if part.nth.is_multiple_of(2) { "a" } else { "\u{1}" };
    let body = jwt_request_of(&letter.repeat(AUDIENCE));
    hold(part, "/SpiffeWorkloadAPI/FetchJWTSVID", &body, 1, tally);
}

/// Streams of a process in so many groups. `number` is whose it is.
pub(crate) fn groups(part: &Part, tally: &mut Tally) {
    let groups: Vec<Gid> = (100_000..100_000 + GROUPS).map(Gid::from_raw).collect();
    let uid = Uid::from_raw(part.number as u32);
    if setgroups(&groups).is_ok() {
        setresuid(uid, uid, uid).expect("another user");
    }
    hold(part, "/SpiffeWorkloadAPI/FetchX509Bundles", &message(&[]), WIDE, tally);
}
