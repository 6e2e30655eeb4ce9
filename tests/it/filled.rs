//! Memory that callers have filled: who stays, who waits for more, and who comes in.

use std::time::Duration;

use durward::{
    limits::{
        CallerKey, ConnectionPermit, ConnectionRefusal, Gate, GatePlan, LimitSettings, Limits,
        budget::{HTTP2, STREAM},
        holding::Notice,
    },
    os::clock::Clock,
    telemetry::registry::Registry,
};
use futures_util::FutureExt as _;
use tokio::time::{Instant, advance};

const MIB: u64 = 1 << 20;
/// What the agent takes by itself.
const ITSELF: u64 = 5 * MIB;
const TICK: Duration = Duration::from_millis(50);

fn gate(budget: u64) -> Gate {
    let settings = LimitSettings::default().within(budget);
    let limits = Limits::new(&settings, Clock::SYSTEM, Registry::new(&metrics::NoopRecorder));
    let gate = Gate::new(GatePlan::new(&settings, 20_000, budget).unwrap(), &limits);
    gate.look(None, ITSELF);
    gate
}

/// A connection that has begun.
fn begun(gate: &Gate, uid: u32) -> Result<ConnectionPermit, ConnectionRefusal> {
    let permit = gate.open(CallerKey::Uid(uid))?;
    if permit.holding().try_begin(HTTP2) { Ok(permit) } else { Err(gate.refuse_begun(&permit)) }
}

fn notice(permit: &ConnectionPermit) -> Option<Notice> {
    permit.holding().told(None).now_or_never()
}

/// A user who has filled memory alone keeps all that it has, and is refused what it asks further. Then another comes: it has its share
/// within two seconds and its first connection at once, and the first gives up its newest.
#[tokio::test(start_paused = true)]
async fn one_alone_keeps_what_it_has_and_gives_way_to_another() {
    let gate = gate(24 * MIB);
    let mut first: Vec<_> = std::iter::from_fn(|| begun(&gate, 1).ok()).enumerate().collect();
    let all = first.len();
    assert!((350..450).contains(&all), "{all}");
    for _ in 0..100 {
        gate.look(None, ITSELF);
        assert_eq!(gate.shed(), []);
        assert_eq!(begun(&gate, 1).err(), Some(ConnectionRefusal::Memory));
        advance(TICK).await;
    }
    assert!(first.iter().all(|(_, permit)| notice(permit).is_none()));

    let (mut second, began) = (vec![begun(&gate, 2).unwrap()], Instant::now());
    while second.len() < 150 {
        second.extend(std::iter::from_fn(|| begun(&gate, 2).ok()));
        gate.look(None, ITSELF);
        let told = gate.shed();
        assert!(told.iter().all(|told| told.caller == CallerKey::Uid(1)), "{told:?}");
        // Who is told does go.
        first.retain(|(_, permit)| notice(permit).is_none());
        assert!(began.elapsed() < Duration::from_secs(2), "{} of {}", second.len(), first.len());
        advance(TICK).await;
    }
    assert!(first.iter().map(|(nth, _)| *nth).eq(0..first.len()), "the newest of the first went");
    assert!(first.len() >= all * 2 / 5, "{} of {all}: it keeps its share", first.len());
}

/// More callers than there are least shares, each with a connection that asks for more and more: what it asks further waits, so that
/// one who holds less than the least share gets its next connection, however large that of the crowd have become.
#[tokio::test(start_paused = true)]
async fn what_open_connections_ask_further_comes_behind_what_begins() {
    for callers in [20, 124] {
        let gate = gate(16 * MIB);
        let polite: Vec<_> = (0..7).map(|_| begun(&gate, 1).unwrap()).collect();
        let crowd: Vec<_> = (0..callers).map(|nth| begun(&gate, 100 + nth).unwrap()).collect();
        let each = crowd[0].holding().bytes();
        for round in 0..40 {
            for _ in 0..4 {
                crowd.iter().for_each(|one| _ = one.holding().try_hold(STREAM));
            }
            gate.look(None, ITSELF);
            let next = begun(&gate, 1);
            assert!(next.is_ok(), "{callers}, {round}: {next:?} of {:?}", gate.memory());
            advance(TICK).await;
        }
        assert!(polite.iter().chain(&crowd).all(|permit| notice(permit).is_none()));
        // All of them have some of it.
        let has_more = |one: &ConnectionPermit| one.holding().bytes() >= each + STREAM;
        assert!(crowd.iter().all(has_more), "{callers}");
        assert!(!crowd[0].holding().try_hold(4 * STREAM), "{callers}: there is an end");
    }
}
