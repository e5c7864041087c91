//! Requests that are being answered, by their id: to list them, and to cancel one from outside its connection.

use std::collections::BTreeMap;
use std::sync::Arc;

use api_types::ApiError;
use axum::Json;
use axum::extract::{Path, State};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::errors::Failure;
use super::metrics::Route;
use super::service::Service;

/// Requests listed at `/status`.
const LISTED: usize = 100;

/// All requests that are being answered.
#[derive(Debug, Default)]
pub(super) struct Requests {
    by_id: Mutex<BTreeMap<String, Entry>>,
}

#[derive(Debug)]
struct Entry {
    route: Route,
    arrived: Instant,
    cancel: Arc<Notify>,
}

/// One request's place in the list, as long as this lives.
pub(super) struct Registered {
    service: Arc<Service>,
    id: String,
    cancel: Arc<Notify>,
}

impl Requests {
    pub(super) fn register(service: &Arc<Service>, id: &str, route: Route, arrived: Instant) -> Registered {
        let cancel = Arc::new(Notify::new());
        let entry = Entry {
            route,
            arrived,
            cancel: Arc::clone(&cancel),
        };
        service.requests.by_id.lock().insert(id.to_owned(), entry);
        Registered {
            service: Arc::clone(service),
            id: id.to_owned(),
            cancel,
        }
    }

    /// The oldest ones come first.
    pub(super) fn list(&self) -> Vec<Value> {
        let by_id = self.by_id.lock();
        let mut entries: Vec<(&String, &Entry)> = by_id.iter().collect();
        entries.sort_by_key(|(_, entry)| entry.arrived);
        entries
            .into_iter()
            .take(LISTED)
            .map(|(id, entry)| {
                json!({"id": id, "route": entry.route.name(), "seconds": entry.arrived.elapsed().as_secs_f64()})
            })
            .collect()
    }

    /// Whether there was one of that id.
    fn cancel(&self, id: &str) -> bool {
        // A permit is kept, so that a request that is not waiting at the moment sees it when it does.
        let found = self.by_id.lock().get(id).map(|entry| entry.cancel.notify_one());
        found.is_some()
    }
}

impl Registered {
    /// Returns when somebody cancels this request, with what its client gets to hear.
    pub(super) async fn cancelled(&self) -> ApiError {
        self.cancel.notified().await;
        ApiError {
            status: 409,
            ..ApiError::bad_request(format!("request {} was cancelled", self.id))
                .with_code("request_cancelled")
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.service.requests.by_id.lock().remove(&self.id);
    }
}

/// `POST /v1/requests/{id}/cancel` and `DELETE /v1/requests/{id}`.
pub(super) async fn cancel(
    State(service): State<Arc<Service>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, Failure> {
    if service.requests.cancel(&id) {
        return Ok(Json(json!({"id": id, "cancelled": true})));
    }
    let message = format!("there is no request {id:?}: it has been answered, or never was");
    Err(ApiError::not_found(message).with_code("request_not_found").into())
}
