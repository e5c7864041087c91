//! All replies of one request: the next event, silence, accounting.

use std::sync::Arc;
use std::time::Duration;

use api_types::ApiError;
use api_types::openai::{FinishReason, GenerationOptions, PromptTokensDetails, Usage};
use chat_format::Delta;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::choice::Choice;
use super::errors;
use super::inlet::{Cut, Inlet, Limits, Own, Taken};
use super::metrics::{Outcome, Route};
use super::requests::{Registered, Requests};
use super::service::{InFlight, Service};
use crate::backend::{EngineError, Generation, GenerationEvent};

/// What has happened to a run.
pub(super) enum Step {
    /// A choice has something to say, in the run's `deltas`; and perhaps has ended with it.
    Choice { index: usize, end: Option<FinishReason> },
    /// Nothing for as long as the client should be left alone.
    Silence,
    /// All choices have ended.
    Done,
}

/// A request being answered. Dropping it cancels whatever still runs.
pub(super) struct Run {
    pub(super) choices: Vec<Choice>,
    /// Of the last [`Step::Choice`].
    pub(super) deltas: Vec<Delta>,
    service: Arc<Service>,
    account: Account,
    inlet: Arc<Inlet>,
    _registered: Registered,
    _watch: Watch,
    /// Choices that share a prompt, whose tokens count once.
    per_prompt: usize,
    /// Of life, to the client.
    last_sign: Instant,
}

/// The task that looks at the limits of time, as long as this lives: see [`Inlet::watch`].
struct Watch(JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drop for Run {
    /// Whoever still holds the inlet does not keep the engine at work.
    fn drop(&mut self) {
        self.inlet.close_all();
    }
}

/// Counts the request when it is over, however it ends.
pub(super) struct Account {
    service: Arc<Service>,
    route: Route,
    outcome: Outcome,
    arrived: Instant,
    first_token: Option<Duration>,
    usage: Usage,
    _in_flight: InFlight,
}

impl Account {
    /// Counts a request in.
    ///
    /// # Errors
    /// 503 while draining or when the engine is dead.
    pub(super) fn open(service: &Arc<Service>, route: Route) -> Result<Self, ApiError> {
        match service.enter() {
            Ok(in_flight) => {
                let service = Arc::clone(service);
                Ok(Self {
                    service,
                    route,
                    outcome: Outcome::Cancelled,
                    arrived: Instant::now(),
                    first_token: None,
                    usage: Usage::default(),
                    _in_flight: in_flight,
                })
            }
            Err(error) => {
                service.metrics.request(route, Outcome::ServerError);
                Err(error)
            }
        }
    }

    /// Notes why a request fails.
    pub(super) fn failed(&mut self, error: &ApiError) {
        self.outcome = if error.status < 500 {
            Outcome::ClientError
        } else {
            Outcome::ServerError
        };
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.service.metrics.request(self.route, self.outcome);
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        tracing::info!(
            route = self.route.name(),
            outcome = self.outcome.name(),
            prompt_tokens = self.usage.prompt_tokens,
            cached_tokens = self.usage.prompt_tokens_details.cached_tokens,
            completion_tokens = self.usage.completion_tokens,
            first_token_ms = self.first_token.map(millis),
            total_ms = millis(self.arrived.elapsed()),
            "request"
        );
    }
}

impl Run {
    /// `id`: as the client will see it. `n` choices in a row share a prompt.
    pub(super) fn new(
        service: &Arc<Service>,
        account: Account,
        id: &str,
        replies: Vec<(Choice, Generation)>,
        options: &GenerationOptions,
    ) -> Self {
        let (choices, channels) = replies
            .into_iter()
            .map(|(choice, generation)| (choice, generation.events))
            .unzip();
        let inlet = Inlet::new(channels);
        let limits = Limits {
            own: options.timeout.map(|limit| match options.stream {
                true => Own::Quiet(limit),
                false => Own::Whole {
                    arrived: account.arrived,
                    limit,
                },
            }),
            queue: service.config.queue_limit,
            silence: service.config.silence_limit,
        };
        let (watched, by) = (Arc::clone(&inlet), Arc::clone(service));
        let watch = tokio::spawn(async move { watched.watch(&limits, &by).await });
        Self {
            _registered: Requests::register(service, id, account.route, account.arrived, &inlet),
            _watch: Watch(watch),
            inlet,
            choices,
            deltas: Vec::new(),
            service: Arc::clone(service),
            account,
            per_prompt: options.n.max(1),
            last_sign: Instant::now(),
        }
    }

    /// Waits for the next thing to tell. Cancel-safe: an event is taken and worked on without waiting in between.
    ///
    /// # Errors
    /// The engine's, a limit of time, or a cancellation; the run is over then.
    pub(super) async fn step(&mut self, keep_alive: Duration) -> Result<Step, ApiError> {
        loop {
            let sign = self.last_sign + keep_alive;
            let taken = tokio::select! {
                biased;
                taken = self.inlet.take() => taken,
                // An engine that hangs closes no channel. One that ends has said more than that it is dead.
                reason = self.service.dead() => match self.inlet.try_take() {
                    Some(taken) => taken,
                    None => return Err(self.give_up(errors::engine_dead(&reason))),
                },
                () = tokio::time::sleep_until(sign) => {
                    self.last_sign = Instant::now();
                    return Ok(Step::Silence);
                }
            };
            if let Some(step) = self.tell(taken)? {
                return Ok(step);
            }
        }
    }

    /// What has happened already; `None` when the next step would have to wait.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub(super) fn try_step(&mut self) -> Result<Option<Step>, ApiError> {
        while let Some(taken) = self.inlet.try_take() {
            if let Some(step) = self.tell(taken)? {
                return Ok(Some(step));
            }
        }
        Ok(None)
    }

    fn tell(&mut self, taken: Taken) -> Result<Option<Step>, ApiError> {
        let (index, event) = match taken {
            Taken::Event { index, event } => (index, event),
            Taken::Done => return Ok(Some(Step::Done)),
            Taken::Cut(Cut { error, outcome }) => {
                self.account.outcome = outcome;
                return Err(error);
            }
        };
        let token = matches!(
            event,
            Some(GenerationEvent::Token { .. } | GenerationEvent::Finished { .. })
        );
        if token && self.account.first_token.is_none() {
            let after = self.account.arrived.elapsed();
            self.account.first_token = Some(after);
            self.service.metrics.first_token(after);
        }
        self.deltas.clear();
        let Some(choice) = self.choices.get_mut(index) else {
            return Ok(None);
        };
        let end = match event {
            Some(event) => choice.event(event, &mut self.deltas),
            None => {
                let reason = self.service.death();
                let reason = reason.unwrap_or_else(|| "it ended without a word".to_owned());
                Err(EngineError::Dead(reason))
            }
        };
        match end {
            Ok(None) if self.deltas.is_empty() => Ok(None),
            Ok(end) => {
                if end.is_some() {
                    self.inlet.close(index);
                }
                self.last_sign = Instant::now();
                Ok(Some(Step::Choice { index, end }))
            }
            Err(error) => Err(self.give_up(errors::from_engine(&error))),
        }
    }

    fn give_up(&mut self, error: ApiError) -> ApiError {
        self.inlet.close_all();
        self.account.failed(&error);
        error
    }

    /// The request has been answered: counts it, and gives what it used.
    pub(super) fn complete(&mut self) -> Usage {
        self.account.outcome = Outcome::Ok;
        let mut usage = Usage::default();
        let mut cached = 0;
        for group in self.choices.chunks(self.per_prompt) {
            usage.prompt_tokens += group.first().map_or(0, |choice| choice.usage().prompt_tokens);
            // Choices of one prompt find parts of it cached by one another; the client's prompt was not.
            cached += match group {
                [one] => one.usage().cached_tokens,
                several => several.first().map_or(0, Choice::cached_at_start),
            };
            usage.completion_tokens += group
                .iter()
                .map(|choice| choice.usage().completion_tokens)
                .sum::<usize>();
        }
        usage.total_tokens = usage.prompt_tokens + usage.completion_tokens;
        usage.prompt_tokens_details = PromptTokensDetails {
            cached_tokens: cached,
        };
        self.service
            .metrics
            .tokens(usage.prompt_tokens, cached, usage.completion_tokens);
        self.account.usage = usage;
        usage
    }
}
