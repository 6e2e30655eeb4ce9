mod generated_code;
mod issuer;
mod listener;
mod metrics;
mod tidy;
mod support;
mod workload_api;
