//! Ollama's routes: each is translated, forwarded as the OpenAI request that it stands for, and translated back.

mod lists;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use api_types::error::ApiError;
use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue, RETRY_AFTER};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Limited};
use lifecycle::ModelId;
use serde_json::{Value, json};

use super::auth::Access;
use super::body::{Body, Broken, Incoming};
use super::extract::Place;
use super::{App, error, forward};
use crate::activity::{ForwardedAt, rfc3339, unix_ms};
use crate::catalog::Catalog;
use crate::house::House;
use crate::ollama::reply::{self, Voice};
use crate::ollama::request::{self, Asked, Generation, KeepAlive, Wanted};
use crate::ollama::stream::{Part, Translator, error_text};
use crate::ollama::{API_LEVEL, Times};
use crate::select::Choice;

/// Largest reply that is collected to be answered as one object.
const MAX_REPLY: usize = 256 << 20;
/// Largest error of a model's server that is quoted.
const MAX_ERROR: usize = 64 << 10;

/// One of the routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// All models.
    Tags,
    /// Loaded models.
    Ps,
    /// One model.
    Show,
    /// A conversation.
    Chat,
    /// A prompt.
    Generate,
    /// Vectors for texts.
    Embed,
    /// The older form of it, one text.
    Embeddings,
    /// What handles model files: none of it is done here.
    Files,
}

pub(super) async fn answer(
    app: &Arc<App>,
    catalog: &Arc<Catalog>,
    access: &Access,
    client: SocketAddr,
    call: Call,
    request: Request<Incoming>,
) -> Result<Response<Body>, ApiError> {
    let begun = Instant::now();
    let (parts, incoming) = request.into_parts();
    let asked = match call {
        Call::Tags => return lists::tags(catalog, access).await,
        Call::Ps => return lists::ps(app, catalog, access).await,
        Call::Show => {
            let body = forward::read(app, incoming).await?;
            return lists::show(app, catalog, access, &body).await;
        }
        Call::Files => return Err(files(parts.uri.path())),
        Call::Chat => request::chat(&forward::read(app, incoming).await?)?,
        Call::Generate => request::generate(&forward::read(app, incoming).await?)?,
        Call::Embed => request::embed(&forward::read(app, incoming).await?, "input")?,
        Call::Embeddings => request::embed(&forward::read(app, incoming).await?, "prompt")?,
    };
    let Asked {
        model: written,
        wanted,
        keep_alive,
    } = asked;
    let (choice, name) = choose(app, catalog, access, &written)?;
    // What a peer keeps is its own affair.
    let keep = keep_alive.zip(choice.model()).map(|(time, model)| Keep {
        house: app.house.clone(),
        model: model.clone(),
        time,
    });
    let errand = Errand {
        app,
        catalog,
        client,
        choice: &choice,
        name: &name,
        forwarded: ForwardedAt::default(),
    };
    match wanted {
        Wanted::Load(shape) | Wanted::Unload(shape) if matches!(call, Call::Chat | Call::Generate) => {
            let unload = matches!(wanted, Wanted::Unload(_));
            if let Some(model) = choice.model().filter(|_| !unload) {
                app.house
                    .load(model)
                    .await
                    .map_err(|r| error::rejected(model, &r))?;
            }
            drop(keep);
            let voice = Voice {
                shape,
                model: written,
            };
            let reason = if unload { "unload" } else { "load" };
            Ok(json_reply(&voice.nothing(&rfc3339(unix_ms()), reason)))
        }
        Wanted::Load(_) | Wanted::Unload(_) => {
            if let Some(model) = choice.model().filter(|_| matches!(wanted, Wanted::Load(_))) {
                app.house
                    .load(model)
                    .await
                    .map_err(|r| error::rejected(model, &r))?;
            }
            let nothing = if call == Call::Embed {
                json!({"model": written, "embeddings": []})
            } else {
                json!({"embedding": []})
            };
            Ok(json_reply(&nothing))
        }
        Wanted::Vectors(body) => {
            let response = errand.send(parts, "/v1/embeddings", body, false).await?;
            let reply = collected(response).await?;
            let times = Clock {
                begun,
                forwarded: errand.forwarded,
                first: None,
            }
            .times();
            let vectors = match call {
                Call::Embeddings => reply::one_vector(reply),
                _ => reply::vectors(&written, reply, &times),
            };
            vectors.map(|v| json_reply(&v)).map_err(bad_reply)
        }
        Wanted::Generation(generation) => {
            let Generation {
                path,
                body,
                stream,
                shape,
            } = *generation;
            let response = errand.send(parts, path, body, stream).await?;
            let clock = Clock {
                begun,
                forwarded: errand.forwarded,
                first: None,
            };
            let voice = Voice {
                shape,
                model: written,
            };
            let events = is_events(&response);
            if stream && events {
                return Ok(lines(response.into_body(), voice, clock, keep));
            }
            let whole = whole(response, voice, clock).await?;
            Ok(if stream {
                ndjson(Body::Full(line_of(&whole)))
            } else {
                json_reply(&whole)
            })
        }
    }
}

/// Where a name leads; `name:latest` is Ollama's way to write `name`. With the name that was found.
fn choose(
    app: &App,
    catalog: &Catalog,
    access: &Access,
    written: &str,
) -> Result<(Choice, String), ApiError> {
    match (
        forward::choose(app, catalog, access, written),
        written.strip_suffix(":latest"),
    ) {
        (Err(error), Some(bare)) if error.status == 404 => {
            let found = forward::choose(app, catalog, access, bare);
            found
                .map(|choice| (choice, bare.to_owned()))
                .map_err(|e| if e.status == 404 { error } else { e })
        }
        (result, _) => result.map(|choice| (choice, written.to_owned())),
    }
}

/// A request on its way.
struct Errand<'a> {
    app: &'a Arc<App>,
    catalog: &'a Arc<Catalog>,
    client: SocketAddr,
    choice: &'a Choice,
    name: &'a str,
    forwarded: ForwardedAt,
}

impl Errand<'_> {
    /// Sends the translated body; the reply of the model's server if it is a good one.
    async fn send(
        &self,
        mut parts: Parts,
        path: &'static str,
        mut body: Value,
        stream: bool,
    ) -> Result<Response<Body>, ApiError> {
        if let Some(map) = body.as_object_mut() {
            map.insert("model".to_owned(), self.name.into());
        }
        parts
            .headers
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        parts.headers.insert(ACCEPT, HeaderValue::from_static("*/*"));
        parts.extensions.insert(self.forwarded.clone());
        let (place, path) = (Place::Json { stream }, PathAndQuery::from_static(path));
        let body = Bytes::from(body.to_string());
        let Self {
            app,
            catalog,
            client,
            choice,
            name,
            ..
        } = self;
        let response = forward::named(app, catalog, *client, choice, name, &place, parts, path, body).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|v| v.to_str().ok()?.parse().ok());
        let text = Limited::new(response.into_body(), MAX_ERROR).collect().await;
        let text = text.map(|t| t.to_bytes()).unwrap_or_default();
        let message = match serde_json::from_slice::<Value>(&text) {
            Ok(value) => error_text(value.get("error").unwrap_or(&value)),
            Err(_) if text.is_empty() => format!("the model's server answered {status}"),
            Err(_) => String::from_utf8_lossy(&text).into_owned(),
        };
        let error = ApiError::bad_request(message);
        Err(ApiError {
            status: status.as_u16(),
            retry_after,
            ..error
        })
    }
}

/// Changes the idle time of the model when the request is over, however it ends.
#[derive(Debug)]
struct Keep {
    house: Arc<House>,
    model: ModelId,
    time: KeepAlive,
}

impl Drop for Keep {
    fn drop(&mut self) {
        let time = match self.time {
            KeepAlive::Forever => None,
            KeepAlive::For(time) => Some(time),
        };
        self.house.keep_alive(&self.model, time);
    }
}

#[derive(Debug)]
struct Clock {
    begun: Instant,
    forwarded: ForwardedAt,
    first: Option<Instant>,
}

impl Clock {
    /// Takes note of the first thing that is said.
    fn heard(&mut self, parts: &[Part]) {
        if self.first.is_none()
            && parts
                .iter()
                .any(|p| matches!(p, Part::Text { .. } | Part::Calls(_)))
        {
            self.first = Some(Instant::now());
        }
    }

    fn times(&self) -> Times {
        let since = |at: &Instant| at.saturating_duration_since(self.begun);
        Times {
            forwarded: self.forwarded.0.get().map(since),
            first: self.first.as_ref().map(since),
            end: self.begun.elapsed(),
        }
    }
}

fn is_events(response: &Response<Body>) -> bool {
    let kind = response
        .headers()
        .get(CONTENT_TYPE)
        .map(HeaderValue::as_bytes)
        .unwrap_or_default();
    kind.starts_with(b"text/event-stream")
}

/// A reply in one object, from a stream or not.
async fn whole(response: Response<Body>, voice: Voice, mut clock: Clock) -> Result<Value, ApiError> {
    let mut parts = Vec::new();
    if is_events(&response) {
        let mut translator = Translator::new();
        let mut body = Limited::new(response.into_body(), MAX_REPLY);
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { break };
            let more = translator.push(frame.data_ref().map(Bytes::as_ref).unwrap_or_default());
            clock.heard(&more);
            parts.extend(more);
        }
        parts.extend(translator.finish());
    } else {
        parts = Translator::whole(collected(response).await?);
    }
    voice
        .whole(parts, &rfc3339(unix_ms()), &clock.times())
        .map_err(bad_reply)
}

async fn collected(response: Response<Body>) -> Result<Value, ApiError> {
    let body = Limited::new(response.into_body(), MAX_REPLY).collect().await;
    let body = body.map_err(|e| bad_reply(format!("the reply could not be read: {e}")))?;
    serde_json::from_slice(&body.to_bytes()).map_err(|e| bad_reply(format!("the reply is no JSON: {e}")))
}

fn bad_reply(why: impl Into<String>) -> ApiError {
    error::bad_gateway("upstream_error", why.into())
}

/// A stream of lines.
pub struct Ndjson {
    inner: Box<Body>,
    translator: Translator,
    voice: Voice,
    clock: Clock,
    queue: VecDeque<Bytes>,
    over: bool,
    _keep: Option<Keep>,
}

impl std::fmt::Debug for Ndjson {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ndjson")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

impl Ndjson {
    /// Lines as the events come; one that breaks off ends with an error's line, and the connection with it.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        loop {
            if let Some(lines) = self.queue.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(lines))));
            }
            if self.over {
                return Poll::Ready(None);
            }
            match std::task::ready!(Pin::new(self.inner.as_mut()).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    let parts = self
                        .translator
                        .push(frame.data_ref().map(Bytes::as_ref).unwrap_or_default());
                    self.say(&parts);
                }
                Some(Err(broken)) => return Poll::Ready(Some(Err(broken))),
                None => {
                    self.over = true;
                    let parts = self.translator.finish();
                    self.say(&parts);
                }
            }
        }
    }

    fn say(&mut self, parts: &[Part]) {
        self.clock.heard(parts);
        if parts.is_empty() {
            return;
        }
        let (now, times) = (rfc3339(unix_ms()), self.clock.times());
        let mut out = BytesMut::new();
        for part in parts {
            out.extend_from_slice(&line_of(&self.voice.line(part, &now, &times)));
        }
        self.queue.push_back(out.freeze());
    }
}

fn line_of(value: &Value) -> Bytes {
    Bytes::from(format!("{value}\n"))
}

fn lines(body: Body, voice: Voice, clock: Clock, keep: Option<Keep>) -> Response<Body> {
    ndjson(Body::Lines(Box::new(Ndjson {
        inner: Box::new(body),
        translator: Translator::new(),
        voice,
        clock,
        queue: VecDeque::new(),
        over: false,
        _keep: keep,
    })))
}

fn ndjson(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}

fn json_reply(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::Full(value.to_string().into()));
    response.headers_mut().insert(
        CONTENT_TYPE,
        HeaderValue::from_static("application/json; charset=utf-8"),
    );
    response
}

/// An error in Ollama's form.
#[must_use]
pub fn error_reply(error: &ApiError) -> Response<Body> {
    let mut response = json_reply(&json!({"error": error.message}));
    *response.status_mut() = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    if let Some(seconds) = error.retry_after {
        response
            .headers_mut()
            .insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// `/api/version` for clients of Ollama: the level of its API, and what really answers.
#[must_use]
pub fn version() -> Response<Body> {
    json_reply(&json!({"version": API_LEVEL, "swapd_version": env!("CARGO_PKG_VERSION")}))
}

fn files(path: &str) -> ApiError {
    let what = path.strip_prefix("/api/").unwrap_or(path);
    let error = ApiError::bad_request(format!(
        "{what} is not supported: swapd's models come from its registry, and it neither fetches nor changes them"
    ));
    ApiError { status: 501, ..error }
}
