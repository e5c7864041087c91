//! What the model wrote, streamed and not: every known failure of the predecessor's parsers, and more.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
// Each test file uses its share.
#![allow(dead_code)]

use std::sync::Arc;

use chat_format::{
    CallOutcome, Delivery, Delta, EndReason, OutputConfig, OutputParser, ParsedOutput, ToolCall, ToolFormat,
    ToolSet,
};
use serde_json::{Value, json};

pub(crate) fn tools() -> Arc<ToolSet> {
    Arc::new(ToolSet::from_openai(&[
        json!({"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "rate": {"type": "number"},
            "dry": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "where": {"type": "object"},
            "maybe": {"type": ["integer", "null"]},
            "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "free": {},
        }}}}),
        json!({"type": "function", "function": {"name": "now"}}),
    ]))
}

pub(crate) fn config() -> OutputConfig {
    OutputConfig {
        tool_format: ToolFormat::Hermes,
        tools: tools(),
        call_id_prefix: "call_".to_owned(),
        ..OutputConfig::default()
    }
}

pub(crate) fn run<'a>(
    config: OutputConfig,
    pieces: impl IntoIterator<Item = &'a str>,
    end: EndReason,
) -> Vec<Delta> {
    let mut parser = OutputParser::new(config);
    let mut deltas = Vec::new();
    for piece in pieces {
        parser.push(piece, &mut deltas);
    }
    parser.finish(end, &mut deltas);
    deltas
}

/// The deltas without the accidents of chunking: neighbours of one kind are one.
pub(crate) fn merged(deltas: Vec<Delta>) -> Vec<Delta> {
    let mut out: Vec<Delta> = Vec::new();
    for delta in deltas {
        match (out.last_mut(), delta) {
            (Some(Delta::Content(last)), Delta::Content(text)) => last.push_str(&text),
            (Some(Delta::Reasoning(last)), Delta::Reasoning(text)) => last.push_str(&text),
            (
                Some(Delta::ToolCallArguments { index, fragment }),
                Delta::ToolCallArguments {
                    index: other,
                    fragment: more,
                },
            ) if *index == other => fragment.push_str(&more),
            (_, delta) => out.push(delta),
        }
    }
    out
}

/// Cuts text into pieces of `size` characters.
pub(crate) fn pieces(text: &str, size: usize) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    chars.chunks(size).map(|chunk| chunk.iter().collect()).collect()
}

/// Parses whole, by characters, by threes and by sevens; all of them must say the same.
pub(crate) fn parse_as(config: &OutputConfig, text: &str, end: EndReason) -> ParsedOutput {
    let whole = merged(run(config.clone(), [text], end));
    for size in [1, 2, 3, 7] {
        let cut = pieces(text, size);
        let streamed = merged(run(config.clone(), cut.iter().map(String::as_str), end));
        assert_eq!(streamed, whole, "in pieces of {size}: {text:?}");
    }
    ParsedOutput::from_deltas(whole)
}

/// Both ways of delivery, which must agree on everything complete.
pub(crate) fn parse(text: &str) -> ParsedOutput {
    let streamed = parse_as(&config(), text, EndReason::Stop);
    let whole = parse_as(
        &OutputConfig {
            delivery: Delivery::Whole,
            ..config()
        },
        text,
        EndReason::Stop,
    );
    assert_eq!(streamed.tool_calls, whole.tool_calls, "{text:?}");
    assert_eq!(streamed.content, whole.content, "{text:?}");
    whole
}

pub(crate) fn call(index: usize, name: &str, arguments: &str) -> ToolCall {
    ToolCall {
        id: format!("call_{index}"),
        name: name.to_owned(),
        known: matches!(name, "get_weather" | "now"),
        arguments: arguments.to_owned(),
        outcome: CallOutcome::Complete,
    }
}

pub(crate) fn weather(arguments: &str) -> String {
    format!("<tool_call>\n{{\"name\": \"get_weather\", \"arguments\": {arguments}}}\n</tool_call>")
}

/// One call of get_weather with these arguments gives these.
#[track_caller]
pub(crate) fn arguments(written: &str, read: &str) {
    let reply = parse(&weather(written));
    assert_eq!(
        reply.tool_calls,
        [call(0, "get_weather", read)],
        "{written}: {reply:?}"
    );
    assert_eq!(reply.content, "", "{written}");
    serde_json::from_str::<Value>(&reply.tool_calls[0].arguments).unwrap();
}
