//! Words and rules of identity, with no I/O: SPIFFE IDs, selectors, registration entries, SVIDs, bundles, and the
//! one rule that says which entries match.
//!
//! Nothing here opens a file, reads a clock or holds a lock; the present is always an argument. What is foreign
//! text (an ID asked for by a workload, a token to validate, a bundle from a file) is parsed here into a type that
//! cannot hold anything else. A private key appears only in [`svid::X509Svid`], zeroised on drop and never printed.

pub mod audience;
pub mod bundle;
pub mod entry;
pub mod index;
mod json;
mod jwk;
pub mod jwt;
pub mod name_constraints;
pub mod pem;
pub mod selector;
pub mod spiffe_id;
pub mod svid;
pub mod taint;

pub use bundle::{Bundle, Bundles};
pub use entry::{Entry, EntryAttributes, EntryId};
pub use index::EntryIndex;
pub use selector::{AskedSelectors, Selector, Selectors};
pub use spiffe_id::{SpiffeId, TrustDomain};
pub use svid::{JwtSvid, KeyType, X509Svid};
pub use taint::Tainted;
