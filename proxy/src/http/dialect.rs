//! How the streams of each API say what is no part of a reply: that a model is loading, that something went wrong.

use api_types::error::ApiError;
use bytes::Bytes;
use serde_json::{Value, json};

/// An API whose streams are server-sent events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// OpenAI's chat completions.
    Chat,
    /// OpenAI's completions.
    Text,
    /// llama.cpp's own: as `Text`, without an end mark.
    Bare,
    /// Anthropic's messages.
    Messages,
    /// OpenAI's responses.
    Responses,
}

impl Dialect {
    /// The API of this path, as clients ask for it or as a model's server sees it; `None` where `"stream": true` does
    /// not mean events (speech comes as sound).
    #[must_use]
    pub fn of(path: &str) -> Option<Self> {
        let rest = path.strip_prefix("/v1/").or_else(|| path.strip_prefix("/v/"));
        match rest.or_else(|| path.strip_prefix('/'))? {
            "chat/completions" => Some(Self::Chat),
            "completions" => Some(Self::Text),
            "infill" | "completion" => Some(Self::Bare),
            "messages" => Some(Self::Messages),
            "responses" => Some(Self::Responses),
            _ => None,
        }
    }

    /// The API of a path whose beginning is somebody's own (`/upstream/...`), of a stream known to be events.
    #[must_use]
    pub fn of_end(path: &str) -> Self {
        match path.rsplit('/').next() {
            Some("messages") => Self::Messages,
            Some("responses") => Self::Responses,
            _ => Self::Chat,
        }
    }

    /// An error.
    #[must_use]
    pub fn error(self, error: &ApiError) -> String {
        let whole: Value = serde_json::from_str(&error.to_json()).unwrap_or_default();
        self.error_of(whole)
    }

    /// An error that a model's server has told in its own words: an object with the member `error`.
    #[must_use]
    pub fn error_of(self, whole: Value) -> String {
        let own = |key: &str| whole.get("error").and_then(|e| e.get(key)).cloned();
        let message = || own("message").or_else(|| whole.get("error").cloned());
        match self {
            Self::Chat | Self::Text | Self::Bare => format!("data: {whole}\n\n"),
            // Clients look at the event's name first: without it the error is passed over.
            Self::Messages => {
                let kind = own("type").filter(Value::is_string);
                let mut error = json!({
                    "type": kind.unwrap_or_else(|| "api_error".into()), "message": message(),
                });
                if let (Some(error), Some(code)) = (error.as_object_mut(), own("code")) {
                    error.insert("code".to_owned(), code);
                }
                let event = json!({"type": "error", "error": error});
                format!("event: error\ndata: {event}\n\n")
            }
            // In the form of the API, and in the one that its client libraries turn into an exception.
            Self::Responses => {
                let event = json!({
                    "type": "error", "code": own("code"), "message": message(), "param": own("param"),
                    "sequence_number": 0, "error": whole.get("error"),
                });
                format!("event: error\ndata: {event}\n\n")
            }
        }
    }

    /// A sign of progress before the model's own events. Only chats have a place for text that is not the answer's, and
    /// Anthropic's streams one for what means nothing; clients of the other APIs take their first event for the
    /// beginning of the reply, so that a comment is all that can be said.
    #[must_use]
    pub fn progress(self, text: &str) -> Bytes {
        let piece = match self {
            Self::Chat => {
                let chunk = json!({"choices": [{"index": 0, "delta": {"reasoning_content": text}}]});
                format!("data: {chunk}\n\n")
            }
            Self::Messages => {
                let event = json!({"type": "ping", "message": text.trim()});
                format!("event: ping\ndata: {event}\n\n")
            }
            Self::Text | Self::Bare | Self::Responses => {
                let lines = text.trim().lines().map(|line| format!(": {line}\n"));
                format!("{}\n", lines.collect::<String>())
            }
        };
        piece.into()
    }

    /// What ends a stream, if anything does.
    #[must_use]
    pub fn end(self) -> &'static [u8] {
        match self {
            Self::Chat | Self::Text => b"data: [DONE]\n\n",
            Self::Bare | Self::Messages | Self::Responses => b"",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_paths_stream_events() {
        for (path, expected) in [
            ("/v1/chat/completions", Some(Dialect::Chat)),
            ("/v/chat/completions", Some(Dialect::Chat)),
            ("/chat/completions", Some(Dialect::Chat)),
            ("/v1/completions", Some(Dialect::Text)),
            ("/completion", Some(Dialect::Bare)),
            ("/infill", Some(Dialect::Bare)),
            ("/v/messages", Some(Dialect::Messages)),
            ("/v1/responses", Some(Dialect::Responses)),
            ("/v1/audio/speech", None),
            ("/v1/embeddings", None),
            ("/v1/messages/count_tokens", None),
        ] {
            assert_eq!(Dialect::of(path), expected, "{path}");
        }
        assert_eq!(Dialect::of_end("/upstream/m/v1/messages"), Dialect::Messages);
        assert_eq!(Dialect::of_end("/api/chat"), Dialect::Chat);
    }

    #[test]
    fn errors_in_each_form() {
        let error = ApiError::unavailable("x", "why", None);
        let event = |dialect: Dialect| {
            let text = dialect.error(&error);
            let (name, data) = text.trim_end().rsplit_once("data: ").unwrap();
            (name.to_owned(), serde_json::from_str::<Value>(data).unwrap())
        };
        let (name, data) = event(Dialect::Chat);
        assert_eq!((name.as_str(), &data["error"]["message"]), ("", &json!("why")));
        let (name, data) = event(Dialect::Messages);
        assert_eq!(
            (name.as_str(), &data["type"]),
            ("event: error\n", &json!("error"))
        );
        assert_eq!(
            (&data["error"]["message"], &data["error"]["code"]),
            (&json!("why"), &json!("x"))
        );
        assert!(data["error"]["type"].is_string());
        let (name, data) = event(Dialect::Responses);
        assert_eq!(
            (name.as_str(), &data["message"], &data["code"]),
            ("event: error\n", &json!("why"), &json!("x"))
        );
        assert_eq!(data["error"]["message"], "why");
        let bare = Dialect::Messages.error_of(json!({"error": "in one word"}));
        assert!(
            bare.contains(r#""message":"in one word""#) && bare.contains("api_error"),
            "{bare}"
        );
    }

    #[test]
    fn progress_disturbs_no_client() {
        let shown = |d: Dialect| String::from_utf8(d.progress("━\nloading\n").to_vec()).unwrap();
        assert!(shown(Dialect::Chat).contains("reasoning_content"));
        assert!(shown(Dialect::Messages).starts_with("event: ping\ndata: {"));
        assert_eq!(shown(Dialect::Text), ": ━\n: loading\n\n");
    }
}
