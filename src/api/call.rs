//! The typed way of a call: [`Call`] -> `Admitted` -> `Attested` -> `Entitled` -> `Charged`.
//!
//! Each state is made in one place and takes the one before it, so that a handler cannot leave a step out:
//!
//! | state | made by | proves |
//! |---|---|---|
//! | [`Call`] | [`Call::of`] | the request shows the security header, and the kernel said who sends it |
//! | [`Admitted`] | [`Call::admit`] | its caller has tokens for the method, and a place to be attested |
//! | [`Attested`] | [`Attestor::attest`] | its selectors are the kernel's word on a living process |
//! | [`Entitled`] | [`authorize`] | entries match these selectors |
//! | [`Charged`] | [`Entitled::charge`] | their identities have tokens too; the caches of SVIDs take nothing else |
//!
//! [`Attested`]: crate::attest::Attested
//! [`Attestor::attest`]: crate::attest::Attestor::attest
//! [`Entitled`]: crate::store::Entitled
//! [`authorize`]: crate::store::authorize()
//! [`Charged`]: crate::store::Charged
//! [`Entitled::charge`]: crate::store::Entitled::charge

use std::sync::Arc;

use http::Extensions;
use tonic::Request;

use super::{reached::Reached, status::RequestError};
use crate::{
    limits::{Admitted, Limits, Method, Patience, Refusal},
    peer::Peer,
};

/// A call, and the process that made it.
#[derive(Debug)]
pub struct Call {
    caller: Arc<Peer>,
    method: Method,
    patience: Patience,
    reached: Option<Reached>,
}

impl Call {
    /// The call that `request` makes, once it has shown that it means to: the header keeps a browser or a proxy that
    /// was tricked into calling from being answered (SPIFFE Workload Endpoint, section 6).
    ///
    /// # Errors
    /// [`RequestError::NoSecurityHeader`]; [`RequestError::NoPeer`], which is a mistake of ours.
    pub fn of<T>(request: &Request<T>, method: Method) -> Result<Self, RequestError> {
        let mut values = request.metadata().get_all("workload.spiffe.io").iter();
        match (values.next(), values.next()) {
            (Some(value), None) if value == "true" => {}
            _ => return Err(RequestError::NoSecurityHeader),
        }
        let timeout =
            request.metadata().get("grpc-timeout").and_then(|text| Patience::parse(text.as_bytes()));
        let call = Self::without_header(request.extensions(), method)?;
        Ok(Self { patience: timeout.unwrap_or(call.patience), ..call })
    }

    /// A call of a service that asks for no security header: health and reflection.
    ///
    /// # Errors
    /// [`RequestError::NoPeer`], which is a mistake of ours.
    pub fn without_header(extensions: &Extensions, method: Method) -> Result<Self, RequestError> {
        let caller = Arc::clone(extensions.get().ok_or(RequestError::NoPeer)?);
        Ok(Self { caller, method, patience: Patience::USUAL, reached: Reached::of(extensions).cloned() })
    }

    /// What is called.
    pub fn method(&self) -> Method {
        self.method
    }

    /// Charges the caller, before anything is read about it. Waits a little where that is of use, and never beyond the
    /// `grpc-timeout` of the call; one that is malformed is taken for none.
    ///
    /// # Errors
    /// [`Refusal`] when it has no tokens, or too many calls are being attested.
    pub async fn admit(self, limits: &Limits) -> Result<Admitted<Arc<Peer>>, Refusal> {
        if let Some(reached) = &self.reached {
            reached.limits();
        }
        limits.admit(self.caller, self.method, self.patience).await
    }
}
