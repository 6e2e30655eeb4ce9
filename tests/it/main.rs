#![expect(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test may fail by any of them; the lints' own exemption reaches only #[test] functions"
)]

mod admin;
mod attest;
mod audit;
mod away;
mod budget;
mod cgroup;
mod cli;
mod command;
mod config;
mod corpus;
mod crowds;
mod disks;
mod door;
mod excess;
mod executables;
mod filled;
mod forged;
mod frames;
mod fuse;
mod generated_code;
mod handed_over;
mod handover;
mod heads;
mod held;
mod hostile;
mod house;
mod issuer;
mod join_config;
mod joining;
mod kubelet;
mod kubernetes;
mod ledger;
mod limits;
mod listener;
mod metrics;
mod mtls;
mod names;
mod operators;
mod outages;
mod places;
mod process;
mod ratelimit_config;
mod readme;
mod refused;
mod reload;
mod room;
mod rotation;
mod screens;
mod shares;
mod spire_server;
mod stepped;
mod streams;
mod support;
mod surroundings;
mod systemd;
mod throttled;
mod tidy;
// What stopped a thread is told in this way on glibc alone.
#[cfg(target_env = "gnu")]
mod trace;
mod trust;
mod workload_api;
mod writers;
