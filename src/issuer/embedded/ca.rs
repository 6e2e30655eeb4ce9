//! The CA and the JWT key of one node, in a directory of their own.
//!
//! It signs what it is told to: who may have which SVID was decided before. It trusts its data directory only after
//! seeing that nobody else can write there, and the clock not at all (see `rotation`).
//!
//! Invariants: an authority is on the disk and in the bundle before it signs; a private CA or JWT key leaves this
//! module only into the state file; nothing that still verifies an unexpired SVID leaves the bundle; an error leaves
//! everything as it was. Signing takes no lock and touches no file. Absent: a background task. The caller rotates
//! when [`Rotation::next`] says so.
//!
//! # Decisions
//! Settings take effect on what is made after them: another `ca_ttl` or key type at the next rotation. Only another
//! source of the CA (self-signed, or other supplied files) takes effect at once, since the admin who changes it no
//! longer wants the old one to sign; the old root stays in the bundle until what it signed is expired.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest::{Context, SHA256};

use super::{
    EmbeddedSettings, IssuerError, MIN_CA_TTL, SuppliedCaFault,
    disk::{self, DataDir},
    jwt::{self, JwtKey, JwtSigner},
    rotation::{self, Advanced, AuthoritySlot, Record, Term},
    state::{Authorities, Published},
    supplied::SuppliedCa,
    x509::{self, CaIssuer, X509Authority, X509Signer},
};
use crate::{
    identity::{
        Bundle, Entry, JwtSvid, KeyType, SpiffeId, TrustDomain, X509Svid,
        bundle::{Edition, JwtAuthority},
    },
    issuer::{
        CaStanding,
        keys::{self, KeyPair, SignatureForm},
        metrics::SvidKind,
    },
    os::trusted::Trust,
};

/// How long to wait after a rotation that failed before trying again.
pub const ROTATION_RETRY: Duration = Duration::from_secs(10);

/// The longest that others are told to wait before they look at the bundle again: the default of SPIFFE.
const LONGEST_REFRESH: Duration = Duration::from_secs(5 * 60);

/// The embedded CA. Any number of threads may sign at once; a signature with an RSA key, and a new RSA key even
/// more, belong on a thread that may block.
pub struct EmbeddedCa {
    settings: ArcSwap<EmbeddedSettings>,
    /// What signs and what verifies, as one: who loads it sees both from the same moment.
    signing: ArcSwap<Signing>,
    /// Held while rotating, and by nothing else.
    rotating: Mutex<Rotating>,
}

struct Signing {
    bundle: Arc<Bundle>,
    /// Which one it is.
    sequence: u64,
    x509: X509Signer,
    jwt: JwtSigner,
}

impl Signing {
    fn check_term(&self, kind: SvidKind, now: SystemTime) -> Result<(), IssuerError> {
        let (authority, term) = match kind {
            SvidKind::X509 => ("CA certificate", self.x509.term),
            SvidKind::Jwt => ("JWT key", self.jwt.term),
        };
        if term.holds(now) {
            return Ok(());
        }
        Err(IssuerError::NotValidNow {
            authority,
            not_before: term.not_before,
            not_after: term.not_after,
            now,
        })
    }
}

struct Rotating {
    data_dir: DataDir,
    /// As it is on the disk.
    state: Authorities,
    /// The bundle that the caller was last told of.
    reported: Arc<Bundle>,
}

/// What [`EmbeddedCa::rotate`] did.
#[derive(Debug)]
pub struct Rotation {
    /// Whether [`EmbeddedCa::bundle`] is another than after the last call that succeeded (or after opening).
    pub bundle_changed: bool,
    /// When to call again: always after the `now` of this call, and soon if there is a `fault`. If the clock may
    /// be set, or the machine suspended, look at it in between: a call with nothing to do costs microseconds.
    pub next: SystemTime,
    /// A part that could not be done, while the rest was: a next authority could not be made.
    pub fault: Option<IssuerError>,
}

impl EmbeddedCa {
    /// Opens the data directory, takes its lock, and makes what is missing or due, so that the issuer can sign.
    ///
    /// # Errors
    /// Whatever makes signing impossible or unsafe: the directory or a file in it is not the agent's alone, is
    /// locked by another agent, or cannot be read; the state is damaged or another trust domain's; the supplied CA
    /// cannot be used; a first state cannot be written. Nothing that was there is overwritten. A rotation that is
    /// due but fails, while what is there can sign, is no error: [`EmbeddedCa::rotate`] will tell.
    pub fn open(settings: EmbeddedSettings, now: SystemTime) -> Result<Self, IssuerError> {
        if settings.issuer.ca_ttl < MIN_CA_TTL {
            return Err(IssuerError::CaTtl { found: settings.issuer.ca_ttl });
        }
        let data_dir = DataDir::open(&settings.data_dir)?;
        let mut state = match data_dir.read()? {
            Some(text) => Authorities::parse(&text, &data_dir.state_path(), &settings.trust_domain)?,
            None => Authorities::default(),
        };
        dismiss_other_sources(&mut state, &settings, now)?;

        let on_disk = state.clone();
        let (x509, jwt) = advance(&mut state, &settings, now);
        let published = publish(&mut state, &settings.trust_domain, now);
        if !is_ready(&state, now) {
            let unknown = IssuerError::Crypto("use the keys that were just made");
            return Err(x509.fault.or(jwt.fault).unwrap_or(unknown));
        }
        if x509.changed || jwt.changed || published {
            let written = state.to_json(&settings.trust_domain).and_then(|text| Ok(data_dir.write(&text)?));
            match written {
                Ok(()) => {}
                Err(_) if is_ready(&on_disk, now) => state = on_disk,
                Err(err) => return Err(err),
            }
        }
        let signing = signing(&state, &settings.trust_domain, now)
            .ok_or(IssuerError::Crypto("use the keys that were just made"))?;
        let reported = Arc::clone(&signing.bundle);
        Ok(Self {
            settings: ArcSwap::from_pointee(settings),
            signing: ArcSwap::from_pointee(signing),
            rotating: Mutex::new(Rotating { data_dir, state, reported }),
        })
    }

    /// What verifies everything that this issuer signed and that is not expired. Cheap.
    pub fn bundle(&self) -> Arc<Bundle> {
        Arc::clone(&self.signing.load().bundle)
    }

    /// What signs, and what verifies it, as of one moment.
    pub fn standing(&self) -> CaStanding {
        let (settings, signing) = (self.settings.load(), self.signing.load());
        // The next authority is known for a third of a life before it signs: others look at least twice in that time.
        let hint = (settings.issuer.ca_ttl / 6).clamp(Duration::from_secs(1), LONGEST_REFRESH);
        let term = |term: Term| (term.issued_at, term.not_after);
        CaStanding {
            bundle: Arc::clone(&signing.bundle),
            edition: Edition { sequence: signing.sequence, refresh_hint: hint },
            x509: term(signing.x509.term),
            jwt: term(signing.jwt.term),
        }
    }

    #[cfg(test)]
    pub(super) fn settings(&self) -> EmbeddedSettings {
        EmbeddedSettings::clone(&self.settings.load())
    }

    /// Takes `settings` for what is made from this moment on. They must be of the same trust domain, directory and
    /// source of the CA.
    pub fn reconfigure(&self, settings: EmbeddedSettings) {
        self.settings.store(Arc::new(settings));
    }

    /// Whether an SVID takes RSA: about a millisecond of one core for a signature, up to a tenth of a second for a key.
    pub(super) fn takes_rsa(&self, kind: SvidKind) -> bool {
        let settings = self.settings.load();
        let types = match kind {
            SvidKind::X509 => [settings.issuer.ca_key_type, settings.svid_key_type],
            SvidKind::Jwt => [settings.issuer.jwt_key_type; 2],
        };
        types.contains(&KeyType::Rsa2048)
    }

    /// Whether what signs is valid at `now`; else a rotation helps.
    pub(super) fn can_sign(&self, kind: SvidKind, now: SystemTime) -> Result<(), IssuerError> {
        self.signing.load().check_term(kind, now)
    }

    /// Makes a key and an X.509-SVID of the entry. Its lifetime is the entry's or the default, and ends with the
    /// CA at the latest.
    ///
    /// # Errors
    /// The entry is of another trust domain, has no path, a lifetime under a second, or a DNS name that is not
    /// ASCII; or [`IssuerError::NotValidNow`], after which a rotation helps.
    pub fn mint_x509(&self, entry: &Entry, now: SystemTime) -> Result<X509Svid, IssuerError> {
        let (settings, signing) = (self.settings.load(), self.signing.load());
        check_id(&entry.spiffe_id, &settings.trust_domain)?;
        signing.check_term(SvidKind::X509, now)?;
        let ttl = entry.x509_svid_ttl.unwrap_or(settings.issuer.default_x509_svid_ttl);
        signing.x509.sign(&entry.spiffe_id, &entry.dns_names, ttl, settings.svid_key_type, now)
    }

    /// Signs a JWT-SVID for `audience`, of which empty texts are left out, in their order. `ttl` defaults to the
    /// setting; it ends with the key at the latest.
    ///
    /// # Errors
    /// No audience is left; the ID is of another trust domain or has no path; the lifetime is under a second; or
    /// [`IssuerError::NotValidNow`], after which a rotation helps.
    pub fn mint_jwt(
        &self,
        id: &SpiffeId,
        ttl: Option<Duration>,
        audience: &[String],
        now: SystemTime,
    ) -> Result<JwtSvid, IssuerError> {
        let (settings, signing) = (self.settings.load(), self.signing.load());
        check_id(id, &settings.trust_domain)?;
        signing.check_term(SvidKind::Jwt, now)?;
        let ttl = ttl.unwrap_or(settings.issuer.default_jwt_svid_ttl);
        signing.jwt.sign(id, ttl, audience, settings.issuer.jwt_issuer.as_deref(), now)
    }

    /// Does all that is due: prepares next authorities, puts them to use, retires and forgets old ones. Also mends
    /// what a long sleep or a clock that was set has left: an authority that is not valid now is replaced at once,
    /// by one that is kept if there is such a one.
    ///
    /// Blocks on the disk, and for a tenth of a second or more when an RSA key is made. Callers wait for each other.
    ///
    /// # Errors
    /// The new state could not be written. Everything is as before, in memory too; call again after
    /// [`ROTATION_RETRY`].
    pub fn rotate(&self, now: SystemTime) -> Result<Rotation, IssuerError> {
        // Nothing in there is changed by halves, so a panic of another thread left it whole.
        let mut rotating = self.rotating.lock().unwrap_or_else(PoisonError::into_inner);
        let settings = self.settings.load();
        let mut state = rotating.state.clone();
        let (x509, jwt) = advance(&mut state, &settings, now);
        let published = publish(&mut state, &settings.trust_domain, now);
        if x509.changed || jwt.changed || published {
            let text = state.to_json(&settings.trust_domain)?;
            rotating.data_dir.write(&text)?;
        }
        // Only now: what signs is on the disk.
        let bundle_is_old = *self.signing.load().bundle != bundle(&state, &settings.trust_domain, now);
        if x509.changed || jwt.changed || bundle_is_old {
            let signing = signing(&state, &settings.trust_domain, now)
                .ok_or(IssuerError::Crypto("use the keys that were just made"))?;
            self.signing.store(Arc::new(signing));
        }
        let fault = x509.fault.or(jwt.fault);
        let retry = fault.as_ref().and_then(|_| now.checked_add(ROTATION_RETRY));
        let due = [rotation::next_due(&state.x509, now), rotation::next_due(&state.jwt, now), retry];
        rotating.state = state;

        let bundle = self.bundle();
        let bundle_changed = *rotating.reported != *bundle;
        rotating.reported = bundle;
        let next = due.into_iter().flatten().min().unwrap_or(now + ROTATION_RETRY);
        Ok(Rotation { bundle_changed, next, fault })
    }

    /// Leaves the data directory to the next agent: no rotation writes to it any more. Waits for one that is under way.
    pub(super) fn let_go(&self) {
        self.rotating.lock().unwrap_or_else(PoisonError::into_inner).data_dir.let_go();
    }
}

/// Whether an agent of the user of `trust` could sign with what lies there for it: a CA that is supplied is tried out, and
/// a state is read. What is missing of a state is made. Writes nothing.
///
/// # Errors
/// [`IssuerError`], as [`EmbeddedCa::open`] would say.
pub fn try_sources(settings: &EmbeddedSettings, trust: Trust, now: SystemTime) -> Result<(), IssuerError> {
    if settings.issuer.supplied_ca().is_some() {
        make_ca(settings, trust, None, now)?;
    }
    if let Some(text) = disk::look_at_state(&settings.data_dir, trust)? {
        Authorities::parse(&text, &disk::state_in(&settings.data_dir), &settings.trust_domain)?;
    }
    Ok(())
}

impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// Takes the keys of CAs that do not come from where the settings say, so that they never sign again.
fn dismiss_other_sources(
    state: &mut Authorities,
    settings: &EmbeddedSettings,
    now: SystemTime,
) -> Result<(), IssuerError> {
    let chain = match settings.issuer.supplied_ca() {
        None => Vec::new(),
        Some((cert, key)) => SuppliedCa::load(cert, key, Trust::own(), &settings.trust_domain, now)?.chain,
    };
    for record in state.x509.iter_mut().filter(|record| record.public.above != chain) {
        record.key = None;
        if record.slot == AuthoritySlot::Next {
            record.slot = AuthoritySlot::Old;
        }
    }
    Ok(())
}

fn is_ready(state: &Authorities, now: SystemTime) -> bool {
    is_usable(&state.x509, now) && is_usable(&state.jwt, now)
}

fn is_usable<T>(records: &[Record<T>], now: SystemTime) -> bool {
    rotation::find(records, AuthoritySlot::Current).is_some_and(|(_, current)| current.is_usable(now))
}

fn check_id(id: &SpiffeId, trust_domain: &TrustDomain) -> Result<(), IssuerError> {
    if !id.is_member_of(trust_domain) {
        return Err(IssuerError::Foreign { id: id.clone(), trust_domain: trust_domain.clone() });
    }
    if id.path().is_empty() {
        return Err(IssuerError::NoPath(id.clone()));
    }
    Ok(())
}

fn advance(state: &mut Authorities, settings: &EmbeddedSettings, now: SystemTime) -> (Advanced, Advanced) {
    let x509 =
        rotation::advance(&mut state.x509, now, |outlive| make_ca(settings, Trust::own(), outlive, now));
    let jwt = rotation::advance(&mut state.jwt, now, |_| make_jwt_key(settings, now));
    (x509, jwt)
}

fn make_ca(
    settings: &EmbeddedSettings,
    trust: Trust,
    outlive: Option<SystemTime>,
    now: SystemTime,
) -> Result<Record<X509Authority>, IssuerError> {
    let out_of_time = IssuerError::Time { time: now };
    let key_type = settings.issuer.ca_key_type;
    let trust_domain = &settings.trust_domain;
    let key = KeyPair::generate(key_type, SignatureForm::Certificate)?;
    let (term, public) = match settings.issuer.supplied_ca() {
        None => {
            let term = Term::new(now, settings.issuer.ca_ttl, None).ok_or(out_of_time)?;
            let certificate = x509::ca_certificate(trust_domain, term, &key, CaIssuer::Itself)?;
            (term, X509Authority { certificate, above: Vec::new() })
        }
        Some((cert, key_path)) => {
            let supplied = SuppliedCa::load(cert, key_path, trust, trust_domain, now)?;
            let refuse = |fault| IssuerError::SuppliedCa { path: cert.to_owned(), fault };
            let not_after = supplied.not_after;
            if outlive.is_some_and(|outlive| not_after <= outlive) {
                return Err(refuse(SuppliedCaFault::Expiring { not_after }));
            }
            let term = Term::new(now, settings.issuer.ca_ttl, Some(not_after)).ok_or(out_of_time)?;
            let issuer = CaIssuer::Supplied(&supplied);
            let certificate = x509::ca_certificate(trust_domain, term, &key, issuer)?;
            let public = X509Authority { certificate, above: supplied.chain };
            if !supplied.limited {
                x509::try_out(&public, term, key_type, &key.pkcs8()?, trust_domain, now)?
                    .map_err(|err| refuse(SuppliedCaFault::Refused(err)))?;
            }
            (term, public)
        }
    };
    let key = Some(Arc::new(key.pkcs8()?));
    Ok(Record { slot: AuthoritySlot::Current, term, key_type, key, public: Arc::new(public) })
}

fn make_jwt_key(settings: &EmbeddedSettings, now: SystemTime) -> Result<Record<JwtKey>, IssuerError> {
    let key_type = settings.issuer.jwt_key_type;
    let term = Term::new(now, settings.issuer.ca_ttl, None).ok_or(IssuerError::Time { time: now })?;
    let key = KeyPair::generate(key_type, SignatureForm::Jws)?;
    let public = JwtKey { kid: jwt::random_kid()?, public_key: key.public_key().to_vec() };
    let key = Some(Arc::new(key.pkcs8()?));
    Ok(Record { slot: AuthoritySlot::Current, term, key_type, key, public: Arc::new(public) })
}

/// Gives the bundle of `now` a number of its own, if it is another than the one that was published last. Whether it is.
fn publish(state: &mut Authorities, trust_domain: &TrustDomain, now: SystemTime) -> bool {
    let bundle = bundle(state, trust_domain, now);
    let mut context = Context::new(&SHA256);
    let keys = bundle.jwks();
    for part in bundle.x509_authorities.iter().map(Vec::as_slice).chain([keys.as_bytes()]) {
        context.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(part);
    }
    let digest: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    if digest == state.published.digest {
        return false;
    }
    state.published = Published { sequence: state.published.sequence.saturating_add(1), digest };
    true
}

/// `None` when one of the two kinds has nothing that could sign, now or ever.
fn signing(state: &Authorities, trust_domain: &TrustDomain, now: SystemTime) -> Option<Signing> {
    let (_, ca) = rotation::find(&state.x509, AuthoritySlot::Current)?;
    let (_, jwt_key) = rotation::find(&state.jwt, AuthoritySlot::Current)?;
    Some(Signing {
        bundle: Arc::new(bundle(state, trust_domain, now)),
        sequence: state.published.sequence,
        x509: X509Signer::new(&ca.public, ca.term, ca.key_type, ca.key.as_ref()?)?,
        jwt: JwtSigner::new(&jwt_key.public, jwt_key.term, jwt_key.key_type, jwt_key.key.as_ref()?)?,
    })
}

/// The bundle at `now`: CAs in the order in which they were made, a root once; JWT keys by their ID.
fn bundle(state: &Authorities, trust_domain: &TrustDomain, now: SystemTime) -> Bundle {
    let mut x509_authorities: Vec<Vec<u8>> = Vec::with_capacity(state.x509.len());
    for record in state.x509.iter().filter(|record| record.is_published(now)) {
        let root = record.public.root();
        if !x509_authorities.iter().any(|known| known == root) {
            x509_authorities.push(root.to_vec());
        }
    }
    let mut jwt_authorities: Vec<_> = state
        .jwt
        .iter()
        .filter(|record| record.is_published(now))
        .filter_map(|record| {
            Some(JwtAuthority {
                kid: record.public.kid.as_str().into(),
                key: keys::jwk(record.key_type, &record.public.public_key)?,
                not_after: Some(record.term.not_after),
            })
        })
        .collect();
    jwt_authorities.sort_by(|one, other| one.kid.cmp(&other.kid));
    Bundle { trust_domain: trust_domain.clone(), x509_authorities, jwt_authorities }
}
