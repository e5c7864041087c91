//! `${name}`: global macros, a model's own, `${MODEL_ID}` and `${PORT}`.
//!
//! A macro may use those declared before it. They are applied last-declared first, once each; a text that is nothing
//! but `${name}` takes the macro's type, any other gets its text. Keys are not expanded, except under
//! `filters.setParamsByID`.

use std::collections::{BTreeMap, BTreeSet};

use crate::check::{self, join};
use crate::diagnostic::{Code, Findings, Pos};
use crate::keys::{MODEL, ROOT};
use crate::shell;
use crate::yaml::{Data, Entry, Node};

const RESERVED: [&str; 3] = ["PID", "PORT", "MODEL_ID"];
/// Longest text that expansion may yield; doubling macros would otherwise take all memory.
const MAX_TEXT: usize = 1 << 20;

#[derive(Debug, Clone)]
struct Macro {
    name: String,
    value: Data,
}

/// Expands everything in place. A command's comment lines are dropped first, and a missing `proxy` of a `cmd` is filled
/// in with `http://localhost:${PORT}`. Returns the port of every model that has one.
pub(crate) fn expand(
    root: &mut Node,
    keep_ports: &BTreeMap<String, u16>,
    findings: &mut Findings,
) -> BTreeMap<String, u16> {
    let mut assigned = BTreeMap::new();
    let globals = root
        .get("macros")
        .map(|n| declared(n, "macros", findings))
        .unwrap_or_default();
    let Data::Map(entries) = &mut root.data else {
        return assigned;
    };
    for Entry { key, value, .. } in entries.iter_mut() {
        // What nobody reads may hold anything: anchors for models, models that are switched off.
        if key != "models" && key != "macros" && check::knows(&ROOT, key) {
            for m in globals.iter().rev() {
                apply(value, m, key, findings);
            }
            leftovers(value, key, false, findings);
        }
    }
    let start = root
        .get("startPort")
        .and_then(crate::check::integer)
        .and_then(|p| u16::try_from(p).ok());
    let Data::Map(entries) = &mut root.data else {
        return assigned;
    };
    let Some(models) = entries.iter_mut().find(|e| e.key == "models") else {
        return assigned;
    };
    let Data::Map(models) = &mut models.value.data else {
        return assigned;
    };
    for model in models.iter_mut() {
        let path = join("models", &model.key);
        prepare(&mut model.value);
        let mut macros = vec![Macro {
            name: "MODEL_ID".to_owned(),
            value: Data::Str(model.key.clone()),
        }];
        macros.extend(globals.iter().cloned());
        if let Some(own) = model.value.get("macros") {
            for m in declared(own, &join(&path, "macros"), findings) {
                match macros.iter_mut().find(|known| known.name == m.name) {
                    Some(known) => *known = m,
                    None => macros.push(m),
                }
            }
        }
        for m in macros.iter().rev() {
            apply_model(&mut model.value, m, &path, findings);
        }
    }
    assigned.extend(ports(models, start.unwrap_or(5800), keep_ports, findings));
    for model in models.iter() {
        model_leftovers(&model.value, &join("models", &model.key), findings);
    }
    assigned
}

/// Reads a `macros` block.
fn declared(node: &Node, path: &str, findings: &mut Findings) -> Vec<Macro> {
    let mut macros: Vec<Macro> = Vec::new();
    if !matches!(node.data, Data::Map(_) | Data::Null) {
        findings.error(
            Code::Type,
            node.at,
            path,
            format!("expected a mapping, found {}", node.kind()),
        );
    }
    for Entry { key: name, at, value } in node.entries() {
        let path = join(path, name);
        let well_formed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if name.is_empty() || name.len() >= 64 || !name.chars().all(well_formed) {
            let message = "a macro's name is 1 to 63 letters, digits, `_` or `-`";
            findings.error(Code::Macro, *at, &path, message);
        } else if RESERVED.contains(&name.as_str()) {
            findings.error(
                Code::Macro,
                *at,
                &path,
                format!("`{name}` is reserved: swapd sets it"),
            );
        } else if value.text().is_none() {
            let message = format!("a macro is text, a number or true/false, not {}", value.kind());
            findings.error(Code::Macro, value.at, &path, message);
        } else if value.text().is_some_and(|t| t.contains(&format!("${{{name}}}"))) {
            findings.error(
                Code::Macro,
                value.at,
                &path,
                format!("macro `{name}` contains itself"),
            );
        } else {
            macros.push(Macro {
                name: name.clone(),
                value: value.data.clone(),
            });
        }
    }
    macros
}

/// Drops comments from commands, and fills in the default address.
fn prepare(model: &mut Node) {
    let Data::Map(entries) = &mut model.data else {
        return;
    };
    for entry in entries
        .iter_mut()
        .filter(|e| e.key == "cmd" || e.key == "cmdStop")
    {
        if let Data::Str(text) = &mut entry.value.data {
            *text = shell::strip_comments(text);
        }
    }
    let set = |key: &str| {
        entries
            .iter()
            .find(|e| e.key == key)
            .filter(|e| e.value.text().is_some_and(|t| !t.is_empty()))
    };
    if set("proxy").is_none()
        && let Some(cmd) = set("cmd")
    {
        let at = cmd.at;
        let data = Data::Str("http://localhost:${PORT}".to_owned());
        entries.retain(|e| e.key != "proxy");
        entries.push(Entry {
            key: "proxy".to_owned(),
            at,
            value: Node { at, data },
        });
    }
}

/// Applies one macro to a model, except to its `macros`.
fn apply_model(model: &mut Node, m: &Macro, path: &str, findings: &mut Findings) {
    let Data::Map(entries) = &mut model.data else {
        return;
    };
    for entry in entries.iter_mut().filter(|e| e.key != "macros") {
        let path = join(path, &entry.key);
        if entry.key == "filters" {
            by_id_keys(&mut entry.value, m, &path, findings);
        }
        apply(&mut entry.value, m, &path, findings);
    }
}

/// The one place where keys are expanded.
fn by_id_keys(filters: &mut Node, m: &Macro, path: &str, findings: &mut Findings) {
    let Data::Map(entries) = &mut filters.data else {
        return;
    };
    let Some(by_id) = entries.iter_mut().find(|e| e.key == "setParamsByID") else {
        return;
    };
    let Data::Map(ids) = &mut by_id.value.data else {
        return;
    };
    let path = join(path, "setParamsByID");
    let mut seen = BTreeSet::new();
    for entry in ids.iter_mut() {
        let mut name = Node {
            at: entry.at,
            data: Data::Str(entry.key.clone()),
        };
        apply(&mut name, m, &path, findings);
        entry.key = name.text().unwrap_or_default();
        if !seen.insert(entry.key.clone()) {
            let message = format!("two keys are `{}` after expansion", entry.key);
            findings.error(Code::Conflict, entry.at, join(&path, &entry.key), message);
        }
    }
}

/// Applies one macro to every text in a tree.
fn apply(node: &mut Node, m: &Macro, path: &str, findings: &mut Findings) {
    match &mut node.data {
        Data::Str(text) => {
            let pattern = format!("${{{}}}", m.name);
            if *text == pattern {
                node.data = m.value.clone();
            } else if text.contains(&pattern) {
                let value = Node {
                    at: node.at,
                    data: m.value.clone(),
                }
                .text()
                .unwrap_or_default();
                let expanded = text.len() + text.matches(&pattern).count() * value.len();
                if expanded > MAX_TEXT {
                    let message = format!("macro `{}` makes the text longer than {MAX_TEXT} bytes", m.name);
                    findings.error(Code::Macro, node.at, path, message);
                    *text = text.replace(&pattern, "");
                } else {
                    *text = text.replace(&pattern, &value);
                }
            }
        }
        Data::Seq(items) => {
            for (i, item) in items.iter_mut().enumerate() {
                apply(item, m, &format!("{path}[{i}]"), findings);
            }
        }
        Data::Map(entries) => {
            for entry in entries {
                apply(&mut entry.value, m, &join(path, &entry.key), findings);
            }
        }
        Data::Null | Data::Bool(_) | Data::Int(..) | Data::Float(..) => {}
    }
}

/// Gives a port to every model whose command asks for one: the one it had, else the next free one, by model id.
fn ports(
    models: &mut [Entry],
    start: u16,
    keep: &BTreeMap<String, u16>,
    findings: &mut Findings,
) -> BTreeMap<String, u16> {
    let mut assigned = BTreeMap::new();
    let asks = |model: &Entry| uses_port(model.value.get("cmd"));
    let mut by_id: Vec<usize> = (0..models.len())
        .filter(|i| models.get(*i).is_some_and(asks))
        .collect();
    by_id.sort_by(|a, b| {
        models
            .get(*a)
            .map(|m| &m.key)
            .cmp(&models.get(*b).map(|m| &m.key))
    });
    let kept = |id: &str| keep.get(id).copied().filter(|port| *port >= start);
    let mut taken: BTreeSet<u16> = by_id
        .iter()
        .filter_map(|i| models.get(*i))
        .filter_map(|m| kept(&m.key))
        .collect();
    for index in by_id {
        let Some(model) = models.get_mut(index) else {
            continue;
        };
        let path = join("models", &model.key);
        let port = kept(&model.key).or_else(|| (start..=u16::MAX).find(|p| !taken.contains(p)));
        let Some(port) = port else {
            findings.error(
                Code::Value,
                model.at,
                path,
                format!("no port is left from startPort {start} on"),
            );
            continue;
        };
        taken.insert(port);
        let value = Data::Int(i64::from(port), port.to_string().into());
        apply_model(
            &mut model.value,
            &Macro {
                name: "PORT".to_owned(),
                value,
            },
            &path,
            findings,
        );
        assigned.insert(model.key.clone(), port);
    }
    assigned
}

fn uses_port(cmd: Option<&Node>) -> bool {
    cmd.and_then(Node::text).is_some_and(|t| t.contains("${PORT}"))
}

fn model_leftovers(model: &Node, path: &str, findings: &mut Findings) {
    for entry in model
        .entries()
        .iter()
        .filter(|e| e.key != "macros" && check::knows(&MODEL, &e.key))
    {
        if entry.key == "proxy" && uses_port(Some(&entry.value)) {
            let message = "needs ${PORT}, and `cmd` does not use it: the server would not listen there; give it \
                           ${PORT}, or say its address in `proxy`";
            findings.error(Code::Macro, entry.at, join(path, "proxy"), message);
            continue;
        }
        leftovers(
            &entry.value,
            &join(path, &entry.key),
            entry.key == "cmdStop",
            findings,
        );
        for by_id in entry.value.get("setParamsByID").iter().flat_map(|n| n.entries()) {
            report(
                &by_id.key,
                by_id.at,
                &join(path, "filters.setParamsByID"),
                false,
                findings,
            );
        }
    }
}

/// Reports every `${name}` that is still there.
fn leftovers(node: &Node, path: &str, pid_allowed: bool, findings: &mut Findings) {
    match &node.data {
        Data::Str(text) => report(text, node.at, path, pid_allowed, findings),
        Data::Seq(items) => {
            for (i, item) in items.iter().enumerate() {
                leftovers(item, &format!("{path}[{i}]"), pid_allowed, findings);
            }
        }
        Data::Map(entries) => {
            for entry in entries {
                leftovers(&entry.value, &join(path, &entry.key), pid_allowed, findings);
            }
        }
        Data::Null | Data::Bool(_) | Data::Int(..) | Data::Float(..) => {}
    }
}

fn report(text: &str, at: Pos, path: &str, pid_allowed: bool, findings: &mut Findings) {
    let mut rest = text;
    while let Some((_, tail)) = rest.split_once("${") {
        rest = tail;
        let Some((name, _)) = tail.split_once('}') else {
            continue;
        };
        let well_formed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(well_formed) || (pid_allowed && name == "PID") {
            continue;
        }
        let message = match name {
            "PID" => "`${PID}` is known in `cmdStop` only".to_owned(),
            "PORT" if path.starts_with("models.") => {
                "`${PORT}` is known only where `cmd` uses it too".to_owned()
            }
            _ => format!("unknown macro `${{{name}}}`"),
        };
        findings.error(Code::Macro, at, path, message);
    }
}
