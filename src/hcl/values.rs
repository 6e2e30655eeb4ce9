//! Reading the value of a key, with its type and bounds.

use std::{
    collections::BTreeSet,
    fmt,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    duration::{in_known_units, parse_duration, show_duration},
    section::{At, Section},
    tree::{Member, Place, Value, quoted},
};

impl<'a> Section<'a> {
    fn wrong_type<T>(&self, member: &Member, key: &str, want: &str) -> Option<T> {
        let got = member.node.value.kind();
        self.wrong(member.place, key, Some(member.node.value.shown()), format!("must be {want}, not {got}"));
        None
    }

    /// What was made of the value at `place`, which a message shows as `shown`; an error is reported.
    fn made<T, E: fmt::Display>(
        &self,
        key: &str,
        place: Place,
        shown: &str,
        made: Result<T, E>,
    ) -> Option<At<T>> {
        let made = made.map_err(|err| self.wrong(place, key, Some(quoted(shown)), err));
        made.ok().map(|value| At { value, place })
    }

    /// A string; a number counts as its text, as in spire-agent.
    pub(crate) fn string(&mut self, key: &'static str) -> Option<At<&'a str>> {
        let member = self.take(key)?;
        match &member.node.value {
            Value::String(text) | Value::Number(text) => Some(At { value: text, place: member.place }),
            _ => self.wrong_type(member, key, "a string"),
        }
    }

    /// A string in quotes, where a number is a mistake.
    pub(crate) fn quoted_string(&mut self, key: &'static str) -> Option<At<&'a str>> {
        let member = self.take(key)?;
        match &member.node.value {
            Value::String(text) => Some(At { value: text, place: member.place }),
            _ => self.wrong_type(member, key, "a string"),
        }
    }

    /// A string; an empty one counts as not set.
    pub(crate) fn text(&mut self, key: &'static str) -> Option<At<String>> {
        let text = self.string(key)?;
        (!text.value.is_empty()).then(|| text.map(str::to_owned))
    }

    /// A string that `parse` understands; `None` reports `right`.
    pub(crate) fn parsed<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&'a str) -> Option<T>,
        right: impl fmt::Display,
    ) -> Option<At<T>> {
        self.checked(key, |text| parse(text).ok_or(right))
    }

    /// A string that `parse` understands; its error says what would be right.
    pub(crate) fn checked<T, E: fmt::Display>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&'a str) -> Result<T, E>,
    ) -> Option<At<T>> {
        let text = self.string(key)?;
        self.made(key, text.place, text.value, parse(text.value))
    }

    /// A path, made absolute from the working directory as spire-agent does.
    pub(crate) fn absolute(&mut self, key: &'static str) -> Option<At<PathBuf>> {
        let good = |text: &str| !text.is_empty() && !text.contains('\0');
        let text = self.parsed(key, |text| good(text).then_some(text), "must be a path")?;
        Some(text.map(|text| self.problems().base.join(text)))
    }

    /// The same; an empty text counts as not set.
    pub(crate) fn file(&mut self, key: &'static str) -> Option<At<PathBuf>> {
        let text = self.text(key)?;
        let made = if text.value.contains('\0') {
            Err("must be a path")
        } else {
            Ok(self.problems().base.join(&text.value))
        };
        self.made(key, text.place, &text.value, made)
    }

    /// The absolute path in the address of a Workload API, `unix:///path`; an empty text counts as not set.
    pub(crate) fn endpoint(&mut self, key: &'static str) -> Option<At<PathBuf>> {
        let text = self.text(key)?;
        let path = text.value.strip_prefix("unix:").map(|rest| rest.strip_prefix("//").unwrap_or(rest));
        let made = match path.filter(|path| path.starts_with('/') && !path.contains(['\0', '?', '#'])) {
            Some(path) => Ok(PathBuf::from(path)),
            None => {
                Err("is not a valid SPIFFE Workload API endpoint address: must be unix:///path of a socket")
            }
        };
        self.made(key, text.place, &text.value, made)
    }

    /// A path with which `check`, once it is absolute, finds nothing wrong.
    pub(crate) fn absolute_that<E: fmt::Display>(
        &mut self,
        key: &'static str,
        check: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Option<At<PathBuf>> {
        let path = self.absolute(key)?;
        let checked = check(&path.value).map(|()| path.value.clone());
        self.made(key, path.place, &path.value.to_string_lossy(), checked)
    }

    /// `true` or `false`, without quotes.
    pub(crate) fn boolean(&mut self, key: &'static str) -> Option<At<bool>> {
        let member = self.take(key)?;
        match member.node.value {
            Value::Bool(value) => Some(At { value, place: member.place }),
            _ => self.wrong_type(member, key, "true or false, without quotes"),
        }
    }

    /// A whole number in `range`; digits in quotes count too, as in spire-agent.
    pub(crate) fn integer<T>(&mut self, key: &'static str, range: RangeInclusive<T>) -> Option<At<T>>
    where
        T: TryFrom<i64> + TryInto<i64>,
    {
        let (least, most) = range.into_inner();
        let (least, most) = (least.try_into().unwrap_or(i64::MIN), most.try_into().unwrap_or(i64::MAX));
        #[cfg(test)]
        self.problems()
            .asked
            .borrow_mut()
            .bounds
            .insert(self.path(key), [least.to_string(), most.to_string()]);
        let member = self.take(key)?;
        let (Value::Number(text) | Value::String(text)) = &member.node.value else {
            return self.wrong_type(member, key, "a whole number");
        };
        let value = parse_integer(text).filter(|value| (least..=most).contains(value));
        let value = value.and_then(|value| T::try_from(value).ok());
        if value.is_none() {
            let right = match (least, most) {
                (i64::MIN, i64::MAX) => "must be a whole number".to_owned(),
                (least, i64::MAX) => format!("must be a whole number of at least {least}"),
                (least, most) => format!("must be a whole number from {least} to {most}"),
            };
            self.wrong(member.place, key, Some(member.node.value.shown()), right);
        }
        value.map(|value| At { value, place: member.place })
    }

    /// A number, with a fraction or without, and as it was written; digits in quotes count too.
    pub(crate) fn number(&mut self, key: &'static str) -> Option<At<(f64, &'a str)>> {
        let member = self.take(key)?;
        let (Value::Number(text) | Value::String(text)) = &member.node.value else {
            return self.wrong_type(member, key, "a number");
        };
        let value = text.parse().ok().filter(|value: &f64| value.is_finite());
        if value.is_none() {
            let right = "must be a number such as 100 or 0.5";
            self.wrong(member.place, key, Some(member.node.value.shown()), right);
        }
        value.map(|value| At { value: (value, &**text), place: member.place })
    }

    /// A duration in `range`, as Go writes it: `"1h30m"`.
    pub(crate) fn duration(
        &mut self,
        key: &'static str,
        range: RangeInclusive<Duration>,
    ) -> Option<At<Duration>> {
        #[cfg(test)]
        self.problems().asked.borrow_mut().bounds.insert(
            self.path(key),
            [*range.start(), *range.end()].map(|bound| format!("\"{}\"", show_duration(bound))),
        );
        let member = self.take(key)?;
        let (Value::String(text) | Value::Number(text)) = &member.node.value else {
            return self.wrong_type(member, key, "a duration in quotes such as \"1h30m\"");
        };
        let right = match parse_duration(text) {
            None => match in_known_units(text) {
                Some(right) => {
                    format!("the units of a duration are h, m, s and ms: write {}", quoted(&right))
                }
                None => "must be a duration such as \"1h30m\", \"10s\" or \"500ms\"".to_owned(),
            },
            Some(value) if range.contains(&value) => return Some(At { value, place: member.place }),
            Some(_) if *range.end() == Duration::MAX => {
                format!("must be at least {}", show_duration(*range.start()))
            }
            Some(_) => {
                format!("must be from {} to {}", show_duration(*range.start()), show_duration(*range.end()))
            }
        };
        self.wrong(member.place, key, Some(member.node.value.shown()), right);
        None
    }

    /// A list of strings, each with its place; a number counts as its text.
    pub(crate) fn strings(&mut self, key: &'static str) -> Option<At<Vec<At<&'a str>>>> {
        let member = self.take(key)?;
        let Value::List(items) = &member.node.value else {
            return self.wrong_type(member, key, "a list of strings such as [\"a\", \"b\"]");
        };
        let mut texts = Vec::with_capacity(items.len());
        for item in items {
            match &item.value {
                Value::String(text) | Value::Number(text) => {
                    texts.push(At { value: &**text, place: item.place });
                }
                other => {
                    let message = format!("must be a list of strings, and holds {}", other.kind());
                    self.wrong(item.place, key, Some(other.shown()), message);
                }
            }
        }
        Some(At { value: texts, place: member.place })
    }

    /// A list of strings, sorted and each once: for lists of which the order means nothing.
    pub(crate) fn texts(&mut self, key: &'static str) -> Option<At<Vec<String>>> {
        let list = self.strings(key)?;
        let texts: BTreeSet<&str> = list.value.iter().map(|text| text.value).collect();
        Some(At { value: texts.into_iter().map(str::to_owned).collect(), place: list.place })
    }
}

/// A whole number as written: decimal, or hexadecimal with `0x`.
fn parse_integer(text: &str) -> Option<i64> {
    let (sign, digits) = text.strip_prefix('-').map_or(("", text), |digits| ("-", digits));
    if digits.starts_with(['+', '-']) {
        return None;
    }
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) if !hex.starts_with(['+', '-']) => i64::from_str_radix(&format!("{sign}{hex}"), 16).ok(),
        Some(_) => None,
        None => text.parse().ok(),
    }
}
