//! What a client puts at the head of the system prompt and changes with every request, taken off: the model has no use for
//! it, and everything behind a token that differs would have to be computed again.
//!
//! Only what is known to be a client's own noise, and only where that client puts it: whatever else looks like a header may
//! be meant for the model.

use serde_json::Value;

/// Claude Code's: version, entry point and a checksum that differs from request to request.
const BILLING: &str = "x-anthropic-billing-header";

/// Takes such lines off the head of the first message, if that is the system's. What is left of it stays, be it empty:
/// without a system message a template may put in a text of its own. Only where another one follows, an empty one goes.
pub(super) fn strip_headers(messages: &mut Vec<Value>) {
    let Some(first) = messages.first_mut().filter(|message| is_system(message)) else {
        return;
    };
    let emptied = match first.get_mut("content") {
        Some(Value::String(text)) => strip_text(text),
        Some(Value::Array(parts)) => strip_parts(parts),
        _ => false,
    };
    if emptied && messages.get(1).is_some_and(is_system) {
        messages.remove(0);
    }
}

fn is_system(message: &Value) -> bool {
    let role = message.get("role").and_then(Value::as_str);
    matches!(role, Some("system" | "developer"))
}

/// Whether nothing is left of what was more than nothing before.
fn strip_parts(parts: &mut Vec<Value>) -> bool {
    let Some(Value::String(text)) = parts.first_mut().and_then(|part| part.get_mut("text")) else {
        return false;
    };
    let emptied = strip_text(text);
    if emptied && parts.len() > 1 {
        parts.remove(0);
        return false;
    }
    emptied
}

/// As [`strip_parts`].
fn strip_text(text: &mut String) -> bool {
    let mut rest = text.as_str();
    let mut found = false;
    while let Some((line, after)) = split_line(rest)
        && is_header(line)
    {
        tracing::debug!(line, "left out of the system prompt");
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
    line.split_once(':')
        .is_some_and(|(name, _)| name.trim().eq_ignore_ascii_case(BILLING))
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

    fn text(text: &str) -> Value {
        json!({"type": "text", "text": text})
    }

    #[test]
    fn billing_lines_at_the_head_of_the_system_prompt_go_and_nothing_else() {
        let user = json!({"role": "user", "content": "x-anthropic-billing-header: 7"});
        let billing = "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;";
        for (content, left) in [
            (json!(format!("{billing}\nYou help.")), json!("You help.")),
            (
                json!(format!(
                    "X-Anthropic-Billing-Header: a\r\n{billing}\r\n\r\nYou help."
                )),
                json!("You help."),
            ),
            (
                json!([text(billing), text("You help.")]),
                json!([text("You help.")]),
            ),
            // Without a system message a template may say something of its own.
            (json!(billing), json!("")),
            (json!([text(billing)]), json!([text("")])),
        ] {
            let after = stripped(json!([{"role": "system", "content": content}, user]));
            assert_eq!(after, json!([{"role": "system", "content": left}, user]));
        }
        for content in [
            json!("x-session-id: 42\nPass the session id above to every tool call."),
            json!("x-anthropic-beta: tools\nAbove is the header to send."),
            json!("x-request-id: 4"),
            json!("traceparent: 00-1"),
            json!(format!("You help.\n{billing}")),
            json!(format!("\n{billing}")),
            json!([text("You help."), text(billing)]),
            json!(""),
            json!([]),
        ] {
            let messages = json!([{"role": "system", "content": content}, user]);
            assert_eq!(stripped(messages.clone()), messages);
        }
        let messages = json!([user, {"role": "system", "content": billing}]);
        assert_eq!(stripped(messages.clone()), messages);
    }

    #[test]
    fn a_message_of_nothing_else_goes_where_another_follows_which_stays_as_it_is() {
        let system = |text: &str| json!({"role": "developer", "content": text});
        let second = system("x-anthropic-billing-header: 2\nBe brief.");
        let user = json!({"role": "user", "content": "Hi"});
        let after = stripped(json!([system("x-anthropic-billing-header: 1\n"), second, user]));
        assert_eq!(after, json!([second, user]));
    }
}
