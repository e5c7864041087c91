//! `POST /v1/chat/completions`.

use std::sync::Arc;

use api_types::ApiError;
use api_types::openai::{
    ChatChoice, ChatChunks, ChatCompletion, ChatLogprobs, ChatMessage, FinishReason, FunctionCall,
    TokenLogprob, ToolCall, Usage,
};
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::BytesMut;
use chat_format::{Delivery, Delta, OutputConfig, OutputParser, ParsedOutput};

use super::choice::{Choice, PlacedLogprob};
use super::errors::Failure;
use super::metrics::Route;
use super::prompt::{self, ChatPrompt};
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
    let mut account = Account::open(&service, Route::Chat)?;
    let prepared = prompt::prepare(&service, request, prompt::chat).await;
    let opened = prepared.and_then(|prompt| {
        let replies = submit(&service, &prompt)?;
        Ok((prompt, replies))
    });
    let (prompt, replies) = opened.inspect_err(|error| account.failed(error))?;
    let id = format!("chatcmpl-{}", random_id());
    let (created, model, n) = (unix_seconds(), service.config.served_model.clone(), replies.len());
    let run = Run::new(&service, account, &id, replies, &prompt.options);
    let wants_logprobs = prompt.generate.logprobs.is_some();
    let response = if prompt.options.stream {
        let chunks = ChatChunks::new(&id, created, &model, prompt.options.include_usage);
        reply::streamed(
            &service,
            run,
            ChatStream {
                chunks,
                wants_logprobs,
                unsent: Vec::new(),
            },
            prompt.clamped,
        )
        .await
    } else {
        let whole = ChatWhole {
            id,
            created,
            model,
            wants_logprobs,
            choices: vec![Gathered::default(); n],
        };
        reply::whole(&service, run, whole, prompt.clamped).await
    };
    Ok(response?)
}

fn submit(service: &Service, prompt: &ChatPrompt) -> Result<Vec<(Choice, Generation)>, ApiError> {
    let options = &prompt.options;
    let delivery = if options.stream {
        Delivery::Incremental
    } else {
        Delivery::Whole
    };
    let generations = prompt::submit(service, std::slice::from_ref(&prompt.generate), options.n)?;
    let choice = |generation| {
        let parser = OutputParser::new(OutputConfig {
            tool_format: prompt.tool_format,
            reasoning: prompt.reasoning,
            tools: Arc::clone(&prompt.tools),
            delivery,
            call_id_prefix: format!("call_{}_", random_id()),
        });
        let choice = Choice::new(
            &service.tokenizer,
            prompt.generate.prompt.len(),
            (&options.stop, options.sampling.min_tokens),
            Some(parser),
            prompt.forced.as_ref().map_or("", |forced| &forced.text),
            prompt.single_call,
        );
        (choice, generation)
    };
    Ok(generations.into_iter().map(choice).collect())
}

struct ChatStream {
    chunks: ChatChunks,
    wants_logprobs: bool,
    /// Of each choice, those that no chunk could carry yet: a call's begin and end have no place for them.
    unsent: Vec<Vec<TokenLogprob>>,
}

impl Chunks for ChatStream {
    fn open(&mut self, out: &mut BytesMut, choices: usize) {
        self.unsent.resize_with(choices, Vec::new);
        for index in 0..choices {
            self.chunks.role(out, index);
        }
    }

    fn piece(
        &mut self,
        out: &mut BytesMut,
        index: usize,
        deltas: &mut Vec<Delta>,
        logprobs: Vec<PlacedLogprob>,
        end: Option<FinishReason>,
    ) {
        // They go with the first chunk that can carry them.
        let mut logprobs = self.wants_logprobs.then(|| {
            let mut content = self.unsent.get_mut(index).map(std::mem::take).unwrap_or_default();
            content.extend(logprobs.into_iter().map(|placed| placed.logprob));
            ChatLogprobs { content }
        });
        for delta in deltas.drain(..) {
            match delta {
                Delta::Content(text) | Delta::Malformed { text, .. } => {
                    self.chunks.content(out, index, &text, logprobs.take().as_ref());
                }
                Delta::Reasoning(text) => self.chunks.reasoning(out, index, &text, logprobs.take().as_ref()),
                Delta::ToolCallBegin {
                    index: call,
                    id,
                    name,
                    ..
                } => {
                    self.chunks.tool_call(out, index, call, &id, &name);
                }
                Delta::ToolCallArguments {
                    index: call,
                    fragment,
                } => {
                    self.chunks
                        .tool_arguments(out, index, call, &fragment, logprobs.take().as_ref());
                }
                _ => {}
            }
        }
        if let Some(reason) = end {
            let rest = logprobs.filter(|rest| !rest.content.is_empty());
            self.chunks.finish(out, index, reason, rest.as_ref());
        } else if let (Some(rest), Some(place)) = (logprobs, self.unsent.get_mut(index)) {
            *place = rest.content;
        }
    }

    fn close(&mut self, out: &mut BytesMut, usage: &Usage) {
        self.chunks.usage(out, usage);
    }
}

#[derive(Clone, Default)]
struct Gathered {
    deltas: Vec<Delta>,
    logprobs: Vec<TokenLogprob>,
    end: Option<FinishReason>,
}

struct ChatWhole {
    id: String,
    created: u64,
    model: String,
    wants_logprobs: bool,
    choices: Vec<Gathered>,
}

impl Whole for ChatWhole {
    type Reply = ChatCompletion;

    fn piece(
        &mut self,
        index: usize,
        deltas: &mut Vec<Delta>,
        logprobs: Vec<PlacedLogprob>,
        end: Option<FinishReason>,
    ) {
        if let Some(choice) = self.choices.get_mut(index) {
            choice.deltas.append(deltas);
            choice
                .logprobs
                .extend(logprobs.into_iter().map(|placed| placed.logprob));
            choice.end = end;
        }
    }

    fn finish(self, usage: Usage) -> ChatCompletion {
        let wants_logprobs = self.wants_logprobs;
        let choice = |(index, gathered): (usize, Gathered)| {
            let parsed = ParsedOutput::from_deltas(gathered.deltas);
            let tool_calls: Vec<ToolCall> = parsed
                .tool_calls
                .into_iter()
                .map(|call| ToolCall {
                    id: call.id,
                    kind: "function".to_owned(),
                    function: FunctionCall {
                        name: call.name,
                        arguments: call.arguments,
                    },
                })
                .collect();
            let content = (!parsed.content.is_empty() || tool_calls.is_empty()).then_some(parsed.content);
            let reasoning_content = Some(parsed.reasoning).filter(|text| !text.is_empty());
            ChatChoice {
                index,
                message: ChatMessage {
                    role: "assistant".to_owned(),
                    content,
                    reasoning_content,
                    tool_calls,
                },
                logprobs: wants_logprobs.then_some(ChatLogprobs {
                    content: gathered.logprobs,
                }),
                finish_reason: gathered.end.unwrap_or(FinishReason::Stop),
            }
        };
        ChatCompletion {
            id: self.id,
            object: "chat.completion".to_owned(),
            created: self.created,
            model: self.model,
            choices: self.choices.into_iter().enumerate().map(choice).collect(),
            usage,
        }
    }
}
