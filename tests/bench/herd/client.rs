//! A client, which is a process of its own.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    time::{Duration, Instant},
};

use durward::api::proto::workload as pb;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::{
    frames::{block, jwt_request, message},
    process::Part,
    raw::{Answer, Came, Connecting, Raw, WIDE, wait_for_any},
};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// For how long a gateway validates, and others beside it.
const VALIDATING: Duration = Duration::from_secs(4);
/// How long streams stay while others come.
pub(crate) const STAYING: Duration = Duration::from_secs(10);
/// Connections of a gateway, and calls that are open on each.
const GATEWAY: usize = 4;
const AT_ONCE: usize = 12;
const VALIDATE: &str = "/SpiffeWorkloadAPI/ValidateJWTSVID";

/// What it comes for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Come {
    /// FetchJWTSVID.
    Once,
    /// The first message of FetchX509SVID, and FetchJWTSVID on another connection while that is open.
    Unit,
    /// So many streams of FetchX509SVID, a connection each, one after the other; all stay open.
    Streams(u64),
    /// The same up to the first that is refused; they stay for [`STAYING`].
    Stays(u64),
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

impl Part for Client {
    const TOLD: &str = "DURWARD_HERD_PART";
    type Saw = Saw;

    fn play(&self) -> Saw {
        let mut saw = Saw::default();
        match self.come {
            Come::Once => self.once(&mut saw),
            Come::Unit => {
                let stream = self.stream(&mut saw);
                self.once(&mut saw);
                drop(stream);
            }
            Come::Streams(count) => {
                let mut open = Vec::new();
                for _ in 0..count {
                    open.extend(self.stream(&mut saw));
                    read_on(&mut open, &mut saw);
                }
            }
            Come::Stays(count) => self.stays(count, &mut saw),
            Come::Validates(rate) => self.validates(rate, &mut saw),
            Come::ValidatesWithoutEnd => self.validates_without_end(&mut saw),
        }
        saw.shortened()
    }
}

impl Client {
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

    fn stays(&self, count: u64, saw: &mut Saw) {
        let until = Instant::now() + STAYING;
        let mut open = Vec::new();
        while (open.len() as u64) < count
            && let Some(raw) = self.stream(saw)
        {
            open.push(raw);
        }
        while Instant::now() < until {
            read_on(&mut open, saw);
            wait_for_any(open.iter(), Duration::from_millis(100));
        }
    }

    /// Some connections, in turn; what they have no room for waits here. One that ends is replaced.
    fn validates(&self, rate: u64, saw: &mut Saw) {
        let Some(body) = self.token(saw) else { return };
        let block = block(VALIDATE);
        let mut gateway: Vec<(Raw, Asked)> = Vec::new();
        let mut waiting: VecDeque<Instant> = VecDeque::new();
        let gap = Duration::from_secs(1).div_f64(rate as f64);
        let (began, mut due) = (Instant::now(), Instant::now());
        while began.elapsed() < VALIDATING {
            while due <= Instant::now() {
                waiting.push_back(due);
                saw.asked += 1;
                due += gap;
            }
            while gateway.len() < GATEWAY {
                let Some(raw) = self.open(saw) else { break };
                gateway.push((raw, Asked::new()));
            }
            gateway.retain_mut(|(raw, asked)| {
                while asked.len() < AT_ONCE && !raw.over {
                    let Some(since) = waiting.pop_front() else { break };
                    match raw.call(&block, &body, PATIENCE) {
                        Some(stream) => _ = asked.insert(stream, since),
                        None => saw.fails("not heard"),
                    }
                }
                while answered(raw, Duration::ZERO, asked, saw) {}
                raw.over.then(|| asked.keys().for_each(|_| saw.fails("gone with its connection")));
                !raw.over
            });
            wait_for_any(gateway.iter().map(|(raw, _)| raw), due.saturating_duration_since(Instant::now()));
        }
        for (raw, asked) in &mut gateway {
            while !asked.is_empty() && answered(raw, PATIENCE, asked, saw) {}
            asked.keys().for_each(|_| saw.fails("no answer"));
        }
        waiting.iter().for_each(|_| saw.fails("had to wait to the end"));
    }

    fn validates_without_end(&self, saw: &mut Saw) {
        let Some(body) = self.token(saw) else { return };
        let block = block(VALIDATE);
        let began = Instant::now();
        let mut open: Vec<(Raw, Asked)> = Vec::new();
        while began.elapsed() < VALIDATING {
            while open.len() < GATEWAY {
                let Some(raw) = self.open(saw) else { return };
                open.push((raw, Asked::new()));
            }
            open.retain_mut(|(raw, asked)| {
                while asked.len() < AT_ONCE && !raw.over {
                    let Some(stream) = raw.call(&block, &body, Duration::ZERO) else { break };
                    asked.insert(stream, Instant::now());
                    saw.asked += 1;
                }
                answered(raw, Duration::from_millis(2), asked, saw);
                while answered(raw, Duration::ZERO, asked, saw) {}
                !raw.over
            });
        }
    }

    /// A request to validate a token of its own.
    fn token(&self, saw: &mut Saw) -> Option<Vec<u8>> {
        let mut raw = self.open(saw)?;
        let answer = raw.ask(&block("/SpiffeWorkloadAPI/FetchJWTSVID"), &jwt_request("herd"), PATIENCE);
        let answer = Some(&raw.body).filter(|_| answer == Answer::Message)?;
        let mut svids = pb::JwtsvidResponse::decode(answer.get(5..)?).ok()?.svids;
        let request = pb::ValidateJwtsvidRequest { audience: "herd".to_owned(), svid: svids.pop()?.svid };
        Some(message(&request.encode_to_vec()))
    }
}

/// Reads what comes on streams that were answered: a client that does not answer a PING is taken to be gone.
fn read_on(open: &mut Vec<Raw>, saw: &mut Saw) {
    open.retain_mut(|raw| {
        loop {
            match raw.next(Duration::ZERO) {
                Came::Nothing => return true,
                Came::Data { .. } | Came::Began { .. } => {}
                Came::ComeBack | Came::Closed | Came::Ended { .. } | Came::Reset { .. } => {
                    saw.fails("had to go after its answer");
                    return false;
                }
            }
        }
    });
}

/// The calls of a connection that are not answered, and since when.
type Asked = BTreeMap<u32, Instant>;

/// Takes what comes next. Whether something did.
fn answered(raw: &mut Raw, patience: Duration, asked: &mut Asked, saw: &mut Saw) -> bool {
    match raw.next(patience) {
        Came::Ended { stream, status } => {
            match asked.remove(&stream).filter(|_| status == 0) {
                Some(since) => saw.is_answered(since),
                None => saw.fails(Answer::Status(status)),
            }
            true
        }
        Came::Reset { stream } => {
            asked.remove(&stream);
            saw.fails(Answer::Cut);
            true
        }
        Came::Nothing | Came::Closed => false,
        Came::Began { .. } | Came::Data { .. } | Came::ComeBack => true,
    }
}
