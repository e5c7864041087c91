//! Who may be resident beside whom: groups or a matrix of allowed sets.

use crate::event::ModelId;

/// One group of models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its models.
    pub members: Vec<ModelId>,
    /// Only one member at a time.
    pub swap: bool,
    /// Loading a member evicts the models of all other groups that are not persistent.
    pub exclusive: bool,
    /// Other groups' exclusive members don't evict its models.
    pub persistent: bool,
}

/// All groups. A model in none belongs to an implicit group with `swap` and `exclusive`: by default, one model at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// The declared groups.
    pub groups: Vec<Group>,
}

impl Groups {
    fn of(&self, model: &str) -> Option<(usize, &Group)> {
        self.groups
            .iter()
            .enumerate()
            .find(|(_, g)| g.members.iter().any(|m| &**m == model))
    }

    /// Whether loading `target` evicts `running`.
    fn evicts(&self, target: &str, running: &str) -> bool {
        let (target_group, running_group) = (self.of(target), self.of(running));
        let (swap, exclusive) = target_group.map_or((true, true), |(_, g)| (g.swap, g.exclusive));
        if target_group.map(|(i, _)| i) == running_group.map(|(i, _)| i) {
            return swap;
        }
        exclusive && !running_group.is_some_and(|(_, g)| g.persistent)
    }
}

/// A set expression over models: `&` together, `|` either.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// One model.
    Model(ModelId),
    /// All parts together.
    All(Vec<Expr>),
    /// One of the parts.
    Any(Vec<Expr>),
}

/// Models may be resident together when some set allows it (any subset of an allowed set is allowed).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matrix {
    /// The allowed sets, in order of definition; earlier ones win ties.
    pub sets: Vec<Expr>,
    /// What evicting a model costs; 1 for those not named.
    pub evict_costs: Vec<(ModelId, u64)>,
}

/// Most running models that one decision looks at, besides the target.
const MAX_RUNNING: usize = 63;

impl Matrix {
    /// The running models to evict for `target`: those outside the cheapest allowed set that contains it.
    ///
    /// Each expression is projected on target and running models (a bit each) while it is expanded, so the number of
    /// sets is bounded by what is running and not by the product of the alternatives.
    fn evictions<'a>(&self, target: &str, running: &[&'a ModelId]) -> Vec<&'a ModelId> {
        let running = running.get(..running.len().min(MAX_RUNNING)).unwrap_or_default();
        let mut best: Option<(u64, u64)> = None;
        for set in &self.sets {
            for mask in project(set, target, running) {
                if mask & 1 == 0 {
                    continue;
                }
                let cost = running
                    .iter()
                    .enumerate()
                    .map(|(i, m)| if mask & bit(i) == 0 { self.cost(m) } else { 0 });
                let cost = cost.sum();
                if best.is_none_or(|(least, _)| cost < least) {
                    best = Some((cost, mask));
                }
            }
        }
        let kept = best.map_or(0, |(_, mask)| mask);
        running
            .iter()
            .enumerate()
            .filter(|(i, _)| kept & bit(*i) == 0)
            .map(|(_, m)| *m)
            .collect()
    }

    fn cost(&self, model: &str) -> u64 {
        self.evict_costs
            .iter()
            .find(|(m, _)| &**m == model)
            .map_or(1, |(_, c)| *c)
    }
}

/// Bit of the `i`-th running model; bit 0 is the target.
fn bit(i: usize) -> u64 {
    1 << (i + 1)
}

fn project(expr: &Expr, target: &str, running: &[&ModelId]) -> Vec<u64> {
    match expr {
        Expr::Model(m) => {
            let mut mask = u64::from(&**m == target);
            if let Some(i) = running.iter().position(|r| *r == m) {
                mask |= bit(i);
            }
            vec![mask]
        }
        Expr::Any(parts) => {
            let mut out = Vec::new();
            for mask in parts.iter().flat_map(|p| project(p, target, running)) {
                if !out.contains(&mask) {
                    out.push(mask);
                }
            }
            out
        }
        Expr::All(parts) => {
            let mut out = vec![0_u64];
            for part in parts {
                let part = project(part, target, running);
                let mut joined = Vec::new();
                for mask in out.iter().flat_map(|a| part.iter().map(move |b| a | b)) {
                    if !joined.contains(&mask) {
                        joined.push(mask);
                    }
                }
                out = joined;
            }
            out
        }
    }
}

/// The rule in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Residency {
    /// By groups.
    Groups(Groups),
    /// By allowed sets.
    Matrix(Matrix),
}

impl Default for Residency {
    fn default() -> Self {
        Self::Groups(Groups::default())
    }
}

impl Residency {
    /// Which of `running` must be gone before `target` may start. A target that runs already evicts nothing.
    #[must_use]
    pub fn evictions<'a>(&self, target: &ModelId, running: &[&'a ModelId]) -> Vec<&'a ModelId> {
        if running.contains(&target) {
            return Vec::new();
        }
        match self {
            Self::Groups(g) => running.iter().filter(|r| g.evicts(target, r)).copied().collect(),
            Self::Matrix(m) => m.evictions(target, running),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(s: &str) -> ModelId {
        s.into()
    }

    fn group(members: &[&str], swap: bool, exclusive: bool, persistent: bool) -> Group {
        Group {
            members: members.iter().map(|m| id(m)).collect(),
            swap,
            exclusive,
            persistent,
        }
    }

    fn out(r: &Residency, target: &str, running: &[&str]) -> Vec<String> {
        let running: Vec<ModelId> = running.iter().map(|m| id(m)).collect();
        let running: Vec<&ModelId> = running.iter().collect();
        r.evictions(&id(target), &running)
            .iter()
            .map(|m| m.to_string())
            .collect()
    }

    #[test]
    fn by_default_one_model_at_a_time() {
        let r = Residency::default();
        assert_eq!(out(&r, "a", &["b"]), ["b"]);
        assert!(out(&r, "a", &["a"]).is_empty());
    }

    #[test]
    fn groups_follow_swap_exclusive_persistent() {
        let r = Residency::Groups(Groups {
            groups: vec![
                group(&["e1", "e2"], false, true, false),
                group(&["n1", "n2"], true, false, false),
                group(&["p"], false, false, true),
            ],
        });
        assert!(out(&r, "e1", &["e2"]).is_empty(), "no swap inside");
        assert_eq!(
            out(&r, "e1", &["n1", "p", "loose"]),
            ["n1", "loose"],
            "persistent stays"
        );
        assert_eq!(
            out(&r, "n1", &["n2", "e1", "loose"]),
            ["n2"],
            "a non-exclusive group evicts only its own"
        );
        assert_eq!(out(&r, "loose", &["e1", "e2", "n1", "p"]), ["e1", "e2", "n1"]);
    }

    #[test]
    fn matrix_keeps_the_cheapest_set() {
        let m = |s: &str| Expr::Model(id(s));
        let sets = vec![
            Expr::All(vec![m("a"), Expr::Any(vec![m("b"), m("c")])]),
            Expr::All(vec![m("d"), m("c")]),
        ];
        let r = Residency::Matrix(Matrix {
            sets: sets.clone(),
            evict_costs: vec![],
        });
        assert_eq!(out(&r, "a", &["b", "c"]), ["c"], "tie: the first alternative");
        let r = Residency::Matrix(Matrix {
            sets,
            evict_costs: vec![(id("c"), 5)],
        });
        assert_eq!(out(&r, "a", &["b", "c"]), ["b"], "cost decides");
        assert_eq!(out(&r, "a", &["d", "b"]), ["d"]);
        assert_eq!(out(&r, "z", &["a", "c"]), ["a", "c"], "in no set: alone");
        assert!(out(&r, "d", &["c"]).is_empty());
    }

    #[test]
    fn matrix_does_not_expand_the_product() {
        let any = |p: &str| Expr::Any((0..20).map(|i| Expr::Model(id(&format!("{p}{i}")))).collect());
        let sets = vec![Expr::All(
            ["a", "b", "c", "d", "e", "f", "g", "h"]
                .iter()
                .map(|p| any(p))
                .collect(),
        )];
        let r = Residency::Matrix(Matrix {
            sets,
            evict_costs: vec![],
        });
        assert_eq!(out(&r, "a1", &["a2", "b1", "h3"]), ["a2"]);
    }
}
