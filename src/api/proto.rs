//! What `proto/` compiles to, checked in so that a build needs no protoc; a test compares it.
