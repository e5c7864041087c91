//! Checks a conversation and leaves it in OpenAI's own shape, as chat templates read it.

use serde_json::{Map, Value};

use crate::error::{ApiError, shown};
use crate::fields::{kind_of, mismatch};

const ROLES: &[&str] = &["system", "developer", "user", "assistant", "tool", "function"];

/// Checks every message. Text parts stay parts; `null` content of anyone but the assistant becomes the empty string.
pub(crate) fn check(messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "must not be empty"));
    }
    messages
        .into_iter()
        .enumerate()
        .map(|(i, message)| check_one(i, message).map(Value::Object))
        .collect()
}

fn check_one(i: usize, message: Value) -> Result<Map<String, Value>, ApiError> {
    let at = |field: &str| format!("messages[{i}].{field}");
    let mut message = match message {
        Value::Object(map) => map,
        other => return Err(mismatch(&format!("messages[{i}]"), "an object", &other)),
    };
    let role = match message.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(other) => {
            let expected = format!("one of {}", ROLES.join(", "));
            return Err(mismatch(&at("role"), &expected, other));
        }
        None => return Err(ApiError::invalid(at("role"), "is missing")),
    };
    let assistant = role == "assistant";
    match message.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => check_parts(i, parts)?,
        Some(Value::Null) | None if assistant => {
            // One form for "said nothing".
            message.insert("content".to_owned(), Value::Null);
        }
        Some(Value::Null) => {
            message.insert("content".to_owned(), Value::String(String::new()));
        }
        None => return Err(ApiError::invalid(at("content"), "is missing")),
        Some(other) => {
            return Err(mismatch(
                &at("content"),
                "a string, null or an array of text parts",
                other,
            ));
        }
    }
    for field in ["name", "tool_call_id", "reasoning_content", "reasoning"] {
        match message.get(field) {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(other) => return Err(mismatch(&at(field), "a string", other)),
        }
    }
    // vLLM's newer name for it; templates know the older one.
    if assistant
        && !message.contains_key("reasoning_content")
        && let Some(reasoning) = message.get("reasoning").cloned()
    {
        message.insert("reasoning_content".to_owned(), reasoning);
    }
    match message.get("tool_calls") {
        None => {}
        Some(Value::Null) => {
            message.shift_remove("tool_calls");
        }
        Some(Value::Array(calls)) if calls.is_empty() => {
            message.shift_remove("tool_calls");
        }
        Some(Value::Array(calls)) if assistant => {
            for (j, call) in calls.iter().enumerate() {
                check_call(&format!("messages[{i}].tool_calls[{j}]"), call)?;
            }
        }
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid(
                at("tool_calls"),
                format!("only an assistant calls tools; this message's role is {role:?}"),
            ));
        }
        Some(other) => return Err(mismatch(&at("tool_calls"), "an array", other)),
    }
    Ok(message)
}

fn check_parts(i: usize, parts: &[Value]) -> Result<(), ApiError> {
    for (j, part) in parts.iter().enumerate() {
        let at = |field: &str| format!("messages[{i}].content[{j}].{field}");
        let Some(map) = part.as_object() else {
            return Err(mismatch(
                &format!("messages[{i}].content[{j}]"),
                "an object",
                part,
            ));
        };
        match map.get("type") {
            Some(Value::String(kind)) if kind == "text" => {}
            Some(Value::String(kind)) => {
                return Err(ApiError::invalid(
                    at("type"),
                    format!("{kind:?} is not supported: this model reads text only"),
                )
                .with_code("unsupported_content"));
            }
            Some(other) => return Err(mismatch(&at("type"), "a string", other)),
            None => return Err(ApiError::invalid(at("type"), "is missing")),
        }
        match map.get("text") {
            Some(Value::String(_)) => {}
            Some(other) => return Err(mismatch(&at("text"), "a string", other)),
            None => return Err(ApiError::invalid(at("text"), "is missing")),
        }
    }
    Ok(())
}

fn check_call(at: &str, call: &Value) -> Result<(), ApiError> {
    let Some(function) = call.get("function") else {
        return Err(ApiError::invalid(format!("{at}.function"), "is missing"));
    };
    match function.get("name") {
        Some(Value::String(name)) if !name.is_empty() => {}
        Some(other) => {
            return Err(mismatch(
                &format!("{at}.function.name"),
                "a non-empty string",
                other,
            ));
        }
        None => return Err(ApiError::invalid(format!("{at}.function.name"), "is missing")),
    }
    match function.get("arguments") {
        // Some clients send the object itself.
        None | Some(Value::Null | Value::String(_) | Value::Object(_)) => Ok(()),
        Some(other) => Err(mismatch(
            &format!("{at}.function.arguments"),
            "a string with a JSON object",
            other,
        )),
    }
}

/// Checks tool definitions.
pub(crate) fn check_tools(tools: &[Value]) -> Result<(), ApiError> {
    for (i, tool) in tools.iter().enumerate() {
        if !tool.is_object() {
            return Err(mismatch(&format!("tools[{i}]"), "an object", tool));
        }
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            _ => {
                let kind = tool.get("type").map_or_else(|| "nothing".to_owned(), shown);
                return Err(ApiError::invalid(
                    format!("tools[{i}].type"),
                    format!("must be \"function\", got {kind}"),
                ));
            }
        }
        let function = tool.get("function").unwrap_or(&Value::Null);
        if !function.is_object() {
            return Err(ApiError::invalid(
                format!("tools[{i}].function"),
                format!("must be an object, got {}", kind_of(function)),
            ));
        }
        match function.get("name") {
            Some(Value::String(name)) if !name.is_empty() => {}
            other => {
                let found = other.unwrap_or(&Value::Null);
                return Err(mismatch(
                    &format!("tools[{i}].function.name"),
                    "a non-empty string",
                    found,
                ));
            }
        }
        match function.get("parameters") {
            None | Some(Value::Null | Value::Object(_)) => {}
            Some(other) => {
                return Err(mismatch(
                    &format!("tools[{i}].function.parameters"),
                    "an object",
                    other,
                ));
            }
        }
    }
    Ok(())
}
