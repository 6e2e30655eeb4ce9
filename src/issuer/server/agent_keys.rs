//! `keys.json`, as spire-agent's KeyManager `disk` has it: the key of the agent's SVID, and while it is renewed the next one
//! beside it. With KeyManager `memory` there is no file.

use std::{collections::BTreeMap, sync::Mutex, sync::PoisonError};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, string::PrintableString};
use serde::{Deserialize, Serialize};
use serde_json::ser::{PrettyFormatter, Serializer};
use zeroize::{ZeroizeOnDrop, Zeroizing};

use super::{
    error::DataFault,
    files::{OnDamage, object, read_kept},
};
use crate::{
    identity::KeyType,
    issuer::{
        files::FileDir,
        keys::{KeyFault, KeyPair, SignatureForm},
    },
};

/// The file, in the directory of KeyManager `disk`.
pub(super) const KEYS: &str = "keys.json";

/// The two places of the key, taken in turns.
const PLACES: [&str; 2] = ["agent-svid-A", "agent-svid-B"];

/// The place of a key that is made while it is not known which of the others an SVID is for: a backup may bring it back.
const BESIDE: &str = "agent-svid-C";

/// The most keys of a file.
const MOST_KEYS: usize = 100;

/// PKCS#8 DER by name.
type KeyTable = BTreeMap<String, Zeroizing<Vec<u8>>>;

/// The keys, and where they are kept.
pub(super) struct AgentKeys {
    dir: Option<FileDir>,
    /// Held for an instant: who asks for a key does not wait for the disk.
    known: Mutex<KnownKeys>,
    /// Who makes one, and writes it.
    making: Mutex<()>,
}

/// The keys, and which of them was made and is not in use yet.
#[derive(Clone, Default)]
struct KnownKeys {
    keys: KeyTable,
    waiting: Option<&'static str>,
}

impl std::fmt::Debug for AgentKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AgentKeys").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// Why there is no new key.
#[derive(Debug, thiserror::Error)]
pub(super) enum NewKeyError {
    #[error(transparent)]
    Disk(#[from] DataFault),
    #[error("cannot make a key: {0}")]
    Crypto(#[from] KeyFault),
}

#[derive(Deserialize, Serialize)]
struct KeysJson {
    keys: Option<BTreeMap<String, EncodedKey>>,
}

/// Base64 of a key, wiped when dropped.
#[derive(Deserialize, Serialize, ZeroizeOnDrop)]
#[serde(transparent)]
struct EncodedKey(String);

impl AgentKeys {
    /// Keys that end with the process.
    pub(super) fn in_memory() -> Self {
        Self { dir: None, known: Mutex::default(), making: Mutex::new(()) }
    }

    /// Reads the file; that there is none is well.
    ///
    /// # Errors
    /// It cannot be read, or is damaged (then it was put aside).
    pub(super) fn open(dir: FileDir, on_damage: OnDamage) -> Result<Self, DataFault> {
        let known = read_kept(&dir, KEYS, on_damage, parse)?.unwrap_or_default();
        let known = Mutex::new(KnownKeys { keys: known, waiting: None });
        Ok(Self { dir: Some(dir), known, making: Mutex::new(()) })
    }

    /// Leaves the file to the next agent: no key is made any more. Waits for the disk.
    pub(super) fn let_go(&self) {
        if let Some(dir) = &self.dir {
            dir.let_go();
        }
    }

    /// The key whose public half stands in this certificate.
    pub(super) fn of(&self, leaf: &[u8]) -> Option<KeyPair> {
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf).ok()?;
        let public = leaf.public_key().subject_public_key.data.as_ref();
        self.lock().keys.values().filter_map(|key| key_pair(key)).find(|key| key.public_key() == public)
    }

    /// The next key, in a place that the key of `leaf` has not: the one that waits since a request with it failed, or one
    /// that is made and kept. Where the key of `leaf` is not known, none that is there is thrown away. Waits for the disk.
    ///
    /// # Errors
    /// It cannot be kept: then it is not handed out.
    pub(super) fn make_next(&self, leaf: Option<&[u8]>) -> Result<KeyPair, NewKeyError> {
        let _makes = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        let current = leaf.and_then(|leaf| self.of(leaf));
        let KnownKeys { keys, waiting } = self.lock().clone();
        let kept = |name: &str| keys.get(name).and_then(|key| key_pair(key));
        let in_use =
            |key: &KeyPair| current.as_ref().is_some_and(|current| current.public_key() == key.public_key());
        if let Some(key) = waiting.and_then(kept).filter(|key| !in_use(key)) {
            return Ok(key);
        }
        let key = KeyPair::generate(KeyType::EcP256, SignatureForm::Certificate)?;
        let [first, second] = PLACES;
        let is_at = |name: &str| kept(name).is_some_and(|key| in_use(&key));
        let place = match &current {
            None if !keys.is_empty() => BESIDE,
            _ if is_at(first) => second,
            _ => first,
        };
        let has_parted = current.is_some() && !is_at(BESIDE);
        let mut next = keys;
        if has_parted {
            next.remove(BESIDE);
        }
        next.insert(place.to_owned(), key.pkcs8()?);
        if let Some(dir) = &self.dir {
            dir.write(KEYS, &written(&next)).map_err(DataFault::from)?;
        }
        *self.lock() = KnownKeys { keys: next, waiting: Some(place) };
        Ok(key)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, KnownKeys> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key_pair(pkcs8: &[u8]) -> Option<KeyPair> {
    [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048]
        .into_iter()
        .find_map(|key_type| KeyPair::from_pkcs8(key_type, SignatureForm::Certificate, pkcs8))
}

fn parse(text: &[u8]) -> Result<KeyTable, &'static str> {
    let json: KeysJson = object(text)?;
    let keys = json.keys.unwrap_or_default();
    if keys.len() > MOST_KEYS {
        return Err("it has too many keys");
    }
    let decoded = |(name, text): (String, EncodedKey)| {
        let key = Zeroizing::new(STANDARD.decode(&text.0).ok()?);
        key_pair(&key)?;
        Some((name, key))
    };
    keys.into_iter().map(decoded).collect::<Option<_>>().ok_or("it holds no key where one should be")
}

fn written(keys: &KeyTable) -> Zeroizing<Vec<u8>> {
    let keys =
        keys.iter().map(|(name, key)| (name.clone(), EncodedKey(STANDARD.encode(key.as_slice())))).collect();
    // Room for all of it at once: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(64 * 1024));
    let mut serializer = Serializer::with_formatter(&mut *text, PrettyFormatter::with_indent(b"\t"));
    KeysJson { keys: Some(keys) }.serialize(&mut serializer).expect("texts");
    text
}

/// A request for an agent's SVID: the server takes its key and nothing else.
pub(super) fn csr(key: &KeyPair) -> Result<Vec<u8>, rcgen::Error> {
    let printable = |text| PrintableString::try_from(text).map(DnValue::PrintableString);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CountryName, printable("US")?);
    params.distinguished_name.push(DnType::OrganizationName, printable("SPIRE")?);
    Ok(params.serialize_request(key)?.der().to_vec())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::issuer::server::files::UNFINISHED;

    fn open(path: &Path) -> AgentKeys {
        AgentKeys::open(FileDir::open(path, UNFINISHED).unwrap(), OnDamage::End).unwrap()
    }

    fn certificate(key: &KeyPair) -> Vec<u8> {
        CertificateParams::new(vec!["a".to_owned()]).unwrap().self_signed(key).unwrap().der().to_vec()
    }

    #[test]
    fn the_two_places_are_taken_in_turns() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("keys");
        let keys = open(&path);
        let mut leaf = certificate(&keys.make_next(None).unwrap());
        for turn in 0..4 {
            let next = keys.make_next(Some(&leaf)).unwrap();
            let again = keys.make_next(Some(&leaf)).unwrap();
            assert_eq!(
                next.public_key(),
                again.public_key(),
                "one that is not in use yet is not thrown away"
            );
            let again = open(&path);
            let old = again.of(&leaf).expect("the key in use is kept until the next but one");
            assert_ne!(old.public_key(), next.public_key(), "{turn}");
            leaf = certificate(&next);
            assert!(again.of(&leaf).is_some(), "{turn}");
        }
        let text = std::fs::read_to_string(path.join(KEYS)).unwrap();
        assert!(text.starts_with("{\n\t\"keys\": {\n\t\t\"agent-svid-A\": \""), "{text}");
        assert!(text.ends_with("\"\n\t}\n}"), "{text}");
    }

    #[test]
    fn no_key_is_thrown_away_while_its_svid_is_not_known() {
        let at = tempfile::tempdir().unwrap();
        let path = at.path().join("keys");
        let mut leaf = certificate(&open(&path).make_next(None).unwrap());
        let mut before = Vec::new();
        for _ in 0..2 {
            before.push(leaf.clone());
            leaf = certificate(&open(&path).make_next(Some(&leaf)).unwrap());
        }
        before.push(leaf.clone());
        let known = before.split_off(1);
        for _ in 0..3 {
            let keys = open(&path);
            let new = certificate(&keys.make_next(None).unwrap());
            assert!(known.iter().all(|leaf| keys.of(leaf).is_some()), "a backup may bring their SVIDs back");
            leaf = new;
        }
        // From then on it is in turns again.
        for left in [3, 2, 2] {
            let keys = open(&path);
            let next = certificate(&keys.make_next(Some(&leaf)).unwrap());
            assert!(keys.of(&leaf).is_some());
            assert_eq!(keys.lock().keys.len(), left);
            leaf = next;
        }
    }

    #[test]
    fn what_is_damaged_is_not_read() {
        for text in ["", "{}x", "{\"keys\":{\"agent-svid-A\":\"AAAA\"}}", "{\"keys\":[]}"] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        for text in ["{}", "{\"keys\":null}", "{\"keys\":{}}"] {
            assert!(parse(text.as_bytes()).is_ok(), "{text}");
        }
    }
}
