//! One request on its way through the engine.

use constraint::{Allowed, Walk};
use mlx_rs::Array;
use tokio::sync::mpsc;

use super::sampler::{History, Sampler};
use super::stats::Place;
use super::stepper::Stepper;
use crate::backend::{
    EngineError, FinishReason, GenerateRequest, GenerationEvent, Miss, SamplingParams, TokenLogprobs, Usage,
};

/// What the engine keeps of a request once its prompt is with the scheduler.
#[derive(Debug)]
pub(super) struct Sequence {
    events: mpsc::Sender<GenerationEvent>,
    _place: Place,
    pub(super) sampler: Sampler,
    /// Of the draws so far, while they are not part of a step in flight.
    pub(super) history: Option<History>,
    /// Where the reply is in the form that it has to have.
    walk: Option<Walk>,
    stop_tokens: Vec<u32>,
    /// The reply does not end before so many tokens.
    min_tokens: usize,
    /// All tokens but those that end it, while it may not end.
    going_on: Option<Array>,
    prompt_tokens: usize,
    cached_tokens: usize,
    /// The prompt has been computed once, and the reader knows all that was cached of it.
    told: bool,
    /// Why its prompt was not found in the cache, to be told when it starts.
    pub(super) miss: Option<Box<Miss>>,
    /// Most tokens to generate: what was asked for, or what the context has room for.
    limit: usize,
    /// Tokens sent to the reader or, for the last one, drawn as a stop token.
    generated: usize,
}

/// What became of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// There is more to do.
    Goes,
    /// The reply is complete, and its reader has been told.
    Done,
}

impl Sequence {
    pub(super) fn new(
        request: &GenerateRequest,
        events: mpsc::Sender<GenerationEvent>,
        place: Place,
        limit: usize,
    ) -> Self {
        let sampling: SamplingParams = request.sampling.clone();
        Self {
            events,
            _place: place,
            sampler: Sampler::new(sampling, &request.prompt, request.logprobs),
            history: None,
            walk: request
                .constraint
                .as_ref()
                .map(|asked| asked.form.walk(asked.opening.clone(), &request.stop_tokens)),
            stop_tokens: request.stop_tokens.clone(),
            min_tokens: request.sampling.min_tokens,
            going_on: None,
            prompt_tokens: request.prompt.len(),
            cached_tokens: 0,
            told: false,
            miss: None,
            limit,
            generated: 0,
        }
    }

    /// The reader has gone away.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// What it may draw next depends on what it has drawn.
    pub(super) fn is_constrained(&self) -> bool {
        self.walk.as_ref().is_some_and(Walk::is_constrained)
    }

    /// What it may draw next by its form; `None`: anything.
    pub(super) fn allowed(&mut self) -> Result<Option<Allowed>, EngineError> {
        let Some(walk) = &mut self.walk else {
            return Ok(None);
        };
        let mut allowed = walk.allowed().map_err(|error| constraint_error(&error))?;
        if self.generated < self.min_tokens
            && let Some(allowed) = &mut allowed
        {
            allowed.rather_not(&self.stop_tokens);
        }
        Ok(allowed)
    }

    /// What it may draw without a form when the token at this position is the newest, read or not; `None`: anything. No
    /// other row of its step can tell.
    pub(super) fn going_on(&mut self, position: usize, stepper: &Stepper) -> Option<Array> {
        let drawn = (position + 1).saturating_sub(self.prompt_tokens);
        if drawn >= self.min_tokens || self.stop_tokens.is_empty() {
            self.going_on = None;
            return None;
        }
        let flags = self
            .going_on
            .get_or_insert_with(|| stepper.all_but(&self.stop_tokens));
        Some(flags.clone())
    }

    /// As [`Self::going_on`], when all of its tokens have been read.
    pub(super) fn going_on_read(&mut self, stepper: &Stepper) -> Option<Array> {
        self.going_on((self.prompt_tokens + self.generated).saturating_sub(1), stepper)
    }

    /// Its prefill begins.
    pub(super) fn start(&mut self, cached_tokens: usize) {
        self.cached_tokens = cached_tokens;
        let miss = self.miss.take();
        self.send(GenerationEvent::Started { cached_tokens, miss });
    }

    /// The last part of its prompt is computed: of all parts so many tokens were cached.
    pub(super) fn computed(&mut self, cached_tokens: usize) {
        // A preempted one is computed again, which is nothing to its reader.
        if !std::mem::replace(&mut self.told, true) && cached_tokens != self.cached_tokens {
            self.cached_tokens = cached_tokens;
            self.send(GenerationEvent::Reused { cached_tokens });
        }
    }

    /// Tells the reader that nothing more will come.
    pub(super) fn fail(&self, error: EngineError) {
        self.send(GenerationEvent::Failed(error));
    }

    /// A token has been drawn and read.
    pub(super) fn take(&mut self, id: u32, logprob: Option<TokenLogprobs>) -> Outcome {
        self.generated += 1;
        if self.stop_tokens.contains(&id) {
            self.finish(FinishReason::Stop);
            return Outcome::Done;
        }
        let complete = match self.walk.as_mut().map_or(Ok(false), |walk| walk.take(id)) {
            Ok(complete) => complete,
            Err(error) => {
                self.send(GenerationEvent::Failed(constraint_error(&error)));
                return Outcome::Done;
            }
        };
        self.send(GenerationEvent::Token { id, logprob });
        if complete {
            self.finish(FinishReason::Stop);
            return Outcome::Done;
        }
        if self.generated >= self.limit {
            self.finish(FinishReason::Length);
            return Outcome::Done;
        }
        Outcome::Goes
    }

    fn finish(&self, reason: FinishReason) {
        let usage = Usage {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            completion_tokens: self.generated,
        };
        self.send(GenerationEvent::Finished { reason, usage });
    }

    /// The channel has room for every event that a request can cause; a send fails only when the reader is gone,
    /// which the next step notices.
    fn send(&self, event: GenerationEvent) {
        let _ = self.events.try_send(event);
    }
}

fn constraint_error(error: &constraint::WalkError) -> EngineError {
    EngineError::Constraint(error.to_string())
}
