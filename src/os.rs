//! The edge to the operating system: the clock, memory, descriptors, paths, systemd. The only place where `unsafe` may
//! stand.

pub mod accept;
pub mod accounts;
pub mod cgroup;
pub mod clock;
pub mod descriptors;
pub mod file_cache;
pub mod headroom;
pub mod heap;
pub mod interrupt;
pub mod journal;
pub mod lock;
pub mod machine;
pub mod membarrier;
mod mount;
pub mod namespace;
pub mod open_files;
pub mod outq;
pub mod own_connection;
pub mod passing;
pub mod peer_groups;
pub mod pidfd;
pub mod priority;
pub mod program;
pub mod random;
pub mod receive;
pub mod run_delay;
pub mod secrecy;
pub mod sentence;
pub mod signals;
pub mod systemd;
pub mod terminal;
pub mod trusted;
pub mod umask;
