//! The engine thread's loop.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use mlx_rs::error::Exception;
use tokio::sync::{mpsc, oneshot, watch};

use super::sequence::{Outcome, Sequence};
use super::stats::Counters;
use super::{EngineConfig, StartError, limits};
use crate::backend::{EngineError, EngineState, GenerateRequest, GenerationEvent, ModelInfo, SamplingParams};
use crate::model::{LoadProgress, Model};

/// What the handle asks of the thread.
#[derive(Debug)]
pub(super) enum Command {
    Generate {
        request: GenerateRequest,
        events: mpsc::Sender<GenerationEvent>,
    },
    Stop,
}

/// An idle engine wakes this often, to show that it lives.
const IDLE_TURN: Duration = Duration::from_millis(500);

/// Loads the model, says so through `ready`, then serves until told to stop. Whatever goes wrong for good ends in
/// [`EngineState::Dead`].
pub(super) fn thread(
    config: EngineConfig,
    counters: &Counters,
    inbox: &Receiver<Command>,
    state: &watch::Sender<EngineState>,
    ready: oneshot::Sender<Result<ModelInfo, StartError>>,
    progress: &mut dyn FnMut(LoadProgress),
) {
    // A panic below would otherwise leave clients waiting for a thread that is gone.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let engine = match Loop::start(config, counters, inbox, progress) {
            Ok((engine, info)) => {
                if ready.send(Ok(info)).is_err() {
                    return Ok(());
                }
                engine
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return Ok(());
            }
        };
        engine.run()
    }));
    let reason = match outcome {
        Ok(Ok(())) => "stopped".to_owned(),
        Ok(Err(Broken(reason))) => reason,
        Err(panic) => format!("panic: {}", panic_message(panic.as_ref())),
    };
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
    config: EngineConfig,
    context_length: usize,
    counters: &'a Counters,
    inbox: &'a Receiver<Command>,
    model: Model,
    waiting: VecDeque<(GenerateRequest, mpsc::Sender<GenerationEvent>)>,
    running: Vec<Sequence>,
    stopping: bool,
}

impl<'a> Loop<'a> {
    fn start(
        config: EngineConfig,
        counters: &'a Counters,
        inbox: &'a Receiver<Command>,
        progress: &mut dyn FnMut(LoadProgress),
    ) -> Result<(Self, ModelInfo), StartError> {
        let warm_up = |error: Exception| StartError::WarmUp(error.what().to_owned());
        let runtime = mlx_ext::runtime().map_err(warm_up)?;
        tracing::info!(
            version = runtime.version,
            device = runtime.device,
            blas = runtime.cpu_blas,
            "MLX"
        );
        mlx_rs::memory::set_cache_limit(config.buffer_cache_bytes).map_err(warm_up)?;

        let model = Model::load(&config.model, config.mapped, progress)?;
        let known = model.config().max_positions;
        let context_length = match config.context_length {
            Some(asked) if asked > known => return Err(StartError::Context { asked, known }),
            Some(asked) => asked,
            None => known,
        };
        let info = ModelInfo {
            architecture: model.config().model_type.clone(),
            context_length,
            vocab_size: usize::try_from(model.config().vocab).unwrap_or_default(),
            weight_bytes: model.weight_bytes(),
            limits: limits(&config, context_length, model.storage()),
        };
        let engine = Self {
            config,
            context_length,
            counters,
            inbox,
            model,
            waiting: VecDeque::new(),
            running: Vec::new(),
            stopping: false,
        };
        engine.warm_up().map_err(warm_up)?;
        counters.turned();
        Ok((engine, info))
    }

    /// A real prefill and two decodes, greedy and sampled: kernels are compiled and weights touched before anybody
    /// waits for it, and a model that cannot run is found before the port is announced.
    fn warm_up(&self) -> Result<(), Exception> {
        let prompt = vec![
            0_u32;
            self.config
                .prefill_chunk
                .min(self.context_length.saturating_sub(3))
                .clamp(1, 64)
        ];
        for temperature in [0.0, 0.7] {
            let sampling = SamplingParams {
                temperature,
                top_p: 0.9,
                ..SamplingParams::greedy()
            };
            let request = GenerateRequest {
                prompt: prompt.clone(),
                max_tokens: 2,
                sampling,
                stop_tokens: Vec::new(),
                ignore_eos: true,
                logprobs: None,
            };
            let (sender, _receiver) = mpsc::channel(8);
            let mut sequence = Sequence::new(&self.model, request, sender, self.context_length)?;
            while sequence.is_prefilling() {
                sequence.prefill(&self.model, self.config.prefill_chunk)?;
            }
            loop {
                let next = sequence.start_next(&self.model)?;
                if sequence.finish_step(next)? == Outcome::Done {
                    break;
                }
            }
        }
        Ok(())
    }

    fn run(mut self) -> Result<(), Broken> {
        while !self.stopping {
            self.take_commands();
            self.drop_cancelled();
            self.admit();
            let worked = self.step();
            self.report();
            worked?;
        }
        self.fail_all(&EngineError::Stopped);
        Ok(())
    }

    /// Takes what has come in; waits for something when there is nothing else to do.
    fn take_commands(&mut self) {
        if self.running.is_empty() && self.waiting.is_empty() {
            match self.inbox.recv_timeout(IDLE_TURN) {
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => return,
                // The handle is gone, and with it everybody who could ask for something.
                Err(RecvTimeoutError::Disconnected) => self.stopping = true,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return;
                }
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Generate { request, events } => self.waiting.push_back((request, events)),
            Command::Stop => self.stopping = true,
        }
    }

    fn drop_cancelled(&mut self) {
        let before = self.waiting.len();
        self.waiting.retain(|(_, events)| !events.is_closed());
        self.counters
            .waiting
            .fetch_sub(before - self.waiting.len(), Relaxed);
        self.running.retain(|sequence| !sequence.is_cancelled());
    }

    fn admit(&mut self) {
        while self.running.len() < self.config.max_running
            && let Some((request, events)) = self.waiting.pop_front()
        {
            self.counters.waiting.fetch_sub(1, Relaxed);
            match Sequence::new(&self.model, request, events.clone(), self.context_length) {
                Ok(sequence) => self.running.push(sequence),
                Err(error) => {
                    let _ = events.try_send(GenerationEvent::Failed(EngineError::Step(
                        error.what().to_owned(),
                    )));
                }
            }
        }
    }

    /// One chunk of one prompt, and one token for every sequence that decodes: a long prompt holds the others up by a
    /// chunk at most.
    fn step(&mut self) -> Result<(), Broken> {
        if self.running.is_empty() {
            return Ok(());
        }
        self.counters.steps.fetch_add(1, Relaxed);
        if let Some(index) = self.running.iter().position(Sequence::is_prefilling)
            && let Some(sequence) = self.running.get_mut(index)
        {
            match sequence.prefill(&self.model, self.config.prefill_chunk) {
                Ok(tokens) => {
                    self.counters.prefill_tokens.fetch_add(tokens as u64, Relaxed);
                }
                Err(error) => self.fail(index, &error)?,
            }
        }

        // All next steps are on their way before the first of the current ones is waited for.
        let model = &self.model;
        let mut started = Vec::with_capacity(self.running.len());
        for sequence in self
            .running
            .iter_mut()
            .filter(|sequence| !sequence.is_prefilling())
        {
            started.push(sequence.start_next(model));
        }
        let mut started = started.into_iter();
        let mut index = 0;
        while let Some(sequence) = self.running.get_mut(index) {
            if sequence.is_prefilling() {
                index += 1;
                continue;
            }
            let outcome = started
                .next()
                .unwrap_or(Ok(None))
                .and_then(|next| sequence.finish_step(next));
            match outcome {
                Ok(Outcome::Goes) => {
                    self.counters.decode_tokens.fetch_add(1, Relaxed);
                    index += 1;
                }
                Ok(Outcome::Done) => {
                    self.counters.decode_tokens.fetch_add(1, Relaxed);
                    self.running.remove(index);
                }
                Err(error) => self.fail(index, &error)?,
            }
        }
        Ok(())
    }

    /// Ends one sequence with an error. When MLX cannot even add two numbers any more, the engine is done for.
    fn fail(&mut self, index: usize, error: &Exception) -> Result<(), Broken> {
        tracing::error!(error = error.what(), "a step failed");
        self.running
            .remove(index)
            .fail(EngineError::Step(error.what().to_owned()));
        let one = mlx_rs::Array::from_f32(1.0);
        let probe = one.add(&one).and_then(|sum| sum.eval());
        if let Err(second) = probe {
            let reason = format!("{}; and then: {}", error.what(), second.what());
            self.fail_all(&EngineError::Dead(reason.clone()));
            return Err(Broken(reason));
        }
        Ok(())
    }

    fn fail_all(&mut self, error: &EngineError) {
        for sequence in self.running.drain(..) {
            sequence.fail(error.clone());
        }
        for (_, events) in self.waiting.drain(..) {
            let _ = events.try_send(GenerationEvent::Failed(error.clone()));
        }
        self.counters.waiting.store(0, Relaxed);
        self.report();
    }

    fn report(&self) {
        self.counters.running.store(self.running.len(), Relaxed);
        self.counters
            .kv_used_bytes
            .store(self.running.iter().map(Sequence::kv_bytes).sum(), Relaxed);
        self.counters.turned();
    }
}
