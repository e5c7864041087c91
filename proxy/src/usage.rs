//! Token counts from a reply on its way through: only its first and last bytes are kept.

use std::borrow::Cow;
use std::sync::LazyLock;

use memchr::memmem::Finder;

use crate::jsonscan::{Malformed, find, members, string};

/// Bytes kept of the beginning (Anthropic's `message_start` has the prompt's tokens) and of the end.
const HEAD: usize = 2 * 1024;
const TAIL: usize = 8 * 1024;
/// Last bytes in which the end mark of a stream is looked for.
const END: usize = 128;

/// Tokens of one request, as far as the reply says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt, those from the cache included.
    pub prompt: Option<u64>,
    /// Tokens generated.
    pub completion: Option<u64>,
    /// Tokens of the prompt that came from the prefix cache.
    pub cached: Option<u64>,
    /// Tokens proposed by a draft model.
    pub drafted: Option<u64>,
    /// Those of them that were taken.
    pub accepted: Option<u64>,
    /// Tokens of the prompt per second, as the server has measured.
    pub prompt_speed: Option<f64>,
    /// Generated tokens per second, as the server has measured.
    pub gen_speed: Option<f64>,
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

    /// The sentence of a reply that is an error, in any of the forms in which servers write them.
    #[must_use]
    pub fn error_text(&self) -> Option<String> {
        let text = self.head.as_slice();
        let get = |object: &[u8], key: &str| find(object, key).ok().flatten();
        let error = get(text, "error").and_then(|r| text.get(r));
        let message = error.and_then(|e| e.get(get(e, "message")?));
        let plain = |key: &str| text.get(get(text, key)?);
        let mut found = [message, error, plain("message"), plain("detail")]
            .into_iter()
            .flatten();
        found.find_map(string).map(Cow::into_owned)
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

/// The objects that are the values of one key, wherever it stands, in order.
fn objects<'t>(key: &'static LazyLock<Finder<'static>>, text: &'t [u8]) -> impl Iterator<Item = &'t [u8]> {
    key.find_iter(text).filter_map(|at| {
        let rest = text.get(at + key.needle().len()..)?;
        let value = rest.trim_ascii_start().strip_prefix(b":")?.trim_ascii_start();
        value.starts_with(b"{").then_some(value)
    })
}

impl Usage {
    /// What the objects called `usage` say, later ones first, then the servers' own measurements.
    fn of(text: &[u8]) -> Self {
        static USAGE: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"usage\""));
        static TIMINGS: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"timings\""));
        static METRICS: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"metrics\""));
        let mut usage = Self::default();
        for object in objects(&USAGE, text) {
            let mut counts = Counts::default();
            if counts.read(object, true).is_ok() {
                usage.take(&counts);
            }
        }
        for object in objects(&METRICS, text) {
            usage.take_metrics(object);
        }
        let told = usage.prompt;
        for object in objects(&TIMINGS, text) {
            usage.take_timings(object, told);
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

    /// llama.cpp's `timings`, which are more exact than its `usage` and often all that there is. `prompt_n` leaves out
    /// what came from the cache: a server that does not say how much that was is believed in its `usage`, whose
    /// prompt is `told`.
    fn take_timings(&mut self, object: &[u8], told: Option<u64>) {
        let Some([prompt, cached, completion, drafted, accepted, reading, writing]) = numbers(
            object,
            [
                b"\"prompt_n\"",
                b"\"cache_n\"",
                b"\"predicted_n\"",
                b"\"draft_n\"",
                b"\"draft_n_accepted\"",
                b"\"prompt_per_second\"",
                b"\"predicted_per_second\"",
            ],
        ) else {
            return;
        };
        let (prompt, cached) = (whole(prompt), whole(cached));
        let prompt = match (prompt, cached) {
            (Some(read), Some(cached)) => read.checked_add(cached),
            (read, None) => told.or(read),
            (None, Some(_)) => None,
        };
        self.prompt = prompt.or(self.prompt);
        self.cached = cached.or(self.cached);
        self.completion = whole(completion).or(self.completion);
        self.drafted = whole(drafted).or(self.drafted);
        self.accepted = whole(accepted).or(self.accepted);
        self.prompt_speed = rate(reading).or(self.prompt_speed);
        self.gen_speed = rate(writing).or(self.gen_speed);
    }

    /// vLLM's `metrics` of one request: times, from which the speeds follow.
    fn take_metrics(&mut self, object: &[u8]) {
        let Some([first, between, drafts]) = numbers(
            object,
            [
                b"\"time_to_first_token_ms\"",
                b"\"mean_itl_ms\"",
                b"\"speculative_decoding\"",
            ],
        ) else {
            return;
        };
        let read = self.prompt.map(|p| p.saturating_sub(self.cached.unwrap_or(0)));
        if let (Some(ms), Some(read)) = (rate(first), read.filter(|n| *n > 0)) {
            self.prompt_speed = Some(read as f64 * 1e3 / ms);
        }
        self.gen_speed = rate(between).map(|ms| 1e3 / ms).or(self.gen_speed);
        if let Some([drafted, accepted]) =
            drafts.and_then(|d| numbers(d, [b"\"num_draft_tokens\"", b"\"num_accepted_tokens\""]))
        {
            self.drafted = whole(drafted).or(self.drafted);
            self.accepted = whole(accepted).or(self.accepted);
        }
    }
}

/// The values of these keys (with their quotes) of an object; `None` if it is none.
fn numbers<'t, const N: usize>(object: &'t [u8], keys: [&[u8]; N]) -> Option<[Option<&'t [u8]>; N]> {
    let mut found = [None; N];
    for member in members(object) {
        let member = member.ok()?;
        let key = object.get(member.key)?;
        for (slot, _) in found.iter_mut().zip(keys).filter(|(_, k)| *k == key) {
            *slot = object.get(member.value.clone());
        }
    }
    Some(found)
}

fn whole(text: Option<&[u8]>) -> Option<u64> {
    std::str::from_utf8(text?).ok()?.parse().ok()
}

/// A number above zero.
fn rate(text: Option<&[u8]>) -> Option<f64> {
    let number: f64 = std::str::from_utf8(text?).ok()?.parse().ok()?;
    (number.is_finite() && number > 0.0).then_some(number)
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
            ..Usage::default()
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
            ..Usage::default()
        };
        assert_eq!(usage(&[start, &middle, end]), expected);
    }

    #[test]
    fn llama_cpps_timings_go_before_all() {
        let timings = r#""timings":{"cache_n":100,"prompt_n":20,"prompt_ms":50.5,"prompt_per_second":396.0,"predicted_n":30,"predicted_per_second":61.5,"draft_n":12,"draft_n_accepted":9}"#;
        let expected = Usage {
            prompt: Some(120),
            completion: Some(30),
            cached: Some(100),
            drafted: Some(12),
            accepted: Some(9),
            prompt_speed: Some(396.0),
            gen_speed: Some(61.5),
        };
        let whole = format!(r#"{{"content":"x","prompt":"{}",{timings}}}"#, "p".repeat(20_000));
        assert_eq!(usage(&[&whole]), expected, "/completion");
        let last = format!(
            "data: {{\"choices\":[],{timings},\"usage\":{{\"prompt_tokens\":1}}}}\n\ndata: [DONE]\n\n"
        );
        let stream = "data: {\"choices\":[{\"delta\":{\"content\":\"x\"}}]}\n\n".repeat(500);
        assert_eq!(usage(&[&stream, &last]), expected, "wherever usage stands");
        let infill = format!(r#"[{{"timings":{{"prompt_n":1,"predicted_n":1}}}},{{{timings}}}]"#);
        assert_eq!(usage(&[&infill]), expected, "the last element of /infill");
        let before = r#"{"usage":{"prompt_tokens":120,"completion_tokens":3},"timings":{"prompt_n":20,"predicted_n":3}}"#;
        let infill = r#"[{"timings":{"prompt_n":1}},{"timings":{"prompt_n":20,"predicted_n":3}}]"#;
        for (text, prompt) in [(before, 120), (infill, 20)] {
            let expected = Usage {
                prompt: Some(prompt),
                completion: Some(3),
                ..Usage::default()
            };
            assert_eq!(usage(&[text]), expected, "without cache_n");
        }
        let odd = r#"{"timings":{"prompt_n":-1,"predicted_n":2.5,"prompt_per_second":null,"predicted_per_second":1e999}}"#;
        assert_eq!(usage(&[odd]), Usage::default());
    }

    #[test]
    fn vllms_metrics_are_times() {
        let text = r#"{"usage":{"prompt_tokens":60,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":10}},
            "metrics":{"time_to_first_token_ms":100.0,"mean_itl_ms":20.0,"speculative_decoding":{"num_draft_tokens":8,"num_accepted_tokens":5}}}"#;
        let expected = Usage {
            prompt: Some(60),
            completion: Some(9),
            cached: Some(10),
            drafted: Some(8),
            accepted: Some(5),
            prompt_speed: Some(500.0),
            gen_speed: Some(50.0),
        };
        assert_eq!(usage(&[text]), expected);
        assert_eq!(
            usage(&[
                r#"{"metrics":{"mean_itl_ms":0,"time_to_first_token_ms":9,"speculative_decoding":null}}"#
            ]),
            Usage::default()
        );
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
    fn errors_in_their_servers_words() {
        let said = |body: &str| {
            let mut meter = Meter::default();
            meter.feed(body.as_bytes());
            meter.error_text()
        };
        for (body, expected) in [
            (
                r#"{"error":{"message":"too \"long\"","code":400},"message":"m"}"#,
                Some("too \"long\""),
            ),
            (r#"{"error":"in one word"}"#, Some("in one word")),
            (
                r#"{"object":"error","message":"vLLM's old form"}"#,
                Some("vLLM's old form"),
            ),
            (r#"{"detail":"Not Found"}"#, Some("Not Found")),
            (r#"{"detail":[{"loc":1}]}"#, None),
            ("<html>", None),
            ("", None),
        ] {
            assert_eq!(said(body).as_deref(), expected, "{body}");
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
