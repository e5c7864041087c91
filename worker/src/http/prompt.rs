//! A checked request to token ids and sampling: work on text, on a thread of its own when there is much of it.

use std::sync::Arc;

use api_types::ApiError;
use api_types::openai::{ChatRequest, CompletionRequest, GenerationOptions, Prompt, Sampling, ToolChoice};
use axum::extract::Request;
use chat_format::{Reasoning, ReasoningFormat, RenderInputs, TemplateError, ToolFormat, ToolSet};
use serde_json::Value;

use constraint::{Constraint, Opening};

use super::constrain::{self, Before};
use super::forced::{Forced, force};
use super::service::Service;
use super::{body, canonical, errors, random_id};
use crate::backend::{Constrained, GenerateRequest, Generation, SamplingParams};

/// Bodies longer than this are parsed, rendered and tokenised off the threads that serve everybody.
const LONG_BODY: usize = 16 << 10;

/// A chat, ready to be generated.
pub(super) struct ChatPrompt {
    pub(super) options: GenerationOptions,
    /// What the engine gets, once per choice.
    pub(super) generate: GenerateRequest,
    /// How the reply is read.
    pub(super) tool_format: ToolFormat,
    pub(super) reasoning: Reasoning,
    pub(super) tools: Arc<ToolSet>,
    /// The call that the reply has to be, and has begun with already.
    pub(super) forced: Option<Arc<Forced>>,
    /// End after the first call.
    pub(super) single_call: bool,
    pub(super) clamped: Option<Clamped>,
    /// What may come before the form that was asked for.
    opening: Opening,
}

/// Prompts of a completion, ready to be generated.
pub(super) struct CompletionPrompt {
    pub(super) options: GenerationOptions,
    /// One per prompt.
    pub(super) generate: Vec<GenerateRequest>,
    /// Each prompt's text, when it is to be repeated.
    pub(super) echo: Option<Vec<String>>,
    pub(super) clamped: Option<Clamped>,
}

/// The reply may get shorter than asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clamped {
    pub(super) asked: usize,
    pub(super) allowed: usize,
}

impl std::fmt::Display for Clamped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "asked={}, allowed={}", self.asked, self.allowed)
    }
}

/// A prompt whose reply may have to be of a form.
pub(super) trait Formed {
    fn options(&self) -> &GenerationOptions;
    /// A call that every reply has to be.
    fn forced(&self) -> Option<&Arc<Forced>> {
        None
    }
    /// Every reply is to be of this form.
    fn constrain(&mut self, form: Constraint);
}

impl Formed for ChatPrompt {
    fn options(&self) -> &GenerationOptions {
        &self.options
    }

    fn forced(&self) -> Option<&Arc<Forced>> {
        self.forced.as_ref()
    }

    fn constrain(&mut self, form: Constraint) {
        let opening = std::mem::take(&mut self.opening);
        self.generate.constraint = Some(Constrained { form, opening });
    }
}

impl Formed for CompletionPrompt {
    fn options(&self) -> &GenerationOptions {
        &self.options
    }

    fn constrain(&mut self, form: Constraint) {
        for generate in &mut self.generate {
            generate.constraint = Some(Constrained {
                form: form.clone(),
                opening: Opening::default(),
            });
        }
    }
}

/// Reads a request's body and turns it into a prompt by `make`; a long one is worked on outside the async threads, and so is
/// the form that it asks for.
///
/// # Errors
/// As `body::read`, `make`, [`constrain::compile`] and [`constrain::compile_calls`].
pub(super) async fn prepare<T: Formed + Send + 'static>(
    service: &Arc<Service>,
    request: Request,
    make: fn(&Service, &[u8]) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let body = body::read(request, service.config.max_body).await?;
    let mut prompt = if body.len() <= LONG_BODY {
        make(service, &body)?
    } else {
        let service = Arc::clone(service);
        tokio::task::spawn_blocking(move || make(&service, &body))
            .await
            .map_err(|e| ApiError::internal(format!("reading the request failed: {e}")))??
    };
    if let Some(asked) = &prompt.options().form {
        let form = constrain::compile(service, asked).await?;
        prompt.constrain(form);
    } else if let Some(forced) = prompt.forced()
        && let Some(form) = constrain::compile_calls(service, forced).await?
    {
        prompt.constrain(form);
    }
    Ok(prompt)
}

/// `/v1/chat/completions`.
pub(super) fn chat(service: &Service, body: &[u8]) -> Result<ChatPrompt, ApiError> {
    let mut request = ChatRequest::parse(body)?;
    service.check_model(request.model.as_deref())?;
    let Some(chat) = &service.chat else {
        return Err(ApiError::bad_request(
            "this model has no chat template; use /v1/completions",
        ));
    };
    canonical::strip_headers(&mut request.messages);
    let use_tools = !request.tools.is_empty() && request.tool_choice != ToolChoice::None;
    let tools: &[Value] = if use_tools { &request.tools } else { &[] };
    if !chat.template.source(use_tools).contains("developer") {
        for message in &mut request.messages {
            if message.get("role").and_then(Value::as_str) == Some("developer") {
                message["role"] = "system".into();
            }
        }
    }
    let mut kwargs = chat.template_kwargs.clone();
    kwargs.extend(std::mem::take(&mut request.template_kwargs));
    let end = if request.continue_final_message {
        mark_end(&mut request.messages)
    } else {
        None
    };
    let mut text = chat
        .template
        .render(&RenderInputs {
            messages: &request.messages,
            tools: use_tools.then_some(tools),
            documents: None,
            add_generation_prompt: request.add_generation_prompt,
            kwargs: Some(&kwargs),
        })
        .map_err(|e| template_error(&e))?;
    if let Some(end) = &end {
        let Some(end) = text.rfind(&end.mark) else {
            return Err(ApiError::invalid(
                "continue_final_message",
                "is true, but the chat template does not show the last message",
            ));
        };
        text.truncate(end);
    }
    let mut reasoning = match &end {
        Some(end) if !end.thinking => Reasoning::Off,
        Some(_) if chat.reasoning != ReasoningFormat::None => Reasoning::Inside,
        _ => chat.reasoning.of(chat.template.source(use_tools), &text),
    };
    let mut forced = None;
    let tool_format = match &request.tool_choice {
        _ if !use_tools => ToolFormat::None,
        ToolChoice::Auto if !chat.auto_tools => ToolFormat::None,
        ToolChoice::Auto => chat.tool_format,
        choice => {
            let call = force(chat.tool_format, choice, tools, request.parallel_tool_calls)?;
            if reasoning == Reasoning::Inside {
                // A forced call leaves no room for thought.
                text.push_str("\n</think>\n\n");
            }
            reasoning = Reasoning::Off;
            text.push_str(&call.text);
            forced = Some(Arc::new(call));
            chat.tool_format
        }
    };
    let opening = match &request.options.form {
        None => Opening::default(),
        Some(asked) if forced.is_some() => {
            return Err(ApiError::invalid(
                "tool_choice",
                format!("forces a call, which leaves no text for {} to shape", asked.field),
            ));
        }
        Some(asked) => {
            let before = Before {
                reasoning,
                closed: text.trim_end().ends_with("</think>"),
                tools: tool_format != ToolFormat::None,
            };
            constrain::opening(service, &asked.field, before)?
        }
    };
    let ids = service
        .tokenizer
        .encode(&text, false)
        .map_err(|e| ApiError::internal(e.to_string()))?;
    let (generate, clamped) = generate(service, "messages", ids, &request.options, request.logprobs)?;
    Ok(ChatPrompt {
        tool_format,
        reasoning,
        tools: Arc::new(ToolSet::from_openai(tools)),
        forced,
        single_call: !request.parallel_tool_calls || matches!(request.tool_choice, ToolChoice::Function(_)),
        options: request.options,
        generate,
        clamped,
        opening,
    })
}

/// Where a message that is to be continued breaks off.
struct End {
    /// A word that nobody has written: up to there the template's text is kept.
    mark: String,
    /// Within the reasoning.
    thinking: bool,
}

/// Marks the end of the last message.
fn mark_end(messages: &mut [Value]) -> Option<End> {
    let content = messages.last_mut()?.get_mut("content")?;
    let text = match content {
        Value::Array(parts) => parts.last_mut()?.get_mut("text")?,
        text => text,
    };
    let Value::String(text) = text else {
        return None;
    };
    let mark = format!("end{}", random_id());
    let thinking = text.rfind("<think>") > text.rfind("</think>");
    text.push_str(&mark);
    Some(End { mark, thinking })
}

/// `/v1/completions`.
pub(super) fn completion(service: &Service, body: &[u8]) -> Result<CompletionPrompt, ApiError> {
    let request = CompletionRequest::parse(body)?;
    service.check_model(request.model.as_deref())?;
    let text_error = |e: crate::text::TextError| ApiError::internal(e.to_string());
    let echo = if request.echo {
        let texts = request.prompts.iter().map(|prompt| match prompt {
            Prompt::Text(text) => Ok(text.clone()),
            Prompt::Tokens(ids) => service.tokenizer.decode(ids).map_err(text_error),
        });
        Some(texts.collect::<Result<Vec<_>, _>>()?)
    } else {
        None
    };
    let several = request.prompts.len() > 1;
    let mut all = Vec::with_capacity(request.prompts.len());
    let mut clamped = None;
    for (i, prompt) in request.prompts.into_iter().enumerate() {
        let field = if several {
            format!("prompt[{i}]")
        } else {
            "prompt".to_owned()
        };
        let ids = match prompt {
            Prompt::Text(text) => service.tokenizer.encode(&text, true).map_err(text_error)?,
            Prompt::Tokens(ids) => ids,
        };
        let (one, short) = generate(service, &field, ids, &request.options, request.logprobs)?;
        all.push(one);
        clamped = clamped.or(short);
    }
    Ok(CompletionPrompt {
        options: request.options,
        generate: all,
        echo,
        clamped,
    })
}

fn template_error(error: &TemplateError) -> ApiError {
    if error.is_client_error() {
        ApiError::invalid("messages", error.to_string()).with_code("chat_template")
    } else {
        ApiError::internal(error.to_string())
    }
}

/// Checks ids and lengths, fills in defaults.
fn generate(
    service: &Service,
    field: &str,
    prompt: Vec<u32>,
    options: &GenerationOptions,
    logprobs: Option<usize>,
) -> Result<(GenerateRequest, Option<Clamped>), ApiError> {
    let (info, config) = (service.backend.info(), &service.config);
    let vocab_size = info.vocab_size;
    let known = |id: u32| (id as usize) < vocab_size;
    if prompt.is_empty() {
        return Err(ApiError::invalid(field, "has no tokens"));
    }
    if let Some(id) = prompt.iter().find(|id| !known(**id)) {
        return Err(ApiError::invalid(
            field,
            format!("token id {id} is not below the vocabulary size of {vocab_size}"),
        ));
    }
    for (name, id) in options
        .sampling
        .logit_bias
        .iter()
        .map(|(id, _)| ("logit_bias", id))
        .chain(options.stop_token_ids.iter().map(|id| ("stop_token_ids", id)))
    {
        if !known(*id) {
            return Err(ApiError::invalid(
                name,
                format!("token id {id} is not below the vocabulary size of {vocab_size}"),
            ));
        }
    }
    let room = info.context_length.saturating_sub(prompt.len());
    if room == 0 {
        return Err(ApiError::invalid(
            field,
            format!(
                "has {} tokens, which leaves no room for a reply in the context length of {} tokens",
                prompt.len(),
                info.context_length
            ),
        )
        .with_code("context_length_exceeded"));
    }
    // What the KV cache has no room for cannot be generated either, and the reply to who asked for more says so. A prompt that leaves none at
    // all is the engine's to refuse, with its numbers.
    let room = room.min(info.most_tokens().saturating_sub(prompt.len()).max(1));
    let least = options.sampling.min_tokens;
    let wanted = options.max_tokens.unwrap_or(config.default_max_tokens.max(least));
    let max_tokens = wanted.min(config.max_request_tokens).min(room);
    // The default is nobody's wish, a least length is.
    let asked = options.max_tokens.or((least > 0).then_some(least));
    let clamped = asked.filter(|asked| *asked > max_tokens).map(|asked| Clamped {
        asked,
        allowed: max_tokens,
    });
    let mut stop_tokens = if options.ignore_eos {
        Vec::new()
    } else {
        config.eos_tokens.clone()
    };
    for id in &options.stop_token_ids {
        if !stop_tokens.contains(id) {
            stop_tokens.push(*id);
        }
    }
    let request = GenerateRequest {
        prompt,
        max_tokens,
        sampling: sampling(&options.sampling, &config.sampling),
        stop_tokens,
        logprobs,
        constraint: None,
    };
    Ok((request, clamped))
}

/// Hands a request to the engine: `n` choices for each prompt, in this order.
///
/// # Errors
/// The engine does not take them, none of them.
pub(super) fn submit(
    service: &Service,
    prompts: &[GenerateRequest],
    n: usize,
) -> Result<Vec<Generation>, ApiError> {
    let total = prompts.len() * n;
    let mut requests = Vec::with_capacity(total);
    for prompt in prompts {
        for index in 0..n {
            let mut request = prompt.clone();
            // Same seed, same request, same list of choices; but not the same choice n times.
            request.sampling.seed = request.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
            requests.push(request);
        }
    }
    let backend = &service.backend;
    backend
        .submit_all(requests)
        .map_err(|error| errors::from_submit_of(&error, total, backend.info().capacity))
}

fn sampling(asked: &Sampling, default: &SamplingParams) -> SamplingParams {
    SamplingParams {
        temperature: asked.temperature.unwrap_or(default.temperature),
        top_p: asked.top_p.unwrap_or(default.top_p),
        top_k: asked.top_k.unwrap_or(default.top_k),
        min_p: asked.min_p.unwrap_or(default.min_p),
        repetition_penalty: asked.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: asked.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: asked.frequency_penalty.unwrap_or(default.frequency_penalty),
        logit_bias: asked.logit_bias.clone(),
        seed: asked.seed,
        min_tokens: asked.min_tokens,
    }
}
