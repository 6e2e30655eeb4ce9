//! Who writes on a connection: nobody but the process that opened it, as the user it was, is heard. What was asked before
//! is answered, and the client learns which of its calls were heard.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::{fs::PermissionsExt as _, net::UnixStream, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use durward::api::proto::workload::{self as pb, spiffe_workload_api_client::SpiffeWorkloadApiClient};
use hyper_util::rt::TokioIo;
use nix::{
    sys::signal::Signal,
    unistd::{Gid, Uid, geteuid, setresgid, setresuid},
};

use crate::{
    frames::{
        Called, END_HEADERS, FETCH_JWT, HEADERS, PREFACE, SETTINGS, answer_on, block, call, call_frames,
        frame, jwt_request, message,
    },
    hostile::{Agent, NEIGHBOUR, PATIENCE},
    support::request,
};

const FETCH_X509: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const GOAWAY: u8 = 7;

/// A connection whose first bytes are those of HTTP/2.
fn connected(agent: &Agent) -> UnixStream {
    let stream = UnixStream::connect(agent.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn hello() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

fn jwt_call(stream: u32) -> Vec<u8> {
    call_frames(stream, FETCH_JWT, &jwt_request("writer"))
}

/// Another process writes these on the connection; as another user, if it can. Returns once it has.
fn another_writes(stream: &UnixStream, bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let file = dir.path().join("bytes");
    fs::write(&file, bytes).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let mut cat = Command::new("cat");
    cat.arg(&file).stdout(OwnedFd::from(stream.try_clone().unwrap()));
    if geteuid().is_root() {
        cat.uid(NEIGHBOUR).gid(NEIGHBOUR);
    }
    assert!(cat.status().unwrap().success());
}

/// What the agent sent up to its end.
#[derive(Debug, Default)]
struct Said {
    /// Streams that were answered with a message.
    answered: Vec<u32>,
    /// The last stream of each GOAWAY, and its error.
    goaways: Vec<(u32, u32)>,
}

/// Reads to the end of the connection.
fn said(stream: &mut UnixStream) -> Said {
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(more) => bytes.extend_from_slice(&buffer[..more]),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "it ends");
                break;
            }
        }
    }
    let mut said = Said::default();
    let mut rest = &bytes[..];
    while let Some((head, more)) = rest.split_first_chunk::<9>() {
        let [a, b, c, kind, _flags, stream @ ..] = *head;
        let length = usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap();
        let (payload, more) = more.split_at(length);
        rest = more;
        match kind {
            0 if length > 5 => said.answered.push(u32::from_be_bytes(stream)),
            GOAWAY => {
                let word = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
                said.goaways.push((word(0), word(4)));
            }
            _ => {}
        }
    }
    assert!(rest.is_empty(), "whole frames");
    said
}

#[test]
fn what_another_process_writes_is_not_heard_and_no_call_is_lost() {
    let agent = Agent::start("");
    let half = jwt_call(3);
    let half = half.split_at(30);
    let head = frame(HEADERS, END_HEADERS, 3, &block(FETCH_JWT));
    for (case, own, others, answered, last) in [
        ("a call on a connection that was used", [hello(), jwt_call(1)].concat(), jwt_call(3), vec![1], 1),
        ("the first bytes of all", vec![], [hello(), jwt_call(1)].concat(), vec![], 0),
        ("a call behind the first bytes", hello(), jwt_call(1), vec![], 0),
        ("one byte", [hello(), jwt_call(1)].concat(), vec![0], vec![1], 1),
        (
            "the rest of a frame",
            [hello(), jwt_call(1), half.0.to_vec()].concat(),
            half.1.to_vec(),
            vec![1],
            1,
        ),
        ("the body of a request", [hello(), jwt_call(1), head].concat(), jwt_call(5), vec![1], 1),
        ("what is not HTTP/2", hello(), vec![7; 100], vec![], 0),
    ] {
        for at_once in [false, true] {
            let case = format!("{case}, {}", if at_once { "all at once" } else { "one after the other" });
            let mut stream = connected(&agent);
            if at_once {
                agent.signal(Signal::SIGSTOP);
            }
            stream.write_all(&own).unwrap();
            if !at_once && !answered.is_empty() {
                // It was heard before the other one writes.
                let mut peeked = [0; 4096];
                while nix::sys::socket::recv(
                    std::os::fd::AsRawFd::as_raw_fd(&stream),
                    &mut peeked,
                    nix::sys::socket::MsgFlags::MSG_PEEK,
                )
                .unwrap()
                    < 200
                {
                    thread::yield_now();
                }
            }
            another_writes(&stream, &others);
            agent.signal(Signal::SIGCONT);
            let said = said(&mut stream);
            assert_eq!(said.answered, answered, "{case}: {said:?}");
            assert_eq!(said.goaways, [(last, 0)], "{case}");
            assert_eq!(
                call(&agent.socket(), FETCH_JWT, &jwt_request("anew"), PATIENCE),
                Called::Answered,
                "{case}: a connection of its own"
            );
        }
    }
    agent.well("other writers");
}

#[test]
fn an_open_stream_ends_with_its_connection() {
    let agent = Agent::start("");
    let mut stream = connected(&agent);
    let open = call_frames(1, FETCH_X509, &message(&[]));
    stream.write_all(&[hello(), open].concat()).unwrap();
    let mut first = [0; 9];
    stream.read_exact(&mut first).unwrap();
    another_writes(&stream, &jwt_call(3));
    let rest = {
        let length = usize::try_from(u32::from_be_bytes([0, first[0], first[1], first[2]])).unwrap();
        stream.read_exact(&mut vec![0; length]).unwrap();
        said(&mut stream)
    };
    assert_eq!(rest.goaways, [(1, 0)], "{rest:?}");
    assert!(!rest.answered.contains(&3), "{rest:?}");
    agent.well("an open stream");
}

/// Whoever only holds the socket changes nothing, nor does it matter which thread writes.
#[test]
fn a_child_that_writes_nothing_and_threads_that_do_change_nothing() {
    let agent = Agent::start("");
    let mut stream = connected(&agent);
    stream.write_all(&[hello(), jwt_call(1)].concat()).unwrap();
    assert_eq!(answer_on(1, &mut stream), Called::Answered);
    let mut holder = Command::new("sleep")
        .arg("60")
        .stdin(OwnedFd::from(stream.try_clone().unwrap()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    for nth in 1..20 {
        let call = jwt_call(1 + 2 * nth);
        thread::scope(|scope| {
            scope.spawn(|| (&stream).write_all(&call).unwrap());
        });
        assert_eq!(answer_on(1 + 2 * nth, &mut stream), Called::Answered, "{nth}");
    }
    holder.kill().unwrap();
    holder.wait().unwrap();
    agent.well("threads");
}

/// A client that was not written here loses no call: it learns that the connection ends, and opens another.
#[tokio::test(flavor = "multi_thread")]
async fn an_ordinary_client_goes_on_with_another_connection() {
    let agent = tokio::task::spawn_blocking(|| Agent::start("")).await.unwrap();
    let socket = agent.socket();
    let (tell, opened) = std::sync::mpsc::channel();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_nonblocking(true).unwrap();
        tell.send(stream.try_clone().unwrap()).unwrap();
        async move { tokio::net::UnixStream::from_std(stream).map(TokioIo::new) }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
    let channel = endpoint.connect_with_connector(connector).await.unwrap();
    let mut client = SpiffeWorkloadApiClient::new(channel);
    let jwt = || request(pb::JwtsvidRequest { audience: vec!["a".to_owned()], spiffe_id: String::new() });
    for nth in 0..5 {
        client.fetch_jwtsvid(jwt()).await.unwrap_or_else(|status| panic!("{nth}: {status:?}"));
        let stream = opened.try_recv().unwrap_or_else(|_| panic!("{nth}: another connection"));
        let mut ended = stream.try_clone().unwrap();
        another_writes(&stream, &jwt_call(101));
        drop(stream);
        // Its own task reads the GOAWAY, and ends.
        tokio::task::spawn_blocking(move || {
            let gone = nix::poll::PollFlags::POLLHUP;
            let mut fds = [nix::poll::PollFd::new(ended.as_fd(), gone)];
            assert_eq!(nix::poll::poll(&mut fds, 60_000u16), Ok(1), "it ends");
            let _end: std::io::Result<usize> = ended.read(&mut [0]);
        })
        .await
        .unwrap();
    }
    tokio::task::spawn_blocking(move || agent.well("an ordinary client")).await.unwrap();
}

// ---- processes that become somebody else -----------------------------------------------------------

/// This test binary again, as another process that plays a part.
fn play(part: &str, socket: &Path) {
    let out = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writers::part", "--nocapture", "--quiet"])
        .env("DURWARD_TEST_WRITER", part)
        .env("DURWARD_TEST_SOCKET", socket)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{part}: {text}");
}

fn become_neighbour(real: u32, effective: u32) {
    let (gid, uid) = (Gid::from_raw, Uid::from_raw);
    setresgid(gid(real), gid(effective), gid(effective)).unwrap();
    setresuid(uid(real), uid(effective), uid(effective)).unwrap();
}

/// The other side of [`play`]; nothing when the tests run.
#[test]
fn part() {
    let (Some(part), Some(socket)) =
        (std::env::var_os("DURWARD_TEST_WRITER"), std::env::var_os("DURWARD_TEST_SOCKET"))
    else {
        return;
    };
    let socket = PathBuf::from(socket);
    let connect = || {
        let stream = UnixStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let answered = || call(&socket, FETCH_JWT, &jwt_request("writer"), PATIENCE);
    match part.to_str().unwrap() {
        "drops after a call" => {
            let mut stream = connect();
            stream.write_all(&[hello(), jwt_call(1)].concat()).unwrap();
            assert_eq!(answer_on(1, &mut stream), Called::Answered);
            become_neighbour(NEIGHBOUR, NEIGHBOUR);
            stream.write_all(&jwt_call(3)).unwrap();
            let said = said(&mut stream);
            assert_eq!((said.answered, said.goaways), (vec![], vec![(1, 0)]));
            assert_eq!(answered(), Called::Answered, "as what it is now");
        }
        "drops before a word" => {
            let mut stream = connect();
            become_neighbour(NEIGHBOUR, NEIGHBOUR);
            stream.write_all(&[hello(), jwt_call(1)].concat()).unwrap();
            let said = said(&mut stream);
            // Linux 6.5 to 6.12 do not tell that it changed: then the call is refused.
            assert!(said.answered.is_empty(), "{said:?}");
            assert_eq!(answered(), Called::Answered, "as what it is now");
        }
        "drops its effective user alone" => {
            let mut stream = connect();
            stream.write_all(&[hello(), jwt_call(1)].concat()).unwrap();
            assert_eq!(answer_on(1, &mut stream), Called::Answered);
            let (gid, uid) = (Gid::from_raw(NEIGHBOUR), Uid::from_raw(NEIGHBOUR));
            nix::unistd::setegid(gid).unwrap();
            nix::unistd::seteuid(uid).unwrap();
            stream.write_all(&jwt_call(3)).unwrap();
            let said = said(&mut stream);
            // The refused call is made again by its client, on a connection of its own.
            assert_eq!((said.answered, said.goaways), (vec![], vec![(1, 0)]));
            assert_eq!(answered(), Called::Answered, "as what it is now");
        }
        "is a setuid program" => {
            become_neighbour(0, NEIGHBOUR);
            assert_eq!(answered(), Called::Answered);
        }
        "is a setuid program of root's" => {
            setresuid(Uid::from_raw(NEIGHBOUR), Uid::from_raw(0), Uid::from_raw(0)).unwrap();
            assert_eq!(answered(), Called::Answered);
        }
        other => panic!("no such part: {other}"),
    }
}

#[test]
fn a_process_is_heard_as_what_it_is_now() {
    if !geteuid().is_root() {
        println!("only root can become somebody else: this was left out");
        return;
    }
    let agent = Agent::start("");
    for part in [
        "drops after a call",
        "drops before a word",
        "drops its effective user alone",
        "is a setuid program",
        "is a setuid program of root's",
    ] {
        play(part, &agent.socket());
    }
    agent.well("other users");
}
