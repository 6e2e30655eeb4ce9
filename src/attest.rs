//! From an admitted peer to its selectors.

pub mod unix;
