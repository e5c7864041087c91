//! Every error's status and envelope.

use api_types::ApiError;
use axum::body::Body;
use axum::extract::{FromRequestParts, OriginalUri, Path};
use axum::response::{IntoResponse, Response};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode, header};

use crate::backend::{EngineError, SubmitError};

/// An error on its way to the client.
#[derive(Debug)]
pub(super) struct Failure(pub(super) ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(error) = self;
        let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = Response::new(Body::from(error.to_json()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = error.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The id in a path. One that is no text is an error like all others.
pub(super) struct PathId(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for PathId {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(error) => Err(ApiError::bad_request(format!("{}: {error}", parts.uri.path())).into()),
        }
    }
}

/// 404.
pub(super) async fn no_such_path(method: Method, OriginalUri(uri): OriginalUri) -> Failure {
    ApiError::not_found(format!("there is no {method} {}", uri.path())).into()
}

/// 405.
pub(super) async fn no_such_method(method: Method, OriginalUri(uri): OriginalUri) -> Failure {
    ApiError::method_not_allowed(format!("{} does not take {method}", uri.path())).into()
}

/// 503: the engine is gone.
pub(super) fn engine_dead(reason: &str) -> ApiError {
    ApiError::unavailable("engine_dead", format!("the engine has died: {reason}"), Some(1))
}

/// Why the engine did not take a request.
fn from_submit(error: &SubmitError) -> ApiError {
    match error {
        SubmitError::TooLong { .. } => {
            ApiError::bad_request(error.to_string()).with_code("context_length_exceeded")
        }
        SubmitError::NeverFits(_) => ApiError::bad_request(error.to_string()).with_code("never_fits"),
        SubmitError::QueueFull { retry_after, .. } => {
            ApiError::too_many_requests(error.to_string(), retry_after.as_secs().max(1))
        }
        SubmitError::Stopped => ApiError::unavailable("draining", error.to_string(), Some(1)),
        SubmitError::Dead(reason) => engine_dead(reason),
    }
}

/// As [`from_submit`], for one of `total` generations of a request to an engine that has room for `capacity`. A request
/// for more than that would fail again, however often it is told to come back.
pub(super) fn from_submit_of(error: &SubmitError, total: usize, capacity: usize) -> ApiError {
    match error {
        SubmitError::QueueFull { .. } if total > capacity => ApiError::bad_request(format!(
            "prompts times n is {total}; {capacity} replies can run and wait here at the same time"
        ))
        .with_code("never_fits"),
        other => from_submit(other),
    }
}

/// Why the engine did not finish a request.
pub(super) fn from_engine(error: &EngineError) -> ApiError {
    match error {
        EngineError::Step(_) => ApiError::internal(error.to_string()).with_code("generation_failed"),
        EngineError::Constraint(_) => ApiError::internal(error.to_string()).with_code("constraint_failed"),
        EngineError::WaitedTooLong(_) => ApiError::unavailable("queue_timeout", error.to_string(), Some(5)),
        EngineError::Stopped => ApiError::unavailable("draining", error.to_string(), Some(1)),
        EngineError::Dead(reason) => engine_dead(reason),
    }
}
