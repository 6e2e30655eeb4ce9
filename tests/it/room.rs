//! What holds by default: with room it refuses nobody, without processor time a call waits a little, and what an admin set
//! refuses at once. And the wait: for whom, how long, how many.

use std::time::Duration;

use durward::{
    api::status::RequestError,
    identity::SpiffeId,
    limits::{
        Admitted, Attestations, CallerKey, LimitSettings, Limits, Method, NodeQuota, NodeSettings, Patience,
        Refusal, RejectionStatus,
        bucket::{Per, Quota},
        caller::{Caller, NthCall},
        method::PerMethod,
        patience::{FOR_ATTESTATION, FOR_ROOM, PLACES},
        policy::Layers,
        refusal::{LONGEST_TURN, Reason, Stage},
        report::{Event, Standing},
        room::Short,
        rule::{Costs, Limit, Origin, Rule},
        schedule::Schedule,
    },
    os::clock::Clock,
    telemetry::registry::Registry,
};
use futures_util::future::join_all;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusRecorder};
use proptest::prelude::*;
use tokio::time::{Instant, advance, sleep, timeout};

const JWT: Method = Method::FetchJwtSvid;

#[derive(Clone, Copy, Debug)]
struct Uid(u32);

impl Caller for Uid {
    fn caller_key(&self) -> CallerKey {
        CallerKey::Uid(self.0)
    }
}

fn rule(rate: f64, burst: u32, origin: Origin) -> Rule {
    let limit = Limit::Quota(Quota::new(rate, Per::Second, burst).unwrap());
    Rule::new(limit, Costs::ONE, Schedule::default()).unwrap().of_origin(origin)
}

fn unlimited<P>() -> Layers<P> {
    Layers::new(Rule::new(Limit::Unlimited, Costs::OF_CALLERS, Schedule::default()).unwrap())
}

/// No limit anywhere, for a test to set one.
fn open() -> LimitSettings {
    let node = NodeSettings { quotas: PerMethod::all(None), ..NodeSettings::default() };
    LimitSettings { caller: unlimited(), identity: unlimited(), node, ..LimitSettings::default() }
}

/// The same limit at one of the stages.
fn each_stage(rate: f64, burst: u32, origin: Origin) -> [(Stage, LimitSettings); 3] {
    let of_node = NodeQuota { origin, ..NodeQuota::set(Quota::new(rate, Per::Second, burst).unwrap()) };
    let node = NodeSettings { quotas: PerMethod::all(Some(of_node)), ..NodeSettings::default() };
    let rule = || rule(rate, burst, origin);
    [
        (Stage::Caller, LimitSettings { caller: Layers::new(rule()), ..open() }),
        (Stage::Identity, LimitSettings { identity: Layers::new(rule()), ..open() }),
        (Stage::Node, LimitSettings { node, ..open() }),
    ]
}

fn limits(settings: &LimitSettings) -> Limits {
    Limits::new(settings, Clock::SYSTEM, Registry::new(&metrics::NoopRecorder))
}

/// The same, where the processor is short.
fn crowded(settings: &LimitSettings) -> Limits {
    let limits = limits(settings);
    limits.room().set(Short::Processor, true);
    limits
}

fn web() -> [SpiffeId; 1] {
    [SpiffeId::parse("spiffe://td/web").unwrap()]
}

/// A call to its end: what the handler of a method does.
async fn call(limits: &Limits, uid: u32, patience: Patience) -> Result<(), Refusal> {
    let mut admitted = limits.admit(Uid(uid), JWT, patience).await?;
    limits.admit_for(&mut admitted, &web()).await
}

/// How many of so many calls at once pass, the refusals of the others, and how long it took.
async fn calls(limits: &Limits, uid: u32, n: u32, patience: Patience) -> (usize, Vec<Refusal>, Duration) {
    let began = Instant::now();
    let done = join_all((0..n).map(|_| call(limits, uid, patience))).await;
    let passed = done.iter().filter(|done| done.is_ok()).count();
    (passed, done.into_iter().filter_map(Result::err).collect(), began.elapsed())
}

fn left(limits: &Limits, uid: u32) -> (u32, Origin) {
    match limits.caller_standing(CallerKey::Uid(uid), JWT).1 {
        Standing::Tokens { left, origin, .. } => (left, origin),
        other => panic!("{other:?}"),
    }
}

/// The sum of the series of this name for calls of the caller stage.
fn count(recorder: &PrometheusRecorder, name: &str) -> f64 {
    let text = recorder.handle().render();
    let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(r#"stage="caller""#));
    lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

#[tokio::test(start_paused = true)]
async fn with_room_what_holds_by_default_refuses_nobody() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let limits = Limits::new(&LimitSettings::default(), Clock::SYSTEM, Registry::new(&recorder));
    let (passed, _, took) = calls(&limits, 1, 20_000, Patience::NONE).await;
    assert_eq!((passed, took), (20_000, Duration::ZERO));
    assert_eq!(count(&recorder, "durward_rate_limit_allowed_total"), 20_000.0);
    assert_eq!(count(&recorder, "durward_rate_limit_exceeded_total"), 0.0);
    assert_eq!(limits.wanting(), 0);
    // It is charged as far as it has tokens: nothing is owed.
    assert_eq!(left(&limits, 1), (0, Origin::ByDefault));
    advance(Duration::from_millis(10)).await;
    assert_eq!(left(&limits, 1).0, 1);

    // Without processor time, whoever asked for less has its tokens still, at each stage.
    limits.room().set(Short::Processor, true);
    let (passed, ..) = calls(&limits, 2, 150, Patience::NONE).await;
    assert_eq!(passed, 150);
    let (passed, refusals, _) = calls(&limits, 1, 50, Patience::NONE).await;
    assert!(passed <= 1 && limits.wanting() == 50 - u64::try_from(passed).unwrap(), "{passed}");
    assert!(refusals.iter().all(|refusal| refusal.status == RejectionStatus::Unavailable), "{refusals:?}");
}

/// Tokens share processor time out. Whoever is refused for memory or descriptors is refused for what it holds of them.
#[tokio::test(start_paused = true)]
async fn without_processor_time_alone_what_holds_by_default_binds() {
    for (short, binds) in [
        (&[Short::Memory][..], false),
        (&[Short::Descriptors], false),
        (&[Short::Memory, Short::Descriptors], false),
        (&[Short::Memory, Short::Processor], true),
        (&[Short::Processor], true),
    ] {
        for origin in [Origin::ByDefault, Origin::Set] {
            for (stage, settings) in each_stage(100.0, 10, origin) {
                let limits = limits(&settings);
                short.iter().for_each(|short| limits.room().set(*short, true));
                let (passed, ..) = calls(&limits, 1, 100, Patience::NONE).await;
                let want = if binds || origin == Origin::Set { 10 } else { 100 };
                assert_eq!(passed, want, "{stage:?}, {origin:?}, short of {short:?}");
            }
        }
    }
}

/// However many callers have one SPIFFE ID, none that holds nothing is refused by its bucket where memory is what is short.
#[tokio::test(start_paused = true)]
async fn a_herd_of_many_callers_with_one_identity_is_served_without_memory() {
    let limits = limits(&LimitSettings::default());
    limits.room().set(Short::Memory, true);
    let herd = join_all((0..2_000).map(|uid| call(&limits, uid, Patience::NONE))).await;
    assert_eq!(herd.iter().filter(|one| one.is_err()).count(), 0);
}

/// A call, and how it stands to its connection.
#[derive(Clone, Copy, Debug)]
struct Nth(NthCall);

impl Caller for Nth {
    fn caller_key(&self) -> CallerKey {
        CallerKey::Uid(1)
    }

    fn begins_call(&self) -> NthCall {
        self.0
    }
}

/// What the gate let in is served once: no bucket of its caller's or its identity's refuses that which nobody set.
#[tokio::test(start_paused = true)]
async fn the_first_call_of_a_connection_that_came_in_time_passes() {
    for origin in [Origin::ByDefault, Origin::Set] {
        for (stage, settings) in each_stage(100.0, 10, origin) {
            for nth in [NthCall::First, NthCall::FirstLetIn, NthCall::Further] {
                let limits = crowded(&settings);
                let mut passed = 0;
                for _ in 0..100 {
                    let admitted = limits.admit_caller(Nth(nth), JWT);
                    let done = admitted.and_then(|mut it| limits.admit_identities(&mut it, &web()));
                    passed += u32::from(done.is_ok());
                }
                let all = origin == Origin::ByDefault && nth == NthCall::FirstLetIn && stage != Stage::Node;
                assert_eq!(passed, if all { 100 } else { 10 }, "{stage:?}, {origin:?}, {nth:?}");
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_set_refuses_at_once_whether_there_is_room_or_not() {
    for (stage, settings) in each_stage(100.0, 10, Origin::Set) {
        for limits in [limits(&settings), crowded(&settings)] {
            let (passed, refusals, took) = calls(&limits, 1, 20, Patience::USUAL).await;
            assert_eq!((passed, took), (10, Duration::ZERO), "{stage:?}");
            let refused =
                refusals.iter().all(|refusal| refusal.stage == stage && refusal.origin == Origin::Set);
            assert!(refused, "{refusals:?}");
            assert_eq!(limits.wanting(), 0, "{stage:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_room_a_call_waits_for_its_tokens_and_no_longer_than_it_may() {
    let of_call = |ms| Patience::within(Duration::from_millis(ms));
    for (case, patience, longest, late) in [
        ("usual", Patience::USUAL, FOR_ROOM, 25),
        ("a timeout that is shorter", of_call(100), Duration::from_millis(100), 9),
        ("a timeout that is longer", of_call(10_000), FOR_ROOM, 25),
        ("no time at all", of_call(0), Duration::ZERO, 0),
    ] {
        for (stage, settings) in each_stage(100.0, 10, Origin::ByDefault) {
            let limits = crowded(&settings);
            let (passed, refusals, took) = calls(&limits, 1, 100, patience).await;
            // The clock has steps of a millisecond.
            assert!(took <= longest + Duration::from_millis(1), "{case}, {stage:?}: {took:?}");
            let waited = passed - 10;
            assert!(waited <= late && waited + 2 >= late, "{case}, {stage:?}: {waited} of {late}");
            for refusal in refusals {
                let is = (refusal.stage, refusal.reason, refusal.origin, refusal.status);
                let want = (stage, Reason::Rate, Origin::ByDefault, RejectionStatus::Unavailable);
                assert_eq!(is, want, "{case}");
                assert!(refusal.wait().is_some(), "{case}");
                assert_eq!(RequestError::from(refusal).code(), tonic::Code::Unavailable, "{case}");
            }
            assert_eq!((limits.wanting(), limits.waiting()), (90, 0), "{case}, {stage:?}");
        }
    }
}

/// Calls of a crowd that come back when they were told to: each hears when it is its turn, so that none needs many tries.
#[tokio::test(start_paused = true)]
async fn who_comes_back_when_it_was_told_to_is_served() {
    for (stage, settings) in each_stage(100.0, 10, Origin::ByDefault) {
        let limits = crowded(&settings);
        let served = join_all((0..600).map(async |_| {
            for tries in 1..=5 {
                let Err(refusal) = call(&limits, 1, Patience::USUAL).await else { return tries };
                let wait = refusal.wait().unwrap();
                assert!((Duration::from_millis(1)..=LONGEST_TURN).contains(&wait), "{stage:?}: {wait:?}");
                sleep(wait).await;
            }
            panic!("{stage:?}: told five times to come back, and refused each time")
        }));
        let tries: u32 = served.await.into_iter().sum();
        assert!(tries < 3 * 600, "{stage:?}: {tries} tries");
        // Whoever may not wait hears of those that do, and what an admin set tells when the next token is there.
        let waits = async { join_all((0..50).map(|_| call(&limits, 1, Patience::USUAL))).await };
        let at_once = async {
            sleep(Duration::from_millis(1)).await;
            call(&limits, 1, Patience::NONE).await.unwrap_err().retry_after
        };
        let (_, told) = tokio::join!(waits, at_once);
        assert!(told >= Duration::from_millis(350), "{stage:?}: {told:?}");
    }
    for (stage, settings) in each_stage(100.0, 10, Origin::Set) {
        let (_, refusals, _) = calls(&limits(&settings), 1, 50, Patience::USUAL).await;
        let exact = refusals.iter().all(|refusal| refusal.retry_after == Duration::from_millis(10));
        assert!(exact, "{stage:?}: {refusals:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_is_counted_once() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let settings = LimitSettings { caller: Layers::new(rule(100.0, 10, Origin::ByDefault)), ..open() };
    let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&recorder));
    limits.room().set(Short::Processor, true);
    let (passed, refusals, _) = calls(&limits, 1, 100, Patience::USUAL).await;
    let counted = ["durward_rate_limit_allowed_total", "durward_rate_limit_exceeded_total"]
        .map(|name| count(&recorder, name));
    assert_eq!(counted.map(|n| n.to_string()), [passed, refusals.len()].map(|n| n.to_string()));
    assert_eq!(passed + refusals.len(), 100);
    // For people too, at each stage: who waited and passed was not refused, and all came in one second.
    for (stage, settings) in each_stage(100.0, 10, Origin::ByDefault) {
        let limits = crowded(&settings);
        let (passed, refusals, _) = calls(&limits, 1, 100, Patience::USUAL).await;
        let told = limits.heaviest(10);
        let of_stage = told.iter().find(|(at, _)| *at == stage).map(|(_, heavy)| heavy.refused);
        let most = u32::try_from(refusals.len()).unwrap();
        assert!(passed > 10, "{stage:?}: some waited");
        assert_eq!(of_stage, Some(most), "{stage:?}: {told:?}");
        let in_a_second = told.iter().find(|(at, _)| *at == stage).map(|(_, heavy)| heavy.most);
        // Of what the node shares it is not known.
        let want = if stage == Stage::Node { 0 } else { 100 };
        assert_eq!(in_a_second, Some(want), "{stage:?}: {told:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn when_room_returns_nobody_waits_any_more() {
    for (stage, settings) in each_stage(1.0, 10, Origin::ByDefault) {
        let limits = crowded(&settings);
        let returns = async {
            sleep(Duration::from_millis(50)).await;
            assert_eq!(limits.waiting(), 90, "{stage:?}");
            limits.room().set(Short::Processor, false);
        };
        let ((passed, _, took), ()) = tokio::join!(calls(&limits, 1, 100, Patience::USUAL), returns);
        assert_eq!(passed, 100, "{stage:?}");
        assert!(took < Duration::from_millis(60), "{stage:?}: {took:?}");
    }
}

/// One that holds more than its share of memory.
#[derive(Clone, Copy, Debug)]
struct Greedy<'a>(&'a Limits);

impl Caller for Greedy<'_> {
    fn caller_key(&self) -> CallerKey {
        CallerKey::Uid(7)
    }

    fn is_above_share(&self) -> bool {
        self.0.room().is_short(Short::Memory)
    }
}

/// A crowd of one user is above its share while its own answers are on their way; who holds memory for longer is refused, and
/// nobody below its share waits for it.
#[tokio::test(start_paused = true)]
async fn who_holds_its_share_of_memory_waits_for_room_and_no_longer_than_it_may() {
    for (case, returns_after, patience, passes, within) in [
        ("its answers leave", 50, Patience::USUAL, true, 60),
        ("they do not", 5_000, Patience::USUAL, false, 260),
        ("its time is short", 5_000, Patience::within(Duration::from_millis(100)), false, 100),
        ("it may not wait", 50, Patience::NONE, false, 1),
    ] {
        let limits = limits(&open());
        limits.room().set(Short::Memory, true);
        let began = Instant::now();
        let ask = async {
            let admitted = limits.admit(Greedy(&limits), JWT, patience).await;
            (admitted.map(drop).map_err(|why| why.reason), began.elapsed())
        };
        let returns = async {
            call(&limits, 8, Patience::NONE).await.unwrap();
            sleep(Duration::from_millis(returns_after)).await;
            limits.room().set(Short::Memory, false);
        };
        let ((admitted, took), ()) = tokio::join!(ask, returns);
        assert_eq!(admitted, if passes { Ok(()) } else { Err(Reason::Memory) }, "{case}");
        assert!(took < Duration::from_millis(within), "{case}: {took:?}");
        // The log has what for, and which call.
        let told = limits.events().into_iter().find_map(|event| match event {
            Event::Refusing { what, .. } => Some((what.reason, what.method)),
            _ => None,
        });
        assert_eq!(told, (!passes).then_some((Reason::Memory, Some(JWT))), "{case}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_leaves_nothing_behind() {
    for (stage, settings) in each_stage(1.0, 10, Origin::ByDefault) {
        let limits = crowded(&settings);
        let gone = timeout(Duration::from_millis(100), calls(&limits, 1, 100, Patience::USUAL)).await;
        assert!(gone.is_err(), "{stage:?}");
        assert_eq!((limits.waiting(), limits.attestations()), (0, 0), "{stage:?}");
        // The tokens of those that waited were taken by nobody.
        sleep(Duration::from_secs(1)).await;
        assert_eq!(calls(&limits, 1, 1, Patience::NONE).await.0, 1, "{stage:?}");
    }
}

/// However many calls of one caller wait, they are a bounded number, and another one finds a place.
#[tokio::test(start_paused = true)]
async fn places_are_bounded_and_shared() {
    let settings = LimitSettings { caller: Layers::new(rule(5.0, 1, Origin::ByDefault)), ..open() };
    let limits = crowded(&settings);
    let of_other = async {
        sleep(Duration::from_millis(1)).await;
        assert_eq!(limits.waiting(), PLACES / 2);
        calls(&limits, 2, 2, Patience::USUAL).await
    };
    let ((passed, refusals, _), (other, ..)) =
        tokio::join!(calls(&limits, 1, 5000, Patience::USUAL), of_other);
    assert_eq!((passed, refusals.len(), other), (2, 4998, 2));
}

/// Four callers without end, and one that asks ten times a second, share an identity, then the node.
#[tokio::test(start_paused = true)]
async fn without_room_whoever_takes_less_than_its_share_waits_for_nobody() {
    for (stage, settings) in each_stage(50.0, 100, Origin::ByDefault).into_iter().skip(1) {
        let limits = limits(&settings);
        let loud = async |uid| {
            loop {
                // With room they take all there is.
                let _refused: bool = call(&limits, uid, Patience::USUAL).await.is_err();
                sleep(Duration::from_millis(2)).await;
            }
        };
        let polite = async {
            for tick in 0..300 {
                // Room comes and goes.
                limits.room().set(Short::Processor, tick % 100 > 20);
                let began = Instant::now();
                assert_eq!(call(&limits, 5, Patience::USUAL).await, Ok(()), "{stage:?}");
                assert_eq!(began.elapsed(), Duration::ZERO, "{stage:?}, {tick}");
                sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! {
            () = polite => {}
            ((), (), (), ()) = async { tokio::join!(loud(1), loud(2), loud(3), loud(4)) } => {}
        }
    }
}

/// What is to spare while the processor alone is short: for all who ask, in equal parts, at each stage. Not above what an
/// admin set, nor where memory is short too.
#[tokio::test(start_paused = true)]
async fn what_is_to_spare_of_the_processor_is_for_all_who_ask() {
    for (case, short, to_spare, origin, had) in [
        ("the processor", &[Short::Processor][..], 1_000.0, Origin::ByDefault, 950..1_050),
        ("nothing to spare", &[Short::Processor], 0.0, Origin::ByDefault, 0..60),
        ("memory too", &[Short::Processor, Short::Memory], 1_000.0, Origin::ByDefault, 0..60),
        ("set", &[Short::Processor], 1_000.0, Origin::Set, 0..60),
    ] {
        for (stage, settings) in each_stage(1.0, 2, origin) {
            let limits = limits(&settings);
            short.iter().for_each(|short| limits.room().set(*short, true));
            limits.set_spare(to_spare);
            // The first four ask every millisecond, the fifth 250 times a second; each for two seconds.
            let mut passed = [0; 5];
            for ms in 0..2_000 {
                for (uid, passed) in (1..).zip(&mut passed) {
                    if uid < 5 || ms % 4 == 0 {
                        *passed += u32::from(call(&limits, uid, Patience::NONE).await.is_ok());
                    }
                }
                advance(Duration::from_millis(1)).await;
            }
            let a_second = passed.iter().sum::<u32>() / 2;
            assert!(had.contains(&a_second), "{case}, {stage:?}: {passed:?}");
            if had.start > 0 {
                assert!(
                    passed.iter().all(|passed| (340..460).contains(passed)),
                    "{case}, {stage:?}: {passed:?}"
                );
            }
            assert!(
                limits.lacked_spare() || stage != Stage::Caller || origin == Origin::Set || short.len() > 1
            );
        }
    }
}

/// A call that waits passes as soon as there is something to spare for it, and not when it has tokens.
#[tokio::test(start_paused = true)]
async fn who_waits_has_what_is_to_spare() {
    let limits = crowded(&LimitSettings { caller: Layers::new(rule(1.0, 1, Origin::ByDefault)), ..open() });
    limits.set_spare(100.0);
    let (passed, refused, took) = calls(&limits, 1, 20, Patience::USUAL).await;
    assert!(passed >= 15 && took <= FOR_ROOM, "{passed} in {took:?}: {refused:?}");
}

fn attestations(all: u32, per_caller: u32) -> LimitSettings {
    let attestations = Attestations::new(all.try_into().ok(), per_caller.try_into().ok()).unwrap();
    LimitSettings { node: NodeSettings { attestations, ..open().node }, ..open() }
}

/// Is attested for so long.
async fn attested(limits: &Limits, uid: u32, time: Duration) -> Result<Duration, Refusal> {
    let began = Instant::now();
    let admitted: Admitted<Uid> = limits.admit(Uid(uid), JWT, Patience::USUAL).await?;
    let waited = began.elapsed();
    sleep(time).await;
    drop(admitted);
    Ok(waited)
}

#[tokio::test(start_paused = true)]
async fn attestations_wait_for_a_place_and_no_more_run_than_may() {
    let limits = limits(&attestations(64, 4));
    let most = async {
        loop {
            assert!(limits.attestations() <= 5);
            sleep(Duration::from_millis(1)).await;
        }
    };
    let all = async {
        let of_one = join_all((0..50).map(|_| attested(&limits, 1, Duration::from_millis(100))));
        let other = async {
            sleep(Duration::from_millis(50)).await;
            attested(&limits, 2, Duration::from_millis(100)).await
        };
        tokio::join!(of_one, other)
    };
    let (waits, other) = tokio::select! {
        done = all => done,
        () = most => panic!("it never ends"),
    };
    let longest = waits.into_iter().map(|wait| wait.expect("served")).max();
    assert_eq!(longest, Some(Duration::from_millis(1200)), "four at a time");
    assert_eq!(other, Ok(Duration::ZERO), "another caller has its own");
    assert_eq!((limits.waiting(), limits.attestations(), limits.wanting()), (0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_finds_no_place_to_be_attested_hears_it_in_time() {
    let limits = limits(&attestations(8, 8));
    let (hanging, polite) = (Duration::from_secs(3600), Duration::from_millis(1));
    let hostile = async { join_all((0..500).map(|_| attested(&limits, 1, hanging))).await };
    let other = async {
        let began = Instant::now();
        for _ in 0..3000 {
            assert_eq!(attested(&limits, 2, polite).await, Ok(Duration::ZERO));
        }
        assert!(limits.attestations() < 8 && limits.waiting() == 0);
        began.elapsed()
    };
    let took = tokio::select! { took = other => took, _ = hostile => panic!("they hang") };
    assert!(took > FOR_ATTESTATION, "those who waited have heard by now");

    let (hostile, refused) = (join_all((0..8).map(|_| attested(&limits, 1, hanging))), async {
        sleep(Duration::from_millis(1)).await;
        let began = Instant::now();
        let refusal = attested(&limits, 1, polite).await.unwrap_err();
        (refusal, began.elapsed())
    });
    let (refusal, took) = tokio::select! { refused = refused => refused, _ = hostile => panic!("they hang") };
    assert_eq!((refusal.reason, refusal.status), (Reason::InFlight, RejectionStatus::Unavailable));
    assert!(took <= FOR_ATTESTATION + Duration::from_millis(1), "{took:?}");
}

/// One step of a game.
#[derive(Clone, Debug)]
enum Step {
    Call(u32),
    Room(bool),
    Pass(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..3_u32).prop_map(Step::Call),
        1 => any::<bool>().prop_map(Step::Room),
        2 => (0..300_u64).prop_map(Step::Pass),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever comes: what is set lets pass what its bucket has, and what holds by default all of it with room, and
    /// without processor time never more than its bucket would.
    #[test]
    fn what_passes_is_what_room_and_buckets_say(steps in steps(), stage in 0..3_usize, burst in 1..12_u32) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let set = limits(&each_stage(10.0, burst, Origin::Set)[stage].1);
            let by_default = limits(&each_stage(10.0, burst, Origin::ByDefault)[stage].1);
            let (mut room, mut short_since, mut passed, mut given) = (true, Instant::now(), 0, [0_u32; 3]);
            let began = Instant::now();
            for step in steps {
                match step {
                    Step::Room(there) => {
                        if room && !there {
                            (short_since, passed) = (Instant::now(), 0);
                        }
                        room = there;
                        for limits in [&set, &by_default] {
                            limits.room().set(Short::Processor, !there);
                        }
                    }
                    Step::Pass(ms) => advance(Duration::from_millis(ms)).await,
                    Step::Call(uid) => {
                        given[usize::try_from(uid).unwrap()] += u32::from(call(&set, uid, Patience::NONE).await.is_ok());
                        let passes = call(&by_default, uid, Patience::NONE).await.is_ok();
                        prop_assert!(passes || !room);
                        passed += u32::from(passes && !room);
                    }
                }
                let most = |time: Duration| f64::from(burst) + time.as_secs_f64() * 10.0 + 1e-6;
                // Each has a bucket of its own, or a share beside the one of all.
                let buckets = if stage == 0 { 3.0 } else { 4.0 };
                prop_assert!(room || f64::from(passed) <= buckets * most(short_since.elapsed()));
                let given = if stage == 0 { given } else { [given.iter().sum(), 0, 0] };
                for given in given {
                    prop_assert!(f64::from(given) <= most(began.elapsed()), "{given}");
                }
            }
            Ok(())
        })?;
    }

    /// Whatever calls of some callers come when: none is kept past its time, and there are never more than places.
    #[test]
    fn nobody_waits_past_its_time(
        callers in prop::collection::vec((0..4_u32, 0..400_u64, 0..400_u64), 1..60),
        stage in 0..3_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let limits = crowded(&each_stage(20.0, 3, Origin::ByDefault)[stage].1);
            let one = async |(uid, after, ms)| {
                sleep(Duration::from_millis(after)).await;
                let (began, timeout) = (Instant::now(), Duration::from_millis(ms));
                let refused = call(&limits, uid, Patience::within(timeout)).await.is_err();
                (refused, began.elapsed(), timeout)
            };
            for (_, took, timeout) in join_all(callers.into_iter().map(one)).await {
                let most = timeout.min(FOR_ROOM) + Duration::from_millis(1);
                prop_assert!(took <= most, "{took:?} of {most:?}");
            }
            prop_assert_eq!(limits.waiting(), 0);
            Ok(())
        })?;
    }
}
