//! What all requests share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use api_types::ApiError;
use chat_format::{ChatTemplate, ReasoningFormat, ToolFormat};
use serde_json::{Map, Value};
use tokio::sync::watch;

use super::constrain::Compiler;
use super::errors;
use super::footprint::{Footprint, FootprintReading, LoadReport};
use super::metrics::Metrics;
use super::requests::Requests;
use crate::backend::{Backend, EngineState, EngineStats, SamplingParams};
use crate::text::TextTokenizer;

/// How chats are written and read.
#[derive(Debug)]
pub struct ChatFormat {
    /// The model's own template.
    pub template: ChatTemplate,
    /// Markup of tool calls; [`ToolFormat::None`] for a model that knows none.
    pub tool_format: ToolFormat,
    /// Why calls of this model stay text although its template takes tools: the markup that it teaches.
    pub unknown_tools: Option<&'static str>,
    /// Which reasoning to take out of the text.
    pub reasoning: ReasoningFormat,
    /// Parse tool calls when a request brings tools and leaves the choice to the model.
    pub auto_tools: bool,
    /// Variables for the template, under the request's own.
    pub template_kwargs: Map<String, Value>,
}

/// Limits and defaults of the HTTP layer.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// The model's name in the API.
    pub served_model: String,
    /// Further names that requests may use for it.
    pub aliases: Vec<String>,
    /// Whatever name a request uses is this model's: a proxy has chosen already.
    pub any_model: bool,
    /// Key that requests must carry.
    pub api_key: Option<String>,
    /// Length of a reply when the request does not say.
    pub default_max_tokens: usize,
    /// Longest reply that may be asked for; larger wishes are clamped.
    pub max_request_tokens: usize,
    /// Sampling when the request does not say.
    pub sampling: SamplingParams,
    /// The model's end-of-sequence ids.
    pub eos_tokens: Vec<u32>,
    /// Silence after which a comment is sent, and the wait before a stream's headers go out without a token.
    pub keep_alive: Duration,
    /// Silence of request and engine after which a request is given up.
    pub silence_limit: Duration,
    /// Longest wait for a place.
    pub queue_limit: Duration,
    /// Longest compilation of a form that a request asks for, and longest wait for a compiler.
    pub compile_limit: Duration,
    /// Time without a step, with requests running, after which the worker no longer calls itself healthy; `None`: never.
    pub stall_limit: Option<Duration>,
    /// Largest body, in bytes.
    pub max_body: usize,
    /// Serve `/metrics`.
    pub metrics: bool,
    /// What loading the model took.
    pub load: LoadReport,
}

impl Default for HttpConfig {
    /// For tests: the knobs' defaults, greedy.
    fn default() -> Self {
        Self {
            served_model: "model".to_owned(),
            aliases: Vec::new(),
            any_model: false,
            api_key: None,
            default_max_tokens: 8192,
            max_request_tokens: 8192,
            sampling: SamplingParams::greedy(),
            eos_tokens: Vec::new(),
            keep_alive: Duration::from_secs(5),
            silence_limit: Duration::from_secs(300),
            queue_limit: Duration::from_secs(300),
            compile_limit: Duration::from_secs(10),
            stall_limit: Some(Duration::from_secs(60)),
            max_body: 64 << 20,
            metrics: true,
            load: LoadReport::default(),
        }
    }
}

/// What a [`Service`] is made of.
pub struct ServiceParts {
    /// Limits and defaults.
    pub config: HttpConfig,
    /// The model's tokenizer.
    pub tokenizer: TextTokenizer,
    /// `None` for a model without a chat template, which serves completions only.
    pub chat: Option<ChatFormat>,
    /// The engine.
    pub backend: Arc<dyn Backend>,
}

/// The shared state of the HTTP layer.
pub struct Service {
    pub(super) config: HttpConfig,
    pub(super) tokenizer: TextTokenizer,
    pub(super) chat: Option<ChatFormat>,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) metrics: Metrics,
    pub(super) requests: Requests,
    pub(super) compiler: Compiler,
    footprint: Footprint,
    /// Seconds since 1970 at the start; the model's `created`.
    pub(super) created: u64,
    pub(super) started: Instant,
    engine: watch::Receiver<EngineState>,
    /// Why the engine is as good as dead, although it does not say so itself.
    declared: watch::Sender<Option<String>>,
    draining: AtomicBool,
    in_flight: watch::Sender<usize>,
}

impl Service {
    /// Puts the parts together.
    #[must_use]
    pub fn new(parts: ServiceParts) -> Arc<Self> {
        let ServiceParts {
            config,
            tokenizer,
            chat,
            backend,
        } = parts;
        let footprint = Footprint::new(&backend.info().limits);
        let service = Arc::new(Self {
            config,
            tokenizer,
            chat,
            engine: backend.state(),
            backend,
            metrics: Metrics::default(),
            requests: Requests::default(),
            compiler: Compiler::default(),
            footprint,
            created: unix_seconds(),
            started: Instant::now(),
            declared: watch::Sender::new(None),
            draining: AtomicBool::new(false),
            in_flight: watch::Sender::new(0),
        });
        service.look_at_footprint();
        service
    }

    /// Refuses requests from now on with 503; those that are in flight go on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
    }

    /// Whether [`Self::drain`] has been called.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Requests that have not been answered to the end.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        *self.in_flight.borrow()
    }

    /// Returns when no request is in flight.
    pub async fn idle(&self) {
        // The sender lives as long as `self`.
        let _ = self.in_flight.subscribe().wait_for(|n| *n == 0).await;
    }

    /// The model's name in the API.
    #[must_use]
    pub fn served_model(&self) -> &str {
        &self.config.served_model
    }

    /// Whether the engine lives.
    #[must_use]
    pub fn engine_state(&self) -> watch::Receiver<EngineState> {
        self.engine.clone()
    }

    /// The engine's numbers.
    #[must_use]
    pub fn engine_stats(&self) -> EngineStats {
        self.backend.stats()
    }

    /// What the last look at the process's memory found.
    #[must_use]
    pub fn footprint(&self) -> FootprintReading {
        self.footprint.last()
    }

    /// Looks at the process's memory, and warns when it leaves the plan. To be called once a second: looks are counted.
    pub fn look_at_footprint(&self) -> FootprintReading {
        let stats = self.backend.stats();
        self.footprint
            .look(stats.active_bytes.saturating_add(stats.buffer_cache_bytes))
    }

    /// Ends the engine; what still runs gets an error.
    pub fn stop_engine(&self) {
        self.backend.stop();
    }

    /// Gives the engine up, for this reason: requests that run or come fail with it.
    pub fn declare_dead(&self, reason: String) {
        self.declared.send_replace(Some(reason));
    }

    /// Whether [`Self::declare_dead`] has been called: the engine's thread may be anywhere, for ever.
    #[must_use]
    pub fn is_declared_dead(&self) -> bool {
        self.declared.borrow().is_some()
    }

    /// Returns when the engine is dead, by its own account or by declaration, with the reason.
    pub async fn dead(&self) -> String {
        let (mut engine, mut declared) = (self.engine.clone(), self.declared.subscribe());
        tokio::select! {
            // An error: the engine's end of the channel is gone without a word.
            _ = engine.wait_for(|state| *state != EngineState::Running) => {}
            _ = declared.wait_for(Option::is_some) => {}
        }
        self.death()
            .unwrap_or_else(|| "it ended without a word".to_owned())
    }

    /// Counts a request in, unless none is taken any more.
    pub(super) fn enter(self: &Arc<Self>) -> Result<InFlight, ApiError> {
        if let Some(reason) = self.death() {
            return Err(errors::engine_dead(&reason));
        }
        // Counted before the look at the flag, so that a drain that saw zero has seen this one refused.
        self.in_flight.send_modify(|n| *n += 1);
        let guard = InFlight {
            service: Arc::clone(self),
        };
        if self.is_draining() {
            return Err(ApiError::unavailable(
                "draining",
                "this worker is shutting down and takes no new requests",
                Some(1),
            ));
        }
        Ok(guard)
    }

    /// Why the engine is dead, if it is.
    pub(super) fn death(&self) -> Option<String> {
        if let Some(reason) = &*self.declared.borrow() {
            return Some(reason.clone());
        }
        match &*self.engine.borrow() {
            EngineState::Running => None,
            EngineState::Dead(reason) => Some(reason.clone()),
        }
    }

    /// Whether a request for this model name is for us.
    ///
    /// # Errors
    /// 404 with the name that would do.
    pub(super) fn check_model(&self, name: Option<&str>) -> Result<(), ApiError> {
        let served = &self.config.served_model;
        match name {
            Some(name)
                if !self.config.any_model
                    && name != served
                    && !self.config.aliases.iter().any(|a| a == name) =>
            {
                Err(ApiError::model_not_found(format!(
                    "model: {name:?} is not served here; {served:?} is"
                )))
            }
            _ => Ok(()),
        }
    }
}

/// One request in flight, as long as this lives.
pub(super) struct InFlight {
    service: Arc<Service>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.service.in_flight.send_modify(|n| *n = n.saturating_sub(1));
    }
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
