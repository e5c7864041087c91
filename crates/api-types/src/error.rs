//! The one error that a client sees, whatever went wrong.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An error with its HTTP status, serialised as OpenAI's envelope:
/// `{"error":{"message":...,"type":...,"param":...,"code":...}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, 400..=599.
    pub status: u16,
    /// What is wrong, naming field and value where there is one.
    pub message: String,
    /// OpenAI's class of errors, such as `invalid_request_error`.
    pub kind: &'static str,
    /// The request's field, such as `messages[2].content`.
    pub param: Option<String>,
    /// A word for programs, such as `model_not_found`.
    pub code: Option<&'static str>,
    /// Seconds after which to try again, sent as `Retry-After`.
    pub retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: u16, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            kind,
            param: None,
            code,
            retry_after: None,
        }
    }

    /// 400: a field of the request is wrong. The message starts with the field's name.
    pub fn invalid(param: impl Into<String>, problem: impl AsRef<str>) -> Self {
        let param = param.into();
        let message = format!("{param}: {}", problem.as_ref());
        Self {
            param: Some(param),
            ..Self::new(400, "invalid_request_error", None, message)
        }
    }

    /// 400: the request as a whole is wrong.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "invalid_request_error", None, message)
    }

    /// 401: no key, or another one.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(401, "authentication_error", Some("invalid_api_key"), message)
    }

    /// 404: no such path.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(404, "not_found_error", Some("not_found"), message)
    }

    /// 404: no such model.
    pub fn model_not_found(message: impl Into<String>) -> Self {
        let error = Self::new(404, "invalid_request_error", Some("model_not_found"), message);
        Self {
            param: Some("model".to_owned()),
            ..error
        }
    }

    /// 405: the path exists, the method does not.
    pub fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(405, "invalid_request_error", Some("method_not_allowed"), message)
    }

    /// 413: the body is larger than what is read.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(413, "invalid_request_error", Some("request_too_large"), message)
    }

    /// 415: the body is no JSON by its own account.
    pub fn unsupported_media_type(message: impl Into<String>) -> Self {
        Self::new(
            415,
            "invalid_request_error",
            Some("unsupported_media_type"),
            message,
        )
    }

    /// 429: too many requests wait already.
    pub fn too_many_requests(message: impl Into<String>, retry_after: u64) -> Self {
        let error = Self::new(429, "rate_limit_error", Some("queue_full"), message);
        Self {
            retry_after: Some(retry_after),
            ..error
        }
    }

    /// 500: our own fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "server_error", Some("internal_error"), message)
    }

    /// 503: not now. `code` says why, such as `draining`.
    pub fn unavailable(code: &'static str, message: impl Into<String>, retry_after: Option<u64>) -> Self {
        Self {
            retry_after,
            ..Self::new(503, "service_unavailable", Some(code), message)
        }
    }

    /// 504: nothing happened for too long.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(504, "server_error", Some("timeout"), message)
    }

    /// Sets the word for programs.
    #[must_use]
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The envelope.
    #[must_use]
    pub fn envelope(&self) -> ErrorEnvelope {
        ErrorEnvelope {
            error: ErrorBody {
                message: self.message.clone(),
                kind: self.kind.to_owned(),
                param: self.param.clone(),
                code: self.code.map(str::to_owned),
            },
        }
    }

    /// The envelope as JSON text.
    #[must_use]
    pub fn to_json(&self) -> String {
        // A struct of strings has no way to fail.
        serde_json::to_string(&self.envelope()).unwrap_or_default()
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.status)
    }
}

impl std::error::Error for ApiError {}

/// OpenAI's error envelope, as sent and as read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorEnvelope {
    /// Its only content.
    pub error: ErrorBody,
}

/// What is inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// For a person.
    pub message: String,
    /// The class.
    #[serde(rename = "type")]
    pub kind: String,
    /// The field.
    #[serde(default)]
    pub param: Option<String>,
    /// For a program.
    #[serde(default)]
    pub code: Option<String>,
}

/// A value as it may stand in a message: JSON, cut after 80 characters.
#[must_use]
pub fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_is_openais() {
        let error = ApiError::invalid("temperature", "must be between 0 and 2, got 3.5");
        assert_eq!(
            error.to_json(),
            "{\"error\":{\"message\":\"temperature: must be between 0 and 2, got 3.5\",\
             \"type\":\"invalid_request_error\",\"param\":\"temperature\",\"code\":null}}"
        );
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let text = shown(&Value::String("ä".repeat(500)));
        assert_eq!(text.chars().count(), 81);
        assert!(text.ends_with('…'));
    }
}
