//! The edge to the operating system: the clock, memory, logs, metrics, systemd. The only place where `unsafe` may stand.

pub mod accept;
pub mod clock;
pub mod heap;
pub mod http;
pub mod lock;
pub mod log;
pub mod metrics;
pub mod pidfd;
pub mod systemd;
