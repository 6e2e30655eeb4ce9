//! The polite user's processes, and what they saw.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{
    calls::no_token,
    frames::{block, jwt_request, message},
    part::{PATIENCE, Part},
    raw::{Answer, Came, Connecting, Raw, WIDE, connected},
};

/// Calls a second of each process.
pub(crate) const RATE: u32 = 20;
/// Streams, each on a connection of its own.
pub(crate) const STREAMS: u64 = 7;

/// How it calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Manner {
    /// FetchJWTSVID, each on a new connection, that is waited for.
    Waiting,
    /// The same, that is not waited for.
    AtOnce,
    /// The same on one connection.
    Kept,
    /// ValidateJWTSVID on one connection.
    Validating,
    /// FetchX509SVID, open all the time.
    Streams,
    /// At the floor, where the close is the answer.
    WaitingAtFloor,
    /// The same, that is not waited for.
    AtOnceAtFloor,
}

/// What one process saw. One line of a pipe.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) asked: u64,
    pub(crate) answered: u64,
    /// `connect()` failed: the queue was full.
    pub(crate) unconnected: u64,
    /// Connections or streams that the agent ended.
    pub(crate) cut: u64,
    /// In microseconds, of those that were answered.
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    /// The same of `connect()` alone, where each call has its own.
    pub(crate) connected_p99: u64,
    /// The first few that failed.
    pub(crate) failures: Vec<String>,
}

/// Failures that are told one by one.
const TOLD: usize = 3;

impl Seen {
    /// Connected, and not answered.
    pub(crate) fn failed(&self) -> u64 {
        self.asked - self.answered - self.unconnected
    }

    fn fails(&mut self, how: &str) {
        if self.failures.len() < TOLD {
            self.failures.push(how.to_owned());
        }
    }
}

/// Plays to the end of its time, and says what it saw.
pub(crate) fn play(part: &Part, manner: Manner) {
    let seen = match manner {
        Manner::Streams => streams(part),
        Manner::Kept | Manner::Validating => kept(part, manner),
        Manner::Waiting | Manner::AtOnce | Manner::WaitingAtFloor | Manner::AtOnceAtFloor => {
            anew(part, manner)
        }
    };
    println!("{}", serde_json::to_string(&seen).expect("JSON"));
    std::process::exit(0);
}

/// Calls at the polite rate: each tells whether it was answered.
fn at_rate(part: &Part, seen: &mut Seen, mut once: impl FnMut(&mut Seen) -> bool) {
    let gap = Duration::from_secs(1) / RATE;
    let mut latencies = Vec::new();
    let mut due = Instant::now();
    while super::now() < part.until {
        let began = Instant::now();
        seen.asked += 1;
        if once(seen) {
            seen.answered += 1;
            latencies.push(began.elapsed().as_micros() as u64);
        }
        // One that comes too late leaves calls out, and does not make up for them.
        due = (due + gap).max(Instant::now());
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    (seen.p50, seen.p99) = (percentile(&mut latencies, 50), percentile(&mut latencies, 99));
}

fn percentile(of: &mut [u64], percent: usize) -> u64 {
    of.sort_unstable();
    of.get(of.len().saturating_sub(1) * percent / 100).copied().unwrap_or(0)
}

fn anew(part: &Part, manner: Manner) -> Seen {
    let how = match manner {
        Manner::AtOnce | Manner::AtOnceAtFloor => Connecting::AtOnce,
        _ => Connecting::Waits,
    };
    let at_floor = matches!(manner, Manner::WaitingAtFloor | Manner::AtOnceAtFloor);
    let (block, body) = (block("/SpiffeWorkloadAPI/FetchJWTSVID"), jwt_request("polite"));
    let (mut seen, mut connecting) = (Seen::default(), Vec::new());
    at_rate(part, &mut seen, |seen| {
        let began = Instant::now();
        let connected = connected(&part.socket, how, PATIENCE);
        if connected.is_ok() {
            connecting.push(began.elapsed().as_micros() as u64);
        }
        let mut raw = match connected.and_then(|stream| Raw::begin(stream, WIDE, PATIENCE)) {
            Ok(raw) => raw,
            // The floor may close before anything is written.
            Err(error) if at_floor && error.kind() == std::io::ErrorKind::BrokenPipe => return true,
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                seen.fails("closed before it was asked");
                return false;
            }
            Err(_) => {
                seen.unconnected += 1;
                return false;
            }
        };
        match raw.ask(&block, &body, PATIENCE) {
            Answer::Message => true,
            Answer::Cut if at_floor => true,
            other => {
                seen.fails(&format!("{other:?}"));
                false
            }
        }
    });
    seen.connected_p99 = percentile(&mut connecting, 99);
    seen
}

/// A connection that is told to come back elsewhere is replaced, and what it did not hear is asked again: so do gRPC's own
/// clients.
fn kept(part: &Part, manner: Manner) -> Seen {
    let (block, body) = match manner {
        Manner::Validating => (block("/SpiffeWorkloadAPI/ValidateJWTSVID"), no_token()),
        _ => (block("/SpiffeWorkloadAPI/FetchJWTSVID"), jwt_request("polite")),
    };
    // A token that is none.
    let want = if manner == Manner::Validating { Answer::Status(3) } else { Answer::Message };
    let mut seen = Seen::default();
    let mut open: Option<Raw> = None;
    at_rate(part, &mut seen, |seen| {
        for attempt in 0..2 {
            let mut raw = match open.take().filter(|raw| !raw.over) {
                Some(raw) => raw,
                None => match Raw::open(&part.socket, Connecting::Waits, WIDE, PATIENCE) {
                    Ok(raw) => raw,
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => continue,
                    Err(_) => {
                        seen.unconnected += 1;
                        return false;
                    }
                },
            };
            let answer = raw.ask(&block, &body, PATIENCE);
            if raw.over {
                seen.cut += 1;
            }
            if answer == want {
                open = Some(raw);
                return true;
            }
            if answer != Answer::Cut || attempt > 0 {
                seen.fails(&format!("{answer:?}"));
                open = Some(raw);
                return false;
            }
        }
        seen.fails("closed before it was asked, twice");
        false
    });
    seen
}

fn streams(part: &Part) -> Seen {
    let block = block("/SpiffeWorkloadAPI/FetchX509SVID");
    let mut seen = Seen::default();
    let mut latencies = Vec::new();
    let mut open = Vec::new();
    for _ in 0..STREAMS {
        seen.asked += 1;
        let began = Instant::now();
        let Ok(mut raw) = Raw::open(&part.socket, Connecting::Waits, WIDE, PATIENCE) else {
            seen.unconnected += 1;
            continue;
        };
        raw.call(&block, &message(&[]), PATIENCE);
        loop {
            match raw.next(PATIENCE) {
                Came::Data { .. } => {
                    seen.answered += 1;
                    latencies.push(began.elapsed().as_micros() as u64);
                    open.push(raw);
                    break;
                }
                Came::Began { .. } => {}
                other => {
                    seen.fails(&format!("{other:?}"));
                    break;
                }
            }
        }
    }
    while super::now() < part.until {
        open.retain_mut(|raw| match raw.next(Duration::from_millis(5)) {
            Came::Nothing | Came::Data { .. } | Came::Began { .. } => true,
            other => {
                seen.cut += 1;
                seen.fails(&format!("a stream: {other:?}"));
                false
            }
        });
        std::thread::sleep(Duration::from_millis(20));
    }
    latencies.sort_unstable();
    (seen.p50, seen.p99) =
        (latencies.get(latencies.len() / 2).copied().unwrap_or(0), latencies.last().copied().unwrap_or(0));
    seen
}
