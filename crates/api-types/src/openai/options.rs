//! What chat completions and completions have in common.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::constraint::{self, AskedForm};
use super::unsupported;
use crate::error::{ApiError, shown};
use crate::fields::{Fields, mismatch, whole};

/// Most stop strings; OpenAI allows 4.
const MAX_STOPS: usize = 16;
/// Most stop tokens: each token of the reply is compared with them. Those that the model ends with need not be listed.
const MAX_STOP_TOKENS: usize = 64;
/// Most choices of one request.
const MAX_N: i64 = 16;

/// What is smaller keeps the likeliest token only, as this does, until it is nothing in single precision.
const LEAST_TOP_P: f64 = 0.000_001;

/// Sampling as far as the request says. What it leaves out comes from the worker's knobs and the model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sampling {
    /// 0..=2; 0 is greedy.
    pub temperature: Option<f32>,
    /// 0.000001..=1.
    pub top_p: Option<f32>,
    /// Candidates kept; 0 keeps all (`-1` in the request does too).
    pub top_k: Option<usize>,
    /// 0..=1.
    pub min_p: Option<f32>,
    /// 0.01..=10; 1 is none.
    pub repetition_penalty: Option<f32>,
    /// -2..=2.
    pub presence_penalty: Option<f32>,
    /// -2..=2.
    pub frequency_penalty: Option<f32>,
    /// Token id and bias, -100..=100; each id once, in their order.
    pub logit_bias: Vec<(u32, f32)>,
    /// Any 64-bit number; negative ones as their bit pattern.
    pub seed: Option<u64>,
    /// The reply does not end before so many tokens; at most `max_tokens`.
    pub min_tokens: usize,
}

/// Everything that shapes a generation, beside the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationOptions {
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// `max_completion_tokens`, else `max_tokens`.
    pub max_tokens: Option<usize>,
    /// Strings that end the reply and are not part of it.
    pub stop: Vec<String>,
    /// Token ids that end the reply, beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Go on at the model's own end of sequence, as benchmarks do.
    pub ignore_eos: bool,
    /// Longest time to wait: for the whole reply, or in a stream for its next piece.
    pub timeout: Option<Duration>,
    /// Choices.
    pub n: usize,
    /// Answer as server-sent events.
    pub stream: bool,
    /// `stream_options.include_usage`: a last chunk with the usage.
    pub include_usage: bool,
    /// What every reply has to look like.
    pub form: Option<AskedForm>,
}

#[allow(clippy::cast_possible_truncation)] // the model computes in single precision at most
fn single(x: f64) -> f32 {
    x as f32
}

impl GenerationOptions {
    pub(crate) fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let f = &*fields;
        unsupported::refuse(f)?;
        let penalty = |name: &str| f.number(name, "from -2 to 2", |x| (-2.0..=2.0).contains(&x));
        let sampling = Sampling {
            temperature: f
                .number("temperature", "from 0 to 2", |x| (0.0..=2.0).contains(&x))?
                .map(single),
            top_p: f
                .number("top_p", "from 0.000001 to 1", |x| {
                    (LEAST_TOP_P..=1.0).contains(&x)
                })?
                .map(single),
            top_k: f
                .integer("top_k", -1, i64::from(u32::MAX))?
                .map(|k| usize::try_from(k).unwrap_or(0)),
            min_p: f
                .number("min_p", "from 0 to 1", |x| (0.0..=1.0).contains(&x))?
                .map(single),
            repetition_penalty: f
                .number("repetition_penalty", "from 0.01 to 10", |x| {
                    (0.01..=10.0).contains(&x)
                })?
                .map(single),
            presence_penalty: penalty("presence_penalty")?.map(single),
            frequency_penalty: penalty("frequency_penalty")?.map(single),
            logit_bias: logit_bias(f.get("logit_bias"))?,
            seed: match f.get("seed") {
                None => None,
                Some(v) => Some(
                    v.as_u64()
                        .or_else(|| whole(v).map(i64::cast_unsigned))
                        .ok_or_else(|| mismatch("seed", "a whole number", v))?,
                ),
            },
            min_tokens: f
                .integer("min_tokens", 0, i64::MAX)?
                .and_then(|n| usize::try_from(n).ok())
                .unwrap_or(0),
        };
        let tokens = |name: &str| {
            let n = f.integer(name, 1, i64::MAX)?;
            Ok::<_, ApiError>(n.and_then(|n| usize::try_from(n).ok()))
        };
        let legacy = tokens("max_tokens")?;
        let max_tokens = tokens("max_completion_tokens")?.or(legacy);
        if let Some(most) = max_tokens.filter(|most| *most < sampling.min_tokens) {
            let least = sampling.min_tokens;
            return Err(ApiError::invalid(
                "min_tokens",
                format!("is {least}, which is more than max_tokens ({most})"),
            ));
        }
        let n = f
            .integer("n", 1, MAX_N)?
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(1);
        let options = Self {
            sampling,
            max_tokens,
            stop: stop(f.get("stop"))?,
            stop_token_ids: stop_token_ids(f.get("stop_token_ids"))?,
            timeout: f
                .number("timeout", "of seconds from 0.001 to 1000000", |s| {
                    (0.001..=1e6).contains(&s)
                })?
                .map(Duration::from_secs_f64),
            ignore_eos: f.bool("ignore_eos")?.unwrap_or(false),
            n,
            stream: f.bool("stream")?.unwrap_or(false),
            include_usage: include_usage(f.get("stream_options"))?,
            form: constraint::read(f)?,
        };
        Ok(options)
    }
}

/// An array of token ids.
pub(crate) fn token_ids(name: &str, value: &Value) -> Result<Vec<u32>, ApiError> {
    let items = value
        .as_array()
        .ok_or_else(|| mismatch(name, "an array of token ids", value))?;
    items
        .iter()
        .enumerate()
        .map(|(i, item)| {
            whole(item)
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| mismatch(&format!("{name}[{i}]"), "a token id", item))
        })
        .collect()
}

fn stop_token_ids(value: Option<&Value>) -> Result<Vec<u32>, ApiError> {
    let Some(value) = value else {
        return Ok(Vec::new());
    };
    if let Some(count) = value.as_array().map(Vec::len).filter(|n| *n > MAX_STOP_TOKENS) {
        return Err(ApiError::invalid(
            "stop_token_ids",
            format!("has {count} token ids; at most {MAX_STOP_TOKENS} are allowed"),
        ));
    }
    token_ids("stop_token_ids", value)
}

fn include_usage(value: Option<&Value>) -> Result<bool, ApiError> {
    match value {
        None => Ok(false),
        Some(Value::Object(map)) => match map.get("include_usage") {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(mismatch("stream_options.include_usage", "true or false", other)),
        },
        Some(other) => Err(mismatch("stream_options", "an object", other)),
    }
}

fn stop(value: Option<&Value>) -> Result<Vec<String>, ApiError> {
    let texts = match value {
        None => return Ok(Vec::new()),
        Some(Value::String(s)) => vec![s.clone()],
        Some(Value::Array(items)) => items
            .iter()
            .enumerate()
            .map(|(i, item)| match item {
                Value::String(s) => Ok(s.clone()),
                other => Err(mismatch(&format!("stop[{i}]"), "a string", other)),
            })
            .collect::<Result<_, _>>()?,
        Some(other) => return Err(mismatch("stop", "a string or an array of strings", other)),
    };
    if texts.len() > MAX_STOPS {
        return Err(ApiError::invalid(
            "stop",
            format!("has {} strings; at most {MAX_STOPS} are allowed", texts.len()),
        ));
    }
    if texts.iter().any(String::is_empty) {
        return Err(ApiError::invalid(
            "stop",
            "must not hold an empty string, which would end every reply at once",
        ));
    }
    Ok(texts)
}

fn logit_bias(value: Option<&Value>) -> Result<Vec<(u32, f32)>, ApiError> {
    let map = match value {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(other) => {
            return Err(mismatch(
                "logit_bias",
                "an object from token ids to numbers",
                other,
            ));
        }
    };
    let mut biases = BTreeMap::new();
    for (key, bias) in map {
        let id: u32 = key
            .trim()
            .parse()
            .map_err(|_| ApiError::invalid("logit_bias", format!("{key:?} is not a token id")))?;
        let bias = bias
            .as_f64()
            .filter(|b| (-100.0..=100.0).contains(b))
            .ok_or_else(|| {
                ApiError::invalid(
                    format!("logit_bias[{key:?}]"),
                    format!("must be a number from -100 to 100, got {}", shown(bias)),
                )
            })?;
        // "7" and "07" are the same token; the later one counts, as with a repeated key.
        biases.insert(id, single(bias));
    }
    Ok(biases.into_iter().collect())
}
