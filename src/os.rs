//! The edge to the operating system: the clock, memory, descriptors, systemd. The only place where `unsafe` may stand.

pub mod accept;
pub mod clock;
pub mod heap;
pub mod lock;
pub mod pidfd;
pub mod signals;
pub mod systemd;
