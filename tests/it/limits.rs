//! The limits as the services ask them: what is charged, what comes back, what is told.

use std::{
    collections::BTreeMap,
    num::NonZeroU32,
    time::{Duration, SystemTime},
};

use durward::{
    api::status::RequestError,
    identity::SpiffeId,
    limits::{
        Admitted, Attestations, CallerKey, ConnectionPermit, ConnectionRefusal, ConnectionSettings, Families,
        Gate, GatePlaces, GatePlan, GateRule, GateRules, GateSettings, LimitSettings, Limits, Method,
        NodeQuota, NodeSettings, Refusal, RejectionStatus, SoftLimits, TableSize,
        attempt::Attempt,
        bucket::{Per, Quota},
        budget::{ADMIN_CONNECTION, HTTP2, NEWCOMER, Pressure, SPARE, connection_at_most},
        caller::{Caller, NthCall},
        caller_pattern::CallerPattern,
        gate_plan::NoRoomError,
        gate_settings::GatePlacesError,
        holding::Notice,
        id_pattern::IdPattern,
        method::PerMethod,
        pattern::Pattern,
        policy::{Layers, Methods, Override, Overrides, Share},
        refusal::{ChargedAs, Reason, Remainder, Stage},
        report::{BucketName, Event, Heavy, LISTED, QUIET, Standing, foremost},
        room::Short,
        rule::{Costs, Limit, Origin, Rule},
        schedule::{Moment, Schedule, Weekday, Window},
    },
    os::clock::Clock,
    telemetry::registry::{Label as _, Registry},
};
use futures_util::FutureExt as _;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use proptest::prelude::*;
use tokio::time::{Instant, advance};

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

fn rule(limit: Limit) -> Rule {
    Rule::new(limit, Costs::OF_CALLERS, Schedule::default()).unwrap()
}

fn layers<P>(limit: Limit) -> Layers<P> {
    Layers::new(rule(limit))
}

/// The same bucket of the node for each method.
fn node(quota: Option<Quota>) -> NodeSettings {
    NodeSettings { quotas: PerMethod::all(quota.map(NodeQuota::set)), ..NodeSettings::default() }
}

/// No limit anywhere, for a test to set one.
fn open() -> LimitSettings {
    LimitSettings {
        caller: layers(Limit::Unlimited),
        identity: layers(Limit::Unlimited),
        node: node(None),
        ..LimitSettings::default()
    }
}

fn limits(settings: &LimitSettings) -> Limits {
    Limits::new(settings, Clock::SYSTEM, Registry::new(&metrics::NoopRecorder))
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

#[tokio::test(start_paused = true)]
async fn who_sleeps_while_nobody_calls_is_woken_by_the_first_call_served_or_refused() {
    let limits = limits(&LimitSettings { caller: layers(quota(1.0, 5)), ..open() });
    for refused in [false, true] {
        while refused && call(&limits, 7, JWT, &[]).is_ok() {}
        let mut stirred = std::pin::pin!(limits.stirred());
        assert!(stirred.as_mut().now_or_never().is_none(), "nobody calls");
        if !refused {
            let hour = Duration::from_secs(3600);
            assert!(tokio::time::timeout(hour, &mut stirred).await.is_err(), "nobody calls");
        }
        assert_eq!(call(&limits, 7, JWT, &[]).is_err(), refused);
        assert!(stirred.as_mut().now_or_never().is_some(), "somebody called");
    }
}

/// How many calls pass before one is refused.
fn passes(limits: &Limits, uid: u32, method: Method, entries: &[SpiffeId]) -> u32 {
    (0..10_000).find(|_| call(limits, uid, method, entries).is_err()).unwrap_or(10_000)
}

fn tokens(standing: Standing) -> Option<(u32, u32)> {
    match standing {
        Standing::Tokens { left, quota, .. } => Some((left, quota.burst())),
        Standing::Unlimited | Standing::Exempt | Standing::Blocked => None,
    }
}

fn left_to_caller(limits: &Limits, caller: CallerKey, method: Method) -> Option<(u32, u32)> {
    tokens(limits.caller_standing(caller, method).1)
}

fn left_to_identity(limits: &Limits, id: &SpiffeId, method: Method) -> Option<(u32, u32)> {
    tokens(limits.identity_standing(id, method).1)
}

fn text_of(recorder: &PrometheusRecorder) -> BTreeMap<String, f64> {
    let text = recorder.handle().render();
    let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
    lines
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .filter(|(_, value)| *value != 0.0)
        .collect()
}

#[tokio::test(start_paused = true)]
async fn each_caller_and_method_has_its_own_bucket() {
    let limits = limits(&LimitSettings { caller: layers(quota(1.0, 10)), ..open() });
    let web = entries(&["web"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 10);
    assert_eq!(passes(&limits, 1, Method::FetchX509Svid, &web), 10, "another method");
    assert_eq!(passes(&limits, 1, Method::ValidateJwtSvid, &[]), 10, "the one without identity");
    assert_eq!(passes(&limits, 2, JWT, &web), 10, "another caller");
    let refusal = call(&limits, 1, JWT, &web).unwrap_err();
    assert_eq!(
        (refusal.stage, refusal.charged_as, refusal.reason, refusal.shed, refusal.status),
        (Stage::Caller, ChargedAs::Uid, Reason::Rate, false, RejectionStatus::ResourceExhausted)
    );
    let text =
        "rate limit exceeded for /SpiffeWorkloadAPI/FetchJWTSVID: the caller's user has no tokens left";
    assert_eq!(refusal.to_string(), text);
    advance(refusal.retry_after - Duration::from_millis(1)).await;
    assert!(call(&limits, 1, JWT, &web).is_err(), "too early");
    advance(Duration::from_millis(1)).await;
    assert_eq!(call(&limits, 1, JWT, &web), Ok(()), "the wait was true");
    assert_eq!(left_to_caller(&limits, CallerKey::Uid(1), JWT), Some((0, 10)));
    assert_eq!(left_to_caller(&limits, CallerKey::Uid(77), JWT), Some((10, 10)), "never seen");
}

/// What was asked at most in a second is what people choose a limit by.
#[tokio::test(start_paused = true)]
async fn the_most_in_a_second_is_known() {
    let limits = limits(&LimitSettings { caller: layers(quota(1.0, 50)), ..open() });
    let most = || limits.heaviest(1)[0].1.most;
    for _ in 0..20 {
        advance(Duration::from_millis(100)).await;
        let _passed: Result<(), Refusal> = call(&limits, 1, JWT, &[]);
    }
    assert!((9..=11).contains(&most()), "{}", most());
    for _ in 0..200 {
        let _passed: Result<(), Refusal> = call(&limits, 1, JWT, &[]);
    }
    assert!((200..=211).contains(&most()), "refused ones too: {}", most());
    advance(Duration::from_secs(10)).await;
    let _passed: Result<(), Refusal> = call(&limits, 1, JWT, &[]);
    assert!(most() >= 200, "and stays known");
}

/// By that number an admin chooses a rate, whatever refuses meanwhile.
#[tokio::test(start_paused = true)]
async fn connections_beyond_their_number_count_in_the_busiest_second() {
    let settings = LimitSettings {
        gate: GateSettings {
            rules: rules(GateRule { connections: Some(number(5)), ..GateRule::default() }),
            ..GateSettings::default()
        },
        ..open()
    };
    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, AMPLE).unwrap(), &limits(&settings));
    let tries: Vec<_> = (0..55).map(|_| gate.open(CallerKey::Uid(1))).collect();
    assert_eq!(tries.iter().filter(|it| it.is_ok()).count(), 5);
    let row = gate.report(1).pop().unwrap();
    assert_eq!((row.used, row.refused, row.most), (5, 50, 55));
}

/// A connection counts once, however often it asks while it waits for room, whatever becomes of it; and each that is let in
/// counts as that, whether there was a token for it or not.
#[tokio::test(start_paused = true)]
async fn a_connection_that_waits_is_counted_once() {
    use Attempt as A;
    for (case, short, tries, come, let_in) in [
        ("let in at once", None, &[A::First][..], 300, 300),
        ("refused at last", Some(Short::Processor), &[A::First, A::Again, A::Again, A::Last], 300, 200),
        ("refused at once", Some(Short::Processor), &[A::Only], 300, 200),
    ] {
        let limits = limits(&open());
        let gate = Gate::new(GatePlan::new(&open(), 1 << 20, AMPLE).unwrap(), &limits);
        if let Some(short) = short {
            limits.room().set(short, true);
        }
        let open = |_| tries.iter().find_map(|attempt| gate.open_on(CallerKey::Uid(1), *attempt).ok());
        let held: Vec<ConnectionPermit> = (0..come).filter_map(open).collect();
        let row = gate.report(1).pop().unwrap();
        let counted = (held.len(), row.used, row.refused, row.most);
        let passed = usize::try_from(let_in).unwrap();
        assert_eq!(counted, (passed, let_in, come - let_in, come), "{case}");
    }
}

/// What found no memory before it could be admitted is refused for that: in the log and for who looks.
#[test]
fn a_call_for_which_there_was_no_memory_is_shown() {
    let limits = limits(&open());
    limits.note_out_of_memory(CallerKey::Uid(1), JWT);
    let [(Stage::Caller, row)] = &limits.heaviest(9)[..] else { panic!("{:?}", limits.heaviest(9)) };
    assert_eq!((row.name.to_string(), row.what, row.used, row.refused), ("uid:1".into(), JWT.rpc(), 0, 1));
    let told = limits.events();
    let [Event::Refusing { what, times: 1, .. }] = &told[..] else { panic!("{told:?}") };
    assert_eq!((what.stage, what.method, what.reason), (Stage::Node, Some(JWT), Reason::Memory));
}

#[test]
fn a_refusal_says_what_was_short_and_whose() {
    use {ChargedAs as K, Origin as O, Reason as R, Stage as S};
    for (stage, charged_as, reason, origin, want) in [
        (S::Caller, K::Uid, R::Rate, O::Set, "the caller's user has no tokens left"),
        (
            S::Caller,
            K::Pod,
            R::Rate,
            O::ByDefault,
            "the caller's pod has no tokens left, and the agent is short of processor time",
        ),
        (S::Caller, K::Shared, R::Rate, O::Set, "the callers that share its bucket have no tokens left"),
        (
            S::Caller,
            K::Overflow,
            R::Rate,
            O::Set,
            "the callers without a bucket of their own have no tokens left",
        ),
        (S::Caller, K::Uid, R::Blocked, O::Set, "the caller is blocked"),
        (S::Caller, K::Uid, R::InFlight, O::ByDefault, "too many calls of the caller are being attested"),
        (S::Node, K::Node, R::InFlight, O::ByDefault, "too many callers are being attested"),
        (S::Identity, K::SpiffeId, R::Rate, O::Set, "spiffe://example.org/web has no tokens left"),
        (
            S::Identity,
            K::Shared,
            R::Rate,
            O::Set,
            "the bucket that spiffe://example.org/web shares has no tokens left",
        ),
        (S::Identity, K::SpiffeId, R::Blocked, O::Set, "spiffe://example.org/web is blocked"),
        (S::Node, K::Node, R::Rate, O::Set, "all callers of the node together have no tokens left"),
    ] {
        let (retry_after, status) = (Duration::ZERO, RejectionStatus::Unavailable);
        let refusal = Refusal {
            method: JWT,
            stage,
            charged_as,
            reason,
            retry_after,
            each: Duration::ZERO,
            shed: false,
            status,
            origin,
            rest: Remainder::Nothing,
            spiffe_id: (stage == S::Identity).then(|| SpiffeId::parse("spiffe://example.org/web").unwrap()),
        };
        let text = format!("rate limit exceeded for /SpiffeWorkloadAPI/FetchJWTSVID: {want}");
        assert_eq!(refusal.to_string(), text);
        if charged_as == K::SpiffeId && reason == R::Rate {
            let kept = Refusal { rest: Remainder::KeptForOthers, ..refusal };
            assert_eq!(kept.to_string(), format!("{text}, but those kept for callers that took less"));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn several_identities_are_charged_together_or_not_at_all() {
    let limits = limits(&LimitSettings {
        caller: layers(quota(1.0, 1000)),
        identity: layers(quota(1.0, 10)),
        node: node(Some(Quota::new(1.0, Per::Second, 100).unwrap())),
        ..open()
    });
    let (a, b, both) = (entries(&["a"]), entries(&["b"]), entries(&["a", "b"]));
    assert_eq!(passes(&limits, 1, JWT, &a), 10);
    assert_eq!(
        left_to_caller(&limits, CallerKey::Uid(1), JWT),
        Some((990, 1000)),
        "ten passed; the refused one is back"
    );
    for _ in 0..500 {
        let refusal = call(&limits, 2, JWT, &both).unwrap_err();
        assert_eq!((refusal.stage, refusal.charged_as), (Stage::Identity, ChargedAs::SpiffeId));
    }
    assert_eq!(
        left_to_caller(&limits, CallerKey::Uid(2), JWT),
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
    let limits = limits(&LimitSettings { identity: layers(quota(1.0, 10)), ..open() });
    let both = entries(&["a", "b"]);
    let id = |name: &str| SpiffeId::parse(&format!("spiffe://td/{name}")).unwrap();
    for method in [Method::FetchX509Bundles, Method::FetchJwtBundles, Method::FetchWitBundles] {
        assert_eq!(passes(&limits, 1, method, &both), 10, "{method:?}");
        assert_eq!(left_to_identity(&limits, &id("a"), method), Some((0, 10)), "{method:?}");
        assert_eq!(left_to_identity(&limits, &id("b"), method), Some((10, 10)), "{method:?}");
    }
    assert_eq!(call(&limits, 1, Method::FetchX509Bundles, &[]), Ok(()), "a caller without identity");
}

#[tokio::test(start_paused = true)]
async fn the_node_is_asked_last_and_sheds() {
    let node = |burst| node(Some(Quota::new(1.0, Per::Second, burst).unwrap()));
    let settings = LimitSettings {
        caller: layers(quota(1.0, 100)),
        identity: layers(quota(1.0, 100)),
        node: node(10),
        ..open()
    };
    let limits = limits(&settings);
    for (method, entries) in [(JWT, entries(&["a"])), (Method::ValidateJwtSvid, vec![])] {
        assert_eq!(passes(&limits, 1, method, &entries), 10);
        let refusal = call(&limits, 1, method, &entries).unwrap_err();
        assert_eq!(
            (refusal.stage, refusal.charged_as, refusal.reason, refusal.shed, refusal.status),
            (Stage::Node, ChargedAs::Node, Reason::Rate, true, RejectionStatus::Unavailable)
        );
        assert_eq!(refusal.retry_after, Duration::from_secs(1));
        assert_eq!(left_to_caller(&limits, CallerKey::Uid(1), method), Some((90, 100)), "given back");
    }
    let id = SpiffeId::parse("spiffe://td/a").unwrap();
    assert_eq!(left_to_identity(&limits, &id, JWT), Some((90, 100)), "given back");
    // Reload: what was spent stays so, with the same quota and with another.
    for burst in [10, 25] {
        limits.reload(&LimitSettings { node: node(burst), ..settings.clone() });
        assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), burst - 10);
        limits.reload(&settings);
    }
    // Nor does a reload there and back bring tokens, whatever the quota was meanwhile.
    limits.reload(&LimitSettings { node: node(40), ..settings.clone() });
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 15, "25 of 40 were spent");
    for meanwhile in [node(10), self::node(None), node(40)] {
        limits.reload(&LimitSettings { node: meanwhile, ..settings.clone() });
        limits.reload(&LimitSettings { node: node(40), ..settings.clone() });
        assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_pays_what_it_cost() {
    let rule = Rule::new(quota(1.0, 100), Costs::new(1, 5, 20).unwrap(), Schedule::default()).unwrap();
    let (caller, identity) = (Layers::new(rule.clone()), Layers::new(rule));
    let limits = limits(&LimitSettings { caller, identity, ..open() });
    let web = entries(&["web"]);
    let id = &web[0];
    let left = || {
        let of = |left: Option<(u32, u32)>| left.unwrap().0;
        (of(left_to_caller(&limits, CallerKey::Uid(1), JWT)), of(left_to_identity(&limits, id, JWT)))
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
    let attestations = Attestations::new(Some(number(12)), Some(number(12))).unwrap();
    let node = NodeSettings { attestations, ..node(None) };
    let limits = limits(&LimitSettings { caller: layers(quota(1.0, 100)), node, ..open() });
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
        left_to_caller(&limits, CallerKey::Uid(3), JWT),
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

/// Layers with these overrides, for all methods.
fn over<P: Pattern>(limit: Limit, overrides: Vec<(P, Share<Rule>)>) -> Layers<P> {
    let each = |(pattern, share)| Override::new(pattern, Methods::All, share).unwrap();
    let overrides = Overrides::new(overrides.into_iter().map(each).collect()).unwrap();
    Layers { overrides, ..layers(limit) }
}

#[tokio::test(start_paused = true)]
async fn exempt_unlimited_and_blocked() {
    let caller = |uid, limit| (CallerPattern::One(CallerKey::Uid(uid)), Share::Each(rule(limit)));
    let overrides = vec![caller(1, Limit::Exempt), caller(2, Limit::Unlimited), caller(3, Limit::Block)];
    let caller = over(quota(1.0, 10), overrides);
    let node = node(Some(Quota::new(1.0, Per::Second, 100).unwrap()));
    let limits = limits(&LimitSettings { caller, node, ..open() });
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
    let exempt = (CallerPattern::One(CallerKey::Uid(1)), Share::Each(rule(Limit::Exempt)));
    let caller = over(Limit::Unlimited, vec![exempt]);
    let limits = limits(&LimitSettings { caller, identity: layers(quota(1.0, 10)), ..open() });
    let web = entries(&["web"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 10_000);
    assert_eq!(passes(&limits, 2, JWT, &web), 10);
}

/// A rehearsal of one caller's gate rule is of that rule alone: what all share is asked all the same.
#[tokio::test(start_paused = true)]
async fn a_rehearsal_at_the_gate_takes_no_places_of_others() {
    let rehearsed = GateRule { dry_run: true, ..gate_rule(8, quota(1.0, 10)) };
    let rehearsed = (CallerPattern::One(CallerKey::Uid(9)), rehearsed);
    let settings = GateSettings {
        rules: GateRules::new(gate_rule(8, quota(1.0, 10)), vec![rehearsed]).unwrap(),
        places: places(100, 10),
        ..GateSettings::default()
    };
    let gate = gate_within(settings, 24 << 20);
    let mut held: Vec<ConnectionPermit> = std::iter::from_fn(|| gate.open(CallerKey::Uid(9)).ok()).collect();
    assert_eq!(held.len(), 70, "its own limits are rehearsed, and the reserve is not its own");
    let others: Vec<ConnectionPermit> =
        (100..110).filter_map(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(others.len(), 10);
    drop(others);
    held.truncate(3);
    gate.look(Some(24 << 20), 0);
    assert_eq!(gate.open(CallerKey::Uid(9)).err(), Some(ConnectionRefusal::MemoryTaken), "nor is memory");
}

/// Whoever can be many callers is one for the reserve, for the places and for the attestations.
#[tokio::test(start_paused = true)]
async fn a_user_with_subordinate_uids_is_one() {
    let families = Families::parse("somebody:100000:65536\n", |_| None);
    let settings = LimitSettings {
        families,
        gate: GateSettings { places: places(100, 10), ..GateSettings::default() },
        ..LimitSettings::default()
    };
    let limits = limits(&settings);
    let gate = Gate::new(GatePlan::new(&settings, 20_000, AMPLE).unwrap(), &limits);
    let held: Vec<ConnectionPermit> =
        (100_000..100_200).filter_map(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(held.len(), 70, "while there is room");
    let refused = gate.open(CallerKey::Uid(100_199)).err();
    assert_eq!(refused, Some(ConnectionRefusal::Descriptors), "though this one of it has no connection");
    let others: Vec<ConnectionPermit> =
        (1..200).filter_map(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(
        others.len(),
        28,
        "users have the rest, the reserve included, but for two that are for those with a few"
    );
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
    let attestations = Attestations::new(Some(number(1)), None).unwrap();
    let node = NodeSettings { attestations, dry_run: true, ..node(None) };
    let limits = limits(&LimitSettings { node, ..open() });
    let held: Vec<_> = (0..10).map(|uid| limits.admit_caller(Uid(uid % 2), JWT).unwrap()).collect();
    assert_eq!(held.len(), 10);
}

#[tokio::test(start_paused = true)]
async fn a_mask_makes_one_bucket_of_many() {
    let pattern = |text: &str| IdPattern::parse(text).unwrap();
    let overrides = vec![
        (pattern("spiffe://td/ns/{ns}/**"), Share::Together(None)),
        (pattern("spiffe://td/ns/prod/sa/big"), Share::Each(rule(quota(1.0, 7)))),
    ];
    let limits = limits(&LimitSettings { identity: over(quota(1.0, 10), overrides), ..open() });
    assert_eq!(passes(&limits, 1, JWT, &entries(&["ns/prod/sa/a"])), 10);
    assert_eq!(passes(&limits, 2, JWT, &entries(&["ns/prod/sa/b"])), 0, "the same bucket");
    assert_eq!(passes(&limits, 1, JWT, &entries(&["ns/prod/sa/big"])), 7, "a rule that says more");
    let four = entries(&["ns/test/sa/a", "ns/test/sa/b", "ns/test/sa/c", "ns/test/sa/a"]);
    assert_eq!(passes(&limits, 1, JWT, &four), 10, "one call charges a bucket once");
    assert_eq!(passes(&limits, 1, JWT, &entries(&["other"])), 10);
    let names: Vec<_> = limits.heaviest(10).iter().map(|(_, heavy)| heavy.name.to_string()).collect();
    assert!(names.contains(&"spiffe://td/ns/prod/**".to_owned()), "{names:?}");

    let together = (CallerPattern::Uids(1000..=1999), Share::Together(Some(rule(quota(1.0, 5)))));
    let caller = over(quota(1.0, 10), vec![together]);
    let limits = self::limits(&LimitSettings { caller, ..open() });
    assert_eq!(passes(&limits, 1000, JWT, &entries(&["a"])), 5);
    let refusal = call(&limits, 1999, JWT, &entries(&["a"])).unwrap_err();
    assert_eq!(refusal.charged_as, ChargedAs::Shared);
}

/// Four callers without end, and one that asks ten times a second, share an identity, then a mask, then the node.
#[tokio::test(start_paused = true)]
async fn what_callers_share_is_shared_fairly() {
    let of_all = Quota::new(50.0, Per::Second, 100).unwrap();
    let mask = (IdPattern::parse("spiffe://td/{any}").unwrap(), Share::Together(None));
    for (case, settings, stage) in [
        ("identity", LimitSettings { identity: layers(Limit::Quota(of_all)), ..open() }, Stage::Identity),
        (
            "mask",
            LimitSettings { identity: over(Limit::Quota(of_all), vec![mask]), ..open() },
            Stage::Identity,
        ),
        ("node", LimitSettings { node: node(Some(of_all)), ..open() }, Stage::Node),
    ] {
        let caller = layers(quota(10_000.0, 10_000));
        let limits = limits(&LimitSettings { caller, ..settings });
        let web = entries(&["web"]);
        let (mut loud, mut polite) = (0, 0);
        for tick in 0..3000 {
            advance(Duration::from_millis(10)).await;
            for uid in 1..=4 {
                loud += u32::from((0..5).filter(|_| call(&limits, uid, JWT, &web).is_ok()).count() > 0);
            }
            if tick % 10 == 0 {
                polite += u32::from(call(&limits, 5, JWT, &web).is_ok());
            }
        }
        assert_eq!(polite, 300, "{case}: whoever asks for less than its share is served");
        assert!(loud >= 100 + 40 * 30 - 300, "{case}: the others have what it leaves: {loud}");
        let refusal = call(&limits, 1, JWT, &web).unwrap_err();
        assert_eq!((refusal.stage, refusal.rest), (stage, Remainder::KeptForOthers), "{case}");

        // Who takes, and who goes without: in the log, and for who asks.
        let told = limits.events().into_iter().find_map(|event| match event {
            Event::Refusing { what, takings, .. } if what.stage == stage => Some(takings),
            _ => None,
        });
        let told = told.expect("it is told that it refuses");
        let (takes, goes_without) = (foremost(&told, |it| it.used), foremost(&told, |it| it.refused));
        for told in [takes, goes_without] {
            assert!(told.matches("uid:").count() == 3 && !told.contains("uid:5"), "{case}: {told}");
        }
        let heaviest = limits.heaviest(10);
        if stage == Stage::Identity {
            let shared =
                heaviest.iter().find(|(of, _)| *of == stage).map(|(_, heavy)| heavy.takings.clone()).unwrap();
            let polite = shared.iter().find(|taking| taking.caller == Some(CallerKey::Uid(5))).unwrap();
            assert_eq!((polite.used, polite.refused), (300, 0), "{case}");
            assert!(shared[0].refused > 1000, "{case}: {shared:?}");
        } else {
            let (_, all) = heaviest.iter().find(|(of, _)| *of == stage).unwrap();
            assert_eq!((&all.name, all.what), (&BucketName::Node, "FetchJWTSVID"), "{case}");
            assert!(all.refused > 1000 && all.takings.len() == 5, "{case}: {all:?}");
        }
        let refused = |uid| {
            let own =
                heaviest.iter().find(|(_, heavy)| heavy.name == BucketName::Caller(CallerKey::Uid(uid)));
            own.map_or(0, |(_, heavy)| heavy.refused)
        };
        assert!(refused(1) > 1000 && refused(5) == 0, "{case}: a refusal counts for its caller");
    }
}

/// One drains an identity's bucket, a mask's, callers', the node's. Then two come, with two calls each at any time that are tried again
/// exactly when they are told; and one that asks for nine tenths of its part.
#[tokio::test(start_paused = true)]
async fn whoever_takes_less_than_its_part_of_a_bucket_that_is_drained_is_served() {
    let of_all = Quota::new(1.0, Per::Second, 60).unwrap();
    let limit = Limit::Quota(of_all);
    let mask = (IdPattern::parse("spiffe://td/{any}").unwrap(), Share::Together(None));
    let callers = (CallerPattern::Uids(1..=4), Share::Together(None));
    for (case, settings) in [
        ("identity", LimitSettings { identity: layers(limit), ..open() }),
        ("mask", LimitSettings { identity: over(limit, vec![mask]), ..open() }),
        ("callers", LimitSettings { caller: over(limit, vec![callers]), ..open() }),
        ("node", LimitSettings { node: node(Some(of_all)), ..open() }),
    ] {
        let (limits, web) = (limits(&settings), entries(&["web"]));
        assert_eq!(passes(&limits, 1, JWT, &web), 60, "{case}");
        let refusal = call(&limits, 1, JWT, &web).unwrap_err();
        assert_eq!(refusal.rest, Remainder::Nothing, "{case}: {refusal}");
        let began = Instant::now();
        let part = Duration::from_secs(4).mul_f64(1.0 / 0.9);
        let mut due = [(2, began), (2, began), (3, began), (3, began), (4, began + part)];
        let (mut polite, mut others) = (Vec::new(), 0);
        while let Some((uid, at)) = due.iter_mut().min_by_key(|(_, at)| *at)
            && at.duration_since(began) < Duration::from_secs(120)
        {
            advance(at.saturating_duration_since(Instant::now())).await;
            let asked = call(&limits, *uid, JWT, &web);
            if *uid == 4 {
                polite.push(asked.is_ok());
                *at += part;
            } else {
                others += u32::from(asked.is_ok());
                *at += asked.err().map_or(Duration::ZERO, |refusal| refusal.retry_after);
            }
        }
        assert!(
            polite.len() >= 26 && polite.iter().skip(1).all(|is_served| *is_served),
            "{case}: {polite:?}"
        );
        // The part of the first one is for all again when it has not asked for long, and above half.
        assert!((50..=120 - 26).contains(&others), "{case}: {others}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_counts_and_refuses_nothing() {
    let mut dry_layers = layers(quota(1.0, 10));
    dry_layers.default.dry_run = true;
    for (case, settings) in [
        ("one rule", LimitSettings { caller: dry_layers, ..open() }),
        ("whole", LimitSettings { caller: layers(quota(1.0, 10)), dry_run: true, ..open() }),
    ] {
        let recorder = PrometheusBuilder::new().build_recorder();
        let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&recorder));
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
        let heaviest = &limits.heaviest(1)[0].1;
        assert_eq!((heaviest.used, heaviest.refused), (10, 9990), "{case}: as people are told");
        assert!(limits.is_dry_run(&heaviest.name, JWT), "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn counters_hold_no_name_of_a_caller() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let settings = LimitSettings {
        caller: layers(quota(1.0, 10)),
        soft_limits: SoftLimits::new(&[50, 90]).unwrap(),
        ..open()
    };
    let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&recorder));
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

/// Not that which a reload, or a window, has set since.
#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_with_the_limit_that_refused() {
    let few = quota(1.0, 5);
    for (case, settings) in [
        ("caller", LimitSettings { caller: layers(few), ..open() }),
        ("identity", LimitSettings { identity: layers(few), ..open() }),
        ("node", LimitSettings { node: node(Some(Quota::new(1.0, Per::Second, 5).unwrap())), ..open() }),
        (
            "gate",
            LimitSettings {
                gate: GateSettings {
                    rules: rules(GateRule { rate: Some(few), ..GateRule::default() }),
                    ..GateSettings::default()
                },
                ..open()
            },
        ),
    ] {
        let limits = limits(&settings);
        let plan = |settings| GatePlan::new(settings, 1 << 20, AMPLE).unwrap();
        let gate = Gate::new(plan(&settings), &limits);
        let _open: Vec<_> = (0..6).map(|_| gate.open(CallerKey::Uid(1))).collect();
        for _ in 0..6 {
            drop(call(&limits, 1, JWT, &entries(&["web"])));
        }
        limits.reload(&open());
        gate.reload(plan(&open()));
        let told = limits.events();
        let [Event::Refusing { what, times: 1, .. }] = &told[..] else { panic!("{case}: {told:?}") };
        let of = (what.stage.text(), what.origin, what.rate());
        assert_eq!(of, (case, Origin::Set, Some("1 a second, 5 at once".to_owned())));
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_are_told_when_they_begin_and_end() {
    let limits = limits(&LimitSettings { caller: layers(quota(1.0, 10)), ..open() });
    let web = entries(&["web"]);
    for _ in 0..100 {
        drop(call(&limits, 1, JWT, &web));
    }
    let name = |event: &Event| match event {
        Event::Refusing { what, times, .. } => {
            format!("{} {} {times}: {:?}", what.stage.text(), what.name, what.rate())
        }
        Event::RefusalEnded { what, count, .. } => format!("end {} {} {count}", what.stage.text(), what.name),
        Event::RefusalsUnlisted { count } => format!("unlisted {count}"),
    };
    let told = || limits.events().iter().map(name).collect::<Vec<_>>();
    assert_eq!(told(), [r#"caller uid:1 90: Some("1 a second, 10 at once")"#]);
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
    let schedule = Schedule::new(vec![(window, Limit::Block)]).unwrap();
    let rule = Rule::new(quota(1.0, 10), Costs::OF_CALLERS, schedule).unwrap();
    let settings = LimitSettings { caller: Layers::new(rule), ..open() };
    let limits = Limits::new(&settings, clock, Registry::new(&metrics::NoopRecorder));
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 10);
    advance(Duration::from_secs(10)).await;
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 0, "nine o'clock");
    advance(Duration::from_secs(8 * 3600)).await;
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 10, "seventeen o'clock");
}

/// Who is refused is told of the window that ends it.
#[tokio::test(start_paused = true)]
async fn a_wait_is_no_longer_than_to_the_window_that_ends_it() {
    let hourly = |burst| Limit::Quota(Quota::new(1.0, Per::Hour, burst).unwrap());
    // The window is from the 30th to the 40th second; the call comes so many seconds into the minute.
    for (case, usual, in_window, second, want) in [
        ("blocked for a while", quota(10.0, 5), Limit::Block, 31, 9),
        ("unlimited soon", hourly(5), Limit::Unlimited, 0, 30),
        ("unlimited, exempt from all", hourly(5), Limit::Exempt, 10, 20),
        ("slow for a while", Limit::Unlimited, hourly(5), 32, 8),
        ("blocked always", Limit::Block, Limit::Block, 0, u64::MAX),
        ("blocked later", quota(1.0, 5), Limit::Block, 0, 1),
    ] {
        let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_392_000));
        let at = |second| Moment { second: Some(second), ..Moment::default() };
        let schedule = Schedule::new(vec![(Window::new(at(30), at(40)).unwrap(), in_window)]).unwrap();
        let rule = Rule::new(usual, Costs::OF_CALLERS, schedule).unwrap();
        let settings = LimitSettings { caller: Layers::new(rule), ..open() };
        let limits = Limits::new(&settings, clock, Registry::new(&metrics::NoopRecorder));
        let web = entries(&["a"]);
        advance(Duration::from_secs(second)).await;
        passes(&limits, 1, JWT, &web);
        let wait = call(&limits, 1, JWT, &web).unwrap_err().wait();
        assert_eq!(wait, (want < u64::MAX).then(|| Duration::from_secs(want)), "{case}");
        if let Some(wait) = wait {
            advance(wait - Duration::from_millis(1)).await;
            assert!(call(&limits, 1, JWT, &web).is_err(), "{case}: too early");
            advance(Duration::from_millis(1)).await;
            assert_eq!(call(&limits, 1, JWT, &web), Ok(()), "{case}: the wait was true");
        }
    }
    // A faster one: not before it opens, and what is still missing then comes as fast as there.
    let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_392_000));
    let at = |second| Moment { second: Some(second), ..Moment::default() };
    let schedule = Schedule::new(vec![(Window::new(at(30), at(40)).unwrap(), quota(1.0, 5))]).unwrap();
    let rule = Rule::new(hourly(5), Costs::OF_CALLERS, schedule).unwrap();
    let settings = LimitSettings { caller: Layers::new(rule), ..open() };
    let limits = Limits::new(&settings, clock, Registry::new(&metrics::NoopRecorder));
    let web = entries(&["a"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 5);
    let wait = call(&limits, 1, JWT, &web).unwrap_err().retry_after;
    assert!((30.5..31.1).contains(&wait.as_secs_f64()), "{wait:?}");
    advance(wait).await;
    assert_eq!(call(&limits, 1, JWT, &web), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_window_gives_no_tokens_back() {
    let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_392_000));
    let at = |second| Moment { second: Some(second), ..Moment::default() };
    let few = Limit::Quota(Quota::new(1.0, Per::Hour, 5).unwrap());
    let schedule = Schedule::new(vec![(Window::new(at(30), at(33)).unwrap(), few)]).unwrap();
    let hourly = Limit::Quota(Quota::new(1.0, Per::Hour, 100).unwrap());
    let rule = Rule::new(hourly, Costs::OF_CALLERS, schedule).unwrap();
    let settings = LimitSettings { caller: Layers::new(rule), ..open() };
    let limits = Limits::new(&settings, clock, Registry::new(&metrics::NoopRecorder));
    assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 100);
    for _ in 0..3 {
        advance(Duration::from_secs(30)).await;
        assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 0, "in the window");
        advance(Duration::from_secs(30)).await;
        assert_eq!(passes(&limits, 1, JWT, &entries(&["a"])), 0, "after it");
    }
}

/// A fast window of a small bucket, in which nobody waits long, and which fills its own bucket alone.
#[tokio::test(start_paused = true)]
async fn a_window_has_a_bucket_of_its_own_size() {
    let clock = Clock::starting_at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_392_000));
    let at = |second| Moment { second: Some(second), ..Moment::default() };
    let schedule = Schedule::new(vec![(Window::new(at(30), at(42)).unwrap(), quota(10.0, 5))]).unwrap();
    let hourly = Limit::Quota(Quota::new(1.0, Per::Hour, 100).unwrap());
    let rule = Rule::new(hourly, Costs::OF_CALLERS, schedule).unwrap();
    let settings = LimitSettings { caller: Layers::new(rule), ..open() };
    let limits = Limits::new(&settings, clock, Registry::new(&metrics::NoopRecorder));
    let web = entries(&["a"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 100);
    assert_eq!(passes(&limits, 2, JWT, &web), 100);
    advance(Duration::from_secs(30)).await;
    for _ in 0..15 {
        advance(Duration::from_millis(700)).await;
        call(&limits, 1, JWT, &web).unwrap();
    }
    // The window began when it began, and not with the first call in it.
    assert_eq!(passes(&limits, 2, JWT, &web), 5);
    advance(Duration::from_secs(2)).await;
    assert_eq!(passes(&limits, 1, JWT, &web), 5, "what the window's bucket held at its end");
    assert_eq!(passes(&limits, 3, JWT, &web), 100, "a neighbour has all of its own");
}

#[tokio::test(start_paused = true)]
async fn a_reload_is_exact_in_both_directions() {
    let with = |limit| LimitSettings { caller: layers(limit), ..open() };
    let hourly = |burst| Limit::Quota(Quota::new(1.0, Per::Hour, burst).unwrap());
    let web = entries(&["web"]);
    for (case, first, spent, other, seconds, pass, back) in [
        ("smaller, and nobody waits longer than a refill", hourly(100), 100, quota(1.0, 5), 5, 5, 0),
        ("from the reload on", hourly(20), 15, quota(1.0, 20), 6, 11, 0),
        ("much faster", hourly(20), 20, quota(10.0, 20), 3, 20, 0),
        ("there and back", hourly(20), 15, quota(1000.0, 5), 1, 5, 5),
        ("slower", quota(10.0, 20), 20, hourly(20), 3, 0, 0),
    ] {
        let limits = limits(&with(first));
        for _ in 0..spent {
            call(&limits, 1, JWT, &web).unwrap();
        }
        limits.reload(&with(other));
        advance(Duration::from_secs(seconds)).await;
        assert_eq!(passes(&limits, 1, JWT, &web), pass, "{case}");
        limits.reload(&with(first));
        assert_eq!(passes(&limits, 1, JWT, &web), back, "{case}, and back");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reload_keeps_what_was_spent() {
    let with = |rate, burst| LimitSettings { caller: layers(quota(rate, burst)), ..open() };
    let limits = limits(&with(1.0, 10));
    let web = entries(&["web"]);
    assert_eq!(passes(&limits, 1, JWT, &web), 10);
    limits.reload(&with(1000.0, 25));
    assert_eq!(passes(&limits, 1, JWT, &web), 15, "ten of twenty-five are spent");
    assert_eq!(passes(&limits, 2, JWT, &web), 25);
    let running = limits.admit_caller(Uid(3), JWT).unwrap();
    limits.reload(&with(1.0, 10));
    drop(running);
    assert_eq!(left_to_caller(&limits, CallerKey::Uid(3), JWT), Some((9, 10)));
    let unavailable = LimitSettings { rejection_status: RejectionStatus::Unavailable, ..with(1.0, 10) };
    limits.reload(&unavailable);
    let refusal = RequestError::from(call(&limits, 1, JWT, &web).unwrap_err());
    assert_eq!(refusal.code(), tonic::Code::Unavailable);
}

#[test]
fn settings_that_contradict_are_errors() {
    let text = |err: &dyn std::error::Error| err.to_string();
    for (case, err, want) in [
        ("few keys", text(&TableSize::new(15).unwrap_err()), "keys 15 must be from 16 to 16777216"),
        (
            "reserve",
            text(&GatePlaces::new(Some(10), Some(10)).unwrap_err()),
            "reserve 10 must be below connections, which is 10",
        ),
        (
            "one connection",
            text(&GatePlaces::new(Some(1), Some(0)).unwrap_err()),
            "connections 1 must be from 2 to 1000000",
        ),
        (
            "step",
            text(&SoftLimits::new(&[80, 81]).unwrap_err()),
            "soft limit 81 must be one of 50, 60, 70, 75, 80, 90, 95, 100 (percent of a burst)",
        ),
        (
            "attestations",
            text(&Attestations::new(Some(number(4)), Some(number(5))).unwrap_err()),
            "attestations_per_caller 5 must be at most attestations, which is 4",
        ),
    ] {
        assert_eq!(err, want, "{case}");
    }
    assert_eq!(
        GatePlaces::new(Some(64), None),
        Err(GatePlacesError::Reserve { reserve: 64, connections: 64 })
    );
}

/// What is short is named, and what would do.
#[test]
fn settings_that_the_machine_has_no_room_for_are_errors() {
    let with = |places, streams| LimitSettings {
        gate: GateSettings {
            places,
            connection: ConnectionSettings { streams, ..ConnectionSettings::default() },
            ..GateSettings::default()
        },
        ..open()
    };
    let usual = with(GatePlaces::default(), 16);
    let many_streams = with(GatePlaces::default(), 1024);
    for (case, settings, nofile, budget, want) in [
        (
            "descriptors",
            &with(places(100, 10), 16),
            100,
            AMPLE,
            NoRoomError::Descriptors { connections: 100, needed: 80 + 12 + 16 + 200, limit: 100 },
        ),
        (
            "descriptors for two",
            &usual,
            80,
            24 << 20,
            NoRoomError::Descriptors { connections: 2, needed: 80 + 10 + 16 + 4, limit: 80 },
        ),
        (
            "memory",
            &usual,
            20_000,
            500_000,
            NoRoomError::Memory {
                budget: 500_000,
                each: connection_at_most(16),
                needed: 4 * connection_at_most(16),
            },
        ),
        (
            "memory, many streams",
            &many_streams,
            20_000,
            8 << 20,
            NoRoomError::Memory {
                budget: 8 << 20,
                each: connection_at_most(1024),
                needed: 4 * connection_at_most(1024),
            },
        ),
    ] {
        let err = GatePlan::new(settings, nofile, budget).unwrap_err();
        assert_eq!(err, want, "{case}");
        if let NoRoomError::Memory { needed, .. } = err {
            assert!(GatePlan::new(settings, nofile, needed).is_ok(), "{case}: what is told would do");
            assert!(GatePlan::new(settings, nofile, needed - 1).is_err(), "{case}: and no less");
        }
    }
    let said = GatePlan::new(&usual, 20_000, 500_000).unwrap_err().to_string();
    let each = connection_at_most(16);
    let want = format!(
        "memory: a budget of 500000 bytes is too small for 2 connections of {each} bytes at their worst: it must be at \
         least {} bytes, or gate.connection.streams lower",
        4 * each
    );
    assert_eq!(said, want);
}

fn gate(gate: GateSettings) -> Gate {
    gate_within(gate, AMPLE)
}

/// A budget that nothing a test holds comes near.
const AMPLE: u64 = 1 << 30;

/// One with a budget of memory.
fn gate_within(gate: GateSettings, budget: u64) -> Gate {
    let settings = LimitSettings { gate, ..open() };
    Gate::new(GatePlan::new(&settings, 1 << 20, budget).unwrap(), &limits(&settings))
}

fn places(connections: u32, reserve: u32) -> GatePlaces {
    GatePlaces::new(Some(connections), Some(reserve)).unwrap()
}

/// One rule for all.
fn rules(rule: GateRule) -> GateRules {
    GateRules::new(rule, vec![]).unwrap()
}

fn number(n: u32) -> NonZeroU32 {
    NonZeroU32::new(n).unwrap()
}

fn gate_rule(connections: u32, rate: Limit) -> GateRule {
    GateRule { connections: NonZeroU32::new(connections), rate: Some(rate), dry_run: false }
}

#[tokio::test(start_paused = true)]
async fn the_gate_asks_the_caller_first() {
    use ConnectionRefusal as R;
    let blocked = (CallerPattern::One(CallerKey::Uid(9)), gate_rule(1, Limit::Block));
    let gate = gate(GateSettings {
        rules: GateRules::new(gate_rule(3, quota(1.0, 10)), vec![blocked]).unwrap(),
        places: places(100, 10),
        admin: 2,
        ..GateSettings::default()
    });
    let open = |uid| gate.open(CallerKey::Uid(uid));
    assert_eq!(open(9).err(), Some(R::Blocked));
    let held: Vec<ConnectionPermit> = (0..3).map(|_| open(1).unwrap()).collect();
    assert_eq!(open(1).err(), Some(R::CallerConnections));
    assert!(open(2).is_ok(), "another caller");
    drop(held);
    assert_eq!(gate.connections(), 0);
    let refused = gate.report(1)[0].refused;
    assert_eq!(refused, 1, "people are shown that it held too many");
    // Seven tokens are left: a refused connection took none.
    for _ in 0..7 {
        drop(open(1).unwrap());
    }
    let wait = |why| gate.wait(CallerKey::Uid(1), why);
    assert_eq!(open(1).err(), Some(R::CallerRate));
    assert_eq!(wait(R::CallerRate), Some(Duration::from_secs(1)));
    advance(Duration::from_millis(999)).await;
    assert_eq!(open(1).err(), Some(R::CallerRate), "too early");
    assert_eq!(wait(R::CallerRate), Some(Duration::from_millis(1)));
    assert_eq!(
        [R::CallerConnections, R::Memory, R::Processor, R::Blocked].map(wait),
        [None; 4],
        "nobody knows"
    );
    advance(Duration::from_millis(1)).await;
    assert!(open(1).is_ok());
    let admin: Vec<_> = (0..2).map(|_| gate.open_admin().unwrap()).collect();
    assert_eq!(gate.open_admin().err(), Some(R::AdminConnections));
    drop(admin);
    assert!(gate.open_admin().is_ok());
}

#[tokio::test(start_paused = true)]
async fn short_memory_stops_those_who_hold_their_share_and_nobody_else() {
    let rules = rules(gate_rule(50, Limit::Unlimited));
    let gate = gate_within(GateSettings { rules, ..GateSettings::default() }, 100 << 20);
    let [one, two, new] = [1, 2, 3].map(CallerKey::Uid);
    let held: Vec<ConnectionPermit> = (0..5).map(|_| gate.open(one).unwrap()).collect();
    let few: Vec<ConnectionPermit> = (0..2).map(|_| gate.open(two).unwrap()).collect();
    held[0].holding().hold(30 << 20);
    // What the process takes besides, in MiB; and whether each of them is let in.
    for (other, want, passes) in [
        (10, Pressure::None, [true, true, true]),
        (41, Pressure::ShrinkCaches, [false, true, true]),
        (56, Pressure::RefuseNew, [false, true, true]),
        (65, Pressure::CloseHeaviest, [false, true, true]),
        (66, Pressure::CloseHeaviest, [false, false, true]),
        (200, Pressure::CloseHeaviest, [false, false, true]),
    ] {
        assert_eq!(gate.look(Some((30 + other) << 20), 0), want, "{other}");
        let of =
            |caller| gate.open(caller).map(drop).map_err(|why| (why, why.is_callers_own(), why.is_soft()));
        let refused =
            [ConnectionRefusal::Memory, ConnectionRefusal::MemoryTaken, ConnectionRefusal::MemoryTaken];
        let mut want = refused.map(|why| Err((why, false, true)));
        want.iter_mut().zip(passes).filter(|(_, passes)| *passes).for_each(|(want, _)| *want = Ok(()));
        assert_eq!([of(one), of(two), of(new)], want, "{other}");
    }
    let told = gate.out_of_room();
    assert!(told.iter().any(|it| it.caller == one && it.held > 30 << 20 && it.held >= it.share), "{told:?}");
    assert_eq!(gate.heaviest(1).first().map(|(holder, open, _)| (holder.caller, *open)), Some((one, 5)));
    drop((held, few));
}

/// For so many that hold nothing there is memory whatever others hold; not for more at once, nor for ever.
#[tokio::test(start_paused = true)]
async fn memory_is_set_aside_for_callers_that_hold_nothing() {
    let gate = gate_within(GateSettings::default(), 64 << 20);
    let hog: Vec<ConnectionPermit> = (0..3).map(|_| gate.open(CallerKey::Uid(1)).unwrap()).collect();
    hog[0].holding().hold(70 << 20);
    assert_eq!(gate.open(CallerKey::Uid(1)).err(), Some(ConnectionRefusal::Memory), "at once");
    let mut new: Vec<ConnectionPermit> =
        (100..300).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(new.len(), 64);
    assert_eq!(gate.open(CallerKey::Uid(999)).err(), Some(ConnectionRefusal::MemoryTaken));
    assert!(new.iter().all(|permit| permit.holding().try_begin(HTTP2)), "they speak too");
    assert!(!new.iter().any(|permit| permit.holding().try_begin(HTTP2)), "once");
    assert!(!hog[1].holding().try_hold(1));
    new.pop();
    let last = gate.open(CallerKey::Uid(999)).unwrap();
    hog[0].holding().release(70 << 20);
    assert!(gate.open(CallerKey::Uid(1)).is_ok(), "there is room again, at once");
    drop((hog, new, last));
}

/// A place that is set aside is lent: those who come later have it after two seconds, and nobody has two while few are left.
#[tokio::test(start_paused = true)]
async fn what_is_set_aside_is_lent_for_a_moment() {
    let gate = gate_within(GateSettings::default(), 64 << 20);
    let hog = gate.open(CallerKey::Uid(1)).unwrap();
    hog.holding().hold(70 << 20);
    let open = |uid| gate.open(CallerKey::Uid(uid));
    let mut new: Vec<ConnectionPermit> = (100..132).map_while(|uid| open(uid).ok()).collect();
    assert_eq!(open(131).err(), Some(ConnectionRefusal::MemoryTaken), "a second one");
    new.extend((132..300).map_while(|uid| open(uid).ok()));
    assert_eq!(new.len(), 64);
    advance(Duration::from_millis(1_999)).await;
    assert_eq!(open(400).err(), Some(ConnectionRefusal::MemoryTaken));
    advance(Duration::from_millis(1)).await;
    let later: Vec<ConnectionPermit> = (400..403).map(|uid| open(uid).unwrap()).collect();
    let told = new.iter().map(notice).take_while(|told| *told == Some(Notice::Close)).count();
    assert_eq!((told, new.iter().filter_map(notice).count()), (3, 3), "those that came first");
    assert_eq!(
        gate.shed().iter().filter(|told| told.caller == CallerKey::Uid(100)).count(),
        1,
        "it is told of"
    );
    // It was taken from the first three: their end frees none.
    new.drain(..3);
    new.pop();
    advance(Duration::from_millis(10)).await;
    drop(open(500).unwrap());
    hog.holding().release(70 << 20);
    drop((open(1).unwrap(), later));
    assert!(new.iter().all(|permit| notice(permit).is_none()), "nobody is asked for what is not needed");
}

/// Those who hold more than their share go before others take all that is set aside, and what others took is theirs then: who
/// holds a stream there gets a connection for each call.
#[tokio::test(start_paused = true)]
async fn who_holds_a_stream_on_what_is_set_aside_gets_a_second_connection() {
    let gate = gate_within(GateSettings::default(), 24 << 20);
    let speaks = |uid| {
        let permit = gate.open(CallerKey::Uid(uid)).unwrap();
        assert!(permit.holding().try_begin(HTTP2), "{uid}");
        permit
    };
    let mut greedy: Vec<ConnectionPermit> =
        (0..20 * 19).map(|nth| gate.open(CallerKey::Uid(100 + nth % 20)).unwrap()).collect();
    greedy.iter().for_each(|permit| permit.holding().hold(44 << 10));
    let stream = speaks(1);
    let crowd: Vec<ConnectionPermit> = (200..240).map(speaks).collect();
    let second = || gate.open(CallerKey::Uid(1));
    assert_eq!(second().err(), Some(ConnectionRefusal::MemoryTaken), "for a moment");
    let told = gate.out_of_room();
    assert!(told.iter().any(|it| it.caller == CallerKey::Uid(1) && it.held < it.share), "{told:?}");
    assert_eq!(gate.look(None, 0), Pressure::RefuseNew);
    let goes = gate.shed();
    assert!(
        !goes.is_empty() && goes.iter().all(|it| (100..120).map(CallerKey::Uid).any(|uid| uid == it.caller))
    );
    greedy.retain(|permit| notice(permit).is_none());
    for _ in 0..40 {
        assert!(second().unwrap().holding().try_begin(HTTP2));
    }
    assert_eq!(gate.open(CallerKey::Uid(100)).err(), Some(ConnectionRefusal::Memory), "it holds its share");
    assert_eq!(crowd.iter().chain([&stream]).filter_map(notice).count(), 0);
    let new: Vec<ConnectionPermit> =
        (300..364).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(new.len(), 64, "all that is set aside is free again");
}

/// One connection is no worse than two: who holds little has half of the memory that is set aside, whoever has its places.
#[tokio::test(start_paused = true)]
async fn who_holds_one_connection_gets_a_second_where_silent_callers_have_the_places() {
    let gate = gate_within(GateSettings::default(), 24 << 20);
    let hog: Vec<ConnectionPermit> = (0..20).map(|_| gate.open(CallerKey::Uid(1)).unwrap()).collect();
    hog.iter().for_each(|permit| permit.holding().hold(946 << 10));
    let _silent: Vec<ConnectionPermit> =
        (100..163).map(|uid| gate.open(CallerKey::Uid(uid)).unwrap()).collect();
    let mut polite: Vec<ConnectionPermit> = Vec::new();
    for nth in 0..7 {
        let permit = gate.open(CallerKey::Uid(2)).unwrap_or_else(|why| panic!("{nth}: {why:?}"));
        assert!(permit.holding().try_begin(HTTP2), "{nth}");
        polite.push(permit);
    }
    assert_eq!(gate.open(CallerKey::Uid(1)).err(), Some(ConnectionRefusal::Memory), "it has its share");
}

/// Those who hold most may rest where nobody is told to go: they go as soon as one below its share is refused for it.
#[tokio::test(start_paused = true)]
async fn who_is_refused_for_what_others_hold_makes_them_go() {
    let gate = gate_within(GateSettings::default(), 24 << 20);
    let hog: Vec<ConnectionPermit> = (0..20).map(|_| gate.open(CallerKey::Uid(1)).unwrap()).collect();
    hog.iter().for_each(|permit| permit.holding().hold(940 << 10));
    let open = |uid| gate.open(CallerKey::Uid(uid));
    let mut all: Vec<ConnectionPermit> = (100..164).map(|uid| open(uid).unwrap()).collect();
    let (crowd, hog_again) = (all.len(), open(1).err());
    assert_eq!(hog_again, Some(ConnectionRefusal::Memory));
    assert_eq!((gate.look(None, 0), gate.shed()), (Pressure::ShrinkCaches, vec![]), "nobody wants it");
    assert_eq!(open(999).err(), Some(ConnectionRefusal::MemoryTaken));
    assert_eq!(gate.look(None, 0), Pressure::RefuseNew);
    let told = gate.shed();
    let right = told.iter().all(|told| told.caller == CallerKey::Uid(1) && told.held > told.share);
    assert!(right && !told.is_empty() && told.len() < 10, "{told:?}");
    // They do not go, and it is refused again.
    advance(Duration::from_millis(149)).await;
    let closed = |gate: &Gate| gate.shed().iter().filter(|told| told.notice == Notice::Close).count();
    assert_eq!((open(999).err(), closed(&gate)), (Some(ConnectionRefusal::MemoryTaken), 0));
    advance(Duration::from_millis(250)).await;
    assert_eq!(closed(&gate), 0, "nobody waits for it any more");
    assert_eq!((open(999).err(), closed(&gate)), (Some(ConnectionRefusal::MemoryTaken), told.len()));
    all.extend(hog);
    all.retain(|permit| notice(permit) != Some(Notice::Close));
    assert!(open(999).is_ok());
    assert_eq!(all.len(), crowd + 20 - told.len());
}

/// Who is above its share by less than a connection gives one up for who is below, as soon as that one is refused, or is not
/// read on a connection that it keeps. While that one waits for room, whoever does not go is closed.
#[tokio::test(start_paused = true)]
async fn who_is_above_its_share_by_a_part_of_a_connection_gives_one_up() {
    const MIB: u64 = 1 << 20;
    for keeps in [false, true] {
        let gate = gate_within(GateSettings::default(), 24 << 20);
        gate.look(None, 4 * MIB);
        let polite: Vec<ConnectionPermit> = (0..12).map(|_| gate.open(CallerKey::Uid(1)).unwrap()).collect();
        polite.iter().for_each(|permit| permit.holding().hold(HTTP2));
        let mut hogs: Vec<ConnectionPermit> =
            (0..9).map(|n| gate.open(CallerKey::Uid(10 + n % 3)).unwrap()).collect();
        hogs.iter().for_each(|permit| permit.holding().hold(1_650_000));
        advance(Duration::from_secs(1)).await;
        assert_eq!(
            (gate.look(None, 4 * MIB), gate.shed()),
            (Pressure::ShrinkCaches, vec![]),
            "nobody wants it"
        );
        let asks = || {
            if keeps {
                let fits = polite[0].holding().try_hold(4 << 10);
                fits.then(|| polite[0].holding().release(4 << 10)).is_some()
            } else {
                gate.open_on(CallerKey::Uid(1), Attempt::First).is_ok()
            }
        };
        assert!(!asks(), "{keeps}");
        gate.look(None, 4 * MIB);
        let told = gate.shed();
        assert!(
            !told.is_empty() && told.iter().all(|told| told.notice == Notice::ComeBack),
            "{keeps}: {told:?}"
        );
        advance(Duration::from_millis(150)).await;
        gate.look(None, 4 * MIB);
        assert!(
            gate.shed().iter().filter(|told| told.notice == Notice::Close).count() >= told.len(),
            "{keeps}"
        );
        hogs.retain(|permit| notice(permit) != Some(Notice::Close));
        assert!(asks(), "{keeps}");
        assert!(hogs.len() >= 6, "{keeps}: each of them has its others");
        assert!(polite.iter().all(|permit| notice(permit).is_none()), "{keeps}");
    }
}

/// Who was let in while there was room, and speaks when there is next to none.
#[tokio::test(start_paused = true)]
async fn who_begins_to_speak_finds_room_up_to_the_end() {
    let gate = gate_within(GateSettings::default(), 64 << 20);
    let [hog, first, second] = [1, 2, 3].map(|uid| gate.open(CallerKey::Uid(uid)).unwrap());
    hog.holding().hold(60 << 20);
    gate.look(None, 0);
    assert!(!hog.holding().try_hold(1));
    assert!(first.holding().try_begin(HTTP2));
    hog.holding().hold(1 << 20);
    assert!(!second.holding().try_begin(HTTP2), "the last part is nobody's");
    hog.holding().release(1 << 20);
    assert!(second.holding().try_begin(HTTP2));
}

/// Memory for the admin connections that are set is set aside, whether they are open or not.
#[tokio::test(start_paused = true)]
async fn memory_for_admin_connections_is_no_callers() {
    const MIB: u64 = 1 << 20;
    let fits = |admin: u32, open: u32| {
        let gate = gate_within(GateSettings { admin, ..GateSettings::default() }, 24 * MIB);
        let _admins: Vec<ConnectionPermit> = (0..open).map(|_| gate.open_admin().unwrap()).collect();
        gate.look(Some(4 * MIB + u64::from(open) * ADMIN_CONNECTION), 4 * MIB);
        let hog = gate.open(CallerKey::Uid(1)).unwrap();
        let fits = (0..24 * 16).take_while(|_| hog.holding().try_hold(MIB / 16)).count();
        assert!(gate.open(CallerKey::Uid(2)).is_ok(), "a neighbour is served");
        u64::try_from(fits).unwrap() * MIB / 16
    };
    // What is nobody's, what is kept for newcomers, and what the agent takes itself.
    let most = 24 * MIB - SPARE - 64 * NEWCOMER - 4 * MIB;
    assert!((most - 3 * MIB..=most).contains(&fits(8, 0)), "usually {}", fits(8, 0));
    let most = most - 68 * ADMIN_CONNECTION;
    for open in [0, 76] {
        let few = fits(76, open);
        assert!((most - MIB / 2..=most).contains(&few), "{open}: {few} of {most}");
    }
}

/// What is lifted of a rate lifts no number of connections.
#[tokio::test(start_paused = true)]
async fn unlimited_at_the_gate_is_of_the_rate_alone() {
    let of = |uid, limit| (CallerPattern::One(CallerKey::Uid(uid)), gate_rule(3, limit));
    let overrides = vec![of(1, Limit::Unlimited), of(2, Limit::Exempt)];
    let gate = gate(GateSettings {
        rules: GateRules::new(gate_rule(3, quota(0.01, 5)), overrides).unwrap(),
        ..GateSettings::default()
    });
    let open = |uid| gate.open(CallerKey::Uid(uid));
    for (uid, want) in [(1, 3), (2, 20), (3, 3)] {
        let held: Vec<ConnectionPermit> = (0..20).map_while(|_| open(uid).ok()).collect();
        assert_eq!(held.len(), want, "{uid}");
    }
    assert_eq!(open(1).map(drop), Ok(()));
    let again = |uid| (0..50).filter(|_| open(uid).is_ok()).count();
    assert_eq!((again(1), again(3)), (50, 2), "one after the other");
    let held: Vec<ConnectionPermit> = (0..3).map(|_| open(1).unwrap()).collect();
    assert_eq!(open(1).err(), Some(ConnectionRefusal::CallerConnections));
    assert_eq!((gate.held_by(CallerKey::Uid(1)).most, gate.refused(CallerKey::Uid(1))), (Some(3), 2));
    drop(held);
}

/// Who has no bucket of its own is told what it shares with others, and how that stands.
#[tokio::test(start_paused = true)]
async fn who_has_no_bucket_of_its_own_sees_what_it_shares() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let rule = GateRule { rate: Some(quota(0.01, 5)), ..GateRule::default() };
    let settings = LimitSettings {
        gate: GateSettings { rules: rules(rule), ..GateSettings::default() },
        caller: layers(quota(0.01, 10)),
        keys: TableSize::new(16).unwrap(),
        ..open()
    };
    let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&recorder));
    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, AMPLE).unwrap(), &limits);
    // Of one range, as only one user could make them.
    let mut last = None;
    for uid in 100_000..100_040 {
        last = (0..7).map(|_| gate.open(CallerKey::Uid(uid)).map(drop)).find_map(Result::err);
        drop(call(&limits, uid, JWT, &entries(&["web"])));
    }
    assert_eq!(last, Some(ConnectionRefusal::OverflowRate));
    let row = gate.report(100).into_iter().find(|row| row.name == BucketName::WithoutBucket).unwrap();
    assert_eq!((row.used, row.refused), (5, 38), "who was refused is none of those who passed");
    let told: Vec<_> = limits.events().into_iter().map(|event| format!("{event:?}")).collect();
    for what in ["method: None", "method: Some(FetchJwtSvid)"] {
        let of_crowd = |line: &&String| line.contains("others without a bucket") && line.contains(what);
        assert_eq!(told.iter().filter(of_crowd).count(), 1, "{what}: one line: {told:?}");
    }
    assert!(!told.iter().any(|line| line.contains("uid:100039")), "{told:?}");
    let crowd = CallerKey::Uid(100_039);
    let (name, standing) = gate.standing(crowd);
    assert_eq!((name, tokens(standing)), (BucketName::WithoutBucket, Some((0, 5))));
    let wait = gate.wait(crowd, ConnectionRefusal::OverflowRate);
    assert!(wait.is_some_and(|wait| wait > Duration::from_secs(10)), "{wait:?}");
    let (name, standing) = limits.caller_standing(crowd, JWT);
    assert_eq!((name, tokens(standing)), (BucketName::WithoutBucket, Some((0, 10))));
    let first = CallerKey::Uid(100_000);
    assert_eq!(gate.standing(first).0, BucketName::Caller(first), "it has one");
    // And a neighbour has all of its own.
    let other = CallerKey::Uid(7);
    assert_eq!(
        (gate.standing(other).0, tokens(gate.standing(other).1)),
        (BucketName::Caller(other), Some((5, 5)))
    );
    assert!(gate.open(other).is_ok());
    let text = text_of(&recorder);
    let of = |key| {
        let series = format!(
            "durward_rate_limit_exceeded_total{{key_type=\"{key}\",method=\"connect\",reason=\"rate\",stage=\"gate\"}}"
        );
        text.iter()
            .filter(|(name, _)| labels_of(name) == labels_of(&series))
            .map(|(_, count)| *count)
            .sum::<f64>()
    };
    assert_eq!(of("overflow"), 38.0, "{text:?}");
}

/// The name and the labels of a series, in whatever order they stand.
fn labels_of(series: &str) -> Vec<&str> {
    let mut labels: Vec<&str> = series.split(['{', '}', ',']).collect();
    labels.sort_unstable();
    labels
}

/// Who was let in and finds no memory when it begins to speak is refused like who finds none at once, and keeps its token.
#[tokio::test(start_paused = true)]
async fn who_finds_no_memory_to_begin_is_refused_by_name() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let settings = LimitSettings {
        gate: GateSettings { rules: rules(gate_rule(50, quota(0.01, 5))), ..GateSettings::default() },
        ..open()
    };
    let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&recorder));
    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, 64 << 20).unwrap(), &limits);
    let [hog, polite] = [1, 2].map(CallerKey::Uid);
    let (large, small) = (gate.open(hog).unwrap(), gate.open(polite).unwrap());
    large.holding().hold(61 << 20);
    assert!(!small.holding().try_begin(HTTP2));
    assert_eq!(gate.refuse_begun(&small), ConnectionRefusal::MemoryTaken);
    assert_eq!(gate.refuse_begun(&large), ConnectionRefusal::Memory, "it holds its share, and more");
    let row = |caller| {
        let name = BucketName::Caller(caller);
        let row = gate.report(10).into_iter().find(|row| row.name == name).unwrap();
        (row.used, row.refused, gate.refused(caller))
    };
    assert_eq!((row(hog), row(polite)), ((0, 1, 1), (0, 1, 1)));
    let told = gate.out_of_room();
    let of = |caller| told.iter().find(|it| it.caller == caller).map(|it| it.refusal);
    assert_eq!(
        [hog, polite].map(of),
        [Some(ConnectionRefusal::Memory), Some(ConnectionRefusal::MemoryTaken)]
    );
    let text = text_of(&recorder);
    let of_node = text.iter().filter(|(name, _)| {
        name.starts_with("durward_rate_limit_exceeded_total") && name.contains(r#"stage="node""#)
    });
    assert_eq!(of_node.map(|(_, count)| *count).sum::<f64>(), 2.0, "{text:?}");
    // Nor is it counted as let in; who begins is, or who leaves without a word.
    let allowed = || {
        let series = "durward_rate_limit_allowed_total{method=\"connect\",stage=\"gate\",key_type=\"uid\"}";
        let text = text_of(&recorder);
        let of_series = text.iter().filter(|(name, _)| labels_of(name) == labels_of(series));
        of_series.map(|(_, count)| *count).sum::<f64>()
    };
    drop((large, small));
    let (begins, silent) = (gate.open(hog).unwrap(), gate.open(hog).unwrap());
    assert_eq!(allowed(), 0.0);
    gate.has_begun(&begins);
    assert_eq!(allowed(), 1.0);
    drop((begins, silent));
    assert_eq!(allowed(), 2.0);
    let held: Vec<ConnectionPermit> = (0..9).map_while(|_| gate.open(polite).ok()).collect();
    assert_eq!(held.len(), 5, "it has its whole burst");
}

/// Whom a limit of an admin's refuses under ever new UIDs is one who is told of, at the gate and behind it.
#[tokio::test(start_paused = true)]
async fn a_family_that_is_refused_is_one_line_for_each_stage() {
    let settings = LimitSettings {
        families: Families::parse("somebody:100000:65536\n", |_| None),
        gate: GateSettings {
            rules: rules(GateRule { rate: Some(Limit::Block), ..GateRule::default() }),
            ..GateSettings::default()
        },
        caller: layers(Limit::Block),
        ..open()
    };
    let limits = limits(&settings);
    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, 24 << 20).unwrap(), &limits);
    let web = entries(&["web"]);
    for uid in (100_001..100_301).chain([7]) {
        assert_eq!(gate.open(CallerKey::Uid(uid)).err(), Some(ConnectionRefusal::Blocked));
        assert!(call(&limits, uid, JWT, &web).is_err());
    }
    let told = |event: &Event| match event {
        Event::Refusing { what, with_family, times, .. } => {
            format!("{} {} {with_family} {times}", what.stage.text(), what.name)
        }
        other => format!("{other:?}"),
    };
    let told: Vec<String> = limits.events().iter().map(told).collect();
    assert_eq!(
        told,
        [
            "gate uid:100001 true 300",
            "caller uid:100001 true 300",
            "gate uid:7 false 1",
            "caller uid:7 false 1"
        ]
    );
}

/// Who can be many callers is one where it is told of, as it is where memory is shared.
#[tokio::test(start_paused = true)]
async fn a_family_is_named_as_one() {
    let families = Families::parse("somebody:100000:65536\n", |_| None);
    let settings = LimitSettings { families, ..open() };
    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, 24 << 20).unwrap(), &limits(&settings));
    let open = |uid| gate.open(CallerKey::Uid(uid));
    let of_family: Vec<ConnectionPermit> = (100_001..100_301).map(|uid| open(uid).unwrap()).collect();
    of_family.iter().for_each(|permit| permit.holding().hold(50 << 10));
    let user: Vec<ConnectionPermit> = (0..3).map(|_| open(7).unwrap()).collect();
    user.iter().for_each(|permit| permit.holding().hold(200 << 10));
    let most: Vec<String> = gate.heaviest(9).iter().map(|(holder, ..)| holder.to_string()).collect();
    assert_eq!(most, ["uid:100001 and 299 others of its range", "uid:7"]);
    assert_eq!(gate.holder(CallerKey::Uid(100_500)).to_string(), most[0]);
    gate.look(None, 4 << 20);
    for uid in 100_400..100_420 {
        assert_eq!(open(uid).err(), Some(ConnectionRefusal::Memory));
    }
    let told = gate.out_of_room();
    let heads: Vec<CallerKey> = told.iter().map(|it| it.head).collect();
    assert_eq!(heads, [CallerKey::Uid(100_000)], "one line for all of it: {told:?}");
    assert!(open(8).is_ok(), "who is alone is served");
    drop((of_family, user));
}

/// The neighbour with seven connections is not told for what five of another hold; and nobody is, while there is room.
#[tokio::test(start_paused = true)]
async fn who_holds_most_bytes_is_told_to_go_newest_first() {
    let gate = gate_within(GateSettings::default(), 24 << 20);
    let [neighbour, heavy] = [1, 2].map(CallerKey::Uid);
    let idle: Vec<ConnectionPermit> = (0..7).map(|_| gate.open(neighbour).unwrap()).collect();
    let full: Vec<ConnectionPermit> = (0..5).map(|_| gate.open(heavy).unwrap()).collect();
    idle.iter().for_each(|permit| permit.holding().hold(27 << 10));
    for (each, want) in [(1 << 20, [None; 5]), (2 << 20, [None; 5]), (3 << 20, [None; 5])] {
        full.iter().for_each(|permit| permit.holding().hold(1 << 20));
        gate.look(Some(3 << 20), 3 << 20);
        assert_eq!(gate.shed(), [], "{each}");
        let told = full.iter().map(notice);
        assert_eq!(told.collect::<Vec<_>>(), want, "{each}");
    }
    full.iter().for_each(|permit| permit.holding().hold(410 << 10));
    assert_eq!(gate.look(None, 3 << 20), Pressure::RefuseNew);
    let told: Vec<_> = gate.shed().into_iter().map(|told| told.caller).collect();
    assert_eq!(told, [heavy]);
    assert_eq!(notice(&full[4]), Some(Notice::ComeBack), "the newest");
    full.iter().for_each(|permit| permit.holding().hold(1120 << 10));
    assert_eq!(gate.look(None, 3 << 20), Pressure::CloseHeaviest);
    let told: Vec<_> = gate.shed().into_iter().map(|told| (told.caller, told.notice)).collect();
    assert_eq!(told, [(heavy, Notice::Close), (heavy, Notice::Close)]);
    assert!(idle.iter().all(|permit| notice(permit).is_none()));
    drop((idle, full));
}

fn notice(permit: &ConnectionPermit) -> Option<Notice> {
    permit.holding().told(None).now_or_never()
}

/// By default there is no number, and none is refused for want of tokens, while there is room.
#[tokio::test(start_paused = true)]
async fn what_nobody_set_binds_without_room_alone() {
    let (settings, recorder) = (LimitSettings::default(), PrometheusBuilder::new().build_recorder());
    let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&recorder));
    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, AMPLE).unwrap(), &limits);
    let caller = CallerKey::Uid(1);
    let held: Vec<ConnectionPermit> = (0..1_000).map_while(|_| gate.open(caller).ok()).collect();
    assert_eq!(held.len(), 1_000);
    limits.room().set(Short::Processor, true);
    let refused = gate.open(caller).err();
    assert_eq!(refused, Some(ConnectionRefusal::Processor), "its tokens were charged while there was room");
    let told: Vec<_> = gate.out_of_room().into_iter().map(|it| (it.caller, it.refusal)).collect();
    assert_eq!(told, [(caller, ConnectionRefusal::Processor)], "the log has it");
    assert_eq!(gate.rate_of(caller), "100 a second, 200 at once");
    assert!(refused.is_some_and(ConnectionRefusal::is_soft));
    assert_eq!((gate.wanting(), gate.wanting()), (1, 0));
    assert_eq!(limits.events(), [], "once");
    let counted = text_of(&recorder);
    let counted: Vec<_> =
        counted.iter().filter(|(name, count)| name.contains("exceeded_total") && **count > 0.0).collect();
    let [(series, 1.0)] = counted[..] else { panic!("{counted:?}") };
    assert!(
        series.contains(r#"stage="gate""#) && series.contains(r#"key_type="uid""#),
        "whose it is: {series}"
    );
    assert!(gate.open(CallerKey::Uid(2)).is_ok(), "it has tokens");
    advance(Duration::from_millis(10)).await;
    assert!(gate.open(caller).is_ok(), "and it has one again");
    assert!(gate.open(caller).is_err());
    limits.room().set(Short::Processor, false);
    assert!(gate.open(caller).is_ok());
}

/// What comes while there is processor time for it, or as often as it may, comes with its first call. Where somebody set how
/// often it may come, that says nothing of calls.
#[tokio::test(start_paused = true)]
async fn a_connection_that_came_in_time_comes_with_its_first_call() {
    let by_default = GateRule::default();
    let set = GateRule { rate: Some(Limit::Unlimited), ..GateRule::default() };
    for (case, rule, short, first) in [
        ("by default, with room", &by_default, &[][..], NthCall::FirstLetIn),
        ("without memory", &by_default, &[Short::Memory], NthCall::FirstLetIn),
        ("without processor time", &by_default, &[Short::Processor], NthCall::FirstLetIn),
        ("set, with room", &set, &[], NthCall::FirstLetIn),
        ("set, without processor time", &set, &[Short::Processor], NthCall::First),
    ] {
        let rules = GateRules::new(rule.clone(), Vec::new()).unwrap();
        let settings = LimitSettings {
            gate: GateSettings { rules, ..GateSettings::default() },
            ..LimitSettings::default()
        };
        let limits = limits(&settings);
        let gate = Gate::new(GatePlan::new(&settings, 1 << 20, AMPLE).unwrap(), &limits);
        short.iter().for_each(|short| limits.room().set(*short, true));
        let one = gate.open(CallerKey::Uid(1)).unwrap();
        let calls = [(); 3].map(|()| one.holding().begins_call());
        assert_eq!(calls, [first, NthCall::Further, NthCall::Further], "{case}");
    }
}

/// Who speaks and finds no memory is refused for it: for its own share, or because others hold the rest. It is counted and told
/// of as at the gate.
#[tokio::test(start_paused = true)]
async fn who_finds_no_memory_when_it_speaks_is_refused_for_what_is_held() {
    let settings = LimitSettings::default();
    let limits = limits(&settings);
    let gate = Gate::new(GatePlan::new(&settings, 1 << 20, 24 << 20).unwrap(), &limits);
    let (heavy, light) = (CallerKey::Uid(1), CallerKey::Uid(2));
    let crowd: Vec<_> = (0..1_000).map_while(|_| gate.open(heavy).ok()).collect();
    let other = gate.open(light).unwrap();
    assert_eq!(crowd.len(), 1_000);
    let speaking = crowd.iter().filter(|one| one.holding().try_begin(HTTP2)).count();
    assert!((300..500).contains(&speaking), "{speaking}");
    assert!(other.holding().try_begin(HTTP2), "what is kept for one that begins is not the crowd's");
    assert_eq!(gate.refuse_begun(&crowd[999]), ConnectionRefusal::Memory);
    assert_eq!(gate.refuse_begun(&other), ConnectionRefusal::MemoryTaken);
    let mut told: Vec<_> =
        gate.out_of_room().into_iter().map(|it| (it.caller.to_string(), it.refusal)).collect();
    told.sort_by_key(|(caller, _)| caller.clone());
    let own = |caller: CallerKey| caller.to_string();
    assert_eq!(told, [(own(heavy), ConnectionRefusal::Memory), (own(light), ConnectionRefusal::MemoryTaken)]);
}

/// Of descriptors too, who has its share gets no more, and those of others are there.
#[tokio::test(start_paused = true)]
async fn descriptors_are_shared_when_they_are_short() {
    let gate = gate(GateSettings { places: places(1_000, 64), ..GateSettings::default() });
    let take = |uid, most: usize| -> Vec<ConnectionPermit> {
        (0..most).map_while(|_| gate.open(CallerKey::Uid(uid)).ok()).collect()
    };
    let greedy = take(1, 5_000);
    assert_eq!(greedy.len(), 700);
    assert_eq!(gate.open(CallerKey::Uid(1)).err(), Some(ConnectionRefusal::Descriptors));
    let second = take(2, 100);
    assert_eq!(second.len(), 100, "below its share");
    gate.look(None, 0);
    assert_eq!(gate.shed(), []);
    let third = take(3, 60);
    gate.look(None, 0);
    let told = gate.shed();
    assert!(!told.is_empty() && told.iter().all(|told| told.caller == CallerKey::Uid(1)), "{told:?}");
    assert_eq!(notice(&greedy[0]), None, "the oldest stay");
    assert_eq!(notice(&greedy[699]), Some(Notice::ComeBack));
    drop((greedy, second, third));
}

/// Whoever is refused is seen with it, whatever for: what nobody may take tokens for has a row too.
#[tokio::test(start_paused = true)]
async fn each_refusal_counts_for_its_caller() {
    let refused = |heavy: Vec<Heavy>, uid| {
        let name = BucketName::Caller(CallerKey::Uid(uid));
        heavy.into_iter().find(|heavy| heavy.name == name).map(|heavy| heavy.refused)
    };
    for (case, rule, places, let_in) in [
        ("descriptors", GateRule::default(), places(1_000, 64), 700),
        ("connections of the node", gate_rule(500, Limit::Unlimited), places(20, 10), 10),
        (
            "connections of a caller",
            GateRule { connections: NonZeroU32::new(2), ..GateRule::default() },
            places(20, 10),
            2,
        ),
        ("blocked", gate_rule(500, Limit::Block), places(20, 10), 0),
    ] {
        let gate = gate(GateSettings { rules: rules(rule), places, ..GateSettings::default() });
        let held: Vec<ConnectionPermit> =
            (0..5_000).map_while(|_| gate.open(CallerKey::Uid(1)).ok()).collect();
        assert_eq!(held.len(), let_in, "{case}");
        for _ in 0..4 {
            assert!(gate.open(CallerKey::Uid(1)).is_err(), "{case}");
        }
        assert_eq!(refused(gate.report(10), 1), Some(5), "{case}");
        assert_eq!(refused(gate.report(10), 2), None, "{case}");
    }

    // Calls of who is blocked, and of those for whom there is no bucket.
    let blocked = limits(&LimitSettings { caller: layers(Limit::Block), ..open() });
    let calls =
        |limits: &Limits, uid| (0..3).filter(|_| call(limits, uid, JWT, &entries(&["web"])).is_err()).count();
    assert_eq!(calls(&blocked, 1), 3);
    let heavy = |limits: &Limits| limits.heaviest(10).into_iter().map(|(_, heavy)| heavy).collect::<Vec<_>>();
    assert_eq!(refused(heavy(&blocked), 1), Some(3));
    let full = limits(&LimitSettings {
        caller: layers(quota(0.01, 10)),
        keys: TableSize::new(16).unwrap(),
        ..open()
    });
    for uid in 0..40 {
        drop(call(&full, uid, JWT, &entries(&["web"])));
    }
    let refusal = call(&full, 41, JWT, &entries(&["web"])).unwrap_err();
    assert_eq!(refusal.charged_as, ChargedAs::Overflow, "{refusal}");
    assert!(
        refusal.to_string().contains("the callers without a bucket of their own have no tokens left"),
        "{refusal}"
    );
    let all: Vec<_> = full.heaviest(100).into_iter().map(|(_, heavy)| heavy).collect();
    let others = all.iter().find(|heavy| heavy.name == BucketName::WithoutBucket);
    assert!(others.is_some_and(|others| others.refused > 0 && others.used > 0), "{others:?}");
    assert_eq!(all.iter().map(|heavy| heavy.used + heavy.refused).sum::<u32>(), 41, "each call counts once");

    // What is no method of ours is not called one.
    let few = limits(&LimitSettings { caller: layers(quota(1.0, 10)), ..open() });
    passes(&few, 1, Method::Other, &[]);
    let said = call(&few, 1, Method::Other, &[]).unwrap_err().to_string();
    assert!(said.starts_with("rate limit exceeded for calls outside of the Workload API and SDS"), "{said}");
}

/// Two who do not go when they are told so have all places, whatever their number: one below its share gets its own.
#[tokio::test(start_paused = true)]
async fn places_of_those_who_do_not_go_are_taken_from_them() {
    for nofile in [256, 600, 1024, 2224, 20_000] {
        let settings = LimitSettings::default();
        let gate = Gate::new(GatePlan::new(&settings, nofile, AMPLE).unwrap(), &limits(&settings));
        let open = |uid| gate.open(CallerKey::Uid(uid));
        // The first has all that it may before the second comes.
        let mut hogs: Vec<ConnectionPermit> =
            [1, 2].into_iter().flat_map(|uid| std::iter::from_fn(move || open(uid).ok())).collect();
        assert!(gate.room().is_short(Short::Descriptors), "{nofile}: there is no room");
        let (before, mut polite) = (hogs.len(), Vec::new());
        for tick in 0..40 {
            for _ in 0..4 {
                polite.extend((polite.len() < 7).then(|| open(3).ok()).flatten());
            }
            gate.look(None, 0);
            let told = gate.shed();
            assert!(told.iter().all(|told| told.caller != CallerKey::Uid(3)), "{nofile}: {told:?}");
            // They read nothing: what is closed goes, and nothing else.
            hogs.retain(|permit| notice(permit) != Some(Notice::Close));
            advance(Duration::from_millis(250)).await;
            assert!(tick < 12 || polite.len() == 7, "{nofile}: {} after {tick} looks", polite.len());
        }
        assert!(hogs.len() >= before * 3 / 5, "{nofile}: {} of {before} stay", hogs.len());
    }
}

/// Of more callers than there are places none has more than its share: nobody goes for it.
#[tokio::test(start_paused = true)]
async fn a_crowd_without_places_is_not_closed_as_a_whole() {
    let settings = LimitSettings::default();
    let gate = Gate::new(GatePlan::new(&settings, 1024, AMPLE).unwrap(), &limits(&settings));
    let polite: Vec<ConnectionPermit> = (0..5).map(|_| gate.open(CallerKey::Uid(1)).unwrap()).collect();
    let mut crowd: Vec<ConnectionPermit> =
        (100..).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
    assert_eq!(crowd.len(), 379);
    for case in ["at first", "when as many have come again"] {
        for _ in 0..100 {
            gate.look(None, 0);
            assert_eq!(gate.shed(), [], "{case}");
            assert_eq!(gate.open(CallerKey::Uid(8_999)).err(), Some(ConnectionRefusal::NodeConnections));
            advance(Duration::from_millis(10)).await;
        }
        assert!(polite.iter().chain(&crowd).all(|permit| notice(permit).is_none()), "{case}");
        crowd.truncate(300);
        crowd.extend((9_000..).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()));
        assert_eq!(crowd.len(), 379);
    }
}

/// One that waits for room is told of once it has waited in vain; what an admin set is told at once.
#[test]
fn whoever_may_ask_again_is_told_of_at_the_end() {
    let gate = gate(GateSettings {
        rules: rules(gate_rule(50, Limit::Unlimited)),
        places: places(20, 10),
        ..GateSettings::default()
    });
    let greedy = CallerKey::Uid(1);
    let held: Vec<ConnectionPermit> = (0..20).map_while(|_| gate.open(greedy).ok()).collect();
    gate.out_of_room();
    for _ in 0..3 {
        assert_eq!(gate.open_on(greedy, Attempt::First).err(), Some(ConnectionRefusal::NodeConnections));
        assert_eq!(gate.out_of_room(), []);
    }
    assert_eq!(gate.open(greedy).err(), Some(ConnectionRefusal::NodeConnections));
    assert_eq!(gate.out_of_room().len(), 1);
    drop(held);
    assert!(gate.open_on(greedy, Attempt::First).is_ok(), "once there is room");
}

/// Who calls on a new connection each time still holds the last one, as far as the agent knows.
#[test]
fn one_connection_is_as_good_as_none_for_the_reserve() {
    let gate = gate(GateSettings {
        rules: rules(gate_rule(50, Limit::Unlimited)),
        places: places(20, 10),
        ..GateSettings::default()
    });
    let (greedy, polite) = (CallerKey::Uid(1), CallerKey::Uid(2));
    let held: Vec<ConnectionPermit> = (0..20).map_while(|_| gate.open(greedy).ok()).collect();
    assert_eq!(held.len(), 10);
    let mut last = gate.open(polite).unwrap();
    for _ in 0..100 {
        last = gate.open(polite).unwrap();
    }
    let _second = gate.open(polite).unwrap();
    let refused = gate.open(polite).err();
    assert_eq!(refused, Some(ConnectionRefusal::NodeConnections), "the reserve is not for a third");
    drop(last);
}

#[test]
fn descriptors_and_memory_bound_the_connections() {
    let settings = open();
    for (case, nofile, budget, most) in [
        ("descriptors, but for those with a few", 1024, AMPLE, 400 - 16),
        ("memory", 1 << 20, 24 << 20, 3_215),
    ] {
        let settings = LimitSettings {
            gate: GateSettings { rules: rules(gate_rule(5000, Limit::Unlimited)), ..settings.gate.clone() },
            ..settings.clone()
        };
        let gate = Gate::new(GatePlan::new(&settings, nofile, budget).unwrap(), &limits(&settings));
        let held: Vec<ConnectionPermit> =
            (0..5000).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
        assert_eq!(held.len(), most, "{case}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever some hold, and in how large connections: while one below its share is refused, or is not read, they give up what is
    /// above theirs within two looks, whether they read that they are to or not; nobody loses what it could have kept, nor all.
    #[test]
    fn who_is_below_its_share_finds_memory_within_two_looks(
        held in prop::collection::vec((1..5_u32, 1..3_000_u64), 1..80),
        reads in any::<bool>(),
    ) {
        const OTHER: u64 = 3 << 20;
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_time().start_paused(true).build().unwrap().block_on(async {
            let gate = gate_within(GateSettings::default(), 24 << 20);
            gate.look(None, OTHER);
            let polite: Vec<ConnectionPermit> =
                (0..12).map(|_| gate.open(CallerKey::Uid(99)).unwrap()).collect();
            polite.iter().for_each(|permit| permit.holding().hold(HTTP2));
            let mut hogs: Vec<(u32, ConnectionPermit)> = vec![];
            // More than there is room for, and not so much that whoever has most is closed for it.
            let mut left = 16_500_u64 << 10;
            for (uid, kib) in held {
                if let Some(after) = left.checked_sub(kib << 10)
                    && let Ok(permit) = gate.open(CallerKey::Uid(uid))
                {
                    permit.holding().hold(kib << 10);
                    hogs.push((uid, permit));
                    left = after;
                }
            }
            let held = |hogs: &[(u32, ConnectionPermit)], uid| -> u64 {
                hogs.iter().filter(|it| it.0 == uid).map(|it| it.1.holding().bytes()).sum()
            };
            let had = [1, 2, 3, 4].map(|uid| held(&hogs, uid));
            let mut lost: Vec<(u32, u64, u64)> = vec![];
            let fits = || {
                let fits = polite[0].holding().try_hold(4 << 10);
                fits.then(|| polite[0].holding().release(4 << 10)).is_some()
            };
            let mut looks = 0;
            while gate.open(CallerKey::Uid(99)).is_err() || !fits() {
                looks += 1;
                prop_assert!(looks <= 2, "{:?} of {:?}", gate.heaviest(5), gate.shares());
                gate.look(None, OTHER);
                gate.shed();
                let share = gate.shares().bytes.unwrap_or(u64::MAX);
                hogs.retain(|(uid, permit)| {
                    let told = notice(permit);
                    let goes = told == Some(Notice::Close) || reads && told.is_some();
                    if goes {
                        lost.push((*uid, permit.holding().bytes(), share));
                    }
                    !goes
                });
                advance(Duration::from_millis(250)).await;
            }
            for (uid, bytes, share) in lost {
                prop_assert!(held(&hogs, uid) > 0, "{uid} had {had:?}");
                prop_assert!(held(&hogs, uid) + bytes > share, "{uid} had {had:?}, and lost {bytes} of {share}");
            }
            prop_assert!(polite.iter().all(|permit| notice(permit).is_none()));
            Ok(())
        })?;
    }

    /// Whatever some callers open and close, the next that holds nothing gets in while the reserve lasts.
    #[test]
    fn a_newcomer_finds_the_gate_open(
        moves in prop::collection::vec((0..6_u32, any::<bool>(), 1..20_usize), 0..60),
        newcomers in 1..10_u32,
    ) {
        let gate = gate(GateSettings {
            rules: rules(gate_rule(15, quota(1e6, 1_000_000))),
            // Two for each of the six, and one for each newcomer.
            places: places(60, 22),
            ..GateSettings::default()
        });
        let mut held: Vec<(u32, ConnectionPermit)> = vec![];
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
