//! Reasoning and the answer, told apart.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use chat_format::*;
use common::*;

fn think(reasoning: Reasoning, text: &str) -> (String, String) {
    let reply = parse_as(
        &OutputConfig {
            reasoning,
            ..config()
        },
        text,
        EndReason::Stop,
    );
    assert_eq!(reply.tool_calls, []);
    (reply.reasoning, reply.content)
}

#[test]
fn reasoning_is_split_from_the_answer() {
    for (reasoning, text, thought, answer) in [
        (
            Reasoning::Outside,
            "<think>\na\n\nb\n</think>\n\nc\n",
            "a\n\nb",
            "c\n",
        ),
        (Reasoning::Outside, "\n <think>a</think>c", "a", "c"),
        (Reasoning::Inside, "a\n</think>\n\nc", "a", "c"),
        (Reasoning::Inside, "\na</think>c", "a", "c"),
        // The model repeats the tag that the prompt has opened.
        (Reasoning::Inside, "<think>\na</think>c", "a", "c"),
        // Empty blocks.
        (Reasoning::Outside, "<think>\n\n</think>\n\nc", "", "c"),
        (Reasoning::Inside, "</think>c", "", "c"),
        // Two blocks.
        (
            Reasoning::Outside,
            "<think>a</think>\n<think>b</think>c",
            "a\nb",
            "c",
        ),
        // Tags that only look like it.
        (
            Reasoning::Inside,
            "a < b </thin </think >x</think>c",
            "a < b </thin </think >x",
            "c",
        ),
        (
            Reasoning::Inside,
            "see <think> and <tool_call>\n</think>c",
            "see <think> and <tool_call>",
            "c",
        ),
        // Without any tag, after a prompt that has opened none: an answer, not reasoning.
        (Reasoning::Outside, "The answer is 42.", "", "The answer is 42."),
        (Reasoning::Outside, "  x", "", "  x"),
        // Cut off while thinking: all of it is reasoning.
        (Reasoning::Inside, "so far", "so far", ""),
        (Reasoning::Outside, "<think>so far\n</thi", "so far\n</thi", ""),
        (Reasoning::Outside, "<thi", "", "<thi"),
        (Reasoning::Outside, "<think>a</think>\n<thi", "a", "<thi"),
        // A later tag belongs to the answer: what has been shown is not re-labelled.
        (
            Reasoning::Outside,
            "use the </think> tag",
            "",
            "use the </think> tag",
        ),
        (
            Reasoning::Outside,
            "<think>a</think>b<think>c</think>d",
            "a",
            "b<think>c</think>d",
        ),
        (Reasoning::Off, "<think>a</think>b", "", "<think>a</think>b"),
    ] {
        assert_eq!(
            think(reasoning, text),
            (thought.to_owned(), answer.to_owned()),
            "{reasoning:?} {text:?}"
        );
    }
}

#[test]
fn the_start_is_read_from_the_prompt() {
    let template = "{{ '<think>\\n' }}";
    for (prompt, expected) in [
        ("<|im_start|>assistant\n", Reasoning::Outside),
        ("<|im_start|>assistant\n<think>\n", Reasoning::Inside),
        (
            "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            Reasoning::Outside,
        ),
        (
            "<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n",
            Reasoning::Outside,
        ),
    ] {
        assert_eq!(Reasoning::detect(template, prompt), expected, "{prompt:?}");
    }
    assert_eq!(Reasoning::detect("no such markup", "say <think>"), Reasoning::Off);
}

#[test]
fn a_call_in_reasoning_counts_only_at_the_very_end() {
    let now = "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let config = OutputConfig {
        reasoning: Reasoning::Inside,
        ..config()
    };
    for tail in ["", "\n", "\n</think>", "</think>\n\n"] {
        let reply = parse_as(&config, &format!("I call it.\n{now}{tail}"), EndReason::Stop);
        assert_eq!(reply.reasoning, "I call it.", "{tail:?}");
        assert_eq!(
            (reply.tool_calls.len(), reply.content.as_str()),
            (1, ""),
            "{tail:?}"
        );
    }
    let reply = parse_as(&config, &format!("Two.\n{now}\n{now}"), EndReason::Stop);
    assert_eq!(reply.tool_calls, [call(0, "now", "{}"), call(1, "now", "{}")]);
    // Weighed, and something followed; unknown; unfinished; broken: it stays reasoning, to the letter.
    for thought in [
        format!("Maybe {now} or not"),
        format!("{now}\n</thinking"),
        now.replace("now", "later"),
        now.replace("}}", "} oops }"),
        "about <tool_call> as such".to_owned(),
        "<tool_call>\n{\"name\": \"no".to_owned(),
    ] {
        assert_eq!(parse_as(&config, &thought, EndReason::Length).reasoning, thought);
        let reply = parse_as(
            &config,
            &format!("{thought}</think>answer {now}"),
            EndReason::Stop,
        );
        assert_eq!((reply.reasoning, reply.content.as_str()), (thought, "answer"));
        assert_eq!(reply.tool_calls.len(), 1);
    }
    let reply = parse_as(&config, &format!("{now}</think>\n\n{now}"), EndReason::Stop);
    assert_eq!((reply.tool_calls.len(), reply.reasoning.as_str()), (1, now));
}
