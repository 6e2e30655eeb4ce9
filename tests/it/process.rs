//! The agent as a process: signals, crashes, and the memory it gives back.

use std::{collections::BTreeSet, time::Duration};

use durward::api::proto::workload as pb;
use nix::sys::{
    resource::{Resource, getrlimit, setrlimit},
    signal::Signal,
};

use crate::support::{Process, client, entry, request, write_config};

async fn fetch(
    client: &mut pb::spiffe_workload_api_client::SpiffeWorkloadApiClient<tonic::transport::Channel>,
) -> pb::X509svidResponse {
    let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    stream.into_inner().message().await.unwrap().unwrap()
}

/// A hundred SIGKILLs, at moments that go through the whole of a start (the first one of all writes the keys) and into
/// serving. Whatever was left behind, the next start serves, and what was issued before still verifies: no authority that
/// was ever handed out has gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_kills_lose_nothing() {
    let mut kills = 0;
    for round in 0..10 {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), &entry("/web", ""));
        let mut authorities = BTreeSet::new();
        for nth in 0..10_u32 {
            let mut agent = Process::spawn(dir.path());
            if nth % 5 == 4 {
                let mut client = agent.serving(dir.path()).await;
                let bundle = fetch(&mut client).await.svids.remove(0).bundle;
                authorities.insert(bundle);
                assert_eq!(authorities.len(), 1, "the CA of this node stays the same");
            } else {
                // Spread over the start: from before the first write to after the socket is bound.
                tokio::time::sleep(Duration::from_micros(u64::from(nth * 10 + round) * 700)).await;
            }
            agent.signal(Signal::SIGKILL);
            agent.wait();
            kills += 1;
        }
        let mut agent = Process::spawn(dir.path());
        fetch(&mut agent.serving(dir.path()).await).await;
    }
    assert_eq!(kills, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reloads_and_a_broken_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/one", ""));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
    let ids = |m: pb::X509svidResponse| m.svids.into_iter().map(|s| s.spiffe_id).collect::<BTreeSet<_>>();
    assert_eq!(ids(stream.message().await.unwrap().unwrap()).len(), 1);

    // The broken file is refused, and the next message is of the good one after it.
    std::fs::write(dir.path().join("agent.conf"), "agent { trust_domain = 5x }").unwrap();
    agent.signal(Signal::SIGHUP);
    let log = || std::fs::read_to_string(dir.path().join("log")).unwrap();
    while !log().contains("not reloaded") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(log().contains("agent.conf:1:"), "the place is named: {}", log());
    write_config(dir.path(), &[entry("/one", ""), entry("/two", "")].concat());
    agent.signal(Signal::SIGHUP);
    let next = tokio::time::timeout(Duration::from_secs(20), stream.message()).await.unwrap();
    assert_eq!(ids(next.unwrap().unwrap()).len(), 2);

    agent.signal(Signal::SIGUSR1);
    agent.signal(Signal::SIGUSR2);
    agent.signal(Signal::SIGTERM);
    let end = stream.message().await.unwrap_err();
    assert_eq!(end.code(), tonic::Code::Unavailable);
    assert!(agent.wait().success());
    assert!(!dir.path().join("api.sock").exists());
}

/// What 5,000 streams took is given back when they are gone, twice: 8 MiB of some 150 may remain.
#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_streams_come_and_go() {
    const STREAMS: usize = 5_000;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // A connection takes two descriptors of the agent, and one of this process.
    let streams = STREAMS.min(usize::try_from(hard).unwrap_or(usize::MAX) / 2 - 500);

    let dir = tempfile::tempdir().unwrap();
    let unlimited = "ratelimit {\n  gate {\n    caller { unlimited = true }\n  }\n  caller { unlimited = true }\n  identity { unlimited = true }\n}\n";
    write_config(dir.path(), &[&entry("/web", ""), unlimited].concat());
    let mut agent = Process::spawn(dir.path());
    let socket = dir.path().join("api.sock");
    agent.serving(dir.path()).await;

    let before = agent.memory("VmRSS");
    // What stays: threads, tables, the SVID, and holes between these. The second time adds nothing to that.
    let most_after = before + 8 * 1024;
    for _ in 0..2 {
        let mut open = Vec::with_capacity(streams);
        for _ in 0..streams {
            let mut client = client(&socket).await;
            let mut stream =
                client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
            assert!(stream.message().await.unwrap().is_some());
            open.push((client, stream));
        }
        drop(open);
        // Memory goes back within seconds of the last connection's end.
        let mut after = agent.memory("VmRSS");
        for _ in 0..100 {
            after = agent.memory("VmRSS");
            if after <= most_after {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let most = agent.memory("VmHWM");
        println!("{streams} streams: {before} KiB before, {most} KiB at most, {after} KiB after");
        assert!(after <= most_after, "{after} KiB after, {before} KiB before");
    }
}

/// What the wire refuses is counted, and at debug the log says whose it was and what was wrong.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_wire_refuses_is_seen_at_debug() {
    use std::io::{Read as _, Write as _};
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &entry("/web", ""));
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
    command.args(["run", "--log-level", "debug", "--config"]).arg(dir.path().join("agent.conf"));
    let mut agent = Process::of(command, &dir.path().join("log"));
    drop(agent.serving(dir.path()).await);
    let mut stream = std::os::unix::net::UnixStream::connect(dir.path().join("api.sock")).unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x01\x04\0\0\0\0\0\0").unwrap();
    // It may be closed or reset.
    drop(stream.read_to_end(&mut Vec::new()));
    for (words, reason) in [
        ("refused what came on a connection", "reason=protocol"),
        ("a stream or connection ends with an error of http/2", "code=PROTOCOL_ERROR"),
    ] {
        let said = async {
            loop {
                let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
                if let Some(line) = log.lines().find(|line| line.contains(words)) {
                    break line.to_owned();
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let line = tokio::time::timeout(Duration::from_secs(60), said).await.unwrap();
        let pid = format!("pid={} ", std::process::id());
        assert!(line.contains(reason) && line.contains(&pid), "{line}");
    }
}

/// However many calls are refused, on however many connections, the log at debug has a line or two of each caller and reason.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_a_thousand_times_is_a_line_at_debug() {
    use std::io::{Read as _, Write as _};

    use crate::frames::{END_HEADERS, HEADERS, PREFACE, RST_STREAM, SETTINGS, block, frame};
    const TIMES: usize = 1000;
    let dir = tempfile::tempdir().unwrap();
    write_config(
        dir.path(),
        "entry \"spiffe://example.org/nobody\" {\n  selectors = [\"unix:uid:4000000\"]\n}\n",
    );
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
    command.args(["run", "--log-level", "debug", "--config"]).arg(dir.path().join("agent.conf"));
    let mut agent = Process::of(command, &dir.path().join("log"));
    let mut client = agent.serving(dir.path()).await;
    for _ in 0..TIMES {
        let ask = pb::JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() };
        client.fetch_jwtsvid(request(ask)).await.unwrap_err();
        client.fetch_jwtsvid(pb::JwtsvidRequest::default()).await.unwrap_err();
    }
    let connect = || {
        let mut stream = std::os::unix::net::UnixStream::connect(dir.path().join("api.sock")).unwrap();
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()).unwrap();
        stream
    };
    // Each ends its connection.
    for _ in 0..TIMES {
        let mut stream = connect();
        stream.write_all(&frame(SETTINGS, 0, 0, &[0])).unwrap();
        drop(stream.read_to_end(&mut Vec::new()));
    }
    // Each byte behind the block is a field of 60 bytes.
    let mut stream = connect();
    let list = [block("/x/y"), vec![0x90; 300]].concat();
    stream.write_all(&frame(HEADERS, END_HEADERS, 1, &list)).unwrap();
    let mut got = Vec::new();
    while !got.windows(9).any(|head| head == [0, 0, 4, RST_STREAM, 0, 0, 0, 0, 1]) {
        let mut bytes = [0; 1024];
        let read = stream.read(&mut bytes).unwrap();
        assert!(read > 0, "it goes on");
        got.extend_from_slice(&bytes[..read]);
    }
    // What it has said is in the log by its end.
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success());

    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    for words in [
        "refused method=FetchJWTSVID",
        "no identity issued caller",
        "refused what came on a connection",
        "a stream or connection ends with an error of http/2",
    ] {
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(words)).collect();
        // Of two reasons at most, and some minutes may have passed.
        assert!((1..=8).contains(&lines.len()), "{words}: {lines:#?}");
    }
    assert!(log.contains("code=\"431 (the header list is too large)\""), "{log}");
    assert!(log.lines().count() < 200, "{log}");
}

/// A connection whose client keeps further calls to itself is in the log, in `durward status` and among the metrics.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_places_is_told_of() {
    use std::{
        io::{Read as _, Write as _},
        os::unix::net::UnixStream,
    };
    const LINE: &str = "a connection has all the streams open that it may";
    const FOUND: &str =
        "connections with all the streams open that they may have (ratelimit.gate.connection.streams): 1";
    let (dir, private) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (admin, scraped) = (private.path().join("admin/admin.sock"), dir.path().join("metrics.sock"));
    let blocks = format!(
        "agent {{\n  admin_socket_path = \"{}\"\n}}\nratelimit {{ gate {{ connection {{ streams = 3 }} }} }}\n\
         telemetry {{ Prometheus {{ socket_path = \"{}\" }} }}\n{}",
        admin.display(),
        scraped.display(),
        entry("/web", "")
    );
    write_config(dir.path(), &blocks);
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
        open.push(stream);
    }
    let waits =
        tokio::spawn(
            async move { client.fetch_jwt_bundles(request(pb::JwtBundlesRequest {})).await.is_ok() },
        );

    let said = || std::fs::read_to_string(dir.path().join("log")).unwrap().matches(LINE).count();
    let status = || {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
        let output = command.args(["status", "--socket-path"]).arg(&admin).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    until(|| said() == 1).await;
    let found = status().split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(found.contains(FOUND), "{found}");
    let mut http = UnixStream::connect(&scraped).unwrap();
    http.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    http.read_to_string(&mut text).unwrap();
    assert!(text.contains("\ndurward_connections_full_total 1\n"), "{text}");
    assert!(!waits.is_finished(), "its client has it wait");
    open.pop();
    assert!(waits.await.unwrap(), "a place is free");
    drop(open);
    until(|| !status().contains("streams open that they may")).await;
    assert_eq!(said(), 1);
}

/// Waits until it is so.
async fn until(is_so: impl Fn() -> bool) {
    let looks = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), looks).await.unwrap();
}

/// A start for which there are too few descriptors ends; a check where there are as few says so, and cannot know more.
#[test]
fn a_check_says_where_no_agent_would_start() {
    let dir = tempfile::tempdir().unwrap();
    let health = format!("health_checks {{ socket_path = \"{}/health.sock\" }}", dir.path().display());
    for (case, blocks, said) in [
        ("no endpoints", "", "and there are 64 (LimitNOFILE, or ulimit -n)"),
        (
            "an endpoint",
            health.as_str(),
            "and there are 48: LimitNOFILE, or ulimit -n, is 64, less what the http endpoints may hold",
        ),
    ] {
        write_config(dir.path(), blocks);
        for (word, ends, more) in [
            ("run", Some(1), ""),
            ("validate", Some(0), ": started like this command, no agent would start; an agent that is"),
        ] {
            let mut command = std::process::Command::new("prlimit");
            command.args(["--nofile=64", env!("CARGO_BIN_EXE_durward"), word, "--config"]);
            let ended = command.arg(dir.path().join("agent.conf")).output().unwrap();
            let words =
                [ended.stdout, ended.stderr].map(|it| String::from_utf8_lossy(&it).into_owned()).concat();
            let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(ended.status.code(), ends, "{case}, {word}: {words}");
            assert!(words.contains(&format!("{said}{more}")), "{case}, {word}: {words}");
        }
    }
}

/// What is short at the start is named, with the limit of it, and the agent ends, however little there is.
#[test]
fn a_start_without_means_says_what_is_short_and_ends() {
    const MEMORY: &str = "memory for them (ulimit -d or -v)";
    let megabytes = |n: u64| (n << 20).to_string();
    for (limit, of, said) in [
        ("--nofile", "4".to_owned(), "LimitNOFILE (ulimit -n) is 4"),
        ("--nofile", "6".to_owned(), "LimitNOFILE (ulimit -n) is 6"),
        ("--nofile", "7".to_owned(), "LimitNOFILE (ulimit -n) is 7"),
        ("--nofile", "10".to_owned(), "LimitNOFILE (ulimit -n) is 10"),
        ("--nofile", "12".to_owned(), "LimitNOFILE (ulimit -n) is 12"),
        ("--nofile", "14".to_owned(), "LimitNOFILE (ulimit -n) is 14"),
        ("--nofile", "64".to_owned(), "and there are 64 (LimitNOFILE, or ulimit -n)"),
        ("--data", megabytes(8), MEMORY),
        ("--data", megabytes(16), MEMORY),
        ("--data", megabytes(32), "memory"),
    ] {
        let case = format!("{limit}={of}");
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), "");
        let mut agent = std::process::Command::new("prlimit");
        agent.arg(&case).args([env!("CARGO_BIN_EXE_durward"), "run", "--config"]);
        // A backtrace takes memory, and waits for ever where there is none.
        agent.arg(dir.path().join("agent.conf")).env("RUST_BACKTRACE", "1");
        let ended = agent.output().unwrap();
        let words = String::from_utf8_lossy(&ended.stderr).into_owned();
        // Later there are no words to be had but those of who allocates.
        assert!(ended.status.code() == Some(1) || words.contains("memory allocation of "), "{case}: {words}");
        assert!(words.contains(said) && !words.contains("panicked"), "{case}: {words}");
    }
}
