//! When the agent's SVID is replaced, and what becomes of failures.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{LONGEST_CALL, OwnStanding, OwnSvid, Way};
use crate::{
    issuer::{
        Expelled, renewal,
        server::{
            backoff,
            data::DeniedAgent,
            error::{AgentName, Denial, ServerError},
            metrics::ServerCall,
            proto::agent::{PostStatusRequest, agent_client::AgentClient},
            settings::{RebootstrapMode, TrustSource},
        },
    },
    os::{clock::sleep_until, random::fraction},
    telemetry::trouble::Trouble,
};

/// The first pause after a failure.
const FIRST_PAUSE: Duration = Duration::from_secs(5);

/// The first pause while nothing is served for want of an SVID.
const FIRST_PAUSE_WITHOUT: Duration = Duration::from_secs(1);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);

/// The same, while nothing is served for want of an SVID: workloads wait for it.
const LONGEST_PAUSE_WITHOUT: Duration = Duration::from_secs(15);

/// What the server says of the agent is asked once more after this.
const CONFIRM: Duration = Duration::from_secs(5);

/// After how long what could not be written is written.
const WRITE_AGAIN: Duration = Duration::from_secs(5);

impl OwnSvid {
    /// Renews for ever. Ends when the server does not take this agent any more and it cannot attest again.
    pub async fn run(self: Arc<Self>) -> Expelled {
        let mut denials = self.upstream.denials();
        let mut failures = 0;
        let mut said = Trouble::default();
        let mut way = self.current().is_none().then_some(Way::Attest);
        // Attestation was refused to a banned agent: once is no proof.
        let mut banned = false;
        if way.is_none() {
            self.post_status().await;
        }
        loop {
            let Some(next) = way.take() else {
                way = match self.wait(&mut denials).await {
                    Ok(way) => Some(way),
                    Err(denial) => return self.lost(denial).await,
                };
                continue;
            };
            let done = self.renew(next).await;
            let denied = match &done {
                Err(ServerError::Denied(denial)) => Some(*denial),
                _ => None,
            };
            let was_banned = std::mem::replace(&mut banned, denied == Some(Denial::Banned));
            match (done, denied) {
                (Ok(()), _) => {
                    failures = 0;
                    said = Trouble::default();
                    // What was said of the SVID before.
                    denials.mark_unchanged();
                    self.post_status().await;
                }
                (_, Some(Denial::MustReattest)) if next == Way::Renew => way = Some(Way::Attest),
                (_, Some(denial)) if next == Way::Renew && !self.may_attest() => {
                    if self.is_certain(denial).await {
                        return self.lost(denial).await;
                    }
                    way = Some(Way::Renew);
                }
                (_, Some(Denial::Banned)) if was_banned => return self.lost(Denial::Banned).await,
                (Err(error), _) => {
                    self.tell(next, &error, &mut said);
                    let pause = self.pause(failures);
                    failures = failures.saturating_add(1);
                    // Another token may have come.
                    let _ended = timeout(pause, self.reconfigured.notified()).await;
                    way = Some(self.way(next));
                }
            }
        }
    }

    /// How long to wait after so many failures and one: to the end of the SVID at most, where there is one.
    fn pause(&self, failures: u32) -> Duration {
        let left = self.current().map(|svid| svid.not_after.duration_since(self.clock.now()));
        let (first, longest) = match left {
            Some(_) => (FIRST_PAUSE, LONGEST_PAUSE),
            None => (FIRST_PAUSE_WITHOUT, LONGEST_PAUSE_WITHOUT),
        };
        let pause = backoff::wait(first, failures, longest, fraction());
        left.and_then(Result::ok).map_or(pause, |left| pause.min(left))
    }

    /// Until there is something to do about the SVID of the moment.
    async fn wait(&self, denials: &mut watch::Receiver<Option<Denial>>) -> Result<Way, Denial> {
        let Some(svid) = self.current() else { return Ok(Way::Attest) };
        let draw = || renewal::draw(svid.not_before, svid.not_after, self.live().availability_target);
        let mut due = draw();
        loop {
            tokio::select! {
                () = sleep_until(self.clock, due) => return Ok(self.way(Way::Renew)),
                () = self.at_once.notified() => return Ok(self.way(Way::Renew)),
                () = self.foreign_for_long(), if svid.reattestable => return Ok(Way::AttestAnew),
                () = self.reconfigured.notified() => due = draw(),
                () = sleep(WRITE_AGAIN), if !self.data.is_written() => self.write_again().await,
                Ok(()) = denials.changed() => {
                    let denial = *denials.borrow_and_update();
                    if let Some(denial) = denial && self.is_certain(denial).await {
                        if denial == Denial::Banned || !svid.reattestable {
                            return Err(denial);
                        }
                        return Ok(Way::Attest);
                    }
                }
            }
        }
    }

    /// What is known and could not be written is tried again.
    async fn write_again(&self) {
        match self.keep(|_as_it_is| ()).await {
            Ok(()) => {
                tracing::info!("the agent's SVID is saved for the next start");
                self.trouble(None);
            }
            Err(error) => tracing::debug!(%error, "the agent's SVID is not saved yet for the next start"),
        }
    }

    /// Ends when the server's authority has been unknown for as long as is put up with, where it may be begun anew.
    async fn foreign_for_long(&self) {
        if !self.may_begin_anew() {
            return std::future::pending().await;
        }
        while !self.is_foreign_for_long() {
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Whether trust in the server may be established anew.
    fn may_begin_anew(&self) -> bool {
        let join = &self.settings.join;
        join.rebootstrap_mode != RebootstrapMode::Never && join.trust_source() != TrustSource::Insecure
    }

    fn is_foreign_for_long(&self) -> bool {
        self.upstream.foreign_for().is_some_and(|long| long >= self.settings.join.rebootstrap_delay)
    }

    fn may_attest(&self) -> bool {
        self.current().is_none_or(|svid| svid.reattestable)
    }

    /// How the next SVID is had, when `wanted` was to be tried.
    fn way(&self, wanted: Way) -> Way {
        let foreign = self.may_begin_anew() && self.is_foreign_for_long();
        match (wanted, self.may_attest()) {
            (_, true) if foreign => Way::AttestAnew,
            (Way::AttestAnew, true) => Way::AttestAnew,
            (_, true) => Way::Attest,
            (_, false) => Way::Renew,
        }
    }

    /// Asks the server once more, over another connection: a denial that is taken back is none.
    async fn is_certain(&self, denial: Denial) -> bool {
        tracing::warn!(%denial, "the server denies this agent; asking once more");
        sleep(CONFIRM).await;
        self.upstream.hang_up();
        match self.ask_status().await {
            Err(ServerError::Denied(again)) => again == denial,
            // Expired SVIDs do not get through the handshake everywhere.
            _ => false,
        }
    }

    async fn lost(&self, denial: Denial) -> Expelled {
        let agent = self.name().await;
        let id = if let AgentName::Given(id) = &agent { id.clone() } else { String::new() };
        let denied = Some(DeniedAgent { id, reason: denial });
        let removed = self.keep(|data| {
            (data.svid, data.reattestable, data.denied) = (Vec::new(), false, denied);
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "the agent's SVID cannot be removed");
        }
        self.upstream.show_nothing();
        self.standing.send_replace(OwnStanding::Lost(denial));
        let remedy = denial.remedy(&agent, self.is_with_token());
        Expelled { reason: format!("{denial}; {remedy}") }
    }

    fn is_with_token(&self) -> bool {
        self.live().attestor.name() == "join_token"
    }

    /// How the server calls this agent.
    async fn name(&self) -> AgentName {
        if let Some((id, _)) = self.last_known() {
            return AgentName::Given(id.to_string());
        }
        let before = self.data.known().denied.map(|denied| denied.id);
        if let Some(id) = before.filter(|id| !id.is_empty()) {
            return AgentName::Given(id);
        }
        let evidence = self.live().attestor.evidence(&self.slow).await;
        let path = evidence.ok().and_then(|evidence| evidence.agent_path);
        let trust_domain = self.settings.trust_domain.name();
        path.map_or(AgentName::Unknown, |path| AgentName::ByDefault(format!("spiffe://{trust_domain}{path}")))
    }

    /// What the server said of this agent when it took its SVID back, where that is why it has none.
    fn denied_before(&self) -> Option<String> {
        let DeniedAgent { id, reason } = self.data.known().denied?;
        let agent = if id.is_empty() { AgentName::Unknown } else { AgentName::Given(id) };
        Some(format!("{reason}; {}", reason.remedy(&agent, self.is_with_token())))
    }

    async fn ask_status(&self) -> Result<(), ServerError> {
        let connection = self.upstream.agent(Instant::now() + LONGEST_CALL).await?;
        let mut client = AgentClient::new(connection.clone());
        let request = PostStatusRequest {
            current_bundle_serial: 0,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        connection.answer(ServerCall::PostStatus, client.post_status(request)).await.map(drop)
    }

    /// Tells the server which agent this is. Of no consequence.
    async fn post_status(&self) {
        if let Ok(Err(error)) = timeout(Duration::from_secs(5), self.ask_status()).await {
            tracing::debug!(%error, "the server was not told of this agent's version");
        }
    }

    /// Says why there is no SVID: as a warning when that is not what was `said` before, and now and then.
    fn tell(&self, way: Way, error: &ServerError, said: &mut Trouble) {
        let mut why = error.to_string();
        if matches!(error, ServerError::NoToken | ServerError::Refused { .. })
            && let Some(before) = self.denied_before()
        {
            why = format!("{why}; this is needed since its last SVID was taken back: {before}");
        }
        let by = match way {
            Way::Attest => "attestation",
            Way::Renew => "renewal",
            Way::AttestAnew => "attestation with trust begun anew",
        };
        let current = self.current();
        // That the SVID has ended is another trouble with the same reason.
        let trouble = format!("{} {why}", if current.is_some() { "next" } else { "any" });
        let is_due = said.is_due(&trouble, Instant::now());
        match (is_due, &current) {
            (true, None) if self.has_heard() => tracing::warn!(
                error = why,
                by,
                "the agent has no valid SVID of its own any more: what workloads have is served while it is valid, and \
                 nothing is signed until the agent has an SVID; trying again"
            ),
            (true, None) => tracing::warn!(
                error = why,
                by,
                "the agent has no valid SVID of its own, and nobody is served until it has; trying again"
            ),
            (true, Some(_)) => {
                tracing::warn!(error = why, by, "cannot get the agent's next SVID; trying again")
            }
            (false, _) => tracing::debug!(error = why, by, "cannot get the agent's SVID; trying again"),
        }
        if current.is_some() {
            self.trouble(Some(why));
            return;
        }
        self.standing.send_modify(|standing| match standing {
            OwnStanding::Waiting { why: told, .. } => *told = why,
            other => *other = OwnStanding::Waiting { why, since: self.clock.now() },
        });
        self.upstream.show_nothing();
    }

    /// What is wrong with the SVID that is shown.
    pub(super) fn trouble(&self, why: Option<String>) {
        self.standing.send_modify(|standing| {
            if let OwnStanding::Serving { trouble, .. } = standing {
                *trouble = why;
            }
        });
    }
}
