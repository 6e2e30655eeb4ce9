mod generated_code;
mod metrics;
