//! `mlxworker bench`: how fast the model itself runs here, to hold a server against.
//!
//! *bare*: the model's own steps, one ahead of their reader, with nothing around them: no scheduler, no text, no HTTP.
//! *engine*: the same through the engine's handle.
//! *constrained*: so, with replies that have to be JSON strings, over a vocabulary made up for it.

use std::time::{Duration, Instant};

use constraint::{Form, Grammars, Opening, Token};
use kv_cache::{BlockId, SeqId};
use mlx_rs::error::Exception;
use serde::Serialize;

use super::places::runs;
use super::sampler::Sampler;
use super::start;
use super::stepper::{DecodeRow, Fault, FirstDraw, Stepper};
use super::{Engine, EngineConfig, StartError};
use crate::backend::{Backend, Constrained, GenerateRequest, GenerationEvent, SamplingParams};

/// What to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// Sequences stepped together.
    pub streams: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens generated for each.
    pub tokens: usize,
    /// Rounds that do not count, before those that do: pages are touched and buffers kept after them, as in a server
    /// that has answered before.
    pub warmup: usize,
    /// Measured so often; the best counts.
    pub rounds: usize,
    /// Of the prompts: others for another.
    pub seed: u64,
}

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// `bare`, `engine` or `constrained`.
    pub path: &'static str,
    /// Sequences stepped together.
    pub streams: usize,
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Tokens generated for each.
    pub tokens: usize,
    /// Rounds that did not count.
    pub warmup: usize,
    /// Rounds of which the best is told.
    pub rounds: usize,
    /// How tokens were chosen: the temperature, and the penalties for presence, frequency and repetition.
    pub temperature: f32,
    /// See `temperature`.
    pub presence_penalty: f32,
    /// See `temperature`.
    pub frequency_penalty: f32,
    /// See `temperature`.
    pub repetition_penalty: f32,
    /// Tokens of all streams together, a second, after each stream's first token.
    pub tokens_per_second: f64,
    /// Milliseconds from one token of a stream to its next.
    pub step_ms: f64,
    /// Milliseconds of them in which the host builds and issues the step; the rest is waiting for the device. Bare only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_ms: Option<f64>,
    /// Prompt tokens a second, until every stream has its first token.
    pub prefill_tokens_per_second: f64,
    /// Most bytes that MLX held at once.
    pub peak_bytes: usize,
    /// What the worker reports of its limits.
    pub limits: serde_json::Map<String, serde_json::Value>,
}

fn failed(error: &Exception) -> StartError {
    StartError::WarmUp(error.what().to_owned())
}

/// Different tokens for each stream and round, the same in every run with a seed.
fn prompt(wish: Wish, stream: usize, round: usize, vocab: usize) -> Vec<u32> {
    let (seed, length) = ((round * 1000 + stream) as u64, wish.prompt_tokens);
    // Any large odd number: seeds of neighbours have no streams in common.
    let seed = seed.wrapping_add(wish.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut random = fastrand::Rng::with_seed(seed);
    let most = u32::try_from(vocab).unwrap_or(u32::MAX).max(2);
    (0..length).map(|_| random.u32(1..most)).collect()
}

/// How long the parts of a round took.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// Until all first tokens were there.
    prefill: Duration,
    /// From there to the last token.
    decode: Duration,
    /// Of that, what the host needed to issue the steps.
    host: Option<Duration>,
}

impl Times {
    /// The best of each, of this round and those before.
    fn best(self, before: Option<Self>) -> Self {
        before.map_or(self, |before| Self {
            prefill: before.prefill.min(self.prefill),
            decode: before.decode.min(self.decode),
            host: self.host.min(before.host),
        })
    }
}

fn figures(
    path: &'static str,
    wish: Wish,
    sampling: &SamplingParams,
    times: Times,
    limits: serde_json::Map<String, serde_json::Value>,
) -> Figures {
    let Times {
        prefill,
        decode,
        host,
    } = times;
    let steps = wish.tokens.saturating_sub(1).max(1) as f64;
    let streams = wish.streams as f64;
    Figures {
        path,
        streams: wish.streams,
        prompt_tokens: wish.prompt_tokens,
        tokens: wish.tokens,
        warmup: wish.warmup,
        rounds: wish.rounds,
        temperature: sampling.temperature,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        repetition_penalty: sampling.repetition_penalty,
        tokens_per_second: streams * steps / decode.as_secs_f64(),
        step_ms: decode.as_secs_f64() * 1e3 / steps,
        host_ms: host.map(|host| host.as_secs_f64() * 1e3 / steps),
        prefill_tokens_per_second: streams * wish.prompt_tokens as f64 / prefill.as_secs_f64(),
        peak_bytes: mlx_rs::memory::peak_memory().unwrap_or_default(),
        limits,
    }
}

/// The model's own steps, for each wish after the other with the model loaded once. Every stream draws as `sampling`
/// says.
///
/// # Errors
///
/// The model cannot be loaded or run.
pub fn bare(
    config: EngineConfig,
    wishes: &[Wish],
    sampling: &SamplingParams,
) -> Result<Vec<Figures>, StartError> {
    let (block_size, chunk) = (config.block_size, config.prefill_chunk);
    let (parts, info) = start::start(config, &mut |_| {})?;
    let mut stepper = parts.stepper;
    let mut all = Vec::with_capacity(wishes.len());
    for &wish in wishes {
        let each = (wish.prompt_tokens + wish.tokens + 1).div_ceil(block_size);
        if each * wish.streams * block_size > info.kv_capacity_tokens {
            return Err(StartError::WarmUp(format!(
                "{} streams of {} tokens do not fit into the KV cache of {} tokens (--cache-memory-mb)",
                wish.streams,
                wish.prompt_tokens + wish.tokens,
                info.kv_capacity_tokens
            )));
        }
        mlx_rs::memory::reset_peak_memory().map_err(|error| failed(&error))?;
        let mut best: Option<Times> = None;
        for round in 0..wish.warmup + wish.rounds.max(1) {
            let prompts: Vec<Vec<u32>> = (0..wish.streams)
                .map(|stream| prompt(wish, stream, round, info.vocab_size))
                .collect();
            let times = run(&mut stepper, &prompts, wish.tokens, (block_size, chunk), sampling)
                .map_err(|fault| failed(&fault.into()))?;
            stepper.clear();
            if round >= wish.warmup {
                best = Some(times.best(best));
            }
        }
        let best = best.ok_or_else(|| StartError::WarmUp("no rounds".to_owned()))?;
        all.push(figures("bare", wish, sampling, best, info.limits.clone()));
    }
    Ok(all)
}

/// One round: time until all first tokens are there, and from there to the last.
fn run(
    stepper: &mut Stepper,
    prompts: &[Vec<u32>],
    tokens: usize,
    (block_size, chunk): (usize, usize),
    sampling: &SamplingParams,
) -> Result<Times, Fault> {
    let length = prompts.first().map_or(0, Vec::len);
    let each = (length + tokens + 1).div_ceil(block_size);
    let tables: Vec<Vec<BlockId>> = (0..prompts.len())
        .map(|row| {
            (row * each..(row + 1) * each)
                .filter_map(|block| u32::try_from(block).ok().map(BlockId))
                .collect()
        })
        .collect();
    let mut samplers: Vec<Sampler> = prompts
        .iter()
        .map(|prompt| Sampler::new(sampling.clone(), prompt, None))
        .collect();
    let started = Instant::now();
    stepper.begin();
    for (((row, prompt), table), sampler) in (0..).zip(prompts).zip(&tables).zip(&mut samplers) {
        for (start, tokens) in (0..).step_by(chunk).zip(prompt.chunks(chunk)) {
            let last = start + tokens.len() == prompt.len();
            let draw = last.then(|| FirstDraw::new(sampler));
            let runs = runs(table, block_size, start, tokens.len());
            stepper.prefill(SeqId(row), tokens, start, &runs, table, draw)?;
        }
    }
    let mut first = None;
    let mut host = Duration::ZERO;
    for step in 1..tokens {
        let issuing = Instant::now();
        stepper.begin();
        let position = length + step - 1;
        let rows: Vec<DecodeRow<'_>> = (0..)
            .zip(&tables)
            .filter_map(|(row, table)| {
                Some(DecodeRow {
                    id: SeqId(row),
                    position,
                    slot: (*table.get(position / block_size)?, position % block_size),
                    table,
                    allowed: None,
                })
            })
            .collect();
        let mut samplers: Vec<&mut Sampler> = samplers.iter_mut().collect();
        stepper.decode(&rows, &mut samplers)?;
        if first.is_some() {
            host += issuing.elapsed();
        }
        stepper.read()?;
        first.get_or_insert_with(Instant::now);
    }
    stepper.begin();
    stepper.read()?;
    let first = first.unwrap_or_else(Instant::now);
    Ok(Times {
        prefill: first - started,
        decode: first.elapsed(),
        host: Some(host),
    })
}

/// A form whose texts are longer than any reply. The model's own tokens do not matter here, but how many there are.
fn unending(vocab: usize) -> Result<Constrained, StartError> {
    let failed = |error: String| StartError::WarmUp(error);
    // The quote, and a word for every other token.
    let word = |id: usize| match id {
        0 => "\"".to_owned(),
        id => format!("{id:x}").replace(|c: char| c.is_ascii_digit(), "g"),
    };
    let words: Vec<String> = (0..vocab).map(word).collect();
    let tokens = words.iter().map(|word| Token::Text(word.as_bytes()));
    let grammars = Grammars::new(tokens).map_err(|error| failed(error.to_string()))?;
    let schema = serde_json::json!({"type": "string", "minLength": 1_000_000});
    let form = grammars.compile(&Form::JsonSchema(schema));
    Ok(Constrained {
        form: form.map_err(|error| failed(error.to_string()))?,
        opening: Opening::default(),
    })
}

/// Through the engine's handle, as the HTTP layer uses it; with `constrained`, every reply under a constraint.
///
/// # Errors
///
/// The model cannot be loaded or run.
pub async fn engine(
    config: EngineConfig,
    wish: Wish,
    sampling: &SamplingParams,
    constrained: bool,
) -> Result<Figures, StartError> {
    let engine = Engine::start(config, |_| {}).await?;
    let vocab = engine.info().vocab_size;
    let constraint = if constrained { Some(unending(vocab)?) } else { None };
    let mut best: Option<Times> = None;
    for round in 0..wish.warmup + wish.rounds.max(1) {
        let started = Instant::now();
        let mut generations = Vec::new();
        for stream in 0..wish.streams {
            let request = GenerateRequest {
                prompt: prompt(wish, stream, round, vocab),
                max_tokens: wish.tokens,
                sampling: sampling.clone(),
                stop_tokens: Vec::new(),
                logprobs: None,
                constraint: constraint.clone(),
            };
            let generation = engine.submit(request);
            generations.push(generation.map_err(|error| StartError::WarmUp(error.to_string()))?);
        }
        let mut first: Option<Instant> = None;
        // Every channel has room for a whole reply: reading one after the other holds nobody up.
        for generation in &mut generations {
            while let Some(event) = generation.events.recv().await {
                match event {
                    GenerationEvent::Started { .. } | GenerationEvent::Reused { .. } => {}
                    GenerationEvent::Token { .. } => break,
                    other => return Err(StartError::WarmUp(format!("{other:?}"))),
                }
            }
            first = Some(Instant::now());
        }
        for generation in &mut generations {
            while let Some(event) = generation.events.recv().await {
                if let GenerationEvent::Failed(error) = event {
                    return Err(StartError::WarmUp(error.to_string()));
                }
            }
        }
        let first = first.unwrap_or(started);
        let times = Times {
            prefill: first - started,
            decode: first.elapsed(),
            host: None,
        };
        if round >= wish.warmup {
            best = Some(times.best(best));
        }
    }
    let best = best.ok_or_else(|| StartError::WarmUp("no rounds".to_owned()))?;
    let path = if constrained { "constrained" } else { "engine" };
    let mut limits = engine.info().limits.clone();
    let stats = engine.stats().constraints;
    if stats.masks > 0 {
        let micros = stats.mask_time.as_secs_f64() * 1e6 / stats.masks as f64;
        limits.insert("mask_micros".to_owned(), micros.into());
    }
    Ok(figures(path, wish, sampling, best, limits))
}
