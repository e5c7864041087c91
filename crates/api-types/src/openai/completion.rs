//! `POST /v1/completions`, OpenAI's legacy form: raw text or token ids in, text out.

use serde_json::Value;

use super::options::{GenerationOptions, token_ids};
use crate::error::{ApiError, shown};
use crate::fields::{Fields, mismatch};

/// Most prompts of one request.
const MAX_PROMPTS: usize = 64;

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised, with the tokenizer's own special tokens.
    Text(String),
    /// As it is.
    Tokens(Vec<u32>),
}

/// A checked request.
#[derive(Debug, Clone, PartialEq)]
pub struct CompletionRequest {
    /// The model asked for; a worker has one, so it may be left out.
    pub model: Option<String>,
    /// One or more prompts, none of them an empty list of tokens.
    pub prompts: Vec<Prompt>,
    /// Repeat the prompt before the reply.
    pub echo: bool,
    /// `Some(k)`: report log-probabilities, and those of the `k` likeliest tokens (0..=20).
    pub logprobs: Option<usize>,
    /// The rest.
    pub options: GenerationOptions,
}

impl CompletionRequest {
    /// Parses and checks a body.
    ///
    /// # Errors
    /// 400 naming the field and its value.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?.map(str::to_owned);
        let options = GenerationOptions::read(&mut fields)?;
        if let Some(suffix) = fields.string("suffix")?.filter(|s| !s.is_empty()) {
            return Err(ApiError::invalid(
                "suffix",
                format!("is not supported, got {suffix:?}"),
            ));
        }
        if let Some(best_of) = fields.integer("best_of", 1, i64::MAX)?
            && usize::try_from(best_of).ok() != Some(options.n)
        {
            let n = options.n;
            return Err(ApiError::invalid(
                "best_of",
                format!("must be left out or equal to n = {n}, got {best_of}"),
            ));
        }
        let echo = fields.bool("echo")?.unwrap_or(false);
        let logprobs = match fields.get("logprobs") {
            Some(Value::Bool(false)) => None,
            _ => fields
                .integer("logprobs", 0, 20)?
                .and_then(|k| usize::try_from(k).ok()),
        };
        if echo && logprobs.is_some() {
            return Err(ApiError::invalid(
                "logprobs",
                "is not supported together with echo: the prompt's own log-probabilities are not computed",
            ));
        }
        let Some(prompt) = fields.take("prompt") else {
            return Err(ApiError::invalid("prompt", "is missing"));
        };
        Ok(Self {
            model,
            prompts: prompts(prompt)?,
            echo,
            logprobs,
            options,
        })
    }
}

fn prompts(value: Value) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str = "a string, an array of strings, an array of token ids or an array of such arrays";
    let items = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(items) => items,
        other => return Err(mismatch("prompt", EXPECTED, &other)),
    };
    if items.is_empty() {
        return Err(ApiError::invalid("prompt", "must not be empty"));
    }
    if items.iter().all(Value::is_number) {
        return Ok(vec![Prompt::Tokens(token_ids("prompt", &Value::Array(items))?)]);
    }
    if items.len() > MAX_PROMPTS {
        return Err(ApiError::invalid(
            "prompt",
            format!("has {} prompts; at most {MAX_PROMPTS} are allowed", items.len()),
        ));
    }
    items
        .into_iter()
        .enumerate()
        .map(|(i, item)| match item {
            Value::String(text) => Ok(Prompt::Text(text)),
            Value::Array(ref ids) if ids.is_empty() => {
                Err(ApiError::invalid(format!("prompt[{i}]"), "must not be empty"))
            }
            Value::Array(_) => Ok(Prompt::Tokens(token_ids(&format!("prompt[{i}]"), &item)?)),
            other => Err(ApiError::invalid(
                format!("prompt[{i}]"),
                format!("must be a string or an array of token ids, got {}", shown(&other)),
            )),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: Value) -> Result<CompletionRequest, ApiError> {
        CompletionRequest::parse(body.to_string().as_bytes())
    }

    #[test]
    fn all_forms_of_a_prompt() {
        let text = |s: &str| Prompt::Text(s.into());
        for (prompt, expected) in [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (json!([[1], "b"]), vec![Prompt::Tokens(vec![1]), text("b")]),
        ] {
            assert_eq!(parse(json!({"prompt": prompt})).unwrap().prompts, expected);
        }
    }

    #[test]
    fn errors_name_field_and_value() {
        for (body, param, part) in [
            (json!({}), "prompt", "missing"),
            (json!({"prompt": []}), "prompt", "empty"),
            (json!({"prompt": [[]]}), "prompt[0]", "empty"),
            (json!({"prompt": 5}), "prompt", "got 5"),
            (json!({"prompt": [1, -2]}), "prompt[1]", "-2"),
            (json!({"prompt": [[1, 2.5]]}), "prompt[0][1]", "2.5"),
            (json!({"prompt": ["a", {}]}), "prompt[1]", "{}"),
            (json!({"prompt": vec!["a"; 65]}), "prompt", "65"),
            (json!({"prompt": "a", "suffix": "b"}), "suffix", "\"b\""),
            (json!({"prompt": "a", "best_of": 3}), "best_of", "3"),
            (json!({"prompt": "a", "logprobs": 21}), "logprobs", "21"),
            (
                json!({"prompt": "a", "logprobs": 1, "echo": true}),
                "logprobs",
                "echo",
            ),
        ] {
            let error = parse(body.clone()).expect_err(&body.to_string());
            assert_eq!(
                (error.status, error.param.as_deref()),
                (400, Some(param)),
                "{body}"
            );
            assert!(error.message.contains(part), "{body}: {}", error.message);
        }
    }
}
