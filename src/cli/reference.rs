//! `agent.conf(5)`: the manual page of the configuration, made of `conf/agent.conf` as it is written for people.
//!
//! A paragraph of comment is about the keys below it. A line `# key = value` shows a default, `#+ key = value` an example, and
//! `name "label" {` opens a block. Lines that are aligned (two spaces within) are rows: the first column, and what is said of it.

use std::fmt::Write as _;

/// The page's name.
pub(super) const PAGE: &str = "agent.conf.5";

const ALONE: &str = include_str!("../../conf/agent.conf");
const WITH_SERVER: &str = include_str!("../../conf/agent-with-server.conf");

/// The page as roff.
pub(super) fn page() -> String {
    let mut out = format!(
        ".TH agent.conf 5 \"\" \"durward {}\" \"Durward\"\n.SH NAME\nagent.conf \\- configuration of durward(1)\n\
         .SH DESCRIPTION\n",
        env!("CARGO_PKG_VERSION")
    );
    ReferencePage::default().write(ALONE, &mut out);
    out.push_str(".SH WITH A SPIRE SERVER\n");
    ReferencePage::default().write(WITH_SERVER, &mut out);
    out.push_str(
        ".SH FILES\n.TP\n.I /etc/durward/agent.conf\nThe configuration.\n.TP\n.I /etc/durward/entries.d\nMore entries, a file \
         for each package or team.\n.SH SEE ALSO\n.BR durward (1),\n.BR durward\\-validate (1)\n",
    );
    out
}

/// What was read and not written yet.
#[derive(Default)]
struct ReferencePage<'a> {
    paragraph: Vec<&'a str>,
    keys: Vec<String>,
    blocks: Vec<&'a str>,
}

impl<'a> ReferencePage<'a> {
    fn write(mut self, text: &'a str, out: &mut String) {
        for line in text.lines() {
            let line = line.trim();
            if let Some(key) = key_line(line) {
                self.keys.push(key);
            } else if let Some(comment) = line.strip_prefix('#') {
                if !self.keys.is_empty() {
                    self.flush(out);
                }
                let comment = comment.strip_prefix(' ').unwrap_or(comment);
                if let Some(heading) = comment.strip_prefix("---- ") {
                    self.flush(out);
                    let _ = writeln!(out, ".PP\n.I {}", escaped(heading.trim_end_matches(['-', ' '])));
                } else if comment.is_empty() {
                    self.flush(out);
                } else {
                    self.paragraph.push(comment);
                }
            } else if let Some(block) = line.strip_suffix('{') {
                // What stands above a block is about the block.
                let about = std::mem::take(&mut self.paragraph);
                self.flush(out);
                self.blocks.push(block.trim());
                // Writing to a String does not fail.
                let _ = writeln!(out, ".SS {}", escaped(&self.blocks.join(" / ")));
                self.paragraph = about;
                self.flush(out);
            } else {
                self.flush(out);
                if line == "}" {
                    self.blocks.pop();
                }
            }
        }
        self.flush(out);
    }

    /// Writes the paragraph below the keys that it is about.
    fn flush(&mut self, out: &mut String) {
        for (at, key) in std::mem::take(&mut self.keys).iter().enumerate() {
            out.push_str(if at == 0 { ".TP\n" } else { ".TQ\n" });
            // Not .B, to which quotes would be its own.
            let _ = writeln!(out, "\\fB{}\\fR", escaped(key));
        }
        let in_keys = out.ends_with('\n') && out.lines().last().is_some_and(|line| line.starts_with("\\fB"));
        let mut first = !in_keys;
        // How far the rows are indented that are being written.
        let mut rows: Option<usize> = None;
        for line in std::mem::take(&mut self.paragraph) {
            let (text, indent) = (line.trim(), line.len() - line.trim_start().len());
            let is_row = text.contains("  ") || indent >= 2;
            match rows {
                _ if !is_row => {
                    if rows.take().is_some() || std::mem::take(&mut first) {
                        out.push_str(".PP\n");
                    }
                    let _ = writeln!(out, "{}", escaped(text));
                }
                // What is said of the row above goes on.
                Some(base) if indent > base + 2 => {
                    let _ = writeln!(out, "{}", escaped(text));
                }
                _ => {
                    rows = Some(indent);
                    let Some((name, about)) = text.split_once("  ") else {
                        let _ = writeln!(out, ".br\n{}", escaped(text));
                        continue;
                    };
                    let _ = writeln!(out, ".TP\n\\fB{}\\fR", escaped(name));
                    let columns: Vec<&str> =
                        about.split("  ").map(str::trim).filter(|column| !column.is_empty()).collect();
                    let _ = writeln!(out, "{}", escaped(&columns.join(" | ")));
                }
            }
        }
        if rows.is_some() {
            out.push_str(".PP\n");
        }
    }
}

/// `key = value` of a line that sets a key, shows its default, or is an example.
fn key_line(line: &str) -> Option<String> {
    if let Some(example) = line.strip_prefix("#+ ") {
        return Some(format!("{} (example)", example.trim_end()));
    }
    let (text, of) = match line.strip_prefix("# ") {
        Some(text) => (text, " (default)"),
        None => (line, ""),
    };
    let (key, value) = text.split_once(" = ")?;
    let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    // A sentence may hold " = " too, behind several words.
    let is_value = !value.contains(", ") || value.starts_with(['[', '"']);
    (is_key && is_value).then(|| format!("{text}{of}"))
}

/// A line of text that roff takes for nothing else.
pub(super) fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_on_the_page() {
        let page = page();
        let mut seen = 0;
        for line in ALONE.lines().chain(WITH_SERVER.lines()) {
            if let Some(key) = key_line(line.trim()) {
                let name = key.split(' ').next().unwrap();
                assert!(page.contains(&format!("\\fB{}\\fR\n", escaped(&key))), "{name}");
                seen += 1;
            }
        }
        assert!(seen > 120, "{seen}");
        for known in
            ["socket_path = \"/run/durward/public/api.sock\" (default)", "fetch_x509_svid = 100 (example)"]
        {
            assert!(page.contains(&escaped(known)), "{known}");
        }
        assert!(page.lines().all(|line| !line.starts_with('\'')), "no line is a request by accident");
        // All of it is filled, so that it is as wide as the terminal; a word is not broken.
        assert!(!page.contains(".nf"), "nothing is as wide as it is written");
        let wide = |word: &&str| word.replace("\\-", "-").chars().count() > 70;
        assert_eq!(page.split_whitespace().find(wide), None);
    }
}
