//! The engine thread's loop.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use kv_cache::SeqId;
use mlx_rs::Array;
use mlx_rs::error::Exception;
use scheduler::{Decode, NewRequest, Plan, Refusal, Scheduler};
use tokio::sync::{mpsc, oneshot, watch};

use super::sampler::Sampler;
use super::sequence::{Outcome, Sequence};
use super::start;
use super::stats::{Counters, Place};
use super::stepper::{DecodeRow, Fault, FirstDraw, Landed, Stepper};
use super::{EngineConfig, StartError};
use crate::backend::{EngineError, EngineState, GenerateRequest, GenerationEvent, Miss, ModelInfo};
use crate::model::LoadProgress;
use crate::model::weights::{self, WeightFile};

/// Tokens around the place where a prompt parts from the cached one: enough for a line of the log.
const SHOWN: usize = 40;

/// What the handle asks of the thread.
#[derive(Debug)]
pub(super) enum Command {
    /// The sequences of one request.
    Generate(Vec<Arrival>),
    /// Look at the stop flag.
    Wake,
}

/// One sequence of a request.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) request: GenerateRequest,
    pub(super) events: mpsc::Sender<GenerationEvent>,
    pub(super) place: Place,
}

/// Longest time for a volume to give two bytes of a file: a disk that had stopped turning takes ten seconds.
const LOOK_LIMIT: Duration = Duration::from_secs(30);

/// An idle engine wakes this often, to show that it lives.
const IDLE_TURN: Duration = Duration::from_millis(500);

/// Loads the model, says so through `ready`, then serves until told to stop. Whatever goes wrong for good ends in
/// [`EngineState::Dead`].
pub(super) fn thread(
    config: EngineConfig,
    counters: &Arc<Counters>,
    inbox: &Receiver<Command>,
    stopping: &AtomicBool,
    state: &watch::Sender<EngineState>,
    ready: oneshot::Sender<Result<ModelInfo, StartError>>,
    progress: &mut dyn FnMut(LoadProgress),
) {
    let started = catch_unwind(AssertUnwindSafe(|| {
        let (parts, info) = start::start(config, progress)?;
        counters.turned();
        Ok::<_, StartError>((Loop::new(parts, counters, inbox, stopping), info))
    }));
    let reason = match started {
        Ok(Ok((engine, info))) => match ready.send(Ok(info)) {
            Ok(()) => {
                engine.serve(state);
                return;
            }
            Err(_) => "nobody waited for it".to_owned(),
        },
        Ok(Err(error)) => {
            let reason = error.to_string();
            let _ = ready.send(Err(error));
            reason
        }
        Err(panic) => {
            let reason = format!("panic: {}", panic_message(panic.as_ref()));
            let _ = ready.send(Err(StartError::Thread(reason.clone())));
            reason
        }
    };
    dead(state, reason);
}

fn dead(state: &watch::Sender<EngineState>, reason: String) {
    tracing::debug!(reason, "engine thread ends");
    state.send_replace(EngineState::Dead(reason));
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

/// MLX no longer works; the message says why.
struct Broken(String);

struct Loop<'a> {
    started: Instant,
    /// Prompt plus reply, at most: what the context length and the KV cache have room for.
    most_tokens: usize,
    max_wait: Option<Duration>,
    counters: &'a Arc<Counters>,
    inbox: &'a Receiver<Command>,
    /// Set by the handle.
    stopping: &'a AtomicBool,
    scheduler: Scheduler,
    stepper: Stepper,
    weight_files: Vec<WeightFile>,
    sequences: HashMap<SeqId, Sequence>,
    next_id: u64,
    /// The handle is gone, and with it everybody who could ask for something.
    abandoned: bool,
}

impl<'a> Loop<'a> {
    fn new(
        parts: start::Parts,
        counters: &'a Arc<Counters>,
        inbox: &'a Receiver<Command>,
        stopping: &'a AtomicBool,
    ) -> Self {
        Self {
            started: Instant::now(),
            most_tokens: parts.most_tokens,
            max_wait: parts.max_wait,
            counters,
            inbox,
            stopping,
            scheduler: parts.scheduler,
            stepper: parts.stepper,
            weight_files: parts.weight_files,
            sequences: HashMap::new(),
            next_id: 0,
            abandoned: false,
        }
    }

    /// Runs until told to stop, or until MLX gives up; tells every client, and then through `state` why it ended.
    fn serve(mut self, state: &watch::Sender<EngineState>) {
        // A panic would otherwise leave clients waiting for a thread that is gone.
        let reason = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(Ok(())) => {
                self.stepper.clear();
                self.fail_all(&EngineError::Stopped);
                drop(self);
                dead(state, "stopped".to_owned());
                return;
            }
            Ok(Err(Broken(reason))) => reason,
            Err(panic) => format!("panic: {}", panic_message(panic.as_ref())),
        };
        self.fail_all(&EngineError::Dead(reason.clone()));
        // What is in flight stays there.
        self.counters.busy.store(false, Relaxed);
        dead(state, reason);
        // On a device that has failed for good, giving an array back fails too, and MLX ends the process for that before anybody
        // has said why. It ends anyway.
        std::mem::forget(self);
    }

    fn run(&mut self) -> Result<(), Broken> {
        while !self.abandoned && !self.stopping.load(Relaxed) {
            self.take_commands();
            self.drop_cancelled();
            let worked = self.step();
            self.report();
            worked?;
        }
        Ok(())
    }

    /// Takes what has come in; waits for something when there is nothing else to do.
    fn take_commands(&mut self) {
        if self.scheduler.is_idle() && !self.stepper.is_flying() {
            match self.inbox.recv_timeout(IDLE_TURN) {
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => self.abandoned = true,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.abandoned = true;
                    return;
                }
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Generate(arrivals) => {
                let group = SeqId(self.next_id);
                for arrival in arrivals {
                    self.submit(arrival, group);
                }
            }
            Command::Wake => {}
        }
    }

    fn submit(&mut self, arrival: Arrival, group: SeqId) {
        let Arrival {
            request,
            events,
            place,
        } = arrival;
        let id = SeqId(self.next_id);
        self.next_id += 1;
        let room = self.most_tokens.saturating_sub(request.prompt.len());
        let limit = request.max_tokens.min(room);
        let sequence = Sequence::new(&request, events, place, limit);
        let new = NewRequest {
            id,
            group,
            prompt: request.prompt,
            max_new_tokens: limit,
            now: self.started.elapsed(),
        };
        match self.scheduler.submit(new) {
            Ok(()) => {
                self.sequences.insert(id, sequence);
            }
            Err(refusal) => sequence.fail(refused(&refusal)),
        }
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<SeqId> = self
            .sequences
            .iter()
            .filter(|(_, sequence)| sequence.is_cancelled())
            .map(|(&id, _)| id)
            .collect();
        for id in gone {
            self.scheduler.cancel(id);
            self.sequences.remove(&id);
        }
    }

    /// Issues one step and reads the one before it.
    fn step(&mut self) -> Result<(), Broken> {
        if self.scheduler.is_idle() && !self.stepper.is_flying() {
            return Ok(());
        }
        let debug = tracing::enabled!(tracing::Level::DEBUG);
        self.scheduler.explain(debug.then_some(SHOWN));
        let plan = self.scheduler.plan(self.started.elapsed());
        self.counters.steps.fetch_add(1, Relaxed);
        // Before the step and not only after it: a step that never ends must be seen as one, also where it only reads
        // what nobody wants any more.
        self.counters.busy.store(true, Relaxed);
        self.counters.running.store(self.scheduler.running(), Relaxed);
        self.stepper.begin();
        self.issue(plan)?;
        match self.stepper.read() {
            Ok(landed) => self.land(landed),
            Err(error) => self.fail_running(&error)?,
        }
        self.draw()
    }

    fn issue(&mut self, plan: Plan) -> Result<(), Broken> {
        for id in plan.expired {
            if let Some(sequence) = self.sequences.remove(&id) {
                sequence.fail(EngineError::WaitedTooLong(self.max_wait.unwrap_or_default()));
            }
        }
        for id in plan.lost {
            tracing::error!(%id, "the KV cache refused what it had promised");
            if let Some(sequence) = self.sequences.remove(&id) {
                let defect = "the KV cache refused what it had promised; this is a defect of the worker";
                sequence.fail(EngineError::Step(defect.to_owned()));
            }
        }
        for (id, found) in plan.misses {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.miss = Some(Box::new(Miss {
                    position: found.position,
                    before: found.before,
                    asked: found.asked,
                    cached: found.cached,
                    evicted: found.evicted,
                }));
            }
        }
        for id in plan.preempted {
            self.counters.preempted.fetch_add(1, Relaxed);
            match (self.sequences.get_mut(&id), self.stepper.park(id)) {
                (Some(sequence), Ok(Some(history))) => sequence.history = Some(history),
                // Without it the penalties would begin anew.
                (_, Err(error)) => self.fail(&[id], &error)?,
                (_, Ok(_)) => {}
            }
        }
        if let Err(fault) = self.stepper.copy(&plan.copies) {
            // Nobody knows now what lies where.
            return self.fail_running(&fault.into());
        }
        for chunk in plan.prefill {
            let Some(sequence) = self.sequences.get_mut(&chunk.id) else {
                continue;
            };
            if let Some(cached_tokens) = chunk.first {
                sequence.start(cached_tokens);
            }
            if chunk.last {
                sequence.computed(self.scheduler.cached_tokens(chunk.id));
            }
            let (mut draw, mut failed) = (None, None);
            if chunk.last {
                match allowed(sequence, &self.stepper, self.counters) {
                    Ok(allowed) => {
                        draw = Some(FirstDraw {
                            sampler: &mut sequence.sampler,
                            history: sequence.history.take(),
                            allowed,
                        });
                    }
                    Err(error) => failed = Some(error),
                }
            }
            let table = self.scheduler.table(chunk.id);
            let issued = self
                .stepper
                .prefill(chunk.id, &chunk.tokens, chunk.start, &chunk.runs, table, draw);
            self.counters
                .prefill_tokens
                .fetch_add(chunk.tokens.len() as u64, Relaxed);
            match issued {
                Ok(()) => {
                    if let Some(error) = failed {
                        self.give_up(chunk.id, error);
                    }
                }
                Err(Fault::Graph(error)) => self.fail(&[chunk.id], &error)?,
                // With everything that runs, whatever else this plan has to issue is gone.
                Err(Fault::Device(error)) => return self.fail_running(&error),
            }
        }
        if plan.decode.is_empty() {
            return Ok(());
        }
        self.decode(&plan.decode)
    }

    fn decode(&mut self, planned: &[Decode]) -> Result<(), Broken> {
        let rows: Vec<DecodeRow<'_>> = planned
            .iter()
            .filter_map(|row| {
                let sequence = self.sequences.get_mut(&row.id)?;
                Some(DecodeRow {
                    id: row.id,
                    position: row.position,
                    slot: row.slot,
                    table: self.scheduler.table(row.id),
                    allowed: sequence.going_on(row.position, &self.stepper),
                })
            })
            .collect();
        let constrained =
            |row: &DecodeRow<'_>| self.sequences.get(&row.id).is_some_and(Sequence::is_constrained);
        let late = rows.iter().any(constrained);
        let order: HashMap<SeqId, usize> = rows.iter().zip(0..).map(|(row, place)| (row.id, place)).collect();
        let mut samplers: Vec<(usize, &mut Sampler)> = self
            .sequences
            .iter_mut()
            .filter_map(|(id, sequence)| Some((*order.get(id)?, &mut sequence.sampler)))
            .collect();
        samplers.sort_unstable_by_key(|(place, _)| *place);
        let mut samplers: Vec<&mut Sampler> = samplers.into_iter().map(|(_, sampler)| sampler).collect();
        self.counters.decoded(self.stepper.has_kernels());
        self.counters.late_draws.fetch_add(u64::from(late), Relaxed);
        let generators: Vec<_> = samplers.iter().map(|sampler| sampler.generator()).collect();
        let decode = if late {
            Stepper::decode_undrawn
        } else {
            Stepper::decode
        };
        match decode(&mut self.stepper, &rows, &mut samplers) {
            Ok(()) => return Ok(()),
            Err(Fault::Graph(error)) => tracing::warn!(
                error = error.what(),
                rows = rows.len(),
                "a step cannot be built; row by row now"
            ),
            Err(Fault::Device(error)) => return self.fail_running(&error),
        }
        // Only those fail that cannot be built alone either.
        let mut failed = Vec::new();
        for ((row, sampler), generator) in rows.iter().zip(samplers).zip(generators) {
            sampler.set_generator(generator);
            let row = std::slice::from_ref(row);
            match decode(&mut self.stepper, row, &mut [sampler]) {
                Ok(()) => {}
                Err(Fault::Graph(error)) => failed.extend(row.first().map(|row| (row.id, error))),
                Err(Fault::Device(error)) => return self.fail_running(&error),
            }
        }
        for (id, error) in failed {
            self.fail(&[id], &error)?;
        }
        Ok(())
    }

    /// Draws of a step in which somebody's next token depends on the one that has just been read.
    fn draw(&mut self) -> Result<(), Broken> {
        let mut flags = HashMap::new();
        for id in self.stepper.undrawn() {
            // Of those that have ended nobody will read the draw.
            let Some(sequence) = self.sequences.get_mut(&id) else {
                continue;
            };
            match allowed(sequence, &self.stepper, self.counters) {
                Ok(Some(row)) => drop(flags.insert(id, row)),
                Ok(None) => {}
                Err(error) => self.give_up(id, error),
            }
        }
        match self.stepper.draw(&flags) {
            Ok(failed) => {
                for (rows, error) in failed {
                    self.fail(&rows, &error)?;
                }
                Ok(())
            }
            Err(error) => self.fail_running(&error),
        }
    }

    /// Ends one sequence for a reason of its own. What it has computed is right.
    fn give_up(&mut self, id: SeqId, error: EngineError) {
        self.scheduler.cancel(id);
        if let Some(sequence) = self.sequences.remove(&id) {
            sequence.fail(error);
        }
    }

    /// Tokens have been read: their readers get them.
    fn land(&mut self, landed: Vec<Landed>) {
        for Landed { id, token, logprob } in landed {
            // It may have ended, or been cancelled, while this was under way.
            let Some(sequence) = self.sequences.get_mut(&id) else {
                continue;
            };
            self.counters.decode_tokens.fetch_add(1, Relaxed);
            self.scheduler.token(id, token);
            if sequence.take(token, logprob) == Outcome::Done {
                self.scheduler.finish(id);
                self.sequences.remove(&id);
            }
        }
    }

    /// Ends the sequences whose part of a step could not be built, and those that share what it should have written.
    fn fail(&mut self, rows: &[SeqId], error: &Exception) -> Result<(), Broken> {
        let gone = self.scheduler.fail(rows);
        let told = self.answer(gone, error);
        self.probe(error, told)
    }

    /// The device failed: ends all that runs, since none of it can be told apart from what failed.
    fn fail_running(&mut self, error: &Exception) -> Result<(), Broken> {
        let gone = self.scheduler.fail_running();
        let told = self.answer(gone, error);
        self.stepper.outlast();
        self.probe(error, told)?;
        self.stepper.clear();
        // A device that adds two numbers may still have nothing to read its weights from, and would fail with every request.
        match weights::lost(&self.weight_files, LOOK_LIMIT) {
            None => Ok(()),
            Some(reason) => {
                self.counters.weights_lost.store(true, Relaxed);
                Err(Broken(format!("{}; {reason}", error.what())))
            }
        }
    }

    /// Tells the readers of sequences that are gone; gives these.
    fn answer(&mut self, gone: Vec<SeqId>, error: &Exception) -> Vec<Sequence> {
        tracing::error!(error = error.what(), requests = gone.len(), "a step failed");
        let told: Vec<Sequence> = gone.iter().filter_map(|id| self.sequences.remove(id)).collect();
        for sequence in &told {
            sequence.fail(EngineError::Step(error.what().to_owned()));
        }
        told
    }

    /// When MLX cannot even add two numbers any more, the engine is done for, and the arrays of who has been told are not given
    /// back either: see [`Self::serve`].
    fn probe(&self, error: &Exception, told: Vec<Sequence>) -> Result<(), Broken> {
        self.stepper.probe().map_err(|second| {
            std::mem::forget(told);
            Broken(format!("{}; and then: {}", error.what(), second.what()))
        })
    }

    fn fail_all(&mut self, error: &EngineError) {
        while let Ok(command) = self.inbox.try_recv() {
            self.take(command);
        }
        for (&id, sequence) in &self.sequences {
            self.scheduler.cancel(id);
            sequence.fail(error.clone());
        }
        self.report();
    }

    fn report(&self) {
        let counters = self.counters;
        counters.running.store(self.scheduler.running(), Relaxed);
        let busy = !self.scheduler.is_idle() || self.stepper.is_flying();
        counters.busy.store(busy, Relaxed);
        let usage = self.scheduler.usage();
        counters.kv_cached_bytes.store(usage.cached_bytes, Relaxed);
        counters.kv_used_bytes.store(usage.running_bytes, Relaxed);
        counters.cache(&self.scheduler.totals(), &self.scheduler.counters());
        counters.turned();
    }
}

/// What a sequence whose tokens have all been read may draw next, as the stepper wants it; `None`: anything.
fn allowed(
    sequence: &mut Sequence,
    stepper: &Stepper,
    counters: &Counters,
) -> Result<Option<Array>, EngineError> {
    if !sequence.is_constrained() {
        return Ok(sequence.going_on_read(stepper));
    }
    let started = Instant::now();
    let flags = sequence
        .allowed()
        .map(|allowed| allowed.map(|allowed| stepper.flags(&allowed)));
    counters.masked(started.elapsed());
    flags
}

fn refused(refusal: &Refusal) -> EngineError {
    EngineError::Step(refusal.to_string())
}

#[cfg(test)]
mod tests;
