//! What can go wrong when signing, rotating, or keeping state.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use super::MIN_CA_TTL;
use crate::{
    identity::{SpiffeId, TrustDomain, pem::LostBlock},
    issuer::{FileFault, MintError, keys::KeyFault},
};

/// Why the embedded issuer could not do something. No variant holds a key or a token.
#[derive(Debug, thiserror::Error)]
pub enum IssuerError {
    /// A file or directory cannot be used.
    #[error(transparent)]
    File(#[from] FileFault),
    /// The state file cannot be understood. It is left as it is.
    #[error("{} is damaged: {damage}; restore it from a backup, or move it away to start with new keys", path.display())]
    Damaged { path: PathBuf, damage: Damage },
    /// The state file is of another version of the agent.
    #[error("{} has version {found}, but this agent knows only version {known}", path.display())]
    Version { path: PathBuf, found: u64, known: u64 },
    /// The state file is of another trust domain.
    #[error("{} holds the keys of trust domain {found:?}, but the agent is configured for {want:?}: correct trust_domain, or choose another data_dir", path.display())]
    TrustDomain { path: PathBuf, found: String, want: TrustDomain },
    /// The CA that the admin supplied cannot be used.
    #[error("supplied CA {}: {fault}", path.display())]
    SuppliedCa { path: PathBuf, fault: SuppliedCaFault },
    /// A CA that would expire before anybody had learnt of it.
    #[error("ca_ttl is {} s, but must be at least {} s", found.as_secs(), MIN_CA_TTL.as_secs())]
    CaTtl { found: Duration },
    /// An SVID for another trust domain was asked for.
    #[error("{id} is not in trust domain {trust_domain}")]
    Foreign { id: SpiffeId, trust_domain: TrustDomain },
    /// An SVID for a trust domain itself was asked for.
    #[error("{0} has no path, so it names no workload")]
    NoPath(SpiffeId),
    /// A DNS name that a certificate cannot hold.
    #[error("DNS name {0:?} cannot be written in a certificate")]
    DnsName(String),
    /// A DNS name that a name constraint of a CA keeps out.
    #[error("DNS name {name:?} does not fit the name constraint {found}")]
    DnsNotPermitted { name: String, found: String },
    /// No audience, or only empty ones.
    #[error("audience must name at least one recipient")]
    NoAudience,
    /// An SVID that would be expired when it is made.
    #[error("an SVID for {id} with a lifetime of {} s would be expired at once", ttl.as_secs())]
    Lifetime { id: SpiffeId, ttl: Duration },
    /// The authority that should sign is not valid now: a rotation is due (the agent was suspended, or the clock
    /// was set). [`rotate`](super::EmbeddedCa::rotate) mends it.
    #[error("the {authority} is valid from {} to {}, and it is {} now: a rotation is due", Utc(*not_before), Utc(*not_after), Utc(*now))]
    NotValidNow {
        /// `CA certificate` or `JWT key`.
        authority: &'static str,
        not_before: SystemTime,
        not_after: SystemTime,
        now: SystemTime,
    },
    /// So many authorities are unexpired that no more can be kept: the clock was set very often.
    #[error("{0} authorities are kept already and none of them has expired: check the clock")]
    TooManyAuthorities(usize),
    /// The clock, or a lifetime added to it, gives a time before 1970 or after 9999.
    #[error("{} cannot be written in a certificate: check the clock, and that no lifetime is too long", Utc(*time))]
    Time { time: SystemTime },
    /// The cryptographic library refused.
    #[error("cannot {0}")]
    Crypto(&'static str),
    /// The same, of a key.
    #[error(transparent)]
    Key(#[from] KeyFault),
    /// A certificate could not be built.
    #[error("cannot build a certificate: {0}")]
    Certificate(rcgen::Error),
}

impl From<IssuerError> for MintError {
    fn from(error: IssuerError) -> Self {
        use IssuerError as E;
        let reason = match &error {
            E::Foreign { .. } => "the SPIFFE ID is of another trust domain",
            E::NoPath(_) => "the SPIFFE ID names no workload",
            E::DnsName(_) => "a DNS name of the entry cannot be written in a certificate",
            E::DnsNotPermitted { .. } => {
                "a DNS name of the entry does not fit the name constraints of the CA"
            }
            E::NoAudience => "the audience is empty",
            E::Lifetime { .. } => "the lifetime is under a second",
            // Files, clock, library: none of it was chosen by who asks.
            _ => return Self::Issuer { retry_after: None, source: error.into() },
        };
        Self::Request { reason, source: error.into() }
    }
}

/// How a state file is damaged. Says where, never what: the text holds keys. `kind` is `x509` or `jwt`; lines and
/// columns count from 1, authorities from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Not JSON, or not the members expected.
    #[error("not the JSON expected at line {line}, column {column}")]
    Json { line: usize, column: usize },
    /// A member holds what it should not.
    #[error("{member} of {kind} authority {index} is not what was written")]
    Member { kind: &'static str, index: usize, member: &'static str },
    /// Two authorities claim the same place.
    #[error("two {kind} authorities are marked {slot}")]
    Slots { kind: &'static str, slot: &'static str },
    /// More authorities than are ever kept.
    #[error("more than {most} {kind} authorities")]
    TooMany { kind: &'static str, most: usize },
}

/// Why a CA that the admin supplied cannot be used. `index` tells which certificate of the file, from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SuppliedCaFault {
    /// A PEM block that readers pass over.
    #[error(transparent)]
    LostBlock(LostBlock),
    /// The file has no certificate, or something that is none.
    #[error("no PEM certificates could be read from it")]
    NoCertificate,
    /// The file has no private key, or one of another kind.
    #[error(
        "no private key could be read from it: it must hold one unencrypted EC P-256, EC P-384 or RSA key in PEM"
    )]
    NoKey,
    /// More certificates than a chain has.
    #[error("it holds {found} certificates, more than the {most} that a chain may have")]
    TooLong { found: usize, most: usize },
    /// A certificate that is not DER or not X.509.
    #[error("certificate {index} is malformed")]
    Malformed { index: usize },
    /// The key is not the first certificate's.
    #[error("the private key does not belong to its first certificate, which must be the CA that signs")]
    KeyMismatch,
    /// Not a CA certificate.
    #[error("certificate {index} ({subject}) is not a CA: basicConstraints must say CA:TRUE")]
    NotCa { index: usize, subject: String },
    /// A CA that may not sign certificates.
    #[error("certificate {index} ({subject}) may not sign certificates: its keyUsage lacks keyCertSign")]
    MayNotSign { index: usize, subject: String },
    /// A CA that does not say whether it may sign certificates.
    #[error(
        "certificate {index} ({subject}) has no keyUsage, so verifiers refuse it: it must have keyCertSign"
    )]
    NoUsage { index: usize, subject: String },
    /// A CA that allows too few CAs below it.
    #[error(
        "certificate {index} ({subject}) allows {allowed} CAs below it, but {needed} are needed: the agent makes an intermediate of its own"
    )]
    PathLength { index: usize, subject: String, allowed: u32, needed: u32 },
    /// Not valid at the moment.
    #[error("certificate {index} ({subject}) is valid from {} to {}, and it is {} now", Utc(*not_before), Utc(*not_after), Utc(*now))]
    NotValidNow {
        index: usize,
        subject: String,
        not_before: SystemTime,
        not_after: SystemTime,
        now: SystemTime,
    },
    /// The chain ends too soon to make a next intermediate that lives longer than the current one.
    #[error("its chain expires at {}, as does the intermediate in use: supply a renewed CA", Utc(*not_after))]
    Expiring { not_after: SystemTime },
    /// A CA of another trust domain.
    #[error("certificate {index} ({subject}) has URI name {found:?}, but {want:?} is configured")]
    ForeignTrustDomain { index: usize, subject: String, found: String, want: String },
    /// A CA for servers or for clients alone.
    #[error(
        "certificate {index} ({subject}) is for one side of a connection alone: its extendedKeyUsage must name serverAuth and clientAuth, or be left out, for a workload is both"
    )]
    OneSide { index: usize, subject: String },
    /// A name constraint that keeps the SPIFFE IDs out, or that not all verifiers know.
    #[error(
        "certificate {index} ({subject}) has the name constraint {found}, which not every verifier lets spiffe://{want}/.. pass: permit the URI {want}, without spiffe://"
    )]
    NotPermitted { index: usize, subject: String, found: String, want: TrustDomain },
    /// A critical extension that verifiers do not know.
    #[error("certificate {index} ({subject}) has the critical extension {oid}, which verifiers do not know")]
    Extension { index: usize, subject: String, oid: String },
    /// A certificate that wants policies in those below it.
    #[error(
        "certificate {index} ({subject}) requires an explicit policy of what is below it, and SVIDs have none: leave policyConstraints out"
    )]
    Policy { index: usize, subject: String },
    /// The name of its issuer is right, and the key is another.
    #[error(
        "certificate {index} ({subject}) was not signed by the key of {above}, which issued it by its name"
    )]
    Signature { index: usize, subject: String, above: String },
    /// A certificate is not followed by the one that issued it.
    #[error(
        "certificate {index} was issued by {issuer}, but is followed by {next}: order them from the CA that signs up to the root"
    )]
    Order { index: usize, issuer: String, next: String },
    /// The chain does not end in a root.
    #[error(
        "its last certificate ({subject}) was issued by {issuer}: append the chain up to the self-signed root, which becomes the bundle"
    )]
    NoRoot { subject: String, issuer: String },
    /// A verifier would refuse what the CA signs.
    #[error("a verifier would refuse its SVIDs: {0}")]
    Refused(webpki::Error),
}

/// Formats a time as people write it.
struct Utc(SystemTime);

impl std::fmt::Display for Utc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (sign, seconds) = match self.0.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => (1, since.as_secs()),
            Err(before) => (-1, before.duration().as_secs()),
        };
        let moment = i64::try_from(seconds)
            .ok()
            .and_then(|seconds| time::OffsetDateTime::from_unix_timestamp(sign * seconds).ok());
        match moment.map(|moment| moment.format(&time::format_description::well_known::Rfc3339)) {
            Some(Ok(text)) => f.write_str(&text),
            _ => write!(f, "second {} of 1970", i128::from(sign) * i128::from(seconds)),
        }
    }
}
