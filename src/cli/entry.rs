//! `entry show`: the registration entries in force.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;

use super::{
    Failure, OutputArgs, OutputFormat,
    admin::AdminArgs,
    terminal::{Terminal, clean},
    text::folded,
};
use crate::{api::proto::admin as pb, hcl::show_duration, identity::SpiffeId};

/// `entry show`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct EntryArgs {
    /// Show only the entries of this SPIFFE ID
    #[arg(long, value_name = "ID", value_parser = SpiffeId::parse)]
    spiffe_id: Option<SpiffeId>,

    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `entry show`: a page after the other, each printed as it comes.
pub(super) async fn show(args: &EntryArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let spiffe_id = args.spiffe_id.as_ref().map(ToString::to_string).unwrap_or_default();
    let (mut skip, mut more) = (0_u64, true);
    while more {
        let question = pb::EntriesRequest { skip, most: 0, spiffe_id: spiffe_id.clone() };
        let page =
            args.admin.call(terminal, question, async |mut api, request| api.entries(request).await).await?;
        more = page.more && !page.entries.is_empty();
        let text = match args.output.output {
            OutputFormat::Pretty => pretty(&page, skip == 0),
            OutputFormat::Json => json_lines(&page),
        };
        skip = skip.saturating_add(u64::try_from(page.entries.len()).unwrap_or(u64::MAX));
        terminal.print(&text)?;
    }
    Ok(())
}

/// The width that is left beside the names in 80 columns.
const FOLDED: usize = 62;

fn pretty(page: &pb::EntriesResponse, first: bool) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    if first {
        let _ = match page.total {
            1 => writeln!(out, "1 entry"),
            n => writeln!(out, "{n} entries"),
        };
    }
    for detail in &page.entries {
        let entry = detail.entry.clone().unwrap_or_default();
        let _ = writeln!(out, "\n{}", clean(&entry.spiffe_id));
        let mut row = |name: &str, value: &str| {
            let value = clean(value);
            // It is to be copied, so it is not folded.
            let _ = match name.is_empty() || value.chars().count() <= FOLDED {
                true => writeln!(out, "  {name:<15} {value}"),
                false => writeln!(out, "  {name}\n    {value}"),
            };
        };
        let mut rows = |name: &str, values: &[String]| {
            for (at, value) in values.iter().enumerate() {
                row(if at == 0 { name } else { "" }, value);
            }
        };
        rows("Selectors", &detail.selectors);
        for absent in &detail.absent {
            rows("Never matches", &folded(absent, FOLDED));
        }
        rows("Federates with", &detail.federates_with);
        rows("DNS names", &detail.dns_names);
        row("Entry ID", &entry.entry_id);
        if !entry.hint.is_empty() {
            row("Hint", &entry.hint);
        }
        row("X.509-SVID TTL", &lifetime(detail.x509_svid_ttl));
        row("JWT-SVID TTL", &lifetime(detail.jwt_svid_ttl));
    }
    out
}

fn lifetime(seconds: u64) -> String {
    if seconds == 0 { "default".to_owned() } else { show_duration(Duration::from_secs(seconds)) }
}

/// One object a line: there may be many.
fn json_lines(page: &pb::EntriesResponse) -> String {
    let mut out = String::new();
    for detail in &page.entries {
        let entry = detail.entry.clone().unwrap_or_default();
        let ttl = |seconds: u64| (seconds != 0).then_some(seconds);
        let line = json!({
            "spiffe_id": entry.spiffe_id,
            "entry_id": entry.entry_id,
            "selectors": detail.selectors,
            "never_matches": detail.absent,
            "hint": entry.hint,
            "x509_svid_ttl": ttl(detail.x509_svid_ttl),
            "jwt_svid_ttl": ttl(detail.jwt_svid_ttl),
            "dns_names": detail.dns_names,
            "federates_with": detail.federates_with,
        });
        let _ = writeln!(out, "{line}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_shown_with_what_it_asks_for() {
        let detail = pb::EntryDetail {
            entry: Some(pb::Entry {
                spiffe_id: "spiffe://td/web".to_owned(),
                entry_id: "web".to_owned(),
                ..pb::Entry::default()
            }),
            selectors: vec!["unix:uid:7".to_owned(), "unix:gid:8\x1b".to_owned()],
            jwt_svid_ttl: 90,
            absent: vec![
                "unix:user:x: there is no such user on this node: add it, or correct the name".to_owned(),
            ],
            federates_with: vec!["a.example".to_owned(), "b.example".to_owned()],
            ..pb::EntryDetail::default()
        };
        let page = pb::EntriesResponse { entries: vec![detail], more: false, total: 1 };
        assert_eq!(
            pretty(&page, true),
            "\
1 entry

spiffe://td/web
  Selectors       unix:uid:7
                  unix:gid:8\\u{1b}
  Never matches   unix:user:x: there is no such user on this node: add it, or
                  correct the name
  Federates with  a.example
                  b.example
  Entry ID        web
  X.509-SVID TTL  default
  JWT-SVID TTL    1m30s
"
        );
        let json: serde_json::Value = serde_json::from_str(&json_lines(&page)).unwrap();
        assert_eq!((&json["x509_svid_ttl"], &json["jwt_svid_ttl"]), (&json!(null), &json!(90)));
    }
}
