//! Chooses tokens, on the device. Each request owns one: nothing here is shared between requests.

use std::hash::{BuildHasher, Hasher, RandomState};

use mlx_ext::ops::slice;
use mlx_rs::error::Result;
use mlx_rs::ops::indexing::{argmax_axis, take_along_axis};
use mlx_rs::{Array, ops, random};

use crate::backend::SamplingParams;

/// Below this temperature a draw is greedy: dividing by less would overflow.
const COLDEST: f32 = 1e-5;

/// State of one request's choices.
#[derive(Debug)]
pub(super) struct Sampler {
    params: SamplingParams,
    vocab: i32,
    /// Split at every draw.
    key: Option<Array>,
    /// Added to the logits: `[1, vocab]`.
    bias: Option<Array>,
    /// How often the reply has each token: `[1, vocab]`, floats. Kept when a penalty needs it.
    counts: Option<Array>,
    /// 1 for each token in prompt or reply: `[1, vocab]`, floats. Kept when the repetition penalty needs it.
    seen: Option<Array>,
    /// How many of the likeliest tokens to report.
    logprobs: Option<usize>,
}

/// What one draw gives, still on the device.
#[derive(Debug)]
pub(super) struct Draw {
    /// The token: `[1, 1]`, unsigned.
    pub(super) token: Array,
    pub(super) logprobs: Option<DrawnLogprobs>,
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
        let logprobs = self.logprobs.as_ref();
        let top = logprobs.and_then(|logprobs| logprobs.top.as_ref());
        std::iter::once(&self.token)
            .chain(logprobs.map(|logprobs| &logprobs.own))
            .chain(top.into_iter().flat_map(|(ids, values)| [ids, values]))
    }
}

impl Sampler {
    /// For a request with that prompt, over `vocab` tokens.
    pub(super) fn new(
        params: SamplingParams,
        prompt: &[u32],
        vocab: i32,
        logprobs: Option<usize>,
    ) -> Result<Self> {
        let dense = |entries: &mut dyn Iterator<Item = (u32, f32)>| {
            let mut row = vec![0.0_f32; usize::try_from(vocab).unwrap_or_default()];
            for (id, value) in entries {
                if let Some(place) = row.get_mut(usize::try_from(id).unwrap_or(usize::MAX)) {
                    *place = value;
                }
            }
            Array::from_slice(&row, &[1, vocab])
        };
        let bias = (!params.logit_bias.is_empty()).then(|| dense(&mut params.logit_bias.iter().copied()));
        let seen = (params.repetition_penalty != 1.0).then(|| dense(&mut prompt.iter().map(|&id| (id, 1.0))));
        let counted = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let counts = counted.then(|| dense(&mut std::iter::empty()));
        let key = if params.temperature >= COLDEST {
            let seed = params
                .seed
                .unwrap_or_else(|| RandomState::new().build_hasher().finish());
            Some(random::key(seed)?)
        } else {
            None
        };
        Ok(Self {
            params,
            vocab,
            key,
            bias,
            counts,
            seen,
            logprobs,
        })
    }

    /// Draws the next token from `logits`, `[1, vocab]`.
    pub(super) fn draw(&mut self, logits: &Array) -> Result<Draw> {
        let logits = self.adjust(&logits.as_type::<f32>()?)?;
        let token = match self.key.take() {
            None => argmax_axis(&logits, -1, true)?,
            Some(key) => {
                let (next, now) = random::split(&key, 2)?;
                self.key = Some(next);
                self.random(&logits, &now)?
            }
        };
        let logprobs = match self.logprobs {
            None => None,
            Some(count) => Some(likeliest(
                &logits,
                &token,
                i32::try_from(count).unwrap_or(0),
                self.vocab,
            )?),
        };
        self.remember(&token)?;
        Ok(Draw { token, logprobs })
    }

    /// Bias and penalties.
    fn adjust(&self, logits: &Array) -> Result<Array> {
        let mut logits = logits.clone();
        if let Some(bias) = &self.bias {
            logits = logits.add(bias)?;
        }
        if let Some(seen) = &self.seen {
            let penalty = Array::from_f32(self.params.repetition_penalty);
            let zero = Array::from_f32(0.0);
            let lowered = ops::select(
                logits.gt(&zero)?,
                logits.divide(&penalty)?,
                logits.multiply(&penalty)?,
            )?;
            logits = ops::select(seen.gt(&zero)?, lowered, logits)?;
        }
        if let Some(counts) = &self.counts {
            let present = counts.gt(Array::from_f32(0.0))?.as_type::<f32>()?;
            logits = logits
                .subtract(counts.multiply(Array::from_f32(self.params.frequency_penalty))?)?
                .subtract(present.multiply(Array::from_f32(self.params.presence_penalty))?)?;
        }
        Ok(logits)
    }

    /// Temperature, then top-k, top-p and min-p, then a draw.
    fn random(&self, logits: &Array, key: &Array) -> Result<Array> {
        let params = &self.params;
        let logits = logits.divide(Array::from_f32(params.temperature))?;
        let top_k = i32::try_from(params.top_k).unwrap_or(i32::MAX);
        let few = top_k > 0 && top_k < self.vocab;
        if !few && params.top_p >= 1.0 {
            let kept = keep_min_p(&logits, params.min_p)?;
            return random::categorical(&kept, -1, None, key)?.reshape(&[1, 1]);
        }
        // Candidates in falling order, so that the nucleus is a prefix. With top-k only those k are sorted.
        let candidates = if few {
            let split = ops::argpartition_axis(&logits, -top_k, -1)?;
            Some(slice(&split, &[0, self.vocab - top_k], &[1, self.vocab])?)
        } else {
            None
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
        if params.top_p < 1.0 {
            let shares = ops::softmax_axis(&sorted, -1, true)?;
            // Mass of those before: the first token that reaches the nucleus still belongs to it.
            let before = shares.cumsum(-1, None, false)?;
            let inside = before.lt(Array::from_f32(params.top_p))?;
            sorted = ops::select(inside, sorted, Array::from_f32(f32::NEG_INFINITY))?;
        }
        let kept = keep_min_p(&sorted, params.min_p)?;
        let place = random::categorical(&kept, -1, None, key)?.reshape(&[1, 1])?;
        take_along_axis(&ids, &place, -1)
    }

    /// Counts the drawn token for later penalties.
    fn remember(&mut self, token: &Array) -> Result<()> {
        if self.counts.is_none() && self.seen.is_none() {
            return Ok(());
        }
        let ids = ops::arange::<_, u32>(None, self.vocab, None)?.reshape(&[1, self.vocab])?;
        let hit = ids.eq(token)?.as_type::<f32>()?;
        if let Some(counts) = self.counts.take() {
            self.counts = Some(counts.add(&hit)?);
        }
        if let Some(seen) = self.seen.take() {
            self.seen = Some(ops::maximum(seen, &hit)?);
        }
        Ok(())
    }
}

/// Drops what is less than `min_p` times as likely as the likeliest.
fn keep_min_p(logits: &Array, min_p: f32) -> Result<Array> {
    if min_p <= 0.0 {
        return Ok(logits.clone());
    }
    let floor = logits.max_axis(-1, true)?.add(Array::from_f32(min_p.ln()))?;
    ops::select(logits.lt(floor)?, Array::from_f32(f32::NEG_INFINITY), logits)
}

/// Log-probability of the drawn token, and the `count` likeliest with theirs.
fn likeliest(logits: &Array, token: &Array, count: i32, vocab: i32) -> Result<DrawnLogprobs> {
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
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [1.0, 3.0, 2.0, -1.0, 0.5, 2.9];

    fn draws(params: SamplingParams, prompt: &[u32], count: usize) -> Vec<u32> {
        let logits = Array::from_slice(&LOGITS, &[1, 6]);
        let mut sampler = Sampler::new(params, prompt, 6, None).unwrap();
        (0..count)
            .map(|_| sampler.draw(&logits).unwrap().token.item_cast::<u32>())
            .collect()
    }

    fn seen(params: SamplingParams) -> Vec<u32> {
        let mut ids = draws(
            SamplingParams {
                seed: Some(1),
                ..params
            },
            &[],
            300,
        );
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    fn hot() -> SamplingParams {
        SamplingParams {
            temperature: 2.0,
            ..SamplingParams::greedy()
        }
    }

    #[test]
    fn greedy_takes_the_likeliest() {
        assert_eq!(draws(SamplingParams::greedy(), &[], 3), [1, 1, 1]);
    }

    #[test]
    fn filters_keep_what_they_promise() {
        assert_eq!(seen(hot()), [0, 1, 2, 3, 4, 5]);
        assert_eq!(seen(SamplingParams { top_k: 1, ..hot() }), [1]);
        assert_eq!(seen(SamplingParams { top_k: 3, ..hot() }), [1, 2, 5]);
        assert_eq!(seen(SamplingParams { top_k: 100, ..hot() }), [0, 1, 2, 3, 4, 5]);
        // Shares at temperature 2: 0.28, 0.27, 0.17, 0.10, 0.08, 0.04 (ids 1, 5, 2, 0, 4, 3).
        assert_eq!(seen(SamplingParams { top_p: 0.01, ..hot() }), [1]);
        assert_eq!(seen(SamplingParams { top_p: 0.5, ..hot() }), [1, 5]);
        assert_eq!(seen(SamplingParams { top_p: 0.6, ..hot() }), [1, 2, 5]);
        assert_eq!(
            seen(SamplingParams {
                top_p: 0.99,
                top_k: 2,
                ..hot()
            }),
            [1, 5]
        );
        // exp((x - 3) / 2) >= 0.3 for 3.0, 2.9, 2.0 and 1.0 (0.37).
        assert_eq!(seen(SamplingParams { min_p: 0.3, ..hot() }), [0, 1, 2, 5]);
        assert_eq!(
            seen(SamplingParams {
                min_p: 0.5,
                top_k: 4,
                ..hot()
            }),
            [1, 2, 5]
        );
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        let ids = draws(
            SamplingParams {
                temperature: 1.0,
                seed: Some(3),
                ..SamplingParams::greedy()
            },
            &[],
            4000,
        );
        let total: f32 = LOGITS.iter().map(|logit| logit.exp()).sum();
        for (id, logit) in LOGITS.iter().enumerate() {
            let share = ids.iter().filter(|&&drawn| drawn as usize == id).count() as f32 / 4000.0;
            assert!((share - logit.exp() / total).abs() < 0.03, "token {id}: {share}");
        }
    }

    #[test]
    fn a_seed_repeats_its_draws_and_no_seed_does_not() {
        let seeded = |seed| draws(SamplingParams { seed, ..hot() }, &[], 40);
        assert_eq!(seeded(Some(5)), seeded(Some(5)));
        assert_ne!(seeded(Some(5)), seeded(Some(6)));
        assert_ne!(seeded(None), seeded(None));
    }

    #[test]
    fn penalties_move_on_to_the_next_token() {
        let frequency = SamplingParams {
            frequency_penalty: 0.2,
            ..SamplingParams::greedy()
        };
        // 3.0, 2.9 and 2.0: each token falls by 0.2 with every use.
        assert_eq!(draws(frequency, &[], 5), [1, 5, 1, 5, 1]);
        let presence = SamplingParams {
            presence_penalty: 1.5,
            ..SamplingParams::greedy()
        };
        assert_eq!(draws(presence, &[], 4), [1, 5, 2, 1]);
        let repetition = SamplingParams {
            repetition_penalty: 2.0,
            ..SamplingParams::greedy()
        };
        // Token 1 stands in the prompt: 3.0 / 2.
        assert_eq!(draws(repetition, &[1], 3), [5, 2, 1]);
    }

    #[test]
    fn bias_forces_and_forbids() {
        let params = SamplingParams {
            logit_bias: vec![(1, -100.0), (3, 100.0)],
            ..SamplingParams::greedy()
        };
        assert_eq!(draws(params, &[], 1), [3]);
    }

    #[test]
    fn logprobs_are_those_of_the_distribution() {
        let logits = Array::from_slice(&LOGITS, &[1, 6]);
        let total: f32 = LOGITS.iter().map(|logit| logit.exp()).sum::<f32>().ln();
        let mut sampler = Sampler::new(SamplingParams::greedy(), &[], 6, Some(2)).unwrap();
        let DrawnLogprobs { own, top } = sampler.draw(&logits).unwrap().logprobs.unwrap();
        assert!((own.item_cast::<f32>() - (3.0 - total)).abs() < 1e-5);
        let (ids, values) = top.unwrap();
        assert_eq!(ids.to_vec_cast::<u32>().unwrap(), [1, 5]);
        let values = values.to_vec_cast::<f32>().unwrap();
        assert!((values[0] - (3.0 - total)).abs() < 1e-5 && (values[1] - (2.9 - total)).abs() < 1e-5);
    }

    #[test]
    fn the_coldest_draws_are_greedy() {
        let cold = SamplingParams {
            temperature: 1e-38,
            ..SamplingParams::greedy()
        };
        assert_eq!(draws(cold, &[], 3), [1, 1, 1]);
    }
}
