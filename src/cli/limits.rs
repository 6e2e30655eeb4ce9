//! `limits`: who calls most and is refused most, once or again and again.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io::{self, IsTerminal as _, Read as _},
    os::fd::AsFd as _,
    time::Duration,
};

use nix::unistd::{Uid, User};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::Instant,
};

use super::{
    Failure, OutputArgs, OutputFormat,
    admin::{
        AdminArgs, Column, bucket_json, connections_json, fit, is_dry_run, kibibytes, marks, mebibytes,
        memory_json, others_text, processor_text, share_text, table, taker, taking_json, tokens,
    },
    argv::number_up_to,
    terminal::{Terminal, clean, width},
};
use crate::{
    api::{admin::MOST, proto::admin as pb},
    os::terminal::{KeyByKey, size},
};

/// `limits`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct LimitsArgs {
    /// How many to show, at most 1000: those with the most refusals and calls
    #[arg(long, value_name = "N", default_value = "10", value_parser = number_up_to::<MOST>)]
    top: u32,

    /// Show it again every second, or every SECONDS, until q or Ctrl-C
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "1",
        value_parser = number_up_to::<3600>
    )]
    watch: Option<u32>,

    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `limits`.
pub(super) async fn limits(args: &LimitsArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let first = ask(args, terminal).await?;
    let mut names = UserNames::default();
    let Some(seconds) = args.watch else {
        let text = match args.output.output {
            OutputFormat::Pretty => pretty(&first, args.top, &mut names, width()),
            OutputFormat::Json => format!("{}\n", to_json(&first)),
        };
        return Ok(terminal.print(&text)?);
    };
    // Taken once: a Ctrl-C during a call is met at the next wait.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::Runtime)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Failure::Runtime)?;
    let mut resized = signal(SignalKind::window_change()).map_err(Failure::Runtime)?;
    let every = Duration::from_secs(u64::from(seconds));
    // On a terminal: what is done in a second is known when there are two answers, so soon.
    let first_pause = if io::stdout().is_terminal() { every.min(SECOND_LOOK) } else { every };
    let mut tick = tokio::time::interval_at(Instant::now() + first_pause, every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let stdin = io::stdin();
    let mut keys = Keys::of(&stdin);
    let mut view = View { now: first, at: Instant::now(), before: None };
    terminal.redraw(&view.text(args, &mut names))?;
    loop {
        let tells = tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            _ = terminate.recv() => return Ok(()),
            () = keys.quit() => return Ok(()),
            _ = resized.recv() => false,
            _ = tick.tick() => true,
        };
        if tells {
            match ask(args, terminal).await {
                Ok(now) => view.next(now),
                // It may be restarting: asked again at the next tick.
                Err(Failure::Call(err)) => {
                    terminal.note(&err);
                    continue;
                }
                Err(other) => return Err(other),
            }
        }
        if tells || io::stdout().is_terminal() {
            terminal.redraw(&view.text(args, &mut names))?;
        }
    }
}

/// What is shown again and again, and what was shown before, to tell how much is done in a second.
struct View {
    now: pb::LimitsResponse,
    at: Instant,
    before: Option<(pb::LimitsResponse, Duration)>,
}

impl View {
    fn next(&mut self, now: pb::LimitsResponse) {
        let elapsed = std::mem::replace(&mut self.at, Instant::now()).elapsed();
        self.before = Some((std::mem::replace(&mut self.now, now), elapsed));
    }

    fn text(&self, args: &LimitsArgs, names: &mut UserNames) -> String {
        match (args.output.output, size(io::stdout())) {
            (OutputFormat::Json, _) => format!("{}\n", to_json(&self.now)),
            (OutputFormat::Pretty, Some(size)) => screen(&self.now, self.before.as_ref(), size, names),
            (OutputFormat::Pretty, None) => pretty(&self.now, args.top, names, width()),
        }
    }
}

/// The keys of a person's terminal, read by a thread that ends with the process.
struct Keys<'a> {
    quit: Option<oneshot::Receiver<()>>,
    /// Each comes as it is pressed, as long as this is there.
    _one_by_one: Option<KeyByKey<'a>>,
}

impl<'a> Keys<'a> {
    fn of(stdin: &'a io::Stdin) -> Self {
        let one_by_one = KeyByKey::of(stdin.as_fd());
        let quit = one_by_one.as_ref().and_then(|_| {
            let (tell, told) = oneshot::channel();
            let reading = std::thread::Builder::new().name("keys".to_owned()).spawn(move || {
                // Ctrl-D is a key like any other here.
                let quits = |key: &io::Result<u8>| matches!(key, Ok(b'q' | b'Q' | 4));
                if io::stdin().lock().bytes().take_while(Result::is_ok).any(|key| quits(&key)) {
                    // Nobody may wait for it any more.
                    let _told = tell.send(());
                }
            });
            reading.ok().map(|_thread| told)
        });
        Self { quit, _one_by_one: one_by_one }
    }

    /// Ends when `q` is pressed, or Ctrl-D; never where no keys are to be had.
    async fn quit(&mut self) {
        if let Some(quit) = &mut self.quit
            && quit.await.is_ok()
        {
            return;
        }
        self.quit = None;
        std::future::pending().await
    }
}

/// The names of users, each looked up once.
#[derive(Default)]
struct UserNames(BTreeMap<u32, Option<String>>);

impl UserNames {
    /// `uid:1000` with the user's name behind it, where there is one.
    fn of(&mut self, key: &str) -> String {
        let uid = key.trim_start().strip_prefix("uid:").and_then(|uid| uid.parse().ok());
        let name = uid.and_then(|uid| self.lookup(uid));
        name.map_or_else(|| key.to_owned(), |name| format!("{key} ({name})"))
    }

    fn lookup(&mut self, uid: u32) -> Option<String> {
        let known = |uid| User::from_uid(Uid::from_raw(uid)).ok().flatten().map(|user| user.name);
        self.0.entry(uid).or_insert_with(|| known(uid)).clone()
    }
}

/// Between the first two answers of `--watch`.
const SECOND_LOOK: Duration = Duration::from_millis(500);

async fn ask(args: &LimitsArgs, terminal: &mut Terminal) -> Result<pb::LimitsResponse, Failure> {
    let question = pb::LimitsRequest { top: args.top };
    args.admin.call(terminal, question, async |mut api, request| api.limits(request).await).await
}

/// In the place of an empty table.
const NOBODY: &str = "Nobody has called yet.";

/// As much as a terminal has room for: who calls and is refused, by the second.
fn screen(
    now: &pb::LimitsResponse,
    before: Option<&(pb::LimitsResponse, Duration)>,
    (rows, columns): (usize, usize),
    names: &mut UserNames,
) -> String {
    let mut out = vec![
        format!(
            "{} connections, {} being attested, {} waiting; * by default{}; q ends{}",
            now.node_connections,
            now.attestations_in_flight,
            now.calls_waiting,
            if now.heaviest.iter().filter_map(|heavy| heavy.bucket.as_ref()).any(is_dry_run) {
                ", ~ dry run"
            } else {
                ""
            },
            if before.is_none() { "; measuring" } else { "" }
        ),
        format!("{}; room: {}", now.memory.as_ref().map(memory_text).unwrap_or_default(), room_text(now)),
        String::new(),
    ];
    // What is left below the head and between the tables, and of that a third for connections.
    let left = rows.saturating_sub(out.len() + 4);
    let connections = now.connections.len().min((left / 3).max(3));
    let heavy: Vec<[String; 6]> =
        now.heaviest.iter().flat_map(|heavy| rate_rows(heavy, before, names)).collect();
    let shown = heavy.len().min(left.saturating_sub(connections));
    let table_columns = [
        Column::Left("STAGE"),
        Column::Left("KEY"),
        Column::Left("METHOD"),
        Column::Right("CALLS/S"),
        Column::Right("REFUSED/S"),
        Column::Right("LEFT"),
    ];
    if heavy.is_empty() {
        out.push(NOBODY.to_owned());
    } else {
        let fitted = fit(heavy.get(..shown).unwrap_or_default(), 1, columns, &table_columns);
        out.extend(table(table_columns, &fitted).lines().map(str::to_owned));
    }
    out.push(String::new());
    if connections > 0 {
        let table = connection_table(now, connections, "CONNECTIONS", names, columns);
        out.extend(table.lines().map(str::to_owned));
    }
    out.truncate(rows.saturating_sub(1));
    let cut = |line: String| line.chars().take(columns).collect::<String>();
    out.into_iter().map(cut).collect::<Vec<_>>().join("\n")
}

/// A bucket, and below it those who take from it, with what they did in a second.
fn rate_rows(
    heavy: &pb::Heavy,
    before: Option<&(pb::LimitsResponse, Duration)>,
    names: &mut UserNames,
) -> Vec<[String; 6]> {
    let bucket = heavy.bucket.clone().unwrap_or_default();
    let same = |it: &&pb::Heavy| {
        it.bucket.as_ref().is_some_and(|it| {
            (&it.stage, &it.key, &it.method) == (&bucket.stage, &bucket.key, &bucket.method)
        })
    };
    // One that was not among the heaviest before has done all of it since.
    let earlier = before.map(|(before, elapsed)| (before.heaviest.iter().find(same), elapsed));
    let rate = |now: u32, count: &dyn Fn(&pb::Heavy) -> u32| match earlier {
        None => "...".to_owned(),
        Some((heavy, elapsed)) => per_second(now.saturating_sub(heavy.map_or(0, count)), *elapsed),
    };
    let mut rows = vec![[
        bucket.stage.clone(),
        names.of(&bucket.key),
        bucket.method.clone(),
        rate(heavy.used, &|heavy| heavy.used),
        rate(heavy.refused, &|heavy| heavy.refused),
        tokens(&bucket),
    ]];
    rows.extend(heavy.takings.iter().map(|taking| {
        let count = |heavy: &pb::Heavy, what: fn(&pb::Taking) -> u32| {
            heavy.takings.iter().find(|it| it.caller == taking.caller).map_or(0, what)
        };
        let key = format!("  {}", names.of(taker(taking)));
        let used = rate(taking.used, &|heavy| count(heavy, |it| it.used));
        let refused = rate(taking.refused, &|heavy| count(heavy, |it| it.refused));
        [String::new(), key, String::new(), used, refused, String::new()]
    }));
    rows
}

fn per_second(count: u32, elapsed: Duration) -> String {
    let millis = elapsed.as_millis().max(1);
    ((u128::from(count) * 1000 + millis / 2) / millis).to_string()
}

fn room_text(now: &pb::LimitsResponse) -> String {
    if now.short_of.is_empty() {
        "yes".to_owned()
    } else {
        format!("short of {}", clean(&now.short_of.join(", ")))
    }
}

/// What the first `most` callers hold, and beside that what each may hold, where that is short.
fn connection_table(
    now: &pb::LimitsResponse,
    most: usize,
    open: &'static str,
    names: &mut UserNames,
    width: usize,
) -> String {
    let columns =
        [Column::Left("CALLER"), Column::Right(open), Column::Right("HELD"), Column::Right("SHARE")];
    let share = share_text(now.share, now.share_of_connections);
    let row = |it: &pb::Connections| {
        let caller = names.of(&it.caller) + &others_text(it);
        [caller, it.open.to_string(), kibibytes(it.held), share.clone().unwrap_or_default()]
    };
    let rows: Vec<[String; 4]> = now.connections.iter().take(most).map(row).collect();
    if share.is_some() {
        return table(columns, &fit(&rows, 0, width, &columns));
    }
    let [columns @ .., _] = columns;
    let rows: Vec<[String; 3]> = rows.into_iter().map(|[columns @ .., _]| columns).collect();
    table(columns, &fit(&rows, 0, width, &columns))
}

/// All of the answer to a question for `top`, in so many columns.
fn pretty(now: &pb::LimitsResponse, top: u32, names: &mut UserNames, width: usize) -> String {
    let keys = now.keys.unwrap_or_default();
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = writeln!(
        out,
        "Connections: {} of at most {} (attestations in flight: {})",
        now.node_connections, now.most_connections, now.attestations_in_flight
    );
    let _ = writeln!(
        out,
        "Buckets:     {} of the gate, {} of callers, {} of identities",
        keys.gate, keys.caller, keys.identity
    );
    if let Some(memory) = &now.memory {
        let [used, held] = [memory_text(memory), held_text(memory)];
        let _ = writeln!(out, "Memory:      {used}");
        for line in held.split("; ") {
            let _ = writeln!(out, "             {line}");
        }
    }
    let waiting = if now.short_of.is_empty() {
        String::new()
    } else {
        format!("; calls that wait: {}", now.calls_waiting)
    };
    let spare = match now.spare_calls {
        0 => String::new(),
        calls => format!("; to spare: {calls} calls/s"),
    };
    let _ = writeln!(out, "Room:        {}{waiting}{spare}", room_text(now));
    if !now.short_of.is_empty() {
        let _ = writeln!(out, "             processor: {}", processor_text(now));
    }
    out.push('\n');
    if now.heaviest.is_empty() {
        let _ = writeln!(out, "{NOBODY}");
    } else {
        let rows: Vec<[String; 7]> = now.heaviest.iter().flat_map(|heavy| heavy_rows(heavy, names)).collect();
        let columns = [
            Column::Left("STAGE"),
            Column::Left("KEY"),
            Column::Left("METHOD"),
            Column::Right("USED"),
            Column::Right("REFUSED"),
            Column::Right("MOST/S"),
            Column::Right("LEFT"),
        ];
        out.push_str(&table(columns, &fit(&rows, 1, width, &columns)));
        out.push_str(&marks(now.heaviest.iter().filter_map(|heavy| heavy.bucket.as_ref())));
        if now.more_heaviest {
            out.push_str(&more(top));
        }
    }
    if !now.connections.is_empty() {
        out.push('\n');
        out.push_str(&connection_table(now, usize::MAX, "OPEN CONNECTIONS", names, width));
        if now.share.is_some() || now.share_of_connections.is_some() {
            let _ = writeln!(
                out,
                "A share is of a caller, or of all that are one user's (/etc/subuid) together."
            );
        }
        if now.more_connections {
            out.push_str(&more(top));
        }
    }
    out
}

/// That the agent knows more of them than the `top` that are shown.
fn more(top: u32) -> String {
    match top.saturating_mul(10).min(MOST) {
        most if most > top => format!("There are more: durward limits --top {most}\n"),
        _ => format!("There are more than these {top}.\n"),
    }
}

/// A bucket, and below it those who take from it.
fn heavy_rows(heavy: &pb::Heavy, names: &mut UserNames) -> Vec<[String; 7]> {
    let bucket = heavy.bucket.clone().unwrap_or_default();
    let tokens = tokens(&bucket);
    let (used, refused) = (heavy.used.to_string(), heavy.refused.to_string());
    let most = match heavy.most_in_a_second {
        0 => String::new(),
        most => most.to_string(),
    };
    let mut rows = vec![[bucket.stage, names.of(&bucket.key), bucket.method, used, refused, most, tokens]];
    rows.extend(heavy.takings.iter().map(|taking| {
        let key = format!("  {}", names.of(taker(taking)));
        let (used, refused) = (taking.used.to_string(), taking.refused.to_string());
        [String::new(), key, String::new(), used, refused, String::new(), String::new()]
    }));
    rows
}

/// What is used of the budget.
fn memory_text(memory: &pb::Memory) -> String {
    let [used, budget] = [memory.used, memory.budget].map(mebibytes);
    format!("{used} used, of {budget}; pressure: {}", clean(&memory.pressure))
}

/// By what it is used.
fn held_text(memory: &pb::Memory) -> String {
    let resident = memory.resident.map_or_else(|| "unknown".to_owned(), mebibytes);
    let cgroup = memory.cgroup.zip(memory.kernel).map_or_else(String::new, |(all, kernel)| {
        format!("; cgroup {}, of which kernel {}", mebibytes(all), mebibytes(kernel))
    });
    format!("callers hold {}, resident {resident}{cgroup}", mebibytes(memory.held))
}

fn to_json(now: &pb::LimitsResponse) -> serde_json::Value {
    let heaviest: Vec<_> = now
        .heaviest
        .iter()
        .map(|heavy| {
            let mut json = bucket_json(&heavy.bucket.clone().unwrap_or_default());
            if let Some(json) = json.as_object_mut() {
                json.insert("used".to_owned(), heavy.used.into());
                json.insert("refused".to_owned(), heavy.refused.into());
                json.insert("most_in_a_second".to_owned(), heavy.most_in_a_second.into());
                json.insert("takings".to_owned(), heavy.takings.iter().map(taking_json).collect());
            }
            json
        })
        .collect();
    let connections: Vec<_> = now.connections.iter().map(connections_json).collect();
    let memory = now.memory.clone().unwrap_or_default();
    let keys = now.keys.unwrap_or_default();
    json!({
        "heaviest": heaviest,
        "connections": connections,
        "more_heaviest": now.more_heaviest,
        "more_connections": now.more_connections,
        "node_connections": now.node_connections,
        "attestations_in_flight": now.attestations_in_flight,
        "short_of": now.short_of,
        "calls_waiting": now.calls_waiting,
        "spare_calls": now.spare_calls,
        "most_connections": now.most_connections,
        "share": now.share,
        "share_of_connections": now.share_of_connections,
        "used_millicores": now.used_millicores,
        "waited_millicores": now.waited_millicores,
        "millicores": now.millicores,
        "memory": memory_json(&memory),
        "keys": { "gate": keys.gate, "caller": keys.caller, "identity": keys.identity },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_shown_as_a_table() {
        let bucket = pb::Bucket {
            stage: "caller".to_owned(),
            key: "uid:1000".to_owned(),
            method: "FetchJWTSVID".to_owned(),
            limit: pb::Limit::Tokens.into(),
            left: 0,
            burst: 200,
            by_default: true,
            takings: Vec::new(),
            dry_run: false,
        };
        let blocked = pb::Bucket {
            key: "uid:7\x1b[31m".to_owned(),
            limit: pb::Limit::Blocked.into(),
            by_default: false,
            ..bucket.clone()
        };
        let now = pb::LimitsResponse {
            heaviest: vec![
                pb::Heavy {
                    bucket: Some(bucket),
                    used: 200,
                    refused: 4321,
                    takings: Vec::new(),
                    most_in_a_second: 1200,
                },
                pb::Heavy {
                    bucket: Some(blocked),
                    used: 0,
                    refused: 1,
                    most_in_a_second: 0,
                    takings: vec![pb::Taking { caller: "uid:8".to_owned(), used: 5, refused: 6 }],
                },
            ],
            connections: vec![pb::Connections {
                caller: "uid:1000".to_owned(),
                open: 3,
                held: 99 << 10,
                others: 0,
            }],
            node_connections: 3,
            attestations_in_flight: 1,
            memory: Some(pb::Memory {
                pressure: "none".to_owned(),
                budget: 24 << 20,
                resident: Some((7 << 20) + (1 << 19)),
                used: 9 << 20,
                held: 1 << 20,
                cgroup: Some(8 << 20),
                kernel: Some(2 << 20),
            }),
            short_of: vec!["memory".to_owned(), "processor".to_owned()],
            calls_waiting: 7,
            spare_calls: 0,
            most_connections: 400,
            share: None,
            share_of_connections: None,
            used_millicores: 612,
            waited_millicores: 40,
            millicores: 500,
            more_heaviest: true,
            more_connections: false,
            keys: Some(pb::Keys { gate: 1, caller: 2, identity: 3 }),
        };
        // No user has a name here.
        let mut names = UserNames([(1000, None), (8, None), (7, None)].into());
        assert_eq!(
            pretty(&now, 10, &mut names, 80),
            "\
Connections: 3 of at most 400 (attestations in flight: 1)
Buckets:     1 of the gate, 2 of callers, 3 of identities
Memory:      9.0 MiB used, of 24.0 MiB; pressure: none
             callers hold 1.0 MiB, resident 7.5 MiB
             cgroup 8.0 MiB, of which kernel 2.0 MiB
Room:        short of memory, processor; calls that wait: 7
             processor: uses 0.612 and waits for 0.04 of up to 0.5 cores

STAGE   KEY              METHOD        USED  REFUSED  MOST/S     LEFT
caller  uid:1000         FetchJWTSVID   200     4321    1200   0/200*
caller  uid:7\\u{1b}[31m  FetchJWTSVID     0        1          blocked
          uid:8                           5        6
* a default, which refuses only while the node has no room
There are more: durward limits --top 100

CALLER    OPEN CONNECTIONS    HELD
uid:1000                 3  99 KiB
"
        );
        let short =
            pb::LimitsResponse { share: Some(80 << 10), share_of_connections: Some(8), ..now.clone() };
        let table = "
CALLER    OPEN CONNECTIONS    HELD                  SHARE
uid:1000                 3  99 KiB  80 KiB, 8 connections
";
        assert!(pretty(&short, 10, &mut names, 80).contains(table));
        let mut rehearsed = now.clone();
        for bucket in rehearsed.heaviest.iter_mut().filter_map(|heavy| heavy.bucket.as_mut()) {
            bucket.dry_run = true;
        }
        let shown = pretty(&rehearsed, 10, &mut names, 80);
        assert!(shown.contains("  0/200*~\n") && shown.contains("  blocked~\n"), "{shown}");
        assert!(
            shown.contains("\n~ a dry run, which refuses nobody: REFUSED counts what it would have\n"),
            "{shown}"
        );
        assert!(!pretty(&now, 10, &mut names, 80).contains('~'));
        assert_eq!(to_json(&rehearsed)["heaviest"][0]["dry_run"], true);
        let mut family = now.clone();
        family.connections[0].others = 2;
        let row = "uid:1000 and 2 others of its range                 3  99 KiB\n";
        let shown = pretty(&family, 10, &mut names, 80);
        assert!(shown.contains(row), "{shown}");
        assert_eq!((&to_json(&short)["share"], &to_json(&now)["share"]), (&json!(80 << 10), &json!(null)));
        let spare = pb::LimitsResponse {
            short_of: vec!["processor".to_owned()],
            calls_waiting: 1024,
            spare_calls: 12_345,
            ..now.clone()
        };
        let room = "\nRoom:        short of processor; calls that wait: 1024; to spare: 12345 calls/s\n";
        assert!(pretty(&spare, 10, &mut names, 80).contains(room) && room.len() <= 82);
        let json = to_json(&now);
        assert_eq!(json["heaviest"][0]["left"], 0);
        assert_eq!(json["heaviest"][1]["left"], serde_json::Value::Null);
        assert_eq!(json["heaviest"][1]["limit"], "blocked");
        assert!(
            pretty(&pb::LimitsResponse::default(), 10, &mut names, 80).ends_with("Nobody has called yet.\n")
        );
        let shown = screen(&pb::LimitsResponse::default(), None, (24, 80), &mut names);
        assert!(shown.contains("\nNobody has called yet.\n") && !shown.contains("STAGE"), "{shown}");

        // On a terminal it is no larger than that, and tells what was done in a second.
        names.0.insert(1000, Some("web".to_owned()));
        let mut later = now.clone();
        if let Some(heavy) = later.heaviest.first_mut() {
            (heavy.used, heavy.refused) = (300, 4371);
        }
        let first = screen(&later, None, (24, 80), &mut names);
        assert!(first.contains("; measuring\n") && first.contains("..."), "{first}");
        let before = (now, Duration::from_secs(2));
        for size in [(24, 80), (40, 120), (10, 40)] {
            let text = screen(&later, Some(&before), size, &mut names);
            assert!(text.lines().count() < size.0, "{text}");
            assert!(text.lines().all(|line| line.chars().count() <= size.1), "{text}");
        }
        let text = screen(&later, Some(&before), (24, 80), &mut names);
        let row = text.lines().find(|line| line.starts_with("caller  uid:1000 (web)")).unwrap();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(cells[3..6], ["FetchJWTSVID", "50", "25"], "{text}");
    }
}
