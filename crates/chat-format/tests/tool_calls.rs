//! Tool calls in the forms that models really write.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use chat_format::*;
use common::*;

#[test]
fn keys_in_any_order() {
    let reply = parse(
        "<tool_call>{\"arguments\": {\"days\": \"3\", \"city\": \"x\"}, \"name\": \"get_weather\"}</tool_call>",
    );
    assert_eq!(
        reply.tool_calls,
        [call(0, "get_weather", "{\"days\": 3, \"city\": \"x\"}")]
    );
    let reply = parse(
        "<tool_call>{\"id\": \"7\", \"type\": \"function\", \"function\": {\"arguments\": {\"days\": 3}, \"name\": \"get_weather\"}}</tool_call>",
    );
    assert_eq!(reply.tool_calls, [call(0, "get_weather", "{\"days\": 3}")]);
    assert_eq!(reply.content, "");
}

#[test]
fn arguments_as_text() {
    arguments(
        "\"{\\\"city\\\": \\\"Os\\\\\\\"lo\\\", \\\"days\\\": \\\"3\\\"}\"",
        "{\"city\": \"Os\\\"lo\", \"days\": 3}",
    );
    arguments("\"\"", "{}");
    arguments("null", "{}");
    let bad = weather("\"not an object\"");
    let reply = parse(&bad);
    assert_eq!((reply.tool_calls.len(), reply.content), (0, bad));
}

#[test]
fn arguments_beside_the_name() {
    let reply =
        parse("<tool_call>{\"name\": \"get_weather\", \"city\": \"Oslo\", \"days\": \"2\"}</tool_call>");
    assert_eq!(
        reply.tool_calls,
        [call(0, "get_weather", "{\"city\": \"Oslo\", \"days\": 2}")]
    );
    // With arguments, a further key has no place: it is shown.
    let reply = parse("<tool_call>{\"name\": \"now\", \"arguments\": {}, \"why\": \"because\"}</tool_call>");
    assert_eq!(reply.tool_calls, [call(0, "now", "{}")]);
    assert_eq!(
        reply.malformed,
        [("{\"why\":\"because\"}".to_owned(), MalformedReason::ExtraKeys)]
    );
}

#[test]
fn no_call_at_all_in_the_tag() {
    for (text, why) in [
        ("<tool_call></tool_call>", MalformedReason::NotACall),
        ("<tool_call>\nhello\n</tool_call>", MalformedReason::Syntax),
        (
            "<tool_call>{\"arguments\": {}}</tool_call>",
            MalformedReason::NotACall,
        ),
        (
            "<tool_call>{\"name\": \"\"}</tool_call>",
            MalformedReason::NotACall,
        ),
        (
            "<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>",
            MalformedReason::Syntax,
        ),
        (
            "<tool_call>{\"name\": \"now\", \"arguments\": [1]}</tool_call>",
            MalformedReason::Syntax,
        ),
        ("<tool_call>[1, 2]</tool_call>", MalformedReason::Syntax),
        (
            "<tool_call><function=now></function></tool_call>",
            MalformedReason::Syntax,
        ),
        (
            "<tool_call>{\"name\": \"now\", \"arguments\": {\"a\": \"x}</tool_call>",
            MalformedReason::Truncated,
        ),
        ("<tool_call>", MalformedReason::Syntax),
        ("<tool_call>{\"name\"</tool_call>", MalformedReason::Syntax),
    ] {
        let reply = parse(text);
        assert_eq!(reply.malformed, [(text.to_owned(), why)], "{text}");
        assert_eq!((reply.content.as_str(), reply.tool_calls.len()), (text, 0));
    }
}

#[test]
fn superfluous_brackets_and_tags() {
    for text in [
        "<tool_call>{\"name\": \"now\", \"arguments\": {}}}</tool_call>",
        "<tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}</tool_call>",
        "<tool_call>{\"name\": \"now\"},</tool_call>",
    ] {
        let reply = parse(text);
        assert_eq!(reply.tool_calls, [call(0, "now", "{}")], "{text}");
        assert_eq!(reply.content, "", "{text}");
    }
}

#[test]
fn text_between_and_after_calls() {
    let one = "<tool_call>{\"name\": \"now\"}</tool_call>";
    assert_eq!(parse(&format!("A\n\n{one}\n\nB\n{one} \n")).content, "A\n\n\n\nB");
    assert_eq!(parse("  no calls here \n").content, "  no calls here \n");
    assert_eq!(
        parse("a < b <to <tool <tool_cal> </tool_call> <<tool_call").content,
        "a < b <to <tool <tool_cal> </tool_call> <<tool_call"
    );
    assert_eq!(parse(&format!("<{one}")).tool_calls.len(), 1);
}

#[test]
fn repairs() {
    arguments(
        "{\"city\": \"\\d+ \\' \\x41 \\u00e9\"}",
        "{\"city\": \"\\\\d+ ' \\u0041 \\u00e9\"}",
    );
    arguments(
        "{\"city\": \"C:\\Users\\u12\"}",
        "{\"city\": \"C:\\\\Users\\\\u12\"}",
    );
    arguments(
        "{\"city\": \"\\ud83d\\ude00 \\ud83d \\ude00\"}",
        "{\"city\": \"\\ud83d\\ude00 \\ufffd \\ufffd\"}",
    );
    arguments(
        "{\"city\": \"\\ud83d\\n\\ud83d\\ud83d\\ude00\"}",
        "{\"city\": \"\\ufffd\\n\\ufffd\\ud83d\\ude00\"}",
    );
    arguments("{city: \"x\", days: 3,}", "{\"city\": \"x\", \"days\": 3}");
    arguments(
        "{\"rate\": .5, \"days\": +3, \"free\": [5., -.5e3, 1E9]}",
        "{\"rate\": 0.5, \"days\": 3, \"free\": [5.0, -0.5e3, 1E9]}",
    );
    arguments(
        "{\"free\": [1, 2, ], \"tags\": []}",
        "{\"free\": [1, 2 ], \"tags\": []}",
    );
    arguments(
        "{\"city\": \"\u{1}\u{7f}é👋\"}",
        "{\"city\": \"\\u0001\u{7f}é👋\"}",
    );
    for bad in [
        "{\"days\": 007}",
        "{\"free\": NaN}",
        "{\"free\": 1.2.3}",
        "{\"free\": yes}",
        "{\"free\" 1}",
        "{\"a\": 1 \"b\": 2}",
        "{\"a\": [1}}",
        "{1: 2}",
    ] {
        let text = weather(bad);
        let reply = parse(&text);
        assert_eq!((reply.tool_calls.len(), reply.content), (0, text));
    }
}

#[test]
fn strict_json_passes_unchanged() {
    for text in [
        "{}",
        "{ }",
        "{\n  \"city\" : \"a\\/b\\\"\\\\\\b\\f\\n\\r\\t\\u00E9\" ,\n\t\"free\":[ ] }",
        "{\"free\": {\"a\": [1, -0.5e-3, true, null, {\"b\": {}}], \"\": \"\"}}",
        "{\"rate\":1e300,\"days\":-12}",
    ] {
        arguments(text, text);
    }
}

#[test]
fn coercion_by_the_schema() {
    for (written, read) in [
        ("{\"days\": \" 3 \"}", "{\"days\": 3}"),
        ("{\"days\": \"3.0\"}", "{\"days\": 3}"),
        ("{\"days\": 3.0}", "{\"days\": 3}"),
        ("{\"days\": 3.5}", "{\"days\": 3.5}"),
        ("{\"days\": \"three\"}", "{\"days\": \"three\"}"),
        (
            "{\"days\": \"12345678901234567890123\"}",
            "{\"days\": 12345678901234567890123}",
        ),
        ("{\"rate\": \"1.50\"}", "{\"rate\": 1.50}"),
        ("{\"rate\": 7}", "{\"rate\": 7}"),
        (
            "{\"dry\": \"true\", \"free\": \"true\"}",
            "{\"dry\": true, \"free\": \"true\"}",
        ),
        ("{\"dry\": \"False\"}", "{\"dry\": false}"),
        ("{\"dry\": \"maybe\"}", "{\"dry\": \"maybe\"}"),
        ("{\"tags\": \"[\\\"a\\\", 'b']\"}", "{\"tags\": [\"a\", \"b\"]}"),
        ("{\"tags\": \"a\"}", "{\"tags\": \"a\"}"),
        ("{\"where\": \"{\\\"x\\\": 1}\"}", "{\"where\": {\"x\": 1}}"),
        ("{\"where\": \"{\\\"x\\\": 1\"}", "{\"where\": \"{\\\"x\\\": 1\"}"),
        ("{\"maybe\": \"null\"}", "{\"maybe\": null}"),
        ("{\"maybe\": \"4\"}", "{\"maybe\": 4}"),
        ("{\"either\": \"4\"}", "{\"either\": \"4\"}"),
        ("{\"city\": 5}", "{\"city\": \"5\"}"),
        ("{\"city\": 5.50}", "{\"city\": \"5.50\"}"),
        ("{\"city\": true}", "{\"city\": \"true\"}"),
        ("{\"city\": null}", "{\"city\": null}"),
        ("{\"city\": {\"a\": [1, 2]}}", "{\"city\": \"{\\\"a\\\":[1,2]}\"}"),
        ("{\"city\": [1, \"x\"]}", "{\"city\": \"[1,\\\"x\\\"]\"}"),
        ("{\"undeclared\": \"3\"}", "{\"undeclared\": \"3\"}"),
        (
            "{\"where\": {\"days\": \"3\", \"city\": 4}}",
            "{\"where\": {\"days\": \"3\", \"city\": 4}}",
        ),
    ] {
        arguments(written, read);
    }
}

#[test]
fn arguments_stream_as_they_are_written() {
    let mut parser = OutputParser::new(config());
    let mut deltas = Vec::new();
    parser.push(
        "<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Osl",
        &mut deltas,
    );
    assert_eq!(
        deltas,
        [
            Delta::ToolCallBegin {
                index: 0,
                id: "call_0".to_owned(),
                name: "get_weather".to_owned(),
                known: true
            },
            Delta::ToolCallArguments {
                index: 0,
                fragment: "{\"city\": \"Osl".to_owned()
            },
        ]
    );
    deltas.clear();
    // Only the value that may have to be converted waits.
    parser.push("o\", \"days\": \"1", &mut deltas);
    assert_eq!(
        deltas,
        [Delta::ToolCallArguments {
            index: 0,
            fragment: "o\", \"days\": ".to_owned()
        }]
    );
    deltas.clear();
    parser.push("2\"}}</tool_call>", &mut deltas);
    assert_eq!(
        deltas,
        [
            Delta::ToolCallArguments {
                index: 0,
                fragment: "12}".to_owned()
            },
            Delta::ToolCallEnd {
                index: 0,
                outcome: CallOutcome::Complete
            },
        ]
    );
}

#[test]
fn a_call_that_turns_invalid_in_the_stream_is_ended_and_shown() {
    let text = weather("{\"city\": \"Oslo\", \"free\": oops}");
    let deltas = merged(run(config(), [text.as_str()], EndReason::Stop));
    assert_eq!(
        deltas,
        [
            Delta::ToolCallBegin {
                index: 0,
                id: "call_0".to_owned(),
                name: "get_weather".to_owned(),
                known: true
            },
            Delta::ToolCallArguments {
                index: 0,
                fragment: "{\"city\": \"Oslo\", \"free\": ".to_owned()
            },
            Delta::ToolCallEnd {
                index: 0,
                outcome: CallOutcome::Invalid
            },
            Delta::Malformed {
                text: text.clone(),
                reason: MalformedReason::Syntax
            },
        ]
    );
}

#[test]
fn formats_have_names() {
    assert_eq!(
        ToolFormat::resolve("auto", "x <tool_call> y"),
        Ok(ToolFormat::Hermes)
    );
    assert_eq!(ToolFormat::resolve("auto", "x"), Ok(ToolFormat::None));
    assert_eq!(
        ToolFormat::resolve("auto", "<tool_call>\n<function=f>"),
        Ok(ToolFormat::None)
    );
    for name in ["hermes", "qwen", "qwen3"] {
        assert_eq!(ToolFormat::resolve(name, "x"), Ok(ToolFormat::Hermes));
    }
    assert_eq!(ToolFormat::resolve("none", "<tool_call>"), Ok(ToolFormat::None));
    assert!(
        ToolFormat::resolve("gpt", "")
            .unwrap_err()
            .to_string()
            .contains("\"gpt\"")
    );
    let none = OutputConfig {
        tool_format: ToolFormat::None,
        ..config()
    };
    let text = weather("{}");
    assert_eq!(parse_as(&none, &text, EndReason::Stop).content, text);
}
