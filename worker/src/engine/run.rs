//! The engine thread's loop.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use mlx_rs::error::Exception;
use tokio::sync::{mpsc, oneshot, watch};

use super::sequence::{Outcome, Sequence};
use super::stats::{Counters, Place};
use super::{EngineConfig, StartError, limits};
use crate::backend::{EngineError, EngineState, GenerateRequest, GenerationEvent, ModelInfo, SamplingParams};
use crate::model::{LoadProgress, Model};

/// What the handle asks of the thread.
#[derive(Debug)]
pub(super) enum Command {
    Generate {
        request: GenerateRequest,
        events: mpsc::Sender<GenerationEvent>,
        place: Place,
    },
    /// Look at the stop flag.
    Wake,
}

/// A request that has no place to run yet.
struct Waiting {
    request: GenerateRequest,
    events: mpsc::Sender<GenerationEvent>,
    place: Place,
}

/// An idle engine wakes this often, to show that it lives.
const IDLE_TURN: Duration = Duration::from_millis(500);

/// Loads the model, says so through `ready`, then serves until told to stop. Whatever goes wrong for good ends in
/// [`EngineState::Dead`]; the model and everything else of MLX are gone by then.
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
        Loop::start(config, counters, inbox, stopping, progress)
    }));
    let reason = match started {
        Ok(Ok((engine, info))) => match ready.send(Ok(info)) {
            Ok(()) => engine.serve(),
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
    counters: &'a Arc<Counters>,
    inbox: &'a Receiver<Command>,
    /// Set by the handle.
    stopping: &'a AtomicBool,
    model: Model,
    waiting: VecDeque<Waiting>,
    running: Vec<Sequence>,
    /// The handle is gone, and with it everybody who could ask for something.
    abandoned: bool,
}

impl<'a> Loop<'a> {
    fn start(
        config: EngineConfig,
        counters: &'a Arc<Counters>,
        inbox: &'a Receiver<Command>,
        stopping: &'a AtomicBool,
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
            capacity: config.capacity(),
            limits: limits(&config, context_length, model.storage()),
        };
        let engine = Self {
            config,
            context_length,
            counters,
            inbox,
            stopping,
            model,
            waiting: VecDeque::new(),
            running: Vec::new(),
            abandoned: false,
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
                logprobs: None,
            };
            let (sender, _receiver) = mpsc::channel(8);
            let place = self
                .counters
                .place(usize::MAX)
                .map_err(|_| Exception::custom("no place"))?;
            let mut sequence = Sequence::new(&self.model, request, sender, self.context_length, place)?;
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

    /// Runs until told to stop, or until MLX gives up; tells every client, and returns why it ended.
    fn serve(mut self) -> String {
        // A panic would otherwise leave clients waiting for a thread that is gone.
        let (error, reason) = match catch_unwind(AssertUnwindSafe(|| self.run())) {
            Ok(Ok(())) => (EngineError::Stopped, "stopped".to_owned()),
            Ok(Err(Broken(reason))) => (EngineError::Dead(reason.clone()), reason),
            Err(panic) => {
                let reason = format!("panic: {}", panic_message(panic.as_ref()));
                (EngineError::Dead(reason.clone()), reason)
            }
        };
        self.fail_all(&error);
        reason
    }

    fn run(&mut self) -> Result<(), Broken> {
        while !self.abandoned && !self.stopping.load(Relaxed) {
            self.take_commands();
            self.drop_cancelled();
            self.admit();
            let worked = self.step();
            self.report();
            worked?;
        }
        Ok(())
    }

    /// Takes what has come in; waits for something when there is nothing else to do.
    fn take_commands(&mut self) {
        if self.running.is_empty() && self.waiting.is_empty() {
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
            Command::Generate {
                request,
                events,
                place,
            } => {
                self.waiting.push_back(Waiting {
                    request,
                    events,
                    place,
                });
            }
            Command::Wake => {}
        }
    }

    fn drop_cancelled(&mut self) {
        self.waiting.retain(|waiting| !waiting.events.is_closed());
        self.running.retain(|sequence| !sequence.is_cancelled());
    }

    fn admit(&mut self) {
        while self.running.len() < self.config.max_running
            && let Some(Waiting {
                request,
                events,
                place,
            }) = self.waiting.pop_front()
        {
            match Sequence::new(&self.model, request, events.clone(), self.context_length, place) {
                Ok(sequence) => self.running.push(sequence),
                Err(error) => {
                    let error = EngineError::Step(error.what().to_owned());
                    let _ = events.try_send(GenerationEvent::Failed(error));
                }
            }
        }
        // Before the step and not only after it: a step that never ends must be seen as one.
        self.counters.running.store(self.running.len(), Relaxed);
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
            return Err(Broken(format!("{}; and then: {}", error.what(), second.what())));
        }
        Ok(())
    }

    fn fail_all(&mut self, error: &EngineError) {
        for sequence in self.running.drain(..) {
            sequence.fail(error.clone());
        }
        while let Ok(command) = self.inbox.try_recv() {
            self.take(command);
        }
        for Waiting { events, .. } in self.waiting.drain(..) {
            let _ = events.try_send(GenerationEvent::Failed(error.clone()));
        }
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
