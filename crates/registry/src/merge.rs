//! Several sources to one tree.

use crate::check::join;
use crate::diagnostic::{Code, Findings, Pos};
use crate::yaml::{Data, Node};

/// Mappings whose children belong to one source each.
const IDENTITY: [&str; 8] = [
    "models",
    "groups",
    "profiles",
    "selectors",
    "peers",
    "matrix",
    "routing.router.settings.groups",
    "routing.router.settings.matrix",
];

/// Merges in order: mappings are merged, lists joined; a null gives way; two different values for one key are an
/// error, and so is one model, group, profile, selector or peer in two sources.
pub(crate) fn merge(trees: Vec<Node>, findings: &mut Findings) -> Node {
    let mut trees = trees.into_iter();
    let Some(mut root) = trees.next() else {
        return Node {
            at: Pos::default(),
            data: Data::Map(Vec::new()),
        };
    };
    for tree in trees {
        merge_into(&mut root, tree, "", findings);
    }
    root
}

fn merge_into(target: &mut Node, source: Node, path: &str, findings: &mut Findings) {
    if source.is_null() {
        return;
    }
    if target.is_null() {
        *target = source;
        return;
    }
    let at = source.at;
    match (&mut target.data, source.data) {
        (Data::Map(entries), Data::Map(more)) => {
            for entry in more {
                let path = join(path, &entry.key);
                let Some(existing) = entries.iter_mut().find(|e| e.key == entry.key) else {
                    entries.push(entry);
                    continue;
                };
                let parent = path
                    .strip_suffix(entry.key.as_str())
                    .and_then(|p| p.strip_suffix('.'));
                if let Some(kind) = parent.filter(|p| IDENTITY.contains(p)) {
                    let message = format!(
                        "duplicate {kind} \"{}\": already defined in {} on line {}",
                        entry.key,
                        findings.file(existing.at.file),
                        existing.at.line
                    );
                    findings.error(Code::Conflict, entry.at, path, message);
                } else {
                    merge_into(&mut existing.value, entry.value, &path, findings);
                }
            }
        }
        (Data::Seq(items), Data::Seq(more)) => items.extend(more),
        (mine, theirs) if same(mine, &theirs) => {}
        _ => {
            let message = format!(
                "sets a different value than {} does on line {}",
                findings.file(target.at.file),
                target.at.line
            );
            findings.error(Code::Conflict, at, path, message);
        }
    }
}

fn same(a: &Data, b: &Data) -> bool {
    match (a, b) {
        (Data::Bool(a), Data::Bool(b)) => a == b,
        (Data::Int(a, _), Data::Int(b, _)) => a == b,
        (Data::Float(a, _), Data::Float(b, _)) => a == b,
        (Data::Str(a), Data::Str(b)) => a == b,
        _ => false,
    }
}
