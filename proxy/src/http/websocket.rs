//! Upgraded connections (WebSocket): a handshake forwarded, then bytes both ways until either side ends.

use std::net::SocketAddr;
use std::sync::Arc;

use api_types::error::ApiError;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use lifecycle::{ModelId, State};
use tokio::io::AsyncWriteExt;

use super::App;
use super::body::{Body, Incoming};
use super::error;
use super::forward::prefixed;
use super::headers::{shown, tidy_request};
use crate::activity::{Kind, Trace};
use crate::house::{Lease, Wire};
use crate::process::Process;

/// Whether the client asks for a WebSocket on its connection. Other protocols that clients offer (`h2c`, with any
/// request) are declined by answering as if nothing had been said, as RFC 9110 has it.
#[must_use]
pub fn is_upgrade(method: &Method, headers: &HeaderMap) -> bool {
    let Some(asked) = headers.get(header::UPGRADE) else {
        return false;
    };
    let among = |value: Option<&HeaderValue>, wanted: &str| {
        let list = value.and_then(|v| v.to_str().ok()).unwrap_or_default();
        list.split(',').any(|one| one.trim().eq_ignore_ascii_case(wanted))
    };
    *method == Method::GET
        && among(Some(asked), "websocket")
        && among(headers.get(header::CONNECTION), "upgrade")
}

/// What keeps the process while the connection lasts.
enum Hold {
    /// In flight like any request.
    Lease(Lease, Box<Trace>),
    /// The model's WebSockets count for nothing.
    Loose(Arc<Process>),
}

/// A WebSocket is shown, and can be ended, as long as it is open; there is nothing in it to count.
pub(super) fn begin(app: &App, model: ModelId, client: SocketAddr, request: &Request<Incoming>) -> Trace {
    app.activity.begin(
        Kind::Shown,
        model,
        request.method().clone(),
        request.uri().path().to_owned(),
        shown(client.ip()).into_owned(),
        request.headers(),
    )
}

/// Forwards an upgrade to the model's server.
pub(super) async fn forward(
    app: &Arc<App>,
    client: SocketAddr,
    model: &ModelId,
    mut request: Request<Incoming>,
    path: &PathAndQuery,
) -> Result<Response<Body>, ApiError> {
    let loose = app
        .house
        .catalog()
        .model(model)
        .is_some_and(|m| m.ignore_websockets);
    let mut wire = Arc::new(Wire::default());
    let mut hold = if loose {
        let ready = app
            .house
            .statuses()
            .into_iter()
            .find(|(id, s, _)| id == model && s.state == State::Ready);
        let process = ready.and_then(|(_, _, process)| process);
        Hold::Loose(process.ok_or_else(|| error::not_loaded(model, path.path()))?)
    } else {
        let trace = begin(app, model.clone(), client, &request);
        wire = trace.running.wire.clone();
        let lease = tokio::select! {
            biased;
            why = wire.until_ordered() => return Err(error::ordered(model, why)),
            lease = app.house.lease(model, &wire) => lease,
        };
        Hold::Lease(lease.map_err(|r| error::rejected(model, &r))?, Box::new(trace))
    };
    let process = match &hold {
        Hold::Lease(lease, _) => &lease.process,
        Hold::Loose(process) => process,
    };
    let Some((pool, prefix)) = process.upstream.get().cloned() else {
        return Err(ApiError::internal(format!(
            "model '{model}' is ready and has no address"
        )));
    };
    let protocol = request.headers().get(header::UPGRADE).cloned();
    let mut onward = Request::new(Bytes::new());
    *onward.method_mut() = request.method().clone();
    *onward.uri_mut() = prefixed(&prefix, path)?;
    *onward.headers_mut() = request.headers().clone();
    tidy_request(onward.headers_mut(), client);
    onward
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    if let Some(protocol) = protocol {
        onward.headers_mut().insert(header::UPGRADE, protocol);
    }
    let sent = tokio::select! {
        biased;
        why = wire.until_ordered() => return Err(error::ordered(model, why)),
        sent = pool.send(&onward, &|_| ()) => sent,
    };
    let response = sent.map_err(|e| error::no_reply(model, &e, &app.house.logs.tail(model, 20)))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status();
        let message = format!("the server of model '{model}' did not upgrade the connection: {status}");
        return Err(error::bad_gateway("upgrade_refused", message));
    }
    let downstream = hyper::upgrade::on(&mut request);
    let (parts, body) = response.into_parts();
    if let Hold::Lease(_, trace) = &mut hold {
        trace.record_reply(&parts.headers);
    }
    let Some((mut upstream, early)) = body.into_upgraded() else {
        return Err(ApiError::internal("the upgraded connection is gone"));
    };
    tokio::spawn(async move {
        // Held until the end.
        let _hold = hold;
        let copying = async {
            if let Ok(downstream) = downstream.await {
                let mut downstream = TokioIo::new(downstream);
                if downstream.write_all(&early).await.is_ok() {
                    let _ = tokio::io::copy_bidirectional(&mut upstream, &mut downstream).await;
                }
            }
        };
        tokio::select! {
            () = copying => {}
            _ = wire.until_ordered() => {}
        }
    });
    Ok(Response::from_parts(parts, Body::empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_websocket_is_an_upgrade() {
        let asks = |method: Method, connection: &'static str, protocol: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONNECTION, HeaderValue::from_static(connection));
            headers.insert(header::UPGRADE, HeaderValue::from_static(protocol));
            is_upgrade(&method, &headers)
        };
        assert!(asks(Method::GET, "Upgrade", "websocket"));
        assert!(asks(Method::GET, "keep-alive, upgrade", "h2c, WebSocket"));
        assert!(!asks(Method::GET, "Upgrade, HTTP2-Settings", "h2c"));
        assert!(!asks(Method::POST, "Upgrade", "websocket"));
        assert!(!asks(Method::GET, "close", "websocket"));
    }
}
