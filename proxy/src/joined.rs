//! A client's connection as hyper writes to it: head, body and the marks of chunks are pieces of their own, which the
//! kernel takes apart again one by one. Those of a small message go as one.

use std::cell::RefCell;
use std::io::{Error, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Largest message that is worth a copy.
const SMALL: usize = 2 * 1024;

thread_local! {
    /// Where pieces come together: connections that wait hold no room for it.
    static TOGETHER: RefCell<Vec<u8>> = RefCell::new(Vec::with_capacity(SMALL));
}

/// A stream that puts small pieces together.
#[derive(Debug)]
pub(crate) struct Joined<T>(pub(crate) T);

impl<T: AsyncRead + Unpin> AsyncRead for Joined<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Joined<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, Error>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<Result<usize, Error>> {
        let all: usize = pieces.iter().map(|p| p.len()).sum();
        if pieces.len() < 2 || all > SMALL {
            return Pin::new(&mut self.0).poll_write_vectored(cx, pieces);
        }
        TOGETHER.with_borrow_mut(|together| {
            together.clear();
            pieces.iter().for_each(|piece| together.extend_from_slice(piece));
            Pin::new(&mut self.0).poll_write(cx, together)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    /// Takes at most so many bytes at once, and notes how it was asked.
    struct Narrow(usize, Vec<u8>, Vec<&'static str>);

    impl AsyncWrite for Narrow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<Result<usize, Error>> {
            let n = bytes.len().min(self.0);
            self.1.extend_from_slice(&bytes[..n]);
            self.2.push("one");
            Poll::Ready(Ok(n))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<Result<usize, Error>> {
            self.2.push("many");
            let all: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
            let n = all.len().min(self.0);
            self.1.extend_from_slice(&all[..n]);
            Poll::Ready(Ok(n))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn small_pieces_go_as_one_and_none_is_lost_to_a_narrow_way() {
        for (sizes, width, asked) in [
            (vec![100, 0, 200], 1000, "one"),
            (vec![SMALL - 1, 1], 1000, "one"),
            (vec![SMALL, 1], 1000, "many"),
            (vec![5], 2, "many"),
        ] {
            let pieces: Vec<Vec<u8>> = sizes
                .iter()
                .zip(b'a'..)
                .map(|(n, letter)| vec![letter; *n])
                .collect();
            let whole = pieces.concat();
            let mut stream = Joined(Narrow(width, Vec::new(), Vec::new()));
            let slices: Vec<IoSlice<'_>> = pieces.iter().map(|p| IoSlice::new(p)).collect();
            let n = poll_fn(|cx| Pin::new(&mut stream).poll_write_vectored(cx, &slices))
                .await
                .unwrap();
            let Joined(Narrow(_, written, way)) = stream;
            assert_eq!(n, whole.len().min(width), "{sizes:?}");
            assert_eq!(
                (written.as_slice(), way.as_slice()),
                (&whole[..n], [asked].as_slice()),
                "{sizes:?}"
            );
        }
    }
}
