//! `status`: who signs, how it goes with a SPIRE Server, and what is waited for.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime},
};

use serde_json::json;

use super::{
    Failure, OutputArgs, OutputFormat,
    admin::AdminArgs,
    terminal::{Terminal, clean},
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
    let shown = match args.output.output {
        OutputFormat::Pretty => pretty(&told, Clock::SYSTEM.now()),
        OutputFormat::Json => format!("{}\n", to_json(&told)),
    };
    Ok(terminal.print(&shown)?)
}

fn pretty(told: &pb::StatusResponse, now: SystemTime) -> String {
    let mut out = String::new();
    let mut row = |name: &str, text: &str| {
        // Writing to a String does not fail.
        let _ = writeln!(out, "{name:<14}{}", clean(text));
    };
    row("Trust domain:", &told.trust_domain);
    match &told.server {
        None => row("Signed by:", "a CA on this node"),
        Some(server) => {
            row("Signed by:", &format!("the SPIRE Server at {}", server.address));
            if server.agent_id.is_empty() {
                row("This agent:", "has no SVID of its own yet");
            } else {
                row("This agent:", &server.agent_id);
                row("Its SVID:", &ends(server.agent_svid_ends, now));
            }
            row("Last sync:", &since(server.last_sync, now));
        }
    }
    row("Entries:", &told.entries.to_string());
    row("Bundles:", &told.bundles.to_string());
    let mut svids = format!("{} made, {} due", told.x509_svids, told.x509_svids_due);
    if told.x509_svids_refused > 0 {
        let _ = write!(svids, ", {} entries not signed for: see the log", told.x509_svids_refused);
    }
    row("X.509-SVIDs:", &svids);
    row("Ready:", if told.not_ready.is_empty() { "yes" } else { "no" });
    if !told.not_ready.is_empty() {
        row("Because:", &told.not_ready);
    }
    if let Some(server) = &told.server {
        if !server.waits_for.is_empty() {
            row("Waits for:", &format!("{}, for {}", server.waits_for, elapsed(server.waits_since, now)));
        }
        if !server.last_error.is_empty() {
            row("Last error:", &server.last_error);
        }
    }
    row("Version:", &told.version);
    out
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
        Ok(left) => format!("ends in {}", show_duration(Duration::from_secs(left.as_secs()))),
        Err(_) => format!("ended {} ago", elapsed(seconds, now)),
    }
}

fn to_json(told: &pb::StatusResponse) -> serde_json::Value {
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
            waits_for: "the SPIRE Server".to_owned(),
            waits_since: 10_000 - 60,
            last_error: "connection refused\x1b[2J".to_owned(),
        };
        let shown = pretty(&told(Some(server)), at(10_000));
        for want in [
            "Signed by:    the SPIRE Server at spire:8081\n",
            "Its SVID:     ends in 1m30s\n",
            "Last sync:    1m5s ago\n",
            "Waits for:    the SPIRE Server, for 1m\n",
            "Ready:        yes\n",
            "X.509-SVIDs:  7 made, 2 due, 1 entries not signed for: see the log\n",
        ] {
            assert!(shown.contains(want), "{want}{shown}");
        }
        assert!(!shown.contains('\x1b'), "{shown}");
    }

    #[test]
    fn what_is_not_there_is_null_in_json() {
        let json = to_json(&told(Some(pb::ServerStatus::default())));
        assert_eq!((&json["server"]["agent_id"], &json["server"]["last_sync"]), (&json!(null), &json!(null)));
        let json = to_json(&told(None));
        assert_eq!(
            (&json["server"], &json["signer"], &json["ready"]),
            (&json!(null), &json!("embedded"), &json!(true))
        );
        assert!(pretty(&told(None), at(1)).contains("Signed by:    a CA on this node\n"));
    }
}
