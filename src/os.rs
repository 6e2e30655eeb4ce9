//! The edge to the operating system: the clock, memory, descriptors, systemd. The only place where `unsafe` may stand.

pub mod accept;
pub mod clock;
pub mod heap;
pub mod interrupt;
pub mod lock;
pub mod passing;
pub mod pidfd;
pub mod receive;
pub mod systemd;
