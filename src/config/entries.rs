//! The blocks `entry`: who is who.
//!
//! An entry that could never match, or would not mean what it says, is refused: a selector that nobody attests, a
//! lifetime longer than the CA's, a federated trust domain without a bundle. Work grows with the entries, not with
//! their square.

use std::{
    collections::{BTreeSet, HashMap},
    fmt::Write as _,
    sync::Arc,
    time::Duration,
};

use aws_lc_rs::digest;

use super::{issuer::CaTtl, trust_domain};
use crate::{
    attest::AttestSettings,
    hcl::{
        problems::Problems,
        section::{At, Section},
        tree::{Place, quoted},
    },
    identity::{
        AskedSelectors, Entry, EntryAttributes, EntryId, Selector, Selectors, SpiffeId, TrustDomain,
        entry::MAX_HINT_LEN, name_constraints::DnsConstraints,
    },
    issuer::embedded::MIN_SVID_TTL,
};

/// More DNS names than this are refused, since each is in the certificate.
const MAX_DNS_NAMES: usize = 64;
/// As long as SPIRE's longest.
const MAX_ID_LEN: usize = 255;

/// What entries are held against.
#[derive(Debug)]
pub(super) struct EntryRules<'a> {
    /// `None` when it is wrong itself.
    pub(super) trust_domain: Option<&'a TrustDomain>,
    /// With a `federation` block, whether or not its bundle could be read.
    pub(super) federated: &'a BTreeSet<TrustDomain>,
    pub(super) ca_ttl: CaTtl,
    pub(super) attest: &'a AttestSettings,
    /// Of the CA that signs.
    pub(super) dns_constraints: DnsConstraints,
}

/// The entries read so far.
#[derive(Debug)]
pub(super) struct Entries<'a> {
    rules: EntryRules<'a>,
    problems: &'a Problems,
    list: Vec<(Entry, Place)>,
}

impl<'a> Entries<'a> {
    pub(super) fn new(rules: EntryRules<'a>, problems: &'a Problems) -> Self {
        Self { rules, problems, list: Vec::new() }
    }

    /// Reads the blocks of one file.
    pub(super) fn read(&mut self, blocks: Vec<Section<'_>>) {
        for block in blocks {
            let place = block.place();
            let created_at = i64::try_from(self.list.len()).unwrap_or(i64::MAX);
            if let Some(entry) = self.rules.entry(block, created_at) {
                self.list.push((entry, place));
            }
        }
    }

    /// Checks them against each other.
    pub(super) fn finish(self) -> Vec<Arc<Entry>> {
        let Self { problems, list, .. } = self;
        let mut of_whom: HashMap<(&SpiffeId, &AskedSelectors), Place> = HashMap::with_capacity(list.len());
        let mut ids: HashMap<&EntryId, Place> = HashMap::with_capacity(list.len());
        for (entry, place) in &list {
            let key = || format!("entry {}", quoted(entry.spiffe_id.as_str()));
            if let Some(first) = of_whom.insert((&entry.spiffe_id, &entry.selectors), *place)
                && !entry.selectors.is_empty()
            {
                let first = problems.show(first);
                let message = format!(
                    "repeats an entry with the same selectors, which is at {first}: remove one of them"
                );
                problems.add(*place, &key(), None, message);
            } else if let Some(first) = ids.insert(&entry.id, *place) {
                let message = format!("another entry has this id, at {}", problems.show(first));
                problems.add(*place, &format!("{}.id", key()), Some(quoted(entry.id.as_str())), message);
            }
        }
        drop((of_whom, ids));
        problems.note_blocks("entry", list.iter().map(|(_, place)| *place).collect());
        list.into_iter().map(|(entry, _)| Arc::new(entry)).collect()
    }
}

impl EntryRules<'_> {
    /// `None` when it has no SPIFFE ID; whatever else is wrong is reported, and the entry is never used.
    fn entry(&self, mut block: Section<'_>, created_at: i64) -> Option<Entry> {
        let s = &mut block;
        let spiffe_id = self.spiffe_id(s);
        let selectors = self.selectors(s);
        let x509_svid_ttl = self.ttl(s, "x509_svid_ttl");
        let jwt_svid_ttl = self.ttl(s, "jwt_svid_ttl");
        let hint = hint(s);
        let dns_names = self.dns_names(s);
        let federates_with = self.federates_with(s);
        let id = s.parsed(
            "id",
            |text| {
                let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
                let fits = (1..=MAX_ID_LEN).contains(&text.len()) && text.bytes().all(fits);
                fits.then(|| EntryId::new(text))
            },
            format_args!("must be 1 to {MAX_ID_LEN} letters, digits, dots, dashes or underscores"),
        );
        block.finish();
        let spiffe_id = spiffe_id?;
        let mut entry = Entry {
            id: EntryId::new(""),
            spiffe_id,
            selectors,
            x509_svid_ttl,
            jwt_svid_ttl,
            hint,
            dns_names,
            federates_with,
            created_at,
            revision: 0,
            attributes: EntryAttributes::default(),
        };
        entry.id = id.map_or_else(|| derived_id(&entry), |at| at.value);
        entry.revision = revision(&entry);
        Some(entry)
    }

    fn spiffe_id(&self, s: &Section<'_>) -> Option<SpiffeId> {
        let message = match (SpiffeId::parse_workload(s.label()), self.trust_domain) {
            (Err(err), Some(own)) => format!("{err}; {}", rightly(s.label(), own)),
            (Err(err), None) => format!("{err}; for example: \"spiffe://example.org/web\""),
            (Ok(id), Some(own)) if !id.is_member_of(own) => {
                format!("must be in the trust domain {own}, not in {}", id.trust_domain_name())
            }
            (Ok(id), _) if id.is_reserved() => {
                "the path /spire is kept for SPIRE's servers and agents".to_owned()
            }
            (Ok(id), _) => return Some(id),
        };
        s.wrong_block(message);
        None
    }

    fn selectors(&self, s: &mut Section<'_>) -> AskedSelectors {
        const KEY: &str = "selectors";
        let Some(list) = s.strings(KEY) else {
            s.missing(KEY, "must be configured: selectors = [\"unix:uid:1000\"]");
            return AskedSelectors::default();
        };
        if list.value.is_empty() {
            let message = "an entry without selectors matches nobody; selectors = [\"unix:uid:1000\"]";
            s.wrong(list.place, KEY, Some("[]".to_owned()), message);
        }
        let mut selectors = Selectors::new();
        for At { value: text, place } in list.value {
            let wrong = |message: String| s.wrong(place, KEY, Some(quoted(text)), message);
            match Selector::parse(text) {
                Err(err) => wrong(format!("{err}, such as unix:uid:1000")),
                Ok(selector) => {
                    if let Err(message) = self.attest.check(&selector) {
                        // Half of a selector of Unix is what people write first.
                        let of_unix = UNIX_KINDS.contains(&selector.kind());
                        wrong(if of_unix { format!("write \"unix:{text}\"") } else { message });
                    }
                    if !selectors.insert(selector) {
                        wrong("is listed twice: remove one".to_owned());
                    }
                }
            }
        }
        selectors.into_iter().collect()
    }

    fn ttl(&self, s: &mut Section<'_>, key: &'static str) -> Option<Duration> {
        let ttl = s.duration(key, MIN_SVID_TTL..=Duration::MAX)?;
        self.ca_ttl.bounds(s, key, ttl);
        Some(ttl.value)
    }

    fn federates_with(&self, s: &mut Section<'_>) -> BTreeSet<TrustDomain> {
        const KEY: &str = "federates_with";
        let mut found = BTreeSet::new();
        for At { value: text, place } in s.strings(KEY).map(|list| list.value).unwrap_or_default() {
            let wrong = |message: String| s.wrong(place, KEY, Some(quoted(text)), message);
            match trust_domain::parse(text) {
                Err(message) => wrong(format!("{message}; for example: spiffe://other.example")),
                Ok(name) if Some(&name) == self.trust_domain => {
                    wrong("is the agent's own trust domain, whose bundle everybody gets".to_owned());
                }
                Ok(name) if !self.federated.contains(&name) => {
                    wrong(format!(
                        "has no bundle: federation \"spiffe://{name}\" {{ bundle_path = \"..\" }} is missing"
                    ));
                }
                Ok(name) => {
                    if !found.insert(name) {
                        wrong("is listed twice: remove one".to_owned());
                    }
                }
            }
        }
        found
    }

    fn dns_names(&self, s: &mut Section<'_>) -> Vec<String> {
        const KEY: &str = "dns_names";
        let Some(list) = s.strings(KEY) else { return Vec::new() };
        if list.value.len() > MAX_DNS_NAMES {
            let message = format!("must be at most {MAX_DNS_NAMES} names, and are {}", list.value.len());
            s.wrong(list.place, KEY, Some("[ .. ]".to_owned()), message);
            return Vec::new();
        }
        let mut seen = BTreeSet::new();
        for At { value: name, place } in &list.value {
            if let Err(message) = check_dns_name(name) {
                s.wrong(*place, KEY, Some(quoted(name)), message);
            } else if !seen.insert(*name) {
                s.wrong(*place, KEY, Some(quoted(name)), "is listed twice: remove one");
            } else if let Err(found) = self.dns_constraints.permit(name) {
                let message = format!(
                    "does not fit the name constraint {found} in ca_cert_path, so that every verifier would refuse the SVID"
                );
                s.wrong(*place, KEY, Some(quoted(name)), message);
            }
        }
        list.value.iter().map(|name| name.value.to_owned()).collect()
    }
}

/// What an attestor of Unix finds, which are no attestors' names.
const UNIX_KINDS: [&str; 5] = ["uid", "user", "gid", "group", "supplementary_gid"];

/// How the ID is written that is meant by a path alone, or without its scheme.
fn rightly(label: &str, own: &TrustDomain) -> String {
    let path = label.strip_prefix(own.name()).filter(|path| path.starts_with('/')).unwrap_or(label);
    let meant = format!("{}/{}", own.id_string(), path.trim_start_matches('/'));
    match SpiffeId::parse_workload(&meant) {
        Ok(id) if !label.contains(':') => format!("write {}", quoted(id.as_str())),
        _ => "for example: \"spiffe://example.org/web\"".to_owned(),
    }
}

fn hint(s: &mut Section<'_>) -> Box<str> {
    let Some(hint) = s.string("hint") else { return Box::default() };
    if hint.value.len() > MAX_HINT_LEN {
        let message = format!("must have at most {MAX_HINT_LEN} bytes, and has {}", hint.value.len());
        s.wrong(hint.place, "hint", Some(quoted(hint.value)), message);
    }
    hint.value.into()
}

/// RFC 1123 section 2.1 in lower case, with `*` as a whole first label as SPIRE allows
/// (`pkg/common/x509util/dns.go`).
fn check_dns_name(name: &str) -> Result<(), &'static str> {
    let labels = name.strip_prefix("*.").unwrap_or(name);
    let fits = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-');
    if name.len() > 253 {
        return Err("a DNS name can have at most 253 characters");
    }
    for label in labels.split('.') {
        if label.is_empty() || label.len() > 63 {
            return Err("the parts of a DNS name have 1 to 63 characters");
        }
        if !label.bytes().all(fits) {
            return Err(
                "a DNS name is lower-case letters, digits and dashes between dots; * can only be all of its first part",
            );
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err("no part of a DNS name begins or ends with a dash");
        }
    }
    Ok(())
}

/// Feeds texts to a hash, each with its length, so that no two lists of texts are one.
struct Fingerprint(digest::Context);

impl Fingerprint {
    fn new() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.0.update(&u64::try_from(text.len()).unwrap_or(u64::MAX).to_be_bytes());
        self.0.update(text.as_bytes());
        self
    }

    fn texts<'t>(&mut self, texts: impl ExactSizeIterator<Item = &'t str>) -> &mut Self {
        self.0.update(&u64::try_from(texts.len()).unwrap_or(u64::MAX).to_be_bytes());
        for text in texts {
            self.text(text);
        }
        self
    }

    fn ttl(&mut self, ttl: Option<Duration>) -> &mut Self {
        self.0.update(&ttl.map_or(0, |ttl| ttl.as_nanos()).to_be_bytes());
        self
    }

    fn selectors(&mut self, selectors: &AskedSelectors) -> &mut Self {
        for selector in selectors {
            self.text(selector.kind()).text(selector.value());
        }
        self.text("")
    }

    fn finish(self) -> u64 {
        let hash = self.0.finish();
        hash.as_ref().iter().take(8).fold(0, |number, byte| (number << 8) | u64::from(*byte))
    }
}

/// The ID of an entry that has none: `/web#0123456789abcdef`, of its path and a hash over SPIFFE ID, selectors and
/// hint.
///
/// It stays the same over restarts and other entries' changes, and puts entries in the order of their paths. An `id`
/// that is set cannot look like it, since it has no slash.
fn derived_id(entry: &Entry) -> EntryId {
    let mut print = Fingerprint::new();
    print.text(entry.spiffe_id.as_str()).selectors(&entry.selectors).text(&entry.hint);
    let mut text = entry.spiffe_id.path().to_owned();
    // Writing to a string cannot fail.
    let _: Result<(), std::fmt::Error> = write!(text, "#{:016x}", print.finish());
    EntryId::new(&text)
}

/// A number for the whole entry but its place: another content, another number. It does not grow, as a server's
/// revision does; it must only differ.
fn revision(entry: &Entry) -> i64 {
    // Destructured without `..`: what is new must be part of it.
    let Entry {
        id,
        spiffe_id,
        selectors,
        x509_svid_ttl,
        jwt_svid_ttl,
        hint,
        dns_names,
        federates_with,
        created_at: _,
        revision: _,
        attributes: _,
    } = entry;
    let mut print = Fingerprint::new();
    print
        .text(id.as_str())
        .text(spiffe_id.as_str())
        .selectors(selectors)
        .ttl(*x509_svid_ttl)
        .ttl(*jwt_svid_ttl);
    print
        .text(hint)
        .texts(dns_names.iter().map(String::as_str))
        .texts(federates_with.iter().map(TrustDomain::name));
    (print.finish() >> 1).cast_signed()
}
