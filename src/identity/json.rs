//! JSON from strangers, read so that two readers cannot see two different things in it.
//!
//! An object that names a member twice is refused, as go-jose does: which of the two counts is up to the reader, and
//! whoever signs, checks and uses a token must see the same. A number that no double can hold is refused. Memory is
//! bounded by the length of the text and by the number of values, since `[[],[],..` takes fifty times its own length;
//! depth by serde_json (128).

use std::{cell::Cell, fmt};

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// How much of a foreign text an error repeats, in characters.
const SHOWN: usize = 128;

/// Parses one JSON value that fills `text` and is made of at most `max_values` values, itself included.
///
/// # Errors
/// serde_json's: a syntax error, a member named twice, too many values, too deep, a number out of range.
pub(super) fn parse(text: &[u8], max_values: usize) -> Result<Value, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = Unambiguous { left: &Cell::new(max_values) }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// Shows the beginning of a foreign text in quotes, with everything unprintable escaped.
pub(super) struct Quoted<'a>(pub(super) &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(SHOWN) {
            None => write!(f, "{:?}", self.0),
            Some((end, _)) => write!(f, "{:?}...", self.0.get(..end).unwrap_or_default()),
        }
    }
}

/// Reads a value; `left` says how many more may be read.
#[derive(Clone, Copy)]
struct Unambiguous<'a> {
    left: &'a Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for Unambiguous<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        let left = self.left.get().checked_sub(1).ok_or_else(|| de::Error::custom("too many values"))?;
        self.left.set(left);
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unambiguous<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members = Map::new();
        while let Some(name) = map.next_key::<String>()? {
            if members.contains_key(&name) {
                return Err(de::Error::custom(format_args!("duplicate key {} in object", Quoted(&name))));
            }
            let value = map.next_value_seed(self)?;
            members.insert(name, value);
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_takes_json_that_has_one_meaning() {
        let deep = format!("{}1{}", "[".repeat(60), "]".repeat(60));
        let too_deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
        let list = |values: usize| format!("[{}]", vec!["[]"; values].join(","));
        let (many, too_many) = (list(999), list(1000));
        let too_many_members = format!("{{\"a\":{many},\"b\":0}}");
        for (case, text, want) in [
            ("everything", r#"{"a":[1,-2,1.5,true,null,"x\u00e9"],"b":{}}"#, Ok(())),
            ("large integer", "12345678901234567890123", Ok(())),
            ("deep", deep.as_str(), Ok(())),
            ("as many as can be", many.as_str(), Ok(())),
            ("one more", too_many.as_str(), Err("too many values")),
            ("more in objects", &too_many_members, Err("too many values")),
            ("twice", r#"{"a":1,"a":1}"#, Err("duplicate key \"a\" in object")),
            ("twice, spelt differently", r#"{"a":1,"\u0061":2}"#, Err("duplicate key \"a\" in object")),
            ("twice, inside", r#"[{"x":{"b":1,"c":2,"b":1}}]"#, Err("duplicate key \"b\" in object")),
            ("too deep", too_deep.as_str(), Err("recursion limit exceeded")),
            ("out of range", "1e400", Err("number out of range")),
            ("trailing", "{} {}", Err("trailing characters")),
            ("not JSON", "{a:1}", Err("key must be a string")),
            ("NaN", "NaN", Err("expected")),
            ("lone surrogate", r#""\ud800""#, Err("unexpected end of hex escape")),
            ("nothing", "", Err("EOF while parsing a value")),
        ] {
            match (parse(text.as_bytes(), 1000), want) {
                (Ok(value), Ok(())) => {
                    assert_eq!(value, serde_json::from_str::<Value>(text).unwrap(), "{case}");
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{case}: {error}"),
                (got, want) => panic!("{case}: {got:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn quoted_is_short_and_printable() {
        for (case, text, want) in [
            ("plain", "ES256", "\"ES256\"".to_owned()),
            ("control", "a\n\u{1b}", "\"a\\n\\u{1b}\"".to_owned()),
            ("long", &"é".repeat(129), format!("\"{}\"...", "é".repeat(128))),
        ] {
            assert_eq!(Quoted(text).to_string(), want, "{case}");
        }
    }
}
