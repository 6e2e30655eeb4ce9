//! `-expandEnv`: variables in the whole text, before it is read, as Go's `os.Expand` does it for spire-agent.

/// Replaces `$NAME` and `${NAME}`, comments included; `$$` becomes `$`, a variable that is not set becomes nothing.
///
/// As in Go: a `$` before anything else stays, `${}` is dropped, and so is a `${` that is never closed.
pub(crate) fn expand(text: &str, value_of: &dyn Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let is_special = |c: char| matches!(c, '*' | '#' | '$' | '@' | '!' | '?' | '-' | '0'..='9');
        let (name, next) = if let Some(inner) = after.strip_prefix('{') {
            match inner.split_once('}') {
                Some(("", next)) => (None, next),
                Some((name, next)) => (Some(name), next),
                None => (None, inner),
            }
        } else {
            let length = match after.chars().next() {
                Some(c) if is_special(c) => 1,
                _ => after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(after.len()),
            };
            if length == 0 {
                out.push('$');
            }
            let (name, next) = after.split_at(length);
            (Some(name).filter(|name| !name.is_empty()), next)
        };
        match name {
            Some("$") => out.push('$'),
            Some(name) => out.push_str(&value_of(name).unwrap_or_default()),
            None => {}
        }
        rest = next;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_replaced_as_go_does() {
        let value_of = |name: &str| match name {
            "TD" => Some("example.org".to_owned()),
            "_x1" => Some("$TD".to_owned()),
            "1" => Some("one".to_owned()),
            _ => None,
        };
        for (text, want) in [
            ("a = \"$TD\"", "a = \"example.org\""),
            ("${TD}x$TD/", "example.orgxexample.org/"),
            ("$_x1", "$TD"),
            ("[$unset][${unset}]", "[][]"),
            ("$$TD ${$}", "$TD $"),
            ("100$ $, $", "100$ $, $"),
            ("$12", "one2"),
            ("${}x", "x"),
            ("${never", "never"),
            ("${a b}x", "x"),
            ("# $TD\n", "# example.org\n"),
            ("\u{e9}$\u{e9}", "\u{e9}$\u{e9}"),
        ] {
            assert_eq!(expand(text, &value_of), want, "{text}");
        }
    }
}
