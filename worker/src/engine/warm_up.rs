//! The warm-up: a start's first prefills and decodes, at the shapes that matter, and the counting of its pieces.

use kv_cache::{BlockId, SeqId};
use mlx_rs::error::Exception;

use super::EngineConfig;
use super::sampler::Sampler;
use super::stepper::{DecodeRow, FirstDraw, Stepper};
use crate::backend::SamplingParams;
use crate::model::{LoadPhase, LoadProgress};

/// Counts the pieces of a warm-up for whoever waits for it.
pub(super) struct Steps<'a> {
    progress: &'a mut dyn FnMut(LoadProgress),
    done: u64,
    total: u64,
}

impl<'a> Steps<'a> {
    pub(super) fn new(progress: &'a mut dyn FnMut(LoadProgress), total: usize) -> Self {
        let mut steps = Self {
            progress,
            done: 0,
            total: total as u64,
        };
        steps.report();
        steps
    }

    /// One more has ended.
    pub(super) fn next(&mut self) {
        self.reach(self.done + 1);
    }

    /// So many have ended, or are not to be done.
    pub(super) fn reach(&mut self, done: u64) {
        self.done = done.min(self.total);
        self.report();
    }

    fn report(&mut self) {
        (self.progress)(LoadProgress {
            phase: LoadPhase::WarmUp,
            done: self.done,
            total: self.total,
        });
    }
}

/// More rows than this in a step are not tried at start, which would take long; the estimate stands for them.
pub(super) const MOST_WARM_ROWS: usize = 64;

/// Rows of the warm-up's decodes, where a sequence may have so many tokens: each has a block of its own.
fn warm_rows(config: &EngineConfig, tokens: usize) -> usize {
    config
        .max_running
        .clamp(1, MOST_WARM_ROWS)
        .min((tokens / config.block_size).max(1))
}

/// Decodes of the warm-up.
pub(super) const WARM_DECODES: usize = 2;

/// Pieces that the warm-up reports: each prefill, each decode.
pub(super) fn warm_steps(config: &EngineConfig, tokens: usize) -> usize {
    warm_rows(config, tokens) + WARM_DECODES
}

/// Real prefills and decodes, greedy and sampled, at the shapes that matter: in the end steps as large as one can be, which
/// compute the largest chunk over the longest context that a step may look back on, and decode as many rows as may run, two
/// of them in flight as they are in traffic. Kernels are compiled and weights touched before anybody waits for it, the memory
/// that the largest step needs is seen, and a model that cannot run is found before the port is announced. `tokens`:
/// positions that a sequence may have; `fused`: attention whose cost allows for that context, otherwise the chunk is short.
pub(super) fn warm_up(
    stepper: &mut Stepper,
    config: &EngineConfig,
    tokens: usize,
    fused: bool,
    steps: &mut Steps<'_>,
) -> Result<(), Exception> {
    let block_size = config.block_size;
    let rows = warm_rows(config, tokens);
    let room = (tokens / block_size / rows).saturating_mul(block_size);
    let prompt = vec![0_u32; config.prefill_chunk.min(room.saturating_sub(4)).clamp(1, 64)];
    let each = (prompt.len() + 2).div_ceil(block_size);
    let mut samplers: Vec<Sampler> = (0..rows)
        .map(|row| SamplingParams {
            temperature: if row % 2 == 0 { 0.0 } else { 0.7 },
            ..drawn()
        })
        .map(|params| Sampler::new(params, &prompt, None))
        .collect();
    let block = |index: usize| {
        u32::try_from(index)
            .map(BlockId)
            .map_err(|_| Exception::custom("too many blocks"))
    };
    // Whatever stands in these blocks afterwards, nobody will read it.
    let tables = (0..samplers.len())
        .map(|row| {
            (row * each..(row + 1) * each)
                .map(block)
                .collect::<Result<Vec<_>, _>>()
        })
        .collect::<Result<Vec<_>, _>>()?;
    stepper.begin();
    for ((row, table), sampler) in (0..).zip(&tables).zip(&mut samplers) {
        let runs = super::places::runs(table, block_size, 0, prompt.len());
        stepper.prefill(
            SeqId(row),
            &prompt,
            0,
            &runs,
            table,
            Some(FirstDraw::new(sampler)),
        )?;
        // As a step of its own, so that its end is one.
        stepper.wait()?;
        steps.next();
    }
    let chunk = if fused {
        WarmChunk::longest(config, tokens)?
    } else {
        WarmChunk {
            tokens: prompt.clone(),
            start: 0,
            table: tables.first().cloned().unwrap_or_default(),
        }
    };
    for step in 0..WARM_DECODES {
        stepper.begin();
        // A prompt that ends while the others are decoded: what its chunk and its draw need comes on top of what they do.
        let runs = super::places::runs(&chunk.table, block_size, chunk.start, chunk.tokens.len());
        let (id, mut sampler) = (SeqId(rows as u64), Sampler::new(drawn(), &chunk.tokens, None));
        stepper.prefill(
            id,
            &chunk.tokens,
            chunk.start,
            &runs,
            &chunk.table,
            Some(FirstDraw::new(&mut sampler)),
        )?;
        let position = prompt.len() + step;
        let rows = (0..)
            .zip(&tables)
            .map(|(row, table)| {
                let slot = table
                    .get(position / block_size)
                    .map(|&block| (block, position % block_size));
                Ok(DecodeRow {
                    id: SeqId(row),
                    position,
                    slot: slot.ok_or_else(|| Exception::custom("a table too short"))?,
                    table,
                    allowed: None,
                })
            })
            .collect::<Result<Vec<_>, Exception>>()?;
        let mut samplers: Vec<&mut Sampler> = samplers.iter_mut().collect();
        stepper.decode(&rows, &mut samplers)?;
        stepper.read()?;
        steps.next();
    }
    stepper.begin();
    stepper.read()?;
    stepper.clear();
    Ok(())
}

/// Sampling with all that a request may ask for, as the defaults do in part: penalties, which keep a history over the whole
/// vocabulary, and every way to leave tokens out.
fn drawn() -> SamplingParams {
    SamplingParams {
        temperature: 0.7,
        top_p: 0.9,
        top_k: 50,
        min_p: 0.01,
        repetition_penalty: 1.05,
        presence_penalty: 0.1,
        frequency_penalty: 0.01,
        ..SamplingParams::greedy()
    }
}

/// A prompt's last chunk.
struct WarmChunk {
    tokens: Vec<u32>,
    start: usize,
    table: Vec<BlockId>,
}

impl WarmChunk {
    /// The one that needs most memory: whole, and at the end of the longest context that the budget allows for it.
    fn longest(config: &EngineConfig, tokens: usize) -> Result<Self, Exception> {
        let chunk = config.prefill_chunk.min(tokens).max(1);
        let budget = usize::try_from(config.step_budget / chunk as u64).unwrap_or(usize::MAX);
        let end = budget.min(tokens).max(chunk);
        let mut table = (0..end.div_ceil(config.block_size))
            .map(|block| u32::try_from(block).map(BlockId))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_| Exception::custom("too many blocks"))?;
        // In two pieces: what lies apart is copied together before it is attended to.
        let half = table.len() / 2;
        table.rotate_left(half);
        Ok(Self {
            tokens: vec![0; chunk],
            start: end - chunk,
            table,
        })
    }
}
