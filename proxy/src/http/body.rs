//! Bodies: a request's, read once; a reply's, own or passed through.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use api_types::error::ApiError;
use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;
use lifecycle::CutReason;
use tokio::sync::mpsc;
use tokio::time::Sleep;

use super::dialect::Dialect;
use super::error;
use super::ollama::Ndjson;
use super::pending::{COMMENT, Pending, SILENCE};
use crate::activity::Trace;
use crate::house::{Lease, Ordered};
use crate::peers::Visit;
use crate::upstream;

/// How long the death of a process may take to be seen after its connection was closed.
const DEATH: Duration = Duration::from_millis(50);

/// A request's body as it comes in. What nobody reads of it does not cost the client its answer.
pub type Incoming = linger::Body<hyper::body::Incoming>;

/// Why a request's body could not be read.
#[derive(Debug)]
pub enum ReadError {
    /// Larger than this many bytes.
    TooLarge(usize),
    /// The client went away, or sent nonsense.
    Broken(hyper::Error),
}

/// Reads a body whole, with one copy of it in memory.
///
/// # Errors
/// It is larger than `limit`, or breaks off.
pub async fn read(mut body: Incoming, limit: usize) -> Result<Bytes, ReadError> {
    let announced = body.size_hint().exact();
    if announced.is_some_and(|n| usize::try_from(n).map_or(true, |n| n > limit)) {
        return Err(ReadError::TooLarge(limit));
    }
    let mut first: Option<Bytes> = None;
    let mut rest: Option<BytesMut> = None;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(ReadError::Broken)?.into_data() else {
            continue;
        };
        let so_far = first.as_ref().map_or(0, Bytes::len) + rest.as_ref().map_or(0, BytesMut::len);
        if so_far.saturating_add(data.len()) > limit {
            return Err(ReadError::TooLarge(limit));
        }
        match (&mut rest, first.take()) {
            (Some(rest), _) => rest.extend_from_slice(&data),
            // Most bodies come in one piece, which is then used as it is.
            (None, None) => first = Some(data),
            (None, Some(begin)) => {
                let whole = announced.and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
                let mut all = BytesMut::with_capacity(whole.max(begin.len() + data.len()));
                all.extend_from_slice(&begin);
                all.extend_from_slice(&data);
                rest = Some(all);
            }
        }
    }
    Ok(rest.map(BytesMut::freeze).or(first).unwrap_or_default())
}

/// The reply breaks off here; the client's connection is closed without the end mark of the body.
#[derive(Debug)]
pub struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the model's server broke off its reply")
    }
}

impl std::error::Error for Broken {}

/// A reply's body.
#[derive(Debug)]
pub enum Body {
    /// Known whole.
    Full(Bytes),
    /// A model's reply, byte for byte.
    Upstream(Box<UpstreamBody>),
    /// A model's reply that begins before the model is ready.
    Pending(Box<Pending>),
    /// A model's stream in Ollama's form.
    Lines(Box<Ndjson>),
    /// Made here piece by piece (logs, events).
    Channel(mpsc::Receiver<Bytes>),
}

impl Body {
    /// No bytes.
    #[must_use]
    pub fn empty() -> Self {
        Self::Full(Bytes::new())
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match self.get_mut() {
            Self::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Upstream(body) => body.poll(cx),
            Self::Pending(body) => body.poll(cx),
            Self::Lines(body) => body.poll(cx),
            Self::Channel(receiver) => receiver
                .poll_recv(cx)
                .map(|next| next.map(|bytes| Ok(Frame::data(bytes)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_empty(),
            Self::Upstream(body) => matches!(body.state, Flow::Done),
            Self::Pending(body) => body.is_end(),
            Self::Channel(_) | Self::Lines(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Upstream(body) => match &body.state {
                Flow::Open(incoming) => incoming.size_hint(),
                Flow::Done => SizeHint::with_exact(0),
                Flow::Closing(..) | Flow::Flushing | Flow::Broken => SizeHint::default(),
            },
            Self::Channel(_) | Self::Pending(_) | Self::Lines(_) => SizeHint::default(),
        }
    }
}

/// Where a reply comes from, held until its end.
#[derive(Debug)]
pub enum Source {
    /// A process of this machine.
    Here(Lease),
    /// A peer.
    There(Visit),
}

/// A model's reply on its way through. Holds its source until the end; dropped before it, the connection is closed, so
/// that the model's server stops working for nobody.
#[derive(Debug)]
pub struct UpstreamBody {
    state: Flow,
    source: Option<Source>,
    trace: Trace,
    /// The reply is a stream of server-sent events: an error can be told in it.
    events: bool,
    /// Fires after a long silence in a stream of events; `None` until the first wait.
    silence: Option<Pin<Box<Sleep>>>,
    last_piece: Instant,
    /// The last bytes ended an event.
    between_events: bool,
}

/// Whether the process has died, by now or within a moment.
struct Verdict(Pin<Box<dyn Future<Output = bool> + Send>>);

impl Verdict {
    fn on(lease: &Lease) -> Self {
        let process = lease.process.clone();
        Self(Box::pin(async move { process.ended(DEATH).await }))
    }
}

impl std::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verdict")
    }
}

#[derive(Debug)]
enum Flow {
    Open(upstream::Incoming),
    /// The connection is gone. That is the end of the reply unless the process has died (`true`), or the end is known
    /// to be missing: for this reason.
    Closing(Verdict, Option<String>),
    /// An error event has been handed out and must be on its way before the connection is cut.
    Flushing,
    Broken,
    Done,
}

impl UpstreamBody {
    /// Passes `incoming` through. `events`: it is a stream of server-sent events.
    #[must_use]
    pub fn new(incoming: upstream::Incoming, source: Source, trace: Trace, events: bool) -> Self {
        let mut body = Self {
            state: Flow::Open(incoming),
            source: Some(source),
            trace,
            events,
            silence: None,
            last_piece: Instant::now(),
            between_events: true,
        };
        if matches!(&body.state, Flow::Open(incoming) if incoming.is_end_stream()) {
            body.finish();
        }
        body
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if let Flow::Closing(verdict, cause) = &mut self.state {
            let dead = ready!(verdict.0.as_mut().poll(cx));
            if let Some(cause) = cause.take() {
                return self.break_off(cx, &cause);
            }
            if dead {
                return self.break_off(cx, &"its connection was closed");
            }
            self.finish();
            return Poll::Ready(None);
        }
        if let Flow::Open(_) = &self.state
            && self.trace.running.wire.poll_ordered(cx).is_ready()
        {
            return self.break_off(cx, &"ended by order");
        }
        let Flow::Open(incoming) = &mut self.state else {
            return match self.state {
                Flow::Flushing => {
                    self.state = Flow::Broken;
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Flow::Broken => Poll::Ready(Some(Err(Broken))),
                Flow::Open(..) | Flow::Closing(..) | Flow::Done => Poll::Ready(None),
            };
        };
        let next = match Pin::new(&mut *incoming).poll_frame(cx) {
            Poll::Ready(next) => next,
            Poll::Pending => return self.keep_alive(cx),
        };
        match next {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.last_piece = Instant::now();
                    self.trace.piece(data, self.last_piece);
                    self.between_events = data.ends_with(b"\n\n") || data.ends_with(b"\r\n\r\n");
                }
                // A body of known length is not asked for more after its last byte.
                if matches!(&self.state, Flow::Open(incoming) if incoming.is_end_stream()) {
                    self.finish();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            None => {
                if incoming.ends_on_close() && !self.trace.saw_end() {
                    match &self.source {
                        Some(Source::Here(lease)) => {
                            self.state = Flow::Closing(Verdict::on(lease), None);
                            return self.poll(cx);
                        }
                        // Nobody can be asked; the streams that clients know have a mark at their end.
                        Some(Source::There(_)) if self.events => {
                            return self.break_off(cx, &"closed before the end mark");
                        }
                        _ => {}
                    }
                }
                self.finish();
                Poll::Ready(None)
            }
            Some(Err(error)) => match &self.source {
                // A moment, so that what it said last is there.
                Some(Source::Here(lease)) if self.trace.running.wire.ordered().is_none() => {
                    self.state = Flow::Closing(Verdict::on(lease), Some(error.to_string()));
                    self.poll(cx)
                }
                _ => self.break_off(cx, &error),
            },
        }
    }

    /// A comment after a long silence between two events.
    ///
    /// The timer runs on while pieces come and is only looked at when it fires: a busy stream pays nothing for it.
    fn keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        if !self.events {
            return Poll::Pending;
        }
        let timer = self
            .silence
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(SILENCE)));
        loop {
            ready!(timer.as_mut().poll(cx));
            let quiet = self.last_piece.elapsed();
            if quiet >= SILENCE && self.between_events {
                timer.as_mut().reset(tokio::time::Instant::now() + SILENCE);
                return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(COMMENT)))));
            }
            // In the middle of an event nothing may be put in between.
            let rest = SILENCE.saturating_sub(quiet);
            let delay = if rest.is_zero() { SILENCE } else { rest };
            timer.as_mut().reset(tokio::time::Instant::now() + delay);
        }
    }

    /// The reply is complete.
    fn finish(&mut self) {
        self.trace.complete();
        self.state = Flow::Done;
        self.trace.running.wire.detach();
        self.source = None;
    }

    /// Ends the reply with an error, once what was handed out before is on its way.
    fn break_off(
        &mut self,
        cx: &Context<'_>,
        error: &dyn std::fmt::Display,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let model = &self.trace.running.model;
        let died = match self.source.take() {
            Some(Source::There(visit)) => {
                format!(
                    "peer '{}' broke off in the middle of its reply: {error}",
                    visit.far.peer.id
                )
            }
            Some(Source::Here(lease)) => error::died(model, error.to_string(), lease.log_tail()),
            None => error::died(model, error.to_string(), String::new()),
        };
        let (code, message) = match self.trace.running.wire.ordered() {
            Some(Ordered::Cancelled) => ("cancelled", "the request was cancelled".to_owned()),
            None => ("upstream_died", died),
            Some(Ordered::Cut(CutReason::Unloaded)) => (
                "unloaded",
                format!("model '{model}' was unloaded and the grace is over"),
            ),
            Some(Ordered::Cut(CutReason::Memory)) => (
                "memory_critical",
                format!("model '{model}' was unloaded because memory is critically short"),
            ),
            Some(Ordered::Cut(CutReason::ShuttingDown)) => {
                ("shutting_down", "the proxy is shutting down".to_owned())
            }
        };
        tracing::warn!(%model, code, %error, "reply broken off");
        self.trace.failed(502, &message);
        if !self.events {
            self.state = Flow::Broken;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.state = Flow::Flushing;
        let error = ApiError::internal(message).with_code(code);
        let gap = if self.between_events { "" } else { "\n\n" };
        let event = format!("{gap}{}", Dialect::of_end(&self.trace.running.path).error(&error));
        Poll::Ready(Some(Ok(Frame::data(event.into()))))
    }
}
