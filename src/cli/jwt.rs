//! `api fetch jwt` and `api validate jwt`.
//!
//! A token is a bearer's: it is printed by `fetch jwt`, whose purpose that is, and by nothing else.

use std::{collections::BTreeMap, fmt::Write as _};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::ValueEnum;
use prost_types::value::Kind;
use serde_json::{Map, Value, json};
use tonic::Code;

use super::{
    Failure, OutputArgs, OutputFormat,
    call_error::CallError,
    client::{Client, TimeoutArgs},
    socket::SocketArgs,
    terminal::{Terminal, clean},
};
use crate::api::proto::workload as pb;

/// `api fetch jwt`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct FetchJwtArgs {
    /// Who the token is for; separate several by commas (required)
    #[arg(long, value_name = "NAME[,NAME]", value_delimiter = ',')]
    audience: Vec<String>,

    /// Ask only for the token of this SPIFFE ID
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    spiffe_id: String,

    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    timeout: TimeoutArgs,
    /// For people, for programs, or the first token and nothing else
    #[arg(long, value_name = "FORMAT", default_value = "pretty")]
    output: TokenOutput,
}

/// `--output` of `api fetch jwt`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum TokenOutput {
    Pretty,
    Json,
    Token,
}

/// `api validate jwt`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ValidateJwtArgs {
    /// The audience that the token must be for (required)
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    audience: String,

    /// The token (required)
    #[arg(long, value_name = "TOKEN", default_value = "", hide_default_value = true)]
    svid: String,

    #[command(flatten)]
    socket: SocketArgs,
    #[command(flatten)]
    timeout: TimeoutArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `api fetch jwt`: the tokens first, so that whoever has no identity is told so of them, as the agent's audit is.
pub(super) async fn fetch(args: &FetchJwtArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    if args.audience.is_empty() {
        return Err(Failure::Missing("audience"));
    }
    let socket = args.socket.resolve(super::environment)?;
    let client = Client::new(&socket, args.timeout.limit());
    let svids = client.fetch_jwt_svid(terminal, &args.audience, &args.spiffe_id).await;
    let svids = svids.map_err(|error| error.asking_for(&args.spiffe_id))?;
    if args.output == TokenOutput::Token {
        let token = svids.svids.first().map(|svid| clean(&svid.svid)).unwrap_or_default();
        return Ok(terminal.print(&format!("{token}\n"))?);
    }
    let bundles = client.fetch_jwt_bundles(terminal).await?;
    let text = if args.output == TokenOutput::Json {
        format!("{}\n", to_json(&svids, &bundles))
    } else {
        describe(&svids, &bundles)
    };
    Ok(terminal.print(&text)?)
}

/// Runs `api validate jwt`.
pub(super) async fn validate(args: &ValidateJwtArgs, terminal: &mut Terminal) -> Result<(), Failure> {
    for (value, name) in [(&args.audience, "audience"), (&args.svid, "svid")] {
        if value.is_empty() {
            return Err(Failure::Missing(name));
        }
    }
    let socket = args.socket.resolve(super::environment)?;
    let client = Client::new(&socket, args.timeout.limit());
    let response =
        client.validate_jwt_svid(terminal, &args.audience, &args.svid).await.map_err(|err| match err {
            CallError::Status { status, .. } if status.code() == Code::InvalidArgument => {
                Failure::NotValid(clean(status.message()))
            }
            other => Failure::Validate(other),
        })?;
    let claims = response.claims.map(from_struct);
    match args.output.output {
        OutputFormat::Pretty => terminal.print(&format!(
            "SVID is valid.\nSPIFFE ID : {}\nClaims    : {}\n",
            clean(&response.spiffe_id),
            Value::Object(claims.unwrap_or_default())
        ))?,
        OutputFormat::Json => {
            let mut out = Map::from_iter([("spiffe_id".to_owned(), response.spiffe_id.into())]);
            if let Some(claims) = claims {
                out.insert("claims".to_owned(), without_nulls(Value::Object(claims)));
            }
            terminal.print(&format!("{}\n", Value::Object(out)))?;
        }
    }
    Ok(())
}

fn describe(svids: &pb::JwtsvidResponse, bundles: &pb::JwtBundlesResponse) -> String {
    let mut out = String::new();
    // Writing to a String does not fail.
    for svid in &svids.svids {
        let id = clean(&svid.spiffe_id);
        let _ = write!(out, "token({id}):\n\t{}\n", clean(&svid.svid));
        if !svid.hint.is_empty() {
            let _ = write!(out, "hint({id}):\n\t{}\n", clean(&svid.hint));
        }
    }
    for (trust_domain, jwks) in bundles.bundles.iter().collect::<BTreeMap<_, _>>() {
        // As it was sent, lines and all; other control characters are escaped.
        let jwks = String::from_utf8_lossy(jwks);
        let lines: Vec<_> = jwks.split('\n').map(clean).collect();
        let _ = write!(out, "bundle({}):\n\t{}\n", clean(trust_domain), lines.join("\n"));
    }
    out
}

fn to_json(svids: &pb::JwtsvidResponse, bundles: &pb::JwtBundlesResponse) -> Value {
    let svids: Vec<_> = svids
        .svids
        .iter()
        .map(|svid| json!({ "spiffe_id": svid.spiffe_id, "svid": svid.svid, "hint": svid.hint }))
        .collect();
    let bundles: BTreeMap<_, _> =
        bundles.bundles.iter().map(|(id, jwks)| (id, STANDARD.encode(jwks))).collect();
    json!([{ "svids": svids }, { "bundles": bundles }])
}

/// The claims as the JSON they were made of; whole numbers stay whole. pbjson-types does this for a `Struct` of its
/// own, not for the one in the generated code.
pub(super) fn from_struct(claims: prost_types::Struct) -> Map<String, Value> {
    claims.fields.into_iter().map(|(name, value)| (name, from_value(value))).collect()
}

fn from_value(value: prost_types::Value) -> Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => value.into(),
        Some(Kind::StringValue(text)) => text.into(),
        Some(Kind::NumberValue(number)) => from_number(number),
        Some(Kind::ListValue(list)) => list.values.into_iter().map(from_value).collect(),
        Some(Kind::StructValue(inner)) => Value::Object(from_struct(inner)),
    }
}

/// A double holds whole numbers up to 2^53 exactly: times are among them, and must not become `1.7e9`.
fn from_number(number: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if number.fract() == 0.0
        && number.abs() <= EXACT
        && let Ok(whole) = format!("{number:.0}").parse::<i64>()
    {
        return whole.into();
    }
    number.into()
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, without_nulls(v))).collect(),
        ),
        Value::Array(list) => list.into_iter().filter(|v| !v.is_null()).map(without_nulls).collect(),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_the_json_they_were() {
        let of = |kind| prost_types::Value { kind: Some(kind) };
        for (case, kind, want) in [
            ("time", Kind::NumberValue(1_767_225_600.0), "1767225600"),
            ("negative", Kind::NumberValue(-1.0), "-1"),
            ("fraction", Kind::NumberValue(0.5), "0.5"),
            ("large", Kind::NumberValue(1e300), "1e+300"),
            ("no number", Kind::NumberValue(f64::NAN), "null"),
            ("text", Kind::StringValue("a\"b".to_owned()), r#""a\"b""#),
            ("null", Kind::NullValue(0), "null"),
            (
                "list",
                Kind::ListValue(prost_types::ListValue {
                    values: vec![of(Kind::BoolValue(true)), of(Kind::NullValue(0))],
                }),
                "[true,null]",
            ),
        ] {
            assert_eq!(from_value(of(kind)).to_string(), want, "{case}");
        }
        let nested = json!({ "a": null, "b": [null, { "c": null, "d": 1 }] });
        assert_eq!(without_nulls(nested), json!({ "b": [{ "d": 1 }] }));
    }
}
