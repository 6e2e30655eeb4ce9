//! A token that an admin made for this node, good for one attestation.

use std::path::PathBuf;

use futures_util::future::BoxFuture;
use zeroize::Zeroizing;

use super::{MAX_FILE_LEN, NodeAttestor, NodeEvidence, ServerError, SlowReads};
use crate::issuer::server::settings::{JoinToken, TokenSource};

/// Attests with a join token.
#[derive(Debug)]
pub(super) struct JoinTokenAttestor(OwnedToken);

#[derive(Debug)]
enum OwnedToken {
    None,
    Given(JoinToken),
    File(PathBuf),
}

impl JoinTokenAttestor {
    pub(super) fn new(token: Option<TokenSource<'_>>) -> Self {
        Self(match token {
            None => OwnedToken::None,
            Some(TokenSource::Given(token)) => OwnedToken::Given(token.clone()),
            Some(TokenSource::File(path)) => OwnedToken::File(path.to_owned()),
        })
    }
}

impl NodeAttestor for JoinTokenAttestor {
    fn name(&self) -> &'static str {
        "join_token"
    }

    fn evidence<'a>(&'a self, files: &'a SlowReads) -> BoxFuture<'a, Result<NodeEvidence, ServerError>> {
        Box::pin(async move {
            let payload = match &self.0 {
                OwnedToken::None => return Err(ServerError::NoToken),
                OwnedToken::Given(token) => Zeroizing::new(token.secret().as_bytes().to_vec()),
                OwnedToken::File(path) => {
                    let text = files.file(path, MAX_FILE_LEN).await.map_err(|fault| self.fault(fault))?;
                    let token = Zeroizing::new(text.trim_ascii().to_vec());
                    if token.is_empty() {
                        return Err(self.fault(format!("join token file is empty: {}", path.display())));
                    }
                    token
                }
            };
            Ok(NodeEvidence { payload, prover: None, agent_path: None })
        })
    }
}
