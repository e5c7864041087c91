//! One request on its way through the engine: prompt in chunks, then token by token, one step ahead of its reader.

use mlx_rs::Array;
use mlx_rs::error::Result;
use mlx_rs::transforms::{async_eval, eval};
use tokio::sync::mpsc;

use super::sampler::{Draw, DrawnLogprobs, Sampler};
use super::stats::Place;
use crate::backend::{EngineError, FinishReason, GenerateRequest, GenerationEvent, TokenLogprobs, Usage};
use crate::model::Model;
use crate::model::cache::SequenceCache;

/// A request with its cache and its own sampler.
#[derive(Debug)]
pub(super) struct Sequence {
    request: GenerateRequest,
    events: mpsc::Sender<GenerationEvent>,
    _place: Place,
    cache: SequenceCache,
    sampler: Sampler,
    /// Prompt tokens already in the cache.
    prefilled: usize,
    /// Most tokens to generate: what was asked for, or what the context has room for.
    limit: usize,
    /// Tokens sent to the reader or, for the last one, drawn as a stop token.
    generated: usize,
    /// Drawn but not read yet.
    ahead: Option<Draw>,
}

/// What became of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// There is more to do.
    Goes,
    /// It is complete, and its reader has been told.
    Done,
}

impl Sequence {
    pub(super) fn new(
        model: &Model,
        request: GenerateRequest,
        events: mpsc::Sender<GenerationEvent>,
        context_length: usize,
        place: Place,
    ) -> Result<Self> {
        let sampler = Sampler::new(
            request.sampling.clone(),
            &request.prompt,
            model.config().vocab,
            request.logprobs,
        )?;
        let limit = request
            .max_tokens
            .min(context_length.saturating_sub(request.prompt.len()));
        Ok(Self {
            cache: model.new_cache(),
            request,
            events,
            _place: place,
            sampler,
            prefilled: 0,
            limit,
            generated: 0,
            ahead: None,
        })
    }

    /// The reader has gone away.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    pub(super) fn is_prefilling(&self) -> bool {
        self.prefilled < self.request.prompt.len()
    }

    /// Bytes of keys and values.
    pub(super) fn kv_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Tells the reader that nothing more will come.
    pub(super) fn fail(self, error: EngineError) {
        self.send(GenerationEvent::Failed(error));
    }

    /// Computes the next chunk of the prompt, at most `chunk` tokens; with the last one the first draw is under way.
    /// Returns how many tokens were computed.
    pub(super) fn prefill(&mut self, model: &Model, chunk: usize) -> Result<usize> {
        if self.prefilled == 0 {
            self.send(GenerationEvent::Started { cached_tokens: 0 });
        }
        let end = self.request.prompt.len().min(self.prefilled + chunk);
        let tokens = self.request.prompt.get(self.prefilled..end).unwrap_or_default();
        let count = tokens.len();
        let length = i32::try_from(count).unwrap_or(i32::MAX);
        let hidden = model.forward(&Array::from_slice(tokens, &[1, length]), &mut self.cache)?;
        self.prefilled = end;
        if self.is_prefilling() {
            // Nothing but the cache is wanted of this chunk; waiting here bounds the work in flight to one chunk.
            eval(self.cache.arrays())?;
        } else {
            let draw = self.sampler.draw(&model.last_logits(&hidden)?)?;
            async_eval(draw.arrays())?;
            self.ahead = Some(draw);
        }
        Ok(count)
    }

    /// Puts the step after the one in flight on its way, so that the device never waits for the reader. Does nothing
    /// when the one in flight is the last.
    pub(super) fn start_next(&mut self, model: &Model) -> Result<Option<Draw>> {
        let Some(ahead) = &self.ahead else { return Ok(None) };
        if self.generated + 1 >= self.limit {
            return Ok(None);
        }
        let hidden = model.forward(&ahead.token, &mut self.cache)?;
        let draw = self.sampler.draw(&model.last_logits(&hidden)?)?;
        async_eval(draw.arrays())?;
        Ok(Some(draw))
    }

    /// Reads the draw in flight, waiting for it, and sends its token; `next` takes its place.
    pub(super) fn finish_step(&mut self, next: Option<Draw>) -> Result<Outcome> {
        let Some(draw) = std::mem::replace(&mut self.ahead, next) else {
            return Ok(Outcome::Goes);
        };
        let id = draw
            .token
            .try_item_cast::<u32>()
            .map_err(|error| to_exception(&error))?;
        self.generated += 1;
        if self.request.stop_tokens.contains(&id) {
            self.finish(FinishReason::Stop);
            return Ok(Outcome::Done);
        }
        let logprob = draw.logprobs.as_ref().map(read_logprobs).transpose()?;
        self.send(GenerationEvent::Token { id, logprob });
        if self.generated >= self.limit {
            self.finish(FinishReason::Length);
            return Ok(Outcome::Done);
        }
        Ok(Outcome::Goes)
    }

    fn finish(&mut self, reason: FinishReason) {
        let usage = Usage {
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: 0,
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

fn read_logprobs(drawn: &DrawnLogprobs) -> Result<TokenLogprobs> {
    let logprob = drawn
        .own
        .try_item_cast::<f32>()
        .map_err(|error| to_exception(&error))?;
    let top = match &drawn.top {
        None => Vec::new(),
        Some((ids, values)) => {
            let ids = ids.to_vec_cast::<u32>().map_err(|error| to_exception(&error))?;
            let values = values
                .to_vec_cast::<f32>()
                .map_err(|error| to_exception(&error))?;
            ids.into_iter().zip(values).collect()
        }
    };
    Ok(TokenLogprobs { logprob, top })
}

fn to_exception(error: &mlx_rs::error::ConversionError) -> mlx_rs::error::Exception {
    mlx_rs::error::Exception::custom(error.to_string())
}
