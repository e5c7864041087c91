//! The engine: one thread that owns MLX, the model and every sequence; [`Engine`] is the handle that HTTP holds.
//!
//! | module     | idea                                                      |
//! |------------|-----------------------------------------------------------|
//! | `start`    | a configuration to a model that has run                   |
//! | `warm_up`  | the first steps, at the shapes that matter                |
//! | `run`      | the thread's loop: take requests, step, tell readers      |
//! | `stepper`  | what the scheduler plans, carried out one step ahead      |
//! | `places`   | where a sequence lies in the slabs                        |
//! | `sequence` | one request on its way                                    |
//! | `memory`   | how memory is divided: arithmetic                         |
//! | `device`   | what memory there is, and MLX's limits                    |
//! | `sampler`  | how tokens are chosen, all rows at once                   |
//! | `stats`    | counters                                                  |
//! | `bench`    | how fast the model runs with nothing around it            |
//!
//! What happens in a step is decided by the pure `scheduler`, which also owns the KV cache's book-keeping.

pub mod bench;
pub mod device;
pub mod memory;
mod places;
mod run;
mod sampler;
mod sequence;
mod start;
mod stats;
mod stepper;
mod warm_up;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use kv_cache::KvQuantization;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{oneshot, watch};

use crate::backend::{
    Backend, EngineState, EngineStats, GenerateRequest, Generation, ModelInfo, SubmitError, event_capacity,
};
use crate::model::weights::Storage;
use crate::model::{LoadError, LoadOptions, LoadProgress};
use memory::{DoesNotFit, MemoryPlan};
use run::{Arrival, Command};
use stats::Counters;

/// Whether quantised weights become float32 while loading. Concerns the CPU build of MLX only, whose product of
/// quantised matrices works on one number at a time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Dequantize {
    /// Where the float32 weights fit into the memory that the worker may use.
    #[default]
    Auto,
    /// Always, on the CPU.
    On,
    /// Never.
    Off,
}

/// Which attention over the paged cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AttentionChoice {
    /// The kernel, where it passes its comparison with the reference on this device and is faster; else the reference.
    #[default]
    Auto,
    /// Gathered blocks and MLX's own attention.
    Reference,
    /// The kernel; without it the worker does not start.
    Kernel,
}

/// What the engine needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// The model's folder.
    pub model: PathBuf,
    /// Map the weights instead of reading them.
    pub mapped: bool,
    /// See [`Dequantize`].
    pub dequantize: Dequantize,
    /// See [`AttentionChoice`].
    pub attention: AttentionChoice,
    /// Prompt plus reply, in tokens; `None`: what the model's configuration says.
    pub context_length: Option<usize>,
    /// Sequences in prefill or decode at a time.
    pub max_running: usize,
    /// Requests that may wait for one of those places.
    pub max_waiting: usize,
    /// Longest wait for a place before a request fails with [`crate::backend::EngineError::WaitedTooLong`].
    pub max_wait: Option<Duration>,
    /// Prompt tokens computed in one step.
    pub prefill_chunk: usize,
    /// Most work of one step: tokens computed times the context that each of them looks back on.
    pub step_budget: u64,
    /// A step that takes longer than this ends the process; zero waits for ever.
    pub watchdog: Duration,
    /// Bytes for the KV cache; `None`: the smallest of 8 GiB, 1/16 of memory, and four whole contexts for each sequence
    /// that may run.
    pub kv_bytes: Option<u64>,
    /// The same as a share of memory: the machine's, or a CUDA device's. `kv_bytes` goes before it.
    pub kv_share: Option<f64>,
    /// Most blocks of the KV cache, whatever its bytes would allow.
    pub max_blocks: Option<usize>,
    /// Tokens in a block of the KV cache, a power of two.
    pub block_size: usize,
    /// Keep keys and values in fewer bits; `None`: as the model makes them.
    pub kv_quantization: Option<KvQuantization>,
    /// Tokens of a reply for which a request has to find room before it leaves the queue; past them it lives on what is
    /// left, and may be preempted.
    pub generation_share: usize,
    /// Share blocks between requests whose prompts begin alike.
    pub prefix_cache: bool,
    /// Share of the device's memory that this worker may use in all, above 0, at most 1.
    pub memory_utilization: f64,
    /// Bytes of freed buffers that MLX may keep.
    pub buffer_cache_bytes: usize,
}

impl EngineConfig {
    /// The knobs' defaults for a model's folder, with a small KV cache: for tests and tools.
    #[must_use]
    pub fn new(model: PathBuf) -> Self {
        Self {
            model,
            mapped: true,
            dequantize: Dequantize::Auto,
            attention: AttentionChoice::Auto,
            context_length: None,
            max_running: 4,
            max_waiting: 64,
            max_wait: None,
            prefill_chunk: 512,
            step_budget: 1 << 24,
            watchdog: Duration::from_secs(120),
            kv_bytes: Some(64 << 20),
            kv_share: None,
            max_blocks: None,
            block_size: 32,
            kv_quantization: None,
            generation_share: kv_cache::GENERATION_SHARE,
            prefix_cache: true,
            memory_utilization: 0.5,
            buffer_cache_bytes: 64 << 20,
        }
    }

    /// Requests that can run and wait at the same time.
    fn capacity(&self) -> usize {
        self.max_running.saturating_add(self.max_waiting)
    }
}

/// Why the engine could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The model could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A knob asks for more than the model has.
    #[error("--context-length {asked}: the model knows {known} positions")]
    Context {
        /// What was asked for.
        asked: usize,
        /// `max_position_embeddings`.
        known: usize,
    },
    /// It does not fit into the memory that the worker may use.
    #[error(transparent)]
    Memory(#[from] DoesNotFit),
    /// Keys and values cannot be quantised in groups that do not divide a head.
    #[error(
        "--kv-cache-quantization-group-size {group_size}: it does not divide the model's head size, {head_size}{}",
        groups(*.head_size)
    )]
    KvGroupSize {
        /// What was asked for.
        group_size: u8,
        /// Elements of a head's key or value.
        head_size: i32,
    },
    /// The attention that was insisted on is not to be had.
    #[error("--attention kernel: {0}")]
    Attention(String),
    /// The first prefill and decode failed.
    #[error("warm-up: {0}")]
    WarmUp(String),
    /// The thread could not be started, or ended without a word.
    #[error("engine thread: {0}")]
    Thread(String),
}

/// What to ask for instead.
fn groups(head_size: i32) -> String {
    let fit: Vec<String> = [32, 64, 128]
        .into_iter()
        .filter(|group| head_size % group == 0)
        .map(|group: i32| group.to_string())
        .collect();
    match fit.as_slice() {
        [] => "; no group size does, so this model's KV cache cannot be quantised".to_owned(),
        fit => format!("; there is {}", fit.join(" or ")),
    }
}

/// Handle of a running engine.
#[derive(Debug)]
pub struct Engine {
    commands: mpsc::SyncSender<Command>,
    counters: Arc<Counters>,
    state: watch::Receiver<EngineState>,
    info: ModelInfo,
    /// Set once, by [`Backend::stop`]; the thread looks at it on every turn.
    stopping: Arc<AtomicBool>,
    thread: Mutex<Option<Thread>>,
}

/// The engine's thread.
#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    /// Closed when it has let go of everything that is MLX's.
    ended: mpsc::Receiver<()>,
}

/// How long a handle that is dropped waits for its thread. A step that never ends is not waited for.
const PARTING: Duration = Duration::from_secs(5);

impl Engine {
    /// Starts the engine's thread and loads the model there. Returns when a real prefill and decode have run.
    ///
    /// # Errors
    ///
    /// See [`StartError`].
    pub async fn start(
        config: EngineConfig,
        mut progress: impl FnMut(LoadProgress) + Send + 'static,
    ) -> Result<Self, StartError> {
        let counters = Arc::new(Counters::new());
        // Room for every request that may be there at a time; one more for the wake-up of `stop`.
        let (commands, inbox) = mpsc::sync_channel(config.capacity() + 1);
        let (state_sender, state) = watch::channel(EngineState::Running);
        let (ready_sender, ready) = oneshot::channel();
        let stopping = Arc::new(AtomicBool::new(false));
        let (for_thread, stop_thread) = (Arc::clone(&counters), Arc::clone(&stopping));
        let (end, ended) = mpsc::channel::<()>();
        let handle = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _end = end;
                run::thread(
                    config,
                    &for_thread,
                    &inbox,
                    &stop_thread,
                    &state_sender,
                    ready_sender,
                    &mut progress,
                );
            })
            .map_err(|error| StartError::Thread(error.to_string()))?;
        let info = ready
            .await
            .map_err(|_| StartError::Thread("it ended while the model was loading".to_owned()))??;
        Ok(Self {
            commands,
            counters,
            state,
            info,
            stopping,
            thread: Mutex::new(Some(Thread { handle, ended })),
        })
    }
}

/// With the handle goes the engine: when this returns, nothing of MLX is in use any more. A process that ends while a thread
/// still frees arrays takes MLX's allocator away from under it.
impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        if let Some(Thread { handle, ended }) = self.thread.get_mut().take()
            && ended.recv_timeout(PARTING) == Err(mpsc::RecvTimeoutError::Disconnected)
        {
            let _ = handle.join();
        }
    }
}

impl Backend for Engine {
    fn submit_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<Generation>, SubmitError> {
        if self.stopping.load(Relaxed) {
            return Err(SubmitError::Stopped);
        }
        if let EngineState::Dead(reason) = &*self.state.borrow() {
            return Err(SubmitError::Dead(reason.clone()));
        }
        let mut generations = Vec::with_capacity(requests.len());
        let mut group = Vec::with_capacity(requests.len());
        for request in requests {
            self.fits(request.prompt.len())?;
            let place = self
                .counters
                .place(self.info.capacity)
                .map_err(|taken| SubmitError::QueueFull {
                    waiting: taken.saturating_sub(self.counters.running.load(Relaxed)),
                    retry_after: self.counters.next_place(),
                })?;
            let (sender, events) = tokio::sync::mpsc::channel(event_capacity(request.max_tokens));
            group.push(Arrival {
                request,
                events: sender,
                place,
            });
            generations.push(Generation { events });
        }
        for arrival in &mut group {
            arrival.place.hold();
        }
        // There is room for as many as have a place, so that a failure means that the thread is gone.
        self.commands
            .try_send(Command::Generate(group))
            .map_err(|_| SubmitError::Stopped)?;
        Ok(generations)
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        self.counters.read()
    }

    fn weights_lost(&self) -> bool {
        self.counters.weights_lost.load(Relaxed)
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.state.clone()
    }

    fn stop(&self) {
        self.stopping.store(true, Relaxed);
        // A busy thread sees the flag on its next turn; an idle one is woken.
        let _ = self.commands.try_send(Command::Wake);
    }
}

impl Engine {
    /// Whether a prompt of so many tokens can ever run.
    fn fits(&self, prompt_tokens: usize) -> Result<(), SubmitError> {
        let context_length = self.info.context_length;
        if prompt_tokens >= context_length {
            return Err(SubmitError::TooLong {
                prompt_tokens,
                context_length,
            });
        }
        let (tokens, bytes) = (self.info.kv_capacity_tokens, self.info.kv_capacity_bytes);
        if prompt_tokens >= tokens {
            return Err(SubmitError::NeverFits(format!(
                "the prompt has {prompt_tokens} tokens, but the KV cache of this worker holds {tokens} tokens in \
                 {bytes} bytes (--cache-memory-mb), the reply's included"
            )));
        }
        Ok(())
    }
}

/// What `/status` and the `ready` line tell of the effective limits.
fn limits(
    config: &EngineConfig,
    plan: &MemoryPlan,
    context_length: usize,
    options: LoadOptions,
    storage: Storage,
) -> Limits {
    let mut limits = plan.limits();
    let value = json!({
        "context_length": context_length,
        "max_running": config.max_running,
        "max_waiting": config.max_waiting,
        "max_wait_seconds": config.max_wait.map(|wait| wait.as_secs_f64()),
        "prefill_chunk": config.prefill_chunk,
        "step_budget": config.step_budget,
        "prefix_cache": config.prefix_cache,
        "weights_mapped_bytes": storage.mapped_bytes,
        "weights_in_place": storage.in_place,
        "weights_copied_bytes": storage.copied_bytes,
        "weights_expanded": options.expand,
        "mlx_max_ops_per_buffer": device::setting(device::MAX_OPS_PER_BUFFER),
        "mlx_max_mb_per_buffer": device::setting(device::MAX_MB_PER_BUFFER),
    });
    if let serde_json::Value::Object(map) = value {
        limits.extend(map);
    }
    limits
}

type Limits = serde_json::Map<String, serde_json::Value>;
