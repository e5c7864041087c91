//! The API key.

use std::sync::Arc;

use api_types::ApiError;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, header};

use super::errors::Failure;
use super::service::Service;

/// Lets a request through when no key is set, or when it carries the one that is, as `Authorization: Bearer` or
/// `x-api-key`.
pub(super) async fn check(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    if let Some(key) = &service.config.api_key {
        match presented(request.headers()) {
            Some(given) if same(given, key.as_bytes()) => {}
            Some(_) => return refuse("the API key is not the right one"),
            None => return refuse("an API key is needed, as Authorization: Bearer KEY or x-api-key: KEY"),
        }
    }
    next.run(request).await
}

fn refuse(message: &str) -> Response {
    Failure(ApiError::unauthorized(message)).into_response()
}

fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get("x-api-key") {
        return Some(key.as_bytes());
    }
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// Compares without telling by its duration how much was right: the time depends on the length of what was given only.
fn same(given: &[u8], key: &[u8]) -> bool {
    let mut difference = given.len() ^ key.len();
    for (i, byte) in given.iter().enumerate() {
        let expected = key.get(i % key.len().max(1)).copied().unwrap_or(0);
        difference |= usize::from(byte ^ expected);
    }
    std::hint::black_box(difference) == 0
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn only_the_key_itself_is_the_key() {
        assert!(same(b"secret", b"secret"));
        for wrong in ["", "s", "secre", "secrets", "secretsecret", "Secret", "secreT"] {
            assert!(!same(wrong.as_bytes(), b"secret"), "{wrong}");
        }
        assert!(!same(b"x", b""));
    }
}
