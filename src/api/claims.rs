//! Claims of a validated token as ValidateJWTSVID answers them: JSON as a `google.protobuf.Struct`.
//!
//! Every number becomes a double, so an integer above 2^53 loses its last digits, as in spire-agent. The depth is
//! bounded by whoever parsed the JSON.

use prost_types::{ListValue, NullValue, Struct, value::Kind};
use serde_json::{Map, Value};

/// Converts `claims`. A single `aud` becomes a list of one: workloads have always been answered with a list (SPIRE:
/// `pkg/agent/endpoints/workload/handler.go`).
pub fn claims_to_struct(claims: Map<String, Value>) -> Struct {
    let mut answer = object(claims);
    if let Some(aud) = answer.fields.get_mut("aud")
        && matches!(aud.kind, Some(Kind::StringValue(_)))
    {
        let one = std::mem::take(aud);
        aud.kind = Some(Kind::ListValue(ListValue { values: vec![one] }));
    }
    answer
}

fn object(members: Map<String, Value>) -> Struct {
    Struct { fields: members.into_iter().map(|(name, member)| (name, value(member))).collect() }
}

fn value(value_of: Value) -> prost_types::Value {
    let kind = match value_of {
        Value::Null => Kind::NullValue(NullValue::NullValue.into()),
        Value::Bool(bool) => Kind::BoolValue(bool),
        // Always a double: what serde_json parses as a number is finite.
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(values) => {
            Kind::ListValue(ListValue { values: values.into_iter().map(value).collect() })
        }
        Value::Object(members) => Kind::StructValue(object(members)),
    };
    prost_types::Value { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The way back, by the mapping that the protobuf documentation has.
    fn json_of(kind: &prost_types::Value) -> Value {
        match kind.kind.as_ref().unwrap() {
            Kind::NullValue(_) => Value::Null,
            Kind::BoolValue(bool) => json!(bool),
            Kind::NumberValue(number) => json!(number),
            Kind::StringValue(text) => json!(text),
            Kind::ListValue(list) => list.values.iter().map(json_of).collect(),
            Kind::StructValue(object) => struct_of(object),
        }
    }

    fn struct_of(object: &Struct) -> Value {
        Value::Object(object.fields.iter().map(|(name, value)| (name.clone(), json_of(value))).collect())
    }

    #[test]
    fn claims_become_a_struct() {
        for (case, claims, want) in [
            ("nothing", json!({}), json!({})),
            ("aud alone", json!({"aud": "a"}), json!({"aud": ["a"]})),
            ("aud in a list", json!({"aud": ["a", "b"]}), json!({"aud": ["a", "b"]})),
            ("no aud", json!({"aud": null}), json!({"aud": null})),
            ("aud elsewhere", json!({"x": {"aud": "a"}}), json!({"x": {"aud": "a"}})),
            (
                "every type",
                json!({"n": -1, "u": u64::MAX, "f": 1.5, "b": true, "z": null, "l": [1, [], {}], "s": ""}),
                json!({"n": -1.0, "u": 18_446_744_073_709_551_616.0, "f": 1.5, "b": true, "z": null,
                    "l": [1.0, [], {}], "s": ""}),
            ),
        ] {
            let Value::Object(claims) = claims else { panic!("{case}: claims are an object") };
            assert_eq!(struct_of(&claims_to_struct(claims)), want, "{case}");
        }
    }
}
