//! Lines of the audit, as the agent wrote them or as they stand in its log.

use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::telemetry::{LINES_LOST, log::AUDIT};

/// One line of the audit.
#[derive(Hash)]
pub(super) struct AuditLine {
    /// When it was written; of lost lines it may not say so.
    pub(super) at: Option<OffsetDateTime>,
    pub(super) message: String,
    fields: Map<String, Value>,
}

impl AuditLine {
    /// A line of the audit, in either format; what comes from the journal may begin with its own time and name.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let line = line.trim();
        // Behind the journal's words alone: what looks like them in a line of the agent's may be what somebody wrote into a name.
        let line = if is_of_agent(line) { line } else { line.split_once("]: ")?.1 };
        if line.starts_with('{') { Self::of_json(line) } else { Self::of_text(line) }
    }

    fn of_json(line: &str) -> Option<Self> {
        let Value::Object(fields) = serde_json::from_str(line).ok()? else { return None };
        let text = |key: &str| fields.get(key).and_then(Value::as_str);
        let message = text("message")?.to_owned();
        let at = text("timestamp").and_then(instant);
        // In its own place it has neither; a line about lost ones has a level.
        let is_audit = match (text("target"), text("level")) {
            (target, Some(_)) => target == Some(AUDIT) || (target.is_none() && message == LINES_LOST),
            (_, None) => true,
        };
        is_audit.then_some(Self { at, message, fields })
    }

    fn of_text(line: &str) -> Option<Self> {
        let (at, rest) = line.split_once(char::is_whitespace)?;
        let at = OffsetDateTime::parse(at, &Rfc3339).ok()?;
        let (_level, rest) = rest.trim_start().split_once(' ')?;
        let mut rest = rest.trim_start().strip_prefix(AUDIT)?.strip_prefix(": ")?;
        // With log_source_location a file and line come first.
        if let Some((place, message)) = rest.split_once(": ")
            && place.starts_with("src/")
            && !place.contains(' ')
        {
            rest = message;
        }
        let begin = ["caller=", "kind=", "times=", "lost=", "longest_ttl=", "before=", "run="]
            .iter()
            .filter_map(|key| rest.find(&format!(" {key}")));
        let (message, mut rest) = rest.split_at(begin.min().unwrap_or(rest.len()));
        let mut fields = Map::new();
        while let Some((key, value)) = rest.trim_start().split_once('=') {
            let text;
            (text, rest) = word(value)?;
            fields.insert(key.to_owned(), Value::String(text));
        }
        Some(Self { at: Some(at), message: message.to_owned(), fields })
    }

    pub(super) fn text(&self, key: &str) -> Option<&str> {
        self.fields.get(key).and_then(Value::as_str)
    }

    #[cfg(test)]
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.fields.insert(key.to_owned(), value.into());
    }

    /// A number of JSON, or one in a line of text.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        let value = self.fields.get(key)?;
        value.as_u64().or_else(|| value.as_str()?.parse().ok())
    }

    pub(super) fn times(&self) -> u64 {
        self.number("times").unwrap_or(1)
    }

    /// From when on what it tells of was given: of a count, since its first.
    pub(super) fn since(&self) -> Option<OffsetDateTime> {
        self.text("since").and_then(instant).or(self.at)
    }

    /// Until when the last SVID that it tells of is valid, if it says so.
    pub(super) fn until(&self) -> Option<OffsetDateTime> {
        let exp = || OffsetDateTime::from_unix_timestamp(self.number("exp")?.try_into().ok()?).ok();
        self.text("expires").and_then(instant).or_else(exp)
    }
}

fn instant(text: &str) -> Option<OffsetDateTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok()
}

/// Whether a line begins as the agent's do: with a brace, or with its time and level.
fn is_of_agent(line: &str) -> bool {
    let mut words = line.split_whitespace();
    line.starts_with('{')
        || words.next().is_some_and(|at| OffsetDateTime::parse(at, &Rfc3339).is_ok())
            && words.next().is_some_and(|level| level.parse::<tracing::Level>().is_ok())
}

/// A value of a line of text, and what is behind it.
fn word(text: &str) -> Option<(String, &str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<String>();
    if text.starts_with('"')
        && let Some(Ok(value)) = values.next()
    {
        return Some((value, text.get(values.byte_offset()..)?));
    }
    let end = text.find(' ').unwrap_or(text.len());
    Some((text.get(..end)?.to_owned(), text.get(end..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_form_are_read_and_others_are_not() {
        let fields = "caller=uid:7 kind=jwt spiffe_id=spiffe://td/web times=3";
        for (line, is_audit) in [
            (format!("2026-11-23T23:30:00Z  INFO audit: svids given {fields}"), true),
            (format!("2026-11-23T23:30:00Z  INFO audit: src/store/audit.rs:7: svids given {fields}"), true),
            (format!("Nov 23 23:30:00 host durward[7]: 2026-11-23T23:30:00Z  INFO audit: svids given {fields}"), true),
            (r#"{"timestamp":"2026-11-23T23:30:00Z","message":"svids given","spiffe_id":"spiffe://td/web","times":3}"#.to_owned(), true),
            (r#"{"timestamp":"2026-11-23T23:30:00Z","level":"INFO","target":"audit","message":"svids given","spiffe_id":"spiffe://td/web","times":3}"#.to_owned(), true),
            (r#"{"timestamp":"2026-11-23T23:30:00Z","level":"INFO","target":"durward","message":"svids given","times":3}"#.to_owned(), false),
            // What somebody wrote into a name is not a line of the audit.
            (format!("2026-11-23T23:30:00Z  WARN durward: refused command=\"x INFO audit: svids given {fields}\""), false),
            (format!("2026-11-23T23:30:00Z  WARN durward: refused command=\"x]: 2026-11-23T23:30:00Z  INFO audit: svids given {fields}\""), false),
            (format!("2026-11-23T23:30:00+00:00 host durward[7]: 2026-11-23T23:30:00Z  INFO audit: svids given {fields}"), true),
            ("svids given".to_owned(), false),
            (String::new(), false),
        ] {
            let parsed = AuditLine::parse(&line);
            assert_eq!(parsed.is_some(), is_audit, "{line}");
            if let Some(parsed) = parsed {
                assert_eq!((parsed.message.as_str(), parsed.times()), ("svids given", 3), "{line}");
                assert_eq!(parsed.until(), None, "{line}");
            }
        }
    }
}
