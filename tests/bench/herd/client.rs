//! A client's process: it says that it is there, waits until it may come, and says what it saw.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    frames::{block, jwt_request, message},
    raw::{Answer, Came, Connecting, Raw, WIDE},
};

/// What it is told, as JSON in its environment.
const PART: &str = "DURWARD_HERD_PART";
/// What it says when it is there.
pub(crate) const READY: &str = "ready\n";
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// For how long a gateway validates, and others beside it.
const VALIDATING: Duration = Duration::from_secs(4);
/// Connections of a gateway, and calls that are open on one of who does without end.
const GATEWAY: usize = 4;
const AT_ONCE: usize = 64;
/// What a token that is none is answered with.
const INVALID_ARGUMENT: u8 = 3;

/// What it comes for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Come {
    /// FetchJWTSVID.
    Once,
    /// The first message of FetchX509SVID, and FetchJWTSVID on another connection while that is open.
    Unit,
    /// So many streams of FetchX509SVID, a connection each, one after the other; all stay open.
    Streams(u64),
    /// ValidateJWTSVID so many times a second.
    Validates(u64),
    /// The same, as soon as others are answered.
    ValidatesWithoutEnd,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Client {
    pub(crate) come: Come,
    pub(crate) socket: PathBuf,
}

/// What it saw. One line of a pipe that many share, so it is short.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Saw {
    pub(crate) asked: u64,
    pub(crate) answered: u64,
    /// How often it was not, and how it was told.
    pub(crate) failed: BTreeMap<String, u64>,
    /// From `connect()` or the call to the answer: the middle one, the 99th of a hundred, the longest.
    pub(crate) micros: Vec<u64>,
}

impl Saw {
    fn fails(&mut self, how: impl std::fmt::Debug) {
        *self.failed.entry(format!("{how:?}")).or_default() += 1;
    }

    fn is_answered(&mut self, began: Instant) {
        self.answered += 1;
        self.micros.push(began.elapsed().as_micros() as u64);
    }

    /// A line must not be longer than a pipe takes at once.
    fn shortened(mut self) -> Self {
        self.micros.sort_unstable();
        let last = self.micros.len().saturating_sub(1);
        if last > 8 {
            self.micros = [50, 99, 100].map(|percent| self.micros[last * percent / 100]).to_vec();
        }
        self
    }
}

impl Client {
    /// This program again.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env(PART, serde_json::to_string(self).expect("JSON"));
        command
    }

    /// A client's process ends here; any other goes on.
    pub(crate) fn come_if_told() {
        let Ok(part) = std::env::var(PART) else { return };
        let client: Self = serde_json::from_str(&part).expect("a part");
        print!("{READY}");
        std::io::Write::flush(&mut std::io::stdout()).expect("said");
        // Nothing is ever sent: it ends when all are there.
        drop(std::io::stdin().read(&mut [0]));
        let mut saw = Saw::default();
        match client.come {
            Come::Once => client.once(&mut saw),
            Come::Unit => {
                let stream = client.stream(&mut saw);
                client.once(&mut saw);
                drop(stream);
            }
            Come::Streams(count) => {
                let open: Vec<Raw> = (0..count).filter_map(|_| client.stream(&mut saw)).collect();
                drop(open);
            }
            Come::Validates(rate) => client.validates(rate, &mut saw),
            Come::ValidatesWithoutEnd => client.validates_without_end(&mut saw),
        }
        println!("{}", serde_json::to_string(&saw.shortened()).expect("JSON"));
        std::process::exit(0);
    }

    fn open(&self, saw: &mut Saw) -> Option<Raw> {
        Raw::open(&self.socket, Connecting::Waits, WIDE, PATIENCE)
            .inspect_err(|error| saw.fails(error.kind()))
            .ok()
    }

    fn once(&self, saw: &mut Saw) {
        saw.asked += 1;
        let began = Instant::now();
        let Some(mut raw) = self.open(saw) else { return };
        match raw.ask(&block("/SpiffeWorkloadAPI/FetchJWTSVID"), &jwt_request("herd"), PATIENCE) {
            Answer::Message => saw.is_answered(began),
            other => saw.fails(other),
        }
    }

    fn stream(&self, saw: &mut Saw) -> Option<Raw> {
        saw.asked += 1;
        let began = Instant::now();
        let mut raw = self.open(saw)?;
        raw.call(&block("/SpiffeWorkloadAPI/FetchX509SVID"), &message(&[]), PATIENCE);
        loop {
            match raw.next(PATIENCE) {
                Came::Data { .. } => {
                    saw.is_answered(began);
                    return Some(raw);
                }
                Came::Began { .. } => {}
                Came::Ended { status, .. } => {
                    saw.fails(Answer::Status(status));
                    return None;
                }
                other => {
                    saw.fails(other);
                    return None;
                }
            }
        }
    }

    /// Some connections, in turn.
    fn validates(&self, rate: u64, saw: &mut Saw) {
        let (block, body) = validation();
        let mut open: Vec<Raw> = (0..GATEWAY).filter_map(|_| self.open(saw)).collect();
        let mut asked: BTreeMap<(usize, u32), Instant> = BTreeMap::new();
        let gap = Duration::from_secs(1).div_f64(rate as f64);
        let (began, mut due) = (Instant::now(), Instant::now());
        let mut turn = 0;
        while began.elapsed() < VALIDATING && !open.is_empty() {
            while due <= Instant::now() {
                due += gap;
                turn = (turn + 1) % open.len();
                saw.asked += 1;
                match open[turn].call(&block, &body, PATIENCE) {
                    Some(stream) => _ = asked.insert((turn, stream), Instant::now()),
                    None => saw.fails("not heard"),
                }
            }
            for (at, raw) in open.iter_mut().enumerate() {
                while answered(raw, at, Duration::ZERO, &mut asked, saw) {}
            }
            std::thread::sleep(Duration::from_micros(500).min(due.saturating_duration_since(Instant::now())));
        }
        for (at, raw) in open.iter_mut().enumerate() {
            while asked.keys().any(|(of, _)| *of == at) && answered(raw, at, PATIENCE, &mut asked, saw) {}
        }
        asked.keys().for_each(|_| saw.fails("no answer"));
    }

    fn validates_without_end(&self, saw: &mut Saw) {
        let (block, body) = validation();
        let began = Instant::now();
        while began.elapsed() < VALIDATING {
            let Some(mut raw) = self.open(saw) else { return };
            let mut asked = BTreeMap::new();
            while began.elapsed() < VALIDATING && !raw.over {
                while asked.len() < AT_ONCE {
                    let Some(stream) = raw.call(&block, &body, Duration::ZERO) else { break };
                    asked.insert((0, stream), Instant::now());
                    saw.asked += 1;
                }
                answered(&mut raw, 0, Duration::from_millis(20), &mut asked, saw);
                while answered(&mut raw, 0, Duration::ZERO, &mut asked, saw) {}
            }
        }
    }
}

fn validation() -> (Vec<u8>, Vec<u8>) {
    (block("/SpiffeWorkloadAPI/ValidateJWTSVID"), message(b"\x0a\x01x\x12\x01y"))
}

/// Takes what comes next. Whether something did.
fn answered(
    raw: &mut Raw,
    at: usize,
    patience: Duration,
    asked: &mut BTreeMap<(usize, u32), Instant>,
    saw: &mut Saw,
) -> bool {
    match raw.next(patience) {
        Came::Ended { stream, status } => {
            match asked.remove(&(at, stream)).filter(|_| status == INVALID_ARGUMENT) {
                Some(began) => saw.is_answered(began),
                None => saw.fails(Answer::Status(status)),
            }
            true
        }
        Came::Reset { stream } => {
            asked.remove(&(at, stream));
            saw.fails(Answer::Cut);
            true
        }
        Came::Nothing | Came::Closed => false,
        Came::Began { .. } | Came::Data { .. } | Came::ComeBack => true,
    }
}
