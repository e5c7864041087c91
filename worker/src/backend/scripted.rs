//! A backend that plays back scripts: the HTTP layer's partner in tests, with no model behind it.
//!
//! A planner looks at each request and says what happens to it, step by step; the backend keeps what it was asked for
//! and how each request ended, for a test to look at.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use super::{
    Backend, EngineError, EngineState, EngineStats, FinishReason, GenerateRequest, Generation,
    GenerationEvent, ModelInfo, SubmitError, TokenLogprobs, Usage, event_capacity,
};

/// One step of a script.
#[derive(Debug, Clone, PartialEq)]
pub enum Act {
    /// The request leaves the queue, with so many cached tokens.
    Start(usize),
    /// So many tokens turned out to be cached.
    Reuse(usize),
    /// A token.
    Token(u32),
    /// A token with its log-probability (its own, the others').
    TokenWithLogprob(u32, f32, Vec<(u32, f32)>),
    /// Time passes.
    Wait(Duration),
    /// Nothing happens ever again.
    Hang,
    /// The reply is complete. The usage is counted from the script, plus one for a stop token.
    Finish(FinishReason),
    /// The request fails.
    Fail(EngineError),
    /// The engine dies: every request's channel closes without a last event.
    Die(String),
}

/// What happens to one request.
pub type Script = Vec<Act>;

/// `Ok`: the request is queued and goes like this. `Err`: it is refused.
pub type Plan = Result<Script, SubmitError>;

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// By its script.
    Played,
    /// The other side dropped it; seen at this time.
    Cancelled(Instant),
    /// With the engine.
    Died,
}

/// A backend without a model. Needs a tokio runtime.
pub struct ScriptedBackend {
    info: ModelInfo,
    planner: Box<dyn Fn(&GenerateRequest) -> Plan + Send + Sync>,
    shared: Arc<Shared>,
}

struct Shared {
    requests: Mutex<Vec<GenerateRequest>>,
    endings: watch::Sender<Vec<(usize, Ending)>>,
    state: watch::Sender<EngineState>,
    stats: Mutex<EngineStats>,
}

/// What [`ModelInfo::capacity`] says; it is the planner that refuses.
const CAPACITY: usize = 6;

impl ScriptedBackend {
    /// A backend of the given context length and vocabulary, whose requests go as `planner` says.
    pub fn new(
        context_length: usize,
        vocab_size: usize,
        planner: impl Fn(&GenerateRequest) -> Plan + Send + Sync + 'static,
    ) -> Self {
        Self {
            info: ModelInfo {
                architecture: "scripted".to_owned(),
                context_length,
                vocab_size,
                weight_bytes: 0,
                capacity: CAPACITY,
                kv_capacity_tokens: 1 << 20,
                kv_capacity_bytes: 1 << 30,
                limits: serde_json::Map::new(),
            },
            planner: Box::new(planner),
            shared: Arc::new(Shared {
                requests: Mutex::default(),
                endings: watch::Sender::default(),
                state: watch::Sender::new(EngineState::Running),
                stats: Mutex::default(),
            }),
        }
    }

    /// The same with a KV cache of so many tokens.
    #[must_use]
    pub fn with_kv_tokens(mut self, tokens: usize) -> Self {
        self.info.kv_capacity_tokens = tokens;
        self
    }

    /// The same with these effective limits.
    #[must_use]
    pub fn with_limits(mut self, limits: serde_json::Map<String, serde_json::Value>) -> Self {
        self.info.limits = limits;
        self
    }

    /// Everything that was asked for and not refused, in order.
    #[must_use]
    pub fn requests(&self) -> Vec<GenerateRequest> {
        self.shared.requests.lock().clone()
    }

    /// Waits until so many requests have ended; gives each one's number (from 0) and how.
    pub async fn endings(&self, count: usize) -> Vec<(usize, Ending)> {
        let mut endings = self.shared.endings.subscribe();
        // The sender lives as long as `self`.
        match endings.wait_for(|seen| seen.len() >= count).await {
            Ok(seen) => seen.clone(),
            Err(_) => Vec::new(),
        }
    }

    /// Sets the numbers that [`Backend::stats`] gives.
    pub fn set_stats(&self, stats: EngineStats) {
        *self.shared.stats.lock() = stats;
    }
}

impl Backend for ScriptedBackend {
    fn submit_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<Generation>, SubmitError> {
        if let EngineState::Dead(reason) = &*self.shared.state.borrow() {
            return Err(SubmitError::Dead(reason.clone()));
        }
        let planned = requests
            .into_iter()
            .map(|request| Ok(((self.planner)(&request)?, request)))
            .collect::<Result<Vec<_>, _>>()?;
        let play = |(script, request)| self.play(script, request);
        Ok(planned.into_iter().map(play).collect())
    }

    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn stats(&self) -> EngineStats {
        *self.shared.stats.lock()
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.shared.state.subscribe()
    }

    fn stop(&self) {
        self.shared
            .state
            .send_replace(EngineState::Dead("stopped".to_owned()));
    }
}

impl ScriptedBackend {
    fn play(&self, script: Script, request: GenerateRequest) -> Generation {
        let (sender, events) = mpsc::channel(event_capacity(request.max_tokens.max(script.len())));
        let mut player = Player {
            number: {
                let mut requests = self.shared.requests.lock();
                requests.push(request.clone());
                requests.len() - 1
            },
            request,
            sender,
            usage: Usage::default(),
            shared: Arc::clone(&self.shared),
        };
        tokio::spawn(async move {
            let ending = player.play(script).await;
            let number = player.number;
            player
                .shared
                .endings
                .send_modify(|seen| seen.push((number, ending)));
        });
        Generation { events }
    }
}

struct Player {
    number: usize,
    request: GenerateRequest,
    sender: mpsc::Sender<GenerationEvent>,
    usage: Usage,
    shared: Arc<Shared>,
}

impl Player {
    async fn play(&mut self, script: Script) -> Ending {
        self.usage.prompt_tokens = self.request.prompt.len();
        let mut state = self.shared.state.subscribe();
        for act in script {
            let event = match act {
                Act::Wait(_) | Act::Hang => {
                    let duration = if let Act::Wait(duration) = act {
                        duration
                    } else {
                        Duration::MAX
                    };
                    tokio::select! {
                        () = self.sender.closed() => return Ending::Cancelled(Instant::now()),
                        _ = state.wait_for(|state| *state != EngineState::Running) => return Ending::Died,
                        () = sleep(duration) => continue,
                    }
                }
                Act::Die(reason) => {
                    self.shared.state.send_replace(EngineState::Dead(reason));
                    return Ending::Died;
                }
                Act::Start(cached_tokens) => {
                    self.usage.cached_tokens = cached_tokens;
                    GenerationEvent::Started {
                        cached_tokens,
                        miss: None,
                    }
                }
                Act::Reuse(cached_tokens) => {
                    self.usage.cached_tokens = cached_tokens;
                    GenerationEvent::Reused { cached_tokens }
                }
                Act::Token(id) => self.token(id, None),
                Act::TokenWithLogprob(id, logprob, top) => {
                    self.token(id, Some(TokenLogprobs { logprob, top }))
                }
                Act::Finish(reason) => {
                    self.usage.completion_tokens += usize::from(reason == FinishReason::Stop);
                    GenerationEvent::Finished {
                        reason,
                        usage: self.usage,
                    }
                }
                Act::Fail(error) => GenerationEvent::Failed(error),
            };
            if self.sender.try_send(event).is_err() {
                return Ending::Cancelled(Instant::now());
            }
        }
        Ending::Played
    }

    fn token(&mut self, id: u32, logprob: Option<TokenLogprobs>) -> GenerationEvent {
        self.usage.completion_tokens += 1;
        GenerationEvent::Token { id, logprob }
    }
}
