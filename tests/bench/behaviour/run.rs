//! A run: starts callers, tells them what to do, and looks at everything after each step.

use std::{
    collections::{BTreeSet, VecDeque},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{AddressFamily, MsgFlags, SockFlag, SockType, setsockopt, socketpair, sockopt},
        time::{TimeVal, TimeValLike as _},
    },
};

use super::{
    PATIENCE,
    action::{Action, Chance, Guise, Leave, WayBack},
    agent::{Agent, Holds},
    caller::{PART, Part, Report, receive, transmit},
    now,
    oracle::{Got, NEIGHBOUR, PROGRAMS, Verdict, X509_TTL, neighbour},
};

/// Callers at once; as many more may have left and not be waited for.
const MOST_CALLERS: usize = 24;
/// Callers that are not quiet.
const FEWEST_CALLERS: usize = 6;
/// For so many steps some do nothing after they became somebody else, so that their streams last for some rotations.
const QUIET: u64 = 350;
/// What a caller did last, for a finding.
const REMEMBERED: usize = 30;
/// After so many steps all callers leave, and what the agent holds must be what it held before they came.
const CALM_AFTER: u64 = 1_000;
/// Descriptors and threads that may be more then: what it opened only when it was first needed.
const MARGIN: u64 = 2;
/// Bytes that it may say it holds more: SVIDs that it keeps, and what it remembers of callers.
const MORE_BYTES: f64 = 768.0 * 1024.0;
/// After so many steps it is asked what it holds.
const ASK_AFTER: u64 = 25;
/// The least that a step takes, so that the neighbour stays below its limits, and time passes for rotations.
const PACE: Duration = Duration::from_millis(40);
/// After so long it is looked what the agent does that keeps the neighbour waiting.
const LONG: Duration = Duration::from_secs(3);
/// A run ends after so many findings.
const MOST_FINDINGS: usize = 5;

/// A caller, seen from here.
struct Told {
    name: String,
    control: OwnedFd,
    child: Option<Child>,
    did: VecDeque<String>,
    /// Messages that it has not answered.
    owes: usize,
    /// The step from which on it is told something again.
    quiet_until: u64,
}

/// Two ends of a control socket.
fn control() -> (OwnedFd, OwnedFd) {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    let (own, theirs) = pair.expect("two sockets");
    setsockopt(&theirs, sockopt::ReceiveTimeout, &TimeVal::milliseconds(20)).expect("a timeout");
    (own, theirs)
}

impl Told {
    fn start(name: String, dir: &Path, program: usize, guise: Guise) -> Self {
        let (own, theirs) = control();
        let did = VecDeque::from([format!("starts as {guise:?}, program {program}")]);
        let part = Part {
            control: 0,
            close: None,
            dir: dir.to_owned(),
            program,
            guise: Some(guise),
            connections: Vec::new(),
            past: Vec::new(),
        };
        let mut command = Command::new(dir.join(PROGRAMS[program]));
        command
            .env(PART, serde_json::to_string(&part).expect("JSON"))
            .current_dir("/")
            .stdin(Stdio::from(theirs));
        Self {
            name,
            control: own,
            child: Some(command.spawn().expect("a process")),
            did,
            owes: 0,
            quiet_until: 0,
        }
    }

    fn tell(&mut self, step: u64, action: &Action, passed: Option<RawFd>) {
        if self.did.len() == REMEMBERED {
            self.did.pop_front();
        }
        self.did.push_back(format!("{step}: {action:?}"));
        // One that is not there any more is noticed where its answer stays out.
        self.owes += usize::from(transmit(self.control.as_raw_fd(), action, passed).is_ok());
    }
}

/// What came of a run.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) findings: usize,
    pub(crate) steps: u64,
    judged: u64,
    only_read: u64,
    /// Of the neighbour's calls, in microseconds.
    latencies: Vec<u64>,
}

pub(crate) struct Run {
    agent: Agent,
    chance: Chance,
    callers: Vec<Told>,
    neighbour: Told,
    left: Vec<Child>,
    /// Descriptors and threads of the agent without callers.
    base: (u64, u64),
    /// What the agent says it holds then.
    said: Holds,
    /// When the neighbour's stream was last sent an SVID, in milliseconds since 1970.
    renewed: u64,
    named: u32,
    /// What no caller does, by the beginning of its name.
    without: Vec<String>,
    /// Which callers were given what was not theirs.
    wronged: BTreeSet<(String, String)>,
    outcome: Outcome,
    /// It makes no sense to go on.
    over: bool,
    /// What the agent did while the neighbour waited for long.
    seen: String,
}

impl Run {
    pub(crate) fn start(agent: Agent, seed: u64, without: Vec<String>) -> Self {
        let uid = neighbour();
        let guise = Guise { uid, gid: uid, groups: Vec::new(), more_groups: 0, way_back: WayBack::Lost };
        let neighbour = Told::start(NEIGHBOUR.to_owned(), agent.dir(), 0, guise);
        let mut run = Self {
            agent,
            chance: Chance(seed),
            callers: Vec::new(),
            neighbour,
            left: Vec::new(),
            base: (0, 0),
            said: Holds::default(),
            renewed: now(),
            named: 0,
            without,
            wronged: BTreeSet::new(),
            outcome: Outcome::default(),
            over: false,
            seen: String::new(),
        };
        for action in
            [Action::Open { deaf: false }, Action::Call { at: 0, method: 4, cut: None }, Action::Ask]
        {
            run.neighbour.tell(0, &action, None);
            run.collect();
        }
        run.base = run.agent.holds();
        // It adds up once a second.
        run.said = run.settled(|holds| holds.connections == 1.0 && holds.bytes > 0.0).unwrap_or_default();
        run
    }

    /// What the agent says it holds, as soon as that is so; what it said last is the error.
    fn settled(&self, is_so: impl Fn(&Holds) -> bool) -> Result<Holds, Option<Holds>> {
        let began = Instant::now();
        loop {
            let holds = self.agent.says_it_holds();
            if let Some(holds) = holds.filter(&is_so) {
                return Ok(holds);
            }
            if began.elapsed() > PATIENCE {
                return Err(holds);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Until a number of steps were made, or for so long.
    pub(crate) fn go(mut self, steps: u64, time: Duration) -> Outcome {
        let began = Instant::now();
        while self.outcome.steps < steps && began.elapsed() < time && !self.over {
            self.outcome.steps += 1;
            let due = Instant::now() + PACE;
            self.step();
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if self.outcome.steps.is_multiple_of(CALM_AFTER) {
                self.calm();
            }
        }
        if steps < CALM_AFTER && !self.over {
            self.calm();
        }
        // The neighbour is still there, and often others.
        let (wrong, said) = self.agent.end();
        let outcome = &mut self.outcome;
        wrong.into_iter().for_each(|wrong| outcome.find(&wrong, &VecDeque::new()));
        outcome.latencies.sort_unstable();
        let at = |percent: usize| {
            let last = outcome.latencies.len().saturating_sub(1);
            outcome.latencies.get(last * percent / 100).map_or(0, |micros| micros / 1000)
        };
        println!(
            "{} steps in {:.0} s, {} findings; {} SVIDs judged, {} only read; neighbour: {} calls, p50 {} ms, p99 {} ms, \
             longest {} ms; {said}",
            outcome.steps,
            began.elapsed().as_secs_f64(),
            outcome.findings,
            outcome.judged,
            outcome.only_read,
            outcome.latencies.len(),
            at(50),
            at(99),
            at(100),
        );
        self.callers.into_iter().chain([self.neighbour]).filter_map(|it| it.child).for_each(|mut child| {
            drop(child.kill());
            drop(child.wait());
        });
        self.left.into_iter().for_each(|mut child| drop(child.wait()));
        self.outcome
    }

    fn step(&mut self) {
        let step = self.outcome.steps;
        let is_active = |told: &Told| told.quiet_until <= step;
        while self.callers.iter().filter(|it| is_active(it)).count() < FEWEST_CALLERS
            && self.callers.len() < MOST_CALLERS
        {
            self.named += 1;
            let (program, guise) = (self.chance.below(PROGRAMS.len()), Guise::choose(&mut self.chance));
            self.callers.push(Told::start(self.named.to_string(), self.agent.dir(), program, guise));
        }
        self.neighbour.tell(step, &Action::Ask, None);
        let (born, leaving) = self.tell_some();
        if self.chance.one_in(30) {
            let next = self.agent.other_configuration(self.chance.below(64));
            if !self.agent.reload(next) {
                self.end_with("a reload is not done");
            }
        }
        if !self.agent.is_live() {
            self.end_with("/live does not answer");
        }
        self.collect();
        leaving.into_iter().rev().for_each(|at| self.left.extend(self.callers.remove(at).child));
        // Until then they are zombies.
        let old = self.left.len().saturating_sub(MOST_CALLERS);
        self.left.drain(..old).for_each(|mut child| drop(child.wait()));
        self.callers.extend(born);
        let asks = step.is_multiple_of(ASK_AFTER);
        let ailing = self.agent.ails();
        if let Some(ailing) = ailing.or_else(|| if asks { self.agent.holds_too_much() } else { None }) {
            self.end_with(&ailing);
        }
        // The stream would have been sent the next one at half of that.
        let patience = if cfg!(debug_assertions) { PATIENCE } else { Duration::from_secs(2) };
        if u128::from(now()) > u128::from(self.renewed + X509_TTL) + patience.as_millis() {
            self.end_with("the neighbour's stream was not sent the next SVID");
        }
    }

    /// Those who were born, and the places of those who leave, rising.
    fn tell_some(&mut self) -> (Vec<Told>, BTreeSet<usize>) {
        let step = self.outcome.steps;
        let (mut born, mut leaving) = (Vec::new(), BTreeSet::new());
        for _ in 0..1 + self.chance.below(4) {
            let at = self.chance.below(self.callers.len());
            if self.callers[at].quiet_until > step || leaving.contains(&at) {
                continue;
            }
            let action = Action::choose(&mut self.chance, self.callers.len());
            let turns = matches!(action, Action::Become(_) | Action::Exec { .. } | Action::Give { .. });
            if turns && self.chance.one_in(2) {
                self.callers[at].quiet_until = step + QUIET;
            }
            if self.without.iter().any(|kind| format!("{action:?}").starts_with(kind)) {
                continue;
            }
            match action {
                Action::Fork { .. } if self.callers.len() + born.len() >= MOST_CALLERS => {}
                Action::Fork { .. } => born.push(self.fork(at, &action)),
                Action::Leave(_) => {
                    self.callers[at].tell(step, &action, None);
                    leaving.insert(at);
                }
                action => self.callers[at].tell(step, &action, None),
            }
        }
        (born, leaving)
    }

    fn fork(&mut self, at: usize, action: &Action) -> Told {
        self.named += 1;
        let (own, theirs) = control();
        let parent = &mut self.callers[at];
        parent.tell(self.outcome.steps, action, Some(theirs.as_raw_fd()));
        let did = parent.did.clone();
        Told {
            name: format!("{}, child of {}", self.named, parent.name),
            control: own,
            child: None,
            did,
            owes: 0,
            quiet_until: 0,
        }
    }

    fn end_with(&mut self, text: &str) {
        let mut did = VecDeque::new();
        self.callers
            .iter()
            .for_each(|it| did.extend(it.did.iter().rev().take(3).map(|did| format!("{}: {did}", it.name))));
        self.outcome.find(text, &did);
        self.over = true;
    }

    /// Hears all callers until each has done what it was told.
    fn collect(&mut self) {
        let began = Instant::now();
        let until = began + PATIENCE + Duration::from_secs(5);
        self.seen.clear();
        loop {
            let mut heard = false;
            for at in 0..=self.callers.len() {
                let control = self.told(at).control.as_raw_fd();
                match receive(control, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC) {
                    Ok(Some((bytes, passed))) => {
                        heard = true;
                        self.hear(at, serde_json::from_slice(&bytes).expect("a report"), passed);
                    }
                    Err(Errno::EAGAIN) => {}
                    // It is gone, as one that is killed is.
                    Ok(None) | Err(_) => self.told(at).owes = 0,
                }
            }
            let all = self.callers.iter().chain([&self.neighbour]);
            if heard {
                continue;
            }
            if all.clone().all(|it| it.owes == 0) {
                return;
            }
            if self.neighbour.owes > 0 && began.elapsed() > LONG && self.seen.is_empty() {
                self.seen = self.agent.threads();
            }
            if Instant::now() > until {
                let silent: Vec<String> = all.filter(|it| it.owes > 0).map(|it| it.name.clone()).collect();
                return self.end_with(&format!("not done in time: callers {silent:?}"));
            }
            let mut fds: Vec<PollFd<'_>> = all
                .filter(|it| it.owes > 0)
                .map(|it| PollFd::new(it.control.as_fd(), PollFlags::POLLIN))
                .collect();
            _ = poll(&mut fds, PollTimeout::from(50_u8));
        }
    }

    /// The neighbour is behind all others.
    fn told(&mut self, at: usize) -> &mut Told {
        self.callers.get_mut(at).unwrap_or(&mut self.neighbour)
    }

    fn hear(&mut self, at: usize, report: Report, passed: Option<RawFd>) {
        let is_neighbour = at == self.callers.len();
        match report {
            Report::Done => {
                let told = self.told(at);
                told.owes = told.owes.saturating_sub(1);
            }
            Report::Got(got) => {
                self.outcome.judged += 1;
                if is_neighbour && got.made > 0 {
                    self.renewed = self.renewed.max(got.made);
                }
                match got.judge(self.agent.in_force(&got.name)) {
                    Verdict::Theirs => {}
                    Verdict::OnlyReads => self.outcome.only_read += 1,
                    Verdict::Wrong(why) => self.wrong(at, &got, &why),
                }
            }
            Report::Ended(_) if is_neighbour => self.end_with("the neighbour's stream was cut"),
            Report::ComeBack if is_neighbour => self.end_with("the neighbour was told to come back"),
            Report::Ended(_) | Report::ComeBack => {}
            Report::Given(connection, to) => {
                let step = self.outcome.steps;
                if let Some(other) = self.callers.get_mut(to) {
                    other.tell(step, &Action::Take(connection), passed);
                }
            }
            Report::Asked(micros, failed) => {
                self.outcome.latencies.push(micros);
                if let Some(failed) = failed.filter(|_| nix::unistd::geteuid().is_root()) {
                    let log = self.agent.confined.log();
                    let lines: Vec<&str> = log.lines().rev().take(6).collect();
                    let seen = std::mem::take(&mut self.seen);
                    self.end_with(&format!(
                        "the neighbour was not answered, after {micros} microseconds: {failed}; last in the log: \
                         {lines:#?}{seen}"
                    ));
                }
            }
        }
        passed.into_iter().for_each(|fd| _ = nix::unistd::close(fd));
    }

    /// Somebody was given what is not theirs: told once of each caller and entry.
    fn wrong(&mut self, at: usize, got: &Got, why: &str) {
        let told = self.callers.get(at).unwrap_or(&self.neighbour);
        if self.wronged.insert((told.name.clone(), got.name.clone())) {
            self.outcome.find(&format!("caller {} got /{}: {why}: {got:?}", told.name, got.name), &told.did);
            self.over |= self.outcome.findings >= MOST_FINDINGS;
        }
    }

    /// All callers leave, and the agent holds what it held.
    fn calm(&mut self) {
        let step = self.outcome.steps;
        for told in &mut self.callers {
            let leave = self.chance.of(&[Leave::Exit, Leave::Killed]);
            told.tell(step, &Action::Leave(leave), None);
        }
        self.collect();
        self.left.extend(self.callers.drain(..).filter_map(|it| it.child));
        self.left.drain(..).for_each(|mut child| drop(child.wait()));
        let began = Instant::now();
        loop {
            let holds = self.agent.holds();
            if holds.0 <= self.base.0 + MARGIN && holds.1 <= self.base.1 + MARGIN {
                break;
            }
            if began.elapsed() > PATIENCE {
                let base = self.base;
                return self.end_with(&format!(
                    "descriptors and threads: {holds:?} after all left, {base:?} before"
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // The neighbour's stream, and nothing else.
        let base = self.said;
        let is_back = |holds: &Holds| {
            (holds.connections, holds.requests) == (base.connections, base.requests)
                && holds.bytes <= base.bytes + MORE_BYTES
        };
        if let Err(holds) = self.settled(is_back) {
            self.end_with(&format!("it says it holds {holds:?} after all left, {base:?} before"));
        }
    }
}

impl Outcome {
    fn find(&mut self, text: &str, did: &VecDeque<String>) {
        self.findings += 1;
        println!("finding at step {}: {text}", self.steps);
        did.iter().for_each(|line| println!("    {line}"));
    }
}
