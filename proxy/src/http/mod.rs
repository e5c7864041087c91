//! Routes: from a request to a reply.

pub mod access;
pub mod activity;
pub mod auth;
pub mod body;
mod comfyui;
pub mod control;
mod dialect;
pub mod error;
pub mod events;
pub mod extract;
pub mod forward;
mod headers;
pub mod listing;
pub mod metrics;
pub mod ollama;
mod peer;
pub mod pending;
pub mod routes;
pub mod websocket;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use api_types::error::ApiError;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response};
use parking_lot::Mutex;

use self::access::Counted;
use self::auth::Access;
use self::body::{Body, Incoming};
use self::routes::Route;
use crate::activity::Activity;
use crate::house::House;
use crate::performance::Performance;
use crate::reload::Reloader;

/// What every request may need.
#[derive(Debug)]
pub struct App {
    /// Models and processes.
    pub house: Arc<House>,
    /// Requests and counters.
    pub activity: Arc<Activity>,
    /// For reloads by request, and the state of the registry's file.
    pub reloader: Arc<Reloader>,
    /// How busy the machine is.
    pub performance: Arc<Performance>,
    /// What it is, as found at the start.
    pub hardware: Option<serde_json::Value>,
    /// Name of the profile that is switched on.
    pub profile: Mutex<Option<String>>,
    /// Tells of every switch.
    pub profile_feed: tokio::sync::watch::Sender<Option<String>>,
    /// Unix time of the start, seconds: `created` of the models.
    pub started_unix: u64,
    /// How this proxy calls itself in `Via`, no two alike.
    pub via: String,
}

/// Answers a request to the port that is Ollama's alone, where nothing else is served.
///
/// # Errors
/// Never.
pub async fn handle_ollama(
    app: Arc<App>,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Counted>, Infallible> {
    let begun = access::begin(&app.house.logs, client.ip(), &request);
    let path = request.uri().path();
    let read = matches!(*request.method(), Method::GET | Method::HEAD);
    let response = match path {
        "/" if read => control::text("Ollama is running"),
        "/api/version" if read => ollama::version(),
        _ if routes::is_ollamas(path) => respond(&app, client, request).await,
        _ => {
            let error = ApiError::not_found(format!("no route for {} {path}", request.method()));
            ollama::error_reply(&error)
        }
    };
    Ok(access::count(response, begun))
}

/// Answers one request. Errors are replies too.
///
/// # Errors
/// Never.
pub async fn handle(
    app: Arc<App>,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Counted>, Infallible> {
    let begun = access::begin(&app.house.logs, client.ip(), &request);
    Ok(access::count(respond(&app, client, request).await, begun))
}

async fn respond(app: &Arc<App>, client: SocketAddr, request: Request<Incoming>) -> Response<Body> {
    let head = request.method() == Method::HEAD;
    let ollama = routes::speaks_ollama(request.uri().path());
    let mut response = match dispatch(app, client, request).await {
        Ok(response) => response,
        Err(error) if ollama => ollama::error_reply(&error),
        Err(error) => error::reply(&error),
    };
    if head && matches!(response.body(), Body::Full(_)) {
        *response.body_mut() = Body::empty();
    }
    response
}

async fn dispatch(
    app: &Arc<App>,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    if request.method() == Method::OPTIONS {
        return Ok(control::preflight(&request));
    }
    // HEAD is answered as GET, without the body.
    let method = if request.method() == Method::HEAD {
        &Method::GET
    } else {
        request.method()
    };
    let route = match routes::find(method, request.uri().path()) {
        Ok(route) => route,
        Err(routes::NoRoute::Method(allow)) => {
            let message = format!(
                "method {} is not allowed for {}",
                request.method(),
                request.uri().path()
            );
            let error = ApiError::method_not_allowed(message);
            let ollama = routes::speaks_ollama(request.uri().path());
            let mut response = if ollama {
                ollama::error_reply(&error)
            } else {
                error::reply(&error)
            };
            response
                .headers_mut()
                .insert(header::ALLOW, HeaderValue::from_static(allow));
            return Ok(response);
        }
        Err(routes::NoRoute::Path) => {
            return Err(ApiError::not_found(format!(
                "no route for {} {}",
                request.method(),
                request.uri().path()
            )));
        }
    };
    let catalog = app.house.catalog();
    let access = if auth::is_open(&route) {
        Access::All
    } else {
        match auth::check(&catalog.registry.globals.api_keys, request.headers()) {
            Ok(access) => access,
            Err(error) => {
                let ollama = matches!(route, Route::Ollama(_));
                let mut response = if ollama {
                    ollama::error_reply(&error)
                } else {
                    error::reply(&error)
                };
                let challenge = HeaderValue::from_static("Basic realm=\"swapd\"");
                response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
                return Ok(response);
            }
        }
    };
    match route {
        Route::Inference => forward::by_name(app, &catalog, &access, client, request).await,
        Route::Upstream => forward::by_path(app, &catalog, &access, client, request).await,
        Route::ComfyUi => comfyui::answer(app, &catalog, &access, client, request).await,
        Route::Ollama(call) => ollama::answer(app, &catalog, &access, client, call, request).await,
        route => control::answer(app, &catalog, &access, route, request).await,
    }
}
