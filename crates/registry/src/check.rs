//! A tree against the tables: types, ranges, unknown keys. Afterwards the decoder need not look at types again.

use crate::diagnostic::{Code, Findings};
use crate::keys::{Key, Object, Ty};
use crate::yaml::{Data, Entry, Node};

/// Checks a whole tree. Wrong values are reported here once; readers then take their default.
pub(crate) fn check(root: &Node, object: &Object, findings: &mut Findings) {
    object_keys(root, object, "", findings);
}

fn object_keys(node: &Node, object: &Object, path: &str, findings: &mut Findings) {
    for entry in node.entries() {
        let path = join(path, &entry.key);
        match find(object, &entry.key) {
            Some(key) => {
                if !key.no_effect.is_empty() {
                    findings.warn(
                        Code::NoEffect,
                        entry.at,
                        &path,
                        format!("has no effect: {}", key.no_effect),
                    );
                }
                value(&entry.value, key.ty, &path, findings);
            }
            None => unknown(entry, object, &path, findings),
        }
    }
    for key in object.keys.iter().filter(|k| k.required) {
        if node.get(key.name).is_none_or(Node::is_null) {
            findings.error(Code::Missing, node.at, join(path, key.name), "is missing");
        }
    }
}

fn find<'o>(object: &'o Object, name: &str) -> Option<&'o Key> {
    object
        .keys
        .iter()
        .find(|k| k.name == name || k.aliases.contains(&name))
}

/// Whether anybody reads this key.
pub(crate) fn knows(object: &Object, name: &str) -> bool {
    find(object, name).is_some()
}

fn unknown(entry: &Entry, object: &Object, path: &str, findings: &mut Findings) {
    // `x-` keys are where people keep anchors, as in compose files.
    if entry.key.starts_with("x-") || entry.key.starts_with('.') {
        return;
    }
    let near = knobs::closest(&entry.key, object.keys.iter().map(|k| k.name));
    let hint = near.map(|k| format!("; did you mean `{k}`?")).unwrap_or_default();
    findings.warn(
        Code::UnknownKey,
        entry.at,
        path,
        format!("unknown key `{}`{hint}", entry.key),
    );
}

fn value(node: &Node, ty: Ty, path: &str, findings: &mut Findings) {
    // A key without a value is as good as absent.
    if node.is_null() {
        return;
    }
    match ty {
        Ty::Object(object) if matches!(node.data, Data::Map(_)) => object_keys(node, object, path, findings),
        Ty::Map(inner) if matches!(node.data, Data::Map(_)) => {
            for entry in node.entries() {
                let path = join(path, &entry.key);
                if entry.key.trim().is_empty() {
                    findings.error(Code::Value, entry.at, &path, "a name must not be empty");
                }
                value(&entry.value, *inner, &path, findings);
            }
        }
        Ty::List(inner) if matches!(node.data, Data::Seq(_)) => {
            for (i, item) in node.items().iter().enumerate() {
                value(item, *inner, &format!("{path}[{i}]"), findings);
            }
        }
        Ty::Either(first, second) => {
            let ty = if fits(node, *first) { first } else { second };
            value(node, *ty, path, findings);
        }
        _ if fits(node, ty) => {}
        _ => {
            let shown = node.text().map(|t| format!(" (`{t}`)")).unwrap_or_default();
            let out_of_range = matches!(ty, Ty::Int { .. }) && integer(node).is_some();
            let message = if out_of_range {
                format!(
                    "{} is out of range; expected {}",
                    node.text().unwrap_or_default(),
                    describe(ty)
                )
            } else {
                let hint = match ty {
                    Ty::Object(object) if object.name == "profiles.<name>" && !node.items().is_empty() => {
                        "; lists of models are the old form: write `pins: {requested-name: model}`"
                    }
                    _ => "",
                };
                format!("expected {}, found {}{shown}{hint}", describe(ty), node.kind())
            };
            let code = if out_of_range { Code::Value } else { Code::Type };
            findings.error(code, node.at, path, message);
        }
    }
}

/// Whether the value itself (not what is inside it) has the type.
pub(crate) fn fits(node: &Node, ty: Ty) -> bool {
    match ty {
        Ty::Bool => boolean(node).is_some(),
        Ty::Int { min, max } => integer(node).is_some_and(|i| (min..=max).contains(&i)),
        Ty::Str => node.text().is_some(),
        Ty::OneOf(words) => node.text().is_some_and(|t| words.contains(&t.as_str())),
        Ty::Duration => node.text().is_some_and(|t| crate::duration::parse(&t).is_some()),
        Ty::List(_) => matches!(node.data, Data::Seq(_)),
        Ty::Map(_) | Ty::Object(_) | Ty::Worker => matches!(node.data, Data::Map(_)),
        Ty::Either(a, b) => fits(node, *a) || fits(node, *b),
        Ty::Any => true,
    }
}

/// A truth value; YAML 1.1's words count too.
pub(crate) fn boolean(node: &Node) -> Option<bool> {
    match &node.data {
        Data::Bool(b) => Some(*b),
        Data::Str(s) => match s.to_ascii_lowercase().as_str() {
            "yes" | "on" | "true" => Some(true),
            "no" | "off" | "false" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// A whole number; `3.0` is one, and so is a text of digits, as a macro inside a text leaves it.
pub(crate) fn integer(node: &Node) -> Option<i64> {
    match &node.data {
        Data::Int(i, _) => Some(*i),
        #[allow(clippy::cast_possible_truncation)]
        Data::Float(x, _) if x.fract() == 0.0 && x.abs() < 9e15 => Some(*x as i64),
        Data::Str(text) => text.parse().ok(),
        _ => None,
    }
}

/// Words for a type.
pub(crate) fn describe(ty: Ty) -> String {
    match ty {
        Ty::Bool => "true or false".to_owned(),
        Ty::Int { min: i64::MIN, max } => format!("a whole number up to {max}"),
        Ty::Int { min, max } => format!("a whole number from {min} to {max}"),
        Ty::Str => "text".to_owned(),
        Ty::OneOf(words) => format!("one of {}", words.join(", ")),
        Ty::Duration => "a duration such as 5s or 1m30s".to_owned(),
        Ty::List(inner) => format!("a list ({} each)", describe(*inner)),
        Ty::Map(inner) => format!("a mapping (name to {})", describe(*inner)),
        Ty::Object(_) => "a mapping".to_owned(),
        Ty::Worker => "a mapping with `model` and knobs".to_owned(),
        Ty::Either(a, b) => format!("{}, or {}", describe(*a), describe(*b)),
        Ty::Any => "anything".to_owned(),
    }
}

pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}
