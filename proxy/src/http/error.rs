//! Errors as replies: the one place where a reason becomes a status.

use api_types::error::ApiError;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use lifecycle::{CutReason, Failure, ModelId, Rejection};

use super::body::Body;
use crate::catalog::Catalog;
use crate::house::Ordered;
use crate::pressure;
use crate::upstream;

/// An error as a reply.
#[must_use]
pub fn reply(error: &ApiError) -> Response<Body> {
    let mut response = Response::new(Body::Full(error.to_json().into()));
    *response.status_mut() = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(seconds) = error.retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// 404 for a name that no model answers to.
#[must_use]
pub fn unknown_model(catalog: &Catalog, name: &str) -> ApiError {
    let near = catalog.near(name);
    let hint = match near {
        Some(near) => format!("did you mean '{near}'?"),
        None => {
            let own = catalog.registry.models.keys().cloned();
            let known: Vec<String> = own.chain(catalog.peers.models().into_keys()).take(10).collect();
            if known.is_empty() {
                "no model is configured".to_owned()
            } else {
                format!("configured: {}", known.join(", "))
            }
        }
    };
    ApiError::model_not_found(format!("model '{name}' not found; {hint}"))
}

/// The reply to a refused request.
#[must_use]
pub fn rejected(model: &ModelId, reason: &Rejection) -> ApiError {
    match reason {
        Rejection::UnknownModel | Rejection::Removed => {
            ApiError::model_not_found(format!("model '{model}' is not configured any more"))
        }
        Rejection::ConcurrencyLimit(limit) => ApiError::too_many_requests(
            format!(
                "model '{model}' has reached its concurrencyLimit of {limit} requests, running and waiting"
            ),
            1,
        )
        .with_code("concurrency_limit"),
        Rejection::QueueFull(limit) => {
            ApiError::too_many_requests(format!("{limit} requests wait for model '{model}' already"), 5)
        }
        Rejection::WaitedTooLong(ms) => ApiError::unavailable(
            "waited_too_long",
            format!("model '{model}' could not be made ready within {} s", ms / 1000),
            Some(5),
        ),
        Rejection::StartFailed(failure) => bad_gateway(
            "model_start_failed",
            format!("model '{model}' could not be started: {}", with_tail(failure)),
        ),
        Rejection::BackOff(failure, ms) => {
            let seconds = ms.div_ceil(1000).max(1);
            ApiError::unavailable(
                "model_backoff",
                format!(
                    "model '{model}' failed and is tried again in {seconds} s: {}",
                    with_tail(failure)
                ),
                Some(seconds),
            )
        }
        Rejection::Unloaded => ApiError::unavailable(
            "unloaded",
            format!("model '{model}' was unloaded while the request waited for it"),
            Some(1),
        ),
        Rejection::Memory {
            reading,
            waited_ms,
            retry_ms,
        } => ApiError::unavailable(
            "memory_critical",
            format!(
                "model '{model}' is not started while memory is critically short ({}); waited {} s",
                pressure::shown(reading),
                waited_ms / 1000
            ),
            Some(retry_ms.div_ceil(1000).max(1)),
        ),
        Rejection::ShuttingDown => shutting_down(),
    }
}

fn with_tail(failure: &Failure) -> String {
    if failure.log_tail.is_empty() {
        return failure.message.clone();
    }
    format!(
        "{}; its last lines:\n{}",
        failure.message,
        failure.log_tail.trim_end()
    )
}

/// 502 when the model's server gave no reply.
#[must_use]
pub fn no_reply(model: &ModelId, error: &upstream::Error, log_tail: &str) -> ApiError {
    let failure = Failure {
        message: error.to_string(),
        log_tail: log_tail.to_owned(),
    };
    let message = format!(
        "the server of model '{model}' gave no reply: {}",
        with_tail(&failure)
    );
    match error {
        upstream::Error::Timeout(_) => ApiError::timed_out(message),
        upstream::Error::Connect(_) | upstream::Error::Broken(_) => bad_gateway("upstream_error", message),
    }
}

/// What is told of a server that died in the middle of its reply.
#[must_use]
pub fn died(model: &ModelId, cause: String, log_tail: String) -> String {
    let failure = Failure {
        message: cause,
        log_tail,
    };
    format!(
        "the server of model '{model}' died in the middle of its reply: {}",
        with_tail(&failure)
    )
}

/// The next start may be of another version; nobody knows when it is.
fn shutting_down() -> ApiError {
    ApiError::unavailable("shutting_down", "the proxy is shutting down", Some(5))
}

/// 502 with this code. Asked again in a second the server may be another one, or it is told how long it backs off.
pub(super) fn bad_gateway(code: &'static str, message: String) -> ApiError {
    ApiError {
        status: 502,
        message,
        kind: "server_error",
        param: None,
        code: Some(code),
        retry_after: Some(1),
    }
}

/// 403 for a key that may not use this model.
#[must_use]
pub fn not_permitted(name: &str) -> ApiError {
    let message = format!("this API key may not use '{name}'");
    ApiError {
        status: 403,
        kind: "permission_error",
        param: None,
        code: Some("forbidden"),
        retry_after: None,
        message,
    }
}

/// 409 for a path that never starts a model.
#[must_use]
pub fn not_loaded(model: &ModelId, path: &str) -> ApiError {
    let message = format!("model '{model}' is not loaded, and a request for {path} does not load it");
    ApiError {
        status: 409,
        kind: "conflict",
        param: None,
        code: Some("conflict"),
        retry_after: None,
        message,
    }
}

/// The reply to a request whose end somebody has ordered.
fn cancelled() -> ApiError {
    ApiError::unavailable(
        "cancelled",
        "the request was cancelled by an order to the proxy",
        Some(1),
    )
}

/// The reply to a request that had to end before its own began.
#[must_use]
pub fn ordered(model: &ModelId, why: Ordered) -> ApiError {
    match why {
        Ordered::Cancelled => cancelled(),
        Ordered::Cut(reason) => cut(model, reason),
    }
}

/// 503 for a request that was cut before its reply began.
fn cut(model: &ModelId, reason: CutReason) -> ApiError {
    match reason {
        CutReason::Unloaded => ApiError::unavailable(
            "unloaded",
            format!("model '{model}' was unloaded and the grace for running requests is over"),
            Some(1),
        ),
        CutReason::Memory => ApiError::unavailable(
            "memory_critical",
            format!("model '{model}' was unloaded because memory is critically short"),
            Some(10),
        ),
        CutReason::ShuttingDown => shutting_down(),
    }
}
