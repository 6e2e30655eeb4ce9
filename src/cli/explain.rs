//! `explain`: who a process is taken for, what it is given, and what it misses for more.

use std::fmt::Write as _;

use nix::unistd::{getpid, getppid};
use serde_json::json;

use super::{
    Failure, OutputArgs, OutputFormat,
    admin::{
        AdminArgs, Column, bucket_json, connections_json, fit, kibibytes, marks, others_text, share_text,
        shorten, table, taker, taking_json, tokens,
    },
    argv::process_id,
    terminal::{Terminal, clean, width},
    text::folded,
};
use crate::{api::proto::admin as pb, os::accounts::AccountNumber};

/// `explain`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ExplainArgs {
    /// The process [default: the shell that runs this command]
    ///
    /// Its number in the agent's PID namespace.
    #[arg(long, value_name = "PID", verbatim_doc_comment, value_parser = process_id)]
    pid: Option<i32>,

    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `explain`.
pub(super) async fn explain(args: &ExplainArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let question = pb::ExplainRequest { pid: args.pid.unwrap_or_else(own_shell) };
    let told =
        args.admin.call(terminal, question, async |mut api, request| api.explain(request).await).await?;
    let text = match args.output.output {
        OutputFormat::Pretty => pretty(&told, |account| account.name().ok().flatten(), width()),
        OutputFormat::Json => format!("{}\n", to_json(&told)),
    };
    terminal.print(&text)?;
    if told.not_known.is_empty() { Ok(()) } else { Err(Failure::NotKnown) }
}

/// The process that started this one; this one, where that is outside of the PID namespace.
fn own_shell() -> i32 {
    match getppid().as_raw() {
        0 => getpid().as_raw(),
        shell => shell,
    }
}

/// What an attestor came to, on one line.
#[expect(
    clippy::as_conversions,
    clippy::cast_precision_loss,
    reason = "shown with one digit behind the point"
)]
fn said_text(said: &pb::Said) -> String {
    let pb::Said { attestor, selectors, took_microseconds, age_milliseconds } = said;
    let took = *took_microseconds as f64 / 1e3;
    let age = age_milliseconds.map(|age| format!(", from what it read {:.1} s ago", age as f64 / 1e3));
    let selectors = if *selectors == 1 { "1 selector".to_owned() } else { format!("{selectors} selectors") };
    format!("  (found by {}: {selectors} in {took:.1} ms{})", clean(attestor), age.unwrap_or_default())
}

/// A number with the name behind it, where it has one.
fn named(names: impl Fn(AccountNumber) -> Option<String>, account: AccountNumber) -> String {
    let (AccountNumber::User(number) | AccountNumber::Group(number)) = account;
    names(account).map_or_else(|| number.to_string(), |name| format!("{number} {}", clean(&name)))
}

fn pretty(
    told: &pb::ExplainResponse,
    names: impl Fn(AccountNumber) -> Option<String> + Copy,
    width: usize,
) -> String {
    let mut out = String::new();
    let caller = told.caller.clone().unwrap_or_default();
    // Writing to a String does not fail.
    let command = if told.command.is_empty() { String::new() } else { format!(" {}", clean(&told.command)) };
    let (user, group) =
        (named(names, AccountNumber::User(told.uid)), named(names, AccountNumber::Group(told.gid)));
    let _ = writeln!(out, "Process:     {}{command} (user {user}, group {group})", told.pid);
    let _ = writeln!(out, "Charged as:  {}: {}", clean(&caller.key), clean(&caller.why));
    if !caller.cgroup_line.is_empty() {
        let _ = writeln!(out, "Cgroup line: {}", clean(&caller.cgroup_line));
    }

    out.push_str("\nSelectors:\n");
    for selector in &told.selectors {
        let _ = writeln!(out, "  {}", clean(selector));
    }
    for text in untold(told) {
        out.push_str(&indented(&text, "  ", width));
    }
    if let Some(it) = told.untold.iter().find(|it| it.decides) {
        let text =
            format!("calls fail because of {}: an entry asks for it, and matches otherwise", clean(&it.kind));
        out.push_str(&indented(&text, "    ", width));
    }

    for said in &told.attestors {
        let _ = writeln!(out, "{}", said_text(said));
    }

    out.push_str("\nEntries that match, the default first:\n");
    if !told.not_known.is_empty() {
        out.push_str(&indented(&clean(&told.not_known), "  ", width));
    } else if let Some(kinds) = undecided(told) {
        let text =
            format!("calls are Unavailable: which entries match depends on {kinds}, which is not known");
        out.push_str(&indented(&text, "  ", width));
    } else if told.matches.is_empty() {
        out.push_str("  none: this process has no identity\n");
        if told.nearest.is_empty() {
            out.push_str(&wanted(told, width));
        }
    }
    for entry in &told.matches {
        let _ = writeln!(out, "  {}", entry_line(entry, width));
        if !entry.withheld.is_empty() {
            out.push_str(&indented(&format!("not served: {}", clean(&entry.withheld)), "    ", width));
        }
    }

    if !told.nearest.is_empty() {
        out.push_str("\nEntries that nearly match:\n");
    }
    for near in &told.nearest {
        let _ = writeln!(out, "  {}", entry_line(&near.entry.clone().unwrap_or_default(), width));
        out.push_str(&indented(&lacks(told, near), "    ", width));
        for absent in &near.absent {
            out.push_str(&indented(&clean(absent), "    ", width));
        }
    }

    if let Some(holding) = &told.holding {
        held(&mut out, holding, width);
    }
    limits(&mut out, told, width);
    out
}

/// What is not known of a process: each reason once, with how many kinds of selectors it is of.
fn untold(told: &pb::ExplainResponse) -> Vec<String> {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for it in &told.untold {
        match reasons.iter_mut().find(|(why, _)| *why == it.why) {
            Some((_, kinds)) => kinds.push(&it.kind),
            None => reasons.push((&it.why, vec![&it.kind])),
        }
    }
    let text = |(why, kinds): (&str, Vec<&str>)| {
        let (first, others) = (kinds.first().copied().unwrap_or_default(), kinds.len().saturating_sub(1));
        let what = match others {
            0 => format!("{} is", clean(first)),
            1 => format!("{} are", clean(&kinds.join(" and "))),
            _ => format!("{} and {others} other kinds of selectors are", clean(first)),
        };
        format!("{what} not known: {}", clean(why))
    };
    reasons.into_iter().map(text).collect()
}

/// The kinds of selectors that decide whether an entry matches, and are not known.
fn undecided(told: &pb::ExplainResponse) -> Option<String> {
    let kinds: Vec<String> =
        told.untold.iter().filter(|untold| untold.decides).map(|untold| clean(&untold.kind)).collect();
    (!kinds.is_empty()).then(|| kinds.join(" and "))
}

/// What the process lacks for an entry that nearly matches, or may lack.
fn lacks(told: &pb::ExplainResponse, near: &pb::Near) -> String {
    let is_unknown = |selector: &&String| {
        told.untold.iter().any(|it| selector.strip_prefix(&it.kind).is_some_and(|rest| rest.starts_with(':')))
    };
    let (unknown, missing): (Vec<_>, Vec<_>) = near.missing.iter().partition(is_unknown);
    let list = |word: &str, selectors: &[&String]| {
        let texts: Vec<String> = selectors.iter().map(|selector| clean(selector)).collect();
        if texts.is_empty() { String::new() } else { format!(", {word} {}", texts.join(", ")) }
    };
    let (missing, unknown) = (list("misses", &missing), list("may have", &unknown));
    format!("has {} of its selectors{missing}{unknown}", near.found)
}

/// What its caller holds, what it may hold, what is short, and who has that.
fn held(out: &mut String, it: &pb::Holding, width: usize) {
    out.push_str("\nHeld:\n");
    let held = |of: &pb::Connections| {
        let plural = if of.open == 1 { "" } else { "s" };
        format!("{} connection{plural}, {}", of.open, kibibytes(of.held))
    };
    let caller = it.caller.clone().unwrap_or_default();
    let most =
        it.most.map_or_else(String::new, |most| format!("; it may have {most} connections (ratelimit.gate)"));
    let mut lines = vec![format!("{}: {}{most}", clean(&caller.caller), held(&caller))];
    lines.extend(
        it.family
            .as_ref()
            .map(|family| format!("with all that are its user's (/etc/subuid): {}", held(family))),
    );
    lines.extend(match it.refused {
        0 => None,
        1 => Some("1 of its connections was refused".to_owned()),
        refused => Some(format!("{refused} of its connections were refused")),
    });
    lines
        .push(format!("all callers: {} connections of at most {}", it.node_connections, it.most_connections));
    if it.short_of.is_empty() {
        lines.push("nothing is short".to_owned());
    } else {
        let share = share_text(it.share, it.share_of_connections);
        let share = share.map_or_else(String::new, |share| format!("; the share of each is {share}"));
        lines.push(format!("short of {}{share}", clean(&it.short_of.join(", "))));
    }
    lines.extend(it.heaviest.as_ref().map(|most| {
        let hold = if most.others == 0 { "holds" } else { "hold" };
        format!("{}{} {hold} most: {}", clean(&most.caller), others_text(most), held(most))
    }));
    for line in lines {
        out.push_str(&indented(&line, "  ", width));
    }
}

/// The buckets that a call of the process would take from.
fn limits(out: &mut String, told: &pb::ExplainResponse, width: usize) {
    out.push_str("\nLimits:\n");
    let columns =
        [Column::Left("STAGE"), Column::Left("KEY"), Column::Left("METHOD"), Column::Right("TOKENS LEFT")];
    out.push_str(&table(columns, &fit(&bucket_rows(&told.buckets), 1, width, &columns)));
    out.push_str(&marks(told.buckets.iter()));
    let shared: Vec<[String; 5]> =
        told.buckets.iter().flat_map(|bucket| taker_rows(bucket, width / 3)).collect();
    if !shared.is_empty() {
        out.push_str("\nWho uses what is shared:\n");
        let columns = [
            Column::Left("KEY"),
            Column::Left("METHOD"),
            Column::Left("CALLER"),
            Column::Right("USED"),
            Column::Right("REFUSED"),
        ];
        out.push_str(&table(columns, &fit(&shared, 0, width, &columns)));
    }
}

/// What to do for a process of which no entry asks anything.
fn wanted(told: &pb::ExplainResponse, width: usize) -> String {
    let found = |kind: &str| told.selectors.iter().find(|it| it.starts_with(kind)).map(|it| clean(it));
    let of_pod = found("k8s:ns:").zip(found("k8s:sa:")).map(|(ns, sa)| format!("\"{ns}\", \"{sa}\""));
    let both = |one: String, other: String| format!("{one} -selector {other}");
    let of_user = || found("unix:uid:").or_else(|| told.selectors.first().map(|it| clean(it)));
    if !told.agent_id.is_empty()
        && let Some(example) =
            found("k8s:ns:").into_iter().chain(found("k8s:sa:")).reduce(both).or_else(of_user)
    {
        let text = "To give it one, create an entry at the server with selectors from this list:";
        let trust_domain = told.agent_id.split('/').take(3).collect::<Vec<_>>().join("/");
        // It is to be copied, so it is not folded.
        return format!(
            "{}    spire-server entry create -parentID {} -spiffeID {}/NAME -selector {example}\n",
            indented(text, "  ", width),
            clean(&told.agent_id),
            clean(&trust_domain),
        );
    }
    match of_pod.or_else(|| of_user().map(|it| format!("\"{it}\""))) {
        Some(example) => {
            let text = indented("To give it one, write an entry with selectors from this list:", "  ", width);
            format!("{text}    selectors = [{example}]\n")
        }
        None => {
            let text = if told.untold.is_empty() {
                "An entry asks for selectors, and no attestor found any: see plugins in agent.conf."
            } else {
                "Which selectors it has cannot be told, for the reason above; an attestor that is optional is done without."
            };
            indented(text, "  ", width)
        }
    }
}

/// A sentence in as many lines as it takes.
fn indented(text: &str, by: &str, width: usize) -> String {
    folded(text, width.saturating_sub(by.len())).into_iter().map(|line| format!("{by}{line}\n")).collect()
}

/// A row for each of those who take from a bucket, whose names have so much room.
fn taker_rows(bucket: &pb::Bucket, room: usize) -> Vec<[String; 5]> {
    let row = |taking: &pb::Taking| {
        let (used, refused) = (taking.used.to_string(), taking.refused.to_string());
        let caller = shorten(&clean(taker(taking)), room);
        [bucket.key.clone(), bucket.method.clone(), caller, used, refused]
    };
    bucket.takings.iter().map(row).collect()
}

/// The same, in two lines where one has no room.
fn entry_line(entry: &pb::Entry, width: usize) -> String {
    let text = entry_text(entry);
    if text.chars().count() + 2 > width { text.replacen(" (entry", "\n    (entry", 1) } else { text }
}

fn entry_text(entry: &pb::Entry) -> String {
    let mut text = format!("{} (entry {}", clean(&entry.spiffe_id), clean(&entry.entry_id));
    if !entry.hint.is_empty() {
        let _ = write!(text, ", hint {}", clean(&entry.hint));
    }
    text.push(')');
    text
}

/// Most methods of a key mostly stand alike: those that do, and are more than two, are one row.
fn bucket_rows(buckets: &[pb::Bucket]) -> Vec<[String; 4]> {
    let mut rows = Vec::new();
    for of_key in buckets.chunk_by(|a, b| (&a.stage, &a.key) == (&b.stage, &b.key)) {
        let alike = |bucket: &pb::Bucket| of_key.iter().filter(|it| tokens(it) == tokens(bucket)).count();
        let commonest = of_key.iter().max_by_key(|bucket| alike(bucket)).filter(|bucket| alike(bucket) > 2);
        let common = commonest.map(tokens);
        let row = |bucket: &pb::Bucket, method: &str| {
            [bucket.stage.clone(), bucket.key.clone(), method.to_owned(), tokens(bucket)]
        };
        let single = of_key.iter().filter(|bucket| Some(tokens(bucket)) != common);
        let before = rows.len();
        rows.extend(single.map(|bucket| row(bucket, &bucket.method)));
        if let Some(bucket) = commonest {
            rows.push(row(bucket, if rows.len() == before { "each method" } else { "each other method" }));
        }
    }
    rows
}

/// A bucket, and who takes from it.
fn shared_json(bucket: &pb::Bucket) -> serde_json::Value {
    let mut json = bucket_json(bucket);
    if let Some(json) = json.as_object_mut() {
        json.insert("takings".to_owned(), bucket.takings.iter().map(taking_json).collect());
    }
    json
}

fn to_json(told: &pb::ExplainResponse) -> serde_json::Value {
    let entry = |entry: &pb::Entry| {
        json!({
            "spiffe_id": entry.spiffe_id,
            "entry_id": entry.entry_id,
            "hint": entry.hint,
            "withheld": entry.withheld,
        })
    };
    let near = |near: &pb::Near| {
        json!({
            "entry": entry(&near.entry.clone().unwrap_or_default()),
            "missing": near.missing,
            "found": near.found,
            "absent": near.absent,
        })
    };
    let untold = |it: &pb::Untold| json!({ "kind": it.kind, "why": it.why, "decides": it.decides });
    let said = |it: &pb::Said| {
        json!({
            "attestor": it.attestor,
            "selectors": it.selectors,
            "took_us": it.took_microseconds,
            "age_ms": it.age_milliseconds,
        })
    };
    let holding = |it: &pb::Holding| {
        json!({
            "caller": it.caller.as_ref().map(connections_json),
            "family": it.family.as_ref().map(connections_json),
            "most": it.most,
            "short_of": it.short_of,
            "share": it.share,
            "share_of_connections": it.share_of_connections,
            "node_connections": it.node_connections,
            "most_connections": it.most_connections,
            "heaviest": it.heaviest.as_ref().map(connections_json),
            "refused": it.refused,
        })
    };
    let caller = told.caller.clone().unwrap_or_default();
    json!({
        "pid": told.pid,
        "uid": told.uid,
        "gid": told.gid,
        "command": told.command,
        "not_known": Some(&told.not_known).filter(|why| !why.is_empty()),
        "caller": { "key": caller.key, "why": caller.why, "cgroup_line": caller.cgroup_line },
        "selectors": told.selectors,
        "untold": told.untold.iter().map(untold).collect::<Vec<_>>(),
        "attestors": told.attestors.iter().map(said).collect::<Vec<_>>(),
        "matches": told.matches.iter().map(entry).collect::<Vec<_>>(),
        "nearest": told.nearest.iter().map(near).collect::<Vec<_>>(),
        "buckets": told.buckets.iter().map(shared_json).collect::<Vec<_>>(),
        "holding": told.holding.as_ref().map(holding),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(stage: &str, key: &str, method: &str, left: u32) -> pb::Bucket {
        pb::Bucket {
            stage: stage.to_owned(),
            key: key.to_owned(),
            method: method.to_owned(),
            limit: pb::Limit::Tokens.into(),
            left,
            burst: 200,
            by_default: false,
            takings: Vec::new(),
            dry_run: false,
        }
    }

    #[test]
    fn what_is_told_is_shown() {
        let entry = |path: &str, hint: &str, withheld: &str| pb::Entry {
            spiffe_id: format!("spiffe://example.org/{path}"),
            entry_id: path.to_owned(),
            hint: hint.to_owned(),
            withheld: withheld.to_owned(),
        };
        let connections =
            |caller: &str, open, held| pb::Connections { caller: caller.to_owned(), open, held, others: 0 };
        let untold = |kind: &str, why: &str, decides| pb::Untold {
            kind: kind.to_owned(),
            why: why.to_owned(),
            decides,
        };
        let told = pb::ExplainResponse {
            pid: 7,
            uid: 1000,
            gid: 100,
            command: "run\x1b".to_owned(),
            caller: Some(pb::Caller {
                key: "pod:x".to_owned(),
                why: "its cgroup is a pod's".to_owned(),
                cgroup_line: "0::/kubepods/\x1b[2J".to_owned(),
            }),
            selectors: vec!["unix:uid:1000".to_owned()],
            attestors: vec![pb::Said {
                attestor: "k8s".to_owned(),
                selectors: 7,
                took_microseconds: 1250,
                age_milliseconds: Some(4210),
            }],
            not_known: String::new(),
            agent_id: String::new(),
            holding: Some(pb::Holding {
                caller: Some(connections("pod:x", 2, 66 << 10)),
                family: Some(connections("pod:x", 5, 99 << 10)),
                most: Some(2),
                short_of: vec!["memory".to_owned(), "connections".to_owned()],
                share: Some(80 << 10),
                share_of_connections: Some(8),
                node_connections: 360,
                most_connections: 400,
                heaviest: Some(pb::Connections { others: 299, ..connections("uid:7", 900, 3 << 20) }),
                refused: 58,
            }),
            untold: vec![
                untold("unix:path", "it hangs", true),
                untold("k8s:ns", "the kubelet is away", false),
                untold("k8s:sa", "the kubelet is away", false),
            ],
            matches: vec![entry("web", "public", ""), entry("old", "public", "an older entry, web, has it")],
            nearest: vec![pb::Near {
                entry: Some(entry("db", "", "")),
                missing: vec!["unix:user:db".to_owned(), "unix:path:/db".to_owned()],
                found: 1,
                absent: vec!["unix:user:db: there is no such user on this node".to_owned()],
            }],
            buckets: vec![
                bucket("gate", "pod:x", "connections", 199),
                bucket("caller", "pod:x", "FetchX509SVID", 200),
                bucket("caller", "pod:x", "FetchJWTSVID", 3),
                bucket("caller", "pod:x", "FetchJWTBundles", 200),
                bucket("caller", "pod:x", "ValidateJWTSVID", 200),
                pb::Bucket {
                    by_default: true,
                    takings: vec![pb::Taking { caller: "uid:7".to_owned(), used: 70, refused: 8 }],
                    ..bucket("identity", "spiffe://td/web", "FetchJWTSVID", 0)
                },
            ],
        };
        let names = |account| (account == AccountNumber::User(1000)).then(|| "ann".to_owned());
        assert_eq!(
            pretty(&told, names, 80),
            "\
Process:     7 run\\u{1b} (user 1000 ann, group 100)
Charged as:  pod:x: its cgroup is a pod's
Cgroup line: 0::/kubepods/\\u{1b}[2J

Selectors:
  unix:uid:1000
  unix:path is not known: it hangs
  k8s:ns and k8s:sa are not known: the kubelet is away
    calls fail because of unix:path: an entry asks for it, and matches otherwise
  (found by k8s: 7 selectors in 1.2 ms, from what it read 4.2 s ago)

Entries that match, the default first:
  calls are Unavailable: which entries match depends on unix:path, which is not
  known
  spiffe://example.org/web (entry web, hint public)
  spiffe://example.org/old (entry old, hint public)
    not served: an older entry, web, has it

Entries that nearly match:
  spiffe://example.org/db (entry db)
    has 1 of its selectors, misses unix:user:db, may have unix:path:/db
    unix:user:db: there is no such user on this node

Held:
  pod:x: 2 connections, 66 KiB; it may have 2 connections (ratelimit.gate)
  with all that are its user's (/etc/subuid): 5 connections, 99 KiB
  58 of its connections were refused
  all callers: 360 connections of at most 400
  short of memory, connections; the share of each is 80 KiB, 8 connections
  uid:7 and 299 others of its range hold most: 900 connections, 3072 KiB

Limits:
STAGE     KEY              METHOD             TOKENS LEFT
gate      pod:x            connections            199/200
caller    pod:x            FetchJWTSVID             3/200
caller    pod:x            each other method      200/200
identity  spiffe://td/web  FetchJWTSVID            0/200*
* a default, which refuses only while the node has no room

Who uses what is shared:
KEY              METHOD        CALLER  USED  REFUSED
spiffe://td/web  FetchJWTSVID  uid:7     70        8
"
        );
        assert_eq!(to_json(&told)["untold"][0]["kind"], "unix:path");
        let json = to_json(&told);
        assert_eq!(
            (&json["holding"]["heaviest"]["open"], &json["holding"]["refused"]),
            (&json!(900), &json!(58))
        );
        assert_eq!(json["holding"]["heaviest"]["others"], 299);
        assert_eq!(to_json(&told)["nearest"][0]["entry"]["entry_id"], "db");
        assert!(pretty(&pb::ExplainResponse::default(), names, 80).contains("no identity"));
        let untold = pb::ExplainResponse { matches: Vec::new(), nearest: Vec::new(), ..told };
        assert!(!pretty(&untold, names, 80).contains("no identity"), "it may have one");
        let nothing_found = pb::ExplainResponse { selectors: Vec::new(), ..untold.clone() };
        let optional = pb::ExplainResponse {
            untold: nothing_found
                .untold
                .iter()
                .map(|it| pb::Untold { decides: false, ..it.clone() })
                .collect(),
            ..nothing_found
        };
        let shown = pretty(&optional, names, 80);
        assert!(shown.contains("for the reason above") && !shown.contains("see plugins"), "{shown}");
        let nothing_near = pb::ExplainResponse { untold: Vec::new(), ..untold };
        let shown = pretty(&nothing_near, names, 80);
        let words = shown.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words.contains("selectors from this list: selectors = [\"unix:uid:1000\"]"), "{shown}");
        let joined = pb::ExplainResponse {
            agent_id: "spiffe://td/spire/agent/join_token/7".to_owned(),
            ..nothing_near.clone()
        };
        let shown = pretty(&joined, names, 80);
        let want = "spire-server entry create -parentID spiffe://td/spire/agent/join_token/7 -spiffeID spiffe://td/NAME \
                    -selector unix:uid:1000\n";
        assert!(shown.contains(want) && !shown.contains("selectors = ["), "{shown}");
        let not_known = pb::ExplainResponse { not_known: "nothing is known".to_owned(), ..nothing_near };
        let shown = pretty(&not_known, names, 80);
        assert!(shown.contains("  nothing is known\n") && !shown.contains("no identity"), "{shown}");
    }

    /// However long a SPIFFE ID and the key of a pod are, a table is no wider than the terminal.
    #[test]
    fn tables_of_limits_fit_the_terminal() {
        let pod = "pod:0f9c4a3e-6f0e-4a6b-9b4d-1c1f5a1e2d3c";
        let id = format!("spiffe://example.org/ns/{}/sa/web", "x".repeat(90));
        let taking = |caller: &str| pb::Taking { caller: caller.to_owned(), used: 70_000, refused: 80_000 };
        let methods = ["FetchX509SVID", "FetchX509Bundles", "ValidateJWTSVID", "StreamSecrets"];
        let buckets = |stage: &str, key: &str| {
            methods.map(|method| pb::Bucket {
                by_default: true,
                burst: 1_000_000,
                takings: vec![taking(pod), taking("uid:4294967294")],
                ..bucket(stage, key, method, 1_000_000)
            })
        };
        for (case, key) in
            [("a SPIFFE ID", id.as_str()), ("a mask", "spiffe://example.org/ns/*"), ("a pod", pod)]
        {
            let told = pb::ExplainResponse { buckets: buckets("identity", key).into(), ..Default::default() };
            let mut out = String::new();
            limits(&mut out, &told, 80);
            for line in out.lines() {
                assert!(line.chars().count() <= 80, "{case}: {line}");
            }
        }
    }
}
