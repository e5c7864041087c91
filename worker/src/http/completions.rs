//! `POST /v1/completions`.

use std::sync::Arc;

use api_types::ApiError;
use api_types::openai::{
    Completion, CompletionChoice, CompletionChunks, CompletionLogprobs, FinishReason, Usage,
};
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::BytesMut;
use chat_format::Delta;
use serde_json::Map;

use super::choice::{Choice, PlacedLogprob};
use super::errors::Failure;
use super::metrics::Route;
use super::prompt::{self, CompletionPrompt};
use super::random_id;
use super::reply::{self, Chunks, Whole};
use super::run::{Account, Run};
use super::service::{Service, unix_seconds};
use crate::backend::Generation;

/// The route.
pub(super) async fn handle(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<Response, Failure> {
    let mut account = Account::open(&service, Route::Completions)?;
    let prepared = prompt::prepare(&service, request, prompt::completion).await;
    let opened = prepared.and_then(|prompt| {
        let replies = submit(&service, &prompt)?;
        Ok((prompt, replies))
    });
    let (prompt, replies) = opened.inspect_err(|error| account.failed(error))?;
    let id = format!("cmpl-{}", random_id());
    let (created, model) = (unix_seconds(), service.config.served_model.clone());
    let wants_logprobs = prompt
        .generate
        .first()
        .is_some_and(|request| request.logprobs.is_some());
    let n = prompt.options.n;
    let echoes: Vec<String> = (0..replies.len())
        .map(|index| {
            prompt
                .echo
                .as_ref()
                .and_then(|texts| texts.get(index / n))
                .cloned()
                .unwrap_or_default()
        })
        .collect();
    let run = Run::new(&service, account, &id, replies, &prompt.options);
    let response = if prompt.options.stream {
        let chunks = CompletionChunks::new(&id, created, &model, prompt.options.include_usage);
        reply::streamed(
            &service,
            run,
            CompletionStream {
                chunks,
                wants_logprobs,
                echoes,
            },
            prompt.clamped,
        )
        .await
    } else {
        let choices = echoes
            .into_iter()
            .enumerate()
            .map(|(index, text)| CompletionChoice {
                index,
                text,
                logprobs: wants_logprobs.then(CompletionLogprobs::default),
                finish_reason: FinishReason::Stop,
            })
            .collect();
        let reply = Completion {
            id,
            object: "text_completion".to_owned(),
            created,
            model,
            choices,
            usage: Usage::default(),
        };
        reply::whole(&service, run, CompletionWhole { reply }, prompt.clamped).await
    };
    Ok(response?)
}

/// `n` choices for each prompt.
fn submit(service: &Service, prompt: &CompletionPrompt) -> Result<Vec<(Choice, Generation)>, ApiError> {
    let options = &prompt.options;
    let generations = prompt::submit(service, &prompt.generate, options.n)?;
    let prompts = prompt
        .generate
        .iter()
        .flat_map(|generate| std::iter::repeat_n(generate.prompt.len(), options.n));
    let choice = |(generation, prompt_tokens)| {
        let choice = Choice::new(
            &service.tokenizer,
            prompt_tokens,
            (&options.stop, options.sampling.min_tokens),
            None,
            "",
            false,
        );
        (choice, generation)
    };
    Ok(generations.into_iter().zip(prompts).map(choice).collect())
}

struct CompletionStream {
    chunks: CompletionChunks,
    wants_logprobs: bool,
    /// Of each choice: the prompt's text, when it is to be repeated and has not been yet.
    echoes: Vec<String>,
}

impl Chunks for CompletionStream {
    fn open(&mut self, _out: &mut BytesMut, _choices: usize) {}

    fn piece(
        &mut self,
        out: &mut BytesMut,
        index: usize,
        deltas: &mut Vec<Delta>,
        logprobs: Vec<PlacedLogprob>,
        end: Option<FinishReason>,
    ) {
        let Some(echo) = self.echoes.get_mut(index) else {
            return;
        };
        let mut text = std::mem::take(echo);
        for delta in deltas.drain(..) {
            if let Delta::Content(piece) = delta {
                text.push_str(&piece);
            }
        }
        let logprobs = self.wants_logprobs.then(|| {
            let mut columns = CompletionLogprobs::default();
            append_logprobs(&mut columns, logprobs);
            columns
        });
        self.chunks.text(out, index, &text, logprobs.as_ref(), end);
    }

    fn close(&mut self, out: &mut BytesMut, usage: &Usage) {
        self.chunks.usage(out, usage);
    }
}

struct CompletionWhole {
    reply: Completion,
}

impl Whole for CompletionWhole {
    type Reply = Completion;

    fn piece(
        &mut self,
        index: usize,
        deltas: &mut Vec<Delta>,
        logprobs: Vec<PlacedLogprob>,
        end: Option<FinishReason>,
    ) {
        let Some(choice) = self.reply.choices.get_mut(index) else {
            return;
        };
        for delta in deltas.drain(..) {
            if let Delta::Content(piece) = delta {
                choice.text.push_str(&piece);
            }
        }
        if let Some(columns) = &mut choice.logprobs {
            append_logprobs(columns, logprobs);
        }
        if let Some(reason) = end {
            choice.finish_reason = reason;
        }
    }

    fn finish(mut self, usage: Usage) -> Completion {
        self.reply.usage = usage;
        self.reply
    }
}

/// Rows to columns.
fn append_logprobs(columns: &mut CompletionLogprobs, rows: Vec<PlacedLogprob>) {
    for PlacedLogprob { logprob: row, offset } in rows {
        let top: Map<_, _> = row
            .top_logprobs
            .into_iter()
            .map(|top| (top.token, top.logprob.into()))
            .collect();
        columns.top_logprobs.push(top);
        columns.token_logprobs.push(row.logprob);
        columns.text_offset.push(offset);
        columns.tokens.push(row.token);
    }
}
