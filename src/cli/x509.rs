//! `api fetch x509` and `api watch`: the caller's X.509-SVIDs, verified, for people, for scripts and as files.
//!
//! The text is spire-agent's (`cmd/spire-agent/cli/api/printer.go`) with the type of the key added; the JSON is
//! protojson as spire-agent writes it. The private key is in the JSON and in the file of `--write`, nowhere else.

use std::{collections::BTreeMap, fmt::Write as _, path::PathBuf, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use time::OffsetDateTime;
use tonic::Code;

use super::{
    Failure, OutputFormat,
    client::{Client, TimeoutArgs},
    files::{Batch, Readers},
    socket::{AgentSocket, SocketArgs},
    svid::{Certificate, VerifiedSvid, X509Answer, pem_of},
    terminal::{Terminal, clean},
    text::{GoDuration, go_time},
};
use crate::{api::proto::workload as pb, os::clock::Clock};

/// `api fetch x509`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct FetchX509Args {
    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    output: super::OutputArgs,

    /// Print nothing about the SVIDs
    #[arg(long)]
    silent: bool,

    /// Also write SVIDs, keys and bundles as PEM files into this directory
    ///
    /// For the Nth SVID, from 0: svid.N.pem, svid.N.key (readable by its
    /// owner alone), bundle.N.pem, and federated_bundle.N.M.pem for the Mth
    /// foreign trust domain. The directory must exist.
    #[arg(long, value_name = "DIR", verbatim_doc_comment)]
    write: Option<PathBuf>,
}

/// `api watch`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct WatchArgs {
    #[command(flatten)]
    socket: SocketArgs,
}

/// Runs `api fetch x509`.
pub(super) async fn fetch(args: &FetchX509Args, terminal: &mut Terminal) -> Result<(), Failure> {
    let socket = args.socket.resolve(super::environment)?;
    // Before the call: an SVID that cannot be written need not be fetched.
    let batch = args.write.as_deref().map(Batch::open).transpose()?;
    let client = Client::new(&socket, args.timeout.limit());
    let started = tokio::time::Instant::now();
    let response = client.fetch_x509_svid(terminal).await?;
    let took = started.elapsed();

    let json = matches!(args.output.output, OutputFormat::Json).then(|| to_json(&response));
    let answer = X509Answer::verify(response, Clock::SYSTEM.now())?;
    match (&json, args.silent) {
        (_, true) => {}
        (Some(json), false) => terminal.print(&format!("{json}\n"))?,
        (None, false) => terminal.print(&describe(&answer, took))?,
    }
    if let (Some(batch), Some(dir)) = (batch, &args.write) {
        let written = write(batch, &answer, dir)?;
        if json.is_none() {
            terminal.print(&written)?;
        }
    }
    Ok(())
}

/// Runs `api watch`: ends only when the agent says that the call itself is wrong.
pub(super) async fn watch(args: &WatchArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let socket = args.socket.resolve(super::environment)?;
    let mut pause = FIRST_PAUSE;
    let (mut seen_any, mut said) = (false, String::new());
    loop {
        let failure = match watch_once(&socket, terminal, &mut seen_any, &mut pause).await {
            Err(Failure::Call(err)) if err.code() != Code::InvalidArgument => err,
            Err(other) => return Err(other),
            Ok(()) => continue,
        };
        // One that stays away is not told of each time.
        let told = failure.to_string();
        if told != said {
            terminal.note(&told);
            if let Some(advice) = failure.advice() {
                terminal.advise(&advice);
            }
            said = told;
        }
        // An agent that refuses says for how long.
        let wait = failure.retry_after().map_or(pause, |told| told.clamp(pause, LONGEST_PAUSE));
        terminal.note(format_args!("trying again in {}", GoDuration(wait)));
        tokio::time::sleep(wait).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Between a broken stream and the next try (go-spiffe: `workloadapi/backoff.go`).
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

async fn watch_once(
    socket: &AgentSocket,
    terminal: &mut Terminal,
    seen_any: &mut bool,
    pause: &mut Duration,
) -> Result<(), Failure> {
    let client = Client::new(socket, None);
    let mut since = tokio::time::Instant::now();
    let mut stream = client.watch_x509_svid().await?;
    loop {
        let next = async { stream.message().await.map_err(|status| client.failed(status)) };
        let message =
            if *seen_any { next.await } else { super::client::patiently(terminal, socket, None, next).await };
        let Some(response) = message? else {
            return Err(client.failed(tonic::Status::unavailable("the agent ended the stream")).into());
        };
        (*seen_any, *pause) = (true, FIRST_PAUSE);
        let answer = X509Answer::verify(response, Clock::SYSTEM.now())?;
        let mut text = describe(&answer, since.elapsed());
        text.push_str(&next_update(&answer, Clock::SYSTEM.now().into()));
        terminal.print(&text)?;
        since = tokio::time::Instant::now();
    }
}

/// Agents renew an SVID around half of its life; the first to get there is the next update.
fn next_update(answer: &X509Answer, now: OffsetDateTime) -> String {
    let half = |svid: &VerifiedSvid| svid.leaf.not_before + (svid.leaf.not_after - svid.leaf.not_before) / 2;
    let Some(due) = answer.svids.iter().map(half).min() else { return String::new() };
    let left = Duration::try_from(due - now).unwrap_or_default();
    let left = GoDuration(Duration::from_secs(left.as_secs()));
    format!("Next update expected around {} (in {left})\n\n", go_time(due))
}

/// What spire-agent prints, and the type of each key.
pub(super) fn describe(answer: &X509Answer, took: Duration) -> String {
    let count = answer.svids.len();
    let plural = if count == 1 { "" } else { "s" };
    let mut out = format!("Received {count} svid{plural} after {}\n", GoDuration(took));
    for svid in &answer.svids {
        out.push('\n');
        line(&mut out, "SPIFFE ID:\t\t", svid.spiffe_id.as_str());
        if !svid.hint.is_empty() {
            line(&mut out, "Hint:\t\t\t", &clean(&svid.hint));
        }
        validity(&mut out, "SVID", &svid.leaf);
        line(&mut out, "SVID Key Type:\t\t", &svid.leaf.key_type);
        for (at, intermediate) in svid.intermediates.iter().enumerate() {
            validity(&mut out, &format!("Intermediate #{}", at + 1), intermediate);
        }
        for (at, ca) in svid.bundle.iter().enumerate() {
            validity(&mut out, &format!("CA #{}", at + 1), ca);
        }
        for (trust_domain, bundle) in &answer.federated {
            for (at, ca) in bundle.iter().enumerate() {
                validity(&mut out, &format!("[{}] CA #{}", clean(trust_domain), at + 1), ca);
            }
        }
    }
    out.push('\n');
    out
}

fn line(out: &mut String, name: &str, value: &str) {
    out.push_str(name);
    out.push_str(value);
    out.push('\n');
}

fn validity(out: &mut String, what: &str, cert: &Certificate) {
    let (from, until) = (go_time(cert.not_before), go_time(cert.not_after));
    // Writing to a String does not fail.
    let _ = write!(out, "{what} Valid After:\t{from}\n{what} Valid Until:\t{until}\n");
}

/// protojson with the names of the proto file, keys sorted, on one line.
fn to_json(response: &pb::X509svidResponse) -> serde_json::Value {
    let svids: Vec<_> = response
        .svids
        .iter()
        .map(|svid| {
            json!({
                "spiffe_id": svid.spiffe_id,
                "x509_svid": STANDARD.encode(&svid.x509_svid),
                "x509_svid_key": STANDARD.encode(&svid.x509_svid_key),
                "bundle": STANDARD.encode(&svid.bundle),
                "hint": svid.hint,
            })
        })
        .collect();
    let federated: BTreeMap<_, _> =
        response.federated_bundles.iter().map(|(id, der)| (id, STANDARD.encode(der))).collect();
    let crl: Vec<_> = response.crl.iter().map(|der| STANDARD.encode(der)).collect();
    json!({ "svids": svids, "crl": crl, "federated_bundles": federated })
}

/// Writes all files and gives the lines that say so.
fn write(mut batch: Batch, answer: &X509Answer, dir: &std::path::Path) -> Result<String, Failure> {
    let mut said = String::new();
    let mut say = |what: String, name: &str| {
        let _ = writeln!(said, "Writing {what} to file {}.", dir.join(name).display());
    };
    for (n, svid) in answer.svids.iter().enumerate() {
        let name = format!("svid.{n}.pem");
        batch.stage(&name, svid.chain_pem().as_bytes(), Readers::Everybody)?;
        say(format!("SVID #{n}"), &name);
        let name = format!("svid.{n}.key");
        batch.stage(&name, svid.key_pem().as_bytes(), Readers::Owner)?;
        say(format!("key #{n}"), &name);
        let name = format!("bundle.{n}.pem");
        batch.stage(&name, pem_of(&svid.bundle).as_bytes(), Readers::Everybody)?;
        say(format!("bundle #{n}"), &name);
        for (m, (trust_domain, bundle)) in answer.federated.iter().enumerate() {
            let name = format!("federated_bundle.{n}.{m}.pem");
            batch.stage(&name, pem_of(bundle).as_bytes(), Readers::Everybody)?;
            say(format!("federated bundle #{m} for trust domain {}", clean(trust_domain)), &name);
        }
    }
    batch.commit()?;
    Ok(said)
}
