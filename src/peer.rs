//! The socket side.
