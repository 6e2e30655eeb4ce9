//! Rotation and renewal over days, with time that is moved: what is served is always valid, verifies against the bundle
//! of the moment, and is renewed before it expires, also when the disk says no.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use durward::{
    attest::{AttestSettings, Attestor},
    identity::{
        Bundle, Bundles, Entry, EntryAttributes, EntryId, EntryIndex, JwtSvid, KeyType, Selector, Selectors,
        SpiffeId, TrustDomain, X509Svid, jwt,
    },
    issuer::{
        Expelled, Issuer, IssuerInput, Lookout, MintError, SvidKind, World as Published,
        embedded::{EmbeddedIssuer, EmbeddedSettings, IssuerSettings, MIN_CA_TTL},
        metrics::IssuerMetrics,
    },
    limits::{CallerKey, Limits, Method, report::Standing},
    os::clock::Clock,
    peer::{OsUid, Peer},
    store::{Charged, JwtCache, Policy, Purpose, StoreMetrics, Writer, X509Cache, authorize},
    telemetry::metrics::Metrics,
};
use futures_util::future::{BoxFuture, join_all};
use proptest::prelude::*;
use tokio::{sync::watch, time::Instant};

const HOUR: Duration = Duration::from_secs(3600);

struct World {
    _dir: tempfile::TempDir,
    clock: Clock,
    writer: Arc<Writer>,
    x509: Arc<X509Cache>,
    jwt: Arc<JwtCache>,
}

fn selectors() -> Selectors {
    // Those of this process, which is the caller.
    [Selector::parse(&format!("unix:uid:{}", nix::unistd::geteuid())).unwrap()].into()
}

fn entry(name: &str) -> Arc<Entry> {
    Arc::new(Entry {
        id: EntryId::new(name),
        spiffe_id: SpiffeId::parse(&format!("spiffe://td/{name}")).unwrap(),
        selectors: selectors().into_iter().collect(),
        x509_svid_ttl: Some(HOUR),
        jwt_svid_ttl: None,
        hint: "".into(),
        dns_names: Vec::new(),
        federates_with: BTreeSet::new(),
        created_at: 0,
        revision: 0,
        attributes: EntryAttributes::default(),
    })
}

fn settings(dir: &Path) -> EmbeddedSettings {
    EmbeddedSettings {
        trust_domain: TrustDomain::parse("td").unwrap(),
        data_dir: dir.join("data"),
        svid_key_type: KeyType::EcP256,
        issuer: IssuerSettings::default(),
    }
}

fn born() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn index(names: &[&str]) -> Arc<EntryIndex> {
    Arc::new(EntryIndex::new(names.iter().map(|name| entry(name))))
}

impl World {
    fn new(names: &[&str], jwt_max: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        Self::signed_by(settings, dir, index(names), jwt_max)
    }

    fn signed_by(
        settings: EmbeddedSettings,
        dir: tempfile::TempDir,
        index: Arc<EntryIndex>,
        jwt_max: usize,
    ) -> Self {
        let clock = Clock::starting_at(born());
        let counted = Arc::new(IssuerMetrics::new(Metrics::default().registry()));
        let issuer = Arc::new(EmbeddedIssuer::open(settings, clock, counted).unwrap());
        issuer.declare(index, BTreeMap::new());
        tokio::spawn(Arc::<EmbeddedIssuer>::clone(&issuer).run());
        Self::of(dir, clock, issuer, jwt_max)
    }

    fn of(dir: tempfile::TempDir, clock: Clock, issuer: Arc<dyn Issuer>, jwt_max: usize) -> Self {
        let metrics = Arc::new(StoreMetrics::new(Metrics::default().registry()));
        let x509 = Arc::new(X509Cache::new(Arc::clone(&issuer), clock, 10, None));
        let jwt = Arc::new(JwtCache::new(Arc::clone(&issuer), clock, Arc::clone(&metrics), jwt_max));
        let attestor = Arc::new(Attestor::new(AttestSettings::default()));
        let writer = Writer::new(issuer, attestor, clock, Arc::clone(&x509), metrics, Policy::default());
        let writer = Arc::new(writer);
        Self { _dir: dir, clock, writer, x509, jwt }
    }

    /// A call by this process for one of the entries, on its whole way.
    async fn charged(&self, name: &str) -> Charged {
        self.call(Some(&SpiffeId::parse(&format!("spiffe://td/{name}")).unwrap())).await
    }

    /// A call by this process, on its whole way.
    async fn call(&self, wanted: Option<&SpiffeId>) -> Charged {
        self.call_under(&Limits::default(), wanted).await
    }

    async fn call_under(&self, limits: &Limits, wanted: Option<&SpiffeId>) -> Charged {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let peer = Arc::new(Peer::from_stream(&theirs, &OsUid).unwrap());
        let admitted = limits.admit_caller(peer, Method::FetchJwtSvid).unwrap();
        let snapshot = self.writer.store().snapshot();
        let attestor = Attestor::new(AttestSettings::default());
        let attested = attestor.attest(admitted, &snapshot.questions).await.unwrap();
        authorize(&snapshot, attested, Purpose::Svids, wanted).unwrap().charge(limits).await.unwrap()
    }

    async fn x509(&self, call: &mut Charged) -> Arc<X509Svid> {
        Arc::clone(&self.x509.fetch(call).await.unwrap()[0].svid)
    }

    async fn jwt(&self, call: &mut Charged, audience: &str) -> Arc<JwtSvid> {
        Arc::clone(&self.jwt.fetch(call, &[audience.to_owned()]).await.unwrap()[0])
    }

    fn bundle(&self) -> Arc<Bundle> {
        Arc::clone(&self.writer.store().snapshot().bundles.own)
    }

    fn assert_verifies(&self, chain: &[Arc<[u8]>]) {
        use rustls_pki_types::{CertificateDer, UnixTime};
        let bundle = self.bundle();
        let roots: Vec<CertificateDer<'_>> =
            bundle.x509_authorities.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let anchors: Vec<_> =
            roots.iter().map(|root| webpki::anchor_from_trusted_cert(root).unwrap()).collect();
        let leaf = CertificateDer::from(&*chain[0]);
        let now = self.clock.now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        webpki::EndEntityCert::try_from(&leaf)
            .unwrap()
            .verify_for_usage(
                webpki::ALL_VERIFICATION_ALGS,
                &anchors,
                &[],
                UnixTime::since_unix_epoch(now),
                webpki::KeyUsage::client_auth(),
                None,
                None,
            )
            .unwrap();
    }
}

/// Seven days in steps of some minutes: at each, what a stream holds and what a caller is given is valid and verifies.
#[tokio::test(start_paused = true)]
async fn a_week_of_rotation_serves_only_what_is_valid() {
    let world = World::new(&["web"], 100);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let web = &mut world.charged("web").await;
    let mut changes = world.writer.store().subscribe();
    let first = world.x509(web).await;
    let hold = world.x509.hold(web);
    let (mut streamed, mut renewals, mut authorities) = (first, 0, BTreeSet::new());
    for _ in 0..(7 * 24 * 12) {
        tokio::time::sleep(Duration::from_secs(300)).await;
        let now = world.clock.now();
        assert!(now < streamed.not_after, "a stream was left with an expired SVID");
        world.assert_verifies(&streamed.chain);
        if changes.has_changed().unwrap() {
            changes.borrow_and_update();
            let next = world.x509(web).await;
            renewals += usize::from(!Arc::ptr_eq(&next, &streamed));
            streamed = next;
        }
        let token = world.jwt(web, "a").await;
        let bundle = world.bundle();
        jwt::validate(&token.token, "a", |_| Some(bundle.as_ref()), now).unwrap();
        authorities.extend(bundle.x509_authorities.iter().cloned());
        // A new one every 12 hours, each kept for a day beyond its 24 hours.
        assert!((1..=5).contains(&bundle.x509_authorities.len()), "{}", bundle.x509_authorities.len());
    }
    // An hour's SVID is renewed at half of its life: twice an hour, give or take the jitter.
    assert!((7 * 24..=7 * 24 * 3).contains(&renewals), "{renewals}");
    assert!(authorities.len() >= 7, "a CA of 24 hours is replaced each day: {}", authorities.len());
    drop(hold);
    writing.abort();
}

/// A process with several identities is sent their renewals in one message, also where one of them came later.
#[tokio::test(start_paused = true)]
async fn the_identities_of_one_caller_are_renewed_together() {
    let names = ["cache", "db", "web"];
    let world = World::new(&names, 100);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let mut changes = world.writer.store().subscribe();
    let latecomer = world.charged("db").await;
    let _held = world.x509.hold(&latecomer);
    let mut alone = world.charged("web").await;
    world.x509.fetch(&mut alone).await.unwrap();
    tokio::time::sleep(Duration::from_secs(500)).await;
    let all = &mut world.call(None).await;
    let _held = world.x509.hold(all);
    let mut sent: Vec<_> = world.x509.fetch(all).await.unwrap().into_iter().map(|it| it.svid).collect();
    assert_eq!(sent.len(), names.len());
    let mut messages = 0;
    for _ in 0..24 * 60 {
        tokio::time::sleep(Duration::from_secs(60)).await;
        if !changes.has_changed().unwrap() {
            continue;
        }
        changes.borrow_and_update();
        let next: Vec<_> = world.x509.at_hand(all).unwrap().into_iter().map(|it| it.svid).collect();
        let same = sent.iter().zip(&next).filter(|(old, new)| Arc::ptr_eq(old, new)).count();
        assert!(same == 0 || same == names.len(), "{same} of {} were not renewed", names.len());
        messages += usize::from(same == 0);
        sent = next;
    }
    assert!((40..=60).contains(&messages), "twice an hour: {messages}");
    writing.abort();
}

/// A disk that is full, read-only or broken: what is there signs as long as it is valid, and all goes on by itself afterwards.
#[tokio::test(start_paused = true)]
async fn a_disk_that_takes_nothing_keeps_nobody_from_being_served() {
    let world = World::new(&["web"], 100);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let web = &mut world.charged("web").await;
    // What stands there can be neither written to nor removed, whoever tries.
    let obstacle = world._dir.path().join("data/issuer.json.new/x");
    let hours = |hours: u64| tokio::time::sleep(Duration::from_secs(hours * 3600));
    let disturb = || std::fs::create_dir_all(&obstacle).unwrap();
    let mend = || std::fs::remove_dir_all(obstacle.parent().unwrap()).unwrap();

    disturb();
    hours(18).await;
    assert_eq!(world.bundle().x509_authorities.len(), 1, "the next CA is due, and cannot be kept");
    let svid = world.x509(web).await;
    world.assert_verifies(&svid.chain);
    world.jwt(web, "a").await;
    mend();
    hours(1).await;
    assert_eq!(world.bundle().x509_authorities.len(), 2);

    // Until there is nothing more to sign with.
    disturb();
    hours(60).await;
    assert!(world.x509.fetch(web).await.is_err());
    mend();
    // The first call brings the new keys about. A pause after the failure of an entry's own is for another reason.
    hours(1).await;
    let svid = world.x509(web).await;
    world.assert_verifies(&svid.chain);
    writing.abort();
}

/// SVIDs of four seconds, over the life of a CA of a minute and its replacement.
#[tokio::test(start_paused = true)]
async fn an_svid_of_seconds_is_renewed_at_half_of_its_life() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = settings(dir.path());
    settings.issuer.ca_ttl = MIN_CA_TTL;
    let ttl = Duration::from_secs(4);
    let short = Arc::new(Entry { x509_svid_ttl: Some(ttl), ..Entry::clone(&entry("web")) });
    let world = World::signed_by(settings, dir, Arc::new(EntryIndex::new([short])), 1);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let web = &mut world.charged("web").await;
    let _held = world.x509.hold(web);
    let (mut held, mut renewals) = (world.x509(web).await, 0);
    for _ in 0..70 * 20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let next = world.x509(web).await;
        assert!(world.clock.now() < next.not_after, "an expired SVID is served");
        renewals += u32::from(!Arc::ptr_eq(&held, &next));
        held = next;
    }
    // Every two seconds, give or take a tenth, and a quarter of a second until it is looked at.
    assert!((28..=40).contains(&renewals), "{renewals} in 70 s");
    writing.abort();
}

#[tokio::test(start_paused = true)]
async fn what_no_stream_holds_is_forgotten_and_made_again_on_demand() {
    let world = World::new(&["web"], 100);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let web = &mut world.charged("web").await;
    let first = world.x509(web).await;
    let again = world.x509(web).await;
    assert!(Arc::ptr_eq(&first, &again), "made once");
    tokio::time::sleep(2 * HOUR).await;
    let hold = world.x509.hold(web);
    let later = world.x509(web).await;
    assert!(!Arc::ptr_eq(&first, &later));
    assert_eq!((world.x509.counts().cached, world.x509.counts().active), (1, 1));
    drop(hold);
    assert_eq!(world.x509.counts().active, 0);
    writing.abort();
}

#[tokio::test(start_paused = true)]
async fn tokens_are_signed_once_and_renewed_behind_the_callers() {
    let world = World::new(&["web"], 100);
    let web = &mut world.charged("web").await;
    let mut tokens = Vec::new();
    for _ in 0..50 {
        tokens.push(world.jwt(web, "a").await);
    }
    assert!(tokens.iter().all(|token| Arc::ptr_eq(token, &tokens[0])), "one signature for all");

    // In the second half of its life the old one is served, and a fresh one is there for the next.
    tokio::time::sleep(Duration::from_secs(200)).await;
    let due = world.jwt(web, "a").await;
    assert!(Arc::ptr_eq(&due, &tokens[0]));
    let fresh = loop {
        tokio::task::yield_now().await;
        let next = world.jwt(web, "a").await;
        if !Arc::ptr_eq(&next, &due) {
            break next;
        }
    };
    assert!(fresh.expires_at > due.expires_at);

    // After its end it is not served.
    tokio::time::sleep(Duration::from_secs(301)).await;
    let new = world.jwt(web, "a").await;
    assert!(!Arc::ptr_eq(&new, &fresh) && new.expires_at > world.clock.now());
}

#[tokio::test(start_paused = true)]
async fn who_has_something_signed_pays_for_it_until_it_has_paid() {
    let world = World::new(&["web"], 100);
    let limits = Limits::default();
    let caller = CallerKey::Uid(nix::unistd::geteuid().as_raw());
    let web = SpiffeId::parse("spiffe://td/web").unwrap();
    let spent = || {
        let caller = limits.caller_standing(caller, Method::FetchJwtSvid).1;
        [caller, limits.identity_standing(&web, Method::FetchJwtSvid).1].map(|standing| match standing {
            Standing::Tokens { left, quota, .. } => quota.burst() - left,
            other => panic!("{other:?}"),
        })
    };
    let mut taken = [0, 0];
    for (case, audience, pays_first, costs) in
        [("signed", "a", false, 2), ("kept", "a", false, 1), ("signed, but paid before", "b", true, 1)]
    {
        let mut call = world.call_under(&limits, None).await;
        if pays_first {
            call.pay();
        }
        world.jwt(&mut call, audience).await;
        drop(call);
        taken = taken.map(|taken| taken + costs);
        assert_eq!(spent(), taken, "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_audiences_pushes_out_its_own_tokens_only() {
    let world = World::new(&["flood", "quiet"], 50);
    let (flood, quiet) = (&mut world.charged("flood").await, &mut world.charged("quiet").await);
    let kept = world.jwt(quiet, "a").await;
    for n in 0..500 {
        world.jwt(flood, &n.to_string()).await;
        assert!(world.jwt.len() <= 50);
    }
    let again = world.jwt(quiet, "a").await;
    assert!(Arc::ptr_eq(&kept, &again), "the neighbour's token is still there");
}

/// For whom an issuer cannot sign (everybody where nobody is named), and why.
type Failure = (&'static str, fn() -> MintError);

/// An issuer that takes its time, or refuses.
#[derive(Debug)]
struct Fake {
    clock: Clock,
    world: watch::Sender<Arc<Published>>,
    /// How long a batch or a token takes.
    takes: Mutex<Duration>,
    fails: Mutex<Option<Failure>>,
    asked: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
}

impl Fake {
    fn new(names: &[&str]) -> (Arc<Self>, World) {
        let clock = Clock::starting_at(born());
        let own = Bundle {
            trust_domain: TrustDomain::parse("td").unwrap(),
            x509_authorities: vec![b"an authority".to_vec()],
            jwt_authorities: Vec::new(),
        };
        let bundles = Bundles { own: Arc::new(own), federated: BTreeMap::new() };
        let fake = Arc::new(Self {
            clock,
            world: watch::Sender::new(Arc::new(Published {
                index: index(names),
                bundles,
                tainted: Arc::default(),
            })),
            takes: Mutex::default(),
            fails: Mutex::default(),
            asked: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
        });
        let world = World::of(tempfile::tempdir().unwrap(), clock, Arc::<Self>::clone(&fake), 100);
        (fake, world)
    }

    fn takes(&self, time: Duration) {
        *self.takes.lock().unwrap() = time;
    }

    fn fails(&self, why: Option<Failure>) {
        *self.fails.lock().unwrap() = why;
    }

    /// Works for as long as it takes, or to the deadline.
    async fn work(&self, deadline: Instant) -> Result<(), MintError> {
        self.asked.fetch_add(1, Relaxed);
        let at_once = self.at_once.fetch_add(1, Relaxed) + 1;
        self.most_at_once.fetch_max(at_once, Relaxed);
        let takes = *self.takes.lock().unwrap();
        let done = tokio::time::timeout_at(deadline, tokio::time::sleep(takes)).await;
        self.at_once.fetch_sub(1, Relaxed);
        done.map_err(|_elapsed| MintError::Late)
    }

    fn failure(&self, entry: &Entry) -> Option<MintError> {
        let (who, why) = (*self.fails.lock().unwrap())?;
        (who.is_empty() || who == entry.id.as_str()).then(why)
    }
}

impl Issuer for Fake {
    fn world(&self) -> watch::Receiver<Arc<Published>> {
        self.world.subscribe()
    }

    fn mint_x509<'a>(
        &'a self,
        entries: &'a [Arc<Entry>],
        deadline: Instant,
    ) -> BoxFuture<'a, Vec<Result<X509Svid, MintError>>> {
        Box::pin(async move {
            let done = self.work(deadline).await.is_ok();
            let mint = |entry: &Arc<Entry>| match self.failure(entry) {
                Some(error) => Err(error),
                None if !done => Err(MintError::Late),
                None => Ok(X509Svid {
                    spiffe_id: entry.spiffe_id.clone(),
                    chain: Vec::new(),
                    key: Vec::new().into(),
                    not_before: self.clock.now(),
                    not_after: self.clock.now() + HOUR,
                }),
            };
            entries.iter().map(mint).collect()
        })
    }

    fn mint_jwt<'a>(
        &'a self,
        entry: &'a Arc<Entry>,
        _audience: &'a [String],
        _family: u64,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<JwtSvid, MintError>> {
        Box::pin(async move {
            self.work(deadline).await?;
            match self.failure(entry) {
                Some(error) => Err(error),
                None => Ok(JwtSvid {
                    spiffe_id: entry.spiffe_id.clone(),
                    token: String::new().into(),
                    issued_at: self.clock.now(),
                    expires_at: self.clock.now() + Duration::from_secs(300),
                }),
            }
        })
    }

    fn can_sign(&self, _kind: SvidKind) -> Result<(), MintError> {
        match *self.fails.lock().unwrap() {
            Some(("", why)) => Err(why()),
            _ => Ok(()),
        }
    }

    fn look_out(&self) -> Option<Lookout> {
        None
    }

    fn makes_ahead(&self) -> bool {
        false
    }

    fn reload(&self, told: IssuerInput) {
        self.world.send_modify(|world| {
            let bundles = Bundles { own: Arc::clone(&world.bundles.own), federated: told.federated };
            *world = Arc::new(Published { index: told.index, bundles, tainted: Arc::default() });
        });
    }

    fn let_go(&self) {}

    fn run(self: Arc<Self>) -> BoxFuture<'static, Expelled> {
        Box::pin(std::future::pending())
    }
}

fn wrong_name() -> MintError {
    MintError::Request { reason: "a name is wrong", source: "it is".into() }
}

fn away() -> MintError {
    MintError::Issuer { retry_after: Some(Duration::from_secs(60)), source: "the server is away".into() }
}

#[tokio::test(start_paused = true)]
async fn a_slow_issuer_holds_up_nobody_who_has_a_valid_svid() {
    let (fake, world) = Fake::new(&["one", "three", "two"]);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let all = &mut world.call(None).await;
    let _hold = world.x509.hold(all);
    let first = world.x509.fetch(all).await.unwrap();
    // They are due at different times, within minutes.
    fake.takes(Duration::from_secs(25));
    let end = world.clock.now() + HOUR * 3 / 5;
    while world.clock.now() < end {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let started = Instant::now();
        let served = world.x509.fetch(all).await.unwrap();
        assert!(started.elapsed() <= Duration::from_secs(1), "{:?}", started.elapsed());
        assert!(served.iter().all(|served| world.clock.now() < served.svid.not_after));
    }
    for (first, later) in first.iter().zip(world.x509.fetch(all).await.unwrap()) {
        assert!(later.svid.not_after > first.svid.not_after, "{}", later.svid.spiffe_id);
    }
    writing.abort();
}

#[tokio::test(start_paused = true)]
async fn many_svids_take_the_time_of_one() {
    let names: Vec<String> = (0..1200).map(|n| format!("{n:04}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let (fake, world) = Fake::new(&names);
    fake.takes(Duration::from_secs(20));
    let all = &mut world.call(None).await;
    let _hold = world.x509.hold(all);
    let started = Instant::now();
    let first = world.x509.fetch(all).await.unwrap();
    assert_eq!((first.len(), started.elapsed().as_secs()), (1200, 20));
    // While nobody renews, all fall due; then it takes three batches, side by side.
    tokio::time::sleep(HOUR * 3 / 5).await;
    fake.asked.store(0, Relaxed);
    fake.most_at_once.store(0, Relaxed);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    tokio::time::sleep(Duration::from_secs(21)).await;
    assert_eq!((fake.asked.load(Relaxed), fake.most_at_once.load(Relaxed)), (3, 3));
    for (first, later) in first.iter().zip(world.x509.fetch(all).await.unwrap()) {
        assert!(later.svid.not_after > first.svid.not_after, "{}", later.svid.spiffe_id);
    }
    assert_eq!(fake.asked.load(Relaxed), 3, "they were there");
    writing.abort();
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_cannot_be_signed_for_delays_no_other() {
    let (fake, world) = Fake::new(&["bad", "good"]);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let all = &mut world.call(None).await;
    let _hold = world.x509.hold(all);
    let first = world.x509.fetch(all).await.unwrap();
    fake.fails(Some(("bad", wrong_name)));
    tokio::time::sleep(HOUR * 9 / 10).await;
    let later = world.x509.fetch(all).await.unwrap();
    assert!(Arc::ptr_eq(&first[0].svid, &later[0].svid), "the valid one is served");
    assert!(later[1].svid.not_after > first[1].svid.not_after);
    tokio::time::sleep(HOUR / 10).await;
    let error = world.x509.fetch(all).await.unwrap_err();
    assert!(matches!(error, MintError::Request { .. }), "never one that has ended: {error}");
    fake.fails(None);
    world.x509.fetch(all).await.unwrap();
    writing.abort();
}

#[tokio::test(start_paused = true)]
async fn an_issuer_that_is_away_is_asked_when_it_says_and_what_is_valid_is_served() {
    let (fake, world) = Fake::new(&["web"]);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let web = &mut world.charged("web").await;
    let _hold = world.x509.hold(web);
    let first = world.x509(web).await;
    let token = world.jwt(web, "a").await;

    // It says when to come again.
    fake.fails(Some(("web", away)));
    tokio::time::sleep(Duration::from_secs(200)).await;
    let asked = fake.asked.load(Relaxed);
    for _ in 0..50 {
        assert!(Arc::ptr_eq(&world.jwt(web, "a").await, &token));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(fake.asked.load(Relaxed) - asked, 1, "not before its time");

    // It could sign nothing: it is not even asked, and does so at once when it can again.
    fake.fails(Some(("", away)));
    tokio::time::sleep(HOUR * 3 / 5).await;
    assert_eq!(fake.asked.load(Relaxed) - asked, 1);
    assert!(Arc::ptr_eq(&world.x509(web).await, &first), "valid, so it is served");
    let mut changes = world.writer.store().subscribe();
    fake.fails(None);
    tokio::time::timeout(Duration::from_secs(1), changes.changed()).await.unwrap().unwrap();
    assert!(world.x509(web).await.not_after > first.not_after);
    writing.abort();
}

#[tokio::test(start_paused = true)]
async fn no_call_waits_beyond_its_deadline() {
    let (fake, world) = Fake::new(&["db", "web"]);
    fake.takes(HOUR);
    let started = Instant::now();
    // Those that wait for another's signature wait no longer than if it were their own.
    let late = join_all((0..20).map(|n| {
        let world = &world;
        async move {
            let (all, same) = (&mut world.call(None).await, &mut world.call(None).await);
            tokio::time::sleep(Duration::from_millis(n)).await;
            let audience = ["a".to_owned()];
            let (x509, jwt) = tokio::join!(world.x509.fetch(all), world.jwt.fetch(same, &audience));
            (x509.unwrap_err(), jwt.unwrap_err())
        }
    }));
    for (x509, jwt) in late.await {
        assert!(matches!((&x509, &jwt), (MintError::Late, MintError::Late)), "{x509}, {jwt}");
    }
    assert!((30_000..30_050).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    fake.takes(Duration::ZERO);
    let all = &mut world.call(None).await;
    world.x509.fetch(all).await.unwrap();
    world.jwt(all, "a").await;
}

#[tokio::test(start_paused = true)]
async fn what_the_issuer_publishes_is_what_requests_see() {
    let (fake, world) = Fake::new(&["web"]);
    let writing = tokio::spawn(Arc::clone(&world.writer).run());
    let mut changes = world.writer.store().subscribe();
    fake.world.send_modify(|published| {
        *published = Arc::new(Published {
            index: index(&["web", "db"]),
            bundles: published.bundles.clone(),
            tainted: Arc::default(),
        });
    });
    changes.changed().await.unwrap();
    assert_eq!(world.writer.store().snapshot().index.entries().len(), 2);
    // With another policy, as one change.
    let before = world.writer.store().snapshot().generation;
    let policy = Policy { allow_unauthenticated_verifiers: true, ..Policy::default() };
    world.writer.replace(policy, || {
        fake.world.send_modify(|published| {
            *published = Arc::new(Published {
                index: index(&["db"]),
                bundles: published.bundles.clone(),
                tainted: Arc::default(),
            });
        });
    });
    tokio::time::sleep(Duration::from_secs(60)).await;
    let after = world.writer.store().snapshot();
    assert_eq!((after.generation, after.index.entries().len()), (before + 1, 1));
    assert!(after.policy.allow_unauthenticated_verifiers);
    writing.abort();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// However time passes and callers come, no token is served after its end, and no SVID.
    #[test]
    fn nothing_expired_is_served(steps in proptest::collection::vec(0u64..4000, 1..60)) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let world = World::new(&["web"], 4);
            let writing = tokio::spawn(Arc::clone(&world.writer).run());
            let web = &mut world.charged("web").await;
            for step in steps {
                tokio::time::sleep(Duration::from_secs(step)).await;
                let token = world.jwt(web, &(step % 3).to_string()).await;
                assert!(token.expires_at > world.clock.now());
                let svid = world.x509(web).await;
                assert!(svid.not_after > world.clock.now());
                world.assert_verifies(&svid.chain);
            }
            writing.abort();
        });
    }
}
