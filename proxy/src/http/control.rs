//! The proxy's own routes.

use std::sync::Arc;

use api_types::error::ApiError;
use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use lifecycle::{ModelId, State};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

use super::auth::Access;
use super::body::{Body, Incoming};
use super::error;
use super::listing;
use super::routes::Route;
use super::{App, activity, events, metrics};

use crate::catalog::Catalog;
use crate::clock::parse_rfc3339;
use crate::logs::Source;

/// Pieces of a live feed that wait for a slow reader.
const FEED_PIECES: usize = 64;

pub(super) async fn answer(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    access: &Access,
    route: Route,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    if *access != Access::All && !matches!(route, Route::Models | Route::Model(_)) {
        return Err(error::not_permitted(request.uri().path()));
    }
    match route {
        Route::Home => Ok(text("swapd is running\n")),
        Route::Icon => Ok(icon()),
        // llama-swap: to its page of models, in whose place there is none yet.
        Route::UpstreamPage => Ok(moved("/")),
        Route::Models => Ok(with_origin(
            json_reply(&listing::models(app, catalog, access)),
            &request,
        )),
        Route::Model(name) => {
            let Some((id, row)) = listing::one(app, catalog, &name) else {
                return Err(error::unknown_model(catalog, &name));
            };
            if !access.permits(&id, &name) {
                return Err(error::not_permitted(&name));
            }
            Ok(json_reply(&Value::Object(row)))
        }
        Route::Peers => {
            let peers: Vec<Value> = catalog.peers.iter().map(|p| p.to_json()).collect();
            Ok(json_reply(&json!({"peers": peers})))
        }
        Route::Metrics => Ok(metrics::answer(app)),
        Route::Activity => {
            let rows = activity::rows(app, request.uri().query()).await;
            rows.map(|v| json_reply(&v))
        }
        Route::Stats => {
            let stats = activity::stats(app, request.uri().query()).await;
            stats.map(|v| json_reply(&v))
        }
        Route::Capture(id) => activity::capture(app, &id).await.map(|v| json_reply(&v)),
        Route::Events => Ok(events::stream(app)),
        Route::Cancel(id) => match id.parse().is_ok_and(|id| app.activity.cancel(id)) {
            true => Ok(json_reply(&json!({"msg": "ok"}))),
            false => Err(ApiError::not_found(format!("no request '{id}' is running"))),
        },
        Route::Running => Ok(json_reply(&listing::running(app))),
        Route::Health => Ok(text("OK")),
        Route::Unload => {
            app.house.unload(None).await;
            Ok(text("OK"))
        }
        Route::ApiUnload => {
            app.house.unload(None).await;
            Ok(json_reply(&json!({"msg": "ok"})))
        }
        Route::ApiUnloadOne(name) => {
            app.house.unload(Some(find(app, &name)?)).await;
            Ok(text("OK"))
        }
        Route::ApiLoad(name) => {
            let model = find(app, &name)?;
            app.house
                .load(&model)
                .await
                .map_err(|r| error::rejected(&model, &r))?;
            Ok(json_reply(
                &json!({"model": &*model, "state": State::Ready.as_str()}),
            ))
        }
        Route::Reload => reload(app).await,
        Route::Profiles => Ok(json_reply(&profiles(app, catalog))),
        Route::ActiveProfile => {
            let body = super::forward::read(app, request.into_body()).await?;
            switch_profile(app, catalog, &body)
        }
        Route::Logs => Ok(text(app.house.logs.history(|_| true))),
        Route::LogStream(source) => log_stream(app, source.as_deref(), &request),
        Route::Version => Ok(json_reply(
            // The first three are llama-swap's; Ollama's clients read `version` too.
            &json!({"version": env!("CARGO_PKG_VERSION"), "commit": "unknown", "build_date": "unknown",
                    "ollama_version": crate::ollama::API_LEVEL}),
        )),
        Route::Hardware => match app.hardware.as_ref() {
            Some(found) => Ok(json_reply(found)),
            None => Err(ApiError::unavailable(
                "unknown_hardware",
                "the machine could not be looked at",
                None,
            )),
        },
        Route::Performance => performance(app, request.uri().query()),
        Route::Inference | Route::Upstream | Route::ComfyUi | Route::Ollama(_) => {
            Err(ApiError::internal("not a control route"))
        }
    }
}

/// Two models, one of which is on.
const ICON: &str = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>\
    <circle cx='5' cy='8' r='4' fill='#2a7'/><circle cx='11' cy='8' r='4' fill='none' stroke='#888' stroke-width='1.5'/>\
    </svg>\n";

fn icon() -> Response<Body> {
    let mut response = text(ICON);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("image/svg+xml"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=86400"));
    response
}

fn moved(to: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::FOUND;
    response
        .headers_mut()
        .insert(header::LOCATION, HeaderValue::from_static(to));
    response
}

/// CORS: what a browser asks before the real request.
pub(super) fn preflight<B>(request: &Request<B>) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let asked = request
        .headers()
        .get(header::ACCESS_CONTROL_REQUEST_HEADERS)
        .cloned();
    let usual = HeaderValue::from_static("Content-Type, Authorization, Accept, X-Requested-With");
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, POST, PUT, PATCH, DELETE, OPTIONS"),
    );
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked.unwrap_or(usual));
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    response
}

/// Measurements; 503 where none are made, as llama-swap has it.
fn performance(app: &App, query: Option<&str>) -> Result<Response<Body>, ApiError> {
    if !app.performance.is_enabled() {
        let mut response = json_reply(&json!({"enabled": false}));
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        return Ok(response);
    }
    let pairs = query
        .unwrap_or_default()
        .split('&')
        .filter_map(|p| p.split_once('='));
    let after = pairs
        .filter(|(key, _)| *key == "after")
        .map(|(_, v)| super::routes::decode(v))
        .next();
    let after = after.filter(|text| !text.is_empty());
    let after = match after {
        None => None,
        Some(text) => Some(
            parse_rfc3339(&text)
                .ok_or_else(|| ApiError::invalid("after", format!("'{text}' is not RFC 3339")))?,
        ),
    };
    Ok(json_reply(&app.performance.since(after)))
}

fn find(app: &App, name: &str) -> Result<ModelId, ApiError> {
    let catalog = app.house.catalog();
    catalog
        .resolve(name)
        .cloned()
        .ok_or_else(|| error::unknown_model(&catalog, name))
}

fn profiles(app: &App, catalog: &Catalog) -> Value {
    let rows = catalog.registry.profiles.iter();
    let rows = rows.map(|(name, p)| json!({"name": name, "description": p.description, "pins": p.pins}));
    json!({"active": *app.profile.lock(), "profiles": rows.collect::<Vec<_>>()})
}

/// `{"name": "..."}` switches a profile on, `{"name": null}` the active one off.
fn switch_profile(app: &App, catalog: &Catalog, body: &[u8]) -> Result<Response<Body>, ApiError> {
    let body: Value =
        serde_json::from_slice(body).map_err(|e| ApiError::bad_request(format!("no JSON: {e}")))?;
    let name = match body.get("name") {
        Some(Value::Null) => None,
        Some(Value::String(name)) => Some(name.clone()),
        Some(other) => {
            return Err(ApiError::invalid(
                "name",
                format!("{other} is neither a name nor null"),
            ));
        }
        None => return Err(ApiError::invalid("name", "is missing")),
    };
    if let Some(name) = name
        .as_ref()
        .filter(|n| !catalog.registry.profiles.contains_key(*n))
    {
        return Err(ApiError::not_found(format!("there is no profile '{name}'")));
    }
    tracing::info!(profile = ?name, "switched");
    app.profile_feed.send_replace(name.clone());
    *app.profile.lock() = name;
    Ok(json_reply(&profiles(app, catalog)))
}

/// Switches the active profile off, for ever, when a reload has taken it out of the registry.
pub async fn drop_lost_profile(app: Arc<App>) {
    let mut outcomes = app.reloader.outcomes();
    while outcomes.changed().await.is_ok() {
        let catalog = app.house.catalog();
        let mut active = app.profile.lock();
        if let Some(lost) = active.take_if(|name| !catalog.registry.profiles.contains_key(name)) {
            tracing::warn!(profile = %lost, "is no longer in the registry: switched off");
            app.profile_feed.send_replace(None);
        }
    }
}

async fn reload(app: &App) -> Result<Response<Body>, ApiError> {
    match app.reloader.reload().await {
        Ok(diff) => Ok(json_reply(&json!({
            "added": diff.added, "removed": diff.removed, "changed": diff.changed,
            "retuned": diff.retuned, "unchanged": diff.unchanged,
        }))),
        Err(findings) => {
            let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
            Err(ApiError::bad_request(lines.join("\n")).with_code("bad_registry"))
        }
    }
}

/// History, then live lines. A reader that is too slow loses lines and is told how many.
fn log_stream<B>(
    app: &Arc<App>,
    source: Option<&str>,
    request: &Request<B>,
) -> Result<Response<Body>, ApiError> {
    let logs = &app.house.logs;
    let wanted: Box<dyn Fn(&Source) -> bool + Send>;
    let (mut history, mut live) = match source {
        None | Some("proxy" | "upstream") => {
            wanted = match source {
                None => Box::new(|_| true),
                Some("proxy") => Box::new(|s| *s == Source::Proxy),
                Some(_) => Box::new(|s| matches!(s, Source::Model(_))),
            };
            logs.subscribe(&wanted)
        }
        Some(name) => {
            // llama-swap's answer to a source that there is not.
            let model = find(app, name).map_err(|e| ApiError { status: 400, ..e })?;
            // Its own history: in the common one the lines of others may have pushed it out.
            let subscribed = logs.subscribe_model(&model);
            wanted = Box::new(move |s| matches!(s, Source::Model(m) if *m == model));
            subscribed
        }
    };
    if request
        .uri()
        .query()
        .is_some_and(|q| q.split('&').any(|p| p.split('=').next() == Some("no-history")))
    {
        history.clear();
    }
    let (sender, receiver) = mpsc::channel(FEED_PIECES);
    tokio::spawn(async move {
        if !history.is_empty() && sender.send(history.into()).await.is_err() {
            return;
        }
        loop {
            let next = tokio::select! {
                next = live.recv() => next,
                () = sender.closed() => return,
            };
            let piece = match next {
                Ok(line) if wanted(&line.source) => line.text,
                Ok(_) => continue,
                Err(RecvError::Lagged(n)) => Bytes::from(format!("... {n} lines lost\n")),
                Err(RecvError::Closed) => return,
            };
            if sender.send(piece).await.is_err() {
                return;
            }
        }
    });
    let mut response = Response::new(Body::Channel(receiver));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response.headers_mut().insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    Ok(response)
}

fn with_origin<B>(mut response: Response<Body>, request: &Request<B>) -> Response<Body> {
    if let Some(origin) = request.headers().get(header::ORIGIN) {
        response
            .headers_mut()
            .insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
    }
    response
}

fn json_reply(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::Full(value.to_string().into()));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(super) fn text(text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Body::Full(text.into()));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}
