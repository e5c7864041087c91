//! Nothing that a file may hold brings the reader down, or takes all memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{errors, read};
use proptest::prelude::*;
use registry::{Diagnostic, Registry, Severity};

#[test]
fn aliases_cannot_take_all_memory() {
    let mut text = "x0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n".to_owned();
    for i in 1..12 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        text.push_str(&format!("x{i}: &a{i} [{refs}]\n"));
    }
    assert!(errors(&text)[0].contains("more than 500000 values"));
}

#[test]
fn a_thousand_errors_are_enough_said_with_five_hundred() {
    let rows: Vec<String> = (0..2000).map(|i| format!("  m{i}: {{nope: 1}}\n")).collect();
    let found = read(&format!("models:\n{}", rows.concat()), &|_| None).unwrap_err();
    assert_eq!(
        found.iter().filter(|d| d.severity == Severity::Error).count(),
        500
    );
    assert_eq!(
        found.iter().filter(|d| d.severity == Severity::Warning).count(),
        500
    );
}

fn check_places(text: &str, found: &[Diagnostic]) {
    let lines: Vec<&str> = text.split('\n').collect();
    for d in found {
        assert!(
            d.line as usize <= lines.len() + 1 && (d.line == 0) == (d.column == 0),
            "{d}"
        );
        if let Some(line) = (d.line as usize).checked_sub(1).and_then(|l| lines.get(l)) {
            assert!(d.column as usize <= line.chars().count() + 1, "{d}\n{text}");
        }
    }
}

/// Lines of real configurations, in any order and indentation, with a stray character now and then.
fn scramble() -> impl Strategy<Value = String> {
    let lines = vec![
        "models:",
        "m:",
        "cmd: x --port ${PORT}",
        "cmd: |",
        "worker:",
        "model: a/b",
        "maxNumSeqs: 4",
        "ttl: 5",
        "- a",
        "aliases: [a, b]",
        "<<: *x",
        "x: &x {a: 1}",
        "macros:",
        "k: ${k}",
        "v: ${m}${k}",
        "groups:",
        "members: [m]",
        "matrix:",
        "sets:",
        "s: a & (b | +t)",
        "vars: {a: m}",
        "selectors:",
        "strategy: warm",
        "targets: [m, a]",
        "peers:",
        "proxy: http://h:1",
        "models: [m]",
        "profiles:",
        "pins: {a: m}",
        "filters: {setParamsByID: {'${MODEL_ID}': {a: 1}}}",
        "env: ['${env.HOME}']",
        "apiKeys: ['']",
        "routing:",
        "router:",
        "settings:",
        "use: matrix",
        "scheduler:",
        "fifo:",
        "priority: {m: 1}",
        "hooks: {on_startup: {preload: [m]}}",
        "performance: {every: 1s}",
        "# ${env.X}",
        "'",
        "\"",
        "{",
        "]",
        "---",
        "? a",
        "!!int x",
        "\t",
    ];
    let line = (0..6usize, prop::sample::select(lines))
        .prop_map(|(indent, line)| format!("{}{line}", "  ".repeat(indent)));
    prop::collection::vec(line, 0..30).prop_map(|lines| lines.join("\n"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn any_text_is_read_or_refused_with_places(text in any::<String>()) {
        if let Err(found) = read(&text, &|_| Some("v".to_owned())) {
            prop_assert!(found.iter().any(|d| d.severity == Severity::Error));
            check_places(&text, &found);
        }
    }

    #[test]
    fn any_scrambled_configuration_is_read_or_refused_with_places(text in scramble()) {
        match read(&text, &|_| Some("some value".to_owned())) {
            Err(found) => {
                prop_assert!(found.iter().any(|d| d.severity == Severity::Error));
                check_places(&text, &found);
            }
            Ok((registry, found)) => {
                prop_assert!(found.iter().all(|d| d.severity == Severity::Warning));
                check_places(&text, &found);
                prop_assert!(Registry::diff(&registry, &registry).is_empty());
                // Every name leads to the model that has it.
                for model in registry.models.values() {
                    prop_assert_eq!(&registry.model(&model.id).unwrap().id, &model.id);
                    for alias in &model.aliases {
                        prop_assert_eq!(&registry.model(alias).unwrap().id, &model.id);
                    }
                }
                prop_assert!(!registry.to_yaml().is_empty());
            }
        }
    }
}
