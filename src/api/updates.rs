//! A stream of whole states: the first at once, a further one when, and only when, what would be sent has changed.

use std::{future::Future, pin::Pin, time::Duration};

use futures_util::stream;
use tokio::sync::watch;
use tonic::{Code, Status};

use super::{encoded::Encoded, journal::OpenCall, status::RequestError};
use crate::{attest::AttestError, store::Change};

/// The response stream of a Workload API call.
pub type Updates = Pin<Box<dyn tokio_stream::Stream<Item = Result<Encoded, Status>> + Send>>;

/// How long after a fault on our side the state is asked for again, if nothing changes before.
const RETRY: Duration = Duration::from_secs(5);

/// What a stream sends now.
pub(super) trait Update: Send + 'static {
    /// Whether whom the stream is for has ended: nothing is sent any more then. The connection ends too, but only
    /// soon; and somebody else may hold it.
    fn is_orphaned(&self) -> bool;

    /// The message for the newest snapshot.
    fn now(&mut self) -> impl Future<Output = Result<Encoded, RequestError>> + Send;
}

struct Stream<S: Update> {
    state: S,
    open: OpenCall,
    changes: watch::Receiver<Change>,
    sent: Encoded,
    /// What to send next, when that is known already.
    first: bool,
    code: Code,
}

impl<S: Update> Drop for Stream<S> {
    fn drop(&mut self) {
        self.open.ended(self.code);
    }
}

/// Sends `first`, then follows `changes`, which must have been subscribed before `first` was made.
///
/// A fault on our side does not end the stream: what was sent stays valid, and it is tried again after [`RETRY`] and at
/// the next change. A refusal does: the caller has no identity any more.
pub(super) fn updates<S: Update>(
    state: S,
    open: OpenCall,
    mut changes: watch::Receiver<Change>,
    first: Encoded,
) -> Updates {
    // A stream that was opened while the agent drains ends after its first message, as the others did.
    if *changes.borrow() == Change::Draining {
        changes.mark_changed();
    }
    let stream = Stream { state, open, changes, sent: first, first: true, code: Code::Ok };
    Box::pin(stream::unfold(Some(stream), |stream| async {
        let mut stream = stream?;
        match stream.next().await {
            Ok(message) => Some((Ok(message), Some(stream))),
            Err(error) => {
                stream.code = error.code();
                Some((Err(error.into()), None))
            }
        }
    }))
}

impl<S: Update> Stream<S> {
    async fn next(&mut self) -> Result<Encoded, RequestError> {
        if std::mem::take(&mut self.first) {
            return Ok(self.sent.clone());
        }
        let mut behind = false;
        loop {
            let changed = tokio::select! {
                changed = self.changes.changed() => changed,
                () = tokio::time::sleep(RETRY), if behind => Ok(()),
            };
            // The sender lives as long as the store, and the store as long as this state.
            if changed.is_err() || *self.changes.borrow_and_update() == Change::Draining {
                return Err(RequestError::Draining);
            }
            if self.state.is_orphaned() {
                return Err(RequestError::Attestation(AttestError::Gone));
            }
            match self.state.now().await {
                Ok(message) if message == self.sent => behind = false,
                Ok(message) => {
                    self.sent = message.clone();
                    return Ok(message);
                }
                Err(RequestError::X509Svid(error)) => {
                    if !std::mem::replace(&mut behind, true) {
                        self.open.is_behind(&error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, sync::Arc};

    use bytes::Bytes;
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::{api::journal::Journal, issuer::MintError, limits::Method, telemetry::metrics::Metrics};

    /// Answers one after the other: a message, or a fault.
    struct Scripted {
        answers: VecDeque<Option<&'static str>>,
        orphaned: bool,
    }

    impl Update for Scripted {
        fn is_orphaned(&self) -> bool {
            self.orphaned
        }

        async fn now(&mut self) -> Result<Encoded, RequestError> {
            match self.answers.pop_front().expect("asked no more often than the test says") {
                Some(text) => Ok(Bytes::from_static(text.as_bytes()).into()),
                None => Err(RequestError::X509Svid(MintError::Late)),
            }
        }
    }

    fn opened(answers: &[Option<&'static str>], orphaned: bool) -> (watch::Sender<Change>, Updates) {
        let (sender, changes) = watch::channel(Change::Generation(1));
        let state = Scripted { answers: answers.iter().copied().collect(), orphaned };
        let open = Arc::new(Journal::new(Metrics::default().registry())).opened(Method::FetchX509Svid);
        (sender, updates(state, open, changes, Bytes::from_static(b"first").into()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_is_tried_again_though_nothing_changes() {
        let (sender, mut stream) =
            opened(&[None, None, Some("second"), Some("second"), Some("third")], false);
        let first = stream.next().await.unwrap().unwrap();
        assert_eq!(first.into_bytes(), "first");
        sender.send_replace(Change::Generation(2));
        assert_eq!(stream.next().await.unwrap().unwrap().into_bytes(), "second");

        // Nothing is tried again where nothing failed: the next answers are for the next changes.
        tokio::time::timeout(10 * RETRY, stream.next()).await.unwrap_err();
        sender.send_replace(Change::Generation(3));
        tokio::time::timeout(10 * RETRY, stream.next()).await.unwrap_err();
        sender.send_replace(Change::Generation(4));
        assert_eq!(stream.next().await.unwrap().unwrap().into_bytes(), "third");
        sender.send_replace(Change::Draining);
        assert_eq!(stream.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn whoever_holds_the_socket_of_the_dead_is_sent_nothing() {
        let (sender, mut stream) = opened(&[Some("second")], true);
        stream.next().await.unwrap().unwrap();
        sender.send_replace(Change::Generation(2));
        assert_eq!(stream.next().await.unwrap().unwrap_err().code(), Code::Unavailable);
        assert!(stream.next().await.is_none());
    }
}
