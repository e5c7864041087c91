//! A streamed reply that begins before its model is ready: comments or progress first, then the model's own bytes.
//!
//! Once the head has been sent a failure can only be told in the stream: as an error event, after which the client's
//! connection is closed without the end mark.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use api_types::error::ApiError;
use bytes::Bytes;
use http::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use http_body::{Body as _, Frame};
use tokio::time::Sleep;

use super::body::{Body, Broken};
use super::dialect::Dialect;

/// Silence after which a comment keeps the connection alive.
pub const SILENCE: Duration = Duration::from_secs(15);
/// Time between two signs of progress.
const PROGRESS: Duration = Duration::from_millis(750);
/// Most of a plain reply (an error) that is quoted in an event.
const MAX_QUOTED: usize = 64 * 1024;

/// A comment of server-sent events: every reader skips it.
pub const COMMENT: &[u8] = b": keep-alive\n\n";

/// The work that ends in a reply.
pub type Work = Pin<Box<dyn Future<Output = Result<Response<Body>, ApiError>> + Send>>;

/// What the client sees while it waits.
#[derive(Clone, Debug)]
pub enum Shown {
    /// Comments now and then.
    Comments,
    /// The progress of loading this model.
    Progress(String),
}

/// The body of a reply that has begun early.
pub struct Pending {
    state: State,
    shown: Shown,
    dialect: Dialect,
    begun: Instant,
    queue: Vec<Bytes>,
}

enum State {
    Waiting(Work, Pin<Box<Sleep>>),
    Streaming(Box<Body>),
    /// An error is collected, to be told as an event.
    Quoting(Box<Body>, Vec<u8>),
    /// A good reply that is no stream passes as the data of one event. Whether its next byte begins a line.
    Telling(Box<Body>, bool),
    Over,
    /// The event is on its way; then the connection is closed.
    Flushing,
    Broken,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending")
            .field("shown", &self.shown)
            .finish_non_exhaustive()
    }
}

/// Begins the reply now.
#[must_use]
pub fn begin(work: Work, shown: Shown, dialect: Dialect) -> Response<Body> {
    let (delay, queue) = match &shown {
        Shown::Comments => (SILENCE, vec![Bytes::from_static(COMMENT)]),
        Shown::Progress(model) => (
            PROGRESS,
            vec![
                dialect.progress("━━━━━\n"),
                dialect.progress(&format!("swapd loading model: {model}\n")),
            ],
        ),
    };
    let state = State::Waiting(work, Box::pin(tokio::time::sleep(delay)));
    let body = Pending {
        state,
        shown,
        dialect,
        begun: Instant::now(),
        queue,
    };
    let mut response = Response::new(Body::Pending(Box::new(body)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    response
}

/// A piece of a reply as lines of an event's data.
fn data_lines(piece: &[u8], fresh: &mut bool) -> Bytes {
    let mut out = Vec::with_capacity(piece.len() + 16);
    for line in piece.split_inclusive(|b| *b == b'\n') {
        if *fresh {
            out.extend_from_slice(b"data: ");
        }
        out.extend_from_slice(line);
        *fresh = line.ends_with(b"\n");
    }
    out.into()
}

impl Pending {
    /// Whether the reply's own bytes have all been passed on.
    pub(super) fn is_end(&self) -> bool {
        matches!(&self.state, State::Streaming(body) if self.queue.is_empty() && body.is_end_stream())
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        loop {
            if !self.queue.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(self.queue.remove(0)))));
            }
            match &mut self.state {
                State::Waiting(work, timer) => match work.as_mut().poll(cx) {
                    Poll::Ready(result) => self.answered(result),
                    Poll::Pending => {
                        std::task::ready!(timer.as_mut().poll(cx));
                        let (delay, piece) = match &self.shown {
                            Shown::Comments => (SILENCE, Bytes::from_static(COMMENT)),
                            Shown::Progress(_) => (PROGRESS, self.dialect.progress(".")),
                        };
                        timer.as_mut().reset(tokio::time::Instant::now() + delay);
                        self.queue.push(piece);
                    }
                },
                State::Streaming(body) => return Pin::new(body.as_mut()).poll_frame(cx),
                State::Quoting(body, text) => match std::task::ready!(Pin::new(body.as_mut()).poll_frame(cx))
                {
                    Some(Ok(frame)) => {
                        let data = frame.into_data().unwrap_or_default();
                        let room = MAX_QUOTED.saturating_sub(text.len()).min(data.len());
                        text.extend_from_slice(data.get(..room).unwrap_or_default());
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    None => {
                        let quoted = std::mem::take(text);
                        self.quote(&quoted);
                    }
                },
                State::Telling(body, fresh) => {
                    match std::task::ready!(Pin::new(body.as_mut()).poll_frame(cx)) {
                        Some(Ok(frame)) => {
                            let data = frame.into_data().unwrap_or_default();
                            if !data.is_empty() {
                                self.queue.push(data_lines(&data, fresh));
                            }
                        }
                        Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                        None => {
                            let gap: &[u8] = if *fresh { b"\n" } else { b"\n\n" };
                            self.queue.push([gap, self.dialect.end()].concat().into());
                            self.state = State::Over;
                        }
                    }
                }
                State::Over => return Poll::Ready(None),
                State::Flushing => {
                    self.state = State::Broken;
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                State::Broken => return Poll::Ready(Some(Err(Broken))),
            }
        }
    }

    fn answered(&mut self, result: Result<Response<Body>, ApiError>) {
        match result {
            Err(error) => {
                self.queue.push(self.dialect.error(&error).into());
                self.state = State::Flushing;
            }
            Ok(response) => {
                let (parts, body) = response.into_parts();
                let kind = parts
                    .headers
                    .get(CONTENT_TYPE)
                    .map(HeaderValue::as_bytes)
                    .unwrap_or_default();
                if parts.status.is_success() && kind.starts_with(b"text/event-stream") {
                    if matches!(self.shown, Shown::Progress(_)) {
                        let seconds = self.begun.elapsed().as_secs_f64();
                        let done = format!("\nDone! ({seconds:.2}s)\n━━━━━\n");
                        self.queue.push(self.dialect.progress(&done));
                    }
                    self.state = State::Streaming(Box::new(body));
                } else if parts.status.is_success() {
                    self.state = State::Telling(Box::new(body), true);
                } else {
                    self.state = State::Quoting(Box::new(body), Vec::new());
                }
            }
        }
    }

    /// Tells a plain error as an event: its own JSON, or its text in an envelope.
    fn quote(&mut self, text: &[u8]) {
        let own = serde_json::from_slice::<serde_json::Value>(text)
            .ok()
            .filter(|v| v.get("error").is_some());
        let event = match own {
            Some(whole) => self.dialect.error_of(whole),
            None => {
                let error = ApiError::internal(String::from_utf8_lossy(text)).with_code("upstream_error");
                self.dialect.error(&error)
            }
        };
        self.queue.push(event.into());
        self.state = State::Flushing;
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    async fn next(body: &mut Body) -> Option<Result<String, Broken>> {
        let frame = body.frame().await?;
        Some(frame.map(|f| String::from_utf8(f.into_data().unwrap().to_vec()).unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_filled_with_comments() {
        let begun = tokio::time::Instant::now();
        let mut body = begin(Box::pin(std::future::pending()), Shown::Comments, Dialect::Chat).into_body();
        assert_eq!(next(&mut body).await.unwrap().unwrap().as_bytes(), COMMENT);
        assert_eq!(next(&mut body).await.unwrap().unwrap().as_bytes(), COMMENT);
        assert_eq!(begun.elapsed().as_secs(), SILENCE.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_failure_is_an_event_and_no_clean_end() {
        let failed: Work = Box::pin(async { Err(ApiError::unavailable("x", "why", None)) });
        let plain: Work = Box::pin(async {
            let mut response = Response::new(Body::Full("{\"error\":{\"message\":\"why\"}}".into()));
            *response.status_mut() = http::StatusCode::BAD_REQUEST;
            Ok(response)
        });
        for work in [failed, plain] {
            let mut body = begin(work, Shown::Comments, Dialect::Chat).into_body();
            next(&mut body).await;
            let event = next(&mut body).await.unwrap().unwrap();
            assert!(
                event.starts_with("data: {\"error\":{\"message\":\"why\""),
                "{event}"
            );
            assert!(next(&mut body).await.unwrap().is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_good_reply_that_is_no_stream_is_one_event() {
        let text = format!("{{\"a\":\n \"{}\"}}", "x".repeat(100_000));
        for (dialect, end) in [(Dialect::Text, "data: [DONE]\n\n"), (Dialect::Messages, "")] {
            let reply = Response::new(Body::Full(text.clone().into()));
            let mut body = begin(Box::pin(async { Ok(reply) }), Shown::Comments, dialect).into_body();
            let mut seen = String::new();
            while let Some(piece) = next(&mut body).await {
                seen.push_str(&piece.unwrap());
            }
            let data = text.replace('\n', "\ndata: ");
            assert_eq!(seen, format!(": keep-alive\n\ndata: {data}\n\n{end}"));
        }
    }

    #[test]
    fn lines_that_are_cut_go_on() {
        let mut fresh = true;
        let cut: Vec<Bytes> = [b"a\n".as_slice(), b"b", b"c\nd"]
            .map(|p| data_lines(p, &mut fresh))
            .to_vec();
        assert_eq!(cut.concat(), b"data: a\ndata: bc\ndata: d");
    }
}
