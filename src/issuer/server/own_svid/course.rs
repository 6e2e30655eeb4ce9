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
            faults::ServerUse,
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

/// No pause is longer than this part of what is left of the SVID: a server that is back in time finds the agent asking.
const PARTS_OF_LEFT: u32 = 8;

/// But for the last of them.
const LEAST_PAUSE: Duration = Duration::from_secs(1);

/// The least that a renewal is waited for.
const SHORTEST_CALL: Duration = Duration::from_secs(5);

/// What the server says of the agent is asked once more after this.
const CONFIRM: Duration = Duration::from_secs(5);

/// After how long what could not be written is written.
const WRITE_AGAIN: Duration = Duration::from_secs(5);

impl OwnSvid {
    /// Renews for ever. Ends when the server does not take this agent any more and it cannot attest again.
    pub async fn run(self: Arc<Self>) -> Expelled {
        let mut denials = self.upstream.denials();
        let mut back = self.back.subscribe();
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
            back.mark_unchanged();
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
                    self.pause(failures, &mut back).await;
                    failures = failures.saturating_add(1);
                    way = Some(self.way(next));
                }
            }
        }
    }

    /// Waits after so many failures and one, until there is reason to try again.
    async fn pause(&self, failures: u32, back: &mut watch::Receiver<()>) {
        tokio::select! {
            () = sleep(pause(self.left(), failures, fraction())) => {}
            // Another token may have come.
            () = self.reconfigured.notified() => {}
            Ok(()) = back.changed() => {}
        }
    }

    /// How long the SVID is still valid, where there is one.
    fn left(&self) -> Option<Duration> {
        self.current().map(|svid| svid.not_after.duration_since(self.clock.now()).unwrap_or_default())
    }

    /// Until when a renewal is waited for: there must be time for another.
    pub(super) fn renewal_deadline(&self) -> Instant {
        let part = self.left().unwrap_or_default() / PARTS_OF_LEFT;
        Instant::now() + part.clamp(SHORTEST_CALL, LONGEST_CALL)
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
        self.upstream.faults().failed(ServerUse::OwnSvid, denial.to_string());
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
        // It is told as what is waited for.
        self.upstream.faults().works(ServerUse::OwnSvid);
        self.standing.send_modify(|standing| match standing {
            OwnStanding::Waiting { why: told, .. } => *told = why,
            other => *other = OwnStanding::Waiting { why, since: self.clock.now() },
        });
        self.upstream.show_nothing();
    }

    /// What is wrong with the SVID that is shown.
    pub(super) fn trouble(&self, why: Option<String>) {
        match &why {
            Some(why) => self.upstream.faults().failed(ServerUse::OwnSvid, why.clone()),
            None => self.upstream.faults().works(ServerUse::OwnSvid),
        }
        self.standing.send_modify(|standing| {
            if let OwnStanding::Serving { trouble, .. } = standing {
                *trouble = why;
            }
        });
    }
}

/// How long to wait after so many failures and one, of an SVID that has this `left`; `drawn` is a number in 0..1.
fn pause(left: Option<Duration>, failures: u32, drawn: f64) -> Duration {
    match left {
        None => backoff::wait(FIRST_PAUSE_WITHOUT, failures, LONGEST_PAUSE_WITHOUT, drawn),
        Some(left) => {
            let longest = (left / PARTS_OF_LEFT).clamp(LEAST_PAUSE, LONGEST_PAUSE);
            backoff::wait(FIRST_PAUSE, failures, longest, drawn)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::TrustDomain,
        issuer::server::{
            metrics::ServerMetrics,
            settings::{
                JoinSettings, KeyManagerSettings, NodeAttestorSettings, ServerSettings, SyncSettings,
            },
        },
        os::clock::Clock,
        telemetry::metrics::Metrics,
    };

    #[test]
    fn no_pause_is_longer_than_a_part_of_what_is_left() {
        let seconds = Duration::from_secs;
        for (case, left, failures, drawn, milliseconds) in [
            ("none, at first", None, 0, 0.5, 1000),
            ("none, for long", None, 40, 0.5, 15_000),
            ("much is left", Some(seconds(1800)), 0, 0.5, 5000),
            ("much is left, for long", Some(seconds(1800)), 40, 0.5, 120_000),
            ("two minutes are left, for long", Some(seconds(120)), 40, 0.5, 15_000),
            ("the most that is drawn", Some(seconds(120)), 40, 1.0, 16_500),
            ("little is left, at first", Some(seconds(24)), 0, 0.5, 3000),
            ("hardly anything is left", Some(seconds(2)), 40, 0.5, 1000),
            ("nothing is left", Some(Duration::ZERO), 0, 0.5, 1000),
        ] {
            let got = pause(left, failures, drawn);
            assert_eq!((got.as_secs_f64() * 1000.0).round(), f64::from(milliseconds), "{case}");
        }
    }

    /// From half of the life of an SVID on, with a server that is away: whenever it is back, it is asked before much of what
    /// was left then has passed, and it was not asked without end.
    #[test]
    fn a_server_that_is_back_in_time_is_asked_in_time() {
        for (life, most_tries) in [(60.0, 24), (3600.0, 80), (86_400.0, 420)] {
            let (mut left, mut failures) = (life / 2.0, 0_u32);
            while left > 1.0 {
                // The longest that may be drawn.
                let pause = pause(Some(Duration::from_secs_f64(left)), failures, 1.0).as_secs_f64();
                assert!(pause <= (left * 1.1 / 8.0).max(1.1) + 1e-6, "{pause} s of {left} s");
                left -= pause;
                failures += 1;
            }
            assert!(failures <= most_tries, "{failures} tries of an SVID of {life} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_back_is_asked_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let settings = ServerSettings {
            trust_domain: TrustDomain::parse("td").unwrap(),
            data_dir: dir.path().join("data"),
            svid_key_type: crate::identity::KeyType::EcP256,
            availability_target: None,
            prefetch: 0,
            join: JoinSettings::default(),
            sync: SyncSettings::default(),
            node_attestor: NodeAttestorSettings::JoinToken,
            key_manager: KeyManagerSettings::Memory,
        };
        let metrics = Arc::new(ServerMetrics::new(Metrics::default().registry()));
        let own = OwnSvid::open(settings, Clock::SYSTEM, metrics).unwrap();
        let mut back = own.back.subscribe();
        let waits = async |back: &mut watch::Receiver<()>| {
            let began = Instant::now();
            own.pause(40, back).await;
            began.elapsed()
        };
        let longest = LONGEST_PAUSE_WITHOUT.mul_f64(0.9);
        assert!(waits(&mut back).await >= longest);
        own.server_is_back();
        assert_eq!(waits(&mut back).await, Duration::ZERO, "it was back while the last try was under way");
        assert!(waits(&mut back).await >= longest, "once");
    }
}
