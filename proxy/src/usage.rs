//! Token counts from a reply on its way through: only its first and last bytes are kept.

use serde_json::Value;

/// Bytes kept of the beginning (Anthropic's `message_start` has the prompt's tokens) and of the end.
const HEAD: usize = 2 * 1024;
const TAIL: usize = 8 * 1024;
/// Last bytes in which the end mark of a stream is looked for.
const END: usize = 128;

/// Tokens of one request, as far as the reply says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, those from the cache included.
    pub prompt: Option<u64>,
    /// Tokens generated.
    pub completion: Option<u64>,
    /// Tokens of the prompt that came from the prefix cache.
    pub cached: Option<u64>,
}

/// Watches a reply.
#[derive(Debug, Default)]
pub struct Meter {
    head: Vec<u8>,
    tail: Vec<u8>,
    /// Bytes in all.
    pub bytes: u64,
}

impl Meter {
    /// Takes note of a piece.
    pub fn feed(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        let missing = HEAD.saturating_sub(self.head.len()).min(piece.len());
        let (first, rest) = piece.split_at_checked(missing).unwrap_or((piece, &[]));
        self.head.extend_from_slice(first);
        let rest = rest.get(rest.len().saturating_sub(TAIL)..).unwrap_or(rest);
        self.tail.extend_from_slice(rest);
        if self.tail.len() > 2 * TAIL {
            let surplus = self.tail.len() - TAIL;
            self.tail.drain(..surplus);
        }
    }

    /// Whether the last bytes hold the end mark of a stream.
    #[must_use]
    pub fn saw_end(&self) -> bool {
        let part = if self.tail.is_empty() {
            &self.head
        } else {
            &self.tail
        };
        let last = part.get(part.len().saturating_sub(END)..).unwrap_or(part);
        [b"[DONE]".as_slice(), b"message_stop"]
            .iter()
            .any(|mark| memchr::memmem::find(last, mark).is_some())
    }

    /// What the reply said.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        // Whole when the reply is short; the seam is at most one object that is not found.
        for part in [&self.head, &[self.head.as_slice(), &self.tail].concat()] {
            for object in objects(part, b"\"usage\"") {
                usage.take(&object);
            }
        }
        usage
    }
}

impl Usage {
    fn take(&mut self, object: &Value) {
        let number = |paths: &[&str]| paths.iter().find_map(|p| object.pointer(p)?.as_u64());
        let cached_anthropic = number(&["/cache_read_input_tokens"]);
        let mut prompt = number(&["/prompt_tokens", "/input_tokens"]);
        if let (Some(n), Some(cached)) = (prompt, cached_anthropic) {
            // Anthropic counts what was read from the cache apart.
            prompt = Some(n + cached);
        }
        let completion = number(&["/completion_tokens", "/output_tokens"]);
        let cached = number(&[
            "/prompt_tokens_details/cached_tokens",
            "/input_tokens_details/cached_tokens",
        ]);
        self.prompt = prompt.or(self.prompt);
        self.completion = completion.or(self.completion);
        self.cached = cached.or(cached_anthropic).or(self.cached);
    }
}

/// The objects that follow `key` and a colon, in order.
fn objects(text: &[u8], key: &[u8]) -> Vec<Value> {
    let mut found = Vec::new();
    for at in memchr::memmem::find_iter(text, key) {
        let rest = text.get(at + key.len()..).unwrap_or_default().trim_ascii_start();
        let Some(rest) = rest.strip_prefix(b":") else {
            continue;
        };
        let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<Value>();
        if let Some(Ok(value @ Value::Object(_))) = values.next() {
            found.push(value);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(pieces: &[&str]) -> Usage {
        let mut meter = Meter::default();
        pieces.iter().for_each(|p| meter.feed(p.as_bytes()));
        meter.usage()
    }

    #[test]
    fn openai_whole_and_streamed() {
        let whole = r#"{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}}}"#;
        let expected = Usage {
            prompt: Some(7),
            completion: Some(3),
            cached: Some(4),
        };
        assert_eq!(usage(&[whole]), expected);
        let event = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}],\"usage\":null}\n\n".repeat(2_000);
        let last = format!("data: {whole}\n\ndata: [DONE]\n\n");
        assert_eq!(usage(&[&event, &last[..30], &last[30..]]), expected);
    }

    #[test]
    fn anthropic_has_them_in_two_places() {
        let start = "event: message_start\ndata: {\"message\":{\"usage\":{\"input_tokens\":5,\"cache_read_input_tokens\":20,\"output_tokens\":1}}}\n\n";
        let middle = "event: content_block_delta\ndata: {}\n\n".repeat(1_000);
        let end = "event: message_delta\ndata: {\"usage\":{\"output_tokens\":42}}\n\n";
        let expected = Usage {
            prompt: Some(25),
            completion: Some(42),
            cached: Some(20),
        };
        assert_eq!(usage(&[start, &middle, end]), expected);
    }

    #[test]
    fn memory_is_bounded_and_nothing_is_invented() {
        let mut meter = Meter::default();
        for _ in 0..1_000 {
            meter.feed(&[b'x'; 10_000]);
        }
        assert!(meter.head.len() + meter.tail.len() <= HEAD + 3 * TAIL);
        assert_eq!((meter.usage(), meter.bytes), (Usage::default(), 10_000_000));
    }
}
