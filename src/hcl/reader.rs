//! From text to [`tree`](super::tree): HCL 1 as spire-agent reads it, and JSON.
//!
//! The text is an admin's, and may be anything: depth, and with it the stack, is bounded; nothing panics; the first
//! thing that cannot be read ends the text with its place.
//!
//! # Decisions
//! Written here, and not left to a crate: the HCL crates of Rust read HCL 2, which refuses what HCL 1 files hold
//! (quoted keys, two settings on a line, hexadecimal numbers, `"${A:-b}"`, `\x41`) and quietly reads others
//! differently (`0755`); half of that grammar is expressions that agent.conf never had. Of JSON only the places are
//! ours: whether a text is JSON, and what its strings mean, `serde_json` says.

use std::{char, fmt};

use super::tree::{Member, Node, Place, Value, abridged, quoted};

/// What people, and their editors, write in the place of double quotes.
const QUOTES: [char; 8] = ['\'', '`', '“', '”', '„', '‘', '’', '«'];

/// Blocks, lists and labels within each other, counted together.
const MAX_DEPTH: usize = 32;

/// The text cannot be read on from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub(crate) place: Place,
    pub(crate) message: String,
}

/// Reads a whole text: JSON when its first character that is no space is `{`, else HCL.
pub(crate) fn read(file: u32, text: &str) -> Result<Node, SyntaxError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let json = text.trim_start().starts_with('{');
    let mut reader = Reader { json, rest: text, place: Place { file, line: 1, column: 1 } };
    if json {
        check_json(file, text)?;
        reader.skip_space()?;
        return reader.value(0);
    }
    let place = reader.place;
    let members = reader.members(None, 0)?;
    Ok(Node { place, value: Value::Object(members) })
}

fn check_json(file: u32, text: &str) -> Result<(), SyntaxError> {
    serde_json::from_str::<serde::de::IgnoredAny>(text).map(|_| ()).map_err(|err| {
        let (mut before, found) = around(text, &err);
        let mut said = without_place(&err);
        let hint = if let Some(close @ (']' | '}')) = found.chars().next()
            && let Some(upto) = before.trim_end().strip_suffix(',')
        {
            before = upto;
            said = format!("a comma before {close}");
            "; leave this comma out"
        } else if found.starts_with('#') || found.starts_with("//") || found.starts_with("/*") {
            "; JSON has no comments: leave it out, or write the file in HCL"
        } else {
            ""
        };
        let mut place = Place { file, line: 1, column: 1 };
        pass(before, &mut place);
        SyntaxError { place, message: format!("not JSON: {said}{hint}") }
    })
}

/// What stands before the place of `err`, and what from there on.
fn around<'a>(text: &'a str, err: &serde_json::Error) -> (&'a str, &'a str) {
    let above: usize = text.split_inclusive('\n').take(err.line().saturating_sub(1)).map(str::len).sum();
    let line = text.get(above..).unwrap_or_default();
    // Counted in bytes, and none at the beginning of a line.
    let left = line.char_indices().map(|(at, _)| at).take_while(|at| *at < err.column()).last();
    text.split_at_checked(above + left.unwrap_or(0)).unwrap_or((text, ""))
}

/// Moves `place` behind `text`. A line ends with a line feed, or with a carriage return alone.
fn pass(text: &str, place: &mut Place) {
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        step(c, chars.peek().copied(), place);
    }
}

/// Moves `place` behind `c`, which `next` follows.
fn step(c: char, next: Option<char>, place: &mut Place) {
    if c == '\n' || (c == '\r' && next != Some('\n')) {
        place.line = place.line.saturating_add(1);
        place.column = 1;
    } else {
        place.column = place.column.saturating_add(1);
    }
}

fn without_place(err: &serde_json::Error) -> String {
    let message = err.to_string();
    message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what).to_owned()
}

struct Reader<'a> {
    json: bool,
    rest: &'a str,
    place: Place,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn bump(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let c = chars.next()?;
        self.rest = chars.as_str();
        step(c, self.peek(), &mut self.place);
        Some(c)
    }

    /// Takes characters while they fit.
    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> &'a str {
        let start = self.rest;
        while self.peek().is_some_and(&fits) {
            self.bump();
        }
        self.since(start)
    }

    /// What was taken since the rest was `start`.
    fn since(&self, start: &'a str) -> &'a str {
        start.get(..start.len() - self.rest.len()).unwrap_or_default()
    }

    /// Takes `token` if it comes next.
    fn eat(&mut self, token: &str) -> bool {
        if !self.rest.starts_with(token) {
            return false;
        }
        for _ in token.chars() {
            self.bump();
        }
        true
    }

    fn fail<T>(&self, message: impl fmt::Display) -> Result<T, SyntaxError> {
        fail_at(self.place, message)
    }

    fn found(&self) -> String {
        self.peek().map_or_else(|| "the end of the file".to_owned(), |c| quoted(&c.to_string()))
    }

    /// Space, and in HCL comments: `#`, `//` and `/* */`.
    fn skip_space(&mut self) -> Result<(), SyntaxError> {
        loop {
            self.take_while(char::is_whitespace);
            if self.json {
                return Ok(());
            }
            if self.rest.starts_with('#') || self.rest.starts_with("//") {
                let start = self.place;
                // One at the end of a line belongs to it. One within ends a line for whoever wrote it, and would hide the next.
                let comment = self.take_while(|c| c != '\n').trim_end_matches('\r');
                if comment.contains('\r') {
                    let wrong = "this comment holds carriage returns that no line feed follows: save the file with line feeds";
                    return fail_at(start, wrong);
                }
            } else if self.rest.starts_with("/*") {
                let start = self.place;
                self.eat("/*");
                while !self.eat("*/") {
                    if self.bump().is_none() {
                        return fail_at(start, "a comment begins here that never ends: */ is missing");
                    }
                }
            } else {
                return Ok(());
            }
        }
    }

    /// The members of an object, up to its closing brace (`opened` says where it began) or the end of the file.
    fn members(&mut self, opened: Option<Place>, depth: usize) -> Result<Vec<Member>, SyntaxError> {
        let mut members = Vec::new();
        loop {
            self.skip_space()?;
            match (self.peek(), opened) {
                (Some('}'), Some(_)) => {
                    self.bump();
                    return Ok(members);
                }
                (Some('}'), None) => return self.fail("this } closes nothing"),
                (None, None) => return Ok(members),
                (None, Some(opened)) => return fail_at(opened, "this { is never closed: } is missing"),
                (Some(_), _) => members.push(self.member(depth)?),
            }
            self.skip_space()?;
            self.eat(",");
        }
    }

    /// `key = value`, `key "label" { .. }`, or in JSON `"key": value`.
    fn member(&mut self, depth: usize) -> Result<Member, SyntaxError> {
        let (first, place) = self.key()?;
        let mut labels = Vec::new();
        loop {
            self.skip_space()?;
            match self.peek() {
                Some(':') if self.json => {
                    self.bump();
                    self.skip_space()?;
                    let node = self.value(depth + 1)?;
                    return Ok(Member { key: first, place, node });
                }
                Some('=') => {
                    if !labels.is_empty() {
                        return self.fail("a block with a label takes { and not =");
                    }
                    self.bump();
                    self.skip_space()?;
                    let node = self.value(depth + 1)?;
                    return Ok(Member { key: first, place, node });
                }
                Some('{') => {
                    // The depth counts labels too, or the tree could be deeper than the stack of whoever drops it.
                    let node = self.value(depth + 1 + labels.len())?;
                    let wrap = |node: Node, (key, place): (Box<str>, Place)| Node {
                        place,
                        value: Value::Object(vec![Member { key, place, node }]),
                    };
                    let node = labels.into_iter().rev().fold(node, wrap);
                    return Ok(Member { key: first, place, node });
                }
                Some('"') => labels.push(self.key()?),
                Some(c) if is_key_start(c) => labels.push(self.key()?),
                // entry spiffe://..
                Some(':') => {
                    let found = self.found();
                    return self.fail(format_args!(
                        "expected = or {{ after a key, found {found}: a text such as a SPIFFE ID must be in double quotes"
                    ));
                }
                _ => return self.fail(format_args!("expected = or {{ after a key, found {}", self.found())),
            }
            if labels.len() > MAX_DEPTH {
                return self.too_deep();
            }
        }
    }

    fn key(&mut self) -> Result<(Box<str>, Place), SyntaxError> {
        let place = self.place;
        match self.peek() {
            Some('"') => Ok((self.string()?.into(), place)),
            Some(c) if is_key_start(c) => {
                let fits = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.');
                Ok((self.take_while(fits).into(), place))
            }
            _ => self.fail(format_args!("expected a key, found {}", self.found())),
        }
    }

    fn too_deep<T>(&self) -> Result<T, SyntaxError> {
        self.fail(format_args!("nested too deeply: at most {MAX_DEPTH} blocks and lists within each other"))
    }

    fn value(&mut self, depth: usize) -> Result<Node, SyntaxError> {
        if depth > MAX_DEPTH {
            return self.too_deep();
        }
        let place = self.place;
        let value = match self.peek() {
            Some('"') => Value::String(self.string()?.into()),
            Some('{') => {
                self.bump();
                Value::Object(self.members(Some(place), depth)?)
            }
            Some('[') => {
                self.bump();
                Value::List(self.list(place, depth)?)
            }
            Some('<') if !self.json => Value::String(self.heredoc()?.into()),
            Some(c) if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => self.number()?,
            Some(c) if is_key_start(c) => {
                let word = self.take_while(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '.'));
                match word {
                    "true" => Value::Bool(true),
                    "false" => Value::Bool(false),
                    "null" if self.json => Value::Null,
                    word => return fail_at(place, format_args!("text must be in quotes: {}", quoted(word))),
                }
            }
            Some(c) if QUOTES.contains(&c) => {
                let line = self.rest.lines().next().unwrap_or_default();
                // Up to the next of them.
                let end = line.char_indices().skip(1).find(|(_, c)| QUOTES.contains(c));
                let found = end.and_then(|(at, c)| line.get(..at + c.len_utf8())).unwrap_or(line);
                let found = abridged(found.trim_end()).escape_debug().to_string().replace("\\'", "'");
                let right = "expected a value in double quotes, like \"example.org\"";
                return fail_at(place, format_args!("{right}, found {found}"));
            }
            _ => return self.fail(format_args!("expected a value, found {}", self.found())),
        };
        Ok(Node { place, value })
    }

    fn list(&mut self, opened: Place, depth: usize) -> Result<Vec<Node>, SyntaxError> {
        let mut items = Vec::new();
        loop {
            self.skip_space()?;
            match self.peek() {
                None => return fail_at(opened, "this [ is never closed: ] is missing"),
                Some(']') => {
                    self.bump();
                    return Ok(items);
                }
                Some(_) => items.push(self.value(depth + 1)?),
            }
            self.skip_space()?;
            if !self.eat(",") && self.peek().is_some_and(|c| c != ']') {
                return self.fail(format_args!("expected , or ] in a list, found {}", self.found()));
            }
        }
    }

    /// A decimal or `0x` integer, or a decimal fraction.
    fn number(&mut self) -> Result<Value, SyntaxError> {
        let place = self.place;
        let text = self.take_while(|c| c.is_alphanumeric() || matches!(c, '.' | '+' | '-' | '_'));
        let digits = text.strip_prefix('-').unwrap_or(text);
        let all_digits = digits.bytes().all(|b| b.is_ascii_digit());
        if all_digits && digits.len() > 1 && digits.starts_with('0') {
            let octal = i64::from_str_radix(digits, 8)
                .map_or_else(|_| String::new(), |value| format!(" (spire-agent reads octal: {value})"));
            let plain = digits.trim_start_matches('0');
            let plain = if plain.is_empty() { "0" } else { plain };
            return fail_at(
                place,
                format_args!(
                    "{text}: a number cannot begin with 0{octal}; decimal is {plain}, hexadecimal 0x.."
                ),
            );
        }
        let hexadecimal = digits
            .strip_prefix("0x")
            .or_else(|| digits.strip_prefix("0X"))
            .is_some_and(|hex| !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_hexdigit()));
        let fraction = || {
            digits.starts_with(|c: char| c.is_ascii_digit())
                && digits.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'))
                && digits.parse::<f64>().is_ok_and(f64::is_finite)
        };
        let integer = all_digits && !digits.is_empty();
        if integer || hexadecimal || fraction() {
            Ok(Value::Number(text.into()))
        } else {
            fail_at(place, format_args!("not a number; text must be in quotes: {}", quoted(text)))
        }
    }

    /// A text in double quotes, on one line.
    fn string(&mut self) -> Result<String, SyntaxError> {
        let place = self.place;
        let unclosed = || fail_at(place, "this text is never closed: \" is missing on the same line");
        let start = self.rest;
        self.bump();
        if self.json {
            loop {
                match self.bump() {
                    None => return unclosed(),
                    Some('\\') => {
                        self.bump();
                    }
                    Some('"') => break,
                    Some(_) => {}
                }
            }
            let literal = self.since(start);
            return serde_json::from_str(literal)
                .or_else(|err| fail_at(place, format_args!("not JSON: {}", without_place(&err))));
        }
        let mut text = String::new();
        // Within ${ } a quote ends nothing; the text is kept as it is.
        let mut braces = 0_u32;
        loop {
            match self.peek() {
                None | Some('\n') => return unclosed(),
                Some('"') if braces == 0 => {
                    self.bump();
                    return Ok(text);
                }
                Some('\\') if braces == 0 => text.push(self.escape()?),
                Some('$') => {
                    self.bump();
                    text.push('$');
                    if braces == 0 && self.eat("{") {
                        text.push('{');
                        braces = 1;
                    }
                }
                Some(c) => {
                    self.bump();
                    text.push(c);
                    match c {
                        '{' if braces > 0 => braces = braces.saturating_add(1),
                        '}' => braces = braces.saturating_sub(1),
                        _ => {}
                    }
                }
            }
        }
    }

    /// Go's escapes, as HCL 1 has them: `\n`, `\"`, `\x41`, `\101`, `\u0041`, `\U00000041`.
    fn escape(&mut self) -> Result<char, SyntaxError> {
        let place = self.place;
        self.bump();
        let Some(c) = self.peek() else { return fail_at(place, "nothing follows this \\") };
        let (radix, digits) = match c {
            'x' => (16, 2),
            'u' => (16, 4),
            'U' => (16, 8),
            '0'..='7' => (8, 3),
            'a' | 'b' | 'f' | 'n' | 'r' | 't' | 'v' | '\\' | '"' => {
                self.bump();
                return Ok(match c {
                    'a' => '\x07',
                    'b' => '\x08',
                    'f' => '\x0c',
                    'n' => '\n',
                    'r' => '\r',
                    't' => '\t',
                    'v' => '\x0b',
                    same => same,
                });
            }
            other => {
                return fail_at(
                    place,
                    format_args!("unknown escape \\{}: a backslash is \\\\", other.escape_debug()),
                );
            }
        };
        if radix == 16 {
            self.bump();
        }
        let mut code = 0_u32;
        for _ in 0..digits {
            let Some(digit) = self.peek().and_then(|c| c.to_digit(radix)) else {
                return fail_at(place, format_args!("\\{c} needs {digits} digits in base {radix}"));
            };
            self.bump();
            code = code.saturating_mul(radix).saturating_add(digit);
        }
        match char::from_u32(code) {
            // In Go \x and octal are bytes, of which only these are whole characters.
            Some(c) if code < 0x80 || matches!(digits, 4 | 8) => Ok(c),
            _ => fail_at(place, "this escape is no character; write the character itself"),
        }
    }

    /// `<<EOF` and `<<-EOF`: lines as they are, up to one that holds nothing but the word.
    fn heredoc(&mut self) -> Result<String, SyntaxError> {
        let place = self.place;
        if !self.eat("<<") {
            return self.fail(format_args!("expected a value, found {}", self.found()));
        }
        let indented = self.eat("-");
        let word = self.take_while(|c| c.is_alphanumeric() || c == '_');
        self.eat("\r");
        if word.is_empty() || !self.eat("\n") {
            return fail_at(place, "<< needs a word and then a new line: <<EOF");
        }
        let mut lines: Vec<&str> = Vec::new();
        loop {
            if self.rest.is_empty() {
                return fail_at(place, format_args!("this text is never closed: a line {word} is missing"));
            }
            let line = self.take_while(|c| c != '\n');
            if line.trim() == word {
                break;
            }
            self.bump();
            lines.push(line);
        }
        let indent = |line: &&str| line.len() - line.trim_start_matches([' ', '\t']).len();
        let cut = if indented { lines.iter().map(indent).min().unwrap_or(0) } else { 0 };
        Ok(lines.iter().flat_map(|line| [line.get(cut..).unwrap_or_default(), "\n"]).collect())
    }
}

fn is_key_start(c: char) -> bool {
    c.is_alphabetic() || c == '_'
}

fn fail_at<T>(place: Place, message: impl fmt::Display) -> Result<T, SyntaxError> {
    Err(SyntaxError { place, message: message.to_string() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The tree as compact text.
    fn show(node: &Node) -> String {
        match &node.value {
            Value::Object(members) => {
                let members: Vec<String> =
                    members.iter().map(|m| format!("{}={}", m.key, show(&m.node))).collect();
                format!("{{{}}}", members.join(" "))
            }
            Value::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(" ")),
            Value::String(text) => format!("{text:?}"),
            Value::Number(text) => text.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::Null => "null".to_owned(),
        }
    }

    #[test]
    fn what_spire_agents_files_hold_is_read() {
        for (case, text, want) in [
            ("nothing", "", "{}"),
            ("only comments", "# a\n// b\n/* c\n d */", "{}"),
            ("a byte order mark", "\u{feff}a = 1", "{a=1}"),
            ("settings", "a = \"x\"\nb = 1\r\nc = true", "{a=\"x\" b=1 c=true}"),
            ("two on a line", "foo { a = 1 b = 2 }", "{foo={a=1 b=2}}"),
            ("no newline at all", "a{b=1}", "{a={b=1}}"),
            ("commas between", "a = { b = 1, c = 2, }", "{a={b=1 c=2}}"),
            ("quoted keys", "\"foo\" = 1 \"unix:uid\" { }", "{foo=1 unix:uid={}}"),
            ("labels", "T \"n\" { x = 1 }", "{T={n={x=1}}}"),
            ("two labels, one bare", "T n \"m\" { }", "{T={n={m={}}}}"),
            ("repeated blocks stay apart", "a { b = 1 } a { b = 2 }", "{a={b=1} a={b=2}}"),
            ("an object by =", "a = { b = { } }", "{a={b={}}}"),
            ("lists", "a = [1, \"x\", [], {b = 1},]", "{a=[1 \"x\" [] {b=1}]}"),
            ("lists over lines with comments", "a = [ # one\n 1, // two\n 2\n]", "{a=[1 2]}"),
            ("numbers", "a = -3 b = 0x1F c = 1.5 d = 1e3 e = 0", "{a=-3 b=0x1F c=1.5 d=1e3 e=0}"),
            ("escapes", r#"a = "\x41\101\u00e9\U0001f600\t\"\\\a""#, "{a=\"AAé😀\\t\\\"\\\\\\u{7}\"}"),
            (
                "a variable stays",
                r#"a = "${TD}" b = "$x" c = "${A:-"b"}""#,
                r#"{a="${TD}" b="$x" c="${A:-\"b\"}"}"#,
            ),
            ("here documents", "a = <<EOF\n x\ny\nEOF\nb = 1", "{a=\" x\\ny\\n\" b=1}"),
            ("indented here document", "a = <<-EOF\n  x\n   y\n  EOF\n", "{a=\"x\\n y\\n\"}"),
            ("key of other letters", "größe = 1", "{größe=1}"),
            ("json", " {\"a\": {\"b\": [1, null, \"\\ud83d\\ude00\\/\"]}}", "{a={b=[1 null \"😀/\"]}}"),
            ("json keeps repeated keys", "{\"a\":1,\"a\":2}", "{a=1 a=2}"),
        ] {
            assert_eq!(read(0, text).map(|node| show(&node)).as_deref(), Ok(want), "{case}");
        }
    }

    #[test]
    fn what_cannot_be_read_says_where_and_why() {
        let deep = format!("a = {}", "[".repeat(100_000));
        let labels = format!("a {} {{}}", "x ".repeat(100_000));
        let deep_json = format!("{{\"a\": {}1{}}}", "[".repeat(200), "]".repeat(200));
        let comment =
            |said: &str| format!("{said}; JSON has no comments: leave it out, or write the file in HCL");
        for (case, text, want) in [
            ("no value", "a =", "1:4 expected a value, found the end of the file"),
            (
                "no quotes",
                "entry spiffe://td/web {}\n",
                "1:13 expected = or { after a key, found \":\": a text such as a SPIFFE ID must be in double quotes",
            ),
            ("no =", "a\n", "2:1 expected = or { after a key, found the end of the file"),
            ("value without key", "1 = 2", "1:1 expected a key, found \"1\""),
            ("not in quotes", "a = b", "1:5 text must be in quotes: \"b\""),
            (
                "single quotes",
                "a = 'x y' # z\n",
                "1:5 expected a value in double quotes, like \"example.org\", found 'x y'",
            ),
            (
                "an editor's quotes",
                "a { b = [\u{201c}x\u{201d}] }",
                "1:10 expected a value in double quotes, like \"example.org\", found \u{201c}x\u{201d}",
            ),
            ("a duration", "a = 10m", "1:5 not a number; text must be in quotes: \"10m\""),
            ("plus", "a = +1", "1:5 not a number; text must be in quotes: \"+1\""),
            (
                "octal",
                "a {\n  mode = 0755\n}",
                "2:10 0755: a number cannot begin with 0 (spire-agent reads octal: 493); decimal is 755, hexadecimal 0x..",
            ),
            ("not octal", "a = 09", "1:5 09: a number cannot begin with 0; decimal is 9, hexadecimal 0x.."),
            (
                "zeros",
                "a = 00",
                "1:5 00: a number cannot begin with 0 (spire-agent reads octal: 0); decimal is 0, hexadecimal 0x..",
            ),
            ("open block", "a {\n b = 1\n", "1:3 this { is never closed: } is missing"),
            ("open list", "a = [1,\n", "1:5 this [ is never closed: ] is missing"),
            ("open text", "a = \"x\nb = 1", "1:5 this text is never closed: \" is missing on the same line"),
            (
                "open variable",
                "a = \"${x\"\n",
                "1:5 this text is never closed: \" is missing on the same line",
            ),
            ("open comment", "a = 1 /* x", "1:7 a comment begins here that never ends: */ is missing"),
            ("open here document", "a = <<EOF\nx", "1:5 this text is never closed: a line EOF is missing"),
            ("half a here document", "a = <EOF", "1:5 expected a value, found \"<\""),
            ("no word", "a = <<\n", "1:5 << needs a word and then a new line: <<EOF"),
            ("a brace too many", "a {}\n}", "2:1 this } closes nothing"),
            ("label and =", "a \"b\" = 1", "1:7 a block with a label takes { and not ="),
            ("list without comma", "a = [1 2]", "1:8 expected , or ] in a list, found \"2\""),
            ("escape", "a = \"C:\\q\"", "1:8 unknown escape \\q: a backslash is \\\\"),
            ("short escape", "a = \"\\x4\"", "1:6 \\x needs 2 digits in base 16"),
            ("a byte", "a = \"\\xff\"", "1:6 this escape is no character; write the character itself"),
            ("a surrogate", "a = \"\\ud800\"", "1:6 this escape is no character; write the character itself"),
            ("nul", "\0", "1:1 expected a key, found \"\\0\""),
            ("columns count characters", "é = \"é\" ä = ?", "1:13 expected a value, found \"?\""),
            ("too deep", &deep, "1:37 nested too deeply: at most 32 blocks and lists within each other"),
            (
                "too many labels",
                &labels,
                "1:68 nested too deeply: at most 32 blocks and lists within each other",
            ),
            (
                "deep json",
                &deep_json,
                "1:39 nested too deeply: at most 32 blocks and lists within each other",
            ),
            ("json with a comma", "{\"a\": 1,}", "1:8 not JSON: a comma before }; leave this comma out"),
            (
                "json list with a comma",
                "{\"a\":\n [1,\n ]}",
                "2:4 not JSON: a comma before ]; leave this comma out",
            ),
            (
                "comment without line feeds",
                "# a\rb = 1\rc = 2",
                "1:1 this comment holds carriage returns that no line feed follows: save the file with line feeds",
            ),
            ("json with a comment", "{ # x\n}", &comment("1:3 not JSON: key must be a string")),
            ("json with another", "{ \"a\": 1\n// x\n}", &comment("2:1 not JSON: expected `,` or `}`")),
            ("json with a long one", "{} /* x */", &comment("1:4 not JSON: trailing characters")),
            ("lines that end in carriage returns", "a = 1\r\rb = ?\r", "3:5 expected a value, found \"?\""),
            ("the same, with line feeds", "a = 1\r\n\r\nb = ?\r\n", "3:5 expected a value, found \"?\""),
            ("the same, in json", "{\"a\": 1,\r\"b\" = 2}\r", "2:5 not JSON: expected `:`"),
            ("json with =", "{\"a\" = 1}", "1:6 not JSON: expected `:`"),
            ("json and more", "{} x", "1:4 not JSON: trailing characters"),
            ("json octal", "{\"a\": 010}", "1:8 not JSON: invalid number"),
            ("half a json", "{\"a\"", "1:4 not JSON: EOF while parsing an object"),
            ("json surrogate", "{\"a\": \"\\ud800\"}", "1:7 not JSON: unexpected end of hex escape"),
        ] {
            let got = read(0, text).map(|node| show(&node));
            let got = got.map_err(|e| format!("{}:{} {}", e.place.line, e.place.column, e.message));
            assert_eq!(got, Err(want.to_owned()), "{case}");
        }
    }

    #[test]
    fn everything_knows_its_place() {
        let node = read(7, "a = 1\n  b \"c\" {\n\td = [true,\n  \"x\"]\n}").unwrap();
        let mut places = Vec::new();
        fn walk(node: &Node, places: &mut Vec<(String, u32, u32)>) {
            match &node.value {
                Value::Object(members) => {
                    for m in members {
                        places.push((m.key.to_string(), m.place.line, m.place.column));
                        walk(&m.node, places);
                    }
                }
                Value::List(items) => items.iter().for_each(|item| walk(item, places)),
                value => places.push((value.shown(), node.place.line, node.place.column)),
            }
        }
        walk(&node, &mut places);
        let places: Vec<String> = places.into_iter().map(|(what, l, c)| format!("{what}@{l}:{c}")).collect();
        assert_eq!(places.join(" "), "a@1:1 1@1:5 b@2:3 c@2:5 d@3:2 true@3:7 \"x\"@4:3");
        assert_eq!(node.place.file, 7);
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC{0,80}") {
            let _ = read(0, &text).is_ok();
        }

        #[test]
        fn any_text_of_our_signs_is_answered(text in "[a-z\"{}\\[\\]=:,#/*<\\\\$\n 0-9x.-]{0,80}") {
            let _ = read(0, &text).is_ok();
            let _ = read(0, &format!("{{{text}")).is_ok();
        }
    }
}
