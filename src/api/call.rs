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

use std::{
    future::{Future as _, poll_fn},
    pin::pin,
    sync::Arc,
};

use http::Extensions;
use tokio::time::Instant;
use tonic::Request;

use super::{proto::workload as pb, reached::Reached, status::RequestError};
use crate::{
    limits::{
        Admitted, Limits, Method, Patience, Refusal, budget::KEPT_WAITING, holding::KeptBytes, patience,
    },
    peer::Peer,
};

/// The most that the message of a call may keep in memory while the call waits, in bytes: thousands may. One that keeps
/// more is decided at once.
const PATIENT: usize = 2 * 1024;

/// What an allocation takes beside what was asked for, in bytes.
const ALLOCATION: usize = 24;

/// A message that calls begin with.
pub(super) trait Keeps {
    /// Bytes that it keeps in memory beside itself.
    fn kept(&self) -> usize {
        0
    }
}

impl Keeps for pb::X509svidRequest {}
impl Keeps for pb::X509BundlesRequest {}
impl Keeps for pb::JwtBundlesRequest {}
impl Keeps for pb::WitBundlesRequest {}

impl Keeps for pb::WitsvidRequest {
    fn kept(&self) -> usize {
        // Nobody reads it.
        usize::MAX
    }
}

impl Keeps for pb::JwtsvidRequest {
    fn kept(&self) -> usize {
        let texts: usize = self.audience.iter().map(|text| text.capacity() + ALLOCATION).sum();
        texts + self.audience.capacity() * size_of::<String>() + self.spiffe_id.capacity()
    }
}

impl Keeps for pb::ValidateJwtsvidRequest {
    fn kept(&self) -> usize {
        self.audience.capacity() + self.svid.capacity()
    }
}

/// A stream that is about to be opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opening {
    pub(super) method: Method,
    /// When its client gives it up, if it says so.
    pub(super) ends: Option<Instant>,
}

/// A call, and the process that made it.
#[derive(Debug)]
pub struct Call {
    caller: Arc<Peer>,
    method: Method,
    patience: Patience,
    /// When its client gives it up.
    ends: Option<Instant>,
    reached: Option<Reached>,
}

impl Call {
    /// The call that `request` makes, once it has shown that it means to: the header keeps a browser or a proxy that
    /// was tricked into calling from being answered (SPIFFE Workload Endpoint, section 6).
    ///
    /// # Errors
    /// [`RequestError::NoSecurityHeader`]; [`RequestError::NoPeer`], which is a mistake of ours.
    pub(super) fn of<T: Keeps>(request: &Request<T>, method: Method) -> Result<Self, RequestError> {
        let mut values = request.metadata().get_all("workload.spiffe.io").iter();
        match (values.next(), values.next()) {
            (Some(value), None) if value == "true" => {}
            _ => return Err(RequestError::NoSecurityHeader),
        }
        let timeout = request.metadata().get("grpc-timeout");
        let ends = timeout.and_then(|text| patience::timeout(text.as_bytes()));
        let ends = ends.and_then(|timeout| Instant::now().checked_add(timeout));
        let call = Self { ends, ..Self::without_header(request.extensions(), method)? };
        if request.get_ref().kept() > PATIENT {
            return Ok(call);
        }
        let patience = timeout.and_then(|text| Patience::parse(text.as_bytes())).unwrap_or(Patience::USUAL);
        Ok(Self { patience, ..call })
    }

    /// A call of a service that asks for no security header: health and reflection. It waits for nothing.
    ///
    /// # Errors
    /// [`RequestError::NoPeer`], which is a mistake of ours.
    pub fn without_header(extensions: &Extensions, method: Method) -> Result<Self, RequestError> {
        let caller = Arc::clone(extensions.get().ok_or(RequestError::NoPeer)?);
        Ok(Self {
            caller,
            method,
            patience: Patience::NONE,
            ends: None,
            reached: Reached::of(extensions).cloned(),
        })
    }

    /// What is called.
    pub fn method(&self) -> Method {
        self.method
    }

    /// The stream that it opens.
    pub(super) fn opening(&self) -> Opening {
        Opening { method: self.method, ends: self.ends }
    }

    /// Counts a large message as held by its connection, while the call goes on with it: its process may take seconds to be
    /// attested. What is small is reckoned with the call.
    pub(super) fn keep(&self, message: &impl Keeps) -> Option<KeptBytes> {
        let kept = Some(message.kept()).filter(|kept| *kept > PATIENT)?;
        Some(self.caller.holding()?.keep(u64::try_from(kept).unwrap_or(0)))
    }

    /// [`Call::admit`] without any wait.
    ///
    /// # Errors
    /// As [`Call::admit`].
    pub fn admit_at_once(self, limits: &Limits) -> Result<Admitted<Arc<Peer>>, Refusal> {
        self.reaches_limits();
        limits.admit_caller(self.caller, self.method)
    }

    fn reaches_limits(&self) {
        if let Some(reached) = &self.reached {
            reached.limits();
        }
    }

    /// Charges the caller, before anything is read about it. Waits a little where that is of use, and never beyond the
    /// `grpc-timeout` of the call; one that is malformed is taken for none. What is large waits for nothing.
    ///
    /// # Errors
    /// [`Refusal`] when it has no tokens, or too many calls are being attested.
    pub async fn admit(self, limits: &Limits) -> Result<Admitted<Arc<Peer>>, Refusal> {
        self.reaches_limits();
        let holding = self.caller.holding().map(Arc::clone);
        let mut admitted = pin!(limits.admit(self.caller, self.method, self.patience));
        let mut waits = None;
        poll_fn(|cx| {
            let polled = admitted.as_mut().poll(cx);
            if polled.is_pending() && waits.is_none() {
                waits = holding.as_ref().map(|holding| holding.keep(KEPT_WAITING));
            }
            polled
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_small_may_wait() {
        let jwt = |n: usize, text: &str| pb::JwtsvidRequest {
            audience: vec![text.to_owned(); n],
            spiffe_id: "spiffe://td/web".to_owned(),
        };
        let token =
            |n| pb::ValidateJwtsvidRequest { audience: "spiffe://td/db".to_owned(), svid: "x".repeat(n) };
        for (case, kept, small) in [
            ("nothing", pb::X509svidRequest {}.kept(), true),
            ("an audience", jwt(1, "spiffe://td/a-server-with-a-long-name").kept(), true),
            ("ten", jwt(10, "spiffe://td/a-server-with-a-long-name").kept(), true),
            ("forty of one byte", jwt(40, "a").kept(), true),
            ("a hundred of none", jwt(100, "").kept(), false),
            ("one of 4 KiB", jwt(1, &"x".repeat(4096)).kept(), false),
            ("a token", token(1500).kept(), true),
            ("a long token", token(2048).kept(), false),
            ("what is never answered", pb::WitsvidRequest::default().kept(), false),
        ] {
            assert_eq!(kept <= PATIENT, small, "{case}: {kept}");
        }
    }
}
