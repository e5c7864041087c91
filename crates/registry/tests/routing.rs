//! Groups, the matrix language, priorities.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{errors, load, warnings};
use proptest::prelude::*;
use registry::{Registry, Routing};

fn models(ids: &[&str]) -> String {
    let rows: Vec<String> = ids
        .iter()
        .map(|id| format!("  {id}: {{cmd: 'x ${{PORT}}'}}\n"))
        .collect();
    format!("models:\n{}", rows.concat())
}

#[test]
fn without_groups_models_take_turns() {
    let registry = load(&models(&["a", "b", "c"]));
    assert_eq!(registry.evictions("a", &["b"]), ["b"]);
    assert_eq!(
        registry.evictions("a", &["a", "b"]),
        Vec::<&str>::new(),
        "it runs already"
    );
    let Routing::Groups(groups) = &registry.routing else {
        panic!("matrix")
    };
    assert_eq!(groups["(default)"].members, ["a", "b", "c"]);
}

#[test]
fn groups_swap_exclude_and_persist() {
    let registry = load(&format!(
        "{}groups:\n  turn: {{members: [a, b]}}\n  side: {{swap: false, exclusive: false, members: [c, d]}}\n  \
         stay: {{swap: false, persistent: true, exclusive: false, members: [e]}}\n",
        models(&["a", "b", "c", "d", "e", "f"])
    ));
    assert_eq!(
        registry.evictions("a", &["b", "c", "e", "f"]),
        ["b", "c", "f"],
        "exclusive, and e persists"
    );
    assert_eq!(
        registry.evictions("c", &["a", "d", "e"]),
        Vec::<&str>::new(),
        "not exclusive: evicts nobody"
    );
    assert_eq!(registry.evictions("e", &["a", "c"]), Vec::<&str>::new());
    assert_eq!(
        registry.evictions("f", &["a", "e"]),
        ["a"],
        "the default group is exclusive"
    );
    assert_eq!(
        registry.evictions("c", &["gone"]),
        ["gone"],
        "a model that is no longer defined goes"
    );
    assert!(
        registry.can_coexist(&["c", "d"])
            && !registry.can_coexist(&["a", "b"])
            && !registry.can_coexist(&["a", "c"])
    );
}

#[test]
fn group_errors() {
    let found = errors(&format!(
        "{}groups:\n  g: {{members: [a, a, nope, al]}}\n  h: {{members: [a, b]}}\n",
        models(&["a", "b"]).replace("b: {", "b: {aliases: [al], ")
    ));
    assert!(found[0].contains("groups.g.members[1]: `a` is listed twice"));
    assert!(found[1].contains("groups.g.members[2]: references unknown model `nope`"));
    assert!(found[2].contains("groups.g.members[3]: `al` is an alias; name the model by its id `b`"));
    assert!(found[3].contains("groups.h.members[0]: `a` is in group `g` already"));
    let found = warnings(&format!(
        "{}groups:\n  (default): {{swap: false}}\n",
        models(&["a"])
    ));
    assert!(found[0].contains("a group of this name is not used"));
}

#[test]
fn old_and_new_places() {
    let new = load(&format!(
        "{}routing:\n  router:\n    settings:\n      groups: {{g: {{swap: false, members: [a, b]}}}}\n",
        models(&["a", "b"])
    ));
    let old = load(&format!(
        "{}groups: {{g: {{swap: false, members: [a, b]}}}}\n",
        models(&["a", "b"])
    ));
    assert_eq!(new, old);
    let both = "groups: {g: {members: [a]}}\nrouting: {router: {settings: {groups: {h: {members: [b]}}}}}\n";
    assert!(
        errors(&format!("{}{both}", models(&["a", "b"])))[0]
            .contains("`groups` and `routing.router` are both given")
    );
    let both = "groups: {g: {members: [a]}}\nmatrix: {sets: {s: b}}\n";
    assert!(
        errors(&format!("{}{both}", models(&["a", "b"])))[0].contains("`groups` and `matrix` are both given")
    );
    let without = "routing: {router: {use: matrix}}\n";
    assert!(
        errors(&format!("{}{without}", models(&["a"])))[0]
            .contains("routing.router.settings.matrix is missing")
    );
    let chosen =
        "routing: {router: {use: group, settings: {matrix: {sets: {s: a}}, groups: {g: {members: [a]}}}}}\n";
    assert!(matches!(
        load(&format!("{}{chosen}", models(&["a"]))).routing,
        Routing::Groups(_)
    ));
    assert!(
        errors("routing: {scheduler: {use: lifo}}")[0].contains("expected one of fifo, found text (`lifo`)")
    );
}

#[test]
fn priorities_by_id_or_alias() {
    let text = models(&["a", "b"]).replace("b: {", "b: {aliases: [al], ");
    let registry = load(&format!(
        "{text}routing: {{scheduler: {{settings: {{fifo: {{priority: {{a: -1, al: 5}}, maxWait: 3}}}}}}}}\n"
    ));
    assert_eq!(
        (registry.models["a"].priority, registry.models["b"].priority),
        (-1, 5)
    );
    let scheduler = &registry.globals.scheduler;
    assert_eq!((scheduler.max_wait.as_secs(), scheduler.max_passed), (3, 16));
    let found = errors(&format!(
        "{text}routing: {{scheduler: {{settings: {{fifo: {{priority: {{bb: 1}}}}}}}}}}\n"
    ));
    assert!(
        found[0].contains("fifo.priority.bb: references unknown model `bb`"),
        "{found:?}"
    );
}

fn matrix(ids: &[&str], rest: &str) -> Registry {
    load(&format!("{}matrix:\n{rest}", models(ids)))
}

#[test]
fn the_matrix_keeps_what_costs_most_to_unload() {
    let registry = matrix(
        &["a", "b", "c", "d", "e"],
        "  vars: {A: a, B: b}\n  evict_costs: {B: 5, c: 3}\n  sets:\n    one: A & (B | c)\n    two: A & c & d\n    three: +one & d\n    four: e\n",
    );
    assert_eq!(
        registry.evictions("a", &["b", "c"]),
        ["c"],
        "b costs 5 to unload, c 3"
    );
    assert_eq!(
        registry.evictions("a", &["c", "d"]),
        Vec::<&str>::new(),
        "they are one set"
    );
    assert_eq!(
        registry.evictions("a", &["b", "c", "d"]),
        ["c"],
        "+one & d keeps b and d: 6 beats 4"
    );
    assert_eq!(registry.evictions("e", &["a", "b"]), ["a", "b"]);
    assert_eq!(
        registry.evictions("d", &["b"]),
        Vec::<&str>::new(),
        "any part of a set is allowed"
    );
    assert!(registry.can_coexist(&["a", "c", "d"]) && !registry.can_coexist(&["a", "b", "c"]));
}

#[test]
fn a_model_in_no_set_runs_alone_and_ties_go_to_the_first_set() {
    let registry = matrix(&["a", "b", "c", "d"], "  sets:\n    s: a & b\n    t: a & c\n");
    assert_eq!(registry.evictions("d", &["a", "b"]), ["a", "b"]);
    assert_eq!(
        registry.evictions("a", &["b", "c"]),
        ["c"],
        "equal costs: set s comes first"
    );
    let registry = matrix(
        &["a", "b", "c", "d"],
        "  sets:\n    t: a & +u\n    u: c\n    s: a & b\n",
    );
    assert_eq!(registry.evictions("a", &["b", "c"]), ["b"]);
}

#[test]
fn matrix_errors_name_the_place() {
    let found = errors(&format!(
        "{}matrix:\n  vars: {{'a b': a, x: nope}}\n  evict_costs: {{zz: 1, a: 0}}\n  sets:\n    empty: ''\n    open: (a & b\n    \
         stray: a b\n    ends: a &\n    sign: a % b\n    unknown: q\n    self: a & +loop\n    loop: +self\n    gone: +missing\n    bare: ok\n    ok: a\n    after: +open\n",
        models(&["a", "b"])
    ));
    for text in [
        "matrix.vars.a b: a short name is",
        "matrix.vars.x: references unknown model `nope`",
        "matrix.evict_costs.zz: references unknown model `zz`",
        "matrix.evict_costs.a: 0 is out of range",
        "matrix.sets.empty: is empty",
        "matrix.sets.open: the parenthesis at column 1 of the expression is not closed",
        "matrix.sets.stray: unexpected `b` at column 3",
        "matrix.sets.ends: ends where a model is expected",
        "matrix.sets.sign: unexpected `%` at column 3",
        "matrix.sets.unknown: `q` is neither in `vars` nor the id of a model",
        "leads back to the set itself",
        "matrix.sets.gone: `+missing` refers to a set that does not exist",
        "matrix.sets.bare: `ok` is neither in `vars` nor the id of a model; for the set of that name write `+ok`",
    ] {
        assert!(found.iter().any(|f| f.contains(text)), "{text}\n{found:#?}");
    }
    assert_eq!(found.len(), 13, "{found:#?}");
    assert!(errors("matrix: {sets: {}}")[0].contains("matrix.sets: needs at least one set"));
    assert!(errors("matrix: {vars: {}}")[0].contains("matrix.sets: is missing"));
    let deep = format!("{}a{}", "(".repeat(40), ")".repeat(40));
    assert!(
        errors(&format!("{}matrix: {{sets: {{s: '{deep}'}}}}", models(&["a"])))[0]
            .contains("nested parentheses")
    );
    let pluses = "+".repeat(200_000);
    assert!(
        errors(&format!("{}matrix: {{sets: {{s: '{pluses}'}}}}", models(&["a"])))[0]
            .contains("needs the name of a set")
    );
}

#[test]
fn a_wide_matrix_is_answered_at_once() {
    // 2^30 expansions, and thirty pairs that all count.
    let ids: Vec<String> = (0..60).map(|i| format!("m{i}")).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let pairs: Vec<String> = (0..30)
        .map(|i| format!("(m{} | m{})", 2 * i, 2 * i + 1))
        .collect();
    let registry = matrix(&ids, &format!("  sets:\n    s: {}\n", pairs.join(" & ")));
    assert_eq!(registry.evictions("m0", &["m1", "m2", "m3", "m4"]).len(), 2);
    let running: Vec<&str> = ids[1..].to_vec();
    let gone = registry.evictions("m0", &running);
    assert_eq!(gone.len(), 30, "one of every pair goes");
}

/// An expression and all its expansions, listed the slow way.
fn expression() -> impl Strategy<Value = (String, Vec<u8>)> {
    let leaf = (0..5u8).prop_map(|i| (format!("m{i}"), vec![1u8 << i]));
    leaf.prop_recursive(3, 12, 3, |inner| {
        (any::<bool>(), prop::collection::vec(inner, 1..4)).prop_map(|(and, parts)| {
            let text: Vec<String> = parts.iter().map(|(t, _)| format!("({t})")).collect();
            if and {
                let sets = parts.iter().fold(vec![0u8], |sofar, (_, more)| {
                    sofar
                        .iter()
                        .flat_map(|a| more.iter().map(move |b| a | b))
                        .collect()
                });
                (text.join(" & "), sets)
            } else {
                (
                    text.join(" | "),
                    parts.into_iter().flat_map(|(_, sets)| sets).collect(),
                )
            }
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn the_solver_finds_the_cheapest_of_all_expansions(
        sets in prop::collection::vec(expression(), 1..4),
        costs in prop::collection::vec(1..9u64, 5),
        running in 0..32u8,
        target in 0..5u8,
    ) {
        let running = running & !(1 << target);
        let mut rest = "  evict_costs: {".to_owned();
        rest.push_str(&costs.iter().enumerate().map(|(i, c)| format!("m{i}: {c}")).collect::<Vec<_>>().join(", "));
        rest.push_str("}\n  sets:\n");
        for (i, (text, _)) in sets.iter().enumerate() {
            rest.push_str(&format!("    s{i}: {text}\n"));
        }
        let registry = matrix(&["m0", "m1", "m2", "m3", "m4"], &rest);
        let names = ["m0", "m1", "m2", "m3", "m4"];
        let list: Vec<&str> = (0..5).filter(|i| running & (1 << i) != 0).map(|i| names[i]).collect();
        let evicted = registry.evictions(names[target as usize], &list);
        let cost = |mask: u8| -> u64 { (0..5).filter(|i| mask & (1 << i) != 0).map(|i| costs[i]).sum() };
        let best = sets.iter().flat_map(|(_, s)| s).filter(|s| *s & (1 << target) != 0).map(|s| cost(running & !s)).min();
        let evicted_mask = evicted.iter().fold(0u8, |m, id| m | 1 << names.iter().position(|n| n == id).unwrap());
        prop_assert_eq!(cost(evicted_mask), best.unwrap_or(cost(running)));
        // What is left fits into one expansion together with the target.
        let left = running & !evicted_mask | 1 << target;
        let fits = sets.iter().flat_map(|(_, s)| s).any(|s| s & left == left);
        prop_assert!(fits || (best.is_none() && left == 1 << target));
    }
}
