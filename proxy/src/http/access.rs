//! The access log: one line for each request, written when its reply has ended.

use std::io::Write;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http::header::USER_AGENT;
use http::{Request, Response, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::body::{Body, Broken};
use crate::logs::Logs;

/// Paths that are asked for by machines, all the time.
const QUIET: [&str; 3] = ["/wol-health", "/api/performance", "/metrics"];

/// What is known of a request; its line is written when it is dropped.
#[derive(Debug)]
struct Entry {
    logs: Logs,
    client: IpAddr,
    /// The request line without what follows the path, and behind it the client's name for itself.
    told: String,
    agent: usize,
    begun: Instant,
    status: u16,
    bytes: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let time = self.begun.elapsed();
        let (request, agent) = self.told.split_at_checked(self.agent).unwrap_or_default();
        let Self {
            logs,
            client,
            status,
            bytes,
            ..
        } = self;
        logs.inform(|line| {
            let _ = write!(
                line,
                "Request {client} \"{request}\" {status} {bytes} \"{agent}\" {time:?}"
            );
        });
    }
}

/// A request whose line is still to be written, if it is to have one.
#[derive(Debug)]
pub(super) struct Begun(Option<Box<Entry>>);

/// A request has arrived. Costs nothing where the log's level leaves such lines out.
pub(super) fn begin<B>(logs: &Logs, client: IpAddr, request: &Request<B>) -> Begun {
    let path = request.uri().path();
    if !tracing::enabled!(tracing::Level::INFO) || QUIET.iter().any(|quiet| path.starts_with(quiet)) {
        return Begun(None);
    }
    let agent = request.headers().get(USER_AGENT).and_then(|v| v.to_str().ok());
    let agent = agent.unwrap_or_default();
    let version = match request.version() {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2.0",
        _ => "HTTP/1.1",
    };
    let method = request.method().as_str();
    let mut told = String::with_capacity(method.len() + path.len() + version.len() + agent.len() + 2);
    told.push_str(method);
    told.push(' ');
    if path.bytes().all(|b| b.is_ascii_graphic()) {
        told.push_str(path);
    } else {
        // Nobody writes a terminal's commands into the log.
        told.extend(path.escape_debug());
    }
    told.push(' ');
    told.push_str(version);
    let behind = told.len();
    told.push_str(agent);
    Begun(Some(Box::new(Entry {
        logs: logs.clone(),
        client,
        told,
        agent: behind,
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
