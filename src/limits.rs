//! Who may call how often.

pub mod admission;
pub mod caller;

pub use admission::{Admitted, Limits, Method, Refusal};
pub use caller::CallerKey;
