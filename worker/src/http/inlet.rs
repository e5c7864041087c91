//! What the engine sends for one request, and the ways to end that from outside.
//!
//! A client that reads nothing is not written to, and a reply that cannot be written is not asked for more: whoever reads the
//! events may stand still for as long as the client likes. So a cancellation and the limits of time do not go through
//! the reader. They close the channels themselves, which the engine sees on its next step, and leave word of why.

use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use api_types::ApiError;
use parking_lot::Mutex;
use tokio::sync::mpsc::Receiver;
use tokio::time::Instant;

use super::errors;
use super::metrics::Outcome;
use super::service::Service;
use crate::backend::{EngineError, GenerationEvent};

/// The channels of one request's replies.
#[derive(Debug)]
pub(super) struct Inlet {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None`: that reply has ended.
    channels: Vec<Option<Receiver<GenerationEvent>>>,
    /// Whose turn it is.
    next: usize,
    /// Something has come.
    started: bool,
    /// Nothing has come since, nor lies here.
    quiet_since: Instant,
    /// The engine has been seen stepping then, or something was read.
    alive_at: Instant,
    cut: Option<Cut>,
    reader: Option<Waker>,
}

/// Why a request was ended from outside.
#[derive(Debug, Clone)]
pub(super) struct Cut {
    pub(super) error: ApiError,
    pub(super) outcome: Outcome,
}

/// What the reader gets.
pub(super) enum Taken {
    /// Of the reply `index`; `None`: its channel closed without a last event.
    Event {
        index: usize,
        event: Option<GenerationEvent>,
    },
    /// All replies have ended.
    Done,
    /// It is over, whatever else has come.
    Cut(Cut),
}

/// Limits of time of one request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// What the request itself asks for.
    pub(super) own: Option<Own>,
    /// For a place.
    pub(super) queue: Duration,
    /// Without an event and without a step of the engine.
    pub(super) silence: Duration,
}

/// A limit that a request brings along.
#[derive(Debug, Clone, Copy)]
pub(super) enum Own {
    /// For all of the reply, from its arrival.
    Whole { arrived: Instant, limit: Duration },
    /// For the time without a token, waiting and prefill included.
    Quiet(Duration),
}

impl Inlet {
    pub(super) fn new(channels: Vec<Receiver<GenerationEvent>>) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            state: Mutex::new(State {
                channels: channels.into_iter().map(Some).collect(),
                next: 0,
                started: false,
                quiet_since: now,
                alive_at: now,
                cut: None,
                reader: None,
            }),
        })
    }

    /// The next event of any reply, which take turns.
    pub(super) async fn take(&self) -> Taken {
        std::future::poll_fn(|cx| self.state.lock().take(Some(cx))).await
    }

    /// What has come already.
    pub(super) fn try_take(&self) -> Option<Taken> {
        match self.state.lock().take(None) {
            Poll::Ready(taken) => Some(taken),
            Poll::Pending => None,
        }
    }

    /// A reply has ended; the engine need not go on with it.
    pub(super) fn close(&self, index: usize) {
        if let Some(channel) = self.state.lock().channels.get_mut(index) {
            *channel = None;
        }
    }

    /// All have.
    pub(super) fn close_all(&self) {
        self.state.lock().channels.fill_with(|| None);
    }

    /// Ends the request at once, whether or not anybody reads. False: there was nothing left to end.
    pub(super) fn cut(&self, cut: Cut) -> bool {
        let mut state = self.state.lock();
        // A reply that is complete stays so.
        if state.channels.iter().all(Option::is_none) {
            return false;
        }
        state.channels.fill_with(|| None);
        state.cut.get_or_insert(cut);
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        true
    }

    /// Ends the request when a limit is reached. Returns when there is nothing left to watch.
    pub(super) async fn watch(&self, limits: &Limits, service: &Service) {
        let next_look = || self.state.lock().next_look(limits);
        while let Some(next) = next_look() {
            tokio::time::sleep_until(next).await;
            // A long prefill is silent but steps.
            let stepped = service.backend.stats().last_step_age;
            let overdue = self.state.lock().overdue(limits, stepped);
            if let Some(error) = overdue {
                let outcome = Outcome::ServerError;
                self.cut(Cut { error, outcome });
                return;
            }
        }
    }
}

impl State {
    /// With a context, whoever waits is woken.
    fn take(&mut self, mut cx: Option<&mut Context<'_>>) -> Poll<Taken> {
        if let Some(cut) = &self.cut {
            return Poll::Ready(Taken::Cut(cut.clone()));
        }
        if self.channels.iter().all(Option::is_none) {
            return Poll::Ready(Taken::Done);
        }
        let count = self.channels.len();
        for index in (0..count).map(|n| (self.next + n) % count) {
            let Some(Some(channel)) = self.channels.get_mut(index) else {
                continue;
            };
            let event = match &mut cx {
                Some(cx) => match channel.poll_recv(cx) {
                    Poll::Ready(event) => event,
                    Poll::Pending => continue,
                },
                None => match channel.try_recv() {
                    Ok(event) => Some(event),
                    Err(_) => continue,
                },
            };
            self.next = index + 1;
            self.started = true;
            self.quiet_since = Instant::now();
            self.alive_at = self.quiet_since;
            return Poll::Ready(Taken::Event { index, event });
        }
        if let Some(cx) = cx {
            self.reader = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// When a limit may be reached; `None` when the engine has nothing more to do for this request.
    fn next_look(&self, limits: &Limits) -> Option<Instant> {
        let mut open = self.channels.iter().flatten();
        if open.all(Receiver::is_closed) {
            return None;
        }
        let patience = if self.started {
            limits.silence
        } else {
            limits.queue
        };
        let next = self.alive_at + patience;
        Some(match limits.own {
            None => next,
            Some(Own::Whole { arrived, limit }) => next.min(arrived + limit),
            Some(Own::Quiet(limit)) => next.min(self.quiet_since + limit),
        })
    }

    /// What the client is told when a limit is reached, the engine having stepped that long ago.
    fn overdue(&mut self, limits: &Limits, stepped: Duration) -> Option<ApiError> {
        let now = Instant::now();
        if self.channels.iter().flatten().any(|channel| !channel.is_empty()) {
            // It is the reader who is slow.
            self.started = true;
            self.quiet_since = now;
        }
        match limits.own {
            Some(Own::Whole { arrived, limit }) if now >= arrived + limit => {
                let seconds = limit.as_secs_f64();
                let message =
                    format!("the reply was not complete within the request's timeout of {seconds} s");
                return Some(ApiError::timed_out(message));
            }
            Some(Own::Quiet(limit)) if now >= self.quiet_since + limit => {
                let seconds = limit.as_secs_f64();
                let message = format!("nothing came for {seconds} s, the request's timeout");
                return Some(ApiError::timed_out(message));
            }
            _ => {}
        }
        if !self.started {
            let waited = now >= self.alive_at + limits.queue;
            return waited.then(|| errors::from_engine(&EngineError::WaitedTooLong(limits.queue)));
        }
        if now < self.alive_at + limits.silence {
            return None;
        }
        if stepped < limits.silence {
            self.alive_at = now;
            return None;
        }
        let message = format!(
            "the engine has not stepped for {} s; the request is given up",
            stepped.as_secs()
        );
        Some(ApiError::timed_out(message))
    }
}
