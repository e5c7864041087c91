//! Groups or matrix, priorities, and what selectors need of them.

use indexmap::IndexMap;

use super::names::Names;
use super::read::{flag, int, text, texts};
use crate::check::{integer, join};
use crate::diagnostic::{Code, Findings};
use crate::matrix::{self, Matrix};
use crate::types::{Group, Model, Registry, Routing, Strategy};
use crate::yaml::Node;

/// The group of models that are in no other.
pub(crate) const DEFAULT_GROUP: &str = "(default)";

pub(super) fn routing(root: &Node, models: &IndexMap<String, Model>, findings: &mut Findings) -> Routing {
    let present = |node: Option<&'_ Node>| node.is_some_and(|n| !n.is_null());
    let router = root.get("routing").and_then(|r| r.get("router"));
    let settings = router.and_then(|r| r.get("settings"));
    let new_groups = settings.and_then(|s| s.get("groups")).filter(|n| !n.is_null());
    let new_matrix = settings.and_then(|s| s.get("matrix")).filter(|n| !n.is_null());
    let old_groups = root.get("groups").filter(|n| !n.is_null());
    let old_matrix = root.get("matrix").filter(|n| !n.is_null());
    for (name, old) in [("groups", old_groups), ("matrix", old_matrix)] {
        if let Some(old) = old
            && present(router)
        {
            let message = format!(
                "`{name}` and `routing.router` are both given; move it to routing.router.settings.{name}"
            );
            findings.error(Code::Conflict, old.at, name, message);
        }
    }
    if let (Some(_), Some(matrix)) = (old_groups, old_matrix) {
        findings.error(
            Code::Conflict,
            matrix.at,
            "matrix",
            "`groups` and `matrix` are both given: one of them rules",
        );
    }
    let group_path = if new_groups.is_some() {
        "routing.router.settings.groups"
    } else {
        "groups"
    };
    let groups = groups(new_groups.or(old_groups), group_path, models, findings);
    let matrix_path = if new_matrix.is_some() {
        "routing.router.settings.matrix"
    } else {
        "matrix"
    };
    let matrix = new_matrix
        .or(old_matrix)
        .map(|n| self::matrix(n, matrix_path, models, findings));
    let uses_matrix = match router.and_then(|r| text(r, "use")).as_deref() {
        Some("matrix") => {
            if matrix.is_none() {
                let at = router.map(|r| r.at).unwrap_or_default();
                let message = "is `matrix`, and routing.router.settings.matrix is missing";
                findings.error(Code::Missing, at, "routing.router.use", message);
            }
            true
        }
        Some(_) => false,
        // The older place says which one by its presence.
        None => old_matrix.is_some(),
    };
    match matrix {
        Some(matrix) if uses_matrix => Routing::Matrix(matrix),
        _ => Routing::Groups(groups),
    }
}

fn groups(
    node: Option<&Node>,
    path: &str,
    models: &IndexMap<String, Model>,
    findings: &mut Findings,
) -> IndexMap<String, Group> {
    let mut groups: IndexMap<String, Group> = IndexMap::new();
    for entry in node.map(Node::entries).unwrap_or_default() {
        let path = join(path, &entry.key);
        let mut members: Vec<String> = Vec::new();
        for (i, (item, member)) in texts(&entry.value, "members").into_iter().enumerate() {
            let path = format!("{path}.members[{i}]");
            let elsewhere = groups
                .iter()
                .find(|(_, g)| g.members.contains(&member))
                .map(|(name, _)| name);
            if members.contains(&member) {
                findings.error(
                    Code::Conflict,
                    item.at,
                    path,
                    format!("`{member}` is listed twice"),
                );
            } else if let Some(other) = elsewhere {
                let message = format!("`{member}` is in group `{other}` already: a model is in one group");
                findings.error(Code::Conflict, item.at, path, message);
            } else if !models.contains_key(&member) {
                findings.error(Code::UnknownName, item.at, path, unknown_member(&member, models));
            } else {
                members.push(member);
            }
        }
        if entry.key == DEFAULT_GROUP {
            let message = "is the group of all models that are in no other; a group of this name is not used";
            findings.warn(Code::NoEffect, entry.at, path, message);
            continue;
        }
        let set = |key: &str, default: bool| flag(&entry.value, key).unwrap_or(default);
        let group = Group {
            swap: set("swap", true),
            exclusive: set("exclusive", true),
            persistent: set("persistent", false),
            members,
        };
        groups.insert(entry.key.clone(), group);
    }
    let grouped = |id: &String| groups.values().any(|g| g.members.contains(id));
    let members: Vec<String> = models.keys().filter(|id| !grouped(id)).cloned().collect();
    if !members.is_empty() {
        let group = Group {
            swap: true,
            exclusive: true,
            persistent: false,
            members,
        };
        groups.insert(DEFAULT_GROUP.to_owned(), group);
    }
    groups
}

fn unknown_member(name: &str, models: &IndexMap<String, Model>) -> String {
    if let Some(model) = models.values().find(|m| m.aliases.iter().any(|a| a == name)) {
        return format!("`{name}` is an alias; name the model by its id `{}`", model.id);
    }
    let near = knobs::closest(name, models.keys().map(String::as_str));
    let hint = near.map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
    format!("references unknown model `{name}`{hint}")
}

fn matrix(node: &Node, path: &str, models: &IndexMap<String, Model>, findings: &mut Findings) -> Matrix {
    let mut vars: IndexMap<String, String> = IndexMap::new();
    for var in node.get("vars").map(Node::entries).unwrap_or_default() {
        let path = format!("{path}.vars.{}", var.key);
        let well_formed = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
        if var.key.is_empty() || var.key.len() > 32 || !var.key.chars().all(well_formed) {
            findings.error(
                Code::Value,
                var.at,
                &path,
                "a short name is 1 to 32 letters, digits, `.` or `-`",
            );
        }
        let id = var.value.text().unwrap_or_default();
        if !models.contains_key(&id) {
            findings.error(
                Code::UnknownName,
                var.value.at,
                &path,
                unknown_member(&id, models),
            );
        }
        vars.insert(var.key.clone(), id);
    }
    let known = |name: &str| {
        vars.get(name)
            .cloned()
            .or_else(|| models.contains_key(name).then(|| name.to_owned()))
    };
    let mut costs = IndexMap::new();
    for cost in node.get("evict_costs").map(Node::entries).unwrap_or_default() {
        let path = format!("{path}.evict_costs.{}", cost.key);
        match (
            known(&cost.key),
            integer(&cost.value).and_then(|c| u64::try_from(c).ok()),
        ) {
            (Some(id), Some(value)) => {
                if costs
                    .insert(id.clone(), value)
                    .is_some_and(|before| before != value)
                {
                    let message = format!("model `{id}` has two different costs");
                    findings.error(Code::Conflict, cost.at, path, message);
                }
            }
            (None, _) => {
                findings.error(
                    Code::UnknownName,
                    cost.at,
                    path,
                    unknown_member(&cost.key, models),
                );
            }
            // Reported by the type check.
            (Some(_), None) => {}
        }
    }
    let sets = node.get("sets").filter(|n| !n.is_null());
    let mut parsed = Vec::new();
    for set in sets.map(Node::entries).unwrap_or_default() {
        let path = format!("{path}.sets.{}", set.key);
        match matrix::parse(&set.value.text().unwrap_or_default()) {
            Ok(expr) => parsed.push((set.key.clone(), expr, set.value.at, path)),
            Err(why) => findings.error(Code::Value, set.value.at, path, why),
        }
    }
    if let Some(sets) = sets
        && sets.entries().is_empty()
    {
        findings.error(
            Code::Missing,
            sets.at,
            join(path, "sets"),
            "needs at least one set",
        );
    }
    let broken: Vec<&str> = sets
        .map(Node::entries)
        .unwrap_or_default()
        .iter()
        .map(|e| e.key.as_str())
        .filter(|name| !parsed.iter().any(|(p, ..)| p == name))
        .collect();
    let (sets, errors) = matrix::resolve(&parsed, &broken, &known);
    for (index, why) in errors {
        if let Some((_, _, at, path)) = parsed.get(index) {
            findings.error(Code::UnknownName, *at, path, why);
        }
    }
    Matrix::new(sets, costs)
}

/// Queue priorities, into the models.
pub(super) fn priorities(
    root: &Node,
    models: &mut IndexMap<String, Model>,
    names: &Names,
    findings: &mut Findings,
) {
    let path = ["routing", "scheduler", "settings", "fifo"];
    let Some(fifo) = path.iter().try_fold(root, |node, key| node.get(key)) else {
        return;
    };
    let Some(priority) = fifo.get("priority") else {
        return;
    };
    for entry in priority.entries() {
        let value = int(priority, &entry.key)
            .and_then(|i| i32::try_from(i).ok())
            .unwrap_or(0);
        match names.model(&entry.key).and_then(|id| models.get_mut(id)) {
            Some(model) => model.priority = value,
            None => {
                let path = format!("routing.scheduler.settings.fifo.priority.{}", entry.key);
                findings.error(Code::UnknownName, entry.at, path, names.unknown(&entry.key));
            }
        }
    }
}

/// A selector that spills over must be able to have all its local targets in memory at once.
pub(super) fn spillover_targets_fit(root: &Node, registry: &Registry, findings: &mut Findings) {
    for (name, selector) in registry
        .selectors
        .iter()
        .filter(|(_, s)| s.strategy == Strategy::Spillover)
    {
        let mut local: Vec<&str> = Vec::new();
        for target in &selector.targets {
            if let Some(crate::Target::Model(model)) = registry.find(target)
                && !local.contains(&model.id.as_str())
            {
                local.push(&model.id);
            }
        }
        if registry.can_coexist(&local) {
            continue;
        }
        let at = root
            .get("selectors")
            .and_then(|s| s.get(name))
            .and_then(|s| s.get("targets"))
            .map(|n| n.at);
        let message = format!(
            "{} cannot be in memory together, as `spillover` needs: put them into one group with `swap: false`, or \
             into one set of the matrix",
            local
                .iter()
                .map(|id| format!("`{id}`"))
                .collect::<Vec<_>>()
                .join(", ")
        );
        findings.error(
            Code::Conflict,
            at.unwrap_or_default(),
            format!("selectors.{name}.targets"),
            message,
        );
    }
}
