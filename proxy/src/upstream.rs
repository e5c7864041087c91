//! Pooled connections to one model server.
//!
//! One connection carries one request at a time. It goes back to the pool only when its reply has been read to the
//! end; dropped at any other moment it is closed at once, so that the server notices that nobody listens any more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;

/// Most unused connections kept.
const MAX_IDLE: usize = 256;

/// How long a used connection may take to be ready for the next request. One whose server answered without reading
/// the whole request never is.
const READY: Duration = Duration::from_millis(50);

/// Limits of the connection; `None` is no limit.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To establish it.
    pub connect: Option<Duration>,
    /// Until the head of the reply.
    pub response_header: Option<Duration>,
    /// That an unused one is kept.
    pub idle: Option<Duration>,
}

/// Why there is no reply.
#[derive(Debug)]
pub enum Error {
    /// No connection.
    Connect(std::io::Error),
    /// The connection broke before the head of a reply.
    Broken(hyper::Error),
    /// No head of a reply within this time.
    Timeout(Duration),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(e) => write!(f, "cannot connect: {e}"),
            Self::Broken(e) => {
                write!(f, "connection broken before a reply: {e}")?;
                std::error::Error::source(e).map_or(Ok(()), |cause| write!(f, " ({cause})"))
            }
            Self::Timeout(t) => write!(f, "no reply within {} s", t.as_secs_f64()),
        }
    }
}

/// Address of a server and its unused connections.
#[derive(Debug)]
pub struct Pool {
    host: String,
    port: u16,
    limits: Limits,
    idle: Mutex<VecDeque<Idle>>,
}

#[derive(Debug)]
struct Idle {
    conn: Conn,
    since: Instant,
}

/// One connection; closed when dropped.
#[derive(Debug)]
pub struct Conn {
    sender: SendRequest<Full<Bytes>>,
    task: AbortHandle,
}

impl Drop for Conn {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(host: &str, port: u16, limits: Limits) -> Self {
        Self {
            host: host.to_owned(),
            port,
            limits,
            idle: Mutex::default(),
        }
    }

    /// Sends a request and returns the head of the reply with the connection that its body comes over.
    ///
    /// A request that could not be written to a used connection goes out over a new one: the server had just closed the
    /// idle connection. What has been written may have been acted upon, and is never sent twice.
    ///
    /// `on_conn` is told the task whose abort closes the connection, before anything is sent.
    ///
    /// # Errors
    /// No connection, or none that lasts until the head of a reply.
    pub async fn send(
        &self,
        request: &Request<Full<Bytes>>,
        on_conn: &(dyn Fn(AbortHandle) + Sync),
    ) -> Result<(Response<Incoming>, Conn), Error> {
        let Some(limit) = self.limits.response_header else {
            return self.send_unlimited(request, on_conn).await;
        };
        match tokio::time::timeout(limit, self.send_unlimited(request, on_conn)).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout(limit)),
        }
    }

    /// Host and port as a base address.
    #[must_use]
    pub fn address(&self) -> String {
        format!("http://{}:{}", self.host, self.port)
    }

    async fn send_unlimited(
        &self,
        request: &Request<Full<Bytes>>,
        on_conn: &(dyn Fn(AbortHandle) + Sync),
    ) -> Result<(Response<Incoming>, Conn), Error> {
        while let Some(mut conn) = self.take_idle() {
            on_conn(conn.task.clone());
            if !matches!(tokio::time::timeout(READY, conn.sender.ready()).await, Ok(Ok(()))) {
                continue;
            }
            // The body is shared, not copied.
            match conn.sender.send_request(request.clone()).await {
                Ok(response) => return Ok((response, conn)),
                // Not sent at all: the server had closed the idle connection.
                Err(e) if e.is_canceled() => break,
                Err(e) => return Err(Error::Broken(e)),
            }
        }
        let mut conn = self.connect().await?;
        on_conn(conn.task.clone());
        let response = conn
            .sender
            .send_request(request.clone())
            .await
            .map_err(Error::Broken)?;
        Ok((response, conn))
    }

    fn take_idle(&self) -> Option<Conn> {
        let mut idle = self.idle.lock();
        while let Some(Idle { conn, since }) = idle.pop_back() {
            let stale = self.limits.idle.is_some_and(|limit| since.elapsed() > limit);
            if !stale && !conn.sender.is_closed() {
                return Some(conn);
            }
        }
        None
    }

    /// Takes back a connection whose reply has been read to the end.
    pub fn give_back(&self, conn: Conn) {
        if conn.sender.is_closed() {
            return;
        }
        let mut idle = self.idle.lock();
        let limit = self.limits.idle;
        while idle.len() >= MAX_IDLE
            || idle
                .front()
                .is_some_and(|i| limit.is_some_and(|l| i.since.elapsed() > l))
        {
            idle.pop_front();
        }
        idle.push_back(Idle {
            conn,
            since: Instant::now(),
        });
    }

    async fn connect(&self) -> Result<Conn, Error> {
        let connecting = TcpStream::connect((self.host.as_str(), self.port));
        let stream = match self.limits.connect {
            None => connecting.await,
            Some(limit) => tokio::time::timeout(limit, connecting)
                .await
                .unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut))),
        };
        let stream = stream.map_err(Error::Connect)?;
        stream.set_nodelay(true).map_err(Error::Connect)?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(Error::Broken)?;
        let task = tokio::spawn(connection.with_upgrades());
        Ok(Conn {
            sender,
            task: task.abort_handle(),
        })
    }
}

/// A pool shared by the requests of one process.
pub type SharedPool = Arc<Pool>;
