//! From OpenAI's messages to the ones that Hugging Face templates read.

use minijinja::Value;
use serde_json::{Map, Value as Json, json};

use super::environment::to_template_value;
use super::{ChatTemplate, RenderInputs, TemplateError};

/// In which form a template reads a message's `content`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ContentStyle {
    /// A string; lists of parts would be printed as Python lists, or fail.
    #[default]
    Text,
    /// A string, and also a list of `{"type": "text", "text": ...}`.
    TextOrParts,
    /// Only a list of parts: a string would be lost, or fail.
    Parts,
}

/// Names under which clients send an assistant's reasoning, in `transformers`' order of preference.
const REASONING_KEYS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Finds out how the template reads content by rendering one user message in both forms and looking for its text.
pub(crate) fn probe_content_style(template: &ChatTemplate) -> ContentStyle {
    const PROBE: &str = "chat template content probe";
    let shows = |content: Json| {
        let messages = [json!({"role": "user", "content": content})];
        let rendered = template.render_raw(&RenderInputs {
            messages: &messages,
            add_generation_prompt: true,
            ..Default::default()
        });
        // A list that was printed as a whole shows the part's keys, too.
        rendered.is_ok_and(|prompt| {
            prompt.contains(PROBE) && !prompt.contains("'type'") && !prompt.contains("\"type\"")
        })
    };
    match (
        shows(json!(PROBE)),
        shows(json!([{"type": "text", "text": PROBE}])),
    ) {
        (true, true) => ContentStyle::TextOrParts,
        (false, true) => ContentStyle::Parts,
        (_, false) => ContentStyle::Text,
    }
}

/// See [`ChatTemplate::normalize`].
pub(crate) fn normalize(messages: &[Json], style: ContentStyle) -> Result<Vec<Json>, TemplateError> {
    let one = |(index, message): (usize, &Json)| {
        let Json::Object(message) = message else {
            return Err(not_an_object(index, message));
        };
        let mut message = message.clone();
        if let Some(content) = message.get_mut("content") {
            normalize_content(index, content, style)?;
        }
        if let Some(Json::Array(calls)) = message.get_mut("tool_calls") {
            calls.iter_mut().for_each(parse_arguments);
        }
        Ok(Json::Object(message))
    };
    messages.iter().enumerate().map(one).collect()
}

fn not_an_object(index: usize, message: &Json) -> TemplateError {
    let mut shown = message.to_string();
    if let Some((end, _)) = shown.char_indices().nth(80) {
        shown.truncate(end);
        shown.push('…');
    }
    TemplateError::Input(format!("messages[{index}] must be an object, not {shown}"))
}

fn normalize_content(index: usize, content: &mut Json, style: ContentStyle) -> Result<(), TemplateError> {
    match content {
        Json::String(text) if style == ContentStyle::Parts => {
            *content = json!([{"type": "text", "text": std::mem::take(text)}]);
        }
        Json::Array(parts) if style != ContentStyle::Parts => {
            let mut flat = String::new();
            for (part_index, part) in parts.iter().enumerate() {
                match part_text(part) {
                    Some(text) => flat.push_str(text),
                    // The template may know what to do with the whole list.
                    None if style == ContentStyle::TextOrParts => return Ok(()),
                    None => {
                        let kind = part.get("type").and_then(Json::as_str).unwrap_or("unknown");
                        return Err(TemplateError::Input(format!(
                            "messages[{index}].content[{part_index}] is of type {kind:?}: this model takes only text"
                        )));
                    }
                }
            }
            *content = Json::String(flat);
        }
        _ => {}
    }
    Ok(())
}

/// The text of a part: a bare string, or an object of type `text` (OpenAI's newer names for it included).
fn part_text(part: &Json) -> Option<&str> {
    match part {
        Json::String(text) => Some(text),
        Json::Object(part) => match part.get("type").and_then(Json::as_str) {
            None | Some("text" | "input_text" | "output_text") => part.get("text")?.as_str(),
            Some("refusal") => part.get("refusal")?.as_str(),
            Some(_) => None,
        },
        _ => None,
    }
}

/// Replaces `arguments`, given as JSON text, by the object it describes.
fn parse_arguments(call: &mut Json) {
    let holder = if call.get("function").is_some() {
        call.get_mut("function")
    } else {
        Some(call)
    };
    let Some(arguments) = holder.and_then(|holder| holder.get_mut("arguments")) else {
        return;
    };
    let Some(text) = arguments.as_str() else { return };
    if text.trim().is_empty() {
        *arguments = Json::Object(Map::new());
    } else if let Ok(parsed @ Json::Object(_)) = serde_json::from_str(text) {
        *arguments = parsed;
    }
}

/// The changes that `transformers` itself makes to messages before rendering, as template values.
pub(crate) fn for_template(messages: &[Json]) -> Result<Vec<Value>, TemplateError> {
    let one = |(index, message): (usize, &Json)| {
        let Json::Object(message) = message else {
            return Err(not_an_object(index, message));
        };
        let mut pairs: Vec<(&str, &Json)> = Vec::with_capacity(message.len() + 2);
        let reasoning = REASONING_KEYS
            .iter()
            .find_map(|key| message.get(*key).filter(|value| !value.is_null()));
        if let Some(reasoning) = reasoning {
            pairs.push(("thinking", reasoning));
        }
        for (key, value) in message.iter().filter(|(_, value)| !value.is_null()) {
            match pairs.iter_mut().find(|pair| pair.0 == key) {
                Some(pair) => pair.1 = value,
                None => pairs.push((key, value)),
            }
        }
        if let Some(reasoning) = reasoning {
            match pairs.iter_mut().find(|pair| pair.0 == "reasoning_content") {
                Some(pair) => pair.1 = reasoning,
                None => pairs.push(("reasoning_content", reasoning)),
            }
        }
        let pairs = pairs
            .into_iter()
            .map(|(key, value)| (Value::from(key), to_template_value(value)));
        Ok(Value::from_pairs(pairs))
    };
    messages.iter().enumerate().map(one).collect()
}
