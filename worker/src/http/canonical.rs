//! What clients put at the head of the system prompt and change with every request, taken off: the model has no use for
//! it, and everything behind a token that differs would have to be computed again.

use serde_json::Value;

/// Names of such lines, `NAME: value`, in lower case; a trailing `*` stands for anything.
const HEADERS: &[&str] = &[
    // Claude Code: version, entry point and a checksum that differs from request to request.
    "x-anthropic-*",
    "x-request-id",
    "x-session-id",
    "x-conversation-id",
    "x-correlation-id",
    "x-trace-id",
    "traceparent",
];

/// Takes header lines off the head of the leading system messages. A part or a message that has nothing else is dropped.
pub(super) fn strip_headers(messages: &mut Vec<Value>) {
    let is_system = |message: &Value| {
        matches!(
            message.get("role").and_then(Value::as_str),
            Some("system" | "developer")
        )
    };
    let mut index = 0;
    // A list of messages must not become an empty one.
    while let Some(message) = messages.get_mut(index).filter(|message| is_system(message)) {
        let emptied = match message.get_mut("content") {
            Some(Value::String(text)) => strip_text(text),
            Some(Value::Array(parts)) => strip_parts(parts),
            _ => false,
        };
        if emptied && messages.len() > 1 {
            messages.remove(index);
        } else {
            index += 1;
        }
    }
}

/// Whether nothing is left of what was more than nothing before.
fn strip_parts(parts: &mut Vec<Value>) -> bool {
    while let Some(Value::String(text)) = parts.first_mut().and_then(|part| part.get_mut("text")) {
        if !strip_text(text) {
            return false;
        }
        parts.remove(0);
    }
    parts.is_empty()
}

/// As [`strip_parts`].
fn strip_text(text: &mut String) -> bool {
    let mut rest = text.as_str();
    let mut found = false;
    while let Some((line, after)) = split_line(rest)
        && is_header(line)
    {
        found = true;
        rest = after;
    }
    if !found {
        return false;
    }
    let rest = rest.trim_start_matches(['\r', '\n']).to_owned();
    *text = rest;
    text.is_empty()
}

/// The first line and what follows it; `None` at the end.
fn split_line(text: &str) -> Option<(&str, &str)> {
    if text.is_empty() {
        return None;
    }
    let (line, after) = text.split_once('\n').unwrap_or((text, ""));
    Some((line.trim_end_matches('\r'), after))
}

fn is_header(line: &str) -> bool {
    let Some((name, _)) = line.split_once(':') else {
        return false;
    };
    let name = name.trim().to_ascii_lowercase();
    HEADERS.iter().any(|header| match header.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix) && !name.contains(char::is_whitespace),
        None => name == *header,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stripped(messages: Value) -> Value {
        let Value::Array(mut messages) = messages else {
            panic!("no list")
        };
        strip_headers(&mut messages);
        messages.into()
    }

    #[test]
    fn lines_at_the_head_of_the_system_prompt_go() {
        let user = json!({"role": "user", "content": "x-request-id: 7"});
        for (content, left) in [
            (
                json!("x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;\nYou help."),
                json!("You help."),
            ),
            (
                json!("X-Anthropic-Billing-Header: a\r\nx-request-id: 4\r\n\r\nYou help."),
                json!("You help."),
            ),
            (
                json!("You help.\nx-request-id: 4"),
                json!("You help.\nx-request-id: 4"),
            ),
            (json!("x-ray: a kind of light"), json!("x-ray: a kind of light")),
            (
                json!("x-anthropic is a name: yes"),
                json!("x-anthropic is a name: yes"),
            ),
            (json!("\nx-request-id: 4"), json!("\nx-request-id: 4")),
            (json!(""), json!("")),
            (
                json!([{"type": "text", "text": "x-anthropic-billing-header: b"}, {"type": "text", "text": "You help."}]),
                json!([{"type": "text", "text": "You help."}]),
            ),
            (json!([]), json!([])),
        ] {
            let before = json!([{"role": "system", "content": content}, user]);
            let after = stripped(before);
            if left == json!([]) {
                assert_eq!(after, json!([user]));
            } else {
                assert_eq!(after, json!([{"role": "system", "content": left}, user]));
            }
        }
    }

    #[test]
    fn a_message_that_has_nothing_else_goes_and_later_ones_stay() {
        let system = |text: &str| json!({"role": "developer", "content": text});
        let after = stripped(json!([
            system("x-anthropic-billing-header: 1\n"),
            system("x-trace-id: 2\nBe brief."),
            {"role": "user", "content": "Hi"},
            system("x-trace-id: 3"),
        ]));
        assert_eq!(
            after,
            json!([system("Be brief."), {"role": "user", "content": "Hi"}, system("x-trace-id: 3")])
        );
    }
}
