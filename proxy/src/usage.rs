//! Token counts from a reply on its way through: only its first and last bytes are kept.

use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::jsonscan::{Malformed, members};

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
        if self.tail.is_empty() {
            return Usage::of(&self.head);
        }
        // The seam is at most one object that is not found.
        Usage::of(&[self.head.as_slice(), &self.tail].concat())
    }
}

impl Usage {
    /// What the objects called `usage` say, later ones first.
    fn of(text: &[u8]) -> Self {
        static KEY: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));
        let mut usage = Self::default();
        for at in KEY.find_iter(text) {
            let rest = text.get(at + KEY.needle().len()..).unwrap_or_default();
            let object = rest.trim_ascii_start().strip_prefix(b":");
            let mut counts = Counts::default();
            if object.is_some_and(|o| counts.read(o.trim_ascii_start(), true).is_ok()) {
                usage.take(&counts);
            }
        }
        usage
    }

    fn take(&mut self, counts: &Counts) {
        // Anthropic counts what was read from the cache apart.
        let prompt = match (counts.prompt, counts.cached_apart) {
            (Some(n), Some(cached)) => n.checked_add(cached),
            (n, _) => n,
        };
        self.prompt = prompt.or(self.prompt);
        self.completion = counts.completion.or(self.completion);
        self.cached = counts.cached.or(counts.cached_apart).or(self.cached);
    }
}

/// The numbers of one object called `usage`.
#[derive(Default)]
struct Counts {
    prompt: Option<u64>,
    completion: Option<u64>,
    cached: Option<u64>,
    cached_apart: Option<u64>,
}

impl Counts {
    /// Reads the object at the beginning of `text`; of its details only what was cached.
    fn read(&mut self, text: &[u8], outer: bool) -> Result<(), Malformed> {
        for member in members(text) {
            let member = member?;
            let value = text.get(member.value).unwrap_or_default();
            let number = || std::str::from_utf8(value).ok()?.parse().ok();
            let slot = match text.get(member.key).unwrap_or_default() {
                b"\"prompt_tokens\"" | b"\"input_tokens\"" if outer => &mut self.prompt,
                b"\"completion_tokens\"" | b"\"output_tokens\"" if outer => &mut self.completion,
                b"\"cache_read_input_tokens\"" if outer => &mut self.cached_apart,
                b"\"cached_tokens\"" if !outer => &mut self.cached,
                b"\"prompt_tokens_details\"" | b"\"input_tokens_details\""
                    if outer && value.first() == Some(&b'{') =>
                {
                    self.read(value, false)?;
                    continue;
                }
                _ => continue,
            };
            *slot = number().or(*slot);
        }
        Ok(())
    }
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
    fn what_is_no_count_is_left_out() {
        let odd = r#"{"usage":{"prompt_tokens":1.5,"completion_tokens":"9","prompt_tokens_details":null,"input_tokens":4}}"#;
        let expected = Usage {
            prompt: Some(4),
            ..Usage::default()
        };
        assert_eq!(usage(&[odd]), expected);
        for none in [
            r#""usage": 5"#,
            r#"{"usage":{"prompt_tokens":3"#,
            r#"{"usage":{"prompt_tokens":3,"x"}}"#,
            r#"{"usage":[{"prompt_tokens":3}]}"#,
            r#"{"usage":{"other":{"prompt_tokens":3}}}"#,
        ] {
            assert_eq!(usage(&[none]), Usage::default(), "{none}");
        }
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
