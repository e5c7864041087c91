//! One request over one kept connection, and the moments at which its reply came.

use std::borrow::Cow;
use std::cell::Cell;
use std::time::Duration;

use api_types::sse::Decoder;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::IgnoredAny;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::options::Endpoint;

/// How a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Failure {
    /// Nobody listens.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// An answer with an error's status.
    #[error("status {0}: {1}")]
    Status(u16, String),
    /// The server said within the stream that it failed.
    #[error("error in the stream: {0}")]
    InStream(String),
    /// The connection or the stream ended too early.
    #[error("broken off: {0}")]
    Broken(String),
    /// It took longer than the limit.
    #[error("no end within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// Not what the API promises.
    #[error("not understood: {0}")]
    Malformed(String),
    /// A reply to its end, without any text.
    #[error("an empty reply")]
    Empty,
}

impl Failure {
    /// A short name, under which equal failures are counted.
    #[must_use]
    pub fn kind(&self) -> String {
        match self {
            Self::Connect(_) => "connect".to_owned(),
            Self::Status(status, _) => format!("http {status}"),
            Self::InStream(_) => "stream error".to_owned(),
            Self::Broken(_) => "broken off".to_owned(),
            Self::Timeout(_) => "timeout".to_owned(),
            Self::Malformed(_) => "malformed".to_owned(),
            Self::Empty => "empty".to_owned(),
        }
    }
}

/// A connection that is used again when it still can.
#[derive(Debug, Default)]
pub struct Connection(Option<SendRequest<Full<Bytes>>>);

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Client {
    authority: String,
    base: String,
    authorization: Option<String>,
    limit: Duration,
}

/// What became of a request for a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// When the first text came, whatever came afterwards, since the request was due.
    pub first: Option<Duration>,
    /// The whole reply.
    pub result: Result<Reply, Failure>,
}

/// A streamed reply that came to its end.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// When each piece of text came, counted as the first of the [`Answer`] is.
    pub pieces: Vec<Duration>,
    /// Tokens generated: as the server says, otherwise the number of pieces.
    pub tokens: usize,
    /// Tokens of the prompt, if the server says.
    pub prompt_tokens: Option<u64>,
    /// Of them from a cache, if the server says.
    pub cached_tokens: Option<u64>,
    /// The answer's text, reasoning left out.
    pub text: String,
}

#[derive(Deserialize)]
struct Chunk<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    usage: Option<Usage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow)]
    delta: Option<Delta<'a>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Cow<'a, str>>,
    reasoning_content: Option<Cow<'a, str>>,
    reasoning: Option<Cow<'a, str>>,
    tool_calls: Option<Vec<IgnoredAny>>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

impl Client {
    /// For an endpoint.
    #[must_use]
    pub fn new(endpoint: &Endpoint, api_key: Option<&str>, limit: Duration) -> Self {
        Self {
            authority: endpoint.authority.clone(),
            base: endpoint.base.clone(),
            authorization: api_key.map(|key| format!("Bearer {key}")),
            limit,
        }
    }

    /// Any request with a JSON answer.
    ///
    /// # Errors
    /// No answer in time, a status that is no success, or no JSON.
    pub async fn json(
        &self,
        connection: &mut Connection,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<serde_json::Value, Failure> {
        self.limited(connection, async |connection| {
            let response = self.send(connection, method, path, body).await?;
            let whole = collect(response).await?;
            serde_json::from_slice(&whole).map_err(|error| Failure::Malformed(error.to_string()))
        })
        .await
    }

    /// A request with `"stream": true`, read to its end. All moments are counted from `due`, when it should have been
    /// sent: if this program was late, that was time in which a person waited.
    pub async fn stream(&self, connection: &mut Connection, path: &str, body: Bytes, due: Instant) -> Answer {
        let first = Cell::new(None);
        let result = self
            .limited(connection, async |connection| {
                let response = self.send(connection, Method::POST, path, body).await?;
                read(response, due, &first).await
            })
            .await;
        Answer {
            first: first.get(),
            result,
        }
    }

    async fn limited<T>(
        &self,
        connection: &mut Connection,
        work: impl AsyncFnOnce(&mut Connection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let result = tokio::time::timeout(self.limit, work(connection))
            .await
            .unwrap_or(Err(Failure::Timeout(self.limit)));
        if result.is_err() {
            // Whatever state it is in; the server sees the client go.
            connection.0 = None;
        }
        result
    }

    async fn send(
        &self,
        connection: &mut Connection,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, Failure> {
        let sender = self.connected(connection).await?;
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(value) = &self.authorization {
            request = request.header(header::AUTHORIZATION, value);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| Failure::Malformed(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
        if response.status() == StatusCode::OK {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let text = collect(response).await?;
        let text = String::from_utf8_lossy(&text);
        Err(Failure::Status(status, text.chars().take(300).collect()))
    }

    async fn connected<'a>(
        &self,
        connection: &'a mut Connection,
    ) -> Result<&'a mut SendRequest<Full<Bytes>>, Failure> {
        let usable = match connection.0.as_mut() {
            Some(sender) => sender.ready().await.is_ok(),
            None => false,
        };
        if !usable {
            let stream = TcpStream::connect(&self.authority)
                .await
                .map_err(|error| Failure::Connect(error.to_string()))?;
            // Small requests: waiting to fill a packet would be measured.
            stream
                .set_nodelay(true)
                .map_err(|error| Failure::Connect(error.to_string()))?;
            let (sender, driver) = http1::handshake(TokioIo::new(stream))
                .await
                .map_err(|e| broken(&e))?;
            // Its errors come out of the request as well.
            tokio::task::spawn_local(driver);
            connection.0 = Some(sender);
        }
        let none = || Failure::Connect("no connection".to_owned());
        connection.0.as_mut().ok_or_else(none)
    }
}

fn broken(error: &hyper::Error) -> Failure {
    let mut text = error.to_string();
    if let Some(source) = std::error::Error::source(error) {
        text = format!("{text}: {source}");
    }
    Failure::Broken(text)
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, Failure> {
    let body = response.into_body().collect().await.map_err(|e| broken(&e))?;
    Ok(body.to_bytes())
}

/// Reads a stream to its end; `first` is set when its first text comes, because a stream may break after that.
async fn read(
    response: Response<Incoming>,
    due: Instant,
    first: &Cell<Option<Duration>>,
) -> Result<Reply, Failure> {
    let mut body = response.into_body();
    let mut decoder = Decoder::new();
    let mut reply = Reply {
        pieces: Vec::new(),
        tokens: 0,
        prompt_tokens: None,
        cached_tokens: None,
        text: String::new(),
    };
    let (mut counted, mut done) = (None, false);
    while let Some(frame) = body.frame().await {
        let frame = match frame {
            Ok(frame) => frame,
            // Some servers close rudely after the end.
            Err(_) if done => break,
            Err(error) => return Err(broken(&error)),
        };
        let now = due.elapsed();
        let Some(data) = frame.data_ref() else { continue };
        for event in decoder.push(data) {
            if event.data == "[DONE]" {
                done = true;
                continue;
            }
            let chunk: Chunk<'_> =
                serde_json::from_str(&event.data).map_err(|error| Failure::Malformed(error.to_string()))?;
            if let Some(error) = chunk.error.filter(|e| !e.is_null()) {
                return Err(Failure::InStream(error.to_string()));
            }
            if let Some(usage) = chunk.usage {
                counted = usage.completion_tokens.or(counted);
                reply.prompt_tokens = usage.prompt_tokens.or(reply.prompt_tokens);
                let cached = usage.prompt_tokens_details.and_then(|d| d.cached_tokens);
                reply.cached_tokens = cached.or(reply.cached_tokens);
            }
            let mut generated = false;
            for choice in &chunk.choices {
                generated |= choice.take(&mut reply.text);
            }
            if generated {
                reply.pieces.push(now);
                first.set(first.get().or(Some(now)));
            }
        }
    }
    if !done {
        return Err(Failure::Broken("the stream ended without [DONE]".to_owned()));
    }
    if reply.pieces.is_empty() {
        return Err(Failure::Empty);
    }
    reply.tokens = counted
        .and_then(|c| usize::try_from(c).ok())
        .unwrap_or(reply.pieces.len());
    Ok(reply)
}

impl Choice<'_> {
    /// Appends the answer's text; says whether anything was generated, reasoning and tool calls included.
    fn take(&self, text: &mut String) -> bool {
        let delta = self.delta.as_ref();
        let said = [self.text.as_deref(), delta.and_then(|d| d.content.as_deref())];
        let before = text.len();
        said.into_iter().flatten().for_each(|part| text.push_str(part));
        text.len() > before || delta.is_some_and(Delta::has_more)
    }
}

impl Delta<'_> {
    fn has_more(&self) -> bool {
        let thought = self.reasoning_content.as_deref().or(self.reasoning.as_deref());
        thought.is_some_and(|text| !text.is_empty())
            || self.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty())
    }
}
