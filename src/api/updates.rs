//! A stream of whole states: the first at once, a further one when, and only when, what would be sent has changed.

use std::{future::Future, pin::Pin};

use futures_util::stream;
use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::{Code, Status};

use super::{encoded::Encoded, status::RequestError};
use crate::store::Change;

/// The response stream of a Workload API call.
pub type Updates = Pin<Box<dyn Stream<Item = Result<Encoded, Status>> + Send>>;

/// What a stream sends now.
pub trait State: Send + 'static {
    /// The message for the newest snapshot.
    fn now(&mut self) -> impl Future<Output = Result<Encoded, RequestError>> + Send;

    /// The stream ended with this code: [`Code::Ok`] when the client went away.
    fn ended(&mut self, code: Code);
}

struct Open<S: State> {
    state: S,
    changes: watch::Receiver<Change>,
    sent: Encoded,
    /// What to send next, when that is known already.
    first: bool,
    code: Code,
}

impl<S: State> Drop for Open<S> {
    fn drop(&mut self) {
        self.state.ended(self.code);
    }
}

/// Sends `first`, then follows `changes`, which must have been subscribed before `first` was made.
///
/// A fault on our side does not end the stream: what was sent stays valid, and the next change is another try. A
/// refusal does: the caller has no identity any more.
pub fn updates<S: State>(state: S, mut changes: watch::Receiver<Change>, first: Encoded) -> Updates {
    // A stream that was opened while the agent drains ends after its first message, as the others did.
    if *changes.borrow() == Change::Draining {
        changes.mark_changed();
    }
    let open = Open { state, changes, sent: first, first: true, code: Code::Ok };
    Box::pin(stream::unfold(Some(open), |open| async {
        let mut open = open?;
        let item = open.next().await;
        match item {
            Ok(message) => Some((Ok(message), Some(open))),
            Err(error) => {
                open.code = error.code();
                Some((Err(error.into()), None))
            }
        }
    }))
}

impl<S: State> Open<S> {
    async fn next(&mut self) -> Result<Encoded, RequestError> {
        if std::mem::take(&mut self.first) {
            return Ok(self.sent.clone());
        }
        loop {
            // The sender lives as long as the store, and the store as long as this state.
            if self.changes.changed().await.is_err() || *self.changes.borrow_and_update() == Change::Draining
            {
                return Err(RequestError::Draining);
            }
            match self.state.now().await {
                Ok(message) if message == self.sent => {}
                Ok(message) => {
                    self.sent = message.clone();
                    return Ok(message);
                }
                Err(error @ RequestError::X509Svid(_)) => {
                    tracing::warn!(%error, "a stream keeps what it sent; the next change is another try");
                }
                Err(error) => return Err(error),
            }
        }
    }
}
