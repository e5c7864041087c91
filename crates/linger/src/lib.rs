//! Lingering close, as web servers call it, for hyper's HTTP/1.1.
//!
//! A server that answers before it has read the whole request (the body is too large, the key is wrong, there is no
//! such route) and then closes the connection makes the kernel reset it: bytes lie there that nobody has read. A client that
//! still writes is told "broken pipe" then, and may never see the answer that says why. So what nobody reads of a body
//! is taken in and thrown away while the answer is on its way. A client that comes to its end may go on with the connection.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Version, header};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;

/// Longest that the rest of a body is taken in; then the connection is closed as it is.
pub const LIMIT: Duration = Duration::from_secs(10);

/// A body that a task of its own can read to its end.
pub trait Readable: http_body::Body<Data: Send, Error: Send> + Send + Unpin + 'static {}

impl<B: http_body::Body<Data: Send, Error: Send> + Send + Unpin + 'static> Readable for B {}

/// A request's body. What is left of it when it is dropped is taken in.
#[derive(Debug)]
pub struct Body<B: Readable> {
    /// `None`: read to its end.
    rest: Option<B>,
    lingers: bool,
}

impl<B: Readable> Body<B> {
    /// The request, with its body made one of these.
    ///
    /// A client that waits for leave to send (`Expect: 100-continue`) is not asked for what nobody wants, and HTTP/2 has
    /// a way of its own to stop one.
    pub fn wrap(request: Request<B>) -> Request<Self> {
        let old = request.version() <= Version::HTTP_11;
        let lingers = old && !request.headers().contains_key(header::EXPECT);
        request.map(|body| Self {
            rest: Some(body),
            lingers,
        })
    }
}

impl<B: Readable> http_body::Body for Body<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let Some(rest) = &mut self.rest else {
            return Poll::Ready(None);
        };
        let next = Pin::new(rest).poll_frame(cx);
        if matches!(next, Poll::Ready(None | Some(Err(_)))) {
            self.rest = None;
        }
        next
    }

    fn is_end_stream(&self) -> bool {
        self.rest.as_ref().is_none_or(B::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.rest
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), B::size_hint)
    }
}

impl<B: Readable> Drop for Body<B> {
    fn drop(&mut self) {
        let Some(mut rest) = self.rest.take() else {
            return;
        };
        if !self.lingers || rest.is_end_stream() {
            return;
        }
        // Without a runtime the connection is over as well.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(tokio::time::timeout(LIMIT, async move {
                while let Some(Ok(_)) = rest.frame().await {}
            }));
        }
    }
}

#[cfg(test)]
mod tests;
