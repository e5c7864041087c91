//! `/comfyui/...` is the model `comfyui_auto`, whose page asks for its parts below a fixed path.

use std::net::SocketAddr;
use std::sync::Arc;

use api_types::error::ApiError;
use http::header::{HeaderValue, LOCATION};
use http::{Request, Response, StatusCode, Uri};
use lifecycle::State;

use super::auth::Access;
use super::body::{Body, Incoming};
use super::{App, error, forward};
use crate::catalog::Catalog;

/// The model.
const ID: &str = "comfyui_auto";

/// As `/upstream/comfyui_auto/...`, but only the page itself starts it: what an open page goes on asking for does not.
pub(super) async fn answer(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    access: &Access,
    client: SocketAddr,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let Some(model) = catalog.resolve(ID).cloned() else {
        return Err(error::unknown_model(catalog, ID));
    };
    let path = request
        .uri()
        .path()
        .strip_prefix("/comfyui")
        .unwrap_or_default()
        .to_owned();
    let query = request.uri().query().map(|q| format!("?{q}")).unwrap_or_default();
    if path.is_empty() {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
        if let Ok(to) = HeaderValue::from_str(&format!("/comfyui/{query}")) {
            response.headers_mut().insert(LOCATION, to);
        }
        return Ok(response);
    }
    if path != "/" && app.house.status(&model).is_none_or(|s| s.state != State::Ready) {
        return Err(error::not_loaded(&model, &path));
    }
    let whole = format!("/upstream/{ID}{path}{query}");
    *request.uri_mut() = whole
        .parse::<Uri>()
        .map_err(|_| ApiError::bad_request(format!("the path {path} is malformed")))?;
    forward::by_path(app, catalog, access, client, request).await
}
