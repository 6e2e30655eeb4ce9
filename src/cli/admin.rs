//! The way to the admin socket, and how its answers are shown in tables.
//!
//! It is the owner's: no security header, no identity. The agent is trusted, and its words are cleaned all the same:
//! keys, hints and selectors are other people's.

use std::{future::Future, path::PathBuf, time::Duration};

use tonic::{Request, Response, Status, transport::Channel};

use super::{
    Failure,
    client::{Attempts, TimeoutArgs},
    socket::{AgentSocket, SocketError, resolve_admin},
    terminal::{Terminal, clean},
};
use crate::{
    api::proto::admin::{self as pb, admin_client::AdminClient},
    limits::processor::cores_text,
};

/// The largest answer that is read: a thousand keys, or the entries of one process.
const MAX_MESSAGE: usize = 16 * 1024 * 1024;

/// Options of every command that talks to the admin socket.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct AdminArgs {
    /// Path of the agent's admin socket
    ///
    /// Without it: the environment variable DURWARD_ADMIN_SOCKET; else
    /// private/admin.sock beside the directory of the socket that
    /// SPIFFE_ENDPOINT_SOCKET names; else /run/durward/private/admin.sock.
    #[arg(long, value_name = "PATH", verbatim_doc_comment)]
    socket_path: Option<PathBuf>,
    #[command(flatten)]
    timeout: TimeoutArgs,
}

impl AdminArgs {
    pub(super) fn limit(&self) -> Option<Duration> {
        self.timeout.limit()
    }

    fn socket(&self) -> Result<AgentSocket, SocketError> {
        resolve_admin(self.socket_path.as_deref(), super::environment)
    }

    /// Connects, and makes one call: again, while all places of the socket are taken.
    pub(super) async fn call<Q: Clone, A, F>(
        &self,
        terminal: &mut Terminal,
        question: Q,
        call: impl Fn(AdminClient<Channel>, Request<Q>) -> F,
    ) -> Result<A, Failure>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let attempt = async |channel, limit| {
            let api = AdminClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
            let mut request = Request::new(question.clone());
            if let Some(limit) = limit {
                request.set_timeout(limit);
            }
            call(api, request).await.map(Response::into_inner)
        };
        let attempts = Attempts::within(self.limit());
        let (answer, _) = attempts.answer(terminal, &self.socket()?, None, attempt).await?;
        Ok(answer)
    }
}

/// What [`tokens`] says of a limit that nobody set, explained.
const BY_DEFAULT: &str = "* a default, which refuses only while the node has no room";
/// The same of one that refuses nobody.
const DRY_RUN: &str = "~ a dry run, which refuses nobody: REFUSED counts what it would have";

/// The tokens of a bucket: `12/200`, or why there are none.
pub(super) fn tokens(bucket: &pb::Bucket) -> String {
    let tokens = match bucket.limit() {
        pb::Limit::Tokens if bucket.by_default => format!("{}/{}*", bucket.left, bucket.burst),
        pb::Limit::Tokens => format!("{}/{}", bucket.left, bucket.burst),
        other => limit_name(other).to_owned(),
    };
    if is_dry_run(bucket) { tokens + "~" } else { tokens }
}

/// A dry run of what can refuse.
pub(super) fn is_dry_run(bucket: &pb::Bucket) -> bool {
    bucket.dry_run && matches!(bucket.limit(), pb::Limit::Tokens | pb::Limit::Blocked)
}

/// What the marks of [`tokens`] mean that these have: a line each.
pub(super) fn marks<'a>(mut buckets: impl Iterator<Item = &'a pb::Bucket> + Clone) -> String {
    let shown =
        [(BY_DEFAULT, buckets.clone().any(|bucket| bucket.by_default)), (DRY_RUN, buckets.any(is_dry_run))];
    shown.into_iter().filter(|(_, any)| *any).map(|(text, _)| format!("{text}\n")).collect()
}

/// The name of a kind of limit, as JSON has it.
pub(super) fn limit_name(limit: pb::Limit) -> &'static str {
    match limit {
        pb::Limit::Unknown => "unknown",
        pb::Limit::Tokens => "tokens",
        pb::Limit::Unlimited => "unlimited",
        pb::Limit::Exempt => "exempt",
        pb::Limit::Blocked => "blocked",
        pb::Limit::Several => "several",
    }
}

/// A bucket as JSON.
pub(super) fn bucket_json(bucket: &pb::Bucket) -> serde_json::Value {
    let mut json = serde_json::json!({
        "stage": bucket.stage,
        "key": bucket.key,
        "method": bucket.method,
        "limit": limit_name(bucket.limit()),
        "dry_run": bucket.dry_run,
    });
    if let (pb::Limit::Tokens, Some(json)) = (bucket.limit(), json.as_object_mut()) {
        json.insert("left".to_owned(), bucket.left.into());
        json.insert("burst".to_owned(), bucket.burst.into());
        json.insert("by_default".to_owned(), bucket.by_default.into());
    }
    json
}

/// One of those who take from a bucket, as rows show them.
pub(super) fn taker(taking: &pb::Taking) -> &str {
    if taking.caller.is_empty() { "others" } else { &taking.caller }
}

/// What a caller has open and holds, for programs.
pub(super) fn connections_json(it: &pb::Connections) -> serde_json::Value {
    serde_json::json!({ "caller": it.caller, "others": it.others, "open": it.open, "held": it.held })
}

/// What is said behind the name of a caller of whom others of its family are told with it.
pub(super) fn others_text(it: &pb::Connections) -> String {
    match it.others {
        0 => String::new(),
        1 => " and 1 other of its range".to_owned(),
        others => format!(" and {others} others of its range"),
    }
}

/// One of those who take from a bucket as JSON.
pub(super) fn taking_json(taking: &pb::Taking) -> serde_json::Value {
    serde_json::json!({ "caller": taking.caller, "used": taking.used, "refused": taking.refused })
}

/// What is used of the processor.
pub(super) fn processor_text(now: &pb::LimitsResponse) -> String {
    let [used, waited] = [now.used_millicores, now.waited_millicores].map(cores_text);
    let most = cores_text(now.millicores.try_into().unwrap_or(u32::MAX));
    format!("uses {used} and waits for {waited} of up to {most} cores")
}

/// Bytes in words, with one decimal.
pub(super) fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) >> 20;
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

/// The same of little.
pub(super) fn kibibytes(bytes: u64) -> String {
    format!("{} KiB", bytes >> 10)
}

/// What each caller may hold, of bytes and of connections, where that is short.
pub(super) fn share_text(bytes: Option<u64>, connections: Option<u64>) -> Option<String> {
    let both = [bytes.map(kibibytes), connections.map(|number| format!("{number} connections"))];
    let both: Vec<String> = both.into_iter().flatten().collect();
    (!both.is_empty()).then(|| both.join(", "))
}

/// What is used of the memory, as JSON.
pub(super) fn memory_json(memory: &pb::Memory) -> serde_json::Value {
    serde_json::json!({
        "pressure": memory.pressure,
        "budget": memory.budget,
        "resident": memory.resident,
        "used": memory.used,
        "held": memory.held,
        "cgroup": memory.cgroup,
        "kernel": memory.kernel,
    })
}

/// The widest that a cell of a table gets, in characters.
const WIDEST: usize = 60;

/// How a column stands.
#[derive(Clone, Copy, Debug)]
pub(super) enum Column {
    Left(&'static str),
    Right(&'static str),
}

impl Column {
    /// Of its name, in characters.
    pub(super) fn width(self) -> usize {
        self.name().chars().count()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Left(name) | Self::Right(name) => name,
        }
    }
}

/// Rows below their columns' names, each column as wide as its widest cell. What is wider than [`WIDEST`] loses its
/// middle; crates for tables cut the end, which is where two SPIFFE IDs differ.
pub(super) fn table<const N: usize>(columns: [Column; N], rows: &[[String; N]]) -> String {
    let names = columns.map(|column| column.name().to_owned());
    let rows: Vec<[String; N]> = std::iter::once(names)
        .chain(rows.iter().map(|row| row.each_ref().map(|cell| shorten(&clean(cell), WIDEST))))
        .collect();
    let widths: [usize; N] = std::array::from_fn(|at| {
        rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    });
    let mut out = String::new();
    for row in &rows {
        let mut line = String::new();
        for ((cell, width), column) in row.iter().zip(widths).zip(columns) {
            line.push_str(&match column {
                Column::Left(_) => format!("{cell:<width$}  "),
                Column::Right(_) => format!("{cell:>width$}  "),
            });
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// The least room of a cell that is cut: `all callers` has it.
const LEAST: usize = 11;

/// The rows, with the cells at `at` cut so that the table is no wider than `columns`.
pub(super) fn fit<const N: usize>(
    rows: &[[String; N]],
    at: usize,
    columns: usize,
    names: &[Column; N],
) -> Vec<[String; N]> {
    let widest = |nth: usize| {
        let name = names.get(nth).map_or(0, |column| column.width());
        rows.iter().filter_map(|row| row.get(nth)).map(|cell| clean(cell).chars().count()).chain([name]).max()
    };
    let others: usize = (0..N).filter(|nth| *nth != at).filter_map(widest).map(|width| width + 2).sum();
    let room = columns.saturating_sub(others).max(LEAST);
    let fits = widest(at).is_none_or(|width| width <= room);
    let mut rows = rows.to_vec();
    for cell in rows.iter_mut().filter_map(|row| row.get_mut(at)) {
        let whole = clean(cell);
        // All SPIFFE IDs begin alike.
        let told = if fits { &whole } else { whole.trim_start_matches("spiffe://") };
        *cell = shorten(told, room);
    }
    rows
}

/// `text` in at most `widest` characters: the beginning and, mostly, the end, in which two SPIFFE IDs or paths differ.
pub(super) fn shorten(text: &str, widest: usize) -> String {
    let count = text.chars().count();
    if count <= widest {
        return text.to_owned();
    }
    let head = widest / 3;
    let tail = widest.saturating_sub(head + 1);
    let end: String = text.chars().skip(count - tail).collect();
    text.chars().take(head).chain(['…']).chain(end.chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_straight_and_bounded() {
        let long = format!("spiffe://example.org/{}/end", "x".repeat(3000));
        let rows = [
            ["uid:1000".to_owned(), "7".to_owned()],
            ["\x1b[2Jé".to_owned(), "1000".to_owned()],
            [long, String::new()],
        ];
        let text = table([Column::Left("KEY"), Column::Right("USED")], &rows);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("KEY ") && lines[0].ends_with("  USED"), "{text}");
        assert!(lines[1].starts_with("uid:1000 ") && lines[1].ends_with("     7"), "{text}");
        assert!(lines[2].starts_with("\\u{1b}[2Jé "), "{text}");
        assert!(lines[3].starts_with("spiffe://example.org…") && lines[3].ends_with("xxx/end"), "{text}");
        assert!(lines.iter().all(|line| line.chars().count() <= WIDEST + 2 + 4), "{text}");
        assert_eq!(lines[0].chars().count(), lines[1].chars().count(), "{text}");
    }
}
