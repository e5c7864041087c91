//! Fields that other servers act on and this one does not. Taking them in silence would give a reply that is not the one
//! that was asked for; a value that changes nothing is let through.

use serde_json::Value;

use crate::error::{ApiError, shown};
use crate::fields::Fields;

const SPECULATIVE: &str = "speculative decoding is off here; the reply would be the same without it";

/// A field, whether a value of it changes nothing, and why others are refused.
type Row = (&'static str, fn(&Value) -> bool, &'static str);

const ROWS: &[Row] = &[
    (
        "thinking_token_budget",
        never,
        "the length of the reasoning cannot be limited by itself; \"enable_thinking\": false turns it off, \
         max_tokens limits all of the reply",
    ),
    ("modalities", text_only, "this model writes text only"),
    ("prediction", never, SPECULATIVE),
    ("mllm_draft", off, SPECULATIVE),
    ("specprefill", off, "a prompt is computed as a whole, always"),
    (
        "specprefill_keep_pct",
        never,
        "a prompt is computed as a whole, always",
    ),
];

fn never(_: &Value) -> bool {
    false
}

fn off(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn text_only(value: &Value) -> bool {
    let items = value.as_array();
    items.is_some_and(|items| items.iter().all(|item| item == "text"))
}

/// Refuses what would be ignored.
///
/// # Errors
/// 400 with field, value and reason.
pub(crate) fn refuse(fields: &Fields) -> Result<(), ApiError> {
    for (name, harmless, reason) in ROWS {
        if let Some(value) = fields.get(name).filter(|value| !harmless(value)) {
            let message = format!("is not supported, got {}: {reason}", shown(value));
            return Err(ApiError::invalid(*name, message).with_code("unsupported_parameter"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(name: &str, value: &Value) -> Result<(), ApiError> {
        refuse(&Fields::parse(json!({name: value}).to_string().as_bytes()).unwrap())
    }

    #[test]
    fn what_would_be_ignored_is_refused_and_what_changes_nothing_is_not() {
        for (name, value) in [
            ("thinking_token_budget", json!(100)),
            ("modalities", json!(["text", "audio"])),
            ("modalities", json!("audio")),
            ("prediction", json!({"type": "content", "content": "x"})),
            ("mllm_draft", json!(true)),
            ("specprefill", json!(true)),
        ] {
            let error = read(name, &value).expect_err(name);
            assert_eq!(
                (error.status, error.param.as_deref(), error.code),
                (400, Some(name), Some("unsupported_parameter"))
            );
            assert!(error.message.contains(&shown(&value)), "{}", error.message);
        }
        for (name, value) in [
            ("modalities", json!(["text"])),
            ("modalities", json!([])),
            ("mllm_draft", json!(false)),
            ("specprefill", json!(false)),
        ] {
            read(name, &value).unwrap();
        }
        for (name, ..) in ROWS {
            read(name, &Value::Null).unwrap();
        }
    }
}
