mod generated_code;
mod issuer;
mod metrics;
mod tidy;
