//! The token that Kubernetes projects into this agent's pod.

use futures_util::future::BoxFuture;
use serde::Serialize;
use zeroize::Zeroizing;

use super::{MAX_FILE_LEN, NodeAttestor, NodeEvidence, ServerError, SlowReads};
use crate::issuer::server::settings::K8sPsatSettings;

/// Attests with a projected service account token.
#[derive(Debug)]
pub(super) struct PsatAttestor(K8sPsatSettings);

#[derive(Serialize)]
struct PsatPayload<'a> {
    cluster: &'a str,
    token: &'a str,
}

impl PsatAttestor {
    pub(super) fn new(settings: K8sPsatSettings) -> Self {
        Self(settings)
    }
}

impl NodeAttestor for PsatAttestor {
    fn name(&self) -> &'static str {
        "k8s_psat"
    }

    fn evidence<'a>(&'a self, files: &'a SlowReads) -> BoxFuture<'a, Result<NodeEvidence, ServerError>> {
        Box::pin(async move {
            let token = files.file(&self.0.token, MAX_FILE_LEN).await.map_err(|fault| self.fault(fault))?;
            let token = std::str::from_utf8(&token)
                .map_err(|_unsaid| self.fault(format!("{} holds no token", self.0.token.display())))?;
            let payload = PsatPayload { cluster: &self.0.cluster, token };
            let payload = serde_json::to_vec(&payload).map_err(|error| self.fault(error.to_string()))?;
            Ok(NodeEvidence { payload: Zeroizing::new(payload), prover: None, agent_path: None })
        })
    }
}
