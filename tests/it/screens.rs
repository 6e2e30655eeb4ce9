//! What a person sees on a terminal of 80 and of 120 columns: no line is wider, and a screen is one screen.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    path::Path,
    process::Command,
};

use durward::api::proto::workload as pb;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    pty::{Winsize, openpty},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::support::{Process, entry, request, write_config};

const PROGRAM: &str = env!("CARGO_BIN_EXE_durward");

/// A command whose terminal is its own, as a shell's is.
fn durward() -> Command {
    let mut command = Command::new("setsid");
    command.args(["--ctty", PROGRAM]).env_remove("NO_COLOR").env("TERM", "xterm");
    command
}

/// How a person ends a command that goes on.
#[derive(Clone, Copy)]
enum Ending {
    Q,
    Interrupt,
    CloseTheTerminal,
}

/// What `command` writes to a terminal of this size until it ends, or is ended once it wrote `enough`.
fn on_terminal(
    mut command: Command,
    rows: u16,
    columns: u16,
    ending: Ending,
    enough: impl Fn(&str) -> bool,
) -> String {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(&size, None).unwrap();
    for end in [&pty.master, &pty.slave] {
        // Or processes of other tests, and this command itself, keep the terminal open.
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    }
    let (mut master, slave) = (File::from(pty.master), File::from(pty.slave));
    command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
    let mut child = command.spawn().unwrap();
    drop(command);
    let (mut said, mut told) = (Vec::new(), false);
    let mut buffer = [0; 4096];
    // EIO once nobody has the other end any more.
    while let Ok(len @ 1..) = master.read(&mut buffer) {
        said.extend_from_slice(&buffer[..len]);
        if !told && enough(&String::from_utf8_lossy(&said)) {
            told = true;
            match ending {
                Ending::Q => master.write_all(b"q").unwrap(),
                Ending::Interrupt => kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap(),
                Ending::CloseTheTerminal => break,
            }
        }
    }
    drop(master);
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&said));
    String::from_utf8(said).unwrap().replace("\r\n", "\n")
}

/// The screens that were drawn one after the other, without colours.
fn screens(said: &str) -> Vec<String> {
    let plain = |text: &str| {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("\x1b[") {
            out.push_str(before);
            rest = after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').get(1..).unwrap_or("");
        }
        out + rest
    };
    said.split("\x1b[H\x1b[J").map(plain).filter(|screen| !screen.is_empty()).collect()
}

/// No line is wider, and where it is a screen it has no more rows.
fn fits(what: &str, text: &str, columns: u16, rows: Option<u16>, but: &str) {
    for screen in screens(text) {
        let wide =
            |line: &&str| line.chars().count() > columns.into() && (but.is_empty() || !line.contains(but));
        let wide: Vec<_> = screen.lines().filter(wide).collect();
        assert!(wide.is_empty(), "{what} at {columns}: {wide:#?}\n{screen}");
        let lines = screen.lines().count();
        assert!(rows.is_none_or(|rows| lines < rows.into()), "{what} at {columns}: {lines} rows\n{screen}");
    }
}

/// The answer of one command, which ends by itself.
fn shown(words: &[&str], more: &[&Path], columns: u16) -> String {
    let mut command = durward();
    command.args(words).args(more);
    on_terminal(command, 24, columns, Ending::Interrupt, |_| false)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_tells_fits_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let limits =
        "ratelimit {\n  caller { rate = 50 burst = 100 }\n  gate { caller { connections = 500 } }\n}\n";
    let long = entry("/a/workload/with-a-name/that-is/rather-long", "");
    write_config(dir.path(), &[limits, &long].concat());
    let mut agent = Process::spawn(dir.path());
    let mut client = agent.serving(dir.path()).await;
    for audience in ["a", "b"] {
        let asked = pb::JwtsvidRequest { audience: vec![audience.to_owned()], spiffe_id: String::new() };
        client.fetch_jwtsvid(request(asked)).await.unwrap();
    }
    let admin = dir.path().join("data/admin.sock");
    let at_admin = [Path::new("--socket-path"), &admin];
    for columns in [80, 120] {
        for (words, rows, begin) in [
            (&["status"][..], Some(24), "Agent: "),
            (&["limits"], None, "Connections: "),
            (&["explain"], None, "Process: "),
            (&["entry", "show"], None, "1 entry"),
        ] {
            let text = shown(words, &at_admin, columns);
            assert!(text.starts_with(begin), "{text}");
            fits(&words.join(" "), &text, columns, rows, "");
        }
        let mut watch = durward();
        watch.args(["limits", "--watch"]).args(at_admin);
        let text = on_terminal(watch, 24, columns, Ending::Q, |said| said.matches("CALLS/S").count() >= 2);
        fits("limits --watch", &text, columns, Some(24), "");
        let drawn = screens(&text);
        assert!(drawn[0].contains("; measuring\n"), "the first says so: {}", drawn[0]);
        let row = drawn[1].lines().find(|line| line.starts_with("caller")).unwrap();
        assert!(row.contains(" 0 "), "the second has rates: {}", drawn[1]);
    }
}

#[test]
fn help_fits_the_terminal() {
    let pages: [&[&str]; 16] = [
        &[],
        &["run"],
        &["quickstart"],
        &["api", "fetch", "x509"],
        &["api", "fetch", "jwt"],
        &["api", "validate", "jwt"],
        &["api", "watch"],
        &["healthcheck"],
        &["status"],
        &["limits"],
        &["explain"],
        &["entry", "show"],
        &["bundle", "show"],
        &["reload"],
        &["validate"],
        &["man"],
    ];
    for columns in [80, 120] {
        for page in pages {
            let text = shown(&[page, &["--help"]].concat(), &[], columns);
            assert!(text.contains('\x1b') && text.contains("Usage"), "{text}");
            fits(&page.join(" "), &text, columns, None, "");
        }
    }
}

/// Errors are folded between words.
#[test]
fn mistakes_fit_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("agent.conf");
    std::fs::write(&config, "agent {\n  trust_domain = \"example.org\"\n  log_level = \"loud\"\n}\n")
        .unwrap();
    let script = "\"$@\"; [ $? = 1 ]";
    let mut command = Command::new("setsid");
    command.args(["--ctty", "sh", "-c", script, "sh", PROGRAM, "validate", "--config"]).arg(&config);
    let text = on_terminal(command, 24, 80, Ending::Interrupt, |_| false);
    assert!(text.contains("loud") && text.split_whitespace().any(|word| word == "configured,"), "{text}");
    fits("validate", &text, 80, None, "");
}

#[test]
fn quickstart_fits_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("a-person-whose-home-has-a-name-that-is-long-enough-for-two-lines");
    let at = home.join(".local/state/durward-quickstart");
    for ending in [Ending::Interrupt, Ending::CloseTheTerminal] {
        let mut command = durward();
        command.args(["quickstart", "--dir"]).arg(&at).env("HOME", &home);
        let text = on_terminal(command, 24, 80, ending, |said| said.contains("Serving. "));
        assert!(text.contains("SPIFFE ID    spiffe://example.org/me"), "{text}");
        assert!(text.contains("\n  . ~/.local/state/durward-quickstart/env\n"), "{text}");
        // The directory itself is as long as it is.
        let (first, rest) = text.split_once('\n').unwrap();
        assert_eq!(first, format!("Setting up in {}", at.display()));
        fits("quickstart", rest, 80, None, "");
        let socket = text.lines().find_map(|line| line.strip_prefix("  socket ")).unwrap();
        assert!(socket.starts_with("/tmp/") && !Path::new(socket).exists(), "it has ended well: {socket}");
    }
}
