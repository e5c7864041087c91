//! The access log: one line for each request, written when its reply has ended.

use std::fmt::Write;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http::header::USER_AGENT;
use http::{Request, Response, Version};
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::body::{Body, Broken};
use super::headers;
use crate::logs::Logs;

/// Paths that are asked for by machines, all the time.
const QUIET: [&str; 3] = ["/wol-health", "/api/performance", "/metrics"];

/// Status of a request whose client left before there was a reply.
const GONE: u16 = 499;

/// What is known of a request; its line is written when it is dropped.
#[derive(Debug)]
struct Entry {
    logs: Logs,
    /// The line up to the status, and behind it the client's name for itself.
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
        // Piece by piece: a format's arguments are handed over one by one, each by a call that nobody can look through.
        self.logs.inform(|line| {
            line.push_str(request);
            push_number(line, self.status.into());
            line.push(' ');
            push_number(line, self.bytes);
            line.push_str(" \"");
            line.push_str(agent);
            line.push_str("\" ");
            let _ = write!(line, "{time:?}");
        });
    }
}

fn push_number(line: &mut String, n: u64) {
    if n >= 10 {
        push_number(line, n / 10);
    }
    line.push(char::from(b'0' + u8::try_from(n % 10).unwrap_or_default()));
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
    let (client, method) = (headers::shown(client), request.method().as_str());
    let mut told = String::with_capacity(client.len() + method.len() + path.len() + agent.len() + 32);
    told.push_str("Request ");
    told.push_str(&client);
    told.push_str(" \"");
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
    told.push_str("\" ");
    let behind = told.len();
    told.push_str(agent);
    Begun(Some(Box::new(Entry {
        logs: logs.clone(),
        told,
        agent: behind,
        begun: Instant::now(),
        status: GONE,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The line of a request; without a reply its client has left.
    fn line(request: http::request::Builder, reply: Option<&'static str>) -> String {
        let logs = Logs::default();
        let request = request.body(()).unwrap();
        let client = IpAddr::from([127, 0, 0, 1]);
        // Without a subscriber every level is off.
        let subscriber = tracing_subscriber::fmt()
            .with_writer(std::io::sink)
            .with_max_level(tracing::Level::INFO)
            .finish();
        let begun = tracing::subscriber::with_default(subscriber, || begin(&logs, client, &request));
        if let Some(reply) = reply {
            let reply = Body::Full(Bytes::from_static(reply.as_bytes()));
            let mut counted = count(Response::new(reply), begun);
            let mut cx = Context::from_waker(std::task::Waker::noop());
            assert!(Pin::new(&mut counted).poll_frame(&mut cx).is_ready());
        } else {
            drop(begun);
        }
        String::from_utf8(logs.history(|_| true)).unwrap()
    }

    #[test]
    fn numbers_and_what_a_client_sends_are_told_as_they_are() {
        let long = "x".repeat(1_090);
        let cases = [
            (
                Request::get("/v1/models?key=secret"),
                Some(""),
                "GET /v1/models HTTP/1.1\" 200 0 \"\"",
            ),
            (
                Request::put("/a%1bb")
                    .header("user-agent", "c/1 (\"x\")")
                    .version(Version::HTTP_2),
                Some("0123456789"),
                "PUT /a%1bb HTTP/2.0\" 200 10 \"c/1 (\"x\")\"",
            ),
            (
                Request::get("/"),
                Some(long.leak()),
                "GET / HTTP/1.1\" 200 1090 \"\"",
            ),
            (Request::get("/"), None, "GET / HTTP/1.1\" 499 0 \"\""),
        ];
        for (request, reply, expected) in cases {
            let line = line(request, reply);
            let begin = format!("[INFO] Request 127.0.0.1 \"{expected} ");
            assert!(line.starts_with(&begin) && line.ends_with("s\n"), "{line}");
        }
        // Bytes that are no text of their own do not reach a terminal.
        let odd = Request::get("/\u{9b}31mred");
        if odd.uri_ref().is_some() {
            assert!(line(odd, Some("")).contains("GET /\\u{9b}31mred "));
        }
    }
}
