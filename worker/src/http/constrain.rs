//! The form that a request asks for, compiled: on threads of its own, few at a time, and not for ever.

use std::sync::{Arc, OnceLock};

use api_types::ApiError;
use api_types::openai::{AskedForm, Form as Asked};
use constraint::{Calls, Constraint, Form, Grammars, Opening, Thinking};
use serde_json::Value;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

use super::forced::{Forced, any_arguments};
use super::service::Service;

/// Forms compiled at the same time. One that takes longer than anybody waits for it keeps its place until it ends.
const PLACES: usize = 2;

/// Compiles forms for one model.
pub(super) struct Compiler {
    /// Built with the first form that is asked for: most workers are never asked for one.
    grammars: OnceLock<Result<Grammars, String>>,
    places: Arc<Semaphore>,
}

impl Default for Compiler {
    fn default() -> Self {
        Self {
            grammars: OnceLock::new(),
            places: Arc::new(Semaphore::new(PLACES)),
        }
    }
}

/// Why there is no grammar.
enum Failure {
    /// Of this form there is none.
    Form(String),
    /// Of this tool's schema, by its place among the tools.
    Tool(usize, String),
    /// Of this tokenizer there is no tree.
    Vocabulary(String),
    /// It is not found in time.
    Slow,
    /// Others' are being looked for.
    Busy,
}

impl Failure {
    fn of(self, service: &Service, field: &str) -> ApiError {
        let (reason, code) = match self {
            Self::Form(reason) | Self::Tool(_, reason) => {
                (format!("cannot be compiled: {reason}"), "invalid_constraint")
            }
            Self::Vocabulary(reason) => (
                format!("is not supported with this model: {reason}"),
                "unsupported_value",
            ),
            Self::Slow => {
                let limit = service.config.compile_limit.as_secs_f64();
                let reason = format!("is too complex: it is not compiled after {limit} s");
                (reason, "invalid_constraint")
            }
            Self::Busy => {
                let reason = format!("{field}: other requests' forms are being compiled");
                return ApiError::unavailable("constraint_compiler_busy", reason, Some(1));
            }
        };
        ApiError::invalid(field, reason).with_code(code)
    }
}

/// Compiles the form that a request asks for.
///
/// # Errors
/// 400 naming the field, with the library's reason, or because it takes too long; 503 while others compile.
pub(super) async fn compile(service: &Arc<Service>, asked: &AskedForm) -> Result<Constraint, ApiError> {
    let form = form(&asked.form);
    let compiled = on_a_thread(service, move |grammars, _| {
        grammars
            .compile(&form)
            .map_err(|error| Failure::Form(error.to_string()))
    });
    compiled
        .await?
        .map_err(|failure| failure.of(service, &asked.field))
}

/// Compiles what binds a forced call to the schemas of the request's tools. `None`: they cannot be compiled, and the client
/// has not asked for a call that follows them strictly.
///
/// # Errors
/// 400 naming the schema of a strict tool; 503 while others compile.
pub(super) async fn compile_calls(
    service: &Arc<Service>,
    forced: &Arc<Forced>,
) -> Result<Option<Constraint>, ApiError> {
    let for_thread = Arc::clone(forced);
    let compiled = on_a_thread(service, move |grammars, wanted| {
        match grammars.compile(&Form::Calls(for_thread.calls.clone())) {
            Ok(constraint) => Ok(constraint),
            // One tool's schema may be the reason: the others are bound all the same.
            Err(_) => {
                let calls = Form::Calls(without_what_cannot_be_compiled(grammars, &for_thread, wanted)?);
                grammars
                    .compile(&calls)
                    .map_err(|error| Failure::Form(error.to_string()))
            }
        }
    });
    let failure = match compiled.await? {
        Ok(constraint) => return Ok(Some(constraint)),
        Err(failure) => failure,
    };
    let mut schemas = forced.schemas.iter();
    let strict = match failure {
        Failure::Tool(at, _) => schemas.nth(at),
        _ => schemas.find(|schema| schema.strict),
    };
    let field = strict.map_or("tools", |schema| &schema.field);
    let error = failure.of(service, field);
    if strict.is_some() {
        return Err(error);
    }
    tracing::debug!(%error, "a forced call's arguments are not bound");
    Ok(None)
}

/// `wanted`: somebody still waits.
fn without_what_cannot_be_compiled(
    grammars: &Grammars,
    forced: &Forced,
    wanted: &dyn Fn() -> bool,
) -> Result<Calls, Failure> {
    let mut calls = forced.calls.clone();
    for (at, ((_, schema), source)) in calls.tools.iter_mut().zip(&forced.schemas).enumerate() {
        if !wanted() {
            return Err(Failure::Slow);
        }
        if let Err(error) = grammars.compile(&Form::JsonSchema(schema.clone())) {
            if source.strict {
                return Err(Failure::Tool(at, error.to_string()));
            }
            tracing::debug!(%error, field = source.field, "a forced call's arguments are not bound");
            *schema = any_arguments();
        }
    }
    Ok(calls)
}

/// Runs `work` on a thread of its own; it can ask whether somebody still waits. Nothing that a client can write holds up anybody
/// but who asks for forms, and who forces a call for as long as one may take to be compiled.
///
/// # Errors
/// 500: no thread.
async fn on_a_thread(
    service: &Arc<Service>,
    work: impl FnOnce(&Grammars, &dyn Fn() -> bool) -> Result<Constraint, Failure> + Send + 'static,
) -> Result<Result<Constraint, Failure>, ApiError> {
    let limit = service.config.compile_limit;
    let places = Arc::clone(&service.compiler.places);
    let Ok(Ok(place)) = timeout(limit, places.acquire_owned()).await else {
        return Ok(Err(Failure::Busy));
    };
    let (answer, answered) = oneshot::channel();
    let for_thread = Arc::clone(service);
    // Not one of the runtime's threads: these have too little stack for a schema that is nested without end.
    std::thread::Builder::new()
        .name("constraint".to_owned())
        .stack_size(Grammars::STACK)
        .spawn(move || {
            let wanted = || !answer.is_closed();
            let compiled = grammars(&for_thread).and_then(|grammars| work(grammars, &wanted));
            drop(for_thread);
            // Nobody may wait any more.
            let _ = answer.send(compiled);
            drop(place);
        })
        .map_err(|error| ApiError::internal(format!("no thread for the constraint: {error}")))?;
    match timeout(limit, answered).await {
        Err(_) => Ok(Err(Failure::Slow)),
        Ok(Err(_)) => Err(ApiError::internal("the constraint's compiler is gone")),
        Ok(Ok(compiled)) => Ok(compiled),
    }
}

fn grammars(service: &Service) -> Result<&Grammars, Failure> {
    let grammars = service.compiler.grammars.get_or_init(|| {
        let started = std::time::Instant::now();
        let rows = service.backend.info().vocab_size;
        let built = service.tokenizer.grammars(rows);
        tracing::info!(
            ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            ok = built.is_ok(),
            "vocabulary for constraints"
        );
        built.map_err(|error| error.to_string())
    });
    grammars
        .as_ref()
        .map_err(|reason| Failure::Vocabulary(reason.clone()))
}

fn form(asked: &Asked) -> Form {
    match asked {
        Asked::JsonObject => Form::JsonObject,
        Asked::JsonSchema(map) => Form::JsonSchema(Value::Object(map.clone())),
        Asked::Regex(text) => Form::Regex(text.clone()),
        Asked::Choice(texts) => Form::Choice(texts.clone()),
        Asked::Grammar(text) => Form::Grammar(text.clone()),
    }
}

/// What a chat's reply may have before its text, or in its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    pub(super) reasoning: chat_format::Reasoning,
    /// The prompt ends with reasoning that is closed already: thinking is off.
    pub(super) closed: bool,
    /// The model may call a tool.
    pub(super) tools: bool,
}

/// The same as tokens.
///
/// # Errors
/// 400 naming the form's field: the markup is no token of this tokenizer, so that nobody knows where the text begins.
pub(super) fn opening(service: &Service, field: &str, before: Before) -> Result<Opening, ApiError> {
    use chat_format::Reasoning;
    let token = |text: &str| service.tokenizer.token_id(text);
    let unsupported = |what: &str| {
        ApiError::invalid(
            field,
            format!("is not supported with {what}, whose markup is no token of this model's tokenizer"),
        )
        .with_code("unsupported_value")
    };
    let thinking = match (before.reasoning, token("<think>"), token("</think>")) {
        (Reasoning::Inside, _, Some(close)) => Thinking::Inside { close },
        (Reasoning::Inside, _, None) => return Err(unsupported("reasoning (see enable_thinking)")),
        (Reasoning::Outside, Some(open), Some(close)) if !before.closed => Thinking::May { open, close },
        _ => Thinking::No,
    };
    let instead = match token("<tool_call>") {
        _ if !before.tools => None,
        None => return Err(unsupported("tools")),
        call => call,
    };
    Ok(Opening { thinking, instead })
}
