//! The access log: one line for each request, written when its reply has ended.

use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http::header::USER_AGENT;
use http::{Method, Request, Response, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::body::{Body, Broken};

/// Paths that are asked for by machines, all the time.
const QUIET: [&str; 3] = ["/wol-health", "/api/performance", "/metrics"];

/// What is known of a request; its line is written when it is dropped.
#[derive(Debug)]
struct Entry {
    client: IpAddr,
    method: Method,
    path: String,
    version: Version,
    agent: String,
    begun: Instant,
    status: u16,
    bytes: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Self {
            client,
            method,
            path,
            version,
            agent,
            begun,
            status,
            bytes,
        } = self;
        let time = begun.elapsed();
        tracing::info!(
            "Request {client} \"{method} {path} {version:?}\" {status} {bytes} \"{agent}\" {time:?}"
        );
    }
}

/// A request whose line is still to be written, if it is to have one.
#[derive(Debug)]
pub(super) struct Begun(Option<Box<Entry>>);

/// A request has arrived. Costs nothing where the log's level leaves such lines out.
pub(super) fn begin<B>(client: IpAddr, request: &Request<B>) -> Begun {
    let path = request.uri().path();
    if !tracing::enabled!(tracing::Level::INFO) || QUIET.iter().any(|quiet| path.starts_with(quiet)) {
        return Begun(None);
    }
    let agent = request.headers().get(USER_AGENT).and_then(|v| v.to_str().ok());
    Begun(Some(Box::new(Entry {
        client,
        method: request.method().clone(),
        path: path.to_owned(),
        version: request.version(),
        agent: agent.unwrap_or_default().to_owned(),
        begun: Instant::now(),
        status: 0,
        bytes: 0,
    })))
}

/// Its reply, counted on the way out.
pub(super) fn count(response: Response<Body>, Begun(mut entry): Begun) -> Response<Counted> {
    if let Some(entry) = &mut entry {
        entry.status = response.status().as_u16();
    }
    response.map(|body| Counted { body, entry })
}

/// A reply's body whose bytes are counted for the log.
#[derive(Debug)]
pub struct Counted {
    body: Body,
    entry: Option<Box<Entry>>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let this = self.get_mut();
        let next = Pin::new(&mut this.body).poll_frame(cx);
        if let (Poll::Ready(Some(Ok(frame))), Some(entry)) = (&next, &mut this.entry) {
            entry.bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        next
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
