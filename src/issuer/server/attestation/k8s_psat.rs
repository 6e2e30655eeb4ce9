//! The token that Kubernetes projects into this agent's pod.

use futures_util::future::BoxFuture;
use serde::Serialize;
use zeroize::Zeroizing;

use super::{MAX_FILE_LEN, NodeAttestor, NodeEvidence, ServerError, SlowReads};
use crate::{
    issuer::server::{reading::read_now, settings::K8sPsatSettings},
    os::trusted::Trust,
};

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
            let token = as_text(&token, &self.0).map_err(|fault| self.fault(fault))?;
            let payload = PsatPayload { cluster: &self.0.cluster, token };
            let payload = serde_json::to_vec(&payload).map_err(|error| self.fault(error.to_string()))?;
            Ok(NodeEvidence { payload: Zeroizing::new(payload), prover: None, agent_path: None })
        })
    }
}

/// Looks at the token as an agent of the user of `trust` would.
///
/// # Errors
/// It is not there, or none.
pub fn check_psat(settings: &K8sPsatSettings, trust: Trust) -> Result<(), String> {
    let token = read_now(&settings.token, MAX_FILE_LEN, trust)?;
    as_text(&token, settings).map(drop)
}

fn as_text<'a>(token: &'a [u8], settings: &K8sPsatSettings) -> Result<&'a str, String> {
    std::str::from_utf8(token).map_err(|_unsaid| format!("{} holds no token", settings.token.display()))
}
