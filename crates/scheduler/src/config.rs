//! What the scheduler is told at its start.

use std::fmt;
use std::time::Duration;

use kv_cache::CacheConfig;

/// Sizes and limits of one engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The KV cache.
    pub cache: CacheConfig,
    /// Most tokens of prompt and reply together.
    pub context_length: usize,
    /// Most sequences that hold KV at once.
    pub max_running: usize,
    /// Most prompt tokens computed in one step, all sequences together: what a decoding sequence may have to wait for.
    pub prefill_chunk: usize,
    /// Most tokens × context that the prefill of one step may cover, all sequences together, which bounds its time on the
    /// device: Metal ends a command that runs for too long, and who decodes waits for it. A chunk is cut so that
    /// `len × (start + len)` stays within it; one token always may.
    pub step_budget: u64,
    /// Sequences that decode are kept in one run of blocks, by moving what lies in their way: for attention that takes
    /// each run by itself. A kernel that reads block tables has no use for it. Prompts are brought into one run anyway.
    pub compact_decodes: bool,
    /// Longest time in the queue before the first sequence of a request is admitted; `None`: for ever. The others then wait
    /// for as long as it takes.
    pub max_wait: Option<Duration>,
}

impl Config {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let sizes = [
            (self.context_length, "context length"),
            (self.max_running, "number of running sequences"),
            (self.prefill_chunk, "prefill chunk"),
            (usize::from(self.step_budget > 0), "step budget"),
        ];
        match sizes.iter().find(|(size, _)| *size == 0) {
            Some((_, what)) => Err(ConfigError::Zero(what)),
            None => Ok(()),
        }
    }

    /// How many tokens may be drawn for such a request: `max_new_tokens`, or up to the context length.
    pub fn draws(&self, prompt_tokens: usize, max_new_tokens: usize) -> usize {
        max_new_tokens.min(self.context_length.saturating_sub(prompt_tokens))
    }
}

/// Sizes with which nothing could run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// This one is zero.
    Zero(&'static str),
    /// Those of the cache.
    Cache(kv_cache::ConfigError),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zero(what) => write!(f, "the {what} must be at least 1"),
            Self::Cache(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ConfigError {}
