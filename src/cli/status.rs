//! `status`: how the agent is, on one screen.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use serde_json::json;

use super::{
    Failure, OutputArgs, OutputFormat,
    admin::{AdminArgs, mebibytes, memory_json, processor_text},
    terminal::{NARROW, Terminal, clean},
    text::folded,
};
use crate::{api::proto::admin as pb, hcl::show_duration, os::clock::Clock};

/// `status`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `status`.
pub(super) async fn status(args: &StatusArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let question = pb::StatusRequest {};
    let told =
        args.admin.call(terminal, question, async |mut api, request| api.status(request).await).await?;
    let question = pb::LimitsRequest { top: 1 };
    let held =
        args.admin.call(terminal, question, async |mut api, request| api.limits(request).await).await?;
    let shown = match args.output.output {
        OutputFormat::Pretty => pretty(&told, &held, Clock::SYSTEM.now()),
        OutputFormat::Json => format!("{}\n", to_json(&told, &held)),
    };
    Ok(terminal.print(&shown)?)
}

/// One screen: what it is, who signs, what it holds, what is wrong.
fn pretty(told: &pb::StatusResponse, held: &pb::LimitsResponse, now: SystemTime) -> String {
    let mut out = String::new();
    let ready = if told.not_ready.is_empty() { "ready" } else { "NOT READY" };
    let up = elapsed(told.started, now);
    row(&mut out, "Agent", &format!("{ready}, version {}, process {}, up {up}", told.version, told.pid));
    row(&mut out, "Socket", &told.socket_path);
    row(&mut out, "Trust domain", &told.trust_domain);
    signer(&mut out, told, now);
    row(
        &mut out,
        "Entries",
        &format!("{}, bundles of {}", told.entries, counted(told.bundles, "trust domain")),
    );
    let due = if told.x509_svids_due > 0 { format!(" ({} due)", told.x509_svids_due) } else { String::new() };
    row(&mut out, "SVIDs held", &format!("{} X.509{due}, {} JWT", told.x509_svids, told.jwt_svids));
    let pods = if told.kubernetes {
        "found: a caller in a pod counts as its pod"
    } else {
        "not found: a caller counts as its user"
    };
    row(&mut out, "Kubernetes", pods);
    if !told.audit.is_empty() {
        row(&mut out, "Audit", &told.audit);
    }
    let open = counted(held.node_connections.into(), "connection");
    row(
        &mut out,
        "Open",
        &format!(
            "{open}, {}; {} being attested, {} waiting",
            counted(told.streams, "stream"),
            counted(held.attestations_in_flight.into(), "call"),
            held.calls_waiting
        ),
    );
    memory(&mut out, told, &held.memory.clone().unwrap_or_default());
    let room = if held.short_of.is_empty() {
        "yes".to_owned()
    } else {
        format!("NO: short of {}", held.short_of.join(", "))
    };
    row(&mut out, "Room", &format!("{room} (processor: {})", processor_text(held)));
    let dry = if told.dry_run { " (dry run: none refuses)" } else { "" };
    if told.limits_set.is_empty() {
        row(&mut out, "Limits set", &format!("none; the defaults refuse only without room{dry}"));
    }
    let mut limits: Vec<String> = told.limits_set.iter().take(MOST_LIMITS).cloned().collect();
    if let Some(first) = limits.first_mut() {
        first.push_str(dry);
    }
    match told.limits_set.len().saturating_sub(MOST_LIMITS) {
        0 => {}
        more => limits.push(format!("and {more} more: see agent.conf")),
    }
    list(&mut out, "Limits set", &limits);
    list(&mut out, "Found", &told.surroundings);
    let wrong = wrong(told, held, now);
    if wrong.is_empty() {
        row(&mut out, "Wrong", "nothing");
    }
    list(&mut out, "Wrong", &wrong);
    out
}

fn row(out: &mut String, name: &str, text: &str) {
    let name = if name.is_empty() { String::new() } else { format!("{name}:") };
    // Writing to a String does not fail.
    let _ = writeln!(out, "{name:<NAMES$}{}", clean(text));
}

/// Rows of one name, folded so that they fit a narrow terminal.
fn list(out: &mut String, name: &str, texts: &[String]) {
    let lines = texts.iter().flat_map(|text| folded(text, FOLDED));
    for (at, line) in lines.enumerate() {
        row(out, if at == 0 { name } else { "" }, &line);
    }
}

/// How many limits are shown: the others would not fit on the screen.
const MOST_LIMITS: usize = 6;

/// The width of the names, and what is left beside them in 80 columns.
const NAMES: usize = 14;
const FOLDED: usize = NARROW - NAMES;

fn counted(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn signer(out: &mut String, told: &pb::StatusResponse, now: SystemTime) {
    match &told.server {
        None => row(out, "Signed by", "a CA on this node"),
        Some(server) => {
            row(out, "Signed by", &format!("the SPIRE Server at {}", server.address));
            if server.agent_id.is_empty() {
                row(out, "This agent", "has no SVID of its own yet");
            } else {
                agent_id(out, &server.agent_id);
                row(out, "Its SVID", &ends(server.agent_svid_ends, now));
            }
            row(out, "Last sync", &since(server.last_sync, now));
        }
    }
    if let Some(ca) = &told.ca {
        let age = |from: i64, until: i64| format!("{} old, {}", elapsed(from, now), ends(until, now));
        row(out, "X.509 CA", &age(ca.x509_from, ca.x509_until));
        row(out, "JWT key", &age(ca.jwt_from, ca.jwt_until));
    }
}

/// On a line of its own where there is no room beside the name: it is to be copied, so it is not folded.
fn agent_id(out: &mut String, id: &str) {
    let id = clean(id);
    if id.chars().count() > FOLDED {
        let indent = NARROW.saturating_sub(id.chars().count());
        // Writing to a String does not fail.
        let _ = writeln!(out, "This agent:\n{:indent$}{id}", "");
    } else {
        row(out, "This agent", &id);
    }
}

fn memory(out: &mut String, told: &pb::StatusResponse, memory: &pb::Memory) {
    let [used, budget] = [memory.used, memory.budget].map(mebibytes);
    row(out, "Memory", &format!("{used} used of {budget} ({})", told.budget_from));
    let resident = memory.resident.map_or_else(|| "unknown".to_owned(), mebibytes);
    let pressure = match memory.pressure.as_str() {
        "" | "none" => String::new(),
        pressure => format!("; pressure: {pressure}"),
    };
    row(out, "", &format!("callers hold {}, resident {resident}{pressure}", mebibytes(memory.held)));
}

/// Everything that an admin should look at.
fn wrong(told: &pb::StatusResponse, held: &pb::LimitsResponse, now: SystemTime) -> Vec<String> {
    let mut wrong = Vec::new();
    if !told.not_ready.is_empty() {
        let of_server = told
            .server
            .as_ref()
            .filter(|server| !server.waits_for.is_empty() && told.not_ready.contains(&server.waits_for));
        let since = of_server.map(|server| format!(" for {}", elapsed(server.waits_since, now)));
        wrong.push(format!("not ready{}: {}", since.unwrap_or_default(), told.not_ready));
    }
    if let Some(ca) = told.ca.as_ref().filter(|ca| !ca.last_error.is_empty()) {
        let lasts = elapsed(ca.failing_since, now);
        wrong.push(format!("for {lasts}: the issuer cannot rotate its keys: {}", ca.last_error));
    }
    // Else nobody knows yet which entries there are.
    let knows_entries = told.server.as_ref().is_none_or(|server| server.last_sync != 0);
    if told.entries == 0 && knows_entries {
        wrong.push("there is no entry, so no process gets an identity".to_owned());
    }
    if told.x509_svids_refused > 0 {
        let entries = if told.x509_svids_refused == 1 {
            "1 entry"
        } else {
            &format!("{} entries", told.x509_svids_refused)
        };
        wrong.push(format!("{entries} could not be signed for: see the log"));
    }
    if !held.short_of.is_empty() {
        wrong.push(format!("short of {}: see durward limits", held.short_of.join(", ")));
    }
    if told.reload_failed != 0 {
        let ago = since(told.reload_failed, now);
        wrong.push(format!("the last reload failed {ago}; the old settings are in force:"));
        wrong.extend(told.reload_errors.iter().map(|error| format!("- {}", error.trim())));
    }
    if told.audit_untaken {
        wrong.push(format!("the audit cannot be written to {}, and its lines are lost", told.audit));
    }
    if told.log_lines_lost > 0 {
        let lines = counted(told.log_lines_lost, "line");
        wrong.push(format!(
            "{lines} of the log and the audit lost since the start: nobody took them in time, or there was no room"
        ));
    }
    wrong.extend(told.limits_wrong.iter().cloned());
    wrong.extend(told.attestors_wrong.iter().cloned());
    wrong.extend(told.entries_unmatched.iter().cloned());
    if let Some(server) = &told.server {
        for (why, since) in
            [(&server.waits_for, server.waits_since), (&server.last_error, server.failing_since)]
        {
            // The same may be told already, as the reason of something else.
            if !why.is_empty() && !wrong.iter().any(|told| told.contains(why.as_str())) {
                wrong.push(format!("for {}: {why}", elapsed(since, now)));
            }
        }
    }
    wrong
}

fn at(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// In whole seconds; nothing for what is yet to come.
fn elapsed(seconds: i64, now: SystemTime) -> String {
    let since = now.duration_since(at(seconds)).unwrap_or_default();
    show_duration(Duration::from_secs(since.as_secs()))
}

fn since(seconds: i64, now: SystemTime) -> String {
    if seconds == 0 { "never".to_owned() } else { format!("{} ago", elapsed(seconds, now)) }
}

fn ends(seconds: i64, now: SystemTime) -> String {
    match at(seconds).duration_since(now) {
        Ok(left) => format!("expires in {}", show_duration(Duration::from_secs(left.as_secs()))),
        Err(_) => format!("expired {} ago", elapsed(seconds, now)),
    }
}

fn to_json(told: &pb::StatusResponse, held: &pb::LimitsResponse) -> serde_json::Value {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let time = |seconds: i64| (seconds != 0).then_some(seconds);
    let server = told.server.as_ref().map(|server| {
        json!({
            "address": server.address,
            "agent_id": text(&server.agent_id),
            "agent_svid_ends": time(server.agent_svid_ends),
            "last_sync": time(server.last_sync),
            "waits_for": text(&server.waits_for),
            "waits_since": time(server.waits_since),
            "last_error": text(&server.last_error),
            "failing_since": time(server.failing_since),
        })
    });
    json!({
        "trust_domain": told.trust_domain,
        "signer": if told.server.is_some() { "server" } else { "embedded" },
        "server": server,
        "entries": told.entries,
        "bundles": told.bundles,
        "x509_svids": told.x509_svids,
        "x509_svids_due": told.x509_svids_due,
        "x509_svids_refused": told.x509_svids_refused,
        "ready": told.not_ready.is_empty(),
        "not_ready": text(&told.not_ready),
        "version": told.version,
        "jwt_svids": told.jwt_svids,
        "ca": told.ca.as_ref().map(|ca| json!({
            "x509_from": ca.x509_from,
            "x509_until": ca.x509_until,
            "jwt_from": ca.jwt_from,
            "jwt_until": ca.jwt_until,
            "last_error": text(&ca.last_error),
            "failing_since": time(ca.failing_since),
        })),
        "started": time(told.started),
        "pid": told.pid,
        "socket_path": told.socket_path,
        "kubernetes": told.kubernetes,
        "limits_set": told.limits_set,
        "dry_run": told.dry_run,
        "millicores": told.millicores,
        "budget_from": text(&told.budget_from),
        "surroundings": told.surroundings,
        "reload_failed": time(told.reload_failed),
        "reload_errors": told.reload_errors,
        "audit": text(&told.audit),
        "log_lines_lost": told.log_lines_lost,
        "connections": held.node_connections,
        "streams": told.streams,
        "attestations_in_flight": held.attestations_in_flight,
        "calls_waiting": held.calls_waiting,
        "short_of": held.short_of,
        "memory": memory_json(&held.memory.clone().unwrap_or_default()),
        "wrong": wrong(told, held, Clock::SYSTEM.now()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(server: Option<pb::ServerStatus>) -> pb::StatusResponse {
        pb::StatusResponse {
            trust_domain: "example.org".to_owned(),
            entries: 3,
            bundles: 1,
            x509_svids: 7,
            x509_svids_due: 2,
            x509_svids_refused: 1,
            version: "1".to_owned(),
            surroundings: vec!["the agent runs in a user namespace that does not map all users".to_owned()],
            server,
            ..pb::StatusResponse::default()
        }
    }

    #[test]
    fn an_outage_is_told_in_words() {
        let server = pb::ServerStatus {
            address: "spire:8081".to_owned(),
            agent_id: "spiffe://example.org/spire/agent/x".to_owned(),
            agent_svid_ends: 10_000 + 90,
            last_sync: 10_000 - 65,
            waits_for: "cannot reach the server spire:8081: connection refused\x1b[2J".to_owned(),
            waits_since: 10_000 - 60,
            last_error: "connection refused\x1b[2J".to_owned(),
            failing_since: 10_000 - 60,
        };
        let attestors_wrong = vec!["the kubelet does not list its pods: no token".to_owned()];
        let told = pb::StatusResponse {
            attestors_wrong,
            reload_failed: 10_000 - 180,
            reload_errors: vec!["agent.conf:3: agent.log_level \"loud\": must be one of\x1b".to_owned()],
            audit: "socket /run/audit.sock".to_owned(),
            audit_untaken: true,
            log_lines_lost: 7,
            ..told(Some(server))
        };
        let shown = pretty(&told, &pb::LimitsResponse::default(), at(10_000));
        for want in [
            "Signed by:    the SPIRE Server at spire:8081\n",
            "Its SVID:     expires in 1m30s\n",
            "Last sync:    1m5s ago\n",
            "Agent:        ready, version 1, process 0, up ",
            "SVIDs held:   7 X.509 (2 due), 0 JWT\n",
            "Found:        the agent runs in a user namespace that does not map all users\n",
            "Wrong:        1 entry could not be signed for: see the log\n",
            "              the last reload failed 3m ago; the old settings are in force:\n",
            "              - agent.conf:3: agent.log_level \"loud\": must be one of\\u{1b}\n",
            "Audit:        socket /run/audit.sock\n",
            "              the audit cannot be written to socket /run/audit.sock, and its\n",
            "              7 lines of the log and the audit lost since the start: nobody took\n",
            "              the kubelet does not list its pods: no token\n",
            "              for 1m: cannot reach the server spire:8081: connection refused",
        ] {
            assert!(shown.contains(want), "{want}{shown}");
        }
        assert!(!shown.contains('\x1b'), "{shown}");
        assert_eq!(shown.matches("connection refused").count(), 1, "told once: {shown}");
    }

    #[test]
    fn a_long_id_of_the_agent_is_whole_and_fits() {
        for (length, indent) in [(23, "             "), (30, "      "), (36, "")] {
            let agent_id = format!("spiffe://example.org/spire/agent/join_token/{}", "x".repeat(length));
            let server = pb::ServerStatus { agent_id: agent_id.clone(), ..pb::ServerStatus::default() };
            let shown = pretty(&told(Some(server)), &pb::LimitsResponse::default(), at(1));
            assert!(shown.contains(&format!("\nThis agent:\n{indent}{agent_id}\n")), "{shown}");
            assert!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
        }
    }

    #[test]
    fn what_is_not_there_is_null_in_json() {
        let held = pb::LimitsResponse::default();
        let json = to_json(&told(Some(pb::ServerStatus::default())), &held);
        assert_eq!((&json["server"]["agent_id"], &json["server"]["last_sync"]), (&json!(null), &json!(null)));
        let json = to_json(&told(None), &held);
        assert_eq!(
            (&json["server"], &json["signer"], &json["ready"]),
            (&json!(null), &json!("embedded"), &json!(true))
        );
        assert!(pretty(&told(None), &held, at(1)).contains("Signed by:    a CA on this node\n"));
    }
}
