//! What is kept on the disk in SPIRE's formats: JSON objects, and what is damaged kept aside.

use serde::de::DeserializeOwned;

use super::error::DataFault;
use crate::issuer::files::FileDir;

/// What the name of a file ends in that is not written to its end yet, as spire-agent has it.
pub(super) const UNFINISHED: &str = ".tmp";

/// Puts a damaged file aside, and says so.
pub(super) fn damaged(dir: &FileDir, name: &str, damage: &'static str) -> DataFault {
    let path = dir.path_of(name);
    match dir.put_aside(name) {
        Some(kept) => DataFault::Damaged { path, damage, kept },
        None => DataFault::DamagedOften { path, damage },
    }
}

/// Reads the JSON object that a file is. serde takes a list for one too, in the order of its fields: that is damage.
pub(super) fn object<T: DeserializeOwned>(json: &[u8]) -> Result<T, &'static str> {
    let is_object = json.trim_ascii_start().starts_with(b"{");
    is_object
        .then(|| serde_json::from_slice(json).ok())
        .flatten()
        .ok_or("it is not the JSON that is expected")
}
