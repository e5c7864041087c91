//! One reply: tokens to text, stop strings, reasoning, tool calls. Pure; events in, deltas out.

use api_types::openai::{FinishReason, TokenLogprob, TopLogprob};
use chat_format::{CallOutcome, Delta, EndReason, OutputParser, StopMatcher};

use crate::backend::{self, EngineError, GenerationEvent, TokenLogprobs};
use crate::text::{Detokenizer, TextTokenizer};

/// Characters of text on each side of the place where a prompt parts from the cached one.
const SHOWN: usize = 40;

/// A token's log-probability and where in the reply's text the token begins.
pub(super) struct PlacedLogprob {
    pub(super) logprob: TokenLogprob,
    /// Characters that were out before it. One of several tokens is out with the last of them.
    pub(super) offset: usize,
}

/// A reply on its way.
pub(super) struct Choice {
    tokenizer: TextTokenizer,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    /// Stop strings count from behind so many tokens on.
    min_tokens: usize,
    /// `None` for completions: text is text.
    parser: Option<OutputParser>,
    single_call: bool,
    /// What a forced call has said before the first token.
    forced: Vec<Delta>,
    prompt_tokens: usize,
    cached_tokens: usize,
    /// As the request began, before others could compute some of it.
    cached_at_start: usize,
    completion_tokens: usize,
    /// Log-probabilities of tokens whose text has not been handed out.
    logprobs: Vec<PlacedLogprob>,
    /// Characters that the detokeniser has given, stop strings or not.
    characters: usize,
    has_calls: bool,
    ended: Option<FinishReason>,
    /// Reused: a token's text before and after the stop strings.
    raw: String,
    shown: String,
}

impl Choice {
    pub(super) fn new(
        tokenizer: &TextTokenizer,
        prompt_tokens: usize,
        (stops, min_tokens): (&[String], usize),
        mut parser: Option<OutputParser>,
        forced: &str,
        single_call: bool,
    ) -> Self {
        let mut deltas = Vec::new();
        if let Some(parser) = parser.as_mut().filter(|_| !forced.is_empty()) {
            parser.push(forced, &mut deltas);
        }
        Self {
            tokenizer: tokenizer.clone(),
            detokenizer: tokenizer.detokenizer(),
            stops: StopMatcher::new(stops.iter().cloned()),
            min_tokens,
            parser,
            single_call,
            forced: deltas,
            prompt_tokens,
            cached_tokens: 0,
            cached_at_start: 0,
            completion_tokens: 0,
            logprobs: Vec::new(),
            characters: 0,
            has_calls: false,
            ended: None,
            raw: String::new(),
            shown: String::new(),
        }
    }

    /// Says in the log why a prompt that begins like an earlier one had to be computed again.
    fn explain(&self, miss: &backend::Miss) {
        let text = |ids: &[u32]| {
            let bytes: Vec<u8> = ids
                .iter()
                .flat_map(|&id| self.tokenizer.token_bytes(id))
                .collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let before: Vec<char> = text(&miss.before).chars().rev().take(SHOWN).collect();
        let start = |ids: &[u32]| text(ids).chars().take(SHOWN).collect::<String>();
        tracing::debug!(
            first_different_token = miss.position,
            before = before.iter().rev().collect::<String>(),
            asked = start(&miss.asked),
            cached = start(&miss.cached),
            "{}",
            if miss.evicted {
                "the prompt was cached, and has made room for others"
            } else {
                "the prompt parts from the cached one"
            }
        );
    }

    /// Takes the next event and appends what it means for the client. `Some` once: the reply has ended with it.
    ///
    /// # Errors
    /// The engine's; the choice is over then, too.
    pub(super) fn event(
        &mut self,
        event: GenerationEvent,
        deltas: &mut Vec<Delta>,
    ) -> Result<Option<FinishReason>, EngineError> {
        if self.ended.is_some() {
            return Ok(None);
        }
        if !matches!(
            event,
            GenerationEvent::Started { .. } | GenerationEvent::Reused { .. } | GenerationEvent::Failed(_)
        ) {
            deltas.append(&mut self.forced);
        }
        let first = deltas.len();
        match event {
            GenerationEvent::Started { cached_tokens, miss } => {
                self.cached_tokens = cached_tokens;
                self.cached_at_start = cached_tokens;
                if let Some(miss) = miss {
                    self.explain(&miss);
                }
            }
            GenerationEvent::Reused { cached_tokens } => self.cached_tokens = cached_tokens,
            GenerationEvent::Token { id, logprob } => {
                self.completion_tokens += 1;
                if let Some(logprob) = logprob {
                    self.logprobs.push(PlacedLogprob {
                        logprob: self.logprob(id, &logprob),
                        offset: self.characters,
                    });
                }
                self.raw.clear();
                self.detokenizer.push(id, &mut self.raw);
                self.characters += self.raw.chars().count();
                if self.show(deltas) {
                    self.end(backend::FinishReason::Stop, deltas);
                }
            }
            GenerationEvent::Finished { reason, usage } => {
                if usage.completion_tokens == 0 {
                    return Err(EngineError::Step("no token was generated".to_owned()));
                }
                self.cached_tokens = usage.cached_tokens;
                self.completion_tokens = usage.completion_tokens;
                self.raw.clear();
                self.detokenizer.finish(&mut self.raw);
                // The text that was held back may complete a stop string.
                let reason = if self.show(deltas) {
                    backend::FinishReason::Stop
                } else {
                    self.shown.clear();
                    self.stops.finish(&mut self.shown);
                    self.parse(deltas);
                    reason
                };
                self.end(reason, deltas);
            }
            GenerationEvent::Failed(error) => return Err(error),
        }
        self.watch_calls(first, deltas);
        Ok(self.ended)
    }

    /// Tokens of prompt, cache and reply so far.
    pub(super) fn usage(&self) -> backend::Usage {
        backend::Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.completion_tokens,
        }
    }

    /// Tokens of the prompt that were cached as the request began.
    pub(super) fn cached_at_start(&self) -> usize {
        self.cached_at_start
    }

    /// Log-probabilities that belong to the deltas given out last.
    pub(super) fn take_logprobs(&mut self) -> Vec<PlacedLogprob> {
        std::mem::take(&mut self.logprobs)
    }

    /// Brings `raw` past the stop strings and the parser; true when a stop string was met.
    fn show(&mut self, deltas: &mut Vec<Delta>) -> bool {
        self.shown.clear();
        let stopped = if self.completion_tokens <= self.min_tokens {
            self.shown.push_str(&self.raw);
            false
        } else {
            self.stops.push(&self.raw, &mut self.shown).is_some()
        };
        self.parse(deltas);
        stopped
    }

    fn parse(&mut self, deltas: &mut Vec<Delta>) {
        if self.shown.is_empty() {
            return;
        }
        match &mut self.parser {
            Some(parser) => parser.push(&self.shown, deltas),
            None => deltas.push(Delta::Content(self.shown.clone())),
        }
    }

    fn end(&mut self, reason: backend::FinishReason, deltas: &mut Vec<Delta>) {
        let (end, finish) = match reason {
            backend::FinishReason::Stop => (EndReason::Stop, FinishReason::Stop),
            backend::FinishReason::Length => (EndReason::Length, FinishReason::Length),
        };
        if let Some(parser) = &mut self.parser {
            parser.finish(end, deltas);
        }
        self.ended = Some(finish);
    }

    /// Notes finished calls among the new deltas; ends after the first one where only one is wanted.
    fn watch_calls(&mut self, first: usize, deltas: &mut Vec<Delta>) {
        let complete = |delta: &Delta| {
            matches!(
                delta,
                Delta::ToolCallEnd {
                    outcome: CallOutcome::Complete,
                    ..
                }
            )
        };
        let new = deltas.get(first..).unwrap_or_default();
        if let Some(at) = new.iter().position(complete) {
            self.has_calls = true;
            if self.single_call {
                deltas.truncate(first + at + 1);
                self.ended = Some(FinishReason::ToolCalls);
            }
        }
        if self.has_calls && self.ended == Some(FinishReason::Stop) {
            self.ended = Some(FinishReason::ToolCalls);
        }
    }

    fn logprob(&self, id: u32, of: &TokenLogprobs) -> TokenLogprob {
        let text = |id: u32| {
            let bytes = self.tokenizer.token_bytes(id);
            (String::from_utf8_lossy(&bytes).into_owned(), Some(bytes))
        };
        let (token, bytes) = text(id);
        let top = of.top.iter().map(|(id, logprob)| {
            let (token, bytes) = text(*id);
            TopLogprob {
                token,
                logprob: *logprob,
                bytes,
            }
        });
        TokenLogprob {
            token,
            logprob: of.logprob,
            bytes,
            top_logprobs: top.collect(),
        }
    }
}
