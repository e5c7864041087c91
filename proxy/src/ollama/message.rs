//! A conversation in Ollama's form to one in OpenAI's.
//!
//! Ollama's tool calls have no ids: an answer names the tool, or nothing. Ids are made up here, and an answer goes to the
//! first call that it fits and that has none yet.

use api_types::error::{ApiError, shown};
use serde_json::{Map, Value, json};

/// A call that has not been answered.
struct Open {
    id: String,
    name: String,
}

/// All messages.
///
/// # Errors
/// A message is none; the error names it.
pub(super) fn conversation(messages: &[Value]) -> Result<Vec<Value>, ApiError> {
    let mut open = Vec::new();
    let mut calls = 0;
    messages
        .iter()
        .enumerate()
        .map(|(i, message)| one(i, message, &mut open, &mut calls))
        .collect()
}

fn one(i: usize, message: &Value, open: &mut Vec<Open>, calls: &mut usize) -> Result<Value, ApiError> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let wrong = |field: &str, want: &str, got: &Value| {
        ApiError::invalid(at(field), format!("must be {want}, got {}", shown(got)))
    };
    let Some(message) = message.as_object() else {
        return Err(ApiError::invalid(format!("messages[{i}]"), "must be an object"));
    };
    let role = match message.get("role") {
        Some(Value::String(role)) => role.as_str(),
        Some(other) => return Err(wrong("role", "a string", other)),
        None => return Err(ApiError::invalid(at("role"), "is missing")),
    };
    let text = match message.get("content") {
        None | Some(Value::Null) => "",
        Some(Value::String(text)) => text.as_str(),
        Some(other) => return Err(wrong("content", "a string", other)),
    };
    let mut out = Map::new();
    out.insert("role".to_owned(), role.into());
    let images = images(&at("images"), message.get("images"))?;
    let content = if images.is_empty() {
        text.into()
    } else {
        parts(text, images)
    };
    out.insert("content".to_owned(), content);
    if let Some(Value::String(thinking)) = message.get("thinking")
        && !thinking.is_empty()
    {
        out.insert("reasoning_content".to_owned(), thinking.as_str().into());
    }
    match message.get("tool_calls") {
        None | Some(Value::Null) => {}
        Some(Value::Array(given)) => {
            let mut list = Vec::with_capacity(given.len());
            for call in given {
                let Some(name) = call.pointer("/function/name").and_then(Value::as_str) else {
                    return Err(wrong("tool_calls", "calls with a function's name", call));
                };
                let id = match call.get("id").and_then(Value::as_str) {
                    Some(id) => id.to_owned(),
                    None => format!("call_{calls}"),
                };
                *calls += 1;
                let arguments = match call.pointer("/function/arguments") {
                    None | Some(Value::Null) => "{}".to_owned(),
                    Some(Value::String(text)) => text.clone(),
                    Some(object) => object.to_string(),
                };
                list.push(
                    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}),
                );
                open.push(Open {
                    id,
                    name: name.to_owned(),
                });
            }
            if !list.is_empty() {
                out.insert("tool_calls".to_owned(), Value::Array(list));
            }
        }
        Some(other) => return Err(wrong("tool_calls", "an array", other)),
    }
    if role == "tool" {
        let text = |key: &str| message.get(key).and_then(Value::as_str);
        let (id, name) = answered(
            open,
            text("tool_call_id"),
            text("tool_name").or_else(|| text("name")),
        );
        out.insert("tool_call_id".to_owned(), id.into());
        if let Some(name) = name {
            out.insert("name".to_owned(), name.into());
        }
    }
    Ok(Value::Object(out))
}

/// Which call a tool's message answers; it is open no longer.
fn answered(open: &mut Vec<Open>, id: Option<&str>, name: Option<&str>) -> (String, Option<String>) {
    let found = match (id, name) {
        (Some(id), _) => open.iter().position(|c| c.id == id),
        (None, Some(name)) => open.iter().position(|c| c.name == name),
        (None, None) => (!open.is_empty()).then_some(0),
    };
    match found.map(|at| open.remove(at)) {
        Some(call) => (call.id, Some(call.name)),
        None => (id.unwrap_or("call_unknown").to_owned(), name.map(str::to_owned)),
    }
}

/// Text and images as the parts of one content.
pub(super) fn parts(text: &str, images: Vec<Value>) -> Value {
    let text = (!text.is_empty()).then(|| json!({"type": "text", "text": text}));
    text.into_iter().chain(images).collect()
}

/// Base64 images as OpenAI's parts with data addresses.
///
/// # Errors
/// It is no array of strings.
pub(super) fn images(at: &str, value: Option<&Value>) -> Result<Vec<Value>, ApiError> {
    let items = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(items)) => items,
        Some(_) => return Err(ApiError::invalid(at, "must be an array of base64 strings")),
    };
    let part = |item: &Value| match item {
        Value::String(data) => {
            let url = format!("data:{};base64,{data}", media_type(data));
            Ok(json!({"type": "image_url", "image_url": {"url": url}}))
        }
        other => Err(ApiError::invalid(
            at,
            format!("must hold base64 strings, got {}", shown(other)),
        )),
    };
    items.iter().map(part).collect()
}

/// By the first bytes: each of these begins with a fixed signature, whose base64 is fixed too.
fn media_type(base64: &str) -> &'static str {
    const SIGNATURES: [(&str, &str); 5] = [
        ("iVBORw0KGgo", "image/png"),
        ("/9j/", "image/jpeg"),
        ("R0lGOD", "image/gif"),
        ("UklGR", "image/webp"),
        ("Qk", "image/bmp"),
    ];
    SIGNATURES
        .iter()
        .find(|(begin, _)| base64.starts_with(begin))
        .map_or("application/octet-stream", |(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_their_answers_find_each_other() {
        let call = |name: &str| json!({"function": {"name": name, "arguments": {"city": name}}});
        let given = json!([
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "thinking": "two places", "tool_calls": [call("a"), call("b"), call("a")]},
            {"role": "tool", "tool_name": "b", "content": "rain"},
            {"role": "tool", "content": "sun"},
            {"role": "tool", "tool_name": "a", "content": "fog"},
            {"role": "tool", "tool_name": "c", "content": "?"},
        ]);
        let out = conversation(given.as_array().unwrap()).unwrap();
        let ids: Vec<&str> = out[2..]
            .iter()
            .map(|m| m["tool_call_id"].as_str().unwrap())
            .collect();
        assert_eq!(ids, ["call_1", "call_0", "call_2", "call_unknown"]);
        assert_eq!(out[1]["reasoning_content"], "two places");
        assert_eq!(
            out[1]["tool_calls"][1],
            json!({"id": "call_1", "type": "function", "function": {"name": "b", "arguments": "{\"city\":\"b\"}"}})
        );
        assert_eq!(out[3]["name"], "a");
    }

    #[test]
    fn images_become_parts_and_mistakes_are_named() {
        let given =
            json!([{"role": "user", "content": "what?", "images": ["iVBORw0KGgoAAA", "/9j/4AAQ", "AAAA"]}]);
        let out = conversation(given.as_array().unwrap()).unwrap();
        let urls: Vec<&str> = out[0]["content"].as_array().unwrap()[1..]
            .iter()
            .map(|p| p["image_url"]["url"].as_str().unwrap())
            .collect();
        assert_eq!(
            urls,
            [
                "data:image/png;base64,iVBORw0KGgoAAA",
                "data:image/jpeg;base64,/9j/4AAQ",
                "data:application/octet-stream;base64,AAAA"
            ]
        );
        for (message, param) in [
            (json!("x"), "messages[0]"),
            (json!({"content": "x"}), "messages[0].role"),
            (json!({"role": "user", "content": 3}), "messages[0].content"),
            (json!({"role": "user", "images": [3]}), "messages[0].images"),
            (
                json!({"role": "assistant", "tool_calls": [{"function": {}}]}),
                "messages[0].tool_calls",
            ),
        ] {
            let error = conversation(&[message]).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }
}
