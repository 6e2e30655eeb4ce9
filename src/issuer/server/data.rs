//! `agent-data.json`, as spire-agent has it: the agent's SVID, the authorities of its trust domain, and whether it can attest
//! once more.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::SystemTime,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use x509_parser::pem::Pem;

use super::{
    error::{DataFault, Denial},
    files::{OnDamage, object, read_kept},
};
use crate::{identity::TrustDomain, issuer::files::FileDir};

/// The file, in `data_dir`.
pub const AGENT_DATA: &str = "agent-data.json";

/// Go's time before all others: what spire-agent writes where there is none.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

/// The most certificates of a list in it.
const MOST_CERTIFICATES: usize = 10_000;

/// What is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct AgentData {
    /// The agent's SVID, DER, the leaf first; empty while it has none.
    pub(super) svid: Vec<Vec<u8>>,
    /// The authorities of the trust domain, DER; empty while none is known.
    pub(super) bundle: Vec<Vec<u8>>,
    pub(super) reattestable: bool,
    /// 1 while the first trust is established, 2 while it is established anew, else 0.
    pub(super) bootstrap_use: i64,
    /// RFC 3339: since when that goes on.
    pub(super) bootstrap_start_time: String,
    /// How often that was tried.
    pub(super) connection_attempts: i64,
    /// Why there is no SVID any more, where the server has taken it back. Not of spire-agent, which passes over it.
    pub(super) denied: Option<DeniedAgent>,
}

/// An agent that the server did not take any more.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct DeniedAgent {
    /// Its SPIFFE ID; empty where it was never told.
    #[serde(default)]
    pub(super) id: String,
    pub(super) reason: Denial,
}

/// What the source of trust is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BootstrapUse {
    /// Nothing is known of the server yet.
    Bootstrap,
    /// Its authorities are not those that were known.
    Rebootstrap,
}

impl BootstrapUse {
    /// As it stands in the file.
    fn number(self) -> i64 {
        match self {
            Self::Bootstrap => 1,
            Self::Rebootstrap => 2,
        }
    }

    /// As a source of trust is told it.
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Bootstrap => "bootstrap",
            Self::Rebootstrap => "rebootstrap",
        }
    }
}

impl AgentData {
    /// The source of trust is asked once more, at `now`: the first time of this use, or one more.
    pub(super) fn count_attempt(&mut self, asked_for: BootstrapUse, now: SystemTime) {
        let goes_on = self.bootstrap_use == asked_for.number() && self.bootstrap_start_time != NO_TIME;
        if !goes_on {
            self.bootstrap_use = asked_for.number();
            let now = OffsetDateTime::from(now).format(&Rfc3339);
            self.bootstrap_start_time = now.unwrap_or_else(|_year| NO_TIME.to_owned());
            self.connection_attempts = 0;
        }
        self.connection_attempts = self.connection_attempts.max(0).saturating_add(1);
    }
}

impl Default for AgentData {
    fn default() -> Self {
        Self {
            svid: Vec::new(),
            bundle: Vec::new(),
            reattestable: false,
            bootstrap_use: 0,
            bootstrap_start_time: NO_TIME.to_owned(),
            connection_attempts: 0,
            denied: None,
        }
    }
}

#[derive(Deserialize, Serialize)]
struct DataJson {
    #[serde(default)]
    svid: Option<Vec<String>>,
    #[serde(default)]
    bundle: Option<Vec<String>>,
    #[serde(default)]
    reattestable: bool,
    #[serde(default)]
    bootstrap_use: i64,
    #[serde(default = "no_time")]
    bootstrap_start_time: String,
    #[serde(default)]
    connection_attempts: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    durward_denied: Option<DeniedAgent>,
}

fn no_time() -> String {
    NO_TIME.to_owned()
}

/// The file, and what is in it. Only this writes it.
#[derive(Debug)]
pub(super) struct AgentDataFile {
    dir: FileDir,
    /// Held for an instant: who asks what is known does not wait for the disk.
    known: Mutex<KnownData>,
    /// Who writes.
    writing: Mutex<()>,
}

/// What is in the file, or should be.
#[derive(Debug)]
struct KnownData {
    data: AgentData,
    /// The file has it.
    is_written: bool,
}

impl AgentDataFile {
    /// Reads the file; that there is none is well.
    ///
    /// # Errors
    /// It cannot be read, is damaged (then it was put aside), or is of another trust domain.
    pub(super) fn open(
        dir: FileDir,
        trust_domain: &TrustDomain,
        on_damage: OnDamage,
    ) -> Result<Self, DataFault> {
        let known = read_kept(&dir, AGENT_DATA, on_damage, parse)?.unwrap_or_default();
        if let Some(found) = known.svid.first().and_then(|leaf| trust_domain_of(leaf))
            && found != trust_domain.name()
        {
            let want = trust_domain.name().to_owned();
            return Err(DataFault::TrustDomain { path: dir.path_of(AGENT_DATA), found, want });
        }
        let known = Mutex::new(KnownData { data: known, is_written: true });
        Ok(Self { dir, known, writing: Mutex::new(()) })
    }

    /// Where it is.
    pub(super) fn path(&self) -> PathBuf {
        self.dir.path_of(AGENT_DATA)
    }

    /// What is in it, or should be.
    pub(super) fn known(&self) -> AgentData {
        self.lock().data.clone()
    }

    /// Whether the disk has what is known.
    pub(super) fn is_written(&self) -> bool {
        self.lock().is_written
    }

    /// Leaves it to the next agent: it is not written any more. Waits for the disk.
    pub(super) fn let_go(&self) {
        self.dir.let_go();
    }

    /// Changes what is in it. Waits for the disk.
    ///
    /// # Errors
    /// It cannot be written: what was known is known still.
    pub(super) fn change(&self, change: impl FnOnce(&mut AgentData)) -> Result<(), DataFault> {
        let _writes = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, is_written) = {
            let known = self.lock();
            (known.data.clone(), known.is_written)
        };
        let mut next = before.clone();
        change(&mut next);
        if next != before || !is_written {
            self.dir.write(AGENT_DATA, &written(&next))?;
            *self.lock() = KnownData { data: next, is_written: true };
        }
        Ok(())
    }

    /// Changes what is known, whatever becomes of the disk: for what there is no other copy of. Waits for the disk.
    ///
    /// # Errors
    /// It cannot be written: it is known all the same, and [`AgentDataFile::is_written`] says so until a change is.
    pub(super) fn insist(&self, change: impl FnOnce(&mut AgentData)) -> Result<(), DataFault> {
        let _writes = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let next = {
            let mut known = self.lock();
            let before = known.data.clone();
            change(&mut known.data);
            if known.data == before && known.is_written {
                return Ok(());
            }
            known.is_written = false;
            known.data.clone()
        };
        self.dir.write(AGENT_DATA, &written(&next))?;
        let mut known = self.lock();
        // What was noted meanwhile is still to be written.
        known.is_written = known.data == next;
        Ok(())
    }

    /// Changes what is known, to be written with what is written next.
    pub(super) fn note(&self, change: impl FnOnce(&mut AgentData)) {
        let mut known = self.lock();
        change(&mut known.data);
        known.is_written = false;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, KnownData> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(text: &[u8]) -> Result<AgentData, &'static str> {
    let json: DataJson = object(text)?;
    Ok(AgentData {
        svid: certificates(json.svid)?,
        bundle: certificates(json.bundle)?,
        reattestable: json.reattestable,
        bootstrap_use: json.bootstrap_use,
        bootstrap_start_time: json.bootstrap_start_time,
        connection_attempts: json.connection_attempts,
        denied: json.durward_denied,
    })
}

fn certificates(list: Option<Vec<String>>) -> Result<Vec<Vec<u8>>, &'static str> {
    let list = list.unwrap_or_default();
    if list.len() > MOST_CERTIFICATES {
        return Err("it has too many certificates");
    }
    let certificate = |text: String| {
        let pem = STANDARD.decode(text).ok()?;
        let block = Pem::iter_from_buffer(&pem).next()?.ok()?;
        let is_one = block.label == "CERTIFICATE"
            && x509_parser::parse_x509_certificate(&block.contents).is_ok_and(|(rest, _)| rest.is_empty());
        is_one.then_some(block.contents)
    };
    list.into_iter()
        .map(certificate)
        .collect::<Option<_>>()
        .ok_or("it holds no certificate where one should be")
}

fn written(data: &AgentData) -> Vec<u8> {
    let list = |certificates: &[Vec<u8>]| {
        let encoded: Vec<String> = certificates.iter().map(|der| STANDARD.encode(pem(der))).collect();
        // As Go writes a list that was never made.
        (!encoded.is_empty()).then_some(encoded)
    };
    let json = DataJson {
        svid: list(&data.svid),
        bundle: list(&data.bundle),
        reattestable: data.reattestable,
        bootstrap_use: data.bootstrap_use,
        bootstrap_start_time: data.bootstrap_start_time.clone(),
        connection_attempts: data.connection_attempts,
        durward_denied: data.denied.clone(),
    };
    serde_json::to_vec(&json).expect("texts and numbers")
}

/// PEM, as Go writes it.
fn pem(der: &[u8]) -> String {
    let body = STANDARD.encode(der);
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, left) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = left;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

fn trust_domain_of(leaf: &[u8]) -> Option<String> {
    let id = super::tls::id_of(leaf)?;
    Some(id.trust_domain_name().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_spire_agent_writes_is_read_and_written_the_same() {
        let der = rcgen::generate_simple_self_signed(vec!["a".to_owned()]).unwrap().cert.der().to_vec();
        let one = STANDARD.encode(pem(&der));
        for text in [
            format!(
                "{{\"svid\":[\"{one}\"],\"bundle\":[\"{one}\",\"{one}\"],\"reattestable\":true,\"bootstrap_use\":2,\
                 \"bootstrap_start_time\":\"2026-11-27T01:02:03.123456789Z\",\"connection_attempts\":7}}"
            ),
            format!(
                "{{\"svid\":null,\"bundle\":[\"{one}\"],\"reattestable\":false,\"bootstrap_use\":0,\
                 \"bootstrap_start_time\":\"{NO_TIME}\",\"connection_attempts\":0,\
                 \"durward_denied\":{{\"id\":\"spiffe://td/spire/agent/a\",\"reason\":\"banned\"}}}}"
            ),
            format!(
                "{{\"svid\":null,\"bundle\":null,\"reattestable\":false,\"bootstrap_use\":0,\
                 \"bootstrap_start_time\":\"{NO_TIME}\",\"connection_attempts\":0}}"
            ),
        ] {
            assert_eq!(String::from_utf8(written(&parse(text.as_bytes()).unwrap())).unwrap(), text);
        }
    }

    #[test]
    fn each_time_that_trust_is_asked_for_counts() {
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let mut data = AgentData::default();
        for (asked_for, now, want) in [
            (BootstrapUse::Bootstrap, 0, (1, "1970-01-01T00:00:00Z", 1)),
            (BootstrapUse::Bootstrap, 60, (1, "1970-01-01T00:00:00Z", 2)),
            (BootstrapUse::Rebootstrap, 120, (2, "1970-01-01T00:02:00Z", 1)),
            (BootstrapUse::Rebootstrap, 180, (2, "1970-01-01T00:02:00Z", 2)),
        ] {
            data.count_attempt(asked_for, at(now));
            let got = (data.bootstrap_use, data.bootstrap_start_time.as_str(), data.connection_attempts);
            assert_eq!(got, want, "{now}");
        }
        data.connection_attempts = i64::MAX;
        data.count_attempt(BootstrapUse::Rebootstrap, at(240));
        assert_eq!(data.connection_attempts, i64::MAX);
        // As spire-agent leaves it when it has succeeded.
        let mut data = AgentData { bootstrap_use: 2, ..AgentData::default() };
        data.count_attempt(BootstrapUse::Rebootstrap, at(60));
        assert_eq!((&*data.bootstrap_start_time, data.connection_attempts), ("1970-01-01T00:01:00Z", 1));
    }

    #[test]
    fn what_is_damaged_is_not_read() {
        for text in
            ["", "{", "[]", "{\"svid\":[\"AAAA\"]}", "{\"bundle\":[\"LS0tLS1CRUdJTg==\"]}", "{\"svid\":7}"]
        {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        assert_eq!(parse(b"{}"), Ok(AgentData::default()));
    }
}
