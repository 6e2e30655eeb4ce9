//! What bounds a connection.

use std::time::Duration;

use hyper::server::conn::http2;
use hyper_util::rt::TokioTimer;

use super::{frames::FrameBudget, settings::ListenerSettings, streams::StreamExecutor};
use crate::limits::ConnectionSettings;

/// Calls that a client opens before it has heard how many it may: what RFC 9113, section 6.5.2, recommends as the least, and
/// where gRPC's clients begin.
const UNHEARD_STREAMS: usize = 100;

/// What bounds a connection: what the configuration says ([`ConnectionSettings`]), and beside it what was
/// measured to bound a hostile peer's memory without slowing an honest one.
///
/// hyper does not expose h2's `max_concurrent_reset_streams`, `reset_stream_duration` and `data_frame_budget`:
/// those keep h2's defaults (50 streams, 30 s, and its own bound on empty DATA frames).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionBounds {
    /// From accept to the first complete request. A silent peer is closed then.
    pub handshake_timeout: Duration,
    /// How long a connection without an open request stays; `None` for ever.
    pub idle_timeout: Option<Duration>,
    /// How long a request may wait for the head of its answer, or an answer for a peer that does not read. Then the
    /// connection is closed. Looked at every [`TICK`](super::course::TICK), so it may take
    /// that much longer.
    pub stall_timeout: Duration,
    /// How long a drain waits for open requests.
    pub drain_timeout: Duration,
    /// How long a connection that its caller's own limits refuse is kept before it is closed.
    pub linger: Duration,
    /// How many of these there may be; one more, and the one that is due next is closed. Default 64.
    pub max_lingering: u32,
    /// Open requests per connection; a client queues the rest.
    pub max_concurrent_streams: u32,
    /// Bytes of one request that a peer may send before they are read. Default 16 KiB.
    pub initial_stream_window: u32,
    /// The same for a connection. Default 65,535: HTTP/2's own, which saves a WINDOW_UPDATE per connection.
    pub initial_connection_window: u32,
    /// Largest frame that a peer may send. Default 16 KiB, the smallest that HTTP/2 allows.
    pub max_frame_size: u32,
    /// Largest header list of a request, in bytes as HTTP/2 counts them.
    pub max_header_list_size: u32,
    /// Bytes of answers that wait in HTTP/2 for each stream. Default 8 KiB.
    pub max_send_buffer: usize,
    /// The peer's table of headers already sent. Default 0: it would be kept for every connection.
    pub header_table_size: u32,
    /// Streams that h2 reset for an error of the peer's before it gives up on the connection.
    pub max_local_error_resets: usize,
    /// Streams that the peer reset before they were looked at.
    pub max_pending_resets: usize,
    /// How long a connection is quiet before it is pinged. Default 30 s.
    pub keep_alive_interval: Duration,
    /// How long the peer has to answer that. Default 10 s.
    pub keep_alive_timeout: Duration,
    /// Kernel buffer for what the peer has not read, in bytes (`SO_SNDBUF`; the kernel doubles it). Default 8 KiB.
    pub send_buffer: usize,
    /// What a peer may send that is no request. Default [`FrameBudget::DEFAULT`].
    pub budget: FrameBudget,
}

impl Default for ConnectionBounds {
    fn default() -> Self {
        Self::new(&ConnectionSettings::default(), &ListenerSettings::default())
    }
}

impl ConnectionBounds {
    /// What the configuration says, with what it does not: those were measured, and fit each other.
    // Destructured without `..`: what is added must bound something.
    pub fn new(connection: &ConnectionSettings, listener: &ListenerSettings) -> Self {
        let ListenerSettings { drain_timeout } = *listener;
        let ConnectionSettings {
            handshake_timeout,
            idle_timeout,
            stall_timeout,
            streams,
            header_bytes,
            linger,
            resets,
        } = *connection;
        let resets = usize::try_from(resets).unwrap_or(usize::MAX);
        Self {
            handshake_timeout,
            idle_timeout,
            stall_timeout,
            drain_timeout,
            linger,
            max_lingering: 64,
            max_concurrent_streams: streams,
            initial_stream_window: 16 * 1024,
            initial_connection_window: 65_535,
            max_frame_size: 16 * 1024,
            max_header_list_size: header_bytes,
            max_send_buffer: 8 * 1024,
            header_table_size: 0,
            // A polite client has so many: what comes for a call that was answered before all of it was there is such an
            // error, on each of its streams; and so is each call above `streams` before it has heard of that bound.
            max_local_error_resets: resets.max(usize::try_from(streams).unwrap_or(usize::MAX))
                + UNHEARD_STREAMS,
            max_pending_resets: resets,
            keep_alive_interval: Duration::from_secs(30),
            keep_alive_timeout: Duration::from_secs(10),
            send_buffer: 8 * 1024,
            budget: FrameBudget::DEFAULT,
        }
    }

    pub(super) fn http2(&self, executor: StreamExecutor) -> http2::Builder<StreamExecutor> {
        let mut http2 = http2::Builder::new(executor);
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(self.max_concurrent_streams)
            .initial_stream_window_size(self.initial_stream_window)
            .initial_connection_window_size(self.initial_connection_window)
            .max_frame_size(self.max_frame_size)
            .max_header_list_size(self.max_header_list_size)
            .max_send_buf_size(self.max_send_buffer)
            .header_table_size(self.header_table_size)
            .max_local_error_reset_streams(self.max_local_error_resets)
            .max_pending_accept_reset_streams(self.max_pending_resets)
            .keep_alive_interval(self.keep_alive_interval)
            .keep_alive_timeout(self.keep_alive_timeout)
            .auto_date_header(false);
        http2
    }
}
