//! Every known failure of the predecessor's tool-call parsers, streamed and not, with the right behaviour.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use chat_format::*;
use common::*;
use std::sync::Arc;

// The rows of "Known failures" in the reference, one by one.

#[test]
fn split_tags_never_leak() {
    let text = format!("Sure.\n{}", weather("{\"city\": \"Oslo\"}"));
    for size in 1..20 {
        let cut = pieces(&text, size);
        let deltas = run(config(), cut.iter().map(String::as_str), EndReason::Stop);
        let shown: String = deltas
            .iter()
            .map(|delta| {
                if let Delta::Content(text) = delta {
                    text.as_str()
                } else {
                    ""
                }
            })
            .collect();
        assert_eq!(shown, "Sure.");
    }
}

#[test]
fn leading_text_is_kept() {
    let reply = parse(&format!("I will check. {}", weather("{\"city\": \"Oslo\"}")));
    assert_eq!(reply.content, "I will check.");
    assert_eq!(reply.tool_calls, [call(0, "get_weather", "{\"city\": \"Oslo\"}")]);
}

#[test]
fn several_calls_are_coerced_alike() {
    let one = weather("{\"city\": \"Oslo\", \"days\": \"3\"}");
    let reply = parse(&format!("{one}\n{one}"));
    let read = "{\"city\": \"Oslo\", \"days\": 3}";
    assert_eq!(
        reply.tool_calls,
        [call(0, "get_weather", read), call(1, "get_weather", read)]
    );
    assert_eq!(reply.content, "");
}

#[test]
fn a_bad_call_between_good_ones() {
    let good = weather("{}");
    let bad = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {oops oops}}\n</tool_call>";
    let reply = parse(&format!("{good}\n{bad}\n{good}"));
    assert_eq!(
        reply.tool_calls,
        [call(0, "get_weather", "{}"), call(1, "get_weather", "{}")]
    );
    assert_eq!(reply.content.trim(), bad);
    assert_eq!(reply.malformed, [(bad.to_owned(), MalformedReason::Syntax)]);
}

#[test]
fn a_bad_call_alone_is_shown_as_it_was_written() {
    let bad = "<tool_call>{\"name\": nonsense}</tool_call>";
    let reply = parse(bad);
    assert_eq!(reply.tool_calls, []);
    assert_eq!(reply.content, bad);
}

#[test]
fn truncated_calls_are_told_apart() {
    // Before anything could be shown: the raw text.
    let text = "Ok <tool_call>{\"name\": \"get_wea";
    let reply = parse_as(&config(), text, EndReason::Length);
    assert_eq!(reply.tool_calls, []);
    assert_eq!(reply.content, text);
    assert_eq!(
        reply.malformed,
        [(
            "<tool_call>{\"name\": \"get_wea".to_owned(),
            MalformedReason::Truncated
        )]
    );

    // In the middle of the arguments: the call with what there is, and the outcome says so.
    let text = "Ok <tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Os";
    let reply = parse_as(&config(), text, EndReason::Length);
    assert_eq!(reply.content, "Ok");
    assert_eq!(reply.tool_calls.len(), 1);
    assert_eq!(reply.tool_calls[0].arguments, "{\"city\": \"Os");
    assert_eq!(reply.tool_calls[0].outcome, CallOutcome::Truncated);

    // Delivered whole, an incomplete call is none.
    let whole = OutputConfig {
        delivery: Delivery::Whole,
        ..config()
    };
    let reply = parse_as(&whole, text, EndReason::Length);
    assert_eq!((reply.tool_calls.len(), reply.content.as_str()), (0, text));

    // A value that was held back for coercion is not lost either.
    let text = "<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": \"12";
    let reply = parse_as(&config(), text, EndReason::Length);
    assert_eq!(
        reply.tool_calls[0].arguments,
        "{\"city\": \"Oslo\", \"days\": \"12"
    );

    // Cut off when only the closing bracket or tag was missing: the arguments are whole.
    for missing in [1, 3, 11, 12, 13] {
        let text = weather("{\"city\": \"Oslo\"}");
        let reply = parse_as(&config(), &text[..text.len() - missing], EndReason::Length);
        assert_eq!(
            reply.tool_calls,
            [call(0, "get_weather", "{\"city\": \"Oslo\"}")],
            "{missing}"
        );
        assert_eq!(reply.content, "", "{missing}");
    }
}

#[test]
fn a_missing_closing_tag() {
    let reply = parse("<tool_call>\n{\"name\": \"now\", \"arguments\": {}}");
    assert_eq!(reply.tool_calls, [call(0, "now", "{}")]);
    // Also before another call, and before text.
    let text = "<tool_call>{\"name\": \"now\"}\n<tool_call>{\"name\": \"now\"}\nDone.";
    let reply = parse(text);
    assert_eq!(reply.tool_calls, [call(0, "now", "{}"), call(1, "now", "{}")]);
    assert_eq!(reply.content.trim(), "Done.");
    // Missing brackets.
    let reply =
        parse("<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"tags\": [\"a\"\n</tool_call> x");
    assert_eq!(
        reply.tool_calls,
        [call(0, "get_weather", "{\"tags\": [\"a\"\n]}")]
    );
    assert_eq!(reply.content, " x");
}

#[test]
fn arguments_may_contain_the_closing_tag() {
    arguments(
        "{\"city\": \"here\\\"}}</tool_call>\"}",
        "{\"city\": \"here\\\"}}</tool_call>\"}",
    );
    arguments(
        "{\"city\": \"}</tool_call>\\n{\"}",
        "{\"city\": \"}</tool_call>\\n{\"}",
    );
}

#[test]
fn arguments_may_contain_the_opening_tag() {
    arguments(
        "{\"city\": \"a <tool_call>{\\\"name\\\": 1} b\"}",
        "{\"city\": \"a <tool_call>{\\\"name\\\": 1} b\"}",
    );
}

#[test]
fn parameters_for_arguments() {
    let reply =
        parse("<tool_call>{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Oslo\"}}</tool_call>");
    assert_eq!(reply.tool_calls, [call(0, "get_weather", "{\"city\": \"Oslo\"}")]);
}

#[test]
fn raw_line_breaks_and_python_literals() {
    arguments(
        "{\"city\": \"two\nlines\tand tab\"}",
        "{\"city\": \"two\\nlines\\tand tab\"}",
    );
    arguments(
        "{'city': 'it\\'s \"x\"', 'dry': True, 'free': None, 'tags': ['a', 'b',],}",
        "{\"city\": \"it's \\\"x\\\"\", \"dry\": true, \"free\": null, \"tags\": [\"a\", \"b\"]}",
    );
    let reply = parse("<tool_call>{'name': 'now', 'arguments': {}}</tool_call>");
    assert_eq!(reply.tool_calls, [call(0, "now", "{}")]);
}

#[test]
fn json_without_tags() {
    let reply = parse("{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\"}}");
    assert_eq!(reply.tool_calls, [call(0, "get_weather", "{\"city\": \"Oslo\"}")]);
    assert_eq!(reply.content, "");
    let reply = parse("\n{\"name\": \"now\", \"parameters\": {}}\n{\"name\": \"now\", \"arguments\": {}}\n");
    assert_eq!(reply.tool_calls, [call(0, "now", "{}"), call(1, "now", "{}")]);
    let reply = parse(r#"{"type": "function", "name": "now", "parameters": {}}"#);
    assert_eq!(reply.tool_calls, [call(0, "now", "{}")]);
    // An answer in JSON is an answer: unknown function, other keys, no arguments, broken, not at the start, no tools.
    for text in [
        "{\"name\": \"Oslo\", \"arguments\": {}}",
        "{\"city\": \"Oslo\"}",
        "{\"name\": \"now\"}",
        "{\"name\": \"now\", \"arguments\": {}, \"more\": 1}",
        "{\"name\": \"now\", \"arguments\": {]",
        "{\"name\": \"now\", \"arguments\": ",
        "{",
        "{\"</tool_",
        "See: {\"name\": \"now\", \"arguments\": {}}",
        "{\"a\": <b>}",
    ] {
        let reply = parse(text);
        assert_eq!((reply.tool_calls.len(), reply.content.as_str()), (0, text));
    }
    // Once it is text, tags in it are tags again.
    let reply = parse("{\"<tool_call>\u{e9}");
    assert_eq!(reply.content, "{\"<tool_call>\u{e9}");
    let no_tools = OutputConfig {
        tools: Arc::default(),
        ..config()
    };
    let text = "{\"name\": \"now\", \"arguments\": {}}";
    assert_eq!(parse_as(&no_tools, text, EndReason::Stop).content, text);
}

#[test]
fn unknown_functions_pass_and_are_marked() {
    let reply = parse("<tool_call>{\"name\": \"rm_rf\", \"arguments\": {\"days\": \"3\"}}</tool_call>");
    assert_eq!(reply.tool_calls, [call(0, "rm_rf", "{\"days\": \"3\"}")]);
    assert!(!reply.tool_calls[0].known);
}

#[test]
fn an_array_of_calls_in_one_tag() {
    let reply = parse(
        "<tool_call>[{\"name\": \"now\"}, {\"name\": \"get_weather\", \"arguments\": {\"days\": 1}}]</tool_call>",
    );
    assert_eq!(
        reply.tool_calls,
        [call(0, "now", "{}"), call(1, "get_weather", "{\"days\": 1}")]
    );
    assert_eq!(reply.content, "");
    let reply = parse("<tool_call>\n{\"name\": \"now\"}\n{\"name\": \"now\"}\n</tool_call>");
    assert_eq!(reply.tool_calls.len(), 2);
}

#[test]
fn reasoning_and_a_call_with_and_without_a_reasoning_parser() {
    let text = format!("<think>\nplan\n</think>\n\n{}", weather("{}"));
    let reply = parse_as(
        &OutputConfig {
            reasoning: Reasoning::Outside,
            ..config()
        },
        &text,
        EndReason::Stop,
    );
    assert_eq!((reply.reasoning.as_str(), reply.content.as_str()), ("plan", ""));
    assert_eq!(reply.tool_calls, [call(0, "get_weather", "{}")]);
    // For a model that knows no think block, it is text; the call is a call all the same.
    let reply = parse(&text);
    assert_eq!(reply.content, "<think>\nplan\n</think>");
    assert_eq!(reply.tool_calls.len(), 1);
}
