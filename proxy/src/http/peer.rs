//! Forwarding to peers: the request under the peer's own name for the model and with its own key, the reply back.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use api_types::error::ApiError;
use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;

use super::App;
use super::body::{Body, Incoming, Source};
use super::dialect::Dialect;
use super::error;
use super::extract::{self, Place};
use super::forward::{early, kind, pass_back, prefixed};
use super::headers::drop_headers;
use super::pending::{SILENCE, Shown, Work};
use super::websocket;
use crate::activity::Trace;
use crate::catalog::Catalog;
use crate::peers::{Far, Visit};
use crate::rewrite::Rewrite;
use crate::upstream::{self, Error};

/// What a client shows to this proxy, and what tells where it sits: not for others.
const PRIVATE: [HeaderName; 13] = [
    header::AUTHORIZATION,
    header::PROXY_AUTHORIZATION,
    header::COOKIE,
    header::FORWARDED,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
    HeaderName::from_static("x-forwarded-for"),
    HeaderName::from_static("x-forwarded-host"),
    HeaderName::from_static("x-forwarded-proto"),
    HeaderName::from_static("x-real-ip"),
    // hyper sets it from the body that is really sent.
    header::CONTENT_LENGTH,
    header::EXPECT,
];

/// Headers of a reply that are about the peer's address, and would be taken for being about this one.
const ABOUT_THE_PEER: [HeaderName; 2] = [header::STRICT_TRANSPORT_SECURITY, header::ALT_SVC];

/// A request for a peer's model.
pub(super) struct Ask {
    /// Where it may go, in this order.
    pub(super) far: Vec<Far>,
    /// The name that was asked for.
    pub(super) name: String,
    /// Where that name stands; `None`: only in the path of `/upstream`.
    pub(super) place: Option<Place>,
    /// Path and query below the peer's own.
    pub(super) path: PathAndQuery,
    pub(super) parts: Parts,
    pub(super) body: Bytes,
}

impl Ask {
    /// The request for whoever comes after all peers.
    pub(super) fn again(&self) -> Self {
        Self {
            far: Vec::new(),
            name: self.name.clone(),
            place: self.place.clone(),
            path: self.path.clone(),
            parts: self.parts.clone(),
            body: self.body.clone(),
        }
    }
}

/// Sends the request to the first peer that takes it and passes the reply back.
pub(super) async fn serve(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    client: SocketAddr,
    ask: Ask,
) -> Result<Response<Body>, ApiError> {
    no_loop(app, &ask.parts.headers)?;
    let Some(first) = ask.far.first() else {
        return Err(error::unknown_model(catalog, &ask.name));
    };
    let mut trace = app.activity.begin(
        kind(&ask.parts, &ask.path),
        first.name(),
        ask.parts.method.clone(),
        ask.parts.uri.path().to_owned(),
        client.ip().to_string(),
        &ask.parts.headers,
    );
    trace.describe(None, &ask.parts.extensions);
    trace.record(&ask.parts.headers, &ask.body);
    let dialect = match ask.place {
        Some(Place::Json { stream: true }) => Dialect::of(ask.path.path()),
        _ => None,
    };
    let work = work(app.clone(), catalog.clone(), ask, trace);
    let Some(dialect) = dialect else {
        return work.await;
    };
    let work: Work = Box::pin(work);
    early(work, SILENCE, Shown::Comments, dialect).await
}

/// Two proxies that take each other for a peer would send a request round and round.
fn no_loop(app: &App, headers: &HeaderMap) -> Result<(), ApiError> {
    let hops = headers
        .get_all(header::VIA)
        .iter()
        .filter_map(|v| v.to_str().ok());
    let mut hops = hops
        .flat_map(|v| v.split(','))
        .filter_map(|hop| hop.split_whitespace().nth(1));
    if !hops.any(|hop| hop == app.via) {
        return Ok(());
    }
    Err(ApiError {
        status: 508,
        ..ApiError::internal(
            "the request has been here before: peers that are peers of each other both lack the model",
        )
    }
    .with_code("peer_loop"))
}

/// Headers as a peer is to see them.
fn headers_for_peers(app: &App, headers: &mut HeaderMap) {
    drop_headers(headers, |_| false);
    for name in &PRIVATE {
        headers.remove(name);
    }
    if let Ok(hop) = HeaderValue::from_str(&format!("1.1 {}", app.via)) {
        headers.append(header::VIA, hop);
    }
}

async fn work(
    app: Arc<App>,
    catalog: Arc<Catalog>,
    mut ask: Ask,
    mut trace: Trace,
) -> Result<Response<Body>, ApiError> {
    headers_for_peers(&app, &mut ask.parts.headers);
    let running = trace.running.clone();
    let result = tokio::select! {
        biased;
        why = running.wire.until_ordered() => Err(error::ordered(&running.model, why)),
        result = exchange(&catalog, &ask, &mut trace) => result,
    };
    match result {
        Ok((mut response, visit)) => {
            for name in &ABOUT_THE_PEER {
                response.headers_mut().remove(name);
            }
            Ok(pass_back(response, Source::There(visit), trace))
        }
        Err(error) => {
            trace.failed(error.status, &error.message);
            Err(error)
        }
    }
}

/// Asks one peer after the other. Only what has certainly not been worked on goes on to the next one: the peer was not
/// reached, or refuses for now.
async fn exchange(
    catalog: &Catalog,
    ask: &Ask,
    trace: &mut Trace,
) -> Result<(Response<upstream::Incoming>, Visit), ApiError> {
    let mut failed = None;
    for (i, far) in ask.far.iter().enumerate() {
        let last = i + 1 == ask.far.len();
        if let Some((left, why)) = far.peer.rests() {
            failed.get_or_insert_with(|| resting(far, left, &why));
            continue;
        }
        let request = request(ask, far)?;
        let visit = catalog.peers.visit(far);
        trace.served_by(far.name());
        trace.forwarded();
        let wire = &trace.running.wire;
        match far.peer.pool.send(&request, &|closer| wire.attach(closer)).await {
            Ok(response) => {
                far.peer.answered();
                let refuses = matches!(
                    response.status(),
                    StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
                );
                // The last one's own words go to the client.
                if last || !refuses {
                    return Ok((response, visit));
                }
                let message = format!("peer '{}' refuses: {}", far.peer.id, response.status());
                tracing::info!(model = %far.model, "{message}; asking the next one");
                failed = Some(ApiError::unavailable("peer_busy", message, Some(1)));
            }
            Err(error @ Error::Connect(_)) => {
                far.peer.failed(&error.to_string());
                failed = Some(no_reply(far, &error));
            }
            Err(error) => return Err(no_reply(far, &error)),
        }
    }
    Err(failed.unwrap_or_else(|| ApiError::internal("no peer to ask")))
}

/// Whether no peer has taken the request: another server may have it.
pub(super) fn is_untaken(error: &ApiError) -> bool {
    matches!(error.code, Some("peer_unreachable" | "peer_down" | "peer_busy"))
}

fn no_reply(far: &Far, error: &Error) -> ApiError {
    let Far { peer, model } = far;
    let message = format!(
        "peer '{}' ({}) gave no reply for model '{model}': {error}",
        peer.id, peer.entry.proxy
    );
    match error {
        Error::Timeout(_) => ApiError::timed_out(message),
        Error::Connect(_) => error::bad_gateway("peer_unreachable", message + LOCAL_NETWORK),
        Error::Broken(_) => error::bad_gateway("peer_error", message),
    }
}

/// The one cause that nobody thinks of.
#[cfg(target_os = "macos")]
const LOCAL_NETWORK: &str = "; for a peer in the local network, macOS must allow it: System Settings, Privacy & Security, Local Network";
#[cfg(not(target_os = "macos"))]
const LOCAL_NETWORK: &str = "";

fn resting(far: &Far, left: Duration, why: &str) -> ApiError {
    let seconds = u64::try_from(left.as_millis().div_ceil(1000)).unwrap_or(1).max(1);
    ApiError::unavailable(
        "peer_down",
        format!(
            "peer '{}' ({}) failed and is asked again in {seconds} s: {why}",
            far.peer.id, far.peer.entry.proxy
        ),
        Some(seconds),
    )
}

/// The request as this peer is to see it.
fn request(ask: &Ask, far: &Far) -> Result<Request<Bytes>, ApiError> {
    let path = match ask.place {
        Some(Place::Query) => extract::replace_in_query(&ask.path, &far.model),
        _ => ask.path.clone(),
    };
    let mut request = Request::new(body(ask, far)?);
    *request.method_mut() = ask.parts.method.clone();
    *request.uri_mut() = prefixed(&far.peer.prefix, &path)?;
    *request.headers_mut() = ask.parts.headers.clone();
    request.headers_mut().insert(header::HOST, far.peer.host.clone());
    far.peer.present_key(request.headers_mut());
    Ok(request)
}

fn body(ask: &Ask, far: &Far) -> Result<Bytes, ApiError> {
    match &ask.place {
        None | Some(Place::Query) => Ok(ask.body.clone()),
        Some(place @ (Place::Form(_) | Place::Encoded(_))) => {
            Ok(extract::replace_name(&ask.body, place, &far.model))
        }
        Some(Place::Json { .. }) => {
            // Asked for by the peer's own name nothing is to be written for it.
            let name = (ask.name != far.model).then_some(far.model.as_str());
            match Rewrite::new(&far.peer.entry.filters, name, &ask.name) {
                None => Ok(ask.body.clone()),
                Some(rewrite) => rewrite.apply(&ask.body).map_err(|e| {
                    ApiError::bad_request(format!("the body is not a JSON object (byte {})", e.at))
                }),
            }
        }
    }
}

/// Forwards an upgrade (WebSocket) to the first peer that can be reached.
pub(super) async fn upgrade(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    address: SocketAddr,
    mut client: Request<Incoming>,
    far: Vec<Far>,
    path: PathAndQuery,
    place: Option<Place>,
) -> Result<Response<Body>, ApiError> {
    no_loop(app, client.headers())?;
    let protocol = client.headers().get(header::UPGRADE).cloned();
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = client.method().clone();
    parts.headers = client.headers().clone();
    headers_for_peers(app, &mut parts.headers);
    parts
        .headers
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        parts.headers.insert(header::UPGRADE, protocol);
    }
    let ask = Ask {
        far,
        name: String::new(),
        place,
        path,
        parts,
        body: Bytes::new(),
    };
    let mut failed = None;
    for far in &ask.far {
        let request = request(&ask, far)?;
        let visit = catalog.peers.visit(far);
        let response = match far.peer.pool.send(&request, &|_| ()).await {
            Ok(sent) => sent,
            Err(error) => {
                let refusal = no_reply(far, &error);
                if !matches!(error, Error::Connect(_)) {
                    return Err(refusal);
                }
                far.peer.failed(&error.to_string());
                failed = Some(refusal);
                continue;
            }
        };
        far.peer.answered();
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let message = format!(
                "peer '{}' did not upgrade the connection: {}",
                far.peer.id,
                response.status()
            );
            return Err(error::bad_gateway("upgrade_refused", message));
        }
        let mut trace = websocket::begin(app, far.name(), address, &client);
        let here = hyper::upgrade::on(&mut client);
        let (parts, body) = response.into_parts();
        trace.record_reply(&parts.headers);
        let Some((mut there, early)) = body.into_upgraded() else {
            return Err(ApiError::internal("the upgraded connection is gone"));
        };
        tokio::spawn(async move {
            let copying = async {
                if let Ok(here) = here.await {
                    let mut here = TokioIo::new(here);
                    if here.write_all(&early).await.is_ok() {
                        let _ = tokio::io::copy_bidirectional(&mut there, &mut here).await;
                    }
                }
            };
            tokio::select! {
                () = copying => {}
                () = visit.cut() => {}
                _ = trace.running.wire.until_ordered() => {}
            }
        });
        return Ok(Response::from_parts(parts, Body::empty()));
    }
    Err(failed.unwrap_or_else(|| ApiError::internal("no peer to ask")))
}
