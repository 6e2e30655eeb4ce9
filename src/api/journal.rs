//! What is counted of calls, and what the log says of them.
//!
//! Our faults are logged with their cause; what a caller did wrong is counted, and seen at debug only, but for what it
//! cannot find out itself: why it was not attested. Lines that a caller can bring about are told apart by caller and
//! reason, each with a pace of its own ([`Complaints`]): the first says who it was, later ones how often, the last that it
//! is over. No caller floods the log, and none hides what another one meets. Nothing is read about a caller for it.

use std::{num::NonZeroU64, sync::Arc};

use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};

use super::{call::Opening, metrics::ApiMetrics, reached::Reached, status::RequestError};
use crate::{
    attest::{AttestError, AttestFault, Blame},
    limits::{
        Method,
        budget::UPLOADS,
        pace::{Complaints, Pace, Settled},
    },
    peer::Peer,
    store::{audit::AuditTrail, audited::AuditedProcess},
    telemetry::{
        chain,
        registry::{Label as _, Open, Registry},
    },
};

/// Counts and logs calls.
pub struct Journal {
    metrics: ApiMetrics,
    complaints: Complaints<Complaint>,
    refusals: Complaints<&'static str>,
    no_peer: Pace,
    audit: Arc<AuditTrail>,
}

/// What a line about a caller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Complaint {
    NotAttested(AttestFault),
    NotSigned,
    NoUpdate,
    Full,
    Unfinished,
}

impl Complaint {
    fn text(self) -> &'static str {
        match self {
            Self::NotAttested(fault) => fault.text(),
            Self::NotSigned => "not_signed",
            Self::NoUpdate => "no_update",
            Self::Full => "full",
            Self::Unfinished => "unfinished",
        }
    }
}

/// A call that has begun.
#[derive(Clone, Debug)]
pub(super) struct Begun {
    method: Method,
    at: Instant,
    by: Option<AuditedProcess>,
    reached: Option<Reached>,
}

impl Begun {
    /// At this moment, by whoever sent `request`.
    pub(super) fn by<T>(request: &Request<T>, method: Method) -> Self {
        let peer = request.extensions().get::<Arc<Peer>>();
        let reached = Reached::of(request.extensions()).cloned();
        Self { method, at: Instant::now(), by: peer.map(|peer| AuditedProcess::from(&**peer)), reached }
    }
}

impl Journal {
    /// Registers the series of calls.
    pub fn new(registry: Registry<'_>, audit: Arc<AuditTrail>) -> Self {
        Self {
            metrics: ApiMetrics::new(registry),
            complaints: Complaints::default(),
            refusals: Complaints::default(),
            no_peer: Pace::default(),
            audit,
        }
    }

    /// A call was answered as a whole.
    pub(super) fn whole<T>(
        &self,
        begun: Begun,
        done: Result<T, RequestError>,
    ) -> Result<Response<T>, Status> {
        if done.is_ok() {
            self.ended(begun.method, Code::Ok);
        }
        self.first(begun, done)
    }

    /// A call has ended.
    pub(super) fn ended(&self, method: Method, code: Code) {
        self.metrics.call_ended(method, code);
    }

    /// A call had its first answer. The end of a stream that was opened is counted by [`OpenCall`].
    pub(super) fn first<T>(
        &self,
        begun: Begun,
        done: Result<T, RequestError>,
    ) -> Result<Response<T>, Status> {
        let Begun { method, at, by, reached } = begun;
        if let Some(reached) = reached {
            reached.count();
        }
        self.metrics.call_answered(method, at.elapsed());
        done.map(Response::new).map_err(|error| {
            self.ended(method, error.code());
            self.refused(method, by, &error);
            error.into()
        })
    }

    /// A call was refused by this error, or came to nothing.
    pub(super) fn refused(&self, method: Method, by: Option<AuditedProcess>, error: &RequestError) {
        const NOT_ATTESTED: &str = "workload attestation failed";
        let rpc = method.rpc();
        if let Some(by) = by {
            let spiffe_id = match error {
                RequestError::Refused(refusal) => refusal.spiffe_id.as_ref(),
                _ => None,
            };
            self.audit.refused(by, rpc, error.reason(), spiffe_id);
        }
        match error {
            RequestError::OtherPidNamespace | RequestError::Unmapped | RequestError::ProcOfOthers => {
                self.complain(by, Complaint::NotAttested(AttestFault::Namespace), |line| {
                    let AboutCaller { caller, pid, reason, times } = line;
                    tracing::warn!(method = rpc, caller, pid, reason, %error, times, "{NOT_ATTESTED}");
                });
            }
            RequestError::Attestation(cause) => match cause.blame() {
                Blame::Fault => self.complain(by, Complaint::NotAttested(cause.fault()), |line| {
                    let AboutCaller { caller, pid, reason, times } = line;
                    let error = chain(cause);
                    tracing::warn!(method = rpc, caller, pid, reason, error, times, "{NOT_ATTESTED}");
                }),
                // That a process ends right after it has asked is nothing to tell anybody.
                Blame::Refusal if !matches!(cause, AttestError::Gone) => {
                    self.complain(by, Complaint::NotAttested(cause.fault()), |line| {
                        let AboutCaller { caller, pid, reason, times } = line;
                        let error = chain(cause);
                        tracing::info!(method = rpc, caller, pid, reason, error, times, "{NOT_ATTESTED}");
                    });
                }
                Blame::Refusal | Blame::Crowd => self.quietly(by, cause.fault().text(), |line| {
                    let AboutCaller { caller, pid, reason, times } = line;
                    let error = chain(cause);
                    tracing::debug!(method = rpc, caller, pid, reason, error, times, "{NOT_ATTESTED}");
                }),
            },
            RequestError::JwtSvid(cause) | RequestError::X509Svid(cause) => {
                self.complain(by, Complaint::NotSigned, |line| {
                    let AboutCaller { caller, pid, reason, times } = line;
                    let error = chain(cause);
                    tracing::warn!(method = rpc, caller, pid, reason, error, times, "could not make an SVID");
                });
            }
            RequestError::Unfinished { bytes } => self.complain(by, Complaint::Unfinished, |line| {
                let AboutCaller { caller, pid, times, .. } = line;
                tracing::warn!(
                    method = rpc,
                    caller,
                    pid,
                    bytes,
                    most = UPLOADS,
                    times,
                    "calls are refused, as memory is short, their caller holds its share of it, and on one connection more bytes of \
                     requests are not complete than may be then: make fewer large requests at once"
                );
            }),
            RequestError::NoPeer => self.no_peer.say(|left_out| {
                tracing::error!(method = rpc, left_out, "a call arrived without its caller");
            }),
            other => self.quietly(by, other.reason(), |line| {
                let AboutCaller { caller, pid, reason, times } = line;
                tracing::debug!(method = rpc, caller, pid, reason, error = %other, times, "refused");
            }),
        }
    }

    /// Writes a line, unless there was one of this caller for this reason in the last minute.
    fn complain(&self, by: Option<AuditedProcess>, what: Complaint, write: impl FnOnce(AboutCaller)) {
        // Of a call without a peer nothing is attested and nothing made.
        let Some(AuditedProcess { caller, pid, .. }) = by else { return };
        if let Some(times) = self.complaints.note(caller, what, Instant::now()) {
            let times = Some(times).filter(|times| times.get() > 1);
            write(AboutCaller { caller: caller.to_string(), pid, reason: what.text(), times });
        }
    }

    /// The same at debug, of what is the caller's own doing.
    fn quietly(&self, by: Option<AuditedProcess>, reason: &'static str, write: impl FnOnce(AboutCaller)) {
        let Some(AuditedProcess { caller, pid, .. }) = by else { return };
        if tracing::enabled!(tracing::Level::DEBUG) {
            self.refusals.say(caller, reason, |times| {
                write(AboutCaller { caller: caller.to_string(), pid, reason, times });
            });
        }
    }

    /// A connection of the peer's has as many streams open as it may. What its client calls further is seen by nobody here.
    pub(super) fn full(&self, peer: &Peer, streams: u32) {
        self.complain(Some(AuditedProcess::from(peer)), Complaint::Full, |line| {
            let AboutCaller { caller, pid, times, .. } = line;
            tracing::warn!(
                caller,
                pid,
                streams,
                times,
                "a connection has all the streams open that it may, and further calls wait in its client: open another connection, or \
                 raise streams in ratelimit.gate.connection"
            );
        });
    }

    /// Tells which complaints are over, and what was counted for the audit. To be called now and then.
    pub fn settle(&self) {
        self.audit.settle();
        for settled in self.complaints.settle(Instant::now()) {
            match settled {
                // Its connection is as full as it was.
                Settled::Over { reason: Complaint::Full, .. } => {}
                Settled::Over { caller, reason, count } => {
                    let reason = reason.text();
                    tracing::info!(%caller, reason, count, "calls of this caller no longer fail");
                }
                Settled::Unlisted { count } => {
                    tracing::warn!(count, "calls of more callers failed than are listed one by one");
                }
            }
        }
    }

    /// Tells what was counted for the audit: the agent ends.
    pub fn end(&self) {
        self.audit.end();
    }

    /// A call is open while the answer is kept.
    pub(super) fn opened(self: &Arc<Self>, opening: Opening) -> OpenCall {
        OpenCall { journal: Arc::clone(self), opening, _open: self.metrics.stream_opened(opening.method) }
    }
}

/// What is the same in every line about a caller.
struct AboutCaller {
    caller: String,
    pid: i32,
    reason: &'static str,
    /// How often since the last line, where this is not the first.
    times: Option<NonZeroU64>,
}

/// A stream that is open.
pub(super) struct OpenCall {
    journal: Arc<Journal>,
    opening: Opening,
    _open: Open,
}

impl OpenCall {
    /// Its next message cannot be made at present.
    pub(super) fn is_behind(&self, by: AuditedProcess, error: &RequestError) {
        const TEXT: &str = "cannot update a stream; trying again";
        let (cause, what) = match error {
            RequestError::Attestation(cause) if cause.blame() == Blame::Crowd => {
                self.journal.quietly(Some(by), cause.fault().text(), |line| {
                    let AboutCaller { caller, pid, reason, times } = line;
                    tracing::debug!(caller, pid, reason, error = chain(cause), times, "{TEXT}");
                });
                return;
            }
            RequestError::Attestation(cause) => (chain(cause), Complaint::NotAttested(cause.fault())),
            RequestError::X509Svid(cause) => (chain(cause), Complaint::NoUpdate),
            other => (chain(other), Complaint::NoUpdate),
        };
        self.journal.complain(Some(by), what, |line| {
            let AboutCaller { caller, pid, reason, times } = line;
            tracing::warn!(caller, pid, reason, error = cause, times, "{TEXT}");
        });
    }

    /// It ends by this error, as far as the agent is concerned.
    pub(super) fn is_refused(&self, by: AuditedProcess, error: &RequestError) {
        self.journal.refused(self.opening.method, Some(by), error);
    }

    /// It ended with this code: [`Code::Ok`] when the client went away, which it also does when its time is over.
    pub(super) fn ended(&self, code: Code) {
        let Opening { method, ends } = self.opening;
        let is_late = code == Code::Ok && ends.is_some_and(|ends| ends <= Instant::now());
        self.journal.ended(method, if is_late { Code::DeadlineExceeded } else { code });
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, time::Duration};

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        identity::{audience::AudienceError, jwt::JwtError, spiffe_id::SpiffeIdError},
        issuer::MintError,
        limits::{
            CallerKey, ConnectionRefusal, Refusal, RejectionStatus,
            refusal::{ChargedAs, Reason, Remainder, Stage},
            rule::Origin,
        },
        store::{NoIdentity, audit::message},
        telemetry::{AuditSettings, LINES_LOST, LogSettings, log::Log, metrics::Metrics},
    };

    /// What `act` leaves in the audit, line by line.
    async fn audited<F: Future<Output = ()>>(act: impl FnOnce(Journal) -> F) -> Vec<Value> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.jsonl");
        let log = LogSettings { file: Some(dir.path().join("agent.log")), ..Default::default() };
        let audit = AuditSettings { file: Some(path.clone()), ..Default::default() };
        let (subscriber, log) = Log::build_with(&log, &audit).unwrap();
        let held = tracing::subscriber::set_default(subscriber);
        act(Journal::new(Metrics::default().registry(), Arc::default())).await;
        drop(held);
        assert!(log.flush(Duration::from_secs(60)));
        let text = fs::read_to_string(&path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The words in the first column of the table in README.md whose first column has this name.
    fn words_of_readme(column: &str) -> BTreeSet<String> {
        let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
        let (_, table) = readme.split_once(&format!("\n| {column} |")).unwrap();
        let rows = table.lines().skip(2).map_while(|line| line.strip_prefix("| "));
        rows.flat_map(|row| row.split(" | ").next().unwrap().split(", "))
            .map(|word| word.trim_matches('`').to_owned())
            .collect()
    }

    fn refusal(reason: Reason) -> RequestError {
        RequestError::Refused(Refusal {
            method: Method::FetchX509Svid,
            stage: Stage::Caller,
            charged_as: ChargedAs::Uid,
            reason,
            retry_after: Duration::from_secs(1),
            each: Duration::ZERO,
            shed: false,
            status: RejectionStatus::ResourceExhausted,
            origin: Origin::Set,
            rest: Remainder::Nothing,
            spiffe_id: None,
        })
    }

    /// However a call ends without an answer, it leaves one line, and README.md has a row for its reason.
    #[tokio::test(start_paused = true)]
    async fn each_way_a_call_can_end_is_a_line_of_the_audit_and_a_row_of_the_table() {
        let ways = || {
            [
                ("rate", refusal(Reason::Rate)),
                ("blocked", refusal(Reason::Blocked)),
                ("in_flight", refusal(Reason::InFlight)),
                ("memory", refusal(Reason::Memory)),
                ("no_identity", RequestError::NoIdentity(NoIdentity)),
                ("not_attested", AttestError::Gone.into()),
                ("not_attested", RequestError::OtherPidNamespace),
                ("not_attested", RequestError::Unmapped),
                ("not_attested", RequestError::ProcOfOthers),
                ("not_known", RequestError::NotKnown),
                ("not_signed", late()),
                ("not_signed", RequestError::JwtSvid(MintError::Late)),
                ("no_security_header", RequestError::NoSecurityHeader),
                ("bad_audience", AudienceError::Missing.into()),
                ("bad_spiffe_id", RequestError::BadSpiffeId(SpiffeIdError::Empty)),
                ("bad_token", JwtError::NoKeyId.into()),
                ("no_token", RequestError::NoSvid),
                ("draining", RequestError::Draining),
                ("sent_away", RequestError::SentAway),
                ("crowded", RequestError::Crowded),
                ("no_memory", RequestError::NoMemory),
                ("no_memory", RequestError::NoMemoryToRead),
                ("unfinished", RequestError::Unfinished { bytes: 70_000 }),
                ("not_implemented", RequestError::NoWitSvids),
                ("not_implemented", RequestError::NoWitBundles),
            ]
        };
        let lines = audited(async |journal| {
            for (uid, (_, error)) in (0..).zip(ways()) {
                fail(&journal, begun(uid, 5), error);
            }
            // Of nobody nothing can be told.
            fail(&journal, Begun { by: None, ..begun(7, 1) }, RequestError::NoPeer);
            journal.end();
        })
        .await;
        let (last, lines) = lines.split_last().unwrap();
        assert_eq!(last["message"], message::AUDIT_ENDS);
        assert_eq!(lines.len(), ways().len(), "{lines:#?}");
        for ((uid, (reason, _)), line) in (0..).zip(ways()).zip(lines) {
            let want = json!({
                "message": message::CALL_REFUSED, "caller": format!("uid:{uid}"), "uid": uid, "gid": uid, "pid": 5,
                "method": "FetchX509SVID", "reason": reason, "timestamp": line["timestamp"],
                "run": lines[0]["run"], "seq": uid + 1,
            });
            assert_eq!(*line, want);
        }
        let reasons: BTreeSet<String> = ways().iter().map(|(reason, _)| (*reason).to_owned()).collect();
        assert_eq!(words_of_readme("`reason` of a call"), reasons);
        let gate: BTreeSet<String> = (ConnectionRefusal::VALUES.iter())
            .filter(|why| why.is_soft() || why.is_callers_own())
            .map(|why| why.text().to_owned())
            .collect();
        assert_eq!(words_of_readme("`reason` of a connection"), gate);
        let rows = message::ALL.iter().map(|row| (*row).to_owned()).chain([LINES_LOST.to_owned()]).collect();
        assert_eq!(words_of_readme("line"), rows);
    }

    /// Callers without number, for reasons without number: the lines stay few, and their counts add up.
    #[tokio::test(start_paused = true)]
    async fn a_million_refusals_are_few_lines_and_exact_counts() {
        const MINUTES: u64 = 10;
        let reasons = [Reason::Rate, Reason::Blocked, Reason::InFlight, Reason::Memory];
        let lines = audited(async |journal| {
            for minute in 0..u32::try_from(MINUTES).unwrap() {
                for n in 0..100_000_u32 {
                    let by = begun(n % 977, (minute + 1).cast_signed());
                    let error = refusal(reasons[usize::try_from(n / 977 % 4).unwrap()]);
                    journal.refused(by.method, by.by, &error);
                }
                tokio::time::advance(Duration::from_secs(60)).await;
                journal.settle();
            }
            journal.end();
        })
        .await;
        let refusals = lines.iter().filter(|line| line["message"] != message::AUDIT_ENDS);
        let times = refusals.map(|line| line["times"].as_u64().unwrap_or(1)).sum::<u64>();
        assert_eq!(times, MINUTES * 100_000, "none is missing, and none is told twice");
        // As README.md says: 512 kinds of refusals with a line at once and one a minute, and one line for all others.
        let most = 512 + MINUTES * (512 + 512 + 1);
        let told = u64::try_from(lines.len()).unwrap();
        assert!(told <= most && told > 512, "{told} lines, {most} at most");
    }

    /// What `act` has the log say, line by line.
    async fn said<F: Future<Output = ()>>(act: impl FnOnce(Journal) -> F) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.log");
        let settings = LogSettings { file: Some(path.clone()), ..Default::default() };
        let no_audit = AuditSettings { enabled: false, ..Default::default() };
        let (subscriber, log) = Log::build_with(&settings, &no_audit).unwrap();
        let held = tracing::subscriber::set_default(subscriber);
        act(Journal::new(Metrics::default().registry(), Arc::default())).await;
        drop(held);
        assert!(log.flush(Duration::from_secs(60)));
        let text = fs::read_to_string(&path).unwrap();
        text.lines().map(|line| line.split_once(": ").unwrap().1.to_owned()).collect()
    }

    fn begun(uid: u32, pid: i32) -> Begun {
        let by = Some(AuditedProcess { caller: CallerKey::Uid(uid), uid, gid: uid, pid });
        Begun { method: Method::FetchX509Svid, at: Instant::now(), by, reached: None }
    }

    fn fail(journal: &Journal, begun: Begun, error: impl Into<RequestError>) {
        journal.whole(begun, Err::<(), _>(error.into())).unwrap_err();
    }

    fn late() -> RequestError {
        RequestError::X509Svid(MintError::Late)
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_whose_calls_fail_is_a_line_a_minute_and_hides_nobody() {
        let lines = said(async |journal| {
            for _ in 0..3 {
                for pid in 1..=1000 {
                    fail(&journal, begun(7, pid), late());
                    tokio::time::advance(Duration::from_millis(30)).await;
                }
            }
            fail(&journal, begun(8, 5), late());
            let unseen = AttestError::Unknown { source: std::io::ErrorKind::PermissionDenied.into() };
            fail(&journal, begun(7, 6), unseen);
            for _ in 0..200 {
                tokio::time::advance(Duration::from_secs(1)).await;
                journal.settle();
            }
        })
        .await;
        let svid = "could not make an SVID method=FetchX509SVID";
        let error = "error=\"the issuer did not answer in time\"";
        let want = [
            format!("{svid} caller=uid:7 pid=1 reason=not_signed {error}"),
            format!("{svid} caller=uid:7 pid=1 reason=not_signed {error} times=2000"),
            format!("{svid} caller=uid:8 pid=5 reason=not_signed {error}"),
        ];
        assert_eq!(lines[..3], want, "{lines:#?}");
        assert!(lines[3].contains("caller=uid:7 pid=6 reason=gone"), "another reason: {lines:#?}");
        let over = "calls of this caller no longer fail caller=uid:7 reason=not_signed count=3000";
        assert_eq!(lines[4..], [over], "what came once is over without a word");
    }

    /// Processes that end, or wait behind others, are no news; one that became another user's is, in its caller's name.
    #[tokio::test(start_paused = true)]
    async fn what_callers_do_is_told_where_they_cannot_know_it() {
        let lines = said(async |journal| {
            for _ in 0..1000 {
                fail(&journal, begun(7, 1), AttestError::Gone);
                fail(&journal, begun(7, 1), AttestError::Crowded);
                fail(&journal, begun(7, 1), RequestError::NoSvid);
            }
            fail(&journal, begun(7, 1), RequestError::OtherPidNamespace);
            let (uid, gid) = (nix::unistd::Uid::from_raw(7), nix::unistd::Gid::from_raw(7));
            let changed = AttestError::IdentityChanged { pid: nix::unistd::Pid::from_raw(1), uid, gid };
            fail(&journal, begun(7, 1), changed);
            // Another kind of line has a pace of its own.
            fail(&journal, Begun { by: None, ..begun(7, 1) }, RequestError::NoPeer);
        })
        .await;
        assert_eq!(lines.len(), 3, "{lines:#?}");
        assert!(lines[0].contains("reason=namespace"), "{lines:#?}");
        assert!(lines[1].contains("must connect again"), "{lines:#?}");
        assert!(lines[2].contains("a call arrived without its caller"), "{lines:#?}");
    }
}
