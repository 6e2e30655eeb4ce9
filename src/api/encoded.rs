//! Messages encoded once and sent to many.
