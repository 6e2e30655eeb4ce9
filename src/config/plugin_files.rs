//! `plugin_data_file`: what a plugin is told, in a file of its own. It is put where it would stand in `agent.conf`, so that
//! nothing behind it knows where it was.

use std::path::Path;

use super::{
    file::said_of,
    input::{Input, members},
};
use crate::hcl::{
    problems::Problems,
    tree::{Member, Node, Value, quoted},
};

const KEY: &str = "plugin_data_file";

/// Puts the files that plugins name in the place of their names. What cannot be read is reported.
pub(super) fn lay_in(input: &Input<'_>, problems: &Problems, main: &mut Node) {
    let Value::Object(blocks) = &mut main.value else { return };
    let plugins = blocks.iter_mut().filter(|block| is(block, "plugins")).flat_map(members).flatten();
    for plugin_type in plugins {
        let type_name = plugin_type.key.clone();
        for plugin in members(plugin_type).into_iter().flatten() {
            let name = format!("plugins.{type_name} {}.{KEY}", quoted(&plugin.key));
            for keys in members(plugin) {
                of_plugin(input, problems, &name, keys);
            }
        }
    }
}

fn is(member: &Member, key: &str) -> bool {
    member.key.eq_ignore_ascii_case(key) && member.is_set()
}

fn of_plugin(input: &Input<'_>, problems: &Problems, name: &str, keys: &mut Vec<Member>) {
    let is_off = |key: &Member| is(key, "enabled") && key.node.value == Value::Bool(false);
    let Some(at) = keys.iter().position(|key| is(key, KEY)) else { return };
    if keys.iter().any(is_off) {
        keys.retain(|key| !is(key, KEY));
        return;
    }
    let member = keys.remove(at);
    let wrong = |message: &str| {
        problems.add(member.place, name, Some(member.node.value.shown()), message);
    };
    let (named, path) = match &member.node.value {
        Value::String(path) if path.is_empty() => return,
        Value::String(path) => (Path::new(&**path), input.base.join(&**path)),
        other => return wrong(&format!("must be a string, not {}", other.kind())),
    };
    if keys.iter().any(|key| is(key, KEY)) {
        return wrong("set twice");
    }
    if keys.iter().any(|key| is(key, "plugin_data")) {
        return wrong("only one of [plugin_data, plugin_data_file] can be used");
    }
    let text = match (input.read_file)(&path) {
        Ok(bytes) => bytes,
        Err(error) => return wrong(&said_of(named, error)),
    };
    let Ok(text) = String::from_utf8(text) else { return wrong("is not UTF-8 text") };
    let file = problems.add_file(&path);
    if let Some(node) = input.tree(problems, file, &text) {
        keys.push(Member { key: "plugin_data".into(), place: member.place, node });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ExpandEnv, FileError};

    fn parse(plugins: &str) -> Result<Config, String> {
        let text =
            format!("agent {{ trust_domain = \"td\" }} issuer \"embedded\" {{ }} plugins {{ {plugins} }}");
        let input = Input {
            path: Path::new("agent.conf"),
            text: &text,
            base: Path::new("/here"),
            expand_env: ExpandEnv::No,
            given: &[],
            drop_ins: &|_| Ok(None),
            user_id: &|_| Ok(None),
            read_file: &|path| match path.to_str() {
                Some("/here/unix.conf") => Ok(b"discover_workload_path = true".to_vec()),
                Some("/here/unix.json") => Ok(b"{ \"discover_workload_path\": true }".to_vec()),
                Some("/here/wrong") => Ok(b"a = 1\ndiscover_workload_path = 7".to_vec()),
                Some("/here/bad") => Ok(b"{".to_vec()),
                _ => Err(FileError::NotAFile(path.to_owned())),
            },
        };
        Config::parse(&input).map_err(|errors| errors.to_string())
    }

    #[test]
    fn what_a_plugin_is_told_may_stand_in_a_file() {
        for plugins in [
            "WorkloadAttestor \"unix\" { plugin_data_file = \"unix.conf\" }",
            "WorkloadAttestor \"unix\" { plugin_data_file = \"/here/unix.json\" }",
            "workloadattestor \"unix\" { Plugin_Data_File = \"unix.conf\" enabled = true }",
        ] {
            assert!(parse(plugins).unwrap().attest.unix.settings.discover_workload_path, "{plugins}");
        }
        for plugins in [
            "WorkloadAttestor \"unix\" { plugin_data_file = \"\" }",
            "WorkloadAttestor \"unix\" { } WorkloadAttestor \"docker\" { enabled = false plugin_data_file = \"none\" }",
        ] {
            assert!(!parse(plugins).unwrap().attest.unix.settings.discover_workload_path, "{plugins}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named() {
        for (plugin_data, want) in [
            (
                "plugin_data_file = \"none\"",
                "agent.conf:1:89: plugins.WorkloadAttestor \"unix\".plugin_data_file \"none\": /here/none is not a regular file",
            ),
            ("plugin_data_file = 7", "plugin_data_file 7: must be a string, not a number"),
            (
                "plugin_data { } plugin_data_file = \"unix.conf\"",
                "plugin_data_file \"unix.conf\": only one of [plugin_data, plugin_data_file] can be used",
            ),
            ("plugin_data_file = \"unix.conf\" plugin_data_file = \"unix.json\"", "set twice"),
            (
                "plugin_data_file = \"wrong\"",
                "/here/wrong:2:1: plugins.WorkloadAttestor \"unix\".plugin_data.discover_workload_path 7: must be ",
            ),
            ("plugin_data_file = \"bad\"", "/here/bad:1:"),
        ] {
            let got = parse(&format!("WorkloadAttestor \"unix\" {{ {plugin_data} }}")).unwrap_err();
            assert!(got.contains(want), "{plugin_data}: {want} in {got}");
        }
    }
}
