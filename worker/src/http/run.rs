//! All replies of one request: the next event, silence, time limits, accounting.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use api_types::ApiError;
use api_types::openai::{FinishReason, PromptTokensDetails, Usage};
use chat_format::Delta;
use tokio::time::Instant;

use super::choice::Choice;
use super::errors;
use super::metrics::{Outcome, Route};
use super::requests::{Registered, Requests};
use super::service::{InFlight, Service};
use crate::backend::{EngineError, GenerationEvent};

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
    registered: Registered,
    /// Choices that share a prompt, whose tokens count once.
    per_prompt: usize,
    next: usize,
    /// Of the last event, and of the last sign of life to the client.
    last_event: Instant,
    last_sign: Instant,
    started: bool,
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
    /// `id`: as the client will see it. `per_prompt` choices in a row share a prompt.
    pub(super) fn new(
        service: &Arc<Service>,
        account: Account,
        id: &str,
        choices: Vec<Choice>,
        per_prompt: usize,
    ) -> Self {
        let now = Instant::now();
        let registered = Requests::register(service, id, account.route, account.arrived);
        Self {
            registered,
            choices,
            deltas: Vec::new(),
            service: Arc::clone(service),
            account,
            per_prompt: per_prompt.max(1),
            next: 0,
            last_event: now,
            last_sign: now,
            started: false,
        }
    }

    /// Waits for the next thing to tell. Cancel-safe: an event is taken and worked on without waiting in between.
    ///
    /// # Errors
    /// The engine's, or a time limit; the run is over then.
    pub(super) async fn step(&mut self, keep_alive: Duration) -> Result<Step, ApiError> {
        loop {
            if self.choices.iter().all(|choice| choice.events.is_none()) {
                return Ok(Step::Done);
            }
            let sign = self.last_sign + keep_alive;
            let wake = sign.min(self.deadline());
            let (index, event) = tokio::select! {
                biased;
                event = next_event(&mut self.choices, self.next) => event,
                error = self.registered.cancelled() => {
                    let error = self.give_up(error);
                    self.account.outcome = Outcome::Cancelled;
                    return Err(error);
                }
                // An engine that hangs closes no channel. One that ends has said more than that it is dead.
                reason = self.service.dead() => match ready_event(&mut self.choices, self.next) {
                    Some(event) => event,
                    None => return Err(self.give_up(errors::engine_dead(&reason))),
                },
                () = tokio::time::sleep_until(wake) => {
                    self.check_limits()?;
                    if Instant::now() >= sign {
                        self.last_sign = Instant::now();
                        return Ok(Step::Silence);
                    }
                    continue;
                }
            };
            if let Some(step) = self.take(index, event)? {
                return Ok(step);
            }
        }
    }

    /// What has happened already; `None` when the next step would have to wait.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub(super) fn try_step(&mut self) -> Result<Option<Step>, ApiError> {
        loop {
            let ready = ready_event(&mut self.choices, self.next);
            let Some((index, event)) = ready else {
                return Ok(None);
            };
            if let Some(step) = self.take(index, event)? {
                return Ok(Some(step));
            }
        }
    }

    fn take(&mut self, index: usize, event: Option<GenerationEvent>) -> Result<Option<Step>, ApiError> {
        self.next = index + 1;
        self.last_event = Instant::now();
        self.started = true;
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
                let reason = self
                    .service
                    .death()
                    .unwrap_or_else(|| "it ended without a word".to_owned());
                choice.fail(EngineError::Dead(reason))
            }
        };
        match end {
            Ok(None) if self.deltas.is_empty() => Ok(None),
            Ok(end) => {
                self.last_sign = self.last_event;
                Ok(Some(Step::Choice { index, end }))
            }
            Err(error) => Err(self.give_up(errors::from_engine(&error))),
        }
    }

    /// When the limits have to be looked at next.
    fn deadline(&self) -> Instant {
        let limit = if self.started {
            self.service.config.silence_limit
        } else {
            self.service.config.queue_limit
        };
        self.last_event + limit
    }

    fn check_limits(&mut self) -> Result<(), ApiError> {
        if Instant::now() < self.deadline() {
            return Ok(());
        }
        let config = &self.service.config;
        if !self.started {
            let error = errors::from_engine(&EngineError::WaitedTooLong(config.queue_limit));
            return Err(self.give_up(error));
        }
        // A long prefill is silent but steps.
        let age = self.service.backend.stats().last_step_age;
        if age >= config.silence_limit {
            let message = format!(
                "the engine has not stepped for {} s; the request is given up",
                age.as_secs()
            );
            return Err(self.give_up(ApiError::timed_out(message)));
        }
        self.last_event = Instant::now();
        Ok(())
    }

    fn give_up(&mut self, error: ApiError) -> ApiError {
        for choice in &mut self.choices {
            choice.events = None;
        }
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

/// The next event of any choice, taking turns from `first` on.
async fn next_event(choices: &mut [Choice], first: usize) -> (usize, Option<GenerationEvent>) {
    poll_fn(|cx| {
        for index in turns(choices.len(), first) {
            let events = choices.get_mut(index).and_then(|choice| choice.events.as_mut());
            if let Some(Poll::Ready(event)) = events.map(|events| events.poll_recv(cx)) {
                return Poll::Ready((index, event));
            }
        }
        Poll::Pending
    })
    .await
}

/// As [`next_event`], without waiting.
fn ready_event(choices: &mut [Choice], first: usize) -> Option<(usize, Option<GenerationEvent>)> {
    for index in turns(choices.len(), first) {
        let events = choices.get_mut(index).and_then(|choice| choice.events.as_mut());
        if let Some(Ok(event)) = events.map(tokio::sync::mpsc::Receiver::try_recv) {
            return Some((index, Some(event)));
        }
    }
    None
}

fn turns(len: usize, first: usize) -> impl Iterator<Item = usize> {
    (0..len).map(move |i| (first + i) % len.max(1))
}
