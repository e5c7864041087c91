//! Routes: from a request to a reply.

pub mod body;
pub mod control;
pub mod error;
pub mod extract;
pub mod forward;
pub mod listing;
pub mod routes;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use api_types::error::ApiError;
use http::{Method, Request, Response};
use hyper::body::Incoming;

use self::body::Body;
use self::routes::Route;
use crate::house::House;
use crate::reload::Reloader;

/// What every request may need.
#[derive(Debug)]
pub struct App {
    /// Models and processes.
    pub house: Arc<House>,
    /// For reloads by request, and the state of the registry's file.
    pub reloader: Arc<Reloader>,
    /// Largest request body, in bytes.
    pub max_body: usize,
    /// Unix time of the start, seconds: `created` of the models.
    pub started_unix: u64,
}

/// Answers one request. Errors are replies too.
///
/// # Errors
/// Never.
pub async fn handle(
    app: Arc<App>,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let head = request.method() == Method::HEAD;
    let mut response = match dispatch(&app, client, request).await {
        Ok(response) => response,
        Err(error) => error::reply(&error),
    };
    if head && matches!(response.body(), Body::Full(_)) {
        *response.body_mut() = Body::empty();
    }
    Ok(response)
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
    match routes::find(method, request.uri().path()) {
        Ok(Route::Inference) => forward::by_name(app, client, request).await,
        Ok(Route::Upstream) => forward::by_path(app, client, request).await,
        Ok(route) => control::answer(app, route, &request).await,
        Err(routes::NoRoute::Method(allow)) => {
            let message = format!(
                "method {} is not allowed for {}",
                request.method(),
                request.uri().path()
            );
            let mut response = error::reply(&ApiError::method_not_allowed(message));
            response
                .headers_mut()
                .insert(http::header::ALLOW, http::HeaderValue::from_static(allow));
            Ok(response)
        }
        Err(routes::NoRoute::Path) => Err(ApiError::not_found(format!(
            "no route for {} {}",
            request.method(),
            request.uri().path()
        ))),
    }
}
