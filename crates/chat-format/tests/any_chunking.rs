//! Properties: how the text is cut makes no difference, nothing is lost, and arguments come out as they were meant.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::sync::Arc;

use chat_format::{
    CallOutcome, Delivery, Delta, EndReason, OutputConfig, ParsedOutput, Reasoning, StopMatcher, ToolFormat,
    ToolSet,
};
use common::merged;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn run<'a>(config: &OutputConfig, pieces: impl IntoIterator<Item = &'a str>, end: EndReason) -> Vec<Delta> {
    merged(common::run(config.clone(), pieces, end))
}

/// Cuts text at the given places (in characters, modulo its length).
fn cut<'a>(text: &'a str, places: &[usize]) -> Vec<&'a str> {
    let bounds: Vec<usize> = text
        .char_indices()
        .map(|(at, _)| at)
        .chain([text.len()])
        .collect();
    let mut places: Vec<usize> = places.iter().map(|place| bounds[place % bounds.len()]).collect();
    places.extend([0, text.len()]);
    places.sort_unstable();
    places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

fn config(reasoning: Reasoning, delivery: Delivery) -> OutputConfig {
    let tools = ToolSet::from_openai(&[json!({"function": {"name": "f", "parameters": {"properties": {
        "n": {"type": "integer"}, "s": {"type": "string"}, "a": {"type": "array"},
    }}}})]);
    OutputConfig {
        tool_format: ToolFormat::Hermes,
        reasoning,
        tools: Arc::new(tools),
        delivery,
        call_id_prefix: "c".to_owned(),
    }
}

/// Text made of the pieces that parsers trip over.
fn nasty_text() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "<",
        "</",
        ">",
        "<tool",
        "_call>",
        "think>",
        "{",
        "}",
        "[",
        "]",
        "\"",
        "'",
        "\\",
        ":",
        ",",
        " ",
        "\n",
        "\n\n",
        "\t",
        "name",
        "\"name\"",
        "\"f\"",
        "\"name\": \"f\"",
        "\"arguments\": ",
        "\"arguments\": {",
        "\"parameters\": {}",
        "{\"name\": \"f\", \"arguments\": {",
        "\"n\": \"3\"",
        "\"n\": 3",
        "\"s\": 4",
        "\"s\": \"",
        "\"a\": \"[1]\"",
        "1",
        "-2.5e3",
        "true",
        "None",
        "\\u12",
        "\\ud83d",
        "\\ude00",
        "\\n",
        "é",
        "👋",
        "text",
        "I will ",
        "{\"name\": \"f\", \"arguments\": {}}",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": \"x\"}}\n</tool_call>",
        "function",
        "\"function\": {",
    ]);
    prop::collection::vec(pieces, 0..24).prop_map(|pieces| pieces.concat())
}

fn any_config() -> impl Strategy<Value = OutputConfig> {
    (
        prop::sample::select(vec![Reasoning::Off, Reasoning::Outside, Reasoning::Inside]),
        prop::sample::select(vec![Delivery::Incremental, Delivery::Whole]),
    )
        .prop_map(|(reasoning, delivery)| config(reasoning, delivery))
}

fn any_end() -> impl Strategy<Value = EndReason> {
    prop::sample::select(vec![EndReason::Stop, EndReason::Length, EndReason::Cancelled])
}

/// Strings that JSON, markup and Python have opinions about.
fn nasty_string() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "}</tool_call>",
        "<tool_call>{",
        "</think>",
        "\"",
        "\\",
        "\n",
        "\t",
        "\r\n",
        "\u{0}",
        "\u{1f}",
        "\u{7f}",
        "\u{2028}",
        "'",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "é",
        "👋🏽",
        "</",
        "<",
        "name",
        "None",
        "\\u0041",
        " ",
        "a",
    ]);
    prop::collection::vec(pieces, 0..8).prop_map(|pieces| pieces.concat())
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-1e300..1e300f64).prop_map(Value::from),
        nasty_string().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((nasty_string(), inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
        ]
    })
}

fn any_object() -> impl Strategy<Value = Value> {
    prop::collection::vec((nasty_string(), any_json()), 0..5)
        .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>()))
}

fn letters(text: &str) -> Vec<char> {
    let mut letters: Vec<char> = text.chars().filter(|c| c.is_alphabetic()).collect();
    letters.sort_unstable();
    letters
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cutting_makes_no_difference(
        text in nasty_text(), places in prop::collection::vec(0usize..400, 0..12),
        config in any_config(), end in any_end(),
    ) {
        let whole = run(&config, [text.as_str()], end);
        prop_assert_eq!(&run(&config, cut(&text, &places), end), &whole);
        let single: Vec<usize> = (0..text.chars().count()).collect();
        prop_assert_eq!(&run(&config, cut(&text, &single), end), &whole);
    }

    /// Calls begin once, end once, in order, and their fragments lie between; complete ones are JSON objects; whole
    /// delivery has only complete ones.
    #[test]
    fn deltas_are_well_formed(text in nasty_text(), config in any_config(), end in any_end()) {
        let mut open = None;
        let mut next = 0;
        let mut arguments = String::new();
        for delta in run(&config, [text.as_str()], end) {
            match delta {
                Delta::ToolCallBegin { index, id, name, .. } => {
                    prop_assert_eq!((open, index, id), (None, next, format!("c{next}")));
                    prop_assert!(!name.is_empty() || config.delivery == Delivery::Incremental);
                    open = Some(index);
                    arguments.clear();
                }
                Delta::ToolCallArguments { index, fragment } => {
                    prop_assert_eq!(open, Some(index));
                    prop_assert!(!fragment.is_empty());
                    arguments.push_str(&fragment);
                }
                Delta::ToolCallEnd { index, outcome } => {
                    prop_assert_eq!(open, Some(index));
                    if outcome == CallOutcome::Complete {
                        let value = serde_json::from_str::<Value>(&arguments);
                        prop_assert!(value.as_ref().is_ok_and(Value::is_object), "{:?}: {}", value, arguments);
                    } else {
                        prop_assert_eq!(config.delivery, Delivery::Incremental);
                    }
                    open = None;
                    next += 1;
                }
                Delta::Content(text) | Delta::Reasoning(text) | Delta::Malformed { text, .. } => {
                    prop_assert_eq!(open, None);
                    prop_assert!(!text.is_empty());
                }
                other => prop_assert!(false, "{:?}", other),
            }
        }
        prop_assert_eq!(open, None);
    }

    /// A reply says the same whether its calls are delivered as they are written or whole. (Ids differ after an
    /// announced call that turned out invalid.)
    #[test]
    fn delivery_makes_no_difference(text in nasty_text(), config in any_config()) {
        let reply = |delivery| {
            let config = OutputConfig { delivery, ..config.clone() };
            let mut reply = ParsedOutput::from_deltas(run(&config, [text.as_str()], EndReason::Stop));
            reply.tool_calls.iter_mut().for_each(|call| call.id.clear());
            reply
        };
        prop_assert_eq!(reply(Delivery::Incremental), reply(Delivery::Whole));
    }

    /// Outside of markup, every letter of the text is somewhere in the result.
    #[test]
    fn no_letter_vanishes(text in nasty_text(), config in any_config(), end in any_end()) {
        let reply = ParsedOutput::from_deltas(run(&config, [text.as_str()], end));
        let mut shown = reply.content + &reply.reasoning;
        for call in &reply.tool_calls {
            shown.push_str(&call.name);
            shown.push_str(&call.arguments);
        }
        let shown = letters(&shown);
        // The markup's own words may go, and escapes may be spelled differently.
        let mut vanished = letters(&text);
        for letter in &shown {
            if let Some(at) = vanished.iter().position(|c| c == letter) {
                vanished.remove(at);
            }
        }
        let markup = "toolcallthinknameargumentsparametersfunctionNone";
        let stray: String = vanished.iter().filter(|c| !markup.contains(**c) && !"ud".contains(**c)).collect();
        prop_assert!(stray.is_empty(), "{:?} vanished from {:?}", stray, text);
    }

    /// What the model writes as arguments is what the client reads, byte for byte when it is strict JSON.
    #[test]
    fn arguments_come_through(
        object in any_object(), pretty in any::<bool>(), places in prop::collection::vec(0usize..2000, 0..12),
        delivery in prop::sample::select(vec![Delivery::Incremental, Delivery::Whole]),
    ) {
        let config = OutputConfig { tools: Arc::default(), ..config(Reasoning::Off, delivery) };
        let json = if pretty { serde_json::to_string_pretty(&object) } else { serde_json::to_string(&object) }.unwrap();
        let text = format!("Go.\n<tool_call>\n{{\"name\": \"f\", \"arguments\": {json}}}\n</tool_call>\n<tool_call>{{\"arguments\": {json}, \"name\": \"g\"}}</tool_call>");
        let reply = ParsedOutput::from_deltas(run(&config, cut(&text, &places), EndReason::Stop));
        prop_assert_eq!(reply.content, "Go.");
        prop_assert_eq!(reply.tool_calls.len(), 2);
        for call in &reply.tool_calls {
            prop_assert_eq!(call.outcome, CallOutcome::Complete);
            prop_assert_eq!(&call.arguments, &json);
        }
    }

    /// The same when the arguments come as a JSON string, and when they are printed by Python.
    #[test]
    fn arguments_in_other_clothes_come_through(object in any_object()) {
        let config = OutputConfig { tools: Arc::default(), ..config(Reasoning::Off, Delivery::Incremental) };
        let json = serde_json::to_string(&object).unwrap();
        let string = Value::from(json.as_str()).to_string();
        let text = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {string}}}</tool_call><tool_call>{{'name': 'f', 'arguments': {}}}</tool_call>", python(&object));
        let reply = ParsedOutput::from_deltas(run(&config, [text.as_str()], EndReason::Stop));
        prop_assert_eq!(reply.content, "");
        prop_assert_eq!(reply.tool_calls.len(), 2, "{}", text);
        for call in &reply.tool_calls {
            prop_assert_eq!(&serde_json::from_str::<Value>(&call.arguments).unwrap(), &object);
        }
    }

    /// A stop string ends the text exactly before itself, wherever the pieces end.
    #[test]
    fn stops_cut_alike(
        text in "[abc]{0,40}", stops in prop::collection::vec("[abc]{0,4}", 0..4),
        places in prop::collection::vec(0usize..40, 0..8),
    ) {
        let pass = |pieces: Vec<&str>| {
            let mut matcher = StopMatcher::new(stops.clone());
            let mut out = String::new();
            for piece in pieces {
                matcher.push(piece, &mut out);
            }
            let hit = matcher.matched().map(str::to_owned);
            matcher.finish(&mut out);
            (out, hit)
        };
        let result = pass(cut(&text, &places));
        // The definition: the first place where a stop is complete, and the longest of those that are.
        let expected = (1..=text.len()).find_map(|end| {
            let done = |stop: &&String| !stop.is_empty() && text[..end].ends_with(stop.as_str());
            let stop = stops.iter().filter(done).max_by_key(|stop| stop.len())?;
            Some((text[..end - stop.len()].to_owned(), Some(stop.clone())))
        });
        prop_assert_eq!(result, expected.unwrap_or((text.clone(), None)));
    }

    /// Before the stream ends, everything that cannot be part of a stop string has been shown.
    #[test]
    fn stops_hold_back_no_more_than_needed(text in "[abé]{0,20}", stops in prop::collection::vec("[abé]{1,4}", 1..4)) {
        let mut matcher = StopMatcher::new(stops.clone());
        let mut out = String::new();
        if matcher.push(&text, &mut out).is_none() {
            let held = &text[out.len()..];
            let partial = |at: usize| stops.iter().any(|stop| text.is_char_boundary(at) && stop.starts_with(&text[at..]));
            let longest = (0..text.len()).find(|at| partial(*at)).map_or("", |at| &text[at..]);
            prop_assert_eq!(held, longest);
        }
    }
}

/// `repr()` of the value in Python.
fn python(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(flag) => if *flag { "True" } else { "False" }.to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => {
            let quote = if text.contains('\'') && !text.contains('"') {
                '"'
            } else {
                '\''
            };
            let mut out = String::from(quote);
            for c in text.chars() {
                match c {
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    c if c == quote => out.extend(['\\', c]),
                    c if (c as u32) < 0x20 || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", c as u32)),
                    c => out.push(c),
                }
            }
            out.push(quote);
            out
        }
        Value::Array(items) => format!("[{}]", items.iter().map(python).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let pairs: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{}: {}", python(&Value::from(key.as_str())), python(value)))
                .collect();
            format!("{{{}}}", pairs.join(", "))
        }
    }
}

/// Time grows with the text, not with its square: four times the text takes less than eight times as long.
#[test]
fn pushing_is_linear() {
    let measure = |size: usize| {
        let text = format!(
            "{}<tool_call>{{\"name\": \"f\", \"arguments\": {{\"s\": \"{}\"}}}}</tool_call>{}<tool_call>{}",
            " \n".repeat(size),
            "x < y ".repeat(size),
            "<tool ".repeat(size),
            "broken <".repeat(size),
        );
        let pieces: Vec<String> = text
            .chars()
            .collect::<Vec<_>>()
            .chunks(3)
            .map(|piece| piece.iter().collect())
            .collect();
        let config = config(Reasoning::Outside, Delivery::Incremental);
        let start = std::time::Instant::now();
        assert!(!run(&config, pieces.iter().map(String::as_str), EndReason::Stop).is_empty());
        start.elapsed()
    };
    // In turns, and the best of each: other processes only ever add time.
    let rounds: Vec<_> = (0..7).map(|_| (measure(4_000), measure(16_000))).collect();
    let small = rounds.iter().map(|round| round.0).min().unwrap();
    let large = rounds.iter().map(|round| round.1).min().unwrap();
    assert!(large < small * 8, "{small:?} for 4000, {large:?} for 16000");
}
