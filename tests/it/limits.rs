//! The limits as the services ask them: what is charged, what comes back, what is told.

use std::{
    collections::BTreeMap,
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

use durward::{
    identity::SpiffeId,
    limits::{
        Admitted, CallerKey, Families, Gate, GateRule, GateSettings, Limits, Method, NodeSettings, Permit,
        Refusal, RejectionStatus, Settings, SettingsError, SoftLimits,
        bucket::{Per, Quota},
        budget::Pressure,
        caller::Caller,
        counters::{KeyType, Reason, Stage},
        policy::{CallerPattern, IdPattern, Layers, Limit, Methods, Override, Rule, Share},
        report::{Event, LISTED, QUIET},
        schedule::{Moment, Schedule, Weekday, Window},
    },
    os::clock::Clock,
};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use proptest::prelude::*;
use tokio::time::advance;

const JWT: Method = Method::FetchJwtSvid;

#[derive(Clone, Copy, Debug)]
struct Uid(u32);

impl Caller for Uid {
    fn caller_key(&self) -> CallerKey {
        CallerKey::Uid(self.0)
    }
}

fn quota(rate: f64, burst: u32) -> Limit {
    Limit::Quota(Quota::new(rate, Per::Second, burst).unwrap())
}

/// No limit anywhere, for a test to set one.
fn open() -> Settings {
    Settings {
        caller: Layers::new(Limit::Unlimited),
        identity: Layers::new(Limit::Unlimited),
        node: NodeSettings { default: None, ..NodeSettings::default() },
        ..Settings::default()
    }
}

fn limits(settings: &Settings) -> Limits {
    Limits::new(settings, Clock::SYSTEM, &metrics::NoopRecorder).unwrap()
}

/// SPIFFE IDs `spiffe://td/...`, in this order.
fn entries(paths: &[&str]) -> Vec<SpiffeId> {
    paths.iter().map(|path| SpiffeId::parse(&format!("spiffe://td/{path}")).unwrap()).collect()
}

/// A call to its end: what the handler of a method does.
fn call(limits: &Limits, uid: u32, method: Method, entries: &[SpiffeId]) -> Result<(), Refusal> {
    let mut admitted = limits.admit_caller(Uid(uid), method)?;
    limits.admit_identities(&mut admitted, entries)
}

/// How many calls pass before one is refused.
fn passes(limits: &Limits, uid: u32, method: Method, entries: &[SpiffeId]) -> u32 {
    (0..10_000).find(|_| call(limits, uid, method, entries).is_err()).unwrap_or(10_000)
}

fn text_of(recorder: &PrometheusRecorder) -> BTreeMap<String, f64> {
    let text = recorder.handle().render();
    let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
    lines
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .filter(|(_, value)| *value != 0.0)
        .collect()
}

#[test]
fn the_defaults_are_in_order() {
    assert_eq!(Settings::default().check(None), Ok(()));
    drop(Limits::default());
}

#[tokio::test(start_paused = true)]
async fn each_caller_and_method_has_its_own_bucket() {
    let limits = limits(&Settings { caller: Layers::new(quota(1.0, 10)), ..open() });
    let web = entries(&["web"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 10);
    assert_eq!(passes(&limits, 1, Method::FetchX509Svid, &web), 10, "another method");
    assert_eq!(passes(&limits, 1, Method::ValidateJwtSvid, &[]), 10, "the one without identity");
    assert_eq!(passes(&limits, 2, JWT, &web), 10, "another caller");
    let refusal = call(&limits, 1, JWT, &web).unwrap_err();
    assert_eq!(
        (refusal.stage, refusal.key_type, refusal.reason, refusal.shed, refusal.status),
        (Stage::Caller, KeyType::Uid, Reason::Rate, false, RejectionStatus::ResourceExhausted)
    );
    assert_eq!(refusal.to_string(), "rate limit exceeded for /SpiffeWorkloadAPI/FetchJWTSVID");
    advance(refusal.retry_after - Duration::from_millis(1)).await;
    assert!(call(&limits, 1, JWT, &web).is_err(), "too early");
    advance(Duration::from_millis(1)).await;
    assert_eq!(call(&limits, 1, JWT, &web), Ok(()), "the wait was true");
    assert_eq!(limits.left_to_caller(CallerKey::Uid(1), JWT), Some((0, 10)));
    assert_eq!(limits.left_to_caller(CallerKey::Uid(77), JWT), Some((10, 10)), "never seen");
}

#[tokio::test(start_paused = true)]
async fn several_identities_are_charged_together_or_not_at_all() {
    let limits = limits(&Settings {
        caller: Layers::new(quota(1.0, 1000)),
        identity: Layers::new(quota(1.0, 10)),
        node: NodeSettings {
            default: Some(Quota::new(1.0, Per::Second, 100).unwrap()),
            ..NodeSettings::default()
        },
        ..open()
    });
    let (a, b, both) = (entries(&["a"]), entries(&["b"]), entries(&["a", "b"]));
    assert_eq!(passes(&limits, 1, JWT, &a), 10);
    assert_eq!(
        limits.left_to_caller(CallerKey::Uid(1), JWT),
        Some((990, 1000)),
        "ten passed; the refused one is back"
    );
    for _ in 0..500 {
        let refusal = call(&limits, 2, JWT, &both).unwrap_err();
        assert_eq!((refusal.stage, refusal.key_type), (Stage::Identity, KeyType::SpiffeId));
    }
    assert_eq!(
        limits.left_to_caller(CallerKey::Uid(2), JWT),
        Some((1000, 1000)),
        "the caller's tokens are back"
    );
    assert_eq!(passes(&limits, 2, JWT, &b), 10, "b was never charged, and the node neither");
    assert_eq!(passes(&limits, 3, Method::FetchX509Svid, &both), 10);
    advance(Duration::from_secs(1)).await;
    assert_eq!(call(&limits, 3, Method::FetchX509Svid, &both), Ok(()), "one token each");
}

#[tokio::test(start_paused = true)]
async fn bundles_charge_the_default_identity() {
    let limits = limits(&Settings { identity: Layers::new(quota(1.0, 10)), ..open() });
    let both = entries(&["a", "b"]);
    let id = |name: &str| SpiffeId::parse(&format!("spiffe://td/{name}")).unwrap();
    for method in [Method::FetchX509Bundles, Method::FetchJwtBundles, Method::FetchWitBundles] {
        assert_eq!(passes(&limits, 1, method, &both), 10, "{method:?}");
        assert_eq!(limits.left_to_identity(&id("a"), method), Some((0, 10)), "{method:?}");
        assert_eq!(limits.left_to_identity(&id("b"), method), Some((10, 10)), "{method:?}");
    }
    assert_eq!(call(&limits, 1, Method::FetchX509Bundles, &[]), Ok(()), "a caller without identity");
}

#[tokio::test(start_paused = true)]
async fn the_node_is_asked_last_and_sheds() {
    let node = |burst| NodeSettings {
        default: Some(Quota::new(1.0, Per::Second, burst).unwrap()),
        ..NodeSettings::default()
    };
    let settings = Settings {
        caller: Layers::new(quota(1.0, 100)),
        identity: Layers::new(quota(1.0, 100)),
        node: node(10),
        ..open()
    };
    let limits = limits(&settings);
    for (method, entries) in [(JWT, entries(&["a"])), (Method::ValidateJwtSvid, vec![])] {
        assert_eq!(passes(&limits, 1, method, &entries), 10);
        let refusal = call(&limits, 1, method, &entries).unwrap_err();
        assert_eq!(
            (refusal.stage, refusal.key_type, refusal.reason, refusal.shed, refusal.status),
            (Stage::Node, KeyType::Node, Reason::Rate, true, RejectionStatus::Unavailable)
        );
        assert_eq!(refusal.retry_after, Duration::from_secs(1));
        assert_eq!(limits.left_to_caller(CallerKey::Uid(1), method), Some((90, 100)), "given back");
    }
    let id = SpiffeId::parse("spiffe://td/a").unwrap();
    assert_eq!(limits.left_to_identity(&id, JWT), Some((90, 100)), "given back");
    // Reload: what was spent stays so, with the same quota and with another.
    for burst in [10, 25] {
        limits.reload(&Settings { node: node(burst), ..settings.clone() }).unwrap();
        assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), burst - 10);
        limits.reload(&settings).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_pays_what_it_cost() {
    let mut rule = Rule::new(quota(1.0, 100));
    (rule.costs.answer, rule.costs.signature, rule.costs.failed_attestation) = (1, 5, 20);
    let layers = Layers { default: rule, methods: vec![], overrides: vec![] };
    let identity = Layers { default: layers.default.clone(), methods: vec![], overrides: vec![] };
    let limits = limits(&Settings { caller: layers, identity, ..open() });
    let web = entries(&["web"]);
    let id = &web[0];
    let left = || {
        let of = |left: Option<(u32, u32)>| left.unwrap().0;
        (of(limits.left_to_caller(CallerKey::Uid(1), JWT)), of(limits.left_to_identity(id, JWT)))
    };
    let admit = || limits.admit_caller(Uid(1), JWT).unwrap();

    let mut admitted = admit();
    limits.admit_identities(&mut admitted, [id]).unwrap();
    assert_eq!(left(), (99, 99), "held by the caller, taken from the identity");
    drop(admitted);
    assert_eq!(left(), (99, 99), "an answer from memory");

    let mut admitted = admit();
    limits.admit_identities(&mut admitted, [id]).unwrap();
    admitted.signed(id);
    drop(admitted);
    assert_eq!(left(), (94, 94), "a signature");

    admit().attestation_failed();
    assert_eq!(left(), (74, 94), "a failed attestation");

    drop(admit());
    assert_eq!(left(), (73, 94), "cancelled before attestation: paid");
}

#[tokio::test(start_paused = true)]
async fn attestations_in_flight_are_shared() {
    let number = |n| NonZeroU32::new(n).unwrap();
    let node = NodeSettings {
        default: None,
        attestations: number(12),
        attestations_per_caller: number(12),
        ..NodeSettings::default()
    };
    let limits = limits(&Settings { caller: Layers::new(quota(1.0, 100)), node, ..open() });
    let take = |uid| {
        let mut held: Vec<Admitted<Uid>> = vec![];
        loop {
            match limits.admit_caller(Uid(uid), JWT) {
                Ok(admitted) => held.push(admitted),
                Err(refusal) => return (held, refusal),
            }
        }
    };
    let (greedy, refusal) = take(1);
    assert_eq!((greedy.len(), refusal.stage, refusal.reason), (6, Stage::Caller, Reason::InFlight));
    assert!(!refusal.shed && refusal.wait().is_some());
    let (other, _) = take(2);
    assert_eq!(other.len(), 3, "a quarter is for those who have none");
    let (third, refusal) = take(3);
    assert_eq!((third.len(), refusal.stage, refusal.shed), (1, Stage::Caller, false));
    assert_eq!(
        limits.left_to_caller(CallerKey::Uid(3), JWT),
        Some((99, 100)),
        "the refused one is given back"
    );
    let more = [take(5), take(6)];
    assert!(more.iter().all(|(held, _)| held.len() == 1));
    let (none, refusal) = take(7);
    assert_eq!((none.len(), refusal.stage, refusal.shed), (0, Stage::Node, true));
    drop((other, more));
    for mut admitted in third {
        limits.admit_identities(&mut admitted, &entries(&["a"])).unwrap();
        assert!(limits.admit_caller(Uid(4), JWT).is_ok(), "attested: the slot is free though the call lives");
    }
}

fn over<P>(pattern: P, limit: Limit, share: Share) -> Override<P> {
    Override { pattern, methods: Methods::All, rule: Some(Rule::new(limit)), share, place: "test".into() }
}

#[tokio::test(start_paused = true)]
async fn exempt_unlimited_and_blocked() {
    let caller = |uid, limit| over(CallerPattern::One(CallerKey::Uid(uid)), limit, Share::Each);
    let mut layers = Layers::new(quota(1.0, 10));
    layers.overrides = vec![caller(1, Limit::Exempt), caller(2, Limit::Unlimited), caller(3, Limit::Block)];
    let node =
        NodeSettings { default: Some(Quota::new(1.0, Per::Second, 100).unwrap()), ..NodeSettings::default() };
    let limits = limits(&Settings { caller: layers, node, ..open() });
    let web = entries(&["web"]);
    assert_eq!(passes(&limits, 3, JWT, &web), 0);
    let refusal = call(&limits, 3, JWT, &web).unwrap_err();
    assert_eq!((refusal.reason, refusal.wait()), (Reason::Blocked, None), "no use in waiting");
    assert_eq!(passes(&limits, 1, JWT, &web), 10_000, "exempt from the node's too");
    assert_eq!(passes(&limits, 2, JWT, &web), 100, "only the node's");
}

/// Exempt is from the identity's bucket too, and takes nothing from others who have the identity.
#[tokio::test(start_paused = true)]
async fn exempt_takes_nothing_from_an_identity() {
    let mut layers = Layers::new(Limit::Unlimited);
    layers.overrides = vec![over(CallerPattern::One(CallerKey::Uid(1)), Limit::Exempt, Share::Each)];
    let limits = limits(&Settings { caller: layers, identity: Layers::new(quota(1.0, 10)), ..open() });
    let web = entries(&["web"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 10_000);
    assert_eq!(passes(&limits, 2, JWT, &web), 10);
}

/// A rehearsal of one caller's gate rule is of that rule alone: what all share is asked all the same.
#[tokio::test(start_paused = true)]
async fn a_rehearsal_at_the_gate_takes_no_places_of_others() {
    let rehearsed = GateRule { dry_run: true, ..rule(8, quota(1.0, 10)) };
    let gate = gate(GateSettings {
        default: rule(8, quota(1.0, 10)),
        overrides: vec![Override {
            pattern: CallerPattern::One(CallerKey::Uid(9)),
            methods: Methods::All,
            rule: Some(rehearsed),
            share: Share::Each,
            place: "test".into(),
        }],
        connections: Some(number(100)),
        reserve: 10,
        ..GateSettings::default()
    });
    let held: Vec<Permit> = std::iter::from_fn(|| gate.open(CallerKey::Uid(9)).ok()).collect();
    assert_eq!(held.len(), 90, "its own limits are rehearsed, and the reserve is not its own");
    let others: Vec<Permit> = (100..110).filter_map(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(others.len(), 10);
    gate.set_pressure(Pressure::RefuseNew);
    drop(others);
    assert!(gate.open(CallerKey::Uid(9)).is_err(), "nor is memory");
}

/// Whoever can be many callers is one for the reserve, for the places and for the attestations.
#[tokio::test(start_paused = true)]
async fn a_user_with_subordinate_uids_is_one() {
    let families = Families::parse("somebody:100000:65536\n", |_| None);
    let settings = Settings {
        families,
        gate: GateSettings { connections: Some(number(100)), reserve: 10, ..GateSettings::default() },
        ..Settings::default()
    };
    let limits = limits(&settings);
    let gate = Gate::new(&settings, 20_000, None, &limits).unwrap();
    let held: Vec<Permit> =
        (100_000..100_200).filter_map(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(held.len(), 25, "a quarter of the node");
    let others: Vec<Permit> = (1..200).filter_map(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(others.len(), 75, "users have the rest, the reserve included");
    drop(others);
    drop(held);
    assert!(gate.open(CallerKey::Uid(100_777)).is_ok(), "a place that is given back is free");

    let mut attesting = Vec::new();
    for uid in 100_000..100_200 {
        attesting.extend(limits.admit_caller(Uid(uid), JWT).ok());
    }
    assert_eq!(attesting.len(), 16, "what one caller may have");
    assert!(limits.admit_caller(Uid(7), JWT).is_ok());
}

/// A rehearsal of the node's limits is one of the attestations too.
#[tokio::test(start_paused = true)]
async fn a_rehearsal_of_the_node_refuses_no_attestation() {
    let node = NodeSettings {
        attestations: number(1),
        attestations_per_caller: number(1),
        dry_run: true,
        ..open().node
    };
    let limits = limits(&Settings { node, ..open() });
    let held: Vec<_> = (0..10).map(|uid| limits.admit_caller(Uid(uid % 2), JWT).unwrap()).collect();
    assert_eq!(held.len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_mask_makes_one_bucket_of_many() {
    let mut layers = Layers::new(quota(1.0, 10));
    let pattern = |text: &str| IdPattern::parse(text).unwrap();
    layers.overrides = vec![
        over(pattern("spiffe://td/ns/{ns}/**"), quota(1.0, 5), Share::Together),
        over(pattern("spiffe://td/ns/prod/sa/big"), quota(1.0, 7), Share::Each),
    ];
    layers.overrides[0].rule = None;
    let limits = limits(&Settings { identity: layers, ..open() });
    assert_eq!(passes(&limits, 1, JWT, &entries(&["ns/prod/sa/a"])), 10);
    assert_eq!(passes(&limits, 2, JWT, &entries(&["ns/prod/sa/b"])), 0, "the same bucket");
    assert_eq!(passes(&limits, 1, JWT, &entries(&["ns/prod/sa/big"])), 7, "a rule that says more");
    let four = entries(&["ns/test/sa/a", "ns/test/sa/b", "ns/test/sa/c", "ns/test/sa/a"]);
    assert_eq!(passes(&limits, 1, JWT, &four), 10, "one call charges a bucket once");
    assert_eq!(passes(&limits, 1, JWT, &entries(&["other"])), 10);
    let names: Vec<_> = limits.heaviest(10).iter().map(|(_, heavy)| heavy.name.to_string()).collect();
    assert!(names.contains(&"spiffe://td/ns/prod/**".to_owned()), "{names:?}");

    let mut layers = Layers::new(quota(1.0, 10));
    layers.overrides = vec![over(CallerPattern::Uids(1000..=1999), quota(1.0, 5), Share::Together)];
    let limits = self::limits(&Settings { caller: layers, ..open() });
    assert_eq!(passes(&limits, 1000, JWT, &entries(&["a"])), 5);
    let refusal = call(&limits, 1999, JWT, &entries(&["a"])).unwrap_err();
    assert_eq!(refusal.key_type, KeyType::Shared);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_counts_and_refuses_nothing() {
    let mut dry = Rule::new(quota(1.0, 10));
    dry.dry_run = true;
    let dry_layers = Layers { default: dry, methods: vec![], overrides: vec![] };
    for (case, settings) in [
        ("one rule", Settings { caller: dry_layers, ..open() }),
        ("whole", Settings { caller: Layers::new(quota(1.0, 10)), dry_run: true, ..open() }),
    ] {
        let recorder = PrometheusBuilder::new().build_recorder();
        let limits = Limits::new(&settings, Clock::SYSTEM, &recorder).unwrap();
        assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 10_000, "{case}");
        let seen = text_of(&recorder);
        let of = |name: &str| {
            let labels = r#"method="FetchJWTSVID",stage="caller",key_type="uid""#;
            seen.iter()
                .find(|(key, _)| key.starts_with(name) && key.contains(labels))
                .map(|(_, value)| *value)
        };
        assert_eq!(of("durward_rate_limit_allowed_total"), Some(10.0), "{case}");
        assert_eq!(of("durward_rate_limit_would_exceed_total"), Some(9990.0), "{case}");
        assert_eq!(of("durward_rate_limit_exceeded_total"), None, "{case}");
        assert_eq!(limits.events(), [], "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn counters_hold_no_name_of_a_caller() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let settings = Settings {
        caller: Layers::new(quota(1.0, 10)),
        soft_limits: SoftLimits::new(&[50, 90]).unwrap(),
        ..open()
    };
    let limits = Limits::new(&settings, Clock::SYSTEM, &recorder).unwrap();
    assert_eq!(passes(&limits, 424_242, JWT, &entries(&["secret-name"])), 10);
    limits.keys();
    let seen = text_of(&recorder);
    let value = |key: &str| seen.get(key).copied();
    let labels = r#"method="FetchJWTSVID",stage="caller",key_type="uid""#;
    assert_eq!(value(&format!("durward_rate_limit_exceeded_total{{{labels},reason=\"rate\"}}")), Some(1.0));
    assert_eq!(value(&format!("durward_rate_limit_allowed_total{{{labels}}}")), Some(10.0));
    for (step, want) in [("50", Some(1.0)), ("80", None), ("90", Some(1.0))] {
        let key = format!("durward_rate_limit_soft_limit_total{{stage=\"caller\",step=\"{step}\"}}");
        assert_eq!(value(&key), want, "{step}");
    }
    assert_eq!(value(r#"durward_rate_limit_keys{stage="caller"}"#), Some(1.0));
    let text = recorder.handle().render();
    assert!(!text.contains("424242") && !text.contains("secret"));
    let series = text.lines().filter(|line| line.starts_with("durward_rate_limit")).count();
    assert!(series < 1000, "{series} series, registered once");
}

#[tokio::test(start_paused = true)]
async fn refusals_are_told_when_they_begin_and_end() {
    let limits = limits(&Settings { caller: Layers::new(quota(1.0, 10)), ..open() });
    let web = entries(&["web"]);
    for _ in 0..100 {
        let _ = call(&limits, 1, JWT, &web);
    }
    let name = |event: &Event| match event {
        Event::RefusalStarted { stage, name } => format!("start {} {name}", stage.label()),
        Event::RefusalEnded { stage, name, count } => format!("end {} {name} {count}", stage.label()),
        Event::RefusalsUnlisted { count } => format!("unlisted {count}"),
    };
    let told = || limits.events().iter().map(name).collect::<Vec<_>>();
    assert_eq!(told(), ["start caller uid:1"]);
    assert!(told().is_empty());
    advance(QUIET).await;
    assert_eq!(told(), ["end caller uid:1 90"]);
    for uid in 0..1000 {
        passes(&limits, uid, JWT, &web);
    }
    assert!(told().len() <= LISTED + 1);
    let heaviest = limits.heaviest(1);
    assert_eq!(
        (heaviest[0].0, heaviest[0].1.name.to_string(), heaviest[0].1.refused),
        (Stage::Caller, "uid:1".into(), 91)
    );
}

#[tokio::test(start_paused = true)]
async fn a_window_brings_another_limit() {
    // A Monday, 8:59:50.
    let clock =
        Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_392_000 + 9 * 3600 - 10));
    let at = |hour| Moment { weekday: Some(Weekday::Monday), hour: Some(hour), ..Moment::default() };
    let window = Window::new(at(9), at(17)).unwrap();
    let mut rule = Rule::new(quota(1.0, 10));
    rule.schedule = Schedule::new(vec![(window, Limit::Block)]);
    let settings =
        Settings { caller: Layers { default: rule, methods: vec![], overrides: vec![] }, ..open() };
    let limits = Limits::new(&settings, clock, &metrics::NoopRecorder).unwrap();
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 10);
    advance(Duration::from_secs(10)).await;
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 0, "nine o'clock");
    advance(Duration::from_secs(8 * 3600)).await;
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 10, "seventeen o'clock");
}

#[tokio::test(start_paused = true)]
async fn a_reload_keeps_what_was_spent_and_takes_all_or_nothing() {
    let with = |rate, burst| Settings { caller: Layers::new(quota(rate, burst)), ..open() };
    let limits = limits(&with(1.0, 10));
    let web = entries(&["web"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 10);
    limits.reload(&with(1000.0, 25)).unwrap();
    assert_eq!(passes(&limits, 1, JWT, &web), 15, "ten of twenty-five are spent");
    let wrong = Settings { keys: 3, ..with(1.0, 1000) };
    assert_eq!(limits.reload(&wrong), Err(SettingsError::Keys(3)));
    assert_eq!(passes(&limits, 2, JWT, &web), 25, "nothing has changed");
    let running = limits.admit_caller(Uid(3), JWT).unwrap();
    limits.reload(&with(1.0, 10)).unwrap();
    drop(running);
    assert_eq!(limits.left_to_caller(CallerKey::Uid(3), JWT), Some((9, 10)));
    let unavailable = Settings { rejection_status: RejectionStatus::Unavailable, ..with(1.0, 10) };
    limits.reload(&unavailable).unwrap();
    assert_eq!(call(&limits, 1, JWT, &web).unwrap_err().code(), tonic::Code::Unavailable);
}

#[test]
fn settings_that_contradict_are_errors() {
    let foreign = {
        let mut layers = Layers::new(Limit::Unlimited);
        layers.overrides =
            vec![over(IdPattern::parse("spiffe://other/a").unwrap(), Limit::Block, Share::Each)];
        Settings { identity: layers, ..open() }
    };
    let node_twice = NodeSettings { methods: vec![(JWT, None); 2], ..NodeSettings::default() };
    let gate = |connections, reserve| Settings {
        gate: GateSettings { connections: NonZeroU32::new(connections), reserve, ..GateSettings::default() },
        ..open()
    };
    let ours = durward::identity::TrustDomain::parse("td").unwrap();
    for (case, settings, want) in [
        (
            "foreign pattern",
            foreign,
            "identity: \"spiffe://other/a\" matches nothing: the trust domain is td",
        ),
        ("few keys", Settings { keys: 15, ..open() }, "keys 15 must be from 16 to 16777216"),
        ("node twice", Settings { node: node_twice, ..open() }, "node: FetchJWTSVID has two rules"),
        ("reserve", gate(10, 10), "gate: reserve 10 must be below connections"),
    ] {
        assert_eq!(settings.check(Some(&ours)).map_err(|err| err.to_string()), Err(want.into()), "{case}");
    }
    assert_eq!(SoftLimits::new(&[80, 81]), Err(SettingsError::Step(81)));
    let settings = gate(100, 10);
    let limits = limits(&settings);
    let err = Gate::new(&settings, 100, None, &limits).unwrap_err();
    assert_eq!(err, SettingsError::Descriptors { connections: 100, needed: 64 + 12 + 16 + 200, limit: 100 });
}

fn gate(gate: GateSettings) -> Gate {
    let settings = Settings { gate, ..open() };
    Gate::new(&settings, 1 << 20, None, &limits(&settings)).unwrap()
}

fn number(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).unwrap()
}

fn rule(connections: u32, rate: Limit) -> GateRule {
    GateRule { connections: NonZeroU32::new(connections), rate, dry_run: false }
}

#[tokio::test(start_paused = true)]
async fn the_gate_asks_the_caller_first() {
    let gate = gate(GateSettings {
        default: rule(3, quota(1.0, 10)),
        overrides: vec![Override {
            pattern: CallerPattern::One(CallerKey::Uid(9)),
            methods: Methods::All,
            rule: Some(rule(1, Limit::Block)),
            share: Share::Each,
            place: "test".into(),
        }],
        connections: Some(number(100)),
        reserve: 10,
        admin: 2,
        ..GateSettings::default()
    });
    let open = |uid| gate.open(CallerKey::Uid(uid)).map_err(|it| (it.stage, it.reason, it.retry_after));
    assert_eq!(open(9).err(), Some((Stage::Gate, Reason::Blocked, Duration::ZERO)));
    let held: Vec<Permit> = (0..3).map(|_| open(1).unwrap()).collect();
    assert_eq!(open(1).err(), Some((Stage::Gate, Reason::Connections, Duration::ZERO)));
    assert!(open(2).is_ok(), "another caller");
    drop(held);
    assert_eq!(gate.connections(), 0);
    let refused = gate.report(1)[0].refused;
    assert_eq!(refused, 1, "people are shown that it held too many");
    // Seven tokens are left: a refused connection took none.
    for _ in 0..7 {
        drop(open(1).unwrap());
    }
    assert_eq!(open(1).err(), Some((Stage::Gate, Reason::Rate, Duration::from_secs(1))));
    advance(Duration::from_secs(1)).await;
    assert!(open(1).is_ok());
    let admin: Vec<_> = (0..2).map(|_| gate.open_admin().unwrap()).collect();
    assert!(gate.open_admin().is_err());
    drop(admin);
    assert!(gate.open_admin().is_ok());
}

#[tokio::test(start_paused = true)]
async fn memory_pressure_stops_those_who_have_first() {
    let gate = gate(GateSettings { default: rule(50, Limit::Unlimited), ..GateSettings::default() });
    let (one, two) = (CallerKey::Uid(1), CallerKey::Uid(2));
    let held: Vec<Permit> = (0..5).map(|_| gate.open(one).unwrap()).collect();
    for (pressure, has, new) in [
        (Pressure::None, true, true),
        (Pressure::ShrinkCaches, true, true),
        (Pressure::RefuseNew, false, true),
        (Pressure::CloseHeaviest, false, false),
    ] {
        gate.set_pressure(pressure);
        assert_eq!((gate.open(one).is_ok(), gate.open(two).is_ok()), (has, new), "{pressure:?}");
    }
    assert_eq!(gate.heaviest(1), [(one, 5)]);
    drop(held);
}

/// By default no caller has more than a tenth of the places, so that a small budget of memory is not one caller's.
#[test]
fn a_caller_has_a_part_of_the_node() {
    for (node, most) in [(20, 8), (100, 10), (307, 30), (640, 64), (9_000, 64)] {
        let settings =
            GateSettings { connections: Some(number(node)), reserve: 0, ..GateSettings::default() };
        let gate = gate(settings);
        let held: Vec<Permit> = std::iter::from_fn(|| gate.open(CallerKey::Uid(1)).ok()).collect();
        assert_eq!(held.len(), most, "of {node}");
    }
}

/// Who calls on a new connection each time still holds the last one, as far as the agent knows.
#[test]
fn one_connection_is_as_good_as_none_for_the_reserve() {
    let gate = gate(GateSettings {
        default: rule(50, Limit::Unlimited),
        connections: Some(number(20)),
        reserve: 10,
        ..GateSettings::default()
    });
    let (greedy, polite) = (CallerKey::Uid(1), CallerKey::Uid(2));
    let held: Vec<Permit> = (0..20).map_while(|_| gate.open(greedy).ok()).collect();
    assert_eq!(held.len(), 10);
    let mut last = gate.open(polite).unwrap();
    for _ in 0..100 {
        last = gate.open(polite).unwrap();
    }
    let _second = gate.open(polite).unwrap();
    assert!(gate.open(polite).is_err(), "the reserve is not for a third");
    drop(last);
}

#[test]
fn descriptors_and_memory_bound_the_connections() {
    let settings = open();
    for (case, nofile, budget, most) in [
        ("descriptors", 1024, None, 408),
        ("memory", 1 << 20, Some(24 << 20), 96),
        ("descriptors are fewer", 1024, Some(1 << 30), 408),
    ] {
        let settings = Settings {
            gate: GateSettings { default: rule(5000, Limit::Unlimited), ..settings.gate.clone() },
            ..settings.clone()
        };
        let gate = Gate::new(&settings, nofile, budget, &limits(&settings)).unwrap();
        let held: Vec<Permit> = (0..5000).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
        assert_eq!(held.len(), most, "{case}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever some callers open and close, the next that holds nothing gets in while the reserve lasts.
    #[test]
    fn a_newcomer_finds_the_gate_open(
        moves in prop::collection::vec((0..6_u32, any::<bool>(), 1..20_usize), 0..60),
        newcomers in 1..10_u32,
    ) {
        let gate = gate(GateSettings {
            default: rule(15, Limit::Quota(Quota::new(1e6, Per::Second, 1_000_000).unwrap())),
            connections: Some(number(60)),
            // Two for each of the six, and one for each newcomer.
            reserve: 22,
            ..GateSettings::default()
        });
        let mut held: Vec<(u32, Permit)> = vec![];
        for (uid, close, times) in moves {
            for _ in 0..times {
                let at = held.iter().position(|(owner, _)| *owner == uid);
                match (close, at) {
                    (true, Some(at)) => drop(held.swap_remove(at)),
                    (true, None) => {}
                    (false, _) => held.extend(gate.open(CallerKey::Uid(uid)).ok().map(|permit| (uid, permit))),
                }
                prop_assert!(gate.connections() <= 60);
                prop_assert_eq!(usize::try_from(gate.connections()).unwrap(), held.len());
                let own = held.iter().filter(|(owner, _)| *owner == uid).count();
                prop_assert!(own <= 15);
            }
        }
        for uid in 0..newcomers {
            let permit = gate.open(CallerKey::Uid(1000 + uid));
            prop_assert!(permit.is_ok(), "{permit:?}");
            held.push((1000 + uid, permit.unwrap()));
        }
    }
}
