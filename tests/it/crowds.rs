//! More callers than the gate has places: who gets one, who gives one up, and who is left alone.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    os::unix::{net::UnixStream, process::CommandExt as _},
    process::{Child, Command, Stdio},
    time::Duration,
};

use durward::{
    limits::{
        CallerKey, ConnectionPermit, ConnectionRefusal, Gate, GatePlan, LimitSettings, Limits,
        gate_settings::{GatePlaces, GateSettings},
        holding::Notice,
    },
    os::clock::Clock,
    telemetry::registry::Registry,
};
use futures_util::FutureExt as _;
use nix::{sys::signal::Signal, unistd::geteuid};
use proptest::prelude::*;
use tokio::time::advance;

use crate::{
    frames::{Called, FETCH_JWT, PREFACE, SETTINGS, call, call_frames, frame, jwt_request, message},
    hostile::PATIENCE,
    support::{Process, write_config},
};

const TICK: Duration = Duration::from_millis(50);
const POLITE: CallerKey = CallerKey::Uid(1);

/// A gate of a process that may have so many descriptors.
fn gate(nofile: u64) -> Gate {
    gate_by(&LimitSettings::default(), nofile)
}

fn gate_by(settings: &LimitSettings, nofile: u64) -> Gate {
    let limits = Limits::new(settings, Clock::SYSTEM, Registry::new(&metrics::NoopRecorder));
    Gate::new(GatePlan::new(settings, nofile, 1 << 30).unwrap(), &limits)
}

fn notice(permit: &ConnectionPermit) -> Option<Notice> {
    permit.holding().told(None).now_or_never()
}

fn told(permits: &[ConnectionPermit]) -> usize {
    permits.iter().filter(|permit| notice(permit).is_some()).count()
}

/// Callers with a connection each, as many as ask, who stay, or leave after a second; and who goes when it is told so.
#[derive(Default)]
struct Crowd(BTreeMap<u32, (ConnectionPermit, u32)>);

impl Crowd {
    /// One moment of it: those of `callers` without a connection ask for one.
    fn moves(&mut self, gate: &Gate, callers: u32, stay: bool) {
        self.0.retain(|_, (permit, age)| {
            *age += 1;
            notice(permit) != Some(Notice::Close) && (stay || *age < 20)
        });
        for uid in 10_000..10_000 + callers {
            if !self.0.contains_key(&uid)
                && let Ok(permit) = gate.open(CallerKey::Uid(uid))
            {
                self.0.insert(uid, (permit, 0));
            }
        }
    }
}

/// Whether the crowd stays or churns, fits or not: one who keeps eight connections open keeps them, and gets one more for each call.
#[tokio::test(start_paused = true)]
async fn one_with_a_few_connections_gets_its_next_beside_a_crowd() {
    for (nofile, callers) in [(256, 80), (600, 200), (1024, 335), (1024, 395), (1024, 600), (20_000, 8_000)] {
        for stay in [true, false] {
            let gate = gate(nofile);
            let open = || gate.open(POLITE);
            let kept: Vec<ConnectionPermit> = (0..8).map(|_| open().unwrap()).collect();
            let mut crowd = Crowd::default();
            for tick in 0..100 {
                crowd.moves(&gate, callers, stay);
                let case = format!("{nofile}, {callers}, {stay}: tick {tick} of {}", gate.connections());
                let [one, two] =
                    [open(), open()].map(|one| one.unwrap_or_else(|why| panic!("{case}: {why:?}")));
                gate.look(None, 0);
                let _told = gate.shed();
                assert_eq!(told(&kept) + told(&[one, two]), 0, "{case}");
                advance(TICK).await;
            }
        }
    }
}

/// Of more callers than there are places each has its own for two seconds; then those that hold nothing have it.
#[tokio::test(start_paused = true)]
async fn a_place_that_is_kept_for_those_without_one_is_lent_for_a_moment() {
    let gate = gate(1024);
    let open = |uid| gate.open(CallerKey::Uid(uid));
    let kept: Vec<ConnectionPermit> = (0..9).map(|_| gate.open(POLITE).unwrap()).collect();
    let crowd: Vec<ConnectionPermit> = (100..).map_while(|uid| open(uid).ok()).collect();
    let stay = [gate.connections(), gate.most_connections()];
    assert_eq!(stay, [384, 400], "all but those for who has a few");
    advance(Duration::from_millis(1_999)).await;
    gate.look(None, 0);
    assert_eq!(gate.shed(), [], "nobody goes as long as nobody wants it");
    assert_eq!(open(9_000).err(), Some(ConnectionRefusal::NodeConnections));
    advance(Duration::from_millis(1)).await;
    let mut late: Vec<ConnectionPermit> = (9_000..9_016).map(|uid| open(uid).unwrap()).collect();
    assert_eq!(open(9_016).err(), Some(ConnectionRefusal::NodeConnections), "so many are not gone yet");
    assert!(gate.connections() <= gate.most_connections());
    assert_eq!((told(&crowd), told(&kept), told(&late)), (16, 0, 0));
    let told_of = gate.shed();
    assert!(
        told_of.len() == 16 && told_of.iter().all(|told| told.held == 1 && told.notice == Notice::Close),
        "{told_of:?}"
    );
    let crowd: Vec<ConnectionPermit> = crowd.into_iter().filter(|permit| notice(permit).is_none()).collect();
    late.extend((9_016..9_032).map(|uid| open(uid).unwrap()));
    assert_eq!((told(&late), gate.connections()), (0, 400), "whoever has just come stays");
    // With a place that anybody may have for each, nobody has a lent one.
    drop((kept, late));
    drop(open(9_100).unwrap());
    advance(Duration::from_secs(10)).await;
    let again: Vec<ConnectionPermit> = (20_000..).map_while(|uid| open(uid).ok()).collect();
    assert_eq!(told(&again), 0);
    let before: usize = told(&crowd);
    drop(open(30_000));
    assert_eq!(told(&crowd), before, "those that were there before hold what all hold");
}

/// Each of them holds what would be few elsewhere, and together they have all places: who has less than its part gets it, and who had
/// more before they came keeps it.
#[tokio::test(start_paused = true)]
async fn those_with_more_than_their_part_make_way() {
    for (callers, has, first) in [(20, 40, 2), (30, 12, 2), (42, 8, 2), (42, 9, 8)] {
        let gate = gate(1024);
        let mut hogs: Vec<(u32, ConnectionPermit)> = Vec::new();
        let mut polite: Vec<ConnectionPermit> = (0..first).map(|_| gate.open(POLITE).unwrap()).collect();
        let mut few: Vec<ConnectionPermit> = (0..3).map(|_| gate.open(CallerKey::Uid(2)).unwrap()).collect();
        let part = 320 / usize::try_from(callers + 2).unwrap();
        for tick in 0..240 {
            hogs.retain(|(_, permit)| notice(permit) != Some(Notice::Close));
            for nth in 0..callers * has {
                let uid = 100 + nth % callers;
                let held = hogs.iter().filter(|(of, _)| *of == uid).count();
                if held < usize::try_from(has).unwrap() {
                    hogs.extend(gate.open(CallerKey::Uid(uid)).ok().map(|permit| (uid, permit)));
                }
            }
            if polite.len() < part.min(9) {
                polite.extend(gate.open(POLITE).ok());
            }
            gate.look(None, 0);
            for told in gate.shed() {
                assert!(told.held > u64::try_from(part).unwrap(), "{callers}: {told:?}, of a part of {part}");
            }
            assert_eq!((told(&polite), told(&few)), (0, 0), "{callers}, tick {tick}");
            advance(TICK).await;
        }
        assert_eq!(polite.len(), part.min(9).max(first), "{callers}, {has}");
        few.clear();
    }
}

/// Where nothing is kept for those with a few, those with one are the first to find nothing.
#[tokio::test(start_paused = true)]
async fn the_smallest_gates_keep_what_they_can() {
    for (connections, reserve, few) in [(2, 1, 0), (3, 0, 0), (8, 4, 1), (20, 10, 2)] {
        let places = GatePlaces::new(Some(connections), Some(reserve)).unwrap();
        let gate = gate_by(
            &LimitSettings {
                gate: GateSettings { places, ..GateSettings::default() },
                ..LimitSettings::default()
            },
            10_000,
        );
        let hog: Vec<_> = std::iter::from_fn(|| gate.open(POLITE).ok()).collect();
        assert!(hog.len() >= usize::try_from(connections - reserve - few).unwrap().min(1), "{connections}");
        let new: Vec<_> = (10..).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
        assert!(new.len() >= usize::try_from(reserve).unwrap(), "{connections}: {}", new.len());
        assert!(gate.connections() <= connections);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whoever comes and goes, stays when it is told, or waits: no more are open than there are places, but for those that are being
    /// closed; who is told to go had its place for two seconds; and with nobody there all are free.
    #[test]
    fn the_books_of_places_agree(
        moves in prop::collection::vec((0..12_u32, 0..4_u8, 1..12_usize, 0..1_500_u64), 0..80),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let places = GatePlaces::new(Some(40), Some(12)).unwrap();
            let gate_settings = GateSettings { places, ..GateSettings::default() };
            let gate = gate_by(&LimitSettings { gate: gate_settings, ..LimitSettings::default() }, 10_000);
            let (mut held, mut now): (Vec<(u32, u64, ConnectionPermit)>, u64) = (vec![], 0);
            for (uid, what, times, later) in moves {
                for _ in 0..times {
                    let at = held.iter().position(|(of, ..)| *of == uid);
                    match what {
                        0 => if let Some(at) = at { drop(held.swap_remove(at)) },
                        1 => held.retain(|(.., permit)| notice(permit) != Some(Notice::Close)),
                        _ => {
                            let before: Vec<bool> = held.iter().map(|(.., it)| notice(it) == Some(Notice::Close)).collect();
                            held.extend(gate.open(CallerKey::Uid(uid)).ok().map(|permit| (uid, now, permit)));
                            for ((_, since, permit), before) in held.iter().zip(before) {
                                let closes = notice(permit) == Some(Notice::Close) && !before;
                                assert!(!closes || now - since >= 2_000);
                            }
                        }
                    }
                    let leaving = held.iter().filter(|(.., it)| notice(it) == Some(Notice::Close)).count();
                    assert!(held.len() - leaving.min(16) <= 40, "{} of which {leaving} leave", held.len());
                    assert_eq!(usize::try_from(gate.connections()).unwrap(), held.len());
                }
                now += later;
                advance(Duration::from_millis(later)).await;
                gate.look(None, 0);
                let _told = gate.shed();
            }
            held.clear();
            assert_eq!(gate.connections(), 0);
            let all: Vec<_> = (100..).map_while(|uid| gate.open(CallerKey::Uid(uid)).ok()).collect();
            assert_eq!(all.len(), 37, "all but those for who has a few");
        });
    }
}

/// A process of another user with a stream that waits for news.
struct Watching(Child);

impl Drop for Watching {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _status = self.0.wait();
    }
}

/// An agent with few places, and users who take them all, as far as they may.
#[test]
fn an_agent_full_of_callers_serves_one_that_had_a_few_connections() {
    if !geteuid().is_root() {
        println!("left out: other users, which only root can be");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let users = 70_001..70_023_u32;
    let entry =
        |uid| format!("entry \"spiffe://example.org/u{uid}\" {{\n  selectors = [\"unix:uid:{uid}\"]\n}}\n");
    let entries: String = users.clone().chain([0]).map(entry).collect();
    let limits = "ratelimit { node { cpu = 4096 } gate { connections = 24 reserve = 8 } }\n";
    write_config(dir.path(), &[limits, &entries].concat());
    let config = dir.path().join("agent.conf");
    let text = std::fs::read_to_string(&config).unwrap();
    let ends = "log_level = \"info\"\n  listener { drain_timeout = \"1s\" }";
    std::fs::write(&config, text.replace("log_level = \"warn\"", ends)).unwrap();
    let mut agent = Process::spawn(dir.path());
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        drop(agent.serving(dir.path()).await);
    });
    let socket = dir.path().join("api.sock");
    let mut streams: Vec<UnixStream> = (0..5).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let begun = [
        PREFACE.to_vec(),
        frame(SETTINGS, 0, 0, &[]),
        call_frames(1, "/SpiffeWorkloadAPI/FetchX509SVID", &message(&[])),
    ];
    for stream in &mut streams {
        stream.write_all(&begun.concat()).unwrap();
        assert!(stream.read(&mut [0; 64 * 1024]).unwrap() > 0);
    }
    let address = format!("unix://{}", socket.display());
    let watch = |uid| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_durward"));
        command.args(["api", "watch"]).env("SPIFFE_ENDPOINT_SOCKET", &address).current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).uid(uid).gid(uid);
        Watching(command.spawn().unwrap())
    };
    let crowd: Vec<Watching> = users.map(watch).collect();
    let began = std::time::Instant::now();
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    while !log().contains("more callers came than there is room for") {
        assert_eq!(call(&socket, FETCH_JWT, &jwt_request("a"), PATIENCE), Called::Answered, "{}", log());
        assert!(began.elapsed() < PATIENCE, "{}", log());
    }
    for _ in 0..50 {
        assert_eq!(call(&socket, FETCH_JWT, &jwt_request("a"), PATIENCE), Called::Answered, "{}", log());
    }
    for stream in &mut streams {
        stream.set_nonblocking(true).unwrap();
        let mut more = Vec::new();
        let ended = stream.read_to_end(&mut more);
        assert!(
            ended.is_err_and(|why| why.kind() == std::io::ErrorKind::WouldBlock),
            "it was closed\n{}",
            log()
        );
        assert!(!more.windows(9).any(|head| head == [0, 0, 8, 7, 0, 0, 0, 0, 0]), "told to go\n{}", log());
    }
    // It ends beside them, within its time.
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success(), "{}", log());
    assert!(log().contains("drained") && !log().contains("takes longer than its time"), "{}", log());
    drop((crowd, streams));
}
