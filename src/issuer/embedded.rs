//! The embedded issuer: a CA of this node, and the entries and federated bundles of the configuration.
//!
//! An ECDSA signature takes some tens of microseconds and is made on the thread that asks; a hop to another thread
//! would cost as much. RSA takes up to a tenth of a second (a new key) and goes to the blocking pool, with a bound on
//! how many are under way.
//!
//! Its background work is rotation. What fails is tried again soon, said once when it begins and once when it ends, and
//! changes nothing meanwhile: the issuer signs with what it has.

mod ca;
mod disk;
mod error;
mod jwt;
mod repair;
mod rotation;
mod settings;
mod state;
mod supplied;
mod x509;

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
use tokio::{
    sync::{Semaphore, watch},
    time::Instant,
};

use self::repair::Repair;
pub use self::{
    ca::{EmbeddedCa, ROTATION_RETRY, Rotation, try_sources},
    disk::{STATE, is_in_use, is_new},
    error::{Damage, IssuerError, SuppliedCaFault},
    settings::{EmbeddedSettings, IssuerSettings, MIN_CA_TTL, MIN_SVID_TTL},
    supplied::dns_constraints,
};
use super::{
    CaStanding, Expelled, Issuer, IssuerChoice, IssuerInput, Lookout, MintError, SvidKind, World, by,
    metrics::IssuerMetrics,
};
use crate::{
    identity::{Bundle, Bundles, Entry, EntryIndex, JwtSvid, TrustDomain, X509Svid},
    os::clock::{Clock, sleep_to_beat, sleep_until},
    telemetry::chain,
};

/// How many RSA operations are under way at once; the others wait their turn, each in its own call.
const HEAVY_AT_ONCE: usize = 2;

/// The longest time between two looks at what is due for rotation.
const LOOK: Duration = Duration::from_secs(10);

/// The embedded CA as an [`Issuer`].
pub struct EmbeddedIssuer {
    ca: Arc<EmbeddedCa>,
    clock: Clock,
    metrics: Arc<IssuerMetrics>,
    world: watch::Sender<Arc<World>>,
    heavy: Arc<Semaphore>,
    repair: Repair,
    /// Written by whoever rotates.
    fault: Mutex<Option<(String, SystemTime)>>,
}

impl EmbeddedIssuer {
    /// Opens the CA; until [`EmbeddedIssuer::declare`] is called there are no entries.
    ///
    /// # Errors
    /// Those of [`EmbeddedCa::open`].
    pub fn open(
        settings: EmbeddedSettings,
        clock: Clock,
        metrics: Arc<IssuerMetrics>,
    ) -> Result<Self, IssuerError> {
        let ca = EmbeddedCa::open(settings, clock.now())?;
        let bundles = Bundles { own: ca.bundle(), federated: BTreeMap::new() };
        let world = World { index: Arc::default(), bundles, tainted: Arc::default() };
        Ok(Self {
            ca: Arc::new(ca),
            clock,
            metrics,
            world: watch::Sender::new(Arc::new(world)),
            heavy: Arc::new(Semaphore::new(HEAVY_AT_ONCE)),
            repair: Repair::default(),
            fault: Mutex::default(),
        })
    }

    /// Publishes what the configuration declares.
    pub fn declare(&self, index: Arc<EntryIndex>, federated: BTreeMap<TrustDomain, Arc<Bundle>>) {
        self.world.send_modify(|world| {
            let bundles = Bundles { own: Arc::clone(&world.bundles.own), federated };
            *world = Arc::new(World { index, bundles, tainted: Arc::default() });
        });
    }

    /// Waits until what signs is valid, where a rotation can make it so.
    async fn in_term(&self, kind: SvidKind, deadline: Instant) {
        if self.ca.can_sign(kind, self.clock.now()).is_err() {
            self.repair.tried(deadline).await;
        }
    }

    /// Mints on this thread.
    fn mint<T>(
        &self,
        kind: SvidKind,
        deadline: Instant,
        work: impl FnOnce(&EmbeddedCa, SystemTime) -> Result<T, IssuerError>,
    ) -> Result<T, MintError> {
        let started = Instant::now();
        let made = if started < deadline {
            work(&self.ca, self.clock.now()).map_err(MintError::from)
        } else {
            Err(MintError::Late)
        };
        self.count(kind, started, made)
    }

    /// Mints on the blocking pool. What has begun when the deadline comes is finished for nobody.
    async fn mint_heavy<T: Send + 'static>(
        &self,
        kind: SvidKind,
        deadline: Instant,
        work: impl FnOnce(&EmbeddedCa, SystemTime) -> Result<T, IssuerError> + Send + 'static,
    ) -> Result<T, MintError> {
        self.in_term(kind, deadline).await;
        let started = Instant::now();
        let made = by(deadline, async {
            // The semaphore is never closed.
            let permit = Arc::clone(&self.heavy).acquire_owned().await;
            let (ca, now) = (Arc::clone(&self.ca), self.clock.now());
            let working = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                work(&ca, now)
            });
            match working.await {
                Ok(made) => made.map_err(MintError::from),
                Err(panic) => Err(MintError::Issuer { retry_after: None, source: panic.into() }),
            }
        });
        let made = made.await;
        self.count(kind, started, made)
    }

    fn count<T>(&self, kind: SvidKind, started: Instant, made: Result<T, MintError>) -> Result<T, MintError> {
        match &made {
            Ok(_) => self.metrics.signed(kind, started.elapsed()),
            Err(_) => self.metrics.signing_failed(kind),
        }
        made
    }

    /// Rotates what is due; returns when to look again.
    async fn rotate(&self) -> SystemTime {
        let (ca, now) = (Arc::clone(&self.ca), self.clock.now());
        // It may write to the disk, and make an RSA key.
        let done = tokio::task::spawn_blocking(move || ca.rotate(now)).await;
        let (next, fault) = match done {
            Ok(Ok(rotation)) => {
                if rotation.bundle_changed {
                    self.metrics.rotation.rotated();
                    let own = self.ca.bundle();
                    self.world.send_modify(|world| {
                        let bundles = Bundles { own, federated: world.bundles.federated.clone() };
                        let (index, tainted) = (Arc::clone(&world.index), Arc::default());
                        *world = Arc::new(World { index, bundles, tainted });
                    });
                }
                (rotation.next, rotation.fault.map(|error| chain(&error)))
            }
            Ok(Err(error)) => (now + ROTATION_RETRY, Some(chain(&error))),
            Err(panic) => (now + ROTATION_RETRY, Some(chain(&panic))),
        };
        self.note(fault, now);
        next
    }

    /// Keeps what a rotation failed of for those who ask, and says once that it fails, and once that it does no more.
    fn note(&self, fault: Option<String>, now: SystemTime) {
        let mut kept = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        match (&fault, &*kept) {
            (Some(error), None) => tracing::error!(error, "the issuer cannot rotate its keys; trying again"),
            (None, Some(_)) => tracing::info!("the issuer rotates its keys again"),
            (Some(_), Some(_)) | (None, None) => {}
        }
        if fault.is_some() {
            self.metrics.rotation_failed();
        }
        let since = kept.as_ref().map_or(now, |(_, since)| *since);
        *kept = fault.map(|error| (error, since));
    }
}

impl Issuer for EmbeddedIssuer {
    fn world(&self) -> watch::Receiver<Arc<World>> {
        self.world.subscribe()
    }

    fn mint_x509<'a>(
        &'a self,
        entries: &'a [Arc<Entry>],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<X509Svid, MintError>>> {
        if self.ca.takes_rsa(SvidKind::X509) {
            // One of them waits at a time, so that calls, which take turns with it, do not wait behind a whole batch.
            let made = stream::iter(entries).map(move |entry| {
                let entry = Arc::clone(entry);
                self.mint_heavy(SvidKind::X509, deadline, move |ca, now| ca.mint_x509(&entry, now))
            });
            return Box::pin(made.buffered(1).collect());
        }
        Box::pin(async move {
            self.in_term(SvidKind::X509, deadline).await;
            let mut made = Vec::with_capacity(entries.len());
            for entry in entries {
                if !made.is_empty() {
                    // Others want this thread too.
                    tokio::task::yield_now().await;
                }
                made.push(self.mint(SvidKind::X509, deadline, |ca, now| ca.mint_x509(entry, now)));
            }
            made
        })
    }

    fn mint_jwt<'a>(
        &'a self,
        entry: &'a Arc<Entry>,
        audience: &'a [String],
        _family: u64,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<JwtSvid, MintError>> {
        if self.ca.takes_rsa(SvidKind::Jwt) {
            let (entry, audience) = (Arc::clone(entry), audience.to_vec());
            return Box::pin(self.mint_heavy(SvidKind::Jwt, deadline, move |ca, now| {
                ca.mint_jwt(&entry.spiffe_id, entry.jwt_svid_ttl, &audience, now)
            }));
        }
        Box::pin(async move {
            self.in_term(SvidKind::Jwt, deadline).await;
            self.mint(SvidKind::Jwt, deadline, |ca, now| {
                ca.mint_jwt(&entry.spiffe_id, entry.jwt_svid_ttl, audience, now)
            })
        })
    }

    fn can_sign(&self, kind: SvidKind) -> Result<(), MintError> {
        self.ca.can_sign(kind, self.clock.now()).map_err(MintError::from)
    }

    fn ca(&self) -> Option<CaStanding> {
        Some(self.ca.standing())
    }

    fn rotation_fault(&self) -> Option<(String, SystemTime)> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn look_out(&self) -> Option<Lookout> {
        None
    }

    fn makes_ahead(&self) -> bool {
        false
    }

    fn reload(&self, told: IssuerInput) {
        let IssuerInput { choice, index, federated } = told;
        // Another issuer is for a restart alone.
        let IssuerChoice::Embedded(settings) = choice else { return };
        self.ca.reconfigure(settings);
        self.declare(index, federated);
    }

    fn let_go(&self) {
        self.ca.let_go();
    }

    fn run(self: Arc<Self>) -> BoxFuture<'static, Expelled> {
        Box::pin(async move {
            loop {
                let began = Instant::now();
                let next = self.rotate().await;
                self.metrics.rotation.set_due(Some(next));
                self.repair.pause(began).await;
                tokio::select! {
                    () = sleep_until(self.clock, next) => {}
                    // Looked at again every ten seconds whatever is due, and not by the clock: only so is it seen that
                    // that one was set back, after which the issuer cannot sign until it has rotated. With nothing due,
                    // a look costs microseconds.
                    () = sleep_to_beat(LOOK) => {}
                    () = self.repair.needed() => {}
                }
            }
        })
    }
}

impl fmt::Debug for EmbeddedIssuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedIssuer").field("ca", &self.ca).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::{AskedSelectors, EntryAttributes, EntryId, KeyType, SpiffeId},
        issuer::FileFault,
        telemetry::metrics::Metrics,
    };

    fn entry(path: &str, dns_name: &str) -> Arc<Entry> {
        Arc::new(Entry {
            id: EntryId::new(path),
            spiffe_id: SpiffeId::parse(&format!("spiffe://td{path}")).unwrap(),
            selectors: AskedSelectors::default(),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            hint: "".into(),
            dns_names: vec![dns_name.to_owned()],
            federates_with: Default::default(),
            created_at: 0,
            revision: 0,
            attributes: EntryAttributes::default(),
        })
    }

    fn issuer(key_type: KeyType) -> (tempfile::TempDir, EmbeddedIssuer) {
        let dir = tempfile::tempdir().unwrap();
        let settings = EmbeddedSettings {
            trust_domain: TrustDomain::parse("td").unwrap(),
            data_dir: dir.path().join("data"),
            svid_key_type: key_type,
            issuer: IssuerSettings { jwt_key_type: key_type, ..IssuerSettings::default() },
        };
        let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let metrics = Arc::new(IssuerMetrics::new(Metrics::default().registry()));
        (dir, EmbeddedIssuer::open(settings, clock, metrics).unwrap())
    }

    /// It signs to the end, while the next one has the directory.
    #[tokio::test]
    async fn one_that_has_let_go_writes_nothing() {
        let (dir, issuer) = issuer(KeyType::EcP256);
        let settings = issuer.ca.settings();
        let now = issuer.clock.now();
        assert!(matches!(
            EmbeddedCa::open(settings.clone(), now),
            Err(IssuerError::File(FileFault::Locked { .. }))
        ));
        issuer.let_go();
        let next = EmbeddedCa::open(settings, now).unwrap();
        let kept = || std::fs::read(dir.path().join("data/issuer.json")).unwrap();
        let before = kept();
        let late = now + Duration::from_secs(400 * 86_400);
        assert!(matches!(issuer.ca.rotate(late), Err(IssuerError::File(FileFault::Locked { .. }))));
        assert_eq!(kept(), before);
        let made = issuer.mint_x509(&[entry("/a", "a")], crate::issuer::deadline()).await;
        assert!(made[0].is_ok(), "{made:?}");
        next.rotate(late).unwrap();
        assert_ne!(kept(), before);
    }

    #[tokio::test]
    async fn one_bad_entry_spoils_no_batch() {
        for key_type in [KeyType::EcP256, KeyType::Rsa2048] {
            let (_dir, issuer) = issuer(key_type);
            let batch = [entry("/a", "a"), entry("/b", "b\u{e9}"), entry("", "c"), entry("/d", "d")];
            let made = issuer.mint_x509(&batch, crate::issuer::deadline()).await;
            let told: Vec<_> = made
                .iter()
                .map(|made| made.as_ref().map(|svid| svid.spiffe_id.as_str()).map_err(ToString::to_string))
                .collect();
            assert_eq!(
                told,
                [
                    Ok("spiffe://td/a"),
                    Err("a DNS name of the entry cannot be written in a certificate".to_owned()),
                    Err("the SPIFFE ID names no workload".to_owned()),
                    Ok("spiffe://td/d"),
                ],
                "{key_type:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_blocking_pool_is_told_at_the_deadline() {
        let (_dir, issuer) = issuer(KeyType::Rsa2048);
        let busy = issuer.heavy.acquire_many(2).await.unwrap();
        let started = Instant::now();
        let deadline = started + Duration::from_secs(7);
        let web = entry("/web", "web");
        let audience = ["a".to_owned()];
        let batch = [Arc::clone(&web), Arc::clone(&web)];
        let (svids, token) =
            tokio::join!(issuer.mint_x509(&batch, deadline), issuer.mint_jwt(&web, &audience, 0, deadline),);
        assert!(matches!(svids[..], [Err(MintError::Late), Err(MintError::Late)]), "{svids:?}");
        assert!(matches!(token, Err(MintError::Late)), "{token:?}");
        assert_eq!(started.elapsed().as_secs(), 7);
        drop(busy);
        assert!(issuer.mint_jwt(&web, &audience, 0, deadline).await.is_err());
        let later = crate::issuer::deadline();
        issuer.mint_jwt(&web, &audience, 0, later).await.unwrap();
    }

    #[tokio::test]
    async fn a_batch_lets_calls_pass() {
        let (_dir, issuer) = issuer(KeyType::Rsa2048);
        let batch: Vec<_> = (0..20).map(|n| entry(&format!("/{n}"), "a")).collect();
        let (web, audience) = (entry("/web", "web"), ["a".to_owned()]);
        let deadline = crate::issuer::deadline();
        tokio::select! {
            biased;
            _ = issuer.mint_x509(&batch, deadline) => panic!("the call came last"),
            token = issuer.mint_jwt(&web, &audience, 0, deadline) => drop(token.unwrap()),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn readiness_is_told_without_a_signature() {
        let (_dir, issuer) = issuer(KeyType::EcP256);
        let both = [(SvidKind::X509, "CA certificate"), (SvidKind::Jwt, "JWT key")];
        for (kind, _) in both {
            issuer.can_sign(kind).unwrap();
        }
        tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
        for (kind, what) in both {
            let error = issuer.can_sign(kind).unwrap_err();
            assert_eq!(error.to_string(), "the issuer cannot sign");
            let told = chain(&error);
            assert!(
                told.starts_with(&format!("the issuer cannot sign: the {what} is valid from ")),
                "{told}"
            );
        }
        issuer.rotate().await;
        for (kind, _) in both {
            issuer.can_sign(kind).unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_declared_stays_over_a_rotation() {
        let (_dir, issuer) = issuer(KeyType::EcP256);
        let mut world = issuer.world();
        let index = Arc::new(EntryIndex::new([entry("/web", "web")]));
        issuer.declare(Arc::clone(&index), BTreeMap::new());
        assert!(world.has_changed().unwrap());
        assert_eq!(world.borrow_and_update().bundles.own.x509_authorities.len(), 1);
        tokio::time::sleep(Duration::from_secs(13 * 3600)).await;
        issuer.rotate().await;
        assert!(world.has_changed().unwrap());
        let world = world.borrow_and_update();
        assert_eq!(world.bundles.own.x509_authorities.len(), 2);
        // Who federates with it sees that it is another bundle, and the number goes on after a restart.
        let standing = issuer.ca().unwrap();
        assert_eq!(standing.edition.sequence, 2);
        assert_eq!(standing.bundle, world.bundles.own);
        issuer.rotate().await;
        assert_eq!(issuer.ca().unwrap().edition.sequence, 2, "nothing has changed");
        let settings = issuer.ca.settings();
        let (clock, metrics) = (issuer.clock, Arc::clone(&issuer.metrics));
        drop(issuer);
        let again = EmbeddedIssuer::open(settings, clock, metrics).unwrap();
        assert_eq!(again.ca().unwrap().edition.sequence, 2);
        assert!(Arc::ptr_eq(&world.index, &index));
    }
}
