//! A run to a stream of events, or to one JSON object.

use std::sync::Arc;

use api_types::ApiError;
use api_types::openai::{FinishReason, Usage};
use api_types::sse;
use axum::body::Body;
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use chat_format::Delta;
use futures_util::stream;
use http::{HeaderMap, HeaderValue, header};
use serde::Serialize;

use super::choice::PlacedLogprob;
use super::prompt::Clamped;
use super::run::{Run, Step};
use super::service::Service;

/// Bytes gathered before they are handed to the connection, when the engine is faster than the client.
const BATCH: usize = 32 << 10;
/// What an empty buffer starts with: a few chunks.
const FIRST_BUFFER: usize = 4 << 10;

/// Writes one route's stream.
pub(super) trait Chunks: Send + 'static {
    /// Before the first piece of any choice.
    fn open(&mut self, out: &mut BytesMut, choices: usize);
    /// A piece of a choice, and its end.
    fn piece(
        &mut self,
        out: &mut BytesMut,
        index: usize,
        deltas: &mut Vec<Delta>,
        logprobs: Vec<PlacedLogprob>,
        end: Option<FinishReason>,
    );
    /// After the last one.
    fn close(&mut self, out: &mut BytesMut, usage: &Usage);
}

/// Gathers one route's reply.
pub(super) trait Whole {
    type Reply: Serialize;
    /// A piece of a choice, and its end.
    fn piece(
        &mut self,
        index: usize,
        deltas: &mut Vec<Delta>,
        logprobs: Vec<PlacedLogprob>,
        end: Option<FinishReason>,
    );
    /// Everything has ended.
    fn finish(self, usage: Usage) -> Self::Reply;
}

/// Answers in one piece.
///
/// # Errors
/// The run's.
pub(super) async fn whole<W: Whole>(
    service: &Arc<Service>,
    mut run: Run,
    mut reply: W,
    clamped: Option<Clamped>,
) -> Result<Response, ApiError> {
    loop {
        match run.step(service.config.silence_limit).await? {
            Step::Choice { index, end } => {
                let Run { choices, deltas, .. } = &mut run;
                let logprobs = choices
                    .get_mut(index)
                    .map(super::choice::Choice::take_logprobs)
                    .unwrap_or_default();
                reply.piece(index, deltas, logprobs, end);
            }
            Step::Silence => {}
            Step::Done => break,
        }
    }
    let reply = reply.finish(run.complete());
    let json = serde_json::to_vec(&reply).map_err(|e| ApiError::internal(e.to_string()))?;
    let mut response = Response::new(Body::from(json));
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    note_clamped(response.headers_mut(), clamped);
    Ok(response)
}

/// Answers as events. Waits for the first token (or the end of patience) before the status goes out, so that what
/// fails before it fails with a status of its own.
///
/// # Errors
/// The run's, as long as nothing has been sent.
pub(super) async fn streamed<C: Chunks>(
    service: &Arc<Service>,
    run: Run,
    chunks: C,
    clamped: Option<Clamped>,
) -> Result<Response, ApiError> {
    let mut writer = Writer {
        service: Arc::clone(service),
        run,
        chunks,
        out: BytesMut::new(),
        state: State::Open,
    };
    let first = writer.run.step(service.config.keep_alive).await?;
    writer.out.reserve(FIRST_BUFFER);
    if let Some(clamped) = clamped {
        // Whoever passes the stream on may have sent a head of its own already, where no header of this one shows.
        let comment = format!(": max_tokens clamped: {clamped}\n\n");
        writer.out.put_slice(comment.as_bytes());
    }
    let choices = writer.run.choices.len();
    writer.chunks.open(&mut writer.out, choices);
    writer.write(first);
    writer.write_ready();
    let body = stream::unfold(writer, |mut writer| async move {
        let item = writer.next().await?;
        Some((item, writer))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(sse::CONTENT_TYPE));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // For nginx and its like, which gather otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    note_clamped(headers, clamped);
    Ok(response)
}

/// Says that a reply may be shorter than what was asked for.
fn note_clamped(headers: &mut HeaderMap, clamped: Option<Clamped>) {
    if let Some(clamped) = clamped
        && let Ok(value) = HeaderValue::from_str(&clamped.to_string())
    {
        headers.insert("x-max-tokens-clamped", value);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// More will come.
    Open,
    /// All is written; what is in the buffer is the last.
    Complete,
    /// An error event is written; the connection must not end as if nothing had happened.
    Broken,
    /// The error event has been handed over.
    BrokenAndSent,
}

struct Writer<C> {
    service: Arc<Service>,
    run: Run,
    chunks: C,
    out: BytesMut,
    state: State,
}

/// Ends a response without the end of its body, so that nobody takes the part for the whole.
#[derive(Debug, thiserror::Error)]
#[error("the reply was broken off")]
pub(super) struct BrokenOff;

impl<C: Chunks> Writer<C> {
    /// The next bytes of the body.
    async fn next(&mut self) -> Option<Result<Bytes, BrokenOff>> {
        if self.out.is_empty() {
            match self.state {
                State::Open => match self.run.step(self.service.config.keep_alive).await {
                    Ok(step) => {
                        self.write(step);
                        self.write_ready();
                    }
                    Err(error) => self.break_off(&error),
                },
                State::Complete => return None,
                State::Broken => {
                    self.state = State::BrokenAndSent;
                    // Hand control back once, which lets the connection flush the error event before it is cut.
                    tokio::task::yield_now().await;
                    return Some(Err(BrokenOff));
                }
                State::BrokenAndSent => return None,
            }
        }
        Some(Ok(self.out.split().freeze()))
    }

    /// Writes what has happened already, so that a client that is slower than the engine gets few large pieces.
    fn write_ready(&mut self) {
        while self.state == State::Open && self.out.len() < BATCH {
            match self.run.try_step() {
                Ok(Some(step)) => self.write(step),
                Ok(None) => break,
                Err(error) => self.break_off(&error),
            }
        }
    }

    fn write(&mut self, step: Step) {
        match step {
            Step::Choice { index, end } => {
                let Run { choices, deltas, .. } = &mut self.run;
                let logprobs = choices
                    .get_mut(index)
                    .map(super::choice::Choice::take_logprobs)
                    .unwrap_or_default();
                self.chunks.piece(&mut self.out, index, deltas, logprobs, end);
            }
            Step::Silence => self.out.put_slice(sse::KEEP_ALIVE),
            Step::Done => {
                let usage = self.run.complete();
                self.chunks.close(&mut self.out, &usage);
                self.out.put_slice(sse::DONE);
                self.state = State::Complete;
            }
        }
    }

    fn break_off(&mut self, error: &ApiError) {
        sse::put_error(&mut self.out, error);
        self.state = State::Broken;
    }
}
