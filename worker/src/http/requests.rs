//! Requests that are being answered, by their id: to list them, and to cancel one from outside its connection.

use std::collections::BTreeMap;
use std::sync::Arc;

use api_types::ApiError;
use axum::Json;
use axum::extract::State;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::errors::{Failure, PathId};
use super::inlet::{Cut, Inlet};
use super::metrics::{Outcome, Route};
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
    inlet: Arc<Inlet>,
}

/// One request's place in the list, as long as this lives.
pub(super) struct Registered {
    service: Arc<Service>,
    id: String,
}

impl Requests {
    pub(super) fn register(
        service: &Arc<Service>,
        id: &str,
        route: Route,
        arrived: Instant,
        inlet: &Arc<Inlet>,
    ) -> Registered {
        let entry = Entry {
            route,
            arrived,
            inlet: Arc::clone(inlet),
        };
        service.requests.by_id.lock().insert(id.to_owned(), entry);
        Registered {
            service: Arc::clone(service),
            id: id.to_owned(),
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

    /// Whether there was one of that id that could still be ended. One whose reply is complete, and only waits for its client to
    /// read it, cannot.
    fn cancel(&self, id: &str) -> bool {
        let mut by_id = self.by_id.lock();
        let Some(entry) = by_id.get(id) else {
            return false;
        };
        let error = ApiError {
            status: 409,
            ..ApiError::bad_request(format!("request {id} was cancelled")).with_code("request_cancelled")
        };
        let outcome = Outcome::Cancelled;
        let cut = entry.inlet.cut(Cut { error, outcome });
        if cut {
            by_id.remove(id);
        }
        cut
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
    PathId(id): PathId,
) -> Result<Json<Value>, Failure> {
    if service.requests.cancel(&id) {
        return Ok(Json(json!({"id": id, "cancelled": true})));
    }
    let message = format!("there is no request {id:?}: it has been answered, or never was");
    Err(ApiError::not_found(message).with_code("request_not_found").into())
}
