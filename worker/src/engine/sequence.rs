//! One request on its way through the engine.

use constraint::{Allowed, Walk};
use tokio::sync::mpsc;

use super::sampler::{History, Sampler};
use super::stats::Place;
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

    /// What it may draw next; `None`: anything.
    pub(super) fn allowed(&mut self) -> Result<Option<Allowed>, EngineError> {
        match &mut self.walk {
            Some(walk) => walk.allowed().map_err(|error| constraint_error(&error)),
            None => Ok(None),
        }
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
    pub(super) fn fail(self, error: EngineError) {
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
