//! How this node proves to the server which one it is: one file for each way, and the exchange that they have in common.

mod join_token;
mod k8s_psat;
mod x509pop;

use std::fmt;

use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use zeroize::Zeroizing;

use self::{join_token::JoinTokenAttestor, k8s_psat::PsatAttestor, x509pop::PopAttestor};
pub use self::{
    k8s_psat::check_psat,
    x509pop::{PopFault, check_pop},
};
use super::{
    error::{Denial, ServerError, shown},
    metrics::ServerCall,
    proto::{
        agent::{
            AgentX509svidParams, AttestAgentRequest, agent_client::AgentClient, attest_agent_request,
            attest_agent_response,
        },
        types::AttestationData,
    },
    reading::SlowReads,
    settings::{NodeAttestorSettings, ServerSettings},
    upstream::ServerConnection,
};

/// The most challenges of one attestation.
const MOST_CHALLENGES: u32 = 16;

/// The largest file that is read for an attestation, in bytes.
const MAX_FILE_LEN: u64 = 1 << 20;

/// One way of proof.
pub(super) trait NodeAttestor: fmt::Debug + Send + Sync {
    /// As the server calls it.
    fn name(&self) -> &'static str;

    /// What is shown first, and who answers the challenges. Reads its files anew.
    fn evidence<'a>(&'a self, files: &'a SlowReads) -> BoxFuture<'a, Result<NodeEvidence, ServerError>>;

    /// What it attests with cannot be used.
    fn fault(&self, fault: String) -> ServerError {
        ServerError::Evidence { attestor: self.name(), fault }
    }
}

/// What one attestation is made with.
pub(super) struct NodeEvidence {
    payload: Zeroizing<Vec<u8>>,
    prover: Option<Box<dyn Prover>>,
    /// The path of the agent's SPIFFE ID, unless the server has a template of its own for it; `None` where only the server
    /// can tell.
    pub(super) agent_path: Option<String>,
}

/// Answers challenges.
pub(super) trait Prover: Send {
    /// The answer to one.
    ///
    /// # Errors
    /// It is none that this way of proof has.
    fn answer(&self, challenge: &[u8]) -> Result<Vec<u8>, String>;
}

/// What the server gives for it.
#[derive(Clone, Debug)]
pub(super) struct AttestedAgent {
    /// DER, the leaf first.
    pub(super) chain: Vec<Vec<u8>>,
    pub(super) reattestable: bool,
}

/// The attestor that the settings ask for: a join token comes before any other.
pub(super) fn attestor(settings: &ServerSettings) -> Box<dyn NodeAttestor> {
    match (&settings.node_attestor, settings.join.token()) {
        (_, Some(token)) => Box::new(JoinTokenAttestor::new(Some(token))),
        (NodeAttestorSettings::JoinToken, None) => Box::new(JoinTokenAttestor::new(None)),
        (NodeAttestorSettings::X509Pop(settings), None) => Box::new(PopAttestor::new(settings.clone())),
        (NodeAttestorSettings::K8sPsat(settings), None) => Box::new(PsatAttestor::new(settings.clone())),
    }
}

/// Attests over a connection that shows nothing. `csr` is DER; the server takes its key.
///
/// # Errors
/// The evidence is missing, the server refuses it, or the connection ends.
pub(super) async fn attest(
    connection: &ServerConnection,
    attestor: &dyn NodeAttestor,
    files: &SlowReads,
    csr: Vec<u8>,
) -> Result<AttestedAgent, ServerError> {
    let name = attestor.name();
    let evidence = attestor.evidence(files).await?;
    let refused = |error| refused(name, error);
    let exchanged = exchange(connection.clone(), name, evidence, csr);
    connection.answer(ServerCall::AttestAgent, exchanged).await.map_err(refused)
}

async fn exchange(
    connection: ServerConnection,
    name: &'static str,
    evidence: NodeEvidence,
    csr: Vec<u8>,
) -> Result<AttestedAgent, tonic::Status> {
    use attest_agent_request::{Params, Step};
    use attest_agent_response::Step as Answer;

    let NodeEvidence { payload, prover, agent_path: _ } = evidence;
    let data = AttestationData { r#type: name.to_owned(), payload: payload.to_vec() };
    let params = Params { data: Some(data), params: Some(AgentX509svidParams { csr }) };
    let (steps, requests) = mpsc::channel(1);
    let send = async |step| steps.send(AttestAgentRequest { step: Some(step) }).await;
    let gone = |_| tonic::Status::cancelled("the server accepts nothing further");
    send(Step::Params(params)).await.map_err(gone)?;
    let mut client = AgentClient::new(connection);
    let mut answers = client.attest_agent(ReceiverStream::new(requests)).await?.into_inner();
    for _ in 0..=MOST_CHALLENGES {
        match answers.message().await?.and_then(|answer| answer.step) {
            Some(Answer::Result(result)) => {
                let chain = result.svid.map(|svid| svid.cert_chain).unwrap_or_default();
                return Ok(AttestedAgent { chain, reattestable: result.reattestable });
            }
            Some(Answer::Challenge(challenge)) => {
                let prover = prover
                    .as_ref()
                    .ok_or_else(|| tonic::Status::internal("a challenge, where none is known"))?;
                let response = prover.answer(&challenge).map_err(tonic::Status::internal)?;
                send(Step::ChallengeResponse(response)).await.map_err(gone)?;
            }
            None => return Err(tonic::Status::internal("the server ends the attestation without a result")),
        }
    }
    Err(tonic::Status::internal("too many challenges"))
}

/// What an admin does about a refusal.
fn refused(attestor: &'static str, error: ServerError) -> ServerError {
    let ServerError::Answered { code, message, .. } = error else { return error };
    let is = |part: &str| message.contains(part);
    if code == tonic::Code::PermissionDenied && is("banned") {
        return ServerError::Denied(Denial::Banned);
    }
    let remedy = if is("already been used") || is("does not exist") {
        "; a join token is good for one attestation: make another with `spire-server token generate`"
    } else if is("join token expired") {
        "; make another with `spire-server token generate -ttl <seconds>`, and start the agent before it expires"
    } else if is("could not get plugin") || is("unsupported") || code == tonic::Code::FailedPrecondition {
        "; is there a NodeAttestor of this name in the server's configuration?"
    } else {
        ""
    };
    let message = shown(&message);
    ServerError::Refused { attestor, code, message, remedy }
}
