//! Ollama's API in OpenAI's terms: pure translation, no sockets and no clock.
//!
//! | module    | what it is                                                                          |
//! |-----------|-------------------------------------------------------------------------------------|
//! | `request` | `/api/chat`, `/api/generate`, `/api/embed` to the OpenAI route that does the same    |
//! | `message` | a conversation: images, tool calls and their answers                                 |
//! | `reply`   | a whole OpenAI reply to Ollama's                                                     |
//! | `stream`  | server-sent events to lines of JSON, wherever the bytes are cut                      |
//! | `facts`   | what a model's own files say of it, for lists                                        |
//!
//! `http::ollama` puts it between a client and the forwarding. What Ollama does with model files (pull, create, ...) has
//! no counterpart here: models come from the registry.
//!
//! Source of the formats: <https://github.com/ollama/ollama/blob/main/docs/api.md>.

pub mod facts;
mod message;
pub mod reply;
pub mod request;
pub mod stream;

use std::time::Duration;

/// The level of Ollama's API that is spoken here, for clients that ask before they use it.
pub const API_LEVEL: &str = "0.12.0";

/// The form of a generation's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Of `/api/chat`: `message`.
    Chat,
    /// Of `/api/generate`: `response`.
    Generate,
}

/// When things happened, counted from the request's arrival.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// The model was ready and got the request.
    pub forwarded: Option<Duration>,
    /// First token.
    pub first: Option<Duration>,
    /// The end.
    pub end: Duration,
}
