//! Rotation and renewal over days, with time that is moved: what is served is always valid, verifies against the bundle
//! of the moment, and is renewed before it expires, also when the disk says no.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use durward::{
    attest::{Attestor, unix},
    identity::{
        Bundle, Entry, EntryId, JwtSvid, KeyType, Selector, Selectors, SpiffeId, TrustDomain, X509Svid, jwt,
    },
    issuer::embedded::{CaSource, Embedded, Settings},
    limits::{Limits, Method},
    os::clock::Clock,
    peer::{OsUid, Peer},
    store::{Charged, JwtCache, Policy, Purpose, Signer, Sync, X509Cache, authorize},
    telemetry::metrics::Metrics,
};
use proptest::prelude::*;

const HOUR: Duration = Duration::from_secs(3600);

struct World {
    _dir: tempfile::TempDir,
    clock: Clock,
    sync: Arc<Sync>,
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
        selectors: selectors(),
        x509_svid_ttl: Some(HOUR),
        jwt_svid_ttl: None,
        hint: "".into(),
        dns_names: Vec::new(),
        federates_with: BTreeSet::new(),
        created_at: 0,
        revision: 0,
    })
}

fn settings(dir: &Path) -> Settings {
    Settings {
        trust_domain: TrustDomain::parse("td").unwrap(),
        data_dir: dir.join("data"),
        ca: CaSource::SelfSigned,
        ca_ttl: 24 * HOUR,
        ca_key_type: KeyType::EcP256,
        jwt_key_type: KeyType::EcP256,
        svid_key_type: KeyType::EcP256,
        jwt_issuer: None,
        default_x509_svid_ttl: HOUR,
        default_jwt_svid_ttl: Duration::from_secs(300),
    }
}

impl World {
    fn new(names: &[&str], jwt_max: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let settings = settings(dir.path());
        let issuer = Arc::new(Embedded::open(settings, clock.now()).unwrap());
        let metrics = Arc::new(Metrics::new(clock));
        let ttls = [HOUR, Duration::from_secs(300)];
        let ec = KeyType::EcP256;
        let signer = Arc::new(Signer::new(issuer, clock, Arc::clone(&metrics), [ec, ec], ec, ttls));
        let x509 = Arc::new(X509Cache::new(Arc::clone(&signer), 10, None));
        let jwt = Arc::new(JwtCache::new(Arc::clone(&signer), Arc::clone(&metrics), jwt_max));
        let all: Vec<_> = names.iter().map(|name| entry(name)).collect();
        let sync =
            Arc::new(Sync::new(signer, Arc::clone(&x509), metrics, all, BTreeMap::new(), Policy::default()));
        Self { _dir: dir, clock, sync, x509, jwt }
    }

    /// A call by this process for one of the entries, on its whole way.
    async fn charged(&self, name: &str) -> Charged {
        let (_ours, theirs) = UnixStream::pair().unwrap();
        let peer = Arc::new(Peer::from_stream(&theirs, &OsUid).unwrap());
        let limits = Limits::default();
        let admitted = limits.admit_caller(peer, Method::FetchJwtSvid).unwrap();
        let attested = Attestor::new(unix::Settings::default()).attest(admitted).await.unwrap();
        let id = SpiffeId::parse(&format!("spiffe://td/{name}")).unwrap();
        let entitled = authorize(&self.sync.store().snapshot(), attested, Purpose::Svids, Some(&id)).unwrap();
        entitled.charge(&limits).unwrap()
    }

    async fn x509(&self, call: &mut Charged) -> Arc<X509Svid> {
        Arc::clone(&self.x509.fetch(call).await.unwrap()[0].svid)
    }

    async fn jwt(&self, call: &mut Charged, audience: &str) -> Arc<JwtSvid> {
        Arc::clone(&self.jwt.fetch(call, &[audience.to_owned()]).await.unwrap()[0])
    }

    fn bundle(&self) -> Arc<Bundle> {
        Arc::clone(&self.sync.store().snapshot().bundles.own)
    }

    fn assert_verifies(&self, chain: &[Vec<u8>]) {
        use rustls_pki_types::{CertificateDer, UnixTime};
        let bundle = self.bundle();
        let roots: Vec<CertificateDer<'_>> =
            bundle.x509_authorities.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let anchors: Vec<_> =
            roots.iter().map(|root| webpki::anchor_from_trusted_cert(root).unwrap()).collect();
        let leaf = CertificateDer::from(chain[0].as_slice());
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
    let syncing = tokio::spawn(Arc::clone(&world.sync).run());
    let web = &mut world.charged("web").await;
    let mut changes = world.sync.store().subscribe();
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
    syncing.abort();
}

#[tokio::test(start_paused = true)]
async fn what_no_stream_holds_is_forgotten_and_made_again_on_demand() {
    let world = World::new(&["web"], 100);
    let syncing = tokio::spawn(Arc::clone(&world.sync).run());
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
    syncing.abort();
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// However time passes and callers come, no token is served after its end, and no SVID.
    #[test]
    fn nothing_expired_is_served(steps in proptest::collection::vec(0u64..4000, 1..60)) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let world = World::new(&["web"], 4);
            let syncing = tokio::spawn(Arc::clone(&world.sync).run());
            let web = &mut world.charged("web").await;
            for step in steps {
                tokio::time::sleep(Duration::from_secs(step)).await;
                let token = world.jwt(web, &(step % 3).to_string()).await;
                assert!(token.expires_at > world.clock.now());
                let svid = world.x509(web).await;
                assert!(svid.not_after > world.clock.now());
                world.assert_verifies(&svid.chain);
            }
            syncing.abort();
        });
    }
}
