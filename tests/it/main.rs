mod config;
mod generated_code;
mod issuer;
mod listener;
mod metrics;
mod support;
mod tidy;
mod workload_api;
