//! The form that a request asks for, compiled: on threads of its own, few at a time, and not for ever.

use std::sync::{Arc, OnceLock};

use api_types::ApiError;
use api_types::openai::{AskedForm, Form as Asked};
use constraint::{Constraint, Form, Grammars, Opening, Thinking};
use serde_json::Value;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout;

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

/// What came of it.
enum Failure {
    /// Of this form there is no grammar.
    Form(String),
    /// Of this tokenizer there is no tree.
    Vocabulary(String),
}

/// Compiles a form. Nothing that a client can write holds up anybody but who asks for forms.
///
/// # Errors
/// 400 naming the field, with the library's reason, or because it takes too long; 503 while others compile.
pub(super) async fn compile(service: &Arc<Service>, asked: &AskedForm) -> Result<Constraint, ApiError> {
    let busy = || {
        ApiError::unavailable(
            "constraint_compiler_busy",
            format!("{}: other requests' forms are being compiled", asked.field),
            Some(1),
        )
    };
    let limit = service.config.compile_limit;
    let places = Arc::clone(&service.compiler.places);
    let place = timeout(limit, places.acquire_owned())
        .await
        .map_err(|_| busy())?
        .map_err(|_| busy())?;
    let form = form(&asked.form);
    let (answer, answered) = oneshot::channel();
    let for_thread = Arc::clone(service);
    // Not one of the runtime's threads: these have too little stack for a schema that is nested without end.
    std::thread::Builder::new()
        .name("constraint".to_owned())
        .stack_size(Grammars::STACK)
        .spawn(move || {
            let compiled = build(&for_thread, &form);
            drop(for_thread);
            // Nobody may wait any more.
            let _ = answer.send(compiled);
            drop(place);
        })
        .map_err(|error| ApiError::internal(format!("no thread for the constraint: {error}")))?;
    match timeout(limit, answered).await {
        Err(_) => Err(ApiError::invalid(
            &asked.field,
            format!(
                "is too complex: it is not compiled after {} s",
                limit.as_secs_f64()
            ),
        )
        .with_code("invalid_constraint")),
        Ok(Err(_)) => Err(ApiError::internal("the constraint's compiler is gone")),
        Ok(Ok(Err(Failure::Form(reason)))) => Err(ApiError::invalid(
            &asked.field,
            format!("cannot be compiled: {reason}"),
        )
        .with_code("invalid_constraint")),
        Ok(Ok(Err(Failure::Vocabulary(reason)))) => Err(ApiError::invalid(
            &asked.field,
            format!("is not supported with this model: {reason}"),
        )
        .with_code("unsupported_value")),
        Ok(Ok(Ok(constraint))) => Ok(constraint),
    }
}

fn build(service: &Service, form: &Form) -> Result<Constraint, Failure> {
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
    let grammars = grammars
        .as_ref()
        .map_err(|reason| Failure::Vocabulary(reason.clone()))?;
    grammars
        .compile(form)
        .map_err(|error| Failure::Form(error.to_string()))
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
