//! Pooled connections to one model server.
//!
//! One connection carries one request at a time. It goes back to the pool by itself when its reply has been read to
//! the end; dropped at any other moment it is closed at once, so that the server notices that nobody listens any more.
//!
//! A peer's server, and one that a foreign command starts, is reached in the same way, through TLS if its address says
//! so.
//!
//! Layout: `address` base addresses; `tunnel` the way through an HTTP proxy; `codec` heads and chunks of HTTP/1.1; `conn` one connection and the reply that comes over it.

mod address;
mod codec;
mod conn;
mod tunnel;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Request, Response};
use parking_lot::{Mutex, RwLock};
use registry::Timeouts;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

pub use self::address::Address;
pub use self::conn::{Closer, Incoming, Link};
use self::conn::{Conn, Outgoing};
use self::tunnel::Tunnel;
use crate::tls;

/// Most unused connections kept.
const MAX_IDLE: usize = 256;

/// Limits of the connection; `None` is no limit.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To establish it.
    pub connect: Option<Duration>,
    /// Until the head of the reply.
    pub response_header: Option<Duration>,
    /// That an unused one is kept.
    pub idle: Option<Duration>,
    /// Between two probes of whether another machine is still there.
    pub keepalive: Option<Duration>,
    /// For TLS.
    pub tls_handshake: Option<Duration>,
}

impl From<&Timeouts> for Limits {
    fn from(timeouts: &Timeouts) -> Self {
        Self {
            connect: timeouts.connect,
            response_header: timeouts.response_header,
            idle: timeouts.idle_conn,
            keepalive: timeouts.keepalive,
            tls_handshake: timeouts.tls_handshake,
        }
    }
}

/// Why there is no reply.
#[derive(Debug)]
pub enum Error {
    /// No connection.
    Connect(std::io::Error),
    /// The connection broke before the head of a reply.
    Broken(std::io::Error),
    /// No head of a reply within this time.
    Timeout(Duration),
}

impl Error {
    /// Whether the server cannot have acted upon the request, provided that it has died: it was not reached, or left
    /// (part of) the request unread, which is what a reset says. A connection that waits to be accepted is reset when
    /// the server dies.
    #[must_use]
    pub fn is_unread(&self) -> bool {
        use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
        match self {
            Self::Connect(_) => true,
            Self::Broken(e) => matches!(e.kind(), ConnectionReset | BrokenPipe),
            Self::Timeout(_) => false,
        }
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Connect(e) => write!(f, "cannot connect: {e}"),
            Self::Broken(e) => write!(f, "connection broken before a reply: {e}"),
            Self::Timeout(t) => write!(f, "no reply within {} s", t.as_secs_f64()),
        }
    }
}

/// Address of a server and its unused connections.
#[derive(Debug)]
pub struct Pool {
    host: String,
    port: u16,
    /// For requests that name no host.
    authority: String,
    /// Those of the registry in force.
    limits: RwLock<Limits>,
    /// What a worker that has a key of its own is shown.
    authorization: Option<HeaderValue>,
    /// What a worker of ours does not need.
    far: Option<Far>,
    idle: Mutex<VecDeque<Idle>>,
}

#[derive(Debug)]
struct Far {
    tls: bool,
    /// On this machine: if it goes away, the connection says so.
    here: bool,
    tunnel: Option<Tunnel>,
}

#[derive(Debug)]
struct Idle {
    conn: Conn,
    since: Instant,
}

impl Pool {
    /// An empty pool. Every request shows the server this `authorization`, whoever it comes from.
    #[must_use]
    pub fn new(host: &str, port: u16, limits: Limits, authorization: Option<HeaderValue>) -> Arc<Self> {
        Arc::new(Self {
            host: host.to_owned(),
            port,
            authority: format!("{host}:{port}"),
            limits: RwLock::new(limits),
            authorization,
            far: None,
            idle: Mutex::default(),
        })
    }

    /// An empty pool of a server that may be on another machine, and may want TLS.
    #[must_use]
    pub fn far(address: &Address, limits: Limits) -> Arc<Self> {
        let Address { tls, host, port, .. } = address;
        Arc::new(Self {
            host: host.clone(),
            port: *port,
            authority: address.authority.clone(),
            limits: RwLock::new(limits),
            // A peer's key comes with its request.
            authorization: None,
            far: Some(Far {
                tls: *tls,
                here: address.is_here(),
                tunnel: Tunnel::from_env(address),
            }),
            idle: Mutex::default(),
        })
    }

    /// Other limits from now on.
    pub fn set_limits(&self, limits: Limits) {
        *self.limits.write() = limits;
    }

    fn limits(&self) -> Limits {
        *self.limits.read()
    }

    /// Sends a request and returns the reply, whose body is still to come.
    ///
    /// A request of which nothing could be written to a used connection goes out over a new one: the server had just
    /// closed the idle connection. What has been written may have been acted upon, and is never sent twice.
    ///
    /// `on_conn` is told how to close the connection, before anything is sent.
    ///
    /// # Errors
    /// No connection, or none that lasts until the head of a reply.
    pub async fn send(
        self: &Arc<Self>,
        request: &Request<Bytes>,
        on_conn: &(dyn Fn(Closer) + Sync),
    ) -> Result<Response<Incoming>, Error> {
        let Some(limit) = self.limits().response_header else {
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
        let tls = self.far.as_ref().is_some_and(|far| far.tls);
        format!("http{}://{}", if tls { "s" } else { "" }, self.authority)
    }

    /// Host and port, the port of the scheme too.
    fn in_full(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    async fn send_unlimited(
        self: &Arc<Self>,
        request: &Request<Bytes>,
        on_conn: &(dyn Fn(Closer) + Sync),
    ) -> Result<Response<Incoming>, Error> {
        let mut out = Outgoing::new(request, &self.authority, self.authorization.as_ref());
        let method = request.method();
        let mut used = self.take_idle();
        loop {
            let was_used = used.is_some();
            let mut conn = match used.take() {
                Some(conn) => conn,
                None => self.connect().await?,
            };
            on_conn(conn.closer());
            let head = std::future::poll_fn(|cx| conn.poll_exchange(cx, &mut out, method)).await;
            match head {
                Ok(head) => {
                    let body = Incoming::new(self.clone(), conn, head.framing, head.keep_alive, out);
                    return Ok(head.response.map(|()| body));
                }
                Err(_) if was_used && out.is_untouched() => {}
                Err(error) => return Err(Error::Broken(error)),
            }
        }
    }

    fn take_idle(&self) -> Option<Conn> {
        let limit = self.limits().idle;
        let mut idle = self.idle.lock();
        while let Some(Idle { mut conn, since }) = idle.pop_back() {
            let stale = limit.is_some_and(|limit| since.elapsed() > limit);
            if !stale && conn.is_quiet() {
                return Some(conn);
            }
        }
        None
    }

    /// Takes back a connection whose reply has been read to the end.
    fn give_back(&self, conn: Conn) {
        let limit = self.limits().idle;
        let mut idle = self.idle.lock();
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
        let tunnel = self.far.as_ref().and_then(|far| far.tunnel.as_ref());
        let (host, port) = tunnel.map_or((&self.host, self.port), |t| (&t.host, t.port));
        let connecting = async {
            let mut stream = TcpStream::connect((host.as_str(), port)).await?;
            if let Some(tunnel) = tunnel {
                tunnel.open(&mut stream, &self.in_full()).await?;
            }
            Ok(stream)
        };
        let limits = self.limits();
        let stream = within(limits.connect, connecting).await.map_err(Error::Connect)?;
        stream.set_nodelay(true).map_err(Error::Connect)?;
        match &self.far {
            None => Ok(Conn::new(Box::new(stream))),
            Some(far) => far
                .dress(&self.host, stream, limits)
                .await
                .map_err(Error::Connect),
        }
    }
}

impl Far {
    async fn dress(&self, host: &str, stream: TcpStream, limits: Limits) -> std::io::Result<Conn> {
        if let Some(every) = limits.keepalive.filter(|_| !self.here) {
            // A machine that went away says nothing: this finds it out.
            let probes = TcpKeepalive::new().with_time(every).with_interval(every);
            if let Err(error) = SockRef::from(&stream).set_tcp_keepalive(&probes) {
                tracing::debug!(%error, "TCP keep-alive");
            }
        }
        if !self.tls {
            return Ok(Conn::new(Box::new(stream)));
        }
        let fail = |e: &dyn std::fmt::Display| std::io::Error::other(format!("no TLS: {e}"));
        let config = tls::client().await.map_err(|e| fail(&e))?;
        let name = ServerName::try_from(host.to_owned()).map_err(|e| fail(&e))?;
        let shaking = TlsConnector::from(config).connect(name, stream);
        let stream = within(limits.tls_handshake, shaking)
            .await
            .map_err(|e| fail(&e))?;
        Ok(Conn::new(Box::new(stream)))
    }
}

async fn within<T>(
    limit: Option<Duration>,
    work: impl Future<Output = std::io::Result<T>>,
) -> std::io::Result<T> {
    match limit {
        None => work.await,
        Some(limit) => tokio::time::timeout(limit, work)
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())),
    }
}

/// A pool shared by the requests of one process.
pub type SharedPool = Arc<Pool>;
