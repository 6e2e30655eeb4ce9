//! `limits`: who calls most and is refused most, once or again and again.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    Failure, OutputArgs, OutputFormat,
    admin::{AdminArgs, BY_DEFAULT, Column, bucket_json, table, taker, taking_json, tokens},
    terminal::{Terminal, clean},
};
use crate::api::proto::admin as pb;

/// `limits`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct LimitsArgs {
    /// How many of the heaviest to show, at most 1000
    #[arg(long, value_name = "N", default_value = "10", value_parser = clap::value_parser!(u32).range(1..=1000))]
    top: u32,

    /// Show it again every second, or every so many seconds, until Ctrl-C
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        default_missing_value = "1",
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    watch: Option<u32>,

    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `limits`.
pub(super) async fn limits(args: &LimitsArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let first = shown(&ask(args, terminal).await?, args.output.output);
    let Some(seconds) = args.watch else { return Ok(terminal.print(&first)?) };
    terminal.redraw(&first)?;
    // Taken once: a Ctrl-C during a call is met at the next wait.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Failure::Runtime)?;
    let every = Duration::from_secs(u64::from(seconds));
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(()),
            _ = tick.tick() => {}
        }
        match ask(args, terminal).await {
            Ok(now) => terminal.redraw(&shown(&now, args.output.output))?,
            // It may be restarting: asked again at the next tick.
            Err(Failure::Call(err)) => terminal.note(&err),
            Err(other) => return Err(other),
        }
    }
}

async fn ask(args: &LimitsArgs, terminal: &mut Terminal) -> Result<pb::LimitsResponse, Failure> {
    let question = pb::LimitsRequest { top: args.top };
    args.admin.call(terminal, question, async |mut api, request| api.limits(request).await).await
}

fn shown(now: &pb::LimitsResponse, output: OutputFormat) -> String {
    match output {
        OutputFormat::Pretty => pretty(now),
        OutputFormat::Json => format!("{}\n", to_json(now)),
    }
}

fn pretty(now: &pb::LimitsResponse) -> String {
    let keys = now.keys.unwrap_or_default();
    let mut out = String::new();
    // Writing to a String does not fail.
    let _ = writeln!(
        out,
        "Connections: {} (attestations in flight: {})",
        now.node_connections, now.attestations_in_flight
    );
    let _ = writeln!(
        out,
        "Buckets:     {} of the gate, {} of callers, {} of identities",
        keys.gate, keys.caller, keys.identity
    );
    if let Some(memory) = &now.memory {
        let _ = writeln!(out, "Memory:      {}", memory_text(memory));
    }
    let room = if now.short_of.is_empty() {
        "yes".to_owned()
    } else {
        format!("short of {}; calls that wait: {}", clean(&now.short_of.join(", ")), now.calls_waiting)
    };
    let _ = writeln!(out, "Room:        {room}");
    out.push('\n');
    if now.heaviest.is_empty() {
        out.push_str("Nobody has called yet.\n");
    } else {
        let rows: Vec<[String; 7]> = now.heaviest.iter().flat_map(heavy_rows).collect();
        let columns = [
            Column::Left("STAGE"),
            Column::Left("KEY"),
            Column::Left("METHOD"),
            Column::Right("USED"),
            Column::Right("REFUSED"),
            Column::Right("MOST/S"),
            Column::Right("TOKENS LEFT"),
        ];
        out.push_str(&table(columns, &rows));
        if now.heaviest.iter().any(|heavy| heavy.bucket.as_ref().is_some_and(|bucket| bucket.by_default)) {
            let _ = writeln!(out, "{BY_DEFAULT}");
        }
    }
    if !now.connections.is_empty() {
        let kibibytes = |bytes: u64| format!("{} KiB", bytes >> 10);
        let rows: Vec<[String; 3]> = now
            .connections
            .iter()
            .map(|it| [it.caller.clone(), it.open.to_string(), kibibytes(it.held)])
            .collect();
        out.push('\n');
        let columns = [Column::Left("CALLER"), Column::Right("OPEN CONNECTIONS"), Column::Right("HELD")];
        out.push_str(&table(columns, &rows));
    }
    out
}

/// A bucket, and below it those who take from it.
fn heavy_rows(heavy: &pb::Heavy) -> Vec<[String; 7]> {
    let bucket = heavy.bucket.clone().unwrap_or_default();
    let tokens = tokens(&bucket);
    let (used, refused) = (heavy.used.to_string(), heavy.refused.to_string());
    let most = match heavy.most_in_a_second {
        0 => String::new(),
        most => most.to_string(),
    };
    let mut rows = vec![[bucket.stage, bucket.key, bucket.method, used, refused, most, tokens]];
    rows.extend(heavy.takings.iter().map(|taking| {
        let key = format!("  {}", taker(taking));
        let (used, refused) = (taking.used.to_string(), taking.refused.to_string());
        [String::new(), key, String::new(), used, refused, String::new(), String::new()]
    }));
    rows
}

/// What is used of the budget, and by what.
fn memory_text(memory: &pb::Memory) -> String {
    let budget =
        memory.budget.map_or_else(|| "no budget".to_owned(), |bytes| format!("of {}", mebibytes(bytes)));
    let resident = memory.resident.map_or_else(|| "unknown".to_owned(), mebibytes);
    let cgroup = memory.cgroup.zip(memory.kernel).map_or_else(String::new, |(all, kernel)| {
        format!(", cgroup {} with {} of the kernel", mebibytes(all), mebibytes(kernel))
    });
    format!(
        "{} used, {budget}; pressure: {} (connections hold {}, resident {resident}{cgroup})",
        mebibytes(memory.used),
        clean(&memory.pressure),
        mebibytes(memory.held)
    )
}

/// With one decimal.
fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
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
    let connections: Vec<_> = now
        .connections
        .iter()
        .map(|it| json!({ "caller": it.caller, "open": it.open, "held": it.held }))
        .collect();
    let memory = now.memory.clone().unwrap_or_default();
    let keys = now.keys.unwrap_or_default();
    json!({
        "heaviest": heaviest,
        "connections": connections,
        "node_connections": now.node_connections,
        "attestations_in_flight": now.attestations_in_flight,
        "short_of": now.short_of,
        "calls_waiting": now.calls_waiting,
        "memory": {
            "pressure": memory.pressure,
            "budget": memory.budget,
            "resident": memory.resident,
            "used": memory.used,
            "held": memory.held,
            "cgroup": memory.cgroup,
            "kernel": memory.kernel,
        },
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
            connections: vec![pb::Connections { caller: "uid:1000".to_owned(), open: 3, held: 99 << 10 }],
            node_connections: 3,
            attestations_in_flight: 1,
            memory: Some(pb::Memory {
                pressure: "none".to_owned(),
                budget: Some(24 << 20),
                resident: Some((7 << 20) + (1 << 19)),
                used: 9 << 20,
                held: 1 << 20,
                cgroup: Some(8 << 20),
                kernel: Some(2 << 20),
            }),
            short_of: vec!["memory".to_owned(), "processor".to_owned()],
            calls_waiting: 7,
            keys: Some(pb::Keys { gate: 1, caller: 2, identity: 3 }),
        };
        assert_eq!(
            pretty(&now),
            "\
Connections: 3 (attestations in flight: 1)
Buckets:     1 of the gate, 2 of callers, 3 of identities
Memory:      9.0 MiB used, of 24.0 MiB; pressure: none (connections hold 1.0 MiB, resident 7.5 MiB, cgroup 8.0 MiB with 2.0 MiB of the kernel)
Room:        short of memory, processor; calls that wait: 7

STAGE   KEY              METHOD        USED  REFUSED  MOST/S      TOKENS LEFT
caller  uid:1000         FetchJWTSVID   200     4321    1200  0/200 (default)
caller  uid:7\\u{1b}[31m  FetchJWTSVID     0        1                  blocked
          uid:8                           5        6
(default): nobody set it, and it refuses only while the node has no room

CALLER    OPEN CONNECTIONS    HELD
uid:1000                 3  99 KiB
"
        );
        let json = to_json(&now);
        assert_eq!(json["heaviest"][0]["left"], 0);
        assert_eq!(json["heaviest"][1]["left"], serde_json::Value::Null);
        assert_eq!(json["heaviest"][1]["limit"], "blocked");
        assert!(pretty(&pb::LimitsResponse::default()).ends_with("Nobody has called yet.\n"));
    }
}
