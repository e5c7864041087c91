//! One connection to a model's server, and the reply that comes over it.
//!
//! Nothing runs beside the request: whoever waits for the reply writes, reads and decodes. Pieces that have arrived
//! together are handed on together, so that a fast stream of small events costs one read for many of them.

use std::cell::RefCell;
use std::io::{Error, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, Request};
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Pool;
use super::codec::{self, Framing, Head};

/// Most bytes of one read.
const READ: usize = 64 * 1024;
/// Largest body that is copied behind its head, so that both leave in one piece.
const SMALL: usize = 8 * 1024;

thread_local! {
    /// What a read goes to first: connections that wait hold no buffer.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ].into());
}

/// A stream of bytes to a server: plain, or encrypted.
pub trait Link: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Link for T {}

/// Closes a connection from outside, whoever waits for it.
#[derive(Clone, Default)]
pub struct Closer(Arc<Mutex<Option<Box<dyn Link>>>>);

impl std::fmt::Debug for Closer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Closer")
    }
}

impl Closer {
    /// Closes it. Whoever reads or writes next is told that it is broken.
    pub fn close(&self) {
        // Not dropped under the lock.
        let link = self.0.lock().take();
        drop(link);
    }

    fn with<T>(
        &self,
        f: impl FnOnce(Pin<&mut dyn Link>) -> Poll<Result<T, Error>>,
    ) -> Poll<Result<T, Error>> {
        match &mut *self.0.lock() {
            Some(link) => f(Pin::new(&mut **link)),
            None => Poll::Ready(Err(ErrorKind::ConnectionAborted.into())),
        }
    }
}

/// One connection; closed when dropped.
pub(super) struct Conn {
    link: Closer,
    /// Has arrived, and has not been used.
    received: BytesMut,
}

impl std::fmt::Debug for Conn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Conn")
    }
}

/// A request on its way out.
#[derive(Debug)]
pub(super) struct Outgoing {
    head: Vec<u8>,
    body: Bytes,
    sent: usize,
    /// Why no more of it can be sent.
    failure: Option<Error>,
}

impl Outgoing {
    pub(super) fn new(
        request: &Request<Bytes>,
        authority: &str,
        authorization: Option<&HeaderValue>,
    ) -> Self {
        let mut head = codec::encode_head(request, authority, authorization);
        let mut body = request.body().clone();
        if body.len() <= SMALL {
            head.extend_from_slice(&body);
            body = Bytes::new();
        }
        Self {
            head,
            body,
            sent: 0,
            failure: None,
        }
    }

    fn left(&self) -> [&[u8]; 2] {
        let behind = self.sent.saturating_sub(self.head.len());
        [
            self.head.get(self.sent..).unwrap_or_default(),
            self.body.get(behind..).unwrap_or_default(),
        ]
    }

    fn is_sent(&self) -> bool {
        self.sent >= self.head.len() + self.body.len()
    }

    /// Nothing has left yet: another connection may take it.
    pub(super) fn is_untouched(&self) -> bool {
        self.sent == 0
    }
}

impl Conn {
    pub(super) fn new(link: Box<dyn Link>) -> Self {
        Self {
            link: Closer(Arc::new(Mutex::new(Some(link)))),
            received: BytesMut::new(),
        }
    }

    pub(super) fn closer(&self) -> Closer {
        self.link.clone()
    }

    /// Whether an unused connection is still good: the server has neither closed it nor sent anything unasked.
    pub(super) fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        let mut buffer = ReadBuf::new(&mut byte);
        let mut cx = Context::from_waker(std::task::Waker::noop());
        self.link
            .with(|link| link.poll_read(&mut cx, &mut buffer))
            .is_pending()
    }

    /// Sends on; ready when all has been sent.
    fn poll_send(&mut self, cx: &mut Context<'_>, out: &mut Outgoing) -> Poll<Result<(), Error>> {
        while !out.is_sent() {
            let n = ready!(self.link.with(|link| match out.left() {
                [[], body] => link.poll_write(cx, body),
                [head, []] => link.poll_write(cx, head),
                [head, body] => link.poll_write_vectored(cx, &[IoSlice::new(head), IoSlice::new(body)]),
            }))?;
            if n == 0 {
                return Poll::Ready(Err(ErrorKind::WriteZero.into()));
            }
            out.sent += n;
        }
        // What lies in a layer of its own (encryption) goes out too.
        self.link.with(|link| link.poll_flush(cx))
    }

    /// Reads once and lets `take` have what came; nothing is the end of the connection.
    fn poll_read<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut BytesMut, &[u8]) -> T,
    ) -> Poll<Result<T, Error>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(self.link.with(|link| link.poll_read(cx, &mut buffer)))?;
            Poll::Ready(Ok(take(&mut self.received, buffer.filled())))
        })
    }

    fn poll_head(&mut self, cx: &mut Context<'_>, method: &Method) -> Poll<Result<Head, Error>> {
        loop {
            let n = ready!(self.poll_read(cx, |received, piece| {
                received.extend_from_slice(piece);
                piece.len()
            }))?;
            if n == 0 {
                let why = if self.received.is_empty() {
                    "closed by the server"
                } else {
                    "closed by the server within the reply's head"
                };
                return Poll::Ready(Err(Error::new(ErrorKind::UnexpectedEof, why)));
            }
            if let Some(head) = codec::take_head(&mut self.received, method)? {
                return Poll::Ready(Ok(head));
            }
        }
    }

    /// Sends the request until the head of a reply is there. (A server may answer before it has read everything; the
    /// rest goes out while the reply is read.)
    pub(super) fn poll_exchange(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut Outgoing,
        method: &Method,
    ) -> Poll<Result<Head, Error>> {
        if out.failure.is_none()
            && let Poll::Ready(Err(error)) = self.poll_send(cx, out)
        {
            if out.is_untouched() {
                return Poll::Ready(Err(error));
            }
            // The server may have answered before it closed: that would say more than the broken write.
            out.failure = Some(error);
        }
        let head = ready!(self.poll_head(cx, method));
        Poll::Ready(head.map_err(|error| out.failure.take().unwrap_or(error)))
    }
}

/// The body of a server's reply. Read to its end, its connection serves the next request; dropped before, it is
/// closed, so that the server notices that nobody listens any more.
#[derive(Debug)]
pub struct Incoming {
    pool: Arc<Pool>,
    conn: Option<Conn>,
    framing: Framing,
    keep_alive: bool,
    /// The rest of the request.
    outgoing: Option<Outgoing>,
    /// The last byte has been handed on.
    ended: bool,
}

impl Incoming {
    pub(super) fn new(
        pool: Arc<Pool>,
        conn: Conn,
        framing: Framing,
        keep_alive: bool,
        outgoing: Outgoing,
    ) -> Self {
        let ended = matches!(framing, Framing::Length(0));
        let keep_alive = keep_alive && outgoing.failure.is_none();
        let mut body = Self {
            pool,
            conn: Some(conn),
            framing,
            keep_alive,
            outgoing: (!outgoing.is_sent() && outgoing.failure.is_none()).then_some(outgoing),
            ended,
        };
        if ended {
            body.settle();
        }
        body
    }

    /// Neither length nor chunks: the end of the connection is the reply's end, whether meant or not.
    #[must_use]
    pub fn ends_on_close(&self) -> bool {
        matches!(self.framing, Framing::UntilClose)
    }

    /// The connection itself, and what has arrived over it, where another protocol begins.
    #[must_use]
    pub fn into_upgraded(mut self) -> Option<(Box<dyn Link>, Bytes)> {
        let conn = self
            .conn
            .take()
            .filter(|_| matches!(self.framing, Framing::Upgrade))?;
        let link = conn.link.0.lock().take()?;
        Some((link, conn.received.freeze()))
    }

    /// The reply is complete: the connection is given back, or closed.
    fn settle(&mut self) {
        self.ended = true;
        if let Some(conn) = self.conn.take()
            && self.keep_alive
            && self.outgoing.is_none()
            && conn.received.is_empty()
        {
            self.pool.give_back(conn);
        }
    }

    /// What is in `piece` of the body; `false` if the end of the connection is not the end of the body.
    fn decode(framing: &mut Framing, piece: &[u8], unused: &mut BytesMut) -> Result<Bytes, Error> {
        match framing {
            Framing::Length(left) => {
                let n = usize::try_from(*left).map_or(piece.len(), |left| left.min(piece.len()));
                let (body, surplus) = piece.split_at_checked(n).unwrap_or((piece, &[]));
                unused.extend_from_slice(surplus);
                *left -= body.len() as u64;
                Ok(Bytes::copy_from_slice(body))
            }
            Framing::Chunked(chunks) => {
                let mut out = BytesMut::with_capacity(piece.len());
                let used = chunks.decode(piece, &mut out)?;
                unused.extend_from_slice(piece.get(used..).unwrap_or_default());
                Ok(out.freeze())
            }
            Framing::UntilClose | Framing::Upgrade => Ok(Bytes::copy_from_slice(piece)),
        }
    }

    fn is_complete(&self) -> bool {
        match &self.framing {
            Framing::Length(left) => *left == 0,
            Framing::Chunked(chunks) => chunks.is_end(),
            Framing::UntilClose | Framing::Upgrade => false,
        }
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        loop {
            let Some(conn) = &mut self.conn else {
                return Poll::Ready(None);
            };
            if let Some(out) = &mut self.outgoing {
                match conn.poll_send(cx, out) {
                    Poll::Ready(Ok(())) => self.outgoing = None,
                    // It will not be read any more; the reply may still be whole.
                    Poll::Ready(Err(_)) => (self.outgoing, self.keep_alive) = (None, false),
                    Poll::Pending => {}
                }
            }
            let framing = &mut self.framing;
            let piece = if conn.received.is_empty() {
                let read = ready!(conn.poll_read(cx, |unused, piece| {
                    (piece.len(), Self::decode(framing, piece, unused))
                }));
                match read {
                    Ok((0, _)) if matches!(framing, Framing::UntilClose) => {
                        self.settle();
                        return Poll::Ready(None);
                    }
                    Ok((0, _)) => Err(Error::new(
                        ErrorKind::UnexpectedEof,
                        "closed by the server within the reply",
                    )),
                    Ok((_, piece)) => piece,
                    Err(error) => Err(error),
                }
            } else {
                // What came together with the head.
                let received = conn.received.split().freeze();
                match framing {
                    Framing::Length(left) if received.len() as u64 <= *left => {
                        *left -= received.len() as u64;
                        Ok(received)
                    }
                    framing => Self::decode(framing, &received, &mut conn.received),
                }
            };
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    self.conn = None;
                    return Poll::Ready(Some(Err(error)));
                }
            };
            if self.is_complete() {
                self.settle();
            }
            if !piece.is_empty() {
                return Poll::Ready(Some(Ok(piece)));
            }
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let piece = ready!(self.get_mut().poll_piece(cx));
        Poll::Ready(piece.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        match self.framing {
            Framing::Length(left) => SizeHint::with_exact(left),
            _ => SizeHint::default(),
        }
    }
}
