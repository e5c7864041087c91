//! Carries out what the scheduler plans: forward passes and draws, one step ahead of their readers.
//!
//! The device is never waited for between a step and the next: step n+1 is built from step n's tokens while these are
//! still on the device, and only then step n is read. Where a row may draw only what its constraint allows, which depends on its token in
//! step n, step n+1's forward pass is issued before that token is read, and its draws after.

use std::collections::HashMap;
use std::rc::Rc;

use constraint::Allowed;
use kv_cache::{BlockId, CopyBlock, KvQuantization, SeqId, SlotRun, copy_runs};
use mlx_ext::ops::slice;
use mlx_rs::error::{Exception, Result};
use mlx_rs::transforms::{async_eval, eval};
use mlx_rs::{Array, ops};

use super::places::{blocks, flat, int, join, spans};
use super::sampler::{Draw, DrawnLogprobs, History, Parameters, Sampler};
use crate::backend::TokenLogprobs;
use crate::model::Model;
use crate::model::kernels::KernelReport;
use crate::model::kv::{Chunk, KvSlabs, Move, Row, Rows, Span};

/// Gathering the rows of a step together pays while it reads at most so many positions; a row's own operations cost
/// more than that.
const MOST_PADDED: i32 = 8192;

/// Positions of a copy to move at once: what is read has memory of its own before it is written.
const COPIED_AT_ONCE: usize = 1024;

/// The model, its keys and values, and the steps in flight.
#[derive(Debug)]
pub(super) struct Stepper {
    model: Model,
    kv: KvSlabs,
    block_size: usize,
    vocab: i32,
    /// Draws under way: what the next step continues.
    flights: Vec<Flight>,
    /// Draws to read: the step before that.
    landed: Vec<Flight>,
    /// Forward passes under way that have not been drawn from: one, or one for each row.
    undrawn: Vec<Forward>,
    /// Keys and values of chunks that end in no draw, from this step and from the one before.
    chunks: Vec<Vec<Array>>,
    chunks_before: Vec<Vec<Array>>,
    /// Parameters of the rows that were stepped together last.
    parameters: Option<(Vec<SeqId>, Rc<Parameters>)>,
    /// What is to go wrong.
    #[cfg(test)]
    pub(super) faults: Faults,
    /// Of each step: tokens computed of prompts, the position where the last of these ended, rows decoded.
    #[cfg(test)]
    pub(super) issued: Vec<(usize, usize, usize)>,
}

/// Failures to be met by tests.
#[cfg(test)]
#[derive(Debug, Default)]
pub(super) struct Faults {
    /// The prefill of a prompt of so many tokens cannot be built.
    pub(super) prompt: Option<usize>,
    /// The decode of a row at this position cannot be built, nor can that of any rows together with it.
    pub(super) position: Option<usize>,
    /// What a preempted sequence has drawn cannot be kept.
    pub(super) park: bool,
    /// The device fails in the step with so many rows, once.
    pub(super) rows: Option<usize>,
    /// And is lost then.
    pub(super) lost: bool,
    /// After so many reads of tokens, each waits until the sender is gone.
    pub(super) hang: Option<(usize, std::sync::mpsc::Receiver<()>)>,
}

/// Why a step failed.
#[derive(Debug)]
pub(super) enum Fault {
    /// Its graph could not be built: it concerns the requests that it was for, and nothing has been issued.
    Graph(Exception),
    /// The device failed. MLX keeps one such error for a stream and gives it to whoever asks next, so that nobody knows whose
    /// it was; what has been issued since may or may not have been written.
    Device(Exception),
}

impl From<Exception> for Fault {
    fn from(error: Exception) -> Self {
        Self::Graph(error)
    }
}

impl From<Fault> for Exception {
    fn from(fault: Fault) -> Self {
        let (Fault::Graph(error) | Fault::Device(error)) = fault;
        error
    }
}

type Step = std::result::Result<(), Fault>;

/// Starts the evaluation of a step's arrays.
fn issue<'a>(arrays: impl IntoIterator<Item = &'a Array>) -> Step {
    async_eval(arrays).map_err(Fault::Device)
}

/// Rows drawn together.
#[derive(Debug)]
pub(super) struct Flight {
    rows: Vec<SeqId>,
    draw: Draw,
    history: History,
}

/// What a decode step draws from.
#[derive(Debug)]
struct Forward {
    rows: Vec<SeqId>,
    /// `[rows, vocab]`.
    logits: Array,
    /// Before the draw.
    history: History,
    numbers: Option<Array>,
    parameters: Rc<Parameters>,
}

/// How the token after a prompt is drawn.
#[derive(Debug)]
pub(super) struct FirstDraw<'a> {
    pub(super) sampler: &'a mut Sampler,
    /// Of a sequence that has drawn before.
    pub(super) history: Option<History>,
    /// See [`Stepper::flags`].
    pub(super) allowed: Option<Array>,
}

impl<'a> FirstDraw<'a> {
    /// Of a new sequence, anything.
    pub(super) fn new(sampler: &'a mut Sampler) -> Self {
        Self {
            sampler,
            history: None,
            allowed: None,
        }
    }
}

/// One row of a decode step.
#[derive(Debug)]
pub(super) struct DecodeRow<'a> {
    pub(super) id: SeqId,
    /// Position of the token in flight.
    pub(super) position: usize,
    pub(super) slot: (BlockId, usize),
    pub(super) table: &'a [BlockId],
    /// See [`Stepper::flags`]; `None`: anything. Rows that [`Stepper::decode_undrawn`] steps are told later.
    pub(super) allowed: Option<Array>,
}

/// A token that has been read.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) id: SeqId,
    pub(super) token: u32,
    pub(super) logprob: Option<TokenLogprobs>,
}

impl Stepper {
    /// `kernel_rows`: how many rows kernels have to serve at most; without it the reference path decodes. `progress`: see
    /// [`Model::choose_kernels`].
    pub(super) fn new(
        mut model: Model,
        positions: i32,
        block_size: usize,
        kv_quantization: Option<KvQuantization>,
        kernel_rows: Option<usize>,
        progress: &mut dyn FnMut(),
    ) -> Result<(Self, KernelReport)> {
        let kv = model.new_kv(positions, kv_quantization)?;
        let report = match kernel_rows {
            Some(rows) => model.choose_kernels(&kv, int(block_size)?, rows, progress),
            None => KernelReport::reference("no kernels asked for"),
        };
        let stepper = Self {
            kv,
            vocab: model.config().vocab,
            model,
            block_size,
            flights: Vec::new(),
            landed: Vec::new(),
            undrawn: Vec::new(),
            chunks: Vec::new(),
            chunks_before: Vec::new(),
            parameters: None,
            #[cfg(test)]
            faults: Faults::default(),
            #[cfg(test)]
            issued: Vec::new(),
        };
        Ok((stepper, report))
    }

    /// Kernels of our own decode, and not the reference path.
    pub(super) fn has_kernels(&self) -> bool {
        self.model.has_kernels()
    }

    /// Tokens are on their way to be read.
    pub(super) fn is_flying(&self) -> bool {
        !self.flights.is_empty() || !self.landed.is_empty() || !self.chunks.is_empty()
    }

    /// What is in flight is to be read; what is issued from now on is the next step.
    pub(super) fn begin(&mut self) {
        self.chunks_before = std::mem::take(&mut self.chunks);
        self.landed.append(&mut self.flights);
        #[cfg(test)]
        self.issued.push((0, 0, 0));
    }

    pub(super) fn copy(&self, copies: &[CopyBlock]) -> Step {
        if copies.is_empty() {
            return Ok(());
        }
        self.settle()?;
        let piece = (COPIED_AT_ONCE / self.block_size).max(1);
        let mut moves = Vec::new();
        for (from, to, blocks) in copy_runs(copies) {
            for done in (0..blocks).step_by(piece) {
                let offset = done * self.block_size;
                moves.push(Move {
                    from: self.flat(from, offset)?,
                    to: self.flat(to, offset)?,
                    length: int(piece.min(blocks - done) * self.block_size)?,
                });
            }
        }
        // Some of it may have been issued when it fails.
        self.kv.copy(&moves).map_err(Fault::Device)
    }

    /// Waits for the steps in flight, where nothing orders what they do in the cache with what is written to it next: see
    /// [`Model::steps_overlap`].
    fn settle(&self) -> Step {
        if self.model.steps_overlap() {
            eval(self.landed.iter().map(|flight| &flight.draw.tokens)).map_err(Fault::Device)?;
        }
        Ok(())
    }

    /// As [`Self::settle`], for the flights that none of these rows continues: nothing that the next step reads depends on
    /// them, and a sequence that has ended in one of them may have left a block to a row of this step.
    fn settle_strangers(&self, ids: &[SeqId]) -> Step {
        if !self.model.steps_overlap() {
            return Ok(());
        }
        let strangers = self.landed.iter().filter(|flight| is_stranger(&flight.rows, ids));
        eval(strangers.map(|flight| &flight.draw.tokens)).map_err(Fault::Device)
    }

    /// Computes a chunk of a prompt. With `draw` the token after it is drawn.
    pub(super) fn prefill(
        &mut self,
        id: SeqId,
        tokens: &[u32],
        start: usize,
        runs: &[SlotRun],
        table: &[BlockId],
        draw: Option<FirstDraw<'_>>,
    ) -> Step {
        #[cfg(test)]
        if self.faults.prompt == Some(start + tokens.len()) && draw.is_some() {
            return Err(Exception::custom("a prompt that no graph can be made of").into());
        }
        #[cfg(test)]
        if let Some((computed, end, _)) = self.issued.last_mut() {
            *computed += tokens.len();
            *end = start + tokens.len();
        }
        self.settle()?;
        let writes = self.writes(runs)?;
        let reads = spans(table, self.block_size, start + tokens.len())?;
        let chunk = Chunk {
            start: int(start)?,
            writes: &writes,
            reads: &reads,
        };
        let tokens = Array::from_slice(tokens, &[1, int(tokens.len())?]);
        let (hidden, written) = self.model.prefill(&tokens, &chunk, &self.kv)?;
        let Some(first) = draw else {
            issue(&written)?;
            self.chunks.push(written);
            return Ok(());
        };
        let FirstDraw {
            sampler,
            history,
            allowed,
        } = first;
        let mut history = history.unwrap_or_else(|| sampler.history(self.vocab));
        let parameters = Parameters::new(&[&*sampler], self.vocab)?;
        let logits = self.model.last_logits(&hidden)?;
        let numbers = parameters.numbers(std::iter::once(sampler));
        let draw = parameters.draw(&logits, numbers.as_ref(), &mut history, allowed.as_ref())?;
        issue(draw.arrays().chain(history.arrays()))?;
        self.flights.push(Flight {
            rows: vec![id],
            draw,
            history,
        });
        Ok(())
    }

    /// The next token of every row, from the draws of the step before. `samplers` has those of `rows`, in that order.
    pub(super) fn decode(&mut self, rows: &[DecodeRow<'_>], samplers: &mut [&mut Sampler]) -> Step {
        let forward = self.forward(rows, samplers)?;
        let flags = self.all_flags(rows.iter().map(|row| row.allowed.as_ref()))?;
        self.draw_from(forward, flags.as_ref())
    }

    /// As [`Self::decode`], up to what is drawn from: [`Self::draw`] goes on when the tokens before have been read.
    pub(super) fn decode_undrawn(&mut self, rows: &[DecodeRow<'_>], samplers: &mut [&mut Sampler]) -> Step {
        let forward = self.forward(rows, samplers)?;
        issue(std::iter::once(&forward.logits))?;
        self.undrawn.push(forward);
        Ok(())
    }

    /// The rows that wait for their draws.
    pub(super) fn undrawn(&self) -> Vec<SeqId> {
        self.undrawn
            .iter()
            .flat_map(|forward| forward.rows.clone())
            .collect()
    }

    /// Draws for the rows that wait for it. `allowed`: the [`Self::flags`] of those that may not draw everything. Gives those whose draws
    /// could not be built, with the reason.
    ///
    /// # Errors
    /// The device's.
    pub(super) fn draw(&mut self, allowed: &HashMap<SeqId, Array>) -> Result<Vec<(Vec<SeqId>, Exception)>> {
        let mut failed = Vec::new();
        for forward in std::mem::take(&mut self.undrawn) {
            let rows = forward.rows.clone();
            let flags = self.all_flags(rows.iter().map(|id| allowed.get(id)));
            let drawn = flags.map_err(Fault::Graph);
            match drawn.and_then(|flags| self.draw_from(forward, flags.as_ref())) {
                Ok(()) => {}
                Err(Fault::Graph(error)) => failed.push((rows, error)),
                Err(Fault::Device(error)) => return Err(error),
            }
        }
        Ok(failed)
    }

    /// `[rows, vocab]`; `None`: all may draw everything.
    fn all_flags<'a>(&self, rows: impl Iterator<Item = Option<&'a Array>> + Clone) -> Result<Option<Array>> {
        if rows.clone().all(|row| row.is_none()) {
            return Ok(None);
        }
        let all = ops::broadcast_to(Array::from_bool(true), &[1, self.vocab])?;
        let rows: Vec<&Array> = rows.map(|row| row.unwrap_or(&all)).collect();
        ops::concatenate(&rows, 0).map(Some)
    }

    /// One row's allowed tokens as the device wants them: `[1, vocab]`.
    pub(super) fn flags(&self, allowed: &Allowed) -> Array {
        let mut flags = vec![false; usize::try_from(self.vocab).unwrap_or_default()];
        allowed.fill(&mut flags);
        Array::from_slice(&flags, &[1, self.vocab])
    }

    /// The same of all tokens but these.
    pub(super) fn all_but(&self, ids: &[u32]) -> Array {
        let mut flags = vec![true; usize::try_from(self.vocab).unwrap_or_default()];
        for &id in ids {
            if let Some(flag) = flags.get_mut(usize::try_from(id).unwrap_or(usize::MAX)) {
                *flag = false;
            }
        }
        Array::from_slice(&flags, &[1, self.vocab])
    }

    fn forward(
        &mut self,
        rows: &[DecodeRow<'_>],
        samplers: &mut [&mut Sampler],
    ) -> std::result::Result<Forward, Fault> {
        #[cfg(test)]
        if let Some((_, _, decoded)) = self.issued.last_mut() {
            *decoded += rows.len();
        }
        let ids: Vec<SeqId> = rows.iter().map(|row| row.id).collect();
        self.settle_strangers(&ids)?;
        let (tokens, history) = self.previous(&ids)?;
        let places = rows
            .iter()
            .map(|row| {
                let (block, offset) = row.slot;
                Ok(Row {
                    position: int(row.position)?,
                    slot: self.flat(block, offset)?,
                    reads: spans(row.table, self.block_size, row.position + 1)?,
                    blocks: blocks(row.table)?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        // Kernels gather nothing.
        let most_padded = if self.model.has_kernels() { 0 } else { MOST_PADDED };
        let places = Rows::new(places, most_padded, self.kv.extent())?;
        let logits = self.model.step(&tokens, &places, &self.kv)?;
        if self.parameters.as_ref().is_none_or(|(known, _)| *known != ids) {
            let shared: Vec<&Sampler> = samplers.iter().map(|sampler| &**sampler).collect();
            self.parameters = Some((ids.clone(), Rc::new(Parameters::new(&shared, self.vocab)?)));
        }
        #[cfg(test)]
        if rows.iter().any(|row| Some(row.position) == self.faults.position) {
            return Err(Exception::custom("a row that no graph can be made of").into());
        }
        let Some((_, parameters)) = &self.parameters else {
            return Err(Exception::custom("rows without parameters").into());
        };
        Ok(Forward {
            rows: ids,
            logits,
            history,
            numbers: parameters.numbers(samplers.iter_mut().map(|sampler| &mut **sampler)),
            parameters: Rc::clone(parameters),
        })
    }

    fn draw_from(&mut self, forward: Forward, allowed: Option<&Array>) -> Step {
        let Forward {
            rows,
            logits,
            mut history,
            numbers,
            parameters,
        } = forward;
        let draw = parameters.draw(&logits, numbers.as_ref(), &mut history, allowed)?;
        issue(draw.arrays().chain(history.arrays()))?;
        self.flights.push(Flight { rows, draw, history });
        Ok(())
    }

    /// The tokens in flight of these rows, `[1, rows]`, and their history.
    fn previous(&self, ids: &[SeqId]) -> Result<(Array, History)> {
        let count = int(ids.len())?;
        if let [flight] = self.landed.as_slice()
            && flight.rows == ids
        {
            let tokens = flight.draw.tokens.reshape(&[1, count])?;
            return Ok((tokens, flight.history.clone()));
        }
        let mut tokens = Vec::with_capacity(ids.len());
        let mut histories = Vec::with_capacity(ids.len());
        for &id in ids {
            let (flight, row) = self
                .find(id)
                .ok_or_else(|| Exception::custom(format!("sequence {id} has no token in flight")))?;
            tokens.push(slice(&flight.draw.tokens, &[row], &[row + 1])?);
            histories.push(flight.history.row(row)?);
        }
        let tokens = ops::concatenate(&tokens, 0)?.reshape(&[1, count])?;
        Ok((tokens, History::join(&histories, self.vocab)?))
    }

    /// What a sequence that is not stepped further for now has drawn so far.
    pub(super) fn park(&self, id: SeqId) -> Result<Option<History>> {
        #[cfg(test)]
        if self.faults.park {
            return Err(Exception::custom("a history that cannot be kept"));
        }
        self.find(id)
            .map(|(flight, row)| flight.history.row(row))
            .transpose()
    }

    fn find(&self, id: SeqId) -> Option<(&Flight, i32)> {
        self.landed.iter().find_map(|flight| {
            let row = flight.rows.iter().position(|&row| row == id)?;
            Some((flight, i32::try_from(row).ok()?))
        })
    }

    /// Waits for the step before this one and reads it. What goes wrong here is the device's, and nobody knows whose.
    pub(super) fn read(&mut self) -> Result<Vec<Landed>> {
        // In the order of issue. Nobody reads the chunks; waiting for them bounds what is in flight.
        // What fails is kept: whoever is told of it decides when it is given back.
        for chunk in &self.chunks_before {
            eval(chunk)?;
        }
        self.chunks_before.clear();
        let mut all = Vec::new();
        #[cfg(test)]
        if !self.landed.is_empty()
            && let Some((before, hang)) = &mut self.faults.hang
        {
            match before.checked_sub(1) {
                Some(left) => *before = left,
                None => drop(hang.recv()),
            }
        }
        for flight in &self.landed {
            #[cfg(test)]
            if self.faults.rows == Some(flight.rows.len()) {
                self.faults.rows = None;
                return Err(Exception::custom("the device failed"));
            }
            flight.read(&mut all)?;
        }
        self.landed.clear();
        Ok(all)
    }

    /// Waits for the draws of this step, which are still to be read.
    pub(super) fn wait(&self) -> Result<()> {
        eval(self.flights.iter().map(|flight| &flight.draw.tokens))
    }

    /// Whether MLX still computes.
    pub(super) fn probe(&self) -> Result<()> {
        #[cfg(test)]
        if self.faults.lost {
            return Err(Exception::custom("the device is lost"));
        }
        let one = Array::from_f32(1.0);
        one.add(&one)?.eval()
    }

    /// Waits for what is in flight, whatever comes of it: a later failure of one of these steps is not taken for one of the next.
    pub(super) fn outlast(&self) {
        let chunks = self.chunks_before.iter().chain(&self.chunks).flatten();
        let flights = self.landed.iter().chain(&self.flights);
        let undrawn = self.undrawn.iter().map(|forward| &forward.logits);
        for array in chunks
            .chain(flights.flat_map(|flight| flight.draw.arrays()))
            .chain(undrawn)
        {
            if let Err(error) = array.eval() {
                tracing::debug!(error = error.what(), "of a step given up");
            }
        }
    }

    /// Forgets what is in flight.
    pub(super) fn clear(&mut self) {
        self.flights.clear();
        self.landed.clear();
        self.undrawn.clear();
        self.chunks.clear();
        self.chunks_before.clear();
        self.parameters = None;
    }

    fn writes(&self, runs: &[SlotRun]) -> Result<Vec<Span>> {
        let mut spans: Vec<Span> = Vec::new();
        for run in runs {
            join(
                &mut spans,
                Span {
                    start: self.flat(run.block, run.offset)?,
                    length: int(run.len)?,
                },
            );
        }
        Ok(spans)
    }

    fn flat(&self, block: BlockId, offset: usize) -> Result<i32> {
        flat(block, self.block_size).and_then(|start| int(start + offset))
    }
}

impl Flight {
    fn read(&self, all: &mut Vec<Landed>) -> Result<()> {
        let tokens = self.draw.read()?;
        for ((&id, token), logprobs) in self.rows.iter().zip(tokens).zip(&self.draw.logprobs) {
            all.push(Landed {
                id,
                token,
                logprob: logprobs.as_ref().map(DrawnLogprobs::read).transpose()?,
            });
        }
        Ok(())
    }
}

/// None of `next` goes on from a flight with these rows.
fn is_stranger(rows: &[SeqId], next: &[SeqId]) -> bool {
    !rows.iter().any(|row| next.contains(row))
}

#[cfg(test)]
mod tests;
