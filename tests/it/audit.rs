//! Who was given what, as an auditor reads it.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    path::Path,
};

use aws_lc_rs::digest::{SHA256, digest};
use nix::{
    sys::signal::Signal,
    unistd::{getgid, getuid},
};
use serde_json::Value;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::{
    hostile::PATIENCE,
    support::{Process, entry, request, write_config},
};
use durward::api::proto::workload as pb;

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn jwt(audience: &str) -> pb::JwtsvidRequest {
    pb::JwtsvidRequest { audience: vec![audience.to_owned()], spiffe_id: String::new() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn end(agent: &mut Process) {
    agent.signal(Signal::SIGTERM);
    assert!(agent.wait().success());
}

/// Each SVID that is made and given is a line with what names it; the rest are exact counts, and nothing is a secret.
#[tokio::test]
async fn each_svid_is_told_of_once_and_the_rest_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let audit = format!("audit {{ file = \"{}\" }}\n", path.display());
    write_config(dir.path(), &(entry("/one", "") + &audit));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;

    let mut tokens = Vec::new();
    for audience in ["a", "a", "b", "a"] {
        let answer = client.fetch_jwtsvid(request(jwt(audience))).await.unwrap().into_inner();
        tokens.push(answer.svids[0].svid.clone());
    }
    let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
    let svid = stream.into_inner().message().await.unwrap().unwrap().svids.remove(0);
    for _ in 0..7 {
        client.fetch_jwtsvid(request(jwt(""))).await.unwrap_err();
    }
    end(&mut agent);

    let told = lines(&path);
    let of = |what: &str, kind: &str| -> Vec<&Value> {
        told.iter().filter(|line| line["message"] == what && line["kind"] == kind).collect()
    };
    for what in ["svid made", "svid given"] {
        let jwts = of(what, "jwt");
        assert_eq!(jwts.len(), 2, "{told:#?}");
        for (line, token) in jwts.iter().zip([&tokens[0], &tokens[2]]) {
            assert_eq!(line["token_sha256"], hex(&digest(&SHA256, token.as_bytes()).as_ref()[..8]));
            assert_eq!(line["caller"], format!("uid:{}", getuid()));
            assert_eq!((&line["uid"], &line["pid"]), (&getuid().as_raw().into(), &std::process::id().into()));
            assert!(line["exp"].as_u64() > line["iat"].as_u64() && line["kid"].is_string(), "{line}");
        }
        let [line] = of(what, "x509")[..] else { panic!("{told:#?}") };
        let (_, leaf) = X509Certificate::from_der(&svid.x509_svid).unwrap();
        assert_eq!(line["serial"], hex(leaf.raw_serial()));
        assert_eq!(
            (&line["spiffe_id"], line["expires"].is_string()),
            (&"spiffe://example.org/one".into(), true)
        );
    }
    let times = |line: &&Value| line["times"].as_u64().unwrap_or(1);
    let given = of("svid given", "jwt").into_iter().chain(of("svid given again", "jwt"));
    assert_eq!(given.map(|line| times(&line)).sum::<u64>(), 4, "{told:#?}");
    let refused: Vec<&Value> =
        told.iter().filter(|line| line["message"].as_str().unwrap().contains("refused")).collect();
    assert!(refused.iter().map(times).sum::<u64>() == 7 && refused.len() == 2, "{told:#?}");
    assert!(refused.iter().all(|line| line["reason"] == "bad_audience" && line["method"] == "FetchJWTSVID"));
    // The first says who it was, the others how often.
    let who = [refused[0], refused[1]].map(|line| (&line["uid"], &line["gid"], &line["pid"]));
    let own = (getuid().as_raw().into(), getgid().as_raw().into(), std::process::id().into());
    assert_eq!(who, [(&own.0, &own.1, &own.2), (&Value::Null, &Value::Null, &Value::Null)]);

    let all = fs::read_to_string(&path).unwrap() + &fs::read_to_string(dir.path().join("log")).unwrap();
    assert!(tokens.iter().all(|token| !all.contains(token.rsplit('.').next().unwrap())));
    assert!(!fs::read_to_string(dir.path().join("log")).unwrap().contains("svid given"));
}

/// At a socket each line is a datagram; while nobody has bound it nobody waits, and what was lost is told.
#[tokio::test]
async fn a_socket_may_be_the_place_and_may_be_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.sock");
    let audit = format!("audit {{ socket_path = \"{}\" }}\n", path.display());
    write_config(dir.path(), &(entry("/one", "") + &audit));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    client.fetch_jwtsvid(request(jwt("a"))).await.unwrap();
    // The lines of before are lost or not, as it falls out.
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    client.fetch_jwtsvid(request(jwt("b"))).await.unwrap();
    let mut said = String::new();
    while !said.contains("svid given") {
        let mut datagram = [0; 4096];
        let len = socket.recv(&mut datagram).unwrap();
        said = serde_json::from_slice::<Value>(&datagram[..len]).unwrap().to_string();
    }
    end(&mut agent);
}

/// Who had an identity on one day is one command, of files that were put aside as well: the one that the README has.
#[tokio::test]
async fn who_had_an_identity_is_one_command() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let audit = format!("audit {{ file = \"{}\" }}\n", path.display());
    write_config(dir.path(), &(entry("/web", "") + &entry("/webmail", "") + &audit));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    client.fetch_jwtsvid(request(jwt("a"))).await.unwrap();
    end(&mut agent);
    // The file of before, and one that was compressed.
    let text = fs::read_to_string(&path).unwrap();
    fs::rename(&path, dir.path().join("audit.jsonl.1")).unwrap();
    fs::write(dir.path().join("audit.jsonl.2"), text.replace("\"pid\":", "\"pid\":7")).unwrap();
    let gzip = std::process::Command::new("gzip").arg(dir.path().join("audit.jsonl.2")).status().unwrap();
    assert!(gzip.success());
    fs::write(&path, "").unwrap();

    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let (_, command) = readme.split_once("\ndurward audit who spiffe://").unwrap();
    let (command, _) = command.split_once("jsonl*\n").unwrap();
    let first = lines(&dir.path().join("audit.jsonl.1")).remove(1);
    let given = first["iat"].as_i64().unwrap();
    let day = |seconds: i64| time::OffsetDateTime::from_unix_timestamp(seconds).unwrap().date().to_string();
    let who = |from: &str, to: &str, pipe: &str| -> Vec<Value> {
        let command = command
            .replace("--from 2026-11-24", &format!("--from {from}"))
            .replace("--to 2026-11-25", &format!("--to {to}"))
            .replace("/var/log/durward/", &format!("{}/", dir.path().display()));
        let command = format!(
            "{pipe}{} audit who spiffe://{command}jsonl* --output json",
            env!("CARGO_BIN_EXE_durward")
        );
        let found = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
        // Nobody had run an agent there before, and it has ended.
        assert_eq!(found.status.code(), Some(0), "{command}: {}", String::from_utf8_lossy(&found.stderr));
        let said = String::from_utf8(found.stdout).unwrap();
        let mut said: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let conclusion = said.pop().unwrap();
        assert_eq!(conclusion["warnings"], Value::Array(Vec::new()), "{conclusion}");
        said
    };
    let found = who(&day(given), &day(given + 86_400), "");
    let own = std::process::id().to_string();
    let pids: Vec<String> = found.iter().map(|holder| holder["pid"].to_string()).collect();
    assert_eq!(pids, [own.clone(), format!("7{own}")], "{found:#?}");
    assert!(found.iter().all(|holder| holder["token_sha256"].is_string() && holder["until"].is_string()));
    assert!(who(&day(given - 3 * 86_400), &day(given - 2 * 86_400), "").is_empty(), "not on another day");
    // Given before the span and valid in it.
    let exp = first["exp"].as_i64().unwrap();
    let at = |seconds: i64| {
        let at = time::OffsetDateTime::from_unix_timestamp(seconds).unwrap();
        at.format(&time::format_description::well_known::Rfc3339).unwrap()
    };
    assert_eq!(who(&at(exp - 1), &at(exp + 9), "").len(), 2);
    assert!(who(&at(exp), &at(exp + 9), "").is_empty());
}

/// An answer says which time it is of, and its exit code whether somebody may be missing from it.
#[test]
fn what_the_lines_do_not_tell_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let svid = r#""caller":"uid:4000000007","uid":4000000007,"gid":8,"pid":9,"kind":"x509","spiffe_id":"spiffe://td/web""#;
    let lines = [
        format!(
            r#"{{"timestamp":"2026-11-28T10:00:00Z","message":"svid given",{svid},"serial":"0a","expires":"2026-11-28T11:00:00Z"}}"#
        ),
        r#"{"timestamp":"2026-11-28T14:00:00Z","message":"connection refused","caller":"uid:5","reason":"blocked"}"#.to_owned(),
    ];
    let lost =
        r#"{"timestamp":"2026-11-28T10:30:00Z","level":"WARN","message":"log lines were lost","lost":2}"#;
    let whole = lines.join("\n");
    let read = "lines of the audit were read: 2026-11-28T10:00:00Z to 2026-11-28T14:00:00Z.\n";
    let nobody = format!("Nobody held it, by what was read.\n2 {read}");
    let held = format!(
        "2026-11-28T10:00:00Z to 2026-11-28T11:00:00Z\n  pid 9, uid 4000000007, caller uid:4000000007\n  X.509-SVID, serial 0a\n2 {read}"
    );
    let before = "no line is of 2026-11-28T09:30:00Z to 2026-11-28T10:00:00Z: SVIDs that were given then may be missing (they are valid for up to 1h0m0s).";
    let of_run = |run: &str, at: &str, seq: u64, told: &str| {
        format!(r#"{{"timestamp":"2026-11-28T{at}:00Z",{told},"run":"{run}","seq":{seq}}}"#)
    };
    let numbered_of = |run: &str, at: &str, seq: u64| {
        of_run(run, at, seq, r#""message":"audit goes on","longest_ttl":3600"#)
    };
    let lost_of = |run: &str, at: &str, seq: u64| {
        of_run(run, at, seq, r#""level":"WARN","message":"log lines were lost","lost":2"#)
    };
    let numbered = |end: &str| {
        let end = of_run("1a2b3c4d", "14:00", 2, &format!(r#""message":"{end}","longest_ttl":3600"#));
        [numbered_of("1a2b3c4d", "10:00", 1), end].join("\n")
    };
    let ended = "The agent ended then; if one was started later, read its lines too.\n";
    let after = "no line is of 2026-11-28T14:00:00Z to 2026-11-28T15:00:00Z: SVIDs that were given then may be missing.";
    let another = "no line is of 2026-11-23T23:00:00Z to 2026-11-28T10:00:00Z: SVIDs that were given then may be missing (they are valid for up to 1h0m0s).";
    for (text, from, to, code, stdout, warning) in [
        (whole.clone(), "2026-11-28 11:00", "2026-11-28 12:00", 0, nobody.clone(), ""),
        (whole.clone(), "2026-11-28 10:30", "2026-11-28 12:00", 6, held, before),
        (whole.clone(), "2026-11-28 11:00", "2026-11-28 15:00", 6, nobody.clone(), after),
        (numbered("audit goes on"), "2026-11-28 11:00", "2026-11-28 15:00", 6, nobody.clone(), after),
        (numbered("audit ends"), "2026-11-28 11:00", "2026-11-28 15:00", 0, format!("{nobody}{ended}"), ""),
        (
            numbered("audit ends"),
            "2026-11-28T14:00:30",
            "2026-11-28T15:00",
            0,
            format!("{nobody}{ended}"),
            "",
        ),
        (numbered("audit ends"), "2026-11-28 11:00", "2026-11-28 12:00", 0, nobody.clone(), ""),
        // Who was given it before the end holds it still.
        (
            [
                numbered_of("1a2b3c4d", "10:00", 1),
                of_run(
                    "1a2b3c4d",
                    "10:30",
                    2,
                    &format!(
                        r#""message":"svid given",{svid},"serial":"0a","expires":"2026-11-28T11:30:00Z""#
                    ),
                ),
                of_run("1a2b3c4d", "10:40", 3, r#""message":"audit ends","longest_ttl":3600"#),
            ]
            .join("\n"),
            "2026-11-28 11:00",
            "2026-11-28 12:00",
            0,
            format!(
                "2026-11-28T10:30:00Z to 2026-11-28T11:30:00Z\n  pid 9, uid 4000000007, caller uid:4000000007\n  X.509-SVID, serial 0a\n\
                 3 lines of the audit were read: 2026-11-28T10:00:00Z to 2026-11-28T10:40:00Z.\n{ended}"
            ),
            "",
        ),
        // The last line before it is of another run: how long the loss went on is not known from that.
        (
            [
                numbered_of("1a2b3c4d", "10:00", 1),
                numbered_of("5e6f7a8b", "13:30", 1),
                lost_of("1a2b3c4d", "14:00", 2),
            ]
            .join("\n"),
            "2026-11-28 11:00",
            "2026-11-28 12:00",
            6,
            nobody.replace("\n2 ", "\n3 "),
            "the agent could not write 2 lines, which may be about others who held it.",
        ),
        (
            [
                numbered_of("1a2b3c4d", "10:00", 1),
                numbered_of("1a2b3c4d", "13:30", 2),
                lost_of("1a2b3c4d", "14:00", 3),
            ]
            .join("\n"),
            "2026-11-28 11:00",
            "2026-11-28 12:00",
            0,
            nobody.replace("\n2 ", "\n3 "),
            "",
        ),
        (whole.clone(), "2026-11-24", "2026-11-25", 6, nobody.clone(), another),
        (
            format!("{lost}\n{whole}\n{lost}"),
            "2026-11-28 11:00",
            "2026-11-28 12:00",
            6,
            nobody.replace("\n2 ", "\n3 "),
            "the agent could not write 2 lines, which may be about others who held it.",
        ),
        (
            "no audit".to_owned(),
            "2026-11-24",
            "2026-11-25",
            6,
            "Nobody held it, by what was read.\n".to_owned(),
            "no line of the audit was found in what was read.",
        ),
    ] {
        fs::write(&path, text).unwrap();
        let ask = |output: &str| {
            let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
            command.args(["audit", "who", "spiffe://td/web", "--from", from, "--to", to, "--output", output]);
            command.arg(&path).output().unwrap()
        };
        let said = ask("pretty");
        let warned = String::from_utf8_lossy(&said.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
        let (_, warned) = warned.split_once("Warning: ").unwrap_or_default();
        let got = (said.status.code(), String::from_utf8_lossy(&said.stdout).into_owned(), warned);
        assert_eq!(got, (Some(code), stdout, warning), "{from} {to}");
        let json = String::from_utf8(ask("json").stdout).unwrap();
        let conclusion: Value = serde_json::from_str(json.lines().last().unwrap()).unwrap();
        let warnings = conclusion["warnings"].as_array().unwrap();
        let [want] = warnings.as_slice() else {
            assert!(warning.is_empty() && warnings.is_empty(), "{conclusion}");
            continue;
        };
        assert_eq!(format!("{}.", want.as_str().unwrap()), warning);
    }
}

/// Times are taken as people write them, in UTC where they say nothing else.
#[test]
fn times_are_taken_as_people_write_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let line = r#"{"timestamp":"2026-11-28T10:00:00Z","message":"audit begins","longest_ttl":3600,"run":"1a2b3c4d","seq":1}"#;
    fs::write(&path, format!("{line}\n")).unwrap();
    for (time, want) in [
        ("2026-11-29", Some("2026-11-29T00:00:00Z")),
        ("2026-11-28 12:30", Some("2026-11-28T12:30:00Z")),
        ("2026-11-28T12:30", Some("2026-11-28T12:30:00Z")),
        ("2026-11-28 12:30:15", Some("2026-11-28T12:30:15Z")),
        ("2026-11-28T12:30:15", Some("2026-11-28T12:30:15Z")),
        ("2026-11-28T12:30:15Z", Some("2026-11-28T12:30:15Z")),
        ("2026-11-28T12:30:15+01:00", Some("2026-11-28T11:30:15Z")),
        ("28.11.2026", None),
        ("2026-11-28T", None),
        ("12:30", None),
    ] {
        let who = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
            .args(["audit", "who", "spiffe://td/web", "--output", "json", "--to", time])
            .arg(&path)
            .output()
            .unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&who.stdout), String::from_utf8_lossy(&who.stderr));
        match want {
            Some(to) => assert!(stdout.contains(&format!("10:00:00Z to {to}: ")), "{time}: {stdout}{stderr}"),
            None => {
                let words = stderr.split_whitespace().collect::<Vec<_>>().join(" ");
                assert!(
                    words.contains("must be a time in UTC as 2026-11-24, 2026-11-24T13:00 or"),
                    "{time}: {words}"
                );
            }
        }
    }
}

/// What one process is given again is never told of another one.
#[tokio::test]
async fn a_line_about_one_process_counts_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    write_config(dir.path(), &(entry("/one", "") + &format!("audit {{ file = \"{}\" }}\n", path.display())));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    for _ in 0..3 {
        client.fetch_jwtsvid(request(jwt("a"))).await.unwrap();
    }
    let fetch = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
        .args(["api", "fetch", "jwt", "--audience", "a", "--socket-path"])
        .arg(dir.path().join("api.sock"))
        .output()
        .unwrap();
    assert!(fetch.status.success(), "{}", String::from_utf8_lossy(&fetch.stderr));
    end(&mut agent);
    let told = lines(&path);
    let given: Vec<&Value> = told.iter().filter(|line| line["message"] == "svid given").collect();
    assert!(given.len() == 2 && given.iter().all(|line| line["times"].is_null()), "{told:#?}");
    assert_ne!(given[0]["pid"], given[1]["pid"]);
    let again: Vec<&Value> = told.iter().filter(|line| line["message"] == "svid given again").collect();
    assert_eq!(again.iter().map(|line| line["times"].as_u64().unwrap()).sum::<u64>(), 2, "{told:#?}");
    assert!(again.iter().all(|line| line["pid"] == std::process::id()), "{told:#?}");
}

/// Lines that nobody takes are a warning in the log, which counts them exactly.
#[tokio::test]
async fn what_is_lost_of_the_audit_is_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nobody.sock");
    let admin = dir.path().join("data/admin.sock");
    let audit = format!("audit {{ socket_path = \"{}\" }}\n", path.display());
    write_config(dir.path(), &(entry("/one", "") + &audit));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    for audience in ["a", "b", "c"] {
        client.fetch_jwtsvid(request(jwt(audience))).await.unwrap();
    }
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
        .args(["status", "--socket-path"])
        .arg(&admin)
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&status.stdout);
    assert!(
        shown.contains("Audit:        socket ") && shown.contains("the audit cannot be written to"),
        "{shown}"
    );
    end(&mut agent);
    let log = fs::read_to_string(dir.path().join("log")).unwrap();
    let told =
        log.lines().filter_map(|line| line.split_once("audit: lines were lost")?.1.split_once("lost="));
    let lost: u64 = told.map(|(_, count)| count.parse::<u64>().unwrap()).sum();
    assert_eq!(lost, 8, "the audit begins and ends, and each token is made and given: {log}");
    assert!(log.contains("audit.socket_path: nobody takes the lines of the audit"), "from the start: {log}");
    let validate = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
        .args(["validate", "--config"])
        .arg(dir.path().join("agent.conf"))
        .output()
        .unwrap();
    let warned = String::from_utf8_lossy(&validate.stderr);
    let want = format!(": audit.socket_path: nobody takes the lines of the audit at {}", path.display());
    assert!(validate.status.success() && warned.contains(&want), "{warned}");
}

/// In the log the lines stand whatever its level is; switched off, nowhere.
#[tokio::test]
async fn the_log_is_the_place_by_default() {
    for (level, settings, is_told) in
        [("info", "", true), ("error", "", true), ("info", "audit { enabled = false }\n", false)]
    {
        let dir = tempfile::tempdir().unwrap();
        write_config(dir.path(), &(entry("/one", "") + settings));
        let config = dir.path().join("agent.conf");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("log_level = \"warn\"", &format!("log_level = \"{level}\"")))
            .unwrap();
        let mut agent = Process::spawn(dir.path());
        let mut client = agent.serving(dir.path()).await;
        client.fetch_jwtsvid(request(jwt("a"))).await.unwrap();
        let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
        stream.into_inner().message().await.unwrap().unwrap();
        client.fetch_jwtsvid(request(jwt(""))).await.unwrap_err();
        end(&mut agent);
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log.contains("audit: svid given"), is_told, "{log}");
        // A caller is one word, whoever writes of it.
        let callers = log.matches("caller=").count();
        let plain = log.matches(&format!("caller=uid:{} uid={0} gid=", getuid())).count();
        assert!(callers == plain && (callers >= 2) == is_told, "{log}");
    }
}

/// A refusal by the bucket of a SPIFFE ID names it; who is not let in is counted with the rest.
#[tokio::test]
async fn refusals_say_which_identity_and_which_connection() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let limits = "ratelimit {\n  gate {\n    caller { connections = 1 }\n  }\n  identity { rate = 1 per = \"day\" burst = 2 }\n}\n";
    let audit = format!("audit {{ file = \"{}\" }}\n", path.display());
    write_config(dir.path(), &(entry("/one", "") + limits + &audit));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    let mut refusals = 0;
    for _ in 0..5 {
        let answer = client.fetch_jwtsvid(request(jwt("a"))).await;
        // A connection of its own may have been refused as well: the one that looked whether the agent serves is open still.
        refusals += u64::from(answer.is_err_and(|error| {
            error.code() == tonic::Code::ResourceExhausted && !error.message().contains("ratelimit.gate")
        }));
    }
    assert!((1..5).contains(&refusals), "{refusals}");
    for _ in 0..4 {
        // Closed by the agent, or told why.
        let mut refused = std::os::unix::net::UnixStream::connect(dir.path().join("api.sock")).unwrap();
        refused.set_read_timeout(Some(PATIENCE)).unwrap();
        while std::io::Read::read(&mut refused, &mut [0; 4096]).is_ok_and(|len| len > 0) {}
    }
    end(&mut agent);

    let told = lines(&path);
    let counted = |what: &str| -> u64 {
        let about = told.iter().filter(|line| line["message"].as_str().unwrap().starts_with(what));
        about.map(|line| line["times"].as_u64().unwrap_or(1)).sum()
    };
    // One of those that looked whether the agent serves may be among them.
    assert!(counted("call") == refusals && (4..=6).contains(&counted("connection")), "{refusals} {told:#?}");
    for line in told.iter().filter(|line| line["message"].as_str().unwrap().contains("refused")) {
        assert_eq!(line["caller"], format!("uid:{}", getuid()), "{line}");
        let (reason, identity) = match line["method"].as_str() {
            Some(_) => ("rate", Value::from("spiffe://example.org/one")),
            None => ("caller_connections", Value::Null),
        };
        assert_eq!((&line["reason"], &line["spiffe_id"]), (&reason.into(), &identity), "{line}");
    }
}

/// Where the lines of the audit go in a test.
#[derive(Clone, Copy, Debug)]
enum AuditPlace {
    File,
    Socket,
    LogText,
    LogJson,
}

/// A process that asks again and again is one holder for each SVID, however soon it asks: wherever the lines are.
#[tokio::test]
async fn a_process_is_one_holder_however_soon_it_asks_again() {
    for place in [AuditPlace::File, AuditPlace::Socket, AuditPlace::LogText, AuditPlace::LogJson] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit");
        let settings = match place {
            AuditPlace::File => format!("audit {{ file = \"{}\" }}\n", path.display()),
            AuditPlace::Socket => format!("audit {{ socket_path = \"{}\" }}\n", path.display()),
            AuditPlace::LogText | AuditPlace::LogJson => String::new(),
        };
        write_config(dir.path(), &(entry("/one", "") + &settings));
        if matches!(place, AuditPlace::LogJson) {
            let config = dir.path().join("agent.conf");
            let text = fs::read_to_string(&config).unwrap();
            fs::write(&config, text.replace("log_level =", "log_format = \"json\"\n  log_level =")).unwrap();
        }
        let socket = matches!(place, AuditPlace::Socket).then(|| UnixDatagram::bind(&path).unwrap());
        let mut agent = Process::spawn(dir.path());
        let mut client = agent.serving(dir.path()).await;
        for _ in 0..201 {
            client.fetch_jwtsvid(request(jwt("a"))).await.unwrap();
            let stream = client.fetch_x509svid(request(pb::X509svidRequest {})).await.unwrap();
            stream.into_inner().message().await.unwrap().unwrap();
        }
        end(&mut agent);
        if let Some(socket) = socket {
            socket.set_nonblocking(true).unwrap();
            let mut taken = Vec::new();
            let mut datagram = [0; 4096];
            while let Ok(len) = socket.recv(&mut datagram) {
                taken.extend_from_slice(&datagram[..len]);
                taken.push(b'\n');
            }
            fs::write(dir.path().join("log"), taken).unwrap();
        }
        let lines = if matches!(place, AuditPlace::File) { path } else { dir.path().join("log") };
        let text = fs::read_to_string(&lines).unwrap();
        let again =
            |kind: &str| text.lines().any(|line| line.contains("svid given again") && line.contains(kind));
        assert!(again("x509") && again("jwt"), "{place:?}: {text}");
        let who = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
            .args(["audit", "who", "spiffe://example.org/one", "--output", "json"])
            .arg(&lines)
            .output()
            .unwrap();
        let said = String::from_utf8(who.stdout).unwrap();
        let said: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let kinds: std::collections::BTreeSet<&str> =
            said.iter().filter_map(|holder| holder["kind"].as_str()).collect();
        assert_eq!(
            (said.len(), kinds.len(), who.status.code()),
            (3, 2, Some(0)),
            "{place:?}: {said:#?} {text}"
        );
    }
}

/// Lines that are not there are noticed by their numbers, and how far back SVIDs may have been given by what the agent says.
#[tokio::test]
async fn missing_files_and_the_time_before_the_lines_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let audit = format!("audit {{ file = \"{}\" }}\n", path.display());
    write_config(dir.path(), &(entry("/one", "jwt_svid_ttl = \"5m\"\n  x509_svid_ttl = \"2h\"\n") + &audit));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    let mut parts = Vec::new();
    for (n, audience) in ["a", "b", "c"].into_iter().enumerate() {
        client.fetch_jwtsvid(request(jwt(audience))).await.unwrap();
        // As logrotate does.
        let moved = dir.path().join(format!("audit.jsonl.{n}"));
        let told = std::time::Instant::now();
        while !fs::read_to_string(&path).is_ok_and(|text| text.contains("svid given")) {
            assert!(told.elapsed() < PATIENCE);
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        fs::rename(&path, &moved).unwrap();
        agent.signal(Signal::SIGUSR2);
        while !path.exists() {
            assert!(told.elapsed() < PATIENCE);
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        parts.push(moved);
    }
    end(&mut agent);
    let begins = &lines(&parts[0])[0];
    assert_eq!(
        (&begins["message"], &begins["longest_ttl"]),
        (&"audit begins".into(), &7200.into()),
        "{begins}"
    );
    let numbers: Vec<Vec<u64>> = parts
        .iter()
        .map(|part| lines(part).iter().map(|line| line["seq"].as_u64().unwrap()).collect())
        .collect();
    assert_eq!(numbers.concat(), (1..=7).collect::<Vec<u64>>(), "each token is made and given");
    let run = begins["run"].as_str().unwrap();
    let gone = format!("lines 4 to 5 of run {run} are missing, written between ");
    let first = format!("lines 1 to 3 of run {run} are missing, written before ");
    let [zero, one, two] = [&parts[0], &parts[1], &parts[2]];
    for (files, code, warning) in [
        (vec![zero, one, two], 0, None),
        (vec![two, zero, one], 0, None),
        (vec![zero, one, one, two, zero], 0, None),
        (vec![zero, two], 6, Some(&gone)),
        (vec![two, zero], 6, Some(&gone)),
        (vec![one, two], 6, Some(&first)),
    ] {
        let who = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
            .args(["audit", "who", "spiffe://example.org/one", "--output", "json"])
            .args(&files)
            .output()
            .unwrap();
        let said = String::from_utf8(who.stdout).unwrap();
        let conclusion: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        let warned: Vec<&str> = conclusion["warnings"]
            .as_array()
            .unwrap()
            .iter()
            .map(|warning| warning.as_str().unwrap())
            .collect();
        assert_eq!(
            (who.status.code(), warned.len()),
            (Some(code), warning.iter().count()),
            "{files:?} {said}"
        );
        assert!(warning.is_none_or(|want| warned[0].starts_with(want)), "{files:?} {said}");
        assert_eq!(
            conclusion["read"]["lines"],
            files
                .iter()
                .collect::<std::collections::BTreeSet<_>>()
                .iter()
                .map(|file| lines(file).len())
                .sum::<usize>(),
            "each line counts once"
        );
    }
}

/// An agent knows of the run before, however that ended and whatever has become of its lines: which it was, and for how long what
/// it made may be valid. Its first line is whole, whatever the file ends with.
#[tokio::test]
async fn an_agent_tells_of_the_run_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let audit = format!("audit {{ file = \"{}\" }}\n", path.display());
    write_config(dir.path(), &(entry("/one", "x509_svid_ttl = \"3h\"\n") + &audit));
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    client.fetch_jwtsvid(request(jwt("a"))).await.unwrap();
    // Smaller by a reload first, and by a restart then.
    write_config(dir.path(), &(entry("/one", "x509_svid_ttl = \"2h\"\n") + &audit));
    agent.signal(Signal::SIGHUP);
    let notes = dir.path().join("data/audit-runs.json");
    let begun = std::time::Instant::now();
    while !fs::read_to_string(&notes).is_ok_and(|notes| notes.contains("\"ttl\":7200")) {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    while !fs::read_to_string(&path).is_ok_and(|text| text.contains("svid given")) {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    agent.signal(Signal::SIGKILL);
    agent.wait();
    let killed = lines(&path);
    assert_eq!(killed[0]["before"], "none", "{killed:#?}");
    assert!(
        killed.iter().all(|line| line["message"] != "audit goes on"),
        "three hours are in force: {killed:#?}"
    );
    let run = killed[0]["run"].as_str().unwrap().to_owned();
    let moved = dir.path().join("audit.jsonl.1");
    fs::rename(&path, &moved).unwrap();

    fs::write(&path, r#"{"timestamp":"2026-"#).unwrap();
    write_config(dir.path(), &(entry("/one", "") + &audit));
    let mut agent = Process::spawn(dir.path());
    agent.serving(dir.path()).await;
    end(&mut agent);
    let text = fs::read_to_string(&path).unwrap();
    let (piece, whole) = text.split_once('\n').unwrap();
    assert_eq!(piece, r#"{"timestamp":"2026-"#);
    let told: Vec<Value> = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(
        (&told[0]["message"], &told[0]["before"], &told[0]["longest_ttl"], &told[0]["seq"]),
        (&"audit begins".into(), &run.clone().into(), &10_800.into(), &1.into())
    );
    assert_eq!((&told[1]["message"], &told[1]["longest_ttl"]), (&"audit ends".into(), &10_800.into()));

    let begun = |line: &Value| {
        time::OffsetDateTime::parse(
            line["timestamp"].as_str().unwrap(),
            &time::format_description::well_known::Rfc3339,
        )
        .unwrap()
    };
    let (first, begins) = (begun(&killed[0]), begun(&told[0]));
    let shown = |at: time::OffsetDateTime| at.format(&time::format_description::well_known::Rfc3339).unwrap();
    let later = |hours: i64| shown(begins + time::Duration::hours(hours));
    for (case, files, from, warning) in [
        (
            "its lines are gone",
            vec![&path],
            None,
            Some(format!("no line of run {run} was read: those written before ")),
        ),
        ("they are there", vec![&moved, &path], None, Some(format!("run {run} has no end: "))),
        ("before any run", vec![&moved], Some(shown(first - time::Duration::hours(9))), None),
        ("after the end of a later one", vec![&moved, &path], Some(later(9)), None),
        ("while what it made is valid", vec![&path], Some(later(2)), Some("no line is of ".to_owned())),
        ("when that has ended", vec![&path], Some(later(4)), None),
    ] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
        command.args(["audit", "who", "spiffe://example.org/one", "--output", "json"]).args(files);
        let who = command.args(from.iter().flat_map(|from| ["--from", from])).output().unwrap();
        let said = String::from_utf8(who.stdout).unwrap();
        let conclusion: Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        let warnings = conclusion["warnings"].as_array().unwrap();
        assert_eq!(warnings.len(), usize::from(warning.is_some()), "{case}: {said}");
        assert_eq!(who.status.code(), Some(if warning.is_some() { 6 } else { 0 }), "{case}: {said}");
        let first = warnings.first().and_then(Value::as_str).unwrap_or_default();
        assert!(first.starts_with(&warning.unwrap_or_default()), "{case}: {said}");
    }
}

/// Where the notes of earlier runs are lost, a run of which nothing is known may have made what is valid as long as could be set.
#[tokio::test]
async fn an_agent_that_has_lost_its_notes_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (path, notes) = (dir.path().join("audit.jsonl"), dir.path().join("data/audit-runs.json"));
    write_config(dir.path(), &(entry("/one", "") + &format!("audit {{ file = \"{}\" }}\n", path.display())));
    let lifetimes = r#"{"run":"ab12cd34","ttl":99999999999,"longest_ttl":99999999999,"until":null}"#;
    for (case, left, before) in [
        ("the first run", None, "none"),
        ("they are gone", None, "unknown"),
        ("they are empty", Some(""), "unknown"),
        ("they are absurd", Some(lifetimes), "unknown"),
    ] {
        drop(fs::remove_file(&path));
        drop(fs::remove_file(&notes));
        if let Some(left) = left {
            fs::write(&notes, left).unwrap();
            fs::set_permissions(&notes, fs::Permissions::from_mode(0o600)).unwrap();
        }
        let mut agent = Process::spawn(dir.path());
        agent.serving(dir.path()).await;
        end(&mut agent);
        let begins = &lines(&path)[0];
        let day_or_hour = if before == "none" { 3_600 } else { 86_400 };
        assert_eq!(
            (&begins["before"], &begins["longest_ttl"]),
            (&before.into(), &day_or_hour.into()),
            "{case}: {begins:#?}"
        );
    }
}

/// A time is only said to be known when all SVIDs that may have been valid then were given in the lines.
#[test]
fn the_lines_must_reach_back_as_far_as_svids_are_valid() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let line = |at: &str, message: &str, more: &str| {
        format!(r#"{{"timestamp":"2026-11-28T{at}:00Z","message":"{message}"{more}}}"#)
    };
    // Somebody else's token of five minutes, and what the agent says.
    let token = r#","caller":"uid:5","uid":5,"gid":5,"pid":5,"kind":"jwt","spiffe_id":"spiffe://td/other","kid":"a","exp":1795860300"#;
    let said = |ttl: &str| line("10:00", "audit begins", &format!(r#"{ttl},"run":"1a2b3c4d","seq":1"#));
    let tail = line("23:00", "connection refused", r#","caller":"uid:5","reason":"blocked""#);
    let assumed = "(no line says for how long they may be valid, and up to 1h0m0s is assumed).";
    for (case, begin, from, warning) in [
        ("nothing said, and an hour later", String::new(), "11:00", None),
        ("nothing said, and sooner", String::new(), "10:30", Some(assumed)),
        ("five minutes are said, and an hour later", said(r#","longest_ttl":300"#), "11:00", None),
        // What was valid for longer may have ended before it was said.
        (
            "five minutes are said, and sooner",
            said(r#","longest_ttl":300"#),
            "10:59",
            Some("(1h0m0s before is looked at in any case)."),
        ),
        (
            "an hour is said, and sooner",
            said(r#","longest_ttl":3600"#),
            "10:59",
            Some("(they are valid for up to 1h0m0s)."),
        ),
        ("ten hours are said, and later", said(r#","longest_ttl":36000"#), "20:00", None),
        (
            "ten hours are said, and sooner",
            said(r#","longest_ttl":36000"#),
            "19:00",
            Some("(they are valid for up to 10h0m0s)."),
        ),
        ("a server decides, and an hour later", said(""), "11:00", None),
        ("a server decides, and sooner", said(""), "10:30", Some(assumed)),
    ] {
        let text = [begin, line("10:00", "svid given", token), tail.clone()].join("\n");
        fs::write(&path, text).unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_durward"));
        command.args(["audit", "who", "spiffe://td/web", "--from", &format!("2026-11-28 {from}")]);
        let got = command.args(["--to", "2026-11-28 23:00"]).arg(&path).output().unwrap();
        let warned = String::from_utf8_lossy(&got.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(got.status.code(), Some(if warning.is_some() { 6 } else { 0 }), "{case}: {warned}");
        assert!(warning.map_or(warned.is_empty(), |want| warned.ends_with(want)), "{case}: {warned}");
    }
}

/// Of a compressed file that has no end, what can be read is used.
#[test]
fn a_compressed_file_without_its_end_is_read_with_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    let svid =
        r#""caller":"uid:4000000007","uid":4000000007,"gid":8,"kind":"x509","spiffe_id":"spiffe://td/web""#;
    let line = |n: u32| {
        format!(
            r#"{{"timestamp":"2026-11-28T10:00:{:02}Z","message":"svid given",{svid},"pid":{n},"serial":"{n:x}","expires":"2026-11-28T11:00:00Z"}}"#,
            n % 60
        )
    };
    fs::write(&path, (0..5000).map(|n| line(n) + "\n").collect::<String>()).unwrap();
    assert!(std::process::Command::new("gzip").arg(&path).status().unwrap().success());
    let path = dir.path().join("audit.jsonl.gz");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let who = std::process::Command::new(env!("CARGO_BIN_EXE_durward"))
        .args(["audit", "who", "spiffe://td/web", "--output", "json"])
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8(who.stdout).unwrap();
    let found = said.lines().count() - 1;
    assert!((100..5000).contains(&found) && who.status.code() == Some(6), "{found} {:?}", who.status);
    assert!(said.lines().last().unwrap().contains("gzip could not unpack all of it"), "{said}");
}
