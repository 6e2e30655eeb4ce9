//! The edge to the operating system: the clock, memory, systemd, metrics. The only place where `unsafe` may stand.

pub mod clock;
