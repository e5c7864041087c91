//! One client's connection: plain or TLS, HTTP/1.1 or HTTP/2.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{COOKIE, HOST, HeaderValue};
use http::{HeaderMap, Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::http::access::Counted;
use crate::http::{App, handle, handle_ollama};
use crate::joined::Joined;
use crate::tls;

/// How an HTTP/2 connection begins (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Longest TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Requests that may run side by side on one HTTP/2 connection.
const MAX_STREAMS: u32 = 1024;
/// Silence after which an HTTP/2 client is asked for a sign of life, and how long that may take.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(20);

/// What is served on a port.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Front {
    /// Everything.
    All,
    /// What clients of Ollama need.
    Ollama,
}

/// Who is connected, and to what.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) app: Arc<App>,
    pub(crate) client: SocketAddr,
    pub(crate) front: Front,
}

impl Caller {
    async fn answer(self, request: Request<Incoming>) -> Result<Response<Counted>, Infallible> {
        let request = linger::Body::wrap(request);
        match self.front {
            Front::All => handle(self.app, self.client, request).await,
            Front::Ollama => handle_ollama(self.app, self.client, request).await,
        }
    }
}

/// Serves a connection until it ends, or `closed` says so and its running requests are through.
pub(crate) async fn serve(
    caller: Caller,
    stream: TcpStream,
    closed: watch::Receiver<bool>,
    acceptor: Option<TlsAcceptor>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let client = caller.client;
    let result = match acceptor {
        None => plain(caller, stream, closed).await,
        Some(acceptor) => encrypted(caller, stream, closed, acceptor).await,
    };
    if let Err(error) = result {
        tracing::debug!(%client, %error, "connection");
    }
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

async fn plain(caller: Caller, stream: TcpStream, mut closed: watch::Receiver<bool>) -> Result<(), Failed> {
    // Looked at, not taken: HTTP/1.1 goes on as if nobody had looked.
    let mut first = [0; PREFACE.len()];
    let seen = tokio::select! {
        seen = stream.peek(&mut first) => seen?,
        () = until(&mut closed) => return Ok(()),
    };
    let first = first.get(..seen).unwrap_or_default();
    if !first.is_empty() && PREFACE.starts_with(first) {
        http2(caller, stream, closed).await
    } else {
        http1(caller, Joined(stream), closed).await
    }
}

async fn encrypted(
    caller: Caller,
    stream: TcpStream,
    mut closed: watch::Receiver<bool>,
    acceptor: TlsAcceptor,
) -> Result<(), Failed> {
    let stream = tokio::select! {
        shaken = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)) => shaken??,
        () = until(&mut closed) => return Ok(()),
    };
    if stream.get_ref().1.alpn_protocol() == Some(tls::H2) {
        http2(caller, stream, closed).await
    } else {
        http1(caller, stream, closed).await
    }
}

async fn http1(
    caller: Caller,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    mut closed: watch::Receiver<bool>,
) -> Result<(), Failed> {
    let service = service_fn(move |request| caller.clone().answer(request));
    let mut connection = std::pin::pin!(
        http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let result = tokio::select! {
        // In this order: no dice are cast each time that a byte arrives.
        biased;
        result = connection.as_mut() => result,
        () = until(&mut closed) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    result.map_err(Into::into)
}

/// HTTP/2, or HTTP/1.1 of a client whose first bytes could have been either.
async fn http2(
    caller: Caller,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    mut closed: watch::Receiver<bool>,
) -> Result<(), Failed> {
    let service = service_fn(move |mut request| {
        as_http1(&mut request);
        caller.clone().answer(request)
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG)
        .max_concurrent_streams(MAX_STREAMS);
    let mut connection =
        std::pin::pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    tokio::select! {
        result = connection.as_mut() => result,
        () = until(&mut closed) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}

/// Gives a request the headers that HTTP/1.1 has for what HTTP/2 says otherwise (RFC 9113, sections 8.3.1 and 8.2.3).
fn as_http1(request: &mut Request<Incoming>) {
    let authority = request.uri().authority().map(|a| a.as_str().to_owned());
    join_cookies(request.headers_mut());
    if let Some(authority) = authority
        && !request.headers().contains_key(HOST)
        && let Ok(host) = HeaderValue::from_str(&authority)
    {
        request.headers_mut().insert(HOST, host);
    }
}

fn join_cookies(headers: &mut HeaderMap) {
    let pieces: Vec<&[u8]> = headers
        .get_all(COOKIE)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    if pieces.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&pieces.join(b"; ".as_slice()))
    {
        headers.insert(COOKIE, joined);
    }
}

/// Returns when it has been said that everything ends.
pub(crate) async fn until(closed: &mut watch::Receiver<bool>) {
    let _ = closed.wait_for(|c| *c).await;
}
