//! Stream chunks, written straight into a buffer: what never changes within a stream is serialised once.

use bytes::{BufMut, BytesMut};
use serde::Serialize;

use super::reply::{ChatLogprobs, CompletionLogprobs, FinishReason, Usage};

/// Appends a value as JSON.
fn put_json<T: Serialize + ?Sized>(out: &mut BytesMut, value: &T) {
    // Writing to memory does not fail, and the values here have string keys only.
    let _ = serde_json::to_writer(out.writer(), value);
}

fn put_number(out: &mut BytesMut, number: usize) {
    put_json(out, &number);
}

/// What all chunks of a stream begin and end with.
#[derive(Debug, Clone)]
struct Frame {
    /// `data: {"id":...,"object":...,"created":...,"model":...,`
    head: Vec<u8>,
    /// `]}` and the event's end, with `"usage":null` between when a usage chunk will come.
    tail: &'static [u8],
    include_usage: bool,
}

impl Frame {
    fn new(object: &str, id: &str, created: u64, model: &str, include_usage: bool) -> Self {
        let mut head = BytesMut::from(&b"data: {\"id\":"[..]);
        put_json(&mut head, id);
        head.put_slice(b",\"object\":");
        put_json(&mut head, object);
        head.put_slice(b",\"created\":");
        put_json(&mut head, &created);
        head.put_slice(b",\"model\":");
        put_json(&mut head, model);
        head.put_slice(b",\"choices\":[");
        let tail: &[u8] = if include_usage {
            b"],\"usage\":null}\n\n"
        } else {
            b"]}\n\n"
        };
        Self {
            head: head.to_vec(),
            tail,
            include_usage,
        }
    }

    fn usage(&self, out: &mut BytesMut, usage: &Usage) {
        if self.include_usage {
            out.put_slice(&self.head);
            out.put_slice(b"],\"usage\":");
            put_json(out, usage);
            out.put_slice(b"}\n\n");
        }
    }
}

/// Writes the chunks of one chat completion. Every method appends one event.
#[derive(Debug, Clone)]
pub struct ChatChunks {
    frame: Frame,
}

impl ChatChunks {
    /// `created` is in seconds since 1970; with `include_usage` every chunk carries `"usage":null`, as with OpenAI,
    /// and [`Self::usage`] writes the last one.
    #[must_use]
    pub fn new(id: &str, created: u64, model: &str, include_usage: bool) -> Self {
        Self {
            frame: Frame::new("chat.completion.chunk", id, created, model, include_usage),
        }
    }

    fn chunk(
        &self,
        out: &mut BytesMut,
        index: usize,
        delta: impl FnOnce(&mut BytesMut),
        logprobs: Option<&ChatLogprobs>,
        reason: Option<FinishReason>,
    ) {
        out.put_slice(&self.frame.head);
        out.put_slice(b"{\"index\":");
        put_number(out, index);
        out.put_slice(b",\"delta\":{");
        delta(out);
        out.put_slice(b"}");
        if let Some(logprobs) = logprobs {
            out.put_slice(b",\"logprobs\":");
            put_json(out, logprobs);
        }
        match reason {
            None => out.put_slice(b",\"finish_reason\":null}"),
            Some(reason) => {
                out.put_slice(b",\"finish_reason\":\"");
                out.put_slice(reason.as_str().as_bytes());
                out.put_slice(b"\"}");
            }
        }
        out.put_slice(self.frame.tail);
    }

    /// The first chunk of a choice.
    pub fn role(&self, out: &mut BytesMut, index: usize) {
        self.chunk(
            out,
            index,
            |out| out.put_slice(b"\"role\":\"assistant\",\"content\":\"\""),
            None,
            None,
        );
    }

    /// Text for the user.
    pub fn content(&self, out: &mut BytesMut, index: usize, text: &str, logprobs: Option<&ChatLogprobs>) {
        let delta = |out: &mut BytesMut| {
            out.put_slice(b"\"content\":");
            put_json(out, text);
        };
        self.chunk(out, index, delta, logprobs, None);
    }

    /// Reasoning.
    pub fn reasoning(&self, out: &mut BytesMut, index: usize, text: &str, logprobs: Option<&ChatLogprobs>) {
        let delta = |out: &mut BytesMut| {
            out.put_slice(b"\"reasoning_content\":");
            put_json(out, text);
        };
        self.chunk(out, index, delta, logprobs, None);
    }

    /// A tool call begins.
    pub fn tool_call(&self, out: &mut BytesMut, index: usize, call: usize, id: &str, name: &str) {
        let delta = |out: &mut BytesMut| {
            out.put_slice(b"\"tool_calls\":[{\"index\":");
            put_number(out, call);
            out.put_slice(b",\"id\":");
            put_json(out, id);
            out.put_slice(b",\"type\":\"function\",\"function\":{\"name\":");
            put_json(out, name);
            out.put_slice(b",\"arguments\":\"\"}}]");
        };
        self.chunk(out, index, delta, None, None);
    }

    /// More of a call's arguments.
    pub fn tool_arguments(
        &self,
        out: &mut BytesMut,
        index: usize,
        call: usize,
        fragment: &str,
        logprobs: Option<&ChatLogprobs>,
    ) {
        let delta = |out: &mut BytesMut| {
            out.put_slice(b"\"tool_calls\":[{\"index\":");
            put_number(out, call);
            out.put_slice(b",\"function\":{\"arguments\":");
            put_json(out, fragment);
            out.put_slice(b"}}]");
        };
        self.chunk(out, index, delta, logprobs, None);
    }

    /// The last chunk of a choice, with the log-probabilities of tokens that gave no text (if any are left).
    pub fn finish(
        &self,
        out: &mut BytesMut,
        index: usize,
        reason: FinishReason,
        logprobs: Option<&ChatLogprobs>,
    ) {
        self.chunk(out, index, |_| {}, logprobs, Some(reason));
    }

    /// The usage of all choices, when it was asked for.
    pub fn usage(&self, out: &mut BytesMut, usage: &Usage) {
        self.frame.usage(out, usage);
    }
}

/// Writes the chunks of one text completion. Every method appends one event.
#[derive(Debug, Clone)]
pub struct CompletionChunks {
    frame: Frame,
}

impl CompletionChunks {
    /// See [`ChatChunks::new`].
    #[must_use]
    pub fn new(id: &str, created: u64, model: &str, include_usage: bool) -> Self {
        Self {
            frame: Frame::new("text_completion", id, created, model, include_usage),
        }
    }

    /// A piece of text; the last one of a choice has the reason.
    pub fn text(
        &self,
        out: &mut BytesMut,
        index: usize,
        text: &str,
        logprobs: Option<&CompletionLogprobs>,
        reason: Option<FinishReason>,
    ) {
        out.put_slice(&self.frame.head);
        out.put_slice(b"{\"text\":");
        put_json(out, text);
        out.put_slice(b",\"index\":");
        put_number(out, index);
        out.put_slice(b",\"logprobs\":");
        put_json(out, &logprobs);
        out.put_slice(b",\"finish_reason\":");
        put_json(out, &reason);
        out.put_slice(b"}");
        out.put_slice(self.frame.tail);
    }

    /// The usage of all choices, when it was asked for.
    pub fn usage(&self, out: &mut BytesMut, usage: &Usage) {
        self.frame.usage(out, usage);
    }
}

#[cfg(test)]
mod tests {
    use super::super::reply::{PromptTokensDetails, TokenLogprob};
    use super::*;
    use serde_json::{Value, json};

    fn event(out: &mut BytesMut) -> Value {
        let text = String::from_utf8(out.split().to_vec()).unwrap();
        let body = text.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        assert!(!body.contains('\n'), "one line per event");
        serde_json::from_str(body).unwrap()
    }

    fn chunk(delta: Value, reason: Value) -> Value {
        json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "a\"b",
               "choices": [{"index": 2, "delta": delta, "finish_reason": reason}]})
    }

    #[test]
    fn chat_chunks_are_openais() {
        let chunks = ChatChunks::new("chatcmpl-1", 5, "a\"b", false);
        let out = &mut BytesMut::new();
        chunks.role(out, 2);
        assert_eq!(
            event(out),
            chunk(json!({"role": "assistant", "content": ""}), Value::Null)
        );
        let text = "\"quotes\"\n\\ \u{1} é 🦀 \u{2028}";
        chunks.content(out, 2, text, None);
        assert_eq!(event(out), chunk(json!({"content": text}), Value::Null));
        chunks.reasoning(out, 2, text, None);
        assert_eq!(event(out), chunk(json!({"reasoning_content": text}), Value::Null));
        chunks.tool_call(out, 2, 1, "call_1", "f");
        assert_eq!(
            event(out),
            chunk(
                json!({"tool_calls": [{"index": 1, "id": "call_1", "type": "function",
                                       "function": {"name": "f", "arguments": ""}}]}),
                Value::Null
            )
        );
        chunks.tool_arguments(out, 2, 1, "{\"a", None);
        assert_eq!(
            event(out),
            chunk(
                json!({"tool_calls": [{"index": 1, "function": {"arguments": "{\"a"}}]}),
                Value::Null
            )
        );
        chunks.finish(out, 2, FinishReason::ToolCalls, None);
        assert_eq!(event(out), chunk(json!({}), json!("tool_calls")));
        chunks.usage(out, &Usage::default());
        assert!(out.is_empty(), "usage was not asked for");
    }

    #[test]
    fn usage_is_null_until_its_own_chunk() {
        let chunks = ChatChunks::new("x", 5, "m", true);
        let out = &mut BytesMut::new();
        chunks.content(out, 0, "a", None);
        assert_eq!(event(out)["usage"], Value::Null);
        let usage = Usage {
            prompt_tokens: 3,
            completion_tokens: 4,
            total_tokens: 7,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: 2 },
            completion_tokens_details: None,
        };
        chunks.usage(out, &usage);
        let last = event(out);
        assert_eq!(last["choices"], json!([]));
        assert_eq!(
            last["usage"],
            json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
                   "prompt_tokens_details": {"cached_tokens": 2}})
        );
    }

    #[test]
    fn logprobs_stand_beside_the_delta() {
        let chunks = ChatChunks::new("x", 5, "m", false);
        let out = &mut BytesMut::new();
        let token = TokenLogprob {
            token: "a".into(),
            logprob: -0.5,
            bytes: Some(vec![97]),
            top_logprobs: vec![],
        };
        chunks.content(out, 0, "a", Some(&ChatLogprobs { content: vec![token] }));
        assert_eq!(
            event(out)["choices"][0]["logprobs"],
            json!({"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]})
        );
    }

    #[test]
    fn completion_chunks_are_openais() {
        let chunks = CompletionChunks::new("cmpl-1", 5, "m", false);
        let out = &mut BytesMut::new();
        chunks.text(out, 1, "hé\n", None, None);
        assert_eq!(
            event(out),
            json!({"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m",
                   "choices": [{"text": "hé\n", "index": 1, "logprobs": null, "finish_reason": null}]})
        );
        chunks.text(out, 1, "", None, Some(FinishReason::Length));
        assert_eq!(event(out)["choices"][0]["finish_reason"], "length");
    }
}
