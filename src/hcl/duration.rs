//! Durations as Go writes them: `1h30m`, `500ms`, `1.5s`.

use std::time::Duration;

const UNITS: [(&str, u128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("\u{b5}s", 1_000),
    ("\u{3bc}s", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Parses what Go's `time.ParseDuration` accepts, without negative ones; up to about 292 years, as Go.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.strip_prefix('+').unwrap_or(text);
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut nanos = 0_u128;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (name, next) = after.split_at(end);
        let unit = UNITS.iter().find(|(unit, _)| *unit == name)?.1;
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse::<u64>().ok()?.into() };
        nanos = nanos.checked_add(whole.checked_mul(unit)?)?;
        // Digits below a nanosecond are dropped, as Go does.
        let mut scale = unit;
        for digit in fraction.bytes() {
            scale /= 10;
            nanos += u128::from(digit - b'0') * scale;
        }
        rest = next;
    }
    let nanos = u64::try_from(nanos).ok().filter(|_| !text.is_empty())?;
    i64::try_from(nanos).ok().map(|_| Duration::from_nanos(nanos))
}

/// How a duration is written right that was meant in a unit which Go has not, or by another name: `24h` for `1d`.
pub(super) fn in_known_units(text: &str) -> Option<String> {
    let (count, unit) = digits(text);
    let (each, unit) = match unit.trim().to_ascii_lowercase().as_str() {
        "w" | "week" | "weeks" => (168, "h"),
        "d" | "day" | "days" => (24, "h"),
        "h" | "hr" | "hrs" | "hour" | "hours" => (1, "h"),
        "m" | "min" | "mins" | "minute" | "minutes" => (1, "m"),
        "s" | "sec" | "secs" | "second" | "seconds" => (1, "s"),
        "ms" | "msec" | "millisecond" | "milliseconds" => (1, "ms"),
        _ => return None,
    };
    let right = format!("{}{unit}", count.parse::<u64>().ok()?.checked_mul(each)?);
    parse_duration(&right).map(|_| right)
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// Writes a duration so that [`parse_duration`] reads it again: `1h30m`, `500ms`; `0s` for none.
pub fn show_duration(duration: Duration) -> String {
    if duration.is_zero() {
        return "0s".to_owned();
    }
    let mut left = duration.as_nanos();
    let mut text = String::new();
    for (name, unit) in [
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("us", 1_000),
        ("ns", 1),
    ] {
        let count: u128 = left / unit;
        if count > 0 {
            text.push_str(&format!("{count}{name}"));
            left %= unit;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations_are_gos() {
        for (text, want) in [
            ("0", Some(Duration::ZERO)),
            ("0s", Some(Duration::ZERO)),
            ("5m", Some(Duration::from_secs(300))),
            ("1h30m", Some(Duration::from_secs(5400))),
            ("500ms", Some(Duration::from_millis(500))),
            ("1.5s", Some(Duration::from_millis(1500))),
            (".5s", Some(Duration::from_millis(500))),
            ("1.s", Some(Duration::from_secs(1))),
            ("1us2\u{b5}s3\u{3bc}s4ns", Some(Duration::from_nanos(6004))),
            ("+1s", Some(Duration::from_secs(1))),
            ("0.0000000001s", Some(Duration::ZERO)),
            ("", None),
            ("+", None),
            (".", None),
            (".s", None),
            ("5", None),
            ("5 m", None),
            ("m", None),
            ("5d", None),
            ("-5m", None),
            ("5M", None),
            ("9999999999999h", None),
            ("99999999999999999999999h", None),
            ("1\u{e9}", None),
        ] {
            assert_eq!(parse_duration(text), want, "{text}");
        }
    }

    #[test]
    fn other_units_are_put_right() {
        for (text, want) in [
            ("1d", Some("24h")),
            ("2 days", Some("48h")),
            ("1w", Some("168h")),
            ("5min", Some("5m")),
            ("5 M", Some("5m")),
            ("30 sec", Some("30s")),
            ("x", None),
            ("", None),
            ("d", None),
            ("5", None),
            ("5 parsecs", None),
            ("99999999999999999999d", None),
            ("9999999999999d", None),
        ] {
            assert_eq!(in_known_units(text).as_deref(), want, "{text}");
        }
    }

    proptest! {
        #[test]
        fn shown_is_read_again(nanos in 0..i64::MAX.unsigned_abs()) {
            let duration = Duration::from_nanos(nanos);
            prop_assert_eq!(parse_duration(&show_duration(duration)), Some(duration));
        }

        #[test]
        fn any_text_is_answered(text in "\\PC{0,20}|[0-9.]{0,30}(h|m|s|ms)") {
            let _ = parse_duration(&text);
        }
    }
}
