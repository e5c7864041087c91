//! Rendered prompts equal `transformers`' own, byte for byte. The goldens are made by fixtures/generate.py.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use chat_format::{ChatTemplate, RenderInputs, TemplateError};
use serde_json::{Map, Value};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn golden(name: &str) -> Value {
    let path = fixtures().join("golden").join(format!("{name}.json"));
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap()
}

/// The clock of generate.py.
fn fixed(template: ChatTemplate) -> ChatTemplate {
    let now = jiff::civil::date(2025, 3, 7).at(9, 5, 3, 0);
    template.with_clock(Arc::new(move || now))
}

fn specials(golden: &Value) -> Map<String, Value> {
    golden["special_tokens"].as_object().unwrap().clone()
}

/// Cases that Python refuses and this renders, or the reverse, each with its reason.
const GAPS: &[(&str, &str)] = &[
    ("'aaa'.replace('a', 'b', count=1)", "allowed from Python 3.13 on"),
    (
        "'%s: %d%%' % ('a', 5)",
        "the operator is not extensible; the format filter and str.format work",
    ),
    ("'%s' % 1.5", "as above"),
    ("'%05.2f' % 3.14159", "as above"),
    (
        "'{:>5}|{:<4}|{:.2f}|{!r}'.format('a', 'b', 1.005, 'q')",
        "no conversions (!r) in str.format",
    ),
    ("l|random in l", "a prompt that depends on chance is none"),
    ("{'a': 1}|xmlattr", "HTML only"),
    ("'<&>'|forceescape", "HTML only"),
    ("{'a b': 'c', 'd': 1}|urlencode", "a space becomes %20, not +"),
    ("lipsum is defined", "filler text"),
    ("block", "no `self`"),
    (
        "'tést'.encode is defined",
        "methods are no values: only calls of them work",
    ),
    (
        "schema walk",
        "as above: in Python, x['items'] without such a key is the method",
    ),
    ("[1, 2, 3]|batch(2, fill_with='x')|list", "by place only"),
    ("varargs and kwargs", "macros take declared arguments only"),
    ("text compared with a number", "lenient where Python raises"),
    ("sorting mixed values", "lenient where Python raises"),
    ("undefined in text", "lenient where Python raises"),
    (
        "looping over none",
        "lenient where Python raises: the loop is empty",
    ),
    (
        "loop.last over 'ab'",
        "the engine does not know a string's length in a loop",
    ),
    ("loop.last over 'ab'|reverse", "as above"),
    (
        "loop.last over recs|groupby('k')",
        "groups print as lists, not as tuples",
    ),
];

/// Renders one case; what differs is described.
fn compare(template: &ChatTemplate, case: &Value, raw: bool) -> Option<String> {
    let list = |key: &str| case[key].as_array().map(Vec::as_slice);
    let inputs = RenderInputs {
        messages: case["messages"].as_array().unwrap(),
        tools: list("tools"),
        documents: list("documents"),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
        kwargs: case["kwargs"].as_object(),
    };
    let rendered = if raw {
        template.render_raw(&inputs)
    } else {
        template.render(&inputs)
    };
    let name = case["name"].as_str().unwrap();
    let gap = GAPS.iter().any(|(gap, _)| *gap == name);
    let problem = match (&rendered, case["expected"].as_str(), case["error"].as_str()) {
        (Ok(text), Some(expected), _) if text == expected => None,
        (Ok(text), Some(expected), _) => Some(format!("expected {expected:?}\n     got {text:?}")),
        (Ok(text), None, Some(error)) => Some(format!("expected the error {error:?}\n     got {text:?}")),
        (Err(error), Some(expected), _) => Some(format!("expected {expected:?}\n     got the error {error}")),
        (Err(error), None, Some(expected)) => {
            let raised = case["raised"].as_bool().unwrap();
            match error {
                TemplateError::Raised { message, line } if raised && message == expected && *line > 0 => None,
                TemplateError::Render { line, .. } if !raised && *line > 0 => None,
                other => Some(format!("expected the error {expected:?}\n     got {other:?}")),
            }
        }
        (_, None, None) => Some("a case without a result".to_owned()),
    };
    match (problem, gap) {
        (Some(_), true) | (None, false) => None,
        (Some(problem), false) => Some(format!("{name}:\n{problem}\n")),
        (None, true) => Some(format!("{name}: listed as a gap, but there is none\n")),
    }
}

fn check_all(template: &ChatTemplate, golden: &Value) {
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 40, "only {} cases", cases.len());
    let problems: Vec<String> = cases
        .iter()
        .filter_map(|case| compare(template, case, false))
        .collect();
    assert!(
        problems.is_empty(),
        "{} of {} differ:\n{}",
        problems.len(),
        cases.len(),
        problems.join("\n")
    );
}

fn check_template(name: &str) {
    let golden = golden(name);
    let source = std::fs::read_to_string(fixtures().join(format!("templates/{name}.jinja"))).unwrap();
    check_all(
        &fixed(ChatTemplate::from_source(&source, specials(&golden)).unwrap()),
        &golden,
    );
}

#[test]
fn chatml() {
    check_template("chatml");
}

#[test]
fn qwen3() {
    check_template("qwen3");
}

#[test]
fn llama3() {
    check_template("llama3");
}

#[test]
fn mistral() {
    check_template("mistral");
}

#[test]
fn gemma() {
    check_template("gemma");
}

#[test]
fn gptoss() {
    check_template("gptoss");
}

/// The template that ships with the demo model, read from the model's directory.
#[test]
fn demo_model() {
    let golden = golden("demo");
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo/model");
    let template = fixed(ChatTemplate::from_dir(&dir).unwrap());
    assert_eq!(
        template.source(false),
        golden["source"].as_str().unwrap(),
        "the demo model's template has changed: run crates/chat-format/fixtures/generate.py"
    );
    assert_eq!(
        template.special_tokens(),
        golden["special_tokens"].as_object().unwrap()
    );
    check_all(&template, &golden);
}

/// One little template per feature of Jinja2 and Python.
#[test]
fn odd_templates() {
    let golden = golden("odd");
    let cases = golden["cases"].as_array().unwrap();
    let mut problems = Vec::new();
    for case in cases {
        let source = case["template"].as_str().unwrap();
        match ChatTemplate::from_source(source, specials(&golden)) {
            Ok(template) => problems.extend(compare(&fixed(template), case, true)),
            // Python refuses it, too.
            Err(TemplateError::Syntax { .. }) if case["error"].is_string() => {}
            Err(error) => problems.push(format!("{}: {error}", case["name"])),
        }
    }
    assert!(
        problems.is_empty(),
        "{} of {} differ:\n{}",
        problems.len(),
        cases.len(),
        problems.join("\n")
    );
}
