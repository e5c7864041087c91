//! The way back to a request in flight: where it learns that it has to end.

use std::task::{Context, Poll, Waker};

use lifecycle::CutReason;
use parking_lot::Mutex;

use crate::upstream::Closer;

/// Where a request in flight is told to end.
#[derive(Debug, Default)]
pub struct Wire {
    inner: Mutex<WireState>,
}

#[derive(Debug, Default)]
struct WireState {
    ordered: Option<Ordered>,
    /// Whoever serves the request.
    waker: Option<Waker>,
    /// Its connection, which is closed even while nobody serves it (a client that does not read).
    closer: Option<Closer>,
}

/// Why a request in flight has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordered {
    /// Somebody has cancelled it.
    Cancelled,
    /// Its model has to go.
    Cut(CutReason),
}

impl Wire {
    pub(crate) fn order(&self, why: Ordered) {
        let mut inner = self.inner.lock();
        inner.ordered.get_or_insert(why);
        let (waker, closer) = (inner.waker.take(), inner.closer.take());
        drop(inner);
        if let Some(closer) = closer {
            closer.close();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Says which connection to close. Closes it at once if the order came first.
    pub fn attach(&self, closer: Closer) {
        let mut inner = self.inner.lock();
        if inner.ordered.is_some() {
            closer.close();
        } else {
            inner.closer = Some(closer);
        }
    }

    /// The connection serves somebody else from now on.
    pub fn detach(&self) {
        self.inner.lock().closer = None;
    }

    /// Ends the request.
    pub fn cancel(&self) {
        self.order(Ordered::Cancelled);
    }

    /// Why it has to end, if it has to.
    #[must_use]
    pub fn ordered(&self) -> Option<Ordered> {
        self.inner.lock().ordered
    }

    /// Ready when it has to end.
    pub fn poll_ordered(&self, cx: &Context<'_>) -> Poll<Ordered> {
        let mut inner = self.inner.lock();
        if let Some(why) = inner.ordered {
            return Poll::Ready(why);
        }
        if !inner.waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
            inner.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Returns when it has to end.
    pub async fn until_ordered(&self) -> Ordered {
        std::future::poll_fn(|cx| self.poll_ordered(cx)).await
    }
}
