//! Forwarding: find the model, wait for it, pass the bytes through.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api_types::error::ApiError;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Method, Request, Response, Uri};
use lifecycle::{ModelId, State};

use super::App;
use super::auth::Access;
use super::body::{self, Body, Incoming, ReadError, Source, UpstreamBody};
use super::dialect::Dialect;
use super::error;
use super::extract::{self, Place};
use super::headers::{self, ACCEL_BUFFERING, drop_headers, tidy_request};
use super::pending::{self, SILENCE, Shown, Work};
use super::{peer, routes, websocket};
use crate::activity::{Kind, Selected, Trace};
use crate::catalog::Catalog;
use crate::house::Lease;
use crate::rewrite::Rewrite;
use crate::select::{self, Choice, Destination, Nowhere};
use crate::upstream;

/// How long a process whose connection failed may take to be seen dead.
const DYING: Duration = Duration::from_millis(100);

/// Forwards to the model that the body, or without one the query, names.
pub(super) async fn by_name(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    access: &Access,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let find = |name: &str| choose(app, catalog, access, name);
    if websocket::is_upgrade(request.method(), request.headers()) {
        let choice = find(&extract::from_query(request.uri().query())?)?;
        let path = routes::upstream_path(path_of(request.uri()));
        return match choice.to {
            Destination::Model(model) => websocket::forward(app, client, &model, request, &path).await,
            Destination::Peers(far) => {
                peer::upgrade(app, catalog, client, request, far, path, Some(Place::Query)).await
            }
        };
    }
    let (parts, incoming) = request.into_parts();
    let (name, place, body) = if matches!(parts.method, http::Method::GET | http::Method::HEAD) {
        (
            extract::from_query(parts.uri.query())?,
            Place::Query,
            Bytes::new(),
        )
    } else {
        let body = read(app, incoming).await?;
        let kind = parts
            .headers
            .get(header::CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let (name, place) = extract::from_body(kind, &body)?;
        (name, place, body)
    };
    let choice = find(&name)?;
    let path = routes::upstream_path(path_of(&parts.uri));
    named(app, catalog, client, &choice, &name, &place, parts, path, body).await
}

/// Where a name leads, if this client may go there.
pub(super) fn choose(app: &App, catalog: &Catalog, access: &Access, name: &str) -> Result<Choice, ApiError> {
    let profile = app.profile.lock().clone();
    let may = |model: &str| access.permits(model, name);
    let permits: select::Permits<'_> = match access {
        Access::All => None,
        Access::Models(_) => Some(&may),
    };
    let status = |m: &ModelId| app.house.status(m);
    let choice = select::follow(catalog, profile.as_deref(), name, status, permits);
    let mut choice = choice.map_err(|e| e.to_error(catalog, name))?;
    if permitted(&mut choice.to, access, name) {
        Ok(choice)
    } else {
        Err(error::not_permitted(name))
    }
}

/// Whether a client may use what it asked for by this name; of several peers, only those that it may use are left.
fn permitted(to: &mut Destination, access: &Access, name: &str) -> bool {
    match to {
        Destination::Model(model) => access.permits(model, name),
        Destination::Peers(far) => {
            if *access != Access::All {
                far.retain(|f| access.permits(&f.name(), name));
            }
            !far.is_empty()
        }
    }
}

/// Forwards a request whose body has been read and whose model has been found, to this path.
#[allow(clippy::too_many_arguments)]
pub(super) async fn named(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    client: SocketAddr,
    choice: &Choice,
    name: &str,
    place: &Place,
    mut parts: Parts,
    path: PathAndQuery,
    body: Bytes,
) -> Result<Response<Body>, ApiError> {
    if matches!(place, Place::Json { .. }) && !extract::is_json(&parts.headers) {
        // curl's default: the body is JSON all the same, and the model's server should be told so.
        parts
            .headers
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    // Tokens are counted from the reply as it passes, and events may be put into it: it has to come as it is.
    parts.headers.remove(header::ACCEPT_ENCODING);
    if let Some(selector) = &choice.selector {
        parts.extensions.insert(Selected(selector.as_str().into()));
    }
    let streams = matches!(place, Place::Json { stream: true });
    let model = match &choice.to {
        Destination::Model(model) => model,
        Destination::Peers(far) => {
            let ask = peer::Ask {
                far: far.clone(),
                name: choice.target.as_deref().unwrap_or(name).to_owned(),
                place: Some(place.clone()),
                path,
                parts,
                body,
            };
            let spare = choice.otherwise.as_ref().map(|other| (other, ask.again()));
            let answer = peer::serve(app, catalog, client, ask).await;
            return match (answer, spare) {
                (Err(error), Some(((model, target), ask))) if peer::is_untaken(&error) => {
                    tracing::info!(%model, "no peer takes the request: {}", error.message);
                    let (parts, path, target) = (ask.parts, ask.path, Some(target.as_str()));
                    let body = filtered(catalog, model, target, name, place, ask.body)?;
                    serve(app, catalog, client, model, parts, path, body, streams).await
                }
                (answer, _) => answer,
            };
        }
    };
    let body = filtered(catalog, model, choice.target.as_deref(), name, place, body)?;
    serve(app, catalog, client, model, parts, path, body, streams).await
}

/// The body as the model's server is to see it.
fn filtered(
    catalog: &Catalog,
    model: &ModelId,
    target: Option<&str>,
    name: &str,
    place: &Place,
    body: Bytes,
) -> Result<Bytes, ApiError> {
    let Some(entry) = catalog.model(model) else {
        return Ok(body);
    };
    let real = entry.use_model_name.as_deref().or(target);
    let changed = match (place, target) {
        (Place::Json { .. }, None) => catalog.rewrite(name).map(|r| r.apply(&body)),
        // A selector's or a pin's target: the filters of that name, which are not prepared.
        (Place::Json { .. }, Some(target)) => {
            Rewrite::new(&entry.filters, real, target).map(|r| r.apply(&body))
        }
        (Place::Form(_) | Place::Encoded(_), _) => {
            return Ok(real.map_or(body.clone(), |real| extract::replace_name(&body, place, real)));
        }
        (Place::Query, _) => None,
    };
    match changed {
        None => Ok(body),
        Some(Ok(changed)) => Ok(changed),
        Some(Err(e)) => Err(ApiError::bad_request(format!(
            "the body is not a JSON object (byte {})",
            e.at
        ))),
    }
}

fn path_of(uri: &Uri) -> PathAndQuery {
    uri.path_and_query()
        .cloned()
        .unwrap_or_else(|| PathAndQuery::from_static("/"))
}

/// Forwards `/upstream/{model}/{path}` to the model's own `/{path}`.
pub(super) async fn by_path(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    access: &Access,
    client: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let raw = request
        .uri()
        .path()
        .strip_prefix("/upstream/")
        .unwrap_or_default();
    // An id may hold anything, encoded or not; what follows it stays as the client wrote it.
    let decoded = routes::decode(raw);
    let pinned = pinned_path(app, catalog, &decoded)?;
    let asked = decoded.len();
    let decoded = pinned.unwrap_or(decoded);
    let Some((mut to, rest)) = catalog.resolve_prefix(&decoded) else {
        let first = raw.split('/').next().unwrap_or_default();
        return Err(error::unknown_model(catalog, &routes::decode(first)));
    };
    let name = decoded.strip_suffix(rest).unwrap_or_default();
    if !permitted(&mut to, access, name) {
        return Err(error::not_permitted(name));
    }
    let written = as_written(raw, asked.saturating_sub(rest.len()));
    let query = request.uri().query().map(|q| format!("?{q}")).unwrap_or_default();
    let upgrade = websocket::is_upgrade(request.method(), request.headers());
    if upgrade && !rest.is_empty() {
        let path = format!("{written}{query}");
        let path = path
            .parse()
            .map_err(|_| ApiError::bad_request(format!("the path {path} is malformed")))?;
        return match to {
            Destination::Model(model) => websocket::forward(app, client, &model, request, &path).await,
            Destination::Peers(far) => peer::upgrade(app, catalog, client, request, far, path, None).await,
        };
    }
    let (parts, incoming) = request.into_parts();
    if rest.is_empty() {
        return Ok(redirect(&parts, &format!("{}/{query}", parts.uri.path())));
    }
    if let Destination::Model(model) = &to
        && catalog.never_starts(rest)
        && app.house.status(model).is_none_or(|s| s.state != State::Ready)
    {
        return Err(error::not_loaded(model, rest));
    }
    let path = format!("{written}{query}");
    let path = path
        .parse()
        .map_err(|_| ApiError::bad_request(format!("the path {path} is malformed")))?;
    let body = read(app, incoming).await?;
    match to {
        Destination::Model(model) => serve(app, catalog, client, &model, parts, path, body, false).await,
        Destination::Peers(far) => {
            let ask = peer::Ask {
                far,
                name: name.to_owned(),
                place: named_in_body(&parts, &path, &body),
                path,
                parts,
                body,
            };
            peer::serve(app, catalog, client, ask).await
        }
    }
}

/// Where the body of a request below `/upstream` names the model, if its path is one whose body does.
fn named_in_body(parts: &Parts, path: &PathAndQuery, body: &Bytes) -> Option<Place> {
    if routes::find(&parts.method, path.path()) != Ok(routes::Route::Inference) || body.is_empty() {
        return None;
    }
    let kind = parts.headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    extract::from_body(kind, body).ok().map(|(_, place)| place)
}

/// What follows the first `name` bytes of `raw`, where an escape counts as the one byte that it stands for. It begins
/// with a slash, and escapes in it stay.
fn as_written(raw: &str, name: usize) -> String {
    let mut at = 0;
    for _ in 0..name {
        let rest = raw.as_bytes().get(at..).unwrap_or_default();
        at += if routes::escaped(rest).is_some() { 3 } else { 1 };
    }
    let rest = raw.get(at..).unwrap_or_default();
    match routes::escaped(rest.as_bytes()) {
        Some(b'/') => format!("/{}", rest.get(3..).unwrap_or_default()),
        _ => rest.to_owned(),
    }
}

/// The path with its first name replaced where the active profile pins that name.
fn pinned_path(app: &App, catalog: &Catalog, path: &str) -> Result<Option<String>, ApiError> {
    let profile = app.profile.lock().clone();
    let Some(profile) = profile.and_then(|p| catalog.registry.profiles.get(&p)) else {
        return Ok(None);
    };
    let hit = profile.pins.iter().filter(|(name, _)| {
        path.strip_prefix(name.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    });
    match hit.max_by_key(|(name, _)| name.len()) {
        None => Ok(None),
        Some((name, None)) => Err(Nowhere::SwitchedOff.to_error(catalog, name)),
        Some((name, Some(target))) => Ok(Some(format!(
            "{target}{}",
            path.strip_prefix(name.as_str()).unwrap_or_default()
        ))),
    }
}

fn redirect(parts: &Parts, to: &str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let safe = matches!(parts.method, http::Method::GET | http::Method::HEAD);
    *response.status_mut() = if safe {
        http::StatusCode::MOVED_PERMANENTLY
    } else {
        http::StatusCode::PERMANENT_REDIRECT
    };
    if let Ok(value) = HeaderValue::from_str(to) {
        response.headers_mut().insert(header::LOCATION, value);
    }
    response
}

pub(super) async fn read(app: &App, incoming: Incoming) -> Result<Bytes, ApiError> {
    let limit = app.house.catalog().registry.globals.max_body;
    body::read(incoming, limit).await.map_err(|e| match e {
        ReadError::TooLarge(limit) => ApiError::too_large(format!("the body is larger than {limit} bytes")),
        ReadError::Broken(e) => ApiError::bad_request(format!("the body could not be read: {e}")),
    })
}

/// Waits for the model, sends it the request and passes the reply back.
///
/// A client that asked for a stream of events gets the head of its reply before the model is ready if it has to wait long, or at
/// once if it is to see the progress.
#[allow(clippy::too_many_arguments)]
async fn serve(
    app: &Arc<App>,
    catalog: &Catalog,
    client: SocketAddr,
    model: &ModelId,
    parts: Parts,
    path: PathAndQuery,
    body: Bytes,
    streams: bool,
) -> Result<Response<Body>, ApiError> {
    let asked = parts.uri.path().to_owned();
    let dialect = if streams { Dialect::of(path.path()) } else { None };
    // What is asked for in another form (Ollama's) has no words for it.
    let shows = dialect.is_some()
        && Dialect::of(&asked).is_some()
        && catalog.model(model).is_some_and(|m| m.send_loading_state)
        && app.house.status(model).is_none_or(|s| s.state != State::Ready);
    let mut trace = app.activity.begin(
        kind(&parts, &path),
        model.clone(),
        parts.method.clone(),
        asked,
        headers::shown(client.ip()).into_owned(),
        &parts.headers,
    );
    trace.describe(catalog.model(model).map(|m| m.priority), &parts.extensions);
    trace.record(&parts.headers, &body);
    let mut request = Request::new(body);
    *request.method_mut() = parts.method;
    *request.headers_mut() = parts.headers;
    tidy_request(request.headers_mut(), client);
    let work = work(app.clone(), model.clone(), request, path, trace);
    let Some(dialect) = dialect else {
        return work.await;
    };
    let work: Work = Box::pin(work);
    let (patience, shown) = if shows {
        (Duration::ZERO, Shown::Progress(model.to_string()))
    } else {
        (SILENCE, Shown::Comments)
    };
    early(work, patience, shown, dialect).await
}

/// What is made of a request: inference is counted, and whatever else a model's own page asks for passes.
pub(super) fn kind(parts: &Parts, path: &PathAndQuery) -> Kind {
    let below = parts.uri.path().starts_with("/upstream/");
    if below && routes::find(&parts.method, path.path()) != Ok(routes::Route::Inference) {
        Kind::Passing
    } else if parts.method == Method::POST {
        Kind::Metered
    } else {
        Kind::Shown
    }
}

/// The reply of this work, or after `patience` one that begins before it is there.
pub(super) async fn early(
    mut work: Work,
    patience: Duration,
    shown: Shown,
    dialect: Dialect,
) -> Result<Response<Body>, ApiError> {
    // Looked at once even without patience: what is refused at once is refused with its own status.
    match tokio::time::timeout(patience, &mut work).await {
        Ok(result) => result,
        Err(_) => Ok(pending::begin(work, shown, dialect)),
    }
}

async fn work(
    app: Arc<App>,
    model: ModelId,
    request: Request<Bytes>,
    path: PathAndQuery,
    mut trace: Trace,
) -> Result<Response<Body>, ApiError> {
    let running = trace.running.clone();
    let result = tokio::select! {
        biased;
        why = running.wire.until_ordered() => Err(error::ordered(&model, why)),
        result = exchange(&app, &model, request, &path, &mut trace) => result,
    };
    match result {
        Ok((response, lease)) => Ok(pass_back(response, Source::Here(lease), trace)),
        Err(error) => {
            trace.failed(error.status, &error.message);
            Err(error)
        }
    }
}

/// One request to a ready process, and the head of its reply.
///
/// A process that died since it was last used may not have been reaped yet. Where it has left the request unread, the
/// request goes to the next one.
async fn exchange(
    app: &Arc<App>,
    model: &ModelId,
    mut request: Request<Bytes>,
    path: &PathAndQuery,
    trace: &mut Trace,
) -> Result<(Response<upstream::Incoming>, Lease), ApiError> {
    let mut tried = false;
    loop {
        let lease = app
            .house
            .lease(model, &trace.running.wire)
            .await
            .map_err(|r| error::rejected(model, &r))?;
        let Some((pool, prefix)) = lease.upstream() else {
            return Err(ApiError::internal(format!(
                "model '{model}' is ready and has no address"
            )));
        };
        *request.uri_mut() = prefixed(prefix, path)?;
        trace.forwarded();
        let wire = &trace.running.wire;
        let error = match pool.send(&request, &|closer| wire.attach(closer)).await {
            Ok(response) => return Ok((response, lease)),
            Err(error) => error,
        };
        // What the process says about its own end is worth a moment's wait.
        let gone = lease.process.ended(DYING).await;
        if !tried && gone && error.is_unread() {
            tried = true;
            continue;
        }
        return Err(error::no_reply(model, &error, &app.house.logs.tail(model, 20)));
    }
}

pub(super) fn prefixed(prefix: &str, path: &PathAndQuery) -> Result<Uri, ApiError> {
    if prefix.is_empty() {
        return Ok(Uri::from(path.clone()));
    }
    let whole = format!("{prefix}{path}");
    whole
        .parse()
        .map_err(|_| ApiError::bad_request(format!("the path {whole} is malformed")))
}

pub(super) fn pass_back(
    response: Response<upstream::Incoming>,
    source: Source,
    mut trace: Trace,
) -> Response<Body> {
    let (mut parts, incoming) = response.into_parts();
    drop_headers(&mut parts.headers, |_| false);
    let kind = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let stream = kind.starts_with("text/event-stream");
    // Comments and errors are put only into what has room for them: no promised length, no compression.
    let events = stream
        && !parts.headers.contains_key(header::CONTENT_LENGTH)
        && !parts.headers.contains_key(header::CONTENT_ENCODING);
    trace.head(parts.status.as_u16(), kind);
    trace.record_reply(&parts.headers);
    if stream {
        parts
            .headers
            .insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    }
    Response::from_parts(
        parts,
        Body::Upstream(Box::new(UpstreamBody::new(incoming, source, trace, events))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_the_name_stays_as_written() {
        for (raw, name, rest) in [
            ("m/files/a%2Fb%2fc", 1, "/files/a%2Fb%2fc"),
            ("org%2Fm/files/a%2Fb", 5, "/files/a%2Fb"),
            ("org%2Fm%2ffiles/a%2Fb", 5, "/files/a%2Fb"),
            ("a%3Ab%c3%a9/%20", 5, "/%20"),
            ("50%/x%2", 3, "/x%2"),
            ("org/m", 5, ""),
            ("m", 9, ""),
        ] {
            assert_eq!(as_written(raw, name), rest, "{raw}");
        }
    }
}
