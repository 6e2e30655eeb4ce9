//! `bundle show`: what others need to verify the SVIDs of a trust domain.

use clap::ValueEnum;
use serde_json::json;

use super::{
    Failure,
    admin::AdminArgs,
    svid,
    terminal::{Terminal, clean},
};
use crate::api::proto::admin as pb;

/// `bundle show`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct BundleArgs {
    /// The trust domain [default: the agent's own]
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    trust_domain: String,

    /// CA certificates as PEM, or all of the bundle
    ///
    /// pem: the CA certificates. spiffe: the whole bundle in the form of the
    /// SPIFFE standard, for those who federate with it. json: both.
    #[arg(long, value_name = "FORMAT", default_value = "pem", verbatim_doc_comment)]
    output: BundleOutput,

    #[command(flatten)]
    admin: AdminArgs,
}

/// `--output` of `bundle show`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum BundleOutput {
    Pem,
    Spiffe,
    Json,
}

/// Runs `bundle show`.
pub(super) async fn show(args: &BundleArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    let question = pb::BundleRequest { trust_domain: args.trust_domain.clone() };
    let told =
        args.admin.call(terminal, question, async |mut api, request| api.bundle(request).await).await?;
    let text = match args.output {
        BundleOutput::Pem => pem(&told.x509_authorities),
        BundleOutput::Spiffe => lines(&told.spiffe_json),
        BundleOutput::Json => format!(
            "{}\n",
            json!({
                "trust_domain": told.trust_domain,
                "pem": pem(&told.x509_authorities),
                "spiffe": serde_json::from_str::<serde_json::Value>(&told.spiffe_json).unwrap_or_default(),
            })
        ),
    };
    Ok(terminal.print(&text)?)
}

/// As it was sent, line by line, without what could drive a terminal.
fn lines(text: &str) -> String {
    text.lines().map(|line| format!("{}\n", clean(line))).collect()
}

fn pem(certificates: &[Vec<u8>]) -> String {
    certificates.iter().map(|der| svid::pem("CERTIFICATE", der).as_str().to_owned()).collect()
}
