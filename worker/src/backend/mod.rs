//! The seam between the HTTP layer and the engine: token ids in, token ids out.
//!
//! Everything above (HTTP, templates, tokenising, parsing) talks to a [`Backend`] and runs as well against the
//! [`scripted`] one, without MLX. The real one is `crate::engine`.

pub mod scripted;

use std::time::Duration;

use constraint::{Constraint, Opening};
use thiserror::Error;
use tokio::sync::{mpsc, watch};

/// An engine that generates tokens for one model. Shared by all requests; nothing here blocks or takes a lock that
/// the engine's step holds.
pub trait Backend: Send + Sync + 'static {
    /// Queues the sequences of one client's request: its choices, its prompts. Never blocks. Dropping a returned
    /// [`Generation`] cancels that sequence wherever it is: in the queue, in prefill (between chunks), in decode (within
    /// one step). Once one of them runs, the others wait for a place for as long as it takes.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing has been queued then, of none of them.
    fn submit_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<Generation>, SubmitError>;

    /// Queues a request of one sequence.
    ///
    /// # Errors
    /// As [`Self::submit_all`].
    fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        // As many come back as were given.
        self.submit_all(vec![request])?.pop().ok_or(SubmitError::Stopped)
    }

    /// What the loaded model is.
    fn info(&self) -> &ModelInfo;

    /// Counters, read from atomics.
    fn stats(&self) -> EngineStats;

    /// Whether the engine died since its weights can no longer be read.
    fn weights_lost(&self) -> bool {
        false
    }

    /// Whether the engine lives. Changes at most once, from [`EngineState::Running`] to [`EngineState::Dead`]; the
    /// process then tells its clients and exits non-zero.
    fn state(&self) -> watch::Receiver<EngineState>;

    /// Ends the engine: requests that are queued or running fail with [`EngineError::Stopped`], later ones are
    /// refused with [`SubmitError::Stopped`]. Returns at once; called after draining, before the process exits.
    fn stop(&self);
}

/// One prompt to be continued.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateRequest {
    /// Prompt token ids, never empty, special tokens included, each below [`ModelInfo::vocab_size`].
    pub prompt: Vec<u32>,
    /// Most tokens to generate, at least 1. The engine stops with [`FinishReason::Length`] there, or earlier when
    /// prompt plus reply reach the context length.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Ids that end the reply (the model's end-of-sequence set). The one that did is not sent as a
    /// [`GenerationEvent::Token`] but counts in [`Usage::completion_tokens`].
    pub stop_tokens: Vec<u32>,
    /// `Some(k)`: report each token's log-probability and those of the `k` likeliest, `k` in 0..=20.
    pub logprobs: Option<usize>,
    /// The form of the reply; `None`: any.
    pub constraint: Option<Constrained>,
}

/// The form that a reply has to have. Only tokens that can go on in it are drawn; the model's end-of-sequence set only where it
/// may end. Where nothing but the end can follow, the reply ends with [`FinishReason::Stop`], without such a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Constrained {
    /// The form.
    pub form: Constraint,
    /// What may come before it, or in its place.
    pub opening: Opening,
}

/// How one request's tokens are chosen. Belongs to the request alone, whatever else runs in the same batch.
/// The order of operations is vLLM's: bias, repetition, frequency and presence penalties on the logits; then, unless
/// greedy, temperature, top-k, top-p, min-p. What a constraint forbids gets no share of the draw after the penalties, and before the
/// temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Softmax temperature, 0..=2; 0 is greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Candidates kept; 0 keeps all.
    pub top_k: usize,
    /// Smallest probability relative to the likeliest token's, 0..=1; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or reply; 1 is none, above 0.
    pub repetition_penalty: f32,
    /// Subtracted once from the logit of each token that the reply already has, -2..=2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence of a token in the reply, -2..=2.
    pub frequency_penalty: f32,
    /// Added to logits, -100..=100 each; ids are below the vocabulary size and distinct.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of this request's own random generator: same request, same seed, same reply. `None`: any.
    pub seed: Option<u64>,
    /// No stop token is drawn before so many other tokens. A form that is complete ends the reply all the same.
    pub min_tokens: usize,
}

impl SamplingParams {
    /// The likeliest token each time, no penalties.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            min_tokens: 0,
        }
    }
}

/// A queued or running request. Dropping it cancels: the engine sees [`mpsc::Sender::is_closed`] on its next step.
#[derive(Debug)]
pub struct Generation {
    /// What the engine reports, ending with exactly one [`GenerationEvent::Finished`] or [`GenerationEvent::Failed`].
    /// A channel that closes without one means that the engine died.
    pub events: mpsc::Receiver<GenerationEvent>,
}

/// Capacity of an event channel for a reply of at most `max_tokens`: the engine's `try_send` can never find it full.
#[must_use]
pub fn event_capacity(max_tokens: usize) -> usize {
    max_tokens
        .saturating_add(3)
        .min(tokio::sync::Semaphore::MAX_PERMITS)
}

/// What happened to a request: at most one `Started`, at most one `Reused`, the tokens, one `Finished` or `Failed`.
#[derive(Debug, Clone, PartialEq)]
pub enum GenerationEvent {
    /// The request has left the queue and its prefill begins. Comes before the first token.
    Started {
        /// Tokens of the prompt whose keys and values came from the prefix cache. (Also in [`Usage`]; known here
        /// already, because a reply that ends at a stop string never sees the engine's own end.)
        cached_tokens: usize,
        /// Where the prompt parts from what is cached, if something like it was and somebody wants to know (debug logs).
        miss: Option<Box<Miss>>,
    },
    /// More of the prompt was cached by the time it was computed than [`Self::Started`] said: others had computed it
    /// meanwhile. At most once, before the first token.
    Reused {
        /// All of the prompt's tokens whose keys and values this request did not compute.
        cached_tokens: usize,
    },
    /// One generated token, never one of the stop tokens.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability, when asked for.
        logprob: Option<TokenLogprobs>,
    },
    /// The reply is complete. Last event.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it used.
        usage: Usage,
    },
    /// The reply cannot be completed. Last event.
    Failed(EngineError),
}

/// A prompt that begins like a cached one and then goes on differently, or that was cached and is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    /// Index of the first token that differs, or is missing.
    pub position: usize,
    /// The tokens before that, a few, which both have.
    pub before: Vec<u32>,
    /// The prompt's tokens from there, a few.
    pub asked: Vec<u32>,
    /// The cached prompt's tokens from there, a few.
    pub cached: Vec<u32>,
    /// It is not that the prompt has changed: what was cached of it has made room for others.
    pub evicted: bool,
}

/// Log-probabilities (natural logarithm, after penalties, bias and constraint, before temperature and truncation) at one
/// position. Under a constraint they are shares of what it allows, and what it forbids is not among them.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the chosen token.
    pub logprob: f32,
    /// Of the likeliest tokens, falling.
    pub top: Vec<(u32, f32)>,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// `max_tokens` or the context length.
    Length,
}

/// Tokens of one request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them whose keys and values came from the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated, the stop token included.
    pub completion_tokens: usize,
}

/// Why a request was not queued.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// It can never run. The client's fault.
    #[error(
        "the prompt has {prompt_tokens} tokens, which leaves no room for a reply in the context length of \
         {context_length} tokens"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Prompt plus reply, at most.
        context_length: usize,
    },
    /// It can never run in the memory set aside; the message has the numbers. The client's fault.
    #[error("{0}")]
    NeverFits(String),
    /// Come back later.
    #[error("{waiting} requests are waiting already, which is the limit")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
        /// A fair guess when there will be room.
        retry_after: Duration,
    },
    /// The engine has been told to stop.
    #[error("the worker is shutting down")]
    Stopped,
    /// The engine is gone, with the reason.
    #[error("the engine has died: {0}")]
    Dead(String),
}

/// Why a queued or running request failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum EngineError {
    /// Something in this request's own step; the engine lives on.
    #[error("generation failed: {0}")]
    Step(String),
    /// This request's constraint; the engine lives on.
    #[error("the reply's form cannot be kept to any longer: {0}")]
    Constraint(String),
    /// Waited for a place longer than the limit, and so did every other sequence of its request.
    #[error("no place became free within {} s", .0.as_secs())]
    WaitedTooLong(Duration),
    /// The engine has been told to stop.
    #[error("the worker is shutting down")]
    Stopped,
    /// The engine died, with the reason; so the process will.
    #[error("the engine has died: {0}")]
    Dead(String),
}

/// Whether the engine lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineState {
    /// Stepping, or waiting for requests.
    Running,
    /// It never will again, for this reason.
    Dead(String),
}

/// What the loaded model is.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// `model_type` of config.json, such as `qwen3_moe`.
    pub architecture: String,
    /// Prompt plus reply, at most, in tokens, after the knobs have had their say.
    pub context_length: usize,
    /// Rows of the embedding: valid ids are below.
    pub vocab_size: usize,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Requests that can run and wait at the same time.
    pub capacity: usize,
    /// Tokens that the KV cache holds.
    pub kv_capacity_tokens: usize,
    /// Bytes of the KV cache.
    pub kv_capacity_bytes: u64,
    /// Effective limits, reported in the `ready` line and at `/status`: free-form numbers by name.
    pub limits: serde_json::Map<String, serde_json::Value>,
}

impl ModelInfo {
    /// Tokens of prompt and reply together that one request may have: the context length, or what the KV cache holds
    /// where that is less.
    #[must_use]
    pub fn most_tokens(&self) -> usize {
        self.context_length.min(self.kv_capacity_tokens)
    }
}

/// Counters and gauges of the engine at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Steps (prefill chunks and decodes) since the start.
    pub steps: u64,
    /// Time since the last step ended; since the start when there was none.
    pub last_step_age: Duration,
    /// Requests in prefill or decode.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// It is within a step, or has one to read, whether or not a request is left that wants it.
    pub busy: bool,
    /// Bytes of keys and values that running requests hold.
    pub kv_used_bytes: u64,
    /// Bytes of those that only the prefix cache holds: they make room.
    pub kv_cached_bytes: u64,
    /// Bytes that MLX has allocated.
    pub active_bytes: u64,
    /// Highest value of `active_bytes` so far.
    pub peak_bytes: u64,
    /// Freed bytes that MLX keeps for reuse.
    pub buffer_cache_bytes: u64,
    /// Prompt tokens computed (not taken from a cache).
    pub prefill_tokens: u64,
    /// Tokens generated.
    pub decode_tokens: u64,
    /// Decode steps that ran on kernels of our own.
    pub kernel_decodes: u64,
    /// Decode steps that ran on the reference path.
    pub reference_decodes: u64,
    /// What the prefix cache was good for.
    pub cache: CacheStats,
    /// Requests that lost their place in the KV cache to older ones, and were computed again later.
    pub preempted: u64,
    /// Constrained decoding.
    pub constraints: ConstraintStats,
}

/// What constraints have cost since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConstraintStats {
    /// Sets of allowed tokens computed, one a token and constrained request.
    pub masks: u64,
    /// Time that took.
    pub mask_time: Duration,
    /// Decode steps that drew only after the tokens before them had been read.
    pub late_draws: u64,
}

/// The prefix cache since the start. A request counts once, however often it had to be computed again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Requests that left the queue.
    pub requests: u64,
    /// Of these, how many found at least a quarter of their prompt cached.
    pub hits: u64,
    /// Tokens of their prompts.
    pub prompt_tokens: u64,
    /// Of these, how many were taken from the cache.
    pub cached_tokens: u64,
    /// Blocks evicted to make room.
    pub evicted_blocks: u64,
    /// Blocks copied, because a request shared only their beginning.
    pub copied_blocks: u64,
    /// Blocks moved, so that sequences are one run.
    pub moved_blocks: u64,
    /// Blocks that two requests had computed at once, one of which was given back.
    pub deduplicated_blocks: u64,
}

impl CacheStats {
    /// Share of the prompts' tokens that was not computed; `None` before the first request.
    #[must_use]
    pub fn hit_rate(&self) -> Option<f64> {
        #[allow(clippy::cast_precision_loss)] // exact up to 2^53 tokens
        (self.prompt_tokens > 0).then(|| self.cached_tokens as f64 / self.prompt_tokens as f64)
    }

    /// Share of the requests that found at least a quarter of their prompt cached; `None` before the first.
    #[must_use]
    pub fn request_hit_rate(&self) -> Option<f64> {
        #[allow(clippy::cast_precision_loss)] // exact up to 2^53 requests
        (self.requests > 0).then(|| self.hits as f64 / self.requests as f64)
    }
}
