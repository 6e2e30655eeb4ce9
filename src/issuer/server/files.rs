//! What is kept on the disk in SPIRE's formats: JSON objects, and what is damaged kept aside.

use serde::de::DeserializeOwned;

use super::error::DataFault;
use crate::issuer::files::FileDir;

/// What the name of a file ends in that is not written to its end yet, as spire-agent has it.
pub(super) const UNFINISHED: &str = ".tmp";

/// What becomes of a start that finds a file damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnDamage {
    /// It ends, and so does every later one while what was put aside lies there with nothing in its place: what was in the file
    /// cannot be had again from the server, but perhaps from a backup.
    End,
    /// It goes on without the file, which is put aside: this node can attest anew.
    GoOn,
    /// As [`OnDamage::End`], and the file is left where it is: somebody only looks.
    Look,
}

/// Reads a file. `None` where there is none, or none of use.
pub(super) fn read_kept<T>(
    dir: &FileDir,
    name: &str,
    on_damage: OnDamage,
    parse: impl FnOnce(&[u8]) -> Result<T, &'static str>,
) -> Result<Option<T>, DataFault> {
    let path = || dir.path_of(name);
    let Some(text) = dir.read(name)? else {
        let kept = dir.kept_aside(name).filter(|_| on_damage != OnDamage::GoOn);
        return kept.map_or(Ok(None), |kept| Err(DataFault::NotReplaced { path: path(), kept }));
    };
    let damage = match parse(&text) {
        Ok(read) => return Ok(Some(read)),
        Err(damage) => damage,
    };
    if on_damage == OnDamage::Look {
        return Err(DataFault::Damaged { path: path(), damage });
    }
    let kept = dir.put_aside(name).ok_or_else(|| DataFault::DamagedOften { path: path(), damage })?;
    if on_damage == OnDamage::End {
        return Err(DataFault::PutAside { path: path(), damage, kept });
    }
    let (path, kept) = (path(), kept.display());
    tracing::warn!(file = %path.display(), damage, %kept, "a file is damaged and was put aside: this node attests anew");
    Ok(None)
}

/// Reads the JSON object that a file is. serde takes a list for one too, in the order of its fields: that is damage.
pub(super) fn object<T: DeserializeOwned>(json: &[u8]) -> Result<T, &'static str> {
    let is_object = json.trim_ascii_start().starts_with(b"{");
    is_object
        .then(|| serde_json::from_slice(json).ok())
        .flatten()
        .ok_or("it is not the JSON that is expected")
}
