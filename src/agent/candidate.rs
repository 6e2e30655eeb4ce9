//! Whether an agent could serve anybody, as far as that shows before it has a place: to ask another agent for its place ends
//! one that serves.
//!
//! What it knows without a place: whether callers can be told apart here, what the server has for this node or the
//! configuration for itself, and whether attestors can tell what entries ask for. What it lacks it says when it asks, and the
//! agent that runs compares ([`successor`](super::successor)). Who is kept waiting says why, answers probes, and tries again.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    time::{Instant, timeout_at},
};

use super::{
    endpoints::HttpEndpoints,
    judge::node_facts,
    surroundings::{Around, Surroundings},
    verdict::{EntriesVerdict, Facts},
};
use crate::{
    attest::Attestor,
    config::Config,
    issuer::{IssuerChoice, IssuerInput, choice},
    os::clock::Clock,
    telemetry::{
        chain,
        health::{HealthState, Probe, Ungiven},
        trouble::Trouble,
    },
};

/// How long the server may take to say whom this node serves.
const SERVER_SAYS_WITHIN: Duration = Duration::from_secs(15);
/// How long attestors may take to find out whether they can tell anything.
const TRIED_WITHIN: Duration = Duration::from_secs(5);
/// The pause before it is judged and asked again.
const PAUSE: Duration = Duration::from_secs(2);

/// An agent that has no place yet.
pub(super) struct Candidate<'a> {
    pub(super) config: &'a Config,
    pub(super) clock: Clock,
    pub(super) health: &'a Arc<HealthState>,
    pub(super) attestor: &'a Arc<Attestor>,
    pub(super) surroundings: &'a mut Surroundings,
    pub(super) endpoints: &'a mut HttpEndpoints,
    /// The runtime that answers probes.
    pub(super) control: &'a Handle,
    /// Its sender lives as long as the place is waited for.
    pub(super) waited_for: &'a Receiver<()>,
    /// What is wrong, and what of it was said.
    pub(super) trouble: (String, Trouble),
}

/// What came of a look.
#[derive(Default)]
struct Outlook {
    /// Why it is not known whom to serve.
    unheard: Option<String>,
    ungiven: Option<Ungiven>,
}

impl Candidate<'_> {
    /// What would keep it from serving, as [`HealthState::lacks`] has it. Blocks this thread, for [`SERVER_SAYS_WITHIN`] and
    /// twice [`TRIED_WITHIN`] at most.
    pub(super) fn lacks(&mut self) -> Vec<&'static str> {
        self.surroundings.look(self.health, self.attestor);
        let (told, attestor, clock) = (self.config.issuer_input(), Arc::clone(self.attestor), self.clock);
        let around = self.surroundings.told().borrow().clone();
        let (tell, judged) = sync_channel(1);
        drop(tokio::spawn(async move {
            drop(tell.send(judged_by(told, &attestor, &around, clock).await));
        }));
        let Outlook { unheard, ungiven } =
            judged.recv_timeout(SERVER_SAYS_WITHIN + TRIED_WITHIN * 2).unwrap_or_else(|_late| Outlook {
                unheard: Some("nothing could be found out in time".to_owned()),
                ungiven: None,
            });
        self.health.set(if unheard.is_none() { Probe::Healthy } else { Probe::Starting });
        let said: Vec<String> =
            unheard.into_iter().chain(ungiven.as_ref().map(|it| it.said.clone())).collect();
        self.health.gives_nothing(ungiven);
        let lacks = self.health.lacks();
        self.trouble.0 = if said.is_empty() { lacks.join(", ") } else { said.join("; ") };
        lacks
    }

    /// Says why it is kept waiting, and waits for a while. Whether it is to be tried again: somebody waits for it.
    pub(super) fn waits(&mut self, pid: i32) -> bool {
        self.health.kept_waiting_by(Some(pid));
        self.endpoints.serve(self.control);
        let (why, said) = &mut self.trouble;
        if said.is_due(why, Instant::now()) {
            tracing::error!(
                pid,
                "this agent could serve nobody, so the one that runs serves on; trying again: {why}"
            );
        }
        self.waited_for.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout)
    }
}

async fn judged_by(told: IssuerInput, attestor: &Attestor, around: &Around, clock: Clock) -> Outlook {
    let has_server = matches!(told.choice, IssuerChoice::Server(_));
    let index = match choice::look(told, clock, Instant::now() + SERVER_SAYS_WITHIN).await {
        Ok(index) => index,
        Err(error) => return Outlook { unheard: Some(chain(&error)), ungiven: None },
    };
    let questions = attestor.prepare_for(&index);
    let (mut tries, by) = (attestor.tries(), Instant::now() + TRIED_WITHIN);
    attestor.ask_ahead(&questions);
    loop {
        // The way to the socket is that of the agent that runs.
        let facts = Facts { has_server, ..node_facts(attestor, &questions, around) };
        let verdict = EntriesVerdict::of(index.entries(), &questions, &facts);
        let ungiven = verdict.ungiven(&facts, &questions, None);
        if ungiven.is_none()
            || verdict.is_tried(&facts)
            || !matches!(timeout_at(by, tries.changed()).await, Ok(Ok(())))
        {
            return Outlook { unheard: None, ungiven };
        }
    }
}
