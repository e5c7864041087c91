//! Whether kernels are used: decided at start, by a test against the reference path on the very device, model and cache.

use std::time::Instant;

use mlx_rs::error::{Exception, Result};
use mlx_rs::ops::indexing::argmax_axis;
use mlx_rs::transforms::{async_eval, eval};
use mlx_rs::{Array, Dtype, ops};
use serde::Serialize;

use super::attend::MOST_ROWS;
use super::decode::KernelDecoder;
use super::{Made, Unfit, unfit};
use crate::model::Model;
use crate::model::kv::{Chunk, KvSlabs, Row, Rows, Span};

/// Steps that are timed, after one that is not.
const STEPS: i32 = 7;

/// Positions that a timing adds to a sequence, and one more.
const GROWN: i32 = STEPS + 2;

/// Prompts of the test are computed in pieces of so many tokens, all alike: MLX' CUDA build compiles a quantised product for
/// each kind of length when it first meets it, which takes tens of seconds.
const PIECE: i32 = 64;

/// Positions of the longest sequences that are timed, where the cache has room for them.
const DEEP: i32 = 16_384;

/// Positions of the short ones.
const SHALLOW: i32 = 256;

/// Most pieces of work that a test reports: prompts, comparisons of them one by one, by two, by four and together, and four
/// timings both ways.
pub(in crate::model) const PIECES: usize = 8 + (8 + 4 + 2 + 1) + 2 * 4;

/// A step that was timed both ways.
#[derive(Debug, Clone, Serialize)]
pub struct Timing {
    /// Sequences.
    pub rows: i32,
    /// Positions of each before the step.
    pub positions: i32,
    /// Milliseconds a step with the reference path.
    pub reference_ms: f64,
    /// Milliseconds a step with the kernels.
    pub kernels_ms: f64,
}

/// What decodes, and what decided it.
#[derive(Debug, Clone, Serialize)]
pub struct KernelReport {
    /// `kernels` or `reference`.
    pub path: &'static str,
    /// Why.
    pub reason: String,
    /// The largest relative difference of a row's scores, or of the keys or values that were appended for it, from the
    /// reference path's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<f32>,
    /// One sequence and as many as there may be, short and long ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub timings: Vec<Timing>,
}

impl KernelReport {
    /// The reference path, for a reason.
    #[must_use]
    pub fn reference(reason: impl Into<String>) -> Self {
        Self {
            path: "reference",
            reason: reason.into(),
            error: None,
            timings: Vec::new(),
        }
    }
}

/// The kernels if they give what the reference path gives, and faster. Writes to the first blocks of `kv`, whose contents
/// nobody may rely on yet. `rows`: the most that are stepped together. `progress`: called after each piece of work, of which any
/// may compile kernels; at most [`PIECES`] times.
pub(in crate::model) fn choose(
    model: &Model,
    kv: &KvSlabs,
    block: i32,
    rows: usize,
    progress: &mut dyn FnMut(),
) -> (Option<KernelDecoder>, KernelReport) {
    match test(model, kv, block, rows, progress) {
        Ok((kernels, report)) => (kernels, report),
        Err(error) => {
            let failed = matches!(error, Unfit::Mlx(_));
            let report = KernelReport::reference(error.to_string());
            if failed {
                tracing::warn!(reason = report.reason, "kernels failed their test");
            }
            (None, report)
        }
    }
}

fn test(
    model: &Model,
    kv: &KvSlabs,
    block: i32,
    rows: usize,
    progress: &mut dyn FnMut(),
) -> Made<(Option<KernelDecoder>, KernelReport)> {
    let slabs = kv
        .plain()
        .ok_or_else(|| unfit("the kernels read keys and values as they are, not quantised"))?;
    if mlx_ext::Language::of_device()?.is_none() {
        return Err(unfit("no kernels for the CPU"));
    }
    if int(rows)? > MOST_ROWS {
        return Err(unfit(format!("{rows} rows in a step, at most {MOST_ROWS}")));
    }
    let weights = model
        .kernel_weights()
        .ok_or_else(|| unfit("no kernels for this architecture"))?;
    let kernels = KernelDecoder::new(model.config(), weights, &slabs, block)?;
    let prompts = prompts(kv.positions(), block, rows);
    if prompts.is_empty() {
        return Err(unfit("the cache is too small for the test"));
    }
    let vocab = model.config().vocab;
    let mut tokens = Vec::with_capacity(prompts.len());
    for (place, prompt) in (0..).zip(&prompts) {
        prefill(model, kv, prompt, place, vocab)?;
        progress();
        tokens.push((place * 977 + 13) % vocab);
    }
    tracing::debug!("kernels: the test's prompts are computed");
    let others: Vec<i32> = tokens.iter().map(|token| (token + vocab / 2) % vocab).collect();
    let [tokens, others] =
        [tokens, others].map(|tokens| Array::from_slice(&tokens, &[1, tokens.len() as i32]));
    let mut error = 0.0_f32;
    // The kernels for each number of rows are compiled here, and not when somebody waits for them. With few rows each of the
    // sequences gets its turn: what one position more or less does is seen in the shortest.
    let most_rows = prompts.len().min(rows);
    let mut counts = vec![1, 2, 4, most_rows];
    counts.retain(|&count| count <= most_rows);
    counts.dedup();
    for count in counts {
        for (place, prompts) in prompts.chunks_exact(count).enumerate() {
            let (from, to) = (int(place * count)?, int((place + 1) * count)?);
            let some = |tokens: &Array| mlx_ext::ops::slice(tokens, &[0, from], &[1, to]);
            let step = step(kv, prompts, 0)?;
            let tokens = some(&tokens)?;
            // Each evaluated before the next: the kernels write to the cache unseen by MLX.
            let expected = reference(model, kv, &tokens, &step)?.as_type::<f32>()?;
            expected.eval()?;
            let expected_kv = written(&slabs, prompts)?;
            // Something else in its place, so that it is noticed when the kernels leave it there.
            reference(model, kv, &some(&others)?, &step)?.eval()?;
            let found = kernels
                .scores(&tokens, step.positions(), &step.tables())?
                .as_type::<f32>()?;
            error = error.max(difference(&found, &expected)?);
            error = error.max(difference(&written(&slabs, prompts)?, &expected_kv)?);
            tracing::debug!(rows = count, error, "kernels: compared");
            progress();
        }
    }
    let most = if kv.dtype() == Dtype::Float32 { 1e-3 } else { 0.1 };
    let mut timings = Vec::new();
    for (rows, positions) in shapes(kv.positions(), block, int(rows)?) {
        let prompts = rows_of(rows, positions, block);
        let tokens = Array::from_slice(&vec![13 % vocab; prompts.len()], &[1, rows]);
        let reference_ms = time(kv, &prompts, &tokens, |tokens, step| {
            reference(model, kv, tokens, step)
        })?;
        progress();
        let kernels_ms = time(kv, &prompts, &tokens, |tokens, step| {
            kernels.scores(tokens, step.positions(), &step.tables())
        })?;
        tracing::debug!(rows, positions, reference_ms, kernels_ms, "kernels: timed");
        progress();
        timings.push(Timing {
            rows,
            positions,
            reference_ms,
            kernels_ms,
        });
    }
    let gain = gain(&timings);
    let chosen = error <= most && gain > 1.0;
    let report = KernelReport {
        path: if chosen { "kernels" } else { "reference" },
        reason: if error > most {
            format!("the kernels' results differ by {error}, at most {most} may be")
        } else {
            format!(
                "the kernels take {:.2} of the reference path's time here",
                1.0 / gain
            )
        },
        error: Some(error),
        timings,
    };
    Ok((chosen.then_some(kernels), report))
}

/// How many times faster the kernels are: the geometric mean of the shapes. One path serves all of them, since a sequence
/// whose path changed with its company or its length would not give the same tokens as alone.
fn gain(timings: &[Timing]) -> f64 {
    let sum: f64 = timings
        .iter()
        .map(|timing| (timing.reference_ms / timing.kernels_ms).ln())
        .sum();
    (sum / timings.len().max(1) as f64).exp()
}

/// Rows and positions of the steps to time: one sequence and `most`, short and as long as the cache has room for.
fn shapes(positions: i32, block: i32, most: i32) -> Vec<(i32, i32)> {
    let mut shapes = Vec::new();
    for rows in [1, most] {
        let room = positions / block.max(1) / rows.max(1) * block - GROWN;
        for length in [SHALLOW, DEEP] {
            let shape = (rows, length.min(room));
            if room > 0 && !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
    }
    shapes
}

/// Sequences to be timed: what is in their blocks does not matter.
fn rows_of(rows: i32, length: i32, block: i32) -> Vec<Prompt> {
    let each = (length + GROWN + block - 1) / block;
    (0..rows)
        .map(|row| Prompt {
            blocks: in_pieces(row * each, each),
            block,
            length,
        })
        .collect()
}

/// A sequence of the test: its blocks, in its order, and its length.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Prompt {
    blocks: Vec<i32>,
    /// Positions of a block.
    block: i32,
    length: i32,
}

/// Sequences of different lengths, at block borders and beside them, whose blocks lie in one piece, which the reference path
/// reads in place, or in three, which it joins; four to eight of them, also where only one is stepped at a time.
fn prompts(positions: i32, block: i32, rows: usize) -> Vec<Prompt> {
    let lengths = [300, 1, block, 2 * block + 1, 63, 64, 130, 700];
    let mut left = positions / block.max(1);
    let mut prompts: Vec<Prompt> = Vec::new();
    for length in lengths.into_iter().cycle().take(rows.clamp(4, 8)) {
        let written = (length + PIECE - 1) / PIECE * PIECE;
        let needed = (written.max(length + GROWN) + block - 1) / block;
        if needed > left {
            continue;
        }
        let first = left - needed;
        prompts.push(Prompt {
            blocks: match prompts.len() % 2 {
                0 => (first..left).collect(),
                _ => in_pieces(first, needed),
            },
            block,
            length,
        });
        left = first;
    }
    prompts
}

/// The blocks `first..first + count`, the last third first. The reference path takes each piece by itself: a sequence
/// whose blocks all lie apart would keep it busy for seconds.
fn in_pieces(first: i32, count: i32) -> Vec<i32> {
    let third = (count + 2) / 3;
    let mut pieces: Vec<Vec<i32>> = (0..3)
        .map(|n| (first + n * third..(first + (n + 1) * third).min(first + count)).collect())
        .collect();
    pieces.reverse();
    pieces.concat()
}

/// What is written behind the prompt's end is overwritten before it is read.
fn prefill(model: &Model, kv: &KvSlabs, prompt: &Prompt, seed: i32, vocab: i32) -> Result<()> {
    for start in (0..prompt.length).step_by(PIECE.unsigned_abs() as usize) {
        let end = start + PIECE;
        let tokens: Vec<i32> = (start..end)
            .map(|n| (n * 131 + seed * 7919 + 5) % vocab)
            .collect();
        let chunk = Chunk {
            start,
            writes: &spans(prompt, start, end),
            reads: &spans(prompt, 0, end),
        };
        let (_, written) = model.prefill(&Array::from_slice(&tokens, &[1, PIECE]), &chunk, kv)?;
        eval(&written)?;
    }
    Ok(())
}

/// The slab positions of a prompt's tokens `from..to`.
fn spans(prompt: &Prompt, from: i32, to: i32) -> Vec<Span> {
    let block = prompt.block;
    let mut spans: Vec<Span> = Vec::new();
    let mut at = 0;
    for &number in &prompt.blocks {
        let (first, last) = (from.max(at), to.min(at + block));
        if first < last {
            let (start, length) = (number * block + first - at, last - first);
            match spans.last_mut() {
                Some(span) if span.start + span.length == start => span.length += length,
                _ => spans.push(Span { start, length }),
            }
        }
        at += block;
    }
    spans
}

/// The step after `done` others.
fn step(kv: &KvSlabs, prompts: &[Prompt], done: i32) -> Result<Rows> {
    let row = |prompt: &Prompt| {
        let position = prompt.length + done;
        let reads = spans(prompt, 0, position + 1);
        let slot = reads.last().map_or(0, |span| span.start + span.length - 1);
        Row {
            position,
            slot,
            reads,
            blocks: prompt.blocks.clone(),
        }
    };
    Rows::new(prompts.iter().map(row).collect(), 8192, kv.extent())
}

/// Keys and values that stand where the step after no others writes: two rows for each prompt, all layers side by side.
fn written(slabs: &[[&Array; 2]], prompts: &[Prompt]) -> Result<Array> {
    let mut rows = Vec::with_capacity(2 * prompts.len());
    for prompt in prompts {
        let at = spans(prompt, prompt.length, prompt.length + 1)
            .first()
            .map_or(0, |span| span.start);
        for side in [
            |[keys, _]: [&Array; 2]| keys.clone(),
            |[_, values]: [&Array; 2]| values.clone(),
        ] {
            let parts = slabs.iter().map(|&layer| {
                let slab = side(layer);
                let (heads, width) = (slab.dim(0), slab.dim(2));
                mlx_ext::ops::slice(&slab, &[0, at, 0], &[heads, at + 1, width])?.reshape(&[1, -1])
            });
            rows.push(ops::concatenate(&parts.collect::<Result<Vec<_>>>()?, 1)?);
        }
    }
    let rows = ops::concatenate(&rows, 0)?.as_type::<f32>()?;
    rows.eval()?;
    Ok(rows)
}

fn reference(model: &Model, kv: &KvSlabs, tokens: &Array, step: &Rows) -> Result<Array> {
    model.logits(&model.decode(tokens, step, kv)?)
}

/// The largest relative difference of a row, infinite when a score is not a number.
fn difference(found: &Array, expected: &Array) -> Result<f32> {
    let size = |array: &Array| array.square()?.sum_axis(-1, false)?.sqrt();
    let ratio = size(&found.subtract(expected)?)?.divide(size(expected)?)?;
    let rows = ratio
        .to_vec_cast::<f32>()
        .map_err(|error| Exception::custom(error.to_string()))?;
    let finite = |row: f32| if row.is_finite() { row } else { f32::INFINITY };
    Ok(rows.into_iter().map(finite).fold(0.0, f32::max))
}

/// Milliseconds a step, each built while the one before runs, as the engine does: the median of several, since the first of a
/// kind may have to be compiled.
fn time(
    kv: &KvSlabs,
    prompts: &[Prompt],
    tokens: &Array,
    mut scores: impl FnMut(&Array, &Rows) -> Result<Array>,
) -> Result<f64> {
    let mut tokens = tokens.clone();
    let mut moments = Vec::new();
    for done in 0..=STEPS {
        let step = step(kv, prompts, done)?;
        let next = argmax_axis(&scores(&tokens, &step)?, -1, false)?.reshape(&[1, -1])?;
        async_eval([&next])?;
        tokens.eval()?;
        moments.push(Instant::now());
        tokens = next;
    }
    tokens.eval()?;
    moments.push(Instant::now());
    // The first waits for nothing.
    let mut steps: Vec<f64> = moments
        .windows(2)
        .filter_map(|pair| Some((*pair.get(1)? - *pair.first()?).as_secs_f64() * 1e3))
        .skip(1)
        .collect();
    steps.sort_unstable_by(f64::total_cmp);
    Ok(steps.get(steps.len() / 2).copied().unwrap_or(f64::INFINITY))
}

fn int(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(|_| Exception::custom(format!("{number} is too large for MLX")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tests_sequences_share_no_block() {
        for (positions, block, rows) in [(16_384, 16, 8), (1024, 32, 4), (4096, 16, 1), (64, 16, 8)] {
            let prompts = prompts(positions, block, rows);
            assert!(!prompts.is_empty() && prompts.len() <= rows.max(4));
            let mut seen: Vec<i32> = prompts.iter().flat_map(|prompt| prompt.blocks.clone()).collect();
            let all = seen.len();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), all);
            assert!(
                seen.iter()
                    .all(|&number| number >= 0 && (number + 1) * block <= positions)
            );
            for prompt in &prompts {
                let room = i32::try_from(prompt.blocks.len()).unwrap() * block;
                assert!(room > prompt.length + STEPS);
                assert!(room >= (prompt.length + PIECE - 1) / PIECE * PIECE);
                for from in [0, prompt.length / 2] {
                    let spans = spans(prompt, from, prompt.length);
                    let length: i32 = spans.iter().map(|span| span.length).sum();
                    assert_eq!(length, prompt.length - from);
                }
            }
        }
        assert!(prompts(16, 16, 4).is_empty());
    }

    #[test]
    fn timed_sequences_lie_within_the_cache() {
        for (positions, block, most) in [
            (20_000, 16, 4),
            (65_536, 32, 256),
            (1000, 16, 8),
            (160, 16, 8),
            (16, 16, 4),
        ] {
            let shapes = shapes(positions, block, most);
            for &(rows, length) in &shapes {
                let rows_of = rows_of(rows, length, block);
                assert_eq!(rows_of.len(), usize::try_from(rows).unwrap());
                let mut seen: Vec<i32> = rows_of.iter().flat_map(|row| row.blocks.clone()).collect();
                assert!(
                    seen.iter()
                        .all(|&number| number >= 0 && (number + 1) * block <= positions)
                );
                let all = seen.len();
                seen.sort_unstable();
                seen.dedup();
                assert_eq!(seen.len(), all, "no block is shared");
            }
        }
        assert_eq!(
            shapes(1 << 20, 16, 4),
            [(1, 256), (1, 16_384), (4, 256), (4, 16_384)]
        );
        assert_eq!(shapes(1000, 16, 8), [(1, 256), (1, 983), (8, 103)]);
        assert_eq!(shapes(20_000, 16, 1), [(1, 256), (1, 16_384)]);
    }

    #[test]
    fn what_is_slower_somewhere_may_be_faster_on_the_whole() {
        let timing = |reference_ms, kernels_ms| Timing {
            rows: 1,
            positions: 1,
            reference_ms,
            kernels_ms,
        };
        assert!((gain(&[timing(4.0, 1.0), timing(1.0, 1.0)]) - 2.0).abs() < 1e-9);
        assert!(gain(&[timing(4.0, 2.0), timing(1.0, 1.5)]) > 1.0);
        assert!(gain(&[timing(1.2, 1.0), timing(1.0, 1.5)]) < 1.0);
    }

    #[test]
    fn a_difference_is_relative_and_knows_what_is_no_number() {
        let expected = Array::from_slice(&[3.0_f32, 4.0, 0.0, 1.0], &[2, 2]);
        let found = Array::from_slice(&[3.0_f32, 4.5, 0.0, 1.0], &[2, 2]);
        assert!((difference(&found, &expected).unwrap() - 0.1).abs() < 1e-6);
        assert_eq!(difference(&expected, &expected).unwrap(), 0.0);
        let broken = Array::from_slice(&[3.0_f32, f32::NAN, 0.0, 1.0], &[2, 2]);
        assert_eq!(difference(&broken, &expected).unwrap(), f32::INFINITY);
    }
}
