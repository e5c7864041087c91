//! The HTTP front of one model.
//!
//! | module        | idea                                                                              |
//! |---------------|-----------------------------------------------------------------------------------|
//! | `service`     | what all requests share: model, templates, limits, the backend, who is in flight   |
//! | `auth`        | the API key                                                                       |
//! | `body`        | reading a request's body                                                          |
//! | `canonical`   | changing lines at the head of the system prompt, taken off                        |
//! | `prompt`      | a checked request to token ids and sampling                                       |
//! | `constrain`   | the form that a request asks for, compiled                                        |
//! | `forced`      | a call that `tool_choice` forces: its beginning, and what binds its arguments      |
//! | `choice`      | one reply: tokens to text, stop strings, reasoning, tool calls                    |
//! | `run`         | all replies of one request: the next event, silence, time limits, accounting      |
//! | `inlet`       | what the engine sends for one request, and the ways to end that from outside        |
//! | `requests`    | requests by their id: the list, and cancelling one                                |
//! | `reply`       | a run to a stream of events, or to one JSON object                                |
//! | `chat`        | `/v1/chat/completions`                                                            |
//! | `completions` | `/v1/completions`                                                                 |
//! | `info`        | models, health, status, metrics                                                   |
//! | `footprint`   | what the process takes, beside the plan                                           |
//! | `metrics`     | counters in Prometheus' format                                                    |
//! | `warm`        | prompts computed before anybody asks                                              |
//! | `errors`      | every error's status and envelope                                                 |
//!
//! Cancellation is dropping: a client's disconnect drops the handler or the response body, that drops the run, that
//! drops the generations, and the engine sees closed channels on its next step. A cancellation by id and the limits of
//! time close them too, without waiting for a client that stands still.

mod auth;
mod body;
mod canonical;
mod chat;
mod choice;
mod completions;
mod constrain;
mod errors;
mod footprint;
mod forced;
mod info;
mod inlet;
mod metrics;
mod prompt;
mod reply;
mod requests;
mod run;
mod service;
mod warm;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::routing::{delete, get, post};

pub use footprint::{FootprintReading, LoadReport};
pub use service::{ChatFormat, HttpConfig, Service, ServiceParts};
pub use warm::{read_prompts, warm};

/// All routes. Every answer that is no success carries the error envelope.
pub fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*id}", get(info::model))
        .route("/v1/requests/{id}", delete(requests::cancel))
        .route("/v1/requests/{id}/cancel", post(requests::cancel))
        .route("/status", get(info::status))
        .route("/v1/status", get(info::status))
        .route("/metrics", get(info::metrics))
        .layer(axum::middleware::from_fn_with_state(
            Arc::clone(&service),
            auth::check,
        ))
        .route("/health", get(info::health))
        .fallback(errors::no_such_path)
        .method_not_allowed_fallback(errors::no_such_method)
        .layer(axum::middleware::map_request(lingering))
        .with_state(service)
}

/// What nobody reads of a request's body does not cost the client its answer.
async fn lingering(request: Request) -> Request {
    linger::Body::wrap(request).map(Body::new)
}

/// 24 hexadecimal digits that no other request has. Unique, not secret.
fn random_id() -> String {
    // Each `RandomState` has keys of its own, the first ones from the operating system.
    let random = |salt: u64| {
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u64(salt);
        hasher.finish()
    };
    format!("{:016x}{:08x}", random(1), random(2) & 0xffff_ffff)
}
