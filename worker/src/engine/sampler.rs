//! Chooses tokens, on the device, for all rows of a step at once. What belongs to a request stays with its row: no
//! parameter, count or random number of one row has a part in another's.

use std::hash::{BuildHasher, Hasher, RandomState};

use mlx_ext::ops::{for_host, slice};
use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::{argmax_axis, take_along_axis};
use mlx_rs::{Array, ops};

use crate::backend::{SamplingParams, TokenLogprobs};

/// Below this temperature a draw is greedy: dividing by less would overflow.
const COLDEST: f32 = 1e-5;

/// A repetition penalty of less would make scores infinite.
const SMALLEST_DIVISOR: f32 = 1e-6;

/// One request's choices.
#[derive(Debug)]
pub(super) struct Sampler {
    params: SamplingParams,
    /// `None` for greedy ones.
    random: Option<fastrand::Rng>,
    /// How many of the likeliest tokens to report.
    logprobs: Option<usize>,
    /// Tokens of the prompt, when the repetition penalty needs them.
    prompt: Vec<u32>,
}

/// What earlier draws leave for the penalties of later ones, one row a request. `None`: no row needs it.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    /// How often each reply has each token: `[rows, vocab]`, floats.
    counts: Option<Array>,
    /// 1 for each token in prompt or reply: `[rows, vocab]`, floats.
    seen: Option<Array>,
}

/// The parameters of several rows as arrays, built once for as long as the same rows are stepped together.
#[derive(Debug)]
pub(super) struct Parameters {
    rows: i32,
    vocab: i32,
    /// `[rows, vocab]`.
    bias: Option<Array>,
    /// `[rows, 1]` each: frequency and presence.
    penalties: Option<(Array, Array)>,
    /// `[rows, 1]`.
    repetition: Option<Array>,
    random: Option<Random>,
    /// `[1, vocab]`: the token ids.
    ids: Option<Array>,
    logprobs: Vec<Option<i32>>,
}

/// Of the rows that are not greedy; greedy ones get values that do no harm.
#[derive(Debug)]
struct Random {
    /// True for greedy rows: `[rows, 1]`. `None`: there are none.
    greedy: Option<Array>,
    /// `[rows, 1]`.
    temperature: Array,
    /// `[rows, 1]`, integers; at most `candidates`.
    top_k: Option<Array>,
    /// Only so many of the likeliest are looked at, when every row says so.
    candidates: Option<i32>,
    /// `[rows, 1]`.
    top_p: Option<Array>,
    /// Logarithms: `[rows, 1]`.
    min_p: Option<Array>,
}

/// One draw for each row, still on the device.
#[derive(Debug)]
pub(super) struct Draw {
    /// The tokens: `[rows]`, unsigned. For the device: the next step may still wait for its turn to read them when the host
    /// does.
    pub(super) tokens: Array,
    /// The same for the host.
    told: Array,
    /// For each row that wants them.
    pub(super) logprobs: Vec<Option<DrawnLogprobs>>,
}

/// Log-probabilities at one position, still on the device.
#[derive(Debug)]
pub(super) struct DrawnLogprobs {
    /// Of the drawn token: `[1, 1]`.
    pub(super) own: Array,
    /// Ids and log-probabilities of the likeliest, falling, `[1, k]` each; `None` when none were asked for.
    pub(super) top: Option<(Array, Array)>,
}

impl Draw {
    /// All arrays, to be evaluated together.
    pub(super) fn arrays(&self) -> impl Iterator<Item = &Array> {
        let logprobs = self.logprobs.iter().flatten();
        [&self.tokens, &self.told]
            .into_iter()
            .chain(logprobs.flat_map(|logprobs| {
                let top = logprobs.top.iter();
                std::iter::once(&logprobs.own).chain(top.flat_map(|(ids, values)| [ids, values]))
            }))
    }

    /// Waits for the tokens.
    pub(super) fn read(&self) -> Result<Vec<u32>> {
        self.told.to_vec_cast().map_err(|error| conversion(&error))
    }
}

impl DrawnLogprobs {
    /// Waits for them.
    pub(super) fn read(&self) -> Result<TokenLogprobs> {
        let own = self.own.try_item_cast::<f32>();
        let logprob = own.map_err(|error| conversion(&error))?;
        let top = match &self.top {
            None => Vec::new(),
            Some((ids, values)) => {
                let ids = ids.to_vec_cast::<u32>().map_err(|error| conversion(&error))?;
                let values = values.to_vec_cast::<f32>().map_err(|error| conversion(&error))?;
                // What a constraint forbids has none.
                let known = |(_, value): &(u32, f32)| *value > f32::NEG_INFINITY;
                ids.into_iter().zip(values).filter(known).collect()
            }
        };
        Ok(TokenLogprobs { logprob, top })
    }
}

pub(super) fn conversion(error: &mlx_rs::error::ConversionError) -> Exception {
    Exception::custom(error.to_string())
}

impl Sampler {
    /// For a request with that prompt.
    pub(super) fn new(params: SamplingParams, prompt: &[u32], logprobs: Option<usize>) -> Self {
        let random = (params.temperature >= COLDEST).then(|| {
            let seed = params.seed;
            fastrand::Rng::with_seed(seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()))
        });
        let prompt = if params.repetition_penalty == 1.0 {
            Vec::new()
        } else {
            prompt.to_vec()
        };
        Self {
            params,
            random,
            logprobs,
            prompt,
        }
    }

    /// Where its random numbers are, to draw the same ones again.
    pub(super) fn generator(&self) -> Option<fastrand::Rng> {
        self.random.clone()
    }

    pub(super) fn set_generator(&mut self, generator: Option<fastrand::Rng>) {
        self.random = generator;
    }

    fn counts(&self) -> bool {
        self.params.presence_penalty != 0.0 || self.params.frequency_penalty != 0.0
    }

    fn repeats(&self) -> bool {
        self.params.repetition_penalty != 1.0
    }

    /// What it starts with, one row.
    pub(super) fn history(&self, vocab: i32) -> History {
        History {
            counts: self.counts().then(|| dense(std::iter::empty(), vocab)),
            seen: self
                .repeats()
                .then(|| dense(self.prompt.iter().map(|&id| (id, 1.0)), vocab)),
        }
    }
}

fn dense(entries: impl Iterator<Item = (u32, f32)>, vocab: i32) -> Array {
    let mut row = vec![0.0_f32; usize::try_from(vocab).unwrap_or_default()];
    for (id, value) in entries {
        if let Some(place) = row.get_mut(usize::try_from(id).unwrap_or(usize::MAX)) {
            *place = value;
        }
    }
    Array::from_slice(&row, &[1, vocab])
}

impl History {
    /// Row `row` alone.
    pub(super) fn row(&self, row: i32) -> Result<Self> {
        let one = |array: &Option<Array>| {
            let array = array.as_ref();
            array
                .map(|array| slice(array, &[row, 0], &[row + 1, array.dim(1)]))
                .transpose()
        };
        Ok(Self {
            counts: one(&self.counts)?,
            seen: one(&self.seen)?,
        })
    }

    /// Several single rows, one below the other.
    pub(super) fn join(rows: &[Self], vocab: i32) -> Result<Self> {
        let all = |part: fn(&Self) -> &Option<Array>| {
            if rows.iter().all(|row| part(row).is_none()) {
                return Ok(None);
            }
            let empty = dense(std::iter::empty(), vocab);
            let arrays: Vec<&Array> = rows
                .iter()
                .map(|row| part(row).as_ref().unwrap_or(&empty))
                .collect();
            ops::concatenate(&arrays, 0).map(Some)
        };
        Ok(Self {
            counts: all(|row| &row.counts)?,
            seen: all(|row| &row.seen)?,
        })
    }

    pub(super) fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.counts.iter().chain(&self.seen)
    }

    fn add(&mut self, tokens: &Array, ids: &Array) -> Result<()> {
        let hit = ids.eq(&tokens.expand_dims(-1)?)?.as_type::<f32>()?;
        if let Some(counts) = self.counts.take() {
            self.counts = Some(counts.add(&hit)?);
        }
        if let Some(seen) = self.seen.take() {
            self.seen = Some(ops::maximum(seen, &hit)?);
        }
        Ok(())
    }
}

impl Parameters {
    /// Of rows over `vocab` tokens.
    pub(super) fn new(samplers: &[&Sampler], vocab: i32) -> Result<Self> {
        let rows = i32::try_from(samplers.len()).unwrap_or(i32::MAX);
        let column = |value: &dyn Fn(&SamplingParams) -> f32| {
            let values: Vec<f32> = samplers.iter().map(|sampler| value(&sampler.params)).collect();
            Array::from_slice(&values, &[rows, 1])
        };
        let any = |test: &dyn Fn(&Sampler) -> bool| samplers.iter().any(|sampler| test(sampler));
        let bias = if any(&|sampler| !sampler.params.logit_bias.is_empty()) {
            let rows: Vec<Array> = samplers
                .iter()
                .map(|sampler| dense(sampler.params.logit_bias.iter().copied(), vocab))
                .collect();
            Some(ops::concatenate(&rows, 0)?)
        } else {
            None
        };
        let history = any(&|sampler| sampler.counts() || sampler.repeats());
        Ok(Self {
            rows,
            vocab,
            bias,
            penalties: any(&Sampler::counts).then(|| {
                (
                    column(&|params| params.frequency_penalty),
                    column(&|params| params.presence_penalty),
                )
            }),
            repetition: any(&Sampler::repeats)
                .then(|| column(&|params| params.repetition_penalty.max(SMALLEST_DIVISOR))),
            random: any(&|sampler| sampler.random.is_some()).then(|| Random::new(samplers, rows, vocab)),
            ids: if history {
                Some(ops::arange::<_, u32>(None, vocab, None)?.reshape(&[1, vocab])?)
            } else {
                None
            },
            logprobs: samplers
                .iter()
                .map(|sampler| sampler.logprobs.map(|count| i32::try_from(count).unwrap_or(0)))
                .collect(),
        })
    }

    /// One number a row and draw, from the row's own generator: a seed means the same in any company. `samplers` are those it was
    /// made of. `None`: all are greedy.
    pub(super) fn numbers<'a>(&self, samplers: impl Iterator<Item = &'a mut Sampler>) -> Option<Array> {
        self.random.as_ref()?;
        let numbers: Vec<f32> = samplers
            .map(|sampler| sampler.random.as_mut().map_or(0.0, fastrand::Rng::f32))
            .collect();
        Some(Array::from_slice(&numbers, &[self.rows, 1]))
    }

    /// Draws the next token of every row from `logits`, `[rows, vocab]`, with the step's [`Self::numbers`]. `allowed`: true for the
    /// tokens that may be drawn, `[rows, vocab]`.
    pub(super) fn draw(
        &self,
        logits: &Array,
        numbers: Option<&Array>,
        history: &mut History,
        allowed: Option<&Array>,
    ) -> Result<Draw> {
        let mut logits = self.adjust(logits, history)?;
        if let Some(allowed) = allowed {
            let never = Array::from_f32(f32::NEG_INFINITY);
            logits = ops::select(allowed, logits, never)?;
        }
        let likeliest_token = |logits: &Array| argmax_axis(logits, -1, true);
        let tokens = match (&self.random, numbers) {
            (None, _) | (_, None) => likeliest_token(&logits)?,
            (Some(random), Some(numbers)) => {
                let drawn = random.draw(&logits, numbers, self.vocab)?;
                match &random.greedy {
                    None => drawn,
                    Some(greedy) => ops::select(greedy, likeliest_token(&logits)?, drawn)?,
                }
            }
        };
        let mut logprobs = Vec::with_capacity(self.logprobs.len());
        for (row, count) in (0..).zip(&self.logprobs) {
            logprobs.push(match count {
                None => None,
                Some(count) => {
                    let scores = slice(&logits, &[row, 0], &[row + 1, self.vocab])?;
                    let token = slice(&tokens, &[row, 0], &[row + 1, 1])?;
                    Some(likeliest(&scores, &token, *count, self.vocab)?)
                }
            });
        }
        let tokens = tokens.reshape(&[self.rows])?;
        if let Some(ids) = &self.ids {
            history.add(&tokens, ids)?;
        }
        let told = for_host(&tokens)?;
        Ok(Draw {
            tokens,
            told,
            logprobs,
        })
    }

    /// Bias and penalties.
    fn adjust(&self, logits: &Array, history: &History) -> Result<Array> {
        let mut logits = if self.random.is_some() || self.ids.is_some() || self.bias.is_some() {
            logits.as_type::<f32>()?
        } else {
            logits.clone()
        };
        if let Some(bias) = &self.bias {
            logits = logits.add(bias)?;
        }
        if let (Some(penalty), Some(seen)) = (&self.repetition, &history.seen) {
            let zero = Array::from_f32(0.0);
            let lowered = ops::select(
                logits.gt(&zero)?,
                logits.divide(penalty)?,
                logits.multiply(penalty)?,
            )?;
            logits = ops::select(seen.gt(&zero)?, lowered, logits)?;
        }
        if let (Some((frequency, presence)), Some(counts)) = (&self.penalties, &history.counts) {
            let present = counts.gt(Array::from_f32(0.0))?.as_type::<f32>()?;
            logits = logits
                .subtract(counts.multiply(frequency)?)?
                .subtract(present.multiply(presence)?)?;
        }
        Ok(logits)
    }
}

impl Random {
    fn new(samplers: &[&Sampler], rows: i32, vocab: i32) -> Self {
        let hot = |sampler: &&Sampler| sampler.random.is_some();
        let column = |value: &dyn Fn(&SamplingParams) -> f32, idle: f32| {
            let values: Vec<f32> = samplers
                .iter()
                .map(|sampler| {
                    if hot(sampler) {
                        value(&sampler.params)
                    } else {
                        idle
                    }
                })
                .collect();
            Array::from_slice(&values, &[rows, 1])
        };
        let any = |test: &dyn Fn(&SamplingParams) -> bool| {
            samplers
                .iter()
                .filter(|sampler| hot(sampler))
                .any(|sampler| test(&sampler.params))
        };
        let greedy: Vec<bool> = samplers.iter().map(|sampler| !hot(sampler)).collect();
        let limit = |params: &SamplingParams| match i32::try_from(params.top_k).unwrap_or(i32::MAX) {
            0 => vocab,
            some => some.min(vocab),
        };
        let limits: Vec<i32> = samplers
            .iter()
            .map(|sampler| if hot(sampler) { limit(&sampler.params) } else { 1 })
            .collect();
        let most = limits.iter().copied().max().unwrap_or(vocab);
        Self {
            greedy: greedy
                .contains(&true)
                .then(|| Array::from_slice(&greedy, &[rows, 1])),
            temperature: column(&|params| params.temperature, 1.0),
            top_k: limits
                .iter()
                .any(|&limit| limit < most)
                .then(|| Array::from_slice(&limits, &[rows, 1])),
            candidates: (most < vocab).then_some(most),
            top_p: any(&|params| params.top_p < 1.0).then(|| column(&|params| params.top_p, 1.0)),
            min_p: any(&|params| params.min_p > 0.0)
                .then(|| column(&|params| params.min_p.ln(), f32::NEG_INFINITY)),
        }
    }

    /// Temperature, then top-k, top-p and min-p; then the token in whose share of the mass the row's number falls.
    /// `numbers`: `[rows, 1]`, in `0..1`. Returns `[rows, 1]`.
    fn draw(&self, logits: &Array, numbers: &Array, vocab: i32) -> Result<Array> {
        let logits = logits.divide(&self.temperature)?;
        let rows = logits.dim(0);
        let unlikely = Array::from_f32(f32::NEG_INFINITY);
        // In falling order, so that whatever is kept is a prefix. With top-k only the candidates are sorted.
        let candidates = match self.candidates {
            Some(most) => {
                let split = ops::argpartition_axis(&logits, -most, -1)?;
                Some(slice(&split, &[0, vocab - most], &[rows, vocab])?)
            }
            None => None,
        };
        let scores = match &candidates {
            Some(ids) => take_along_axis(&logits, ids, -1)?,
            None => logits,
        };
        let order = ops::argsort_axis(scores.negative()?, -1)?;
        let mut sorted = take_along_axis(&scores, &order, -1)?;
        let ids = match candidates {
            Some(ids) => take_along_axis(&ids, &order, -1)?,
            None => order,
        };
        let width = sorted.dim(1);
        if let Some(top_k) = &self.top_k {
            let rank = ops::arange::<_, i32>(None, width, None)?.reshape(&[1, width])?;
            sorted = ops::select(rank.lt(top_k)?, sorted, &unlikely)?;
        }
        let nothing = Array::from_f32(0.0);
        let mut shares = ops::softmax_axis(&sorted, -1, true)?;
        if let Some(top_p) = &self.top_p {
            // Mass of those before: the first token that reaches the nucleus still belongs to it.
            let before = shares.cumsum(-1, None, false)?;
            shares = ops::select(before.lt(top_p)?, &shares, &nothing)?;
        }
        if let Some(min_p) = &self.min_p {
            let floor = slice(&sorted, &[0, 0], &[rows, 1])?.add(min_p)?;
            shares = ops::select(sorted.lt(floor)?, &nothing, &shares)?;
        }
        let mass = shares.cumsum(-1, None, true)?;
        let total = slice(&mass, &[0, width - 1], &[rows, width])?;
        let target = numbers.multiply(&total)?;
        // Those whose mass ends at or below the number come before it; rounding must not lead past what is kept.
        let before = mass.le(&target)?.as_type::<i32>()?.sum_axis(-1, true)?;
        let kept = shares.gt(&nothing)?.as_type::<i32>()?.sum_axis(-1, true)?;
        // The likeliest is kept, whatever the parameters say.
        let last = ops::maximum(kept.subtract(Array::from_int(1))?, Array::from_int(0))?;
        take_along_axis(&ids, &ops::minimum(&before, &last)?, -1)
    }
}

/// Log-probability of the drawn token, and the `count` likeliest with theirs.
fn likeliest(logits: &Array, token: &Array, count: i32, vocab: i32) -> Result<DrawnLogprobs> {
    let logits = logits.as_type::<f32>()?;
    let logprobs = logits.subtract(logits.logsumexp_axis(-1, true)?)?;
    let own = take_along_axis(&logprobs, token, -1)?;
    let count = count.min(vocab);
    if count == 0 {
        return Ok(DrawnLogprobs { own, top: None });
    }
    let split = ops::argpartition_axis(&logprobs, -count, -1)?;
    let top = slice(&split, &[0, vocab - count], &[1, vocab])?;
    let order = ops::argsort_axis(take_along_axis(&logprobs, &top, -1)?.negative()?, -1)?;
    let ids = take_along_axis(&top, &order, -1)?;
    let values = take_along_axis(&logprobs, &ids, -1)?;
    Ok(DrawnLogprobs {
        own,
        top: Some((ids, values)),
    })
}

#[cfg(test)]
mod tests;
